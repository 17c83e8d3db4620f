"""Sparse Memory Finetuning (SMF): teach a pretrained language model by updating a few memory rows.

    x --> query --> n + n scores --> K of N = n*n rows --> gated sum --> y    beside the block's MLP
          (D)       two half-keys     exact top-K           V[rows]

The method in five lines:
  1. retrofit: add a product-key memory to a few blocks; train it on general text (stage 1);
  2. background: count how often general text reads each row of its value table V;
  3. for each batch of what is to be learned (stage 2), count which rows that batch reads;
  4. score them: read much here, little in general; keep the best t rows of each memory;
  5. update those rows of V. Nothing else changes, bit for bit.

Papers: [Lin25] arXiv 2510.15103, Continual Learning via Sparse Memory Finetuning; [Goyal26]
2604.05248; [Gupta26] 2605.03229. Memories: [Lample19] 1907.05242, product keys; [Berges24]
2412.09764, memory layers at scale. "ours" marks what they leave open.

Letters: B batch, T time, D model width, H heads, K reads per head, n sub-keys per half, N = n*n
rows, t rows updated per layer and step, S real tokens (no padding) of a whole batch.

Read it top to bottom: 1 the memory, 2 putting it into a model, 3 counting reads, 4 scoring rows,
5 updating those rows and nothing else (the trap), 6 saving and loading, 7 what the scripts share.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


class Refused(ValueError):
    """Bad input. The scripts print it as one line (what is wrong, what to do) and exit with 2."""


# ------------------------------------------------------------------------------------------------
# 1. The memory


class Read(NamedTuple):
    """What one forward pass read from one memory; after backward, y.grad is dL/dy."""
    x: torch.Tensor  # (B, T, D) what came in
    rows: torch.Tensor  # (B, T, H, K)
    weights: torch.Tensor  # (B, T, H, K)
    y: torch.Tensor  # (B, T, D) the weighted sum of the rows


class ProductKeyMemory(nn.Module):
    """N = n_keys**2 value rows; each token reads top_k per head [Lample19 §3, Berges24 §3].

    d_model: D. n_keys: n. heads: H. k_dim: width of a head's query, two halves of k_dim / 2.
    top_k: K. Kept in float32. Raises Refused if K is not in 1..n or k_dim is odd.
    """

    def __init__(self, d_model, n_keys=128, heads=4, k_dim=256, top_k=16):
        super().__init__()
        if not 1 <= top_k <= n_keys:
            raise Refused(f"--top-k {top_k}: a head reads between 1 and --n-keys {n_keys} rows")
        if heads < 1 or k_dim < 2 or k_dim % 2:
            raise Refused(f"--heads {heads} --k-dim {k_dim}: give a head or more, an even k_dim")
        self.n_keys, self.heads, self.top_k = n_keys, heads, top_k
        self.query = nn.Linear(d_model, heads * k_dim, bias=False)  # W_q
        self.keys = nn.Parameter(torch.empty(heads, 2, n_keys, k_dim // 2))  # K1, K2 of each head
        self.values = nn.Parameter(torch.empty(n_keys**2, d_model))  # V
        self.gate = nn.Linear(d_model, d_model, bias=False)  # W1
        self.out = nn.Linear(d_model, d_model, bias=False)  # W2
        nn.init.normal_(self.keys, std=(k_dim // 2) ** -0.5)  # scores of unit variance
        for weight in (self.values, self.query.weight, self.gate.weight, self.out.weight):
            nn.init.normal_(weight, std=d_model**-0.5)
        self.register_buffer("query_mean", torch.zeros(heads * k_dim))
        self.register_buffer("query_var", torch.ones(heads * k_dim))
        rows = torch.zeros(n_keys**2, dtype=torch.int64)  # (N,)
        self.register_buffer("doc_freq", rows)  # b, see collect_background
        self.register_buffer("background_counts", rows.clone())  # C
        self.register_buffer("num_batches", torch.tensor(0))  # B
        self.tape = None  # see record_reads

    def lookup(self, x):
        """x (..., D) -> rows (..., H, K) int64; weights (..., H, K), which sum to one over K.

        Exact: the K best sums s1[i] + s2[j] use the K best s1 and the K best s2 [Lample19 §3].
        """
        q = (self.query(x) - self.query_mean) * (self.query_var + 1e-5).rsqrt()  # (..., H * k_dim)
        q = q.unflatten(-1, (self.heads, 2, -1))  # (..., H, 2, k_dim / 2)
        scores = torch.einsum("...hpd,hpnd->...hpn", q, self.keys)  # (..., H, 2, n)
        best, index = scores.topk(self.top_k)  # (..., H, 2, K) both
        sums = best[..., 0, :, None] + best[..., 1, None, :]  # (..., H, K, K)
        best, pair = sums.flatten(-2).topk(self.top_k)  # (..., H, K) both
        i1 = index[..., 0, :].gather(-1, pair // self.top_k)  # (..., H, K)
        i2 = index[..., 1, :].gather(-1, pair % self.top_k)  # (..., H, K)
        return i1 * self.n_keys + i2, best.softmax(-1)  # (..., H, K) both

    def forward(self, x):
        """x (B, T, D) -> W2 (y * SiLU(W1 x)), y = sum of weight * V[row] [Berges24 §3]."""
        dtype, x = x.dtype, x.float()  # (B, T, D)
        rows, weights = self.lookup(x)  # (B, T, H, K) both
        bags = rows.flatten(-2).flatten(0, -2)  # (B * T, H * K)
        y = F.embedding_bag(bags, self.values, per_sample_weights=weights.view_as(bags), mode="sum")
        y = y.view_as(x)  # (B * T, D) -> (B, T, D)
        if self.tape is not None:
            if torch.is_grad_enabled():  # with V frozen, the lowest y must ask for its dL/dy
                y.requires_grad_().retain_grad()
            self.tape.append(Read(x.detach(), rows, weights.detach(), y))
        return self.out(y * F.silu(self.gate(x))).to(dtype)  # (B, T, D)

    @torch.no_grad()
    def track_queries(self, x, momentum):
        """Move the query's mean and variance towards those of the real tokens x (S, D) of a batch.

        Without a batch normalisation of the query, training can make all tokens read the same few
        rows [Lample19 §4]. momentum: 0 keeps the statistics, 1 replaces them.
        # differs: normalised by these running statistics always, in training too; so padding,
        # micro-batches and evaluation change nothing.
        """
        query = self.query(x)  # (S, H * k_dim)
        self.query_mean.lerp_(query.mean(0), momentum)
        self.query_var.lerp_(query.var(0, correction=0), momentum)


# ------------------------------------------------------------------------------------------------
# 2. Putting memories into a model


class AdditiveMemory(nn.Module):
    """h = MLP(x) + alpha * Mem(x); the pretrained MLP stays; alpha is `scale` [Gupta26 §3.1]."""

    def __init__(self, mlp, memory, scale=0.01):
        super().__init__()
        self.mlp, self.memory = mlp, memory
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x):
        return self.mlp(x) + self.scale * self.memory(x)  # (B, T, D)


class ReplacementMemory(nn.Module):
    """h = Mem(x): the pretrained MLP is dropped [Gupta26 §3.1]."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def forward(self, x):
        return self.memory(x)  # (B, T, D)


