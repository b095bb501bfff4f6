"""Speed and memory on a CPU: `torch.compile` dense (Inductor, fused SDPA) against the same with backend "spt".

    python -m benchmarks.cpu [--quick] [--only GROUP ...] [--dtype D] [--threads N] [--resume] [--out benchmarks/results/cpu.json]
                             [--plot cpu.png] [--report docs/cpu.md]

Every case is a process of its own in which both variants take turns, step by step, so that whatever else the machine does meets
both alike; reported are medians, quartiles, and the median of the step-by-step ratios. Selection, code updates, routing and
state look-up are inside every figure. Blocks and FFNs take steps of fine-tuning: what is timed in turns are steps after the
first rounds of learning; what one later round and the looks of the guard take beyond a plain step is timed apart, and its share
of every step (one round in 32, one interval in 64) is added to each of them. Memory comes from one process per variant (VmHWM),
bytes kept for backward from saved-tensor hooks. Quality at the same settings stands beside: kept attention mass and relative FFN
error on the inputs of the benchmark, which are random with a little structure; they are no substitute for a trained model (see
benchmarks/quality).
Results are written after every case; `--resume` measures only what the file lacks, `--report` writes the tables of a document
anew from the file (`--no-run`: without measuring anything).
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .saved import saved_bytes

GROUPS = ("attention", "masks", "ffn", "block", "skipped", "memory", "compile", "threads", "break-even", "density")
STEADY = "after learning"  # how blocks and FFNs are timed; results of another way are not shown, and `--resume` measures them anew
LOOKED = 4  # the last calls of an interval of the guard that are timed
ROOT = Path(__file__).resolve().parents[1]
LONGEST = 600  # seconds of one measurement; what takes longer hangs


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        group: which part of the table. name: unique. goal: least dense time / spt time, or None.
        model: "attention", "ffn", "glu", "lora", "gpt2" or "llama". batch, tokens: of the input.
        attention: share of keys; ffn: share of blocks; None: that part stays as it is. mask: "causal", "padding", "documents".
        dtype: "float32" or "bfloat16". lift: take sizes below the break-even, too.
        materialised: attention of the block spelled out.
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
    materialised: bool = False

    @property
    def method(self) -> str | None:
        """How it is timed, where that is not by its first steps."""
        return STEADY if self.group in ("block", "ffn") else None


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
        if self.case.materialised:
            k, v = (t.repeat_interleave(self.case.heads // self.case.kv_heads, dim=1) for t in (k, v))
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            y = (q @ k.transpose(-1, -2) * self.dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v
        else:
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


Pair = tuple[tuple[float, float], tuple[float, float]]  # seconds of (forward, rest) of a step: dense, spt


class Stepping(Protocol):
    def step(self) -> tuple[float, float]: ...


class Side:
    """One variant of a case, compiled and ready to take steps."""

    def __init__(self, case: Case, variant: str):
        self.model, self.inputs, self.grad = build(case)
        if variant == "spt":
            self.model.compile(backend="spt", options=options(case))
        else:  # Inductor would find the spelled-out attention, and fuse it
            self.model.compile(backend="aot_eager_decomp_partition" if case.materialised else "inductor")
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
    if case.method == STEADY:
        rows, learned, looked = steady_steps(dense, sparse, 3 * seconds)
        result = _steady(rows, learned, looked)
    else:
        for _ in range(4):  # compilation, first use, and the first rounds of learning
            dense.step(), sparse.step()
        rows = []
        until = time.perf_counter() + seconds
        while len(rows) < 5 or (time.perf_counter() < until and len(rows) < 60):
            rows.append((dense.step(), sparse.step()))
        result = _compared(rows)
        # With all that learns in between: the first rounds of it stand close together, later ones are 32 steps apart.
        result["whole_ratio"] = sum(sum(a) for a, _ in rows) / sum(sum(b) for _, b in rows)
    result["quality"] = {
        name: {key: figures[key] for key in ("mass", "rel_error") if key in figures}
        for name, figures in spt_compiler.metrics(sparse.model).items()
    }
    result["replaced"] = sorted(result["quality"])
    return result


def _compared(rows: Sequence[Pair], extra: float = 0.0) -> dict[str, Any]:
    """Figures of steps taken in turns; `extra` seconds are added to those of spt where ratios are taken."""
    result: dict[str, Any] = {"steps": len(rows)}
    for index, name in enumerate(("dense", "spt")):
        whole = [sum(row[index]) for row in rows]
        low, _, high = statistics.quantiles(whole, n=4)
        result[name] = {
            "forward": statistics.median(row[index][0] for row in rows),
            "step": statistics.median(whole),
            "quartiles": [low, high],
        }
    ratios = [sum(a) / (sum(b) + extra) for a, b in rows]
    low, _, high = statistics.quantiles(ratios, n=4)
    result |= {"ratio": statistics.median(ratios), "ratio_quartiles": [low, high]}
    result["slowest"] = max(sum(b) for _, b in rows) / result["spt"]["step"]
    result["forward_ratio"] = statistics.median(a[0] / b[0] for a, b in rows)
    return result


def steady_steps(dense: Stepping, sparse: Side, seconds: float) -> tuple[list[Pair], list[float], list[float]]:
    """Steps of fine-tuning of a model whose first rounds of learning are over.

    A call first does what the number of backwards before it asks for, and observes what the next one will want. Learning is due
    after 1, 2, 4, 8, 16 and every 32 of them, the guard looks at the end of each interval. Between two of these nothing is done
    but training, once the sampled rows fill their rings (the first five calls): such calls are left out by putting the count
    forward, up to the call before, which observes.

    Returns: (dense, spt) of plain steps taken in turns; seconds of the two calls that a later round of learning takes part in;
        seconds of the last LOOKED calls of an interval of the guard, the last of which learns, too.
    """
    from spt_compiler.learning import PERIOD

    for _ in range(5):
        sparse.step()
    for due in (8, 16):
        _put_forward(sparse, due - 2)
        sparse.step(), sparse.step()
    dense.step(), dense.step()
    _put_forward(sparse, 18)
    dense.step(), sparse.step()
    rows: list[Pair] = []
    until = time.perf_counter() + seconds
    while len(rows) < 5 or (time.perf_counter() < until and len(rows) < 10):  # ten: the call before 31 is the last plain one
        rows.append((dense.step(), sparse.step()))
    _put_forward(sparse, PERIOD - 2)
    learned = [sum(sparse.step()) for _ in range(2)]
    _put_forward(sparse, _interval() - LOOKED)
    return rows, learned, [sum(sparse.step()) for _ in range(LOOKED)]


def _steady(rows: Sequence[Pair], learned: Sequence[float], looked: Sequence[float]) -> dict[str, Any]:
    """Figures of `steady_steps`: "ratio" with each step's share of upkeep, "steady_ratio" without."""
    from spt_compiler.learning import PERIOD

    steady = _compared(rows)
    plain = steady["spt"]["step"]
    learning, guard = upkeep(plain, learned, looked, PERIOD, _interval())
    return {
        **_compared(rows, learning + guard),
        "method": STEADY,
        "steady_ratio": steady["ratio"],
        "steady_quartiles": steady["ratio_quartiles"],
        "learning_share": learning / plain,
        "guard_share": guard / plain,
        "learning_calls": list(learned),
        "guard_calls": list(looked),
    }


