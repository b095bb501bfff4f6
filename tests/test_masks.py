"""Masks that are code: what is lifted, what stays a tensor, and that nothing else changes."""

from __future__ import annotations

import re

import pytest
import torch
import torch.utils.checkpoint
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


def padded_left(b, t, lengths):
    q, k = positions(t)
    return (k <= q)[None, None] & (torch.arange(t) >= t - lengths[:, None])[:, None, None]


def prefix(b, t, lengths):
    q, k = positions(t)
    return ((k <= q) | (k < 11))[None, None]


def chunked(b, t, lengths):
    q, k = positions(t)
    return ((k <= q) & (k // 16 == q // 16))[None, None]


def packed(b, t, lengths):
    document = (torch.arange(t) >= lengths[:, None]).long()
    return (document[:, :, None] == document[:, None, :])[:, None] & causal(b, t, lengths)


def packed_padded_window(b, t, lengths):
    return packed(b, t, lengths) & window(b, t, lengths) & padded_causal(b, t, lengths)


def per_pair(b, t, lengths):
    return (torch.rand(t, t)[None, None] >= 0) & causal(b, t, lengths)


def flipped(b, t, lengths):
    return causal(b, t, lengths).flip(-1).flip(-1) & (torch.arange(t) < lengths[:, None])[:, None, None]


# (builder, text of a bool mask, text of the same mask added as a float: a row that allows nothing is then no special case)
CASES = [
    (causal, "k <= q", "k <= q"),
    (window, "(k <= q) & (q - k <= 8)", "(k <= q) & (q - k <= 8)"),
    (padded_causal, "(k <= q) & lt[b, k]", "where((k <= q) & lt[b, k], 0.0, LOW)"),
    (padded_left, "(k <= q) & ge[b, k]", "where((k <= q) & ge[b, k], 0.0, LOW)"),
    (prefix, "(k <= q) | (k < 11)", "where((k <= q) | (k < 11), 0.0, LOW)"),
    (
        chunked,
        "(k <= q) & (floordiv(k, 16) == floordiv(q, 16))",
        "where((k <= q) & (floordiv(k, 16) == floordiv(q, 16)), 0.0, LOW)",
    ),
    (
        packed,
        "(k <= q) & (document[b, q] == document[b, k])",
        "where((document[b, q] == document[b, k]) & (k <= q), 0.0, LOW)",
    ),
    (
        packed_padded_window,
        "(k <= q) & (q - k <= 8) & (document[b, q] == document[b, k]) & lt[b, k]",
        "where((document[b, q] == document[b, k]) & (k <= q) & ((k <= q) & (q - k <= 8)) & ((k <= q) & lt[b, k]), 0.0, LOW)",
    ),
    (everything, "", ""),
    (odd, "(mod(k + q, 3) != 1) | (k == q)", "where((mod(k + q, 3) != 1) | (k == q), 0.0, LOW)"),
    (per_pair, "k <= q & tensor", "tensor"),
    (flipped, "(k <= q) & lt[b, k]", "tensor"),
]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("build, text, added", CASES, ids=[c[0].__name__ for c in CASES])
def test_what_is_lifted_and_that_it_is_exact(build, text, added, eager):
    model, x, lengths = Masked(build, eager), torch.randn(3, 70, 24), torch.tensor([70, 41, 5])
    (site,) = spt_compiler.explain(model, x, lengths, options=SPARSE).sites
    expected = added.replace("LOW", str(torch.finfo(torch.float32).min)) if eager else text
    assert site.status == "replaced" and site.mask == expected
    expected = gradients(model, model, x, lengths)
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EXACT), x, lengths), expected)


class TwoMasks(Masked):
    """A causal mask with the lowest number, and another mask that may hide what it leaves."""

    def forward(self, x, keys):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, 12).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) * 12**-0.5
        return self.build(scores, torch.full((t, t), LOWEST).triu(1), keys[:, None, None]).softmax(-1) @ v


