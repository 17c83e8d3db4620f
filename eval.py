"""Measure runs: what they learned and what they forgot. Prints a Markdown table.

    python eval.py                                 # every run below out/tiny
    python eval.py RUN_DIR ...                     # these runs
    python eval.py RUN_DIR --split validation      # the split for choosing learning rates

A run is measured as its config.json says (task, data, sizes) unless a flag says otherwise. The
figures stay in its eval.json and are read from there the next time. They are, +- standard error:

  target      facts: share of the taught facts that are recalled (greedy, any alias);
              medmcqa: share of questions whose right option has the highest mean log-likelihood
  target LL   facts: mean log-likelihood of a token of the answer
  perplexity  of general text, every token scored once, in a sliding window
  knowledge   share of other questions, never taught, that are answered; LL as above;
              kept: of those answered before stage 2, the share that still is
"""

import argparse
import math
import re
import string
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from tqdm import tqdm
from transformers import GenerationConfig

import smf
from smf import natural, whole

EVALUATION = {  # columns as in smf.SHARED; the last three of the papers are [Gupta26 App. C]
    "task": (("facts", "medmcqa"), "facts", "medmcqa", "what to learn"),
    "split": (("test", "validation"), "test", "test", "validation: for choosing learning rates"),
    "facts-data": (str, "tiny/facts", "mandarjoshi/trivia_qa:rc.nocontext", "facts to learn"),
    "num-facts": (whole, 160, 500, "facts to learn: the first so many (ours)"),
    "medmcqa-data": (str, "tiny/medmcqa", "openlifescienceai/medmcqa", "four-choice questions"),
    "num-questions": (whole, 1000, 60000, "medmcqa: questions to learn from, at most"),
    "trivia-data": (str, "tiny/trivia_qa", "mandarjoshi/trivia_qa:rc.nocontext", "knowledge probe"),
    "wikitext-data": (str, "tiny/wikitext", "Salesforce/wikitext:wikitext-103-raw-v1",
                      "general text for the perplexity"),
    "eval-examples": (whole, 1000, 1000, "questions asked of target and knowledge, at most"),
    "eval-tokens": (natural, 0, 0, "perplexity over the first so many tokens; 0: all"),
    "window": (whole, 128, 1024, "perplexity: tokens seen at once"),
    "stride": (whole, 64, 512, "perplexity: tokens the window moves by"),
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
    text: str  # general text, for the perplexity


def trivia_questions(flag, name, split):
    """Rows in TriviaQA's layout -> [(question_id, Question)]."""
    questions = []
    for row in smf.read_rows(flag, name, split, ("question", "question_id", "answer")):
        answer = row["answer"] if isinstance(row["answer"], dict) else {}
        if not row["question"] or not str(answer.get("value") or "").strip():
            raise smf.Refused(f"{flag} {name}: question {row['question_id']} has no text or no "
                              f"answer.value; give both, or remove the row")
        aliases = answer.get("aliases") or [answer["value"]]
        questions.append((row["question_id"], Question(row["question"], answer["value"], aliases)))
    return questions


def facts(args):
    """--task facts [Lin25]: the questions of the first --num-facts facts -> train, target.

    Asked are the questions of --split about the same facts (the same question_id): other wordings,
    never trained on. Where the data has none, the trained questions themselves.
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
    return train, asked or train


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
        if row["cop"] not in range(4):
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
                 if q.prompt not in taught]
    if not knowledge:
        raise smf.Refused(f"--trivia-data {args.trivia_data}: has no question that is not taught; "
                          f"lower --num-facts")
    rows = smf.read_rows("--wikitext-data", args.wikitext_data, "test", ("text",))
    text = "\n\n".join(text or "" for text in rows["text"])
    if not text.strip() or args.eval_tokens == 1:
        raise smf.Refused(f"--wikitext-data {args.wikitext_data}, --eval-tokens "
                          f"{args.eval_tokens}: no token to predict; give more text")
    if args.stride >= args.window:
        raise smf.Refused(f"--stride {args.stride}: give less than --window {args.window}; the "
                          f"first token of a window can only be scored in the one before")
    return Data(train, target[:args.eval_examples], knowledge[:args.eval_examples],
                text)


# ------------------------------------------------------------------------------------------------
# Measures


def batches(examples, size, label):
    """(indices, Examples) of similar lengths, longest first: memory runs out at once or never."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for i in tqdm(range(0, len(order), size), desc=label, leave=False):
        yield order[i:i + size], [examples[j] for j in order[i:i + size]]


@torch.no_grad()
def log_likelihoods(model, examples, size=32):
    """Mean log-likelihood of a target token of each Example -> (len(examples),) float64."""
    means = torch.zeros(len(examples), dtype=torch.float64)
    for indices, batch in batches(examples, size, "log-likelihood"):
        batch = smf.collate(batch, model.device)
        loss = smf.token_loss(model, batch).double().cpu().sum(1)  # (B,)
        means[indices] = -loss / (batch["targets"] != -100).sum(1).cpu()
    return means


@torch.no_grad()
def token_losses(model, tokens, window, stride, size=8):
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
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad,
                              eos_token_id=tokenizer.eos_token_id)
    own, model.generation_config = model.generation_config, greedy  # or its penalties would apply
    examples = [smf.Example(smf.prompt_ids(tokenizer, prompt)[0], 0) for prompt in prompts]
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
    examples = [smf.encode(tokenizer, q.prompt, q.answer, end=False) for q in questions]
    right = [answered(text, q.aliases) for text, q in zip(texts, questions)]
    return right, log_likelihoods(model, examples)


