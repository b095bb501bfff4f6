"""What our stages add to compilation: their time as a share of the time that Inductor takes for the same graphs."""

from __future__ import annotations

import time
from typing import Any

from spt_compiler.benchmarks import models


def measure(quick: bool, *, report: Any, should_stop: Any) -> dict[str, Any]:
    """Compiles a GPT-2 for training, caches off, and reads the stage timers.

    Returns: seconds per stage; `ours`, their sum without the inner compiler; `inductor`, the inner compiler's forward
        and backward; `share`, ours / inductor (goal: at most 0.05).
    """
    import torch

    from spt_compiler import debug
    from spt_compiler.cli.doctor import compiler_problem

    problem = compiler_problem()
    if problem:
        return {"skipped": f"no C++ compiler ({problem})"}
    torch._inductor.config.force_disable_caches = True  # a warm cache would make Inductor look fast
    model = models.gpt2(layers=1 if quick else 4, width=128, heads=4, length=256)
    model.compile(backend="spt", options={"attention.min_keys": 0, "ffn.min_width": 0})
    batch = models.tokens(256)
    debug.timings(reset=True)
    report({"event": "note", "text": "compiling"})
    loss = model(input_ids=batch, labels=batch).loss
    seconds = debug.timings()
    started = time.perf_counter()
    loss.backward()  # Inductor compiles the backward graph when it is first run
    backward = time.perf_counter() - started
    report({"event": "step", "done": 1})
    ours = sum(value for stage, value in seconds.items() if stage != "inner")
    inductor = seconds["inner"] + backward
    return {
        "layers": len(model.transformer.h),
        "stages": seconds,
        "ours": ours,
        "inductor": inductor,
        "share": ours / inductor,
        "goal": 0.05,
    }
