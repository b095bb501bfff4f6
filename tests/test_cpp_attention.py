"""Attention and selection by generated C++ against the fp64 references, their masks block by block, and life without a compiler."""

from __future__ import annotations

import threading
import warnings

import attention_cases as cases
import blocks
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from spt_compiler import expression
from spt_compiler.errors import SPTError
from spt_compiler.lowering import cpp, cpp_attention, cpp_ffn, cpu_attention, cpu_masks, registry, render
from spt_compiler.ops import reference, tracing

pytestmark = [
    pytest.mark.skipif(cpp.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("error:spt_compiler"),  # a kernel that does not compile would be replaced by another lowering
]

ODD = {"n_q": 63, "n_k": 63, "tile_q": 24, "tile_k": 7}
SPLIT = {"batch": 1, "heads": 2, "groups": 1, "n_q": 150, "n_k": 90, "tile_q": 32, "tile_k": 8}
DOCUMENTS = "k <= q & t0[b, q] == t0[b, k]"


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def double(case: cases.Case) -> cases.Case:
    widened = {name: x.double() for name, x in vars(case).items() if name in ("q", "k", "v")}
    if case.bias is not None and case.bias.dtype != torch.bool:
        widened["bias"] = case.bias.double()
    return cases.Case(**(vars(case) | widened))


def results(ops, case, lists, upstream, needs=(True, True, True, False)):
    """(out, lse, dq, dk, dv)."""
    args = case.attend_args(*lists)
    out, lse = ops.tile_attention(*args)
    grads = ops.tile_attention_backward(upstream, *args[:4], out, lse, *args[4:], list(needs))
    return [out, lse, *grads[:3]]


def check(case: cases.Case, bound: float = 2e-5) -> None:
    assert cpp_attention._attention_fits(*case.attend_args(torch.zeros(1), torch.zeros(1)))
    lists = reference.select_tiles(*double(case).select_tiles_args(0.4))
    lists[1][:, :, ::3] = -1  # some rows read all keys, the others their list
    upstream = torch.randn(*case.q.shape[:3], case.v.shape[3]).to(case.q.dtype)
    found = results(cpp_attention, case, lists, upstream)
    exact = results(reference, double(case), lists, upstream.double())
    assert torch.equal(found[1] == -torch.inf, exact[1] == -torch.inf)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, exact, strict=True):
        assert x.dtype == (torch.float32 if name == "lse" else case.q.dtype), name
        assert (x.transpose(1, 2) if name == "out" else x).is_contiguous(), name
        if name == "lse":
            live = (y > -1e30) & (y < 1e30)
            x, y = x[live], y[live]
        assert cases.error(x, y) < (1e-5 if name == "lse" else bound), name


