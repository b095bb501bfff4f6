"""Canonical forms: same values, few spellings, and nothing changes the second time."""

from __future__ import annotations

import math
from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from spt_compiler.canonicalize import canonicalize
from spt_compiler.graph import describe
from spt_compiler.rewrite import copy_graph


class Wrapped(nn.Module):
    """A function as a module, with two weights that it may use."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self, *args: Tensor):
        wanted = self.function.__code__.co_varnames[: self.function.__code__.co_argcount]
        extra = {n: getattr(self, n) for n in ("weight", "bias") if n in wanted}
        return self.function(*args, **extra)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def canonical(
    function: Callable, *inputs: Tensor, dynamic: bool | None = None, tolerance: float = 1e-12
) -> fx.GraphModule:
    """The canonical graph of a function, after checking that it computes the same and that a second run changes nothing."""
    model = function if isinstance(function, nn.Module) else Wrapped(function)
    (captured,) = models.capture(model, *inputs, dynamic=dynamic)
    module = copy_graph(captured.module)
    canonicalize(module)
    before = str(module.graph)
    canonicalize(module)
    assert str(module.graph) == before, "canonicalising twice changed something"
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method"):
            assert "example_value" in node.meta or not node.users or "autocast" in node.name, node

    def run(graph: fx.GraphModule) -> tuple:
        torch.manual_seed(0)
        with torch.no_grad():
            fresh = [i.clone() if isinstance(i, Tensor) else i for i in captured.inputs]
            return graph(*fresh)

    for expected, got in zip(run(captured.module), run(module), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        if expected.is_floating_point():
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert torch.equal(got, expected)
    return module


def calls(module: fx.GraphModule) -> list[str]:
    """Names of the calls of a graph, in order."""
    names = [describe(n).strip(".") for n in module.graph.nodes if n.op in ("call_function", "call_method")]
    return [n for n in names if n != "log_api_usage_once"]


Q, K, V = numbers(2, 3, 5, 4), numbers(2, 3, 7, 4, seed=1), numbers(2, 3, 7, 6, seed=2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.exp(input=x),
        lambda x: torch.square(input=x),
        lambda x: torch.permute(input=x, dims=(0, 1, 3, 2)),
        lambda x: torch.reshape(input=x, shape=(6, 5, 4)),
        lambda x: F.dropout(input=x, p=0.5),
        lambda x: torch.full_like(input=x, fill_value=2.0),
        lambda x: F.leaky_relu(input=x, negative_slope=0.1),
    ],
)
def test_a_first_argument_by_its_name_is_placed(function):
    (call,) = (n for n in canonical(function, Q).graph.nodes if n.op == "call_function")
    assert "input" not in call.kwargs and call.args


def test_an_input_that_is_no_first_argument_stays():
    canonical(lambda q: torch.where(condition=q > 0, input=q, other=-q), Q)


def test_operators_that_dynamo_writes_as_methods():
    """As that of torch 2.11 does."""
    (captured,) = models.capture(Wrapped(lambda q: (q == q.abs(), q != 0)), Q)
    module = copy_graph(captured.module)
    methods = {"eq": "__eq__", "ne": "__ne__", "abs": "__abs__"}
    for node in module.graph.nodes:
        if describe(node).strip(".") in methods:
            node.op, node.target = "call_method", methods[describe(node).strip(".")]
    assert [n.target for n in module.graph.nodes if n.op == "call_method"] == ["__abs__", "__eq__", "__ne__"]
    canonicalize(module)
    assert calls(module) == ["abs", "eq", "ne"] and not any(n.op == "call_method" for n in module.graph.nodes)


# ---------------------------------------------------------------------------------------------------------------------
# One spelling
# ---------------------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "products": [
        lambda q, k: q @ k.transpose(-1, -2),
        lambda q, k: torch.matmul(q, k.mT),
        lambda q, k: q.matmul(k.permute(0, 1, 3, 2)),
        lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
        lambda q, k: torch.einsum("...qd,...kd->...qk", q, k),
        lambda q, k: torch.einsum("bhqd, bhkd -> bhqk", [q, k]),
        lambda q, k: torch.matmul(q, torch.swapaxes(k, 2, 3)),
        lambda q, k: q @ k.movedim(-1, -2),
    ],
    "softmax": [
        lambda q, k: F.softmax(q, -1),
        lambda q, k: q.softmax(dim=3),
        lambda q, k: torch.softmax(q, -1),
        lambda q, k: nn.functional.softmax(q, dim=-1, dtype=torch.float64),
        lambda q, k: F.softmax(q.double(), dim=3, _stacklevel=5),
        lambda q, k: F.softmax(q - q.max(-1, keepdim=True).values, -1),
        lambda q, k: F.softmax(q - q.amax(dim=-1, keepdim=True).detach(), -1),
        lambda q, k: nn.Softmax(dim=-1)(q),
    ],
    "masked_fill": [
        lambda q, k: q.masked_fill(q > 0, -1e9),
        lambda q, k: torch.masked_fill(q, q > 0, -1e9),
        lambda q, k: torch.where(q > 0, -1e9, q),
        lambda q, k: torch.where(torch.gt(q, 0), torch.tensor(-1e9, dtype=torch.float64), q),
        lambda q, k: q.masked_fill(q.gt(0), torch.tensor(-1e9)),
        lambda q, k: q.masked_fill(q > 0, value=-1e9),
    ],
    "broadcasting": [
        lambda q, k: q.masked_fill((k[:, :1, :1] > 0)[..., :1], -1e9) + k[0, 0, :5],
        lambda q, k: q.masked_fill((k[:, :1, :1] > 0)[..., :1].expand_as(q), -1e9) + k[0, 0, :5].expand(2, 3, 5, 4),
        lambda q, k: q.masked_fill((k[:, :1, :1] > 0)[..., :1].broadcast_to(q.shape), -1e9) + k[0, 0, :5].expand_as(q),
    ],
    "scaling": [
        lambda q, k: q / 8,
        lambda q, k: q.div(8.0),
        lambda q, k: torch.div(q, 8.0),
        lambda q, k: q * 0.125,
        lambda q, k: q.mul(0.125),
        lambda q, k: torch.multiply(q, 0.125),
        lambda q, k: q / torch.tensor(64.0).sqrt(),
        lambda q, k: torch.true_divide(q, math.sqrt(64)),
    ],
    "dropout": [
        lambda q, k: F.dropout(q, 0.5),
        lambda q, k: F.dropout(q, p=0.5, training=True, inplace=False),
        lambda q, k: nn.Dropout(0.5)(q),
        lambda q, k: torch.dropout(q, 0.5, True),
    ],
    "gelu": [lambda q, k: F.gelu(q), lambda q, k: nn.GELU()(q), lambda q, k: F.gelu(q, approximate="none")],
    "attention": [
        lambda q, k: F.scaled_dot_product_attention(q, k, k),
        lambda q, k: F.scaled_dot_product_attention(query=q, key=k, value=k, attn_mask=None, dropout_p=0.0),
        lambda q, k: F.scaled_dot_product_attention(q, k, k, None, 0.0, False, scale=None),
    ],
    "pieces": [
        lambda q, k: q.tensor_split(2, 2)[1] * 2.0,
        lambda q, k: q.dsplit((3,))[1] * 2.0,
        lambda q, k: torch.dsplit(q, [3])[1] * 2.0,
    ],
    "rows": [
        lambda q, k: q.tensor_split(2, 0)[1] * 2.0,
        lambda q, k: q.vsplit(2)[1] * 2.0,
        lambda q, k: torch.vsplit(q, [1])[1] * 2.0,
    ],
    "columns": [lambda q, k: q.tensor_split(3, 1)[2] * 2.0, lambda q, k: torch.hsplit(q, 3)[2] * 2.0],
    "joined": [
        lambda q, k: torch.cat([q, k], 2) * 2.0,
        lambda q, k: torch.cat((q, k), dim=-2) * 2.0,
        lambda q, k: torch.concat([q, k], dim=2) * 2.0,
        lambda q, k: torch.concatenate([q, k], -2) * 2.0,
        lambda q, k: torch.dstack([q, k]) * 2.0,
    ],
    "layout": [
        lambda q, k: q.view(6, 5, 4) * 2.0,
        lambda q, k: q.reshape(-1, 5, 4) * 2.0,
        lambda q, k: q.flatten(0, 1) * 2.0,
        lambda q, k: q.flatten(0, 1).unflatten(0, (2, 3)).flatten(0, 1) * 2.0,
        lambda q, k: torch.flatten(q, 0, 1).contiguous().view(6, 5, 4) * 2.0,
        lambda q, k: q[:, :, None].reshape(6, 5, 4) * 2.0,
        lambda q, k: q.unsqueeze(-1).view(6, 5, 4) * 2.0,
        lambda q, k: q.transpose(1, 2).transpose(2, 1).reshape(6, 5, 4).to(torch.float64) * 2.0,
    ],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_spelling_each(name):
    """All ways to write the same thing give the same calls."""
    forms = {}
    for i, function in enumerate(SPELLINGS[name]):
        module = canonical(function, Q, K)
        forms.setdefault(tuple(calls(module)), []).append(i)
    assert len(forms) == 1, forms


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: F.linear(x, weight),
        lambda x, weight: x @ weight.T,
        lambda x, weight: torch.matmul(x, weight.t()),
        lambda x, weight: x.matmul(weight.transpose(0, 1)),
        lambda x, weight: F.linear(x.view(-1, 4), weight).view(2, 3, 6),
        lambda x, weight: torch.mm(x.view(-1, 4), weight.t()).view(2, 3, 6),
        lambda x, weight: torch.inner(x, weight),
        lambda x, weight: x.inner(other=weight),
    ],
)
def test_a_product_with_a_weight_is_linear(function):
    assert calls(canonical(function, numbers(2, 3, 4))) == ["linear"]


def test_conv1d_is_linear():
    """addmm with a weight stored (in, out), as GPT-2 has it, becomes a linear layer on a transposed weight."""

    def function(x, weight, bias):
        return torch.addmm(bias, x.view(-1, 6), weight).view(2, 3, 4)

    model = Wrapped(function)
    model.bias = nn.Parameter(numbers(4))
    module = canonical(model, numbers(2, 3, 6))
    assert calls(module) == ["t", "linear"]


def test_a_bias_joins_its_linear():
    assert calls(canonical(lambda x, weight, bias: x @ weight.T + bias, numbers(2, 3, 4))) == ["linear"]
    # ... but a vector that is no parameter of the model stays an addition.
    assert calls(canonical(lambda x, b, weight: x @ weight.T + b, numbers(2, 3, 4), numbers(6))) == ["linear", "add"]


@pytest.mark.parametrize(
    ("equation", "a", "b"),
    [
        ("ibnd,jbnd->bnij", (5, 2, 3, 4), (7, 2, 3, 4)),
        ("bnij,jbnd->ibnd", (2, 3, 5, 7), (7, 2, 3, 4)),
        ("bhqd,bkd->bhqk", (2, 3, 5, 4), (2, 7, 4)),
        ("bhkd,bhqd->bhqk", (2, 3, 7, 4), (2, 3, 5, 4)),
        ("qd,kd->qk", (5, 4), (7, 4)),
        ("rinhd,rjnhd->hnij", (2, 5, 2, 3, 4), (2, 7, 2, 3, 4)),
        ("bqhd,bkhd->bqk", (2, 5, 3, 4), (2, 7, 3, 4)),
    ],
)
def test_einsum_with_sums_is_a_product(equation, a, b):
    module = canonical(lambda x, y: torch.einsum(equation, x, y), numbers(*a), numbers(*b, seed=1))
    assert "matmul" in calls(module) and "einsum" not in calls(module)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bij->b", [(2, 3, 4)] * 2),
        ("bij,bjk->bk", [(2, 3, 3)] * 2),
        ("ij,jk,kl->il", [(3, 3)] * 3),
        ("ii->i", [(3, 3)]),
        ("bij->b", [(2, 3, 4)]),
        ("bthd,bshd->bts", [(2, 5, 1, 4), (2, 3, 4, 1)]),  # sizes of one that are broadcast against each other
    ],
)
def test_other_einsums_stay(equation, shapes):
    module = canonical(lambda *x: torch.einsum(equation, *x), *(numbers(*s, seed=i) for i, s in enumerate(shapes)))
    assert calls(module) == ["einsum"]


@pytest.mark.parametrize(
    "equation, shape",
    [("btc,fc->btf", (6, 4)), ("btc,hcd->bthd", (3, 4, 2)), ("btc,hdc->bthd", (3, 2, 4)), ("...c,gcf->g...f", (2, 4, 3))],
)
def test_einsum_with_a_weight_is_linear(equation, shape):
    module = canonical(lambda x, weight: torch.einsum(equation, x, weight.view(*shape)), numbers(2, 5, 4))
    assert "linear" in calls(module) and not {"einsum", "matmul"} & set(calls(module))


def test_einsum_with_a_weight_that_sums_heads_is_linear():
    module = canonical(lambda x, weight: torch.einsum("bthd,ehd->bte", x, weight.view(6, 2, 2)), numbers(2, 5, 2, 2))
    assert "linear" in calls(module) and not {"einsum", "matmul"} & set(calls(module))


def test_einsum_whose_features_do_not_come_last_stays_a_product():
    """The weight may be learned queries."""
    module = canonical(lambda x, weight: torch.einsum("qd,bkd->bqk", weight, x), numbers(2, 5, 4))
    assert "matmul" in calls(module)


@pytest.mark.parametrize("dims", [1, ([2], [0]), ([-1], [0]), ([1], [1])])
def test_tensordot_is_a_product(dims):
    a, b = numbers(2, 5, 4), numbers(4, 5, seed=1)
    assert "matmul" in calls(canonical(lambda x, y: torch.tensordot(x, y, dims=dims), a, b))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (x.unsqueeze(2) * y.unsqueeze(1)).sum(2),  # of no dim that both have
        lambda x, y: (x.unsqueeze(2) * y.unsqueeze(1)).sum(-1, keepdim=True),
        lambda x, y: ((p := x.unsqueeze(2) * y.unsqueeze(1)).sum(-1), p),
        lambda x, y: (x * y[:, :5]).sum(-1),
        lambda x, y: (x.unsqueeze(2) * y.unsqueeze(1)).sum((1, 3)),
    ],
)
def test_other_sums_of_products_stay(function):
    assert "sum" in calls(canonical(function, numbers(2, 5, 4), numbers(2, 7, 4, seed=1)))


def test_baddbmm_is_a_product_and_a_sum():
    a, b, bias = numbers(6, 5, 4), numbers(6, 4, 7, seed=1), numbers(6, 1, 7, seed=2)
    assert calls(canonical(lambda x, y, z: torch.baddbmm(z, x, y, beta=1.0, alpha=0.5), a, b, bias)) == [
        "matmul",
        "mul",
        "add",
    ]
    assert calls(canonical(lambda x, y, z: z.baddbmm(x, y, beta=2.0, alpha=1), a, b, bias)) == ["matmul", "mul", "add"]
    # beta = 0 ignores the first argument, even if it holds NaN.
    nan = torch.full((6, 5, 7), math.nan, dtype=torch.float64)
    assert "add" not in calls(canonical(lambda x, y, z: torch.baddbmm(z, x, y, beta=0, alpha=0.5), a, b, nan))


# ---------------------------------------------------------------------------------------------------------------------
# What goes away, and what may not
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.0),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: x.to(torch.float64),
        lambda x: x.double(),
        lambda x: x.contiguous(),
        lambda x: x.view(2, 3, 5, 4),
        lambda x: x.transpose(0, 1).transpose(0, 1),
        lambda x: x.type_as(x),
    ],
)
def test_no_ops_go_away(function):
    assert calls(canonical(lambda x: function(x * 2.0) * 3.0, Q)) == ["mul", "mul"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.select(2, 1),
        lambda x: torch.select(x, -2, 1),
        lambda x: x.chunk(5, 2)[1].squeeze(2),
        lambda x: torch.split(x, 1, dim=-2)[1][:, :, 0],
        lambda x: x[:, :, 1:2].squeeze(-2),
        lambda x: x.narrow(2, 1, 1)[..., 0, :],
        lambda x: x.movedim(2, 0)[1],
        lambda x: x.permute(2, 0, 1, 3).unbind(0)[1],
        lambda x: x.permute(0, 1, 3, 2)[..., 1],
    ],
)
def test_one_of_a_dim_is_an_index(function):
    (call,) = (n for n in canonical(function, Q).graph.nodes if n.op == "call_function")
    assert describe(call) == "getitem" and call.args[0].op == "placeholder"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.permute(2, 1, 0, 3)[1],  # what is left changes its order
        lambda x: x.chunk(2, 2)[1].squeeze(2),
        lambda x: x.chunk(5, 2)[1].squeeze(),
        lambda x: x[:, :1].squeeze(2),
        lambda x: x.permute(2, 0, 1, 3)[torch.tensor([1])],
        lambda x: x.permute(2, 0, 1, 3)[1, 0],
        lambda x: x.permute(2, 0, 1, 3)[None],
        lambda x: x.narrow(2, 1, 1)[..., 0],
        lambda x: x.sum().squeeze(0) * (x.mean() * 2.0).sum(0),  # numbers have no dims
        lambda x: torch.split(tensor=x, split_size_or_sections=1, dim=2)[1].squeeze(2),
    ],
)
def test_other_pieces_stay(function):
    assert len(calls(canonical(function, Q))) > 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.cat([x, y], 2).chunk(2, 2)[1],
        lambda x, y: torch.cat([x, x, y], -2)[:, :, -5:],
        lambda x, y: torch.hstack([x, y])[:, 3:],
        lambda x, y: torch.cat([x, y]).tensor_split(2)[1],
        lambda x, y: torch.cat([torch.cat([x, y], 1), x], 1).narrow(1, 3, 3),
        lambda x, y: torch.stack([x, y])[1],
        lambda x, y: torch.stack([x, y], -1)[..., -1],
        lambda x, y: torch.stack([x, y], dim=1).unbind(1)[1],
        lambda x, y: torch.stack([x, y], 2).chunk(2, 2)[1].squeeze(2),
    ],
)
def test_a_part_of_what_is_joined_is_the_part(function):
    module = canonical(lambda x, y: function(x, y) * 2.0, Q, numbers(2, 3, 5, 4, seed=1))
    (call,) = (n for n in module.graph.nodes if n.op == "call_function")
    assert describe(call) == "mul" and call.args[0].op == "placeholder"


def test_a_slice_of_one_part_of_what_is_joined_is_a_slice_of_that():
    assert calls(canonical(lambda x, y: torch.cat([x, y], 2)[:, :, 6:8] * 2.0, Q, Q + 1.0)) == ["getitem", "mul"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.cat([x, y], 2)[:, :, 4:7],  # of both
        lambda x, y: torch.cat([x, y], 2)[:, :, ::2],
        lambda x, y: torch.cat([x, y], 2).chunk(2, 1)[1],  # along another dim
        lambda x, y: torch.stack([x, y])[:, 1],
        lambda x, y: torch.stack([x, y])[:1],
        lambda x, y: torch.cat([x.float(), y], 2)[:, :, :5],  # of another type
    ],
)
def test_other_parts_of_what_is_joined_stay(function):
    assert {"cat", "stack"} & set(calls(canonical(function, Q, numbers(2, 3, 5, 4, seed=1))))


def test_a_returned_part_of_what_is_joined_keeps_its_strides():
    (part,) = canonical(lambda x, y: torch.cat([x, y]).chunk(2)[0], Q.mT, Q.mT)(Q.mT, Q.mT)
    assert part.is_contiguous()


def test_a_part_of_what_is_joined_and_written_holds_the_write():
    def function(x, y):
        joined = torch.cat([x, y], 2)
        first = joined[:, :, :5]
        joined[:, :, 2] = 7.0
        return first * 2.0, joined[:, :, 5:] * 1.0

    canonical(function, Q, Q + 1.0)


@pytest.mark.parametrize(
    "view",
    [
        lambda h: h.view(2, 3, 5, 4),
        lambda h: torch.cat([h, h * 2.0], 1)[:, :3],
        lambda h: torch.stack([h, h])[1],
        lambda h: h.chunk(2, -1)[1],
        lambda h: h[..., 1:2],
        lambda h: h.permute(2, 0, 1, 3),
        lambda h: h.view(6, 5, 4),
        lambda h: h.unsqueeze(1),
        lambda h: h[:, :1].expand(2, 3, 5, 4),
    ],
)
@pytest.mark.parametrize(
    "behind", [lambda v: v.squeeze(-1), lambda v: v[0], lambda v: v.mT, lambda v: v.reshape(2, -1), lambda v: v.squeeze(1)]
)
def test_what_is_viewed_without_grad_gets_none(view, behind):
    def function(x):
        h = torch.tanh(x)
        with torch.no_grad():
            seen = view(h)
        return behind(seen) * 2.0 + h.sum(), h * behind(seen).mean()

    (captured,) = models.capture(function, Q.clone().requires_grad_())
    module = copy_graph(captured.module)
    canonicalize(module)
    found = []
    for call in (function, module):
        x = Q.clone().requires_grad_()
        sum(o.sum() for o in call(x)).backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_a_returned_no_op_stays_a_tensor_of_its_own():
    """Returning x and x.view(same) gives two tensors; an alias in their place would change what a caller's write does."""
    module = canonical(lambda x: ((y := x * 2.0), y.view(2, 3, 5, 4)), Q)
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    assert len(set(output.args[0])) == 2


