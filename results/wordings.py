"""Why is a fact that was learned in ten wordings not recalled in an eleventh? One thing at a time.

    python results/wordings.py --model SMOLLM2_DIR --data DATA_DIR     # about five hours on a core

The first 48 facts of results/streams/facts, a stream, SGD on the rows. Of the ten statements of a
fact eight are told. It is asked at once, after its own steps, and again after all: by two of the
statements told and two not told, which go on from where their answer begins, and by the question of
the validation split. Conditions that are there are skipped: the same command goes on. Writes
results/wordings/table.md and results.json."""

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
from core_set import reads_of  # noqa: E402
from study import CHATS  # noqa: E402

STREAM, TO = ROOT / "results/streams/facts", ROOT / "results/wordings"
FACTS, PROMPT = 48, "Tell me something that you know."
# lr: of SGD on the rows, in the units of train_sparse.py; full: of AdamW on all weights, instead.
# told: half of the statements are replies to PROMPT. number: of statements. order: which of them.
# loss: on all tokens of a statement; on its answer alone; or "reply", the answer is a reply to what
# comes before it, if that is something. rows: TF-IDF takes 500 of those read, or "all" are taken;
# or, of the 500, only those that the question reads, too, which no method can know; or the others.
# harm: --least-harm. grows: each batch told is one more example of the background.
DEFAULT = dict(layers=(7, 15, 22), n_keys=128, lr=1.0, full=False, passes=4, told="both", number=8,
               order="as told", loss="all", rows="tfidf", harm=False, grows=False)
CONDITIONS = {
    "nothing": dict(passes=0), "default": {},
    "rate .3": dict(lr=0.3), "rate 3": dict(lr=3.0),
    "plain statements": dict(told="plain"), "replies": dict(told="reply"),
    "answers as replies": dict(loss="reply"),
    "answers as replies, rate .3": dict(loss="reply", lr=0.3),
    "layers 2, 5, 8, rate 3": dict(layers=(2, 5, 8), lr=3.0),
    "only rows that the question reads": dict(rows="shared"),
    "no row that the question reads": dict(rows="others"),
    "4 statements, answers early": dict(number=4, order="early"),
    "4 statements, answers late": dict(number=4, order="late"),
    "loss on the answer": dict(loss="answer"),
    "loss on the answer, rate .3": dict(loss="answer", lr=0.3),
    "loss on the answer, rate .3, n = 512": dict(loss="answer", lr=0.3, n_keys=512),
    "loss on the answer, rate .3, background grows": dict(loss="answer", lr=0.3, grows=True),
    "loss on the answer, all rows, rate .1": dict(loss="answer", rows="all", lr=0.1),
    "loss on the answer, least harm, all rows, rate .1": dict(
        loss="answer", harm=True, rows="all", lr=0.1),
    "loss on the answer, least harm, all rows, rate .3": dict(
        loss="answer", harm=True, rows="all", lr=0.3),
    "loss on the answer, least harm, rate .3": dict(loss="answer", harm=True, lr=0.3),
    "loss on the answer, least harm, rate .3, n = 512": dict(
        loss="answer", harm=True, lr=0.3, n_keys=512),
    "least harm, rate .3": dict(harm=True, lr=0.3),
    "4 late, loss on the answer, least harm, all rows, rate .1": dict(
        number=4, order="late", loss="answer", harm=True, rows="all", lr=0.1),
    "4 late, loss on the answer, least harm, all rows, rate .2": dict(
        number=4, order="late", loss="answer", harm=True, rows="all", lr=0.2),
    "full finetuning": dict(full=True, lr=2e-5),
    "full finetuning, answers as replies": dict(full=True, lr=2e-5, loss="reply"),
    "full finetuning, loss on the answer, 1e-5": dict(full=True, lr=1e-5, loss="answer"),
    "full finetuning, loss on the answer": dict(full=True, lr=2e-5, loss="answer"),
    "4 late, full finetuning": dict(number=4, order="late", full=True, lr=2e-5),
    "4 late, loss on the answer, full finetuning": dict(
        number=4, order="late", loss="answer", full=True, lr=2e-5),
}


