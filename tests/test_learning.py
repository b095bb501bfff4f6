"""What the sites learn and how they know it is wrong: the guard, bad input, drift, schedules, and states of several processes."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import spt_compiler
from spt_compiler import calibrate, learning
from spt_compiler.state import STORE
from tests.blocks import SPARSE, Stack, train_steps


def compiled(module, **options):
    return torch.compile(module, backend="spt", options={**SPARSE, **options})


def batch(length: int = 100, size: int = 2, seed: int | None = None) -> torch.Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(size, length, 48, generator=generator)


def sites(model) -> dict:
    return dict(STORE.named_states(model))


def of(model, kind: str):
    return next(s for s in sites(model).values() if s.kind == kind)


def finite(model) -> bool:
    return all(t.isfinite().all() for n, t in spt_compiler.state_dict(model).items() if not n.endswith(".sample"))


# ---- the guard ----------------------------------------------------------------------------------------------------


def spoil(state) -> None:
    """A router that prefers what it needs least; codewords that tell no key from another."""
    if state.kind == "ffn":
        t = state.tensors
        state.assign(
            router_weight=-t["router_weight"],
            router_bias=-t["router_bias"],
            always_on=torch.zeros_like(t["always_on"]),
            compensation=-t["compensation"],
            correction_out=-t["correction_out"],
        )
    else:
        state.assign(codebook=torch.zeros_like(state.tensors["codebook"]))


@pytest.mark.parametrize("site", ["blocks.0.qkv/attention/0", "blocks.1.fc1/ffn/0"])
def test_the_guard_finds_a_spoiled_site_within_one_interval_and_densifies_just_that_one(site):
    interval, kind = 5, site.split("/")[1]
    # Attention that looks somewhere, and far: runs of some kinds of tokens, each of which looks for its like.
    kinds = torch.randint(0, 24, (1, 64), generator=torch.Generator().manual_seed(1))
    model, data = Stack(2), torch.randn(24, 48)[kinds].repeat_interleave(16, 1) + 0.1 * batch(1024, size=1, seed=2)
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight[:48] *= 6
            block.qkv.weight[48:96] = block.qkv.weight[:48]
    start = copy.deepcopy(model.state_dict())
    clean = compiled(model, **{"guard.interval": interval})
    for _ in range(20):
        clean(data).square().mean().backward()
    errors = [m["rel_error"] for n, m in spt_compiler.metrics(model).items() if f"/{kind}/" in n]
    torch._dynamo.reset()
    model = Stack(2)
    model.load_state_dict(start)
    run = compiled(model, **{"guard.interval": interval, f"{kind}.max_rel_error": 1.15 * max(errors)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to warn about while all is well
        for _ in range(20):
            run(data).square().mean().backward()
        run(data)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    spoil(sites(model)[site])  # step 20 was judged just now
    with pytest.warns(UserWarning, match="max_rel_error.*it becomes den"):
        for _ in range(interval + 1):  # the last call reads what the last step measured
            run(data).square().mean().backward()
    before = {n: 0.25 if "/attention/" in n else 0.5 for n in sites(model)}
    after = {n: m["density"] for n, m in spt_compiler.metrics(model).items()}
    assert {n for n in after if after[n] > before[n]} == {site}
    assert all(after[n] == before[n] for n in after if n != site)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_pooled_error_is_that_of_all_looks_with_the_spread_of_a_ratio():
    generator = torch.Generator().manual_seed(0)
    energy = torch.rand(4, generator=generator).double() + 0.5
    looks = torch.stack([energy * torch.tensor([0.01, 0.02, 0.04, 0.01]).double(), energy], 1)
    error, spread = calibrate.pooled_error(looks)
    assert error == pytest.approx(float(looks[:, 0].sum() / looks[:, 1].sum()) ** 0.5)
    left_out = [calibrate.pooled_error(looks[[j for j in range(4) if j != i]])[0] for i in range(4)]
    mean = sum(left_out) / 4
    jackknife = (3 / 4 * sum((e - mean) ** 2 for e in left_out)) ** 0.5
    assert spread == pytest.approx(jackknife, rel=0.2) and spread > 0
    even = torch.stack([0.04 * energy, energy], 1)
    assert calibrate.pooled_error(even) == pytest.approx((0.2, 0.0), abs=1e-9)
    # A look that says nothing, or that is not finite, does not count; nor does a single one have a spread.
    bad = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [1.0, torch.inf]]).double()
    assert calibrate.pooled_error(torch.cat([looks, bad])) == pytest.approx((error, spread))
    assert calibrate.pooled_error(bad) == (0.0, 0.0) and calibrate.pooled_error(looks[:1])[1] == 0.0


@pytest.mark.parametrize(("error", "acts"), [(0.3, False), (1.0, False), (0.3, True)])
def test_one_bad_look_of_many_does_not_make_a_site_denser(error, acts):
    """The guard wants the pooled error a standard error above the limit; one odd batch raises both."""
    model = Stack(1)
    run = compiled(model, **{"guard.interval": 8, "attention.max_rel_error": 0.2})
    x = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(15):
            run(x).square().mean().backward()
        run(x)  # reads step 15, the third look of its interval
        state = of(model, "attention")
        state.set_counter("densified", 0)
        assert state.counter("measured_at") == 15
        looks = state.tensors["looks"]
        # Seven looks below the limit (an error of .1), or above it (.3), and what step 16 adds.
        looks[1:, 1] = 1.0
        looks[1:, 0] = 0.01 if not acts else 0.09
        run(x).square().mean().backward()
        quality = state.tensors["quality"]
        quality.copy_(torch.tensor([1.0, error**2, 1.0, 1.0]))
        run(x)
    expected = ((7 * (0.09 if acts else 0.01) + error**2) / 8) ** 0.5
    assert state.metrics["rel_error"] == pytest.approx(expected, rel=1e-3)
    if error == 1.0:  # the mean is above the limit, and says little
        assert state.metrics["rel_error"] > 0.2 and state.metrics["rel_error_spread"] > 0.1
    assert state.counter("densified") == int(acts)


def test_a_slight_miss_has_to_happen_twice_in_a_row():
    model = Stack(1)
    run = compiled(model, **{"guard.interval": 1, "attention.max_rel_error": 0.2})
    x = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            run(x).square().mean().backward()
        run(x)
        state = of(model, "attention")
        levels = []
        for error in (0.1, 0.24, 0.1, 0.24, 0.24, 0.1):
            state.set_counter("densified", 0)
            run(x).square().mean().backward()
            state.tensors["quality"].copy_(torch.tensor([1.0, error**2, 1.0, 1.0]))
            run(x)
            levels.append(state.counter("densified"))
            assert state.metrics["rel_error"] == pytest.approx(error, rel=1e-3)
        assert levels == [0, 0, 0, 0, 1, 0]
        # A clear one acts at once.
        run(x).square().mean().backward()
        state.tensors["quality"].copy_(torch.tensor([1.0, 0.26**2, 1.0, 1.0]))
        run(x)
    assert state.counter("densified") == 1


def test_the_looks_of_an_interval_survive_a_resume():
    model = Stack(1)
    run = compiled(model, **{"guard.interval": 8})
    x = batch()
    for _ in range(14):
        run(x).square().mean().backward()
    run(x)
    saved = spt_compiler.state_dict(model)
    looks = next(v for n, v in saved.items() if n.endswith("/attention/0.looks"))
    assert (looks[:, 1] > 0).sum() == 6  # steps 9 to 14: after step 8 they began anew
    other = Stack(1)
    other.load_state_dict(model.state_dict())
    again = compiled(other, **{"guard.interval": 8})
    spt_compiler.load_state_dict(other, saved)
    for call in (run, again):
        for _ in range(3):
            call(x).square().mean().backward()
        call(x)
    ours, theirs = (of(m, "attention").metrics for m in (model, other))
    assert ours["rel_error"] == theirs["rel_error"] and ours["rel_error_spread"] == theirs["rel_error_spread"]


def test_guard_interval_zero_never_measures():
    model = Stack(1)
    run = compiled(model, **{"guard.interval": 0, "attention.max_rel_error": 1e-9, "ffn.max_rel_error": 1e-9})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_steps(model, run, [batch() for _ in range(6)])
    assert all("rel_error" not in m for m in spt_compiler.metrics(model).values())
    assert all(s.initialised for s in sites(model).values())


def test_the_guard_measures_the_ffn_it_runs():
    """The reported error is that of the output, held against the dense module on the very tokens that were sampled."""
    block = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 24))
    run = compiled(block, **{"guard.interval": 1})
    x = torch.randn(500, 24)
    for _ in range(6):
        run(x).square().mean().backward()
    out = run(x)  # upkeep reads step 6, at which nothing is learned, and routes as step 5 did
    state = of(block, "ffn")
    dense = block(x)
    got = (out - dense).norm() / (dense - block[2].bias).norm()
    assert state.metrics["rel_error"] == pytest.approx(float(got), rel=1e-3)
    assert state.counter("corrects") and state.tensors["correction_gate"].item() == 1.0


def test_the_correction_holds_only_for_the_blocks_it_was_fitted_for():
    block = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 24))
    run = compiled(block, **{"ffn.schedule": [1.0, 4]})
    x = torch.randn(500, 24)
    gates = []
    for _ in range(9):
        run(x).square().mean().backward()
        state = of(block, "ffn")
        gates.append((round(state.budget, 2), int(state.tensors["correction_gate"])))
    # steps 1, 2, 4, 8 learn for the density of their step; between them the number of blocks moves on. Dense needs none.
    assert gates[0] == (-1.0, 0)
    assert [g for g in gates if g[1]] and (1.0, 1) == gates[-1]
    for budget, gate in gates:
        assert not (budget < 0 and gate)


def test_a_static_router_keeps_the_units_of_largest_energy():
    block = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 24))
    run = compiled(block, **{"ffn.router": "static"})
    x = torch.randn(300, 24)
    for _ in range(3):
        run(x).square().mean().backward()
    run(x)
    state = of(block, "ffn")
    energy = torch.relu(block[0](x)).square().mean(0) * block[2].weight.square().sum(0)
    kept = state.tensors["permutation"][:48].long()
    assert energy[kept].sum() > 0.99 * energy.topk(48).values.sum()
    # The first blocks hold them, and are the ones that every token keeps.
    assert state.tensors["always_on"].tolist() == [True] * 4 + [False] * 4


def test_a_learned_router_keeps_the_same_units_for_all_tokens_where_only_these_matter():
    """And goes on doing so with later updates; where tokens need different units, it routes."""

    def train(x: torch.Tensor, weight: torch.Tensor):
        block = nn.Sequential(nn.Linear(24, 96, bias=False), nn.ReLU(), nn.Linear(96, 24))
        with torch.no_grad():
            block[0].weight.copy_(weight)
        run = compiled(block)
        for _ in range(6):
            run(x).square().mean().backward()
        run(x)
        return of(block, "ffn")

    weight, x = torch.randn(96, 24), torch.randn(300, 24)
    hot = torch.arange(96) % 2 == 0
    alike = train(x, torch.where(hot[:, None], weight, 0.05 * weight)).tensors
    assert not alike["router_weight"].any() and hot[alike["permutation"][:48].long()].all()
    assert alike["always_on"].tolist() == [True] * 4 + [False] * 4
    # Two kinds of tokens, and for each of them every second unit.
    torch._dynamo.reset()
    kind = torch.randint(0, 2, (300, 1)) * 2 - 1
    turn = torch.where(hot, 1.0, -1.0)[:, None]
    weight[:, 0], x[:, :1] = 6 * turn[:, 0], kind.float()
    assert train(x, weight).tensors["router_weight"].any()


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 2),
        ({"attention.granularity": "token"}, 4),
        ({"attention.granularity": "token", "attention.select": "pq-match"}, 6),  # at most 8, and 12 divides by it
        ({"attention.subspaces": 4}, 3),
    ],
)
def test_width_of_subspaces(options, width):
    model = Stack(1)
    run = compiled(model, **options)
    run(batch()).square().mean().backward()
    codebook = of(model, "attention").tensors["codebook"]
    assert tuple(codebook.shape) == (4, 12 // width, 16, width)


# ---- schedules ----------------------------------------------------------------------------------------------------


def test_schedules_are_data():
    model, x = Stack(1), batch()
    options = {"attention.schedule": [1.0, 4], "ffn.schedule": [1.0, 4], "dense_steps": 2}
    run = compiled(model, **options)
    run(x).sum().backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seen = []
    for _ in range(9):
        run(x).sum().backward()
        seen.append(spt_compiler.metrics(model))
    attention = [round(m["blocks.0.qkv/attention/0"]["density"], 4) for m in seen]
    ffn = [round(m["blocks.0.fc1/ffn/0"]["density"], 4) for m in seen]
    assert attention == [1.0, 1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25, 0.25, 0.25]
    assert ffn == [1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("value", [1.0, [1.0], [2.0, 5], [0.5, -1], ["1", 2], [0.5, 1.5]])
def test_bad_schedules_are_refused(value):
    with pytest.raises(spt_compiler.OptionError, match="attention.schedule"):
        spt_compiler.SPTConfig.from_options({"attention.schedule": value}, env={})


# ---- bad input: each behaviour is stated by its test ------------------------------------------------


def test_constant_activations_and_a_repeated_token_learn_something_finite():
    for x in (torch.ones(2, 100, 48) * 3, torch.randn(1, 1, 48).expand(2, 100, 48).contiguous()):
        torch._dynamo.reset()
        model = Stack(1)
        run = compiled(model, **{"guard.interval": 1})
        losses = train_steps(model, run, [x] * 5)
        assert all(torch.isfinite(torch.tensor(losses))) and finite(model)
        assert all(s.initialised for s in sites(model).values())


def test_a_bad_batch_is_left_out_and_counted():
    clean, spoiled = Stack(1), Stack(1)
    spoiled.load_state_dict(clean.state_dict())
    data = [batch(seed=i) for i in range(4)]
    bad = batch(seed=9)
    bad[0, 17], bad[1, 3, 5] = torch.nan, torch.inf
    runs = [compiled(m) for m in (clean, spoiled)]
    for i, x in enumerate(data):
        for model, run in zip((clean, spoiled), runs, strict=True):
            x = bad if model is spoiled and i == 1 else x
            out = run(x)
            # a loss over finite outputs only, as a scaler that skips the step would leave the weights
            out.nan_to_num(0.0, 0.0, 0.0).square().mean().backward()
            model.zero_grad()
    for run in runs:
        run(data[0])
    assert finite(spoiled)
    assert all(s.counter("skipped_rows") == 0 for s in sites(clean).values())
    assert all(s.counter("skipped_rows") > 0 for s in sites(spoiled).values())


def test_a_batch_of_nan_teaches_nothing():
    model = Stack(1)
    run = compiled(model)
    train_steps(model, run, [batch(seed=i) for i in range(3)])
    run(batch(seed=3)).sum().backward()  # step 4 learns at the next call
    run(batch(seed=3))
    kept = {n: s.tensors[k].clone() for n, s in sites(model).items() for k in ("codebook", "permutation") if k in s.tensors}
    updates = {n: s.counter("updates") for n, s in sites(model).items()}
    for _ in range(4):
        run(torch.full((2, 100, 48), torch.nan)).nan_to_num().sum().backward()
        model.zero_grad()
    run(batch(seed=3))
    for name, state in sites(model).items():
        key = "codebook" if state.kind == "attention" else "permutation"
        assert state.counter("steps") == 8 and torch.equal(state.tensors[key], kept[name])
        assert state.counter("skipped_rows") > 0
        if state.kind == "attention":
            assert state.counter("updates") == updates[name]
    assert finite(model)


def test_nan_before_anything_was_learned_keeps_the_site_dense():
    model = Stack(1)
    run = compiled(model)
    for _ in range(2):
        run(torch.full((2, 100, 48), torch.nan)).nan_to_num().sum().backward()
        model.zero_grad()
    x = batch()
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any(s.initialised for s in sites(model).values())
    run(x).sum().backward()
    run(x)
    assert all(s.initialised for s in sites(model).values())


@pytest.mark.parametrize("how", ["hot", "dead"])
def test_routers_whose_blocks_are_all_hot_or_all_dead(how):
    """All hot: as many as the static maximum holds. All dead (NaN): the lower blocks. Both until the next update."""
    block = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 24))
    run = compiled(block)
    x = torch.randn(300, 24)
    for _ in range(5):
        run(x).square().mean().backward()
    state = of(block, "ffn")
    before = run(x).detach()
    if how == "hot":
        state.assign(always_on=torch.ones_like(state.tensors["always_on"]))
    else:
        state.assign(router_weight=torch.full_like(state.tensors["router_weight"], torch.nan))
    out = run(x).detach()
    assert out.isfinite().all() and out.shape == before.shape
    for _ in range(4):  # step 8 learns: the router is fitted to what it sees now
        run(x).square().mean().backward()
    run(x)
    assert finite(block)
    assert state.tensors["always_on"].sum() <= 4
    dense = block(x)
    assert (run(x) - dense).norm() < 1.05 * (before - dense).norm()


def test_an_ffn_whose_units_are_all_dead():
    block = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 24))
    with torch.no_grad():
        block[0].bias.fill_(-1e3)
    run = compiled(block, **{"guard.interval": 1})
    x = torch.randn(300, 24)
    for _ in range(5):
        run(x).square().mean().backward()
    torch.testing.assert_close(run(x), block(x))
    assert finite(block) and of(block, "ffn").metrics["rel_error"] == 0


def test_weights_loaded_after_the_state_was_made_are_learned_at_the_next_update():
    model, other = Stack(1), Stack(1)
    run = compiled(model, **{"guard.interval": 1})
    x = batch(300, seed=1)
    for _ in range(9):
        run(x).square().mean().backward()
        model.zero_grad()
    model.load_state_dict(other.state_dict())
    states = {n: id(s) for n, s in sites(model).items()}
    run(x).square().mean().backward()
    run(x)
    at_once = {n: m["rel_error"] for n, m in spt_compiler.metrics(model).items()}
    for _ in range(26):  # past the updates of steps 16 and 32
        run(x).square().mean().backward()
        model.zero_grad()
    run(x)
    later = {n: m["rel_error"] for n, m in spt_compiler.metrics(model).items()}
    assert {n: id(s) for n, s in sites(model).items()} == states
    ffn = next(n for n in later if "/ffn/" in n)
    assert later[ffn] < 0.9 * at_once[ffn]


def test_a_shared_ffn_has_one_state_and_learns_from_every_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = nn.Sequential(nn.Linear(48, 112), nn.ReLU(), nn.Linear(112, 48))

        def forward(self, x):
            return self.ffn(x + self.ffn(x))

    model = Twice()
    run = compiled(model, **{"guard.interval": 1})
    x = torch.randn(300, 48)
    train_steps(model, run, [x] * 4)
    (state,) = sites(model).values()
    sample = state.tensors["sample"]
    inner = (sample[:600, None, :] == x[None, :50]).all(-1).any()
    assert inner and state.initialised and 0 < state.metrics["rel_error"] < 1
    n_rows = int(state.tensors["cursor"])
    assert n_rows == 4 * 600  # both uses, in every step until the ring is full


def test_tied_in_and_out_weights_train():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(112, 48) / 7)

        def forward(self, x):
            return torch.relu(x @ self.weight.t()) @ self.weight

    model, x = Tied(), torch.randn(300, 48)
    run = compiled(model, require_matches=1)
    assert train_steps(model, run, [x] * 4)[-1] > 0
    assert of(model, "ffn").initialised and model.weight.grad.isfinite().all()


def test_a_change_of_domain_is_followed():
    """Routers fitted to one part of the input space are refitted when the data moves to another."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32))
    run = compiled(block, **{"guard.interval": 1})
    basis = torch.linalg.qr(torch.randn(32, 32))[0]

    def domain(which: int, seed: int):
        part = basis[which * 16 : which * 16 + 16]
        return torch.randn(512, 16, generator=torch.Generator().manual_seed(seed)) @ part * 3

    errors = []
    for step in range(130):
        x = domain(int(step >= 20), step)
        run(x).square().mean().backward()
        block.zero_grad()
        errors.append(of(block, "ffn").metrics.get("rel_error"))
    settled, shock, after = errors[19], max(errors[20:24]), errors[-1]
    assert shock > 1.3 * settled and after < 0.5 * (settled + shock)


