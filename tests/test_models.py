"""Unmodified architectures through the whole backend: every site taken, and the dense limit in outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spt_compiler
from spt_compiler import calibrate
from tests import models
from tests.blocks import EXACT, SPARSE, assert_same, relative

CASES = [(family, attn) for family in models.FAMILIES for attn in models.IMPLEMENTATIONS]
LENGTH = 37


def gradients(model: nn.Module, call, kwargs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    # Every output takes part: AOTAutograd gives zeros, eager None, for parameters behind outputs that nobody uses.
    out = torch.cat([o.flatten() for o in calibrate.leaves(call(**kwargs)) if o.requires_grad])
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family, attn", CASES)
@pytest.mark.parametrize("padded", [True, False])
def test_every_site_is_replaced(family, attn, padded):
    model = models.build(family, attn)  # with its dropout: that must not cost a site
    found = spt_compiler.explain(model, options=SPARSE, **models.inputs(family, length=LENGTH, padded=padded))
    assert (found.replaced("attention"), found.replaced("ffn")) == models.sites(family), found.summary()
    assert all(s.path and s.where.count(":") == 1 for s in found.sites)


@pytest.mark.parametrize("family, attn", CASES)
def test_exact_equals_eager(family, attn):
    model, kwargs = models.build(family, attn, zero_dropout=True), models.inputs(family, length=LENGTH)
    expected = gradients(model, model, kwargs)
    got = gradients(model, torch.compile(model, backend="spt", options={**EXACT, "inner": "eager"}), kwargs)
    assert_same(got, expected)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_exact_through_aot_autograd(family):
    model, kwargs = models.build(family, layers=1, zero_dropout=True), models.inputs(family, length=LENGTH)
    expected = gradients(model, model, kwargs)
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EXACT), kwargs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_exact_through_inductor(family):
    model, kwargs = models.build(family, layers=1, zero_dropout=True), models.inputs(family, length=LENGTH)
    expected = gradients(model, model, kwargs)
    assert_same(gradients(model, torch.compile(model, backend="spt", options={**EXACT, "inner": "inductor"}), kwargs), expected)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_sparse_training_runs_and_differs_from_dense(family):
    model, kwargs = models.build(family, zero_dropout=True, hidden=128), models.inputs(family, length=200)
    run = torch.compile(model, backend="spt", options={**SPARSE, "attention.density": 0.05})
    dense = models.last_hidden(model(**kwargs)).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        out = models.last_hidden(run(**kwargs))
        out.square().mean().backward()
        optimizer.step()
    assert out.isfinite().all() and relative(out.detach(), dense) > 1e-3
    figures = spt_compiler.metrics(model)
    attention, ffn = models.sites(family)
    # T5's and BART's sites have anchors of their own, so states count as sites do.
    assert len(figures) == attention + ffn and all(f["initialised"] for f in figures.values())


def test_gradient_checkpointing_of_an_unmodified_model():
    model, kwargs = models.build("llama", zero_dropout=True), models.inputs("llama", length=LENGTH)
    expected = gradients(model, model, kwargs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = spt_compiler.explain(model, options=EXACT, **kwargs)
    assert found.replaced() == 4, found.summary()
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EXACT), kwargs), expected)


def test_per_block_compilation_of_an_unmodified_model():
    model, kwargs = models.build("llama", layers=3, zero_dropout=True), models.inputs("llama", length=LENGTH)
    expected = gradients(model, model, kwargs)
    assert spt_compiler.compile(model, **{"exact": True, "inner": "eager"}) is model
    assert [n for n, m in model.named_modules() if m._compiled_call_impl is not None] == ["layers.0", "layers.1", "layers.2"]
    assert_same(gradients(model, model, kwargs), expected)


def test_sites_of_blocks_compiled_one_by_one_are_found_by_their_full_names():
    model, kwargs = models.build("llama", layers=3), models.inputs("llama", length=200)
    with pytest.warns(UserWarning, match="nowhere"):
        spt_compiler.compile(
            model, **SPARSE, sites={"layers.1.*": {"attention.density": 0.5}, "nowhere*": {"ffn.density": 0.25}}
        )
    for _ in range(3):
        model(**kwargs).last_hidden_state.sum().backward()
    density = {n.split(".")[1]: f["density"] for n, f in spt_compiler.metrics(model).items() if "/attention/" in n}
    assert density == {"0": 0.25, "1": 0.5, "2": 0.25}


def test_attention_weights_that_are_returned_keep_their_site_dense():
    model = models.build("bert", "eager")
    found = spt_compiler.explain(model, options=SPARSE, output_attentions=True, **models.inputs("bert", length=LENGTH))
    skipped = [s for s in found.sites if s.kind == "attention"]
    assert len(skipped) == 2 and all(s.status == "skipped" and "also returned" in s.reason for s in skipped), found.summary()
