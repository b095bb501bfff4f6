"""What the selection rules share: their declaration, and how many tiles or keys a density keeps.

A density is counted in millionths, so that an fp32 0.1 and a Python 0.1 keep the same number; every lowering counts alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, sym_max, sym_min

from spt_compiler import expression

MILLION = 1_000_000


@dataclass(frozen=True)
class Rule:
    """A rule that scores keys, by which tiles or keys are chosen.

    Args:
        name: as in the option `attention.select`.
        tile_keys: (k, codebook, key_mean) -> the keys whose tile means are scored, [B, Hkv, Tk, D]; None where the rule does
            not work on tiles.
        key_scores: (q, k, codebook, key_mean, scale, softcap) -> [B, H, Tq, Tk] scores to which the bias is added; None where
            the rule does not work on single keys.
        nearest: ties go to the key nearest to the query's position; else to the lower index.
        needs_codebook: the rule cannot do without a codebook.
    """

    name: str
    tile_keys: Callable[[Tensor, Tensor | None, Tensor | None], Tensor] | None
    key_scores: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float, float | None], Tensor] | None
    nearest: bool
    needs_codebook: bool


def millionths(density: float) -> int:
    """A density as an integer number of millionths, within [0, 1]."""
    return min(max(round(density * MILLION), 0), MILLION)


def budget_millionths(budget: Tensor, max_density: float) -> Tensor:
    """The density in force, as an int64 tensor like `budget` (fp32 [1]); the caller treats budget < 0 (everything) apart."""
    return (budget.double() * MILLION).round().clamp(0, millionths(max_density)).long()


def forced_tiles(tile_q: int, tile_k: int) -> int:
    """Most tiles a row can be forced to keep: those a query tile's own positions touch, and the first visible one."""
    return -(-tile_q // tile_k) + 2


def near_tiles(wanted: Tensor, tile_q: int, tile_k: int) -> Tensor:
    """How many tiles before a query tile are preferred, under a causal mask, of `wanted` tiles (int64) that its list keeps.

    As many as hold the keys of one query tile, but no more than half of what is not forced. The mean of a tile says least about
    the keys near a query: of those, single ones stand out.
    """
    return ((wanted - forced_tiles(tile_q, tile_k)) // 2).clamp(0, -(-tile_q // tile_k))


def stored(index: Tensor, counts: Tensor, *, tiles: bool) -> tuple[Tensor, Tensor]:
    """Lists as the selection ops return them: at least two slots and, of tiles, two rows; what is added is unused.

    A size that is derived from a symbolic length and may be one makes torch compile a graph for that case alone; one that is
    at least two never does. Only lists of very short inputs are copied.
    """
    rows = max(0, 2 - index.shape[2]) if tiles else 0
    slots = max(0, 2 - index.shape[3])
    if rows or slots:
        index = torch.nn.functional.pad(index, (0, slots, 0, rows), value=-1)
        counts = torch.nn.functional.pad(counts, (0, rows), value=0)
    return index, counts


def in_use(tiles: Tensor, counts: Tensor, n_q: int, tile_q: int) -> tuple[Tensor, Tensor]:
    """The rows of stored lists of tiles that have queries, contiguous."""
    n_rows = -(-n_q // tile_q)
    return tiles[:, :, :n_rows].contiguous(), counts[:, :, :n_rows].contiguous()


def stored_tiles(n_q, n_k, max_density: float, tile_q: int, tile_k: int):
    """Rows and slots of stored lists of tiles, see `stored`. `n_q` and `n_k` may be symbolic."""
    return sym_max(2, (n_q + tile_q - 1) // tile_q), sym_max(2, max_tiles(n_k, max_density, tile_q, tile_k))


def stored_keys(n_k, max_density: float):
    """Slots of stored lists of keys, see `stored`. `n_k` may be symbolic."""
    return sym_max(2, max_keys(n_k, max_density))


def max_tiles(n_k, max_density: float, tile_q: int, tile_k: int):
    """Slots of a tile list: min(nK, max(ceil(max_density * Tk / tile_k), forced)). `n_k` may be symbolic."""
    n_tiles = (n_k + tile_k - 1) // tile_k
    unit = MILLION * tile_k
    wanted = (n_k * millionths(max_density) + unit - 1) // unit
    return sym_min(n_tiles, sym_max(wanted, forced_tiles(tile_q, tile_k)))


def max_keys(n_k, max_density: float):
    """Slots of a key list: ceil(max_density * Tk), at least 1, at most Tk. `n_k` may be symbolic."""
    wanted = (n_k * millionths(max_density) + MILLION - 1) // MILLION
    return sym_min(n_k, sym_max(wanted, 1))


def is_causal(expr: str) -> bool:
    """Whether "k <= q" is a conjunct of the mask expression (it may be followed by other conditions)."""
    return causal_split(expr)[0]


def causal_split(expr: str) -> tuple[bool, expression.Expression | None]:
    """A mask expression as (is "k <= q" a conjunct of it, what else it asks: an expression or None)."""
    if not expr:
        return False, None
    parts = expression.conjuncts(expression.parse(expr))
    causal = expression.parse("k <= q")
    others = [part for part in parts if part != causal]
    rest = None
    for part in others:
        rest = part if rest is None else rest & part
    return len(others) < len(parts), rest
