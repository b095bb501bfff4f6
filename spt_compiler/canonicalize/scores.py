"""Softmax, masks, attention calls, and what stands between two products around a softmax."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..graph import (
    Arguments,
    dtype,
    is_bounded,
    is_float,
    is_one_element,
    is_tensor,
    needs_grad,
    rank,
    same_computation,
    same_shape,
    same_size,
    shape,
    value,
    without_casts,
)
from .editor import FILLS, Editor, Unknown, rule
from .products import is_weight, permuted, swapped, widened
from .spelling import EXPANDS, added_dim, joined_parts, one_index

# A fill below this survives any addition of a score in the dtypes it applies to: s + c == c for |s| < 1e20.
_ABSORBING = -1e30

# How far to look along a chain of single users; scores and softmax are at most a dozen steps apart in real models.
_CHAIN = 32


@rule("softmax", torch.softmax, F.softmax, torch.special.softmax)
def spell_softmax(e: Editor, node: fx.Node) -> fx.Node | None:
    """Every softmax -> F.softmax(x, dim=d), the last dim as -1; a dtype argument is a cast before it."""
    if node.target is F.softmax:
        found = Arguments(node, "input", "dim", ("_stacklevel", 3), "dtype")
    else:
        found = Arguments(node, "input", "dim", "dtype")
    x, dim, kind = found.take("input", "dim", "dtype")
    if not found.valid or not isinstance(dim, int) or not rank(x):
        return None
    dim = -1 if dim in (-1, rank(x) - 1) else dim % rank(x)
    if kind is not None and dtype(x) is not kind:
        return e.call(F.softmax, e.call("to", x, kind), dim=dim)
    return e.retarget(node, F.softmax, (x,), {"dim": dim})


@rule(F.softmin)
def softmin_of_negative(e: Editor, node: fx.Node) -> fx.Node | None:
    """softmin(x) -> softmax(-x)."""
    found = Arguments(node, "input", "dim", ("_stacklevel", 3), "dtype")
    x, dim, kind = found.take("input", "dim", "dtype")
    if not found.valid or not isinstance(dim, int):
        return None
    return e.call(F.softmax, e.call(operator.neg, x), dim=dim, dtype=kind)


_LOG_SOFTMAX = ("log_softmax", torch.log_softmax, F.log_softmax, torch.special.log_softmax)


@rule(torch.exp)
def exp_of_log_softmax(e: Editor, node: fx.Node) -> fx.Node | None:
    """exp(log_softmax(x)), exp(x - logsumexp(x)) -> softmax(x)."""
    inner = node.args[0]
    if not is_tensor(inner) or len(inner.users) != 1 or not e.same_region(node, inner):
        return None
    if inner.target in _LOG_SOFTMAX:
        stacklevel = (("_stacklevel", 3),) if inner.target is F.log_softmax else ()
        found = Arguments(inner, "input", "dim", *stacklevel, "dtype")
        x, dim, kind = found.take("input", "dim", "dtype")
        if not found.valid or not isinstance(dim, int):
            return None
        return e.call(F.softmax, x if kind in (None, dtype(x)) else e.call("to", x, kind), dim=dim)
    if inner.target is not operator.sub or not all(map(is_tensor, inner.args)):
        return None
    x, total = inner.args
    found = Arguments(total, "input", "dim", ("keepdim", False))
    if total.target not in ("logsumexp", torch.logsumexp) or found["input"] is not x or found["keepdim"] is not True:
        return None
    dim = _one_dim(found)
    return e.call(F.softmax, x, dim=dim) if isinstance(dim, int) and len(total.users) == 1 else None


@rule(operator.truediv)
def softmax_by_hand(e: Editor, node: fx.Node) -> fx.Node | None:
    """p / p.sum(-1, keepdim=True) with p = exp(x - max(x)) -> softmax(x), and (p @ v) / p.sum(...) -> softmax(x) @ v.

    Where the sum is one more than that (softmax1), the softmax is that of one more key, whose score is zero: see `_one_more`.
    """
    above, total = node.args
    if not is_tensor(above) or not is_tensor(total) or len(total.users) != 1:
        return None
    summed, more = total, None
    if total.target is operator.add:
        summed, more = total.args if _is_sum(total.args[0]) else reversed(total.args)
    if not _is_sum(summed) or len(summed.users) != 1:
        return None
    found = Arguments(summed, "input", "dim", ("keepdim", False), "dtype")
    p, product = found["input"], above if above.target is torch.matmul else None
    if not found.valid or found["dtype"] is not None or found["keepdim"] is not True or (product or node).args[0] is not p:
        return None
    if p.target is not torch.exp or _one_dim(found) not in (-1, rank(p) - 1) or set(p.users) != {product or node, summed}:
        return None
    if not e.same_region(node, total, summed, p, p.args[0], above) or (product and len(product.users) != 1):
        return None
    x, shift = p.args[0], None
    if x.target is operator.sub and all(map(is_tensor, x.args)) and (not rank(x.args[1]) or same_size(shape(x.args[1])[-1], 1)):
        x, shift = x.args
    if more is not None:
        result = _one_more(e, x, shift, more)
    elif shift is not None and _is_maximum(shift):
        result = e.call(F.softmax, x, dim=-1)
    else:
        return None
    return result if product is None or result is None else e.call(torch.matmul, result, product.args[1])


def _is_sum(node: Any) -> bool:
    return is_tensor(node) and node.target in ("sum", torch.sum)


def _one_more(e: Editor, x: fx.Node, shift: fx.Node | None, more: Any) -> fx.Node | None:
    """exp(x - shift) / (c * exp(-shift) + its sum) -> softmax([x, log c]) without the last, for a number c.

    With a shift, a row of -inf only would become zero in place of nan: the scores, or the shift, have to be above it.
    """
    if shift is None:
        number = e.constant(more)
    else:
        exponent = more.args[0] if is_tensor(more) and more.target is torch.exp else None
        opposite = is_tensor(exponent) and exponent.target is operator.neg and same_computation(exponent.args[0], shift)
        low = shift.args[1] if shift.target is torch.clamp else None
        above = isinstance(low, (int, float)) and low > -math.inf
        same = opposite and e.same_region(e.at, more, exponent)
        number = 1.0 if same and (above or is_bounded(x, math.inf)) else None
    if number is None or not number > 0:
        return None
    joined = e.call(F.pad, x, (0, 1), value=math.log(number))
    return e.call(operator.getitem, e.call(F.softmax, joined, dim=-1), (Ellipsis, slice(None, -1)))


@rule("masked_fill", torch.masked_fill)
def spell_masked_fill(e: Editor, node: fx.Node) -> fx.Node | None:
    """x.masked_fill(m, c) -> torch.masked_fill(x, m, c)."""
    found = Arguments(node, "input", "mask", "value")
    return e.retarget(node, torch.masked_fill, found.take("input", "mask", "value")) if found.valid else None


@rule(torch.nan_to_num, "nan_to_num", torch.masked_fill)
def spell_nan_to_num(e: Editor, node: fx.Node) -> fx.Node | None:
    """p.nan_to_num(0.0), p.masked_fill(p.isnan(), 0) of probabilities -> torch.nan_to_num(p): none of them is infinite."""
    x = node.args[0] if node.args else None
    if not is_tensor(x) or not _from_softmax(x.args[0] if x.target is torch.permute else x):
        return e.retarget(node, torch.nan_to_num, node.args, dict(node.kwargs)) if node.target == "nan_to_num" else None
    if node.target is not torch.masked_fill:
        found = Arguments(node, "input", ("nan", None), "posinf", "neginf")
        return e.retarget(node, torch.nan_to_num, (x,)) if found.valid and found["nan"] in (None, 0) else None
    mask, fill = node.args[1:]
    tests = (mask.target in (torch.isnan, "isnan") and mask.args == (x,)) or (mask.target is operator.ne and mask.args == (x, x))
    return e.call(torch.nan_to_num, x) if tests and isinstance(fill, (int, float)) and fill == 0 else None


@rule("where", torch.where)
def spell_where(e: Editor, node: fx.Node) -> fx.Node | None:
    """where(m, c, x) with a number c -> masked_fill(x, m, c); x.where(m, c) -> where(m, x, c)."""
    if node.target == "where":
        found = Arguments(node, "input", "condition", "other")
        a, m, b = found.take("input", "condition", "other")
    else:
        found = Arguments(node, "condition", "input", "other")
        m, a, b = found.take("condition", "input", "other")
    if not found.valid or dtype(m) is not torch.bool:
        return None
    number = e.constant(a)
    if number is not None and is_float(b) and is_float(node) and dtype(b) is dtype(node):
        return e.call(torch.masked_fill, b, m, number)
    return e.retarget(node, torch.where, (m, a, b))


_SDPA_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@rule(F.scaled_dot_product_attention)
def spell_sdpa(e: Editor, node: fx.Node) -> fx.Node | None:
    """F.scaled_dot_product_attention with q, k, v by position and the rest by keyword, defaults left out."""
    found = Arguments(node, "query", "key", "value", *_SDPA_DEFAULTS.items())
    if not found.valid:
        return None
    kwargs = {k: found[k] for k, default in _SDPA_DEFAULTS.items() if not _is_default(found[k], default)}
    return e.retarget(node, F.scaled_dot_product_attention, found.take("query", "key", "value"), kwargs)


def _is_default(found: Any, default: Any) -> bool:
    return not isinstance(found, (fx.Node, torch.SymInt, torch.SymFloat, torch.SymBool)) and (
        found is default or found == default
    )


# ---------------------------------------------------------------------------------------------------------------------
# Between two products around a softmax
# ---------------------------------------------------------------------------------------------------------------------

# Steps that act on each score by itself (the first tensor argument that is as large as the result carries the scores).
_PER_SCORE = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.neg,
    torch.masked_fill,
    torch.where,
    torch.tanh,
    torch.clamp,
    torch.maximum,
    torch.nan_to_num,
    torch.reshape,
    "to",
    "contiguous",
}


@rule(*(t for t in FILLS if t not in (torch.full, torch.zeros, torch.ones)))
def fill_without_scores(e: Editor, node: fx.Node) -> fx.Node | None:
    """full_like(scores, c) -> torch.full(sizes, c): a mask of the shape of the scores reads none of them."""
    x = node.args[0]
    x = x.args[0] if is_tensor(x) and x.target is operator.getitem else x  # of one of their columns
    if not is_tensor(x) or not _of_product(x):
        return None
    sizes = [e.size(node, i) for i in range(rank(node))]
    number = e.fill(node)
    if number is None or any(isinstance(s, fx.Node) and s.op != "placeholder" for s in sizes):
        return None
    found = value(node)
    return e.call(torch.full, sizes, number, dtype=found.dtype, device=found.device)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _toward_softmax(node: fx.Node, any_dim: bool = False) -> list[fx.Node] | None:
    """The chain of single users from `node` to the softmax over the last dim (or over any) that it ends in, or None."""
    chain: list[fx.Node] = []
    current: fx.Node | None = node
    while len(chain) < _CHAIN:
        current = _only_user(current)  # type: ignore[arg-type]
        if current is None:
            return None
        chain.append(current)
        if current.target is F.softmax:
            return chain if any_dim or current.kwargs.get("dim") == -1 else None
        if current.target not in _PER_SCORE:
            return None
    return None


def _of_product(node: Any) -> bool:
    """Whether `node` is made of a product by steps that act on each score, in whatever order of dims."""
    stack = [node]
    for _ in range(_CHAIN):
        if not stack:
            return False
        current = stack.pop()
        if not isinstance(current, fx.Node):
            continue
        if current.target is torch.matmul:
            return True
        if current.target in _PER_SCORE or current.target is torch.permute:
            stack += [a for a in reversed(current.args) if is_float(a) and rank(a) == rank(current)]
    return False


def _is_summed(node: fx.Node, dim: int) -> bool:
    """Whether dim `dim` of probabilities is the one that a product with values sums over, behind dropout and layout."""
    for _ in range(_CHAIN):
        user = _only_user(node)
        if user is None:
            return False
        if user.target is torch.matmul:
            left = user.args[0] is node
            return left is not (user.args[1] is node) and dim == rank(node) - (1 if left else 2)
        if user.target is torch.permute:
            dim = tuple(user.args[1]).index(dim)
        elif user.target not in _PER_PROBABILITY:
            return False
        node = user
    return False


# Steps between a softmax and the product with the values that act on each probability by itself.
_PER_PROBABILITY = (F.dropout, torch.nan_to_num, "to", "contiguous")


def _from_softmax(node: Any) -> bool:
    """Whether `node` is made of softmax probabilities, of some of the keys or all, by reshapes and steps on each only."""
    for _ in range(_CHAIN):
        if not isinstance(node, fx.Node):
            return False
        if node.target is F.softmax:
            return True
        if node.target not in (*_PER_PROBABILITY, torch.reshape, operator.getitem):
            return False
        node = node.args[0]
    return False


def _is_batch_reshape(node: Any) -> bool:
    """Whether `node` reshapes leading dims only and keeps the last two."""
    if not isinstance(node, fx.Node) or node.target is not torch.reshape or node.kwargs:
        return False
    before, after = shape(node.args[0]), shape(node)
    return len(before) >= 2 and len(after) >= 2 and same_shape(before[-2:], after[-2:])


def _reshape_lead(e: Editor, x: fx.Node, lead: Sequence[Any]) -> fx.Node:
    """`x` with its leading dims replaced by `lead` and its last two kept."""
    return e.call(torch.reshape, x, (*lead, e.size(x, -2), e.size(x, -1)))


@rule(operator.sub)
def drop_row_shift(e: Editor, node: fx.Node) -> fx.Node | None:
    """softmax(f(x - max(...))) -> softmax(f(x)) for a maximum that is the same for all keys and a linear f.

    Softmax subtracts the maximum itself, and the shift has no gradient: what it adds to a row of probabilities sums to zero.
    """
    x, shift = node.args
    if not is_float(x) or not is_float(shift) or rank(shift) > rank(x) or not _is_maximum(shift):
        return None
    if rank(shift) and not same_size(shape(shift)[-1], 1):
        return None
    chain = _toward_softmax(node)
    if chain is None or not all(map(_keeps_shifts, [node, *chain], chain)) or not e.same_region(node, chain[-1]):
        return None
    return x


def _is_maximum(node: Any) -> bool:
    """Whether `node` is the maximum of a tensor over its last dim, or over all of them."""
    kept = False
    while isinstance(node, fx.Node):
        if node.target in ("unsqueeze", torch.unsqueeze):
            if Arguments(node, "input", "dim")["dim"] not in (-1, rank(node) - 1):
                return False
            kept = True
        elif node.target not in ("detach", torch.detach, "to") and not (node.target is operator.getitem and node.args[1] == 0):
            break
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in ("max", "amax", torch.max, torch.amax):
        return False
    found = Arguments(node, "input", "dim", ("keepdim", False))
    dim = _one_dim(found)
    if dim is None:
        return not kept
    return dim in (-1, rank(found["input"]) - 1) and found["keepdim"] is not kept


def _one_dim(reduced: Arguments) -> Any:
    """The dim of a reduction, without the tuple around a single one."""
    dim = reduced["dim"]
    return dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim


def _keeps_shifts(x: fx.Node, step: fx.Node) -> bool:
    """Whether `step` of scores `x` turns a number added to all keys of a row into another such number."""
    if step.target in (operator.mul, operator.truediv):
        if step.target is operator.truediv and step.args[0] is not x:
            return False
        other = step.args[1] if step.args[0] is x else step.args[0]
        return not isinstance(other, fx.Node) or rank(other) == 0 or same_size(shape(other)[-1], 1)
    if step.target is torch.clamp:  # beyond any score
        return all(b is None or (isinstance(b, (int, float)) and abs(b) >= 5e4) for b in step.args[1:])
    if step.target in (torch.masked_fill, torch.where):
        fill = step.args[2]
        return isinstance(fill, (int, float)) and fill <= -1e4
    return step.target in (operator.add, operator.sub, operator.neg, F.softmax, "to", "contiguous") or _is_batch_reshape(step)


@rule(F.softmax)
def softmax_over_the_keys(e: Editor, node: fx.Node) -> fx.Node | None:
    """softmax(scores.permute(order), dim) -> softmax(scores, -1).permute(order), where values are summed over `dim`.

    Scores that have the keys before the queries are transposed for it, which their product can do by itself.
    """
    x, dims, dim = node.args[0], rank(node), node.kwargs.get("dim")
    if dims < 2 or not isinstance(dim, int) or not _of_product(x):
        return None
    order = tuple(x.args[1]) if x.target is torch.permute and len(x.users) == 1 else tuple(range(dims))
    inner = x.args[0] if order != tuple(range(dims)) else x
    keys = order[dim % dims]
    if keys == dims - 2:
        order = tuple(swapped(dims)[i] for i in order)
    if keys < dims - 2 or order == tuple(range(dims)) or not e.same_region(node, x) or not _is_summed(node, dim % dims):
        return None
    inner = permuted(e, inner, swapped(dims)) if keys == dims - 2 else inner
    return permuted(e, e.call(F.softmax, inner, dim=-1), order)


@rule(*(t for t in _PER_SCORE if t is not torch.reshape))
def step_before_permute(e: Editor, node: fx.Node) -> fx.Node | None:
    """f(scores.permute(order), mask) on its way to a softmax -> f(scores, mask permuted back).permute(order)."""
    dims = rank(node)
    scores = [a for a in node.args if is_float(a) and same_shape(shape(a), shape(node)) and _of_product(a)]
    x = next((a for a in scores if a.target is torch.permute), None)
    if x is None or len(x.users) != 1 or not e.same_region(node, x):
        return None
    chain = _toward_softmax(node, any_dim=True)
    if chain is None or (tuple(x.args[1]) == swapped(dims) and chain[-1].kwargs.get("dim") == -1):
        return None  # scores that are transposed can be so by their product
    order = tuple(x.args[1])
    back = [order.index(i) for i in range(dims)]
    if any(a.target is not torch.permute for a in scores) and not _is_turned(chain[-1], back):
        return None  # x is a bias made by a product (relative positions); the scores have their order already

    def moved(argument: Any) -> Any:
        if argument is x:
            return x.args[0]
        return permuted(e, widened(e, argument, dims), back) if is_tensor(argument) and rank(argument) else argument

    return permuted(e, e.call(node.target, *map(moved, node.args), **node.kwargs), order)


def _is_turned(softmax: fx.Node, order: Sequence[int]) -> bool:
    """Whether probabilities are permuted to `order` before they meet the values."""
    user = _only_user(softmax)
    while user is not None and user.target in _PER_PROBABILITY:
        user = _only_user(user)
    return user is not None and user.target is torch.permute and [*user.args[1]] == [*order]  # type: ignore[misc]


@rule(*_PER_PROBABILITY)
def probabilities_before_permute(e: Editor, node: fx.Node) -> fx.Node | None:
    """dropout(probabilities.permute(order)) -> dropout(probabilities).permute(order)."""
    x = node.args[0]
    if not is_tensor(x) or x.target is not torch.permute or len(x.users) != 1 or not _from_softmax(x.args[0]):
        return None
    if not e.same_region(node, x):
        return None
    return permuted(e, e.call(node.target, x.args[0], *node.args[1:], **node.kwargs), tuple(x.args[1]))


@rule(torch.matmul)
def product_before_permute(e: Editor, node: fx.Node) -> fx.Node | None:
    """probabilities.permute(order) @ v -> (probabilities @ v permuted back).permute(order), if the keys stay last.

    Another dim may have taken the place of the queries (the heads of a group, say), if the values are the same along it.
    """
    p, v = node.args
    if not is_tensor(p) or p.target is not torch.permute or len(p.users) != 1 or not _from_softmax(p.args[0]):
        return None
    order, dims = tuple(p.args[1]), rank(p)
    if order[-1] != dims - 1 or rank(v) > dims or not e.same_region(node, p):
        return None
    back = [order.index(i) for i in range(dims)]
    v = widened(e, v, dims)
    if order[-2] != dims - 2:
        if not same_size(shape(v)[back[-2]], 1):
            return None
        # Where the queries were among the leading dims, v has one row for all of them; now the other dim takes that row.
        v = e.call(torch.squeeze, v, back[-2])
        v = e.call(torch.unsqueeze, v, dims - 3)
        rest = [i for i in range(dims - 2) if i != back[-2]]
        back = [*(dims - 3 if i == dims - 2 else rest.index(i) for i in back[:-2]), dims - 2, dims - 1]
    return permuted(e, e.call(torch.matmul, p.args[0], permuted(e, v, back)), order)


@rule(torch.matmul, F.scaled_dot_product_attention)
def queries_of_every_row(e: Editor, node: fx.Node) -> fx.Node | None:
    """q @ k on its way to a softmax, where the rows of k share their queries (learned ones, say) -> q.expand(...) @ k."""
    q, k, *values = node.args
    if node.kwargs.get("enable_gqa") or not all(map(is_tensor, node.args)) or min(map(rank, node.args)) < 2:
        return None
    if not values and (is_weight(k) or _toward_softmax(node) is None):
        return None
    dims = max(rank(q), rank(k))
    k, *values = (widened(e, x, dims) for x in (k, *values))
    every = widened(e, q, dims)
    lead = zip(shape(every)[:-2], shape(k)[:-2], strict=True)
    shared = [same_size(own, 1) and not same_size(size, 1) for own, size in lead]
    if any(shared):
        every = e.call("expand", every, *(e.size(k, i) if s else -1 for i, s in enumerate(shared)), -1, -1)
    if (every, k, *values) == node.args:
        return None
    return e.call(node.target, every, k, *values, **node.kwargs)


@rule(F.linear)
def queries_that_are_a_layer(e: Editor, node: fx.Node) -> fx.Node | None:
    """linear(x, w) on its way to a softmax over the tokens by which values are summed -> (w @ x.mT).mT: keys of learned queries."""
    x, w, *bias = node.args
    dims = rank(node)
    if dims < 3 or rank(w) != 2 or same_size(shape(w)[0], 1) or not is_weight(w) or not _weighs_sum(node, dims - 2):
        return None
    scores = e.call(torch.matmul, w, permuted(e, x, swapped(dims)))
    if bias:  # the same for all keys: it changes nothing but has, as a parameter, a gradient
        scores = e.call(operator.add, scores, e.call(torch.unsqueeze, *bias, -1))
    return permuted(e, scores, swapped(dims))


def _weighs_sum(node: fx.Node, dim: int) -> bool:
    """Whether steps on each score lead from `node` to a softmax over its dim `dim`, whose probabilities weigh a sum over that."""
    for _ in range(_CHAIN):
        user = _only_user(node)
        if user is None:
            return False
        if user.target is F.softmax:
            return user.kwargs.get("dim") in (dim, dim - rank(user)) and _is_summed(user, dim)
        if user.target is torch.permute:
            dim = tuple(user.args[1]).index(dim)
        elif user.target not in _PER_SCORE or not same_shape(shape(user), shape(node)):
            return False
        node = user
    return False


@rule(torch.matmul)
def weights_of_every_row(e: Editor, node: fx.Node) -> fx.Node | None:
    """x @ w.expand(B, ...) with one matrix of weights -> x @ w, and w.expand(B, ...) @ x alike; keys and values stay."""
    if not e.is_spelled or _toward_softmax(node) is not None:
        return None
    if any(_from_softmax(a.args[0] if a.target is torch.permute else a) for a in node.args):
        return None
    matrices = [_matrix_of_copies(e, a) for a in node.args]
    return e.call(torch.matmul, *matrices) if tuple(matrices) != node.args else None


def _matrix_of_copies(e: Editor, x: fx.Node) -> fx.Node:
    """The one matrix of weights that all leading dims of `x` share; else `x`."""
    if rank(x) < 3 or e.is_written(x) or not e.same_grad(e.at, x):
        return x
    if x.target is torch.permute and tuple(x.args[1]) == swapped(rank(x)):
        w = _matrix_of_copies(e, x.args[0])
        return x if w is x.args[0] else e.call(torch.t, w)
    w = x.args[0] if x.target in (*EXPANDS, "repeat") else x
    while rank(w) > 2 and (added := added_dim(w)) is not None and added < rank(w) - 2 and e.same_grad(e.at, w):
        w = w.args[0]
    *lead, rows, columns = shape(w) if rank(w) > 1 else (0, 0)
    if not same_shape((rows, columns), shape(x)[-2:]) or not all(same_size(s, 1) for s in lead) or not is_weight(w):
        return x
    for _ in lead:
        w = e.call(operator.getitem, w, 0)
    return w


@rule(torch.matmul)
def values_of_every_row(e: Editor, node: fx.Node) -> fx.Node | None:
    """probabilities @ v, where v has fewer dims -> the same with dims of size one in front of v, and with the heads of the keys."""
    p, v = node.args
    if not is_tensor(v) or not 2 <= rank(v) <= rank(p) or is_weight(v) or not _from_softmax(p):
        return None
    heads = _key_heads(p)
    if rank(v) == rank(p) and heads is not None and same_size(shape(v)[-3], 1) and not same_size(heads, 1):
        v = e.call("expand", v, *(-1,) * (rank(v) - 3), heads, -1, -1)
    v = widened(e, v, rank(p))
    return None if v is node.args[1] else e.call(torch.matmul, p, v)


def _key_heads(p: Any) -> int | None:
    """How many heads the keys have whose scores made probabilities `p`, by steps on each of them only."""
    dims = rank(p)
    for _ in range(_CHAIN):
        if not is_tensor(p) or rank(p) != dims:
            return None
        if p.target is torch.matmul:
            heads = shape(p.args[1])[-3] if dims > 3 and rank(p.args[1]) == dims else None
            return heads if isinstance(heads, int) else None
        if p.target is not F.softmax and p.target not in (*_PER_PROBABILITY, *_PER_SCORE) or p.target is torch.reshape:
            return None
        p = next((a for a in p.args if is_float(a) and same_shape(shape(a), shape(p))), None)
    return None


@rule(torch.matmul)
def values_of_one_softmax(e: Editor, node: fx.Node) -> fx.Node | None:
    """p.unsqueeze(d) @ v, where one softmax weighs several tensors of values -> p @ v with those side by side."""
    p, v = node.args
    dims, dim = rank(v), 0  # of v; one that p lacks in front is added by broadcasting
    if is_tensor(p) and p.target is torch.unsqueeze and rank(p) == dims:
        p, dim = p.args[0], Arguments(p, "input", "dim")["dim"] % dims
    if not is_tensor(p) or rank(p) != dims - 1 or dim >= dims - 2 or is_weight(v) or not e.same_region(node, node.args[0]):
        return None
    several, width = shape(v)[dim], shape(v)[-1]
    if not isinstance(several, int) or not isinstance(width, int) or several == 1:
        return None
    if not _from_softmax(p.args[0] if p.target is torch.permute else p):
        return None
    lead = [i for i in range(dims - 2) if i != dim]
    beside = permuted(e, v, [*lead, dims - 2, dim, dims - 1])
    together = e.call(torch.reshape, beside, (*_sizes(e, v, (*lead, dims - 2)), several * width))
    product = e.call(torch.matmul, p, together)
    apart = e.call(torch.reshape, product, (*_sizes(e, p, range(dims - 2)), several, width))
    return permuted(e, apart, [dims - 2 if i == dim else i - (i > dim) if i < dims - 1 else i for i in range(dims)])


def _sizes(e: Editor, x: fx.Node, dims: Iterable[int]) -> list[Any]:
    return [e.size(x, i) for i in dims]


@rule(torch.square, operator.pow)
def squared_distances(e: Editor, node: fx.Node) -> fx.Node | None:
    """cdist(q, k)^2 on its way to a softmax -> |k|^2 - 2 q @ kT, for |q|^2 is the same for all keys of a row.

    cdist computes large ones by products as well; it takes no 16-bit types, in which the difference would be lost.
    """
    distances = node.args[0]
    if node.target is operator.pow and node.args[1] != 2:
        return None
    if not is_tensor(distances) or distances.target is not torch.cdist or len(distances.users) != 1:
        return None
    found = Arguments(distances, "x1", "x2", ("p", 2.0), "compute_mode")
    q, k, p = found.take("x1", "x2", "p")
    chain = _toward_softmax(node)
    if p != 2 or is_weight(k) or chain is None or not all(map(_keeps_shifts, [node, *chain], chain)):
        return None
    if not e.same_region(node, distances, chain[-1]):
        return None
    lengths = e.call(torch.unsqueeze, e.call(torch.sum, e.call(torch.square, k), -1), -2)
    product = e.call(torch.matmul, q, permuted(e, k, swapped(rank(k))))
    return e.call(operator.sub, lengths, e.call(operator.mul, product, 2.0))


@rule(torch.permute)
def transposed_scores(e: Editor, node: fx.Node) -> fx.Node | None:
    """f(q @ k).mT on its way to a softmax -> f(k.mT @ q.mT): two modalities that attend to each other by one product."""
    dims = rank(node)
    swap = swapped(dims)
    if node.kwargs or tuple(node.args[1]) != swap or _toward_softmax(node) is None:
        return None
    steps: list[tuple[fx.Node, fx.Node]] = []
    x = node.args[0]
    while isinstance(x, fx.Node) and x.target in _PER_SCORE - {torch.reshape} and len(steps) < _CHAIN:
        above = next((a for a in x.args if is_float(a) and same_shape(shape(a), shape(x)) and _of_product(a)), None)
        if above is None:
            return None
        steps.append((x, above))
        x = above
    if not _is_scores(x) or any(rank(a) != dims for a in x.args) or not e.same_region(node, x, *(s for s, _ in steps)):
        return None
    result = e.call(torch.matmul, permuted(e, x.args[1], swap), permuted(e, x.args[0], swap))
    for step, above in reversed(steps):
        others = [permuted(e, widened(e, a, dims), swap) if is_tensor(a) and rank(a) and a is not above else a for a in step.args]
        result = e.call(step.target, *(result if a is above else a for a in others), **step.kwargs)
    return result


@rule(torch.reshape)
def split_batch_before_scores(e: Editor, node: fx.Node) -> fx.Node | None:
    """(q @ k).view(B, H, T, S) on its way to a softmax -> q.view(B, H, T, D) @ k.view(B, H, D, S)."""
    x = node.args[0]
    if not _is_batch_reshape(node) or x.target is not torch.matmul or len(x.users) != 1 or rank(node) <= rank(x):
        return None
    if not e.same_region(node, x) or _toward_softmax(node) is None:
        return None
    a, b = x.args
    if not same_shape(shape(a)[:-2], shape(x)[:-2]) or not same_shape(shape(b)[:-2], shape(x)[:-2]):
        return None
    lead = node.args[1][:-2]
    return e.call(torch.matmul, _reshape_lead(e, a, lead), _reshape_lead(e, b, lead))


@rule(torch.reshape)
def split_batch_before_steps(e: Editor, node: fx.Node) -> fx.Node | None:
    """f(scores, mask).view(B, H, T, S) on its way to a softmax -> f(scores.view(...), mask.view(...))."""
    x = node.args[0]
    if not _is_batch_reshape(node) or x.target not in _PER_SCORE - {torch.reshape} or len(x.users) != 1:
        return None
    if rank(node) <= rank(x) or not e.same_region(node, x) or _toward_softmax(node) is None:
        return None
    lead = node.args[1][:-2]
    source = shape(x)[:-2]

    def moved(argument: Any) -> Any:
        if not is_tensor(argument) or rank(argument) <= 2:
            return argument
        own = shape(argument)[:-2]
        if same_shape(own, source):
            return _reshape_lead(e, argument, lead)
        inner = own[next((i for i, s in enumerate(own) if not same_size(s, 1)), len(own)) :]
        if inner and same_shape(inner, source[-len(inner) :]) and same_shape(inner, shape(node)[:-2][-len(inner) :]):
            return argument if len(inner) == len(own) else _reshape_lead(e, argument, inner)  # the inner dims stay as they are
        if all(same_size(s, 1) for s in own):
            return e.call(torch.reshape, argument, (e.size(argument, -2), e.size(argument, -1)))
        raise Unknown

    return e.call(x.target, *(moved(a) for a in x.args))


@rule(torch.reshape)
def biases_of_a_plane(e: Editor, node: fx.Node) -> fx.Node | None:
    """(scores.view(B, H, W, H, W) + bias).view(B, H * W, H * W) -> scores + bias.expand(...).view(B, H * W, H * W).

    Relative positions along the rows and the columns of an image, say, each a bias of its own.
    """
    x, terms, inside = node.args[0], [], []
    while x.target is operator.add and len(x.users) == 1:
        inside.append(x)
        carrier = next((a for a in x.args if is_float(a) and same_shape(shape(a), shape(x)) and _is_split(a)), None)
        if carrier is None:
            return None
        terms.append(x.args[1] if carrier is x.args[0] else x.args[0])
        x = carrier
    is_split = terms and x.target is torch.reshape and len(x.users) == 1 and same_shape(shape(x.args[0]), shape(node))
    if not is_split or not all(map(is_float, terms)):
        return None
    if not _of_product(x.args[0]) or _toward_softmax(node) is None or not e.same_region(node, x, *inside):
        return None
    total, split = x.args[0], [e.size(x, i) if size == -1 else size for i, size in enumerate(x.args[1])]
    if any(size in e.created for size in split):
        return None  # who reads its sizes looks like one more reader of the scores
    for term in reversed(terms):
        total = e.call(operator.add, total, e.call(torch.reshape, e.call("expand", term, *split), node.args[1]))
    return total


def _is_split(x: fx.Node) -> bool:
    """Whether `x` is a reshape, or a sum of one."""
    return x.target is torch.reshape or (x.target is operator.add and any(is_tensor(a) and _is_split(a) for a in x.args))


@rule(F.softmax)
def softmax_before_reshape(e: Editor, node: fx.Node) -> fx.Node | None:
    """softmax(scores.view(B * H, T, S)) -> softmax(scores).view(B * H, T, S)."""
    x = node.args[0]
    if not _is_batch_reshape(x) or len(x.users) != 1 or node.kwargs["dim"] != -1 or not e.same_region(node, x):
        return None
    if rank(x.args[0]) < rank(x):
        return None
    return e.call(torch.reshape, e.call(F.softmax, x.args[0], dim=-1), x.args[1])


@rule(*_PER_PROBABILITY)
def step_before_reshape(e: Editor, node: fx.Node) -> fx.Node | None:
    """dropout(probabilities.view(...)) -> dropout(probabilities).view(...), and a cast of scores.view(B * H, T, S) alike."""
    x = node.args[0]
    if not _is_batch_reshape(x) or len(x.users) != 1 or not e.same_region(node, x):
        return None
    of_scores = node.target in ("to", "contiguous") and rank(x.args[0]) > rank(x) and _toward_softmax(node) is not None
    if not of_scores and not _from_softmax(x):
        return None
    return e.call(torch.reshape, e.call(node.target, x.args[0], *node.args[1:], **node.kwargs), x.args[1])


@rule(torch.matmul)
def product_before_reshape(e: Editor, node: fx.Node) -> fx.Node | None:
    """probabilities.view(B * H, T, S) @ v -> (probabilities @ v.view(B, H, S, D)).view(B * H, T, D)."""
    p, v = node.args
    if not _is_batch_reshape(p) or len(p.users) != 1 or not _from_softmax(p) or not e.same_region(node, p):
        return None
    if not same_shape(shape(v)[:-2], shape(p)[:-2]):
        return None
    source = p.args[0]
    lead = [e.size(source, i) for i in range(rank(source) - 2)]
    product = e.call(torch.matmul, source, _reshape_lead(e, v, lead))
    return e.call(torch.reshape, product, (*p.args[1][:-2], e.size(product, -2), e.size(product, -1)))


@rule(torch.matmul)
def probabilities_to_the_left(e: Editor, node: fx.Node) -> fx.Node | None:
    """v.mT @ probabilities.mT -> (probabilities @ v).mT."""
    v, p = node.args
    if not isinstance(p, fx.Node) or p.target is not torch.permute or not _from_softmax(p.args[0]) or _from_softmax(v):
        return None
    dims, order = rank(p), tuple(p.args[1])
    swap = swapped(dims)
    if order[-2:] != swap[-2:] or rank(v) != dims or not e.same_region(node, p):
        return None
    probabilities = permuted(e, p.args[0], [order[i] for i in swap])
    return permuted(e, e.call(torch.matmul, probabilities, permuted(e, v, swap)), swap)


@rule(operator.mul, operator.truediv)
def row_factor_to_queries(e: Editor, node: fx.Node) -> fx.Node | None:
    """(q @ k) * s on its way to a softmax, where s is the same for all keys -> (q * s) @ k."""
    scores, factor = node.args
    if node.target is operator.mul and not _is_scores(scores):
        scores, factor = factor, scores
    if not _is_scores(scores) or not is_float(factor) or rank(factor) > rank(scores):
        return None
    if rank(factor) and not same_size(shape(factor)[-1], 1):
        return None
    if is_one_element(factor) and (e.constant(factor) is not None or (node.target is operator.mul and not needs_grad(factor))):
        return None  # a plain scale, which patterns carry themselves
    if len(scores.users) != 1 or not e.same_region(node, scores) or _toward_softmax(node) is None:
        return None
    q, k = scores.args
    result = e.call(torch.matmul, e.call(node.target, q, factor), k)
    return result if dtype(result) is dtype(node) else e.call("to", result, dtype(node))  # autocast narrows products only


@rule(torch.matmul)
def row_factor_to_output(e: Editor, node: fx.Node) -> fx.Node | None:
    """(p * s) @ v of probabilities p -> (p @ v) * s, where s is the same for all keys: masks of heads or queries, gates."""
    weighted, v = node.args
    if not is_tensor(weighted) or weighted.target not in (operator.mul, operator.truediv):
        return None
    if not 2 <= rank(v) <= rank(weighted):
        return None
    p, factor = weighted.args
    if weighted.target is operator.mul and not (_is_weighted(p) and same_shape(shape(p), shape(weighted))):
        p, factor = factor, p
    if not _is_weighted(p) or not same_shape(shape(p), shape(weighted)) or dtype(p) is not dtype(weighted):
        return None
    if len(weighted.users) != 1 or not e.same_region(node, weighted):
        return None
    if not (same_size(shape(factor)[-1], 1) if rank(factor) else is_tensor(factor) or isinstance(factor, (int, float))):
        return None
    return e.call(weighted.target, e.call(torch.matmul, p, v), factor)


@rule(torch.matmul)
def row_fill_to_output(e: Editor, node: fx.Node) -> fx.Node | None:
    """masked_fill(p, rows, 0) @ v of probabilities p -> masked_fill(p @ v, rows, 0), where all keys share the mask."""
    filled, v = node.args
    if not is_tensor(filled) or filled.target not in (torch.masked_fill, torch.where) or len(filled.users) != 1:
        return None
    keeps = filled.target is torch.where  # a mask of what stays; in the other, of what is filled
    (p, mask), fill = filled.args[1::-1] if keeps else filled.args[:2], filled.args[2]
    if not is_tensor(p) or not _from_softmax(p) or isinstance(fill, fx.Node) or fill != 0 or not 2 <= rank(v) <= rank(p):
        return None
    if rank(mask) and not same_size(shape(mask)[-1], 1) or not e.same_region(node, filled):
        return None
    if not same_shape(shape(p), shape(filled)):
        return None
    product = e.call(torch.matmul, p, v)
    return e.call(filled.target, *((mask, product) if keeps else (product, mask)), fill)


@rule(torch.matmul)
def values_of_pairs_of_heads(e: Editor, node: fx.Node) -> fx.Node | None:
    """(p[:, :, 0] - s * p[:, :, 1]) @ v of one softmax's p -> y[:, :, 0] - s * y[:, :, 1] of y = p @ v.unsqueeze(2).

    Differential attention whose two softmaxes are neighbouring heads of one.
    """
    total, v = node.args
    if not is_tensor(total) or total.target not in (operator.add, operator.sub) or len(total.users) != 1:
        return None
    heads = [_without_factors(a) for a in total.args]
    if any(h is None or h.target is not operator.getitem or len(h.users) != 1 for h in heads):
        return None
    p, dims = heads[0].args[0], rank(heads[0]) + 1
    found = [one_index(h) for h in heads]
    if any(h.args[0] is not p for h in heads) or set(p.users) != set(heads) or not is_tensor(p) or not _from_softmax(p):
        return None
    if any(not isinstance(i, int) or dim != found[0][0] for dim, i in found) or found[0][0] >= dims - 2 or rank(v) != dims - 1:
        return None
    if not e.same_region(node, total, *heads):
        return None
    shared = e.call(torch.unsqueeze, v, found[0][0])
    product = e.call(torch.matmul, p, e.call("expand", shared, *_sizes(e, p, range(dims - 2)), -1, -1))

    def of_output(x: fx.Node) -> fx.Node:
        if x in heads:
            return e.call(operator.getitem, product, x.args[1])
        return e.call(x.target, *(of_output(a) if _without_factors(a) in heads else a for a in x.args))

    return e.call(total.target, *map(of_output, total.args))


def _without_factors(node: Any) -> Any:
    """`node` without factors that are the same for all keys and that nobody else sees."""
    while is_tensor(node) and node.target in (operator.mul, operator.truediv) and len(node.users) == 1:
        x, factor = node.args
        if node.target is operator.mul and not (is_tensor(x) and same_shape(shape(x), shape(node))):
            x, factor = factor, x
        if not is_tensor(x) or (is_tensor(factor) and rank(factor) and not same_size(shape(factor)[-1], 1)):
            return None
        node = x
    return node if is_tensor(node) else None


@rule(torch.matmul)
def values_of_two_softmaxes(e: Editor, node: fx.Node) -> fx.Node | None:
    """(p - s * r) @ v of probabilities p and r -> p @ v - (s * r) @ v: differential attention is two attentions."""
    total, v = node.args
    if not is_tensor(total) or total.target not in (operator.add, operator.sub) or len(total.users) != 1:
        return None
    if not all(_is_weighted(p) and len(p.users) == 1 and same_shape(shape(p), shape(total)) for p in total.args):
        return None
    if not e.same_region(node, total):
        return None
    return e.call(total.target, *(e.call(torch.matmul, p, v) for p in total.args))


def _is_weighted(node: Any) -> bool:
    """Whether `node` is made of probabilities, times factors that nobody else sees, or not."""
    if not is_tensor(node) or _from_softmax(node):
        return is_tensor(node)
    is_product = node.target in (operator.mul, operator.truediv) and len(node.users) == 1
    return is_product and any(map(_is_weighted, node.args[: 1 if node.target is operator.truediv else 2]))


def _is_scores(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.matmul and is_float(node)


@rule(torch.masked_fill, torch.where)
def fill_to_bias(e: Editor, node: fx.Node) -> fx.Node | None:
    """A huge finite fill in a chain that also adds tensors which may be masks -> an addition.

    With one kind of mask a filled row is known (all entries equal). With a fill and an additive mask in one chain, what a
    row without any allowed key gives depends on both: then the fill is what it numerically is, x + c for absorbing c, and
    where it comes after the mask, a fill of the mask. (In such a row the scores then get a gradient that the fill would
    have stopped: the one known difference from eager.)
    """
    if node.target is torch.masked_fill:
        x, mask, fill = node.args
    else:
        mask, x, fill = node.args
    if (
        not isinstance(fill, (int, float))
        or not (-math.inf < fill <= _ABSORBING)
        or not is_float(x)
        or dtype(x) is torch.float16
    ):
        return None
    if not same_shape(shape(x), shape(node)):
        return None
    after = _toward_softmax(node)
    if after is None or not all(map(_keeps_sign, [node, *after], after)):
        return None
    before: list[fx.Node] = []
    terms: list[fx.Node] = []
    current: Any = x
    while isinstance(current, fx.Node) and current.target in _PER_SCORE and len(before) < _CHAIN:
        before.append(current)
        tensors = [a for a in current.args if is_float(a) and rank(a) >= 2]
        above = next((a for a in tensors if same_shape(shape(a), shape(current))), tensors[0] if tensors else None)
        if current.target in (operator.add, operator.sub):
            terms += [a for a in current.args if a is not above and is_float(a) and rank(a)]
        current = above
    if not isinstance(current, fx.Node) or current.target is not torch.matmul:
        return None
    over = any(n.target in (operator.add, operator.sub) and all(is_float(a) and rank(a) for a in n.args) for n in after)
    masks = [a for a in terms if not is_bounded(a)]
    if not over and not masks:
        return None
    masked = mask if node.target is torch.masked_fill else e.call(operator.invert, mask)
    if not masks and not any(n.target in (torch.masked_fill, torch.where) for n in before):
        return e.call(operator.add, x, e.call(operator.mul, e.call("to", masked, dtype(x)), fill))
    if len(masks) != 1 or x.target not in (operator.add, operator.sub) or masks[0] not in x.args:
        return None  # two additions of that size would be -inf
    if x.target is operator.sub and x.args[0] is masks[0]:
        return None  # mask - scores
    rest = x.args[1] if x.args[0] is masks[0] else x.args[0]
    bias = masks[0] if x.target is operator.add else e.call(operator.neg, masks[0])
    return e.call(operator.add, rest, e.call(torch.masked_fill, bias, masked, fill))


def _keeps_sign(x: fx.Node, step: fx.Node) -> bool:
    """Whether `step` of scores `x` leaves what is very low very low."""
    if step.target is operator.neg or (step.target is operator.sub and step.args[1] is x):
        return False
    if step.target not in (operator.mul, operator.truediv):
        return True
    other = step.args[1] if step.args[0] is x else step.args[0]
    return isinstance(other, (int, float)) and other > 0


@rule(operator.add, operator.sub)
def add_whole_numbers_as_floats(e: Editor, node: fx.Node) -> fx.Node | None:
    """scores + mask with a mask of integers -> scores + mask.to(dtype), which adding does by itself; True counts as one."""
    if not is_float(node) or not all(map(is_tensor, node.args)) or all(map(is_float, node.args)):
        return None
    return e.call(node.target, *(a if is_float(a) else e.call("to", a, dtype(node)) for a in node.args))


@rule(torch.matmul)
def sink_to_key(e: Editor, node: fx.Node) -> fx.Node | None:
    """softmax(cat([scores, sink]))[..., :-1] @ v -> softmax of one more key in front, whose value is zero.

    The sink joins as a bias of that key; the key itself is zero, so that its score is the sink alone.
    """
    p, v = node.args
    between, kept = _steps_above(p)
    if not is_tensor(kept) or kept.target is not operator.getitem or len(kept.users) != 1 or not is_tensor(kept.args[0]):
        return None
    before, softmax = _steps_above(kept.args[0])
    key, full = kept.args[1], slice(None, None, None)
    *lead, last = key if isinstance(key, tuple) else (None,)
    if last not in (slice(None, -1, None), slice(1, None, None)) or any(i is not Ellipsis and i != full for i in lead):
        return None
    if not lead or (Ellipsis not in lead and len(lead) != rank(kept) - 1):
        return None
    if not _is_softmax_over_keys(softmax):
        return None
    joined = softmax.args[0]
    if len(joined.users) != 1 or not e.same_region(node, *between, kept, *before, softmax, joined):
        return None
    scores, sink = _without_sink(joined, first=last.start == 1)
    return None if sink is None else _with_sink(e, scores, sink, [*between, *before], v)


def _steps_above(p: Any) -> tuple[list[fx.Node], Any]:
    """(steps on each probability that nobody else reads, last one first; what they start from)."""
    steps: list[fx.Node] = []
    while isinstance(p, fx.Node) and p.target in _PER_PROBABILITY and len(p.users) == 1:
        steps.append(p)
        p = p.args[0]
    return steps, p


def _is_softmax_over_keys(node: Any) -> bool:
    return is_tensor(node) and node.target is F.softmax and node.kwargs.get("dim") == -1 and len(node.users) == 1


def _without_sink(joined: fx.Node, first: bool) -> tuple[Any, Any]:
    """(scores, sink: a tensor or a number) of scores with a sink in front of them, or behind; (None, None) of others."""
    if joined.target is F.pad:
        found = Arguments(joined, "input", "pad", ("mode", "constant"), "value")
        number = 0.0 if found["value"] is None else found["value"]
        is_sink = tuple(found["pad"]) == ((1, 0) if first else (0, 1)) and found["mode"] == "constant"
        return (found["input"], float(number)) if is_sink and isinstance(number, (int, float)) else (None, None)
    parts, dim = joined_parts(joined)
    if len(parts) != 2 or dim != rank(joined) - 1:
        return None, None
    scores, sink = parts[:: -1 if first else 1]
    if not same_size(shape(sink)[-1], 1):
        return None, None
    while sink.target == "expand" and rank(sink.args[0]) == rank(sink):
        sink = sink.args[0]
    return scores, sink


@rule(operator.mul)
def gate_to_sink(e: Editor, node: fx.Node) -> fx.Node | None:
    """(softmax(s) @ v) * sigmoid(logsumexp(s) - sink) -> softmax of one more key in front, whose score is the sink.

    The same function, for e^s / sum(e^s) * sum(e^s) / (sum(e^s) + e^sink) = e^s / (sum(e^s) + e^sink). A row of -inf only
    would become zero in place of nan, so the scores have to be provably above it.
    """
    found = [without_casts(a) for a in node.args]
    product, gate = found if _is_scores(found[0]) else reversed(found)
    if not _is_scores(product) or len(product.users) != 1 or not is_tensor(gate):
        return None
    if gate.target in ("unsqueeze", torch.unsqueeze) and Arguments(gate, "input", "dim")["dim"] in (-1, rank(gate) - 1):
        gate = without_casts(gate.args[0])
    if not is_tensor(gate) or gate.target is not torch.sigmoid:
        return None
    logit = without_casts(gate.args[0])
    if not is_tensor(logit) or logit.target is not operator.sub or not all(map(is_tensor, logit.args)):
        return None
    total, sink = logit.args
    reduced = Arguments(total, "input", "dim", ("keepdim", False))
    if total.target not in ("logsumexp", torch.logsumexp) or len(total.users) != 1:
        return None
    scores = without_casts(reduced["input"])
    if _one_dim(reduced) not in (-1, rank(scores) - 1):
        return None
    p, v = product.args
    between, p = _steps_above(p)
    if not _is_softmax_over_keys(p):
        return None
    if without_casts(p.args[0]) is not scores or not e.same_region(node, product, *between, p, total, logit, gate):
        return None
    if not reduced["keepdim"]:
        sink = e.call(torch.unsqueeze, sink, -1)
    if rank(sink) != rank(scores) or not is_bounded(scores, math.inf):
        return None
    result = _with_sink(e, p.args[0], sink, between, v, read_twice=scores)
    return result if dtype(result) is dtype(node) else e.call("to", result, dtype(node))


def _with_sink(
    e: Editor, scores: Any, sink: fx.Node | float, between: list[fx.Node], v: fx.Node, read_twice: fx.Node | None = None
) -> fx.Node:
    """`between` (reversed) of softmax([sink, scores]), times [0, v]. read_twice: the scores if another reader will go."""
    number = sink if isinstance(sink, float) else e.constant(sink)
    if number == 0:
        bias = None  # the score of the zero key is zero as it is
    else:
        if not isinstance(sink, fx.Node):
            sink = e.call(torch.full, (1, 1), sink, dtype=dtype(scores), device=value(scores).device)
        bias = e.call(F.pad, sink, (0, e.size(v, -2)))
    result = e.call(F.softmax, _with_a_key(e, scores, bias, read_twice), dim=-1)
    for step in reversed(between):
        result = e.call(step.target, result, *step.args[1:], **step.kwargs)
    return e.call(torch.matmul, result, e.call(F.pad, v, (0, 0, 1, 0)))


def _with_a_key(e: Editor, scores: Any, bias: fx.Node | None, read_twice: fx.Node | None = None) -> fx.Node:
    """Scores with a column of zeros in front, made by a zero key, and `bias` added where masks begin.

    The masks let the new key be, and what is added before a fill does not make fully masked rows depend on both.
    Raises: Unknown for scores that are no simple chain.
    """
    if not isinstance(scores, fx.Node) or len(scores.users) > 1 + (scores is read_twice) or not e.same_region(e.at, scores):
        raise Unknown
    if scores.target in (operator.add, operator.sub, torch.masked_fill, torch.where):
        keeps = scores.target is torch.where  # a mask of what stays; in the others, of what is added or filled
        behind = keeps or (scores.target is operator.add and not _of_product(scores.args[0]))
        mask, x = scores.args[:2] if behind else scores.args[1::-1]
        if not is_tensor(x) or not is_tensor(mask) or not same_shape(shape(x), shape(scores)):
            raise Unknown
        if not rank(mask) or not same_size(shape(mask)[-1], shape(scores)[-1]):
            raise Unknown
        padded = _with_a_key(e, x, bias, read_twice), e.call(F.pad, mask, (1, 0), value=1.0 if keeps else None)
        return e.call(scores.target, *(padded[::-1] if behind else padded), *scores.args[2:])
    if scores.target is torch.matmul:
        result = e.call(torch.matmul, scores.args[0], e.call(F.pad, scores.args[1], (1, 0)))
    elif scores.target in ("to", operator.mul, operator.truediv):
        x, *number = scores.args[::-1] if scores.target is operator.mul and not is_tensor(scores.args[0]) else scores.args
        if any(map(is_tensor, number)):
            raise Unknown
        result = e.call(scores.target, _with_a_key(e, x, None, read_twice), *number)
    else:
        raise Unknown
    return result if bias is None else e.call(operator.add, result, bias)
