"""T3: the routed FFN, routing included, against the compiled dense FFN, torch._grouped_mm and a loop of cuBLAS calls."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Bench, Case, backward_of, profile

PART = "ffn"
# name -> (tokens, model width, hidden width, gated)
SHAPES = {
    "opt-1024 8k": (8192, 1024, 4096, False),
    "opt-2048 8k": (8192, 2048, 8192, False),
    "opt-2560 8k": (8192, 2560, 10240, False),
    "llama-2560 8k": (8192, 2560, 6912, True),
    "llama-4096 8k": (8192, 4096, 11008, True),
    "Llama-3-8B 16k": (16384, 4096, 14336, True),
}
TOY = {"toy gated": (40, 32, 64, True)}
BLOCKS, DENSITY, TILE = 8, 0.5, 128


def cases(dry: bool) -> list[Case]:
    """One per shape, with weights that train and frozen ones; 8192 tokens of width 2048 and more decide T3."""
    return [
        Case(
            f"{name} {trained}",
            functools.partial(run, name=name, trained=trained),
            30,
            dry or (trained == "full" and "8k" in name and e >= 2048),
        )
        for name, (_, e, _, _) in (TOY if dry else SHAPES).items()
        for trained in ("full", "frozen")
    ]


def run(bench: Bench, name: str, trained: str) -> None:
    """Routed, dense and rivals."""
    case, full = f"{name} {trained}", trained == "full"
    n, e, f, gated = (TOY if bench.dry else SHAPES)[name]
    torch.manual_seed(0)
    n_in = 2 if gated else 1

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=bench.dtype, device=bench.device)

    x = rand(n, e).requires_grad_()
    w_in = [(rand(f, e) * e**-0.5).requires_grad_(full) for _ in range(n_in)]
    w_out = (rand(e, f) * f**-0.5).requires_grad_(full)
    grad = rand(n, e)
    leaves = [x, *w_in, w_out] if full else [x]
    product = 2 * n * e * f * (n_in + 1)  # operations of the dense forward pass; backward has once or twice as many

    def activated(pre: list[Tensor]) -> Tensor:
        return F.silu(pre[0]) * pre[1] if gated else F.gelu(pre[0])

    def dense(x: Tensor) -> Tensor:
        return F.linear(activated([F.linear(x, w) for w in w_in]), w_out)

    def timed(what: str, call: Any, share: float = 1.0) -> float | None:
        bench.attempt(PART, case, f"{what} forward", lambda: call, flops=share * product)
        flops = share * product * (3 if full else 2)
        return bench.attempt(
            PART, case, f"{what} forward and backward", lambda: lambda: backward_of(call(), grad, leaves), flops=flops
        )

    run_dense = dense if bench.dry else torch.compile(dense, dynamic=False)
    eager = timed("dense", lambda: dense(x))
    compiled = timed("dense compiled", lambda: run_dense(x))
    best = min((t for t in (eager, compiled) if t is not None), default=None)

    ops = torch.ops.spt
    scores = torch.randn(n, BLOCKS, device=bench.device)
    on = torch.zeros(BLOCKS, dtype=torch.bool, device=bench.device)
    budget = torch.tensor([DENSITY], device=bench.device)
    permutation = torch.randperm(f, device=bench.device).int()
    compensation = torch.randn(BLOCKS, e, device=bench.device)
    act = "silu(x0) * x1" if gated else "gelu(x0)"
    tile = 16 if bench.dry else TILE

    def route() -> tuple[Tensor, Tensor, Tensor]:
        return ops.route_v1(scores, on, budget, DENSITY, tile, 0)

    def routed() -> Tensor:
        activation = (act, [], None, 0.0, None, 0.0, True)
        tensors = (x, w_in, [], w_out, None, [], [], None, None)
        return ops.routed_ffn_v1(*tensors, *route(), permutation, compensation, *activation)[0]

    # Budget of the router: 20 microseconds for 8192 tokens.
    bench.attempt(PART, case, "spt route", lambda: route)
    ours = timed("spt routed", routed, DENSITY)
    lists = route()
    _peers(timed, lists, x, w_in, w_out, activated, f, n)
    if e >= 2048 or bench.dry:
        bench.target(f"T3 {case}", case, best / ours if best and ours else None, 1.7)
    rows = float(lists[2][-1])
    width, size = f // BLOCKS, x.element_size()
    one = 2 * rows * width * e
    work = {
        "routed_ffn_fwd_in_kernel": (one * n_in, size * (n * e + n_in * f * e + rows * width * (n_in + 1))),
        "routed_ffn_rows_kernel": (one * (1 + n_in), size * (rows * width * (1 + n_in) + f * e * (1 + n_in) + 2 * rows * e)),
        "routed_ffn_bwd_kernel_hidden": (one, size * (n * e + f * e + rows * width * (2 * n_in + full))),
        "routed_ffn_sums_weights_kernel": (one * (1 + n_in) * full, size * (rows * width + n * e + f * e) * (1 + n_in) * full),
    }
    profile(bench, "profile", f"ffn {case}", lambda: backward_of(routed(), grad, leaves), work)


def _peers(timed: Any, lists: tuple[Tensor, ...], x: Tensor, w_in: list, w_out: Tensor, activated: Any, f: int, n: int) -> None:
    """The same work, on the same lists, by other means; units in order, without compensation, which only helps them."""
    blocks, rows, offsets = lists
    width = f // BLOCKS
    ends = offsets.tolist()
    slots = [rows[ends[g] : ends[g + 1]].long() for g in range(BLOCKS)]
    tokens = [t[t >= 0] for t in slots]  # sizes known on the host, which a real step would have to wait for

    def loop() -> Tensor:
        y = torch.zeros_like(x)
        for g, chosen in enumerate(tokens):
            part = slice(g * width, (g + 1) * width)
            here = x.index_select(0, chosen)
            hidden = activated([F.linear(here, w[part]) for w in w_in])
            y = y.index_add(0, chosen, F.linear(hidden, w_out[:, part]))
        return y

    timed("cuBLAS per block", loop, DENSITY)
    listed = torch.cat(tokens)
    sizes = torch.tensor([len(t) for t in tokens], device=x.device)
    until = sizes.cumsum(0).int()

    def grouped() -> Tensor:
        here = x.index_select(0, listed)
        pre = [torch._grouped_mm(here, w.view(BLOCKS, width, -1).transpose(1, 2), offs=until) for w in w_in]
        down = w_out.view(-1, BLOCKS, width).permute(1, 2, 0).contiguous()
        out = torch._grouped_mm(activated(pre), down, offs=until)
        return torch.zeros_like(x).index_add(0, listed, out)

    timed("torch._grouped_mm", grouped, DENSITY)
