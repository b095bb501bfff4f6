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
MARGIN = 1.5  # limits lie this far above the worst clean site of a kind


def measure(start: Path, recipe: Recipe, log: Callable[[str], None]) -> dict[str, Any]:
    """Spoils each site of a fine-tuning in turn, each time from the start.

    A spoiled attention site has codewords that mean nothing (or, under a rule without codebooks, there is nothing to spoil); a
    spoiled FFN site prefers the blocks that it needs least.
    Returns: {"interval", "limits": {kind: error}, "clean": {site: error}, "spoiled": {site: {"error", "steps", "others"}}};
        steps: until it was denser, None if it was not within two intervals; others: how many other sites were made denser.
    """
    torch.manual_seed(0)
    clean = _train(start, recipe, {}, 3 * INTERVAL)
    errors = {site: m["rel_error"] for site, m in spt_compiler.metrics(clean.model).items()}
    limits = {k: MARGIN * max(e for s, e in errors.items() if f"/{k}/" in s) for k in ("attention", "ffn")}
    options = {f"{kind}.max_rel_error": limit for kind, limit in limits.items()}
    spoiled = {}
    for site in errors:
        tuning = _train(start, recipe, options, 2 * INTERVAL)
        states = dict(STORE.named_states(tuning.model))
        before = {name: state.counter("densified") for name, state in states.items()}
        _spoil(states[site])
        steps = error = None
        for step in range(1, 2 * INTERVAL + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuning.step()
            if states[site].counter("densified") > before[site]:
                steps, error = step, states[site].metrics["rel_error"]
                break
        others = sum(s.counter("densified") > before[n] for n, s in states.items() if n != site)
        spoiled[site] = {"error": error, "steps": steps, "others": others}
        log(f"guard, {site}: {spoiled[site]}")
    return {"interval": INTERVAL, "limits": limits, "clean": errors, "spoiled": spoiled}


def _train(start: Path, recipe: Recipe, options: dict[str, Any], steps: int) -> Tuning:
    balanced = next(v for v in VARIANTS if v.name == "balanced")
    tuning = Tuning(start, balanced, recipe, seed=0, **{"guard.interval": INTERVAL, **options})
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
