"""Attention kernels under Triton's interpreter against the definition of their ops; run by test_triton_attention.py."""

from __future__ import annotations

import pytest
import torch
from interpreter import check_close, double, prepare

from spt_compiler import pq
from spt_compiler.lowering import registry, triton_attention
from spt_compiler.ops import reference

prepare()

INF = torch.inf


def blocked_bias(n_q: int, n_k: int) -> torch.Tensor:
    """A float mask with a row that sees nothing, and keys that nobody sees."""
    bias = torch.randn(1, 4, n_q, n_k)
    bias[:, :, min(5, n_q - 1)] = -INF
    bias[..., ::3] = -INF
    return bias


def qkv(n_q=21, n_k=37, heads=4, groups=2, dim=24, value_dim=40, batch=1, dtype=torch.float32):
    """Strided in three ways, D != Dv, no dimension a power of two."""
    q = torch.randn(batch, n_q, heads, dim, dtype=dtype).transpose(1, 2)
    k = torch.randn(batch, groups, dim, n_k, dtype=dtype).transpose(2, 3) + 0.5
    v = torch.randn(batch, groups, n_k, 2 * value_dim, dtype=dtype)[..., ::2]
    return q, k, v


def tile_lists(q, k, tile_q, tile_k, slots=3, all_of_batch_0=False):
    n_q_tiles, n_k_tiles = -(-q.shape[2] // tile_q), -(-k.shape[2] // tile_k)
    slots = min(slots, n_k_tiles)
    rows = (q.shape[0], k.shape[1], n_q_tiles)
    lists = [torch.randperm(n_k_tiles)[:slots].sort().values for _ in range(rows[0] * rows[1] * rows[2])]
    tiles = torch.stack(lists).view(*rows, slots).int()
    counts = torch.randint(0, slots + 1, rows).int()
    if all_of_batch_0:
        counts[0] = -1
    tiles[torch.arange(slots) >= counts.unsqueeze(-1)] = -1
    return tiles, counts


MASKS = {
    "none": lambda n_q, n_k: (None, "", []),
    "causal": lambda n_q, n_k: (None, "k <= q", []),
    "padded": lambda n_q, n_k: (None, "(k <= q) & t0[b, k]", [torch.rand(1, n_k) > 0.4]),
    "documents": lambda n_q, n_k: (None, "t0[b, k] == t0[b, q]", [torch.arange(max(n_q, n_k))[None] // 7]),
    "alibi": lambda n_q, n_k: (None, "where(k <= q, t1[h] * (k - q), -inf)", [torch.zeros(1), torch.rand(4)]),
    "heads": lambda n_q, n_k: (None, "(h > 1) | (q - k < 3)", []),
    "bool": lambda n_q, n_k: (torch.rand(1, 1, n_q, n_k) > 0.7, "", []),
    "float": lambda n_q, n_k: (blocked_bias(n_q, n_k), "", []),
    "float and causal": lambda n_q, n_k: (blocked_bias(n_q, n_k), "k <= q", []),
}


@pytest.mark.parametrize(
    ("mask", "extra"),
    [
        ("none", {}),
        ("causal", {"all_tiles": True}),
        ("padded", {"empty": "nan"}),
        ("documents", {"dtype": torch.float16, "all_tiles": True}),
        ("alibi", {"dtype": torch.bfloat16, "tile": (8, 16)}),
        ("heads", {"p": 0.3, "dims": (80, 96)}),
        ("bool", {"empty": "uniform", "p": 0.5, "all_tiles": True}),
        ("float", {"empty": "uniform", "softcap": 2.0}),
        ("float and causal", {"empty": "nan", "p": 0.25, "softcap": 3.0, "tile": (3, 1)}),
        ("causal", {"p": 1.0, "n_q": 1}),
    ],
)
def test_tile_attention(nan_empty, mask, extra):
    dims = extra.get("dims", (24, 40))
    q, k, v = qkv(extra.get("n_q", 21), dim=dims[0], value_dim=dims[1], dtype=extra.get("dtype", torch.float32))
    tile = extra.get("tile", (16, 8))
    lists = tile_lists(q, k, *tile, all_of_batch_0=extra.get("all_tiles", False))
    bias, expr, expr_in = MASKS[mask](q.shape[2], k.shape[2])
    p = extra.get("p", 0.0)
    seed = torch.tensor([1234567890123456789]) if p else None
    rest = (expr, expr_in, seed, p, 0.3, extra.get("softcap"), extra.get("empty", "zero"), *tile)
    assert triton_attention.supports_tile_attention(q, k, v, bias, *lists, *rest) is None
    out, lse = triton_attention.tile_attention(q, k, v, bias, *lists, *rest)
    exact = reference.tile_attention(*double([q, k, v, bias]), *lists, *rest)
    eager = reference.tile_attention(q, k, v, bias, *lists, *rest)
    check_close(out, exact[0], eager[0], "out")
    check_close(lse, exact[1], eager[1], "lse")


@pytest.mark.parametrize(
    ("mask", "extra"),
    [
        ("none", {"expanded": True}),
        ("causal", {"dims": (16, 24), "needs": [True, False, False, False]}),
        ("padded", {"empty": "nan", "p": 0.3, "all_tiles": True}),
        ("documents", {"dtype": torch.float16, "needs": [False, True, True, False]}),
        ("bool", {"empty": "uniform", "tile": (16, 4)}),
        ("float and causal", {"empty": "nan", "softcap": 2.0}),
        ("alibi", {"p": 0.5, "tile": (5, 16), "dtype": torch.bfloat16}),
    ],
)
def test_tile_attention_backward(nan_empty, mask, extra):
    dims, needs = extra.get("dims", (24, 40)), extra.get("needs", [True, True, True, False])
    batch = 2 if extra.get("all_tiles") else 1
    n_q, n_k = (11, 17) if batch == 2 else (19, 29)
    q, k, v = qkv(n_q, n_k, dim=dims[0], value_dim=dims[1], batch=batch, dtype=extra.get("dtype", torch.float32))
    tile = extra.get("tile", (8, 8))
    lists = tile_lists(q, k, *tile, all_of_batch_0=extra.get("all_tiles", False))
    if extra.get("all_tiles"):
        lists[1][0, 0, 0] = 1  # one row of a head that lists everything elsewhere
        lists[0][0, 0, 0, 0] = 2
    bias, expr, expr_in = MASKS[mask](n_q, n_k)
    if mask == "padded":
        expr_in = [expr_in[0].expand(batch, -1)]
    p = extra.get("p", 0.0)
    seed = torch.tensor([99]) if p else None
    rest = (expr, expr_in, seed, p, 0.3, extra.get("softcap"), extra.get("empty", "zero"), *tile)
    out, lse = reference.tile_attention(q, k, v, bias, *lists, *rest)
    grad = torch.randn(()).to(q.dtype).expand(out.shape) if extra.get("expanded") else torch.randn_like(out)
    args = (grad, q, k, v, bias, out, lse, *lists, *rest, needs)
    assert triton_attention.supports_tile_attention_backward(*args) is None
    got = triton_attention.tile_attention_backward(*args)
    exact_in = double([grad, q, k, v, bias])
    exact_out = reference.tile_attention(*exact_in[1:], *lists, *rest)
    exact = reference.tile_attention_backward(*exact_in, *exact_out, *lists, *rest, needs)
    eager = reference.tile_attention_backward(*args)
    for name, *grads in zip(("dq", "dk", "dv", "dbias"), got, exact, eager, strict=True):
        check_close(*grads, name)
        assert grads[0].is_contiguous()
    if extra.get("expanded"):  # bitwise repeatable
        assert all(map(torch.equal, got, triton_attention.tile_attention_backward(*args)))


@pytest.mark.parametrize(
    ("mask", "extra"),
    [
        ("causal", {"empty": "nan"}),
        ("padded", {"p": 0.3, "dtype": torch.float16}),
        ("float", {"empty": "uniform", "p": 0.25, "softcap": 2.0}),
        ("bool", {"empty": "uniform", "everything": True}),
    ],
)
def test_key_attention(nan_empty, mask, extra):
    q, k, v = qkv(7, dtype=extra.get("dtype", torch.float32))
    n_q, n_k = q.shape[2], k.shape[2]
    bias, expr, expr_in = MASKS[mask](n_q, n_k)
    order = torch.rand(1, 4, n_q, n_k).argsort(-1)[..., :9].sort(-1).values.int()
    counts = torch.randint(0, 10, (1, 4, n_q)).int()
    if extra.get("everything"):
        counts[:, 1] = -1
    p = extra.get("p", 0.0)
    rest = (expr, expr_in, torch.tensor([-5]) if p else None, p, 0.3, extra.get("softcap"), extra.get("empty", "zero"))
    assert triton_attention.supports_key_attention(q, k, v, bias, order, counts, *rest) is None
    out, lse = triton_attention.key_attention(q, k, v, bias, order, counts, *rest)
    exact = reference.key_attention(*double([q, k, v, bias]), order, counts, *rest)
    eager = reference.key_attention(q, k, v, bias, order, counts, *rest)
    check_close(out, exact[0], eager[0], "out")
    check_close(lse, exact[1], eager[1], "lse")


def codebook_for(k):
    mean = k.float().mean((0, 2))
    return pq.fit((k.float() - mean[None, :, None])[0], k.shape[3] // 8, 16), mean


@pytest.mark.parametrize(
    ("mask", "rule", "extra"),
    [
        ("none", "mean", {}),
        ("causal", "pq", {"square": True, "density": 0.1}),
        ("causal", "mean", {"softcap": 2.0}),
        ("padded", "pq", {}),
        ("alibi", "mean", {"tile": (8, 4)}),
        ("float", "pq", {"softcap": 1.0}),
        ("bool", "mean", {"tile": (5, 1)}),
        ("none", "mean", {"density": -1.0}),
        ("none", "mean", {"min_keys": 1000}),
        ("causal", "mean", {"density": 0.0078125, "tile": (16, 32)}),
    ],
)
def test_select_tiles(nan_empty, mask, rule, extra):
    q, k, _ = qkv(37 if extra.get("square") else 29, dim=16)
    bias, expr, expr_in = MASKS[mask](q.shape[2], k.shape[2])
    tile = extra.get("tile", (16, 8))
    args = (q, k, bias, expr, expr_in, *codebook_for(k), torch.tensor([extra.get("density", 0.3)]), 0.4)
    args = (*args, *tile, 0.3, extra.get("softcap"), rule, extra.get("min_keys", 0))
    assert triton_attention.supports_select_tiles(*args) is None
    for got, exact in zip(triton_attention.select_tiles(*args), reference.select_tiles(*args), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, exact)


@pytest.mark.parametrize(
    ("mask", "rule", "extra"),
    [
        ("causal", "pq", {}),
        ("float", "pq", {"softcap": 2.0}),
        ("causal", "pq-match", {}),
        ("bool", "pq-match", {"density": 0.05}),
        ("none", "pq", {"density": -1.0}),
    ],
)
def test_select_keys(nan_empty, mask, rule, extra):
    q, k, _ = qkv(7, 19, heads=2, groups=1, dim=16)
    bias, expr, expr_in = MASKS[mask](q.shape[2], k.shape[2])
    bias = bias if bias is None or bias.shape[1] == 1 else bias[:, :2]
    args = (q, k, bias, expr, expr_in, *codebook_for(k), torch.tensor([extra.get("density", 0.3)]), 0.4)
    args = (*args, 0.3, extra.get("softcap"), rule, 0)
    assert triton_attention.supports_select_keys(*args) is None
    for got, exact in zip(triton_attention.select_keys(*args), reference.select_keys(*args), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, exact)


def test_codes_and_decoded_keys(nan_empty):
    _, k, _ = qkv(n_k=45, dim=24)
    codebook, mean = codebook_for(k)
    codebook[:, :, 3] = codebook[:, :, 7]  # ties go to the lower code
    codes, decoded = triton_attention.pq_assign(codebook, k, mean, codes=True, decoded=torch.float32)
    expected = pq.assign(codebook, k - mean.unsqueeze(-2))
    assert codes.dtype == torch.uint8 and torch.equal(codes.long(), expected)
    torch.testing.assert_close(decoded, pq.reconstruct(codebook, k, mean))


def test_the_registry_runs_the_kernels_and_falls_back_where_they_do_not_apply(recwarn):
    q, k, v = qkv(9, 19, heads=2, groups=1)
    selection = (None, "k <= q", [], None, None, torch.tensor([0.5]), 0.5, 8, 8, 0.3, None, "mean", 0)
    lists = registry.dispatch("select_tiles_v1", "cuda", q, k, *selection)
    rest = (*lists, "k <= q", [], None, 0.0, 0.3, None, "zero", 8, 8)
    for tensors in ([q, k, v], double([q, k, v])):
        out, lse = registry.dispatch("tile_attention_v1", "cuda", *tensors, None, *rest)
        exact = reference.tile_attention(*double([q, k, v]), None, *rest)
        torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-5)
        assert out.dtype == tensors[0].dtype
    # Every candidate refuses a caller's mistake, and none is blamed for it.
    with pytest.raises(ValueError, match="one dtype"):
        registry.dispatch("tile_attention_v1", "cuda", q, k, v.half(), None, *rest)
    assert registry.failures() == {} and not [w for w in recwarn if "spt_compiler" in str(w.message)]
