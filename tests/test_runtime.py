"""Time: when sites learn, when they must not, and what the run-time wrapper owes torch (CONTRACTS: state, learning, time)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import spt_compiler
from spt_compiler import calibrate, learning
from spt_compiler.runtime import CompiledGraph
from spt_compiler.state import STORE, SiteState
from tests.blocks import SPARSE, Stack, gradients, relative, train_steps


def compiled(module, **options):
    return torch.compile(module, backend="spt", options={**SPARSE, **options})


def batch(length: int = 100, size: int = 2) -> torch.Tensor:
    return torch.randn(size, length, 48)


def states(model):
    return [s for _, s in STORE.named_states(model)]


def steps(model) -> list[int]:
    return [s.counter("steps") for s in states(model)]


def learned(model) -> dict[str, torch.Tensor]:
    return {
        k: v
        for k, v in spt_compiler.state_dict(model).items()
        if k.endswith((".codebook", ".router_weight", ".permutation"))
    }


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "n, due",
    [(0, False), (1, True), (2, True), (3, False), (16, True), (24, False), (32, True), (48, False), (64, True)],
)
def test_learning_is_dense_at_first_and_rare_later(n, due):
    assert learning.is_due(n) is due


def test_a_step_is_a_backward():
    model = Stack(1)
    run = compiled(model)
    for expected in (0, 1, 2):
        loss = run(batch()).sum()
        assert steps(model) == [expected, expected]
        loss.backward()
    run(batch())
    assert steps(model) == [3, 3]


def test_gradient_accumulation_counts_every_backward():
    model = Stack(1)
    run = compiled(model)
    for _ in range(4):
        run(batch()).sum().backward()
    run(batch())
    assert steps(model) == [4, 4]


def test_nothing_changes_between_a_forward_and_its_backward():
    model = Stack(1)
    run = compiled(model)
    run(batch()).sum().backward()
    first = run(batch())  # upkeep of step 1 happens here
    before = learned(model)
    second = run(batch())  # two forwards are open now
    first.sum().backward()
    third = run(batch())  # a backward has run, but `second` still waits for its own
    assert same(learned(model), before)
    (second.sum() + third.sum()).backward()
    run(batch())
    assert not same(learned(model), before)


def test_turns_that_only_count_change_nothing_else(monkeypatch):
    def trained():
        torch.manual_seed(1)
        model = Stack(1)
        run = compiled(model, **{"guard.interval": 24})
        for _ in range(70):
            run(batch()).square().mean().backward()
        return spt_compiler.state_dict(model)

    skipped, count = [], SiteState.count_step
    monkeypatch.setattr(SiteState, "count_step", lambda state: skipped.append(state) or count(state))
    short = trained()
    assert len(skipped) > 40
    monkeypatch.setattr(calibrate, "_idle_turns", lambda *args: 0)
    torch._dynamo.reset()
    assert same(short, trained())


def test_a_dropped_forward_does_not_block_learning():
    model = Stack(1)
    run = compiled(model)
    run(batch()).sum().backward()
    out = run(batch())
    before = learned(model)
    del out  # no backward ever
    run(batch()).sum().backward()
    run(batch())
    assert not same(learned(model), before)


def test_outer_checkpointing_replays_the_same_selection():
    model, x = Stack(1), batch()
    run = compiled(model)
    for _ in range(5):  # behind it no learning is due for two steps
        run(x).square().mean().backward()
    expected = gradients(model, run, x)
    got = gradients(model, lambda v: checkpoint(run, v, use_reentrant=False), x)
    assert torch.equal(got[0], expected[0])
    assert all(relative(got[1][n], g) < 1e-5 for n, g in expected[1].items())


def test_reentrant_checkpointing_learns_too():
    model = Stack(1)
    run = compiled(model)
    for _ in range(3):
        checkpoint(run, batch().requires_grad_(), use_reentrant=True).sum().backward()
    assert all(s.initialised for s in states(model))


def test_no_grad_only_initialises():
    model = Stack(1)
    run = compiled(model)
    with torch.no_grad():
        run(batch())
        assert not any(s.initialised for s in states(model))
        run(batch())
        assert all(s.initialised for s in states(model))
        before = learned(model)
        for _ in range(40):
            run(batch())
    assert same(learned(model), before)
    assert steps(model) == [0, 0]


def test_evaluation_between_steps_does_not_feed_learning():
    model, data = Stack(1), [batch() for _ in range(6)]
    start = {k: v.clone() for k, v in model.state_dict().items()}
    train_steps(model, compiled(model), data)
    expected = learned(model)
    torch._dynamo.reset()
    other = Stack(1)
    other.load_state_dict(start)
    run = compiled(other)
    for x in data:
        train_steps(other, run, [x])
        with torch.no_grad():
            run(batch() * 5)
    assert same(learned(other), expected)


def test_an_optimizer_step_moves_what_is_learned():
    model, x = Stack(1), batch()
    run = compiled(model)
    train_steps(model, run, [x, x])
    before = learned(model)
    train_steps(model, run, [x] * 3, lr=0.5)
    run(x)
    assert not same(learned(model), before)


def test_prepare_initialises_before_training():
    model = Stack(1)
    run = compiled(model)
    with pytest.raises(spt_compiler.SPTError, match="prepare"):
        spt_compiler.parameters(model)
    spt_compiler.prepare(run, batch())
    assert all(s.initialised for s in states(model))
    assert relative(run(batch()), model(batch())) > 1e-3


def test_states_are_found_by_the_tensors_of_the_call_while_these_live():
    """A graph that runs with fresh tensors at each call, which may get the addresses of dead ones, never takes old states."""
    calls, model, x = [], Stack(1), batch()

    class Spy(CompiledGraph):
        def _find(self, arguments):
            bound = super()._find(arguments)
            calls.append((bound, self.anchors_of(arguments)))
            return bound

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spt_compiler.backend.CompiledGraph", Spy)
        run = torch.compile(lambda p, x: functional_call(model, p, (x,)), backend="spt", options=SPARSE)
        for _ in range(4):
            fresh = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
            run(fresh, x).sum().backward()
            bound, anchors = calls.pop()
            assert [a() for a in bound.anchors] == anchors and len(anchors) == 2
            assert all(any(a is p for p in fresh.values()) for a in anchors)
            del fresh, anchors
    torch._dynamo.reset()
    gc.collect()
    assert bound.ids is None


def test_prepare_without_sites_says_so():
    with pytest.raises(spt_compiler.SPTError, match="no replaced site"):
        spt_compiler.prepare(torch.nn.Linear(4, 4), torch.zeros(2, 4))


def test_hard_routers_have_no_parameters_and_gated_ones_do():
    model, x = Stack(1), batch()
    run = compiled(model)
    spt_compiler.prepare(run, x)
    with pytest.raises(spt_compiler.SPTError, match="ffn.gate"):
        spt_compiler.parameters(model)
    torch._dynamo.reset()
    model = Stack(1)
    run = compiled(model, **{"ffn.gate": "straight-through"})
    spt_compiler.prepare(run, x)
    weight, bias = spt_compiler.parameters(model)
    run(x).square().mean().backward()
    assert weight.grad.abs().sum() > 0 and bias.grad.abs().sum() > 0
    before = weight.detach().clone()
    torch.optim.SGD([weight, bias], lr=1.0).step()
    moved = weight.detach().clone()
    assert not torch.equal(moved, before)
    run(x).square().mean().backward()
    run(x)  # upkeep leaves parameters that the user took alone
    assert torch.equal(weight.detach(), moved)


def test_the_paper_preset_offers_its_auxiliary_loss():
    model, x = Stack(1), batch()
    run = compiled(model, preset="paper")
    with pytest.raises(spt_compiler.SPTError, match="auxiliary"):
        spt_compiler.auxiliary_loss(model)
    out = run(x)
    assert out.shape == x.shape
    loss = spt_compiler.auxiliary_loss(model)
    assert loss.item() > 0
    (out.square().mean() + 1e-2 * loss).backward()
    book = next(s for s in states(model) if s.kind == "attention").tensors["codebook"]
    assert book.grad.abs().sum() > 0


def test_dense_steps_and_dense_layers_are_data():
    model, x = Stack(3), batch()
    run = compiled(model, dense_steps=3, dense_layers=[1, 1])
    seen = []
    for _ in range(6):
        out = run(x)
        seen.append([round(f["density"], 3) for f in spt_compiler.metrics(model).values()])
        out.sum().backward()
        model.zero_grad()
    assert all(d == 1.0 for row in seen[:3] for d in row)
    by_name = dict(zip(spt_compiler.metrics(model), seen[-1], strict=True))
    assert by_name["blocks.0.qkv/attention/0"] == by_name["blocks.2.fc1/ffn/0"] == 1.0
    assert by_name["blocks.1.qkv/attention/0"] == 0.25 and by_name["blocks.1.fc1/ffn/0"] == 0.5


def test_what_ran_dense_is_not_taken_for_the_error_of_the_sparse_site():
    model, x = Stack(1), batch(300)
    run = compiled(model, dense_steps=3)
    for _ in range(7):
        run(x).square().mean().backward()
        error = spt_compiler.metrics(model)["blocks.0.qkv/attention/0"].get("rel_error")
        assert error is None or error > 0.01
    assert error is not None


def test_a_site_made_exact_learns_nothing_and_disturbs_nobody():
    model, x = Stack(2), batch()
    run = compiled(model, sites={"blocks.0*": {"exact": True}})
    for _ in range(3):
        run(x).square().mean().backward()
    rows = spt_compiler.metrics(model)
    assert all(row["density"] == 1 and not row["updates"] for name, row in rows.items() if name.startswith("blocks.0"))
    assert all(row["updates"] for name, row in rows.items() if name.startswith("blocks.1"))
    assert relative(run(x), model(x)) > 1e-3


def test_metrics_measure_every_site():
    model, x = Stack(2), batch(300)
    run = compiled(model, **{"guard.interval": 1})
    for _ in range(5):
        run(x).square().mean().backward()
    figures = spt_compiler.metrics(model)
    for name, row in figures.items():
        assert 0 < row["rel_error"] < 1, name
        if "/attention/" in name:
            assert 0.25 < row["mass"] < 1
        else:
            assert row["load_max"] >= 1 and 0 < row["dropped_share"] < 1


def test_the_guard_densifies_what_misses_its_limit_and_only_that():
    model, x = Stack(2), batch(300)
    limits = {"sites": {"blocks.0*": {"attention.max_rel_error": 1e-6, "ffn.max_rel_error": 1e-6}}, "guard.interval": 1}
    run = compiled(model, **limits)
    with pytest.warns(UserWarning, match="blocks.0.*max_rel_error"):
        for _ in range(8):
            run(x).square().mean().backward()
    figures = spt_compiler.metrics(model)
    assert figures["blocks.0.qkv/attention/0"]["density"] == 1.0 and figures["blocks.0.fc1/ffn/0"]["density"] == 1.0
    assert figures["blocks.1.qkv/attention/0"]["density"] == 0.25 and figures["blocks.1.fc1/ffn/0"]["density"] == 0.5


def test_maintenance_that_fails_is_reported_once_and_training_goes_on(monkeypatch):
    def explode(*_, **__):
        raise RuntimeError("injected")

    monkeypatch.setattr(learning, "learn", explode)
    model = Stack(1)
    run = compiled(model, strict=False)
    with pytest.warns(UserWarning, match="maintenance of .* failed .*injected") as caught:
        losses = train_steps(model, run, [batch() for _ in range(4)])
    assert len([w for w in caught if "maintenance" in str(w.message)]) == 2  # one for each site
    assert all(torch.isfinite(torch.tensor(losses)))


def test_states_go_with_their_model_while_its_graph_stays():
    """What is compiled outlives a model in Dynamo's caches; rings of samples and codebooks must not."""
    model = Stack(1)
    model.compile(backend="spt", options=SPARSE)
    for _ in range(2):
        model(batch()).sum().backward()
    held = [weakref.ref(s.tensors["sample"]) for s in states(model)]
    assert len(held) == 2
    del model
    gc.collect()
    assert [tensor() for tensor in held] == [None, None]


