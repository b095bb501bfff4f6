"""What a pattern is, and the matcher. Knows no particular pattern.

A pattern names the calls at which it may end or turn (its anchors), a function that reads the dataflow around such a
call into a `Candidate`, and guards that prove the replacement safe. The matcher visits every node once: a graph costs what its
anchors cost.

    anchor -> capture -> Candidate -> guards -> Match
                      \\-> Reject  ----------\\-> Skipped (with the reason)
                      \\-> None: the call is something else, and nobody hears of it
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx import Node

from .errors import Reject
from .graph import Analysis, common_path, describe, where

log = logging.getLogger(__name__)

T = TypeVar("T")

CUSTOM = "custom operators"  # as an anchor: every operator that is neither torch's nor ours


def is_custom(target: Any) -> bool:
    """Whether a call goes to an operator of some library."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prim", "prims", "spt")


class Context:
    """One graph while it is matched: its analysis, facts that patterns derive once per graph, and what is taken.

    Attributes:
        analysis: see `graph.Analysis`. taken: node -> pattern whose match it belongs to.
    """

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.analysis = Analysis(module)
        self.taken: dict[Node, Pattern] = {}
        self._facts: dict[Callable, Any] = {}

    def fact(self, derive: Callable[[Context], T]) -> T:
        """`derive(self)`, computed once for this graph."""
        if derive not in self._facts:
            self._facts[derive] = derive(self)
        return self._facts[derive]

    @property
    def graph_break(self) -> str | None:
        """Dynamo's reason for the graph break that ends this graph; None where none does."""
        cause = getattr(self.module, "compile_subgraph_reason", None)
        return getattr(cause, "reason", "") if getattr(cause, "graph_break", False) else None


@dataclass(frozen=True)
class Candidate:
    """A place that has the pattern's dataflow, before the guards have seen it.

    Attributes:
        output: the node whose value the site computes. nodes: all nodes that would go, output included.
        inputs: nodes whose values the site reads. capture: the pattern's own description of the site.
        core: the nodes that name the site (their common module); empty: all of `nodes`.
        typed: the capture says in which types the site's products run, so that their autocast modes may differ.
    """

    output: Node
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    capture: Any
    core: tuple[Node, ...] = ()
    typed: bool = False


Capture = Callable[[Context, Node], "Candidate | Reject | None"]
Guard = Callable[[Context, Candidate], "Reject | None"]


