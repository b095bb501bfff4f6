"""Sparse attention on GPUs, forward and backward, by kernels generated from `templates/`.

One pair of templates serves both granularities. Where tiles are listed, kernels walk the lists. Where single keys are
listed, the lists become marks, a byte per pair of query and key for a few heads at a time, and the kernels walk all
keys, skipping blocks without a mark: on tensor cores that costs less than gathering single rows.

Every function here has the arguments of its op and launches kernels; `supports_*` says beforehand whether it can. What
is not supported runs the reference of the op. Nothing synchronises with the host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_compiler import expression
from spt_compiler.errors import Reject
from spt_compiler.lowering import registry
from spt_compiler.lowering.triton_common import (
    Alternatives,
    accepts,
    before_hopper,
    bias_arguments,
    bias_structure,
    ceil_div,
    dropout_threshold,
    launch,
    mask_of,
    next_power_of_2,
    on_hip,
    on_hopper,
    product_precision,
    strides,
)
from spt_compiler.lowering.triton_selection import MAX_HEAD_DIM, MAX_ROW, pool_tiles, supports_heads, supports_tiles
from spt_compiler.lowering.triton_tuning import Setting
from spt_compiler.ops import reference
from spt_compiler.ops.selection.common import causal_split, in_use

# Marks of single keys are made for so many bytes of heads at a time.
SCRATCH_BYTES = 256 << 20
# A list longer than so many times the mean is split over several programs.
HOT = 4
# Partial sums of the gradients of keys and values take so many bytes at a time; from this many keys per step.
PARTIAL_BYTES = 512 << 20
FUSED_KEYS = 32
# Rows and keys per step of attention over single keys.
SINGLE_TILE_Q, SINGLE_TILE_K = 64, 32


# ---------------------------------------------------------------------------------------------------------------------
# What all kernels are told
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call of an attention op, as its kernels see it.

    Args:
        structure: constants of the template.  args: run-time parameters that every kernel has.
        constants: `tl.constexpr` parameters that every kernel has.
        wide: the larger of the padded head dimensions.  full: whether the tensors are float32.
        tile_q, tile_k: tile sizes.  n_query_tiles, n_key_tiles: how many of each.
    """

    structure: dict[str, Any]
    args: dict[str, Any]
    constants: dict[str, Any]
    wide: int
    full: bool
    tile_q: int
    tile_k: int
    n_query_tiles: int
    n_key_tiles: int

    @property
    def n_blocks(self) -> int:
        """Blocks of queries of a head."""
        return self.n_query_tiles * ceil_div(self.tile_q, self.constants["BLOCK_M"])

    def block_n(self, most: int) -> int:
        """Keys per step: whole tiles, about `most` keys."""
        return max(self.tile_k, most)

    @property
    def stacked(self) -> int:
        """Heads of a group whose queries one program takes, so that they share keys and values: up to 128 rows.

        Before Hopper queries take registers: half as many rows.
        """
        rows, group = self.constants["BLOCK_M"], self.constants["GROUP"]
        most = 64 if before_hopper() else 128
        if self.structure["single"] or self.full or self.wide > 128 or on_hip():
            return 1
        heads = 1
        while group % (2 * heads) == 0 and 2 * heads * rows <= most:
            heads *= 2
        return heads

    @property
    def crowded(self) -> bool:
        """Whether marks or pseudo-keys, beside wide heads, ask for more registers than four warps have."""
        more = self.structure["single"] or self.structure["pseudo"] is not None
        return bool(more) and self.wide > 64 and before_hopper()

    def alternatives(self, block_n: int | None = None) -> list[Setting]:
        """Settings beside the safe one: deeper pipelines, more warps, and in the end the one that asks for least.

        Args: block_n: keys per step of the safe setting; None where a kernel has no choice there.
        """
        if block_n is None:
            return [Setting(4, 3), Setting(4, 4), Setting(8, 2), Setting(8, 3), Setting(4, 1)]

        def with_keys(num_warps: int, num_stages: int, n: int) -> Setting:
            return Setting(num_warps, num_stages, (("BLOCK_N", max(n, self.tile_k, 16)),))

        found = [(4, 3, block_n), (4, 4, block_n), (8, 3, block_n), (8, 4, block_n), (8, 3, 2 * block_n), (4, 3, block_n // 2)]
        return [*(with_keys(*x) for x in found), with_keys(4, 1, 16)]


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    expr: str,
    expr_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
    tile_q: int,
    tile_k: int,
    *,
    single: bool,
    pseudo: str | None = None,
) -> _Call:
    mask = mask_of(expr, expr_in)
    dropout = p > 0 and seed is not None
    structure = {
        "bias": bias_structure(bias),
        **mask.structure,
        "dropout": dropout,
        "softcap": softcap is not None,
        "single": single,
        "pseudo": pseudo,
    }
    n_query_tiles, n_key_tiles = ceil_div(q.shape[2], tile_q), ceil_div(k.shape[2], tile_k)
    args = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        **strides("q", q, "bhtd"),
        **strides("k", k, "bhtd"),
        **strides("v", v, "bhtd"),
        **bias_arguments(bias, (*q.shape[:3], k.shape[2])),
        **mask.args,
        "counts_ptr": counts,
        "scale": float(scale),
        "n_heads": q.shape[1],
        "n_q": q.shape[2],
        "n_k": k.shape[2],
        "n_query_tiles": n_query_tiles,
        "n_key_tiles": n_key_tiles,
        "k_max": 0,
    }
    if dropout:
        args |= {"seed_ptr": seed, "threshold": dropout_threshold(p), "keep_scale": 0.0 if p >= 1 else 1.0 / (1.0 - p)}
    if softcap is not None:
        args["softcap"] = float(softcap)
    blocks = {
        "HEAD_DIM": q.shape[3],
        "VALUE_DIM": v.shape[3],
        "BLOCK_D": max(16, next_power_of_2(q.shape[3])),
        "BLOCK_DV": max(16, next_power_of_2(v.shape[3])),
    }
    wide = max(blocks["BLOCK_D"], blocks["BLOCK_DV"])
    full = q.dtype == torch.float32
    constants = {
        **blocks,
        "GROUP": q.shape[1] // k.shape[1],
        "TILE_Q": tile_q,
        "TILE_K": tile_k,
        "BLOCK_M": min(max(16, next_power_of_2(tile_q)), 32 if full and wide > 64 else 128),
        "BLOCK_P": 16 if wide > 128 or full or (pseudo == "masked" and wide > 64) else 32,
        "PRECISION": product_precision(q.dtype),
    }
    return _Call(structure, args, constants, wide, full, tile_q, tile_k, n_query_tiles, n_key_tiles)


