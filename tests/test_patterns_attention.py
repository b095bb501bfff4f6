"""Attention sites: each way to write one is found, and what is captured computes the same.

Every match is checked by value: the captured description is evaluated, as its docstring says, on what the graph's own nodes
computed, and compared with the node that the site would replace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import blocks
import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spt_compiler
from spt_compiler import debug
from spt_compiler.canonicalize import canonicalize
from spt_compiler.patterns import AttentionCapture, find
from spt_compiler.rewrite import copy_graph

LOW = torch.finfo(torch.float64).min
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(c: AttentionCapture, values: dict[Any, Any]) -> Tensor:
    """What a capture says, written down: slow, in the dtype of the values, without dropout."""
    q, k, v = values[c.q], values[c.k], values[c.v]
    k = k.transpose(-1, -2) if c.k_transposed else k
    if c.enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * c.scale
    for node in c.scale_nodes:
        logits = logits * values[node].reshape(())
    if c.softcap is not None:
        logits = c.softcap * torch.tanh(logits / c.softcap)
    for node, factor in c.bias:
        bias = values[node] * factor
        logits = logits + (bias if c.lowest is None else bias.clamp(min=c.lowest))
    allowed = torch.ones_like(logits, dtype=torch.bool)
    for node in c.allowed:
        allowed = allowed & values[node]
    for node in c.disallowed:
        allowed = allowed & ~values[node]
    if c.causal:
        allowed = allowed & torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    logits = logits.masked_fill(~allowed, -math.inf)
    empty = (logits == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(logits, -1)
    if c.empty == "zero":
        p = torch.where(empty, 0.0, p)
    elif c.empty == "uniform":
        p = torch.where(empty, 1.0 / logits.shape[-1], p)
    return p @ v


def sites(function: Callable, *inputs: Tensor, check: bool = True, dynamic: bool | None = None, **named: Any):
    """(matches, skipped) of the only graph of a call; every attention match is checked by value."""
    (captured,) = models.capture(function, *inputs, dynamic=dynamic, **named)
    module = copy_graph(captured.module)
    canonicalize(module)
    before = str(module.graph)
    matches, skipped = find(module)
    assert str(module.graph) == before, "matching changed the graph"
    if check:
        computed = models.values(captured, module)
        for match in matches:
            if match.pattern.kind == "attention" and match.capture.dropout_p == 0:
                expected = computed[match.output]
                got = attend(match.capture, computed)
                torch.testing.assert_close(got.to(expected.dtype), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    return matches, skipped


def only(function: Callable, *inputs: Tensor, **options: Any) -> AttentionCapture:
    """The capture of the one site there is."""
    matches, skipped = sites(function, *inputs, **options)
    assert len(matches) == 1 and not skipped, [str(s.reason) for s in skipped]
    return matches[0].capture


def refused(function: Callable, *inputs: Tensor, **options: Any) -> str:
    """The reason for which the one candidate was refused."""
    matches, skipped = sites(function, *inputs, **options)
    assert not matches and len(skipped) == 1, ([m.capture for m in matches], [str(s.reason) for s in skipped])
    assert skipped[0].kind == "attention"
    return str(skipped[0].reason)


Q, K, V = numbers(2, 4, 6, 8), numbers(2, 4, 6, 8, seed=1), numbers(2, 4, 6, 5, seed=2)
BIAS = numbers(1, 4, 6, 6, seed=3)


# ---------------------------------------------------------------------------------------------------------------------
# The library call
# ---------------------------------------------------------------------------------------------------------------------


def test_the_call_by_position_and_by_keyword():
    c = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True), Q, K, V)
    assert c.causal and c.scale == pytest.approx(8**-0.5) and c.empty == "zero" and not c.bias and not c.allowed
    c = only(lambda q, k, v: F.scaled_dot_product_attention(key=k, query=q, value=v, scale=0.3), Q, K, V)
    assert not c.causal and c.scale == 0.3


def test_masks_of_the_call():
    c = only(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), Q, K, V, CAUSAL)
    assert len(c.allowed) == 1 and not c.bias
    c = only(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), Q, K, V, BIAS)
    assert len(c.bias) == 1 and c.bias[0][1] == 1.0 and not c.allowed


def test_a_row_without_keys_gives_zero_in_the_call():
    mask = CAUSAL.clone()
    mask[3] = False
    assert only(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), Q, K, V, mask).empty == "zero"
    bias = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~mask, -math.inf)
    assert only(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), Q, K, V, bias).empty == "zero"


def test_dropout_of_the_call():
    c = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3), Q, K, V)
    assert c.dropout_p == 0.3


@pytest.mark.parametrize("lead", [(), (3,), (2, 4), (2, 2, 3)])
def test_ranks(lead):
    q, k = numbers(*lead, 6, 8), numbers(*lead, 7, 8, seed=1)
    assert len(sites(lambda q, k: F.scaled_dot_product_attention(q, k, k), q, k)[0]) == 1
    assert only(lambda q, k: torch.softmax(q @ k.mT, -1) @ k, q, k).k_transposed is False


def repeat_expand(x: Tensor, n: int) -> Tensor:
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, n, t, d).reshape(b, h * n, t, d)


@pytest.mark.parametrize(
    "repeat",
    [repeat_expand, lambda x, n: x.repeat_interleave(n, dim=1), lambda x, n: torch.repeat_interleave(x, n, 1)],
)
@pytest.mark.parametrize("eager", [False, True])
def test_repeated_key_heads_are_seen_through(repeat, eager):
    k, v = numbers(2, 2, 6, 8, seed=1), numbers(2, 2, 6, 5, seed=2)

    def function(q, k, v):
        k, v = repeat(k, 2), repeat(v, 2)
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v if eager else F.scaled_dot_product_attention(q, k, v)

    c = only(function, Q, k, v)
    assert c.enable_gqa and c.k.meta["example_value"].shape[1] == c.v.meta["example_value"].shape[1] == 2


def test_tiled_key_heads_are_not_groups():
    """x.repeat orders heads 0 1 0 1, not 0 0 1 1: it must not be taken for a group."""
    k, v = numbers(2, 2, 6, 8, seed=1), numbers(2, 2, 6, 5, seed=2)
    c = only(lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), Q, k, v)
    assert not c.enable_gqa

    def transposed(x):  # heads and copies swapped before they are merged
        return x[:, None].expand(2, 2, 2, 6, x.shape[-1]).reshape(2, 4, 6, x.shape[-1])

    c = only(lambda q, k, v: F.scaled_dot_product_attention(q, transposed(k), transposed(v)), Q, k, v)
    assert not c.enable_gqa


def test_key_heads_that_are_picked_while_they_are_repeated_are_no_groups():
    def function(q, k, v):
        k = k[:, :, None, torch.arange(5, -1, -1)].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8)
        return F.scaled_dot_product_attention(q, k, repeat_expand(v, 2))

    assert not only(function, Q, K[:, :2], V[:, :2]).enable_gqa


def test_what_is_written_after_it_was_read_is_read_as_it_was():
    def repeated(q, k, v):
        k, v = k.clone(), v.clone()
        wide = repeat_expand(k, 2), repeat_expand(v, 2)
        k.zero_()
        return F.scaled_dot_product_attention(q, *wide)

    assert not only(repeated, Q, K[:, :2], V[:, :2]).enable_gqa

    def inverted(q, k, v, mask):
        seen = mask.clone()
        hidden = ~seen
        seen[:, :3] = False
        return (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v

    c = only(inverted, Q, K, V, CAUSAL)
    assert c.disallowed and not c.allowed


def test_the_flag_of_the_call():
    k, v = numbers(2, 2, 6, 8, seed=1), numbers(2, 2, 6, 5, seed=2)
    assert only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), Q, k, v).enable_gqa


# ---------------------------------------------------------------------------------------------------------------------
# Chains: each entry is a way from a product to probabilities, with what must be captured
# ---------------------------------------------------------------------------------------------------------------------

PADDING = torch.zeros(2, 1, 1, 6, dtype=torch.float64)
PADDING[1, ..., 4:] = LOW
HIDDEN = ~CAUSAL
TENSOR_SCALE = torch.tensor([0.7], dtype=torch.float64)

CHAINS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "plain": (lambda s: s, dict(scale=1.0)),
    "scale": (lambda s: s * 0.5, dict(scale=0.5)),
    "scale divided": (lambda s: s / 3.0, dict(scale=1 / 3.0)),
    "scale twice": (lambda s: 2.0 * (s / 3), dict(scale=2 / 3)),
    "negated": (lambda s: -s * 0.5, dict(scale=-0.5)),
    "scale as 0-d tensor": (lambda s: s / torch.sqrt(torch.tensor(8.0, dtype=torch.float64)), dict(scale=8**-0.5)),
    "scale as input": (lambda s: s * TENSOR_SCALE, dict(scale=1.0)),
    "float mask": (lambda s: s + PADDING, dict(bias=1)),
    "mask first": (lambda s: PADDING + s * 0.5, dict(bias=1, scale=0.5)),
    "two masks": (lambda s: s + BIAS + PADDING, dict(bias=2)),
    "mask subtracted": (lambda s: s - 1e30 * (PADDING < 0).double(), dict(bias=1)),
    "scale after a bias": (lambda s: (s + BIAS) * 0.25 + PADDING, dict(scale=0.25, factors=(1.0, 0.25))),
    "number added": (lambda s: s + 3.0, dict(scale=1.0, bias=0)),
    "bias less scores": (lambda s: BIAS - s, dict(scale=-1.0, bias=1)),
    "masked_fill -inf": (lambda s: s.masked_fill(HIDDEN, -math.inf), dict(disallowed=1, empty="nan")),
    "masked_fill low": (lambda s: s.masked_fill(HIDDEN, LOW), dict(disallowed=1, empty="uniform")),
    "masked_fill -1e4": (lambda s: s.masked_fill(HIDDEN, -1e4), dict(disallowed=1, empty="uniform")),
    "masked_fill inverted": (lambda s: s.masked_fill(~CAUSAL, -math.inf), dict(allowed=1, disallowed=0)),
    "masked_fill == 0": (lambda s: s.masked_fill(CAUSAL == 0, LOW), dict(disallowed=1)),
    "where": (
        lambda s: torch.where(CAUSAL, s, torch.tensor(LOW, dtype=torch.float64)),
        dict(allowed=1, empty="uniform"),
    ),
    "where the other way": (lambda s: torch.where(HIDDEN, -math.inf, s), dict(disallowed=1, empty="nan")),
    "two fills": (
        lambda s: s.masked_fill(HIDDEN, LOW).masked_fill(PADDING < 0, LOW),
        dict(disallowed=2, empty="uniform"),
    ),
    "fill and bias": (lambda s: torch.where(CAUSAL, s, LOW) + PADDING, dict(bias=2, allowed=0, empty="nan")),
    "bias and fill": (lambda s: (s + BIAS).masked_fill(HIDDEN, LOW), dict(bias=1, disallowed=0)),
    "fill -inf and bias": (
        lambda s: (s + BIAS).masked_fill(HIDDEN, -math.inf),
        dict(bias=1, disallowed=1, empty="nan"),
    ),
    "in place": (lambda s: s.mul_(0.5).add_(PADDING).masked_fill_(HIDDEN, -math.inf), dict(scale=0.5, bias=1)),
    "soft cap": (lambda s: 30.0 * torch.tanh(s * 0.25 / 30.0) + PADDING, dict(softcap=30.0, scale=0.25, bias=1)),
    "cast": (lambda s: (s * 0.5).float().double() + PADDING, dict(scale=0.5, bias=1)),
    "clamped at the lowest number": (
        lambda s: torch.max(s + PADDING, torch.tensor(LOW, dtype=torch.float64)),
        dict(bias=1, empty="uniform"),
    ),
    "row maximum subtracted": (lambda s: s - s.amax(-1, keepdim=True), dict(scale=1.0)),
    "einsum": (lambda s: torch.einsum("bhqk->bhqk", s), dict(scale=1.0)),
    "where, full_like": (lambda s: torch.where(CAUSAL, s, torch.full_like(s, -9e15)), dict(allowed=1, empty="uniform")),
    "where, ones_like": (lambda s: torch.where(CAUSAL, s, -9e15 * torch.ones_like(s)), dict(allowed=1, empty="uniform")),
    "where, full": (lambda s: torch.where(HIDDEN, torch.full((6, 6), -math.inf).double(), s), dict(disallowed=1, empty="nan")),
    "mask of ones_like": (lambda s: s.masked_fill(torch.ones_like(s).triu(1).bool(), LOW), dict(disallowed=1)),
    "mask of new_full": (lambda s: s + s.new_full((6, 6), -math.inf).triu(1), dict(bias=1, empty="nan")),
    "mask of zeros_like": (lambda s: s + torch.zeros_like(s).masked_fill(HIDDEN, LOW), dict(bias=1)),
    "mask of integers": (lambda s: s + HIDDEN.long() * -10000, dict(bias=1)),
    "distances of integers": (lambda s: s * 0.5 - (torch.arange(6)[:, None] - torch.arange(6)).abs(), dict(bias=1, scale=0.5)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name):
    steps, expected = CHAINS[name]
    c = only(lambda q, k, v: F.dropout(F.softmax(steps(q @ k.transpose(-1, -2)), dim=-1), 0.0) @ v, Q, K, V)
    assert c.scale == pytest.approx(expected.get("scale", 1.0))
    assert c.softcap == expected.get("softcap") and not c.causal
    for field in ("bias", "allowed", "disallowed"):
        if field in expected:
            assert len(getattr(c, field)) == expected[field], (field, c)
    if "empty" in expected:
        assert c.empty == expected["empty"]
    if "factors" in expected:
        assert tuple(f for _, f in c.bias) == pytest.approx(expected["factors"])


@pytest.mark.parametrize(
    "name", ["masked_fill low", "masked_fill -inf", "where", "two fills", "fill and bias", "float mask"]
)
def test_fully_masked_rows(name):
    """Left padding under a causal mask leaves rows without any key: they do what they did before."""
    steps, _ = CHAINS[name]
    rows = torch.zeros(6, 6, dtype=torch.bool)
    rows[1] = True

    def function(q, k, v):
        s = q @ k.transpose(-1, -2)
        if "masked_fill" in name:
            s = s.masked_fill(rows, -math.inf if "inf" in name else LOW)
        return torch.softmax(steps(s), -1) @ v

    only(function, Q, K, V)


@pytest.mark.parametrize(
    "after",
    [
        lambda p: p.to(torch.float64),
        lambda p: F.dropout(p, 0.0),
        lambda p: nn.Dropout(0.4)(p),
        lambda p: F.dropout(p.contiguous(), p=0.4, training=True),
        lambda p: F.dropout(p.view(8, 6, 6), 0.4).view(2, 4, 6, 6),
    ],
)
def test_between_softmax_and_values(after):
    c = only(lambda q, k, v: after(torch.softmax(q @ k.mT, -1)) @ v, Q, K, V)
    assert c.dropout_p in (0.0, 0.4)


@pytest.mark.parametrize(
    "product",
    [
        lambda q, k: torch.matmul(q, k.transpose(2, 3)),
        lambda q, k: torch.bmm(q.view(8, 6, 8), k.view(8, 6, 8).transpose(1, 2)).view(2, 4, 6, 6),
        lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
        lambda q, k: torch.addcmul(BIAS, q @ k.mT, torch.tensor(2.0).double(), value=0.5),
        lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)),
        lambda q, k: (
            torch.baddbmm(torch.empty(8, 6, 6), q.view(8, 6, 8).float(), k.view(8, 6, 8).float().mT, beta=0)
            .view(2, 4, 6, 6)
            .double()
        ),
        lambda q, k: (q * 0.5) @ (k.permute(0, 1, 3, 2) / torch.tensor(2.0)),
    ],
)
def test_products(product):
    (captured,) = models.capture(lambda q, k, v: torch.softmax(product(q, k), -1) @ v, Q, K, V)
    module = copy_graph(captured.module)
    canonicalize(module)
    (match,), skipped = find(module)
    assert not skipped and match.capture.q.meta["example_value"].dim() == 4
    computed = models.values(captured, module)
    got = attend(
        match.capture,
        {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in computed.items()},
    )
    torch.testing.assert_close(got, computed[match.output], rtol=1e-5, atol=1e-5)


SIZES = dict(b=2, h=4, q=6, k=7, d=8, e=5)
LAYOUTS = [
    ("bqhd,bkhd->bqhk", "bqhk,bkhe->bqhe"),
    ("bqhd,bkhd->qbhk", "qbhk,bkhe->qbhe"),
    ("hqbd,hkbd->hbqk", "hbqk,bhke->bhqe"),
    ("bqhd,bkhd->bhkq", "bhkq,bkhe->bqhe"),
    ("bhdq,bhdk->bkqh", "bhek,bkqh->bheq"),
    ("qbhd,kbhd->kbqh", "kbqh,kbhe->qbhe"),
    ("bkhd,bqhd->bhqk", "bkhe,bhqk->bqhe"),
]


@pytest.mark.parametrize("scores, values", LAYOUTS)
def test_scores_in_any_order_of_dims(scores, values):
    """Head dims, queries and keys stand where the model likes: einsum, and a softmax over whichever dim holds the keys."""
    (left, right), result = scores.partition("->")[0].split(","), scores.partition("->")[2]
    held = values.partition("->")[0].replace(result, "").strip(",")
    bias = numbers(*(SIZES[c] if c in "qk" else 1 for c in result), seed=5)

    class Attention(nn.Module):
        def forward(self, a, b, v):
            s = torch.einsum(scores, a, b) * 0.5 + bias
            p = F.dropout(torch.softmax(s.masked_fill(bias > 1.5, LOW), result.index("k")), 0.0)
            return torch.einsum(values, *((p, v) if values.startswith(result) else (v, p)))

    inputs = [numbers(*(SIZES[c] for c in letters), seed=i) for i, letters in enumerate((left, right, held))]
    assert only(Attention(), *inputs).q.meta["example_value"].shape[-2] == SIZES["q"]
    assert blocks.assert_exact_is_eager(Attention(), *inputs) == ["attention"]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_softmax_for_several_rows(dropout):
    """Tied row attention: scores are summed over the rows of an alignment, whose values share their probabilities."""

    class Attention(nn.Module):
        def forward(self, q, k, v):
            p = torch.softmax(torch.einsum("rinhd,rjnhd->hnij", q * 0.3, k), -1)
            return torch.einsum("hnij,rjnhe->rinhe", F.dropout(p, dropout), v)

    q, k, v = numbers(3, 6, 2, 4, 8), numbers(3, 7, 2, 4, 8, seed=1), numbers(3, 7, 2, 4, 5, seed=2)
    c = only(Attention(), q, k, v)
    assert c.q.meta["example_value"].shape == (4, 2, 6, 24) and c.dropout_p == dropout
    if not dropout:
        assert blocks.assert_exact_is_eager(Attention(), q, k, v) == ["attention"]


@pytest.mark.parametrize(
    "scores, values",
    [
        (lambda q, k: (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1), lambda p, v: (p.unsqueeze(-1) * v.unsqueeze(2)).sum(3)),
        (lambda q, k: torch.sum(k[:, :, None] * q[..., None, :], dim=(4,)), lambda p, v: (v[:, :, None] * p[..., None]).sum(-2)),
    ],
)
def test_products_as_sums_over_all_pairs(scores, values):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return values(torch.softmax(scores(q, k) * 0.5, -1), v)

    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]
    assert only(Attention(), Q, K, V, dynamic=True).scale == 0.5


SHARED = [
    ("bqhd,bkd->bhqk", "bhqk,bke->bqhe"),
    ("bqhgd,bkhd->bhgqk", "bhgqk,bkhe->bqhge"),
    ("bqhgd,bkhd->bhgqk", "bhgqk,bkhe->bhgqe"),
    ("bhgqd,bkd->bhgqk", "bhgqk,bke->bqhge"),
    ("qd,kd->qk", "qk,ke->qe"),
    ("hqd,hkd->hqk", "hqk,hke->qhe"),
    ("qd,bkd->bqk", "bqk,bke->bqe"),
]


@pytest.mark.parametrize("scores, values", SHARED)
def test_keys_that_heads_share_by_einsum(scores, values):
    """Grouped and single key heads, no heads, no batch."""
    (left, right), result = scores.partition("->")[0].split(","), scores.partition("->")[2]
    held = values.partition("->")[0].partition(",")[2]
    mask = numbers(6, 7, seed=5) > 1.5

    class Attention(nn.Module):
        def forward(self, a, b, v):
            s = torch.einsum(scores, a, b).masked_fill(mask, LOW)
            return torch.einsum(values, torch.softmax(s, -1), v)

    inputs = [numbers(*({**SIZES, "g": 3}[c] for c in letters), seed=i) for i, letters in enumerate((left, right, held))]
    assert only(Attention(), *inputs).q.meta["example_value"].dim() == len(result)
    assert blocks.assert_exact_is_eager(Attention(), *inputs) == ["attention"]


@pytest.mark.parametrize("equation", ["bhqd,qkd->bhqk", "bhqd,bkqd->bhqk", "bhqd,rd->bhqr", "bhkd,qkd->bhqk"])
def test_relative_positions_by_einsum_are_a_bias(equation):
    """Each pair, or each key, has a vector of its own that queries (or keys) are multiplied by."""
    left, right = equation.partition("->")[0].split(",")

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.relative = nn.Parameter(numbers(*({**SIZES, "k": 6, "r": 6}[c] for c in right), seed=4))

        def forward(self, q, k, v):
            bias = torch.einsum(equation, q if "q" in left else k, self.relative)
            return torch.softmax((q @ k.mT + bias) * 0.4, -1) @ v

    assert len(only(Attention(), Q, K, V).bias) == 1
    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_mask_before_heads_join_the_batch_again_for_a_wide_softmax(dynamic):
    """Heads are in the batch, then apart for the padding, and in the batch again where the softmax is of another type."""
    padding = torch.arange(6) < torch.tensor([[6], [4]])

    def function(x):
        b, t, _ = x.shape
        q, k, v = (x.view(b, t, 4, 8).transpose(1, 2).reshape(b * 4, t, 8) * i for i in (1.0, 2.0, 3.0))
        s = (torch.bmm(q, k.mT) + torch.full((t, t), -math.inf, dtype=x.dtype).triu(1)).view(b, 4, t, t)
        s = s.masked_fill(~padding[:, None, None], -math.inf).view(b * 4, t, t)
        return torch.bmm(F.softmax(s, -1, dtype=torch.float64).type_as(s), v)

    assert only(function, numbers(2, 6, 32).float(), dynamic=dynamic).q.meta["example_value"].dim() == 4


def test_a_softmax_over_keys_that_stand_first():
    c = only(lambda q, k, v: F.dropout(torch.softmax((k @ q.mT) * 0.5, -2), 0.4).mT @ v, Q, K, V)
    assert c.scale == 0.5 and c.dropout_p == 0.4


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda s, v: torch.einsum("bqhk,bkhe->bqhe", torch.softmax(s, 2), v), "softmax over dim"),
        (lambda s, v: torch.einsum("bqhk,bkhe->bqhe", torch.softmax(s, 1), v), "softmax over dim"),
        (lambda s, v: torch.einsum("bqhk,bqhe->bkhe", torch.softmax(s, -1), v[:, :6]), "permute between the"),
        (
            lambda s, v: torch.einsum("bqhk,bqke->bqhe", torch.softmax(s, -1), v.transpose(1, 2)[:, :1].expand(2, 6, 7, 8)),
            "permute between the",
        ),
    ],
    ids=["over the heads", "over the queries", "values of queries", "values of each query"],
)
def test_sums_over_another_dim_than_the_softmax(function, reason):
    q, k, v = (numbers(2, n, 4, 8, seed=i) for i, n in enumerate((6, 7, 7)))
    assert reason in refused(lambda q, k, v: function(torch.einsum("bqhd,bkhd->bqhk", q, k), v), q, k, v)


@pytest.mark.parametrize(
    "scores",
    [
        lambda q, k: -torch.cdist(q, k) ** 2 / 2,
        lambda q, k: (torch.cdist(q, k, p=2.0).square() * -0.3).masked_fill(HIDDEN, -math.inf),
    ],
)
def test_scores_by_squared_distances_are_products_and_a_bias_of_the_keys(scores):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return torch.softmax(scores(q, k), -1) @ v

    assert len(only(Attention(), Q, K, V).bias) == 1
    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]


def test_a_second_score_term_is_a_bias_with_gradient():
    """Transformer-XL and DeBERTa add a product with relative positions: any tensor may be a bias."""
    r = numbers(1, 4, 6, 8, seed=7).requires_grad_()
    c = only(lambda q, k, v, r: torch.softmax(q @ k.mT + torch.roll(q @ r.mT, 1, -1), -1) @ v, Q, K, V, r)
    assert len(c.bias) == 1 and c.bias[0][0].meta["example_value"].requires_grad


@pytest.mark.parametrize(
    "mask",
    [lambda s: s, lambda s: s * 0.5 + PADDING, lambda s: PADDING + (BIAS + 0.5 * s), lambda s: s.masked_fill(HIDDEN, LOW)],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_sinks_are_one_more_key(mask, shifted):
    """A learned logit that takes probability and gives no value: a zero key in front, with the sink as its bias."""
    sink = numbers(4, seed=9).requires_grad_()

    def function(q, k, v, sink):
        s = mask(q @ k.mT)
        s = torch.cat([s, sink.reshape(1, -1, 1, 1).expand(2, -1, 6, -1)], dim=-1)
        s = s - s.max(-1, keepdim=True).values if shifted else s
        return F.dropout(F.softmax(s, -1)[..., :-1], 0.0) @ v

    c = only(function, Q, K, V, sink)
    assert c.v.meta["example_value"].shape[-2] == 7 and any(b.meta["example_value"].requires_grad for b, _ in c.bias)


def _softmax1(s: Tensor, shift: Callable[[Tensor], Tensor]) -> Tensor:
    e = torch.exp(s - (m := shift(s.amax(-1, keepdim=True))))
    return e / (torch.exp(-m) + e.sum(-1, keepdim=True))


ONE_MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "unshifted": lambda s: (e := torch.exp(s)) / (1 + e.sum(-1, keepdim=True)),
    "some more": lambda s: (e := s.exp()) / (e.sum(-1, keepdim=True) + 4.0),
    "shifted": lambda s: _softmax1(s, lambda m: m),
    "shifted, without gradient": lambda s: _softmax1(s, lambda m: m.detach()),
    "shifted upwards only": lambda s: _softmax1(s, lambda m: m.clamp(min=0)),
    "padded": lambda s: F.softmax(F.pad(s, (0, 1)), -1)[..., :-1],
    "padded in front": lambda s: F.softmax(F.pad(s, (1, 0), value=-1.0), -1)[..., 1:],
    "joined with zeros": lambda s: torch.softmax(torch.cat([s, torch.zeros_like(s[..., :1])], -1), -1)[..., :-1],
    "joined in front": lambda s: torch.softmax(torch.cat([s.new_zeros(*s.shape[:-1], 1), s], -1), -1)[..., 1:],
    "padded, nan set to zero": lambda s: F.softmax(F.pad(s, (0, 1)), -1)[..., :-1].nan_to_num(),
    "padded, nan set to zero at once": lambda s: torch.nan_to_num(F.softmax(F.pad(s, (0, 1)), -1))[..., :-1],
}


@pytest.mark.parametrize(
    "mask",
    [lambda s, b: s * 0.5 + b, lambda s, b: b + 0.5 * s, lambda s, b: torch.where(CAUSAL, s, LOW) - 1.0 * (b > 0)],
    ids=["bias", "bias first", "masks"],
)
@pytest.mark.parametrize("name", ONE_MORE)
def test_a_softmax_that_may_attend_to_nothing_has_a_sink_of_zero(name, mask):
    """softmax1, exp / (1 + sum of exp): one more key whose score is a number, and whose value is zero."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(BIAS)

        def forward(self, q, k, v):
            return F.dropout(ONE_MORE[name](mask(q @ k.mT, self.bias)), 0.0) @ v

    assert only(Attention(), Q, K, V).v.meta["example_value"].shape[-2] == 7
    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]


