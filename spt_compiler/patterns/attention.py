"""Attention: the library call, and the chain of products, masks and softmax that people write by hand.

The chain is read upwards from the softmax to the product that makes the scores. Each kind of step is declared once
(`@step`); a new idiom is one more step, here or as a rule of the canonicaliser that turns it into a known one.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..canonicalize import is_weight
from ..errors import Reject
from ..graph import (
    Arguments,
    describe,
    dtype,
    is_bounded,
    is_float,
    is_hook,
    is_one_element,
    is_tensor,
    mutated_arguments,
    needs_grad,
    number,
    rank,
    same_shape,
    same_size,
    shape,
    storage,
    value,
)
from ..pattern import Candidate, Context, Pattern

log = logging.getLogger(__name__)

# A score set to this or less has probability zero beside any real score, in every dtype.
HIDDEN = -1e4

ONE_QUERY = "queries of length 1 stay dense (decoding, or one query for a whole input)"

# A clamp this far out (near fp16's largest number) guards against overflow: no score of a working model gets there.
FAR = 5e4


@dataclass(frozen=True)
class AttentionCapture:
    """softmax(softcap(scale * q @ kT) + bias, over the allowed keys) @ v.

    Attributes:
        q: [..., H, Tq, D]. k: [..., Hkv, Tk, D], or [..., Hkv, D, Tk] if `k_transposed`. v: [..., Hkv, Tk, Dv].
            Ranks 2 and more, as the model has them; dtypes may differ where the model computes scores in a wider one.
        scale: product of all numbers that multiply the scores. scale_nodes: one-element tensors without gradient that do.
        bias: float tensors added to the logits, each with the number that later scaling gives it.
        allowed: bool masks, True = may attend. disallowed: bool masks, True = masked out.
        causal: key index <= query index, aligned top left.
        lowest: the bias is at least this number, whatever the tensor says (the scores are clamped there); None: no bound.
        softcap: c of c * tanh(logits / c), applied before bias and masks.
        dropout_p: of the probabilities. empty: what a row without any allowed key gives ("zero", "nan", or the "uniform"
            mean of all values). enable_gqa: a key head serves H / Hkv consecutive query heads.
        types: in which the products of the scores and of the values run, whatever autocast says; None: as it says.
    """

    q: Node
    k: Node
    v: Node
    k_transposed: bool
    scale: float
    scale_nodes: tuple[Node, ...] = ()
    bias: tuple[tuple[Node, float], ...] = ()
    allowed: tuple[Node, ...] = ()
    disallowed: tuple[Node, ...] = ()
    causal: bool = False
    lowest: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    empty: str = "nan"
    enable_gqa: bool = False
    types: tuple[torch.dtype, torch.dtype] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The library call
# ---------------------------------------------------------------------------------------------------------------------


def capture_call(context: Context, node: Node) -> Candidate | Reject | None:
    """F.scaled_dot_product_attention, as the canonicaliser spells it."""
    if len(node.args) != 3 or not all(map(is_tensor, node.args)):
        return Reject("arguments of the call are not understood")
    q, k, v = node.args
    mask, dropout_p = node.kwargs.get("attn_mask"), node.kwargs.get("dropout_p", 0.0)
    causal, scale = node.kwargs.get("is_causal", False), node.kwargs.get("scale")
    if scale is None and isinstance(shape(q)[-1], int):
        scale = shape(q)[-1] ** -0.5
    dropout_p, scale = number(dropout_p), number(scale)
    for label, given in (("dropout_p", dropout_p), ("scale", scale), ("is_causal", causal)):
        if not isinstance(given, (int, float)):
            return Reject("{} is computed in the graph", label)
    gqa = bool(node.kwargs.get("enable_gqa", False))
    if not gqa and rank(q) >= 4:
        k, v, gqa = _without_repeats(context, q, k, v)
    captured = AttentionCapture(
        q,
        k,
        v,
        k_transposed=False,
        scale=float(scale),
        bias=((mask, 1.0),) if is_float(mask) else (),
        allowed=(mask,) if dtype(mask) is torch.bool else (),
        causal=causal,
        dropout_p=float(dropout_p),
        empty="zero",
        enable_gqa=gqa,
    )
    if mask is not None and not captured.bias and not captured.allowed:
        return Reject("the mask has dtype {}; expected bool or float", dtype(mask))
    inputs = (q, k, v, mask) if isinstance(mask, Node) else (q, k, v)
    return Candidate(node, (node,), inputs, captured)


def _without_repeats(context: Context, q: Node, k: Node, v: Node) -> tuple[Node, Node, bool]:
    """Keys and values before they were repeated for each query head of a group, if both were, alike."""
    a, b = _before_repeat(k), _before_repeat(v)
    if a is None or b is None or any(map(context.analysis.is_written, (a, b, k, v))) or not same_size(shape(a)[-3], shape(b)[-3]):
        return k, v, False
    heads, kv_heads = shape(q)[-3], shape(a)[-3]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        return k, v, False
    return a, b, True


def _before_repeat(x: Node) -> Node | None:
    """x of x[:, :, None].expand(B, Hkv, n, T, D).reshape(B, Hkv * n, T, D) or of repeat_interleave along heads."""
    if x.target in ("repeat_interleave", torch.repeat_interleave):
        source, dim = x.args[0], x.kwargs.get("dim", x.args[2] if len(x.args) > 2 else None)
        repeats = x.kwargs.get("repeats", x.args[1] if len(x.args) > 1 else None)
        is_heads = isinstance(dim, int) and rank(source) == 4 and dim % 4 == 1
        return source if is_heads and isinstance(repeats, int) else None
    if x.target is not torch.reshape or rank(x) != 4 or not isinstance(x.args[0], Node):
        return None
    expanded = x.args[0]
    if expanded.target not in ("expand", "repeat") or rank(expanded) != 5:
        return None
    grown = expanded.args[0]
    if not isinstance(grown, Node) or grown.target not in (
        operator.getitem,
        torch.unsqueeze,
        "unsqueeze",
        torch.reshape,
    ):
        return None
    source = grown.args[0]
    if rank(source) != 4 or rank(grown) != 5 or sum(map(is_tensor, grown.all_input_nodes)) > 1:  # it may pick keys by an index
        return None
    batch, heads, length, width = shape(source)
    inner = shape(expanded)
    if not isinstance(heads, int) or not isinstance(inner[2], int):
        return None
    if not same_shape(shape(grown), (batch, heads, 1, length, width)):
        return None
    if not same_shape(inner, (batch, heads, inner[2], length, width)):
        return None
    return source if same_shape(shape(x), (batch, heads * inner[2], length, width)) else None


# ---------------------------------------------------------------------------------------------------------------------
# Which values are scores
# ---------------------------------------------------------------------------------------------------------------------

# Ops that rearrange, so that what passes them is no longer one score per (query, key): seen only to name a near miss.
_REARRANGES = {
    *(operator.getitem, torch.cat, torch.stack, torch.gather, torch.index_select, torch.roll, torch.flip),
    *(
        F.pad,
        F.leaky_relu,
        torch.permute,
        torch.t,
        torch.reshape,
        torch.flatten,
        torch.unsqueeze,
        torch.squeeze,
        torch.chunk,
        torch.split,
        torch.unbind,
    ),
    *("view", "flatten", "unflatten"),
    *("gather", "index_select", "expand", "repeat", "unsqueeze", "squeeze", "chunk", "split", "unbind", "flip", "roll"),
    *("tril", "triu", "unfold", "narrow", "select", "scatter", "masked_scatter", "as_strided", "new_zeros", "clone"),
    *("detach", torch.detach),
    *(
        torch.clone,
        torch.tril,
        torch.triu,
        torch.exp,
        torch.pow,
        operator.pow,
        torch.square,
        F.relu,
        torch.sigmoid,
        torch.topk,
        "topk",
    ),
    *(F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm, F.normalize),
    *(F.dropout, torch.minimum, torch.lerp, "lerp", torch.sqrt, torch.abs, F.softmax),
    torch.scatter,
}

_NOTHING, _LOOSE, _PLAIN = 0, 1, 2


def _is_product(node: Any) -> bool:
    """A product of two activations; the left one may be a parameter: queries that are learned, without a projection."""
    return isinstance(node, Node) and node.target is torch.matmul and not is_weight(node.args[1]) and not _mixes_heads(node)


DISTANCES = "the scores are distances between queries and keys, no products of them"
SQUARES = "the scores are squared differences of queries and keys: as products they would lose what is small beside the squares"
COSINES = "the scores are made by cosine_similarity (a product of normalised queries and keys would be followed)"
ADDITIVE = "the scores are made of a sum of queries and keys (additive attention), no products of them"

_SUMMED = {"sum", torch.sum, "mean", torch.mean, "norm", torch.norm, torch.linalg.norm, torch.linalg.vector_norm}
_OF_EACH_DIFFERENCE = {torch.square, torch.abs, operator.pow, operator.mul, operator.truediv, operator.neg, torch.sqrt}
_SIMILARITIES = {
    **dict.fromkeys((F.cosine_similarity, torch.cosine_similarity), COSINES),
    **dict.fromkeys((F.pairwise_distance, torch.pairwise_distance), DISTANCES),
}


def _pair_up(x: Any, y: Any, behind: int = 1) -> bool:
    """Whether a call on these meets each query with each key: [..., T, 1, D] and [..., 1, S, D], with `behind` dims at the end."""
    if min(rank(x), rank(y)) < 3:
        return False
    (a, b), (c, d) = (shape(n)[rank(n) - 2 - behind : rank(n) - behind] for n in (x, y))
    return (same_size(b, 1) and same_size(c, 1)) or (same_size(a, 1) and same_size(d, 1))


def _distance(node: Node) -> str:
    """What a call says about each query and key that is no product, distances most often ("": it says nothing such)."""
    if node.target is torch.cdist:
        return "" if is_weight(Arguments(node, "x1", "x2")["x2"]) else DISTANCES
    if node.target in _SIMILARITIES:
        return _SIMILARITIES[node.target] if len(node.args) > 1 and _pair_up(*node.args[:2]) else ""
    if node.target is operator.add and all(map(is_float, node.args)):
        return ADDITIVE if any(_pair_up(*node.args, behind=n) for n in (0, 1)) else ""
    apart = node.args[0] if node.target in _SUMMED and node.args else None
    if not isinstance(apart, Node) or rank(node) != rank(apart) - 1:
        return ""
    squared = False
    for _ in range(4):
        if not isinstance(apart, Node) or apart.target not in _OF_EACH_DIFFERENCE:
            break
        squared = squared or apart.target in (torch.square, operator.pow, operator.mul)
        apart = next((a for a in apart.args if isinstance(a, Node) and same_shape(shape(a), shape(apart))), None)
    meets = isinstance(apart, Node) and apart.target is operator.sub and _pair_up(*apart.args)
    return "" if not meets else SQUARES if squared else DISTANCES


MIXED = "a layer mixes the {} of the heads (talking heads)"

_LAYOUT = {torch.permute, torch.t, torch.reshape, torch.unsqueeze, torch.squeeze, "unsqueeze", "squeeze", "expand", "contiguous"}


def _without_layout(x: Any) -> Any:
    while isinstance(x, Node) and x.target in _LAYOUT:
        x = x.args[0]
    return x


def _mixes_heads(node: Node) -> bool:
    """A linear layer, a 1x1 convolution or a product with weights over the heads of scores, or of probabilities."""
    if node.target is F.linear:
        x = node.args[0]
        order = x.args[1] if isinstance(x, Node) and x.target is torch.permute else (0,)
        return rank(node) > 3 and order[-1] not in (len(order) - 1, len(order) - 2)  # type: ignore[index, arg-type]
    if node.target in (F.conv2d, torch.conv2d):
        return all(same_size(s, 1) for s in shape(Arguments(node, "input", "weight")["weight"])[2:])
    if node.target is not torch.matmul or rank(node) < 4:
        return False
    weight, x = map(_without_layout, node.args)
    if not is_weight(weight) or rank(weight) != 2:
        return False
    while isinstance(x, Node) and (x.target in _AFTER or (x.target in STEPS and x.target is not torch.reshape)):
        x = _without_layout(next((a for a in x.args if is_float(a) and rank(a) == rank(x)), None))
    if not isinstance(x, Node) or x.target is not torch.matmul:
        return isinstance(x, Node) and x.target is F.softmax
    left = x.args[0]
    while isinstance(left, Node) and (left.target in _AFTER or left.target in _LAYOUT):
        left = left.args[0]
    return isinstance(left, Node) and left.target is not F.softmax  # else these are values, weighed by probabilities


def _is_near(node: Node) -> bool:
    """Whether a call, though no step between scores and values, may stand there in something like an attention."""
    if node.target is F.linear and rank(node) > 3 and shape(node)[-1] == 1:
        return True  # scores made of vectors (additive attention)
    return node.target in (*_REARRANGES, F.conv2d, torch.conv2d) or _mixes_heads(node) or is_hook(node)


def _score_levels(context: Context) -> dict[Node, int]:
    """How each node is made from a product of activations: by steps that are understood, by others too, or not at all."""
    levels: dict[Node, int] = {}
    written: set[int | None] = set()  # memory that scores were copied into
    for node in context.analysis.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        targets = mutated_arguments(node)
        if targets and any(i in levels for i in node.all_input_nodes):
            written.update(map(storage, targets))
        if written and storage(node) in written - {None}:
            levels[node] = _LOOSE
            continue
        if _is_product(node):
            levels[node] = _PLAIN
            continue
        if _distance(node):
            levels[node] = _LOOSE
            continue
        known = node.target in STEPS
        if not known and not _is_near(node):
            continue
        above = max((levels.get(i, _NOTHING) for i in node.all_input_nodes), default=_NOTHING)
        if above:
            levels[node] = above if known else _LOOSE
    return levels


# ---------------------------------------------------------------------------------------------------------------------
# From the softmax up to the scores
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Logits:
    """What has been read so far: logits = factor * (value above) + what the fields say."""

    context: Context
    factor: float = 1.0
    nodes: list[Node] = field(default_factory=list)
    scale_nodes: list[Node] = field(default_factory=list)
    bias: list[tuple[Node, float]] = field(default_factory=list)
    allowed: list[Node] = field(default_factory=list)
    disallowed: list[Node] = field(default_factory=list)
    fills: list[float] = field(default_factory=list)
    bias_over_fill: bool = False  # a bias was added to filled scores (it was read before them)
    floor: float | None = None  # the scores are clamped at the lowest number of their dtype
    bounded_only: bool = False  # the scores are clamped far out: above that no mask may stand
    softcap: float | None = None

    def carrier(self, node: Node) -> int | None:
        """Position of the argument that carries the scores."""
        levels = self.context.fact(_score_levels)
        found = [(levels.get(a, _NOTHING), -i) for i, a in enumerate(node.args) if isinstance(a, Node)]
        best = max(found, default=(_NOTHING, 0))
        return -best[1] if best[0] else None

    def sealed(self, what: str) -> Reject | None:
        """Whether something that does not commute with `what` has been read already."""
        if self.softcap is not None:
            return Reject("{} inside of the soft cap", what)
        if self.scale_nodes:
            return Reject("{} multiplied by a tensor ({})", what, self.scale_nodes[0].name)
        return None


Step = Callable[[Logits, Node], "Node | Reject"]
STEPS: dict[Any, Step] = {}


def step(*targets: Any) -> Callable[[Step], Step]:
    """Declares how a call between product and softmax is read: it updates `Logits` and returns the next node up."""

    def register(function: Step) -> Step:
        STEPS.update(dict.fromkeys(targets, function))
        return function

    return register


def _other(logits: Logits, node: Node) -> tuple[Node | None, Any]:
    """(argument that carries the scores, the other one)."""
    position = logits.carrier(node)
    if position is None or len(node.args) != 2:
        return None, None
    return node.args[position], node.args[1 - position]  # type: ignore[return-value]


@step(operator.mul)
def _times(logits: Logits, node: Node) -> Node | Reject:
    x, factor = _other(logits, node)
    if x is None:
        return Reject("{} of the scores", describe(node))
    if number(factor) is not None:
        logits.factor *= number(factor)
        return x
    if is_one_element(factor) and is_float(factor):
        if needs_grad(factor):
            return Reject("the scale is a tensor that needs a gradient ({})", factor.name)
        if logits.softcap is not None:
            return Reject("a tensor scale ({}) inside of the soft cap", factor.name)
        logits.scale_nodes.append(factor)
        return x
    return Reject("the scores are multiplied by a tensor that varies over them ({})", describe(factor))


@step(operator.truediv)
def _divided(logits: Logits, node: Node) -> Node | Reject:
    x, divisor = node.args
    if logits.carrier(node) != 0 or not number(divisor):
        return Reject("the scores are divided by, or divide, a tensor ({})", describe(divisor))
    logits.factor /= number(divisor)
    return x  # type: ignore[return-value]


@step(operator.neg)
def _negated(logits: Logits, node: Node) -> Node | Reject:
    logits.factor = -logits.factor
    return node.args[0]  # type: ignore[return-value]


@step(operator.add, operator.sub)
def _plus(logits: Logits, node: Node) -> Node | Reject:
    x, term = _other(logits, node)
    if x is None:
        return Reject("{} of the scores", describe(node))
    sign = 1.0
    if node.target is operator.sub:
        if x is node.args[0]:
            sign = -1.0
        else:
            logits.factor, sign = -logits.factor, -1.0
    if number(term) is not None:
        if logits.softcap is not None:
            return Reject("a number is added inside of the soft cap")
        return x  # the same for all keys: softmax does not see it
    if not is_float(term):
        return Reject("a mask of dtype {} is added", dtype(term))
    refused = logits.sealed("a bias is added")
    if refused is not None:
        return refused
    if logits.bounded_only and not is_bounded(term):
        return Reject("a mask is added before the scores are clamped")
    if not same_shape(shape(x), shape(node)):
        return Reject("a bias of shape {} widens scores of shape {}", tuple(shape(term)), tuple(shape(x)))
    logits.bias.append((term, logits.factor * sign))
    return x


def _filled(logits: Logits, node: Node, x: Any, mask: Any, fill: Any, masks: list[Node], inverse: list[Node]) -> Node | Reject:
    value = number(fill)
    if value is None:
        return Reject("masked scores are taken from a tensor ({}), whose value is not known before it runs", describe(fill))
    if not isinstance(x, Node) or not same_shape(shape(x), shape(node)):
        return Reject("a mask widens the scores")
    refused = logits.sealed("a mask is applied")
    if refused is not None:
        return refused
    effective = float(value) * logits.factor
    if math.isnan(effective) or effective > HIDDEN:
        return Reject("masked scores are set to {}, which does not hide them", effective)
    if logits.floor is not None or logits.bounded_only:
        return Reject("a mask is applied before the scores are clamped")
    if mask.target is operator.invert and not logits.context.analysis.is_written(mask.args[0]):
        mask, masks = mask.args[0], inverse
    masks.append(mask)
    logits.fills.append(effective)
    logits.bias_over_fill = logits.bias_over_fill or bool(logits.bias)
    return x


@step(torch.masked_fill)
def _masked_fill(logits: Logits, node: Node) -> Node | Reject:
    x, mask, fill = node.args
    return _filled(logits, node, x, mask, fill, logits.disallowed, logits.allowed)


@step(torch.where)
def _where(logits: Logits, node: Node) -> Node | Reject:
    mask, x, fill = node.args
    return _filled(logits, node, x, mask, fill, logits.allowed, logits.disallowed)


@step(torch.tanh)
def _soft_cap(logits: Logits, node: Node) -> Node | Reject:
    if logits.scale_nodes:
        return Reject("the soft cap is a tensor ({}) and no number", logits.scale_nodes[0].name)
    if logits.softcap is not None or logits.factor <= 0:
        return Reject("tanh of the scores that is no soft cap")
    logits.softcap, logits.factor = logits.factor, 1.0
    return node.args[0]  # type: ignore[return-value]


@step(torch.clamp)
def _clamp(logits: Logits, node: Node) -> Node | Reject:
    x, low, high = node.args
    wide = all(b is None or (isinstance(b, (int, float)) and b * sign >= FAR) for b, sign in ((low, -1), (high, 1)))
    if not wide or logits.factor <= 0:
        return Reject("the scores are clamped to [{}, {}]", low, high)
    lowest = high is None and low is not None and low <= torch.finfo(dtype(node)).min  # type: ignore[arg-type]
    if lowest and not (logits.bounded_only or logits.softcap or logits.bias or logits.fills or logits.scale_nodes):
        # Only -inf, or a sum of two masks, lies below: a fully masked row becomes uniform, nothing else changes.
        logits.floor = float(low) * logits.factor  # type: ignore[arg-type]
    elif logits.floor is not None:
        return Reject("the scores are clamped twice, at last to [{}, {}]", low, high)
    else:
        # A guard against overflow, beyond any score: it changes nothing unless it caught a mask.
        logits.bounded_only = True
    return x  # type: ignore[return-value]


@step(torch.nan_to_num, "nan_to_num")
def _made_finite(logits: Logits, node: Node) -> Node | Reject:
    """As a clamp far out: scores of a working model are finite, and only a mask above would be changed by it."""
    if logits.floor is not None:
        return Reject("the scores are made finite before they are clamped")
    logits.bounded_only = True
    return node.args[0]  # type: ignore[return-value]


@step("to")
def _cast(logits: Logits, node: Node) -> Node | Reject:
    x = node.args[0]
    return x if is_float(x) and is_float(node) else Reject("the scores are cast to {}", dtype(node))  # type: ignore[return-value]


@step("contiguous")
def _contiguous(logits: Logits, node: Node) -> Node | Reject:
    return node.args[0]  # type: ignore[return-value]


@step(torch.reshape)
def _reshaped(logits: Logits, node: Node) -> Node | Reject:
    return Reject("the scores change shape from {} to {}", tuple(shape(node.args[0])), tuple(shape(node)))


def _read_logits(context: Context, start: Node) -> Logits | Reject:
    """Everything between the softmax's input `start` and the product; the product is the last of `nodes`."""
    logits, current = Logits(context), start
    while not _is_product(current):
        reader = STEPS.get(current.target)
        if reader is None:
            if current.target in (torch.cat, F.pad):
                return Reject("the scores are joined with others before the softmax (sinks, or keys of two kinds)")
            if _mixes_heads(_without_layout(current)):
                return Reject(MIXED, "scores")
            if said := _said_above(context, current):
                return Reject("{}", said)
            if current.target in ("squeeze", torch.squeeze) and any(same_size(s, 1) for s in shape(current.args[0])[-2:]):
                return Reject(ONE_QUERY)
            return Reject("{} between the scores and the softmax", describe(current))
        logits.nodes.append(current)
        above = reader(logits, current)
        if isinstance(above, Reject):
            return above
        if context.fact(_score_levels).get(above, _NOTHING) == _NOTHING:
            return Reject("{} of something that is no score", describe(current))
        current = above
    logits.nodes.append(current)
    return logits


