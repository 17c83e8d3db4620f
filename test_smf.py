"""Tests of SMF: every invariant of the method, the retrofit of eight architectures, each script.

pytest test_smf.py        # no network, no GPU
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # of torch: the same sums in every process
import pytest  # noqa: E402
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import baselines
import eval as evaluation
import smf
import train_retrofit
import train_sparse

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "results"))
import architectures, cost, plain, study  # noqa: E401, E402
from choice import compare  # noqa: E402
SHAPE = {"n_keys": 16, "heads": 2, "k_dim": 8, "top_k": 4}
RETROFIT = ["--n-keys=32", "--top-k=4", "--examples=64", "--background=40", "--steps=4"]
QUICK = ["--task=facts", "--eval-examples=2", "--eval-tokens=130", "--steps=6"]
QUICK += ["--sources", "0", "40"]


def small_model(kind="Qwen2", seed=0):
    """A randomly initialised model of any decoder architecture, in evaluation mode."""
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
                 initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def small_smf(mode="additive", layers=(1, 2), alpha=1.0):
    return smf.retrofit(small_model(), list(layers), mode, alpha, **SHAPE)


def examples(number=32, seed=0):
    """Random Examples of 4 to 12 tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (number,), generator=g).tolist()
    return [smf.Example(torch.randint(3, 50, (n,), generator=g).tolist(), n // 2) for n in lengths]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(script, *flags):
    """Call the main function of a script with these flags."""
    script.main([str(flag) for flag in flags])


def sparse(parent, out, *flags):
    """Run train_sparse.py for a few steps -> the run."""
    run(train_sparse, f"--parent={parent}", f"--out={out}", *QUICK, *flags)
    return out


def delta(run):
    return load_file(run / "delta.safetensors")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_files(run, other):
    """Whether two runs ended with the same bytes."""
    return all((run / name).read_bytes() == (other / name).read_bytes()
               for name in ("delta.safetensors", "metrics.jsonl"))


def library_loss(model, batch):
    """The library's own loss of a list of Examples, all at once."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    labels = ids.masked_fill(mask == 0, -100)
    for row, (_, start) in zip(labels, batch):
        row[:start] = -100
    return model(ids, attention_mask=mask, labels=labels).loss


def batches_of(model, tokenizer, args):
    """The batches that a script learns with these arguments, one for each step."""
    return evaluation.training_plan(model, tokenizer, evaluation.load_data(args), args)[0]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A directory with a run of each sort: additive, replacement, tfidf, lora, full."""
    path = tmp_path_factory.mktemp("runs")
    for mode in ("additive", "replacement"):
        run(train_retrofit, f"--mode={mode}", *RETROFIT, f"--out={path / mode}")
    sparse(path / "additive", path / "tfidf", "--top-t=20")
    for method in ("lora", "full"):
        run(baselines, f"--method={method}", *QUICK, f"--out={path / method}")
    return path


# Invariant 1: exact lookup

def test_lookup_equals_brute_force():
    torch.manual_seed(0)
    memory = smf.ProductKeyMemory(32, n_keys=12, heads=3, k_dim=10, top_k=5)
    memory.x_rms.fill_(2.0)
    memory.track_queries(torch.randn(100, 32) * 3 + 1, 1.0)
    x = torch.randn(4, 7, 32)
    rows, weights = memory.lookup(x)  # (4, 7, 3, 5) both
    q = (memory.query(x) / 2 - memory.query_mean) / (memory.query_var + 1e-5).sqrt()
    for head in range(3):
        q1, q2 = q[..., head * 10:head * 10 + 5], q[..., head * 10 + 5:head * 10 + 10]
        s1, s2 = q1 @ memory.keys[head, 0].T, q2 @ memory.keys[head, 1].T  # (4, 7, 12) both
        every = torch.stack([s1[..., i] + s2[..., j] for i in range(12) for j in range(12)], -1)
        best, expected = every.topk(5)  # of (4, 7, 144)
        assert torch.equal(rows[:, :, head], expected)
        assert torch.allclose(weights[:, :, head], best.softmax(-1), atol=1e-6)


def test_forward_is_the_gated_sum_of_the_rows_read():
    torch.manual_seed(0)
    memory, mlp = smf.ProductKeyMemory(32, **SHAPE), torch.nn.Linear(32, 32)
    x, _, _ = torch.randn(2, 3, 32), memory.x_rms.fill_(2.0), memory.scale.fill_(3.0)
    rows, weights = memory.lookup(x)
    y = (weights[..., None] * memory.values[rows]).sum((2, 3))  # (2, 3, 32)
    expected = 3 * (y * F.silu(x @ memory.gate.weight.T / 2)) @ memory.out.weight.T
    assert torch.allclose(memory(x), expected, atol=1e-6)
    assert torch.equal(smf.AdditiveMemory(mlp, memory, 0.3)(x), mlp(x) + 0.3 * memory(x))
    assert torch.equal(smf.ReplacementMemory(memory)(x), memory(x))


# Invariant 2: the retrofit starts harmless

ARCHITECTURES = ["Qwen2", "Qwen3", "Llama", "Gemma", "Phi3", "GPT2", "GPTNeoX", "Mistral"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_retrofit_of_every_architecture_with_alpha_zero_is_the_base(kind):
    model, ids = small_model(kind), torch.randint(3, 50, (2, 9))
    before, state = model(ids).logits, state_of(model)
    assert smf.retrofit(model, [0, 3], alpha=0.0, **SHAPE) is model
    assert torch.equal(model(ids).logits, before)
    for name, tensor in state.items():  # nothing pretrained has changed
        name = re.sub(r"\.([03])\.mlp\.", r".\1.mlp.mlp.", name)
        assert torch.equal(model.state_dict()[name], tensor), name
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters()
                         if name in smf.memory_state(model)} and len(trainable) == 2 * 6
    smf.decoder_blocks(model)[3].mlp.alpha.data.fill_(1.0)
    assert not torch.equal(model(ids).logits, before)  # so the memory was really there


# Invariant 3: counts are of real tokens

def count(rows, n_rows):
    return torch.bincount(rows.flatten(), minlength=n_rows)  # (N,)


def counts_of(model, ids, mask, position_ids=None):
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position_ids)
    return {name: count(memory.collect()[1][mask.bool()], len(memory.values))
            for name, memory in smf.memories(model).items()}


def test_padding_left_or_right_changes_no_count():
    model, ids = small_smf(), torch.randint(3, 50, (1, 8))
    plain = counts_of(model, ids, torch.ones_like(ids))
    assert all(count.sum() == 8 * SHAPE["heads"] * SHAPE["top_k"] for count in plain.values())
    for left, right in ((0, 3), (0, 9), (2, 0), (7, 1)):
        mask = F.pad(torch.ones_like(ids), (left, right))
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        counted = counts_of(model, F.pad(ids, (left, right)), mask, position_ids)
        assert all(torch.equal(counted[name], plain[name]) for name in plain)


@pytest.mark.parametrize("size", [32, 5, 1])
def test_a_training_batch_counts_every_real_token_once(size):
    model, data = small_smf(), examples(32)
    tokens = sum(len(ids) for ids, _ in data)
    _, reads = smf.backward(model, data, size)
    for x, rows, weights, dy in reads.values():
        assert x.shape == dy.shape == (tokens, 32) and rows.shape == weights.shape == (tokens, 2, 4)
        assert count(rows, 256).sum() == tokens * 2 * 4


def test_the_background_counts_examples_and_reads():
    model, data = small_smf(), examples(6)
    smf.collect_background(model, [smf.collate(data[:4]), smf.collate(data[4:])])
    for name, memory in smf.memories(model).items():
        doc_freq, total = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
        for example in data:
            ids = torch.tensor([example.ids])
            count = counts_of(model, ids, torch.ones_like(ids))[name]
            doc_freq, total = doc_freq + (count > 0), total + count
        assert memory.num_batches == 6 and torch.equal(memory.doc_freq, doc_freq)
        assert torch.equal(memory.background_counts, total)


def test_what_was_read_is_handed_over_once_and_then_dropped():
    model, ids = small_smf(), torch.randint(3, 50, (1, 8))
    model(ids).logits.sum().backward()
    for memory in smf.memories(model).values():
        x, rows, weights, dy = memory.collect()
        assert x.shape == dy.shape == (1, 8, 32) and dy.any() and memory.last is memory.dy is None
        assert torch.allclose(weights.sum(-1), torch.ones(1, 8, 2))
    model(ids)
    assert all(memory.collect()[3] is None for memory in smf.memories(model).values())


# Invariants 4 and 8: selection and scores

def test_top_rows_takes_the_best_of_the_rows_read():
    counts = torch.tensor([0, 3, 1, 0, 2, 5])
    scores = torch.tensor([9.0, 0.1, 0.4, 8.0, 0.3, 0.1])
    assert smf.top_rows(scores, counts, 2).tolist() == [2, 4]
    assert smf.top_rows(scores, counts, 3).tolist() == [1, 2, 4]  # a tie: the lower row
    assert smf.top_rows(scores, counts, 100).tolist() == [1, 2, 4, 5]
    assert smf.top_rows(-scores, counts, 1).tolist() == [1]  # negative scores are scores, too
    assert counts.tolist() == [0, 3, 1, 0, 2, 5]


def test_the_scorers_are_pure_and_equal_to_numbers_by_hand():
    counts, background = torch.tensor([2, 1, 0, 1]), torch.tensor([9, 0, 3, 4])
    tfidf = [2 / 4 * math.log(10 / 10), 1 / 4 * math.log(10 / 1), 0, 1 / 4 * math.log(10 / 5)]
    assert smf.tfidf_scores(counts, background, 9).tolist() == pytest.approx(tfidf, abs=1e-6)
    q = [10 / 20, 1 / 20, 4 / 20, 5 / 20]
    kl = [.5 * math.log(.5 / q[0]), .25 * math.log(.25 / q[1]), 0, .25 * math.log(.25 / q[3])]
    assert smf.kl_scores(counts, background).tolist() == pytest.approx(kl, abs=1e-6)
    assert smf.harm(background).tolist() == pytest.approx([2.35, 0.1, 0.85, 1.1])
    assert counts.tolist() == [2, 1, 0, 1] and background.tolist() == [9, 0, 3, 4]


SCORES = {
    "tfidf": lambda memory, counts: smf.tfidf_scores(counts, memory.doc_freq, memory.num_batches),
    "kl": lambda memory, counts: smf.kl_scores(counts, memory.background_counts),
    "count": lambda memory, counts: counts.float(),
    "all": lambda memory, counts: torch.ones(len(counts)),
}


@pytest.mark.parametrize("scorer", SCORES)
def test_each_scorer_of_the_command_line_selects_its_own_best_rows(runs, tmp_path, scorer):
    """Those of one step, in the file, are those of the scores of its batch."""
    flags = [f"--scorer={scorer}", "--top-t=20", "--steps=1"]
    found = delta(sparse(runs / "additive", tmp_path / scorer, *flags))
    (model, tokenizer), args = smf.load(runs / "additive"), train_sparse.parse(QUICK)
    batch = batches_of(model, tokenizer, args)[0]
    for name, reads in smf.read_only(model, smf.collate(batch)).items():
        memory, mask = model.get_submodule(name), smf.collate(batch)["attention_mask"].bool()
        counts = count(reads[1][mask], len(memory.values))
        t = len(counts) if scorer == "all" else 20
        expected = smf.top_rows(SCORES[scorer](memory, counts), counts, t)
        assert torch.equal(found[f"{name}.values:rows"].sort().values, expected)
        others = [smf.top_rows(score(memory, counts), counts, t) for score in SCORES.values()]
        same = sum(torch.equal(expected, other) for other in others)
        assert same == (4 if scorer == "all" else 1)  # so they can be told apart


def test_the_gradient_scorer_takes_the_rows_of_the_largest_gradient(runs, tmp_path):
    flags = ["--scorer=gradient", "--top-t=20", "--steps=1"]
    found = delta(sparse(runs / "additive", tmp_path / "run", *flags))
    (model, tokenizer), args = smf.load(runs / "additive"), train_sparse.parse(QUICK)
    tables = {name: memory.values.requires_grad_() for name, memory in smf.memories(model).items()}
    library_loss(model, batches_of(model, tokenizer, args)[0]).backward()
    for name, values in tables.items():  # autograd's own gradient of the whole table
        best = values.grad.norm(dim=1).argsort(descending=True)[:20]
        assert set(found[f"{name}.values:rows"].tolist()) == set(best.tolist())


def test_random_rows_are_drawn_anew_at_every_step_and_seed():
    draws = [train_sparse.select_rows(None, torch.ones(256), None, step, SimpleNamespace(
        scorer="random", top_t=20, seed=seed)) for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(draws[0], draws[1]) and len({str(draw) for draw in draws}) == 3


# Invariants 5 and 6: frozen is frozen, moments are lazy

@pytest.mark.parametrize("flags", [
    ["--optimizer=adamw"], ["--scorer=kl", "--train-alpha", "--optimizer=adamw", "--least-harm"],
    ["--scorer=count"], ["--scorer=all"], ["--scorer=random", "--task=stream"],
    ["--scorer=gradient", "--task=stream"]], ids=" ".join)
def test_every_step_changes_the_rows_it_selects_and_nothing_else(runs, tmp_path, flags):
    model, tokenizer = smf.load(runs / "additive")
    args = train_sparse.parse([*QUICK, "--top-t=20", *flags])
    data, states, read = evaluation.load_data(args), [], []
    plan, _ = evaluation.training_plan(model, tokenizer, data, args)
    model.register_forward_pre_hook(lambda *_: states.append(state_of(model)))
    for memory in smf.memories(model).values():
        memory.register_forward_hook(lambda memory, *_: read.append(set(
            memory.last[1].flatten().tolist())))
    learned = train_sparse.train(model, plan, tmp_path, args, tokenizer, data)
    states, lines, selections = states + [state_of(model)], metrics(tmp_path), []
    for step, (before, after) in enumerate(zip(states, states[1:])):
        for i, name in enumerate(smf.memories(model)):
            moved = (before[f"{name}.values"] != after[f"{name}.values"]).any(1)
            selected = lines[step]["rows"][i]  # a token without a loss after it moves no row
            assert 0 < moved.sum() <= selected
            assert selected == 20 or "--scorer=all" in flags
            selections.append(set(moved.nonzero().flatten().tolist()))
            assert selections[-1] <= read[3 * step + i]
        free = ("memory.values", "mlp.alpha") if "--train-alpha" in flags else "memory.values"
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed and all(name.endswith(free) for name in changed)
        assert len(changed) == 3 + 3 * ("--train-alpha" in flags)
    assert len(lines) == 6 and len(set(map(frozenset, selections))) == 18  # they do change
    for i, name in enumerate(smf.memories(model)):  # and the run is what they add up to
        rows = learned[f"{name}.values:rows"]
        assert set(rows.tolist()) >= set().union(*selections[i::3]) and len(rows) <= sum(
            line["rows"][i] for line in lines)
        assert torch.equal(learned[f"{name}.values:values"], states[-1][f"{name}.values"][rows])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_trap_a_masked_gradient_does_not_freeze(weight_decay):
    """The papers' hook and torch's AdamW: rows outside of the mask move, all of them by weight
    decay, those selected before by their momentum. Hence RowOptimizer."""
    torch.manual_seed(0)
    values = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.AdamW([values], lr=0.1, weight_decay=weight_decay)
    for selected in (0, 1):
        mask = torch.arange(6) == selected
        hook = smf.mask_gradient(values, mask)
        (values * torch.randn(6, 4)).sum().backward()
        assert not values.grad[~mask].any() and values.grad[mask].all()  # it is masked, and yet
        before = values.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        hook.remove()
    moved = (values != before).any(1).tolist()
    assert moved == ([True] * 6 if weight_decay else [True, True, False, False, False, False])


def test_row_gradient_is_the_masked_dense_gradient():
    model = small_smf()
    _, reads = smf.backward(model, examples(8), 8)
    for name, (_, rows, weights, dy) in reads.items():
        dense, counts = model.get_submodule(name).values.grad, count(rows, 256)
        selected = smf.top_rows(counts.float(), counts, 20)
        gradient = smf.row_gradient(selected, rows, weights, dy, 256)
        assert len(selected) == 20 and dense[selected].abs().sum(1).all()
        assert torch.allclose(dense[selected], gradient, atol=1e-7, rtol=1e-5)
        assert dense.any(1).sum() > 20  # there was something to leave out


@pytest.mark.parametrize("size", [1.0, 1e-8])
@pytest.mark.parametrize("kind, reference", [
    ("adamw", lambda p: torch.optim.AdamW([p], lr=0.01, weight_decay=0, eps=1e-12)),
    ("sgd", lambda p: torch.optim.SGD([p], lr=0.01))])
def test_moments_are_lazy_as_with_one_torch_optimizer_per_row(size, kind, reference):
    """A row's moments and bias correction know only its own steps; eps sits where torch has it. No
    other row moves, and there is no state of a row that was never selected."""
    torch.manual_seed(0)
    values, seen = torch.randn(50, 4), set()
    single = [torch.nn.Parameter(row.clone()) for row in values]
    references, optimizer = [reference(p) for p in single], smf.RowOptimizer(values, kind)
    for step in range(30):
        rows, gradient, before = torch.randperm(10)[:3], torch.randn(3, 4) * size, values.clone()
        optimizer.step(rows, gradient, lr=0.01)
        seen |= set(rows.tolist())
        assert set((values != before).any(1).nonzero().flatten().tolist()) <= set(rows.tolist())
        assert {len(part) for part in optimizer.state_dict().values()} == {len(seen)}  # not N
        for row, g in zip(rows, gradient):
            single[row].grad = g
            references[row].step()
    assert torch.allclose(values, torch.stack([p.detach() for p in single]), atol=1e-6)


def test_the_state_of_rows_grows_by_doubling_so_a_step_does_not_slow_down():
    optimizer, moves = smf.RowOptimizer(torch.zeros(1000, 2), "adamw"), 0
    for row in range(1000):
        before = optimizer.m.data_ptr()
        optimizer.step(torch.tensor([row]), torch.ones(1, 2), 1.0)
        moves += optimizer.m.data_ptr() != before
    assert moves <= 11 and optimizer.state_dict()["rows"].tolist() == list(range(1000))


# Invariants 7, 9, 10, 11: the loop, on the embedded model

def same_update(run, other, parent):
    """Whether two runs on one parent updated the same rows by the same, to 1e-5."""
    one, two, before = (smf.memory_state(smf.load(path)[0]) for path in (run, other, parent))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-5), name
        moved = [torch.ne(tensor[name], before[name]) for tensor in (one, two)]
        if name.endswith("memory.values"):
            assert torch.equal(moved[0].any(1), moved[1].any(1)) and moved[0].any()
    rows = [{name: set(tensor.tolist()) for name, tensor in delta(path).items()
             if name.endswith(":rows")} for path in (run, other)]
    return rows[0] == rows[1] and [line["loss"] for line in metrics(run)] == pytest.approx(
        [line["loss"] for line in metrics(other)], abs=1e-5)


@pytest.mark.parametrize("flags", [
    ["--optimizer=adamw", "--lr=0.001"], ["--scorer=kl", "--train-alpha", "--lr=0.01"],
    ["--scorer=gradient", "--task=stream"]], ids=" ".join)
def test_micro_batches_change_nothing(runs, tmp_path, flags):
    for size in (16, 4, 1):
        sparse(runs / "additive", tmp_path / str(size), f"--micro-batch-size={size}", "--top-t=50",
               *flags)
    assert same_update(tmp_path / "16", tmp_path / "4", runs / "additive")
    assert same_update(tmp_path / "16", tmp_path / "1", runs / "additive")


@pytest.mark.parametrize("task, scorer", [("facts", "kl"), ("stream", "gradient")])
def test_two_processes_are_one_batch(runs, tmp_path, task, scorer):
    flags = [f"--parent={runs / 'additive'}", f"--scorer={scorer}", "--train-alpha", "--lr=0.01",
             *QUICK, f"--task={task}", "--steps=3", "--micro-batch-size=4", "--save-every=1"]
    run(train_sparse, *flags, f"--out={tmp_path / 'one'}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train_sparse.py"), *flags, f"--out={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("| run |") == 1, done.stderr
    assert same_update(tmp_path / "one", tmp_path / "two", runs / "additive")
    assert not (tmp_path / "two/checkpoint.pt").exists() and len(metrics(tmp_path / "two")) == 3


def test_a_run_is_its_parent_and_its_rows_at_any_depth(runs, tmp_path):
    """The retrofit, Monday, Tuesday: each is the one before it and its tensors, bit for bit."""
    first = sparse(runs / "additive", tmp_path / "monday", "--top-t=9", "--train-alpha")
    sparse(first, tmp_path / "tuesday", "--top-t=9", "--scorer=kl", "--seed=1")
    chain = [runs / "additive", tmp_path / "monday", tmp_path / "tuesday"]
    states = [state_of(smf.load(path)[0]) for path in chain]
    for path, before, after in zip(chain[1:], states, states[1:]):
        stored, touched = delta(path), set()
        for name in smf.memories(smf.load(path)[0]):
            rows, table = stored.pop(f"{name}.values:rows"), f"{name}.values"
            expected = before[table].clone()
            expected[rows] = stored.pop(f"{name}.values:values")
            assert torch.equal(after[table], expected) and not torch.equal(expected, before[table])
            assert 9 <= len(rows) == len(set(rows.tolist())) <= 6 * 9  # the rows it touched
            touched.add(table)
        assert all(torch.equal(after[name], stored[name]) for name in stored)  # the alphas of +S
        assert len(stored) == 3 * (path == chain[1])
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed == touched | stored.keys()
    again = smf.load(runs / "additive")[0].state_dict()  # to load the parent is to undo
    assert not any(p.requires_grad for p in smf.load(chain[2])[0].parameters())
    assert all(torch.equal(again[name], tensor) for name, tensor in states[0].items())


def test_runs_that_were_moved_together_still_find_each_other(runs, tmp_path, monkeypatch):
    expected = state_of(smf.load(runs / "tfidf")[0])
    for name in ("additive", "tfidf"):
        shutil.copytree(runs / name, tmp_path / "elsewhere" / name)
    monkeypatch.chdir(tmp_path / "elsewhere/tfidf")
    for path in (".", "../tfidf", tmp_path / "elsewhere/tfidf"):
        found = smf.load(path)[0].state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("script, flags", [
    (train_sparse, ["--parent=additive", *QUICK]), (train_retrofit, RETROFIT),
    (baselines, ["--method=lora", *QUICK]), (baselines, ["--method=full", *QUICK])],
    ids=["sparse", "retrofit", "lora", "full"])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
        runs, tmp_path, monkeypatch, script, flags):
    shutil.copytree(runs / "additive", tmp_path / "additive")
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(script, *flags, f"--seed={seed}", f"--out={name}")
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert not same_files(tmp_path / "a", tmp_path / "c")


