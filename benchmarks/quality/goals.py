"""The goals, and whether the figures reach them."""

from __future__ import annotations

import statistics
from typing import Any

from .tuning import VARIANTS

MASS_SHARE = 0.92
TILE_POINTS = 0.01
COSINE = 0.90
LOSS_GAP = 0.01


def of_part(units: dict[str, Any], part: str) -> dict[str, Any]:
    """The units of a part: {name: unit}."""
    return {name: unit for name, unit in units.items() if name.split(".")[0] == part}


def parity_runs(units: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[int, Any]]]:
    """{(name of the model, "full" | "lora"): {variant: {seed: run}}}."""
    found: dict[tuple[str, str], dict[str, dict[int, Any]]] = {}
    for name, unit in of_part(units, "parity").items():
        _, model, kind, variant, seed = name.split(".")
        run = unit["value"]
        found.setdefault((run.get("name", f"{model} LM"), kind), {}).setdefault(variant, {})[int(seed)] = run
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


def _against(own: dict[int, float], other: dict[int, float]) -> tuple[float, float, int] | None:
    """(mean of own, mean of other, how many) over the seeds that both have; seeds differ more than variants do."""
    seeds = own.keys() & other.keys()
    return (statistics.fmean(own[s] for s in seeds), statistics.fmean(other[s] for s in seeds), len(seeds)) if seeds else None


def _parity(units: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for (model, kind), variants in parity_runs(units).items():
        final = {name: {seed: run["heldout"][-1][1] for seed, run in runs.items()} for name, runs in variants.items()}
        where = f"{model}, {'all weights' if kind == 'full' else 'LoRA'}"
        goals = (f"held-out loss within 1 % of dense ({where})", f"no worse than any baseline at equal density ({where})")
        mean = {name: _against(final.get("balanced", {}), runs) for name, runs in final.items() if name != "balanced"}
        if mean.get("dense") is None:
            rows.append((goals[0], "not measured", "open"))
        else:
            own, dense, n = mean["dense"]
            verdict = _verdict(own / dense - 1 <= LOSS_GAP, f"{100 * (own / dense - 1 - LOSS_GAP):.2f} points over")
            rows.append((goals[0], f"{100 * (own / dense - 1):+.2f} %, seeds: {n}", verdict))
        rivals = {v.name: mean[v.name] for v in VARIANTS if v.baseline and mean.get(v.name) is not None}
        if not rivals:
            rows.append((goals[1], "not measured", "open"))
            continue
        best = max(rivals, key=lambda name: rivals[name][0] / rivals[name][1])
        own, other, n = rivals[best]
        measured = f"{own:.4f} against {other:.4f} of {best} (measured: {', '.join(rivals)}), seeds: {n}"
        rows.append((goals[1], measured, _verdict(own <= other, f"{100 * (own / other - 1):.2f} % above")))
    return rows or [("held-out loss within 1 % of dense, no worse than any baseline", "not measured", "open")]


def _guard(units: dict[str, Any]) -> tuple[str, str, str]:
    goal = "the guard finds a spoiled site within one interval and makes just that one denser"
    if "guard" not in units:
        return goal, "not measured", "open"
    value = units["guard"]["value"]
    spoiled = value["spoiled"]
    harmed = [f for f in spoiled.values() if f["steps"] is not None or f["error"] > value["margin"] * f["before"]]
    timely = sum(f["steps"] is not None and f["steps"] <= value["interval"] + 1 for f in harmed)
    alone = sum(not f["others"] for f in spoiled.values())
    text = f"{timely} of {len(harmed)} sites beyond their limits found in time ({len(spoiled)} spoiled); "
    text += f"no other site made denser in {alone} of {len(spoiled)} runs"
    return goal, text, _verdict(timely == len(harmed) > 0 and alone == len(spoiled))