@pytest.mark.parametrize("mask", cases.MASKS)
def test_every_mask_equals_the_reference(mask, nan_empty):
    for empty in ("zero", "uniform", "nan"):
        check(cases.make(mask, dtype=torch.float32, empty=empty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [ODD, SPLIT, {"softcap": 2.0}], ids=["odd", "split", "softcap"])
def test_sizes_and_types(dtype, sizes, nan_empty, three_threads):
    check(
        cases.make("causal padding", dtype=dtype, **sizes), {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    )


def documents(**options) -> cases.Case:
    case = cases.make("causal", dtype=torch.float32, **options)
    case.expr = DOCUMENTS
    n = case.k.shape[2]
    case.expr_in = [torch.randint(0, 4, (2, n)).sort(dim=1).values]
    return case


@pytest.mark.parametrize("row", ["b", "0", "1"])  # a constant: of a batch of one row, whose masks broadcast
def test_packed_documents_equal_the_reference(row, nan_empty):
    case = documents()
    case.expr = DOCUMENTS.replace("[b,", f"[{row},")
    lists = (torch.zeros(1), torch.zeros(1))
    assert cpp_attention._attention_fits(*case.attend_args(*lists))
    lists = reference.select_tiles(*double(case).select_tiles_args(0.4))
    upstream = torch.randn(2, 4, 100, 20)
    exact = results(reference, double(case), lists, upstream.double())
    for x, y in zip(results(cpp_attention, case, lists, upstream), exact, strict=True):
        assert cases.error(x, y) < 2e-5
    assert torch.equal(
        cpp_attention.select_tiles(*case.select_tiles_args())[0], reference.select_tiles(*case.select_tiles_args())[0]
    )


@pytest.mark.parametrize("mask", cases.MASKS)
def test_selection_equals_the_reference(mask, nan_empty, three_threads):
    for rule, sizes in (("pq", {}), ("mean", {}), ("pq", {"softcap": 2.0})):
        for density in (0.1, 0.5, 0.8, -1.0):
            args = cases.make(mask, dtype=torch.float32, **sizes).select_tiles_args(density, rule, max_density=max(density, 0.3))
            assert cpp_attention._selection_fits(*args)
            found, expected = cpp_attention.select_tiles(*args), reference.select_tiles(*args)
            assert torch.equal(found[1], expected[1])
            # Ties in the last bit may fall either way.
            assert (found[0] == expected[0]).double().mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_the_plain_ops(dtype):
    case = cases.make("causal", dtype=dtype, n_q=128, n_k=128, groups=4)
    lists = reference.select_tiles(*case.select_tiles_args(0.4))
    kept = cases.kept_tiles(case, *lists) & case.allowed()
    upstream = torch.randn(2, 4, 128, 20).to(dtype)
    found = results(cpp_attention, case, lists, upstream)
    exact = results(reference, double(case), lists, upstream.double())
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    scores = (inputs[0] @ inputs[1].transpose(-1, -2) * case.scale).masked_fill(~kept, -torch.inf)
    out = scores.float().softmax(-1).to(dtype) @ inputs[2]
    plain = [out.detach(), *torch.autograd.grad(out, inputs, upstream)]
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), [found[0], *found[2:]], plain, [exact[0], *exact[2:]], strict=True):
        assert cases.rms(x.double() - z) < 2 * cases.rms(y.double() - z) + 1e-6, name


def test_only_needed_gradients_and_any_stride():
    case = cases.make("causal", dtype=torch.float32)
    lists = reference.select_tiles(*case.select_tiles_args())
    full = results(cpp_attention, case, lists, torch.ones(2, 4, 100, 20))
    for i in range(3):
        needs = [n == i for n in range(3)] + [False]
        found = results(cpp_attention, case, lists, torch.ones(()).expand(2, 4, 100, 20), needs)
        for need, actual, expected in zip(needs, found[2:], full[2:], strict=False):
            assert torch.equal(actual, expected) if need else actual.shape == (0,)


def test_threads_change_nothing_and_calls_may_overlap(three_threads):
    case = documents(groups=4)
    upstream = torch.randn(2, 4, 100, 20)

    def run():
        lists = cpp_attention.select_tiles(*case.select_tiles_args())
        return [*lists, *results(cpp_attention, case, lists, upstream)]

    first, others = run(), []
    assert all(torch.equal(x, y) for x, y in zip(run(), first, strict=True))  # repeatable, bit for bit

    def alone():
        torch.set_num_threads(2)
        others.append(run())

    workers = [threading.Thread(target=alone) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(1)
    others.append(run())
    assert len(others) == 4
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(other[:5], first[:5], strict=True))
        # With more threads than heads, the gradients of keys and values are sums of the threads' shares.
        assert all(cases.error(x, y) < 1e-6 for x, y in zip(other[5:], first[5:], strict=True))