LOWEST = torch.finfo(torch.float32).min
ALIBI = torch.tensor([0.5, 0.125])


def distances(t):
    return (torch.arange(t)[:, None] - torch.arange(t)).abs()


def padding(scores, keys, low):
    return torch.zeros_like(keys, dtype=scores.dtype).masked_fill(~keys, low)


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda s, c, keys: (s + c).masked_fill(~keys, -torch.inf), "where(keys[b, k], where(k <= q, 0.0, LOW), -inf)"),
        (lambda s, c, keys: s + c + padding(s, keys, -torch.inf), "+ where(k <= q, 0.0, LOW)"),
        (lambda s, c, keys: s + c + padding(s, keys, LOWEST), "+ where(k <= q, 0.0, LOW)"),
        (lambda s, c, keys: s + c + keys.float().log(), "+ where(k <= q, 0.0, LOW)"),
        # Zero at the query's own position.
        (lambda s, c, keys: s + c - ALIBI[:, None, None] * distances(s.shape[-1]), "where(k <= q, "),
        # Never as low as what the other hides.
        (lambda s, c, keys: s + c + (1.0 - keys.float()) * -50.0, "where(k <= q, "),
    ],
    ids=["filled", "minus infinity", "lowest", "logarithm", "distances", "finite"],
)
def test_a_low_number_is_not_minus_infinity_beside_a_mask_that_hides_the_rest(build, text):
    """Sequences padded on the left: a row that has nothing but padding attends to what comes after it, and is no nan."""
    keys = torch.arange(40) >= torch.tensor([[0], [7]])
    model, x = TwoMasks(build), torch.randn(2, 40, 24)
    (site,) = spt_compiler.explain(model, x, keys, options=SPARSE).sites
    assert site.status == "replaced" and text.replace("LOW", str(LOWEST)).replace("keys", "l_keys_") in site.mask
    expected = gradients(model, model, x, keys)
    assert not expected[0].isnan().any()
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EXACT), x, keys), expected)


@pytest.mark.parametrize("lifted", [True, False])
def test_a_sum_of_masks_that_is_clamped(lifted):
    """max(scores + mask, lowest): where both masks hide, their sum is -inf, and the clamp makes it the lowest number again."""

    def build(s, c, keys):
        mask = padding(s, keys, LOWEST) + (c if lifted else c + torch.rand_like(c) * 0)
        return torch.max(s + mask, torch.tensor(LOWEST))

    keys = torch.arange(40) >= torch.tensor([[0], [7]])
    model, x = TwoMasks(build), torch.randn(2, 40, 24)
    (site,) = spt_compiler.explain(model, x, keys, options=SPARSE).sites
    assert site.status == "replaced" and site.mask.startswith("max(" if lifted else "tensor")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="spt", options=EXACT)(x, keys), model(x, keys))


def copy_written(b, t, lengths):
    mask = padded_causal(b, t, lengths).clone()
    mask[..., 1:3] = False
    return mask


def expansion_written(b, t, lengths):
    mask = causal(b, t, lengths).expand(b, 1, t, t).contiguous()
    mask[0, :, :, 1:3] = False
    return mask


def conjunction_written(b, t, lengths):
    mask = causal(b, t, lengths) & prefix(b, t, lengths)
    mask[..., 1:3] = False
    return mask


def part_written(b, t, lengths):
    part = causal(b, t, lengths).clone()
    mask = part & prefix(b, t, lengths)
    part[..., 1:3] = False
    return mask


def copied_before(b, t, lengths):
    original = causal(b, t, lengths)
    mask = original.clone()
    original[..., 1:3] = False
    return mask


@pytest.mark.parametrize("build", [copy_written, expansion_written, conjunction_written, part_written, copied_before])
def test_a_mask_that_is_written_is_read_as_it_is_when_it_is_used(build):
    """Libraries copy the causal mask and write the padding into the copy."""
    model, x, lengths = Masked(build), torch.randn(3, 70, 24), torch.tensor([70, 41, 5])
    (site,) = spt_compiler.explain(model, x, lengths, options=SPARSE).sites
    assert site.status == "replaced" and "tensor" in site.mask
    expected = gradients(model, model, x, lengths)
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EXACT), x, lengths), expected)


