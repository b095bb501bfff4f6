"""The routed FFN on GPUs, without one: numerics under the interpreter, compilation, what is not supported."""

from __future__ import annotations

import pytest
import torch
from interpreter import run_interpreted
from test_triton_attention import check_compiled

from spt_compiler.lowering import registry, triton_catalog, triton_common, triton_ffn

pytest.importorskip("triton")


def test_kernels_equal_the_definition_of_their_ops(tmp_path):
    run_interpreted("interpreted_ffn", tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("dtype", "config", "kernels"),
    [
        ("bf16", "ffn gated silu lora gates", ("routed_ffn_fwd_in", "routed_ffn_rows_kernel", "routed_ffn_sums_gates")),
        ("fp16", "ffn gated silu lora recomputed", ("routed_ffn_bwd",)),
        ("bf16", "ffn gelu bias", ("routed_ffn_rows", "routed_ffn_sums", "order_units")),
    ],
)
def test_kernels_compile_for_hopper_without_a_gpu(dtype, config, kernels):
    """A few; `test_the_whole_grid_compiles` has all."""
    chosen = [e for e in triton_catalog.entries("sm_90", (dtype,)) if e.config == config and e.spec.kernel.startswith(kernels)]
    assert all(any(e.spec.kernel.startswith(kernel) for e in chosen) for kernel in kernels)
    for entry in chosen:
        check_compiled(entry, "sm_90")


def ffn_arguments(dtype=torch.bfloat16, tile=64, act="gelu(x0)", act_in=(), weight=None, n_in=1, lora_down=None):
    tokens, width, hidden, n_blocks = 32, 16, 64, 4
    x, w = torch.zeros(tokens, width, dtype=dtype), torch.zeros(hidden, width, dtype=weight or dtype)
    lists = (
        torch.zeros(tokens, 2, dtype=torch.int32),
        torch.zeros(tokens * 2 + n_blocks * (tile - 1), dtype=torch.int32),
        torch.zeros(n_blocks + 1, dtype=torch.int32),
    )
    tensors = (x, [w] * n_in, [], w.t(), None, [], [], lora_down, None, *lists, torch.arange(hidden).int(), None)
    return (*tensors, act, list(act_in), None, 0.0, None, 0.0, False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"tile": 1}, "tiles of 1"),
        ({"weight": torch.float32}, "weights have dtype"),
        ({"act": "gelu(x0) * x1"}, "not a function of x0"),
        ({"act": "x0 * a0"}, "not a function of x0"),
        ({"act": "x0 * a0", "act_in": [torch.zeros(7)]}, "shape (7,)"),
        ({"act": "x0 +"}, "activation"),
        ({"lora_down": torch.zeros(2, 64)}, "weights have dtype"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(change, reason):
    refusal = triton_ffn.supports_routed_ffn(*ffn_arguments(**change))
    assert refusal is not None and reason in str(refusal)


def test_supported_arguments_are_accepted():
    assert triton_ffn.supports_routed_ffn(*ffn_arguments()) is None
    assert triton_ffn.supports_routed_ffn(*ffn_arguments(act="silu(x0) * x1", n_in=2)) is None
    assert triton_ffn.supports_routed_ffn(*ffn_arguments(act="x0 * a0", act_in=[torch.zeros(())])) is None


def test_what_the_backward_kernels_leave_to_the_reference():
    forward = ffn_arguments()
    grad = torch.zeros(32, 16, dtype=torch.bfloat16)
    arguments = [grad, None, *forward[:13], *forward[14:20], torch.zeros(1, 0, 16), [True] * 6]
    assert triton_ffn.supports_routed_ffn_backward(*arguments) is None
    assert "dtype torch.float32" in str(triton_ffn.supports_routed_ffn_backward(grad.float(), *arguments[1:]))
    arguments[15] = "x0 * a7"
    assert "not a function" in str(triton_ffn.supports_routed_ffn_backward(*arguments))


@pytest.mark.parametrize("op", ["route_v1", "routed_ffn_v1", "routed_ffn_backward_v1"])
def test_gpus_run_these_ops_by_triton_first(op):
    assert registry.chosen(op, "cuda") == "triton"


def test_dense_by_data_needs_no_more_hidden_values_than_the_sparse_capacity(monkeypatch):
    """Whether all blocks are meant is not known when kernels are launched; both cases share one buffer."""
    forward = ffn_arguments(tile=16)
    meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), list(forward))
    hidden = []

    def spy(template, structure, kernel, grid, args, constants, **tuning):
        hidden.extend(
            (kernel, tensor.shape[0], args["first_token"], args["chunk"])
            for name, tensor in args.items()
            if name in ("hidden_ptr", "grad_pre0_ptr") and kernel.startswith(("routed_ffn_fwd", "routed_ffn_bwd"))
        )

    monkeypatch.setattr(triton_ffn, "launch", spy)
    y, saved, _ = triton_ffn.routed_ffn(*meta)
    triton_ffn.routed_ffn_backward(y, None, *meta[:13], *meta[14:20], saved, [True, True, True, False, False, False])
    capacity = forward[10].shape[0]
    assert all(held <= capacity + 15 for _, held, _, _ in hidden)  # the last row tile may be a part of one
    for kernel in {kernel for kernel, _, _, _ in hidden}:
        covered = sorted({(first, first + chunk) for name, _, first, chunk in hidden if name == kernel})
        assert covered[0][0] == 0 and covered[-1][1] >= 32
        assert all(before[1] == after[0] for before, after in zip(covered, covered[1:], strict=False))


