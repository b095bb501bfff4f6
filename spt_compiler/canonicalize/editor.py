"""The editor that applies rules to a graph, and the rules' registry."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from ..graph import Analysis, dtype, is_tensor, mutated_arguments, rank, same_shape, shape, storage, value

Rule = Callable[["Editor", fx.Node], "fx.Node | None"]
RULES: dict[Any, list[Rule]] = {}

# Calls without effects: erased when a rewrite leaves them without users.
PURE: set[Any] = set()

# Calls on numbers whose result can be computed here and now.
FOLDABLE: set[Any] = set()

# Calls that fill a tensor with one number, and that number; None: an argument says it.
FILLS: dict[Any, float | None] = {
    **dict.fromkeys((torch.ones, torch.ones_like, "new_ones"), 1.0),
    **dict.fromkeys((torch.zeros, torch.zeros_like, "new_zeros"), 0.0),
    **dict.fromkeys((torch.full, torch.full_like, "new_full")),
}

# Real graphs settle in three passes. A rule pair that undid each other would run on to here and no further.
MAX_PASSES = 12


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers a rewrite for calls of these targets: functions, or method names as strings.

    A rule gets the editor and a node. It returns None (nothing to do), the node itself after `editor.retarget`, another
    node of the graph, or one built with `editor.call`; in the latter cases that takes the node's place.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES.setdefault(target, []).append(function)
        return function

    return register


class Unknown(Exception):
    """An example value is missing or cannot be computed: the rewrite is not tried."""


class Editor:
    """Applies rules to one graph and keeps it typed."""

    def __init__(self, module: fx.GraphModule):
        self.module, self.graph = module, module.graph
        self.fake_mode = next((v.fake_mode for n in self.graph.nodes if isinstance(v := value(n), FakeTensor)), None)
        self.created: list[fx.Node] = []
        self.moved: set[fx.Node] = set()
        self.at: fx.Node | None = None
        self.passes = 0
        self._written: set[int | None] = set()
        self._unsettled: set[int | None] = set()
        self._regions: dict[fx.Node, tuple] = {}
        self._constants: dict[fx.Node, Any] = {}

    # ---- running ------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """One pass over the graph; whether anything changed."""
        analysis = Analysis(self.module)
        self._written = {s for _, s in analysis.writes}
        self._unsettled = analysis.unsettled
        self._regions = analysis.regions
        self._constants = {}
        changed = False
        for node in analysis.nodes:
            if node.op not in ("call_function", "call_method") or node._erased:
                continue
            # A rule may turn the node into one that another rule knows; a node settles after very few of them.
            for _ in range(8):
                replacement = next(filter(None, (self._try(r, node) for r in RULES.get(node.target, ()))), None)
                if replacement is None:
                    break
                changed = True
                if replacement is not node:
                    if replacement not in self._regions:
                        self._regions[replacement] = self._regions.get(node, ())
                    node = replacement
                if node.op not in ("call_function", "call_method"):
                    break
        self.passes += 1
        return changed

    def _try(self, rule_: Rule, node: fx.Node) -> fx.Node | None:
        self.created, self.moved, self.at = [], set(), node
        try:
            result = rule_(self, node)
            if result is None or (result is not node and not self._may_replace(node, result)):
                result = None
        except Unknown:
            result = None
        if result is None:
            for created in reversed(self.created):
                if not created.users:
                    self.graph.erase_node(created)
            return None
        if result is not node:
            node.replace_all_uses_with(result)
            self.erase(node)
            for stale in (*reversed(self.created), *sorted(self.moved, reverse=True)):
                self.erase(stale)
        return result

    def _may_replace(self, old: fx.Node, new: fx.Node) -> bool:
        a, b = value(old), value(new)
        if a is None or b is None:
            return False
        if a.dtype != b.dtype or a.device != b.device or not same_shape(a.shape, b.shape):
            return False
        if a.requires_grad and not b.requires_grad:
            return False
        if b.requires_grad and any(map(self._with_grad, old.users)):
            if not a.requires_grad or (new not in self.created and not self._with_grad(old)):
                return False  # what hands no gradient on would do so
        if new not in self.created and self.is_returned_twice(old, new):
            return False
        if self._written:
            read = {storage(i) for c in self.created for i in c.all_input_nodes}
            if None in self._written or {storage(old), storage(new)} & self._written or read & self._unsettled:
                return False  # reading at another moment, or through another alias, could show
        return True

    def sweep(self) -> None:
        """Erases what nobody reads (Dynamo leaves it in the graph), as far as it is known to be pure."""
        for node in reversed(self.graph.nodes):
            is_pure = node.op in ("call_function", "call_method") and node.target in PURE and not mutated_arguments(node)
            if is_pure and not node.users:
                self.graph.erase_node(node)

    def erase(self, node: fx.Node) -> None:
        """Erases a node without users, then what only it used, as far as those are known to be pure."""
        stack = [node]
        while stack:
            current = stack.pop()
            if current._erased or current.users:
                continue
            inputs = current.all_input_nodes
            self.graph.erase_node(current)
            stack.extend(i for i in inputs if i.target in PURE and i.op in ("call_function", "call_method"))

    # ---- building -----------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call before the current node: of a function, or of a method if `target` is a string."""
        assert self.at is not None
        outcome = self.infer(target, args, kwargs, self._regions.get(self.at))
        with self.graph.inserting_before(self.at):
            op = "call_method" if isinstance(target, str) else "call_function"
            node = self.graph.create_node(op, target, args, kwargs)
        self.describe(node, self.at, outcome)
        self.created.append(node)
        return node

    def describe(self, node: fx.Node, like: fx.Node, outcome: Any) -> None:
        node.meta.update(
            {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}
        )
        node.meta["example_value"] = outcome
        self._regions[node] = self._regions.get(like, ())

    def move(self, nodes: Iterable[fx.Node]) -> None:
        """Says that what the current rule returns does the work of these calls, dropout included: they go with the node."""
        self.moved.update(nodes)

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
        """What a call gives on the example values of its arguments. Raises `Unknown` if that cannot be told."""

        def example(node: fx.Node) -> Any:
            if "example_value" not in node.meta:
                raise Unknown
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
            raise Unknown from error

    @contextlib.contextmanager
    def conditions(self, region: tuple | None = None) -> Iterator[None]:
        """The modes under which example values are computed: fake tensors, no new guards, the region's grad and autocast."""
        with contextlib.ExitStack() as stack:
            if self.fake_mode is not None:
                stack.enter_context(self.fake_mode)
                # As Dynamo does: without it, F.pad makes numbers of symbolic sizes.
                stack.enter_context(enable_python_dispatcher())
                if self.fake_mode.shape_env is not None:
                    stack.enter_context(self.fake_mode.shape_env.suppress_guards())
            if region:
                stack.enter_context(torch.set_grad_enabled(region[0]))
                for device, kind in region[1]:
                    named = getattr(torch, str(kind).rpartition(".")[2], None) if kind != "None" else None
                    stack.enter_context(torch.autocast(device, dtype=named, enabled=named is not None))
            yield

    # ---- questions ----------------------------------------------------------------------------------------------

    @property
    def is_spelled(self) -> bool:
        """Whether every call has its one spelling: only then does a rule see that something does not follow."""
        return self.passes > 0

    def is_returned_twice(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether one tensor would be returned in two places, or an input itself, if `other` took the place of `node`."""
        if not any(u.op == "output" for u in node.users):
            return False
        return other.op in ("placeholder", "get_attr") or any(u.op == "output" for u in other.users)

    def is_written(self, node: fx.Node) -> bool:
        """Whether a call writes to the memory of `node`: then a rule that reads past it would miss that."""
        return bool(self._written and {storage(node), None} & self._written)

    def same_region(self, *nodes: fx.Node) -> bool:
        """Whether all nodes run under the same grad and autocast modes: only then may work move from one to the other."""
        regions = [self._regions.get(n) for n in nodes]
        return all(r == regions[0] for r in regions)

    def same_grad(self, *nodes: Any) -> bool:
        """Whether all nodes run under the same grad mode. Layout may move between modes of any other kind.

        A view that is made without grad says that it requires one, as its base does, and hands none on.
        """
        return len(set(map(self._with_grad, nodes))) < 2

    def _with_grad(self, node: fx.Node) -> bool:
        region = self._regions.get(node)
        return region[0] is not False if region else True

    def size(self, node: fx.Node, dim: int) -> Any:
        """A size as an argument: the int, the graph's input that is the symbolic size, or a node that reads it.

        A node that reads it is one more reader of `node`, which then looks used elsewhere.
        """
        found = shape(node)[dim]
        if isinstance(found, int):
            return found
        for given in self.graph.find_nodes(op="placeholder"):
            symbol = given.meta.get("example_value")
            if isinstance(symbol, torch.SymInt) and symbol.node.expr == found.node.expr:
                return given
        return self.call(torch.ops.aten.sym_size.int, node, dim % rank(node))

    def constant(self, node: Any) -> float | int | bool | None:
        """The number that every element of a tensor holds which the graph builds from numbers, or None."""
        if not isinstance(node, fx.Node):
            return node if isinstance(node, (int, float)) else None
        if node not in self._constants:
            self._constants[node] = self._fold(node)
        return self._constants[node]

    def fill(self, node: fx.Node) -> float | int | bool | None:
        """What a call fills its result with."""
        number: Any = FILLS[node.target]
        if number is None:
            number = node.kwargs["fill_value"] if "fill_value" in node.kwargs else node.args[-1]
        return self.constant(number)

    def _rounded(self, number: float | int | bool | None, kind: torch.dtype) -> float | int | bool | None:
        """A number as a tensor of that dtype holds it."""
        if number is None or (kind.is_floating_point and not math.isfinite(number)):
            return number
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            return torch.full((), number, dtype=torch.float64 if kind.is_floating_point else kind).to(kind).item()

    def _fold(self, node: fx.Node) -> float | int | bool | None:
        found = value(node)
        if found is None or found.requires_grad or self.is_written(node):
            return None
        if node.target in FILLS:
            return self._rounded(self.fill(node), found.dtype)
        if node.target not in FOLDABLE or (found.dim() and not any(map(is_tensor, node.args))):
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
