"""Tables, plots and the verdict on each goal, from the collected figures; writes Markdown and PNG."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from spt_compiler.cli.training import write_json

from . import attention, ffn, goals
from .goals import of_part, parity_runs

REMARKS = ("<!-- remarks: kept when the page is written anew -->", "<!-- end of remarks -->")
_FRACTIONS = {"0.0625": "1/16", "0.1250": "1/8", "0.2500": "1/4", "0.5000": "1/2", "0.7500": "3/4"}
# One colour and one line per rule in every plot; the product's rules are solid.
_STYLE = {
    "oracle": ("#555555", ":"), "pq": ("#0b6e99", "-"), "mean": ("#d9730d", "-"), "pq-match": ("#7a4fbf", "-"),
    "window": ("#4d8f3a", "--"), "random": ("#b0b0b0", "--"), "learned": ("#0b6e99", "-"),
    "learned, means only": ("#5fa3c4", "-."), "learned, blocks only": ("#a5cde0", "-."),
    "contiguous + LS": ("#7a4fbf", "--"), "static": ("#d9730d", "-"),
    "dense": ("#222222", "-"), "balanced": ("#0b6e99", "-"), "paper": ("#7a4fbf", "-"),
    "finer": ("#5fa3c4", "-"),
}  # fmt: skip


def write(results: dict[str, Any], out: Path, publish: Path | None = None) -> list[Path]:
    """Writes quality.md, its plots and quality.json.

    Args: results: of `parts.collect`.  out: folder.  publish: root of the repository, to write docs/ and
        benchmarks/results/ as well.
    Returns: the paths written.
    """
    written = []
    targets = [(out, out / "plots", out / "quality.json")]
    if publish is not None:
        targets.append((publish / "docs", publish / "docs" / "quality", publish / "benchmarks" / "results" / "quality.json"))
    for folder, plots, data in targets:
        for parent in (folder, plots, data.parent):
            parent.mkdir(parents=True, exist_ok=True)
        pictures = draw(results, plots)
        page = folder / "quality.md"
        page.write_text(_page(results, {name: f"{plots.name}/{path.name}" for name, path in pictures.items()}, _remarks(page)))
        write_json(data, results)
        written += [page, data, *pictures.values()]
    return written


def _remarks(page: Path) -> str:
    text = page.read_text() if page.exists() else ""
    start, end = text.find(REMARKS[0]), text.find(REMARKS[1])
    return text[start + len(REMARKS[0]) : end].strip() if 0 <= start < end else ""


# ---- the page -------------------------------------------------------------------------------------------------------


def _page(results: dict[str, Any], pictures: dict[str, str], remarks: str) -> str:
    units = results["units"]
    sections = [_INTRODUCTION, _conditions(results)]
    sections.append("## Goals\n\n" + table(("goal", "measured", "verdict"), goals.judge(units)))
    sections.append(f"## Remarks\n\n{REMARKS[0]}\n{remarks}\n{REMARKS[1]}")
    for title, part, text, body in (
        ("Models", "models", _MODELS, _models),
        ("Selection of keys", "selection", _SELECTION, _selection),
        ("FFN routers", "ffn", _FFN, _routers),
        ("Drift", "drift", _DRIFT, _drift),
        ("Guard", "guard", _GUARD, _guard),
        ("Fine-tuning parity", "parity", _PARITY, _parity),
    ):
        if not of_part(units, part):
            sections.append(f"## {title}\n\nNot measured in this run.")
            continue
        shown = [f"![{title}]({pictures[name]})" for name in pictures if name.split("_")[0] == part]
        sections.append("\n\n".join([f"## {title}", text, *shown, body(units)]))
    return "\n\n".join(sections) + "\n"


def table(columns: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _conditions(results: dict[str, Any]) -> str:
    machine, units = results["machine"], results["units"]
    dates = sorted({unit["conditions"]["date"][:10] for unit in units.values()})
    rows = []
    for part in dict.fromkeys(name.split(".")[0] for name in units):
        own = of_part(units, part).values()
        commits = ", ".join(sorted({f"`{unit['conditions']['commit']}`" for unit in own}))
        rows.append((part, len(own), commits, f"{sum(unit['cpu_seconds'] for unit in own) / 60:.1f} min"))
    text = (
        f"Measured on {' to '.join(dict.fromkeys((dates[0], dates[-1])))} with {machine['processor']} ({machine['cores']} cores), "
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}, fp32. The machine "
        "also did other work: CPU time is that of the process, and no figure here is a wall time except where it says so."
        if dates
        else "Nothing measured yet."
    )
    return f"{text}\n\n{table(('part', 'runs', 'code measured', 'CPU time'), rows)}"


def _models(units: dict[str, Any]) -> str:
    rows = []
    for name, unit in of_part(units, "models").items():
        value = unit["value"]
        losses = ", ".join(f"{loss:.3f} at {length}" for length, loss in value["heldout"].items())
        rows.append((" ".join(name.split(".")[1:]), f"{value['parameters'] / 1e6:.1f} M", value["steps"], losses))
    return table(("model", "parameters", "steps of 2048 bytes", "held-out loss (nats per byte)"), rows)


def _selection(units: dict[str, Any]) -> str:
    parts = []
    for density in ("0.1250", "0.2500"):
        rows = []
        for unit in of_part(units, "selection").values():
            rules = unit["value"]["rules"]
            rows.append((unit["value"]["name"], *(_pair(rules[rule][density]) for rule in attention.RULES)))
        parts.append(f"Density {_FRACTIONS[density]}, mass in % / relative error:\n\n" + table(("model", *attention.RULES), rows))
    return "\n\n".join(parts)


def _pair(values: list[float]) -> str:
    return f"{100 * values[0]:.0f} / {values[1]:.2f}".replace("0.", ".")


def _routers(units: dict[str, Any]) -> str:
    parts = []
    found = goals.routers_of(units)
    for density in sorted(f"{d:.4f}" for d in ffn.DENSITIES):
        rows = []
        for name, routers in found.items():
            if density in routers["learned"]:
                rows.append((name, *(_router_cell(routers[router][density]) for router in ffn.ROUTERS)))
        if rows:
            title = f"Density {_FRACTIONS[density]}, layer error / cosine of tokens / loss increase (language models):"
            parts.append(f"{title}\n\n{table(('model', *ffn.ROUTERS), rows)}")
    return "\n\n".join(parts)


def _router_cell(value: dict[str, float]) -> str:
    words = [f"{value['error']:.2f}"]
    if "token_cosine" in value:
        words.append(f"{value['token_cosine']:.3f}")
    if "loss" in value:
        words.append(f"{value['loss']:+.3f}")
    return " / ".join(words)


def _drift(units: dict[str, Any]) -> str:
    rows = []
    for name, unit in of_part(units, "drift").items():
        value = unit["value"]
        for kind in ("attention", "ffn"):
            points = value[kind]
            last = statistics.fmean(p[1] for p in points[-max(1, len(points) // 4) :])
            rows.append((name.split(".")[1], kind, f"{points[0][1]:.3f}", f"{last:.3f}", f"{value['heldout']:.4f}"))
    return table(("learning", "sites", "error at the start", "error in the last quarter", "held-out loss at the end"), rows)


def _guard(units: dict[str, Any]) -> str:
    value = units["guard"]["value"]
    rows = []
    for site, found in value["spoiled"].items():
        steps = "not found" if found["steps"] is None else found["steps"]
        others = ", ".join(f"`{name}` ({other:.2f})" for name, other in found["others"].items()) or "none"
        figures = (found["before"], value["margin"] * found["before"], found["error"])
        rows.append((f"`{site}`", *(f"{x:.3f}" for x in figures), steps, others))
    columns = ("site", "error before", "limit", "error spoiled", "steps until denser", "other sites made denser")
    alarms = f"{value['false_alarms']} false alarms in {value['checks']} judgements of clean sites"
    return f"Judged every {value['interval']} steps; {alarms}.\n\n" + table(columns, rows)


def _parity(units: dict[str, Any]) -> str:
    parts = []
    for (model, kind), variants in parity_runs(units).items():
        dense = _finals(variants.get("dense", {}))
        rows = []
        for name, runs in variants.items():
            finals = _finals(runs)
            mean, spread = _mean_spread(list(finals.values()))
            # Seeds differ more from each other than variants do: compare run by run.
            gaps = [100 * (finals[seed] / dense[seed] - 1) for seed in finals if seed in dense]
            gap, gap_spread = _mean_spread(gaps)
            finalized = statistics.fmean(run["dense"] for run in runs.values())
            speed = _speeds(units, model, kind).get(name)
            rows.append(
                (name, len(runs), f"{mean:.4f} ± {spread:.4f}", f"{gap:+.2f} % ± {gap_spread:.2f}", f"{finalized:.4f}",
                 f"{speed['ratio']:.2f}" if speed else "-", f"{statistics.median(r['cpu_seconds'] for r in runs.values()):.0f} s")
            )  # fmt: skip
        columns = ("variant", "seeds", "held-out loss", "against dense", "same weights run dense", "step time / dense", "CPU time")
        title = {"full": "all weights", "lora": "LoRA of rank 8 on every linear layer"}[kind]
        parts.append(f"{model}, {title}:\n\n{table(columns, rows)}")
        own = [run for run in variants.get("balanced", {}).values() if "upkeep_seconds" in run]
        if own:
            share = sum(run["upkeep_seconds"] for run in own) / sum(run["cpu_seconds"] for run in own)
            steps = own[0]["heldout"][-1][0]
            parts.append(
                f"Upkeep (learning and judging between the steps) took {100 * share:.0f} % of the CPU time of the {steps} steps of "
                '"balanced", in which sites learn at steps 1, 2, 4, 8, 16 and every 32.'
            )
    return "\n\n".join(parts)


def _speeds(units: dict[str, Any], model: str, kind: str) -> dict[str, Any]:
    """Step times of the variants, {} for a model whose steps were not timed."""
    speed = units.get("speed", {}).get("value", {})
    return speed.get(kind, {}) if speed.get("name") == model else {}


def _finals(runs: dict[int, Any]) -> dict[int, float]:
    return {seed: run["heldout"][-1][1] for seed, run in runs.items()}


def _mean_spread(values: list[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# ---- the plots ------------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Draws what there is: {name: path}. Without matplotlib nothing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return {}
    units, paths = results["units"], {}
    for name, figure in (
        ("selection_mass", _draw_selection(plt, units, 0, "attention mass kept")),
        ("selection_error", _draw_selection(plt, units, 1, "relative output error")),
        ("ffn_routers", _draw_ffn(plt, units)),
        ("drift", _draw_drift(plt, units)),
        ("parity", _draw_parity(plt, units)),
    ):
        if figure is not None:
            paths[name] = folder / f"{name}.png"
            figure.savefig(paths[name], dpi=80)
            plt.close(figure)
    return paths


def _grid(plt: Any, n: int, width: int, size: tuple[float, float], **options: Any) -> tuple[Any, list]:
    """A figure of n panels in rows of `width`; panels beyond n are hidden."""
    width = min(n, width)
    height = -(-n // width)
    figure, axes = plt.subplots(
        height, width, figsize=(size[0] * width, size[1] * height), squeeze=False, layout="constrained", **options
    )
    panels = list(axes.flat)
    for spare in panels[n:]:
        spare.set_visible(False)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, panels


def _density_axis(panel: Any, densities: list[str]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks([float(d) for d in densities], [_FRACTIONS[d] for d in densities])
    panel.minorticks_off()
    panel.set_xlabel("density", fontsize=8)


def _draw_selection(plt: Any, units: dict[str, Any], which: int, label: str) -> Any:
    subjects = [unit["value"] for unit in of_part(units, "selection").values()]
    if not subjects:
        return None
    figure, panels = _grid(plt, 2 * len(subjects), 4, (3.1, 2.7), sharey=True)
    for i, subject in enumerate(subjects):
        for panel, rules, title in (
            (panels[2 * i], attention.KEY_RULES, "single keys"),
            (panels[2 * i + 1], attention.TILE_RULES, "tiles 64 x 16"),
        ):
            for rule in rules:
                points = subject["rules"][rule]
                colour, line = _STYLE[rule.split()[0]]
                values = [v[which] for v in points.values()]
                panel.plot([float(d) for d in points], values, line, color=colour, marker="o", ms=3, label=rule.split()[0])
            _density_axis(panel, list(points))
            panel.set_title(f"{subject['name']}: {title}", fontsize=8)
            panel.set_ylim(0, 1)
    for panel in panels[::4]:
        panel.set_ylabel(label)
    handles = {}
    for panel in panels[:2]:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6 if len(panels) > 2 else 3, frameon=False)
    return figure


def _draw_ffn(plt: Any, units: dict[str, Any]) -> Any:
    found = goals.routers_of(units)
    if not found:
        return None
    figure, panels = _grid(plt, 2 * len(found), 4, (3.1, 2.7))
    for i, (name, routers) in enumerate(found.items()):
        for panel, what, title in (
            (panels[2 * i], "error", "layer error"),
            (panels[2 * i + 1], "token_cosine", "cosine, end to end"),
        ):
            for router in ffn.ROUTERS:
                points = {d: v[what] for d, v in routers[router].items() if what in v}
                if points:
                    colour, line = _STYLE[router]
                    densities = [float(d) for d in points]
                    panel.plot(densities, list(points.values()), line, color=colour, marker="o", ms=3, label=router)
            _density_axis(panel, list(routers["learned"]))
            panel.set_title(f"{name}: {title}", fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7 if len(panels) > 2 else 3, frameon=False
    )
    return figure


def _draw_drift(plt: Any, units: dict[str, Any]) -> Any:
    runs = {name.split(".")[1]: unit["value"] for name, unit in of_part(units, "drift").items()}
    if not runs:
        return None
    figure, panels = _grid(plt, 2, 2, (4.2, 2.9))
    for panel, kind in zip(panels, ("attention", "ffn"), strict=False):
        for name, value in runs.items():
            points, colour = value[kind], {"on": "#0b6e99", "off": "#d9730d"}[name]
            panel.plot([p[0] for p in points], [p[1] for p in points], color=colour, marker="o", ms=3, label=f"learning {name}")
        panel.set_title(f"{kind} sites", fontsize=9)
        panel.set_xlabel("steps on the new domain")
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("relative output error")
    panels[0].legend(frameon=False)
    return figure


def _draw_parity(plt: Any, units: dict[str, Any]) -> Any:
    runs = parity_runs(units)
    if not runs:
        return None
    figure, panels = _grid(plt, 2 * len(runs), 2, (5.2, 3.2))
    titles = {"full": "all weights", "lora": "LoRA"}
    for i, ((model, kind), variants) in enumerate(runs.items()):
        speeds = _speeds(units, model, kind)
        steps_panel, time_panel = panels[2 * i : 2 * i + 2]
        for name, by_seed in variants.items():
            curves = [dict(map(tuple, run["heldout"])) for run in by_seed.values()]
            steps = sorted(set.intersection(*(set(c) for c in curves)))
            mean = [statistics.fmean(c[s] for c in curves) for s in steps]
            low, high = ([pick(c[s] for c in curves) for s in steps] for pick in (min, max))
            colour, line = _STYLE[name]
            steps_panel.plot(steps, mean, line, color=colour, marker="o", ms=3, label=name)
            steps_panel.fill_between(steps, low, high, color=colour, alpha=0.12)
            if name in speeds:
                seconds = [s * speeds[name]["ratio"] * speeds["dense"]["seconds"] for s in steps]
                time_panel.plot(seconds, mean, line, color=colour, marker="o", ms=3, label=name)
        time_panel.set_visible(bool(speeds))
        steps_panel.set_title(f"{model}, {titles[kind]}", fontsize=9)
        steps_panel.set_xlabel("steps")
        steps_panel.set_ylabel("held-out loss")
        steps_panel.legend(frameon=False, fontsize=8)
        time_panel.set_xlabel("seconds of training (steps x median step of interleaved runs)")
    return figure


_INTRODUCTION = """# Quality