@pytest.mark.parametrize("name", ONE_MORE)
def test_a_sink_of_zero_at_symbolic_lengths(name):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(2)
            return ONE_MORE[name]((q @ k.mT * 0.5).masked_fill(hidden, -1e9)) @ v

    assert blocks.assert_exact_at_any_length(Attention(), Q, K, V) == ["attention"]


class Sinks(nn.Module):
    """A learned logit per head that takes probability, and `values` that makes the output of probabilities and values."""

    def __init__(self, values: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.values, self.sink = values, nn.Parameter(numbers(4, seed=9))

    def forward(self, q, k, v):
        s = q @ k.mT * 0.5
        s = torch.cat([s, self.sink.view(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], -1)], -1)
        return self.values(F.softmax(s - s.max(-1, keepdim=True).values, -1)[..., :-1], v)


@pytest.mark.parametrize(
    "values",
    [
        lambda p, v: p @ v,
        lambda p, v: p.nan_to_num(0.0) @ v,
        lambda p, v: (v.mT @ p.mT).mT,
        lambda p, v: v.mT @ p.mT.nan_to_num(),
        lambda p, v: torch.einsum("bhqk,bhke->bqhe", p, v),
    ],
)
def test_sinks_at_symbolic_lengths(values):
    assert blocks.assert_exact_is_eager(Sinks(values), Q, K, V) == ["attention"]
    assert blocks.assert_exact_at_any_length(Sinks(values), Q, K, V) == ["attention"]


