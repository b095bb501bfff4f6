"""Mathematics of the FFN router: blocks of hidden units, which of them a token needs, what stands in for the rest.

Pure functions of tensors; `state.py` owns the results. Letters: F hidden units, S sampled tokens, G blocks of width
W = ceil(F / G) (the last may be short), E model width. Every function takes constant, repeated, non-finite or
single-row input and returns finite values.

Source: SPT (arXiv 2312.10365) trains a router over contiguous blocks from scratch. Differs from it: blocks are clusters
of units that matter for the same tokens, and the router is a least-squares fit to how much each block contributes,
because the FFN is pretrained and its needs can be measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from .matmul import product

# Rounds of k-means that only have to find a start, rounds of the refinement (it gains little after them), and rounds of
# bidding in an assignment, whose prices carry over to the next.
_START_ROUNDS = 5
_REFINE_ROUNDS = 12
_PRICE_ROUNDS = 25
# Ridge of the compensation fit, relative to the number of tokens per block: keeps blocks that are always dropped
# together apart, and a block that is hardly ever dropped near zero.
_COMPENSATION_RIDGE = 0.1
# Ridge of a router that is fitted anew.
_ROUTER_RIDGE = 0.3
# Extra directions and rounds of the search for the best few of a correction.
_OVERSAMPLE, _SEARCH_ROUNDS = 8, 3
# Tokens whose hidden units are copied at a time.
_ROWS = 512


def block_sizes(n_units: int, n_blocks: int) -> list[int]:
    """Units of each block: ceil(F / G), the last short (or, for an awkward F, empty)."""
    width = -(-n_units // n_blocks)
    return [min(width, max(0, n_units - g * width)) for g in range(n_blocks)]


def unit_profiles(h: Tensor, w_out: Tensor) -> Tensor:
    """How much each hidden unit matters for each token: h [S, F], w_out [E, F] -> [S, F] fp32, new.

    What a unit adds to the output beyond its mean, which compensation supplies where the unit is dropped, to the power of 1.5: in
    between its norm, which counts as if all units of a block added up, and its square, as if none did. On a SwiGLU language model
    and a pretrained MiniLM the output error at density 1/2 fell by 2.5 % and 5 % against the norm of all that a unit adds.
    """
    mass = _finite(h)  # the one copy: this is the largest thing in learning
    mass.sub_(mass.mean(0)).abs_().mul_(_finite(w_out).norm(dim=0))
    mass.div_(mass.mean().clamp_min(1e-20) if mass.numel() else 1.0)  # no power of it overflows
    return mass.pow_(1.5)


def cluster(profiles: Tensor, n_blocks: int, seed: int, *, n_keep: int | None = None, tokens: Tensor | None = None) -> Tensor:
    """Cut hidden units into equal blocks of units that matter for the same tokens.

    Balanced spherical k-means finds a start. Then alternately each token keeps the `n_keep` blocks that hold most of
    its profile, and each unit moves to the block whose tokens need it most, all blocks staying full: that maximises
    what the kept blocks hold, which is what routing lives on (on a pretrained MiniLM and a SwiGLU language model the
    output error at density 1/2 fell by 8 % and 18 % against k-means alone). Given the tokens, each keeps the blocks that a
    router fitted to them would choose: blocks form that can be told from a token (2 % less error).

    Args:
        profiles: [F, S] float, see `unit_profiles`.
        n_blocks: G, 1 <= G <= F.  seed: of the initial centres.  n_keep: blocks a token keeps; None means half of them.
        tokens: [S, E] float, the inputs of the profiles' tokens, all finite; None: a token knows what its blocks hold.
    Returns: permutation [F] int32 on the device of `profiles`: block g owns permutation[g * W : (g + 1) * W], ascending
        inside a block.
    Raises: ValueError for a number of blocks out of range.
    """
    n_units = profiles.shape[0]
    if not 1 <= n_blocks <= n_units:
        raise ValueError(f"expected 1 to {n_units} blocks for {n_units} hidden units, got {n_blocks}; lower ffn.blocks")
    # The largest thing in learning: in place, and let go of what was given if nobody else holds it.
    mass = _finite(profiles).abs_()
    device = profiles.device
    del profiles
    mass /= mass.mean().clamp_min(1e-20)
    sizes = block_sizes(n_units, n_blocks)
    if n_blocks == 1 or mass.shape[1] == 0:
        return torch.arange(n_units, dtype=torch.int32, device=device)

    inverse = mass.norm(dim=1, keepdim=True).clamp_min(1e-12).reciprocal()  # [F, 1]; mass * inverse are the directions
    centres = _initial_centres(mass, inverse, n_blocks, torch.Generator().manual_seed(seed))
    block: Tensor | None = None
    price = mass.new_zeros(n_blocks)
    for _ in range(_START_ROUNDS):
        block, price = _assign(mass @ centres.t() * inverse, sizes, price)
        centres = normalize((one_hot(block, n_blocks) * inverse).t() @ mass, dim=1)
    assert block is not None

    kept_count = min(max(n_keep or (n_blocks + 1) // 2, 1), n_blocks)
    price = torch.zeros_like(price)
    fit = None if tokens is None else _Regression(tokens.float(), _ROUTER_RIDGE)
    for _ in range(_REFINE_ROUNDS if kept_count < n_blocks else 0):
        held = _sum_by_block(mass, block, n_blocks)  # [G, S]
        if fit is not None:
            held = fit.predicted(held.t().double().sqrt()).t()
        kept = torch.zeros_like(held, dtype=mass.dtype).scatter_(0, held.topk(kept_count, dim=0).indices, 1.0)
        previous = block
        block, price = _assign(mass @ kept.t(), sizes, price)
        if torch.equal(previous, block):
            break
    return block.argsort(stable=True).int()


def unit_energy(h: Tensor, w_out: Tensor) -> Tensor:
    """Mean squared norm of what each hidden unit adds to the output: h [S, F], w_out [E, F] -> [F]; 0 without tokens.

    The blocks of a static router lie in its order: they are then a slice of the best units. Clusters would spread a few units that
    fire rarely but hugely (pretrained encoders have them) over blocks of small mean, which a static choice drops, and the model
    does not survive that (cosine of MiniLM's last hidden states: .56).
    """
    if not h.shape[0]:
        return h.new_zeros(h.shape[1])
    return _finite(h).square_().mean(0) * _finite(w_out).square().sum(0)


def _sum_by_block(values: Tensor, block: Tensor, n_blocks: int) -> Tensor:
    """[F, S], [F] -> [G, S]."""
    return one_hot(block, n_blocks).to(values.dtype).t() @ values


def _initial_centres(mass: Tensor, inverse: Tensor, n_blocks: int, generator: torch.Generator) -> Tensor:
    """k-means++ on the sphere: each next centre is drawn by its squared distance from the nearest one so far.

    Args: mass: [F, S].  inverse: [F, 1], of the norms of its rows.
    """
    chosen = [int(torch.randint(mass.shape[0], (1,), generator=generator))]
    distance = mass.new_full((mass.shape[0],), torch.inf)
    for _ in range(n_blocks - 1):
        cosine = mass @ (mass[chosen[-1]] * inverse[chosen[-1]]) * inverse[:, 0]
        distance = torch.minimum(distance, (2 - 2 * cosine).clamp_min(0))
        weight = distance.double().cpu() + 1e-12  # repeated units have no distance at all
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
    return mass[chosen] * inverse[chosen]


def _assign(value: Tensor, sizes: list[int], price: Tensor) -> tuple[Tensor, Tensor]:
    """Put every unit in a block, each block exactly full, at (nearly) the largest total value.

    Crowded blocks raise their price until the load is even; the few units that are left over then go where they lose
    least.

    Args: value: [F, G].  sizes: sum to F.  price: [G], where the bidding starts.
    Returns: block [F] int64, price [G].
    """
    n_units, n_blocks = value.shape
    room = torch.tensor(sizes, dtype=value.dtype, device=value.device)
    # How far apart the offers to one unit lie is the scale on which prices act.
    scale = (value - value.mean(1, keepdim=True)).abs().mean()
    for i in range(_PRICE_ROUNDS):
        block = (value - price).argmax(1)
        load = torch.bincount(block, minlength=n_blocks).to(room.dtype)
        if torch.equal(load, room):
            return block, price
        price = price + scale * (2 / (2 + i)) * (load - room) / room.clamp_min(1)
    block = (value - price).argmax(1)
    return _even_out(block.cpu(), (value - price).cpu(), sizes).to(value.device), price


def _even_out(block: Tensor, value: Tensor, sizes: list[int]) -> Tensor:
    """Move units out of overfull blocks, those first that lose least, until every block has its size."""
    load = torch.bincount(block, minlength=len(sizes)).tolist()
    for g, size in enumerate(sizes):
        while load[g] > size:
            free = [b for b in range(len(sizes)) if load[b] < sizes[b]]
            units = (block == g).nonzero()[:, 0]
            best, target = value[units][:, free].max(1)
            order = (best - value[units, g]).argsort(descending=True, stable=True)
            for i in order.tolist():
                to = free[int(target[i])]
                if load[to] >= sizes[to]:
                    break  # its first choice has filled up: choose anew for the rest
                block[units[i]] = to
                load[to] += 1
                load[g] -= 1
                if load[g] == size:
                    break
    return block


def _by_block(h: Tensor, w_out: Tensor, permutation: Tensor, n_blocks: int) -> Iterator[Tensor]:
    """Contribution [S, E] fp32 of each block that has units, in order; one block at a time, to bound memory."""
    for units in permutation.long().split(-(-h.shape[1] // n_blocks)):
        yield product(h.index_select(1, units).to(w_out.dtype), w_out.index_select(1, units).t()).to(h.dtype)


def block_outputs(h: Tensor, w_out: Tensor, permutation: Tensor, n_blocks: int) -> Tensor:
    """Contribution of each block to the output.

    Args: h: [S, F] hidden units.  w_out: [E, F].  permutation: [F] int.
    Returns: [S, G, E].
    """
    out = h.new_zeros(h.shape[0], n_blocks, w_out.shape[0])
    for g, outputs in enumerate(_by_block(h, w_out, permutation, n_blocks)):
        out[:, g] = outputs
    return out


def block_norms(h: Tensor, w_out: Tensor, permutation: Tensor, n_blocks: int) -> Tensor:
    """Norm of each block's contribution: [S, F], [E, F] -> [S, G]."""
    norms = [outputs.norm(dim=1) for outputs in _by_block(h, w_out, permutation, n_blocks)]
    return torch.stack(norms + [h.new_zeros(h.shape[0])] * (n_blocks - len(norms)), 1)


def routed_outputs(h: Tensor, w_out: Tensor, permutation: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What routing does to known tokens, by one product over all blocks.

    Args: as `dropped_outputs`.
    Returns: the dense output [S, E]; what the dropped blocks add to it [S, E]; the norm of each block's contribution [S, G].
    """
    dense, missing = h.new_zeros(2, h.shape[0], w_out.shape[0])
    norms, dropped = h.new_zeros(kept.shape[1], h.shape[0]), (~kept).to(h.dtype).t().unsqueeze(-1)
    for g, outputs in enumerate(_by_block(h, w_out, permutation, kept.shape[1])):
        dense += outputs
        missing.addcmul_(outputs, dropped[g])
        torch.linalg.vector_norm(outputs, dim=1, out=norms[g])
    return dense, missing, norms.t()


def output_scale(y: Tensor) -> Tensor:
    """What an error in each output channel costs: the reciprocal of its spread, about 1 on average.

    The output of an FFN is added to a residual stream and normalised before the next layer looks at it. A few channels of
    pretrained models are a hundred times larger than the rest; measured by the plain norm they decide everything, and the
    blocks that matter for what comes later look alike (cosine of MiniLM's embeddings at density 1/2: +.01).

    Args: y: [S, E] outputs.  Returns: [E] fp32, finite and positive.
    """
    variance = _finite(y).var(0, correction=0) if y.shape[0] else y.new_zeros(y.shape[1], dtype=torch.float32)
    mean = variance.mean()
    if not mean > 0:
        return torch.ones_like(variance)
    return ((variance + 1e-3 * mean) / mean).rsqrt()


def fit_router(
    x: Tensor,
    target: Tensor,
    *,
    prior_weight: Tensor | None = None,
    prior_bias: Tensor | None = None,
    ridge: float = _ROUTER_RIDGE,
) -> tuple[Tensor, Tensor]:
    """Least-squares router from tokens to the square roots of the norms of their blocks' outputs.

    Only the order of a token's scores counts. The square root keeps tokens of large norm from dominating the fit: it
    lowers the error at density 1/2 by 3 % against the norms themselves. Weights shrink toward the prior (so that
    repeated fits on fresh tokens average), by a ridge relative to the mean squared norm of the centred tokens.

    Args:
        x: [S, E] float.  target: [S, G], norms (`block_norms`).  Rows that are not finite are left out.
        prior_weight: [G, E] or None (zero).  prior_bias: [G] or None.  ridge: >= 0; larger trusts the prior more.
    Returns: weight [G, E], bias [G] fp32: scores = x weight^T + bias. Without a usable row: the prior, or zeros.
    """
    n_blocks, width = target.shape[1], x.shape[1]
    weight = x.new_zeros(n_blocks, width, dtype=torch.float32) if prior_weight is None else _finite(prior_weight)
    bias = x.new_zeros(n_blocks, dtype=torch.float32) if prior_bias is None else _finite(prior_bias)
    usable = x.isfinite().all(1) & target.isfinite().all(1)
    x, wanted = x[usable].double(), target[usable].double().clamp_min(0).sqrt()
    n_rows = x.shape[0]
    if n_rows == 0:
        return weight, bias

    mean_x, mean_wanted = x.mean(0), wanted.mean(0)
    missing = wanted - mean_wanted - (x - mean_x) @ weight.t().double()
    weight = weight.double() + _Regression(x, ridge).weight(missing)
    fitted = mean_wanted - weight @ mean_x
    if prior_bias is not None:
        # The bias follows the prior as a weight would whose input is always one.
        prior_mean = bias.double() if prior_weight is None else bias.double() + mean_x @ prior_weight.double().t()
        fitted = (mean_wanted + ridge * prior_mean) / (1 + ridge) - weight @ mean_x
    return weight.float(), fitted.float()


class _Regression:
    """Ridge regression on tokens x [S, E], S >= 1, for any number of targets: its system is factored once, in fp64.

    The ridge is relative to the mean squared norm of the centred tokens, which are kept in the type of x.
    """

    def __init__(self, x: Tensor, ridge: float):
        n_rows, width = x.shape
        self.centred = x - x.mean(0)
        strength = max(ridge, 1e-6) * self.centred.square().sum().double().div(n_rows).clamp_min(1e-12)
        # Dual form where there are fewer rows than columns: the smaller of the two systems.
        self.dual = n_rows <= width
        single = self.centred.float()  # for the only large product
        system = product(single, single.t()) if self.dual else product(single.t(), single)
        self.factor = _factor(system.double(), strength)

    def weight(self, target: Tensor) -> Tensor:
        """[G, E] fp64: a target [S, G] fp64 without its mean is nearly centred @ weight^T."""
        if self.dual:
            return (torch.cholesky_solve(target, self.factor).t().to(self.centred.dtype) @ self.centred).double()
        return torch.cholesky_solve((self.centred.t() @ target.to(self.centred.dtype)).double(), self.factor).t()

    def predicted(self, target: Tensor) -> Tensor:
        """[S, G] fp64: what the fit says of a target [S, G] fp64."""
        mean = target.mean(0)
        return mean + (self.centred @ self.weight(target - mean).t().to(self.centred.dtype)).double()


def _factor(system: Tensor, strength: Tensor) -> Tensor:
    """Cholesky factor of system + strength I for a positive semi-definite system."""
    shifted = system.clone()
    shifted.diagonal().add_(strength)
    return torch.linalg.cholesky(shifted)


def _solve(system: Tensor, strength: Tensor, right: Tensor) -> Tensor:
    """(system + strength I)^-1 right for a positive semi-definite system."""
    return torch.cholesky_solve(right, _factor(system, strength))


def fit_to_gate(weight: Tensor, bias: Tensor, x: Tensor, n_keep: int) -> tuple[Tensor, Tensor]:
    """The same order of blocks for every token, at scores on which a gate of 2 * sigmoid(score) is one on average.

    Scores of a fitted router are norms: far above zero, where the gate would nearly double the output of a pretrained FFN.

    Args: weight [G, E], bias [G] of a router; x: [S, E]; n_keep: R.
    Returns: weight, bias: the scores less their mean over the blocks, shrunk to a spread of 0.2, and moved so that those of
        the kept blocks have mean zero.
    """
    weight, bias = weight - weight.mean(0), bias - bias.mean()
    scores = _finite(x) @ weight.t() + bias
    spread = scores.std(correction=0) if scores.numel() else scores.new_zeros(())
    factor = 0.2 / spread if spread > 1e-12 else spread.new_ones(())
    kept = choose(scores, torch.zeros_like(bias, dtype=torch.bool), n_keep)
    shift = (scores * factor)[kept].mean() if kept.any() else bias.new_zeros(())
    return weight * factor, bias * factor - shift


def static_router(target: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A router that keeps the blocks of largest mean for every token: target [S, G] -> weight [G, E] of zeros, bias [G]."""
    return target.new_zeros(target.shape[1], width, dtype=torch.float32), _finite(target).mean(0)


def random_router(n_blocks: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """The baseline that knows nothing: seeded normal weight [G, E] / sqrt(E), bias [G] of zeros."""
    weight = torch.randn(n_blocks, width, generator=torch.Generator().manual_seed(seed))
    return weight / width**0.5, torch.zeros(n_blocks)


def choose(scores: Tensor, always_on: Tensor, n_keep: int) -> Tensor:
    """The blocks each token keeps, as `spt::route_v1` chooses them.

    Args: scores: [S, G]; NaN counts as -inf.  always_on: [G] bool, taken first.  n_keep: R; at least the always-on
        ones.
    Returns: [S, G] bool; ties go to the lower block.
    """
    n_keep = min(max(n_keep, int(always_on.sum()), 1), scores.shape[1])
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, always_on.to(order.device)[order].byte().argsort(dim=1, descending=True, stable=True))
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, order[:, :n_keep], True)


def dropped_outputs(h: Tensor, w_out: Tensor, permutation: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """What the dropped blocks would have added; some tokens at a time, as their hidden units are the largest thing in learning.

    Args: h: [S, F] hidden units.  w_out: [E, F].  permutation: [F] int.  kept: [S, G] bool.
    Returns: their sum for each token [S, E]; the mean output of each block over the tokens that drop it [G, E], 0 for a block that
        no token drops. Values that are not finite count as 0.
    """
    n_blocks, n_units = kept.shape[1], h.shape[1]
    units = torch.arange(n_units, device=h.device)
    block = torch.empty_like(units)
    block[permutation.long()] = units // -(-n_units // n_blocks)
    total, sums = h.new_empty(h.shape[0], w_out.shape[0]), h.new_zeros(n_units)
    for rows, dropped, filled in zip(*(x.split(_ROWS) for x in (h, ~kept, total)), strict=True):
        left = torch.where(dropped[:, block], _finite(rows), 0.0)
        filled.copy_(product(left.to(w_out.dtype), w_out.t()))
        sums += left.sum(0)
    own = block == torch.arange(n_blocks, device=h.device).unsqueeze(1)
    mean = (own * sums) @ w_out.t().to(h.dtype) / (~kept).sum(0).clamp_min(1).unsqueeze(1)
    return total.nan_to_num_(0.0, 0.0, 0.0), mean.nan_to_num_(0.0, 0.0, 0.0)


def fit_compensation(missing: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """What to add for each dropped block, fitted to all dropped blocks of a token together.

    Blocks are not dropped independently of each other, so the sum of conditional means is a little off; this is the
    least-squares answer, drawn toward them (1 to 2 % less output error at density 1/2).

    Args: missing: [S, E], mean: [G, E], see `dropped_outputs`.  kept: [S, G] bool.
    Returns: [G, E] fp32; 0 for a block that no token drops.
    """
    dropped = (~kept).float()
    n_rows, n_blocks = dropped.shape
    if n_rows == 0:
        return mean
    strength = torch.tensor(_COMPENSATION_RIDGE * n_rows / n_blocks, dtype=torch.float64, device=mean.device)
    right = (dropped.t() @ (missing - dropped @ mean)).double()
    change = _solve((dropped.t() @ dropped).double(), strength, right)
    return mean + torch.where(dropped.any(0).unsqueeze(1), change.float(), 0)


def fit_correction(
    x: Tensor,
    missing: Tensor,
    scale: Tensor,
    rank: int,
    seed: int,
    *,
    prior: tuple[Tensor, Tensor] | None = None,
    ridge: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best linear map of low rank from tokens to what routing leaves out: missing ~ (x down^T + shift) up^T.

    Which blocks a token drops, and what they would have said, both depend on the token: its mean, which
    `fit_compensation` adds, is only the constant part of the answer. Reduced-rank ridge regression.

    Args:
        x: [S, E] float.  missing: [S, E_out], the dense output minus the compensated sparse one; rows that are not finite in
            either are left out.  scale: [E_out], see `output_scale`.  rank: r.  seed: of the search for the subspace.
        prior: (down [r, E], up [E_out, r]) of an earlier fit, toward which the map shrinks, so that repeated fits on fresh tokens
            average; None: toward zero.  ridge: relative to the mean squared norm of the tokens along one direction.
    Returns: down [r, E], shift [r], up [E_out, r] fp32; zeros where there is nothing to correct, the prior where tokens
        tell nothing.
    """
    usable = x.isfinite().all(1) & missing.isfinite().all(1)
    x, wanted = x[usable].float(), missing[usable].float() * scale
    n_rows, width = x.shape
    down, shift = x.new_zeros(rank, width), x.new_zeros(rank)
    up = x.new_zeros(wanted.shape[1], rank)
    mean = x.mean(0) if n_rows else x.new_zeros(width)
    centred = x - mean
    energy = centred.square().sum().double()
    if n_rows < 2 or not energy > 0:
        return (down, shift, up) if prior is None else (prior[0], -(prior[0] @ mean), prior[1])
    if not wanted.any():
        return down, shift, up
    known = None if prior is None else (prior[0], prior[1] * scale.unsqueeze(1))
    if known is not None:
        expected = centred @ known[0].t() @ known[1].t()
        wanted = wanted - expected
    strength = ridge * energy / min(n_rows, width)
    # The smaller of the two systems; the full map [E, E_out] is never formed in the dual form.
    outer = product(centred, centred.t()) if n_rows <= width else product(centred.t(), centred)
    right = wanted if n_rows <= width else product(centred.t(), wanted)
    # A ridge of the size of the mean eigenvalue leaves condition numbers of at most the number of columns.
    wide = torch.float32 if ridge >= 1 else torch.float64
    solution = _solve(outer.to(wide), strength.to(wide), right.to(wide)).float()
    fitted = product(outer if n_rows <= width else centred, solution)
    if known is not None:
        fitted += expected
    # The directions of largest fitted energy, by subspace iteration (a full decomposition would cost E^3).
    searched = min(rank + _OVERSAMPLE, *fitted.shape)
    basis = torch.randn(fitted.shape[1], searched, generator=torch.Generator().manual_seed(seed)).to(fitted.device)
    for _ in range(_SEARCH_ROUNDS):
        basis = torch.linalg.qr(fitted.t() @ (fitted @ basis))[0]
    _, size, turn = torch.linalg.svd(fitted @ basis, full_matrices=False)
    found = min(rank, int((size > 1e-6 * size[0]).sum()))
    if found == 0:
        return down, shift, up
    directions = basis @ turn[:found].t()  # [E_out, found]
    spread = (size[:found] / n_rows**0.5).clamp_min(1e-20)  # the low-rank features get unit size: half precision holds them
    to_features = solution @ directions
    if n_rows <= width:
        to_features = centred.t() @ to_features
    if known is not None:
        to_features = to_features + known[0].t() @ (known[1].t() @ directions)
    down[:found] = (to_features / spread).t()
    up[:, :found] = directions * spread / scale.unsqueeze(1)
    return down, -(down @ mean), up


def always_on(kept: Tensor, threshold: float = 0.9) -> Tensor:
    """[S, G] bool -> [G] bool: blocks that more than `threshold` of the tokens keep anyway."""
    if kept.shape[0] == 0:
        return torch.zeros(kept.shape[1], dtype=torch.bool, device=kept.device)
    return kept.float().mean(0) > threshold


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.float(), nan=0.0, posinf=0.0, neginf=0.0)
