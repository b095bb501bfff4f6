"""One element of a tensor as an expression: reads the graph that produces a mask and says what it computes.

The value of a node at an index is found by pulling the index up through the calls that made it: layout moves the index,
element-wise calls become operators, `arange` and fills become arithmetic. What remains are reads of per-token vectors,
such as a padding mask t0[b, k]. Nothing is evaluated, so symbolic lengths lift like static ones.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from .errors import ExpressionError
from .expression import Expression, call, const, kind_of, read, substitute, var
from .graph import Arguments, dtype, is_float, is_tensor, needs_grad, rank, same_shape, settled, shape
from .scope import Scope

# Calls looked at for one mask. Real ones take about thirty.
_REACH = 400
_INT64 = (torch.int64, torch.int32)
Number = int | float | bool


class NotLifted(Exception):
    """Something on the way has no form in the expression language, or is as large as the mask itself."""


# ---------------------------------------------------------------------------------------------------------------------
# Expressions that fold as they are built
# ---------------------------------------------------------------------------------------------------------------------

_FOLD: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "&": operator.and_,
    "|": operator.or_,
    "max": max,
    "min": min,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "neg": operator.neg,
    "abs": abs,
}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


@dataclass
class Builder:
    """Builds expressions over b, h, q, k in one normal form: comparisons of positions are bounds on k - q.

    Attributes:
        extent: size of each index, None where it is symbolic. kinds: "bool", "int" or "float" of the tensors read.
    """

    extent: dict[str, int | None]
    kinds: dict[str, str] = field(default_factory=dict)

    def kind(self, expr: Expression) -> str:
        return kind_of(expr, self.kinds)

    def make(self, op: str, *given: Expression | Number) -> Expression:
        args = tuple(a if isinstance(a, Expression) else const(a) for a in given)
        if op == "where":
            return self._where(*args)
        if op == "not":
            return self._not(args[0])
        values = [a.value for a in args if a.op == "const"]
        if len(values) == len(args) and op in _FOLD:
            try:
                return const(_FOLD[op](*values))
            except ArithmeticError as error:
                raise NotLifted(str(error)) from error
        # A number meets a choice between numbers: (1 - mask) * low is a choice too.
        for i, a in enumerate(args):
            if len(args) == 2 and a.op == "where" and args[1 - i].op == "const" and op in _FOLD:
                if all(x.op == "const" for x in a.args[1:]):
                    branches = (self.make(op, *((x, args[1]) if i == 0 else (args[0], x))) for x in a.args[1:])
                    return self.make("where", a.args[0], *branches)
        if op in _MIRRORED:
            return self._compare(op, *args)
        if op in ("&", "|"):
            return self._join(op, *args)
        if op in ("+", "-") and args[1].op == "const" and args[1].value == 0:
            return args[0]
        if op == "+" and args[0].op == "const" and args[0].value == 0:
            return args[1]
        if op in ("+", "-") and (line := _linear(call(op, *args))) is not None and not line[0]:
            return const(line[1])  # q - (q - 1)
        if op == "*":
            for one, other in (args, args[::-1]):
                if one.op == "const" and one.value == 1 and not isinstance(one.value, float):
                    return other
        return call(op, *args)

    def _not(self, x: Expression) -> Expression:
        if x.op == "const":
            return const(not x.value)
        if x.op == "not":
            return x.args[0]
        if x.op in _OPPOSITE and all(self.kind(a) != "float" for a in x.args):  # nan has no opposite
            return self.make(_OPPOSITE[x.op], *x.args)
        if x.op in ("&", "|"):
            return self.make("|" if x.op == "&" else "&", *(self._not(a) for a in x.args))
        return call("not", x)

    def _join(self, op: str, a: Expression, b: Expression) -> Expression:
        for x, y in ((a, b), (b, a)):
            if x.op == "const":
                return y if bool(x.value) == (op == "&") else const(op == "|")
        return a if a == b else call(op, a, b)

    def _where(self, c: Expression, x: Expression, y: Expression) -> Expression:
        if c.op == "const":
            return x if c.value else y
        if x == y:
            return x
        for value, other, takes in ((x, y, c), (y, x, self._not(c))):
            if value.op == "const" and isinstance(value.value, bool):
                # `takes` says where the truth value is chosen
                return self.make("|", takes, other) if value.value else self.make("&", self._not(takes), other)
        if x.op == "const" and isinstance(x.value, float) and x.value <= -1e4:
            return self._where(self._not(c), y, x)  # what is masked out comes last
        if y.op == "const" and x.op == "where" and x.args[2] == y:
            return self._where(self.make("&", c, x.args[0]), x.args[1], y)
        if y.op == "const" and x.op == "where" and x.args[1] == y:
            return self._where(self.make("|", self._not(c), x.args[0]), y, x.args[2])
        return call("where", c, x, y)

    def _compare(self, op: str, a: Expression, b: Expression) -> Expression:
        if a == b and self.kind(a) != "float":
            return const(op in ("<=", ">=", "=="))
        if "bool" in (self.kind(a), self.kind(b)) and op in ("==", "!="):
            for x, y in ((a, b), (b, a)):
                if y.op == "const" and y.value in (0, 1) and self.kind(x) == "bool":
                    return x if (op == "==") == bool(y.value) else self._not(x)
        line = _linear(call("-", a, b))
        if line is None:
            return call(op, a, b)
        slopes, offset = line
        low, high = self._range(slopes, offset)
        known = {
            "<": (high < 0, low >= 0),
            "<=": (high <= 0, low > 0),
            ">": (low > 0, high <= 0),
            ">=": (low >= 0, high < 0),
            "==": (low == high == 0, low > 0 or high < 0),
            "!=": (low > 0 or high < 0, low == high == 0),
        }[op]
        if any(known):
            return const(known[0])
        if slopes == {"q": 1, "k": -1}:
            slopes, offset, op = {"q": -1, "k": 1}, -offset, _MIRRORED[op]
        if slopes == {"q": -1, "k": 1} and op not in ("==", "!="):
            k, q = var("k"), var("q")
            if op in ("<", "<="):  # k - q + offset <= 0
                bound = -offset - (op == "<")
                return call("<=", k, q) if bound == 0 else call("<=", k - q, bound)
            bound = offset - (op == ">")  # q - k <= bound
            return call("<=", q, k) if bound == 0 else call("<=", q - k, bound)
        return call(op, a, b)

    def _range(self, slopes: dict[str, int], offset: int) -> tuple[float, float]:
        low = high = float(offset)
        for name, slope in slopes.items():
            size = self.extent.get(name)
            end = slope * (math.inf if size is None else size - 1)
            low, high = low + min(0.0, end), high + max(0.0, end)
        return low, high

    def nonnegative(self, expr: Expression) -> bool:
        if expr.op in ("floordiv", "mod"):
            by = expr.args[1]
            return by.op == "const" and by.value > 0 and self.nonnegative(expr.args[0])
        line = _linear(expr)
        return line is not None and self._range(*line)[0] >= 0


def _linear(expr: Expression) -> tuple[dict[str, int], int] | None:
    """(slope of each index, offset) of an integer expression that is linear in b, h, q and k; None for others."""
    if expr.op == "const":
        return ({}, int(expr.value)) if isinstance(expr.value, int) else None
    if expr.op == "var" and expr.value in ("b", "h", "q", "k"):
        return {expr.value: 1}, 0
    if expr.op == "neg":
        return _combined(({}, 0), _linear(expr.args[0]), -1)
    if expr.op in ("+", "-"):
        a, b = map(_linear, expr.args)
        return _combined(a, b, 1 if expr.op == "+" else -1)
    if expr.op == "*":
        for x, y in (expr.args, expr.args[::-1]):
            if x.op == "const" and isinstance(x.value, int):
                return _combined(({}, 0), _linear(y), int(x.value))
    return None


def _combined(a: Any, b: Any, factor: int) -> tuple[dict[str, int], int] | None:
    if a is None or b is None:
        return None
    slopes = {n: a[0].get(n, 0) + factor * b[0].get(n, 0) for n in (*a[0], *b[0])}
    return {n: s for n, s in slopes.items() if s}, a[1] + factor * b[1]


# ---------------------------------------------------------------------------------------------------------------------
# Elements of nodes
# ---------------------------------------------------------------------------------------------------------------------

Index = tuple[Expression, ...]
Rule = Callable[["Lifter", Scope, Node, Index], Expression]
RULES: dict[Any, Rule] = {}


def lifts(*targets: Any) -> Callable[[Rule], Rule]:
    """Declares how an element of such a call's result is made of elements of its arguments."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


