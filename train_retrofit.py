"""Stage 1: give a pretrained model memories, train them on general chats, count what those read.

    python train_retrofit.py                      # the embedded tiny model
    python train_retrofit.py --steps 0            # "fresh": no training, background statistics only
    python train_retrofit.py --mode replacement
    python train_retrofit.py --preset paper       # Qwen2.5-0.5B-Instruct and OpenAssistant (hub)

Everything but the memories stays frozen [Gupta26 §3.3]. The run is memory.safetensors, with the
background statistics in it, config.json, and metrics.jsonl, a line per step.
"""

import argparse
import math
import re
import time

import torch
from tqdm import tqdm

import smf
from smf import natural, positive, whole


def layer_list(text):
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text}: give layers as in 6,12,18")
    return sorted(int(part) for part in text.split(","))


def fraction(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 to 1")
    return value


MEMORY = {  # columns as in smf.COMMON
    "mode": (("additive", "replacement"), "additive", "additive", "MLP + alpha Mem, or Mem"),
    "layers": (layer_list, None, None, "such as 6,12,18; none: at 1/4, 1/2, 3/4 of the depth"),
    "n-keys": (whole, 128, 128, "n: sub-keys per half; the memory has n * n rows"),
    "heads": (whole, 4, 4, "H"),
    "k-dim": (whole, 32, 256, "width of a head's query"),
    "top-k": (whole, 8, 16, "K: rows a head reads (16: ours)"),
    "scale": (positive, 1.0, 1.0, "alpha before stage 1 (ours, see README; [Gupta26]: 0.01)"),
    "oasst-data": (str, "tiny/oasst1", "OpenAssistant/oasst1", "general chats"),
    "background": (whole, 1000, 2000, "examples for the background statistics, at most"),
}
FLAGS = smf.COMMON | MEMORY | {
    # paper: ours. 70 steps as measured, since more of them spoil stage 2 (README, Stage 1);
    # [Gupta26]: 50000, twice, 100 steps of warm-up.
    "examples": (whole, 1600, 1120, "assistant replies to train on, at most"),
    "epochs": (whole, 2, 1, "times that each is seen"),
    "steps": (natural, None, None, "steps instead of epochs; 0: a fresh memory"),
    "lr": (positive, 2e-3, 5e-4, "learning rate of V, keys, query, W1, W2"),
    "scale-lr": (positive, 1e-2, 1e-2, "learning rate of alpha (ours: at --lr it hardly moves)"),
    "warmup": (natural, 20, 10, "steps of linear warm-up"),
    "query-momentum": (fraction, 0.1, 0.1, "pace of the statistics that normalise the query "
                                           "(ours); 0: it is not normalised"),
}
HELD_OUT = 128  # chats kept from training, for the held-out loss
COLLAPSED = 3.0  # nats from uniform: no more than exp(-3) = 5 % of the rows are in effective use


def general_chats(args):
    """(prompt, reply) of every assistant message whose parent is there, in a fixed order; empty
    ones are left out."""
    columns = ("message_id", "parent_id", "text", "role")
    rows = smf.read_rows("--oasst-data", args.oasst_data, "train", columns).shuffle(seed=0)
    texts = {number: text for number, text in zip(rows["message_id"], rows["text"])
             if isinstance(text, str) and text.strip()}
    chats = [(texts[row["parent_id"]], texts[row["message_id"]]) for row in rows
             if row["role"] == "assistant" and row["parent_id"] in texts
             and row["message_id"] in texts]
    if len(chats) < HELD_OUT + args.batch_size:
        raise smf.Refused(f"--oasst-data {args.oasst_data}: {len(chats)} replies with prompts; at "
                          f"least {HELD_OUT} + --batch-size {args.batch_size} are needed")
    return chats


def add_memories(model, args):
    """Retrofit the model as the flags say -> the layers, the shape of a memory."""
    shape = {"n_keys": args.n_keys, "heads": args.heads, "k_dim": args.k_dim, "top_k": args.top_k}
    depth = len(smf.decoder_blocks(model))
    layers = args.layers or [depth // 4, depth // 2, 3 * depth // 4]  # [Gupta26]: 6, 12, 18 of 24
    torch.manual_seed(args.seed)
    smf.retrofit(model, layers, args.mode, args.scale, **shape)
    return layers, shape


def micro_batches(examples, args, label):
    """Collated batches of --micro-batch-size examples, under a progress bar."""
    for i in tqdm(range(0, len(examples), args.micro_batch_size), desc=label, leave=False):
        yield smf.collate(examples[i:i + args.micro_batch_size], args.device)


def calibrate(model, batches):
    """Set the query's running statistics from a few batches, before training."""
    batches = list(batches)
    passes = [smf.read_only(model, batch) for batch in batches]
    masks = [batch["attention_mask"] for batch in batches]
    for layer, memory in smf.memories(model).items():
        x, *_ = smf.real_tokens([tapes[layer][0] for tapes in passes], masks)
        memory.track_queries(x, momentum=1.0)


def spread(counts):
    """How evenly a memory is read, counts (N,) -> (usage, KL) [Lample19 §4].

    usage: share of rows ever read. KL: of the reads from uniform, nats; 0 even, log N one row.
    """
    p = counts.double() / counts.sum()  # (N,)
    return (counts > 0).double().mean().item(), math.log(len(p)) + torch.xlogy(p, p).sum().item()


@torch.no_grad()
def measure(model, general, held_out, when, args):
    """Collect the background; print how evenly it reads each memory, and the held-out loss.

    Warns of a memory that has collapsed to a few rows [Lample19 §4].
    """
    smf.collect_background(model, micro_batches(general, args, "background"))
    for layer, memory in smf.memories(model).items():
        usage, kl = spread(memory.background_counts)
        print(f"{when}: layer {layer}: usage {usage:.1%} of {len(memory.values)} rows, "
              f"KL of the reads from uniform {kl:.2f} nats")
        if kl > COLLAPSED:
            print(f"WARNING: the memory of layer {layer} has collapsed to a few rows; SMF has "
                  f"little to choose from. Lower --lr or --steps, or try --steps 0")
    losses = [smf.token_loss(model, batch)[batch["targets"] != -100]
              for batch in micro_batches(held_out, args, "held-out loss")]
    print(f"{when}: held-out loss {torch.cat(losses).mean().item():.4f}")


def train(model, examples, steps, run, done, checkpoint, args):
    """AdamW on everything in the memories, alpha at its own rate; goes on from a checkpoint."""
    trained = {f"{layer}.{name}": parameter for layer, wrapper in smf.wrappers(model).items()
               for name, parameter in wrapper.named_parameters() if not name.startswith("mlp.")}
    scales = [parameter for parameter in trained.values() if parameter.dim() == 0]
    tables = [parameter for parameter in trained.values() if parameter.dim() > 0]
    optimizer = torch.optim.AdamW([{"params": tables, "initial_lr": args.lr},
                                   {"params": scales, "initial_lr": args.scale_lr}],
                                  eps=1e-12, weight_decay=0.0)  # eps: see smf.RowOptimizer
    if checkpoint:
        with smf.restoring(run):
            smf.load_memory(model, checkpoint, run / "checkpoint.safetensors")
            smf.load_adamw(optimizer, trained, checkpoint)

    def save(step):
        state = smf.adamw_state(optimizer, trained) | smf.memory_state(model)
        smf.save_checkpoint(run, step, state)

    for step, batch, factor in smf.training(examples, steps, done, save, args, "stage 1"):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
        with smf.record_reads(model) as tapes:
            loss, masks = smf.backward(model, batch, args.micro_batch_size)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), smf.CLIP).item()
        smf.check_finite(loss, norm, step, save)
        optimizer.step()
        optimizer.zero_grad()
        reads = []  # (usage, KL) of each layer
        for layer, memory in smf.memories(model).items():
            x, rows, *_ = smf.real_tokens(tapes[layer], masks)
            memory.track_queries(x, args.query_momentum)
            reads.append(spread(smf.count_reads(rows, len(memory.values))))
        usage, kl = ([round(value, 4) for value in part] for part in zip(*reads))
        smf.log_step(run, {"step": step, "loss": loss, "lr": factor * args.lr, "grad_norm": norm,
                           "alpha": [round(scale.item(), 4) for scale in scales], "usage": usage,
                           "KL": kl}, batch, start, args.device)


