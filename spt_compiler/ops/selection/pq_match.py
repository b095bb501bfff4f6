"""Rule "pq-match": the number of subspaces in which query and key have the same code (the paper's rule).

Ties, which are many with so few levels, go to the nearest key: taking the earliest loses an order of magnitude more.
Source: SPT (arXiv 2312.10365); differs from its prototype by an exact top-L and by the tie rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spt_compiler import pq
from spt_compiler.ops.selection.common import Rule


def codes(q: Tensor, k: Tensor, codebook: Tensor | None, key_mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of queries [B, H, Tq, P] and of keys [B, Hkv, Tk, P], both by the codebook of the key head; keys are centred."""
    assert codebook is not None
    n_groups = k.shape[1]
    centred = k if key_mean is None else k - key_mean.unsqueeze(-2)
    grouped = q.unflatten(1, (n_groups, -1)).transpose(1, 2)  # [B, group, Hkv, Tq, D]
    return pq.assign(codebook, grouped).transpose(1, 2).flatten(1, 2), pq.assign(codebook, centred)


def key_scores(
    q: Tensor, k: Tensor, codebook: Tensor | None, key_mean: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Number of equal codes: q [B, H, Tq, D], k [B, Hkv, Tk, D] -> [B, H, Tq, Tk] fp32 (fp64 for fp64 input)."""
    q_codes, k_codes = codes(q, k, codebook, key_mean)
    k_codes = k_codes.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.zeros(*q.shape[:3], k.shape[2], dtype=dtype, device=q.device)
    for p in range(q_codes.shape[-1]):
        scores += q_codes[..., p].unsqueeze(-1) == k_codes[..., p].unsqueeze(-2)
    return scores


RULE = Rule("pq-match", None, key_scores, nearest=True, needs_codebook=True)