@pytest.mark.parametrize(
    ("inner", "outer", "gone"),
    [
        (torch.float64, torch.float32, True),
        (torch.float16, torch.float32, False),
        (torch.bfloat16, torch.float16, False),
    ],
)
def test_there_and_back_through_a_wider_type(inner, outer, gone):
    x = numbers(3, 4, dtype=outer)
    module = canonical(lambda x: (x * 2.0).to(inner).to(outer) * 3.0, x, tolerance=1e-6)
    assert ("to" in calls(module)) is not gone


def test_an_expand_that_makes_the_shape_stays():
    assert "expand" in calls(canonical(lambda q: q[:, :1].expand(2, 3, 5, 4) * q[:1, :1], Q))


def test_division_that_is_no_exact_product_stays():
    assert calls(canonical(lambda x: x / 3.0, Q)) == ["truediv"]
    assert calls(canonical(lambda x: x / -0.5, Q)) == ["mul"]


def test_numbers_alone_are_left_to_torch():
    """where(mask, 0-d, number) has torch's default dtype if all its numbers are folded: it must not be."""
    zero = torch.zeros((), dtype=torch.float16)
    module = canonical(lambda x: torch.where(x > 0, torch.zeros((), dtype=torch.float16), -1.0), Q, tolerance=1e-3)
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    assert output.args[0][0].meta["example_value"].dtype == zero.dtype


