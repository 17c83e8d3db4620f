"""Why is a fact that was learned in ten wordings not recalled in an eleventh? One thing at a time.

    python results/wordings.py --model SMOLLM2_DIR --data DATA_DIR     # about three hours on a core

The first 48 facts of results/streams/facts, a stream, SGD on the rows. Each fact is asked right
after its own steps, and again after all. *seen*: two of the statements told go on from where their
answer begins. *unseen*: the question of the validation split. The conditions that are there are
skipped: the same command goes on. Writes results/wordings/table.md and results.json."""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import smf  # noqa: E402
import train_retrofit  # noqa: E402
import train_sparse  # noqa: E402

FACTS, PROMPT, TO = 48, "Tell me something that you know.", ROOT / "results/wordings"
MIDDLE = (7, 15, 22)
# lr: of the rows, in the units of train_sparse.py; full: of AdamW or SGD on all weights, instead.
# told: every other statement is a reply to PROMPT. number: of statements. order: which of them.
# loss: on all tokens of a statement, or on its answer alone. rows: TF-IDF takes t of those read;
# or, of these, only those that the question reads, too, which no method can know; or the others.
DEFAULT = dict(layers=MIDDLE, lr=1.0, full="", passes=4, told="both", number=10, order="as told",
               loss="all", rows="tfidf", top_t=500)
CONDITIONS = {
    "nothing learned": dict(passes=0), "default": {}, "rate .3": dict(lr=0.3), "rate 3": dict(lr=3.0),
    "1 pass, rate 3": dict(passes=1, lr=3.0), "16 passes, rate .3": dict(passes=16, lr=0.3),
    "plain statements": dict(told="plain"), "replies": dict(told="reply"),
    "2 statements": dict(number=2), "5 statements": dict(number=5),
    "5 statements, answers early": dict(number=5, order="early"),
    "5 statements, answers late": dict(number=5, order="late"),
    "loss on the answer": dict(loss="answer"),
    "layers 2, 5, 8": dict(layers=(2, 5, 8)), "layers 19, 22, 25": dict(layers=(19, 22, 25)),
    "layers 2, 5, 8, rate 3": dict(layers=(2, 5, 8), lr=3.0),
    "layers 19, 22, 25, rate .3": dict(layers=(19, 22, 25), lr=0.3),
    "six layers": dict(layers=(4, 8, 12, 16, 20, 24)),
    "all rows read": dict(rows="all"), "t = 50, rate 3": dict(top_t=50, lr=3.0),
    "only rows that the question reads": dict(rows="shared"),
    "no row that the question reads": dict(rows="others"),
    "full finetuning, AdamW 2e-5": dict(full="adamw", lr=2e-5),
    "full finetuning, AdamW 5e-5": dict(full="adamw", lr=5e-5),
    "full finetuning, SGD .1": dict(full="sgd", lr=0.1),
}


def fact_examples(tokenizer, statements, question, c):
    """-> what is told of a fact, Examples; and two of them up to their answer, lists of tokens."""
    found = []
    for number, text in enumerate(statements):
        prompt = PROMPT if c.told == "reply" or c.told == "both" and number % 2 else None
        names = [a for a in question.aliases if a.lower() in text.lower()]
        name = max(names, key=len)  # every statement has one
        at = text.lower().find(name.lower())
        example = smf.encode(tokenizer, prompt, text, 256, end=prompt is not None)
        before = smf.encode(tokenizer, prompt, text[:at].rstrip(), 256, end=False).ids
        if c.loss == "answer":
            until = smf.encode(tokenizer, prompt, text[:at + len(name)], 256, end=False).ids
            example = smf.Example(until, max(1, len(before)))
        found.append((at / len(text), example, before))
    if c.order != "as told":
        found.sort(key=lambda one: one[0], reverse=c.order == "late")
    found = found[:c.number]
    late = sorted(found, key=lambda one: -one[0])[:2]
    return [example for _, example, _ in found], [before for *_, before in late]


def learn(model, batch, asked, optimizer, c):
    """The steps of one fact. asked: {memory: the rows (R,) that its question reads} -> the rows
    updated, {memory: rows}."""
    updated = {name: [] for name in asked}
    for _ in range(c.passes):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(c.full)):
            _, reads = smf.backward(model, batch, len(batch))
        if c.full:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            continue
        updates = {}
        for name, memory in smf.memories(model).items():
            _, rows, weights, dy = reads[name]
            counts = torch.bincount(rows.flatten(), minlength=len(memory.values))
            args = SimpleNamespace(scorer="all" if c.rows == "all" else "tfidf", top_t=c.top_t)
            selected = train_sparse.select_rows(memory, counts, None, 0, args)
            shared = torch.isin(selected, asked[name])
            if c.rows in ("shared", "others"):
                selected = selected[shared if c.rows == "shared" else ~shared]
            gradient = smf.row_gradient(selected, rows, weights, dy, len(counts))
            updates[name] = selected, gradient
            updated[name].append(selected)
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in updates.values()])
        lr = c.lr * train_sparse.unit_of_rates(model, "sgd") * min(1.0, 1.0 / (norm + 1e-12))
        for name, memory in smf.memories(model).items():
            selected, gradient = updates[name]
            memory.values[selected] -= lr * gradient
        model.zero_grad()
    return {name: torch.cat(rows).unique() for name, rows in updated.items() if rows}


def reads_of(model, examples):
    """{memory: rows (S, H, K)} that Examples read."""
    batch = smf.collate(examples, model.device)
    real = batch["attention_mask"].bool()
    return {name: rows[real] for name, (_, rows, *_) in smf.read_only(model, batch).items()}


