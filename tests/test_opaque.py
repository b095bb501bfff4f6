"""Opaque and nested forms: torch's own layers, flex_attention, checkpoints, blocks one by one, graph breaks, functional calls."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

import spt_compiler
from tests.blocks import EXACT, SPARSE, Block, Broken, Stack, assert_same, gradients, relative

EAGER = {**EXACT, "inner": "eager"}
WIDTH, LENGTH = 48, 37


def batch(size: int = 2) -> torch.Tensor:
    return torch.randn(size, LENGTH, WIDTH)


def sites(module, *inputs, **kwargs) -> tuple[int, int]:
    found = spt_compiler.explain(module, *inputs, options=SPARSE, **kwargs)
    return found.replaced("attention"), found.replaced("ffn")


def check(module: nn.Module, wanted: tuple[int, int], *inputs: torch.Tensor, call=None) -> None:
    """The wanted sites are replaced, and exact equals eager in outputs and gradients."""
    assert sites(module, *inputs) == wanted
    expected = gradients(module, module, *inputs)
    assert_same(gradients(module, torch.compile(module, backend="spt", options=EAGER), *inputs), expected)


# ---- torch's own layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_multihead_attention(need_weights, masked):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

        def forward(self, x, y):
            padding = torch.zeros(2, LENGTH, dtype=torch.bool) if masked else None
            if masked:
                padding[1, 30:] = True
            return self.attention(x, y, y, key_padding_mask=padding, need_weights=need_weights)[0]

    check(Attend(), (1, 0), batch(), batch())


def test_attention_weights_that_are_read_keep_their_site_dense():
    class Attend(nn.MultiheadAttention):
        def forward(self, x):
            out, weights = super().forward(x, x, x)
            return out + weights.mean()

    model, x = Attend(WIDTH, 4, batch_first=True), batch()
    (site,) = spt_compiler.explain(model, x, options=SPARSE).sites
    assert site.status == "skipped" and "also used by" in site.reason, site


def test_attention_weights_that_are_made_ready_for_nobody_are_no_reader():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

        def forward(self, x):
            out, weights = self.attention(x, x, x)
            weights[:, None].broadcast_to(2, 4, LENGTH, LENGTH)
            weights.mean(1)
            return out

    check(Attend(), (1, 0), batch())


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer(norm_first, training):
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 112, dropout=0.0, batch_first=True, norm_first=norm_first)
    check(layer.train(training), (1, 1), batch())


def test_the_fast_path_of_the_encoder_layer_is_opened():
    """In eval mode without gradients torch runs the whole layer as one operator."""
    layer, x = nn.TransformerEncoderLayer(WIDTH, 4, 112, batch_first=True).eval(), batch()
    with torch.no_grad():
        assert sites(layer, x) == (1, 1)
        assert relative(torch.compile(layer, backend="spt", options=EAGER)(x), layer(x)) < 1e-4


def test_a_stack_of_encoder_layers_with_masks():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 112, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), batch()
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)

    def run(module):
        return lambda value: module(value, mask=causal, is_causal=True)

    assert sites(model, x, mask=causal, is_causal=True) == (2, 2)
    got = gradients(model, run(torch.compile(model, backend="spt", options=EAGER)), x)
    assert_same(got, gradients(model, run(model), x))


def test_decoder_layer():
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 112, dropout=0.0, batch_first=True)
    check(layer, (2, 1), batch(), batch())


# ---- flex_attention -----------------------------------------------------------------------------------------------


def test_flex_attention_stays_with_a_reason():
    class Flex(Block):
        def forward(self, x):
            q, k, v = self.qkv(x).view(2, LENGTH, 3, 4, 12).permute(2, 0, 3, 1, 4).unbind(0)
            out = flex.flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))
            x = x + self.proj(out.transpose(1, 2).reshape(2, LENGTH, WIDTH))
            return x + self.fc2(torch.nn.functional.gelu(self.fc1(x)))

    model, x = Flex(), batch()
    with torch.no_grad():
        found = spt_compiler.explain(model, x, options=SPARSE)
        assert (found.replaced("attention"), found.replaced("ffn")) == (0, 1), found.summary()
        (kept,) = (s for s in found.sites if s.kind == "attention")
        assert "flex_attention" in kept.reason
        assert relative(torch.compile(model, backend="spt", options=EAGER)(x), model(x)) < 1e-4


# ---- nesting ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant):
    class Checkpointed(Stack):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    check(Checkpointed(2), (2, 2), batch())


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_compiled_one_by_one_under_a_checkpoint_of_the_caller(reentrant):
    model, x = Stack(2), batch()
    expected = gradients(model, model, x)
    spt_compiler.compile(model, **EAGER)

    def call(value):
        for block in model.blocks:
            value = checkpoint(block, value, use_reentrant=reentrant)
        return value

    assert_same(gradients(model, call, x), expected)


def test_a_sparse_step_under_a_checkpoint_of_the_caller_replays_its_selection():
    model, x = Stack(2), torch.randn(2, 200, WIDTH)
    spt_compiler.compile(model, **SPARSE)
    for _ in range(2):
        model(x).sum().backward()
    plain = gradients(model, model, x)
    state = {n: t.clone() for n, t in spt_compiler.state_dict(model).items()}

    def call(value):
        for block in model.blocks:
            value = checkpoint(block, value, use_reentrant=False)
        return value

    spt_compiler.load_state_dict(model, state)
    with torch.no_grad():
        before = call(x)
    again = gradients(model, call, x)
    assert torch.equal(before, again[0]) and plain[1].keys() == again[1].keys()


def test_a_graph_break_inside_of_a_model_costs_no_site():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(Broken(2), (2, 2), batch())


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_graph_break_inside_of_an_ffn_is_the_reason(where):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(WIDTH, 112), nn.Linear(112, WIDTH)

        def forward(self, x):
            h = self.fc1(x)
            if where == "before":
                h = (h, torch._dynamo.graph_break())[0]
            h = torch.nn.functional.gelu(h)
            if where == "after":
                h = (h, torch._dynamo.graph_break())[0]
            return self.fc2(h)

    found = spt_compiler.explain(Cut(), batch(), options=SPARSE)
    assert [s.kind for s in found.sites] == ["ffn"] and "a graph break cuts it" in found.sites[0].reason, found.summary()


class Attend(nn.Module):
    """Written-out attention that may break the graph at one place."""

    def __init__(self, where: str):
        super().__init__()
        self.qkv, self.where = nn.Linear(WIDTH, 3 * WIDTH), where

    def cut(self, where: str) -> None:
        if where == self.where:
            torch._dynamo.graph_break()

    def forward(self, x):
        q, k, v = self.qkv(x).view(2, -1, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4).unbind(0)
        self.cut("before")
        scores = q @ k.mT * 0.25
        if self.where == "print":
            print(end="")
        self.cut("scores")
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        self.cut("masked")
        weights = scores.softmax(-1)
        self.cut("weights")
        out = weights @ v
        self.cut("after")
        return out.transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "where, reason",
    [
        *((w, "its scores come from another graph") for w in ("print", "scores", "masked")),
        ("weights", "its probabilities leave the graph"),
    ],
)
def test_a_graph_break_inside_of_an_attention_is_the_reason(where, reason):
    found = spt_compiler.explain(Attend(where), batch(), options=SPARSE)
    assert [(s.kind, s.status) for s in found.sites] == [("attention", "skipped")], found.summary()
    assert "a graph break cuts it" in found.sites[0].reason and reason in found.sites[0].reason, found.summary()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_graph_break_beside_an_attention_costs_no_site(where):
    check(Attend(where), (1, 0), batch())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "excluded, reason",
    [
        (lambda scores, v: torch.softmax(scores, -1) @ v, "excluded from compilation"),
        (lambda scores, v: torch.softmax(scores, -1), "excluded from compilation"),
        (None, ""),  # what is excluded takes the result of the attention
    ],
)
def test_attention_in_a_function_that_is_excluded_from_compilation(excluded, reason):
    hidden = torch.compiler.disable(excluded or (lambda out: out * 2.0))

    class Excluding(Attend):
        def forward(self, x):
            q, k, v = self.qkv(x).view(2, -1, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4).unbind(0)
            scores = q @ k.mT * 0.25
            if not reason:
                return hidden(torch.softmax(scores, -1) @ v)
            out = hidden(scores, v)
            return out if out.shape[-1] == v.shape[-1] else out @ v

    found = spt_compiler.explain(Excluding(""), batch(), options=SPARSE)
    (site,) = found.sites
    assert site.kind == "attention" and site.status == ("skipped" if reason else "replaced") and reason in site.reason, site


NO_CUT_ATTENTION = {
    "class probabilities": lambda x, y: (x, torch._dynamo.graph_break())[0].softmax(-1) + y.mean(),
    "a mixture over rows of two": lambda x, y: (x[0], torch._dynamo.graph_break())[0].softmax(-1) @ y[0],
    "scores of the caller": lambda x, y: x.softmax(-1) @ y,
    "over another dim": lambda x, y: (x, torch._dynamo.graph_break())[0].softmax(-2) @ y,
    "probabilities that are the output": lambda x, y: (x @ y).softmax(-1),
    "a projection": lambda x, y: F.linear((x, torch._dynamo.graph_break())[0].softmax(-1), y[0]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NO_CUT_ATTENTION)
def test_what_is_no_attention_is_not_reported_as_cut(name):
    class Other(nn.Module):
        def forward(self, x, y):
            kept = x + 1  # the first graph has something to compute
            return NO_CUT_ATTENTION[name](kept, y)

    found = spt_compiler.explain(Other(), torch.randn(2, 9, 9), torch.randn(2, 9, 9), options=SPARSE)
    assert not found.sites, found.summary()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loop", ["over those that were hit", "another break", "over nothing that was counted"])
def test_a_loop_over_the_experts_that_were_hit_is_reported(loop):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, WIDTH, 112)), nn.Parameter(torch.randn(3, 112, WIDTH))

        def forward(self, x, chosen):
            out = torch.zeros_like(x)
            mask = F.one_hot(chosen, num_classes=3).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0)
            if loop == "another break":
                torch._dynamo.graph_break()
                return out, mask, hit
            for expert in hit.nonzero() if loop == "over those that were hit" else mask.nonzero():
                where, rows = torch.where(mask[expert[0]])
                out.index_add_(0, rows, F.gelu(x[rows] @ self.up[expert[0]]) @ self.down[expert[0]])
            return out

    found = spt_compiler.explain(Experts(), torch.randn(9, WIDTH), torch.randint(0, 3, (9, 2)), options=SPARSE)
    reported = [s.kind for s in found.sites if "experts that were hit" in s.reason]
    assert reported == (["ffn"] if loop == "over those that were hit" else []), found.summary()


# ---- functional users ---------------------------------------------------------------------------------------------


def test_functional_call_keeps_the_state_of_the_tensors_it_is_given():
    model, x = Stack(1), batch()
    parameters = dict(model.named_parameters())

    def run(values, given):
        return functional_call(model, values, (given,))

    compiled = torch.compile(run, backend="spt", options=EAGER)
    expected = gradients(model, lambda v: run(parameters, v), x)
    assert_same(gradients(model, lambda v: compiled(parameters, v), x), expected)


@pytest.mark.filterwarnings("ignore")
def test_sites_inside_of_vmap_stay_dense_with_a_reason():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stack(1)

        def forward(self, x):
            return vmap(lambda row: self.inner(row[None])[0])(x)

    model, x = Mapped(), batch()
    found = spt_compiler.explain(model, x, options=SPARSE)
    assert [s.kind for s in found.sites] == ["attention", "ffn"], found.summary()
    assert all("inside of a functorch transform" in s.reason for s in found.sites), found.summary()
    compiled = torch.compile(model, backend="spt", options={**EAGER, "strict": False})
    assert relative(compiled(x), model(x)) < 1e-4


def test_the_gradient_transform_of_a_model():
    model, x = Stack(1), batch()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(values):
        return functional_call(model, values, (x,)).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.compile(torch.func.grad(loss), backend="spt", options={**EAGER, "strict": False})(parameters)
    for name, grad in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5)
