"""Sparse Memory Finetuning (SMF): teach a pretrained language model by updating a few memory rows.

    x --> query --> n + n scores --> K of N = n * n rows --> weighted sum --> y --> gate --> Mem(x)
          (D)       2n sub-keys      exact top-K             of rows V[i]           added to the MLP

  1. Retrofit: add a product-key memory to a few blocks and train it on general text (stage 1).
  2. Background: count how often general text reads each row of its value table V.
  3. For each batch of what is to be learned (stage 2), count which rows that batch reads.
  4. Score them: read much by this batch, little by general text. Select the best t of each memory.
  5. Update the selected rows of V. Nothing else changes, bit for bit.

Papers: [Lin25] arXiv 2510.15103, Continual Learning via Sparse Memory Finetuning; [Gupta26]
2605.03229; [Lample19] 1907.05242, product keys; [Berges24] 2412.09764, memory layers at scale.
Shapes in comments: B examples, T tokens of each, D model width, H heads, K rows that a head reads,
n sub-keys per half, N = n * n rows, t selected rows, S tokens of a whole batch without padding.
"""

import fcntl
import json
import math
import os
import re
import resource
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import datasets
import huggingface_hub
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))  # which of how many processes this is: set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
DATE = "2024-07-26"  # of chat templates that tell it: today's would change the prompts every day
DEVICES = ["cuda"] * torch.cuda.is_available() + ["cpu"]  # the best first


class BadInput(ValueError):
    """Something that the user can mend. The scripts print it as one line and exit with code 2."""


@contextmanager
def refusing(what, remedy):
    """Whatever a missing, damaged or strange file leads to is BadInput that says what to do."""
    try:
        yield
    except (BadInput, PermissionError):
        raise
    except Exception as error:  # each library, and each sort of damage, has another
        raise BadInput(f"{what} ({error.__cause__ or error!r}); {remedy}") from error


# 1. The memory

