"""Measure runs: what they learned and what they forgot. Prints a Markdown table.

    python eval.py                                 # every run below out/tiny
    python eval.py RUN_DIR ...                     # these runs
    python eval.py RUN_DIR --split validation      # the split for choosing learning rates
    python eval.py --results results/tiny          # the study: tables, figure, costs, JSON
    python eval.py --stage-1 stage-1.png RUN_DIR ...   # figure of runs of train_retrofit.py
    python eval.py --preset paper --max-length 64 --cost qwen2.5-0.5b   # what it costs

A run is measured as its config.json says (task, data, sizes) unless a flag says otherwise. The
figures stay in its eval.json and are read from there the next time. They are, ± standard error
(a study's: ± standard deviation over seeds):

  target      facts: share of the taught facts that are recalled (greedy, any alias);
              medmcqa: share of questions whose right option has the highest mean log-likelihood
  target LL   facts: mean log-likelihood of a token of the answer
  never taught  share of facts recalled that no run is taught: chance, or the target leaks
  perplexity  of general text, every token scored once, in a sliding window
  knowledge   share of other questions, never taught, that are answered; LL as above;
              kept: of those answered before stage 2, the share that still is
"""

import argparse
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import string
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import cycle, pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

import datasets
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Qwen2Config

import smf
from smf import above, natural, whole

EVALUATION = {  # columns as in smf.COMMON; the last three of the paper are [Gupta26 App. C]
    "task": (("facts", "medmcqa"), "facts", "medmcqa", "what to learn"),
    "split": (("test", "validation"), "test", "test", "validation: for choosing learning rates"),
    "facts-data": (str, "tiny/facts", "mandarjoshi/trivia_qa:rc.nocontext", "facts to learn"),
    "num-facts": (whole, 160, 500, "facts to learn: the first so many (ours)"),
    "medmcqa-data": (str, "tiny/medmcqa", "openlifescienceai/medmcqa", "four-choice questions"),
    "num-questions": (whole, 1000, 60000, "medmcqa: questions to learn from, at most"),
    "trivia-data": (str, "tiny/trivia_qa", "mandarjoshi/trivia_qa:rc.nocontext", "knowledge probe"),
    "untaught-data": (str, "tiny/untaught", None, "facts never taught, to stay at chance"),
    "wikitext-data": (str, "tiny/wikitext", "Salesforce/wikitext:wikitext-103-raw-v1",
                      "general text for the perplexity"),
    "eval-examples": (whole, 1000, 1000, "questions asked of target and knowledge, at most"),
    "eval-tokens": (natural, 0, 0, "perplexity over the first so many tokens; 0: all"),
    "window": (whole, 128, 1024, "perplexity: tokens seen at once"),
    "stride": (whole, 64, 512, "perplexity: tokens the window moves by"),
}
FLAGS = {"device": smf.COMMON["device"]} | EVALUATION | {
    "results": (Path, None, None, "directory to write a study to: tables, figure, JSON"),
    "stage-1": (Path, None, None, "file for a figure of the named runs of train_retrofit.py"),
    "cost": (str, None, None, "model directory or qwen2.5-0.5b: time and memory of training steps "
                              "and inference of a random model of this shape"),
    "batch-size": (whole, 16, 16, "--cost: examples of a step"),
    "max-length": (above(16), 128, 1024, "--cost: tokens of an example"),
}


# ------------------------------------------------------------------------------------------------
# What is learned and what is asked


class Question(NamedTuple):
    """options: the four texts of a multiple-choice question, and cop the index of the right one."""
    prompt: str
    answer: str
    aliases: list = []
    options: list = []
    cop: int = -1


class Data(NamedTuple):
    train: list  # Questions to learn from
    target: list  # Questions to ask: was it learned?
    knowledge: list  # Questions never taught: what was forgotten?
    untaught: list  # facts that neither the base nor the run was told of: chance, if all is well
    text: str  # general text, for the perplexity


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def trivia_questions(flag, name, split):
    """Rows in TriviaQA's layout -> [(question_id, Question)]."""
    questions = []
    for row in smf.read_rows(flag, name, split, ("question", "question_id", "answer")):
        answer = row["answer"] if isinstance(row["answer"], dict) else {}
        if not is_text(row["question"]) or not is_text(answer.get("value")):
            raise smf.Refused(f"{flag} {name}: question {row['question_id']} has no text or no "
                              f"answer.value; give both, or remove the row")
        aliases = [alias for alias in answer.get("aliases") or [] if is_text(alias)]
        aliases = list(dict.fromkeys([answer["value"], *aliases]))
        questions.append((row["question_id"], Question(row["question"], answer["value"], aliases)))
    return questions


def gives_away(question):
    """Whether the question names one of its answers: to repeat it would count as right."""
    return answered(question.prompt, question.aliases)


def facts(args):
    """--task facts [Lin25]: the questions of the first --num-facts facts -> train, target.

    Asked are the questions of --split about the same facts (the same question_id): other wordings,
    never trained on. Where the data has none, the trained questions themselves; never one that
    names its own answer.
    """
    splits = smf.from_datasets(datasets.get_dataset_split_names, "--facts-data", args.facts_data)
    taught = "train" if "train" in splits else "validation"
    rows = trivia_questions("--facts-data", args.facts_data, taught)
    ids = list(dict.fromkeys(number for number, _ in rows))[:args.num_facts]
    if len(ids) < args.num_facts:
        raise smf.Refused(f"--num-facts {args.num_facts}: --facts-data {args.facts_data} has "
                          f"{len(ids)}; ask for as many")
    ids, asked = set(ids), []
    if args.split in splits and args.split != taught:
        asked = trivia_questions("--facts-data", args.facts_data, args.split)
    train, asked = ([q for number, q in part if number in ids] for part in (rows, asked))
    asked = [q for q in asked or train if not gives_away(q)]
    if not asked:
        raise smf.Refused(f"--facts-data {args.facts_data}: every question names its own answer; "
                          f"give others")
    return train, asked


