"""What one can ask of a Dynamo graph: values, where a node comes from, memory, modes, and a networkx view. Read-only.

Shapes and dtypes are those of `node.meta["example_value"]`, a fake tensor whose sizes may be symbolic. Nothing here
specialises a symbolic size: comparisons answer "provably equal" and never install a guard.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true

# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def value(node: Any) -> torch.Tensor | None:
    """The fake tensor that stands for a node's value; None for anything that is no tensor."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return found if isinstance(found, torch.Tensor) else None


def is_tensor(node: Any) -> bool:
    """Whether `node` is a graph node whose value is a tensor."""
    return value(node) is not None


def shape(node: Any) -> tuple[Any, ...]:
    """Sizes of a tensor node; () for anything else. A size that tracing has settled is an int, others are SymInts."""
    found = value(node)
    return () if found is None else tuple(map(settled, found.shape))


def settled(size: Any) -> Any:
    """The int behind a symbolic size that guards have fixed by now (a weight met it); any other size as it is."""
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
        return size if known is None else known
    return size


def rank(node: Any) -> int:
    """Number of dimensions of a tensor node, 0 for anything else."""
    found = value(node)
    return 0 if found is None else found.dim()


def dtype(node: Any) -> torch.dtype | None:
    """dtype of a tensor node, None for anything else."""
    found = value(node)
    return None if found is None else found.dtype


def is_float(node: Any) -> bool:
    """Whether `node` is a floating-point tensor."""
    found = value(node)
    return found is not None and found.is_floating_point()


def needs_grad(node: Any) -> bool:
    """Whether autograd would compute a gradient for `node` (unknown values count as yes)."""
    if not isinstance(node, fx.Node):
        return False
    found = value(node)
    return found is None or found.requires_grad


def without_casts(x: Any) -> Any:
    """What a chain of canonical casts was made of."""
    while isinstance(x, fx.Node) and x.target == "to" and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal, without a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b))


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are provably equal, without a guard."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def is_bounded(node: Any, limit: float = 1e4) -> bool:
    """Whether a value is provably of ordinary size: made from parameters, products and numbers below `limit`, as scores are.

    False where it may be a mask in disguise: an input, a buffer, a fill with a huge number (-1e4 is the smallest in use).
    With `limit` = inf: whether it is provably finite, as long as scores are.
    """
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, (tuple, list)):
            stack.extend(current)
        elif isinstance(current, (int, float)):
            if not abs(current) < limit:
                return False
        elif isinstance(current, fx.Node) and current not in seen and not is_parameter(current):
            seen.add(current)
            if current.target in _KEEP_SIZE or (is_tensor(current) and not is_float(current)):
                continue
            if current.op not in ("call_function", "call_method") or current.target in _FROM_ZERO or len(seen) > 64:
                return False
            if current.target in _REARRANGE:  # what else it reads are sizes and positions, and the number that it pads with
                stack.extend((current.args[0], _padding(current)))
            else:
                stack.extend((*current.args, *current.kwargs.values()))
    return True


def _padding(node: fx.Node) -> Any:
    """The number that a call pads with, None for other calls."""
    is_pad = node.target is torch.nn.functional.pad
    return Arguments(node, "input", "pad", "mode", "value")["value"] if is_pad else None


# Calls whose result is of ordinary size, whatever stands around: products (scores are no better), bounded functions, fills.
_KEEP_SIZE = {
    *(torch.zeros, torch.ones, torch.zeros_like, torch.ones_like, "new_zeros", "new_ones"),
    *(torch.matmul, torch.nn.functional.linear, torch.nn.functional.embedding, torch.nn.functional.layer_norm),
    *(torch.nn.functional.softmax, torch.tanh, torch.sigmoid, torch.sin, torch.cos),
}
# Calls that hand on values of their first argument, as many and in whatever order (canonical spellings).
_REARRANGE = {
    *(torch.nn.functional.pad, torch.reshape, torch.permute, torch.t, operator.getitem, torch.unsqueeze, torch.squeeze),
    *("expand", "unsqueeze", "squeeze", "repeat", "narrow"),
}
# Calls that make an infinity of 0, which a mask of zeros and ones has (canonical spellings, and methods without one).
_FROM_ZERO = {torch.log, torch.reciprocal, torch.rsqrt, *("log2", "log10"), torch.log2, torch.log10}


def is_one_element(node: Any) -> bool:
    """Whether a tensor node provably holds exactly one element."""
    found = value(node)
    return found is not None and all(isinstance(s, int) and s == 1 for s in found.shape)


