"""T4 and T5: whole Transformer blocks through `torch.compile(backend="spt")`, full training and LoRA of rank 16.

Columns: dense with materialised attention (what SPT compared with), dense with flash attention and Inductor (the baseline
that counts), and spt with the thresholds of its defaults; at short lengths, where launching takes longer than computing, the last
two as CUDA graphs, too. Time and peak memory of one forward and backward pass; T4 counts the mean of many steps in a row, learning
and measuring included, of the faster of both kinds.
"""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..saved import saved_bytes
from .common import Bench, Case, profile

PART = "blocks"
# The first steps of a sparse block are those in which its sites learn.
WARM_UP = 12
# Two turns of learning: one in 32 steps.
STEPS = 64
RANK = 16
GRAPHS = ", CUDA graphs"
# name -> (width, heads, key heads, hidden, gated, batch, tokens, goal of T4 with LoRA)
SHAPES: dict[str, tuple[int, int, int, int, bool, int, int, float | None]] = {
    "opt-1024 16x512": (1024, 16, 16, 4096, False, 16, 512, None),
    "opt-2048 16x512": (2048, 32, 32, 8192, False, 16, 512, 1.25),
    "opt-2560 16x512": (2560, 32, 32, 10240, False, 16, 512, None),
    "llama-2560 16x512": (2560, 32, 32, 6912, True, 16, 512, None),
    "llama-4096 16x512": (4096, 32, 32, 11008, True, 16, 512, None),
    "Llama-3-8B 4x4096": (4096, 32, 8, 14336, True, 4, 4096, 1.5),
    "Llama-3-8B 1x16384": (4096, 32, 8, 14336, True, 1, 16384, 1.7),
    "Llama-3-8B 1x65536": (4096, 32, 8, 14336, True, 1, 65536, 2.1),
}
TOY: dict[str, tuple[int, int, int, int, bool, int, int, float | None]] = {
    "toy llama": (32, 2, 1, 64, True, 1, 48, 1.5),
}
# Thresholds as measured: short contexts keep dense attention.
OPTIONS = {"attention.density": 1 / 8, "ffn.density": 1 / 2}
TOY_OPTIONS = {"attention.min_keys": 0, "ffn.min_width": 0, "inner": "eager"}


