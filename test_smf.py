"""Tests of SMF: every invariant of the method, the retrofit of eight architectures, each script.

pytest test_smf.py        # no network, no GPU
"""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import baselines
import eval as evaluation
import smf
import train_retrofit
import train_sparse

ROOT = Path(__file__).resolve().parent
SHAPE = {"n_keys": 16, "heads": 2, "k_dim": 8, "top_k": 4}


def small_model(kind="Qwen2", seed=0, **more):
    """A randomly initialised model of any decoder architecture, in evaluation mode."""
    sizes = dict(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    if kind == "GPT2":
        sizes = dict(
            vocab_size=50, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.2
        )
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    return AutoModelForCausalLM.from_config(config).eval()


def small_smf(mode="additive", layers=(1, 2), scale=1.0, seed=0):
    model = small_model(seed=seed)
    smf.retrofit(model, list(layers), mode, scale, **SHAPE)
    return model


def examples(number=32, seed=0):
    """Random Examples of 4 to 12 tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (number,), generator=g).tolist()
    return [smf.Example(torch.randint(3, 50, (n,), generator=g).tolist(), n // 2) for n in lengths]


# ---- invariant 1: exact lookup


def test_lookup_equals_brute_force():
    torch.manual_seed(0)
    memory = smf.ProductKeyMemory(32, n_keys=12, heads=3, k_dim=10, top_k=5)
    memory.track_queries(torch.randn(100, 32) * 3 + 1, 1.0)
    x = torch.randn(4, 7, 32)
    rows, weights = memory.lookup(x)  # (4, 7, 3, 5) both
    q = (memory.query(x) - memory.query_mean) / (memory.query_var + 1e-5).sqrt()
    for head in range(3):
        q1, q2 = q[..., head * 10 : head * 10 + 5], q[..., head * 10 + 5 : head * 10 + 10]
        s1, s2 = q1 @ memory.keys[head, 0].T, q2 @ memory.keys[head, 1].T  # (4, 7, 12) both
        every = torch.stack(
            [s1[..., i] + s2[..., j] for i in range(12) for j in range(12)], -1
        )  # (4, 7, 144)
        best, expected = every.topk(5)
        assert torch.equal(rows[:, :, head], expected)
        assert torch.allclose(weights[:, :, head], best.softmax(-1), atol=1e-6)


def test_forward_is_the_gated_sum_of_the_rows_read():
    torch.manual_seed(0)
    memory = smf.ProductKeyMemory(32, **SHAPE)
    x = torch.randn(2, 3, 32)
    rows, weights = memory.lookup(x)
    y = (weights[..., None] * memory.values[rows]).sum((2, 3))  # (2, 3, 32)
    expected = (y * F.silu(x @ memory.gate.weight.T)) @ memory.out.weight.T
    assert torch.allclose(memory(x), expected, atol=1e-6)


def test_what_the_wrappers_add_up():
    torch.manual_seed(0)
    mlp, memory = torch.nn.Linear(32, 32), smf.ProductKeyMemory(32, **SHAPE)
    x = torch.randn(2, 3, 32)
    assert torch.equal(smf.AdditiveMemory(mlp, memory, 0.3)(x), mlp(x) + 0.3 * memory(x))
    assert torch.equal(smf.ReplacementMemory(memory)(x), memory(x))


# ---- invariant 2: the retrofit starts harmless


ARCHITECTURES = ["Qwen2", "Qwen3", "Llama", "Gemma", "Phi3", "GPT2", "GPTNeoX", "Mistral"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_retrofit_of_every_architecture_with_alpha_zero_is_the_base(kind):
    model, ids = small_model(kind), torch.randint(3, 50, (2, 9))
    before = model(ids).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smf.retrofit(model, [0, 3], scale=0.0, **SHAPE)
    assert torch.equal(model(ids).logits, before)
    assert all(
        torch.equal(
            tensor,
            model.state_dict()[
                name.replace(".0.mlp", ".0.mlp.mlp").replace(".3.mlp", ".3.mlp.mlp")
            ],
        )
        for name, tensor in state.items()
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".memory." in name or name.endswith("mlp.scale") for name in trainable)
    smf.wrappers(model)[3].scale.data.fill_(1.0)
    assert not torch.equal(model(ids).logits, before)  # so the memory was really there


def test_replacement_drops_the_mlp():
    base, model = small_model(), small_smf("replacement")
    assert not any("gate_proj" in name for name in smf.decoder_blocks(model)[1].state_dict())
    dropped = sum(
        p.numel() for layer in (1, 2) for p in smf.decoder_blocks(base)[layer].mlp.parameters()
    )
    added = sum(p.numel() for memory in smf.memories(model).values() for p in memory.parameters())
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(p.numel() for p in base.parameters()) - dropped + added
    )


def test_parameter_count_of_the_papers():
    memory = smf.ProductKeyMemory(896)
    assert memory.values.numel() == 14_680_064  # [Gupta26]: 44.0 M in three layers
    assert sum(p.numel() for p in memory.parameters()) - memory.values.numel() == pytest.approx(
        2.65e6, rel=0.01
    )


# ---- invariant 3: counts are of real tokens


def counts_of(model, ids, mask, position_ids=None):
    with smf.record_reads(model) as tapes, torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position_ids)
    return {
        layer: smf.count_reads(
            smf.real_tokens(reads, [mask])[1], len(smf.memories(model)[layer].values)
        )
        for layer, reads in tapes.items()
    }


def test_padding_changes_no_count():
    model, ids = small_smf(), torch.randint(3, 50, (1, 8))
    plain = counts_of(model, ids, torch.ones_like(ids))
    assert all(count.sum() == 8 * SHAPE["heads"] * SHAPE["top_k"] for count in plain.values())
    for left, right in ((0, 3), (0, 9), (2, 0), (7, 1)):
        padded = F.pad(ids, (left, right), value=0)
        mask = F.pad(torch.ones_like(ids), (left, right))
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        counted = counts_of(model, padded, mask, position_ids)
        assert all(torch.equal(counted[layer], plain[layer]) for layer in plain)


def test_nothing_is_recorded_outside_of_record_reads():
    model, ids = small_smf(), torch.randint(3, 50, (1, 8))
    with smf.record_reads(model) as tapes:
        pass
    model(ids).logits.sum().backward()
    model.generate(ids, max_new_tokens=3)
    assert all(reads == [] for reads in tapes.values())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_no_read_twice(reentrant):
    plain, model = small_smf(), small_smf()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    batch, found = smf.collate(examples(4)), []
    for m in (plain, model):
        with smf.record_reads(m) as tapes:
            smf.token_loss(m, batch).sum().backward()
        found.append(
            {
                layer: smf.real_tokens(reads, [batch["attention_mask"]])
                for layer, reads in tapes.items()
            }
        )
    for layer in found[0]:
        for one, other in zip(found[0][layer], found[1][layer]):
            assert torch.allclose(one, other, atol=1e-6)


def test_background_counts_examples_and_reads():
    model, data = small_smf(), examples(6)
    smf.collect_background(model, [smf.collate(data[:4]), smf.collate(data[4:])])
    for layer, memory in smf.memories(model).items():
        doc_freq, total = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
        for example in data:
            ids = torch.tensor([example.ids])
            count = counts_of(model, ids, torch.ones_like(ids))[layer]
            doc_freq, total = doc_freq + (count > 0), total + count
        assert memory.num_batches == 6
        assert torch.equal(memory.doc_freq, doc_freq) and torch.equal(
            memory.background_counts, total
        )


def test_spread_of_uniform_and_of_collapsed_reads():
    assert train_retrofit.spread(torch.full((256,), 3)) == pytest.approx((1.0, 0.0))
    collapsed = F.one_hot(torch.tensor(5), 256)
    assert train_retrofit.spread(collapsed) == pytest.approx((1 / 256, math.log(256)))


def test_query_statistics_do_not_depend_on_padding_or_micro_batches():
    data, moments = examples(8), []
    for size in (8, 2):
        model, masks = small_smf(), []
        with smf.record_reads(model) as tapes:
            for i in range(0, 8, size):
                batch = smf.collate(data[i : i + size])
                masks.append(batch["attention_mask"])
                smf.token_loss(model, batch).sum().backward()
        memory, (x, *_) = smf.memories(model)[1], smf.real_tokens(tapes[1], masks)
        memory.track_queries(x, 0.5)
        moments.append(torch.stack([memory.query_mean, memory.query_var]))
    query = x @ memory.query.weight.T  # (S, H * k_dim)
    variance = (query**2).mean(0) - query.mean(0) ** 2
    for mean, var in moments:
        assert torch.allclose(mean, query.mean(0) / 2, atol=1e-5)
        assert torch.allclose(var, (1 + variance) / 2, atol=1e-5)


def test_stage_1_begins_with_normalised_queries():
    model, batches = small_smf(), [smf.collate(examples(8, seed)) for seed in (1, 2)]
    passes = [smf.read_only(model, batch) for batch in batches]
    train_retrofit.calibrate(model, batches)
    for layer, memory in smf.memories(model).items():
        masks = [batch["attention_mask"] for batch in batches]
        x, *_ = smf.real_tokens([tapes[layer][0] for tapes in passes], masks)
        q = (memory.query(x) - memory.query_mean) / memory.query_var.sqrt()  # (S, H * k_dim)
        assert torch.allclose(q.mean(0), torch.zeros(q.shape[1]), atol=1e-3)
        assert torch.allclose((q**2).mean(0), torch.ones(q.shape[1]), atol=1e-3)


# ---- invariants 4 and 8: selection and scores


def test_top_rows_takes_the_best_of_the_rows_read():
    counts = torch.tensor([0, 3, 1, 0, 2, 5])
    scores = torch.tensor([9.0, 0.1, 0.4, 8.0, 0.3, 0.1])
    assert smf.top_rows(scores, counts, 2).tolist() == [False, False, True, False, True, False]
    assert smf.top_rows(scores, counts, 3).tolist() == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]  # a tie: the lower row
    assert torch.equal(smf.top_rows(scores, counts, 100), counts > 0)
    with pytest.raises(smf.Refused):
        smf.top_rows(scores, counts, 0)


def test_top_rows_is_exact_on_random_counts():
    g = torch.Generator().manual_seed(0)
    for t in (1, 7, 50, 300):
        counts = torch.randint(0, 3, (256,), generator=g)
        scores = torch.randn(256, generator=g)
        mask = smf.top_rows(scores, counts, t)
        assert mask.sum() == min(t, (counts > 0).sum()) and not (mask & (counts == 0)).any()
        left = (counts > 0) & ~mask
        assert not left.any() or scores[mask].min() >= scores[left].max()


def test_tfidf_by_hand():
    scores = smf.tfidf_scores(torch.tensor([2, 1, 0, 1]), torch.tensor([9, 0, 3, 4]), 9)
    expected = [2 / 4 * math.log(10 / 10), 1 / 4 * math.log(10 / 1), 0.0, 1 / 4 * math.log(10 / 5)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-7)


def test_kl_by_hand():
    scores = smf.kl_scores(torch.tensor([2, 1, 0, 1]), torch.tensor([5, 0, 10, 1]))
    q = [6 / 20, 1 / 20, 11 / 20, 2 / 20]
    expected = [
        0.5 * math.log(0.5 / q[0]),
        0.25 * math.log(0.25 / q[1]),
        0.0,
        0.25 * math.log(0.25 / q[3]),
    ]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)


def test_scorers_change_nothing():
    counts, background = torch.tensor([2, 1, 0]), torch.tensor([5, 0, 1])
    (
        smf.tfidf_scores(counts, background, 7),
        smf.kl_scores(counts, background),
        smf.top_rows(counts.float(), counts, 1),
    )
    assert counts.tolist() == [2, 1, 0] and background.tolist() == [5, 0, 1]


# ---- invariants 5 and 6: frozen is frozen, moments are lazy


def dense_and_sparse_gradients(t=20):
    """The gradient of V by autograd times the mask, and by row_gradient, for the same batch."""
    model, batch = small_smf(), smf.collate(examples(8))
    with smf.record_reads(model) as tapes:
        smf.token_loss(model, batch).sum().backward()
    results = {}
    for layer, memory in smf.memories(model).items():
        _, rows, weights, dy = smf.real_tokens(tapes[layer], [batch["attention_mask"]])
        counts = smf.count_reads(rows, 256)
        mask = smf.top_rows(counts.float(), counts, t)
        results[layer] = (
            memory.values.grad * mask[:, None],
            smf.row_gradient(rows, weights, dy, mask),
        )
    return results


def test_row_gradient_is_the_masked_dense_gradient():
    for dense, (selected, gradient) in dense_and_sparse_gradients().values():
        assert len(selected) == 20 and dense.abs().sum() > 0
        assert torch.allclose(dense[selected], gradient, atol=1e-6, rtol=1e-5)
        assert torch.equal(dense.abs().sum(1).nonzero().squeeze(1), selected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_trap_a_masked_gradient_does_not_freeze(weight_decay):
    """The papers' hook and torch's AdamW: rows outside of the mask move. Hence RowOptimizer."""
    torch.manual_seed(0)
    values = torch.nn.Parameter(torch.randn(6, 4))
    optimizer, moved = torch.optim.AdamW([values], lr=0.1, weight_decay=weight_decay), []
    for selected in (0, 1):
        mask = torch.arange(6) == selected
        hook = smf.mask_gradient(values, mask)
        (values * torch.randn(6, 4)).sum().backward()
        assert not values.grad[~mask].any()  # the gradient is masked, and yet
        before = values.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        hook.remove()
        moved.append((values != before).any(1).tolist())
    assert (
        moved[1] == [True] * 6
        if weight_decay
        else moved[1] == [True, True, False, False, False, False]
    )


@pytest.mark.parametrize(
    "kind, options",
    [("adamw", {"weight_decay": 0.1}), ("sgd", {"momentum": 0.9, "weight_decay": 0.1})],
)
def test_row_optimizer_moves_the_selected_rows_only(kind, options):
    torch.manual_seed(0)
    values, selected = torch.nn.Parameter(torch.randn(500, 8), requires_grad=False), set()
    optimizer = smf.RowOptimizer(values, kind, **options)
    for step in range(40):
        rows, before = torch.randperm(500)[:7].sort().values, values.clone()
        selected |= set(rows.tolist())
        optimizer.step(rows, torch.randn(7, 8), lr=0.1)
        moved = (values != before).any(1)
        assert torch.equal(moved.nonzero().squeeze(1), rows)
        assert {len(part) for part in optimizer.state.values()} == {len(selected)}


@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_lazy_adamw_equals_one_torch_adamw_per_row(size):
    """A row's moments and bias correction know only its own steps; eps sits where torch has it."""
    torch.manual_seed(0)
    values = torch.nn.Parameter(torch.randn(10, 4), requires_grad=False)
    single = [torch.nn.Parameter(row.clone()) for row in values]
    reference = [torch.optim.AdamW([p], lr=0.01, weight_decay=0.1, eps=1e-9) for p in single]
    optimizer = smf.RowOptimizer(values, "adamw", weight_decay=0.1, eps=1e-9)
    for step in range(30):
        rows, gradient = torch.randperm(10)[:3], torch.randn(3, 4) * size
        optimizer.step(rows, gradient, lr=0.01)
        for row, g in zip(rows, gradient):
            single[row].grad = g
            reference[row].step()
    assert torch.allclose(values, torch.stack([p.detach() for p in single]), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
def test_lazy_sgd_equals_one_torch_sgd_per_row(options):
    torch.manual_seed(0)
    values = torch.nn.Parameter(torch.randn(10, 4), requires_grad=False)
    single = [torch.nn.Parameter(row.clone()) for row in values]
    reference = [torch.optim.SGD([p], lr=0.01, **options) for p in single]
    optimizer = smf.RowOptimizer(values, "sgd", **options)
    for step in range(30):
        rows, gradient = torch.randperm(10)[:3], torch.randn(3, 4)
        optimizer.step(rows, gradient, lr=0.01)
        for row, g in zip(rows, gradient):
            single[row].grad = g
            reference[row].step()
    assert torch.allclose(values, torch.stack([p.detach() for p in single]), atol=1e-6)


def test_the_default_eps_does_not_swallow_small_gradients():
    values = torch.nn.Parameter(torch.zeros(2, 4), requires_grad=False)
    smf.RowOptimizer(values).step(torch.tensor([0]), torch.full((1, 4), 1e-8), lr=0.5)
    assert torch.allclose(values[0], torch.full((4,), -0.5), rtol=1e-3) and not values[1].any()


# ---- the loops, on the embedded model: invariants 5, 7, 9, 10, 11, 12


SMALL = ["--n-keys=32", "--top-k=4"]
QUICK = ["--eval-examples=6", "--eval-tokens=200", "--num-facts=40", "--steps=6"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A directory with a small retrofit of each mode."""
    path = tmp_path_factory.mktemp("runs")
    for mode in ("additive", "replacement"):
        train_retrofit.main(
            [
                f"--mode={mode}",
                "--steps=4",
                "--examples=64",
                "--background=40",
                *SMALL,
                f"--out={path / mode}",
            ]
        )
    return path


def library_loss(model, batch):
    """The library's own loss of a batch of Examples, all at once."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    labels = ids.masked_fill(mask == 0, -100)
    for row, (_, start) in zip(labels, batch):
        row[:start] = -100
    return model(ids, attention_mask=mask, labels=labels).loss


def unmeasured(patch):
    """Have runs evaluated in no time."""
    patch.setattr(evaluation, "learned", lambda *_: {})
    patch.setattr(evaluation, "forgotten", lambda *_: {"knowledge_right": [True]})


def sparse(runs, out, *flags, mode="additive"):
    """Run train_sparse.py without its evaluation -> the tensors of its model's memories."""
    with pytest.MonkeyPatch.context() as patch:
        unmeasured(patch)
        train_sparse.main(
            [f"--retrofit={runs / mode}", f"--mode={mode}", f"--out={out}", *QUICK, *flags]
        )
    return smf.memory_state(smf.load(out)[0])


def metrics(run):
    """metrics.jsonl without the two things that the machine decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    machine = ("tokens/s", "peak_GiB")
    return [{name: line[name] for name in line if name not in machine} for line in lines]


@pytest.mark.parametrize(
    "flags",
    [
        ["--scorer=tfidf"],
        ["--scorer=kl", "--train-scale"],
        ["--scorer=random", "--optimizer=sgd"],
        ["--scorer=count"],
        ["--scorer=all"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_step_changes_the_selected_rows_and_nothing_else(runs, tmp_path, monkeypatch, flags):
    seen, selected = {}, {}

    def spy_load(*args):
        model, tokenizer = load(*args)
        seen.setdefault("model", model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen.setdefault("before", state)
        return model, tokenizer

    def spy_step(self, rows, gradient, lr):
        selected[id(self.values)] = rows
        return row_step(self, rows, gradient, lr)

    def spy_log(run, line, *rest):
        after = seen["model"].state_dict()
        free = {".mlp.scale"} if "--train-scale" in flags else set()
        for layer, memory in smf.memories(seen["model"]).items():
            name = next(n for n in after if f".{layer}." in n and n.endswith("memory.values"))
            moved = (after[name] != seen["before"][name]).any(1).nonzero().squeeze(1)
            chosen = selected[id(memory.values)]
            assert set(moved.tolist()) <= set(chosen.tolist()) and len(moved) > 0
            assert line["rows"][layer] == len(chosen) and (
                len(chosen) == 20 or "--scorer=all" in flags
            )
        assert all(
            torch.equal(tensor, seen["before"][name])
            or name.endswith("memory.values")
            or any(name.endswith(suffix) for suffix in free)
            for name, tensor in after.items()
        )
        seen["before"] = {name: tensor.clone() for name, tensor in after.items()}
        log_step(run, line, *rest)

    load, row_step, log_step = smf.load, smf.RowOptimizer.step, smf.log_step
    monkeypatch.setattr(smf, "load", spy_load)
    monkeypatch.setattr(smf.RowOptimizer, "step", spy_step)
    monkeypatch.setattr(smf, "log_step", spy_log)
    sparse(runs, tmp_path / "run", *flags, *["--top-t=20"] * ("--scorer=all" not in flags))
    assert len(metrics(tmp_path / "run")) == 6


@pytest.mark.parametrize("flags", [[], ["--train-scale"]])
def test_one_step_changes_at_most_t_rows_of_the_file(runs, tmp_path, flags):
    before = smf.read_tensors(runs / "additive/memory.safetensors")
    after = sparse(runs, tmp_path / "run", "--steps=1", "--top-t=7", "--scale-lr=0.3",
                   "--warmup=0", *flags)
    for name, tensor in after.items():
        if name.endswith("memory.values"):
            assert 1 <= (tensor != before[name]).any(1).sum() <= 7
        else:
            moved = 0.3 * (name.endswith("scale") and bool(flags))  # Adam's first step
            assert torch.equal(tensor, before[name]) == (moved == 0)
            assert moved == 0 or (tensor - before[name]).abs().item() == pytest.approx(moved, 1e-3)
    assert before.keys() == after.keys() and not any("mlp" in name for name in after)


def test_the_loss_is_the_mean_over_the_tokens_of_the_whole_batch():
    data, gradients = examples(16), []  # answers of 2 to 6 tokens
    for size in (16, 4, 1):
        model = small_smf()
        loss, masks = smf.backward(model, data, size)
        gradients.append(smf.memories(model)[1].out.weight.grad)
        whole = smf.collate(data)
        expected = smf.token_loss(model, whole).sum() / (whole["targets"] != -100).sum()
        assert loss == pytest.approx(expected.item(), rel=1e-5) and len(masks) == 16 // size
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "flags", [["--scorer=tfidf"], ["--scorer=kl", "--train-scale"], ["--optimizer=sgd", "--lr=100"]]
)
def test_micro_batches_change_nothing(runs, tmp_path, flags):
    base = smf.read_tensors(runs / "additive/memory.safetensors")
    whole, *parts = (
        sparse(runs, tmp_path / size, f"--micro-batch-size={size}", "--lr=0.01", *flags)
        for size in ("16", "4", "1")
    )
    for part in parts:
        for name in whole:
            assert torch.allclose(part[name], whole[name], atol=1e-5)
            if name.endswith("memory.values"):
                changed = [(end[name] != base[name]).any(1) for end in (part, whole)]
                assert torch.equal(*changed) and changed[0].any()


@pytest.mark.parametrize("flags", [["--train-scale"], ["--scorer=random", "--optimizer=sgd"]])
def test_two_processes_are_one_batch(runs, tmp_path, flags):
    flags = [f"--retrofit={runs / 'additive'}", *flags, "--top-t=20", "--eval-examples=6",
             "--eval-tokens=200", "--steps=4", "--micro-batch-size=4", "--lr=0.01"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone",
                                              "--nproc_per_node=2"])):
        command = [sys.executable, *start, ROOT / "train_sparse.py", *flags]
        done = subprocess.run([*map(str, command), f"--out={tmp_path / name}"], cwd=ROOT,
                              env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("| after |") == 1, done.stderr
    one, two = (smf.read_tensors(tmp_path / name / "memory.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:  # the same rows, the same update
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-5), name
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4
    command = [sys.executable, ROOT / "baselines.py", f"--out={tmp_path / 'lora'}"]
    done = subprocess.run([*map(str, command)], env=os.environ | {"RANK": "0", "WORLD_SIZE": "2"},
                          capture_output=True, text=True)
    assert done.returncode == 2 and "train_sparse.py alone" in done.stderr


def test_several_processes_make_no_retrofit(tmp_path, monkeypatch):
    monkeypatch.setattr(smf, "rank", lambda: (1, 2))
    args = smf.parse("", train_sparse.FLAGS, ["--fresh", f"--out={tmp_path / 'run'}"])
    with pytest.raises(smf.Refused, match="first, in one process, with .* --steps 0"):
        train_sparse.stage_1(args)


def test_several_processes_part_at_the_end(monkeypatch):  # at exit the group's threads may abort
    parted = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: parted.append(True))
    smf.script(lambda: None, several=True)
    assert parted


def test_the_same_seed_gives_the_same_weights_and_another_does_not(runs, tmp_path):
    one, two, other = (
        sparse(runs, tmp_path / name, f"--seed={seed}")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def same_run(one, other, name="memory.safetensors"):
    """Whether two runs ended alike: weights to the last bit, and the lines of metrics.jsonl."""
    ended, expected = (smf.read_tensors(run / name) for run in (one, other))
    assert metrics(one) == metrics(other)
    assert ended.keys() == expected.keys()
    return all(torch.equal(ended[key], expected[key]) for key in ended)


# A process that imports everything once and then runs a script in children that die: half of them
# after a random time, all at the latest as they sync a file, at random in the first two saves. The
# first child that ends before its turn to die is the last one.
KILLER = """
import os, random, signal, sys, time
import torch
import baselines, smf, train_retrofit, train_sparse
import eval as evaluation

script, deadly, *argv = sys.argv[1:]
torch.set_num_threads(1)
draws, clock = random.Random(1), random.Random(2)
evaluation.report = lambda *_: "done"
main = {"sparse": train_sparse, "retrofit": train_retrofit, "baselines": baselines}[script].main
sync, died, longest = smf.sync, 0, 1.0
while True:
    left = draws.randrange(2, 8) if deadly == "deadly" else 1000  # syncs before the last one
    began = time.time()
    child = os.fork()
    if not child:
        def dying(path):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            sync(path)
        smf.sync = dying
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            smf.script(lambda: main([*argv, "--resume"]))
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code)
    if deadly == "deadly" and clock.random() < 0.5:
        time.sleep(clock.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        assert status == 0, status
        break
    longest, died = max(longest, 1.2 * (time.time() - began)), died + 1
print(died)
"""


@pytest.mark.parametrize("script, flags", [
    ("sparse", ["--scorer=tfidf", "--train-scale", *QUICK[:2]]),
    ("retrofit", ["--examples=64", "--background=40", *SMALL]),
    ("baselines", ["--method=lora", *QUICK[:2]])])
def test_a_run_killed_anywhere_resumes_to_the_same_end(runs, tmp_path, script, flags):
    flags = [*flags, "--steps=5", "--save-every=1", "--batch-size=4"]
    flags += [f"--retrofit={runs / 'additive'}"] * (script == "sparse")
    for name, deaths in (("harmless", 0), ("deadly", 8)):
        done = subprocess.run([sys.executable, "-c", KILLER, script, name, *flags,
                               f"--out={tmp_path / name}"], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 0 and int(done.stdout) >= deaths, done.stderr
    weights = "lora.safetensors" if script == "baselines" else "memory.safetensors"
    assert same_run(tmp_path / "deadly", tmp_path / "harmless", weights)
    assert not list(tmp_path.glob("*/checkpoint.safetensors"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_first(runs, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    sparse(runs, tmp_path / "whole")
    log_step = smf.log_step

    def interrupted(run, line, *rest):
        log_step(run, line, *rest)
        if line["step"] == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(smf, "log_step", interrupted)
        smf.script(lambda: sparse(runs, tmp_path / "cut"))
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    assert smf.read_tensors(tmp_path / "cut/checkpoint.safetensors")["step"] == 3
    signal.signal(signal.SIGTERM, before if number == signal.SIGTERM else signal.SIG_DFL)
    sparse(runs, tmp_path / "cut", "--resume")
    assert same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_full_disk_leaves_the_last_checkpoint(runs, tmp_path, monkeypatch):
    sparse(runs, tmp_path / "whole")
    save_file, saves = smf.save_file, []

    def full(tensors, path):
        saves.append(path)
        if len(saves) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(smf.Refused, match="No space left"):
        patch.setattr(smf, "save_file", full)
        sparse(runs, tmp_path / "cut", "--save-every=1")
    assert smf.read_tensors(tmp_path / "cut/checkpoint.safetensors")["step"] == 2
    assert not list((tmp_path / "cut").glob("*.tmp"))
    sparse(runs, tmp_path / "cut", "--save-every=1", "--resume")
    assert same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_full_disk_is_one_line(runs, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smf, "log_step", full)
    flags = [f"--retrofit={runs / 'additive'}", f"--out={tmp_path / 'run'}", *QUICK]
    assert "No space left" in refused(capsys, train_sparse.main, *flags)


def test_a_run_killed_at_its_very_end_drops_its_checkpoint(runs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(smf, "end_run", lambda *_: (_ for _ in ()).throw(Killed))
        sparse(runs, tmp_path / "run", "--save-every=1")
    assert (tmp_path / "run/checkpoint.safetensors").exists() and smf.finished(tmp_path / "run")
    sparse(runs, tmp_path / "run", "--save-every=1", "--resume")
    assert not (tmp_path / "run/checkpoint.safetensors").exists()


def test_a_sparse_run_is_the_rows_it_touched(runs, tmp_path):
    """Put on the retrofit, they give the model as it was trained; left out, the retrofit."""
    ended = {}
    with pytest.MonkeyPatch.context() as patch:
        train = train_sparse.train

        def spied(model, *rest):
            learned = train(model, *rest)
            ended.update({name: t.clone() for name, t in smf.memory_state(model).items()})
            return learned

        patch.setattr(train_sparse, "train", spied)
        loaded = sparse(runs, tmp_path / "run", "--train-scale", "--top-t=9")
    before = smf.memory_state(smf.load(runs / "additive")[0])
    assert loaded.keys() == before.keys()
    assert all(torch.equal(loaded[name], ended[name]) for name in ended)
    stored, touched = smf.read_tensors(tmp_path / "run/memory.safetensors"), set()
    assert stored.keys() == {f"{layer}.{part}" for layer in (1, 2, 3)
                             for part in ("rows", "values", "scale")}
    for layer in (1, 2, 3):
        rows, name = stored[f"{layer}.rows"], f"{layer}.memory.values"
        assert 9 <= len(rows) <= 6 * 9 and (rows.diff() > 0).all()
        moved = (loaded[name] != before[name]).any(1).nonzero().squeeze(-1)
        assert set(moved.tolist()) <= set(rows.tolist()) and len(moved) > 9
        touched |= {name, f"{layer}.scale"}
    assert {name for name in ended if not torch.equal(ended[name], before[name])} == touched
    assert smf.memory_state(smf.load(runs / "additive")[0]).keys() == before.keys()


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step):
    log_step = smf.log_step

    def dying(run, line, *rest):
        log_step(run, line, *rest)
        if line["step"] == step:
            raise Killed

    monkeypatch.setattr(smf, "log_step", dying)


@pytest.mark.parametrize(
    "step, flags",
    [
        (0, ["--train-scale"]),
        (2, ["--scorer=random", "--optimizer=sgd"]),
        (5, ["--train-scale"]),
    ],
)
def test_a_killed_stage_2_resumes_to_the_same_end(runs, tmp_path, monkeypatch, step, flags):
    flags = [*flags, "--save-every=2"]
    expected = sparse(runs, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step)
        sparse(runs, tmp_path / "cut", *flags)
    resumed = sparse(runs, tmp_path / "cut", *flags, "--resume")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert not (tmp_path / "cut/checkpoint.safetensors").exists()


def test_a_killed_stage_1_resumes_to_the_same_end(runs, tmp_path, monkeypatch):
    flags = [
        "--steps=4",
        "--examples=64",
        "--background=40",
        "--save-every=2",
        *SMALL,
        f"--out={tmp_path / 'cut'}",
    ]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 2)
        train_retrofit.main(flags)
    train_retrofit.main([*flags, "--resume"])
    expected, resumed = (
        smf.read_tensors(run / "memory.safetensors")
        for run in (runs / "additive", tmp_path / "cut")
    )
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert metrics(tmp_path / "cut") == metrics(runs / "additive")


def test_a_bfloat16_base_keeps_float32_memories_in_the_layers_asked_for(tmp_path):
    small = ["--examples=32", "--background=8", "--steps=1", "--scale-lr=0.5", "--warmup=0"]
    flags = ["--dtype=bfloat16", "--layers=0,2", "--heads=2", *SMALL]
    train_retrofit.main([*small, *flags, f"--out={tmp_path / 'additive'}"])
    before = smf.read_tensors(tmp_path / "additive/memory.safetensors")
    # Adam's first step is as long as the learning rate, here alpha's
    assert abs(before["0.scale"] - 1) == pytest.approx(0.5, abs=0.01)
    after = sparse(tmp_path, tmp_path / "run", *flags)
    model, _ = smf.load(tmp_path / "run")
    assert list(smf.memories(model)) == [0, 2] and smf.memories(model)[0].heads == 2
    dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}
    assert {t for n, t in dtypes.items() if ".memory." in n or "scale" in n} == {torch.float32}
    assert {t for n, t in dtypes.items() if ".memory." not in n and "scale" not in n} == {
        torch.bfloat16
    }
    assert {n for n in after if not torch.equal(after[n], before[n])} == {
        "0.memory.values",
        "2.memory.values",
    }


def test_stage_1_keeps_the_query_statistics_of_what_it_reads(tmp_path, monkeypatch):
    flags = ["--examples=64", "--background=16", *SMALL, "--lr=1e-9"]
    moments, paces, track = [], [], smf.ProductKeyMemory.track_queries
    monkeypatch.setattr(smf.ProductKeyMemory, "track_queries", lambda memory, x, momentum: (
        paces.append(momentum), track(memory, x, momentum)))
    for name, steps in (("fresh", 0), ("slow", 3)):
        train_retrofit.main([*flags, f"--steps={steps}", f"--out={tmp_path / name}"])
        tensors = smf.read_tensors(tmp_path / name / "memory.safetensors")
        moments.append(tensors["1.memory.query_mean"])
    assert moments[0].abs().max() > 0.1  # calibrated before training
    assert 0 < (moments[1] - moments[0]).abs().max() < 0.5  # and tracked in it
    assert paces == [1.0] * 3 + [1.0] * 3 + [0.1] * 9  # three memories, calibrated; three steps
    train_retrofit.main([*flags, "--steps=3", "--query-momentum=0", f"--out={tmp_path / 'off'}"])
    tensors = smf.read_tensors(tmp_path / "off/memory.safetensors")
    assert not tensors["1.memory.query_mean"].any() and (tensors["1.memory.query_var"] == 1).all()


def test_the_background_is_that_of_the_trained_memory(tmp_path):
    flags = [*SMALL, "--examples=64", "--background=40", "--steps=4", "--lr=0.1"]
    train_retrofit.main([*flags, f"--out={tmp_path / 'run'}"])
    model, tokenizer = smf.load(tmp_path / "run")
    args = smf.parse("", train_retrofit.FLAGS, [*flags, "--micro-batch-size=16"])
    chats = train_retrofit.general_chats(args)[train_retrofit.HELD_OUT:][:40]
    general = smf.encode_all(model, tokenizer, chats, args.max_length)
    smf.collect_background(model, train_retrofit.micro_batches(general, args, ""))
    saved = smf.read_tensors(tmp_path / "run/memory.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in smf.memory_state(model).items())
    assert saved["1.memory.num_batches"] == 40 and saved["1.memory.doc_freq"].max() == 40


def test_stage_1_logs_what_each_batch_reads(runs, tmp_path):
    flags = ["--steps=1", "--examples=64", "--background=40", *SMALL, "--seed=7"]
    train_retrofit.main([*flags, f"--out={tmp_path}"])
    args = smf.parse("", train_retrofit.FLAGS, flags)
    model, tokenizer = smf.load_base(args.model)
    torch.manual_seed(7)
    shape = {name: getattr(args, name) for name in ("n_keys", "heads", "k_dim", "top_k")}
    smf.retrofit(model, [1, 2, 3], scale=args.scale, **shape)
    pairs = train_retrofit.general_chats(args)
    chats = [smf.fit(smf.encode(tokenizer, *pair), 128) for pair in pairs]
    general, data = chats[128:168], chats[128:192]
    train_retrofit.calibrate(model, [smf.collate(general)])
    counts = [torch.zeros(shape["n_keys"] ** 2) for _ in range(3)]
    for example in next(smf.batch_stream(data, args.batch_size, 7)):
        tapes = smf.read_only(model, smf.collate([example]))
        for count, (read,) in zip(counts, tapes.values()):
            count += smf.count_reads(read.rows, len(count))
    (line,) = metrics(tmp_path)
    spreads = [train_retrofit.spread(count) for count in counts]
    assert line["usage"] == pytest.approx([usage for usage, _ in spreads], abs=2e-3)
    assert line["KL"] == pytest.approx([kl for _, kl in spreads], abs=2e-3)


def test_general_chats_are_the_replies_of_the_assistant(tmp_path, monkeypatch):
    thread = [("1", None, "prompter", "Hi"), ("2", "1", "assistant", "Hello"),
              ("3", "2", "prompter", "How are you?"), ("4", "3", "assistant", "Fine"),
              ("5", "0", "assistant", "of a prompt not there"), ("6", "3", "assistant", " ")]
    names = ("message_id", "parent_id", "role", "text")
    lines = [json.dumps(dict(zip(names, row))) + "\n" for row in thread]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    monkeypatch.setattr(train_retrofit, "HELD_OUT", 0)
    args = smf.parse("", train_retrofit.FLAGS, [f"--oasst-data={tmp_path}", "--batch-size=1"])
    chats = train_retrofit.general_chats(args)
    assert sorted(chats) == [("Hi", "Hello"), ("How are you?", "Fine")]


def test_the_held_out_chats_are_not_trained_on(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(train_retrofit, "train", lambda _, data, *more: seen.update(trained=data))
    monkeypatch.setattr(train_retrofit, "measure", lambda m, g, held, *_: seen.update(held=held))
    train_retrofit.main(["--steps=1", *SMALL, f"--out={tmp_path / 'run'}"])
    trained, held = ({tuple(e.ids) for e in seen[part]} for part in ("trained", "held"))
    assert len(held) > 100 and len(trained) > 1000 and not held & trained


def test_the_held_out_loss_is_the_mean_over_the_tokens_of_the_replies(runs, capsys):
    model, tokenizer = smf.load(runs / "additive")
    pairs = [("Who is it?", "a poet"), ("Who?", "a poet, a poet and a poet"), ("It?", "a flute")]
    data = [smf.encode(tokenizer, *pair) for pair in pairs]
    args = smf.parse("", train_retrofit.FLAGS, ["--micro-batch-size=2"])
    train_retrofit.measure(model, data, data, "after", args)
    sizes = [len(ids) - start for ids, start in data]
    losses = [-by_hand(model, *example) for example in data]
    mean = sum(size * loss for size, loss in zip(sizes, losses)) / sum(sizes)
    assert f"after: held-out loss {mean:.4f}" in capsys.readouterr().out


def test_a_collapsed_memory_is_warned_of(runs, monkeypatch, capsys):
    model, tokenizer = smf.load(runs / "additive")
    data = [smf.encode(tokenizer, "Who is it?", "a poet")] * 4
    for kl, warned in ((3.5, True), (2.5, False)):
        monkeypatch.setattr(train_retrofit, "spread", lambda counts: (0.5, kl))
        args = smf.parse("", train_retrofit.FLAGS, ["--micro-batch-size=4"])
        train_retrofit.measure(model, data, data, "after", args)
        assert ("WARNING" in capsys.readouterr().out) == warned


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [smf.learning_rate(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[55] == pytest.approx(
        0.5 * (1 + math.cos(0.55 * math.pi))
    )
    assert rates.index(max(rates)) == 10 and rates[99] < 1e-3


def test_resume_refuses_other_flags(runs, tmp_path):
    sparse(runs, tmp_path / "run")
    with pytest.raises(smf.Refused, match="top_t"):
        sparse(runs, tmp_path / "run", "--resume", "--top-t=3")


def test_stage_1_trains_the_memories_alone(runs):
    model, _ = smf.load(runs / "additive")
    base, _ = smf.load_base("tiny/model")
    for layer, block in enumerate(smf.decoder_blocks(base)):
        mlp = smf.decoder_blocks(model)[layer].mlp
        mlp = mlp.mlp if isinstance(mlp, smf.AdditiveMemory) else mlp
        assert all(torch.equal(a, b) for a, b in zip(block.mlp.parameters(), mlp.parameters()))
        assert torch.equal(
            block.self_attn.q_proj.weight, smf.decoder_blocks(model)[layer].self_attn.q_proj.weight
        )
    torch.manual_seed(0)
    smf.retrofit(base, [1, 2, 3], "additive", 1.0, n_keys=32, heads=4, k_dim=32, top_k=4)
    fresh, trained = smf.memory_state(base), smf.memory_state(model)
    assert fresh.keys() == trained.keys() and not any(
        torch.equal(fresh[name], trained[name]) for name in fresh
    )


def test_stage_1_is_adamw_without_decay_and_alpha_has_its_own_rate(tmp_path, monkeypatch):
    clipped, clip, step, steps = [], torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: (
        clipped.append((len(parameters), norm)) or clip(parameters, norm)))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (
        steps.append([dict(group) for group in self.param_groups]) or step(self)))
    train_retrofit.main(["--steps=3", "--examples=32", "--background=40", "--lr=0.1", "--warmup=1",
                         "--scale-lr=0.3", f"--out={tmp_path / 'run'}", *SMALL])
    assert clipped == [(3 * 5 + 3, 1.0)] * 3 and len(steps) == 3
    for factor, groups in zip((0.5, 0.75, 0.25), steps):  # half the rate at first; then its cosine
        for group, lr, number in zip(groups, (0.1, 0.3), (3 * 5, 3), strict=True):
            assert len(group["params"]) == number and group["lr"] == pytest.approx(factor * lr)
            assert group["eps"] == 1e-12 and group["weight_decay"] == 0


@pytest.mark.parametrize("mode", ["additive", "replacement"])
def test_a_run_directory_alone_rebuilds_the_model(runs, tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)  # from anywhere
    saved = sparse(runs, tmp_path / "run", mode=mode)
    model, tokenizer = smf.load(tmp_path / "run")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in smf.memory_state(model).items())
    ids = tokenizer("Tell me about", return_tensors="pt")["input_ids"]
    cached, plain = (
        model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain) and cached.shape[1] == ids.shape[1] + 12
    assert type(model) is type(smf.load_base("tiny/model")[0])


def test_the_base_is_neither_changed_nor_stored(runs, tmp_path):
    files = {path: path.read_bytes() for path in (ROOT / "tiny/model").iterdir()}
    sparse(runs, tmp_path / "run")
    assert all(path.read_bytes() == content for path, content in files.items())
    base = smf.load_base("tiny/model")[0].state_dict()
    stored = smf.read_tensors(tmp_path / "run/memory.safetensors")
    assert not any(
        a.shape == b.shape and torch.equal(a, b) for a in base.values() for b in stored.values()
    )


@pytest.mark.parametrize("breaks", [
    lambda loss: loss * math.nan,
    lambda loss: loss + (loss - loss.detach()).sqrt(),  # + 0, of infinite slope
], ids=["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(runs, tmp_path, monkeypatch, breaks):
    token_loss = smf.token_loss
    calls = []

    def broken(model, batch):
        calls.append(torch.is_grad_enabled())
        loss = token_loss(model, batch)
        return breaks(loss) if sum(calls) == 5 else loss

    monkeypatch.setattr(smf, "token_loss", broken)
    with pytest.raises(smf.Refused, match="--lr: at step 4"):
        sparse(runs, tmp_path / "run")
    state = smf.read_tensors(tmp_path / "run/checkpoint.safetensors")
    assert state["step"] == 4 and all(
        torch.isfinite(tensor.float()).all() for tensor in state.values()
    )


def test_stage_2_on_all_rows_is_a_plain_sgd_loop(runs, tmp_path, monkeypatch):
    """The library's own loss, the whole batch at once, autograd's gradient of V and of the alphas,
    clipped together; SGD on V, AdamW on the alphas."""
    monkeypatch.setattr(smf, "CLIP", 0.02)
    flags = ["--scorer=all", "--optimizer=sgd", "--lr=300", "--train-scale", "--scale-lr=0.05"]
    ended = sparse(runs, tmp_path / "run", *flags, "--warmup=2")
    model, tokenizer = smf.load(runs / "additive")
    started = {name: tensor.clone() for name, tensor in smf.memory_state(model).items()}
    args = smf.parse("", train_sparse.FLAGS, QUICK)
    data, _ = train_sparse.prepare(model, tokenizer, evaluation.read_data(args), args)
    scales = [wrapper.scale.requires_grad_() for wrapper in smf.wrappers(model).values()]
    tables = [memory.values.requires_grad_() for memory in smf.memories(model).values()]
    adamw = torch.optim.AdamW(scales, weight_decay=0.0, eps=1e-12)
    sgd = torch.optim.SGD(tables)
    for step, batch in zip(range(6), smf.batch_stream(data, 16, 0)):
        library_loss(model, batch).backward()
        assert torch.nn.utils.clip_grad_norm_([*tables, *scales], 0.02) > 0.02
        factor = min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 6))
        for optimizer, lr in ((sgd, 300), (adamw, 0.05)):
            optimizer.param_groups[0]["lr"] = factor * lr
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in smf.memory_state(model).items():
        if name.endswith(("values", "scale")):
            error = (ended[name] - tensor).norm() / (tensor - started[name]).norm()
            assert error < 1e-3, (name, error)


def test_gradients_are_clipped_together(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(smf, "CLIP", 1e-3)
    before = smf.read_tensors(runs / "additive/memory.safetensors")
    after = sparse(
        runs, tmp_path / "run", "--optimizer=sgd", "--lr=1000", "--steps=1", "--warmup=0"
    )
    moved = torch.stack(
        [(after[name] - before[name]).norm() for name in after if "values" in name]
    ).norm()
    assert moved == pytest.approx(1000 * 1e-3, rel=1e-3)


# ---- the baselines


@pytest.fixture(scope="module")
def baseline_runs(tmp_path_factory):
    """A directory with a short run of each baseline."""
    path = tmp_path_factory.mktemp("baselines")
    for method in ("lora", "full"):
        baseline(method, path / method)
    return path


def baseline(method, out, *flags):
    """Run baselines.py without its evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        unmeasured(patch)
        baselines.main([f"--method={method}", f"--out={out}", *QUICK, *flags])


def test_lora_starts_as_the_base_and_freezes_it():
    model, ids = small_model(), torch.randint(3, 50, (2, 9))
    before = model(ids).logits
    baselines.add_lora(model)
    assert torch.equal(model(ids).logits, before)
    adapted = {name: m for name, m in model.named_modules() if type(m) is baselines.LoRALinear}
    assert len(adapted) == 4 * 7  # layers, projections: q, k, v, o, gate, up, down
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in adapted for part in "AB"}
    assert all(m.A.shape[0] == 16 and m.A.any() and not m.B.any() for m in adapted.values())
    torch.nn.init.normal_(adapted["model.layers.0.mlp.up_proj"].B)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)


def test_lora_by_hand():
    linear = torch.nn.Linear(5, 3)
    adapted, x = baselines.LoRALinear(linear), torch.randn(2, 7, 5)
    torch.nn.init.normal_(adapted.B)
    expected = x @ (linear.weight + 2 * adapted.B @ adapted.A).T + linear.bias
    assert torch.allclose(adapted.eval()(x), expected, atol=1e-5)
    one = baselines.LoRALinear(torch.nn.Linear(1, 1))
    torch.nn.init.ones_(one.B)
    x = torch.ones(10_000, 1)
    dropped = (one(x) == one.linear(x)).double().mean()
    assert dropped == pytest.approx(0.05, abs=0.01) and not (one.eval()(x) == one.linear(x)).any()


def test_lora_needs_linear_projections():
    with pytest.raises(smf.Refused, match="no nn.Linear"):
        baselines.add_lora(small_model("GPT2"))


def test_merged_lora_equals_unmerged(baseline_runs):
    merged, tokenizer = smf.load(baseline_runs / "lora")
    base, _ = smf.load_base("tiny/model")
    tensors = smf.read_tensors(baseline_runs / "lora/lora.safetensors")
    model, _ = smf.load_base("tiny/model")
    smf.decoder_blocks(baselines.add_lora(model)).load_state_dict(tensors, strict=False)
    assert len(tensors) == 2 * 28 and all(tensor.any() for tensor in tensors.values())
    ids = tokenizer("Where was Nuto Lilton born?", return_tensors="pt")["input_ids"]
    merged, unmerged, base = (m.eval()(ids).logits for m in (merged, model, base))
    assert torch.allclose(merged, unmerged, atol=1e-4)
    assert not torch.allclose(merged, base, atol=1e-2)


@pytest.mark.parametrize("train", [False, True])
def test_lora_is_that_of_peft(train):
    peft = pytest.importorskip("peft")
    ours, theirs, batch = small_model(), small_model(), smf.collate(examples(4))
    baselines.add_lora(ours)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules=names, bias="none"))
    pairs = []
    for name, module in ours.named_modules():
        if type(module) is baselines.LoRALinear:
            torch.nn.init.normal_(module.B, std=0.1)
            other = theirs.get_submodule(f"base_model.model.{name}")
            pairs += [(module.A, other.lora_A["default"].weight),
                      (module.B, other.lora_B["default"].weight)]
    for a, b in pairs:
        b.data.copy_(a.data)
    losses = []
    for model in (ours.train(train), theirs.train(train)):
        torch.manual_seed(0)  # the same dropout
        losses.append(smf.token_loss(model, batch).sum())
        losses[-1].backward()
    assert torch.allclose(*losses, rtol=1e-6) and len(pairs) == 2 * 28
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_baseline_is_a_plain_adamw_loop(baseline_runs, method):
    """The library's own loss, the whole batch at once, AdamW without weight decay, clipping."""
    model, tokenizer = smf.load_base("tiny/model")
    args = smf.parse("", baselines.FLAGS, [f"--method={method}", *QUICK])
    data, _ = train_sparse.prepare(model, tokenizer, evaluation.read_data(args), args)
    torch.manual_seed(0)
    model = baselines.add_lora(model) if method == "lora" else model.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    for step, batch in zip(range(6), smf.batch_stream(data, 16, 0)):
        torch.manual_seed(step)  # dropout: LoRALinear is in training mode
        library_loss(model, batch).backward()
        assert torch.nn.utils.clip_grad_norm_(trained.values(), 1.0) > 1.0
        lr = baselines.LEARNING_RATE["tiny"][method] * min(1, (step + 1) / 11)
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / 6))
        optimizer.step()
        optimizer.zero_grad()
    path = baseline_runs / method
    if method == "lora":
        ended = smf.read_tensors(path / "lora.safetensors")
        ended = {f"model.layers.{name}": tensor for name, tensor in ended.items()}
    else:
        ended = dict(AutoModelForCausalLM.from_pretrained(path / "model").named_parameters())
        loaded = smf.load(path)[0].state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in ended.items())
    assert ended.keys() == trained.keys()
    for name, tensor in trained.items():
        error = (ended[name] - tensor).norm() / (tensor - before[name]).norm()
        assert error < 1e-3, (name, error)


