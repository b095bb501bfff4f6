"""`spt::observe_v1`: the ring of sampled rows."""

from __future__ import annotations

import pytest
import torch

from spt_compiler.ops import observe as _observe_module

observe = torch.ops.spt.observe_v1
ON, OFF = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)


def ring(*lead: int, size: int = 5, dim: int = 3):
    return torch.zeros(*lead, size, dim), torch.zeros(1, dtype=torch.int32)


def numbered(n: int, *lead: int, dim: int = 3, start: int = 0):
    """Rows whose values name them."""
    return torch.arange(start, start + n, dtype=torch.float32).view(-1, 1).expand(*lead, n, dim).contiguous()


def expected(size: int, n: int, dim: int = 3):
    out = torch.zeros(size, dim)
    for i in range(n):
        out[i % size] = i
    return out


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_rows_go_round_the_ring(lead):
    sample, cursor = ring(*lead)
    written = 0
    for n in (2, 2, 4, 1):
        observe(sample, cursor, numbered(n, *lead, start=written), ON)
        written += n
        assert cursor.item() == written
        assert torch.equal(sample, expected(5, written).expand_as(sample))


@pytest.mark.parametrize("n", [5, 6, 13])
def test_of_more_rows_than_fit_the_last_ones_stay_where_they_would_be(n):
    sample, cursor = ring()
    observe(sample, cursor, numbered(3), ON)
    observe(sample, cursor, numbered(n, start=3), ON)
    assert cursor.item() == 3 + n
    assert torch.equal(sample, expected(5, 3 + n))


def test_nothing_changes_unless_asked():
    sample, cursor = ring()
    before = sample._version
    observe(sample, cursor, numbered(2), OFF)
    assert cursor.item() == 0 and not sample.any()
    assert sample._version >= before


def test_values_are_copied_as_they_are_and_cast():
    sample, cursor = ring()
    rows = torch.tensor([[float("nan"), float("inf"), 1.5]], dtype=torch.bfloat16, requires_grad=True)
    observe(sample, cursor, rows, ON)
    assert torch.equal(sample[0].isnan(), torch.tensor([True, False, False]))
    assert sample[0, 1] == float("inf") and sample[0, 2] == 1.5
    assert not sample.requires_grad


def test_cursor_does_not_overflow():
    sample, cursor = ring()
    cursor.fill_((1 << 30) - 1)
    position = int(cursor) % 5
    observe(sample, cursor, numbered(3), ON)
    assert int(cursor) >= 5 and int(cursor) % 5 == (position + 3) % 5
    assert sample[(position + 2) % 5, 0] == 2


def test_empty_rows_and_empty_ring():
    sample, cursor = ring()
    observe(sample, cursor, numbered(0), ON)
    assert cursor.item() == 0
    observe(torch.zeros(0, 3), cursor, numbered(2), ON)
    assert cursor.item() == 0


def test_wrong_shape_says_what_was_expected():
    sample, cursor = ring(2)
    with pytest.raises(ValueError, match=r"expected rows like sample \(2, 5, 3\).*got \(3, 4, 3\)"):
        observe(sample, cursor, numbered(4, 3), ON)


def test_strided_sample():
    base = torch.zeros(3, 5)
    sample, cursor = base.t(), torch.zeros(1, dtype=torch.int32)
    observe(sample, cursor, numbered(7), ON)
    assert torch.equal(base.t(), expected(5, 7))


@pytest.mark.parametrize("probe", [ON, OFF])
def test_opcheck(probe):
    sample, cursor = ring(2)
    torch.library.opcheck(observe.default, (sample, cursor, numbered(3, 2), probe))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_graph_mutates_its_input(inner):
    assert _observe_module.observe is not None  # the op is registered by importing the module

    def step(x, weight, sample, cursor, probe):
        y = (x @ weight).relu()
        observe(sample, cursor, x.detach().float(), probe)
        return y.sum()

    torch.compiler.reset()
    compiled = torch.compile(step, backend=inner, fullgraph=True)
    weight = torch.randn(3, 4, requires_grad=True)
    sample, cursor = ring()
    for i in range(3):
        compiled(numbered(2, start=2 * i), weight, sample, cursor, ON).backward()
    compiled(numbered(2, start=99), weight, sample, cursor, OFF).backward()
    assert cursor.item() == 6
    assert torch.equal(sample, expected(5, 6))
    assert weight.grad is not None
