"""Both CPU lowerings of the routed FFN against the reference, and what they must not do: extra GEMMs, stale memory.

fp64 runs in ATen operators, narrower types in the generated kernels.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from ffn_cases import MADE_UP, Case, both, case, gradients, plain, rms
from torch.utils._python_dispatch import TorchDispatchMode

from spt_compiler.lowering import cpp_ffn, cpu_ffn, cpu_ffn_aten
from spt_compiler.ops import reference_ffn

ACTIVATIONS = (
    "gelu(x0)",
    "gelu_tanh(x0)",
    "silu(x0) * x1",
    "relu(x0)",
    MADE_UP,
    "square(relu(x0)) * a0 + a1 * x1",
    "x0",
)


def lowered(c: Case, grad_y: torch.Tensor, needs: list[bool] | None = None) -> dict[str, torch.Tensor]:
    """Output, saved tensor and gradients of the lowering, by name."""
    result = cpu_ffn.routed_ffn(*c.forward)
    grads = cpu_ffn.routed_ffn_backward(*c.backward(grad_y, result[1], needs))
    return {"y": both(result), "saved": result[1]} | dict(zip(c.leaves, grads, strict=True))


def defined(c: Case, grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    result = reference_ffn.routed_ffn(*c.forward)
    grads = reference_ffn.routed_ffn_backward(*c.backward(grad_y, result[1]))
    return {"y": both(result), "saved": result[1]} | dict(zip(c.leaves, grads, strict=True))


def check(c: Case) -> None:
    grad_y = torch.randn(c.x.shape[0], c.n_out, dtype=c.x.dtype)
    got, expected = lowered(c, grad_y), defined(c, grad_y)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")
        assert got[name].stride() == value.stride(), name


@pytest.fixture
def small_spans(monkeypatch):
    """Spans of a few rows, so that small inputs meet every way of cutting."""
    monkeypatch.setattr(cpu_ffn_aten, "_SPAN_VALUES", 1)
    monkeypatch.setattr(cpu_ffn_aten, "_MIN_SPAN", 20)
    monkeypatch.setattr(cpu_ffn, "_MIN_ROWS", 20)
    monkeypatch.setattr(cpu_ffn, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu_ffn, "_STRIP_BYTES", 1)


@pytest.fixture(params=["torch", "plain"])
def micro_kernels(request, monkeypatch):
    """Products by torch's micro-kernels, and by the loops that stand in for them."""
    if request.param == "plain":
        monkeypatch.setattr(cpp_ffn, "_micro_kernels", lambda dtype: {})
    elif not cpp_ffn._micro_kernels(torch.float32):
        pytest.skip("torch has no micro-kernels for this processor")


