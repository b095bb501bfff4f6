"""The work of tile attention on the CPU: which items there are, in which order, where their rows lie, what masks add.

An item is one query tile of one key head of one batch row, with the query heads of the group stacked as its rows. A segment is
a run of key heads of one batch row: what is packed together, small enough to stay in the cache. A chunk is some items of a
segment with equally long lists, which are computed together. Items do not influence each other, whatever the segments and
chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_compiler.lowering import cpu_threads
from spt_compiler.lowering.cpu_masks import Masks, base2
from spt_compiler.ops.reference import attention_dropout

# Scores of a chunk (elements), and rows, keys and gradients of a segment: with these a chunk works in the cache of its core.
PANEL = 1 << 17
SCRATCH = 1 << 22


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    batch: int
    n_heads: int
    n_groups: int
    n_q: int
    n_k: int
    dim: int
    dim_v: int
    tile_q: int
    tile_k: int

    @property
    def group(self) -> int:
        return self.n_heads // self.n_groups

    @property
    def rows(self) -> int:
        """Rows of an item."""
        return self.group * self.tile_q

    @property
    def n_row_tiles(self) -> int:
        return -(-self.n_q // self.tile_q)

    @property
    def n_key_tiles(self) -> int:
        return -(-self.n_k // self.tile_k)


def shape_of(q: Tensor, k: Tensor, v: Tensor, tile_q: int, tile_k: int) -> Shape:
    """Sizes of a call with q [B, H, Tq, D], k [B, Hkv, Tk, D] and v [B, Hkv, Tk, Dv]."""
    batch, n_heads, n_q, dim = q.shape
    return Shape(batch, n_heads, k.shape[1], n_q, k.shape[2], dim, v.shape[3], tile_q, tile_k)


@dataclass(frozen=True)
class Segment:
    """Key heads first..stop of batch row b."""

    b: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    def heads(self, shape: Shape) -> slice:
        """Its query heads."""
        return slice(self.first * shape.group, self.stop * shape.group)


def partition(shape: Shape, bias_grad: Tensor | None = None) -> list[list[Segment]]:
    """All segments of a call, in parts that may run side by side.

    Args: bias_grad: gradient that several heads or batch rows may add to; those that share a slice of it go in one part.
    """
    pair = shape.n_key_tiles * shape.tile_k * (shape.dim + shape.dim_v) + shape.n_row_tiles * shape.rows * (
        shape.dim + shape.dim_v
    )
    most = max(1, SCRATCH // max(1, 2 * pair))

    def cut(b: int, first: int, stop: int) -> Iterator[Segment]:
        for a, z in cpu_threads.ranges(stop - first, -(-(stop - first) // most)):
            yield Segment(b, first + a, first + z)

    batch, groups, width = shape.batch, shape.n_groups, cpu_threads.width()
    if bias_grad is None:
        parts = []
        for first, stop in cpu_threads.ranges(batch * groups, width):
            rows = range(first // groups, (stop - 1) // groups + 1)
            parts.append([s for b in rows for s in cut(b, max(first - b * groups, 0), min(stop - b * groups, groups))])
        return parts
    if bias_grad.shape[1] > 1:
        return [[s for b in range(batch) for s in cut(b, *heads)] for heads in cpu_threads.ranges(groups, width)]
    ranges = cpu_threads.ranges(batch, width if bias_grad.shape[0] > 1 else 1)
    return [[s for b in range(*rows) for s in cut(b, 0, groups)] for rows in ranges]


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def copy(target: Tensor, source: Tensor, factor: float = 1.0) -> None:
    """target = source * factor, in the dtype of target."""
    if factor == 1.0:
        target.copy_(source)
    elif source.dtype == target.dtype:
        torch.mul(source, factor, out=target)
    else:
        target.copy_(source.to(torch.promote_types(source.dtype, target.dtype)) * factor)


def _as_items(packed: Tensor, shape: Shape) -> Tensor:
    """[items, rows, D] -> [heads of the segment, nQ, group, tile_q, D]."""
    return packed.view(-1, shape.n_row_tiles, shape.group, shape.tile_q, packed.shape[-1])


def pack_rows(packed: Tensor, x: Tensor, shape: Shape, factor: float = 1.0, beyond: float = 0.0) -> None:
    """Rows of x [heads * group, Tq, D] as items [heads * nQ, rows, D], times `factor`; `beyond` after Tq."""
    tile, whole = shape.tile_q, shape.n_q // shape.tile_q
    items, source = _as_items(packed, shape), x.unflatten(0, (-1, shape.group))
    if whole:
        copy(items[:, :whole], source[:, :, : whole * tile].unflatten(2, (whole, tile)).transpose(1, 2), factor)
    if whole < shape.n_row_tiles:
        rest = shape.n_q - whole * tile
        copy(items[:, whole, :, :rest], source[:, :, whole * tile :], factor)
        items[:, whole, :, rest:].fill_(beyond)


def unpack_rows(x: Tensor, packed: Tensor, shape: Shape, factor: float = 1.0) -> None:
    """Inverse of `pack_rows`: sets x from the items."""
    tile, whole = shape.tile_q, shape.n_q // shape.tile_q
    items, target = _as_items(packed, shape), x.unflatten(0, (-1, shape.group))
    if whole:
        copy(target[:, :, : whole * tile].unflatten(2, (whole, tile)).transpose(1, 2), items[:, :whole], factor)
    if whole < shape.n_row_tiles:
        copy(target[:, :, whole * tile :], items[:, whole, :, : shape.n_q - whole * tile], factor)


def pack_keys(packed: Tensor, k: Tensor, v: Tensor, shape: Shape) -> None:
    """Keys and values [heads, Tk, .] side by side as tiles [heads * nK, tile_k * (D + Dv)], zero beyond Tk."""
    both = packed.view(k.shape[0], -1, shape.dim + shape.dim_v)
    both[:, : shape.n_k, : shape.dim].copy_(k)
    both[:, : shape.n_k, shape.dim :].copy_(v)
    both[:, shape.n_k :].zero_()


# ---------------------------------------------------------------------------------------------------------------------
# Chunks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Items of a segment that are computed together.

    Args:
        segment: where they belong.  items: their places among the items of the segment: a slice if they follow each other,
            else int64 ids.  numbers: the same as a list.
        tiles: [N, M] int32 listed key tiles, ascending.  source: [N * M] int64 rows of the segment's packed keys.
        hidden: how many of the last slots a causal mask hides in part.  diagonal: these slots are exactly the tiles of the
            item's own positions.
    """

    segment: Segment
    items: Tensor | slice
    numbers: list[int]
    tiles: Tensor
    source: Tensor
    hidden: int
    diagonal: bool

    @property
    def size(self) -> tuple[int, int]:
        """(N, M)."""
        return self.tiles.shape[0], self.tiles.shape[1]


