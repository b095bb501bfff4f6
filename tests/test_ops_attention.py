"""The attention ops as their references define them: schema, gradients, selection, masks, statistics."""

from __future__ import annotations

import dataclasses
import itertools
import math

import attention_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from spt_compiler import expression
from spt_compiler.ops import attention, reference
from spt_compiler.ops.selection import RULES
from spt_compiler.ops.selection.common import causal_split, max_keys, max_tiles

OPS = (
    attention.select_tiles,
    attention.select_keys,
    attention.tile_attention,
    attention.tile_attention_backward,
    attention.key_attention,
    attention.key_attention_backward,
    attention.stats_attention,
)


@pytest.fixture(autouse=True)
def reference_bodies():
    """The bodies of the ops themselves, also where another test has installed the lowerings."""
    for op in OPS:
        op.set_kernel_enabled("cpu", enabled=False)
    yield
    for op in OPS:
        op.set_kernel_enabled("cpu", enabled=True)


spt = torch.ops.spt


def tile_lists(case, density=0.3, **options):
    return spt.select_tiles_v1(*case.select_tiles_args(density, **options))


def key_lists(case, density=0.3, rule="pq", **options):
    return spt.select_keys_v1(*case.select_keys_args(density, rule, **options))


# ---------------------------------------------------------------------------------------------------------------------
# Schema, fake, autograd
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal padding", "float"])
def test_opcheck_selection(mask):
    case = cases.make(mask, dtype=torch.float32, n_q=40, n_k=44)
    opcheck(spt.select_tiles_v1.default, case.select_tiles_args())
    opcheck(spt.select_keys_v1.default, case.select_keys_args(rule="pq-match"))


@pytest.mark.parametrize("mask", ["causal padding", "float"])
@pytest.mark.parametrize("tiles", [True, False])
def test_opcheck_attention(mask, tiles):
    options = {"seed": torch.tensor([3]), "p": 0.2, "softcap": 5.0, "empty": "uniform"} if mask == "float" else {}
    case = cases.make(mask, n_q=40, n_k=44, batch=1, **options)
    index, counts = tile_lists(case) if tiles else key_lists(case)
    for x in (case.q, case.k, case.v, case.bias):
        if x is not None:
            x.requires_grad_()
    args = case.attend_args(index, counts, tiles)
    op = spt.tile_attention_v1 if tiles else spt.key_attention_v1
    opcheck(op.default, args)

    out, lse = op(*(x.detach() if isinstance(x, torch.Tensor) else x for x in args))
    args = (torch.ones_like(out), *args[:4], out, lse, *args[4:], [True, False, True, True])
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    backward = spt.tile_attention_backward_v1 if tiles else spt.key_attention_backward_v1
    opcheck(backward.default, args)


def test_opcheck_statistics():
    case = cases.make("causal", dtype=torch.float32, n_q=40, n_k=40)
    out, lse = spt.tile_attention_v1(*case.attend_args(*tile_lists(case)))
    args = (case.q, case.k, case.v, None, case.expr, [], out, lse, case.scale, None, 5, torch.tensor([1, 1], dtype=torch.int32))
    opcheck(spt.stats_attention_v1.default, args)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("mask", ["causal", "float", "empty rows"])
def test_gradcheck(tiles, mask):
    options = {"causal": {}, "float": {"softcap": 1.5, "p": 0.3, "seed": torch.tensor([1 << 40])}, "empty rows": {}}[mask]
    case = cases.make(mask, batch=1, heads=2, groups=1, n_q=13, n_k=13, dim=4, dim_v=3, tile_q=4, tile_k=2, **options)
    case.empty = "uniform"
    index, counts = tile_lists(case, 0.4) if tiles else key_lists(case, 0.4)
    inputs = [x for x in (case.q, case.k, case.v) if x is not None]
    if case.bias is not None and case.bias.is_floating_point():
        inputs.append(case.bias)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    op = spt.tile_attention_v1 if tiles else spt.key_attention_v1

    def run(q, k, v, bias=case.bias):
        args = case.attend_args(index, counts, tiles)
        return op(q, k, v, bias, *args[4:])[0]

    if mask == "float":  # finite differences of -inf are NaN: differentiate the finite entries
        finite = inputs[3].detach().isfinite()
        blocked = inputs[3].detach().masked_fill(finite, 0)
        inputs[3] = inputs[3].detach().masked_fill(~finite, 0).requires_grad_()
        assert torch.autograd.gradcheck(lambda q, k, v, bias: run(q, k, v, bias + blocked), inputs)
    else:
        assert torch.autograd.gradcheck(run, inputs)


def test_second_derivative_is_refused():
    case = cases.make("causal", n_q=20, n_k=20)
    case.q.requires_grad_()
    out, _ = spt.tile_attention_v1(*case.attend_args(*tile_lists(case)))
    (grad,) = torch.autograd.grad(out.sum(), case.q, create_graph=True)
    with pytest.raises(NotImplementedError, match="dense"):
        grad.sum().backward()


