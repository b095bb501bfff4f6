"""Where a value of a (nested) graph comes from: anchors of sites, and values that depend on parameters alone.

A graph body under a higher-order op (activation checkpointing) sees its parameters as placeholders. A `Scope` remembers
which outer value each of them is, so that a site inside a body finds the parameter of the user's model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from .graph import Analysis

# The longest way from an activation back to its projection that real models need is about 40 nodes (rope, norms, casts).
_REACH = 400


@dataclass(eq=False)
class Scope:
    """A graph and, for a body, the outer node behind each of its placeholders.

    Args:
        module: the graph module. inputs: example inputs of the outermost graph (real tensors; never kept by a result).
        parent: the scope of the graph that calls this body. outer: placeholder of this graph -> node of the parent.
    """

    module: fx.GraphModule
    inputs: Sequence[Any] = ()
    parent: Scope | None = None
    outer: Mapping[fx.Node, fx.Node] = field(default_factory=dict)

    def position(self, placeholder: fx.Node) -> int:
        """Index of an outermost placeholder among the graph's inputs."""
        return self._positions[placeholder]

    def __post_init__(self) -> None:
        self._positions = {n: i for i, n in enumerate(n for n in self.module.graph.nodes if n.op == "placeholder")}

    def source(self, node: fx.Node) -> tuple[Scope, fx.Node]:
        """The same value in the outermost graph that computes it."""
        scope = self
        while scope.parent is not None and node in scope.outer:
            node, scope = scope.outer[node], scope.parent
        return scope, node

    def is_written(self, node: fx.Node) -> bool:
        """Whether a call of this graph writes to the memory of `node`: then it may hold another value when it is read."""
        return self._analysis.is_written(node)

    @cached_property
    def _analysis(self) -> Analysis:
        return Analysis(self.module)

    def parameter(self, node: fx.Node) -> int | None:
        """Position of the Parameter that `node` is, or None if it is something else."""
        scope, node = self.source(node)
        if scope.parent is None and node.op == "placeholder":
            position = scope.position(node)
            if position < len(scope.inputs) and isinstance(scope.inputs[position], nn.Parameter):
                return position
        return None

    def anchor(self, *starts: fx.Node | None) -> int | None:
        """Position of the Parameter nearest upstream of the first of `starts` that has one (CONTRACTS.md, "Identity")."""
        for start in starts:
            if start is None:
                continue
            queue, seen = deque([(self, start)]), {start}
            while queue and len(seen) < _REACH:
                scope, node = queue.popleft()
                position = scope.parameter(node)
                if position is not None:
                    return position
                scope, node = scope.source(node)
                for above in node.all_input_nodes:
                    if above not in seen:
                        seen.add(above)
                        queue.append((scope, above))
        return None

    def downstream_anchor(self, start: fx.Node) -> int | None:
        """Position of the nearest Parameter that is combined with `start` downstream, within this graph."""
        queue, seen = deque([start]), {start}
        while queue and len(seen) < _REACH:
            node = queue.popleft()
            for user in node.users:
                for operand in user.all_input_nodes:
                    position = self.parameter(operand)
                    if position is not None:
                        return position
                if user not in seen:
                    seen.add(user)
                    queue.append(user)
        return None

    def constant(self, node: fx.Node) -> Tensor | None:
        """The value of a node that depends on no input at all (positions, fills, static sizes), computed on the CPU.

        None where an input, a symbolic size, a random number, a write in place or a graph attribute is involved, or the
        way is long.
        """
        scope, node = self.source(node)
        order: list[fx.Node] = []
        stack: list[tuple[fx.Node, bool]] = [(node, False)]
        seen: set[fx.Node] = set()
        while stack:
            current, done = stack.pop()
            if done:
                order.append(current)
            elif current not in seen:
                seen.add(current)
                if len(seen) > 64 or not is_pure(current) or scope.is_written(current):
                    return None
                stack.append((current, True))
                stack.extend((a, False) for a in current.all_input_nodes)
        values: dict[fx.Node, Any] = {}
        for current in order:
            args, kwargs = fx.map_arg((current.args, dict(current.kwargs)), values.__getitem__)
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": "cpu"}
            call = current.target if current.op == "call_function" else getattr(args[0], str(current.target))
            try:
                values[current] = call(*args, **kwargs) if current.op == "call_function" else call(*args[1:], **kwargs)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
                return None  # an operator that wants more than its arguments: nothing is proved
        return values[node] if isinstance(values[node], Tensor) else None

    def recipe(self, node: fx.Node | None) -> Recipe | None:
        """How to compute `node` outside the graph if it depends on graph inputs that are parameters or buffers only.

        Returns None where activations, sizes, random numbers or writes in place are involved, or where the way is too long.
        """
        if node is None:
            return None
        steps: list[tuple[fx.Node, Scope]] = []
        seen: set[fx.Node] = set()
        stack: list[tuple[Scope, fx.Node, bool]] = [(*self.source(node), False)]
        while stack:
            scope, current, done = stack.pop()
            if done:
                steps.append((current, scope))
                continue
            if current in seen:
                continue
            seen.add(current)
            if len(seen) > 32:
                return None
            if current.op == "placeholder":
                if scope.parent is not None or not isinstance(scope.inputs[scope.position(current)], Tensor):
                    return None
                if not scope.inputs[scope.position(current)].is_leaf or not _long_lived(scope, current):
                    return None
            elif current.op not in ("call_function", "call_method", "get_attr") or "rand" in str(current.target):
                return None
            elif scope.is_written(current):
                return None  # the write is no step that leads to the value
            stack.append((scope, current, True))
            stack.extend((*scope.source(a), False) for a in current.all_input_nodes)
        numbers = {current: i for i, (current, _) in enumerate(steps)}

        def freeze(current: fx.Node, scope: Scope) -> _Step:
            def refer(n: fx.Node) -> _Ref:
                return _Ref(numbers[scope.source(n)[1]])

            if current.op == "placeholder":
                return _Step("input", scope.position(current), (), {})
            if current.op == "get_attr":
                return _Step("value", getattr(scope.module, str(current.target)), (), {})
            args, kwargs = fx.map_arg((current.args, current.kwargs), refer)
            return _Step(current.op, current.target, args, kwargs)

        return Recipe(tuple(freeze(*step) for step in steps))