# A process that imports everything once, then runs the same command in children that it kills: all
# of them at the latest as they name a file for the first to third time, so in the midst of saving,
# and half of them before that at a random time. A child that ends before its turn is the last one.
# (The parent must not use tqdm: its lock would be shared, and kept by a child killed with it.)
KILLER = """
import os, random, signal, sys, time
import torch, transformers.models.qwen2.modeling_qwen2
import baselines, smf, train_retrofit, train_sparse

name, *argv = sys.argv[1:]
script = {"sparse": train_sparse, "retrofit": train_retrofit, "lora": baselines}[name]
draws, clock, rename, died, longest = random.Random(1), random.Random(2), os.replace, 0, 0.5
while True:
    left, began = draws.choice([1, 2, 2]), time.time()
    child = os.fork()
    if not child:
        def dying(*paths):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            rename(*paths)
        os.replace = dying
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            smf.script(lambda: script.main(argv))
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code)
    if clock.random() < 0.5:
        time.sleep(clock.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        assert status == 0, status
        break
    died, longest = died + 1, max(longest, 1.2 * (time.time() - began))
print(died)
"""


@pytest.mark.parametrize("name, flags", [
    ("sparse", ["--parent=additive", "--train-alpha", "--optimizer=adamw", *QUICK]),
    ("retrofit", [*RETROFIT, "--lr=0.01"]), ("lora", ["--method=lora", "--replay=2", *QUICK]),
    ("sparse", ["--parent=additive", *QUICK, "--task=stream", "--passes=2", "--ask-every=1"])])
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(runs, tmp_path, monkeypatch, name, flags):
    shutil.copytree(runs / "additive", tmp_path / "additive")
    monkeypatch.chdir(tmp_path)
    flags = [*flags, "--steps=5", "--save-every=1", "--batch-size=4"]
    script = {"sparse": train_sparse, "retrofit": train_retrofit, "lora": baselines}[name]
    run(script, *flags, "--out=undisturbed")
    command = [sys.executable, "-c", KILLER, name, *flags, "--out=killed"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0 and int(done.stdout) >= 7, (done.stdout, done.stderr)
    assert same_files(tmp_path / "killed", tmp_path / "undisturbed")
    assert len(metrics(tmp_path / "killed")) == 5


@pytest.mark.parametrize("link", ["out", "out/run"])
def test_a_run_in_a_linked_directory_finds_its_parent(runs, tmp_path, link):
    """As where out, or the run itself, is a link to a larger disk."""
    (tmp_path / "a/larger/disk").mkdir(parents=True)
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "a/larger/disk")
    out = sparse(runs / "additive", tmp_path / "out/run", "--steps=1")
    assert smf.load(out) and len(evaluated(out)) == 1


