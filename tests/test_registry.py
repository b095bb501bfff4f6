"""Which lowering an op runs, and what happens when it cannot."""

from __future__ import annotations

import subprocess
import sys
import warnings

import attention_cases as cases
import pytest
import torch

from spt_compiler.errors import Reject, SPTError
from spt_compiler.lowering import cpp, registry
from spt_compiler.ops import reference

OP = "select_tiles_v1"


@pytest.fixture
def table(monkeypatch):
    """A registry without lowerings."""
    fresh = registry._Table(loaded={"cpu", "cuda"})
    monkeypatch.setattr(registry, "_table", fresh)
    return fresh


def arguments():
    return cases.make("causal", dtype=torch.float32, n_q=40, n_k=40).select_tiles_args()


def candidate(name, calls, result="ran", supports=None):
    def run(*args):
        calls.append(name)
        if isinstance(result, Exception):
            raise result
        return f"{name} {result}"

    registry.register(OP, "cpu", name, supports=supports)(run)


def test_without_a_lowering_the_reference_runs(table):
    args = arguments()
    expected = reference.select_tiles(*args)
    assert all(torch.equal(x, y) for x, y in zip(registry.dispatch(OP, "cpu", *args), expected, strict=True))
    assert registry.chosen(OP, "cpu") == "reference"


def test_a_device_borrows_the_lowerings_of_another(table):
    calls = []
    candidate("cpu", calls)
    registry.register(OP, "cuda", "triton")(lambda *args: "borrowed")
    registry.borrow("triton", "cuda", "cpu")
    assert registry.dispatch(OP, "cpu", *arguments()) == "borrowed" and not calls
    with pytest.raises(SPTError, match="no lowering 'cpu' on cuda"):
        registry.borrow("cpu", "cuda", "cpu")


def test_first_supported_wins(table):
    calls = []
    candidate("first", calls, supports=lambda *args: Reject("not for {} heads", args[0].shape[1]))
    candidate("second", calls, supports=lambda *args: True)
    candidate("third", calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # declining is normal
        assert registry.dispatch(OP, "cpu", *arguments()) == "second ran"
    assert calls == ["second"]
    assert registry.chosen(OP, "cpu") == "first" and registry.chosen(OP, "cuda") == "reference"


def test_failure_falls_back_and_warns_once(table):
    calls = []
    candidate("broken", calls, RuntimeError("no such instruction"))
    candidate("sound", calls)
    assert registry.chosen(OP, "cpu") == "broken"
    with pytest.warns(UserWarning) as caught:
        assert registry.dispatch(OP, "cpu", *arguments()) == "sound ran"
    assert len(caught) == 1
    for word in ("broken", OP, "cpu", "no such instruction", "sound"):
        assert word in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.dispatch(OP, "cpu", *arguments()) == "sound ran"
    assert calls == ["broken", "sound", "sound"]
    assert registry.chosen(OP, "cpu") == "sound"
    assert registry.failures() == {(OP, "cpu", "broken"): "RuntimeError: no such instruction"}


def test_failure_of_the_last_candidate_reaches_the_reference(table):
    candidate("broken", [], ZeroDivisionError("oops"))
    args = arguments()
    with pytest.warns(UserWarning, match="reference"):
        tiles, _ = registry.dispatch(OP, "cpu", *args)
    assert torch.equal(tiles, reference.select_tiles(*args)[0])


def test_a_caller_s_mistake_blames_nobody(table):
    calls = []
    candidate("lowering", calls, ValueError("rule"))
    args = list(arguments())
    args[-2] = "no such rule"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="no such rule"):
            registry.dispatch(OP, "cpu", *args)
    assert registry.chosen(OP, "cpu") == "lowering" and not registry.failures()


def test_a_full_memory_blames_nobody(table):
    """Whatever comes next may find enough; another time there is enough for this one."""
    calls = []
    candidate("greedy", calls, torch.OutOfMemoryError("CUDA out of memory"))
    candidate("modest", calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.dispatch(OP, "cpu", *arguments()) == "modest ran"
    assert registry.chosen(OP, "cpu") == "greedy" and not registry.failures()


def test_registering_again_replaces(table):
    calls = []
    candidate("a", calls)
    candidate("b", calls)
    candidate("a", calls, "ran anew")
    assert registry.dispatch(OP, "cpu") == "a ran anew"
    assert [c.name for c in table.candidates[OP, "cpu"]] == ["a", "b"]


def test_unknown_op(table):
    with pytest.raises(SPTError, match="tile_attention_v1"):
        registry.register("tile_attention_v0", "cpu", "cpu")
    with pytest.raises(SPTError, match="no reference"):
        registry.reference_of("nothing_v1")


@pytest.mark.parametrize("op", registry.OPS)
def test_every_op_has_a_reference_and_is_declared(op):
    registry.install()
    assert callable(registry.reference_of(op))
    assert hasattr(torch.ops.spt, op)


@pytest.mark.parametrize(
    "op", ["select_tiles_v1", "select_keys_v1", "tile_attention_v1", "tile_attention_backward_v1", "key_attention_v1"]
)
def test_attention_is_lowered_on_the_cpu(op):
    tiles = "tile" in op and cpp.compiler() is not None
    assert registry.chosen(op, "cpu") == ("cpp" if tiles else "cpu")


def test_installed_ops_dispatch_and_installing_twice_is_harmless(monkeypatch):
    registry.install()
    registry.install()
    seen = []
    original = registry.dispatch
    monkeypatch.setattr(registry, "dispatch", lambda *args: seen.append(args[:2]) or original(*args))
    tiles, counts = torch.ops.spt.select_tiles_v1(*arguments())
    assert seen == [(OP, "cpu")]
    assert (counts > 0).all() and tiles.dtype == torch.int32


def test_a_lowering_that_cannot_be_imported_is_reported_and_left_out(monkeypatch, table):
    table.loaded.clear()
    monkeypatch.setitem(registry._LOWERING_MODULES, "cpu", ("spt_compiler.lowering.absent", "spt_compiler.lowering.render"))

    def broken(name):
        raise OSError("libcuda.so.1")

    monkeypatch.setattr(registry.importlib, "import_module", broken)
    with pytest.warns(UserWarning, match="render.*libcuda") as caught:
        assert registry.chosen(OP, "cpu") == "reference"
    assert len(caught) == 1 and registry.chosen(OP, "cpu") == "reference"


def test_importing_and_installing_load_no_kernel():
    code = (
        "import sys; from spt_compiler.lowering import registry; registry.install(); "
        "loaded = {m for m in sys.modules if m == 'triton' or m.startswith('spt_compiler.lowering.')}; "
        "assert loaded == {'spt_compiler.lowering.' + m for m in ('registry', 'tape')}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