class Lifter:
    """Lifts elements of nodes of one graph, and of the graphs around it.

    Attributes:
        tensors: (scope, node) behind the reads t0, t1, ... in order. build: see `Builder`.
    """

    def __init__(self, extent: dict[str, int | None]):
        self.build = Builder(extent)
        self.tensors: list[tuple[Scope, Node]] = []
        self._seen = 0

    def element(self, scope: Scope, item: Any, index: Index) -> Expression:
        """The value of a node (or number) at an index. Raises: NotLifted."""
        if isinstance(item, (bool, int, float)):
            return const(item)
        if not isinstance(item, Node):
            raise NotLifted(repr(item))
        scope, node = scope.source(item)
        if scope.is_written(node):
            raise NotLifted(f"{node.name} is written to in place")
        if not is_tensor(node):
            number = settled(node.meta.get("example_value"))
            if isinstance(number, (bool, int, float)):
                return const(number)
            raise NotLifted("a symbolic number")
        self._seen += 1
        if self._seen > _REACH:
            raise NotLifted("too large")
        rule = RULES.get(node.target) if node.op in ("call_function", "call_method") else None
        if rule is None:
            return self.leaf(scope, node, index)
        try:
            found = rule(self, scope, node, index)
        except (NotLifted, ExpressionError):
            return self.leaf(scope, node, index)
        is_layout = rule in _LAYOUT
        if not is_layout and self.reads(found) and not _both(index):
            return self.leaf(scope, node, index)  # computed once a token, not once a pair
        return found

    def reads(self, expr: Expression) -> bool:
        return any(name in self.build.kinds for name in expr.variables)

    def leaf(self, scope: Scope, node: Node, index: Index) -> Expression:
        """A read of the tensor itself: a vector per token, without gradient."""
        if _both(index) or needs_grad(node):
            raise NotLifted(f"{node.name} is a value per query and key")
        if not all(self.build.nonnegative(i) for i in index):
            raise NotLifted("an index that may count from the end")
        if (scope, node) not in self.tensors:
            self.tensors.append((scope, node))
        name = f"t{self.tensors.index((scope, node))}"
        self.build.kinds[name] = _kind(node)
        return read(name, *(index or (const(0),)))

    def argument(self, scope: Scope, node: Node, item: Any, index: Index) -> Expression:
        """An operand of an element-wise call: broadcasting gives its index."""
        return self.element(scope, item, broadcast(item, index)) if is_tensor(item) else self.element(scope, item, ())


