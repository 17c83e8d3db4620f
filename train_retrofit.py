"""Stage 1: add memories to a pretrained model, train them on general chats, count what those read.

    python train_retrofit.py                      # the embedded tiny model, a fresh memory
    python train_retrofit.py --steps 70 --out out/tiny/trained-seed0     # and one that is trained
    python train_retrofit.py --mode replacement --steps 200 --lr 2e-3 --out out/tiny/replacement
    python train_retrofit.py --preset paper       # Qwen2.5-0.5B-Instruct and OpenAssistant (hub)
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

import smf

PRESETS = {
    "tiny": dict(model="tiny/model", max_length=128, n_keys=512, k_dim=32, top_k=8, epochs=0,
                 oasst_data="tiny/oasst1", background=1000, save_every=100),
    "paper": dict(model="Qwen/Qwen2.5-0.5B-Instruct", max_length=1024, micro_batch_size=4,
                  n_keys=128, k_dim=256, top_k=16, epochs=1, oasst_data="OpenAssistant/oasst1",
                  background=2000, save_every=20),
}
DECISIVE = ("seed", "batch_size", "alpha", "lr", "alpha_lr", "warmup", "query_momentum",
            "background")
SHARE = 0.01  # RMS(alpha Mem(x)) / RMS(MLP(x)) at the start: ours, .1 changes what tiny says


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="pretrained model: a directory or a hub name")
    add("--max-length", type=int, help="tokens of an example at most")
    add("--batch-size", type=int, default=16, help="examples of an optimizer step")
    add("--micro-batch-size", type=int, help="examples run at once (all)")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of initialisation and batches")
    add("--device", choices=smf.DEVICES, default=smf.DEVICES[0])
    add("--dtype", choices=["float32", "bfloat16"], help="of the frozen base (bfloat16 on a GPU)",
        default="bfloat16" if smf.DEVICES[0] == "cuda" else "float32")
    add("--out", type=Path, help="directory of the run (out/PRESET/retrofit-seedSEED)")
    add("--mode", choices=["additive", "replacement"], default="additive", help="MLP kept or not")
    add("--layers", type=int, nargs="+", help="blocks that get a memory (at 1/4, 1/2, 3/4)")
    add("--n-keys", type=int, help="sub-keys per half; n_keys**2 rows")
    add("--heads", type=int, default=4)
    add("--k-dim", type=int, help="width of a head's query")
    add("--top-k", type=int, help="rows that a head reads")
    add("--alpha", type=float, help="a fixed factor, as in [Gupta26] (0.01): the scale is not "
        f"measured, and rates do not carry over (what a memory adds has {SHARE} of the MLP's size)")
    add("--oasst-data", help="general chats, in the layout of OpenAssistant")
    add("--background", type=int, help="examples for the background statistics")
    add("--background-data", help="these examples: text and, if there, prompt (general chats)")
    add("--examples", type=int, default=1120, help="replies: more spoil stage 2 [Gupta26: 50,000]")
    add("--epochs", type=int, help="times that each is seen [Gupta26: 2]; 0: a fresh memory")
    add("--steps", type=int, help="steps, instead of epochs")
    add("--lr", type=float, default=5e-4, help="learning rate of the memories [Gupta26]")
    add("--alpha-lr", type=float, default=1e-4, help="learning rate of alpha")
    add("--warmup", type=int, default=10, help="steps of linear warm-up")
    add("--query-momentum", type=float, default=0.1, help="of the queries' statistics; 0: none")
    return smf.parse(parser, PRESETS, argv)


def general_chats(args):
    """(prompt, reply) of every assistant message whose parent is there, in a fixed order."""
    columns = ("message_id", "parent_id", "text", "role")
    rows = smf.load_rows("--oasst-data", args.oasst_data, "train", columns).shuffle(seed=0)
    texts = {row["message_id"]: row["text"] for row in rows if row["text"] and row["text"].strip()}
    return [(texts[row["parent_id"]], texts[row["message_id"]]) for row in rows
            if row["role"] == "assistant" and row["parent_id"] in texts
            and row["message_id"] in texts]


def add_replay(plan, data_sha256, tokenizer, args):
    """The plan with the next --replay general chats in each batch, and a hash of all it teaches."""
    if not args.replay:
        return plan, data_sha256
    chats = general_chats(args)[:len(plan) * args.replay]
    chats = smf.encode_all(tokenizer, chats, args.max_length)
    if not chats:
        raise smf.BadInput(f"--oasst-data {args.oasst_data}: has no reply of the assistant")
    plan = [batch + [chats[(step * args.replay + i) % len(chats)] for i in range(args.replay)]
            for step, batch in enumerate(plan)]
    return plan, smf.sha256((data_sha256 + json.dumps(chats)).encode()).hexdigest()


def collated(examples, args, label):
    """Collated batches of --micro-batch-size examples, with a progress bar."""
    for i in tqdm(range(0, len(examples), args.micro_batch_size), label, leave=False):
        yield smf.collate(examples[i:i + args.micro_batch_size], args.device)


@torch.no_grad()
def calibrate(model, mlps, batches, args):
    """Measure on general text the size of each memory's input, its queries, and the size of MLP(x).

    differs: the papers fix alpha. What a memory adds then depends on the model, and a learning rate
    that is right for one ruins another. RMS(Mem(x)) / RMS(MLP(x)) of fresh memories without this:
        tiny .012 .012 .005, SmolLM2-135M .0013 .0011 .0006,
        Qwen2.5 0.5B .072 .072 .045, Gemma 3 270M .097 .058 .052. With it they are 1."""
    def rms(x):
        return x.float().square().mean(-1).sqrt()  # (S,)

    for (name, memory), mlp in zip(smf.memories(model).items(), mlps):  # the lowest first
        x = torch.cat([smf.read_only(model, batch)[name][0][batch["attention_mask"].bool()]
                       for batch in tqdm(batches, "calibrate", leave=False)])  # (S, D)
        memory.x_rms.copy_(rms(x).median())  # now queries and gate have inputs of unit size
        if args.query_momentum:
            memory.track_queries(x, momentum=1.0)
        if args.alpha is None:
            memory.scale.copy_((rms(mlp(x.to(model.dtype))) / rms(memory(x))).median())
        print(f"{name}: RMS of its input {memory.x_rms:.3g}, scale {memory.scale:.3g}")


def spread(counts):
    """How evenly a memory is read, counts (N,) -> usage, the share of rows ever read, and the KL
    divergence of the reads from uniform, nats: 0 if even, log N if all go to one row."""
    p = counts.double() / counts.sum()  # (N,)
    return (counts > 0).double().mean().item(), math.log(len(p)) + torch.xlogy(p, p).sum().item()


@torch.no_grad()
def measure(model, general, args):
    """Collect the background; print how evenly it reads each memory."""
    smf.collect_background(model, collated(general, args, "background"))
    for name, memory in smf.memories(model).items():
        usage, kl = spread(memory.background_counts)
        print(f"{name}: usage {usage:.1%} of {len(memory.values)} rows, "
              f"KL from uniform {kl:.2f} nats")
        if math.exp(-kl) * len(memory.values) < 0.05 * min(len(memory.values), 128**2):
            print("WARNING: this memory has collapsed to a few rows; lower --lr or --steps")


def train(model, plan, run, args):
    """AdamW on all that the retrofit added; alpha has a learning rate of its own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    alphas = [p for p in trained if p.dim() == 0]
    optimizer = torch.optim.AdamW([{"params": [p for p in trained if p.dim() > 0]},
                                   {"params": alphas}], eps=1e-12, weight_decay=0.0)
    done, state = smf.load_checkpoint(run)
    if state:
        smf.apply_delta(model, state["memory"])
        optimizer.load_state_dict(state["optimizer"])

    for step in tqdm(range(done, len(plan)), initial=done, total=len(plan), disable=not plan):
        loss, reads = smf.backward(model, plan[step], args.micro_batch_size)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        factor = smf.learning_rate(step, len(plan), args.warmup)
        for group, lr in zip(optimizer.param_groups, (args.lr, args.alpha_lr)):
            group["lr"] = factor * lr
        usage, kl = zip(*(spread(torch.bincount(rows.flatten(), minlength=args.n_keys**2))
                          for _, rows, _, _ in reads.values()))
        smf.log(run, step=step, loss=loss.item(), lr=factor * args.lr, grad_norm=norm,
                alpha=[round(alpha.item(), 4) for alpha in alphas],
                usage=[round(value, 4) for value in usage], KL=[round(value, 4) for value in kl])

        optimizer.step()
        optimizer.zero_grad()
        for name, memory in smf.memories(model).items():
            memory.track_queries(reads[name][0], args.query_momentum)
        if (step + 1) % args.save_every == 0:
            smf.save_checkpoint(run, step + 1, memory=smf.memory_state(model),
                                optimizer=optimizer.state_dict())


