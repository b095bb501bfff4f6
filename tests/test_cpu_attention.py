"""The CPU lowerings of attention and selection against the references."""

from __future__ import annotations

import threading

import attention_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from spt_compiler.lowering import (
    cpu_attention,
    cpu_key_attention,
    cpu_selection,
    cpu_threads,
    cpu_tiles,
    registry,
)
from spt_compiler.ops import reference

EMPTY = ("zero", "uniform", "nan")


@pytest.fixture
def two_threads():
    """Work in parts, as on a machine with more cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tile_lists(case, density=0.3, rule="pq"):
    return reference.select_tiles(*case.select_tiles_args(density, rule))


def key_lists(case, density=0.3, rule="pq"):
    return reference.select_keys(*case.select_keys_args(density, rule))


def forward_and_backward(tiles, ops, case, index, counts, upstream, needs=(True,) * 4):
    """(out, lse, dq, dk, dv, dbias) of a pair of functions (or of a module that has both)."""
    name = "tile_attention" if tiles else "key_attention"
    args = case.attend_args(index, counts, tiles)
    out, lse = getattr(ops, name)(*args)
    return [out, lse, *getattr(ops, name + "_backward")(upstream, *args[:4], out, lse, *args[4:], list(needs))]


def lowering(tiles):
    return cpu_attention if tiles else cpu_key_attention


def check(actual, expected, bound):
    assert torch.equal(actual[1] == -torch.inf, expected[1] == -torch.inf)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dbias"), actual, expected, strict=True):
        assert x.dtype == y.dtype and x.stride() == y.stride(), name
        if name == "lse":
            live = (y > -1e30) & (y < 1e30)  # beside finfo.min, logits have no digits left
            x, y = x[live], y[live]
        if x.numel():
            assert cases.error(x, y) < bound, name


@pytest.mark.parametrize("mask", cases.MASKS)
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("kind", ["plain", "dropout", "softcap", "everything"])
def test_equals_the_reference(mask, tiles, kind, nan_empty):
    options = {
        "plain": {},
        "dropout": {"p": 0.3, "seed": torch.tensor([1 << 40]), "empty": "uniform"},
        "softcap": {"softcap": 2.0, "empty": "nan"},
        "everything": {"softcap": 5.0, "p": 0.2, "seed": torch.tensor([-7]), "empty": "uniform"},
    }[kind]
    case = cases.make(mask, **options)
    index, counts = tile_lists(case, 0.4) if tiles else key_lists(case, 0.4)
    if kind == "everything":  # some rows read all keys, the others their list
        counts[:, :, ::2] = -1
    upstream = torch.randn(2, 100, 4, 20, dtype=torch.float64).transpose(1, 2)
    expected = forward_and_backward(tiles, reference, case, index, counts, upstream)
    check(forward_and_backward(tiles, lowering(tiles), case, index, counts, upstream), expected, 1e-10)


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 3, "groups": 3, "n_q": 63, "n_k": 63, "tile_q": 64, "tile_k": 16},
        {"heads": 2, "groups": 1, "n_q": 40, "n_k": 77, "tile_q": 16, "tile_k": 16},
        {"heads": 2, "groups": 2, "n_q": 90, "n_k": 50, "tile_q": 16, "tile_k": 5, "batch": 1},
        {"heads": 4, "groups": 4, "n_q": 128, "n_k": 128, "tile_q": 32, "tile_k": 16, "strided": False},
        {"heads": 2, "groups": 2, "n_q": 1, "n_k": 9, "tile_q": 64, "tile_k": 16},
    ],
)
@pytest.mark.parametrize("mask", ["none", "causal", "causal padding", "float"])
@pytest.mark.parametrize("tiles", [True, False])
def test_sizes(sizes, mask, tiles, nan_empty, two_threads):
    case = cases.make(mask, **sizes)
    index, counts = tile_lists(case) if tiles else key_lists(case)
    upstream = torch.randn(*case.q.shape[:3], 20, dtype=torch.float64)
    expected = forward_and_backward(tiles, reference, case, index, counts, upstream)
    check(forward_and_backward(tiles, lowering(tiles), case, index, counts, upstream), expected, 1e-10)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("bias_shape", [(2, 4, 100, 100), (1, 4, 100, 100), (2, 1, 100, 100), (1, 4, 1, 100), (2, 1, 100, 1)])
def test_bias_gradients_of_every_broadcast(tiles, bias_shape, two_threads):
    case = cases.make("causal")
    case.bias = torch.randn(bias_shape, dtype=torch.float64)
    index, counts = tile_lists(case) if tiles else key_lists(case)
    upstream = torch.randn(2, 4, 100, 20, dtype=torch.float64)
    expected = forward_and_backward(tiles, reference, case, index, counts, upstream)
    check(forward_and_backward(tiles, lowering(tiles), case, index, counts, upstream), expected, 1e-10)


@pytest.mark.parametrize("tiles", [True, False])
def test_only_needed_gradients(tiles):
    case = cases.make("float")
    index, counts = tile_lists(case) if tiles else key_lists(case)
    upstream = torch.randn(2, 4, 100, 20, dtype=torch.float64)
    full = forward_and_backward(tiles, lowering(tiles), case, index, counts, upstream)
    for needs in ((True, False, False, False), (False, True, False, False), (False, False, True, False), (False,) * 3 + (True,)):
        found = forward_and_backward(tiles, lowering(tiles), case, index, counts, upstream, needs)
        for need, actual, expected in zip(needs, found[2:], full[2:], strict=True):
            assert cases.error(actual, expected) < 1e-12 if need else actual.shape == (0,)


@pytest.mark.parametrize("tiles", [True, False])
def test_upstream_gradients_of_any_stride(tiles):
    case = cases.make("causal", dtype=torch.float32)
    index, counts = tile_lists(case) if tiles else key_lists(case)
    ones = torch.ones(2, 4, 100, 20)
    expected = forward_and_backward(tiles, lowering(tiles), case, index, counts, ones)
    actual = forward_and_backward(tiles, lowering(tiles), case, index, counts, torch.ones(()).expand(2, 4, 100, 20))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiles", [True, False])
def test_error_is_that_of_the_plain_ops(dtype, tiles):
    """On the same selection, at most twice the error of eager attention in the same dtype, for each output and gradient."""
    case = cases.make("causal padding", dtype=dtype, n_q=128, n_k=128, groups=4)
    index, counts = tile_lists(case) if tiles else key_lists(case)
    kept = (cases.kept_tiles if tiles else cases.kept_keys)(case, index, counts) & case.allowed()
    upstream = torch.randn(2, 4, 128, 20).to(dtype)
    found = forward_and_backward(tiles, lowering(tiles), case, index, counts, upstream)

    def eager(q, k, v):
        scores = (q @ k.transpose(-1, -2) * case.scale).masked_fill(~kept, -torch.inf)
        seen = kept.any(-1, keepdim=True)
        return (scores.masked_fill(~seen, 0).float().softmax(-1).to(q.dtype) * seen) @ v

    def with_grads(cast):
        inputs = [x.to(cast).detach().requires_grad_() for x in (case.q, case.k, case.v)]
        out = eager(*inputs) if cast != torch.float64 else cases.oracle(case, kept)
        if cast == torch.float64:
            double = cases.Case(**{**vars(case), **dict(zip(("q", "k", "v"), inputs, strict=True))})
            out = cases.oracle(double, kept)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(cast))]

    exact, plain = with_grads(torch.float64), with_grads(dtype)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), [found[0], *found[2:5]], plain, exact, strict=True):
        assert cases.rms(x - z) < 2 * cases.rms(y - z) + 1e-6, name


def test_empty_batch_and_empty_keys():
    case = cases.make("causal", dtype=torch.float32)
    case.q, case.k, case.v = (x[:0] for x in (case.q, case.k, case.v))
    index, counts = cpu_selection.select_tiles(*case.select_tiles_args())
    out, lse = cpu_attention.tile_attention(*case.attend_args(index, counts))
    assert out.shape == (0, 4, 100, 20) and lse.shape == (0, 4, 100)
    keys, counts = cpu_selection.select_keys(*case.select_keys_args())
    assert cpu_key_attention.key_attention(*case.attend_args(keys, counts, False))[0].shape == (0, 4, 100, 20)
    case = cases.make("none", dtype=torch.float32, n_k=16)
    case.k, case.v = case.k[:, :, :0], case.v[:, :, :0]
    for case.empty in ("zero", "uniform", "nan"):  # as the definition, and torch's own attention, have it
        index, counts = cpu_selection.select_tiles(*case.select_tiles_args())
        assert (cpu_attention.tile_attention(*case.attend_args(index, counts))[0] == 0).all()
        keys, counts = cpu_selection.select_keys(*case.select_keys_args())
        assert (cpu_key_attention.key_attention(*case.attend_args(keys, counts, False))[0] == 0).all()


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_no_queries_disable_no_lowering(mask):
    case = cases.make(mask, dtype=torch.float32, n_q=16)
    case.q = case.q[:, :, :0]
    case.bias = None if case.bias is None else case.bias[:, :, :0]
    lists = registry.dispatch("select_tiles_v1", "cpu", *case.select_tiles_args())
    args = case.attend_args(*lists)
    out, lse = registry.dispatch("tile_attention_v1", "cpu", *args)
    grads = registry.dispatch("tile_attention_backward_v1", "cpu", out, *args[:4], out, lse, *args[4:], [True] * 4)
    assert out.shape == (2, 4, 0, 20) and all((g == 0).all() for g in grads) and registry.failures() == {}


# ---------------------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", cases.MASKS)
@pytest.mark.parametrize("sizes", [{}, {"n_q": 63, "n_k": 63, "tile_q": 24, "tile_k": 7}, {"n_q": 40, "n_k": 90, "groups": 1}])
def test_tile_selection_equals_the_reference(mask, sizes, nan_empty, two_threads):
    for rule, density, softcap in (("pq", 0.3, None), ("mean", 0.6, 3.0), ("mean", 0.02, None), ("pq", 0.8, None)):
        case = cases.make(mask, softcap=softcap, **sizes)
        expected = tile_lists(case, density, rule)
        actual = cpu_selection.select_tiles(*case.select_tiles_args(density, rule))
        assert torch.equal(actual[1], expected[1])
        assert torch.equal(actual[0], expected[0])
        assert actual[0].stride() == expected[0].stride()


@pytest.mark.parametrize("mask", cases.MASKS)
@pytest.mark.parametrize("rule", ["pq", "pq-match"])
def test_key_selection_equals_the_reference(mask, rule, nan_empty, two_threads):
    case = cases.make(mask, n_q=60, n_k=77, softcap=4.0 if rule == "pq" else None)
    expected = key_lists(case, 0.2, rule)
    actual = cpu_selection.select_keys(*case.select_keys_args(0.2, rule))
    assert torch.equal(actual[1], expected[1])
    # Keys on the same codewords have the same score, which two GEMMs round differently.
    assert (actual[0] == expected[0]).double().mean() > (0.998 if rule == "pq" else 0.9999)


def test_chunks_and_threads_change_nothing(monkeypatch, two_threads):
    case = cases.make("causal padding", dtype=torch.float32, n_q=130, n_k=130)
    upstream = torch.randn(2, 4, 130, 20)

    def run():
        index, counts = cpu_selection.select_tiles(*case.select_tiles_args())
        keys, key_counts = cpu_selection.select_keys(*case.select_keys_args())
        by_tile = forward_and_backward(True, cpu_attention, case, index, counts, upstream)
        by_key = forward_and_backward(False, cpu_key_attention, case, keys, key_counts, upstream)
        return [index, counts, keys, key_counts, *by_tile, *by_key]

    first = run()
    assert all(torch.equal(x, y) for x, y in zip(run(), first, strict=True))  # repeatable, bit for bit
    for module, name in ((cpu_tiles, "PANEL"), (cpu_tiles, "SCRATCH"), (cpu_selection, "_PANEL"), (cpu_key_attention, "_PANEL")):
        monkeypatch.setattr(module, name, 1)
    second = run()
    assert all(torch.equal(x, y) for x, y in zip(second[:10], first[:10], strict=True))  # lists, and attention over tiles
    assert all(cases.error(x, y) < 1e-5 for x, y in zip(second[10:15], first[10:15], strict=True))


@pytest.mark.parametrize("mask", ["padding", "causal padding", "window", "bool"])
def test_keys_that_nobody_may_see_may_hold_anything(mask):
    """NaN of padding, behind a layer whose empty rows are NaN, chooses no tiles of other keys."""
    case = cases.make(mask, dtype=torch.float32, tile_q=24, tile_k=7)
    if mask == "window":
        case.expr, case.expr_in = case.expr + " & t0[b, k]", [torch.arange(100).expand(2, 100) < 60]
    if mask == "bool":
        case.bias[..., 40:80] = False
    expected = cpu_selection.select_tiles(*case.select_tiles_args(rule="mean"))
    case.k[~case.allowed()[:, :1].any(2).expand(2, 2, 100)] = torch.nan
    actual = cpu_selection.select_tiles(*case.select_tiles_args(rule="mean"))
    assert case.k.isnan().any() and all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rule", ["pq", "mean", "pq keys", "pq-match"])
def test_nobody_influences_whom_it_must_not(rule):
    """Through the lowerings: later query tiles, masked keys and other batch rows leave bits alone."""
    tiles = rule in ("pq", "mean")

    def run(case):
        name = rule.removesuffix(" keys")
        if tiles:
            index, counts = cpu_selection.select_tiles(*case.select_tiles_args(0.3, name))
            return index, counts, *cpu_attention.tile_attention(*case.attend_args(index, counts))
        index, counts = cpu_selection.select_keys(*case.select_keys_args(0.3, name))
        return index, counts, *cpu_key_attention.key_attention(*case.attend_args(index, counts, False))

    case = cases.make("causal padding", dtype=torch.float32)
    before = run(case)
    hidden = ~case.expr_in[0]
    for x in (case.k, case.v):
        x[hidden.unsqueeze(1).expand(x.shape[:3])] = 50.0
    assert all(torch.equal(x, y) for x, y in zip(run(case), before, strict=True))
    for x in (case.q, case.k, case.v):
        x[1] = torch.randn_like(x[1])
    case.expr_in[0][1] = True
    other = run(case)
    assert all(torch.equal(x[0], y[0]) for x, y in zip(other, before, strict=True))
    assert not torch.equal(other[2][1], before[2][1])

    case = cases.make("causal", dtype=torch.float32)
    before = run(case)
    for x in (case.q, case.k, case.v):
        x[:, :, 70:] = 3 * torch.randn_like(x[:, :, 70:])
    after = run(case)
    rows, lists = (64, 2) if tiles else (70, 70)
    assert all(torch.equal(x[:, :, :lists], y[:, :, :lists]) for x, y in zip(after[:2], before[:2], strict=True))
    if tiles:
        assert all(torch.equal(x[:, :, :rows], y[:, :, :rows]) for x, y in zip(after[2:], before[2:], strict=True))
    else:  # a chunk of queries shares its GEMMs with later keys, whose probabilities are zero: equal up to their order
        assert all(cases.error(x[:, :, :rows], y[:, :, :rows]) < 1e-6 for x, y in zip(after[2:], before[2:], strict=True))
    assert not torch.equal(after[2][:, :, 70:], before[2][:, :, 70:])


# ---------------------------------------------------------------------------------------------------------------------
# Dense, memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_everything_by_data_is_torch_s_own_attention(causal):
    case = cases.make("causal" if causal else "none", dtype=torch.float32, groups=4, dim=16, dim_v=16)
    for x in (case.q, case.k, case.v):
        x.requires_grad_()
    registry.install()
    index, counts = torch.ops.spt.select_tiles_v1(*case.select_tiles_args(-1.0, max_density=0.25))
    out, lse = torch.ops.spt.tile_attention_v1(*case.attend_args(index, counts))
    dense = F.scaled_dot_product_attention(case.q, case.k, case.v, is_causal=causal, scale=case.scale)
    assert torch.equal(out, dense)
    upstream = torch.randn_like(out)
    for x, y in zip(
        torch.autograd.grad(out, (case.q, case.k, case.v), upstream),
        torch.autograd.grad(dense, (case.q, case.k, case.v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(lse, reference.tile_attention(*case.attend_args(index, counts))[1])


class LargestTensor(TorchDispatchMode):
    """The most elements that any operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                # An expanded tensor takes no memory.
                size = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0]
                self.elements = max(self.elements, torch.Size(size).numel())
        return result


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_memory_is_linear_in_the_length(mask, everything, monkeypatch):
    for module, name in ((cpu_tiles, "PANEL"), (cpu_selection, "_PANEL"), (cpu_tiles, "SCRATCH")):
        monkeypatch.setattr(module, name, 1 << 14)
    largest = {}
    for n in (512, 1024):
        case = cases.make(mask, batch=1, heads=2, groups=1, n_q=n, n_k=n, dim=8, dim_v=8, dtype=torch.float32)
        upstream = torch.randn(1, 2, n, 8)
        with LargestTensor() as seen:
            index, counts = cpu_selection.select_tiles(*case.select_tiles_args(0.25))
            if everything:
                counts.fill_(-1)
            forward_and_backward(True, cpu_attention, case, index, counts, upstream)
        largest[n] = seen.elements
    assert largest[1024] < 2.2 * largest[512]
    assert largest[1024] < 1024 * 1024 / 8


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


