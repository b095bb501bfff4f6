"""Matrix products by either vendor library, in every layout and type."""

from __future__ import annotations

import itertools

import pytest
import torch

from spt_compiler import matmul


def test_products_in_every_layout(vendor):
    m, n, k = 37, 45, 33
    for layouts in itertools.product(("rows", "columns", "spread"), repeat=2):
        left, right = (_laid_out(torch.randn(shape), layout) for shape, layout in zip(((m, k), (k, n)), layouts, strict=True))
        torch.testing.assert_close(matmul.product(left, right).double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)


def test_few_shapes_reach_onednn(monkeypatch):
    """It compiles and keeps a kernel for each."""
    shapes = {tuple(p.stop - p.start for p in matmul._pieces(n)) for n in range(1, 2000)}
    assert {size for sizes in shapes for size in sizes if size >= matmul._STEP} == {128, 256, 384, 512}
    assert all(sum(size < matmul._STEP for size in sizes) <= 1 for sizes in shapes)
    for n in (1, 127, 128, 511, 512, 513, 1999):
        assert [i for p in matmul._pieces(n) for i in range(p.start, p.stop)] == [*range(n)]


def _laid_out(matrix, layout):
    if layout == "columns":
        return matrix.t().contiguous().t()
    return matrix if layout == "rows" else torch.stack([matrix, torch.full_like(matrix, torch.nan)], -1)[..., 0]


def test_onednn_gets_no_layout_that_it_computes_in_plain_loops(monkeypatch):
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: True)
    left, right = torch.randn(256, 768), torch.randn(768, 512)
    assert matmul._takes(left, right[:, :256].contiguous())
    assert matmul._takes(left, right.t().contiguous()[:256].t())
    assert not matmul._takes(left, right[:, :256])  # columns of a wider matrix
    assert not matmul._takes(left.double(), right[:, :256].contiguous().double())
    assert not matmul._takes(left[:8], right[:, :256].contiguous())  # small
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not matmul._takes(left, right[:, :256].contiguous())


@pytest.mark.parametrize("native", [False, True])
def test_statistics_are_computed_in_the_type_that_is_fast(monkeypatch, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    found = {d: matmul.computes_in(torch.zeros(1, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
    assert found.pop(torch.bfloat16) == (torch.bfloat16 if native else torch.float32)
    assert set(found.values()) == {torch.float32}
    assert matmul.computes_in(torch.zeros(1, dtype=torch.float16, device="meta")) == torch.float16
