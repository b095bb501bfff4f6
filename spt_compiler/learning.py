"""How a site learns: initialisation and updates of codebooks and routers from sampled activations, on the host.

Graphs only sample rows into `SiteState.tensors["sample"]`, a ring; everything here runs between steps (`calibrate.maintain`),
works in place on fixed storage, and is a deterministic function of the state, the weights and the option `seed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import expression, pq, routing
from .matmul import computes_in, product
from .state import SiteState

# Learning is dense at first and rare later: at steps 1, 2, 4, 8, 16 and then every 32 (KERNELS.md section 2.3: 20 to 50).
PERIOD = 32
MIN_ROWS = 16  # fewer sampled rows than this say nothing worth a decision
CODEBOOK_DECAY = 0.9
MEAN_DECAY = 0.9
# Later fits trust what was learned before much more than the first one trusts zero, and so need fewer rows.
UPDATE_RIDGE = 3.0
UPDATE_ROWS = 1024
COMPENSATION_DECAY = 0.5
HIDDEN_ROWS = 512  # whose hidden units are computed at a time
SCALE_ROWS = 512  # as many rows tell the spread of the output channels
CLUSTER_ROWS = 2048  # and as many what units do: two copies of their profiles are the most that learning holds
TIE = 1e-4  # routers whose errors differ by less than this share are alike
GROWN = 1.3  # this many times the rows of the last clustering are worth another one


def is_due(steps: int) -> bool:
    """Whether learning happens after this many backward passes."""
    return steps > 0 and (steps % PERIOD == 0 or (steps < PERIOD and steps & (steps - 1) == 0))


def site_seed(state: SiteState, seed: int) -> int:
    """A seed from the site's shape and the option; never from torch's generators."""
    number = seed + 1
    for part in state.spec.key:
        number = (number * 1_000_003 + (part if isinstance(part, int) else sum(map(ord, str(part))))) % (2**31 - 1)
    return number


def new_rows(state: SiteState) -> Tensor:
    """The rows sampled since the last call, [..., n, D]; those with NaN or infinity are left out and counted."""
    sample = state.tensors["sample"]
    size, cursor = sample.shape[-2], int(state.tensors["cursor"])
    read = state.counter("rows_read")
    count = min(size, cursor - read if cursor >= read else cursor)  # a cursor that went back was folded, or loaded
    state.set_counter("rows_read", cursor)
    rows, dropped = _finite(_ring(sample, cursor, count))
    if dropped:
        state.set_counter("skipped_rows", state.counter("skipped_rows") + dropped)
    return rows


def rows_to_learn(state: SiteState, fresh: Tensor) -> Tensor:
    """What a fit should see: of an FFN all of the ring while it fills, later its newest rows; of attention what is fresh."""
    sample, cursor = state.tensors["sample"], int(state.tensors["cursor"])
    size = sample.shape[-2]
    if state.kind == "attention":
        return fresh
    growing = cursor >= GROWN * state.counter("clustered_rows") and state.counter("clustered_rows") < size
    return _finite(_ring(sample, cursor, min(cursor, size if growing else min(size, UPDATE_ROWS))))[0]


def ring_is_full(state: SiteState) -> bool:
    """Whether the ring was full when it was last looked at."""
    return state.counter("rows_read") >= state.tensors["sample"].shape[-2]


def _ring(sample: Tensor, cursor: int, count: int) -> Tensor:
    index = torch.arange(cursor - count, cursor, device=sample.device) % sample.shape[-2]
    return sample.index_select(-2, index)


def _finite(rows: Tensor) -> tuple[Tensor, int]:
    # A row counts only if it is finite for every head and for query and key alike: they are sampled together.
    keep = rows.isfinite().flatten(0, -3).all(0).all(-1) if rows.dim() > 2 else rows.isfinite().all(-1)
    dropped = len(keep) - int(keep.sum())
    return (rows[..., keep, :] if dropped else rows), dropped


def learn(state: SiteState, rows: Tensor, weights: Any, *, density: float, seed: int) -> bool:
    """Initialises or updates the site; returns whether anything was learned.

    Args:
        rows: [2, Hkv, n, D] queries and keys, or [n, E] tokens (FFN), all finite.
        weights: for an FFN a mapping {w_in, b_in, w_out, act, act_in} of real tensors; unused for attention.
        density: share of the blocks in force (FFN). seed: option `seed`.
    """
    if rows.shape[-2] < MIN_ROWS:
        return False
    seed = site_seed(state, seed)
    if state.kind == "attention":
        _learn_codebook(state, rows, seed)
    else:
        _learn_router(state, rows, weights, density, seed)
    state.set_counter("initialised", 1)
    state.set_counter("updates", state.counter("updates") + 1)
    return True


def _learn_codebook(state: SiteState, rows: Tensor, seed: int) -> None:
    if state.parameters_taken:
        return  # the user's optimizer moves the codewords; moving their origin would undo its work
    queries, keys = rows[0], rows[1]  # [Hkv, S, D] each
    codebook = state.tensors["codebook"]
    _, n_subspaces, n_codewords, _ = codebook.shape
    moment = pq.query_moment(queries, n_subspaces)
    mean = keys.mean(1)
    if not state.initialised:
        fitted = pq.fit(keys - mean[:, None], n_subspaces, n_codewords, query_moment=moment, seed=seed)
        state.assign(codebook=fitted, key_mean=mean, query_moment=moment.to(state.tensors["query_moment"].device))
        return
    mean = state.tensors["key_mean"].lerp(mean, 1 - MEAN_DECAY)
    moment = state.tensors["query_moment"].to(moment.device).lerp(moment, 1 - MEAN_DECAY)
    updated = pq.ema_update(
        codebook.detach(),
        None,
        keys - mean[:, None],
        query_moment=moment,
        decay=CODEBOOK_DECAY,
        seed=seed + state.counter("updates"),
    )
    state.assign(codebook=updated, key_mean=mean, query_moment=moment)


def hidden(weights: Any, x: Tensor) -> Tensor:
    """Hidden units of an FFN for rows x [S, E]: [S, F], in fp32; some rows at a time, so that it is all that is held."""
    w_in = [_native(w) for w in weights["w_in"]]
    fixed: dict[str, Any] = {f"a{i}": a.float() for i, a in enumerate(weights["act_in"])}
    act, out = expression.parse(weights["act"]), x.new_empty(x.shape[0], w_in[0].shape[0], dtype=torch.float32)
    for rows, filled in zip(x.split(HIDDEN_ROWS), out.split(HIDDEN_ROWS), strict=True):
        pre = {f"x{i}": product(rows.to(w.dtype), w.t()).float() for i, w in enumerate(w_in)}
        for z, b in zip(pre.values(), weights["b_in"], strict=True):
            if b is not None:
                z += b
        filled.copy_(expression.evaluate(act, pre | fixed))
    return out


def _native(weight: Tensor) -> Tensor:
    return weight.to(computes_in(weight))


def blocks_kept(density: float, n_blocks: int) -> int:
    """R, the number of blocks a token keeps (CONTRACTS.md, "Selection and density")."""
    return min(n_blocks, max(1, math.floor(density * n_blocks + 0.5)))


def _learn_router(state: SiteState, x: Tensor, weights: Any, density: float, seed: int) -> None:
    t = state.tensors
    n_keep = blocks_kept(density, t["router_weight"].shape[0])
    h, w_out = hidden(weights, x), _native(weights["w_out"])
    few = h[:: -(-h.shape[0] // SCALE_ROWS)]
    scale = routing.output_scale(product(few.to(w_out.dtype), w_out.t()))
    # While the ring fills, every fit starts anew from all that is in it: one batch is a poor picture of what units do. A router
    # that the user trains keeps its blocks.
    grown = x.shape[0] >= GROWN * state.counter("clustered_rows") and not state.parameters_taken
    first = not state.initialised or grown
    if first:
        state.set_counter("clustered_rows", x.shape[0])
    routed = [_route(state, router, first, x, h, w_out, scale, n_keep, seed) for router in _routers(state, first)]
    del h
    fits = [_make_up(state, first, fit, x, scale, seed) for fit in routed]
    best, error = fits.pop()
    for other, its_error in fits:  # the last is the simplest: it also gets what rounding would decide
        if its_error < (1 - TIE) * error:
            best, error = other, its_error
    state.assign(**best)
    state.set_counter("fitted_keep", n_keep)


def _routers(state: SiteState, first: bool) -> tuple[str, ...]:
    """The routers to fit, of which the one that errs less on the sampled tokens is taken.

    Where a few units matter for all tokens, nothing beats keeping these: a learned router is then not worth its errors. Which it is
    is decided while the ring fills; later updates keep to it, as the blocks stay.
    """
    settings = state.settings
    if settings is None:
        return ("learned",)
    if settings.ffn.router != "learned" or settings.ffn.gate != "hard" or settings.preset == "paper" or state.parameters_taken:
        return (settings.ffn.router,)
    if first:
        return ("learned", "static")
    return ("learned",) if state.tensors["router_weight"].any() else ("static",)


def _route(
    state: SiteState, router: str, first: bool, x: Tensor, h: Tensor, w_out: Tensor, scale: Tensor, n_keep: int, seed: int
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Blocks and a router of one kind: (tensors of the state, kept [S, G] bool, and `routing.dropped_outputs`)."""
    t, settings = state.tensors, state.settings
    n_blocks = t["router_weight"].shape[0]
    scaled = (w_out * scale.unsqueeze(1)).to(w_out.dtype)
    paper, gate = (False, "hard") if settings is None else (settings.preset == "paper", settings.ffn.gate)
    permutation, weight, bias = t["permutation"], t["router_weight"].detach(), t["router_bias"].detach()
    if router == "static":
        energy = routing.unit_energy(h, w_out)
        permutation = energy.argsort(descending=True, stable=True).int() if first else permutation
        blocks = [part.sum() for part in energy[permutation.long()].split(-(-len(energy) // n_blocks))]
        blocks += [energy.new_zeros(())] * (n_blocks - len(blocks))
        weight, bias = routing.static_router(torch.stack(blocks)[None], x.shape[1])
    elif first and not paper:  # the paper's blocks lie as the units do
        every = -(-h.shape[0] // CLUSTER_ROWS)
        profiles = routing.unit_profiles(h[::every], scaled)
        permutation = routing.cluster(profiles.T, n_blocks, seed, n_keep=n_keep, tokens=x[::every])
        del profiles
    if router == "random":
        weight, bias = routing.random_router(n_blocks, x.shape[1], seed) if first else (weight, bias)
    elif router == "learned" and not state.parameters_taken:
        target = routing.block_norms(h, scaled, permutation, n_blocks)
        if gate == "spt":
            weight, bias = routing.fit_to_gate(*routing.fit_router(x, target), x, n_keep)
        elif first:
            weight, bias = routing.fit_router(x, target)
        else:
            weight, bias = routing.fit_router(x, target, prior_weight=weight, prior_bias=bias, ridge=UPDATE_RIDGE)
    weight, bias = weight.to(x.device), bias.to(x.device)
    scores = torch.nn.functional.linear(x, weight, bias)
    # What is hot may cool down as the data drifts: judged anew each time, without those that are forced now.
    hot = routing.always_on(routing.choose(scores, torch.zeros_like(t["always_on"]), n_keep))
    kept = routing.choose(scores, hot, n_keep)
    missing, mean = routing.dropped_outputs(h, w_out, permutation, kept)
    tensors = {"permutation": permutation, "router_weight": weight, "router_bias": bias, "always_on": hot}
    return tensors, kept, missing, mean


def _make_up(
    state: SiteState, first: bool, fit: tuple[dict[str, Tensor], Tensor, Tensor, Tensor], x: Tensor, scale: Tensor, seed: int
) -> tuple[dict[str, Tensor], float]:
    """Compensation and correction for what a fit drops: (all tensors of the state, error left in scaled channels)."""
    tensors, kept, missing, mean = fit
    mean = routing.fit_compensation(missing, mean, kept)
    if not first:
        mean = state.tensors["compensation"].lerp(mean, 1 - COMPENSATION_DECAY)
    missing -= (~kept).to(mean.dtype) @ mean
    rank = state.tensors["correction_in"].shape[0]
    prior = state.tensors["correction_in"], state.tensors["correction_out"]
    later: dict[str, Any] = {} if first else {"prior": prior, "ridge": UPDATE_RIDGE}
    down, shift, up = routing.fit_correction(x, missing, scale, rank, seed, **later)
    missing -= torch.nn.functional.linear(x, down, shift) @ up.t()
    corrected = {"compensation": mean, "correction_in": down, "correction_shift": shift, "correction_out": up}
    return tensors | corrected, float((missing * scale).norm())


def router_quality(
    state: SiteState, x: Tensor, weights: Any, density: float, parts: int = 1
) -> tuple[dict[str, float], Tensor]:
    """What routing costs on tokens x [n, E]: relative output error (plain, and with every output channel
    measured by its own spread), load of the hottest block relative to the mean, share dropped (by norm).

    Returns: the figures, {} where there are too few rows to tell; and for each of `parts` parts of the tokens squared error and
        squared norm of the dense output, [parts, 2].
    """
    if x.shape[0] < MIN_ROWS:
        return {}, x.new_zeros(parts, 2)
    t = state.tensors
    n_blocks = t["router_weight"].shape[0]
    h, w_out = hidden(weights, x), _native(weights["w_out"])
    scores = torch.nn.functional.linear(x, t["router_weight"].detach(), t["router_bias"].detach())
    n_keep = blocks_kept(density, n_blocks)
    kept = routing.choose(scores, t["always_on"], n_keep)
    dense, error, norms = routing.routed_outputs(h, w_out, t["permutation"], kept)
    del h
    if state.settings is None or state.settings.ffn.compensation:  # type: ignore[attr-defined]
        error -= (~kept).to(error.dtype) @ t["compensation"]
        if n_keep == state.counter("fitted_keep"):
            features = torch.nn.functional.linear(x, t["correction_in"], t["correction_shift"])
            error -= features @ t["correction_out"].t()
    scale = routing.output_scale(dense)
    energy = torch.stack([error, dense]).square().sum(-1)  # [2, n]
    figures = {
        "rel_error": float(error.norm() / dense.norm().clamp_min(1e-20)),
        "scaled_error": float((error * scale).norm() / (dense * scale).norm().clamp_min(1e-20)),
        "load_max": float(kept.float().mean(0).max() * n_blocks / kept.float().sum(1).mean().clamp_min(1e-20)),
        "dropped_share": float(1 - torch.where(kept, norms, 0.0).sum() / norms.sum().clamp_min(1e-20)),
    }
    return figures, torch.stack([part.sum(1) for part in energy.tensor_split(parts, 1)])


def evaluate_weights(recipes: Any, arguments: Sequence[Any]) -> dict[str, Any]:
    """Real weights of an FFN site from one call's arguments (see `plan.Plan.weights`), with its low-rank branches merged."""

    def rows(entry: Any) -> Tensor | None:
        if entry is None:
            return None
        recipe, kept = entry
        return recipe.evaluate(arguments)[kept]

    def adapted(weight: Tensor, branches: Sequence[Any]) -> Tensor:
        merged = weight
        for a, b, scaling in branches:
            merged = torch.addmm(merged.float(), rows(b).float(), a.evaluate(arguments).float(), alpha=scaling)
        return merged.to(weight.dtype)

    w_in = [rows(w) for w in recipes["w_in"]]
    return {
        "w_in": [adapted(w, branches) for w, branches in zip(w_in, recipes["lora"] or [()] * len(w_in), strict=True)],
        "b_in": [rows(b) for b in recipes["b_in"]],
        "w_out": adapted(recipes["w_out"].evaluate(arguments), recipes["lora_out"]),
        "act": recipes["act"],
        "act_in": [a.evaluate(arguments) for a in recipes["act_in"]],
    }
