"""Routing mathematics: on a planted FFN the learned router beats its baselines, and bad input stays finite."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from spt_compiler import routing
from spt_compiler.ops import reference_ffn

N_BLOCKS, N_KEEP = 8, 4


def planted(n_tokens: int, *, width: int = 32, n_units: int = 256, seed: int = 0):
    """A ReLU FFN whose hidden units form 8 groups, shuffled; each token needs 4 of them, the odd ones more often.

    Returns: x [S, E], h [S, F], w_out [E, F], group of each unit [F].
    """
    fixed = torch.Generator().manual_seed(0)
    group = torch.randperm(n_units, generator=fixed) % N_BLOCKS
    directions = torch.linalg.qr(torch.randn(width, N_BLOCKS, generator=fixed))[0].t()
    w_in = directions[group] + 0.05 * torch.randn(n_units, width, generator=fixed)
    w_out = torch.randn(width, n_units, generator=fixed) / n_units**0.5
    tokens = torch.Generator().manual_seed(seed + 1)
    liking = torch.rand(n_tokens, N_BLOCKS, generator=tokens) + 0.3 * (torch.arange(N_BLOCKS) % 2)
    needs = torch.zeros(n_tokens, N_BLOCKS).scatter_(1, liking.topk(N_KEEP).indices, 1.0)
    strength = 0.5 + torch.rand(n_tokens, 1, generator=tokens)
    x = 3 * strength * needs @ directions + 0.1 * torch.randn(n_tokens, width, generator=tokens)
    return x, (x @ w_in.t() - 0.3).relu(), w_out, group


def error(y_blocks: Tensor, kept: Tensor, compensation: Tensor | None = None) -> float:
    missing = torch.where(kept[..., None], 0, y_blocks).sum(1)
    if compensation is not None:
        missing = missing - (~kept).float() @ compensation
    return float(missing.norm() / y_blocks.sum(1).norm())


def profiles(h: Tensor, w_out: Tensor) -> Tensor:
    return (h.abs() * w_out.norm(dim=0)).t()


NOBODY = torch.zeros(N_BLOCKS, dtype=torch.bool)


def routed_errors(router: str, *, compensate=None, contiguous: bool = False) -> float:
    """Output error at half density on fresh tokens."""
    x, h, w_out, _ = planted(512)
    fresh, fresh_h, _, _ = planted(512, seed=7)
    permutation = torch.arange(256).int() if contiguous else routing.cluster(profiles(h, w_out), N_BLOCKS, 0)
    norms = routing.block_norms(h, w_out, permutation, N_BLOCKS)
    weight, bias = {
        "learned": lambda: routing.fit_router(x, norms),
        "static": lambda: routing.static_router(norms, x.shape[1]),
        "random": lambda: routing.random_router(N_BLOCKS, x.shape[1], 0),
    }[router]()
    kept, fresh_kept = (routing.choose(t @ weight.t() + bias, NOBODY, N_KEEP) for t in (x, fresh))
    c = None if compensate is None else compensate(*routing.dropped_outputs(h, w_out, permutation, kept), kept)
    return error(routing.block_outputs(fresh_h, w_out, permutation, N_BLOCKS), fresh_kept, c)


def test_learned_router_beats_static_and_random():
    learned, static, random = (routed_errors(r) for r in ("learned", "static", "random"))
    assert learned < 0.05, learned  # half of the blocks hold nearly everything
    assert static > 5 * learned and random > static


def test_clusters_beat_contiguous_blocks():
    assert routed_errors("learned", contiguous=True) > 5 * routed_errors("learned")


def test_compensation_lowers_the_error():
    for router in ("static", "random"):
        none = routed_errors(router)
        mean = routed_errors(router, compensate=lambda missing, mean, kept: mean)
        fitted = routed_errors(router, compensate=routing.fit_compensation)
        assert mean < none and fitted < 1.02 * mean


def test_planted_groups_are_found():
    _, h, w_out, group = planted(512)
    permutation = routing.cluster(profiles(h, w_out), N_BLOCKS, 0)
    found = group[permutation.long()].view(N_BLOCKS, -1)
    assert (found == found.mode(dim=1).values[:, None]).float().mean() > 0.97
    other_seed = group[routing.cluster(profiles(h, w_out), N_BLOCKS, 5).long()].view(N_BLOCKS, -1)
    assert (other_seed == other_seed.mode(dim=1).values[:, None]).float().mean() > 0.97


def test_energy_keeps_a_unit_that_fires_rarely_but_hugely():
    """Pretrained encoders have such units, and do not survive without them; a mean of absolute values would drop it."""
    h = torch.rand(200, 24, generator=torch.Generator().manual_seed(0)) + 0.1
    h[:, 17] = 0
    h[3, 17] = 100.0
    w_out = torch.ones(5, 24)
    w_out[:, 4] = 1e-3
    energy = routing.unit_energy(h, w_out)
    assert energy.argmax() == 17 and energy.argmin() == 4
    assert torch.allclose(energy, h.square().mean(0) * w_out.square().sum(0))
    assert h[:, 17].mean() < h[:, [u for u in range(24) if u != 17]].mean()
    for empty in (h[:0], torch.full_like(h, torch.nan)):  # nothing to go by
        assert torch.equal(routing.unit_energy(empty, w_out), torch.zeros(24))


def test_number_of_kept_blocks_shapes_the_clusters():
    _, h, w_out, _ = planted(512)
    p = profiles(h, w_out)

    def held(permutation: Tensor, n_keep: int) -> Tensor:
        return p[permutation.long()].view(N_BLOCKS, -1, 512).sum(1).topk(n_keep, dim=0).values.sum()

    for n_keep in (2, 6):
        assert held(routing.cluster(p, N_BLOCKS, 0, n_keep=n_keep), n_keep) >= 0.99 * held(routing.cluster(p, N_BLOCKS, 0), n_keep)


def test_clusters_follow_what_a_token_tells():
    """Half of what units do shows in the tokens, and half of it, the louder one, does not: only the former can be routed by."""
    generator = torch.Generator().manual_seed(0)
    told, hidden = (torch.rand(512, N_BLOCKS, generator=generator) for _ in range(2))
    groups = (torch.randperm(128, generator=generator) % N_BLOCKS for _ in range(2))
    p = (told[:, next(groups)] + (hidden[:, next(groups)] < 0.5)).t()
    x = told @ torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:N_BLOCKS]

    def share(permutation: Tensor) -> float:
        """What the blocks hold that a router chooses, of all there is; without any choice half."""
        held = p[permutation.long()].view(N_BLOCKS, -1, 512).sum(1).t()
        weight, bias = routing.fit_router(x, held)
        return float(held[routing.choose(x @ weight.t() + bias, NOBODY, N_KEEP)].sum() / held.sum())

    assert share(routing.cluster(p, N_BLOCKS, 0, tokens=x)) > 0.6  # measured .61, without the tokens .54
    assert share(routing.cluster(p, N_BLOCKS, 0)) < 0.57


def test_a_unit_matters_by_what_its_mean_leaves_open():
    """Compensation supplies the means: a unit that always does the same never has to be computed."""
    h = torch.rand(300, 6, generator=torch.Generator().manual_seed(0))
    h[:, 2] = 50.0
    h[:, 3] = h[:, 1] + 20.0
    w_out = torch.eye(6)
    w_out[4] *= 4
    h[:, 4] = h[:, 0]
    mass = routing.unit_profiles(h, w_out)
    assert mass[:, 2].max() < 1e-3 and torch.allclose(mass[:, 3], mass[:, 1], atol=1e-3)
    assert torch.allclose(mass[:, 4], 8 * mass[:, 0], rtol=1e-3, atol=1e-3)  # 4 ** 1.5
    for extreme in (h * 1e30, h * 1e-30, h[:0], torch.full_like(h, torch.nan)):
        assert routing.unit_profiles(extreme, w_out).isfinite().all()


@pytest.mark.parametrize("tokens", [torch.zeros(20, 6), torch.ones(20, 6), torch.rand(20, 6), torch.rand(20, 30).bfloat16()])
def test_any_tokens_give_a_permutation(tokens):
    permutation = routing.cluster(torch.rand(50, 20), 8, 0, tokens=tokens)
    assert torch.equal(permutation.long().sort()[0], torch.arange(50))


@pytest.mark.parametrize("f,g", [(50, 8), (9, 8), (8, 8), (100, 7), (5, 1), (64, 64)])
def test_blocks_have_their_sizes(f, g):
    permutation = routing.cluster(torch.rand(f, 30), g, 3)
    assert permutation.dtype == torch.int32 and torch.equal(permutation.long().sort()[0], torch.arange(f))
    width = -(-f // g)
    sizes = routing.block_sizes(f, g)
    assert sum(sizes) == f and max(sizes) == width and len(sizes) == g
    for block in permutation.split(width):
        assert (block.diff() > 0).all()


@pytest.mark.parametrize("g", [0, 51])
def test_more_blocks_than_units_are_refused(g):
    with pytest.raises(ValueError, match=f"1 to 50 blocks .* got {g}"):
        routing.cluster(torch.rand(50, 3), g, 0)


def bad_profiles():
    yield torch.zeros(50, 20)
    yield torch.full((50, 20), 3.0)
    yield torch.rand(50, 1)
    yield torch.rand(50, 0)
    yield torch.rand(1, 20).expand(50, 20)
    spoiled = torch.rand(50, 20)
    spoiled[3], spoiled[4, 5], spoiled[:, 7] = torch.nan, torch.inf, -torch.inf
    yield spoiled
    yield torch.rand(50, 20) * 1e30
    yield torch.rand(50, 20).bfloat16()


@pytest.mark.parametrize("number", range(8))
def test_bad_profiles_still_give_a_permutation(number):
    permutation = routing.cluster(list(bad_profiles())[number], 8, 0)
    assert torch.equal(permutation.long().sort()[0], torch.arange(50))


def test_clustering_repeats_and_leaves_the_generator_alone():
    p = torch.rand(50, 20)
    before = torch.get_rng_state()
    assert torch.equal(routing.cluster(p, 8, 1), routing.cluster(p, 8, 1))
    routing.random_router(8, 4, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_large_layer_is_quick():
    p = torch.rand(3072, 1024) ** 4
    start = time.process_time()
    routing.cluster(p, 8, 0)
    routing.fit_router(torch.randn(1024, 768), torch.rand(1024, 8))
    assert time.process_time() - start < 4  # measured .35 s; the slack is for busy machines


@pytest.mark.parametrize("s", [40, 400])  # fewer and more rows than columns: both forms of the system
def test_router_is_the_ridge_solution(s):
    x, target = torch.randn(s, 60, dtype=torch.float64), torch.rand(s, 8, dtype=torch.float64)
    weight, bias = routing.fit_router(x, target, ridge=0.5)
    centred, wanted = x - x.mean(0), target.sqrt() - target.sqrt().mean(0)
    strength = 0.5 * centred.square().sum() / s
    expected = torch.linalg.solve(centred.t() @ centred + strength * torch.eye(60), centred.t() @ wanted).t()
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((x.mean(0) @ weight.double().t() + bias), target.sqrt().mean(0), rtol=1e-4, atol=1e-5)


def test_prior_is_kept_where_the_rows_say_nothing():
    prior, prior_bias = torch.randn(8, 60), torch.randn(8)
    x = torch.zeros(30, 60)
    x[:, :5] = torch.randn(30, 5)
    weight, bias = routing.fit_router(x, torch.rand(30, 8), prior_weight=prior, prior_bias=prior_bias, ridge=0.01)
    torch.testing.assert_close(weight[:, 5:], prior[:, 5:])
    assert not torch.allclose(weight[:, :5], prior[:, :5], atol=0.05)
    stiff, stiff_bias = routing.fit_router(x, torch.rand(30, 8), prior_weight=prior, prior_bias=prior_bias, ridge=1e6)
    torch.testing.assert_close(stiff, prior, atol=1e-3, rtol=0)
    torch.testing.assert_close(stiff_bias, prior_bias, atol=1e-3, rtol=0)


def test_refitting_follows_a_drift():
    x = torch.randn(300, 20)
    old, new = torch.rand(8, 20), torch.rand(8, 20)
    weight, bias = routing.fit_router(x, (x @ old.t()).abs())
    error_before = ((x @ weight.t() + bias) - (x @ new.t()).abs().sqrt()).norm()
    for _ in range(5):
        weight, bias = routing.fit_router(x, (x @ new.t()).abs(), prior_weight=weight, prior_bias=bias, ridge=1.0)
    fresh, fresh_bias = routing.fit_router(x, (x @ new.t()).abs(), ridge=1e-3)
    assert ((x @ weight.t() + bias) - (x @ new.t()).abs().sqrt()).norm() < error_before
    torch.testing.assert_close(weight, fresh, atol=0.02, rtol=0.2)


def test_rows_that_are_not_finite_do_not_count():
    x, target = torch.randn(40, 6), torch.rand(40, 3)
    spoiled_x, spoiled_target = torch.cat([x, x[:3]]), torch.cat([target, target[:3]])
    spoiled_x[40], spoiled_x[41, 2], spoiled_target[42, 1] = torch.nan, torch.inf, torch.nan
    for got, expected in zip(routing.fit_router(spoiled_x, spoiled_target), routing.fit_router(x, target), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("x", [torch.zeros(9, 4), torch.ones(9, 4) * 7, torch.randn(1, 4), torch.full((9, 4), torch.nan)])
def test_useless_rows_give_a_finite_router(x):
    target = torch.rand(x.shape[0], 3)
    prior = torch.randn(3, 4)
    for weight, bias in (routing.fit_router(x, target), routing.fit_router(x, target, prior_weight=prior, ridge=0.0)):
        assert weight.isfinite().all() and bias.isfinite().all()
    if x.isfinite().all():
        weight, bias = routing.fit_router(x, target)
        torch.testing.assert_close(x @ weight.t() + bias, target.sqrt().mean(0).expand_as(target), atol=1e-4, rtol=0)
    else:
        assert torch.equal(routing.fit_router(x, target, prior_weight=prior)[0], prior)


def test_choose_agrees_with_the_op():
    scores = torch.randn(63, 8)
    scores[0], scores[1], scores[2, 3] = torch.nan, 0.0, torch.inf
    for on, n_keep in (([], 4), ([7], 4), ([1, 2, 3], 2), (range(8), 4)):
        always = torch.zeros(8, dtype=torch.bool)
        always[list(on)] = True
        kept = routing.choose(scores, always, n_keep)
        blocks, _, _ = reference_ffn.route(scores, always, torch.tensor([n_keep / 8]), 1.0, 1, 0)
        assert torch.equal(kept, reference_ffn.kept_mask(blocks, 8))


def test_dropped_outputs_are_those_of_dropped_blocks():
    h, w_out, permutation = torch.randn(20, 50), torch.randn(6, 50), torch.randperm(50).int()
    y = routing.block_outputs(h, w_out, permutation, 3)
    kept = torch.rand(20, 3) > 0.5
    kept[:, 2] = True
    missing, mean = routing.dropped_outputs(h, w_out, permutation, kept)
    torch.testing.assert_close(missing, torch.where(kept.unsqueeze(-1), 0, y).sum(1))
    torch.testing.assert_close(mean[0], y[~kept[:, 0], 0].mean(0))
    assert not mean[2].any() and not routing.fit_compensation(missing, mean, kept)[2].any()
    h[0] = torch.nan
    for n in (20, 1, 0):
        missing, mean = routing.dropped_outputs(h[:n], w_out, permutation, kept[:n])
        fitted = routing.fit_compensation(missing, mean, kept[:n])
        assert missing.isfinite().all() and mean.isfinite().all() and fitted.isfinite().all() and fitted.shape == (3, 6)


def test_fitted_compensation_is_better_on_its_own_tokens():
    x, h, w_out, _ = planted(200)
    permutation = torch.randperm(h.shape[1]).int()
    y = routing.block_outputs(h, w_out, permutation, 4)
    kept = routing.choose(y.norm(dim=2), torch.zeros(4, dtype=torch.bool), 2)
    missing, mean = routing.dropped_outputs(h, w_out, permutation, kept)
    assert error(y, kept, routing.fit_compensation(missing, mean, kept)) < error(y, kept, mean)


def test_always_on():
    kept = torch.zeros(100, 3, dtype=torch.bool)
    kept[:95, 0], kept[:90, 1] = True, True
    assert routing.always_on(kept).tolist() == [True, False, False]
    assert routing.always_on(kept, 0.5).tolist() == [True, True, False]
    assert routing.always_on(kept[:0]).tolist() == [False] * 3


@pytest.mark.parametrize(("n_units", "n_blocks"), [(50, 8), (9, 8), (48, 3), (7, 1)])
def test_routed_outputs_are_those_of_the_blocks(n_units, n_blocks):
    h, w_out, permutation = torch.randn(9, n_units), torch.randn(6, n_units), torch.randperm(n_units).int()
    kept = torch.rand(9, n_blocks) > 0.5
    y = routing.block_outputs(h, w_out, permutation, n_blocks)
    dense, missing, norms = routing.routed_outputs(h, w_out, permutation, kept)
    torch.testing.assert_close(dense, h @ w_out.t())
    torch.testing.assert_close(missing, torch.where(kept.unsqueeze(-1), 0, y).sum(1))
    torch.testing.assert_close(norms, y.norm(dim=2))
    torch.testing.assert_close(missing, routing.dropped_outputs(h, w_out, permutation, kept)[0])


def test_block_norms_and_outputs_agree():
    h, w_out, permutation = torch.randn(9, 50), torch.randn(6, 50), torch.randperm(50).int()
    y = routing.block_outputs(h, w_out, permutation, 8)
    torch.testing.assert_close(y.sum(1), h @ w_out.t())
    torch.testing.assert_close(routing.block_norms(h, w_out, permutation, 8), y.norm(dim=2))
    assert not routing.block_outputs(h[:, :9], w_out[:, :9], torch.arange(9), 8)[:, 5:].any()


def test_output_scale_evens_out_channels():
    y = torch.randn(500, 6) * torch.tensor([100.0, 1, 1, 2, 0.5, 1]) + 7
    scale = routing.output_scale(y)
    spread = (y * scale).std(0)
    assert spread.max() < 1.2 * spread[:1] and (spread[1:] > 0.5 * spread[0]).sum() >= 1
    assert scale[0] < scale[3] < scale[1]
    assert torch.equal(routing.output_scale(torch.ones(5, 3)), torch.ones(3))
    assert torch.equal(routing.output_scale(y[:0]), torch.ones(6))


@pytest.mark.parametrize("n_rows", [30, 400])  # fewer and more rows than columns: both forms of the system
def test_correction_finds_a_planted_map(n_rows):
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn(3, 40, generator=generator), torch.randn(24, 3, generator=generator)
    x = torch.randn(n_rows, 40, generator=generator) + 1
    noise = 0.1 * torch.randn(n_rows, 24, generator=generator)
    missing = (x - 1) @ down.t() @ up.t() + noise
    scale = torch.rand(24, generator=generator) + 0.5
    got_down, shift, got_up = routing.fit_correction(x, missing, scale, 8, 0)
    left = missing - (x @ got_down.t() + shift) @ got_up.t()
    assert left.norm() < (0.5 if n_rows < 40 else 0.1) * missing.norm()
    features = x @ got_down.t() + shift
    assert features.mean(0).abs().max() < 1e-3 and features.std(0).max() < 2  # centred, and of a size half precision holds


@pytest.mark.parametrize("n_rows", [30, 300])
def test_later_corrections_average_over_what_was_learned_before(n_rows):
    torch.manual_seed(1)
    down, up, scale = torch.randn(8, 64) / 8, torch.randn(12, 8), torch.rand(12) + 0.5

    def rows():
        x = torch.randn(n_rows, 64) + 1
        return x, (x - x.mean(0)) @ down.t() @ up.t() + 2 * torch.randn(n_rows, 12)

    def error(fit):
        return float(((fit[2] @ fit[0] - up @ down) * scale.unsqueeze(1)).norm() / ((up @ down) * scale.unsqueeze(1)).norm())

    first = routing.fit_correction(*rows(), scale, 8, 0)
    stiff = routing.fit_correction(*rows(), scale, 8, 0, prior=(first[0], first[2]), ridge=1e8)
    torch.testing.assert_close(stiff[2] @ stiff[0], first[2] @ first[0], rtol=1e-3, atol=1e-3)
    loose = routing.fit_correction(*(again := rows()), scale, 8, 0, prior=(first[0], first[2]), ridge=1e-4)
    alone = routing.fit_correction(*again, scale, 8, 0, ridge=1e-4)
    if n_rows > 64:  # with fewer rows than columns what they leave open stays as it was
        torch.testing.assert_close(loose[2] @ loose[0], alone[2] @ alone[0], rtol=1e-2, atol=1e-2)
    later = first
    for _ in range(40):
        later = routing.fit_correction(*rows(), scale, 8, 0, prior=(later[0], later[2]), ridge=3.0)
    assert error(later) < 0.7 * error(first)


@pytest.mark.parametrize("n_rows", [40, 300])
def test_later_corrections_are_exact_for_tokens_with_an_outlier_channel(n_rows):
    """They are solved in single precision."""
    x = torch.randn(n_rows, 64)
    x[:, 5] *= 300
    y = x @ torch.randn(64, 9) + torch.randn(n_rows, 9)
    prior = torch.randn(9, 64), torch.randn(9, 9)
    down, shift, up = routing.fit_correction(x, y, torch.ones(9), 9, 0, prior=prior, ridge=3.0)
    centred = (x - x.mean(0)).double()
    known = (prior[1] @ prior[0]).double().t()
    strength = 3.0 * centred.square().sum() / min(n_rows, 64)
    system = centred.t() @ centred + strength * torch.eye(64, dtype=torch.float64)
    expected = centred @ (known + torch.linalg.solve(system, centred.t() @ (y.double() - centred @ known)))
    error = (x @ down.t() + shift) @ up.t() - expected
    assert error.norm() < 1e-4 * expected.norm()


def test_correction_of_rank_one_is_the_best_one():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2000, 10, generator=generator)
    whole = torch.randn(10, 12, generator=generator) * torch.logspace(0, -2, 12)
    missing = x @ whole
    down, shift, up = routing.fit_correction(x, missing, torch.ones(12), 1, 0)
    left = (missing - (x @ down.t() + shift) @ up.t()).norm()
    best = torch.linalg.svdvals(missing)[1:].norm()
    assert best * 0.999 < left < best * 1.05


@pytest.mark.parametrize(
    "x", [torch.zeros(9, 4), torch.ones(9, 4) * 7, torch.randn(1, 4), torch.zeros(0, 4), torch.full((9, 4), torch.nan)]
)
def test_useless_rows_give_no_correction(x):
    for part in routing.fit_correction(x, torch.randn(x.shape[0], 5), torch.ones(5), 2, 0):
        assert not part.any()
    known = torch.randn(2, 4), torch.randn(5, 2)
    if x.shape[0] > 1 and x.isfinite().all():
        down, shift, up = routing.fit_correction(x, torch.randn(x.shape[0], 5), torch.ones(5), 2, 0, prior=known)
        assert torch.equal(down, known[0]) and torch.equal(up, known[1]) and (x @ down.t() + shift).abs().max() < 1e-5