@pytest.mark.parametrize(
    "joined",
    [
        lambda s, sink: torch.cat(tensors=[s, sink], dim=-1),
        lambda s, sink: torch.cat([s + sink[0, 0, 0], sink], -1),
        lambda s, sink: torch.cat([s + sink[0, 0, 0, 0], sink], -1),
        lambda s, sink: torch.concatenate([BIAS - s, sink], -1),
        lambda s, sink: torch.cat([0.3 - s, sink], -1),
    ],
    ids=["named arguments", "with a vector of one", "with a number", "a bias less the scores", "a number less the scores"],
)
def test_sinks_however_they_are_joined(joined):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.sink = nn.Parameter(numbers(4, seed=9))

        def forward(self, q, k, v):
            s = joined(q @ k.mT * 0.5, self.sink.view(1, -1, 1, 1).expand(2, -1, 6, -1))
            return torch.softmax(s, -1)[..., :-1] @ v

    blocks.assert_exact_is_eager(Attention(), Q, K, V)


def test_scores_of_another_mode_than_their_sink_stay():
    """What would be made again with the sink would get a gradient, or another type."""

    class Attention(nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.mode, self.sink = mode, nn.Parameter(numbers(4, seed=9))

        def forward(self, q, k, v):
            with self.mode():
                s = q @ k.mT * 0.5
            s = torch.cat([s, self.sink.view(1, -1, 1, 1).expand(2, -1, 6, -1)], -1)
            return torch.softmax(s, -1)[..., :-1] @ v + q[..., :1] + k[..., :1]

    assert blocks.assert_exact_is_eager(Attention(torch.no_grad), Q, K, V) == []
    assert blocks.assert_exact_is_eager(Attention(lambda: torch.autocast("cpu")), Q, K, V) == []


@pytest.mark.parametrize("values", [lambda p, v: p.nan_to_num(1.0) @ v, lambda p, v: p.mT @ v, lambda p, v: (p + 0.1) @ v])
def test_sinks_whose_probabilities_are_changed_are_none(values):
    assert "joined with others" in refused(Sinks(values), Q, K, V)


def test_a_softmax_with_one_more_that_divides_the_values():
    c = only(lambda q, k, v: ((e := torch.exp(q @ k.mT)) @ v) / (1 + e.sum(-1, keepdim=True)), Q, K, V)
    assert c.v.meta["example_value"].shape[-2] == 7 and not c.bias


@pytest.mark.parametrize(
    "probabilities",
    [
        lambda s: (e := torch.exp(s - (m := s.amax(-1, True)))) / (torch.exp(m) + e.sum(-1, True)),
        lambda s: (e := torch.exp(s)) / (e.sum(-1, True) - 0.5),
        lambda s: (e := torch.exp(s)) / (1 + e.sum(-2, True)),
        lambda s: (e := torch.exp(s)) / (BIAS[..., :1] + e.sum(-1, True)),
        lambda s: _softmax1(s.masked_fill(HIDDEN, -math.inf), lambda m: m),  # a row of -inf only would be nan
        lambda s: _softmax1(s + BIAS, lambda m: m),
    ],
)
def test_sums_of_exponentials_with_something_else_are_no_sink(probabilities):
    matches, skipped = sites(lambda q, k, v: probabilities(q @ k.mT) @ v, Q, K, V)
    assert not matches and all("a softmax written out that may not be one" in str(s.reason) for s in skipped)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("keepdim", [False, True])
def test_a_gate_by_the_sum_of_weights_is_a_sink(keepdim, wide):
    """sigmoid(logsumexp(s) - sink) times the output: what one more key would have done."""
    sink = numbers(4, seed=9).requires_grad_()
    kind = torch.float64 if wide else torch.float32

    def function(q, k, v, sink):
        s = (q @ k.mT * 0.5).masked_fill(HIDDEN, torch.finfo(q.dtype).min)
        total = torch.logsumexp(s, -1, keepdim=keepdim)
        gate = (total - sink.view((1, -1, 1, 1) if keepdim else (1, -1, 1)).to(s.dtype)).double().sigmoid()
        p = F.dropout(F.softmax(s, dim=-1, dtype=torch.float64).to(q.dtype), 0.0)
        return (p @ v) * (gate if keepdim else gate.unsqueeze(-1)).to(q.dtype)

    c = only(function, *(t.to(kind) for t in (Q, K, V)), sink)
    assert c.v.meta["example_value"].shape[-2] == 7 and any(b.meta["example_value"].requires_grad for b, _ in c.bias)


@pytest.mark.parametrize("zero", [lambda p: torch.nan_to_num(p, 1.0), lambda p: torch.nan_to_num(p, nan=0.5)])
def test_nan_that_is_set_to_another_number_stays(zero):
    rows = HIDDEN.clone()
    rows[2] = True
    said = refused(lambda q, k, v: zero(torch.softmax((q @ k.mT).masked_fill(rows, -math.inf), -1)) @ v, Q, K, V)
    assert said == "nan_to_num between the softmax and the values"


@pytest.mark.parametrize("seen", [lambda m: ~m, lambda m: m.logical_not().view(6, 6)])
def test_only_allowed_probabilities_are_kept_again(seen):
    rows = HIDDEN.clone()
    rows[2] = True

    class Attention(nn.Module):
        def forward(self, q, k, v):
            return torch.where(seen(rows), torch.softmax((q @ k.mT).masked_fill(~seen(rows), -math.inf), -1), 0.0) @ v

    assert only(Attention(), Q, K, V).empty == "zero"
    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]
    other = CAUSAL.roll(1, 0)
    assert "after the softmax" in refused(
        lambda q, k, v: torch.where(other, torch.softmax((q @ k.mT).masked_fill(HIDDEN, -math.inf), -1), 0.0) @ v, Q, K, V
    )


def test_a_mask_that_was_written_to_hides_something_else():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", ~HIDDEN)

        def forward(self, q, k, v):
            p = torch.softmax((q @ k.mT).masked_fill(~self.seen, -math.inf), -1)
            self.seen.logical_not_()
            return p.masked_fill(~self.seen, 0.0) @ v

    assert "after the softmax" in refused(Attention(), Q, K, V)


@pytest.mark.parametrize("fill", [-math.inf, LOW, -1e9])
@pytest.mark.parametrize("mask", [lambda m: m, lambda m: m.view(6, 6) == torch.tensor(True)])
def test_hidden_probabilities_set_to_zero_again(mask, fill):
    rows = HIDDEN.clone()
    rows[2] = True

    class Attention(nn.Module):
        def forward(self, q, k, v):
            return torch.softmax((q @ k.mT + BIAS.tanh()).masked_fill(mask(rows), fill), -1).masked_fill(mask(rows), 0.0) @ v

    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]
    c = only(Attention(), Q, K, V)
    assert c.empty == "zero" and len(c.disallowed) == 1


