"""What the attention ops mean: slow, dense, readable. Every lowering is tested against this file.

All arithmetic is in fp32, or fp64 where an input is fp64; results have the dtype of q. Shapes: B batch, H query heads, Hkv key
heads, Hs = Hkv heads of a selection (shared by the H / Hkv query heads of a group), Tq and Tk lengths, D and Dv head dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.ops.observe import asked
from spt_compiler.ops.selection import RULES
from spt_compiler.ops.selection.common import (
    MILLION,
    Rule,
    budget_millionths,
    is_causal,
    max_keys,
    max_tiles,
    near_tiles,
    stored,
)

EMPTY = ("zero", "nan", "uniform")
_U32 = 0xFFFFFFFF
MEASURED_POSITIONS = 32


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


# Multipliers of the hash: two odd 32-bit constants with low bias (C. Wellons, "Prospecting for hash functions").
_MULTIPLY = (0x7FEB352D, 0x846CA68B)


def _scramble(x: Tensor, key0: Tensor | int, key1: Tensor | int) -> Tensor:
    """The hash of `dropout_keep`, on int64 values in [0, 2^32)."""
    x = x ^ key0
    x = ((x ^ (x >> 16)) * _MULTIPLY[0]) & _U32
    return (((x ^ (x >> 15)) + key1) * _MULTIPLY[1]) & _U32


def dropout_keys(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The two 32-bit keys of `dropout_keep`, int64 [1] each; a function of the seed alone.

    With `low` and `high` the halves of the int64 seed and `hash` that of `dropout_keep`:
    key0 = hash(low) under keys (0x9E3779B9, high), key1 = hash(high) under keys (0x7F4A7C15, key0).
    """
    low, high = seed & _U32, (seed >> 32) & _U32
    key0 = _scramble(low, 0x9E3779B9, high)
    return key0, _scramble(high, 0x7F4A7C15, key0)


def dropout_keep(seed: Tensor, index: Tensor, p: float) -> Tensor:
    """Which elements dropout keeps: a pure function of (seed, index), the same in forward, backward and on every device.

    All in uint32 (mod 2^32), with the keys of `dropout_keys`:

        x = index ^ key0
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = ((x ^ (x >> 15)) + key1) * 0x846CA68B
        kept = x >= floor(p * 2^32)

    Args: seed: int64 [1].  index: int64, any shape, taken mod 2^32.  p: probability of being dropped, in [0, 1]; 1 drops all.
    Returns: bool, shape of index.
    """
    if p >= 1:
        return torch.zeros_like(index, dtype=torch.bool)
    return _scramble(index & _U32, *dropout_keys(seed.to(index.device))) >= int(p * 2**32)


def attention_dropout(seed: Tensor, p: float, b: Tensor, h: Tensor, q: Tensor, k: Tensor, n: tuple[int, int, int]) -> Tensor:
    """`dropout_keep` of attention probabilities, with index ((b * H + h) * Tq + q) * Tk + k.

    Args: b, h, q, k: int64, broadcasting against each other.  n: (H, Tq, Tk).
    """
    return dropout_keep(seed, ((b * n[0] + h) * n[1] + q) * n[2] + k, p)


# ---------------------------------------------------------------------------------------------------------------------
# Masks and logits
# ---------------------------------------------------------------------------------------------------------------------