def _both(index: Index) -> bool:
    used = frozenset[str]().union(*(i.variables for i in index))
    return {"q", "k"} <= used


def _kind(node: Any) -> str:
    found = dtype(node)
    return "bool" if found is torch.bool else "float" if is_float(node) else "int"


def broadcast(item: Any, index: Index) -> Index:
    """The index into a tensor that broadcasts to a larger one."""
    sizes = shape(item)
    tail = index[len(index) - len(sizes) :]
    return tuple(const(0) if size == 1 else i for size, i in zip(sizes, tail, strict=True))


def _exact(node: Node) -> None:
    """Arithmetic is done in fp32, or in integers of at least 32 bits, by every printer: only there it is the model's."""
    if dtype(node) not in (torch.float32, torch.bool, *_INT64):
        raise NotLifted(f"arithmetic in {dtype(node)}")


_OPERATORS = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "floordiv",
    operator.mod: "mod",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
    operator.and_: "&",
    operator.or_: "|",
    operator.neg: "neg",
    operator.invert: "not",
    torch.abs: "abs",
    torch.maximum: "max",
    torch.minimum: "min",
    **dict.fromkeys((torch.floor_divide, "floor_divide"), "floordiv"),
    **dict.fromkeys((torch.remainder, "remainder"), "mod"),
}