@pytest.mark.parametrize("tiles", [True, False])
def test_only_needed_gradients_are_computed(tiles):
    case = cases.make("float", n_q=20, n_k=20)
    index, counts = tile_lists(case) if tiles else key_lists(case)
    op = spt.tile_attention_v1 if tiles else spt.key_attention_v1
    backward = spt.tile_attention_backward_v1 if tiles else spt.key_attention_backward_v1
    args = case.attend_args(index, counts, tiles)
    out, lse = op(*args)
    inputs = (case.q, case.k, case.v, case.bias)
    full = backward(torch.ones_like(out), *inputs, out, lse, *args[4:], [True] * 4)
    for needs in itertools.product([True, False], repeat=4):
        grads = backward(torch.ones_like(out), *inputs, out, lse, *args[4:], list(needs))
        for grad, need, expected, x in zip(grads, needs, full, inputs, strict=True):
            assert torch.equal(grad, expected) if need else grad.shape == (0,)
            assert not need or (grad.shape == x.shape and grad.is_contiguous())
    case.k.requires_grad_()
    out, lse = op(*case.attend_args(index, counts, tiles))
    assert out.requires_grad and not lse.requires_grad
    out.sum().backward()
    torch.testing.assert_close(case.k.grad, full[1])
    assert case.q.grad is None


@pytest.mark.parametrize("op", ["tiles", "keys"])
def test_lists_and_samples_are_not_differentiable(op):
    case = cases.make("causal", dtype=torch.float32, n_q=30, n_k=30)
    case.q.requires_grad_()
    case.codebook.requires_grad_()
    index, counts = tile_lists(case) if op == "tiles" else key_lists(case)
    assert not index.requires_grad and not counts.requires_grad
    out, lse = spt.tile_attention_v1(*case.attend_args(*tile_lists(case)))
    probe = torch.tensor([1, 1], dtype=torch.int32)
    stats = spt.stats_attention_v1(case.q, case.k, case.v, None, case.expr, [], out, lse, case.scale, None, 4, probe)
    assert not any(x.requires_grad for x in stats)


# ---------------------------------------------------------------------------------------------------------------------
# Attention over a selection
# ---------------------------------------------------------------------------------------------------------------------


def attend(case, tiles, density=0.3):
    """(out, lse, kept pairs) of the op on its own selection."""
    if tiles:
        index, counts = tile_lists(case, density)
        return *spt.tile_attention_v1(*case.attend_args(index, counts)), cases.kept_tiles(case, index, counts)
    index, counts = key_lists(case, density)
    return *spt.key_attention_v1(*case.attend_args(index, counts, False)), cases.kept_keys(case, index, counts)


@pytest.mark.parametrize("mask", cases.MASKS)
@pytest.mark.parametrize("tiles", [True, False])
def test_forward_and_backward_equal_masked_attention(mask, tiles):
    case = cases.make(mask, n_q=63, n_k=63, empty="uniform" if mask == "empty rows" else "zero")
    inputs = [case.q, case.k, case.v]
    if case.bias is not None and case.bias.is_floating_point():
        inputs.append(case.bias)
    for x in inputs:
        x.requires_grad_()
    out, lse, kept = attend(case, tiles)
    assert 0.05 < kept.float().mean() < 0.7
    expected = cases.oracle(case, kept)
    assert cases.error(out, expected) < 1e-9
    upstream = torch.randn_like(out.transpose(1, 2)).transpose(1, 2)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert cases.error(actual, torch.nan_to_num(wanted)) < 1e-6
    assert lse.dtype == torch.float64


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize(("n_q", "n_k", "groups"), [(40, 77, 1), (90, 50, 4)])
def test_cross_attention_and_grouped_heads(tiles, n_q, n_k, groups):
    for mask in ("none", "causal"):  # causal is aligned top-left
        case = cases.make(mask, n_q=n_q, n_k=n_k, groups=groups, softcap=2.0)
        out, _, kept = attend(case, tiles)
        assert cases.error(out, cases.oracle(case, kept)) < 1e-9


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("empty", ["zero", "nan", "uniform"])
def test_rows_that_may_see_nothing(tiles, empty):
    case = cases.make("empty rows", n_q=40, n_k=40, empty=empty)
    out, lse, kept = attend(case, tiles, 0.5)
    nothing = ~case.allowed().any(-1)
    assert 0 < nothing.sum() < nothing.numel()
    assert (lse[nothing] == -math.inf).all()
    if empty == "zero":
        assert (out[nothing] == 0).all()
        math_path = F.scaled_dot_product_attention(
            case.q, case.k.repeat_interleave(2, 1), case.v.repeat_interleave(2, 1), case.bias, scale=case.scale
        )
        assert (math_path[nothing.expand(math_path.shape[:3])] == 0).all()  # what torch's own op does
    elif empty == "nan":
        assert out[nothing].isnan().all() and out[~nothing].isfinite().all()
    else:
        mean = case.v.repeat_interleave(2, 1).mean(2, keepdim=True).expand_as(out)
        torch.testing.assert_close(out[nothing], mean[nothing])


