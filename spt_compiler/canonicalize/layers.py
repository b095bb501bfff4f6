"""Linear layers with steps on each number between them: a block, its parts apart from what is beside them, features last."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..graph import Arguments, is_float, is_tensor, rank, same_shape, same_size, shape
from .editor import Editor, Unknown, rule
from .products import is_weight, permuted, swapped, widened
from .spelling import ELEMENTWISE, joined_parts, one_index, piece

# Steps between two layers that act on each number by itself.
_POINTWISE = {
    *ELEMENTWISE,
    *(operator.truediv, torch.where, torch.masked_fill, torch.clamp, F.dropout, F.gelu, F.leaky_relu, F.elu, F.selu, F.celu),
    *(F.mish, F.softplus, F.hardtanh, F.relu6, F.hardsigmoid, F.hardswish, F.softsign, F.logsigmoid, "to", "contiguous"),
}


def _cut(e: Editor, x: fx.Node, dim: int) -> tuple[Any, slice | None]:
    """(tensor, slice) where `x` is that slice of it along `dim`, (tensor, None) where it is the gated linear unit of its halves;
    (None, None) of others."""
    if x.target is F.glu:
        whole, along = Arguments(x, "input", ("dim", -1)).take("input", "dim")
        return (whole if along % rank(x) == dim else None), None
    if x.target is operator.getitem and is_tensor(x.args[0]):
        along, key = one_index(x)
        return (x.args[0], key) if along == dim and isinstance(key, slice) else (None, None)
    whole, along, start = piece(e, x)
    return (whole, slice(start, start + shape(x)[dim])) if whole is not None and along == dim else (None, None)


def _cut_last(e: Editor, whole: fx.Node, part: slice | None) -> fx.Node:
    """What `_cut` has found of the last dim, of another tensor."""
    return e.call(F.glu, whole, -1) if part is None else e.call(operator.getitem, whole, (Ellipsis, part))


def _up_to_layers(e: Editor, x: fx.Node, dim: int, is_layer: Callable[[fx.Node], Any]) -> set[fx.Node]:
    """`x` and what it is made of, up to layers and with them, by steps on each number and parts along `dim`; else nothing."""
    inside, stack = {x}, [x]
    while stack and len(inside) < 48:
        current = stack.pop()
        if is_layer(current):
            continue
        if current.target in _POINTWISE:
            above = [a for a in current.args if is_tensor(a) and same_shape(shape(a), shape(current))]
        else:
            whole, _ = _cut(e, current, dim)
            if whole is None:
                return set()
            above = [whole]
            inside.update({current.args[0]} - {whole})  # what splits it
        above = [a for a in above if a not in inside]
        inside.update(above)
        stack += above
    return set() if stack or not any(map(is_layer, inside)) else inside


def _leaves(inside: set[fx.Node], *ends: fx.Node) -> bool:
    """Whether somebody reads one of the nodes `inside`, beside each other and `ends`."""
    return any(u not in inside and u not in ends for i in inside for u in i.users)


def _is_linear(node: fx.Node) -> bool:
    return node.target is F.linear


def _dry(x: Any) -> Any:
    """What dropout and casts were applied to."""
    while is_tensor(x) and x.target in (F.dropout, "to"):
        x = x.args[0]
    return x


def _narrow(layer: fx.Node) -> fx.Node | None:
    """The first of two linear layers that narrow and widen again, of which `layer` is the second: the low-rank branch of one
    beside it."""
    narrow = _dry(layer.args[0])
    if not is_tensor(narrow) or not _is_linear(narrow):
        return None
    sizes = [shape(n)[-1] for n in (layer, narrow, narrow.args[0])]
    return narrow if all(isinstance(s, int) for s in sizes) and sizes[1] < min(sizes[0], sizes[2]) else None


def _block_above(e: Editor, x: fx.Node, width: int) -> set[fx.Node]:
    """What makes `x` of linear layers that read `width` features, and of their branches, by one step at least: the inside of a
    block that `x` closes."""
    if _is_linear(x) or not rank(x):
        return set()
    inside = _up_to_layers(e, x, rank(x) - 1, _is_linear)
    layers = [n for n in inside if _is_linear(n) and _narrow(n) is None]
    closes = (x.target in _POINTWISE or x.target is F.glu) and all(same_size(shape(n.args[0])[-1], width) for n in layers)
    return inside if closes and layers else set()


def _summed_layers(node: Any) -> list[fx.Node]:
    """The linear layers with weights of which `node` is a sum, each with a factor and a cast or without; else nothing."""
    if not is_tensor(node):
        return []
    if _is_linear(node):
        return [node] if rank(node.args[1]) == 2 and all(map(is_weight, node.args[1:])) else []
    if node.target not in (operator.add, operator.mul, "to") and not (node.target is operator.truediv and is_tensor(node.args[0])):
        return []
    terms = [_summed_layers(a) if len(a.users) == 1 else [] for a in node.args if is_tensor(a)]
    return sum(terms, []) if len(terms) == (2 if node.target is operator.add else 1) and all(terms) else []


@rule(operator.add)
def branch_to_its_layer(e: Editor, node: fx.Node) -> fx.Node | None:
    """(x + linear(h, w)) + b(a(h)) -> x + (linear(h, w) + b(a(h))): a layer has its low-rank branch before others are added."""
    for total, branch in (node.args, node.args[::-1]):
        narrow = [_narrow(n) for n in _summed_layers(branch)]
        if not narrow or None in narrow or not is_tensor(total) or total.target is not operator.add or len(total.users) != 1:
            continue
        for other, base in (total.args, total.args[::-1]):
            layers, others = [n for n in _summed_layers(base) if _narrow(n) is None], _summed_layers(other)
            if len(layers) != 1 or any(_dry(n.args[0]) is not _dry(layers[0].args[0]) for n in narrow):
                continue
            if others and all(map(_narrow, others)):
                continue  # another branch: they follow their layer in whatever order
            if same_shape(shape(base), shape(node)) and e.same_region(node, total, base, branch):
                return e.call(operator.add, other, e.call(operator.add, base, branch))
    return None


@rule(F.linear, operator.add)
def joined_inputs_apart(e: Editor, node: fx.Node) -> fx.Node | None:
    """linear(cat([a, f(linear(x))], -1), w, b) -> linear(a, w[:, :n], b) + linear(f(linear(x)), w[:, n:]).

    Two branches of a layer (attention and a feed-forward block, say) whose out-projections are one: the second closes its block.
    So do the low-rank branches that are added to the one.
    """
    summed = _summed_layers(node)
    readers = [_narrow(n) or n for n in summed]
    joined = readers[0].args[0] if readers else None
    parts, dim = joined_parts(joined) if is_tensor(joined) else ((), 0)
    if not parts or dim != rank(joined) - 1 or any(n.args[0] is not joined for n in readers) or {*joined.users} != {*readers}:
        return None
    if not e.same_region(node, joined, *readers, *summed):
        return None
    widths = [shape(p)[-1] for p in parts]
    closes = [bool(_block_above(e, p, shape(node)[-1])) for p in parts]
    if not all(isinstance(s, int) for s in widths) or sum(closes) != 1:
        return None

    def share_of(x: fx.Node, part: fx.Node, columns: slice, biased: bool) -> fx.Node:
        if x.target is F.dropout:
            raise Unknown  # of a sum, and no sum of such
        if not _is_linear(x):
            return e.call(x.target, *(share_of(a, part, columns, biased) if is_tensor(a) else a for a in x.args))
        inner, w, *bias = x.args
        bias = bias if biased else []
        if inner is joined:
            return e.call(F.linear, part, e.call(operator.getitem, w, (slice(None), columns)), *bias)
        return e.call(F.linear, share_of(inner, part, columns, biased), w, *bias)

    total = None
    for i in sorted(range(len(parts)), key=closes.__getitem__):
        start = sum(widths[:i])
        term = share_of(node, parts[i], slice(start, start + widths[i]), total is None)
        total = term if total is None else e.call(operator.add, total, term)
    e.move((joined,))
    return total


@rule(F.linear, operator.add)
def fused_layer_apart(e: Editor, node: fx.Node) -> fx.Node | None:
    """linear(x, w), some slices of which are the inside of a block -> cat([linear(x, w[:n]), linear(x, w[n:])], -1).

    Queries, keys and values and a feed-forward block beside them made by one layer, with its low-rank branches: each keeps its
    rows, for slices of what is joined are the parts.
    """
    summed, dim = _summed_layers(node), rank(node) - 1
    layers = [n for n in summed if _narrow(n) is None]
    if len(layers) != 1 or not all(same_shape(shape(n), shape(node)) for n in summed) or not e.same_region(node, *summed):
        return None
    width, total = shape(layers[0].args[0])[-1], shape(node)[-1]
    if not isinstance(width, int) or not isinstance(total, int):
        return None
    parts: list[tuple[int, int, bool]] = []  # (first row, end, whether it is inside of a block)
    for user in node.users:
        for part in [user] if is_tensor(user) else user.users or [user]:  # what nobody reads is no split: the graph's output
            whole, along, start = piece(e, part) if is_tensor(part) else (None, 0, 0)
            if whole is not node or along != dim or not e.same_grad(part, node):
                return None
            parts.append((start, start + shape(part)[dim], _is_inside_block(e, part, node, width)))
    parts.sort()
    cuts = [0, *(b[0] for a, b in pairwise(parts) if a[2] is not b[2]), total]
    rows = [slice(a, b) for a, b in pairwise(cuts)]
    if len(rows) < 2 or not all(any(r.start <= a and b <= r.stop for r in rows) for a, b, _ in parts):
        return None

    def rows_of(x: fx.Node, r: slice) -> fx.Node:
        if _is_linear(x):
            return e.call(F.linear, x.args[0], *(e.call(operator.getitem, p, r) for p in x.args[1:]))
        return e.call(x.target, *(rows_of(a, r) if is_tensor(a) else a for a in x.args))

    return e.call(torch.cat, [rows_of(node, r) for r in rows], dim)


def _is_inside_block(e: Editor, part: fx.Node, layer: fx.Node, width: int) -> bool:
    """Whether `part` of the output of `layer` leads to an out-projection that closes a block, of which `layer` is the first."""
    stack, seen = [part], {part}
    while stack and len(seen) < 48:
        current = stack.pop()
        for user in current.users:
            if _is_linear(user):
                narrows = same_size(shape(user)[-1], width) and isinstance(shape(current)[-1], int) and shape(current)[-1] >= width
                if user.args[0] is current and narrows and layer in _block_above(e, current, width):
                    return True
                continue
            follows = user.target in _POINTWISE or not is_tensor(user) or _cut(e, user, rank(user) - 1)[0] is not None
            if follows and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


@rule(torch.reshape)
def layers_on_flat_tokens(e: Editor, node: fx.Node) -> fx.Node | None:
    """f(linear(x.flatten(0, 1)), y.flatten(0, 1)).view(B, T, F) -> f(linear(x), y): neither the layers nor the steps on each
    number mix tokens, so that what they share with layers beside them is one tensor for both."""
    (*lead, width), last = shape(node) or (0,), node.args[0]
    if rank(last) < 2 or not lead or not same_size(shape(last)[-1], width):
        return None
    flat = shape(last)[:-1]
    inside, flattened, stack = set[fx.Node](), set[fx.Node](), [last]
    while stack and len(inside) < 48:
        current = stack.pop()
        if current.target is torch.reshape:
            if not same_shape(shape(current.args[0]), (*lead, shape(current)[-1])):
                return None
            flattened.add(current)
            continue
        if current.target in _POINTWISE:
            above = [a for a in current.args if rank(a) > 1]
        elif _is_linear(current):
            above = [current.args[0]]
        elif (whole := _cut(e, current, len(flat))[0]) is not None:
            above = [whole]
            inside.update({current.args[0]} - {whole})  # what splits it
        else:
            return None
        if not all(same_shape(shape(a)[:-1], flat) for a in above):
            return None
        inside.add(current)
        stack += [a for a in above if a not in inside and a not in flattened]
    if stack or not any(map(_is_linear, inside)) or _leaves(inside, node) or not e.same_region(node, *inside, *flattened):
        return None
    unfolded: dict[fx.Node, fx.Node] = {f: f.args[0] for f in flattened}  # type: ignore[misc]

    def unfold(x: Any) -> Any:
        if x in inside and x not in unfolded:
            unfolded[x] = anew(x)
        return unfolded.get(x, x) if is_tensor(x) else x

    def anew(x: fx.Node) -> fx.Node:
        whole, part = _cut(e, x, len(flat))
        return e.call(x.target, *map(unfold, x.args), **x.kwargs) if whole is None else _cut_last(e, unfold(whole), part)

    result = unfold(last)
    e.move(inside)
    return result


@rule(F.linear)
def token_factor_to_output(e: Editor, node: fx.Node) -> fx.Node | None:
    """linear(h * s, w, b) -> linear(h, w) * s + b inside of a block, where s is the same for all features of a token."""
    h, w, *bias = node.args
    inside = _block_above(e, h, shape(w)[0]) if rank(w) == 2 else set()
    if not any(map(_token_factor, inside)) or _leaves(inside, node) or not e.same_region(node, *inside):
        return None
    without: dict[fx.Node, tuple[fx.Node, tuple]] = {}

    def split(x: fx.Node) -> tuple[fx.Node, tuple]:
        """(`x` without factors of tokens, those: (operator, factor) each)."""
        if x not in without:
            without[x] = anew(x)
        return without[x]

    def anew(x: fx.Node) -> tuple[fx.Node, tuple]:
        if (found := _token_factor(x)) is not None:
            rest, factors = split(found[0])
            return rest, (*factors, (x.target, found[1]))
        carriers = {operator.mul: 2, operator.truediv: 1, F.dropout: 1}.get(x.target, 0)
        pairs = [split(a) if i < carriers and a in inside else (a, ()) for i, a in enumerate(x.args)]
        factors = tuple(f for _, fs in pairs for f in fs)
        return (e.call(x.target, *(a for a, _ in pairs), **x.kwargs) if factors else x), factors

    rest, factors = split(h)
    if not factors or not _block_above(e, rest, shape(w)[0]):
        return None
    result = e.call(F.linear, rest, w)
    for operation, factor in factors:
        result = e.call(operation, result, factor)
    e.move(inside)
    return e.call(operator.add, result, *bias) if bias else result


def _token_factor(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(h, s) of h * s or h / s, where s has one value for all features."""
    if x.target not in (operator.mul, operator.truediv) or not all(map(is_float, x.args)):
        return None
    for h, s in (x.args, x.args[::-1])[: 1 if x.target is operator.truediv else 2]:
        if same_shape(shape(h), shape(x)) and rank(s) > 1 and same_size(shape(s)[-1], 1) and not same_size(shape(h)[-1], 1):
            return h, s
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Layers over columns
# ---------------------------------------------------------------------------------------------------------------------


