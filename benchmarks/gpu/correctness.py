"""Every kernel on the chip against the fp64 definition of its op, forward and all gradients; repeated, bit by bit (T6)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .common import Bench, Case

PART = "correctness"
# T6: root mean square of the error, relative to that of the result. float16 has eight times the precision of bfloat16.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


# name -> (rule, masked by, dropout, pseudo-keys)
TILES = {
    "mean causal": ("mean", "causal", 0.0, False),
    "pq all": ("pq", "all", 0.0, False),
    "pq pseudo-keys": ("pq", "causal", 0.0, True),
    "pq padded dropout": ("pq", "padded", 0.2, False),
    "mean bias": ("mean", "bias", 0.0, False),
}


def cases(dry: bool) -> list[Case]:
    """Every kernel, each in every type.

    A dry run takes one case of each kind in float32: the interpreter is slow, and the suite has all at toy sizes.
    """
    found = []
    for dtype in (torch.float32,) if dry else (torch.float32, torch.bfloat16, torch.float16):
        said = str(dtype).removeprefix("torch.")
        for name in ("pq pseudo-keys", "mean bias") if dry else TILES:
            found.append(Case(f"tiles {name} {said}", functools.partial(_tiles, dtype=dtype, name=name), 30, True))
        found.append(Case(f"keys {said}", functools.partial(_keys, dtype=dtype), 30, True))
        for act, n_in, rank in [("silu(x0) * x1", 2, 8)] if dry else [("gelu(x0)", 1, 0), ("silu(x0) * x1", 2, 8)]:
            for dense in (False,) if dry else (False, True):
                name = f"ffn {act}{' LoRA' if rank else ''}{' dense by data' if dense else ''} {said}"
                call = functools.partial(_ffn, dtype=dtype, act=act, n_in=n_in, rank=rank, dense=dense, case=name)
                found.append(Case(name, call, 30, True))
    return found


def _double(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_double(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _compare(
    bench: Bench, case: str, dtype: torch.dtype, names: list[str], got: list, again: list, exact: list, plain: list
) -> None:
    """Args: dtype: of the inputs. What the forward pass saves is of that type, whatever the type of a gradient."""
    for name, g, a, e, p in zip(names, got, again, exact, plain, strict=True):
        scale = e.double().square().mean().sqrt().clamp_min(1e-30)
        error, allowed = ((x.double() - e.double()).square().mean().sqrt() / scale for x in (g, p))
        passed = bool(error <= max(2 * float(allowed), LIMITS[dtype]))
        bench.add(
            PART, case, name, error=float(error), plain_error=float(allowed), passed=passed, repeatable=bool(torch.equal(g, a))
        )


def _third(ours: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Of a second and a third call, the third: its launches come from tape (`lowering/tape.py`), the second was recorded."""
    ours()
    return ours()


def _attention_inputs(bench: Bench, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    n, heads, groups, dim = (70, 2, 1, 16) if bench.dry else (1000, 8, 2, 80)
    shapes = ((1, n, heads, dim), (1, n, groups, dim), (1, n, groups, dim + 16))
    q, k, v = (torch.randn(s, dtype=dtype, device=bench.device).transpose(1, 2) for s in shapes)
    return q, k, v


def _tiles(bench: Bench, dtype: torch.dtype, name: str) -> None:
    """Selection against its definition, then attention and all its gradients on what was selected."""
    from spt_compiler.ops import reference

    ops = torch.ops.spt
    rule, masked_by, p, compensate = TILES[name]
    q, k, v = _attention_inputs(bench, dtype)
    case = f"tiles {name} {str(dtype).removeprefix('torch.')}"
    codebook = mean = None
    if rule == "pq":
        mean = k.float().mean((0, 2))
        codebook = torch.randn(k.shape[1], k.shape[3] // 8, 16, 8, device=q.device)
    n = q.shape[2]
    bias, expr, read = None, {"causal": "k <= q", "padded": "(k <= q) & t0[b, k]"}.get(masked_by, ""), []
    if masked_by == "padded":
        read = [torch.arange(n, device=q.device).unsqueeze(0) < n - n // 5]
    if masked_by == "bias":
        bias = torch.randn(1, q.shape[1], n, n, dtype=dtype, device=q.device)
        bias = bias.masked_fill(torch.rand(n, n, device=q.device) > 0.9, float("-inf"))
        bias[:, :, 5] = float("-inf")  # a row that sees nothing
    softcap, empty = (5.0, "uniform") if bias is not None else (None, "zero")
    seed = torch.tensor([7], device=q.device) if p else None
    scale, budget = q.shape[-1] ** -0.5, torch.tensor([0.4], device=q.device)
    choose = (codebook, mean, budget, 0.4, 64, 16, scale, softcap, rule, 0)
    tiles, counts = ops.select_tiles_v1(q, k, bias, expr, read, *choose)
    _selection(bench, case, (tiles, counts), reference.select_tiles(q, k, bias, expr, read, *choose), -(-n // 16))
    masked = (expr, read, seed, p, scale, softcap, empty, 64, 16, compensate)
    grad = torch.randn(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    needs = [True, True, True, bias is not None]

    def ours() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, bias) if x is not None]
        out, _ = ops.tile_attention_v1(*leaves, *([None] if bias is None else []), tiles, counts, *masked)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def defined(change: Any) -> list[Tensor]:
        g, *inputs = change([grad, q, k, v, bias])
        out, lse = reference.tile_attention(*inputs, tiles, counts, *masked)
        grads = reference.tile_attention_backward(g, *inputs, out, lse, tiles, counts, *masked[:-1], needs, compensate)
        return [out, *(t for t, need in zip(grads, needs, strict=True) if need)]

    names = ["out", "dq", "dk", "dv", *(["dbias"] if bias is not None else [])]
    _compare(bench, case, dtype, names, ours(), _third(ours), defined(_double), defined(lambda x: x))


def _selection(bench: Bench, case: str, got: tuple[Tensor, ...], exact: tuple[Tensor, ...], n: int) -> None:
    """Tiles whose scores tie but for rounding may change places: nearly all must agree, and each row keep as many."""
    from spt_compiler.ops import reference

    same = reference.listed(*got, n) == reference.listed(*exact, n)
    agreement = float(same.double().mean())
    bench.add(PART, case, "tiles", agreement=agreement, passed=agreement >= 0.98 and bool(torch.equal(got[1], exact[1])))


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
    _compare(bench, case, dtype, ["out", "dq", "dk", "dv"], ours(), _third(ours), exact, plain)


def _ffn(bench: Bench, dtype: torch.dtype, act: str, n_in: int, rank: int, dense: bool, case: str) -> None:
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
    got, again, exact, plain = ours(), _third(ours), defined(_double), defined(lambda x: x)
    chosen = [i for i, t in enumerate(exact) if t.numel()]
    _compare(bench, case, dtype, *([part[i] for i in chosen] for part in (wanted, got, again, exact, plain)))