def _said_above(context: Context, scores: Node) -> str:
    """What `_distance` says of the call that scores without a product began with."""
    levels, current = context.fact(_score_levels), scores
    for _ in range(8):
        if said := _distance(current):
            return said
        above = [a for a in current.all_input_nodes if levels.get(a)]
        if len(above) != 1:
            break
        current = above[0]
    return ""


def _empty_rows(logits: Logits) -> str | Reject:
    """What a row without any allowed key gives."""
    if logits.floor is not None:
        if len(logits.bias) > 1:
            return Reject("several additive masks are clamped")
        return "uniform"
    finite = {f for f in logits.fills if math.isfinite(f)}
    if not finite:
        return "nan"
    if len(finite) > 1 or len(finite) < len(set(logits.fills)):
        return Reject("masks fill with different values ({})", ", ".join(map(str, sorted(set(logits.fills)))))
    if logits.bias and (logits.bias_over_fill or not all(is_bounded(b) for b, _ in logits.bias)):
        return Reject("masked scores are set to {} and a tensor is added: fully masked rows depend on both", *finite)
    return "uniform"


# ---------------------------------------------------------------------------------------------------------------------
# From the softmax down to the values
# ---------------------------------------------------------------------------------------------------------------------

_AFTER = {F.dropout, "to", "contiguous"}


