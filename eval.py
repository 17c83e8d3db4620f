"""Measure runs: what they learned and what they forgot. Prints a Markdown table.

    python eval.py                          # every finished run below out
    python eval.py RUN_DIR ...
    python eval.py RUN_DIR --split validation

A run is measured on the task and data that it was made with (the flags in its config.json), unless
a flag says otherwise. The measures stay in its eval.json, and are read from there the next time.
They are, +- standard error:

  target      facts: share of the taught facts that are recalled (greedy, any alias);
              medmcqa: share of questions whose right option has the highest mean log-likelihood
  target LL   mean log-likelihood of a token of the answer
  untaught    share of facts recalled that no run is taught: chance, or the target leaks
  perplexity  of general text, every token scored once, in a sliding window
  knowledge   share of other questions, never taught, that are answered; LL as above;
              kept: of those that the run's parent answered, the share that still is"""

import argparse
import json
import math
import os
import re
import string
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GenerationConfig

import smf

PRESETS = {
    "tiny": dict(task="facts", facts_data="tiny/facts", num_facts=160, medmcqa_data="tiny/medmcqa",
                 num_questions=1000, split="test", trivia_data="tiny/trivia_qa",
                 untaught_data="tiny/untaught", wikitext_data="tiny/wikitext", eval_examples=1000,
                 window=128, stride=64),
    "paper": dict(task="medmcqa", facts_data="mandarjoshi/trivia_qa:rc.nocontext", num_facts=500,
                  medmcqa_data="openlifescienceai/medmcqa", num_questions=60000, split="test",
                  trivia_data="mandarjoshi/trivia_qa:rc.nocontext", window=1024, stride=512,
                  wikitext_data="Salesforce/wikitext:wikitext-103-raw-v1", eval_examples=1000),
}


def add_flags(parser):
    """The flags that say what to learn and what to measure."""
    add = parser.add_argument_group("task and evaluation").add_argument
    add("--task", choices=["facts", "medmcqa"], help="what to learn")
    add("--facts-data", help="facts to learn, in the layout of TriviaQA")
    add("--num-facts", type=int, help="facts: learn the first so many")
    add("--medmcqa-data", help="four-choice questions to learn, in the layout of MedMCQA")
    add("--num-questions", type=int, help="medmcqa: learn so many at most")
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
    prompt: str
    answer: str
    aliases: list = []  # of an open question: what counts as an answer
    options: list = []  # of a multiple-choice question


class Data(NamedTuple):
    train: list  # Questions to learn from
    target: list  # Questions to ask: was it learned?
    knowledge: list  # Questions never taught: what was forgotten?
    untaught: list  # Questions about facts that nobody is taught
    text: str  # general text, for the perplexity


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def load_trivia(flag, name, split):
    """Rows in TriviaQA's layout -> [(question_id, Question)]."""
    questions = []
    for row in smf.load_rows(flag, name, split, ("question", "question_id", "answer")):
        answer = row["answer"] if isinstance(row["answer"], dict) else {}
        if not is_text(row["question"]) or not is_text(answer.get("value")):
            raise smf.BadInput(f"{flag} {name}: question {row['question_id']} has no text or no "
                               f"answer.value; give both, or remove the row")
        aliases = [answer["value"], *filter(is_text, answer.get("aliases") or [])]
        questions.append((row["question_id"], Question(row["question"], answer["value"], aliases)))
    return questions


def names_its_answer(question):
    """To repeat such a question would count as right, so it is not asked."""
    return answered(question.prompt, question.aliases)


def load_facts(args):
    """--task facts (ours): all wordings of the first --num-facts facts -> train, target.

    Asked are the questions of --split about the same facts (question_id): other wordings, never
    trained on; or, if the data has no such split, the trained questions themselves."""
    name = args.facts_data
    path, _, configuration = name.partition(":")
    try:
        path = smf.find(path, "dataset")
        splits = datasets.get_dataset_split_names(path, configuration or None)
    except Exception as error:  # no network, no such name, a strange file: the remedy is the same
        raise smf.BadInput(f"--facts-data {name}: cannot be read ({error})") from None
    taught = "train" if "train" in splits else "validation"
    rows = load_trivia("--facts-data", name, taught)
    ids = list(dict.fromkeys(number for number, _ in rows))[:args.num_facts]
    if len(ids) < args.num_facts:
        raise smf.BadInput(f"--num-facts {args.num_facts}: {name} has {len(ids)}")
    other = args.split in splits and args.split != taught
    asked = load_trivia("--facts-data", name, args.split) if other else rows
    ids = set(ids)
    train, target = ([q for number, q in part if number in ids] for part in (rows, asked))
    return train, [q for q in target if not names_its_answer(q)]