def decoder_blocks(model):
    """The blocks of a Hugging Face decoder: its first ModuleList whose members all have an .mlp."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module and all(hasattr(b, "mlp") for b in module):
            return module
    raise Refused(f"--model: {type(model).__name__} has no blocks with a feed-forward named .mlp")


def wrappers(model):
    """{layer: its AdditiveMemory or ReplacementMemory}, the lowest first."""
    return {layer: block.mlp for layer, block in enumerate(decoder_blocks(model))
            if isinstance(block.mlp, (AdditiveMemory, ReplacementMemory))}


def memories(model):
    """{layer: its ProductKeyMemory}, the lowest first."""
    return {layer: wrapper.memory for layer, wrapper in wrappers(model).items()}


def retrofit(model, layers, mode="additive", scale=0.01, **memory_shape):
    """Put a memory into the blocks `layers` (0-based) of a Hugging Face decoder, freeze the rest.

    mode: "additive" or "replacement". scale: alpha at the start, the papers' 0.01 unless given (the
    scripts give 1). memory_shape: n_keys, heads, k_dim, top_k. Changes the model and returns it.
    Raises Refused on an unknown mode or layer.
    """
    blocks = decoder_blocks(model)
    if mode not in ("additive", "replacement"):
        raise Refused(f"--mode {mode}: choose additive or replacement")
    if len(set(layers)) < max(len(layers), 1) or not set(layers) <= set(range(len(blocks))):
        raise Refused(f"--layers {layers}: name layers from 0 to {len(blocks) - 1}, each once")
    if wrappers(model):
        raise Refused(f"--layers {layers}: this model has memories already; load it without them")
    model.requires_grad_(False)
    for layer in layers:
        mlp = blocks[layer].mlp
        memory = ProductKeyMemory(model.config.get_text_config().hidden_size, **memory_shape)
        additive = mode == "additive"
        new = AdditiveMemory(mlp, memory, scale) if additive else ReplacementMemory(memory)
        blocks[layer].mlp = new.to(next(mlp.parameters()).device)
    return model


# ------------------------------------------------------------------------------------------------
# 3. Counting reads


@contextmanager
def record_reads(model):
    """Within this block every forward pass leaves a Read: yields {layer: [Read, ...]}.

    Outside of it nothing is kept: generation and evaluation cannot leak into the counts.
    """
    tapes = {layer: [] for layer in memories(model)}
    for layer, memory in memories(model).items():
        memory.tape = tapes[layer]
    try:
        yield tapes
    finally:
        for memory in memories(model).values():
            memory.tape = None


def real_tokens(reads, masks):
    """Join the micro-batches of one batch and leave the padding out.

    reads: list of Read. masks: their attention masks, each (B, T). -> x (S, D), rows (S, H, K),
    weights (S, H, K), dy = dL/dy (S, D), None if there was no backward.
    """
    trained = [read for read in reads if read.y.grad is not None]
    reads = trained or reads  # gradient checkpointing leaves two Reads of a pass, one with gradient
    assert len(reads) == len(masks), "one mask for each forward pass"
    tensors = [read._replace(y=read.y.grad if trained else read.y) for read in reads]
    x, rows, weights, dy = (torch.cat([tensor[mask.bool()] for tensor, mask in zip(column, masks)])
                            for column in zip(*tensors))
    return x, rows, weights, dy if trained else None


def count_reads(rows, n_rows):
    """c: how often each of the n_rows = N rows occurs in `rows`, of any shape -> (N,) int64."""
    return torch.bincount(rows.flatten(), minlength=n_rows)  # (N,)


@torch.no_grad()
def read_only(model, batch):
    """One forward pass of a collated batch for its reads alone -> {layer: [Read]}."""
    with record_reads(model) as tapes:
        model(batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1,
              use_cache=False)  # of the logits, only the last
    return tapes


@torch.no_grad()
def collect_background(model, batches):
    """Record in each memory what general text reads of it [Gupta26 §3.2, App. A].

    batches: of collate (part 7): {"input_ids": (B, T), "attention_mask": (B, T), ...}. Sets
    doc_freq (N,), b_i: how many examples read row i; background_counts (N,), C_i: all reads of it;
    num_batches, B: how many examples there were.
    # differs: examples run together, for speed, but each counts as a batch of one, as in the paper.
    """
    for memory in memories(model).values():
        for buffer in (memory.doc_freq, memory.background_counts, memory.num_batches):
            buffer.zero_()
    for batch in batches:
        tapes = read_only(model, batch)
        for layer, memory in memories(model).items():
            for rows, mask in zip(tapes[layer][0].rows, batch["attention_mask"].bool()):
                counts = count_reads(rows[mask], len(memory.values))  # (N,)
                memory.doc_freq += counts > 0
                memory.background_counts += counts
                memory.num_batches += 1


# ------------------------------------------------------------------------------------------------
# 4. Scoring rows: read much by this batch, little in general


def tfidf_scores(counts, doc_freq, num_batches):
    """TF-IDF [Lin25 §3]: (c_i / sum c) * log((B + 1) / (b_i + 1)).

    counts (N,): c, this batch's reads. doc_freq (N,): b. num_batches: B. -> (N,)
    """
    return counts / counts.sum() * torch.log((num_batches + 1) / (doc_freq + 1))  # (N,)


def kl_scores(counts, background_counts):
    """KL [Gupta26 §3.2]: p_i log(p_i / q_i), p = c / sum c, q = (C + 1) / sum (C + 1).

    counts (N,): c, this batch's reads. background_counts (N,): C. -> (N,). The add-one is ours.
    """
    p = counts / counts.sum()  # (N,)
    q = (background_counts + 1) / (background_counts + 1).sum()  # (N,)
    return torch.xlogy(p, p / q)  # (N,) 0 where a row is not read


def top_rows(scores, counts, t):
    """The t best of the rows that were read (of equal scores, the lower row) -> bool (N,).

    Exactly min(t, rows read) are True. scores, counts (N,). Raises Refused if t < 1.
    """
    if t < 1:
        raise Refused(f"--top-t {t}: update at least one row")
    read = counts.nonzero().squeeze(-1)  # (rows read,)
    best = read[scores[read].argsort(descending=True, stable=True)[:t]]  # (min(t, rows read),)
    return torch.zeros_like(counts, dtype=torch.bool).index_fill_(0, best, True)  # (N,)


# ------------------------------------------------------------------------------------------------
# 5. Updating the selected rows and nothing else: the trap
#
# The papers mask the gradient of V with a hook. It is two lines:


def mask_gradient(values, mask):
    """The papers' hook [Lin25 §3]: zero the gradient of values (N, D) where mask (N,) is False."""
    return values.register_hook(lambda gradient: gradient * mask[:, None])  # (N, D)


