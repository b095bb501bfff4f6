"""Matrix products, on a CPU by the vendor library that is the faster one on this processor.

ATen multiplies fp32 matrices by MKL, which keeps its AVX-512 kernels for Intel's processors. On others oneDNN, which ATen
takes for 16-bit matrices alone, is faster (one thread of an EPYC with AVX-512, 512 x 768 x 384: 224 GF/s against 104; held to
AVX2: 124 against 100). It is reached through the operator into which Inductor lowers linear layers. That operator falls to
plain loops, a thousand times slower, where its second operand is neither contiguous nor a transposed contiguous matrix.
"""

from __future__ import annotations

import functools
import itertools
import platform
from pathlib import Path

import torch
from torch import Tensor

# Below these MKL's smaller overhead wins: of any side, and of all three multiplied.
_MIN_SIDE = 32
_MIN_VOLUME = 1 << 21
# Pieces that a dim is cut into, see `_pieces`.
_PIECE, _STEP = 512, 128


@functools.lru_cache(maxsize=1)
def cpu_info() -> str:
    """What the system says about the processor; "" where it has no /proc."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()


@functools.lru_cache(maxsize=1)
def _onednn_is_faster() -> bool:
    foreign = platform.machine().lower() in ("x86_64", "amd64") and "GenuineIntel" not in cpu_info()
    return foreign and torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def computes_in(tensor: Tensor) -> torch.dtype:
    """The dtype in which products of statistics with this weight are fastest: its own where it has 16 bits that the device
    multiplies natively, else fp32."""
    if tensor.device.type == "cpu":
        native = tensor.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    else:
        native = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.dtype if native else torch.float32


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [K, N], new, of one dtype; on any device."""
    if left.device.type != "cpu" or not _takes(left, right):
        return torch.mm(left, right)
    out = left.new_empty(left.shape[0], right.shape[1])
    if right.is_contiguous():  # K is the number of rows that statistics are of, which differs from call to call
        for part in _pieces(left.shape[1]):
            a, b, further = left[:, part], right[part], part.start > 0
            if part.stop - part.start < _STEP:
                out.addmm_(a, b, beta=float(further))
            elif further:
                out.add_(_onednn(a, b))
            else:
                out.copy_(_onednn(a, b))
    else:  # some columns at a time: oneDNN's buffers are as large as the second matrix
        size = max(_STEP, _PIECE**2 // left.shape[1] // _STEP * _STEP)
        for into, columns in zip(out.split(size, 1), right.split(size, 1), strict=True):
            into.copy_(_onednn(left, columns) if _takes(left, columns) else torch.mm(left, columns))
    return out


def _pieces(size: int) -> list[slice]:
    """Cuts of a dim that differs from call to call into few sizes, of which a rest below `_STEP` is not oneDNN's.

    oneDNN compiles a kernel for every shape (half a millisecond) and keeps a thousand of them with their buffers (1 MB each).
    """
    edges = [*range(0, size, _PIECE), size]
    last = edges[-2] + (size - edges[-2]) // _STEP * _STEP
    return [slice(a, b) for a, b in itertools.pairwise(sorted({*edges, last}))]


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


def _takes(left: Tensor, right: Tensor) -> bool:
    if left.dtype != torch.float32 or right.dtype != left.dtype or not (_onednn_is_faster() and torch.backends.mkldnn.enabled):
        return False
    sides = (*left.shape, right.shape[1])
    laid_out = right.is_contiguous() or right.t().is_contiguous()
    return laid_out and min(sides) >= _MIN_SIDE and sides[0] * sides[1] * sides[2] >= _MIN_VOLUME
