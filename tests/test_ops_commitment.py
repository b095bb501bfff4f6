"""The paper's PQ loss as an op: value, gradients, schema."""

from __future__ import annotations

import pytest
import torch

from spt_compiler import pq
from spt_compiler.ops.commitment import commitment_loss


def inputs(dtype=torch.float64, heads: int = 4):
    codebook = torch.randn(2, 3, 5, 4, dtype=dtype, requires_grad=True)
    x = torch.randn(2, 7, heads, 12, dtype=dtype).transpose(1, 2).detach().requires_grad_()  # not contiguous
    return codebook, x


def test_op_equals_its_definition_and_autograd_of_it():
    codebook, x = inputs()
    expected = pq.commitment_loss(codebook, x)
    want = torch.autograd.grad(expected, (codebook, x))
    loss = commitment_loss(codebook, x)
    assert torch.allclose(loss.double(), expected, rtol=1e-6)
    got = torch.autograd.grad(loss * 3, (codebook, x))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, 3 * w, rtol=1e-5, atol=1e-9)


def test_points_that_sit_on_a_codeword():
    codebook, _ = inputs()
    x = codebook.detach()[:, :, :3].permute(0, 2, 1, 3).reshape(1, 2, 3, 12).clone().requires_grad_()
    want = torch.autograd.grad(pq.commitment_loss(codebook, x), (codebook, x))
    for g, w in zip(pq.commitment_gradients(codebook, x), want, strict=True):
        assert torch.allclose(g, w, rtol=1e-6, atol=1e-9)


def test_schema_fake_and_autograd_registration():
    torch.library.opcheck(commitment_loss, inputs(torch.float32))


def test_shapes_that_do_not_fit():
    codebook, x = inputs()
    with pytest.raises(ValueError, match="expected x"):
        commitment_loss(codebook, x[..., :8])