def test_symbolic_sizes_stay_symbolic():
    """One dynamic graph serves two sizes after canonicalisation: nothing was burnt in, no guard was added."""

    def function(q, k):
        b, h, t, d = q.shape
        scores = torch.bmm(q.reshape(b * h, t, d), k.reshape(b * h, -1, d).transpose(1, 2))
        p = scores.view(b, h, t, -1).softmax(-1)
        return torch.bmm(p.view(b * h, t, -1), k.reshape(b * h, -1, d)).view(b, h, t, d)

    compiled = []

    def backend(module, _):
        module = copy_graph(module)
        canonicalize(module)
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    fast = torch.compile(function, backend=backend, dynamic=True)
    for sizes in ((2, 3, 5, 7, 4), (3, 2, 9, 4, 8)):
        b, h, t, s, d = sizes
        q, k = numbers(b, h, t, d), numbers(b, h, s, d, seed=1)
        torch.testing.assert_close(fast(q, k), function(q, k))
    assert len(compiled) == 1
    (softmax,) = (n for n in compiled[0].graph.nodes if n.target is F.softmax)
    assert softmax.meta["example_value"].dim() == 4 and softmax.args[0].target is torch.matmul


# ---------------------------------------------------------------------------------------------------------------------
# Around a softmax
# ---------------------------------------------------------------------------------------------------------------------


