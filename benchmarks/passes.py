"""What our stages add to compilation: their time by depth, and as a share of the time that Inductor takes for the same graphs.

`python -m spt_compiler.benchmarks.passes` (in a checkout: `python -m benchmarks.passes`) prints the table alone, with Inductor at
the deepest, which takes many minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from spt_compiler.benchmarks import models

GOAL = 0.05
FAMILIES = ("gpt2", "llama")
LAYERS = (12, 24, 48)
STAGES = ("copy", "canonicalize", "match", "plan", "rewrite")


def measure(quick: bool, *, report: Any, should_stop: Any) -> dict[str, Any]:
    """Compiles each family at each depth and reads the stage timers; Inductor compiles the shallowest, caches off.

    Returns: `rows`, one per family and depth: family, layers, stages (seconds), `ours`, their sum, and where Inductor ran
        `inductor`, its forward and backward, and `share`, ours / inductor; `growth`, per family ours at the deepest per ours
        of the shallowest, beside what the number of layers would give; `goal`, of the share.
    """
    from spt_compiler.cli.doctor import compiler_problem

    problem = compiler_problem()
    depths = (1, 2) if quick else LAYERS
    rows = []
    for family in FAMILIES:
        compile_once(family, 1, inductor=False)  # imports, and Dynamo's and torch's first times
        for layers in depths:
            report({"event": "note", "text": f"{family}, {layers} layers"})
            rows.append(compile_once(family, layers, inductor=layers == depths[0] and problem is None))
            report({"event": "step", "done": len(rows)})
            if should_stop():
                break
    return {**summary(rows), **({"skipped": f"no C++ compiler ({problem})"} if problem else {})}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, of its rows."""
    growth = {}
    for family in FAMILIES:
        own = [r for r in rows if r["family"] == family]
        if len(own) > 1:
            growth[family] = {"time": own[-1]["ours"] / own[0]["ours"], "layers": own[-1]["layers"] / own[0]["layers"]}
    return {"rows": list(rows), "growth": growth, "goal": GOAL}


def compile_once(family: str, layers: int, *, inductor: bool, backward: bool = True) -> dict[str, Any]:
    """One row: a forward of a fresh model for training and, with `inductor` and `backward`, the backward that it compiles."""
    import torch

    from spt_compiler import debug

    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True  # a warm cache would make Inductor look fast
    model = getattr(models, family)(layers=layers, width=128, heads=4, length=256)
    options = {"attention.min_keys": 0, "ffn.min_width": 0, "inner": "inductor" if inductor else "eager", "strict": True}
    batch = models.tokens(256)
    debug.timings(reset=True)
    loss = torch.compile(model, backend="spt", options=options)(input_ids=batch, labels=batch).loss
    seconds = debug.timings()
    stages = {stage: seconds[stage] for stage in STAGES}
    replaced = sum(r.status == "replaced" for rows in debug.reports() for r in rows)
    assert replaced == 2 * layers, f"{replaced} sites of {layers} layers"
    row: dict[str, Any] = {"family": family, "layers": layers, "stages": stages, "ours": sum(stages.values())}
    if inductor:
        started = time.perf_counter()
        if backward:
            loss.backward()  # Inductor compiles the backward graph when it is first run
        row["inductor"] = seconds["inner"] + time.perf_counter() - started
        row["share"] = row["ours"] / row["inductor"]
    return row


HEAD = f"{'model':6} {'layers':>6} " + " ".join(f"{s:>12}" for s in STAGES) + f" {'ours':>8} {'Inductor':>9} {'share':>6}"


def line(r: dict[str, Any]) -> str:
    """One row as text."""
    inner = f"{r['inductor']:8.1f}s {r['share']:6.1%}" if "inductor" in r else ""
    stages = " ".join(f"{r['stages'][s]:11.2f}s" for s in STAGES)
    return f"{r['family']:6} {r['layers']:6} {stages} {r['ours']:7.2f}s {inner}"


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [HEAD, *map(line, result["rows"])]
    for family, grown in result["growth"].items():
        lines.append(f"{family}: {grown['layers']:.0f} times the layers take {grown['time']:.1f} times as long")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--family", choices=FAMILIES, action="append", help="this one alone (may be repeated)")
    parser.add_argument("--layers", default=",".join(map(str, LAYERS)), help="depths; Inductor compiles the last")
    parser.add_argument("--forward", action="store_true", help="Inductor's forward alone: a share that is rather too large")
    parser.add_argument("--no-inductor", action="store_true", help="our stages alone")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_args(arguments)
    depths = [int(n) for n in args.layers.split(",")]
    rows = []
    sys.stdout.write(HEAD + "\n")
    for family in args.family or FAMILIES:
        compile_once(family, 1, inductor=False)
        for n in depths:
            with_inductor = n == depths[-1] and not args.no_inductor
            rows.append(compile_once(family, n, inductor=with_inductor, backward=not args.forward))
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()
    result = summary(rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
