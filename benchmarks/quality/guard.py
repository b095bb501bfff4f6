"""The guard on spoiled sites: does it find just the one that was spoiled, and within one interval?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import spt_compiler
from spt_compiler.state import STORE

from .tuning import VARIANTS, Recipe, Tuning

INTERVAL = 4
_SPOILED = ("codebook", "router_weight", "router_bias", "always_on")
MARGIN = 1.5  # limits lie this far above the worst clean site of a kind


def measure(start: Path, recipe: Recipe, log: Callable[[str], None]) -> dict[str, Any]:
    """Spoils each site of one fine-tuning in turn, and puts it back when it was found.

    A spoiled attention site has random codewords; a spoiled FFN prefers the blocks that it needs least.
    Returns: {"interval", "limits": {kind: error}, "clean": {site: error}, "spoiled": {site: {"error", "steps", "others"}}};
        steps: until it was denser, None if it was not within two intervals; others: how many other sites were made denser.
    """
    torch.manual_seed(0)
    clean = _train(start, recipe, {}, 3 * INTERVAL)
    errors = {site: m["rel_error"] for site, m in spt_compiler.metrics(clean.model).items()}
    limits = {k: MARGIN * max(e for s, e in errors.items() if f"/{k}/" in s) for k in ("attention", "ffn")}
    tuning = _train(start, recipe, {f"{kind}.max_rel_error": limit for kind, limit in limits.items()}, 2 * INTERVAL)
    states = dict(STORE.named_states(tuning.model))
    _settle(tuning, states)  # a site that has just begun to learn may well have missed its limit
    spoiled = {}
    for site, state in states.items():
        whole = {name: value.detach().clone() for name, value in state.tensors.items() if name in _SPOILED}
        _spoil(state)
        steps = error = None
        for step in range(1, 2 * INTERVAL + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuning.step()
            if state.counter("densified"):
                steps, error = step, state.metrics["rel_error"]
                break
        others = sum(s.counter("densified") > 0 for s in states.values() if s is not state)
        spoiled[site] = {"error": error, "steps": steps, "others": others}
        log(f"guard, {site}: {spoiled[site]}")
        state.assign(**whole)
        _settle(tuning, states)
    return {"interval": INTERVAL, "limits": limits, "clean": errors, "spoiled": spoiled}


def _settle(tuning: Tuning, states: dict[str, Any]) -> None:
    """Every site as dense as configured, and whatever was observed before read and forgotten."""
    for final in (False, True):
        for state in states.values():
            state.set_counter("densified", 0)
        for _ in range(0 if final else INTERVAL + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuning.step()


def _train(start: Path, recipe: Recipe, options: dict[str, Any], steps: int) -> Tuning:
    balanced = next(v for v in VARIANTS if v.name == "balanced")
    tuning = Tuning(start, balanced, recipe, seed=0, **{"guard.interval": INTERVAL, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            tuning.step()
    return tuning


def _spoil(state: Any) -> None:
    if state.kind == "ffn":
        state.assign(
            router_weight=-state.tensors["router_weight"].detach(),
            router_bias=-state.tensors["router_bias"].detach(),
            always_on=torch.zeros_like(state.tensors["always_on"]),
        )
    else:
        codebook = state.tensors["codebook"].detach()
        noise = torch.randn(codebook.shape, generator=torch.Generator().manual_seed(0))
        state.assign(codebook=noise * codebook.std())