def test_tune_returns_options_that_are_accepted(tmp_path):
    model, x = Stack(2), batch(300)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loose = spt_compiler.tune(
        model,
        x,
        max_rel_error=10.0,
        path=tmp_path / "tuned.json",
        options={"attention.min_keys": 0, "ffn.min_width": 0},
    )
    assert loose["sites"]["blocks.0/attention"] == {"attention.density": 1 / 16}
    assert loose["sites"]["blocks.1/ffn"] == {"ffn.density": 1 / 4}
    tight = spt_compiler.tune(model, x, max_rel_error=1e-6, options={"attention.min_keys": 0, "ffn.min_width": 0})
    assert {v for entry in tight["sites"].values() for v in entry.values()} == {1.0}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert spt_compiler.state_dict(model) == {}
    spt_compiler.SPTConfig.from_options(loose)
    assert (tmp_path / "tuned.json").exists()


@pytest.mark.parametrize("in_place", [True, False])
def test_finalize_makes_the_model_dense_and_measures_the_gap(in_place):
    plain, x = Stack(1), batch()
    model = plain if in_place else compiled(plain)
    if in_place:
        model.compile(backend="spt", options=SPARSE)
    for _ in range(3):
        model(x).sum().backward()
    report = spt_compiler.finalize(model, x)
    assert report["sites"] == 2 and report["gap"] > 1e-3
    for _ in range(3):
        out = model(x)
        assert torch.equal(out, Stack.forward(plain, x))
        out.sum().backward()
    assert spt_compiler.state_dict(model) == {}
