"""Speed and memory on a CPU: `torch.compile` dense (Inductor, fused SDPA) against the same with backend "spt".

    python -m benchmarks.cpu [--quick] [--only GROUP ...] [--threads N] [--out benchmarks/results/cpu.json] [--plot cpu.png]

Every case is a process of its own in which both variants take turns, step by step, so that whatever else the machine does meets
both alike; reported are medians, quartiles, and the median of the step-by-step ratios. Selection, code updates, routing and
state look-up are inside every figure. Memory comes from one process per variant (VmHWM), bytes kept for backward from
saved-tensor hooks. Quality at the same settings stands beside: kept attention mass and relative FFN error on the inputs of the
benchmark, which are random with a little structure; they are no substitute for a trained model (see benchmarks/quality).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .saved import saved_bytes

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        group: which part of the table. name: unique. goal: least dense time / spt time, or None.
        model: "attention", "ffn", "glu", "lora", "gpt2" or "llama". batch, tokens: of the input.
        attention: share of keys; ffn: share of blocks; None: that part stays as it is. mask: "causal", "padding", "documents".
        dtype: "float32" or "bfloat16". lift: take sizes below the break-even, too.
    """

    group: str
    name: str
    model: str
    batch: int
    tokens: int
    goal: float | None = None
    heads: int = 12
    kv_heads: int = 12
    width: int = 768
    hidden: int = 3072
    attention: float | None = 0.125
    ffn: float | None = 0.5
    mask: str = "causal"
    dtype: str = "float32"
    lift: bool = False
    threads: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention alone; the gain on the keys gives the site a parameter to hang its state on."""

    def __init__(self, case: Case):
        super().__init__()
        self.case, self.gain = case, nn.Parameter(torch.ones(case.width // case.heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None) -> Tensor:
        k, grouped = k * self.gain, self.case.heads != self.case.kv_heads
        if extra is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        at = torch.arange(q.shape[2], device=q.device)
        mask = (at[None, :] <= at[:, None])[None, None]
        if self.case.mask == "padding":
            mask = mask & extra[:, None, None, :]
        else:
            mask = mask & (extra[:, None, :, None] == extra[:, None, None, :])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


class MLP(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.up, self.down = nn.Linear(case.width, case.hidden), nn.Linear(case.hidden, case.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class GLU(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.gate, self.up = (nn.Linear(case.width, case.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(case.hidden, case.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LoRA(nn.Module):
    """An MLP with frozen weights and a low-rank branch on its first layer."""

    def __init__(self, case: Case, rank: int = 16):
        super().__init__()
        self.base = MLP(case).requires_grad_(False)
        self.a, self.b = nn.Linear(case.width, rank, bias=False), nn.Linear(rank, case.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base.down(F.gelu(self.base.up(x) + self.b(self.a(x)) * 2.0))


class Block(nn.Module):
    """A Transformer block of the shape of GPT-2 (LayerNorm, GELU) or LLaMA (RMSNorm, rotary positions, gated)."""

    def __init__(self, case: Case):
        super().__init__()
        self.case, self.llama = case, case.model == "llama"
        norm = nn.RMSNorm if self.llama else nn.LayerNorm
        self.dim = case.width // case.heads
        self.q = nn.Linear(case.width, case.width, bias=not self.llama)
        self.k, self.v = (nn.Linear(case.width, case.kv_heads * self.dim, bias=not self.llama) for _ in range(2))
        self.out = nn.Linear(case.width, case.width, bias=not self.llama)
        self.norm1, self.norm2 = norm(case.width), norm(case.width)
        self.ffn = GLU(case) if self.llama else MLP(case)
        angle = torch.arange(case.tokens)[:, None] * 10000.0 ** (-torch.arange(0, self.dim, 2) / self.dim)
        self.register_buffer("angle", torch.cat([angle, angle], dim=-1), persistent=False)

    def _rotated(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * self.angle.cos().to(x.dtype) + torch.cat([-high, low], dim=-1) * self.angle.sin().to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (-1, self.dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.llama:
            q, k = self._rotated(q), self._rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.case.heads != self.case.kv_heads)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


MODELS = {"attention": Attention, "ffn": MLP, "glu": GLU, "lora": LoRA, "gpt2": Block, "llama": Block}


def _structured(*shape: int) -> Tensor:
    """Random vectors that resemble their neighbours and belong to one of 32 groups: [..., T, D]."""
    *lead, length, dim = shape
    centres = torch.randn(*lead, 32, dim)
    spans = torch.randint(0, 32, (*lead, -(-length // 8))).repeat_interleave(8, dim=-1)[..., :length]
    return torch.take_along_dim(centres, spans.unsqueeze(-1), dim=-2) + 0.7 * torch.randn(*shape)


def build(case: Case) -> tuple[nn.Module, list[Tensor], Tensor]:
    """(model, inputs, upstream gradient), equal for equal cases."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    model = MODELS[case.model](case).to(dtype)
    if case.model != "attention":
        x = _structured(case.batch, case.tokens, case.width).to(dtype).requires_grad_()
        return model, [x], torch.randn(x.shape).to(dtype)
    dim = case.width // case.heads
    q = _structured(case.batch, case.heads, case.tokens, dim)
    k = _structured(case.batch, case.kv_heads, case.tokens, dim)
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, torch.randn(k.shape))]
    if case.mask == "padding":
        inputs.append(torch.arange(case.tokens).expand(case.batch, -1) >= torch.tensor([[case.tokens // 8]]))
    elif case.mask == "documents":
        inputs.append((torch.arange(case.tokens) * 6 // case.tokens).expand(case.batch, -1).contiguous())
    return model, inputs, torch.randn(q.shape).to(dtype)


def options(case: Case) -> dict[str, Any]:
    """Options of the backend for a case."""
    chosen: dict[str, Any] = {"attention.density": case.attention, "ffn.density": case.ffn}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return chosen | ({"attention.min_keys": 0, "ffn.min_width": 0} if case.lift else {})


class Side:
    """One variant of a case, compiled and ready to take steps."""

    def __init__(self, case: Case, variant: str):
        self.model, self.inputs, self.grad = build(case)
        self.model.compile(backend="inductor") if variant == "dense" else self.model.compile(backend="spt", options=options(case))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if case.model in ("gpt2", "llama") else None

    def step(self) -> tuple[float, float]:
        """Seconds of forward and of the rest of one step."""
        start = time.perf_counter()
        out = self.model(*self.inputs)
        middle = time.perf_counter()
        out.backward(self.grad)
        if self.optimizer is not None:
            self.optimizer.step()
        end = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        for x in self.inputs:
            x.grad = None
        return middle - start, end - middle


# ---------------------------------------------------------------------------------------------------------------------
# What a worker process measures
# ---------------------------------------------------------------------------------------------------------------------


def _time(case: Case, seconds: float) -> dict[str, Any]:
    import spt_compiler

    dense, sparse = Side(case, "dense"), Side(case, "spt")
    for _ in range(4):  # compilation, first use, and the first rounds of learning
        dense.step(), sparse.step()
    rows: list[tuple[tuple[float, float], tuple[float, float]]] = []
    until = time.perf_counter() + seconds
    while len(rows) < 5 or (time.perf_counter() < until and len(rows) < 60):
        rows.append((dense.step(), sparse.step()))
    result: dict[str, Any] = {"steps": len(rows)}
    for index, name in enumerate(("dense", "spt")):
        whole = [sum(row[index]) for row in rows]
        low, _, high = statistics.quantiles(whole, n=4)
        result[name] = {
            "forward": statistics.median(row[index][0] for row in rows),
            "step": statistics.median(whole),
            "quartiles": [low, high],
        }
    ratios = [sum(a) / sum(b) for a, b in rows]
    low, _, high = statistics.quantiles(ratios, n=4)
    result |= {"ratio": statistics.median(ratios), "ratio_quartiles": [low, high]}
    result["forward_ratio"] = statistics.median(a[0] / b[0] for a, b in rows)
    result["quality"] = {
        name: {key: figures[key] for key in ("mass", "rel_error") if key in figures}
        for name, figures in spt_compiler.metrics(sparse.model).items()
    }
    result["replaced"] = sorted(result["quality"])
    return result


def _memory(case: Case, variant: str) -> dict[str, Any]:
    side = Side(case, variant)
    for _ in range(5):
        side.step()
    own = (*side.model.parameters(), *side.model.buffers(), *side.inputs)
    kept = saved_bytes(lambda: side.model(*side.inputs), own)
    with contextlib.suppress(OSError):  # from here on VmHWM is that of steps alone, without the compiler's
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(3):
        side.step()
    return {"saved_bytes": kept, "peak_bytes": _status("VmHWM"), "resting_bytes": before}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _compile(case: Case, variant: str) -> dict[str, Any]:
    """Seconds until the first step is done, and those of our own stages."""
    from spt_compiler import debug

    side = Side(case, variant)
    start = time.perf_counter()
    side.step()
    stages = debug.timings()
    own = sum(seconds for stage, seconds in stages.items() if stage != "inner")
    return {"first_step": time.perf_counter() - start, "own_passes": own}


def _worker(task: dict[str, Any]) -> dict[str, Any]:
    case = Case(**task["case"])
    if case.threads:
        torch.set_num_threads(case.threads)
    if task["what"] == "time":
        return _time(case, task["seconds"])
    return (_memory if task["what"] == "memory" else _compile)(case, task["variant"])


def spawn(what: str, case: Case, *, variant: str = "", seconds: float = 0.0, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    task = {"what": what, "case": dataclasses.asdict(case), "variant": variant, "seconds": seconds}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cpu", "--worker", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})})
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> list[Case]:
    """Everything that is timed."""
    if quick:
        return [
            Case("attention", "attention 1024", "attention", 1, 1024, heads=4, kv_heads=4, width=256),
            Case("masks", "attention 1024 documents", "attention", 1, 1024, heads=4, kv_heads=4, width=256, mask="documents"),
            Case("ffn", "ffn 1024", "ffn", 1, 1024),
            Case("skipped", "gpt2 block 1 x 128, all skipped", "gpt2", 1, 128, 0.97),
        ]
    n, tokens = 8192, 4096
    found = []
    for dtype, short in (("float32", ""), ("bfloat16", " bf16")):
        found += [
            Case("attention", f"attention {n}{short}", "attention", 1, n, 3.0, dtype=dtype),
            Case("attention", f"attention {n // 4}{short}", "attention", 1, n // 4, 1.3, dtype=dtype),
            Case("masks", f"attention {n} padding{short}", "attention", 1, n, dtype=dtype, mask="padding"),
            Case("masks", f"attention {n} documents{short}", "attention", 1, n, dtype=dtype, mask="documents"),
            Case("ffn", f"ffn {tokens}{short}", "ffn", 1, tokens, 1.7, dtype=dtype),
            Case("ffn", f"ffn lora {tokens}{short}", "lora", 1, tokens, 1.7, dtype=dtype),
            Case("ffn", f"ffn gated {tokens}{short}", "glu", 1, tokens, 1.7, dtype=dtype),
        ]
    llama = {"width": 1024, "hidden": 2816, "heads": 16, "kv_heads": 4}
    for dtype, short in (("float32", ""), ("bfloat16", " bf16")):
        found += [
            Case("block", f"gpt2 block 4 x 1024{short}", "gpt2", 4, 1024, 1.4, dtype=dtype),
            Case("block", f"gpt2 block 1 x 4096{short}", "gpt2", 1, 4096, 1.8, dtype=dtype),
            Case("block", f"llama block 4 x 1024{short}", "llama", 4, 1024, 1.4, dtype=dtype, **llama),
            Case("block", f"llama block 1 x 4096{short}", "llama", 1, 4096, 1.8, dtype=dtype, **llama),
        ]
    for length in (128, 256, 512, 1024, 2048):
        found.append(Case("break-even", f"attention {length} lifted", "attention", 1, length, lift=True))
    for count in (64, 128, 256, 512, 1024):
        found.append(Case("break-even", f"ffn {count} lifted", "ffn", 1, count, lift=True))
    for hidden in (256, 512, 1024, 2048):
        name = f"ffn {tokens}, {hidden // 4} x {hidden} lifted"
        found.append(Case("break-even", name, "ffn", 1, tokens, width=hidden // 4, hidden=hidden, lift=True))
    found.append(Case("skipped", "gpt2 block 1 x 128, all skipped", "gpt2", 1, 128, 0.97))
    for threads in (1, 2):
        found.append(Case("threads", f"attention {n // 2}, {threads} threads", "attention", 1, n // 2, threads=threads))
        found.append(Case("threads", f"ffn {tokens}, {threads} threads", "ffn", 1, tokens, threads=threads))
    for density in (0.0625, 0.25, 0.5):
        for length in (2048, 4096, 8192):
            name = f"attention {length} at {density:g}"
            found.append(Case("density", name, "attention", 1, length, attention=density, heads=4, width=256, kv_heads=4))
    return found


def _memory_cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("memory", "gpt2 block 1 x 512", "gpt2", 1, 512, lift=True)]
    llama = {"width": 1024, "hidden": 2816, "heads": 16, "kv_heads": 4}
    found = [
        Case("memory", "gpt2 block 4 x 1024", "gpt2", 4, 1024),
        Case("memory", "gpt2 block 1 x 4096", "gpt2", 1, 4096),
        Case("memory", "llama block 1 x 4096", "llama", 1, 4096, **llama),
    ]
    small = {"heads": 4, "kv_heads": 4, "width": 256, "hidden": 1024}
    return found + [Case("growth", f"small block 1 x {n}", "gpt2", 1, n, **small) for n in (1024, 4096, 16384, 32768)]


def conditions() -> dict[str, Any]:
    """Machine and versions."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        flags = next((line for line in lines if line.startswith("flags")), "")
    except (OSError, StopIteration):
        flags = ""
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def row_of(case: Case, result: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in result:
        return f"{case.name:38} failed: {result['failed'][:80]}"
    low, high = result["ratio_quartiles"]
    goal = "" if case.goal is None else f"  goal {case.goal:g} {'met' if result['ratio'] >= case.goal else 'NOT met'}"
    quality = ", ".join(f"{k} {v:.2f}" for q in result["quality"].values() for k, v in q.items() if v == v)
    times = f"{result['dense']['step'] * 1e3:9.1f} ms {result['spt']['step'] * 1e3:9.1f} ms"
    return f"{case.name:38} {times}  {result['ratio']:5.2f}x [{low:.2f}, {high:.2f}]{goal}  {quality}"


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() and args.only else {"cases": {}}
    report["conditions"] = conditions() | ({"threads": args.threads} if args.threads else {})
    groups = ["attention", "masks", "ffn", "block", "break-even", "skipped", "threads", "density", "memory", "compile"]
    wanted = args.only or (groups[:-2] if args.quick else groups)
    env = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else None
    seconds = args.seconds or (1.0 if args.quick else 6.0)
    print(f"{report['conditions']}\n{'case':38} {'dense':>12} {'spt':>12}  dense / spt [quartiles]")
    for case in cases(args.quick):
        if case.group in wanted and (not args.match or args.match in case.name):
            result = spawn("time", case, seconds=seconds, env=env)
            report["cases"][case.name] = {"case": dataclasses.asdict(case), **result}
            print(row_of(case, result), flush=True)
            _write(out, report)
    if "memory" in wanted:
        for case in _memory_cases(args.quick):
            if args.match and args.match not in case.name:
                continue
            both = {v: spawn("memory", case, variant=v, env=env) for v in ("dense", "spt")}
            report["cases"][f"memory {case.name}"] = {"case": dataclasses.asdict(case), **both}
            if not any("failed" in r for r in both.values()):
                parts = [f"{k[:-6]} {both['spt'][k] / max(1, both['dense'][k]):.2f}x" for k in ("saved_bytes", "peak_bytes")]
                print(f"memory {case.name:31} " + ", ".join(parts), both, flush=True)
            else:
                print(f"memory {case.name:31} {both}", flush=True)
            _write(out, report)
    if "compile" in wanted:
        case = Case("compile", "gpt2 block", "gpt2", 1, 1024, lift=True)
        report["cases"]["compile"] = found = {"case": dataclasses.asdict(case)}
        for variant in ("dense", "spt"):
            with tempfile.TemporaryDirectory() as folder:
                fresh = {**(env or {}), "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "SPT_CACHE_DIR": f"{folder}/spt"}
                found[variant] = spawn("compile", case, variant=variant, env=fresh)
                found[f"{variant} again"] = spawn("compile", case, variant=variant, env=fresh)
        print("compile", {k: v for k, v in found.items() if k != "case"}, flush=True)
        _write(out, report)
    if args.plot:
        plot(report, Path(args.plot))


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed-up of attention against its length, one line per density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[float, list[tuple[int, float]]] = {}
    for entry in report["cases"].values():
        case = entry["case"]
        if case["model"] == "attention" and case["dtype"] == "float32" and case["mask"] == "causal" and "ratio" in entry:
            if case["group"] != "threads":
                lines.setdefault(case["attention"], []).append((case["tokens"], entry["ratio"]))
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for density, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=f"density {density:g}")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="keys", ylabel="dense time / spt time, forward + backward", title="Causal attention, fp32")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--only", action="append", help="this group alone (may be repeated); merges into the file")
    parser.add_argument("--match", help="only cases whose name contains this")
    parser.add_argument("--threads", type=int, help="threads of every process")
    parser.add_argument("--seconds", type=float, help="least time to take steps, per case")
    parser.add_argument("--out", default="out/bench/cpu.json", help="where the results go")
    parser.add_argument("--plot", help="a PNG file for the plot")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_worker(json.loads(args.worker))))
    else:
        run(args)


if __name__ == "__main__":
    main()