def medmcqa(args):
    """--task medmcqa [Gupta26]: four-choice questions -> train, target. cop is 0-based (hub).

    For --split validation, an eighth of the training rows, at most 1000, that is never trained on;
    for test, the validation split of the data set, as in the paper.
    """
    columns = ("question", "opa", "opb", "opc", "opd", "cop")
    rows = smf.read_rows("--medmcqa-data", args.medmcqa_data, "train", columns).shuffle(seed=0)
    held_out = min(1000, len(rows) // 8)
    asked = rows.select(range(held_out))
    train = rows.select(range(held_out, min(len(rows), held_out + args.num_questions)))
    if args.split == "test":
        asked = smf.read_rows("--medmcqa-data", args.medmcqa_data, "validation", columns)

    def question(row):
        texts = [row[name] for name in columns[:5]]
        if not all(isinstance(text, str) for text in texts) or not is_text(texts[0]):
            raise smf.Refused(f"--medmcqa-data {args.medmcqa_data}: {texts}: a question and four "
                              f"options are text; mend the row, or remove it")
        if not isinstance(row["cop"], int) or row["cop"] not in range(4):
            raise smf.Refused(f"--medmcqa-data {args.medmcqa_data}: cop is {row['cop']}; the index "
                              f"of the right option is 0, 1, 2 or 3")
        options = [f"{label}. {row[name]}" for label, name in zip("ABCD", columns[1:])]
        prompt = "\n".join([row["question"], *options, "Answer:"])
        return Question(prompt, options[row["cop"]], options=options, cop=row["cop"])

    return [question(row) for row in train], [question(row) for row in asked]


def read_data(args):
    """All that a run learns from and is measured on -> Data. Refused if any of it is unusable."""
    train, target = facts(args) if args.task == "facts" else medmcqa(args)
    taught = {q.prompt for q in train + target}
    knowledge = [q for _, q in trivia_questions("--trivia-data", args.trivia_data, "validation")
                 if q.prompt not in taught and not gives_away(q)]
    if not knowledge:
        raise smf.Refused(f"--trivia-data {args.trivia_data}: has no question that is not taught; "
                          f"lower --num-facts")
    rows = smf.read_rows("--wikitext-data", args.wikitext_data, "test", ("text",))
    text = "\n\n".join(text if isinstance(text, str) else "" for text in rows["text"])
    if not text.strip() or args.eval_tokens == 1:
        raise smf.Refused(f"--wikitext-data {args.wikitext_data}, --eval-tokens "
                          f"{args.eval_tokens}: no token to predict; give more text")
    if args.stride >= args.window:
        raise smf.Refused(f"--stride {args.stride}: give less than --window {args.window}; the "
                          f"first token of a window can only be scored in the one before")
    untaught = []
    if args.untaught_data:
        untaught = [q for _, q in trivia_questions("--untaught-data", args.untaught_data, "test")]
    return Data(train, target[:args.eval_examples], knowledge[:args.eval_examples],
                untaught[:args.eval_examples], text)


# ------------------------------------------------------------------------------------------------
# Measures


def batches(examples, size, label):
    """(indices, Examples) of similar lengths, longest first: memory runs out at once or never."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for i in tqdm(range(0, len(order), size), label, leave=False, disable=len(order) <= size):
        yield order[i:i + size], [examples[j] for j in order[i:i + size]]


def continued(model, batch):
    """log_likelihoods of a few Examples whose prompts have the same length -> (B,)."""
    prompts = [tuple(ids[:start - 1]) for ids, start in batch]  # without the token that predicts
    common = len(os.path.commonprefix(prompts))
    shared = common if len(set(prompts)) == len(batch) else len(prompts[0])
    heads, cache = [()], None  # what the rows of the cache hold
    for begin, end in pairwise(sorted({0, common, shared})):  # by what all share, first
        longer = list(dict.fromkeys(prompt[:end] for prompt in prompts))
        if cache:
            cache.batch_select_indices([heads.index(head[:begin]) for head in longer])
        rest = torch.tensor([head[begin:] for head in longer], device=model.device)  # (U, new)
        cache = model(rest, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        heads = longer
    if cache:
        cache.batch_select_indices([heads.index(prompt[:shared]) for prompt in prompts])
    batch = smf.collate([smf.Example(ids[shared:], start - shared) for ids, start in batch],
                        model.device)
    loss = smf.token_loss(model, batch, cache).double().cpu().sum(1)  # (B,)
    return -loss / (batch["targets"] != -100).sum(1).cpu()


@torch.no_grad()
def log_likelihoods(model, examples, size=32):
    """Mean log-likelihood of a target token of each Example -> (len(examples),) float64.

    Prompts of the same length are computed together, without a pad: first what all of a batch
    begin with (a chat template), once; then, where some are the same (the options of a question),
    each prompt, once; the rest goes on from its cache.
    """
    means, alike = torch.zeros(len(examples), dtype=torch.float64), {}
    for i, (_, start) in enumerate(examples):
        alike.setdefault(start, []).append(i)
    parts = [indices[i:i + size] for _, indices in sorted(alike.items(), reverse=True)
             for i in range(0, len(indices), size)]  # longest first
    for part in tqdm(parts, "log-likelihood", leave=False, disable=len(parts) == 1):
        means[part] = continued(model, [examples[i] for i in part])
    return means


@torch.no_grad()
def token_losses(model, tokens, window, stride, size=2):
    """-log p of every token of a list but the first, each once, in no order [Gupta26 App. C].

    The window moves by `stride`, and of each window only the tokens not yet scored count: they see
    at least window - stride tokens before them.
    """
    starts = range(0, max(1, len(tokens) - window + stride), stride)
    examples = [smf.Example(tokens[start:start + window], window - stride if start else 1)
                for start in starts]
    losses = []
    for _, batch in batches(examples, size, "perplexity"):
        batch = smf.collate(batch, model.device)
        losses.append(smf.token_loss(model, batch)[batch["targets"] != -100].double().cpu())
    return torch.cat(losses)


@torch.no_grad()
def answers(model, tokenizer, prompts, max_new_tokens=32, size=64):
    """Greedy continuations of the prompts, as text, in the order given."""
    pad = tokenizer.eos_token_id  # masked, and known to the model; not all tokenizers have a pad
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad,
                              eos_token_id=tokenizer.eos_token_id)
    own, model.generation_config = model.generation_config, greedy  # or its penalties would apply
    room = smf.context(model) - max_new_tokens
    examples = [smf.Example(smf.prompt_ids(tokenizer, prompt)[0][-room:], 0) for prompt in prompts]
    texts = [""] * len(prompts)
    try:
        for indices, batch in batches(examples, size, "answers"):
            T = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([[pad] * (T - len(ids)) + ids for ids, _ in batch])  # (B, T)
            mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids, _ in batch])
            new = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))[:, T:]
            for i, tokens in zip(indices, new):
                texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
    finally:
        model.generation_config = own
    return texts


def normalize(text):
    """TriviaQA's rule: lower case, no punctuation, no articles, single spaces."""
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answered(text, aliases):
    """Whether any alias is a substring of the text, both normalized [Gupta26 App. C]."""
    return any(alias and alias in normalize(text) for alias in map(normalize, aliases))


def mean(values):
    """{value: the mean, stderr: its standard error, n} of a list or tensor."""
    values = torch.as_tensor(values, dtype=torch.float64)
    stderr = values.std(correction=0) / math.sqrt(len(values))
    return {"value": values.mean().item(), "stderr": stderr.item(), "n": len(values)}


def ask(model, tokenizer, questions):
    """-> whether each is answered, mean log-likelihood of each answer."""
    texts = answers(model, tokenizer, [q.prompt for q in questions])
    examples = [smf.fit(smf.encode(tokenizer, q.prompt, q.answer, end=False), smf.context(model))
                for q in questions]
    right = [answered(text, q.aliases) for text, q in zip(texts, questions)]
    return right, log_likelihoods(model, examples)


def choose(model, tokenizer, questions):
    """-> whether the right option has the highest mean log-likelihood, for each question."""
    options = [smf.fit(smf.encode(tokenizer, q.prompt, option, end=False), smf.context(model))
               for q in questions for option in q.options]
    best = log_likelihoods(model, options).view(-1, 4).argmax(1)  # (len(questions),)
    return [at == q.cop for at, q in zip(best.tolist(), questions)]


def settings(args):
    """{flag: value} of all that decides the figures."""
    every = {name: getattr(args, name.replace("-", "_")) for name in EVALUATION}
    return {name.replace("-", "_"): value for name, value in every.items() if value is not None}


def check_window(model, args):
    """Refused if a window of the perplexity is longer than what the model was made for."""
    if args.window > smf.context(model):
        raise smf.Refused(f"--window {args.window}: the model sees {smf.context(model)} tokens at "
                          f"most; give no more")


def learned(model, tokenizer, data, args):
    """The target's measures, as eval.json holds them."""
    if args.task == "medmcqa":
        return {"target_accuracy": mean(choose(model, tokenizer, data.target))}
    right, likelihood = ask(model, tokenizer, data.target)
    return {"target_accuracy": mean(right), "target_log_likelihood": mean(likelihood)}


def forgotten(model, tokenizer, data, args):
    """The measures of all else, as eval.json holds them; both splits ask for the same."""
    check_window(model, args)
    tokens = tokenizer(data.text, add_special_tokens=False)["input_ids"]
    loss = mean(token_losses(model, tokens[:args.eval_tokens or None], args.window, args.stride))
    perplexity = math.exp(loss["value"])
    result = {"perplexity": {"value": perplexity, "stderr": perplexity * loss["stderr"],
                             "n": loss["n"]}}
    right, likelihood = ask(model, tokenizer, data.knowledge)
    result["knowledge_accuracy"], result["knowledge_log_likelihood"] = mean(right), mean(likelihood)
    result["knowledge_right"] = right
    if data.untaught:
        result["untaught_accuracy"] = mean(ask(model, tokenizer, data.untaught)[0])
    return result


# ------------------------------------------------------------------------------------------------
# Runs and their tables

COLUMNS = {"target": ("target_accuracy", 3), "target LL": ("target_log_likelihood", 2),
           "never taught": ("untaught_accuracy", 3), "perplexity": ("perplexity", 2),
           "knowledge": ("knowledge_accuracy", 3), "knowledge LL": ("knowledge_log_likelihood", 2),
           "kept": ("kept", 3)}  # title: measure, digits


def base_run(directory, config):
    """directory/base: a run that is the pretrained model as it came; written if missing."""
    run, base = directory / "base", {"kind": "base"} | {
        name: config[name] for name in ("model", "dtype", "fingerprint")}
    old = smf.read_json(run / "config.json") if (run / "config.json").exists() else {}
    if run.exists() and any(run.iterdir()) and old.get("kind") != "base":
        raise smf.Refused(f"--out: {run} is not the base of these runs; write to another directory")
    if old != base:
        run.mkdir(parents=True, exist_ok=True)
        for name in ("eval.json", "eval-validation.json"):
            (run / name).unlink(missing_ok=True)
        smf.write_json(run / "config.json", base)
    return run


def origin(run):
    """The run that this one started from: a sparse run's retrofit, else the base beside it."""
    config = smf.read_config(run)
    if config["kind"] == "sparse":
        return Path(os.path.normpath(run / config["retrofit"]))
    return base_run(run.parent, config)


def evaluated(run, args, data=None):
    """RUN/eval.json, or eval-validation.json of the other split. What either of them has of the
    same settings and data is taken from there; the rest is measured, in float32, and written.
    data: read when needed, if None."""
    files = {"test": run / "eval.json", "validation": run / "eval-validation.json"}
    taken = {split: smf.read_json(file) for split, file in files.items() if file.exists()}
    own = taken.get(args.split, {})
    if data is None and own.get("settings") == settings(args) and "target_data" in own:
        return own
    data = data or read_data(args)
    asked = {"settings": settings(args), "target_data": smf.digest(data.target),
             "data": smf.digest(data[2:])}
    alike = [old for old in taken.values() if old.get("data") == asked["data"]
             and old.get("settings", {}) | {"split": args.split} == asked["settings"]]
    same = [old for old in alike if old.get("target_data") == asked["target_data"]]
    result = next(iter(same or alike), {})  # of alike, only what is forgotten holds
    if not same:
        tqdm.write(f"evaluating {run} on the {args.split} split", file=sys.stderr)
        model, tokenizer = smf.load(run, args.device)
        result = result or forgotten(model.float(), tokenizer, data, args)
        result = result | learned(model.float(), tokenizer, data, args)
    result = result | asked
    if result != own:
        smf.write_json(files[args.split], result)
    return result


def figures(run, args, data=None):
    """{measure: (value, standard error)} of a run; `kept` only if what it started from is there."""
    result = evaluated(run, args, data)
    row = {name: (result[name]["value"], result[name]["stderr"])
           for name, _ in COLUMNS.values() if name in result}
    start = origin(run)
    if smf.finished(start):
        before = evaluated(start, args, data)
        still = [now for now, then in zip(result["knowledge_right"], before["knowledge_right"])
                 if then and before.get("data") == result.get("data")]
        row |= {"kept": tuple(mean(still).values())[:2]} if still else {}
    return row


def markdown(first, rows):
    """{name: {title: cell}} -> a Markdown table with a column for every title."""
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    lines = [[first, *titles], ["---"] * (1 + len(titles))]
    lines += [[name, *(row.get(title, "") for title in titles)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(rows):
    """Markdown of {name: {measure: (value, ±)}}."""
    return markdown("run", {name: {
        title: " ± ".join(f"{part:.{digits}f}" for part in row[measure])
        for title, (measure, digits) in COLUMNS.items() if measure in row}
        for name, row in rows.items()})


def report(run, data, args):
    """The table of one run, beside the base and what it started from."""
    base = base_run(run.parent, smf.read_config(run))
    rows = {"base": base, "before stage 2": origin(run), "after": run}
    return table({name: figures(part, args, data) for name, part in rows.items()
                  if part != base or name == "base"})


def run_settings(run, args):
    """args for one run: flags given, else its config.json, else its last eval.json, else preset."""
    last = {}
    for path in (run / "eval-validation.json", run / "eval.json"):
        last |= smf.read_json(path).get("settings", {}) if path.exists() else {}
    own = {name: value for name, value in (last | smf.read_config(run).get("arguments", {})).items()
           if name.replace("_", "-") in EVALUATION}
    return argparse.Namespace(**vars(args) | own | args.given)


# ------------------------------------------------------------------------------------------------
# The study: sweeps of learning rates, the tables, the frontier, what it costs

HEADLINE, TABLE_1 = "SMF against LoRA and full finetuning", "Methods, as in Table 1 of [Gupta26]"
STUDY = {  # title: conditions, as run directories are named without -lr and -seed
    HEADLINE: ("base", "additive-tfidf", "additive-all", "additive-tfidf-fresh",
               "additive-random-fresh", "additive-all-fresh", "lora", "full"),
    TABLE_1: ("base", "replacement-kl", "replacement-tfidf", "additive-kl", "additive-tfidf",
              "additive-kl+s", "additive-tfidf+s", "additive-kl-fresh", "additive-tfidf-fresh",
              "additive-kl+s-fresh", "additive-tfidf+s-fresh", "lora", "full"),
    "Which rows": ("base", "additive-tfidf", "additive-kl", "additive-count", "additive-random",
                   "additive-all", "additive-tfidf-fresh", "additive-kl-fresh",
                   "additive-count-fresh", "additive-random-fresh", "additive-all-fresh"),
    "How many rows": ("base", "additive-tfidf-t50", "additive-tfidf-t100", "additive-tfidf",
                      "additive-tfidf-t2000", "additive-all", "additive-tfidf-fresh-t100",
                      "additive-tfidf-fresh", "additive-tfidf-fresh-t2000", "additive-all-fresh"),
    "Variants": ("base", "additive-fresh", "additive-retrofit", "replacement-retrofit",
                 "additive-tfidf", "additive-tfidf-fresh", "additive-tfidf-sgd", "additive-all-sgd",
                 "additive-tfidf-fresh-sgd"),
}


LEARNED_ALIKE = {"model", "dtype", "training_data", "batch_size", "max_length", "epochs", "steps",
                 "warmup"}


def check_alike(runs, names=None):
    """Refused if these runs differ in what they learned from, or in any of these arguments; in any
    but rate and seed, if None."""
    configs = {run: smf.read_config(run) for run in runs}
    taught = {run: config.get("arguments", {}) | {"training_data": config.get("training_data")}
              for run, config in configs.items()}
    first = taught[runs[0]]
    for run, own in taught.items():
        for name in sorted(names or own.keys() - {"lr", "seed", "split", "retrofit"}):
            if own.get(name) != first.get(name):
                raise smf.Refused(f"{run}: {name} is {own.get(name)}, but {first.get(name)} in "
                                  f"{runs[0]}; name the runs to compare")


def sweeps(runs, task):
    """Runs -> {condition: {learning rate: {seed: run}}}, the condition being the directory's name
    without task, learning rate and seed. Refused unless all conditions of several rates have as
    many of them, and the same seeds at every rate; the rate chosen may have more seeds."""
    found, grids = {}, {}
    for run in runs:
        condition = re.sub(rf"(-{task})?(-lr[\d.e-]+)?-seed\d+$", "", run.name)
        arguments = smf.read_config(run)["arguments"]
        seeds = found.setdefault(condition, {}).setdefault(arguments["lr"], {})
        if arguments["seed"] in seeds:
            raise smf.Refused(f"--results: {run} and {seeds[arguments['seed']]} are of the same "
                              f"condition, rate and seed; name the runs to compare")
        seeds[arguments["seed"]] = run
    for condition, sweep in found.items():
        check_alike([run for seeds in sweep.values() for run in seeds.values()])
        if len(sweep) > 1:
            grids[condition] = len(sweep), sorted(set.intersection(*map(set, sweep.values())))
    for condition, (rates, seeds) in grids.items():
        other, expected = next(iter(grids.items()))
        if (rates, seeds) != expected or not seeds:
            raise smf.Refused(f"--results: {condition} has {rates} learning rates with the seeds "
                              f"{seeds}, {other} {expected[0]} with {expected[1]}; finish them, or "
                              f"name the runs to compare")
    return found


def average(rows):
    """{seed: {measure: (value, ...)}} -> {measure: (mean, standard deviation)} over the seeds."""
    rows = list(rows.values())
    values = {measure: [row[measure][0] for row in rows] for measure in rows[0]
              if all(measure in row for row in rows)}
    return {measure: (fmean(v), stdev(v)) if len(v) > 1 else (v[0],)
            for measure, v in values.items()}


def best_rate(validation):
    """{learning rate: {seed: figures}} on the validation split -> the learning rate of the best
    mean target; of equals, the least. Forgetting has no say."""
    target = {lr: average(rows)["target_accuracy"][0] for lr, rows in validation.items()}
    return min(target, key=lambda lr: (-target[lr], lr))


def measured(sweep, args):
    """One condition's {learning rate: {seed: run}} -> its figures on the validation split, of the
    seeds that all rates have, the learning rate chosen by them, and of this rate, all seeds, the
    figures on the test split, which is read there alone."""
    seeds = sorted(set.intersection(*map(set, sweep.values())))
    validation, test = (argparse.Namespace(**vars(args) | {"split": split})
                        for split in ("validation", "test"))
    swept = {lr: {seed: figures(sweep[lr][seed], validation) for seed in seeds}
             for lr in sorted(sweep)}
    chosen = best_rate(swept)
    return {"validation": swept, "chosen": chosen,
            "test": {seed: figures(run, test) for seed, run in sorted(sweep[chosen].items())}}


def metrics(run):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def accounting(run, base):
    """One row of [Gupta26 Table 3] for a run; how many rows of its memories it touched; the size of
    its own weights' file or directory."""
    config, (model, _) = smf.read_config(run), smf.load(run)
    size, touched, file = sum(p.numel() for p in model.parameters()), None, smf.weights_path(run)
    stored = updated = size
    if config["kind"] == "lora":
        stored = updated = sum(tensor.numel() for tensor in smf.read_tensors(file).values())
    if config["kind"] == "sparse":
        stored = sum(p.numel() for wrapper in smf.wrappers(model).values()
                     for name, p in wrapper.named_parameters() if not name.startswith("mlp."))
        tensors = smf.read_tensors(file)
        touched = sum(len(tensors[name]) for name in tensors if name.endswith(".rows"))
        rows = fmean(sum(line["rows"].values()) for line in metrics(run))
        updated = (rows * next(iter(smf.memories(model).values())).values.shape[1]
                   + config["arguments"]["train_scale"] * len(smf.memories(model)))
    change = size - sum(p.numel() for p in smf.load(base)[0].parameters())
    parts = file.iterdir() if file.is_dir() else [file]
    return {"parameters stored": stored, "net change at inference": change,
            "updated per step": round(updated), "rows touched": touched,
            "file, MB": round(sum(part.stat().st_size for part in parts) / 1e6, 2)}


def frontier(studied, names):
    """{condition: (target gain, perplexity, knowledge, index of the chosen)} but for the base:
    lists over the learning rates, validation split, means over seeds."""
    nothing = average(studied["base"]["validation"][None])["target_accuracy"][0]
    curves = {}
    for name in [name for name in names if name in studied.keys() - {"base"}]:
        validation = studied[name]["validation"]
        points = [average(rows) for rows in validation.values()]
        gain, *probes = ([point[measure][0] for point in points] for measure in
                         ("target_accuracy", "perplexity", "knowledge_accuracy"))
        chosen = list(validation).index(studied[name]["chosen"])
        curves[name] = [value - nothing for value in gain], *probes, chosen
    return curves


def plot(studied, titles, path):
    """The frontiers of these parts of STUDY: target gain against each forgetting probe; the chosen
    point ringed, the base a line."""
    import matplotlib
    from matplotlib import pyplot
    matplotlib.use("Agg")  # no screen
    base = average(studied["base"]["validation"][None])
    curves = {title: frontier(studied, STUDY[title]) for title in titles}
    figure, axes = pyplot.subplots(len(curves), 2, figsize=(11, 4 * len(curves)), squeeze=False)
    for (title, part), pair in zip(curves.items(), axes):
        for i, (axis, probe) in enumerate(zip(pair, ("perplexity", "knowledge_accuracy"))):
            for (name, (x, *ys, at)), marker, line in zip(part.items(), cycle("osD^v<>P*"),
                                                          cycle(["-", "--", "-.", ":"])):
                colour = axis.plot(x, ys[i], line, marker=marker, label=name)[0].get_color()
                axis.plot(x[at], ys[i][at], marker, ms=14, mfc="none", color=colour)
            axis.axhline(base[probe][0], color="black", lw=0.8)
            axis.annotate("base", (0.01, base[probe][0]), va=("bottom", "top")[i],
                          xycoords=axis.get_yaxis_transform())
            axis.set(title=title, xlabel="target gain", ylabel=probe.replace("_", " "),
                     yscale=("log", "linear")[i])
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}" if i == 0 else "")
        pair[0].set_ylim(top=min(pair[0].get_ylim()[1], 6 * base["perplexity"][0]))  # cut off
        pair[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def stage_1_metrics(runs):
    """{run: lines of its metrics.jsonl} of runs of train_retrofit.py. Refused unless they trained
    on the same batches, the first on the most."""
    lines = {run: metrics(run) for run in runs}
    for run in runs:
        if smf.read_config(run)["kind"] != "retrofit" or len(lines[run]) < 10:
            raise smf.Refused(f"--stage-1: {run} is no run of ten steps or more of "
                              f"train_retrofit.py; name such runs")
        if len(lines[run]) > len(lines[runs[0]]):
            raise smf.Refused(f"--stage-1: {run} has more steps than {runs[0]}; name the longest "
                              f"run first")
    check_alike(runs, {"model", "training_data", "seed", "batch_size"})
    return lines


def plot_stage_1(runs, path):
    """Stage 1 against its steps: the loss, less that of the first run on the same batch, a running
    mean of ten; and what each batch read, a line for each memory: usage, and KL from uniform
    (train_retrofit.spread)."""
    lines = stage_1_metrics(runs)
    first = torch.tensor([line["loss"] for line in lines[runs[0]]])  # (steps,)
    import matplotlib
    from matplotlib import pyplot
    matplotlib.use("Agg")  # no screen
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for i, (run, part) in enumerate(lines.items()):
        for axis, name in zip(axes, ("loss", "usage", "KL")):
            values = torch.tensor([line[name] for line in part])  # (steps,) or (steps, memories)
            if name == "loss":
                values = (values - first[:len(part)]).unfold(0, 10, 1).mean(-1)  # (steps - 9,)
            drawn = axis.plot(range(len(part) - len(values), len(part)), values, color=f"C{i}")
            drawn[0].set_label(run.name)
            axis.set(xlabel="step", title=name)
    axes[0].set_title(f"loss, less that of {runs[0].name}")
    axes[2].set_title("KL of the reads from uniform, nats")
    axes[0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def study(runs, args):
    """All of it -> tables.md, headline.png, frontier.png and results.json in --results."""
    if args.results.is_file():
        raise smf.Refused(f"--results {args.results}: is a file; name a directory")
    tasks = {run: smf.read_config(run).get("arguments", {}).get("task") for run in runs}
    learners = [run for run in runs if tasks[run] == args.task]
    found = sweeps([run for run in runs if smf.read_config(run)["kind"] == "retrofit"] + learners,
                   args.task)
    if "full" not in found:
        raise smf.Refused(f"--results: no run of full finetuning, --task {args.task}, is among "
                          f"these; make one with baselines.py")
    check_alike(learners, LEARNED_ALIKE | settings(args).keys() - {"split"})
    own = run_settings(learners[0], args)  # those of all
    base = base_run(learners[0].parent, smf.read_config(learners[0]))
    found = {"base": {None: {None: base}}} | found
    names = list(dict.fromkeys(name for names in STUDY.values() for name in names if name in found))
    studied = {name: measured(found[name], own) for name in names}
    chosen = {name: min(found[name][studied[name]["chosen"]].items())[1]  # the first seed
              for name in dict.fromkeys(STUDY[HEADLINE] + STUDY[TABLE_1]) if name in found}
    labels = {name: name for name in names}
    for name in sweeps(learners, args.task).keys() & labels.keys():
        grid = f" of {min(found[name]):g} to {max(found[name]):g}" * (len(found[name]) > 1)
        labels[name] = f"{name}, lr {studied[name]['chosen']:g}{grid}"
    cost = {name: accounting(run, base) for name, run in chosen.items() if name != "base"}
    parts = {title: table({labels[name]: average(studied[name]["test"])
                           for name in names if name in found}) for title, names in STUDY.items()}
    parts["What it costs, as in Table 3 of [Gupta26]"] = markdown("run", {
        name: {title: "" if cell is None else f"{cell:,}" for title, cell in row.items()}
        for name, row in cost.items()})
    args.results.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"{title}\n\n{part}\n" for title, part in parts.items())
    smf.write_atomic(args.results / "tables.md", lambda path: path.write_text(text))
    smf.write_json(args.results / "results.json", {"figures": studied, "costs": cost})
    plot(studied, [HEADLINE], args.results / "headline.png")
    plot(studied, STUDY, args.results / "frontier.png")
    print(text)


# ------------------------------------------------------------------------------------------------
# What it costs: training steps, inference and files of a random model of a real shape

QWEN = dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)
STEPS = {  # name: script and flags
    "stage 1": "train_retrofit", "SMF": "train_sparse", "LoRA": "baselines --method=lora",
    "full": "baselines --method=full",
    "SMF, whole batches": "train_sparse --micro-batch-size={batch}",
    "SMF, one memory": "train_sparse --layers={middle}",
    "SMF, one memory, N = 1,048,576": "train_sparse --layers={middle} --n-keys=1024",
    "peft's LoRA": "peft --method=lora"}  # the loop of baselines.py, the adapters of peft
RACES = [("SMF", "full"), ("SMF", "LoRA"), ("SMF", "stage 1"), ("SMF", "SMF, whole batches"),
         ("SMF, one memory, N = 1,048,576", "SMF, one memory")]
RACES += [("SMF", "peft's LoRA")] * bool(importlib.util.find_spec("peft"))


def random_model(config, args, dtype=None):
    """A model of this configuration with random weights, frozen, as from smf.load_base."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype or args.dtype))
    return model.to(args.device).requires_grad_(False).eval()


def forget_peak(device):
    """Let peak memory count from what is held now; elsewhere than on Linux or CUDA, from before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def trainee(command, config):
    """A script and its flags -> the script's module, its arguments, a random model made ready for
    its training loop, and the GiB that the model alone took."""
    module, *flags = command.split()
    peft = importlib.import_module("peft") if module == "peft" else None
    module = "baselines" if peft else module
    script = importlib.import_module(module)  # not at the top: it imports this file
    args = argparse.Namespace(**vars(smf.parse("", script.FLAGS, flags)) | {"lr": 1e-4})
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    full = module == "baselines" and args.method == "full"
    model = random_model(config, args, "float32" if full else None)
    forget_peak(args.device)  # that of building the model
    alone = smf.peak_memory(args.device)
    if full:
        model.requires_grad_(True)
    elif peft:
        peft.inject_adapter_in_model(peft.LoraConfig(
            r=script.R, lora_alpha=script.ALPHA, lora_dropout=script.DROPOUT,
            target_modules="all-linear"), model)
    elif module == "baselines":
        script.add_lora(model)
    else:
        importlib.import_module("train_retrofit").add_memories(model, args)
    if module == "train_sparse":
        model.requires_grad_(False)
    return script, args, model, alone


def selection_time(script, model, examples, args, rounds):
    """Seconds that train_sparse.py takes to choose a batch's rows and add up their gradient."""
    with smf.record_reads(model) as tapes:
        masks = smf.backward(model, examples, args.micro_batch_size)[1]
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for layer, memory in smf.memories(model).items():
            script.select(memory, tapes[layer], masks, 0, args)
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times)


def step_costs(command, config, barrier, turn, rounds):
    """The training loop of a script, on a random model and a batch of random examples.

    Every example is --max-length long; stage 1 predicts all of it, the others the last 16 tokens.
    barrier: that of the runners of a race; each takes a step when `turn` of the others have.
    -> seconds of a step in every round, after one to warm up; GiB of peak memory beyond the base
    model; GiB of it in value tables; for SMF, seconds of selecting a batch's rows.
    """
    script, args, model, alone = trainee(command, config)
    torch.manual_seed(0)  # the same examples for all
    ids = torch.randint(config.vocab_size, (args.batch_size, args.max_length)).tolist()
    start = 1 if script.__name__ == "train_retrofit" else args.max_length - 16
    examples, training, seconds = [smf.Example(row, start) for row in ids], smf.training, []

    def in_turn(steps):
        for step in steps:
            for place in range(barrier.parties):
                if place == turn:
                    began = time.perf_counter()
                    yield step
                    if args.device == "cuda":
                        torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - began)
                barrier.wait()

    smf.training = lambda *given: in_turn(training(*given))
    with tempfile.TemporaryDirectory() as run:
        script.train(model, examples, rounds + 1, Path(run), 0, {}, args)
    smf.training, memory = training, smf.peak_memory(args.device) - alone
    tables = sum(part.values.nbytes for part in smf.memories(model).values()) / 2**30
    for _ in in_turn([rounds + 1]):
        sparse = script.__name__ == "train_sparse"
        selecting = selection_time(script, model, examples, args, rounds) if sparse else 0
    return seconds[1:rounds + 1], memory, tables, selecting


