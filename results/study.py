"""Run a study: every method at every rate, the rate chosen on validation, tables and figures.

    python results/study.py tiny                # or tiny-medmcqa; about an hour on two cores
    python results/study.py smollm2-facts --model SMOLLM2_DIR --data DATA_DIR
                                                # or smollm2-medmcqa, smollm2-stage-1: a day

Runs go to out/STUDY. What is finished there is skipped, so the same command goes on with a study
that was cut short. Written to results/STUDY (or --to): tables.md (test split, at the chosen rates),
runs.md (every run, validation split), headline.png, frontier.png, stage-1.png and results.json.
DATA_DIR has the directories trivia_qa, wikitext, oasst1 and medmcqa. The figures need matplotlib.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev

import torch
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import smf  # noqa: E402

SEEDS = (0, 1, 2)
CHATS = ("--preset paper --dtype bfloat16 --model {model} --oasst-data {data}/oasst1 --max-length "
         "256 --batch-size 8 --micro-batch-size 8 --examples 50000 --warmup 10 --background 300 ")
TASK = ("--preset paper --max-length 256 --micro-batch-size 16 --warmup 10 --trivia-data "
        "{data}/trivia_qa --wikitext-data {data}/wikitext --eval-tokens 32768 --stride 896 ")
FACTS = TASK + ("--task facts --facts-data {data}/trivia_qa --num-facts 160 --steps 150 "
                "--eval-examples 300")
MEDMCQA = TASK + "--task medmcqa --medmcqa-data {data}/medmcqa --steps 60 --eval-examples 500"
BASE = "--dtype bfloat16 --model {model}"
TINY_STARTS = {"additive-fresh": "--steps 0", "additive-retrofit": "",
               "replacement-retrofit": "--mode replacement"}
SMOLLM2_STARTS = {"additive-fresh": CHATS + "--steps 0", "additive-retrofit": CHATS + "--steps 70",
                  "replacement-retrofit": CHATS + "--steps 70 --mode replacement --lr 2e-3"}
STAGE_1 = {"untrained": "--steps 280 --lr 1e-9 --alpha-lr 1e-9", "280-steps": "--steps 280",
           "lr2e-3": "--steps 70 --lr 2e-3", "alpha0.01": "--steps 70 --alpha 0.01",
           "lr2e-3-alpha0.01": "--steps 70 --lr 2e-3 --alpha 0.01",
           "not-normalised": "--steps 70 --lr 2e-3 --query-momentum 0"}
# starts: {name: flags of train_retrofit.py}. flags: of all that learn the task. base: of baselines
# alone. sweep: the seeds that choose the rate. rates: {rates: conditions}, see command().
STUDIES = {
    "tiny": dict(starts=TINY_STARTS, flags="", sweep=SEEDS, rates={
        "0.03 0.1 0.2 0.3 0.5": "additive-tfidf additive-kl additive-count additive-random "
                                "additive-all additive-tfidf+s additive-kl+s additive-tfidf-t2000 "
                                "additive-tfidf-fresh",
        "0.3 1 2 4 8": "additive-tfidf-t50 additive-tfidf-t100",
        "300 1000 3000 6000 10000": "additive-tfidf-sgd additive-all-sgd",
        "0.01 0.03 0.1 0.2 0.3": "replacement-tfidf replacement-kl",
        "1e-4 2e-4 3e-4 1e-3 3e-3": "lora", "3e-5 1e-4 2e-4 3e-4 1e-3": "full"}),
    "tiny-medmcqa": dict(starts={"additive-retrofit": ""}, flags="--task medmcqa", sweep=SEEDS, rates={
        "0.5": "additive-tfidf additive-kl", "1e-3": "lora", "2e-4": "full"}),
    "smollm2-facts": dict(starts=SMOLLM2_STARTS, flags=FACTS, base=BASE, sweep=(0,), rates={
        "4 8": "additive-tfidf additive-kl additive-count additive-random additive-tfidf+s "
               "additive-tfidf-fresh additive-kl-fresh additive-count-fresh additive-random-fresh "
               "additive-tfidf+s-fresh",
        "0.25 0.5": "additive-all additive-all-fresh",
        "16 32": "additive-tfidf-t100 additive-tfidf-fresh-t100",
        "1 2": "additive-tfidf-t2000 additive-tfidf-fresh-t2000 replacement-tfidf",
        "3e6 6e6": "additive-tfidf-sgd additive-tfidf-fresh-sgd",
        "4e-4 8e-4": "lora", "2e-5 4e-5": "full"}),
    "smollm2-medmcqa": dict(starts=SMOLLM2_STARTS, flags=MEDMCQA, base=BASE, sweep=(0,), rates={
        "4 8": "additive-tfidf additive-tfidf-fresh additive-kl-fresh additive-count-fresh "
               "additive-random-fresh additive-tfidf+s-fresh",
        "0.25 0.5": "additive-all-fresh", "16 32": "additive-tfidf-fresh-t100",
        "1 2": "additive-tfidf-fresh-t2000 replacement-tfidf",
        "3e6 6e6": "additive-tfidf-fresh-sgd", "4e-4 8e-4": "lora", "4e-5 8e-5": "full"}),
    "smollm2-stage-1": dict(
        starts={name: CHATS + flags for name, flags in STAGE_1.items()}, flags=FACTS, base=BASE, sweep=(0,),
        rates={"1 2 4 8": "after-280-steps", "0.5 1 2 4 8": "after-lr2e-3", "4e-5": "full",
               "8": "after-alpha0.01 after-lr2e-3-alpha0.01 after-not-normalised"}),
}
HEADLINE = "SMF against LoRA and full finetuning"
TABLES = {  # title: conditions, of which those that a study has are shown
    HEADLINE: "additive-tfidf additive-all additive-tfidf-fresh additive-random-fresh "
              "additive-all-fresh lora full",
    "Methods, as in Table 1 of [Gupta26]":
        "replacement-kl replacement-tfidf additive-kl additive-tfidf additive-kl+s "
        "additive-tfidf+s additive-kl-fresh additive-tfidf-fresh additive-tfidf+s-fresh lora full",
    "Which rows": "additive-tfidf additive-kl additive-count additive-random additive-all "
                  "additive-tfidf-fresh additive-kl-fresh additive-count-fresh "
                  "additive-random-fresh additive-all-fresh",
    "How many rows": "additive-tfidf-t50 additive-tfidf-t100 additive-tfidf additive-tfidf-t2000 "
                     "additive-all additive-tfidf-fresh-t100 additive-tfidf-fresh "
                     "additive-tfidf-fresh-t2000 additive-all-fresh",
    "Variants": "additive-fresh additive-retrofit replacement-retrofit additive-tfidf "
                "additive-tfidf-fresh additive-tfidf-sgd additive-all-sgd additive-tfidf-fresh-sgd",
    "Stage 1": " ".join(f"after-{name}" for name in STAGE_1),
}


# Running


def command(condition):
    """additive-tfidf+s-fresh-t100-sgd -> the script and flags that make it, but rate and task."""
    if condition in ("lora", "full"):
        return f"baselines.py --method {condition} BASE"
    if condition.startswith("after-"):
        return f"train_sparse.py --parent OUT/{condition[6:]}-seedSEED"
    mode, scorer, *rest = condition.split("-")
    flags = [f"--parent OUT/{mode}-{'fresh' if 'fresh' in rest else 'retrofit'}-seedSEED --scorer",
             scorer.removesuffix("+s"), "--train-alpha" * scorer.endswith("+s")]
    flags += [f"--top-t {part[1:]}" for part in rest if part[0] == "t"]
    return " ".join(["train_sparse.py", *flags, "--optimizer sgd" * ("sgd" in rest)])


def run_all(commands, jobs):
    """Run {run directory: command line} that are not there yet, `jobs` at a time, a core each."""
    def go(command):
        done = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True,
                              text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise smf.BadInput(f"{command}: {done.stderr.strip().splitlines()[-1]}")

    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(go, commands), total=len(commands), desc="runs", leave=False))


def figures(run, split):
    """{measure: (value, standard error)} of a run, or None if it is not there yet."""
    def measured(run):
        file = run / "eval.json"
        found = json.loads(file.read_text()) if file.exists() and smf.finished(run) else {}
        return next((found[key] for key in found if json.loads(key)["split"] == split), None)

    result = measured(run)
    if result:
        right = zip(result["knowledge right"], measured(evaluation.parent_of(run))["knowledge right"])
        result["kept"] = evaluation.mean([now for now, then in right if then])
    return result and {name: (result[name]["value"], result[name]["stderr"])
                       for name in evaluation.DIGITS if name in result}


def average(rows):
    """[{measure: (value, ...)}] of the seeds -> {measure: (mean, standard deviation)}."""
    values = {name: [row[name][0] for row in rows] for name in rows[0]}
    return {name: (fmean(v), stdev(v)) if len(v) > 1 else (v[0],) for name, v in values.items()}


def choose(swept):
    """{rate: [figures of each seed]}, validation split -> the least rate whose mean target is
    within one standard error of the best (over seeds; of one seed, over its questions)."""
    def target(rate):
        values = [row["target"][0] for row in swept[rate]]
        error = stdev(values) / len(values)**0.5 if len(values) > 1 else swept[rate][0]["target"][1]
        return fmean(values), error

    best, error = max(map(target, swept))
    return min((rate for rate in swept if target(rate)[0] >= best - error), key=float)


def study(name, fill, jobs):
    """Make the runs -> {condition: {"validation": {rate: {seed: figures}}, "chosen": rate,
    "test": {seed: figures}}} and {condition: run of seed 0 at that rate}."""
    plan, out = STUDIES[name], Path("out", name)
    run_all([fill(f"{ROOT}/train_retrofit.py {flags} --seed {seed} --out {out}/{start}-seed{seed}")
             for start, flags in plan["starts"].items() for seed in SEEDS
             if not smf.finished(out / f"{start}-seed{seed}")], jobs)

    def measured(split, wanted):  # [(condition, rate, seed)] -> {condition: {rate: {seed: figures}}}
        paths = {key: out / "{}-lr{}-seed{}".format(*key) for key in wanted}
        run_all([fill(f"{ROOT}/{command(c)} {plan['flags']} --lr {rate} --seed {seed} --split "
                      f"{split} --out {path}".replace("OUT", str(out)).replace("SEED", str(seed))
                      .replace("BASE", plan.get("base", "")))
                 for (c, rate, seed), path in paths.items() if not figures(path, split)], jobs)
        found = {}
        for (c, rate, seed), path in paths.items():
            found.setdefault(c, {}).setdefault(rate, {})[seed] = figures(path, split)
        return found

    swept = measured("validation", [(c, rate, seed) for rates, names in plan["rates"].items()
                                    for c in names.split() for rate in rates.split()
                                    for seed in plan["sweep"]])
    chosen = {c: choose({rate: list(rows.values()) for rate, rows in swept[c].items()})
              for c in swept}
    tested = measured("test", [(c, rate, seed) for c, rate in chosen.items() for seed in SEEDS])
    result = {c: {"validation": swept[c], "chosen": rate, "test": tested[c][rate]}
              for c, rate in chosen.items()}
    for start in ["base", *plan["starts"]]:  # they have no rate to choose
        own = [out / "base"] if start == "base" else [out / f"{start}-seed{s}" for s in SEEDS]
        rows = {split: {s: row for s, run in enumerate(own) if (row := figures(run, split))}
                for split in ("validation", "test")}
        if all(rows.values()):
            result[start] = {"validation": {None: rows["validation"]}, "chosen": None,
                             "test": rows["test"]}
    return result, {c: out / f"{c}-lr{rate}-seed0" for c, rate in chosen.items()}


# Showing


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def accounting(run):
    """A row of [Gupta26 Table 3], the rows touched and the size of what the run itself stores."""
    (model, _), config, base = smf.load(run), smf.read_config(run), run
    delta = load_file(run / "delta.safetensors")
    while evaluation.parent_of(base) != base:
        base = evaluation.parent_of(base)
    size, before = (sum(p.numel() for p in part.parameters()) for part in (model, smf.load(base)[0]))
    stored = updated = sum(tensor.numel() for tensor in delta.values())
    if "scorer" in config:
        added = smf.memory_state(model)
        stored = sum(p.numel() for name, p in model.named_parameters() if name in added)
        rows = fmean(sum(line["rows"]) for line in metrics(run))
        updated = round(rows * model.get_input_embeddings().embedding_dim)
        updated += config["train_alpha"] * len(smf.memories(model))
    touched = sum(len(tensor) for name, tensor in delta.items() if name.endswith(":rows"))
    return {"parameters stored": f"{stored:,}", "net change at inference": f"{size - before:,}",
            "updated per step": f"{updated:,}", "rows touched": f"{touched:,}" if touched else "",
            "file, MB": f"{(run / 'delta.safetensors').stat().st_size / 1e6:.2f}"}


def text(row):
    """{measure: (value, ±)} -> {measure: text}"""
    return {name: " ± ".join(f"{part:.{evaluation.DIGITS[name]}f}" for part in row[name])
            for name in evaluation.DIGITS if name in row}


def plot(pyplot, result, titles, path):
    """Target gain against perplexity and knowledge, on the validation split at every rate, means
    over seeds; the chosen rate ringed, the base a line."""
    base = average([*result["base"]["validation"][None].values()])
    figure, axes = pyplot.subplots(len(titles), 2, figsize=(11, 4 * len(titles)), squeeze=False)
    for title, pair in zip(titles, axes):
        names = [c for c in TABLES[title].split() if c in result]
        for axis, probe in zip(pair, ("perplexity", "knowledge")):
            for c, marker in zip(names, cycle("osD^v<>P*X")):
                swept = result[c]["validation"]
                points = [average([*rows.values()]) for rows in swept.values()]
                x = [point["target"][0] - base["target"][0] for point in points]
                y, at = [point[probe][0] for point in points], [*swept].index(result[c]["chosen"])
                colour = axis.plot(x, y, marker=marker, label=c)[0].get_color()
                axis.plot(x[at], y[at], marker, ms=14, mfc="none", color=colour)
            axis.axhline(base[probe][0], color="black", lw=0.8, label="base")
            axis.set(title=title, xlabel="target gain, validation", ylabel=probe)
        pair[0].set(yscale="log", ylim=(None, min(pair[0].get_ylim()[1], 6 * base["perplexity"][0])))
        pair[0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def plot_stage_1(pyplot, runs, path):
    """Stage 1 against its steps: the loss, less that of the first run on the same batch, a running
    mean of ten; and what each batch reads of each memory: usage, and KL from uniform."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    first = torch.tensor([line["loss"] for line in metrics(runs[0])])  # (steps,)
    for i, run in enumerate(runs):
        for axis, measure in zip(axes, ("loss", "usage", "KL")):
            y = torch.tensor([line[measure] for line in metrics(run)])  # (steps,) or (steps, memories)
            if measure == "loss":
                y = (y[:len(first)] - first[:len(y)]).unfold(0, 10, 1).mean(-1)  # (steps - 9,)
            axis.plot(y, color=f"C{i}", label=run.name)
            axis.set(xlabel="step", title=measure)
    axes[0].set_title(f"loss, less that of {runs[0].name}")
    axes[0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--model", help="smollm2: directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="smollm2: directory of the data sets")
    parser.add_argument("--to", type=Path, help="directory of the tables (results/STUDY)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    args = parser.parse_args(argv)
    if args.study.startswith("smollm2") and not (args.model and args.data):
        raise smf.BadInput(f"{args.study}: give --model and --data")
    try:
        from matplotlib import pyplot
    except ImportError:
        raise smf.BadInput("the figures need matplotlib: pip install matplotlib") from None
    pyplot.switch_backend("Agg")  # needs no screen
    to = args.to or ROOT / "results" / args.study
    result, chosen = study(args.study, lambda line: line.format(model=args.model, data=args.data),
                           args.jobs)
    label = {c: f"{c}, lr {d['chosen']}" if d["chosen"] else c for c, d in result.items()}
    parts = {title: evaluation.table({label[c]: text(average([*result[c]["test"].values()]))
                                      for c in ["base", *names.split()] if c in result})
             for title, names in TABLES.items() if any(c in result for c in names.split())}
    parts["What it costs, as in Table 3 of [Gupta26]"] = evaluation.table(
        {c: accounting(run) for c, run in chosen.items()})
    every = {f"{c}, lr {rate}, seed {seed}": text(row) for c, d in result.items()
             for rate, rows in d["validation"].items() for seed, row in rows.items()}
    to.mkdir(parents=True, exist_ok=True)
    (to / "tables.md").write_text("\n".join(f"{title}\n\n{part}\n" for title, part in parts.items()))
    (to / "runs.md").write_text(evaluation.table(every) + "\n")
    smf.write_json(to / "results.json", result)
    plot(pyplot, result, [next(iter(parts))], to / "headline.png")
    plot(pyplot, result, [title for title in parts if title in TABLES], to / "frontier.png")
    starts = [Path("out", args.study, f"{start}-seed0") for start in STUDIES[args.study]["starts"]]
    plot_stage_1(pyplot, [run for run in starts if (run / "metrics.jsonl").exists()], to / "stage-1.png")
    print((to / "tables.md").read_text())


if __name__ == "__main__":
    smf.script(main)
