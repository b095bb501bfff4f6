"""Attention ops on GPUs: selection and sparse attention by kernels generated from `templates/`.

Every function here has the arguments of its op and launches kernels; `supports_*` says beforehand whether it can. What
is not supported, and the backward passes, run the reference of the op. Nothing synchronises with the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_compiler.errors import Reject
from spt_compiler.lowering import registry
from spt_compiler.lowering.triton_common import (
    DTYPES,
    Mask,
    accepts,
    available,
    byte_view,
    ceil_div,
    dropout_threshold,
    launch,
    mask_of,
    next_power_of_2,
    product_precision,
    strides,
    supports_mask,
)
from spt_compiler.ops import reference
from spt_compiler.ops.selection.common import causal_split, max_keys, max_tiles, millionths

MAX_HEAD_DIM = 256
# Scores of one row are held in registers by one program while its best are found.
MAX_ROW = 32768
# Scores of single keys are made for so many bytes of rows at a time.
SCRATCH_BYTES = 256 << 20


def _supports(q: Tensor, k: Tensor, bias: Tensor | None, expr: str, expr_in: list[Tensor]) -> Reject | None:
    if not available():
        return Reject("triton is not installed")
    for name, x in (("q", q), ("k", k)):
        if x.dtype not in DTYPES:
            return Reject("{} has dtype {}", name, x.dtype)
    if 0 in q.shape or 0 in k.shape:
        return Reject("an empty tensor: q {}, k {}", tuple(q.shape), tuple(k.shape))
    if q.shape[3] > MAX_HEAD_DIM:
        return Reject("head dimension {} above {}", q.shape[3], MAX_HEAD_DIM)
    if bias is not None and bias.dtype not in (*DTYPES, torch.bool):
        return Reject("the mask has dtype {}", bias.dtype)
    for x in (k, bias, *expr_in):
        if x is not None and x.device != q.device:
            return Reject("a tensor on {}, q is on {}", x.device, q.device)
    return supports_mask(expr, expr_in)


def _supports_tiles(tile_q: int, tile_k: int) -> Reject | None:
    if tile_k & (tile_k - 1) or not 1 <= tile_k <= 128:
        return Reject("tile_k {} is not a power of two up to 128", tile_k)
    return None if 1 <= tile_q <= 128 else Reject("tile_q {} above 128", tile_q)


def _bias_structure(bias: Tensor | None) -> str | None:
    return None if bias is None else "bool" if bias.dtype == torch.bool else "float"


def _bias_arguments(bias: Tensor | None, shape: tuple[int, ...]) -> dict[str, Any]:
    if bias is None:
        return {}
    view = byte_view(bias).expand(shape)
    return {"bias_ptr": view, **strides("bias", view, "bhqk")}


def _attention_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Mask,
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constants of the template, run-time arguments) that all attention kernels share."""
    dropout = p > 0 and seed is not None
    structure = {"bias": _bias_structure(bias), **mask.structure, "dropout": dropout, "softcap": softcap is not None}
    args = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        **strides("q", q, "bhtd"),
        **strides("k", k, "bhtd"),
        **strides("v", v, "bhtd"),
        **_bias_arguments(bias, (*q.shape[:3], k.shape[2])),
        **mask.args,
        "scale": float(scale),
        "n_heads": q.shape[1],
        "n_q": q.shape[2],
        "n_k": k.shape[2],
    }
    if dropout:
        args |= {"seed_ptr": seed, "threshold": dropout_threshold(p), "keep_scale": 0.0 if p >= 1 else 1.0 / (1.0 - p)}
    if softcap is not None:
        args["softcap"] = float(softcap)
    return structure, args


def _blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    return {
        "HEAD_DIM": q.shape[3],
        "VALUE_DIM": v.shape[3],
        "BLOCK_D": max(16, next_power_of_2(q.shape[3])),
        "BLOCK_DV": max(16, next_power_of_2(v.shape[3])),
    }


_DOT_TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


# ---------------------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------------------


