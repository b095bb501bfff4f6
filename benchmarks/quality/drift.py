"""Drift over fine-tuning: quality of the sites while the weights and the data change, with learning on and off."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import spt_compiler
from spt_compiler import learning

from .tuning import VARIANTS, Recipe, Tuning


def measure(start: Path, recipe: Recipe, interval: int, log: Callable[[str], None]) -> dict[str, Any]:
    """{"on" | "off": {"attention" | "ffn": [(step, error, mass or None), ...], "heldout": loss}} of the balanced variant.

    Off: what was learned from the first step stays as it was. Errors are the guard's own measurements, mean over sites.
    """
    results: dict[str, Any] = {}
    balanced = next(v for v in VARIANTS if v.name == "balanced")
    for name in ("on", "off"):
        tuning = Tuning(start, balanced, recipe, seed=0, **{"guard.interval": interval})
        rows: dict[str, list] = {"attention": [], "ffn": []}
        for step in range(recipe.steps):
            if name == "off" and step >= 2:  # the first steps initialise the sites
                with mock.patch.object(learning, "is_due", lambda steps: False):
                    tuning.step()
            else:
                tuning.step()
            # What a step measures is read at the start of the next one.
            if step % interval == 0 and step > 0:
                _read(tuning, step, rows)
        results[name] = {**rows, "heldout": tuning.evaluate()}
        log(f"drift, learning {name}: held-out {results[name]['heldout']:.4f}")
    return results


def _read(tuning: Tuning, step: int, rows: dict[str, list]) -> None:
    sites = spt_compiler.metrics(tuning.model)
    for kind, found in rows.items():
        own = [m for site, m in sites.items() if f"/{kind}/" in site and "rel_error" in m]
        if own:
            mass = [m["mass"] for m in own if "mass" in m]
            error = statistics.fmean(m["rel_error"] for m in own)
            found.append((step, error, statistics.fmean(mass) if mass else None))