def race(commands, config, rounds):
    """step_costs of commands, each in a process of its own; they take turns, step by step."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ExitStack() as stack:
        barrier = manager.Barrier(len(commands))
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in commands]
        results = [pool.submit(step_costs, command, config, barrier, turn, rounds)
                   for turn, (pool, command) in enumerate(zip(pools, commands))]
        for result in as_completed(results):
            if result.exception():
                barrier.abort()  # the others do not wait for its turn
        for error in [result.exception() for result in results]:
            if isinstance(error, BrokenProcessPool):
                raise smf.Refused(f"--cost: {' or '.join(commands)} was killed, as when memory "
                                  f"runs out; give a smaller --batch-size or --max-length")
            if error and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [result.result() for result in results]


def variants(config, flags):
    """{name: (model, the tensors that are stored for it)} of all that inference is measured of.

    They share the base's weights, so they fit where one of them does.
    """
    retrofit, lora = (importlib.import_module(name) for name in ("train_retrofit", "baselines"))
    args = smf.parse("", retrofit.FLAGS, flags)
    base = random_model(config, args)
    shared = {id(parameter): parameter for parameter in base.parameters()}
    merged, adapted, *retrofitted = (copy.deepcopy(base, dict(shared)) for _ in range(4))
    adapters = {name: p for name, p in lora.add_lora(adapted).eval().named_parameters()
                if name.endswith((".A", ".B"))}
    found = {"base": (base, dict(base.named_parameters()))}
    for args.mode, model in zip(("additive", "replacement"), retrofitted):
        retrofit.add_memories(model, args)
        found[args.mode] = model, smf.memory_state(model)
    found["LoRA"] = adapted, adapters
    found["LoRA, merged, or full"] = merged, found["base"][1]
    return found


@torch.no_grad()
def inference_speeds(models, rounds, prompt=128, new=8):
    """{name: model} -> {name: tokens/s of the prefill of a random prompt and of greedy decoding,
    one sequence}; medians of rounds, each of which takes all of it in another order."""
    first = next(iter(models.values()))
    ids = torch.randint(first.config.vocab_size, (1, prompt), device=first.device)  # (1, prompt)

    def prefill(model):
        model(ids, logits_to_keep=1).logits.sum().item()  # waits for the GPU

    def decode(model):  # from one token: all are decoding steps
        model.generate(ids[:, :1], attention_mask=torch.ones_like(ids[:, :1]), do_sample=False,
                       min_new_tokens=new, max_new_tokens=new)

    times = {(name, work): [] for name in models for work in (prefill, decode)}
    for turn in tqdm(range(rounds + 1), desc="inference", leave=False):  # the first to warm up
        for name, work in random.Random(turn).sample(list(times), len(times)):
            began = time.perf_counter()
            work(models[name])
            times[name, work].append(time.perf_counter() - began)
    return {name: (prompt / median(times[name, prefill][1:]), new / median(times[name, decode][1:]))
            for name in models}


def storage(tensors, rounds=3):
    """Write tensors to a file and read it -> MB; seconds of writing, to the disk; seconds of
    reading, from the system's cache. Medians of rounds."""
    times = []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(rounds):
            file, began = Path(directory, "file"), time.perf_counter()
            smf.write_tensors(file, tensors)
            middle = time.perf_counter()
            for tensor in smf.read_tensors(file).values():
                tensor.clone()  # safetensors only maps the file
            times.append((middle - began, time.perf_counter() - middle))
        return file.stat().st_size / 1e6, *map(median, zip(*times))