def upkeep(plain: float, learned: Sequence[float], looked: Sequence[float], period: int, interval: int) -> tuple[float, float]:
    """Seconds of learning and of the guard that fall to one step in the long run.

    Args:
        plain: seconds of a step without either. learned, looked: of the calls that `steady_steps` returns.
        period: steps between two rounds of learning. interval: between two judgements of the guard.
    """
    from spt_compiler.state import LOOKS

    one_round = sum(learned) - len(learned) * plain
    # All looks but those of the first and last calls are alike: the second call stands for those that were not taken.
    interval_of = sum(looked) - len(looked) * plain + (LOOKS + 1 - len(looked)) * (looked[1] - plain)
    return one_round / period, (interval_of - one_round) / interval


def _interval() -> int:
    from spt_compiler import SPTConfig

    return SPTConfig().guard.interval


def _put_forward(side: Side, steps: int) -> None:
    """Sets how many backwards the sites of a model have counted."""
    from spt_compiler.state import STORE

    for _, state in STORE.named_states(side.model):
        assert state.settled and state.counter("steps") <= steps, "upkeep would be left out, or repeated"
        state.set_counter("steps", steps)


def _memory(case: Case, variant: str) -> dict[str, Any]:
    side = Side(case, variant)
    side.step()
    own = (*side.model.parameters(), *side.model.buffers(), *side.inputs)
    if variant == "materialised" or case.group == "growth":
        if case.group == "growth":
            side.step()  # the first step selects everything
        return {"saved_bytes": saved_bytes(lambda: side.model(*side.inputs), own)}

    def peak(steps: int) -> int:
        with contextlib.suppress(OSError):  # VmHWM is then that of steps alone, without the compiler's
            Path("/proc/self/clear_refs").write_text("5")
        for _ in range(steps):
            side.step()
        return _status("VmHWM")

    early = peak(5)  # some of these steps learn
    kept = saved_bytes(lambda: side.model(*side.inputs), own)
    before = _status("VmRSS")
    return {"saved_bytes": kept, "early_peak_bytes": early, "peak_bytes": peak(3), "resting_bytes": before}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _compile(case: Case, variant: str) -> dict[str, Any]:
    """Seconds from `model.compile()` until the first step is done, and those of our own stages.

    The call belongs to it: with Inductor named as the backend, it imports Inductor; with another one the first step does.
    """
    from spt_compiler import debug

    start = time.perf_counter()
    side = Side(case, variant)
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
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {LONGEST} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


