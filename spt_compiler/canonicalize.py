"""Many spellings to one. Each rewrite keeps the meaning exactly; none knows what attention or an FFN is for.

What comes out (a pattern has to know these forms only):

    elementwise     operator.add/sub/mul/truediv/neg/pow/lt.../and_/or_/invert, torch.exp ..., F.relu, F.silu, F.gelu
    layout          torch.t (2-d), torch.permute, torch.reshape (static sizes written out); no no-ops
    casts           x.to(dtype), only where the dtype changes
    products        torch.matmul of activations; F.linear(x, w, b) for weights, torch.t on a weight stored (in, out)
    softmax         F.softmax(x, dim=-1 or a positive dim); a dtype argument is a cast before it
    masks           torch.masked_fill(x, mask, number), torch.where(mask, x, number)
    dropout         F.dropout(x, p, True) with p > 0, or nothing
    attention call  F.scaled_dot_product_attention(q, k, v, <only what differs from the default>)

Layout between two products around a softmax moves outside of them, so that scores and probabilities keep one rank;
nn.MultiheadAttention is opened. In-place calls become functional where no alias can see the difference.

A rewrite is checked by its type: the replacement must have the shape, dtype and device of what it replaces (computed
on fake tensors, without guards on symbolic sizes), else it is undone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import string
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .graph import (
    INPLACE_OPERATORS,
    Analysis,
    Arguments,
    dtype,
    inplace_flag,
    is_float,
    is_one_element,
    is_parameter,
    is_tensor,
    mutated_arguments,
    needs_grad,
    rank,
    same_shape,
    same_size,
    shape,
    storage,
    value,
)

log = logging.getLogger(__name__)

Rule = Callable[["Editor", fx.Node], "fx.Node | None"]
_RULES: dict[Any, list[Rule]] = {}

# Real graphs settle in three passes. A rule pair that undid each other would run on to here and no further.
_MAX_PASSES = 12

# A fill below this survives any addition of a score in the dtypes it applies to: s + c == c for |s| < 1e20.
_ABSORBING = -1e30

# How far to look along a chain of single users; scores and softmax are at most a dozen steps apart in real models.
_CHAIN = 32


def canonicalize(module: fx.GraphModule) -> None:
    """Rewrites `module` in place to the forms listed above; running it again changes nothing.

    Args:
        module: a copy of a Dynamo graph, nodes with `meta["example_value"]`. New nodes carry the metadata of the node
            that they replace, and their own example value.
    """
    editor = Editor(module)
    _expand_opaque(editor)
    _functionalize(editor)
    for _ in range(_MAX_PASSES):
        if not editor.run():
            break
    else:
        log.debug("canonicalisation did not settle after %d passes", _MAX_PASSES)
    module.graph.lint()
    module.recompile()


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers a rewrite for calls of these targets: functions, or method names as strings.

    A rule gets the editor and a node. It returns None (nothing to do), the node itself after `editor.retarget`, another
    node of the graph, or one built with `editor.call`; in the latter cases that takes the node's place.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            _RULES.setdefault(target, []).append(function)
        return function

    return register


class _Unknown(Exception):
    """An example value is missing or cannot be computed: the rewrite is not tried."""


class Editor:
    """Applies rules to one graph and keeps it typed."""

    def __init__(self, module: fx.GraphModule):
        self.module, self.graph = module, module.graph
        self.fake_mode = next((v.fake_mode for n in self.graph.nodes if isinstance(v := value(n), FakeTensor)), None)
        self._created: list[fx.Node] = []
        self._at: fx.Node | None = None
        self._written: set[int | None] = set()
        self._regions: dict[fx.Node, tuple] = {}
        self._constants: dict[fx.Node, Any] = {}

    # ---- running ------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """One pass over the graph; whether anything changed."""
        analysis = Analysis(self.module)
        self._written = {s for _, s in analysis.writes}
        self._regions = analysis.regions
        self._constants = {}
        changed = False
        for node in analysis.nodes:
            if node.op not in ("call_function", "call_method") or node._erased:
                continue
            # A rule may turn the node into one that another rule knows; a node settles after very few of them.
            for _ in range(8):
                replacement = next(filter(None, (self._try(r, node) for r in _RULES.get(node.target, ()))), None)
                if replacement is None:
                    break
                changed = True
                if replacement is not node:
                    if replacement not in self._regions:
                        self._regions[replacement] = self._regions.get(node, ())
                    node = replacement
                if node.op not in ("call_function", "call_method"):
                    break
        return changed

    def _try(self, rule_: Rule, node: fx.Node) -> fx.Node | None:
        self._created, self._at = [], node
        try:
            result = rule_(self, node)
            if result is None or (result is not node and not self._may_replace(node, result)):
                result = None
        except _Unknown:
            result = None
        if result is None:
            for created in reversed(self._created):
                if not created.users:
                    self.graph.erase_node(created)
            return None
        if result is not node:
            node.replace_all_uses_with(result)
            self.erase(node)
            for created in reversed(self._created):
                self.erase(created)
        return result

    def _may_replace(self, old: fx.Node, new: fx.Node) -> bool:
        a, b = value(old), value(new)
        if a is None or b is None:
            return False
        if a.dtype != b.dtype or a.device != b.device or not same_shape(a.shape, b.shape):
            return False
        if a.requires_grad and not b.requires_grad:
            return False
        if new not in self._created and any(u.op == "output" for u in old.users):
            return False  # a returned value stays a tensor of its own
        if self._written:
            touched = {storage(old), storage(new), *(storage(i) for c in self._created for i in c.all_input_nodes)}
            if None in self._written or touched & self._written:
                return False  # reading at another moment, or through another alias, could show
        return True

    def erase(self, node: fx.Node) -> None:
        """Erases a node without users, then what only it used, as far as those are known to be pure."""
        stack = [node]
        while stack:
            current = stack.pop()
            if current._erased or current.users:
                continue
            inputs = current.all_input_nodes
            self.graph.erase_node(current)
            stack.extend(i for i in inputs if i.target in _PURE and i.op in ("call_function", "call_method"))

    # ---- building -----------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call before the current node: of a function, or of a method if `target` is a string."""
        assert self._at is not None
        outcome = self.infer(target, args, kwargs, self._regions.get(self._at))
        with self.graph.inserting_before(self._at):
            op = "call_method" if isinstance(target, str) else "call_function"
            node = self.graph.create_node(op, target, args, kwargs)
        self._describe(node, self._at, outcome)
        self._created.append(node)
        return node

    def _describe(self, node: fx.Node, like: fx.Node, outcome: Any) -> None:
        node.meta.update(
            {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}
        )
        node.meta["example_value"] = outcome
        self._regions[node] = self._regions.get(like, ())

    def retarget(
        self, node: fx.Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None
    ) -> fx.Node | None:
        """Respells a call that keeps its value; None if it is spelled like this already."""
        kwargs = kwargs or {}
        op = "call_method" if isinstance(target, str) else "call_function"
        args = tuple(args)
        if (node.op, node.target) == (op, target) and _identical(node.args, args) and _identical(node.kwargs, kwargs):
            return None
        node.op, node.target, node.args, node.kwargs = op, target, args, kwargs
        return node

    def infer(self, target: Any, args: Any, kwargs: Any, region: tuple | None = None) -> Any:
        """What a call gives on the example values of its arguments. Raises `_Unknown` if that cannot be told."""

        def example(node: fx.Node) -> Any:
            if "example_value" not in node.meta:
                raise _Unknown
            return node.meta["example_value"]

        values, named = fx.map_arg((tuple(args), dict(kwargs)), example)
        try:
            with self.conditions(region):
                return (
                    getattr(values[0], target)(*values[1:], **named)
                    if isinstance(target, str)
                    else target(*values, **named)
                )
        except Exception as error:  # whatever a meta function raises: the rewrite is not possible
            raise _Unknown from error

    @contextlib.contextmanager
    def conditions(self, region: tuple | None = None) -> Iterator[None]:
        """The modes under which example values are computed: fake tensors, no new guards, the region's grad and autocast."""
        with contextlib.ExitStack() as stack:
            if self.fake_mode is not None:
                stack.enter_context(self.fake_mode)
                if self.fake_mode.shape_env is not None:
                    stack.enter_context(self.fake_mode.shape_env.suppress_guards())
            if region:
                stack.enter_context(torch.set_grad_enabled(region[0]))
                for device, kind in region[1]:
                    named = getattr(torch, str(kind).rpartition(".")[2], None) if kind != "None" else None
                    stack.enter_context(torch.autocast(device, dtype=named, enabled=named is not None))
            yield

    # ---- questions ----------------------------------------------------------------------------------------------

    def same_region(self, *nodes: fx.Node) -> bool:
        """Whether all nodes run under the same grad and autocast modes: only then may work move from one to the other."""
        regions = [self._regions.get(n) for n in nodes]
        return all(r == regions[0] for r in regions)

    def size(self, node: fx.Node, dim: int) -> Any:
        """A size as an argument: the int, or a node that reads the symbolic size."""
        found = shape(node)[dim]
        return found if isinstance(found, int) else self.call(torch.ops.aten.sym_size.int, node, dim % rank(node))

    def constant(self, node: Any) -> float | int | bool | None:
        """The number held by a 0-d tensor that the graph builds from numbers, or None."""
        if not isinstance(node, fx.Node):
            return node if isinstance(node, (int, float)) else None
        if node not in self._constants:
            self._constants[node] = self._fold(node)
        return self._constants[node]

    def _fold(self, node: fx.Node) -> float | int | bool | None:
        found = value(node)
        if found is None or found.dim() or found.requires_grad or node.target not in _FOLDABLE:
            return None
        if node.kwargs.get("device") is not None or node.kwargs.get("layout") is not None:
            kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")}
        else:
            kwargs = dict(node.kwargs)
        args = []
        for a in node.args:
            number = self.constant(a) if isinstance(a, fx.Node) else a
            if isinstance(a, fx.Node):
                if number is None or isinstance(a.meta.get("example_value"), torch.SymInt):
                    return None
                number = torch.tensor(number, dtype=dtype(a))
            elif isinstance(a, torch.device) or (isinstance(a, str) and node.target == "to"):
                continue
            args.append(number)
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            try:
                result = (
                    getattr(args[0], str(node.target))(*args[1:], **kwargs)
                    if node.op == "call_method"
                    else node.target(*args, **kwargs)
                )  # type: ignore[operator]
                return result.to(found.dtype).item()
            except (TypeError, ValueError, RuntimeError):
                return None


