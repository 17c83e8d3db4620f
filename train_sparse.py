"""Stage 2, Sparse Memory Finetuning: learn facts or a task in a few memory rows, then measure.

    python train_sparse.py --scorer tfidf                 # the embedded tiny model, both stages
    python train_sparse.py --scorer kl
    python train_sparse.py --scorer tfidf --train-scale   # +S: the alphas too
    python train_sparse.py --mode replacement --task medmcqa
    python train_sparse.py --fresh                        # without the training of stage 1
    python train_sparse.py --retrofit RUN_DIR             # from this run of train_retrofit.py
    python train_sparse.py --preset paper --scorer kl     # Qwen2.5-0.5B-Instruct, MedMCQA (hub)
    torchrun --nproc_per_node=2 train_sparse.py           # a share of each batch per process or GPU

Starts from the run of train_retrofit.py of the same mode and seed; makes it first if there is none,
but for torchrun.
"""

import os
import time
from pathlib import Path

import torch

import eval as evaluation
import smf
import train_retrofit
from smf import natural, positive, whole

# tiny: the study's choice for tfidf, README has the others'. paper: SmolLM2-135M's best in 150
# steps (README); less in more steps, as if rate times steps decided: see default_rate.
LEARNING_RATE = {
    "tiny": {"adamw": 0.5, "sgd": 3000.0},
    "paper": {"adamw": 8.0, "sgd": 6e6},
}
# paper: [Gupta26] for medmcqa; ours for facts, as often as SmolLM2-135M saw each (README).
EPOCHS = {"tiny": {"facts": 20, "medmcqa": 20}, "paper": {"facts": 15, "medmcqa": 3}}
FLAGS = smf.COMMON | train_retrofit.MEMORY | evaluation.EVALUATION | {
    "scorer": (("tfidf", "kl", "count", "random", "all"), "tfidf", "tfidf",
               "how to choose rows; count, random and all rows read are controls"),
    "top-t": (whole, 500, 500, "t: rows updated per memory and step [Lin25]"),
    "optimizer": (("adamw", "sgd"), "adamw", "adamw", "of the rows"),
    "lr": (positive, None, None, f"learning rate of the rows; none: {LEARNING_RATE}, paper: times "
                          f"150 / steps if there are more (ours)"),
    "train-scale": (bool, False, False, "+S: train the alphas too"),
    "scale-lr": (positive, 1e-2, 1e-2, "learning rate of the alphas (ours)"),
    "epochs": (whole, None, None, f"times that each example is seen; none: {EPOCHS}"),
    "steps": (whole, None, None, "steps instead of epochs"),
    "warmup": (natural, 10, 100, "steps of linear warm-up"),
    "fresh": (bool, False, False, "start from a fresh memory, that stage 1 did not train"),
    "retrofit": (Path, None, None, "stage-1 run to start from; none: that of this mode and seed"),
}


def stage_1(args):
    """The run of train_retrofit.py to start from; the default one is made if it is missing."""
    beside = args.out.parent if args.out else Path("out", args.preset)
    stage = "fresh" if args.fresh else "retrofit"
    run = args.retrofit or beside / f"{args.mode}-{stage}-seed{args.seed}"
    if args.retrofit is None and not (run / "memory.safetensors").exists():
        if smf.rank()[1] > 1:
            raise smf.Refused(f"torchrun: there is no retrofit in {run} yet; make it first, in one "
                              f"process, with train_retrofit.py{' --steps 0' * args.fresh}")
        print(f"no retrofit in {run} yet: running stage 1 first")
        flags = {name: args.given[name.replace("-", "_")]
                 for name, (kind, *_) in (smf.COMMON | train_retrofit.MEMORY).items()
                 if name.replace("-", "_") in args.given and kind is not bool} | {"out": run}
        flags = {name: ",".join(map(str, value)) if name == "layers" else value
                 for name, value in flags.items()}
        train_retrofit.main([f"--preset={args.preset}", "--resume", *["--steps=0"] * args.fresh,
                             *(f"--{name}={value}" for name, value in flags.items())])
    return run


