"""Calls that hide a site from the matcher are opened: attention modules, the inference-only encoder layer, activations."""

from __future__ import annotations

import logging
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..graph import Analysis, dtype, is_float, is_tensor, rank, same_shape, same_size, settled, shape, value
from .editor import Editor, Unknown

log = logging.getLogger(__name__)


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class _Recorder(TorchFunctionMode):
    """Runs a Python function on example values and adds the torch calls it makes to the graph."""

    def __init__(self, editor: Editor, at: fx.Node, inputs: Iterable[fx.Node]):
        super().__init__()
        self.editor, self.at = editor, at
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Any] = []  # an id means something only while its object lives
        self.symbols: dict[int, fx.Node] = {}
        for node in inputs:
            if isinstance(node.meta.get("example_value"), _SYMBOLS):
                self.symbols[id(node.meta["example_value"])] = node
            if is_tensor(node):
                self.remember(value(node), node)

    def remember(self, tensor: Any, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.kept.append(tensor)

    def node_of(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            if id(item) not in self.nodes:
                raise Unknown
            return self.nodes[id(item)]
        if id(item) in self.symbols:
            return self.symbols[id(item)]
        if isinstance(item, torch.SymInt):
            return self.size(settled(item), item.node.expr)
        if isinstance(item, _SYMBOLS):
            raise Unknown  # it would have to become a node; such calls stay as they are
        return item

    def size(self, known: Any, expr: Any) -> Any:
        """A symbolic size as an argument: the number it has been settled to, a size of a tensor, sums and products of those."""
        if isinstance(known, int) or expr.is_Integer:
            return known if isinstance(known, int) else int(expr)
        graph = self.editor.graph
        for tensor in self.kept:
            for dim, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == expr:
                    return self.added(graph.call_function(torch.ops.aten.sym_size.int, (self.nodes[id(tensor)], dim)), size)
        if not (expr.is_Mul or expr.is_Add):
            raise Unknown
        combine = operator.mul if expr.is_Mul else operator.add
        total, *rest = (self.size(None, part) for part in expr.args)
        for part in rest:
            outcome = combine(*(x.meta["example_value"] if isinstance(x, fx.Node) else x for x in (total, part)))
            total = self.added(graph.call_function(combine, (total, part)), outcome)
        return total

    def added(self, node: fx.Node, outcome: Any) -> fx.Node:
        self.editor.describe(node, self.at, outcome)
        self.editor.created.append(node)
        return node

    def __torch_function__(self, func: Any, types_: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        outcome = func(*args, **kwargs)
        tensors = [t for t in tree_leaves(outcome) if isinstance(t, torch.Tensor)]
        if not tensors:
            return outcome
        name = getattr(func, "__name__", "")
        with self.editor.graph.inserting_before(self.at):
            node_args, node_kwargs = tree_map(self.node_of, (tuple(args), dict(kwargs)))
            if name == "__get__":
                node = self.editor.graph.call_function(getattr, (node_args[0], func.__self__.__name__))
            elif getattr(torch.Tensor, name, None) is func:
                node = self.editor.graph.call_method(name, node_args, node_kwargs)
            else:
                node = self.editor.graph.call_function(func, node_args, node_kwargs)
            self.added(node, outcome)
            if isinstance(outcome, torch.Tensor):
                self.remember(outcome, node)
            else:
                for i, part in enumerate(outcome):
                    item = self.editor.graph.call_function(operator.getitem, (node, i))
                    self.remember(part, self.added(item, part))
        return outcome


def expand_opaque(e: Editor) -> None:
    """Opens calls that hide a site: F.multi_head_attention_forward, the inference-only encoder layer, custom activations."""
    for node in list(e.graph.nodes):
        if node.op != "call_function":
            continue
        custom = node.target is torch.ops.higher_order.autograd_function_apply
        if custom or node.target in _OPAQUE:
            e.created, e.at = [], node
            try:
                _open_autograd_function(e, node) if custom else _open(e, node, _OPAQUE[node.target])
            except Exception as error:  # anything the function raises on example values: the call stays as it is
                log.debug("%s stays opaque: %s: %s", node.name, type(error).__name__, error)
                for created in reversed(e.created):
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
            raise Unknown
        node.replace_all_uses_with(results[0])  # type: ignore[arg-type]
    else:
        if any(u.target is not operator.getitem or (u.users and results[u.args[1]] is None) for u in users):  # type: ignore[index]
            raise Unknown
        for user in users:
            if user.users:
                user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index, arg-type]
            e.graph.erase_node(user)
    e.graph.erase_node(node)
    for created in reversed(e.created):
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
        raise Unknown

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
_POINTS = (*(i * 0.173 for i in range(-70, 71)), *(s * x for x in (25.0, 80.0, 1e3, 1e4) for s in (1, -1)))


def _open_autograd_function(e: Editor, node: fx.Node) -> None:
    """A custom autograd function of a tensor, or of that and a bias -> the activation that it is (of their sum), if its
    backward is that one's derivative.

    Forward and backward are run on points in double precision, the latter on gradients of all sizes; agreement to a
    relative 1e-6 is the proof (such functions round their constants). Other functions stay opaque.
    """
    bodies = [getattr(e.module, str(a.target), None) for a in node.args[:2] if isinstance(a, fx.Node)]
    tensors, users = [a for a in node.args[2:] if is_tensor(a)], list(node.users)
    sizes = [a for a in node.args[2:] if not is_tensor(a)]  # symbolic ones, which an activation has no use for
    if not 1 <= len(tensors) <= 2 or len(bodies) != 2 or len(users) != 1 or not all(isinstance(a, fx.Node) for a in sizes):
        raise Unknown
    x, *bias = tensors
    if users[0].target is not operator.getitem or users[0].args[1] != 0 or not is_float(users[0]):
        raise Unknown
    if not same_shape(shape(users[0]), shape(x)) or dtype(users[0]) is not dtype(x):
        raise Unknown
    if any(rank(b) != 1 or not same_size(shape(b)[0], shape(x)[-1]) for b in bias) or (bias and rank(x) < 2):
        raise Unknown
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.enable_grad():
        points = torch.tensor(_POINTS, dtype=torch.float64)
        shifts = torch.tensor([-0.4, 0.0, 0.7], dtype=torch.float64)
        probes = [points.view(*(1,) * (rank(x) - 2), -1, 1).expand(*(-1,) * (rank(x) - 1), 3), shifts] if bias else [points]
        given = iter(probes)
        outputs, saved = fx.Interpreter(bodies[0]).run(*(next(given) if is_tensor(a) else 1 for a in node.args[2:]))
        y = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        incoming = 100 * torch.sin(37 * torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
        gradients = fx.Interpreter(bodies[1]).run(incoming, *saved)
        gradients = gradients if isinstance(gradients, (tuple, list)) else (gradients,)
        gradients = [g for a, g in zip(node.args[2:], gradients, strict=True) if is_tensor(a)]
        leaves = [p.clone().requires_grad_() for p in probes]
        for function, kwargs in _ACTIVATIONS:
            expected = function(sum(leaves[1:], leaves[0]), **kwargs)
            slopes = torch.autograd.grad(expected, leaves, incoming)
            if _agree(y, expected) and all(_agree(a / 100, b / 100) for a, b in zip(gradients, slopes, strict=True)):
                e.at = users[0]
                result = e.call(function, e.call(operator.add, x, *bias) if bias else x, **kwargs)
                users[0].replace_all_uses_with(result)
                e.graph.erase_node(users[0])
                e.graph.erase_node(node)
                return
    raise Unknown


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b.detach()).abs() <= 1e-6 * (1 + b.abs())).all())
