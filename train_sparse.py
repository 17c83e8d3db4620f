"""Stage 2, Sparse Memory Finetuning: learn a stream or a task in a few memory rows, then measure.

    python train_sparse.py --scorer tfidf                  # the embedded tiny model, both stages
    python train_sparse.py --parent out/tiny/tfidf-seed0 --stream-data MORE --out out/tiny/tuesday
    python train_sparse.py --preset paper --scorer kl      # Qwen2.5-0.5B-Instruct, MedMCQA (hub)
    torchrun --nproc_per_node=2 train_sparse.py            # each process runs a share of each batch

--parent is the run to start from: one of train_retrofit.py, or another sparse run, on top of which
this one learns. Without it, that of this preset and seed, which is made first if there is none.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import eval as evaluation
import smf
import train_retrofit

PRESETS = {
    "tiny": dict(evaluation.PRESETS["tiny"], max_length=128, save_every=100),
    "paper": dict(evaluation.PRESETS["paper"], max_length=1024, micro_batch_size=4, save_every=20),
}
# Chosen in results/README.md: on the streams of tiny and SmolLM2-135M, else on shuffled facts. A
# stream's rate of AdamW is between two that tiny tried.
TOP_T = {"tiny stream": 50, "stream": 500, "else": 500}
LEARNING_RATE = {"tiny stream": {"sgd": 0.1, "adamw": 0.03}, "stream": {"sgd": 0.3, "adamw": 0.03},
                 "else": {"sgd": 1.0, "adamw": 0.1}}
DECISIVE = ("task", "seed", "batch_size", "passes", "warmup", "ask_every", "scorer", "top_t",
            "optimizer", "lr", "least_harm", "train_alpha", "alpha_lr", "replay")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--max-length", type=int, help="tokens of an example at most")
    add("--batch-size", type=int, default=16, help="examples of an optimizer step")
    add("--micro-batch-size", type=int, help="examples run at once (all)")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of batches and random rows")
    add("--device", choices=smf.DEVICES, default=smf.DEVICES[0])
    add("--out", type=Path, help="directory of the run (out/PRESET/SCORER-seedSEED)")
    add("--parent", type=Path, help="run to start from (out/PRESET/retrofit-seedSEED)")
    add("--scorer", choices=["tfidf", "kl", "gradient", "count", "random", "all"], default="tfidf",
        help="how to choose rows; count, random and all (rows read) are controls")
    add("--top-t", type=int, help=f"rows updated per memory and step ({TOP_T})")
    add("--optimizer", choices=["sgd", "adamw"], default="sgd", help="of the rows")
    add("--lr", type=float, help=f"learning rate of the rows ({LEARNING_RATE})")
    add("--least-harm", action="store_true", help="ours: divide the step of each row by how often "
        "general text reads it")
    add("--train-alpha", action="store_true", help="+S [Gupta26]: train the alphas, too")
    add("--alpha-lr", type=float, default=1e-4, help="learning rate of the alphas")
    evaluation.add_flags(parser)
    args = smf.parse(parser, PRESETS, argv)
    kind = "tiny " * (args.preset == "tiny") + "stream" if args.task == "stream" else "else"
    args.top_t, args.lr = args.top_t or TOP_T[kind], args.lr or LEARNING_RATE[kind][args.optimizer]
    return args


def all_reduce(tensor):
    """The sum of a tensor over the processes of torchrun, in place; they all get it."""
    if smf.WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def select_rows(memory, counts, reads, step, args):
    """The rows (t,) to update, given how often this batch reads each, counts (N,), and what of it
    smf.row_gradient wants: rows, weights, dL/dy."""
    read = counts.nonzero().squeeze(-1)  # (R,) to score these alone is fast, whatever N is
    if args.scorer == "tfidf":
        scores = smf.tfidf_scores(counts[read], memory.doc_freq[read], memory.num_batches)  # (R,)
    elif args.scorer == "kl":
        scores = smf.kl_scores(counts, memory.background_counts)[read]
    elif args.scorer == "gradient":  # ours: the length of a row's gradient
        scores = all_reduce(smf.row_gradient(read, *reads, len(counts))).norm(dim=1)
    elif args.scorer == "random":
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + step)
        scores = torch.rand(len(read), generator=generator).to(read.device)
    else:  # count, all
        scores = counts[read].float()
    t = len(read) if args.scorer == "all" else args.top_t
    return read[smf.top_rows(scores, counts[read], t)]


def unit_of_rates(model, optimizer):
    """What --lr 1 is for a row: so one rate fits all models, and a memory of any size (README)."""
    additive = any(isinstance(module, smf.AdditiveMemory) for module in model.modules())
    share = train_retrofit.SHARE if additive else 1.0  # size of a new memory, beside the MLP
    std = model.config.get_text_config().hidden_size**-0.5  # of the numbers in initial rows
    return std / share if optimizer == "adamw" else 1 / share**2


def train(model, plan, run, args, tokenizer, data):  # -> what was learned, {name: tensor}
    memories, unit = smf.memories(model), unit_of_rates(model, args.optimizer)
    optimizers = {f"{name}.values": smf.RowOptimizer(memory.values, args.optimizer)
                  for name, memory in memories.items()}
    alphas = {name: p for name, p in model.named_parameters()
              if name.endswith(".mlp.alpha") and args.train_alpha}
    for name, alpha in alphas.items():  # +S: a table of one row, which every step selects
        optimizers[name] = smf.RowOptimizer(alpha.requires_grad_().detach().view(1, 1))
    done, state = smf.load_checkpoint(run)
    for name in state:
        optimizers[name].load_state_dict(state[name])

    for step in tqdm(range(done, len(plan)), initial=done, total=len(plan), disable=smf.RANK > 0):
        asked = evaluation.ask_along(model, tokenizer, data, step, args)  # mostly {}

        # Forward and backward. What does this batch read, and what is the gradient there?
        loss, reads = smf.backward(model, plan[step], args.micro_batch_size)

        # Which of the rows read are this batch's own? Only those get their gradient.
        updates = {}  # {name: (rows, gradient, learning rate)}
        for name, memory in memories.items():
            _, rows, weights, dy = reads[name]
            counts = all_reduce(torch.bincount(rows.flatten(), minlength=len(memory.values)))
            selected = select_rows(memory, counts, (rows, weights, dy), step, args)
            gradient = smf.row_gradient(selected, rows, weights, dy, len(counts))
            harm = smf.harm(memory.background_counts)[selected, None] if args.least_harm else 1.0
            updates[f"{name}.values"] = selected, all_reduce(gradient), args.lr * unit / harm
        norm = torch.nn.utils.get_total_norm([part for _, part, _ in updates.values()]).item()
        first = torch.tensor([0], device=args.device)
        updates |= {name: (first, all_reduce(alpha.grad).view(1, 1), args.alpha_lr)
                    for name, alpha in alphas.items()}

        # Update these rows, and nothing else.
        factor = 1.0 if args.task == "stream" else smf.learning_rate(step, len(plan), args.warmup)
        smf.log(run, step=step, loss=all_reduce(loss).item(), lr=factor * args.lr, grad_norm=norm,
                rows=[len(updates[f"{name}.values"][0]) for name in memories], **asked)
        for name, (selected, gradient, lr) in updates.items():
            optimizers[name].step(selected, gradient * min(1.0, 1.0 / (norm + 1e-12)), factor * lr)
        model.zero_grad()
        if (step + 1) % args.save_every == 0:
            smf.save_checkpoint(run, step + 1, **{name: optimizer.state_dict()
                                                  for name, optimizer in optimizers.items()})

    return alphas | {f"{name}.values:{part}": optimizers[f"{name}.values"].state_dict()[part]
                     for name in memories for part in ("rows", "values")}


def load_parent(args):
    """-> the run to start from (the default one is made if it is missing), its model, tokenizer."""
    parent = args.parent or Path("out", args.preset, f"retrofit-seed{args.seed}")
    if not args.parent and not smf.finished(parent):
        print(f"there is no finished {parent} yet: running stage 1 first")
        train_retrofit.main(["--preset", args.preset, "--seed", str(args.seed),
                             "--device", args.device])
    model, tokenizer = smf.load(parent, args.device)
    memories = smf.memories(model).values()
    if not memories or any(memory.num_batches == 0 for memory in memories):
        raise smf.BadInput(f"--parent {parent}: has no memories with a background; name a run of "
                           f"train_retrofit.py, or one on top of it")
    if args.train_alpha and not any(name.endswith(".mlp.alpha") for name in model.state_dict()):
        raise smf.BadInput("--train-alpha: replacement has no alpha; leave it out")
    return parent, model, tokenizer


def join_processes():
    """Meet the other processes of torchrun; only the first one prints."""
    if smf.DEVICES[0] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    sys.stdout = sys.stdout if smf.RANK == 0 else open(os.devnull, "w")


def main(argv=None):
    args = parse(argv)
    if smf.WORLD_SIZE > 1:
        join_processes()
    run = args.out or Path("out", args.preset, f"{args.scorer}-seed{args.seed}")
    data = evaluation.load_data(args)
    parent, model, tokenizer = load_parent(args)
    plan, data_sha256 = evaluation.training_plan(model, tokenizer, data, args)
    plan, data_sha256 = train_retrofit.add_replay(plan, data_sha256, tokenizer, args)
    config = {"parent": os.path.relpath(parent, run), "steps": len(plan), "data": data_sha256,
              "parent_sha256": smf.run_sha256(parent)}
    with smf.start_run(run, config | {name: vars(args)[name] for name in DECISIVE}, args):
        if smf.WORLD_SIZE > 1:
            dist.barrier()  # the first process has written or refused it
        if not smf.finished(run):
            print(f"stage 2: {args.task}, {args.scorer}, {len(plan)} steps -> {run}")
            smf.finish_run(run, train(model, plan, run, args, tokenizer, data))
    if smf.RANK == 0:
        print(evaluation.report(run, data, args))
    if smf.WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    smf.script(main)