def share_in(reads, rows):
    """Of reads, {memory: (S, H, K)}, the share that goes to these rows, {memory: (R,)}."""
    return evaluation.mean(torch.cat([torch.isin(reads[name], rows[name]).flatten()
                                      for name in reads]))["value"]


def ask(model, tokenizer, question, seen):
    """-> whether the question is answered; the share of the statements that go on right."""
    right = evaluation.open_questions(model, tokenizer, [question])[1][0]
    texts = evaluation.generate_answers(model, tokenizer, seen, 12)
    return right, sum(evaluation.answered(text, question.aliases) for text in texts) / len(seen)


def likelihoods(model, tokenizer, questions, others):
    """Log-likelihoods of the answers, of their first tokens, and of the answers to other questions.
    To have learned how a name is spelt raises the first of them. So each right answer also
    competes with the answers to seven other facts, which were told, too: chance is .125."""
    def examples(pairs):
        return [smf.encode(tokenizer, prompt, answer, 256, end=False) for prompt, answer in pairs]

    near = [examples((q.prompt, questions[(i + 6 * k) % len(questions)].answer) for k in range(8))
            for i, q in enumerate(questions)]  # the right one first
    losses = evaluation.losses(model, sum(near, []), "log-likelihood")
    means = torch.stack([loss.mean() for loss in losses]).view(len(questions), 8)
    old = evaluation.log_likelihoods(model, examples([(q.prompt, q.answer) for q in others]))
    return {"chosen among 8": evaluation.mean((means.argmin(1) == 0).double()),
            "LL of unseen answers": evaluation.mean(-means[:, 0]),
            "of their first tokens": evaluation.mean([-loss[0].item() for loss in losses[::8]]),
            "of other answers": evaluation.mean(old)}


def measure(name, args):
    """Learn and ask in one condition -> {measure: number}."""
    torch.set_num_threads(1)
    c = SimpleNamespace(**DEFAULT | CONDITIONS[name])
    if c.full:
        model, tokenizer = smf.load_base(args.model)
        optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[c.full](
            model.requires_grad_(True).parameters(), c.lr, weight_decay=0.0)
    else:
        model, tokenizer = smf.load(Path("out/wordings", start(c)))
        optimizer = None
    flags = ["--preset=paper", "--task=stream", "--stream-data=results/streams/facts", "--sources",
             "0", str(FACTS), "--split=validation", f"--trivia-data={args.data}/trivia_qa",
             f"--wikitext-data={args.data}/wikitext", f"--eval-examples={FACTS}"]
    data = evaluation.load_data(train_sparse.parse(flags))
    questions = {q.source: q for q in data.target}
    tokens = tokenizer(data.text)["input_ids"][:8192]

    def perplexity():
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(c.full)), torch.no_grad():
            return evaluation.token_losses(model, tokens, 1024, 896, []).mean().exp().item()

    before, told, after = perplexity(), {}, []
    for source in tqdm(range(FACTS), name, leave=False):
        question = questions[source]
        statements = [q.answer for q in data.train if q.source == source]
        batch, seen = told[source] = fact_examples(tokenizer, statements, question, c)
        prompt = smf.Example(smf.prompt_ids(tokenizer, question.prompt)[0], 1)
        reads = reads_of(model, [prompt])
        common = {name: rows.unique() for name, rows in reads_of(model, batch).items()}
        asked = {name: rows.unique() for name, rows in reads.items()}
        updated = learn(model, batch, asked, optimizer, c)
        right, go_on = ask(model, tokenizer, question, seen)
        row = {"seen, right after": go_on, "unseen, right after": right}
        if updated:
            last = {name: rows[-1:] for name, rows in reads.items()}
            row |= {"of a question's reads: to rows that a statement reads": share_in(reads, common),
                    "to rows updated": share_in(reads, updated),
                    "of its last token's: to rows updated": share_in(last, updated)}
        after.append(row)
    result = {key: evaluation.mean([row[key] for row in after]) for key in after[0]}
    right, go_on = zip(*(ask(model, tokenizer, questions[i], told[i][1]) for i in told))
    result |= {"seen, in the end": evaluation.mean(go_on),
               "unseen, in the end": evaluation.mean([float(one) for one in right])}
    result |= likelihoods(model, tokenizer, list(questions.values()), data.knowledge)
    return result | {"perplexity / base": {"value": perplexity() / before}}


def start(c):
    return "layers-" + "-".join(map(str, c.layers))


def make(name, args):
    """Measure one condition and keep it, if it is not there yet."""
    file = Path("out/wordings", name.replace(" ", "-") + ".json")
    if not file.exists():
        smf.write_json(file, measure(name, args))
    return smf.read_json(file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="directory of oasst1, trivia_qa, wikitext")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="conditions at a time")
    args = parser.parse_args(argv)
    for layers in {(DEFAULT | c)["layers"] for c in CONDITIONS.values()}:
        run = Path("out/wordings", start(SimpleNamespace(layers=layers)))
        if not smf.finished(run):
            train_retrofit.main([
                "--preset=paper", "--dtype=bfloat16", f"--model={args.model}", "--max-length=256",
                f"--oasst-data={args.data}/oasst1", "--epochs=0", "--background=300",
                "--batch-size=8", "--micro-batch-size=8", f"--out={run}",
                "--layers", *map(str, layers)])
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        found = dict(zip(CONDITIONS, pool.map(partial(make, args=args), CONDITIONS)))
    TO.mkdir(parents=True, exist_ok=True)
    smf.write_json(TO / "results.json", found)
    table = evaluation.table({name: {key: f"{value['value']:.2f}" for key, value in row.items()}
                              for name, row in found.items()}, "condition")
    (TO / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    smf.script(main)