def _pseudo(bias: Tensor | None, expr: str) -> str:
    """What decides whether a query sees a tile whole; see `pseudo_step` of the templates."""
    is_causal, others = causal_split(expr)
    if bias is not None or others is not None:
        return "masked"
    return "causal" if is_causal else "plain"


def _may_be_empty(bias: Tensor | None, expr: str) -> bool:
    """Whether a query may be forbidden every key; the causal mask alone always leaves it the first one."""
    return bias is not None or bool(expr and causal_split(expr)[1] is not None)


def _is_float(bias: Tensor | None) -> bool:
    return bias is not None and bias.is_floating_point()


def _is_additive(call: _Call) -> bool:
    """Whether something is added to logits; must agree with `is_additive` of the templates."""
    if call.structure["bias"] == "float":
        return True
    kinds = {f"t{i}": read["kind"] for i, read in enumerate(call.structure["reads"])}
    mask = call.structure["mask"]
    return mask is not None and expression.kind_of(mask, kinds) != "bool"


def _supports(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, expr: str, expr_in: list[Tensor]) -> Reject | None:
    reason = supports_heads(q, k, bias, expr, expr_in)
    if reason is None and not 0 < v.shape[3] <= MAX_HEAD_DIM:
        reason = Reject("value dimension {} outside 1 to {}", v.shape[3], MAX_HEAD_DIM)
    return reason


