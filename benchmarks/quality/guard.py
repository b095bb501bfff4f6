"""The guard on spoiled sites: does it find just the one that was spoiled, and within one interval?"""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import spt_compiler
from spt_compiler import routing
from spt_compiler.state import STORE

from .tuning import VARIANTS, Recipe, Tuning

INTERVAL = 8
# What is spoiled, and what an update in between fits to it, at that site and at others that read what it makes.
_LEARNED = (
    *("codebook", "key_mean", "query_moment", "permutation", "router_weight", "router_bias", "always_on"),
    *("compensation", "correction_in", "correction_shift", "correction_out"),
)
MARGIN = 1.5  # limits are so many times the clean error, a mean over intervals
CLEAN_INTERVALS = 4


def measure(start: Path, recipe: Recipe, log: Callable[[str], None]) -> dict[str, Any]:
    """Spoils each site of one fine-tuning in turn, and puts all sites back when it was found.

    A spoiled attention site has its codewords zeroed, so that it cannot tell a key from another; a spoiled FFN has a random
    router. Sites are spoiled right after a turn of the guard. Every site's limit is `MARGIN` times its own error before.
    Returns: {"interval", "margin", "spoiled": {site: {"before", "error", "steps", "others"}}, "false_alarms", "checks"}; before:
        relative error before, a mean over intervals; error: the last that was measured; steps: until it was denser, None if it was
        not within two intervals; others: {site: error} of those made denser as well; false_alarms: how many of `checks` judgements
        of clean sites, before any was spoiled, found one.
    """
    torch.manual_seed(0)
    tuning = _train(start, recipe)
    states = dict(STORE.named_states(tuning.model))
    settings = {site: state.settings for site, state in states.items()}
    _set_limits(states, settings, _errors(tuning, states, CLEAN_INTERVALS))
    alarms = 0
    for _ in range(CLEAN_INTERVALS):
        _quiet_steps(tuning, INTERVAL)
        alarms += sum(bool(state.counter("densified")) for state in states.values())
        _forgive(states)
    spoiled = {}
    for site, state in states.items():
        before = _errors(tuning, states, CLEAN_INTERVALS // 2)  # anew: training goes on, and errors with it
        _set_limits(states, settings, before)
        whole = {name: _learned(s) for name, s in states.items()}
        _spoil(state)
        steps = None
        for step in range(1, 2 * INTERVAL + 1):
            _quiet_steps(tuning, 1)
            if state.counter("densified"):
                steps = step
                break
        error = state.metrics["rel_error"]
        others = {n: s.metrics["rel_error"] for n, s in states.items() if s is not state and s.counter("densified")}
        spoiled[site] = {"before": before[site], "error": error, "steps": steps, "others": others}
        log(f"guard, {site}: {spoiled[site]}")
        for name, (tensors, fitted_keep) in whole.items():
            states[name].assign(**tensors)
            states[name].set_counter("fitted_keep", fitted_keep)
        _forgive(states)
        _quiet_steps(tuning, INTERVAL)  # an interval with every site whole
        _forgive(states)
    for site, state in states.items():
        state.settings = settings[site]
    checks = CLEAN_INTERVALS * len(states)
    return {"interval": INTERVAL, "margin": MARGIN, "spoiled": spoiled, "false_alarms": alarms, "checks": checks}


def _errors(tuning: Tuning, states: dict[str, Any], intervals: int) -> dict[str, float]:
    """{site: relative error}, a mean over intervals of training in which no site is made denser for good."""
    errors: dict[str, list[float]] = {site: [] for site in states}
    for _ in range(intervals):
        _quiet_steps(tuning, INTERVAL)
        _forgive(states)
        for site, figures in spt_compiler.metrics(tuning.model).items():
            errors[site].append(figures["rel_error"])
    return {site: statistics.fmean(values) for site, values in errors.items()}


def _set_limits(states: dict[str, Any], settings: dict[str, Any], errors: dict[str, float]) -> None:
    for site, state in states.items():
        part = dataclasses.replace(getattr(settings[site], state.kind), max_rel_error=MARGIN * errors[site])
        state.settings = dataclasses.replace(settings[site], **{state.kind: part})


def _learned(state: Any) -> tuple[dict[str, torch.Tensor], int]:
    """A copy of what a site has learned, and for how many blocks."""
    tensors = {name: value.detach().clone() for name, value in state.tensors.items() if name in _LEARNED}
    return tensors, state.counter("fitted_keep")


def _forgive(states: dict[str, Any]) -> None:
    """Every site as dense as configured from the next step on."""
    for state in states.values():
        state.set_counter("densified", 0)
        state.set_counter("misses", 0)


def _train(start: Path, recipe: Recipe) -> Tuning:
    """A fine-tuning that has just been judged: the call after a step reads what that step measured."""
    balanced = next(v for v in VARIANTS if v.name == "balanced")
    tuning = Tuning(start, balanced, recipe, seed=0, **{"guard.interval": INTERVAL})
    _quiet_steps(tuning, 2 * INTERVAL + 1)
    return tuning


def _quiet_steps(tuning: Tuning, steps: int) -> None:
    """Steps without the guard's warnings: here they are what is measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            tuning.step()


def _spoil(state: Any) -> None:
    if state.kind == "attention":
        state.assign(codebook=torch.zeros_like(state.tensors["codebook"]))
    else:
        n_blocks, width = state.tensors["router_weight"].shape
        weight, bias = routing.random_router(n_blocks, width, seed=0)
        state.assign(router_weight=weight, router_bias=bias, always_on=torch.zeros(n_blocks, dtype=torch.bool))
