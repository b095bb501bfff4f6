"""Shapes and modes of torch: one dynamic graph, short lengths, train and eval, generation, autocast."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import spt_compiler
from tests import models
from tests.blocks import EXACT, SPARSE, Stack, assert_same, gradients, relative

EAGER = {**EXACT, "inner": "eager"}


def batch(length: int = 100, size: int = 2) -> torch.Tensor:
    return torch.randn(size, length, 48)


def compiled(module, options=EAGER, **more):
    return torch.compile(module, backend="spt", options=options, **more)


# ---- shapes -------------------------------------------------------------------------------------------------------


def graphs_of(run, model, sizes) -> int:
    counters.clear()
    for length, size in sizes:
        x = batch(length, size)
        assert_same(gradients(model, run, x), gradients(model, model, x))
    return counters["stats"]["unique_graphs"]


def test_every_length_and_batch_runs_in_one_dynamic_graph():
    """Lengths of several tiles, of one, and below one alike: no guard is ours (through AOTAutograd: `test_backend.py`)."""
    model = Stack(1)
    run = compiled(model, dynamic=True)
    assert graphs_of(run, model, ((130, 2), (100, 3), (257, 4), (40, 2), (7, 3), (64, 2))) == 1


def test_the_guards_are_those_of_the_eager_backend():
    model, sizes = Stack(1), ((130, 2), (40, 3), (1, 2), (1, 1), (300, 1))
    ours = graphs_of(compiled(model, dynamic=True), model, sizes)
    torch._dynamo.reset()
    assert ours == graphs_of(torch.compile(model, backend="eager", dynamic=True), model, sizes)


def test_marked_dimensions():
    model, x = Stack(1), batch(130)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    run = compiled(model)
    counters.clear()
    assert relative(run(x), model(x)) < 1e-4
    for length, size in ((70, 3), (33, 5)):
        y = batch(length, size)
        assert relative(run(y), model(y)) < 1e-4
    assert counters["stats"]["unique_graphs"] == 1


def test_sizes_share_their_state():
    model = Stack(1)
    run = compiled(model, SPARSE)
    for length in (200, 130, 260):
        for _ in range(2):
            run(batch(length)).sum().backward()
    figures = spt_compiler.metrics(model)
    assert len(figures) == 2 and all(f["steps"] == 5 for f in figures.values())


# ---- modes --------------------------------------------------------------------------------------------------------


def test_train_eval_no_grad_and_inference_mode_share_their_state():
    model, x = Stack(1), batch(200)
    run = compiled(model, SPARSE)
    for _ in range(2):
        run(x).sum().backward()
    run.eval()
    with torch.no_grad():
        plain = run(x)
    with torch.inference_mode():
        assert torch.equal(run(x), plain)
    assert relative(run(x).detach(), plain) < 1e-5
    run.train()
    assert relative(run(x).detach(), plain) < 1e-5  # no dropout here
    assert relative(plain, model(x)) > 1e-3
    assert len(spt_compiler.metrics(model)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype):
    model, x = Stack(1).to(dtype), batch(63).to(dtype)
    expected = gradients(model, model, x)
    got = gradients(model, compiled(model), x)
    assert got[0].dtype == dtype and all(g.dtype == dtype for g in got[1].values())
    assert_same(got, expected, 3e-2, 3e-2)


def test_generation_prefills_sparse_decodes_dense_and_is_token_identical_under_exact():
    transformers = pytest.importorskip("transformers")
    config = models.build("llama").config
    config.use_cache = True
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    kwargs = models.inputs("llama", length=20)
    expected = model.generate(**kwargs, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        prefill = spt_compiler.explain(model, options=SPARSE, **kwargs)
        cache = model(**kwargs).past_key_values
        mask = torch.cat([kwargs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        decode = spt_compiler.explain(
            model,
            options=SPARSE,
            input_ids=expected[:, 20:21],
            attention_mask=mask,
            past_key_values=cache,
        )
    assert prefill.replaced("attention") == 2, prefill.summary()
    assert decode.replaced("attention") == 0, decode.summary()
    (reason,) = {s.reason for s in decode.sites if s.kind == "attention"}
    assert reason == "queries of length 1 stay dense (decoding, or one query for a whole input)"
    model.compile(backend="spt", options={**EAGER, "strict": False})
    assert torch.equal(model.generate(**kwargs, max_new_tokens=8, do_sample=False), expected)


def test_compiled_autograd_gets_no_graph_of_ours():
    """It compiles the backward by the same backend: that graph holds no site and is left to the inner compiler."""
    model, x = Stack(1), batch(63)
    expected = gradients(model, model, x)
    run = compiled(model, {**EXACT, "require_matches": 2})
    with torch._dynamo.config.patch(compiled_autograd=True), warnings.catch_warnings():
        warnings.filterwarnings("error", message="spt_compiler")
        assert_same(gradients(model, run, x), expected)


def test_two_calls_in_one_step_and_gradient_accumulation():
    model, x, y = Stack(1), batch(200), batch(200)
    run = compiled(model, SPARSE)
    for _ in range(2):
        (run(x).sum() + run(y).sum()).backward()
    assert {f["steps"] for f in spt_compiler.metrics(model).values()} == {1.0}
    torch._dynamo.reset()
    exact = compiled(model)
    both = lambda f: lambda a: f(a) * f(a * 0.5)  # noqa: E731
    assert_same(gradients(model, both(exact), x), gradients(model, both(model), x))


# ---- optimisation -------------------------------------------------------------------------------------------------


def test_scaled_losses_and_clipped_gradients_include_the_routers():
    model, x = Stack(1), batch(200)
    run = compiled(model, {**SPARSE, "ffn.gate": "straight-through"})
    spt_compiler.prepare(run, x)
    routers = spt_compiler.parameters(run)
    optimizer = torch.optim.SGD([*model.parameters(), *routers], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [r.detach().clone() for r in routers]
    scaler.scale(run(x).square().mean()).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), *routers], 1e-3)
    total = torch.stack([p.grad.norm() for p in [*model.parameters(), *routers] if p.grad is not None]).norm()
    assert norm.isfinite() and all(r.grad is not None and r.grad.abs().sum() > 0 for r in routers)
    assert abs(float(total) - 1e-3) < 1e-4
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(a, b) for a, b in zip(before, routers, strict=True))


def test_weights_of_unselected_blocks_get_zero_gradients_and_optimizers_treat_them_so():
    """Weight decay and momentum move them like any weight whose gradient is zero."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 112), nn.GELU(), nn.Linear(112, 48)), batch(200)
    run = compiled(model, {**SPARSE, "ffn.density": 0.25, "ffn.router": "static"})
    for _ in range(2):
        run(x).sum().backward()
    model.zero_grad()
    run(x).sum().backward()
    idle = model[0].weight.grad.abs().sum(1) == 0
    assert int(idle.sum()) == 84 and torch.equal(idle, model[2].weight.grad.abs().sum(0) == 0)
    before = model[0].weight.detach().clone()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(model[0].weight[idle].detach(), before[idle] * (1 - 0.1 * 0.5))
    assert not torch.allclose(model[0].weight[~idle], before[~idle] * (1 - 0.1 * 0.5))
