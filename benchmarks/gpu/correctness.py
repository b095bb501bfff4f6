"""Every kernel on the chip against the fp64 definition of its op, forward and all gradients; twice, bit by bit (T6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import Bench

PART = "correctness"


def run(bench: Bench) -> None:
    """One row per result: relative error, that of the plain program in the same type, and whether two runs agree."""
    types = (torch.float32,) if bench.dry else (torch.float32, torch.bfloat16, torch.float16)
    # The interpreter is slow, and the suite has all of it at toy sizes: one case of each in a dry run.
    rules = [("pq", True)] if bench.dry else [("mean", True), ("pq", False)]
    activations = [("silu(x0) * x1", 2, 8)] if bench.dry else [("gelu(x0)", 1, 0), ("silu(x0) * x1", 2, 8)]
    for dtype in types:
        for rule, causal in rules:
            _tiles(bench, dtype, rule, causal)
        _keys(bench, dtype)
        for act, n_in, rank in activations:
            for dense in (False,) if bench.dry else (False, True):
                _ffn(bench, dtype, act, n_in, rank, dense)


def _double(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_double(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _compare(bench: Bench, case: str, names: list[str], got: list, again: list, exact: list, plain: list) -> None:
    for name, g, a, e, p in zip(names, got, again, exact, plain, strict=True):
        scale = e.double().square().mean().sqrt().clamp_min(1e-30)
        error, allowed = ((x.double() - e.double()).square().mean().sqrt() / scale for x in (g, p))
        slack = torch.finfo(g.dtype).eps / 2 if g.dtype in (torch.float16, torch.bfloat16) else 1e-6
        passed = bool(error <= 2 * allowed + slack)
        bench.add(
            PART, case, name, error=float(error), plain_error=float(allowed), passed=passed, repeatable=bool(torch.equal(g, a))
        )


def _attention_inputs(bench: Bench, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    n, heads, groups, dim = (70, 2, 1, 16) if bench.dry else (1000, 8, 2, 80)
    shapes = ((1, n, heads, dim), (1, n, groups, dim), (1, n, groups, dim + 16))
    q, k, v = (torch.randn(s, dtype=dtype, device=bench.device).transpose(1, 2) for s in shapes)
    return q, k, v


def _tiles(bench: Bench, dtype: torch.dtype, rule: str, causal: bool) -> None:
    from spt_compiler.ops import reference

    ops = torch.ops.spt
    q, k, v = _attention_inputs(bench, dtype)
    case = f"tiles {rule} {'causal' if causal else 'all'} {str(dtype).removeprefix('torch.')}"
    codebook = mean = None
    if rule == "pq":
        mean = k.float().mean((0, 2))
        codebook = torch.randn(k.shape[1], k.shape[3] // 8, 16, 8, device=q.device)
    mask = (None, "k <= q" if causal else "", [])
    scale, budget = q.shape[-1] ** -0.5, torch.tensor([0.4], device=q.device)
    tiles, counts = ops.select_tiles_v1(q, k, *mask, codebook, mean, budget, 0.4, 64, 16, scale, None, rule, 0)
    masked = (mask[1], [], None, 0.0, scale, None, "zero", 64, 16, False)
    grad = torch.randn(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)

    def ours() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = ops.tile_attention_v1(*leaves, None, tiles, counts, *masked)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def defined(*inputs: Tensor) -> list[Tensor]:
        out, lse = reference.tile_attention(*inputs[:3], None, tiles, counts, *masked)
        needs = [True, True, True, False]
        rest = (*masked[:-1], needs, masked[-1])
        return [out, *reference.tile_attention_backward(inputs[3], *inputs[:3], None, out, lse, tiles, counts, *rest)[:3]]

    exact, plain = defined(*_double([q, k, v, grad])), defined(q, k, v, grad)
    _compare(bench, case, ["out", "dq", "dk", "dv"], ours(), ours(), exact, plain)


def _keys(bench: Bench, dtype: torch.dtype) -> None:
    from spt_compiler.ops import reference

    ops = torch.ops.spt
    q, k, v = _attention_inputs(bench, dtype)
    codebook = torch.randn(k.shape[1], k.shape[3] // 8, 16, 8, device=q.device)
    mean, budget = k.float().mean((0, 2)), torch.tensor([0.25], device=q.device)
    scale = q.shape[-1] ** -0.5
    select = (q, k, None, "k <= q", [], codebook, mean, budget, 0.25, scale, None, "pq-match", 0)
    keys, counts = ops.select_keys_v1(*select)
    masked = ("k <= q", [], None, 0.0, scale, None, "zero")
    grad = torch.randn(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)

    def ours() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = ops.key_attention_v1(*leaves, None, keys, counts, *masked)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def defined(*inputs: Tensor) -> list[Tensor]:
        out, lse = reference.key_attention(*inputs[:3], None, keys, counts, *masked)
        needs = [True, True, True, False]
        return [out, *reference.key_attention_backward(inputs[3], *inputs[:3], None, out, lse, keys, counts, *masked, needs)[:3]]

    exact, plain = defined(*_double([q, k, v, grad])), defined(q, k, v, grad)
    case = f"keys {str(dtype).removeprefix('torch.')}"
    _compare(bench, case, ["out", "dq", "dk", "dv"], ours(), ours(), exact, plain)


def _ffn(bench: Bench, dtype: torch.dtype, act: str, n_in: int, rank: int, dense: bool) -> None:
    from spt_compiler.ops import reference_ffn

    ops = torch.ops.spt
    torch.manual_seed(0)
    n, e, f, g, tile = (21, 24, 40, 4, 16) if bench.dry else (1000, 264, 1000, 8, 128)

    def rand(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=bench.device).to(like)

    budget = torch.tensor([-1.0 if dense else 0.5], device=bench.device)
    on = torch.zeros(g, dtype=torch.bool, device=bench.device)
    scores = rand(n, g, like=torch.float32)
    lists = ops.route_v1(scores, on, budget, 0.5, tile, 0)
    case = f"ffn {act}{' LoRA' if rank else ''}{' dense by data' if dense else ''} {str(dtype).removeprefix('torch.')}"
    for name, got, exact in zip(
        ("blocks", "rows", "offsets"), lists, reference_ffn.route(scores, on, budget, 0.5, tile, 0), strict=True
    ):
        bench.add(PART, case, name, passed=bool(torch.equal(got, exact)))
    tensors = [
        rand(n, e),
        [rand(f, e) * e**-0.5 for _ in range(n_in)],
        [rand(f) for _ in range(n_in)],
        rand(e, f) * f**-0.5,
        rand(e),
        [rand(n, rank) for _ in range(n_in if rank else 0)],
        [rand(f, rank) * 0.1 for _ in range(n_in if rank else 0)],
        rand(rank, f) * 0.1 if rank else None,
        torch.rand(n, g, device=bench.device) if rank else None,
    ]
    permutation = torch.randperm(f, device=bench.device).int()
    compensation = rand(g, e, like=torch.float32)
    random = (None, 0.0, None, 0.0)
    names = reference_ffn.gradient_names(n_in, n_in, n_in if rank else 0, 0)
    flat = [tensors[0], *tensors[1], *tensors[2], *tensors[3:5], *tensors[5], *tensors[6], *tensors[7:]]
    needs = [t is not None for t in flat]
    grad_y, grad_low = rand(n, e), rand(n, rank) if rank else None

    def rest(lists: Any) -> tuple:
        return (*lists, permutation)

    def ours() -> list[Tensor]:
        y, saved, low = ops.routed_ffn_v1(*tensors, *rest(lists), compensation, act, [], *random, True)
        grads = ops.routed_ffn_backward_v1(grad_y, grad_low, *tensors, *rest(lists), act, [], *random, saved, needs)
        return [y, low, *(t for t, need in zip(grads, needs, strict=True) if need)]

    def defined(change: Any) -> list[Tensor]:
        inputs = change(tensors)
        y, saved, low = reference_ffn.routed_ffn(*inputs, *rest(lists), compensation, act, [], *random, True)
        results = (saved, needs)
        grads = reference_ffn.routed_ffn_backward(
            change(grad_y), change(grad_low), *inputs, *rest(lists), act, [], *random, *results
        )
        return [y, low, *(t for t, need in zip(grads, needs, strict=True) if need)]

    wanted = ["y", "low", *(name for name, need in zip(names, needs, strict=True) if need)]
    got, again, exact, plain = ours(), ours(), defined(_double), defined(lambda x: x)
    chosen = [i for i, t in enumerate(exact) if t.numel()]
    _compare(bench, case, *([part[i] for i in chosen] for part in (wanted, got, again, exact, plain)))
