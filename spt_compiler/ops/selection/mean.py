"""Rule "mean": tiles are scored by the means of their plain keys. The rival that product quantisation has to equal."""

from __future__ import annotations

from torch import Tensor

from spt_compiler.ops.selection.common import Rule


def tile_keys(k: Tensor, codebook: Tensor | None, key_mean: Tensor | None) -> Tensor:
    """The keys as they are: k [B, Hkv, Tk, D] -> itself."""
    return k


RULE = Rule("mean", tile_keys, None, nearest=False, needs_codebook=False)