def test_keys_that_nobody_may_see_may_hold_anything():
    case = cases.make("causal padding", dtype=torch.float32)
    expected = cpp_attention.select_tiles(*case.select_tiles_args(rule="mean"))
    case.k[~case.allowed()[:, :1].any(2).expand(2, 2, 100)] = torch.nan
    actual = cpp_attention.select_tiles(*case.select_tiles_args(rule="mean"))
    assert case.k.isnan().any() and all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_a_nan_stays_where_it_is():
    case = cases.make("causal", dtype=torch.float32, heads=2, groups=2)
    lists = reference.select_tiles(*case.select_tiles_args())
    case.q[1, 0, 7] = torch.nan
    out, lse = cpp_attention.tile_attention(*case.attend_args(*lists))
    assert out[1, 0, 7].isnan().all() and lse[1, 0, 7].isnan()
    assert out.isnan().sum() == 20 and lse.isnan().sum() == 1


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves to others
# ---------------------------------------------------------------------------------------------------------------------


def test_what_the_kernels_cannot_do_is_declined():
    case = cases.make("float", dtype=torch.float32)
    lists = (torch.zeros(1), torch.zeros(1))
    assert cpp_attention._attention_fits(*case.attend_args(*lists))
    assert not cpp_attention._attention_fits(*double(case).attend_args(*lists))
    assert not cpp_attention._attention_fits(*cases.Case(**(vars(case) | {"p": 0.1})).attend_args(*lists))
    head = (case.q, *case.attend_args(*lists)[:4], case.q, case.q, *case.attend_args(*lists)[4:])
    assert cpp_attention._backward_fits(*head, [True, True, True, False])
    assert not cpp_attention._backward_fits(*head, [True, True, True, True])
    # An index that may leave the tensor is not read by generated code.
    near = cases.Case(**(vars(case) | {"expr": "t0[b, q - 1] == 0", "expr_in": [torch.zeros(2, 100, dtype=torch.long)]}))
    assert not cpp_attention._attention_fits(*near.attend_args(*lists))
    for index in ("2, q", "-1, q", "b, q + 0 * k", "0"):
        near.expr = f"t0[{index}] == 0"
        assert not cpp_attention._attention_fits(*near.attend_args(*lists)), index
    near.expr = "t0[b, q] == 0"
    assert cpp_attention._attention_fits(*near.attend_args(*lists))


@pytest.mark.parametrize("failure", ["missing", "refuses"])
def test_without_a_compiler_aten_runs_and_one_warning_says_so(failure, monkeypatch, tmp_path):
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp, "_problem", None)
    monkeypatch.setattr(cpp, "_libraries", {})
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'error: not today' >&2\nexit 1\n")
    broken.chmod(0o755)
    cpp.compiler.cache_clear()
    cpp._toolchain.cache_clear()
    monkeypatch.setenv("CXX", str(broken) if failure == "refuses" else "no-such-compiler")
    try:
        case = cases.make("causal", dtype=torch.float32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lists = registry.dispatch("select_tiles_v1", "cpu", *case.select_tiles_args())
            out, lse = registry.dispatch("tile_attention_v1", "cpu", *case.attend_args(*lists))
            args = case.attend_args(*lists)
            registry.dispatch("tile_attention_backward_v1", "cpu", out, *args[:4], out, lse, *args[4:], [True, True, True, False])
        ours = [str(w.message) for w in caught if "C++" in str(w.message)]
        assert len(ours) == 1 and ("not today" in ours[0]) == (failure == "refuses")
        assert torch.equal(out, cpu_attention.tile_attention(*args)[0])
        assert registry.chosen("tile_attention_v1", "cpu") == "cpu"
    finally:
        cpp.compiler.cache_clear()
        cpp._toolchain.cache_clear()
    monkeypatch.undo()
    assert registry.chosen("tile_attention_v1", "cpu") == "cpp"


def test_libraries_of_another_processor_are_not_taken(monkeypatch):
    linux, others = "model name\t: One\nflags\t\t: avx2 fma\ncpu MHz\t\t: 1", "Intel64 Family 6, GenuineIntel"
    for info, tells in ((linux, "avx2 fma"), (others, "Intel64 Family 6")):
        monkeypatch.setattr(cpp, "cpu_info", lambda info=info: info)
        key = cpp._toolchain.__wrapped__()
        assert tells in key and "MHz" not in key  # what varies by the moment is no part of it


def test_a_second_process_would_find_the_library(monkeypatch, tmp_path):
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpp, "_libraries", {})
    case = cases.make("causal", dtype=torch.float32, heads=1, groups=1)
    cpp_attention.select_tiles(*case.select_tiles_args())
    built = sorted(tmp_path.rglob("*.so"))
    assert len(built) == 1 and len(sorted(tmp_path.rglob("*.cpp"))) == 1
    before = built[0].stat().st_mtime_ns
    monkeypatch.setattr(cpp, "_libraries", {})
    cpp_attention.select_tiles(*case.select_tiles_args())
    assert built[0].stat().st_mtime_ns == before


