"""Sparse attention against fused SDPA on a CPU, operator by operator in one process: no compilation, so it is quick.

    python -m benchmarks.cpu_operators [--threads N] [--out FILE]

Dense is `F.scaled_dot_product_attention(is_causal=True)` with its backward, sparse the choice of tiles, attention and its
backward through the registry, in turns; medians and the median of the ratios, forward + backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cpu import conditions
from spt_compiler.lowering import registry

# dtype, tokens, query heads, key heads, density, mask
CASES = (
    ("float32", 8192, 2, 2, 0.125, "causal"),
    ("float32", 8192, 2, 2, 0.125, "padding"),
    ("float32", 8192, 2, 2, 0.125, "documents"),
    ("bfloat16", 8192, 2, 2, 0.125, "causal"),
    ("float32", 2048, 12, 12, 0.125, "causal"),
    ("bfloat16", 2048, 12, 12, 0.125, "causal"),
    ("float32", 2048, 16, 4, 0.125, "causal"),
    ("float32", 1024, 12, 12, 0.125, "causal"),
    ("float32", 512, 12, 12, 0.25, "causal"),
    ("float32", 256, 12, 12, 0.25, "causal"),
    ("bfloat16", 512, 12, 12, 0.25, "causal"),
)


def measure(dtype: str, tokens: int, heads: int, groups: int, density: float, mask: str, steps: int) -> dict[str, Any]:
    """One case: median seconds of dense, of the three sparse operators, and the ratio."""
    torch.manual_seed(0)
    kind, dim = getattr(torch, dtype), 64
    q, k, v = (torch.randn(1, h, tokens, dim, dtype=kind).requires_grad_() for h in (heads, groups, groups))
    grad = torch.randn(1, heads, tokens, dim, dtype=kind)
    codebook, mean, budget = torch.randn(groups, 8, 16, 8), torch.zeros(groups, dim), torch.tensor([density])
    expr, expr_in = "k <= q", []
    if mask == "padding":
        expr, expr_in = "k <= q & t0[b, k]", [torch.arange(tokens).expand(1, -1) >= tokens // 8]
    elif mask == "documents":
        expr, expr_in = "k <= q & t0[b, q] == t0[b, k]", [(torch.arange(tokens) * 6 // tokens).expand(1, -1).contiguous()]
    fixed = (None, expr, expr_in)
    tail = (expr, expr_in, None, 0.0, dim**-0.5, None, "zero", 64, 16)

    def sparse() -> list[float]:
        times = [time.perf_counter()]
        with torch.no_grad():
            rule = (codebook, mean, budget, density, 64, 16, dim**-0.5, None, "pq", 0)
            tiles, counts = registry.dispatch("select_tiles_v1", "cpu", q, k, *fixed, *rule)
            times.append(time.perf_counter())
            out, lse = registry.dispatch("tile_attention_v1", "cpu", q, k, v, None, tiles, counts, *tail)
            times.append(time.perf_counter())
            head = (grad, q, k, v, None, out, lse, tiles, counts)
            registry.dispatch("tile_attention_backward_v1", "cpu", *head, *tail, [True, True, True, False])
            times.append(time.perf_counter())
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    def dense() -> float:
        start = time.perf_counter()
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
        torch.autograd.grad(out, (q, k, v), grad)
        return time.perf_counter() - start

    dense(), sparse()
    rows = [(dense(), sparse()) for _ in range(steps)]
    low, middle, high = statistics.quantiles([d / sum(s) for d, s in rows], n=4)
    parts = {name: statistics.median(s[i] for _, s in rows) for i, name in enumerate(("select", "forward", "backward"))}
    return {"dense": statistics.median(d for d, _ in rows), **parts, "ratio": middle, "quartiles": [low, high], "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default="out/bench/cpu_operators.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"conditions": conditions(), "cases": []}
    for case in CASES:
        found = measure(*case, steps=9 if case[1] <= 2048 else 5)
        names = ("dtype", "tokens", "heads", "key_heads", "density", "mask")
        report["cases"].append(dict(zip(names, case, strict=True)) | found)
        parts = " + ".join(f"{found[p] * 1e3:.1f}" for p in ("select", "forward", "backward"))
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
        print(*case, f"dense {found['dense'] * 1e3:.1f} ms, spt {parts} ms: {found['ratio']:.2f}x", found["quartiles"], flush=True)


if __name__ == "__main__":
    main()
