"""Measure runs: what they learned and what they forgot. Prints a Markdown table.

    python eval.py                          # every finished run below out
    python eval.py RUN_DIR ... --split validation
    python eval.py RUN_DIR --ask "Where was Nuto Lilton born?"   # by all runs that it is based on

A run is measured on the task and data that it was made with (the flags in its config.json), unless
a flag says otherwise. Its eval.json keeps what was measured. ± is a standard error."""

import argparse
import json
import math
import os
import re
import string
import unicodedata
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig

import smf

PRESETS = {
    "tiny": dict(task="stream", stream_data="tiny/stream", passes=4, facts_data="tiny/facts",
                 epochs=20, warmup=10, medmcqa_data="tiny/medmcqa", split="test",
                 trivia_data="tiny/trivia_qa", untaught_data="tiny/untaught", eval_examples=1000,
                 wikitext_data="tiny/wikitext", oasst_data="tiny/oasst1", window=128, stride=64),
    "paper": dict(task="medmcqa", stream_data="", passes=1, epochs=3, warmup=100, window=1024,
                  facts_data="mandarjoshi/trivia_qa:rc.nocontext", stride=512, split="test",
                  medmcqa_data="openlifescienceai/medmcqa", eval_examples=1000,
                  trivia_data="mandarjoshi/trivia_qa:rc.nocontext",
                  wikitext_data="Salesforce/wikitext:wikitext-103-raw-v1",
                  oasst_data="OpenAssistant/oasst1"),
}


def add_flags(parser):
    """The flags that say what to learn, how long, and what to measure."""
    add = parser.add_argument_group("task and evaluation").add_argument
    add("--task", choices=["stream", "facts", "medmcqa"], help="sources told one after the other, "
        "and asked for; or shuffled: facts, four-choice questions")
    add("--stream-data", help="what to tell: columns text and, if there, source, prompt and answer "
        "(words of the text: learn these alone); or a .txt of paragraphs. Its test split asks it")
    add("--facts-data", help="facts to learn, in the layout of TriviaQA")
    add("--medmcqa-data", help="four-choice questions to learn, in the layout of MedMCQA")
    add("--sources", type=int, nargs=2, metavar=("FIRST", "END"), help="learn these sources, facts "
        "or questions only, counted from 0, without END (all); asked are those before them, too")
    add("--passes", type=int, help="stream: steps for each source")
    add("--epochs", type=int, help="shuffled: times that each example is seen")
    add("--steps", type=int, help="steps, instead of epochs or the whole stream")
    add("--warmup", type=int, help="shuffled: steps of linear warm-up")
    add("--replay", type=int, default=0, help="general chats added to each batch, not to forget")
    add("--oasst-data", help="these chats, in the layout of OpenAssistant")
    add("--ask-every", type=int, help="stream: ask what it recalls and knows after so many sources")
    add("--split", choices=["test", "validation"], help="of the target; validation: choose rates")
    add("--trivia-data", help="questions that are not taught: what was forgotten?")
    add("--untaught-data", help="facts never taught, to see them stay at chance")
    add("--wikitext-data", help="general text for the perplexity")
    add("--eval-examples", type=int, help="questions of each kind at most")
    add("--eval-tokens", type=int, help="perplexity of the first so many tokens (all)")
    add("--window", type=int, help="perplexity: tokens seen at once")
    add("--stride", type=int, help="perplexity: tokens that the window moves by")


# Tasks and questions

class Question(NamedTuple):
    prompt: str  # None: to be told without one
    answer: str
    before: str = ""  # of a text: what stands before the answer, and is not learned
    aliases: list = []  # of an open question: what counts as an answer
    options: list = []  # of a multiple-choice question
    source: int = None  # the place of its source, or fact, in the data


class Data(NamedTuple):
    train: list  # Questions to learn from
    target: list  # Questions to ask: was it learned?
    knowledge: list  # Questions never taught: what was forgotten?
    untaught: list  # Questions about facts that nobody is taught
    text: str  # general text, for the perplexity