# With V in an ordinary optimizer this does NOT freeze the other rows. AdamW moves a row whose
# gradient is zero: by weight decay, at every step, and by the momentum left from earlier steps that
# did select it (test_smf.py shows both). It also keeps gradient and moments of the whole table.
#
# So here V is frozen as far as autograd knows. For y = sum_r weight_r * V[r], the gradient of a row
# is the sum of weight * dL/dy over its reads, and Read holds all of that. row_gradient adds it up
# for the selected rows alone, RowOptimizer keeps moments for the rows ever selected alone, and what
# grows with N in a step are a few vectors (N,), such as the counts, and nothing of size N * D.


def row_gradient(rows, weights, dy, mask):
    """The gradient of the selected rows: what autograd would give for V, times the mask.

    rows, weights (S, H, K), dy (S, D): see real_tokens. mask (N,) bool.
    -> selected (t,), the rows in rising order, and their gradient (t, D).
    """
    selected = mask.nonzero().squeeze(-1)  # (t,)
    line = mask.cumsum(0) - 1  # (N,) where a selected row stands in `selected`
    gradient = dy.new_zeros(len(selected), dy.shape[-1])  # (t, D)
    for head in range(rows.shape[1]):  # head by head, to spare memory
        token, read = mask[rows[:, head]].nonzero(as_tuple=True)  # (R,) reads of selected rows
        share = weights[token, head, read, None] * dy[token]  # (R, D)
        gradient.index_add_(0, line[rows[token, head, read]], share)  # (t, D)
    return selected, gradient


class RowOptimizer:
    """AdamW or SGD for the rows of one table that a step selects; all others stay bit-identical.

    Lazy moments: a row's moments and, for AdamW, its age, the number of steps that selected it,
    advance only when it is selected, and bias correction uses that age. To a row, the steps that
    passed it over never happened; when first selected, it moves as at Adam's first step.
    kind: "adamw" or "sgd"; weight decay is decoupled in both. eps: ours; row gradients can be ~1e-8
    (alpha scales them), and the usual 1e-8 would swallow them; added outside of the root, as torch.
    """

    def __init__(self, values, kind="adamw", betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0,
                 momentum=0.0):
        self.values, self.kind, self.betas, self.eps = values, kind, betas, eps
        self.weight_decay, self.momentum = weight_decay, momentum
        self.line = torch.full((len(values),), -1, device=values.device)  # (N,) row -> its line
        none = values.detach()[:0]  # (0, D)
        self.state = {"rows": self.line[:0], "m": none}
        if kind == "adamw":
            self.state |= {"age": none[:, :1], "v": none}

    def load_state(self, state):
        """Go on from a .state that was saved."""
        self.state = state
        self.line[state["rows"]] = torch.arange(len(state["rows"]), device=self.line.device)

    def lines(self, rows):
        """The lines of these rows (t,) in the state; rows selected for the first time get zeros."""
        new = rows[self.line[rows] < 0]  # (first-time rows,)
        if not len(new):
            return self.line[rows]  # (t,)
        self.line[new] = len(self.state["rows"]) + torch.arange(len(new), device=new.device)
        for name, old in self.state.items():
            fresh = new if name == "rows" else old.new_zeros(len(new), old.shape[1])
            self.state[name] = torch.cat([old, fresh])  # (rows ever selected, ...)
        return self.line[rows]  # (t,)

    @torch.no_grad()
    def step(self, rows, gradient, lr):
        """Update values[rows], rows (t,) without repeats, by their gradient (t, D)."""
        at, (beta1, beta2) = self.lines(rows), self.betas  # (t,)
        m = self.state["m"]
        if self.kind == "sgd":
            m[at] = update = self.momentum * m[at] + gradient  # (t, D)
        else:
            age, v = self.state["age"], self.state["v"]
            age[at] += 1  # (t, 1)
            m[at] = beta1 * m[at] + (1 - beta1) * gradient  # (t, D)
            v[at] = beta2 * v[at] + (1 - beta2) * gradient**2  # (t, D)
            root = (v[at] / (1 - beta2 ** age[at])).sqrt()  # (t, D)
            update = m[at] / (1 - beta1 ** age[at]) / (root + self.eps)  # (t, D)
        self.values[rows] -= lr * (update + self.weight_decay * self.values[rows])  # (t, D)


