"""Rows in which no key at all is allowed: what they return and what gradient they send, on the CPU.

They are rare (fully padded rows), so they are mended after the fast path has left zeros there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spt_compiler.lowering.cpu_masks import Masks
from spt_compiler.ops.reference import attention_dropout

_ROWS = 256  # treated together


def _empty_rows(lse: Tensor, masks: Masks, empty: str) -> tuple[Tensor, ...] | None:
    """Indices (b, h, q) of rows in which nothing at all is allowed; None where there are none or they simply are zero."""
    if empty == "zero" or masks.shape[3] == 0:  # a sum over no keys is zero, whatever stands for a masked row
        return None
    dead = lse == -torch.inf
    if not bool(dead.any()):
        return None
    found = (dead & masks.nothing()).nonzero(as_tuple=True)
    return found if found[0].numel() else None


def _weights(b: Tensor, h: Tensor, q: Tensor, masks: Masks, seed: Tensor | None, p: float) -> Tensor:
    """[rows, Tk]: what such a row gives every value under `empty="uniform"`, with dropout."""
    _, n_heads, n_q, n_k = masks.shape
    weights = torch.full((b.numel(), n_k), 1 / max(n_k, 1), dtype=masks.dtype)
    if p > 0 and seed is not None:
        b, h, q = b.unsqueeze(1), h.unsqueeze(1), q.unsqueeze(1)
        keep = attention_dropout(seed, p, b, h, q, torch.arange(n_k), (n_heads, n_q, n_k))
        weights.mul_(keep).mul_(1 / (1 - p) if p < 1 else 0.0)
    return weights


def fill_empty(out: Tensor, lse: Tensor, v: Tensor, masks: Masks, seed: Tensor | None, p: float, empty: str) -> None:
    """Sets the rows of out [B, H, Tq, Dv] in which nothing is allowed to what `empty` says. v: [B, Hkv, Tk, Dv]."""
    rows = _empty_rows(lse, masks, empty)
    if rows is None:
        return
    if empty == "nan":
        out[rows] = torch.nan
        return
    group = out.shape[1] // v.shape[1]
    for start in range(0, rows[0].numel(), _ROWS):
        b, h, q = (x[start : start + _ROWS] for x in rows)
        weights = _weights(b, h, q, masks, seed, p)
        values = v[b, h // group].to(masks.dtype)  # [rows, Tk, Dv]
        out[b, h, q] = (weights.unsqueeze(1) @ values).squeeze(1).to(out.dtype)


def add_empty_grad(
    grad_v: Tensor, grad_out: Tensor, lse: Tensor, masks: Masks, seed: Tensor | None, p: float, empty: str
) -> None:
    """Adds what these rows contribute to grad_v [B, Hkv, Tk, Dv]; they contribute to no other gradient."""
    rows = _empty_rows(lse, masks, empty)
    if rows is None:
        return
    n_groups = grad_v.shape[1]
    group = grad_out.shape[1] // n_groups
    if empty == "nan":
        grad_v[rows[0], rows[1] // group] = torch.nan
        return
    total = torch.zeros(grad_v.shape, dtype=masks.dtype).flatten(0, 1)
    for start in range(0, rows[0].numel(), _ROWS):
        b, h, q = (x[start : start + _ROWS] for x in rows)
        weights = _weights(b, h, q, masks, seed, p)
        contribution = weights.unsqueeze(2) * grad_out[b, h, q].to(masks.dtype).unsqueeze(1)  # [rows, Tk, Dv]
        total.index_add_(0, b * n_groups + h // group, contribution)
    grad_v.add_(total.view(grad_v.shape))
