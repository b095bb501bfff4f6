"""CPU lowering of the routed FFN in ATen operators: gather the rows of each block, multiply, add them up.

Its products run here where the C++ kernels (`cpp_ffn.py`) do not: without a compiler, in fp64, and where gradients of values that
the activation captured are asked for.

Rows are walked in spans whose hidden activations are still in cache when the second GEMM reads them. Weights are read through the
permutation (as views where it is the identity) and never moved; their permuted copies live for one call. Sums over blocks are fp32
for 16-bit inputs.

Results are bitwise repeatable. A token's result may depend in the last bit on which other tokens share its GEMMs, because the
vendor library picks its kernel by the number of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.lowering.registry import register
from spt_compiler.ops.reference_ffn import (
    FlatGrads,
    check_arguments,
    hidden_dropout,
    kept_mask,
)

# Hidden values of a span (2 MiB of fp32): stays in the last-level cache; longer spans save little.
_SPAN_VALUES = 1 << 19
# Fewer rows than this starve a GEMM.
_MIN_SPAN = 256


class Layout:
    """Which rows and which hidden units each block has, in one call of the op."""

    def __init__(self, x: Tensor, blocks: Tensor, rows: Tensor, offsets: Tensor, permutation: Tensor):
        self.n_tokens, self.n_units, self.n_blocks = x.shape[0], permutation.shape[0], offsets.shape[0] - 1
        self.width = -(-self.n_units // self.n_blocks)
        self.starts = offsets.tolist()
        self.dense = self.starts[0] < 0
        ordered = torch.equal(permutation, torch.arange(self.n_units, dtype=permutation.dtype))
        self.units = None if ordered else permutation.long()
        edges = [min(g * self.width, self.n_units) for g in range(self.n_blocks + 1)]
        self.units_of = [slice(*edge) for edge in itertools.pairwise(edges)]  # of each block, in block order
        if self.dense:
            counts = [self.n_tokens] * self.n_blocks
        elif rows.shape[0] == blocks.numel():  # tiles of one row: no padding
            counts = [end - start for start, end in itertools.pairwise(self.starts)]
        else:
            counts = torch.bincount(blocks.reshape(-1) + 1, minlength=self.n_blocks + 1)[1:].tolist()
        # A block past the last unit (F much smaller than G * W) has nothing to compute.
        self.counts = [c if self.units_of[g].start < self.n_units else 0 for g, c in enumerate(counts)]

    def clear_unused(self, saved: Tensor) -> None:
        """Zero what no token fills of saved [n_in, rows, W], so that equal calls give equal bytes."""
        if self.dense:
            saved.zero_()
            return
        end = 0
        for start, count, units in zip(self.starts, self.counts, self.units_of, strict=False):
            if end < start:
                saved[:, end:start] = 0
            end = start + count
            if units.stop - units.start < self.width:
                saved[:, start:end, units.stop - units.start :] = 0
        saved[:, end:] = 0


@dataclass(frozen=True)
class _Span:
    """Rows of one block. Without `tokens` they are tokens `part`, in order."""

    block: int
    units: slice  # in block order
    tokens: Tensor | None
    part: slice
    slots: slice  # of the row list, and of what is saved

    def take(self, source: Tensor) -> Tensor:
        """The span's rows of [N, ...]."""
        return source[self.part] if self.tokens is None else source.index_select(0, self.tokens)

    def ids(self) -> Tensor:
        return torch.arange(self.part.start, self.part.stop) if self.tokens is None else self.tokens

    def of(self, saved: Tensor) -> list[Tensor]:
        """The span's saved pre-activations: a [n, W] view per in-projection."""
        return [s[self.slots, : self.units.stop - self.units.start] for s in saved]


