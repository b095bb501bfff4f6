"""The goals, and whether the figures reach them."""

from __future__ import annotations

import statistics
from typing import Any

MASS_SHARE = 0.92
TILE_POINTS = 0.01
COSINE = 0.90
LOSS_GAP = 0.01


def of_part(units: dict[str, Any], part: str) -> dict[str, Any]:
    """The units of a part: {name: unit}."""
    return {name: unit for name, unit in units.items() if name.split(".")[0] == part}


def parity_runs(units: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[int, Any]]]:
    """{(architecture, "full" | "lora"): {variant: {seed: run}}}."""
    found: dict[tuple[str, str], dict[str, dict[int, Any]]] = {}
    for name, unit in of_part(units, "parity").items():
        _, architecture, kind, variant, seed = name.split(".")
        found.setdefault((architecture, kind), {}).setdefault(variant, {})[int(seed)] = unit["value"]
    return found


def routers_of(units: dict[str, Any]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{model and text: {router: {density: figures}}}, densities ascending."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for unit in sorted(of_part(units, "ffn").values(), key=lambda unit: unit["value"]["density"]):
        value = unit["value"]
        for router, figures in value["routers"].items():
            found.setdefault(value["name"], {}).setdefault(router, {})[f"{value['density']:.4f}"] = figures
    return found


def judge(units: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (goal, measured, verdict)."""
    return [*_selection(units), _ffn(units), *_parity(units), _guard(units)]


def _verdict(reached: bool, distance: str = "") -> str:
    return "reached" if reached else f"**not reached**{f', {distance}' if distance else ''}"


def _selection(units: dict[str, Any]) -> list[tuple[str, str, str]]:
    values = [unit["value"] for unit in of_part(units, "selection").values()]
    rows = []
    for density, fraction in (("0.1250", "1/8"), ("0.2500", "1/4")):
        goal = f"token pq keeps at least {MASS_SHARE} of the oracle's attention mass at {fraction}"
        shares = {v["name"]: v["rules"]["pq token"][density][0] / v["rules"]["oracle token"][density][0] for v in values}
        if not shares:
            rows.append((goal, "not measured", "open"))
            continue
        worst = min(shares, key=lambda name: shares[name])
        good = sum(share >= MASS_SHARE for share in shares.values())
        mean = statistics.fmean(shares.values())
        text = f"{good} of {len(shares)} models and texts; least {shares[worst]:.3f} ({worst}), mean {mean:.3f}"
        rows.append((goal, text, _verdict(good == len(shares), f"{MASS_SHARE - shares[worst]:.3f} short at worst")))
    goal = "tile pq within 1 point of the mass of mean at every density"
    gaps = {
        (v["name"], d): v["rules"]["mean tile"][d][0] - v["rules"]["pq tile"][d][0] for v in values for d in v["rules"]["pq tile"]
    }
    if not gaps:
        return [*rows, (goal, "not measured", "open")]
    worst = max(gaps, key=lambda key: gaps[key])
    good = sum(gap <= TILE_POINTS for gap in gaps.values())
    text = f"{good} of {len(gaps)} cases; largest gap {100 * gaps[worst]:.1f} points ({worst[0]}, density {float(worst[1]):g})"
    short = f"{100 * (gaps[worst] - TILE_POINTS):.1f} points over at worst"
    return [*rows, (goal, text, _verdict(good == len(gaps), short))]


def _ffn(units: dict[str, Any]) -> tuple[str, str, str]:
    goal = f"FFN at 1/2 on MiniLM, training-free: cosine at least {COSINE:.2f}"
    if "ffn.minilm.50" not in units:
        return goal, "not measured", "open"
    value = units["ffn.minilm.50"]["value"]["routers"]["learned"]
    text = f"{value['token_cosine']:.3f} over tokens, {value['cosine']:.3f} of sentence means"
    return goal, text, _verdict(value["token_cosine"] >= COSINE, f"{COSINE - value['token_cosine']:.3f} short over tokens")


def _parity(units: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for (architecture, kind), variants in parity_runs(units).items():
        final = {name: {seed: run["heldout"][-1][1] for seed, run in runs.items()} for name, runs in variants.items()}
        seeds = set.intersection(*(set(runs) for runs in final.values()))
        where = f"{architecture}, {'all weights' if kind == 'full' else 'LoRA'}"
        goals = (f"held-out loss within 1 % of dense ({where})", f"no worse than any baseline at equal density ({where})")
        if not seeds or not {"dense", "balanced"} <= final.keys():
            rows += [(goal, "not measured", "open") for goal in goals]
            continue
        mean = {name: statistics.fmean(runs[seed] for seed in seeds) for name, runs in final.items()}
        gap = mean["balanced"] / mean["dense"] - 1
        verdict = _verdict(gap <= LOSS_GAP, f"{100 * (gap - LOSS_GAP):.2f} points over")
        rows.append((goals[0], f"{100 * gap:+.2f} %, seeds: {len(seeds)}", verdict))
        others = {name: loss for name, loss in mean.items() if name not in ("dense", "balanced")}
        if others:
            best = min(others, key=lambda name: others[name])
            text = f"{mean['balanced']:.4f} against {others[best]:.4f} of the best baseline ({best})"
            verdict = _verdict(mean["balanced"] <= others[best], f"{mean['balanced'] - others[best]:.4f} above")
            rows.append((goals[1], text, verdict))
    return rows or [("held-out loss within 1 % of dense, no worse than any baseline", "not measured", "open")]


def _guard(units: dict[str, Any]) -> tuple[str, str, str]:
    goal = "the guard finds a spoiled site within one interval and makes just that one denser"
    if "guard" not in units:
        return goal, "not measured", "open"
    value = units["guard"]["value"]
    found = value["spoiled"].values()
    timely = sum(f["steps"] is not None and f["steps"] <= value["interval"] + 1 for f in found)
    alone = sum(not f["others"] for f in found)
    text = f"{timely} of {len(found)} sites found in time; no other site made denser in {alone} of {len(found)} runs"
    return goal, text, _verdict(timely == alone == len(found))