def number(item: Any) -> float | int | None:
    """A Python number, also where the graph carries it as an input that may change (a symbolic float with a value).

    A symbolic float becomes a number by a guard, as it does in torch wherever an operator takes a plain float; it can
    change between calls only by assigning to an attribute of the model. Sizes are not specialised: None.
    """
    if isinstance(item, fx.Node):
        item = item.meta.get("example_value")
    if isinstance(item, torch.SymFloat) and item.node.hint is not None:
        try:
            return float(item)
        except GuardOnDataDependentSymNode:  # computed from data, not an input
            return None
    return item if isinstance(item, (int, float)) and not isinstance(item, bool) else None


def is_hook(node: fx.Node) -> bool:
    """Whether a call hands a tensor on and registers a hook on its gradient."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "register_hook"


def same_computation(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two nodes compute the same value: one node, or the same pure calls on the same arguments."""
    if a is b:
        return True
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same_computation(x, y, depth) for x, y in zip(a, b, strict=True))
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b)
    if depth == 0 or a.op not in ("call_function", "call_method") or (a.op, a.target) != (b.op, b.target):
        return False
    if _is_random(a) or mutated_arguments(a) or dict(a.kwargs).keys() != dict(b.kwargs).keys():
        return False
    pairs = [*zip(a.args, b.args, strict=False), *((v, b.kwargs[k]) for k, v in a.kwargs.items())]
    return len(a.args) == len(b.args) and all(same_computation(x, y, depth - 1) for x, y in pairs)


def is_parameter(node: Any) -> bool:
    """Whether `node` is a Parameter of the model: an input or attribute of the graph, or of a body it calls."""
    return (
        isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr") and isinstance(value(node), nn.Parameter)
    )


def is_buffer(node: Any) -> bool:
    """Whether `node` is a buffer of a module: an input of the graph that Dynamo names so."""
    source = getattr(node, "_dynamo_source", None)
    return isinstance(node, fx.Node) and node.op == "placeholder" and source is not None and "_buffers[" in source.name


# ---------------------------------------------------------------------------------------------------------------------
# Where a node comes from
# ---------------------------------------------------------------------------------------------------------------------

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# Parts of a recorded path that are no submodule of the user's model.
_WRAPPERS = {"_modules", "__dict__", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_INDEX = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")


def where(node: fx.Node) -> str:
    """ "file:line" of the model's code that made the node; "" if it is not recorded."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return "{}:{}".format(*frames[-1]) if frames else ""


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that made the node, relative to the compiled one; "" outside of modules."""
    stack = node.meta.get("nn_module_stack") or {}
    last = next(reversed(stack.values()), None)
    return _clean_path(str(last[0])) if last else ""


@lru_cache(maxsize=4096)
def _clean_path(raw: str) -> str:
    # L['self'].encoder.layer[0].attention or L['self']._modules['encoder']... -> encoder.layer.0.attention
    path = _INDEX.sub(r".\1", re.sub(r"^L\[['\"]\w+['\"]\]", "", raw))
    parts = [p for p in path.split(".") if p and p not in _WRAPPERS]
    return ".".join(parts)


def common_path(nodes: Iterable[fx.Node]) -> str:
    """Dotted path of the innermost module that made all of `nodes`."""
    paths = [p.split(".") for p in map(module_path, nodes) if p]
    common = []
    for parts in zip(*paths, strict=False):
        if any(p != parts[0] for p in parts):
            break
        common.append(parts[0])
    return ".".join(common)


def describe(node: Any) -> str:
    """A short human name of what a node does: `softmax`, `.view`, `input x`."""
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op == "placeholder":
        return f"input {node.name}"
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target)).split(".")[0].strip("_")
    return node.op


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


class Arguments:
    """Arguments of a call by name, however they were passed. Reading a missing one gives its default.

    Example:
        >>> p, training = Arguments(node, "input", ("p", 0.5), ("training", True)).take("p", "training")
    """

    def __init__(self, node: fx.Node, *signature: str | tuple[str, Any]):
        self.values: dict[str, Any] = {}
        names = []
        for item in signature:
            name, default = (item, None) if isinstance(item, str) else item
            names.append(name)
            self.values[name] = default
        self.valid = len(node.args) <= len(names) and set(node.kwargs) <= set(names)
        self.values.update(zip(names, node.args, strict=False))
        self.values.update({k: v for k, v in node.kwargs.items() if k in self.values})

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def take(self, *names: str) -> tuple[Any, ...]:
        """The named arguments as a tuple."""
        return tuple(self.values[n] for n in names)


# ---------------------------------------------------------------------------------------------------------------------
# Memory: views, aliases, mutation
# ---------------------------------------------------------------------------------------------------------------------

# Python's in-place operators; each writes to its first argument where that is a tensor.
INPLACE_OPERATORS: dict[Callable, Callable] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
}


# Python writes a trailing underscore where a name is a keyword: these are pure.
_NO_WRITES = {operator.and_, operator.or_, operator.not_, operator.is_}


