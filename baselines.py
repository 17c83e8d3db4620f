"""What SMF is compared with: LoRA and full finetuning, on the same batches, loss and schedule.

    python baselines.py --method lora                  # the embedded tiny model
    python baselines.py --method full
    python baselines.py --method lora --preset paper   # Qwen2.5-0.5B-Instruct, MedMCQA (hub)

The loop is that of train_sparse.py, but for what is trained [Gupta26 §3.3]. A run is config.json,
metrics.jsonl, eval.json, and lora.safetensors or, of full finetuning, a Hugging Face directory,
model/. smf.load merges LoRA into the weights. [Hu21]: arXiv 2106.09685, LoRA.
"""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import eval as evaluation
import smf
import train_sparse

# tiny: the study's choice. paper: usual for runs as long as its 11,250 steps, not measured there;
# SmolLM2-135M's best (README): facts 8e-4, 4e-5, MedMCQA 4e-4, 4e-5. Sweep all before comparing.
LEARNING_RATE = {
    "tiny": {"lora": 1e-3, "full": 2e-4},
    "paper": {"lora": 3e-4, "full": 3e-5},
}
FLAGS = smf.COMMON | evaluation.EVALUATION | {
    name: train_sparse.FLAGS[name] for name in ("epochs", "steps", "warmup")} | {
    "method": (("lora", "full"), "lora", "lora", "what is trained: adapters, or every weight"),
    "lr": (smf.positive, None, None, f"learning rate; none: {LEARNING_RATE} (ours)"),
}
R, ALPHA, DROPOUT = 16, 32, 0.05  # [Gupta26 §3.3]; alpha is ours


class LoRALinear(nn.Module):
    """y = W x + alpha / r * B A dropout(x) [Hu21 §4.1]: W (out, in) frozen, A (R, in), B (out, R).

    B = 0 at the start, so that the model starts as it was. A and B are float32. A new module is in
    training mode, so dropout is on until model.eval().
    """

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(R, linear.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, R, device=device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        low = F.dropout(x.float(), DROPOUT, self.training) @ self.A.T  # (B, T, R)
        return self.linear(x) + (ALPHA / R * low @ self.B.T).to(x.dtype)  # (B, T, out)


def add_lora(model):
    """Put a LoRALinear over every projection of attention and MLP, freeze the rest; -> model.

    Raises Refused if the blocks have no nn.Linear.
    """
    blocks = smf.decoder_blocks(model)
    linears = {name: m for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    if not linears:
        raise smf.Refused(f"--model: the blocks of {type(model).__name__} have no nn.Linear for "
                          f"LoRA; use --method full")
    model.requires_grad_(False)
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(blocks.get_submodule(parent), child, LoRALinear(linear))
    return model


def train(model, examples, steps, run, done, checkpoint, args):
    """AdamW on all that requires a gradient; the loop of train_sparse.py otherwise."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    if checkpoint:
        with smf.restoring(run):
            model.load_state_dict({name: checkpoint[name] for name in trained}, strict=False)
            smf.load_adamw(optimizer, trained, checkpoint)
    mixed = args.method == "full" and args.dtype == "bfloat16"  # the weights stay float32
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=mixed)

    def save(step):
        smf.save_checkpoint(run, step, smf.adamw_state(optimizer, trained) | trained)

    for step, batch, factor in smf.training(examples, steps, done, save, args, args.method):
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = factor * args.lr
        torch.manual_seed(1_000_003 * args.seed + step)  # dropout: a function of seed and step
        with autocast:
            loss, _ = smf.backward(model, batch, args.micro_batch_size)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), smf.CLIP).item()
        smf.check_finite(loss, norm, step, save)
        optimizer.step()
        optimizer.zero_grad()
        smf.log_step(run, {"step": step, "loss": loss, "lr": factor * args.lr, "grad_norm": norm},
                     batch, start, args.device)


def save_run(model, tokenizer, run, method):
    """What smf.load needs beside config.json: the adapters, or the whole model."""
    if method == "lora":
        adapters = {name: p for name, p in smf.decoder_blocks(model).named_parameters()
                    if p.requires_grad}
        smf.write_tensors(run / "lora.safetensors", adapters)
    else:
        smf.write_atomic(run / "model", lambda directory: [
            part.save_pretrained(directory) for part in (model, tokenizer)])


def main(argv=None):
    args = smf.parse(__doc__, FLAGS, argv)
    args.lr = args.lr or LEARNING_RATE[args.preset][args.method]
    run = smf.run_directory(args, args.method)
    data = evaluation.read_data(args)
    train_sparse.check_enough(data, args)
    full = args.method == "full"
    model, tokenizer = smf.load_base(args.model, "float32" if full else args.dtype, args.device)
    base = smf.base_fingerprint(model)
    torch.manual_seed(args.seed)
    if full:
        model.requires_grad_(True)
    else:
        add_lora(model)
    examples, steps = train_sparse.prepare(model, tokenizer, data, args)
    config = {"kind": args.method, "model": smf.portable(args.model), "dtype": args.dtype,
              "fingerprint": base, "training_data": smf.digest(examples)}
    if not full:  # dropout draws its masks a micro-batch at a time
        config |= {"lora_scale": ALPHA / R, "micro_batch": args.micro_batch_size}
    evaluation.base_run(run.parent, config)
    done, checkpoint = smf.begin_run(run, args, config)
    if not smf.finished(run):
        print(f"{args.method}: {steps} steps, {len(examples)} examples -> {run}")
        began = time.time()
        train(model, examples, steps, run, done, checkpoint, args)
        save_run(model, tokenizer, run, args.method)
        smf.end_run(run, args.method, began, args.device)
    print(evaluation.report(run, data, args))


if __name__ == "__main__":
    smf.script(main)