def _aligned(x: Tensor) -> Tensor:
    """x [B, H, T, D], or a copy of it with zeros behind each row up to a multiple of 16 values, where rows begin, too.

    From other rows Triton cannot copy to shared memory while it multiplies. Loading them first is slow, and gave a wrong dK
    on an H100 under Triton 3.6 (heads of 40 values): no kernel sees such rows any more.
    """
    missing = -x.shape[3] % 16
    if missing == 0 and x.stride(3) == 1 and all(stride % 16 == 0 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0:
        return x
    return F.pad(x, (0, missing)) if missing else x.clone(memory_format=torch.contiguous_format)


def _narrow(out: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """A result for `_aligned` values as one for v: without the zeros, laid out as results are."""
    return out if out.shape[3] == v.shape[3] else reference.attention_output(q, v).copy_(out[..., : v.shape[3]])


# ---------------------------------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------------------------------


def mark_lists(index: Tensor, counts: Tensor, n: int, marks: Tensor | None = None, places: bool = False) -> Tensor:
    """Lists [..., L] with counts [...], both contiguous, as marks [..., n]: int8, 1 where listed, or with places int16, one
    more than the slot (fewer than 2^15) that lists it. Count -1 marks nothing.

    Args: marks: memory to write to.
    """
    rows, slots = counts.shape, index.shape[-1]
    kind = torch.int16 if places else torch.int8
    marks = index.new_zeros((*rows, n), dtype=kind) if marks is None else marks.zero_()
    launch(
        "transpose_lists",
        {"split": False, "places": places},
        "transpose_lists_mark_kernel",
        (counts.numel(),),
        {"tiles_ptr": index, "counts_ptr": counts, "marks_ptr": marks, "k_max": slots, "n_key_tiles": n},
        {"BLOCK_W": min(next_power_of_2(slots), 1024)},
    )
    return marks


@dataclass(frozen=True)
class Split:
    """How lists of key tiles are spread over programs.

    Args: chunk: longest list of one program.  n_items: programs per key head.  n_slots: partial sums per key head.
    """

    chunk: int
    n_items: int
    n_slots: int


def split_of(n_query_tiles: int, n_key_tiles: int, k_max: int) -> Split | None:
    """The split for lists that hold up to k_max key tiles of each query tile; None where no list can be that long."""
    chunk = max(ceil_div(HOT * n_query_tiles * k_max, n_key_tiles), HOT)
    if chunk >= n_query_tiles:
        return None
    # A list of n entries has at most floor((n - 1) / chunk) parts beyond its first.
    more = n_query_tiles * k_max // chunk
    return Split(chunk, n_key_tiles + more, 2 * more)


def transpose_lists(tiles: Tensor, counts: Tensor, marks: Tensor, split: Split | None) -> dict[str, Tensor]:
    """The lists turned round, as arguments of the dK, dV kernel: for every key tile the query tiles that keep it.

    Args: tiles: [B, Hkv, nQ, k_max] and counts [B, Hkv, nQ] int32, contiguous.  marks: of `mark_lists`.
    Returns: starts_ptr, ends_ptr [B, Hkv, nK] int32 into rows_ptr [B, Hkv, nQ * k_max] int32, which holds query tile *
        k_max + slot where marks hold places, else query tiles; anyone_ptr [B, Hkv] int8,
        whether some row of the head lists everything (count -1, which is not listed); with a split also item_tiles_ptr
        [B, Hkv, n_items], first_items_ptr and first_slots_ptr [B, Hkv, nK] int32.
    """
    batch, n_groups, n_query_tiles, k_max = tiles.shape
    n_key_tiles = marks.shape[-1]
    places = marks.dtype == torch.int16
    lengths = ((marks != 0) if places else marks).sum(2, dtype=torch.int32)

    def table(n: int) -> Tensor:
        return tiles.new_empty((batch, n_groups, n))

    starts, ends, rows = table(n_key_tiles), table(n_key_tiles), table(n_query_tiles * k_max)
    anyone = tiles.new_empty((batch, n_groups), dtype=torch.int8)
    found = {"starts_ptr": starts, "ends_ptr": ends, "anyone_ptr": anyone}
    sizes: dict[str, int] = {}
    if split is not None:
        found |= {"item_tiles_ptr": table(split.n_items)}
        found |= {"first_items_ptr": table(n_key_tiles), "first_slots_ptr": table(n_key_tiles)}
        sizes = {"chunk": split.chunk, "n_items": split.n_items}
    launch(
        "transpose_lists",
        {"split": split is not None, "places": places},
        "transpose_lists_offsets_kernel",
        (batch * n_groups,),
        {
            "lengths_ptr": lengths,
            "counts_ptr": counts,
            **found,
            **sizes,
            "n_query_tiles": n_query_tiles,
            "n_key_tiles": n_key_tiles,
        },
        {"BLOCK_T": next_power_of_2(n_key_tiles), "BLOCK_I": 256},
        num_warps=4 if n_key_tiles <= 2048 else 16,
    )
    launch(
        "transpose_lists",
        {"split": split is not None, "places": places},
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
    return {**found, "rows_ptr": rows}


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


def _forward(call: _Call, out: Tensor, lse: Tensor, empty: str, n_heads: int, more: dict[str, Any]) -> None:
    """Launches for n_heads heads [B, H], whole groups of them."""
    wide_values = call.constants["BLOCK_DV"] > 64
    heads = call.stacked
    block_m = heads * call.constants["BLOCK_M"]
    # Four warps would spill registers: accumulators of 128 rows, of the mean of all values, or of float32 heads above
    # 64.
    # Stacked heads on Hopper: few keys a step leave room for a second program, which multiplies while the first takes
    # exponentials (15 % faster than 64 keys and one program, measured).
    paired = heads > 1 and not before_hopper()
    block_n = call.block_n(32 if call.wide > 128 or call.full or paired else 64)
    crowded = call.crowded or block_m >= 128 or (wide_values and (empty == "uniform" or call.full or before_hopper()))
    launch(
        "tile_attention_fwd",
        {**call.structure, "empty": empty},
        "tile_attention_fwd_kernel",
        (call.n_blocks * n_heads // heads,),
        {**call.args, **more, "out_ptr": out, **strides("out", out, "bhtd"), "lse_ptr": lse},
        {**call.constants, "BLOCK_M": block_m, "HEADS": heads, "BLOCK_N": block_n},
        # A wave of AMD's has 64 lanes: four have as many registers as one program can use.
        num_warps=8 if crowded and not on_hip() else 4,
        num_stages=1 if call.full else 2 if before_hopper() or on_hip() else 4 if paired else 3,
        alternatives=functools.partial(call.alternatives, block_n),
    )


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return reference.attention_output(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _pooled(k: Tensor, v: Tensor, tile_k: int) -> dict[str, Tensor]:
    return {"pooled_k_ptr": pool_tiles(k, tile_k, k.dtype), "pooled_v_ptr": pool_tiles(v, tile_k, v.dtype)}


def supports_tile_attention(
    q,
    k,
    v,
    bias,
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
    compensate=False,
) -> Reject | None:
    """None where the kernels can run `spt::tile_attention_v1`, else the reason."""
    reason = _supports(q, k, v, bias, expr, expr_in)
    reason = reason if reason is not None else supports_tiles(tile_q, tile_k)
    if reason is None and ceil_div(k.shape[2], tile_k) > MAX_ROW:
        reason = Reject("{} key tiles, more than {}", ceil_div(k.shape[2], tile_k), MAX_ROW)
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
    compensate: bool = False,
) -> tuple[Tensor, Tensor]:
    """`spt::tile_attention_v1` by one kernel: one program per query tile, head and batch row, online softmax."""
    reference.check_attention(q, k, v, bias, tiles, counts, seed, p, empty, tile_q, tile_k)
    q, k, v, given = *map(_aligned, (q, k, v)), v
    tiles, counts = in_use(tiles, counts, q.shape[2], tile_q)
    pseudo = _pseudo(bias, expr) if compensate else None
    masked = (bias, counts, expr, expr_in, seed, p, scale, softcap)
    call = _call(q, k, v, *masked, tile_q, tile_k, single=False, pseudo=pseudo)
    more: dict[str, Any] = {"tiles_ptr": tiles, "k_max": tiles.shape[3]}
    if compensate:
        more |= {"marks_ptr": mark_lists(tiles, counts, call.n_key_tiles), **_pooled(k, v, tile_k)}
    out, lse = _outputs(q, v)
    _forward(call, out, lse, empty, q.shape[0] * q.shape[1], more)
    return _narrow(out, q, given), lse


def supports_key_attention(q, k, v, bias, keys, counts, expr, expr_in, seed, p, scale, softcap, empty) -> Reject | None:
    """None where the kernels can run `spt::key_attention_v1`, else the reason."""
    reason = _supports(q, k, v, bias, expr, expr_in)
    if reason is None and q.shape[2] * k.shape[2] >= 1 << 31:
        reason = Reject("{} x {} marks of a head", q.shape[2], k.shape[2])
    return reason


def _runs(n: int, group: int, n_q: int, n_k: int) -> Iterator[tuple[int, int]]:
    """Ranges of the n heads [B, H], whole groups each, whose marks fit the scratch."""
    at_a_time = max(1, SCRATCH_BYTES // (n_q * n_k * group)) * group
    for first in range(0, n, at_a_time):
        yield first, min(first + at_a_time, n)


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
    """`spt::key_attention_v1`: marks of the listed keys, then one program per 64 queries, head and batch row."""
    reference.check_attention(q, k, v, bias, keys, counts, seed, p, empty)
    q, k, v, given = *map(_aligned, (q, k, v)), v
    n_q, n_k = q.shape[2], k.shape[2]
    keys, counts = keys.contiguous(), counts.contiguous()
    masked = (bias, counts, expr, expr_in, seed, p, scale, softcap)
    call = _call(q, k, v, *masked, SINGLE_TILE_Q, SINGLE_TILE_K, single=True)
    out, lse = _outputs(q, v)
    marks: Tensor | None = None
    for first, stop in _runs(q.shape[0] * q.shape[1], q.shape[1] // k.shape[1], n_q, n_k):
        part = [x.flatten(0, 1)[first:stop] for x in (keys, counts)]
        marks = mark_lists(part[0], part[1], n_k, None if marks is None else marks[: stop - first])
        more = {"marks_ptr": marks, "first_head": first}
        _forward(call, out, lse, empty, stop - first, more)
    return _narrow(out, q, given), lse


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """How the kernel that computes all gradients of a query tile at once is laid out.

    Args:
        products: matrix products that a program makes in turn for the same keys, each for the queries of `stack` heads.
        splits: programs of a query tile.  block_n: keys per step.  num_warps: of a program.
        dtype: of its partial sums. float16 could overflow in them where it does not in their total.
    """

    products: int
    stack: int
    splits: int
    block_n: int
    num_warps: int
    dtype: torch.dtype


def fused_of(call: _Call, dtype: torch.dtype, k_max: int) -> Fused | None:
    """The layout for a call; None where the kernels that compute dQ apart from dK and dV serve."""
    constants = call.constants
    group, block_m = constants["GROUP"], constants["BLOCK_M"]
    other_lists = call.structure["single"] or call.structure["pseudo"] is not None or _is_additive(call)
    large = call.full or call.wide > 128 or call.tile_k > 32 or k_max >= 1 << 15
    if other_lists or large or not on_hopper():
        return None
    stack = min(next_power_of_2(group), max(1, 128 // block_m))
    # What masks and dropout need beside two products would not fit the registers.
    bias, dropout, softcap = (call.structure[name] for name in ("bias", "dropout", "softcap"))
    crowded = bias or (call.wide > 64 and (dropout or softcap))
    products = 2 if group > stack and not crowded else 1
    return Fused(
        products,
        stack,
        ceil_div(call.tile_q, block_m) * ceil_div(group, products * stack),
        max(call.tile_k, FUSED_KEYS),
        8 if stack * block_m >= 128 else 4,
        dtype if dtype == torch.bfloat16 else torch.float32,
    )


def ranges(n_heads: int, n_rows: int, bytes_of_row: int) -> list[tuple[int, int, int, int]]:
    """(first head, heads, first query tile, query tiles) of ranges in order whose partial sums fit the scratch."""
    heads = min(max(PARTIAL_BYTES // (bytes_of_row * n_rows), 1), n_heads)
    rows = min(max(PARTIAL_BYTES // bytes_of_row, 1), n_rows)
    return [
        (head, min(heads, n_heads - head), row, min(rows, n_rows - row))
        for head in range(0, n_heads, heads)
        for row in range(0, n_rows, rows)
    ]


class _Backward:
    """The kernels of one backward pass, in the order in which they run: `queries`, (`bias`, `pooled`,) `keys`.

    Where there is a `Fused`, `pairs` runs between them, and the device decides by head which of the kernels do something.
    """

    def __init__(
        self,
        call: _Call,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
        grad_out: Tensor,
        out: Tensor,
        lse: Tensor,
        empty: str,
        special: bool,
        needs: list[bool],
    ):
        self.q, self.k, self.v, self.bias_in = inputs
        self.call, self.grad_out, self.empty, self.needs = call, grad_out, empty, needs
        q, k, v, bias = inputs
        self.out, lse = out, lse.contiguous()
        self.group = q.shape[1] // k.shape[1]
        additive = _is_additive(call)
        blank_dropout = special and call.structure["dropout"] and empty == "uniform"
        self.special, self.blank_dropout = special, blank_dropout
        self.split: Split | None = None
        self.fused: Fused | None = None
        rows = q.shape[:3]
        self.nothing = q.new_empty(rows, dtype=torch.int8) if special else None
        self.dv_base = None
        if special and not blank_dropout:
            self.dv_base = q.new_empty((k.shape[0] * k.shape[1], v.shape[3]), dtype=torch.float32)
        # Where logits are plain, lse itself says what probabilities are; see `norm` of the template.
        self.lse, self.shift = lse, torch.empty_like(lse) if additive else lse
        self.args = {**call.args, "dout_ptr": grad_out, **strides("dout", grad_out, "bhtd")}
        self.args |= {"delta_ptr": torch.empty_like(lse)}
        if additive:
            self.args["norm_ptr"] = torch.empty_like(lse)
        self.dq, self.dk, self.dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        self.dbias: Tensor | None = None
        if needs[3] and bias is not None and bias.is_floating_point():
            self.dbias = q.new_zeros((*bias.shape[:2], q.shape[2], k.shape[2]), dtype=torch.float32)

    def _launch(
        self,
        kernel: str,
        n_programs: int,
        args: dict[str, Any],
        constants: dict[str, Any],
        alternatives: Alternatives = (),
        setting: Setting | None = None,
        ranged: bool = False,
    ) -> None:
        deep = not (self.call.full or self.call.wide > 128)
        structure = {
            **self.call.structure,
            "special": self.special,
            "blank_dropout": self.blank_dropout,
            "split": self.split is not None,
            "fused": self.fused.products if self.fused is not None else 0,
            "ranged": ranged,
        }
        # The gradient of the bias reads and writes beside its products.
        crowded = self.call.crowded or (kernel == "dbias" and self.call.wide > 64 and not on_hopper() and not on_hip())
        warps = 4 if deep and not (crowded and kernel != "dkdv") else 8
        # Two stages copy the next rows when this step is over, three while it runs.
        stages = 1 if not deep else 3 if on_hopper() else 2
        launch(
            "tile_attention_bwd",
            structure,
            f"tile_attention_bwd_kernel_{kernel}",
            (n_programs,),
            args,
            constants,
            num_warps=warps if setting is None else setting.num_warps,
            num_stages=stages if setting is None else setting.num_stages,
            alternatives=alternatives,
        )

    def pairs(self, fused: Fused, tiles: Tensor, lists: dict[str, Any]) -> None:
        """All gradients of the heads without a row that lists everything; lists: of `transpose_lists`."""
        call, args = self.call, self.args
        self.fused = fused
        k_max, n_k = tiles.shape[3], self.k.shape[2]
        n_heads = self.k.shape[0] * self.k.shape[1]
        tile = k_max * fused.splits * call.tile_k
        wide = self.k.shape[3] + self.v.shape[3]
        parts = ranges(n_heads, call.n_query_tiles, tile * wide * fused.dtype.itemsize)
        heads, rows = parts[0][1], parts[0][3]
        ranged = rows < call.n_query_tiles
        names = (("k", self.k), ("v", self.v))
        shared = {
            f"partial_{name}_ptr": x.new_empty((heads * rows * tile, x.shape[3]), dtype=fused.dtype) for name, x in names
        }
        of_queries = {
            **args,
            **shared,
            "out_ptr": self.out,
            **strides("out", self.out, "bhtd"),
            "lse_ptr": self.lse,
            "tiles_ptr": tiles,
            "k_max": k_max,
            "anyone_ptr": lists["anyone_ptr"],
            "dq_ptr": self.dq,
        }
        del of_queries["delta_ptr"]
        of_keys: dict[str, Any] = {**shared, "dk_ptr": self.dk, "dv_ptr": self.dv}
        of_keys |= {name: lists[name] for name in ("starts_ptr", "ends_ptr", "rows_ptr", "anyone_ptr")}
        of_keys |= {name: call.args[name] for name in ("scale", "n_k", "n_query_tiles", "n_key_tiles")}
        of_keys["k_max"] = k_max
        if ranged:
            of_keys |= {
                f"total_{name}_ptr": x.new_empty((heads * n_k, x.shape[3]), dtype=torch.float32) for name, x in names
            }
        if self.nothing is not None:
            of_queries["nothing_ptr"] = self.nothing
            of_keys["dv_base_ptr"] = self.dv_base
        constants = {**call.constants, "BLOCK_N": fused.block_n, "STACK": fused.stack, "SPLITS": fused.splits}
        blocks = {name: constants[name] for name in ("HEAD_DIM", "VALUE_DIM", "BLOCK_D", "BLOCK_DV", "TILE_K", "SPLITS")}
        lanes = max(1, min(8, 8192 // (call.tile_k * call.wide)))
        options = [Setting(fused.num_warps, 2)]
        if fused.block_n // 2 >= max(16, call.tile_k):
            options.append(Setting(fused.num_warps, 3, (("BLOCK_N", fused.block_n // 2),)))
        for first_head, n_range, first_row, n_rows in parts:
            of_range = {"first_head": first_head, "first_row": first_row, "n_rows": n_rows}
            is_last = first_row + n_rows == call.n_query_tiles
            self._launch(
                "pairs",
                n_range * n_rows * fused.splits,
                {**of_queries, **of_range},
                constants,
                options,
                setting=Setting(fused.num_warps, 3),
            )
            if is_last:
                self.blank(first_head * self.group, (first_head + n_range) * self.group)
            more = {"is_first": int(first_row == 0), "is_last": int(is_last)} if ranged else {}
            self._launch(
                "sum",
                n_range * call.n_key_tiles,
                {**of_keys, **of_range, **more},
                {**blocks, "LANES": lanes},
                setting=Setting(4, 2),
                ranged=ranged,
            )

    def _keys_per_step(self) -> int:
        """Of the kernels that walk lists: what shared memory holds beside queries and gradients of their results."""
        call = self.call
        crowded = call.full or call.wide > 64 or before_hopper() or call.structure["single"]
        return call.block_n(16 if call.full and call.wide > 128 else 32 if crowded else 64)

    def queries(self, n_heads: int, lists: dict[str, Any]) -> None:
        """dQ of n_heads heads, and what the other kernels need of every query."""
        call = self.call
        args = {**self.args, **lists, "lse_ptr": self.lse, "dq_ptr": self.dq}
        args |= {"out_ptr": self.out, **strides("out", self.out, "bhtd")}
        if self.shift is not self.lse:
            args["shift_ptr"] = self.shift
        if self.nothing is not None:
            args["nothing_ptr"] = self.nothing
        block_n = self._keys_per_step()
        constants = {**call.constants, "BLOCK_N": block_n}
        self._launch("dq", call.n_blocks * n_heads, args, constants, functools.partial(call.alternatives, block_n))

    def bias(self, lists: dict[str, Any]) -> None:
        """The gradient of a float bias over the heads of the lists, added to what is there."""
        if self.dbias is None:
            return
        call = self.call
        batch, n_heads = self.dbias.shape[:2]
        args = {
            **self.args,
            **lists,
            "lse_ptr": self.shift,
            "dbias_ptr": self.dbias,
            "bias_heads": n_heads,
            "batch_span": self.q.shape[0] // batch,
            "head_span": self.q.shape[1] // n_heads,
        }
        constants = {**call.constants, "BLOCK_N": self._keys_per_step()}
        self._launch("dbias", call.n_blocks * batch * n_heads, args, constants)

    def blank(self, first: int, stop: int) -> None:
        """What queries that see nothing (they return NaN, or the mean of all values) add to the gradient of values."""
        if self.dv_base is None or self.nothing is None:
            return
        nothing = self.nothing.flatten(0, 1)[first:stop].unsqueeze(-1) != 0
        weight = torch.nan if self.empty == "nan" else 1.0 / self.k.shape[2]
        each = torch.where(nothing, self.grad_out.flatten(0, 1)[first:stop].float() * weight, 0.0)
        base = each.sum(1).unflatten(0, (-1, self.group)).sum(1)
        self.dv_base[first // self.group : stop // self.group] = base

    def keys(self, first: int, stop: int, lists: dict[str, Any]) -> None:
        """dK and dV of the key heads of heads first to stop."""
        call = self.call
        n_groups = (stop - first) // self.group
        args = {**self.args, **lists, "lse_ptr": self.shift, "dk_ptr": self.dk, "dv_ptr": self.dv}
        if self.blank_dropout:
            args["nothing_ptr"] = self.nothing
        elif self.special:
            args["dv_base_ptr"] = self.dv_base
        constants = {**call.constants, "BLOCK_N": max(16, call.tile_k)}
        if call.wide > 64 and call.tile_k > 16:
            # Gradients of many keys leave registers for fewer queries.
            constants["BLOCK_M"] = min(constants["BLOCK_M"], 32)
        split = self.split
        if split is None:
            args["n_items"] = call.n_key_tiles
            self._launch("dkdv", call.n_key_tiles * n_groups, args, constants, call.alternatives)
            return
        partial = {
            f"partial_{name}_ptr": x.new_empty((n_groups, split.n_slots, call.tile_k, x.shape[3]), dtype=torch.float32)
            for name, x in (("k", self.k), ("v", self.v))
        }
        args |= {**partial, "n_slots": split.n_slots, "n_items": split.n_items, "chunk": split.chunk}
        self._launch("dkdv", split.n_items * n_groups, args, constants, call.alternatives)
        wanted = ("dk_ptr", "dv_ptr", "first_slots_ptr", "starts_ptr", "ends_ptr", "anyone_ptr", "chunk", "n_slots")
        names = (*wanted, "n_k", "n_key_tiles")
        blocks = ("HEAD_DIM", "VALUE_DIM", "BLOCK_D", "BLOCK_DV", "TILE_K")
        self._launch(
            "combine",
            call.n_key_tiles * n_groups,
            {**{name: args[name] for name in names}, **partial},
            {**{name: constants[name] for name in blocks}, "BLOCK_T": max(1, call.tile_k)},
        )

    def pooled(self, lists: dict[str, Any]) -> dict[str, Tensor]:
        """Gradients of the mean keys and values that stand for dropped tiles."""
        call = self.call
        found = {
            f"dpooled_{name}_ptr": x.new_empty((*x.shape[:2], call.n_key_tiles, x.shape[3]), dtype=torch.float32)
            for name, x in (("k", self.k), ("v", self.v))
        }
        programs = ceil_div(call.n_key_tiles, call.constants["BLOCK_P"]) * self.k.shape[0] * self.k.shape[1]
        constants = {**call.constants, "BLOCK_N": max(16, call.tile_k)}
        self._launch("pooled", programs, {**self.args, **lists, "lse_ptr": self.shift, **found}, constants)
        return found

    def results(self, *dims: int) -> list[Tensor]:
        """What the op returns: tensors of their own where nothing is asked for, as results must not alias each other.

        Args: dims: of queries, keys and values before they were aligned.
        """
        dbias = None
        if self.dbias is not None and self.bias_in is not None:
            dbias = self.dbias.sum_to_size(self.bias_in.shape).to(self.bias_in.dtype)
        grads = (self.dq, self.dk, self.dv)
        narrow = (g if g.shape[3] == d else g[..., :d].contiguous() for g, d in zip(grads, dims, strict=True))
        found = (*narrow, dbias)
        return [
            x if need and x is not None else self.q.new_empty(0) for x, need in zip(found, self.needs, strict=True)
        ]


def _supports_gradient(q: Tensor, grad_out: Tensor) -> Reject | None:
    if grad_out.dtype != q.dtype:
        return Reject("the gradient has dtype {}, q has {}", grad_out.dtype, q.dtype)
    return None


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
    compensate=False,
) -> Reject | None:
    """None where the kernels can run `spt::tile_attention_backward_v1`, else the reason."""
    rest = (expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k, compensate)
    reason = supports_tile_attention(q, k, v, bias, tiles, counts, *rest)
    return reason if reason is not None else _supports_gradient(q, grad_out)


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
    compensate: bool = False,
) -> list[Tensor]:
    """`spt::tile_attention_backward_v1`: dQ along the lists, then dK and dV along the transposed lists; no atomics."""
    dims = q.shape[3], k.shape[3], v.shape[3]
    grad_out, q, k, v, out = map(_aligned, (grad_out, q, k, v, out))
    tiles, counts = in_use(tiles, counts, q.shape[2], tile_q)
    pseudo = _pseudo(bias, expr) if compensate else None
    masked = (bias, counts, expr, expr_in, seed, p, scale, softcap)
    call = _call(q, k, v, *masked, tile_q, tile_k, single=False, pseudo=pseudo)
    special = empty != "zero" and _may_be_empty(bias, expr)
    run = _Backward(call, (q, k, v, bias), grad_out, out, lse, empty, special, needs)
    n_heads = q.shape[0] * q.shape[1]
    lists: dict[str, Any] = {"tiles_ptr": tiles, "k_max": tiles.shape[3]}
    if compensate:
        lists |= _pooled(k, v, tile_k)
    of_keys = needs[1] or needs[2]
    run.fused = fused_of(call, q.dtype, tiles.shape[3]) if of_keys and not run.blank_dropout else None
    marks = None
    if compensate or of_keys:
        marks = mark_lists(tiles, counts, call.n_key_tiles, places=run.fused is not None)
    if compensate:
        lists["marks_ptr"] = marks
    if run.fused is not None:
        transposed = transpose_lists(tiles, counts, marks, None)
        anyone = {"anyone_ptr": transposed["anyone_ptr"]}
        run.queries(n_heads, {**lists, **anyone})
        run.pairs(run.fused, tiles, transposed)
        run.keys(0, n_heads, {"k_max": lists["k_max"], "marks_ptr": marks, **anyone})
        return run.results(*dims)
    run.queries(n_heads, lists)
    run.bias(lists)
    if of_keys:
        del lists["tiles_ptr"]
        pooled = run.pooled(lists) if compensate else {}
        run.blank(0, n_heads)
        run.split = split_of(call.n_query_tiles, call.n_key_tiles, tiles.shape[3])
        run.keys(0, n_heads, {**lists, **pooled, "marks_ptr": marks, **transpose_lists(tiles, counts, marks, run.split)})
    return run.results(*dims)


def supports_key_attention_backward(
    grad_out,
    q,
    k,
    v,
    bias,
    out,
    lse,
    keys,
    counts,
    expr,
    expr_in,
    seed,
    p,
    scale,
    softcap,
    empty,
    needs,
) -> Reject | None:
    """None where the kernels can run `spt::key_attention_backward_v1`, else the reason."""
    rest = (expr, expr_in, seed, p, scale, softcap, empty)
    reason = supports_key_attention(q, k, v, bias, keys, counts, *rest)
    return reason if reason is not None else _supports_gradient(q, grad_out)


def key_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    counts: Tensor,
    expr: str,
    expr_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
    empty: str,
    needs: list[bool],
) -> list[Tensor]:
    """`spt::key_attention_backward_v1`: marks of the listed keys, few heads at a time, then dQ, dK and dV; no atomics."""
    dims = q.shape[3], k.shape[3], v.shape[3]
    grad_out, q, k, v, out = map(_aligned, (grad_out, q, k, v, out))
    n_q, n_k = q.shape[2], k.shape[2]
    keys, counts = keys.contiguous(), counts.contiguous()
    masked = (bias, counts, expr, expr_in, seed, p, scale, softcap)
    call = _call(q, k, v, *masked, SINGLE_TILE_Q, SINGLE_TILE_K, single=True)
    special = empty != "zero" and _may_be_empty(bias, expr)
    run = _Backward(call, (q, k, v, bias), grad_out, out, lse, empty, special, needs)
    marks: Tensor | None = None
    for first, stop in _runs(q.shape[0] * q.shape[1], run.group, n_q, n_k):
        part = [x.flatten(0, 1)[first:stop] for x in (keys, counts)]
        marks = mark_lists(part[0], part[1], n_k, None if marks is None else marks[: stop - first])
        lists = {"marks_ptr": marks, "first_head": first}
        run.queries(stop - first, lists)
        run.bias({**lists, "n_run": stop - first})
        if needs[1] or needs[2]:
            run.blank(first, stop)
            run.keys(first, stop, lists)
    return run.results(*dims)


for _op, _run, _supports_op in (
    ("tile_attention_v1", tile_attention, supports_tile_attention),
    ("tile_attention_backward_v1", tile_attention_backward, supports_tile_attention_backward),
    ("key_attention_v1", key_attention, supports_key_attention),
    ("key_attention_backward_v1", key_attention_backward, supports_key_attention_backward),
):
    registry.register(_op, "cuda", "triton", supports=accepts(_supports_op), taped=True)(_run)
