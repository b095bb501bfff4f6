"""FFN kernels under Triton's interpreter against the definition of their ops; run by test_triton_ffn.py."""

from __future__ import annotations

import pytest
import torch
from interpreter import check_close, double, prepare

from spt_compiler.lowering import triton_ffn
from spt_compiler.ops import reference_ffn

prepare()


@pytest.mark.parametrize(
    ("shape", "density", "extra"),
    [
        ((37, 5), (0.5, 0.7), {}),
        ((37, 5), (0.5, 0.7), {"nan": True, "on": (1, 4)}),
        ((300, 8), (0.25, 0.25), {"tile": 64}),
        ((50, 24), (0.1, 0.5), {"on": tuple(range(20))}),
        ((37, 1), (1.0, 1.0), {}),
        ((37, 5), (-1.0, 0.7), {}),
        ((37, 5), (0.5, 0.7), {"min_tokens": 38}),
        ((19, 7), (float("nan"), 0.5), {"dtype": torch.float16}),
    ],
)
def test_route(nan_empty, shape, density, extra):
    scores = torch.randn(shape[::-1]).to(extra.get("dtype", torch.float32)).t()
    scores[3] = 0.0
    scores[5, -1] = -torch.inf
    if extra.get("nan"):
        scores[4, 1] = torch.nan
    always_on = torch.zeros(shape[1], dtype=torch.bool)
    always_on[list(extra.get("on", ()))] = True
    args = (
        scores,
        always_on,
        torch.tensor([density[0]]),
        density[1],
        extra.get("tile", 16),
        extra.get("min_tokens", 0),
    )
    assert triton_ffn.supports_route(*args) is None
    for got, exact in zip(triton_ffn.route(*args), reference_ffn.route(*args), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, exact)


CASES = {
    "plain": {},
    "gated, LoRA on one, gates, saved": {"act": "silu(x0) * x1", "n_in": 2, "rank": 8, "gates": True, "save": True},
    "short block, dropout, captured scalars": {"act": "relu(x0) * a0 + a1", "hidden": 53, "blocks": 5, "p": 0.3},
    "dense by data": {"density": -1.0, "gates": True, "p": 0.2, "save": True},
    "dense limit": {"density": 1.0, "max_density": 1.0},
    "half precision": {"dtype": torch.float16, "act": "gelu_tanh(x0)"},
    "bfloat16, no bias, no compensation": {"dtype": torch.bfloat16, "bias": False, "compensation": False},
    "one token": {"tokens": 1, "tile": 64},
    "an activation nobody foresaw": {"act": "x0 * tanh(softplus(x0)) - 0.5 * abs(sin(x0)) / (1 + exp(-x0))"},
}


@pytest.mark.parametrize("name", CASES)
def test_routed_ffn(nan_empty, name):
    case = CASES[name]
    dtype, n_in, rank = case.get("dtype", torch.float32), case.get("n_in", 1), case.get("rank", 0)
    tokens, hidden, n_blocks, width, width_out = (
        case.get("tokens", 37),
        case.get("hidden", 50),
        case.get("blocks", 4),
        40,
        24,
    )
    bias = case.get("bias", True)
    x = torch.randn(width, tokens, dtype=dtype).t()
    w_in = [torch.randn(width, hidden, dtype=dtype).t() * width**-0.5 for _ in range(n_in)]
    b_in = [torch.randn(hidden, dtype=dtype) for _ in range(n_in)] if bias else []
    w_out = torch.randn(width_out, hidden, dtype=dtype) * hidden**-0.5
    b_out = torch.randn(2 * width_out, dtype=dtype)[::2] if bias else None
    ranks = [rank if i == 0 else 0 for i in range(n_in)] if rank else []
    lora_a = [torch.randn(tokens, r, dtype=dtype) for r in ranks]
    lora_b = [torch.randn(hidden, r, dtype=dtype) * 0.1 for r in ranks]
    gates = torch.rand(tokens, n_blocks) if case.get("gates") else None
    density = torch.tensor([case.get("density", 0.5)])
    lists = reference_ffn.route(
        torch.randn(tokens, n_blocks),
        torch.zeros(n_blocks, dtype=torch.bool),
        density,
        case.get("max_density", 0.5),
        case.get("tile", 16),
        0,
    )
    compensation = torch.randn(n_blocks, width_out) if case.get("compensation", True) else None
    act, p = case.get("act", "gelu(x0)"), case.get("p", 0.0)
    act_in = [torch.randn(hidden, dtype=dtype), torch.randn((), dtype=dtype)] if "a1" in act else []
    seed = torch.tensor([991**5]) if p else None
    tensors = (x, w_in, b_in, w_out, b_out, lora_a, lora_b, None, gates)
    rest = (*lists, torch.randperm(hidden).int(), compensation, act, act_in, seed, p, None, 0.0, case.get("save", False))
    assert triton_ffn.supports_routed_ffn(*tensors, *rest) is None
    y, saved, _ = triton_ffn.routed_ffn(*tensors, *rest)
    exact = reference_ffn.routed_ffn(*double(tensors), *rest)
    eager = reference_ffn.routed_ffn(*tensors, *rest)
    check_close(y, exact[0], eager[0], "y")
    assert saved.shape == eager[1].shape
    used = max(int(lists[2][-1]), 0)
    check_close(saved[:, :used], exact[1][:, :used], eager[1][:, :used], "saved")