def _leads_to_product(start: Node) -> bool:
    """Whether the probabilities reach a product with an activation through element-wise and layout steps (a near miss)."""
    seen, stack = {start}, [start]
    while stack and len(seen) < 48:
        for user in stack.pop().users:
            if _is_product(user) or user.target is torch.einsum:  # one that is no plain product of two
                return True
            follows = user.target in STEPS or user.target in _AFTER or _is_near(user)
            if user not in seen and follows:
                seen.add(user)
                stack.append(user)
    return False


def _behind_layout(x: Node) -> Node:
    """The call that reads `x` where nothing but layout is between, and nobody else reads it."""
    while x.target in _LAYOUT and len(x.users) == 1:
        x = next(iter(x.users))
    return x


@dataclass
class _Below:
    nodes: list[Node]
    product: Node
    dropout_p: float
    zeroed: tuple[str, ...] = ()  # what rows without keys gave at first ("nan", "uniform") before they were set to zero again


def _read_below(softmax: Node, logits: Logits) -> _Below | Reject:
    """Everything from the softmax to the product with the values."""
    nodes, dropout_p, current = [softmax], 0.0, softmax
    zeroed: tuple[str, ...] = ()
    while True:
        user = next(iter(current.users)) if len(current.users) == 1 else None
        if user is not None and (_is_nan_to_zero(user) or (not zeroed and _hides_again(logits, user, current))):
            zeroed = (*zeroed, "nan") if _is_nan_to_zero(user) else ("nan", "uniform")
            nodes.append(user)
            current = user
            continue
        useful = [u for u in current.users if _is_product(u) or u.target in _AFTER]
        if not useful:
            user = next(iter(current.users), None)
            if user is None or user.op == "output":
                return Reject("the probabilities are returned and multiply nothing")
            if _mixes_heads(_behind_layout(user)):
                return Reject(MIXED, "probabilities")
            if user.target in (operator.mul, torch.masked_fill, torch.where):
                return Reject("a mask or factor is applied after the softmax ({})", describe(user))
            return Reject("{} between the softmax and the values", describe(user))
        # Other readers are the business of a guard; this one goes on.
        following = next((u for u in useful if _is_product(u)), useful[0])
        if _is_product(following):
            if following.args[0] is not current or following.args[1] is current:
                return Reject("the probabilities are the right operand of the product")
            return _Below([*nodes, following], following, dropout_p, zeroed)
        if following.target is F.dropout:
            p, training = number(following.args[1]), following.args[2]
            if p is None or not isinstance(training, bool) or dropout_p:
                return Reject("dropout after the softmax that is not understood")
            dropout_p = float(p) if training else 0.0
        elif not is_float(following):
            return Reject("the probabilities are cast to {}", dtype(following))
        nodes.append(following)
        current = following


