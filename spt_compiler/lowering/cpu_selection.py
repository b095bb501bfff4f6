"""Selection of key tiles and keys on the CPU; the same choice as the reference, up to ties in floating point.

Tiles: where a query sees all keys of a tile alike, the logit of the tile is the query times the tile's mean key, one small GEMM.
Only tiles that a query sees in part are treated key by key: under a causal mask the one on the diagonal, under other masks those
in which the mask is not constant. Work goes through the query tiles in chunks; nothing of size Tq x Tk is held.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_compiler.lowering import cpu_threads
from spt_compiler.lowering.cpu_masks import Masks, split
from spt_compiler.lowering.registry import register
from spt_compiler.ops.reference import (
    check_rule,
    check_selection,
    choose_keys,
    choose_tiles,
    compute_dtype,
    everything_by_data,
    preferred_mask,
    wanted_count,
)
from spt_compiler.ops.selection import pq, pq_match
from spt_compiler.ops.selection.common import forced_tiles, max_keys, max_tiles, near_tiles, stored

# Logits of tiles, or of keys, held at a time (elements).
_PANEL = 1 << 19


class _Scorer:
    """Attention mass and visibility of key tiles, a range of query tiles at a time."""

    def __init__(self, q: Tensor, keys: Tensor, masks: Masks, tile_q: int, tile_k: int, scale: float, softcap: float | None):
        """Args: q: [B, H, Tq, D].  keys: [B, Hkv, Tk, D], those to score, of the dtype of computation."""
        self.q, self.masks, self.tile_q, self.tile_k = q, masks, tile_q, tile_k
        self.scale, self.softcap = scale, softcap
        self.batch, self.n_heads, self.n_q, _ = q.shape
        self.n_groups, self.n_k = keys.shape[1:3]
        self.group = self.n_heads // self.n_groups
        self.n_tiles = -(-self.n_k // tile_k)
        self.dtype = keys.dtype
        tail = self.n_tiles * tile_k - self.n_k
        keys = F.pad(keys, (0, 0, 0, tail)) if tail else keys
        self.keys = keys.unflatten(2, (self.n_tiles, tile_k))  # [B, Hkv, nK, tile_k, D]
        # Addends that hold for every query: [B or 1, H or 1, nK, tile_k].
        key = torch.zeros(1, 1, self.n_k, dtype=self.dtype) if masks.key is None else masks.key
        self.key = F.pad(key, (0, tail), value=-torch.inf).unflatten(2, (self.n_tiles, tile_k))
        self.uniform = masks.key is None and tail == 0
        self.level = self.key.logsumexp(-1)  # [B or 1, H or 1, nK]
        self.visible = self.level > -torch.inf
        self.all_visible = bool(self.visible.all())
        self.means = self._means().mul_(scale)
        self.diagonal = masks.causal and not masks.general
        if self.diagonal:
            self.own_weight, self.own_level = self._prefixes()

    def _means(self) -> Tensor:
        """Mean keys of the tiles, under the addends of the keys: [B, Hkv or H, nK, D]."""
        if self.uniform:
            return self.keys.mean(3)
        weight = torch.where(self.visible.unsqueeze(-1), self.key.softmax(-1), 0)
        keys = self.keys if weight.shape[1] == 1 else self.keys.repeat_interleave(self.group, dim=1)
        means = (weight.unsqueeze(-2) @ keys).squeeze(-2)
        if bool(means.isnan().any()):  # perhaps of a key that weighs nothing, which may hold anything
            means = (weight.unsqueeze(-2) @ keys.masked_fill(weight.unsqueeze(-1) == 0, 0)).squeeze(-2)
        return means

    def _prefixes(self) -> tuple[Tensor, Tensor]:
        """Weights and level of the tile on a query's diagonal, of which a causal mask shows only the beginning.

        Returns: weights [B or 1, H or 1, nK or 1, tile_k, tile_k] (query, key), zero where nothing is visible; levels
            [B or 1, H or 1, nK or 1, tile_k], -inf there.
        """
        position = torch.arange(self.tile_k)
        key = self.key[:, :, :1] if self.uniform else self.key
        added = key.unsqueeze(-2).masked_fill(position > position.unsqueeze(1), -torch.inf)
        level = added.logsumexp(-1)
        return torch.where((level > -torch.inf).unsqueeze(-1), added.softmax(-1), 0), level

    def _own(self, queries: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Logit of the tile on the diagonal of each query, levels included, and whether it is visible.

        Args: queries: [B, H, rows, D] from position `start`, a multiple of tile_k.
        Returns: logit [B, H, n], visible [B or 1, H or 1, n], for the n queries before the end of the keys.
        """
        first = start // self.tile_k
        n = max(0, min(queries.shape[2], self.n_tiles * self.tile_k - start))
        n_own = -(-n // self.tile_k)
        queries, missing = queries[:, :, :n], n_own * self.tile_k - n
        queries = (F.pad(queries, (0, 0, 0, missing)) if missing else queries).unflatten(2, (n_own, self.tile_k))
        keys = self.keys[:, :, first : first + n_own]
        keys = keys if self.group == 1 else keys.repeat_interleave(self.group, dim=1)
        weight, level = (x if x.shape[2] == 1 else x[:, :, first : first + n_own] for x in (self.own_weight, self.own_level))
        logit = _weighted_sum(queries @ keys.transpose(-1, -2), weight).mul_(self.scale)
        logit = self._capped(logit).add_(level)
        level = level.expand(-1, -1, n_own, -1)
        return logit.flatten(2)[:, :, :n], (level > -torch.inf).flatten(2)[:, :, :n]

    def _capped(self, logit: Tensor) -> Tensor:
        return logit if self.softcap is None else logit.div_(self.softcap).tanh_().mul_(self.softcap)

    def mass(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Mass and visibility of the key tiles for the query tiles first..stop: [B, Hkv, stop - first, nK] each."""
        start, end = first * self.tile_q, min(stop * self.tile_q, self.n_q)
        queries = self.q[:, :, start:end].to(self.dtype).contiguous()
        n_seen = self.n_tiles
        if self.masks.causal:
            n_seen = min(n_seen, -(-end // self.tile_k))
        logit = self._logits(queries, self.means[:, :, :n_seen])
        if self.masks.general:
            sees = self._apply_general(logit, queries, start, end, n_seen)
        else:
            sees = self._apply_keys(logit, queries, start, end, n_seen)
        return self._reduce(logit, sees, stop - first)

    def _logits(self, queries: Tensor, means: Tensor) -> Tensor:
        """softcap(scale * q . mean): [B, H, rows, n]."""
        batch, n_means, n_seen = means.shape[:3]
        rows = queries.shape[2]
        if n_means != self.n_heads:
            queries = queries.reshape(batch, n_means, -1, queries.shape[3])
        return self._capped((queries @ means.transpose(-1, -2)).view(batch, self.n_heads, rows, n_seen))

    def _apply_keys(self, logit: Tensor, queries: Tensor, start: int, end: int, n_seen: int) -> Tensor:
        """Adds levels and hides what is not visible, for masks of keys and causality alone; returns what is visible."""
        logit.add_(self.level[:, :, None, :n_seen])
        visible = self.visible[:, :, None, :n_seen]
        if not self.diagonal:
            return visible
        band = start // self.tile_k  # tiles before it are seen whole by every query of the range
        tile = torch.arange(band, n_seen)
        query = torch.arange(start, end).unsqueeze(1)
        part = logit[..., band:]
        skip = start - band * self.tile_k  # queries before `start` on the first tile, where tile_q is no multiple of tile_k
        own, own_visible = self._own(F.pad(queries, (0, 0, skip, 0)) if skip else queries, band * self.tile_k)
        own, own_visible = own[:, :, skip:], own_visible[:, :, skip:]
        n_own = own.shape[2]
        on_diagonal = query[:n_own] // self.tile_k == tile
        if n_own > 0:
            at = (query[:n_own] // self.tile_k - band).expand(*own.shape, 1)
            part[:, :, :n_own].scatter_(-1, at, own.unsqueeze(-1))
        hidden = tile * self.tile_k > query  # [rows, tiles of the band]
        part.masked_fill_(hidden, -torch.inf)
        if self.all_visible and bool(own_visible.all()):
            return F.pad(~hidden, (band, 0), value=True)
        sees = visible.expand(-1, -1, end - start, -1).clone()
        if n_own > 0:
            sees[:, :, :n_own, band:] = torch.where(on_diagonal, own_visible.unsqueeze(-1), sees[:, :, :n_own, band:])
        sees[..., band:] &= ~hidden
        return sees

    def _apply_general(self, logit: Tensor, queries: Tensor, start: int, end: int, n_seen: int) -> Tensor:
        """The same for masks that have to be read at every (query, key)."""
        added = self.masks.rows(start, end)[..., : min(n_seen * self.tile_k, self.n_k)]  # [B or 1, H or 1, rows, keys]
        tail = n_seen * self.tile_k - added.shape[-1]
        added = F.pad(added, (0, tail), value=-torch.inf).unflatten(3, (n_seen, self.tile_k))
        high, low = added.amax(-1), added.amin(-1)
        sees = high > -torch.inf
        level = torch.where(sees, added.logsumexp(-1), -torch.inf)
        # A tile that is neither constant nor invisible for some query of the chunk is scored key by key.
        mixed = ((high != low) & sees).flatten(0, 2).any(0).nonzero().flatten()
        if mixed.numel():
            weight = added[..., mixed, :].softmax(-1)
            weight = torch.where(sees[..., mixed].unsqueeze(-1), weight, 0)
            keys = self.keys[:, :, mixed].flatten(2, 3)  # [B, Hkv, mixed * tile_k, D]
            stacked = queries.reshape(self.batch, self.n_groups, -1, queries.shape[3])
            similarity = (stacked @ keys.transpose(-1, -2)).view(*queries.shape[:3], mixed.numel(), self.tile_k)
            logit[..., mixed] = self._capped(_weighted_sum(similarity, weight).mul_(self.scale))
        logit.add_(level).masked_fill_(~sees, -torch.inf)  # also where the mean of hidden keys is NaN
        return sees

    def _reduce(self, logit: Tensor, sees: Tensor, n_row_tiles: int) -> tuple[Tensor, Tensor]:
        """Softmax over the tiles, summed over the rows of each query tile and the heads of the group."""
        batch, n_heads, rows, n_seen = logit.shape
        share = logit.softmax(-1)
        whole = rows == n_row_tiles * self.tile_q
        sees = sees.view((1,) * (4 - sees.dim()) + tuple(sees.shape)).expand(-1, -1, rows, -1)
        nothing = ~sees.any(-1, keepdim=True)
        if bool(nothing.any()):
            share.masked_fill_(nothing, 0)  # a row that sees nothing has a NaN softmax

        def by_tile(x: Tensor) -> Tensor:  # [., ., rows, n] -> [., ., nQ, tile_q, n]
            x = x if whole else F.pad(x, (0, 0, 0, n_row_tiles * self.tile_q - rows))
            return x.unflatten(2, (n_row_tiles, self.tile_q))

        mass = by_tile(share).sum(3)
        if self.group > 1:
            mass = mass.unflatten(1, (self.n_groups, self.group)).sum(2)
        visible = by_tile(sees).any(3)
        if visible.shape[1] > 1 and self.group > 1:
            visible = visible.unflatten(1, (self.n_groups, self.group)).any(2)
        visible = visible.expand(batch, self.n_groups, -1, -1)
        beyond = (0, self.n_tiles - n_seen)
        return (F.pad(mass, beyond), F.pad(visible, beyond)) if beyond[1] else (mass, visible)


def _weighted_sum(values: Tensor, weight: Tensor) -> Tensor:
    """Sum of values * weight along the last dimension, in the memory of values; one that weighs nothing may be anything."""
    total = values.mul_(weight).sum(-1)
    return values.masked_fill_(weight == 0, 0).sum(-1) if bool(total.isnan().any()) else total


def _blocks(batch: int, n_groups: int, group: int) -> list[tuple[slice, slice, slice]]:
    """Batch rows, key heads and query heads of parts that may run side by side: nothing is shared between heads."""
    if batch >= cpu_threads.width():
        cuts = [(cut, (0, n_groups)) for cut in cpu_threads.ranges(batch, cpu_threads.width())]
    else:
        cuts = [((0, batch), cut) for cut in cpu_threads.ranges(n_groups, cpu_threads.width())]
    return [(slice(*rows), slice(*keys), slice(keys[0] * group, keys[1] * group)) for rows, keys in cuts]


def _largest(x: Tensor, keep: int) -> Tensor:
    """The `keep` largest of each row [..., n], ties to the lower index, as bool; never what is -inf. A partial sort does it."""
    if keep == x.shape[-1]:
        return x > -torch.inf
    threshold = x.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = x > threshold
    level = (x == threshold) & (threshold > -torch.inf)
    return above | (level & (level.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))


def _lists(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Indices of what is kept [..., n], ascending, -1 behind them: [..., width] int32; and how many, [...] int32."""
    index = torch.full((*kept.shape[:-1], width), -1, dtype=torch.int32)
    where = kept.nonzero(as_tuple=True)
    slot = kept.cumsum(-1)[where] - 1
    index[(*where[:-1], slot)] = where[-1].int()
    return index, kept.sum(-1).int()


def _choose_fast(mass: Tensor, visible: Tensor, preferred: Tensor, wanted: int, width: int) -> tuple[Tensor, Tensor]:
    """`choose_tiles` where no row has more preferred tiles than it keeps: a partial sort in place of a full one."""
    mass = torch.nan_to_num(mass, nan=-1.0).clamp_(min=-1.0)
    mass.masked_fill_(preferred, torch.inf).masked_fill_(~visible, -torch.inf)
    return _lists(_largest(mass, min(wanted, width, mass.shape[-1])), width)


@register("select_tiles_v1", "cpu", "cpu")
def select_tiles(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    expr: str,
    expr_in: list[Tensor],
    codebook: Tensor | None,
    key_mean: Tensor | None,
    budget: Tensor,
    max_density: float,
    tile_q: int,
    tile_k: int,
    scale: float,
    softcap: float | None,
    rule: str,
    min_keys: int,
) -> tuple[Tensor, Tensor]:
    """`spt::select_tiles_v1`; see there."""
    check_selection(q, k, bias, codebook, key_mean, budget)
    chosen = check_rule(rule, "tile", codebook)
    batch, n_heads, n_q, _ = q.shape
    n_groups, n_k = k.shape[1:3]
    width = max_tiles(n_k, max_density, tile_q, tile_k)
    rows = (batch, n_groups, -(-n_q // tile_q))
    everything = everything_by_data(budget, n_k, min_keys)
    if bool(everything):
        return stored(torch.full((*rows, width), -1, dtype=torch.int32), torch.full(rows, -1, dtype=torch.int32), tiles=True)
    if batch * n_q * n_k == 0:
        return stored(torch.full((*rows, width), -1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32), tiles=True)
    dtype = compute_dtype(q, k)
    wanted = wanted_count(budget, max_density, n_k, tile_k)
    near = near_tiles(wanted, tile_q, tile_k)
    masks = split(bias, expr, expr_in, (batch, n_heads, n_q, n_k), dtype)
    tiles = torch.empty(*rows, width, dtype=torch.int32)
    counts = torch.empty(rows, dtype=torch.int32)

    def part(at: slice, key_heads: slice, heads: slice) -> None:
        words, mean = (None if x is None else x[key_heads] for x in (codebook, key_mean))
        keys = chosen.tile_keys(k[at, key_heads].to(dtype), words, mean).to(dtype)
        scorer = _Scorer(q[at, heads], keys, masks.part(at, heads), tile_q, tile_k, scale, softcap)
        per_tile = tile_q * (n_k if masks.general else scorer.n_tiles) * scorer.batch * scorer.n_heads
        step = max(1, _PANEL // max(1, per_tile))
        found = [scorer.mass(first, min(first + step, rows[2])) for first in range(0, rows[2], step)]
        mass, visible = (torch.cat(x, dim=2) for x in zip(*found, strict=True))
        preferred = preferred_mask(visible, expr, n_q, n_k, tile_q, tile_k, near)
        if int(wanted) >= min(forced_tiles(tile_q, tile_k), scorer.n_tiles):
            tiles[at, key_heads], counts[at, key_heads] = _choose_fast(mass, visible, preferred, int(wanted), width)
        else:
            tiles[at, key_heads], counts[at, key_heads] = choose_tiles(mass, visible, preferred, wanted, width, everything)

    cpu_threads.run([functools.partial(part, *block) for block in _blocks(batch, n_groups, n_heads // n_groups)])
    return stored(tiles, counts, tiles=True)


def _choose_keys_fast(
    scores: Tensor, allowed: Tensor, nearest: Tensor | None, wanted: int, width: int
) -> tuple[Tensor, Tensor]:
    """`choose_keys` by the smallest score that is kept, in place of three sorts; scores [B, H, rows, Tk] are overwritten.

    With `nearest`, scores are small whole numbers: together with the distance they order all keys without a tie.
    """
    n_k = scores.shape[-1]
    if nearest is not None:
        offset = torch.arange(n_k) - nearest.unsqueeze(-1)
        scores.mul_(2 * n_k + 2).sub_(2 * offset.abs() - (offset < 0).long())  # at equal distance the lower index comes first
    scores.nan_to_num_(nan=torch.finfo(scores.dtype).min).masked_fill_(~allowed, -torch.inf)
    return _lists(_largest(scores, min(wanted, width, n_k)), width)


@register("select_keys_v1", "cpu", "cpu")
def select_keys(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    expr: str,
    expr_in: list[Tensor],
    codebook: Tensor | None,
    key_mean: Tensor | None,
    budget: Tensor,
    max_density: float,
    scale: float,
    softcap: float | None,
    rule: str,
    min_keys: int,
) -> tuple[Tensor, Tensor]:
    """`spt::select_keys_v1`; see there. Queries in chunks, each against all keys."""
    check_selection(q, k, bias, codebook, key_mean, budget)
    chosen = check_rule(rule, "token", codebook)
    batch, n_heads, n_q, _ = q.shape
    n_groups, n_k = k.shape[1:3]
    width = max_keys(n_k, max_density)
    everything = everything_by_data(budget, n_k, min_keys)
    if bool(everything) or batch * n_q * n_k == 0:
        fill = -1 if bool(everything) else 0
        keys = torch.full((batch, n_heads, n_q, width), -1, dtype=torch.int32)
        return stored(keys, torch.full((batch, n_heads, n_q), fill, dtype=torch.int32), tiles=False)
    dtype = compute_dtype(q, k)
    masks = split(bias, expr, expr_in, (batch, n_heads, n_q, n_k), dtype)
    wanted = wanted_count(budget, max_density, n_k, 1)
    keys = torch.empty(batch, n_heads, n_q, width, dtype=torch.int32)
    counts = torch.empty(batch, n_heads, n_q, dtype=torch.int32)
    # Equal codes, counted, with the distance in the fractions: exact in fp32 up to 2^24.
    plain = masks.key is None and not masks.general
    counted = chosen.nearest and plain and codebook is not None and (codebook.shape[1] + 1) * (2 * n_k + 2) < 1 << 24

    def part(at: slice, key_heads: slice, heads: slice) -> None:
        words, mean = (None if x is None else x[key_heads] for x in (codebook, key_mean))
        some_masks = masks.part(at, heads)
        left, right = q[at, heads], k[at, key_heads].to(dtype)
        if chosen.nearest:  # equal codes are counted by one GEMM of one-hot vectors
            codes = pq_match.codes(left.to(dtype), right, words, mean)
            left, right = (F.one_hot(x, words.shape[2]).flatten(-2).to(dtype) for x in codes)
        else:
            right = pq.tile_keys(right, words, mean).to(dtype)
        n_batch, n_some = left.shape[:2]
        step = max(1, _PANEL // max(1, n_batch * n_some * n_k))
        for start in range(0, n_q, step):
            stop = min(start + step, n_q)
            rows = left[:, :, start:stop].to(dtype).reshape(n_batch, right.shape[1], -1, left.shape[3])
            scores = (rows @ right.transpose(-1, -2)).view(n_batch, n_some, stop - start, n_k)
            if not chosen.nearest:
                scores.mul_(scale)
                scores = scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)
            added = some_masks.rows(start, stop)
            allowed = (added > -torch.inf).expand(scores.shape)
            if masks.key is not None or masks.general:
                scores.add_(added.masked_fill(added == -torch.inf, 0))
            nearest = torch.arange(start, stop) + n_k - n_q if chosen.nearest else None
            if nearest is None or counted:
                lists = _choose_keys_fast(scores, allowed, nearest, int(wanted), width)
            else:
                lists = choose_keys(scores, allowed, nearest, wanted, width, everything)
            keys[at, heads, start:stop], counts[at, heads, start:stop] = lists

    cpu_threads.run([functools.partial(part, *block) for block in _blocks(batch, n_groups, n_heads // n_groups)])
    return stored(keys, counts, tiles=False)