# ------------------------------------------------------------------------------------------------
# 6. Saving and loading: safetensors and JSON only; a file appears whole or not at all


def sync(path):
    """Have the disk keep a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_atomic(path, write):
    """Call write(temporary path), then rename: whatever happens, path is the old file or the new.

    path: a file or a flat directory. Raises Refused, the old one intact, if the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        for file in [*temporary.glob("*"), temporary]:
            sync(file)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        remove(temporary)
        raise Refused(f"{path}: cannot be written ({error}); what was there before is as it was. "
                      f"Make room, then --resume") from None


def write_json(path, value):
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def read_json(path):
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: cannot be read ({error}); name a run of this project") from None


def write_tensors(path, tensors):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary))


def read_tensors(path):
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{path}: cannot be read ({error}); make it again, --overwrite") from None


def out_of_memory(error):
    """Whether an error is that of any device without room, which is no fault of a run or model."""
    full = isinstance(error, RuntimeError) and "alloc" in str(error).lower()
    return full or isinstance(error, MemoryError)


@contextmanager
def restoring(source):
    """Refused for the errors that tensors and settings raise where they do not fit the model."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise Refused(f"{source}: its config.json and tensors do not fit each other ({error!r}); "
                      f"make this run again, --overwrite") from None


def memory_state(model):
    """{name: tensor} of all that the retrofit added, and of nothing that was pretrained."""
    return {f"{layer}.{name}": tensor for layer, wrapper in wrappers(model).items()
            for name, tensor in wrapper.state_dict().items() if not name.startswith("mlp.")}


@torch.no_grad()
def load_memory(model, tensors, source):
    """Copy a memory_state into a retrofitted model; Refused if names, shapes or types differ."""
    own = memory_state(model)
    saved = {name: tensor for name, tensor in tensors.items() if name[:1].isdigit()}
    if ({name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()}
            != {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}):
        raise Refused(f"{source}: its tensors do not fit the model and memory of its config.json")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


@torch.no_grad()
def load_rows(model, tensors, source):
    """Put what a sparse run learned into its retrofit: the rows it touched, alphas if trained.

    tensors: of each layer rows (r,), values (r, D) and perhaps scale (). All other rows stay.
    """
    for layer, wrapper in wrappers(model).items():
        table, scale = wrapper.memory.values, getattr(wrapper, "scale", None)
        rows, values = (tensors.get(f"{layer}.{part}", torch.tensor(0.0))  # missing: does not fit
                        for part in ("rows", "values"))
        fits = rows.dtype == torch.int64 and values.shape == (*rows.shape[:1], table.shape[1])
        if not fits or not torch.isin(rows, torch.arange(len(table))).all():
            raise Refused(f"{source}: its rows do not fit the retrofit that its config.json names")
        table[rows.to(table.device)] = values.to(table.device)
        if f"{layer}.scale" in tensors:
            scale.copy_(tensors[f"{layer}.scale"])


def fingerprint(tensors):
    """SHA-256 of {name: tensor}, to know a retrofit again."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def digest(value):
    """SHA-256 of a value as JSON, to know data again."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def base_fingerprint(model):
    """fingerprint of a pretrained model, in bfloat16, so that any --dtype gives the same."""
    return fingerprint({name: p.bfloat16() for name, p in model.named_parameters()})


ROOT = Path(__file__).resolve().parent


def local(name):
    """The path of that name, here or beside smf.py; None if there is none."""
    return next((path.resolve() for path in (Path(name), ROOT / name) if path.exists()), None)


def portable(name):
    """A model's name for config.json: relative to this repository if within it, else absolute."""
    path = local(name)
    if path is None:
        return name  # of the hub
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def find(flag, name, kind):
    """A "model" or "dataset" -> its directory, or its name on the hub; Refused if neither is."""
    if not name:
        raise Refused(f"{flag} is empty; name a directory, or a {kind} on the hub")
    if local(name):
        return str(local(name))
    if not huggingface_hub.constants.HF_HUB_OFFLINE:  # offline, the libraries use their cache
        try:
            getattr(huggingface_hub.HfApi(), f"{kind}_info")(name, timeout=10)
        except Exception as error:  # network, name, permission: the remedy is the same
            raise Refused(f"{flag} {name}: no such directory, and not to be had from the hub "
                          f"({error}); name a local directory, or use --preset tiny, "
                          f"which needs no network") from None
    return name


