"""Attention over the keys listed for each query on the CPU.

Queries in chunks, each against all keys up to the end of its causal range, with what is not listed masked out: at the densities in
use, gathering a different set of keys for every query costs more than these GEMMs. Memory is bounded by the chunk.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from spt_compiler.lowering import cpu_threads
from spt_compiler.lowering.cpu_empty import add_empty_grad, fill_empty
from spt_compiler.lowering.cpu_masks import LOG2E, Masks, base2, split
from spt_compiler.lowering.cpu_tiles import Segment, Shape, partition, shape_of
from spt_compiler.lowering.registry import register
from spt_compiler.ops.reference import attention_dropout, attention_output, check_attention, compute_dtype, listed

# Scores of a chunk (elements).
_PANEL = 1 << 18


class _Rows:
    """A chunk of queries of one key head of one batch row: its probabilities."""

    def __init__(self, q, k, keys, counts, masks: Masks, shape: Shape, b: int, g: int, start: int, stop: int, seed, p):
        """Args: q, k, keys, counts: of the op.  b, g: batch row and key head.  start, stop: the queries."""
        self.b, self.g, self.start, self.stop = b, g, start, stop
        self.heads = slice(g * shape.group, (g + 1) * shape.group)
        self.n_seen = min(stop, shape.n_k) if masks.causal else shape.n_k
        self.q = q[b, self.heads, start:stop].to(masks.dtype)  # [group, rows, D]
        self.k = k[b, g, : self.n_seen].to(masks.dtype)
        self.keep = listed(keys[b, self.heads, start:stop], counts[b, self.heads, start:stop], shape.n_k)[..., : self.n_seen]
        self.masks, self.shape, self.seed, self.p = masks.part(slice(b, b + 1), self.heads), shape, seed, p

    def probabilities(self, scale: float, softcap: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """prob [group, rows, n] before dropout, lse [group, rows] (natural), slope of the cap or None."""
        masks, slope = self.masks, None
        if softcap is None:
            scores = (self.q * (scale * LOG2E)) @ self.k.t()
        else:
            scores = ((self.q * (scale / softcap)) @ self.k.t()).tanh_()
            slope = scores.square().neg_().add_(1)
            scores.mul_(softcap * LOG2E)
        added = masks.rows(self.start, self.stop)[0, ..., : self.n_seen]
        if masks.key is not None or masks.general or masks.causal:
            scores.add_(base2(added))
        scores.masked_fill_(~self.keep, -torch.inf)
        top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        scores.sub_(top).exp2_()
        total = scores.sum(-1, keepdim=True)
        lse = top.add_(total.log2()).mul_(1 / LOG2E).squeeze(-1)
        return scores.div_(total.clamp_(min=torch.finfo(scores.dtype).tiny)), lse, slope

    def dropout(self) -> Tensor | None:
        """[group, rows, n] of 0 and 1 / (1 - p); None without dropout."""
        if self.p == 0:
            return None
        shape = self.shape
        h = torch.arange(self.heads.start, self.heads.stop).view(-1, 1, 1)
        q, k = torch.arange(self.start, self.stop).view(1, -1, 1), torch.arange(self.n_seen)
        keep = attention_dropout(self.seed, self.p, torch.tensor(self.b), h, q, k, (shape.n_heads, shape.n_q, shape.n_k))
        return keep.to(self.masks.dtype).mul_(1 / (1 - self.p) if self.p < 1 else 0.0)


def _chunks(shape: Shape, segments: list[Segment]):
    """(b, g, start, stop) of all chunks."""
    step = max(1, _PANEL // max(1, shape.group * shape.n_k))
    for segment in segments:
        for g in range(segment.first, segment.stop):
            for start in range(0, shape.n_q, step):
                yield segment.b, g, start, min(start + step, shape.n_q)


@register("key_attention_v1", "cpu", "cpu")
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
    """`spt::key_attention_v1`; see there."""
    check_attention(q, k, v, bias, keys, counts, seed, p, empty)
    dtype = compute_dtype(q)
    shape = shape_of(q, k, v, 1, 1)
    masks = split(bias, expr, expr_in, (shape.batch, shape.n_heads, shape.n_q, shape.n_k), dtype)
    out = attention_output(q, v).zero_()
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)

    def part(segments: list[Segment]) -> None:
        for b, g, start, stop in _chunks(shape, segments):
            rows = _Rows(q, k, keys, counts, masks, shape, b, g, start, stop, seed, p)
            prob, lse[b, rows.heads, start:stop], _ = rows.probabilities(scale, softcap)
            keep = rows.dropout()
            prob = prob if keep is None else prob.mul_(keep)
            out[b, rows.heads, start:stop] = (prob @ v[b, g, : rows.n_seen].to(dtype)).to(q.dtype)

    if k.shape[2] > 0:
        cpu_threads.run([functools.partial(part, segments) for segments in partition(shape)])
    fill_empty(out, lse, v, masks, seed, p, empty)
    return out, lse


@register("key_attention_backward_v1", "cpu", "cpu")
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
    """`spt::key_attention_backward_v1`; see there."""
    need_q, need_k, need_v, need_bias = needs
    need_bias = need_bias and bias is not None and bias.is_floating_point()
    none = q.new_empty(0)
    dtype = compute_dtype(q)
    shape = shape_of(q, k, v, 1, 1)
    masks = split(bias, expr, expr_in, (shape.batch, shape.n_heads, shape.n_q, shape.n_k), dtype)
    grad_q = q.new_zeros(q.shape) if need_q else none.clone()
    grad_k = torch.zeros(k.shape, dtype=dtype) if need_k else None
    grad_v = torch.zeros(v.shape, dtype=dtype) if need_v else None
    grad_bias = torch.zeros(bias.shape, dtype=dtype) if need_bias else None

    def part(segments: list[Segment]) -> None:
        for b, g, start, stop in _chunks(shape, segments):
            rows = _Rows(q, k, keys, counts, masks, shape, b, g, start, stop, seed, p)
            prob, _, slope = rows.probabilities(scale, softcap)
            keep = rows.dropout()
            grad_rows = grad_out[b, rows.heads, start:stop].to(dtype)
            if need_v:
                weights = prob if keep is None else prob * keep
                grad_v[b, g, : rows.n_seen].add_(weights.flatten(0, 1).t() @ grad_rows.flatten(0, 1))
            if not (need_q or need_k or need_bias):
                continue
            grad = grad_rows @ v[b, g, : rows.n_seen].to(dtype).t()
            grad = grad if keep is None else grad.mul_(keep)
            grad.sub_((grad * prob).sum(-1, keepdim=True)).mul_(prob)
            if need_bias:
                _add_bias_grad(grad_bias, grad, rows)
            grad = (grad if slope is None else grad.mul_(slope)).mul_(scale)
            if need_q:
                grad_q[b, rows.heads, start:stop] = (grad @ rows.k).to(q.dtype)
            if need_k:
                grad_k[b, g, : rows.n_seen].add_(grad.flatten(0, 1).t() @ rows.q.flatten(0, 1))

    if k.shape[2] > 0:
        cpu_threads.run([functools.partial(part, segments) for segments in partition(shape, grad_bias)])
    if need_v:
        add_empty_grad(grad_v, grad_out, lse, masks, seed, p, empty)
    found = ((grad_k, k), (grad_v, v), (grad_bias, bias))
    return [grad_q, *(none.clone() if grad is None else grad.to(x.dtype) for grad, x in found)]


def _add_bias_grad(bias_grad: Tensor, grad: Tensor, rows: _Rows) -> None:
    """Adds the gradients of a chunk's logits [group, rows, n] to those of the bias."""
    for axis in (0, 1):
        if bias_grad.shape[axis + 1] == 1:
            grad = grad.sum(axis, keepdim=True)
    heads = slice(None) if bias_grad.shape[1] == 1 else rows.heads
    at = slice(None) if bias_grad.shape[2] == 1 else slice(rows.start, rows.stop)
    target = bias_grad[rows.b if bias_grad.shape[0] > 1 else 0, heads, at]
    if bias_grad.shape[3] == 1:
        target.add_(grad.sum(-1, keepdim=True))
    else:
        target[..., : rows.n_seen].add_(grad)
