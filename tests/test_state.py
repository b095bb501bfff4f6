"""Learned state: identity, sharing, lifetime, save and load (CONTRACTS: identity, state)."""

from __future__ import annotations

import copy
import gc
import os
import weakref

import pytest
import torch
from torch import nn

import spt_compiler
from spt_compiler import StateError
from spt_compiler.state import STORE, StateSpec, StateStore, TensorSpec, _owner, common_tensors
from tests.blocks import SPARSE, Block, Stack, train_steps


def compiled(module: nn.Module, **options):
    return torch.compile(module, backend="spt", options={**SPARSE, **options})


def batch(length: int = 100, seed: int = 0, size: int = 2) -> torch.Tensor:
    return torch.randn(size, length, 48, generator=torch.Generator().manual_seed(seed))


def states(module: nn.Module):
    return dict(STORE.named_states(module))


def test_state_is_named_by_the_module_of_its_anchor():
    model = Stack(2)
    compiled(model)(batch())
    assert sorted(states(model)) == [
        "blocks.0.fc1/ffn/0",
        "blocks.0.qkv/attention/0",
        "blocks.1.fc1/ffn/0",
        "blocks.1.qkv/attention/0",
    ]


@pytest.mark.parametrize(
    "name",
    ["_orig_mod.a.b.weight", "module._orig_mod.a.b.weight", "a.b.weight", "base_model.model.a.b.base_layer.weight"],
)
def test_names_survive_wrappers(name):
    assert _owner(name) == "a.b"


def test_a_module_called_module_keeps_its_name():
    assert _owner("encoder.module.b.weight") == "encoder.module.b"


def test_every_graph_of_a_model_shares_its_state():
    model = Stack(1)
    run = compiled(model)
    run(batch()).sum().backward()
    before = {name: id(state) for name, state in states(model).items()}
    run(batch(77)).sum().backward()
    with torch.no_grad():
        run(batch(100))
    model.eval()
    run(batch(50, size=3))
    assert {name: id(state) for name, state in states(model).items()} == before


def test_models_and_layers_of_one_class_have_states_of_their_own():
    first, second = Stack(2), Stack(2)
    for model in (first, second):
        train_steps(model, compiled(model), [batch(seed=i) for i in range(2)])
    books = [s.tensors["codebook"] for m in (first, second) for s in states(m).values() if s.kind == "attention"]
    assert len({b.data_ptr() for b in books}) == 4
    assert not any(torch.equal(books[0], other) for other in books[1:])


def test_one_graph_per_block_serves_layers_with_states_of_their_own():
    model = Stack(3)
    spt_compiler.compile(model, **{k.replace(".", "__"): v for k, v in SPARSE.items()})
    train_steps(model, model, [batch(seed=i) for i in range(2)])
    assert len(states(model)) == 6
    books = [s.tensors["codebook"] for s in states(model).values() if s.kind == "attention"]
    assert not torch.equal(books[0], books[1]) and not torch.equal(books[1], books[2])


def test_state_is_freed_with_the_model():
    model = Stack(1)
    run = compiled(model)
    run(batch()).sum().backward()
    kept = [weakref.ref(s) for s in states(model).values()]
    assert all(r() is not None for r in kept)
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert all(r() is None for r in kept)


def test_a_shared_weight_shares_its_state():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(x))

    model = Twice()
    compiled(model)(batch())
    assert len(states(model)) == 2


class Experts(nn.Module):
    """Two experts, each a matrix of one stack or modules of its own, weighted by a dense gate and called in some order."""

    def __init__(self, stacked: bool):
        super().__init__()
        self.gate, self.stacked = nn.Linear(48, 2), stacked
        if stacked:
            self.up, self.down = nn.Parameter(torch.randn(2, 112, 48) / 7), nn.Parameter(torch.randn(2, 48, 112) / 10)
        else:
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(48, 112), nn.GELU(), nn.Linear(112, 48)) for _ in range(2))

    def forward(self, x, order=(0, 1)):
        gate, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        for i in order:
            if self.stacked:
                y = nn.functional.gelu(nn.functional.linear(x, self.up[i]))
                out = out + gate[..., i : i + 1] * nn.functional.linear(y, self.down[i])
            else:
                out = out + gate[..., i : i + 1] * self.experts[i](x)
        return out


