"""Elements of tensors as expressions: every rule by value, and what must not be lifted."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
from torch import Tensor

from spt_compiler.canonicalize import canonicalize
from spt_compiler.expression import evaluate, parse, var
from spt_compiler.lifting import Builder, Lifter, NotLifted, renamed
from spt_compiler.rewrite import copy_graph
from spt_compiler.scope import Scope

B, T, S = 3, 5, 7  # batch, queries, keys


def lifted(function: Callable[..., Tensor], *inputs: Tensor, dynamic: bool | None = None) -> str:
    """Text of the element b, q, k of what `function` returns, checked entry by entry."""
    (captured,) = models.capture(function, *inputs, dynamic=dynamic)
    module = copy_graph(captured.module)
    canonicalize(module)
    computed = models.values(captured, module)
    (node,) = module.graph.output_node().args[0]
    sizes = computed[node].shape
    lifter = Lifter({"q": None if dynamic else sizes[-2], "k": None if dynamic else sizes[-1]})
    names = [var(n) for n in "bqk"[-len(sizes) :]]
    (expr,), tensors = renamed(lifter, [lifter.element(Scope(module, captured.inputs), node, tuple(names))])
    grid = torch.meshgrid(*(torch.arange(s) for s in sizes), indexing="ij")
    env = dict(zip("bqk"[-len(sizes) :], grid, strict=True)) | {
        f"t{i}": computed[n].reshape(-1) if computed[n].dim() == 0 else computed[n] for i, (_, n) in enumerate(tensors)
    }
    got = evaluate(expr, env)
    assert torch.equal(got.to(computed[node].dtype).expand(sizes), computed[node]), str(expr)
    assert parse(str(expr)) == expr
    return str(expr)


def grid(t=T, s=S):
    return torch.arange(t)[:, None], torch.arange(s)[None]


def packed(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 3, sizes, generator=torch.Generator().manual_seed(seed)).sort(-1).values


PADDING = torch.ones(B, S, dtype=torch.long).tril(3)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "causal": (lambda: (lambda q, k: k <= q)(*grid()), (), "k <= q"),
    "causal, mirrored": (lambda: (lambda q, k: q >= k)(*grid()), (), "k <= q"),
    "causal, by difference": (lambda: (lambda q, k: q - k >= 0)(*grid()), (), "k <= q"),
    "causal, strict": (lambda: (lambda q, k: k < q + 1)(*grid()), (), "k <= q"),
    "causal, negated": (lambda: (lambda q, k: ~(k > q))(*grid()), (), "k <= q"),
    "causal, tril": (lambda: torch.ones(T, S, dtype=torch.bool).tril(), (), "k <= q"),
    "causal, triu": (lambda: ~torch.ones(T, S, dtype=torch.bool).triu(1), (), "k <= q"),
    "causal, triu of a fill": (
        lambda: torch.full((T, S), float("-inf")).triu(1) == 0,
        (),
        "k <= q",
    ),
    "causal from the right": (lambda: (lambda q, k: k <= q + S - T)(*grid()), (), "k - q <= 2"),
    "window": (lambda: (lambda q, k: (k <= q) & (k > q - 3))(*grid()), (), "(k <= q) & (q - k <= 2)"),
    "window that misses nobody": (lambda: (lambda q, k: (k <= q) & (q - k < 9))(*grid()), (), "k <= q"),
    "both ways": (lambda: (lambda q, k: (q - k).abs() <= 2)(*grid()), (), "abs(q - k) <= 2"),
    "prefix": (lambda: (lambda q, k: (k <= q) | (k < 2))(*grid()), (), "(k <= q) | (k < 2)"),
    "chunks": (lambda: (lambda q, k: q // 3 == k // 3)(*grid()), (), "floordiv(q, 3) == floordiv(k, 3)"),
    "chunks by div": (
        lambda: (lambda q, k: torch.div(q, 3, rounding_mode="floor") == torch.div(k, 3, rounding_mode="floor"))(*grid()),
        (),
        "floordiv(q, 3) == floordiv(k, 3)",
    ),
    "everything": (lambda: (lambda q, k: (k >= 0) & (q >= 0))(*grid()), (), "true"),
    "padding": (lambda m: m.bool()[:, None].expand(B, T, S), (PADDING,), "t0[b, k]"),
    "padding by comparison": (lambda m: (m[:, None, :] != 0).expand(B, T, S), (PADDING,), "t0[b, 0, k]"),
    "padding by index": (
        lambda m: m.bool()[torch.arange(B)[:, None, None], torch.arange(S)[None, None]].expand(B, T, S),
        (PADDING,),
        "t0[b, k]",
    ),
    "lengths": (
        lambda n: (torch.arange(S) < n[:, None])[:, None].expand(B, T, S),
        (torch.tensor([7, 4, 2]),),
        "t0[b, k]",
    ),
    "documents": (
        lambda d: d[:, :T, None] == d[:, None],
        (packed(B, S),),
        "t0[b, q] == t0[b, k]",
    ),
    "padding and causal": (
        lambda m: m.bool()[:, None] & (lambda q, k: k <= q)(*grid())[None],
        (PADDING,),
        "t0[b, k] & (k <= q)",
    ),
    "additive": (
        lambda m: torch.where(m.bool()[:, None] & (lambda q, k: k <= q)(*grid()), 0.0, torch.finfo(torch.float32).min),
        (PADDING,),
        "where(t0[b, k] & (k <= q), 0.0, -3.4028234663852886e+38)",
    ),
    "additive, one minus": (
        lambda: (1.0 - (lambda q, k: k <= q)(*grid()).float()) * -1e9,
        (),
        "where(k <= q, -0.0, -1000000000.0)",
    ),
    "additive, filled twice": (
        lambda m: torch.full((T, S), -1e38)
        .masked_fill((lambda q, k: k <= q)(*grid()), 0.0)[None]
        .masked_fill(~m.bool()[:, None], -1e38),
        (PADDING,),
        "where(~t0[b, 0, k] & (k <= q), 0.0, -9.999999680285692e+37)",
    ),
    "alibi": (
        lambda: (lambda q, k: (k - q).float() * 0.25)(*grid()),
        (),
        "(k - q) * 1.0 * 0.25",
    ),
    "alibi by head": (
        lambda m: m[:, None, None] * (lambda q, k: (k - q))(*grid()),
        (torch.tensor([0.5, 0.25, 0.125]),),
        "t0[b] * (k - q)",
    ),
    "one document by its positions": (
        lambda: (lambda p: (lambda d: d[:, None] == d[None, :])((torch.diff(p, prepend=p[:1] - 1) != 1).cumsum(-1)))(
            torch.arange(S)
        ),
        (),
        "true",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lifted_by_value(name):
    function, inputs, text = CASES[name]
    assert lifted(function, *inputs) == text


def test_symbolic_lengths():
    def function(m):
        b, s = m.shape
        q, k = torch.arange(s)[:, None], torch.arange(s)[None]
        return ((k <= q) & (k > q - 3))[None] & m.bool()[torch.arange(b)[:, None, None], k[None]]

    assert lifted(function, PADDING, dynamic=True) == "(k <= q) & (q - k <= 2) & t0[b, k]"


def test_the_middle_of_a_longer_sequence():
    assert lifted(lambda: (torch.arange(4, 4 + T)[:, None] >= torch.arange(S))) == "k - q <= 4"


def written(x: Tensor) -> Tensor:
    m = torch.ones(T, S, dtype=torch.bool)
    m[0, 1] = False
    return m & x.bool()[0]


def written_later(x: Tensor) -> Tensor:
    y = x.clone()
    m = y[:, None].expand(B, T, S)
    y[0] = 0
    return m


REFUSED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "a mask per query and key": (lambda m: m > 0, (torch.randn(T, S),)),
    "written in place": (written, (PADDING,)),
    "a vector written in place": (written_later, (PADDING,)),
    "a vector that needs a gradient": (lambda m: m[None] * torch.arange(T)[:, None], (torch.randn(S, requires_grad=True),)),
    "rounded": (lambda: (torch.arange(T)[:, None] * torch.arange(S)).to(torch.bfloat16), ()),
    "half precision": (lambda m: m[None] * torch.arange(T)[:, None].half(), (torch.randn(S).half(),)),
    "integers that wrap around": (
        lambda: (torch.arange(S, dtype=torch.uint8) - torch.arange(T, dtype=torch.uint8)[:, None]) < 200,
        (),
    ),
    "rows in another order": (lambda: torch.ones(T, S, dtype=torch.bool).tril().flip(0), ()),
    "counted from the end": (
        lambda m: m.bool()[0][torch.arange(S)[None] - torch.arange(S)[:, None]],
        (PADDING,),
    ),
    "every second": (lambda: torch.ones(2 * T, S, dtype=torch.bool).tril()[::2], ()),
    "random": (lambda: torch.rand(T, S) > 0.5, ()),
    "running sums": (lambda: torch.arange(T * S).view(T, S).cumsum(0), ()),
    "a true reshape": (lambda: (torch.arange(T * S) > 4).view(T, S), ()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, inputs = REFUSED[name]
    with pytest.raises(NotLifted):
        lifted(function, *inputs)


def test_comparisons_of_floats_are_not_turned_around():
    """not (x < y) is no x >= y where one of them is nan."""
    build = Builder({}, {"t0": "float"})
    assert str(build.make("not", parse("t0[q] < t0[k]"))) == "~(t0[q] < t0[k])"
    assert str(build.make("not", parse("q < k"))) == "k <= q"
    assert str(build.make("not", parse("(q < k) | (q == 2)"))) == "(k <= q) & (q != 2)"