def test_every_method_sees_the_same_batches_at_the_same_rates(runs, tmp_path, monkeypatch):
    seen, backward = [], smf.backward

    def spy(model, batch, size):
        seen.append(batch)
        return backward(model, batch, size)

    monkeypatch.setattr(smf, "backward", spy)
    sparse(runs, tmp_path / "sparse", "--seed=3", "--lr=1")
    for method in ("lora", "full"):
        baseline(method, tmp_path / method, "--seed=3", "--lr=1")
    assert seen[:6] == seen[6:12] == seen[12:] and seen[0] != seen[1] and len(seen) == 18
    lines = [metrics(tmp_path / name) for name in ("sparse", "lora", "full")]
    assert lines[1][0]["loss"] == lines[2][0]["loss"]
    for line in zip(*lines):
        assert len({part["lr"] for part in line}) == 1


def test_another_seed_begins_elsewhere(tmp_path):
    for run in (tmp_path / "0", tmp_path / "1"):
        seed = f"--seed={run.name}"
        baseline("lora", run / "lora", "--steps=1", "--lr=1e-12", seed)
        train_retrofit.main(["--steps=0", "--background=8", *SMALL, seed, f"--out={run / 'fresh'}"])
    for path, end in (("lora/lora.safetensors", ".A"), ("fresh/memory.safetensors", ".values")):
        one, other = (smf.read_tensors(tmp_path / seed / path) for seed in "01")
        begun = [name for name in one if name.endswith(end)]
        assert begun and not any(torch.allclose(one[n], other[n], atol=1e-3) for n in begun)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_baseline_resumes_to_the_same_end(baseline_runs, tmp_path, monkeypatch, method):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 3)
        baseline(method, tmp_path / "cut", "--save-every=2")
    baseline(method, tmp_path / "cut", "--save-every=2", "--resume")
    expected, resumed = (smf.load(run)[0].state_dict()
                         for run in (baseline_runs / method, tmp_path / "cut"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert metrics(tmp_path / "cut") == metrics(baseline_runs / method)
    files = {"config.json", "metrics.jsonl", "eval.json", smf.WEIGHTS[method]}
    assert {path.name for path in (tmp_path / "cut").iterdir()} == files


CHECKPOINTS = [  # a file of a run that was cut off, what happens to it, what the refusal says
    ("checkpoint.safetensors", lambda t: t.pop("step"), "do not fit"),
    ("checkpoint.safetensors",
     lambda t: t.pop(next(name for name in t if name.endswith((".m", ".exp_avg")))), "do not fit"),
    ("checkpoint.safetensors",
     lambda t: t.update({name: tensor[:1] for name, tensor in t.items()
                         if tensor.dim() and not name.endswith("rows")}), "do not fit"),
    ("config.json", lambda c: c.update(arguments=[]), "do not fit"),
    ("config.json", lambda c: c.update(training_data="0"), "another training_data"),
]


@pytest.mark.parametrize("script", [train_retrofit, train_sparse, baselines])
def test_a_broken_checkpoint_is_refused(runs, tmp_path, monkeypatch, capsys, script):
    flags = {train_retrofit: ["--examples=40", "--background=8"], baselines: QUICK[:3],
             train_sparse: [*QUICK[:3], f"--retrofit={runs / 'additive'}"]}[script]
    flags = [*flags, "--steps=4", "--save-every=2"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 3)
        script.main([*flags, f"--out={tmp_path / 'cut'}"])
    for i, (file, change, said) in enumerate(CHECKPOINTS):
        run = shutil.copytree(tmp_path / "cut", tmp_path / str(i))
        rewrite(run / file, change)
        assert said in refused(capsys, script.main, *flags, f"--out={run}", "--resume")


def test_full_finetuning_of_a_bfloat16_base_trains_float32(tmp_path):
    seen = set()  # types that the layers compute in
    hook = torch.nn.modules.module.register_module_forward_hook(lambda layer, _, out: (
        seen.add(out.dtype) if isinstance(layer, torch.nn.Linear) else None))
    with hook:
        baseline("full", tmp_path / "run", "--dtype=bfloat16", "--steps=2", "--device=cpu")
    assert seen == {torch.bfloat16}
    trained = smf.read_tensors(tmp_path / "run/model/model.safetensors")
    base = smf.load_base("tiny/model")[0].state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert not any(torch.equal(tensor, base[name]) for name, tensor in trained.items())
    loaded = smf.load(tmp_path / "run")[0].state_dict()  # nothing is rounded away
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())


def test_a_broken_baseline_is_refused(baseline_runs, tmp_path):
    config = smf.read_json(baseline_runs / "lora/config.json")
    tensors = smf.read_tensors(baseline_runs / "lora/lora.safetensors")
    for part in (tensors | {"9.mlp.up_proj.A": torch.ones(1)}, {name: tensor[:, :3]
                 for name, tensor in tensors.items()}):
        path = tmp_path / str(len(part))
        path.mkdir()
        smf.write_json(path / "config.json", config)
        smf.write_tensors(path / "lora.safetensors", part)
        with pytest.raises(smf.Refused, match="do not fit"):
            smf.load(path)


# ---- measures


def test_token_loss_is_that_of_the_library():
    model, data = small_model(), examples(5)
    batch, total = smf.collate(data), 0.0
    for example, row in zip(data, smf.token_loss(model, batch)):
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.start] = -100
        total = model(ids, labels=labels).loss * (len(example.ids) - example.start)
        assert row.sum().item() == pytest.approx(total.item(), abs=1e-4)


