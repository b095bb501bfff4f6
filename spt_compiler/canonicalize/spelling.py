"""Methods, operators, layout and casts: one spelling each."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..graph import Arguments, describe, dtype, is_float, is_tensor, mutated_arguments, rank, same_shape, same_size, shape, value
from .editor import FILLS, FOLDABLE, PURE, Editor, rule

# One argument: canonical function -> other spellings (strings are methods).
_UNARY: dict[Callable, tuple] = {
    torch.exp: ("exp",),
    torch.log: ("log",),
    torch.log1p: ("log1p", torch.special.log1p),
    torch.expm1: ("expm1", torch.special.expm1),
    torch.sqrt: ("sqrt",),
    torch.rsqrt: ("rsqrt",),
    torch.abs: ("abs", "absolute", "__abs__", torch.absolute, operator.abs),
    torch.sign: ("sign",),
    torch.floor: ("floor",),
    torch.erf: ("erf", torch.special.erf),
    torch.tanh: ("tanh", F.tanh),
    torch.sigmoid: ("sigmoid", F.sigmoid, torch.special.expit),
    torch.square: ("square",),
    torch.sin: ("sin",),
    torch.cos: ("cos",),
    torch.reciprocal: ("reciprocal",),
    operator.neg: ("neg", "negative", torch.neg, torch.negative),
    F.relu: ("relu", torch.relu),
    F.silu: (),
}

# Two arguments: canonical operator -> other spellings.
_BINARY: dict[Callable, tuple] = {
    operator.mul: ("mul", "multiply", "__mul__", "__rmul__", torch.mul, torch.multiply),
    operator.pow: ("pow", torch.pow),
    operator.lt: ("lt", "less", torch.lt, torch.less),
    operator.le: ("le", "less_equal", torch.le, torch.less_equal),
    operator.gt: ("gt", "greater", torch.gt, torch.greater),
    operator.ge: ("ge", "greater_equal", torch.ge, torch.greater_equal),
    operator.eq: ("eq", "__eq__", torch.eq),
    operator.ne: ("ne", "not_equal", "__ne__", torch.ne, torch.not_equal),
    torch.maximum: ("maximum",),
    torch.minimum: ("minimum",),
}
_SUMS: dict[Callable, tuple] = {
    operator.add: ("add", "__add__", "__radd__", torch.add),
    operator.sub: ("sub", "subtract", torch.sub, torch.subtract),
}
_QUOTIENTS = ("div", "divide", "true_divide", torch.div, torch.divide, torch.true_divide)
_LOGICAL: dict[Callable, tuple] = {
    operator.and_: ("logical_and", "bitwise_and", "__and__", torch.logical_and, torch.bitwise_and),
    operator.or_: ("logical_or", "bitwise_or", "__or__", torch.logical_or, torch.bitwise_or),
    operator.invert: ("logical_not", "bitwise_not", torch.logical_not, torch.bitwise_not),
}
_SPELLING: dict[Any, Callable] = {
    alias: name for table in (_UNARY, _BINARY, _SUMS, _LOGICAL) for name, aliases in table.items() for alias in aliases
}

# Canonical calls that act on each number by itself.
ELEMENTWISE = (*_UNARY, *_BINARY, *_SUMS, *_LOGICAL)

# Functions of torch whose `input` is not their first argument.
_INPUT_BEHIND = {torch.where, torch.searchsorted, torch.polygamma}


def place_inputs(graph: fx.Graph) -> None:
    """torch.exp(input=x) -> torch.exp(x): rules and patterns read the first argument by its position."""
    for node in graph.nodes:
        if node.op != "call_function" or node.args or "input" not in node.kwargs or node.target in _INPUT_BEHIND:
            continue
        name = getattr(node.target, "__name__", "")
        if node.target in (getattr(torch, name, None), getattr(F, name, None)):
            node.args = (node.kwargs["input"],)
            node.kwargs = {k: a for k, a in node.kwargs.items() if k != "input"}


@rule(*(a for aliases in _UNARY.values() for a in aliases), F.relu, F.silu)
def spell_unary(e: Editor, node: fx.Node) -> fx.Node | None:
    """x.exp() -> torch.exp(x)."""
    if not is_tensor(node.args[0] if node.args else None) or mutated_arguments(node) or "out" in node.kwargs:
        return None
    return e.retarget(node, _SPELLING.get(node.target, node.target), node.args[:1])


@rule(*(a for aliases in _BINARY.values() for a in aliases), torch.maximum, torch.minimum)
def spell_binary(e: Editor, node: fx.Node) -> fx.Node | None:
    """x.mul(y) -> x * y."""
    found = Arguments(node, "input", "other")
    if not found.valid:
        return None
    return e.retarget(node, _SPELLING.get(node.target, node.target), found.take("input", "other"))


@rule(torch.max, torch.min, "max", "min")
def spell_extremum(e: Editor, node: fx.Node) -> fx.Node | None:
    """torch.max(x, y) of two tensors -> torch.maximum."""
    if len(node.args) != 2 or node.kwargs or not all(map(is_tensor, node.args)):
        return None
    target = torch.maximum if node.target in (torch.max, "max") else torch.minimum
    return e.retarget(node, target, node.args)


@rule(*(a for aliases in _SUMS.values() for a in aliases))
def spell_sum(e: Editor, node: fx.Node) -> fx.Node | None:
    """torch.add(x, y, alpha=a) -> x + a * y."""
    found = Arguments(node, "input", "other", ("alpha", 1))
    if not found.valid or not is_tensor(node):
        return None
    x, y, alpha = found.take("input", "other", "alpha")
    if isinstance(alpha, (int, float)) and alpha != 1:
        return e.call(_SPELLING[node.target], x, e.call(operator.mul, y, alpha))
    return e.retarget(node, _SPELLING[node.target], (x, y)) if isinstance(alpha, (int, float)) else None


@rule("addcmul", torch.addcmul)
def spell_addcmul(e: Editor, node: fx.Node) -> fx.Node | None:
    """torch.addcmul(b, x, y, value=a) -> b + a * x * y."""
    found = Arguments(node, "input", "tensor1", "tensor2", ("value", 1))
    b, x, y, factor = found.take("input", "tensor1", "tensor2", "value")
    if not found.valid or not isinstance(factor, (int, float)):
        return None
    product = e.call(operator.mul, x, y)
    return e.call(operator.add, b, product if factor == 1 else e.call(operator.mul, product, factor))


@rule(torch.rsub, "rsub")
def spell_reversed_difference(e: Editor, node: fx.Node) -> fx.Node | None:
    """torch.rsub(x, y) -> y - x."""
    found = Arguments(node, "input", "other", ("alpha", 1))
    return e.retarget(node, operator.sub, found.take("other", "input")) if found.valid and found["alpha"] == 1 else None


@rule(*_QUOTIENTS)
def spell_quotient(e: Editor, node: fx.Node) -> fx.Node | None:
    """torch.div(x, y) -> x / y."""
    found = Arguments(node, "input", "other", "rounding_mode")
    if not found.valid or found["rounding_mode"] is not None:
        return None
    return e.retarget(node, operator.truediv, found.take("input", "other"))


@rule(*(a for aliases in _LOGICAL.values() for a in aliases))
def spell_logical(e: Editor, node: fx.Node) -> fx.Node | None:
    """torch.logical_and(a, b) of bool tensors -> a & b."""
    if node.kwargs or any(dtype(a) is not torch.bool for a in node.args):
        return None
    return e.retarget(node, _SPELLING[node.target], node.args)


@rule("clamp", "clip", torch.clamp, torch.clip, "clamp_min", torch.clamp_min, "clamp_max", torch.clamp_max)
def spell_clamp(e: Editor, node: fx.Node) -> fx.Node | None:
    """x.clamp_min(a) -> torch.clamp(x, a, None)."""
    name = getattr(node.target, "__name__", node.target)
    signature = {"clamp_min": ("input", "min"), "clamp_max": ("input", "max")}.get(name, ("input", "min", "max"))
    found = Arguments(node, *signature)
    if not found.valid:
        return None
    low, high = (found.values.get(k) for k in ("min", "max"))
    return e.retarget(node, torch.clamp, (found["input"], low, high))


@rule(F.gelu)
def spell_gelu(e: Editor, node: fx.Node) -> fx.Node | None:
    """F.gelu(x, approximate="none") -> F.gelu(x)."""
    found = Arguments(node, "input", ("approximate", "none"))
    if not found.valid:
        return None
    kind = found["approximate"]
    return e.retarget(node, F.gelu, (found["input"],), {} if kind == "none" else {"approximate": kind})


@rule(
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    torch.masked_fill,
    torch.where,
    torch.maximum,
    torch.clamp,
)
def fold_numbers(e: Editor, node: fx.Node) -> fx.Node | None:
    """A tensor that the graph fills with one number, 0-d or what a mask chooses, next to a larger tensor -> the number."""
    if not is_float(node) or not rank(node):
        return None
    start = 1 if node.target in (torch.masked_fill, torch.where) else 0
    args = list(node.args)
    for i, a in enumerate(args[start:], start):
        is_number = isinstance(a, fx.Node) and (rank(a) == 0 or node.target is torch.where)
        if is_number and (number := e.constant(a)) is not None:
            args[i] = number
    if args == list(node.args) or not any(is_float(a) and rank(a) for a in args):
        return None  # between numbers alone, torch's default dtype would decide
    if node.target is torch.maximum:
        tensors = [a for a in args if isinstance(a, fx.Node)]
        bound = next((a for a in args if not isinstance(a, fx.Node)), None)
        return e.call(torch.clamp, tensors[0], bound, None) if len(tensors) == 1 else None
    return e.call(node.target, *args, **node.kwargs)


EXPANDS = ("expand", "expand_as", "broadcast_to", torch.broadcast_to)


@rule(
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.and_,
    operator.or_,
    torch.masked_fill,
    torch.where,
)
def broadcasting_expands(e: Editor, node: fx.Node) -> fx.Node | None:
    """scores + mask.expand_as(scores) -> scores + mask: broadcasting does the same, and the mask reads no scores."""
    expanded = [a for a in node.args if is_tensor(a) and a.target in EXPANDS and is_tensor(a.args[0])]
    others = [a for a in node.args if is_tensor(a) and a not in expanded]
    if not e.same_grad(node, *expanded) or not expanded or not any(same_shape(shape(a), shape(node)) for a in others):
        return None
    return e.call(node.target, *(a.args[0] if a in expanded else a for a in node.args), **node.kwargs)


@rule(operator.truediv)
def divide_by_power_of_two(e: Editor, node: fx.Node) -> fx.Node | None:
    """x / 8 -> x * 0.125: one spelling where it is the same number."""
    x, divisor = node.args
    if not is_float(x) or isinstance(divisor, bool) or not isinstance(divisor, (int, float)):
        return None
    if divisor == 0 or not math.isfinite(divisor) or abs(math.frexp(divisor)[0]) != 0.5:
        return None
    return e.retarget(node, operator.mul, (x, 1.0 / divisor))


# ---------------------------------------------------------------------------------------------------------------------
# Layout and casts
# ---------------------------------------------------------------------------------------------------------------------


@rule("view", "reshape", torch.reshape, "flatten", torch.flatten, "unflatten", torch.unflatten, "view_as", "reshape_as")
def spell_reshape(e: Editor, node: fx.Node) -> fx.Node | None:
    """view, flatten, unflatten -> torch.reshape, with every static size written out; no-ops and chains collapse."""
    x = node.args[0] if node.args else None
    if (
        not is_tensor(x)
        or dtype(node) is not dtype(x)
        or (len(node.args) > 1 and isinstance(node.args[1], torch.dtype))
    ):
        return None
    if same_shape(shape(node), shape(x)) and not e.is_returned_twice(node, x):
        return x
    sizes = shape(node)
    if all(isinstance(s, int) for s in sizes):
        target: tuple = sizes
    elif node.target in ("view", "reshape", torch.reshape) and len(node.args) > 1 and not node.kwargs:
        rest = node.args[1:]
        if len(rest) == 1 and isinstance(rest[0], fx.Node) and isinstance(rest[0].meta.get("example_value"), tuple):
            rest = tuple(s if isinstance(s, int) else e.call(operator.getitem, rest[0], i) for i, s in enumerate(sizes))
        given = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)
        if len(given) != len(sizes):
            return None
        target = tuple(s if isinstance(s, int) else t for s, t in zip(sizes, given, strict=True))
    elif node.target in ("view_as", "reshape_as") and is_tensor(other := node.args[-1]):
        target = tuple(e.size(other, i) for i in range(len(sizes)))
    elif node.target in ("flatten", torch.flatten):
        start, end = (d % rank(x) for d in Arguments(node, "input", ("start_dim", 0), ("end_dim", -1)).take("start_dim", "end_dim"))
        kept = [e.size(x, i) for i in range(rank(x)) if not start <= i <= end]
        if any(size in e.created for size in kept):
            return None  # who reads its sizes looks like one more reader of `x`
        joined = sizes[start] if isinstance(sizes[start], int) else -1
        target = (*kept[:start], joined, *kept[start:])
    else:
        return None
    if (x.target is torch.reshape or added_dim(x) is not None) and e.same_grad(node, x):
        return e.call(torch.reshape, x.args[0], target)
    return e.retarget(node, torch.reshape, (x, target))


_TRANSPOSES = ("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)


@rule(*_TRANSPOSES, "permute", torch.permute, "movedim", torch.movedim, "t", torch.t, getattr)
def spell_permute(e: Editor, node: fx.Node) -> fx.Node | None:
    """transpose, .T, .mT, movedim -> torch.t (2-d) or torch.permute; chains and identities collapse."""
    x = node.args[0] if node.args else None
    if not is_tensor(x) or not is_tensor(node):
        return None
    order = _permutation(node, rank(x))
    if order is None:
        return None
    while x.target in (torch.permute, torch.t) and e.same_grad(node, x):
        inner = tuple(x.args[1]) if x.target is torch.permute else (1, 0)
        order = tuple(inner[i] for i in order)
        x = x.args[0]
    if order == tuple(range(len(order))):
        return None if e.is_returned_twice(node, x) else x
    target, args = (torch.t, (x,)) if order == (1, 0) else (torch.permute, (x, order))
    return e.retarget(node, target, args) if x is node.args[0] else e.call(target, *args)


def _permutation(node: fx.Node, dims: int) -> tuple[int, ...] | None:
    rest = node.args[1:]
    order = list(range(dims))
    if node.target is getattr:
        if rest == ("T",) or (rest == ("mT",) and dims == 2):
            return tuple(reversed(order))
        return (*order[:-2], dims - 1, dims - 2) if rest == ("mT",) and dims > 1 else None
    name = getattr(node.target, "__name__", node.target)
    if name == "t":
        return tuple(reversed(order))
    if name == "permute":
        given = node.kwargs.get("dims", rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest)
        return tuple(d % dims for d in given) if len(given) == dims else None
    if name == "movedim":
        found = Arguments(node, "input", "source", "destination")
        source, destination = found.take("source", "destination")
        if not found.valid or not isinstance(source, int) or not isinstance(destination, int):
            return None
        order.insert(destination % dims, order.pop(source % dims))
        return tuple(order)
    names = {"transpose": ("dim0", "dim1"), "swapdims": ("dim0", "dim1"), "swapaxes": ("axis0", "axis1")}[name]
    found = Arguments(node, "input", *names)
    a, b = found.take(*names)
    if not found.valid or not isinstance(a, int) or not isinstance(b, int):
        return None
    order[a], order[b] = order[b], order[a]
    return tuple(order)


@rule("select", torch.select)
def spell_select(e: Editor, node: fx.Node) -> fx.Node | None:
    """x.select(1, i) -> x[:, i]."""
    found = Arguments(node, "input", "dim", "index")
    x, dim, index = found.take("input", "dim", "index")
    if not found.valid or not isinstance(dim, int) or not isinstance(index, int) or not rank(x):
        return None
    return e.retarget(node, operator.getitem, (x, _at(dim % rank(x), index)))


def _at(dim: int, index: int | slice) -> tuple[Any, ...]:
    return (*[slice(None)] * dim, index)


@rule("squeeze", torch.squeeze, operator.getitem)
def one_of_a_dim(e: Editor, node: fx.Node) -> fx.Node | None:
    """x.chunk(n, d)[i].squeeze(d), x.narrow(d, i, 1)[..., 0], x.movedim(d, 0)[i], x.movedim(d, 0).unbind(0)[i] -> x[..., i].

    And x.unsqueeze(d).squeeze(d) -> x.
    """
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or not is_tensor(node) or not e.same_grad(node, x):
        return None
    if not is_tensor(x):
        found = Arguments(x, "input", ("dim", 0))
        index, dim, x = node.args[1], found["dim"], found["input"]
        if x is None or describe(node.args[0]).strip(".") != "unbind" or x.target is not torch.permute:
            return None
        if not e.same_grad(node, x):
            return None
    elif node.target is operator.getitem:
        dim, index = one_index(node)
    else:
        dim, index = Arguments(node, "input", "dim")["dim"], 0
    if not isinstance(dim, int) or not isinstance(index, int) or not rank(x):
        return None
    dim %= rank(x)
    if index in (0, -1) and added_dim(x) == dim:
        return x.args[0]
    if x.target is torch.permute:
        order = tuple(x.args[1])
        rest = [i for i in order if i != order[dim]]
        return e.call(operator.getitem, x.args[0], _at(order[dim], index)) if rest == sorted(rest) else None
    if not same_size(shape(x)[dim], 1) or index not in (0, -1):
        return None
    source, along, start = piece(e, x)
    return None if source is None or along != dim else e.call(operator.getitem, source, _at(dim, start))


def added_dim(x: fx.Node) -> int | None:
    """The dim of size one that a call adds and does no more: x.unsqueeze(d), x[:, None]."""
    if x.target in ("unsqueeze", torch.unsqueeze):
        dim = Arguments(x, "input", "dim")["dim"]
        return dim % rank(x) if isinstance(dim, int) else None
    keys = x.args[1] if x.target is operator.getitem and isinstance(x.args[1], tuple) else ()
    full = slice(None, None, None)
    if keys.count(None) != 1 or any(k is not None and k is not Ellipsis and k != full for k in keys):
        return None
    at = keys.index(None)
    return at if Ellipsis not in keys[:at] else rank(x) - (len(keys) - at)


def one_index(node: fx.Node) -> tuple[int | None, Any]:
    """(dim, index) of x[..., index, :], however the dims around it are written; (None, None) of other indexing."""
    keys = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]  # type: ignore[arg-type]
    full, dims = slice(None), rank(node.args[0])
    at = next((i for i, k in enumerate(keys) if k is Ellipsis), len(keys))
    keys[at : at + 1] = [full] * (dims - len([k for k in keys if k is not Ellipsis]))
    plain = len(keys) == dims and not any(k is None or isinstance(k, (fx.Node, bool)) for k in keys)
    found = [i for i, k in enumerate(keys) if k != full] if plain else []
    return (found[0], keys[found[0]]) if len(found) == 1 else (None, None)


def piece(e: Editor, x: fx.Node) -> tuple[Any, int, int]:
    """(source, dim, where it starts) of a part of a tensor along one dim, without steps; (None, 0, 0) of others."""
    nothing = None, 0, 0
    source = x.args[0] if x.args else None
    if x.target is operator.getitem and not is_tensor(source) and isinstance(source, fx.Node):
        pieces, index = source, x.args[1]
        if describe(pieces).strip(".") not in ("chunk", "split", "tensor_split") or not pieces.args or not e.same_grad(x, pieces):
            return nothing
        source, dim = Arguments(pieces, "input", "sizes", ("dim", 0)).take("input", "dim")
        if not isinstance(dim, int) or not isinstance(index, int) or index < 0:
            return nothing
        before = [value.shape[dim] for value in pieces.meta["example_value"][:index]]
        return (source, dim % rank(source), sum(before)) if all(isinstance(s, int) for s in before) else nothing
    if x.target is operator.getitem:
        along, key = one_index(x) if is_tensor(source) else (None, None)
        start = key.start or 0 if isinstance(key, slice) and key.step in (None, 1) else None
    else:
        name = describe(x).strip(".")
        source, along, start = Arguments(x, "input", "dim", "start", "length").take("input", "dim", "start")
        start = start if name == "narrow" else None
    if not isinstance(along, int) or not isinstance(start, int) or not rank(source):
        return nothing
    size = shape(source)[along]
    if start < 0 and isinstance(size, int):
        start = max(start + size, 0)
    return source, along % rank(source), start


_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.hstack, torch.vstack, torch.dstack)


@rule(*_JOINS)
def spell_cat(e: Editor, node: fx.Node) -> fx.Node | None:
    """concat, hstack, vstack, dstack -> torch.cat(parts, d)."""
    stacks = {torch.hstack: 1, torch.vstack: 0, torch.dstack: 2}
    found = Arguments(node, "tensors") if node.target in stacks else Arguments(node, "tensors", ("dim", 0))
    parts, dim = found["tensors"], stacks.get(node.target, found.values.get("dim"))
    if not found.valid or not isinstance(parts, (tuple, list)) or not isinstance(dim, int) or not rank(node):
        return None
    if node.target in stacks:  # what has fewer dims gets more
        dim = 0 if rank(node) == 1 else dim
        if any(rank(p) != rank(node) for p in parts):
            return None
    return e.retarget(node, torch.cat, (parts, dim % rank(node)))


def joined_parts(node: Any) -> tuple[Sequence[fx.Node], int]:
    """(parts, dim) of a canonical torch.cat; ((), 0) of other calls."""
    is_cat = is_tensor(node) and node.target is torch.cat and len(node.args) == 2 and not node.kwargs
    return node.args if is_cat and isinstance(node.args[0], (tuple, list)) else ((), 0)


@rule(operator.getitem, "narrow", torch.narrow)
def part_of_joined(e: Editor, node: fx.Node) -> fx.Node | None:
    """torch.cat([x, y], d).chunk(2, d)[1] -> y, torch.stack([x, y], d)[..., 1, :] -> y; a slice of x or y where it is less.

    (A part that nothing with a gradient reads has none afterwards, where it had one of zeros.)
    """
    if not is_tensor(node):
        return None
    if node.target is operator.getitem and (stacked := _of_stack(e, node)) is not None:
        return stacked
    joined, dim, start = piece(e, node)
    parts, along = joined_parts(joined)
    if not parts or along != dim or not e.same_grad(node, joined):
        return None
    if any(u.op == "output" for u in node.users):
        return None  # who gets it may count on its strides
    length, at = shape(node)[dim], 0
    for part in parts:
        if rank(part) != rank(node) or not isinstance(width := shape(part)[dim], int) or not isinstance(length, int):
            return None
        if at <= start and start + length <= at + width:
            if length == width:
                return part
            return e.call(operator.getitem, part, _at(dim, slice(start - at, start - at + length)))
        at += width
    return None


def _of_stack(e: Editor, node: fx.Node) -> fx.Node | None:
    """The tensor of a stack that an index of its own dim, or unbind, gives back."""
    source, index = node.args
    if is_tensor(source):
        dim, index = one_index(node)
    elif isinstance(source, fx.Node) and describe(source).strip(".") == "unbind":
        unbound, dim = Arguments(source, "input", ("dim", 0)).take("input", "dim")
        source = unbound if e.same_grad(node, source) else None
    if not is_tensor(source) or source.target is not torch.stack or not isinstance(index, int) or not isinstance(dim, int):
        return None
    tensors, along = Arguments(source, "tensors", ("dim", 0)).take("tensors", "dim")
    if not isinstance(tensors, (tuple, list)) or (along - dim) % rank(source) or not e.same_grad(node, source):
        return None
    return tensors[index]


@rule(F.glu)
def glu_of_joined(e: Editor, node: fx.Node) -> fx.Node | None:
    """F.glu(torch.cat([x, y], d), d) -> x * sigmoid(y)."""
    joined, dim = Arguments(node, "input", ("dim", -1)).take("input", "dim")
    parts, along = joined_parts(joined)
    if len(parts) != 2 or (along - dim) % rank(joined) or e.is_written(joined) or not e.same_region(node, joined):
        return None
    x, gate = parts
    return e.call(operator.mul, x, e.call(torch.sigmoid, gate)) if same_shape(shape(x), shape(gate)) else None


_SPLITS_ALONG = {"hsplit": 1, "vsplit": 0, "dsplit": 2}


@rule(*_SPLITS_ALONG, *(getattr(torch, name) for name in _SPLITS_ALONG))
def spell_split(e: Editor, node: fx.Node) -> fx.Node | None:
    """x.dsplit(n) -> torch.tensor_split(x, n, 2)."""
    if len(node.args) != 2 or node.kwargs:
        return None
    dim = min(_SPLITS_ALONG[describe(node).strip(".")], rank(node.args[0]) - 1)  # hsplit of a vector
    return e.retarget(node, torch.tensor_split, (*node.args, dim))


@rule(torch._C._nn.pad)
def spell_pad(e: Editor, node: fx.Node) -> fx.Node | None:
    """The builtin behind F.pad -> F.pad."""
    return e.retarget(node, F.pad, node.args, dict(node.kwargs))


@rule("contiguous")
def drop_contiguous(e: Editor, node: fx.Node) -> fx.Node | None:
    """.contiguous() of what is provably contiguous -> nothing."""
    x = value(node.args[0])
    if x is None or len(node.args) > 1 or node.kwargs or e.is_returned_twice(node, node.args[0]):
        return None
    if not all(isinstance(s, int) for s in (*x.shape, *x.stride())):
        return None
    return node.args[0] if x.is_contiguous() else None


_CAST_METHODS = ("to", "type", "type_as", "float", "half", "double", "bfloat16", "bool", "long", "int")


@rule(*_CAST_METHODS)
def spell_cast(e: Editor, node: fx.Node) -> fx.Node | None:
    """.float(), .type(t), .type_as(y) -> .to(dtype) where the dtype changes, else nothing."""
    before, after = value(node.args[0]), value(node)
    if before is None or after is None or before.device != after.device or before.layout != after.layout:
        return None
    if node.kwargs.get("copy") or node.kwargs.get("memory_format") is not None or True in node.args[3:]:
        return None
    x = node.args[0]
    if before.dtype == after.dtype:
        return None if e.is_returned_twice(node, x) else x
    if x.target == "to" and len(x.args) == 2 and dtype(x.args[0]) is after.dtype and _holds(before.dtype, after.dtype):
        return x.args[0]  # there and back through a wider dtype
    return e.retarget(node, "to", (x, after.dtype))


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.tiny <= b.tiny


@rule(F.dropout, torch.dropout)
def spell_dropout(e: Editor, node: fx.Node) -> fx.Node | None:
    """Dropout that drops nothing (p = 0 or not training) -> nothing; it draws no random numbers either."""
    if node.target is torch.dropout:
        found = Arguments(node, "input", "p", ("train", True))
        x, p, training = found.take("input", "p", "train")
    else:
        found = Arguments(node, "input", ("p", 0.5), ("training", True), ("inplace", False))
        x, p, training = found.take("input", "p", "training")
    if not found.valid or mutated_arguments(node) or not isinstance(training, bool):
        return None
    if not training or (isinstance(p, (int, float)) and p == 0):
        return None if e.is_returned_twice(node, x) else x
    return e.retarget(node, F.dropout, (x, p, True))


PURE |= {
    *FILLS,
    *_UNARY,
    *_BINARY,
    *_SUMS,
    *_LOGICAL,
    *_SPELLING,
    *(torch.tensor, torch.scalar_tensor),
    *(
        operator.truediv,
        operator.getitem,
        torch.masked_fill,
        torch.where,
        torch.clamp,
        torch.matmul,
        F.linear,
        F.softmax,
        F.pad,
    ),
    *(torch.reshape, torch.permute, torch.t, torch.unsqueeze, "to", "contiguous", "view", "reshape", "max", "amax"),
    *EXPANDS,
    *("log_softmax", torch.log_softmax, F.log_softmax, torch.isnan, "isnan"),
    *(torch.logsumexp, "logsumexp", "unsqueeze", "squeeze", torch.squeeze, "mean", torch.mean, "sum", torch.sum),
    *("chunk", "split", "unbind", "tensor_split", "narrow", torch.stack, *_JOINS),
    *(torch.chunk, torch.split, torch.unbind, torch.tensor_split, torch.narrow),
    *(torch.max, torch.amax, torch.ops.aten.sym_size.int, "size", "detach", torch.detach, *_CAST_METHODS),
}

FOLDABLE |= {
    *(torch.tensor, torch.scalar_tensor, "to", *_CAST_METHODS),
    *(torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.abs, torch.reciprocal, "exp", "log", "sqrt", "rsqrt"),
    *(
        operator.neg,
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        operator.pow,
        "mul",
        "div",
        "add",
        "pow",
    ),
    *(torch.mul, torch.div, torch.add, torch.pow),
}