def test_factors_of_lora_are_summed_over_chunks_in_full_precision(monkeypatch):
    """In 16 bits the sums over chunks of tokens would be rounded once a chunk."""
    written = []

    def spy(template, structure, kernel, grid, args, constants, **tuning):
        if kernel == "routed_ffn_sums_weights_kernel":
            written.append((min(args["out_ptr"].shape), args["out_ptr"].dtype, args["first_token"] > 0))

    monkeypatch.setattr(triton_ffn, "launch", spy)
    triton_catalog._ffn("gated silu lora gates", torch.bfloat16)
    assert (16, torch.float32, True) in written and {dtype for width, dtype, _ in written if width == 16} == {torch.float32}
    written.clear()
    triton_catalog._ffn("gated silu", torch.bfloat16)
    assert {(width, dtype) for width, dtype, _ in written} == {(2048, torch.bfloat16)}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_autotuning_may_choose_compiles_as_well(monkeypatch):
    """Settings other than the safe one, of the kernel without an epilogue."""
    original = triton_common.launch

    def take(*args, alternatives=(), num_warps=4, num_stages=2, **rest):
        for setting in alternatives() if args[2] == "routed_ffn_rows_kernel" else ():
            constants = {**args[5], **dict(setting.constants)}
            original(*args[:5], constants, num_warps=setting.num_warps, num_stages=setting.num_stages)

    monkeypatch.setattr(triton_ffn, "launch", take)
    with triton_common.recording("sm_90") as specs:
        triton_catalog._ffn("gelu bias", torch.bfloat16)
    forward = specs[: len(specs) // 2]
    assert {dict(spec.constants)["BLOCK_N"] for spec in forward} == {128, 256}
    for spec in forward:
        compiled = triton_common.compile_kernel(spec, "sm_90")
        assert compiled.error is None and compiled.tensor_core and compiled.spills == 0


@pytest.mark.parametrize(("target", "block_n"), [("sm_80", 128), ("sm_90", 256), ("sm_100", 256), ("gfx942", 128)])
def test_products_of_warp_groups_have_wide_tiles(target, block_n):
    with triton_common.recording(target) as specs:
        triton_catalog._ffn("gelu bias", torch.bfloat16)
    chosen = {spec.kernel: dict(spec.constants) for spec in specs if spec.kernel.startswith("routed_ffn")}
    assert chosen["routed_ffn_rows_kernel"]["BLOCK_N"] == chosen["routed_ffn_fwd_in_kernel"]["BLOCK_N"] == block_n
    # On Hopper two programs that share a multiprocessor were faster where the products are short, or much follows them.
    assert chosen["routed_ffn_sums_weights_kernel"]["BLOCK_N"] == (128 if target == "sm_90" else block_n)
    # Sizes of the catalog are powers of two: no masks anywhere.
    assert chosen["routed_ffn_rows_kernel"]["WIDTH_FACTOR"] == chosen["routed_ffn_rows_kernel"]["OUT_FACTOR"] == 256


def test_a_tile_that_would_be_mostly_empty_is_not_chosen():
    x = torch.empty(64, 32, dtype=torch.bfloat16, device="meta")
    blocks, offsets = (torch.empty(n, dtype=torch.int32, device="meta") for n in ((64, 4), (9,)))
    rows, units = (torch.empty(n, dtype=torch.int32, device="meta") for n in (64 * 4 + 8 * 127, 8 * 1376))
    with triton_common.recording("sm_90"):
        g = triton_ffn._Geometry(x, blocks, rows, offsets, units)
        assert [g.products(1, columns=n)[0]["BLOCK_N"] for n in (4096, 1376, 1100, 100, 7)] == [256, 256, 128, 128, 16]
        assert g.width_factor == 32
        uneven = triton_ffn._Geometry(x, blocks, rows, offsets, units[:-1])
        assert uneven.width == 1376 and uneven.width_factor == 0


def test_a_launch_that_adds_to_its_result_is_never_measured(monkeypatch):
    """Measuring runs a kernel many times."""
    seen = []

    def spy(template, structure, kernel, grid, args, constants, *, alternatives=(), **tuning):
        seen.append((kernel, args.get("first_token", 0), bool(alternatives() if callable(alternatives) else alternatives)))

    monkeypatch.setattr(triton_ffn, "launch", spy)
    triton_catalog._ffn("gated silu", torch.bfloat16)
    tuned = {(kernel, first) for kernel, first, choice in seen if choice}
    assert {kernel for kernel, _ in tuned} == {
        "routed_ffn_fwd_in_kernel", "routed_ffn_rows_kernel", "routed_ffn_sums_weights_kernel", "routed_ffn_bwd_kernel_hidden"
    }  # fmt: skip
    assert {first for _, first in tuned} == {0} and any(first > 0 for _, first, _ in seen)


def test_a_recorded_launch_has_the_types_and_alignment_that_the_jit_would_choose():
    with triton_common.recording() as specs:
        triton_ffn.route(torch.empty(100, 8, device="meta"), torch.empty(8, dtype=torch.bool, device="meta"),
                         torch.empty(1, device="meta"), 0.5, 64, 0)  # fmt: skip
    assert [spec.kernel for spec in specs] == ["route_top_kernel", "route_rows_kernel"]
    signature = dict(specs[0].signature)
    assert signature["scores_ptr"] == "*fp32" and signature["always_on_ptr"] == "*u8" and signature["n_tokens"] == "i32"
    assert signature["scores_stride_g"] == "constexpr" and dict(specs[0].constants)["scores_stride_g"] == 1
    assert "scores_ptr" in specs[0].divisible and "n_tokens" not in specs[0].divisible