@pytest.mark.parametrize("symbolic", [None, True])
def test_relative_positions_under_a_mask_are_no_mask(symbolic):
    """Zeros that a shift joins with scores are bounded whatever the sizes are: only the fill hides keys."""

    def function(q, k, v, r):
        shifted = torch.cat([r.new_zeros(*r.shape[:3], 1), q @ r.mT], -1)
        shifted = shifted.view(*r.shape[:2], r.shape[2] + 1, q.shape[2])[:, :, 1:].reshape(*r.shape[:2], q.shape[2], r.shape[2])
        scores = q @ k.mT + shifted[..., : k.shape[2]]
        mask = (torch.arange(k.shape[2]) > 3).view(1, 1, 1, -1)
        return torch.softmax(scores.masked_fill(mask, LOW), -1).masked_fill(mask, 0.0) @ v

    assert only(function, Q, K, V, numbers(2, 4, 6, 8, seed=5), dynamic=symbolic).empty == "zero"


FILLED_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of the queries": lambda p, m: p.masked_fill(m[:, :1], 0.0),
    "of each head": lambda p, m: torch.where(m.view(1, 1, 6, 6)[..., :1], 0, p),
    "of what stays": lambda p, m: torch.where(~m[:, :1], F.dropout(p, 0.0), 0.0),
}


@pytest.mark.parametrize("name", FILLED_ROWS)
def test_rows_set_to_zero_after_the_softmax_are_rows_of_the_output(name):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            p = torch.softmax((q @ k.mT).masked_fill(HIDDEN, LOW), -1)
            return FILLED_ROWS[name](p, HIDDEN.flip(0)) @ v

    assert only(Attention(), Q, K, V).empty == "uniform"
    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]


@pytest.mark.parametrize(
    "filled",
    [
        lambda p, m: p.masked_fill(m[:1], 0.0),
        lambda p, m: p.masked_fill(m[:, :1], 0.5),
        lambda p, m: (h := p.masked_fill(m[:, :1], 0.0)) + h.mean(),
    ],
    ids=["of the keys", "with another number", "read twice"],
)
def test_other_fills_after_the_softmax_stay(filled):
    refused(lambda q, k, v: filled(torch.softmax((q @ k.mT).masked_fill(HIDDEN, LOW), -1), HIDDEN.flip(0)) @ v, Q, K, V)


@pytest.mark.parametrize("finite", [torch.nan_to_num, lambda s: s.nan_to_num(0.0, posinf=1e4)])
def test_scores_made_finite_before_their_mask(finite):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return torch.softmax(finite(q @ k.mT * 0.4).masked_fill(HIDDEN, -math.inf), -1) @ v

    assert only(Attention(), Q, K, V).scale == 0.4
    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]
    said = refused(lambda q, k, v: torch.softmax(finite((q @ k.mT).masked_fill(HIDDEN, -math.inf)), -1) @ v, Q, K, V)
    assert said == "a mask is applied before the scores are clamped"


AFTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mask of heads": lambda p, w: p * w[:, 0, 0].view(1, 4, 1, 1),
    "a mask of queries": lambda p, w: (torch.arange(6) < 4)[:, None] * F.dropout(p, 0.0),
    "a gate of queries": lambda p, w: p * w[..., :1].sigmoid(),
    "a number": lambda p, w: p * 0.5 / 3,
    "divided": lambda p, w: p / w[:, :1, :1].exp(),
    "a learned scale": lambda p, w: w.mean() * p,
}


class After(nn.Module):
    def __init__(self, after: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.after, self.weight = after, nn.Parameter(BIAS[0].clone())

    def forward(self, q, k, v):
        return self.after(torch.softmax((q @ k.mT).masked_fill(HIDDEN, -math.inf), -1), self.weight) @ v


@pytest.mark.parametrize("name", AFTER)
def test_a_factor_that_all_keys_share_joins_the_output(name):
    assert only(After(AFTER[name]), Q, K, V).scale == 1.0
    assert blocks.assert_exact_is_eager(After(AFTER[name]), Q, K, V) == ["attention"]


@pytest.mark.parametrize(
    "after",
    [
        lambda p, w: p * w,
        lambda p, w: p * w[:, :1],
        lambda p, w: 1.0 / p.clamp(min=0.1),
        lambda p, w: (h := p * w[..., :1]) + h.mean(),
        lambda p, w: p * p,
    ],
    ids=["of each pair", "of each key", "turned around", "read twice", "squared"],
)
def test_other_factors_after_the_softmax_stay(after):
    refused(After(after), Q, K, V)


DIFFERENCES: dict[str, Callable[..., Tensor]] = {
    "a learned share": lambda p, r, w: p - w.mean() * r,
    "a share of each head": lambda p, r, w: p - w[:, :1, :1].exp() * r,
    "both weighted, summed": lambda p, r, w: 0.25 * p + r / 2,
    "dropped out": lambda p, r, w: F.dropout(p, 0.0) - F.dropout(r, 0.0),
}


class Difference(nn.Module):
    def __init__(self, difference: Callable[..., Any]):
        super().__init__()
        self.difference, self.weight = difference, nn.Parameter(BIAS[0].clone())

    def forward(self, q, k, v):
        (q, r), (k, s) = q.chunk(2, -1), k.chunk(2, -1)
        p, r = (torch.softmax((a @ b.mT * 0.4).masked_fill(HIDDEN, -math.inf), -1) for a, b in ((q, k), (r, s)))
        return self.difference(p, r, self.weight) @ v


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_of_two_softmaxes_is_two_attentions(name):
    matches, skipped = sites(Difference(DIFFERENCES[name]), Q, K, V)
    assert len(matches) == 2 and not skipped
    assert blocks.assert_exact_is_eager(Difference(DIFFERENCES[name]), Q, K, V) == ["attention"] * 2


PAIRS: dict[str, Callable[..., Tensor]] = {
    "neighbouring heads": lambda p, w: (p := p.view(2, 2, 2, 6, 6))[:, :, 0] - w.mean() * p[:, :, 1],
    "halves of the heads": lambda p, w: (p := p.view(2, 2, 2, 6, 6))[:, 0] - p[:, 1] / 3,
    "each of two weighted": lambda p, w: (p := p.view(2, 2, 2, 6, 6))[:, :, 0] * w[:1, :1, :1] + 0.5 * p[:, :, 1],
}


class Pairs(nn.Module):
    def __init__(self, difference: Callable[..., Any]):
        super().__init__()
        self.difference, self.weight = difference, nn.Parameter(BIAS[0].clone())

    def forward(self, q, k, v):
        p = torch.softmax(torch.nan_to_num(q @ k.mT * 0.4) + torch.full((6, 6), -math.inf, dtype=q.dtype).triu(1), -1)
        return self.difference(p, self.weight) @ v[:, :2]


@pytest.mark.parametrize("name", PAIRS)
def test_a_difference_of_the_heads_of_one_softmax_is_one_of_outputs(name):
    assert only(Pairs(PAIRS[name]), Q, K, V).v.meta["example_value"].shape[1] == 4
    assert blocks.assert_exact_is_eager(Pairs(PAIRS[name]), Q, K, V) == ["attention"]


@pytest.mark.parametrize(
    "difference",
    [
        lambda p, w: (p := p.view(2, 2, 2, 6, 6))[:, :, 0] - w[:2] * p[:, :, 1],
        lambda p, w: (p := p.view(2, 2, 2, 6, 6))[:, :, 0] - p[:, 1],
        lambda p, w: (p := p.view(2, 2, 2, 6, 6))[:, :, 0] - p[:, :, 1] + p.mean(2),
    ],
    ids=["weighted by pairs", "of two dims", "read elsewhere"],
)
def test_other_differences_of_heads_stay(difference):
    refused(Pairs(difference), Q, K, V)


@pytest.mark.parametrize(
    "difference",
    [lambda p, r, w: p - w * r, lambda p, r, w: (p - r).relu(), lambda p, r, w: (d := p - r) / d.sum(), lambda p, r, w: p - w],
    ids=["weighted by pairs", "rectified", "read twice", "less no softmax"],
)
def test_other_differences_of_softmaxes_stay(difference):
    matches, skipped = sites(Difference(difference), Q, K, V)
    assert len(matches) <= 1 and skipped


@pytest.mark.parametrize(
    "cleaned",
    [
        lambda p: p.nan_to_num(),
        lambda p: F.dropout(torch.nan_to_num(p, nan=0.0), 0.0),
        lambda p: p.masked_fill(p.isnan(), 0.0),
        lambda p: torch.where(torch.isnan(p), torch.zeros_like(p), p),
        lambda p: p.masked_fill(p != p, 0),
    ],
)
def test_probabilities_that_are_nan_set_to_zero(cleaned):
    rows = HIDDEN.clone()
    rows[2] = True

    class Attention(nn.Module):
        def forward(self, q, k, v):
            return cleaned(torch.softmax((q @ k.mT).masked_fill(rows, -math.inf), -1)) @ v

    assert only(Attention(), Q, K, V).empty == "zero"
    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]
    kept = only(lambda q, k, v: cleaned(torch.softmax((q @ k.mT).masked_fill(rows, LOW), -1)) @ v, Q, K, V)
    assert kept.empty == "uniform"  # no nan: there is nothing to set


def test_softmin_is_softmax_of_the_negative():
    assert only(lambda q, k, v: F.softmin(q @ k.mT * 0.5, dim=3) @ v, Q, K, V).scale == -0.5
    assert only(lambda q, k, v: nn.Softmin(-1)(BIAS - q @ k.mT) @ v, Q, K, V).bias[0][1] == -1.0


def test_a_clamp_far_out_guards_against_overflow():
    c = only(lambda q, k, v: torch.softmax((q @ k.mT).clamp(min=-5e4).clamp(max=5e4) * 0.5 + PADDING, -1) @ v, Q, K, V)
    assert c.scale == 0.5 and len(c.bias) == 1


@pytest.mark.parametrize(
    "shift",
    [
        lambda s: s - s.max(),
        lambda s: s - s.max(-1, keepdim=True)[0],
        lambda s: (s / 32.0 - (s / 32.0).amax(-1).unsqueeze(-1)) * 32.0,
        lambda s: torch.clamp(s - s.max(), min=-5e4) + PADDING,
    ],
)
def test_a_maximum_that_is_subtracted_is_softmax_s_own_business(shift):
    def function(q, k, v):
        return torch.softmax(shift(q @ k.mT).masked_fill(HIDDEN, LOW), -1) @ v

    assert only(function, Q, K, V).scale == pytest.approx(1.0)


@pytest.mark.parametrize(
    "softmax",
    [
        lambda s: F.log_softmax(s, -1).exp(),
        lambda s: torch.exp(s.log_softmax(dim=3)),
        lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
        lambda s: (lambda e: e / e.sum(-1, keepdim=True))(torch.exp(s - s.max(-1, keepdim=True)[0])),
        lambda s: (lambda e: e / torch.sum(e, dim=3, keepdim=True))((s - s.amax(-1, keepdim=True).detach()).exp()),
    ],
)
def test_a_softmax_by_hand(softmax):
    c = only(lambda q, k, v: softmax((q @ k.mT * 0.3).masked_fill(~CAUSAL, -math.inf)) @ v, Q, K, V)
    assert c.scale == pytest.approx(0.3) and len(c.allowed) == 1


def test_a_softmax_by_hand_that_may_overflow_says_so():
    assert "they may overflow" in refused(lambda q, k, v: (e := torch.exp(q @ k.mT)) / e.sum(-1, keepdim=True) @ v, Q, K, V)


def test_a_softmax_by_hand_that_divides_the_values():
    def function(q, k, v):
        e = torch.exp((s := q @ k.mT) - s.amax(-1, keepdim=True))
        return (e @ v) / e.sum(-1, keepdim=True)

    assert only(function, Q, K, V).scale == 1.0


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.exp(q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)).sum(-1, keepdim=True) * v,
        lambda q, k, v: (e := torch.exp(q @ k.mT - 1.0)) / e.sum(-1, keepdim=True) @ v,  # it may overflow
        lambda q, k, v: (e := torch.exp((s := q @ k.mT) - s.amax(-1, keepdim=True))) / (1 + e.sum(-1, keepdim=True)) @ v,
        lambda q, k, v: (e := torch.exp((s := q @ k.mT) - s.amax(-1, keepdim=True))) / e.sum(-2, keepdim=True) @ v,
        lambda q, k, v: ((s := q @ k.mT) - s.logsumexp(-2, keepdim=True)).exp() @ v,
    ],
)
def test_exponentials_that_are_no_softmax_over_the_keys(function):
    assert not sites(function, Q, K, V)[0]


