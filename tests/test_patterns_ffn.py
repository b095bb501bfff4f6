"""Feed-forward sites: each way to write one is found, and what is captured computes the same.

Every match is checked by value: the captured description is evaluated, as its docstring says, on what the graph's own nodes
computed, and compared with the node that the site would replace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import blocks
import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import spt_compiler
from spt_compiler import debug
from spt_compiler.canonicalize import canonicalize
from spt_compiler.expression import evaluate, parse
from spt_compiler.graph import describe
from spt_compiler.patterns import FFNCapture, Lora, Weight, find
from spt_compiler.rewrite import copy_graph

WIDTH, HIDDEN = 6, 10


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Block(nn.Module):
    """Two linear layers, with a third and a fused one for gates, and what `function` makes of them."""

    def __init__(self, function: Callable, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.up, self.gate, self.down = (nn.Linear(a, b, bias) for a, b in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))
        self.fused, self.square = nn.Linear(WIDTH, 2 * HIDDEN, bias), nn.Linear(HIDDEN, HIDDEN, bias)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, HIDDEN, bias=False)
        self.bb, self.bf = nn.Linear(2, HIDDEN), nn.Linear(2, 2 * HIDDEN, bias=False)
        self.a2, self.b2 = nn.Linear(HIDDEN, 2, bias=False), nn.Linear(2, WIDTH)
        self.norm, self.conv = nn.LayerNorm(HIDDEN), nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)
        self.slope, self.beta = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.randn(HIDDEN))
        self.double()

    def forward(self, *inputs: Tensor):
        return self.function(self, *inputs)


def rows(weight: Weight | None, values: dict[Any, Any]) -> Tensor | None:
    return None if weight is None else values[weight.node][weight.rows]


def compute(c: FFNCapture, values: dict[Any, Any]) -> Tensor:
    """What a capture says, written down; without dropout."""

    def up(branch: Lora, low: Tensor, projection: Weight | None = None) -> Tensor:
        out = F.linear(low, values[branch.b], None if branch.bias is None else values[branch.bias])
        return branch.scaling * (out if projection is None else out[..., branch.rows_of(branch.b, projection).rows])

    x, pre = values[c.x], []
    for w, b, branches in zip(c.w_in, c.b_in, c.lora or ((),) * len(c.w_in), strict=True):
        added = [up(branch, values[branch.a_out], w) for branch in branches]
        pre.append(sum(added, F.linear(x, rows(w, values), rows(b, values))))
    env = {f"x{i}": h for i, h in enumerate(pre)} | {f"a{i}": values[a] for i, a in enumerate(c.act_in)}
    hidden = evaluate(parse(c.act), env)
    out = F.linear(hidden, values[c.w_out], None if c.b_out is None else values[c.b_out])
    return sum((up(branch, F.linear(hidden, values[branch.a])) for branch in c.lora_out), out)


def sites(model: Callable, *inputs: Tensor, dynamic: bool | None = None):
    """(matches, skipped) of the only graph of a call; every FFN match is checked by value."""
    (captured,) = models.capture(model, *inputs, dynamic=dynamic)
    module = copy_graph(captured.module)
    canonicalize(module)
    before = str(module.graph)
    matches, skipped = find(module)
    assert str(module.graph) == before, "matching changed the graph"
    computed = models.values(captured, module)
    for match in matches:
        dropped = match.pattern.kind == "ffn" and (match.capture.dropout_p, *(b.dropout_p for b in match.capture.lora_out))
        if dropped and not any(dropped):
            torch.testing.assert_close(compute(match.capture, computed), computed[match.output], rtol=1e-6, atol=1e-6)
    return matches, skipped


X = numbers(2, 5, WIDTH)


def only(function: Callable, *inputs: Tensor, bias: bool = True, **options: Any) -> FFNCapture:
    """The capture of the one site there is."""
    model = function if isinstance(function, nn.Module) else Block(function, bias)
    matches, skipped = sites(model, *(inputs or (X,)), **options)
    assert len(matches) == 1 and not skipped, [str(s.reason) for s in skipped]
    return matches[0].capture


# ---------------------------------------------------------------------------------------------------------------------
# Activations: by value, whatever they are called
# ---------------------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Callable[[Block, Tensor], Tensor], str]] = {
    "relu": (lambda m, h: F.relu(h), "relu(x0)"),
    "relu in place": (lambda m, h: nn.ReLU(inplace=True)(h), "relu(x0)"),
    "relu as a clamp": (lambda m, h: h.clamp(min=0), "relu(x0)"),
    "gelu": (lambda m, h: F.gelu(h), "gelu(x0)"),
    "gelu tanh": (lambda m, h: F.gelu(h, approximate="tanh"), "gelu_tanh(x0)"),
    "gelu formula": (lambda m, h: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))), "gelu(x0)"),
    "gelu tanh formula": (
        lambda m, h: 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0)))),
        "gelu_tanh(x0)",
    ),
    "gelu tanh, rounded": (
        lambda m, h: h * 0.5 * (1.0 + torch.tanh(0.79788456 * h * (1 + 0.044715 * h * h))),
        "gelu_tanh(x0)",
    ),
    "silu": (lambda m, h: F.silu(h), "silu(x0)"),
    "silu formula": (lambda m, h: h * torch.sigmoid(h), "silu(x0)"),
    "silu written out": (lambda m, h: h / (1 + torch.exp(-h)), "silu(x0)"),
    "quick gelu": (lambda m, h: h * torch.sigmoid(1.702 * h), "x0 * sigmoid("),
    "squared relu": (lambda m, h: F.relu(h).square(), "square(relu(x0))"),
    "squared relu by power": (lambda m, h: torch.pow(F.relu(h), 2), "square(relu(x0))"),
    "squared relu by product": (lambda m, h: (r := F.relu(h)) * r, "relu(x0) * relu(x0)"),
    "leaky relu": (lambda m, h: F.leaky_relu(h, 0.2), "where(x0 > 0"),
    "elu": (lambda m, h: F.elu(h, 0.7), "expm1("),
    "selu": (lambda m, h: F.selu(h), "expm1("),
    "celu": (lambda m, h: F.celu(h, 0.7), "expm1("),
    "mish": (lambda m, h: F.mish(h), "tanh(softplus(x0))"),
    "hardswish": (lambda m, h: F.hardswish(h), "min("),
    "hardtanh": (lambda m, h: F.hardtanh(h, -0.5, 2.0), "min("),
    "clipped far out": (lambda m, h: F.relu(h).clamp(max=50.0), "min("),
    "clipped formula": (lambda m, h: (h * torch.sigmoid(h)).clamp(-1.0, 2000.0), "min("),
    "softplus": (lambda m, h: F.softplus(h, beta=2.0), "softplus("),
    "logsigmoid": (lambda m, h: F.logsigmoid(h), "softplus("),
    "threshold": (lambda m, h: F.threshold(h, 0.1, -1.0), "where("),
    "rrelu, not in training": (lambda m, h: F.rrelu(h, 0.1, 0.4, training=False), "where(x0 > 0"),
    "prelu, one slope": (lambda m, h: F.prelu(h, m.slope), "a0"),
    "learned slopes": (lambda m, h: torch.where(h > 0, h, h * m.beta), "a0"),
    "parameters inside": (
        lambda m, h: torch.where(h > 0, F.softplus(m.slope) * h * h + 0.5 * h, (torch.expm1(h) - h) * m.slope + 0.5 * h),
        "a0",
    ),
    "gelu and a scale": (lambda m, h: F.gelu(h) * 1.5, "gelu(x0) * 1.5"),
    "sine alone": (lambda m, h: torch.sin(30.0 * h), "sin("),
    "snake": (lambda m, h: h + torch.sin(m.beta * h) ** 2 / (m.beta.abs() + 1e-9), "square(sin("),
    "hardshrink": (lambda m, h: F.hardshrink(h, 0.3), "where("),
    "softshrink": (lambda m, h: F.softshrink(h, lambd=0.3), "x0 - "),
    "sine": (lambda m, h: F.relu(torch.sin(h)) + torch.cos(h), "sin(x0)"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    act, text = ACTIVATIONS[name]
    c = only(lambda m, x: m.down(act(m, m.up(x))))
    assert text in c.act and len(c.w_in) == 1 and c.width == HIDDEN and c.dropout_p == 0.0


def test_exact_and_tanh_gelu_are_not_taken_for_each_other():
    """They differ by 5e-4: names are given by value to 1e-7."""
    near = only(lambda m, x: m.down((lambda h: 0.5 * h * (1 + torch.tanh(0.79 * (h + 0.044715 * h**3))))(m.up(x))))
    assert "gelu" not in near.act


# ---------------------------------------------------------------------------------------------------------------------
# Forms of the block
# ---------------------------------------------------------------------------------------------------------------------

GATED: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "gate first": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
    "gate last": lambda m, x: m.down(m.up(x) * F.silu(m.gate(x))),
    "fused, chunk": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*m.fused(x).chunk(2, dim=-1))),
    "fused, second half is the gate": lambda m, x: m.down((lambda u, g: u * F.silu(g))(*m.fused(x).chunk(2, -1))),
    "fused, split": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*m.fused(x).split(HIDDEN, -1))),
    "fused, slices": lambda m, x: m.down((lambda h: F.silu(h[..., :HIDDEN]) * h[..., HIDDEN:])(m.fused(x))),
    "fused, narrow": lambda m, x: m.down(
        (lambda h: F.silu(h.narrow(-1, 0, HIDDEN)) * torch.narrow(h, -1, HIDDEN, HIDDEN))(m.fused(x))
    ),
    "fused, stacked": lambda m, x: m.down((lambda h: F.silu(h[..., 0, :]) * h[..., 1, :])(m.fused(x).view(2, 5, 2, -1))),
    "fused, stacked, without the last slice": lambda m, x: m.down(
        (lambda h: F.silu(h[:, :, 0]) * h[:, :, 1])(m.fused(x).view(2, 5, 2, -1))
    ),
    "interleaved, slices": lambda m, x: m.down((lambda h: F.silu(h[..., ::2]) * h[..., 1::2])(m.fused(x))),
    "interleaved, a dim of two": lambda m, x: m.down((lambda h: F.silu(h[..., 0]) * h[..., 1])(m.fused(x).view(2, 5, -1, 2))),
    "interleaved, the value first": lambda m, x: m.down(
        (lambda h: h[:, :, :, 0] * F.silu(h[:, :, :, 1]))(m.fused(x).unflatten(-1, (-1, 2)))
    ),
    "interleaved, unbound": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*m.fused(x).view(2, 5, -1, 2).unbind(-1))),
    "interleaved, selected": lambda m, x: m.down(
        (lambda h: F.silu(h.select(-1, 0)) * torch.select(h, 3, 1))(m.fused(x).view(2, 5, -1, 2))
    ),
    "interleaved, chunks": lambda m, x: m.down(
        (lambda g, u: F.silu(g.squeeze(-1)) * u.squeeze(3))(*m.fused(x).view(2, 5, -1, 2).chunk(2, -1))
    ),
    "interleaved, chunks read by index": lambda m, x: m.down(
        (lambda g, u: F.silu(g[..., 0]) * u[..., -1])(*m.fused(x).view(2, 5, -1, 2).split(1, dim=-1))
    ),
    "interleaved, slices of one": lambda m, x: m.down(
        (lambda h: F.silu(h[..., :1].squeeze(-1)) * h.narrow(-1, 1, 1).squeeze(-1))(m.fused(x).view(2, 5, -1, 2))
    ),
    "interleaved, in front": lambda m, x: m.down((lambda h: F.silu(h[0]) * h[1])(m.fused(x).view(2, 5, -1, 2).movedim(-1, 0))),
    "interleaved, turned": lambda m, x: m.down((lambda h: F.silu(h[..., 0, :]) * h[..., 1, :])(m.fused(x).view(2, 5, -1, 2).mT)),
    "fused, stacked in front": lambda m, x: m.down(
        (lambda g, u: F.silu(g) * u)(*m.fused(x).view(2, 5, 2, -1).permute(2, 0, 1, 3).unbind(0))
    ),
    "fused, stacked, chunks": lambda m, x: m.down(
        (lambda g, u: F.silu(g.squeeze(2)) * u.squeeze(-2))(*m.fused(x).view(2, 5, 2, -1).chunk(2, 2))
    ),
    "fused, by einsum": lambda m, x: m.down(
        (lambda h: F.silu(h[0]) * h[1])(torch.einsum("bte,gfe->gbtf", x, m.fused.weight.view(2, HIDDEN, WIDTH)))
    ),
    "fused, unbound": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*m.fused(x).unflatten(-1, (2, -1)).unbind(-2))),
    "fused, in depth": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*m.fused(x).dsplit(2))),
    "fused, in depth by a place": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*torch.dsplit(m.fused(x), [HIDDEN]))),
    "fused, tensor_split": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*m.fused(x).tensor_split((HIDDEN,), dim=-1))),
    "joined and chunked": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*torch.cat([m.gate(x), m.up(x)], -1).chunk(2, -1))),
    "joined and split": lambda m, x: m.down(
        (lambda g, u: F.silu(g) * u)(*torch.dstack((m.gate(x), m.up(x))).split([HIDDEN, HIDDEN], 2))
    ),
    "joined and sliced": lambda m, x: m.down(
        (lambda h: F.silu(h[..., :HIDDEN]) * h[:, :, -HIDDEN:])(torch.concat((m.gate(x), m.up(x)), dim=-1))
    ),
    "joined with others": lambda m, x: m.down(
        (lambda h: F.silu(h[..., WIDTH : WIDTH + HIDDEN]) * h.narrow(2, WIDTH + HIDDEN, HIDDEN))(
            torch.cat([x, m.gate(x), m.up(x)], -1)
        )
    ),
    "joined with a fused one": lambda m, x: m.down(
        (lambda h: F.silu(h[..., WIDTH : WIDTH + HIDDEN]) * h[..., WIDTH + HIDDEN :])(torch.cat([x, m.fused(x)], -1))
    ),
    "stacked in front": lambda m, x: m.down((lambda h: F.silu(h[0]) * h[1])(torch.stack((m.gate(x), m.up(x))))),
    "stacked and unbound": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*torch.stack([m.gate(x), m.up(x)], 2).unbind(2))),
    "stacked behind": lambda m, x: m.down((lambda h: F.silu(h[..., 0]) * h[..., -1])(torch.stack([m.gate(x), m.up(x)], dim=-1))),
}


@pytest.mark.parametrize("name", GATED)
def test_gates(name):
    c = only(lambda m, x: GATED[name](m, x))
    assert c.act == "silu(x0) * x1" and len(c.w_in) == len(c.b_in) == 2


def test_interleaved_gates_read_every_other_row():
    c = only(lambda m, x: m.down((lambda h: h[..., 0] * F.gelu(h[..., 1]))((m.fused(x) + m.bf(m.a(x))).view(2, 5, -1, 2))))
    assert [(w.start, w.step) for w in c.w_in] == [(1, 2), (0, 2)] and c.lora[0] == c.lora[1]
    for name in ("interleaved, slices", "interleaved, the value first", "interleaved, chunks", "interleaved, in front"):
        assert blocks.assert_exact_is_eager(Block(GATED[name]), X) == ["ffn"]


@pytest.mark.parametrize("name", [name for name in GATED if "joined" in name or "stacked " in name or "in depth" in name])
def test_gates_that_are_joined_and_taken_apart_again(name):
    assert blocks.assert_exact_is_eager(Block(GATED[name]), X) == ["ffn"]


def test_halves_that_are_joined_for_a_gated_linear_unit():
    function = lambda m, x: m.down(F.glu(torch.cat([m.gate(x), m.up(x)], -1)))  # noqa: E731
    assert "sigmoid" in only(function).act
    assert blocks.assert_exact_is_eager(Block(function), X) == ["ffn"]


def _with_a_zero(h: Tensor) -> Tensor:
    h[..., 3] = 0.0
    return h


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (lambda h: F.silu(h[..., 1 : HIDDEN + 1]) * h[..., :HIDDEN])(torch.cat([m.gate(x), m.up(x)], -1)),  # of both
        lambda m, x: (lambda g, u: F.silu(g) * u)(*torch.cat([m.gate(x), m.up(x)], 1).chunk(5, 1)[1:3]),  # of tokens
        lambda m, x: (lambda h: F.silu(h[:, 0]) * h[:, 1])(torch.stack([m.gate(x), m.up(x)])),  # of another dim
        lambda m, x: (lambda g, u: F.silu(g) * u)(*_with_a_zero(torch.cat([m.gate(x), m.up(x)], -1)).chunk(2, -1)),
        lambda m, x: F.glu(_with_a_zero(torch.cat([m.gate(x), m.up(x)], -1))),
        lambda m, x: (lambda g, u: F.silu(g) * u)(*_no_grad(lambda: torch.cat([m.gate(x), m.up(x)], -1)).chunk(2, -1)),
        lambda m, x: (lambda h: (h := torch.cat([m.gate(x), m.up(x)], -1))[..., :HIDDEN].relu() * h[..., HIDDEN:] + h.sum())(x),
    ],
    ids=["both parts", "another dim", "another dim of a stack", "written", "written, a unit", "without grad", "used elsewhere"],
)
def test_other_parts_of_what_is_joined_stay(function):
    model = Block(lambda m, x: m.down(function(m, x)) + x.sum())
    assert not sites(model, X)[0]
    assert blocks.assert_exact_is_eager(model, X) == []


def test_a_fused_gate_reads_rows_of_one_weight():
    c = only(lambda m, x: m.down((lambda u, g: u * F.gelu(g))(*m.fused(x).chunk(2, -1))))
    assert [(w.start, w.stop) for w in c.w_in] == [(HIDDEN, 2 * HIDDEN), (0, HIDDEN)]
    assert [(b.start, b.stop) for b in c.b_in] == [(HIDDEN, 2 * HIDDEN), (0, HIDDEN)]


def test_glu():
    c = only(lambda m, x: m.down(F.glu(m.fused(x), -1)))
    assert "sigmoid" in c.act and len(c.w_in) == 2


QUADRATIC: dict[str, tuple[Callable[[Block, Tensor], Tensor], str]] = {
    "bilinear": (lambda m, x: m.down(m.up(x) * m.gate(x)), "x0 * x1"),
    "bilinear, fused": (lambda m, x: m.down((lambda a, b: a * b)(*m.fused(x).chunk(2, -1))), "x0 * x1"),
    "bilinear, with an offset": (lambda m, x: m.down(m.up(x) * (1 + m.gate(x)) * 0.5), "x1"),
    "square": (lambda m, x: m.down(m.up(x).square()), "square(x0)"),
    "square by product": (lambda m, x: m.down((h := m.up(x)) * h), "x0 * x0"),
    "cube": (lambda m, x: m.down(m.up(x) ** 3), "square(x0) * x0"),
    "absolute value": (lambda m, x: m.down(m.up(x).abs()), "abs(x0)"),
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_products_and_powers_of_projections_are_activations(name):
    function, text = QUADRATIC[name]
    assert text in only(function).act
    assert blocks.assert_exact_is_eager(Block(function), X) == ["ffn"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.down((h := m.up(x)) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)),  # a norm is made of powers
        lambda m, x: m.down(m.norm(m.up(x) * m.gate(x))),
        lambda m, x: m.down(m.up(x) * m.gate(x.flip(1))),  # two inputs
        lambda m, x: m.down(m.up(x) * m.beta),
        lambda m, x: m.down((m.up(x) * m.gate(x)).cumsum(1)),  # a linear recurrence over tokens
        lambda m, x: m.down(m.norm(F.glu(m.fused(x)) + x.repeat(1, 1, 3)[..., :HIDDEN].exp())),  # the norm of a residual sum
    ],
)
def test_products_that_something_else_breaks_are_nothing(function):
    assert sites(Block(function), X) == ([], [])


def test_clamped_gates_with_an_offset():
    def function(m, x):
        gate, up = m.gate(x).clamp(max=2.0), m.up(x).clamp(-2.0, 2.0)
        return m.down((up + 1) * gate * torch.sigmoid(1.702 * gate))

    assert len(only(function).w_in) == 2


def test_biases_are_optional_each():
    c = only(lambda m, x: m.down(F.relu(m.up(x))), bias=False)
    assert c.b_in == (None,) and c.b_out is None
    c = only(lambda m, x: m.down(F.silu(F.linear(x, m.gate.weight)) * m.up(x)))
    assert c.b_in[0] is None and c.b_in[1] is not None


LAYOUTS: dict[str, tuple[Callable[[Block, Tensor], Tensor], tuple[int, ...]]] = {
    "tokens": (lambda m, x: m.down(F.gelu(m.up(x))), (7, WIDTH)),
    "images, channels last": (lambda m, x: m.down(F.gelu(m.up(x))), (2, 3, 4, WIDTH)),
    "windows in the batch": (lambda m, x: m.down(F.gelu(m.up(x.view(6, 4, WIDTH)))).view(2, 12, WIDTH), (2, 12, WIDTH)),
    "flat inside": (lambda m, x: m.down(F.gelu(m.up(x)).view(-1, HIDDEN)).view(2, 5, WIDTH), (2, 5, WIDTH)),
    "flat first": (lambda m, x: m.down(F.gelu(m.up(x.view(-1, WIDTH)))).view(2, 5, WIDTH), (2, 5, WIDTH)),
    "transposed input": (lambda m, x: m.down(F.gelu(m.up(x.transpose(1, 2)))), (2, WIDTH, 5)),
    "products": (lambda m, x: F.relu(x @ m.up.weight.T + m.up.bias) @ m.down.weight.t() + m.down.bias, (2, 5, WIDTH)),
    "weights stored (in, out)": (
        lambda m, x: torch.addmm(m.down.bias, F.relu(torch.addmm(m.up.bias, x, m.down.weight)), m.up.weight),
        (7, WIDTH),
    ),
    "cast inside": (lambda m, x: m.down(F.gelu(m.up(x).float().double())), (2, 5, WIDTH)),
    "einsum": (
        lambda m, x: torch.einsum("btf,ef->bte", F.relu(torch.einsum("bte,fe->btf", x, m.up.weight)), m.down.weight),
        (2, 5, WIDTH),
    ),
    "inner products": (lambda m, x: torch.inner(F.relu(x.inner(m.up.weight) + m.up.bias), m.down.weight), (2, 5, WIDTH)),
    "inner products of matrices": (lambda m, x: torch.inner(F.relu(torch.inner(x, m.up.weight)), m.down.weight), (7, WIDTH)),
    "hsplit": (lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*torch.hsplit(m.fused(x), 2))), (7, WIDTH)),
    "expanded weights": (
        lambda m, x: torch.bmm(F.relu(torch.bmm(x, _copies(m.up.weight.t()))), _copies(m.down.weight.t())),
        (2, 5, WIDTH),
    ),
    "expanded weights, biases": (
        lambda m, x: m.down.bias.baddbmm((x @ m.up.weight.T.expand(2, -1, -1) + m.up.bias).relu(), _copies(m.down.weight).mT),
        (2, 5, WIDTH),
    ),
    "repeated weights": (
        lambda m, x: torch.bmm(F.relu(torch.bmm(x, m.up.weight.t().repeat(2, 1, 1))), m.down.weight.t().repeat(2, 1, 1)),
        (2, 5, WIDTH),
    ),
    "weights of one row": (lambda m, x: F.relu(x @ m.up.weight.T[None]) @ m.down.weight.view(1, WIDTH, HIDDEN).mT, (2, 5, WIDTH)),
    "weights for each head": (
        lambda m, x: F.relu(x @ m.up.weight.T.expand(2, 3, -1, -1)) @ m.down.weight.T.expand(2, 3, -1, -1),
        (2, 3, 5, WIDTH),
    ),
    "weights before a vector": (lambda m, x: m.down.weight @ F.relu(m.up.weight @ x + m.up.bias) + m.down.bias, (WIDTH,)),
    "expanded weights on the left": (
        lambda m, x: torch.bmm(_copies(m.down.weight), F.relu(torch.bmm(_copies(m.up.weight), x.mT))).mT,
        (2, 5, WIDTH),
    ),
}


def _copies(weight: Tensor) -> Tensor:
    return weight.unsqueeze(0).expand(2, -1, -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    function, sizes = LAYOUTS[name]
    only(function, numbers(*sizes))


@pytest.mark.parametrize("name", [n for n in LAYOUTS if "inner" in n or "weights" in n or "split" in n])
def test_layouts_of_weights_are_exact(name):
    function, sizes = LAYOUTS[name]
    assert blocks.assert_exact_is_eager(Block(function), numbers(*sizes)) == ["ffn"]


def test_expanded_weights_at_symbolic_sizes():
    def function(m, x):
        up, down = (w.weight.t().unsqueeze(0).expand(x.shape[0], -1, -1) for w in (m.up, m.down))
        return torch.bmm(F.gelu(torch.bmm(x, up)), down)

    assert only(function, dynamic=True).width == HIDDEN
    assert blocks.assert_exact_at_any_length(Block(function), X) == ["ffn"]


@pytest.mark.parametrize(
    "weights",
    [
        lambda m: torch.stack([m.up.weight.t(), m.gate.weight.t()]),  # another matrix for each row
        lambda m: _with_a_zero(m.up.weight.t().repeat(2, 1, 1)),
        lambda m: _no_grad(lambda: _copies(m.up.weight.t())),
    ],
    ids=["of two layers", "written", "without grad"],
)
def test_other_weights_of_each_row_are_no_layer(weights):
    model = Block(lambda m, x: m.down(F.gelu(torch.bmm(x, weights(m)))))
    assert not sites(model, X)[0]
    assert blocks.assert_exact_is_eager(model, X) == []


def test_dropout_moves_to_the_end_of_the_activation():
    assert only(lambda m, x: m.down(F.dropout(F.gelu(m.up(x)), 0.3))).dropout_p == 0.3
    assert only(lambda m, x: m.down(F.dropout(F.silu(m.gate(x)), 0.3) * m.up(x))).dropout_p == 0.3
    assert only(lambda m, x: m.down(nn.Dropout(0.0)(F.gelu(m.up(x))))).dropout_p == 0.0
    c = only(lambda m, x: m.down(F.relu(F.dropout(m.up(x), 0.3))))  # ReLU hands a factor that is not negative on
    assert c.dropout_p == 0.3 and c.act == "relu(x0)"
    assert only(lambda m, x: m.down(-F.leaky_relu(F.dropout(m.up(x), 0.3)))).dropout_p == 0.3


def test_shared_weights_are_one_site_per_execution():
    matches, skipped = sites(Block(lambda m, x: m.down(F.gelu(m.up(x + m.down(F.gelu(m.up(x))))))), X)
    assert len(matches) == 2 and not skipped
    assert matches[0].capture.w_in == matches[1].capture.w_in


def test_feed_forward_in_chunks_along_the_sequence():
    def function(m, x):
        return torch.cat([m.down(F.gelu(m.up(part))) for part in x.chunk(2, dim=1)], dim=1)

    matches, skipped = sites(Block(function), numbers(2, 4, WIDTH))
    assert len(matches) == 2 and not skipped


def test_dynamic_lengths():
    c = only(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), dynamic=True)
    assert any(isinstance(s, torch.SymInt) for s in c.x.meta["example_value"].shape)


def _low(a: nn.Linear, b: nn.Linear, x: Tensor, scaling: float = 2.0, p: float = 0.0) -> Tensor:
    return b(a(F.dropout(x, p))) * scaling


def test_low_rank_branches_of_the_in_projections():
    c = only(lambda m, x: m.down(F.gelu(m.up(x) + 0.5 * m.b(m.a(x)))))
    assert [[branch.scaling for branch in branches] for branches in c.lora] == [[0.5]] and not c.lora_out
    c = only(lambda m, x: m.down(F.silu(m.gate(x) + _low(m.a, m.b, x, p=0.1)) * (m.up(x) + m.b(m.a(x)) / 4)))
    assert [[branch.scaling for branch in branches] for branches in c.lora] == [[2.0], [0.25]]
    c = only(lambda m, x: m.down(F.silu(m.gate(x)) * (m.up(x) + _low(m.a, m.b, x) + _low(m.a, m.bb, x, 3.0))))
    assert [len(branches) for branches in c.lora] == [0, 2] and c.lora[1][1].bias is not None


class Scaled(nn.Module):
    """Low-rank branches whose scaling the model holds: a parameter, or a buffer."""

    def __init__(self, scaling: Tensor, dropout: float = 0.0):
        super().__init__()
        self.block = Block(lambda m, x: x)
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x):
        m = self.block
        h = F.gelu(m.up(x) + self.scaling * m.b(m.a(F.dropout(x, self.dropout))))
        return m.down(h) + F.linear(m.a2(h), m.b2.weight) * self.scaling


@pytest.mark.parametrize("scaling", [nn.Parameter(torch.tensor(1.5)), nn.Buffer(torch.tensor([0.5]))])
def test_low_rank_branches_whose_scaling_is_a_tensor(scaling):
    c = only(Scaled(scaling))
    assert len(c.lora[0]) == len(c.lora_out) == 1 and c.lora[0][0].scaling == 1.0
    assert blocks.assert_exact_is_eager(Scaled(scaling), X) == ["ffn"]


def test_low_rank_branches_whose_scaling_is_a_vector_stay():
    matches, skipped = sites(Scaled(nn.Parameter(torch.ones(1, 5, 1))), X)
    assert not matches and skipped


def test_low_rank_branches_of_a_fused_projection_are_cut_as_it_is():
    def function(m, x):
        gate, up = (m.fused(x) + _low(m.a, m.bf, x)).chunk(2, -1)
        return m.down(F.silu(gate) * up)

    c = only(function)
    assert c.lora[0] == c.lora[1] and [w.start for w in c.w_in] == [0, HIDDEN]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _plus_low(m: Block, y: Tensor, x: Tensor) -> Tensor:
    """y + 0.5 * b(a(x)) by addmm, the tokens of both in one dim."""
    return torch.addmm(_flat(y), m.a(_flat(x)), m.b.weight.t(), alpha=0.5).view_as(y)


FLAT_BRANCHES: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "addmm": lambda m, x: m.down(F.gelu(_plus_low(m, m.up(x), x))),
    "a method": lambda m, x: m.down(F.gelu((y := m.up(x)).flatten(0, 1).addmm(m.a(_flat(x)), m.b.weight.t()).view(y.shape))),
    "in place": lambda m, x: m.down(F.gelu(m.up(_flat(x)).addmm_(m.a(_flat(x)), m.b.weight.t(), alpha=0.5).view(2, 5, HIDDEN))),
    "a sum": lambda m, x: m.down(F.gelu((y := m.up(x)) + (m.b(m.a(_flat(x))) * 0.5).view(y.shape))),
    "a gate": lambda m, x: m.down(F.silu(m.gate(x)) * _plus_low(m, m.up(x), x)),
    "halves": lambda m, x: m.down(
        (lambda g, u: F.silu(g) * u)(*(_flat(m.fused(x)) + m.bf(m.a(_flat(x)))).chunk(2, -1)).view(2, 5, HIDDEN)
    ),
    "a unit": lambda m, x: m.down(F.glu(_flat(m.fused(x)) + m.bf(m.a(_flat(x)))).view(2, 5, HIDDEN)),
    "everything": lambda m, x: F.linear(
        F.gelu(_flat(m.up(x)) + m.b(m.a(_flat(x)))).view(2, 5, HIDDEN), m.down.weight, m.down.bias
    ),
}


@pytest.mark.parametrize("name", FLAT_BRANCHES)
def test_low_rank_branches_on_flat_tokens(name):
    function = FLAT_BRANCHES[name]
    assert len(only(function).lora[-1]) == 1
    assert blocks.assert_exact_is_eager(Block(function), X) == ["ffn"]


def test_low_rank_branches_on_flat_tokens_of_the_out_projection():
    function = lambda m, x: torch.addmm(  # noqa: E731
        _flat(m.down(h := F.gelu(m.up(x)))), m.a2(_flat(h)), m.b2.weight.t(), alpha=2.0
    ).view(x.shape)
    assert [branch.scaling for branch in only(function).lora_out] == [2.0]
    assert blocks.assert_exact_is_eager(Block(function), X) == ["ffn"]


@pytest.mark.parametrize("name", ["addmm", "a method"])
def test_low_rank_branches_on_flat_tokens_at_symbolic_lengths(name):
    assert blocks.assert_exact_at_any_length(Block(FLAT_BRANCHES[name]), X) == ["ffn"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y, x: (y + (m.b(m.a(x.transpose(0, 1).reshape(-1, WIDTH)))).view(2, 5, HIDDEN)),  # tokens in another order
        lambda m, y, x: (_flat(y) + m.b(m.a(_flat(x))).flip(0)).view(2, 5, HIDDEN),  # of another token
        lambda m, y, x: (_flat(y) + m.b(m.a(_flat(x))) * torch.arange(10.0)[:, None]).view(2, 5, HIDDEN),  # a factor of each
        lambda m, y, x: y + (low := m.b(m.a(_flat(x)))).view(2, 5, HIDDEN) + low.sum(),  # used elsewhere
    ],
)
def test_other_sums_of_flat_tokens_are_no_branch(function):
    model = Block(lambda m, x: m.down(F.gelu(function(m, m.up(x), x))))
    assert not sites(model, X)[0]
    assert blocks.assert_exact_is_eager(model, X) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, h: x + m.down(h) + _low(m.a2, m.b2, h),
        lambda m, x, h: _low(m.a2, m.b2, h) + (m.down(h) + x),
        lambda m, x, h: m.down(h) + m.b2(m.a2(h)) + x + _low(m.a2, m.b2, h),
        lambda m, x, h: F.linear(x, m.a.weight.T @ m.a.weight) + m.down(h) + _low(m.a2, m.b2, h),
    ],
    ids=["a residual before", "and on the other side", "two branches around", "another layer before"],
)
def test_low_rank_branches_behind_a_residual_sum(function):
    model = Block(lambda m, x: function(m, x, F.gelu(m.up(x))))
    assert only(model).lora_out
    assert blocks.assert_exact_is_eager(model, X) == ["ffn"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.down((lambda g, u: F.silu(g + _low(m.a, m.b, x)) * u)(*m.fused(x).chunk(2, -1))),
        lambda m, x: m.down((lambda h: F.silu(h[..., ::2]) * (h[..., 1::2] + _low(m.a, m.bb, x, 0.5)))(m.fused(x))),
        lambda m, x: m.down(
            (lambda h: F.silu(h[..., 0]) * (h[..., 1] + m.b(m.a(x))))((m.fused(x) + m.bf(m.a(x))).view(2, 5, -1, 2))
        ),
    ],
    ids=["half", "every other row", "beside one of the whole"],
)
def test_low_rank_branches_of_a_part_of_a_fused_projection(function):
    assert any(branch.part for branches in only(function).lora for branch in branches)
    assert blocks.assert_exact_is_eager(Block(function), X) == ["ffn"]


def test_a_branch_of_one_feature_is_none():
    model = Block(lambda m, x: m.down(F.gelu(m.up(x) + F.linear(m.a(x), m.b.weight[:1]))))
    assert not sites(model, X)[0]
    assert blocks.assert_exact_is_eager(model, X) == []


def test_low_rank_branches_of_the_out_projection():
    c = only(lambda m, x: m.down(h := F.gelu(m.up(x))) + _low(m.a2, m.b2, h))
    assert [(branch.scaling, branch.dropout_p) for branch in c.lora_out] == [(2.0, 0.0)] and c.lora == ()
    c = only(lambda m, x: m.down(h := F.dropout(F.gelu(m.up(x)), 0.3)) + _low(m.a2, m.b2, h, p=0.1))
    assert c.dropout_p == 0.3 and c.lora_out[0].dropout_p == 0.1
    c = only(lambda m, x: _low(m.a2, m.b2, h := F.gelu(m.up(x))) + m.down(h) + _low(m.a2, m.b2, h, 0.5))
    assert [branch.scaling for branch in c.lora_out] == [2.0, 0.5]


class Computed(nn.Module):
    """A block whose linear layers compute their weights."""

    def __init__(self, parametrise: Callable[[nn.Module], Any], hidden: int = HIDDEN):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, hidden).double(), nn.Linear(hidden, WIDTH).double()
        parametrise(self.up)
        parametrise(self.down)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Rounded(nn.Module):
    """Weights rounded, with the gradient of what they were."""

    def forward(self, weight):
        return weight + ((weight * 8).round() / 8 - weight).detach()


class OfUnitLength(nn.Module):
    def forward(self, weight):
        return F.normalize(weight, dim=-1)


class WithoutOneRow(nn.Module):
    def forward(self, weight):
        weight = weight.clone()
        weight[0] = 0.0
        return weight


@pytest.mark.parametrize(
    "parametrise",
    [
        parametrizations.weight_norm,
        lambda m: parametrizations.spectral_norm(m).eval(),
        parametrizations.orthogonal,
        lambda m: register_parametrization(m, "weight", Rounded()),
        lambda m: register_parametrization(m, "weight", OfUnitLength()),
    ],
    ids=["weight norm", "spectral norm", "orthogonal", "rounded", "normalised"],
)
def test_weights_that_are_computed_from_parameters(parametrise):
    model = Computed(parametrise)
    assert only(model, X).width == HIDDEN
    assert blocks.assert_exact_is_eager(model, X) == ["ffn"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_block_with_computed_weights_learns(checkpointed):
    """Its state is that of the parameter behind the weight; routers see the weight as it is computed."""
    model = Computed(parametrizations.weight_norm, hidden=32)
    compiled = torch.compile(model, backend="spt", options={**blocks.SPARSE, "require_matches": 1})
    call = (lambda x: checkpoint(compiled, x, use_reentrant=False)) if checkpointed else compiled
    losses = blocks.train_steps(model, call, [numbers(4, 16, WIDTH, seed=i) for i in range(4)])
    assert all(map(math.isfinite, losses)) and spt_compiler.state_dict(model)


@pytest.mark.parametrize(
    "parametrise",
    [
        parametrizations.spectral_norm,  # in training it writes its buffers
        lambda m: register_parametrization(m, "weight", nn.Dropout(0.5)),
    ],
)
def test_weights_that_change_in_the_forward_stay(parametrise):
    matches, skipped = sites(Computed(parametrise).train(), X)
    assert not matches and "nor computed from parameters alone" in str(skipped[0].reason)


class Mixed(nn.Module):
    """A block under autocast, parts of which run in full precision."""

    def __init__(self, function: Callable):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.up, self.down = function, nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.function(self, x).float()


def _in_full(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return function(x.float())


def test_an_activation_under_another_autocast_mode():
    model, x = Mixed(lambda m, x: m.down(_in_full(F.gelu, m.up(x)))), X.float()
    expected = blocks.gradients(model, model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="spt", options={**blocks.EXACT, "inner": "eager"})
    blocks.assert_same(blocks.gradients(model, compiled, x), expected, rtol=1e-2, grad_rtol=2e-2)
    assert [row.status for rows in debug.reports() for row in rows] == ["replaced"]


@pytest.mark.parametrize(
    "function", [lambda m, x: _in_full(m.down, F.gelu(m.up(x))), lambda m, x: m.down(F.gelu(_in_full(m.up, x)))]
)
def test_layers_under_two_autocast_modes_stay(function):
    matches, skipped = sites(Mixed(function), X.float())
    assert not matches and ["another grad or autocast mode" in str(s.reason) for s in skipped] == [True]


def test_weights_that_are_written_in_place_stay():
    """What routers and states see of a weight is computed anew without the write."""
    model = Computed(lambda m: m.in_features == WIDTH and register_parametrization(m, "weight", WithoutOneRow()))
    (site,) = spt_compiler.explain(model, X, options=blocks.SPARSE).sites
    assert site.status == "skipped" and "by writes in place" in site.reason


def test_a_checkpointed_block_is_a_graph_of_its_own():
    """The matcher looks at one graph: the body is found when it is given the body."""
    block = Block(lambda m, x: m.down(F.gelu(m.up(x))))
    (captured,) = models.capture(lambda x: checkpoint(block, x, use_reentrant=False), X.requires_grad_())
    X.requires_grad_(False)
    outer = copy_graph(captured.module)
    canonicalize(outer)
    assert find(outer) == ([], [])
    (body,) = (copy_graph(m) for m in captured.module.children() if isinstance(m, torch.fx.GraphModule))
    canonicalize(body)
    matches, skipped = find(body)
    assert len(matches) == 1 and not skipped


# ---------------------------------------------------------------------------------------------------------------------
# Near misses: one flaw each
# ---------------------------------------------------------------------------------------------------------------------

NEAR_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "norm in between": (lambda m, x: m.down(m.norm(F.gelu(m.up(x)))), "a norm or reduction (layer_norm)"),
    "mean subtracted": (lambda m, x: m.down(F.gelu(h := m.up(x)) - h.mean(-1, keepdim=True)), "it reads .mean of shape"),
    "weights on the left of halves of the tokens": (
        lambda m, x: m.down.weight @ (lambda a, b: F.silu(a) * b)(*(m.up.weight @ x.mT.repeat(1, 1, 2)).chunk(2, 2)),
        "on the left of activations whose features are rows",
    ),
    "weights on the left, hidden returned": (
        lambda m, x: (m.down.weight @ (h := F.relu(m.up.weight @ x.mT)), h),
        "on the left of activations whose features are rows",
    ),
    "weights on the left that narrow": (
        lambda m, x: m.a.weight.T @ F.relu(m.a.weight @ x.mT),
        "on the left of activations whose features are rows",
    ),
    "weights on the left, a norm between": (
        lambda m, x: m.down.weight @ F.layer_norm(F.relu(m.up.weight @ x.mT), (5,)),
        "a norm or reduction (layer_norm)",
    ),
    "rrelu in training": (lambda m, x: m.down(F.rrelu(m.up(x), training=True)), "it draws its slopes at random"),
    "convolution in between": (
        lambda m, x: m.down(F.gelu(m.conv(m.up(x).transpose(1, 2)).transpose(1, 2))),
        "conv1d between the projections",
    ),
    "softmax of the hidden activation": (lambda m, x: m.down(F.relu(m.up(x)).softmax(-1)), "a norm or reduction (softmax)"),
    "cumulative sum": (lambda m, x: m.down(F.relu(m.up(x)).cumsum(-1)), "cumsum between the projections"),
    "hidden returned": (lambda m, x: (m.down(h := F.gelu(m.up(x))), h), "also returned"),
    "hidden used twice": (lambda m, x: m.down(h := F.gelu(m.up(x))) + h.sum(), "also used by"),
    "pre-activation used twice": (lambda m, x: m.down(F.gelu(h := m.up(x))) + h.sum(), "also used by"),
    "hidden written to": (lambda m, x: m.down(_zeroed(F.gelu(m.up(x)))), ""),
    "input written to": (lambda m, x: (y := x * 2, m.down(_after(F.gelu(m.up(y)), y)))[1] + y, "written to in place"),
    "other grad mode": (lambda m, x: m.down(_no_grad(lambda: F.gelu(m.up(x)))), "another grad or autocast mode"),
    "dropout inside of the activation": (
        lambda m, x: m.down(F.gelu(F.dropout(m.up(x), 0.5))),
        "dropout inside of the activation",
    ),
    "a dropout that is squared": (
        lambda m, x: m.down((h := F.relu(F.dropout(m.up(x), 0.5))) * h),
        "read twice inside of the activation",
    ),
    "a dropout in a gate as well": (
        lambda m, x: m.down((h := F.dropout(m.up(x), 0.5)) * torch.sigmoid(h)),
        "read twice inside of the activation",
    ),
    "one dropout in both factors": (
        lambda m, x: m.down((h := F.dropout(F.relu(m.up(x)), 0.5)) * h),
        "read twice inside of the activation",
    ),
    "prelu with slopes of tokens": (lambda m, x: m.down(F.prelu(m.up(x[:, :1].expand(-1, HIDDEN, -1)), m.beta)), "prelu scales"),
    "two dropouts": (
        lambda m, x: m.down(F.dropout(F.silu(m.gate(x)), 0.5) * F.dropout(m.up(x), 0.5)),
        "dropout inside of the activation",
    ),
    "tensor that varies by token": (lambda m, x: m.down(F.gelu(m.up(x) * x[..., :1])), "no parameter of an activation"),
    "factors of tokens and features": (
        lambda m, x: m.down(F.gelu(m.up(x)) * x.repeat(1, 1, 2)[..., :HIDDEN]),
        "a gated output, no block",
    ),
    "factors of two halves of the features": (
        lambda m, x: m.down((F.gelu(m.up(x)).view(2, 5, 2, 5) * x[..., :2, None]).flatten(2)),
        "between the projections",
    ),
    "squeeze and excite, pooled by a module": (
        lambda m, x: m.down((h := F.gelu(m.up(x))) * m.square(F.adaptive_avg_pool1d(h.mT, 1).squeeze(-1)).sigmoid()[:, None]),
        "scales them (squeeze and excite)",
    ),
    "a gate by the mean of pre-activations": (
        lambda m, x: m.down((h := m.up(x)) * torch.sigmoid(h.mean(1, keepdim=True))),
        "scales them (squeeze and excite)",
    ),
    "a gate by the mean of hidden units": (
        lambda m, x: m.down((h := F.gelu(m.up(x))) * torch.sigmoid(h.mean(1, keepdim=True))),
        "a norm or reduction (.mean)",
    ),
    "a gate by the mean of the input": (
        lambda m, x: m.down(F.gelu(m.up(x)) * torch.sigmoid(m.gate(x.mean(1, keepdim=True)))),
        "its projections read different inputs",
    ),
    "a global response norm": (
        lambda m, x: m.down((h := F.gelu(m.up(x))) * m.beta * torch.linalg.vector_norm(h, dim=1, keepdim=True) + h),
        "a norm or reduction (linalg_vector_norm)",
    ),
    "a factor in the denominator": (lambda m, x: m.down(x[..., :1] / F.softplus(m.up(x))), "no parameter of an activation"),
    "a factor before a sum": (lambda m, x: m.down(F.silu(m.gate(x)) * x[..., :1] + m.up(x)), "no parameter of an activation"),
    "three projections": (
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x) + F.linear(x, m.down.weight.T)),
        "3 projections meet",
    ),
    "weight that is an activation": (
        lambda m, x: F.linear(F.gelu(m.up(x)), x.mean((0, 1))[:, None] * m.down.weight),
        "no parameter",
    ),
    "in-weight that is an activation": (
        lambda m, x: m.down(F.gelu(F.linear(x, x.mean((0, 1))[None] * m.up.weight))),
        "no parameter",
    ),
    "gated by something else": (
        lambda m, x: m.down(torch.sigmoid(m.up(x)) * x.repeat(1, 1, 2)[..., :HIDDEN]),
        "a gated output, no block",
    ),
    "gated heads": (
        lambda m, x: m.down((torch.sigmoid(m.square(m.up(x))[..., :2, None]) * m.gate(x).view(2, 5, 2, 5)).view(2, 5, -1)),
        "",
    ),
    "heads gated by something else": (
        lambda m, x: m.down((torch.sigmoid(m.a(x)).unsqueeze(-1) * x.repeat(1, 1, 2)[..., :10].view(2, 5, 2, 5)).view(2, 5, -1)),
        "a gated output, no block",
    ),
    "a slice of an interleaved gate": (
        lambda m, x: F.linear(F.silu((h := m.fused(x))[..., ::2][..., :8]) * h[..., 1::2][..., :8], m.down.weight[:, :8]),
        "a part of an interleaved projection",
    ),
    "interleaved halves that keep a dim": (
        lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*m.fused(x).view(2, 5, -1, 2).chunk(2, -1)).flatten(2)),
        ".chunk of a fused projection keeps a dim of one",
    ),
    "a slice of one that keeps its dim": (
        lambda m, x: m.down((lambda h: F.silu(h[..., :1]) * h[..., 1:])(m.fused(x).view(2, 5, -1, 2)).squeeze(-1)),
        "getitem of a fused projection keeps a dim of one",
    ),
    "a gated linear unit over a dim of two": (
        lambda m, x: m.down(F.glu(m.fused(x).view(2, 5, -1, 2), -1).squeeze(-1)),
        "over a dim beside the hidden units",
    ),
    "pooler": (lambda m, x: F.linear(torch.tanh(m.square(m.up(x))), m.square.weight), "linear, tanh, linear is a pooler"),
    "head": (lambda m, x: F.linear(F.gelu(m.up(x)), m.square.weight), "differs from the model width"),
    "bottleneck adapter": (
        lambda m, x: F.linear(F.relu(m.a(x)), m.a.weight.T),
        "hidden width 2 is below the model width 6",
    ),
    "adapter that skips the dropout": (
        lambda m, x: m.down(F.dropout(h := F.gelu(m.up(x)), 0.5)) + _low(m.a2, m.b2, h),
        "reads it before its dropout",
    ),
    "two adapters with dropout": (
        lambda m, x: m.down(h := F.gelu(m.up(x))) + _low(m.a2, m.b2, h, p=0.1) + _low(m.a2, m.b2, h, p=0.1),
        "several low-rank adapters with dropout",
    ),
    "dropout inside of an adapter": (
        lambda m, x: m.down(h := F.gelu(m.up(x))) + m.b2(F.dropout(m.a2(h), 0.1)),
        "not understood",
    ),
    "adapter of another hidden activation": (
        lambda m, x: m.down(h := F.gelu(m.up(x))) + _low(m.a2, m.b2, h * m.beta),
        "also used by mul",
    ),
    "adapter whose middle is used": (
        lambda m, x: (m.down(h := F.gelu(m.up(x))) + m.b2(low := m.a2(h)), low),
        "also returned",
    ),
    "a part of the sum of a part and an adapter": (
        lambda m, x: F.linear(F.gelu((m.fused(x)[..., :HIDDEN] + m.b(m.a(x)))[..., :8]), m.down.weight[:, :8]),
        "a part of a part that has a low-rank adapter of its own",
    ),
    "rows change": (lambda m, x: m.down(F.gelu(m.up(x))[:, 0]), "between the projections"),
    "turned and not back": (
        lambda m, x: m.down(F.gelu(m.up(x.repeat(1, 2, 1)).mT)),
        "permute between the projections",
    ),
    "another order of features": (
        lambda m, x: m.down(F.gelu(m.up(x)).view(2, 5, 2, 5).transpose(2, 3).reshape(2, 5, HIDDEN)),
        "between the projections",
    ),
    "a convolution over the rows as an image": (
        lambda m, x: m.down(F.gelu(m.conv(m.up(x).mT.reshape(2, HIDDEN, -1)).flatten(2).mT)),
        "conv1d between the projections",
    ),
    "a function without a form": (lambda m, x: m.down(torch.atan(m.up(x))), "atan between the projections"),
    "a special function": (lambda m, x: m.down((h := m.up(x)) * torch.special.erfc(-h)), "special_erfc between the projections"),
    "rounded straight through": (lambda m, x: m.down((h := m.up(x)) + (h.round() - h).detach()), "round between the projections"),
    "a memory of keys and values": (lambda m, x: m.down(m.up(x).softmax(-1)), "a norm or reduction (softmax)"),
    "a backward of its own": (lambda m, x: m.down(_Rounded.apply(m.up(x))), "an autograd function whose backward"),
    "hidden broadcast": (lambda m, x: m.down(F.gelu(m.up(x))[None] * m.beta.expand(2, 1, 1, HIDDEN)), ""),
}


class _Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return (F.relu(x) * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


def _zeroed(h: Tensor) -> Tensor:
    h[..., 0] = 0.0
    return h


def _after(h: Tensor, y: Tensor) -> Tensor:
    y[0] = 0.0
    return h


def _no_grad(function: Callable) -> Tensor:
    with torch.no_grad():
        return function()


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    function, reason = NEAR_MISSES[name]
    matches, skipped = sites(Block(function), X)
    assert not [m for m in matches if m.pattern.kind == "ffn"], [m.capture for m in matches]
    if reason:  # what is too far from a block is no candidate
        found = [str(s.reason) for s in skipped]
        assert len(found) == 1 and reason in found[0], found


@pytest.mark.parametrize(
    "gate",
    [
        lambda m, h: m.b(F.relu(m.a2(h.mean(1, keepdim=True)))),
        lambda m, h: m.b(F.relu(m.a2(h.mean(1)))).unsqueeze(1),
        lambda m, h: m.square(h),
    ],
)
def test_gates_that_layers_make_of_the_hidden_units(gate):
    """The gate's own layers are candidates beside the block that it gates."""
    model = Block(lambda m, x: m.down((h := F.gelu(m.up(x))) * torch.sigmoid(gate(m, h))))
    matches, skipped = sites(model, X)
    assert not matches and "scales them (squeeze and excite)" in str(skipped[-1].reason) and len(skipped) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.down(m.up(x)),  # no activation: one linear layer in two factors
        lambda m, x: m.down(m.up(x) * 0.5 + m.beta),
        lambda m, x: m.down(m.up(x).clone()),
        lambda m, x: F.gelu(m.up(x)),
        lambda m, x: m.down(F.gelu(m.up(x) + m.square(F.gelu(m.gate(x))))),  # two blocks in one another
    ],
)
def test_what_is_no_block_is_not_taken(function):
    matches, _ = sites(Block(function), X)
    assert not matches