@pytest.mark.parametrize("build", [padded_causal, padded_left, packed_padded_window])
def test_sparse_sites_never_see_what_is_hidden(build):
    """Other keys and values at hidden positions change nothing for the queries elsewhere."""
    model, x, lengths = Masked(build), torch.randn(3, 70, 24), torch.tensor([70, 41, 5])
    options = {**SPARSE, "attention.density": 0.05, "attention.granularity": "token"}
    run = torch.compile(model, backend="spt", options=options)
    hidden = ~build(3, 70, lengths)[:, 0].expand(3, 70, 70).any(1)  # keys that no query may see
    other = torch.where(hidden[..., None], torch.randn_like(x), x)
    with torch.no_grad():
        run(x, lengths)  # the first call initialises the site
        a, b = (run(y, lengths).transpose(1, 2) for y in (x, other))
        dense = model(x, lengths).transpose(1, 2)
    assert hidden.any() and torch.equal(a[~hidden], b[~hidden]) and not torch.allclose(a, dense, atol=1e-3)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("build", [causal, window, padded_causal, packed, chunked])
def test_symbolic_lengths(build, eager):
    """One dynamic graph, lifted without a guard: every length gives what eager gives."""
    model, lengths = Masked(build, eager), torch.tensor([30, 9])
    run = torch.compile(model, backend="spt", options={**EXACT, "inner": "eager"}, dynamic=True)
    for t in (70, 33, 81):
        x = torch.randn(2, t, 24)
        assert_same(gradients(model, run, x, lengths), gradients(model, model, x, lengths))


def graph_nodes(model, *inputs, options=SPARSE, dynamic=None):
    """The nodes of the rewritten graph with tensor values, bodies of higher-order ops included."""
    seen = []

    def spy(config, mode=None):
        def inner(gm, inputs):
            for module in gm.modules():
                if isinstance(module, torch.fx.GraphModule):
                    seen.extend(n for n in module.graph.nodes if isinstance(n.meta.get("example_value"), torch.Tensor))
            return gm.forward

        return inner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spt_compiler.backend.inner_compiler", spy)
        torch.compile(model, backend="spt", options=options, dynamic=dynamic)(*inputs)
    return seen


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("build", [causal, window, padded_causal, padded_left, prefix, chunked, packed, packed_padded_window])
def test_a_mask_that_is_code_is_not_built(build, eager):
    """No node of the rewritten graph has as many elements as there are (query, key) pairs."""
    t = 200
    nodes = graph_nodes(Masked(build, eager), torch.randn(2, t, 24), torch.tensor([200, 41]))
    assert nodes and max(n.meta["example_value"].numel() for n in nodes) < t * t
    dense = graph_nodes(Masked(per_pair, eager), torch.randn(2, t, 24), torch.tensor([200, 41]))
    assert max(n.meta["example_value"].numel() for n in dense) >= t * t  # the test can tell