def test_finfo_masks_make_uniform_rows_as_eager_does():
    case = cases.make("finfo", n_q=40, n_k=40)
    out, _ = spt.tile_attention_v1(*case.attend_args(*tile_lists(case, 1.0)))
    mean = case.v.repeat_interleave(2, 1).mean(2)
    torch.testing.assert_close(out[0, :, 5], mean[0])
    torch.testing.assert_close(out, cases.oracle(case, cases.everything(case)))


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("everything", ["listed", "by data"])
def test_dense_limit_is_sdpa(tiles, everything):
    case = cases.make("causal", groups=4, dtype=torch.float32, n_q=63, n_k=63)
    for x in (case.q, case.k, case.v):
        x.requires_grad_()
    density = 1.0 if everything == "listed" else -1.0
    index, counts = (tile_lists if tiles else key_lists)(case, density, max_density=1.0)
    assert bool((counts < 0).all()) == (everything == "by data")
    op = spt.tile_attention_v1 if tiles else spt.key_attention_v1
    out, _ = op(*case.attend_args(index, counts, tiles))
    dense = F.scaled_dot_product_attention(case.q, case.k, case.v, is_causal=True, scale=case.scale)
    torch.testing.assert_close(out, dense)
    upstream = torch.randn_like(out)
    inputs = (case.q, case.k, case.v)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(dense, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tiles", [True, False])
def test_expanded_upstream_gradients(tiles):
    case = cases.make("causal", n_q=30, n_k=30)
    case.q.requires_grad_()
    out = attend(case, tiles)[0]
    (actual,) = torch.autograd.grad(out.sum(), case.q, retain_graph=True)  # an expanded 0-d gradient
    (wanted,) = torch.autograd.grad(out, case.q, torch.ones_like(out))
    # (Not bit by bit: a product may round otherwise where its operand lies at another address.)
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Pseudo-keys of dropped tiles
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        ("none", {"groups": 4, "softcap": 1.5}),
        ("causal", {"p": 0.3, "seed": torch.tensor([7])}),
        ("causal padding", {}),
        ("bool", {}),
        ("float", {"softcap": 2.0}),
        ("head bias", {"p": 0.2, "seed": torch.tensor([-3])}),
    ],
)
def test_pseudo_keys_and_their_gradients(mask, options):
    case = cases.make(mask, n_q=51, n_k=51, compensate=True, **options)  # the last tile holds 3 keys
    if mask == "float":  # tiles that are seen whole, beside those that are not
        case.bias[..., 8:32] = case.bias[..., 8:32].clamp(min=-2)
    if mask == "bool":
        case.bias[..., 40:] = True
    inputs = [case.q, case.k, case.v]
    if case.bias is not None and case.bias.is_floating_point():
        inputs.append(case.bias)
    for x in inputs:
        x.requires_grad_()
    index, counts = tile_lists(case, 0.25)
    out, lse = spt.tile_attention_v1(*case.attend_args(index, counts))
    kept = cases.kept_tiles(case, index, counts)
    expected = cases.compensated_oracle(case, kept)
    assert cases.error(out, expected) < 1e-9
    case.compensate = False
    plain, plain_lse = spt.tile_attention_v1(*case.attend_args(index, counts))
    assert cases.error(out, plain) > 0.05 and (lse >= plain_lse - 1e-9).all() and (lse > plain_lse + 1e-3).any()
    upstream = torch.randn_like(out)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert cases.error(actual, torch.nan_to_num(wanted)) < 1e-9


def test_pseudo_keys_pass_opcheck():
    case = cases.make("head bias", n_q=20, n_k=27, batch=1, compensate=True)
    index, counts = tile_lists(case)
    for x in (case.q, case.k, case.v, case.bias):
        x.requires_grad_()
    args = case.attend_args(index, counts)
    opcheck(spt.tile_attention_v1.default, args)
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, lse = spt.tile_attention_v1(*args)
    args = (torch.ones_like(out), *args[:4], out, lse, *args[4:-1], [True] * 4, True)
    opcheck(spt.tile_attention_backward_v1.default, args)


def test_pseudo_keys_show_nothing_beyond_the_mask_and_vanish_in_the_dense_limit():
    case = cases.make("causal", n_q=64, n_k=64, tile_q=16, compensate=True)
    index, counts = tile_lists(case, 0.2)
    out, _ = spt.tile_attention_v1(*case.attend_args(index, counts))
    case.k, case.v = case.k.clone(), case.v.clone()
    case.k[:, :, 41:], case.v[:, :, 41:] = 5.0, -5.0
    changed, _ = spt.tile_attention_v1(*case.attend_args(index, counts))
    assert torch.equal(out[:, :, :41], changed[:, :, :41]) and not torch.equal(out[:, :, 41:], changed[:, :, 41:])
    dense, _ = spt.tile_attention_v1(*case.attend_args(index, torch.full_like(counts, -1)))
    torch.testing.assert_close(dense, cases.oracle(case, cases.everything(case)))


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_right_share_without_pattern(p):
    index = torch.arange(1 << 18).view(512, 512)
    masks = [reference.dropout_keep(torch.tensor([seed]), index, p) for seed in (0, 1, -1, 1 << 45)]
    for keep in masks:
        assert abs(float(keep.double().mean()) - (1 - p)) < 0.005
        centred = keep.double() - keep.double().mean()
        for rows, columns in ((0, 1), (1, 0), (1, 1), (0, 16), (64, 0)):
            shifted = centred[rows:, columns:] * centred[: 512 - rows, : 512 - columns]
            assert abs(float(shifted.mean() / centred.var())) < 0.01
    for one, other in itertools.combinations(masks, 2):
        assert abs(float((one ^ other).double().mean()) - 2 * p * (1 - p)) < 0.005


