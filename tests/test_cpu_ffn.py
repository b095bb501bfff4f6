"""The CPU lowering of the routed FFN in ATen operators against the reference, and what it and the C++ one must not do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from ffn_cases import ACTIVATIONS, MADE_UP, Case, case, defined, lowered
from torch.utils._python_dispatch import TorchDispatchMode

from spt_compiler.lowering import cpp_ffn, cpu_ffn
from spt_compiler.ops import reference_ffn

LOWERINGS = ((cpu_ffn, torch.float64), (cpp_ffn, torch.float32), (cpp_ffn, torch.bfloat16))


def check(c: Case) -> None:
    grad_y = torch.randn(c.x.shape[0], c.n_out, dtype=c.x.dtype)
    got, expected = lowered(cpu_ffn, c, grad_y), defined(c, grad_y)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")
        assert got[name].stride() == value.stride(), name


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("f", [50, 100])
def test_equals_reference(act, f, nan_empty):
    for bias, conv1d, ordered in itertools.product((False, True), repeat=3):
        check(case(act=act, f=f, bias=bias, conv1d=conv1d, ordered=ordered, compensation=bias))


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("budget,max_density", [(0.5, 0.5), (0.25, 0.5), (1.0, 1.0), (-1.0, 0.5)])
def test_equals_reference_with_every_option(tile, budget, max_density, nan_empty, small_pieces):
    lists = {"budget": budget, "max_density": max_density, "tile": tile}
    # Pairs of options meet each other; all sixteen combinations would say no more.
    for lora, gates, p, save in ((1, 1, 0.3, 1), (1, 0, 0.0, 0), (0, 1, 0.0, 1), (0, 0, 0.3, 0), (0, 1, 0.3, 0)):
        options = {"lora": bool(lora), "gates": bool(gates), "p": p, "save": bool(save), "compensation": True}
        options |= {"down": bool(lora) or p == 0, "lora_p": 0.2 if save else 0.0}
        check(case(act="silu(x0) * x1", idle=3, **options, **lists))
        check(case(act=MADE_UP + " + a1 * x1", always=7, ordered=True, conv1d=True, **options, **lists))


@pytest.mark.parametrize("f,g", [(9, 8), (8, 8), (1, 1), (64, 1), (60, 20)])
def test_odd_numbers_of_blocks(f, g, nan_empty):
    check(case(f=f, g=g, gates=True, compensation=True))
    check(case(f=f, g=g, budget=-1.0))


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(n, nan_empty):
    check(case(n=n, act="silu(x0) * x1", lora=True, down=True, lora_p=0.1, gates=True, compensation=True))
    check(case(n=n, budget=-1.0, p=0.3))


class Products(TorchDispatchMode):
    """Counts matrix products, and notes the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.count, self.flops, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += 1
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def backward_products(c: Case, needs: set[str] | None) -> Products:
    saved = cpu_ffn.routed_ffn(*c.forward)[1]
    asked = [t is not None and (needs is None or name in needs) for name, t in c.leaves.items()]
    with Products() as counted:
        grads = cpu_ffn.routed_ffn_backward(*c.backward(torch.ones(63, c.n_out, dtype=torch.float64), saved, asked))
    for name, grad, need in zip(c.leaves, grads, asked, strict=True):
        assert need or grad.shape == (0,), name
    return counted


def test_frozen_weights_cost_no_product():
    c = case(act="silu(x0) * x1", f=64)
    one = 2 * 63 * 4 * 8  # multiply-adds of all rows with one block, per column of the other side
    hidden, back = one * 21, one * 20
    assert backward_products(c, None).flops == 2 * hidden + 4 * back
    assert backward_products(c, {"x"}).flops == hidden + 2 * back
    assert backward_products(c, {"w_out"}).flops == hidden
    assert backward_products(c, {"w_in1"}).flops == hidden + back
    assert backward_products(c, {"b_in0"}).flops == hidden
    assert backward_products(c, {"b_out"}).count == 0
    assert backward_products(c, set()).count == 0
    lora = case(act="silu(x0) * x1", f=64, lora=True, down=True)
    rank = one * 3
    assert backward_products(lora, {"lora_down"}).flops == rank  # of A alone, and nothing of the frozen weights
    assert backward_products(lora, {"lora_b0"}).flops == hidden + rank + rank  # to the hidden units twice, then to B
    assert backward_products(lora, {"x"}).flops == hidden + rank + 2 * back


def test_saved_pre_activations_are_not_computed_again():
    kept, again = case(f=64, save=True), case(f=64, save=False)
    assert backward_products(again, {"x"}).flops - backward_products(kept, {"x"}).flops == 2 * 63 * 4 * 8 * 20


