"""Rule "pq": keys are scored through their product-quantised form.

Tiles: the mean field, that is the logits of the mean decoded key of each tile. Single keys: asymmetric distance (ADC), that is
the inner product of the query itself with the decoded key.
Source: SPT (arXiv 2312.10365) quantises both sides and counts equal codes; see `pq_match.py`.
"""

from __future__ import annotations

from torch import Tensor

from spt_compiler import pq
from spt_compiler.ops.selection.common import Rule


def tile_keys(k: Tensor, codebook: Tensor | None, key_mean: Tensor | None) -> Tensor:
    """k [B, Hkv, Tk, D] rounded to codebook [Hkv, P, C, D/P] about key_mean [Hkv, D]; fp32 (fp64 for fp64 input).

    Without a codebook (a site without state) the keys as they are.
    """
    return k if codebook is None else pq.reconstruct(codebook, k, key_mean)


def key_scores(
    q: Tensor, k: Tensor, codebook: Tensor | None, key_mean: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """softcap(scale * q . khat): q [B, H, Tq, D], k [B, Hkv, Tk, D] -> [B, H, Tq, Tk] fp32 (fp64 for fp64 input)."""
    decoded = tile_keys(k, codebook, key_mean)
    group = q.shape[1] // k.shape[1]
    scores = q.to(decoded.dtype) @ decoded.repeat_interleave(group, dim=1).transpose(-1, -2) * scale
    return scores if softcap is None else softcap * (scores / softcap).tanh()


RULE = Rule("pq", tile_keys, key_scores, nearest=False, needs_codebook=False)
