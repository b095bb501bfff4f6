"""What users call at the end and in between: `finalize` with its recoveries, `tune` and what it writes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import spt_compiler
from spt_compiler import api, debug, learning
from tests.blocks import SPARSE, Stack, train_steps


class WithLoss(nn.Module):
    """A stack whose output carries a loss, as Hugging Face's do."""

    def __init__(self):
        super().__init__()
        self.stack = Stack(2)

    def forward(self, x, y):
        out = self.stack(x)
        return {"loss": (out - y).square().mean(), "out": out}


def batches(n: int, length: int = 100):
    made = []
    for i in range(n):
        x = torch.randn(2, length, 48, generator=torch.Generator().manual_seed(i))
        made.append({"x": x, "y": x.roll(1, dims=1)})
    return made


def trained(steps: int = 6, **options) -> WithLoss:
    torch.manual_seed(0)
    model = WithLoss()
    model.compile(backend="spt", options={**SPARSE, "attention.density": 0.1, "ffn.density": 0.25, **options})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches(steps):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return model


def test_finalize_reports_losses_of_both_modes():
    model = trained()
    report = spt_compiler.finalize(model, batches(1)[0])
    assert report["sites"] == 4 and report["gap"] > 1e-3
    with torch.no_grad():
        assert model(**batches(1)[0])["loss"].item() == pytest.approx(report["loss_dense"], rel=1e-6)
    assert report["loss_sparse"] != report["loss_dense"]


def test_finalize_can_stay_sparse():
    model = trained()
    with torch.no_grad():
        before = model(**batches(1)[0])["out"]
    report = spt_compiler.finalize(model, batches(1)[0], inference="sparse")
    with torch.no_grad():
        assert torch.equal(model(**batches(1)[0])["out"], before)
    assert report["gap"] > 1e-3 and len(spt_compiler.state_dict(model)) > 0


@pytest.mark.parametrize("inference", ["dense", "sparse"])
def test_distilled_recovery_closes_the_gap(inference):
    model, data = trained(), batches(4)
    report = spt_compiler.finalize(
        model, data[0], inference=inference, recover="distill", batches=data, steps=200, lr=1e-3
    )
    assert report["gap_recovered"] < 0.7 * report["gap"]
    out = model(**data[0])["out"]
    dense = WithLoss.forward(model, **data[0])["out"]
    assert torch.equal(out, dense) is (inference == "dense")


def test_dense_recovery_lowers_the_loss():
    model, data = trained(), batches(4)
    report = spt_compiler.finalize(model, data[0], recover="dense", batches=data, steps=40, lr=1e-3)
    assert report["loss_recovered"] < 0.98 * report["loss_dense"]
    assert spt_compiler.state_dict(model) == {} and model.training
    assert all(p.grad is None for p in model.parameters())


def test_recovery_takes_a_loss_of_the_users():
    torch.manual_seed(0)
    model = Stack(1)
    model.compile(backend="spt", options=SPARSE)
    data = [b["x"] for b in batches(3)]
    train_steps(model, model, data)
    with pytest.raises(spt_compiler.SPTError, match="needs a loss"):
        spt_compiler.finalize(copy.deepcopy(model), data[0], recover="dense", batches=data, steps=1)
    report = spt_compiler.finalize(
        model, data[0], recover="dense", batches=data, steps=20, lr=1e-3, loss=lambda out: out.square().mean()
    )
    assert report["loss_recovered"] < report["loss_dense"]


def test_recovery_moves_only_what_may_move():
    model, data = trained(), batches(2)
    model.stack.blocks[0].requires_grad_(False)
    frozen = copy.deepcopy(model.stack.blocks[0].state_dict())
    spt_compiler.finalize(model, data[0], recover="dense", batches=data, steps=3, lr=1e-2)
    assert all(torch.equal(v, frozen[k]) for k, v in model.stack.blocks[0].state_dict().items())
    model.requires_grad_(False)
    with pytest.raises(spt_compiler.SPTError, match="requires gradients"):
        spt_compiler.finalize(model, data[0], recover="dense", batches=data, steps=3)


def test_finalize_leaves_every_module_in_its_mode():
    model = trained()
    model.stack.blocks[0].eval()
    spt_compiler.finalize(model, batches(1)[0], recover="distill", batches=batches(1), steps=1)
    assert model.training and model.stack.blocks[1].training
    assert not any(m.training for m in model.stack.blocks[0].modules())


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"inference": "spare"}, "inference"),
        ({"recover": "yes"}, "recover"),
        ({"recover": "dense"}, "batches"),
        ({"recover": "dense", "batches": torch.utils.data.DataLoader([1])}, r"DataLoader; write list\(loader\)"),
        ({"recover": "dense", "batches": {"x": 1}}, r"\[batch\]"),
        ({"recover": "distill", "batches": [1], "steps": 0}, "steps"),
        ({"recover": "distill", "batches": [1], "lr": 0.0}, "lr"),
    ],
)
def test_finalize_refuses_what_it_does_not_know(bad, match):
    model = Stack(1)
    with pytest.raises(spt_compiler.OptionError, match=match):
        spt_compiler.finalize(model, **bad)


