"""The routed FFN's operators: schema, gradients, and the reference as their definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ffn_cases import MADE_UP, Case, both, case, gradients, plain
from torch import Tensor

from spt_compiler.ops import ffn as _ops
from spt_compiler.ops import reference_ffn

spt = torch.ops.spt
assert _ops.routed_ffn is not None  # importing the module registers the ops

KINDS = {
    "plain": {},
    "no bias, ordered": {"bias": False, "ordered": True},
    "gated, Conv1D": {"act": "silu(x0) * x1", "conv1d": True},
    "F=100": {"f": 100, "compensation": True, "idle": 2},
    "everything": {
        "act": MADE_UP + " + a1 * x1",
        "lora": True,
        "gates": True,
        "compensation": True,
        "p": 0.3,
        "always": 7,
    },
    "LoRA everywhere": {"act": "silu(x0) * x1", "lora": True, "down": True, "lora_p": 0.2, "gates": True},
    "dense by data": {
        "budget": -1.0,
        "act": "silu(x0) * x1",
        "gates": True,
        "compensation": True,
        "p": 0.3,
        "down": True,
        "lora_p": 0.2,
    },
    "all blocks": {"budget": 1.0, "max_density": 1.0, "compensation": True},
}


def run(c: Case) -> Tensor:
    return both(spt.routed_ffn_v1(*c.forward))


def reference(c: Case) -> Tensor:
    return both(reference_ffn.routed_ffn(*c.forward))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_plain_torch_operators(kind):
    c = case(**KINDS[kind])
    grad_y = torch.randn(63, c.n_out, dtype=torch.float64)
    expected = gradients(plain, c, grad_y)
    torch.testing.assert_close(reference(c), expected.pop("y"))
    saved = reference_ffn.routed_ffn(*c.forward)[1]
    got = reference_ffn.routed_ffn_backward(*c.backward(grad_y, saved))
    for (name, leaf), grad in zip(c.leaves.items(), got, strict=True):
        if leaf is None:
            assert grad.shape == (0,)
        else:
            torch.testing.assert_close(grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["no bias, ordered", "gated, Conv1D", "everything", "LoRA everywhere", "dense by data"])
def test_opcheck(kind):
    c = case(n=7, e=5, e_out=4, g=4, **KINDS[kind] | {"f": 18, "idle": None, "always": None})
    spt_args = c.trainable().forward
    torch.library.opcheck(spt.routed_ffn_v1.default, spt_args)
    result = spt.routed_ffn_v1(*c.forward)
    torch.library.opcheck(spt.routed_ffn_backward_v1.default, c.backward(torch.randn_like(both(result)), result[1]))


@pytest.mark.parametrize("kind", ["everything", "LoRA everywhere", "dense by data"])
def test_gradcheck(kind):
    c = case(n=5, e=3, e_out=4, f=10, g=4, **KINDS[kind] | {"always": 3}).trainable()
    leaves = [t for t in c.leaves.values() if t is not None]
    torch.autograd.gradcheck(lambda *_: run(c), leaves)


@pytest.mark.parametrize("budget", [-1.0, 0.5, 1.0, float("nan")])
@pytest.mark.parametrize("tile", [1, 16])
def test_opcheck_route(budget, tile):
    scores = torch.randn(13, 6)
    on = torch.tensor([False, False, True, False, False, False])
    torch.library.opcheck(spt.route_v1.default, (scores, on, torch.tensor([budget]), 0.5, tile, 4))


def test_opcheck_stats():
    for probe in ([1, 0], [0, 0]):
        torch.library.opcheck(spt.stats_ffn_v1.default, (torch.randn(9, 4), 5, torch.tensor(probe, dtype=torch.int32)))


# --- route ------------------------------------------------------------


def route(scores: Tensor, budget: float = 0.5, *, on=(), max_density: float = 0.5, tile: int = 1, min_tokens: int = 0):
    always = torch.zeros(scores.shape[1], dtype=torch.bool)
    always[list(on)] = True
    return spt.route_v1(scores, always, torch.tensor([budget]), max_density, tile, min_tokens)


@pytest.mark.parametrize(
    "g,density,expected", [(8, 0.5, 4), (5, 0.3, 2), (5, 0.7, 4), (3, 0.5, 2), (8, 0.01, 1), (7, 1, 7)]
)
def test_number_of_blocks_is_rounded_half_up_from_fp32_too(g, density, expected):
    assert reference_ffn.kept_blocks(density, g) == expected
    blocks, _, _ = route(torch.randn(4, g), density, max_density=density)
    assert blocks.shape == (4, expected) and (blocks >= 0).all()


def test_lists_agree_with_each_other():
    scores = torch.randn(63, 8)
    for tile in (1, 4, 64):
        blocks, rows, offsets = route(scores, tile=tile)
        assert rows.shape == (63 * 4 + 8 * (tile - 1),) and offsets[0] == 0
        assert (offsets % tile == 0).all()
        kept = reference_ffn.kept_mask(blocks, 8)
        expected = torch.zeros_like(kept).scatter_(1, scores.topk(4).indices, True)
        assert torch.equal(kept, expected)
        assert (blocks.diff(dim=1) > 0).all()
        for g in range(8):
            group = rows[offsets[g] : offsets[g + 1]]
            listed = group[group >= 0]
            assert torch.equal(listed.long(), kept[:, g].nonzero()[:, 0])
            assert (group[len(listed) :] == -1).all() and len(group) - len(listed) < tile
        assert (rows[offsets[8] :] == -1).all()


def test_smaller_budget_leaves_slots_and_nests():
    scores = torch.randn(20, 8)
    previous = torch.zeros(20, 8, dtype=torch.bool)
    for n in range(1, 5):
        blocks, _, _ = route(scores, n / 8)
        kept = reference_ffn.kept_mask(blocks, 8)
        assert blocks.shape == (20, 4) and (blocks[:, n:] == -1).all() and (kept.sum(1) == n).all()
        assert (kept | ~previous).all()
        previous = kept


def test_ties_go_to_the_lower_block_and_always_on_goes_first():
    blocks, _, _ = route(torch.zeros(3, 8))
    assert blocks.tolist() == [[0, 1, 2, 3]] * 3
    blocks, _, _ = route(torch.zeros(3, 8), on=[6])
    assert blocks.tolist() == [[0, 1, 2, 6]] * 3
    blocks, _, _ = route(torch.zeros(3, 8), 0.125, on=[5, 6])  # more always-on than the budget
    assert blocks.tolist() == [[5, 6, -1, -1]] * 3
    blocks, _, _ = route(torch.zeros(3, 8), on=range(1, 8))  # more than there are slots
    assert blocks.tolist() == [[1, 2, 3, 4]] * 3


def test_bad_scores_never_crash():
    scores = torch.randn(6, 4)
    scores[0] = float("nan")
    scores[1, 2] = float("nan")
    scores[2] = -torch.inf
    scores[3, 3] = torch.inf
    blocks, _, _ = route(scores)
    assert blocks[0].tolist() == [0, 1] and 2 not in blocks[1].tolist()
    assert blocks[2].tolist() == [0, 1] and 3 in blocks[3].tolist()
    for n in (0, 1):
        blocks, rows, offsets = route(torch.randn(n, 4), tile=4)
        assert blocks.shape == (n, 2) and rows.shape == (2 * n + 12,)


@pytest.mark.parametrize("reason", [{"budget": -1.0}, {"min_tokens": 64}])
def test_dense_by_data(reason):
    blocks, _, offsets = route(torch.randn(63, 8), **reason)
    assert (blocks == -1).all() and (offsets == -1).all()


def test_a_token_is_routed_by_itself():
    scores = torch.randn(63, 8)
    blocks, _, _ = route(scores)
    order = torch.randperm(63)
    assert torch.equal(route(scores[order])[0], blocks[order])
    assert torch.equal(route(scores[10:11])[0], blocks[10:11])


# --- routed_ffn ------------------------------------------------------------


def dense_layer(c: Case) -> Tensor:
    """The model's own FFN: no blocks, no permutation."""
    pre = [torch.nn.functional.linear(c.x, w, b) for w, b in zip(c.w_in, c.b_in, strict=True)]
    h = torch.nn.functional.silu(pre[0]) * pre[1] if len(pre) == 2 else torch.nn.functional.gelu(pre[0])
    return torch.nn.functional.linear(h, c.w_out, c.b_out)