def load_base(name, dtype="float32", device="cpu"):
    """A pretrained model, frozen, and its tokenizer, from a directory or the hub: safetensors and
    JSON, no code and no pickle of strangers."""
    path, safe = find("--model", name, "model"), {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **safe)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype),
                                                     use_safetensors=True, **safe)
        end, known = tokenizer.eos_token_id, model.get_input_embeddings().num_embeddings
        if not tokenizer("Who?")["input_ids"] or end is None or end >= known:
            raise ValueError("its tokenizer knows no word, or no end token that the model knows")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise Refused(f"--model {name}: cannot be loaded ({error}); name a directory "
                      f"or hub name of a Hugging Face causal language model") from None
    return model.to(device).requires_grad_(False).eval(), tokenizer


# What each kind of run is when it is finished; base is the pretrained model as it came.
WEIGHTS = {"retrofit": "memory.safetensors", "sparse": "memory.safetensors",
           "lora": "lora.safetensors", "full": "model", "base": "config.json"}


def read_config(run_dir):
    """config.json of a run; Refused unless it has all that load needs."""
    path = Path(run_dir, "config.json")
    config = read_json(path)
    needed = {"kind": str, "model": str, "dtype": str, "fingerprint": str}
    needed |= {"retrofit": {"layers": list, "mode": str, "memory": dict},
               "sparse": {"layers": list, "mode": str, "memory": dict, "retrofit": str,
                          "retrofit_fingerprint": str},
               "lora": {"lora_scale": float}}.get(config.get("kind"), {})
    if config.get("kind") not in WEIGHTS:
        raise Refused(f"{path}: is of no run of this project; name one")
    for name, kind in needed.items():
        if not isinstance(config.get(name), kind):
            raise Refused(f"{path}: {name} is missing or wrong; make this run again")
    return config


def weights_path(run_dir):
    """The file, or directory, that a run is finished with."""
    return Path(run_dir, WEIGHTS[read_config(run_dir)["kind"]])


def finished(run_dir):
    """Whether a run is there and came to its end."""
    return Path(run_dir, "config.json").exists() and weights_path(run_dir).exists()


@torch.no_grad()
def merge_lora(model, tensors, scale, source):
    """W + scale * B A for every projection of a base model; see baselines.LoRALinear."""
    linears = {name: module for name, module in decoder_blocks(model).named_modules()
               if isinstance(module, nn.Linear)}
    r = next((len(tensor) for name, tensor in tensors.items() if name.endswith(".A")), 0)
    own = {f"{name}.A": (r, linear.in_features) for name, linear in linears.items()}
    own |= {f"{name}.B": (linear.out_features, r) for name, linear in linears.items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != own:
        raise Refused(f"{source}: its tensors do not fit the model of its config.json")
    for name, linear in linears.items():
        A, B = (tensors[f"{name}.{part}"].to(model.device) for part in "AB")  # (r, in), (out, r)
        linear.weight += scale * B @ A  # (out, in)


def rebuild(run_dir, config, device):
    """What load returns, of a run that nobody has tampered with."""
    kind, path = config["kind"], Path(run_dir, WEIGHTS[config["kind"]])
    if kind == "sparse":
        start = Path(os.path.normpath(Path(run_dir, config["retrofit"])))
        made = read_config(start) if finished(start) else {}
        same = all(made.get(name) == ("retrofit" if name == "kind" else config[name])
                   for name in ("kind", "layers", "mode", "memory"))
        if not same or fingerprint(
                read_tensors(start / WEIGHTS["retrofit"])) != config["retrofit_fingerprint"]:
            raise Refused(f"{run_dir}: the retrofit {start} is missing or another than that which "
                          f"this run started from; restore it, or make the run again")
        model, tokenizer = load(start, device)
        load_rows(model, read_tensors(path), path)
        return model, tokenizer
    full = kind == "full"
    name = str(path.resolve()) if full else config["model"]
    dtype = "float32" if kind in ("lora", "full") else config["dtype"]
    model, tokenizer = load_base(name, dtype, device)
    if not full and base_fingerprint(model) != config["fingerprint"]:
        raise Refused(f"{run_dir}: {name} is not the model that this run was made of; restore "
                      f"it, or make the run again")
    if kind == "retrofit":
        retrofit(model, config["layers"], config["mode"], **config["memory"])
        load_memory(model, read_tensors(path), path)
    if kind == "lora":
        merge_lora(model, read_tensors(path), config["lora_scale"], path)
    return model, tokenizer


def load(run_dir, device="cpu"):
    """A finished run from its directory -> (model, tokenizer), ready for model.generate.

    Needs the base model that config.json names and, for a sparse run, the retrofit. A base that was
    trained, by full finetuning or merged LoRA, stays float32, as it was trained. Raises Refused if
    anything is missing, another than it was, does not fit or is not finite.
    """
    config = read_config(run_dir)
    if not finished(run_dir):
        raise Refused(f"{run_dir}: is unfinished; end it first, by the same command with --resume")
    with restoring(run_dir):
        model, tokenizer = rebuild(run_dir, config, device)
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise Refused(f"{run_dir}: not all of its numbers are finite; make this run again")
    return model.requires_grad_(False), tokenizer


# ------------------------------------------------------------------------------------------------
# 7. What the scripts share: flags and presets, runs, data, batches, the loss

CLIP = 1.0  # norm to which the gradients of a step are clipped (ours)


def above(least, kind=int):
    """A type of argparse: a number greater than `least`, neither infinite nor absurd."""
    def read(text):
        value = kind(text)
        if not least < value < 2**40:  # NaN is neither
            raise ValueError
        return value
    read.__name__ = f"{kind.__name__} above {least}"  # argparse says: invalid ... value
    return read


natural, whole, positive = above(-1), above(0), above(0, float)


# A preset is a column of this table and of those in the scripts. flag: (type or choices, tiny,
# paper, help). paper: [Gupta26] unless marked ours. tiny: ours, measured there. Ours are, too, all
# flags that change no figure: micro-batches, device, dtype of the base, checkpoints, directories.
COMMON = {
    "model": (str, "tiny/model", "Qwen/Qwen2.5-0.5B-Instruct", "directory or hub name"),
    "max-length": (above(1), 128, 1024, "tokens of an example; what is over comes off the end of a "
                                        "long reply, then off the beginning of the prompt"),
    "batch-size": (whole, 16, 16, "examples of an optimizer step"),
    "micro-batch-size": (whole, None, 4, "examples run at once (none: all of the batch); changes "
                                         "only LoRA's dropout"),
    "save-every": (whole, 100, 100, "steps between checkpoints"),
    "seed": (natural, 0, 0, "of initialisation and batches"),
    "device": (("auto", "cpu", "cuda", "mps"), "auto", "auto", "auto: cuda, else mps, else cpu"),
    "dtype": (("auto", "float32", "bfloat16"), "auto", "auto",
              "of the frozen base; auto: bfloat16 on cuda. What is trained is float32"),
    "out": (Path, None, None, "run directory; none: out/<preset>/<condition>-seed<seed>"),
    "resume": (bool, False, False, "go on with a run that was cut short"),
    "overwrite": (bool, False, False, "begin the run again"),
}
RUN_FILES = {*WEIGHTS.values(), "metrics.jsonl", "checkpoint.safetensors", "eval.json",
             "eval-validation.json"}
# Flags that make another method of a run, and what stands for them in its name.
NAMED = {"optimizer": "", "top_t": "t", "retrofit": "from-", "task": "", "lr": "lr"}


def parse(description, flags, argv=None, positional=None):
    """The command line -> args with the preset's defaults; args.given: what the line itself has;
    args.unusual: what of it differs from the preset."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line
    parser.add_argument("--preset", choices=("tiny", "paper"), default="tiny",
                        help="defaults for the embedded model, or of the papers (tiny)")
    if positional:
        parser.add_argument(positional, nargs="*", type=Path, default=[])
    for name, (kind, tiny, paper, text) in flags.items():
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "X"}
        how = {"action": "store_true"} if kind is bool else how
        text += f" ({tiny})" if tiny == paper else f" ({tiny}; paper: {paper})"
        parser.add_argument(f"--{name}", help=text, **how)
    given = vars(parser.parse_args(argv))
    column = 1 + (given["preset"] == "paper")
    defaults = {name.replace("-", "_"): row[column] for name, row in flags.items()}
    args = argparse.Namespace(**defaults | given, given=given)
    args.unusual = {name: given[name] for name in given if given[name] != defaults.get(name)}
    mps = torch.backends.mps.is_available()
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if args.device == "auto":
        args.device = next(device for device in there if there[device])
    if not there[args.device]:
        parser.error(f"--device {args.device}: there is none here; leave the flag out")
    if getattr(args, "dtype", None) == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    return args


def rank():
    """Which process of how many this is, started by torchrun; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(args):
    """Meet the other processes of torchrun, if there are any. Only the first one speaks."""
    place, world = rank()
    if args.batch_size % world:
        raise Refused(f"--batch-size {args.batch_size}: is no multiple of the {world} processes")
    if world > 1:
        cuda = args.device == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))
    if place > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")


