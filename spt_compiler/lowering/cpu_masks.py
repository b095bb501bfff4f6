"""Masks of the CPU lowerings, taken apart into what is cheap and what is not.

A mask is the conjunction (or sum) of a bias tensor and an expression. Here it becomes a causal flag, a vector per key (whatever
does not depend on the query: padding), and a rest that has to be evaluated at (query, key) pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_compiler import expression
from spt_compiler.ops.reference import combine_masks
from spt_compiler.ops.selection.common import causal_split

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


# ---------------------------------------------------------------------------------------------------------------------
# Classes of blocks
# ---------------------------------------------------------------------------------------------------------------------

NOTHING, SOMETHING, ALL = 0, 1, 2  # what masks do to a block: nothing, something, or hide all of it
# Integers beyond this are not exact in the fp64 of the bounds.
_EXACT = 1 << 53


def classes(masks: Masks, tile_q: int, tile_k: int) -> Tensor | None:
    """What the masks do to each block of tile_q queries and tile_k keys: uint8 [B or 1, H or 1, nQ, nK]; None: nothing at all.

    A block is `SOMETHING` where the masks might add to some of its scores, and also where that cannot be told cheaply. Costs
    O(nQ * nK) for expressions (from bounds of what they read), O(Tq * Tk) only for a bias tensor.
    """
    _, _, n_q, n_k = masks.shape
    n_rows, n_cols = -(-n_q // tile_q), -(-n_k // tile_k)
    q0, k0 = torch.arange(n_rows).mul_(tile_q).view(1, 1, -1, 1), torch.arange(n_cols).mul_(tile_k).view(1, 1, 1, -1)
    q1, k1 = (q0 + (tile_q - 1)).clamp_(max=n_q - 1), (k0 + (tile_k - 1)).clamp_(max=n_k - 1)
    found: list[Tensor] = []
    if masks.causal:
        found.append((k1 > q0).to(torch.uint8) + (k0 > q1))
    if masks.rest is not None:
        low, high = _bounds(masks.rest, _Ranges(masks, (q0, q1, tile_q), (k0, k1, tile_k)))
        if expression.kind_of(masks.rest, _kinds(masks.expr_in)) == "bool":
            found.append((low < 1).to(torch.uint8) + (high <= 0))
        else:
            found.append(((low != 0) | (high != 0)).to(torch.uint8))
    if masks.key is not None:
        key = F.pad(masks.key, (0, -n_k % tile_k), value=-torch.inf).unflatten(2, (n_cols, tile_k)).unsqueeze(2)
        found.append((key != 0).any(-1).to(torch.uint8) + (key == -torch.inf).all(-1))
    elif n_k % tile_k:
        found.append((k0 + tile_k > n_k).to(torch.uint8))
    if masks.bias is not None:
        found.append(_bias_classes(masks.bias, n_q, n_k, tile_q, tile_k))
    if not found:
        return None
    total = functools.reduce(torch.maximum, found)
    return total.expand(-1, -1, n_rows, n_cols).contiguous()


def _bias_classes(bias: Tensor, n_q: int, n_k: int, tile_q: int, tile_k: int) -> Tensor:
    """The same for a bias tensor alone, a few rows of blocks at a time."""
    found = []
    step = tile_q * max(1, _CHUNK // max(1, bias.shape[0] * bias.shape[1] * tile_q * n_k))
    for start in range(0, n_q, step):
        part = bias[:, :, start : start + step].expand(-1, -1, -1, n_k)
        plain = part if part.dtype == torch.bool else part == 0
        hidden = ~part if part.dtype == torch.bool else part == -torch.inf
        pads = (0, -n_k % tile_k, 0, -part.shape[2] % tile_q)
        plain, hidden = (
            F.pad(x, pads, value=True).unflatten(3, (-1, tile_k)).all(-1).unflatten(2, (-1, tile_q)).all(3) for x in (plain, hidden)
        )
        found.append((~plain).to(torch.uint8) + (hidden & ~plain))
    return torch.cat(found, dim=2)


def _kinds(expr_in: list[Tensor]) -> dict[str, str]:
    kinds = {
        f"t{i}": "bool" if t.dtype == torch.bool else "float" if t.is_floating_point() else "int" for i, t in enumerate(expr_in)
    }
    return {"b": "int", "h": "int", "q": "int", "k": "int"} | kinds


class _Ranges:
    """Smallest and largest value, over each block, of what an expression reads; fp64 tensors that broadcast to [B, H, nQ, nK]."""

    def __init__(self, masks: Masks, rows: tuple[Tensor, Tensor, int], columns: tuple[Tensor, Tensor, int]):
        batch, heads, n_q, n_k = masks.shape
        b = torch.arange(batch).add_(masks.first[0]).view(-1, 1, 1, 1)
        h = torch.arange(heads).add_(masks.first[1]).view(1, -1, 1, 1)
        self.expr_in = masks.expr_in
        self.ends = {"b": (b, b), "h": (h, h), "q": rows[:2], "k": columns[:2]}
        self.lengths = {"q": (n_q, rows[2]), "k": (n_k, columns[2])}

    def variable(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self.ends:
            low, high = self.ends[name]
            return low.double(), high.double()
        tensor = self.expr_in[int(name[1:])]
        return (tensor.double(), tensor.double()) if tensor.dim() == 0 else _anything(tensor)

    def read(self, node: expression.Expression) -> tuple[Tensor, Tensor]:
        tensor = self.expr_in[int(node.value[1:])]
        axes = [a.value if a.op == "var" else None for a in node.args]
        positions = [a for a in axes if a in self.lengths]
        if None in axes or len(axes) != tensor.dim() or len(positions) > 1:
            return _anything(tensor)
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis in self.lengths and size < self.lengths[axis][0]:
                return _anything(tensor)
        values = tensor.double()
        odd = values.isnan() if tensor.is_floating_point() else values.abs() > _EXACT
        if bool(odd.any()):
            return _anything(tensor)
        if positions:  # the axis of positions to the end, in tiles
            at = axes.index(positions[0])
            length, tile = self.lengths[positions[0]]
            values = values.movedim(at, -1)[..., :length]
            values = F.pad(values, (0, -length % tile), mode="constant", value=torch.nan).unflatten(-1, (-1, tile))
            beyond = values.isnan()
            shaped = (values.masked_fill(beyond, torch.inf).amin(-1), values.masked_fill(beyond, -torch.inf).amax(-1))
            rest = [a for a in axes if a != positions[0]]
        else:
            rest, shaped = list(axes), (values, values)
        # What is left of the index picks batch rows and heads.
        index = tuple(self.ends[a][0].flatten() for a in rest)
        if len(rest) == 2:
            index = (
                (index[0].view(-1, 1), index[1].view(1, -1)) if rest == ["b", "h"] else (index[0].view(1, -1), index[1].view(-1, 1))
            )
        lead = {(): (1, 1), ("b",): (-1, 1), ("h",): (1, -1)}.get(tuple(rest))
        result = []
        for x in shaped:
            x = x[index] if index else x
            tail = x.shape[-1:] if positions else ()
            x = x.reshape((*lead, *tail) if lead is not None else (*x.shape[:2], *tail))
            x = x.unsqueeze(2) if positions == ["k"] else x.unsqueeze(3) if positions == ["q"] else x[..., None, None]
            result.append(x)
        return result[0], result[1]


def _anything(like: Tensor) -> tuple[Tensor, Tensor]:
    low, high = (0.0, 1.0) if like.dtype == torch.bool else (-torch.inf, torch.inf)
    return torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)


def _bounds(node: expression.Expression, ranges: _Ranges) -> tuple[Tensor, Tensor]:
    """Interval arithmetic over blocks; booleans are 0 and 1, and unknown where the two differ."""
    if node.op == "const":
        value = torch.tensor(float(node.value), dtype=torch.float64)
        return value, value
    if node.op == "var":
        return ranges.variable(str(node.value))
    if node.op == "read":
        return ranges.read(node)
    parts = [_bounds(a, ranges) for a in node.args]
    if len(parts) == 1:
        ((low, high),) = parts
        if node.op == "neg":
            return -high, -low
        if node.op == "not":
            return 1 - high, 1 - low
        return _unknown(node)
    if len(parts) != 2:
        return _unknown(node)
    (a, z), (b, y) = parts
    if node.op in ("&", "|"):
        both = torch.minimum if node.op == "&" else torch.maximum
        return both(a, b), both(z, y)
    if node.op in ("+", "-"):
        low, high = (a + b, z + y) if node.op == "+" else (a - y, z - b)
        return low.masked_fill(low.isnan(), -torch.inf), high.masked_fill(high.isnan(), torch.inf)
    if node.op in ("<", ">=", ">", "<="):
        if node.op in (">", "<="):
            (a, z), (b, y) = (b, y), (a, z)
        sure, possible = (z < b).double(), (a < y).double()  # of the first being smaller
        return (sure, possible) if node.op in ("<", ">") else (1 - possible, 1 - sure)
    if node.op in ("==", "!="):
        sure, possible = ((a == z) & (b == y) & (a == b)).double(), ((a <= y) & (b <= z)).double()
        return (sure, possible) if node.op == "==" else (1 - possible, 1 - sure)
    return _unknown(node)


def _unknown(node: expression.Expression) -> tuple[Tensor, Tensor]:
    """Bounds of what is not analysed. They hold for a boolean too: every use asks whether a bound is 0 or 1, or compares."""
    return torch.tensor(-torch.inf, dtype=torch.float64), torch.tensor(torch.inf, dtype=torch.float64)


def plain_reads(expr: str, expr_in: list[Tensor]) -> tuple[str, list[Tensor]]:
    """The same mask with every read at a constant index (a batch of one: `t0[0, k]`) as a read of a view without that axis."""
    if not expr_in:
        return expr, expr_in
    text, views = _plain_reads(expr, tuple(tuple(t.shape) for t in expr_in))
    return text, [*expr_in, *(expr_in[number][at] for number, at in views)]


@functools.lru_cache(maxsize=256)
def _plain_reads(expr: str, shapes: tuple[tuple[int, ...], ...]) -> tuple[str, tuple[tuple[int, tuple], ...]]:
    views: dict[tuple[int, tuple], int] = {}

    def build(node: expression.Expression) -> expression.Expression:
        args = tuple(build(a) for a in node.args)
        if node.op == "read":
            number = int(str(node.value)[1:])
            at = tuple(a.value if a.op == "const" and type(a.value) is int else slice(None) for a in args)
            fixed = [(i, size) for i, size in zip(at, shapes[number], strict=False) if isinstance(i, int)]
            if fixed and len(at) == len(shapes[number]) and all(0 <= i < size for i, size in fixed):
                key = (number, tuple(-1 if isinstance(i, slice) else i for i in at))
                name = f"t{len(shapes) + views.setdefault(key, len(views))}"
                rest = [a for a, i in zip(args, at, strict=True) if isinstance(i, slice)]
                return expression.read(name, *rest) if rest else expression.var(name)
        return expression.Expression(node.op, args, node.value)

    text = str(build(expression.parse(expr)))
    return text, tuple((number, tuple(slice(None) if i < 0 else i for i in at)) for number, at in views)


def parts(expr: str) -> tuple[bool, list[expression.Expression], expression.Expression | None]:
    """A mask expression as (is "k <= q" a conjunct of it, conjuncts that are the same for all queries, the rest or None)."""
    causal, others = causal_split(expr)
    of_keys = []
    rest: expression.Expression | None = None
    for part in expression.conjuncts(others) if others is not None else ():
        if "q" in part.variables:
            rest = part if rest is None else rest & part
        else:
            of_keys.append(part)
    return causal, of_keys, rest


def is_per_key(bias: Tensor) -> bool:
    """Whether a bias [B, H, Tq, Tk] is the same for all queries."""
    return bias.shape[2] == 1 or bias.stride(2) == 0


def split(bias: Tensor | None, expr: str, expr_in: list[Tensor], shape: tuple[int, int, int, int], dtype: torch.dtype) -> Masks:
    """Takes the masks of a call apart."""
    batch, heads, _, n_k = shape
    expr, expr_in = plain_reads(expr, expr_in)
    causal, of_keys, rest = parts(expr)
    over_keys: list[Tensor | None] = []
    masks = Masks(shape, dtype, False, None, None, None, expr_in)
    for part in of_keys:
        b, h = torch.arange(batch).view(-1, 1, 1), torch.arange(heads).view(1, -1, 1)
        value = masks._evaluate(part, b, h, torch.zeros(1, 1, 1, dtype=torch.long), torch.arange(n_k).view(1, 1, -1))
        value = value.view((1,) * (3 - value.dim()) + tuple(value.shape))
        over_keys.append(value.expand(*value.shape[:2], n_k))
    if bias is not None and is_per_key(bias):
        over_keys.append(bias[:, :, 0].expand(bias.shape[0], bias.shape[1], n_k))
        bias = None
    key = addend(*combine_masks(over_keys, dtype), dtype) if over_keys else None
    if key is not None and bool((key == 0).all()):
        key = None
    return Masks(shape, dtype, causal, key, bias, rest, expr_in)