def _is_nan_to_zero(node: Node) -> bool:
    return node.target is torch.nan_to_num and len(node.args) == 1 and not node.kwargs


def _hides_again(logits: Logits, user: Node, probabilities: Node) -> bool:
    """Whether `user` fills the probabilities with 0 by the one mask that the scores were filled by."""
    if user.target is torch.masked_fill:
        (x, mask, fill), known, inverse = user.args, logits.disallowed, logits.allowed
    elif user.target is torch.where:
        (mask, x, fill), known, inverse = user.args, logits.allowed, logits.disallowed
    else:
        return False
    if x is not probabilities or number(fill) != 0:
        return False
    analysis = logits.context.analysis
    same = any(analysis.same_value(mask, other) for other in known)
    if mask.target is operator.invert and not analysis.is_written(mask.args[0]):
        same = same or any(analysis.same_value(mask.args[0], other) for other in inverse)
    hidden = [*logits.allowed, *logits.disallowed]
    if len(hidden) != 1 or len(logits.fills) != 1 or not all(is_bounded(b) for b, _ in logits.bias):
        return False
    return same


# ---------------------------------------------------------------------------------------------------------------------
# The chain
# ---------------------------------------------------------------------------------------------------------------------


def capture_chain(context: Context, node: Node) -> Candidate | Reject | None:
    """matmul, scale, masks, softmax, dropout, matmul: written out."""
    scores = node.args[0] if node.args else None
    if not isinstance(scores, Node) or not context.fact(_score_levels).get(scores):
        return None
    if not _leads_to_product(node):
        return None
    if node.kwargs.get("dim") != -1:
        return Reject("softmax over dim {} and not over the last", node.kwargs.get("dim"))
    logits = _read_logits(context, scores)
    if isinstance(logits, Reject):
        return logits
    below = _read_below(node, logits)
    if isinstance(below, Reject):
        return below
    empty = _empty_rows(logits)
    if isinstance(empty, Reject):
        return empty
    if empty in below.zeroed:
        empty = "zero"
    product = logits.nodes[-1]
    q, k = product.args
    v = below.product.args[1]
    if 1 in (rank(q), rank(k)):
        return Reject(ONE_QUERY)
    if any(rank(n) != rank(node) for n in (q, k, v)):
        return Reject("ranks of q, k, v and scores are {}, {}, {}, {}", rank(q), rank(k), rank(v), rank(node))
    scale = logits.factor
    if logits.softcap is not None:
        scale *= logits.softcap
    dims = rank(k)
    k_transposed = True
    if k.target in (torch.permute, torch.t):  # type: ignore[union-attr]
        order = tuple(k.args[1]) if k.target is torch.permute else (1, 0)  # type: ignore[union-attr]
        if order == (*range(dims - 2), dims - 1, dims - 2):
            k, k_transposed = k.args[0], False  # type: ignore[union-attr]
    gqa = False
    if not k_transposed and dims >= 4:
        k, v, gqa = _without_repeats(context, q, k, v)  # type: ignore[arg-type]
    nodes = tuple(sorted((*logits.nodes, *below.nodes), key=context.analysis.order.__getitem__))
    captured = AttentionCapture(
        q,  # type: ignore[arg-type]
        k,  # type: ignore[arg-type]
        v,  # type: ignore[arg-type]
        k_transposed,
        scale,
        tuple(logits.scale_nodes),
        tuple(logits.bias),
        tuple(logits.allowed),
        tuple(logits.disallowed),
        lowest=logits.floor,
        softcap=logits.softcap,
        dropout_p=float(below.dropout_p),
        empty=empty,
        enable_gqa=gqa,
        types=_types(context, nodes, product, below.product),
    )
    read = (q, k, v, *logits.scale_nodes, *(b for b, _ in logits.bias), *logits.allowed, *logits.disallowed)
    return Candidate(below.product, nodes, read, captured, typed=captured.types is not None)  # type: ignore[arg-type]


