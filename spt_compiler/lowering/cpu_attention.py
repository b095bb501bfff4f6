"""Attention over listed key tiles on the CPU, from batched GEMMs of ATen.

Per chunk of items (see `cpu_tiles.py`): gather the listed key and value tiles, which are stored side by side so that one copy
brings both; one GEMM for the scores; softmax in base 2; one GEMM for the output. Backward recomputes the probabilities from
lse and adds the gradients of keys and values in a fixed order.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from spt_compiler.lowering import cpu_threads
from spt_compiler.lowering.cpu_empty import add_empty_grad, fill_empty
from spt_compiler.lowering.cpu_masks import LOG2E, split
from spt_compiler.lowering.cpu_tiles import (
    Buffers,
    Chunk,
    Segment,
    Shape,
    Work,
    copy,
    pack_keys,
    pack_rows,
    partition,
    shape_of,
    unpack_rows,
)
from spt_compiler.lowering.registry import register
from spt_compiler.ops.reference import attention_output, check_attention, compute_dtype
from spt_compiler.ops.selection.common import in_use

_CAUSAL = "k <= q"
# Beyond this |lse| (in units of log 2) fp32 cannot tell probabilities from lse: rows whose every key is masked by a finite
# value such as finfo.min, which softmax turns into uniform ones.
LSE_LIMIT = 1e3


def fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, counts: Tensor, expr: str, p: float, softcap: float | None
) -> bool:
    """Whether torch's own fused attention computes exactly this: everything selected, and a mask it knows."""
    plain = bias is None and expr in ("", _CAUSAL) and p == 0 and softcap is None
    fits = q.shape[1] == k.shape[1] and q.shape[3] == v.shape[3] and q.dtype in (torch.float32, torch.float64)
    return plain and fits and q.numel() > 0 and k.numel() > 0 and bool((counts < 0).all())


def _score_factor(scale: float, softcap: float | None) -> float:
    """What q is multiplied by before the GEMM: scores in units of log 2, or the argument of the cap's tanh."""
    return scale * LOG2E if softcap is None else scale / softcap


def _gather(buffers: Buffers, packed: Tensor, chunk: Chunk, shape: Shape) -> tuple[Tensor, Tensor]:
    """Listed keys [N, M * tile_k, D] and values [N, M * tile_k, Dv], views of one buffer."""
    n_items, n_slots = chunk.size
    both = buffers.get("listed", n_items, n_slots * shape.tile_k, shape.dim + shape.dim_v)
    torch.index_select(packed, 0, chunk.source, out=both.view(n_items * n_slots, -1))
    return both[..., : shape.dim], both[..., shape.dim :]


def _segment_memory(buffers: Buffers, shape: Shape, segment: Segment) -> tuple[Tensor, Tensor]:
    """Scratch for the queries and the keys of a segment, to be packed."""
    packed_q = buffers.get("q", len(segment) * shape.n_row_tiles, shape.rows, shape.dim)
    packed_kv = buffers.get("kv", len(segment) * shape.n_key_tiles, shape.tile_k * (shape.dim + shape.dim_v))
    return packed_q, packed_kv


def _supports_tile_attention(*args) -> bool:
    """Whether there are queries, and no pseudo-keys are asked for: all else is left to the reference."""
    return args[0].shape[2] > 0 and not any(args[15:])  # `compensate`, where it is given


def _supports_tile_attention_backward(*args) -> bool:
    return args[1].shape[2] > 0 and not any(args[19:])


