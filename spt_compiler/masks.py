"""Masks are code where that can be proved: what a site's masks say about (b, h, q, k), as one expression.

A mask is lifted in one of two ways. `lifting` reads the graph that makes it, which works for symbolic lengths and leaves
reads of per-token vectors (padding, packed documents). Failing that, a mask that depends on static positions alone is
evaluated once, which *is* the proof of what it says, and compared with a band. A conjunction is taken apart first, so that
one stubborn part stays a tensor and no more. The rewritten graph neither builds nor reads what was lifted.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .expression import Expression, call, conjuncts, const, parse, substitute, var
from .graph import dtype, is_bounded, is_tensor, needs_grad, rank, same_size, settled, shape
from .lifting import Index, Lifter, NotLifted, renamed
from .scope import Scope

CAUSAL = "k <= q"
_CAUSAL = parse(CAUSAL)
# Evaluating a producer takes memory for the whole mask, once, while compiling.
_LARGEST = 1 << 28
# An additive mask at or below this gives weights of exactly zero beside any allowed key.
_MASKED_OUT = -1e30

_AND = {operator.and_, torch.logical_and, torch.bitwise_and}
_RESHAPES = {torch.ops.aten.expand.default, "expand", "contiguous", "clone", torch.clone}


@dataclass(frozen=True)
class LiftedMask:
    """What is left of a site's masks.

    Attributes:
        expr: the expression in force ("" if there is none): bool (True = allowed), or float (added to the logits).
        tensors: what it reads as t0, t1, ..., each with the graph that computes it.
        allowed, disallowed: bool masks that are still read (True = allowed, True = masked out). bias: float masks that are
        still added, with their factors. lowest: the sum of those is clamped there from below (None: it is not).
        empty: what a row with nothing allowed does.
    """

    expr: str
    tensors: tuple[tuple[Scope, fx.Node], ...]
    allowed: tuple[fx.Node, ...]
    disallowed: tuple[fx.Node, ...]
    bias: tuple[tuple[fx.Node, float], ...]
    empty: str
    lowest: float | None = None

    @property
    def is_causal(self) -> bool:
        """Whether "k <= q" is one of the conditions."""
        return bool(self.expr) and _CAUSAL in conjuncts(parse(self.expr))


def lift(capture: Any, scope: Scope, scores: tuple[Any, ...]) -> LiftedMask:
    """Takes the masks of one attention site apart.

    Args: capture: an `AttentionCapture`. scope: the graph that holds it. scores: sizes of its scores [..., H, Tq, Tk].
    """
    site = _Site(scope, tuple(map(settled, scores)))
    conditions = [_CAUSAL] if capture.causal else []
    added: list[tuple[fx.Node, Expression]] = []
    allowed: list[fx.Node] = []
    disallowed: list[fx.Node] = []
    bias: list[tuple[fx.Node, float]] = []
    for node, factor in capture.bias:
        found = site.additive(node, factor)
        if found is None:
            bias.append((_without_expansion(scope, node), factor))
        elif found == const(0.0):
            continue  # it allows everything
        elif _hides(found) and found.args[2].value == float("-inf"):
            conditions.append(found.args[0])
        elif capture.lowest is not None and not (_hides(found) and found.args[2].value >= capture.lowest):
            added.append((node, site.lifter.build.make("max", found, capture.lowest)))
        else:
            added.append((node, found))
    for given, kept, inverse in ((capture.allowed, allowed, False), (capture.disallowed, disallowed, True)):
        for node in given:
            for part in [node] if inverse else _conjuncts(scope, node):
                condition = site.condition(part)
                if condition is None:
                    kept.append(_without_expansion(scope, part))
                else:
                    conditions.append(site.lifter.build.make("not", condition) if inverse else condition)
    # A finite fill is as good as -inf where every row keeps its own key, whatever the other masks hide. Elsewhere a row that
    # another mask empties would attend to what the fill hides, as it does where the fill is a number.
    fills = [(n, e) for n, e in added if _hides(e) and all(map(_keeps_itself, site.rows(e.args[0])))]
    others = [*(n for n, _ in bias), *(n for n, e in added if (n, e) not in fills and not _is_zero(substitute(e, {"k": "q"})))]
    hidden = [*allowed, *disallowed, *(c for condition in conditions for c in site.rows(condition) if not _keeps_itself(c))]
    if not hidden and all(is_bounded(n, -_MASKED_OUT) for n in others):
        conditions = [*(e.args[0] for _, e in fills), *conditions]
        added = [pair for pair in added if pair not in fills]
    parts = _ordered(c for condition in conditions for c in conjuncts(condition))
    exprs, tensors = renamed(site.lifter, [*parts, *(e for _, e in added)])
    expr = _joined(exprs[: len(parts)], exprs[len(parts) :])
    lowest = capture.lowest if bias else None
    return LiftedMask(expr, tensors, tuple(allowed), tuple(disallowed), tuple(bias), capture.empty, lowest)


def _ordered(parts: Iterable[Expression]) -> list[Expression]:
    """Each condition once, those on positions alone first."""
    found = [p for p in dict.fromkeys(parts) if p != const(True)]
    return sorted(found, key=lambda p: (p != _CAUSAL, any(n.startswith("t") for n in p.variables)))


def _joined(conditions: list[Expression], added: list[Expression]) -> str:
    expr: Expression | None = None
    for condition in conditions:
        expr = condition if expr is None else expr & condition
    if added:
        total = added[0]
        for term in added[1:]:
            total = total + term
        expr = total if expr is None else call("where", expr, total, float("-inf"))
    return "" if expr is None else str(expr)


def _hides(expr: Expression) -> bool:
    """Whether a value is a choice of 0 where allowed and something hopelessly low elsewhere."""
    if expr.op != "where":
        return False
    _, kept, masked = expr.args
    return kept.op == masked.op == "const" and kept.value == 0 and masked.value <= _MASKED_OUT


def _keeps_itself(condition: Expression) -> bool:
    """Whether a condition surely allows k == q: bounds on k - q on either side of zero, and no data."""
    if condition == _CAUSAL or condition == parse("q <= k"):
        return True
    difference = condition.args[0] if condition.op == "<=" else None
    return difference in (parse("k - q"), parse("q - k")) and condition.args[1].op == "const" and condition.args[1].value >= 0


def _is_zero(expr: Expression) -> bool:
    """Whether a value is surely zero, as a distance of a position from itself is, times a slope or not."""
    if expr.op == "const":
        return expr.value == 0
    if expr.op in ("+", "-"):
        return expr.op == "-" and expr.args[0] == expr.args[1] or all(map(_is_zero, expr.args))
    if expr.op == "*":
        return any(map(_is_zero, expr.args))
    return expr.op in ("neg", "abs", "/") and _is_zero(expr.args[0])


@dataclass
class _Site:
    """The masks of one site while they are lifted."""

    scope: Scope
    scores: tuple[Any, ...]

    def __post_init__(self) -> None:
        *_, self.n_q, self.n_k = self.scores
        extent = {"q": self.n_q, "k": self.n_k}
        self.lifter = Lifter({n: s if isinstance(s, int) else None for n, s in extent.items()})

    def rows(self, condition: Expression) -> list[Expression]:
        """The conditions that a row must meet; with fewer keys than queries no row can count on its own position."""
        return list(conjuncts(condition)) if same_size(self.n_q, self.n_k) else [const(False)]

    def index(self, node: fx.Node) -> Index:
        """The element of a mask that belongs to the score at b, h, q, k. Raises: NotLifted."""
        lead = len(self.scores) - 2
        b, h, q, k = map(var, "bhqk")
        if lead <= 1:
            full: list[Expression] = [b][:lead]  # [N, Tq, Tk]: N is the batch of the operator
        else:
            *batch, _ = self.scores[:lead]
            full = [h]
            for size in reversed(batch[1:]):  # leading dims are flattened into one
                if not isinstance(size, int):
                    raise NotLifted("symbolic leading dims")
                full.insert(0, call("mod", b, size))
                b = call("floordiv", b, size)
            full.insert(0, b)
        full += [q, k]
        sizes = shape(node)
        if len(sizes) > len(full):
            raise NotLifted("a mask of more dims than the scores")
        return tuple(const(0) if s == 1 else i for i, s in zip(full[len(full) - len(sizes) :], sizes, strict=True))

    def condition(self, node: fx.Node) -> Expression | None:
        """A bool mask as an expression, or None. A mask that is no larger than a vector stays a vector."""
        try:
            return self.lifter.element(self.scope, node, self.index(node))
        except NotLifted:
            text = _by_value(node, self.scope, self.n_q, self.n_k)
            return None if text is None else parse(text or "true")

    def additive(self, node: fx.Node, factor: float) -> Expression | None:
        """`factor` times a float mask that varies over keys as an expression, or None. ALiBi per head and key is a read.

        Factors that enlarge stay with their tensor: the lowest number, twice, is -inf there and not here.
        """
        if needs_grad(node) or dtype(node) is torch.float64 or rank(node) < 2 or shape(node)[-1] == 1:
            return None
        if factor != 1.0 and (abs(factor) > 1.0 or dtype(node) is not torch.float32):
            return None
        try:
            found = self.lifter.element(self.scope, node, self.index(node))
            found = found if factor == 1.0 else self.lifter.build.make("*", found, factor)
        except NotLifted:
            return None
        return found if "k" in found.variables or found == const(0.0) else None


def _target(node: fx.Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def _without_expansion(scope: Scope, node: fx.Node) -> fx.Node:
    """The tensor that is broadcast to the scores, before it was expanded."""
    while _target(node) in _RESHAPES and is_tensor(node.args[0]) and rank(node.args[0]) == rank(node):
        if not _reads_the_same(scope, node):
            break
        node = node.args[0]
    return node


def _reads_the_same(scope: Scope, node: fx.Node) -> bool:
    """Whether the arguments of a call still say what its result does: none of them is written in place."""
    return not any(map(scope.is_written, (node, *node.all_input_nodes)))


def _conjuncts(scope: Scope, node: fx.Node) -> list[fx.Node]:
    """Parts of a conjunction that broadcast to the scores each on its own: of equal rank, behind expansions only."""
    inner = _without_expansion(scope, node)
    if _target(inner) in _AND and len(inner.args) == 2 and _reads_the_same(scope, inner):
        if all(is_tensor(a) and dtype(a) is torch.bool and rank(a) in (0, rank(inner)) for a in inner.args):
            return [part for a in inner.args for part in _conjuncts(scope, a)]
    return [inner]


def _by_value(node: fx.Node, scope: Scope, n_q: Any, n_k: Any) -> str | None:
    """Text of a mask that depends on static positions alone; "" if it allows everything; None if that cannot be proved."""
    if not isinstance(n_q, int) or not isinstance(n_k, int) or n_q * n_k > _LARGEST:
        return None
    if not is_tensor(node) or node.meta["example_value"].numel() > _LARGEST:
        return None
    mask = scope.constant(node)
    if mask is None or mask.dtype != torch.bool:
        return None
    if bool(mask.all()):
        return ""
    if mask.dim() < 2:
        return None
    rows = mask.flatten(0, -3) if mask.dim() > 2 else mask[None]
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        return None
    mask = rows[0]
    if tuple(mask.shape) != (n_q, n_k):
        return None
    q, k = torch.arange(n_q)[:, None], torch.arange(n_k)[None]
    return CAUSAL if torch.equal(mask, k <= q) else _window(mask, q, k)


def _window(mask: Tensor, q: Tensor, k: Tensor) -> str | None:
    """A band: keys from `back` before the query to `ahead` after it."""
    offsets = (k - q)[mask]
    if not offsets.numel():
        return None
    back, ahead = int(offsets.min()), int(offsets.max())
    if not torch.equal(mask, (k - q >= back) & (k - q <= ahead)):
        return None
    first = CAUSAL if ahead == 0 else f"k - q <= {ahead}"
    # A bound that no pair can miss says nothing.
    parts = [p for p, says in ((first, ahead < k.shape[1] - 1), (f"q - k <= {-back}", -back < q.shape[0] - 1)) if says]
    return " & ".join(f"({p})" for p in parts) if len(parts) > 1 else parts[0]


def text(mask: LiftedMask) -> str:
    """For reports: the expression with the names of what it reads, and "tensor" for masks that are read as a whole."""
    names = [node.name for _, node in mask.tensors]
    expr = re.sub(r"\bt(\d+)\[", lambda found: f"{names[int(found[1])]}[", mask.expr)
    return " & ".join([*([expr] if expr else []), *(["tensor"] if mask.allowed or mask.bias or mask.disallowed else [])])