def old_bart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """3-d products, a 4-d mask, a 3-d softmax."""
    b, h, t, d = q.shape
    q3, k3, v3 = q.reshape(b * h, t, d), k.reshape(b * h, -1, d), v.reshape(b * h, 7, -1)
    scores = torch.bmm(q3, k3.transpose(1, 2)).view(b, h, t, 7) + mask
    p = F.softmax(scores.view(b * h, t, 7), -1)
    p = F.dropout(p.view(b, h, t, 7), 0.25).view(b * h, t, 7)
    return torch.bmm(p, v3).view(b, h, t, -1)


ALIBI = numbers(6, 1, 7, seed=9)


def bloom(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A bias of batch * heads inside of baddbmm, a 4-d mask outside."""
    b, h, t, d = q.shape
    scores = ALIBI.baddbmm(q.reshape(b * h, t, d), k.reshape(b * h, 7, d).mT, beta=1.0, alpha=0.5).view(b, h, t, 7)
    p = F.softmax(scores + mask, -1).view(b * h, t, 7)
    return torch.bmm(p, v.reshape(b * h, 7, -1)).view(b, h, t, -1)


def swin(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Windows split off the batch for their mask, and folded back."""
    scores = q @ k.transpose(-1, -2)
    scores = scores.view(1, 2, 3, 5, 7) + mask.view(1, 1, 1, 5, 7)
    return F.softmax(scores.view(2, 3, 5, 7), -1) @ v


@pytest.mark.parametrize("function", [old_bart, bloom, swin])
@pytest.mark.parametrize("dynamic", [None, True])
def test_layout_moves_out_of_the_scores(function, dynamic):
    """Between the two products nothing changes shape any more, and the products have the rank of the masks."""
    mask = torch.zeros(1, 1, 5, 7, dtype=torch.float64).masked_fill(torch.ones(5, 7).triu(1).bool(), -1e9)
    if dynamic and function is not old_bart:
        pytest.skip("written with fixed sizes")
    module = canonical(function, Q, K, V, mask, dynamic=dynamic)
    names = calls(module)
    first, last = names.index("matmul"), len(names) - 1 - names[::-1].index("matmul")
    between = set(names[first:last]) - {"sym_size", "size", "getitem"}
    if not dynamic:
        scores = between - {"reshape"}
        assert {"softmax"} <= scores
        (softmax,) = (n for n in module.graph.nodes if n.target is F.softmax)
        products = [n for n in module.graph.nodes if n.target is torch.matmul]
        assert {p.meta["example_value"].dim() for p in products} == {softmax.meta["example_value"].dim()} != {3}


def test_a_factor_per_row_moves_to_the_queries():
    """Learned or per-head temperatures scale the queries instead: the scores keep one plain scale."""
    tau = numbers(3, 1, 1, seed=5)
    module = canonical(lambda q, k, t: F.softmax((q @ k.mT) * t, -1) @ k, Q, K, tau)
    assert calls(module) == ["mul", "permute", "matmul", "softmax", "matmul"] or calls(module)[-3:] == [
        "matmul",
        "softmax",
        "matmul",
    ]
    # A factor that varies over the keys cannot move.
    module = canonical(lambda q, k, t: F.softmax((q @ k.mT) * t, -1) @ k, Q, K, numbers(5, 7))
    assert calls(module)[-3:] == ["mul", "softmax", "matmul"]


def test_a_fill_beside_an_additive_mask_is_an_addition():
    """With both kinds in one chain a fully masked row depends on both; x + c is what the fill is, for an absorbing c."""
    low = torch.finfo(torch.float32).min
    q, k = (numbers(2, 3, 6, 4, dtype=torch.float32, seed=i) for i in range(2))
    padding = torch.zeros(2, 1, 1, 6).masked_fill(torch.arange(6) < 3, low)

    def function(q, k, padding):
        hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
        return F.softmax((q @ k.mT).masked_fill(hidden, low) + padding, -1) @ k

    module = canonical(function, q, k, padding, tolerance=1e-6)
    assert "masked_fill" not in calls(module)
    # After the other it fills that one: two numbers of that size would add up to -inf.
    module = canonical(
        lambda q, k, p: F.softmax((q @ k.mT + p).masked_fill(torch.ones(6, 6).triu(0).bool(), low), -1) @ k,
        *(q, k, padding),
        tolerance=1e-6,
    )
    assert calls(module)[-4:] == ["masked_fill", "add", "softmax", "matmul"]
    # Also where that one is subtracted: the distances of ALiBi.
    module = canonical(
        lambda q, k, p: F.softmax((q @ k.mT - p * -1.0).masked_fill(torch.ones(6, 6).triu(0).bool(), low), -1) @ k,
        *(q, k, padding),
        tolerance=1e-6,
    )
    assert calls(module)[-4:] == ["masked_fill", "add", "softmax", "matmul"]
    # Alone, it stays a mask.
    module = canonical(
        lambda q, k: F.softmax((q @ k.mT).masked_fill(torch.ones(6, 6).triu(1).bool(), low), -1) @ k,
        q,
        k,
        tolerance=1e-6,
    )
    assert "masked_fill" in calls(module)


def test_transposed_probabilities_move_to_the_left():
    module = canonical(lambda q, k, v: v.mT @ F.softmax(q @ k.mT, -1).mT, Q, K, V)
    products = [n for n in module.graph.nodes if n.target is torch.matmul]
    assert products[1].args[0].target is F.softmax


# ---------------------------------------------------------------------------------------------------------------------
# In place
# ---------------------------------------------------------------------------------------------------------------------


def augmented(x: Tensor) -> Tensor:
    y = x * 2.0
    y += 1.0
    y *= x
    return y


def statement(x: Tensor) -> Tensor:
    """The result of the call is ignored, the tensor is used on."""
    y = x * 2.0
    y.masked_fill_(x > 0, -1.0)
    return y * 3.0


def flagged(x: Tensor) -> Tensor:
    return F.relu(x * 2.0, inplace=True) + F.silu(x * 3.0, True)


@pytest.mark.parametrize("function", [augmented, statement, flagged])
def test_writes_that_nobody_else_sees_become_functional(function):
    names = {n.target for n in canonical(function, Q).graph.nodes if n.op in ("call_function", "call_method")}
    assert not any(
        str(getattr(n, "__name__", n)).endswith("_") or str(getattr(n, "__name__", n)).startswith("i") for n in names
    )


def test_what_nobody_reads_goes_unless_it_writes():
    def function(x):
        (x * 3.0).mean(-1)[..., None].expand(2, 3, 5, 4)
        y = torch.zeros_like(x)
        torch.add(x, 1.0, out=y)
        return y * 2.0

    names = calls(canonical(function, Q))
    assert "add" in names and not {"mean", "expand"} & set(names), names


def through_a_view(x: Tensor) -> Tensor:
    y = x * 2.0
    view = y.view(-1)
    y += 1.0
    return view * 3.0


def of_a_view(x: Tensor) -> Tensor:
    y = x * 2.0
    y[0].mul_(5.0)
    return y * 3.0


def of_an_input(x: Tensor) -> Tensor:
    x.mul_(2.0)
    return x + 1.0


def of_a_cast(x: Tensor) -> Tensor:
    """In-place keeps float32; the functional call would give float64."""
    y = x.float() * 2.0
    y += x
    return y * 3.0


@pytest.mark.parametrize("function", [through_a_view, of_a_view, of_an_input, of_a_cast])
def test_writes_that_show_stay(function):
    before = {"iadd", "mul_", "imul"}
    module = canonical(function, Q, tolerance=1e-6)
    assert before & {str(getattr(n.target, "__name__", n.target)) for n in module.graph.nodes}


def test_nothing_moves_over_a_write():
    """A no-op that reads memory before it is overwritten must not be replaced by what reads it afterwards."""

    def function(x):
        y = x * 2.0
        before = y.reshape(-1).reshape(2, 3, 5, 4)
        y[0] = 7.0
        return before * 1.0, y * 1.0

    canonical(function, Q)


# ---------------------------------------------------------------------------------------------------------------------
# Opaque calls
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **options)

    def forward(self, x: Tensor, **how):
        return self.attention(x, x, x, **how)[0]


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention_is_opened(weights, masked):
    torch.manual_seed(0)
    mask = torch.ones(5, 5).triu(1).bool() if masked else None
    model = Attention(dropout=0.3)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x, need_weights=weights, attn_mask=mask)

    names = calls(canonical(Call(), numbers(2, 5, 8)))
    assert "multi_head_attention_forward" not in names
    assert ("softmax" in names) if weights else ("scaled_dot_product_attention" in names)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_multihead_attention_of_symbolic_sizes_is_opened(weights, options):
    """Any training with batches of other sizes comes to this."""
    torch.manual_seed(0)

    class Call(Attention):
        def forward(self, x):
            return self.attention(x, x, x, need_weights=weights)[0]

    names = calls(canonical(Call(**options), numbers(2, 5, 8), dynamic=True))
    assert "multi_head_attention_forward" not in names
    assert ("softmax" in names) if weights else ("scaled_dot_product_attention" in names)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_inference_only_encoder_layer_is_opened(norm_first, activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, activation=activation).eval()
    with torch.no_grad():
        names = calls(canonical(layer, numbers(2, 5, 8, dtype=torch.float32), tolerance=1e-5))
    assert "scaled_dot_product_attention" in names and names.count("linear") == 4


