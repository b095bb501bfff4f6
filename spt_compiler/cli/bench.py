"""`spt bench`: compiler overhead, run-time overhead, the gain in fine-tuning, and on request quality; figures in out/bench."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from spt_compiler.cli import compare, demo, training, workers
from spt_compiler.cli.console import Console, at_least, format_bytes, format_seconds, format_table
from spt_compiler.cli.doctor import compiler_problem
from spt_compiler.cli.training import Run
from spt_compiler.config import SPTConfig, parse_assignments

PARTS = ("passes", "wrapper", "finetune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="out/bench", metavar="DIR", help="where to write (out/bench)")
    words = "measure this part alone (may be repeated); quality takes hours, resumes, and runs only when named"
    parser.add_argument("--only", choices=(*PARTS, "quality"), action="append", help=words)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, no figures to trust")
    parser.add_argument("--steps", type=at_least(1), help="measured steps of the fine-tuning (20)")
    parser.add_argument("--seq", type=at_least(2), help=f"tokens per sequence of the fine-tuning ({demo.LENGTH})")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the backend")
    parser.add_argument("--plain", action="store_true", help="plain text, whatever the terminal")


def run(args: argparse.Namespace) -> int:
    from spt_compiler.benchmarks import passes, wrapper

    console = Console(plain=args.plain)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    options = parse_assignments(args.option)
    if args.quick:
        options = {"attention.min_keys": 0, "ffn.min_width": 0, **options}  # below these nothing would be sparse
    SPTConfig.from_options(options)
    parts = args.only or PARTS
    if "quality" in parts:
        from spt_compiler.benchmarks.quality.__main__ import main

        # A folder each: a run goes on from the figures that it finds there.
        main(["--quick", "--out", str(out / "quality_quick")] if args.quick else ["--out", str(out / "quality")])
        if len(set(parts)) == 1:
            return 0
    context = workers.start(["spt_compiler.backend", "torch._inductor.compile_fx"])
    results: dict[str, Any] = {"created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "options": options, "quick": args.quick}
    if "passes" in parts:
        total = len(passes.FAMILIES) * (2 if args.quick else len(passes.LAYERS))
        [results["passes"]] = workers.call(context, [workers.Job("passes   ", total, passes.measure, (args.quick,))], console)
    if "wrapper" in parts:
        total = 2 * ((10 if args.quick else 60) + wrapper.WARM_UP)
        [results["wrapper"]] = workers.call(context, [workers.Job("wrapper  ", total, wrapper.measure, (args.quick,))], console)
    if "finetune" in parts:
        results["finetune"] = _finetune(context, console, args, options, out)
    columns, rows = ("measurement", "value", "goal"), table_rows(results)
    console.line()
    console.table("spt bench", columns, rows)
    training.write_json(out / "bench.json", results)
    (out / "table.txt").write_text(format_table("spt bench", columns, rows) + "\n")
    for name in ("bench.json", "table.txt"):
        console.line(f"wrote {out / name}")
    return 0


def _finetune(context: Any, console: Console, args: argparse.Namespace, options: dict, out: Path) -> dict[str, Any]:
    """Peak memory from a process per variant, step times from one process in which both take turns."""
    from spt_compiler.benchmarks import finetune

    sizes = demo.QUICK_SIZES if args.quick else demo.SIZES
    length = args.seq or (demo.QUICK_LENGTH if args.quick else demo.LENGTH)
    steps = args.steps or (3 if args.quick else 20)
    inner = "inductor" if not args.quick and compiler_problem() is None else "aot_eager"
    preparation = ("llama", {**sizes, "max_position_embeddings": max(length, 4096)}, length, 0, str(out))
    workers.call(context, [workers.Job("prepare  ", 1, demo.prepare, preparation)], console)
    dense = Run(
        name="dense", model=str(out / "start"), data=str(out / "code.safetensors"), out=str(out / "dense"),
        backend=inner, steps=8, length=length, eval_batches=1,
    )  # fmt: skip
    sparse = dataclasses.replace(dense, name="spt", out=str(out / "spt"), backend="spt", options={**options, "inner": inner})
    for one in (dense, sparse):
        (Path(one.out) / training.RESULT_FILE).unlink(missing_ok=True)
    memory, _ = compare.train_variants(context, [dense, sparse], console)
    job = workers.Job("in turns ", steps + 3, finetune.measure, ([dense, sparse], steps))
    [turns] = workers.call(context, [job], console)
    return {
        "conditions": compare.conditions(dataclasses.replace(dense, steps=steps)),
        "inner": inner,
        "sizes": sizes,
        "parameters": memory["dense"]["parameters"],
        "turns": turns,
        "memory": {
            name: {key: result[key] for key in ("peak_bytes", "peak_is_whole_process", "saved_bytes", "compile_seconds")}
            for name, result in memory.items()
        },
    }


def table_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (measurement, value, goal) of what was measured."""
    rows = []
    passes = results.get("passes")
    if passes and "skipped" in passes:
        rows.append(("our stages / Inductor's compilation", passes["skipped"], ""))
    for row in (passes or {}).get("rows", ()):
        words = f"our stages, {row['family']}, {row['layers']} layers"
        if "inductor" in row:
            value = f"{format_seconds(row['ours'])}, {row['share']:.1%} of Inductor's {format_seconds(row['inductor'])}"
            rows.append((words, value, f"at most {passes['goal']:.0%}"))
        else:
            rows.append((words, format_seconds(row["ours"]), ""))
    wrapper = results.get("wrapper")
    if wrapper:
        for kind, words in (("model", "one graph"), ("blocks", "one graph per layer")):
            value = f"{wrapper[kind]['wrapper_us']:.0f} us (+ {wrapper[kind]['maintenance_us']:.0f} us upkeep)"
            rows.append((f"wrapper per step, {wrapper['layers']} layers, {words}", value, f"under {wrapper['goal_us']} us"))
    tuning = results.get("finetune")
    if tuning:
        turns, memory = tuning["turns"], tuning["memory"]
        for part in ("step", "forward", "backward"):
            values = " against ".join(format_seconds(turns[name][part]) for name in ("spt", "dense"))
            ratio = turns["ratio"] if part == "step" else turns["spt"][part] / turns["dense"][part]
            rows.append((f"{part} time, spt against dense", f"{values}: {ratio:.2f}", "below 1" if part == "step" else ""))
        for key, words in (("peak_bytes", "peak memory"), ("saved_bytes", "kept for backward")):
            a, b = memory["spt"][key], memory["dense"][key]
            ratio_text = f": {a / b:.2f}" if a and b else ""
            rows.append((f"{words}, spt against dense", f"{format_bytes(a)} against {format_bytes(b)}{ratio_text}", ""))
        rows.append(("conditions", tuning["conditions"], ""))
    return rows