def check_kernels(c: Case, dtype: torch.dtype = torch.float32) -> None:
    """The kernels for a narrower type against the reference in fp64."""
    narrow = c.to(dtype)
    wide = narrow.to(torch.float64)
    grad_y = torch.randn(c.x.shape[0], c.n_out).to(dtype)
    assert cpp_ffn.kernels(c.act, len(c.w_in), len(c.act_in), dtype) is not None
    needs = [t is not None and not name.startswith("act_in") for name, t in c.leaves.items()]
    got, expected = lowered(narrow, grad_y, needs), defined(wide, grad_y.double())
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for (name, value), need in zip(expected.items(), [True, True, *needs], strict=True):
        if not need:
            continue
        scale = value.abs().max().item() if value.numel() else 1.0
        error = (got[name].double() - value).abs().max().item() if value.numel() else 0.0
        assert error <= tolerance * max(scale, 1e-3), f"{name}: {error} of {scale}"
        assert name in ("y", "saved") or got[name].stride() == narrow.leaves[name].stride(), name


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("f", [50, 100])
def test_equals_reference(act, f, nan_empty):
    for bias, conv1d, ordered in itertools.product((False, True), repeat=3):
        check(case(act=act, f=f, bias=bias, conv1d=conv1d, ordered=ordered, compensation=bias))


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("budget,max_density", [(0.5, 0.5), (0.25, 0.5), (1.0, 1.0), (-1.0, 0.5)])
def test_equals_reference_with_every_option(tile, budget, max_density, nan_empty, small_spans):
    lists = {"budget": budget, "max_density": max_density, "tile": tile}
    # Pairs of options meet each other; all sixteen combinations would say no more.
    for lora, gates, p, save in ((1, 1, 0.3, 1), (1, 0, 0.0, 0), (0, 1, 0.0, 1), (0, 0, 0.3, 0), (0, 1, 0.3, 0)):
        options = {"lora": bool(lora), "gates": bool(gates), "p": p, "save": bool(save), "compensation": True}
        options |= {"down": bool(lora) or p == 0, "lora_p": 0.2 if save else 0.0}
        check(case(act="silu(x0) * x1", idle=3, **options, **lists))
        check(case(act=MADE_UP + " + a1 * x1", always=7, ordered=True, conv1d=True, **options, **lists))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_kernels_equal_reference(act, micro_kernels, nan_empty):
    for bias, conv1d, ordered in itertools.product((False, True), repeat=3):
        check_kernels(case(act=act, f=100 if ordered else 51, bias=bias, conv1d=conv1d, ordered=ordered, compensation=bias))


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("budget,max_density", [(0.5, 0.5), (0.25, 0.5), (1.0, 1.0), (-1.0, 0.5)])
@pytest.mark.parametrize("small", [False, True])
def test_kernels_equal_reference_with_every_option(tile, budget, max_density, small, micro_kernels, nan_empty, request):
    if small:
        request.getfixturevalue("small_spans")
    lists = {"budget": budget, "max_density": max_density, "tile": tile, "compensation": True}
    some = ((1, 1, 0.3, 0.2, 1), (1, 0, 0.0, 0.0, 0), (0, 1, 0.0, 0.2, 1), (1, 0, 0.3, 1.0, 0), (0, 1, 1.0, 0.0, 0))
    for lora, gates, p, lora_p, save in some:
        options = {"lora": bool(lora), "down": True, "gates": bool(gates), "p": p, "lora_p": lora_p, "save": bool(save)}
        check_kernels(case(act="silu(x0) * x1", idle=3, **options, **lists))
        check_kernels(case(act=MADE_UP + " + a1 * x1", always=7, ordered=True, conv1d=True, **options, **lists))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ["gelu(x0)", "silu(x0) * x1"])
def test_kernels_on_several_tiles_strips_and_panels(act, dtype, micro_kernels, nan_empty):
    """More rows than a strip, more units and columns than a panel, a contracted dim longer than one product takes."""
    c = case(n=700, e=1100, f=3 * 201, g=3, e_out=133, act=act, budget=0.7, max_density=0.7, lora=True, down=True)
    check_kernels(c.map(lambda t: t / t.shape[-1] ** 0.5 if t.dim() == 2 and t.shape[0] != 700 else t), dtype)


@pytest.mark.parametrize("kind", [{"f": 9}, {"f": 8}, {"f": 1, "g": 1}, {"f": 60, "g": 20}, {"n": 0}, {"n": 1}])
def test_kernels_on_odd_numbers(kind, micro_kernels, nan_empty):
    check_kernels(case(gates=True, compensation=True, lora=True, down=True, lora_p=0.1, act="silu(x0) * x1", **kind))
    check_kernels(case(budget=-1.0, p=0.3, **kind))


@pytest.mark.parametrize("f,g", [(9, 8), (8, 8), (1, 1), (64, 1), (60, 20)])
def test_odd_numbers_of_blocks(f, g, nan_empty):
    check(case(f=f, g=g, gates=True, compensation=True))
    check(case(f=f, g=g, budget=-1.0))


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(n, nan_empty):
    check(case(n=n, act="silu(x0) * x1", lora=True, down=True, lora_p=0.1, gates=True, compensation=True))
    check(case(n=n, budget=-1.0, p=0.3))