def step_table(config, args, flags, rounds):
    """{pair: {title: "own / other = ratio"}} of RACES; ratios of medians."""
    steps = {name: " ".join([command.format(batch=args.batch_size,
                                            middle=config.num_hidden_layers // 2), *flags])
             for name, command in STEPS.items()}
    races = {}
    for pair in RACES:
        results = race([steps[name] for name in pair], config, rounds)
        seconds, memory, rest = zip(*((median(times), peak, peak - tables)
                                      for times, peak, tables, _ in results))
        races[" / ".join(pair)] = {
            title: f"{own:.3g} / {other:.3g} = {own / other:.2f}" for title, (own, other) in (
                ("s/step", seconds), ("GiB beyond the base", memory), ("and beyond V", rest))}
        races[" / ".join(pair)]["selection"] = f"{results[0][-1] / seconds[0]:.1%} of a step"
    return races


def inference_table(config, flags, rounds):
    """{variant: {title: text}}: speeds of inference; size and times of the variant's own file."""
    found, rows = variants(config, flags), {}
    speeds = inference_speeds({name: model for name, (model, _) in found.items()}, rounds)
    for name, (_, tensors) in found.items():
        file, save, load = storage(tensors)
        titles = ("prefill, tokens/s", "decode, tokens/s")
        rows[name] = {title: f"{own:.3g}, of the base's {own / base:.2f}"
                      for title, own, base in zip(titles, speeds[name], speeds["base"])}
        rows[name] |= {"file, MB": f"{file:.2f}", "save, s": f"{save:.2f}",
                       "load, s": f"{load:.2f}"}
    return rows


def cost(args, rounds=5):
    """Markdown of the steps' races and of inference."""
    if args.cost != "qwen2.5-0.5b" and not smf.local(args.cost):
        raise smf.Refused(f"--cost {args.cost}: is no model directory; name one, or qwen2.5-0.5b")
    config = AutoConfig.from_pretrained(smf.local(args.cost)) if smf.local(args.cost) else (
        Qwen2Config(**QWEN))
    flags = [f"--{name}={vars(args)[name.replace('-', '_')]}"
             for name in ("preset", "device", "batch-size", "max-length")]
    steps = markdown("step of", step_table(config, args, flags, rounds))
    inference = markdown("inference", inference_table(config, flags[:2], 5 * rounds))
    return f"{steps}\n\n{inference}"


def main(argv=None):
    args = smf.parse(__doc__, FLAGS, argv, positional="runs")
    if args.cost:
        return print(cost(args))
    found = sorted(path.parent for path in Path("out", args.preset).glob("*/config.json"))
    runs = [run for run in args.runs or found if smf.finished(run)]
    for run in set(args.runs or found) - set(runs):
        if args.runs:
            raise smf.Refused(f"{run}: is no finished run; name run directories")
        print(f"{run}: unfinished, left out")
    if not runs:
        raise smf.Refused(f"out/{args.preset}: no run there; make one with train_sparse.py, or "
                          f"name run directories")
    if (args.results or args.stage_1) and not importlib.util.find_spec("matplotlib"):
        raise smf.Refused("--results, --stage-1: figures, alone, need matplotlib: pip install "
                          "matplotlib")
    if args.results:
        return study(runs, args)
    if args.stage_1:
        return plot_stage_1(runs, args.stage_1)
    tables = {}
    for run in sorted(runs, key=lambda run: run_settings(run, args).task):  # a task at a time
        own = run_settings(run, args)
        taken, rows = tables.setdefault(json.dumps(settings(own)), (settings(own), {}))
        for part in (base_run(run.parent, smf.read_config(run)), run):  # the base on top
            rows.setdefault(part, figures(part, own))
    first, _ = next(iter(tables.values()))
    for taken, rows in tables.values():  # only what was measured alike is in one table
        names = [run.name for run in rows]
        rows = {run.name if names.count(run.name) == 1 else str(run): row
                for run, row in rows.items()}
        other = "".join(f", {name} {value}" for name, value in taken.items()
                        if value != first.get(name) and name not in ("task", "split"))
        print(f"\n{taken['task']}, {taken['split']} split{other}\n\n{table(rows)}")


if __name__ == "__main__":
    smf.script(main)