What the approximation costs, measured by `python -m benchmarks.quality` (CPU, offline; `--quick` is a short
form). This page is written by it from `benchmarks/results/quality.json`; the remarks are ours. All models are small: the
figures rank methods and find mistakes, they do not predict large models."""

_MODELS = """\
Byte-level language models that the benchmark trains itself: "gelu" is a GPT-2 (learned positions), "llama" has SwiGLU,
rotary positions and two query heads per key head; four layers of width 256. Code is Python's standard library (held out:
modules that were never trained on), English is the help pages of Python (held out: their last tenth; this model goes on
from the code model). Steps alternate between contexts of 512 and 2048 bytes."""

_SELECTION = """\
Share of the softmax mass on the kept keys, and the norm of the change of a layer's output relative to its norm; means over
layers and held-out sequences, on queries, keys and values of the dense model. Codebooks are what the backend had learned
after eight sequences of other text. Tile rules keep as many key tiles per query tile as the product does, forced tiles
included; token rules keep that share of the keys for each query. "oracle" knows the true scores."""

_FFN = """\
"learned" is the default: clustered blocks, least-squares router, and for what is dropped conditional means and a low-rank
correction; "means only" leaves out the correction, "blocks only" both. "static" (the units of largest energy, for all tokens)
and "random" are the options of the same name, with means and correction. "contiguous + LS" routes the units as they lie,
without compensation, "oracle" keeps the blocks of largest norm. Layer errors are on inputs of the dense model; the cosine is
between last hidden states, token by token, of the whole model with all FFNs routed and dense attention. Eight blocks. No weight
was trained. The LLaMA-like model's FFNs are SwiGLU, the GeGLU model is the same with GELU in its gates."""