def load_medmcqa(args):
    """--task medmcqa [Gupta26]: four-choice questions -> train, target.

    Asked is the validation split of the data set, as in the paper; for --split validation, an
    eighth of the training rows, at most 1000, that is never trained on."""
    columns = ("question", "opa", "opb", "opc", "opd", "cop")
    rows = smf.load_rows("--medmcqa-data", args.medmcqa_data, "train", columns).shuffle(seed=0)
    held_out = min(1000, len(rows) // 8)
    train = rows.select(range(held_out, min(len(rows), held_out + args.num_questions)))
    target = rows.select(range(held_out)) if args.split == "validation" else smf.load_rows(
        "--medmcqa-data", args.medmcqa_data, "validation", columns)

    def question(row):
        options = [f"{letter}. {row[name]}" for letter, name in zip("ABCD", columns[1:])]
        text = is_text(row["question"]) and all(isinstance(row[o], str) for o in columns[1:5])
        if not text or type(row["cop"]) is not int or row["cop"] not in range(4):
            raise smf.BadInput(f"--medmcqa-data {args.medmcqa_data}: {row}: give four options as "
                               f"text, and in cop the index of the right one, 0 to 3")
        prompt = "\n".join([row["question"], *options, "Answer:"])
        return Question(prompt, options[row["cop"]], options=options)

    return [question(row) for row in train], [question(row) for row in target]


def load_data(args):
    """All that a run learns from and is measured on -> Data. Refuses what cannot be measured."""
    train, target = load_facts(args) if args.task == "facts" else load_medmcqa(args)
    taught = {q.prompt for q in train + target}
    knowledge = [q for _, q in load_trivia("--trivia-data", args.trivia_data, "validation")
                 if q.prompt not in taught and not names_its_answer(q)]
    untaught = [q for _, q in load_trivia("--untaught-data", args.untaught_data, "test")
                ] if args.untaught_data else []
    rows = smf.load_rows("--wikitext-data", args.wikitext_data, "test", ("text",))
    text = "\n\n".join(text or "" for text in rows["text"])
    if not target or not knowledge or not text.strip():
        raise smf.BadInput("--facts-data, --trivia-data, --wikitext-data: after those that are "
                           "taught or name their own answer, no question, or no text, is left")
    if args.stride >= args.window:
        raise smf.BadInput(f"--stride {args.stride}: give less than --window {args.window}")
    return Data(train, *(part[:args.eval_examples] for part in (target, knowledge, untaught)), text)


def training_examples(model, tokenizer, data, args):
    """The Examples to learn from; BadInput now if the run could not be measured in the end."""
    if args.window > context_length(model):
        raise smf.BadInput(f"--window {args.window}: the model sees {context_length(model)} tokens")
    if len(data.train) < args.batch_size:
        raise smf.BadInput(f"--batch-size {args.batch_size}: only {len(data.train)} to learn")
    examples = [smf.encode(tokenizer, q.prompt, q.answer, args.max_length) for q in data.train]
    long = sum(len(ids) == args.max_length for ids, _ in examples)
    if long:
        print(f"{long} of {len(examples)} examples reach --max-length {args.max_length}: cut there")
    return examples


# Measures


def by_length(examples, size, label):
    """(indices, Examples) in batches of similar length, the longest first."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for i in tqdm(range(0, len(order), size), label, leave=False):
        yield order[i:i + size], [examples[j] for j in order[i:i + size]]


@torch.no_grad()
def log_likelihoods(model, examples, size=32):
    """Mean log-likelihood of a target token of each Example -> (len(examples),) float64."""
    means = torch.zeros(len(examples), dtype=torch.float64)
    for indices, part in by_length(examples, size, "log-likelihood"):
        batch = smf.collate(part, model.device)
        loss = smf.token_loss(model, batch).double().sum(1)  # (B,)
        means[indices] = -(loss / (batch["targets"] != -100).sum(1)).cpu()
    return means


@torch.no_grad()
def option_likelihoods(model, prompts, options):
    """Mean log-likelihood of a token of each option (lists of n) after B prompts of one length,
    which are computed once -> (B, n)."""
    B, L, n = len(prompts), len(prompts[0]), len(options[0])
    cache = model(torch.tensor(prompts, device=model.device)[:, :-1], use_cache=True,
                  logits_to_keep=1).past_key_values  # of (B, L - 1)
    cache.batch_repeat_interleave(n)
    batch = smf.collate([smf.Example(prompt[-1:] + ids, 1) for prompt, own in zip(prompts, options)
                         for ids in own], model.device)
    logits = model(batch["input_ids"], past_key_values=cache, logits_to_keep=batch["columns"],
                   attention_mask=F.pad(batch["attention_mask"], (L - 1, 0), value=1)).logits
    loss = F.cross_entropy(logits.float().transpose(1, 2), batch["targets"], reduction="none")
    return -(loss.double().sum(1) / (batch["targets"] != -100).sum(1)).view(B, n)  # of (B * n, P)


@torch.no_grad()
def token_losses(model, tokens, window, stride, first, size=2):
    """-log p of every token, each scored once, in a window that moves by `stride`: of each window
    only the tokens not yet scored count [Gupta26 appendix C]. Every window begins with the tokens
    `first`, which are not scored. If there are none, the first token of the text is not."""
    n, stride = window - len(first), min(stride, window - len(first))
    examples = [smf.Example(first + tokens[i:i + n], window - stride if i else len(first) or 1)
                for i in range(0, max(1, len(tokens) - n + stride), stride)]
    losses = []
    for _, part in by_length(examples, size, "perplexity"):
        batch = smf.collate(part, model.device)
        losses.append(smf.token_loss(model, batch)[batch["targets"] != -100].double().cpu())
    return torch.cat(losses)


@torch.no_grad()
def generate_answers(model, tokenizer, prompts, max_new_tokens=32, size=64):
    """Greedy continuations of the prompts, as text."""
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False,
                                               eos_token_id=end, pad_token_id=end)
    room = context_length(model) - max_new_tokens
    examples = [smf.Example(smf.prompt_ids(tokenizer, prompt)[0][-room:], 0) for prompt in prompts]
    texts = [""] * len(prompts)
    for indices, batch in by_length(examples, size, "answers"):
        T = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[end] * (T - len(ids)) + ids for ids, _ in batch])  # (B, T) left-padded
        mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids, _ in batch])
        new = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))[:, T:]
        for i, text in zip(indices, tokenizer.batch_decode(new, skip_special_tokens=True)):
            texts[i] = text
    return texts


def context_length(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", 10**9)


def normalize(text):
    """TriviaQA's rule: lower case, no punctuation, no articles, single spaces."""
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text.lower())
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
    """-> whether each is answered, mean log-likelihood of each answer."""
    texts = generate_answers(model, tokenizer, [q.prompt for q in questions])
    examples = [smf.encode(tokenizer, q.prompt, q.answer, context_length(model), end=False)
                for q in questions]
    right = [answered(text, q.aliases) for text, q in zip(texts, questions)]
    return right, log_likelihoods(model, examples)


