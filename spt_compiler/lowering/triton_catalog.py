"""A representative grid of kernels for ahead-of-time compilation: what `spt kernels` reports and the tests check.

Each entry calls an op's lowering with meta tensors under `recording()`, so that the kernels listed are those that
training would launch, with the same constants, types and alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spt_compiler.lowering import triton_attention, triton_ffn, triton_selection
from spt_compiler.lowering.triton_common import KernelSpec, recording

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """One kernel of the grid.

    Args: config: what it was generated for, in words.  dtype: of the tensors.  spec: the kernel.
        tensor_core: whether it multiplies matrices, which should run on tensor cores.
    """

    config: str
    dtype: str
    spec: KernelSpec
    tensor_core: bool


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_B, _H, _HKV, _T = 2, 8, 2, 4096
_TILE_Q, _TILE_K = 64, 16

@dataclass(frozen=True)
class _Attention:
    """An attention site of the grid.

    Args: dim, value_dim: head dimensions.  expr: mask expression ("t0[b, k]" is a padding mask).  bias: a float mask.  p:
        dropout.  compensate: pseudo-keys for dropped tiles.
    """

    dim: int
    value_dim: int
    expr: str = ""
    bias: bool = False
    p: float = 0.0
    softcap: float | None = None
    empty: str = "zero"
    compensate: bool = False


_TILES = {
    "d64 causal": _Attention(64, 64, "k <= q"),
    "d128 causal": _Attention(128, 128, "k <= q"),
    "d16 padded": _Attention(16, 16, "t0[b, k]"),
    "d64 padded dropout": _Attention(64, 64, "(k <= q) & t0[b, k]", p=0.1, empty="nan"),
    "d128 bias softcap": _Attention(128, 128, bias=True, softcap=30.0, empty="uniform"),
    "d80 dv96 no mask": _Attention(80, 96),
    "d64 causal pseudo-keys": _Attention(64, 64, "k <= q", compensate=True),
    "d128 padded pseudo-keys": _Attention(128, 128, "(k <= q) & t0[b, k]", compensate=True),
    "d160 causal": _Attention(160, 160, "k <= q"),
    "d256 causal": _Attention(256, 256, "k <= q"),
}
_KEYS = ("d64 causal", "d64 padded dropout", "d128 causal")
# In float32, which few train in and which takes the compiler longest, a part of the grid.
_FULL_PRECISION = ("d64 causal", "d64 padded dropout", "d128 bias softcap", "d80 dv96 no mask", "d256 causal")


@dataclass(frozen=True)
class _FFN:
    """A site: the activation, whether weights train or LoRA of some rank does, and what else there is.

    Args: save: whether pre-activations are kept for backward (else it computes them again).  conv1d: weights [E, F].
        p, lora_p: dropout of hidden units, and of those that LoRA on the out-projection reads.
    """

    act: str
    rank: int = 0
    gates: bool = False
    bias: bool = False
    p: float = 0.0
    save: bool = True
    conv1d: bool = False
    lora_p: float = 0.0


_FFN_SITES = {
    "gelu bias": _FFN("gelu(x0)", bias=True),
    "gated silu": _FFN("silu(x0) * x1"),
    "gated silu lora gates": _FFN("silu(x0) * x1", rank=16, gates=True, lora_p=0.1),
    "gated silu lora recomputed": _FFN("silu(x0) * x1", rank=16, save=False),
    "gelu_tanh lora dropout conv1d": _FFN("gelu_tanh(x0)", rank=16, bias=True, p=0.1, conv1d=True, lora_p=0.1),
}


def _attention(name: str, dtype: torch.dtype, granularity: str) -> None:
    site = _TILES[name]
    q, k = _meta(_B, _H, _T, site.dim, dtype=dtype), _meta(_B, _HKV, _T, site.dim, dtype=dtype)
    v = _meta(_B, _HKV, _T, site.value_dim, dtype=dtype)
    bias = _meta(_B, 1, _T, _T, dtype=dtype) if site.bias else None
    expr_in = [_meta(_B, _T, dtype=torch.bool)] if "t0" in site.expr else []
    seed = _meta(1, dtype=torch.int64) if site.p else None
    scale, p, softcap = site.dim**-0.5, site.p, site.softcap
    wide = 2 if granularity == "tile" else 8  # subspaces of the presets
    codebook, mean = _meta(_HKV, site.dim // wide, 16, wide, dtype=torch.float32), _meta(_HKV, site.dim, dtype=torch.float32)
    budget = _meta(1, dtype=torch.float32)
    masked = (site.expr, expr_in, seed, p, scale, softcap, site.empty)
    chosen_by = (q, k, bias, site.expr, expr_in, codebook, mean, budget, 0.125)
    needs = [True, True, True, bias is not None]
    if granularity == "tile":
        tiles, counts = triton_selection.select_tiles(*chosen_by, _TILE_Q, _TILE_K, scale, softcap, "pq", 0)
        lists = (tiles, counts, *masked, _TILE_Q, _TILE_K)
        out, lse = triton_attention.tile_attention(q, k, v, bias, *lists, site.compensate)
        triton_attention.tile_attention_backward(out, q, k, v, bias, out, lse, *lists, needs, site.compensate)
    else:
        for rule in ("pq", "pq-match"):
            keys, counts = triton_selection.select_keys(*chosen_by, scale, softcap, rule, 0)
        out, lse = triton_attention.key_attention(q, k, v, bias, keys, counts, *masked)
        triton_attention.key_attention_backward(out, q, k, v, bias, out, lse, keys, counts, *masked, needs)


def _ffn(name: str, dtype: torch.dtype) -> None:
    site = _FFN_SITES[name]
    tokens, width, hidden, n_blocks, tile = 8192, 2048, 8192, 8, 128
    n_in = 2 if "x1" in site.act else 1
    lists = triton_ffn.route(
        _meta(tokens, n_blocks, dtype=torch.float32),
        _meta(n_blocks, dtype=torch.bool),
        _meta(1, dtype=torch.float32),
        0.5,
        tile,
        0,
    )
    x = _meta(tokens, width, dtype=dtype)
    w_in, w_out = _meta(hidden, width, dtype=dtype), _meta(width, hidden, dtype=dtype)
    if site.conv1d:
        w_in, w_out = _meta(width, hidden, dtype=dtype).t(), _meta(hidden, width, dtype=dtype).t()
    n_bias, n_lora = n_in if site.bias else 0, n_in if site.rank else 0
    tensors: list[Any] = [
        x,
        [w_in] * n_in,
        [_meta(hidden, dtype=dtype)] * n_bias,
        w_out,
        _meta(width, dtype=dtype) if site.bias else None,
        [_meta(tokens, site.rank, dtype=dtype)] * n_lora,
        [_meta(hidden, site.rank, dtype=dtype)] * n_lora,
        _meta(site.rank, hidden, dtype=dtype) if site.rank else None,
        _meta(tokens, n_blocks, dtype=torch.float32) if site.gates else None,
        *lists,
        _meta(hidden, dtype=torch.int32),
    ]
    seeds = [_meta(1, dtype=torch.int64) if p else None for p in (site.p, site.lora_p)]
    activation: list[Any] = [site.act, [], seeds[0], site.p, seeds[1], site.lora_p]
    compensation = _meta(n_blocks, width, dtype=torch.float32)
    y, saved, low = triton_ffn.routed_ffn(*[*tensors, compensation, *activation, site.save])
    # Under LoRA the weights are frozen.
    full = site.rank == 0
    trained = [True, *[full] * (n_in + n_bias), full, full and site.bias, *[True] * (2 * n_lora), bool(site.rank), site.gates]
    grad_low = low if site.rank else None
    triton_ffn.routed_ffn_backward(*[y, grad_low, *tensors, *activation, saved, trained])


# Kernels that gather single rows or count; the others multiply matrices.
_NO_MATRIX = (
    "pq_assign_kernel",
    "pool_tiles_kernel",
    "select_tiles_top_kernel",
    "select_keys_top_kernel",
    "route_top_kernel",
    "transpose_lists_mark_kernel",
    "transpose_lists_offsets_kernel",
    "transpose_lists_fill_kernel",
    "tile_attention_bwd_kernel_combine",
    "tile_attention_bwd_kernel_sum",
    "route_rows_kernel",
    "routed_ffn_rows_combine_kernel",
    "routed_ffn_sums_columns_kernel",
    "routed_ffn_sums_gates_kernel",
    "order_units_invert_kernel",
    "order_units_move_kernel",
)


def entries(target: str, dtypes: tuple[str, ...] = ("fp16", "bf16", "fp32")) -> Iterator[Entry]:
    """The grid; a kernel that several configurations share is listed once.

    Args: target: of `triton_common.TARGETS`.  dtypes: of `DTYPES`.
    """
    seen: set[KernelSpec] = set()

    def listed(config: str, dtype: str, call: Callable[[], None]) -> Iterator[Entry]:
        with recording(target) as specs:
            call()
        for spec in specs:
            if spec not in seen:
                seen.add(spec)
                multiplies = spec.kernel not in _NO_MATRIX and not _matches_codes(spec)
                yield Entry(config, dtype, spec, multiplies)

    for dtype in dtypes:
        for name in _FULL_PRECISION if dtype == "fp32" else _TILES:
            yield from listed(f"tile {name}", dtype, lambda n=name, d=dtype: _attention(n, DTYPES[d], "tile"))
        for name in _KEYS[:1] if dtype == "fp32" else _KEYS:
            yield from listed(f"token {name}", dtype, lambda n=name, d=dtype: _attention(n, DTYPES[d], "token"))
        for name in _FFN_SITES:
            yield from listed(f"ffn {name}", dtype, lambda n=name, d=dtype: _ffn(n, DTYPES[d]))


def _matches_codes(spec: KernelSpec) -> bool:
    """Whether the kernel scores keys by equal codes, without a product."""
    return any(name == "q_codes_ptr" for name, _ in spec.signature)
