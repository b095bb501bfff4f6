"""The patterns, in order of priority, and the search for them."""

from __future__ import annotations

from torch import fx

from ..pattern import Context, Match, Pattern, Skipped, find_matches
from . import attention, ffn
from .attention import AttentionCapture
from .ffn import FFNCapture, Lora, Weight

__all__ = ["PATTERNS", "AttentionCapture", "FFNCapture", "Lora", "Match", "Pattern", "Skipped", "Weight", "find"]

PATTERNS: tuple[Pattern, ...] = (*attention.PATTERNS, *ffn.PATTERNS)


def find(module: fx.GraphModule) -> tuple[list[Match], list[Skipped]]:
    """All sites of one canonicalised graph, and the candidates that a guard refused, each in graph order.

    It looks at this graph only; bodies of higher-order ops are graphs of their own. No node belongs to two matches.
    Reads the graph and changes nothing.
    """
    return find_matches(Context(module), PATTERNS)
