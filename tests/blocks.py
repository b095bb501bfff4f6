"""Small plain modules with attention and FFN sites, for tests of the pipeline (real architectures are in `models.py`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spt_compiler import debug

# Every size counts in tests. Tracing through AOTAutograd takes seconds a graph, Inductor's C++ many more: tests that are
# not about the inner compiler leave both out.
SPARSE = {"inner": "eager", "attention.min_keys": 0, "ffn.min_width": 0, "strict": True}
EXACT = {"inner": "aot_eager", "exact": True, "strict": True}


class Block(nn.Module):
    """Pre-norm Transformer block: causal SDPA and Linear-GELU-Linear."""

    def __init__(self, width: int = 48, heads: int = 4, hidden: int = 112, dropout: float = 0.0, causal: bool = True):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .view(batch, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=p)
        x = x + self.proj(out.transpose(1, 2).reshape(batch, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Stack(nn.Module):
    """Blocks in a row, with or without activation checkpointing of each."""

    def __init__(self, depth: int = 2, checkpointed: bool = False, **block: object):
        super().__init__()
        self.blocks = nn.ModuleList([Block(**block) for _ in range(depth)])  # type: ignore[arg-type]
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


class Broken(Stack):
    """Two blocks with a graph break between them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


def gradients(module: nn.Module, call, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of `call`, and the gradients of a fixed random functional of it for every parameter and input."""
    module.zero_grad(set_to_none=True)
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = call(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out)
    (out * weight).sum().backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    grads.update({f"input{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None})
    return out.detach(), grads


def assert_same(got: tuple, expected: tuple, rtol: float = 1e-4, grad_rtol: float = 1e-3) -> None:
    """Outputs and every gradient agree, relative to the largest value of each tensor.

    A gradient that is zero but for rounding (the bias of keys: softmax does not see it) is held to the model's scale.
    """
    (out, grads), (out_ref, grads_ref) = got, expected
    assert relative(out, out_ref) <= rtol
    assert grads.keys() == grads_ref.keys()
    floor = 1e-3 * max(g.abs().max() for g in grads_ref.values())
    for name, grad in grads_ref.items():
        error = (grads[name] - grad).abs().max() / torch.maximum(grad.abs().max(), floor)
        assert error <= grad_rtol, name


def assert_exact_is_eager(module: nn.Module, *inputs: Tensor) -> list[str]:
    """The rewritten graph under `exact` against eager: output, and the gradient of every input and parameter.

    Where eager itself gives no finite output, only the outputs are compared, and no gradient that is not finite there.
    Returns: the kinds of the replaced sites.
    """
    expected = gradients(module, module, *inputs)
    torch._dynamo.reset()
    got = gradients(module, torch.compile(module, backend="spt", options={**EXACT, "inner": "eager"}), *inputs)
    if expected[0].isfinite().all():
        finite = {n for n, g in expected[1].items() if g.isfinite().all()}
        got, expected = ((out, {n: g for n, g in grads.items() if n in finite}) for out, grads in (got, expected))
        assert_same(got, expected, rtol=1e-6, grad_rtol=1e-6)
    else:
        torch.testing.assert_close(got[0], expected[0], equal_nan=True)
    return [row.kind for rows in debug.reports() for row in rows if row.status == "replaced"]


def assert_exact_at_any_length(module: nn.Module, *inputs: Tensor) -> list[str]:
    """As `assert_exact_is_eager`, at three batch sizes and lengths (dims 0 and -2) through two graphs: the second is symbolic
    in both, and serves the third as well.

    Returns: the kinds of the sites that are replaced in it.
    """
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="spt", options={**EXACT, "inner": "eager"})
    for n in (0, 1, 2):
        sized = [torch.cat([x, *(x.roll(i + 1, -1)[..., : i + 2, :] for i in range(n))], -2) for x in inputs]
        sized = [torch.cat([x, *(x[:1] * 0.5 for _ in range(n))]) for x in sized]
        assert_same(gradients(module, compiled, *sized), gradients(module, module, *sized), rtol=1e-6, grad_rtol=1e-6)
    static, symbolic = debug.reports()
    return [row.kind for row in symbolic if row.status == "replaced"]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def train_steps(module: nn.Module, call, batches, lr: float = 1e-2) -> list[float]:
    """Plain SGD on the mean square of the output; the losses."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = call(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