def _types(context: Context, nodes: tuple[Node, ...], scores: Node, output: Node) -> tuple[torch.dtype, torch.dtype] | None:
    """What `AttentionCapture.types` says: softmax, or scores as well, in full precision where autocast is disabled, most often."""
    modes = {context.analysis.regions[n][1] for n in nodes}
    return None if len(modes) == 1 else (value(scores).dtype, value(output).dtype)  # type: ignore[union-attr]


def inputs_are_outside(context: Context, c: Candidate) -> Reject | None:
    """A mask or value that is computed from the site's own scores is no input of it."""
    inside = set(c.nodes)
    hit = next((n for n in c.inputs if n in inside), None)
    return (
        None if hit is None else Reject("{} ({}) is read by a mask or value of the same site", describe(hit), hit.name)
    )


def keep_flex_attention(context: Context, node: Node) -> Candidate | Reject | None:
    """flex_attention is compiled with its own mask and score functions, and stays."""
    return Reject("flex_attention is generated from its own mask_mod and score_mod; it stays as it is")


# Dynamo's name for what runs after a break (importing it from torch._dynamo loads half of torch).
_RESUMED = "torch_dynamo_resume_in"
CUT_BEFORE = "a graph break cuts it: its scores come from another graph (TORCH_LOGS=graph_breaks)"
CUT_AFTER = "a graph break cuts it: its probabilities leave the graph (TORCH_LOGS=graph_breaks)"