def axes(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index tensors b, h, q, k (int64) of shape [B, H, Tq, Tk], shaped to broadcast to it."""
    b, h, q, k = (
        torch.arange(n, device=device).view([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(shape)
    )
    return b, h, q, k


def mask_at(expr: str, expr_in: list[Tensor], b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
    """The value of a mask expression at given positions; bool or float, broadcastable like b, h, q, k; None for ""."""
    if not expr:
        return None
    env = {"b": b, "h": h, "q": q, "k": k} | {f"t{i}": t for i, t in enumerate(expr_in)}
    value = expression.evaluate(expression.parse(expr), env).to(q.device)
    if value.dtype != torch.bool and not value.is_floating_point():
        value = value.float()  # an integer mask is added to the logits
    return value


def split_mask(mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A mask as (what it adds, what it allows): a bool mask only allows, a float mask adds and forbids where it is -inf."""
    if mask is None:
        return None, None
    if mask.dtype == torch.bool:
        return None, mask
    mask = mask.to(dtype)
    return mask, mask != -torch.inf


def combine_masks(masks: list[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Masks in force together: (sum of what they add, conjunction of what they allow), each None where there is nothing."""
    added = allowed = None
    for add, allow in (split_mask(mask, dtype) for mask in masks):
        if add is not None:
            added = add if added is None else added + add
        if allow is not None:
            allowed = allow if allowed is None else allowed & allow
    if added is not None:
        # Two finite masks can add up to -inf; such a key is as good as forbidden.
        allowed = allowed & (added != -torch.inf)
    return added, allowed


def _masks(
    q: Tensor, k: Tensor, bias: Tensor | None, expr: str, expr_in: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """(added or None, allowed), allowed of shape [B, H, Tq, Tk]."""
    shape = (*q.shape[:3], k.shape[2])
    added, allowed = combine_masks([bias, mask_at(expr, expr_in, *axes(shape, q.device))], dtype)
    if allowed is None:
        allowed = torch.ones((), dtype=torch.bool, device=q.device)
    return added, allowed.expand(shape)


def _heads(x: Tensor, n_heads: int) -> Tensor:
    """Repeats the key heads of [B, Hkv, ...] for the query heads of their group."""
    return x.repeat_interleave(n_heads // x.shape[1], dim=1)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * (scores / softcap).tanh()


# ---------------------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------------------


def check_rule(name: str, granularity: str, codebook: Tensor | None) -> Rule:
    """The rule of that name. Raises: ValueError if unknown, of the other granularity, or without the codebook it needs."""
    rule = RULES.get(name)
    usable = [r.name for r in RULES.values() if (r.tile_keys if granularity == "tile" else r.key_scores) is not None]
    if rule is None or name not in usable:
        raise ValueError(f"expected a selection rule for granularity {granularity!r} ({', '.join(usable)}), got {name!r}")
    if rule.needs_codebook and codebook is None:
        raise ValueError(f"selection rule {name!r} expected a codebook, got None; pass one or use rule 'mean'")
    return rule


def _ascending(kept: Tensor, width: int, counts: Tensor) -> Tensor:
    """Boolean choices [..., n] as ascending index lists [..., width] int32, -1 where unused."""
    n = kept.shape[-1]
    index = torch.where(kept, torch.arange(n, device=kept.device), n)
    index = index.sort(-1).values[..., :width]
    used = torch.arange(width, device=kept.device) < counts.unsqueeze(-1)
    return torch.where(used, index, -1).int()


def choose_tiles(
    mass: Tensor, visible: Tensor, preferred: Tensor, wanted: Tensor, width: int, everything: Tensor
) -> tuple[Tensor, Tensor]:
    """Index lists from the attention mass of tiles.

    Args:
        mass: [..., nK] float.  visible, preferred: [..., nK] bool.  wanted: int64 [1], tiles to keep.
        width: slots of a list.  everything: bool [1], all tiles by data (count -1).
    Returns: tiles [..., width] int32 ascending, -1 where unused; counts [...] int32. Preferred visible tiles first, then the
        visible ones of largest mass, ties (and NaN, which counts as least) to the lower index.
    """
    preferred = preferred & visible
    mass = torch.nan_to_num(mass, nan=-1.0).clamp(min=-1.0)
    mass = torch.where(visible, torch.where(preferred, torch.inf, mass), -torch.inf)
    rank = mass.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    keep = torch.maximum(wanted, preferred.sum(-1)).clamp(max=width)
    kept = visible & (rank < keep.unsqueeze(-1))
    counts = kept.sum(-1)
    tiles = _ascending(kept, width, counts)
    return torch.where(everything, -1, tiles), torch.where(everything, -1, counts).int()


def wanted_count(budget: Tensor, max_density: float, n_k: int, unit: int) -> Tensor:
    """ceil(min(budget, max_density) * Tk / unit), at least 1, as int64 [1] on the device of budget."""
    per = MILLION * unit
    return ((budget_millionths(budget, max_density) * n_k + per - 1) // per).clamp(min=1)


def everything_by_data(budget: Tensor, n_k: int, min_keys: int) -> Tensor:
    """bool [1]: whether all keys are meant (budget < 0, or fewer keys than `min_keys`)."""
    return torch.ones_like(budget, dtype=torch.bool) if n_k < min_keys else budget < 0


def diagonal_tiles(n_q: int, n_k: int, tile_q: int, tile_k: int, near: Tensor) -> Tensor:
    """[nQ, nK] bool: the key tiles that hold a position of the query tile, and the `near` (int64 [1]) tiles before them."""
    device = near.device
    row = torch.arange(-(-n_q // tile_q), device=device).unsqueeze(1)
    tile = torch.arange(-(-n_k // tile_k), device=device)
    last = ((row + 1) * tile_q).clamp(max=n_q) - 1
    return (tile >= row * tile_q // tile_k - near) & (tile <= last // tile_k)


def first_visible(visible: Tensor) -> Tensor:
    """Only the first True along the last dimension."""
    return visible & (visible.cumsum(-1) == 1)


def preferred_mask(visible: Tensor, expr: str, n_q: int, n_k: int, tile_q: int, tile_k: int, near: Tensor) -> Tensor:
    """[..., nQ, nK] bool: the tiles that are kept whatever their mass.

    These are the row's first visible tile and, under a causal mask over one sequence, its own positions (the forced tiles) and
    the `near` (int64 [1]) tiles before them, see `near_tiles`.
    """
    preferred = first_visible(visible)
    if n_q == n_k and is_causal(expr):
        preferred = preferred | diagonal_tiles(n_q, n_k, tile_q, tile_k, near)
    return preferred & visible


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
    """Key tiles to keep for each query tile. See `spt::select_tiles_v1`."""
    check_selection(q, k, bias, codebook, key_mean, budget)
    chosen = check_rule(rule, "tile", codebook)
    batch, n_heads, n_q, _ = q.shape
    n_groups, n_k = k.shape[1:3]
    n_tiles = -(-n_k // tile_k)
    dtype = compute_dtype(q, k)

    keys = _heads(chosen.tile_keys(k.to(dtype), codebook, key_mean).to(dtype), n_heads)
    added, allowed = _masks(q, k, bias, expr, expr_in, dtype)
    added = torch.zeros((), dtype=dtype, device=q.device) if added is None else added
    added = torch.where(allowed, added.expand(allowed.shape), -torch.inf)

    def by_tile(x: Tensor, fill: float) -> Tensor:  # [..., Tk] -> [..., nK, tile_k]
        return torch.nn.functional.pad(x, (0, n_tiles * tile_k - n_k), value=fill).unflatten(-1, (n_tiles, tile_k))

    added = by_tile(added, -torch.inf)  # [B, H, Tq, nK, tile_k]
    level = added.logsumexp(-1)  # [B, H, Tq, nK], -inf where the tile is invisible
    sees = level > -torch.inf
    weight = torch.where(sees.unsqueeze(-1), added.softmax(-1), 0)
    similarity = by_tile(q.to(dtype) @ keys.transpose(-1, -2), 0)
    # `where`, not a product: a key that is not allowed may hold anything.
    mean_logit = torch.where(weight > 0, weight * similarity, 0).sum(-1) * scale
    logit = torch.where(sees, _capped(mean_logit, softcap) + level, -torch.inf)
    share = torch.where(sees, logit.softmax(-1), 0)  # a row that sees nothing has a NaN softmax, and contributes nothing

    def by_row(x: Tensor) -> Tensor:  # [B, H, Tq, nK] -> [B, Hs, nQ, group * tile_q, nK]
        x = torch.nn.functional.pad(x, (0, 0, 0, -n_q % tile_q)).unflatten(1, (n_groups, -1))
        return x.unflatten(3, (-1, tile_q)).movedim(2, 3).flatten(3, 4)

    mass = by_row(share).sum(3)
    visible = by_row(sees).any(3)
    wanted = wanted_count(budget, max_density, n_k, tile_k)
    tiles, counts = choose_tiles(
        mass,
        visible,
        preferred_mask(visible, expr, n_q, n_k, tile_q, tile_k, near_tiles(wanted, tile_q, tile_k)),
        wanted,
        max_tiles(n_k, max_density, tile_q, tile_k),
        everything_by_data(budget, n_k, min_keys),
    )
    return stored(tiles, counts, tiles=True)


def choose_keys(
    scores: Tensor, allowed: Tensor, nearest: Tensor | None, wanted: Tensor, width: int, everything: Tensor
) -> tuple[Tensor, Tensor]:
    """Index lists of the best allowed keys.

    Args:
        scores: [B, H, rows, Tk] float.  allowed: the same shape, bool.  nearest: [rows] int64, positions for the tie rule, or
            None (ties to the lower index).  wanted: int64 [1].  width: slots.  everything: bool [1].
    Returns: keys [B, H, rows, width] int32 ascending, -1 where unused; counts [B, H, rows] int32.
    """
    n_k = scores.shape[-1]
    scores = torch.where(allowed, torch.nan_to_num(scores, nan=torch.finfo(scores.dtype).min), -torch.inf)
    if nearest is None:
        order = scores.argsort(dim=-1, descending=True, stable=True)
    else:
        distance = (torch.arange(n_k, device=scores.device) - nearest.unsqueeze(-1)).abs()  # [rows, Tk]
        by_distance = distance.argsort(dim=-1, stable=True).expand(scores.shape)
        order = by_distance.gather(-1, scores.gather(-1, by_distance).argsort(dim=-1, descending=True, stable=True))
    rank = order.argsort(-1)
    kept = allowed & (rank < wanted.clamp(max=width))
    counts = kept.sum(-1)
    keys = _ascending(kept, width, counts)
    return torch.where(everything, -1, keys), torch.where(everything, -1, counts).int()


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
    """Keys to keep for each query. See `spt::select_keys_v1`."""
    check_selection(q, k, bias, codebook, key_mean, budget)
    chosen = check_rule(rule, "token", codebook)
    n_q, n_k = q.shape[2], k.shape[2]
    dtype = compute_dtype(q, k)
    scores = chosen.key_scores(q.to(dtype), k.to(dtype), codebook, key_mean, scale, softcap).to(dtype)
    added, allowed = _masks(q, k, bias, expr, expr_in, dtype)
    if added is not None:
        scores = scores + added
    keys, counts = choose_keys(
        scores,
        allowed,
        torch.arange(n_q, device=q.device) + n_k - n_q if chosen.nearest else None,
        wanted_count(budget, max_density, n_k, 1),
        max_keys(n_k, max_density),
        everything_by_data(budget, n_k, min_keys),
    )
    return stored(keys, counts, tiles=False)


def listed(index: Tensor, counts: Tensor, n: int) -> Tensor:
    """Index lists [..., L] with counts [...] as a mask [..., n] bool; count -1 means everything."""
    used = (torch.arange(index.shape[-1], device=index.device) < counts.unsqueeze(-1)) & (index >= 0)
    slot = torch.where(used, index, n).long()
    mask = torch.zeros(*index.shape[:-1], n + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(-1, slot, True)[..., :n] | (counts < 0).unsqueeze(-1)


def kept_by_tiles(tiles: Tensor, counts: Tensor, n_heads: int, n_q: int, n_k: int, tile_q: int, tile_k: int) -> Tensor:
    """Tile lists [B, Hs, nQ, k_max] as a mask [B, H, Tq, Tk] bool."""
    mask = listed(tiles, counts, -(-n_k // tile_k))
    mask = mask.repeat_interleave(tile_q, dim=2)[:, :, :n_q].repeat_interleave(tile_k, dim=3)[..., :n_k]
    return _heads(mask, n_heads)


# ---------------------------------------------------------------------------------------------------------------------
# Attention over a selection
# ---------------------------------------------------------------------------------------------------------------------


def tile_sizes(n_k: int, tile_k: int, device: torch.device) -> Tensor:
    """[nK] int64: how many keys each tile holds; the last one may be short."""
    first = torch.arange(0, n_k, tile_k, device=device)
    return (n_k - first).clamp(max=tile_k)


def tile_means(x: Tensor, tile_k: int) -> Tensor:
    """Means over the tiles of tokens: [B, Hkv, Tk, D] -> [B, Hkv, nK, D]."""
    sizes = tile_sizes(x.shape[2], tile_k, x.device)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % tile_k))
    return padded.unflatten(2, (-1, tile_k)).sum(3) / sizes.unsqueeze(-1).to(x.dtype)


def _by_tile(x: Tensor, tile_k: int, fill: float | bool) -> Tensor:
    """[..., Tk] -> [..., nK, tile_k]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % tile_k), value=fill).unflatten(-1, (-1, tile_k))


def _pseudo_keys(added: Tensor | None, allowed: Tensor, kept: Tensor, tile_k: int, dtype: torch.dtype):
    """What stands for the tiles that a query does not keep, of those it sees whole.

    Args: added, allowed: of `_masks`.  kept: [B, H, Tq, Tk] bool, constant within a tile.
    Returns: live [B, H, Tq, nK] bool, which pseudo-keys there are; level, log-sum-exp of what the masks add to the keys of a
        tile; weight [..., nK, tile_k], the softmax of it; both broadcastable, and 0 and uniform where nothing is added.
    """
    live = _by_tile(allowed, tile_k, True).all(-1) & ~kept[..., ::tile_k]
    added = torch.zeros(allowed.shape[-1:], dtype=dtype, device=allowed.device) if added is None else added
    added = _by_tile(added.expand(*added.shape[:-1], allowed.shape[-1]), tile_k, -torch.inf)
    return live, added.logsumexp(-1), added.softmax(-1)


def _probabilities(q, k, bias, kept, expr, expr_in, seed, p, scale, softcap, empty, tile_k):
    """Softmax over kept and allowed keys, and over pseudo-keys of the tiles dropped where `tile_k` is given.

    Returns: prob [B, H, Tq, S] before dropout, S being Tk, or Tk + nK with pseudo-keys; factor, what dropout multiplies it by
        (None: 1); lse; live, the (q, k) pairs through which gradients reach the scores; slope, d logit / d score (None: 1);
        weight, see `_pseudo_keys` (None without them).
    """
    dtype = compute_dtype(q)
    n_k = k.shape[2]
    shape = (*q.shape[:3], n_k)
    keys = k.to(dtype)
    added, allowed = _masks(q, k, bias, expr, expr_in, dtype)
    live, weight = allowed & kept, None
    b, h, row, column = axes(shape, q.device)
    if tile_k is not None and n_k > 0:
        pseudo, level, weight = _pseudo_keys(added, allowed, kept, tile_k, dtype)
        keys = torch.cat([keys, tile_means(keys, tile_k)], 2)
        zeros = torch.zeros((), dtype=dtype, device=q.device)
        added = torch.cat([(zeros if added is None else added).expand(live.shape), level.expand(pseudo.shape)], -1)
        live = torch.cat([live, pseudo], -1)
        column = torch.cat([column, column[..., ::tile_k]], -1)  # dropout counts a pseudo-key as the first key of its tile
    raw = q.to(dtype) @ _heads(keys, q.shape[1]).transpose(-1, -2) * scale
    logits = _capped(raw, softcap)
    logits = logits if added is None else logits + added
    logits = torch.where(live, logits, -torch.inf)
    lse = logits.logsumexp(-1)
    # Not exp(logits - lse): beside finfo.min, the logits of a row masked by finite values, lse has no digits left.
    prob = torch.where(live, logits.softmax(-1), 0)
    if empty != "zero":
        nothing = ~allowed.any(-1, keepdim=True) & (torch.arange(live.shape[-1], device=q.device) < n_k)
        prob = torch.where(nothing, math.nan if empty == "nan" else 1 / max(n_k, 1), prob)
    factor = None
    if p > 0 and seed is not None:
        keep = attention_dropout(seed, p, b, h, row, column, shape[1:])
        factor = keep.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)
    slope = None if softcap is None else 1 - (raw / softcap).tanh().square()
    return prob, factor, lse, live, slope, weight