_DRIFT = """\
The LLaMA-like model, fine-tuned from code to English in all weights with the balanced preset at density 1/4 and 1/2. "Off"
keeps what was learned at the first steps."""

_GUARD = """\
The same fine-tuning; each site's limit is 1.5 times its own error before (mean of two intervals). In turn one site is
spoiled, right after a turn of the guard (an attention site gets codewords of zero, an FFN a random router), and put back when
it was found. A site whose error stays within its limit even so has not been harmed, and is not to be found."""

_PARITY = """\
From code to English: the same batches, optimizer and steps for every variant; the rate falls to zero. All sparse variants have
attention density 1/4 and FFN density 1/2. "balanced" is the default; "finer" is it with FFNs of 16 blocks, where it has 8; "paper"
is the preset of that name with this attention density (single keys by equal codes, gates of 2 x probability, no compensation), its
routers and codebooks trained by gradients, with the auxiliary loss; "static" the default with a static router; "window" attends to
the nearest tiles and the first one, as many as "balanced", and routes FFNs as it does. Losses are those of the sparse model, as
trained, in nats per token (a byte, in our own models). Times are ratios of steps taken in turns in one process, so that other load
met all alike; "window" has none, as a mask saves nothing. Spreads are standard deviations over seeds; "against dense" compares
runs of the same seed."""