def test_half_of_the_blocks_is_half_of_the_products():
    with Products() as half:
        cpu_ffn.routed_ffn(*case(f=64).forward)
    with Products() as full:
        cpu_ffn.routed_ffn(*case(f=64, budget=1.0, max_density=1.0).forward)
    assert 2 * half.flops == full.flops


def test_dense_by_data_holds_no_more_than_the_sparse_capacity():
    c = case(n=300, e=4, e_out=4, f=400, g=8, max_density=0.25, budget=-1.0, tile=1)
    grad_y = torch.randn(300, 4, dtype=torch.float64)
    with Products() as counted:
        _, saved, _ = cpu_ffn.routed_ffn(*c.forward)
        cpu_ffn.routed_ffn_backward(*c.backward(grad_y, saved))
    assert saved.numel() == c.rows.shape[0] * 50
    assert counted.largest <= saved.numel()  # the whole hidden layer would be four times that


@pytest.mark.parametrize("module,dtype", LOWERINGS)
def test_runs_are_bitwise_equal(module, dtype, small_pieces):
    c = case(n=130, e=40, f=100, dtype=dtype, gates=True, lora=True, down=True, act="silu(x0) * x1")
    grad_y = torch.randn(130, c.n_out, dtype=dtype)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        torch.set_num_threads(2)
        first = lowered(module, c, grad_y)
        for n_threads in (2, 2, 1, 3):
            torch.set_num_threads(n_threads if module is cpp_ffn else 2)  # the vendor's GEMM may add in another order
            assert all(torch.equal(a, b) for a, b in zip(first.values(), lowered(module, c, grad_y).values(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("module,dtype", LOWERINGS)
def test_a_token_sees_nothing_of_the_others(module, dtype):
    c = case(n=200, e=64, f=200, dtype=dtype, gates=True)
    other = replace(c, x=c.x.clone())
    other.x[100:] = torch.randn(100, 64, dtype=dtype)
    other.x[150] = torch.nan
    y, changed = (module.routed_ffn(*k.forward)[0] for k in (c, other))
    assert torch.equal(y[:100], changed[:100])
    keep = torch.arange(100)
    scores = torch.full((100, 8), -1.0).masked_fill(reference_ffn.kept_mask(c.blocks[keep], 8), 1.0)
    blocks, rows, offsets = reference_ffn.route(scores, torch.zeros(8, dtype=torch.bool), torch.tensor([0.5]), 0.5, 1, 0)
    half = replace(c, x=c.x[:100], gates=c.gates[:100], blocks=blocks, rows=rows, offsets=offsets)
    alone = module.routed_ffn(*half.forward)[0]
    if module is cpu_ffn:  # with others in the lists the vendor's GEMM may round differently
        torch.testing.assert_close(alone, y[:100])
    else:
        assert torch.equal(alone, y[:100])


@pytest.mark.parametrize("module,dtype", LOWERINGS)
def test_infinite_weights_of_idle_blocks_do_not_matter(module, dtype):
    c, spoiled = (case(idle=3, lora=True, down=True, act="silu(x0) * x1", dtype=dtype) for _ in range(2))
    units = c.permutation[3 * 7 : 4 * 7].long()
    spoiled.w_in[0][units] = torch.inf
    spoiled.w_out[:, units] = torch.nan
    spoiled.lora_down[:, units] = torch.nan
    grad_y = torch.randn(63, c.n_out, dtype=dtype)
    got, expected = lowered(module, spoiled, grad_y), lowered(module, c, grad_y)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("module,dtype", LOWERINGS)
def test_gradients_share_no_memory(module, dtype):
    """Neither with each other nor with arguments: an op may not return such tensors."""
    c = case(act="silu(x0) * x1", lora=True, down=True, gates=True, dtype=dtype)
    saved = module.routed_ffn(*c.forward)[1]
    grads = module.routed_ffn_backward(*c.backward(torch.ones(63, c.n_out, dtype=dtype), saved))
    given = [t for t in (*c.leaves.values(), saved) if t is not None and t.numel()]
    places = [t.untyped_storage().data_ptr() for t in (*grads, *given) if t.numel()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("module,dtype", LOWERINGS)
def test_arguments_are_left_alone(module, dtype):
    c = case(act="x0", gates=True, lora=True, down=True, p=0.3, lora_p=0.2, compensation=True, dtype=dtype)
    before = {name: t.clone() for name, t in c.leaves.items() if t is not None}
    grad_y = torch.randn(63, c.n_out, dtype=dtype)
    _, saved, _ = module.routed_ffn(*c.forward)
    kept = saved.clone()
    first = module.routed_ffn_backward(*c.backward(grad_y, saved))
    again = module.routed_ffn_backward(*c.backward(grad_y, saved))
    assert torch.equal(saved, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(c.leaves[name], t) for name, t in before.items())