def check_same(retrofit, config, args):
    """Refused if a flag contradicts the retrofit; with --retrofit, only flags given count."""
    names = ("mode", "dtype", "layers", "n_keys", "heads", "k_dim", "top_k")
    if config["kind"] != "retrofit":
        raise smf.Refused(f"--retrofit {retrofit}: is no run of train_retrofit.py; name one")
    asked = {name: getattr(args, name) for name in names} | {"model": smf.portable(args.model)}
    asked |= {name: args.given[name] for name in ("scale", "background", "oasst_data")
              if name in args.given}
    for name, value in asked.items():
        made = (config["arguments"] | config | config["memory"]).get(name)
        if value not in (made, None) and (name in args.given or args.retrofit is None):
            raise smf.Refused(f"--{name.replace('_', '-')} {value}: {retrofit} was made with "
                              f"{made}; ask for the same, or make another retrofit with "
                              f"train_retrofit.py --out DIR and name it here with --retrofit DIR")


def score_rows(scorer, memory, counts, seed):
    """Scores (N,) of the rows for the reads counts (N,) of a batch: two scorers, three controls."""
    if scorer == "tfidf":
        return smf.tfidf_scores(counts, memory.doc_freq, memory.num_batches)
    if scorer == "kl":
        return smf.kl_scores(counts, memory.background_counts)
    if scorer == "random":  # any rows that the batch read
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(counts), generator=generator).to(counts.device)
    return counts.float()  # count: the most read; all: t is then no limit


def select(memory, reads, masks, step, args):
    """Of what a batch read from one memory: the rows to update (t,) and their gradient (t, D)."""
    _, rows, weights, dy = smf.real_tokens(reads, masks)
    counts = smf.total(smf.count_reads(rows, len(memory.values)))  # (N,) of all processes
    scores = score_rows(args.scorer, memory, counts, 1_000_003 * args.seed + step)  # (N,)
    t = len(counts) if args.scorer == "all" else args.top_t
    selected, gradient = smf.row_gradient(rows, weights, dy, smf.top_rows(scores, counts, t))
    return selected, smf.total(gradient)  # only the selected rows' gradients travel


def touched(model, optimizers):
    """What differs from the retrofit, but the alphas: rows and values, see smf.load_rows."""
    tensors = {}
    for layer, memory in smf.memories(model).items():
        rows = optimizers[f"{layer}.values"].state["rows"].sort().values  # (rows touched,)
        tensors |= {f"{layer}.rows": rows, f"{layer}.values": memory.values[rows]}
    return tensors


def train(model, examples, steps, run, done, checkpoint, args):
    """What does this batch read, which of these rows are its own, and an update of those alone.
    -> what was learned, {name: tensor}."""
    tables = {f"{layer}.values": m.values for layer, m in smf.memories(model).items()}
    optimizers = {name: smf.RowOptimizer(table, args.optimizer) for name, table in tables.items()}
    scales = {f"{layer}.scale": wrapper.scale.requires_grad_()
              for layer, wrapper in smf.wrappers(model).items() if args.train_scale}
    for name, scale in scales.items():  # to its optimizer, alpha is a table of one row
        optimizers[name] = smf.RowOptimizer(scale.detach().view(1, 1))
    if checkpoint:
        with smf.restoring(run):
            smf.load_rows(model, checkpoint, run / "checkpoint.safetensors")
            for name, optimizer in optimizers.items():
                optimizer.load_state({part: checkpoint[f"optimizer.{name}.{part}"].to(args.device)
                                      for part in optimizer.state})

    def save(step):
        state = {f"optimizer.{name}.{part}": tensor for name, optimizer in optimizers.items()
                 for part, tensor in optimizer.state.items()}
        smf.save_checkpoint(run, step, state | scales | touched(model, optimizers))

    for step, batch, factor in smf.training(examples, steps, done, save, args, "stage 2"):
        start = time.perf_counter()
        with smf.record_reads(model) as tapes:
            loss, masks = smf.backward(model, batch, args.micro_batch_size)
        updates = {f"{layer}.values": select(memory, tapes[layer], masks, step, args)
                   for layer, memory in smf.memories(model).items()}  # once a whole batch
        for name, scale in scales.items():
            updates[name] = torch.tensor([0], device=args.device), smf.total(scale.grad).view(1, 1)
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in updates.values()]).item()
        smf.check_finite(loss, norm, step, save)
        for name, (rows, gradient) in updates.items():
            lr = factor * (args.scale_lr if name in scales else args.lr)
            optimizers[name].step(rows, gradient * min(1.0, smf.CLIP / (norm + 1e-12)), lr)
        model.zero_grad()
        smf.log_step(run, {"step": step, "loss": loss, "lr": factor * args.lr, "grad_norm": norm,
                           "rows": {layer: len(updates[f"{layer}.values"][0])
                                    for layer in smf.memories(model)}}, batch, start, args.device)
    return scales | touched(model, optimizers)


