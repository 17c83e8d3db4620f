"""What training steps, inference and files cost, on a model of a real shape with random weights.

    python results/cost.py                        # Qwen2.5-0.5B's shape: 40 minutes on two cores
    python results/cost.py --model tiny/model --max-length 32 --rounds 2     # a try, a minute
    python results/cost.py --to results/qwen2.5-0.5b/cost.md
    python results/cost.py --dtype bfloat16 --max-length 512 --rounds 4 --races 0 1 2 4     # a GPU

Each training loop runs in a process of its own, and two of them take turns step by step. Ratios are
of medians. With peft installed, its LoRA is raced, too."""

import argparse
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import baselines  # noqa: E402
import eval as evaluation  # noqa: E402
import smf  # noqa: E402
import train_retrofit  # noqa: E402
import train_sparse  # noqa: E402

QWEN = dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)
RACES = [("SMF", "full"), ("SMF", "LoRA"), ("SMF", "stage 1"), ("stage 1", "plain AdamW loop"),
         ("SMF", "SMF, whole batches"), ("SMF, one memory, N = 1,048,576", "SMF, one memory")]
RACES += [("SMF", "peft's LoRA")] * bool(importlib.util.find_spec("peft"))


class Turns(list):
    """The batches of a loop. As it takes the next one, it waits here for its turn, and the time of
    the step before is noted."""

    def __init__(self, batches, mine, other, device):
        super().__init__(batches)
        self.mine, self.other, self.device, self.began, self.seconds = mine, other, device, 0, []

    def __getitem__(self, step):
        if self.began:
            self.end_step()
        self.mine.acquire()
        self.began = time.perf_counter()
        return super().__getitem__(step)

    def end_step(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.other.release()


def random_model(config, device, dtype):
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def plain_loop(model, plan, run, args):
    """Stage 1 without its bookkeeping."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for step in range(len(plan)):
        batch = plan[step]
        for i in range(0, len(batch), args.micro_batch_size):
            part = smf.collate(batch[i:i + args.micro_batch_size], args.device)
            smf.token_loss(model, part).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def peak_memory(device):  # GiB: of the tensors on a GPU, else of this process
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def prepare(name, model):
    """What the script of `name` would do with the model before its loop -> the script."""
    depth = model.config.num_hidden_layers
    layers = [depth // 2] if "one memory" in name else [depth // 4, depth // 2, 3 * depth // 4]
    if name == "full":
        model.requires_grad_(True)
    elif name == "LoRA":
        baselines.add_lora(model)
    elif name == "peft's LoRA":
        from peft import LoraConfig, inject_adapter_in_model
        inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05,
                                           target_modules="all-linear"), model)
    else:
        smf.retrofit(model, layers, n_keys=1024 if "1,048,576" in name else 128)
        if name in ("stage 1", "plain AdamW loop"):
            return train_retrofit
        model.requires_grad_(False)
        return train_sparse
    return baselines


def train(name, config, args, mine, other, results):
    """The loop of `name` on one batch; what it costs goes into `results`: see the end of race."""
    sys.stdout = open(os.devnull, "w")
    dtype = "float32" if name == "full" else args.dtype  # full: only its computations are in dtype
    model = random_model(config, args.device, dtype)
    before, script = peak_memory(args.device), prepare(name, model)
    start = 1 if script is train_retrofit else args.max_length - 16
    ids = torch.randint(config.vocab_size, (args.batch_size, args.max_length)).tolist()
    batch = [smf.Example(row, start) for row in ids]
    plan = Turns([batch] * (args.rounds + 1), mine, other, args.device)
    micro = args.batch_size if "whole" in name else args.micro_batch_size
    flags = f"--device {args.device} --batch-size {args.batch_size} --micro-batch-size {micro}"
    flags += {train_sparse: " --optimizer adamw --top-t 500",
              train_retrofit: " --n-keys 128"}.get(script, "")
    flags += f" --dtype {args.dtype}" * (script is not train_sparse) + " --method full" * (
        name == "full")
    loop = plain_loop if name == "plain AdamW loop" else script.train
    none = [] if script is train_retrofit else [None, None]  # of tokenizer and data
    loop(model, plan, Path(tempfile.mkdtemp()), script.parse(flags.split()), *none)
    plan.end_step()
    tables = sum(memory.values.nbytes for memory in smf.memories(model).values()) / 2**30
    peak = peak_memory(args.device) - before
    results.put((name, median(plan.seconds[1:]), peak, peak - tables))  # the first warms up


def race(pair, config, args):
    """-> {column: "own / other = ratio"} of the two."""
    context = multiprocessing.get_context("spawn")
    turns, results = [context.Semaphore(1), context.Semaphore(0)], context.SimpleQueue()
    runners = [context.Process(target=train, daemon=True, args=(
        name, config, args, turns[i], turns[1 - i], results)) for i, name in enumerate(pair)]
    [runner.start() for runner in runners]
    while any(runner.is_alive() for runner in runners):
        time.sleep(0.2)
        if any(runner.exitcode for runner in runners):  # 0 or None while all is well
            raise smf.BadInput(f"{pair}: one ended early, as when memory runs out; give less "
                               f"--batch-size or --max-length")
    found = {name: figures for name, *figures in (results.get() for _ in pair)}
    return {column: f"{own:.3g} / {other:.3g} = {own / other:.2f}" for column, own, other in zip(
        ("s/step", "GiB beyond the base", "and beyond V"), *(found[name] for name in pair))}


@torch.no_grad()
def inference(config, args, prompt=128, new=8):
    """{model: {column: text}}: speed of a prompt of 128 tokens and of decoding, one sequence, the
    models in turn, medians; and what is stored for each."""
    models = {name: random_model(config, args.device, args.dtype)
              for name in ("base", "base again", "additive", "replacement", "LoRA")}
    depth = config.num_hidden_layers
    for mode in ("additive", "replacement"):
        smf.retrofit(models[mode], [depth // 4, depth // 2, 3 * depth // 4], mode, 1.0)
    baselines.add_lora(models["LoRA"])
    stored = {"base": models["base"].parameters(),
              "additive": smf.memory_state(models["additive"]).values(),
              "LoRA": [p for p in models["LoRA"].parameters() if p.requires_grad]}
    ids = torch.randint(config.vocab_size, (1, prompt), device=args.device)  # (1, prompt)
    work = {"prefill": lambda model: model(ids, logits_to_keep=1).logits.sum().item(),
            "decode": lambda model: model.generate(
                ids[:, :1], do_sample=False, min_new_tokens=new, max_new_tokens=new)}
    seconds = {(name, what): [] for name in models for what in work}
    for _ in tqdm(range(5 * args.rounds + 1), "inference", leave=False):  # the first to warm up
        for name, what in seconds:
            began = time.perf_counter()
            work[what](models[name].eval())
            seconds[name, what].append(time.perf_counter() - began)
    time_of = {key: median(times[1:]) for key, times in seconds.items()}
    rows = {name: {f"{what}, of the base's speed": f"{time_of['base', what] / own:.2f}"
                   for (model, what), own in time_of.items() if model == name} for name in models}
    for name, tensors in stored.items():
        rows[name]["stored, MB"] = f"{sum(tensor.nbytes for tensor in tensors) / 1e6:.2f}"
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="directory of a model, for its shape (Qwen2.5-0.5B's)")
    add("--batch-size", type=int, default=16)
    add("--micro-batch-size", type=int, default=4)
    add("--max-length", type=int, default=64, help="tokens; the last 16 (stage 1: all) are learned")
    add("--rounds", type=int, default=5, help="steps of each race, and a fifth of the inferences")
    add("--device", choices=smf.DEVICES, default=smf.DEVICES[0])
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    races = range(len(RACES))
    add("--races", type=int, nargs="+", choices=races, default=races, help="these alone")
    add("--to", type=Path, help="file for the tables, too")
    args = parser.parse_args(argv)
    config = (AutoConfig.from_pretrained(smf.find(args.model, "model")) if args.model else
              Qwen2Config(**QWEN))
    steps = {" / ".join(pair): race(pair, config, args)
             for pair in tqdm([RACES[i] for i in args.races], "races")}
    text = f"{evaluation.table(steps)}\n\n{evaluation.table(inference(config, args))}\n"
    print(text)
    if args.to:
        smf.write_atomic(args.to, lambda path: path.write_text(text))


if __name__ == "__main__":
    smf.script(main)