def capture_cut(context: Context, node: Node) -> Reject | None:
    """The softmax of an attention whose scores, or whose probabilities, cross a graph break."""
    scores = node.args[0] if node.args else None
    if not isinstance(scores, Node) or rank(node) < 3 or node.kwargs.get("dim") != -1:
        return None
    if context.fact(_score_levels).get(scores):
        broken = context.graph_break is not None
        return Reject(CUT_AFTER) if broken and _is_returned(node) and not _leads_to_product(node) else None
    while scores.op != "placeholder":
        above = [a for a in scores.args if isinstance(a, Node) and is_float(a) and same_shape(shape(a), shape(node))]
        if scores.target not in STEPS or len(above) != 1:
            return None
        scores = above[0]
    # What Dynamo compiles after a break has a name of its own; the scores of a caller are no part of an attention.
    cause = getattr(context.module, "compile_subgraph_reason", None)
    resumed = any(f.name.startswith(_RESUMED) for f in getattr(cause, "user_stack", ()))
    if not resumed or is_weight(scores) or not same_shape(shape(scores), shape(node)):
        return None
    return Reject(CUT_BEFORE) if _leads_to_product(node) else None


def _is_returned(node: Node) -> bool:
    """Whether `node` leaves the graph as it is, or behind dropout and casts."""
    return any(u.op == "output" or (u.target in _AFTER and _is_returned(u)) for u in node.users)