class LoRA(nn.Module):
    """A frozen linear layer with a trained branch of low rank."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 2.0


class Block(nn.Module):
    """Pre-norm block: causal attention, then Linear-ReLU-Linear or a gated SiLU FFN."""

    def __init__(self, width: int, heads: int, key_heads: int, hidden: int, gated: bool):
        super().__init__()
        self.heads, self.key_heads, self.gated, self.materialised = heads, key_heads, gated, False
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)
        bias, dim = not gated, width // heads
        self.q, self.out = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=bias)
        self.k, self.v = (nn.Linear(width, key_heads * dim, bias=bias) for _ in range(2))
        self.up, self.down = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
        if gated:
            self.gate = nn.Linear(width, hidden, bias=False)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.materialised:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.key_heads)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        h = self.norm1(x)
        q, k, v = (p(h).view(batch, length, -1, width // self.heads).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        h = self.norm2(x)
        hidden = F.silu(self.gate(h)) * self.up(h) if self.gated else F.relu(self.up(h))
        return x + self.down(hidden)


def with_lora(block: Block) -> Block:
    """The block with every linear layer frozen and given a low-rank branch; norms are frozen."""
    block.requires_grad_(False)
    for name, module in list(block.named_children()):
        if isinstance(module, nn.Linear):
            setattr(block, name, LoRA(module))
    return block


def cases(dry: bool) -> list[Case]:
    """One per shape and tuning; LoRA decides T4."""

    def decides(goal: float | None, tuning: str) -> bool:
        return dry or (tuning == "LoRA" and goal is not None)

    return [
        Case(f"{name} {tuning}", functools.partial(run, name=name, tuning=tuning), 90, decides(shape[-1], tuning))
        for name, shape in (TOY if dry else SHAPES).items()
        for tuning in ("full", "LoRA")
    ]


def run(bench: Bench, name: str, tuning: str) -> None:
    """The three columns of a block."""
    width, heads, key_heads, hidden, gated, batch, length, goal = (TOY if bench.dry else SHAPES)[name]
    torch.manual_seed(0)
    block = Block(width, heads, key_heads, hidden, gated)
    block = (with_lora(block) if tuning == "LoRA" else block).to(bench.device, bench.dtype)
    x = torch.randn(batch, length, width, dtype=bench.dtype, device=bench.device, requires_grad=True)
    times: dict[str, float | None] = {}
    saved: dict[str, int | None] = {}
    graphs = [f"{column}{GRAPHS}" for column in ("dense flash", "spt")] if length <= 512 and not bench.dry else []
    for column in ("dense materialised", "dense flash", "spt", *graphs):
        times[column] = _column(bench, f"{name} {tuning}", column, block, x)
        saved[column] = next(r.get("saved_bytes") for r in reversed(bench.rows) if r["what"] == column)
    best, ours = (
        min((t for column, t in times.items() if t and column.startswith(kind)), default=None) for kind in ("dense flash", "spt")
    )
    if goal is not None and tuning == "LoRA":
        bench.target(f"T4 {name}", name, best / ours if best and ours else None, goal)
    # T5 as a gain, as all targets are: dense bytes over ours.
    kept, dense = saved["spt"], saved["dense flash"]
    bench.target(f"T5 {name} {tuning}", name, dense / kept if dense and kept else None, 1 / 0.70 if gated else 1 / 0.75)


def _column(bench: Bench, case: str, column: str, block: Block, x: Tensor) -> float | None:
    if column == "dense materialised" and x.shape[1] > 4096:
        bench.add(PART, case, column, skipped="its score matrix does not fit")
        return None
    block = copy.deepcopy(block)
    block.materialised = column == "dense materialised"
    torch._dynamo.reset()
    call: Any = block
    graphs = {"triton.cudagraphs": True} if column.endswith(GRAPHS) else {}
    if column.startswith("dense flash") and not bench.dry:
        call = torch.compile(block, dynamic=False, options=graphs)
    elif column.startswith("spt"):
        options = {**OPTIONS, **(TOY_OPTIONS if bench.dry else {"inner_options": graphs}), "require_matches": 1}
        call = torch.compile(block, backend="spt", dynamic=False, options=options)
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]

    def step() -> None:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        out = call(x)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    def ready() -> Any:
        for _ in range(1 if bench.dry else WARM_UP):  # compiles, too
            step()
        return step

    # At toy sizes codebooks and lists outweigh activations: tests/test_saved_bytes.py counts at fair ones.
    sizes = {} if bench.dry else {"saved_bytes": _saved_bytes(call, ready, x), "peak_bytes": _peak(bench, step)}
    ms = bench.attempt(PART, case, column, ready, **sizes)
    if ms is None or column == "dense materialised":
        return ms
    if not graphs:
        profile(bench, "profile", f"{column} block {case}", step, {})
    return _many(bench, case, column, step)


def _many(bench: Bench, case: str, column: str, step: Any) -> float | None:
    """Milliseconds of a step, as the mean of many in a row: what a site learns and measures in some of them is inside."""
    if bench.dry:
        return None
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    ms = (time.perf_counter() - began) * 1e3 / STEPS
    bench.add(PART, case, f"{column}, mean of {STEPS} steps", ms=ms)
    return ms


def _peak(bench: Bench, step: Any) -> int | None:
    try:
        return bench.peak_bytes(step)
    except Exception:  # the timing that follows reports it
        return None


def _saved_bytes(call: Any, ready: Any, x: Tensor) -> int | None:
    """Bytes that one forward pass keeps for backward, besides parameters (T5)."""
    try:
        ready()
        return saved_bytes(lambda: call(x), getattr(call, "_orig_mod", call).parameters())
    except Exception:  # as in `_peak`
        return None
