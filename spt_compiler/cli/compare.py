"""Trains variants of one model from one start and compares them: table, plot, HTML page. Behind demo and finetune."""

from __future__ import annotations

import base64
import html
import io
import platform
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spt_compiler.cli import training, workers
from spt_compiler.cli.console import Console, format_bytes, format_seconds
from spt_compiler.cli.training import Run


def train_variants(
    context: Any, runs: Sequence[Run], console: Console, *, beside: Sequence[workers.Job] = (), together: bool = False
) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """Trains the runs, each in its own process, one after the other; those that have a result already are not repeated.

    Args:
        beside: further jobs.  together: everything at the same time (times then mean little).
    Returns: (results by the name of the run, values of the further jobs).
    Raises: workers.Interrupted, SPTError.
    """
    results: dict[str, dict[str, Any]] = {}
    waiting = []
    for run in runs:
        finished = _finished(run)
        if finished:
            console.line(f"{run.name}: has finished its {run.steps} steps before")
            results[run.name] = finished
        else:
            waiting.append(run)
    jobs = [workers.Job(f"{run.name:9}", run.steps, training.train, (run,)) for run in waiting]
    jobs += beside
    groups = [jobs] if together else [[job] for job in jobs]
    values = [value for group in groups for value in (workers.call(context, group, console) if group else ())]
    results.update({run.name: value for run, value in zip(waiting, values, strict=False)})
    return {run.name: results[run.name] for run in runs}, values[len(waiting) :]


