"""Product quantisation of attention keys: assign, decode, fit, update, and the paper's commitment loss.

A codebook [Hkv, P, C, D/P] holds, for each key head and each of the P slices (subspaces) of the head dimension, C
codewords. A key is replaced by the nearest codeword of every slice. Plain tensor mathematics: no graph, no state, no
default random generator.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

__all__ = [
    "assign",
    "commitment_loss",
    "decode",
    "default_subspaces",
    "ema_update",
    "fit",
    "query_moment",
    "reconstruct",
]

# Assignments are made for this many distances at a time, so that a long batch never holds [S, P, C] at once.
_CHUNK = 1 << 19


def default_subspaces(head_dim: int) -> int:
    """Number of subspaces for a head dimension: the divisor that makes slices closest to 8 wide, never wider than 8.

    Source: SPT (arXiv 2312.10365) uses 8-wide slices.
    """
    return next(head_dim // width for width in range(min(8, head_dim), 0, -1) if head_dim % width == 0)


def _slices(x: Tensor, n_subspaces: int) -> Tensor:
    """[..., D] -> [..., P, D/P], a view where the strides allow."""
    dim = x.shape[-1]
    if n_subspaces <= 0 or dim % n_subspaces:
        raise ValueError(
            f"expected a number of subspaces that divides the head dimension, got {n_subspaces} for {dim}; "
            f"use {default_subspaces(dim)}"
        )
    return x.unflatten(-1, (n_subspaces, dim // n_subspaces))


def _check(codebook: Tensor, x: Tensor) -> None:
    if codebook.dim() != 4 or x.dim() < 3:
        raise ValueError(f"expected codebook [Hkv, P, C, D/P] and keys [..., Hkv, S, D], got {codebook.shape}, {x.shape}")
    n_heads, n_subspaces, _, width = codebook.shape
    if x.shape[-3] != n_heads or x.shape[-1] != n_subspaces * width:
        raise ValueError(
            f"expected keys [..., {n_heads}, S, {n_subspaces * width}] for a codebook {list(codebook.shape)}, "
            f"got {list(x.shape)}; fit a codebook for these heads"
        )


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.no_grad()
def assign(codebook: Tensor, keys: Tensor, moment: Tensor | None = None) -> Tensor:
    """Nearest codeword of every slice of every key.

    Args:
        codebook: [Hkv, P, C, D/P] float.  keys: [..., Hkv, S, D] float, centred as the codebook is.
        moment: [Hkv, P, D/P, D/P] symmetric, the metric: minimises (k - c)^T M (k - c). None is the euclidean metric.
    Returns: [..., Hkv, S, P] int64 codes in [0, C); ties to the lower code; a NaN key gets the last. Distances in fp32 (fp64 for
        fp64 input).
    Raises: ValueError where shapes do not fit.
    Source: SPT (arXiv 2312.10365) with L1; here the metric of the inner-product error, see `query_moment`.
    """
    _check(codebook, keys)
    dtype = _compute_dtype(codebook, keys)
    n_heads, n_subspaces, n_codewords, width = codebook.shape
    words = codebook.to(dtype)
    weighted = words if moment is None else words @ moment.to(dtype)
    # |k - c|^2 without the term of k alone, which is the same for every codeword, and halved.
    offset = 0.5 * (weighted * words).sum(-1, keepdim=True).flatten(0, 1)  # [Hkv * P, C, 1]
    weighted = weighted.flatten(0, 1)

    lead, n_keys, n_rows = keys.shape[:-3], keys.shape[-2], n_heads * n_subspaces
    flat = keys.reshape(math.prod(lead), n_heads, n_keys, keys.shape[-1])
    codes = torch.empty(flat.shape[0], n_heads, n_keys, n_subspaces, dtype=torch.long, device=keys.device)
    # Reductions over the codewords are fast when the keys lie inside: [codewords, keys]. The first smallest distance is found by
    # comparing with the minimum, which a fast reduction gives; argmin is several times slower.
    rank_dtype = torch.uint8 if n_codewords < 256 else torch.int32
    rank = torch.arange(n_codewords, 0, -1, device=keys.device, dtype=rank_dtype).unsqueeze(1)
    step = max(16, min(n_keys, _CHUNK // (n_rows * n_codewords)))
    memory = torch.empty(n_rows * n_codewords * min(step, n_keys), dtype=dtype, device=keys.device)
    for row, start in itertools.product(range(flat.shape[0]), range(0, n_keys, step)):
        part = _slices(flat[row, :, start : start + step].to(dtype), n_subspaces)  # [Hkv, s, P, D/P]
        part = part.permute(0, 2, 3, 1).flatten(0, 1)  # [Hkv * P, D/P, s]
        distance = memory[: n_rows * n_codewords * part.shape[2]].view(n_rows, n_codewords, part.shape[2])
        torch.baddbmm(offset, weighted, part, alpha=-1, out=distance)
        nearest = (distance == distance.amin(1, keepdim=True)).to(rank_dtype).mul_(rank).amax(1)
        code = nearest.long().neg_().add_(n_codewords).clamp_(max=n_codewords - 1)  # [Hkv * P, s]
        codes[row, :, start : start + step] = code.unflatten(0, (n_heads, n_subspaces)).transpose(1, 2)
    return codes.view(*lead, n_heads, n_keys, n_subspaces)


def decode(codebook: Tensor, codes: Tensor) -> Tensor:
    """Keys that codes stand for.

    Args: codebook: [Hkv, P, C, D/P].  codes: [..., Hkv, S, P] integers in [0, C).
    Returns: [..., Hkv, S, D], dtype of the codebook.
    """
    n_heads, n_subspaces, n_codewords, width = codebook.shape
    base = torch.arange(n_heads * n_subspaces, device=codebook.device).view(n_heads, 1, n_subspaces) * n_codewords
    rows = (codes + base).reshape(-1)
    words = codebook.reshape(-1, width).index_select(0, rows)
    return words.view(*codes.shape[:-1], n_subspaces * width)


def reconstruct(codebook: Tensor, keys: Tensor, mean: Tensor | None = None) -> Tensor:
    """Keys rounded to the codebook: decode(assign(keys - mean)) + mean, up to rounding.

    Args: codebook: [Hkv, P, C, D/P] of centred keys.  keys: [..., Hkv, S, D].  mean: [Hkv, D] or None (zero).
    Returns: [..., Hkv, S, D] fp32 (fp64 for fp64 input).
    """
    words = codebook.to(_compute_dtype(codebook, keys))
    if mean is not None:
        # Codewords about the mean: then the keys need no pass to be centred, and none to be moved back.
        words = words + _slices(mean.to(words.dtype), words.shape[1]).unsqueeze(-2)
    return decode(words, assign(words, keys))


def query_moment(queries: Tensor, n_subspaces: int) -> Tensor:
    """Second moment of queries per slice, the metric in which a codebook should be fitted.

    E[(q . (k - c))^2] = (k - c)^T E[q q^T] (k - c): the error of the inner product, not of the key.

    Args: queries: [Hkv, S, D], the queries of all heads that read the key head.
    Returns: [Hkv, P, D/P, D/P] fp32 (fp64 for fp64 input); zero for S = 0.
    """
    part = _slices(queries.to(_compute_dtype(queries)), n_subspaces).transpose(-2, -3)  # [Hkv, P, S, D/P]
    return part.transpose(-1, -2) @ part / max(1, queries.shape[-2])


def _clean(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Finite values: a diverged batch may not poison a codebook."""
    return torch.nan_to_num(x.to(dtype), nan=0.0, posinf=0.0, neginf=0.0)