def test_parts_run_side_by_side_on_serial_threads(two_threads):
    meeting, seen = threading.Barrier(2, timeout=20), []

    def part():
        meeting.wait()  # passes only if both parts are running
        seen.append((threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))

    cpu_threads.run([part, part])
    assert seen == [("spt-cpu", 1, False)] * 2
    assert torch.get_num_threads() == 2


def test_an_error_in_a_part_reaches_the_caller(two_threads):
    done = []

    def fails():
        raise FloatingPointError("in a part")

    with pytest.raises(FloatingPointError, match="in a part"):
        cpu_threads.run([fails, lambda: done.append(1)])
    cpu_threads.run([lambda: done.append(2), lambda: done.append(3)])  # the threads live on
    assert {2, 3} <= set(done)


def test_one_part_or_one_thread_stays_on_the_caller():
    names = []
    cpu_threads.run([lambda: names.append(threading.current_thread().name)] * 3)
    assert names == [threading.current_thread().name] * 3


def test_inference_mode_reaches_the_parts(two_threads):
    case = cases.make("causal", dtype=torch.float32)
    plain = cpu_attention.tile_attention(*case.attend_args(*tile_lists(case)))
    with torch.inference_mode():
        index, counts = cpu_selection.select_tiles(*case.select_tiles_args())
        inside = cpu_attention.tile_attention(*case.attend_args(index, counts))
    assert torch.equal(plain[0], inside[0]) and inside[0].is_inference()