def check_enough(data, args):
    """Refused if the examples to learn from fill no batch."""
    if len(data.train) < args.batch_size:
        raise smf.Refused(f"--batch-size {args.batch_size}: only {len(data.train)} examples to "
                          f"learn; give less, or more of them")


def prepare(model, tokenizer, data, args):
    """-> the Examples to learn from, the number of steps; the same for SMF and the baselines. Sets
    args.epochs to its default."""
    evaluation.check_window(model, args)  # now, not after hours of training
    pairs = [(q.prompt, q.answer) for q in data.train]
    examples = smf.encode_all(model, tokenizer, pairs, args.max_length)
    args.epochs = args.epochs or EPOCHS[args.preset][args.task]
    steps = args.steps or args.epochs * (len(examples) // args.batch_size)
    if steps <= args.warmup:
        print(f"--warmup {args.warmup}: the learning rate still rises when the {steps} steps end")
    return examples, steps


def default_rate(steps, args):
    """The learning rate of the rows where --lr gives none."""
    rate = LEARNING_RATE[args.preset][args.optimizer]
    return rate * min(1.0, 150 / steps) if args.preset == "paper" else rate


def check_flags(args):
    """Refused if flags contradict each other, before anything long begins."""
    if args.scorer == "all" and "top_t" in args.given:
        raise smf.Refused("--top-t: --scorer all updates every row read; leave one of them out")
    if args.fresh and args.retrofit:
        raise smf.Refused("--fresh: means another start than --retrofit; leave one of them out")
    if args.train_scale and args.mode == "replacement":
        raise smf.Refused("--train-scale: --mode replacement has no alpha; leave it out")
    if args.retrofit is None:
        smf.find("--model", args.model, "model")


def main(argv=None):
    args = smf.parse(__doc__, FLAGS, argv)
    if args.retrofit and not args.fresh and "mode" not in args.given:
        args.mode = smf.read_config(args.retrofit).get("mode", args.mode)
    run = smf.run_directory(args, f"{args.mode}-{args.scorer}{'+s' * args.train_scale}"
                                  f"{'-fresh' * args.fresh}")
    check_flags(args)
    smf.join(args)
    data = evaluation.read_data(args)
    check_enough(data, args)
    retrofit = stage_1(args)
    config = smf.read_config(retrofit)
    check_same(retrofit, config, args)
    if run.resolve() == retrofit.resolve():
        raise smf.Refused(f"--out {run}: is the retrofit to start from; name another directory")
    model, tokenizer = smf.load(retrofit, args.device)
    if any(memory.num_batches == 0 for memory in smf.memories(model).values()):
        raise smf.Refused(f"--retrofit {retrofit}: without background statistics; make it again "
                          f"with train_retrofit.py --overwrite")
    examples, steps = prepare(model, tokenizer, data, args)
    args.lr = args.lr or default_rate(steps, args)
    with smf.first_alone():
        evaluation.base_run(run.parent, config)
        done, checkpoint = smf.begin_run(run, args, config | {
            "kind": "sparse", "training_data": smf.digest(examples),
            "retrofit": os.path.relpath(retrofit.resolve(), run.resolve()),
            "retrofit_fingerprint": smf.fingerprint(
                smf.read_tensors(retrofit / "memory.safetensors"))})
    if not smf.finished(run):
        print(f"stage 2: {steps} steps, {len(examples)} examples -> {run}")
        began = time.time()
        learned = train(model, examples, steps, run, done, checkpoint, args)
        if smf.rank()[0] == 0:
            smf.write_tensors(run / "memory.safetensors", learned)
            smf.end_run(run, "stage 2", began, args.device)
    if smf.rank()[0] == 0:
        print(evaluation.report(run, data, args))


if __name__ == "__main__":
    smf.script(main, several=True)
