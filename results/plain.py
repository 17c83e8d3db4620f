"""Measure a pretrained model once more, by plain code that shares none with eval.py.

    python results/plain.py out/smollm2/base out/qwen/base ...     # a quarter of an hour a model

One window and one question at a time, in float32, with transformers alone. Each argument is a
directory base that a study made: its eval.json says what was measured there. Prints both, and
writes them to results/plain.md, anew; an error if a digit that the tables show differs."""

import json
import string
import sys
import unicodedata
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent


def plain(text):
    """Lower case, no punctuation, no articles, single spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    for mark in string.punctuation + "‘’´`":
        text = text.replace(mark, " ")
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def prompt_of(tokenizer, question):
    """The tokens that an answer follows, and what it begins with."""
    if not tokenizer.chat_template:
        return tokenizer(f"Question: {question}\nAnswer:")["input_ids"], " "
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                         add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"], "" if text[-1].isspace() else " "


@torch.no_grad()
def recall(model, tokenizer, questions):
    """-> the share answered, and the mean log-likelihood of the right answers."""
    right, likelihoods, encoded = 0, [], []
    for row in questions:
        prompt, space = prompt_of(tokenizer, row["question"])
        answer = row["answer"]["value"].strip()
        ids = tokenizer(space + answer, add_special_tokens=False)["input_ids"]
        encoded.append((row, answer, prompt, ids))
    room = max(32, 8 + max(len(ids) for *_, ids in encoded))  # for an answer, tokens
    for row, answer, prompt, ids in encoded:
        logits = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        each = [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(ids)]
        likelihoods.append(sum(each) / len(each))
        said, new, cache = [], prompt, None
        for _ in range(room):  # greedy
            found = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            new, cache = [found.logits[0, -1].argmax().item()], found.past_key_values
            if new == [tokenizer.eos_token_id]:
                break
            said += new
        said = f" {plain(tokenizer.decode(said, skip_special_tokens=True))} "
        right += any(plain(alias) and plain(alias) in said
                     for alias in [answer, *row["answer"]["aliases"]])
    return right / len(questions), sum(likelihoods) / len(questions)


@torch.no_grad()
def perplexity(model, tokenizer, text, settings):
    """Windows of --window tokens that move by --stride; each token is scored once."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:settings["eval_tokens"]]
    first = tokenizer("")["input_ids"]
    first = first[:1] if first and first[0] == tokenizer.bos_token_id else []
    room, total, scored = settings["window"] - len(first), 0.0, 0
    begin, done = 0, 0 if first else 1
    while done < len(tokens):
        window = tokens[begin:begin + room]
        logits = model(torch.tensor([first + window])).logits[0].double().log_softmax(-1)
        for at in range(done, begin + len(window)):
            total -= logits[len(first) + at - begin - 1, tokens[at]].item()
            scored += 1
        done, begin = begin + len(window), begin + min(settings["stride"], room)
    return torch.tensor(total / scored).exp().item()


def main():
    lines = ["| base | measure | eval.py | plain loop |", "| --- | --- | --- | --- |"]
    for run in map(Path, sys.argv[1:]):
        config = json.loads((run / "config.json").read_text())
        found = json.loads((run / "eval.json").read_text())
        key = next(key for key in found if json.loads(key)["split"] == "validation")
        settings, theirs = json.loads(key), found[key]
        path = config["base"]
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        stream = ROOT / settings["stream_data"]
        told, asked = (load_dataset("json", data_files=str(stream / f"{part}.jsonl"), split="train")
                       for part in ("train", "validation"))
        taught = list(dict.fromkeys(told["source"]))[:(settings["sources"] or [0, None])[1]]
        asked = {"target": [row for row in asked if row["source"] in taught]}
        asked["knowledge"] = load_dataset(settings["trivia_data"], split="validation")
        text = "\n\n".join(load_dataset(settings["wikitext_data"], split="test")["text"])
        ours = {"perplexity": perplexity(model, tokenizer, text, settings)}
        for name, rows in asked.items():
            rows = [row for row in rows if name == "target" or row["question_id"] not in taught]
            rows = [row for row in rows if not any(
                plain(alias) and plain(alias) in plain(row["question"])
                for alias in [row["answer"]["value"], *row["answer"]["aliases"]])]
            rows = rows[:theirs[name]["n"]] if name == "knowledge" else rows
            ours[name], ours[f"{name} LL"] = recall(model, tokenizer, rows)
        for name, value in ours.items():
            digits = 3 if name in asked else 2
            both = [f"{theirs[name]['value']:.{digits}f}", f"{value:.{digits}f}"]
            lines.append(f"| {run.parent.name} | {name} | {' | '.join(both)} |")
            print(lines[-1], flush=True)
    (ROOT / "results/plain.md").write_text("\n".join(lines) + "\n")
    if any(line.split(" | ")[2] != line.split(" | ")[3].rstrip(" |") for line in lines[2:]):
        sys.exit("plain.py: the figures differ")


if __name__ == "__main__":
    main()