def traced_calls(op_name: str, args: tuple, monkeypatch) -> list[tuple[str, object]]:
    """What tracing an op with fake copies of its arguments starts to compile: (template, constants as a key)."""
    registry.install()
    started: list[tuple[str, object]] = []
    monkeypatch.setattr(cpp, "foresee", lambda template, constants: started.append((template, render.frozen(constants))))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, tracing.listening(registry.foresee):
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fakes = [[mode.from_tensor(t) for t in a] if isinstance(a, list) else a for a in fakes]
        getattr(torch.ops.spt, op_name)(*fakes)
    return started


@pytest.mark.parametrize("mask", [*cases.MASKS, "documents", "documents of one row", "softcap"])
def test_tracing_foresees_the_very_libraries_that_calls_ask_for(mask, monkeypatch):
    case = cases.make("causal" if mask == "softcap" else mask, dtype=torch.bfloat16) if mask in cases.MASKS else documents()
    case.expr = DOCUMENTS.replace("[b,", "[0,") if mask == "documents of one row" else case.expr
    case.softcap = 3.0 if mask == "softcap" else case.softcap
    asked: list[tuple[str, object]] = []

    def library(template, constants):
        asked.append((template, render.frozen(constants)))
        raise SPTError("not now", stage="lower")

    lists = reference.select_tiles(*double(case).select_tiles_args())
    for op_name, args in (("select_tiles_v1", case.select_tiles_args()), ("tile_attention_v1", case.attend_args(*lists))):
        started = traced_calls(op_name, args, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(cpp, "library", library)
            patch.setattr(cpp, "give_up", lambda reason: None)
            asked.clear()
            getattr(cpp_attention, op_name[:-3])(*args)
        assert started == asked and len(asked) == 1, op_name


def test_a_foreseen_library_is_there_when_it_is_called_for(monkeypatch, tmp_path):
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpp, "_libraries", {})
    built = []
    build = cpp._build
    monkeypatch.setattr(cpp, "_build", lambda *args: built.append(threading.current_thread().name) or build(*args))
    constants = cpp_ffn._constants("relu(x0)", 1, 0, torch.float32)
    thread = cpp.foresee("routed_ffn", constants)
    assert cpp.foresee("routed_ffn", constants) is None  # another layer's
    assert cpp_ffn.kernels_for("relu(x0)", 1, 0, torch.float32) is not None  # waits for it
    thread.join()
    assert built == ["spt-routed_ffn"] and cpp.foresee("routed_ffn", constants) is None


def test_only_calls_that_will_come_are_foreseen(monkeypatch):
    case = cases.make("causal", dtype=torch.float32)
    lists = (torch.zeros(1), torch.zeros(1))
    assert traced_calls("select_tiles_v1", case.select_tiles_args(min_keys=200), monkeypatch) == []  # it keeps all keys
    assert traced_calls("tile_attention_v1", double(case).attend_args(*lists), monkeypatch) == []  # other lowerings take it
    torch.ops.spt.tile_attention_v1(*case.attend_args(*reference.select_tiles(*case.select_tiles_args())))
    started = traced_calls("tile_attention_v1", case.attend_args(*lists), monkeypatch)
    assert len(started) == 1
    started.clear()
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode, tracing.listening(registry.foresee):
        symbolic = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in case.attend_args(*lists)]
        torch.ops.spt.tile_attention_v1(*symbolic)
    assert not started and not env.guards, "sizes that are not settled stay so"


