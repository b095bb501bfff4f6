"""The C++ lowering of the routed FFN against the reference, with torch's micro-kernels and with plain loops in their place."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from ffn_cases import ACTIVATIONS, MADE_UP, Case, case, defined, gradients, lowered, plain, rms

from spt_compiler.lowering import cpp, cpp_ffn, cpu_ffn
from spt_compiler.ops import reference_ffn


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
    assert cpp_ffn.kernels_for(c.act, len(c.w_in), len(c.act_in), dtype) is not None
    needs = [t is not None and not name.startswith("act_in") for name, t in c.leaves.items()]
    got, expected = lowered(cpp_ffn, narrow, grad_y, needs), defined(wide, grad_y.double())
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for (name, value), need in zip(expected.items(), [True, True, *needs], strict=True):
        if not need:
            continue
        scale = value.abs().max().item() if value.numel() else 1.0
        error = (got[name].double() - value).abs().max().item() if value.numel() else 0.0
        assert error <= tolerance * max(scale, 1e-3), f"{name}: {error} of {scale}"
        assert name in ("y", "saved") or got[name].stride() == narrow.leaves[name].stride(), name


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_equals_reference(act, micro_kernels, nan_empty):
    for bias, conv1d, ordered in itertools.product((False, True), repeat=3):
        check_kernels(case(act=act, f=100 if ordered else 51, bias=bias, conv1d=conv1d, ordered=ordered, compensation=bias))


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("budget,max_density", [(0.5, 0.5), (0.25, 0.5), (1.0, 1.0), (-1.0, 0.5)])
@pytest.mark.parametrize("small", [False, True])
def test_equals_reference_with_every_option(tile, budget, max_density, small, micro_kernels, nan_empty, request):
    if small:
        request.getfixturevalue("small_pieces")
    lists = {"budget": budget, "max_density": max_density, "tile": tile, "compensation": True}
    some = ((1, 1, 0.3, 0.2, 1), (1, 0, 0.0, 0.0, 0), (0, 1, 0.0, 0.2, 1), (1, 0, 0.3, 1.0, 0), (0, 1, 1.0, 0.0, 0))
    for lora, gates, p, lora_p, save in some:
        options = {"lora": bool(lora), "down": True, "gates": bool(gates), "p": p, "lora_p": lora_p, "save": bool(save)}
        check_kernels(case(act="silu(x0) * x1", idle=3, **options, **lists))
        check_kernels(case(act=MADE_UP + " + a1 * x1", always=7, ordered=True, conv1d=True, **options, **lists))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ["gelu(x0)", "silu(x0) * x1"])
def test_several_tiles_strips_and_panels(act, dtype, micro_kernels, nan_empty):
    """More rows than a strip, more units and columns than a panel, a contracted dim longer than one product takes."""
    c = case(n=700, e=1100, f=3 * 201, g=3, e_out=133, act=act, budget=0.7, max_density=0.7, lora=True, down=True)
    check_kernels(c.map(lambda t: t / t.shape[-1] ** 0.5 if t.dim() == 2 and t.shape[0] != 700 else t), dtype)


@pytest.mark.parametrize("kind", [{"f": 9}, {"f": 8}, {"f": 1, "g": 1}, {"f": 60, "g": 20}, {"n": 0}, {"n": 1}])
def test_odd_numbers(kind, micro_kernels, nan_empty):
    check_kernels(case(gates=True, compensation=True, lora=True, down=True, lora_p=0.1, act="silu(x0) * x1", **kind))
    check_kernels(case(budget=-1.0, p=0.3, **kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", [{}, {"budget": -1.0, "down": True}, {"act": "silu(x0) * x1", "gates": True, "lora": True, "down": True}]
)
def test_error_is_within_twice_that_of_plain_operators(dtype, kind, small_pieces):
    c = case(n=200, e=64, f=200, e_out=64, dtype=torch.float64, compensation=True, **kind)
    c = c.map(lambda t: t / t.shape[-1] ** 0.5 if t.dim() == 2 and t.shape[0] == 200 and t is not c.x else t).to(dtype)
    grad_y = torch.randn(200, c.n_out, dtype=dtype)
    exact = gradients(plain, c.to(torch.float64), grad_y.double())
    eager, got = gradients(plain, c, grad_y), lowered(cpp_ffn, c, grad_y)
    for name, value in exact.items():
        assert got[name].dtype == dtype
        scale = rms(value) + 1e-30
        ours, theirs = rms(got[name].double() - value) / scale, rms(eager[name].double() - value) / scale
        assert ours < 2 * theirs + 1e-6, f"{name}: {ours} against {theirs} of plain operators"


@pytest.mark.parametrize(
    "kind", [{"tile": 1}, {"tile": 4, "always": 7, "idle": 3}, {"budget": 0.25}, {"f": 9}, {"n": 1}, {"g": 20, "f": 60}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_chunks_of_tokens_equal_reference(kind, dtype, small_pieces):
    c = case(act="silu(x0) * x1", lora=True, down=True, gates=True, compensation=True, **kind)
    lists = cpp_ffn._Lists(c.x, c.blocks, c.rows, c.offsets, c.permutation)
    assert kind == {"n": 1} or len(lists.chunks) > 1
    check_kernels(c, dtype)


def test_products_without_onednn(monkeypatch):
    """It may be switched off, or held to an older processor: the micro-kernels then refuse, or are wrong."""
    c = case(dtype=torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not cpp_ffn.kernels_for(c.act, 1, 0, torch.float32).micro_kernels
        check_kernels(c)
    # `release` in place of brgemm multiplies nothing.
    real = cpp_ffn._micro_kernels(torch.float32)
    if real:
        monkeypatch.setattr(cpp_ffn, "_micro_kernels", lambda dtype: {"brgemm": real["release"], "release": real["release"]})
        kernels = cpp_ffn.kernels_for("relu(x0) + 1", 1, 0, torch.float32)
        assert not kernels.micro_kernels


def test_strides_of_gradients_and_of_tokens():
    c = case(dtype=torch.float32, conv1d=True)
    spread = torch.zeros(63, 40)
    spread[:, ::2] = c.x
    strided = replace(c, x=spread[:, ::2])
    expanded = torch.ones(1, 1).expand(63, 21)
    got, expected = lowered(cpp_ffn, strided, expanded), lowered(cpp_ffn, c, torch.ones(63, 21))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)
        assert name in ("saved", "y") or got[name].shape == value.shape
    torch.testing.assert_close(lowered(cpp_ffn, c, torch.ones(21, 63).t())["w_in0"], expected["w_in0"])


@pytest.mark.parametrize("act", ["gelu(x0)", "silu(x0) * x1"])
def test_strides_of_biases(act):
    c = case(dtype=torch.float32, act=act, ordered=True, compensation=True)
    spread = [torch.full((50, 2), torch.nan) for _ in c.b_in]
    for s, b in zip(spread, c.b_in, strict=True):
        s[:, 0] = b
    for strided in ([s[:, 0] for s in spread], [b[:1].expand(50) for b in c.b_in]):  # every other value; one value for all
        one = c.b_out[:1].expand(21)
        got = lowered(cpp_ffn, replace(c, b_in=strided, b_out=one), torch.ones(63, 21))
        expected = lowered(cpp_ffn, replace(c, b_in=[b.clone() for b in strided], b_out=one.clone()), torch.ones(63, 21))
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


def test_kernels_are_asked_for_no_more_than_is_needed(monkeypatch):
    """An operand without the address of a gradient, of products or of panels gets none of them."""
    c = case(act="silu(x0) * x1", f=64, lora=True, down=True, dtype=torch.float32)
    saved = cpp_ffn.routed_ffn(*c.forward)[1]
    asked: list[torch.Tensor] = []
    describe = cpp_ffn._operands

    def operands(rows):
        asked.append(describe(rows))
        return asked[-1]

    monkeypatch.setattr(cpp_ffn, "_operands", operands)
    fields = ["into", "out", "products", "grad"]
    columns = [cpp_ffn._OPERAND.index(field) for field in fields]

    def of(*needs: str) -> list[list[str]]:
        asked.clear()
        wanted = [name in needs for name in c.leaves]
        grads = cpp_ffn.routed_ffn_backward(*c.backward(torch.ones(63, c.n_out), saved, wanted))
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
    saved = cpp_ffn.routed_ffn(*again.forward)[1]
    assert of("w_out") == [["into"], ["into"], ["into"], ["grad"], []]


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
            for got, expected in zip(cpp_ffn.route(*arguments), reference_ffn.route(*arguments), strict=True):
                assert got.dtype == expected.dtype and torch.equal(got, expected), (arguments, got, expected)


def test_what_the_kernels_take():
    c = case(act="square(relu(x0)) * a0 + a1 * x1", lora=True)
    grad_y, saved = torch.zeros(63, c.n_out), torch.zeros(2, 0, 7)
    weights = [t is not None and not name.startswith("act_in") for name, t in c.leaves.items()]
    for dtype, fits in ((torch.float32, True), (torch.bfloat16, True), (torch.float16, True), (torch.float64, False)):
        typed = c.to(dtype)
        assert cpp_ffn._fits(*typed.forward) == fits
        assert cpp_ffn._backward_fits(*typed.backward(grad_y, saved, weights)) == fits
    everything = [t is not None for t in c.leaves.values()]
    assert not cpp_ffn._backward_fits(*c.to(torch.float32).backward(grad_y, saved, everything))


def test_a_library_that_cannot_be_compiled_leaves_the_call_to_aten(monkeypatch):
    def library(*args):
        raise cpp.SPTError("refused", stage="lower")

    monkeypatch.setattr(cpp, "library", library)
    monkeypatch.setattr(cpp, "_problem", None)
    c = case(dtype=torch.float32, lora=True, down=True)
    grad_y = torch.randn(63, c.n_out)
    with pytest.warns(UserWarning, match="refused"):
        got = lowered(cpp_ffn, c, grad_y)
    expected = lowered(cpu_ffn, c, grad_y)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    arguments = (torch.randn(33, 8), torch.zeros(8, dtype=torch.bool), torch.tensor([0.5]), 0.5, 4, 0)
    assert all(map(torch.equal, cpp_ffn.route(*arguments), reference_ffn.route(*arguments)))
