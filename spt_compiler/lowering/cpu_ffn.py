"""CPU lowering of the routed FFN: one C++ kernel each for forward and backward, a tile of a block's rows at a time.

A tile's rows of x (and of low-rank branches) are gathered, multiplied with the block's units, activated and multiplied with its
out-projection while they are in cache; the products wait until one pass adds up each token's. Backward, a tile's gradients go the
same way back, and the transposed hidden values and gradients of some blocks are kept for their weight gradients, which are taken
column by column and written in the model's own order of units. Weights are packed into panels once a call, through the
permutation, and never moved: that costs some F * E values of traffic against N * F * E multiplications. Sums are fp32.

Results are bitwise repeatable whatever the number of threads. Where there are no kernels (fp64, no compiler) or they do not take
what is asked (gradients of values that the activation captured), `cpu_ffn_aten.py` does it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spt_compiler.lowering import cpp_ffn, cpu_ffn_aten
from spt_compiler.lowering.registry import register
from spt_compiler.ops.reference import dropout_keys
from spt_compiler.ops.reference_ffn import FlatGrads, check_arguments, kept_blocks, row_capacity

# Bytes of products that wait for their sum, if the blocks of a chunk then have _MIN_ROWS rows on average. Larger memory than this
# glibc hands back to the system each time, and every page of it is a fault at the next call.
_CHUNK_BYTES = 1 << 25
_MIN_ROWS = 256
# Bytes of transposed hidden values and gradients that wait for weight gradients, if it is not one block that needs more.
_STRIP_BYTES = 1 << 24
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


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class Way:
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
    """Tokens whose sums over blocks are taken together, and for each block the range of its list that holds them."""

    tokens: slice
    ranges: tuple[tuple[int, int], ...]

    def places(self) -> list[int]:
        """Where the rows of each block begin among those of the chunk."""
        return [0, *itertools.accumulate(high - low for low, high in self.ranges)]


class _Lists:
    """Which rows each block has, and the chunks of tokens. Without lists (every block is computed) they are made."""

    def __init__(self, x: Tensor, blocks: Tensor, rows: Tensor, offsets: Tensor, n_units: int):
        n_tokens, n_blocks = x.shape[0], offsets.shape[0] - 1
        self.n_tokens, self.n_blocks, self.n_units = n_tokens, n_blocks, n_units
        self.width = -(-n_units // n_blocks)
        self.units = [slice(min(g * self.width, n_units), min((g + 1) * self.width, n_units)) for g in range(n_blocks)]
        self.starts = offsets.tolist()
        self.dense = self.starts[0] < 0
        if self.dense:
            self.blocks = torch.arange(n_blocks, dtype=torch.int32).expand(n_tokens, n_blocks).contiguous()
            self.rows = torch.arange(n_tokens).repeat(n_blocks)
            self.starts, counts = [g * n_tokens for g in range(n_blocks + 1)], [n_tokens] * n_blocks
        else:
            self.blocks, self.rows = blocks.contiguous(), rows.long()
            counts = cpu_ffn_aten.list_lengths(blocks, rows, self.starts)
        # A block past the last unit (F much smaller than G * W) has nothing to compute.
        self.counts = [count if self.units[g].start < n_units else 0 for g, count in enumerate(counts)]
        self.chunks = self._chunks(x.element_size() * max(x.shape[1], 1))

    def _chunks(self, row_bytes: int) -> list[_Chunk]:
        n_tokens, slots = self.n_tokens, max(self.blocks.shape[1], 1)
        size = max(_CHUNK_BYTES // (slots * row_bytes), _MIN_ROWS * self.n_blocks // slots, 1)
        if n_tokens <= size:
            return [_Chunk(slice(0, n_tokens), tuple((0, count) for count in self.counts))]
        edges = [n_tokens * i // -(-n_tokens // size) for i in range(-(-n_tokens // size) + 1)]
        bounds = []
        for start, count in zip(self.starts, self.counts, strict=False):
            found = edges
            if count != n_tokens:
                found = torch.searchsorted(self.rows[start : start + count], torch.tensor(edges)).tolist()
            bounds.append(list(itertools.pairwise(found)))
        return [_Chunk(slice(*edges[i : i + 2]), tuple(b[i] for b in bounds)) for i in range(len(edges) - 1)]

    def of(self, chunk: _Chunk) -> Tensor:
        """int64 [G, 5], see the template."""
        lines = []
        for block, ((low, high), place) in enumerate(zip(chunk.ranges, chunk.places(), strict=False)):
            units = self.units[block]
            lines.append((self.starts[block] + low, high - low, place, units.start, units.stop - units.start))
        return torch.tensor(lines)


class _Site:
    """What forward and backward of one call share."""

    def __init__(
        self,
        kernels: cpp_ffn.Kernels,
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
        self.lists = lists = _Lists(x, blocks, rows, offsets, permutation.shape[0])
        ordered = torch.equal(permutation, torch.arange(lists.n_units, dtype=permutation.dtype))
        self.units = None if ordered else permutation.long()
        self.ways_in = [Way(f"w_in{i}", w, i, x, "x") for i, w in enumerate(w_in)]
        branches = enumerate(zip(lora_a_out, lora_b, strict=True))
        self.ways_in += [Way(f"lora_b{i}", b, i, a, f"lora_a_out{i}") for i, (a, b) in branches if b.shape[1]]
        self.ways_out = [Way("w_out", w_out.t())]
        self.fields: dict[str, Any] = {
            **{"n_blocks": lists.n_blocks, "last_block": lists.n_blocks, "width": lists.width, "n_units": lists.n_units},
            **{"index": lists.rows, "units": self.units, "gates": None if gates is None else gates.float().contiguous()},
            "bias": torch.stack([self._arranged(b.float()) for b in b_in]) if b_in else None,
            **kernels.inputs({f"a{i}": self._arranged(a.to(x.dtype)) for i, a in enumerate(act_in)}),
            **self._dropout("drop", *dropout["drop"]),
        }
        if lora_down is not None:
            low = self._dropout("low", *dropout["low"])
            self.ways_out.append(Way("lora_down", lora_down.t(), 1 if low else 0))
            self.fields |= low

    def _arranged(self, values: Tensor) -> Tensor:
        """A vector over the hidden units in block order; a single value as it is."""
        return values[self.units] if self.units is not None and values.dim() == 1 and values.shape[0] != 1 else values

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

    def operand(self, way: Way, tokens: Tensor | None, **fields: Any) -> dict[str, Any]:
        """The fields of an operand, see the template."""
        given = {} if tokens is None else {"tokens": tokens, "tokens_stride": tokens.stride(0)}
        return {"k": way.weight.shape[1], "hidden": way.hidden, **given, **fields}

    def pack(self, way: Way, *, into: bool) -> Tensor:
        """Panels of its weight, see the template."""
        weight, width = way.weight.to(self.dtype), self.lists.width
        k = weight.shape[1]
        size = _up(k, self.pair) * _up(width, cpp_ffn.STEP) if into else _up(width, self.pair) * _up(k, cpp_ffn.STEP)
        panels = torch.empty(self.lists.n_blocks * size, dtype=self.dtype)
        given = {"from": weight, "from_unit": weight.stride(0), "from_k": weight.stride(1), "to": panels, "k": k, "into": int(into)}
        self.call("pack", lists=self.lists.of(self.lists.chunks[0]), **given)
        return panels

    def run(self, name: str, ins: Sequence, outs: Sequence, chunk: _Chunk, saved: Tensor | None, **values: Any) -> None:
        """The kernel `forward` or `backward` on a chunk."""
        where = {} if saved is None else {"saved": saved, "saved_rows": saved.shape[1], "saved_width": saved.shape[2]}
        operands = {"in": cpp_ffn.operands(ins), "n_in": len(ins), "out": cpp_ffn.operands(outs), "n_out": len(outs)}
        self.call(name, lists=self.lists.of(chunk), **operands, **where, **values)

    def call(self, name: str, **values: Any) -> None:
        self.kernels.call(name, **(self.fields | values))

    def groups(self, chunk: _Chunk, *, wanted: bool) -> Iterator[tuple[slice, Tensor | None]]:
        """Blocks that are done together, and memory for their transposed values if that is wanted."""
        n_values = len({way.hidden for way in self.ways_in}) + 2
        sizes = [cpp_ffn.strip_values(high - low, self.lists.width) * n_values for low, high in chunk.ranges]
        if not wanted:
            yield slice(0, len(sizes)), None
            return
        groups, start = [], 0
        for stop in range(1, len(sizes) + 1):
            if stop == len(sizes) or sum(sizes[start : stop + 1]) * self.dtype.itemsize > _STRIP_BYTES:
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
        rows = max(chunk.places()[-1] for chunk in lists.chunks)
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
            **{"lists": self.site.lists.of(chunk), "first": chunk.tokens.start, "bias": self.bias, "shift": self.shift},
        )


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
    weights, lists = (w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down), (gates, blocks, rows, offsets, permutation)
    random = (seed, p, lora_seed, lora_p)
    check_arguments(x, *weights, *lists, compensation, act_in, *random)
    kernels = cpp_ffn.kernels(act_expr, len(w_in), len(act_in), x.dtype)
    if kernels is None:
        return cpu_ffn_aten.routed_ffn(x, *weights, *lists, compensation, act_expr, act_in, *random, save)
    dropout = {"drop": (seed, p), "low": (lora_seed, lora_p)}
    site = _Site(kernels, x, w_in, b_in, w_out, lora_a_out, lora_b, lora_down, *lists, act_in, dropout)
    saved = x.new_empty((len(w_in), rows.shape[0] if save else 0, site.lists.width))
    kept = None
    if save:
        cpu_ffn_aten.clear_unused(saved, site.lists.starts, site.lists.counts, site.lists.units, dense=site.lists.dense)
        kept = None if site.lists.dense else saved
    ins = [site.operand(way, site.tokens(way.tokens), into=site.pack(way, into=True)) for way in site.ways_in]
    sums = [_Sums(site, w_out.shape[0], b_out, compensation), _Sums(site, 0 if lora_down is None else lora_down.shape[0])]
    outs = [
        site.operand(way, None, out=site.pack(way, into=False), products=s.products)
        for way, s in zip(site.ways_out, sums, strict=False)
    ]
    for chunk in site.lists.chunks:
        site.run("forward", ins, outs, chunk, kept)
        for s in sums[: len(outs)]:
            s.close(chunk)
    return sums[0].total, saved, sums[1].total


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
    weights, lists = (w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down), (gates, blocks, rows, offsets, permutation)
    flat = FlatGrads(x, *weights, gates, act_in, needs)
    kernels = cpp_ffn.kernels(act_expr, len(w_in), len(act_in), x.dtype)
    if kernels is None or any(name.startswith("act_in") for name in flat.needed):
        random = (seed, p, lora_seed, lora_p)
        return cpu_ffn_aten.routed_ffn_backward(grad_y, grad_low, x, *weights, *lists, act_expr, act_in, *random, saved, needs)
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
        ins.append(site.operand(way, site.tokens(way.tokens), **fields))
    through = bool(sums) or of_bias is not None or of_gates is not None or any(way.name in grads for way in site.ways_in)
    if lora_down is not None and grad_low is None:
        grad_low = grad_y.new_zeros((x.shape[0], lora_down.shape[0]))
    for way, grad in zip(site.ways_out, (grad_y, grad_low), strict=False):
        fields = _where(grads.get(way.name))
        if through:
            fields["into"] = site.pack(way, into=True)
        outs.append(site.operand(way, site.tokens(grad), **fields))

    wide = any(grad.dtype != site.dtype for grad in grads.values())
    for chunk in site.lists.chunks:
        add = int(wide or chunk.tokens.start > 0)
        for group, strips in site.groups(chunk, wanted=bool(grads) or of_bias is not None):
            given = {"first_block": group.start, "last_block": group.stop, "strips": strips, "add": add}
            site.run("backward", ins, outs, chunk, kept, bias_grad=of_bias, gates_grad=of_gates, **given)
        for s in sums.values():
            s.close(chunk)

    for name, s in sums.items():
        flat.put(name, lambda s=s: s.total)
    for way in site.ways_in:
        flat.put(way.name, lambda way=way: grads[way.name])
    for way in site.ways_out:
        flat.put(way.name, lambda way=way: grads[way.name].t())
    for i, name in enumerate(biases):
        flat.put(name, lambda i=i: of_bias[i])
    for i, b in enumerate(lora_b):
        if b.shape[1] == 0:  # no branch, no operand
            flat.put(f"lora_b{i}", lambda b=b: torch.empty_like(b))
            flat.put(f"lora_a_out{i}", lambda i=i: torch.empty_like(lora_a_out[i]))
    flat.put("gates", lambda: of_gates)
    return flat.tensors()


def _where(grad: Tensor | None) -> dict[str, Any]:
    """An operand's fields for the gradient of its weight [F, k]."""
    return {} if grad is None else {"grad": grad, "grad_unit": grad.stride(0), "grad_k": grad.stride(1)}