def prepare(tokenizer, data, question, c):
    """The statements of a question's fact -> those to tell, Examples; two of them, and two that are
    not told, as Examples of the answer after what comes before it."""
    rows = [json.loads(line) for name in ("train", "early")
            for line in open(STREAM / f"{name}.jsonl")]
    source = list(dict.fromkeys(row["source"] for row in rows))[question.source]
    prompts = {row["text"]: row["prompt"] for row in rows if row["source"] == source}
    texts = list(prompts)

    def span(text):  # of the answer: every statement has one
        name = max((a for a in question.aliases if a.lower() in text.lower()), key=len)
        begin = text.lower().find(name.lower())
        return begin, begin + len(name)

    def encode(text, end=None):  # up to this letter
        prompt = {"both": prompts[text], "plain": None, "reply": PROMPT}[c.told]
        return smf.encode(tokenizer, prompt, text[:end].rstrip(), 256,
                          end is None and prompt is not None)

    def cloze(text):
        return smf.Example(encode(text, span(text)[1]).ids, len(encode(text, span(text)[0]).ids))

    def to_learn(text):
        begin, end = span(text)
        if c.loss == "reply" and begin > 15:
            return smf.encode(tokenizer, text[:begin].rstrip(), text[begin:end], 256)
        example = cloze(text) if c.loss == "answer" else encode(text)
        return example._replace(start=example.start or 1)  # nothing predicts the first of all

    latest = sorted(texts, key=lambda text: -span(text)[0] / len(text))
    untold = latest[:3:2]
    told = [text for text in texts if text not in untold]
    if c.order != "as told":
        told = [text for text in (latest if c.order == "late" else latest[::-1]) if text in told]
    told = told[:c.number]
    examples = [to_learn(text) for text in told]
    seen = [text for text in latest if text in told][:2]
    return examples, [cloze(text) for text in seen], [cloze(text) for text in untold]


def learn(model, batch, asked, optimizer, c):
    """The steps of one fact. asked: {memory: the rows (R,) that its question reads}."""
    for _ in range(c.passes):
        with torch.autocast("cpu", torch.bfloat16, enabled=c.full):
            _, reads = smf.backward(model, batch, len(batch))
        if c.full:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            continue
        updates = []
        for name, memory in smf.memories(model).items():
            _, rows, weights, dy = reads[name]
            selected, counts = select(memory, rows, "all" if c.rows == "all" else "tfidf")
            if c.grows:
                memory.doc_freq += counts > 0
                memory.num_batches += 1
            if c.rows in ("shared", "others"):
                selected = selected[torch.isin(selected, asked[name]) == (c.rows == "shared")]
            updates.append((memory, selected, smf.row_gradient(selected, rows, weights, dy,
                                                               len(counts))))
        norm = torch.nn.utils.get_total_norm([gradient for *_, gradient in updates])
        lr = c.lr * train_sparse.unit_of_rates(model, "sgd") * min(1.0, 1.0 / (norm + 1e-12))
        for memory, selected, gradient in updates:
            harm = smf.harm(memory.background_counts)[selected, None] if c.harm else 1.0
            memory.values[selected] -= lr * gradient / harm
        model.zero_grad()


def select(memory, rows, scorer="tfidf"):
    """The 500 rows that TF-IDF takes of those read, or all of them; and the counts (N,)."""
    counts = torch.bincount(rows.flatten(), minlength=len(memory.values))
    args = SimpleNamespace(scorer=scorer, top_t=500)
    return train_sparse.select_rows(memory, counts, None, 0, args), counts


def ask(model, tokenizer, asked):
    """Of facts, [(question, told, untold)], the shares of questions answered, and of statements
    told and not told that go on right -> [[share] of each kind of wording]"""
    prompts = [prompt for question, *statements in asked
               for prompt in (smf.prompt_ids(tokenizer, question.prompt)[0],
                              *(ids[:start] for ids, start in sum(statements, [])))]
    texts = iter(evaluation.generate_answers(model, tokenizer, prompts))
    right = [[float(evaluation.answered(next(texts), question.aliases)) for _ in range(5)]
             for question, *_ in asked]
    return [[sum(row[1:3]) / 2 for row in right], [sum(row[3:]) / 2 for row in right],
            [row[0] for row in right]]


def likelihoods(model, tokenizer, asked, others):
    """Log-likelihoods of the answers after statements told and not told and after the questions,
    and of the answers to other questions. A name's spelling, once learned, raises those of its
    later tokens. So each right answer also competes with the answers of seven other facts, which
    were told, too: chance is .125."""
    def answers(prompt, space, answer):
        ids = tokenizer(space + answer, add_special_tokens=False)["input_ids"]
        return smf.Example(prompt + ids, len(prompt))

    result, names = {}, [question.answer for question, *_ in asked]
    kinds = {"told": [told[0] for _, told, _ in asked], "untold": [one[0] for *_, one in asked],
             "questions": [smf.prompt_ids(tokenizer, question.prompt) for question, *_ in asked]}
    for kind, prompts in kinds.items():
        prompts = [(ids[:start], " ") if kind != "questions" else (ids, start)
                   for ids, start in prompts]
        eight = [answers(*prompt, names[(i + 6 * k) % len(names)])
                 for i, prompt in enumerate(prompts) for k in range(8)]  # the right one first
        found = evaluation.log_likelihoods(model, eight).view(-1, 8)
        result |= {f"LL, {kind}": evaluation.mean(found[:, 0]),
                   f"best of 8, {kind}": evaluation.mean((found.argmax(1) == 0).double())}
    old = [answers(*smf.prompt_ids(tokenizer, q.prompt), q.answer) for q in others]
    return result | {"LL, others": evaluation.mean(evaluation.log_likelihoods(model, old))}


