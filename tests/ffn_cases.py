"""Random arguments of the routed FFN for the tests, and the same computation in plain torch operators."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.ops import reference_ffn

MADE_UP = "where(x0 > 0, x0 * x0, 0.1 * tanh(x0)) * a0"
ACTIVATIONS = (
    "gelu(x0)",
    "gelu_tanh(x0)",
    "silu(x0) * x1",
    "relu(x0)",
    MADE_UP,
    "square(relu(x0)) * a0 + a1 * x1",
    "x0",
)


@dataclass
class Case:
    """Arguments of `spt::routed_ffn_v1`, by name."""

    x: Tensor
    w_in: list[Tensor]
    b_in: list[Tensor]
    w_out: Tensor
    b_out: Tensor | None
    lora_a_out: list[Tensor]
    lora_b: list[Tensor]
    gates: Tensor | None
    blocks: Tensor
    rows: Tensor
    offsets: Tensor
    permutation: Tensor
    compensation: Tensor | None
    act: str
    act_in: list[Tensor] = field(default_factory=list)
    seed: Tensor | None = None
    p: float = 0.0
    save: bool = True
    lora_down: Tensor | None = None
    lora_seed: Tensor | None = None
    lora_p: float = 0.0

    @property
    def forward(self) -> tuple[Any, ...]:
        """Positional arguments of the forward."""
        return (
            *(self.x, self.w_in, self.b_in, self.w_out, self.b_out, self.lora_a_out, self.lora_b, self.lora_down),
            *(self.gates, self.blocks, self.rows, self.offsets, self.permutation, self.compensation),
            *(self.act, self.act_in, self.seed, self.p, self.lora_seed, self.lora_p, self.save),
        )

    def backward(self, grad_y: Tensor, saved: Tensor, needs: list[bool] | None = None) -> tuple[Any, ...]:
        """Positional arguments of the backward; by default everything that is there is needed.

        `grad_y` holds the gradient of `low` behind that of y, as `both` returns them.
        """
        f, n_out = self.forward, self.w_out.shape[0]
        needs = [t is not None for t in self.leaves.values()] if needs is None else needs
        grad_low = None if self.lora_down is None else grad_y[:, n_out:]
        return (grad_y[:, :n_out], grad_low, *f[:13], *f[14:20], saved, needs)

    @property
    def n_out(self) -> int:
        """Columns of y and low side by side."""
        return self.w_out.shape[0] + (0 if self.lora_down is None else self.lora_down.shape[0])

    @property
    def leaves(self) -> dict[str, Tensor | None]:
        """Differentiable arguments in the order of the backward's results."""
        names = reference_ffn.gradient_names(len(self.w_in), len(self.b_in), len(self.lora_b), len(self.act_in))
        values = [self.x, *self.w_in, *self.b_in, self.w_out, self.b_out, *self.lora_a_out, *self.lora_b]
        return dict(zip(names, [*values, self.lora_down, self.gates, *self.act_in], strict=True))

    def map(self, f) -> Case:
        """The case with `f` applied to every floating-point argument."""

        def each(t):
            return f(t) if isinstance(t, Tensor) and t.is_floating_point() else t

        lists = ("w_in", "b_in", "lora_a_out", "lora_b", "act_in")
        return replace(
            self,
            **{name: [each(t) for t in getattr(self, name)] for name in lists},
            **{name: each(getattr(self, name)) for name in ("x", "w_out", "b_out", "lora_down", "gates", "compensation")},
        )

    def to(self, dtype: torch.dtype) -> Case:
        return self.map(lambda t: t.detach().to(dtype))

    def trainable(self) -> Case:
        """Leaves of their own that require grad (strides kept); compensation, being state, does not."""
        case = self.map(lambda t: t.detach().clone().requires_grad_())
        return replace(case, compensation=None if case.compensation is None else case.compensation.detach())


