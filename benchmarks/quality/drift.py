"""Drift over fine-tuning: quality of the sites while the weights and the data change, with learning on and off."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import spt_compiler
from spt_compiler import learning

from .tuning import VARIANTS, Recipe, Tuning


def measure(start: Path, recipe: Recipe, interval: int, *, learns: bool) -> dict[str, Any]:
    """{"attention" | "ffn": [(step, error, mass or None), ...], "heldout": loss} of the balanced variant.

    Without learning, what was learned from the first step stays as it was. Errors are the guard's own measurements, mean
    over sites.
    """
    balanced = next(v for v in VARIANTS if v.name == "balanced")
    tuning = Tuning(start, balanced, recipe, seed=0, **{"guard.interval": interval})
    rows: dict[str, list] = {"attention": [], "ffn": []}
    for step in range(recipe.steps):
        if learns or step < 2:  # the first steps initialise the sites
            tuning.step()
        else:
            with mock.patch.object(learning, "is_due", lambda steps: False):
                tuning.step()
        if step % interval == 0 and step > 0:  # what a step measures is read at the start of the next one
            _read(tuning, step, rows)
    return {**rows, "heldout": tuning.evaluate()}


def _read(tuning: Tuning, step: int, rows: dict[str, list]) -> None:
    sites = spt_compiler.metrics(tuning.model)
    for kind, found in rows.items():
        own = [m for site, m in sites.items() if f"/{kind}/" in site and "rel_error" in m]
        if own:
            mass = [m["mass"] for m in own if "mass" in m]
            error = statistics.fmean(m["rel_error"] for m in own)
            found.append((step, error, statistics.fmean(mass) if mass else None))
