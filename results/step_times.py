"""Is a step of a stream slower with another scorer, a larger table, or many sources told before?

    python results/step_times.py      # five minutes on one core; writes tiny-stream/step_times.md

Steps of all variants are interleaved, and medians are compared. Then AdamW is told 10,000 sources,
each one text of 24 random tokens, and its last steps are compared with its first."""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import smf  # noqa: E402
import train_retrofit  # noqa: E402
import train_sparse  # noqa: E402

VARIANTS = {"tfidf": [512, "tfidf"], "kl": [512, "kl"], "gradient": [512, "gradient"],
            "n = 128": [128, "tfidf"], "n = 1024": [1024, "tfidf"]}
TEMPORARY = tempfile.mkdtemp()


class Timed(list):
    """Batches that note when each is taken, that is when its step begins."""

    def __getitem__(self, step):
        self.__dict__.setdefault("began", []).append(time.perf_counter())
        return super().__getitem__(step)


def prepare(n_keys, *flags):
    """-> train_sparse.train's arguments on a fresh memory of n_keys."""
    parent = Path(TEMPORARY, f"n{n_keys}")
    if not smf.finished(parent):
        train_retrofit.main(["--n-keys", str(n_keys), "--out", str(parent)])
    (model, tokenizer), args = smf.load(parent), train_sparse.parse([*flags, "--save-every=999999"])
    data = evaluation.load_data(args)
    plan, _ = evaluation.training_plan(model, tokenizer, data, args)
    return [model, plan, Path(tempfile.mkdtemp(dir=TEMPORARY)), args, tokenizer, data]


def seconds(runner, plan):
    """Of each step of these batches."""
    runner[1] = Timed(plan)
    train_sparse.train(*runner)
    ends = [*runner[1].began[1:], time.perf_counter()]
    return [end - began for began, end in zip(runner[1].began, ends)]


def main():
    torch.set_num_threads(1)
    runners = {name: prepare(n, "--scorer", scorer) for name, (n, scorer) in VARIANTS.items()}
    plan, times = runners["tfidf"][1], {name: [] for name in runners}
    for i in range(0, 200, 10):  # ten steps each, in turn; the first of them warms up
        for name, runner in runners.items():
            times[name] += seconds(runner, plan[i:i + 10])[1:-1]
    base = median(times["tfidf"])
    rows = {f"{name}, of tfidf at n = 512": {"ratio": f"{median(t) / base:.2f}"}
            for name, t in times.items()}
    runner = prepare(512, "--optimizer", "adamw", "--lr", "1e-6")
    t = seconds(runner, [[smf.Example(ids, 1)] for ids in torch.randint(
        runner[0].config.vocab_size, (10_000, 24)).tolist()])
    for n in (100, 1000):
        rows[f"last {n} of 10,000 sources, of the first {n}"] = {
            "ratio": f"{median(t[-n:]) / median(t[1:n]):.2f}"}
    table = evaluation.table(rows, "step")
    (ROOT / "results/tiny-stream/step_times.md").write_text(table + "\n")
    shutil.rmtree(TEMPORARY)
    print(table)


if __name__ == "__main__":
    smf.script(main)