# ---- the first step, precision, accumulation, resume -----------------------------------------------------------------


def test_the_first_step_is_dense_and_the_second_sparse():
    model, x = Stack(1), batch()
    run = compiled(model)
    out = run(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert (run(x) - model(x)).norm() > 1e-3 * model(x).norm()


def test_mixed_precision_learns_in_fp32():
    model = Stack(1)
    run = compiled(model)
    for i in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(batch(seed=i))
        out.float().square().mean().backward()
    run(batch())
    assert finite(model) and all(s.initialised for s in sites(model).values())
    assert {t.dtype for s in sites(model).values() for n, t in s.tensors.items() if n in ("codebook", "router_weight")} == {
        torch.float32
    }
    half = Stack(1).bfloat16()
    run = compiled(half)
    for i in range(4):
        run(batch(seed=i).bfloat16()).float().square().mean().backward()
    assert finite(half) and of(half, "ffn").initialised


def test_checkpointing_learns_what_plain_training_learns():
    data = [batch(seed=i) for i in range(4)]
    plain, checkpointed = Stack(1), Stack(1, checkpointed=True)
    checkpointed.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, checkpointed):
        torch._dynamo.reset()
        train_steps(model, compiled(model), data, lr=0.0)
        results.append(spt_compiler.state_dict(model))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