def is_pure(node: fx.Node) -> bool:
    """Whether a node computes something new from its arguments alone."""
    if node.op not in ("call_function", "call_method") or "rand" in str(node.target):
        return False
    return not str(getattr(node.target, "__name__", node.target)).rstrip("_").endswith("setitem") and not (
        isinstance(node.target, str) and node.target.endswith("_") and not node.target.endswith("__")
    )


def _long_lived(scope: Scope, placeholder: fx.Node) -> bool:
    """A parameter or a buffer of a module, as opposed to an input of the call."""
    if isinstance(scope.inputs[scope.position(placeholder)], nn.Parameter):
        return True
    source = getattr(placeholder, "_dynamo_source", None)
    return source is not None and any(s in source.name for s in ("_parameters[", "_buffers["))


@dataclass(frozen=True)
class _Ref:
    """Result of an earlier step."""

    index: int


@dataclass(frozen=True, eq=False)
class _Step:
    op: str  # "input" | "value" | "call_function" | "call_method"
    target: Any
    args: tuple
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Recipe:
    """A value computed from parameters and buffers alone, evaluated at run time from the graph's real arguments.

    It is a copy of the few nodes involved: the graph may be rewritten and freed meanwhile.
    """

    steps: tuple[_Step, ...]

    @torch.no_grad()
    def evaluate(self, arguments: Sequence[Any]) -> Tensor:
        """The value for one call's arguments (a view of the parameter where the steps are views)."""
        values: list[Any] = []
        for step in self.steps:
            if step.op == "input":
                values.append(arguments[step.target].detach())
            elif step.op == "value":
                values.append(step.target)
            else:
                args, kwargs = tree_map_only(_Ref, lambda r: values[r.index], (step.args, dict(step.kwargs)))
                call = step.target if step.op == "call_function" else getattr(args[0], step.target)
                values.append(call(*args, **kwargs) if step.op == "call_function" else call(*args[1:], **kwargs))
        return values[-1]