@lifts(*_OPERATORS)
def _elementwise(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    _exact(node)
    op = _OPERATORS[node.target]
    if node.kwargs:
        raise NotLifted("keywords")
    args = [lifter.argument(scope, node, a, index) for a in node.args]
    if dtype(node) is torch.bool and op in ("*", "+", "max", "min"):
        op = "&" if op in ("*", "min") else "|"
    if op in ("&", "|", "not") and dtype(node) is not torch.bool:
        raise NotLifted("bits of integers")
    if op in _MIRRORED and any(_kind(a) == "float" and is_tensor(a) for a in node.args):
        _exact(next(a for a in node.args if is_float(a)))
    return lifter.build.make(op, *args)


@lifts(torch.div, "div", operator.truediv)
def _divided(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    rounding = node.kwargs.get("rounding_mode")
    args = [lifter.argument(scope, node, a, index) for a in node.args]
    if rounding == "floor" and _kind(node) == "int":
        return lifter.build.make("floordiv", *args)
    if rounding is not None:
        raise NotLifted(f"division rounded by {rounding}")
    _exact(node)
    return call("/", *args)


@lifts(torch.where)
def _where(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    condition, *values = (lifter.argument(scope, node, a, index) for a in node.args)
    return lifter.build.make("where", condition, *(_as(lifter, v, node) for v in values))


@lifts(torch.masked_fill)
def _filled(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    x, mask, fill = (lifter.argument(scope, node, a, index) for a in node.args)
    return lifter.build.make("where", mask, _as(lifter, fill, node), x)


def _as(lifter: Lifter, value: Expression, node: Node) -> Expression:
    """A value in the kind of `node`; a number in its dtype."""
    kind = _kind(node)
    if value.op == "const":
        number = {"bool": bool, "int": int, "float": float}[kind](value.value)
        if kind == "float" and math.isfinite(number):
            number = _rounded(number, dtype(node))
        return const(number)
    have = lifter.build.kind(value)
    if have == kind:
        return value
    if kind == "bool":
        return lifter.build.make("!=", value, 0)
    if have == "bool":
        one = {"int": 1, "float": 1.0}[kind]
        return lifter.build.make("where", value, one, type(one)(0))
    if kind == "float":
        return lifter.build.make("*", value, 1.0)
    raise NotLifted("a float cut to an integer")


def _rounded(number: float, kind: torch.dtype | None) -> float:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return torch.tensor(number, dtype=torch.float64).to(kind).item()


@lifts("to", "bool", "long", "int", "float")
def _cast(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    source = node.args[0]
    if not is_tensor(source) or (is_float(source) and is_float(node) and dtype(source) is not dtype(node)):
        raise NotLifted("a float rounded to another dtype")
    if _kind(node) == "int" and dtype(node) not in _INT64:
        raise NotLifted(f"a cast to {dtype(node)}")
    if _kind(source) == "int" and is_float(node):
        _exact(node)
    return _as(lifter, lifter.element(scope, source, index), node)


@lifts(torch.arange)
def _arange(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    given = [*node.args, *(node.kwargs[n] for n in ("start", "end", "step") if n in node.kwargs)]
    numbers = [settled(a.meta.get("example_value")) if isinstance(a, Node) else a for a in given]
    start, step = (numbers[0] if len(numbers) > 1 else 0), (numbers[2] if len(numbers) > 2 else 1)
    if not isinstance(start, int) or not isinstance(step, int):
        raise NotLifted("positions that do not start at a number")
    build = lifter.build
    return _as(lifter, build.make("+", build.make("*", index[0], step), start), node)


_FILLS: dict[Any, int] = {
    **dict.fromkeys((torch.ones, "new_ones", torch.ones_like), 1),
    **dict.fromkeys((torch.zeros, "new_zeros", torch.zeros_like), 0),
}


@lifts(*_FILLS, torch.full, torch.full_like, "new_full", torch.tensor, torch.scalar_tensor)
def _constant(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    if node.target in _FILLS:
        return _as(lifter, const(_FILLS[node.target]), node)
    position = 0 if node.target in (torch.tensor, torch.scalar_tensor) else 2 if node.target == "new_full" else 1
    value = node.args[position] if len(node.args) > position else node.kwargs.get("fill_value")
    return _as(lifter, lifter.element(scope, value, ()), node)


@lifts(torch.tril, torch.triu, "tril", "triu")
def _triangle(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    x, diagonal = Arguments(node, "input", ("diagonal", 0)).take("input", "diagonal")
    if not isinstance(diagonal, int) or not isinstance(x, Node):
        raise NotLifted("a symbolic diagonal")
    op = "<=" if "tril" in str(getattr(node.target, "__name__", node.target)) else ">="
    build = lifter.build
    kept = build.make(op, build.make("-", index[-1], index[-2]), diagonal)
    return build.make("where", kept, lifter.element(scope, x, index), _as(lifter, const(0), node))


@lifts(torch.nn.functional.pad)
def _padded(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    """More columns in front of or behind the last dim."""
    found = Arguments(node, "input", "pad", ("mode", "constant"), ("value", None))
    x, pad, mode, value = found.take("input", "pad", "mode", "value")
    if mode != "constant" or len(pad) != 2 or not isinstance(pad[0], int) or pad[0] < 0:
        raise NotLifted("padding")
    build, (*lead, i) = lifter.build, index
    source = build.make("-", i, pad[0])
    inside = build.make(">=", source, 0)
    if pad[1] != 0:
        width = shape(x)[-1]
        if not isinstance(width, int):
            raise NotLifted("padding behind a symbolic length")
        inside = build.make("&", inside, build.make("<", source, width))
    outside = _as(lifter, const(0 if value is None else value), node)
    return build.make("where", inside, lifter.element(scope, x, (*lead, source)), outside)


@lifts(torch.diff, "diff")
def _differences(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    """Steps of positions along the last dim, as packed sequences are found by."""
    found = Arguments(node, "input", ("n", 1), ("dim", -1), "prepend", "append")
    x, n, dim, prepend, append = found.take("input", "n", "dim", "prepend", "append")
    if n != 1 or dim not in (-1, len(index) - 1) or append is not None or _kind(node) != "int":
        raise NotLifted("differences")
    build, (*lead, i) = lifter.build, index
    if prepend is None:
        after, before = build.make("+", i, 1), i
        return build.make("-", *(lifter.element(scope, x, (*lead, at)) for at in (after, before)))
    if shape(prepend)[-1] != 1:
        raise NotLifted("differences behind several values")
    step = build.make("-", *(lifter.element(scope, x, (*lead, at)) for at in (i, build.make("-", i, 1))))
    first = build.make("-", lifter.element(scope, x, (*lead, const(0))), lifter.element(scope, prepend, (*lead, const(0))))
    return build.make("where", build.make("==", i, 0), first, step)


@lifts(torch.cumsum, "cumsum")
def _running_sum(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    """Only that of zeros."""
    term = lifter.element(scope, node.args[0], index)
    if term.op != "const" or term.value != 0:
        raise NotLifted("a running sum")
    return _as(lifter, const(0), node)


# ---- layout: the index moves ----------------------------------------------------------------------------------------


@lifts("expand", torch.ops.aten.expand.default, torch.broadcast_to, "broadcast_to", "expand_as")
def _expanded(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    return lifter.element(scope, node.args[0], broadcast(node.args[0], index))


@lifts("contiguous", "clone", torch.clone, "detach", torch.detach)
def _same(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    return lifter.element(scope, node.args[0], index)


@lifts(torch.permute, torch.t)
def _permuted(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    order = node.args[1] if node.target is torch.permute else (1, 0)
    moved = [const(0)] * len(index)
    for i, d in zip(index, order, strict=True):  # type: ignore[arg-type]
        moved[d] = i
    return lifter.element(scope, node.args[0], tuple(moved))


@lifts(torch.unsqueeze, "unsqueeze")
def _unsqueezed(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    dim = Arguments(node, "input", "dim")["dim"] % len(index)
    return lifter.element(scope, node.args[0], index[:dim] + index[dim + 1 :])


@lifts(torch.reshape, torch.squeeze, "squeeze")
def _reshaped(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    """Only dims of size one come and go."""
    source = node.args[0]
    before, after = shape(source), shape(node)
    kept = [i for i, s in zip(index, after, strict=True) if s != 1]
    if not same_shape([s for s in before if s != 1], [s for s in after if s != 1]):
        raise NotLifted("a reshape")
    return lifter.element(scope, source, tuple(const(0) if s == 1 else kept.pop(0) for s in before))


@lifts(operator.getitem)
def _item(lifter: Lifter, scope: Scope, node: Node, index: Index) -> Expression:
    source, key = node.args
    if not is_tensor(source):
        raise NotLifted("a piece of several")
    keys = list(key) if isinstance(key, (tuple, list)) else [key]
    if keys and all(is_tensor(k) for k in keys):  # x[i, j] with index tensors that broadcast
        if len(keys) != rank(source) or any(_kind(k) != "int" for k in keys):
            raise NotLifted("a partial gather")
        found = tuple(lifter.element(scope, k, broadcast(k, index)) for k in keys)
        if not all(lifter.build.nonnegative(i) for i in found):
            raise NotLifted("an index that may count from the end")
        return lifter.element(scope, source, found)
    if Ellipsis in [k for k in keys if not isinstance(k, Node)]:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        used = sum(k is not None and k is not Ellipsis for k in keys)
        keys[at : at + 1] = [slice(None)] * (rank(source) - used)
    keys += [slice(None)] * (rank(source) - sum(k is not None for k in keys))
    remaining, moved = list(index), []
    for k in keys:
        if k is None:
            remaining.pop(0)
        elif isinstance(k, slice):
            start = 0 if k.start is None else settled(_number(k.start))
            if k.step not in (None, 1) or not isinstance(start, int) or start < 0:
                raise NotLifted("a slice")
            moved.append(lifter.build.make("+", remaining.pop(0), start))
        elif isinstance(k, int) and k >= 0:
            moved.append(const(k))
        else:
            raise NotLifted("an index")
    return lifter.element(scope, source, tuple(moved))


def _number(item: Any) -> Any:
    return item.meta.get("example_value") if isinstance(item, Node) else item


_LAYOUT = {_expanded, _same, _permuted, _unsqueezed, _reshaped, _item}


def renamed(lifter: Lifter, exprs: list[Expression]) -> tuple[list[Expression], tuple[tuple[Scope, Node], ...]]:
    """The expressions with their reads numbered from t0 in order of appearance, and the tensors behind those."""
    used = sorted({n for e in exprs for n in e.variables if n in lifter.build.kinds}, key=lambda n: int(n[1:]))
    names = {n: f"t{i}" for i, n in enumerate(used)}
    return [substitute(e, names) for e in exprs], tuple(lifter.tensors[int(n[1:])] for n in used)