@pytest.mark.parametrize(
    "function, reason",
    [
        (
            lambda q, k, v, w: torch.softmax(F.linear((q @ k.mT).permute(0, 2, 3, 1), w).permute(0, 3, 1, 2), -1) @ v,
            "the scores of the heads (talking heads)",
        ),
        (
            lambda q, k, v, w: torch.softmax(torch.einsum("bhqk,hg->bgqk", q @ k.mT, w), -1) @ v,
            "the scores of the heads (talking heads)",
        ),
        (
            lambda q, k, v, w: torch.softmax(torch.einsum("gh,bhqk->bgqk", w, (q @ k.mT * 0.5).masked_fill(HIDDEN, LOW)), -1) @ v,
            "the scores of the heads (talking heads)",
        ),
        (  # one head of values: the weights could pass for queries, and the scores for their keys
            lambda q, k, v, w: torch.softmax(torch.einsum("bhqk,hg->bgqk", q @ k.mT, w), -1) @ v[:, :1],
            "the scores of the heads (talking heads)",
        ),
        (
            lambda q, k, v, w: torch.einsum("bhqk,hg->bgqk", torch.softmax(q @ k.mT, -1), w) @ v,
            "the probabilities of the heads (talking heads)",
        ),
        (
            lambda q, k, v, w: F.linear(F.dropout(torch.softmax(q @ k.mT, -1), 0.1).permute(0, 2, 3, 1), w).permute(0, 3, 1, 2) @ v,
            "the probabilities of the heads (talking heads)",
        ),
        (
            lambda q, k, v, w: torch.softmax(F.conv2d(q @ k.mT, w[..., None, None]), -1) @ v,
            "the scores of the heads (talking heads)",
        ),
        (
            lambda q, k, v, w: F.conv2d(torch.softmax(q @ k.mT, -1), w[..., None, None]) @ v,
            "the probabilities of the heads (talking heads)",
        ),
        (
            lambda q, k, v, w: torch.softmax(F.conv2d(q @ k.mT, w[..., None, None].expand(4, 4, 3, 3), padding=1), -1) @ v,
            "conv2d between the scores and the softmax",
        ),
        (lambda q, k, v, w: torch.softmax((q @ k.mT).detach(), -1) @ v, "detach between the scores"),
        (lambda q, k, v, w: torch.softmax(q @ k.mT, -1).detach() @ v, "detach between the softmax"),
        (lambda q, k, v, w: torch.softmax(F.pad(q @ k.mT, (0, 1)), -1)[..., :-1].square() @ v, "joined with others"),
        (lambda q, k, v, w: torch.softmax(-torch.cdist(q, k).square().masked_fill(HIDDEN, 50.0), -1) @ v, "does not hide"),
    ],
    ids=[
        *("talking heads", "by einsum", "by einsum, masked", "by einsum, one head of values", "by einsum, after", "dropped, after"),
        *("by convolution", "by convolution, after", "of neighbours", "detached scores", "detached probabilities"),
        *("a key that is padded", "distances with a weak mask"),
    ],
)
def test_near_misses_are_named(function, reason):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(numbers(4, 4))

        def forward(self, q, k, v):
            return function(q, k, v, self.weight)

    assert reason in refused(Mixed(), Q, K, V)


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("sizes", [(6, 8), (4, 6, 8), (1, 1, 6, 8), (1, 4, 6, 8), (2, 1, 6, 8)])
def test_queries_that_all_rows_share(sizes, library):
    """Learned queries, of all rows or of each head: they are expanded, and their gradient is the sum over the rows."""

    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(numbers(*sizes))

        def forward(self, k, v):
            if library:
                return F.scaled_dot_product_attention(self.queries, k, v)
            return torch.softmax(self.queries @ k.mT * 0.5 + BIAS, -1) @ v

    assert blocks.assert_exact_is_eager(Pooling(), K, V) == ["attention"]
    assert only(Pooling(), K, V, dynamic=True).q.meta["example_value"].dim() == 4


def test_keys_and_values_that_all_rows_share():
    class Bank(nn.Module):
        def forward(self, q, k, v):
            return torch.softmax(q @ k.mT, -1) @ v

    assert blocks.assert_exact_is_eager(Bank(), Q, K[0, 0], V[0, 0]) == ["attention"]
    assert blocks.assert_exact_is_eager(Bank(), Q, K[0], V[0]) == ["attention"]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_values_that_all_heads_share(dropout):
    """Interpretable attention (temporal fusion transformers); keys of as many heads as values are a group."""

    def function(q, k, v):
        return F.dropout(torch.softmax((q @ k.mT).masked_fill(HIDDEN, LOW), -1), dropout) @ v[:, 0].unsqueeze(1)

    assert only(function, Q, K, V).v.meta["example_value"].shape[1] == 4
    assert only(lambda q, k, v: function(q, k[:, :1], v), Q, K, V).v.meta["example_value"].shape[1] == 1

    class Shared(nn.Module):
        def forward(self, q, k, v):
            return function(q, k, v)

    if not dropout:
        assert blocks.assert_exact_is_eager(Shared(), Q, K, V) == ["attention"]


class Planes(nn.Module):
    """Attention over the keys of a plane, by einsum."""

    def __init__(self, scores: str, values: str, dim: int):
        super().__init__()
        self.scores, self.values, self.dim = scores, values, dim

    def forward(self, q, k, v):
        s = torch.einsum(self.scores, q, k) * 0.5
        return torch.einsum(self.values, s.flatten(self.dim).softmax(-1).view(*q.shape[:-1], *k.shape[1:3]), v)


@pytest.mark.parametrize(
    "planes, queries",
    [
        (Planes("bijd,bkld->bijkl", "bijkl,bkld->bijd", 3), Q),
        (Planes("bid,bkld->bikl", "bikl,bkld->bid", 2), Q[:, 0]),
    ],
    ids=["planes", "rows"],
)
def test_keys_of_a_plane(planes, queries):
    assert blocks.assert_exact_is_eager(planes, queries, K, V) == ["attention"]
    assert blocks.assert_exact_at_any_length(planes, queries, K, V) == ["attention"]


def test_keys_of_a_plane_of_which_the_softmax_sees_rows_stay():
    class Rows(nn.Module):
        def forward(self, q, k, v):
            return torch.einsum("bikl,bkld->bid", torch.einsum("bid,bkld->bikl", q, k).softmax(-1), v)

    assert blocks.assert_exact_is_eager(Rows(), Q[:, 0], K, V) == []
    assert "change shape" in refused(Rows(), Q[:, 0], K, V)


@pytest.mark.parametrize("shared", ["scores", "both"])
def test_a_second_product_of_keys_that_heads_share(shared):
    """Latent attention: a part of the queries meets keys of each head, or a latent for all of them, another the rotated keys."""

    class Latent(nn.Module):
        def forward(self, q, k, v, rotated):
            keys, values = (k, v) if shared == "scores" else (k[:, :, 0], k[:, :, 0])
            own = "bthd" if shared == "scores" else "btd"
            s = torch.einsum(f"bshd,{own}->bsht", q[..., :6], keys[..., :6]) + torch.einsum("bshd,btd->bsht", q[..., 6:], rotated)
            s = s * 0.4 + torch.full((q.shape[1], q.shape[1]), -math.inf).triu_(1).unsqueeze(1)
            return torch.einsum(f"bsht,{own}->bshd", s.softmax(-1).type_as(q), values)

    inputs = [*(x.transpose(1, 2) for x in (Q, K[:, :, :6], V[:, :, :6])), K[:, 1, :6, :2]]
    assert blocks.assert_exact_is_eager(Latent(), *inputs) == ["attention"]


class RelativePlane(nn.Module):
    """Positions along the rows and the columns of an image, each a bias to scores that are seen as a plane for it."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function
        self.rows, self.columns = nn.Parameter(numbers(2, 2, 8, seed=6)), nn.Parameter(numbers(3, 3, 8, seed=7))

    def forward(self, q, k, v):
        plane = q.view(q.shape[0], 2, 3, 8)
        rows = torch.einsum("bhwc,hkc->bhwk", plane, self.rows)[..., None]
        columns = torch.einsum("bhwc,wkc->bhwk", plane, self.columns)[..., None, :]
        return self.function((q @ k.mT * 0.5).view(-1, 2, 3, 2, 3), rows, columns).reshape(-1, 6, 6).softmax(-1) @ v


PLANE_BIASES: dict[str, Callable] = {
    "both": lambda s, rows, columns: s + rows + columns,
    "one": lambda s, rows, columns: rows + s,
    "in place": lambda s, rows, columns: s.add_(rows).add_(columns),
}


@pytest.mark.parametrize("name", PLANE_BIASES)
def test_biases_of_a_plane(name):
    model, inputs = RelativePlane(PLANE_BIASES[name]), [x[:, 0] for x in (Q, K, V)]
    assert blocks.assert_exact_is_eager(model, *inputs) == ["attention"]
    compiled = torch.compile(model, backend="spt", options={**blocks.EXACT, "inner": "eager"})
    for batch in (2, 1, 3):  # the last two through a graph of symbolic batch
        given = [x.repeat(2, 1, 1)[:batch] for x in inputs]
        blocks.assert_same(blocks.gradients(model, compiled, *given), blocks.gradients(model, model, *given), 1e-6, 1e-6)
    assert {row.status for rows in debug.reports() for row in rows} == {"replaced"}


@pytest.mark.parametrize(
    "function",
    [
        lambda s, rows, columns: (s + rows).transpose(1, 2),
        lambda s, rows, columns: s + rows + s.sum(),
        lambda s, rows, columns: (s + rows) * columns,
    ],
    ids=["turned", "read twice", "a factor"],
)
def test_other_steps_in_a_plane_stay(function):
    model, inputs = RelativePlane(function), [x[:, 0] for x in (Q, K, V)]
    assert blocks.assert_exact_is_eager(model, *inputs) == []
    assert "scores" in refused(model, *inputs)


class Pool(nn.Module):
    """Tokens that learned vectors score, and `function` that sums them."""

    def __init__(self, function: Callable, wanted: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.score, self.key, self.one = nn.Linear(8, wanted).double(), nn.Linear(8, 8).double(), nn.Linear(8, 1).double()
        self.query = nn.Parameter(numbers(8))

    def forward(self, x):
        return self.function(self, x)


TOKENS = numbers(2, 6, 8, seed=4)
PADDED = torch.arange(6) > 3


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.softmax(m.score(x), 1).mT @ x,
        lambda m, x: torch.softmax(m.score(torch.tanh(m.key(x))).transpose(1, 2), -1) @ x,
        lambda m, x: torch.einsum("bth,bte->bhe", m.score(x).softmax(dim=-2), m.key(x)),
        lambda m, x: F.dropout(torch.softmax((m.score(x) * 0.5).masked_fill(PADDED[:, None], LOW), 1), 0.0).mT @ m.key(x),
        lambda m, x: torch.softmax(F.linear(x, m.score.weight).mT.masked_fill(PADDED, -math.inf), -1) @ x,
    ],
    ids=["plain", "of keys", "einsum", "masked, dropped", "without a bias"],
)
def test_a_layer_over_tokens_is_learned_queries(function):
    """Pooling by several learned vectors: the rows of the layer's weight attend to the tokens."""
    assert only(Pool(function), TOKENS).q.meta["example_value"].shape[-2] == 3
    assert blocks.assert_exact_is_eager(Pool(function), TOKENS) == ["attention"]


def test_learned_queries_of_a_layer_at_symbolic_lengths():
    model = Pool(lambda m, x: torch.softmax(m.score(torch.tanh(m.key(x))), 1).mT @ x)
    assert blocks.assert_exact_at_any_length(model, TOKENS) == ["attention"]