DISABLED = "a function that is excluded from compilation (torch.compiler.disable) takes its scores"


def capture_disabled(context: Context, node: Node) -> Reject | None:
    """q @ kT, scaled and masked or not, that leaves the graph for a function that Dynamo may not look into."""
    if "torch.compiler.disable" not in (context.graph_break or "") or not _is_product(node):
        return None
    if node.args[1].target not in (torch.permute, torch.t) or not is_float(node):  # type: ignore[union-attr]
        return None  # probabilities times values, say
    current = node
    while not any(u.op == "output" for u in current.users):
        following = [u for u in current.users if u.target in STEPS and same_shape(shape(u), shape(node))]
        if len(following) != 1:
            return None
        current = following[0]
    return Reject(DISABLED)


EXPONENTIALS = (
    "a softmax written out that may not be one: what is subtracted is not the scores' maximum (they may overflow), or their sum "
    "has something added"
)


def capture_exponentials(context: Context, node: Node) -> Reject | None:
    """exp of scores, divided by a sum over the keys, that the canonicaliser could not prove to be a softmax."""
    summed = [u for u in node.users if u.target in ("sum", torch.sum)]
    if len(summed) != 1 or not context.fact(_score_levels).get(node) or rank(node) < 3:
        return None
    if Arguments(summed[0], "input", "dim")["dim"] not in (-1, rank(node) - 1) or not _leads_to_product(node):
        return None
    return Reject(EXPONENTIALS)


