"""Product quantisation: assignment, fitting, online updates, the paper's loss."""

from __future__ import annotations

import pytest
import torch

from spt_compiler import pq


def nearest_by_loops(codebook, keys, moment=None):
    heads, subspaces, _, width = codebook.shape
    codes = torch.empty(*keys.shape[:-1], subspaces, dtype=torch.long)
    for h in range(heads):
        for p in range(subspaces):
            part = keys[..., h, :, p * width : (p + 1) * width].double()
            difference = part.unsqueeze(-2) - codebook[h, p].double()
            metric = torch.eye(width, dtype=torch.float64) if moment is None else moment[h, p].double()
            codes[..., h, :, p] = torch.einsum("...i,ij,...j->...", difference, metric, difference).argmin(-1)
    return codes


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_assign_is_the_nearest_codeword(lead, weighted):
    codebook, keys = torch.randn(3, 4, 7, 5), torch.randn(*lead, 3, 63, 20)
    root = torch.randn(3, 4, 5, 5)
    moment = root @ root.transpose(-1, -2) if weighted else None
    expected = nearest_by_loops(codebook, keys, moment)
    assert torch.equal(pq.assign(codebook, keys, moment), expected)
    assert weighted == (not torch.equal(expected, nearest_by_loops(codebook, keys)))  # the metric matters


def test_assign_takes_any_stride_and_any_chunk(monkeypatch):
    codebook = torch.randn(3, 4, 16, 5)
    keys = torch.randn(2, 100, 3, 24).transpose(1, 2)[..., 2:22]
    expected = pq.assign(codebook, keys.contiguous())
    monkeypatch.setattr(pq, "_CHUNK", 1)  # the smallest chunks there are
    assert torch.equal(pq.assign(codebook, keys), expected)
    assert expected.unique().numel() == 16


def test_assign_gives_ties_to_the_lower_code_and_survives_nan():
    codebook = torch.randn(1, 2, 4, 3)
    codebook[:, :, 2] = codebook[:, :, 1]
    keys = torch.randn(1, 50, 6)
    keys[0, :10] = torch.cat([codebook[0, 0, 1], codebook[0, 1, 1]])
    keys[0, 7] = torch.nan
    codes = pq.assign(codebook, keys)
    assert (codes[0, :7] == 1).all() and (codes != 2).all()
    assert codes.min() >= 0 and codes.max() < 4


def test_decode_and_reconstruct():
    codebook, keys, mean = torch.randn(2, 3, 5, 4), torch.randn(2, 2, 30, 12), torch.randn(2, 12)
    codes = pq.assign(codebook, keys)
    decoded = pq.decode(codebook, codes)
    for b, h, s, p in ((0, 0, 0, 0), (1, 1, 29, 2), (0, 1, 13, 1)):
        assert torch.equal(decoded[b, h, s, p * 4 : p * 4 + 4], codebook[h, p, codes[b, h, s, p]])
    exact = pq.decode(codebook, pq.assign(codebook, keys - mean[:, None])) + mean[:, None]
    torch.testing.assert_close(pq.reconstruct(codebook, keys, mean), exact)
    assert torch.equal(pq.reconstruct(codebook, decoded), decoded)  # rounding twice changes nothing


@pytest.mark.parametrize("wrong", ["heads", "width", "rank"])
def test_mismatch_is_a_value_error(wrong):
    keys = {"heads": torch.randn(3, 5, 12), "width": torch.randn(2, 5, 10), "rank": torch.randn(5, 12)}[wrong]
    with pytest.raises(ValueError, match="expected"):
        pq.assign(torch.randn(2, 3, 5, 4), keys)


def inertia(codebook, keys):
    return float((pq.reconstruct(codebook, keys) - keys).square().mean())


def test_fit_finds_clusters_and_is_deterministic():
    centres = 5 * torch.randn(2, 1, 8, 12)
    keys = centres[:, 0, torch.randint(0, 8, (400,))] + 0.1 * torch.randn(2, 400, 12)
    before = torch.get_rng_state()
    codebook = pq.fit(keys, 3, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)  # the default generator is not touched
    assert codebook.shape == (2, 3, 8, 4) and codebook.is_contiguous()
    assert torch.equal(codebook, pq.fit(keys, 3, 8, seed=3))
    assert not torch.equal(codebook, pq.fit(keys, 3, 8, seed=4))
    assert inertia(codebook, keys) < 0.8 * inertia(pq.fit(keys, 3, 8, iterations=0, seed=3), keys)
    assert inertia(pq.fit(keys, 3, 64, seed=3), keys) < 0.05  # enough codewords to reach every cluster: its width is left