def shares(layers, args):
    """Whose reads go to the 500 rows that TF-IDF selects for a fact? -> {wording: share}, of all
    its tokens and of the last, which the answer follows. Before any row is changed."""
    c = SimpleNamespace(**DEFAULT | dict(layers=layers))
    model, tokenizer = smf.load(Path("out/wordings", start(c)))
    data = load_data(args)
    questions, found = [q.prompt for q in data.target], {}
    for question, q in enumerate(tqdm(data.target, "shares", leave=False)):
        batch, (told, _), (untold, _) = prepare(tokenizer, data, q, c)
        reads = reads_of(model, batch)
        selected = {name: select(memory, reads[name])[0]
                    for name, memory in smf.memories(model).items()}
        asked = {"a statement told": told.ids[:told.start],
                 "one not told": untold.ids[:untold.start],
                 "its question": smf.prompt_ids(tokenizer, questions[question])[0],
                 "another question": smf.prompt_ids(tokenizer, questions[question - 1])[0]}
        for kind, ids in asked.items():
            reads = reads_of(model, [smf.Example(ids, 1)])
            for tokens, part in ((kind, slice(None)), (f"{kind}, last token", slice(-1, None))):
                hits = [torch.isin(reads[name][part], selected[name]).flatten() for name in reads]
                found.setdefault(tokens, []).append(torch.cat(hits).double().mean().item())
    return {kind: evaluation.mean(values) for kind, values in found.items()}


def load_data(args):
    return evaluation.load_data(train_sparse.parse([
        "--preset=paper", "--task=stream", "--stream-data=results/streams/facts", "--sources",
        "0", str(FACTS), "--split=validation", f"--trivia-data={args.data}/trivia_qa",
        f"--wikitext-data={args.data}/wikitext", f"--eval-examples={FACTS}"]))


def measure(name, args):
    """Learn and ask in one condition -> {measure: number}."""
    torch.set_num_threads(1)
    c = SimpleNamespace(**DEFAULT | CONDITIONS[name])
    if c.full:
        model, tokenizer = smf.load_base(args.model)
        optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), c.lr,
                                      weight_decay=0.0)
    else:
        model, tokenizer = smf.load(Path("out/wordings", start(c)))
        optimizer = None
    data = load_data(args)
    questions = {q.source: q for q in data.target}
    tokens = tokenizer(data.text)["input_ids"][:8192]

    def perplexity():
        with torch.autocast("cpu", torch.bfloat16, enabled=c.full), torch.no_grad():
            return evaluation.token_losses(model, tokens, 1024, 896, []).mean().exp().item()

    before, asked, after = perplexity(), [], []
    for source in tqdm(range(FACTS), name, leave=False):
        question = questions[source]
        batch, *statements = prepare(tokenizer, data, question, c)
        asked.append((question, *statements))
        prompt = smf.Example(smf.prompt_ids(tokenizer, question.prompt)[0], 1)
        read = {name: rows.unique() for name, rows in reads_of(model, [prompt]).items()}
        learn(model, batch, read, optimizer, c)
        row = dict(zip(("told", "untold", "questions"), ask(model, tokenizer, asked[-1:])))
        after.append({f"{kind}, at once": share for kind, (share,) in row.items()})
    result = {key: evaluation.mean([row[key] for row in after]) for key in after[0]}
    result |= {f"{kind}, in the end": evaluation.mean(shares) for kind, shares in zip(
        ("told", "untold", "questions"), ask(model, tokenizer, asked))}
    result |= likelihoods(model, tokenizer, asked, data.knowledge)
    return result | {"perplexity / base": {"value": perplexity() / before}}


def start(c):
    return f"n{c.n_keys}-layers-" + "-".join(map(str, c.layers))


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
    for c in CONDITIONS.values():
        c = SimpleNamespace(**DEFAULT | c)
        run = Path("out/wordings", start(c))
        if not smf.finished(run):
            flags = CHATS.format(model=args.model, data=args.data) + str(c.n_keys)
            train_retrofit.main([*flags.split(), f"--out={run}", "--layers", *map(str, c.layers)])
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        found = dict(zip(CONDITIONS, pool.map(partial(make, args=args), CONDITIONS)))
    found = {"condition": found, "layers: share of reads to the rows of a fact": {
        str(layers): shares(layers, args) for layers in ((2, 5, 8), (7, 15, 22))}}
    TO.mkdir(parents=True, exist_ok=True)
    smf.write_json(TO / "results.json", found)
    table = "\n\n".join(evaluation.table({name: {
        key: f"{value['value']:.3f}" for key, value in row.items()} for name, row in rows.items()},
        title) for title, rows in found.items())
    (TO / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    smf.script(main)