class ProductKeyMemory(nn.Module):
    """A table of N = n_keys**2 value rows, of which each token reads the top_k best per head.
    The two halves of a query are scored against n sub-keys each. Row i * n + j has the score
    s1[i] + s2[j], so 2n scores search N rows [Lample19 section 3, Berges24 section 3]."""

    def __init__(self, d_model, n_keys=128, heads=4, k_dim=256, top_k=16):
        super().__init__()
        if not 1 <= top_k <= n_keys or k_dim % 2:
            raise BadInput(f"--top-k {top_k}: give 1 to --n-keys {n_keys}; --k-dim {k_dim}: even")
        self.n_keys, self.heads, self.top_k = n_keys, heads, top_k
        self.query = nn.Linear(d_model, heads * k_dim, bias=False)
        self.keys = nn.Parameter(torch.empty(heads, 2, n_keys, k_dim // 2))
        self.values = nn.Parameter(torch.empty(n_keys**2, d_model))  # V
        self.gate = nn.Linear(d_model, d_model, bias=False)  # W1
        self.out = nn.Linear(d_model, d_model, bias=False)  # W2
        nn.init.normal_(self.keys, std=(k_dim // 2) ** -0.5)  # scores of unit variance
        for weight in (self.values, self.query.weight, self.gate.weight, self.out.weight):
            nn.init.normal_(weight, std=d_model**-0.5)
        self.register_buffer("x_rms", torch.tensor(1.0))  # RMS of x: train_retrofit.py measures it
        self.register_buffer("scale", torch.tensor(1.0))  # gives Mem(x) the MLP's size: likewise
        self.register_buffer("query_mean", torch.zeros(heads * k_dim))
        self.register_buffer("query_var", torch.ones(heads * k_dim))
        self.register_buffer("doc_freq", torch.zeros(n_keys**2, dtype=torch.int64))
        self.register_buffer("background_counts", torch.zeros(n_keys**2, dtype=torch.int64))
        self.register_buffer("num_batches", torch.tensor(0))  # these 3: the background
        self.last = self.dy = None  # what the last forward pass read, until it is collected

    def lookup(self, x):
        """x (..., D) -> rows (..., H, K) and their weights (..., H, K), which sum to 1 over K.
        It is exact: the K best sums s1[i] + s2[j] use only the K best s1 and the K best s2."""
        q = self.query(x / self.x_rms)  # (..., H * k_dim)
        q = (q - self.query_mean) * (self.query_var + 1e-5).rsqrt()  # (..., H * k_dim)
        q = q.unflatten(-1, (self.heads, 2, -1))  # (..., H, 2, k_dim / 2)
        scores = torch.einsum("...hpd,hpnd->...hpn", q, self.keys)  # (..., H, 2, n)
        best, index = scores.topk(self.top_k)  # (..., H, 2, K) both
        sums = best[..., 0, :, None] + best[..., 1, None, :]  # (..., H, K, K)
        best, pair = sums.flatten(-2).topk(self.top_k)  # (..., H, K) both
        i = index[..., 0, :].gather(-1, pair // self.top_k)  # (..., H, K)
        j = index[..., 1, :].gather(-1, pair % self.top_k)  # (..., H, K)
        return i * self.n_keys + j, best.softmax(-1)

    def forward(self, x):
        """x (B, T, D) -> scale * W2 (y * SiLU(W1 x / x_rms)); y is the weighted sum of the rows."""
        dtype, x = x.dtype, x.to(self.values.dtype)
        with torch.autocast(x.device.type, enabled=False):  # a memory keeps its own precision
            rows, weights = self.lookup(x)  # (B, T, H, K) both
            bags = rows.flatten(-2).flatten(0, -2)  # (B * T, H * K)
            y = F.embedding_bag(bags, self.values, mode="sum",
                                per_sample_weights=weights.view_as(bags)).view_as(x)  # (B, T, D)
            self.last, self.dy = (x.detach(), rows, weights.detach()), None
            if torch.is_grad_enabled():  # V is frozen in stage 2: ask for dL/dy, and keep it
                y.requires_grad_().register_hook(lambda dy: setattr(self, "dy", dy))
            y = self.out(y * F.silu(self.gate(x / self.x_rms)))  # (B, T, D)
            return (self.scale * y).to(dtype)

    def collect(self):
        """-> x (B, T, D), rows, weights (B, T, H, K), dL/dy (B, T, D) of the last pass, once."""
        collected, self.last, self.dy = (*self.last, self.dy), None, None
        return collected

    @torch.no_grad()
    def track_queries(self, x, momentum):
        """Move the running mean and variance of the queries towards those of tokens x (S, D).
        Queries are normalised by them, or training can make all tokens read the same few rows
        [Lample19 section 4]. differs: there a batch in training is normalised by its own, so that
        micro-batches would change the result."""
        query = self.query(x / self.x_rms)  # (S, H * k_dim)
        self.query_mean.lerp_(query.mean(0), momentum)
        self.query_var.lerp_(query.var(0, correction=0), momentum)


# 2. Adding memories to a model

class AdditiveMemory(nn.Module):
    """h = MLP(x) + alpha * Mem(x): the pretrained MLP stays [Gupta26 section 3.1]."""

    def __init__(self, mlp, memory, alpha=0.01):
        super().__init__()
        self.mlp, self.memory = mlp, memory
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, x):
        return self.mlp(x) + self.alpha * self.memory(x)  # (B, T, D)


class ReplacementMemory(nn.Module):
    """h = Mem(x): the pretrained MLP is dropped [Gupta26 section 3.1]."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def forward(self, x):
        return self.memory(x)  # (B, T, D)


def decoder_blocks(model):
    """The transformer blocks: the first ModuleList whose members all have an .mlp."""
    for module in model.get_decoder().modules():  # not of an encoder of images
        if isinstance(module, nn.ModuleList) and module and all(hasattr(b, "mlp") for b in module):
            return module
    raise BadInput(f"--model: {type(model).__name__} has no blocks with a feed-forward named .mlp")


def memories(model):
    """{name: module} of the memories of a model, the lowest layer first."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, ProductKeyMemory)}


def memory_state(model):
    """{name: tensor} of all that retrofit adds to a model."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if ".mlp.memory." in name or name.endswith(".mlp.alpha")}


@torch.no_grad()
def check_mlps(model, mlps):
    """Refuse a model that does not call each of these once, as h (B, T, D) = mlp(x (B, T, D))."""
    called, shape = [], (1, 3, model.config.get_text_config().hidden_size)

    def note(mlp, x, more, h):
        if len(x) == 1 and not more and type(h) is torch.Tensor and x[0].shape == h.shape == shape:
            called.append(mlp)

    hooks = [mlp.register_forward_hook(note, with_kwargs=True) for mlp in mlps]
    with refusing(f"--model: {type(model).__name__} cannot get a memory", "take another model"):
        if any(p.is_meta for p in model.parameters()):
            raise ValueError("part of it is offloaded")
        try:
            model(torch.zeros(1, 3, dtype=torch.int64, device=model.device), use_cache=False)
        finally:
            [hook.remove() for hook in hooks]
        if called != mlps:
            raise ValueError("a block does not call h = mlp(x), once")


def retrofit(model, layers, mode="additive", alpha=0.01, **shape):
    """Add a memory to the blocks `layers` of a Hugging Face decoder, freeze the rest -> the model.
    mode: "additive" or "replacement". shape: n_keys, heads, k_dim, top_k."""
    blocks = decoder_blocks(model)
    if not layers or sorted(set(layers) & set(range(len(blocks)))) != sorted(layers):
        raise BadInput(f"--layers {layers}: name layers from 0 to {len(blocks) - 1}, each once")
    check_mlps(model, [blocks[layer].mlp for layer in sorted(layers)])
    model.requires_grad_(False)
    for layer in layers:
        mlp = blocks[layer].mlp
        new = ProductKeyMemory(model.config.get_text_config().hidden_size, **shape)
        new = AdditiveMemory(mlp, new, alpha) if mode == "additive" else ReplacementMemory(new)
        blocks[layer].mlp = new.to(next(mlp.parameters()).device)
    return model


# 3. Counting reads

@torch.no_grad()
def read_only(model, batch):
    """A forward pass of a batch, for its reads alone -> {name: memory.collect()}."""
    model(batch["input_ids"], attention_mask=batch["attention_mask"],
          logits_to_keep=batch["columns"][:1], use_cache=False)  # logits of one column will do
    return {name: memory.collect() for name, memory in memories(model).items()}


@torch.no_grad()
def collect_background(model, batches):
    """Add to each memory's record what general text reads of it [Gupta26 section 3.2, appendix A].
    doc_freq (N,): how many examples read a row. background_counts (N,): all reads of a row.
    num_batches: how many examples there were (each counts as a batch of one, as in the paper)."""
    for batch in batches:
        for name, (_, rows, _, _) in read_only(model, batch).items():
            memory = model.get_submodule(name)
            for read, mask in zip(rows, batch["attention_mask"].bool()):  # (T, H, K), (T,)
                counts = torch.bincount(read[mask].flatten(), minlength=len(memory.values))  # (N,)
                memory.doc_freq += counts > 0
                memory.background_counts += counts
                memory.num_batches += 1


# 4. Scoring rows: read much by this batch, little by general text

def tfidf_scores(counts, doc_freq, num_batches):
    """TF-IDF [Lin25 section 4]: c_i / sum(c) * log((B + 1) / (b_i + 1)) -> (N,)
    counts (N,): c, this batch's reads. doc_freq (N,): b. num_batches: B."""
    return counts / counts.sum() * torch.log((num_batches + 1) / (doc_freq + 1))  # (N,)


def kl_scores(counts, background_counts):
    """KL [Gupta26 section 3.2]: p_i log(p_i / q_i), p = c / sum(c), q = (C + 1) / sum(C + 1)
    counts (N,): c, this batch's reads. background_counts (N,): C (the + 1 is ours). -> (N,)"""
    p = counts / counts.sum()  # (N,)
    q = (background_counts + 1) / (background_counts + 1).sum()  # (N,)
    return torch.xlogy(p, p / q)  # (N,), 0 where p is 0


def top_rows(scores, counts, t):
    """Select the t best-scored of the rows that were read at all -> rows (t or fewer,), sorted."""
    read = counts.nonzero().squeeze(-1)  # (rows read,)
    order = scores[read].argsort(descending=True, stable=True)  # of equal scores, the lower row
    return read[order[:t]].sort().values  # (t,)


def harm(background_counts):
    """How a change of each row disturbs general text: its reads C_i, beside those of the mean row
    -> (N,). The + .1 is for text that the background has not seen. Ours: of all small steps with
    the same harm in all, sum(harm_i |step_i|**2), gradient_i / harm_i lowers the loss most."""
    return background_counts / background_counts.float().mean() + 0.1  # (N,)


# 5. Updating the selected rows and nothing else

def mask_gradient(values, mask):
    """Zero the gradient of values (N, D) where mask (N,) is False: a hook [Gupta26 section 3.2]."""
    return values.register_hook(lambda gradient: gradient * mask[:, None])  # (N, D)


# [Lin25 section 4] has the same gradient from the forward pass, V * mask + (V - V * mask).detach().
# With V in an ordinary optimizer neither freezes the other rows: AdamW still moves them, by weight
# decay and by the momentum of earlier steps. Both keep gradient and moments of the whole table.
# So here V has no gradient. That of a row is the sum of weight * dL/dy over its reads:


def row_gradient(selected, rows, weights, dy, n_rows):
    """The gradient of the rows `selected` (t,): what autograd would give for V there -> (t, D)
    Of all S tokens of a batch: rows and weights (S, H, K), dy = dL/dy (S, D)."""
    place = torch.full((n_rows,), -1, device=rows.device)  # (N,) row -> its place in `selected`
    place[selected] = torch.arange(len(selected), device=rows.device)
    gradient = dy.new_zeros(len(selected), dy.shape[-1])  # (t, D)
    for head in range(rows.shape[1]):  # one head at a time, to save memory
        at = place[rows[:, head]]  # (S, K)
        token, k = (at >= 0).nonzero(as_tuple=True)  # (reads of selected rows,) both
        gradient.index_add_(0, at[token, k], weights[token, head, k, None] * dy[token])
    return gradient


class RowOptimizer:
    """AdamW (without decay) or SGD for the rows of a table that a step selects; no other row moves.
    Each row has its own moments and its own age: to a row, the steps that did not select it never
    happened. The state grows with the rows ever selected. Gradients can be ~1e-8: eps is less."""

    def __init__(self, values, kind="adamw", betas=(0.9, 0.999), eps=1e-12):
        self.values, self.kind, self.betas, self.eps = values, kind, betas, eps
        self.index = torch.full((len(values),), -1, device=values.device)  # (N,) row -> its index
        self.number = 0  # of rows ever selected; there is room for more, of size R
        self.rows = self.index[:0]  # (R,) the index of a row is its place here
        self.age = values.new_zeros(0, 1)  # (R, 1)
        self.m = self.v = values.new_zeros(0, values.shape[1] * (kind == "adamw"))  # (R, D)

    def indices(self, rows):
        """The indices of these rows (t,); a row selected for the first time gets a new one."""
        new = rows[self.index[rows] < 0]  # (first-time rows,)
        first, self.number = self.number, self.number + len(new)
        if self.number > len(self.rows):  # twice the room: a step does not slow down as rows add up
            self.rows, self.m, self.v, self.age = (
                torch.cat([old, old.new_zeros(self.number, *old.shape[1:])])
                for old in (self.rows, self.m, self.v, self.age))
        self.rows[first:self.number] = new
        self.index[new] = torch.arange(first, self.number, device=new.device)
        return self.index[rows]  # (t,)

    @torch.no_grad()
    def step(self, rows, gradient, lr):
        """Update values[rows], rows (t,) without repeats, by gradient (t, D). lr: also (t, 1)."""
        at, (beta1, beta2) = self.indices(rows), self.betas  # (t,)
        if self.kind == "adamw":
            self.age[at] += 1
            self.m[at] = beta1 * self.m[at] + (1 - beta1) * gradient  # (t, D)
            self.v[at] = beta2 * self.v[at] + (1 - beta2) * gradient**2  # (t, D)
            root = (self.v[at] / (1 - beta2 ** self.age[at])).sqrt()  # (t, D)
            gradient = self.m[at] / (1 - beta1 ** self.age[at]) / (root + self.eps)  # (t, D)
        self.values[rows] -= lr * gradient

    def state_dict(self):
        """All that it needs to go on, the rows that it has changed included."""
        state = {name: getattr(self, name)[:self.number].clone()  # or torch.save stores all of it
                 for name in ("rows", "m", "v", "age")}
        return state | {"values": self.values[state["rows"]]}

    @torch.no_grad()
    def load_state_dict(self, state):
        state = {name: tensor.to(self.values.device) for name, tensor in state.items()}
        at = self.indices(state["rows"])  # 0, 1, 2, ...: all are new
        self.m[at], self.v[at], self.age[at] = state["m"], state["v"], state["age"]
        self.values[state["rows"]] = state["values"]


# 6. Runs. A run is what it changed on top of its parent: a pretrained model or another run. To
# load it is to load the parent and put these tensors in; to undo it, load the parent.

def write_atomic(path, write):
    """Call write(temporary path), then rename it: path is always the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several may measure a parent
    with refusing(f"{path}: cannot be written", "is the disk full?"):
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))


def read_json(path):
    with refusing(f"{path}: cannot be read", "name another, or delete it"):
        return dict(json.loads(path.read_text()))


def weights_sha256(model):
    """In bfloat16, so that it does not depend on the precision that the model is loaded in."""
    weights = (p.cpu().bfloat16().contiguous() for p in model.state_dict().values())
    each = (sha256(w.view(torch.uint8).numpy()).hexdigest() for w in weights)
    return sha256("".join(each).encode()).hexdigest()


def find(name, kind):
    """A "model" or "dataset": its directory, here or beside this file, else its name on the hub."""
    for path in (Path(name), ROOT / name):
        if name and path.exists():
            return str(path.resolve())
    if not huggingface_hub.constants.HF_HUB_OFFLINE:  # the libraries' own attempts take minutes
        getattr(huggingface_hub.HfApi(), f"{kind}_info")(name, timeout=10)
    return name


def load_base(name, dtype="float32", device="cpu"):
    """A pretrained model, frozen, and its tokenizer. Only safetensors are read, no code is run."""
    with refusing(f"--model {name}: cannot be loaded", "name a directory or a hub name of a causal "
                  "language model, or use --preset tiny"):
        path = find(name, "model")
        torch.backends.cuda.enable_cudnn_sdp(False)  # nan gradients: pytorch issue 196678
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"it lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}")
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        words, end = tokenizer("Who?")["input_ids"], tokenizer.eos_token_id
        used = {*tokenizer.get_vocab().values()} - special | {*prompt_ids(tokenizer, "Who?")[0]}
        if end is None or not words or (
                max(used | {*words, end}) >= model.get_input_embeddings().num_embeddings):
            raise ValueError("its tokenizer has tokens that the model lacks, no words, or no end")
        return model.to(device).requires_grad_(False).eval(), tokenizer


def base_name(name):
    """How config.json names a model: by its path in this repository, else in full."""
    path = Path(find(name, "model"))
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


@torch.no_grad()
def apply_delta(model, delta):
    """Put changed tensors into a model. NAME: all of it; NAME:rows and NAME:values: those rows of
    it; NAME:A and NAME:B: W + B A, as of LoRA. Raises if a tensor does not fit."""
    own = model.state_dict()  # shares memory with the model
    delta = {name: tensor.to(model.device) for name, tensor in delta.items()}
    for key, tensor in delta.items():
        name, _, part = key.partition(":")
        if part == "A":
            own[name] += delta[f"{name}:B"] @ tensor
        elif part == "rows":
            own[name][tensor] = delta[f"{name}:values"].view(len(tensor), own[name].shape[1])
        elif part == "" and tensor.shape == own[name].shape:
            own[name].copy_(tensor)
        elif part not in ("B", "values") or f"{name}:{'A' if part == 'B' else 'rows'}" not in delta:
            raise ValueError(f"{key} does not fit the model")


def finished(run):
    return Path(run, "delta.safetensors").exists()


def run_sha256(run):
    files = (Path(run, name).read_bytes() for name in ("config.json", "delta.safetensors"))
    return sha256(b"".join(files)).hexdigest()


def load(run, device="cpu"):
    """A run -> (model, tokenizer), ready for model.generate. BadInput if any part is not intact."""
    run, config = Path(run), read_json(Path(run, "config.json"))
    with refusing(f"{run}: cannot be loaded", "the command that made it finishes it, or, after you "
                  "delete it, makes it again"):
        open(run / "delta.safetensors").close()  # of no permission safetensors says "no such file"
        delta = load_file(run / "delta.safetensors")
        if "parent" in config:
            parent = Path(os.path.normpath(run / config["parent"]))
            model, tokenizer = load(parent, device)
            found = run_sha256(parent)
        else:
            model, tokenizer = load_base(config["base"], config["dtype"], device)
            found = weights_sha256(model)
        if found != config["parent_sha256"]:
            raise BadInput(f"{run}: its parent has changed; restore that, or make this run again")
        if "memory" in config:
            retrofit(model, **config["memory"])
            [delta[name] for name in memory_state(model)]  # raises if part of a memory is missing
        apply_delta(model, delta)
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ValueError("not all of its numbers are finite")
        return model.requires_grad_(False), tokenizer


@contextmanager
def start_run(run, config, args):
    """Write config.json, or check that it says the same; "flags", all arguments, may differ.
    Another process that makes the same run waits until this one leaves the context."""
    config = json.loads(json.dumps(config | {"date": DATE, "flags": vars(args)}, default=str))
    if RANK > 0:
        yield
        return
    file, others = run / "config.json", [path for path in run.glob("*") if path.suffix != ".tmp"]
    if not file.exists() and (others or run.is_file() or run.name == "base" and vars(args)):
        raise BadInput(f"--out {run}: is no run, or kept for the base; name another directory")
    run.mkdir(parents=True, exist_ok=True)
    lock = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{run}: another process makes it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        if not file.exists():
            write_json(file, config)
        old = read_json(file)
        other = [name for name in config if name != "flags" and config[name] != old.get(name)]
        if other:
            raise BadInput(f"--out {run}: was made with another {', '.join(other)}; give the same, "
                           f"name another directory, or delete this one")
        yield
    finally:
        os.close(lock)


def save_checkpoint(run, step, **state):
    """All that the steps after the first `step` depend on."""
    if RANK == 0:
        write_atomic(run / "checkpoint.pt", lambda path: torch.save((step, state), path))


def load_checkpoint(run):
    """-> how many steps are done, and the state after them, {} if there is none."""
    if not (run / "checkpoint.pt").exists():
        return 0, {}
    with refusing(f"{run}: its checkpoint is damaged", "delete the run"):
        step, state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:step]
    if RANK == 0:  # the steps after it will be repeated
        write_atomic(run / "metrics.jsonl", lambda path: path.write_text("".join(lines)))
    return step, state


def log(run, **metrics):
    """Add a line to metrics.jsonl, before the update: what is not finite must ruin nothing."""
    if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
        raise BadInput(f"--lr: loss or gradient is not finite, {metrics}; begin with a lower rate")
    if RANK == 0:
        with open(run / "metrics.jsonl", "a" if metrics["step"] else "w") as file:  # 0: anew
            file.write(json.dumps(metrics) + "\n")
        if metrics["step"] % 50 == 0:
            tqdm.write("  ".join(f"{k} {v:.4g}" if type(v) is float else f"{k} {v}"
                                 for k, v in metrics.items()))


def finish_run(run, delta):
    """Save what the run changed, {name: tensor}, and drop its checkpoint."""
    if RANK == 0:
        delta = {name: tensor.detach().cpu().contiguous() for name, tensor in delta.items()}
        write_atomic(run / "delta.safetensors", lambda path: save_file(delta, path))
        mode = (run / "config.json").stat().st_mode  # safetensors writes for the owner alone
        (run / "delta.safetensors").chmod(mode)
        [path.unlink() for path in run.glob("checkpoint.pt*")]  # and what a kill left of one


# 7. Examples, batches and the loss

DATED = ("{% macro strftime_now(f) %}{{ f.replace('%d', '26').replace('%b', 'Jul').replace('%B', "
         "'July').replace('%m', '07').replace('%Y', '2024') }}{% endmacro %}\n")  # always DATE
Example = namedtuple("Example", "ids start")  # tokens of prompt and answer; where the answer begins
FORMATS = {".jsonl": ("json", {}), ".json": ("json", {}), ".parquet": ("parquet", {}),
           ".csv": ("csv", {"keep_default_na": False}),
           ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
           ".txt": ("text", {"sample_by": "paragraph"})}


def load_rows(flag, name, split, columns, optional=(), required=True):
    """A split of a data set with these columns: a file, a directory or a hub name[:configuration].
    In a directory, its files are SPLIT.* and SPLIT-NUMBER*.*; a file is a train split. A row of a
    .txt is a paragraph, in the column text. [] if there is no such split, and none is required."""
    path, _, configuration = name.partition(":")
    with refusing(f"{flag} {name}: split {split} cannot be read",
                  f"name {', '.join(FORMATS)} with these columns: {', '.join(columns)}"):
        path, configuration = Path(find(path, "dataset")), configuration or None
        named = re.compile(rf"{split}(-\d.*)?" if path.is_dir() else ".*" * (split == "train"))
        files = [str(file) for file in ([path] if path.is_file() else sorted(path.glob("*")))
                 if file.suffix.lower() in FORMATS and named.fullmatch(file.stem)]
        if not (required or files) and (path.exists() or split not in
                                        datasets.get_dataset_split_names(str(path), configuration)):
            return []
        kinds = {Path(file).suffix.lower() for file in files}
        if len(kinds) > 1:
            raise ValueError(f"its files are of different kinds: {files}")
        kind, options = FORMATS[kinds.pop()] if files else (str(path), {})
        rows = datasets.load_dataset(kind, configuration, data_files=files or None,
                                     split="train" if files else split, **options)
        rows[0]  # raises if there is none
        print(f"{flag} {name}: {len(rows)} rows of {split}",
              f"in {', '.join(Path(file).name for file in files)}" * bool(files))
        return rows.select_columns([*columns, *(c for c in optional if c in rows.column_names)])


def prompt_ids(tokenizer, prompt):
    """The tokens before an answer, and the space, if any, that the answer begins with. Without a
    prompt, None, the tokens that the tokenizer puts before every text."""
    if prompt is None:
        ids = tokenizer("a")["input_ids"]
        return ids[:ids.index(tokenizer("a", add_special_tokens=False)["input_ids"][0])], ""
    if tokenizer.chat_template is None:
        return tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"], " "
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], chat_template=DATED + tokenizer.get_chat_template(),
        tokenize=False, add_generation_prompt=True, enable_thinking=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has its own
    return ids, "" if text[-1:].isspace() else " "


def encode(tokenizer, prompt, answer, max_length, end=True, before=""):
    """-> Example. Too long, the answer loses its end down to max_length / 2, then the prompt its
    beginning: so a chat template mostly stays whole. end: add the end token, as in training.
    before: what stands between prompt and answer, and is not learned."""
    prompt, space = prompt_ids(tokenizer, prompt)
    if before:
        prompt += tokenizer(space + before, add_special_tokens=False)["input_ids"]
        space = " "
    ids = tokenizer(space + answer, add_special_tokens=False)["input_ids"]
    ids = (ids + [tokenizer.eos_token_id] * end)[:max(max_length - len(prompt), max_length // 2)]
    prompt = prompt[-(max_length - len(ids)):]
    return Example(prompt + ids, len(prompt) or 1)  # nothing predicts the first token of all


def encode_all(tokenizer, texts, max_length):
    """Examples to learn of (prompt, answer), or (prompt, answer, before); after an answer without a
    prompt, or a part of it, there is no end token: it may go on. Says how many are cut."""
    examples = [encode(tokenizer, prompt, answer, max_length,
                       prompt is not None and not any(before), *before)
                for prompt, answer, *before in tqdm(texts, "tokenize", leave=False)]
    long = sum(len(ids) == max_length for ids, _ in examples)
    if long:
        print(f"{long} of {len(examples)} texts reach --max-length {max_length}: cut there")
    return examples


def collate(examples, device="cpu", length=0):
    """Pad Examples on the right -> input_ids, attention_mask (B, T), columns (P,), targets (B, P).
    columns: the positions where any example predicts a target; only there are logits computed.
    targets: the token predicted there, -100 for none. T is at least `length`."""
    T = max(length, *(len(example.ids) for example in examples))
    input_ids = torch.zeros(len(examples), T, dtype=torch.int64)  # (B, T)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)  # (B, T) both
    for b, (ids, start) in enumerate(examples):
        input_ids[b, :len(ids)], mask[b, :len(ids)] = torch.tensor(ids), 1
        labels[b, start:len(ids)] = torch.tensor(ids[start:])
    columns = (labels[:, 1:] != -100).any(0).nonzero().squeeze(-1)  # (P,)
    batch = {"input_ids": input_ids, "attention_mask": mask, "columns": columns,
             "targets": labels[:, columns + 1]}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def token_loss(model, batch):
    """-log p of every target of a collated batch -> (B, P), 0 where there is none."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
                   logits_to_keep=batch["columns"]).logits  # (B, P, vocabulary)
    # To measure, in float64: a sum over 151,936 tokens in float32 can be off by 1e-4 on a CPU.
    logits = logits.float() if torch.is_grad_enabled() else logits.double()
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100,
                           reduction="none").view_as(batch["targets"])  # (B, P)


def backward(model, examples, micro_batch_size):
    """Gradients of the mean loss of a batch -> the loss (1,); and {memory: x (S, D), rows and
    weights (S, H, K), dL/dy (S, D)} of its real tokens. The mean is over the target tokens of the
    whole batch. Each of several processes runs its share: sum loss, counts and gradients."""
    targets = sum(len(ids) - start for ids, start in examples)
    length = max(len(ids) for ids, _ in examples)  # one T for all: the same sums, to the last bit
    share, loss = examples[RANK::WORLD_SIZE], torch.zeros(1, device=model.device)  # (1,)
    reads = {name: [] for name in memories(model)}
    for i in range(0, len(share), micro_batch_size):
        batch = collate(share[i:i + micro_batch_size], model.device, length)
        part = token_loss(model, batch).sum() / targets
        part.backward()
        loss += part.detach()
        real = batch["attention_mask"].bool()  # (B, T)
        for name, memory in memories(model).items():
            reads[name].append([tensor[real] for tensor in memory.collect()])
    reads = {name: [torch.cat(part) for part in zip(*parts)] for name, parts in reads.items()}
    return loss, reads


def batches(examples, batch_size, seed, steps):
    """Shuffled: a batch for each step. Every epoch has its own order; similar lengths meet."""
    per_epoch, plan = len(examples) // batch_size, []
    for epoch in range(-(-steps // per_epoch)):
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(examples), generator=generator)[:per_epoch * batch_size]
        order = [j for pool in order.split(8 * batch_size)  # few pads: sort within 8 batches
                 for j in sorted(pool.tolist(), key=lambda j: len(examples[j].ids))]
        for i in torch.randperm(per_epoch, generator=generator).tolist():
            plan.append([examples[j] for j in order[i * batch_size:(i + 1) * batch_size]])
    return plan[:steps]


def stream_batches(sources, batch_size, passes):
    """A stream [Lin25 section 5]: `passes` steps for each source, in order, and then never again.
    Every batch holds batch_size rewordings of one source, the next ones in turn, or all it has."""
    return [[texts[(i * batch_size + k) % len(texts)] for k in range(min(batch_size, len(texts)))]
            for texts in sources for i in range(passes)]


def learning_rate(step, steps, warmup):
    """Factor of the learning rate: linear warm-up times a cosine to 0 [Gupta26 appendix A]."""
    return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


# 8. The command line

def parse(parser, presets, argv=None):
    """parser.parse_args(argv), with presets[--preset], {flag: value}, as the defaults."""
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # no usage
    if presets:
        parser.add_argument("--preset", choices=presets, default="tiny", help="a set of defaults")
        parser.set_defaults(**presets[parser.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    least = dict(seed=0, steps=0, epochs=0, warmup=0, query_momentum=0, replay=0, max_length=2,
                 eval_tokens=2)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not least.get(name, 1e-30) <= value < 2**40:
            parser.error(f"--{name.replace('_', '-')} {value}: is out of range")
    if "batch_size" in args:
        args.micro_batch_size = args.micro_batch_size or args.batch_size
    return args


def script(main):
    """Run main(); bad input ends it with one line and exit code 2, like argparse's own errors."""
    transformers.utils.logging.disable_progress_bar()  # of loading weights
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are told here, in one line
    began = time.perf_counter()
    try:
        main()
        peak = (torch.cuda.max_memory_allocated() / 2**30 if DEVICES[0] == "cuda" else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # from KiB, on Linux
        print(f"in all {time.perf_counter() - began:.0f} s, peak memory {peak:.2f} GiB")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
    except Exception as error:
        if not ("alloc" in str(error) or isinstance(error, (BadInput, OSError, ImportError))):
            raise  # a bug. Else: out of memory, bad input, a full disk, no matplotlib
        print(f"{Path(sys.argv[0]).name}:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
