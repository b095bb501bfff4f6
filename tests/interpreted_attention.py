"""Attention kernels under Triton's interpreter against the definition of their ops; run by test_triton_attention.py."""

from __future__ import annotations

import pytest
import torch
from interpreter import check_close, check_taped, double, prepare

from spt_compiler import pq
from spt_compiler.lowering import registry, triton_attention, triton_selection
from spt_compiler.ops import reference

prepare()

INF = torch.inf


def blocked_bias(n_q: int, n_k: int) -> torch.Tensor:
    """A float mask with a row that sees nothing, and keys that nobody sees."""
    bias = torch.randn(1, 4, n_q, n_k)
    bias[:, :, min(5, n_q - 1)] = -INF
    bias[..., ::3] = -INF
    return bias


def open_bias(n_q: int, n_k: int) -> torch.Tensor:
    """The same with whole tiles that everyone else sees."""
    bias = blocked_bias(n_q, n_k)
    bias[..., 8:20] = torch.randn(1, 4, n_q, 12)
    bias[:, :, min(5, n_q - 1)] = -INF
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
    "open float": lambda n_q, n_k: (open_bias(n_q, n_k), "", []),
    "shared float": lambda n_q, n_k: (torch.randn(1, 1, n_q, n_k), "k <= q + 9", []),
    "row float": lambda n_q, n_k: (torch.randn(1, 4, 1, n_k), "", []),
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


def plain(definition, *args):
    """The definition with all its arithmetic in the dtype of the tensors, as a program without kernels has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "compute_dtype", lambda q, *_: q.dtype)
        return definition(*args)


def check_gradients(op, case, lists, rest, needs, compensate=(), repeat=False):
    """The kernels of an op's backward against the definition; case: q, k, v, bias."""
    supports = getattr(triton_attention, f"supports_{op}_backward")
    kernels, definition = getattr(triton_attention, f"{op}_backward"), getattr(reference, f"{op}_backward")
    forward = getattr(reference, op)
    out, lse = forward(*case, *lists, *rest, *compensate)
    grad = torch.randn(()).to(out.dtype).expand(out.shape) if repeat else torch.randn(out.shape).to(out.dtype)
    args = (grad, *case, out, lse, *lists, *rest, needs, *compensate)
    assert supports(*args) is None
    got = kernels(*args)
    exact_in = double([grad, *case])
    exact_out = forward(*exact_in[1:], *lists, *rest, *compensate)
    exact = definition(*exact_in, *exact_out, *lists, *rest, needs, *compensate)
    eager = plain(definition, *args)
    for name, *grads in zip(("dq", "dk", "dv", "dbias"), got, exact, eager, strict=True):
        check_close(*grads, name)
        assert grads[0].is_contiguous()
    if repeat:
        assert all(map(torch.equal, got, kernels(*args)))  # bit by bit


ALL, NO_BIAS = [True] * 4, [True, True, True, False]


@pytest.mark.parametrize(
    ("mask", "extra"),
    [
        ("none", {"repeat": True}),
        ("causal", {"dims": (16, 24), "needs": [True, False, False, False]}),
        ("padded", {"empty": "nan", "p": 0.3, "all_tiles": True}),
        ("documents", {"dtype": torch.float16, "needs": [False, True, True, False]}),
        ("bool", {"empty": "uniform", "tile": (16, 4)}),
        ("bool", {"empty": "uniform", "p": 0.4}),
        ("float and causal", {"empty": "nan", "softcap": 2.0, "needs": ALL}),
        ("alibi", {"p": 0.5, "tile": (5, 16), "dtype": torch.bfloat16}),
        pytest.param("shared float", {"needs": ALL, "all_tiles": True, "p": 0.2}, marks=pytest.mark.slow),
        ("row float", {"needs": [False, False, False, True], "dtype": torch.bfloat16}),
    ],
)
def test_tile_attention_backward(nan_empty, mask, extra):
    dims = extra.get("dims", (24, 40))
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
    rest = (expr, expr_in, torch.tensor([99]) if p else None, p, 0.3, extra.get("softcap"), extra.get("empty", "zero"), *tile)
    bias = bias if bias is None or bias.dtype == torch.bool else bias.to(q.dtype)
    check_gradients("tile_attention", (q, k, v, bias), lists, rest, extra.get("needs", NO_BIAS), repeat=extra.get("repeat"))


