"""FFN kernels under Triton's interpreter against the definition of their ops; run by test_triton_ffn.py."""

from __future__ import annotations

import pytest
import torch
from interpreter import check_close, check_taped, double, prepare

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
    "gated, LoRA on one, gates, saved": {"act": "silu(x0) * x1", "n_in": 2, "rank": 8, "gates": True, "save": True, "down": 5},
    "gated, LoRA, gates, recomputed": {"act": "gelu(x0) * x1", "n_in": 2, "rank": 3, "gates": True, "linear": True},
    "short block, dropout, captured vector and scalar": {"act": "relu(x0) * a0 + a1", "hidden": 53, "blocks": 5, "p": 0.3},
    "dropout of LoRA on the out-projection": {"down": 3, "lora_p": 0.4, "p": 0.2, "linear": True, "gates": True},
    "fewer units than blocks of equal width hold": {"hidden": 9, "blocks": 5, "tokens": 20, "save": True, "gates": True},
    "a block without tokens, one with all": {"idle": 2, "always": 1, "save": True},
    "dense by data": {"density": -1.0, "gates": True, "p": 0.2, "save": True, "tokens": 40},
    "dense by data in chunks, recomputed": {"density": -1.0, "max_density": 0.25, "tokens": 50, "act": "x0 * x1 * a1", "n_in": 2},
    "dense by data in chunks, bfloat16 LoRA": {"dtype": torch.bfloat16, "density": -1.0, "max_density": 0.25, "rank": 4, "down": 3},
    "dense limit": {"density": 1.0, "max_density": 1.0, "linear": True},
    "half precision": {"dtype": torch.float16, "act": "gelu_tanh(x0)", "save": True, "linear": True},
    "bfloat16, no bias, no compensation": {"dtype": torch.bfloat16, "bias": False, "compensation": False, "rank": 4},
    "whole tiles": {"hidden": 512, "tile": 64, "width": 128, "width_out": 128, "save": True, "dtype": torch.float16},
    "one token": {"tokens": 1, "tile": 64, "save": True},
    "an activation nobody foresaw": {"act": "x0 * tanh(softplus(x0)) - 0.5 * abs(sin(x0)) / (1 + exp(-x0))"},
}
TOKENS, HIDDEN, BLOCKS, WIDTH, WIDTH_OUT = 37, 50, 4, 40, 24


def arguments(case):
    """(the differentiable tensors, the rest) of `spt::routed_ffn_v1`."""
    dtype, n_in, rank = case.get("dtype", torch.float32), case.get("n_in", 1), case.get("rank", 0)
    width_in, width_out = case.get("width", WIDTH), case.get("width_out", WIDTH_OUT)
    tokens, hidden, n_blocks = case.get("tokens", TOKENS), case.get("hidden", HIDDEN), case.get("blocks", BLOCKS)
    bias = case.get("bias", True)

    def weight(units, width, inside):
        """[units, width] whose units are neighbours in memory, or whose rows are (with gaps)."""
        wide = torch.randn(width, units, dtype=dtype).t() if inside else torch.randn(units, 2 * width, dtype=dtype)[:, ::2]
        return wide * 1.0 if inside else wide

    linear = case.get("linear", False)  # the layout of nn.Linear, else that of Conv1D
    x = torch.randn(width_in, tokens, dtype=dtype).t()
    w_in = [weight(hidden, width_in, not linear) * width_in**-0.5 for _ in range(n_in)]
    b_in = [torch.randn(hidden, dtype=dtype) for _ in range(n_in)] if bias else []
    w_out = (weight(hidden, width_out, linear) * hidden**-0.5).t()
    b_out = torch.randn(2 * width_out, dtype=dtype)[::2] if bias else None
    ranks = [rank if i == 0 else 0 for i in range(n_in)] if rank else []
    lora_a = [torch.randn(tokens, r, dtype=dtype) for r in ranks]
    lora_b = [torch.randn(hidden, r, dtype=dtype) * 0.1 for r in ranks]
    gates = torch.rand(tokens, n_blocks) if case.get("gates") else None
    scores, on = torch.randn(tokens, n_blocks), torch.zeros(n_blocks, dtype=torch.bool)
    if "idle" in case:
        scores[:, case["idle"]] = -torch.inf
        on[case["always"]] = True
    density = torch.tensor([case.get("density", 0.5)])
    lists = reference_ffn.route(scores, on, density, case.get("max_density", 0.5), case.get("tile", 16), 0)
    compensation = torch.randn(n_blocks, width_out) if case.get("compensation", True) else None
    act, p = case.get("act", "gelu(x0)"), case.get("p", 0.0)
    act_in = [torch.randn(hidden, dtype=dtype), torch.randn((), dtype=dtype)] if "a1" in act else []
    seed = torch.tensor([991**5]) if p else None
    down, lora_p = case.get("down", 0), case.get("lora_p", 0.0)
    lora_down = torch.randn(down, hidden, dtype=dtype) * 0.1 if down else None
    random = (seed, p, torch.tensor([-17]) if lora_p else None, lora_p)
    tensors = (x, w_in, b_in, w_out, b_out, lora_a, lora_b, lora_down, gates)
    return tensors, (*lists, torch.randperm(hidden).int(), compensation, act, act_in, *random, case.get("save", False))