ONE_VECTOR: dict[str, Callable[[Pool, Tensor], Tensor]] = {
    "a layer of one": lambda m, x: (torch.softmax(m.one(x), 1) * x).sum(1),
    "a layer of one, masked": lambda m, x: (m.one(x).masked_fill(PADDED[:, None], LOW).softmax(dim=1) * x).sum(dim=1),
    "a mask and a layer of one": lambda m, x: ((LOW * PADDED[:, None] + m.one(x)).softmax(dim=1) * x).sum(dim=1),
    "a layer of one by a product": lambda m, x: torch.softmax(m.one(x), 1).mT @ x,
    "a layer of one of keys": lambda m, x: torch.softmax(m.one(torch.tanh(m.key(x))).squeeze(-1), -1)[:, None] @ x,
    "by einsum": lambda m, x: torch.einsum("bt,bte->be", torch.softmax(m.one(x)[..., 0], -1), x),
    "a vector": lambda m, x: torch.softmax(x @ m.query, -1).unsqueeze(1) @ m.key(x),
    "a vector by a sum": lambda m, x: (torch.softmax((x * m.query).sum(-1), 1)[..., None] * x).sum(1),
    "one query without a batch": lambda m, x: torch.softmax(x[0, 0] @ m.key(x[0]).mT * 0.3, -1) @ x[0],
    "a learned query without a batch": lambda m, x: torch.softmax(m.query @ m.key(x[0]).mT, -1) @ x[0],
    "keys times a query": lambda m, x: torch.softmax(m.key(x[0]) @ m.query, -1) @ x[0],
    "a row of a layer": lambda m, x: torch.softmax(F.linear(x, m.score.weight[:1]), 1).mT @ x,
}


@pytest.mark.parametrize("name", ONE_VECTOR)
def test_one_query_for_all_tokens_says_so(name):
    sites = spt_compiler.explain(Pool(ONE_VECTOR[name]), TOKENS, options=blocks.EXACT).sites
    (site,) = (s for s in sites if s.kind == "attention")
    assert site.status == "skipped" and "queries of length 1" in site.reason


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.einsum("bth,bthd->bhd", m.score(x).softmax(1), x[..., :6].reshape(2, 6, 3, 2)),  # one query each
        lambda m, x: torch.softmax(s := m.score(x), 1).mT @ x + s.sum(),
    ],
    ids=["values of each", "scores read twice"],
)
def test_other_pooling_by_a_layer_says_so(function):
    assert "a linear layer of the tokens makes the scores" in refused(Pool(function), TOKENS)
    assert blocks.assert_exact_is_eager(Pool(function), TOKENS) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.softmax(m.score(x), -1) @ m.score.weight,  # over features: a mixture
        lambda m, x: torch.softmax(m.one(x), 1) * x,  # no sum
        lambda m, x: torch.softmax(m.one(x), -1) * x,  # of one number
        lambda m, x: torch.softmax(m.score(x), 1),  # no values
        lambda m, x: x.softmax(-1) @ (m.key(x).view(2, 6, 2, 4).transpose(1, 2).softmax(2).mT @ x[:, None]).flatten(1, 2),
        lambda m, x: F.cross_entropy(m.score(x).flatten(0, 1), x[..., 0].flatten().long() % 3),
    ],
)
def test_what_is_no_pooling_is_not_reported(function):
    matches, skipped = sites(Pool(function), TOKENS, check=False)
    assert not [m for m in (*matches, *skipped) if (m.pattern.kind if hasattr(m, "pattern") else m.kind) == "attention"]


class Projected(nn.Module):
    """Projections around an attention by products with copies of one weight, or by inner products."""

    def __init__(self, project: Callable):
        super().__init__()
        torch.manual_seed(0)
        self.project = project
        self.q, self.k, self.v, self.o = (nn.Parameter(numbers(8, 8, seed=i)) for i in range(4))

    def forward(self, x):
        q, k, v = (self.project(x, w) for w in (self.q, self.k, self.v))
        return self.project(torch.softmax(q @ k.mT * 0.2, -1) @ v, self.o)


@pytest.mark.parametrize(
    "project",
    [
        lambda x, w: torch.bmm(x, w.t().unsqueeze(0).expand(x.shape[0], -1, -1)),
        lambda x, w: x @ w.t().expand(x.shape[0], -1, -1),
        lambda x, w: torch.bmm(x, w.repeat(x.shape[0], 1, 1).transpose(1, 2)),
        lambda x, w: torch.inner(x, w),
    ],
)
def test_projections_with_copies_of_a_weight(project):
    (captured,) = models.capture(Projected(project), TOKENS)
    module = copy_graph(captured.module)
    canonicalize(module)
    assert [n.target for n in module.graph.nodes].count(F.linear) == 4
    assert only(Projected(project), TOKENS)
    assert blocks.assert_exact_is_eager(Projected(project), TOKENS) == ["attention"]


@pytest.mark.parametrize(
    "every",
    [
        lambda w: w.unsqueeze(0).expand(2, -1, -1),
        lambda w: w.expand(2, -1, -1),
        lambda w: w.repeat(2, 1, 1),
        lambda w: w.unsqueeze(0),
    ],
)
def test_learned_keys_and_values_of_every_row_stay_keys_and_values(every):
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Parameter(numbers(7, 8)), nn.Parameter(numbers(7, 5, seed=1))

        def forward(self, x):
            return torch.softmax(x @ every(self.keys).mT, -1) @ every(self.values)

    assert blocks.assert_exact_is_eager(Memory(), TOKENS) == ["attention"]


def test_scores_by_inner_products():
    assert not only(lambda q, k, v: torch.softmax(torch.inner(q, k) * 0.5, -1) @ v, Q[0, 0], K[0, 0], V[0, 0]).bias
    assert sites(lambda q, k: torch.softmax(torch.inner(q, k), -1), Q[0, 0], K[0, 0]) == ([], [])


def test_two_modalities_that_attend_by_one_product():
    def function(q, k, a, b):
        s = torch.clamp((s := q @ k.mT) - s.max(), min=-5e4, max=5e4)
        t = s.mT
        back = torch.softmax((t - t.amax(-1, keepdim=True)).masked_fill(~CAUSAL, -math.inf), -1) @ a
        return torch.softmax(s, -1) @ b, back

    matches, skipped = sites(function, Q, K, V, V)
    assert len(matches) == 2 and not skipped, [str(s.reason) for s in skipped]


def test_a_mask_of_the_shape_of_the_scores_reads_no_scores():
    rows = CAUSAL[0].logical_not().view(1, 1, 1, 6)
    c = only(lambda q, k, v: torch.softmax((s := q @ k.mT).masked_fill_(rows.expand_as(s), LOW), -1) @ v, Q, K, V)
    assert len(c.disallowed) == 1


@pytest.mark.parametrize("name", ["where, full_like", "mask of ones_like", "mask of integers", "distances of integers"])
def test_masks_made_of_fills_and_integers_are_exact(name):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return torch.softmax(CHAINS[name][0](q @ k.mT), -1) @ v

    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == ["attention"]
    assert only(Attention(), Q, K, V, dynamic=True)


def test_a_bool_mask_that_is_added_adds_one():
    assert len(only(lambda q, k, v: torch.softmax(q @ k.mT + CAUSAL, -1) @ v, Q, K, V).bias) == 1


def test_windows_that_are_split_off_the_batch_for_their_mask():
    """Shifted windows: the bias of a head first, then a view with the windows apart, their mask, and back."""
    bias, windows = numbers(1, 4, 6, 6, seed=4), numbers(3, 6, 6, seed=5)

    def function(q, k, v):
        s = q @ k.mT * 0.5 + bias
        s = s.view(2, 3, 4, 6, 6) + windows[None, :, None]
        return torch.softmax(s.view(-1, 4, 6, 6), -1) @ v

    c = only(function, *(numbers(6, 4, 6, 8, seed=i) for i in range(3)))
    assert c.scale == 0.5 and len(c.bias) == 2


def test_a_learned_scale_goes_to_the_queries():
    tau = numbers(4, 1, 1, seed=8).requires_grad_()
    c = only(lambda q, k, v, t: torch.softmax(q @ k.mT * t.exp() + BIAS, -1) @ v, Q, K, V, tau)
    assert c.scale == 1.0 and not c.scale_nodes and len(c.bias) == 1


def test_a_learned_scale_under_autocast():
    """The product is narrow, the scale of each head is not, and their product is as wide as that."""

    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 2.0, 4).view(4, 1, 1))

        def forward(self, q, k, v):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return (torch.softmax(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.scale.exp(), -1) @ v).float()

    module, inputs = Cosine(), [x.float() for x in (Q, K, V)]
    expected = blocks.gradients(module, module, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="spt", options={**blocks.EXACT, "inner": "eager"})
    blocks.assert_same(blocks.gradients(module, compiled, *inputs), expected, rtol=1e-2, grad_rtol=3e-2)
    assert [row.status for rows in debug.reports() for row in rows] == ["replaced"]


def _in_full(function: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return function()


TWO_MODES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "softmax in full": lambda q, k, v, b: _in_full(lambda s=q @ k.mT: torch.softmax(s.float() * 0.3, -1)).to(v.dtype) @ v,
    "softmax in full, a bias": lambda q, k, v, b: _in_full(lambda s=q @ k.mT: torch.softmax(s.float() + b, -1)) @ v,
    "scores in full": lambda q, k, v, b: _in_full(lambda: torch.softmax(q.float() @ k.float().mT + b, -1)).to(v.dtype) @ v,
    "scores in full, by einsum": lambda q, k, v, b: torch.einsum(
        "bhij,bhjd->bhid", _in_full(lambda: torch.einsum("bhid,bhjd->bhij", q.float(), k.float()).softmax(-1)), v
    ),
    "values in full": lambda q, k, v, b: _in_full(lambda s=q @ k.mT: torch.softmax(s.float() + b, -1) @ v.float()),
}