def load_questions(flag, name, split, told=False, required=True):
    """Rows in TriviaQA's layout, or with a plain answer; or, told, of a stream: texts, some with a
    prompt -> [(id, Question)], id: the source, else the question_id, else None."""
    columns, questions = ("text",) if told else ("question", "answer"), []
    optional = ("prompt", "source", "question_id", *["answer"] * told)
    rows = smf.load_rows(flag, name, split, columns, optional, required)
    for number, row in enumerate(rows, 1):
        answer = row["text" if told else "answer"]
        answer = answer if isinstance(answer, dict) else {"value": answer}
        aliases = answer.get("aliases") or []
        prompt = row.get("prompt") or None if told else row["question"]
        value = answer.get("value")
        value, before = str(value) if isinstance(value, (str, int, float)) else "", ""
        if told and row.get("answer"):  # learn these words of the text; what follows is left out
            before, value, _ = value.partition(str(row["answer"]))
        source, none = row.get("source", row.get("question_id")), told and prompt is None
        if not (value.strip() and (none or isinstance(prompt, str) and prompt.strip()) and
                (source not in (None, "") or "source" not in row)):
            raise smf.BadInput(f"{flag} {name}: row {number} of {split} has no text, or no answer "
                               f"(answer.value), or no source, or an answer that is not in its "
                               f"text; mend or remove the row")
        if not isinstance(aliases, list) or any(isinstance(a, (list, dict)) for a in aliases):
            raise smf.BadInput(f"{flag} {name}: row {number} of {split}: give aliases as a list")
        aliases = [value, *map(str, filter(None, aliases))]
        questions.append((source if source is None else str(source),
                          Question(prompt, value.strip(), before.strip(), aliases)))
    return questions


def load_sources(args):
    """--task stream or facts: the sources to learn -> train, target, the ids of these sources.

    Rows with one source (facts: question_id) belong together; else each row is a source, named by
    its number. Asked are the questions of --split about these sources and those before them: in
    wordings never trained on. Without such a split the facts task asks what it trained."""
    stream, flag = args.task == "stream", f"--{args.task}-data"
    name = args.stream_data if stream else args.facts_data
    rows = load_questions(flag, name, "train", told=stream, required=stream)
    taught = "train" if rows else "validation"
    rows = rows or load_questions(flag, name, taught)
    named = {id for id, _ in rows if id}
    rows = [(id or str(number), q) for number, (id, q) in enumerate(rows, 1)]
    place = {id: i for i, id in enumerate(dict.fromkeys(id for id, _ in rows))}
    first, end = args.sources or (0, len(place))
    if not 0 <= first < end <= len(place):
        raise smf.BadInput(f"--sources {first} {end}: of the {len(place)} of {name} there are none")
    asked = [] if args.split == taught else load_questions(flag, name, args.split, required=False)
    if not asked:
        print(f"{flag} {name}: no wordings of a split {args.split} are there to ask")
        asked = [] if stream else rows
    if stream and (unknown := {id for id, _ in asked} - {*place, None}):
        raise smf.BadInput(f"{flag} {name}: {args.split} asks about the source {min(unknown)}, "
                           f"which train does not have; mend or remove the question")
    train = [q._replace(source=place[id]) for id, q in rows if first <= place[id] < end]
    target = [q._replace(source=place.get(id)) for id, q in asked
              if id is None or place.get(id, end) < end]
    if stream and len(target) > args.eval_examples:  # some, from the first to the last
        places = torch.linspace(0, len(target) - 1, args.eval_examples).tolist()
        target = [target[round(i)] for i in places]
    return train, target, {id for id in named if place[id] < end}


