"""Routed FFN on GPUs: routing and the grouped GEMMs by kernels generated from `templates/`.

Every function here has the arguments of its op and launches kernels; `supports_*` says beforehand whether it can. What
is not supported, and the backward pass, run the reference of the op. Nothing synchronises with the host: whether all
blocks are meant ("dense by data") is decided inside the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.errors import ExpressionError, Reject
from spt_compiler.lowering import registry
from spt_compiler.lowering.triton_common import (
    DTYPES,
    accepts,
    available,
    byte_view,
    ceil_div,
    dropout_threshold,
    launch,
    next_power_of_2,
    product_precision,
    strides,
)
from spt_compiler.ops.reference_ffn import check_arguments, kept_blocks, row_capacity

MAX_BLOCKS = 1024
# Row tiles that share a band of the GEMM grids.
_BAND = 8


# ---------------------------------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------------------------------


def supports_route(scores, always_on, budget, max_density, tile, min_tokens) -> Reject | None:
    """None where the kernels can run `spt::route_v1`, else the reason."""
    if not available():
        return Reject("triton is not installed")
    if scores.dtype not in DTYPES:
        return Reject("scores have dtype {}", scores.dtype)
    if 0 in scores.shape:
        return Reject("empty scores {}", tuple(scores.shape))
    if scores.shape[1] > MAX_BLOCKS:
        return Reject("{} blocks, more than {}", scores.shape[1], MAX_BLOCKS)
    if not scores.device == always_on.device == budget.device:
        return Reject("scores, always_on and budget on {}", {scores.device, always_on.device, budget.device})
    return None


def route(
    scores: Tensor, always_on: Tensor, budget: Tensor, max_density: float, tile: int, min_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`spt::route_v1` in two kernels: the blocks of each token, then the tokens of each block by counting."""
    n_tokens, n_blocks = scores.shape
    n_slots = kept_blocks(max_density, n_blocks)
    blocks = scores.new_empty((n_tokens, n_slots), dtype=torch.int32)
    rows = scores.new_full((row_capacity(n_tokens, n_slots, n_blocks, tile),), -1, dtype=torch.int32)
    offsets = scores.new_empty((n_blocks + 1,), dtype=torch.int32)
    block_g = next_power_of_2(n_blocks)
    block_m = max(16, min(256, 4096 // block_g))
    n_chunks = ceil_div(n_tokens, block_m)
    kept = scores.new_empty((n_tokens, n_blocks), dtype=torch.int8)
    counts = scores.new_empty((n_chunks, n_blocks), dtype=torch.int32)
    common = {"budget_ptr": budget, "kept_ptr": kept, "counts_ptr": counts, "n_tokens": n_tokens}
    constants = {"N_BLOCKS": n_blocks, "EVERYTHING": n_tokens < min_tokens, "BLOCK_M": block_m, "BLOCK_G": block_g}
    launch(
        "route",
        {},
        "route_top_kernel",
        (n_chunks,),
        {
            **common,
            "scores_ptr": scores,
            "always_on_ptr": byte_view(always_on.contiguous()),
            "blocks_ptr": blocks,
            **strides("scores", scores, "tg"),
        },
        {**constants, "N_SLOTS": n_slots, "BLOCK_R": next_power_of_2(n_slots)},
    )
    launch(
        "route",
        {},
        "route_rows_kernel",
        (n_chunks,),
        {**common, "rows_ptr": rows, "offsets_ptr": offsets, "n_chunks": n_chunks},
        {**constants, "TILE": tile, "BLOCK_C": max(1, min(next_power_of_2(n_chunks), 4096 // block_g))},
    )
    return blocks, rows, offsets


# ---------------------------------------------------------------------------------------------------------------------
# The FFN
# ---------------------------------------------------------------------------------------------------------------------


def _row_tile(blocks: Tensor, rows: Tensor, n_blocks: int) -> int:
    """The `tile` with which `route` made the lists: capacity = N * R + G * (tile - 1)."""
    n_tokens, n_slots = blocks.shape
    return (rows.shape[0] - n_tokens * n_slots) // n_blocks + 1


def supports_routed_ffn(
    x,
    w_in,
    b_in,
    w_out,
    b_out,
    lora_a_out,
    lora_b,
    lora_down,
    gates,
    blocks,
    rows,
    offsets,
    permutation,
    compensation,
    act_expr,
    act_in,
    seed,
    p,
    lora_seed,
    lora_p,
    save,
) -> Reject | None:
    """None where the kernels can run `spt::routed_ffn_v1`, else the reason."""
    if not available():
        return Reject("triton is not installed")
    if lora_down is not None:
        return Reject("a low-rank branch on the out-projection")
    if x.dtype not in DTYPES:
        return Reject("x has dtype {}", x.dtype)
    if 0 in x.shape or 0 in w_out.shape:
        return Reject("an empty tensor: x {}, w_out {}", tuple(x.shape), tuple(w_out.shape))
    n_blocks = offsets.shape[0] - 1
    if n_blocks > MAX_BLOCKS:
        return Reject("{} blocks, more than {}", n_blocks, MAX_BLOCKS)
    tile = _row_tile(blocks, rows, n_blocks)
    if tile % 16:
        return Reject("rows are grouped in tiles of {}, not in multiples of 16", tile)
    odd = [t.dtype for t in (*w_in, w_out, *lora_a_out, *lora_b) if t.dtype != x.dtype]
    if odd:
        return Reject("weights have dtype {}, x has {}", odd[0], x.dtype)
    for name, tensor in (("gates", gates), ("b_out", b_out), *(("act_in", a) for a in act_in)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return Reject("{} has dtype {}", name, tensor.dtype)
        if tensor is not None and tensor.device != x.device:
            return Reject("{} is on {}, x on {}", name, tensor.device, x.device)
    try:
        act = expression.parse(act_expr)
    except ExpressionError as error:
        return Reject("activation: {}", error)
    known = {f"x{i}" for i in range(len(w_in))} | {f"a{i}" for i in range(len(act_in))}
    if "x0" not in act.variables or not act.variables <= known or expression.read_ranks(act):
        return Reject("the activation {} is not a function of {}", act_expr, ", ".join(sorted(known)))
    n_units = permutation.shape[0]
    for i, a in enumerate(act_in):
        if a.dim() > 1 or (a.dim() == 1 and a.shape[0] not in (1, n_units)):
            return Reject("activation input a{} has shape {}", i, tuple(a.shape))
    return None


def routed_ffn(
    x: Tensor,
    w_in: list[Tensor],
    b_in: list[Tensor],
    w_out: Tensor,
    b_out: Tensor | None,
    lora_a_out: list[Tensor],
    lora_b: list[Tensor],
    lora_down: Tensor | None,
    gates: Tensor | None,
    blocks: Tensor,
    rows: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    compensation: Tensor | None,
    act_expr: str,
    act_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    lora_seed: Tensor | None,
    lora_p: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`spt::routed_ffn_v1`: a gathered GEMM with the activation, a GEMM into partial rows, and their sum per token.

    The same kernels are launched for the case that every block is meant, in token chunks whose hidden values fit the
    sparse capacity; whichever of the two is not asked for returns at once.
    """
    lists = (blocks, rows, offsets, permutation)
    weights, random = (w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down), (seed, p, lora_seed, lora_p)
    check_arguments(x, *weights, gates, *lists, compensation, act_in, *random)
    work = _Forward(x, w_in, b_in, w_out, lora_a_out, lora_b, gates, *lists, save)
    work.activation(act_expr, act_in, seed, p)
    work.out(b_out, compensation)
    work.run(dense=False, first_token=0, chunk=work.n_tokens)
    for first_token in range(0, work.n_tokens, work.chunk):
        work.run(dense=True, first_token=first_token, chunk=work.chunk)
    return work.y, work.saved, work.y.new_empty((work.n_tokens, 0))


class _Forward:
    """Buffers and arguments of one call; `run` launches the three kernels for the sparse case or one dense chunk."""

    def __init__(self, x, w_in, b_in, w_out, lora_a_out, lora_b, gates, blocks, rows, offsets, permutation, save):
        self.x, self.blocks, self.rows, self.offsets, self.permutation = x, blocks, rows, offsets, permutation
        self.n_tokens = x.shape[0]
        self.n_units, self.n_out = permutation.shape[0], w_out.shape[0]
        self.n_blocks = offsets.shape[0] - 1
        self.n_slots = blocks.shape[1]
        self.width = ceil_div(self.n_units, self.n_blocks)
        capacity = rows.shape[0]
        # The largest power of two that divides the row tile: a row tile of the kernels lies in one block.
        tile = _row_tile(blocks, rows, self.n_blocks)
        self.block_m = min(tile & -tile, 128)
        self.chunk = max(self.block_m, capacity // self.n_blocks // self.block_m * self.block_m)
        held = max(capacity, self.chunk * self.n_blocks)
        self.hidden = x.new_empty((held, self.width))
        self.partial = x.new_empty((held, self.n_out), dtype=torch.float32)
        self.place = x.new_empty((self.n_tokens, self.n_slots), dtype=torch.int32)
        self.saved = x.new_empty((len(w_in), capacity if save else 0, self.width))
        self.y = x.new_empty((self.n_tokens, self.n_out))
        # Columns of w_out are far apart where units are permuted; a copy in block order is read in whole rows.
        self.w_out = w_out.t().index_select(0, permutation)

        self.args: dict[str, Any] = {"x_ptr": x, **strides("x", x, "te")}
        lora = []
        for i, w in enumerate(w_in):
            self.args |= {f"w{i}_ptr": w, **strides(f"w{i}", w, "fe")}
            if b_in:
                self.args |= {f"b{i}_ptr": b_in[i], **strides(f"b{i}", b_in[i], "f")}
            lora.append(bool(lora_b) and lora_b[i].shape[1] > 0)
            if lora[i]:
                a, b = lora_a_out[i], lora_b[i]
                self.args |= {f"lora_a{i}_ptr": a, **strides(f"lora_a{i}", a, "tr"), f"lora_rank{i}": b.shape[1]}
                self.args |= {f"lora_b{i}_ptr": b, **strides(f"lora_b{i}", b, "fr")}
        if gates is not None:
            self.args |= {"gates_ptr": gates, **strides("gates", gates, "tg")}
        if save:
            self.args |= {"saved_ptr": self.saved, "capacity": capacity}
        self.structure: dict[str, Any] = {
            "n_projections": len(w_in),
            "bias": bool(b_in),
            "lora": lora,
            "gates": gates is not None,
        }
        self.save = save

    def activation(self, act_expr: str, act_in: list[Tensor], seed: Tensor | None, p: float) -> None:
        """Arguments of activation and dropout."""
        act = expression.parse(act_expr)
        reads = [i for i in range(len(act_in)) if f"a{i}" in act.variables]
        for i in reads:
            self.args |= {f"a{i}_ptr": act_in[i], f"a{i}_stride_f": act_in[i].expand(self.n_units).stride(0)}
        dropout = p > 0 and seed is not None
        if dropout:
            self.args |= {"seed_ptr": seed, "threshold": dropout_threshold(p)}
            self.args["keep_scale"] = 0.0 if p >= 1 else 1.0 / (1.0 - p)
        names = {f"x{i}": f"pre{i}" for i in range(self.structure["n_projections"])}
        names |= {f"a{i}": f"act{i}" for i in reads}
        self.structure |= {"act": act, "act_reads": reads, "act_names": names, "dropout": dropout}

    def out(self, b_out: Tensor | None, compensation: Tensor | None) -> None:
        """Arguments of what is added to the sum."""
        self.combine_args: dict[str, Any] = {}
        if b_out is not None:
            self.combine_args |= {"b_out_ptr": b_out, "b_out_stride": b_out.stride(0)}
        if compensation is not None:
            self.combine_args["compensation_ptr"] = compensation.float().contiguous()
        self.structure |= {"bias_out": b_out is not None, "compensation": compensation is not None}

    def run(self, *, dense: bool, first_token: int, chunk: int) -> None:
        """Launches the kernels for the sparse case, or for `chunk` tokens of the case that every block is meant."""
        args, structure = dict(self.args), {**self.structure, "save": self.save and not dense}
        if dense:  # nothing is saved then
            args.pop("saved_ptr", None)
            args.pop("capacity", None)
        n_rows = self.n_blocks * chunk if dense else self.rows.shape[0]
        n_row_tiles = ceil_div(n_rows, self.block_m)
        full = self.x.dtype == torch.float32
        two = self.structure["n_projections"] == 2
        block_n = 64 if full or two else 128
        block_k = 32 if full else 64
        n_hidden_tiles, n_out_tiles = ceil_div(self.width, block_n), ceil_div(self.n_out, block_n)
        shared = {
            "N_BLOCKS": self.n_blocks,
            "DENSE": dense,
            "BLOCK_M": self.block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "BLOCK_G": next_power_of_2(self.n_blocks),
            "BAND": _BAND,
            "PRECISION": product_precision(self.x.dtype),
        }
        tuning = {"num_warps": 4 if self.block_m * block_n <= 64 * 128 else 8, "num_stages": 1 if full else 3}
        rank = max([1, *(args[f"lora_rank{i}"] for i, has in enumerate(structure["lora"]) if has)])
        launch(
            "routed_ffn_fwd",
            structure,
            "routed_ffn_fwd_in_kernel",
            (n_row_tiles * n_hidden_tiles,),
            {
                **args,
                "rows_ptr": self.rows,
                "offsets_ptr": self.offsets,
                "blocks_ptr": self.blocks,
                "permutation_ptr": self.permutation,
                "hidden_ptr": self.hidden,
                "place_ptr": self.place,
                "n_tokens": self.n_tokens,
                "n_features": self.x.shape[1],
                "n_units": self.n_units,
                "width": self.width,
                "n_row_tiles": n_row_tiles,
                "n_hidden_tiles": n_hidden_tiles,
                "first_token": first_token,
                "chunk": chunk,
            },
            {**shared, "N_SLOTS": self.n_slots, "BLOCK_R": min(64, max(16, next_power_of_2(rank)))},
            **tuning,
        )
        launch(
            "routed_ffn_fwd",
            structure,
            "routed_ffn_fwd_out_kernel",
            (n_row_tiles * n_out_tiles,),
            {
                "hidden_ptr": self.hidden,
                "w_out_ptr": self.w_out,
                "partial_ptr": self.partial,
                "offsets_ptr": self.offsets,
                "n_units": self.n_units,
                "n_out": self.n_out,
                "width": self.width,
                "n_row_tiles": n_row_tiles,
                "n_out_tiles": n_out_tiles,
                "chunk": chunk,
            },
            shared,
            **tuning,
        )
        block_t, block_e = 32, 128
        launch(
            "routed_ffn_fwd",
            structure,
            "routed_ffn_fwd_combine_kernel",
            (ceil_div(min(chunk, self.n_tokens - first_token), block_t), ceil_div(self.n_out, block_e)),
            {
                **self.combine_args,
                "partial_ptr": self.partial,
                "place_ptr": self.place,
                "blocks_ptr": self.blocks,
                "offsets_ptr": self.offsets,
                "y_ptr": self.y,
                "n_tokens": self.n_tokens,
                "n_out": self.n_out,
                "first_token": first_token,
                "chunk": chunk,
            },
            {
                "N_BLOCKS": self.n_blocks,
                "N_SLOTS": self.n_slots,
                "DENSE": dense,
                "BLOCK_M": block_t,
                "BLOCK_N": block_e,
            },
        )


registry.register("route_v1", "cuda", "triton", supports=accepts(supports_route))(route)
registry.register("routed_ffn_v1", "cuda", "triton", supports=accepts(supports_routed_ffn))(routed_ffn)