def test_dropout_hash_is_the_documented_one():
    def by_hand(seed: int, index: int) -> int:
        low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF

        def scramble(x: int, a: int, b: int) -> int:
            x ^= a
            x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
            return ((x ^ (x >> 15)) + b) * 0x846CA68B & 0xFFFFFFFF

        key0 = scramble(low, 0x9E3779B9, high)
        return scramble(index & 0xFFFFFFFF, key0, scramble(high, 0x7F4A7C15, key0))

    index = [0, 1, 77, 2**31, 2**32 - 1, 2**32 + 5]
    for seed in (0, 1, 123456789, 2**33 + 17, -5):
        for p in (0.1, 0.5, 0.9):
            keep = reference.dropout_keep(torch.tensor([seed]), torch.tensor(index), p)
            assert keep.tolist() == [by_hand(seed, i) >= int(p * 2**32) for i in index]


@pytest.mark.parametrize("tiles", [True, False])
def test_dropout_is_the_same_in_forward_and_backward(tiles):
    case = cases.make("causal", n_q=40, n_k=40, p=0.4, seed=torch.tensor([99]))
    for x in (case.q, case.k, case.v):
        x.requires_grad_()
    out, _, kept = attend(case, tiles)
    expected = cases.oracle(case, kept)
    assert cases.error(out, expected) < 1e-9
    upstream = torch.randn_like(out)
    inputs = (case.q, case.k, case.v)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert cases.error(actual, wanted) < 1e-9
    case.seed = torch.tensor([100])
    assert cases.error(attend(case, tiles)[0].detach(), out.detach()) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Selection of tiles
# ---------------------------------------------------------------------------------------------------------------------