def test_perplexity_scores_every_token_once():
    model, tokens = small_model(), torch.randint(3, 50, (53,)).tolist()
    for window, stride in ((16, 8), (16, 15), (10, 3), (64, 32), (53, 1)):
        losses, expected, done = evaluation.token_losses(model, tokens, window, stride), [], 1
        for begin in range(0, len(tokens), stride):  # by hand, one window at a time
            end = min(begin + window, len(tokens))
            logits = model(torch.tensor([tokens[begin:end]])).logits[0].log_softmax(-1)
            expected += [-logits[i - begin - 1, tokens[i]].item() for i in range(done, end)]
            done = end
            if end == len(tokens):
                break
        assert len(losses) == 52 == len(expected)
        assert sorted(losses.tolist()) == pytest.approx(sorted(expected), abs=1e-4)


def test_the_standard_error_of_perplexity_is_that_of_its_loss_times_it():
    model, tokenizer = smf.load_base("tiny/model")
    args = smf.parse("", evaluation.FLAGS, ["--eval-examples=1", "--eval-tokens=90"])
    data = evaluation.read_data(args)
    found = evaluation.forgotten(model, tokenizer, data, args)["perplexity"]
    tokens = tokenizer(data.text)["input_ids"][:90]
    losses = evaluation.token_losses(model, tokens, args.window, args.stride).double()
    assert found["value"] == pytest.approx(losses.mean().exp().item())
    error = losses.std(correction=0) / math.sqrt(89)
    assert found["stderr"] == pytest.approx(found["value"] * error.item()) and found["n"] == 89


