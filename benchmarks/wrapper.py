"""What the run-time wrapper adds to each call, for a model of 12 layers: as one graph, and as one graph per layer."""

from __future__ import annotations

import statistics
import time
from typing import Any

from spt_compiler.benchmarks import models

LAYERS = 12
# Until the rings of sampled tokens are full, every step adds to them; these steps are not the steady state.
WARM_UP = 80


def measure(quick: bool, *, report: Any, should_stop: Any) -> dict[str, Any]:
    """Trains a tiny GPT-2 with an eager inner compiler and times the wrapper's parts.

    Returns: for "model" (one graph) and "blocks" (12 calls of one graph per step): `wrapper_us`, median microseconds of
        a step in the wrapper outside the compiled graph and outside maintenance; `maintenance_us`, median of that.
    """
    import torch

    import spt_compiler
    from spt_compiler.runtime import CompiledGraph

    torch.set_num_threads(1)
    steps = 10 if quick else 60
    options = {
        "inner": "eager",
        "attention.min_keys": 0,
        "ffn.min_width": 0,
        "attention.tile": [16, 8],
    }
    results: dict[str, Any] = {"layers": LAYERS, "goal_us": 50}
    for index, kind in enumerate(("model", "blocks")):
        torch._dynamo.reset()
        model = models.gpt2(layers=LAYERS, width=32, heads=2, length=64)
        if kind == "model":
            model.compile(backend="spt", options=options)
        else:
            spt_compiler.compile(model, **options)
        clock = _Clock()
        rows = []
        with clock.installed(CompiledGraph):
            for step in range(steps + WARM_UP):
                clock.reset()
                batch = models.tokens(64, step)
                model(input_ids=batch, labels=batch).loss.backward()
                rows.append((clock.total - clock.inner - clock.maintenance, clock.maintenance))
                report({"event": "step", "done": index * (steps + WARM_UP) + step + 1})
        settled = rows[WARM_UP:]
        results[kind] = {
            "wrapper_us": statistics.median(wrapper for wrapper, _ in settled) * 1e6,
            "maintenance_us": statistics.median(maintenance for _, maintenance in settled) * 1e6,
            "calls_per_step": clock.calls,
        }
    return results


class _Clock:
    """Times of a step's calls: all of `CompiledGraph.__call__`, the compiled graph in it, the maintenance in it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total = self.inner = self.maintenance = 0.0
        self.calls = 0

    def installed(self, graph_class: Any) -> Any:
        import contextlib

        call, maintain = graph_class.__call__, graph_class._maintain
        clock = self

        def timed_call(graph: Any, *arguments: Any) -> Any:
            if not hasattr(graph, "_untimed"):
                graph._untimed = graph.inner
                graph.inner = lambda *inputs: clock._timed("inner", graph._untimed, *inputs)
            clock.calls += 1
            return clock._timed("total", call, graph, *arguments)

        @contextlib.contextmanager
        def patched() -> Any:
            graph_class.__call__ = timed_call
            graph_class._maintain = lambda graph, *rest: clock._timed("maintenance", maintain, graph, *rest)
            try:
                yield
            finally:
                graph_class.__call__, graph_class._maintain = call, maintain

        return patched()

    def _timed(self, name: str, function: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)