RESUME = """
import sys, torch
import spt_compiler
from tests.blocks import SPARSE, Stack, train_steps

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(first)
model = Stack(2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
if first:
    saved = torch.load(f"{folder}/{first}.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    spt_compiler.load_state(model, f"{folder}/{first}.safetensors")
run = torch.compile(model, backend="spt", options={**SPARSE, "guard.interval": 3, "attention.schedule": [1.0, 6]})
losses = []
for step in range(first, last):
    loss = run(torch.randn(2, 100, 48, generator=torch.Generator().manual_seed(step))).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, f"{folder}/{last}.pt")
spt_compiler.save_state(model, f"{folder}/{last}.safetensors")
"""


def test_resuming_in_a_new_process_is_bit_exact(tmp_path):
    root = Path(spt_compiler.__file__).parent.parent

    def run(folder: Path, first: int, last: int):
        folder.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-c", RESUME, str(folder), str(first), str(last)], check=True, cwd=root)
        return torch.load(folder / f"{last}.pt"), spt_compiler.state.load(folder / f"{last}.safetensors")

    whole, whole_state = run(tmp_path / "whole", 0, 11)
    first, _ = run(tmp_path / "parts", 0, 5)
    second, state = run(tmp_path / "parts", 5, 11)
    assert first["losses"] + second["losses"] == whole["losses"]
    assert all(torch.equal(v, whole["model"][k]) for k, v in second["model"].items())
    assert state.keys() == whole_state.keys() and all(torch.equal(v, whole_state[k]) for k, v in state.items())