def test_a_prompt_beyond_the_context_is_answered_without_its_beginning():
    model, tokenizer = smf.load_base("tiny/model")
    prompt = "Where was Bamin born? " * 9
    whole = evaluation.answers(model, tokenizer, [prompt], max_new_tokens=8)
    model.config.max_position_embeddings = 10
    ids = smf.prompt_ids(tokenizer, prompt)[0][-2:]
    for _ in range(8):  # greedy, by hand
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    cut = evaluation.answers(model, tokenizer, [prompt], max_new_tokens=8)
    assert cut != whole and cut == [tokenizer.decode(ids[2:], skip_special_tokens=True)]


def test_an_answer_ends_at_the_end_token():
    model, tokenizer = smf.load_base("tiny/model")
    questions = [q for _, q in evaluation.trivia_questions("", "tiny/trivia_qa", "validation")][:4]
    prompts = [q.prompt for q in questions]
    for prompt, text in zip(prompts, evaluation.answers(model, tokenizer, prompts), strict=True):
        ids = start = smf.prompt_ids(tokenizer, prompt)[0]
        for _ in range(32):  # greedy, by hand, without an end
            ids = ids + [model(torch.tensor([ids])).logits[0, -1].argmax().item()]
        first, *others = tokenizer.decode(ids[len(start):]).split(tokenizer.eos_token)
        assert text == first and len(others) > 1


def test_a_question_beyond_the_context_is_scored_without_its_beginning():
    model, tokenizer = smf.load_base("tiny/model")
    question = evaluation.trivia_questions("", "tiny/trivia_qa", "validation")[0][1]
    question = question._replace(prompt=question.prompt * 9)
    model.config.max_position_embeddings = 40
    whole = smf.encode(tokenizer, question.prompt, question.answer, end=False)
    ids, start = whole.ids[-40:], whole.start - len(whole.ids) + 40
    assert len(whole.ids) > 40 and start > 0
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)  # (40, vocabulary)
    by_hand = sum(log_p[i - 1, ids[i]].item() for i in range(start, 40)) / (40 - start)
    found = evaluation.ask(model, tokenizer, [question])[1].item()
    assert found == pytest.approx(by_hand, abs=1e-4)