@contextmanager
def first_alone():
    """The first process runs this block, then, when it is done, the others."""
    place, world = rank()
    if place > 0:
        torch.distributed.barrier()
    yield
    if place == 0 and world > 1:
        torch.distributed.barrier()


def total(tensor):
    """Sum a tensor over the processes, in place; they all get it."""
    if rank()[1] > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def script(main, several=False):
    """Run a script; bad input ends it with one line on stderr and exit code 2.

    several: whether it may run as several processes.
    """
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        if rank()[1] > 1 and not several:
            raise Refused("torchrun: train_sparse.py alone runs as several processes")
        main()
        if rank()[1] > 1:  # or threads of the group, still running, may abort the process
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        tqdm.write("stopped; a training run goes on where it was: the same command with --resume",
                   file=sys.stderr)
        sys.exit(130)
    except (Refused, OSError, RuntimeError, MemoryError) as error:  # OSError: a full disk, say
        if out_of_memory(error):
            error = f"{error}; give a smaller --micro-batch-size, --max-length or --n-keys"
        elif isinstance(error, RuntimeError):  # a bug
            sys.stderr = sys.__stderr__  # of any process, see join
            raise
        line = " ".join(f"{Path(sys.argv[0]).name}: {error}".split())
        # from any process, see join; print would run into a progress bar
        tqdm.write(line, file=sys.__stderr__ if rank()[0] else sys.stderr)
        sys.exit(2)


def run_directory(args, condition):
    """--out, or out/<preset>/<condition>-seed<k>, where the condition also names unusual flags:
    additive-tfidf-t50-lr0.1-seed0. Refused where something would be lost."""
    names = [f"-{prefix}{Path(str(args.unusual[name])).name}" for name, prefix in NAMED.items()
             if name in args.unusual]
    condition = "".join([condition, *names, f"-seed{args.seed}"])
    run = args.out or Path("out", args.preset, condition)
    used = run.exists() and (not run.is_dir() or any(f.suffix != ".tmp" for f in run.iterdir()))
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    if used and (config.get("kind") not in WEIGHTS or "arguments" not in config):
        raise Refused(f"--out {run}: exists and is no run of this project; name another directory")
    if args.resume and args.overwrite:
        raise Refused("--resume: contradicts --overwrite; give one of them")
    if used and not args.resume and not args.overwrite:
        raise Refused(f"--out {run}: exists; --resume goes on with it, --overwrite begins it again")
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    if args.batch_size % args.micro_batch_size:
        raise Refused(f"--micro-batch-size {args.micro_batch_size}: does not divide --batch-size "
                      f"{args.batch_size}; give a divisor")
    return run