@register("tile_attention_v1", "cpu", "cpu", supports=_supports_tile_attention)
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
    """`spt::tile_attention_v1`; see there."""
    check_attention(q, k, v, bias, tiles, counts, seed, p, empty, tile_q, tile_k)
    tiles, counts = in_use(tiles, counts, q.shape[2], tile_q)
    if fused(q, k, v, bias, counts, expr, p, softcap):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = op(q, k, v, 0.0, expr == _CAUSAL, scale=scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    dtype = compute_dtype(q)
    shape = shape_of(q, k, v, tile_q, tile_k)
    masks = split(bias, expr, expr_in, (shape.batch, shape.n_heads, shape.n_q, shape.n_k), dtype)
    work = Work(shape, tiles, counts, masks)
    factor, lowest, tiny = _score_factor(scale, softcap), torch.finfo(dtype).min, torch.finfo(dtype).tiny
    out = attention_output(q, v)
    lse = q.new_empty(q.shape[:3], dtype=dtype)

    def chunk_rows(chunk: Chunk, buffers: Buffers, packed_q, packed_kv, packed_out, tops, totals) -> None:
        keys, values = _gather(buffers, packed_kv, chunk, shape)
        scores = buffers.get("scores", chunk.size[0], shape.rows, keys.shape[1])
        torch.bmm(packed_q[chunk.items], keys.transpose(1, 2), out=scores)
        if softcap is not None:
            scores.tanh_().mul_(softcap * LOG2E)
        work.add_masks(scores, chunk)
        top = scores.amax(-1, keepdim=True)
        if not (chunk.diagonal and work.only_causal):
            top.clamp_(min=lowest)  # a row without a key: -inf - -inf would be NaN
        scores.sub_(top).exp2_()
        tops[chunk.items], totals[chunk.items] = top, scores.sum(-1, keepdim=True)
        if p > 0:
            scores.mul_(work.dropout(chunk, seed, p))
        if isinstance(chunk.items, slice):
            torch.bmm(scores, values, out=packed_out[chunk.items])
        else:
            packed_out[chunk.items] = torch.bmm(scores, values)

    def part(segments: list[Segment]) -> None:
        buffers = Buffers(dtype)
        for segment in segments:
            b, heads = segment.b, segment.heads(shape)
            packed_q, packed_kv = _segment_memory(buffers, shape, segment)
            pack_rows(packed_q, q[b, heads], shape, factor)
            pack_keys(packed_kv, k[b, segment.first : segment.stop], v[b, segment.first : segment.stop], shape)
            size = (packed_q.shape[0], shape.rows)
            packed_out = buffers.get("out", *size, shape.dim_v)
            # Largest score of each row, and the sum of 2^(score - largest).
            tops, totals = buffers.get("tops", *size, 1).fill_(-torch.inf), buffers.get("totals", *size, 1).zero_()
            chunks = work.chunks(segment)
            if sum(len(chunk.numbers) for chunk in chunks) < size[0]:
                packed_out.zero_()  # some items have no list
            for chunk in chunks:
                chunk_rows(chunk, buffers, packed_q, packed_kv, packed_out, tops, totals)
            packed_out.div_(totals.clamp(min=tiny))
            unpack_rows(out[b, heads], packed_out, shape)
            unpack_rows(lse[b, heads].unsqueeze(-1), tops.add_(totals.log2_()), shape, 1 / LOG2E)

    cpu_threads.run([functools.partial(part, segments) for segments in partition(shape)])
    fill_empty(out, lse, v, masks, seed, p, empty)
    return out, lse


@register("tile_attention_backward_v1", "cpu", "cpu", supports=_supports_tile_attention_backward)
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
    """`spt::tile_attention_backward_v1`; see there."""
    need_q, need_k, need_v, need_bias = needs
    need_bias = need_bias and bias is not None and bias.is_floating_point()
    none = q.new_empty(0)
    tiles, counts = in_use(tiles, counts, q.shape[2], tile_q)
    if fused(q, k, v, bias, counts, expr, p, softcap):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        grads = op(grad_out.contiguous(), q, k, v, out, lse, 0.0, expr == _CAUSAL, scale=scale)
        return [*(g.contiguous() if need else none.clone() for g, need in zip(grads, needs, strict=False)), none]
    dtype = compute_dtype(q)
    shape = shape_of(q, k, v, tile_q, tile_k)
    masks = split(bias, expr, expr_in, (shape.batch, shape.n_heads, shape.n_q, shape.n_k), dtype)
    work = Work(shape, tiles, counts, masks)
    need_scores, need_kv = need_q or need_k or need_bias, need_k or need_v
    factor, tiny, lowest = _score_factor(scale, softcap), torch.finfo(dtype).tiny, torch.finfo(dtype).min
    grad_q, grad_k, grad_v = (
        x.new_empty(x.shape) if need else none.clone() for x, need in ((q, need_q), (k, need_k), (v, need_v))
    )
    grad_bias = torch.zeros(bias.shape, dtype=dtype) if need_bias else None

    class Memory:
        """Scratch of one thread for one segment."""

        def __init__(self, buffers: Buffers, segment: Segment):
            n = len(segment) * shape.n_row_tiles
            self.q, self.kv = _segment_memory(buffers, shape, segment)
            self.grad_out = buffers.get("grad_out", n, shape.rows, shape.dim_v)
            self.level = buffers.get("level", n, 1, shape.rows)
            self.delta = buffers.get("delta", n, 1, shape.rows) if need_scores else None
            self.grad_q = buffers.get("grad_q", n, shape.rows, shape.dim).zero_() if need_q else None
            self.grad_kv = buffers.get("grad_kv", *self.kv.shape).zero_() if need_kv else None
            b, heads, keys = segment.b, segment.heads(shape), slice(segment.first, segment.stop)
            pack_rows(self.q, q[b, heads], shape, factor)
            pack_rows(self.grad_out, grad_out[b, heads], shape)
            pack_keys(self.kv, k[b, keys], v[b, keys], shape)
            # -lse in units of log 2. A row without keys, and one beyond Tq, gets -inf and so probabilities of zero.
            dead = lse[b, heads] == -torch.inf
            level = self.level.transpose(1, 2)
            pack_rows(level, lse[b, heads].unsqueeze(-1), shape, -LOG2E, beyond=-torch.inf)
            level.masked_fill_(level == torch.inf, -torch.inf)
            # Where lse is so large that fp32 cannot tell probabilities from it, they are normalised anew.
            far = (level.abs() > LSE_LIMIT) & (level != -torch.inf)
            self.coarse = far.flatten(1).any(1).tolist()
            if need_scores:
                delta = (grad_out[b, heads].to(dtype) * out[b, heads]).sum(-1)
                delta.masked_fill_(dead, 0)  # `out` may be NaN there
                pack_rows(self.delta.transpose(1, 2), delta.unsqueeze(-1), shape, -1.0)

        def finish(self, segment: Segment) -> None:
            b, heads, keys = segment.b, segment.heads(shape), slice(segment.first, segment.stop)
            if need_q:
                unpack_rows(grad_q[b, heads], self.grad_q, shape, scale)
            if need_kv:
                both = self.grad_kv.view(len(segment), -1, shape.dim + shape.dim_v)[:, : shape.n_k]
                if need_k:
                    # The rows were q times `factor`; the gradient wants q times `scale`.
                    copy(grad_k[b, keys], both[..., : shape.dim], scale / factor if scale else 0.0)
                if need_v:
                    grad_v[b, keys].copy_(both[..., shape.dim :])

    def chunk_grads(chunk: Chunk, buffers: Buffers, memory: Memory) -> None:
        # Scores lie in memory as [keys, rows]: then no GEMM below reads a transposed panel from outside in.
        keys, values = _gather(buffers, memory.kv, chunk, shape)
        rows, grad_rows, level = memory.q[chunk.items], memory.grad_out[chunk.items], memory.level[chunk.items]
        panel = (chunk.size[0], keys.shape[1], shape.rows)
        prob = buffers.get("scores", *panel)
        coarse = any(memory.coarse[i] for i in chunk.numbers)
        shift = level.masked_fill(level != -torch.inf, 0) if coarse else level
        slope = None
        if softcap is None:
            torch.baddbmm(shift, keys, rows.transpose(1, 2), out=prob)
        else:
            torch.bmm(keys, rows.transpose(1, 2), out=prob)
            slope = prob.tanh_().square().neg_().add_(1)
            prob.mul_(softcap * LOG2E).add_(shift)
        work.add_masks(prob.transpose(1, 2), chunk)
        if coarse:
            prob.sub_(prob.amax(1, keepdim=True).clamp_(min=lowest)).exp2_()
            prob.div_(prob.sum(1, keepdim=True).clamp_(min=tiny))
        else:
            prob.exp2_()
        keep = work.dropout(chunk, seed, p).transpose(1, 2) if p > 0 else None
        grad_both = None
        if need_kv:
            grad_both = buffers.get("grad_both", *panel[:2], shape.dim + shape.dim_v)
            if not (need_k and need_v):
                grad_both.zero_()
        if need_v:
            weights = prob if keep is None else prob * keep
            torch.bmm(weights, grad_rows, out=grad_both[..., shape.dim :])
        if need_scores:
            grad, delta = buffers.get("grad_scores", *panel), memory.delta[chunk.items]
            if keep is None:
                torch.baddbmm(delta, values, grad_rows.transpose(1, 2), out=grad)
            else:
                torch.bmm(values, grad_rows.transpose(1, 2), out=grad)
                grad.mul_(keep).add_(delta)
            grad.mul_(prob)
            if need_bias:
                work.add_bias_grad(grad_bias, grad.transpose(1, 2), chunk)
            if slope is not None:
                grad.mul_(slope)
            if need_q and isinstance(chunk.items, slice):
                torch.bmm(grad.transpose(1, 2), keys, out=memory.grad_q[chunk.items])
            elif need_q:
                memory.grad_q[chunk.items] = torch.bmm(grad.transpose(1, 2), keys)
            if need_k:
                torch.bmm(grad, rows, out=grad_both[..., : shape.dim])
        if need_kv:
            memory.grad_kv.index_add_(0, chunk.source, grad_both.view(chunk.source.numel(), -1))

    def part(segments: list[Segment]) -> None:
        buffers = Buffers(dtype)
        for segment in segments:
            memory = Memory(buffers, segment)
            for chunk in work.chunks(segment):
                chunk_grads(chunk, buffers, memory)
            memory.finish(segment)

    cpu_threads.run([functools.partial(part, segments) for segments in partition(shape, grad_bias)])
    if need_v:
        add_empty_grad(grad_v, grad_out, lse, masks, seed, p, empty)
    return [grad_q, grad_k, grad_v, none.clone() if grad_bias is None else grad_bias.to(bias.dtype)]