def test_metrics_name_what_was_measured_and_logs_carry_it(caplog):
    model = Stack(1)
    run = compiled(model, **{"guard.interval": 2})
    with caplog.at_level("INFO", logger="spt_compiler"):
        for _ in range(5):
            run(batch(300)).square().mean().backward()
    figures = spt_compiler.metrics(model)
    assert {"mass", "rel_error"} <= figures["blocks.0.qkv/attention/0"].keys()
    assert {"rel_error", "scaled_error", "load_max", "dropped_share"} <= figures["blocks.0.fc1/ffn/0"].keys()
    lines = [r.getMessage() for r in caplog.records if "rel_error" in r.getMessage()]
    assert any("blocks.0/attention" in line and "mass" in line for line in lines)
    assert any("blocks.0/ffn" in line and "load_max" in line for line in lines)


def test_upkeep_is_skipped_when_nothing_was_asked_for(monkeypatch):
    """Most steps neither sample nor look at the device."""
    model = Stack(1)
    run = compiled(model, **{"guard.interval": 64})
    train_steps(model, run, [batch(2000, seed=i) for i in range(9)])  # the ring is full by then
    run(batch(2000))
    calls = []
    monkeypatch.setattr(learning, "new_rows", lambda state: calls.append(state))
    train_steps(model, run, [batch(2000, seed=i) for i in range(5)])
    assert not calls and all(s.counter("steps") == 13 for s in sites(model).values())