def _usable(moment: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The metric made strictly positive definite, so that slices no query looks at still cluster."""
    if moment is None:
        return None
    moment = _clean(moment, dtype)
    eye = torch.eye(moment.shape[-1], dtype=dtype, device=moment.device)
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.where(scale > 0, moment + 1e-3 * scale * eye, eye)


def _means(parts: Tensor, codes: Tensor, n_codewords: int) -> tuple[Tensor, Tensor]:
    """Per codeword the mean of its members and their number: parts [Hkv, P, S, ds], codes [Hkv, P, S]."""
    one_hot = torch.nn.functional.one_hot(codes, n_codewords).to(parts.dtype)  # [Hkv, P, S, C]
    count = one_hot.sum(-2)
    total = one_hot.transpose(-1, -2) @ parts
    return total / count.clamp(min=1).unsqueeze(-1), count


def _reseed(words: Tensor, dead: Tensor, parts: Tensor, codes: Tensor, generator: torch.Generator) -> Tensor:
    """Moves dead codewords to the points that are farthest from their own codeword, a different point for each.

    Args: words [Hkv, P, C, ds]; dead [Hkv, P, C] bool; parts [Hkv, P, S, ds]; codes [Hkv, P, S].
    """
    n_points = parts.shape[-2]
    if n_points == 0 or not bool(dead.any()):
        return words
    own = words.gather(-2, codes.unsqueeze(-1).expand(*codes.shape, words.shape[-1]))
    far = (parts - own).square().sum(-1)
    # Equal distances are frequent (repeated tokens): a random order among them spreads the picks over distinct points.
    shuffle = torch.randperm(n_points, generator=generator).to(parts.device)
    order = shuffle[far[..., shuffle].argsort(dim=-1, descending=True, stable=True)]  # [Hkv, P, S]
    rank = (dead.cumsum(-1) - 1).clamp(min=0) % n_points  # which pick a dead codeword takes
    picks = order.gather(-1, rank.clamp(max=n_points - 1))
    fresh = parts.gather(-2, picks.unsqueeze(-1).expand(*picks.shape, parts.shape[-1]))
    return torch.where(dead.unsqueeze(-1), fresh, words)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


def fit(
    keys: Tensor,
    n_subspaces: int,
    n_codewords: int,
    *,
    query_moment: Tensor | None = None,
    iterations: int = 12,
    seed: int = 0,
) -> Tensor:
    """A codebook for a sample of keys: initialised from the data, then Lloyd steps in the metric of the queries.

    Args:
        keys: [Hkv, S, D] float, centred by the caller if at all; S may be smaller than n_codewords, rows may repeat.
        query_moment: [Hkv, P, D/P, D/P] or None (euclidean); see `query_moment`.
        iterations: Lloyd steps.  seed: of the choice of first codewords; the default generators are not touched.
    Returns: [Hkv, P, C, D/P] fp32 (fp64 for fp64 input), finite whatever the input holds.
    Raises: ValueError on shapes that do not fit.
    Source: k-means; KERNELS 2.3 (data initialisation with 12 steps equals k-means++).
    """
    if keys.dim() != 3:
        raise ValueError(f"expected keys [Hkv, S, D], got {list(keys.shape)}; merge the batch into S")
    if n_codewords < 1:
        raise ValueError(f"expected at least one codeword, got {n_codewords}")
    dtype = _compute_dtype(keys)
    parts = _slices(_clean(keys, dtype), n_subspaces).transpose(-2, -3)  # [Hkv, P, S, ds]
    n_heads, _, n_points, width = parts.shape
    if n_points == 0:
        return parts.new_zeros(n_heads, n_subspaces, n_codewords, width)
    moment = _usable(query_moment, dtype)
    generator = _generator(seed)
    first = torch.randperm(n_points, generator=generator)
    first = first.repeat(-(-n_codewords // n_points))[:n_codewords].to(keys.device)
    words = parts[:, :, first].clone()
    sample = parts.transpose(-2, -3).flatten(-2)  # [Hkv, S, D]
    for _ in range(iterations):
        chosen = assign(words, sample, moment).transpose(-1, -2)  # [Hkv, P, S]
        mean, count = _means(parts, chosen, n_codewords)
        words = torch.where((count > 0).unsqueeze(-1), mean, words)
        words = _reseed(words, count == 0, parts, chosen, generator)
    return words.contiguous()


def ema_update(
    codebook: Tensor,
    counts: Tensor | None,
    keys: Tensor,
    *,
    query_moment: Tensor | None = None,
    decay: float = 0.95,
    seed: int = 0,
) -> Tensor:
    """One online step: codewords move toward the mean of the keys that chose them, dead ones restart from the data.

    Args:
        codebook: [Hkv, P, C, D/P].  keys: [Hkv, S, D], centred as the codebook is.
        counts: [Hkv, P, C], how often each codeword was used before this sample since the last update; a codeword with no use
            here nor there is dead. None: this sample alone decides, and only when it has at least 4 keys per codeword.
        decay: share of the old codeword that stays.  seed: of the choice among equally far points.
    Returns: the new codebook, same shape and dtype; the argument is not changed. Finite for non-finite keys.
    Raises: ValueError where shapes do not fit.
    """
    _check(codebook, keys)
    dtype = _compute_dtype(codebook, keys)
    n_subspaces, n_codewords = codebook.shape[1:3]
    if keys.shape[-2] == 0:
        return codebook.clone()
    keys = _clean(keys, dtype)
    words = codebook.to(dtype)
    parts = _slices(keys, n_subspaces).transpose(-2, -3)
    chosen = assign(words, keys, _usable(query_moment, dtype)).transpose(-1, -2)
    mean, count = _means(parts, chosen, n_codewords)
    moved = torch.where((count > 0).unsqueeze(-1), decay * words + (1 - decay) * mean, words)
    if counts is not None:
        dead = (count + counts.to(dtype)) == 0
    elif keys.shape[-2] >= 4 * n_codewords:
        dead = count == 0
    else:
        dead = torch.zeros_like(count, dtype=torch.bool)
    return _reseed(moved, dead, parts, chosen, _generator(seed)).to(codebook.dtype)


def commitment_loss(codebook: Tensor, x: Tensor) -> Tensor:
    """The paper's quantisation loss, which pulls codewords and inputs together.

    a = softmax(-log(max(L1 distance, 1e-5))), z_w = a @ codewords, z_q = nearest codeword (L1);
    loss = MSE(z_w, z_q) + MSE(x, z_q), averaged over everything. Differentiable in both arguments.

    Args: codebook: [Hkv, P, C, D/P].  x: [..., H, S, D] with H a multiple of Hkv (heads of a group read one codebook).
    Returns: scalar, fp32 (fp64 for fp64 input); zero for an empty x.
    Raises: ValueError where shapes do not fit.
    Source: SPT (arXiv 2312.10365), PQ training; nothing is detached there either.
    """
    words, part = _by_subspace(codebook, x)
    if part.shape[-2] == 0:
        return (words.sum() + part.sum()) * 0
    distance, weight, nearest = _soft_assignment(words, part)
    quantised = words.gather(-2, nearest)
    mse = torch.nn.functional.mse_loss
    return mse(weight @ words, quantised) + mse(part, quantised)


def commitment_gradients(codebook: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `commitment_loss` for codebook and x, in their shapes and dtypes, without an autograd graph."""
    words, part = _by_subspace(codebook, x)
    if part.shape[-2] == 0:
        return torch.zeros_like(codebook), torch.zeros_like(x)
    distance, weight, nearest = _soft_assignment(words, part)
    quantised = words.gather(-2, nearest)
    soft, hard = (weight @ words - quantised) * (2 / part.numel()), (part - quantised) * (2 / part.numel())
    d_weight = soft @ words.transpose(-1, -2)  # [Hkv, P, N, C]
    d_score = weight * (d_weight - (weight * d_weight).sum(-1, keepdim=True))
    d_distance = torch.where(distance > _CLOSEST, -d_score / distance, 0.0)
    d_words = weight.transpose(-1, -2) @ soft
    d_words.scatter_add_(-2, nearest, -(soft + hard))
    d_part = hard
    for c in range(words.shape[-2]):  # one codeword at a time: [.., N, C, ds] of signs would be C times the input
        step = d_distance[..., c : c + 1] * torch.sign(part - words[..., c : c + 1, :])
        d_part = d_part + step
        d_words[..., c, :] -= step.sum(-2)
    heads = x.movedim(-3, 0)
    d_x = d_part.transpose(1, 2).reshape(heads.shape).movedim(0, -3)
    return d_words.to(codebook.dtype), d_x.to(x.dtype).contiguous()


_CLOSEST = 1e-5  # distances below it count as it, as in the paper's code


def _by_subspace(codebook: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codewords [Hkv, P, C, ds], inputs [Hkv, P, N, ds]) in the compute dtype."""
    n_heads, n_subspaces, _, width = codebook.shape
    if x.dim() < 3 or x.shape[-3] % n_heads or x.shape[-1] != n_subspaces * width:
        raise ValueError(f"expected x [..., k * {n_heads}, S, {n_subspaces * width}], got {list(x.shape)}")
    dtype = _compute_dtype(codebook, x)
    words, part = codebook.to(dtype), x.to(dtype).movedim(-3, 0)  # [H, ..., S, D]
    return words, part.reshape(n_heads, -1, n_subspaces, width).transpose(1, 2)


def _soft_assignment(words: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L1 distances [Hkv, P, N, C], inverse-distance weights [Hkv, P, N, C], index of the nearest codeword [Hkv, P, N, ds])."""
    distance = torch.cdist(part, words, p=1.0)
    weight = torch.softmax(-distance.clamp(min=_CLOSEST).log(), dim=-1)
    return distance, weight, distance.argmin(-1, keepdim=True).expand(*distance.shape[:-1], words.shape[-1])
