"""What SMF is compared with: LoRA and full finetuning, on the same batches, loss and schedule.

    python baselines.py --method lora
    python baselines.py --method full

LoRA: [Hu21] arXiv 2106.09685. The loop is that of train_sparse.py, but for what is trained.
"""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
import smf
import train_retrofit

PRESETS = {
    "tiny": dict(evaluation.PRESETS["tiny"], model="tiny/model", max_length=128, save_every=100),
    "paper": dict(evaluation.PRESETS["paper"], model="Qwen/Qwen2.5-0.5B-Instruct", max_length=1024,
                  micro_batch_size=4, save_every=200),
}
# Of AdamW: tiny's and a real stream's are from results/README.md, the others are usual ones.
LEARNING_RATE = {
    "tiny stream": {"lora": 3e-4, "full": 3e-4}, "tiny": {"lora": 1e-3, "full": 2e-4},
    "paper stream": {"lora": 1e-4, "full": 2e-5}, "paper": {"lora": 3e-4, "full": 3e-5}}
SGD_RATE = 0.1  # on tiny's stream
DECISIVE = ("method", "task", "seed", "batch_size", "passes", "warmup", "ask_every", "optimizer",
            "lr", "replay")
LORA_RANK, ALPHA, DROPOUT = 16, 32, 0.05  # [Gupta26 section 3.3]; ALPHA is ours


class LoRALinear(nn.Module):
    """y = W x + ALPHA / LORA_RANK * B A dropout(x): W is frozen, B is 0 at the start [Hu21].
    Dropout is on where gradients are wanted, so not where the model is asked."""

    def __init__(self, linear):
        super().__init__()
        self.linear, device = linear, linear.weight.device
        self.A = nn.Parameter(torch.empty(LORA_RANK, linear.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, LORA_RANK, device=device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        low = F.dropout(x.float(), DROPOUT, torch.is_grad_enabled()) @ self.A.T  # (B, T, LORA_RANK)
        return self.linear(x) + (ALPHA / LORA_RANK * low @ self.B.T).to(x.dtype)  # (B, T, out)


def add_lora(model):
    """Put a LoRALinear over every projection of attention and MLP, and freeze all the rest."""
    model.requires_grad_(False)
    blocks = smf.decoder_blocks(model)
    for name, linear in list(blocks.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(blocks.get_submodule(parent), child, LoRALinear(linear))
    if not any(p.requires_grad for p in model.parameters()):
        raise smf.BadInput("--method lora: this model has no nn.Linear; use --method full")
    rest = sum(p.numel() for p in blocks.parameters() if not p.requires_grad and p.dim() > 2)
    if rest:
        print(f"WARNING: LoRA does not adapt {rest:,} weights of experts, which are no nn.Linear")


def train(model, plan, run, args, tokenizer, data):
    """AdamW or SGD on all that requires a gradient -> {name: parameter} of that."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = kind(trained.values(), weight_decay=0.0)
    done, state = smf.load_checkpoint(run)
    if state:
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    mixed = args.method == "full" and args.dtype == "bfloat16"  # the weights stay float32

    for step in tqdm(range(done, len(plan)), initial=done, total=len(plan)):
        asked = evaluation.ask_along(model, tokenizer, data, step, args)
        torch.manual_seed(1_000_003 * args.seed + step)  # of dropout
        with torch.autocast(args.device, torch.bfloat16, enabled=mixed):
            loss, _ = smf.backward(model, plan[step], args.micro_batch_size)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item()
        factor = 1.0 if args.task == "stream" else smf.learning_rate(step, len(plan), args.warmup)
        lr = factor * args.lr
        smf.log(run, step=step, loss=loss.item(), lr=lr, grad_norm=norm, **asked)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.save_every == 0:
            smf.save_checkpoint(run, step + 1, model=trained, optimizer=optimizer.state_dict())
    return trained


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="pretrained model: a directory or a hub name")
    add("--max-length", type=int, help="tokens of an example at most")
    add("--batch-size", type=int, default=16, help="examples of an optimizer step")
    add("--micro-batch-size", type=int, help="examples run at once (all)")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of batches, adapters and dropout")
    add("--device", choices=smf.DEVICES, default=smf.DEVICES[0])
    add("--dtype", choices=["float32", "bfloat16"], help="of the frozen base; with --method full, "
        "of its computations (bfloat16 on a GPU)",
        default="bfloat16" if smf.DEVICES[0] == "cuda" else "float32")
    add("--out", type=Path, help="directory of the run (out/PRESET/METHOD-seedSEED)")
    add("--method", choices=["lora", "full"], default="lora")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw")
    add("--lr", type=float, help=f"learning rate ({LEARNING_RATE}; of SGD {SGD_RATE})")
    evaluation.add_flags(parser)
    args = smf.parse(parser, PRESETS, argv)
    kind = args.preset + " stream" * (args.task == "stream")
    args.lr = args.lr or (SGD_RATE if args.optimizer == "sgd" else LEARNING_RATE[kind][args.method])
    return args


def main(argv=None):
    args = parse(argv)
    if smf.WORLD_SIZE > 1:
        raise smf.BadInput("torchrun: run baselines.py without it, in one process")
    run = args.out or Path("out", args.preset, f"{args.method}-seed{args.seed}")
    data, lora = evaluation.load_data(args), args.method == "lora"
    dtype = args.dtype if lora else "float32"
    model, tokenizer = smf.load_base(args.model, dtype, args.device)
    plan, data_sha256 = evaluation.training_plan(model, tokenizer, data, args)
    plan, data_sha256 = train_retrofit.add_replay(plan, data_sha256, tokenizer, args)
    config = {"base": smf.base_name(args.model), "parent_sha256": smf.weights_sha256(model),
              "dtype": "float32", "trained_in": args.dtype, "steps": len(plan),
              "data": data_sha256}
    if lora:  # dropout draws its masks a micro-batch at a time
        config["micro_batch_size"] = args.micro_batch_size
    with smf.start_run(run, config | {name: vars(args)[name] for name in DECISIVE}, args):
        if not smf.finished(run):
            print(f"{args.task}, {args.method}: {len(plan)} steps -> {run}")
            torch.manual_seed(args.seed)
            add_lora(model) if lora else model.requires_grad_(True)
            changed = train(model, plan, run, args, tokenizer, data)
            if lora:  # a delta of W is B A: the factor ALPHA / LORA_RANK goes into B
                changed = {name.replace(".A", ".weight:A").replace(".B", ".weight:B"):
                           p * (ALPHA / LORA_RANK if name.endswith(".B") else 1)
                           for name, p in changed.items()}
            smf.finish_run(run, changed)
    print(evaluation.report(run, data, args))


if __name__ == "__main__":
    smf.script(main)