@pytest.mark.parametrize("stacked, names", [(True, ["/ffn/0", "/ffn/1"]), (False, ["experts.0.0/ffn/0", "experts.1.0/ffn/0"])])
def test_experts_called_one_by_one_have_states_of_their_own(stacked, names):
    model = Experts(stacked)
    run = torch.compile(model, backend="spt", options=SPARSE, dynamic=False)  # a symbolic index names no expert
    train_steps(model, run, [batch(seed=i) for i in range(3)])
    found = states(model)
    assert list(found) == list(spt_compiler.metrics(model)) == names
    first, second = (found[n].tensors for n in names)
    assert not {t.data_ptr() for t in first.values()} & {t.data_ptr() for t in second.values()}
    assert not torch.equal(first["correction_out"], second["correction_out"])

    # A step of the second alone moves its own state and nobody else's, and the order of the calls does not matter.
    def steps():
        return [found[n].counter("steps") for n in names]

    before, at = {k: t.clone() for k, t in first.items()}, steps()
    for i in range(3):
        run(batch(seed=3 + i), (1,)).square().mean().backward()
    assert all(torch.equal(t, before[k]) for k, t in first.items())
    assert steps()[0] == at[0] and steps()[1] > at[1]
    run(batch(), (1, 0)).square().mean().backward()
    assert {n: id(s) for n, s in states(model).items()} == {n: id(s) for n, s in found.items()}


def test_one_expert_called_twice_has_one_state():
    model = Experts(stacked=True)
    compiled(model)(batch(), (1, 1))
    assert list(states(model)) == ["/ffn/0"]


def test_reset_keeps_what_was_learned():
    model = Stack(1)
    train_steps(model, compiled(model), [batch(seed=i) for i in range(3)])
    before = spt_compiler.state_dict(model)
    torch._dynamo.reset()
    assert spt_compiler.state_dict(model).keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in spt_compiler.state_dict(model).items())


def test_state_tensors_keep_their_storage_while_they_learn():
    model = Stack(1)
    run = compiled(model)
    run(batch()).sum().backward()
    pointers = {n: {k: t.data_ptr() for k, t in s.tensors.items()} for n, s in states(model).items()}
    before = spt_compiler.state_dict(model)
    train_steps(model, run, [batch(seed=i) for i in range(4)])
    after = spt_compiler.state_dict(model)
    assert {n: {k: t.data_ptr() for k, t in s.tensors.items()} for n, s in states(model).items()} == pointers
    assert not torch.equal(before["blocks.0.qkv/attention/0.codebook"], after["blocks.0.qkv/attention/0.codebook"])
    assert not torch.equal(before["blocks.0.fc1/ffn/0.correction_out"], after["blocks.0.fc1/ffn/0.correction_out"])


def test_resume_is_bit_exact(tmp_path):
    torch.manual_seed(1)
    model = Stack(2)
    start = copy.deepcopy(model.state_dict())
    data = [batch(seed=i) for i in range(7)]
    whole = train_steps(model, compiled(model), data)
    torch._dynamo.reset()
    first = Stack(2)
    first.load_state_dict(start)
    assert train_steps(first, compiled(first), data[:4]) == whole[:4]
    spt_compiler.save_state(first, tmp_path / "spt_state.safetensors")
    saved = copy.deepcopy(first.state_dict())
    torch._dynamo.reset()
    second = Stack(2)
    second.load_state_dict(saved)
    spt_compiler.load_state(second, tmp_path / "spt_state.safetensors")
    run = compiled(second)
    # The interrupted run had seen the backward of its last step; maintenance is due at the first call of the next one.
    for state in states(second).values():
        assert state.initialised
    assert train_steps(second, run, data[4:]) == whole[4:]


def learned():
    """The state of a model that was trained, and a new one without any."""
    model = Stack(1)
    train_steps(model, compiled(model), [batch(seed=i) for i in range(3)])
    saved = spt_compiler.state_dict(model)
    torch._dynamo.reset()
    return saved, Stack(1)


def test_loading_before_first_use_waits_for_the_sites():
    saved, fresh = learned()
    assert spt_compiler.load_state_dict(fresh, saved) == []
    assert spt_compiler.state_dict(fresh).keys() == saved.keys()  # a save before the first use loses nothing
    with torch.no_grad():
        compiled(fresh)(batch())
    got = spt_compiler.state_dict(fresh)
    assert torch.equal(got["blocks.0.qkv/attention/0.codebook"], saved["blocks.0.qkv/attention/0.codebook"])
    assert torch.equal(got["blocks.0.fc1/ffn/0.permutation"], saved["blocks.0.fc1/ffn/0.permutation"])