@pytest.mark.parametrize("total", [0, 1, 5, 12])
def test_ranges_cover_everything_once(total):
    for n in (1, 2, 5, 20):
        ranges = cpu_threads.ranges(total, n)
        assert [i for a, z in ranges for i in range(a, z)] == list(range(total))
        assert len(ranges) <= n and all(z > a for a, z in ranges)


@pytest.mark.parametrize("bias_shape", [None, (2, 6, 4, 4), (1, 6, 4, 4), (2, 1, 4, 4), (1, 1, 4, 4)])
def test_parts_share_no_bias_gradient(bias_shape, monkeypatch, two_threads):
    monkeypatch.setattr(cpu_threads, "width", lambda: 4)
    shape = cpu_tiles.Shape(2, 6, 3, 64, 64, 8, 8, 16, 16)
    bias = None if bias_shape is None else torch.zeros(bias_shape)
    parts = cpu_tiles.partition(shape, bias)
    pairs = [[(s.b, g) for s in part for g in range(s.first, s.stop)] for part in parts]
    assert sorted(pair for part in pairs for pair in part) == [(b, g) for b in range(2) for g in range(3)]
    assert len(parts) == {None: 4, (2, 6, 4, 4): 3, (1, 6, 4, 4): 3, (2, 1, 4, 4): 2, (1, 1, 4, 4): 1}[bias_shape]
    if bias is not None:
        touched = [{(b % bias_shape[0], g % bias_shape[1]) for b, g in part} for part in pairs]
        assert sum(len(t) for t in touched) == len(set().union(*touched))


def test_scratch_memory_is_reused():
    buffers = cpu_tiles.Buffers(torch.float32)
    first = buffers.get("a", 4, 5)
    assert buffers.get("a", 2, 3).data_ptr() == first.data_ptr() != buffers.get("b", 4, 5).data_ptr()
    larger = buffers.get("a", 40, 5)
    assert buffers.get("a", 4, 5).data_ptr() == larger.data_ptr()


def test_measuring_quality_copies_no_keys_for_each_position():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    case = cases.make("causal", dtype=torch.float32, n_q=400, n_k=400)
    index, counts = tile_lists(case)
    out, lse = reference.tile_attention(*case.attend_args(index, counts))
    with Largest() as seen:
        figures = reference.quality_sums(case.q, case.k, case.v, None, case.expr, [], out, lse, case.scale, None)
    assert figures[3] == 32 * 4 and 0 < figures[0] <= figures[3]
    assert seen.size < 2 * case.k.numel()  # and not 32 times the keys