@pytest.mark.parametrize("name", TWO_MODES)
def test_parts_under_another_autocast_mode(name):
    """What is narrow in the model may be wide in the site, and never the other way round."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.bias = nn.Linear(8, 24), nn.Parameter(BIAS.float())

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return TWO_MODES[name](*self.qkv(x).chunk(3, -1), self.bias).float()

    torch.manual_seed(0)
    module, x = Model(), Q.float() * 3
    expected = blocks.gradients(module, module, x)
    torch._dynamo.reset()
    got = blocks.gradients(module, torch.compile(module, backend="spt", options={**blocks.EXACT, "inner": "eager"}), x)
    assert [row.status for rows in debug.reports() for row in rows] == ["replaced"]
    full = blocks.gradients(module, lambda x: TWO_MODES[name](*module.qkv(x).chunk(3, -1), module.bias), x)
    assert got[1].keys() == expected[1].keys() and got[0].dtype == expected[0].dtype
    for g, e, f in [(got[0], expected[0], full[0]), *((got[1][n], expected[1][n], full[1][n]) for n in got[1])]:
        assert (g - f).norm() <= 2 * (e - f).norm() + 1e-6 * f.norm()


def test_scores_of_another_grad_mode_stay():
    def function(q, k, v):
        with torch.no_grad():
            s = q @ k.mT
        return torch.softmax(s, -1) @ v

    assert "another grad or autocast mode" in refused(function, Q, K, V)


def test_length_and_width_may_differ():
    q, k, v = numbers(2, 4, 3, 8), numbers(2, 4, 9, 8, seed=1), numbers(2, 4, 9, 2, seed=2)
    only(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, q, k, v)
    only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k, v)


def test_two_sites_that_share_keys():
    def function(q, k, v):
        kt = k.mT
        return torch.softmax(q @ kt, -1) @ v + torch.softmax((q * 2) @ kt, -1) @ v

    matches, skipped = sites(function, Q, K, V)
    assert len(matches) == 2 and not skipped
    assert not set(matches[0].nodes) & set(matches[1].nodes)


# ---------------------------------------------------------------------------------------------------------------------
# Near misses: one flaw each
# ---------------------------------------------------------------------------------------------------------------------

NEAR_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "probabilities returned": (lambda q, k, v: ((p := torch.softmax(q @ k.mT, -1)) @ v, p), "also returned"),
    "probabilities used again": (lambda q, k, v: (p := torch.softmax(q @ k.mT, -1)) @ v + p.sum(), "also used by .sum"),
    "scores used again": (lambda q, k, v: torch.softmax(s := q @ k.mT, -1) @ v + s.mean(), "also used by .mean"),
    "softmax over the queries": (lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v, "softmax over dim 2"),
    "softmax over the heads": (lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v, "softmax over dim 1"),
    "mask after the softmax": (
        lambda q, k, v: (torch.softmax(q @ k.mT, -1) * CAUSAL) @ v,
        "a mask or factor is applied after the softmax",
    ),
    "fill after the softmax": (
        lambda q, k, v: torch.softmax(q @ k.mT, -1).masked_fill(HIDDEN, 0.0) @ v,
        "a mask or factor is applied after the softmax",
    ),
    "scale that needs a gradient": (
        lambda q, k, v: torch.softmax((q @ k.mT + BIAS) * q.mean(), -1) @ v,
        "the scale is a tensor that needs a gradient",
    ),
    "scale after a bias as a tensor": (
        lambda q, k, v: torch.softmax((q @ k.mT + BIAS) * TENSOR_SCALE, -1) @ v,
        "a bias is added multiplied by a tensor",
    ),
    "factor per key": (
        lambda q, k, v: torch.softmax((q @ k.mT) * CAUSAL.double(), -1) @ v,
        "multiplied by a tensor that varies",
    ),
    "divided by a tensor": (lambda q, k, v: torch.softmax((q @ k.mT) / (BIAS + 9), -1) @ v, "divided by, or divide"),
    "fill that does not hide": (
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(HIDDEN, -100.0), -1) @ v,
        "set to -100.0, which does not hide",
    ),
    "fill turned around": (
        lambda q, k, v: torch.softmax(-((q @ k.mT).masked_fill(HIDDEN, -1e9)), -1) @ v,
        "does not hide",
    ),
    "fill with a tensor": (
        lambda q, k, v: torch.softmax(torch.where(CAUSAL, q @ k.mT, BIAS), -1) @ v,
        "taken from a tensor",
    ),
    "fill with a tensor that is written": (
        lambda q, k, v: torch.softmax(torch.where(CAUSAL, q @ k.mT, _ramp(torch.full((6, 6), -1e9, dtype=q.dtype))), -1) @ v,
        "taken from a tensor",
    ),
    "fills of two kinds": (
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(HIDDEN, -1e9).masked_fill(PADDING < 0, -math.inf), -1) @ v,
        "fill with different values",
    ),
    "weak fill and a bias": (
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(HIDDEN, -1e9) + q[..., :6], -1) @ v,
        "fully masked rows depend on both",
    ),
    "clamped": (lambda q, k, v: torch.softmax((q @ k.mT).clamp(-5, 5) + PADDING, -1) @ v, "clamped to [-5, 5]"),
    "bias inside of a soft cap": (
        lambda q, k, v: torch.softmax(9 * torch.tanh((q @ k.mT + BIAS) / 9), -1) @ v,
        "inside of the soft cap",
    ),
    "soft cap by a tensor": (
        lambda q, k, v: torch.softmax(torch.tanh((q @ k.mT) / TENSOR_SCALE) * TENSOR_SCALE, -1) @ v,
        "the soft cap is a tensor",
    ),
    "another function of the scores": (lambda q, k, v: torch.softmax(F.relu(q @ k.mT), -1) @ v, "relu between"),
    "distances": (lambda q, k, v: torch.softmax(-torch.cdist(q, k), -1) @ v, "the scores are distances"),
    "distances of another kind": (lambda q, k, v: torch.softmax(-torch.cdist(q, k, p=1) ** 2, -1) @ v, "the scores are distances"),
    "distances by differences": (
        lambda q, k, v: torch.softmax(-(q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1), -1) @ v,
        "the scores are squared differences",
    ),
    "distances by differences that are multiplied": (
        lambda q, k, v: torch.softmax(-((d := (q[:, :, :, None] - k[:, :, None]) / 3) * d).mean(-1), -1) @ v,
        "the scores are squared differences",
    ),
    "distances by weighted differences": (
        lambda q, k, v: torch.softmax(((k[:, :, None] - q[:, :, :, None]) ** 2 * BIAS[0, 0, 0, 0]).sum(-1) * -0.5, -1) @ v,
        "the scores are squared differences",
    ),
    "absolute differences": (
        lambda q, k, v: torch.softmax(-(q[:, :, :, None] - k[:, :, None]).abs().sum(-1), -1) @ v,
        "the scores are distances",
    ),
    "lengths of differences": (
        lambda q, k, v: torch.softmax(-(q[:, :, :, None] - k[:, :, None]).norm(dim=-1) ** 2, -1) @ v,
        "the scores are distances",
    ),
    "lengths by linalg": (
        lambda q, k, v: torch.softmax(-torch.linalg.vector_norm(q[:, :, :, None] - k[:, :, None], dim=-1), -1) @ v,
        "the scores are distances",
    ),
    "distances of pairs": (
        lambda q, k, v: torch.softmax(-F.pairwise_distance(q[:, :, :, None], k[:, :, None]), -1) @ v,
        "the scores are distances",
    ),
    "cosines": (
        lambda q, k, v: torch.softmax(F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1) * 9, -1) @ v,
        "the scores are made by cosine_similarity",
    ),
    "additive, a layer of vectors": (
        lambda q, k, v: torch.softmax(F.linear(torch.tanh(q[:, :, :, None] + k[:, :, None]), q[0, 0, :1])[..., 0], -1) @ v,
        "additive attention",
    ),
    "additive, a number each": (
        lambda q, k, v: torch.softmax(F.leaky_relu(q[..., :1] + k[..., :1].mT, 0.2).masked_fill(HIDDEN, -9e15), -1) @ v,
        "additive attention",
    ),
    "one query by einsum": (
        lambda q, k, v: torch.einsum("bhk,bhke->bhe", torch.softmax(torch.einsum("bhd,bhkd->bhk", q[:, :, 0], k), -1), v),
        "queries of length 1",
    ),
    "distances in a soft cap": (
        lambda q, k, v: torch.softmax(5 * torch.tanh(torch.cdist(q, k) ** 2 / 5), -1) @ v,
        "the scores are distances",
    ),
    "norm of the scores": (lambda q, k, v: torch.softmax(F.layer_norm(q @ k.mT, (6,)), -1) @ v, "layer_norm between the scores"),
    "scores of one length": (lambda q, k, v: torch.softmax(F.normalize(q @ k.mT, dim=-1), -1) @ v, "normalize between the scores"),
    "dropout of the scores": (lambda q, k, v: torch.softmax(F.dropout(q @ k.mT, 0.1), -1) @ v, "dropout between"),
    "two sinks": (
        lambda q, k, v: torch.softmax(torch.cat([q @ k.mT, q[..., :2]], -1), -1)[..., :-2] @ v,
        "joined with others",
    ),
    "a shift inside of a soft cap": (
        lambda q, k, v: torch.softmax(5 * torch.tanh((s := q @ k.mT) - s.amax(-1, True)), -1) @ v,
        "inside of the soft cap",
    ),
    "a shift before a clamp that is near": (
        lambda q, k, v: torch.softmax(torch.clamp((s := q @ k.mT) - s.amax(-1, True), -2.0), -1) @ v,
        "clamped to [-2.0, None]",
    ),
    "a maximum over the queries": (
        lambda q, k, v: torch.softmax((s := q @ k.mT) - s.amax(-2, True), -1) @ v,
        "also used by .amax",
    ),
    "a gate that may be nan": (
        lambda q, k, v: (torch.softmax(s := q @ k.mT + PADDING, -1) @ v) * torch.sigmoid(s.logsumexp(-1, True) - BIAS[..., :1]),
        "also used by .logsumexp",
    ),
    "a gate by other scores": (
        lambda q, k, v: (torch.softmax(s := q @ k.mT, -1) @ v) * torch.sigmoid((s * 2).logsumexp(-1, True) - BIAS[..., :1]),
        "also used by mul",
    ),
    "nan set to one": (lambda q, k, v: torch.softmax(q @ k.mT, -1).nan_to_num(1.0) @ v, "nan_to_num between the softmax"),
    "another fill after the softmax": (
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(HIDDEN, -math.inf), -1).masked_fill(PADDING < 0, 0.0) @ v,
        "a mask or factor is applied after the softmax",
    ),
    "clamped after a mask": (
        lambda q, k, v: torch.softmax((q @ k.mT + PADDING).clamp(-5e4, 5e4), -1) @ v,
        "added before the scores are clamped",
    ),
    # Rows in which -1e5 is added to every score keep their differences; here a clamp would level them.
    "clamped far out after a mask": (
        lambda q, k, v: torch.softmax((q @ k.mT - 1e5 * (CAUSAL.sum(-1, True) == 3)).clamp(min=-5e4), -1) @ v,
        "added before the scores are clamped",
    ),
    "keys picked after scoring": (
        lambda q, k, v: torch.softmax((q @ k.mT)[..., :3], -1) @ v[:, :, :3],
        "getitem between",
    ),
    "one query as a column": (
        lambda q, k, v: torch.softmax((k @ q[:, :, :1].mT).squeeze(-1), -1).unsqueeze(-2) @ v,
        "queries of length 1",
    ),
    "probabilities sliced": (lambda q, k, v: torch.softmax(q @ k.mT, -1)[..., :3] @ v[:, :, :3], "getitem between"),
    "values made of probabilities": (lambda q, k, v: (p := torch.softmax(q @ k.mT, -1)) @ p, "right operand"),
    "written in between": (lambda q, k, v: _written(q, k, v), "written to in place"),
    "bias that widens": (lambda q, k, v: torch.softmax((q[:1] @ k[:1].mT) + BIAS.expand(2, 4, 6, 6), -1) @ v, "widens"),
}


def _ramp(fill: Tensor) -> Tensor:
    fill[:, :2] = 0.0
    return fill


def _written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys = k * 2
    p = torch.softmax(q @ keys.mT, -1)
    keys[0] = 0.0
    return p @ v + keys.sum()


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    function, reason = NEAR_MISSES[name]
    q = Q.clone().requires_grad_("gradient" in name)
    found = refused(function, q, K, V)
    assert reason in found, found


@pytest.mark.parametrize(
    "weights, name",
    [
        (lambda s: torch.sigmoid(s - 2.0), "sigmoid"),
        (lambda s: F.relu(s.masked_fill(HIDDEN, LOW)).square() / 6, "relu"),
        (lambda s: F.gumbel_softmax(s, dim=-1), "gumbel_softmax"),
    ],
)
def test_attention_without_a_softmax_is_named(weights, name):
    assert f"{name} of the scores, and no softmax" in refused(lambda q, k, v: weights(q @ k.mT * 0.3) @ v, Q, K, V)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.sigmoid(q @ k.mT),  # no values
        lambda q, k, v: v.mT @ torch.sigmoid(q @ k.mT),  # on the right of a product
        lambda q, k, v: F.relu(q[..., :6] @ k[..., :6]) @ v,  # q @ x, no transposed keys
        lambda q, k, v: torch.softmax(q, -1),  # no scores
        lambda q, k, v: torch.softmax(q @ k.mT, -1),  # no values
        lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),  # linear attention
        lambda q, k, v: F.layer_norm(q, (8,)) @ k.mT @ v,
    ],
)
def test_what_is_no_attention_is_not_reported(function):
    assert sites(function, Q, K, V) == ([], [])


@pytest.mark.parametrize("where", ["scores", "probabilities"])
def test_a_hook_on_a_gradient_inside_keeps_an_attention_dense(where):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            s = q @ k.mT
            if where == "scores":
                s.register_hook(lambda gradient: gradient * 2)
            p = torch.softmax(s, -1)
            if where == "probabilities":
                p.register_hook(lambda gradient: gradient * 2)
            return p @ v

    inputs = [x.clone().requires_grad_() for x in (Q, K, V)]
    (site,) = spt_compiler.explain(Attention(), *inputs, options=blocks.EXACT).sites
    assert site.status == "skipped" and "register_hook" in site.reason
    assert blocks.assert_exact_is_eager(Attention(), Q, K, V) == []  # the hook runs: gradients agree


def test_weights_are_no_activations():
    """A router: softmax of a linear layer, times a parameter."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(numbers(8, 6)), nn.Parameter(numbers(6, 8))

        def forward(self, x):
            return torch.softmax(x @ self.a, -1) @ self.b

    assert sites(Router(), Q) == ([], [])


def test_flex_attention_stays_with_a_reason():
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    x = torch.randn(1, 2, 128, 16)
    (captured,) = models.capture(lambda x: flex(x, x, x), x)
    module = copy_graph(captured.module)
    canonicalize(module)
    matches, skipped = find(module)
    assert not matches and "flex_attention" in str(skipped[0].reason)


# ---------------------------------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------------------------------


