"""What the parts share: the device, timing, results, and the dry run on a machine without a GPU."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Dense 16-bit matrix throughput (TFLOP/s) and memory bandwidth (TB/s) from the vendors' data sheets; the first name that
# the device's name contains counts.
PEAKS = {"H200": (989.0, 4.8), "H100": (989.0, 3.35), "B200": (2250.0, 8.0), "A100": (312.0, 2.04), "MI300": (1307.0, 5.3)}
# About the clock of a multiprocessor; it only decides how long the device waits for the host.
CYCLES_PER_SECOND = 2e9


@dataclass(frozen=True)
class Case:
    """What is measured, and kept, as one.

    Args: name: unique in its part.  run: measures, and adds rows.  seconds: about how long it takes on an H100, compiling
        included (estimated, until it was measured).  goal: whether it decides a target, or must precede every figure.
    """

    name: str
    run: Callable[[Bench], None]
    seconds: float = 30.0
    goal: bool = False

    @property
    def slug(self) -> str:
        """The name as one of a file."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", self.name)


@dataclass
class Bench:
    """One process of measurements.

    Args:
        dry: run toy sizes on the CPU, kernels interpreted: shows that everything runs, and measures nothing.
        seconds: to spend on one figure.  rows: results so far, one flat dict each.
    """

    dry: bool
    seconds: float = 0.3
    log: Callable[[str], None] = print
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; the dry run computes in float32, which the interpreter rounds as chips do."""
        return torch.float32 if self.dry else torch.bfloat16

    def add(self, part: str, case: str, what: str, **values: Any) -> dict[str, Any]:
        """Appends a row. Times in a dry run are left out: they would be the interpreter's."""
        if self.dry:
            values = {k: v for k, v in values.items() if not k.startswith(("ms", "tflops", "gbytes", "speedup", "holds"))}
        row = {"part": part, "case": case, "what": what, **values}
        self.rows.append(row)
        self.log(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "part"))
        return row

    def time(self, call: Callable[[], Any]) -> dict[str, float]:
        """Milliseconds on the device: median, and the quartiles as spread, with a cold L2 cache; and those of the host.

        The host runs ahead, as it does in a training loop that reads no result: what it takes to launch everything is a
        figure of its own. A step takes the larger of the two.
        Returns: {ms, ms_low, ms_high, ms_host, runs}.
        """
        call()
        if self.dry:
            return {"ms": float("nan"), "ms_low": float("nan"), "ms_high": float("nan"), "runs": 1}
        flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        times: list[float] = []
        host: list[float] = []
        began = time.perf_counter()
        while len(times) < 10 or (time.perf_counter() - began < self.seconds and len(times) < 200):
            flush.zero_()
            # Busy for as long as the host needed before, and half as long again; one that waits for the device would not end.
            torch.cuda._sleep(int(1e-3 * min(1.5 * max(host[-5:], default=2.0), 20.0) * CYCLES_PER_SECOND))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launched = time.perf_counter()
            call()
            host.append((time.perf_counter() - launched) * 1e3)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        low, middle, high = statistics.quantiles(times, n=4)
        return {"ms": middle, "ms_low": low, "ms_high": high, "ms_host": statistics.median(host), "runs": len(times)}

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Most memory that one call holds beyond what was held before; None in a dry run."""
        if self.dry:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def attempt(self, part: str, case: str, what: str, make: Callable[[], Callable[[], Any]], **values: Any) -> float | None:
        """Times a rival; one that cannot run here is a row with the reason. Returns: its milliseconds."""
        try:
            timed = self.time(make())
        except Exception as error:  # a peer may fail in any way, and is no reason to stop
            if not self.dry:
                torch.cuda.empty_cache()
            self.add(part, case, what, skipped=f"{type(error).__name__}: {error}".splitlines()[0][:160])
            return None
        flops = values.pop("flops", None)
        moved = values.pop("bytes", None)
        if flops is not None:
            values["tflops"] = flops / timed["ms"] / 1e9
        if moved is not None:
            values["gbytes_per_s"] = moved / timed["ms"] / 1e6
        self.add(part, case, what, **timed, **values)
        return timed["ms"]

    def target(self, name: str, case: str, value: float | None, goal: float) -> None:
        """A row that says whether a target of docs/gpu.md holds."""
        measured = value is not None and not self.dry
        self.add("targets", case, name, speedup=value if measured else None, goal=goal, holds=value >= goal if measured else None)


def backward_of(out: Tensor, grad: Tensor, leaves: list[Tensor]) -> None:
    """One backward pass that keeps the graph."""
    torch.autograd.grad(out, leaves, grad, retain_graph=True, allow_unused=True)


def device_facts(bench: Bench) -> dict[str, Any]:
    """What a figure depends on: chip, driver, versions."""
    import platform

    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "dry_run": bench.dry}
    facts["sources"] = sources()
    facts["tuned"] = os.environ.get("SPT_AUTOTUNE") == "1"
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if bench.dry:
        return {**facts, "device": "none: not measured"}
    properties = torch.cuda.get_device_properties(0)
    peaks = next((p for name, p in PEAKS.items() if name in properties.name), None)
    return {
        **facts,
        "device": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": _driver(),
        "cudnn": torch.backends.cudnn.version(),
        "peak_tflops": peaks and peaks[0],
        "peak_tbytes_per_s": peaks and peaks[1],
    }


@functools.lru_cache(maxsize=1)
def sources() -> str:
    """A hash of the package, its templates and these scripts: figures of one version are not mixed with another's."""
    import spt_compiler
    from spt_compiler.lowering import render

    package, scripts = Path(spt_compiler.__file__).parent, Path(__file__).parent
    texts = [path.read_bytes() for folder in (package, scripts) for path in sorted(folder.rglob("*.py"))]
    templates = render._template_folder()
    texts += [item.read_bytes() for item in sorted(templates.iterdir(), key=lambda item: item.name) if item.name.endswith("jinja")]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _driver() -> str | None:
    import subprocess

    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def prepare(dry: bool) -> None:
    """Before triton is imported: a dry run interprets kernels, and runs them where the CPU's own would be chosen."""
    from spt_compiler import rewrite
    from spt_compiler.lowering import registry

    if not dry:
        registry.install(("cuda",))
        return
    os.environ["TRITON_INTERPRET"] = "1"
    registry.install(("cpu", "cuda"))
    registry.borrow("triton", "cuda", "cpu")
    rewrite.ROUTE_TILE["cpu"] = 16  # the kernels' least


