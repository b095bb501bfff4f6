"""`python -m benchmarks.gpu`: each part in a process of its own; JSON, a plot and a table in out/gpu."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PARTS = ("correctness", "attention", "ffn", "blocks")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    result.add_argument("--only", choices=PARTS, action="append", help="run this part alone (may be repeated)")
    result.add_argument("--dry-run", action="store_true", help="toy sizes, kernels interpreted on the CPU, nothing measured")
    result.add_argument("--seconds", type=float, default=0.3, help="to spend on one figure (0.3)")
    result.add_argument("--out", default="out/gpu", metavar="DIR", help="where to write (out/gpu)")
    result.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the process of one part
    return result


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return _measure(args, out)
    status = 0
    for part in args.only or PARTS:
        command = [sys.executable, "-m", __spec__.name.removesuffix(".__main__"), "--part", part, "--out", str(out)]
        command += ["--seconds", str(args.seconds), *(["--dry-run"] if args.dry_run else [])]
        done = subprocess.run(command)
        if done.returncode:
            print(f"{part} failed", file=sys.stderr)
            status = 1
        if status and part == "correctness":
            print("no figures from wrong kernels: stopping", file=sys.stderr)
            return status
    return status


def _measure(args: argparse.Namespace, out: Path) -> int:
    import importlib

    from . import common

    common.prepare(args.dry_run)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU: nothing can be measured here (--dry-run shows that the scripts run)", file=sys.stderr)
        return 1
    began = time.perf_counter()
    bench = common.Bench(args.dry_run, args.seconds, lambda text: print(text, flush=True))
    module = importlib.import_module(f"{__package__}.{args.part}")
    module.run(bench)
    wrong = [row for row in bench.rows if row.get("passed") is False or row.get("repeatable") is False]
    from spt_compiler.lowering import registry

    result = {
        "part": args.part,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": time.perf_counter() - began,
        **common.device_facts(bench),
        "fallbacks": {" ".join(key): cause for key, cause in registry.failures().items()},
        "rows": bench.rows,
    }
    (out / f"{args.part}.json").write_text(json.dumps(result, indent=2) + "\n")
    if not args.dry_run:
        _plot(bench.rows, out / f"{args.part}.png", result["device"])
    for row in wrong:
        print(f"wrong: {row}", file=sys.stderr)
    if result["fallbacks"]:
        print(f"kernels failed: {result['fallbacks']}", file=sys.stderr)
    return 1 if wrong or result["fallbacks"] else 0


def _plot(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Bars of milliseconds, one panel per case."""
    from . import common

    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases: dict[str, dict[str, float]] = {}
    for case, what, ms in common.pairs(rows):
        if not what.startswith("kernel"):
            cases.setdefault(case, {})[what] = ms
    if not cases:
        return
    figure, axes = plt.subplots(len(cases), 1, figsize=(9, 1 + 2 * len(cases)), squeeze=False)
    for axis, (case, values) in zip(axes[:, 0], cases.items(), strict=True):
        axis.barh(list(values), list(values.values()))
        axis.invert_yaxis()
        axis.set_title(f"{case}, {device}: milliseconds", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