def capture_without_softmax(context: Context, node: Node) -> Reject | None:
    """A function of each score by itself, or one that draws, in the place of the softmax."""
    scores = node.args[0] if node.args else None
    if not isinstance(scores, Node) or rank(node) < 3 or context.fact(_score_levels).get(scores) != _PLAIN:
        return None
    logits = _read_logits(context, scores)
    if isinstance(logits, Reject):
        return None
    k = logits.nodes[-1].args[1]
    if k.target not in (torch.permute, torch.t) or not _weighs_values(node):  # type: ignore[union-attr]
        return None
    return Reject("{} of the scores, and no softmax, weighs the values", describe(node))


def _weighs_values(weights: Node, of_each: bool = False) -> bool:
    """Whether `weights` multiply an activation from the left, behind steps on each of them; of_each: from any side, or each value
    by its weight before a sum."""
    stack, seen = [weights], {weights}
    while stack and len(seen) < 16:
        current = stack.pop()
        for user in current.users:
            if _is_product(user) and (of_each or user.args[0] is current):
                return True
            if of_each and user.target is operator.mul and any(u.target in ("sum", torch.sum) for u in user.users):
                return True
            follows = user.target in STEPS or user.target in _AFTER or user.target in (torch.square, operator.pow)
            if user not in seen and (follows or (of_each and user.target in (*_LAYOUT, operator.getitem))):
                seen.add(user)
                stack.append(user)
    return False


POOLED = "a linear layer of the tokens makes the scores (attention pooling)"


def _pooled(node: Node, dim: Any) -> str:
    """What a call says that scores tokens by learned vectors for a softmax over `dim`, by one most often ("": it is no such)."""
    if node.target is F.linear:
        return ONE_QUERY if same_size(shape(node)[-1], 1) else POOLED if dim != -1 else ""
    if node.target is torch.matmul:
        return ONE_QUERY if rank(node.args[1]) == 1 else ""
    pairs = node.args[0] if node.target in ("sum", torch.sum) and node.args else None
    if not isinstance(pairs, Node) or pairs.target is not operator.mul:
        return ""
    summed = Arguments(node, "input", "dim")["dim"] in (-1, rank(pairs) - 1)
    return ONE_QUERY if summed and any(is_weight(a) and rank(a) == 1 for a in pairs.args) else ""


def capture_pooling(context: Context, node: Node) -> Reject | None:
    """A softmax over tokens that a vector, or a layer, scores, by which their values are summed."""
    dim, stack = node.kwargs.get("dim"), [(a, node.kwargs.get("dim")) for a in node.args[:1]]
    for _ in range(16):
        if not stack or not isinstance(dim, int):
            return None
        scores, over = stack.pop()
        if said := _pooled(scores, over):
            return Reject("{}", said) if not same_size(shape(node)[dim], 1) and _weighs_values(node, of_each=True) else None
        if scores.target in STEPS or scores.target in _LAYOUT or scores.target is operator.getitem:
            over = -1 if scores.target is torch.reshape else over  # heads of keys, say: a layer of several features is not told
            stack += [(a, over) for a in scores.args if is_float(a)]
    return None


CALL = Pattern(
    name="sdpa",
    kind="attention",
    equation="scaled_dot_product_attention(q, k, v, mask) => spt::select_* + spt::*_attention",
    anchors=(F.scaled_dot_product_attention,),
    capture=capture_call,
)
CHAIN = Pattern(
    name="softmax-chain",
    kind="attention",
    equation="dropout(softmax(scale * q @ kT + masks)) @ v => spt::select_* + spt::*_attention",
    anchors=(F.softmax,),
    capture=capture_chain,
    guards=(inputs_are_outside,),
)
POOLING = Pattern(
    name="attention-pooling",
    kind="attention",
    equation="sum(softmax(x @ w) * v) over tokens stays",
    anchors=(F.softmax,),
    capture=capture_pooling,
)
FLEX = Pattern(
    name="flex-attention",
    kind="attention",
    equation="flex_attention(q, k, v, score_mod, block_mask) stays",
    anchors=(torch.ops.higher_order.flex_attention,),
    capture=keep_flex_attention,
)

CUT = Pattern(
    name="attention-cut",
    kind="attention",
    equation="softmax(scores of another graph), or its probabilities for another, stay",
    anchors=(F.softmax,),
    capture=capture_cut,
)

OUTSIDE = Pattern(
    name="attention-disabled",
    kind="attention",
    equation="q @ kT for a function that is excluded from compilation stays",
    anchors=(torch.matmul,),
    capture=capture_disabled,
)

WRITTEN_OUT = Pattern(
    name="softmax-written-out",
    kind="attention",
    equation="exp(q @ kT) / (sum + something) @ v stays",
    anchors=(torch.exp,),
    capture=capture_exponentials,
)

OTHERWISE = Pattern(
    name="attention-without-softmax",
    kind="attention",
    equation="sigmoid(q @ kT) @ v, relu(q @ kT) @ v stay",
    anchors=(torch.sigmoid, F.relu, F.gumbel_softmax, torch.tanh),
    capture=capture_without_softmax,
)

PATTERNS = (CALL, CHAIN, POOLING, FLEX, CUT, OUTSIDE, WRITTEN_OUT, OTHERWISE)