def profile(bench: Bench, part: str, case: str, call: Callable[[], Any], work: dict[str, tuple[float, float]]) -> None:
    """Time of every kernel of one call, with TFLOP/s and GB/s of those that `work` knows.

    Args: work: (floating-point operations, bytes that must move) by kernel, summed over its launches.
    """
    if bench.dry:
        call()
        return
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    for event in trace.key_averages():
        ms = event.device_time_total / 1e3
        if ms > 0:
            known = work.get(event.key)
            rates = {"tflops": known[0] / ms / 1e9, "gbytes_per_s": known[1] / ms / 1e6} if known else {}
            bench.add(part, case, f"kernel {event.key[:80]}", ms=ms, launches=event.count, **rates)


def roofline(
    rows: list[dict[str, Any]], peak: float | None, bandwidth: float | None
) -> list[tuple[str, float, float, float]]:
    """(kernel, operations per byte, TFLOP/s, share of what the roofline allows) of kernels with known work.

    Args: peak: TFLOP/s.  bandwidth: TB/s.  None of a device that `PEAKS` does not know.
    """
    points = []
    for row in rows:
        tflops, gbytes = row.get("tflops"), row.get("gbytes_per_s")
        if not (peak and bandwidth and tflops and gbytes):
            continue
        intensity = tflops * 1e3 / gbytes
        name = row["what"].removeprefix("kernel ").removesuffix("_kernel")
        points.append((f"{name}, {row['case']}", intensity, tflops, tflops / min(peak, bandwidth * intensity)))
    return points