def _tanh_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _slope(x: Tensor) -> Tensor:
    t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)


class TanhGelu(torch.autograd.Function):
    """An activation with a backward of its own, as Bloom has it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _tanh_gelu(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * _slope(ctx.saved_tensors[0])


class Straight(TanhGelu):
    """The same forward with a straight-through backward: not the derivative, so it must stay."""

    @staticmethod
    def backward(ctx, grad):
        return grad


class Clipped(TanhGelu):
    """The derivative as long as gradients are small."""

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-2.0, 2.0) * _slope(ctx.saved_tensors[0])


class BiasGelu(torch.autograd.Function):
    """An activation of a sum, with the gradients of both parts, as Megatron has it."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return _tanh_gelu(x + bias)

    @staticmethod
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        grad = grad * _slope(x + bias)
        return grad, grad.sum((0, 1))


class HalfBias(BiasGelu):
    """The gradient of the bias is not the sum over the rows."""

    @staticmethod
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        grad = grad * _slope(x + bias)
        return grad, grad.sum((0, 1)) * 0.5


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(("function", "opened"), [(TanhGelu, True), (Straight, False), (Clipped, False)])
def test_an_activation_with_a_backward_of_its_own(function, opened, dynamic):
    x = numbers(2, 3, 4).requires_grad_()
    names = calls(canonical(lambda x: function.apply(x) * 2.0, x, tolerance=1e-7, dynamic=dynamic))
    assert ("gelu" in names) is opened and ("autograd_function_apply" in names) is not opened


