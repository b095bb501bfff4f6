"""Routed FFN on GPUs: routing and the grouped GEMMs by kernels generated from `templates/`.

Every function here has the arguments of its op and launches kernels; `supports_*` says beforehand whether it can, and
why not: then the reference of the op runs. Nothing synchronises with the host: whether all blocks are meant ("dense by
data") is decided inside the kernels. Sums run in a fixed order, so that results repeat bit by bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
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
    before_hopper,
    byte_view,
    ceil_div,
    dropout_threshold,
    launch,
    next_power_of_2,
    on_hip,
    on_hopper,
    product_precision,
    strides,
)
from spt_compiler.lowering.triton_tuning import Setting
from spt_compiler.ops.reference_ffn import FlatGrads, check_arguments, kept_blocks, row_capacity

MAX_BLOCKS = 1024
# Tiles that share a band of the GEMM grids (rows, or units of a block).
_BAND = 8
# Programs of a launch that most likely finds nothing to do.
_LATER_PROGRAMS = 512
# Gradients of weights up to this many columns (factors of LoRA) are summed over chunks in float32. For wider ones the memory
# would outweigh what is saved; of their sums each chunk but the last is rounded.
_NARROW = 256


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
# What forward and backward share
# ---------------------------------------------------------------------------------------------------------------------


def _row_tile(blocks: Tensor, rows: Tensor, n_blocks: int) -> int:
    """The `tile` with which `route` made the lists: capacity = N * R + G * (tile - 1)."""
    n_tokens, n_slots = blocks.shape
    return (rows.shape[0] - n_tokens * n_slots) // n_blocks + 1


def _factor(n: int) -> int:
    """The largest power of two up to 256 that divides n: tiles that divide it need no masks."""
    return math.gcd(n, 256)


class _Geometry:
    """Sizes of one call, and how its tokens are cut into chunks where every block is meant.

    Nobody asks the device whether that is the case: the launches for the first chunk serve the lists as well, those for
    later chunks find nothing to do unless every block is meant.
    """

    def __init__(self, x: Tensor, blocks: Tensor, rows: Tensor, offsets: Tensor, permutation: Tensor):
        self.blocks, self.rows, self.offsets, self.permutation = blocks, rows, offsets, permutation
        self.dtype, self.n_features = x.dtype, x.shape[1]
        self.n_tokens, self.n_slots = blocks.shape
        self.n_units, self.n_blocks = permutation.shape[0], offsets.shape[0] - 1
        self.width = ceil_div(self.n_units, self.n_blocks)
        # Whether products are those of warp groups, whose operands take no registers.
        self.wide = x.dtype != torch.float32 and not on_hip() and not before_hopper()
        self.width_factor = _factor(self.width) if self.n_units == self.width * self.n_blocks else 0
        self.capacity = rows.shape[0]
        # The largest power of two that divides the row tile: a row tile of the kernels lies in one block.
        tile = _row_tile(blocks, rows, self.n_blocks)
        self.block_m = min(tile & -tile, 128)
        # As many tokens as the rows of the lists could hold for all blocks.
        self.chunk = max(self.block_m, self.capacity // self.n_blocks // self.block_m * self.block_m)
        self.held = max(ceil_div(self.capacity, self.block_m) * self.block_m, self.chunk * self.n_blocks)
        self.n_row_tiles = self.held // self.block_m
        self.place = x.new_empty((self.n_tokens, self.n_slots), dtype=torch.int32)
        self._x = x
        self._inverse: Tensor | None = None

    def buffer(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[held, width], uninitialised."""
        return self._x.new_empty((self.held, width), dtype=dtype or self.dtype)

    def chunks(self) -> range:
        """First tokens of the chunks."""
        return range(0, self.n_tokens, self.chunk)

    def grid(self, tiles: int, first_token: int) -> tuple[int]:
        """Programs for a launch with at most `tiles` tiles; few where it will most likely find nothing to do."""
        return (tiles if first_token == 0 else min(tiles, _LATER_PROGRAMS),)

    @property
    def inverse(self) -> Tensor:
        """[F] int32: the slot in block order of each unit."""
        if self._inverse is None:
            self._inverse = torch.empty_like(self.permutation)
            block = 1024
            launch(
                "order_units",
                {},
                "order_units_invert_kernel",
                (ceil_div(self.n_units, block),),
                {"permutation_ptr": self.permutation, "inverse_ptr": self._inverse, "n_units": self.n_units},
                {"BLOCK": block},
            )
        return self._inverse

    def move(self, model: Tensor, ordered: Tensor, *, restore: bool) -> None:
        """Copies [F, K] from the model's order to block order, or back with `restore`."""
        block = 64
        launch(
            "order_units",
            {},
            "order_units_move_kernel",
            (ceil_div(self.n_units, block), ceil_div(model.shape[1], block)),
            {
                "model_ptr": model,
                **strides("model", model, "fe"),
                "ordered_ptr": ordered,
                "inverse_ptr": self.inverse,
                "n_units": self.n_units,
                "n_columns": model.shape[1],
            },
            {"RESTORE": restore, "BLOCK_M": block, "BLOCK_N": block},
        )

    def by_rows(self, weight: Tensor) -> _Weight:
        """An [F, K] weight with the values of a unit next to each other: itself, or a copy in block order."""
        if not _units_inside(weight):
            return _Weight(weight, True)
        ordered = weight.new_empty(weight.shape)
        self.move(weight, ordered, restore=False)
        return _Weight(ordered, False)

    def products(
        self, n_accumulators: int, *, columns: int, block_m: int | None = None, through: bool = False
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """Constants and tuning of a GEMM whose programs hold so many sums of [BLOCK_M, BLOCK_N].

        Args: block_m: height; None: of a row tile.  through: whether rows of a weight are found through the permutation.
        """
        full = self.dtype == torch.float32
        block_m = block_m or self.block_m
        if self.wide:
            # Tiles of 128 x 256 read a third less than those of 128 x 128, which the level-2 cache could not feed.
            block_n = {1: 256, 2: 128, 3: 64}.get(n_accumulators, 32)
            while block_n > 128 and ceil_div(columns, block_n) * block_n > 1.15 * columns:
                block_n //= 2
        else:
            block_n = 128 if n_accumulators == 1 and not full else 64 if n_accumulators <= 3 else 32
        block_n = min(block_n, max(16, next_power_of_2(columns)))
        constants = {
            "N_BLOCKS": self.n_blocks,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": 32 if full else 64,
            "BLOCK_G": next_power_of_2(self.n_blocks),
            "PRECISION": product_precision(self.dtype),
        }
        warps = 4 if block_m * block_n * n_accumulators <= (32 if full else 64) * 128 else 8
        deep = 4 if self.wide and n_accumulators == 1 and not through else 3
        return constants, {"num_warps": warps, "num_stages": 1 if full else 2 if on_hip() else deep}

    def parts(self, block_n: int) -> int:
        """In how many parts the columns of a tile go through the activation."""
        return (4 if block_n >= 128 else 2 if block_n >= 64 else 1) if self.wide else 1

    def alternatives(self, constants: Mapping[str, Any], columns: int, first_token: int) -> tuple[Setting, ...]:
        """Settings beside the safe one, for kernels that find the number of their tiles themselves.

        None for a launch that may have nothing to do, or adds to what is there: it could not be measured.
        """
        block_n = constants["BLOCK_N"]
        if first_token > 0 or block_n < 64:
            return ()
        if self.dtype == torch.float32:
            return (Setting(8, 2), Setting(4, 1, (("BLOCK_N", 32),)))
        half: tuple[tuple[str, int], ...] = (("BLOCK_N", block_n // 2),)
        if self.wide:
            if "PARTS" in constants:
                half += (("PARTS", self.parts(block_n // 2)),)
            # The last one leaves room for a second program, whose products run while the first stores.
            return (Setting(8, 4), Setting(8, 4, half), Setting(4, 3, half))
        wide = (Setting(8, 3, (("BLOCK_N", 2 * block_n),)),) if columns >= 2 * block_n else ()
        return (*wide, Setting(8, 4), Setting(8, 2), Setting(4, 3, half))

    def rows_of(self, lefts: list[Tensor], weights: list[_Weight], partial: Tensor, first_token: int) -> None:
        """partial = the sum of left @ weight[units of the row's block] over the pairs."""
        n_out = partial.shape[1]
        constants, tuning = self.products(1, columns=n_out, through=any(w.indirect for w in weights))
        n_out_tiles = ceil_div(n_out, constants["BLOCK_N"])
        args: dict[str, Any] = {}
        for i, (left, weight) in enumerate(zip(lefts, weights, strict=True)):
            args |= {f"left{i}_ptr": left, f"w{i}_ptr": weight.tensor, **strides(f"w{i}", weight.tensor, "fe")}
        launch(
            "routed_ffn_rows",
            {"indirect": [w.indirect for w in weights], "bias_out": False, "compensation": False},
            "routed_ffn_rows_kernel",
            self.grid(self.n_row_tiles * n_out_tiles, first_token),
            {
                **args,
                "permutation_ptr": self.permutation,
                "offsets_ptr": self.offsets,
                "partial_ptr": partial,
                "n_units": self.n_units,
                "n_out": n_out,
                "width": self.width,
                "first_token": first_token,
                "chunk": self.chunk,
            },
            {**constants, "BAND": _BAND, "WIDTH_FACTOR": self.width_factor, "OUT_FACTOR": _factor(n_out)},
            **tuning,
            alternatives=functools.partial(self.alternatives, constants, n_out, first_token),
        )

    def combine(
        self, partial: Tensor, out: Tensor, first_token: int, bias: Tensor | None = None, compensation: Tensor | None = None
    ) -> None:
        """out = the sum of the partial rows of each token, and what else is added to it."""
        block_t, block_e = 32, min(128, max(16, next_power_of_2(out.shape[1])))
        terms = min(4, next_power_of_2(self.n_slots))
        n_out_tiles = ceil_div(out.shape[1], block_e)
        args: dict[str, Any] = {}
        if bias is not None:
            args |= {"b_out_ptr": bias, "b_out_stride": bias.stride(0)}
        if compensation is not None:
            args["compensation_ptr"] = compensation
        launch(
            "routed_ffn_rows",
            {"indirect": [False], "bias_out": bias is not None, "compensation": compensation is not None},
            "routed_ffn_rows_combine_kernel",
            self.grid(ceil_div(self.n_tokens, block_t) * n_out_tiles, first_token),
            {
                **args,
                "partial_ptr": partial,
                "place_ptr": self.place,
                "blocks_ptr": self.blocks,
                "offsets_ptr": self.offsets,
                "out_ptr": out,
                **strides("out", out, "te"),
                "n_tokens": self.n_tokens,
                "n_out": out.shape[1],
                "n_out_tiles": n_out_tiles,
                "first_token": first_token,
                "chunk": self.chunk,
            },
            {"N_BLOCKS": self.n_blocks, "N_SLOTS": self.n_slots, "TERMS": terms, "BLOCK_M": block_t, "BLOCK_N": block_e},
            num_warps=4 if on_hip() else 8,
        )

    @property
    def partial_dtype(self) -> torch.dtype:
        """Of partial rows: they are most of the memory traffic. Half precision could overflow where the sum would not."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True)
class _Weight:
    """An [F, K] weight as a kernel reads it: through the permutation (`indirect`), or already in block order."""

    tensor: Tensor
    indirect: bool


def _units_inside(weight: Tensor) -> bool:
    """Whether the units of an [F, K] weight lie closer in memory than the values of a unit."""
    return weight.stride(0) < weight.stride(1) and weight.shape[0] > 1


class _Projections:
    """In-projections and activation: structure and arguments of the templates, the same forward and backward."""

    def __init__(
        self,
        geometry: _Geometry,
        x,
        w_in,
        b_in,
        lora_a_out,
        lora_b,
        lora_down,
        gates,
        act_expr,
        act_in,
        seed,
        p,
        lora_seed,
        lora_p,
    ):
        self.act = expression.parse(act_expr)
        n = len(w_in)
        self.weights = [geometry.by_rows(w) for w in w_in]
        self.args: dict[str, Any] = {"x_ptr": x, **strides("x", x, "te")}
        lora, rank = [], 1
        for i, weight in enumerate(self.weights):
            self.args |= {f"w{i}_ptr": weight.tensor, **strides(f"w{i}", weight.tensor, "fe")}
            if b_in:
                self.args |= {f"b{i}_ptr": b_in[i], **strides(f"b{i}", b_in[i], "f")}
            lora.append(bool(lora_b) and lora_b[i].shape[1] > 0)
            if lora[i]:
                a, b = lora_a_out[i], lora_b[i]
                rank = max(rank, b.shape[1])
                self.args |= {f"lora_a{i}_ptr": a, **strides(f"lora_a{i}", a, "tr"), f"lora_rank{i}": b.shape[1]}
                self.args |= {f"lora_b{i}_ptr": b, **strides(f"lora_b{i}", b, "fr")}
        self.rank_down = 0 if lora_down is None else lora_down.shape[0]
        self.block_r = min(64, max(16, next_power_of_2(max(rank, self.rank_down))))
        reads = [i for i in range(len(act_in)) if f"a{i}" in self.act.variables]
        self.act_args: dict[str, Any] = {}
        for i in reads:
            self.act_args |= {f"a{i}_ptr": act_in[i], f"a{i}_stride_f": act_in[i].expand(geometry.n_units).stride(0)}
        if gates is not None:
            self.act_args |= {"gates_ptr": gates, **strides("gates", gates, "tg")}
        dropout = p > 0 and seed is not None
        self.low_dropout = self.rank_down > 0 and lora_p > 0 and lora_seed is not None
        for there, prefix, drawn, rate in ((dropout, "", seed, p), (self.low_dropout, "low_", lora_seed, lora_p)):
            if there:
                self.act_args |= {f"{prefix}seed_ptr": drawn, f"{prefix}threshold": dropout_threshold(rate)}
                self.act_args[f"{prefix}keep_scale"] = 0.0 if rate >= 1 else 1.0 / (1.0 - rate)
        self.structure: dict[str, Any] = {
            "n_projections": n,
            "bias": bool(b_in),
            "lora": lora,
            "indirect": [w.indirect for w in self.weights],
            "gates": gates is not None,
            "act": self.act,
            "act_reads": reads,
            "act_names": {f"x{i}": f"pre{i}" for i in range(n)} | {f"a{i}": f"act{i}" for i in reads},
            "dropout": dropout,
            "low_dropout": self.low_dropout,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


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
    low = [] if lora_down is None else [lora_down]
    odd = [t.dtype for t in (*w_in, w_out, *lora_a_out, *lora_b, *low) if t.dtype != x.dtype]
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
    """`spt::routed_ffn_v1`: a gathered GEMM with the activation, a GEMM into partial rows, and their sum per token."""
    lists, random = (blocks, rows, offsets, permutation), (seed, p, lora_seed, lora_p)
    weights = (w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down)
    check_arguments(x, *weights, gates, *lists, compensation, act_in, *random)
    g = _Geometry(x, *lists)
    projections = _Projections(g, x, w_in, b_in, lora_a_out, lora_b, lora_down, gates, act_expr, act_in, *random)
    y, low = x.new_empty((g.n_tokens, w_out.shape[0])), x.new_empty((g.n_tokens, projections.rank_down))
    saved = x.new_empty((len(w_in), g.capacity if save else 0, g.width))
    hidden = g.buffer(g.width)
    outputs = [(hidden, g.by_rows(w_out.t()), g.buffer(w_out.shape[0], g.partial_dtype), y)]
    args: dict[str, Any] = {"saved_ptr": saved, "capacity": g.capacity} if save else {}
    if lora_down is not None and projections.rank_down:
        seen = g.buffer(g.width) if projections.low_dropout else hidden
        outputs.append((seen, g.by_rows(lora_down.t()), g.buffer(projections.rank_down, torch.float32), low))
        if projections.low_dropout:
            args["low_hidden_ptr"] = seen
    added = None if compensation is None else compensation.float().contiguous()
    # Dropout's hash needs registers, as a second sum does.
    constants, tuning = g.products(len(w_in) + projections.structure["dropout"], columns=g.width)
    constants["PARTS"] = g.parts(constants["BLOCK_N"])
    n_hidden_tiles = ceil_div(g.width, constants["BLOCK_N"])
    for first_token in g.chunks():
        launch(
            "routed_ffn_fwd",
            {**projections.structure, "save": save},
            "routed_ffn_fwd_in_kernel",
            g.grid(g.n_row_tiles * n_hidden_tiles, first_token),
            {
                **projections.args,
                **projections.act_args,
                **args,
                "rows_ptr": rows,
                "offsets_ptr": offsets,
                "blocks_ptr": blocks,
                "permutation_ptr": permutation,
                "hidden_ptr": hidden,
                "place_ptr": g.place,
                "n_tokens": g.n_tokens,
                "n_features": g.n_features,
                "n_units": g.n_units,
                "width": g.width,
                "first_token": first_token,
                "chunk": g.chunk,
            },
            {
                **constants,
                "N_SLOTS": g.n_slots,
                "FEATURES_FACTOR": _factor(g.n_features),
                "BLOCK_R": projections.block_r,
                "BAND": _BAND,
            },
            **tuning,
            alternatives=functools.partial(g.alternatives, constants, g.width, first_token),
        )
        for left, weight, partial, out in outputs:
            g.rows_of([left], [weight], partial, first_token)
            extra = (b_out, added) if out is y else (None, None)
            g.combine(partial, out, first_token, *extra)
    return y, saved, low


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


def _gradients_of(act_expr: str, n_in: int, n_act: int) -> dict[str, expression.Expression]:
    """Slopes of the activation by the names of what it reads. Raises: ExpressionError."""
    act = expression.parse(act_expr)
    names = [*(f"x{i}" for i in range(n_in)), *(f"a{i}" for i in range(n_act))]
    return {name: expression.derivative(act, name) for name in names}


def supports_routed_ffn_backward(
    grad_y,
    grad_low,
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
    act_expr,
    act_in,
    seed,
    p,
    lora_seed,
    lora_p,
    saved,
    needs,
) -> Reject | None:
    """None where the kernels can run `spt::routed_ffn_backward_v1`, else the reason."""
    tensors = (x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, blocks, rows, offsets, permutation)
    reason = supports_routed_ffn(*tensors, None, act_expr, act_in, seed, p, lora_seed, lora_p, False)
    if reason is not None:
        return reason
    for grad in (grad_y, grad_low):
        if grad is not None and grad.dtype != x.dtype:
            return Reject("a gradient of the results has dtype {}, x has {}", grad.dtype, x.dtype)
    try:
        _gradients_of(act_expr, len(w_in), len(act_in))
    except ExpressionError as error:
        return Reject("derivative of the activation: {}", error)
    return None


def routed_ffn_backward(
    grad_y: Tensor,
    grad_low: Tensor | None,
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
    act_expr: str,
    act_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    lora_seed: Tensor | None,
    lora_p: float,
    saved: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """`spt::routed_ffn_backward_v1`: gradients of the pre-activations in block order, then a GEMM for each that is needed."""
    flat = FlatGrads(x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, act_in, needs)
    flat.put("b_out", lambda: grad_y.sum(0, dtype=torch.float32))
    if flat.needed <= {"b_out"}:
        return flat.tensors()
    g = _Geometry(x, blocks, rows, offsets, permutation)
    random = (seed, p, lora_seed, lora_p)
    projections = _Projections(g, x, w_in, b_in, lora_a_out, lora_b, lora_down, gates, act_expr, act_in, *random)
    work = _Backward(g, projections, flat, grad_y, grad_low, x, w_out, lora_a_out, lora_b, lora_down, saved)
    for first_token in g.chunks():
        work.run(first_token)
    work.store()
    return flat.tensors()


class _Backward:
    """Buffers of one backward call, and the kernels that fill them."""

    def __init__(
        self,
        g: _Geometry,
        projections: _Projections,
        flat: FlatGrads,
        grad_y,
        grad_low,
        x,
        w_out,
        lora_a_out,
        lora_b,
        lora_down,
        saved,
    ):
        self.g, self.projections, self.flat, self.grad_y, self.x = g, projections, flat, grad_y, x
        self.lora_a_out, self.lora_b, self.saved = lora_a_out, lora_b, saved
        self.down = g.by_rows(w_out.t())
        self.grad_low = grad_low if projections.rank_down else None
        self.low_down = None if self.grad_low is None else g.by_rows(lora_down.t())
        n_in = len(projections.weights)
        needed, act = flat.needed, projections.act
        # A rank of zero stands for no LoRA; its gradients are empty.
        lora = [i for i in range(len(lora_b)) if lora_b[i].shape[1] > 0]
        per_pre = [
            {name for name in (f"w_in{i}", f"b_in{i}", f"lora_a_out{i}", f"lora_b{i}") if name in needed} for i in range(n_in)
        ]
        pre = [i for i in range(n_in) if "x" in needed or per_pre[i]]
        self.grad_pre = {i: g.buffer(g.width) for i in pre}
        self.act_sums = [i for i in projections.structure["act_reads"] if f"act_in{i}" in needed]
        self.bias_sums = [i for i in pre if f"b_in{i}" in needed]
        n_sums = len(self.bias_sums) + len(self.act_sums)
        self.columns = x.new_empty((n_sums, g.n_row_tiles, g.width), dtype=torch.float32)
        # Results of an operator must not share storage: one tensor each.
        self.vectors = [x.new_empty((g.n_units,), dtype=torch.float32) for _ in range(n_sums)]
        # What the branch on the out-projection reads is what w_out reads, unless it has a dropout of its own.
        trains_down = self.grad_low is not None and "lora_down" in needed
        self.low_hidden = g.buffer(g.width) if trains_down and projections.low_dropout else None
        self.hidden = g.buffer(g.width) if "w_out" in needed or (trains_down and self.low_hidden is None) else None
        self.through = bool(pre) or bool(self.act_sums) or "gates" in needed
        self.grad_gates = self.gate_rows = None
        if "gates" in needed:
            self.grad_gates = x.new_zeros((g.n_tokens, g.n_blocks), dtype=torch.float32)
            self.gate_rows = g.buffer(self._hidden_tiles(recompute=True), torch.float32)

        self.partial = g.buffer(g.n_features, g.partial_dtype) if "x" in needed else None
        self.grad_x = x.new_empty((g.n_tokens, g.n_features)) if "x" in needed else None
        self.lora_a = {
            i: (flat.empty(f"lora_a_out{i}"), g.buffer(lora_b[i].shape[1], torch.float32))
            for i in lora
            if f"lora_a_out{i}" in needed
        }
        # (rows in block order, tensor of the tokens, gradient [F, K], whether it is in the model's order)
        self.products: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        self.to_restore: list[tuple[Tensor, Tensor]] = []
        for i in pre:
            if f"w_in{i}" in needed:
                self._weight_gradient(self.grad_pre[i], x, self._memory(f"w_in{i}"), f"w_in{i}")
            if i in lora and f"lora_b{i}" in needed:
                self._weight_gradient(self.grad_pre[i], lora_a_out[i], self._memory(f"lora_b{i}"), f"lora_b{i}")
        if "w_out" in needed:
            self._weight_gradient(self.hidden, grad_y, self._memory("w_out").t(), "w_out")
        if trains_down:
            seen = self.hidden if self.low_hidden is None else self.low_hidden
            self._weight_gradient(seen, grad_low, self._memory("lora_down").t(), "lora_down")

        slopes = {name: expression.derivative(act, name) for name in (*(f"x{i}" for i in pre), *(f"a{i}" for i in self.act_sums))}
        self.structure = {
            **projections.structure,
            "through": self.through,
            "indirect_out": self.down.indirect,
            "grad_pre": [{"index": i, "slope": slopes[f"x{i}"]} for i in pre],
            "grad_act": [{"index": i, "slope": slopes[f"a{i}"]} for i in self.act_sums],
            "bias_sums": self.bias_sums,
            "need_hidden": self.hidden is not None,
            "need_low_hidden": self.low_hidden is not None,
            "low": self.grad_low is not None,
            "indirect_low": self.low_down is not None and self.low_down.indirect,
            "grad_gates": self.grad_gates is not None,
        }

    def _memory(self, name: str) -> Tensor:
        """For the gradient of a weight: of the weight's type, or float32 where chunks are to be summed exactly."""
        gradient = self.flat.empty(name)
        exact = len(self.g.chunks()) > 1 and min(gradient.shape) <= _NARROW
        return torch.empty_like(gradient, dtype=torch.float32) if exact else gradient

    def _weight_gradient(self, left: Tensor, right: Tensor, gradient: Tensor, name: str) -> None:
        direct = not _units_inside(gradient)
        target = gradient if direct else gradient.new_empty(gradient.shape)
        self.products.append((left, right, target, direct))
        if not direct:
            self.to_restore.append((gradient, target))
        self.flat.put(name, lambda: gradient.t() if name in ("w_out", "lora_down") else gradient)

    def run(self, first_token: int) -> None:
        """Launches everything for the lists, or for one chunk of the case that every block is meant."""
        g = self.g
        if self.saved.shape[1] == 0:
            self._hidden("both", first_token)
        else:
            if first_token == 0:
                self._hidden("listed", first_token)
            self._hidden("dense", first_token)
        if self.grad_x is not None:
            assert self.partial is not None
            g.rows_of(list(self.grad_pre.values()), self.projections.weights, self.partial, first_token)
            g.combine(self.partial, self.grad_x, first_token)
        for i, (gradient, partial) in self.lora_a.items():
            g.rows_of([self.grad_pre[i]], [_Weight(self.lora_b[i], True)], partial, first_token)
            g.combine(partial, gradient, first_token)
        for left, right, target, direct in self.products:
            self._weights(left, right, target, direct, first_token)
        for columns, vector in zip(self.columns, self.vectors, strict=True):
            self._sum_columns(columns, vector, first_token)
        if self.grad_gates is not None:
            self._sum_gates(first_token)

    def _products(self, recompute: bool) -> tuple[dict[str, Any], dict[str, int]]:
        # The derivative needs registers, unless it is taken in parts. So do two dropouts and the sum that one is applied to.
        n_sums = len(self.projections.weights) + 1 if recompute else 1 if self.g.wide else 2
        n_sums += (2 if on_hopper() else 3) * self.projections.low_dropout
        constants, tuning = self.g.products(n_sums, columns=self.g.width)
        if on_hopper() and n_sums == 1 and len(self.projections.weights) == 1 and constants["BLOCK_N"] == 256:
            # Two programs share a multiprocessor: one multiplies while the other takes the slope of GELU.
            constants["BLOCK_N"], tuning = 128, {"num_warps": 8, "num_stages": 3}
        constants["PARTS"] = self.g.parts(constants["BLOCK_N"])
        if on_hip() and self.g.dtype != torch.float32:
            tuning["num_warps"] = 4  # of 64 lanes: more of them have fewer registers each
        return constants, tuning

    def _hidden_tiles(self, *, recompute: bool) -> int:
        return ceil_div(self.g.width, self._products(recompute)[0]["BLOCK_N"])

    def _hidden(self, mode: str, first_token: int) -> None:
        g, p = self.g, self.projections
        recompute = mode != "listed"
        constants, tuning = self._products(recompute)
        n_hidden_tiles = self._hidden_tiles(recompute=recompute)
        args: dict[str, Any] = dict(p.args) if recompute else {"saved_ptr": self.saved, "capacity": g.capacity}
        args |= p.act_args
        if self.through:
            args |= {"grad_ptr": self.grad_y, **strides("grad", self.grad_y, "te")}
            args |= {"w_out_ptr": self.down.tensor, **strides("w_out", self.down.tensor, "fe")}
            if self.low_down is not None:
                args |= {"grad_low_ptr": self.grad_low, **strides("grad_low", self.grad_low, "tr")}
                args |= {"down_ptr": self.low_down.tensor, **strides("down", self.low_down.tensor, "fr")}
                args["rank_down"] = p.rank_down
        args |= {f"grad_pre{i}_ptr": buffer for i, buffer in self.grad_pre.items()}
        if self.hidden is not None:
            args["hidden_ptr"] = self.hidden
        if self.low_hidden is not None:
            args["low_hidden_ptr"] = self.low_hidden
        if self.grad_gates is not None:
            args["grad_gates_ptr"] = self.gate_rows
        if self.bias_sums or self.act_sums:
            args |= {"columns_ptr": self.columns, "most_row_tiles": g.n_row_tiles}
        launch(
            "routed_ffn_bwd",
            {**self.structure, "recompute": recompute, "mode": mode},
            "routed_ffn_bwd_kernel_hidden",
            g.grid(g.n_row_tiles * n_hidden_tiles, first_token if mode != "dense" else 1),
            {
                **args,
                "rows_ptr": g.rows,
                "offsets_ptr": g.offsets,
                "blocks_ptr": g.blocks,
                "permutation_ptr": g.permutation,
                "place_ptr": g.place,
                "n_tokens": g.n_tokens,
                "n_features": g.n_features,
                "n_out": self.grad_y.shape[1],
                "n_units": g.n_units,
                "width": g.width,
                "first_token": first_token,
                "chunk": g.chunk,
            },
            {
                **constants,
                "N_SLOTS": g.n_slots,
                "FEATURES_FACTOR": _factor(g.n_features),
                "OUT_FACTOR": _factor(self.grad_y.shape[1]),
                "BLOCK_R": p.block_r,
                "BAND": _BAND,
            },
            **tuning,
            # With other tiles the rows of the gates' gradient would have other lengths.
            alternatives=()
            if mode == "dense" or self.grad_gates is not None
            else functools.partial(g.alternatives, constants, g.width, first_token),
        )

    def _weights(self, left: Tensor, right: Tensor, target: Tensor, direct: bool, first_token: int) -> None:
        g = self.g
        # Few columns make few programs: shorter ones then.
        block_m = 64 if g.dtype == torch.float32 or target.shape[1] < 64 else 128
        block_m = min(block_m, max(16, next_power_of_2(g.width)))
        constants, tuning = g.products(1, columns=target.shape[1], block_m=block_m)
        if on_hopper() and block_m == 128 and constants["BLOCK_N"] == 256:
            constants["BLOCK_N"], tuning = 128, {"num_warps": 4, "num_stages": 3}  # 3 % faster than whole tiles, measured
        n_unit_tiles, n_right_tiles = ceil_div(g.width, constants["BLOCK_M"]), ceil_div(target.shape[1], constants["BLOCK_N"])
        launch(
            "routed_ffn_sums",
            {},
            "routed_ffn_sums_weights_kernel",
            g.grid(g.n_blocks * n_unit_tiles * n_right_tiles, first_token),
            {
                "left_ptr": left,
                "right_ptr": right,
                **strides("right", right, "te"),
                "out_ptr": target,
                **strides("out", target, "fe"),
                "rows_ptr": g.rows,
                "offsets_ptr": g.offsets,
                "permutation_ptr": g.permutation,
                "n_tokens": g.n_tokens,
                "n_units": g.n_units,
                "n_right": target.shape[1],
                "width": g.width,
                "first_token": first_token,
                "chunk": g.chunk,
            },
            {
                **constants,
                "BAND": _BAND,
                "ROWS": g.block_m,
                "INDIRECT": direct,
                "WIDTH_FACTOR": g.width_factor,
                "OUT_FACTOR": _factor(target.shape[1]),
            },
            **tuning,
            alternatives=functools.partial(g.alternatives, constants, target.shape[1], first_token),
        )

    def _sum_columns(self, columns: Tensor, vector: Tensor, first_token: int) -> None:
        g = self.g
        block_n = min(128, max(16, next_power_of_2(g.width)))
        n_unit_tiles = ceil_div(g.width, block_n)
        launch(
            "routed_ffn_sums",
            {},
            "routed_ffn_sums_columns_kernel",
            g.grid(g.n_blocks * n_unit_tiles, first_token),
            {
                "columns_ptr": columns,
                "vector_ptr": vector,
                "offsets_ptr": g.offsets,
                "permutation_ptr": g.permutation,
                "n_units": g.n_units,
                "width": g.width,
                "n_unit_tiles": n_unit_tiles,
                "first_token": first_token,
                "chunk": g.chunk,
            },
            {"N_BLOCKS": g.n_blocks, "ROWS": g.block_m, "BLOCK_M": 16, "BLOCK_N": block_n},
        )

    def _sum_gates(self, first_token: int) -> None:
        g, block_t = self.g, 128
        launch(
            "routed_ffn_sums",
            {},
            "routed_ffn_sums_gates_kernel",
            g.grid(ceil_div(g.n_tokens, block_t), first_token),
            {
                "grad_rows_ptr": self.gate_rows,
                "grad_ptr": self.grad_gates,
                "place_ptr": g.place,
                "blocks_ptr": g.blocks,
                "offsets_ptr": g.offsets,
                "n_tokens": g.n_tokens,
                "n_listed_tiles": self._hidden_tiles(recompute=not self.saved.shape[1]),
                "n_dense_tiles": self._hidden_tiles(recompute=True),
                "first_token": first_token,
                "chunk": g.chunk,
            },
            {"N_BLOCKS": g.n_blocks, "N_SLOTS": g.n_slots, "BLOCK_M": block_t},
        )

    def store(self) -> None:
        """Hands the finished gradients to the flat list."""
        put, like = self.flat.put, self.flat.like
        for gradient, ordered in self.to_restore:
            self.g.move(gradient, ordered, restore=True)
        put("x", lambda: self.grad_x)
        put("gates", lambda: self.grad_gates)
        for i, vector in zip(self.bias_sums, self.vectors, strict=False):
            put(f"b_in{i}", lambda v=vector: v)
        of_act = dict(zip(self.act_sums, self.vectors[len(self.bias_sums) :], strict=True))
        for name in self.flat.needed:
            if name.startswith("act_in"):
                vector = of_act.get(int(name.removeprefix("act_in")))
                if vector is None:  # nothing reads it
                    put(name, lambda n=name: torch.zeros_like(like[n]))
                else:
                    put(name, lambda n=name, v=vector: v if like[n].numel() > 1 else v.sum())
            elif name == "lora_down" and self.grad_low is None:
                put(name, lambda n=name: torch.zeros_like(like[n]))
            elif name.startswith(("lora_a", "lora_b")):
                i = int(name[-1])
                if name.startswith("lora_a"):
                    put(name, lambda n=name, i=i: self.lora_a[i][0] if i in self.lora_a else self.flat.empty(n))
                elif like[name].shape[1] == 0:
                    put(name, lambda n=name: self.flat.empty(n))


for _op, _run, _supports_op in (
    ("route_v1", route, supports_route),
    ("routed_ffn_v1", routed_ffn, supports_routed_ffn),
    ("routed_ffn_backward_v1", routed_ffn_backward, supports_routed_ffn_backward),
):
    registry.register(_op, "cuda", "triton", supports=accepts(_supports_op), taped=True)(_run)