def test_two_commands_at_once_that_make_the_same_run_make_it_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, str(ROOT / "train_retrofit.py"), *RETROFIT, "--save-every=1"]
    both = [subprocess.Popen([*command, "--out=run"], stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("is finished already" in text for text in said) == [False, True]
    run(train_retrofit, *RETROFIT, "--save-every=1", "--out=alone")
    assert same_files(Path("run"), Path("alone"))


def test_weights_may_be_read_by_those_who_may_read_their_neighbours(runs, capsys):
    """And if they may not, the line says so. (Root may read all files: it becomes nobody.)"""
    config, weights = (runs / "tfidf" / name for name in ("config.json", "delta.safetensors"))
    assert config.stat().st_mode == weights.stat().st_mode
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as path:
        shutil.copytree(runs / "additive", f"{path}/run")
        os.chmod(path, 0o755)
        os.chmod(f"{path}/run/delta.safetensors", 0)
        os.seteuid(user or 65534)
        try:
            assert "Permission denied" in refused(capsys, evaluation, f"{path}/run", "--ask=Who?")
        finally:
            os.seteuid(user)


def test_the_same_command_prints_its_table_again_and_trains_no_more(runs, tmp_path, capsys):
    tables, files = [], []
    for _ in range(2):
        path = sparse(runs / "additive", tmp_path / "run", "--lr=0.3")
        files.append({file.name: (file.read_bytes(), file.stat().st_mtime_ns)
                      for file in path.iterdir()})
        tables.append(capsys.readouterr().out.split("| run |")[1])
    assert files[0] == files[1] and tables[0] == tables[1]
    assert files[0].keys() == {"config.json", "delta.safetensors", "metrics.jsonl", "eval.json"}


def test_the_base_is_neither_changed_nor_stored(runs, tmp_path):
    files = {path: path.read_bytes() for path in (ROOT / "tiny/model").iterdir()}
    sparse(runs / "additive", tmp_path / "sparse", "--steps=1")
    run(baselines, "--method=full", *QUICK, "--steps=1", f"--out={tmp_path / 'full'}")
    assert all(path.read_bytes() == content for path, content in files.items())
    base = smf.load_base("tiny/model")[0].state_dict().values()
    for name in ("additive", "replacement", "tfidf", "lora", "full"):
        assert not any(a.shape == b.shape and torch.equal(a, b)
                       for a in base for b in delta(runs / name).values()), name


# Invariant 12: a normal Hugging Face model

@pytest.mark.parametrize("name", ["additive", "replacement", "tfidf", "lora", "full"])
def test_generate_with_cache_gives_the_tokens_of_without(runs, name):
    model, tokenizer = smf.load(runs / name)
    ids = tokenizer("Tell me about", return_tensors="pt")["input_ids"]
    cached, plain = (model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cache,
                                    eos_token_id=None) for cache in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] == ids.shape[1] + 12
    assert type(model) is type(smf.load_base("tiny/model")[0]) and not model.training
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # its gradients can be nan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_was_cast_still_works(runs, dtype):
    model, _ = smf.load(runs / "tfidf")
    ids = torch.randint(3, 50, (2, 9))
    before = model(ids).logits
    after = model.to(dtype)(ids).logits
    assert after.dtype == dtype and (after - before).norm() < 0.1 * before.norm()
    assert model.generate(ids, max_new_tokens=4, eos_token_id=None).shape == (2, 13)
    model.requires_grad_(True)
    library_loss(model, examples(4)).backward()
    assert all(memory.collect()[3].any() for memory in smf.memories(model).values())


def test_the_librarys_own_trainer_trains_in_bfloat16(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = small_smf(), torch.randint(3, 50, (8,)).tolist()
    before, rows = state_of(model), [{"input_ids": ids, "labels": ids}] * 8
    args = transformers.TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to=[],
                                          max_steps=2, save_strategy="no", disable_tqdm=True)
    transformers.Trainer(model, args, train_dataset=rows).train()
    assert any(not torch.equal(before[name], p) for name, p in smf.memory_state(model).items())


def test_autocast_reads_the_same_rows():
    torch.manual_seed(0)
    memory, x = smf.ProductKeyMemory(32, **SHAPE), torch.randn(2, 30, 32)
    y, plain = memory(x), memory.collect()
    with torch.autocast("cpu", torch.bfloat16):
        low, found = memory(x), memory.collect()
    assert torch.equal(low, y) and all(torch.equal(*pair) for pair in zip(plain[:3], found))
    with torch.autocast("cpu", torch.bfloat16):
        assert small_smf()(torch.randint(3, 50, (2, 9))).logits.isfinite().all()


def test_a_model_can_be_copied_after_a_backward_pass():
    model, data = small_smf(), examples(4)
    library_loss(model, data).backward()
    copied = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters()))
    smf.backward(model, data, 4)
    smf.backward(copy.deepcopy(model), data, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_reads_and_gradients(reentrant):
    plain, model = small_smf(), small_smf()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert model.is_gradient_checkpointing
    (loss, reads), (expected, plain_reads) = (
        smf.backward(m, examples(8), 4) for m in (model, plain))
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, parts in reads.items():
        assert torch.equal(parts[1], plain_reads[name][1])
        for one, other in zip(parts, plain_reads[name]):
            assert torch.allclose(one, other, atol=1e-6)
        assert parts[3].any()


def test_a_bfloat16_base_keeps_float32_memories_in_the_layers_asked_for(tmp_path):
    flags = ["--dtype=bfloat16", "--layers", "0", "2", "--heads=2", "--steps=1"]
    run(train_retrofit, *RETROFIT, *flags, f"--out={tmp_path / 'retrofit'}")
    model, _ = smf.load(sparse(tmp_path / "retrofit", tmp_path / "run"))
    assert list(smf.memories(model)) == [f"model.layers.{layer}.mlp.memory" for layer in (0, 2)]
    assert model.model.layers[0].mlp.memory.heads == 2
    added = smf.memory_state(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in added else torch.bfloat16), name


# Other people's models

@pytest.mark.parametrize("name, word", [
    ("qwen3_moe", "passes"), ("mixtral", "passes"), ("gemma3", "passes"), ("olmo2", "passes"),
    ("gpt_oss", "refused"), ("hrm_text", "refused"), ("opt", "refused")])
def test_a_model_of_another_family_gets_a_working_memory_or_is_refused(name, word):
    """gemma3: that of the text, not of the images. gpt_oss: its MLP returns a tuple. hrm_text: it
    runs its blocks several times. results/architectures.py tries all families."""
    model = architectures.tiny_model(transformers.CONFIG_MAPPING[name], {})
    assert architectures.attempt(model).startswith(word)
    assert not any("vision" in name for name in smf.memories(model))


def test_a_model_that_is_partly_offloaded_is_refused():
    with pytest.raises(smf.BadInput, match="offloaded"):
        smf.retrofit(small_model().to("meta"), [1], **SHAPE)


def test_lora_says_what_it_does_not_adapt(capsys):
    baselines.add_lora(small_model())
    assert capsys.readouterr().out == ""
    model = architectures.tiny_model(transformers.Qwen3MoeConfig, {})
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    baselines.add_lora(model)
    assert f"WARNING: LoRA does not adapt {experts:,} weights" in capsys.readouterr().out


def test_a_dated_template_that_thinks_is_always_asked_on_one_day_without_thinking(tmp_path):
    model = altered_model(tmp_path / "model", lambda path: (
        path / "chat_template.jinja").write_text(
        "\n  {% if 1 %}{{ strftime_now('%d %b %Y, %Y-%m-%d %B') }}: {% endif %}"
        "{{ messages[0].content }}"
        "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"))
    _, tokenizer = smf.load_base(model)
    assert tokenizer.decode(smf.prompt_ids(tokenizer, "Who?")[0]) == (
        "\n26 Jul 2024, 2024-07-26 July: Who?")
    run(train_retrofit, *RETROFIT, f"--model={model}", f"--out={tmp_path / 'run'}", "--steps=0")
    assert smf.read_json(tmp_path / "run/config.json")["date"] == "2024-07-26"


def test_there_is_room_for_the_longest_answer_and_a_cut_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answer = "violin and flute and harp and poet and baker and " * 6
    facts(fact(value=answer))()
    run(baselines, *DATA, *QUICK[:1], "--method=full", "--steps=40", "--lr=3e-3", "--out=run",
        "--eval-tokens=130", "--eval-examples=2", "--warmup=0")
    (result,) = json.loads(Path("run/eval.json").read_text()).values()
    assert result["target"]["value"] == 1 and "cut there" not in capsys.readouterr().out
    model, tokenizer = smf.load("run")
    model.config.max_position_embeddings = 60
    evaluation.open_questions(model, tokenizer, [evaluation.Question("Who?", answer, [answer])])
    assert "answers of more than 30 tokens" in capsys.readouterr().out


# Stage 1

def test_stage_1_is_adamw_without_decay_with_a_rate_of_its_own_for_alpha(tmp_path):
    """The library's own loss and torch's AdamW; inputs and queries are normalised before the first
    step by the statistics of general chats, queries after each step by a running mean, too."""
    flags = [*RETROFIT, "--lr=0.01", "--alpha-lr=0.05", "--warmup=1", "--seed=3", "--alpha=90"]
    run(train_retrofit, *flags, f"--out={tmp_path / 'run'}")
    args, (model, tokenizer) = train_retrofit.parse(flags), smf.load_base("tiny/model")
    torch.manual_seed(3)
    smf.retrofit(model, [1, 2, 3], "additive", 90, n_keys=32, heads=4, k_dim=32, top_k=4)
    data = [smf.encode(tokenizer, *c, 128) for c in train_retrofit.general_chats(args)[:64]]
    batch = smf.collate(data)
    for name, memory in smf.memories(model).items():
        x = smf.read_only(model, batch)[name][0][batch["attention_mask"].bool()]
        memory.x_rms.copy_(x.square().mean(1).sqrt().median())
        query = x / memory.x_rms @ memory.query.weight.detach().T
        memory.query_mean.copy_(query.mean(0))
        memory.query_var.copy_(query.var(0, correction=0))
    before, lines, (alphas, others) = state_of(model), metrics(tmp_path / "run"), ([], [])
    assert lines[0]["grad_norm"] > 1  # clipped
    for parameter in model.parameters():
        if parameter.requires_grad:
            (others if parameter.dim() else alphas).append(parameter)
    optimizer = torch.optim.AdamW([{"params": p} for p in (others, alphas)], eps=1e-12,
                                  weight_decay=0)
    for step, batch in enumerate(smf.batches(data, 16, 3, 4)):
        library_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_([*others, *alphas], 1.0)
        for group, lr in zip(optimizer.param_groups, (0.01, 0.05)):
            group["lr"] = lr * min(1, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * step / 4))
        optimizer.step()
        optimizer.zero_grad()
        mask = smf.collate(batch)["attention_mask"].bool()
        for memory, usage in zip(smf.memories(model).values(), lines[step]["usage"]):
            x, rows, _, _ = memory.collect()
            assert len(rows[mask].unique()) / 1024 == pytest.approx(usage, abs=2e-3)
            query = x[mask] / memory.x_rms @ memory.query.weight.detach().T
            memory.query_mean.mul_(0.9).add_(0.1 * query.mean(0))
            memory.query_var.mul_(0.9).add_(0.1 * query.var(0, correction=0))
    ended = smf.load(tmp_path / "run")[0].state_dict()
    for name, tensor in smf.memory_state(model).items():
        if tensor.is_floating_point() and not name.endswith(("x_rms", "scale")):
            error = (ended[name] - tensor).norm() / (tensor - before[name]).norm()
            assert error < (1e-3 if name.endswith("alpha") else 5e-3), (name, error)


@pytest.mark.parametrize("mode, size", [("additive", 0.01), ("replacement", 1.0)])
def test_a_fresh_memory_has_its_share_of_the_size_of_the_mlp_on_general_text(tmp_path, mode, size):
    """Or, in replacement, all of it. Its parameters are as they were drawn; stage 2 can begin."""
    flags = [*RETROFIT, "--steps=0", "--layers", "3", "1", "2", f"--mode={mode}"]
    run(train_retrofit, *flags, f"--out={tmp_path / 'fresh'}")
    found, (base, tokenizer) = delta(tmp_path / "fresh"), smf.load_base("tiny/model")
    mlps = [block.mlp for block in smf.decoder_blocks(base)]
    torch.manual_seed(0)
    smf.retrofit(base, [1, 2, 3], mode, size, n_keys=32, heads=4, k_dim=32, top_k=4)
    assert all(torch.equal(found[n], p) for n, p in base.named_parameters() if p.requires_grad)
    assert found.keys() == smf.memory_state(base).keys()
    assert found["model.layers.1.mlp.memory.num_batches"] == 40
    model, args = smf.load(tmp_path / "fresh")[0], train_retrofit.parse([])
    chats = train_retrofit.general_chats(args)[:64]
    batch = smf.collate([smf.encode(tokenizer, *chat, 128) for chat in chats])
    for i, (name, (x, *_)) in enumerate(smf.read_only(model, batch).items(), 1):
        memory, x = model.get_submodule(name), x[batch["attention_mask"].bool()]
        inputs = memory.gate(x / memory.x_rms).square().mean(1).sqrt().median()
        assert inputs.item() == pytest.approx(1, abs=0.15) and memory.query_mean.any()
        mlp, h = mlps[i](x), model.model.layers[i].mlp(x)
        ratio = (h - mlp if mode == "additive" else h).norm(dim=1) / mlp.norm(dim=1)
        assert ratio.median().item() == pytest.approx(size, 5e-3)
    sparse(tmp_path / "fresh", tmp_path / "run", "--steps=1")


def test_the_papers_fixed_alpha_leaves_the_scale_unmeasured(tmp_path):
    flags = [*RETROFIT, "--steps=0", "--alpha=0.3", "--query-momentum=0"]
    run(train_retrofit, *flags, f"--out={tmp_path / 'run'}")
    found = {name.split(".")[-1]: tensor for name, tensor in delta(tmp_path / "run").items()}
    assert found["alpha"] == 0.3 and found["scale"] == 1 and not found["query_mean"].any()