def main(argv=None):
    args = smf.parse(__doc__, FLAGS, argv)
    run = smf.run_directory(args, f"{args.mode}-{'fresh' if args.steps == 0 else 'retrofit'}")
    model, tokenizer = smf.load_base(args.model, args.dtype, args.device)
    base = smf.base_fingerprint(model)
    layers, shape = add_memories(model, args)
    chats = general_chats(args)[:HELD_OUT + max(args.examples, args.background)]
    examples = smf.encode_all(model, tokenizer, chats, args.max_length)
    held_out, examples = examples[:HELD_OUT], examples[HELD_OUT:]
    general, examples = examples[:args.background], examples[:args.examples]
    if len(examples) < args.batch_size:
        raise smf.Refused(f"--examples {args.examples}: fewer than --batch-size {args.batch_size}")
    steps = args.steps
    if steps is None:
        steps = args.epochs * (len(examples) // args.batch_size)
    done, checkpoint = smf.begin_run(run, args, {
        "kind": "retrofit", "model": smf.portable(args.model), "dtype": args.dtype,
        "fingerprint": base, "training_data": smf.digest(examples), "layers": layers,
        "mode": args.mode, "memory": shape})
    if smf.finished(run):
        return print(f"stage 1: {run} is finished already")
    print(f"stage 1: {args.mode}, layers {layers}, {steps} steps, {len(examples)} chats -> {run}")
    began = time.time()
    if done == 0 and args.query_momentum:
        calibrate(model, micro_batches(general[:64], args, "calibrate"))
    if steps and done == 0:
        measure(model, general, held_out, "before", args)
    train(model, examples, steps, run, done, checkpoint, args)
    measure(model, general, held_out, "after", args)
    smf.write_tensors(run / "memory.safetensors", smf.memory_state(model))
    smf.end_run(run, "stage 1", began, args.device)


if __name__ == "__main__":
    smf.script(main)