@pytest.mark.parametrize(
    ("mask", "extra"),
    [
        ("causal", {"repeat": True, "heads": (8, 2)}),
        ("none", {"heads": (6, 2), "dims": (80, 96), "dtype": torch.float16}),
        ("padded", {"empty": "nan", "p": 0.3, "all_tiles": True, "heads": (4, 2)}),
        ("bool", {"empty": "uniform", "heads": (4, 2), "scratch": 1, "repeat": True}),
        ("causal", {"softcap": 2.0, "heads": (4, 4), "tile": (5, 16), "scratch": 20000}),
        ("documents", {"all_tiles": True, "heads": (8, 2), "tile": (128, 4), "scratch": 1}),
        ("heads", {"heads": (4, 1), "tile": (70, 32), "dtype": torch.float16, "repeat": True}),
    ],
)
def test_gradients_of_a_query_tile_by_one_kernel(nan_empty, monkeypatch, mask, extra):
    """Groups that fill the stacked products or not; scratch for all, or for a head and some query tiles at a time."""
    if "scratch" in extra:
        monkeypatch.setattr(triton_attention, "PARTIAL_BYTES", extra["scratch"])
    heads, groups = extra["heads"]
    tile, dims, batch = extra.get("tile", (8, 8)), extra.get("dims", (24, 40)), 2 if extra.get("all_tiles") else 1
    n_q, n_k = (2 * tile[0] + 3, 5 * tile[1] + 2)
    dtype = extra.get("dtype", torch.bfloat16)
    q, k, v = qkv(n_q, n_k, heads, groups, *dims, batch=batch, dtype=dtype)
    lists = tile_lists(q, k, *tile, all_of_batch_0=extra.get("all_tiles", False))
    bias, expr, expr_in = MASKS[mask](n_q, n_k)
    expr_in = [t.expand(batch, -1) if mask in ("padded", "documents") else t for t in expr_in]
    p = extra.get("p", 0.0)
    rest = (expr, expr_in, torch.tensor([99]) if p else None, p, 0.3, extra.get("softcap"), extra.get("empty", "zero"), *tile)
    ran = set()

    def spy(template, structure, kernel, *args, **kwargs):
        ran.add(kernel.rpartition("_")[2])
        return launch(template, structure, kernel, *args, **kwargs)

    launch = triton_attention.launch
    monkeypatch.setattr(triton_attention, "launch", spy)
    check_gradients("tile_attention", (q, k, v, bias), lists, rest, NO_BIAS, repeat=extra.get("repeat"))
    assert {"pairs", "sum", "dq", "dkdv"} <= ran


@pytest.mark.parametrize("scratch", [1, 100, 1000, 10**9])
def test_ranges_cover_every_query_tile_of_every_head_once(monkeypatch, scratch):
    monkeypatch.setattr(triton_attention, "PARTIAL_BYTES", scratch)
    found = triton_attention.ranges(3, 7, 40)
    covered = [(h, r) for head, n, row, m in found for h in range(head, head + n) for r in range(row, row + m)]
    assert sorted(covered) == [(h, r) for h in range(3) for r in range(7)]
    assert all(n * m * 40 <= max(scratch, 40) for _, n, _, m in found)
    # Ranges of query tiles follow each other, for one head.
    assert all(n == 1 or m == 7 for _, n, _, m in found)


def test_long_lists_are_split(nan_empty):
    """Tile 0 is listed by every row, which is more than four times the mean."""
    q, k, v = qkv(24, 48, heads=2, groups=1, dim=16, value_dim=8)
    tiles, counts = torch.randint(1, 12, (1, 1, 6, 2)).int(), torch.full((1, 1, 6), 2, dtype=torch.int32)
    tiles[..., 0] = 0
    assert triton_attention.split_of(6, 12, 2) == triton_attention.Split(4, 15, 6)
    rest = ("", [], None, 0.0, 0.3, None, "zero", 4, 4)
    check_gradients("tile_attention", (q, k, v, None), (tiles, counts), rest, NO_BIAS, repeat=True)
    # Beside it a head with a row that lists everything, and queries that see nothing.
    q, k, v = qkv(24, 48, heads=2, groups=2, dim=16, value_dim=8)
    tiles, counts = tiles.repeat(1, 2, 1, 1), counts.repeat(1, 2, 1)
    counts[0, 1, 3] = -1
    bias = torch.rand(1, 1, 24, 48) > 0.5
    bias[:, :, 11] = False
    rest = ("", [], torch.tensor([5]), 0.3, 0.3, None, "uniform", 4, 4)
    check_gradients("tile_attention", (q, k, v, bias), (tiles, counts), rest, NO_BIAS, compensate=(True,))