def test_fit_in_the_metric_lowers_the_error_of_inner_products():
    keys = torch.randn(1, 600, 8)
    queries = torch.randn(1, 600, 8) * torch.tensor([5.0, 1, 1, 0.1, 4, 0.1, 1, 1])
    moment = pq.query_moment(queries, 2)
    assert moment.shape == (1, 2, 4, 4)
    torch.testing.assert_close(moment[0, 1], queries[0, :, 4:].T @ queries[0, :, 4:] / 600)

    def logit_error(codebook, metric):
        decoded = pq.decode(codebook, pq.assign(codebook, keys, metric))
        return float((queries @ (keys - decoded).transpose(-1, -2)).square().mean())

    plain = logit_error(pq.fit(keys, 2, 8), None)
    weighted = logit_error(pq.fit(keys, 2, 8, query_moment=moment), moment)
    assert weighted < 0.9 * plain


@pytest.mark.parametrize("kind", ["constant", "single", "few", "nan", "none", "zero metric"])
def test_fit_survives_degenerate_input(kind):
    keys = {
        "constant": torch.ones(2, 50, 8),
        "single": torch.randn(2, 1, 8),
        "few": torch.randn(2, 5, 8),
        "nan": torch.full((2, 50, 8), torch.nan),
        "none": torch.empty(2, 0, 8),
        "zero metric": torch.randn(2, 50, 8),
    }[kind]
    moment = torch.zeros(2, 2, 4, 4) if kind == "zero metric" else None
    codebook = pq.fit(keys, 2, 16, query_moment=moment)
    assert codebook.shape == (2, 2, 16, 4) and codebook.isfinite().all()
    if kind in ("constant", "single", "few"):
        torch.testing.assert_close(pq.reconstruct(codebook, keys), keys)  # fewer points than codewords: no error left
    if kind == "zero metric":
        assert inertia(codebook, keys) < 0.6 * float(keys.square().mean())


def test_dead_codewords_restart_on_different_points():
    keys = torch.randn(1, 200, 4)
    codebook = torch.full((1, 1, 6, 4), 100.0) + torch.arange(6.0)[:, None]
    codebook[0, 0, 0] = 0.0
    updated = pq.ema_update(codebook, None, keys, decay=0.9, seed=1)
    fresh = updated[0, 0, 1:]
    distances = (fresh[:, None] - keys[0]).abs().sum(-1)
    assert (distances.amin(1) == 0).all()  # each is a key
    assert distances.argmin(1).unique().numel() == 5  # and another one
    assert torch.equal(codebook[0, 0, 0], torch.zeros(4))  # the argument is not changed


def test_ema_moves_toward_the_means_of_members():
    codebook = torch.tensor([[[[0.0, 0.0], [10.0, 10.0]]]])
    keys = torch.tensor([[[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]]])
    updated = pq.ema_update(codebook, None, keys, decay=0.75)
    torch.testing.assert_close(updated, torch.tensor([[[[0.5, 0.25], [9.75, 9.75]]]]))


def test_counts_keep_a_codeword_alive():
    keys = torch.randn(1, 100, 4)
    codebook = torch.cat([torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1, 4), 50.0)], dim=2)
    alive = pq.ema_update(codebook, torch.tensor([[[0.0, 3.0]]]), keys)
    dead = pq.ema_update(codebook, torch.zeros(1, 1, 2), keys)
    assert torch.equal(alive[0, 0, 1], codebook[0, 0, 1]) and not torch.equal(dead[0, 0, 1], codebook[0, 0, 1])


def test_ema_survives_nan_and_nothing():
    codebook = torch.randn(2, 2, 4, 3)
    assert torch.equal(pq.ema_update(codebook, None, torch.empty(2, 0, 6)), codebook)
    assert pq.ema_update(codebook, None, torch.full((2, 40, 6), torch.inf)).isfinite().all()


def test_commitment_loss_is_the_paper_s():
    codebook = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, 7, 12, dtype=torch.float64, requires_grad=True)  # two heads per codebook
    total = 0.0
    for b, h, s, p in torch.cartesian_prod(*(torch.arange(n) for n in (2, 4, 7, 3))).tolist():
        z, words = x[b, h, s, 4 * p : 4 * p + 4], codebook[h // 2, p]
        distance = (z - words).abs().sum(-1)
        weight = torch.softmax(-distance.clamp(min=1e-5).log(), 0)
        quantised = words[distance.argmin()]
        total = total + ((weight @ words - quantised) ** 2).sum() + ((z - quantised) ** 2).sum()
    torch.testing.assert_close(pq.commitment_loss(codebook, x), total / x.numel())
    assert torch.autograd.gradcheck(pq.commitment_loss, (codebook, x))
    assert pq.commitment_loss(codebook, x[:, :, :0]) == 0


@pytest.mark.parametrize(("dim", "expected"), [(64, 8), (80, 10), (24, 3), (20, 4), (7, 1), (11, 11), (1, 1)])
def test_default_subspaces(dim, expected):
    assert pq.default_subspaces(dim) == expected


def test_fit_refuses_slices_that_do_not_divide():
    with pytest.raises(ValueError, match="use 3"):
        pq.fit(torch.randn(1, 10, 24), 5, 4)