def _layer(node: Any) -> tuple[fx.Node, fx.Node, fx.Node | None, tuple[int, ...]] | None:
    """(x, weight, bias, order in which features come last) of w @ x, a linear layer with its weight on the left."""
    if not is_tensor(node) or node.target is not torch.matmul:
        return None
    (w, x), dims = node.args, rank(node)
    is_layer = rank(w) == 2 and is_weight(w) and not is_weight(x) and rank(x) == dims
    return (x, w, None, swapped(dims)) if is_layer else None


def _order(node: Any) -> tuple[int, ...] | None:
    """The order of dims that a permutation makes; None for other calls."""
    if not is_tensor(node) or node.target not in (torch.permute, torch.t):
        return None
    return tuple(node.args[1]) if node.target is torch.permute else (1, 0)


@rule(torch.matmul, F.linear)
def layers_over_columns(e: Editor, node: fx.Node) -> fx.Node | None:
    """w2 @ f(w1 @ x) -> linear(f(linear(x.mT, w1)), w2).mT.

    Either half may be a linear layer with a permutation behind or before it. Both layers and what is between them turn at
    once; a layer without the other half of its block gains nothing by it.
    """
    turns = _order(node.args[0]) if node.target is F.linear else None
    if turns is None:
        last = _layer(node)
    else:  # the permutation is the layer's own if nobody else reads it
        x, w, *rest = node.args
        last = (x.args[0], w, *(rest or [None]), turns) if turns[-1] != rank(x) - 1 and len(x.users) == 1 else None
    if last is None:
        return None
    h, w_out, b_out, order = last
    if rank(w_out) != 2 or (turns and not e.same_region(node, node.args[0])):
        return None
    width, hidden = shape(w_out)
    if not isinstance(width, int) or not isinstance(hidden, int) or hidden < width:
        return None
    back = tuple(order.index(i) for i in range(len(order)))

    def first(x: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, tuple[int, ...]] | None:
        if _order(x) == back and x.args[0].target is F.linear:
            return x.args[0], x.args[0].args[1], None, order
        return _layer(x)

    if first(h) is not None:
        return None  # nothing between them
    inside = _up_to_layers(e, h, order[-1], first)
    # They widen the block's input (those of a gated one by several times the hidden width), and it comes back to that.
    layers = [layer for n in inside if (layer := first(n)) is not None]
    if not layers or any(layer[3] != order or not same_size(shape(layer[1])[1], width) for layer in layers):
        return None
    if _leaves(inside, node, *([node.args[0]] if turns else [])) or not e.same_region(node, *inside):
        return None
    turned: dict[fx.Node, fx.Node] = {}

    def turn(x: Any) -> Any:
        if not is_tensor(x) or not rank(x):
            return x
        if x not in turned:
            turned[x] = anew(x)
        return turned[x]

    def anew(x: fx.Node) -> fx.Node:
        if x in inside:
            if (found := first(x)) is not None:
                return found[0] if _order(x) else linear(rows_of(found[0]), *found[1:3])
            whole, part = _cut(e, x, order[-1])
            if whole is not None:
                return _cut_last(e, turn(whole), part)
            return e.call(x.target, *map(turn, x.args), **x.kwargs)
        x = widened(e, x, len(order))
        *lead, features = (shape(x)[i] for i in order)
        if isinstance(features, int) and all(same_size(s, 1) for s in lead):
            return e.call(torch.reshape, x, (features,))  # a bias
        return permuted(e, x, order)

    def rows_of(x: fx.Node) -> fx.Node:
        """The input of a layer, which no size of one makes a bias. Layers that share it read one node."""
        if x not in turned:
            turned[x] = permuted(e, x, order)
        return turned[x]

    def linear(x: fx.Node, w: fx.Node, b: fx.Node | None) -> fx.Node:
        return e.call(F.linear, x, w, *([] if b is None else [b]))

    result = linear(turn(h), w_out, b_out)
    e.move(inside)
    return result if turns else permuted(e, result, back)