@pytest.mark.parametrize(("function", "opened"), [(BiasGelu, True), (HalfBias, False)])
def test_an_activation_of_a_sum_with_a_backward_of_its_own(function, opened):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(numbers(4, seed=1))

        def forward(self, x):
            return function.apply(x, self.bias) * 2.0

    names = calls(canonical(Layer(), numbers(2, 3, 4).requires_grad_(), tolerance=1e-7))
    assert ("gelu" in names) is opened and ("autograd_function_apply" in names) is not opened


# ---------------------------------------------------------------------------------------------------------------------
# Modes and metadata
# ---------------------------------------------------------------------------------------------------------------------


def test_work_stays_in_its_mode():
    """A reshape outside of an autocast region does not pull the product out of it."""

    def function(q, k):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = torch.bmm(q.reshape(6, 5, 4), k.reshape(6, 7, 4).transpose(1, 2))
        return scores.view(2, 3, 5, 7).float().softmax(-1) @ k

    module = canonical(function, Q.float(), K.float(), tolerance=1e-6)
    product = next(n for n in module.graph.nodes if n.target is torch.matmul)
    assert product.meta["example_value"].dtype == torch.bfloat16


def test_new_nodes_know_their_origin():
    class Inner(nn.Module):
        def forward(self, q, k):
            return torch.einsum("bhqd,bhkd->bhqk", q, k)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, q, k):
            return self.inner(q, k) * 2.0

    module = canonical(Outer(), Q, K)
    product = next(n for n in module.graph.nodes if n.target is torch.matmul)
    assert "test_canonicalize" in product.meta["stack_trace"]
    assert any("inner" in str(v[0]) for v in product.meta["nn_module_stack"].values())
    assert product.meta["example_value"].shape == (2, 3, 5, 7)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_real_models_keep_their_values(name):
    model = models.build(name, "eager", layers=1, zero_dropout=True)
    for captured in models.capture(model, **models.inputs(name)):
        module = copy_graph(captured.module)
        canonicalize(module)
        text = str(module.graph)
        canonicalize(module)
        assert str(module.graph) == text
        with torch.no_grad():
            pairs = zip(captured.module(*captured.inputs), module(*captured.inputs), strict=True)
            for expected, got in pairs:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Random programs
