"""Selection of tiles and keys on GPUs, by kernels generated from `templates/`.

Every function here has the arguments of its op and launches kernels; `supports_*` says beforehand whether it can. What
is not supported runs the reference of the op. Nothing synchronises with the host.
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
    before_hopper,
    bias_arguments,
    bias_structure,
    ceil_div,
    launch,
    mask_of,
    next_power_of_2,
    on_hip,
    product_precision,
    strides,
    supports_mask,
)
from spt_compiler.lowering.triton_tuning import Setting
from spt_compiler.ops import reference
from spt_compiler.ops.selection.common import causal_split, max_keys, max_tiles, millionths, stored

MAX_HEAD_DIM = 256
# Scores of one row are held in registers by one program while its best are found.
MAX_ROW = 32768
# Scores of single keys are made for so many bytes of rows at a time.
SCRATCH_BYTES = 256 << 20


def supports_heads(q: Tensor, k: Tensor, bias: Tensor | None, expr: str, expr_in: list[Tensor]) -> Reject | None:
    """None where kernels can read these tensors and this mask, else the reason."""
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


def supports_tiles(tile_q: int, tile_k: int) -> Reject | None:
    """None where kernels can work on tiles of this size, else the reason."""
    if tile_k & (tile_k - 1) or not 1 <= tile_k <= 128:
        return Reject("tile_k {} is not a power of two up to 128", tile_k)
    return None if 1 <= tile_q <= 128 else Reject("tile_q {} above 128", tile_q)


_DOT_TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


# ---------------------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------------------


def _supports_selection(q, k, bias, expr, expr_in, codebook, budget, rule, rules) -> Reject | None:
    reason = supports_heads(q, k, bias, expr, expr_in)
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


def pool_tiles(x: Tensor, tile_k: int, dtype: torch.dtype) -> Tensor:
    """Means over tiles of tile_k tokens: x [B, H, T, D] -> [B, H, ceil(T / tile_k), D] contiguous, of `dtype`."""
    batch, n_heads, length, dim = x.shape
    n_tiles = ceil_div(length, tile_k)
    pooled = x.new_empty((batch, n_heads, n_tiles, dim), dtype=dtype)
    block_d = max(16, next_power_of_2(dim))
    block_t = 16 if block_d > 128 else 32
    launch(
        "pool_tiles",
        {},
        "pool_tiles_kernel",
        (batch * n_heads, ceil_div(n_tiles, block_t)),
        {
            "x_ptr": x,
            "pooled_ptr": pooled,
            **strides("x", x, "bhtd"),
            "n_heads": n_heads,
            "n_rows": length,
            "n_tiles": n_tiles,
        },
        {"HEAD_DIM": dim, "TILE_K": tile_k, "BLOCK_T": block_t, "BLOCK_D": block_d},
    )
    return pooled


def supports_select_tiles(
    q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, tile_q, tile_k, scale, softcap, rule, min_keys
) -> Reject | None:
    """None where the kernels can run `spt::select_tiles_v1`, else the reason."""
    reason = _supports_selection(q, k, bias, expr, expr_in, codebook, budget, rule, ("pq", "mean"))
    reason = reason if reason is not None else supports_tiles(tile_q, tile_k)
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
        return stored(q.new_full((*rows, width), -1, dtype=torch.int32), q.new_full(rows, -1, dtype=torch.int32), tiles=True)
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
    crowded = causal or not plain
    tile_constants = {"HEAD_DIM": dim, "TILE_K": tile_k}
    args = {"budget_ptr": budget, "scores_ptr": scores}
    if plain:
        args["pooled_ptr"] = pool_tiles(keys, tile_k, dtype)
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
            **bias_arguments(bias, (*q.shape[:3], n_k)),
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
            "BLOCK_P": 64 if block_d <= (128 if before_hopper() and not causal else 64) else 32,
            "BLOCK_D": block_d,
            "PRECISION": product_precision(dtype),
        },
        num_warps=8 if dtype == torch.float32 or (crowded and not on_hip()) else 4,
        # Triton 3.7 cannot pipeline its two loops for AMD chips.
        num_stages=1 if dtype == torch.float32 or on_hip() else 2,
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
        alternatives=tuple(Setting(warps, 2) for warps in (1, 2, 8, 16)),
    )
    return stored(tiles, counts, tiles=True)


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
        return stored(q.new_full((*rows, width), -1, dtype=torch.int32), q.new_full(rows, -1, dtype=torch.int32), tiles=False)
    keys = q.new_empty((batch, n_heads, n_q, width), dtype=torch.int32)
    counts = q.new_empty((batch, n_heads, n_q), dtype=torch.int32)
    mask = mask_of(expr, expr_in)
    dtype = _dot_dtype(q, k)
    match = rule == "pq-match"
    block_d = max(16, next_power_of_2(dim))
    args: dict[str, Any] = {
        "budget_ptr": budget,
        **bias_arguments(bias, (*q.shape[:3], n_k)),
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
        "bias": bias_structure(bias),
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
    return stored(keys, counts, tiles=False)


def _selection_structure(
    bias: Tensor | None, mask: Mask, softcap: float | None, dtype: torch.dtype, pooled: bool, causal: bool
) -> dict[str, Any]:
    return {
        "bias": bias_structure(bias),
        **mask.structure,
        "softcap": softcap is not None,
        "dot_type": _DOT_TYPES[dtype],
        "pooled": pooled,
        "causal": causal,
    }


for _op, _run, _supports_op in (
    ("select_tiles_v1", select_tiles, supports_select_tiles),
    ("select_keys_v1", select_keys, supports_select_keys),
):
    registry.register(_op, "cuda", "triton", supports=accepts(_supports_op))(_run)
