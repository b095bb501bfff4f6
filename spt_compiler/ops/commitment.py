"""`spt::commitment_loss_v1`: the paper's PQ loss as one operator, so that graphs hold an op and not a Python function.

Its meaning is `pq.commitment_loss`. Distances are recomputed in backward: saving [B, H, T, P, C] of them would cost more
memory than the attention whose codebook they train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spt_compiler import pq


@torch.library.custom_op("spt::commitment_loss_v1", mutates_args=(), schema="(Tensor codebook, Tensor x) -> Tensor")
def commitment_loss(codebook: Tensor, x: Tensor) -> Tensor:
    """Quantisation loss of keys under a codebook, fp32 scalar; differentiable in both.

    Args: codebook: [Hkv, P, C, D/P] float.  x: [B, H, T, D] float, H a multiple of Hkv.
    Raises: ValueError if they do not fit. Source: SPT (arXiv 2312.10365), PQ training loss.
    """
    return pq.commitment_loss(codebook, x).float()


@commitment_loss.register_fake
def _(codebook, x):
    return x.new_empty((), dtype=torch.float32)


@torch.library.custom_op(
    "spt::commitment_loss_backward_v1",
    mutates_args=(),
    schema="(Tensor grad, Tensor codebook, Tensor x) -> (Tensor, Tensor)",
)
def commitment_loss_backward(grad: Tensor, codebook: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `commitment_loss` for codebook and x."""
    book, inputs = pq.commitment_gradients(codebook, x)
    return book * grad, inputs * grad.to(inputs.dtype)


@commitment_loss_backward.register_fake
def _(grad, codebook, x):
    return tuple(t.new_empty(t.shape) for t in (codebook, x))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return commitment_loss_backward(grad, *ctx.saved_tensors)


commitment_loss.register_autograd(_backward, setup_context=_save)
