"""`python -m benchmarks.gpu`: correctness first, then the targets T1 to T6, then the rest; JSON and plots in out/gpu.

Every case is a file of its own, written when it is finished: a run that was cut off goes on where it stopped, as long as
device, versions and the package's sources are the same. With `--budget` what does not fit is left out, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = ("correctness", "attention", "ffn", "blocks")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    result.add_argument("--only", choices=PARTS, action="append", help="run this part alone (may be repeated)")
    result.add_argument("--case", default="", metavar="TEXT", help="run only cases with TEXT in their name")
    result.add_argument("--budget", type=float, metavar="SECONDS", help="leave out what does not fit into this time")
    result.add_argument("--fresh", action="store_true", help="measure again what is already in the folder")
    result.add_argument("--dry-run", action="store_true", help="toy sizes, kernels interpreted on the CPU, nothing measured")
    result.add_argument("--seconds", type=float, default=0.3, help="to spend on one figure (0.3)")
    result.add_argument("--out", default="out/gpu", metavar="DIR", help="where to write (out/gpu)")
    jobs = max(1, min(8, (os.cpu_count() or 1) // 2))
    result.add_argument("--jobs", type=int, default=jobs, help=f"processes that check correctness side by side ({jobs})")
    # For the process of one part: which of its cases.
    result.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    result.add_argument("--goals", choices=("yes", "no"), help=argparse.SUPPRESS)
    result.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    return result


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    out = Path(args.out)
    if args.part:
        return _measure(args, out)
    began, status = time.perf_counter(), 0
    parts = args.only or PARTS
    runs: list[tuple[str, str | None]] = [(part, "yes") for part in parts]
    runs += [(part, "no") for part in parts if part != "correctness"]
    if len(parts) == 1:  # every process takes ten seconds to start
        runs = [(parts[0], None)]
    for part, goals in runs:
        shares = min(args.jobs, 8) if part == "correctness" else 1
        running = []
        for share in range(shares):
            command = [sys.executable, "-m", __spec__.name.removesuffix(".__main__"), "--part", part]
            command += ["--goals", goals] if goals is not None else []
            command += ["--share", f"{share}/{shares}", "--out", str(out), "--seconds", str(args.seconds), "--case", args.case]
            command += [*(["--dry-run"] if args.dry_run else []), *(["--fresh"] if args.fresh else [])]
            if args.budget is not None:
                command += ["--budget", str(max(0.0, args.budget - (time.perf_counter() - began)))]
            running.append(subprocess.Popen(command))
        codes = [process.wait() for process in running]
        if any(codes):
            print(f"{part} failed", file=sys.stderr)
            status = 1
        merge(out, part)
        if status and part == "correctness":
            print("no figures from wrong kernels: stopping", file=sys.stderr)
            return status
    return status


def _measure(args: argparse.Namespace, out: Path) -> int:
    """One part, or a share of its cases, in this process."""
    import importlib

    from . import common

    began = time.perf_counter()
    common.prepare(args.dry_run)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU: nothing can be measured here (--dry-run shows that the scripts run)", file=sys.stderr)
        return 1
    bench = common.Bench(args.dry_run, args.seconds, lambda text: print(text, flush=True))
    facts = common.device_facts(bench)
    part = importlib.import_module(f"{__package__}.{args.part}")
    chosen = [case for case in part.cases(args.dry_run) if args.goals is None or case.goal == (args.goals == "yes")]
    chosen.sort(key=lambda case: not case.goal)
    number, count = map(int, args.share.split("/"))
    folder = out / args.part
    folder.mkdir(parents=True, exist_ok=True)
    status = 0
    for case in chosen[number::count]:
        if args.case not in case.name:
            continue
        path = folder / f"{case.slug}.json"
        before = None if args.fresh else read(path)
        if before is not None and before["facts"] == facts and not failed(before):
            print(f"{args.part}, {case.name}: measured before", flush=True)
            continue
        left = None if args.budget is None else args.budget - (time.perf_counter() - began)
        if left is not None and left < case.seconds:
            need = f"it takes about {case.seconds:.0f} s, {max(left, 0):.0f} s are left"
            print(f"{args.part}, {case.name}: left out, {need}", flush=True)
            if before is None:
                path.write_text(json.dumps({"case": case.name, "facts": facts, "rows": [], "left_out": True}))
            continue
        status |= _one(case, bench, facts, path)
    return status


def _one(case: Any, bench: Any, facts: dict[str, Any], path: Path) -> int:
    """Runs a case and writes its file. Returns: 1 if a result is wrong, or a kernel failed."""
    from spt_compiler.lowering import registry

    def faults() -> dict[str, str]:
        refused = {" ".join(key): message for message, key in registry.refusals().items()}
        return {**refused, **{" ".join(key): cause for key, cause in registry.failures().items()}}

    began, bench.rows, known = time.perf_counter(), [], faults()
    error = None
    try:
        case.run(bench)
    except Exception as cause:  # one case is no reason to lose the others
        error = f"{type(cause).__name__}: {cause}"[:500]
    fallbacks = {key: cause for key, cause in faults().items() if key not in known}
    result = {
        "case": case.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": time.perf_counter() - began,
        "facts": facts,
        "error": error,
        "fallbacks": fallbacks,
        "rows": bench.rows,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    for fault in failed(result):
        print(f"wrong: {case.name}: {fault}", file=sys.stderr)
    return 1 if failed(result) else 0


def read(path: Path) -> dict[str, Any] | None:
    """The finished case in a file; None if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and not content.get("left_out", False) and "facts" in content else None