def load_medmcqa(args):
    """--task medmcqa [Gupta26]: four-choice questions -> train, target, no ids.

    Asked is the validation split of the data set, as in the paper; for --split validation, an
    eighth of the training rows, at most 1000, that is never trained on."""
    flag, columns = "--medmcqa-data", ("question", "opa", "opb", "opc", "opd", "cop")
    rows = list(smf.load_rows(flag, args.medmcqa_data, "train", columns).shuffle(seed=0))
    held_out, (first, end) = min(1000, len(rows) // 8), args.sources or (0, None)
    train, target = rows[held_out:][first:end], rows[:held_out]
    if args.split == "test":
        target = smf.load_rows(flag, args.medmcqa_data, "validation", columns)

    def question(row):
        options = [f"{letter}. {row[name]}" for letter, name in zip("ABCD", columns[1:])]
        text = row["question"] and all(isinstance(row[column], str) for column in columns[:5])
        if not text or type(row["cop"]) is not int or row["cop"] not in range(4):
            raise smf.BadInput(f"{flag} {args.medmcqa_data}: {row}: give four options as text, and "
                               f"in cop the index of the right one, 0 to 3")
        prompt = "\n".join([row["question"], *options, "Answer:"])
        return Question(prompt, options[row["cop"]], options=options)

    return [question(row) for row in train], [question(row) for row in target], set()


def load_data(args):
    """All that a run learns from and is measured on -> Data. A question that names its own answer
    is not asked: to repeat it would count as right. No question of the old knowledge has the words
    or the question_id of a fact that is taught. Refuses what cannot be measured."""
    train, target, ids = load_medmcqa(args) if args.task == "medmcqa" else load_sources(args)
    taught = {q.prompt for q in train + target}
    knowledge = [q for id, q in load_questions("--trivia-data", args.trivia_data, "validation")
                 if q.prompt not in taught and id not in ids]
    untaught = [q for _, q in load_questions("--untaught-data", args.untaught_data, "test")
                ] if args.untaught_data else []
    asked = [[q for q in part if not answered(q.prompt, q.aliases)][:args.eval_examples]
             for part in (target, knowledge, untaught)]
    rows = smf.load_rows("--wikitext-data", args.wikitext_data, "test", ("text",))
    text = "\n\n".join(text or "" for text in rows["text"])
    if not (asked[0] or args.task == "stream") or not asked[1] or not text.strip():
        raise smf.BadInput("--facts-data, --trivia-data, --wikitext-data: after those that are "
                           "taught or name their own answer, no question, or no text, is left")
    return Data(train, *asked, text)


def training_plan(model, tokenizer, data, args):
    """-> the batch of Examples of each step, and a hash of what is learned. BadInput now if the run
    could not be measured in the end."""
    if not args.stride < args.window <= context_length(model):
        raise smf.BadInput(f"--window {args.window}, --stride {args.stride}: give a window of at "
                           f"most {context_length(model)} tokens, and a stride of less")
    examples = smf.encode_all(tokenizer, [q[:3] for q in data.train], args.max_length)
    for q, (ids, start) in zip(data.train, examples):
        if start == len(ids):
            raise smf.BadInput(f"--{args.task}-data: {q.answer!r} is one token: none to predict")
    if args.task == "stream":
        sources = {}  # {source: its rewordings}
        for q, example in zip(data.train, examples):
            sources.setdefault(q.source, []).append(example)
        plan = smf.stream_batches(list(sources.values()), args.batch_size, args.passes)[:args.steps]
    elif len(examples) < args.batch_size:
        raise smf.BadInput(f"--batch-size {args.batch_size}: only {len(examples)} to learn")
    else:
        steps = args.epochs * (len(examples) // args.batch_size)
        plan = smf.batches(examples, args.batch_size, args.seed,
                           steps if args.steps is None else args.steps)
    if min(map(len, plan), default=smf.WORLD_SIZE) < smf.WORLD_SIZE:
        raise smf.BadInput("torchrun: a batch has fewer examples than there are processes")
    return plan, smf.sha256(json.dumps(examples).encode()).hexdigest()


# Measures

def by_length(examples, size, label):
    """The indices of Examples, those of similar length together, the longest first."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for i in tqdm(range(0, len(order), size), label, leave=False):
        yield order[i:i + size]


@torch.no_grad()
def losses(model, examples, label, size=32):
    """-log p of the target tokens of each Example -> a list of float64 tensors (targets,)."""
    found = [None] * len(examples)
    for indices in by_length(examples, size, label):
        batch = smf.collate([examples[i] for i in indices], model.device)
        for i, loss, target in zip(indices, smf.token_loss(model, batch), batch["targets"]):
            found[i] = loss[target != -100].cpu()
    return found


def log_likelihoods(model, examples):
    """Mean log-likelihood of a target token of each Example -> (len(examples),)"""
    return -torch.stack([loss.mean() for loss in losses(model, examples, "log-likelihood")])


def token_losses(model, tokens, window, stride, first):
    """-log p of every token, each scored once, in a window that moves by `stride`: of each window
    only the tokens not yet scored count [Gupta26 appendix C]. Every window begins with the tokens
    `first`, which are not scored. If there are none, the first token of the text is not."""
    n, stride = window - len(first), min(stride, window - len(first))
    examples = [smf.Example(first + tokens[i:i + n], window - stride if i else len(first) or 1)
                for i in range(0, max(1, len(tokens) - n + stride), stride)]
    return torch.cat(losses(model, examples, "perplexity", 2))


@torch.no_grad()
def generate_answers(model, tokenizer, prompts, max_new_tokens=32, size=64):
    """Greedy continuations of the prompts, lists of tokens, as text."""
    end, texts = tokenizer.eos_token_id, {}
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False,
                                               eos_token_id=end, pad_token_id=end)
    room = context_length(model) - max_new_tokens
    examples = [smf.Example(prompt[-room:], 0) for prompt in prompts]
    for indices in by_length(examples, size, "answers"):
        T = len(examples[indices[0]].ids)
        pads = [T - len(examples[i].ids) for i in indices]  # on the left
        ids = torch.tensor([[end] * n + examples[i].ids for i, n in zip(indices, pads)])  # (B, T)
        mask = torch.arange(T) >= torch.tensor(pads)[:, None]  # (B, T)
        new = model.generate(ids.to(model.device), attention_mask=mask.to(ids).to(model.device))
        texts |= zip(indices, tokenizer.batch_decode(new[:, T:], skip_special_tokens=True))
    return [texts[i] for i in range(len(prompts))]


def context_length(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", 10**9)


def normalize(text):
    """TriviaQA's rule: lower case, no punctuation, no articles, single spaces. One Unicode form."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answered(text, aliases):
    """Whether any alias is a substring of the text, both normalized [Gupta26 appendix C]."""
    return any(alias and alias in normalize(text) for alias in map(normalize, aliases))


def mean(values):
    """{value: the mean, stderr: its standard error, n} of a list or tensor."""
    values = torch.as_tensor(values, dtype=torch.float64)
    stderr = values.std(correction=0) / math.sqrt(len(values))
    return {"value": values.mean().item(), "stderr": stderr.item(), "n": len(values)}


def open_questions(model, tokenizer, questions):
    """-> the answers, whether each is right, the mean log-likelihood of each right answer."""
    examples = [smf.encode(tokenizer, q.prompt, q.answer, context_length(model), end=False)
                for q in questions]
    longest = 8 + max(len(ids) - start for ids, start in examples)
    room = min(max(32, longest), context_length(model) // 2)
    if longest > room:
        print(f"answers of more than {room} tokens, half of what the model sees, are cut there")
    prompts = [smf.prompt_ids(tokenizer, q.prompt)[0] for q in questions]
    texts = generate_answers(model, tokenizer, prompts, room)
    right = [answered(text, q.aliases) for text, q in zip(texts, questions)]
    return texts, right, log_likelihoods(model, examples)


def multiple_choice(model, tokenizer, questions):
    """-> whether the right option has the highest mean log-likelihood, for each question."""
    examples = [smf.encode(tokenizer, q.prompt, option, context_length(model), end=False)
                for q in questions for option in q.options]
    best = log_likelihoods(model, examples).view(len(questions), -1).argmax(1)  # (questions,)
    return [q.options[i] == q.answer for q, i in zip(questions, best)]


def quarters(questions, right, told):
    """{"oldest": share answered of the first quarter of the sources told, "newest": of the last}"""
    end = 1 + max(q.source for q in told)
    n, found = -(-end // 4), {}
    for name, part in (("oldest", range(n)), ("newest", range(end - n, end))):
        if own := [r for q, r in zip(questions, right) if q.source in part]:
            found[name] = mean(own)
    return found


def evaluate(model, tokenizer, data, args):
    """All measures of a model -> {measure: mean(...)}, the answers, which knowledge is right."""
    result, answers, rights = {}, {}, {}
    for name in ("target", "untaught", "knowledge"):
        questions = getattr(data, name)
        if questions and questions[0].options:
            result[name] = mean(multiple_choice(model, tokenizer, questions))
        elif questions:
            answers[name], rights[name], likelihood = open_questions(model, tokenizer, questions)
            result[name], result[f"{name} LL"] = mean(rights[name]), mean(likelihood)
    if args.task == "stream" and data.target:
        result |= quarters(data.target, rights["target"], data.train)
    elif args.task == "stream":
        texts = smf.encode_all(tokenizer, [q[:3] for q in data.train], args.window)
        result["target LL"] = mean(log_likelihoods(model, texts))
    tokens = tokenizer(data.text, add_special_tokens=False)["input_ids"][:args.eval_tokens]
    first = smf.prompt_ids(tokenizer, None)[0]
    loss = mean(token_losses(model, tokens, args.window, args.stride, first))
    perplexity = math.exp(loss["value"])
    result["perplexity"] = loss | {"value": perplexity, "stderr": perplexity * loss["stderr"]}
    return result | {"knowledge right": rights["knowledge"], "answers": answers}


def ask_along(model, tokenizer, data, step, args):
    """Every --ask-every sources of a stream, before a step: the share recalled of all that was told
    so far, and of the old knowledge -> {measure: share}, at other steps {}."""
    told, rest = divmod(step, args.passes)
    if args.task != "stream" or not args.ask_every or rest or told % args.ask_every:
        return {}
    end = told + (args.sources or [0])[0]
    asked = [q for q in data.target if q.source is not None and q.source < end]
    result = {name: mean(open_questions(model, tokenizer, questions)[1])["value"]
              for name, questions in (("recall", asked), ("old", data.knowledge)) if questions}
    tqdm.write(f"{told} sources told: " + ", ".join(f"{k} {v:.3f}" for k, v in result.items()))
    return result


# Runs and their tables

DIGITS = {"target": 3, "oldest": 3, "newest": 3, "target LL": 2, "untaught": 3, "perplexity": 2,
          "knowledge": 3, "knowledge LL": 2, "kept": 3}
SETTINGS = ("task", "stream_data", "facts_data", "medmcqa_data", "sources", "split", "trivia_data",
            "untaught_data", "wikitext_data", "eval_examples", "eval_tokens", "window", "stride")


def evaluate_run(run, data, args):
    """evaluate(), in float32, kept in RUN/eval.json for each split and setting."""
    settings = {"measures": 5} | {name: vars(args)[name] for name in SETTINGS}
    settings["data"] = smf.sha256(json.dumps(data).encode()).hexdigest()
    key, file = json.dumps(settings, sort_keys=True), run / "eval.json"
    results = smf.read_json(file) if file.exists() else {}
    if key not in results:
        print(f"evaluating {run} on the {args.split} split")
        model, tokenizer = smf.load(run, args.device)
        result = evaluate(model.float(), tokenizer, data, args)
        results = (smf.read_json(file) if file.exists() else {}) | {key: result}
        smf.write_json(file, results)  # with what others may have measured in the meantime
    return results[key]


def parent_of(run):
    """The run that this one is based on; for one on a pretrained model, that model, as a run that
    changed nothing, in the directory base beside it."""
    config, base = smf.read_json(run / "config.json"), run.parent / "base"
    if "parent" in config:
        return Path(os.path.normpath(run / config["parent"]))
    own = {"base": config["base"], "parent_sha256": config["parent_sha256"], "dtype": "float32"}
    with smf.start_run(base, own, argparse.Namespace()):  # refused if it is of another model
        if not smf.finished(base):
            smf.finish_run(base, {})
    return base


def row(run, data, args):
    """{column: text} of a run."""
    result = dict(evaluate_run(run, data, args))
    before = evaluate_run(parent_of(run), data, args)
    kept = [now for now, then in zip(result["knowledge right"], before["knowledge right"]) if then]
    if kept:
        result["kept"] = mean(kept)
    return {name: f"{result[name]['value']:.{digits}f} ± {result[name]['stderr']:.{digits}f}"
            for name, digits in DIGITS.items() if name in result}


def table(rows, first="run"):
    """{name: {column: text}} -> Markdown."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [[first, *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(cells.get(column, "") for column in columns)]
              for name, cells in rows.items()]
    return "\n".join("| " + " | ".join(" ".join(str(cell).split()) for cell in line) + " |"
                     for line in lines)


def ancestors(run):
    """The run after all that it is based on, the base first."""
    chain = [run]
    while parent_of(chain[0]) != chain[0]:
        chain.insert(0, parent_of(chain[0]))
    return chain


def report(run, data, args):
    """Some questions with the answers before and after, and the table of all in the chain."""
    chain, shown = ancestors(run), {}
    rows = {part: row(part, data, args) for part in chain}
    before, after = (evaluate_run(part, data, args)["answers"] for part in (chain[0], run))
    for name in ("target", "knowledge"):
        questions = getattr(data, name)
        every = max(1, len(questions) // 4 - 1) | 1  # odd: not the same kind each time
        for i in range(0, len(after.get(name, [])), every)[:4]:
            shown[questions[i].prompt] = {"measure": name, "before": before[name][i],
                                          "after": after[name][i], "right": questions[i].answer}
    return f"{table(shown, 'question')}\n\n{table(rows)}"


def ask(runs, question, args):
    """The answer to a question of all that each run is based on, and of itself -> Markdown."""
    rows = {}
    for part in dict.fromkeys(part for run in runs for part in ancestors(run)):
        model, tokenizer = smf.load(part, args.device)
        prompt = smf.prompt_ids(tokenizer, question)[0]
        rows[part] = {question: generate_answers(model.float(), tokenizer, [prompt], 100)[0]}
    return table(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--device", choices=smf.DEVICES, default=smf.DEVICES[0])
    parser.add_argument("--ask", metavar="QUESTION", help="print the answers, and measure nothing")
    add_flags(parser)
    args = smf.parse(parser, {}, argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    found = sorted(Path("out").glob("*/*/delta.safetensors"))
    runs = given.pop("runs") or [path.parent for path in found]
    if args.ask is not None and runs:
        return print(ask(runs, args.ask, args))
    tables = {}  # {settings: (data, {run: cells})}: another table for another way to measure
    for run in runs:
        flags = smf.read_json(run / "config.json").get("flags", {})
        if "task" in flags:  # a base or a retrofit learned none: see the tables of its children
            own = argparse.Namespace(**flags | given)
            key = ", ".join(f"{name} {value}" for name in SETTINGS
                            if (value := vars(own)[name]) is not None)
            try:
                if key not in tables:
                    tables[key] = load_data(own), {}
                data, rows = tables[key]
                rows |= {part: row(part, data, own) for part in (parent_of(run), run)}
            except smf.BadInput as error:
                if args.runs:
                    raise
                print(f"{run} is left out: {error}")  # as when its parent is undone
    for settings, (_, rows) in tables.items():
        print(f"\n{settings}\n\n{table(rows)}")
    if not tables:
        raise smf.BadInput("no run that learned a task; make one with train_sparse.py, or name one")


if __name__ == "__main__":
    smf.script(main)
