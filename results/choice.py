"""When does it matter which rows are updated? Recall by scorer, over the share of rows read.

    python results/choice.py --model SMOLLM2_DIR --data DATA_DIR      # after the studies

Takes every study's results.json. A setting's scorers are compared at one perplexity: the least that
all of them reach with one of their rates; and at 3 and 6 % more, if their rates go so far. Between
two rates recall is a straight line over the logarithm of the perplexity. Validation wordings;
streams: seed 0. The rows that a batch reads are counted in memories of today, also for the shuffled
settings, whose recall is of the first version. Writes results/choice.md and choice.png."""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import smf  # noqa: E402
import train_retrofit  # noqa: E402
import train_sparse  # noqa: E402
from study import CHATS, TASK, TOLD  # noqa: E402

SCORERS, BATCHES = ("tfidf", "kl", "count", "random", "all"), 20
TIMES = (1, 1.03, 1.06)  # the least perplexity, and more
STARTS = {"tiny-128": "--n-keys=128", "tiny-512": "", "tiny-128-stage-1": "--n-keys=128 --epochs=1",
          "smollm2-128": CHATS + "128"}
FACTS = TASK + "--task=facts --facts-data={data}/trivia_qa --sources 0 160"
CHOICES = TASK + "--task=medmcqa --medmcqa-data={data}/medmcqa"
SETTINGS = {  # {name: (study, its conditions, start, what is learned)}
    "tiny, stream, n = 512, t = 50": ("tiny-stream", "additive-{}-n512-t50", "tiny-512", ""),
    "tiny, stream, n = 512, t = 500": ("tiny-stream", "additive-{}-n512-t500", "tiny-512", ""),
    "tiny, stream, n = 128, t = 50": ("tiny-stream", "additive-{}-n128-t50", "tiny-128", ""),
    "tiny, shuffled facts, t = 500": ("tiny", "additive-{}", "tiny-128-stage-1", "--task=facts"),
    "SmolLM2, stream, t = 500": ("smollm2-48", "additive-{}-n128-t500", "smollm2-128", TOLD),
    "SmolLM2, shuffled facts, t = 500": ("smollm2-facts", "additive-{}-fresh", "smollm2-128",
                                         FACTS),
    "SmolLM2, shuffled choices, t = 500": ("smollm2-medmcqa", "additive-{}-fresh", "smollm2-128",
                                           CHOICES)}


def share_read(start, flags, args):
    """The share of a memory's rows that a batch reads, the mean over memories and batches."""
    run = Path("out/choice", start)
    fill = dict(model=args.model, data=args.data)
    if not smf.finished(run):
        train_retrofit.main([*STARTS[start].format(**fill).split(), f"--out={run}"])
    model, tokenizer = smf.load(run)
    given = train_sparse.parse(["--split=validation", *flags.format(**fill).split()])
    plan, _ = evaluation.training_plan(model, tokenizer, evaluation.load_data(given), given)
    shares = []
    for batch in plan[::max(1, len(plan) // BATCHES)]:
        batch = smf.collate(batch)
        for name, (_, rows, *_) in smf.read_only(model, batch).items():
            read = rows[batch["attention_mask"].bool()].unique()
            shares.append(len(read) / len(smf.memories(model)[name].values))
    return fmean(shares)


def curve(condition):
    """{"validation": {rate: {seed: figures}}} -> [(perplexity, target)], means over the seeds."""
    rates = [list(seeds.values()) for seeds in condition["validation"].values()]
    return sorted((fmean(row["perplexity"][0] for row in rows), fmean(
        row.get("target", row.get("target_accuracy"))[0] for row in rows)) for rows in rates)


def compare(study, names, times=1):
    """-> the perplexity at which the scorers of a setting are compared, beside the base's, and
    {scorer: target}. times: that much more than the least that all of them reach."""
    results = json.loads((ROOT / "results" / study / "results.json").read_text())
    results = results.get("figures", results)
    curves = {scorer: curve(results[c]) for scorer in SCORERS
              if (c := names.format(scorer)) in results or scorer == "all" and
              (c := names.format(scorer).rpartition("-t5")[0]) in results}
    at = times * max(points[0][0] for points in curves.values())
    found = {scorer: float(np.interp(math.log(at), *zip(*((math.log(x), y) for x, y in points))))
             for scorer, points in curves.items() if points[-1][0] >= at}
    return at / curve(results["base"])[0][0], found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="directory of the data sets")
    args = parser.parse_args(argv)
    from matplotlib import pyplot  # for the figure alone: pip install matplotlib
    rows, (figure, axis) = {}, pyplot.subplots(figsize=(9, 5), layout="tight")
    for name, (study, conditions, start, flags) in SETTINGS.items():
        share = share_read(start, flags, args)
        for times in TIMES:
            ratio, found = compare(study, conditions, times)
            if len(found) > 1:
                rows[f"{name}; {ratio:.3f}"] = {
                    "share of the rows that a batch reads": f"{share:.4f}"} | {
                    scorer: f"{target:.3f}" for scorer, target in found.items()}
        _, found = compare(study, conditions)
        for scorer, target in found.items():
            axis.plot(share, target, "osD^x"[SCORERS.index(scorer)],
                      color=f"C{SCORERS.index(scorer)}", label=scorer)
        axis.annotate(name, (share, min(found.values())), fontsize="x-small", rotation=-25,
                      rotation_mode="anchor", textcoords="offset points", xytext=(2, -8))
    known = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(known.values(), known.keys())
    axis.set(xscale="log", xlabel="share of a memory's rows that a batch reads", ylim=(-0.2, 1.02),
             ylabel="target, at a perplexity that all scorers reach")
    figure.savefig(ROOT / "results/choice.png", dpi=80)
    table = evaluation.table(rows, "setting; perplexity / base")
    (ROOT / "results/choice.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    smf.script(main)