# Gradients asked for by themselves.
ALONE = {
    "plain": ("w_out", "b_in0", "x"),
    "gated, LoRA on one, gates, saved": ("gates", "lora_a_out0", "lora_b0", "w_in1"),
    "short block, dropout, captured vector and scalar": ("act_in0",),
    "dropout of LoRA on the out-projection": ("lora_down",),
}


@pytest.mark.parametrize("parts", [2, 4])
def test_columns_in_parts(nan_empty, monkeypatch, parts):
    """The activation of some columns at a time; tiles of the interpreter's chip are taken whole."""
    monkeypatch.setattr(triton_ffn._Geometry, "parts", lambda self, block_n: parts)
    test_routed_ffn(None, "gated, LoRA on one, gates, saved")
    test_routed_ffn(None, "dropout of LoRA on the out-projection")


@pytest.mark.parametrize("case", CASES)
def test_routed_ffn(nan_empty, case):
    tensors, rest = arguments(CASES[case])
    lists, permutation, (act, act_in, *random) = rest[:3], rest[3], rest[5:11]
    assert triton_ffn.supports_routed_ffn(*tensors, *rest) is None
    y, saved, low = triton_ffn.routed_ffn(*tensors, *rest)
    exact = reference_ffn.routed_ffn(*double(tensors), *rest)
    eager = reference_ffn.routed_ffn(*tensors, *rest)
    check_close(y, exact[0], eager[0], "y")
    check_close(low, exact[2], eager[2], "low")
    assert saved.shape == eager[1].shape
    # Padding between the groups of rows holds zeros, or whatever was there.
    used = max(int(lists[2][-1]), 0)
    check_close(saved[:, :used], exact[1][:, :used], eager[1][:, :used], "saved")

    x, w_in, b_in, _, _, _, lora_b, lora_down, _ = tensors
    names = reference_ffn.gradient_names(len(w_in), len(b_in), len(lora_b), len(act_in))
    present = [t is not None for t in (x, *w_in, *b_in, *tensors[3:5], *tensors[5], *lora_b, *tensors[7:], *act_in)]
    grads = [torch.randn(y.shape[::-1], dtype=y.dtype).t(), None if lora_down is None else torch.randn_like(low)]
    common = (*lists, permutation, act)

    def backward(function, change, needs):
        results = (saved if function is triton_ffn.routed_ffn_backward else eager[1], needs)
        return function(*change(grads), *change(tensors), *common, change(act_in), *random, *results)

    def same(values):
        return values

    got = backward(triton_ffn.routed_ffn_backward, same, present)
    storages = {t.untyped_storage().data_ptr() for t in got if t.numel()}
    assert len(storages) == sum(t.numel() > 0 for t in got), "an operator's results must not share storage"
    exact = backward(reference_ffn.routed_ffn_backward, double, present)
    plain = backward(reference_ffn.routed_ffn_backward, same, present)
    for name, g, e, r, there in zip(names, got, exact, plain, present, strict=True):
        assert g.shape == r.shape and g.dtype == r.dtype
        if there:
            assert g.stride() == r.stride(), name
            check_close(g, e, r, name)
    # A gradient alone is the same bit by bit, and what is not needed is neither computed nor returned.
    for i, there in enumerate(present):
        if there and names[i] in ALONE.get(case, ()):
            alone = backward(triton_ffn.routed_ffn_backward, same, [i == j for j in range(len(names))])
            assert torch.equal(alone[i], got[i]) and all(a.numel() == 0 for j, a in enumerate(alone) if j != i)


@pytest.mark.parametrize("case", ["gated, LoRA on one, gates, saved", "dense by data in chunks, bfloat16 LoRA", "half precision"])
def test_calls_are_recorded(nan_empty, case):
    """Views of weights, copies in block order, several chunks, sums in float32 that are rounded at the end."""
    tensors, rest = arguments(CASES[case])
    scores, on = torch.randn(rest[0].shape[0], 4).t().contiguous().t(), torch.zeros(4, dtype=torch.bool)
    check_taped(triton_ffn.route, (scores, on, torch.tensor([0.5]), 0.5, 16, 0))
    check_taped(triton_ffn.routed_ffn, (*tensors, *rest))
    y, saved, low = triton_ffn.routed_ffn(*tensors, *rest)
    x, w_in, b_in, w_out, b_out, lora_a, lora_b, lora_down, gates = tensors
    present = [t is not None for t in (x, *w_in, *b_in, w_out, b_out, *lora_a, *lora_b, lora_down, gates, *rest[6])]
    grads = (torch.randn(y.shape[::-1], dtype=y.dtype).t(), None if lora_down is None else torch.randn_like(low))
    check_taped(triton_ffn.routed_ffn_backward, (*grads, *tensors, *rest[:4], *rest[5:11], saved, present))
