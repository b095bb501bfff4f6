"""CPU lowering of the routed FFN by generated C++ (`templates/routed_ffn.cpp.jinja`): one kernel each way, tile by tile.

A tile's rows of x (and of low-rank branches) are gathered, multiplied with the block's units, activated and multiplied with its
out-projection while they are in cache; the products wait until one pass adds up each token's. Backward, a tile's gradients go the
same way back, and the transposed hidden values and gradients of some blocks are kept for their weight gradients, which are taken
column by column and written in the model's own order of units. Weights are packed into panels once a call, through the
permutation, and never moved: that costs some F * E values of traffic against N * F * E multiplications. Sums are fp32.

Products are oneDNN's micro-kernels, which torch exports to code that is linked with it, as far as it has them for the processor.
Results are bitwise repeatable whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.errors import ExpressionError, SPTError
from spt_compiler.lowering import cpp, cpu_ffn, cpu_threads
from spt_compiler.lowering.registry import register
from spt_compiler.ops import reference_ffn
from spt_compiler.ops.reference import dropout_keys
from spt_compiler.ops.reference_ffn import FlatGrads, check_arguments, kept_blocks, row_capacity

log = logging.getLogger(__name__)

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
_FIELDS = (
    *("threads", "brgemm", "release", "n_blocks", "first_block", "last_block", "width", "n_units", "index", "lists", "units"),
    *("in", "n_in", "out", "n_out", "bias", "gates", "saved", "saved_rows", "saved_width"),
    *("strips", "n_values", "bias_grad", "gates_grad", "add"),
    *("drop_threshold", "drop_key0", "drop_key1", "low_threshold", "low_key0", "low_key1"),
    *("from", "from_stride", "from_unit", "from_k", "to", "to_stride", "k", "into"),
    *("n", "columns", "blocks", "slots", "first", "shift"),
)
_REALS = ("drop_factor", "low_factor")
_OPERAND = ("tokens", "tokens_stride", "k", "into", "out", "products", "grad", "grad_unit", "grad_k", "hidden")
# Bytes of products that wait for their sum, if the blocks of a chunk then have _MIN_ROWS rows on average. Larger memory than this
# glibc hands back to the system each time, and every page of it is a fault at the next call.
_CHUNK_BYTES = 1 << 25
_MIN_ROWS = 256
# Bytes a thread of transposed hidden values and gradients that wait for weight gradients, if it is not one block that needs more.
_STRIP_BYTES = 1 << 22
# Of the template: what widths are padded to, rows of a strip of transposed values, and from one unit's values to the next there.
_STEP, _STRIP, _APART = 16, 256, 272
# Of `at::native::cpublas`, by the dtype of the factors: brgemm, and what a thread calls when it needs it no more.
_BRGEMM = {
    torch.float32: "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    torch.bfloat16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
    torch.float16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c104HalfES5_Pfb",
}
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"


@functools.lru_cache(maxsize=256)
def _constants(act_expr: str, n_in: int, n_act: int, dtype: torch.dtype) -> dict[str, Any] | None:
    act = expression.parse(act_expr)
    pre, captured = [f"x{i}" for i in range(n_in)], [f"a{i}" for i in range(n_act)]
    try:
        slopes = [[x, expression.derivative(act, x)] for x in pre]
    except ExpressionError:
        return None
    fields = {"integers": [*_FIELDS, *captured, *(f"{a}_step" for a in captured)], "reals": list(_REALS), "operand": list(_OPERAND)}
    sizes = {"step": _STEP, "strip": _STRIP, "apart": _APART}
    return {"in_type": _TYPES[dtype], "act": act, "pre": pre, "captured": captured, "slopes": slopes, **fields, **sizes}


@functools.lru_cache(maxsize=len(_BRGEMM))
def _micro_kernels(dtype: torch.dtype) -> dict[str, int]:
    """Addresses of torch's micro-kernels for a dtype; {} where this torch has none, or the processor would emulate them."""
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        return {}
    try:
        library = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
        names = {"brgemm": _BRGEMM[dtype], "release": _RELEASE}
        return {field: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for field, name in names.items()}
    except (StopIteration, OSError, AttributeError) as error:
        log.debug("no micro-kernels for products of %s: %s", dtype, error)
        return {}