def begin_run(run, args, config):
    """Write config.json, or check it against that of a resumed run -> step, checkpoint."""
    passing = ("given", "unusual", "out", "resume", "overwrite", "device", "save_every",
               "micro_batch_size")
    arguments = {name: value for name, value in vars(args).items() if name not in passing}
    config = json.loads(json.dumps(config | {"arguments": arguments}, default=str))
    measures = ("arguments", "split", "eval_examples", "eval_tokens", "window", "stride",
                "trivia_data", "wikitext_data", "untaught_data")  # they decide no weight
    metrics, checkpoint = run / "metrics.jsonl", run / "checkpoint.safetensors"
    step, tensors = 0, {}
    if (args.resume or rank()[0] > 0) and (run / "config.json").exists():
        old = read_json(run / "config.json")
        with restoring(run):
            old = old["arguments"] | old
            if checkpoint.exists():
                tensors = read_tensors(checkpoint)
                step = int(tensors["step"])
        for name, value in (config["arguments"] | config).items():
            if name not in measures and old.get(name) != value:
                raise Refused(f"--resume: {run} was made with another {name}; give the same one, "
                              f"or delete {run}")
    else:
        run.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES - {"config.json"}:  # that is replaced: the run stays a run
            remove(run / name)
        write_json(run / "config.json", config)
    if finished(run):  # but killed before it had dropped its checkpoint, perhaps
        checkpoint.unlink(missing_ok=True)
    elif rank()[0] == 0:  # drop the lines after the checkpoint
        lines = metrics.read_text().splitlines(keepends=True)[:step] if metrics.exists() else []
        write_atomic(metrics, lambda temporary: temporary.write_text("".join(lines)))
    return step, tensors


def save_checkpoint(run, step, tensors):
    """The state after `step` steps; the lines of metrics.jsonl before it are on the disk first."""
    if rank()[0] > 0:
        return
    sync(run / "metrics.jsonl")
    write_tensors(run / "checkpoint.safetensors", tensors | {"step": torch.tensor(step)})


def peak_memory(device):
    """Peak memory of this process, GiB: on the GPU if the device is one, else in main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "linux":  # where getrusage begins with the peak of the parent
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    import resource  # not on Windows
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def log_step(run, metrics, batch, start, device):
    """Add a step on a batch, begun at time `start`, to metrics.jsonl; print every tenth."""
    if rank()[0] > 0:
        return
    tokens = sum(len(ids) for ids, _ in batch)
    metrics |= {"tokens/s": round(tokens / (time.perf_counter() - start), 1),
                "peak_GiB": round(peak_memory(device), 3)}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    if metrics["step"] % 10 == 0:
        tqdm.write("  ".join(f"{name} {value:.4g}" if type(value) is float else f"{name} {value}"
                             for name, value in metrics.items()))


def end_run(run, name, began, device):
    """Drop the checkpoint of a run that is saved; say what it took."""
    (run / "checkpoint.safetensors").unlink(missing_ok=True)
    print(f"{name}: {time.time() - began:.0f} s, peak memory {peak_memory(device):.2f} GiB, "
          f"saved in {run}")


def check_finite(loss, norm, step, save):
    """Before a step's update: unless loss and gradient norm are finite, save(step) and Refused."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        save(step)
        raise Refused(f"--lr: at step {step} the loss is {loss} and the gradient norm {norm}; the "
                      f"state before it is saved. Begin again with a lower --lr and --overwrite")


def adamw_state(optimizer, trained):
    """{name: tensor} of the state of torch's AdamW for `trained`, {name: parameter}."""
    return {f"optimizer.{name}.{part}": tensor for name, parameter in trained.items()
            for part, tensor in optimizer.state[parameter].items()}


def load_adamw(optimizer, trained, saved):
    """Go on from an adamw_state; AdamW keeps its step count on the CPU."""
    for name, parameter in trained.items():
        if f"optimizer.{name}.step" in saved:  # not so where there never was a gradient
            optimizer.state[parameter] = {
                part: saved[f"optimizer.{name}.{part}"].to(device)
                for part, device in (("step", "cpu"), ("exp_avg", parameter.device),
                                     ("exp_avg_sq", parameter.device))}


def from_datasets(function, flag, name, **options):
    """function, of the library datasets, of a directory or a hub name[:configuration]."""
    path, _, configuration = name.partition(":")
    try:
        return function(find(flag, path, "dataset"), configuration or None, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise Refused(f"{flag} {name}: cannot be loaded ({error}); name a directory that "
                      f"datasets.load_dataset can read, or use --preset tiny, which needs no "
                      f"network") from None


def read_rows(flag, name, split, columns):
    """A split of a data set, directory or hub name[:configuration]; Refused without columns."""
    rows = from_datasets(datasets.load_dataset, flag, name, split=split)
    missing = [column for column in columns if column not in rows.column_names]
    if missing or not len(rows):
        raise Refused(f"{flag} {name}: split {split} has no " + (f"column {missing[0]}" if missing
                      else "rows") + f" (columns: {', '.join(rows.column_names)}); see --help")
    return rows


class Example(NamedTuple):
    ids: list  # tokens of the prompt and the answer
    start: int  # where the answer begins; the loss counts from there


def prompt_ids(tokenizer, prompt):
    """The tokens before an answer, one and the same in training, scoring and generation, and the
    space that an answer begins with: none where the prompt itself ends in white space."""
    chat, text = tokenizer.chat_template is not None, f"Question: {prompt}\nAnswer:"
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]  # a template has its own
    return ids, "" if text[-1].isspace() else " "


