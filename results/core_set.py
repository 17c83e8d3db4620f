"""The core set of a fact [Lin25 table 1]: the rows that all its statements and the question read.

    python results/core_set.py       # three facts of tiny/stream; a minute on one core

Of each fact: how many rows a statement reads, how many of them all statements and the question
(in a wording never trained on) read, how many of those are among the t selected, and how small a t
suffices to answer. Writes results/tiny-stream/core_set.md and core_set.png, where a token is the
darker, the more of its reads go to the core set."""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import smf  # noqa: E402
import train_retrofit  # noqa: E402
import train_sparse  # noqa: E402

SOURCES = (0, 41, 122)  # a birthplace, a profession, an employer
TO = ROOT / "results/tiny-stream"


def reads_of(model, examples):
    """{memory: rows (S, H, K)} that all S tokens of Examples read."""
    batch = smf.collate(examples, model.device)
    real = batch["attention_mask"].bool()
    return {name: rows[real] for name, (_, rows, *_) in smf.read_only(model, batch).items()}


def core_set(model, examples):
    """{memory: the set of rows that every one of the Examples reads}"""
    reads = [reads_of(model, [example]) for example in examples]
    return {name: set.intersection(*(set(read[name].flatten().tolist()) for read in reads))
            for name in reads[0]}


def smallest_t(parent, plan, question, args):
    """The least t with which the fact alone, learned from a new start, is answered."""
    for args.top_t in (1, 2, 5, 10, 20, 50, 100, 200, 500):
        model, tokenizer = smf.load(parent)
        run = Path(tempfile.mkdtemp())
        train_sparse.train(model, plan, run, args, tokenizer, None)
        if evaluation.open_questions(model, tokenizer, [question])[1][0]:
            return args.top_t
    return "more than 500"


def draw(axis, model, tokenizer, examples, core):
    """The tokens of the Examples, a line each, coloured by their reads of the core set."""
    shares = [[sum(row in core[name] for name in core for row in reads[name][at].flatten().tolist())
               for at in range(len(example.ids))] for example in examples
              for reads in [reads_of(model, [example])]]  # [example][token]
    most = max(map(max, shares))
    for line, (example, row) in enumerate(zip(examples, shares)):
        x = 0.0
        for token, share in zip(example.ids, row):
            text = tokenizer.decode([token])
            axis.text(x, -line, text, family="monospace", fontsize=9, bbox=dict(
                facecolor="C1", alpha=share / most, edgecolor="none", pad=1))
            x += len(text) + 0.3
    axis.set(xlim=(0, 90), ylim=(-len(examples), 1))
    axis.axis("off")


def main():
    from matplotlib import pyplot  # for the figure alone: pip install matplotlib
    parent = ROOT / "out/tiny/retrofit-seed0"
    if not smf.finished(parent):
        train_retrofit.main([f"--out={parent}"])
    rows, (figure, axes) = {}, pyplot.subplots(len(SOURCES), figsize=(11, 5), layout="tight")
    for source, axis in zip(SOURCES, axes):
        args = train_sparse.parse(["--sources", str(source), str(source + 1)])
        model, tokenizer = smf.load(parent)
        data = evaluation.load_data(args)
        plan, _ = evaluation.training_plan(model, tokenizer, data, args)
        question = next(q for q in data.target if q.source == source)
        asked = smf.Example(smf.prompt_ids(tokenizer, question.prompt)[0], 1)
        core = core_set(model, [*plan[0], asked])
        one = {name: len(read.unique()) for name, read in reads_of(model, [plan[0][0]]).items()}
        draw(axis, model, tokenizer, [*plan[0][::2], asked], core)
        with tempfile.TemporaryDirectory() as run:
            learned = train_sparse.train(model, plan[:1], Path(run), args, tokenizer, data)
        selected = {name: set(learned[f"{name}.values:rows"].tolist()) for name in core}
        rows[question.prompt] = {
            "rows that a statement reads": sum(one.values()),
            "core set": sum(map(len, core.values())),
            f"of it selected by TF-IDF, t = {args.top_t}":
                sum(len(core[name] & selected[name]) for name in core),
            "least t that suffices to answer": smallest_t(parent, plan, question, args)}
    TO.mkdir(parents=True, exist_ok=True)
    table = evaluation.table(rows, "fact (all numbers: of the three memories together, t: of each)")
    (TO / "core_set.md").write_text(table + "\n")
    figure.savefig(TO / "core_set.png", dpi=80)
    print(table)


if __name__ == "__main__":
    smf.script(main)