@pytest.mark.parametrize("exact", [False, True])
def test_a_compiled_model_starts_its_compilers_before_its_first_step(exact, monkeypatch):
    started = []
    monkeypatch.setattr(cpp, "foresee", lambda template, constants: started.append(template))
    options = {"exact": exact, "attention.min_keys": 0, "ffn.min_width": 0, "inner": "aot_eager"}
    torch._dynamo.reset()
    torch.compile(blocks.Block(), backend="spt", options=options)(torch.randn(1, 40, 48))
    assert sorted(set(started)) == ([] if exact else ["routed_ffn", "tile_attention"])


# ---------------------------------------------------------------------------------------------------------------------
# Classes of blocks
# ---------------------------------------------------------------------------------------------------------------------

EXPRESSIONS = [
    "k <= q",
    DOCUMENTS,
    "t1[b, k]",
    "~t1[b, k] | k <= q",
    "q - k < 30 & k <= q + 10",
    "(k <= q | k < 20) & t1[b, k]",
    "t2[h] + q < 2 * k",
    "t0[b, q] != t0[b, k]",
    "-t3[b, h, k] > t4",
    "floordiv(k, 8) == floordiv(q, 8)",
    "where(k > q, -inf, t3[b, h, q] * 0)",
    "k > 1000",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_classes_tell_the_truth(text):
    n_q, n_k, tile_q, tile_k = 70, 75, 16, 8
    reads = [torch.randint(0, 4, (2, 80)).sort(dim=1).values, torch.rand(2, 80) > 0.1, torch.tensor([3, 40])]
    reads += [torch.randn(2, 2, 80), torch.tensor(0.5)]
    reads[1][0, :20] = False
    reads[3][0, 0, 5] = torch.nan
    masks = cpu_masks.split(None, text, reads, (2, 2, n_q, n_k), torch.float32)
    found = cpu_masks.classes(masks, tile_q, tile_k)
    assert found is not None
    added = masks.rows(0, n_q).expand(2, 2, n_q, n_k)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 5, 10))).tolist():
        block = added[b, h, i * tile_q : (i + 1) * tile_q, j * tile_k : (j + 1) * tile_k]
        kind = int(found[b % found.shape[0], h % found.shape[1], i, j])
        if kind == cpu_masks.NOTHING:
            assert (block == 0).all() and (j + 1) * tile_k <= n_k
        elif kind == cpu_masks.ALL:
            assert (block == -torch.inf).all()
    if text in EXPRESSIONS[:2] + EXPRESSIONS[4:6]:  # and is of use: few blocks are left in which anything has to be looked at
        assert (found == cpu_masks.SOMETHING).double().mean() < 0.5
    assert expression.parse(text) is not None


def test_classes_of_a_bias():
    bias = torch.zeros(1, 1, 20, 20)
    bias[..., :8, 8:16], bias[..., 3, 17] = -torch.inf, 1.0
    masks = cpu_masks.split(bias, "", [], (1, 2, 20, 20), torch.float32)
    assert cpu_masks.classes(masks, 8, 8)[0, 0].tolist() == [[0, 2, 1], [0, 0, 1], [0, 0, 1]]
    masks = cpu_masks.split(bias == 0, "", [], (1, 2, 20, 20), torch.float32)
    assert cpu_masks.classes(masks, 8, 8)[0, 0].tolist() == [[0, 2, 1], [0, 0, 1], [0, 0, 1]]
    assert cpu_masks.classes(cpu_masks.split(None, "", [], (1, 1, 16, 16), torch.float32), 8, 8) is None