@dataclass(frozen=True)
class Pattern:
    """A declared subgraph.

    Attributes:
        name: short and unique. kind: "attention" or "ffn". equation: what it matches and what takes its place.
        anchors: targets of the calls where it is tried; "*text*" stands for every target with such a name, `CUSTOM` for
            the operators of other libraries.
        capture: reads the dataflow around one. guards: run in order after `SAFETY`; the first refusal counts.
    """

    name: str
    kind: str
    equation: str = ""
    anchors: tuple[Any, ...] = ()
    capture: Capture | None = field(default=None, repr=False)
    guards: tuple[Guard, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Match:
    """A place that may be replaced.

    Attributes:
        pattern: which one. output: node whose value the site computes. nodes: interior nodes, output included; all die.
        capture: AttentionCapture or FFNCapture. where: "file:line" of the model's code. path: module path.
    """

    pattern: Pattern
    output: Node
    nodes: tuple[Node, ...]
    capture: Any
    where: str = ""
    path: str = ""


@dataclass(frozen=True)
class Skipped:
    """A candidate that was refused.

    Attributes:
        kind, pattern_name: what it would have been. node: the anchor. reason: why not. where, path: as in `Match`.
    """

    kind: str
    pattern_name: str
    node: Node
    reason: Reject
    where: str = ""
    path: str = ""


def find_matches(context: Context, patterns: Iterable[Pattern]) -> tuple[list[Match], list[Skipped]]:
    """All matches and refused candidates of one graph, each list in graph order.

    Patterns that share an anchor are tried in the order given; the first match takes the nodes, and no node belongs to
    two matches. A candidate refused by several patterns is reported once, with the reason of the first.
    """
    patterns = tuple(patterns)
    by_target: dict[Any, list[Pattern]] = {}
    matches: list[Match] = []
    skipped: list[Skipped] = []
    for node in context.analysis.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target not in by_target:
            by_target[node.target] = [p for p in patterns if _is_anchor(node.target, p.anchors)]
        refused: Skipped | None = None
        for pattern in by_target[node.target]:
            result = _try(context, pattern, node)
            if isinstance(result, Match):
                matches.append(result)
                context.taken.update(dict.fromkeys(result.nodes, pattern))
                refused = None
                break
            refused = refused or result
        if refused is not None:
            skipped.append(refused)
            log.debug("%s at %s: %s", refused.pattern_name, node.name, refused.reason)
    matches.sort(key=lambda m: context.analysis.order[m.output])
    return matches, skipped


def _is_anchor(target: Any, anchors: Sequence[Any]) -> bool:
    if target in anchors or (CUSTOM in anchors and is_custom(target)):
        return True
    name = str(target if isinstance(target, str) else getattr(target, "__name__", target))
    return any(isinstance(a, str) and "*" in a and fnmatch(name, a) for a in anchors)


def _try(context: Context, pattern: Pattern, node: Node) -> Match | Skipped | None:
    assert pattern.capture is not None
    found = pattern.capture(context, node)
    if found is None:
        return None
    if isinstance(found, Reject):
        return Skipped(pattern.kind, pattern.name, node, found, where(node), common_path([node]))
    place = (where(node), common_path(found.core or found.nodes))
    for guard in (*SAFETY, *pattern.guards):
        reason = guard(context, found)
        if reason is not None:
            return Skipped(pattern.kind, pattern.name, node, reason, *place)
    return Match(pattern, found.output, found.nodes, found.capture, *place)


# ---------------------------------------------------------------------------------------------------------------------
# Guards that every replacement needs
# ---------------------------------------------------------------------------------------------------------------------


def belongs_to_one_site(context: Context, c: Candidate) -> Reject | None:
    """No node may be part of two sites."""
    shared = next((n for n in c.nodes if n in context.taken), None)
    return None if shared is None else Reject("{} ({}) already belongs to another site", describe(shared), shared.name)


def unused_elsewhere(context: Context, c: Candidate) -> Reject | None:
    """Values inside the site are read inside the site only; its output is the one way out."""
    inside = set(c.nodes)
    # A local variable that is still alive at a graph break leaves the graph, whether anybody reads it or not.
    how = "returned" if context.graph_break is None else "kept across a graph break (TORCH_LOGS=graph_breaks)"
    for node in c.nodes:
        if node is c.output:
            continue
        for user in node.users:
            if user.op == "output":
                return Reject("the result of {} ({}) is also {}", describe(node), node.name, how)
            if user not in inside:
                return Reject("the result of {} ({}) is also used by {}", describe(node), node.name, describe(user))
    return None


# Calls whose arguments autocast narrows. Of any other it changes the type of the result at most, which the graph says.
_NARROWED = {torch.matmul, F.linear, F.scaled_dot_product_attention, F.prelu, torch.prelu}


def in_one_mode(context: Context, c: Candidate) -> Reject | None:
    """The whole site runs under one grad mode, and its products under one autocast setting."""
    regions = context.analysis.regions
    grad, autocast, others = regions[c.output]
    for node in c.nodes:
        mode = regions[node]
        if (mode[0], mode[2]) != (grad, others) or (mode[1] != autocast and node.target in _NARROWED and not c.typed):
            return Reject("{} ({}) runs under another grad or autocast mode", describe(node), node.name)
    return Reject("it runs inside of a functorch transform (vmap, jvp) or an inference region") if others else None


def unwritten(context: Context, c: Candidate) -> Reject | None:
    """Nothing that the site reads or computes is written to in place before its output is there."""
    analysis = context.analysis
    start = min(analysis.order[n] for n in c.nodes)
    hit = analysis.written_between((*c.nodes, *c.inputs), start - 1, analysis.order[c.output] + 1)
    return None if hit is None else Reject("{} ({}) is written to in place", describe(hit), hit.name)


SAFETY: tuple[Guard, ...] = (belongs_to_one_site, unused_elsewhere, in_one_mode, unwritten)


def describe_matches(matches: Sequence[Match], skipped: Sequence[Skipped]) -> str:
    """Readable text of what `find_matches` returned, for dumps."""
    lines = []
    for m in matches:
        lines.append(f"{m.pattern.kind} {m.path or '?'} [{m.pattern.name}] -> {m.output.name}  {m.where}")
        lines.append(f"    {m.capture}")
        lines.append("    replaces " + " ".join(n.name for n in m.nodes))
    for s in skipped:
        lines.append(f"skipped {s.kind} {s.path or '?'} [{s.pattern_name}] at {s.node.name}: {s.reason}  {s.where}")
    return "\n".join(lines)