def test_masks_of_a_checkpointed_body_come_from_outside():
    """The mask is built before the checkpoint: its vectors become arguments of the body, the mask itself does not."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

        def forward(self, x, mask):
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, 2, 12).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return x + self.out(y.transpose(1, 2).reshape(b, t, 24))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x, lengths):
            mask = padded_causal(*x.shape[:2], lengths)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, mask, use_reentrant=False)
            return x

    model, x, lengths = Checkpointed(), torch.randn(2, 200, 24), torch.tensor([200, 41])
    nodes = graph_nodes(model, x, lengths)
    assert max(n.meta["example_value"].numel() for n in nodes) < 200 * 200
    assert {s.mask for s in spt_compiler.explain(model, x, lengths, options=SPARSE).sites} == {"(k <= q) & lt[b, k]"}
    expected = gradients(model, model, x, lengths)
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EXACT), x, lengths), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_decoders_of_transformers(family, padded):
    model = models.build(family, layers=1)
    sites = spt_compiler.explain(model, options=SPARSE, **models.inputs(family, length=37, padded=padded)).sites
    (mask,) = (s.mask for s in sites if s.kind == "attention")
    assert re.fullmatch(r"\(k <= q\) & attention_mask\w*\[b, k\]" if padded else "k <= q", mask)


# ---- ALiBi ----------------------------------------------------------------------------------------------------------


def alibi_model(name, attn):
    """Two random layers whose positions are ALiBi alone. transformers runs Bloom and MPT by hand-written code only."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "Bloom": dict(hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
        "Mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
        "Falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    }[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=96, use_cache=False, **sizes)
    config._attn_implementation = attn
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize(
    "name, attn, mask",
    [
        ("Bloom", "eager", r"where\(\(k <= q\) & \w+\[b, k\], 0.0, LOW\) \+ alibi\[b, h, k\]"),
        ("Mpt", "eager", r"where\(\(k <= q\) & \w+\[b, k\], \w+\[0, h, 0, k \+ \d+\], -inf\)"),
        ("Falcon", "sdpa", r"where\(\(k <= q\) & \w+\[b, k\], \w+\[b, h, 0, k\], LOW\)"),
        # Falcon's own code adds it twice: before the scores are scaled, and in the mask.
        ("Falcon", "eager", r"where\(.*, (\w+)\[b, h, 0, k\], LOW\) \+ \w+\[b, h, 0, k\] \* 0.35\d+"),
    ],
)
def test_alibi_of_transformers_is_code(name, attn, mask):
    model, given = alibi_model(name, attn), models.inputs("gpt2", length=33)
    found = [s for s in spt_compiler.explain(model, options=SPARSE, **given).sites if s.kind == "attention"]
    assert [s.status for s in found] == ["replaced"] * 2
    pattern = mask.replace("LOW", re.escape(str(torch.finfo(torch.float32).min)))
    assert all(re.fullmatch(pattern, s.mask) for s in found), [s.mask for s in found]
    compiled = torch.compile(model, backend="spt", options={**EXACT, "inner": "eager"})
    expected = gradients(model, lambda: model(**given).last_hidden_state)
    got = gradients(model, lambda: compiled(**given).last_hidden_state)
    assert expected[1].keys() == dict(model.named_parameters()).keys()
    assert_same(got, expected)


class Alibi(nn.Module):
    """Slopes that are a buffer, or learned, times the distance."""

    def __init__(self, learned=False, per_key=False):
        super().__init__()
        self.qkv, self.per_key = nn.Linear(24, 72), per_key
        slopes = 2.0 ** -torch.arange(1.0, 3.0)
        self.slopes = nn.Parameter(slopes) if learned else nn.Buffer(slopes)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, 12).permute(2, 0, 3, 1, 4).unbind(0)
        at, key = positions(t)
        bias = self.slopes[:, None, None] * (key if self.per_key else -(at - key).abs())
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].expand(b, -1, -1, -1))


@pytest.mark.parametrize("per_key, text", [(False, r"\w+\[h\] \* -abs\(q - k\)"), (True, r"\w+\[h, 0, k\]")])
@pytest.mark.parametrize("learned", [False, True])
def test_alibi_by_hand_is_code_unless_its_slopes_are_learned(per_key, text, learned):
    model, x = Alibi(learned, per_key), torch.randn(2, 40, 24)
    (site,) = spt_compiler.explain(model, x, options=SPARSE).sites
    assert site.status == "replaced" and re.fullmatch("tensor" if learned else text, site.mask), site.mask
    expected = gradients(model, model, x)
    assert ("slopes" in expected[1]) == learned
    assert_same(gradients(model, torch.compile(model, backend="spt", options=EXACT), x), expected)