def main(argv=None):
    args = parse(argv)
    if smf.WORLD_SIZE > 1:
        raise smf.BadInput("torchrun: run train_retrofit.py without it, in one process")
    if args.alpha and args.mode == "replacement":
        raise smf.BadInput("--alpha: replacement has no alpha; leave it out")
    run = args.out or Path("out", args.preset, f"retrofit-seed{args.seed}")
    model, tokenizer = smf.load_base(args.model, args.dtype, args.device)
    base = smf.weights_sha256(model)
    mlps = [block.mlp for block in smf.decoder_blocks(model)]
    layers = sorted(args.layers or (len(mlps) * quarter // 4 for quarter in (1, 2, 3)))
    memory = {"layers": layers, "mode": args.mode, "alpha": args.alpha or SHARE,
              "n_keys": args.n_keys, "heads": args.heads, "k_dim": args.k_dim, "top_k": args.top_k}
    torch.manual_seed(args.seed)
    smf.retrofit(model, **memory)

    chats = general_chats(args)[:max(args.examples, args.background)]
    examples = smf.encode_all(tokenizer, chats, args.max_length)
    chats, general, examples = (examples[:n] for n in (64, args.background, args.examples))
    if args.background_data:
        rows = smf.load_rows("--background-data", args.background_data, "train", ("text",),
                             ("prompt",))
        texts = [(row.get("prompt") or None, str(row["text"])) for row in rows if row["text"]]
        general = smf.encode_all(tokenizer, texts[:args.background], args.max_length)
    if not general or len(examples) < args.batch_size:
        raise smf.BadInput(f"--oasst-data, --examples, --background-data: {len(examples)} chats to "
                           f"train on and {len(general)} texts for the background are left")
    steps = args.epochs * (len(examples) // args.batch_size) if args.steps is None else args.steps
    config = {"base": smf.base_name(args.model), "parent_sha256": base, "dtype": args.dtype,
              "memory": memory, "steps": steps,
              "data": smf.sha256(json.dumps([general, examples]).encode()).hexdigest()}
    with smf.start_run(run, config | {name: vars(args)[name] for name in DECISIVE}, args):
        if smf.finished(run):
            return print(f"stage 1: {run} is finished already")
        print(f"stage 1: {args.mode}, {steps} steps, {len(examples)} chats -> {run}")
        if not (run / "checkpoint.pt").exists():
            batches = list(collated(chats, args, "calibrate"))
            calibrate(model, [mlps[layer] for layer in layers], batches, args)
        train(model, smf.batches(examples, args.batch_size, args.seed, steps), run, args)
        measure(model, general, args)
        smf.finish_run(run, smf.memory_state(model))


if __name__ == "__main__":
    smf.script(main)
