"""CPU lowering of the routed FFN: gather the tokens of a block, two GEMMs of the vendor library, add up each token's blocks.

Tokens are walked in chunks, and the rows of a chunk in spans. A span holds part of a large block, so that its hidden
activations are still in cache when the second GEMM reads them, or several small blocks, so that one gather and one
activation serve them all. The products of a chunk wait until all are there; one pass then reads each of them once and
writes the sum of each token once, in its final type. Weights are read through the permutation (as views where it is the
identity) and never moved; their permuted copies live for one call, which costs 2 * F * E values of traffic against
N * F * E multiplications. Accumulation over blocks runs in fp32 for 16-bit inputs. What lies between the GEMMs runs in
generated C++ where there is a compiler (`cpp_ffn.py`), else in ATen operators.

Results are bitwise repeatable. A token's result may depend in the last bit on which other tokens share its GEMMs,
because the vendor library picks its kernel by the number of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.lowering import cpp_ffn
from spt_compiler.lowering.cpu_tiles import Buffers
from spt_compiler.lowering.registry import register
from spt_compiler.matmul import multiply, prefers_onednn
from spt_compiler.ops.reference_ffn import (
    FlatGrads,
    check_arguments,
    hidden_dropout,
    kept_blocks,
    kept_mask,
    row_capacity,
)

# Hidden values per span and in-projection (2 MiB of fp32): stays in the last-level cache; longer spans save little.
_SPAN_VALUES = 1 << 19
# Fewer rows than this starve a GEMM.
_MIN_SPAN = 256
# Bytes of products that wait for their sum, if the blocks of a chunk then have _MIN_SPAN rows on average. Processor time of a step
# of 4096 x 768 x 3072, fp32 by oneDNN: 388 ms at 16 MB, 349 at 32, 357 at 64.
_CHUNK_BYTES = 1 << 25
# Tokens of a chunk for which each weight gradient of 16 bits is one GEMM: partial sums are added in fp32, which costs a pass.
_CHUNK_16_BIT = 8192
# Up to here comparing every pair of blocks beats sorting each token's scores.
_PAIRWISE_BLOCKS = 16


@register("route_v1", "cpu", "cpu")
def route(scores: Tensor, always_on: Tensor, budget: Tensor, max_density: float, tile: int, min_tokens: int):
    """`spt::route_v1` on the CPU: ranks by comparing whole columns of scores, and lists by `nonzero`."""
    n_tokens, n_blocks = scores.shape
    n_slots = kept_blocks(max_density, n_blocks)
    blocks = torch.full((n_tokens, n_slots), -1, dtype=torch.int32)
    rows = torch.full((row_capacity(n_tokens, n_slots, n_blocks, tile),), -1, dtype=torch.int32)
    density = float(budget[0])
    if density < 0 or n_tokens < min_tokens:
        return blocks, rows, torch.full((n_blocks + 1,), -1, dtype=torch.int32)
    on = always_on.tolist()
    # NaN != NaN: a budget that is not a number is no limit.
    n_kept = kept_blocks(min(density, max_density) if density == density else max_density, n_blocks)
    n_kept = min(max(n_kept, sum(on)), n_slots)

    columns = scores.t().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).contiguous()
    first = [g for g in range(n_blocks) if on[g]]
    rest = [g for g in range(n_blocks) if not on[g]]
    if first and rest:
        rank = torch.empty(n_blocks, n_tokens, dtype=torch.int32)
        rank[first] = _rank(columns[first]).int()
        rank[rest] = _rank(columns[rest]).int() + len(first)
    else:
        rank = _rank(columns)
    kept = rank < n_kept

    blocks[:, :n_kept] = kept.t().contiguous().nonzero()[:, 1].view(n_tokens, n_kept)
    listed = kept.nonzero()[:, 1]
    counts = kept.sum(1).tolist()
    offsets = [0, *itertools.accumulate(-(-count // tile) * tile for count in counts)]
    if offsets[-1] == len(listed):
        rows[: len(listed)] = listed
    else:
        for start, part in zip(offsets, listed.split(counts), strict=False):
            rows[start : start + len(part)] = part
    return blocks, rows, torch.tensor(offsets, dtype=torch.int32)


def _rank(columns: Tensor) -> Tensor:
    """[g, N] scores -> [g, N], 0 for the largest of each column; ties to the lower row."""
    n = columns.shape[0]
    if n > _PAIRWISE_BLOCKS:
        order = columns.argsort(dim=0, descending=True, stable=True)
        ids = torch.arange(n, dtype=torch.int32).unsqueeze(1).expand_as(order)
        return torch.empty_like(order, dtype=torch.int32).scatter_(0, order, ids)
    rank = torch.zeros(columns.shape, dtype=torch.uint8)
    for g in range(n):
        rank[g + 1 :] += columns[g] >= columns[g + 1 :]
        rank[:g] += columns[g] > columns[:g]
    return rank


@dataclass(frozen=True)
class _Segment:
    """Rows of one block within a span."""

    block: int
    units: slice  # in block order
    rows: slice  # of the span
    first: bool  # the block's first rows


@dataclass(frozen=True)
class _Span:
    """Rows that are gathered, activated and scattered together. Without `tokens` they are tokens `part`, in order."""

    tokens: Tensor | None
    part: slice
    slots: slice  # of `rows` and `saved`
    place: int  # of its first row among those of the chunk
    width: int
    segments: tuple[_Segment, ...]

    @property
    def n_rows(self) -> int:
        return self.part.stop - self.part.start

    def take(self, source: Tensor, work: _Work | None = None, name: str = "") -> Tensor:
        """The span's rows of [N, ...]; in scratch memory of that name if given."""
        if self.tokens is None:
            return source[self.part]
        if work is None or work.kernels is None or source.stride(1) != 1:
            return source.index_select(0, self.tokens)
        return work.kernels.gather_rows(source, self.tokens, work.buffers.get(name, self.n_rows, source.shape[1]))

    def of(self, saved: Tensor) -> list[Tensor]:
        """The span's saved pre-activations: a [n, width] view per in-projection."""
        return [s[self.slots, : self.width] for s in saved]

    def gate_index(self, n_blocks: int) -> Tensor:
        """Where the gates of the span's rows lie in a flattened [N, G]."""
        tokens = torch.arange(self.part.start, self.part.stop) if self.tokens is None else self.tokens
        index = tokens * n_blocks
        for segment in self.segments:
            index[segment.rows] += segment.block
        return index


