"""Masks that are code: what is lifted, what stays a tensor, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spt_compiler
from tests import models
from tests.blocks import EXACT, SPARSE, assert_same, gradients


class Masked(nn.Module):
    """One attention whose mask the model builds itself."""

    def __init__(self, build, eager: bool = False):
        super().__init__()
        self.qkv, self.build, self.eager = nn.Linear(24, 72), build, eager

    def forward(self, x, lengths):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, 12).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.build(b, t, lengths)
        if not self.eager:
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        bias = torch.where(mask, 0.0, torch.finfo(x.dtype).min)
        return (q @ k.transpose(-1, -2) * 12**-0.5 + bias).softmax(-1) @ v


def positions(t):
    return torch.arange(t)[:, None], torch.arange(t)[None]


def causal(b, t, lengths):
    q, k = positions(t)
    return (k <= q)[None, None]


def window(b, t, lengths):
    q, k = positions(t)
    return ((k <= q) & (k > q - 9))[None, None]


def padded_causal(b, t, lengths):
    q, k = positions(t)
    return (k <= q)[None, None] & (torch.arange(t) < lengths[:, None])[:, None, None]


def everything(b, t, lengths):
    return torch.ones(b, 1, t, t, dtype=torch.bool)


def odd(b, t, lengths):
    q, k = positions(t)
    return ((k + q) % 3 != 1)[None, None] | (k == q)


CASES = [
    (causal, "k <= q"),
    (window, "(k <= q) & (q - k <= 8)"),
    (padded_causal, "k <= q & tensor"),
    (everything, ""),
    (odd, "tensor"),
]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("build, text", CASES, ids=[c[0].__name__ for c in CASES])
def test_what_is_lifted_and_that_it_is_exact(build, text, eager):
    model, x, lengths = Masked(build, eager), torch.randn(3, 70, 24), torch.tensor([70, 41, 5])
    (site,) = spt_compiler.explain(model, x, lengths, options=SPARSE).sites
    # An additive mask that depends on data stays added: a row that allows nothing is then no special case.
    text = "tensor" if eager and "tensor" in text else text
    assert site.status == "replaced" and site.mask == text
    expected = gradients(model, model, x, lengths)
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EXACT), x, lengths), expected)


def test_symbolic_lengths_prove_nothing():
    model, lengths = Masked(causal), torch.tensor([9, 9])
    run = torch.compile(model, backend="spt", options={**EXACT, "inner": "eager"}, dynamic=True)
    for t in (70, 33):
        x = torch.randn(2, t, 24)
        assert_same(gradients(model, run, x, lengths), gradients(model, model, x, lengths))


def test_a_mask_that_is_code_is_not_built():
    seen = []

    def spy(config, mode=None):
        def inner(gm, inputs):
            from torch._dynamo.backends.common import aot_autograd
            from torch._functorch.aot_autograd import make_boxed_func

            def look(graph, _):
                seen.extend(tuple(n.meta["val"].shape) for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))
                return make_boxed_func(graph.forward)

            return aot_autograd(fw_compiler=look)(gm, inputs)

        return inner

    x, lengths = torch.randn(2, 70, 24), torch.tensor([70, 41])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spt_compiler.backend.inner_compiler", spy)
        torch.compile(Masked(padded_causal), backend="spt", options=SPARSE)(x, lengths)
    assert seen and not any(shape[-2:] == (70, 70) for shape in seen)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral"])
@pytest.mark.parametrize("padded, text", [(False, "k <= q"), (True, "k <= q & tensor")])
def test_decoders_of_transformers(family, padded, text):
    model = models.build(family, layers=1)
    sites = spt_compiler.explain(model, options=SPARSE, **models.inputs(family, length=37, padded=padded)).sites
    assert [s.mask for s in sites if s.kind == "attention"] == [text]