def kernels_for(act_expr: str, n_in: int, n_act: int, dtype: torch.dtype) -> Kernels | None:
    """The kernels of an activation for rows of a dtype; None where they cannot be compiled."""
    constants = _constants(act_expr, n_in, n_act, dtype)
    if constants is None or not cpp.usable():
        return None
    try:
        return Kernels(cpp.library("routed_ffn", constants), constants["integers"], constants["captured"], dtype)
    except SPTError as error:
        cpp.give_up(str(error))
        return None


def _operands(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """int64, descriptions of operands one a row; a tensor stands for its address and must outlive the call."""
    lines = [[_number(row.get(field)) for field in _OPERAND] for row in rows]
    return torch.tensor(lines, dtype=torch.int64)


def _number(value: Any) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else value or 0


def _strip_values(n_rows: int, width: int) -> int:
    """Values of one kind that the transposed rows of a block take."""
    return -(-n_rows // _STRIP) * _APART * _up(width, _STEP)


class Kernels:
    """Calls of one library; see the template for the fields."""

    def __init__(self, library: Any, fields: Sequence[str], captured: Sequence[str], dtype: torch.dtype):
        self.library, self.fields, self.captured = library, fields, captured
        self.micro_kernels = _micro_kernels(dtype) if torch.backends.mkldnn.enabled else {}
        if self.micro_kernels and not self._probed():
            self.micro_kernels = {}

    def _probed(self) -> bool:
        """Whether the micro-kernels multiply here, asked once a library: oneDNN may be held to older processors."""
        found = getattr(self.library, "spt_probed", None)
        if found is None:
            try:
                self.call("probe")
                found = True
            except SPTError:
                found = False
            self.library.spt_probed = found
        return found

    def call(self, name: str, **values: Any) -> None:
        """One kernel on all threads."""
        given = values | self.micro_kernels | {"threads": cpu_threads.width()}
        cpp.call(getattr(self.library, name), self.fields, _REALS, given)

    def inputs(self, act_in: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields of what the activation reads beside the pre-activations: one value each, or one per unit in block order."""
        values: dict[str, Any] = {}
        for name in self.captured:
            values[name] = act_in[name].float().contiguous()
            values[f"{name}_step"] = int(act_in[name].dim() == 1 and act_in[name].shape[0] != 1)
        return values

    def sum_rows(self, rows: Tensor) -> Tensor:
        """[k] fp32: the sum of rows [n, k]."""
        if rows.stride(1) != 1:
            return rows.sum(0, dtype=torch.float32)
        out = torch.empty(rows.shape[1])
        shape = {"from_stride": rows.stride(0), "n": rows.shape[0], "columns": rows.shape[1]}
        self.call("sum_rows", **{"from": rows, "to": out}, **shape)
        return out


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class _Way:
    """A product with the hidden units: tokens [N, k] @ weight^T, added to a pre-activation, or (on the way out) hidden @ weight.

    Args:
        name: of the weight in the op, for its gradient.  weight: [F, k].  hidden: the pre-activation; on the way out 1 if the
        low-rank branch's own dropout lies before it, else 0.  tokens, of_tokens: on the way in, and the name of their gradient.
    """

    name: str
    weight: Tensor
    hidden: int = 0
    tokens: Tensor | None = None
    of_tokens: str = ""


@dataclass(frozen=True)
class _Chunk:
    """Tokens whose sums over blocks are taken together, and for each block the range of its list that holds them.

    Args: n_rows: of all ranges.  lists: int64 [G, 5], see the template.
    """

    tokens: slice
    ranges: tuple[tuple[int, int], ...]
    n_rows: int
    lists: Tensor


class _Lists(cpu_ffn.Layout):
    """The chunks of tokens, and lists of all tokens where none are given because every block is computed."""

    def __init__(self, x: Tensor, blocks: Tensor, rows: Tensor, offsets: Tensor, permutation: Tensor):
        super().__init__(x, blocks, rows, offsets, permutation)
        n_tokens, n_blocks = self.n_tokens, self.n_blocks
        if self.dense:
            self.blocks = torch.arange(n_blocks, dtype=torch.int32).expand(n_tokens, n_blocks).contiguous()
            self.rows = torch.arange(n_tokens).repeat(n_blocks)
            self.starts = [g * n_tokens for g in range(n_blocks + 1)]
        else:
            self.blocks, self.rows = blocks.contiguous(), rows.long()
        self.chunks = self._chunks(x.element_size() * max(x.shape[1], 1))

    def _chunks(self, row_bytes: int) -> list[_Chunk]:
        n_tokens, slots = self.n_tokens, max(self.blocks.shape[1], 1)
        most = _CHUNK_BYTES // 4 if self.dense else _CHUNK_BYTES  # dense steps come first, where learning needs memory, too
        size = max(most // (slots * row_bytes), _MIN_ROWS * self.n_blocks // slots, 1)
        if n_tokens <= size:
            return [self._chunk(slice(0, n_tokens), [(0, count) for count in self.counts])]
        edges = [n_tokens * i // -(-n_tokens // size) for i in range(-(-n_tokens // size) + 1)]
        bounds = []
        for start, count in zip(self.starts, self.counts, strict=False):
            found = edges
            if count != n_tokens:
                found = torch.searchsorted(self.rows[start : start + count], torch.tensor(edges)).tolist()
            bounds.append(list(itertools.pairwise(found)))
        return [self._chunk(slice(*edges[i : i + 2]), [b[i] for b in bounds]) for i in range(len(edges) - 1)]

    def _chunk(self, tokens: slice, ranges: list[tuple[int, int]]) -> _Chunk:
        lines, place = [], 0
        for start, units, (low, high) in zip(self.starts, self.units_of, ranges, strict=False):
            lines.append((start + low, high - low, place, units.start, units.stop - units.start))
            place += high - low
        return _Chunk(tokens, tuple(ranges), place, torch.tensor(lines))


class _Site:
    """What forward and backward of one call share."""

    def __init__(
        self,
        kernels: Kernels,
        x: Tensor,
        w_in: Sequence[Tensor],
        b_in: Sequence[Tensor],
        w_out: Tensor,
        lora_a_out: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        lora_down: Tensor | None,
        gates: Tensor | None,
        blocks: Tensor,
        rows: Tensor,
        offsets: Tensor,
        permutation: Tensor,
        act_in: Sequence[Tensor],
        dropout: Mapping[str, tuple[Tensor | None, float]],
    ):
        """dropout: (seed, p) of the hidden units by "drop", of the low-rank branch on the out-projection by "low"."""
        self.kernels, self.dtype = kernels, x.dtype
        self.pair = 4 // x.element_size()
        self.lists = lists = _Lists(x, blocks, rows, offsets, permutation)
        read = self.tokens(x)
        self.ways_in = [_Way(f"w_in{i}", w, i, read, "x") for i, w in enumerate(w_in)]
        branches = enumerate(zip(lora_a_out, lora_b, strict=True))
        self.ways_in += [_Way(f"lora_b{i}", b, i, self.tokens(a), f"lora_a_out{i}") for i, (a, b) in branches if b.shape[1]]
        self.ways_out = [_Way("w_out", w_out.t())]
        self.fields: dict[str, Any] = {
            **{"n_blocks": lists.n_blocks, "last_block": lists.n_blocks, "width": lists.width, "n_units": lists.n_units},
            **{"index": lists.rows, "units": lists.units, "gates": None if gates is None else gates.float().contiguous()},
            "bias": torch.stack([self._arranged(b.float()) for b in b_in]) if b_in else None,
            **kernels.inputs({f"a{i}": self._arranged(a.to(x.dtype)) for i, a in enumerate(act_in)}),
            **self._dropout("drop", *dropout["drop"]),
        }
        if lora_down is not None:
            low = self._dropout("low", *dropout["low"])
            self.ways_out.append(_Way("lora_down", lora_down.t(), 1 if low else 0))
            self.fields |= low
        # Kinds of values a hidden unit has: gradients of its pre-activations, itself, itself behind the branch's dropout.
        self.n_values = len(w_in) + 1 + max(way.hidden for way in self.ways_out)
        self.fields["n_values"] = self.n_values

    def _arranged(self, values: Tensor) -> Tensor:
        """A vector over the hidden units in block order; a single value as it is."""
        units = self.lists.units
        return values[units] if units is not None and values.dim() == 1 and values.shape[0] != 1 else values

    @staticmethod
    def _dropout(name: str, seed: Tensor | None, p: float) -> dict[str, Any]:
        if seed is None or p == 0:
            return {}
        keys = [int(key) for key in dropout_keys(seed)]
        # p = 1 drops everything: no hash is as large as 2^32.
        factor = 1 / (1 - p) if p < 1 else 0.0
        # A p so small that no hash lies below it still scales.
        fields = {"threshold": max(int(p * 2**32), 1), "key0": keys[0], "key1": keys[1], "factor": factor}
        return {f"{name}_{field}": value for field, value in fields.items()}

    def tokens(self, values: Tensor) -> Tensor:
        """[N, k] of the site's dtype, with an innermost stride of 1."""
        values = values.to(self.dtype)
        return values if values.stride(1) == 1 else values.contiguous()

    def operand(self, way: _Way, tokens: Tensor | None, **fields: Any) -> dict[str, Any]:
        """The fields of an operand, see the template."""
        given = {} if tokens is None else {"tokens": tokens, "tokens_stride": tokens.stride(0)}
        return {"k": way.weight.shape[1], "hidden": way.hidden, **given, **fields}

    def pack(self, way: _Way, *, into: bool) -> Tensor:
        """Panels of its weight, see the template."""
        weight, width = way.weight.to(self.dtype), self.lists.width
        k = weight.shape[1]
        size = _up(k, self.pair) * _up(width, _STEP) if into else _up(width, self.pair) * _up(k, _STEP)
        panels = torch.empty(self.lists.n_blocks * size, dtype=self.dtype)
        given = {"from": weight, "from_unit": weight.stride(0), "from_k": weight.stride(1), "to": panels, "k": k, "into": int(into)}
        self.call("pack", lists=self.lists.chunks[0].lists, **given)
        return panels

    @staticmethod
    def described(ins: Sequence, outs: Sequence, saved: Tensor | None) -> dict[str, Any]:
        """Fields of `forward` and `backward`: operands, which must outlive the calls, and what is saved."""
        where = {} if saved is None else {"saved": saved, "saved_rows": saved.shape[1], "saved_width": saved.shape[2]}
        return {"in": _operands(ins), "n_in": len(ins), "out": _operands(outs), "n_out": len(outs), **where}

    def call(self, name: str, **values: Any) -> None:
        self.kernels.call(name, **(self.fields | values))

    def groups(self, chunk: _Chunk, *, wanted: bool) -> Iterator[tuple[slice, Tensor | None]]:
        """Blocks that are done together, and memory for their transposed values if that is wanted."""
        sizes = [_strip_values(high - low, self.lists.width) * self.n_values for low, high in chunk.ranges]
        if not wanted:
            yield slice(0, len(sizes)), None
            return
        groups, start, most = [], 0, _STRIP_BYTES * cpu_threads.width() // self.dtype.itemsize
        for stop in range(1, len(sizes) + 1):
            if stop == len(sizes) or sum(sizes[start : stop + 1]) > most:
                groups.append(slice(start, stop))
                start = stop
        strips = torch.empty(max(sum(sizes[group]) for group in groups), dtype=self.dtype)
        for group in groups:
            yield group, strips

    def gradient(self, weight: Tensor) -> Tensor:
        """Memory for the gradient of a weight, in its layout: wide if several chunks add to it, zero where nothing is written."""
        chunks = self.lists.chunks
        dtype = torch.float32 if len(chunks) > 1 else self.dtype
        zero = dtype != self.dtype or any(low == high for low, high in chunks[0].ranges)
        return (torch.zeros_like if zero else torch.empty_like)(weight, dtype=dtype)


class _Sums:
    """[N, width]: for each token the sum over its blocks of what their products give, and constants.

    Args: bias: [width] or None, added for every token.  shift: [G, width] or None, its rows of the dropped blocks are added.
    """

    def __init__(self, site: _Site, width: int, bias: Tensor | None = None, shift: Tensor | None = None):
        self.site = site
        lists = site.lists
        rows = max(chunk.n_rows for chunk in lists.chunks)
        self.total, self.products = (torch.empty((n, width), dtype=site.dtype) for n in (lists.n_tokens, rows))
        self.bias = None if bias is None else bias.contiguous()
        self.shift = None if shift is None else shift.float().contiguous()

    def close(self, chunk: _Chunk) -> None:
        """Takes the sums of a chunk, of which every product is there."""
        total, blocks = self.total[chunk.tokens], self.site.lists.blocks[chunk.tokens]
        self.site.call(
            "sum_blocks",
            **{"from": self.products, "from_stride": self.products.stride(0), "to": total, "to_stride": total.stride(0)},
            **{"n": total.shape[0], "columns": total.shape[1], "blocks": blocks, "slots": blocks.shape[1]},
            **{"lists": chunk.lists, "first": chunk.tokens.start, "bias": self.bias, "shift": self.shift},
        )


_ROUTE_FIELDS = (
    *("threads", "n_tokens", "n_blocks", "n_slots", "n_kept", "tile", "capacity"),
    *("scores", "token_stride", "block_stride", "always_on", "blocks", "rows", "offsets"),
)


def _route_constants(scores: Tensor) -> dict[str, Any]:
    return {"in_type": _TYPES[scores.dtype], "integers": list(_ROUTE_FIELDS)}


def _route_fits(scores: Tensor, *rest: Any) -> bool:
    return scores.dtype in _TYPES


def _foresee_route(scores: Tensor, *rest: Any) -> None:
    cpp.foresee("route", _route_constants(scores))


@register("route_v1", *("cpu", "cpp"), supports=_route_fits, ready=cpp.usable, foresee=_foresee_route, preferred=True)
def route(scores: Tensor, always_on: Tensor, budget: Tensor, max_density: float, tile: int, min_tokens: int):
    """`spt::route_v1` by a C++ kernel; see `ops/ffn.py` for the arguments."""
    try:
        library = cpp.library("route", _route_constants(scores))
    except SPTError as error:
        cpp.give_up(str(error))
        return reference_ffn.route(scores, always_on, budget, max_density, tile, min_tokens)
    n_tokens, n_blocks = scores.shape
    n_slots, density = kept_blocks(max_density, n_blocks), float(budget[0])
    shapes = ((n_tokens, n_slots), (row_capacity(n_tokens, n_slots, n_blocks, tile),), (n_blocks + 1,))
    if density < 0 or n_tokens < min_tokens:
        blocks, rows, offsets = (torch.full(shape, -1, dtype=torch.int32) for shape in shapes)
        return blocks, rows, offsets
    blocks, rows, offsets = (torch.empty(shape, dtype=torch.int32) for shape in shapes)
    # NaN != NaN: a budget that is not a number is no limit.
    n_kept = kept_blocks(min(density, max_density) if density == density else max_density, n_blocks)
    values = {
        **{"n_tokens": n_tokens, "n_blocks": n_blocks, "n_slots": n_slots, "capacity": rows.shape[0], "tile": tile},
        **{"n_kept": min(max(n_kept, int(always_on.sum())), n_slots), "threads": cpu_threads.width()},
        **{"scores": scores, "token_stride": scores.stride(0), "block_stride": scores.stride(1)},
        **{"always_on": always_on.contiguous(), "blocks": blocks, "rows": rows, "offsets": offsets},
    }
    cpp.call(library.route, _ROUTE_FIELDS, (), values)
    return blocks, rows, offsets


def _fits(x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, blocks, rows, offsets, *rest) -> bool:
    _, _, act_expr, act_in, *_ = rest
    return _known(x, w_in, act_expr, act_in)


def _known(x: Tensor, w_in: Sequence[Tensor], act_expr: str, act_in: Sequence[Tensor]) -> bool:
    return x.dtype in _TYPES and _constants(act_expr, len(w_in), len(act_in), x.dtype) is not None


def _foresee(x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, blocks, rows, offsets, *rest) -> None:
    _, _, act_expr, act_in, *_ = rest
    cpp.foresee("routed_ffn", _constants(act_expr, len(w_in), len(act_in), x.dtype))


def _backward_fits(grad_y, grad_low, x, w_in, *rest) -> bool:
    act_expr, act_in, *_, needs = rest[11:]
    captured = any(needs[len(needs) - len(act_in) :])  # the last of the inputs: no kernel gives them a gradient
    return not captured and _known(x, w_in, act_expr, act_in)


@register("routed_ffn_v1", *("cpu", "cpp"), supports=_fits, ready=cpp.usable, foresee=_foresee, preferred=True)
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
):
    """`spt::routed_ffn_v1` by C++ kernels; see `ops/ffn.py` for the arguments."""
    weights, lists = (w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down), (gates, blocks, rows, offsets, permutation)
    random = (seed, p, lora_seed, lora_p)
    check_arguments(x, *weights, *lists, compensation, act_in, *random)
    kernels = kernels_for(act_expr, len(w_in), len(act_in), x.dtype)
    if kernels is None:
        return cpu_ffn.routed_ffn(x, *weights, *lists, compensation, act_expr, act_in, *random, save)
    dropout = {"drop": (seed, p), "low": (lora_seed, lora_p)}
    site = _Site(kernels, x, w_in, b_in, w_out, lora_a_out, lora_b, lora_down, *lists, act_in, dropout)
    saved = x.new_empty((len(w_in), rows.shape[0] if save else 0, site.lists.width))
    kept = None
    if save:
        site.lists.clear_unused(saved)
        kept = None if site.lists.dense else saved
    ins = [site.operand(way, way.tokens, into=site.pack(way, into=True)) for way in site.ways_in]
    sums = [_Sums(site, w_out.shape[0], b_out, compensation), _Sums(site, 0 if lora_down is None else lora_down.shape[0])]
    outs = [
        site.operand(way, None, out=site.pack(way, into=False), products=s.products)
        for way, s in zip(site.ways_out, sums, strict=False)
    ]
    described = site.described(ins, outs, kept)
    for chunk in site.lists.chunks:
        site.call("forward", lists=chunk.lists, **described)
        for s in sums[: len(outs)]:
            s.close(chunk)
    return sums[0].total, saved, sums[1].total


@register("routed_ffn_backward_v1", "cpu", "cpp", supports=_backward_fits, ready=cpp.usable, preferred=True)
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
    """`spt::routed_ffn_backward_v1` by C++ kernels: no GEMM for what is not needed, and none again for what was saved."""
    weights, lists = (w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down), (gates, blocks, rows, offsets, permutation)
    flat = FlatGrads(x, *weights, gates, act_in, needs)
    kernels = kernels_for(act_expr, len(w_in), len(act_in), x.dtype)
    if kernels is None:
        random = (seed, p, lora_seed, lora_p)
        return cpu_ffn.routed_ffn_backward(grad_y, grad_low, x, *weights, *lists, act_expr, act_in, *random, saved, needs)
    flat.put("b_out", lambda: kernels.sum_rows(grad_y))
    if flat.needed <= {"b_out"}:
        return flat.tensors()

    dropout = {"drop": (seed, p), "low": (lora_seed, lora_p)}
    site = _Site(kernels, x, w_in, b_in, w_out, lora_a_out, lora_b, lora_down, *lists, act_in, dropout)
    kept = saved if saved.shape[1] and not site.lists.dense else None
    sums = {way.of_tokens: _Sums(site, way.weight.shape[1]) for way in site.ways_in if way.of_tokens in flat.needed}
    grads = {way.name: site.gradient(way.weight) for way in (*site.ways_in, *site.ways_out) if way.name in flat.needed}
    biases = [f"b_in{i}" for i in range(len(b_in))]
    of_bias = torch.zeros(len(w_in), site.lists.n_units) if flat.needed.intersection(biases) else None
    of_gates = torch.zeros(gates.shape) if gates is not None and "gates" in flat.needed else None
    ins, outs = [], []
    for way in site.ways_in:
        fields = _where(grads.get(way.name))
        if kept is None:
            fields["into"] = site.pack(way, into=True)
        if way.of_tokens in sums:
            fields |= {"out": site.pack(way, into=False), "products": sums[way.of_tokens].products}
        ins.append(site.operand(way, way.tokens, **fields))
    through = bool(sums) or of_bias is not None or of_gates is not None or any(way.name in grads for way in site.ways_in)
    if lora_down is not None and grad_low is None:
        grad_low = grad_y.new_zeros((x.shape[0], lora_down.shape[0]))
    for way, grad in zip(site.ways_out, (grad_y, grad_low), strict=False):
        fields = _where(grads.get(way.name))
        if through:
            fields["into"] = site.pack(way, into=True)
        outs.append(site.operand(way, site.tokens(grad), **fields))

    wide = any(grad.dtype != site.dtype for grad in grads.values())
    described = site.described(ins, outs, kept) | {"bias_grad": of_bias, "gates_grad": of_gates}
    for chunk in site.lists.chunks:
        described |= {"lists": chunk.lists, "add": int(wide or chunk.tokens.start > 0)}
        for group, strips in site.groups(chunk, wanted=bool(grads) or of_bias is not None):
            site.call("backward", first_block=group.start, last_block=group.stop, strips=strips, **described)
        for s in sums.values():
            s.close(chunk)

    for name, s in sums.items():
        flat.put(name, lambda s=s: s.total)
    for way in site.ways_in:
        flat.put(way.name, lambda way=way: grads[way.name])
    for way in site.ways_out:
        flat.put(way.name, lambda way=way: grads[way.name].t())
    for i, name in enumerate(biases):
        flat.put(name, lambda i=i: of_bias[i].clone())  # results of an op share no memory
    for i, b in enumerate(lora_b):
        if b.shape[1] == 0:  # no branch, no operand
            flat.put(f"lora_b{i}", lambda b=b: torch.empty_like(b))
            flat.put(f"lora_a_out{i}", lambda i=i: torch.empty_like(lora_a_out[i]))
    flat.put("gates", lambda: of_gates)
    return flat.tensors()


def _where(grad: Tensor | None) -> dict[str, Any]:
    """An operand's fields for the gradient of its weight [F, k]."""
    return {} if grad is None else {"grad": grad, "grad_unit": grad.stride(0), "grad_k": grad.stride(1)}