def test_the_scale_of_the_inputs_and_of_the_mlps_changes_nothing(tmp_path):
    """The same function, with 30 times the norm weights and a thirtieth of the weights after them:
    the same rows and losses in both stages, and in the end the same outputs."""
    model, tokenizer = smf.load_base("tiny/model")
    for layer in smf.decoder_blocks(model):
        layer.post_attention_layernorm.weight.mul_(30)
        [linear.weight.div_(30) for linear in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ended, rows = [], []
    for i, path in enumerate(("tiny/model", tmp_path / "model")):
        run(train_retrofit, *RETROFIT, f"--model={path}", f"--out={tmp_path / str(i) / 'parent'}")
        out = sparse(tmp_path / str(i) / "parent", tmp_path / str(i) / "run", "--top-t=50")
        ended.append(smf.load(out)[0](torch.arange(40).view(2, 20)).logits)
        rows.append([tensor.tolist() for name, tensor in sorted(delta(out).items())
                     if name.endswith(":rows")])
    for stage in ("parent", "run"):
        losses = [[line["loss"] for line in metrics(tmp_path / i / stage)] for i in "01"]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert rows[0] == rows[1] and torch.allclose(*ended, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode, share", [("additive", 0.01), ("replacement", 1.0)])
def test_rates_are_relative_to_the_initial_rows_and_to_the_share_of_the_memory(
        runs, tmp_path, mode, share):
    """In the first step, AdamW moves every number by lr * std / share (SGD: see the plain loop)."""
    found = delta(sparse(runs / mode, tmp_path, "--lr=1e-4", "--optimizer=adamw", "--steps=1"))
    before, name = smf.load(runs / mode)[0].state_dict(), "model.layers.1.mlp.memory.values"
    moved = (found[f"{name}:values"] - before[name][found[f"{name}:rows"]]).abs()
    assert moved[moved > 0].mean().item() == pytest.approx(1e-4 / 8 / share / 11, rel=1e-2)
    assert moved.count_nonzero() > 1000  # 11: the warm-up


def test_the_background_is_that_of_the_trained_memory(tmp_path):
    flags = [*RETROFIT, "--lr=0.1"]
    run(train_retrofit, *flags, f"--out={tmp_path / 'run'}")
    (model, tokenizer), args = smf.load(tmp_path / "run"), train_retrofit.parse(flags)
    chats = train_retrofit.general_chats(args)[:40]
    general = [smf.encode(tokenizer, *chat, args.max_length) for chat in chats]
    for memory in smf.memories(model).values():
        [n.zero_() for n in (memory.doc_freq, memory.background_counts, memory.num_batches)]
    smf.collect_background(model, train_retrofit.collated(general, args, ""))
    saved = delta(tmp_path / "run")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in smf.memory_state(model).items())
    assert saved["model.layers.1.mlp.memory.doc_freq"].max() == 40  # the template's own rows


def test_spread_of_uniform_and_of_collapsed_reads():
    assert train_retrofit.spread(torch.full((256,), 3)) == pytest.approx((1.0, 0.0))
    collapsed = F.one_hot(torch.tensor(5), 256)
    assert train_retrofit.spread(collapsed) == pytest.approx((1 / 256, math.log(256)))


def test_a_collapsed_memory_is_warned_of(capsys):
    model, data = small_smf(), examples(16)
    args = SimpleNamespace(micro_batch_size=4, device="cpu")
    train_retrofit.measure(model, data, args)
    assert "WARNING" not in capsys.readouterr().out
    model = small_smf()
    first, second = smf.memories(model).values()
    first.query.weight.data.zero_()  # now all tokens ask the same
    train_retrofit.measure(model, data, args)
    lines = capsys.readouterr().out.splitlines()
    assert ["collapsed" in line for line in lines] == [False, True, False]


CHAT = ("message_id", "parent_id", "role", "text")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_general_chats_are_the_replies_of_the_assistant(tmp_path):
    thread = [("1", None, "prompter", "Hi"), ("2", "1", "assistant", "Hello"),
              ("3", "2", "prompter", "How are you?"), ("4", "3", "assistant", "Fine"),
              ("5", "0", "assistant", "of a prompt not there"), ("6", "3", "assistant", " ")]
    write_rows(tmp_path / "train.jsonl", [dict(zip(CHAT, row)) for row in thread])
    chats = train_retrofit.general_chats(train_retrofit.parse([f"--oasst-data={tmp_path}"]))
    assert sorted(chats) == [("Hi", "Hello"), ("How are you?", "Fine")]


# Stage 2 as a plain loop, rates and batches

@pytest.mark.parametrize("more", [[], ["--least-harm"], ["--replay=3"]])
def test_stage_2_on_all_rows_is_a_plain_sgd_loop(tmp_path, more):
    """The library's own loss, the whole batch at once, autograd's gradient of V and of the alphas,
    both clipped by the norm of V's; SGD on V, AdamW on the alphas; warm-up and cosine. With
    --least-harm a row's step is divided by its share of the background's reads. With --replay R the
    next R general chats are in each batch, too."""
    run(train_retrofit, *RETROFIT, "--steps=0", "--alpha=30", f"--out={tmp_path / 'parent'}")
    flags = ["--scorer=all", "--lr=3e-4", "--train-alpha", "--alpha-lr=0.05", *more]
    sparse(tmp_path / "parent", tmp_path / "run", *flags, "--warmup=2")
    ended, (model, tokenizer) = smf.load(tmp_path / "run")[0], smf.load(tmp_path / "parent")
    args = train_sparse.parse([*QUICK, *flags])
    plan = batches_of(model, tokenizer, args)
    if args.replay:
        chats = train_retrofit.general_chats(args)
        plan = [batch + [smf.encode(tokenizer, *chat, 128) for chat in chats[3 * i:3 * i + 3]]
                for i, batch in enumerate(plan)]
    trained = {name: p.requires_grad_() for name, p in model.named_parameters()
               if name.endswith(("memory.values", "mlp.alpha"))}
    alphas = [p for p in trained.values() if p.dim() == 0]
    adamw = torch.optim.AdamW(alphas, weight_decay=0, eps=1e-12)
    values = [p for p in trained.values() if p.dim()]
    sgd = torch.optim.SGD(values)
    before, norms = state_of(model), []
    for step, batch in enumerate(plan):
        library_loss(model, batch).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in values]).item())
        torch.nn.utils.clip_grads_with_norm_(trained.values(), 1.0, torch.tensor(norms[-1]))
        for memory in smf.memories(model).values() if args.least_harm else ():
            reads = memory.background_counts / memory.background_counts.sum()  # (N,)
            memory.values.grad /= (reads * len(reads) + 0.1)[:, None]
        factor = min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 6))
        for optimizer, lr in ((sgd, 3e-4 / 0.01**2), (adamw, 0.05)):
            optimizer.param_groups[0]["lr"] = factor * lr
            optimizer.step()
            optimizer.zero_grad()
    assert norms == pytest.approx([line["grad_norm"] for line in metrics(tmp_path / "run")], 1e-3)
    assert max(norms) > 1.0 and len(trained) == 6  # it was clipped
    for name, p in trained.items():
        error = (ended.get_parameter(name) - p).norm() / (p - before[name]).norm()
        assert error < 1e-3, (name, error)


def test_shuffled_batches_leave_nothing_out_and_hold_similar_lengths():
    data = examples(70)
    whole = smf.batches(data, 16, 3, 12)
    assert len(whole) == 12 and smf.batches(data, 16, 3, 7) == whole[:7]
    epoch = [tuple(example.ids) for batch in whole[:4] for example in batch]
    assert len(epoch) == len(set(epoch)) == 64
    assert smf.batches(data, 16, 4, 12) != whole and whole[:4] != whole[4:8]
    data = [smf.Example([3] * length, 1) for length in range(2, 72)]
    lengths = [[len(ids) for ids, _ in batch] for batch in smf.batches(data, 16, 0, 80)]
    assert set().union(*lengths) == set(range(2, 72))  # six of an epoch wait, not always the same
    spans = sorted((min(part), max(part)) for part in lengths[:4])
    assert all(longest < shortest for (_, longest), (shortest, _) in zip(spans, spans[1:]))


def test_a_stream_tells_one_source_after_the_other_and_never_again():
    three, one = [["a", "b", "c"], ["d"]], [[f"{i}" for i in range(10)]]
    assert smf.stream_batches(three, 2, 2) == [["a", "b"], ["c", "a"], ["d"], ["d"]]
    assert smf.stream_batches(three, 9, 1) == [["a", "b", "c"], ["d"]]
    assert sum(smf.stream_batches(one, 4, 5), []) == 2 * one[0]  # in turn, all as often


# The baselines

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
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 3)
    adapted, x = baselines.LoRALinear(linear), torch.randn(2, 7, 5)
    torch.nn.init.normal_(adapted.B)
    expected = x @ (linear.weight + 2 * adapted.B @ adapted.A).T + linear.bias
    with torch.no_grad():  # there is no dropout where no gradient is wanted
        assert torch.allclose(adapted(x), expected, atol=1e-5)
    one = baselines.LoRALinear(torch.nn.Linear(1, 1))
    torch.nn.init.ones_(one.B)
    x = torch.ones(10_000, 1)
    dropped = (one(x) == one.linear(x)).double().mean()
    assert dropped == pytest.approx(0.05, abs=0.01)


def test_lora_of_a_model_without_linear_projections_is_refused():
    with pytest.raises(smf.BadInput, match="no nn.Linear"):
        baselines.add_lora(small_model("GPT2"))


def test_merged_lora_equals_unmerged(runs):
    (merged, tokenizer), tensors = smf.load(runs / "lora"), delta(runs / "lora")
    base, model = (smf.load_base("tiny/model")[0] for _ in range(2))
    baselines.add_lora(model)
    for name, module in model.named_modules():
        if type(module) is baselines.LoRALinear:
            module.A.data, module.B.data = (tensors[f"{name}.weight:A"],
                                            tensors[f"{name}.weight:B"] / 2)  # alpha / rank
    assert len(tensors) == 2 * 28 and all(tensor.any() for tensor in tensors.values())
    ids = tokenizer("Where was Nuto Lilton born?", return_tensors="pt")["input_ids"]
    with torch.no_grad():  # so without dropout
        merged, unmerged, base = (m(ids).logits for m in (merged, model, base))
    assert torch.allclose(merged, unmerged, atol=1e-4)
    assert not torch.allclose(merged, base, atol=1e-2)


@pytest.mark.parametrize("method, more", [
    ("lora", []), ("full", []), ("full", ["--optimizer=sgd", "--replay=3", "--task=stream"])])
def test_a_baseline_is_a_plain_loop(runs, tmp_path, method, more):
    """The library's own loss, the whole batch at once, no weight decay, clipping; with --replay R
    the next R general chats in each batch."""
    model, tokenizer = smf.load_base("tiny/model")
    args, ended = baselines.parse([f"--method={method}", *QUICK, *more]), runs / method
    plan = batches_of(model, tokenizer, args)
    if more:
        run(baselines, f"--method={method}", *QUICK, *more, f"--out={tmp_path / 'run'}")
        chats, ended = train_retrofit.general_chats(args), tmp_path / "run"
        plan = [batch + [smf.encode(tokenizer, *chat, 128) for chat in chats[3 * i:3 * i + 3]]
                for i, batch in enumerate(plan)]
    torch.manual_seed(0)
    baselines.add_lora(model) if method == "lora" else model.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = (torch.optim.SGD if more else torch.optim.AdamW)(trained.values(), weight_decay=0.0)
    for step, batch in enumerate(plan):
        torch.manual_seed(step)  # of dropout
        library_loss(model, batch).backward()
        assert torch.nn.utils.clip_grad_norm_(trained.values(), 1.0) > 1.0
        lr = args.lr * min(1, (step + 1) / 11) * 0.5 * (1 + math.cos(math.pi * step / 6))
        optimizer.param_groups[0]["lr"] = args.lr if more else lr  # a stream's rate is constant
        optimizer.step()
        optimizer.zero_grad()
    ended = delta(ended)
    assert len(ended) == len(trained)
    for name, tensor in trained.items():
        found = ended[re.sub(r"\.([AB])$", r".weight:\1", name)] / (2 if name[-2:] == ".B" else 1)
        error = (found - tensor).norm() / (tensor - before[name]).norm()
        assert error < 1e-3, (name, error)


def test_full_finetuning_of_a_bfloat16_base_trains_float32(runs, tmp_path):
    run(baselines, "--method=full", *QUICK, "--dtype=bfloat16", f"--out={tmp_path / 'run'}",
        "--lr=1e-6")
    low, full = (metrics(path)[0]["loss"] for path in (tmp_path / "run", runs / "full"))
    assert 0 < abs(low - full) < 0.1  # it computes in bfloat16
    trained, base = delta(tmp_path / "run"), smf.load_base("tiny/model")[0].state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert not any(torch.equal(tensor, base[name]) for name, tensor in trained.items())
    loaded = smf.load(tmp_path / "run")[0].state_dict()  # nothing is rounded away
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())


# Measures

def by_hand(model, ids, start):
    """Mean log-likelihood of ids[start:], one sequence, no padding, no cache."""
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    terms = [logits[i - 1, ids[i]].item() for i in range(start, len(ids))]
    return sum(terms) / len(terms)


def knowledge_questions(number):
    rows = evaluation.load_questions("", "tiny/trivia_qa", "validation")
    return [question for _, question in rows[:number]]


def test_token_loss_is_that_of_the_library():
    model, data = small_model(), examples(5)
    loss, targets = smf.token_loss(model, smf.collate(data)), smf.collate(data)["targets"]
    for row, mask, example in zip(loss, targets != -100, data):
        assert mask.sum() == len(example.ids) - example.start and not row[~mask].any()
        assert row[mask].mean().item() == pytest.approx(library_loss(model, [example]).item(), 1e-4)
    with torch.no_grad():  # a sum over a large vocabulary is too long for float32
        assert smf.token_loss(model, smf.collate(data)).dtype == torch.float64


