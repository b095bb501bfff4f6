"""Attention on GPUs, without one: numerics under the interpreter, ahead-of-time compilation, what is not supported."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from interpreter import run_interpreted

from spt_compiler.cli.kernels import report
from spt_compiler.lowering import registry, render, triton_attention, triton_catalog, triton_common, triton_selection

triton = pytest.importorskip("triton")

OPS = (
    "select_tiles_v1",
    "select_keys_v1",
    "tile_attention_v1",
    "tile_attention_backward_v1",
    "key_attention_v1",
    "key_attention_backward_v1",
)


def test_kernels_equal_the_definition_of_their_ops(tmp_path):
    run_interpreted("interpreted_attention", tmp_path)


@pytest.mark.slow
def test_more_kernels_equal_the_definition_of_their_ops(tmp_path):
    run_interpreted("interpreted_attention", tmp_path, "-m", "slow")


def check_compiled(entry: triton_catalog.Entry, target: str) -> None:
    check_row(entry, target, dataclasses.asdict(triton_common.compile_kernel(entry.spec, target)))


def check_row(entry: triton_catalog.Entry, target: str, row: dict) -> None:
    """No error (one is: more shared memory than the chip has), tensor cores where matrices are multiplied, and no spills
    in 16 bits up to a head dimension of 128."""
    what = f"{entry.spec.kernel} for {entry.config} in {entry.dtype} on {target}: {row}"
    assert row["error"] is None, what
    assert row["shared_bytes"] <= triton_common.SHARED_LIMIT[target], what
    assert row["tensor_core"] or not entry.tensor_core, what
    if entry.dtype != "fp32" and not entry.config.startswith(("tile d160", "tile d256")):
        # Two products of all heads of a group, and four lanes of two sums, fill the registers; a few addresses wait on the
        # stack, outside of the loops.
        assert row["spills"] <= (32 if entry.spec.kernel.endswith(("_pairs", "_sum")) else 0), what


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("dtype", "config", "kernel"),
    [
        ("bf16", "tile d128 causal", "tile_attention"),
        ("fp16", "tile d64 padded dropout", "tile_attention_fwd"),
        ("fp16", "tile d64 padded dropout", "select_tiles_scores"),
        ("bf16", "token d64 causal", "tile_attention"),
    ],
)
def test_kernels_compile_for_hopper_without_a_gpu(dtype, config, kernel):
    chosen = [e for e in triton_catalog.entries("sm_90", (dtype,)) if e.config == config and kernel in e.spec.kernel]
    assert chosen
    for entry in chosen:
        check_compiled(entry, "sm_90")


@pytest.mark.parametrize("granularity", ["tile", "token"])
def test_launches_name_the_parameters_of_their_kernels_and_no_others(monkeypatch, granularity):
    """A GPU refuses an unknown one, the interpreter does not."""
    launch = triton_common.launch

    def strict(template, structure, kernel, grid, args, constants, **tuning):
        names = getattr(render.load(template, structure), kernel).arg_names
        assert sorted(names) == sorted([*args, *constants]), kernel
        launch(template, structure, kernel, grid, args, constants, **tuning)

    for module in (triton_attention, triton_selection):
        monkeypatch.setattr(module, "launch", strict)
    sites = triton_catalog._TILES if granularity == "tile" else triton_catalog._KEYS
    for target in ("sm_80", "sm_90"):
        with triton_common.recording(target) as specs:
            for name in sites:
                triton_catalog._attention(name, torch.bfloat16, granularity)
        assert any(spec.kernel == "tile_attention_bwd_kernel_dkdv" for spec in specs)


@pytest.mark.parametrize("expr", ["", "k <= q"])
def test_selection_compiles_for_a_single_key(expr):
    """Triton makes a constant of an argument that is one, and constants have no methods."""
    x, budget = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="meta"), torch.empty(1, device="meta")
    with triton_common.recording() as specs:
        triton_selection.select_tiles(x, x, None, expr, [], None, None, budget, 0.5, 64, 16, 0.1, None, "mean", 0)
    assert [triton_common.compile_kernel(spec, "sm_90").error for spec in specs] == [None] * 3


@pytest.mark.parametrize("dim, offset", [(40, 0), (64, 8), (64, 1)])
def test_rows_that_begin_anywhere_are_copied_to_where_kernels_read_whole_lines(dim, offset):
    """Heads 40 values apart, and slices of wider rows; a first value at an odd address is for `-m gpu`."""

    def heads(n):
        return torch.empty(2, 200, n, dim + offset, dtype=torch.bfloat16, device="meta").transpose(1, 2)[..., offset:]

    q, k, v, out, grad = heads(4), heads(2), heads(2), heads(4), heads(4)
    lse = torch.empty(2, 4, 200, device="meta")
    tiles = torch.empty(2, 2, 4, 5, dtype=torch.int32, device="meta")
    counts = torch.empty(2, 2, 4, dtype=torch.int32, device="meta")
    rest = (tiles, counts, "k <= q", [], None, 0.0, 0.1, None, "zero", 64, 16)
    with triton_common.recording() as specs:
        triton_attention.tile_attention(q, k, v, None, *rest)
        triton_attention.tile_attention_backward(grad, q, k, v, None, out, lse, *rest, [True, True, True, False])
    strides = [
        (spec.kernel, name, name in spec.divisible)
        for spec in specs
        for name, _ in spec.signature
        if re.fullmatch("(q|k|v|out|dout)_stride_[bht]", name)
        and not (name.startswith("out") and "fwd" in spec.kernel)  # what it writes
    ]
    assert len(strides) > 40 and all(divisible for *_, divisible in strides), strides


@pytest.mark.grid
@pytest.mark.parametrize("dtype", triton_catalog.DTYPES)
@pytest.mark.parametrize("target", triton_common.TARGETS)
def test_the_whole_grid_compiles(target, dtype):
    rows, entries = report(target, (dtype,), jobs=2), triton_catalog.entries(target, (dtype,))
    for row, entry in zip(rows, entries, strict=True):
        assert (row["kernel"], row["config"]) == (entry.spec.kernel, entry.config)
        check_row(entry, target, row)


def attention_arguments(dtype=torch.bfloat16, dim=64, tile_k=16, bias=None, expr="", expr_in=()):
    q, k = torch.empty(1, 4, 64, dim, dtype=dtype), torch.empty(1, 2, 64, dim, dtype=dtype)
    tiles, counts = torch.zeros(1, 2, 1, 4, dtype=torch.int32), torch.zeros(1, 2, 1, dtype=torch.int32)
    return (q, k, k, bias, tiles, counts, expr, list(expr_in), None, 0.0, 0.1, None, "zero", 64, tile_k)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"dim": 320}, "head dimension 320"),
        ({"tile_k": 24}, "tile_k 24"),
        ({"bias": torch.zeros(1, 1, 1, 64, dtype=torch.float64)}, "mask has dtype"),
        ({"expr": "t0[b, k]"}, "t0"),
        ({"expr": "t0[b, k]", "expr_in": [torch.zeros(3)]}, "rank 1"),
        ({"expr": "t0[k]", "expr_in": [torch.zeros(3, dtype=torch.complex64)]}, "complex64"),
        ({"expr": "x0 > 1"}, "x0"),
        ({"expr": "(k <= q); import os"}, "mask expression"),
        ({"expr": "__import__('os').system('true')"}, "mask expression"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(change, reason):
    refusal = triton_attention.supports_tile_attention(*attention_arguments(**change))
    assert refusal is not None and reason in str(refusal)


def test_supported_arguments_are_accepted(monkeypatch):
    assert triton_attention.supports_tile_attention(*attention_arguments()) is None
    monkeypatch.setattr(triton_selection, "available", lambda: False)
    assert "triton" in str(triton_attention.supports_tile_attention(*attention_arguments()))


def test_gradients_of_masks_have_kernels_and_other_dtypes_of_gradients_have_not():
    q, k, v, _, tiles, counts, *rest = attention_arguments()
    bias = torch.zeros(1, 1, 64, 64, dtype=q.dtype)
    arguments = [q, q, k, v, bias, q, q, tiles, counts, *rest, [True] * 4]
    assert triton_attention.supports_tile_attention_backward(*arguments) is None
    arguments[0] = q.float()
    assert "gradient has dtype" in str(triton_attention.supports_tile_attention_backward(*arguments))


@pytest.mark.parametrize("op", OPS)
def test_gpus_run_these_ops_by_triton_first(op):
    assert registry.chosen(op, "cuda") == "triton"


@pytest.mark.parametrize("granularity", ["tile", "token"])
def test_lowerings_never_wait_for_the_device(granularity):
    """Tensors without data: reading one, or asking for a shape that depends on data, would raise. So CUDA graphs capture."""
    q, k = (torch.empty(2, heads, 300, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    bias, padding = (torch.empty(2, n, 300, 300, dtype=torch.bfloat16, device="meta") for n in (1, 1))
    codebook, budget = torch.empty(2, 8, 16, 8, device="meta"), torch.empty(1, device="meta")
    masked = ("(k <= q) & t0[b, k]", [padding[:, 0, 0] > 0], torch.empty(1, dtype=torch.int64, device="meta"), 0.1, 0.1, 3.0)
    chosen_by = (q, k, bias, *masked[:2], codebook, None, budget, 0.125)
    with triton_common.recording() as specs:
        if granularity == "tile":
            lists = triton_selection.select_tiles(*chosen_by, 64, 16, *masked[4:], "pq", 0)
            rest = (*lists, *masked, "uniform", 64, 16)
            out, lse = triton_attention.tile_attention(q, k, k, bias, *rest, True)
            grads = triton_attention.tile_attention_backward(out, q, k, k, bias, out, lse, *rest, [True] * 4, True)
        else:
            lists = triton_selection.select_keys(*chosen_by, *masked[4:], "pq", 0)
            rest = (*lists, *masked, "nan")
            out, lse = triton_attention.key_attention(q, k, k, bias, *rest)
            grads = triton_attention.key_attention_backward(out, q, k, k, bias, out, lse, *rest, [True] * 4)
    assert {x.kernel.rpartition("_")[2] for x in specs} >= {"dq", "dkdv", "dbias"}
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, k, bias)]


def test_launches_hold_nothing_per_pair_of_query_and_key(monkeypatch):
    """The largest tensor a tile selection and attention hand to a kernel is the inputs', not [Tq, Tk]."""
    sizes = {}

    def spy(template, structure, kernel, grid, args, constants, **tuning):
        sizes[kernel] = max(value.numel() for value in args.values() if isinstance(value, torch.Tensor))

    for module in (triton_attention, triton_selection):
        monkeypatch.setattr(module, "launch", spy)
    n = 1 << 15
    q, k = (torch.empty(1, 1, n, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    budget = torch.empty(1, device="meta")
    mask, rule = (None, "k <= q", []), ("mean", 0)
    lists = triton_selection.select_tiles(q, k, *mask, None, None, budget, 0.125, 64, 16, 0.1, None, *rule)
    rest = (*lists, "k <= q", [], None, 0.0, 0.1, None, "zero", 64, 16)
    out, lse = triton_attention.tile_attention(q, k, k, None, *rest, True)
    triton_attention.tile_attention_backward(out, q, k, k, None, out, lse, *rest, [True, True, True, False], True)
    assert {"tile_attention_fwd_kernel", "tile_attention_bwd_kernel_combine", "select_tiles_scores_kernel"} <= sizes.keys()
    assert max(sizes.values()) <= n * n // (64 * 16) * 2, sizes