def tiles_by_loops(case, density, rule="pq"):
    """The rule of `select_tiles` spelled out, one query and one tile at a time."""
    batch, heads, n_q, _ = case.q.shape
    groups, n_k = case.k.shape[1:3]
    n_tiles = -(-n_k // case.tile_k)
    allowed = case.allowed()
    bias = torch.zeros(batch, heads, n_q, n_k, dtype=torch.float64)
    if case.bias is not None and case.bias.dtype != torch.bool:
        bias = case.bias.double().expand_as(bias)
    keys = case.k.double()
    if rule == "pq":
        centred = keys - case.key_mean.double()[:, None]
        words = case.codebook.double()
        parts = centred.unflatten(-1, (words.shape[1], -1))  # [B, Hkv, Tk, P, ds]
        distance = (parts.unsqueeze(-2) - words[:, None]).square().sum(-1)  # [B, Hkv, Tk, P, C]
        chosen = distance.argmin(-1)
        keys = torch.empty_like(keys)
        for g, p in itertools.product(range(groups), range(words.shape[1])):
            width = words.shape[-1]
            keys[:, g, :, p * width : (p + 1) * width] = words[g, p, chosen[:, g, :, p]]
        keys = keys + case.key_mean.double()[:, None]
    wanted = max(1, math.ceil(round(density * n_k, 6) / case.tile_k))
    result = {}
    for b, g, i in itertools.product(range(batch), range(groups), range(-(-n_q // case.tile_q))):
        mass, visible = [0.0] * n_tiles, [False] * n_tiles
        rows = range(i * case.tile_q, min((i + 1) * case.tile_q, n_q))
        for h, q in itertools.product(range(g * heads // groups, (g + 1) * heads // groups), rows):
            logits = [-math.inf] * n_tiles
            for j in range(n_tiles):
                inside = [k for k in range(j * case.tile_k, min((j + 1) * case.tile_k, n_k)) if allowed[b, h, q, k]]
                if inside:
                    visible[j] = True
                    level = bias[b, h, q, inside]
                    mean = (level.softmax(0)[:, None] * keys[b, g, inside]).sum(0)
                    z = case.scale * torch.dot(case.q[b, h, q].double(), mean)
                    z = z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)
                    logits[j] = float(z + level.logsumexp(0))
            if max(logits) > -math.inf:
                for j, share in enumerate(torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()):
                    mass[j] += share
        preferred = {visible.index(True)} if any(visible) else set()
        if "k <= q" in case.expr.split(" & ") and n_q == n_k:
            own = -(-case.tile_q // case.tile_k)
            near = min(own, max(0, (wanted - own - 2) // 2))
            before = range(max(0, rows[0] // case.tile_k - near), rows[0] // case.tile_k)
            preferred |= {j for j in {*before, *(q // case.tile_k for q in rows)} if visible[j]}
        others = sorted((j for j in range(n_tiles) if visible[j] and j not in preferred), key=lambda j: (-mass[j], j))
        result[b, g, i] = sorted(preferred | set(others[: max(0, wanted - len(preferred))]))
    return result


@pytest.mark.parametrize("mask", ["none", "causal", "causal padding", "float", "window", "empty rows"])
@pytest.mark.parametrize("rule", ["pq", "mean"])
def test_select_tiles_follows_the_definition(mask, rule):
    case = cases.make(mask, n_q=27, n_k=27, tile_q=8, tile_k=3, softcap=3.0 if mask == "float" else None)
    for density in (0.1, 0.5):
        tiles, counts = spt.select_tiles_v1(*case.select_tiles_args(density, rule))
        for (b, g, i), expected in tiles_by_loops(case, density, rule).items():
            count = int(counts[b, g, i])
            assert tiles[b, g, i, :count].tolist() == expected
            assert (tiles[b, g, i, count:] == -1).all()


def test_select_tiles_of_cross_attention_forces_no_diagonal():
    case = cases.make("causal", n_q=20, n_k=31, tile_q=8, tile_k=3)
    tiles, counts = spt.select_tiles_v1(*case.select_tiles_args(0.1, "mean"))
    for (b, g, i), expected in tiles_by_loops(case, 0.1, "mean").items():
        assert tiles[b, g, i, : int(counts[b, g, i])].tolist() == expected


@pytest.mark.parametrize(
    ("n_k", "density", "expected"), [(1000, 0.1, 10), (1000, 0.101, 11), (4096, 0.25, 64), (100, 1.0, 10), (7, 0.01, 1)]
)
def test_number_of_tiles(n_k, density, expected):
    # fp32 0.1 is larger than 0.1: a plain ceil would keep 11 of 100 tiles.
    case = cases.make("none", batch=1, heads=1, groups=1, n_q=16, n_k=n_k, tile_q=16, tile_k=10 if n_k != 4096 else 16)
    tiles, counts = spt.select_tiles_v1(*case.select_tiles_args(density, "mean"))
    # One query tile; the lists are stored in two rows and slots at least, the rest of them unused.
    assert counts.tolist() == [[[expected, 0]]]
    assert tiles.shape[-1] == max(2, max_tiles(n_k, density, case.tile_q, case.tile_k)) >= expected
    assert (tiles[0, 0, 0, expected:] == -1).all() and (tiles[0, 0, 1] == -1).all()


def test_budget_is_read_as_data_below_a_static_maximum():
    case = cases.make("none", n_q=64, n_k=160)
    shape = None
    for budget, expected in ((0.1, 2), (0.25, 5), (0.5, 10), (0.9, 10), (-1.0, -1)):
        tiles, counts = spt.select_tiles_v1(*case.select_tiles_args(budget, max_density=0.5))
        assert (counts == expected).all()
        assert shape is None or tiles.shape == shape
        shape = tiles.shape
        keys, counts = spt.select_keys_v1(*case.select_keys_args(budget, max_density=0.5))
        assert (counts == (expected if expected < 0 else min(round(budget * 160), 80))).all() and keys.shape[-1] == 80
    assert (spt.select_tiles_v1(*case.select_tiles_args(min_keys=161))[1] == -1).all()
    assert (spt.select_tiles_v1(*case.select_tiles_args(min_keys=160))[1] > 0).all()
    assert (spt.select_keys_v1(*case.select_keys_args(min_keys=161))[1] == -1).all()


def test_forced_tiles_win_over_a_smaller_budget():
    case = cases.make("causal", n_q=96, n_k=96)  # query tiles of 32 rows own 4 key tiles of 8
    tiles, counts = tile_lists(case, 0.02)
    assert (counts[:, :, 1:] == 5).all() and (counts[:, :, 0] == 4).all()
    assert (tiles[:, :, 1, :5] == torch.tensor([0, 4, 5, 6, 7])).all()
    padded = cases.make("causal padding", n_q=96, n_k=96)
    tiles, counts = spt.select_tiles_v1(*padded.select_tiles_args(0.02))
    # The last sequence starts with 16 padded positions: its first visible tile is number 2.
    assert (tiles[-1, :, 2, :5] == torch.tensor([2, 8, 9, 10, 11])).all()
    # The first ends with 24: the last three tiles of the diagonal are invisible and not listed.
    assert (tiles[0, :, 2, :2] == torch.tensor([0, 8])).all() and (counts[0, :, 2] == 2).all()


def test_tiles_near_the_query_tile_are_kept_before_those_of_larger_mass():
    case = cases.make("causal", n_q=160, n_k=160)  # 20 key tiles of 8; each query tile of 32 rows owns 4
    case.q[:], case.k[:, :, 96:128] = 1.0, -10.0  # the four tiles before the last query tile have the least mass of all
    for kept, near in ((5, 0), (7, 0), (8, 1), (9, 1), (10, 2), (14, 4), (16, 4)):
        tiles, counts = spt.select_tiles_v1(*case.select_tiles_args(kept / 20, "mean"))
        last = tiles[:, :, 4]
        assert (counts[:, :, 4] == kept).all()
        assert (((last >= 12) & (last < 16)).sum(-1) == near).all(), kept
        assert all((last == j).any(-1).all() for j in (0, *range(16 - near, 20)))
    # Without causality nothing is near.
    tiles, _ = spt.select_tiles_v1(*dataclasses.replace(case, expr="").select_tiles_args(0.7, "mean"))
    assert not ((tiles[:, :, 4] >= 12) & (tiles[:, :, 4] < 16)).any()


@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
@pytest.mark.parametrize("tiles", [True, False])
def test_lists_are_ascending_unique_in_range_and_nested(mask, tiles):
    case = cases.make(mask, dtype=torch.float32)
    n = -(-100 // case.tile_k) if tiles else 100
    unit = case.tile_k if tiles else 1
    smaller = None
    for kept in (3, 4, 5, 9, 10):
        density = kept * unit / 100
        for rule in ("mean",) if tiles else ("pq", "pq-match"):
            index, counts = (tile_lists if tiles else key_lists)(case, density, rule=rule, max_density=0.99)
            used = torch.arange(index.shape[-1]) < counts.unsqueeze(-1)
            assert ((index >= 0) == used).all() and (index < n).all()
            steps = index[..., 1:] - index[..., :-1]
            assert (steps[used[..., 1:]] > 0).all()
            if rule == "pq-match":
                continue
            mask_now = reference.listed(index, counts, n)
            assert smaller is None or not (smaller & ~mask_now).any()
            smaller = mask_now


def test_selection_survives_nan_and_no_rows():
    case = cases.make("causal", dtype=torch.float32)
    case.q[0, 0, 50:] = torch.nan
    case.k[1, 1, 20] = torch.inf
    for index, counts in (tile_lists(case), key_lists(case), key_lists(case, rule="pq-match")):
        used = torch.arange(index.shape[-1]) < counts.unsqueeze(-1)
        assert ((index >= 0) == used).all()
        assert (counts > 0).all()
    empty = cases.make("causal", batch=2, dtype=torch.float32)
    empty.q, empty.k, empty.v = (x[:0] for x in (empty.q, empty.k, empty.v))
    index, counts = tile_lists(empty)
    out, _ = spt.tile_attention_v1(*empty.attend_args(index, counts))
    assert index.shape[0] == 0 and out.shape == (0, 4, 100, 20)


def test_rule_pq_without_a_codebook_scores_plain_keys():
    case = cases.make("causal", dtype=torch.float32)
    case.codebook = case.key_mean = None
    assert torch.equal(tile_lists(case, rule="pq")[0], tile_lists(case, rule="mean")[0])
    keys, counts = key_lists(case, 0.1)
    scores = (case.q @ case.k.repeat_interleave(2, 1).transpose(-1, -2)).masked_fill(~case.allowed(), -math.inf)
    best = scores[0, 0, 70].topk(10).indices.sort().values
    assert keys[0, 0, 70].tolist() == best.tolist() and counts[0, 0, 70] == 10


# ---------------------------------------------------------------------------------------------------------------------
# Selection of keys
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "causal", "float", "empty rows"])
@pytest.mark.parametrize("rule", ["pq", "pq-match"])
def test_select_keys_follows_the_definition(mask, rule):
    case = cases.make(mask, n_q=25, n_k=31)
    allowed = case.allowed()
    words, mean = case.codebook.double(), case.key_mean.double()

    def codes(x, g):
        return (x.unflatten(-1, (words.shape[1], 1, -1)) - words[g]).square().sum(-1).argmin(-1)

    for length in (1, 7):
        keys, counts = key_lists(case, length / 31, rule)
        for b, h, q in itertools.product(range(2), range(4), range(25)):
            g = h // 2
            k_codes = codes(case.k[b, g] - mean[g], g)
            if rule == "pq":
                decoded = torch.cat([words[g, p, k_codes[:, p]] for p in range(words.shape[1])], -1) + mean[g]
                score = decoded @ case.q[b, h, q] * case.scale
            else:
                score = (codes(case.q[b, h, q], g) == k_codes).sum(-1).double()
            if case.bias is not None and case.bias.dtype != torch.bool:
                score = score + case.bias[0, h, q]
            position = q + 31 - 25

            def order(k, score=score, position=position):
                near = abs(k - position) if rule == "pq-match" else 0
                return (-round(float(score[k]), 9), near, k)

            candidates = sorted((k for k in range(31) if allowed[b, h, q, k]), key=order)
            expected = sorted(candidates[:length])
            assert keys[b, h, q, : int(counts[b, h, q])].tolist() == expected


def test_permuting_keys_permutes_the_selection():
    case = cases.make("none", dtype=torch.float64)
    order = torch.randperm(100)
    kept = reference.listed(*key_lists(case), 100)
    case.k = case.k[:, :, order]
    permuted = reference.listed(*key_lists(case), 100)
    # Keys that fall on the same codewords tie, and ties go by position.
    assert (kept[..., order] == permuted).double().mean() > 0.999
    assert (kept == permuted).double().mean() < 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Who may influence whom
# ---------------------------------------------------------------------------------------------------------------------


def run_everything(case, tiles, rule):
    index, counts = (tile_lists if tiles else key_lists)(case, rule=rule)
    op = spt.tile_attention_v1 if tiles else spt.key_attention_v1
    return index, counts, *op(*case.attend_args(index, counts, tiles))


RULES_BY_GRANULARITY = [(True, "pq"), (True, "mean"), (False, "pq"), (False, "pq-match")]


@pytest.mark.parametrize(("tiles", "rule"), RULES_BY_GRANULARITY)
def test_later_tokens_never_change_earlier_results(tiles, rule):
    case = cases.make("causal", dtype=torch.float32)
    before = run_everything(case, tiles, rule)
    # Tiles share one selection: only earlier query tiles are safe from a change inside a tile.
    changed, safe_rows = (70, 64) if tiles else (70, 70)
    for x in (case.q, case.k, case.v):
        x[:, :, changed:] = torch.randn_like(x[:, :, changed:]) * 3
    after = run_everything(case, tiles, rule)
    safe_lists = safe_rows // case.tile_q if tiles else safe_rows
    assert all(torch.equal(x[:, :, :safe_lists], y[:, :, :safe_lists]) for x, y in zip(before[:2], after[:2], strict=True))
    assert all(torch.equal(x[:, :, :safe_rows], y[:, :, :safe_rows]) for x, y in zip(before[2:], after[2:], strict=True))
    assert not torch.equal(before[2][:, :, changed:], after[2][:, :, changed:])


@pytest.mark.parametrize("mask", ["padding", "causal padding", "bool key"])
@pytest.mark.parametrize(("tiles", "rule"), RULES_BY_GRANULARITY)
def test_masked_keys_never_leak(tiles, rule, mask):
    if mask == "bool key":
        case = cases.make("none", dtype=torch.float32)
        hidden = torch.zeros(2, 100, dtype=torch.bool)
        hidden[0, 40:53] = hidden[1, 90:] = True
        case.bias = (~hidden)[:, None, None].expand(2, 1, 100, 100)
    else:
        case = cases.make(mask, dtype=torch.float32)
        hidden = ~case.expr_in[0]
    before = run_everything(case, tiles, rule)
    for x in (case.k, case.v):
        x[hidden.unsqueeze(1).expand(x.shape[:3])] = 50.0
    after = run_everything(case, tiles, rule)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize(("tiles", "rule"), RULES_BY_GRANULARITY)
def test_batch_rows_are_independent(tiles, rule):
    case = cases.make("causal padding", dtype=torch.float32)
    before = run_everything(case, tiles, rule)
    for x in (case.q, case.k, case.v):
        x[1] = torch.randn_like(x[1])
    case.expr_in[0][1] = True
    after = run_everything(case, tiles, rule)
    assert all(torch.equal(x[0], y[0]) for x, y in zip(before, after, strict=True))
    assert not torch.equal(before[2][1], after[2][1])


# ---------------------------------------------------------------------------------------------------------------------
# Autocast, errors, expressions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [True, False])
def test_autocast_casts_attention_and_leaves_selection_alone(tiles):
    case = cases.make("float", dtype=torch.float32)
    for x in (case.q, case.k, case.v, case.bias):
        x.requires_grad_()
    plain = (tile_lists if tiles else key_lists)(case)
    with torch.autocast("cpu", torch.bfloat16):
        index, counts = (tile_lists if tiles else key_lists)(case)
        op = spt.tile_attention_v1 if tiles else spt.key_attention_v1
        out, lse = op(*case.attend_args(index, counts, tiles))
        probe = torch.tensor([1, 1], dtype=torch.int32)
        stats = (case.q, case.k, case.v, case.bias, "", [], out, lse, case.scale, None, 4, probe)
        sample = spt.stats_attention_v1(*stats)
        out.float().sum().backward()
    assert torch.equal(index, plain[0]) and torch.equal(counts, plain[1])
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(sample[2], spt.stats_attention_v1(*stats)[2])
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in (case.q, case.k, case.v, case.bias))
    bf16 = [x.detach().bfloat16() for x in (case.q, case.k, case.v, case.bias)]
    assert torch.equal(out, op(*bf16, *case.attend_args(index, counts, tiles)[4:])[0])
    with torch.autocast("cpu", torch.bfloat16):
        doubles = [x.double() for x in bf16]
        assert op(*doubles, *case.attend_args(index, counts, tiles)[4:])[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": (2, 3, 100, 24)}, "multiple of Hkv"),
        ({"k": (2, 2, 100, 20)}, "head dimension"),
        ({"v": (2, 2, 90, 20)}, "expected v"),
        ({"bias": (2, 4, 100, 90)}, "broadcasts"),
        ({"empty": "one"}, "empty"),
        ({"p": 0.5}, "seed"),
        ({"p": 2.0}, "probability"),
        ({"dtype": True}, "one dtype"),
        ({"counts": True}, "counts"),
    ],
)
def test_wrong_arguments_are_value_errors(change, match):
    case = cases.make("none", dtype=torch.float32)
    index, counts = tile_lists(case)
    for name, value in change.items():
        if isinstance(value, tuple):
            setattr(case, name, torch.randn(value))
        elif name == "dtype":
            case.k = case.k.double()
        elif name == "counts":
            counts = counts[:, :, :1]
        else:
            setattr(case, name, value)
    with pytest.raises(ValueError, match=match):
        spt.tile_attention_v1(*case.attend_args(index, counts))


@pytest.mark.parametrize("rule", ["pq-match", "nearest"])
def test_wrong_rules_are_value_errors(rule):
    case = cases.make("none")
    with pytest.raises(ValueError, match="rule"):
        tile_lists(case, rule=rule)
    with pytest.raises(ValueError, match="rule"):
        key_lists(case, rule="mean")
    case.codebook = None
    with pytest.raises(ValueError, match="codebook"):
        key_lists(case, rule="pq-match")
    case.codebook = torch.randn(2, 6, 4, 3)
    with pytest.raises(ValueError, match="codebook"):
        tile_lists(case)


def test_every_rule_says_what_it_works_on():
    assert {name: (r.tile_keys is not None, r.key_scores is not None) for name, r in RULES.items()} == {
        "pq": (True, True),
        "mean": (True, False),
        "pq-match": (False, True),
    }


@pytest.mark.parametrize(
    ("expr", "causal", "rest"),
    [
        ("", False, None),
        ("k <= q", True, None),
        ("(k <= q) & t0[b, k]", True, "t0[b, k]"),
        ("t0[b, k] & (k <= q) & k > q - 5", True, "t0[b, k] & k > q - 5"),
        ("k <= q | t0[k] > 0", False, "k <= q | t0[k] > 0"),
        ("k < q", False, "k < q"),
    ],
)
def test_causal_split(expr, causal, rest):
    found, others = causal_split(expr)
    assert found == causal
    assert others == (None if rest is None else expression.parse(rest))


def test_capacities_of_lists():
    assert max_tiles(1024, 0.25, 64, 16) == 16
    assert max_tiles(1024, 0.01, 64, 16) == 6  # room for the forced ones
    assert max_tiles(20, 0.01, 64, 16) == 2  # no more than there are
    assert max_tiles(1000, 0.1, 16, 10) == 10
    assert [max_keys(n, 0.1) for n in (1, 9, 100, 101)] == [1, 1, 10, 11]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def stats(case, out, lse, collect=1, measure=1, rows=9):
    probe = torch.tensor([collect, measure], dtype=torch.int32)
    head = (case.q, case.k, case.v, case.bias, case.expr, case.expr_in, out, lse)
    return spt.stats_attention_v1(*head, case.scale, case.softcap, rows, probe)


@pytest.mark.parametrize("mask", ["causal", "float", "window", "empty rows"])
def test_quality_compares_with_dense_attention(mask):
    n_q = 16 if mask == "causal" else 12
    case = cases.make(mask, n_q=n_q, n_k=50, softcap=4.0, dtype=torch.float32)  # 2 x 16 positions: all are measured
    density = 0.06 if mask == "causal" else 0.2
    index, counts = key_lists(case, density)
    out, lse = spt.key_attention_v1(*case.attend_args(index, counts, False))
    dense = cases.oracle(case, cases.everything(case))
    valid = case.allowed().any(-1)
    mass, error, energy, number = stats(case, out, lse)[2].tolist()
    assert number == int(valid.sum())
    assert (number < valid.numel()) == (mask == "empty rows")
    assert error == pytest.approx(float((out - dense).square().sum(-1)[valid].sum()), rel=1e-3)
    assert energy == pytest.approx(float(dense.square().sum(-1)[valid].sum()), rel=1e-4)
    full = spt.key_attention_v1(*case.attend_args(*key_lists(case, -1.0, max_density=density), False))
    assert mass == pytest.approx(float((lse - full[1]).exp()[valid].sum()), rel=1e-4)
    assert 0.2 * number < mass < 0.99 * number
    assert stats(case, *full)[2][1] < 1e-6 * energy and stats(case, *full)[2][0] == pytest.approx(number, rel=1e-5)


def test_quality_measures_at_most_32_positions():
    case = cases.make("causal", dtype=torch.float32)
    out, lse = spt.tile_attention_v1(*case.attend_args(*tile_lists(case)))
    assert stats(case, out, lse)[2][3] == 32 * 4


def test_samples_are_evenly_spaced_and_repeat_when_few():
    case = cases.make("none", n_q=10, n_k=7, dtype=torch.float32)
    out, lse = spt.tile_attention_v1(*case.attend_args(*tile_lists(case)))
    queries, keys, _ = stats(case, out, lse, rows=28)
    assert queries.shape == keys.shape == (2, 28, 24) and queries.dtype == torch.float32
    for g in range(2):
        pool = case.k[:, g].reshape(-1, 24)
        assert torch.equal(keys[g], pool.repeat_interleave(2, 0))  # 14 keys for 28 rows
        pool = case.q[:, 2 * g : 2 * g + 2].reshape(-1, 24)  # both heads of the group
        assert torch.equal(queries[g], pool[torch.arange(28) * 40 // 28])


def test_what_is_not_asked_for_is_zero():
    case = cases.make("none", dtype=torch.float32)
    out, lse = spt.tile_attention_v1(*case.attend_args(*tile_lists(case)))
    rows, keys, quality = stats(case, out, lse, collect=0)
    assert not rows.any() and not keys.any() and quality.all()
    rows, keys, quality = stats(case, out, lse, measure=0)
    assert rows.any() and keys.any() and not quality.any()


def test_non_finite_rows_do_not_enter_the_quality():
    case = cases.make("none", n_q=12, n_k=50, dtype=torch.float32)
    case.q[0, 0, 3] = torch.nan
    out, lse = spt.tile_attention_v1(*case.attend_args(*tile_lists(case)))
    quality = stats(case, out, lse)[2]
    assert quality.isfinite().all() and quality[3] == 2 * 12 * 4 - 1