@pytest.mark.parametrize("first", [[], [1], [1, 7]])
def test_perplexity_scores_every_token_once(first):
    """Each window begins with the tokens that the tokenizer puts first; they are not scored."""
    model, tokens, f = small_model(), torch.randint(3, 50, (53,)).tolist(), len(first)
    for window, stride in ((16, 8), (16, 15), (10, 3), (64, 32), (18, 7), (53 + f, 1)):
        losses, expected = evaluation.token_losses(model, tokens, window, stride, first), []
        for begin in range(0, 53, min(stride, window - f)):  # by hand, one window at a time
            end, done = min(begin + window - f, len(tokens)), len(expected) + (not first)
            logits = model(torch.tensor([first + tokens[begin:end]])).logits[0].log_softmax(-1)
            expected += [-logits[f + i - begin - 1, tokens[i]].item() for i in range(done, end)]
            if end == len(tokens):
                break
        assert len(losses) == 53 - (not first) == len(expected)
        assert sorted(losses.tolist()) == pytest.approx(sorted(expected), abs=1e-4)


@pytest.mark.parametrize("task, first", [("facts", []), ("medmcqa", []), ("facts", [5])])
def test_the_measures_of_a_model_are_those_of_its_parts(task, first):
    model, tokenizer = smf.load_base("tiny/model")
    if first:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|a|> $A <|b|>", special_tokens=[("<|a|>", 5), ("<|b|>", 6)])
    args = train_sparse.parse([f"--task={task}", "--eval-examples=5", "--eval-tokens=90"])
    data = evaluation.load_data(args)
    result = evaluation.evaluate(model, tokenizer, data, args)
    tokens = tokenizer(data.text, add_special_tokens=False)["input_ids"][:90]
    losses, found = evaluation.token_losses(model, tokens, 128, 64, first), result["perplexity"]
    error = losses.std(correction=0) / math.sqrt(len(losses))
    assert found["value"] == pytest.approx(losses.mean().exp().item())
    assert found["stderr"] == pytest.approx((losses.mean().exp() * error).item())
    assert found["n"] == (90 if first else 89)
    texts, right, likelihood = evaluation.open_questions(model, tokenizer, data.knowledge)
    assert result["knowledge right"] == right and len(right) == 5
    assert result["answers"]["knowledge"] == texts
    assert result["knowledge"] == evaluation.mean(right)
    assert result["knowledge LL"] == evaluation.mean(likelihood)
    if task == "medmcqa":
        right = evaluation.multiple_choice(model, tokenizer, data.target)
        assert "target LL" not in result
    else:
        _, right, likelihood = evaluation.open_questions(model, tokenizer, data.target)
        assert result["target LL"] == evaluation.mean(likelihood)
    assert result["target"] == evaluation.mean(right) and result["untaught"]["n"] == 5


def test_the_measures_are_those_of_a_plain_loop_that_shares_no_code():
    model, tokenizer = smf.load_base("tiny/model")
    args = train_sparse.parse(["--eval-examples=9", "--eval-tokens=300"])
    data = evaluation.load_data(args)
    found = evaluation.evaluate(model, tokenizer, data, args)
    assert plain.perplexity(model, tokenizer, data.text, vars(args)) == pytest.approx(
        found["perplexity"]["value"], 1e-4)
    for name in ("target", "knowledge"):
        rows = [{"question": q.prompt, "answer": {"value": q.answer, "aliases": q.aliases}}
                for q in getattr(data, name)]
        assert plain.recall(model, tokenizer, rows) == pytest.approx(
            (found[name]["value"], found[f"{name} LL"]["value"]), abs=1e-4)


def test_log_likelihoods_and_answers_do_not_depend_on_the_batch():
    model, tokenizer = smf.load_base("tiny/model")
    questions = knowledge_questions(12)
    prompts = [smf.prompt_ids(tokenizer, text)[0] for text in [
        *(q.prompt for q in questions), "Bamin? " * 40]]  # and so, many pads
    together = evaluation.generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    for size in (1, 5):
        assert together == evaluation.generate_answers(model, tokenizer, prompts, 8, size)
    assert len(set(together)) > 5
    data = [smf.encode(tokenizer, q.prompt, q.answer, 128, end=False) for q in questions]
    data += [smf.encode(tokenizer, "Again?", q.prompt, 128) for q in questions]  # of many tokens
    one = [by_hand(model, *example) for example in data]
    for size in (32, 5, 1):
        found = [-loss.mean().item() for loss in evaluation.losses(model, data, "", size)]
        assert found == pytest.approx(one, abs=1e-4)
    texts, right, likelihood = evaluation.open_questions(model, tokenizer, questions)
    assert likelihood.tolist() == pytest.approx(one[:12], abs=1e-4)
    assert texts == evaluation.generate_answers(model, tokenizer, prompts[:12], 32)  # [Gupta26 C]
    assert right == [evaluation.answered(text, q.aliases) for text, q in zip(texts, questions)]


def test_the_option_of_the_highest_mean_log_likelihood_is_chosen():
    model, tokenizer = smf.load_base("tiny/model")
    names, right = ["A. flute", "B. the flute of the harp and the lute", "C. poet", "D. It"], []
    for answer in names:
        question = evaluation.Question("Which?", answer, options=names)
        right += evaluation.multiple_choice(model, tokenizer, [question])
    data = [smf.encode(tokenizer, "Which?", name, 128, end=False) for name in names]
    likelihood = [by_hand(model, *example) for example in data]
    assert right == [one == max(likelihood) for one in likelihood] and sum(right) == 1
    questions = evaluation.load_data(train_sparse.parse(["--task=medmcqa"])).target[:20]
    right = evaluation.multiple_choice(model, tokenizer, questions)
    assert 0 < sum(right) < 20 and right == [
        max(q.options, key=lambda option: by_hand(model, *smf.encode(
            tokenizer, q.prompt, option, 128, end=False))) == q.answer for q in questions]


def test_a_prompt_beyond_the_context_loses_its_beginning():
    model, tokenizer = smf.load_base("tiny/model")
    question = knowledge_questions(1)[0]
    question = question._replace(prompt=question.prompt * 9)
    whole = smf.encode(tokenizer, question.prompt, question.answer, 999, end=False)
    model.config.max_position_embeddings = 40
    ids, start = whole.ids[-40:], whole.start - len(whole.ids) + 40
    assert len(whole.ids) > 40 and start > 0
    *_, likelihood = evaluation.open_questions(model, tokenizer, [question])
    assert likelihood.item() == pytest.approx(by_hand(model, ids, start), abs=1e-4)
    prompt = smf.prompt_ids(tokenizer, question.prompt)[0]
    ids = prompt[-32:]
    for _ in range(8):  # greedy, by hand
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    found = evaluation.generate_answers(model, tokenizer, [prompt], max_new_tokens=8)
    answer = tokenizer.decode(ids[32:]).split(tokenizer.eos_token)[0]
    assert found == [answer] and answer


def test_answered_after_normalisation():
    assert evaluation.normalize("  The Eiffel-Tower, a\tTower!") == "eiffel tower tower"
    assert evaluation.answered("It is The  Eiffel-Tower, surely", ["eiffel tower"])
    assert evaluation.answered("a king of the hill", ["King of  Hill"])  # no articles
    assert evaluation.answered("It is O’Hare", ["O'Hare"])
    assert evaluation.answered("It is Rome", ["Paris", "ROME"])  # any alias answers
    assert not evaluation.answered("It is the Rome", ["Paris", "", "the"])  # nothing is left of it
    assert evaluation.answered("Orl\u00e9ans", ["Orle\u0301ans"])  # composed or not


# Runs and their tables

def evaluated(run, *flags):
    """eval.py's main function on a run -> the keys and values of its eval.json."""
    evaluation.main([str(run), *flags])
    return json.loads((run / "eval.json").read_text())


def test_a_run_is_measured_once_for_each_setting(runs, tmp_path, capsys):
    path = sparse(runs / "additive", tmp_path / "run")
    (first,) = evaluated(path).values()  # as after training: read again
    capsys.readouterr()
    assert first["target"]["n"] == 2 and first["perplexity"]["n"] == 129
    file = path / "eval.json"
    file.write_text(file.read_text().replace(json.dumps(first["perplexity"]["value"]), "77.0"))
    assert len(evaluated(path)) == 1 and "77.00" in capsys.readouterr().out  # it is that file
    assert len(evaluated(path, "--split=validation", "--eval-examples=3")) == 2
    second = evaluated(path, "--stride=32")  # measured anew
    assert len(second) == 3 and "77.00" not in capsys.readouterr().out
    assert {one["target"]["n"] for one in second.values()} == {2, 3}


def test_other_data_under_the_same_name_is_measured_anew(runs, tmp_path):
    data = shutil.copytree(ROOT / "tiny/trivia_qa", tmp_path / "trivia")
    path = sparse(runs / "additive", tmp_path / "run", f"--trivia-data={data}")
    lines = (data / "validation.jsonl").read_text().splitlines(keepends=True)
    (data / "validation.jsonl").write_text("".join(lines[7:]))
    assert len(evaluated(path)) == 2


def test_kept_counts_what_the_parent_answered(runs, tmp_path):
    path = sparse(runs / "additive", tmp_path / "run")
    shutil.copytree(runs / "additive", tmp_path / "additive")
    config = smf.read_json(path / "config.json")
    smf.write_json(path / "config.json", config | {"parent": "../additive"})
    for run, right in ((path, [1, 1, 0, 1]), (tmp_path / "additive", [1, 1, 1, 0])):
        file = json.loads((run / "eval.json").read_text())
        for result in file.values():
            result["knowledge right"] = right
        smf.write_json(run / "eval.json", file)
    args = train_sparse.parse(QUICK)
    row = evaluation.row(path, evaluation.load_data(args), args)
    assert row["kept"] == f"{2 / 3:.3f} ± {math.sqrt(2 / 27):.3f}"
    assert evaluation.table({"run": row, "other": {"target": "1"}}).splitlines()[3] == (
        "| other | 1 |  |  |  |  |  |  |")


def test_runs_measured_in_other_ways_stand_in_different_tables(runs, tmp_path, capsys):
    flags = [f"--parent={runs / 'additive'}", *QUICK, "--steps=1"]
    for name, more in (("a/one", []), ("b/two", []), ("a/choice", ["--task=medmcqa"]),
                       ("a/less", ["--eval-examples=1"])):
        run(train_sparse, *flags, *more, f"--out={tmp_path / name}")
    capsys.readouterr()
    evaluation.main([str(tmp_path / name) for name in ("b/two", "a/choice", "a/one", "a/less")])
    tables = re.findall(r"\n(.*)\n\n((?:\|.*\n)+)", capsys.readouterr().out)
    expected = [["task facts", "eval_examples 2"], ["task medmcqa", "eval_examples 2"],
                ["task facts", "eval_examples 1"]]
    assert all(set(words) <= set(title.split(", ")) for words, (title, _) in zip(expected, tables))
    shown = [set(re.findall(r"^\| (/\S+) \|", table, re.M)) for _, table in tables]
    assert shown == [{str(runs / "additive"), *(str(tmp_path / name) for name in names)}
                     for names in (["b/two", "a/one"], ["a/choice"], ["a/less"])]


