"""The guard on spoiled sites: does it find just the one that was spoiled, and within one interval?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import spt_compiler
from spt_compiler import routing
from spt_compiler.state import STORE

from .tuning import VARIANTS, Recipe, Tuning

INTERVAL = 4
_SPOILED = ("codebook", "router_weight", "router_bias", "always_on")
MARGIN = 2.0  # limits are so many times the clean error


def measure(start: Path, recipe: Recipe, log: Callable[[str], None]) -> dict[str, Any]:
    """Spoils each site of one fine-tuning in turn, and puts it back when it was found.

    A spoiled attention site has its codewords negated, so that it prefers the keys least alike; a spoiled FFN has a random
    router. Every site's limit is `MARGIN` times its own error before.
    Returns: {"interval", "clean": {site: error}, "spoiled": {site: {"error", "steps", "others"}}}; error: when it was found;
        steps: until it was denser, None if it was not within two intervals; others: {site: error} of those made denser as well.
    """
    torch.manual_seed(0)
    tuning = _train(start, recipe, {})
    states = dict(STORE.named_states(tuning.model))
    errors = {site: m["rel_error"] for site, m in spt_compiler.metrics(tuning.model).items()}
    limits = {f"{s.path}/{s.kind}": {f"{s.kind}.max_rel_error": MARGIN * errors[name]} for name, s in states.items()}
    tuning = _train(start, recipe, {"sites": limits})
    states = dict(STORE.named_states(tuning.model))
    _settle(tuning, states)  # a site that has just begun to learn may well have missed its limit
    spoiled = {}
    for site, state in states.items():
        whole = {name: value.detach().clone() for name, value in state.tensors.items() if name in _SPOILED}
        _spoil(state)
        steps = error = None
        for step in range(1, 2 * INTERVAL + 1):
            _quiet_steps(tuning, 1)
            if state.counter("densified"):
                steps, error = step, state.metrics["rel_error"]
                break
        others = {n: s.metrics["rel_error"] for n, s in states.items() if s is not state and s.counter("densified")}
        spoiled[site] = {"error": error, "steps": steps, "others": others}
        log(f"guard, {site}: {spoiled[site]}")
        state.assign(**whole)
        _settle(tuning, states)
    return {"interval": INTERVAL, "clean": errors, "spoiled": spoiled}


def _settle(tuning: Tuning, states: dict[str, Any]) -> None:
    """Every site as dense as configured, and whatever was observed before read and forgotten."""
    for steps in (INTERVAL + 1, 0):
        for state in states.values():
            state.set_counter("densified", 0)
        _quiet_steps(tuning, steps)


def _train(start: Path, recipe: Recipe, options: dict[str, Any]) -> Tuning:
    balanced = next(v for v in VARIANTS if v.name == "balanced")
    tuning = Tuning(start, balanced, recipe, seed=0, **{"guard.interval": INTERVAL, **options})
    _quiet_steps(tuning, 3 * INTERVAL + 1)  # what a step measures is read at the start of the next one
    return tuning


def _quiet_steps(tuning: Tuning, steps: int) -> None:
    """Steps without the guard's warnings: here they are what is measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            tuning.step()


def _spoil(state: Any) -> None:
    if state.kind == "attention":
        state.assign(codebook=-state.tensors["codebook"].detach())
    else:
        n_blocks, width = state.tensors["router_weight"].shape
        weight, bias = routing.random_router(n_blocks, width, seed=0)
        state.assign(router_weight=weight, router_bias=bias, always_on=torch.zeros(n_blocks, dtype=torch.bool))