@dataclass
class Buffers:
    """Scratch memory of one thread, reused from chunk to chunk, and views of it by name and shape."""

    dtype: torch.dtype
    storage: dict[str, Tensor] = field(default_factory=dict)
    views: dict[tuple, Tensor] = field(default_factory=dict)

    def get(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory of that shape; the same memory for the same name."""
        found = self.views.get((name, shape))
        if found is not None:
            return found
        size = math.prod(shape)
        held = self.storage.get(name)
        if held is None or held.numel() < size:
            held = self.storage[name] = torch.empty(size, dtype=self.dtype)
            self.views.clear()
        view = self.views[name, shape] = held[:size].view(shape)
        return view


class Work:
    """Lists and masks of one call."""

    def __init__(self, shape: Shape, tiles: Tensor, counts: Tensor, masks: Masks):
        """Args: tiles: [B, Hkv, nQ, k_max] int32.  counts: [B, Hkv, nQ] int32, -1 for all tiles."""
        self.shape, self.masks = shape, masks
        self.tiles, self.counts = tiles, counts
        self.offsets = torch.arange(shape.tile_k, dtype=torch.int32)
        tail = shape.n_key_tiles * shape.tile_k - shape.n_k
        self.key = self.key_flags = None
        # Keys beyond Tk are zero in the packed tensor; they need a mask unless a causal one hides them anyway.
        if masks.key is not None or (tail and not (masks.causal and shape.n_q <= shape.n_k)):
            key = torch.zeros(1, 1, shape.n_k, dtype=masks.dtype) if masks.key is None else base2(masks.key)
            key = F.pad(key, (0, tail), value=-torch.inf).unflatten(2, (shape.n_key_tiles, shape.tile_k))
            self.key, self.key_flags = key, (key != 0).any(-1)
        self.causal_tile = self.causal_tile_t = None
        if masks.causal and shape.tile_q % shape.tile_k == 0:
            position = torch.arange(shape.tile_q)
            later = position > position.unsqueeze(1)
            self.causal_tile = torch.zeros(shape.tile_q, shape.tile_q, dtype=masks.dtype).masked_fill_(later, -torch.inf)
            self.causal_tile_t = self.causal_tile.t().contiguous().t()  # the same, laid out for transposed scores
        self.neutral = self._neutral_blocks()
        # Rows always have a key where the mask is causal alone and the diagonal is listed.
        self.only_causal = self.key is None and not masks.general

    def _neutral_blocks(self) -> Tensor | None:
        """[B or 1, H or 1, nQ, nK] bool: blocks in which bias changes nothing. None without a bias, or with `rest`."""
        masks, shape = self.masks, self.shape
        if masks.bias is None or masks.rest is not None:
            return None
        same = []
        per_tile = masks.bias.shape[0] * masks.bias.shape[1] * shape.tile_q * shape.n_k
        step = shape.tile_q * max(1, (1 << 20) // max(1, per_tile))
        for start in range(0, shape.n_q, step):
            part = masks.bias[:, :, start : start + step].expand(-1, -1, -1, shape.n_k)
            part = part if part.dtype == torch.bool else part == 0
            pad_q, pad_k = -part.shape[2] % shape.tile_q, -shape.n_k % shape.tile_k
            part = F.pad(part, (0, pad_k, 0, pad_q), value=True)
            same.append(part.unflatten(3, (-1, shape.tile_k)).all(-1).unflatten(2, (-1, shape.tile_q)).all(3))
        return torch.cat(same, dim=2)

    def chunks(self, segment: Segment) -> list[Chunk]:
        """The items of a segment that have a list, in a fixed order."""
        shape = self.shape
        tiles = self.tiles[segment.b, segment.first : segment.stop].flatten(0, 1)
        counts = self.counts[segment.b, segment.first : segment.stop].flatten()
        numbers = torch.arange(counts.numel())
        first = numbers % shape.n_row_tiles * shape.tile_q  # position of the first query
        if bool((counts < 0).any()):
            full = torch.full_like(counts, shape.n_key_tiles)
            if self.masks.causal:
                full = torch.minimum(full, ((first + shape.tile_q + shape.tile_k - 1) // shape.tile_k).int())
            everything = counts < 0
            counts = torch.where(everything, full, counts)
            tiles = F.pad(tiles, (0, max(0, int(counts.max()) - tiles.shape[1])))
            all_tiles = torch.arange(tiles.shape[1], dtype=torch.int32)
            tiles = torch.where(everything.unsqueeze(1), all_tiles, tiles)
        source = tiles + (numbers // shape.n_row_tiles * shape.n_key_tiles).unsqueeze(1)
        hidden, diagonal = self._hidden(tiles, counts, first)
        by_length: dict[int, list[int]] = {}
        for number, length in enumerate(counts.tolist()):
            if length > 0:
                by_length.setdefault(length, []).append(number)
        chunks = []
        for length, group in sorted(by_length.items()):
            step = max(1, PANEL // (shape.rows * length * shape.tile_k))
            follow = group[-1] - group[0] == len(group) - 1
            at = slice(group[0], group[-1] + 1) if follow else torch.tensor(group)
            group_tiles, group_source = tiles[at, :length], source[at, :length].reshape(-1)
            cuts = range(0, len(group), step)
            parts = zip(cuts, group_tiles.split(step), group_source.split(step * length), strict=True)
            for a, part_tiles, part_source in parts:
                some = group[a : a + step]
                follow = some[-1] - some[0] == len(some) - 1
                items = slice(some[0], some[-1] + 1) if follow else torch.tensor(some)
                n_hidden = max(hidden[i] for i in some) if hidden else 0
                own = all(diagonal[i] for i in some) if diagonal else False
                chunks.append(Chunk(segment, items, some, part_tiles, part_source, n_hidden, own))
        return chunks

    def _hidden(self, tiles: Tensor, counts: Tensor, first: Tensor) -> tuple[list[int], list[bool]]:
        """Per item, how many of its last tiles a causal mask hides in part, and whether these are the diagonal."""
        if not self.masks.causal:
            return [], []
        shape = self.shape
        used = torch.arange(tiles.shape[1]) < counts.unsqueeze(1)
        hidden = ((tiles * shape.tile_k + (shape.tile_k - 1) > first.unsqueeze(1)) & used).sum(1)
        # Lists ascend: as many hidden tiles as the diagonal has, the last of them its last, are those of the diagonal.
        n_own = shape.tile_q // shape.tile_k
        last = tiles.gather(1, (counts.long() - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        diagonal = (last == first // shape.tile_k + (n_own - 1)) & (hidden == n_own) & (counts > 0)
        return hidden.tolist(), diagonal.tolist()

    # -----------------------------------------------------------------------------------------------------------------
    # Masks
    # -----------------------------------------------------------------------------------------------------------------

    def _places(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Per item: key head, query tile; int64 [N]."""
        numbers = torch.tensor(chunk.numbers)
        return numbers // self.shape.n_row_tiles + chunk.segment.first, numbers % self.shape.n_row_tiles

    def indices(self, chunk: Chunk, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index tensors b, h, q, k of the slots start..stop, shaped to broadcast to [N, group, tile_q, keys].

        Positions beyond Tq and Tk are moved to the last one.
        """
        shape = self.shape
        g, i = self._places(chunk)
        b = torch.full((1, 1, 1, 1), chunk.segment.b)
        h = (g.unsqueeze(1) * shape.group + torch.arange(shape.group)).view(-1, shape.group, 1, 1)
        q = (i * shape.tile_q).unsqueeze(1) + torch.arange(shape.tile_q)
        q = q.clamp(max=shape.n_q - 1).view(-1, 1, shape.tile_q, 1)
        k = (chunk.tiles[:, start:stop, None] * shape.tile_k + self.offsets).long()
        return b, h, q, k.clamp(max=shape.n_k - 1).view(k.shape[0], 1, 1, -1)

    def add_masks(self, scores: Tensor, chunk: Chunk) -> None:
        """Adds everything masks add (in units of log 2) to scores [N, rows, M * tile_k], in place."""
        if chunk.hidden:
            self._add_causal(scores, chunk)
        if self.key is not None:
            self._add_key(scores, chunk)
        if self.masks.general:
            shape = self.shape
            by_head = scores.unflatten(1, (shape.group, shape.tile_q))
            runs = [(0, chunk.size[1])] if self.neutral is None else _runs(~self._neutral_slots(chunk))
            for first, last in runs:
                values = self.masks.at(*self.indices(chunk, first, last))
                by_head[..., first * shape.tile_k : last * shape.tile_k].add_(base2(values))

    def _add_causal(self, scores: Tensor, chunk: Chunk) -> None:
        shape = self.shape
        part = scores[:, :, -chunk.hidden * shape.tile_k :]
        if shape.group > 1:
            part = part.unflatten(1, (shape.group, shape.tile_q))
        if self.causal_tile is not None and chunk.diagonal:  # the usual case
            part.add_(self.causal_tile if scores.stride(2) == 1 else self.causal_tile_t)
            return
        part = part if shape.group > 1 else part.unsqueeze(1)
        tiles = chunk.tiles[:, -chunk.hidden :]
        k = (tiles.unsqueeze(2) * shape.tile_k + self.offsets).view(tiles.shape[0], 1, 1, -1)
        start = (self._places(chunk)[1] * shape.tile_q).unsqueeze(1)
        q = (start + torch.arange(shape.tile_q)).int().view(-1, 1, shape.tile_q, 1)
        part.masked_fill_(k > q, -torch.inf)

    def _add_key(self, scores: Tensor, chunk: Chunk) -> None:
        shape, n_items = self.shape, chunk.size[0]
        g, _ = self._places(chunk)
        b = chunk.segment.b if self.key.shape[0] > 1 else 0
        tiles = chunk.tiles.long()
        if self.key.shape[1] == 1 or shape.group == 1:
            h = g.unsqueeze(1) if self.key.shape[1] > 1 else 0
            for first, last in _runs(self.key_flags[b, h, tiles]):
                values = self.key[b, h, tiles[:, first:last]].view(n_items, 1, -1)
                scores[:, :, first * shape.tile_k : last * shape.tile_k].add_(values)
        else:
            heads = (g.unsqueeze(1) * shape.group + torch.arange(shape.group)).unsqueeze(2)
            values = self.key[b, heads, tiles.unsqueeze(1)]  # [N, group, M, tile_k]
            scores.unflatten(1, (shape.group, shape.tile_q)).add_(values.view(n_items, shape.group, 1, -1))

    def _neutral_slots(self, chunk: Chunk) -> Tensor:
        """[N, M] bool: the slots in whose block bias changes nothing, for all heads of the group."""
        shape = self.shape
        g, i = self._places(chunk)
        b = chunk.segment.b if self.neutral.shape[0] > 1 else 0
        heads = (g.unsqueeze(1) * shape.group + torch.arange(shape.group)).unsqueeze(2) if self.neutral.shape[1] > 1 else 0
        found = self.neutral[b, heads, i.view(-1, 1, 1), chunk.tiles.long().unsqueeze(1)]  # [N, group or 1, M]
        return found.all(1)

    def dropout(self, chunk: Chunk, seed: Tensor, p: float) -> Tensor:
        """[N, rows, keys] of 0 and 1 / (1 - p)."""
        shape = self.shape
        b, h, q, k = self.indices(chunk, 0, chunk.size[1])
        keep = attention_dropout(seed, p, b, h, q, k, (shape.n_heads, shape.n_q, shape.n_k))
        return keep.view(chunk.size[0], shape.rows, -1).to(self.masks.dtype).mul_(1 / (1 - p) if p < 1 else 0.0)

    def add_bias_grad(self, bias_grad: Tensor, grad: Tensor, chunk: Chunk) -> None:
        """Adds the gradients of a chunk's logits [N, rows, keys] to those of the bias, item by item (each key occurs once)."""
        shape = self.shape
        grad = grad.unflatten(1, (shape.group, shape.tile_q))
        keys = (chunk.tiles.unsqueeze(2) * shape.tile_k + self.offsets).view(chunk.size[0], -1)
        beyond = bool((keys >= shape.n_k).any())
        for n, number in enumerate(chunk.numbers):
            g, i = divmod(number, shape.n_row_tiles)
            g += chunk.segment.first
            part = grad[n, :, : min(shape.tile_q, shape.n_q - i * shape.tile_q)]
            at = keys[n]
            if beyond:
                inside = at < shape.n_k
                part, at = part[..., inside], at[inside]
            if bias_grad.shape[2] == 1:
                part = part.sum(1, keepdim=True)
            if bias_grad.shape[1] == 1:
                part = part.sum(0, keepdim=True)
            h = slice(0, 1) if bias_grad.shape[1] == 1 else slice(g * shape.group, (g + 1) * shape.group)
            q = slice(0, 1) if bias_grad.shape[2] == 1 else slice(i * shape.tile_q, i * shape.tile_q + part.shape[1])
            target = bias_grad[chunk.segment.b if bias_grad.shape[0] > 1 else 0, h, q]
            if bias_grad.shape[3] == 1:
                target.add_(part.sum(-1, keepdim=True))
            else:
                target.index_add_(2, at, part)


def _runs(flags: Tensor) -> list[tuple[int, int]]:
    """Ranges of slots that are flagged for some item: flags [N, M] bool."""
    runs: list[tuple[int, int]] = []
    for slot, flagged in enumerate(flags.any(0).tolist()):
        if flagged and runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        elif flagged:
            runs.append((slot, slot + 1))
    return runs