def encode(tokenizer, prompt, answer, end=True):
    """-> Example. end: whether the end token follows, as in training, or not, as in scoring."""
    prompt, space = prompt_ids(tokenizer, prompt)
    ids = tokenizer(space + answer, add_special_tokens=False)["input_ids"]
    if not answer.strip() or not ids:
        raise Refused(f"the answer {answer!r} has no token to learn; remove it from the data")
    return Example(prompt + ids + [tokenizer.eos_token_id] * end, len(prompt))


def fit(example, length):
    """At most `length` tokens of an Example: an answer longer than half of that loses its end (to
    spare the chat template before it, whose rows TF-IDF must see in nearly every background
    example), then the prompt its beginning."""
    ids, start = example
    answer = ids[start:start + max(length - start, length // 2)]
    prompt = ids[:start][-(length - len(answer)):]
    return Example(prompt + answer, len(prompt))


def context(model):
    """How many tokens the model was made for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)


def encode_all(model, tokenizer, pairs, max_length):
    """[(prompt, answer)] -> Examples to train on, of at most max_length tokens; says how many are
    cut."""
    length = min(max_length, context(model))
    examples = [encode(tokenizer, *pair) for pair in tqdm(pairs, desc="tokenize", leave=False)]
    long = sum(len(ids) > length for ids, _ in examples)
    if long:
        print(f"{long} of {len(examples)} examples are longer than {length} tokens: long answers "
              f"lose their end, long prompts their beginning (--max-length)")
    return [fit(example, length) for example in examples]


def collate(examples, device="cpu", length=0):
    """Pad Examples on the right -> input_ids, attention_mask (B, T), columns (P,), targets (B, P).

    length: T is at least this.
    columns: positions where some example predicts a target; only there are logits needed.
    targets: the token to be predicted there, -100 for none.
    """
    T = max(length, *(len(example.ids) for example in examples))
    input_ids = torch.zeros(len(examples), T, dtype=torch.int64)  # (B, T) pads are masked: any id
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)  # (B, T) both
    for b, (ids, start) in enumerate(examples):
        input_ids[b, :len(ids)], mask[b, :len(ids)] = torch.tensor(ids), 1
        labels[b, start:len(ids)] = torch.tensor(ids[start:])
    columns = (labels[:, 1:] != -100).any(0).nonzero().squeeze(-1)  # (P,)
    batch = {"input_ids": input_ids, "attention_mask": mask, "columns": columns,
             "targets": labels[:, columns + 1]}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def token_loss(model, batch, cache=None):
    """-log p of every target of a collated batch -> (B, P), 0 where there is none.

    cache: the past_key_values of what comes before, if the batch goes on from there.
    """
    past = cache.get_seq_length() if cache else 0
    logits = model(batch["input_ids"], past_key_values=cache, use_cache=cache is not None,
                   attention_mask=F.pad(batch["attention_mask"], (past, 0), value=1),
                   logits_to_keep=batch["columns"]).logits  # (B, P, vocabulary)
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten(),
                           ignore_index=-100, reduction="none")  # (B * P,)
    return loss.view_as(batch["targets"])  # (B, P)


def backward(model, batch, micro_batch_size):
    """Gradients of the mean loss of a batch, a list of Examples -> the loss, the attention masks.

    The mean is over the target tokens of the whole batch, so micro-batches change nothing. Each
    process runs its share of the batch: its gradients are to be summed.
    """
    targets = sum(len(ids) - start for ids, start in batch)
    length = max(len(ids) for ids, _ in batch)  # one T for all: the same sums, to the last bit
    place, world = rank()
    share, loss, masks = batch[place::world], torch.zeros(1, device=model.device), []
    for i in range(0, len(share), micro_batch_size):
        micro = collate(share[i:i + micro_batch_size], model.device, length)
        micro_loss = token_loss(model, micro).sum() / targets
        micro_loss.backward()
        loss += micro_loss.detach()
        masks.append(micro["attention_mask"])
    return total(loss).item(), masks


def batch_stream(examples, batch_size, seed, start=0):
    """Batches without end from step `start` on, a pure function of its arguments.

    Every epoch is shuffled; in pools of 8 batches, similar lengths go together (fewer pads).
    """
    per_epoch = len(examples) // batch_size  # a remainder waits for another epoch
    for epoch in itertools.count(start // per_epoch):
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(examples), generator=generator)[:per_epoch * batch_size]
        pools = [sorted(pool.tolist(), key=lambda i: len(examples[i].ids))
                 for pool in order.split(8 * batch_size)]
        order = list(itertools.chain(*pools))
        shuffled = torch.randperm(per_epoch, generator=generator).tolist()
        for i in shuffled[start % per_epoch if epoch == start // per_epoch else 0:]:
            yield [examples[j] for j in order[i * batch_size:(i + 1) * batch_size]]


def learning_rate(step, steps, warmup):
    """Factor of the learning rate: a linear warm-up times a cosine to 0 [Gupta26 App. A].

    # differs: the cosine falls from step 0 on; in transformers, from the end of the warm-up on.
    """
    return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def training(examples, steps, done, save, args, label):
    """Every step of a training loop after the first `done`: yields step, batch, factor of the rate.

    When the loop comes back, save(steps done) is called each --save-every steps, and at Ctrl-C or
    SIGTERM, which end the script then; a second one ends it at once.
    """
    asked = []

    def ask(*_):
        asked.append(True)
        if len(asked) > 1 or rank()[1] > 1:  # several processes would stop at different steps
            raise KeyboardInterrupt

    handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        bar = tqdm(range(done, steps), desc=label, initial=done, total=steps)
        for step, batch in zip(bar, batch_stream(examples, args.batch_size, args.seed, done)):
            yield step, batch, learning_rate(step, steps, args.warmup)
            if asked or (step + 1) % args.save_every == 0:
                save(step + 1)
            if asked:
                raise KeyboardInterrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