def case(
    n: int = 63,
    e: int = 20,
    f: int = 50,
    g: int = 8,
    e_out: int = 21,
    *,
    act: str = "gelu(x0)",
    bias: bool = True,
    lora: bool = False,
    down: bool = False,
    lora_p: float = 0.0,
    gates: bool = False,
    compensation: bool = False,
    conv1d: bool = False,
    ordered: bool = False,
    p: float = 0.0,
    budget: float = 0.5,
    max_density: float = 0.5,
    tile: int = 4,
    idle: int | None = None,
    always: int | None = None,
    save: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """A random case of odd sizes.

    Args:
        n, e, f, g, e_out: tokens, model width, hidden width, blocks, output width.  act: its x1 asks for a second
            in-projection, its a0 for a scalar and a1 for a vector input.
        conv1d: weights are transposed views.  ordered: identity permutation.  idle: a block no token may choose.
        always: a block every token must choose.  lora: branches on the in-projections.  down: one on the
            out-projection, with dropout `lora_p`.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    variables = expression.parse(act).variables
    n_in = 2 if "x1" in variables else 1
    ranks = [3, 0][:n_in] if lora else []
    # From a generator of its own: two cases that differ in g alone have the same weights.
    scores = torch.randn(n, g, generator=torch.Generator().manual_seed(seed + 1))
    if idle is not None:
        scores[:, idle] = -torch.inf
    on = torch.zeros(g, dtype=torch.bool)
    if always is not None:
        on[always] = True
    lists = reference_ffn.route(scores, on, torch.tensor([budget]), max_density, tile, 0)
    permutation = torch.arange(f) if ordered else torch.randperm(f, generator=generator)
    return Case(
        x=rand(n, e),
        w_in=[rand(e, f).t() if conv1d else rand(f, e) for _ in range(n_in)],
        b_in=[rand(f) for _ in range(n_in)] if bias else [],
        w_out=rand(f, e_out).t() if conv1d else rand(e_out, f),
        b_out=rand(e_out) if bias else None,
        lora_a_out=[rand(n, r) for r in ranks],
        lora_b=[rand(f, r) for r in ranks],
        gates=torch.rand(n, g, generator=generator, dtype=torch.float64).to(dtype) if gates else None,
        blocks=lists[0],
        rows=lists[1],
        offsets=lists[2],
        permutation=permutation.int(),
        compensation=torch.randn(g, e_out, generator=generator) if compensation else None,
        act=act,
        act_in=[a for name, a in (("a0", rand(1)[0]), ("a1", rand(f))) if name in variables],
        seed=torch.tensor([1234567]) if p else None,
        p=p,
        save=save,
        # Last of the random tensors: cases without it keep their values.
        lora_down=rand(3, f) if down else None,
        lora_seed=torch.tensor([7654321]) if lora_p else None,
        lora_p=lora_p,
    )


def both(result: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[N, E_out + r]: y and low of the op's results side by side."""
    return torch.cat([result[0], result[2]], 1)


def plain(c: Case) -> Tensor:
    """The FFN by ordinary torch operators and autograd, every block computed and masked; in the dtype of the case.

    Returns y and low side by side, like `both`.
    """
    n_blocks, n_units = c.offsets.shape[0] - 1, c.permutation.shape[0]
    dense = bool(c.offsets[0] < 0)
    kept = reference_ffn.kept_mask(c.blocks, n_blocks) | dense
    biases = c.b_in or [None] * len(c.w_in)
    pre = [torch.nn.functional.linear(c.x, w, b) for w, b in zip(c.w_in, biases, strict=True)]
    if c.lora_b:
        pre = [z + a @ b.t() for z, a, b in zip(pre, c.lora_a_out, c.lora_b, strict=True)]
    env = {f"x{i}": z for i, z in enumerate(pre)} | {f"a{i}": a for i, a in enumerate(c.act_in)}
    hidden = expression.evaluate(expression.parse(c.act), env)
    units, tokens = torch.arange(n_units), torch.arange(c.x.shape[0])
    if c.p:
        hidden = hidden * reference_ffn.hidden_dropout(c.seed, tokens, units, n_units, c.p, hidden.dtype)
    unit = reference_ffn.block_of_unit(c.permutation, n_blocks)
    hidden = torch.where(kept[:, unit], hidden, 0)
    if c.gates is not None:
        hidden = hidden * c.gates[:, unit]
    y = torch.nn.functional.linear(hidden, c.w_out, c.b_out)
    if c.compensation is not None and not dense:
        y = y + (~kept).to(y.dtype) @ c.compensation.to(y.dtype)
    if c.lora_down is None:
        return y
    if c.lora_p:
        hidden = hidden * reference_ffn.hidden_dropout(c.lora_seed, tokens, units, n_units, c.lora_p, hidden.dtype)
    return torch.cat([y, hidden @ c.lora_down.t()], 1)


def gradients(run, c: Case, grad_y: Tensor) -> dict[str, Tensor]:
    """Output and gradients, by name, of `run(case)` on fresh leaves."""
    c = c.trainable()
    leaves = {name: t for name, t in c.leaves.items() if t is not None}
    y = run(c)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True))
    return {"y": y.detach()} | dict(zip(leaves, zeros, strict=True))


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def lowered(module, c: Case, grad_y: Tensor, needs: list[bool] | None = None) -> dict[str, Tensor]:
    """Output, saved tensor and gradients of a module's lowering, by name."""
    result = module.routed_ffn(*c.forward)
    grads = module.routed_ffn_backward(*c.backward(grad_y, result[1], needs))
    return {"y": both(result), "saved": result[1]} | dict(zip(c.leaves, grads, strict=True))


def defined(c: Case, grad_y: Tensor) -> dict[str, Tensor]:
    """The same of the reference."""
    return lowered(reference_ffn, c, grad_y)
