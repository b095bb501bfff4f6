"""Masks of the CPU lowerings, taken apart into what is cheap and what is not.

A mask is the conjunction (or sum) of a bias tensor and an expression. Here it becomes a causal flag, a vector per key (whatever
does not depend on the query: padding), and a rest that has to be evaluated at (query, key) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.ops.reference import combine_masks

LOG2E = 1.4426950408889634
# Rows of a mask that are looked at together, in elements.
_CHUNK = 1 << 20


def addend(added: Tensor | None, allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A combined mask as one float tensor: -inf where not allowed. None for no mask."""
    if added is None:
        return None if allowed is None else torch.zeros((), dtype=dtype).masked_fill(~allowed, -torch.inf)
    return added if allowed is None else added.masked_fill(~allowed, -torch.inf)


def base2(x: Tensor) -> Tensor:
    """Natural logits in units of log 2, without turning a finite value (finfo.min) into an infinite one."""
    scaled = (x * LOG2E).clamp(min=torch.finfo(x.dtype).min)
    return scaled.masked_fill(x == -torch.inf, -torch.inf)


@dataclass
class Masks:
    """The masks of one call.

    Args:
        shape: (B, H, Tq, Tk).  dtype: of the addends.
        causal: k <= q is asked for.
        key: [B or 1, H or 1, Tk] addends (-inf: not allowed) of all masks that do not depend on the query; or None.
        bias: 4-d tensor that depends on the query; or None.
        rest: the part of the expression that depends on the query, besides `causal`; or None.  expr_in: the tensors it reads.
        first: batch row and head that index 0 stands for in `rest`.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    causal: bool
    key: Tensor | None
    bias: Tensor | None
    rest: expression.Expression | None
    expr_in: list[Tensor]
    first: tuple[int, int] = (0, 0)

    def part(self, batch: slice, heads: slice) -> Masks:
        """The masks of some batch rows and heads, to be used with `rows` and `nothing` alone."""

        def cut(x: Tensor | None) -> Tensor | None:  # what is broadcast stays
            whole = slice(None)
            return None if x is None else x[batch if x.shape[0] > 1 else whole, heads if x.shape[1] > 1 else whole]

        shape = (batch.stop - batch.start, heads.stop - heads.start, *self.shape[2:])
        return replace(self, shape=shape, key=cut(self.key), bias=cut(self.bias), first=(batch.start, heads.start))

    @property
    def general(self) -> bool:
        """Whether anything has to be evaluated at (query, key) pairs."""
        return self.bias is not None or self.rest is not None

    def at(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        """Addends of bias and rest (not of `causal` and `key`) at index tensors that broadcast against each other.

        Returns: float tensor that broadcasts to the common shape of the indices; None where there is neither.
        """
        found: list[Tensor | None] = []
        if self.bias is not None:
            index = (i if n > 1 else i.new_zeros((1,) * i.dim()) for i, n in zip((b, h, q, k), self.bias.shape, strict=True))
            found.append(self.bias[tuple(index)])
        if self.rest is not None:
            found.append(self._evaluate(self.rest, b, h, q, k))
        return addend(*combine_masks(found, self.dtype), self.dtype) if found else None

    def _evaluate(self, expr: expression.Expression, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        env = {"b": b, "h": h, "q": q, "k": k} | {f"t{i}": t for i, t in enumerate(self.expr_in)}
        value = expression.evaluate(expr, env)
        return value if value.dtype == torch.bool or value.is_floating_point() else value.float()

    def rows(self, start: int, stop: int) -> Tensor:
        """Addends of everything for the queries start..stop: [B or 1, H or 1, rows, Tk]."""
        n_batch, n_heads, _, n_k = self.shape
        b = torch.arange(n_batch).add_(self.first[0]).view(-1, 1, 1, 1)
        h = torch.arange(n_heads).add_(self.first[1]).view(1, -1, 1, 1)
        q, k = torch.arange(start, stop).view(1, 1, -1, 1), torch.arange(n_k).view(1, 1, 1, -1)
        found = [] if self.bias is None else [self.bias[:, :, start:stop]]
        if self.rest is not None:
            found.append(self._evaluate(self.rest, b, h, q, k))
        total = addend(*combine_masks(found, self.dtype), self.dtype)
        if total is None:
            total = torch.zeros((), dtype=self.dtype)
        total = total.view((1,) * (4 - total.dim()) + tuple(total.shape))
        if self.key is not None:
            total = total + self.key.unsqueeze(2)
        total = total.expand(total.shape[0], total.shape[1], stop - start, n_k)
        return total.masked_fill(k > q, -torch.inf) if self.causal else total

    def row_chunks(self) -> list[tuple[int, int]]:
        """Ranges of queries for which `rows` stays small."""
        batch, heads, n_q, n_k = self.shape
        bias_rows = 1
        if self.bias is not None:
            bias_rows = self.bias.shape[0] * self.bias.shape[1]
        if self.rest is not None:
            used = self.rest.variables
            bias_rows = max(bias_rows, (batch if "b" in used else 1) * (heads if "h" in used else 1))
        step = max(1, _CHUNK // max(1, bias_rows * n_k))
        return [(start, min(start + step, n_q)) for start in range(0, n_q, step)]

    def nothing(self) -> Tensor:
        """[B, H, Tq] bool: rows in which no key at all is allowed."""
        batch, heads, n_q, n_k = self.shape
        if n_k == 0:
            return torch.ones(batch, heads, n_q, dtype=torch.bool)
        if self.general:
            found = torch.cat([(self.rows(*chunk) == -torch.inf).all(-1) for chunk in self.row_chunks()], dim=2)
        elif self.key is None:
            found = torch.zeros((), dtype=torch.bool)
        else:
            forbidden = self.key == -torch.inf  # [., ., Tk]
            if self.causal:
                last = torch.arange(n_q).clamp(max=n_k - 1)
                found = forbidden.int().cumprod(-1).bool()[..., last]
            else:
                found = forbidden.all(-1, keepdim=True)
        return found.expand(batch, heads, n_q)


def split(
    bias: Tensor | None, expr: str, expr_in: list[Tensor], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Masks:
    """Takes the masks of a call apart."""
    batch, heads, _, n_k = shape
    causal = False
    over_keys: list[Tensor | None] = []
    rest: expression.Expression | None = None
    masks = Masks(shape, dtype, False, None, None, None, expr_in)
    if expr:
        for part in expression.conjuncts(expression.parse(expr)):
            if part == _CAUSAL:
                causal = True
            elif "q" in part.variables:
                rest = part if rest is None else rest & part
            else:
                b, h = torch.arange(batch).view(-1, 1, 1), torch.arange(heads).view(1, -1, 1)
                value = masks._evaluate(part, b, h, torch.zeros(1, 1, 1, dtype=torch.long), torch.arange(n_k).view(1, 1, -1))
                value = value.view((1,) * (3 - value.dim()) + tuple(value.shape))
                over_keys.append(value.expand(*value.shape[:2], n_k))
    if bias is not None and (bias.shape[2] == 1 or bias.stride(2) == 0):
        over_keys.append(bias[:, :, 0].expand(bias.shape[0], bias.shape[1], n_k))
        bias = None
    key = addend(*combine_masks(over_keys, dtype), dtype) if over_keys else None
    if key is not None and bool((key == 0).all()):
        key = None
    return Masks(shape, dtype, causal, key, bias, rest, expr_in)


_CAUSAL = expression.parse("k <= q")