def test_what_tune_writes_is_what_runs(tmp_path):
    """Sites get their own densities: a file of `tune` is read back as options, whole and per block."""
    torch.manual_seed(0)
    model, x = Stack(2), torch.randn(2, 600, 48)
    with torch.no_grad():
        model.blocks[1].fc2.weight.mul_(0)  # an FFN that says nothing can be as sparse as one likes
        model.blocks[1].fc2.weight[0, 0] = 1.0
    options = {"attention.min_keys": 0, "ffn.min_width": 0}
    errors = {}
    spt_compiler.tune(model, x, max_rel_error=0.25, target="memory", path=tmp_path / "tuned.json", options=options)
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert tuned["sites"]["blocks.1/ffn"] == {"ffn.density": 0.25}
    assert len({str(v) for v in tuned["sites"].values()}) > 1
    for compile_it in ("whole", "per block"):
        torch._dynamo.reset()
        copied = copy.deepcopy(model)
        if compile_it == "whole":
            copied.compile(backend="spt", options={**tuned, "inner": "eager"})
        else:
            spt_compiler.compile(copied, **tuned, inner="eager")
        for _ in range(4):
            copied(x).square().mean().backward()
        densities = {n: m["density"] for n, m in spt_compiler.metrics(copied).items()}
        for name, density in densities.items():
            block, kind = name.split(".")[1], name.split("/")[1]
            assert density == pytest.approx(tuned["sites"][f"blocks.{block}/{kind}"][f"{kind}.density"]), compile_it
        errors[compile_it] = densities
    assert errors["whole"] == errors["per block"]


def test_tune_measures_on_rows_that_nothing_was_fitted_to(monkeypatch):
    fitted, judged = [], []
    learn, quality = learning.learn, learning.router_quality
    monkeypatch.setattr(learning, "learn", lambda state, rows, *a, **k: (fitted.append(rows), learn(state, rows, *a, **k))[1])
    monkeypatch.setattr(
        learning, "router_quality", lambda state, x, *a, **k: (judged.append(x), quality(state, x, *a, **k))[1]
    )
    block = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 24))
    x = torch.randn(4, 300, 24)
    options = {"ffn.min_width": 0}
    tuned = spt_compiler.tune(block, (x,), max_rel_error=1e-6, target="memory", options=options)
    assert tuned["sites"] == {"*/ffn": {"ffn.density": 1.0}} or list(tuned["sites"].values()) == [{"ffn.density": 1.0}]
    seen = {tuple(row.tolist()) for rows in fitted for row in rows}
    assert seen <= {tuple(row.tolist()) for row in x[:2].flatten(0, 1)}
    assert judged and not seen & {tuple(row.tolist()) for row in judged[-1]}
    # A batch of one row, or of tensors that do not go together, is not cut.
    for batch in (x[:1], (x, torch.randn(3, 2)), {"x": torch.randn(1, 4)}, ()):
        first, second = api._halves(batch)
        assert first is batch and second is batch
    first, second = api._halves({"a": x[:3], "b": torch.arange(3), "c": 5})
    assert torch.equal(first["a"], x[:1]) and torch.equal(second["b"], torch.tensor([1])) and second["c"] == 5


def test_tune_finds_every_site_however_much_was_compiled_before():
    """A model that has used up Dynamo's limit is compiled in pieces that know no more than their own part of a path."""
    model, x = Stack(2), torch.randn(2, 64, 48)
    options = {"attention.min_keys": 0, "ffn.min_width": 0}
    with torch._dynamo.config.patch(recompile_limit=2):
        model.compile(backend="spt", options={**options, "inner": "eager"})
        for length in (40, 41):
            model(x[:, :length])
        tuned = spt_compiler.tune(model, x, max_rel_error=10.0, options=options)
        assert tuned["sites"].keys() == {f"blocks.{i}/{kind}" for i in range(2) for kind in ("attention", "ffn")}
        assert {v for entry in tuned["sites"].values() for v in entry.values()} == {1 / 16, 1 / 4}
        graphs = len(debug.reports())
        model(x[:, :41])  # what was compiled before serves on
        assert len(debug.reports()) == graphs


