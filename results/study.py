"""Run a study: every method at every rate, the rate chosen on validation, tables and figures.

    python results/study.py tiny-stream         # an hour and a half on two cores
    python results/study.py tiny                # or tiny-medmcqa: shuffled facts, and choices
    python results/study.py qwen --model QWEN_DIR --data DATA_DIR         # the stream: 24 facts
                        # or gemma3, smollm2-48 (48), qwen-facts (shuffled): hours each
    python results/study.py smollm2 --model SMOLLM2_DIR --data DATA_DIR   # 175: a day

Runs go to out/STUDY. Those that are there are skipped: the same command goes on with a study.
results/STUDY gets tables.md (test split, chosen rates), frontier.png and headline.png (validation,
every rate), along.png (a stream), results.json. DATA_DIR: trivia_qa, wikitext, oasst1, medmcqa."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import smf  # noqa: E402

SEEDS = (0, 1, 2)
CHATS = ("--preset paper --dtype float32 --model {model} --oasst-data {data}/oasst1 --max-length "
         "256 --batch-size 8 --micro-batch-size 8 --examples 50000 --warmup 10 --background 300 "
         "--epochs 0 --n-keys ")
TASK = ("--preset paper --max-length 256 --micro-batch-size 16 --warmup 10 --trivia-data "
        "{data}/trivia_qa --wikitext-data {data}/wikitext --stride 896 --eval-examples 175 "
        "--eval-tokens 8192 --save-every 100 --oasst-data {data}/oasst1 ")
BASE = "--dtype float32 --model {model}"
ADAMW = "--optimizer adamw"
STREAM_OF_FACTS = "results/streams/facts"
TOLD = TASK + f"--task stream --stream-data {STREAM_OF_FACTS} --batch-size 5 --passes 4 "
# What the words of a condition's name mean; t50 is --top-t 50. The others name its start.
FLAGS = {"+s": "--train-alpha", "harm": "--least-harm", "sgd": "--optimizer sgd",
         "adamw": "--optimizer adamw", "replay8": "--replay 8",
         "documents": "--stream-data tiny/documents"}
SCORERS = ("tfidf", "kl", "gradient", "count", "random")
FLAGS |= {word: f"--scorer {word}" for word in (*SCORERS, "all")}
STREAM = {  # {rates: conditions}
    "0.03 0.1 0.3": "full-sgd full-sgd-replay8 lora-sgd additive-all-n128 additive-all-n512 " + (
        " ").join(f"additive-{name}-t500" for name in [f"{scorer}-n512" for scorer in SCORERS] + [
            f"tfidf-{start}" for start in "n128 n1024 n512-retrofit n512-told n512-asked".split()]
    ) + "".join(f" additive-{name}-t50" for name in [
        f"{scorer}-{n}" for scorer in SCORERS[:4] for n in ("n128", "n512")]
        + ["tfidf-n1024", "tfidf-n512-told", "tfidf-n512-asked"]) + (
        " additive-tfidf-n512-t50-harm additive-tfidf-n128-t50-harm additive-tfidf-n512-t500-harm "
        "additive-all-n512-harm additive-all-n128-harm"),
    "0.3 1 3": "replacement-tfidf-t500 additive-random-n128-t50 additive-random-n512-t50",
    "0.1 0.3 1": "lora-sgd-replay8 additive-tfidf-n512-t500-documents "
                 "additive-tfidf-n512-t10000-documents",
    "0.006 0.02 0.06": "additive-tfidf-n512-t500-adamw",
    "1e-4 3e-4 1e-3": "full full-documents lora",
    "3e-4 1e-3 3e-3": "full-replay8 lora-replay8 lora-documents"}
# starts: {name: flags of train_retrofit.py}. flags: of all that learn the task; base: of baselines
# alone; sparse: of train_sparse.py alone. sweep: the seeds that choose the rate. words: what a word
# means in this study. thrice: what is done with all seeds (all); full finetuning of a stream has
# nothing random. headline: of its figure (HEADLINE). along: the headline is asked after each so
# many sources of a stream, too.
REAL = dict(flags=TOLD, base=BASE, sparse="", sweep=(0,), thrice=(), starts={
    "additive-n128": CHATS + "128"}, words={
    "replay1": "--replay 1 --max-length 80"}, headline=(  # longer chats outweigh the facts
    "additive-tfidf-n128-t500", "additive-tfidf-n128-t500-harm", "lora", "full", "full-replay1"))
OTHER = REAL | dict(flags=TOLD + "--sources 0 24 --eval-examples 48 --eval-tokens 4096", rates={
    "0.3 1 3": "additive-tfidf-n128-t500", "0.3 1": "additive-tfidf-n128-t500-harm",
    "3e-5 1e-4 3e-4": "lora", "1e-5 2e-5": "full full-replay1"})
STUDIES = {
    "tiny-stream": dict(flags="--eval-examples 250", base="", sparse="", sweep=(0,), starts={
        "additive-n128": "--n-keys 128", "additive-n512": "", "additive-n1024": "--n-keys 1024",
        "additive-n512-retrofit": "--epochs 1", "replacement": "--mode replacement --epochs 2 "
        "--lr 2e-3 --examples 1600", "additive-n512-told": "--background-data tiny/stream",
        "additive-n512-asked": "--background-data out/tiny-stream/asked.jsonl"},
        rates=STREAM, along=10),
    "smollm2": REAL | dict(
        along=35, thrice="additive-n128 additive-tfidf-n128-t500 additive-tfidf-n128-t500-harm "
        "lora lora-replay1".split(), headline=REAL["headline"] + ("lora-replay1",), rates={
            "0.1 0.3 1": "additive-tfidf-n128-t500 additive-tfidf-n128-t500-harm",
            "0.3 1 3": "additive-tfidf-n128-t500-replay1", "0.03 0.1 0.3": "additive-all-n128-harm",
            "1e-4 3e-4 1e-3": "lora lora-replay1", "1e-5 2e-5 5e-5 1e-4": "full",
            "2e-5 5e-5 1e-4": "full-replay1"}),
    "smollm2-48": REAL | dict(flags=TOLD + "--sources 0 48 --eval-examples 96", rates={
        "0.1 0.3": " ".join(f"additive-{name}-n128-t500" for name in ("tfidf", "kl", "count")),
        "0.3 1": "additive-random-n128-t500", "2e-5 5e-5": "full-replay1"}),
    "gemma3": OTHER, "qwen": OTHER,
    "qwen-facts": OTHER | dict(flags=TASK + "--task facts --facts-data {data}/trivia_qa "
                               "--sources 0 160 --steps 150", rates={
        "0.3 1": "additive-tfidf-n128-t500 additive-tfidf-n128-t500-harm",
        "1e-4 3e-4": "lora", "1e-5 3e-5": "full"}),
    "tiny": dict(flags="--task facts", base="", sparse=ADAMW, sweep=SEEDS, starts={
        "additive-fresh": "--n-keys 128", "additive-retrofit": "--n-keys 128 --epochs 1",
        "replacement-retrofit":
            "--n-keys 128 --mode replacement --examples 1600 --epochs 2 --lr 2e-3"}, rates={
        "0.003 0.01 0.02 0.03 0.05": "additive-tfidf additive-kl additive-count additive-random "
                                "additive-all additive-tfidf+s additive-kl+s additive-tfidf-t2000 "
                                "additive-tfidf-fresh",
        "0.02 0.08 0.2 0.3 0.6": "additive-tfidf-t50 additive-tfidf-t100",
        "0.03 0.1 0.3 0.6 1": "additive-tfidf-sgd additive-all-sgd",
        "0.003 0.01 0.03 0.1 0.3": "replacement-tfidf replacement-kl",
        "1e-4 2e-4 3e-4 1e-3 3e-3": "lora", "3e-5 1e-4 2e-4 3e-4 1e-3": "full"}),
    "tiny-medmcqa": dict(
        flags="--task medmcqa", base="", sparse=ADAMW, sweep=SEEDS,
        starts={"additive-retrofit": "--n-keys 128 --epochs 1"},
        rates={"0.04": "additive-tfidf additive-kl", "1e-3": "lora", "2e-4": "full"}),
}
HEADLINE = ("additive-tfidf", "additive-all", "additive-tfidf-fresh", "additive-random-fresh",
            "additive-all-fresh", "lora", "full", "additive-tfidf-n512-t50", "lora-replay8",
            "full-replay8")  # headline.png; frontier.png has the others, too


def command(condition, out, seed, plan):
    """additive-tfidf+s-fresh-t100-sgd -> the script and flags that make it, but for the rate. It
    starts from the start that it names with the most words; else from MODE-retrofit."""
    words, known = condition.replace("+", "-+").split("-"), FLAGS | plan.get("words", {})
    flags = [known[word] if word in known else f"--top-t {word[1:]}" for word in words
             if word in known or re.fullmatch(r"t\d+", word)]
    if words[0] in ("lora", "full"):
        return " ".join([f"baselines.py --method {words[0]}", plan["flags"], plan["base"], *flags])
    start = max((start for start in plan["starts"] if set(start.split("-")) <= set(words)),
                key=len, default=f"{words[0]}-retrofit")
    return " ".join([f"train_sparse.py --parent {out}/{start}-seed{seed}", plan["flags"],
                     plan["sparse"], *flags])


def run_all(commands, args):
    """Run command lines, --jobs at a time, a core each."""
    def go(command):
        script, *flags = shlex.split(command.format(model=args.model, data=args.data))
        done = subprocess.run([sys.executable, ROOT / script, *flags], capture_output=True,
                              text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise smf.BadInput(f"{command}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(go, commands), total=len(commands), desc="runs", leave=False))


def figures(run, split):
    """{measure: (value, standard error)} of a run, or None if it is not there yet. Of a base or a
    start, which many tasks are compared with: as for the first of them."""
    def measured(run):
        file = run / "eval.json"
        return json.loads(file.read_text()) if file.exists() and smf.finished(run) else {}

    found = measured(run)
    key = next((key for key in found if json.loads(key)["split"] == split), None)
    result = found.get(key)
    if result:  # its parent was measured in the same way, and perhaps in others
        before = measured(evaluation.parent_of(run))[key]["knowledge right"]
        if any(before):
            result["kept"] = evaluation.mean(
                [now for now, then in zip(result["knowledge right"], before) if then])
    return result and {name: (result[name]["value"], result[name]["stderr"])
                       for name in evaluation.DIGITS if name in result}


def choose(swept):
    """{rate: {seed: figures}} -> the least rate whose mean target is within one standard error of
    the best (over seeds; of one seed, over its questions)."""
    mean = {rate: fmean(row["target"][0] for row in swept[rate].values()) for rate in swept}
    best = max(mean, key=mean.get)
    values = [row["target"][0] for row in swept[best].values()]
    error = stdev(values) / len(values)**0.5 if len(values) > 1 else swept[best][0]["target"][1]
    return min((rate for rate in mean if mean[rate] >= mean[best] - error), key=float)


def study(plan, out, args):
    """Make the runs -> {condition: {"validation": {rate: {seed: figures}}, "chosen": rate, "test":
    {seed: figures}}}. The rate of the base and the starts is ""."""
    rates = {c: rates.split() for rates, names in plan["rates"].items() for c in names.split()}

    def seeds(c):
        return SEEDS if c in plan.get("thrice", [c]) else SEEDS[:1]

    def path(c, rate, seed):
        return out / (c if c == "base" else f"{c}{f'-lr{rate}' if rate else ''}-seed{seed}")

    def rows(c, rate, seeds, split):
        return {seed: row for seed in (seeds if c != "base" else (0,))
                if (row := figures(path(c, rate, seed), split))}

    def make(wanted, split):  # [(condition, rate, seed)]
        commands = [f"{command(c, out, seed, plan)} --lr {rate} "
                    f"--seed {seed} --split {split} --out {path(c, rate, seed)}"
                    for c, rate, seed in wanted if not rows(c, rate, [seed], split)]
        alone = not rows("base", "", [0], split)  # the first run: it measures the base
        run_all(commands[:alone], args)
        run_all(commands[alone:], args)

    if not args.so_far:
        run_all([f"train_retrofit.py {flags} --seed {seed} --out {path(c, '', seed)}"
                 for c, flags in plan["starts"].items() for seed in seeds(c)
                 if not smf.finished(path(c, "", seed))], args)
        make([(c, rate, s) for c in rates for rate in rates[c] for s in plan["sweep"]],
             "validation")
    swept = {c: {rate: found for rate in rates.get(c, [""])
                 if (found := rows(c, rate, plan["sweep"], "validation"))}
             for c in ["base", *plan["starts"], *rates]}
    chosen = {c: choose(swept[c]) if c in rates else "" for c in swept if swept[c]}
    if not args.so_far:
        make([(c, chosen[c], seed) for c in rates for seed in seeds(c)], "test")
    return {c: {"validation": swept[c], "chosen": rate, "test": rows(c, rate, SEEDS, "test")}
            for c, rate in chosen.items()}


def accounting(run):
    """What a run touched and stores, as in [Gupta26 Table 3]."""
    delta, size = load_file(run / "delta.safetensors"), (run / "delta.safetensors").stat().st_size
    touched = sum(len(tensor) for name, tensor in delta.items() if name.endswith(":rows"))
    return {"rows touched": f"{touched:,}" * bool(touched), "file, MB": f"{size / 1e6:.2f}",
            "numbers stored": f"{sum(tensor.numel() for tensor in delta.values()):,}"}


def cells(rows):
    """{seed: figures} -> {measure: "mean ± standard deviation"}; of one seed: ± standard error"""
    found = {}
    for name, digits in evaluation.DIGITS.items():
        if values := [row[name] for row in rows.values() if name in row]:
            means = [value for value, _ in values]
            spread = stdev(means) if len(means) > 1 else values[0][1]
            found[name] = f"{fmean(means):.{digits}f} ± {spread:.{digits}f}"
    return found


def plot(pyplot, result, panels, path):
    """Target against perplexity and knowledge, on the validation split at every rate, means over
    seeds; the chosen rate ringed, the base a line. panels: lists of conditions, a row each."""
    figure = pyplot.figure(figsize=(13, 5 * len(panels)), layout="tight")
    for names, pair in zip(panels, figure.subplots(len(panels), 2, squeeze=False)):
        for axis, probe in zip(pair, ("perplexity", "knowledge")):
            for c, style in zip(names, product(("-", "--"), "osD^v<>P*X")):
                swept, at = result[c]["validation"], result[c]["chosen"]
                x, y = ({rate: fmean(row[name][0] for row in swept[rate].values())
                         for rate in swept} for name in ("target", probe))
                line, = axis.plot(x.values(), y.values(), "".join(style), label=c)
                axis.plot(x[at], y[at], style[1], ms=14, mfc="none", color=line.get_color())
            base = result["base"]["validation"][""][0][probe][0]
            axis.axhline(base, color="black", lw=0.8, label="base")
            axis.set(xlabel="target, validation split", ylabel=probe)
            if probe == "perplexity":
                axis.set(yscale="log", ylim=(None, min(axis.get_ylim()[1], 6 * base)))  # cut off
        pair[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=80)


def plot_along(pyplot, result, plan, out, to, args):
    """Along a stream: what is recalled of all that was told so far, and what is left of the old.
    In the wordings of validation, with the chosen rate."""
    every, runs = plan["along"], {c: out / f"along-{c}-lr{result[c]['chosen']}"
                                  for c in plan.get("headline", HEADLINE)
                                  if c in result and result[c]["chosen"]}
    run_all([f"{command(c, out, 0, plan)} --lr {result[c]['chosen']} --ask-every {every} "
             f"--split validation --out {run}" for c, run in runs.items()
             if not smf.finished(run)], args)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="tight")
    for axis, name, measure, title in zip(axes, ("recall", "old"), ("target", "knowledge"), (
            "recall of the facts told so far, in wordings never seen", "old questions answered")):
        for c, run in runs.items():
            lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            shares = [line[name] for line in lines if name in line]
            shares.append(result[c]["validation"][result[c]["chosen"]][0][measure][0])  # the end
            first = name == "recall"  # nothing is told at 0
            axis.plot([every * (i + first) for i in range(len(shares))], shares, label=c)
        axis.set(xlabel="facts told so far", ylim=(0, 1.02), title=title)
    axes[1].legend(fontsize="small")
    figure.savefig(to / "along.png", dpi=80)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--model", help="not of tiny: directory of the pretrained model")
    parser.add_argument("--data", help="not of tiny: directory of the data sets")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--so-far", action="store_true", help="make no run: results.json and the "
                        "table of the validation split, of the runs that are there")
    args = parser.parse_args(argv)
    plan, out, to = STUDIES[args.study], Path("out", args.study), Path("results", args.study)
    if plan["base"] and not (args.model and args.data):
        raise smf.BadInput(f"{args.study}: give --model and --data")
    from matplotlib import pyplot  # for the figures alone: pip install matplotlib
    if args.study == "tiny-stream":  # a background of the questions that probe the old knowledge
        asked = evaluation.load_questions("--trivia-data", "tiny/trivia_qa", "validation")
        out.mkdir(parents=True, exist_ok=True)
        (out / "asked.jsonl").write_text("".join(
            json.dumps({"prompt": q.prompt, "text": q.answer}) + "\n" for _, q in asked))
    result = study(plan, out, args)
    to.mkdir(parents=True, exist_ok=True)
    smf.write_json(to / "results.json", result)
    tables = ["The validation split, every rate", evaluation.table({
        f"{c}, lr {rate}" if rate else c: cells(rows)
        for c, d in result.items() for rate, rows in d["validation"].items()})]
    learned = {c: d["chosen"] for c, d in result.items() if d["chosen"]}
    if not args.so_far:
        tables = [evaluation.table({
            f"{c}, lr {d['chosen']} of {', '.join(d['validation'])}" if d["chosen"] else c:
            cells(d["test"]) for c, d in result.items()}),
            "What it costs, as in Table 3 of [Gupta26]", evaluation.table(
            {c: accounting(out / f"{c}-lr{rate}-seed0") for c, rate in learned.items()}), *tables]
    (to / "tables.md").write_text("\n\n".join(tables) + "\n")
    print(*tables, sep="\n\n")
    if args.so_far:
        return
    if "along" in plan:
        plot_along(pyplot, result, plan, out, to, args)
    headline = plan.get("headline", HEADLINE)
    panels = [[c for c in headline if c in learned]]
    plot(pyplot, result, panels, to / "headline.png")
    others = [c for c in learned if c not in headline]
    panels += [others[i:i + 12] for i in range(0, len(others), 12)]
    plot(pyplot, result, panels, to / "frontier.png")


if __name__ == "__main__":
    smf.script(main)