def attention_output(q: Tensor, v: Tensor) -> Tensor:
    """Memory for the result [B, H, Tq, Dv] of attention, laid out as [B, Tq, H, Dv].

    That is what the output projection reads: joining the heads then copies nothing, and autograd keeps one tensor, not two.
    """
    batch, n_heads, n_q = q.shape[:3]
    return q.new_empty((batch, n_q, n_heads, v.shape[3])).transpose(1, 2)


def attend(q, k, v, bias, kept, expr, expr_in, seed, p, scale, softcap, empty, tile_k=None) -> tuple[Tensor, Tensor]:
    """Attention restricted to `kept` [B, H, Tq, Tk] bool: (out, lse). With tile_k, pseudo-keys stand for dropped tiles."""
    prob, factor, lse, *_, weight = _probabilities(
        q, k, bias, kept, expr, expr_in, seed, p, scale, softcap, empty, tile_k
    )
    prob = prob if factor is None else prob * factor
    values = v.to(prob.dtype)
    values = values if weight is None else torch.cat([values, tile_means(values, tile_k)], 2)
    out = prob @ _heads(values, q.shape[1])
    return attention_output(q, v).copy_(out), lse.contiguous()


def attend_backward(
    grad_out, q, k, v, bias, kept, expr, expr_in, seed, p, scale, softcap, empty, needs, tile_k=None
) -> list[Tensor]:
    """Gradients of `attend` with respect to q, k, v and bias; empty [0] tensors where not needed."""
    n_heads, n_groups, n_k = q.shape[1], k.shape[1], k.shape[2]
    prob, factor, _, live, slope, weight = _probabilities(
        q, k, bias, kept, expr, expr_in, seed, p, scale, softcap, empty, tile_k
    )
    dtype = prob.dtype
    keys, values = k.to(dtype), v.to(dtype)
    if weight is not None:
        keys, values = (torch.cat([x, tile_means(x, tile_k)], 2) for x in (keys, values))
    grad_out = grad_out.to(dtype)
    dropped = prob if factor is None else prob * factor

    def group_sum(x: Tensor) -> Tensor:  # [B, H, S, D] -> [B, Hkv, Tk, D]
        x = x.unflatten(1, (n_groups, n_heads // n_groups)).sum(2)
        if weight is None:
            return x
        x, pseudo = x[:, :, :n_k], x[:, :, n_k:]
        each = pseudo / tile_sizes(n_k, tile_k, x.device).unsqueeze(-1)
        return x + each.repeat_interleave(tile_k, 2)[:, :, :n_k]

    grad_v = group_sum(dropped.transpose(-1, -2) @ grad_out)
    grad_prob = grad_out @ _heads(values, n_heads).transpose(-1, -2)
    grad_prob = grad_prob if factor is None else grad_prob * factor
    delta = torch.where(live, prob * grad_prob, 0).sum(-1, keepdim=True)
    grad_logits = torch.where(live, prob * (grad_prob - delta), 0)
    grad_raw = (grad_logits if slope is None else grad_logits * slope) * scale
    grad_q = grad_raw @ _heads(keys, n_heads)
    grad_k = group_sum(grad_raw.transpose(-1, -2) @ q.to(dtype))
    grad_bias = None
    if bias is not None and bias.is_floating_point() and needs[3]:
        grad_bias = grad_logits[..., :n_k]
        if weight is not None:
            share = torch.where(live[..., n_k:, None], weight, 0) * grad_logits[..., n_k:, None]
            grad_bias = grad_bias + share.flatten(-2)[..., :n_k]
        grad_bias = grad_bias.sum_to_size(bias.shape)
    inputs = (q, k, v, bias)
    return [
        grad.to(x.dtype).contiguous() if need and grad is not None else q.new_empty(0)
        for grad, x, need in zip((grad_q, grad_k, grad_v, grad_bias), inputs, needs, strict=True)
    ]


def tile_attention(
    q, k, v, bias, tiles, counts, expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k, compensate=False
):
    """Attention over the listed key tiles. See `spt::tile_attention_v1`."""
    check_attention(q, k, v, bias, tiles, counts, seed, p, empty, tile_q, tile_k)
    kept = kept_by_tiles(tiles, counts, q.shape[1], q.shape[2], k.shape[2], tile_q, tile_k)
    pooled = tile_k if compensate else None
    return attend(q, k, v, bias, kept, expr, expr_in, seed, p, scale, softcap, empty, pooled)


def tile_attention_backward(
    grad_out,
    q,
    k,
    v,
    bias,
    out,
    lse,
    tiles,
    counts,
    expr,
    expr_in,
    seed,
    p,
    scale,
    softcap,
    empty,
    tile_q,
    tile_k,
    needs,
    compensate=False,
):
    """Gradients of `tile_attention`. See `spt::tile_attention_backward_v1`."""
    kept = kept_by_tiles(tiles, counts, q.shape[1], q.shape[2], k.shape[2], tile_q, tile_k)
    pooled = tile_k if compensate else None
    return attend_backward(grad_out, q, k, v, bias, kept, expr, expr_in, seed, p, scale, softcap, empty, needs, pooled)


def key_attention(q, k, v, bias, keys, counts, expr, expr_in, seed, p, scale, softcap, empty):
    """Attention over the listed keys. See `spt::key_attention_v1`."""
    check_attention(q, k, v, bias, keys, counts, seed, p, empty)
    kept = listed(keys, counts, k.shape[2])
    return attend(q, k, v, bias, kept, expr, expr_in, seed, p, scale, softcap, empty)


def key_attention_backward(
    grad_out, q, k, v, bias, out, lse, keys, counts, expr, expr_in, seed, p, scale, softcap, empty, needs
):
    """Gradients of `key_attention`. See `spt::key_attention_backward_v1`."""
    kept = listed(keys, counts, k.shape[2])
    return attend_backward(grad_out, q, k, v, bias, kept, expr, expr_in, seed, p, scale, softcap, empty, needs)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def evenly(total: int, rows: int, device: torch.device) -> Tensor:
    """`rows` evenly spaced indices into range(total), repeated where there are fewer; int64."""
    return torch.arange(rows, device=device) * total // max(rows, 1)


def sample_rows(x: Tensor, n_groups: int, rows: int) -> Tensor:
    """Evenly spaced vectors of each key head: x [B, H, T, D] -> [Hkv, rows, D] fp32, over batch, heads of the group, tokens."""
    batch, n_heads, length, dim = x.shape
    group = n_heads // max(n_groups, 1)
    total = batch * group * length
    if total == 0:
        return x.new_zeros((n_groups, rows, dim), dtype=torch.float32)
    index = evenly(total, rows, x.device)
    b, g, t = index // (group * length), index // length % group, index % length
    heads = torch.arange(n_groups, device=x.device).unsqueeze(1) * group + g  # [Hkv, rows]
    return x[b, heads, t].float()


def quality_sums(q, k, v, bias, expr, expr_in, out, lse, scale, softcap) -> Tensor:
    """Dense against sparse on at most 32 evenly spaced query positions, all heads; see `spt::stats_attention_v1`."""
    batch, n_heads, n_q, _ = q.shape
    n_k = k.shape[2]
    dtype = compute_dtype(q, k)
    if batch * n_q == 0 or n_k == 0:
        return torch.zeros(4, dtype=torch.float32, device=q.device)
    total, n_picked, n_groups = batch * n_q, min(MEASURED_POSITIONS, batch * n_q), k.shape[1]
    h, j = torch.arange(n_heads, device=q.device).view(-1, 1, 1), torch.arange(n_k, device=q.device).view(1, 1, -1)
    sums = torch.zeros(4, dtype=dtype, device=q.device)
    # One batch row after the other: indexing keys by position would copy all of them for each position.
    for row in range(batch):
        first, last = -(-row * n_picked // batch), -(-(row + 1) * n_picked // batch)
        if first == last:
            continue
        t = torch.arange(first, last, device=q.device) * total // n_picked - row * n_q
        b = torch.full((1, 1, 1), row, device=q.device)
        keys, values = k[row].to(dtype), v[row].to(dtype)
        queries = q[row, :, t].to(dtype).reshape(n_groups, -1, q.shape[3])
        logits = _capped(queries @ keys.transpose(-1, -2) * scale, softcap).view(n_heads, -1, n_k)  # [H, n, Tk]
        row_bias = None if bias is None else bias.expand(batch, n_heads, n_q, n_k)[row, :, t]
        row_mask = mask_at(expr, expr_in, b, h, t.view(1, -1, 1), j)
        added, allowed = combine_masks([row_bias, row_mask], dtype)
        logits = logits if added is None else logits + added
        logits = logits if allowed is None else torch.where(allowed, logits, -torch.inf)
        exact = logits.logsumexp(-1)  # [H, n]
        sparse_lse, sparse = lse[row, :, t].to(dtype), out[row, :, t].to(dtype)
        dense = logits.softmax(-1).view(n_groups, -1, n_k) @ values  # NaN where nothing is allowed: left out below
        dense = dense.view(n_heads, -1, v.shape[3])
        error, energy = (sparse - dense).square().sum(-1), dense.square().sum(-1)
        valid = exact.isfinite() & error.isfinite() & energy.isfinite() & ~sparse_lse.isnan()
        mass = (sparse_lse - exact).exp().clamp(max=1)
        sums += torch.stack([torch.where(valid, x, 0).sum() for x in (mass, error, energy, torch.ones_like(mass))])
    return sums.float()


def stats_attention(q, k, v, bias, expr, expr_in, out, lse, scale, softcap, rows, probe):
    """Samples of queries and keys, and the quality of a sparse result. See `spt::stats_attention_v1`."""
    n_groups = k.shape[1]

    def samples() -> tuple[Tensor, Tensor]:
        return sample_rows(q, n_groups, rows), sample_rows(k, n_groups, rows)

    def quality() -> Tensor:
        return quality_sums(q, k, v, bias, expr, expr_in, out, lse, scale, softcap)

    empty_q, empty_k = (x.new_zeros((n_groups, rows, x.shape[-1]), dtype=torch.float32) for x in (q, k))
    no_quality = torch.zeros(4, dtype=torch.float32, device=q.device)
    known = asked(probe)
    if known is not None:
        collect, measure = known
        query_rows, key_rows = samples() if collect else (empty_q, empty_k)
        return query_rows, key_rows, quality() if measure else no_quality
    # Whatever is asked, the device decides.
    query_rows, key_rows = (
        torch.where(probe[0] != 0, x, zero) for x, zero in zip(samples(), (empty_q, empty_k), strict=True)
    )
    return query_rows, key_rows, torch.where(probe[1] != 0, quality(), no_quality)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _need(condition: bool, op: str, expected: str, got: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{op}: expected {expected}, got {got}; {remedy}")


def _check_heads(op: str, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k)):
        _need(x.dim() == 4 and x.is_floating_point(), op, f"{name} [B, heads, T, D] float", (list(x.shape), x.dtype), "reshape it")
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    _need(
        fits,
        op,
        "q [B, H, Tq, D] and k [B, Hkv, Tk, D] with H a multiple of Hkv",
        (list(q.shape), list(k.shape)),
        "make batch and head dimension equal",
    )
    if bias is not None:
        full = (*q.shape[:3], k.shape[2])
        broadcasts = bias.dim() == 4 and all(n in (1, m) for n, m in zip(bias.shape, full, strict=True))
        _need(broadcasts, op, f"a 4-d mask that broadcasts to {list(full)}", list(bias.shape), "expand or reshape it")
        _need(bias.dtype == torch.bool or bias.is_floating_point(), op, "a bool or float mask", bias.dtype, "convert it")


def check_selection(
    q: Tensor, k: Tensor, bias: Tensor | None, codebook: Tensor | None, key_mean: Tensor | None, budget: Tensor
) -> None:
    """Raises ValueError unless the arguments of a selection op fit together."""
    op = "spt selection"
    _check_heads(op, q, k, bias)
    n_groups, dim = k.shape[1], k.shape[3]
    if codebook is not None:
        fits = codebook.dim() == 4 and codebook.shape[0] == n_groups and codebook.shape[1] * codebook.shape[3] == dim
        _need(fits, op, f"a codebook [{n_groups}, P, C, {dim}/P]", list(codebook.shape), "fit one for these heads")
    fits = key_mean is None or key_mean.shape == (n_groups, dim)
    _need(fits, op, f"key_mean [{n_groups}, {dim}]", key_mean, "recompute it for these heads")
    _need(budget.numel() == 1, op, "a budget of one element", list(budget.shape), "pass fp32 [1]")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    index: Tensor,
    counts: Tensor,
    seed: Tensor | None,
    p: float,
    empty: str,
    tile_q: int | None = None,
    tile_k: int | None = None,
) -> None:
    """Raises ValueError unless the arguments of `tile_attention` (or, without tile sizes, `key_attention`) fit together."""
    op = "spt::key_attention_v1" if tile_q is None else "spt::tile_attention_v1"
    _check_heads(op, q, k, bias)
    _need(v.dim() == 4 and v.shape[:3] == k.shape[:3], op, f"v {[*k.shape[:3], 'Dv']}", list(v.shape), "pair it with k")
    _need(q.dtype == k.dtype == v.dtype, op, "q, k and v of one dtype", (q.dtype, k.dtype, v.dtype), "cast them")
    if tile_q is None or tile_k is None:
        rows = q.shape[:3]
    else:
        rows = (q.shape[0], k.shape[1], -(-q.shape[2] // tile_q))
    found = tuple(counts.shape)
    if tile_q is not None and found[2:] == (2,):  # lists are stored in at least two rows
        found = (*found[:2], min(2, rows[2]))
    fits = index.dim() == 4 and index.shape[:3] == counts.shape and found == tuple(rows)
    _need(fits, op, f"lists {[*rows, 'L']} and counts {list(rows)}", (list(index.shape), list(counts.shape)), "select anew")
    _need(empty in EMPTY, op, f"empty in {EMPTY}", repr(empty), "say what a row without keys returns")
    _need(0 <= p <= 1, op, "a dropout probability in [0, 1]", p, "check dropout_p")
    _need(p == 0 or seed is not None, op, "a seed for dropout", f"p={p} without one", "pass int64 [1]")