def _finished(run: Run) -> dict[str, Any] | None:
    import json

    try:
        result = json.loads((Path(run.out) / training.RESULT_FILE).read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("finished") and len(result["history"]["losses"]) >= run.steps else None


def site_lines(sites: Sequence[dict[str, Any]]) -> list[str]:
    """Coverage in words: `attention 2/2, ffn 1/2`, then each reason for a skipped site with its first example."""
    if not sites:
        return ["no candidate site found"]
    kinds = sorted({site["kind"] for site in sites})
    totals = [
        f"{kind} {sum(s['kind'] == kind and s['status'] == 'replaced' for s in sites)}/{sum(s['kind'] == kind for s in sites)}"
        for kind in kinds
    ]
    lines = [", ".join(totals)]
    skipped = [site for site in sites if site["status"] != "replaced"]
    for (kind, reason), count in Counter((site["kind"], str(site["reason"])) for site in skipped).items():
        example = next(s for s in skipped if s["kind"] == kind and str(s["reason"]) == reason)
        lines.append(f"skipped {count} x {kind}: {reason} (e.g. {example['path'] or example['where']})")
    return lines


def site_rows(sites: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of sites; None shows as "-"."""
    columns = ["site", "kind", "status", "density", "executed", "lowering", "reason"]

    def show(value: Any) -> str:
        return "-" if value is None or value == "" else f"{value:.3g}" if isinstance(value, float) else str(value)

    rows = [
        [
            site["path"] or site["where"],
            site["kind"],
            site["status"],
            *(show(site[name]) for name in ("density", "executed", "lowering", "reason")),
        ]
        for site in sites
    ]
    return columns, rows


def comparison_rows(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of figures; of two runs, the last column is the second over the first."""
    names = list(results)
    columns = ["", *names]
    if len(names) == 2:
        columns.append(f"{names[1]} / {names[0]}")
    memory = "peak memory"
    if any(result.get("peak_is_whole_process") for result in results.values()):
        memory = "peak memory (compiler included)"
    rows = []
    for label, key, show in (
        ("median step", "step_seconds", format_seconds),
        (memory, "peak_bytes", format_bytes),
        ("kept for backward", "saved_bytes", format_bytes),
        ("compilation", "compile_seconds", format_seconds),
        ("train loss, last steps", "train_loss", _loss),
        ("held-out loss", "heldout_loss", _loss),
    ):
        values = [results[name].get(key) for name in names]
        row = [label, *map(show, values)]
        if len(names) == 2:
            row.append(f"{values[1] / values[0]:.3f}" if values[0] and values[1] is not None else "-")
        rows.append(row)
    return columns, rows


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def exact_line(check: dict[str, Any] | None) -> str:
    """The outcome of the exact check in words."""
    if check is None:
        return "exact check: not run"
    verdict = "passed" if check["passed"] else "FAILED"
    return (
        f"exact check {verdict}: with everything selected, logits differ from eager by {check['logits']:.1e} "
        f"(limit 1e-4), gradients by at most {check['gradient']:.1e} ({check['parameter']}, limit 1e-3), relative"
    )


def plot(results: dict[str, dict[str, Any]], path: Path | None = None) -> bytes | None:
    """Losses against steps and against training time, as PNG; written to `path` if given. None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for index, (name, result) in enumerate(results.items()):
        history = result["history"]
        times, total = [], 0.0
        # The first step of each process compiles; it counts as an ordinary one here and is reported apart.
        usual = result.get("step_seconds") or 0.0
        for step, seconds in enumerate(history["seconds"]):
            total += usual if step in history["compile_steps"] else seconds
            times.append(total)
        steps = list(range(1, len(times) + 1))
        losses = _smooth(history["losses"])
        color = f"C{index}"
        axes[0].plot(steps, losses, label=f"{name}, training", color=color)
        axes[1].plot(times, losses, label=f"{name}, training", color=color)
        points = [(done, loss) for done, loss in history["heldout"] if 0 < done <= len(times)]
        axes[0].plot(*_columns(points), "o--", color=color, label=f"{name}, held-out")
        axes[1].plot(*_columns([(times[d - 1], loss) for d, loss in points]), "o--", color=color, label=f"{name}, held-out")
    axes[0].set_xlabel("steps")
    axes[1].set_xlabel("seconds of training, compilation left out")
    axes[0].set_ylabel("loss, nats per token (running mean of 5)")
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    if path:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def conditions(run: Run) -> str:
    """Where and how the figures were taken, in one line."""
    import torch

    device = torch.cuda.get_device_name() if run.device.startswith("cuda") else _cpu_name()
    threads = run.threads or torch.get_num_threads()
    precision = "float32" if run.autocast == "none" else f"{run.autocast} autocast"
    return (
        f"{device}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}, {precision}, "
        f"{run.steps} steps of {run.batch} x {run.length} tokens, AdamW, learning rate {run.learning_rate:g}"
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def finish(
    console: Console,
    out: Path,
    title: str,
    intro: Sequence[str],
    results: dict[str, dict[str, Any]],
    check: dict[str, Any] | None,
    run: Run,
    seconds: float,
) -> list[Path]:
    """Prints the tables and writes `report.json`, `report.html` and `losses.png` to `out`.

    Returns: the files written.
    """
    sites: list[dict[str, Any]] = next((r["sites"] for r in results.values() if r.get("sites")), [])
    if "spt" in results:
        console.line()
        console.table("Sites", *site_rows(_fold(sites)))
        for line in site_lines(sites):
            console.line(line)
    console.line()
    console.table("Comparison" if len(results) > 1 else "Result", *comparison_rows(results))
    console.line(exact_line(check))
    console.line(f"conditions: {conditions(run)}")

    written = []
    image = plot(results, out / "losses.png")
    if image:
        written.append(out / "losses.png")
    else:
        console.line("no plot: matplotlib is not installed (pip install 'spt_compiler[cli]')")
    training.write_json(
        out / "report.json",
        {
            "title": title,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "conditions": conditions(run),
            "run": run.to_json(),
            "exact": check,
            "results": results,
            "seconds": seconds,
        },
    )
    written.append(out / "report.json")
    page = _page(title, [*intro, f"Conditions: {conditions(run)}."], results, sites, check, image)
    (out / "report.html").write_text(page, encoding="utf-8")
    written.append(out / "report.html")
    return written


def _fold(sites: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sites that differ only in where they are as one row, so that a deep model still fits a screen."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for site in sites:
        groups.setdefault(tuple(repr(site[k]) for k in ("kind", "status", "density", "executed", "lowering", "reason")), []).append(
            site
        )
    folded = []
    for group in groups.values():
        path = group[0]["path"] + (f" .. {group[-1]['path']} ({len(group)})" if len(group) > 1 else "")
        folded.append({**group[0], "path": path})
    return folded


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left}"
    "th{background:#f3f3f3}img{max-width:100%}tr.skipped{color:#888}.failed{color:#b00;font-weight:bold}"
)


def _page(
    title: str,
    intro: Sequence[str],
    results: dict[str, dict[str, Any]],
    sites: Sequence[dict[str, Any]],
    check: dict[str, Any] | None,
    image: bytes | None,
) -> str:
    def table(columns: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(
            f'<tr class="{html.escape(classes[i]) if classes else ""}">'
            + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
            + "</tr>\n"
            for i, row in enumerate(rows)
        )
        return f"<table><tr>{head}</tr>\n{body}</table>"

    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in intro]
    parts.append("<h2>Comparison</h2>" + table(*comparison_rows(results)))
    failed = "" if check is None or check["passed"] else ' class="failed"'
    parts.append(f"<p{failed}>{html.escape(exact_line(check))}.</p>")
    if image:
        encoded = base64.b64encode(image).decode()
        parts.append(f'<h2>Losses</h2><img alt="losses against steps and time" src="data:image/png;base64,{encoded}">')
    parts.append("<h2>Sites</h2>")
    parts += [f"<p>{html.escape(line)}</p>" for line in site_lines(sites)]
    if sites:
        parts.append(table(*site_rows(sites), classes=[site["status"] for site in sites]))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