@pytest.mark.parametrize(
    "function",
    [lambda m, x: m.down(F.gelu(_hooked(m.up(x)))), lambda m, x: m.down(_hooked(F.gelu(m.up(x))))],
    ids=["pre-activation", "hidden activation"],
)
def test_a_hook_on_a_gradient_inside_keeps_a_block_dense(function):
    (site,) = spt_compiler.explain(Block(function), X, options=blocks.EXACT).sites
    assert site.reason == "register_hook between the projections"
    assert blocks.assert_exact_is_eager(Block(function), X) == []  # the hook runs: gradients agree


def _hooked(h: Tensor) -> Tensor:
    h.register_hook(lambda gradient: gradient * 2)
    return h


class Experts(nn.Module):
    """Three experts stacked in one parameter each, with a bias."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function
        self.up, self.down = nn.Parameter(numbers(3, HIDDEN, WIDTH)), nn.Parameter(numbers(3, WIDTH, HIDDEN, seed=1))
        self.bias = nn.Parameter(numbers(3, HIDDEN, seed=2))

    def forward(self, x):
        return self.function(self, x)


def _all_experts(m: Experts, x: Tensor) -> Tensor:
    return torch.bmm(F.gelu(torch.bmm(x, m.up.mT)), m.down.mT)


def _all_experts_over_a_batch(m: Experts, x: Tensor) -> Tensor:
    """As GShard writes it: tokens dispatched to [expert, batch, slot, width]."""
    h = torch.einsum("ebcd,efd->ebcf", torch.stack([x, x * 0.5], 1), m.up).relu()
    return torch.einsum("ebcf,edf->ebcd", h, m.down)


def _picking_experts(m: Experts, x: Tensor) -> Tensor:
    best = x[:, 0].argmax(-1) % 3
    return torch.bmm(F.gelu(torch.bmm(x, m.up[best].mT)), m.down[best].mT)


def _picking_for_vectors(m: Experts, x: Tensor) -> Tensor:
    """The weights of each token to the left of it, a bias added in place."""
    x = x.flatten(0, 1)
    best = x.argmax(-1) % 3
    h = torch.bmm(m.up[best], x.unsqueeze(-1)).squeeze(-1)
    h.add_(m.bias[best])
    return torch.bmm(m.down[best], F.gelu(h).unsqueeze(-1)).squeeze(-1)


def _one_after_the_other(m: Experts, x: Tensor) -> Tensor:
    """Each expert takes its share of the sorted rows."""

    def experts(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([F.linear(rows, w[i]) for i, rows in enumerate(x.split([7, 3, 5]))])

    return experts(F.gelu(experts(x.flatten(0, 1), m.up)), m.down)


def _experts_by_group(m: Experts, x: Tensor) -> Tensor:
    """Gate and value interleaved and a bias added in place, as some experts have them."""
    up, down = (F.pad(w, (0, -w.shape[2] % 8, 0, -w.shape[1] % 16)).bfloat16().mT for w in (m.up, m.down))
    x, ends = F.pad(x.flatten(0, 1), (0, 2)).bfloat16(), torch.tensor([2, 7, 15], dtype=torch.int32)
    h = F.grouped_mm(x, up, offs=ends)
    h.add_(F.pad(m.bias, (0, 6)).bfloat16().repeat_interleave(5, 0))
    h = F.silu(h[..., ::2]) * (h[..., 1::2] + 1)
    return F.grouped_mm(F.pad(h, (0, 8)), down, offs=ends)[:, :8]


def _experts_in_halves(m: Experts, x: Tensor, returned: bool = False) -> Any:
    """Gate and value behind one another, behind a bias."""
    up, down = (F.pad(w, (0, -w.shape[2] % 8, 0, -w.shape[1] % 16)).bfloat16().mT for w in (m.up, m.down))
    x, ends = F.pad(x.flatten(0, 1), (0, 2)).bfloat16(), torch.tensor([2, 7, 15], dtype=torch.int32)
    h = F.grouped_mm(x, up, offs=ends) + F.pad(m.bias, (0, 6)).bfloat16().repeat_interleave(5, 0)
    gate, value = h.chunk(2, -1)
    if returned:
        return gate, value
    h = gate.clamp(max=7.0) * torch.sigmoid(gate * 1.7) * (value.clamp(-7.0, 7.0) + 1)
    return F.grouped_mm(F.pad(h, (0, 8)), down, offs=ends)[:, :8]


def _experts_of_sorted_tokens(grouped: Callable, weigh_first: bool) -> Callable:
    """As libraries run them: tokens sorted by expert, weighed before or behind the second product, and added up again."""

    def function(m: Experts, x: Tensor) -> Tensor:
        up, down = (F.pad(w, (0, -w.shape[2] % 8, 0, -w.shape[1] % 16)).bfloat16().mT for w in (m.up, m.down))
        x = F.pad(x.flatten(0, 1), (0, 2)).bfloat16()
        weight, expert = torch.softmax(x[:, :3], -1).topk(2)
        order = expert.flatten().argsort()
        ends = (expert.flatten()[None] == torch.arange(3)[:, None]).sum(1).cumsum(0).int()
        weight = weight.flatten()[order, None]
        h = F.silu(grouped(x[order // 2], up, offs=ends))
        y = grouped(h * weight if weigh_first else h, down, offs=ends)
        return torch.zeros(15, 16, dtype=y.dtype).index_add(0, order // 2, y if weigh_first else y * weight)[:, :8]

    return function


def _one_picked_expert(m: Experts, x: Tensor) -> Tensor:
    best = x.sum((1, 2)).argmax(0, keepdim=True)
    return F.linear(F.gelu(F.linear(x, m.up[best][0])), m.down[best][0])


@pytest.mark.parametrize(
    "function, reason",
    [
        (_all_experts, "stacked by expert in one batched product"),
        (_picking_experts, "each token picks the weights"),
        (_picking_for_vectors, "each token picks the weights"),
        (_one_after_the_other, "one by one, each with its share of the rows"),
        (_all_experts_over_a_batch, "stacked by expert in one batched product"),
        (_experts_by_group, "grouped_mm"),
        (_experts_in_halves, "grouped_mm"),
        (_experts_of_sorted_tokens(F.grouped_mm, weigh_first=False), "grouped_mm"),
        (_experts_of_sorted_tokens(torch._grouped_mm, weigh_first=True), "grouped_mm"),
        (_one_picked_expert, "picked by an index"),
    ],
)
def test_experts_that_stay_say_why(function, reason):
    matches, skipped = sites(Experts(function), numbers(3, 5, WIDTH))
    assert not matches and len(skipped) == 1 and reason in str(skipped[0].reason), [str(s.reason) for s in skipped]


def test_layers_that_read_a_stream_behind_an_activation_are_no_block():
    """Attention over features (AutoInt): relu(attention(x) + layer(x)), which queries, keys and values of the next one read."""

    def function(m, x):
        y = F.relu(_attend(x, x, x) + F.linear(x, m.down.weight[:, :WIDTH]))
        return _attend(*(F.linear(y, w[:WIDTH, :WIDTH]) for w in (m.down.weight, m.up.weight, m.gate.weight)))

    matches, skipped = sites(Block(function), X)
    assert [m.pattern.kind for m in matches] == ["attention", "attention"] and not skipped


def test_linear_attention_is_no_block():
    def function(m, x):
        q, k = F.elu(m.up(x)) + 1, F.elu(m.gate(x)) + 1
        return m.down(q @ (k.mT @ m.gate(x)))

    assert sites(Block(function), X) == ([], [])

    def by_heads(m, x):
        q, k = (F.relu(y).view(2, -1, 2, HIDDEN // 2).transpose(1, 2) for y in (m.up(x), m.gate(x)))
        v = m.gate(x).view(2, -1, 2, HIDDEN // 2).transpose(1, 2)
        total = 1 / torch.einsum("bhtd,bhd->bht", q, k.sum(2))
        out = torch.einsum("bhtd,bhde,bht->bhte", q, k.mT @ v, total)
        return m.down(out.transpose(1, 2).reshape(2, -1, HIDDEN))

    assert sites(Block(by_heads), X) == ([], [])


def test_halves_of_a_grouped_product_that_meet_no_other_are_nothing():
    assert sites(Experts(functools.partial(_experts_in_halves, returned=True)), numbers(3, 5, WIDTH)) == ([], [])


def test_experts_called_one_by_one_are_sites():
    """The form allows it: each has its own matrix of the stack."""

    def function(m, x):
        return torch.stack([F.linear(F.gelu(F.linear(x[i], m.up[i], m.bias[i])), m.down[i]) for i in range(3)])

    matches, skipped = sites(Experts(function), numbers(3, 5, WIDTH))
    assert len(matches) == 3 and not skipped


COLUMNS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "plain": lambda m, x: m.down.weight @ F.gelu(m.up.weight @ x.mT),
    "matrices": lambda m, x: torch.mm(m.down.weight, torch.mm(m.up.weight, x[0].t()).relu()),
    "biases": lambda m, x: (m.down.weight @ F.relu(m.up.weight @ x.mT + m.up.bias[:, None]) + m.down.bias.view(-1, 1)).mT,
    "addmm": lambda m, x: torch.addmm(
        m.down.bias[:, None], m.down.weight, torch.addmm(m.up.bias[:, None], m.up.weight, x[0].T).exp()
    ),
    "gated": lambda m, x: m.down.weight @ (F.silu(m.gate.weight @ x.mT + m.gate.bias[:, None]) * (m.up.weight @ x.mT)),
    "a formula": lambda m, x: m.down.weight @ ((h := m.up.weight @ x.mT) * torch.sigmoid(1.7 * h) * m.beta[:, None]),
    "einsum": lambda m, x: torch.einsum("ef,bft->bte", m.down.weight, torch.einsum("fe,bte->bft", m.up.weight, x).relu()),
    "tokens mixed by weights": lambda m, x: x.mT + m.down.weight @ F.gelu(m.up.weight @ x.mT) * 0.5,
    "turned and back": lambda m, x: m.down(F.gelu(m.up(x).mT).mT),
    "turned and back, gated": lambda m, x: m.down((F.silu(m.gate(x).permute(2, 0, 1)) * m.up(x).permute(2, 0, 1)).permute(1, 2, 0)),
    "turned for a parameter": lambda m, x: m.down(F.gelu(m.up(x).transpose(1, 2) * m.beta[:, None]).transpose(1, 2)),
    "one layer turned": lambda m, x: F.linear(F.gelu(m.up.weight @ x.mT + m.up.bias[:, None]).mT, m.down.weight),
    "halves": lambda m, x: m.down.weight @ (lambda g, u: F.silu(g) * u)(*(m.fused.weight @ x.mT).chunk(2, 1)),
    "halves, a bias": lambda m, x: m.down.weight
    @ (lambda g, u: F.silu(g) * u)(*(m.fused.weight @ x.mT + m.fused.bias[:, None]).split(HIDDEN, dim=-2)),
    "halves, slices": lambda m, x: m.down.weight @ (lambda h: F.silu(h[:, :HIDDEN]) * h[:, HIDDEN:])(m.fused.weight @ x.mT),
    "halves, interleaved": lambda m, x: m.down.weight @ (lambda h: F.silu(h[:, ::2]) * h[:, 1::2])(m.fused.weight @ x.mT),
    "halves, hsplit": lambda m, x: m.down.weight @ (lambda g, u: F.silu(g) * u)(*torch.hsplit(m.fused.weight @ x.mT, 2)),
    "halves, vsplit": lambda m, x: m.down.weight @ (lambda g, u: F.silu(g) * u)(*torch.vsplit(m.fused.weight @ x[0].T, 2)),
    "halves, turned": lambda m, x: m.down((lambda g, u: F.silu(g) * u)(*m.fused(x).mT.chunk(2, 1)).mT),
    "a gated linear unit": lambda m, x: m.down.weight @ F.glu(m.fused.weight @ x.mT, 1),
    "a condition": lambda m, x: m.down.weight @ torch.where((h := m.up.weight @ x.mT) > 0.1, h, 0.3 * h),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", COLUMNS)
def test_layers_over_columns(name, dynamic):
    """Features are rows of what the weights multiply from the left."""
    assert only(COLUMNS[name], dynamic=dynamic).width == HIDDEN
    if dynamic is None:
        assert blocks.assert_exact_is_eager(Block(COLUMNS[name]), X) == ["ffn"]


@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (2, 1)])
@pytest.mark.parametrize("name", ["plain", "biases", "gated", "halves, a bias"])
def test_one_column_is_no_bias(name, sizes, caplog):
    x = numbers(*sizes, WIDTH)
    assert only(COLUMNS[name], x).width == HIDDEN
    assert blocks.assert_exact_is_eager(Block(COLUMNS[name]), x) == ["ffn"]
    assert not caplog.records  # fake tensors log what fails on them


FACTORS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "behind the activation": lambda m, x: m.down(F.gelu(m.up(x)) * x[..., :1]),
    "made of the input": lambda m, x: m.down(x.mean(-1)[..., None] * F.gelu(m.up(x))),
    "learned": lambda m, x: m.down(F.gelu(m.up(x)) * torch.sigmoid(F.linear(x, m.b.weight[:1, :1].expand(1, WIDTH)))),
    "divided": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x) / x.exp().sum(-1, keepdim=True)),
    "in a gate": lambda m, x: m.down((F.silu(m.gate(x)) * x[..., :1].sigmoid()) * m.up(x)),
    "in both factors": lambda m, x: m.down((F.silu(m.gate(x)) / x[..., :1].exp()) * (x[..., 1:2] * m.up(x))),
    "of a sequence": lambda m, x: m.down(F.dropout(F.gelu(m.up(x)) * x[:, :1, :1], 0.0)),
    "of two kinds": lambda m, x: m.down(F.gelu(m.up(x)) * x[..., :1] * x[:1, :, 1:2]),
    "without a bias": lambda m, x: (F.gelu(m.up(x)) * x[..., :1]) @ m.down.weight.T,
    "on a gated linear unit": lambda m, x: m.down(F.glu(m.fused(x)) * x[..., :1]),
    "on halves": lambda m, x: m.down((lambda g, u: F.silu(g) * u * x[..., :1])(*m.fused(x).chunk(2, -1))),
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_of_each_token_joins_the_output(name):
    """It commutes with the second product; the bias of that stays outside."""
    c = only(FACTORS[name])
    assert c.b_out is None and c.width == HIDDEN
    assert blocks.assert_exact_is_eager(Block(FACTORS[name]), X) == ["ffn"]


def test_a_factor_of_each_token_at_symbolic_lengths():
    assert blocks.assert_exact_at_any_length(Block(FACTORS["behind the activation"]), X) == ["ffn"]


def test_a_factor_of_each_token_leaves_one_dropout():
    function = lambda m, x: m.down(F.dropout(F.gelu(m.up(x)) * x[..., :1], 0.3))  # noqa: E731
    assert only(function).dropout_p == 0.3
    (captured,) = models.capture(Block(function), X)
    module = copy_graph(captured.module)
    canonicalize(module)
    assert [n.target for n in module.graph.nodes].count(F.dropout) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.down((h := F.gelu(m.up(x))) * h.mean(-1, keepdim=True)),  # a norm: the factor is made of the block
        lambda m, x: m.down(F.gelu(h := m.up(x)) * h.mean(-1, keepdim=True)),
        lambda m, x: m.down(h := F.gelu(m.up(x)) * x[..., :1]) + h.sum(),
        lambda m, x: m.down(_no_grad(lambda: F.gelu(m.up(x)) * x[..., :1])) + x,
        lambda m, x: m.down(m.up(x) * x[..., :1]),  # no block
    ],
    ids=["a norm", "by the pre-activation", "used elsewhere", "without grad", "two layers"],
)
def test_other_factors_of_tokens_stay(function):
    (captured,) = models.capture(Block(function), X)
    module = copy_graph(captured.module)
    canonicalize(module)
    *_, last = (n for n in module.graph.nodes if n.target is F.linear)
    assert describe(last.args[0]) == "mul"
    assert not sites(Block(function), X)[0]
    assert blocks.assert_exact_is_eager(Block(function), X) == []


class Parallel(nn.Module):
    """Branches whose out-projections are one weight that reads them side by side."""

    def __init__(self, function: Callable, width: int = WIDTH + HIDDEN):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.up, self.gate = nn.Linear(WIDTH, HIDDEN).double(), nn.Linear(WIDTH, HIDDEN).double()
        self.fused, self.out = nn.Linear(WIDTH, 2 * HIDDEN).double(), nn.Linear(width, WIDTH).double()

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.out(torch.cat([x.flip(1), F.gelu(m.up(x))], -1)),
        lambda m, x: m.out(torch.cat((F.silu(m.gate(x)) * m.up(x), x.cumsum(1)), dim=2)),
        lambda m, x: m.out(torch.cat([x[..., :2], (lambda g, u: F.silu(g) * u)(*m.fused(x).chunk(2, -1)), x[..., 2:]], -1)),
        lambda m, x: F.linear(torch.cat([torch.softmax(x @ x.mT, -1) @ x, F.dropout(F.relu(m.up(x)), 0.0)], -1), m.out.weight),
    ],
)
def test_a_block_whose_out_projection_is_joined_with_another(function):
    assert "ffn" in blocks.assert_exact_is_eager(Parallel(function), X)
    matches, skipped = sites(Parallel(function), X)
    assert not skipped and [m.capture.width for m in matches if m.pattern.kind == "ffn"] == [HIDDEN]


@pytest.mark.parametrize(
    "function, width",
    [
        (lambda m, x: m.out(torch.cat([(h := m.up(x)).relu(), (-h).relu()], -1)), 2 * HIDDEN),  # one block of both
        (lambda m, x: m.out(torch.cat([F.gelu(m.up(x)), m.gate(x)], 1)), HIDDEN),  # more rows
        (lambda m, x: m.out(h := torch.cat([x, F.gelu(m.up(x))], -1)) + h.sum(), WIDTH + HIDDEN),
    ],
)
def test_other_joined_inputs_stay(function, width):
    matches, _ = sites(Parallel(function, width), X)
    assert not matches


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.5, -1) @ v


class OneLayer(nn.Module):
    """Queries, keys, values and the inside of a gated block made by one layer, and one out-projection for both, or two."""

    def __init__(self, function: Callable):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.fused, self.out = nn.Linear(WIDTH, 3 * WIDTH + 2 * HIDDEN).double(), nn.Linear(WIDTH + HIDDEN, WIDTH).double()
        self.proj, self.down = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(HIDDEN, WIDTH).double()
        self.quarters = nn.Linear(WIDTH, 4 * WIDTH).double()

    def forward(self, x):
        return self.function(self, x)


def _five(m: OneLayer, x: Tensor) -> Tensor:
    q, k, v, gate, up = m.fused(x).split([WIDTH] * 3 + [HIDDEN] * 2, -1)
    return m.out(torch.cat([_attend(q, k, v), F.silu(gate) * up], -1))


def _two(m: OneLayer, x: Tensor) -> Tensor:
    qkv, ff = m.fused(x).split((3 * WIDTH, 2 * HIDDEN), dim=-1)
    gate, up = ff.chunk(2, -1)
    return m.proj(_attend(*qkv.view(*x.shape[:2], 3, WIDTH).unbind(2))) + m.down(up * F.silu(gate))


def _slices(m: OneLayer, x: Tensor) -> Tensor:
    h = m.fused(x)
    q, k, v = h[..., : 3 * WIDTH].chunk(3, -1)
    return m.proj(_attend(q, k, v)) + m.down(F.gelu(h[..., 3 * WIDTH : 3 * WIDTH + HIDDEN]))


def _block_first(m: OneLayer, x: Tensor) -> Tensor:
    gate, up, *qkv = m.fused(x).split([HIDDEN] * 2 + [WIDTH] * 3, -1)
    return m.out(torch.cat([F.silu(gate) * up, _attend(*qkv)], -1))


def _block_around(m: OneLayer, x: Tensor) -> Tensor:
    gate, q, k, v, up = m.fused(x).split([HIDDEN] + [WIDTH] * 3 + [HIDDEN], -1)
    return m.proj(_attend(q, k, v)) + m.down(F.silu(gate) * up)


@pytest.mark.parametrize("function", [_five, _two, _slices, _block_first, _block_around])
def test_one_layer_for_attention_and_a_block(function):
    """The block's in-projection is rows of the layer's weight."""
    matches, skipped = sites(OneLayer(function), X)
    assert sorted(m.pattern.kind for m in matches) == ["attention", "ffn"] and not skipped
    assert sorted(blocks.assert_exact_is_eager(OneLayer(function), X)) == ["attention", "ffn"]


class Adapted(nn.Module):
    """A linear layer and a low-rank branch beside it, with dropout before each of its layers."""

    def __init__(self, base: nn.Linear, before: float = 0.0, between: float = 0.0):
        super().__init__()
        self.base, self.before, self.between = base, before, between
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False).double(), nn.Linear(2, base.out_features).double()

    def forward(self, x):
        return self.base(x) + 0.5 * self.b(F.dropout(self.a(F.dropout(x, self.before)), self.between))


@pytest.mark.parametrize("name", ["fused", "out and down", "all"])
@pytest.mark.parametrize("function", [_five, _two, _slices, _block_first, _block_around])
def test_one_layer_for_attention_and_a_block_with_low_rank_branches(function, name):
    model = OneLayer(function)
    if name != "fused":
        model.out, model.down = Adapted(model.out), Adapted(model.down)
    if name != "out and down":
        model.fused = Adapted(model.fused)
    matches, skipped = sites(model, X)
    assert sorted(m.pattern.kind for m in matches) == ["attention", "ffn"] and not skipped
    assert sorted(blocks.assert_exact_is_eager(model, X)) == ["attention", "ffn"]


@pytest.mark.parametrize("dropout", [{"before": 0.1}, {"between": 0.1}])
def test_dropout_in_the_branch_of_a_joined_out_projection_keeps_it_whole(dropout):
    model = OneLayer(_five)
    model.out = Adapted(model.out, **dropout)
    matches, skipped = sites(model, X)
    assert [m.pattern.kind for m in matches] == ["attention"] and ["cat between" in str(s.reason) for s in skipped] == [True]


def test_one_layer_for_attention_and_a_block_at_symbolic_lengths():
    assert sorted(blocks.assert_exact_at_any_length(OneLayer(_five), X)) == ["attention", "ffn"]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("function", [_five, _two])
def test_a_block_of_one_layer_learns(function, adapted):
    model = OneLayer(function)
    if adapted:
        model.fused = Adapted(model.fused)
    compiled = torch.compile(model, backend="spt", options={**blocks.SPARSE, "require_matches": 1})
    losses = blocks.train_steps(model, compiled, [numbers(4, 16, WIDTH, seed=i) for i in range(4)])
    assert all(map(math.isfinite, losses)) and any("ffn" in name for name in spt_compiler.state_dict(model))


def _read_whole(m: OneLayer, x: Tensor) -> Tensor:
    h = m.fused(x)
    return _attend(*h[..., : 3 * WIDTH].chunk(3, -1)) + m.down(F.gelu(h[..., -HIDDEN:])) + h.sum()


def _overlapping(m: OneLayer, x: Tensor) -> Tensor:
    h = m.fused(x)
    return _attend(*h[..., 2:-HIDDEN].chunk(4, -1)[:3])[..., :WIDTH] + m.down(F.gelu(h[..., -HIDDEN - 2 : -2]))


def _written_part(m: OneLayer, x: Tensor) -> Tensor:
    h = m.fused(x)
    h[..., -1] = 0.0
    return _attend(*h[..., : 3 * WIDTH].chunk(3, -1)) + m.down(F.gelu(h[..., -HIDDEN:]))


def _part_without_grad(m: OneLayer, x: Tensor) -> Tensor:
    h = m.fused(x)
    part = _no_grad(lambda: h[..., -HIDDEN:])
    return _attend(*h[..., : 3 * WIDTH].chunk(3, -1)) + m.down(F.gelu(part))


@pytest.mark.parametrize("function", [_read_whole, _overlapping, _written_part, _part_without_grad])
def test_a_layer_that_is_not_read_by_disjoint_rows_stays_one(function):
    assert "ffn" not in [m.pattern.kind for m in sites(OneLayer(function), X)[0]]
    assert "ffn" not in blocks.assert_exact_is_eager(OneLayer(function), X)


def test_a_gate_on_the_output_of_attention_is_no_block():
    """Its rows stay with those of queries, keys and values: one product."""

    def function(m, x):
        q, k, v, gate = m.quarters(x).chunk(4, -1)
        return m.proj(_attend(q, k, v) * F.silu(gate))

    (captured,) = models.capture(OneLayer(function), X)
    module = copy_graph(captured.module)
    canonicalize(module)
    assert [n.target for n in module.graph.nodes].count(F.linear) == 2
    assert blocks.assert_exact_is_eager(OneLayer(function), X) == ["attention"]


@pytest.mark.parametrize("order", [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_what_is_joined_twice_has_a_weight_in_each_place(order):
    def function(m, x):
        parts = x, F.gelu(m.up(x))
        return m.out(torch.cat([parts[i] for i in order], -1))

    assert blocks.assert_exact_is_eager(Parallel(function, 2 * WIDTH + HIDDEN), X) == ["ffn"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.down.weight @ F.gelu(_no_grad(lambda: m.up.weight @ x.mT)) + x.mT,
        lambda m, x: m.down.weight @ (F.silu(_no_grad(lambda: m.gate.weight @ x.mT)) * (m.up.weight @ x.mT)),
        lambda m, x: m.down(
            (lambda h: F.silu(_no_grad(lambda: h.chunk(2, -1)[0]).squeeze(-1)) * h[..., 1])(m.fused(x).view(2, 5, -1, 2))
        ),
    ],
)
def test_a_part_without_grad_gets_none(function):
    assert blocks.assert_exact_is_eager(Block(function), X) == []


def test_a_weight_that_is_a_vector_is_no_layer():
    assert sites(Block(lambda m, x: F.linear(F.gelu(m.up(x)).mT, m.beta[:5])), X) == ([], [])


def test_dropout_turns_with_the_columns():
    c = only(lambda m, x: m.down.weight @ F.dropout(F.gelu(m.up.weight @ x.mT), 0.3))
    assert c.dropout_p == 0.3 and c.act == "gelu(x0)"
    (captured,) = models.capture(Block(lambda m, x: m.down.weight @ F.dropout(F.gelu(m.up.weight @ x.mT), 0.3)), X)
    module = copy_graph(captured.module)
    canonicalize(module)
    assert [n.target for n in module.graph.nodes].count(F.dropout) == 1  # none is left behind that would draw


@pytest.mark.parametrize(
    "options, between",
    [({}, F.gelu), (dict(groups=2), F.gelu), (dict(stride=2), F.gelu), ({}, nn.BatchNorm1d(HIDDEN).double())],
)
def test_convolutions_are_reported(options, between):
    class Pointwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Conv1d(WIDTH, HIDDEN, 1, **options).double(), nn.Conv1d(HIDDEN, WIDTH, 1).double()
            self.between = between

        def forward(self, x):
            return self.down(self.between(F.gelu(self.up(x))))

    matches, skipped = sites(Pointwise(), numbers(2, WIDTH, 5))
    expected = "batch_norm" if isinstance(between, nn.Module) else "1x1 convolution"
    assert not matches and [expected in str(s.reason) for s in skipped] == ([True] if options.get("groups", 1) == 1 else [])


# ---------------------------------------------------------------------------------------------------------------------
# Random graphs around the pattern
# ---------------------------------------------------------------------------------------------------------------------

STEPS: tuple[Callable[[Block, Tensor], Tensor], ...] = (
    lambda m, h: F.gelu(h),
    lambda m, h: F.relu(h),
    lambda m, h: torch.tanh(h),
    lambda m, h: h * torch.sigmoid(1.702 * h),
    lambda m, h: h * 0.5 + 1.0,
    lambda m, h: h * m.beta,
    lambda m, h: F.prelu(h, m.slope),
    lambda m, h: h.square(),
    lambda m, h: h - h.mean(-1, keepdim=True),
    lambda m, h: m.norm(h),
    lambda m, h: h.view(-1, HIDDEN).view(2, 5, HIDDEN),
    lambda m, h: h.flip(-1),
    lambda m, h: m.square(h),
    lambda m, h: h.float().double(),
    lambda m, h: h.add_(0.25),
    lambda m, h: torch.where(h > 0.3, h, -h),
)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, len(STEPS) - 1), max_size=4), st.sampled_from(["one", "gate", "fused", "stacked"]), st.booleans())
def test_whatever_is_rewritten_computes_the_same(program, form, leak):
    """Hits and near misses alike: a match is right by value (`sites` checks it), and a leak prevents it; the rewritten
    graph equals eager, in its output and in the gradient of the input and of every parameter."""

    def function(m, x):
        if form == "stacked":
            h, up = m.fused(x).view(2, 5, 2, HIDDEN).unbind(-2)
        elif form == "fused":
            h, up = m.fused(x).chunk(2, -1)
        else:
            h, up = m.gate(x), m.up(x) if form == "gate" else None
        h = h if up is None or form == "gate" else h.clone()
        for step in program:
            h = STEPS[step](m, h)
        h = h if up is None else h * up
        return m.down(h) + (h.sum() if leak else 0.0)

    model = Block(function)
    matches, _ = sites(model, X)
    assert not leak or not any(m.output.args[0].name == "h" for m in matches)
    blocks.assert_exact_is_eager(model, X)