def test_weights_that_are_assigned_take_the_state_once_it_is_loaded_again():
    model = Stack(1)
    run = compiled(model)
    train_steps(model, run, [batch(seed=i) for i in range(3)])
    saved = spt_compiler.state_dict(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert spt_compiler.state_dict(model) == {}
    spt_compiler.load_state_dict(model, saved)
    with torch.no_grad():
        run(batch())
    got = spt_compiler.state_dict(model)
    assert all(torch.equal(got[name], saved[name]) for name in saved if name.endswith((".codebook", ".router_weight")))


def test_left_overs_are_named():
    model = Stack(1)
    compiled(model)(batch())
    saved = {k.replace("blocks.0", "tower.0"): v for k, v in spt_compiler.state_dict(model).items()}
    with pytest.warns(UserWarning, match="tower.0.fc1"):
        left = spt_compiler.load_state_dict(Stack(1), saved)
    assert sorted(left) == ["tower.0.fc1/ffn/0", "tower.0.qkv/attention/0"]


def test_another_shape_changes_nothing():
    model = Stack(1)
    train_steps(model, compiled(model), [batch(seed=i) for i in range(3)])
    before = spt_compiler.state_dict(model)
    bad = dict(before)
    bad["blocks.0.fc1/ffn/0.router_weight"] = torch.zeros(3, 48)
    bad["blocks.0.qkv/attention/0.key_mean"] = torch.full_like(before["blocks.0.qkv/attention/0.key_mean"], 7.0)
    with pytest.raises(StateError, match=r"router_weight.*\(3, 48\).*expected \(8, 48\)"):
        spt_compiler.load_state_dict(model, bad)
    del bad["blocks.0.fc1/ffn/0.router_weight"]
    with pytest.raises(StateError, match=r"lacks.*router_weight"):
        spt_compiler.load_state_dict(model, bad)
    after = spt_compiler.state_dict(model)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_state_that_does_not_fit_the_options_waits_for_those_that_it_fits():
    saved, fresh = learned()
    spt_compiler.load_state_dict(fresh, saved)
    run = torch.compile(fresh, backend="spt", options={**SPARSE, "ffn.blocks": 4})
    for _ in range(2):
        with pytest.raises(StateError, match="other options"):
            run(batch())
    with torch.no_grad():
        compiled(fresh)(batch())
    got = spt_compiler.state_dict(fresh)
    assert torch.equal(got["blocks.0.fc1/ffn/0.router_weight"], saved["blocks.0.fc1/ffn/0.router_weight"])


@pytest.mark.parametrize("key", ["nonsense", "a.b.weight", "a/ffn.x", "a/ffn/x.y", "a/router/0.x"])
def test_malformed_keys_are_refused(key):
    with pytest.raises(StateError, match="spt_compiler state"):
        spt_compiler.load_state_dict(Stack(1), {key: torch.zeros(1)})


def test_corrupt_foreign_and_missing_files(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "corrupt").write_bytes(b"\x00" * 40)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    for name, text in (
        ("corrupt", "not a readable safetensors"),
        ("foreign", "not an spt_compiler state"),
        ("none", "no state file"),
    ):
        with pytest.raises(StateError, match=text):
            spt_compiler.load_state(Stack(1), tmp_path / name)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = Stack(1)
    compiled(model)(batch())
    path = tmp_path / "spt_state.safetensors"
    spt_compiler.save_state(model, path)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    train_steps(model, compiled(model), [batch(seed=i) for i in range(2)])
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spt_compiler.save_state(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["spt_state.safetensors"]


def test_an_unwritable_folder_is_named(tmp_path):
    with pytest.raises(StateError, match="cannot write .*missing"):
        spt_compiler.save_state(Stack(1), tmp_path / "missing" / "state")
    with pytest.raises(StateError, match="is a folder; name a file in it"):
        spt_compiler.save_state(Stack(1), tmp_path)
    assert not list(tmp_path.iterdir())


def _spec(width: int = 3) -> StateSpec:
    return StateSpec(
        "ffn",
        (width,),
        tuple({"permutation": TensorSpec((width,), torch.int32, fill="arange"), **common_tensors(-1.0)}.items()),
    )


def test_store_creates_once_and_by_key():
    store, anchor = StateStore(), nn.Parameter(torch.zeros(2))
    first = store.get(anchor, _spec())
    assert store.get(anchor, _spec()) is first
    assert store.get(anchor, _spec(4)) is not first
    assert store.find(nn.Parameter(torch.zeros(2)), _spec()) is None
    assert first.tensors["permutation"].tolist() == [0, 1, 2]


def test_state_made_under_inference_mode_can_be_changed_outside():
    store = StateStore()
    with torch.inference_mode():
        state = store.get(nn.Parameter(torch.zeros(2)), _spec())
    state.set_budget(1.0)
    state.set_probe(measure=True)
    assert state.tensors["budget"].item() == 1.0 and state.tensors["probe"].tolist() == [1, 1, 1, 0]


def test_state_follows_its_anchor_to_another_device():
    state = StateStore().get(nn.Parameter(torch.zeros(2)), _spec())
    with torch.inference_mode():  # a model that was moved may be called for its predictions first
        state.to(torch.device("meta"))
    assert {t.device.type for t in state.graph_inputs()} == {"meta"}
    assert not any(t.is_inference() for t in state.graph_inputs())
    assert state.tensors["counters"].device.type == "cpu"
