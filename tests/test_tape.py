"""Calls kept to be done again. The functions here launch nothing; kernels on tape are tested in `interpreted_*.py`."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from spt_compiler.lowering import registry, tape
from spt_compiler.lowering.tape import Tapes


def call(tapes, function, *args):
    supported, result = tapes.call(function, None, args)
    assert supported
    return result


def counted(function):
    def run(*args):
        run.calls += 1
        return function(*args)

    run.calls = 0
    return run


def mixed(x, others, scale, needs):
    """Memory of its own, views, operators in place, several results of one operator, a list of tensors."""
    out = x.new_empty((x.shape[1], x.shape[0])).t()
    out.copy_(x)
    rows = out[1:]
    rows.mul_(scale)
    largest = out.max(1)
    first, second = out.unbind(1)[:2]
    total = first + second if needs[0] else first * others[0]
    unused = x.sin()
    del unused
    return [out, largest.values, largest.indices, total.neg_(), x.new_empty(0)]


def draw():
    return torch.randn(5, 3), [torch.randn(5), torch.randn(2)], 0.5, [False, True]


def test_the_third_call_of_a_kind_is_played():
    tapes, run = Tapes(), counted(mixed)
    for n in (1, 2, 2, 2):
        args = draw()
        got = call(tapes, run, *args)
        assert run.calls == n and type(got) is list
        for result, expected in zip(got, mixed(*args), strict=True):
            assert torch.equal(result, expected) and result.stride() == expected.stride()
    assert len(tapes) == 1
    (known,) = tapes._known.values()
    functions = [play.__self__.function for play, _ in known._steps if isinstance(play.__self__, tape._Call)]
    assert torch.ops.aten.sin.default not in functions and torch.ops.aten.copy_.default in functions


@pytest.mark.parametrize(
    "change",
    [
        lambda x, others, scale, needs: (torch.randn(3, 5).t(), others, scale, needs),
        lambda x, others, scale, needs: (torch.randn(6, 3), [torch.randn(6), others[1]], scale, needs),
        lambda x, others, scale, needs: (x.double(), others, scale, needs),
        lambda x, others, scale, needs: (torch.randn(16)[1:].view(5, 3), others, scale, needs),
        lambda x, others, scale, needs: (x, others[:1], scale, needs),
        lambda x, others, scale, needs: (x, others, 0.25, needs),
        lambda x, others, scale, needs: (x, others, scale, [True, True]),
    ],
)
def test_another_kind_is_called(change):
    tapes, run = Tapes(), counted(mixed)
    for _ in range(3):
        call(tapes, run, *draw())
    args = change(*draw())
    got = call(tapes, run, *args)
    assert run.calls == 3 and all(map(torch.equal, got, mixed(*args)))


def elsewhere():
    constant = torch.ones(5)
    return lambda x: x + constant


@pytest.mark.parametrize(
    ("function", "n_args"),
    [
        (elsewhere(), 1),
        (lambda x: x * x.sum().item(), 1),
        (lambda x, y: torch.cat([x, y]), 2),
        (lambda x, y: torch.add(x, y, out=torch.empty(5)), 2),
    ],
)
def test_what_cannot_be_played_is_called(function, n_args):
    tapes, run = Tapes(), counted(function)
    for n in range(1, 5):
        args = [torch.randn(5) for _ in range(n_args)]
        assert torch.equal(call(tapes, run, *args), function(*args)) and run.calls == n
    assert len(tapes) == 0


def test_one_tensor_as_two_arguments_says_nothing_of_two():
    tapes, run = Tapes(), counted(lambda x, y: x - 2 * y)
    for n in (1, 2, 3):
        x = torch.randn(5)
        assert torch.equal(call(tapes, run, x, x), -x) and run.calls == n
    x, y = torch.randn(5), torch.randn(5)
    assert torch.equal(call(tapes, run, x, y), x - 2 * y)


def test_what_is_not_supported_is_not_called():
    tapes, run = Tapes(), counted(torch.neg)
    assert tapes.call(run, lambda x: False, (torch.ones(2),)) == (False, None) and run.calls == 0


def test_a_failure_ends_the_recording():
    def failing(x):
        raise RuntimeError("no memory")

    tapes, x = Tapes(), torch.randn(3)
    call(tapes, torch.neg, x)
    with pytest.raises(RuntimeError, match="no memory"):
        call(tapes, failing, x)
    assert tape.recorder() is None
    assert torch.equal(call(tapes, torch.neg, x), -x) and len(tapes) == 1


def test_a_call_that_first_prepares_a_kernel_is_recorded_later():
    def preparing(x):
        if tape.recorder() is not None and preparing.calls == 1:
            tape.recorder().fault, tape.recorder().once = "a kernel was not ready", True
        preparing.calls += 1
        return -x

    preparing.calls, tapes = 0, Tapes()
    for n in (1, 2, 3, 3):
        x = torch.randn(3)
        assert torch.equal(call(tapes, preparing, x), -x) and preparing.calls == n and len(tapes) == (n == 3)


def test_tapes_hold_no_tensor():
    tapes, args = Tapes(), draw()
    seen = [weakref.ref(args[0])]
    for _ in range(3):
        seen += [weakref.ref(t) for t in call(tapes, mixed, *args)]
    del args
    gc.collect()
    assert all(ref() is None for ref in seen) and len(tapes) == 1


def test_kinds_are_bounded(monkeypatch):
    monkeypatch.setattr(tape, "_MOST_KINDS", 4)
    tapes = Tapes()
    for n in [1, 1, 1, 2, 3, 4, 5, 6, 6, 6]:
        call(tapes, torch.neg, torch.randn(n))
    assert len(tapes._known) <= 4 and len(tapes) == 1


def test_the_registry_plays_lowerings_that_say_so(monkeypatch):
    monkeypatch.setattr(registry, "_table", registry._Table(loaded={"cpu"}))
    run = counted(lambda x, *_: (x * 2,))
    registry.register("route_v1", "cpu", "taped", supports=lambda x, *_: x.dim() == 1, taped=True)(run)
    for n in (1, 2, 2):
        x = torch.randn(3)
        assert torch.equal(registry.dispatch("route_v1", "cpu", x, 1)[0], x * 2) and run.calls == n