@dataclass(frozen=True)
class _Chunk:
    """Tokens whose sums over blocks are taken together, and for each block the range of its list that holds them."""

    tokens: slice
    ranges: tuple[tuple[int, int], ...]

    def places(self) -> list[int]:
        """Where the rows of each block begin among those of the chunk."""
        return [0, *itertools.accumulate(high - low for low, high in self.ranges)]


class _Work:
    """What forward and backward share: the spans, the order of the weights, and the dtypes of accumulation."""

    def __init__(
        self,
        x: Tensor,
        gates: Tensor | None,
        blocks: Tensor,
        rows: Tensor,
        offsets: Tensor,
        permutation: Tensor,
        kernels: cpp_ffn.Kernels | None = None,
        *,
        whole_blocks: bool = False,
    ):
        """whole_blocks: the rows of a block are products of their own (weight gradients): of 16 bits, best not cut into spans."""
        self.kernels, self.buffers = kernels, Buffers(x.dtype)
        self.n_tokens = x.shape[0]
        self.n_units = permutation.shape[0]
        self.n_blocks = offsets.shape[0] - 1
        self.width = -(-self.n_units // self.n_blocks)
        self.starts = offsets.tolist()
        self.dense = self.starts[0] < 0
        ordered = torch.equal(permutation, torch.arange(self.n_units, dtype=permutation.dtype))
        # Where every block is computed without gates, the order of units is free: nothing to permute.
        self.units = None if ordered or (self.dense and gates is None) else permutation.long()
        self.units_of = [
            slice(min(g * self.width, self.n_units), min((g + 1) * self.width, self.n_units)) for g in range(self.n_blocks)
        ]
        if self.dense:
            counts = [self.n_tokens] * self.n_blocks
        elif rows.shape[0] == blocks.numel():  # tiles of one row: no padding
            counts = [end - start for start, end in itertools.pairwise(self.starts)]
        else:
            counts = torch.bincount(blocks.reshape(-1) + 1, minlength=self.n_blocks + 1)[1:].tolist()
        # A block past the last unit (F much smaller than G * W) has nothing to compute.
        self.counts = [c if self.units_of[g].start < self.n_units else 0 for g, c in enumerate(counts)]
        self.blocks = blocks.contiguous()
        self.listed = None if self.dense else rows.long()
        self.capacity = rows.shape[0]

        low_precision = x.dtype in (torch.float16, torch.bfloat16)
        self.accumulate = torch.float32 if low_precision else x.dtype
        self.span = max(_MIN_SPAN, _SPAN_VALUES // self.width)
        if self.dense:
            # No more hidden values at a time than the sparse capacity holds.
            self.span = max(1, min(self.span, self.capacity))
        elif low_precision and whole_blocks:
            # A weight gradient is one GEMM per block and chunk then: partial sums would be rounded to 16 bits.
            self.span = max(1, self.n_tokens)
        self.chunks = self._chunks(low_precision and whole_blocks, x.element_size() * max(x.shape[1], 1))
        # Sums of 16-bit products over several spans are kept wide.
        self.partial = self.accumulate if self.dense or len(self.chunks) > 1 else x.dtype

    def _chunks(self, whole: bool, row_bytes: int) -> list[_Chunk]:
        n_tokens, slots = self.n_tokens, max(self.blocks.shape[1], 1)
        size = max(_CHUNK_BYTES // (slots * row_bytes), _MIN_SPAN * self.n_blocks // slots, 1)
        if whole:
            size = max(size, _CHUNK_16_BIT)
        if self.listed is None or self.kernels is None or n_tokens <= size:
            return [_Chunk(slice(0, n_tokens), tuple((0, count) for count in self.counts))]
        edges = [n_tokens * i // -(-n_tokens // size) for i in range(-(-n_tokens // size) + 1)]
        bounds = []
        for start, count in zip(self.starts, self.counts, strict=False):
            found = edges
            if count != n_tokens:
                found = torch.searchsorted(self.listed[start : start + count], torch.tensor(edges)).tolist()
            bounds.append(list(itertools.pairwise(found)))
        return [_Chunk(slice(*edges[i : i + 2]), tuple(b[i] for b in bounds)) for i in range(len(edges) - 1)]

    def spans(self, chunk: _Chunk, *, merge: bool) -> Iterator[_Span]:
        """The spans of a chunk in block order. With `merge`, small blocks that lie together in the row list share one."""
        waiting: list[int] = []
        counts, places = [high - low for low, high in chunk.ranges], chunk.places()
        for block, count in enumerate(counts):
            alone = self.counts[block] == self.n_tokens or count > self.span or not merge
            if waiting and (alone or not self._joins(waiting, block, chunk)):
                yield self._merged(waiting, chunk, places)
                waiting = []
            if count == 0:
                continue
            if alone:
                yield from self._split(block, *chunk.ranges[block], places[block])
            else:
                waiting.append(block)
        if waiting:
            yield self._merged(waiting, chunk, places)

    def _joins(self, blocks: list[int], block: int, chunk: _Chunk) -> bool:
        last, units = blocks[-1], self.units_of[block]
        total = sum(chunk.ranges[b][1] - chunk.ranges[b][0] for b in (*blocks, block))
        adjacent = self.starts[last] + chunk.ranges[last][1] == self.starts[block] + chunk.ranges[block][0]
        return adjacent and total <= self.span and units.stop - units.start == self.width

    def _merged(self, blocks: list[int], chunk: _Chunk, places: list[int]) -> _Span:
        assert self.listed is not None
        segments, row = [], 0
        for block in blocks:
            low, high = chunk.ranges[block]
            segments.append(_Segment(block, self.units_of[block], slice(row, row + high - low), low == 0))
            row += high - low
        start = self.starts[blocks[0]] + chunk.ranges[blocks[0]][0]
        slots = slice(start, start + row)
        width = segments[0].units.stop - segments[0].units.start
        return _Span(self.listed[slots], slice(0, row), slots, places[blocks[0]], width, tuple(segments))

    def _split(self, block: int, first: int, stop: int, place: int) -> Iterator[_Span]:
        count, units = stop - first, self.units_of[block]
        start = 0 if self.dense else self.starts[block]
        size = -(-count // -(-count // self.span))
        for low in range(first, stop, size):
            high = min(low + size, stop)
            slots = slice(start + low, start + high)
            tokens = None if self.listed is None or self.counts[block] == self.n_tokens else self.listed[slots]
            segment = _Segment(block, units, slice(0, high - low), low == 0)
            yield _Span(tokens, slice(low, high), slots, place + low - first, units.stop - units.start, (segment,))

    def dropout(self, span: _Span, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
        """[n, W] factors of the span's hidden units; the hash takes the model's own numbers of tokens and units."""
        (segment,) = span.segments
        tokens = torch.arange(span.part.start, span.part.stop) if span.tokens is None else span.tokens
        units = torch.arange(segment.units.start, segment.units.stop)
        return hidden_dropout(seed, tokens, units if self.units is None else self.units[units], self.n_units, p, dtype)

    def arrange(self, weight: Tensor) -> Tensor:
        """[F, ...] in block order: a copy, or the tensor itself where the units are in order."""
        return weight if self.units is None else self._pick(weight, self.units)

    def by_block(self, weight: Tensor) -> Tensor | _Panels:
        """[F, K] in block order, to be sliced by the units of blocks; as panels where that is copied anyway, or pays."""
        columns = _units_inside(weight) and weight.stride(0) == 1 and weight.numel() and weight.dtype == self.buffers.dtype
        if self.kernels is None or not columns or (self.units is None and not prefers_onednn(weight.dtype)):
            return self.arrange(weight)
        units = torch.arange(self.n_units) if self.units is None else self.units
        panels = torch.empty(weight.numel(), dtype=weight.dtype)
        self.kernels.gather_columns(weight.t(), units, panels, panel=self.width)
        return _Panels(panels, weight.shape[1])

    def _pick(self, weight: Tensor, units: Tensor) -> Tensor:
        """weight[units] in the layout of weight."""
        kernels = self.kernels if weight.dim() == 2 and weight.dtype == self.buffers.dtype and weight.numel() else None
        if _units_inside(weight):
            inside = weight.t()
            if kernels is None or inside.stride(1) != 1:
                return inside.index_select(1, units).t()
            picked = torch.empty(inside.shape, dtype=inside.dtype)
            kernels.gather_columns(inside, units, picked, panel=len(units))
            return picked.t()
        if kernels is None or weight.stride(1) != 1:
            return weight.index_select(0, units)
        return kernels.gather_rows(weight, units, torch.empty(weight.shape, dtype=weight.dtype))

    def gradient(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Buffer for the gradient of an [F, ...] weight in block order, zero if some block has no token."""
        make = torch.zeros if 0 in self.counts else torch.empty
        if _units_inside(weight):
            return make(weight.shape[::-1], dtype=dtype).t()
        return make(weight.shape, dtype=dtype)

    def restore(self, gradient: Tensor) -> Tensor:
        """A buffer of `gradient` in the model's order of units."""
        if self.units is None:
            return gradient
        inverse = torch.empty_like(self.units)
        inverse[self.units] = torch.arange(self.n_units)
        return self._pick(gradient, inverse)


@dataclass(frozen=True)
class _Panels:
    """A weight [F, K] in block order: of each block a matrix [K, W] of its own, one after the other in `values`."""

    values: Tensor
    k: int

    def __getitem__(self, units: slice) -> Tensor:
        """[W, K] of one block."""
        return self.values[units.start * self.k : units.stop * self.k].view(self.k, units.stop - units.start).t()


def _units_inside(weight: Tensor) -> bool:
    """Whether the units of an [F, K] weight lie next to each other in memory (a transposed view)."""
    return weight.dim() == 2 and weight.stride(0) < weight.stride(1)


def _per_unit(act_in: Tensor) -> bool:
    """Whether an activation input is a vector over the hidden units, and not one number for all of them."""
    return act_in.dim() == 1 and act_in.shape[0] != 1


def _sum_rows(rows: Tensor, kernels: cpp_ffn.Kernels | None) -> Tensor:
    """[K] sum of the rows of [n, K], in fp32 for rows of 16 bits."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if kernels is None or rows.stride(1) != 1:
        return rows.sum(0, dtype=wide)
    out = torch.empty(rows.shape[1], dtype=wide)
    kernels.sum_rows(out, rows, add=False)
    return out


def _accumulate_product(out: Tensor, left: Tensor, right: Tensor, first: bool, *, summed: bool = True) -> None:
    """out = left @ right for a block's first rows, out += left @ right for the others; summed: over the rows of a span."""
    if out.dtype == left.dtype:
        multiply(out, left, right, add=not first, summed=summed)
        return
    product = torch.mm(left, right)
    out.copy_(product) if first else out.add_(product)


class _TokenSums:
    """[N, width]: for each token the sum over its blocks of what their products give, and constants.

    Args:
        bias: [width] or None, added for every token. shift: [G, width] or None, its rows of the dropped blocks are added.
    """

    def __init__(self, work: _Work, width: int, bias: Tensor | None = None, shift: Tensor | None = None):
        self.work = work
        self.waits = work.kernels is not None and not work.dense and width > 0
        if self.waits:
            rows = max(chunk.places()[-1] for chunk in work.chunks)
            self.total, self.products = (torch.empty((n, width), dtype=work.buffers.dtype) for n in (work.n_tokens, rows))
            self.bias = None if bias is None else bias.contiguous()
            self.shift = None if shift is None else shift.float().contiguous()
            return
        wide, shape = work.accumulate, (work.n_tokens, width)
        if shift is not None and not work.dense:
            dropped = (~kept_mask(work.blocks, work.n_blocks)).to(wide)
            self.total = torch.mm(dropped, shift.to(wide)) if bias is None else torch.addmm(bias.to(wide), dropped, shift.to(wide))
        elif bias is not None:
            self.total = bias.to(wide).expand(shape).clone(memory_format=torch.contiguous_format)
        else:
            self.total = torch.zeros(shape, dtype=wide)

    def add(self, span: _Span, left: Tensor, weight: Tensor | _Panels, *, first: bool = True) -> None:
        """Adds left @ weight[units] for the span's rows; left [n, W], weight [F, width] in block order.

        first: this is the first product of these rows.
        """
        work, n_rows = self.work, span.n_rows
        if self.waits:
            products = self.products[span.place : span.place + n_rows]
            for segment in span.segments:
                _accumulate_product(products[segment.rows], left[segment.rows], weight[segment.units], first, summed=False)
        elif span.tokens is None:
            (segment,) = span.segments
            _accumulate_product(self.total[span.part], left, weight[segment.units], False, summed=False)
        else:
            product = work.buffers.get("product", n_rows, self.total.shape[1])
            for segment in span.segments:
                multiply(product[segment.rows], left[segment.rows], weight[segment.units])
            self.total.index_add_(0, span.tokens, product.to(self.total.dtype))

    def close(self, chunk: _Chunk) -> None:
        """Takes the sums of a chunk, of which every span has been added."""
        if self.waits:
            assert self.work.kernels is not None and self.work.listed is not None
            lists = [
                (self.work.starts[block] + low, high - low, place)
                for block, ((low, high), place) in enumerate(zip(chunk.ranges, chunk.places(), strict=False))
            ]
            self.work.kernels.sum_blocks(
                self.total[chunk.tokens],
                self.products,
                self.work.blocks[chunk.tokens],
                self.work.listed,
                torch.tensor(lists),
                first=chunk.tokens.start,
                bias=self.bias,
                shift=self.shift,
            )


class _Inputs:
    """The in-projections and the activation, with weights in block order."""

    def __init__(self, work: _Work, x, w_in, b_in, lora_a_out, lora_b, act_expr: str, act_in, p: float):
        self.work, self.x = work, x
        self.w_in = [work.by_block(w) for w in w_in]
        self.b_in = [work.arrange(b) for b in b_in] or [None] * len(w_in)
        self.lora = [
            (a.to(x.dtype), work.arrange(b).to(x.dtype)) if b.shape[1] else None for a, b in zip(lora_a_out, lora_b, strict=True)
        ] or [None] * len(w_in)
        self.act = expression.parse(act_expr)
        self.names = [f"x{i}" for i in range(len(w_in))]
        self.act_in = {f"a{i}": (work.arrange(a) if _per_unit(a) else a).to(x.dtype) for i, a in enumerate(act_in)}
        # What differs between the blocks of a span has to be the same for each of its rows.
        self.merge = p == 0 and not any(_per_unit(a) for a in act_in)

    def pre_activations(self, span: _Span, saved: Tensor | None, rows: Tensor) -> list[Tensor]:
        """[n, W] per in-projection, written into `saved` if given; `rows`: the span's rows of x."""
        if saved is not None:
            pre = span.of(saved)
        else:
            pre = [self.work.buffers.get(f"pre{i}", span.n_rows, span.width) for i in range(len(self.w_in))]
        for z, w, b, lora in zip(pre, self.w_in, self.b_in, self.lora, strict=True):
            low = None if lora is None else span.take(lora[0])
            for segment in span.segments:
                out, part, weight = z[segment.rows], rows[segment.rows], w[segment.units].t()
                multiply(out, part, weight, bias=None if b is None else b[segment.units])
                if low is not None:
                    out.addmm_(low[segment.rows], lora[1][segment.units].t())
        return pre

    def env(self, span: _Span, pre: list[Tensor]) -> dict[str, Tensor]:
        """What the activation reads, by name (see `reference_ffn.activation_env`)."""
        env = {f"x{i}": z for i, z in enumerate(pre)}
        for name, a in self.act_in.items():
            env[name] = a[span.segments[0].units] if _per_unit(a) else a
        return env

    def hidden(self, span: _Span, pre: list[Tensor]) -> Tensor:
        """[n, W] after the activation; not to be written to (it may be a pre-activation itself)."""
        kernels = self.work.kernels
        if kernels is not None:
            return kernels.activate(pre, self.env(span, []), self.work.buffers.get("hidden", span.n_rows, span.width))
        value = expression.evaluate(self.act, self.env(span, pre))
        return value.to(self.x.dtype).expand_as(pre[0])


class _LowRank:
    """A of the low-rank branch on the out-projection, in block order, and the dropout before it."""

    def __init__(self, work: _Work, lora_down: Tensor | None, seed: Tensor | None, p: float, dtype: torch.dtype):
        self.work, self.seed = work, seed
        self.p = 0.0 if lora_down is None or seed is None else p
        self.rank = 0 if lora_down is None else lora_down.shape[0]
        self.down = None if lora_down is None else work.arrange(lora_down.t()).to(dtype)  # [F, r]

    def back(self, span: _Span, grad_low: Tensor) -> Tensor:
        """[n, W]: gradient of what the branch reads, given the span's rows of the gradient of its result."""
        assert self.down is not None
        grad = grad_low.new_empty((span.n_rows, span.width))
        for segment in span.segments:
            torch.mm(grad_low[segment.rows], self.down[segment.units].t(), out=grad[segment.rows])
        return self.dropped(span, grad)

    def dropped(self, span: _Span, values: Tensor) -> Tensor:
        """[n, W] hidden values (or their gradients) of a span behind the branch's own dropout."""
        if self.p == 0 or self.seed is None:
            return values
        return values * self.work.dropout(span, self.seed, self.p, values.dtype)


def _foresee(x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, blocks, rows, offsets, *rest) -> None:
    _, _, act_expr, act_in, *_ = rest
    cpp_ffn.foresee(act_expr, len(w_in), len(act_in), x.dtype)


@register("routed_ffn_v1", "cpu", "cpu", foresee=_foresee)
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
    """`spt::routed_ffn_v1` on the CPU; see `ops/ffn.py` for the arguments."""
    weights, random = (w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down), (seed, p, lora_seed, lora_p)
    check_arguments(x, *weights, gates, blocks, rows, offsets, permutation, compensation, act_in, *random)
    kernels = cpp_ffn.kernels(act_expr, len(w_in), len(act_in), x.dtype)
    work = _Work(x, gates, blocks, rows, offsets, permutation, kernels)
    low_rank = _LowRank(work, lora_down, lora_seed, lora_p, x.dtype)
    inputs = _Inputs(work, x, w_in, b_in, lora_a_out, lora_b, act_expr, act_in, max(p, low_rank.p))
    w_down = work.by_block(w_out.t())
    saved = x.new_empty((len(w_in), rows.shape[0] if save else 0, work.width))
    if save:
        _clear_unused(saved, work)

    y = _TokenSums(work, w_out.shape[0], b_out, compensation)
    low = _TokenSums(work, low_rank.rank)
    flat_gates = None if gates is None else gates.reshape(-1)
    for chunk in work.chunks:
        for span in work.spans(chunk, merge=inputs.merge):
            pre = inputs.pre_activations(span, saved if save and not work.dense else None, span.take(x, work, "x"))
            hidden = inputs.hidden(span, pre)
            if p > 0 and seed is not None:
                hidden = hidden * work.dropout(span, seed, p, hidden.dtype)
            if flat_gates is not None:
                scale = flat_gates.index_select(0, span.gate_index(work.n_blocks))
                hidden = hidden * scale.to(hidden.dtype).unsqueeze(1)
            y.add(span, hidden, w_down)
            if low_rank.down is not None:
                low.add(span, low_rank.dropped(span, hidden), low_rank.down)
        y.close(chunk)
        low.close(chunk)
    return y.total.to(x.dtype), saved, low.total.to(x.dtype)


def _clear_unused(saved: Tensor, work: _Work) -> None:
    """Zero what no token fills, so that equal calls give equal bytes."""
    if work.dense:
        saved.zero_()
        return
    end = 0
    for block, count in enumerate(work.counts):
        start, units = work.starts[block], work.units_of[block]
        if end < start:
            saved[:, end:start] = 0
        end = start + count
        if units.stop - units.start < work.width:
            saved[:, start:end, units.stop - units.start :] = 0
    saved[:, end:] = 0


@register("routed_ffn_backward_v1", "cpu", "cpu")
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
    """`spt::routed_ffn_backward_v1` on the CPU: no GEMM for what is not needed, and none again for what was saved."""
    flat = FlatGrads(x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, act_in, needs)
    kernels = cpp_ffn.kernels(act_expr, len(w_in), len(act_in), x.dtype)
    if any(name.startswith("act_in") for name in flat.needed):
        kernels = None  # they compute no such gradient
    flat.put("b_out", lambda: _sum_rows(grad_y, kernels))
    if flat.needed <= {"b_out"}:
        return flat.tensors()
    summed = any(name.startswith(("w_", "lora_b", "lora_down")) for name in flat.needed)
    work = _Work(x, gates, blocks, rows, offsets, permutation, kernels, whole_blocks=summed)
    low_rank = _LowRank(work, lora_down, lora_seed, lora_p, x.dtype)
    inputs = _Inputs(work, x, w_in, b_in, lora_a_out, lora_b, act_expr, act_in, max(p, low_rank.p))
    grads = _Gradients(work, flat)
    if low_rank.down is not None and grad_low is None:
        grad_low = grad_y.new_zeros((x.shape[0], low_rank.rank))
    w_down = work.by_block(w_out.t()) if grads.through_hidden else None
    flat_gates = None if gates is None else gates.reshape(-1)
    recompute = work.dense or saved.shape[1] == 0
    for chunk in work.chunks:
        for span in work.spans(chunk, merge=inputs.merge):
            x_rows = span.take(x, work, "x") if recompute or grads.uses_x else None
            pre = inputs.pre_activations(span, None, x_rows) if recompute else span.of(saved)
            grad = span.take(grad_y, work, "grad")
            keep = work.dropout(span, seed, p, x.dtype) if p > 0 and seed is not None else None
            index = scale = None
            if flat_gates is not None:
                index = span.gate_index(work.n_blocks)
                scale = flat_gates.index_select(0, index).to(x.dtype).unsqueeze(1)

            low_grad = None if low_rank.down is None else span.take(grad_low).to(x.dtype)
            grad_hidden = None
            if w_down is not None:
                grad_hidden = work.buffers.get("grad_hidden", span.n_rows, span.width)
                for segment in span.segments:
                    multiply(grad_hidden[segment.rows], grad[segment.rows], w_down[segment.units].t())
                if low_rank.down is not None:
                    grad_hidden += low_rank.back(span, low_grad)
            hidden, slopes = None, []
            if kernels is not None and grads.names and grads.names == inputs.names and scale is None and keep is None:
                # One pass over the hidden units for both.
                hidden = work.buffers.get("hidden", span.n_rows, span.width) if grads.uses_hidden else None
                slopes = kernels.activate_backward(pre, inputs.env(span, []), grad_hidden, hidden)
            else:
                if grads.uses_hidden:
                    hidden = inputs.hidden(span, pre)
                    hidden = hidden if keep is None else hidden * keep
                if grads.gates is not None:
                    value = (grad_hidden * hidden).sum(1, dtype=grads.gates.dtype)
                    grads.gates.view(-1).index_copy_(0, index, value)
                for factor in (scale, keep):
                    if factor is not None and grad_hidden is not None:
                        grad_hidden.mul_(factor)
                if grads.names:
                    slopes = expression.vjp(inputs.act, inputs.env(span, pre), grads.names, grad_hidden)
            scaled = hidden if scale is None or hidden is None else hidden * scale
            if grads.w_out is not None:
                grads.add_rows(grads.w_out, span, scaled, grad)
            if grads.lora_down is not None:
                grads.add_rows(grads.lora_down, span, low_rank.dropped(span, scaled), low_grad)
            if grads.names:
                grads.add(inputs, span, dict(zip(grads.names, slopes, strict=True)), x_rows)
        grads.close(chunk)
    # Before the gradients are copied into the model's order of units: there are three tensors a weight otherwise.
    del w_down
    inputs.w_in.clear()
    grads.store()
    return flat.tensors()


class _Gradients:
    """Buffers of the gradients that are needed, in block order, and the steps that fill them."""

    def __init__(self, work: _Work, flat: FlatGrads):
        self.work, self.flat = work, flat
        like, needed = flat.like, flat.needed
        self.n_in = sum(name.startswith("w_in") for name in like)

        def tokens(name: str) -> Tensor | None:
            return torch.zeros(like[name].shape, dtype=work.accumulate) if name in needed else None

        def sums(name: str) -> _TokenSums | None:
            return _TokenSums(work, like[name].shape[1]) if name in needed else None

        def units(name: str, dtype: torch.dtype) -> Tensor | None:
            return work.gradient(like[name], dtype) if name in needed else None

        self.x = sums("x")
        self.w_in = [units(f"w_in{i}", work.partial) for i in range(self.n_in)]
        self.b_in = [units(f"b_in{i}", work.accumulate) for i in range(self.n_in)]
        self.w_out = work.gradient(like["w_out"].t(), work.partial) if "w_out" in needed else None
        self.lora_down = work.gradient(like["lora_down"].t(), work.partial) if "lora_down" in needed else None
        self.lora_a_out = [sums(f"lora_a_out{i}") for i in range(self.n_in)]
        self.lora_b = [units(f"lora_b{i}", work.partial) for i in range(self.n_in)]
        self.gates = tokens("gates")
        self.act_in = {f"a{name[6:]}": tokens(name) for name in sorted(needed) if name.startswith("act_in")}
        per_pre = zip(self.w_in, self.b_in, self.lora_a_out, self.lora_b, strict=True)
        wanted = [self.x is not None or any(g is not None for g in group) for group in per_pre]
        # Names of the activation's inputs whose gradients are needed.
        self.names = [f"x{i}" for i in range(self.n_in) if wanted[i]] + list(self.act_in)
        self.through_hidden = bool(self.names) or self.gates is not None
        self.uses_hidden = any(g is not None for g in (self.w_out, self.lora_down, self.gates))
        self.uses_x = any(g is not None for g in self.w_in)

    def add(self, inputs: _Inputs, span: _Span, slopes: dict[str, Tensor], x_rows: Tensor | None) -> None:
        """Add one span's contributions, given the gradients of the activation's inputs by name."""
        for name, buffer in self.act_in.items():
            target = buffer[span.segments[0].units] if _per_unit(buffer) else buffer
            target += slopes[name]
        used = [i for i in range(self.n_in) if f"x{i}" in slopes]
        for i in used:
            grad = slopes[f"x{i}"].to(inputs.x.dtype)
            if self.x is not None:
                self.x.add(span, grad, inputs.w_in[i], first=i == used[0])
            lora = inputs.lora[i]
            if lora is not None and self.lora_a_out[i] is not None:
                self.lora_a_out[i].add(span, grad, lora[1])
            low = span.take(lora[0]) if lora is not None and self.lora_b[i] is not None else None
            for segment in span.segments:
                part, units, first = grad[segment.rows], segment.units, segment.first
                if self.w_in[i] is not None:
                    _accumulate_product(self.w_in[i][units], part.t(), x_rows[segment.rows], first)
                if self.b_in[i] is not None:
                    bias = self.b_in[i][units]
                    if self.work.kernels is not None and bias.dtype == torch.float32 and part.stride(1) == 1:
                        self.work.kernels.sum_rows(bias, part, add=not first)
                    elif first:
                        torch.sum(part, 0, dtype=bias.dtype, out=bias)
                    else:
                        bias += part.sum(0, dtype=bias.dtype)
                if low is not None:
                    _accumulate_product(self.lora_b[i][units], part.t(), low[segment.rows], first)

    def close(self, chunk: _Chunk) -> None:
        """Takes the sums of a chunk's tokens."""
        for sums in (self.x, *self.lora_a_out):
            if sums is not None:
                sums.close(chunk)

    @staticmethod
    def add_rows(buffer: Tensor, span: _Span, hidden: Tensor, grad: Tensor) -> None:
        """buffer[units] += hidden^T @ grad for the span's rows, block by block."""
        for segment in span.segments:
            left, right = hidden[segment.rows].t(), grad[segment.rows]
            _accumulate_product(buffer[segment.units], left, right, segment.first)

    def store(self) -> None:
        """Hand the finished gradients, in the model's order of units, to the flat list."""
        put, restore = self.flat.put, self.work.restore
        put("x", lambda: self.x.total)
        for sums in (self.x, *self.lora_a_out):
            if sums is not None:
                sums.products = None
        for i in range(self.n_in):
            put(f"w_in{i}", lambda i=i: restore(self.w_in[i]))
            self.w_in[i] = None
            put(f"b_in{i}", lambda i=i: restore(self.b_in[i]))
            put(f"lora_a_out{i}", lambda i=i: self.lora_a_out[i].total)
            put(f"lora_b{i}", lambda i=i: restore(self.lora_b[i]))
        put("w_out", lambda: restore(self.w_out).t())
        put("lora_down", lambda: restore(self.lora_down).t())
        put("gates", lambda: self.gates)
        for name, buffer in self.act_in.items():
            put(f"act_in{name[1:]}", lambda b=buffer: restore(b) if _per_unit(b) else b)