@pytest.mark.parametrize(
    "later", [{"dense_steps": 100}, {"ffn.schedule": [1.0, 100]}, {"ffn.max_rel_error": 1e-9}], ids=lambda o: next(iter(o))
)
def test_tune_tries_the_densities_that_training_arrives_at(later):
    """Whatever keeps a site denser at first, or moves it, says nothing of what a density costs."""
    torch.manual_seed(0)
    model, x = Stack(1), torch.randn(2, 100, 48)
    options = {"attention.min_keys": 0, "ffn.min_width": 0}
    expected = spt_compiler.tune(model, x, max_rel_error=0.3, target="memory", options=options)["sites"]
    assert expected["blocks.0/ffn"] != {"ffn.density": 0.25}
    assert spt_compiler.tune(model, x, max_rel_error=0.3, target="memory", options=options | later)["sites"] == expected


def test_tune_tries_the_densities_of_sites_where_these_are_given():
    torch.manual_seed(0)
    options = {"attention.min_keys": 0, "ffn.min_width": 0, "sites": {"*": {"ffn.density": 0.75, "attention.density": 1.0}}}
    tuned = spt_compiler.tune(Stack(1), torch.randn(2, 100, 48), max_rel_error=10.0, target="memory", options=options)
    assert tuned["sites"]["blocks.0/ffn"] == {"ffn.density": 0.75}
    assert tuned["sites"]["blocks.0/attention"] == {"attention.density": 1.0}


def test_tune_refuses_bad_arguments():
    limits = ({"max_rel_error": limit} for limit in (0, "0.1", None))
    for bad in ({"target": "fun"}, *limits, {"options": {"ffn.densty": 1}}, {"options": {"preset": "exact"}}):
        with pytest.raises(spt_compiler.OptionError):
            spt_compiler.tune(Stack(1), torch.randn(1, 8, 48), **{"max_rel_error": 0.1, **bad})


# ---- compile ------------------------------------------------------------------------------------------------------


def densities(model) -> list[float]:
    for _ in range(3):
        model(torch.randn(2, 100, 48)).square().mean().backward()
    return [m["density"] for m in spt_compiler.metrics(model).values()]


def test_the_last_compilation_is_in_force():
    model = Stack(2)
    model.compile(backend="spt", options=SPARSE)
    assert densities(model) == [0.25, 0.5] * 2
    spt_compiler.compile(model, **SPARSE | {"attention.density": 0.5})
    assert densities(model) == [0.5, 0.5] * 2
    model.compile(backend="spt", options={**SPARSE, "ffn.density": 0.25})
    assert densities(model) == [0.25, 0.25] * 2


@pytest.mark.parametrize("kind", ["encoder", "one layer", "sequential"])
def test_modules_of_torch_itself_are_compiled(kind):
    layer = nn.TransformerEncoderLayer(48, 4, 112, dropout=0.0, batch_first=True)
    feed_forward = nn.Sequential(nn.Linear(48, 112), nn.GELU(), nn.Linear(112, 48))
    model = {"encoder": nn.TransformerEncoder(layer, 2), "one layer": layer, "sequential": feed_forward}[kind]
    plain = copy.deepcopy(model)
    assert spt_compiler.compile(model, **SPARSE) is model
    expected = {"encoder": [0.25, 0.5] * 2, "one layer": [0.25, 0.5], "sequential": [0.5]}[kind]
    assert densities(model) == expected
    x = torch.randn(2, 100, 48)
    with torch.no_grad():
        assert not torch.allclose(model(x), plain(x))
        spt_compiler.finalize(model)
        assert torch.equal(model(x), plain(x))


def test_compile_says_what_it_wants():
    with pytest.raises(spt_compiler.OptionError, match=r"compile\(model, \*\*\{'seed': 1\}\)"):
        spt_compiler.compile(Stack(1), options={"seed": 1})
    for bad, word in ((torch.relu, "a builtin"), (torch.compile(Stack(1)), "what torch.compile returned")):
        with pytest.raises(spt_compiler.SPTError, match=f"plain module, got {word}"):
            spt_compiler.compile(bad)


def test_what_was_written_for_sparse_training_runs_switched_off(monkeypatch):
    monkeypatch.setenv("SPT_DISABLE", "1")
    model = Stack(1)
    model.compile(backend="spt", options={**SPARSE, "preset": "paper", "require_matches": 2})
    assert spt_compiler.prepare(model, torch.randn(2, 100, 48)) is model
    assert spt_compiler.parameters(model) == []
    out = model(torch.randn(2, 100, 48))
    assert spt_compiler.auxiliary_loss(model).item() == 0
    (out.sum() + spt_compiler.auxiliary_loss(model)).backward()
    assert spt_compiler.metrics(model) == {}