def storage(node: Any) -> int | None:
    """Identity of the memory behind a tensor node: equal for views of one tensor. None where it cannot be told."""
    found = value(node)
    if found is None:
        return None
    try:
        return found.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one storage
        return None


def mutated_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensor nodes that a call writes to; () for a pure call."""
    if node.op not in ("call_function", "call_method"):
        return ()
    first = node.args[0] if node.args else None
    out = node.kwargs.get("out")
    written: list[Any] = [out] if isinstance(out, fx.Node) else list(out) if isinstance(out, (tuple, list)) else []
    name = str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        if schema.is_mutable:
            for i, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.append(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name))
    elif node.op == "call_function" and (node.target in INPLACE_OPERATORS or node.target is operator.setitem):
        written.append(first)
    elif name.endswith("_") and not name.endswith("__") and node.target not in _NO_WRITES:
        written.append(first)
    elif isinstance(node.target, torch._ops.HigherOrderOperator) and "triton" in name:
        written.extend(node.all_input_nodes)
    elif inplace_flag(node):
        written.append(first)
    elif name == "batch_norm":
        written.extend(a for a in (*node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var")))
    flat: list[fx.Node] = []
    for item in written:
        flat.extend(i for i in (item if isinstance(item, (list, tuple)) else [item]) if is_tensor(i))
    return tuple(flat)


def inplace_flag(node: fx.Node) -> bool:
    """Whether a functional is called with `inplace=True`, by keyword or position (F.relu, F.dropout ...)."""
    if node.kwargs.get("inplace") is True:
        return True
    if node.op != "call_function" or not any(a is True for a in node.args):
        return False
    position = inplace_position(node.target)
    return position is not None and position < len(node.args) and node.args[position] is True


@lru_cache(maxsize=1024)
def inplace_position(target: Any) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # builtins have no signature, and no such argument
        return None
    return names.index("inplace") if "inplace" in names else None


# ---------------------------------------------------------------------------------------------------------------------
# The analysis of one graph
# ---------------------------------------------------------------------------------------------------------------------


class Analysis:
    """Facts about one graph that take a pass over it; each is computed when first asked for. The graph must not change.

    Attributes:
        order: position of every node.
        regions: mode each node runs in (grad mode, autocast, functorch level), as comparable values.
        from_parameters: nodes that depend on parameters only, beside constants and buffers that nobody writes, parameters
            included. Integers are neither: a quantised weight is no weight that a site could learn from or train.
        writes: (position, storage) of every in-place write, in graph order.
        unsettled: memory that is written after something has read it; of any other, every reader sees what the last write left.
    """

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.nodes = list(module.graph.nodes)

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        return {n: i for i, n in enumerate(self.nodes)}

    @cached_property
    def regions(self) -> dict[fx.Node, tuple]:
        return dict(_regions(self.nodes))

    @cached_property
    def from_parameters(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        constant: set[fx.Node] = set()
        for node in self.nodes:
            if is_parameter(node) and is_float(node):
                found.add(node)
            elif is_buffer(node) and is_float(node) and not self.is_written(node):
                constant.add(node)
            elif node.op in ("call_function", "call_method") and not mutated_arguments(node):
                inputs = node.all_input_nodes
                if all(i in found or i in constant for i in inputs) and not _is_random(node):
                    (found if any(i in found for i in inputs) else constant).add(node)
        return found

    @cached_property
    def writes(self) -> list[tuple[int, int | None]]:
        return [(i, storage(a)) for i, n in enumerate(self.nodes) for a in mutated_arguments(n)]

    @cached_property
    def unsettled(self) -> set[int | None]:
        last = {s: i for i, s in self.writes}
        if not last:
            return set()
        read = (
            (i, storage(a)) for i, n in enumerate(self.nodes) for a in set(n.all_input_nodes) - set(mutated_arguments(n))
        )
        return {None} & last.keys() | {s for i, s in read if i < last.get(s, 0)}

    def is_written(self, node: fx.Node) -> bool:
        """Whether some call writes to the memory of `node`: then it may hold another value when it is read."""
        if not self._written:
            return False
        own = storage(node)
        return own in self._written or (is_tensor(node) and (own is None or None in self._written))

    def same_value(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two nodes hold the same value: one node, or the same computation on what nobody writes to."""
        if a is b or not same_computation(a, b):
            return a is b
        stack, seen = [a], {a}
        while stack and self._written:
            current = stack.pop()
            if self.is_written(current):
                return False
            above = [n for n in current.all_input_nodes if n not in seen]
            seen.update(above)
            stack += above
        return True

    @cached_property
    def _written(self) -> set[int | None]:
        return {s for _, s in self.writes}

    def written_between(self, nodes: Iterable[fx.Node], start: int, stop: int) -> fx.Node | None:
        """The first of `nodes` whose memory is written at a position in (start, stop)."""
        touched = {s for i, s in self.writes if start < i < stop}
        if not touched:
            return None
        return next((n for n in nodes if storage(n) in touched or (None in touched and is_tensor(n))), None)