def failed(case: dict[str, Any]) -> list[Any]:
    """What is wrong with a case: an error, kernels that fell back, results that are wrong or differ between two runs."""
    wrong = [row for row in case["rows"] if row.get("passed") is False or row.get("repeatable") is False]
    return [x for x in (case["error"], case["fallbacks"]) if x] + wrong


def merge(out: Path, part: str) -> None:
    """All cases of a part in one file, with plots: <part>.json, .png and, where kernels were profiled, _roofline.png."""
    files = sorted((out / part).glob("*.json"))
    found = [case for case in map(read, files) if case is not None]
    if not found:
        return
    latest = max(found, key=lambda case: case["created"])
    current = [case for case in found if case["facts"] == latest["facts"]]
    result = {
        "part": part,
        **latest["facts"],
        "seconds": sum(case["seconds"] for case in current),
        "fallbacks": {key: cause for case in current for key, cause in case["fallbacks"].items()},
        "errors": {case["case"]: case["error"] for case in current if case["error"]},
        "left_out": sorted({path.stem for path in files} - {path.stem for path in files if read(path) in current}),
        "rows": [row for case in current for row in case["rows"]],
    }
    (out / f"{part}.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, out / part)


def plot(result: dict[str, Any], stem: Path) -> None:
    """Bars of milliseconds with quartiles, a panel per case; kernels against the roofline of the device."""
    from . import common

    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row.get("ms") is not None and not row["what"].startswith("kernel"):
            cases.setdefault(row["case"], []).append(row)
    if cases:
        figure, axes = plt.subplots(len(cases), 1, figsize=(9, 1 + 2 * len(cases)), squeeze=False)
        for axis, (case, rows) in zip(axes[:, 0], cases.items(), strict=True):
            spread = [[r["ms"] - r.get("ms_low", r["ms"]) for r in rows], [r.get("ms_high", r["ms"]) - r["ms"] for r in rows]]
            axis.barh([r["what"] for r in rows], [r["ms"] for r in rows], xerr=spread)
            axis.invert_yaxis()
            axis.set_title(f"{case}, {result['device']}: milliseconds", fontsize=9)
        figure.tight_layout()
        figure.savefig(stem.with_suffix(".png"), dpi=120)
        plt.close(figure)
    points = common.roofline(result["rows"], result.get("peak_tflops"), result.get("peak_tbytes_per_s"))
    if not points:
        return
    peak, bandwidth = result["peak_tflops"], result["peak_tbytes_per_s"]
    figure, axis = plt.subplots(figsize=(8, 6))
    reach: Sequence[float] = [1.0, peak / bandwidth, 1e4]
    axis.loglog(reach, [min(peak, bandwidth * x) for x in reach], "k-")
    for name, intensity, tflops, share in points:
        axis.plot([intensity], [tflops], "o")
        axis.annotate(f"{name} {share:.0%}", (intensity, tflops), fontsize=6)
    axis.set_xlabel("operations per byte")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"{result['part']}, {result['device']}: share of what the roofline allows", fontsize=9)
    figure.tight_layout()
    figure.savefig(stem.with_name(f"{stem.name}_roofline.png"), dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
