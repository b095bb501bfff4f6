"""Feed-forward blocks: two projections by parameters with an element-wise function between them.

What stands between the projections is read as an expression of the closed language (`expression.py`), whatever the model
calls it: a function, a module or a formula. Formulas that are a function with a name (tanh and erf GELU, SiLU, ReLU) get
that name, by value and not by spelling. Each element-wise call is declared once in `ELEMENTWISE`.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..canonicalize import is_weight, one_index, swapped
from ..errors import ExpressionError, Reject
from ..expression import Expression, call, evaluate, substitute, var
from ..graph import (
    Arguments,
    describe,
    dtype,
    is_float,
    is_hook,
    is_tensor,
    number,
    rank,
    same_shape,
    same_size,
    shape,
    without_casts,
)
from ..pattern import CUSTOM, Candidate, Context, Pattern, is_custom

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weight:
    """Rows `start:stop:step` of what F.linear takes ([F, E] or a bias [F]); None: from the first, to the last, each."""

    node: Node
    start: int | None = None
    stop: int | None = None
    step: int | None = None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop, self.step)


@dataclass(frozen=True)
class Lora:
    """A low-rank branch: `scaling * (a_out @ b.T + bias)` is added to a projection, where a_out = dropout(x) @ a.T.

    Attributes:
        a: [r, E] and b: [F, r], as F.linear takes them; bias: [F] or None. a_out: [..., r], what B reads.
        dropout_p: of what A reads, where that is the hidden activation; elsewhere A and its dropout are outside of the site.
        part: the projection is a part of a fused layer, and b has its rows alone.
    """

    a: Node
    b: Node
    bias: Node | None
    scaling: float
    a_out: Node
    dropout_p: float = 0.0
    part: bool = False

    def rows_of(self, node: Node, projection: Weight) -> Weight:
        """The rows of b, or of the bias, that belong to those of a projection's weight."""
        return Weight(node) if self.part else replace(projection, node=node)


@dataclass(frozen=True)
class FFNCapture:
    """act(x @ w_in[0].T + b_in[0], x @ w_in[1].T + b_in[1]) @ w_out.T + b_out.

    Attributes:
        x: [..., E]. w_in: one or two [F, E] (rows of possibly fused weights); b_in: their biases or None.
        w_out: [E, F]; b_out: [E] or None. act: expression in x0, x1 (pre-activations) and a0, a1 ... (`act_in`: tensors
        with one element or [F]). dropout_p: of the hidden activation. width: F. lora: the branches of each in-projection
        (`Lora.rows_of` their B). lora_out: branches of the out-projection; their A reads the hidden activation.
        base: the call of w_out, before the branches are added.
    """

    x: Node
    w_in: tuple[Weight, ...]
    b_in: tuple[Weight | None, ...]
    w_out: Node
    b_out: Node | None
    act: str
    act_in: tuple[Node, ...]
    dropout_p: float
    width: int
    lora: tuple[tuple[Lora, ...], ...] = ()
    lora_out: tuple[Lora, ...] = ()
    base: Node | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Element-wise calls as expressions
# ---------------------------------------------------------------------------------------------------------------------

Build = Callable[..., Expression]
ELEMENTWISE: dict[Any, Build] = {}

# Calls without which two linear layers are still one linear layer.
NONLINEAR: set[Any] = set()


def elementwise(*targets: Any, nonlinear: bool = True) -> Callable[[Build], Build]:
    """Declares how a call on tensors is written in the closed language; arguments arrive as expressions or numbers."""

    def register(function: Build) -> Build:
        ELEMENTWISE.update(dict.fromkeys(targets, function))
        if nonlinear:
            NONLINEAR.update(targets)
        return function

    return register


def _named(name: str) -> Build:
    return lambda x: call(name, x)


for _target, _name in {
    torch.exp: "exp",
    torch.expm1: "expm1",
    torch.erf: "erf",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    torch.sin: "sin",
    torch.cos: "cos",
    F.relu: "relu",
    F.silu: "silu",
}.items():
    elementwise(_target)(_named(_name))
for _target, _name in {
    torch.log: "log",
    torch.log1p: "log1p",
    torch.sqrt: "sqrt",
    torch.rsqrt: "rsqrt",
    torch.abs: "abs",
    torch.sign: "sign",
    torch.floor: "floor",
    torch.square: "square",
    operator.neg: "neg",
    operator.invert: "not",
}.items():
    elementwise(_target, nonlinear=False)(_named(_name))
for _target, _name in {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.and_: "&",
    operator.or_: "|",
}.items():
    elementwise(_target, nonlinear=False)(functools.partial(call, _name))
for _target, _name in {
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
    torch.maximum: "max",
    torch.minimum: "min",
}.items():
    elementwise(_target)(functools.partial(call, _name))


@elementwise(operator.pow, nonlinear=False)
def _pow(x: Any, y: Any) -> Expression:
    whole = (
        {2: lambda: call("square", x), 3: lambda: call("square", x) * x, 1: lambda: x}.get(y) if _is_number(y) else None
    )
    return whole() if whole else call("pow", x, y)


@elementwise(torch.reciprocal, nonlinear=False)
def _reciprocal(x: Any) -> Expression:
    return call("/", 1.0, x)


@elementwise(torch.where, nonlinear=False)
def _where(condition: Any, x: Any, y: Any) -> Expression:
    return call("where", condition, x, y)


@elementwise(torch.masked_fill, nonlinear=False)
def _masked_fill(x: Any, mask: Any, fill: Any) -> Expression:
    return call("where", mask, fill, x)


@elementwise(torch.clamp)
def _clamp(x: Any, low: Any = None, high: Any = None) -> Expression:
    x = x if low is None else call("max", x, _real(low))
    return x if high is None else call("min", x, _real(high))


@elementwise(F.gelu)
def _gelu(x: Any, approximate: str = "none") -> Expression:
    return call("gelu_tanh" if approximate == "tanh" else "gelu", x)


@elementwise(F.softplus)
def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Expression:
    if threshold != 20.0:
        raise ExpressionError(f"softplus with threshold {threshold}")
    return call("softplus", x) if beta == 1 else call("softplus", x * float(beta)) / float(beta)


@elementwise(F.leaky_relu)
def _leaky_relu(x: Any, negative_slope: float = 0.01, inplace: bool = False) -> Expression:
    return call("where", call(">", x, 0.0), x, x * float(negative_slope))