LLAMA = {"width": 1024, "hidden": 2816, "heads": 16, "kv_heads": 4}


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
            Case("block", f"gpt2 block 4 x 1024{short}", "gpt2", 4, 1024, 1.4, dtype=dtype),
            Case("block", f"gpt2 block 1 x 4096{short}", "gpt2", 1, 4096, 1.8, dtype=dtype),
            Case("block", f"llama block 4 x 1024{short}", "llama", 4, 1024, 1.4, dtype=dtype, **LLAMA),
            Case("block", f"llama block 1 x 4096{short}", "llama", 1, 4096, 1.8, dtype=dtype, **LLAMA),
        ]
    found.append(Case("skipped", "gpt2 block 1 x 128, all skipped", "gpt2", 1, 128, 0.97))
    for threads in (1, 2):
        found.append(Case("threads", f"attention {n // 2}, {threads} threads", "attention", 1, n // 2, threads=threads))
        found.append(Case("threads", f"ffn {tokens}, {threads} threads", "ffn", 1, tokens, threads=threads))
    for dtype, short in (("float32", ""), ("bfloat16", " bf16")):
        for length in (256, 512, 1024):
            found.append(Case("break-even", f"attention {length} lifted{short}", "attention", 1, length, lift=True, dtype=dtype))
            found.append(Case("break-even", f"ffn {length} lifted{short}", "ffn", 1, length, lift=True, dtype=dtype))
    for hidden in (256, 512, 1024):
        name = f"ffn {tokens}, {hidden // 4} x {hidden} lifted"
        found.append(Case("break-even", name, "ffn", 1, tokens, width=hidden // 4, hidden=hidden, lift=True))
    for density in (0.0625, 0.125, 0.25, 0.5):
        for length in (1024, 2048, 4096):
            name = f"attention {length} at {density:g}"
            found.append(Case("density", name, "attention", 1, length, attention=density, heads=4, width=256, kv_heads=4))
    return found


def _memory_cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("memory", "gpt2 block 1 x 512", "gpt2", 1, 512, lift=True)]
    found = [
        Case("memory", "gpt2 block 4 x 1024", "gpt2", 4, 1024),
        Case("memory", "gpt2 block 1 x 4096", "gpt2", 1, 4096),
        Case("memory", "llama block 4 x 1024", "llama", 4, 1024, **LLAMA),
        Case("memory", "llama block 1 x 4096", "llama", 1, 4096, **LLAMA),
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
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def row_of(case: Case, result: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in result:
        return f"{case.name:38} failed: {result['failed'][:80]}"
    low, high = result["ratio_quartiles"]
    goal = "" if case.goal is None else f"  goal {case.goal:g} {'met' if result['ratio'] >= case.goal else 'NOT met'}"
    times = f"{result['dense']['step'] * 1e3:9.1f} ms {result['spt']['step'] * 1e3:9.1f} ms"
    beside = f"  ({_upkeep(result)})" if case.method == STEADY else ""
    return f"{case.name:38} {times}  {result['ratio']:5.2f}x [{low:.2f}, {high:.2f}]{beside}{goal}  {_quality(result)}"


def _upkeep(result: dict[str, Any]) -> str:
    shares = f"learning {result['learning_share']:.1%}, guard {result['guard_share']:.1%}"
    return f"{result['steady_ratio']:.2f}x without {shares} of a step"


def shown(report: dict[str, Any]) -> dict[str, Any]:
    """The results that were measured as they would be today."""
    return {name: e for name, e in report["cases"].items() if "ratio" not in e or e.get("method") == Case(**e["case"]).method}


def _quality(result: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.2f}" for q in result["quality"].values() for k, v in q.items() if v == v)


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    keep = out.exists() and (args.only or args.match or args.dtype or args.resume or args.no_run)
    report: dict[str, Any] = json.loads(out.read_text()) if keep else {"cases": {}}
    if not args.no_run:
        _measure(args, out, report)
    for goal in goals(report):
        print(f"{goal['goal']:72} {goal['wanted']:>8} {goal['measured']:8.3f}  {'met' if goal['met'] else 'NOT met'}")
    if args.report:
        write_tables(report, Path(args.report))
    if args.plot:
        plot(report, Path(args.plot))


def _measure(args: argparse.Namespace, out: Path, report: dict[str, Any]) -> None:
    report["conditions"] = conditions() | ({"threads": args.threads} if args.threads else {})
    wanted = args.only or [g for g in GROUPS if not args.quick or g not in ("memory", "compile")]
    env = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else None
    seconds = args.seconds or (1.0 if args.quick else 5.0)

    def missing(name: str) -> bool:
        entry = shown(report).get(name)
        known = entry is not None and not any("failed" in part for part in (entry, *entry.values()) if isinstance(part, dict))
        return not (args.resume and known) and (not args.match or args.match in name)

    print(f"{report['conditions']}\n{'case':38} {'dense':>12} {'spt':>12}  dense / spt [quartiles]", flush=True)
    for group in wanted:
        for case in (c for c in cases(args.quick) if c.group == group and args.dtype in (None, c.dtype) and missing(c.name)):
            result = spawn("time", case, seconds=seconds, env=env)
            report["cases"][case.name] = {"case": dataclasses.asdict(case), **result}
            print(row_of(case, result), flush=True)
            _write(out, report)
        for case in (c for c in _memory_cases(args.quick) if group == "memory" and missing(f"memory {c.name}")):
            variants = ("spt",) if case.group == "growth" else ("dense", "spt")
            found = {v: spawn("memory", case, variant=v, env=env) for v in variants}
            if case.group == "memory":
                spelled = dataclasses.replace(case, materialised=True)
                found["materialised"] = spawn("memory", spelled, variant="materialised", env=env)
            report["cases"][f"memory {case.name}"] = {"case": dataclasses.asdict(case), **found}
            print(f"memory {case.name:31} {found}", flush=True)
            _write(out, report)
        if group == "compile" and missing("compile"):
            report["cases"]["compile"] = found = _compilation(env)
            print("compile", {k: v for k, v in found.items() if k != "case"}, flush=True)
            _write(out, report)


def _compilation(env: dict[str, str] | None) -> dict[str, Any]:
    """Cold, and again with the files that the first process left."""
    case = Case("compile", "gpt2 block", "gpt2", 1, 1024, lift=True)
    found: dict[str, Any] = {"case": dataclasses.asdict(case)}
    for variant in ("dense", "spt"):
        with tempfile.TemporaryDirectory() as folder:
            fresh = {**(env or {}), "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "SPT_CACHE_DIR": f"{folder}/spt"}
            found[variant] = spawn("compile", case, variant=variant, env=fresh)
            found[f"{variant} again"] = spawn("compile", case, variant=variant, env=fresh)
    return found


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the goals ask, what was measured, and whether that is enough; of what was measured."""
    found: list[dict[str, Any]] = []
    entries = shown(report)

    def add(goal: str, measured: float, least: float | None = None, most: float | None = None) -> None:
        met = measured >= least if least is not None else measured <= (most or 0.0)
        found.append(
            {"goal": goal, "wanted": f">= {least:g}" if least is not None else f"<= {most:g}", "measured": measured, "met": met}
        )

    for name, entry in entries.items():
        case = entry["case"]
        if "ratio" in entry and case["goal"] is not None:
            what = "dense / spt, learning and guard included" if "steady_ratio" in entry else "dense / spt"
            add(f"{name}: {what}", entry["ratio"], least=case["goal"])
        plain = entries.get(name.replace(f" {case['mask']}", ""), {})
        if case["group"] == "masks" and "spt" in entry and "spt" in plain:
            add(f"{name}: speed of that without", plain["spt"]["step"] / entry["spt"]["step"], least=0.9)
        dense, spt = entry.get("dense", {}), entry.get("spt", {})
        if "saved_bytes" in dense and "saved_bytes" in spt and case["group"] == "memory":
            most = 0.70 if case["model"] == "llama" else 0.75
            add(f"{name}: kept for backward / dense", spt["saved_bytes"] / dense["saved_bytes"], most=most)
            if "saved_bytes" in entry.get("materialised", {}):
                spelled = entry["materialised"]["saved_bytes"]
                add(f"{name}: kept / materialised attention", spt["saved_bytes"] / spelled, most=0.5)
            add(f"{name}: peak / dense", spt["peak_bytes"] / dense["peak_bytes"], most=1.0)
            add(f"{name}: peak of first steps / dense", spt["early_peak_bytes"] / dense["early_peak_bytes"], most=1.0)
    growth = {
        e["case"]["tokens"]: e["spt"]["saved_bytes"]
        for e in entries.values()
        if "saved_bytes" in e.get("spt", {}) and e["case"]["group"] == "growth"
    }
    if len(growth) > 1:
        short, long = min(growth), max(growth)
        add(f"bytes kept a token, {long} / {short} tokens", growth[long] / long / (growth[short] / short), most=1.1)
    for what in ("attention 4096", "ffn 4096"):
        one, two = (entries.get(f"{what}, {n} threads", {}) for n in (1, 2))
        if "dense" in one and "dense" in two:
            dense, spt = (one[v]["step"] / two[v]["step"] for v in ("dense", "spt"))
            add(f"{what}: scaling to two threads (dense {dense:.2f})", spt, least=min(1.8, dense))
    compiled = entries.get("compile", {})
    if all("first_step" in compiled.get(v, {}) for v in ("dense", "spt", "dense again", "spt again")):
        add("cold compile / dense", compiled["spt"]["first_step"] / compiled["dense"]["first_step"], most=1.1)
        add("own passes / cold compile", compiled["spt"]["own_passes"] / compiled["spt"]["first_step"], most=0.05)
        add("second process / dense", compiled["spt again"]["first_step"] / compiled["dense again"]["first_step"], most=1.1)
    return found


def tables(report: dict[str, Any]) -> dict[str, str]:
    """The tables of the document, by name, in Markdown."""
    seen, entries = report["conditions"], shown(report)
    machine = f"{seen['cores']} cores of {seen['processor']} ({', '.join(seen['instructions'])}), {seen['threads']} threads, "
    machine += f"torch {seen['torch']}, Python {seen['python']}, load before the run {seen['load']}"
    times = ["| case | dense | spt | dense / spt [quartiles] | with learning | slowest / median | quality |", "|---" * 7 + "|"]
    memory = ["| case | kept: dense | spt | materialised | peak: dense | spt | first steps: dense | spt |", "|---" * 8 + "|"]
    for name, entry in entries.items():
        if "ratio" in entry:
            steady = "steady_ratio" in entry
            low, high = entry["steady_quartiles" if steady else "ratio_quartiles"]
            cells = [
                name,
                *(f"{entry[v]['step'] * 1e3:.1f} ms" for v in ("dense", "spt")),
                f"**{entry['steady_ratio' if steady else 'ratio']:.2f}x** [{low:.2f}, {high:.2f}]",
            ]
            if steady:
                cells.append(f"{entry['ratio']:.2f}x (learning {entry['learning_share']:.1%}, guard {entry['guard_share']:.1%})")
            else:
                cells.append(f"{entry['whole_ratio']:.2f}x")
            cells += [f"{entry['slowest']:.1f}", _quality(entry)]
            times.append(f"| {' | '.join(cells)} |")
        elif "saved_bytes" in entry.get("spt", {}) and "saved_bytes" in entry.get("dense", {}):
            parts = [(v, "saved_bytes") for v in ("dense", "spt", "materialised")]
            parts += [(v, k) for k in ("peak_bytes", "early_peak_bytes") for v in ("dense", "spt")]
            cells = [f"{entry[v][k] / 1e6:.1f} MB" if k in entry.get(v, {}) else "" for v, k in parts]
            memory.append(f"| {' | '.join([name, *cells])} |")
    reached = ["| goal | wanted | measured | |", "|---" * 4 + "|"]
    reached += [
        f"| {g['goal']} | {g['wanted']} | {g['measured']:.2f} | {'reached' if g['met'] else '**missed**'} |" for g in goals(report)
    ]
    return {"machine": machine, "times": "\n".join(times), "memory": "\n".join(memory), "goals": "\n".join(reached)}


def write_tables(report: dict[str, Any], path: Path) -> None:
    """Replaces what stands between `<!-- table NAME -->` and `<!-- end -->` in a document.

    Raises: ValueError if the document has no such place for a table.
    """
    text = path.read_text(encoding="utf-8")
    for name, table in tables(report).items():
        before, mark, rest = text.partition(f"<!-- table {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if not mark or not end:
            raise ValueError(f"{path} has no place for the table {name!r}: expected <!-- table {name} --> and <!-- end -->")
        text = f"{before}{mark}\n\n{table}\n\n{end}{after}"
    path.write_text(text, encoding="utf-8")


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed-up of attention against its length and against density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [e for e in report["cases"].values() if e["case"]["group"] == "density" and "ratio" in e]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, at, by in ((panels[0], "tokens", "attention"), (panels[1], "attention", "tokens")):
        for value in sorted({e["case"][by] for e in found}):
            points = sorted((e["case"][at], e["ratio"]) for e in found if e["case"][by] == value)
            axes.plot(*zip(*points, strict=True), "o-", label=f"density {value:g}" if by == "attention" else f"{value} keys")
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set(xscale="log", xlabel="keys" if at == "tokens" else "density")
        if found:
            axes.legend()
    panels[0].set(ylabel="dense time / spt time, forward + backward", title="Causal attention, fp32")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--only", action="append", choices=GROUPS, help="this group alone (may be repeated); merges into the file")
    parser.add_argument("--match", help="only cases whose name contains this")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only timed cases of this type; merges into the file")
    parser.add_argument("--threads", type=int, help="threads of every process")
    parser.add_argument("--seconds", type=float, help="least time to take steps, per case")
    parser.add_argument("--out", default="out/bench/cpu.json", help="where the results go")
    parser.add_argument("--resume", action="store_true", help="measure only what the file of results lacks")
    parser.add_argument("--no-run", action="store_true", help="measure nothing: goals, tables and plot from the file of results")
    parser.add_argument("--report", help="a document whose tables are written anew")
    parser.add_argument("--plot", help="a PNG file for the plot")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_worker(json.loads(args.worker))))
    else:
        run(args)


if __name__ == "__main__":
    main()