def _is_random(node: fx.Node) -> bool:
    name = describe(node)
    return name == "normal" or any(part in name for part in ("rand", "bernoulli", "multinomial", "dropout", "empty"))


def _regions(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, tuple]]:
    """Each node with the mode it runs in. The mode around the graph is torch's at the time of the call."""
    grad: Any = torch.is_grad_enabled()
    autocast: dict[str, Any] = {}
    entered: dict[fx.Node, tuple[str, Any]] = {}
    others: tuple = ()

    def ambient(device: str) -> Any:
        try:
            on = torch.is_autocast_enabled(device)
        except RuntimeError:  # a device without autocast
            return None
        return torch.get_autocast_dtype(device) if on else None

    for node in nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_set_grad_enabled":
            grad = node.args[0]
        elif name == "_enter_autocast":
            device, kind, enabled = (*node.args, None, None, None)[:3]
            entered[node] = (str(device), autocast.get(str(device), ambient(str(device))))
            autocast[str(device)] = (kind or torch.get_autocast_dtype(str(device))) if enabled else None
        elif name == "_exit_autocast" and node.args and node.args[0] in entered:
            device, before = entered[node.args[0]]  # type: ignore[index]
            autocast[device] = before
        elif name in (
            "_enter_inference_mode",
            "_vmap_increment_nesting",
            "_jvp_increment_nesting",
            "_grad_increment_nesting",
        ):
            others = (*others, node)
        elif name in (
            "_exit_inference_mode",
            "_vmap_decrement_nesting",
            "_jvp_decrement_nesting",
            "_grad_decrement_nesting",
        ):
            others = others[:-1]
        changed = tuple(sorted((d, str(k)) for d, k in autocast.items() if k != ambient(d)))
        yield node, (grad, changed, others)


# ---------------------------------------------------------------------------------------------------------------------
# networkx view
# ---------------------------------------------------------------------------------------------------------------------


def view(module: fx.GraphModule) -> nx.MultiDiGraph:
    """The graph as networkx sees it: a node per fx node (attributes op, target, shape), an edge per use.

    Edge attribute `position` says which argument it is: an int, a keyword, or a path such as (0, 1) into nested lists.
    """
    result = nx.MultiDiGraph()
    for node in module.graph.nodes:
        result.add_node(node, op=node.op, target=describe(node), shape=shape(node), path=module_path(node))
        for position, source in _uses((*node.args,), ()):
            result.add_edge(source, node, position=position[0] if len(position) == 1 else position)
        for keyword, argument in node.kwargs.items():
            for position, source in _uses([argument], ()):
                result.add_edge(source, node, position=keyword if len(position) == 1 else (keyword, *position[1:]))
    return result


def _uses(arguments: Any, prefix: tuple) -> Iterator[tuple[tuple, fx.Node]]:
    for i, item in enumerate(arguments):
        if isinstance(item, fx.Node):
            yield (*prefix, i), item
        elif isinstance(item, (tuple, list)):
            yield from _uses(item, (*prefix, i))
        elif isinstance(item, dict):
            yield from _uses(item.values(), (*prefix, i))
        elif isinstance(item, slice):
            yield from _uses((item.start, item.stop, item.step), (*prefix, i))


def is_convex(graph: nx.MultiDiGraph, nodes: Iterable[fx.Node]) -> bool:
    """Whether no path between two of `nodes` leaves them: only then can one call take their place."""
    inside = set(nodes)
    leaving = {s for n in inside for s in graph.successors(n)} - inside
    seen, stack = set(leaving), list(leaving)
    while stack:
        for successor in graph.successors(stack.pop()):
            if successor in inside:
                return False
            if successor not in seen:
                seen.add(successor)
                stack.append(successor)
    return True


def to_dot(graph: nx.MultiDiGraph, highlight: Iterable[Iterable[fx.Node]] = ()) -> str:
    """Graphviz source of a view, one colour per group of highlighted nodes."""
    palette = ("lightblue", "palegreen", "khaki", "lightpink", "plum", "lightsalmon")
    colour = {n: palette[i % len(palette)] for i, group in enumerate(highlight) for n in group}
    lines = ["digraph {", "  node [shape=box, style=filled, fillcolor=white];"]
    for node, data in graph.nodes(data=True):
        label = f"{node.name}\\n{data['target']} {tuple(map(str, data['shape']))}".replace('"', "'")
        lines.append(f'  "{node.name}" [label="{label}", fillcolor="{colour.get(node, "white")}"];')
    for source, target, data in graph.edges(data=True):
        lines.append(f'  "{source.name}" -> "{target.name}" [label="{data["position"]}"];')
    return "\n".join([*lines, "}"])