@elementwise(F.rrelu, torch.rrelu)
def _rrelu(x: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Expression:
    if training:
        raise ExpressionError("it draws its slopes at random")
    return _leaky_relu(x, (lower + upper) / 2)


@elementwise(F.prelu, torch.prelu)
def _prelu(x: Any, weight: Any) -> Expression:
    return call("where", call(">", x, 0.0), x, call("*", weight, x))


def _elu_like(x: Any, alpha: float, scale: float = 1.0, inner: float = 1.0) -> Expression:
    negative = call("expm1", x if inner == 1 else x / inner) * (alpha * scale)
    return call("where", call(">", x, 0.0), x if scale == 1 else x * scale, negative)


@elementwise(F.elu)
def _elu(x: Any, alpha: float = 1.0, inplace: bool = False) -> Expression:
    return _elu_like(x, float(alpha))


@elementwise(F.celu)
def _celu(x: Any, alpha: float = 1.0, inplace: bool = False) -> Expression:
    return _elu_like(x, float(alpha), inner=float(alpha))


@elementwise(F.selu)
def _selu(x: Any, inplace: bool = False) -> Expression:
    return _elu_like(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@elementwise(F.hardtanh)
def _hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Expression:
    return _clamp(x, min_val, max_val)


@elementwise(F.relu6)
def _relu6(x: Any, inplace: bool = False) -> Expression:
    return _clamp(x, 0.0, 6.0)


@elementwise(F.hardsigmoid)
def _hardsigmoid(x: Any, inplace: bool = False) -> Expression:
    return _clamp(x + 3.0, 0.0, 6.0) / 6.0


@elementwise(F.hardswish)
def _hardswish(x: Any, inplace: bool = False) -> Expression:
    return x * _hardsigmoid(x)


@elementwise(F.mish)
def _mish(x: Any, inplace: bool = False) -> Expression:
    return x * call("tanh", call("softplus", x))


@elementwise(F.softsign)
def _softsign(x: Any) -> Expression:
    return x / (call("abs", x) + 1.0)


@elementwise(F.logsigmoid)
def _logsigmoid(x: Any) -> Expression:
    return -call("softplus", -x)


@elementwise(F.tanhshrink)
def _tanhshrink(x: Any) -> Expression:
    return x - call("tanh", x)


@elementwise(F.hardshrink, torch.hardshrink)
def _hardshrink(x: Any, lambd: float = 0.5) -> Expression:
    return call("where", call(">", call("abs", x), float(lambd)), x, 0.0)


@elementwise(F.softshrink)
def _softshrink(x: Any, lambd: float = 0.5) -> Expression:
    return x - _clamp(x, -float(lambd), float(lambd))


@elementwise(F.threshold, torch.threshold)
def _threshold(x: Any, threshold: float, value: float, inplace: bool = False) -> Expression:
    return call("where", call(">", x, float(threshold)), x, float(value))


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _real(x: Any) -> Any:
    return float(x) if _is_number(x) else x


# ---------------------------------------------------------------------------------------------------------------------
# Formulas that have a name
# ---------------------------------------------------------------------------------------------------------------------

_NAMES = ("relu", "silu", "gelu", "gelu_tanh")

# Agreement at these points to a relative 1e-7 is what makes two spellings one function: models round their constants
# (0.79788456) at about 1e-8, while exact and tanh GELU differ by 5e-4. The large ones tell a function from one that is clipped.
_LARGE = (1e-4, 25.0, 80.0, 1e3, 1e4, 1e5, 1e10, 1e30)
_POINTS = (*(i * 0.173 for i in range(-70, 71)), *_LARGE, *(-x for x in _LARGE))
_AGREEMENT = 1e-7


@functools.lru_cache(maxsize=512)
def with_names(expr: Expression) -> Expression:
    """`expr` with every formula in one pre-activation that is a function of the language replaced by that function."""
    names = expr.variables
    if len(names) == 1 and expr.op != "var":
        (name,) = names
        if name.startswith("x"):
            known = _recognise(expr, name)
            if known is not None:
                return call(known, var(name))
    if not expr.args:
        return expr
    return call(expr.op, *(with_names(a) for a in expr.args)) if expr.op != "read" else expr


def _recognise(expr: Expression, name: str) -> str | None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        points = torch.tensor(_POINTS, dtype=torch.float64)
        try:
            values = evaluate(expr, {name: points})
        except (ExpressionError, RuntimeError):
            return None
        if values.dtype != torch.float64 or values.shape != points.shape:
            return None
        for known in _NAMES:
            expected = evaluate(call(known, var(name)), {name: points})
            if bool(((values - expected).abs() <= _AGREEMENT * (1 + points.abs())).all()):
                return known
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What each value is to a feed-forward block
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A pre-activation: rows of a linear layer's output, with the low-rank branches that are added to it.

    Attributes:
        linear: the call. start, stop, step: rows (None: all), also of the branches. nodes: the calls that make it, the linear
        one included. lora: the branches. refused: why it cannot be part of a site.
    """

    linear: Node
    start: int | None = None
    stop: int | None = None
    step: int | None = None
    nodes: tuple[Node, ...] = ()
    lora: tuple[Lora, ...] = ()
    refused: Reject | None = None

    @property
    def rows(self) -> tuple[Any, ...]:
        return self.linear, self.start, self.stop, self.step, self.lora

    def of(self, node: Any) -> Weight:
        """These rows of a weight, or of a bias."""
        return Weight(node, self.start, self.stop, self.step)


@dataclass(frozen=True)
class Parts:
    """Several equal or unequal pieces of a projection's last dim, as chunk or split return them.

    bounds: start, stop and step of each. dim: they are not a tuple but a dim of their own, the last (-1) or the one before.
    """

    whole: Projection
    bounds: tuple[tuple[int, int, int | None], ...]
    nodes: tuple[Node, ...]
    dim: int | None = None


@dataclass(frozen=True)
class Branch:
    """The output of a low-rank branch, B(A(x)) times a number, before it is added to its projection.

    Attributes:
        own: the call of B as a projection of its own, which it is if nobody adds it to another one. lora: what it is.
        nodes: the calls that make it, from B on. a_call: the call of A. x: what A reads, without dropout and casts.
    """

    own: Projection
    lora: Lora
    nodes: tuple[Node, ...]
    a_call: Node
    x: Node


@dataclass(frozen=True)
class Hidden:
    """An element-wise function of projections of one input.

    Attributes:
        sources: linear calls it depends on. nonlinear: whether a non-linearity was passed. refused: what breaks it.
        curved: whether it has passed products or powers of projections: a block if nothing breaks it, and no near miss if
            something does, because norms are made of those too.
    """

    sources: frozenset[Node]
    nonlinear: bool = False
    refused: Reject | None = None
    curved: bool = False

    @property
    def is_activation(self) -> bool:
        """Whether a projection of it is a block, or the near miss of one."""
        return self.nonlinear or (self.curved and self.refused is None)


State = Projection | Parts | Branch | Hidden

# Calls without which two layers are one that count as a non-linearity only where nothing else breaks a block.
_CURVED = {
    *(torch.square, operator.pow, torch.reciprocal, torch.abs, torch.sign, torch.floor),
    *(torch.sqrt, torch.rsqrt, torch.log, torch.log1p),
}

# Calls whose result takes a factor >= 0 of their argument as its own.
_HOMOGENEOUS = {operator.mul, operator.neg, F.relu, F.leaky_relu}

# Steps that hand a hidden activation on unchanged, position by position.
_TRANSPARENT = {F.dropout, "to", "contiguous"}
_SPLITS = {"chunk", "split", "tensor_split", "unbind", torch.chunk, torch.split, torch.tensor_split, torch.unbind}
_SQUEEZES = {"squeeze", "unsqueeze", torch.squeeze, torch.unsqueeze}
_RESHAPES = {torch.reshape, "flatten", torch.flatten}  # of symbolic sizes a flatten stays one
_NORMS = {F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm, F.normalize, torch.rms_norm}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
_REDUCTIONS = {
    "mean",
    "sum",
    "norm",
    "var",
    "std",
    "amax",
    "amin",
    torch.mean,
    torch.sum,
    torch.norm,
    torch.linalg.norm,
    torch.linalg.vector_norm,
    torch.var,
    F.softmax,
}
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback", "scaled_grouped_mm")

# More sources than this is a sum over layers or experts, not a block.
_MAX_SOURCES = 4


def _stacked(node: Node) -> Reject | None:
    """Why a product with a weight that is no linear layer, of several experts most often, is no projection of a site; None
    for other calls."""
    name = str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
    if name in _GROUPED or "grouped_mm" in name:
        return Reject("grouped_mm gives the rows of each token to its own expert's weights (mixture of experts)")
    if node.target is not torch.matmul:
        return None
    stacks = [w for a in node.args if rank(w := _without_ones(a)) == 3 and is_weight(w)]
    if any(map(_is_picked, stacks)):
        return Reject("each token picks the weights of its experts (mixture of experts)")
    if stacks:
        return Reject("its weights are stacked by expert in one batched product (mixture of experts)")
    if rank(node.args[0]) == 2 and is_weight(node.args[0]) and not is_weight(node.args[1]):
        return Reject("its weights stand on the left of activations whose features are rows (w @ x.mT)")
    return None


def _without_ones(weight: Any) -> Any:
    """A stack of weights before dims of size one were put between its matrices."""
    while isinstance(weight, Node) and weight.target in _SQUEEZES:
        weight = weight.args[0]
    return weight


def _one_by_one(node: Node) -> Node | None:
    """The rows of all experts if `node` joins, row by row, what each made of its share: cat([linear(x[i], w[i]) ...])."""
    if node.target is not torch.cat or node.args[1:] != (0,):
        return None
    products = node.args[0]
    if len(products) < 2 or any(p.target is not F.linear for p in products):
        return None
    weights = [p.args[1] for p in products]
    stacks = {w.args[0] if w.target is operator.getitem and is_weight(w) else None for w in weights}
    shares = [p.args[0] for p in products]
    if len(stacks) > 1 or rank(stacks.pop()) != 3 or any(x.target is not operator.getitem for x in shares):
        return None
    pieces = shares[0].args[0]
    return pieces if is_tensor(pieces) else pieces.args[0]


def _is_picked(weight: Any) -> bool:
    """Whether the rows or matrices of a parameter are chosen by a tensor of the graph."""
    while isinstance(weight, Node) and weight.op in ("call_function", "call_method") and weight.args:
        if weight.target is operator.getitem and any(isinstance(i, Node) for i in _flat(weight.args[1])):
            return True
        weight = weight.args[0]
    return False


def _flat(index: Any) -> tuple[Any, ...]:
    return tuple(index) if isinstance(index, (tuple, list)) else (index,)


def _is_custom_product(node: Node) -> bool:
    """A custom operator or autograd function that maps the last dim of its one activation to another width."""
    if not (is_custom(node.target) or node.target is torch.ops.higher_order.autograd_function_apply):
        return False
    results, x = node.meta.get("example_value"), _read_by(node)
    out = results[0] if isinstance(results, (tuple, list)) and results else results
    if not isinstance(out, torch.Tensor) or not isinstance(x, Node) or out.dim() != rank(x):
        return False
    width, narrow = out.shape[-1], shape(x)[-1]
    sizes = isinstance(width, int) and isinstance(narrow, int) and width != narrow
    return sizes and same_shape(out.shape[:-1], shape(x)[:-1])


def _read_by(source: Node) -> Any:
    """The activation that a projection reads."""
    if is_custom(source.target):
        arguments = source.args
    elif source.target is torch.ops.higher_order.autograd_function_apply:
        arguments = source.args[2:]  # behind the two bodies
    elif source.target is torch.cat:
        return _one_by_one(source)
    else:
        weight_first = source.target is torch.matmul and is_weight(source.args[0])
        return source.args[1 if weight_first else 0]
    inputs = [a for a in arguments if isinstance(a, Node) and is_float(a) and rank(a) > 1 and not is_weight(a)]
    return inputs[0] if len(inputs) == 1 else None


def _kernel(node: Node) -> tuple[Any, ...]:
    """Sizes of a convolution's weight: [out, in / groups, *window]."""
    return shape(Arguments(node, "input", "weight")["weight"])


def _pointwise_convolution(node: Node) -> bool:
    return node.target in _CONVOLUTIONS and all(isinstance(s, int) and s == 1 for s in _kernel(node)[2:])


def states(context: Context) -> dict[Node, State]:
    """What each node is to a feed-forward block, in one pass over the graph; nodes that are nothing are left out."""
    found: dict[Node, State] = {}
    for node in context.analysis.nodes:
        if node.op in ("call_function", "call_method"):
            state = _linear_state(context, node, found) if node.target is F.linear else _state(node, found)
            if state is not None:
                found[node] = state
    return found


def _state(node: Node, found: dict[Node, State]) -> State | None:
    target = node.target
    if _one_by_one(node) is not None:
        reason = Reject("its experts are multiplied one by one, each with its share of the rows (mixture of experts)")
        return Projection(node, nodes=(node,), refused=reason)
    stacked = _stacked(node)
    if stacked is not None:
        return Projection(node, nodes=(node,), refused=stacked)
    if _is_custom_product(node):
        reason = Reject("its projections are {} and no linear layers (quantised?)", describe(node))
        return Projection(node, nodes=(node,), refused=reason)
    if any(isinstance(found.get(a), Branch) for a in node.all_input_nodes):
        state = _branch_state(node, found)
        if state is not None:
            return state
    above = [s.own if isinstance(s, Branch) else s for a in node.all_input_nodes if (s := found.get(a)) is not None]
    if not above:
        if _pointwise_convolution(node):
            return Projection(node, nodes=(node,), refused=Reject("a 1x1 convolution in place of a linear layer"))
        return None
    first = found.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    first = first.own if isinstance(first, Branch) else first
    if target is operator.getitem and isinstance(first, Projection) and not is_tensor(first.linear):
        return first if node.args[1] == 0 else None  # a custom product's results
    if isinstance(first, (Projection, Parts)):
        piece = _piece(node, first)
        if piece is not None:
            return piece
    if isinstance(first, Parts) and (first.dim is not None or target is operator.getitem):
        if target is not F.glu:
            return None
        return Hidden(frozenset({first.whole.linear}), True, Reject("a gated linear unit over a dim beside the hidden units"))
    if target in (torch.matmul, torch.einsum, F.scaled_dot_product_attention):
        if not any(_is_refused_block(s) for s in above) or all(_is_made_of(a, found) for a in node.all_input_nodes):
            return None  # what attention does with it is attention's business, linear attention included
    if target == "to" and isinstance(first, Projection) and first.lora and is_float(node):
        return replace(first, nodes=(*first.nodes, node))  # adapters may be of a wider type than the model
    merged = _merged(above)
    if target is operator.mul and (merged is None or merged.refused is None):
        own = _gated_by_itself(node, found)
        if own is not None:
            return own
    if merged is None:
        return _of_different_inputs(node, above, found)
    if target in _RESHAPES:
        kept = same_size(shape(node)[-1], shape(node.args[0])[-1])
        return merged if kept and is_float(node) else _broken(merged, node, "changes the last dim")
    if target in _TRANSPARENT:
        return merged if is_float(node) else _broken(merged, node)
    if target is torch.ops.higher_order.autograd_function_apply:
        reason = Reject("an autograd function whose backward is not that of a known activation, between the projections")
        return replace(merged, nonlinear=True, refused=reason)
    if target is F.glu:
        return replace(merged, nonlinear=True)
    if target in ELEMENTWISE:
        if target is operator.mul and (gated := _gated(node, found)) is not None:
            reason = Reject("a gate on {}, which is no projection of the same input: a gated output, no block", describe(gated))
            return replace(merged, refused=reason)
        if target is operator.add and merged.nonlinear and _gated(node, found) is not None:
            return None  # a residual sum: what follows reads the stream, and no hidden activation
        return replace(merged, nonlinear=merged.nonlinear or target in NONLINEAR, curved=merged.curved or _is_curved(node, found))
    if _pointwise_convolution(node):
        return Projection(node, nodes=(node,), refused=Reject("a 1x1 convolution in place of a linear layer"))
    return _broken(merged, node)


def _is_curved(node: Node, found: dict[Node, State]) -> bool:
    """Whether an element-wise call makes something of projections that no linear layer makes, without a non-linearity."""
    if node.target is operator.mul:
        return all(isinstance(a, Node) and a in found for a in node.args)
    if node.target is operator.truediv:
        return node.args[1] in found
    return node.target in _CURVED


def _is_refused_block(state: State) -> bool:
    """An activation of projections that is no site, whatever comes after it (adapters that rotate it, say)."""
    return isinstance(state, Hidden) and state.nonlinear and state.refused is not None


def _is_made_of(node: Any, found: Container[Node]) -> bool:
    """Whether `node` is, or is made of, one of `found` in few steps: if of projections, keys or values and no rotation."""
    stack, seen = [node], {node}
    while stack and len(seen) < 32:
        current = stack.pop()
        if current in found:
            return True
        above = [a for a in current.all_input_nodes if a not in seen]
        seen.update(above)
        stack += above
    return False


def _is_computed(context: Context, weight: Any) -> bool:
    """Whether a weight, or a bias, is a parameter or computed from parameters alone (normalised, masked, with adapters)."""
    return is_weight(weight) or weight in context.analysis.from_parameters


def _linear_state(context: Context, node: Node, found: dict[Node, State]) -> State | None:
    x, w = node.args[0], node.args[1]
    if not _is_computed(context, w):
        reason = Reject("the in-projection's weight is no parameter, nor computed from parameters alone ({})", describe(w))
        return Projection(node, nodes=(node,), refused=reason)
    below, _ = _source_of_branch(x)
    a = found.get(below)
    if isinstance(a, Projection) and a.linear is below and not a.lora and a.refused is None and len(below.args) == 2:
        thin, full = shape(below)[-1], shape(below.args[0])[-1]
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(thin, int) and isinstance(full, int) and thin < full and (bias is None or is_weight(bias)):
            source, _ = _source_of_branch(below.args[0])
            lora = Lora(below.args[1], w, bias, 1.0, x)  # type: ignore[arg-type]
            return Branch(Projection(node, nodes=(node,)), lora, (node,), below, source)
    return Projection(node, nodes=(node,))


def _source_of_branch(x: Any) -> tuple[Any, list[Node]]:
    """`x` without the dropout and casts that a low-rank branch puts in front, and those."""
    passed = []
    while isinstance(x, Node) and x.target in (F.dropout, "to") and isinstance(x.args[0], Node):
        passed.append(x)
        x = x.args[0]
    return x, passed


def _branch_state(node: Node, found: dict[Node, State]) -> State | None:
    args = [a for a in node.args if isinstance(a, Node)]
    branches = [(a, s) for a in args if isinstance(s := found.get(a), Branch)]
    others = [(a, s) for a in args if not isinstance(s := found.get(a), Branch)]
    if node.target == "to" and is_float(node):
        return replace(branches[0][1], nodes=(*branches[0][1].nodes, node))
    number = next((a for a in node.args if _is_number(a)), None)
    if node.target in (operator.mul, operator.truediv) and len(branches) == 1 and not others and number is not None:
        ((_, branch),) = branches
        if node.target is operator.truediv and node.args[0] is number:
            return None
        factor = float(number) if node.target is operator.mul else 1.0 / float(number)
        lora = replace(branch.lora, scaling=branch.lora.scaling * factor)
        return replace(branch, lora=lora, nodes=(*branch.nodes, node))
    if node.target is operator.add and len(branches) == 1 and len(others) == 1:
        ((_, branch), (_, base)) = branches[0], others[0]
        if isinstance(base, Projection) and base.linear.target is F.linear:
            same_input = _source_of_branch(base.linear.args[0])[0] is branch.x
            if not same_input or not all(same_shape(shape(a), shape(node)) for a in args):
                return None
            lora = replace(branch.lora, part=base.start is not None)
            return replace(base, nodes=(*base.nodes, *branch.nodes, node), lora=(*base.lora, lora))
    return None


def _gated(node: Node, found: dict[Node, State]) -> Node | None:
    """The activation that a product scales, or a sum adds, position by position, if it comes from elsewhere."""
    others = [a for a in node.all_input_nodes if a not in found and is_float(a) and rank(a) > 1]
    return next((a for a in others if same_shape(shape(a), shape(node))), None)


def _gated_by_itself(node: Node, found: dict[Node, State]) -> Hidden | None:
    """A product of hidden units and what other layers, or a mean over tokens, have made of all of them."""
    for h, gate in (node.args, node.args[::-1]):
        state = found.get(h)  # type: ignore[arg-type]
        if not isinstance(state, (Projection, Hidden)) or not same_shape(shape(h), shape(node)) or not is_float(gate):
            continue
        merged = _merged([state])
        if gate in found:
            whole = merged is not None and merged.nonlinear and _merged([state, found[gate]]) is None
        else:
            whole = rank(gate) > 1 and not same_shape(shape(gate), shape(node))
        if merged is None or not whole or not same_size(shape(gate)[-1], shape(node)[-1]):
            continue
        if _is_made_of(gate, {h, *merged.sources}):
            return replace(merged, nonlinear=True, refused=Reject(GATED_BY_ITSELF, describe(gate)))
    return None


GATED_BY_ITSELF = "a gate that is made of all hidden units, or of their mean over tokens ({}), scales them (squeeze and excite)"


def _merged(above: list[State]) -> Hidden | None:
    """The union of what a node's inputs are; None if they are projections of different inputs (a residual sum, q and k)."""
    sources: frozenset[Node] = frozenset()
    nonlinear, curved, refused = False, False, None
    for state in above:
        if isinstance(state, Hidden):
            sources, nonlinear, curved = sources | state.sources, nonlinear or state.nonlinear, curved or state.curved
            refused = state.refused if refused is None else refused
        elif isinstance(state, Projection):
            sources, refused = sources | {state.linear}, state.refused if refused is None else refused
        elif isinstance(state, Parts):
            sources = sources | {state.whole.linear}
        else:
            return None
    if len(sources) > _MAX_SOURCES or len({without_casts(_read_by(s)) for s in sources}) > 1:
        return None
    return Hidden(sources, nonlinear, refused, curved)


def _of_different_inputs(node: Node, above: list[State], found: dict[Node, State]) -> Hidden | None:
    """A gate, or something added to a pre-activation, that reads another input: adapters that are no low-rank branch, or a gate
    that is the same for all tokens."""
    states = [s for s in above if isinstance(s, (Projection, Hidden))]
    nonlinear = any(isinstance(s, Hidden) and s.nonlinear for s in states)
    sources = next((frozenset({s.linear}) for s in states if isinstance(s, Projection)), None)
    if sources is None and nonlinear:
        whole = [s for a in node.all_input_nodes if isinstance(s := found.get(a), Hidden) and same_shape(shape(a), shape(node))]
        sources = whole[0].sources if len(whole) == 1 else None
    if sources is None or node.target is not (operator.mul if nonlinear else operator.add):
        return None
    return Hidden(sources, nonlinear, Reject("its projections read different inputs"))


def _broken(merged: Hidden, node: Node, how: str = "") -> Hidden | None:
    """The same with a reason not to be a site. Before the non-linearity, only steps that tell a look-alike are kept."""
    if node.target in _CONVOLUTIONS and any(s.target in _CONVOLUTIONS for s in merged.sources):
        return None
    telling = node.target in _CONVOLUTIONS or node.target in _NORMS or is_hook(node)
    is_piece = node.target in _SPLITS or (node.target is operator.getitem and not is_tensor(node.args[0]))
    if not is_tensor(node) and node.target not in _SPLITS:
        return None
    is_layout = is_piece or node.target in _SQUEEZES or node.target in _RESHAPES or _selects_features(node)
    if not merged.nonlinear and merged.refused is not None and is_layout:
        return merged  # layout of what is no projection to begin with: experts, with a bias or as vectors, or features as channels
    if is_tensor(node) and not merged.nonlinear and (node.target is F.softmax or _is_pointwise(node)):
        merged = replace(merged, nonlinear=True)  # an activation, if none that can be written down
    if not is_tensor(node) or (not merged.nonlinear and not telling and node.target is not torch.permute):
        return None
    if how:
        reason = Reject("{} {} between the projections", describe(node), how)
    elif node.target in _NORMS or node.target in _REDUCTIONS:
        reason = Reject("a norm or reduction ({}) between the projections", describe(node))
    else:
        reason = Reject("{} between the projections", describe(node))
    # A norm, convolution or hook says more than the layout around it.
    return replace(merged, refused=reason if telling or merged.refused is None else merged.refused)


def _is_pointwise(node: Node) -> bool:
    """Whether torch says of a call that it acts on each number by itself, as activations do that have no form here."""
    name = describe(node).strip(".")
    overload = getattr(getattr(torch.ops.aten, name.removeprefix("special_"), None), "default", None)
    return overload is not None and name != "clone" and torch.Tag.pointwise in overload.tags


def _selects_features(node: Node) -> bool:
    """Whether `node` is a slice of another tensor's last dim."""
    if node.target is not operator.getitem or rank(node) != rank(node.args[0]):
        return False
    return isinstance(_flat(node.args[1])[-1], slice) and same_shape(shape(node)[:-1], shape(node.args[0])[:-1])


def _piece(node: Node, whole: Projection | Parts) -> Projection | Parts | None:
    """Rows of a fused projection: what chunk, split, slices, unflatten and unbind along the last dim select."""
    if isinstance(whole, Parts):
        if whole.dim is not None and getattr(node.target, "__name__", node.target) == "unbind":
            along = Arguments(node, "input", ("dim", 0))["dim"] in (whole.dim, rank(node.args[0]) + whole.dim)
            return replace(whole, nodes=(*whole.nodes, node), dim=None) if along else None
        if whole.dim is not None and node.target is torch.permute:
            turned = tuple(node.args[1]) == swapped(rank(node))
            return replace(whole, nodes=(*whole.nodes, node), dim=-3 - whole.dim) if turned else None
        if whole.dim is not None and _keeps_dim(node, whole.dim):
            reason = Reject("{} of a fused projection keeps a dim of one beside the hidden units", describe(node))
            refused = replace(whole.whole, nodes=(*whole.nodes, node), refused=reason)
            return refused if is_tensor(node) else Parts(refused, ((0, 1, None),) * len(node.meta["example_value"]), ())
        if whole.dim is not None:
            position, index = one_index(node) if node.target is operator.getitem else (None, None)
            index = index if position == rank(node.args[0]) + whole.dim else None
        else:
            index = node.args[1] if node.target is operator.getitem else None
        if not isinstance(index, int):
            return None
        bounds = whole.bounds[index] if -len(whole.bounds) <= index < len(whole.bounds) else None
        return None if bounds is None else _slice(whole.whole, *bounds, (*whole.nodes, node))
    source = node.args[0]
    width = shape(source)[-1]
    if not isinstance(width, int):
        return None
    last = rank(source) - 1
    if node.target is torch.reshape and same_shape(shape(node), (*shape(source)[:-1], 2, width // 2)):
        return Parts(whole, ((0, width // 2, None), (width // 2, width, None)), (node,), dim=-2)
    if node.target is torch.reshape and same_shape(shape(node), (*shape(source)[:-1], width // 2, 2)):
        return Parts(whole, ((0, width, 2), (1, width, 2)), (node,), dim=-1)
    if node.target in _SPLITS:
        pieces = _split_bounds(node, last, width)
        return None if pieces is None else Parts(whole, pieces, (node,))
    if node.target in ("narrow", torch.narrow):
        found = Arguments(node, "input", "dim", "start", "length")
        dim, start, length = found.take("dim", "start", "length")
        if isinstance(dim, int) and dim % (last + 1) == last and isinstance(start, int) and isinstance(length, int):
            return _slice(whole, start, start + length, None, (node,))
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        lead, final = index[:-1], index[-1]
        full = slice(None, None, None)
        covers = lead == (Ellipsis,) or (len(lead) == last and all(i == full for i in lead))
        if (
            covers
            and isinstance(final, slice)
            and all(i is None or isinstance(i, int) for i in (final.start, final.stop, final.step))
        ):
            start, stop, step = final.indices(width)
            return _slice(whole, start, stop, None if step == 1 else step, (node,))
    return None


def _keeps_dim(node: Node, dim: int) -> bool:
    """Whether a call takes parts along `dim` of a tensor and leaves that dim there: halves as [..., F, 1]."""
    if node.target is operator.getitem:
        along, key = one_index(node)
        return isinstance(key, slice) and along == rank(node.args[0]) + dim
    return node.target in _SPLITS or node.target in ("narrow", torch.narrow)


def _slice(whole: Projection, start: int, stop: int, step: int | None, nodes: tuple[Node, ...]) -> Projection:
    nodes = (*whole.nodes, *nodes)
    if whole.step is not None:
        return replace(whole, nodes=nodes, refused=Reject("a part of an interleaved projection"))
    if any(branch.part for branch in whole.lora):
        return replace(whole, nodes=nodes, refused=Reject("a part of a part that has a low-rank adapter of its own"))
    offset = whole.start or 0
    return replace(whole, start=offset + start, stop=offset + stop, step=step, nodes=nodes)


def _split_bounds(node: Node, last: int, width: int) -> tuple[tuple[int, int, int | None], ...] | None:
    name = getattr(node.target, "__name__", node.target)
    pieces = node.meta.get("example_value")
    found = Arguments(node, "input", "sizes", "dim")
    dim = node.kwargs.get(
        "dim", found["dim"] if len(node.args) > 2 else (node.args[1] if name == "unbind" and len(node.args) > 1 else 0)
    )
    if (
        not isinstance(pieces, (tuple, list))
        or not isinstance(dim, int)
        or dim % (last + 1) != last
        or name == "unbind"
    ):
        return None
    bounds, at = [], 0
    for piece in pieces:
        if not isinstance(piece, torch.Tensor) or not isinstance(piece.shape[-1], int):
            return None
        bounds.append((at, at + piece.shape[-1], None))
        at += piece.shape[-1]
    return tuple(bounds) if at == width else None


# ---------------------------------------------------------------------------------------------------------------------
# Reading a block
# ---------------------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """Carries a Reject out of the recursive reader."""

    def __init__(self, reason: Reject):
        super().__init__(str(reason))
        self.reason = reason


@dataclass
class _Reader:
    """Turns the dataflow above the second projection into an expression."""

    context: Context
    found: dict[Node, State]
    projections: list[Projection] = field(default_factory=list)
    parameters: list[Node] = field(default_factory=list)
    nodes: dict[Node, None] = field(default_factory=dict)
    dropout_p: float = 0.0
    memo: dict[Node, Expression] = field(default_factory=dict)
    dropped: dict[Node, None] = field(default_factory=dict)  # the dropout, and what was read of its result

    def read(self, node: Any, factor: bool = True) -> Any:
        """The expression of a node. `factor`: a factor of it is one of the hidden activation, so dropout may move to the end."""
        if not isinstance(node, Node):
            if node is None or isinstance(node, (bool, int, float, str)):
                return node
            raise _Refused(Reject("an argument of the activation is not understood ({})", node))
        if not is_tensor(node) and number(node) is not None:
            return number(node)
        if node in self.memo:
            if node in self.dropped:
                raise _Refused(Reject("the result of a dropout is read twice inside of the activation"))
            return self.memo[node]
        state = self.found.get(node)
        if isinstance(state, Branch):
            state = state.own
        before = len(self.dropped)
        if isinstance(state, Projection):
            self.nodes.update(dict.fromkeys(state.nodes))
            result: Any = self.pre_activation(state)
        elif isinstance(state, Hidden):
            result = self.step(node, factor)
        else:
            return self.parameter(node)
        self.memo[node] = result
        if len(self.dropped) > before:
            self.dropped[node] = None
        return result

    def pre_activation(self, state: Projection) -> Expression:
        if state.refused is not None:
            raise _Refused(state.refused)
        rows = [p.rows for p in self.projections]
        if state.rows not in rows:
            self.projections.append(state)
            rows.append(state.rows)
        return var(f"x{rows.index(state.rows)}")

    def step(self, node: Node, factor: bool) -> Expression:
        self.nodes[node] = None
        if node.target is F.dropout:
            p, training = number(node.args[1]), node.args[2]
            if p is None or not isinstance(training, bool) or not factor or self.dropped:
                raise _Refused(Reject("dropout inside of the activation"))
            result = self.read(node.args[0], factor)
            if training and p:
                self.dropout_p = float(p)
                self.dropped[node] = None
            return result
        if node.target in _TRANSPARENT or node.target in _RESHAPES:
            return self.read(node.args[0], factor)
        if node.target is F.glu:
            return self.glu(node)
        build = ELEMENTWISE.get(node.target)
        if build is None:
            raise _Refused(Reject("{} between the projections", describe(node)))
        for a in (*node.args, *node.kwargs.values()):
            if isinstance(a, Node) and a in self.found and not same_shape(shape(a), shape(node)):
                raise _Refused(Reject("{} broadcasts the hidden activation", describe(node)))
        if node.target in (F.prelu, torch.prelu) and rank(node) > 2:
            if shape(Arguments(node, "input", "weight")["weight"]) not in ((), (1,)):
                raise _Refused(Reject("prelu scales the channels of dim 1, which are not the hidden units"))
        # relu(c * h) = c * relu(h) for c >= 0, as leaky_relu does: dropout may stand on either side of them.
        multiplies = factor and node.target in _HOMOGENEOUS
        args = [self.read(a, multiplies) for a in node.args]
        kwargs = {k: self.read(a, False) for k, a in node.kwargs.items()}
        try:
            return build(*args, **kwargs)
        except (ExpressionError, TypeError) as error:
            raise _Refused(Reject("{} has no form in the expression language ({})", describe(node), error)) from error

    def glu(self, node: Node) -> Expression:
        found = Arguments(node, "input", ("dim", -1))
        whole = self.found.get(node.args[0])  # type: ignore[arg-type]
        width = shape(node.args[0])[-1]
        if not isinstance(whole, Projection) or not isinstance(width, int) or found["dim"] not in (-1, rank(node) - 1):
            raise _Refused(Reject("a gated linear unit of something that is no projection"))
        half = width // 2
        self.nodes.update(dict.fromkeys(whole.nodes))
        value, gate = (self.pre_activation(_slice(whole, *b, None, ())) for b in ((0, half), (half, width)))
        return value * call("sigmoid", gate)

    def parameter(self, node: Node) -> Expression:
        """A tensor that the activation reads beside the pre-activations."""
        if not is_tensor(node):
            raise _Refused(Reject("the activation reads a size of the graph ({})", describe(node)))
        sizes = shape(node)
        if len(sizes) > 1 or not all(isinstance(s, int) for s in sizes):
            raise _Refused(
                Reject("it reads {} of shape {}, which is no parameter of an activation", describe(node), sizes)
            )
        if node not in self.parameters:
            self.parameters.append(node)
        return var(f"a{self.parameters.index(node)}")


def capture_block(context: Context, node: Node) -> Candidate | Reject | None:
    """linear, element-wise function, linear: `node` is the second projection."""
    found = context.fact(states)
    x = _read_by(node) if node.args else None
    hidden = found.get(x) if isinstance(x, Node) else None
    if not isinstance(hidden, Hidden) or not hidden.is_activation:
        return None
    if node.target is F.linear:
        return _read_block(context, node, hidden, found)
    own = found.get(node)
    if not isinstance(own, Projection) or own.refused is None:
        return None
    if node.target in _CONVOLUTIONS and not _is_inverted(node, hidden):
        return None
    return own.refused if hidden.refused is None else hidden.refused


def _is_inverted(node: Node, hidden: Hidden) -> bool:
    """Two convolutions that widen and narrow the channels again, as a block does; others are a matter of course in CNNs."""
    sources = list(hidden.sources)
    if len(sources) != 1 or sources[0].target not in _CONVOLUTIONS:
        return False
    before, after = _kernel(sources[0]), _kernel(node)
    return (
        same_size(before[1], after[0])
        and all(isinstance(s, int) for s in (*before[:2], *after[:2]))
        and before[0] >= before[1]
    )


def _read_block(context: Context, node: Node, hidden: Hidden, found: dict[Node, State]) -> Candidate | Reject | None:
    w_out = node.args[1]
    b_out = node.args[2] if len(node.args) > 2 else None
    if _starts_branch(node, found):
        return None  # A of a low-rank branch on an out-projection, of which it is a part
    source = _read_by(next(iter(hidden.sources)))
    width, model_width, model_out = shape(node.args[0])[-1], shape(source)[-1], shape(node)[-1]
    # A head behind something that is no site anyway is nothing to report, nor is what reads a stream.
    telling = same_size(model_out, model_width) and not _is_stream(node.args[0], found)  # type: ignore[arg-type]
    if hidden.refused is not None:
        # Nor a router, or an adapter.
        thin = isinstance(width, int) and isinstance(model_width, int) and width < model_width
        return hidden.refused if telling and not thin else None
    if not _is_computed(context, w_out):
        return Reject("the out-projection's weight is no parameter, nor computed from parameters alone ({})", describe(w_out))
    if any(_is_picked(w) for w in (w_out, *(s.args[1] for s in hidden.sources))):
        return Reject("its weights are picked by an index that is not fixed in the graph (mixture of experts)")
    tail = _branches_below(node, found)
    if isinstance(tail, Reject):
        return tail
    reader = _Reader(context, found)
    try:
        expr = reader.read(node.args[0])
    except _Refused as refused:
        return refused.reason if telling else None
    if len(reader.projections) > 2:
        return Reject("{} projections meet in one activation", len(reader.projections))
    source = reader.projections[0].linear.args[0]
    if any(p.linear.args[0] is not source and dtype(p.linear.args[0]) is not dtype(source) for p in reader.projections):
        return Reject("the projections read their input in different types")
    sizes = [_width_of(p) for p in reader.projections]
    for label, size in (("hidden width", width), ("model width", model_width), ("output width", model_out)):
        if not isinstance(size, int):
            return Reject("{} is not static ({})", label, size)
    if any(s != width for s in sizes):
        return Reject("projections of widths {} make a hidden activation of width {}", sizes, width)
    if model_out != model_width:
        return Reject("output width {} differs from the model width {}: a head, not a block", model_out, model_width)
    if width < model_width:
        return Reject("hidden width {} is below the model width {}: a bottleneck adapter", width, model_width)
    if not same_shape(shape(node)[:-1], shape(source)[:-1]):
        return Reject("leading dims change from {} to {}", tuple(shape(source)[:-1]), tuple(shape(node)[:-1]))
    for p in reader.parameters:
        if shape(p) not in ((), (1,), (width,)):
            return Reject("it reads {} of shape {}, which is no parameter of an activation", describe(p), shape(p))
    biases = []
    for p in reader.projections:
        bias = p.linear.args[2] if len(p.linear.args) > 2 else None
        if bias is not None and not _is_computed(context, bias):
            return Reject("the bias of a projection is no parameter ({})", describe(bias))
        biases.append(None if bias is None else p.of(bias))
    try:
        expr, order = _normal_form(expr, len(reader.projections))
    except ExpressionError as error:
        return Reject("the activation is too large for the expression language ({})", error)
    if expr.op == "tanh" and expr.args[0].op == "var":
        return Reject("linear, tanh, linear is a pooler")
    projections = [reader.projections[i] for i in order]
    captured = FFNCapture(
        source,  # type: ignore[arg-type]
        tuple(p.of(p.linear.args[1]) for p in projections),
        tuple(biases[i] for i in order),
        w_out,  # type: ignore[arg-type]
        b_out,  # type: ignore[arg-type]
        str(expr),
        tuple(reader.parameters),
        reader.dropout_p,
        width,
        tuple(p.lora for p in projections) if any(p.lora for p in projections) else (),
        tail.branches,
        node,
    )
    position = context.analysis.order
    nodes = tuple(sorted({*reader.nodes, node, *tail.nodes}, key=position.__getitem__))
    branches = [b for p in projections for b in p.lora]
    read = (
        *(source, *(p.linear.args[1] for p in projections), w_out, *((b_out,) if b_out is not None else ())),
        *(b.a_out for b in branches),
        *(w for b in (*branches, *tail.branches) for w in (b.a, b.b, b.bias) if w is not None),
        *reader.parameters,
    )
    core = (*(p.linear for p in projections), node)
    return Candidate(tail.output, nodes, read, captured, core)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Tail:
    """What follows the out-projection: its low-rank branches and the sums that add them. output: the last of `nodes`."""

    output: Node
    branches: tuple[Lora, ...] = ()
    nodes: tuple[Node, ...] = ()


def _starts_branch(node: Node, found: dict[Node, State]) -> bool:
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if isinstance(found.get(user), Branch):
            return True
        if user.target in (F.dropout, "to"):
            stack.extend(user.users)
    return False


def _is_stream(x: Node, found: dict[Node, State]) -> bool:
    """Whether several layers read `x`, low-rank branches aside: queries, keys and values of what follows, most often."""
    return sum(u.target is F.linear and not _starts_branch(u, found) for u in x.users) > 1


def _branches_below(node: Node, found: dict[Node, State]) -> _Tail | Reject:
    """The low-rank branches of the out-projection `node`: their A reads its hidden activation, behind a dropout or not."""
    hidden = without_casts(node.args[0])
    tail = _Tail(node)
    while True:
        following = [(u, b) for u in tail.output.users if (b := _added_branch(u, tail.output, found)) is not None]
        if len(following) != 1:
            break
        ((total, branch),) = following
        source, before = _source_of_branch(branch.a_call.args[0])
        if source is not _source_of_branch(hidden)[0]:
            break
        if hidden is not source and hidden not in before:
            return Reject("a low-rank adapter on the out-projection ({}) reads it before its dropout", branch.a_call.name)
        # Between what the out-projection reads and A there may be casts and one dropout: the branch's own.
        own = before if hidden is source else before[: before.index(hidden)]
        _, after = _source_of_branch(branch.lora.a_out)
        drops = [n for n in own if n.target is F.dropout]
        p = number(drops[0].args[1]) if drops else 0.0
        if p is None or len(drops) > 1 or any(n.target is F.dropout for n in after):
            return Reject("dropout in a low-rank adapter on the out-projection ({}) is not understood", branch.a_call.name)
        nodes = (*tail.nodes, *own, branch.a_call, *after, *branch.nodes, total)
        tail = _Tail(total, (*tail.branches, replace(branch.lora, dropout_p=float(p))), nodes)
    if len(tail.branches) > 1 and any(b.dropout_p for b in tail.branches):
        return Reject("several low-rank adapters with dropout on the out-projection")
    return tail


def _added_branch(user: Node, total: Node, found: dict[Node, State]) -> Branch | None:
    """The branch that `user` adds to `total`, if it does."""
    if user.target is not operator.add or len(user.args) != 2 or not same_shape(shape(user), shape(total)):
        return None
    other = user.args[1] if user.args[0] is total else user.args[0]
    branch = found.get(other) if isinstance(other, Node) else None
    return branch if isinstance(branch, Branch) else None


def _width_of(p: Projection) -> Any:
    return shape(p.linear)[-1] if p.start is None or p.stop is None else len(range(p.start, p.stop, p.step or 1))


def _normal_form(expr: Expression, count: int) -> tuple[Expression, list[int]]:
    """(the expression with named functions and the gate first, order of the projections that it then refers to)."""
    expr = with_names(expr)
    if count < 2 or expr.op != "*":
        return expr, list(range(count))
    # A product of an activation and a plain pre-activation is spelled act(x0) * x1.
    gate, plain = expr.args if expr.args[1].op == "var" else expr.args[::-1]
    if plain.op != "var" or gate.variables & {"x0", "x1"} == set() or plain.value not in ("x0", "x1"):
        return expr, list(range(count))
    if plain.value == "x0" and "x0" not in gate.variables:
        gate, plain = (substitute(g, {"x0": "x1", "x1": "x0"}) for g in (gate, plain))
        return gate * plain, [1, 0]
    return gate * plain, [0, 1]


SPLIT_BY_DDP = (
    "DDP's graph splitter (or a graph break) cuts it: compile per block with spt_compiler.compile(model) before wrapping it, "
    "or set torch._dynamo.config.optimize_ddp = False"
)


def capture_cut(context: Context, node: Node) -> Reject | None:
    """A non-linearity whose pre-activation, or whose hidden activation, crosses a graph break."""
    if not is_float(node) or rank(node) < 2:
        return None
    found = context.fact(states)
    if node not in found:
        above: Any = node
        while isinstance(above, Node) and above.op != "placeholder":
            follow = above.target in ELEMENTWISE or above.target in _TRANSPARENT or above.target is torch.reshape
            above = above.args[0] if follow and above.args else None
        # Dynamo names what was on Python's stack at a graph break.
        if isinstance(above, Node) and "___stack" in getattr(getattr(above, "_dynamo_source", None), "name", ""):
            return Reject("a graph break cuts it: its pre-activation comes from another graph (TORCH_LOGS=graph_breaks)")
        return None
    if isinstance(found[node], Hidden) and context.graph_break is not None and _is_returned(node):
        ddp = torch.distributed.is_available() and torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if ddp and torch._dynamo.config.optimize_ddp:
            return Reject(SPLIT_BY_DDP)
        return Reject("a graph break cuts it: its hidden activation leaves the graph (TORCH_LOGS=graph_breaks)")
    return None


def _is_returned(node: Node) -> bool:
    """Whether `node` leaves the graph, itself or after element-wise steps."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                return True
            if user not in seen and (user.target in ELEMENTWISE or user.target in _TRANSPARENT):
                seen.add(user)
                stack.append(user)
    return False


def capture_expert_loop(context: Context, node: Node) -> Reject | None:
    """one_hot of the chosen experts, and which of them were hit, leaving the graph for a loop over nonzero()."""
    if "nonzero" not in (context.graph_break or ""):
        return None
    below: set[Node] = set()
    stack = [node]
    while stack and len(below) < 16:
        for user in stack.pop().users:
            if user.target in (torch.permute, "sum", torch.sum, operator.gt) and user not in below:
                below.add(user)
                stack.append(user)
    hit = [n for n in below if n.target is operator.gt and any(u.op == "output" for u in n.users)]
    if not hit or not any(u.op == "output" for n in (node, *below) if n.target is not operator.gt for u in n.users):
        return None
    return Reject("a loop over the experts that were hit (nonzero) runs outside of compiled graphs (mixture of experts)")


BLOCK = Pattern(
    name="linear-act-linear",
    kind="ffn",
    equation="linear(dropout(act(linear(x), linear(x)))) => spt::route + spt::routed_ffn",
    anchors=(F.linear,),
    capture=capture_block,
)
EXPERTS = Pattern(
    name="experts",
    kind="ffn",
    equation="grouped(act(grouped(x, w_in)), w_out) stays",
    anchors=(
        *(torch.matmul, "*grouped_mm*", torch.cat, *_CONVOLUTIONS),
        *(torch.ops.higher_order.autograd_function_apply, CUSTOM),
    ),
    capture=capture_block,
)
CUT = Pattern(
    name="cut",
    kind="ffn",
    equation="act(a value of another graph) stays",
    anchors=tuple(NONLINEAR),
    capture=capture_cut,
)

LOOP = Pattern(
    name="expert-loop",
    kind="ffn",
    equation="for expert in nonzero(sum(one_hot(chosen)) > 0) stays",
    anchors=(F.one_hot,),
    capture=capture_expert_loop,
)

PATTERNS = (BLOCK, EXPERTS, CUT, LOOP)