@pytest.mark.parametrize("n_lists", [1, 3, 40])
def test_transposed_lists_say_where_a_tile_is_listed(n_lists):
    tiles = torch.rand(1, 2, n_lists, 30).argsort(-1)[..., :4].sort(-1).values.int()
    counts = torch.randint(0, 5, (1, 2, n_lists)).int()
    marks = triton_attention.mark_lists(tiles, counts, 30, places=True)
    assert torch.equal(marks != 0, reference.listed(tiles, counts, 30))
    found = triton_attention.transpose_lists(tiles, counts, marks, None)
    for head in range(2):
        for tile in range(30):
            slots = found["rows_ptr"][0, head, found["starts_ptr"][0, head, tile] : found["ends_ptr"][0, head, tile]].long()
            assert (tiles[0, head].flatten()[slots] == tile).all() and (slots % 4 < counts[0, head, slots // 4]).all()
            assert (slots // 4).tolist() == marks[0, head, :, tile].nonzero().flatten().tolist()


@pytest.mark.parametrize("n_lists", [1, 3, 40])
def test_every_part_of_a_list_has_one_program(n_lists):
    tiles = torch.rand(1, 2, n_lists, 30).argsort(-1)[..., :4].sort(-1).values.int()
    tiles[..., 0] = 0
    counts = torch.randint(1, 5, (1, 2, n_lists)).int()
    split = triton_attention.split_of(n_lists, 30, 4)
    assert (split is None) == (n_lists < 40)
    marks = triton_attention.mark_lists(tiles, counts, 30)
    assert torch.equal(marks != 0, reference.listed(tiles, counts, 30))
    found = triton_attention.transpose_lists(tiles, counts, marks, split)
    length = found["ends_ptr"] - found["starts_ptr"]
    assert torch.equal(length, marks.sum(2).int()) and not found["anyone_ptr"].any()
    for head in range(2):
        for tile in range(30):
            rows = found["rows_ptr"][0, head, found["starts_ptr"][0, head, tile] : found["ends_ptr"][0, head, tile]]
            assert rows.tolist() == marks[0, head, :, tile].nonzero().flatten().tolist()
    if split is None:
        return
    for head in range(2):
        parts = (length[0, head] + split.chunk - 1).div(split.chunk, rounding_mode="floor").clamp(min=1)
        items = torch.arange(30).repeat_interleave(parts).tolist()
        assert found["item_tiles_ptr"][0, head].tolist() == items + [30] * (split.n_items - len(items))
        assert found["first_items_ptr"][0, head].tolist() == (parts.cumsum(0) - parts).tolist()
        slots = torch.where(parts > 1, parts, 0)
        assert (parts > 1).any() and slots.sum() <= split.n_slots
        assert found["first_slots_ptr"][0, head].tolist() == torch.where(parts > 1, slots.cumsum(0) - slots, -1).tolist()


@pytest.mark.parametrize(
    ("mask", "extra"),
    [
        ("none", {"softcap": 2.0, "needs": NO_BIAS}),
        pytest.param("causal", {"p": 0.3, "square": True}, marks=pytest.mark.slow),
        ("padded", {"dtype": torch.bfloat16, "square": True}),
        ("open float", {"empty": "nan"}),
        ("shared float", {"p": 0.2, "softcap": 1.5, "dtype": torch.float16}),
        pytest.param("alibi", {"square": True}, marks=pytest.mark.slow),
    ],
)
def test_pseudo_keys_of_dropped_tiles(nan_empty, mask, extra):
    n_q, n_k = (26, 26) if extra.get("square") else (13, 26)
    q, k, v = qkv(n_q, n_k, heads=2, groups=1, dtype=extra.get("dtype", torch.float32))
    tile = (13, 4)
    lists = tile_lists(q, k, *tile, slots=2)
    if extra.get("square"):
        lists[1][0, 0, -1] = -1
    bias, expr, expr_in = MASKS[mask](n_q, n_k)
    bias = bias if bias is None else bias[:, :2].to(q.dtype)
    p = extra.get("p", 0.0)
    rest = (expr, expr_in, torch.tensor([99]) if p else None, p, 0.3, extra.get("softcap"), extra.get("empty", "zero"), *tile)
    case = (q, k, v, bias)
    assert triton_attention.supports_tile_attention(*case, *lists, *rest, True) is None
    out, lse = triton_attention.tile_attention(*case, *lists, *rest, True)
    exact = reference.tile_attention(*double([*case]), *lists, *rest, True)
    eager = reference.tile_attention(*case, *lists, *rest, True)
    check_close(out, exact[0], eager[0], "out")
    # The mean keys of the kernels have the dtype of the keys.
    precision = torch.finfo(q.dtype).eps if q.dtype != torch.float32 else 1e-6
    torch.testing.assert_close(lse.double(), exact[1], rtol=precision, atol=precision)
    needs = extra.get("needs", ALL if bias is not None else NO_BIAS)
    check_gradients("tile_attention", case, lists, rest, needs, compensate=(True,))


@pytest.mark.parametrize("compensate", [(), (True,)])
def test_rows_hidden_by_finite_values_are_uniform(nan_empty, compensate):
    """What models add in place of -inf: beside finfo.min, the log-sum-exp of a row has no digits left."""
    q, k, v = qkv(9, 24)
    bias = torch.zeros(1, 1, 9, 24)
    bias[:, :, 3] = bias[..., 5:9] = torch.finfo(torch.float32).min
    lists = (torch.tensor([0, 2]).expand(1, 2, 2, 2).int(), torch.full((1, 2, 2), 2, dtype=torch.int32))
    rest = ("", [], None, 0.0, 0.3, None, "zero", 8, 8)
    out, _ = triton_attention.tile_attention(q, k, v, bias, *lists, *rest, *compensate)
    exact, _ = reference.tile_attention(*double([q, k, v, bias]), *lists, *rest, *compensate)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    check_gradients("tile_attention", (q, k, v, bias), lists, rest, ALL, compensate=compensate)


def key_lists(n_q, n_k, everything=False, batch=1, heads=4):
    order = torch.rand(batch, heads, n_q, n_k).argsort(-1)[..., :9].sort(-1).values.int()
    counts = torch.randint(0, 10, (batch, heads, n_q)).int()
    order[torch.arange(9) >= counts.unsqueeze(-1)] = -1
    if everything:
        counts[:, 1] = -1
    return order, counts


@pytest.mark.parametrize(
    ("mask", "extra"),
    [
        ("causal", {"empty": "nan"}),
        ("padded", {"p": 0.3, "dtype": torch.float16}),
        ("float", {"empty": "uniform", "p": 0.25, "softcap": 2.0}),
        ("bool", {"empty": "uniform", "everything": True}),
        ("shared float", {"batch": 2, "scratch": 2 * 7 * 37, "dims": (80, 96)}),
    ],
)
def test_key_attention(nan_empty, monkeypatch, mask, extra):
    if "scratch" in extra:  # marks of two heads at a time
        monkeypatch.setattr(triton_attention, "SCRATCH_BYTES", extra["scratch"])
    dim, value_dim = extra.get("dims", (24, 40))
    batch = extra.get("batch", 1)
    q, k, v = qkv(7, dim=dim, value_dim=value_dim, batch=batch, dtype=extra.get("dtype", torch.float32))
    n_q, n_k = q.shape[2], k.shape[2]
    bias, expr, expr_in = MASKS[mask](n_q, n_k)
    lists = key_lists(n_q, n_k, extra.get("everything", False), batch)
    p = extra.get("p", 0.0)
    rest = (expr, expr_in, torch.tensor([-5]) if p else None, p, 0.3, extra.get("softcap"), extra.get("empty", "zero"))
    assert triton_attention.supports_key_attention(q, k, v, bias, *lists, *rest) is None
    out, lse = triton_attention.key_attention(q, k, v, bias, *lists, *rest)
    exact = reference.key_attention(*double([q, k, v, bias]), *lists, *rest)
    eager = reference.key_attention(q, k, v, bias, *lists, *rest)
    check_close(out, exact[0], eager[0], "out")
    check_close(lse, exact[1], eager[1], "lse")
    needs = ALL if bias is not None and bias.is_floating_point() else NO_BIAS
    check_gradients("key_attention", (q, k, v, bias), lists, rest, needs, repeat="scratch" in extra)


@pytest.mark.slow
def test_more_queries_and_keys_than_a_block(nan_empty):
    q, k, v = qkv(70, 75, heads=2, groups=1, dim=72, value_dim=16)
    lists = key_lists(70, 75, heads=2)
    rest = ("k <= q", [], None, 0.0, 0.3, None, "zero")
    out, _ = triton_attention.key_attention(q, k, v, None, *lists, *rest)
    exact, _ = reference.key_attention(*double([q, k, v]), None, *lists, *rest)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    check_gradients("key_attention", (q, k, v, None), lists, rest, NO_BIAS)


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
        ("causal", "pq", {"heads": 6, "groups": 1, "tile": (16, 4)}),  # two parts of a group, the second not full
        ("causal", "mean", {"heads": 6, "tile": (5, 1), "square": True}),
        ("none", "pq", {"heads": 3, "groups": 1, "tile": (64, 16), "batch": 2}),
        ("causal", "pq", {"nan": True, "square": True, "dims": 24}),
        ("causal", "pq", {"codebook": False}),
    ],
)
def test_select_tiles(nan_empty, mask, rule, extra):
    heads, groups = extra.get("heads", 4), extra.get("groups", 2)
    n_q, dim = 37 if extra.get("square") else 29, extra.get("dims", 16)
    q, k, _ = qkv(n_q, heads=heads, groups=groups, dim=dim, batch=extra.get("batch", 1))
    bias, expr, expr_in = MASKS[mask](q.shape[2], k.shape[2])
    tile = extra.get("tile", (16, 8))
    codebook = codebook_for(k) if extra.get("codebook", True) else (None, None)
    if extra.get("nan"):
        q[0, 1, 20, 3] = torch.nan  # one query alone
    args = (q, k, bias, expr, expr_in, *codebook, torch.tensor([extra.get("density", 0.3)]), 0.4)
    args = (*args, *tile, 0.3, extra.get("softcap"), rule, extra.get("min_keys", 0))
    assert triton_selection.supports_select_tiles(*args) is None
    for got, exact in zip(triton_selection.select_tiles(*args), reference.select_tiles(*args), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, exact)


@pytest.mark.parametrize(
    ("mask", "rule", "extra"),
    [
        ("causal", "pq", {}),
        ("float", "pq", {"softcap": 2.0}),
        ("causal", "pq-match", {}),
        ("bool", "pq-match", {"density": 0.05}),
        ("none", "pq", {"density": -1.0}),
        ("padded", "pq", {"codebook": False, "softcap": 2.0}),
    ],
)
def test_select_keys(nan_empty, mask, rule, extra):
    q, k, _ = qkv(7, 19, heads=2, groups=1, dim=16)
    bias, expr, expr_in = MASKS[mask](q.shape[2], k.shape[2])
    bias = bias if bias is None or bias.shape[1] == 1 else bias[:, :2]
    codebook = codebook_for(k) if extra.get("codebook", True) else (None, None)
    args = (q, k, bias, expr, expr_in, *codebook, torch.tensor([extra.get("density", 0.3)]), 0.4)
    args = (*args, 0.3, extra.get("softcap"), rule, 0)
    assert triton_selection.supports_select_keys(*args) is None
    for got, exact in zip(triton_selection.select_keys(*args), reference.select_keys(*args), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, exact)


def test_codes_and_decoded_keys(nan_empty):
    _, k, _ = qkv(n_k=45, dim=24)
    codebook, mean = codebook_for(k)
    codebook[:, :, 3] = codebook[:, :, 7]  # ties go to the lower code
    k[0, 0, 5, 2] = torch.nan  # in one slice of one key
    codes, decoded, pooled = triton_selection.pq_assign(
        codebook, k, mean, codes=True, decoded=torch.float32, pooled=torch.float32, tile_k=8
    )
    expected = pq.assign(codebook, k - mean.unsqueeze(-2))
    assert codes.dtype == torch.uint8 and torch.equal(codes.long(), expected)
    torch.testing.assert_close(decoded, pq.reconstruct(codebook, k, mean))
    torch.testing.assert_close(pooled, reference.tile_means(decoded, 8))


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


@pytest.mark.parametrize("mask", ["padded", "float and causal"])
def test_calls_are_recorded(nan_empty, mask):
    """Heads of 24 values, which are copied to rows of 32; a bias that is expanded; rows that see nothing."""
    q, k, v = qkv(19, 29, dim=24, value_dim=40, dtype=torch.float16)
    bias, expr, expr_in = MASKS[mask](19, 29)
    codebook, masked = codebook_for(k), (bias, expr, expr_in)
    common = (*codebook, torch.tensor([0.3]), 0.4)
    check_taped(triton_selection.select_tiles, (q, k, *masked, *common, 8, 8, 0.3, 2.0, "pq", 0))
    check_taped(triton_selection.select_keys, (q, k, *masked, *common, 0.3, 2.0, "pq", 0))
    lists, rest = tile_lists(q, k, 8, 8), (expr, expr_in, torch.tensor([5]), 0.2, 0.3, 2.0, "nan", 8, 8)
    check_taped(triton_attention.tile_attention, (q, k, v, bias, *lists, *rest))
    out, lse = triton_attention.tile_attention(q, k, v, bias, *lists, *rest)
    needs = [True, True, True, bias is not None]
    check_taped(triton_attention.tile_attention_backward, (torch.randn_like(out), q, k, v, bias, out, lse, *lists, *rest, needs))