# ---------------------------------------------------------------------------------------------------------------------

STEPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: x * 0.5,
    lambda x, y: x / 4,
    lambda x, y: x.add(y, alpha=0.25) if x.shape == y.shape else x + 1.0,
    lambda x, y: torch.rsub(x, 1.0),
    lambda x, y: x.transpose(-1, -2),
    lambda x, y: x.permute(*range(x.dim() - 2), -1, -2),
    lambda x, y: x.reshape(-1, *x.shape[-2:]),
    lambda x, y: x.reshape(2, -1, *x.shape[-2:]),
    lambda x, y: x.contiguous(),
    lambda x, y: x.softmax(-1),
    lambda x, y: F.softmax(x, dim=x.dim() - 2),
    lambda x, y: x.masked_fill(x > 0.5, -1e30),
    lambda x, y: torch.where(x > 0, x, -1.0),
    lambda x, y: x @ y.reshape(-1, 16)[:, : x.shape[-1]].mT if y.numel() else x,
    lambda x, y: torch.tanh(x) * 3.0,
    lambda x, y: x.float().double(),
    lambda x, y: x.clamp_min(-2.0),
    lambda x, y: x.mul_(0.5) if x.dim() == 3 else x.mul(0.5),
    lambda x, y: x.relu_() if x.dim() == 4 else F.relu(x),
]


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, len(STEPS) - 1), min_size=2, max_size=8), st.booleans())
def test_random_programs_keep_their_values(program, keep):
    """Any sequence of steps, writes included, computes the same afterwards; `keep` also returns a value on the way."""

    class Program(nn.Module):
        def forward(self, x: Tensor, y: Tensor):
            x = x * 1.5
            middle = x
            for i, step in enumerate(program):
                x = STEPS[step](x, y)
                if i == len(program) // 2:
                    middle = x
            return (x, middle * 1.0) if keep else (x,)

    canonical(Program(), numbers(2, 2, 4, 4), numbers(2, 2, 4, 4, seed=1), tolerance=1e-9)