def test_another_base_in_the_same_directory_is_refused(tmp_path, capsys):
    model = altered_model(tmp_path / "model", lambda path: rewrite(
        path / "model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1)))
    flags = ["--method=lora", *QUICK, "--steps=1"]
    run(baselines, *flags, f"--out={tmp_path / 'lora'}")
    line = refused(capsys, baselines, *flags, f"--model={model}", f"--out={tmp_path / 'other'}")
    assert "base: was made with another" in line


# Data

def load_data(*flags):
    return evaluation.load_data(train_sparse.parse([str(flag) for flag in flags]))


def test_facts_are_asked_in_wordings_that_were_not_trained():
    test, validation = (load_data("--task=facts", f"--split={s}") for s in ("test", "validation"))
    assert len(test.target) == 160 and len(test.train) == 480 and test.train == validation.train
    prompts = [{q.prompt for q in part} for part in (
        test.train, test.target, validation.target, test.knowledge)]
    assert len(set().union(*prompts)) == sum(map(len, prompts))  # no two share one
    assert {q.answer for q in test.target} <= {q.answer for q in test.train}
    few = load_data("--task=facts", "--sources", 0, 10)
    assert len(few.target) == 10 and few.train == test.train[:30]


def write_facts(path, questions):
    """TriviaQA's layout: fact i is asked as questions[i], answered "fact i" or "no. i"."""
    write_rows(path / "validation.jsonl", [
        {"question": question, "question_id": str(i),
         "answer": {"value": f"fact {i}", "aliases": [f"no. {i}"]}}
        for i, question in enumerate(questions)])


def test_a_question_that_was_taught_or_names_its_own_answer_is_no_probe(tmp_path):
    """Facts without other wordings are asked as trained, but for those that name their answer."""
    write_facts(tmp_path, [f"Who is {'no. ' * (i % 5 == 0)}{i}?" for i in range(30)])
    data = load_data("--task=facts", f"--facts-data={tmp_path}", f"--trivia-data={tmp_path}",
                     "--sources", 0, 20)
    assert len(data.train) == 20  # it is taught all the same
    assert data.target == [q for i, q in enumerate(data.train) if i % 5]
    assert data.train[3].aliases == ["fact 3", "no. 3"] and data.train[3].answer == "fact 3"
    assert [q.prompt for q in data.knowledge] == [f"Who is {i}?" for i in range(21, 30) if i != 25]


def test_a_fact_that_a_stream_tells_in_other_words_is_no_probe_of_old_knowledge(tmp_path):
    write_facts(tmp_path / "facts", [f"Who is {i}?" for i in range(8)])
    flags = [f"--stream-data={stream(tmp_path / 'told', source=['3', '3', '5'])}",
             f"--trivia-data={tmp_path / 'facts'}"]
    for sources, told in (([0, 1], [3]), ([0, 2], [3, 5])):
        asked = [q.prompt for q in load_data(*flags, "--sources", *sources).knowledge]
        assert asked == [f"Who is {i}?" for i in range(8) if i not in told]


def test_a_run_has_the_rate_of_its_task_and_optimizer():
    for flags, lr in (("", 3e-4), ("--method=full", 3e-4), ("--task=facts", 1e-3),
                      ("--optimizer=sgd", 0.1), ("--preset=paper --method=full", 3e-5),
                      ("--preset=paper --task=stream", 1e-4)):
        assert baselines.parse(flags.split()).lr == lr
    for flags, t, lr in (("", 50, 0.1), ("--preset=paper --task=stream", 500, 0.3),
                         ("--task=facts", 500, 1.0), ("--task=facts --optimizer=adamw", 500, 0.1)):
        args = train_sparse.parse(flags.split())
        assert (args.top_t, args.lr) == (t, lr)


def test_the_splits_of_medmcqa_do_not_overlap():
    test, validation = (load_data("--task=medmcqa", f"--split={s}") for s in ("test", "validation"))
    parts = [{q.prompt for q in part} for part in (test.train, validation.target, test.target)]
    assert all(parts) and len(set().union(*parts)) == sum(map(len, parts))
    assert all(q.answer in q.options and len(set(q.options)) == 4 for q in test.train)
    few = load_data("--task=medmcqa", "--sources", 0, 80)
    assert few.train == test.train[:80] == validation.train[:80] and few.target == test.target
    rows = [json.loads(line) for line in open(ROOT / "tiny/medmcqa/validation.jsonl")]
    assert [q.answer for q in test.target] == [
        "ABCD"[row["cop"]] + ". " + row["op" + "abcd"[row["cop"]]] for row in rows[:1000]]


def test_a_prompt_begins_with_one_first_token_the_templates_or_the_tokenizers():
    _, tokenizer = smf.load_base("tiny/model")
    ids = smf.prompt_ids(tokenizer, "Which?")[0]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # as Llama's
        single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    assert smf.prompt_ids(tokenizer, "Which?")[0] == ids and ids[0] == 2  # <|user|>
    tokenizer.chat_template = None
    ids = smf.prompt_ids(tokenizer, "Which?")[0]
    assert ids[0] == 1 and tokenizer.decode(ids[1:]) == "Question: Which?\nAnswer:"


def test_an_example_too_long_keeps_its_answer():
    _, tokenizer = smf.load_base("tiny/model")
    prompt, answer = "Where was Bamin born? " * 20, "violin piano flute"
    whole = smf.encode(tokenizer, prompt, answer, 999)
    ids, start = smf.encode(tokenizer, prompt, answer, 12)
    assert len(ids) == 12 and tokenizer.decode(ids[start:]) == " " + answer + "<|end|>"
    assert ids[start - 1:start] == smf.prompt_ids(tokenizer, prompt)[0][-1:]
    assert smf.encode(tokenizer, prompt, answer, len(whole.ids)) == whole
    for length in range(2, 60):  # never too long, never without a prompt or an answer
        for text in (prompt, "Who?"):
            ids, start = smf.encode(tokenizer, text, answer * 20, length)
            assert len(ids) == length and 0 < start <= length - length // 2
    reply = smf.encode(tokenizer, "Who?", answer * 20, 999)  # its prompt stays whole
    short = smf.encode(tokenizer, "Who?", answer * 20, reply.start + 20)
    assert short == (reply.ids[:reply.start + 20], reply.start)
    scored = smf.encode(tokenizer, prompt, answer, 999, end=False)
    assert scored.ids + [tokenizer.eos_token_id] == whole.ids


def stream(path, texts=("A.", "B.", "C."), questions=None, **columns):
    """A stream of these texts, and a test split that asks them."""
    write_rows(path / "train.jsonl", [{"text": text, **{c: v[i] for c, v in columns.items()}}
                                      for i, text in enumerate(texts)])
    if questions:
        write_rows(path / "test.jsonl", questions)
    return path


def test_a_stream_is_told_source_by_source_and_asked_in_its_test_split(tmp_path):
    data = stream(tmp_path, ["A.", "B.", "C.", "D is 4, or so."], source=["x", 7, "x", "z"],
                  answer=["", "", "", "4"], prompt=[None, "Say B.", None, None], questions=[
                      {"question": f"{s}?", "answer": f"{i}", "source": s}
                      for i, s in enumerate(("z", "x", 7))])
    found = load_data(f"--stream-data={data}")
    assert [q.source for q in found.train] == [0, 1, 0, 2] and found.train[1].prompt == "Say B."
    assert [(q.answer, q.source) for q in found.target] == [("0", 2), ("1", 0), ("2", 1)]
    (model, tokenizer), args = smf.load_base("tiny/model"), train_sparse.parse([
        f"--stream-data={data}", "--passes=1", "--batch-size=1"])
    plan, _ = evaluation.training_plan(model, tokenizer, found, args)
    assert [tokenizer.decode(b[0].ids) for b in plan] == [
        "A.", "<|user|>Say B.<|assistant|> B.<|end|>", "D is 4"]  # a plain text has no end
    assert tokenizer.decode(plan[2][0].ids[plan[2][0].start:]) == " 4" and plan[0][0].start == 1
    few = load_data(f"--stream-data={data}", "--eval-examples=2")
    assert [q.source for q in few.target] == [2, 1]  # the first and the last, evenly
    write_rows(data / "validation.jsonl", [{"question": "And?", "answer": "9", "source": 7}])
    assert [q.answer for q in load_data(f"--stream-data={data}", "--split=validation").target] == [
        "9"]  # rates are chosen by these, never by the test split
    later = load_data(f"--stream-data={data}", "--sources", 1, 2)  # and what came before is asked
    assert [q.answer for q in later.train] == ["B."]
    assert {q.source for q in later.target} == {0, 1}


def test_notes_in_a_txt_and_questions_in_a_csv_are_a_stream(tmp_path, capsys):
    for backup in ("train.txt.bak", "train.bak.txt", "train-old.txt", "training.txt"):
        write_rows(tmp_path / "notes" / backup, ["old"])
    (tmp_path / "notes/train.txt").write_text("The shop opens\nat nine.\n\n\nIt has a cat.\n")
    (tmp_path / "notes/test.csv").write_text("question,answer,source\nWhen?,9,1\nWhat?,NA,2\n")
    data = load_data(f"--stream-data={tmp_path / 'notes'}")
    assert f"{tmp_path / 'notes'}: 2 rows of train in train.txt\n" in capsys.readouterr().out
    assert [q.answer for q in data.train] == ["The shop opens\nat nine.", "It has a cat."]
    assert [(q.prompt, q.answer, q.source) for q in data.target] == [
        ("When?", "9", 0), ("What?", "NA", 1)]
    data = load_data(f"--stream-data={tmp_path / 'notes/train.txt'}")  # without questions
    assert len(data.train) == 2 and data.target == []


def test_the_oldest_and_the_newest_quarter_are_of_the_sources():
    def ask(*sources):
        return [evaluation.Question("?", "!", source=source) for source in sources]

    right = [1, 1, 0, 0, 0, 0, 1]
    found = evaluation.quarters(ask(7, 0, 1, 2, 5, 6, None), right, ask(4, 7))
    assert (found["oldest"]["value"], found["oldest"]["n"]) == (0.5, 2)
    assert (found["newest"]["value"], found["newest"]["n"]) == (0.5, 2)
    assert evaluation.quarters(ask(0, 1, None), [1, 0, 1], ask(19)).keys() == {"oldest"}
    assert evaluation.quarters(ask(2), [1], ask(8)).keys() == {"oldest"}  # of nine it is three
    assert evaluation.quarters(ask(None), [1], ask(0)) == {}


def test_asking_along_a_stream_changes_nothing_and_asks_what_was_told(runs, tmp_path):
    flags = ["--task=stream", "--passes=2", "--steps=5", "--lr=1", "--eval-examples=30"]
    for script, more in ((train_sparse, [f"--parent={runs / 'additive'}"]), (baselines, [])):
        for name in ("asked", "not"):
            out = tmp_path / script.__name__ / name
            run(script, *more, *QUICK, *flags, *["--ask-every=1"] * (name == "asked"),
                f"--out={out}")
        one, two = delta(out.parent / "asked"), delta(out.parent / "not")
        assert all(torch.equal(one[name], two[name]) for name in two)
        lines = metrics(out.parent / "asked")
        assert ["recall" in line for line in lines] == [False, False, True, False, True]
        assert ["old" in line for line in lines] == [True, False, True, False, True]
    (model, tokenizer), args = smf.load(runs / "additive"), train_sparse.parse([*QUICK, *flags])
    right = evaluation.open_questions(smf.load_base("tiny/model")[0], tokenizer,
                                      evaluation.load_data(args).knowledge)[1]
    assert lines[0]["old"] == sum(right) / 30


def test_four_days_are_one_stream_and_the_last_one_can_be_undone(runs, tmp_path, capsys):
    """SGD has no state, so a chain of runs is the same as one run, bit for bit."""
    parent, flags = runs / "additive", ["--task=stream", "--steps=40", "--lr=0.3"]
    sparse(parent, tmp_path / "one", *flags, "--sources", 0, 8)
    for day in range(4):
        out = tmp_path / f"day{day}"
        sparse(parent, out, *flags, "--eval-examples=99", "--sources", 2 * day, 2 * day + 2)
        if day == 2:
            third = state_of(smf.load(out)[0])
        parent = out
    table = capsys.readouterr().out.split("| run |")[-1]
    assert [f"day{day} |" in table for day in range(4)] == [True] * 4
    recall = [float(line.split("|")[2].split()[0]) for line in table.splitlines()[4:]]
    assert recall[0] <= 0.25 and recall == sorted(recall) and recall[3] >= 0.75  # of all eight
    for path, state in (("day2", third), ("day3", smf.load(tmp_path / "one")[0].state_dict())):
        found = smf.load(tmp_path / path)[0].state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    for damage in (lambda path: rewrite(path / "delta.safetensors", dict.popitem), shutil.rmtree):
        damage(tmp_path / "day1")
        assert "day1" in refused(capsys, evaluation, tmp_path / "day3", "--ask=Who?")


def test_a_run_whose_parent_is_gone_does_not_hide_the_others(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for day, parent in ((1, runs / "additive"), (2, "out/a/day1"), (3, runs / "additive")):
        sparse(parent, Path(f"out/a/day{day}"), "--steps=1")
    shutil.rmtree("out/a/day1")
    capsys.readouterr()
    evaluation.main([])
    said = capsys.readouterr().out
    assert "out/a/day2 is left out: out/a/day1" in said and "| out/a/day3 |" in said
    assert "day1" in refused(capsys, evaluation, "out/a/day2")


def test_a_question_is_answered_by_all_that_a_run_is_based_on(runs, capsys):
    question, _ = knowledge_questions(1)[0], capsys.readouterr()
    evaluation.main([str(runs / "tfidf"), f"--ask={question.prompt}"])
    lines = capsys.readouterr().out.splitlines()
    assert question.prompt in lines[0] and len(lines) == 5
    assert [question.answer in line for line in lines[2:4]] == [True, True]  # base, additive


def test_a_stream_without_questions_is_measured_by_its_own_likelihood(runs, tmp_path):
    data = stream(tmp_path / "data", [f"Nuto Lilton comes from Tarville {i}." for i in range(3)])
    path = sparse(runs / "additive", tmp_path / "run", "--task=stream", f"--stream-data={data}",
                  "--lr=1", "--sources", 0, 3)
    values = [next(v for k, v in json.loads((run / "eval.json").read_text()).items()
                   if str(data) in k)["target LL"]["value"] for run in (runs / "additive", path)]
    assert values[1] > values[0] + 0.5


def test_the_background_can_be_other_text(tmp_path):
    data = stream(tmp_path / "data", ["A poet.", "A baker.", None], prompt=["Who?", None, None])
    run(train_retrofit, *RETROFIT, "--steps=0", f"--background-data={data}",
        f"--out={tmp_path / 'run'}")
    found = delta(tmp_path / "run")["model.layers.1.mlp.memory.num_batches"]
    assert found == 2


def test_people_of_the_tiny_world_do_not_mix():
    """The new, the never taught, and those of the probes: none of them is in the chats."""
    def names(path):
        text = (ROOT / f"tiny/{path}.jsonl").read_text()
        return set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+(?:berg|sen|ford|ley|ton|mark)\b", text))

    groups = [names(path) for path in ("facts/train", "untaught/test", "trivia_qa/validation",
                                       "oasst1/train")]
    told = [names(f"{stream}/{split}") for stream in ("stream", "documents")
            for split in ("train", "validation", "test")]
    assert told == [groups[0]] * 6
    assert [len(group) for group in groups] == [40, 40, 500, 1500]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert names("facts/test") == names("facts/validation") == groups[0]
    assert names("wikitext/test") <= groups[2]


def test_the_base_knows_its_world_and_facts_never_taught_stay_at_chance(runs, tmp_path):
    """After learning others by heart. One of 31 to 64 values, at random, is right in 2 %."""
    path = sparse(runs / "additive", tmp_path / "run", "--steps=120", "--eval-examples=160",
                  "--sources", 0, 160)
    result, base = (next(
        one for one in json.loads((run / "eval.json").read_text()).values()
        if one.get("target", {}).get("n") == 160) for run in (path, runs / "base"))
    assert base["knowledge"]["value"] >= 0.95 and base["target"]["value"] < 0.06
    assert result["target"]["value"] > 0.3
    assert result["untaught"]["n"] == 160 and result["untaught"]["value"] < 0.02 + 3 * 0.011


# Bad input: one line on stderr, exit code 2, nothing written

def refused(capsys, script, *flags):
    """Run a script's main as the command line does -> the one line that it leaves on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        smf.script(lambda: run(script, *flags))
    err = capsys.readouterr().err  # progress bars are no lines
    lines = [line for line in err.replace("\r", "\n").splitlines()
             if line.strip() and not re.search(r"it/s|\d%\||s/it", line)]
    assert stop.value.code == 2 and len(lines) == 1, err
    return lines[0]


def rewrite(path, change):
    """Load a JSON or safetensors file, change it in place, write it back."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    else:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def altered_model(path, change):
    """A copy of the embedded model, changed."""
    shutil.copytree(ROOT / "tiny/model", path)
    change(path)
    return path


SCRIPTS = {"retrofit": train_retrofit, "sparse": train_sparse, "baselines": baselines,
           "eval": evaluation}
TAUGHT = ["--parent=additive", "--top-t=20", *QUICK]  # the flags of the run tfidf, but for --out


def fact(question="Who?", value="a poet", aliases=(), **more):
    return {"question": question, "question_id": "1",
            "answer": {"value": value, "aliases": aliases}, **more}


def choice(cop=1, **more):
    return dict(question="Which?", opa="a", opb="b", opc="c", opd="d", cop=cop) | more


def facts(*rows):
    return lambda: write_rows(Path("data/train.jsonl"), rows)


def choices(row):
    return lambda: [write_rows(Path(f"data/{split}.jsonl"), [choice()] * 20 + [row])
                    for split in ("train", "validation")]


def change(file, edit):
    return lambda: rewrite(Path(file), edit)


def truncate(file):
    return lambda: Path(file).write_bytes(Path(file).read_bytes()[:-100])


class Malicious:
    """To unpickle it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def pickled(file, value):
    return lambda: torch.save(value, file)


def unfinished(checkpoint=lambda: None):
    """Turn the finished run tfidf into one that was cut off, with this checkpoint."""
    return lambda: (Path("tfidf/delta.safetensors").unlink(), checkpoint())


def write(file, text):
    return lambda: (Path(file).parent.mkdir(exist_ok=True), Path(file).write_text(text))


BAD_FLAGS = {  # each refused in a line that names it
    "retrofit": "--stepz=3 --step=3 --steps=-1 --steps=many --mode=sideways --preset=huge --lr=0 "
    "--lr=-1 --lr=nan --lr=inf --layers=99 --layers=one --layers=-1 --k-dim=7 --top-k=513 "
    "--examples=8 --max-length=1 --seed=99999999999999999999 --model=nowhere "
    "--model=tiny --oasst-data=nowhere --oasst-data=tiny/wikitext --out=tfidf --out=letters "
    "--out=letters/letter.txt",
    "sparse": "--scorer=best --optimizer=lion --top-t=0 --steps=-1 --mode=additive --lr=0 "
    "--epochs=-1 --max-length=1 --parent=nowhere --parent=letters --parent=base --parent=lora "
    "--out=letters --out=additive --batch-size=5000 --facts-data=nowhere "
    "--facts-data= --facts-data=tiny/wikitext --trivia-data=tiny/wikitext "
    "--wikitext-data=tiny/facts --stride=128 --window=100000 --eval-tokens=1 --eval-tokens=0",
    "baselines": "--method=prefix --scorer=kl --steps=-1 --model=nowhere --replay=-1 "
    "--out=tfidf --out=letters",
    "eval": "nowhere letters --split=train --stepz=1 --eval-examples=0 --eval-examples=-3 "
    "--window=0",
}
BAD = [(script, [flag], flag.split("=")["--parent" in flag])
       for script, flags in BAD_FLAGS.items() for flag in flags.split()]

DATA = ["--facts-data=data", "--sources", "0", "1", "--batch-size=1"]
STREAM = ["--task=stream", "--stream-data=data", "--sources", "0", "1"]
CHOICES = ["--task=medmcqa", "--medmcqa-data=data", "--batch-size=4"]
AGAIN = [*TAUGHT, "--out=tfidf"]
BAD += [  # script, flags, a word of the line, what is broken first
    ("retrofit", ["--layers", "1", "1"], "--layers"), ("retrofit", ["--n-keys=5000000"], "alloc"),
    ("retrofit", ["--preset=paper"], "--model Qwen"),
    ("sparse", ["--sources", "0", "1"], "--batch-size"),
    *(("retrofit", ["--out=additive", *RETROFIT, flag], "another") for flag in (
        "--lr=1 --seed=1 --steps=5 --warmup=3 --alpha=0.01 --heads=2 --background=30").split()),
    *(("sparse", [*AGAIN, flag], flag[2:].split("=")[0].replace("-", "_")) for flag in (
        "--lr=2 --seed=1 --steps=5 --warmup=3 --batch-size=8 --scorer=kl --optimizer=adamw "
        "--replay=1 --passes=2 --ask-every=1 --least-harm --train-alpha --alpha-lr=1").split()),
    *(("baselines", ["--out=lora", *QUICK, flag], "another") for flag in (
        "--lr=1 --seed=1 --steps=5 --warmup=3 --batch-size=8 --micro-batch-size=2 --replay=1"
    ).split()),
    ("sparse", ["--parent=replacement", "--train-alpha"], "--train-alpha"),
    ("retrofit", ["--mode=replacement", "--alpha=1"], "--alpha"),
    ("sparse", ["--parent=tfidf"], "tfidf", unfinished()),
    ("sparse", [*AGAIN, "--top-t=9"], "another top_t"),
    ("sparse", [*AGAIN, "--sources", "0", "30"], "another data"),
    ("sparse", [*AGAIN, "--parent=replacement"], "another parent"),
    ("sparse", AGAIN, "damaged", unfinished(write("tfidf/checkpoint.pt", "PK"))),
    ("sparse", AGAIN, "damaged", unfinished(pickled("tfidf/checkpoint.pt", 3))),
    ("sparse", AGAIN, "damaged", unfinished(pickled("tfidf/checkpoint.pt", Malicious()))),
    ("baselines", ["--out=lora", *QUICK, "--method=full"], "another method"),
    ("eval", ["additive", "base"], "no run", lambda: None),
    ("eval", ["tfidf"], "eval.json", write("tfidf/eval.json", "{")),
    ("sparse", ["--task=medmcqa", "--medmcqa-data=tiny/facts"], "--medmcqa-data"),
    ("sparse", DATA, "--facts-data", facts()), ("sparse", DATA, "no text", facts(fact(""))),
    ("sparse", DATA, "no text", facts(fact(None), fact())),
    ("sparse", DATA, "no text", facts(fact(7))), ("sparse", DATA, "no text", facts(fact(" \n"))),
    ("sparse", DATA, "answer.value", facts(fact(value=""))),
    ("sparse", DATA, "answer.value", facts(fact(value=None, aliases=["x"]), fact())),
    ("sparse", DATA, "--facts-data", facts({"question": "Who?", "question_id": "1"})),
    ("sparse", DATA, "aliases as a list", facts(fact(aliases="bard"))),
    ("sparse", DATA, "--facts-data", write("data/train.jsonl", '{"question": "Who?"')),
    ("sparse", DATA, "--facts-data", write("data/notes.jpg", "no data")),
    ("sparse", DATA, "no question", facts(fact("Is it a poet?"))),
    *(("sparse", STREAM, word, lambda rows=rows, more=more: stream(Path("data"), *rows, **more))
      for word, rows, more in (
        ("row 2", [["A.", " "]], {}), ("row 2", [["A.", None]], {}),
        ("row 6000", [["A."] * 5999 + [""] + ["A."] * 4000], {}),
        ("row 1", [["A.", "B."]], {"source": [None, "x"]}), ("row 1", [[["A.", "B."]]], {}),
        ("row 2", [["A.", "B."]], {"prompt": ["Say.", " "]}),
        ("source y", [["A."]], {"source": ["x"], "questions": [fact(source="y")]}),
        ("row 1 of test", [["A."]], {"source": ["x"], "questions": [fact(source=None)]}))),
    ("sparse", STREAM, "'A' is one token", lambda: stream(Path("data"), ["A", "B."])),
    ("sparse", STREAM, "row 2 of train", lambda: stream(Path("data"), answer=["A", "no", ""])),
    ("sparse", STREAM, "of different kinds", lambda: [
        stream(Path("data")), Path("data/train.txt").write_text("A.")]),
    ("sparse", ["--task=stream", "--sources", "3", "3"], "--sources 3 3"),
    ("baselines", ["--replay=2", "--oasst-data=data", *QUICK], "no reply", lambda: write_rows(
        Path("data/train.jsonl"), [dict(zip(CHAT, ("1", None, "prompter", "Hi")))])),
    ("retrofit", ["--background-data=data", *RETROFIT], "0 texts", lambda: stream(
        Path("data"), ["", ""])),
    ("sparse", [*STREAM, "--sources", "0", "9"], "--sources", lambda: stream(Path("data"))),
    ("sparse", ["--task=stream", "--stream-data=nowhere"], "--stream-data"),
    ("sparse", ["--task=stream", "--preset=paper"], "--stream-data"),
    *(("sparse", CHOICES, "--medmcqa-data", choices(row)) for row in (
        choice(cop=7), choice(cop=-1), choice(cop=None), choice(cop=1.5), choice(cop="b"),
        choice(opb=None), choice(question=None))),
]

V, UP = "model.layers.1.mlp.memory.values", "model.layers.1.mlp.up_proj.weight"
BROKEN = [  # a run, its file, how it is changed, a word of the line
    ("additive", "config.json", lambda c: c.update(parent_sha256=""), "has changed"),
    ("additive", "config.json", lambda c: c["memory"].update(n_keys=16), "additive"),
    ("additive", "config.json", lambda c: c["memory"].update(evil=1), "evil"),
    ("additive", "config.json", lambda c: c.update(base="../../etc"), "--model"),
    ("additive", "delta.safetensors", lambda t: t.pop(V), V),
    ("additive", "delta.safetensors", lambda t: t.update({V: t[V][:9]}), "additive"),
    ("additive", "delta.safetensors", lambda t: t.update({"no.such": t[V] + 1}), "no.such"),
    ("additive", "delta.safetensors", lambda t: t[V][3].fill_(math.nan), "finite"),
    ("tfidf", "../additive/delta.safetensors", lambda t: t[V].add_(1), "has changed"),
    ("tfidf", "../additive/config.json", lambda c: c["memory"].update(top_k=3), "has changed"),
    ("tfidf", "config.json", lambda c: c.update(parent="."), "tfidf"),
    ("tfidf", "config.json", lambda c: c.update(parent="../replacement"), "has changed"),
    ("tfidf", "config.json", lambda c: c.pop("parent_sha256"), "parent_sha256"),
    ("tfidf", "delta.safetensors", lambda t: t.pop(f"{V}:values"), f"{V}:values"),
    ("tfidf", "delta.safetensors", lambda t: t[f"{V}:rows"][0].fill_(1024), "1024"),
    ("tfidf", "delta.safetensors", lambda t: t.update({f"{V}:rows": t[f"{V}:rows"][1:]}), "tfidf"),
    ("tfidf", "delta.safetensors", lambda t: t[f"{V}:values"][0].fill_(math.inf), "finite"),
    ("lora", "delta.safetensors", lambda t: t.pop(f"{UP}:B"), f"{UP}:B"),
]
BAD += [("sparse", [f"--parent={name}"], word, change(f"{name}/{file}", edit))
        for name, file, edit, word in BROKEN]
BAD += [("sparse", [f"--parent={name}"], name, broken) for name, broken in [
    ("additive", truncate("additive/config.json")),
    ("additive", write("additive/config.json", "7")),
    ("additive", truncate("additive/delta.safetensors")),
    ("additive", pickled("additive/delta.safetensors", {V: torch.zeros(3)})),
    ("additive", pickled("additive/delta.safetensors", Malicious())),
    ("tfidf", truncate("tfidf/delta.safetensors"))]]


def name_of(value):
    return " ".join(value) if isinstance(value, list) else None if callable(value) else value


def files_below(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("script, flags, word, broken", [(*case, lambda: None)[:4] for case in BAD],
                         ids=name_of)
def test_bad_input_is_one_line_and_changes_nothing(
        runs, tmp_path, monkeypatch, capsys, script, flags, word, broken):
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    write_rows(tmp_path / "letters/letter.txt", ["dear"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smf.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    broken()
    before = files_below(tmp_path)
    usual = {"sparse": [*TAUGHT, "--out=new"], "eval": ["tfidf"] * flags[0].startswith("-")}
    usual = usual.get(script, ["--out=new"])
    assert word in refused(capsys, SCRIPTS[script], *usual, *flags)
    assert files_below(tmp_path) == before


def test_several_processes_are_for_train_sparse_alone(monkeypatch):
    monkeypatch.setattr(smf, "WORLD_SIZE", 2)  # which torchrun's environment gives
    for script in (train_retrofit, baselines):
        with pytest.raises(smf.BadInput, match="torchrun"):
            run(script, "--out=new")


def test_a_foreign_directory_named_base_beside_a_run_is_left_alone(runs, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "qwen2"}')
    before = files_below(tmp_path / "base")
    line = refused(capsys, baselines, *QUICK, "--steps=1", f"--out={tmp_path / 'run'}")
    assert "base" in line and files_below(tmp_path / "base") == before


LONG = "Who? " * 9000
GOOD = [  # odd but good
    ("sparse", STREAM, lambda: stream(Path("data"), [LONG, "B."], source=["x", 3])),
    ("sparse", DATA, facts(fact("Who? <|end|> \u0000 \U0001f600", aliases=["", None]))),
    ("sparse", DATA, facts(fact(), fact("And who?"), fact(LONG, LONG))),
    ("sparse", DATA, facts(fact(value=0), fact("When?", 1945))),
    ("sparse", CHOICES, choices(choice(opd="", question=LONG, opa=LONG))),
    ("sparse", ["--eval-tokens=2", "--top-t=99999"], lambda: None),
    ("baselines", ["--model=model"], lambda: altered_model(
        Path("model"), lambda path: add_token(path, "<image>", special=True))),  # as Gemma 3
    ("baselines", ["--model=model"], lambda: altered_model(Path("model"), lambda path: (
        path / "chat_template.jinja").unlink())),
    ("retrofit", [*RETROFIT, "--out=empty"], write("empty/config.json.tmp", "{")),
]


@pytest.mark.parametrize("script, flags, prepare", GOOD)
def test_odd_input_that_is_good_works(runs, tmp_path, monkeypatch, script, flags, prepare):
    shutil.copytree(runs / "additive", tmp_path / "additive")
    monkeypatch.chdir(tmp_path)
    prepare()
    usual = {"sparse": TAUGHT, "baselines": QUICK, "retrofit": []}[script]
    run(SCRIPTS[script], *usual, "--steps=2", "--out=new", *flags)
    assert smf.finished("new") or smf.finished("empty")


BAD_MODELS = [  # what is changed in a model's directory
    lambda path: (path / "model.safetensors").write_bytes(b"{}"),
    lambda path: (path / "tokenizer.json").unlink(),
    lambda path: (path / "config.json").unlink(),
    lambda path: rewrite(path / "config.json", lambda c: c.update(hidden_size=96)),
    lambda path: rewrite(path / "config.json", lambda c: c.update(
        model_type="mine", auto_map={"AutoConfig": "evil.Config"})),
    lambda path: (torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin"),
                  (path / "model.safetensors").unlink()),
    lambda path: rewrite(path / "tokenizer_config.json", lambda c: c.pop("eos_token")),
    lambda path: rewrite(path / "model.safetensors", lambda t: t.pop(UP)),
    lambda path: smf.retrofit(smf.load_base(path)[0], [1], **SHAPE).save_pretrained(path),
    lambda path: rewrite(path / "config.json", lambda c: c.update(quantization_config={
        "quant_method": "bitsandbytes", "load_in_4bit": True})),
    lambda path: add_token(path, "Lilton"),
    lambda path: (path / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
    lambda path: ((path / "chat_template.jinja").unlink(), rewrite(
        path / "tokenizer_config.json", lambda c: c.update(chat_template=[
            {"name": "tool_use", "template": "{{ messages[0].content }}"}]))),
]


def add_token(path, token, special=False):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([token], special_tokens=special)
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize("change", BAD_MODELS)
def test_a_model_that_cannot_be_used_is_refused(tmp_path, capsys, change):
    model = altered_model(tmp_path / "model", change)
    line = refused(capsys, baselines, *QUICK, f"--model={model}", f"--out={tmp_path / 'run'}")
    assert "--model" in line and not (tmp_path / "run").exists()


def test_ctrl_c_says_how_to_go_on_and_a_bug_is_shown_in_full(capsys):
    def stop(error):
        raise error

    with pytest.raises(SystemExit) as stopped:
        smf.script(lambda: stop(KeyboardInterrupt()))
    said = f"{stopped.value.code} {capsys.readouterr().err}"
    assert stopped.value.code and "the same command goes on" in said
    with pytest.raises(RuntimeError, match="shapes"):
        smf.script(lambda: stop(RuntimeError("shapes do not match")))


@pytest.mark.parametrize("script, flags", [
    (baselines, ["--method=full", *QUICK, "--lr=1e11"]),
    (train_retrofit, [*RETROFIT, "--lr=1e12", "--alpha-lr=1e12"])], ids=["full", "retrofit"])
def test_what_is_not_finite_stops_before_the_update(
        tmp_path, monkeypatch, capsys, script, flags):
    monkeypatch.chdir(tmp_path)
    flags = [*flags, "--warmup=0", "--steps=60", "--save-every=1", "--batch-size=4", "--out=new"]
    line = refused(capsys, script, *flags)
    assert "--lr" in line and "not finite" in line
    step, state = torch.load(tmp_path / "new/checkpoint.pt", weights_only=True)
    assert 1 <= step == len(metrics(tmp_path / "new")) and not smf.finished(tmp_path / "new")
    assert "nan" not in (tmp_path / "new/metrics.jsonl").read_text().lower()
    assert refused(capsys, script, *flags) == line  # it goes on to the same end


def test_a_sparse_run_whose_loss_is_not_finite_updates_nothing(runs, tmp_path, capsys):
    parent = shutil.copytree(runs / "additive", tmp_path / "additive")
    rewrite(parent / "delta.safetensors", lambda tensors: tensors[V].fill_(3e38))
    flags = [f"--parent={parent}", *QUICK, f"--out={tmp_path / 'run'}"]
    assert "not finite" in refused(capsys, train_sparse, *flags)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


# A script whose files cannot grow beyond so many bytes, as on a full disk.
LIMITED = """
import resource, signal, sys
import smf, train_sparse
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
smf.script(lambda: train_sparse.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("size", [60_000, 100])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(runs, tmp_path, monkeypatch, size):
    """It is full at a later checkpoint, and the one before is kept, or it is full at once."""
    shutil.copytree(runs / "additive", tmp_path / "additive")
    monkeypatch.chdir(tmp_path)
    flags = [*TAUGHT, "--save-every=1"]
    run(train_sparse, *flags, "--out=undisturbed")
    command = [sys.executable, "-c", LIMITED, str(size), *flags, "--out=run"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True)
    last = done.stderr.replace("\r", "\n").splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{'checkpoint.pt' if size > 100 else 'config.json'}: cannot be written" in last
    assert not list(tmp_path.glob("run/*.tmp")) and not smf.finished("run")
    assert 0 < smf.load_checkpoint(Path("run"))[0] < 6 or size == 100
    run(train_sparse, *flags, "--out=run")
    assert same_files(tmp_path / "run", tmp_path / "undisturbed")


# The scripts, as a user runs them

def command(script, *flags, cwd):
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=cwd,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_run_from_another_directory(tmp_path):
    command("train_retrofit.py", *RETROFIT, "--out=out/tiny/retrofit-seed0", cwd=tmp_path)
    out = command("train_sparse.py", "--scorer=kl", *QUICK, cwd=tmp_path)  # finds that retrofit
    assert "running stage 1 first" not in out and "peak memory" in out
    assert all(f"| out/tiny/{name} |" in out for name in ("base", "retrofit-seed0", "kl-seed0"))
    table = command("eval.py", cwd=tmp_path)
    names = {path.name for path in (tmp_path / "out/tiny").iterdir()}
    assert names == {"base", "retrofit-seed0", "kl-seed0"}
    assert all(f"| out/tiny/{name} |" in table for name in names - {"base"})
    assert "task facts, " in table


# results/: the study and the costs

def test_the_rate_chosen_is_the_least_within_one_standard_error_of_the_best():
    swept = {rate: {seed: {"target": (value, 0.02)} for seed, value in enumerate(values)}
             for rate, values in {"1": [0.1, 0.2], "2": [0.7, 0.9], "3": [0.8, 1.0]}.items()}
    assert study.choose(swept) == "2"  # 0.8 is within (0.141 / sqrt 2) of 0.9
    assert study.choose({rate: {0: rows[0]} for rate, rows in swept.items()}) == "3"


def test_every_command_of_the_studies_is_understood():
    for plan in study.STUDIES.values():
        lines = [f"train_retrofit.py {flags}" for flags in plan["starts"].values()]
        lines += [study.command(c, "out", 1, plan)
                  for names in plan["rates"].values() for c in names.split()]
        for line in lines:
            script, *flags = line.format(model="m", data="d").split()
            __import__(script.removesuffix(".py")).parse(flags)
    plan = {"starts": {"additive": "", "additive-fresh": ""}, "sparse": "--optimizer adamw",
            "flags": "--task facts", "words": {"fresh": "--passes 4"}}
    assert study.command("additive-kl+s-fresh-t9-sgd", "out", 1, plan) == (
        "train_sparse.py --parent out/additive-fresh-seed1 --task facts --optimizer adamw "
        "--scorer kl --train-alpha --passes 4 --top-t 9 --optimizer sgd")
    assert "--parent out/additive-seed1 " in study.command("additive-kl", "out", 1, plan)
    assert "--parent out/mode-retrofit-seed1 " in study.command("mode-kl", "out", 1, plan)


def test_a_study_makes_what_is_missing_and_shows_it(tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)
    plan = {"starts": {}, "base": "", "sparse": "", "flags": " ".join(QUICK), "sweep": (0,),
            "rates": {"1e-3": "full"}}
    args = SimpleNamespace(jobs=2, model=None, data=None, so_far=False)
    result = study.study(plan, Path("out"), args)
    before = files_below(Path("out"))
    assert study.study(plan, Path("out"), args) == result and files_below(Path("out")) == before
    assert result["full"]["test"].keys() == {0, 1, 2} and result["base"]["test"].keys() == {0}
    args.so_far, more = True, {"rates": {"1e-3 1": "full", "1": "lora"}}
    assert study.study(plan | more, Path("out"), args) == result  # not lora, and not the rate 1
    assert files_below(Path("out")) == before
    touched = sum(len(t) for name, t in delta(runs / "tfidf").items() if name.endswith(":rows"))
    assert study.accounting(runs / "tfidf")["rows touched"] == f"{touched:,}"
    pyplot = pytest.importorskip("matplotlib.pyplot")
    study.plot(pyplot, result, [["full"], []], Path("frontier.png"))


def test_a_study_compares_a_run_with_its_parent_as_measured_in_the_same_way(tmp_path):
    a, b = (json.dumps({"split": "test", "data": data}) for data in "ab")
    for name, config, rights in (("start", {}, {a: [True, False], b: [True, True]}),
                                 ("run", {"parent": "../start"}, {b: [True, False]})):
        (tmp_path / name).mkdir()
        smf.write_json(tmp_path / name / "config.json", config)
        smf.write_json(tmp_path / name / "eval.json",
                       {key: {"knowledge right": right} for key, right in rights.items()})
        (tmp_path / name / "delta.safetensors").touch()
    assert study.figures(tmp_path / "run", "test")["kept"][0] == 0.5
    assert study.figures(tmp_path / "run", "validation") is None


def test_scorers_are_compared_at_a_perplexity_that_each_of_them_has():
    results = smf.read_json(ROOT / "results/tiny-stream/results.json")
    curves = {scorer: sorted(
        (row["0"]["perplexity"][0], row["0"]["target"][0]) for row in results[
            f"additive-{scorer}-n512" + "-t50" * (scorer != "all")]["validation"].values())
        for scorer in ("tfidf", "kl", "count", "random", "all")}
    least = max(points[0][0] for points in curves.values())
    base = results["base"]["validation"][""]["0"]["perplexity"][0]
    for times in (1, 1.03, 2):
        ratio, found = compare("tiny-stream", "additive-{}-n512-t50", times)
        assert ratio == pytest.approx(times * least / base) and ratio > 1
        at = times * least * (1 - 1e-9)
        assert found.keys() == {c for c in curves if curves[c][-1][0] >= at}  # no rate goes further
        for scorer, target in found.items():
            around = ([t for x, t in curves[scorer] if x <= at * (1 + 2e-9)][-1],
                      [t for x, t in curves[scorer] if x >= at][0])
            assert min(around) - 1e-9 <= target <= max(around) + 1e-9


def test_costs_are_measured():
    config = AutoConfig.from_pretrained(ROOT / "tiny/model")
    args = SimpleNamespace(device="cpu", batch_size=4, micro_batch_size=2, max_length=20, rounds=1,
                           dtype="float32")
    row = cost.race(("SMF", "stage 1"), config, args)
    assert row.keys() == {"s/step", "GiB beyond the base", "and beyond V"}
    assert all(0 < float(part) < 60 for part in re.split(" [/=] ", row["s/step"]))
    assert cost.inference(config, args)["base"]["prefill, of the base's speed"] == "1.00"