def test_gated_ffns_learn_to_route():
    class SwiGLU(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(32, 192, bias=False), nn.Linear(32, 192, bias=False)
            self.down = nn.Linear(192, 32, bias=False)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    errors = {}
    for router in ("learned", "static", "random"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = SwiGLU()
        run = compiled(model, **{"guard.interval": 1, "ffn.router": router})
        for i in range(6):
            run(torch.randn(600, 32, generator=torch.Generator().manual_seed(i)) * 3).square().mean().backward()
            model.zero_grad()
        errors[router] = of(model, "ffn").metrics["rel_error"]
    assert errors["learned"] < errors["static"] and errors["learned"] < errors["random"]



def test_the_paper_preset_starts_near_the_pretrained_output():
    """Its gate, 2 * probability, is one on average when training starts; its blocks are contiguous; nothing is compensated."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 24))
    x = torch.randn(600, 24)
    errors = {}
    for gate in ("spt", "hard"):
        torch._dynamo.reset()
        twin = copy.deepcopy(block)
        run = compiled(twin, preset="paper", **{"ffn.gate": gate})
        for _ in range(5):
            run(x).square().mean().backward()
            twin.zero_grad()
        errors[gate] = float((run(x) - block(x)).detach().norm() / block(x).norm())
        state = of(twin, "ffn")
        assert torch.equal(state.tensors["permutation"], torch.arange(96, dtype=torch.int32))
        assert state.tensors["always_on"].numel() == 4
        if gate == "spt":
            scores = (x @ state.tensors["router_weight"].t() + state.tensors["router_bias"]).detach()
            kept = scores.topk(2, dim=1).values
            assert (2 * torch.sigmoid(kept)).mean() == pytest.approx(1.0, abs=0.02)
    assert errors["spt"] < 1.1 * errors["hard"]


def test_a_codebook_that_the_user_trains_is_left_alone():
    model, x = Stack(1), batch()
    run = compiled(model, preset="paper")
    spt_compiler.prepare(run, x)
    taken = spt_compiler.parameters(model)
    assert len(taken) == 3  # codewords, and the router's weight and bias
    before = [p.detach().clone() for p in taken]
    for _ in range(4):
        run(x).square().mean().backward()
    run(x)
    assert all(torch.equal(p, b) for p, b in zip(taken, before, strict=True))
    assert all(p.grad is not None for p in taken[1:])