def multiple_choice(model, tokenizer, questions, size=16):
    """-> whether the right option has the highest mean log-likelihood, for each question."""
    right, alike = [False] * len(questions), {}  # {length of the prompt: [(i, prompt, options)]}
    for i, q in enumerate(questions):
        examples = [smf.encode(tokenizer, q.prompt, option, context_length(model), end=False)
                    for option in q.options]
        start = min(example.start for example in examples)
        alike.setdefault(start, []).append((i, examples[0].ids[:start], [
            ids[start:] for ids, start in examples]))
    batches = [part[i:i + size] for part in alike.values() for i in range(0, len(part), size)]
    for batch in tqdm(batches, "multiple choice", leave=False):
        indices, prompts, options = zip(*batch)
        for i, best in zip(indices, option_likelihoods(model, prompts, options).argmax(1)):
            right[i] = questions[i].options[best] == questions[i].answer
    return right


def evaluate(model, tokenizer, data, args):
    """All measures of a model -> {measure: mean(...)}, and which knowledge questions are right."""
    result = {}
    if args.task == "medmcqa":
        result["target"] = mean(multiple_choice(model, tokenizer, data.target))
    else:
        right, likelihood = open_questions(model, tokenizer, data.target)
        result["target"], result["target LL"] = mean(right), mean(likelihood)
    if data.untaught:
        result["untaught"] = mean(open_questions(model, tokenizer, data.untaught)[0])
    tokens = tokenizer(data.text, add_special_tokens=False)["input_ids"][:args.eval_tokens]
    ids = tokenizer("a")["input_ids"]  # its first tokens: what the tokenizer puts before a text
    first = ids[:ids.index(tokenizer("a", add_special_tokens=False)["input_ids"][0])]
    loss = mean(token_losses(model, tokens, args.window, args.stride, first))
    perplexity = math.exp(loss["value"])
    result["perplexity"] = loss | {"value": perplexity, "stderr": perplexity * loss["stderr"]}
    right, likelihood = open_questions(model, tokenizer, data.knowledge)
    result["knowledge"], result["knowledge LL"] = mean(right), mean(likelihood)
    return result | {"knowledge right": right}