class _Work(Layout):
    """What forward and backward share: the spans, the order of the weights, and the dtype of accumulation."""

    def __init__(self, x: Tensor, gates: Tensor | None, blocks: Tensor, rows: Tensor, offsets: Tensor, permutation: Tensor):
        super().__init__(x, blocks, rows, offsets, permutation)
        if self.dense and gates is None:
            self.units = None  # every block is computed alike: their order is free, and nothing to permute
        self.blocks = blocks
        self.listed = None if self.dense else rows.long()
        self.accumulate = torch.promote_types(x.dtype, torch.float32)
        self.span = max(_MIN_SPAN, _SPAN_VALUES // self.width)
        if self.dense:  # no more hidden values at a time than the sparse capacity holds
            self.span = max(1, min(self.span, rows.shape[0]))

    def spans(self) -> Iterator[_Span]:
        """All rows in block order."""
        for block, count in enumerate(self.counts):
            if count == 0:
                continue
            start = 0 if self.dense else self.starts[block]
            size = -(-count // -(-count // self.span))
            for low in range(0, count, size):
                high = min(low + size, count)
                slots = slice(start + low, start + high)
                tokens = None if self.listed is None or count == self.n_tokens else self.listed[slots]
                yield _Span(block, self.units_of[block], tokens, slice(low, high), slots)

    def dropout(self, span: _Span, seed: Tensor | None, p: float, dtype: torch.dtype) -> Tensor | None:
        """[n, W] factors of the span's hidden units; the hash takes the model's own numbers of tokens and units."""
        if p == 0 or seed is None:
            return None
        units = torch.arange(span.units.start, span.units.stop)
        return hidden_dropout(seed, span.ids(), units if self.units is None else self.units[units], self.n_units, p, dtype)

    def gate(self, span: _Span, gates: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """[n, 1] factors of the span's rows."""
        return None if gates is None else gates[span.ids(), span.block].to(dtype).unsqueeze(1)

    def arrange(self, weight: Tensor) -> Tensor:
        """[F, ...] in block order and in its own layout: a copy, or the tensor itself where the units are in order."""
        return weight if self.units is None else _pick(weight, self.units)

    def gradient(self, weight: Tensor) -> Tensor:
        """Zeros for the gradient of an [F, ...] weight in block order."""
        if _units_inside(weight):
            return torch.zeros(weight.shape[::-1], dtype=self.accumulate).t()
        return torch.zeros(weight.shape, dtype=self.accumulate)

    def restore(self, gradient: Tensor) -> Tensor:
        """A buffer of `gradient` in the model's order of units."""
        if self.units is None:
            return gradient
        inverse = torch.empty_like(self.units)
        inverse[self.units] = torch.arange(self.n_units)
        return _pick(gradient, inverse)


def _units_inside(weight: Tensor) -> bool:
    """Whether the units of an [F, K] weight lie next to each other in memory (a transposed view)."""
    return weight.dim() == 2 and weight.stride(0) < weight.stride(1)


def _pick(weight: Tensor, units: Tensor) -> Tensor:
    return weight.t().index_select(1, units).t() if _units_inside(weight) else weight.index_select(0, units)


def _per_unit(act_in: Tensor) -> bool:
    """Whether an activation input is a vector over the hidden units, and not one number for all of them."""
    return act_in.dim() == 1 and act_in.shape[0] != 1


def _times(values: Tensor, *factors: Tensor | None) -> Tensor:
    for factor in factors:
        values = values if factor is None else values * factor
    return values


def _accumulate(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, of maybe narrower types."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += torch.mm(left, right)


class _TokenSums:
    """[N, width]: for each token the sum over its blocks of what their products give, and constants.

    Args:
        bias: [width] or None, added for every token.  shift: [G, width] or None, its rows of the dropped blocks are added.
    """

    def __init__(self, work: _Work, width: int, bias: Tensor | None = None, shift: Tensor | None = None):
        wide = work.accumulate
        self.total = torch.zeros((work.n_tokens, width), dtype=wide)
        if shift is not None and not work.dense:
            self.total.addmm_((~kept_mask(work.blocks, work.n_blocks)).to(wide), shift.to(wide))
        if bias is not None:
            self.total += bias

    def add(self, span: _Span, left: Tensor, weight: Tensor) -> None:
        """Adds left @ weight for the span's rows; left [n, W], weight [W, width]."""
        if span.tokens is None:
            _accumulate(self.total[span.part], left, weight)
        else:
            self.total.index_add_(0, span.tokens, torch.mm(left, weight).to(self.total.dtype))


class _Inputs:
    """The in-projections and the activation, with weights in block order."""

    def __init__(self, work: _Work, x, w_in, b_in, lora_a_out, lora_b, act_expr: str, act_in):
        self.x = x
        self.w_in = [work.arrange(w) for w in w_in]
        self.b_in = [work.arrange(b) for b in b_in] or [None] * len(w_in)
        self.lora = [
            (a.to(x.dtype), work.arrange(b).to(x.dtype)) if b.shape[1] else None for a, b in zip(lora_a_out, lora_b, strict=True)
        ] or [None] * len(w_in)
        self.act = expression.parse(act_expr)
        self.act_in = {f"a{i}": (work.arrange(a) if _per_unit(a) else a).to(x.dtype) for i, a in enumerate(act_in)}

    def pre_activations(self, span: _Span) -> list[Tensor]:
        """[n, W] per in-projection."""
        rows, result = span.take(self.x), []
        for w, b, lora in zip(self.w_in, self.b_in, self.lora, strict=True):
            weight = w[span.units].t()
            pre = torch.mm(rows, weight) if b is None else torch.addmm(b[span.units], rows, weight)
            if lora is not None:
                pre.addmm_(span.take(lora[0]), lora[1][span.units].t())
            result.append(pre)
        return result

    def env(self, span: _Span, pre: list[Tensor]) -> dict[str, Tensor]:
        """What the activation reads, by name (see `reference_ffn.activation_env`)."""
        captured = {name: a[span.units] if _per_unit(a) else a for name, a in self.act_in.items()}
        return {f"x{i}": z for i, z in enumerate(pre)} | captured

    def hidden(self, span: _Span, pre: list[Tensor]) -> Tensor:
        """[n, W] after the activation; not to be written to (it may be a pre-activation itself)."""
        return expression.evaluate(self.act, self.env(span, pre)).to(self.x.dtype).expand_as(pre[0])


@register("routed_ffn_v1", "cpu", "cpu")
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
    """`spt::routed_ffn_v1` in ATen operators; see `ops/ffn.py` for the arguments."""
    weights = (w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down)
    check_arguments(x, *weights, gates, blocks, rows, offsets, permutation, compensation, act_in, seed, p, lora_seed, lora_p)
    work = _Work(x, gates, blocks, rows, offsets, permutation)
    inputs = _Inputs(work, x, w_in, b_in, lora_a_out, lora_b, act_expr, act_in)
    down = work.arrange(w_out.t())
    low_down = None if lora_down is None else work.arrange(lora_down.t()).to(x.dtype)
    saved = x.new_empty((len(w_in), rows.shape[0] if save else 0, work.width))
    if save:
        work.clear_unused(saved)
    y = _TokenSums(work, w_out.shape[0], b_out, compensation)
    low = _TokenSums(work, 0 if lora_down is None else lora_down.shape[0])
    for span in work.spans():
        pre = inputs.pre_activations(span)
        if save and not work.dense:
            for kept, value in zip(span.of(saved), pre, strict=True):
                kept.copy_(value)
        keep = work.dropout(span, seed, p, x.dtype)
        hidden = _times(inputs.hidden(span, pre), keep, work.gate(span, gates, x.dtype))
        y.add(span, hidden, down[span.units])
        if low_down is not None:
            low.add(span, _times(hidden, work.dropout(span, lora_seed, lora_p, x.dtype)), low_down[span.units])
    return y.total.to(x.dtype), saved, low.total.to(x.dtype)


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
    """`spt::routed_ffn_backward_v1` in ATen operators: no GEMM for what is not needed, and none again for what was saved."""
    flat = FlatGrads(x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, act_in, needs)
    work = _Work(x, gates, blocks, rows, offsets, permutation)
    flat.put("b_out", lambda: grad_y.sum(0, dtype=work.accumulate))
    if flat.needed <= {"b_out"}:
        return flat.tensors()
    inputs = _Inputs(work, x, w_in, b_in, lora_a_out, lora_b, act_expr, act_in)
    grads = _Gradients(work, flat, len(w_in))
    down = work.arrange(w_out.t()) if grads.through_hidden else None
    low_down = None if lora_down is None else work.arrange(lora_down.t()).to(x.dtype)
    if lora_down is not None and grad_low is None:
        grad_low = grad_y.new_zeros((x.shape[0], lora_down.shape[0]))
    recompute = work.dense or saved.shape[1] == 0
    for span in work.spans():
        pre = inputs.pre_activations(span) if recompute else span.of(saved)
        grad, low_grad = span.take(grad_y), None if grad_low is None else span.take(grad_low).to(x.dtype)
        keep, scale = work.dropout(span, seed, p, x.dtype), work.gate(span, gates, x.dtype)
        low_keep = None if lora_down is None else work.dropout(span, lora_seed, lora_p, x.dtype)
        hidden = _times(inputs.hidden(span, pre), keep) if grads.uses_hidden else None
        grad_hidden = None
        if down is not None:
            grad_hidden = torch.mm(grad, down[span.units].t())
            if low_down is not None:
                grad_hidden += _times(torch.mm(low_grad, low_down[span.units].t()), low_keep)
        if grads.gates is not None:
            grads.gates[span.ids(), span.block] = (grad_hidden * hidden).sum(1, dtype=grads.gates.dtype)
        if grads.names:
            slopes = expression.vjp(inputs.act, inputs.env(span, pre), grads.names, _times(grad_hidden, keep, scale))
            grads.add(inputs, span, dict(zip(grads.names, slopes, strict=True)))
        if grads.w_out is not None:
            _accumulate(grads.w_out[span.units], _times(hidden, scale).t(), grad)
        if grads.lora_down is not None:
            _accumulate(grads.lora_down[span.units], _times(hidden, scale, low_keep).t(), low_grad)
    grads.store()
    return flat.tensors()


class _Gradients:
    """Buffers of the gradients that are needed, in block order, and the steps that fill them."""

    def __init__(self, work: _Work, flat: FlatGrads, n_in: int):
        self.work, self.flat, self.n_in = work, flat, n_in
        like, needed = flat.like, flat.needed

        def tokens(name: str) -> Tensor | None:
            return torch.zeros(like[name].shape, dtype=work.accumulate) if name in needed else None

        def sums(name: str) -> _TokenSums | None:
            return _TokenSums(work, like[name].shape[1]) if name in needed else None

        def units(name: str) -> Tensor | None:
            return work.gradient(like[name]) if name in needed else None

        self.x = sums("x")
        self.w_in = [units(f"w_in{i}") for i in range(n_in)]
        self.b_in = [units(f"b_in{i}") for i in range(n_in)]
        self.w_out = work.gradient(like["w_out"].t()) if "w_out" in needed else None
        self.lora_down = work.gradient(like["lora_down"].t()) if "lora_down" in needed else None
        self.lora_a_out = [sums(f"lora_a_out{i}") for i in range(n_in)]
        self.lora_b = [units(f"lora_b{i}") for i in range(n_in)]
        self.gates = tokens("gates")
        self.act_in = {f"a{name[6:]}": tokens(name) for name in sorted(needed) if name.startswith("act_in")}
        per_pre = zip(self.w_in, self.b_in, self.lora_a_out, self.lora_b, strict=True)
        wanted = [self.x is not None or any(g is not None for g in group) for group in per_pre]
        # Names of the activation's inputs whose gradients are needed.
        self.names = [f"x{i}" for i in range(n_in) if wanted[i]] + list(self.act_in)
        self.through_hidden = bool(self.names) or self.gates is not None
        self.uses_hidden = any(g is not None for g in (self.w_out, self.lora_down, self.gates))

    def add(self, inputs: _Inputs, span: _Span, slopes: dict[str, Tensor]) -> None:
        """Add one span's contributions, given the gradients of the activation's inputs by name."""
        for name, buffer in self.act_in.items():
            target = buffer[span.units] if _per_unit(buffer) else buffer
            target += slopes[name]
        for i in range(self.n_in):
            if f"x{i}" not in slopes:
                continue
            grad, lora = slopes[f"x{i}"].to(inputs.x.dtype), inputs.lora[i]
            if self.x is not None:
                self.x.add(span, grad, inputs.w_in[i][span.units])
            if self.w_in[i] is not None:
                _accumulate(self.w_in[i][span.units], grad.t(), span.take(inputs.x))
            if self.b_in[i] is not None:
                self.b_in[i][span.units] += grad.sum(0, dtype=self.work.accumulate)
            if lora is not None and self.lora_a_out[i] is not None:
                self.lora_a_out[i].add(span, grad, lora[1][span.units])
            if lora is not None and self.lora_b[i] is not None:
                _accumulate(self.lora_b[i][span.units], grad.t(), span.take(lora[0]))

    def store(self) -> None:
        """Hand the finished gradients, in the model's order of units, to the flat list."""
        put, restore = self.flat.put, self.work.restore
        put("x", lambda: self.x.total)
        for i in range(self.n_in):
            put(f"w_in{i}", lambda i=i: restore(self.w_in[i]))
            put(f"b_in{i}", lambda i=i: restore(self.b_in[i]))
            put(f"lora_a_out{i}", lambda i=i: self.lora_a_out[i].total)
            put(f"lora_b{i}", lambda i=i: restore(self.lora_b[i]))
        put("w_out", lambda: restore(self.w_out).t())
        put("lora_down", lambda: restore(self.lora_down).t())
        put("gates", lambda: self.gates)
        for name, buffer in self.act_in.items():
            put(f"act_in{name[1:]}", lambda b=buffer: restore(b) if _per_unit(b) else b)