def test_route_equals_reference():
    for g, tile, budget, mode in itertools.product((1, 4, 8, 20), (1, 16), (-1.0, 0.0, 0.3, 0.5, 1.0, float("nan")), range(6)):
        scores, on = torch.randn(33, g), torch.zeros(g, dtype=torch.bool)
        if mode == 1:
            scores = scores.round()
        elif mode == 2:
            on[g // 2] = True
        elif mode == 3:
            on[:] = True
        elif mode == 4:
            scores[0], scores[5], scores[:, 0], on[-1] = torch.nan, -torch.inf, torch.inf, True
        elif mode == 5:
            scores, on[::2] = scores.bfloat16().t().contiguous().t(), True
        for max_density, min_tokens in ((0.25, 0), (0.5, 0), (1.0, 34)):
            arguments = (scores, on, torch.tensor([budget]), max_density, tile, min_tokens)
            for got, expected in zip(cpu_ffn.route(*arguments), reference_ffn.route(*arguments), strict=True):
                assert got.dtype == expected.dtype and torch.equal(got, expected), (arguments, got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", [{}, {"budget": -1.0, "down": True}, {"act": "silu(x0) * x1", "gates": True, "lora": True, "down": True}]
)
def test_error_is_within_twice_that_of_plain_operators(dtype, kind, small_spans):
    c = case(n=200, e=64, f=200, e_out=64, dtype=torch.float64, compensation=True, **kind)
    c = c.map(lambda t: t / t.shape[-1] ** 0.5 if t.dim() == 2 and t.shape[0] == 200 and t is not c.x else t).to(dtype)
    grad_y = torch.randn(200, c.n_out, dtype=dtype)
    exact = gradients(plain, c.to(torch.float64), grad_y.double())
    eager, got = gradients(plain, c, grad_y), lowered(c, grad_y)
    for name, value in exact.items():
        assert got[name].dtype == dtype
        scale = rms(value) + 1e-30
        ours, theirs = rms(got[name].double() - value) / scale, rms(eager[name].double() - value) / scale
        assert ours < 2 * theirs + 1e-6, f"{name}: {ours} against {theirs} of plain operators"


@pytest.mark.parametrize(
    "kind", [{"tile": 1}, {"tile": 4, "always": 7, "idle": 3}, {"budget": 0.25}, {"f": 9}, {"n": 1}, {"g": 20, "f": 60}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_chunks_of_tokens_equal_reference(kind, dtype, small_spans):
    c = case(act="silu(x0) * x1", lora=True, down=True, gates=True, compensation=True, **kind)
    lists = cpu_ffn._Lists(c.x, c.blocks, c.rows, c.offsets, c.permutation.shape[0])
    assert kind == {"n": 1} or len(lists.chunks) > 1
    check_kernels(c, dtype)


def test_kernels_without_onednn(monkeypatch):
    """It may be switched off, or held to an older processor: the micro-kernels then refuse, or are wrong."""
    c = case(dtype=torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not cpp_ffn.kernels(c.act, 1, 0, torch.float32).micro_kernels
        check_kernels(c)
    # `release` in place of brgemm multiplies nothing.
    real = cpp_ffn._micro_kernels(torch.float32)
    if real:
        monkeypatch.setattr(cpp_ffn, "_micro_kernels", lambda dtype: {"brgemm": real["release"], "release": real["release"]})
        kernels = cpp_ffn.kernels("relu(x0) + 1", 1, 0, torch.float32)
        assert not kernels.micro_kernels


def test_strides_of_gradients_and_of_tokens():
    c = case(dtype=torch.float32, conv1d=True)
    spread = torch.zeros(63, 40)
    spread[:, ::2] = c.x
    strided = replace(c, x=spread[:, ::2])
    expanded = torch.ones(1, 1).expand(63, 21)
    got, expected = lowered(strided, expanded), lowered(c, torch.ones(63, 21))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)
        assert name in ("saved", "y") or got[name].shape == value.shape
    torch.testing.assert_close(lowered(c, torch.ones(21, 63).t())["w_in0"], expected["w_in0"])


@pytest.mark.parametrize("act", ["gelu(x0)", "silu(x0) * x1"])
def test_strides_of_biases(act):
    c = case(dtype=torch.float32, act=act, ordered=True, compensation=True)
    spread = [torch.full((50, 2), torch.nan) for _ in c.b_in]
    for s, b in zip(spread, c.b_in, strict=True):
        s[:, 0] = b
    for strided in ([s[:, 0] for s in spread], [b[:1].expand(50) for b in c.b_in]):  # every other value; one value for all
        one = c.b_out[:1].expand(21)
        got = lowered(replace(c, b_in=strided, b_out=one), torch.ones(63, 21))
        expected = lowered(replace(c, b_in=[b.clone() for b in strided], b_out=one.clone()), torch.ones(63, 21))
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


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


def test_kernels_are_asked_for_no_more_than_is_needed(monkeypatch):
    """An operand without the address of a gradient, of products or of panels gets none of them."""
    c = case(act="silu(x0) * x1", f=64, lora=True, down=True, dtype=torch.float32)
    saved = cpu_ffn.routed_ffn(*c.forward)[1]
    asked: list[torch.Tensor] = []
    describe = cpp_ffn.operands

    def operands(rows):
        asked.append(describe(rows))
        return asked[-1]

    monkeypatch.setattr(cpp_ffn, "operands", operands)
    fields = ["into", "out", "products", "grad"]
    columns = [cpp_ffn._OPERAND.index(field) for field in fields]

    def of(*needs: str) -> list[list[str]]:
        asked.clear()
        wanted = [name in needs for name in c.leaves]
        grads = cpu_ffn.routed_ffn_backward(*c.backward(torch.ones(63, c.n_out), saved, wanted))
        for name, grad, want in zip(c.leaves, grads, wanted, strict=True):
            assert want or grad.shape == (0,), name
        return [[f for f, column in zip(fields, columns, strict=True) if row[column]] for row in torch.cat(asked)]

    # Ways in: x with either projection, the branch of the first; out: the out-projection, its branch.
    assert of("x") == [["out", "products"], ["out", "products"], [], ["into"], ["into"]]
    assert of("w_out") == [[], [], [], ["grad"], []]
    assert of("w_in1") == [[], ["grad"], [], ["into"], ["into"]]
    assert of("lora_b0", "lora_down") == [[], [], ["grad"], ["into"], ["into", "grad"]]
    assert of("lora_a_out0") == [[], [], ["out", "products"], ["into"], ["into"]]
    assert of("b_in0") == [[], [], [], ["into"], ["into"]]
    again = replace(c, save=False)
    saved = cpu_ffn.routed_ffn(*again.forward)[1]
    assert of("w_out") == [["into"], ["into"], ["into"], ["grad"], []]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_runs_are_bitwise_equal(dtype, small_spans):
    c = case(n=130, e=40, f=100, dtype=dtype, gates=True, lora=True, down=True, act="silu(x0) * x1")
    grad_y = torch.randn(130, c.n_out, dtype=dtype)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        torch.set_num_threads(2)
        first = lowered(c, grad_y)
        for n_threads in (2, 2, 1, 3):
            torch.set_num_threads(n_threads if dtype != torch.float64 else 2)  # the vendor's GEMM may add in another order
            assert all(torch.equal(a, b) for a, b in zip(first.values(), lowered(c, grad_y).values(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_sees_nothing_of_the_others(dtype):
    c = case(n=200, e=64, f=200, dtype=dtype, gates=True)
    other = replace(c, x=c.x.clone())
    other.x[100:] = torch.randn(100, 64, dtype=dtype)
    other.x[150] = torch.nan
    y, changed = (cpu_ffn.routed_ffn(*k.forward)[0] for k in (c, other))
    assert torch.equal(y[:100], changed[:100])
    keep = torch.arange(100)
    scores = torch.full((100, 8), -1.0).masked_fill(reference_ffn.kept_mask(c.blocks[keep], 8), 1.0)
    blocks, rows, offsets = cpu_ffn.route(scores, torch.zeros(8, dtype=torch.bool), torch.tensor([0.5]), 0.5, 1, 0)
    half = replace(c, x=c.x[:100], gates=c.gates[:100], blocks=blocks, rows=rows, offsets=offsets)
    alone = cpu_ffn.routed_ffn(*half.forward)[0]
    if dtype == torch.float64:  # with others in the lists the vendor's GEMM may round differently
        torch.testing.assert_close(alone, y[:100])
    else:
        assert torch.equal(alone, y[:100])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_weights_of_idle_blocks_do_not_matter(dtype):
    c, spoiled = (case(idle=3, lora=True, down=True, act="silu(x0) * x1", dtype=dtype) for _ in range(2))
    units = c.permutation[3 * 7 : 4 * 7].long()
    spoiled.w_in[0][units] = torch.inf
    spoiled.w_out[:, units] = torch.nan
    spoiled.lora_down[:, units] = torch.nan
    grad_y = torch.randn(63, c.n_out, dtype=dtype)
    got, expected = lowered(spoiled, grad_y), lowered(c, grad_y)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_are_left_alone(dtype):
    c = case(act="x0", gates=True, lora=True, down=True, p=0.3, lora_p=0.2, compensation=True, dtype=dtype)
    before = {name: t.clone() for name, t in c.leaves.items() if t is not None}
    grad_y = torch.randn(63, c.n_out, dtype=dtype)
    _, saved, _ = cpu_ffn.routed_ffn(*c.forward)
    kept = saved.clone()
    first = cpu_ffn.routed_ffn_backward(*c.backward(grad_y, saved))
    again = cpu_ffn.routed_ffn_backward(*c.backward(grad_y, saved))
    assert torch.equal(saved, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(c.leaves[name], t) for name, t in before.items())
