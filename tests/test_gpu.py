"""On a GPU (`pytest -m gpu`): compiled models against dense ones, with the kernels that a chip runs.

Kernel by kernel, against definitions in float64, the chip is checked by `python -m benchmarks.gpu --only correctness`.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from spt_compiler.lowering import registry
from tests import models
from tests.blocks import EXACT, SPARSE, Stack, assert_same, gradients, relative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDTH = 128


@pytest.fixture(autouse=True)
def every_op_ran_its_kernel():
    before = registry.failures(), registry.refusals()
    yield
    assert (registry.failures(), registry.refusals()) == before


def batch(length: int = 200, size: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, length, WIDTH, device="cuda", dtype=dtype)


def stack(depth: int = 2, dtype: torch.dtype = torch.float32, **block) -> torch.nn.Module:
    torch.manual_seed(0)
    return Stack(depth, width=WIDTH, heads=2, hidden=4 * WIDTH, **block).to("cuda", dtype)


def trained(run, x: torch.Tensor, parameters, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, 1e-3, capturable=True)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(run(x), x.roll(1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def test_cuda_graphs_capture_a_step():
    """The same steps as without: kernels read what changes from memory, and no launch depends on the host."""
    x = batch(512)
    options = {**SPARSE, "inner": "inductor"}
    losses = {}
    for graphs in (False, True):
        model = stack()
        counters.clear()
        more = {"inner_options": {"triton.cudagraphs": True}} if graphs else {}
        run = torch.compile(model, backend="spt", options={**options, **more})
        losses[graphs] = trained(run, x, model.parameters(), 12)
        if graphs:
            assert counters["inductor"]["cudagraph_skips"] == 0
    assert losses[True][-1] < losses[True][0]
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-5)


def test_a_step_never_waits_for_the_device():
    model, x = stack(), batch(512)
    run = torch.compile(model, backend="spt", options=SPARSE)
    trained(run, x, model.parameters(), 10)  # while it learns it may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = run(x).square().mean()
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    played = [c.tapes is not None and len(c.tapes) > 0 for c in registry._table.candidates[("routed_ffn_backward_v1", "cuda")]]
    assert any(played), "its launches were not recorded"


def test_autocast_and_dropout():
    model, x = stack(dropout=0.2), batch(512)
    run = torch.compile(copy.deepcopy(model), backend="spt", options=SPARSE)
    with torch.autocast("cuda", torch.bfloat16):
        out = run(x)
    out.float().square().mean().backward()
    assert relative(out.float(), model(x)) < 0.5


def test_checkpointing_recomputes_what_it_computed():
    x = batch(512)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Stack(2, checkpointed, width=WIDTH, heads=2, hidden=4 * WIDTH).cuda()
        run = torch.compile(model, backend="spt", options={**SPARSE, "inner": "aot_eager"})
        results.append(gradients(model, run, x))
    assert_same(results[1], results[0], 1e-5, 1e-4)


def test_generation_is_that_of_the_dense_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256, vocab_size=96
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).cuda().eval()
    prompt = torch.randint(3, 96, (2, 70), device="cuda")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **settings)
    model.forward = torch.compile(model.forward, backend="spt", options={**EXACT, "inner": "eager", "strict": False}, dynamic=True)
    assert torch.equal(model.generate(prompt, **settings), expected)


@pytest.mark.parametrize("heads, width", [(4, 160), (2, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_that_are_no_multiple_of_16_wide_or_lie_at_odd_addresses(dtype, heads, width):
    """40 values a head; and queries, keys and values that are slices from the second value on."""
    torch.manual_seed(0)
    dim, n = width // heads, 333
    x = torch.randn(2, n, 3, heads, dim + 1, device="cuda", dtype=dtype)[..., 1:].permute(2, 0, 3, 1, 4)

    def attention(x):
        return F.scaled_dot_product_attention(*x, is_causal=True, scale=dim**-0.5) * x[0]

    def defined(x):
        return attention(x.double())  # torch's fused kernels do not ask whether an address is odd

    for options in (EXACT, {**SPARSE, "attention.density": 1.0}):
        run = torch.compile(attention, backend="spt", options={**options, "inner": "eager"})
        results = []
        for call in (run, defined):
            leaf = x.detach().requires_grad_()
            out = call(leaf)
            results.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), leaf)))
        for got, expected in zip(*results, strict=True):
            assert relative(got.float(), expected.float()) < 3e-2


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_exact_equals_dense(dtype, inner):
    model, x = stack(dtype=dtype), batch(dtype=dtype)
    run = torch.compile(model, backend="spt", options={**EXACT, "inner": inner})
    rtol = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert_same(gradients(model, run, x), gradients(model, model, x), rtol, 5 * rtol)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_exact_equals_dense_for_real_architectures(name):
    model = models.build(name, zero_dropout=True, width=64, heads=4, hidden=256).cuda()
    inputs = {k: v.cuda() for k, v in models.inputs(name, length=70).items()}
    run = torch.compile(model, backend="spt", options=EXACT)
    expected, got = model(**inputs).last_hidden_state, run(**inputs).last_hidden_state
    assert relative(got, expected) < 1e-4