def _supports_selection(q, k, bias, expr, expr_in, codebook, budget, rule, rules) -> Reject | None:
    reason = _supports(q, k, bias, expr, expr_in)
    if reason is not None:
        return reason
    if rule not in rules:
        return Reject("there is no kernel for selection rule {}", rule)
    if codebook is not None and codebook.shape[2] > 256:
        return Reject("{} codewords do not fit a byte", codebook.shape[2])
    return None if budget.device == q.device else Reject("the budget is on {}", budget.device)


def _dot_dtype(q: Tensor, k: Tensor) -> torch.dtype:
    """The type in which scores are multiplied: the common one, float32 where the two differ."""
    return q.dtype if q.dtype == k.dtype else torch.float32


def pq_assign(
    codebook: Tensor, x: Tensor, mean: Tensor | None, *, codes: bool, decoded: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Codes [B, H, T, P] uint8 and decoded vectors [B, H, T, D] of x [B, H, T, D]; None for what is not asked for.

    H may be a multiple of the codebook's heads (queries); ties and NaN as in `pq.assign`.
    """
    batch, n_heads, length, dim = x.shape
    n_groups, n_subspaces, n_codewords, width = codebook.shape
    code_out = x.new_empty((batch, n_heads, length, n_subspaces), dtype=torch.uint8) if codes else None
    decoded_out = None if decoded is None else x.new_empty((batch, n_heads, length, dim), dtype=decoded)
    args = {
        "x_ptr": x,
        "codebook_ptr": codebook.float().contiguous(),
        **strides("x", x, "bhtd"),
        "n_heads": n_heads,
        "n_rows": length,
    }
    args |= {"mean_ptr": mean.float().contiguous()} if mean is not None else {}
    args |= {"codes_ptr": code_out} if code_out is not None else {}
    args |= {"decoded_ptr": decoded_out} if decoded_out is not None else {}
    block_n = 128
    launch(
        "pq_assign",
        {"mean": mean is not None, "codes": codes, "decoded": decoded is not None},
        "pq_assign_kernel",
        (batch * n_heads, ceil_div(length, block_n), n_subspaces),
        args,
        {
            "GROUP": n_heads // n_groups,
            "N_SUBSPACES": n_subspaces,
            "N_CODEWORDS": n_codewords,
            "WIDTH": width,
            "BLOCK_N": block_n,
            "BLOCK_S": next_power_of_2(width),
        },
    )
    return code_out, decoded_out


def supports_select_tiles(
    q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, tile_q, tile_k, scale, softcap, rule, min_keys
) -> Reject | None:
    """None where the kernels can run `spt::select_tiles_v1`, else the reason."""
    reason = _supports_selection(q, k, bias, expr, expr_in, codebook, budget, rule, ("pq", "mean"))
    reason = reason if reason is not None else _supports_tiles(tile_q, tile_k)
    if reason is None and ceil_div(k.shape[2], tile_k) > MAX_ROW:
        reason = Reject("{} key tiles, more than {}", ceil_div(k.shape[2], tile_k), MAX_ROW)
    return reason


def select_tiles(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    expr: str,
    expr_in: list[Tensor],
    codebook: Tensor | None,
    key_mean: Tensor | None,
    budget: Tensor,
    max_density: float,
    tile_q: int,
    tile_k: int,
    scale: float,
    softcap: float | None,
    rule: str,
    min_keys: int,
) -> tuple[Tensor, Tensor]:
    """`spt::select_tiles_v1`: (decode,) pool, score, top-K.

    Without a mask, or under the plain causal one, whole tiles are scored through their pooled keys, which costs 1 /
    tile_k of dense scores; any other mask weights the keys of a tile differently for each query and needs the scores
    of all keys.
    """
    reference.check_selection(q, k, bias, codebook, key_mean, budget)
    reference.check_rule(rule, "tile", codebook)
    batch, n_heads, n_q, dim = q.shape
    n_groups, n_k = k.shape[1:3]
    n_query_tiles, n_key_tiles = ceil_div(n_q, tile_q), ceil_div(n_k, tile_k)
    width = max_tiles(n_k, max_density, tile_q, tile_k)
    rows = (batch, n_groups, n_query_tiles)
    if n_k < min_keys:
        return q.new_full((*rows, width), -1, dtype=torch.int32), q.new_full(rows, -1, dtype=torch.int32)
    tiles, counts = q.new_empty((*rows, width), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)
    scores = q.new_full((*rows, n_key_tiles), -1.0, dtype=torch.float32)

    dtype = _dot_dtype(q, k)
    keys: Tensor | None = k
    if rule == "pq":
        assert codebook is not None
        keys = pq_assign(codebook, k, key_mean, codes=False, decoded=dtype)[1]
    assert keys is not None
    mask = mask_of(expr, expr_in)
    is_causal, others = causal_split(expr)
    plain = bias is None and others is None
    causal = plain and is_causal
    block_d = max(16, next_power_of_2(dim))
    block_t = max(1, max(16, 64 if block_d <= 128 else 32) // tile_k)
    tile_constants = {"HEAD_DIM": dim, "TILE_K": tile_k}
    args = {"budget_ptr": budget, "scores_ptr": scores}
    if plain:
        pooled = q.new_empty((batch, n_groups, n_key_tiles, dim), dtype=dtype)
        pool_block = 16 if block_d > 128 else 32
        launch(
            "select_tiles",
            _selection_structure(None, mask_of("", []), softcap, dtype, True, causal),
            "select_tiles_pool_kernel",
            (batch * n_groups, ceil_div(n_key_tiles, pool_block)),
            {
                "k_ptr": keys,
                "pooled_ptr": pooled,
                **strides("k", keys, "bhtd"),
                "n_groups": n_groups,
                "n_k": n_k,
                "n_key_tiles": n_key_tiles,
            },
            {**tile_constants, "BLOCK_T": pool_block, "BLOCK_D": block_d},
        )
        args["pooled_ptr"] = pooled
        mask = mask_of("k <= q" if causal else "", [])
    structure = _selection_structure(bias, mask, softcap, dtype, plain, causal)
    launch(
        "select_tiles",
        structure,
        "select_tiles_scores_kernel",
        (n_query_tiles * n_groups * batch,),
        {
            **args,
            "q_ptr": q,
            "k_ptr": keys,
            **strides("q", q, "bhtd"),
            **strides("k", keys, "bhtd"),
            **_bias_arguments(bias, (*q.shape[:3], n_k)),
            **mask.args,
            "scale": float(scale),
            **({} if softcap is None else {"softcap": float(softcap)}),
            "n_heads": n_heads,
            "n_q": n_q,
            "n_k": n_k,
            "n_query_tiles": n_query_tiles,
            "n_key_tiles": n_key_tiles,
        },
        {
            **tile_constants,
            "GROUP": n_heads // n_groups,
            "TILE_Q": tile_q,
            "BLOCK_M": max(16, next_power_of_2(tile_q)),
            "BLOCK_N": block_t * tile_k,
            "BLOCK_T": block_t,
            "BLOCK_P": 64 if block_d <= 64 else 32,
            "BLOCK_D": block_d,
            "PRECISION": product_precision(dtype),
        },
        num_warps=8 if dtype == torch.float32 else 4,
        num_stages=1 if dtype == torch.float32 else 2,
    )
    block = next_power_of_2(n_key_tiles)
    launch(
        "select_tiles",
        structure,
        "select_tiles_top_kernel",
        (n_query_tiles * n_groups * batch,),
        {
            "scores_ptr": scores,
            "budget_ptr": budget,
            "tiles_ptr": tiles,
            "counts_ptr": counts,
            "n_q": n_q,
            "n_k": n_k,
            "n_query_tiles": n_query_tiles,
            "n_key_tiles": n_key_tiles,
            "k_max": width,
            "max_millionths": millionths(max_density),
        },
        {
            "TILE_Q": tile_q,
            "TILE_K": tile_k,
            "DIAGONAL": is_causal and n_q == n_k,
            "BLOCK_T": block,
            "BLOCK_W": next_power_of_2(width),
        },
        num_warps=4 if block <= 2048 else 8,
    )
    return tiles, counts


def supports_select_keys(
    q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, scale, softcap, rule, min_keys
) -> Reject | None:
    """None where the kernels can run `spt::select_keys_v1`, else the reason."""
    reason = _supports_selection(q, k, bias, expr, expr_in, codebook, budget, rule, ("pq", "pq-match"))
    if reason is None and k.shape[2] > MAX_ROW:
        reason = Reject("{} keys, more than {}", k.shape[2], MAX_ROW)
    return reason


def select_keys(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    expr: str,
    expr_in: list[Tensor],
    codebook: Tensor | None,
    key_mean: Tensor | None,
    budget: Tensor,
    max_density: float,
    scale: float,
    softcap: float | None,
    rule: str,
    min_keys: int,
) -> tuple[Tensor, Tensor]:
    """`spt::select_keys_v1`: quantise, score, top-L; few heads at a time, so that the scores fit a bounded scratch."""
    reference.check_selection(q, k, bias, codebook, key_mean, budget)
    chosen = reference.check_rule(rule, "token", codebook)
    assert codebook is not None
    batch, n_heads, n_q, dim = q.shape
    n_k = k.shape[2]
    width = max_keys(n_k, max_density)
    if n_k < min_keys:
        rows = (batch, n_heads, n_q)
        return q.new_full((*rows, width), -1, dtype=torch.int32), q.new_full(rows, -1, dtype=torch.int32)
    keys = q.new_empty((batch, n_heads, n_q, width), dtype=torch.int32)
    counts = q.new_empty((batch, n_heads, n_q), dtype=torch.int32)
    mask = mask_of(expr, expr_in)
    dtype = _dot_dtype(q, k)
    match = rule == "pq-match"
    block_d = max(16, next_power_of_2(dim))
    args: dict[str, Any] = {
        "budget_ptr": budget,
        **_bias_arguments(bias, (*q.shape[:3], n_k)),
        **mask.args,
        "n_heads": n_heads,
        "n_q": n_q,
        "n_k": n_k,
    }
    if match:
        args["q_codes_ptr"] = pq_assign(codebook, q, None, codes=True, decoded=None)[0]
        args["k_codes_ptr"] = pq_assign(codebook, k, key_mean, codes=True, decoded=None)[0]
    else:
        decoded = pq_assign(codebook, k, key_mean, codes=False, decoded=dtype)[1]
        assert decoded is not None
        args |= {"q_ptr": q, "k_ptr": decoded, **strides("q", q, "bhtd"), **strides("k", decoded, "bhtd")}
        args |= {"scale": float(scale), **({} if softcap is None else {"softcap": float(softcap)})}
    structure = {
        "bias": _bias_structure(bias),
        **mask.structure,
        "softcap": softcap is not None,
        "dot_type": _DOT_TYPES[dtype],
        "match": match,
    }
    block_m, block_n = 64, 64
    at_a_time = max(1, min(batch * n_heads, SCRATCH_BYTES // (4 * n_q * n_k), 65535))
    scores = q.new_empty((at_a_time, n_q, n_k), dtype=torch.float32)
    for first in range(0, batch * n_heads, at_a_time):
        run = min(at_a_time, batch * n_heads - first)
        launch(
            "select_keys",
            structure,
            "select_keys_scores_kernel",
            (ceil_div(n_q, block_m), ceil_div(n_k, block_n), run),
            {**args, "scores_ptr": scores, "first_head": first},
            {
                "GROUP": n_heads // k.shape[1],
                "HEAD_DIM": dim,
                "N_SUBSPACES": codebook.shape[1],
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_D": block_d,
                "PRECISION": product_precision(dtype),
            },
        )
        launch(
            "select_keys",
            structure,
            "select_keys_top_kernel",
            (run * n_q,),
            {
                "scores_ptr": scores,
                "budget_ptr": budget,
                "keys_ptr": keys,
                "counts_ptr": counts,
                "first_row": first * n_q,
                "n_q": n_q,
                "n_k": n_k,
                "n_kept": width,
                "max_millionths": millionths(max_density),
            },
            {"NEAREST": chosen.nearest, "BLOCK_N": next_power_of_2(n_k), "BLOCK_W": next_power_of_2(width)},
            num_warps=4 if n_k <= 2048 else 16,
        )
    return keys, counts


def _selection_structure(
    bias: Tensor | None, mask: Mask, softcap: float | None, dtype: torch.dtype, pooled: bool, causal: bool
) -> dict[str, Any]:
    return {
        "bias": _bias_structure(bias),
        **mask.structure,
        "softcap": softcap is not None,
        "dot_type": _DOT_TYPES[dtype],
        "pooled": pooled,
        "causal": causal,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Attention over tiles
# ---------------------------------------------------------------------------------------------------------------------


def supports_tile_attention(
    q, k, v, bias, tiles, counts, expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k
) -> Reject | None:
    """None where the kernels can run `spt::tile_attention_v1`, else the reason."""
    reason = _supports(q, k, bias, expr, expr_in)
    reason = reason if reason is not None else _supports_tiles(tile_q, tile_k)
    if reason is None and not 0 < v.shape[3] <= MAX_HEAD_DIM:
        reason = Reject("value dimension {} outside 1 to {}", v.shape[3], MAX_HEAD_DIM)
    return reason


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    tiles: Tensor,
    counts: Tensor,
    expr: str,
    expr_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
    empty: str,
    tile_q: int,
    tile_k: int,
) -> tuple[Tensor, Tensor]:
    """`spt::tile_attention_v1` by one kernel: one program per query tile, head and batch row, online softmax."""
    reference.check_attention(q, k, v, bias, tiles, counts, seed, p, empty, tile_q, tile_k)
    batch, n_heads, n_q, _ = q.shape
    out = q.new_empty((batch, n_heads, n_q, v.shape[3]))
    lse = q.new_empty((batch, n_heads, n_q), dtype=torch.float32)
    structure, args = _attention_arguments(q, k, v, bias, mask_of(expr, expr_in), seed, p, scale, softcap)
    n_query_tiles = ceil_div(n_q, tile_q)
    blocks = _blocks(q, v)
    block_m = max(16, next_power_of_2(tile_q))
    wide = max(blocks["BLOCK_D"], blocks["BLOCK_DV"]) > 128 or q.dtype == torch.float32
    # Four warps would spill registers: accumulators of 128 rows, of the mean of all values, or of float32 heads above
    # 64.
    wide_values = blocks["BLOCK_DV"] > 64
    crowded = block_m >= 128 or (wide_values and (empty == "uniform" or q.dtype == torch.float32))
    launch(
        "tile_attention_fwd",
        {**structure, "empty": empty},
        "tile_attention_fwd_kernel",
        (n_query_tiles * n_heads * batch,),
        {
            **args,
            "out_ptr": out,
            **strides("out", out, "bhtd"),
            "lse_ptr": lse,
            "tiles_ptr": tiles.contiguous(),
            "counts_ptr": counts.contiguous(),
            "n_query_tiles": n_query_tiles,
            "n_key_tiles": ceil_div(k.shape[2], tile_k),
            "k_max": tiles.shape[3],
        },
        {
            **blocks,
            "GROUP": n_heads // k.shape[1],
            "TILE_Q": tile_q,
            "TILE_K": tile_k,
            "BLOCK_M": block_m,
            "BLOCK_N": max(tile_k, 32 if wide else 64),
            "PRECISION": product_precision(q.dtype),
        },
        num_warps=8 if crowded else 4,
        num_stages=1 if q.dtype == torch.float32 else 2,
    )
    return out, lse


def supports_tile_attention_backward(
    grad_out,
    q,
    k,
    v,
    bias,
    out,
    lse,
    tiles,
    counts,
    expr,
    expr_in,
    seed,
    p,
    scale,
    softcap,
    empty,
    tile_q,
    tile_k,
    needs,
) -> Reject | None:
    """None where the kernels can run `spt::tile_attention_backward_v1`, else the reason."""
    rest = (expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k)
    reason = supports_tile_attention(q, k, v, bias, tiles, counts, *rest)
    if reason is None and grad_out.dtype != q.dtype:
        reason = Reject("the gradient has dtype {}, q has {}", grad_out.dtype, q.dtype)
    if reason is None and needs[3] and bias is not None and bias.is_floating_point():
        reason = Reject("there is no kernel for the gradient of a mask")
    if reason is None and p > 0 and empty == "uniform" and _may_be_empty(bias, expr):
        reason = Reject("dropout of rows that see nothing and return the mean of all values")
    return reason


def _may_be_empty(bias: Tensor | None, expr: str) -> bool:
    """Whether a query may be forbidden every key; the causal mask alone always leaves it the first one."""
    return bias is not None or bool(expr and causal_split(expr)[1] is not None)


def transpose_lists(tiles: Tensor, counts: Tensor, n_key_tiles: int) -> dict[str, Tensor]:
    """The lists turned round, as arguments of the dK, dV kernel: for every key tile the query tiles that keep it.

    Args: tiles: [B, Hkv, nQ, k_max] and counts [B, Hkv, nQ] int32, contiguous.
    Returns: marks_ptr [B, Hkv, nQ, nK] int8; starts_ptr, ends_ptr [B, Hkv, nK] int32 into rows_ptr [B, Hkv, nQ * k_max]
        int32; anyone_ptr [B, Hkv] int8, whether some row of the head lists everything (count -1, which is not listed).
    """
    batch, n_groups, n_query_tiles, k_max = tiles.shape
    marks = tiles.new_zeros((batch, n_groups, n_query_tiles, n_key_tiles), dtype=torch.int8)
    rows = tiles.new_empty((batch, n_groups, n_query_tiles * k_max))
    launch(
        "transpose_lists",
        {},
        "transpose_lists_mark_kernel",
        (batch * n_groups * n_query_tiles,),
        {"tiles_ptr": tiles, "counts_ptr": counts, "marks_ptr": marks, "k_max": k_max, "n_key_tiles": n_key_tiles},
        {"BLOCK_W": next_power_of_2(k_max)},
    )
    ends = marks.sum(2, dtype=torch.int32).cumsum(-1, dtype=torch.int32)
    starts = torch.nn.functional.pad(ends[..., :-1], (1, 0))
    launch(
        "transpose_lists",
        {},
        "transpose_lists_fill_kernel",
        (batch * n_groups, ceil_div(n_key_tiles, 64)),
        {
            "marks_ptr": marks,
            "starts_ptr": starts,
            "rows_ptr": rows,
            "n_query_tiles": n_query_tiles,
            "n_key_tiles": n_key_tiles,
            "k_max": k_max,
        },
        {"BLOCK_I": 32, "BLOCK_T": 64},
    )
    anyone = (counts < 0).any(-1).to(torch.int8)
    return {"marks_ptr": marks, "starts_ptr": starts, "ends_ptr": ends, "rows_ptr": rows, "anyone_ptr": anyone}


def tile_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    counts: Tensor,
    expr: str,
    expr_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
    empty: str,
    tile_q: int,
    tile_k: int,
    needs: list[bool],
) -> list[Tensor]:
    """`spt::tile_attention_backward_v1`: dQ along the lists, then dK and dV along the transposed lists; no atomics."""
    batch, n_heads, n_q, _ = q.shape
    n_groups, n_k, value_dim = k.shape[1], k.shape[2], v.shape[3]
    n_query_tiles, n_key_tiles = ceil_div(n_q, tile_q), ceil_div(n_k, tile_k)
    special = empty != "zero" and _may_be_empty(bias, expr)
    structure, args = _attention_arguments(q, k, v, bias, mask_of(expr, expr_in), seed, p, scale, softcap)
    structure = {**structure, "special": special}
    tiles, counts, lse = tiles.contiguous(), counts.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    dq = q.new_empty(q.shape)
    args |= {
        "dout_ptr": grad_out,
        **strides("dout", grad_out, "bhtd"),
        "lse_ptr": lse,
        "delta_ptr": delta,
        "counts_ptr": counts,
        "n_query_tiles": n_query_tiles,
        "n_key_tiles": n_key_tiles,
        "k_max": tiles.shape[3],
    }
    blocks = _blocks(q, v)
    wide = max(blocks["BLOCK_D"], blocks["BLOCK_DV"])
    full = q.dtype == torch.float32
    constants = {
        **blocks,
        "GROUP": n_heads // n_groups,
        "TILE_Q": tile_q,
        "TILE_K": tile_k,
        "BLOCK_M": max(16, next_power_of_2(tile_q)),
        "PRECISION": product_precision(q.dtype),
    }
    nothing = q.new_empty((batch, n_heads, n_q), dtype=torch.int8) if special else None
    launch(
        "tile_attention_bwd",
        structure,
        "tile_attention_bwd_kernel_dq",
        (n_query_tiles * n_heads * batch,),
        {
            **args,
            "out_ptr": out.contiguous(),
            "tiles_ptr": tiles,
            "dq_ptr": dq,
            **({} if nothing is None else {"nothing_ptr": nothing}),
        },
        {**constants, "BLOCK_N": max(tile_k, 32 if wide > 64 or full else 64)},
        num_warps=8 if wide > 128 or full else 4,
        num_stages=1 if full or wide > 128 else 2,
    )
    # Tensors of their own where nothing is asked for: results of an op must not alias each other.
    grads = [dq if needs[0] else q.new_empty(0), *(q.new_empty(0) for _ in range(3))]
    if needs[1] or needs[2]:
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        if nothing is not None:
            # A query that sees nothing returns NaN, or the mean of all values: the same gradient for each of them.
            weight = torch.where(nothing.unsqueeze(-1) != 0, torch.nan if empty == "nan" else 1.0 / n_k, 0.0)
            blank = torch.where(nothing.unsqueeze(-1) != 0, grad_out.float() * weight, 0.0)
            args["dv_base_ptr"] = blank.sum(2).view(batch, n_groups, -1, value_dim).sum(2)
        launch(
            "tile_attention_bwd",
            structure,
            "tile_attention_bwd_kernel_dkdv",
            (n_key_tiles * n_groups * batch,),
            {**args, **transpose_lists(tiles, counts, n_key_tiles), "dk_ptr": dk, "dv_ptr": dv},
            {**constants, "BLOCK_N": max(16, tile_k)},
            num_warps=8 if wide > 128 or full else 4,
            num_stages=1 if full or wide > 128 else 2,
        )
        for i, grad in ((1, dk), (2, dv)):
            if needs[i]:
                grads[i] = grad
    return grads


# ---------------------------------------------------------------------------------------------------------------------
# Attention over single keys
# ---------------------------------------------------------------------------------------------------------------------


def supports_key_attention(q, k, v, bias, keys, counts, expr, expr_in, seed, p, scale, softcap, empty) -> Reject | None:
    """None where the kernels can run `spt::key_attention_v1`, else the reason."""
    reason = _supports(q, k, bias, expr, expr_in)
    if reason is None and not 0 < v.shape[3] <= MAX_HEAD_DIM:
        reason = Reject("value dimension {} outside 1 to {}", v.shape[3], MAX_HEAD_DIM)
    return reason


def key_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    counts: Tensor,
    expr: str,
    expr_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
    empty: str,
) -> tuple[Tensor, Tensor]:
    """`spt::key_attention_v1` by one kernel: one program per query, keys gathered row by row."""
    reference.check_attention(q, k, v, bias, keys, counts, seed, p, empty)
    batch, n_heads, n_q, _ = q.shape
    out = q.new_empty((batch, n_heads, n_q, v.shape[3]))
    lse = q.new_empty((batch, n_heads, n_q), dtype=torch.float32)
    structure, args = _attention_arguments(q, k, v, bias, mask_of(expr, expr_in), seed, p, scale, softcap)
    blocks = _blocks(q, v)
    launch(
        "key_attention_fwd",
        {**structure, "empty": empty},
        "key_attention_fwd_kernel",
        (n_q * n_heads * batch,),
        {
            **args,
            "out_ptr": out,
            **strides("out", out, "bhtd"),
            "lse_ptr": lse,
            "keys_ptr": keys.contiguous(),
            "counts_ptr": counts.contiguous(),
            "n_slots": keys.shape[3],
        },
        {
            **blocks,
            "GROUP": n_heads // k.shape[1],
            "BLOCK_N": 32 if max(blocks["BLOCK_D"], blocks["BLOCK_DV"]) <= 128 else 16,
        },
        num_warps=4,
        num_stages=2,
    )
    return out, lse


for _op, _run, _supports_op in (
    ("select_tiles_v1", select_tiles, supports_select_tiles),
    ("select_keys_v1", select_keys, supports_select_keys),
    ("tile_attention_v1", tile_attention, supports_tile_attention),
    ("tile_attention_backward_v1", tile_attention_backward, supports_tile_attention_backward),
    ("key_attention_v1", key_attention, supports_key_attention),
):
    registry.register(_op, "cuda", "triton", supports=accepts(_supports_op))(_run)