def choose(model, tokenizer, questions):
    """-> whether the right option has the highest mean log-likelihood, for each question."""
    examples = [smf.encode(tokenizer, q.prompt, option, end=False)
                for q in questions for option in q.options]
    best = log_likelihoods(model, examples).view(-1, 4).argmax(1).tolist()  # (questions,)
    return [option == q.cop for option, q in zip(best, questions)]


def settings(args):
    names = [name.replace("-", "_") for name in EVALUATION]
    return {name: getattr(args, name) for name in names}


def evaluate(model, tokenizer, data, args):
    """All measures of a model, as eval.json holds them."""
    result = {"settings": settings(args)}
    if args.task == "facts":
        right, likelihood = ask(model, tokenizer, data.target)
        result["target_log_likelihood"] = mean(likelihood)
    else:
        right = choose(model, tokenizer, data.target)
    result["target_accuracy"] = mean(right)
    tokens = tokenizer(data.text, add_special_tokens=False)["input_ids"]
    loss = mean(token_losses(model, tokens[:args.eval_tokens or None], args.window, args.stride))
    perplexity = math.exp(loss["value"])
    result["perplexity"] = {"value": perplexity, "stderr": perplexity * loss["stderr"],
                            "n": loss["n"]}
    right, likelihood = ask(model, tokenizer, data.knowledge)
    result["knowledge_accuracy"], result["knowledge_log_likelihood"] = mean(right), mean(likelihood)
    result["knowledge_right"] = right
    return result


# ------------------------------------------------------------------------------------------------
# Runs and their table


def base_run(directory, config):
    """directory/base: a run that is the pretrained model as it came; written if missing."""
    run, base = directory / "base", {"kind": "base"} | {n: config[n] for n in ("model", "dtype")}
    old = smf.read_json(run / "config.json") if (run / "config.json").exists() else {}
    if run.exists() and any(run.iterdir()) and old.get("kind") != "base":
        raise smf.Refused(f"--out: {run} is not the base of these runs; write to another directory")
    if old != base:
        run.mkdir(parents=True, exist_ok=True)
        (run / "eval.json").unlink(missing_ok=True)
        smf.write_json(run / "config.json", base)
    return run


def evaluated(run, data, args, loaded=None):
    """RUN/eval.json; measured first (on the loaded model and tokenizer, if given) unless it is
    there and was taken with the same settings. data may be None: it is then read when needed."""
    path = run / "eval.json"
    if path.exists():
        result = smf.read_json(path)
        if result.get("settings") == settings(args):
            return result
    print(f"evaluating {run}")
    result = evaluate(*(loaded or smf.load(run, args.device)), data or read_data(args), args)
    smf.write_json(path, result)
    return result


def table(results):
    """Markdown for {name: (its eval.json, that of the model before its stage 2, or None)}."""
    columns = {"target": ("target_accuracy", 3), "target LL": ("target_log_likelihood", 2),
               "perplexity": ("perplexity", 2), "knowledge": ("knowledge_accuracy", 3),
               "knowledge LL": ("knowledge_log_likelihood", 2)}
    lines = ["| " + " | ".join(["run", *columns, "kept"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, (result, before) in results.items():
        cells = [name]
        for figure, digits in columns.values():
            figure = result.get(figure, {"value": math.nan, "stderr": math.nan})
            cells.append(f"{figure['value']:.{digits}f} ± {figure['stderr']:.{digits}f}")
        pairs = zip(result["knowledge_right"], before["knowledge_right"]) if before else ()
        still = [now for now, then in pairs if then]
        cells.append(f"{sum(still) / len(still):.3f}" if still else "")
        lines.append("| " + " | ".join(cells).replace("nan ± nan", "") + " |")
    return "\n".join(lines)


def finished(run):
    """Whether a run can be loaded; if not, that is said."""
    done = (run / "memory.safetensors").exists() or run.name == "base"
    if not done:
        print(f"{run}: not there or unfinished, left out")
    return done


def run_settings(run, args):
    """args for one run: flags given, else its config.json, else its last eval.json, else preset."""
    config, last = smf.read_config(run), {}
    if (run / "eval.json").exists():
        last = smf.read_json(run / "eval.json").get("settings", {})
    own = {name: value for name, value in (last | config.get("arguments", {})).items()
           if name in settings(args)}
    return argparse.Namespace(**vars(args) | own | args.given)


def main(argv=None):
    flags = {"device": smf.SHARED["device"]} | EVALUATION
    args = smf.parse(__doc__, flags, argv, positional="runs")
    found = Path("out", args.preset).glob("*/config.json")
    runs = args.runs or sorted(path.parent for path in found if finished(path.parent))
    if not runs:
        raise smf.Refused(f"out/{args.preset}: no run there; make one with train_sparse.py, or "
                          f"name run directories")
    tables = {}
    for run in sorted(runs, key=lambda run: run_settings(run, args).task):  # a task at a time
        own, config = run_settings(run, args), smf.read_config(run)
        rows, before = tables.get((own.task, own.split), {}), None
        if "retrofit" in config:
            base = base_run(run.parent, config)
            rows = {base: (evaluated(base, None, own), None)} | rows  # on top of its table
            if finished(Path(config["retrofit"])):  # not so if the run was copied alone
                before = evaluated(Path(config["retrofit"]), None, own)
        tables[own.task, own.split] = rows | {run: (evaluated(run, None, own), before)}
    for (task, split), rows in tables.items():
        names = [run.name for run in rows]
        results = {run.name if names.count(run.name) == 1 else str(run): row
                   for run, row in rows.items()}
        print(f"\n{task}, {split} split\n\n{table(results)}")


if __name__ == "__main__":
    smf.script(main)
