"""Masks are code where that can be proved: recognises the producers of masks that depend on positions alone.

A mask that the graph builds from `arange` and constants is a function of the static sizes, so evaluating its producer once
*is* the proof of what it says: compared entry by entry with a causal, windowed or all-true mask, it becomes an expression,
and the rewritten graph neither builds nor reads a Tq x Tk tensor. A conjunction is taken apart first; what depends on data
(padding) stays a tensor, but one of [B, 1, 1, Tk] and no longer [B, 1, Tq, Tk]. Symbolic sizes prove nothing: such masks
are read as tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .scope import Scope

CAUSAL = "k <= q"
# Evaluating a producer takes memory for the whole mask, once, while compiling.
_LARGEST = 1 << 28
# An additive mask at or below this gives weights of exactly zero beside any allowed key.
_MASKED_OUT = -1e30

_AND = {operator.and_, torch.logical_and, torch.bitwise_and, torch.Tensor.logical_and, "logical_and", "bitwise_and", "__and__"}
_RESHAPES = {torch.ops.aten.expand.default, "expand", "contiguous", "bool", "clone", torch.clone}


@dataclass(frozen=True)
class LiftedMask:
    """What is left of a site's masks.

    Attributes:
        expr: the expression that allows a pair ("" if there is none). allowed: bool masks that are still read (True = allowed).
        bias: float masks that are still added, with their factors. empty: what a row with nothing allowed does.
    """

    expr: str
    allowed: tuple[fx.Node, ...]
    bias: tuple[tuple[fx.Node, float], ...]
    empty: str


def lift(capture: Any, scope: Scope, n_q: Any, n_k: Any) -> LiftedMask:
    """Takes the masks of one attention site apart.

    Args: capture: an `AttentionCapture`. scope: the graph that holds it. n_q, n_k: lengths; symbolic ones lift nothing.
    """
    exprs = [CAUSAL] if capture.causal else []
    allowed: list[fx.Node] = []
    bias: list[tuple[fx.Node, float]] = []
    candidates = list(capture.allowed)
    for node, factor in capture.bias:
        condition = _additive_condition(node) if factor == 1.0 else None
        parts = [] if condition is None else [_expression(c, scope, n_q, n_k) for c in _conjuncts(condition)]
        if condition is None or not parts or any(p is None or (p and CAUSAL not in p) for p in parts):
            # With a tensor in it some row may allow nothing, and then the sum of score and fill matters: it stays added.
            bias.append((node, factor))
        else:
            candidates.append(condition)  # a causal mask or window: every row sees itself
    for node in candidates:
        for part in _conjuncts(node):
            expr = _expression(part, scope, n_q, n_k)
            if expr is None:
                allowed.append(part)
            elif expr and expr not in exprs:
                exprs.append(expr)
    return LiftedMask(
        " & ".join(exprs if len(exprs) < 2 else [f"({e})" for e in exprs]), tuple(allowed), tuple(bias), capture.empty
    )


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _target(node: fx.Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def _conjuncts(node: fx.Node) -> list[fx.Node]:
    """Parts of a conjunction that broadcast to the scores each on its own: of equal rank, behind expansions only."""
    inner = node
    while _target(inner) in _RESHAPES and isinstance(inner.args[0], fx.Node) and _value(inner.args[0]) is not None:
        if _value(inner.args[0]).dim() != _value(inner).dim() or _value(inner.args[0]).dtype != torch.bool:
            break
        inner = inner.args[0]
    if _target(inner) in _AND and len(inner.args) == 2:
        values = [_value(a) for a in inner.args]
        if all(isinstance(v, Tensor) and v.dtype == torch.bool and v.dim() in (0, _value(inner).dim()) for v in values):
            return [part for a in inner.args for part in _conjuncts(a)]
    return [inner]


def _additive_condition(node: fx.Node) -> fx.Node | None:
    """The bool mask behind `where(mask, 0, very negative)`, or None."""
    value = _value(node)
    while _target(node) in _RESHAPES and isinstance(node.args[0], fx.Node) and _value(node.args[0]).dim() == value.dim():
        node = node.args[0]
    if _target(node) is not torch.where or len(node.args) != 3:
        return None
    condition, kept, masked = node.args
    kept, masked = _scalar(kept), _scalar(masked)
    if not isinstance(condition, fx.Node) or kept != 0 or masked is None or masked > _MASKED_OUT or masked == float("-inf"):
        return None
    return condition if _value(condition).dim() == value.dim() else None


def _scalar(value: Any) -> float | None:
    """A Python number, or that of a constant 0-d tensor in the graph."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node) and _target(value) is torch.zeros and tuple(_value(value).shape) == ():
        return 0.0
    if isinstance(value, fx.Node) and _target(value) in (torch.tensor, torch.scalar_tensor):
        return float(value.args[0]) if isinstance(value.args[0], int | float) else None
    return None


def _expression(node: fx.Node, scope: Scope, n_q: Any, n_k: Any) -> str | None:
    """Text of a mask that depends on positions alone; "" if it allows everything; None if that cannot be proved."""
    if not isinstance(n_q, int) or not isinstance(n_k, int) or n_q * n_k > _LARGEST:
        return None
    if not isinstance(_value(node), Tensor) or _value(node).numel() > _LARGEST:
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
    if torch.equal(mask, k <= q):
        return CAUSAL
    return _window(mask, q, k)


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


def text(lifted: LiftedMask, disallowed: Sequence[fx.Node]) -> str:
    """For reports: the expression, and "tensor" for what is still read."""
    tensors = ["tensor"] if lifted.allowed or lifted.bias or disallowed else []
    return " & ".join([*([lifted.expr] if lifted.expr else []), *tensors])
