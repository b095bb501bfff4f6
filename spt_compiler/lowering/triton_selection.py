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
    on_hopper,
    product_precision,
    strides,
    supports_mask,
)
from spt_compiler.lowering.triton_tuning import Setting
from spt_compiler.ops import reference
from spt_compiler.ops.selection.common import causal_split, forced_tiles, max_keys, max_tiles, millionths, stored

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
    codebook: Tensor,
    x: Tensor,
    mean: Tensor | None,
    *,
    codes: bool = False,
    decoded: torch.dtype | None = None,
    pooled: torch.dtype | None = None,
    tile_k: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Codes [B, H, T, P] uint8, decoded vectors [B, H, T, D] of x [B, H, T, D], and the means of these over tiles of tile_k,
    [B, H, ceil(T / tile_k), D]; None for what is not asked for.

    H may be a multiple of the codebook's heads (queries); ties and NaN as in `pq.assign`.
    """
    batch, n_heads, length, dim = x.shape
    n_groups, n_subspaces, n_codewords, width = codebook.shape
    n_tiles = ceil_div(length, tile_k)
    code_out = x.new_empty((batch, n_heads, length, n_subspaces), dtype=torch.uint8) if codes else None
    decoded_out = None if decoded is None else x.new_empty((batch, n_heads, length, dim), dtype=decoded)
    pooled_out = None if pooled is None else x.new_empty((batch, n_heads, n_tiles, dim), dtype=pooled)
    # A program reads 64 bytes of 16-bit rows; its threads share codewords among as many rows as fit their registers.
    block_s = next_power_of_2(width)
    block_p = max(1, 32 // block_s)
    block_n = max(tile_k, min(128 if block_s <= 4 else 64, 4096 // (block_p * block_s)))
    n_row_blocks = ceil_div(length, block_n)
    args = {
        "x_ptr": x,
        "codebook_ptr": codebook.float().contiguous(),
        **strides("x", x, "bhtd"),
        "n_heads": n_heads,
        "n_rows": length,
        "n_row_blocks": n_row_blocks,
    }
    args |= {"mean_ptr": mean.float().contiguous()} if mean is not None else {}
    args |= {"codes_ptr": code_out} if code_out is not None else {}
    args |= {"decoded_ptr": decoded_out} if decoded_out is not None else {}
    args |= {"pooled_ptr": pooled_out, "n_tiles": n_tiles} if pooled_out is not None else {}
    launch(
        "pq_assign",
        {"mean": mean is not None, "codes": codes, "decoded": decoded is not None, "pooled": pooled is not None},
        "pq_assign_kernel",
        (ceil_div(n_subspaces, block_p) * n_row_blocks * batch * n_heads,),
        args,
        {
            "GROUP": n_heads // n_groups,
            "N_SUBSPACES": n_subspaces,
            "N_CODEWORDS": n_codewords,
            "WIDTH": width,
            "TILE_K": tile_k,
            "BLOCK_N": block_n,
            "BLOCK_P": block_p,
            "BLOCK_S": block_s,
        },
        num_warps=8 if before_hopper() else 4,
    )
    return code_out, decoded_out, pooled_out


def pool_tiles(x: Tensor, tile_k: int, dtype: torch.dtype) -> Tensor:
    """Means over tiles of tile_k tokens: x [B, H, T, D] -> [B, H, ceil(T / tile_k), D] contiguous, of `dtype`."""
    batch, n_heads, length, dim = x.shape
    n_tiles = ceil_div(length, tile_k)
    pooled = x.new_empty((batch, n_heads, n_tiles, dim), dtype=dtype)
    block_d = min(64, max(16, next_power_of_2(dim)))
    block_t = max(1, 128 // tile_k)
    n_tile_blocks = ceil_div(n_tiles, block_t)
    launch(
        "pool_tiles",
        {},
        "pool_tiles_kernel",
        (ceil_div(dim, block_d) * n_tile_blocks * batch * n_heads,),
        {
            "x_ptr": x,
            "pooled_ptr": pooled,
            **strides("x", x, "bhtd"),
            "n_heads": n_heads,
            "n_rows": length,
            "n_tiles": n_tiles,
            "n_tile_blocks": n_tile_blocks,
        },
        {"HEAD_DIM": dim, "TILE_K": tile_k, "BLOCK_T": block_t, "BLOCK_D": block_d},
    )
    return pooled


def _partly_seen(tile_q: int, tile_k: int) -> int:
    """Most tiles that, under the causal mask, some queries of a row see and others do not see whole."""
    if tile_k > 1 and tile_q % tile_k == 0:
        return tile_q // tile_k
    return ceil_div(tile_q - 1, tile_k) + 1


def _score_blocks(
    dim: int, group: int, tile_q: int, tile_k: int, dtype: torch.dtype, plain: bool, causal: bool
) -> tuple[dict[str, int], int, int]:
    """Block sizes of the scores kernel, its warps and its stages."""
    block_d, block_q = max(16, next_power_of_2(dim)), max(16, next_power_of_2(tile_q))
    full = dtype == torch.float32
    blocks = {"HEADS": 1, "BLOCK_Q": block_q, "BLOCK_D": block_d}
    if not plain:
        block_t = max(1, max(16, 64 if block_d <= 128 else 32) // tile_k)
        # Triton 3.7 cannot pipeline the two loops for AMD chips.
        return blocks | {"BLOCK_T": block_t, "BLOCK_P": 16}, 8 if full or not on_hip() else 4, 1 if full or on_hip() else 2
    block_t = max(next_power_of_2(_partly_seen(tile_q, tile_k)), ceil_div(16, tile_k)) if causal else 1
    # As many heads as make a product of 128 rows: each key that is read serves all of them, their masses are summed on the
    # way, and on Hopper two programs fit, one of which multiplies while the other takes exponentials.
    rows = 64 if full or (on_hip() and block_d > 128) else 128
    blocks["HEADS"] = min(next_power_of_2(group), max(1, rows // block_q))
    height = blocks["HEADS"] * block_q
    blocks |= {"BLOCK_T": block_t, "BLOCK_P": 64 if block_d <= 128 and not full else 32}
    if on_hopper() and not full and height > 64:
        return blocks, 4, 2  # measured: a fifth faster than eight warps
    return blocks, 8 if full or height > 64 else 4, 1 if full or on_hip() else 3


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

    dtype = _dot_dtype(q, k)
    is_causal, others = causal_split(expr)
    plain = bias is None and others is None
    causal = plain and is_causal
    keys: Tensor | None = k
    pooled: Tensor | None = None
    if rule == "pq" and codebook is not None:
        single, means = None if plain and not causal else dtype, dtype if plain else None
        _, keys, pooled = pq_assign(codebook, k, key_mean, decoded=single, pooled=means, tile_k=tile_k if plain else 1)
    elif plain:
        pooled = pool_tiles(k, tile_k, dtype)
    mask = mask_of("" if plain else expr, expr_in)
    blocks, num_warps, num_stages = _score_blocks(dim, n_heads // n_groups, tile_q, tile_k, dtype, plain, causal)
    n_parts = ceil_div(n_heads // n_groups, blocks["HEADS"])
    scores = q.new_empty((*rows, n_parts, n_key_tiles), dtype=torch.float32)
    args = {"q_ptr": q, "scores_ptr": scores, "budget_ptr": budget, **strides("q", q, "bhtd")}
    if pooled is not None:
        args["pooled_ptr"] = pooled
    if causal or not plain:
        assert keys is not None
        args |= {"k_ptr": keys, **strides("k", keys, "bhtd")}
    structure = _selection_structure(bias, mask, softcap, dtype, plain, causal) | {"whole_head": blocks["BLOCK_D"] == dim}
    launch(
        "select_tiles",
        structure,
        "select_tiles_scores_kernel",
        (n_parts * n_query_tiles * n_groups * batch,),
        {
            **args,
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
            "GROUP": n_heads // n_groups,
            "HEAD_DIM": dim,
            "TILE_Q": tile_q,
            "TILE_K": tile_k,
            **blocks,
            "PRECISION": product_precision(dtype),
        },
        num_warps=num_warps,
        num_stages=num_stages,
        alternatives=(Setting(4, 2), Setting(8, 2), Setting(8, 3)) if plain and blocks["HEADS"] > 1 else (),
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
            "PARTS": n_parts,
            "TILE_Q": tile_q,
            "TILE_K": tile_k,
            "DIAGONAL": is_causal and n_q == n_k,
            "FORCED": forced_tiles(tile_q, tile_k),
            "BLOCK_T": block,
            "BLOCK_W": next_power_of_2(width),
        },
        # Its 32 counts are reductions, which are cheapest within one warp.
        num_warps=max(1, min(16, block // 512)),
        # The fewer the warps, the longer the compiler takes over a long row: ten minutes and more.
        alternatives=tuple(Setting(warps, 2) for warps in (1, 2, 4, 8) if block <= 512 * warps),
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
    n_subspaces = 0
    if match:
        assert codebook is not None
        n_subspaces = codebook.shape[1]
        args["q_codes_ptr"] = pq_assign(codebook, q, None, codes=True)[0]
        args["k_codes_ptr"] = pq_assign(codebook, k, key_mean, codes=True)[0]
    else:
        # Without a codebook (a site without state) the keys are scored as they are.
        decoded = k if codebook is None else pq_assign(codebook, k, key_mean, decoded=dtype)[1]
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
                "N_SUBSPACES": n_subspaces,
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
    registry.register(_op, "cuda", "triton", supports=accepts(_supports_op), taped=True)(_run)
