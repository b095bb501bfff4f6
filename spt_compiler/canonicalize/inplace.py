"""In-place calls become functional where nothing can see the difference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..graph import (
    INPLACE_OPERATORS,
    Analysis,
    inplace_flag,
    inplace_position,
    is_tensor,
    mutated_arguments,
    same_shape,
    storage,
    value,
)
from .editor import Editor, Unknown

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
    *("divide", "true_divide", "floor", "triu", "tril", "logical_and", "logical_or", "logical_not"),
    *("addmm", "baddbmm", "addcmul"),
}
_FUNCTIONAL_CALLS: dict[Any, Any] = {
    torch.relu_: F.relu,
    F.relu_: F.relu,
    torch.tanh_: torch.tanh,
    torch.sigmoid_: torch.sigmoid,
}


def functionalize(e: Editor) -> None:
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
        except Unknown:
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
            position = inplace_position(node.target)
            args = tuple(False if i == position else a for i, a in enumerate(args))
        return node.target, args, {**node.kwargs, **({"inplace": False} if "inplace" in node.kwargs else {})}
    return None
