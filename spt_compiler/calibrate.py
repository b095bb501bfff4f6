"""Between steps: maintenance of states, the quality guard, and the tools `tune` and `finalize` build on.

Everything runs on the host, outside of graphs, at the start of the first call after a backward (CONTRACTS.md, "State,
learning and time"). Graphs see its decisions as data: budgets and probes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import learning
from .plan import GUARD_HEADROOM
from .state import COUNTERS, LOOKS, SiteState

log = logging.getLogger(__name__)

DENSE = -1.0
# A site misses its limit when its pooled error lies so many standard errors above it.
CONFIDENCE = 1.0
# A miss by less than this factor has to happen twice in a row: a site that goes wrong changes the inputs of those behind it, which
# recover with it.
CLEAR = 1.25
# Levels of the guard: as configured, denser, dense.
_LEVELS = (1.0, GUARD_HEADROOM, DENSE)


def maintain(state: SiteState, weights: Callable[[], Any], *, after_backward: bool, pinned: bool = False) -> None:
    """One turn of a site's upkeep: counts the step, judges its quality, learns where due, sets budget and probes.

    Args:
        weights: gives the FFN's real weights when asked. after_backward: False for the first-use initialisation of a model
            that only runs without gradients. pinned: the site is one of `dense_layers`.

    With several processes everything that is decided here is decided on the samples of all of them, and at steps that the
    number of backwards alone fixes: their states stay equal, and none waits for a collective that another does not enter.
    """
    if after_backward and state.idle:
        state.count_step()
        return
    # The call may stand in the user's autocast region: states are fp32, and so is what is computed for them.
    device = state.tensors["budget"].device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        _maintain(state, weights, after_backward, pinned)


def _maintain(state: SiteState, weights: Callable[[], Any], after_backward: bool, pinned: bool) -> None:
    config = state.settings
    part = config.attention if state.kind == "attention" else config.ffn  # type: ignore[union-attr]
    learns = part.select != "mean" if state.kind == "attention" else part.router != "random" or part.compensation
    if after_backward:
        state.set_counter("steps", state.counter("steps") + 1)
    steps, interval = state.counter("steps"), config.guard.interval  # type: ignore[union-attr]
    replicas = _replicas() if after_backward else 1
    together = replicas > 1 and (learning.is_due(steps) or _is_looked_at(state, steps, interval))
    alone = replicas == 1
    due = learns and (learning.is_due(steps) or (alone and not state.initialised))
    # Rows and sums lie on the device: they are looked at only in the turns that need them.
    wanted = together or (alone and (due or state.asked("measure")))
    fresh = learning.new_rows(state) if wanted and alone else None
    if together:
        fresh = _gather(state, learning.new_rows(state), replicas)
    # Rounds of learning are reported on while a site settles; later ones that no look goes with are not judged.
    if wanted and interval > 0 and state.initialised and (steps < learning.PERIOD or together or state.asked("measure")):
        _judge(state, fresh, weights, part, interval, together)
    if due and fresh is not None and fresh.shape[-2]:
        learning.learn(
            state,
            learning.rows_to_learn(state, fresh) if alone else fresh,
            weights() if state.kind == "ffn" else None,
            density=_base(state, part) * _density(state, part, config.dense_steps) / part.density,  # type: ignore[union-attr]
            seed=config.seed,  # type: ignore[union-attr]
        )
    elif not learns and not state.initialised:
        state.set_counter("initialised", 1)
    if together:
        _share(state)
    state.set_budget(_budget(state, part, pinned, config.dense_steps))  # type: ignore[union-attr]
    if state.kind == "ffn":
        blocks = state.tensors["always_on"].numel()
        n_keep = learning.blocks_kept(state.budget * _base(state, part), blocks)
        state.set_correction(0 <= state.budget and n_keep == state.counter("fitted_keep"))
    next_step = steps + 1
    # The first sparse step is measured, then one in every `guard.interval`.
    measure = state.initialised and (
        _is_looked_at(state, next_step, interval)
        or (interval > 0 and state.counter("measured_at") == 0 and steps >= config.dense_steps)  # type: ignore[union-attr]
    )
    collect = learns and (not state.initialised or learning.is_due(next_step) or not learning.ring_is_full(state))
    state.set_probe(
        collect=collect or (measure and state.kind == "ffn"),  # an FFN is measured on sampled tokens
        measure=measure,
        collect_no_grad=learns and not state.initialised,
        measure_no_grad=False,
    )
    on_its_way = part.schedule is not None and steps - config.dense_steps < part.schedule[1]  # type: ignore[union-attr]
    state.settled = (
        state.initialised
        and not (on_its_way or steps < config.dense_steps)  # type: ignore[union-attr]
        and not (learns and not learning.ring_is_full(state))
        and not (interval > 0 and state.counter("measured_at") == 0)
    )
    state.idle = _idle_turns(state, steps, interval) if state.settled else 0


def _idle_turns(state: SiteState, steps: int, interval: int) -> int:
    """How many turns of a settled site after this one only count: nothing was asked of the forward before, or will be after."""
    turn = steps + 1
    while not any(learning.is_due(step) or _is_looked_at(state, step, interval) for step in (turn, turn + 1)):
        turn += 1
    return turn - steps - 1


def _is_measured(steps: int, interval: int) -> bool:
    return interval > 0 and steps > 0 and steps % interval == 0


def _is_looked_at(state: SiteState, steps: int, interval: int) -> bool:
    """Whether this step is one of the last `LOOKS` of an interval; an FFN gets all its looks from the tokens of the last."""
    if state.kind == "ffn":
        return _is_measured(steps, interval)
    return interval > 0 and steps > 0 and -steps % interval < LOOKS


def _base(state: SiteState, part: Any) -> float:
    """The configured density; of an FFN, what whole blocks make of it (the graph's budget is a factor on this)."""
    if state.kind == "attention":
        return part.density
    blocks = state.tensors["always_on"].numel()
    return learning.blocks_kept(part.density, blocks) / blocks


def _density(state: SiteState, part: Any, dense_steps: int) -> float:
    """Density in force after this step, the guard's factor included: on the way along the schedule, or the configured one."""
    density = part.density
    if part.schedule is not None:
        start, length = part.schedule
        done = (state.counter("steps") - dense_steps) / length if length else 1.0
        density = start + (density - start) * min(max(done, 0.0), 1.0)
    return min(1.0, density * max(1.0, _LEVELS[state.counter("densified")]))


def _budget(state: SiteState, part: Any, pinned: bool, dense_steps: int) -> float:
    """What graphs multiply the configured density by; negative: everything."""
    if pinned or state.counter("steps") < dense_steps or not state.initialised:
        return DENSE
    if _LEVELS[state.counter("densified")] < 0:
        return DENSE
    density = _density(state, part, dense_steps)
    return DENSE if density >= 1 and part.density < 1 else density / part.density


def _judge(state: SiteState, fresh: Tensor | None, weights: Callable[[], Any], part: Any, interval: int, together: bool) -> None:
    """Turns what was observed into metrics, and lets the guard act on them. Rows are judged before anything learns from them."""
    steps, judged = state.counter("steps"), _is_measured(state.counter("steps"), interval)
    if state.kind == "attention":
        measured, looks = _attention_quality(state, together)
    elif fresh is not None and state.budget >= 0:
        measured, looks = learning.router_quality(state, fresh, weights(), state.budget * _base(state, part), LOOKS)
    else:
        return
    if not measured:
        return
    state.metrics.update(measured)
    state.set_counter("measured_at", max(1, steps))
    name = f"{state.path or '?'}/{state.kind}"
    log.info("step %d %s: %s", steps, name, ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
    if not judged:
        return  # between two intervals, while it settles, a site is only reported: what the guard does is for good
    error, spread = pooled_error(looks)
    state.metrics.update(rel_error=error, rel_error_spread=spread)
    state.tensors["looks"].zero_()
    limit = part.max_rel_error
    surely = error - CONFIDENCE * spread
    state.set_counter("misses", state.counter("misses") + 1 if limit is not None and surely > limit else 0)
    if limit is None or state.counter("misses") < (1 if surely > CLEAR * limit else 2):
        return
    if state.counter("densified") >= len(_LEVELS) - 1:
        return
    state.set_counter("misses", 0)
    level = state.counter("densified") + 1
    if _LEVELS[level] * part.density >= 1:
        level = len(_LEVELS) - 1
    state.set_counter("densified", level)
    warnings.warn(
        f"spt_compiler: {name} has relative error {error:.3f} +- {spread:.3f}, above {state.kind}.max_rel_error = {limit}; "
        f"it becomes {'dense' if _LEVELS[level] < 0 else 'denser'}",
        stacklevel=2,
    )


def pooled_error(looks: Tensor) -> tuple[float, float]:
    """Relative error of several looks taken together, and its standard error (that of a ratio of means).

    Args: looks: [n, 2] squared error and squared norm of the dense output; rows without energy, or not finite, do not count.
    Returns: (0, 0) without a look, a standard error of 0 for a single one.
    """
    looks = looks.double()
    looks = looks[looks.isfinite().all(1) & (looks[:, 1] > 0)]
    n = len(looks)
    if n == 0:
        return 0.0, 0.0
    error, energy = looks.sum(0).tolist()
    ratio = error / energy
    value = max(ratio, 0.0) ** 0.5
    if n == 1 or value == 0:
        return value, 0.0
    residual = looks[:, 0] - ratio * looks[:, 1]
    variance = float(residual.square().sum()) * n / (n - 1) / energy**2
    return value, variance**0.5 / (2 * value)  # the root halves a relative error


def _attention_quality(state: SiteState, together: bool) -> tuple[dict[str, float], Tensor]:
    """Figures of the last look, and the looks of this interval so far (the new one included)."""
    sums, looks = state.tensors["quality"].clone(), state.tensors["looks"]
    state.tensors["quality"].zero_()
    if together:
        torch.distributed.all_reduce(sums)
    mass, error, reference, count = sums.tolist()
    if count <= 0:
        return {}, looks
    looks.copy_(looks.roll(-1, 0))
    looks[-1, 0], looks[-1, 1] = max(error, 0.0), reference
    return {"mass": mass / count, "rel_error": (max(error, 0.0) / max(reference, 1e-30)) ** 0.5}, looks


def _replicas() -> int:
    """How many processes train copies of this model."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(state: SiteState, fresh: Tensor, replicas: int) -> Tensor:
    """Rows of every process, as many in all as one process samples; the same tensor everywhere."""
    sample = state.tensors["sample"]
    share = max(1, sample.shape[-2] // replicas)
    mine = sample.new_full((*sample.shape[:-2], share, sample.shape[-1]), torch.nan)
    if fresh.shape[-2]:
        n = min(share, fresh.shape[-2])
        picked = torch.arange(n, device=fresh.device) * fresh.shape[-2] // n
        mine[..., :n, :] = fresh.index_select(-2, picked)
    theirs = [torch.empty_like(mine) for _ in range(replicas)]
    torch.distributed.all_gather(theirs, mine)
    rows = torch.cat(theirs, -2)
    keep = rows.isfinite().movedim(-2, 0).flatten(1).all(1)
    return rows[..., keep, :]


# What a process keeps for itself: its own data, and observations not yet added up.
_LOCAL = ("sample", "cursor", "probe", "quality", "budget", "correction_gate")


def _share(state: SiteState) -> None:
    """Makes the state of rank 0 that of every rank: equal input gives equal results only on equal machines."""
    # A copy: what each rank counts for itself must not be written over.
    counters = state.tensors["counters"].to(state.tensors["budget"].device, copy=True)
    torch.distributed.broadcast(counters, src=0)
    for name in ("initialised", "updates", "densified", "misses", "measured_at", "fitted_keep"):
        state.set_counter(name, int(counters[COUNTERS[name]]))
    for name in state.spec.inputs:
        if name not in _LOCAL:
            value = state.tensors[name].detach()
            sent = value.to(torch.uint8) if value.dtype == torch.bool else value.contiguous()
            torch.distributed.broadcast(sent, src=0)
            if sent is not value:
                value.copy_(sent)
    if state.kind == "attention":
        moment = state.tensors["query_moment"].to(state.tensors["budget"].device)
        torch.distributed.broadcast(moment, src=0)
        state.assign(query_moment=moment)


def pinned_sites(counts: Sequence[int], layers: tuple[int, int]) -> list[bool]:
    """Which of `sum(counts)` sites in execution order are among the first or last `layers`."""
    total = sum(counts)
    first, last = layers
    return [i < first or i >= total - last for i in range(total)]


def relative_error(got: Any, expected: Any) -> float:
    """Largest difference of two model outputs (any nesting) relative to the largest expected value."""
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(leaves(got), leaves(expected), strict=True)]
    return max(
        (float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs if a.numel()), default=0.0
    )


def leaves(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order (tuples, dicts, and Hugging Face's output classes)."""
    from torch.utils._pytree import tree_leaves

    tree = dict(outputs) if hasattr(outputs, "items") else outputs
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]