# Runs and their tables

DIGITS = {"target": 3, "target LL": 2, "untaught": 3, "perplexity": 2, "knowledge": 3,
          "knowledge LL": 2, "kept": 3}
SETTINGS = ("task", "facts_data", "num_facts", "medmcqa_data", "num_questions", "split",
            "trivia_data", "untaught_data", "wikitext_data", "eval_examples", "eval_tokens",
            "window", "stride")


def evaluate_run(run, data, args):
    """evaluate(), in float32, kept in RUN/eval.json for each split and setting."""
    settings = {"measures": 2} | {name: vars(args)[name] for name in SETTINGS}  # 1: no first token
    settings["data"] = smf.sha256(json.dumps(data[1:]).encode()).hexdigest()
    key, file = json.dumps(settings, sort_keys=True), run / "eval.json"
    results = smf.read_json(file) if file.exists() else {}
    if key not in results:
        print(f"evaluating {run} on the {args.split} split")
        model, tokenizer = smf.load(run, args.device)
        results[key] = evaluate(model.float(), tokenizer, data, args)
        smf.write_json(file, results)
    return results[key]


def parent_of(run):
    """The run that this one is based on; for one on a pretrained model, that model, as a run that
    changed nothing, in the directory base beside it."""
    config = smf.read_config(run)
    if "parent" in config:
        return Path(os.path.normpath(run / config["parent"]))
    base = run.parent / "base"
    own = {name: config[name] for name in ("base", "parent_sha256", "dtype")}
    if not smf.finished(base):
        smf.start_run(base, own, argparse.Namespace())
        smf.finish_run(base, {})
    if smf.read_config(base)["parent_sha256"] != config["parent_sha256"]:
        raise smf.BadInput(f"{base}: is another model than that of {run}; give the runs of each "
                           f"model a directory of their own")
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


def table(rows):
    """{name: {column: text}} -> Markdown."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["run", *columns], ["---"] * (1 + len(columns))]
    lines += [[str(name), *(cells.get(column, "") for column in columns)]
              for name, cells in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(run, data, args):
    """The table of a run below all that it is based on."""
    chain = [run]
    while parent_of(chain[0]) != chain[0]:
        chain.insert(0, parent_of(chain[0]))
    return table({part: row(part, data, args) for part in chain})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--device", choices=smf.DEVICES, default=smf.DEVICES[0])
    add_flags(parser)
    given = {name: value for name, value in vars(smf.parse(parser, {}, argv)).items()
             if value is not None}
    found = sorted(Path("out").glob("*/*/delta.safetensors"))
    runs = given.pop("runs") or [path.parent for path in found]
    tables = {}  # settings: {run: cells}
    for run in runs:
        flags = smf.read_config(run).get("flags", {})
        if "task" in flags:  # a base or a retrofit learned none: see the tables of its children
            own = argparse.Namespace(**flags | given)
            data = load_data(own)
            rows = tables.setdefault(tuple((name, vars(own)[name]) for name in SETTINGS), {})
            rows |= {part: row(part, data, own) for part in (parent_of(run), run)}
    for settings, rows in tables.items():  # what was measured in another way is in another table
        other = [f"{name} {value}" for name, value in settings
                 if name in ("task", "split") or (name, value) not in next(iter(tables))]
        print(f"\n{', '.join(other)}\n\n{table(rows)}")
    if not tables:
        raise smf.BadInput("no run that learned a task; make one with train_sparse.py, or name one")


if __name__ == "__main__":
    smf.script(main)
