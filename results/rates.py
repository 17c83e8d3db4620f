"""Does one learning rate serve all models? 32 facts in shuffled batches, 60 steps.

    python results/rates.py                                 # tiny alone, minutes on two cores
    python results/rates.py MODEL_DIR ... --data DATA_DIR   # and others, up to an hour each

Runs go to out/rates; those that are there are skipped. Writes rates.md: of each model "recall,
perplexity" at each rate; and of all 160 facts of tiny, in more steps."""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import smf  # noqa: E402
from study import run_all  # noqa: E402

START = ("--preset paper --oasst-data {{data}}/oasst1 --dtype bfloat16 --max-length 256 "
         "--background 300 --examples 560 --batch-size 8 --micro-batch-size 8 --model {}")
FACTS = ("--task facts --sources 0 32 --steps 60 --preset paper --facts-data {data}/trivia_qa "
         "--trivia-data {data}/trivia_qa --wikitext-data {data}/wikitext --warmup 10 --max-length "
         "128 --micro-batch-size 16 --eval-examples 64 --eval-tokens 8192")
RATES = {"fresh": ("sgd .3", "sgd 1", "sgd 3", "adamw .1"), "stage 1": ("sgd 1",)}
LONGER = ("sgd .3", "sgd 1", "adamw .01", "adamw .03", "adamw .1")


def cell(run):
    """"recall, perplexity" of a run, as it was measured here."""
    result, = smf.read_json(run / "eval.json").values()
    return ", ".join(f"{result[name]['value']:.{evaluation.DIGITS[name]}f}"
                     for name in ("target", "perplexity"))


def learn(start, flags, rates, args):
    """Make the runs of a start at these rates -> {rate: cell}, that of the start first."""
    runs = {rate: start.with_name(f"{start.name}, {rate}") for rate in rates}
    commands = [f"train_sparse.py --parent '{start}' {flags} --out '{run}' --optimizer " +
                rate.replace(" ", " --lr ") for rate, run in runs.items()
                if not (run / "eval.json").exists()]
    run_all(commands[:1], args)  # alone: it measures the start and the base, too
    run_all(commands[1:], args)
    return {"before": cell(start)} | {rate: cell(run) for rate, run in runs.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="directories of pretrained models")
    parser.add_argument("--data", help="directory of the data sets, for these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    args = parser.parse_args(argv)
    if args.models and not args.data:
        raise smf.BadInput("give --data, too")
    args.model, rows, longer = None, {}, {}
    for model in [None, *args.models]:
        name = model.name if model else "tiny"
        out = ROOT / "out/rates" / name
        flags = START.format(f"'{model}'") if model else "--n-keys 128"
        facts = FACTS if model else "--task facts --sources 0 32 --steps 60"
        starts = {"fresh": out / "fresh", "stage 1": out / "stage 1"}
        run_all([f"train_retrofit.py {flags} --epochs {epochs} --out '{start}'"
                 for epochs, start in enumerate(starts.values()) if not smf.finished(start)], args)
        for kind, start in starts.items():
            rows[f"{name}, {kind}"] = learn(start, facts, RATES[kind], args)
    for steps in (150, 600):
        start = ROOT / f"out/rates/tiny-{steps}/fresh"
        run_all([f"train_retrofit.py --n-keys 128 --out '{start}'"] *
                (not smf.finished(start)), args)
        longer[f"{steps} steps"] = learn(
            start, f"--task facts --steps {steps} --split validation", LONGER, args)
    tables = [evaluation.table(rows, "memory"), evaluation.table(longer, "tiny, 160 facts")]
    (ROOT / "results/rates.md").write_text("\n\n".join(tables) + "\n")
    print(*tables, sep="\n\n")


if __name__ == "__main__":
    smf.script(main)