@pytest.mark.parametrize("density", [{"budget": 1.0, "max_density": 1.0}, {"budget": -1.0}])
@pytest.mark.parametrize("act", ["gelu(x0)", "silu(x0) * x1"])
@pytest.mark.parametrize("f", [50, 100])
def test_all_blocks_are_the_dense_layer(density, act, f):
    c = case(act=act, f=f, compensation=True, **density)
    grad_y = torch.randn(63, 21, dtype=torch.float64)
    got, expected = gradients(run, c, grad_y), gradients(dense_layer, c, grad_y)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_drops_its_share_and_repeats():
    c = case(n=200, p=0.25, budget=-1.0)
    units = torch.arange(50)
    mask = reference_ffn.hidden_dropout(c.seed, torch.arange(200), units, 50, 0.25, torch.float64)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (mask == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(run(c), run(c))
    assert not torch.equal(run(c), run(replace(c, seed=torch.tensor([99]))))
    assert torch.equal(run(case(p=1.0, bias=False)), torch.zeros(63, 21, dtype=torch.float64))


def test_dropout_does_not_depend_on_the_blocks():
    few, many = case(p=0.3, budget=1.0, max_density=1.0, g=2), case(p=0.3, budget=1.0, max_density=1.0, g=8)
    torch.testing.assert_close(run(few), run(many))


def test_values_of_dropped_blocks_do_not_matter():
    c = case(idle=3, lora=True, act="silu(x0) * x1")
    units = c.permutation[3 * 7 : 4 * 7].long()
    spoiled = case(idle=3, lora=True, act="silu(x0) * x1")
    spoiled.w_in[0][units] = torch.inf
    spoiled.b_in[1][units] = torch.nan
    assert torch.equal(run(spoiled), run(c))
    grads = gradients(run, c, torch.ones(63, 21, dtype=torch.float64))
    assert not grads["w_in0"][units].any() and not grads["w_out"][:, units].any()


def test_frozen_inputs_get_no_gradient_and_no_work():
    c = case(act="silu(x0) * x1")
    c.x.requires_grad_()
    c.b_in[1].requires_grad_()
    run(c).sum().backward()
    assert c.x.grad is not None and c.b_in[1].grad is not None and c.w_in[0].grad is None
    saved = torch.empty(2, 0, 7, dtype=torch.float64)
    needs = [t is c.x for t in c.leaves.values()]
    grads = spt.routed_ffn_backward_v1(*c.backward(torch.ones(63, 21, dtype=torch.float64), saved, needs))
    assert [g.numel() > 0 for g in grads] == needs


def test_nothing_needs_a_gradient():
    c = case(lora=True)
    y, saved, low = spt.routed_ffn_v1(*c.forward)
    assert not any(t.requires_grad for t in (y, saved, low))
    c.w_out.requires_grad_()
    y, saved, _ = spt.routed_ffn_v1(*c.forward)
    assert y.requires_grad and not saved.requires_grad


@pytest.mark.parametrize("used", [0, 2])
def test_one_of_the_two_results_alone(used):
    c, reference_case = (case(down=True, gates=True).trainable() for _ in range(2))
    spt.routed_ffn_v1(*c.forward)[used].sum().backward()
    (plain(reference_case)[:, :21] if used == 0 else plain(reference_case)[:, 21:]).sum().backward()
    for (name, got), expected in zip(c.leaves.items(), reference_case.leaves.values(), strict=True):
        if got is not None:
            pair = [torch.zeros_like(t) if t.grad is None else t.grad for t in (got, expected)]
            torch.testing.assert_close(*pair, msg=name)


def test_second_backward_is_refused():
    c = case().trainable()
    (grad,) = torch.autograd.grad(run(c).square().sum(), c.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_dtype_of_the_region(dtype):
    c = case(dtype=torch.float32, gates=True, compensation=True, lora=True, down=True, lora_p=0.1).trainable()
    with torch.autocast("cpu", dtype):
        y = run(c)
        assert y.dtype == dtype
        y.float().sum().backward()  # inside the region too: the backward op must not be cast again
    assert all(t.grad.dtype == torch.float32 for t in c.leaves.values() if t is not None)
    torch.testing.assert_close(y.float(), run(c), atol=0.5, rtol=0.05)
    wide = case(dtype=torch.float64)
    with torch.autocast("cpu", dtype):
        assert run(wide).dtype == torch.float64


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(63, 19)}, r"w_in \[50, 19\]"),
        ({"w_out": torch.zeros(21, 49)}, r"w_out \[E_out, 50\]"),
        ({"b_in": [torch.zeros(49)]}, r"b_in \[50\]"),
        ({"x": torch.zeros(63, 20, dtype=torch.bfloat16)}, "one dtype"),
        ({"gates": torch.zeros(63, 7)}, r"gates \[63, 8\]"),
        ({"compensation": torch.zeros(8, 20)}, r"compensation \[8, 21\]"),
        ({"p": 0.5}, "a seed"),
        ({"offsets": torch.zeros(52, dtype=torch.int32)}, "at most one per hidden unit"),
        ({"lora_b": [torch.zeros(50, 3)]}, "LoRA lists"),
        ({"lora_down": torch.zeros(3, 49)}, r"lora_down \[r, 50\]"),
        ({"lora_down": torch.zeros(3, 50), "lora_p": 0.5}, "a seed"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run(replace(case(dtype=torch.float32), **change))


def test_empty_batch():
    c = case(n=0, gates=True, compensation=True, lora=True, down=True, act=MADE_UP + " + x1")
    grads = gradients(run, c, torch.zeros(0, 24, dtype=torch.float64))
    assert grads["y"].shape == (0, 24) and not grads["lora_down"].any() and not grads["w_in0"].any() and not grads["b_out"].any()


def test_stats_are_evenly_spaced_rows():
    x = torch.arange(12.0).view(12, 1).expand(12, 3)
    on, off = torch.tensor([1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    assert spt.stats_ffn_v1(x, 4, on)[:, 0].tolist() == [0, 3, 6, 9]
    assert spt.stats_ffn_v1(x[:3].bfloat16(), 6, on)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert not spt.stats_ffn_v1(x, 4, off).any()
    assert not spt.stats_ffn_v1(x[:0], 4, on).any()


def layer(x, w_in, w_out, weight, bias, on, budget, permutation, compensation):
    scores = torch.nn.functional.linear(x.detach(), weight, bias)
    blocks, rows, offsets = spt.route_v1(scores, on, budget, 0.5, 1, 0)
    lists = (blocks, rows, offsets, permutation, compensation)
    rest = ("gelu(x0)", [], None, 0.0, None, 0.0, True)
    return spt.routed_ffn_v1(x, [w_in], [], w_out, None, [], [], None, None, *lists, *rest)[0]


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_sizes_through_one_compilation(inner):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # a reset leaves the counts of earlier tests
    compiled = torch.compile(layer, backend=inner, fullgraph=True, dynamic=True)
    state = (torch.randn(8, 20), torch.randn(8), torch.zeros(8, dtype=torch.bool), torch.tensor([0.5]))
    state = (*state, torch.randperm(50).int(), torch.randn(8, 20))
    for n in (63, 20):
        results = []
        for f in (layer, compiled):
            torch.manual_seed(n)
            x, w_in, w_out = (torch.randn(*s, requires_grad=True) for s in ((n, 20), (50, 20), (20, 50)))
            y = f(x, w_in, w_out, *state)
            y.sum().backward()
            results.append((y, x.grad, w_in.grad, w_out.grad))
        torch.testing.assert_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
