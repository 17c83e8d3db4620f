"""Where does a step of SMF wait for the GPU, and how long is the GPU idle?

    python results/waits.py      # Qwen2.5-0.5B's shape, 16 examples of 512 tokens; half a minute

A random model in bfloat16, micro-batches of 4, TF-IDF, AdamW. A wait is a place where Python needs
a number from the GPU before it can go on: so the GPU runs empty."""

import linecache
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import cost  # noqa: E402
import eval as evaluation  # noqa: E402
import smf  # noqa: E402
import step_times  # noqa: E402
import train_sparse  # noqa: E402

STEPS = 10


def busy(events):
    """Seconds in which any kernel runs."""
    total = end = 0
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in events):
        total, end = total + max(0, stop - max(start, end)), max(end, stop)
    return total / 1e6


def main():
    if smf.DEVICES[0] != "cuda":
        raise smf.BadInput("there is no GPU here")
    model = cost.random_model(Qwen2Config(**cost.QWEN), "cuda", "bfloat16")
    cost.prepare("SMF", model)
    batch = [smf.Example(ids, 496) for ids in torch.randint(151_936, (16, 512)).tolist()]
    args = train_sparse.parse("--micro-batch-size 4 --optimizer adamw --top-t 500".split())

    def train(steps):
        plan = step_times.Timed([batch] * steps)
        train_sparse.train(model, plan, Path(tempfile.mkdtemp()), args, None, [None])
        return [end - began for began, end in zip(plan.began, plan.began[1:])]

    train(3)  # warms up
    seconds = median(train(STEPS + 1))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        train(2)
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(1)
    places = Counter((w.filename, w.lineno) for w in caught if "synchroniz" in str(w.message))
    rows = {"a step, s (median)": {"": f"{seconds:.4f}"},
            "the GPU is busy, s a step": {"": f"{busy(kernels) / 2:.4f}"},
            "waits a step": {"": places.total()}}
    rows |= {f"{Path(file).name}: `{linecache.getline(file, line).strip()}`": {"": n}
             for (file, line), n in places.most_common(12)}
    table = evaluation.table(rows, torch.cuda.get_device_name())
    print(table)
    (ROOT / "results/qwen2.5-0.5b/waits.md").write_text(table + "\n")


if __name__ == "__main__":
    smf.script(main)