def _identical(a: Any, b: Any) -> bool:
    """Equality of arguments that tells 1 from 1.0 and True."""
    if type(a) is not type(b) and not (isinstance(a, (tuple, list)) and isinstance(b, (tuple, list))):
        return (
            isinstance(a, dict)
            and isinstance(b, dict)
            and a.keys() == b.keys()
            and all(_identical(a[k], b[k]) for k in a)
        )
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_identical(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_identical(a[k], b[k]) for k in a)
    return a is b or (not isinstance(a, fx.Node) and bool(a == b))


# ---------------------------------------------------------------------------------------------------------------------
# Names: methods, operators and aliases
# ---------------------------------------------------------------------------------------------------------------------

# One argument: canonical function -> other spellings (strings are methods).
_UNARY: dict[Callable, tuple] = {
    torch.exp: ("exp",),
    torch.log: ("log",),
    torch.log1p: ("log1p", torch.special.log1p),
    torch.expm1: ("expm1", torch.special.expm1),
    torch.sqrt: ("sqrt",),
    torch.rsqrt: ("rsqrt",),
    torch.abs: ("abs", "absolute", torch.absolute, operator.abs),
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
    operator.eq: ("eq", torch.eq),
    operator.ne: ("ne", "not_equal", torch.ne, torch.not_equal),
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
    """A 0-d tensor that the graph builds from numbers, next to a larger tensor -> the number."""
    if not is_float(node) or not rank(node):
        return None
    start = 1 if node.target in (torch.masked_fill, torch.where) else 0
    args = list(node.args)
    for i, a in enumerate(args[start:], start):
        if isinstance(a, fx.Node) and rank(a) == 0 and (number := e.constant(a)) is not None:
            args[i] = number
    if args == list(node.args):
        return None
    if node.target is torch.maximum:
        tensors = [a for a in args if isinstance(a, fx.Node)]
        bound = next((a for a in args if not isinstance(a, fx.Node)), None)
        return e.call(torch.clamp, tensors[0], bound, None) if len(tensors) == 1 else None
    return e.call(node.target, *args, **node.kwargs)


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
    if same_shape(shape(node), shape(x)) and not any(u.op == "output" for u in node.users):
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
    else:
        return None
    if x.target is torch.reshape:
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
    while x.target in (torch.permute, torch.t):
        inner = tuple(x.args[1]) if x.target is torch.permute else (1, 0)
        order = tuple(inner[i] for i in order)
        x = x.args[0]
    if order == tuple(range(len(order))):
        return x if not any(u.op == "output" for u in node.users) else None
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


@rule("contiguous")
def drop_contiguous(e: Editor, node: fx.Node) -> fx.Node | None:
    """.contiguous() of what is provably contiguous -> nothing."""
    x = value(node.args[0])
    if x is None or len(node.args) > 1 or node.kwargs or any(u.op == "output" for u in node.users):
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
        return x if not any(u.op == "output" for u in node.users) else None
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
        return x if not any(u.op == "output" for u in node.users) else None
    return e.retarget(node, F.dropout, (x, p, True))


# ---------------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------------

# What may stand between a Parameter and its use as a weight. getitem: rows of a fused projection.
_WEIGHT_LAYOUT = {torch.t, torch.permute, torch.reshape, operator.getitem, "to", "contiguous"}


def is_weight(node: Any) -> bool:
    """Whether `node` is a Parameter, seen through layout ops and casts only."""
    while isinstance(node, fx.Node) and not is_parameter(node):
        if node.target not in _WEIGHT_LAYOUT or not node.args:
            return False
        node = node.args[0]
    return isinstance(node, fx.Node)


@rule("matmul", "bmm", "mm", "__matmul__", torch.bmm, torch.mm, operator.matmul, torch.matmul)
def spell_matmul(e: Editor, node: fx.Node) -> fx.Node | None:
    """@, bmm, mm -> torch.matmul; with a 2-d weight on the right -> F.linear."""
    found = Arguments(node, "input", "other" if node.target in ("matmul", torch.matmul, "__matmul__") else "mat2")
    a, b = list(found.values.values())
    if not found.valid or rank(a) < 2 or rank(b) < 2:
        return None
    if rank(b) == 2 and is_weight(b) and not is_weight(a):
        return e.call(F.linear, a, _transposed(e, b))
    return e.retarget(node, torch.matmul, (a, b))


def _transposed(e: Editor, weight: fx.Node) -> fx.Node:
    return weight.args[0] if weight.target is torch.t else e.call(torch.t, weight)


@rule("addmm", torch.addmm)
def addmm_to_linear(e: Editor, node: fx.Node) -> fx.Node | None:
    """addmm(b, x, w) with a weight stored (in, out) -> F.linear(x, w.t(), b); of activations -> b + x @ y."""
    found = Arguments(node, "input", "mat1", "mat2", ("beta", 1), ("alpha", 1))
    b, x, w, beta, alpha = found.take("input", "mat1", "mat2", "beta", "alpha")
    if not found.valid:
        return None
    if is_weight(w) and beta == 1 and alpha == 1 and rank(b) == 1 and same_size(shape(b)[0], shape(w)[1]):
        return e.call(F.linear, x, _transposed(e, w), b)
    return _product_plus(e, x, w, b, beta, alpha)


@rule("baddbmm", torch.baddbmm)
def baddbmm_to_matmul(e: Editor, node: fx.Node) -> fx.Node | None:
    """baddbmm(bias, q, k, beta, alpha) -> matmul(q, k) * alpha + bias * beta; beta = 0 ignores the bias."""
    found = Arguments(node, "input", "batch1", "batch2", ("beta", 1), ("alpha", 1))
    b, x, y, beta, alpha = found.take("input", "batch1", "batch2", "beta", "alpha")
    return _product_plus(e, x, y, b, beta, alpha) if found.valid else None


def _product_plus(e: Editor, x: fx.Node, y: fx.Node, b: fx.Node, beta: Any, alpha: Any) -> fx.Node | None:
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
        return None
    product = e.call(torch.matmul, x, y)
    if alpha != 1:
        product = e.call(operator.mul, product, alpha)
    if beta == 0:
        return product
    return e.call(operator.add, product, b if beta == 1 else e.call(operator.mul, b, beta))


@rule(torch.einsum)
def einsum_to_matmul(e: Editor, node: fx.Node) -> fx.Node | None:
    """einsum of two operands with one summed index -> permute and matmul; of one operand without sums -> permute."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or node.kwargs or not all(map(is_tensor, operands)):
        return None
    parsed = _parse_einsum(equation, [rank(o) for o in operands])
    if parsed is None:
        return None
    terms, result = parsed
    if len(terms) == 1:
        if sorted(terms[0]) != sorted(result):
            return None
        return _permuted(e, operands[0], [terms[0].index(c) for c in result])
    if len(terms) != 2 or len(result) < 2:
        return None
    (a, b), (left, right) = terms, operands
    summed = [c for c in a if c in b and c not in result]
    if len(summed) != 1 or any(c not in result for c in set(a) ^ set(b)):
        return None
    # The operand that owns the second last index goes to the left: usually the product needs no permutation then.
    if result[-1] in a and result[-1] not in b:
        a, b, left, right = b, a, right, left
    rows = next((c for c in reversed(result) if c in a and c not in b), None)
    columns = next((c for c in reversed(result) if c in b and c not in a), None)
    if rows is None or columns is None:
        return None
    lead, inner = [c for c in result if c not in (rows, columns)], summed[0]
    x = _aligned(e, left, a, [*lead, rows, inner])
    y = _aligned(e, right, b, [*lead, inner, columns])
    order = [*lead, rows, columns]
    return _permuted(e, e.call(torch.matmul, x, y), [order.index(c) for c in result])


def _parse_einsum(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """(indices of each operand, indices of the result), with "..." spelled out; None for what is not plain."""
    text = equation.replace(" ", "")
    left, arrow, result = text.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(ranks):
        return None
    spare = [c for c in string.ascii_uppercase if c not in text]
    dots = {r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True) if "..." in t}
    if len(dots) > 1 or any(d < 0 for d in dots):
        return None
    filler = "".join(spare[: dots.pop()]) if dots else ""
    terms, result = [t.replace("...", filler) for t in terms], result.replace("...", filler)
    if any(len(t) != r or len(set(t)) != r for t, r in zip(terms, ranks, strict=True)) or len(set(result)) != len(
        result
    ):
        return None
    return terms, result


def _permuted(e: Editor, x: fx.Node, order: Sequence[int]) -> fx.Node:
    if list(order) == list(range(len(order))):
        return x
    return e.call(torch.t, x) if list(order) == [1, 0] else e.call(torch.permute, x, tuple(order))


def _aligned(e: Editor, x: fx.Node, indices: str, wanted: list[str]) -> fx.Node:
    """`x` permuted to the wanted indices, with a dim of size one for each that it lacks."""
    x = _permuted(e, x, [indices.index(c) for c in wanted if c in indices])
    for position, c in enumerate(wanted):
        if c not in indices:
            x = e.call(torch.unsqueeze, x, position)
    return x


@rule(F.linear)
def spell_linear(e: Editor, node: fx.Node) -> fx.Node | None:
    """F.linear(input=x, weight=w) -> F.linear(x, w); the bias only where there is one."""
    found = Arguments(node, "input", "weight", "bias")
    x, w, b = found.take("input", "weight", "bias")
    return e.retarget(node, F.linear, (x, w) if b is None else (x, w, b)) if found.valid else None


@rule(F.linear)
def linear_of_reshape(e: Editor, node: fx.Node) -> fx.Node | None:
    """linear(x.view(-1, d)) -> linear(x).view(...): a linear layer does not care about leading dims."""
    x = node.args[0]
    if x.target is not torch.reshape or not rank(x.args[0]) or not e.same_region(node, x):
        return None
    source, target = x.args[0], x.args[1]
    if not same_size(shape(source)[-1], shape(x)[-1]) or rank(source) < 2:
        return None
    width = shape(node)[-1]
    if not isinstance(width, int):
        return None
    return e.call(torch.reshape, e.call(F.linear, source, *node.args[1:]), (*target[:-1], width))


@rule(operator.add)
def bias_into_linear(e: Editor, node: fx.Node) -> fx.Node | None:
    """linear(x, w) + b with a 1-d parameter b -> linear(x, w, b)."""
    for product, bias in (node.args, node.args[::-1]):
        if not isinstance(product, fx.Node) or product.target is not F.linear or len(product.args) != 2:
            continue
        if len(product.users) != 1 or rank(bias) != 1 or not is_weight(bias) or not e.same_region(node, product):
            continue
        if dtype(bias) is dtype(product) and same_size(shape(bias)[0], shape(product)[-1]):
            return e.call(F.linear, *product.args, bias)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Softmax, masks, attention calls
# ---------------------------------------------------------------------------------------------------------------------


@rule("softmax", torch.softmax, F.softmax, torch.special.softmax)
def spell_softmax(e: Editor, node: fx.Node) -> fx.Node | None:
    """Every softmax -> F.softmax(x, dim=d), the last dim as -1; a dtype argument is a cast before it."""
    if node.target is F.softmax:
        found = Arguments(node, "input", "dim", ("_stacklevel", 3), "dtype")
    else:
        found = Arguments(node, "input", "dim", "dtype")
    x, dim, kind = found.take("input", "dim", "dtype")
    if not found.valid or not isinstance(dim, int) or not rank(x):
        return None
    dim = -1 if dim in (-1, rank(x) - 1) else dim % rank(x)
    if kind is not None and dtype(x) is not kind:
        return e.call(F.softmax, e.call("to", x, kind), dim=dim)
    return e.retarget(node, F.softmax, (x,), {"dim": dim})


@rule(F.softmax)
def drop_row_shift(e: Editor, node: fx.Node) -> fx.Node | None:
    """softmax(x - max(x)) over the same dim -> softmax(x), which subtracts the maximum itself."""
    shifted = node.args[0]
    if shifted.target is not operator.sub or not all(map(is_tensor, shifted.args)):
        return None
    x, row = shifted.args
    while isinstance(row, fx.Node) and row.target in ("detach", torch.detach):
        row = row.args[0]
    if row.target is operator.getitem and row.args[1] == 0:
        row = row.args[0]
    if row.target not in ("max", "amax", torch.max, torch.amax):
        return None
    found = Arguments(row, "input", "dim", ("keepdim", False))
    dim = found["dim"][0] if isinstance(found["dim"], (tuple, list)) and len(found["dim"]) == 1 else found["dim"]
    if found["input"] is not x or found["keepdim"] is not True or not isinstance(dim, int):
        return None
    if dim % rank(x) != node.kwargs["dim"] % rank(x):
        return None
    return e.call(F.softmax, x, dim=node.kwargs["dim"])


@rule("masked_fill", torch.masked_fill)
def spell_masked_fill(e: Editor, node: fx.Node) -> fx.Node | None:
    """x.masked_fill(m, c) -> torch.masked_fill(x, m, c)."""
    found = Arguments(node, "input", "mask", "value")
    return e.retarget(node, torch.masked_fill, found.take("input", "mask", "value")) if found.valid else None


@rule("where", torch.where)
def spell_where(e: Editor, node: fx.Node) -> fx.Node | None:
    """where(m, c, x) with a number c -> masked_fill(x, m, c); x.where(m, c) -> where(m, x, c)."""
    if node.target == "where":
        found = Arguments(node, "input", "condition", "other")
        a, m, b = found.take("input", "condition", "other")
    else:
        found = Arguments(node, "condition", "input", "other")
        m, a, b = found.take("condition", "input", "other")
    if not found.valid or dtype(m) is not torch.bool:
        return None
    number = e.constant(a)
    if number is not None and is_float(b) and is_float(node) and dtype(b) is dtype(node):
        return e.call(torch.masked_fill, b, m, number)
    return e.retarget(node, torch.where, (m, a, b))


_SDPA_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@rule(F.scaled_dot_product_attention)
def spell_sdpa(e: Editor, node: fx.Node) -> fx.Node | None:
    """F.scaled_dot_product_attention with q, k, v by position and the rest by keyword, defaults left out."""
    found = Arguments(node, "query", "key", "value", *_SDPA_DEFAULTS.items())
    if not found.valid:
        return None
    kwargs = {k: found[k] for k, default in _SDPA_DEFAULTS.items() if not _is_default(found[k], default)}
    return e.retarget(node, F.scaled_dot_product_attention, found.take("query", "key", "value"), kwargs)


def _is_default(found: Any, default: Any) -> bool:
    return not isinstance(found, (fx.Node, torch.SymInt, torch.SymFloat, torch.SymBool)) and (
        found is default or found == default
    )


# ---------------------------------------------------------------------------------------------------------------------
# Between two products around a softmax
# ---------------------------------------------------------------------------------------------------------------------

# Steps that act on each score by itself (the first tensor argument that is as large as the result carries the scores).
_PER_SCORE = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.neg,
    torch.masked_fill,
    torch.where,
    torch.tanh,
    torch.clamp,
    torch.maximum,
    torch.reshape,
    "to",
    "contiguous",
}


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _toward_softmax(node: fx.Node) -> list[fx.Node] | None:
    """The chain of single users from `node` to the softmax over the last dim that it ends in, or None."""
    chain: list[fx.Node] = []
    current: fx.Node | None = node
    while len(chain) < _CHAIN:
        current = _only_user(current)  # type: ignore[arg-type]
        if current is None:
            return None
        chain.append(current)
        if current.target is F.softmax:
            return chain if current.kwargs.get("dim") == -1 else None
        if current.target not in _PER_SCORE:
            return None
    return None


def _from_softmax(node: Any) -> bool:
    """Whether `node` is made of softmax probabilities by casts, dropout and reshapes only."""
    for _ in range(_CHAIN):
        if not isinstance(node, fx.Node):
            return False
        if node.target is F.softmax:
            return True
        if node.target not in (F.dropout, torch.reshape, "to", "contiguous"):
            return False
        node = node.args[0]
    return False


def _is_batch_reshape(node: Any) -> bool:
    """Whether `node` reshapes leading dims only and keeps the last two."""
    if not isinstance(node, fx.Node) or node.target is not torch.reshape:
        return False
    before, after = shape(node.args[0]), shape(node)
    return len(before) >= 2 and len(after) >= 2 and same_shape(before[-2:], after[-2:])


def _reshape_lead(e: Editor, x: fx.Node, lead: Sequence[Any]) -> fx.Node:
    """`x` with its leading dims replaced by `lead` and its last two kept."""
    return e.call(torch.reshape, x, (*lead, e.size(x, -2), e.size(x, -1)))


@rule(torch.reshape)
def split_batch_before_scores(e: Editor, node: fx.Node) -> fx.Node | None:
    """(q @ k).view(B, H, T, S) on its way to a softmax -> q.view(B, H, T, D) @ k.view(B, H, D, S)."""
    x = node.args[0]
    if not _is_batch_reshape(node) or x.target is not torch.matmul or len(x.users) != 1 or rank(node) <= rank(x):
        return None
    if not e.same_region(node, x) or _toward_softmax(node) is None:
        return None
    a, b = x.args
    if not same_shape(shape(a)[:-2], shape(x)[:-2]) or not same_shape(shape(b)[:-2], shape(x)[:-2]):
        return None
    lead = node.args[1][:-2]
    return e.call(torch.matmul, _reshape_lead(e, a, lead), _reshape_lead(e, b, lead))


@rule(torch.reshape)
def split_batch_before_steps(e: Editor, node: fx.Node) -> fx.Node | None:
    """f(scores, mask).view(B, H, T, S) on its way to a softmax -> f(scores.view(...), mask.view(...))."""
    x = node.args[0]
    if not _is_batch_reshape(node) or x.target not in _PER_SCORE - {torch.reshape} or len(x.users) != 1:
        return None
    if rank(node) <= rank(x) or not e.same_region(node, x) or _toward_softmax(node) is None:
        return None
    lead = node.args[1][:-2]
    source = shape(x)[:-2]

    def moved(argument: Any) -> Any:
        if not is_tensor(argument) or rank(argument) <= 2:
            return argument
        own = shape(argument)[:-2]
        if same_shape(own, source):
            return _reshape_lead(e, argument, lead)
        if all(isinstance(s, int) and s == 1 for s in own):
            return e.call(torch.reshape, argument, (e.size(argument, -2), e.size(argument, -1)))
        raise _Unknown

    return e.call(x.target, *(moved(a) for a in x.args))


@rule(F.softmax)
def softmax_before_reshape(e: Editor, node: fx.Node) -> fx.Node | None:
    """softmax(scores.view(B * H, T, S)) -> softmax(scores).view(B * H, T, S)."""
    x = node.args[0]
    if not _is_batch_reshape(x) or len(x.users) != 1 or node.kwargs["dim"] != -1 or not e.same_region(node, x):
        return None
    if rank(x.args[0]) < rank(x):
        return None
    return e.call(torch.reshape, e.call(F.softmax, x.args[0], dim=-1), x.args[1])


@rule(F.dropout, "to", "contiguous")
def step_before_reshape(e: Editor, node: fx.Node) -> fx.Node | None:
    """dropout(probabilities.view(...)) -> dropout(probabilities).view(...)."""
    x = node.args[0]
    if not _is_batch_reshape(x) or len(x.users) != 1 or not _from_softmax(x) or not e.same_region(node, x):
        return None
    return e.call(torch.reshape, e.call(node.target, x.args[0], *node.args[1:], **node.kwargs), x.args[1])


@rule(torch.matmul)
def product_before_reshape(e: Editor, node: fx.Node) -> fx.Node | None:
    """probabilities.view(B * H, T, S) @ v -> (probabilities @ v.view(B, H, S, D)).view(B * H, T, D)."""
    p, v = node.args
    if not _is_batch_reshape(p) or len(p.users) != 1 or not _from_softmax(p) or not e.same_region(node, p):
        return None
    if not same_shape(shape(v)[:-2], shape(p)[:-2]):
        return None
    source = p.args[0]
    lead = [e.size(source, i) for i in range(rank(source) - 2)]
    product = e.call(torch.matmul, source, _reshape_lead(e, v, lead))
    return e.call(torch.reshape, product, (*p.args[1][:-2], e.size(product, -2), e.size(product, -1)))


@rule(torch.matmul)
def probabilities_to_the_left(e: Editor, node: fx.Node) -> fx.Node | None:
    """v.mT @ probabilities.mT -> (probabilities @ v).mT."""
    v, p = node.args
    if not isinstance(p, fx.Node) or p.target is not torch.permute or not _from_softmax(p.args[0]) or _from_softmax(v):
        return None
    dims = rank(p)
    swap = (*range(dims - 2), dims - 1, dims - 2)
    if tuple(p.args[1]) != swap or rank(v) != dims or not e.same_region(node, p):
        return None
    return e.call(torch.permute, e.call(torch.matmul, p.args[0], _permuted(e, v, swap)), swap)


@rule(operator.mul, operator.truediv)
def row_factor_to_queries(e: Editor, node: fx.Node) -> fx.Node | None:
    """(q @ k) * s on its way to a softmax, where s is the same for all keys -> (q * s) @ k."""
    scores, factor = node.args
    if node.target is operator.mul and not _is_scores(scores):
        scores, factor = factor, scores
    if not _is_scores(scores) or not is_float(factor) or rank(factor) > rank(scores):
        return None
    if rank(factor) and not (isinstance(shape(factor)[-1], int) and shape(factor)[-1] == 1):
        return None
    if is_one_element(factor) and node.target is operator.mul and not needs_grad(factor):
        return None  # a plain scale, which patterns carry themselves
    if len(scores.users) != 1 or not e.same_region(node, scores) or _toward_softmax(node) is None:
        return None
    q, k = scores.args
    return e.call(torch.matmul, e.call(node.target, q, factor), k)


def _is_scores(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.matmul and is_float(node)


@rule(torch.masked_fill, torch.where)
def fill_to_bias(e: Editor, node: fx.Node) -> fx.Node | None:
    """A huge finite fill in a chain that also adds tensors -> an addition.

    With one kind of mask a filled row is known (all entries equal). With a fill and an additive mask in one chain, what a
    row without any allowed key gives depends on both: then the fill is what it numerically is, x + c for absorbing c.
    """
    if node.target is torch.masked_fill:
        x, mask, fill = node.args
    else:
        mask, x, fill = node.args
    if (
        not isinstance(fill, (int, float))
        or not (-math.inf < fill <= _ABSORBING)
        or not is_float(x)
        or dtype(x) is torch.float16
    ):
        return None
    if not same_shape(shape(x), shape(node)):
        return None
    after = _toward_softmax(node)
    if after is None:
        return None
    before: list[fx.Node] = []
    current: Any = x
    while isinstance(current, fx.Node) and current.target in _PER_SCORE and len(before) < _CHAIN:
        before.append(current)
        tensors = [a for a in current.args if is_float(a) and rank(a) >= 2]
        current = next((a for a in tensors if same_shape(shape(a), shape(current))), tensors[0] if tensors else None)
    if not isinstance(current, fx.Node) or current.target is not torch.matmul:
        return None
    sums = [n for n in (*before, *after) if n.target in (operator.add, operator.sub)]
    if not any(all(is_float(a) and rank(a) for a in n.args) for n in sums):
        return None
    masked = mask if node.target is torch.masked_fill else e.call(operator.invert, mask)
    return e.call(operator.add, x, e.call(operator.mul, e.call("to", masked, dtype(x)), fill))


# ---------------------------------------------------------------------------------------------------------------------
# In-place calls
# ---------------------------------------------------------------------------------------------------------------------

_FUNCTIONAL_METHODS = {
    *(
        "add",
        "sub",
        "mul",
        "div",
        "pow",
        "neg",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "abs",
        "tanh",
        "sigmoid",
        "relu",
        "clamp",
    ),
    *("clamp_min", "clamp_max", "masked_fill", "square", "reciprocal", "erf", "expm1", "log1p", "multiply", "subtract"),
    *("divide", "true_divide", "floor"),
}
_FUNCTIONAL_CALLS: dict[Any, Any] = {
    torch.relu_: F.relu,
    F.relu_: F.relu,
    torch.tanh_: torch.tanh,
    torch.sigmoid_: torch.sigmoid,
}


def _functionalize(e: Editor) -> None:
    """x.mul_(y) -> x * y where nothing else can see the write.

    That is: the memory is an intermediate of this graph, the call has the type of the functional one, and after it the
    memory is read through x itself or the call's result only (later reads of x become reads of the result).
    """
    nodes = list(e.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    writers = [n for n in nodes if mutated_arguments(n)]
    if not writers:
        return
    aliases: dict[int | None, list[fx.Node]] = {}
    for n in nodes:
        if is_tensor(n):
            aliases.setdefault(storage(n), []).append(n)
    regions = Analysis(e.module).regions
    for node in writers:
        functional = _functional_form(node)
        (x, *others) = mutated_arguments(node)
        if functional is None or others or storage(x) is None:
            continue
        group = aliases[storage(x)]
        if any(n.op in ("placeholder", "get_attr") for n in group):
            continue
        at = order[node]
        if any(order[u] > at for n in group if n not in (x, node) and order[n] < at for u in n.users):
            continue
        target, args, kwargs = functional
        try:
            outcome = e.infer(target, args, kwargs, regions.get(node))
        except _Unknown:
            continue
        before = value(x)
        if (
            not isinstance(outcome, torch.Tensor)
            or outcome.dtype != before.dtype
            or not same_shape(outcome.shape, before.shape)
        ):
            continue
        e.retarget(node, target, args, kwargs)
        x.replace_all_uses_with(node, delete_user_cb=lambda user, at=at: order[user] > at)
        # The example value still shares memory with x: later aliases are judged as if the write were there.


def _functional_form(node: fx.Node) -> tuple[Any, tuple, dict[str, Any]] | None:
    if "out" in node.kwargs:
        return None
    if node.op == "call_method":
        name = str(node.target)[:-1]
        return (
            (name, tuple(node.args), dict(node.kwargs))
            if str(node.target)[-1] == "_" and name in _FUNCTIONAL_METHODS
            else None
        )
    if node.target in INPLACE_OPERATORS:
        return INPLACE_OPERATORS[node.target], tuple(node.args), dict(node.kwargs)
    if node.target in _FUNCTIONAL_CALLS:
        return _FUNCTIONAL_CALLS[node.target], tuple(node.args), dict(node.kwargs)
    if inplace_flag(node):
        args = tuple(node.args)
        if True in args[1:] and node.kwargs.get("inplace") is not True:
            from .graph import _inplace_position

            position = _inplace_position(node.target)
            args = tuple(False if i == position else a for i, a in enumerate(args))
        return node.target, args, {**node.kwargs, **({"inplace": False} if "inplace" in node.kwargs else {})}
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Opaque calls
# ---------------------------------------------------------------------------------------------------------------------


class _Recorder(TorchFunctionMode):
    """Runs a Python function on example values and adds the torch calls it makes to the graph."""

    def __init__(self, editor: Editor, at: fx.Node, inputs: Iterable[fx.Node]):
        super().__init__()
        self.editor, self.at = editor, at
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Any] = []  # an id means something only while its object lives
        for node in inputs:
            if is_tensor(node):
                self.remember(value(node), node)

    def remember(self, tensor: Any, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.kept.append(tensor)

    def node_of(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            if id(item) not in self.nodes:
                raise _Unknown
            return self.nodes[id(item)]
        if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise _Unknown  # a symbolic size would have to become a node; such calls stay as they are
        return item

    def __torch_function__(self, func: Any, types_: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        outcome = func(*args, **kwargs)
        tensors = [t for t in tree_leaves(outcome) if isinstance(t, torch.Tensor)]
        if not tensors:
            return outcome
        name = getattr(func, "__name__", "")
        node_args, node_kwargs = tree_map(self.node_of, (tuple(args), dict(kwargs)))
        with self.editor.graph.inserting_before(self.at):
            if name == "__get__":
                node = self.editor.graph.call_function(getattr, (node_args[0], func.__self__.__name__))
            elif getattr(torch.Tensor, name, None) is func:
                node = self.editor.graph.call_method(name, node_args, node_kwargs)
            else:
                node = self.editor.graph.call_function(func, node_args, node_kwargs)
            self.editor._describe(node, self.at, outcome)
            self.editor._created.append(node)
            if isinstance(outcome, torch.Tensor):
                self.remember(outcome, node)
            else:
                for i, part in enumerate(outcome):
                    item = self.editor.graph.call_function(operator.getitem, (node, i))
                    self.editor._describe(item, self.at, part)
                    self.editor._created.append(item)
                    self.remember(part, item)
        return outcome


def _expand_opaque(e: Editor) -> None:
    """Opens calls that hide a site: F.multi_head_attention_forward, the inference-only encoder layer, custom activations."""
    for node in list(e.graph.nodes):
        if node.op != "call_function":
            continue
        custom = node.target is torch.ops.higher_order.autograd_function_apply
        if custom or node.target in _OPAQUE:
            e._created, e._at = [], node
            try:
                _open_autograd_function(e, node) if custom else _open(e, node, _OPAQUE[node.target])
            except Exception as error:  # anything the function raises on example values: the call stays as it is
                log.debug("%s stays opaque: %s: %s", node.name, type(error).__name__, error)
                for created in reversed(e._created):
                    e.graph.erase_node(created)


def _open(e: Editor, node: fx.Node, function: Callable) -> None:
    region = Analysis(e.module).regions.get(node)
    recorder = _Recorder(e, node, node.all_input_nodes)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    with e.conditions(region), recorder:
        outcome = function(*args, **kwargs)
    results = [recorder.nodes.get(id(t)) for t in (outcome if isinstance(outcome, tuple) else (outcome,))]
    users = list(node.users)
    if not isinstance(outcome, tuple):
        if not same_shape(outcome.shape, shape(node)) or outcome.dtype != dtype(node):
            raise _Unknown
        node.replace_all_uses_with(results[0])  # type: ignore[arg-type]
    else:
        if any(u.target is not operator.getitem or (u.users and results[u.args[1]] is None) for u in users):  # type: ignore[index]
            raise _Unknown
        for user in users:
            if user.users:
                user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index, arg-type]
            e.graph.erase_node(user)
    e.graph.erase_node(node)
    for created in reversed(e._created):
        if not created.users:
            e.graph.erase_node(created)


def _without_dispatch(function: Callable) -> Callable:
    """A Python function of torch with its own check for overrides switched off: the recorder wants what is inside."""
    scope = {**function.__globals__, "has_torch_function": lambda *_: False}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_attend = _without_dispatch(F.multi_head_attention_forward)


def _encoder_layer(
    *arguments: Any,
) -> torch.Tensor:
    """What torch._transformer_encoder_layer_fwd computes, without masks (those stay opaque)."""
    (src, width, heads, w_qkv, b_qkv, w_out, b_out, use_gelu, norm_first, eps, *rest) = arguments
    g1, s1, g2, s2, w1, b1, w2, b2, *masks = rest
    if any(m is not None for m in masks) or src.is_nested:
        raise _Unknown

    def attend(x: torch.Tensor) -> torch.Tensor:
        batch, length = x.shape[:2]
        parts = F.linear(x, w_qkv, b_qkv).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(*parts)
        return F.linear(out.transpose(1, 2).reshape(batch, length, width), w_out, b_out)

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, w1, b1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), w2, b2)

    def norm(x: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (width,), gain, shift, eps)

    if norm_first:
        src = src + attend(norm(src, g1, s1))
        return src + feed_forward(norm(src, g2, s2))
    src = norm(src + attend(src), g1, s1)
    return norm(src + feed_forward(src), g2, s2)


_OPAQUE: dict[Any, Callable] = {
    F.multi_head_attention_forward: _attend,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}

# Named activations that a custom autograd function may be, cheapest first.
_ACTIVATIONS: tuple[tuple[Callable, dict[str, Any]], ...] = (
    (F.relu, {}),
    (F.silu, {}),
    (F.gelu, {}),
    (F.gelu, {"approximate": "tanh"}),
    (F.mish, {}),
)
_POINTS = tuple(i * 0.173 for i in range(-70, 71))


def _open_autograd_function(e: Editor, node: fx.Node) -> None:
    """A custom autograd function of one tensor -> the activation that it is, if its backward is that one's derivative.

    Forward and backward are run on points in double precision; agreement to a relative 1e-6 is the proof (such functions
    round their constants). Functions that are no element-wise activation stay opaque.
    """
    tensors = [a for a in node.args if is_tensor(a)]
    bodies = [getattr(e.module, str(a.target), None) for a in node.args[:2] if isinstance(a, fx.Node)]
    users = list(node.users)
    if len(tensors) != 1 or len(node.args) != 3 or len(bodies) != 2 or len(users) != 1:
        raise _Unknown
    if users[0].target is not operator.getitem or users[0].args[1] != 0 or not is_float(users[0]):
        raise _Unknown
    if not same_shape(shape(users[0]), shape(tensors[0])) or dtype(users[0]) is not dtype(tensors[0]):
        raise _Unknown
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.enable_grad():
        x = torch.tensor(_POINTS, dtype=torch.float64)
        outputs, saved = fx.Interpreter(bodies[0]).run(x)
        y = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        gradient = fx.Interpreter(bodies[1]).run(torch.ones_like(x), *saved)
        gradient = gradient[0] if isinstance(gradient, (tuple, list)) else gradient
        for function, kwargs in _ACTIVATIONS:
            probe = x.clone().requires_grad_()
            expected = function(probe, **kwargs)
            (slope,) = torch.autograd.grad(expected.sum(), probe)
            if _agree(y, expected, x) and _agree(gradient, slope, x):
                e._at = users[0]
                users[0].replace_all_uses_with(e.call(function, tensors[0], **kwargs))
                e.graph.erase_node(users[0])
                e.graph.erase_node(node)
                return
    raise _Unknown


def _agree(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b.detach()).abs() <= 1e-6 * (1 + x.abs())).all())


# Calls without effects: erased when a rewrite leaves them without users.
_PURE = {
    *_UNARY,
    *_BINARY,
    *_SUMS,
    *_LOGICAL,
    *(k for k in _SPELLING),
    *(
        operator.truediv,
        operator.getitem,
        torch.masked_fill,
        torch.where,
        torch.clamp,
        torch.matmul,
        F.linear,
        F.softmax,
    ),
    *(torch.reshape, torch.permute, torch.t, torch.unsqueeze, "to", "contiguous", "view", "reshape", "max", "amax"),
    *(torch.max, torch.amax, torch.ops.aten.sym_size.int, "detach", torch.detach, *_CAST_METHODS),
}

# Calls on numbers whose result can be computed here and now.
_FOLDABLE = {
    *(torch.tensor, torch.scalar_tensor, torch.full, torch.zeros, torch.ones, "to", *_CAST_METHODS),
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