def test_log_likelihood_and_answers_do_not_depend_on_the_batch():
    model, tokenizer = smf.load_base("tiny/model")
    questions = [q for _, q in evaluation.trivia_questions("", "tiny/trivia_qa", "validation")][:12]
    prompts = [q.prompt for q in questions] + ["Tell me about Bamin."]
    together = evaluation.answers(model, tokenizer, prompts, max_new_tokens=8)
    assert together == [
        evaluation.answers(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts
    ]
    assert evaluation.answers(model, tokenizer, prompts[-1:]) == evaluation.answers(
        model, tokenizer, prompts[-1:], max_new_tokens=32)  # [Gupta26 App. C]
    data = [smf.encode(tokenizer, q.prompt, q.answer, end=False) for q in questions]
    one = [evaluation.log_likelihoods(model, [example]).item() for example in data]
    assert evaluation.log_likelihoods(model, data).tolist() == pytest.approx(one, abs=1e-4)
    assert evaluation.ask(model, tokenizer, questions)[1].tolist() == pytest.approx(one, abs=1e-4)
    model.config.use_cache = False  # as some models come
    assert evaluation.log_likelihoods(model, data).tolist() == pytest.approx(one, abs=1e-4)
    model.generation_config.repetition_penalty = 9.0  # of a model's own, not greedy
    assert together == evaluation.answers(model, tokenizer, prompts, max_new_tokens=8)
    assert model.generation_config.repetition_penalty == 9.0


def by_hand(model, ids, start):
    """Mean log-likelihood of ids[start:], one sequence, no padding, no cache."""
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    terms = [logits[i - 1, ids[i]].item() for i in range(start, len(ids))]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("template", [0, 1, 6])  # tokens that all prompts begin with
def test_log_likelihoods_share_the_beginning_and_equal_one_at_a_time(kind, template):
    model, random = small_model(kind), torch.Generator().manual_seed(template)
    smf.retrofit(model, [1, 2], scale=1.0, **SHAPE)
    prompts = [list(range(3, 3 + template)) + [3 + i % 2] + [  # no longer in common
        torch.randint(3, 50, (), generator=random).item() for _ in range(length)]
        for i, length in enumerate((0, 0, 4, 7, 7, 2))]
    data = []
    for which, answer in [(0, 1), (1, 3), (2, 2), (3, 5), (4, 1), (3, 4), (5, 2), (4, 3), (3, 1)]:
        new = torch.randint(3, 50, (answer,), generator=random).tolist()
        data.append(smf.Example(prompts[which] + new, len(prompts[which])))
    expected = [by_hand(model, *example) for example in data]
    for size in (9, 4, 2, 1):
        found = evaluation.log_likelihoods(model, data, size).tolist()
        assert found == pytest.approx(expected, abs=1e-4)


def test_answered():
    assert evaluation.answered("It is The  Eiffel-Tower, surely", ["eiffel tower"])
    assert evaluation.answered("a king of the hill", ["King of  Hill"])  # no articles
    assert evaluation.answered("It is O’Hare", ["O'Hare"])
    assert not evaluation.answered("It is the Rome", ["Paris", "", "the"])  # nothing is left of it


def test_any_alias_answers(monkeypatch):
    monkeypatch.setattr(evaluation, "answers", lambda *_: ["It is Big Ben", "A tower", "The clock"])
    questions = [evaluation.Question("Which?", "a tower", ["big ben", "the tower"])] * 3
    right, likelihood = evaluation.ask(*smf.load_base("tiny/model"), questions)
    assert right == [True, True, False] and len(likelihood) == 3


def test_the_option_of_the_highest_mean_log_likelihood_is_chosen():
    model, tokenizer = smf.load_base("tiny/model")
    names = ["A. flute", "B. the flute of the harp and the lute", "C. poet", "D. Answer"]
    right = []
    for cop in range(4):
        question = evaluation.Question("Which?", names[cop], options=names, cop=cop)
        right += evaluation.choose(model, tokenizer, [question])
    data = [smf.encode(tokenizer, "Which?", name, end=False) for name in names]
    likelihood = [by_hand(model, *example) for example in data]
    assert right == [i == likelihood.index(max(likelihood)) for i in range(4)] and sum(right) == 1
    prompt, space = smf.prompt_ids(tokenizer, "Which?")  # and the text is that of the options alone
    for (ids, start), name in zip(data, names):
        assert ids == prompt + tokenizer(space + name, add_special_tokens=False)["input_ids"]
        assert start == len(prompt)


def test_multiple_choice_equals_one_option_at_a_time():
    model, tokenizer = smf.load_base("tiny/model")
    _, questions = evaluation.medmcqa(smf.parse("", evaluation.FLAGS, ["--task=medmcqa"]))
    options = [smf.encode(tokenizer, q.prompt, option, end=False)
               for q in questions[:40] for option in q.options]
    likelihood = [by_hand(model, *option) for option in options]
    together = evaluation.log_likelihoods(model, options).tolist()
    assert together == pytest.approx(likelihood, abs=1e-4)
    fours = [likelihood[i:i + 4] for i in range(0, 160, 4)]
    expected = [four.index(max(four)) == q.cop for four, q in zip(fours, questions)]
    assert evaluation.choose(model, tokenizer, questions[:40]) == expected
    assert 0 < sum(expected) < 40


def fake_run(path, kind, **arguments):
    path.mkdir(parents=True)
    config = {"kind": kind, "model": "tiny/model", "dtype": "float32", "lora_scale": 2.0,
              "fingerprint": ""}
    smf.write_json(path / "config.json", config | ({"arguments": arguments} if arguments else {}))
    (path / smf.WEIGHTS[kind]).touch()
    return path


def fake_evaluated(monkeypatch, target):
    """Let every run have the target accuracy target(run's name, split) -> the list of reads."""
    reads = []

    def evaluated(run, args, data=None):
        reads.append((run.name, args.split))
        figure = {"value": target(run.name, args.split), "stderr": 0.25, "n": 4}
        perplexity = {"value": len(reads), "stderr": 0.0, "n": 1}
        right = [True, True, True, False] if run.name == "base" else [True, True, False, True]
        return {"target_accuracy": figure, "perplexity": perplexity, "knowledge_right": right,
                "knowledge_accuracy": figure}

    monkeypatch.setattr(evaluation, "evaluated", evaluated)
    return reads


def test_kept_counts_what_was_answered_before(tmp_path, monkeypatch):
    fake_evaluated(monkeypatch, lambda *_: 0.5)
    fake_run(tmp_path / "base", "base")
    run, args = fake_run(tmp_path / "lora-seed0", "lora"), smf.parse("", evaluation.FLAGS, [])
    row = evaluation.figures(run, args)
    assert row["kept"] == pytest.approx((2 / 3, math.sqrt(2 / 27)))
    same = evaluation.evaluated
    with monkeypatch.context() as patch:  # the two were asked other questions
        patch.setattr(evaluation, "evaluated", lambda run, *more: same(run, *more) | {"data": run})
        assert "kept" not in evaluation.figures(run, args)
    table = evaluation.table({"run": row, "other": {"perplexity": (7, 0)}})
    assert table == (
        "| run | target | perplexity | knowledge | kept |\n| --- | --- | --- | --- | --- |\n"
        "| run | 0.500 ± 0.250 | 1.00 ± 0.00 | 0.500 ± 0.250 | 0.667 ± 0.272 |\n"
        "| other |  | 7.00 ± 0.00 |  |  |"
    )


def lora_sweep(path):
    """Runs without weights: LoRA at three rates, two seeds each, and their base."""
    fake_run(path / "base", "base")
    return [fake_run(path / f"lora-lr{lr}-seed{seed}", "lora", lr=lr, seed=seed, epochs=2)
            for lr in (1.0, 0.3, 0.1) for seed in (1, 0)]


def test_the_learning_rate_is_chosen_on_validation_and_the_test_split_read_there_alone(
    tmp_path, monkeypatch
):
    """.3 and 1 are equal on the validation split, so .3, though the test split likes .1 best."""
    accuracy = {"0.1": 0.2, "0.3": 0.8, "1.0": 0.8}

    def target(name, split):
        lr, seed = name.split("-lr")[1].split("-seed") if "-lr" in name else ("0.1", 0)
        return accuracy[lr] + 0.1 * int(seed) if split == "validation" else 1 - accuracy[lr] / 2

    reads = fake_evaluated(monkeypatch, target)
    runs = lora_sweep(tmp_path)
    found = evaluation.sweeps(runs, "facts")
    assert found.keys() == {"lora"} and list(found["lora"]) == [1.0, 0.3, 0.1]
    assert found["lora"][0.3] == {1: runs[2], 0: runs[3]}
    figures = evaluation.measured(found["lora"], smf.parse("", evaluation.FLAGS, []))
    assert figures["chosen"] == 0.3 and list(figures["validation"]) == [0.1, 0.3, 1.0]
    assert {name for name, split in reads if split == "test"} == {
        "base", "lora-lr0.3-seed0", "lora-lr0.3-seed1"}
    assert len({name for name, split in reads if split == "validation"}) == 7
    mean = evaluation.average(figures["validation"][0.3])
    assert mean["target_accuracy"] == pytest.approx((0.85, math.sqrt(0.005)))
    mean = evaluation.average(figures["test"])
    assert mean["target_accuracy"] == pytest.approx((0.6, 0.0))
    assert evaluation.average({0: {"perplexity": (3.0, 0.1)}}) == {"perplexity": (3.0,)}
    more = fake_run(tmp_path / "lora-lr0.3-seed2", "lora", lr=0.3, seed=2, epochs=2)
    found = evaluation.sweeps([*runs, more], "facts")  # another seed, at the rate chosen alone
    figures = evaluation.measured(found["lora"], smf.parse("", evaluation.FLAGS, []))
    assert figures["chosen"] == 0.3 and list(figures["test"]) == [0, 1, 2]
    assert all(list(seeds) == [0, 1] for seeds in figures["validation"].values())
    assert ("lora-lr0.3-seed2", "validation") not in reads


def test_runs_that_make_no_sweep_are_refused(tmp_path):
    runs = lora_sweep(tmp_path)
    with pytest.raises(smf.Refused, match=r"lora has 3 learning rates with the seeds \[\]"):
        evaluation.sweeps([runs[0], *runs[3:]], "facts")
    few = [fake_run(tmp_path / f"full-lr{lr}-seed0", "full", lr=lr, seed=0) for lr in (1, 2)]
    with pytest.raises(smf.Refused, match="full has 2 learning rates"):
        evaluation.sweeps(runs + few, "facts")
    longer = fake_run(tmp_path / "lora-lr1-seed0", "lora", lr=1.0, seed=0, epochs=9)
    with pytest.raises(smf.Refused, match="epochs is 9"):
        evaluation.sweeps([runs[0], *runs[2:], longer], "facts")
    with pytest.raises(smf.Refused, match="the same condition, rate and seed"):
        evaluation.sweeps([*runs, longer], "facts")
    with pytest.raises(smf.Refused, match="epochs is 9"):
        evaluation.check_alike([*runs, longer], {"epochs"})


def test_the_frontier_is_that_of_the_validation_split():
    def figures(target, perplexity):
        return {seed: {"target_accuracy": (target + seed, 0.1), "perplexity": (perplexity, 0.1),
                       "knowledge_accuracy": (1 - target, 0.1)} for seed in (-0.1, 0.1)}

    studied = {
        "base": {"validation": {None: figures(0.2, 3)}, "chosen": None, "test": figures(0, 0)},
        "lora": {"validation": {1: figures(0.4, 4), 2: figures(0.9, 6), 3: figures(0.7, 9)},
                 "chosen": 2, "test": figures(0, 0)},
        "single": {"validation": {1: figures(0.4, 4)}, "chosen": 1, "test": figures(0, 0)},
    }
    curves = evaluation.frontier(studied, ("base", "lora", "single", "missing"))
    gain, perplexity, knowledge, chosen = curves.pop("lora")
    assert curves.pop("single")[1:] == ([4], pytest.approx([0.6]), 0) and curves == {}
    assert perplexity == [4, 6, 9] and chosen == 1
    assert gain == pytest.approx([0.2, 0.7, 0.5]) and knowledge == pytest.approx([0.6, 0.1, 0.3])


def test_every_curve_of_the_study_is_drawn(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    point = {"target_accuracy": (0.5,), "perplexity": (4.0,), "knowledge_accuracy": (0.6,)}
    base, *names = evaluation.STUDY[evaluation.TABLE_1]
    studied = {name: {"validation": {1.0: {0: point}}, "chosen": 1.0} for name in names}
    studied[base] = {"validation": {None: {0: point}}}
    drawn = []
    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.extend(figure.axes))
    evaluation.plot(studied, [evaluation.TABLE_1], tmp_path / "frontier.png")
    for axis in drawn:
        assert axis.get_legend_handles_labels()[1] == names
    assert len(drawn) == 2


def test_a_figure_is_measured_once_for_each_split_and_setting(tmp_path, monkeypatch):
    """Both splits share the measures of forgetting; another setting or other data has its own."""
    calls = []
    for measure in ("learned", "forgotten"):
        def count(model, tokenizer, data, args, measure=measure):
            calls.append(f"{measure}, {args.split}")
            return {measure: len(calls)}
        monkeypatch.setattr(evaluation, measure, count)
    base = smf.base_fingerprint(smf.load_base("tiny/model")[0])
    run = evaluation.base_run(
        tmp_path, {"model": "tiny/model", "dtype": "float32", "fingerprint": base})

    def read(*flags, data="{split} probes text"):
        args = smf.parse("", evaluation.FLAGS, flags)
        target, knowledge, text = (data or "- - -").format(split=args.split).split()
        data = data and evaluation.Data([], target, knowledge, [], text)
        result = evaluation.evaluated(run, args, data)
        return result["forgotten"], result["learned"]

    validation = "--split=validation"
    assert [read(), read(), read(validation), read(), read(validation)] == [
        (1, 2), (1, 2), (1, 3), (1, 2), (1, 3)]
    assert calls == ["forgotten, test", "learned, test", "learned, validation"]
    assert [read("--stride=32"), read("--stride=32"), read(validation)] == [(4, 5), (4, 5), (1, 3)]
    assert read(validation, data=None) == (1, 3)
    assert read(validation, data="other probes text") == (1, 6)
    assert read(validation, data="other probes words") == (7, 8)
    assert read(validation, data="other questions words") == (9, 10)


def test_each_measure_is_taken_of_its_own_questions(monkeypatch):
    asked = []

    def ask(model, tokenizer, questions):
        asked.append(questions)
        return [True, False], torch.tensor([-1.0, -2.0])

    monkeypatch.setattr(evaluation, "ask", ask)
    monkeypatch.setattr(evaluation, "choose", lambda *given: ask(*given)[0])
    monkeypatch.setattr(evaluation, "token_losses", lambda model, *given: (
        asked.append(given), torch.ones(4))[1])
    model, tokenizer = smf.load_base("tiny/model")
    data = evaluation.Data("trained", "target", "knowledge", "untaught", "Who is it? A poet.")
    for task, more in (("facts", {"target_log_likelihood"}), ("medmcqa", set())):
        args = smf.parse("", evaluation.FLAGS, [f"--task={task}", "--eval-tokens=3"])
        found = evaluation.learned(model, tokenizer, data, args)
        assert asked == ["target"] and found.keys() == {"target_accuracy"} | more
        asked.clear()
    begun = lambda text, add_special_tokens=True: {  # a tokenizer that begins every text
        "input_ids": [1] * add_special_tokens + tokenizer(text)["input_ids"]}
    found = evaluation.forgotten(model, begun, data, args)
    assert asked == [(tokenizer(data.text)["input_ids"][:3], 128, 64), "knowledge", "untaught"]
    assert found["knowledge_right"] == [True, False]
    assert found["knowledge_log_likelihood"]["value"] == -1.5
    assert found["perplexity"]["value"] == pytest.approx(math.e)
    rows = smf.read_rows("", "tiny/wikitext", "test", ["text"])["text"]
    assert len(rows) > 9 and evaluation.read_data(args).text.split("\n\n") == list(rows)


def test_another_base_has_figures_of_its_own(tmp_path):
    config = {"model": "tiny/model", "dtype": "float32", "fingerprint": "one"}
    base = evaluation.base_run(tmp_path, config)
    files = [base / "eval.json", base / "eval-validation.json"]
    for file in files:
        file.write_text("{}")
    evaluation.base_run(tmp_path, config)
    assert all(file.exists() for file in files)
    evaluation.base_run(tmp_path, config | {"fingerprint": "another"})
    assert not any(file.exists() for file in files)


def test_splits_that_ask_the_same_are_measured_once(tmp_path, monkeypatch):
    """Facts without other wordings: eval-validation.json is eval.json, but for the split's name."""
    unmeasured(monkeypatch)
    monkeypatch.setattr(smf, "load", lambda *_: (torch.nn.Module(), None))

    def read(split, target):
        args = smf.parse("", evaluation.FLAGS, [f"--split={split}"])
        return evaluation.evaluated(tmp_path, args, evaluation.Data([], target, [], [], ""))

    test = read("test", "target")
    monkeypatch.delattr(smf, "load")
    validation = read("validation", "target")
    assert validation == test | {"settings": test["settings"] | {"split": "validation"}}
    assert smf.read_json(tmp_path / "eval-validation.json") == validation
    assert smf.read_json(tmp_path / "eval.json") == test
    with pytest.raises(AttributeError):
        read("validation", "another target")


def test_all_are_measured_in_float32(tmp_path, monkeypatch):
    for measure in ("learned", "forgotten"):
        monkeypatch.setattr(evaluation, measure, lambda model, *_, measure=measure: {
            measure: {str(tensor.dtype) for tensor in model.parameters()} == {"torch.float32"}})
    base = smf.base_fingerprint(smf.load_base("tiny/model")[0])
    run = evaluation.base_run(
        tmp_path, {"model": "tiny/model", "dtype": "bfloat16", "fingerprint": base})
    data = evaluation.Data([], [], [], [], "")
    result = evaluation.evaluated(run, smf.parse("", evaluation.FLAGS, []), data)
    assert result["learned"] and result["forgotten"]


def test_the_study_counts_parameters_and_writes_its_files(
    runs, baseline_runs, tmp_path, monkeypatch, capsys
):
    fake_evaluated(
        monkeypatch, lambda name, split: 0.25 * name.count("lr") + 0.5 * (split == "test"))
    if not importlib.util.find_spec("matplotlib"):
        monkeypatch.setattr(evaluation, "plot", lambda studied, titles, path: path.touch())
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    made = tmp_path / "made"
    for lr in (0.1, 1):
        sparse(runs, made / f"additive-tfidf-lr{lr}-seed0", f"--lr={lr}", "--top-t=9")
    sparse(runs, made / "replacement-kl-seed0", "--scorer=kl", mode="replacement")
    sparse(runs, made / "additive-kl+s-seed0", "--train-scale", "--top-t=9")
    sources = [*made.glob("*-seed0"), baseline_runs / "lora", baseline_runs / "full"]
    for run in sources:
        name = run.name if "-seed" in run.name else f"{run.name}-seed0"
        shutil.copytree(run, tmp_path / "out" / name)
    shutil.copytree(baseline_runs / "lora", tmp_path / "out/of-no-table-seed0")
    paths = map(str, (tmp_path / "out").iterdir())
    evaluation.main([*paths, f"--results={tmp_path / 'results'}"])
    text = (tmp_path / "results/tables.md").read_text()
    assert text in capsys.readouterr().out and "of-no-table" not in text
    assert "| additive-tfidf, lr 0.1 of 0.1 to 1 | 0.750 |" in text
    assert "| lora, lr 0.001 | 0.500 |" in text
    result = smf.read_json(tmp_path / "results/results.json")
    assert result["figures"]["additive-tfidf"]["chosen"] == 0.1
    assert all((tmp_path / f"results/{name}.png").exists() for name in ("headline", "frontier"))
    base, memory, mlp = 253_504, 3 * (1024 * 64 + 64 * 128 + 128 * 32 + 2 * 64 * 64), 3 * 64 * 128
    lora = 4 * 16 * sum((64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64))
    cost = {name: list(row.values()) for name, row in result["costs"].items()}
    size = sum(file.stat().st_size for file in (baseline_runs / "full/model").iterdir())
    assert cost["full"] == [base, 0, base, None, round(size / 1e6, 2)]
    assert cost["lora"][:4] == [lora, 0, lora, None] and cost["lora"][4] == pytest.approx(
        lora * 4 / 1e6, abs=0.01)
    assert cost["additive-tfidf"][:3] == [memory + 3, memory + 3, 27 * 64]
    assert cost["additive-kl+s"][2] == 27 * 64 + 3
    touched, file = cost["additive-kl+s"][3:]
    assert 27 < touched <= 6 * 27
    assert file == pytest.approx(touched * (64 * 4 + 8) / 1e6, abs=0.01)
    assert cost["replacement-kl"][:2] == [memory, memory - 3 * mlp]


def test_the_study_says_what_it_misses(runs, baseline_runs, tmp_path, monkeypatch, capsys):
    argv = [baseline_runs / "lora", f"--results={tmp_path / 'results'}"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in refused(capsys, evaluation.main, *argv)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert "no run of full finetuning" in refused(capsys, evaluation.main, *argv)
    (tmp_path / "results").touch()
    assert "is a file" in refused(capsys, evaluation.main, *argv)
    args = smf.parse("", evaluation.FLAGS, [f"--results={tmp_path / 'none'}"])
    full = fake_run(tmp_path / "full-seed0", "full", task="facts", lr=1, seed=0, steps=9)
    lora = fake_run(tmp_path / "lora-seed0", "lora", task="facts", lr=1, seed=0, steps=8)
    with pytest.raises(smf.Refused, match="lora-seed0: steps is 8, but 9 in .*full-seed0"):
        evaluation.study([full, lora], args)
    config = smf.read_json(lora / "config.json") | {"training_data": "other"}
    smf.write_json(lora / "config.json", config | {"arguments": config["arguments"] | {"steps": 9}})
    with pytest.raises(smf.Refused, match="training_data is other"):
        evaluation.study([full, lora], args)


def test_the_cost_of_a_step_is_that_of_what_is_trained(monkeypatch):
    seen, turned = [], []

    def spy(script):
        train = script.train

        def spied(model, examples, steps, run, step, checkpoint, args):
            train(model, examples, steps, run, step, checkpoint, args)
            rows = {layer: len(memory.values) for layer, memory in smf.memories(model).items()}
            seen.append((sum(p.numel() for p in model.parameters() if p.requires_grad), rows,
                         {(len(example.ids), example.start) for example in examples},
                         len(examples), args.micro_batch_size))
        monkeypatch.setattr(script, "train", spied)

    for script in (train_retrofit, train_sparse, baselines):
        spy(script)
    barrier = SimpleNamespace(parties=2, wait=lambda: turned.append("next"))
    config = AutoConfig.from_pretrained(ROOT / "tiny/model")
    steps = {name: command for name, command in evaluation.STEPS.items()
             if name != "peft's LoRA" or importlib.util.find_spec("peft")}
    for name, command in steps.items():
        command = command.format(batch=8, middle=2)
        command += " --device=cpu --batch-size=8" + " --micro-batch-size=4" * (name == "SMF")
        seconds, memory, V, selecting = evaluation.step_costs(command, config, barrier, 1, rounds=2)
        assert len(seconds) == 2 and min(seconds) > 0 and memory > -0.01  # the kernel rounds
        assert V == sum(seen[-1][1].values()) * 64 * 4 / 2**30
        assert (0 < selecting < 1) == ("SMF" in name)
    assert len(turned) == 2 * 4 * len(steps)  # two runners; three steps and the selection
    memory = 3 * (16384 * 64 + 64 * 128 + 2 * 4 * 128 * 16 + 2 * 64 * 64) + 3
    lora = 4 * 16 * sum((64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64))
    three = dict.fromkeys((1, 2, 3), 16384)
    assert seen == [(memory, three, {(128, 1)}, 8, 8), (0, three, {(128, 112)}, 8, 4),
                    (lora, {}, {(128, 112)}, 8, 8), (253_504, {}, {(128, 112)}, 8, 8),
                    (0, three, {(128, 112)}, 8, 8), (0, {2: 16384}, {(128, 112)}, 8, 8),
                    (0, {2: 1_048_576}, {(128, 112)}, 8, 8),
                    (lora, {}, {(128, 112)}, 8, 8)][:len(steps)]


def test_the_table_of_costs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "RACES", [("SMF", "LoRA")])  # in two processes
    evaluation.main(["--cost=tiny/model", "--batch-size=4", "--max-length=32"])
    race, base, additive, replacement, lora, merged = [
        line for line in capsys.readouterr().out.splitlines() if re.match(r"\| [A-Zabr]", line)
        and "s/step" not in line and "prefill" not in line]
    ratio = r"[\d.]+ / [\d.]+ = [\d.]+"
    assert re.fullmatch(rf"\| SMF / LoRA( \| {ratio}){{3}} \| [\d.]+% of a step \|", race)
    assert base.startswith("| base |") and base.count("of the base's 1.00") == 2
    memory = 3 * (16384 * (64 * 4 + 16) + 4 * (64 * 128 + 2 * 4 * 128 * 16 + 2 * 64 * 64))
    sizes = [float(row.split(" | ")[3]) for row in (base, additive, replacement, lora, merged)]
    lora = 4 * 4 * 16 * sum((64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64))
    exact = [253_504 * 4, memory, memory, lora, 253_504 * 4]
    assert sizes == pytest.approx([size / 1e6 for size in exact], abs=0.06)
    assert "--cost nothing" in refused(capsys, evaluation.main, "--cost=nothing")
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails.py").write_text("raise ValueError('of its own')\n")
    partner = "train_sparse --device=cpu --batch-size=4 --max-length=32"
    config = AutoConfig.from_pretrained(ROOT / "tiny/model")
    with pytest.raises(smf.Refused, match="dies or .* was killed"):
        evaluation.race(["dies", partner], config, 1)
    for commands in (["fails", partner], [partner, "fails"]):  # the partner does not wait for ever
        with pytest.raises(ValueError, match="of its own"):
            evaluation.race(commands, config, 1)


def test_the_figure_of_stage_1(runs, baseline_runs, tmp_path, monkeypatch, capsys):
    path = tmp_path / "stage-1.png"
    run = tmp_path / "retrofit"
    shutil.copytree(runs / "additive", run)
    if not importlib.util.find_spec("matplotlib"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for other in (baseline_runs / "lora", run):  # another kind of run; too few steps
        assert "is no run of ten steps" in refused(capsys, evaluation.main, other,
                                                   f"--stage-1={path}")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines * 5)
    longer, other = tmp_path / "longer", tmp_path / "other"
    shutil.copytree(run, longer)
    shutil.copytree(run, other)
    first = [json.loads(line) for line in (lines * 6).splitlines()]
    (longer / "metrics.jsonl").write_text("".join(
        json.dumps(line | {"loss": line["loss"] + 1}) + "\n" for line in first))
    config = smf.read_json(other / "config.json")
    config["arguments"]["seed"] = 1
    smf.write_json(other / "config.json", config)
    flag = f"--stage-1={path}"
    assert "name the longest run first" in refused(capsys, evaluation.main, run, longer, flag)
    assert "seed is 1, but 0 in" in refused(capsys, evaluation.main, run, other, flag)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shown = []
    monkeypatch.setattr(pyplot, "close", lambda figure: shown.append(figure.axes[0].lines))
    evaluation.main([str(longer), str(run), flag])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [len(line.get_ydata()) for line in shown[0]] == [len(first) - 9, len(first) * 5 // 6 - 9]
    assert not shown[0][0].get_ydata().any()
    assert shown[0][1].get_ydata() == pytest.approx(-1, abs=1e-5)  # less the first run's


def test_people_of_the_tiny_world_do_not_mix():
    """The new, the never taught, and those of the probes: none of them is in the chats."""
    def names(path):
        text = (ROOT / f"tiny/{path}.jsonl").read_text()
        return set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+(?:berg|sen|ford|ley|ton|mark)\b", text))

    groups = [names(path) for path in ("facts/train", "untaught/test", "trivia_qa/validation",
                                       "oasst1/train")]
    assert [len(group) for group in groups] == [40, 40, 500, 1500]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert names("facts/test") == names("facts/validation") == groups[0]
    assert names("wikitext/test") <= groups[2]


def test_the_defaults_of_tiny_are_the_choice_of_the_study():
    figures = smf.read_json(ROOT / "results/tiny/results.json")["figures"]
    chosen = {name: part["chosen"] for name, part in figures.items()}
    rows, others = train_sparse.LEARNING_RATE["tiny"], baselines.LEARNING_RATE["tiny"]
    assert rows == {"adamw": chosen["additive-tfidf"], "sgd": chosen["additive-tfidf-sgd"]}
    assert others == {"lora": chosen["lora"], "full": chosen["full"]}


@pytest.mark.parametrize("flags, epochs, lr", [
    ([], 20, 0.5), (["--optimizer=sgd"], 20, 3000.0), (["--epochs=1"], 1, 0.5),
    (["--lr=0.1"], 20, 0.1), (["--preset=paper", "--lr=2"], 15, 2.0),
    (["--preset=paper"], 15, 8.0), (["--preset=paper", "--steps=300"], 15, 4.0),
    (["--preset=paper", "--optimizer=sgd", "--steps=11250"], 15, 8e4),
    (["--preset=paper", "--task=medmcqa"], 3, 8.0)])
def test_epochs_and_rate_fit_task_and_steps(runs, tmp_path, monkeypatch, flags, epochs, lr):
    """paper: less in more than 150 steps."""
    def begin_run(run, args, config):
        raise Killed(args.epochs, args.lr)

    monkeypatch.setattr(smf, "begin_run", begin_run)
    tiny = {name: value[1] for name, value in evaluation.EVALUATION.items() if "data" in name}
    with pytest.raises(Killed) as error:
        train_sparse.main(["--task=facts", *flags, f"--retrofit={runs / 'additive'}",
                           *(f"--{name}={value}" for name, value in tiny.items()), "--window=128",
                           "--stride=64", "--num-facts=40", "--num-questions=80",
                           f"--out={tmp_path / 'run'}"])
    assert error.value.args == (epochs, lr)


def test_facts_never_taught_stay_at_chance():
    """Of every method of results/tiny; one of 31 to 64 values, at random, is right in 2 %."""
    figures = smf.read_json(ROOT / "results/tiny/results.json")["figures"]
    untaught = {name: [row["untaught_accuracy"][0] for row in part["test"].values()]
                for name, part in figures.items()}
    assert len(untaught) > 15
    assert all(sum(v) / len(v) < 0.02 + 3 * 0.011 for v in untaught.values()), untaught


def test_every_table_of_the_readme_is_in_results():
    """Whoever edits a figure by hand, or forgets to run a command again, is told so."""
    readme = (ROOT / "README.md").read_text()
    written = {line for path in (ROOT / "results").rglob("*.md")
               for line in path.read_text().splitlines()}
    tables = re.findall(r"^\| (?:run|step of|inference) \|.*\n(?:\|.*\n)+", readme, re.M)
    rows = [line for table in tables for line in table.splitlines()]
    assert len(tables) > 8 and [line for line in rows if line not in written] == []
    counts = re.findall(r"^\| \[`(\w+\.py)`\]\(.*?\) \| (\d+) \|", readme, re.M)
    assert len(counts) == 6
    for name, lines in counts:
        assert len((ROOT / name).read_text().splitlines()) == int(lines)


def test_scores_of_the_controls():
    memory = smf.ProductKeyMemory(8, **SHAPE)
    memory.doc_freq[:3], memory.background_counts[:3] = torch.tensor([9, 0, 5]), 4
    memory.num_batches.fill_(9)
    counts = F.pad(torch.tensor([3, 1, 2]), (0, 253))
    of = {s: train_sparse.score_rows(s, memory, counts, 1) for s in ("tfidf", "kl", "count", "all")}
    assert torch.equal(of["count"], counts.float()) and torch.equal(of["all"], counts.float())
    assert torch.allclose(of["tfidf"], smf.tfidf_scores(counts, memory.doc_freq, 9))
    assert torch.allclose(of["kl"], smf.kl_scores(counts, memory.background_counts))
    one, same, other = (train_sparse.score_rows("random", memory, counts, i) for i in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def selection():
    """A memory, the counts of a batch, and select(scorer, step, seed), its 20 rows, as a list."""
    model, batch = small_smf(), smf.collate(examples(8))
    with smf.record_reads(model) as tapes:
        smf.token_loss(model, batch).sum().backward()
    layer, memory = next(iter(smf.memories(model).items()))
    masks = [batch["attention_mask"]]
    counts = smf.count_reads(smf.real_tokens(tapes[layer], masks)[1], len(memory.values))

    def select(scorer, step=0, seed=0):
        args = SimpleNamespace(scorer=scorer, top_t=20, seed=seed)
        return train_sparse.select(memory, tapes[layer], masks, step, args)[0].tolist()

    return memory, counts, select


def test_each_scorer_selects_its_own_best_rows():
    memory, counts, select = selection()
    memory.num_batches.fill_(9)
    memory.doc_freq.random_(0, 9)
    memory.background_counts.random_(0, 999)
    scores = {"tfidf": smf.tfidf_scores(counts, memory.doc_freq, memory.num_batches),
              "kl": smf.kl_scores(counts, memory.background_counts), "count": counts}
    best = {name: smf.top_rows(score, counts, 20).nonzero().flatten().tolist()
            for name, score in scores.items()}
    assert best["tfidf"] != best["kl"] != best["count"] != best["tfidf"]
    assert {name: select(name) for name in best} == best
    assert select("all") == counts.nonzero().flatten().tolist()


def test_random_rows_are_drawn_anew_at_every_step():
    *_, select = selection()

    def draw(step, seed):
        return select("random", step, seed)

    assert draw(0, 0) == draw(0, 0) != draw(1, 0) != draw(0, 1) != draw(0, 0)


def test_mean():
    figure = evaluation.mean([True, True, False, False])
    assert figure == {"value": 0.5, "stderr": 0.25, "n": 4}


# ---- data


def test_batches_are_a_pure_function_of_seed_and_step():
    data = examples(70)
    from_start = [batch for batch, _ in zip(smf.batch_stream(data, 16, seed=3), range(12))]
    from_seven = [batch for batch, _ in zip(smf.batch_stream(data, 16, seed=3, start=7), range(5))]
    assert from_start[7:] == from_seven
    epoch = [tuple(example.ids) for batch in from_start[:4] for example in batch]
    assert len(epoch) == len(set(epoch)) == 64
    assert from_start != [batch for batch, _ in zip(smf.batch_stream(data, 16, seed=4), range(12))]


def test_batches_leave_no_example_out_and_hold_similar_lengths():
    data = [smf.Example([3] * length, 1) for length in range(2, 72)]
    stream = [batch for batch, _ in zip(smf.batch_stream(data, 16, seed=0), range(80))]
    lengths = [[len(ids) for ids, _ in batch] for batch in stream]
    assert set().union(*lengths) == set(range(2, 72))  # six of an epoch wait, not always the same
    spans = sorted((min(part), max(part)) for part in lengths[:4])
    assert all(longest < shortest for (_, longest), (shortest, _) in zip(spans, spans[1:]))


def test_a_prompt_begins_with_one_first_token_the_templates_or_the_tokenizers():
    _, tokenizer = smf.load_base("tiny/model")
    ids = smf.prompt_ids(tokenizer, "Which?")[0]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # as Llama's
        single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    assert smf.prompt_ids(tokenizer, "Which?")[0] == ids and ids[0] == 2  # <|user|>
    tokenizer.chat_template = None
    ids = smf.prompt_ids(tokenizer, "Which?")[0]
    assert ids[0] == 1 and tokenizer.decode(ids[1:]) == "Question: Which?\nAnswer:"


def test_an_example_too_long_keeps_its_answer(capsys):
    model, tokenizer = smf.load_base("tiny/model")
    prompt, answer = "Where was Bamin born? " * 20, "violin piano flute"
    whole = smf.encode(tokenizer, prompt, answer)
    ids, start = smf.fit(whole, 9)
    assert len(ids) == 9 and tokenizer.decode(ids[start:]) == " " + answer + "<|end|>"
    assert ids[start - 1 : start] == smf.prompt_ids(tokenizer, prompt)[0][-1:]
    assert smf.fit(whole, 3) == (whole.ids[whole.start - 2 : whole.start + 1], 2)
    assert smf.fit(whole, len(whole.ids)) == whole
    reply = smf.encode(tokenizer, "Who?", answer * 20)  # the prompt of a long reply stays whole
    assert smf.fit(reply, reply.start + 9) == (reply.ids[: reply.start + 9], reply.start)
    scored = smf.encode(tokenizer, prompt, answer, end=False)
    assert scored.ids[scored.start :] + [tokenizer.eos_token_id] == ids[start:]
    cut = smf.encode_all(model, tokenizer, [(prompt, answer), ("Who?", answer)], 40)
    assert [len(ids) for ids, _ in cut] == [40, len(smf.encode(tokenizer, "Who?", answer).ids)]
    assert "1 of 2 examples are longer than 40 tokens" in capsys.readouterr().out
    model.config.max_position_embeddings = 20
    assert len(smf.encode_all(model, tokenizer, [(prompt, answer)], 40)[0].ids) == 20


def test_facts_are_asked_in_wordings_that_were_not_trained():
    args = smf.parse("", train_sparse.FLAGS, [])
    train, test = evaluation.facts(args)
    assert len(test) == 160 and len(train) == 480
    assert not {q.prompt for q in train} & {q.prompt for q in test}
    assert {q.answer for q in test} <= {q.answer for q in train}
    validation = evaluation.facts(
        smf.parse("", train_sparse.FLAGS, ["--split=validation"])
    )[1]
    assert not {q.prompt for q in validation} & {q.prompt for q in test + train}
    assert not {q.prompt for q in evaluation.read_data(args).knowledge} & {
        q.prompt for q in test + train
    }


def trivia_rows(path, questions):
    """Write TriviaQA's layout: fact i asked as questions[i], answered "fact i" or "no. i"."""
    rows = [
        {
            "question": question,
            "question_id": str(i),
            "answer": {"value": f"fact {i}", "aliases": [f"no. {i}"]},
        }
        for i, question in enumerate(questions)
    ]
    (path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_facts_without_other_wordings_are_asked_as_trained(tmp_path):
    trivia_rows(tmp_path, [f"Who is {i}?" for i in range(30)])
    flags = [f"--facts-data={tmp_path}", f"--trivia-data={tmp_path}", "--num-facts=20"]
    args = smf.parse("", train_sparse.FLAGS, flags)
    train, test = evaluation.facts(args)
    assert train == test and len(test) == 20
    assert test[3].aliases == ["fact 3", "no. 3"]
    assert [q.prompt for q in evaluation.read_data(args).knowledge] == [
        f"Who is {i}?" for i in range(20, 30)
    ]


def test_a_question_that_names_its_own_answer_is_not_asked(tmp_path):
    trivia_rows(tmp_path, [f"Who is {'no. ' * (i % 5 == 0)}{i}?" for i in range(30)])
    flags = [f"--facts-data={tmp_path}", f"--trivia-data={tmp_path}"]
    args = smf.parse("", train_sparse.FLAGS, [*flags, "--num-facts=20"])
    data = evaluation.read_data(args)
    assert len(data.train) == 20  # it is taught all the same
    assert len(data.target) == 16 and not any(map(evaluation.gives_away, data.target))
    assert [q.prompt for q in data.knowledge] == [f"Who is {i}?" for i in range(21, 30) if i != 25]
    with pytest.raises(smf.Refused, match="names its own answer"):
        evaluation.facts(smf.parse("", train_sparse.FLAGS, [*flags, "--num-facts=1"]))


def test_medmcqa_splits_do_not_overlap():
    args = smf.parse("", train_sparse.FLAGS, ["--task=medmcqa"])
    train, test = evaluation.medmcqa(args)
    validation = evaluation.medmcqa(
        smf.parse("", train_sparse.FLAGS, ["--split=validation"])
    )[1]
    parts = [{q.prompt for q in part} for part in (train, validation, test)]
    assert (
        all(parts)
        and not parts[0] & parts[1]
        and not parts[0] & parts[2]
        and not parts[1] & parts[2]
    )
    assert all(q.options[q.cop] == q.answer and q.answer.startswith("ABCD"[q.cop]) for q in train)
    fewer = evaluation.medmcqa(smf.parse("", evaluation.FLAGS, ["--num-questions=80"]))
    assert fewer == (train[:80], test)


@pytest.mark.parametrize(
    "script, flags, name",
    [
        (train_sparse, [], "tiny/additive-tfidf-seed0"),
        (train_sparse, ["--scorer=kl", "--train-scale"], "tiny/additive-kl+s-seed0"),
        (train_sparse, ["--task=medmcqa", "--seed=2"], "tiny/additive-tfidf-medmcqa-seed2"),
        (train_sparse, ["--fresh"], "tiny/additive-tfidf-fresh-seed0"),
        (train_sparse, ["--preset=paper", "--mode=replacement"], "paper/replacement-tfidf-seed0"),
        (train_sparse, ["--preset=paper", "--task=facts"], "paper/additive-tfidf-facts-seed0"),
        (train_sparse, ["--top-t=50", "--optimizer=sgd"], "tiny/additive-tfidf-sgd-t50-seed0"),
        (train_sparse, ["--task=medmcqa", "--retrofit=some-seed1", "--lr=2"],
         "tiny/replacement-tfidf-from-some-seed1-medmcqa-lr2.0-seed0"),
        (train_sparse, ["--top-t=500", "--task=facts"], "tiny/additive-tfidf-seed0"),
        (baselines, ["--method=full", "--lr=3e-5"], "tiny/full-lr3e-05-seed0"),
        (train_retrofit, ["--steps=0", "--mode=replacement"], "tiny/replacement-fresh-seed0"),
    ],
)
def test_names_of_runs(tmp_path, monkeypatch, script, flags, name):
    def stop(args, condition):
        raise Killed(run_directory(args, condition))

    run_directory = smf.run_directory
    (tmp_path / "some-seed1").mkdir()
    smf.write_json(tmp_path / "some-seed1/config.json", {
        "kind": "retrofit", "model": "", "dtype": "", "fingerprint": "", "layers": [],
        "mode": "replacement", "memory": {}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smf, "run_directory", stop)
    with pytest.raises(Killed, match=rf"^out/{name.replace('+', '.')}$"):
        script.main(flags)


def test_eval_shows_every_run_under_its_task_beside_the_base(runs, tmp_path, monkeypatch, capsys):
    unmeasured(monkeypatch)
    flags = [f"--retrofit={runs / 'additive'}", *QUICK, "--steps=1"]
    for name, task in (("a/run", "facts"), ("b/run", "facts"), ("a/other", "medmcqa")):
        train_sparse.main([*flags, f"--task={task}", f"--out={tmp_path / name}"])
    capsys.readouterr()
    evaluation.main([str(tmp_path / name) for name in ("b/run", "a/other", "a/run")])
    facts, medmcqa = capsys.readouterr().out.split("medmcqa, test split")
    rows = {line.split(" | ")[0] for line in facts.splitlines()}
    assert rows >= {f"| {tmp_path / name}" for name in ("a/run", "b/run", "a/base", "b/base")}
    rows = {line.split(" | ")[0] for line in medmcqa.splitlines()}
    assert rows >= {"| base", "| other"}
    train_sparse.main([*flags, "--eval-examples=3", f"--out={tmp_path / 'a/less'}"])
    capsys.readouterr()
    evaluation.main([str(tmp_path / name) for name in ("a/run", "a/less")])
    more, less = capsys.readouterr().out.split("facts, test split, eval_examples 3")
    assert "| run |" in more and "| less |" in less and "| less |" not in more


# ---- bad input: one line on stderr, exit code 2, nothing written


BAD = [
    (train_retrofit, ["--layers=99"], "--layers"),
    (train_retrofit, ["--layers=one"], "--layers"),
    (train_retrofit, ["--n-keys=4", "--top-k=5"], "--top-k"),
    (train_retrofit, ["--k-dim=7"], "--k-dim"),
    (train_retrofit, ["--mode=sideways"], "--mode"),
    (train_retrofit, ["--batch-size=16", "--micro-batch-size=5"], "--micro-batch-size"),
    (train_retrofit, ["--batch-size=5000"], "--batch-size"),
    (train_retrofit, ["--lr=-1"], "--lr"),
    (train_retrofit, ["--lr=nan"], "--lr"),
    (train_retrofit, ["--seed=99999999999999999999999"], "--seed"),
    (train_retrofit, ["--n-keys=5000000", "--steps=0"], "--n-keys"),
    (train_retrofit, ["--resume", "--overwrite"], "--overwrite"),
    (train_retrofit, ["--model=no/such/model"], "--model"),
    (train_retrofit, ["--model=tiny"], "--model"),
    (train_retrofit, ["--oasst-data=no-such-dir"], "--oasst-data"),
    (train_retrofit, ["--oasst-data=tiny/wikitext"], "--oasst-data"),
    (train_retrofit, ["--oasst-data=tiny/trivia_qa"], "--oasst-data"),
    (train_retrofit, ["--max-length=1"], "--max-length"),
    (train_retrofit, ["--examples=8"], "--examples"),
    (train_retrofit, ["--preset=huge"], "--preset"),
    (train_retrofit, ["--preset=paper"], "--model Qwen"),
    (train_retrofit, ["--stepz=3"], "--stepz"),
    (train_retrofit, ["--device=cuda"], "--device"),
    (train_retrofit, ["--step=3"], "--step"),
    (train_sparse, ["--scorer=best"], "--scorer"),
    (train_sparse, ["--top-t=0"], "--top-t"),
    (train_sparse, ["--steps=0"], "--steps"),
    (train_sparse, ["--optimizer=lion"], "--optimizer"),
    (train_sparse, ["--scorer=all", "--top-t=50"], "--top-t"),
    (train_sparse, ["--mode=replacement", "--train-scale"], "--train-scale"),
    (train_sparse, ["--retrofit=nowhere"], "nowhere"),
    (train_sparse, ["--retrofit=nowhere", "--fresh"], "--fresh"),
    (train_sparse, ["--num-facts=5000"], "--num-facts"),
    (train_sparse, ["--facts-data=tiny/wikitext"], "--facts-data"),
    (train_sparse, ["--facts-data="], "--facts-data"),
    (train_sparse, ["--num-facts=1"], "--batch-size"),
    (train_sparse, ["--task=medmcqa", "--medmcqa-data=tiny/facts"], "--medmcqa-data"),
    (train_sparse, ["--stride=128"], "--stride"),
    (train_sparse, ["--eval-tokens=1"], "--eval-tokens"),
    (train_sparse, ["--wikitext-data=tiny/facts"], "--wikitext-data"),
    (train_sparse, ["--preset=paper", "--scorer=kl"], "--preset tiny"),
    (baselines, ["--method=prefix"], "--method"),
    (baselines, ["--scorer=kl"], "--scorer"),
    (baselines, ["--num-facts=5000"], "--num-facts"),
    (baselines, ["--window=100000", "--stride=9"], "--window"),
    (baselines, ["--model=no/such/model"], "--model"),
    (baselines, ["--batch-size=5000"], "--batch-size"),
    (evaluation, ["nowhere"], "nowhere"),
    (evaluation, ["--split=train"], "--split"),
]


def refused(capsys, main, *argv):
    """Run a script's main as the command line does -> the one line that it leaves on stderr."""
    with pytest.raises(SystemExit) as stop:
        smf.script(lambda: main([str(arg) for arg in argv]))
    err = capsys.readouterr().err
    lines = [
        line for line in err.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line
    ]
    assert stop.value.code == 2 and len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize(
    "script, flags, named",
    BAD,
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_flags_are_refused_in_one_line(tmp_path, monkeypatch, capsys, script, flags, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smf.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named in refused(capsys, script.main, *flags)
    assert list(tmp_path.iterdir()) == []


def test_foreign_directories_are_left_alone(runs, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "qwen2"}')
    for flag in ("--overwrite", "--resume"):
        out = f"--out={tmp_path / 'base'}"
        assert "no run" in refused(capsys, train_retrofit.main, out, flag)
    retrofit = f"--retrofit={runs / 'additive'}"
    beside = refused(capsys, train_sparse.main, retrofit, f"--out={tmp_path / 'run'}", *QUICK)
    assert "not the base" in beside
    onto = refused(capsys, train_sparse.main, retrofit, f"--out={runs / 'additive'}", "--overwrite")
    assert "another directory" in onto and (runs / "additive/memory.safetensors").exists()
    other = refused(capsys, train_sparse.main, retrofit, "--scale=0.01", f"--out={tmp_path / 'x'}")
    assert "--scale" in other
    assert (tmp_path / "base/config.json").read_text() == '{"model_type": "qwen2"}'
    assert [path.name for path in tmp_path.rglob("*")] == ["base", "config.json"]


def test_overwrite_begins_again_and_keeps_no_figures(runs, tmp_path):
    sparse(runs, tmp_path / "run", "--lr=0.1")
    figures = smf.read_json(tmp_path / "run/eval.json") | {"of": "the old run"}
    for name in ("eval.json", "eval-validation.json"):
        smf.write_json(tmp_path / "run" / name, figures)
    sparse(runs, tmp_path / "run", "--lr=1", "--overwrite")
    sparse(runs, tmp_path / "new", "--lr=1")
    assert same_run(tmp_path / "run", tmp_path / "new")
    assert "old" not in (tmp_path / "run/eval.json").read_text()
    assert not (tmp_path / "run/eval-validation.json").exists()


@pytest.mark.parametrize("error", [
    MemoryError("no room"), torch.OutOfMemoryError("cannot allocate"),
    RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_to_be_out_of_memory_is_no_fault_of_a_run(runs, monkeypatch, capsys, error):
    def full(*_, **__):
        raise error

    for module, name in ((smf, "load_memory"), (AutoModelForCausalLM, "from_pretrained")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            line = refused(capsys, lambda run: smf.load(*run), runs / "additive")
        assert str(error) in line and "--micro-batch-size" in line and "--overwrite" not in line


def test_a_bug_is_no_refusal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # script lets go of it

    def bug():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        smf.script(bug)


def test_ctrl_c_says_how_to_go_on(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        smf.script(interrupted)
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(runs, tmp_path, capsys):
    before = (runs / "additive/memory.safetensors").read_bytes()
    assert "--overwrite" in refused(capsys, train_retrofit.main, f"--out={runs / 'additive'}")
    (tmp_path / "letter.txt").write_text("dear")
    assert "no run" in refused(capsys, train_retrofit.main, f"--out={tmp_path}", "--overwrite")
    assert (tmp_path / "letter.txt").read_text() == "dear" and len(list(tmp_path.iterdir())) == 1
    assert (runs / "additive/memory.safetensors").read_bytes() == before
    assert "--mode" in refused(
        capsys,
        train_sparse.main,
        f"--retrofit={runs / 'additive'}",
        "--mode=replacement",
        f"--out={tmp_path / 'new'}",
    )


def test_the_mode_is_that_of_the_retrofit_named(runs, tmp_path, capsys):
    flags = [f"--retrofit={runs / 'replacement'}", "--train-scale", f"--out={tmp_path / 'new'}"]
    assert "--train-scale" in refused(capsys, train_sparse.main, *flags)
    assert not (tmp_path / "new").exists()


def rewrite(path, change):
    """Load a JSON or safetensors file, change it in place, write it back."""
    read, write = ((smf.read_json, smf.write_json) if path.suffix == ".json" else
                   (smf.read_tensors, smf.write_tensors))
    value = read(path)
    change(value)
    write(path, value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def pickle(path):
    torch.save({"1.memory.values": torch.zeros(3)}, path)


BROKEN = [  # kind of run, its file, what happens to it, what the refusal says
    ("retrofit", "config.json", lambda c: c["memory"].update(n_keys=16), "do not fit"),
    ("retrofit", "config.json", lambda c: c.update(layers=[0, 1, 2]), "do not fit"),
    ("retrofit", "config.json", lambda c: c.update(layers=[0, 1, 99]), "--layers"),
    ("retrofit", "config.json", lambda c: c.update(layers="1"), "layers"),
    ("retrofit", "config.json", lambda c: c.update(mode="sideways"), "--mode"),
    ("retrofit", "config.json", lambda c: c.pop("memory"), "memory"),
    ("retrofit", "config.json", lambda c: c.pop("fingerprint"), "fingerprint"),
    ("retrofit", "config.json", lambda c: c.update(fingerprint="0"), "is not the model"),
    ("retrofit", "config.json", lambda c: c.update(model="../../../etc"), "cannot be loaded"),
    ("retrofit", "config.json", lambda c: c.update(kind="pickle"), "no run"),
    ("retrofit", "config.json", truncate, "cannot be read"),
    ("retrofit", "config.json", lambda c: c.update(dtype="float33"), "do not fit"),
    ("retrofit", "config.json", lambda c: c.update(dtype="save"), "do not fit"),
    ("retrofit", "config.json", lambda c: c["memory"].update(evil=1), "do not fit"),
    ("retrofit", "config.json", lambda c: c["memory"].update(n_keys="32"), "do not fit"),
    ("retrofit", "config.json", lambda c: c["memory"].update(n_keys=10**6), "allocate"),
    ("retrofit", "config.json", lambda c: c.update(layers=[[1], [2]]), "do not fit"),
    ("retrofit", "config.json", lambda c: c.update(layers=[1.0, 2.0, 3.0]), "do not fit"),
    ("retrofit", "memory.safetensors",
     lambda t: t.update({"1.memory.keys": t["1.memory.keys"].double()}), "do not fit"),
    ("retrofit", "memory.safetensors", lambda t: t["1.memory.query_mean"].fill_(math.nan),
     "finite"),
    ("retrofit", "memory.safetensors", lambda t: t.pop("1.memory.values"), "do not fit"),
    ("retrofit", "memory.safetensors", lambda t: t["1.memory.values"][3].fill_(math.nan), "finite"),
    ("retrofit", "memory.safetensors", lambda t: t["2.scale"].fill_(math.inf), "finite"),
    ("retrofit", "memory.safetensors", truncate, "cannot be read"),
    ("retrofit", "memory.safetensors", pickle, "cannot be read"),
    ("retrofit", "memory.safetensors", Path.unlink, "unfinished"),
    ("sparse", "config.json", lambda c: c.update(retrofit="../../nowhere"), "missing or another"),
    ("sparse", "config.json", lambda c: c.pop("retrofit"), "retrofit"),
    ("sparse", "config.json", lambda c: c.update(retrofit="."), "missing or another"),
    ("sparse", "config.json", lambda c: c["memory"].update(top_k=3), "missing or another"),
    ("sparse", "config.json", lambda c: c.update(retrofit_fingerprint="0"), "missing or another"),
    ("sparse", "memory.safetensors", lambda t: t["1.rows"][-1].fill_(1024), "do not fit"),
    ("sparse", "memory.safetensors", lambda t: t["1.rows"][0].fill_(-1), "do not fit"),
    ("sparse", "memory.safetensors", lambda t: t.pop("3.values"), "do not fit"),
    ("sparse", "memory.safetensors", lambda t: t.update({"1.rows": t["1.rows"][1:]}), "do not fit"),
    ("sparse", "memory.safetensors", lambda t: t["2.values"][0].fill_(math.nan), "finite"),
    ("sparse", "memory.safetensors", lambda t: t.update({"1.scale": torch.ones(3)}), "do not fit"),
    ("sparse", "memory.safetensors", lambda t: t.update({"1.rows": t["1.rows"][:, None]}),
     "do not fit"),
    ("sparse", "memory.safetensors", truncate, "cannot be read"),
    ("lora", "lora.safetensors", lambda t: t.popitem(), "do not fit"),
    ("lora", "lora.safetensors", lambda t: next(iter(t.values())).fill_(math.nan), "finite"),
    ("lora", "lora.safetensors", truncate, "cannot be read"),
    ("lora", "config.json", lambda c: c.update(lora_scale="2"), "lora_scale"),
    ("full", "model/model.safetensors", truncate, "cannot be loaded"),
    ("full", "model", shutil.rmtree, "unfinished"),
    ("full", "model/config.json", lambda c: c.update(model_type="unheard"), "cannot be loaded"),
]


@pytest.fixture(scope="module")
def finished_runs(runs, baseline_runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    shutil.copytree(runs / "additive", path / "retrofit")
    for method in ("lora", "full"):
        shutil.copytree(baseline_runs / method, path / method)
    with pytest.MonkeyPatch.context() as patch:
        unmeasured(patch)
        train_sparse.main([f"--retrofit={path / 'retrofit'}", f"--out={path / 'sparse'}", *QUICK])
    return path


@pytest.mark.parametrize("kind, file, change, said", BROKEN)
def test_a_broken_run_is_refused(finished_runs, tmp_path, capsys, kind, file, change, said):
    shutil.copytree(finished_runs, tmp_path / "runs")
    path = tmp_path / "runs" / kind / file
    if change in (truncate, pickle, Path.unlink, shutil.rmtree):
        change(path)
    else:
        rewrite(path, change)
    assert said in refused(capsys, lambda argv: smf.load(argv[0]), tmp_path / "runs" / kind)


def test_a_retrofit_without_background_is_refused(finished_runs, tmp_path, capsys):
    shutil.copytree(finished_runs / "retrofit", tmp_path / "retrofit")
    rewrite(tmp_path / "retrofit/memory.safetensors",
            lambda tensors: [t.zero_() for name, t in tensors.items() if "num_batches" in name])
    flags = [f"--retrofit={tmp_path / 'retrofit'}", f"--out={tmp_path / 'run'}", *QUICK]
    assert "background" in refused(capsys, train_sparse.main, *flags)
    assert not (tmp_path / "run").exists()


LONG = "Who was it? " * 8000  # 100,000 characters


def fact(question="Who?", value="a poet", number="1", **answer):
    return {"question": question, "question_id": number, "answer": {"value": value, **answer}}


def choice(cop=1, **texts):
    row = {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": cop}
    return row | texts


FACTS = [  # rows of --facts-data; what the refusal says, or None: it works
    ([], "--facts-data"),
    ([fact(question="")] * 2, "no text"),
    ([fact(question="  \n")] * 2, "no text"),
    ([fact(question=7)] * 2, "no text"),
    ([fact(value="")] * 2, "no text or no answer"),
    ([fact(value=None, aliases=["x"])] * 2, "no text or no answer"),
    ([{"question": "Who?", "question_id": "1", "answer": "Paris"}] * 2, "no text or no answer"),
    ([{"question": "Who?", "question_id": "1"}] * 2, "no column answer"),
    ([fact()], None),  # one row
    ([fact(), fact(question="And who?")], None),  # one id: other wordings
    ([fact(), fact()], None),  # the same twice
    ([fact(aliases=["", None])], None),  # of these aliases none is any
    ([fact(question=LONG)], None),
    ([fact(value=LONG)], None),
    ([fact(question="<|end|> \u0000 \U0001f600")], None),
    (b"\xff\xfe{}", "--facts-data"),  # not UTF-8
    (b'{"question": "Who?"', "--facts-data"),
    (b"[1, 2]", "--facts-data"),
]


def works_or_refused(capsys, main, flags, run, said):
    """said: what the refusal says, or None, if the run is to come to its end."""
    if said:
        assert said in refused(capsys, main, *flags, f"--out={run}")
        assert not run.exists()
    else:
        main([*flags, f"--out={run}"])
        assert smf.finished(run)


@pytest.mark.parametrize("rows, said", FACTS)
def test_rows_of_facts_work_or_are_refused(runs, tmp_path, capsys, rows, said):
    data = tmp_path / "data/train.jsonl"
    data.parent.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else ""
    data.write_bytes(rows if isinstance(rows, bytes) else lines.encode())
    flags = [f"--retrofit={runs / 'additive'}", f"--facts-data={data.parent}", "--num-facts=1",
             "--batch-size=1", "--eval-examples=6", "--eval-tokens=200", "--steps=2"]
    works_or_refused(capsys, train_sparse.main, flags, tmp_path / "run", said)
    longer = not said and LONG in json.dumps(rows)
    assert ("examples are longer than" in capsys.readouterr().out) == longer


CHOICES = [  # a row among others of --medmcqa-data
    (choice(cop=4), "cop is 4"), (choice(cop=-1), "cop is -1"), (choice(cop=None), "cop is None"),
    (choice(cop="b"), "--medmcqa-data"), (choice(cop=1.5), "cop is"),
    (choice(opb=None), "are text"), (choice(question=""), "are text"), (choice(opd=""), None),
    (choice(question=LONG), None), (choice(opa=LONG), None),
]


@pytest.mark.parametrize("row, said", CHOICES)
def test_rows_of_medmcqa_work_or_are_refused(runs, tmp_path, capsys, row, said):
    for split in ("train", "validation"):
        path = tmp_path / f"data/{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in [choice()] * 8 + [row]))
    flags = [f"--retrofit={runs / 'additive'}", "--task=medmcqa", "--batch-size=4", "--steps=2",
             f"--medmcqa-data={tmp_path / 'data'}", "--eval-examples=9", "--eval-tokens=200"]
    works_or_refused(capsys, train_sparse.main, flags, tmp_path / "run", said)


def altered_model(path, change):
    """A copy of the embedded model, changed."""
    shutil.copytree(ROOT / "tiny/model", path)
    change(path)
    return path


def without(name, *keys):
    def change(path):
        rewrite(path / name, lambda value: [value.pop(key, None) for key in keys])
    return change


def pickled(path):
    torch.save(smf.read_tensors(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


MODELS = [  # what is changed in a model's directory; what the refusal says, or None: it works
    (lambda path: truncate(path / "model.safetensors"), "cannot be loaded"),
    (lambda path: (path / "tokenizer.json").unlink(), "cannot be loaded"),
    (lambda path: (path / "config.json").unlink(), "cannot be loaded"),
    (lambda path: rewrite(path / "config.json", lambda c: c.update(hidden_size=96)), "--model"),
    (lambda path: rewrite(path / "config.json", lambda c: c.update(
        model_type="mine", auto_map={"AutoConfig": "evil.Config"})), "cannot be loaded"),
    (pickled, "cannot be loaded"),
    (without("tokenizer_config.json", "pad_token"), None),
    (without("tokenizer_config.json", "eos_token"), "end token"),
    (lambda path: (path / "chat_template.jinja").unlink(missing_ok=True), None),
]


@pytest.mark.parametrize("change, said", MODELS)
def test_models_work_or_are_refused(tmp_path, capsys, change, said):
    model = altered_model(tmp_path / "model", change)
    flags = ["--method=lora", f"--model={model}", *QUICK]
    works_or_refused(capsys, baselines.main, flags, tmp_path / "run", said)


# ---- the scripts, as a user runs them


def script(*command, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *map(str, command[1:])],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_run(tmp_path):
    """No stage 1 yet: train_sparse.py runs it, then trains and prints before and after."""
    (tmp_path / "chats").mkdir()
    lines = (ROOT / "tiny/oasst1/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "chats/train.jsonl").write_text("".join(lines[:320]))
    small = [*SMALL, "--background=20", "--oasst-data=chats"]
    out = script("train_sparse.py", "--scorer=tfidf", *QUICK, *small, cwd=tmp_path)
    assert "running stage 1 first" in out and "| before stage 2 |" in out and "peak memory" in out
    names = {path.name for path in (tmp_path / "out/tiny").iterdir()}
    assert names == {"base", "additive-retrofit-seed0", "additive-tfidf-seed0"}
    result = smf.read_json(tmp_path / "out/tiny/additive-tfidf-seed0/eval.json")
    for measure in ("target_accuracy", "perplexity", "knowledge_accuracy"):
        assert result[measure].keys() == {"value", "stderr", "n"}
        assert result[measure]["n"] == (199 if measure == "perplexity" else 6)  # as in QUICK
    seed = ["--seed=1", "--split=validation"]
    fresh = script("train_sparse.py", "--fresh", *QUICK, *small, *seed, cwd=tmp_path)
    assert "running stage 1 first" in fresh and "additive-fresh-seed1" in fresh
    assert (tmp_path / "out/tiny/additive-fresh-seed1/metrics.jsonl").read_text() == ""
    made = smf.read_config(tmp_path / "out/tiny/additive-fresh-seed1")
    assert made["arguments"]["seed"] == 1  # handed on to stage 1
    lora = script("baselines.py", "--method=lora", *QUICK, cwd=tmp_path)
    assert "| after |" in lora and "before stage 2" not in lora and "never taught" in lora
    table = script("eval.py", cwd=tmp_path)
    assert all(f"| {name} |" in table for name in {*names, "lora-seed0", "additive-fresh-seed1"})
    assert "facts, test split" in table and "facts, validation split" in table
