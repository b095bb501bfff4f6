"""Expressions printed as Triton, run by its interpreter, against their evaluation by torch; run by test_render.py."""

from __future__ import annotations

import pytest
import torch
from interpreter import prepare

from spt_compiler import expression
from spt_compiler.lowering import render

prepare()

KERNEL = """
@triton.jit
def expression_kernel(x0_ptr, x1_ptr, out_ptr):
    k = tl.arange(0, 64)
    x0 = tl.load(x0_ptr + k)
    x1 = tl.load(x1_ptr + k)
    value = tl.cast({text}, tl.float32)
    tl.store(out_ptr + k, tl.broadcast_to(value, [64]))
"""
CASES = [
    *(f"{name}(x0)" for name in ("exp", "expm1", "abs", "sign", "floor", "erf", "tanh", "sigmoid", "softplus", "relu")),
    *(f"{name}(x0)" for name in ("silu", "gelu", "gelu_tanh", "sin", "cos", "square")),
    *(f"{name}(abs(x0) + 0.01)" for name in ("log", "log1p", "sqrt", "rsqrt")),
    "tanh(1e-3 * x0)",
    "expm1(1e-4 * x0)",
    "log1p(1e-4 * x0)",
    "tanh(100 * x0) + sigmoid(100 * x0) + softplus(50 * x0)",
    "min(x0, x1) - max(x0, 0)",
    "pow(abs(x0) + 0.1, x1)",
    "pow(x0, 3) + pow(x0, 4) + pow(x0, -1) + pow(abs(x0), 0.5)",
    "pow(x0, k - 30)",
    "floordiv(x0, x1) + mod(x0, x1)",
    "floordiv(k - 31, 3) * 10 + mod(k - 31, 3) + mod(k, -5)",
    "where((x0 > 0) & ~(x1 > 1) | (k == 2), x0 / 3, -1)",
    "(k - 5) / 2 + abs(k - 5) - sign(k - 5) * square(k) + relu(k - 9)",
    "(k * 3000 - 90000) * (k * 3000) + square(k * 2000) - pow(k * 1000, 2) + min(k * 50000, 7) * k * 3000",
    "(k <= 3) * x0 - -x1 * 1e-3 + (1 - (x0 > 0))",
    "where(k == 1, inf, where(k == 2, -inf, x0))",
    "log(2) * x0 + 1 / 3",
]


SLOPES = ["gelu(x0)", "gelu_tanh(x0)", "silu(x0) * x1", "x0 * tanh(softplus(x0))", "erf(x0) * x1 + square(relu(x0))"]


def run(expr: expression.Expression, x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
    """The value of an expression over x0, x1 and k, by the interpreter."""
    kernel = KERNEL.format(text=expression.triton_source(expr, {"x0": "x0", "x1": "x1", "k": "k"}))
    source = f"import triton\nimport triton.language as tl\n\n{render._helpers_used(kernel)}\n{kernel}"
    module = render._import(f"expression_{abs(hash(str(expr))):x}", source)
    out = torch.full((64,), torch.nan)
    module.expression_kernel[(1,)](x0, x1, out)
    return out


@pytest.mark.parametrize("text", CASES)
def test_triton_source_computes_the_same(text):
    expr = expression.parse(text)
    x0, x1 = torch.randn(64) * 2, torch.randn(64) * 2
    out = run(expr, x0, x1)
    env = {"x0": x0.double(), "x1": x1.double(), "k": torch.arange(64)}
    exact = expression.evaluate(expr, env).double().expand(64)
    torch.testing.assert_close(out.double(), exact, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("text", SLOPES)
def test_printed_derivatives_equal_autograd(text):
    expr = expression.parse(text)
    x0, x1 = torch.randn(64) * 2, torch.randn(64) * 2
    leaf = x0.double().requires_grad_()
    (exact,) = torch.autograd.grad(expression.evaluate(expr, {"x0": leaf, "x1": x1.double()}).sum(), leaf)
    torch.testing.assert_close(run(expression.derivative(expr, "x0"), x0, x1).double(), exact, rtol=2e-5, atol=2e-6)
