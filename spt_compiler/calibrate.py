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
from .state import SiteState

log = logging.getLogger(__name__)

DENSE = -1.0
# Levels of the guard: as configured, denser, dense.
_LEVELS = (1.0, GUARD_HEADROOM, DENSE)


@torch.no_grad()
def maintain(state: SiteState, weights: Callable[[], Any], *, after_backward: bool, pinned: bool = False) -> None:
    """One turn of a site's upkeep: counts the step, learns where due, judges its quality, sets budget and probes.

    Args:
        weights: gives the FFN's real weights when asked. after_backward: False for the first-use initialisation of a model
            that only runs without gradients. pinned: the site is one of `dense_layers`.
    """
    config = state.settings
    part = config.attention if state.kind == "attention" else config.ffn  # type: ignore[union-attr]
    learns = part.select != "mean" if state.kind == "attention" else part.router != "random" or part.compensation
    if after_backward:
        state.set_counter("steps", state.counter("steps") + 1)
    steps = state.counter("steps")
    interval = config.guard.interval  # type: ignore[union-attr]
    if state.initialised:
        _judge(state, weights, part)
    if learns and (not state.initialised or learning.is_due(steps)):
        learned = learning.learn(
            state, weights() if state.kind == "ffn" else None, density=part.density, seed=config.seed
        )  # type: ignore[union-attr]
        if learned and after_backward:
            _share(state)
    elif not learns and not state.initialised:
        state.set_counter("initialised", 1)
    state.set_budget(_budget(state, part, pinned, config.dense_steps))  # type: ignore[union-attr]
    next_step = steps + 1
    state.set_probe(
        collect=learns and (not state.initialised or learning.is_due(next_step)),
        # The first sparse step is measured, then one in every `guard.interval`.
        measure=state.initialised and (state.counter("measured_at") == 0 or next_step % interval == 0),
        collect_no_grad=learns and not state.initialised,
        measure_no_grad=False,
    )


def _budget(state: SiteState, part: Any, pinned: bool, dense_steps: int) -> float:
    if pinned or state.counter("steps") < dense_steps or not state.initialised:
        return DENSE
    return _LEVELS[state.counter("densified")]


def _judge(state: SiteState, weights: Callable[[], Any], part: Any) -> None:
    """Turns what was observed into metrics, and lets the guard act on them."""
    measured = _attention_quality(state) if state.kind == "attention" else _ffn_quality(state, weights, part)
    if not measured:
        return
    state.metrics.update(measured)
    state.set_counter("measured_at", max(1, state.counter("steps")))
    limit, error = part.max_rel_error, measured["rel_error"]
    if limit is None or error <= limit or state.counter("densified") >= len(_LEVELS) - 1:
        return
    level = state.counter("densified") + 1
    if _LEVELS[level] * part.density > 1:
        level = len(_LEVELS) - 1
    state.set_counter("densified", level)
    warnings.warn(
        f"spt_compiler: {state.path or '?'}/{state.kind} has relative error {error:.3f}, above "
        f"{state.kind}.max_rel_error = {limit}; it becomes {'dense' if _LEVELS[level] < 0 else 'denser'}",
        stacklevel=2,
    )


def _attention_quality(state: SiteState) -> dict[str, float]:
    mass, error, reference, count = state.tensors["quality"].tolist()
    if count <= 0:
        return {}
    state.tensors["quality"].zero_()
    return {"mass": mass / count, "rel_error": (max(error, 0.0) / max(reference, 1e-30)) ** 0.5}


def _ffn_quality(state: SiteState, weights: Callable[[], Any], part: Any) -> dict[str, float]:
    # Fresh rows are there only when they were asked for; measuring before learning makes them held-out data.
    if int(state.tensors["cursor"]) == 0:
        return {}
    return learning.router_quality(state, weights(), part.density)


def _share(state: SiteState) -> None:
    """Makes the state of rank 0 that of every rank: ranks saw different data."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for name in state.spec.inputs:
        if name not in ("sample", "probe"):
            value = state.tensors[name].detach()
            sent = value.to(torch.uint8) if value.dtype == torch.bool else value
            dist.broadcast(sent, src=0)
            if sent is not value:
                value.copy_(sent)


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