def chain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = torch.matmul(q, k.transpose(2, 3)) * 8**-0.5 + mask
    return torch.matmul(F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype), v)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_casts_are_part_of_the_site(kind):
    q, k, v = (x.to(kind) for x in (Q, K, V))
    mask = torch.zeros(2, 1, 6, 6, dtype=kind)
    matches, skipped = sites(chain, q, k, v, mask, check=kind is torch.float32)
    assert len(matches) == 1 and not skipped and matches[0].capture.scale == pytest.approx(8**-0.5)


def test_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matches, skipped = sites(chain, Q.float(), K.float(), V.float(), torch.zeros(6, 6), check=False)
    assert len(matches) == 1 and not skipped


def test_symbolic_sizes():
    def function(q, k, v, mask):
        return torch.softmax(q @ k.mT * 0.5 + mask, -1) @ v

    c = only(function, Q, K, V, BIAS, dynamic=True)
    assert c.scale == 0.5 and len(c.bias) == 1
    assert any(isinstance(s, torch.SymInt) for s in c.q.meta["example_value"].shape)


def test_a_scale_that_dynamo_made_symbolic():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 0.37

        def forward(self, q, k, v):
            return torch.softmax(q @ k.mT * self.scale, -1) @ v + F.scaled_dot_product_attention(
                q, k, v, scale=self.scale
            )

    matches, skipped = sites(Model(), Q, K, V, dynamic=True)
    assert not skipped and [m.capture.scale for m in matches] == pytest.approx([0.37, 0.37])


# ---------------------------------------------------------------------------------------------------------------------
# Real models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("attn", models.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_site_of_real_models(name, attn, padded):
    """All sites, attention and FFN, nothing refused; attention captures agree with the model by value."""
    model = models.build(name, attn, layers=1, zero_dropout=True)
    matches, skipped = sites(model, **models.inputs(name, padded=padded))
    attention, ffn = models.sites(name, layers=1)
    kinds = [m.pattern.kind for m in matches]
    assert (kinds.count("attention"), kinds.count("ffn")) == (attention, ffn)
    assert not skipped and all(m.path and ":" in m.where for m in matches)


def test_returned_probabilities_keep_a_real_model_dense():
    model = models.build("bert", "eager", layers=1, zero_dropout=True)
    matches, skipped = sites(model, **models.inputs("bert"), output_attentions=True)
    assert [m.pattern.kind for m in matches] == ["ffn"] and "also returned" in str(skipped[0].reason)


# ---------------------------------------------------------------------------------------------------------------------
# Random graphs around the pattern
# ---------------------------------------------------------------------------------------------------------------------

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # scores, a bias and an additive mask with padding
ROW = torch.zeros(6, 6, dtype=torch.bool)
ROW[2] = True

STEPS: tuple[Step, ...] = (
    lambda s, b, m: s * 0.5,
    lambda s, b, m: s / 3.0,
    lambda s, b, m: s + b,
    lambda s, b, m: m + s,
    lambda s, b, m: s - b,
    lambda s, b, m: s + b.roll(1, -1) * 0.5,
    lambda s, b, m: s + b[..., :1],
    lambda s, b, m: s * (b[..., :1] + 2),
    lambda s, b, m: -s,
    lambda s, b, m: s.masked_fill(HIDDEN, -math.inf),
    lambda s, b, m: s.masked_fill(HIDDEN, LOW),
    lambda s, b, m: torch.where(CAUSAL, s, -1e9),
    lambda s, b, m: s.masked_fill(ROW.expand_as(s), LOW),
    lambda s, b, m: s.masked_fill(ROW, -math.inf),
    lambda s, b, m: torch.tanh(s / 5.0) * 5.0,
    lambda s, b, m: s.clamp(min=LOW),
    lambda s, b, m: s.clamp(min=-1.0),
    lambda s, b, m: s.clamp(min=-5e4, max=5e4),
    lambda s, b, m: s - s.amax(-1, keepdim=True),
    lambda s, b, m: s - s.max(),
    lambda s, b, m: s * TENSOR_SCALE,
    lambda s, b, m: s.float().double(),
    lambda s, b, m: s + 1.0,
    lambda s, b, m: s.view(8, 6, 6),
    lambda s, b, m: s.view(2, 4, 6, 6),
    lambda s, b, m: s.mT,
    lambda s, b, m: s.add_(0.5),
    lambda s, b, m: F.relu(s),
    lambda s, b, m: s.clamp(min=-5e4),
    lambda s, b, m: s - 1e5 * ROW.double(),
)
ADDED, ADDED_MASK, NEGATION, MASKED_ROWS = {2, 3, 4, 5, 6, 29}, 3, 8, 12
ENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": lambda s, p: p,
    "scores are read": lambda s, p: p + 0 * s.nan_to_num(0, 0, 0).mean(),
    "probabilities are read": lambda s, p: p + p.nan_to_num(0).sum(),
    "probabilities are scaled": lambda s, p: p * 0.5,
    "probabilities are masked": lambda s, p: p.masked_fill(HIDDEN, 0.0),
    "a gate": lambda s, p: p * torch.sigmoid(torch.logsumexp(s, -1, keepdim=True) - 0.3),
}


@settings(max_examples=50, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(0, len(STEPS) - 1), max_size=5),
    st.sampled_from([-1, -1, -1, -2, -3]),
    st.sampled_from(["", "", "", *ENDS]),
)
def test_whatever_is_rewritten_computes_the_same(program, dim, end):
    """Hits and near misses alike: the rewritten graph equals eager, in its output and in the gradient of every input."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(BIAS.clone())

        def forward(self, q, k, v, m):
            s = q @ k.mT
            for step in program:
                s = STEPS[step](s.view(2, 4, 6, 6) if s.dim() == 3 and 2 <= step <= 7 else s, self.bias, m)
            p = ENDS[end](s, torch.softmax(s, dim)).view(2, 4, 6, 6)
            return p @ v

    assume(not (MASKED_ROWS in program and ADDED & set(program)))  # see the tests below
    assume(not {ADDED_MASK, NEGATION} <= set(program))  # favours what it hides, by numbers beyond any precision
    model = Attention()
    sites(model, Q, K, V, PADDING)
    taken = blocks.assert_exact_is_eager(model, Q, K, V, PADDING)
    # A gate may be a sink, probabilities may be masked by what masked the scores, and a factor joins the output; other
    # readers keep the site dense.
    assert len(taken) <= (end in ("", "a gate", "probabilities are masked", "probabilities are scaled"))


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("lead", [(2, 1), (1, 3), (1, 1), (2, 3)])
def test_keys_and_values_that_several_leading_dims_share(lead, library):
    """Windows, or frames, with keys of their own or of all: broadcasting widens either leading dim."""

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, m):
            return F.scaled_dot_product_attention(q, k, v) if library else torch.softmax((q @ k.mT).masked_fill(m, -1e9), -1) @ v

    q, k, v = numbers(2, 3, 4, 6, 8), numbers(*lead, 4, 6, 8, seed=1), numbers(*lead, 4, 6, 5, seed=2)
    assert blocks.assert_exact_is_eager(Attention(), q, k, v, PADDING[0, 0, 0] < 0) == ["attention"]


def test_a_fill_that_is_an_attribute_of_the_model():
    """With dynamic shapes Dynamo makes a symbol of it."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.low = -1e9

        def forward(self, q, k, v):
            return torch.softmax((q @ k.mT).masked_fill(~torch.ones(q.shape[2], 6).bool().tril(), self.low), -1) @ v

    model = Attention()
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0)) for x in (Q, K, V))
    for x in (q, k, v):
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch._dynamo.mark_static(x, 1)
    assert only(model, q, k, v, dynamic=True).empty == "uniform"


def test_heads_in_the_batch_of_symbolic_sizes():
    """Products of batch * heads, scaled, split for the mask and folded back: sizes that rules read are no readers of scores."""

    def function(x, keys):
        b, t, _ = x.shape
        q, k, v = (x.view(b, t, 4, 8).transpose(1, 2).reshape(b * 4, t, 8) * i for i in (1.0, 2.0, 3.0))
        s = (torch.bmm(q, k.transpose(1, 2)) / 3.0).view(b, 4, t, t).masked_fill(~keys[:, None, None], -math.inf)
        return torch.bmm(torch.softmax(s.view(b * 4, t, t), -1), v).view(b, 4, t, 8)

    c = only(function, numbers(2, 6, 32), torch.arange(6) < torch.tensor([[6], [4]]), dynamic=True)
    assert c.scale == pytest.approx(1 / 3) and len(c.allowed) == 1


LEFT = torch.zeros(2, 1, 1, 6, dtype=torch.float64)
LEFT[1, ..., :2] = LOW


@pytest.mark.parametrize(
    "scores",
    [
        lambda s, m: torch.where(CAUSAL, s, LOW) + m.expand(2, 1, 6, 6).masked_fill(HIDDEN, LOW),
        lambda s, m: torch.where(CAUSAL, s, LOW) + m.expand(2, 1, 6, 6).masked_fill(HIDDEN, -math.inf),
        lambda s, m: s.masked_fill(HIDDEN, LOW).masked_fill(m < 0, LOW),
        lambda s, m: s.masked_fill(HIDDEN, -1e4).masked_fill(m < 0, -1e4),
        lambda s, m: (s + m.expand(2, 1, 6, 6).masked_fill(HIDDEN, LOW)).clamp(min=LOW),
        lambda s, m: s.clamp(min=-5e4, max=5e4) + m,
    ],
)
def test_rows_that_padding_on_the_left_leaves_without_keys(scores):
    """They equal eager, in their values and in every gradient, where one mask says all that a fill says."""

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, m):
            return torch.softmax(scores(q @ k.mT, m), -1) @ v

    assert blocks.assert_exact_is_eager(Attention(), Q, K, V, LEFT) == ["attention"]


@pytest.mark.parametrize(
    "scores",
    [
        lambda s, m: (s + m).masked_fill(ROW, LOW),
        lambda s, m: s.masked_fill(ROW, LOW) + m * (~ROW),
        lambda s, m: (s.masked_fill(ROW, LOW) + 1.0).masked_fill(ROW, LOW) + m * (~ROW),
        lambda s, m: (s.masked_fill(ROW, LOW) + m * (~ROW)).masked_fill(ROW, LOW),
    ],
)
def test_rows_masked_by_a_fill_beside_an_additive_mask(scores):
    """The one known difference: the fill becomes an addition, so that a row without keys has the same value, the mean of
    all values, but hands a gradient on to its scores, which the fill of the model would have stopped. (`torch.maximum` with
    the lowest number would have halved it.)"""

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, m):
            return torch.softmax(scores(q @ k.mT, m), -1) @ v

    model, inputs = Attention(), (Q, K, V, PADDING)
    expected = blocks.gradients(model, model, *inputs)
    got = blocks.gradients(model, torch.compile(model, backend="spt", options={**blocks.EXACT, "inner": "eager"}), *inputs)
    torch.testing.assert_close(got[0], expected[0])
    rest = [i for i in range(6) if i != 2]
    torch.testing.assert_close(got[1]["input0"][..., rest, :], expected[1]["input0"][..., rest, :])
    torch.testing.assert_close(got[1]["input2"], expected[1]["input2"])


class Written(nn.Module):
    """Scores with the heads before the keys, under a mask that is written after it was made."""

    def __init__(self, mask: Callable[[Tensor], Tensor]):
        super().__init__()
        self.mask = mask

    def forward(self, q, k, v):
        mask = self.mask(q.new_full((q.shape[2], k.shape[2]), -math.inf))
        scores = torch.einsum("bshd,bthd->bsht", q.transpose(1, 2), k.transpose(1, 2)) * 0.4
        scores += mask.unsqueeze(1)
        return torch.einsum("bsht,bthd->bshd", scores.softmax(-1), v.transpose(1, 2))


def _banded(mask: Tensor) -> Tensor:
    mask[:, :2] = 0.0
    mask.masked_fill_(CAUSAL, 0.0)
    return mask


def _read_before(mask: Tensor) -> Tensor:
    before = mask[None]
    mask[:, :2] = 0.0
    return before[0]


@pytest.mark.parametrize("mask", [lambda m: m.triu_(1), _banded, _read_before], ids=["triu_", "in parts", "through a view"])
def test_a_mask_that_is_written_before_the_scores_are_made(mask):
    assert blocks.assert_exact_is_eager(Written(mask), Q, K, V) == ([] if mask is _read_before else ["attention"])
