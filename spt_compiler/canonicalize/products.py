"""Products: matmul of activations, F.linear for weights."""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..graph import (
    Arguments,
    dtype,
    is_buffer,
    is_float,
    is_one_element,
    is_parameter,
    is_tensor,
    rank,
    same_size,
    shape,
)
from .editor import Editor, rule

# What may stand between a Parameter and its use as a weight. getitem: rows of a fused projection.
_WEIGHT_LAYOUT = {torch.t, torch.permute, torch.reshape, operator.getitem, "to", "contiguous"}

def is_weight(node: Any) -> bool:
    """Whether `node` is a Parameter, seen through layout ops and casts only."""
    while isinstance(node, fx.Node) and not is_parameter(node):
        if node.target not in _WEIGHT_LAYOUT or not node.args:
            return False
        node = node.args[0]
    return isinstance(node, fx.Node)


@rule("matmul", "bmm", "mm", "__matmul__", torch.bmm, torch.mm, operator.matmul, torch.matmul)
def spell_matmul(e: Editor, node: fx.Node) -> fx.Node | None:
    """@, bmm, mm -> torch.matmul; with a 2-d weight on the right, or before a vector -> F.linear."""
    found = Arguments(node, "input", "other" if node.target in ("matmul", torch.matmul, "__matmul__") else "mat2")
    a, b = list(found.values.values())
    if not found.valid or not is_tensor(a) or not is_tensor(b):
        return None
    if rank(a) > 1 and rank(b) == 2 and is_weight(b) and not is_weight(a):
        return e.call(F.linear, a, _transposed(e, b))
    if rank(b) == 1 and rank(a) == 2 and is_weight(a) and not is_weight(b):
        return e.call(F.linear, b, a)
    return e.retarget(node, torch.matmul, (a, b))


def _transposed(e: Editor, weight: fx.Node) -> fx.Node:
    return weight.args[0] if weight.target is torch.t else e.call(torch.t, weight)


@rule("addmm", torch.addmm)
def addmm_to_linear(e: Editor, node: fx.Node) -> fx.Node | None:
    """addmm(b, x, w) with a weight stored (in, out) -> F.linear(x, w.t(), b); of activations -> b + x @ y."""
    found = Arguments(node, "input", "mat1", "mat2", ("beta", 1), ("alpha", 1))
    b, x, w, beta, alpha = found.take("input", "mat1", "mat2", "beta", "alpha")
    if not found.valid:
        return None
    if is_weight(w) and beta == 1 and alpha == 1 and rank(b) == 1 and same_size(shape(b)[0], shape(w)[1]):
        return e.call(F.linear, x, _transposed(e, w), b)
    return _product_plus(e, x, w, b, beta, alpha)


@rule("baddbmm", torch.baddbmm)
def baddbmm_to_matmul(e: Editor, node: fx.Node) -> fx.Node | None:
    """baddbmm(bias, q, k, beta, alpha) -> matmul(q, k) * alpha + bias * beta; beta = 0 ignores the bias."""
    found = Arguments(node, "input", "batch1", "batch2", ("beta", 1), ("alpha", 1))
    b, x, y, beta, alpha = found.take("input", "batch1", "batch2", "beta", "alpha")
    return _product_plus(e, x, y, b, beta, alpha) if found.valid else None


def _product_plus(e: Editor, x: fx.Node, y: fx.Node, b: fx.Node, beta: Any, alpha: Any) -> fx.Node | None:
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
        return None
    product = e.call(torch.matmul, x, y)
    if alpha != 1:
        product = e.call(operator.mul, product, alpha)
    if beta == 0:
        return product
    return e.call(operator.add, product, b if beta == 1 else e.call(operator.mul, b, beta))


@rule("inner", torch.inner)
def inner_to_tensordot(e: Editor, node: fx.Node) -> fx.Node | None:
    """inner(x, y) of matrices and more -> tensordot over the last dims."""
    found = Arguments(node, "input", "other")
    x, y = found.take("input", "other")
    return e.call(torch.tensordot, x, y, dims=((-1,), (-1,))) if found.valid and min(rank(x), rank(y)) > 1 else None


@rule(torch.tensordot)
def tensordot_to_einsum(e: Editor, node: fx.Node) -> fx.Node | None:
    """tensordot(x, y, dims) -> einsum."""
    found = Arguments(node, "a", "b", ("dims", 2))
    x, y, dims = found.take("a", "b", "dims")
    if isinstance(dims, int):
        dims = (range(rank(x) - dims, rank(x)), range(dims))
    if not found.valid or not isinstance(dims, (tuple, list)) or any(isinstance(d, int) for d in dims):
        return None
    a, b = list(string.ascii_letters[: rank(x)]), list(string.ascii_letters[rank(x) : rank(x) + rank(y)])
    for i, j in zip(*dims, strict=True):
        b[j] = a[i]
    result = [c for c in (*a, *b) if (c in a) is not (c in b)]
    return e.call(torch.einsum, f"{''.join(a)},{''.join(b)}->{''.join(result)}", x, y)


@rule("sum", torch.sum)
def sum_of_products(e: Editor, node: fx.Node) -> fx.Node | None:
    """(x[..., :, None, :] * y[..., None, :, :]).sum(-1) -> x @ y.mT, and (x[..., None] * y[..., None, :, :]).sum(-2) -> x @ y."""
    found = Arguments(node, "input", "dim", ("keepdim", False))
    pairs, dim, keepdim = found.take("input", "dim", "keepdim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not found.valid or keepdim or not isinstance(dim, int) or not is_tensor(pairs) or pairs.target is not operator.mul:
        return None
    dims = rank(pairs)
    if dims < 3 or (dim := dim % dims) < dims - 2 or len(pairs.users) != 1 or not is_float(node) or not e.same_region(node, pairs):
        return None
    if any(rank(a) != dims or not is_float(a) or same_size(shape(a)[dim], 1) for a in pairs.args):
        return None
    first, last = dims - 3, 2 * dims - 3 - dim
    for x, y in (pairs.args, pairs.args[::-1]):
        if same_size(shape(x)[last], 1) and same_size(shape(y)[first], 1) and not same_size(shape(x)[first], 1):
            x, y = e.call(torch.squeeze, x, last), e.call(torch.squeeze, y, first)
            order = [*range(dims - 3), *((dims - 2, dims - 3) if dim == dims - 1 else (dims - 3, dims - 2))]
            return e.call(torch.matmul, x, permuted(e, y, order))
    return None


@rule(torch.einsum)
def einsum_to_matmul(e: Editor, node: fx.Node) -> fx.Node | None:
    """einsum of two operands -> permute and matmul, with a weight -> F.linear; of one operand without sums -> permute.

    Indices that are summed together become one.
    """
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or node.kwargs or not all(map(is_tensor, operands)):
        return None
    parsed = _parse_einsum(equation, [rank(o) for o in operands])
    if parsed is None:
        return None
    terms, result = parsed
    if len(terms) == 1:
        if sorted(terms[0]) != sorted(result):
            return None
        return permuted(e, operands[0], [terms[0].index(c) for c in result])
    if len(terms) != 2 or len(result) < 2:
        return None
    (a, b), (left, right) = terms, operands
    summed = [c for c in a if c in b and c not in result]
    if not summed or any(c not in result for c in set(a) ^ set(b)):
        return None
    if not all(same_size(shape(left)[a.index(c)], shape(right)[b.index(c)]) for c in summed):
        return None  # a size of one that einsum broadcasts
    if is_weight(left) is not is_weight(right):
        x, w = ((right, b), (left, a)) if is_weight(left) else ((left, a), (right, b))
        # Features come last, or else the weight may be learned queries.
        if set(a) & set(b) == set(summed) < set(x[1]) and result[-1] not in x[1]:
            return _einsum_to_linear(e, *x, *w, summed, result)
    # The operand that owns the second last index goes to the left: usually the product needs no permutation then.
    if result[-1] in a and result[-1] not in b:
        a, b, left, right = b, a, right, left
    rows = next((c for c in reversed(result) if c in a and c not in b), None)
    columns = next((c for c in reversed(result) if c in b and c not in a), None)
    if columns is None:
        return None
    if rows is None:  # vectors times matrices
        x = e.call(torch.unsqueeze, left, 0)
        one = next(c for c in string.ascii_letters if c not in a + b)
        terms_of_one = f"{one}{a},{b}->{result[:-1]}{one}{result[-1]}"
        product = e.call(torch.einsum, terms_of_one, x, right)
        return e.call(torch.squeeze, product, -2) if result[-1] == columns else None
    # Keys of several dims (rows and columns of an image) become one where the result ends in them.
    if not is_weight(left):
        columns = result[len(result.rstrip("".join(c for c in b if c not in a))) :] or columns
    lead = [c for c in result if c not in (rows, *columns)]
    x = _joined(e, _aligned(e, left, a, [*lead, rows, *summed]), -len(summed), len(summed))
    y = _joined(e, _aligned(e, right, b, [*lead, *summed, *columns]), -len(columns), len(columns))
    y = _joined(e, y, -len(summed) - 1, len(summed))
    product = e.call(torch.matmul, x, y)
    if len(columns) > 1:
        found = [(left, a) if c in a else (right, b) for c in (*lead, rows, *columns)]
        sizes = [e.size(n, term.index(c)) for (n, term), c in zip(found, (*lead, rows, *columns), strict=True)]
        product = e.call(torch.reshape, product, tuple(sizes))
    order = [*lead, rows, *columns]
    return permuted(e, product, [order.index(c) for c in result])


@rule(operator.mul, operator.truediv)
def number_before_split_keys(e: Editor, node: fx.Node) -> fx.Node | None:
    """(q @ k).view(B, T, H, W) * c -> (q @ k * c).view(B, T, H, W), for keys of several dims."""
    x, factor = node.args
    if not is_tensor(x) or x.target is not torch.reshape or not isinstance(factor, (int, float)) or len(x.users) != 1:
        return None
    product = x.args[0]
    splits_keys = product.target in (torch.matmul, node.target) and not same_size(shape(product)[-1], shape(x)[-1])
    if not splits_keys or not e.same_region(node, x):
        return None
    return e.call(torch.reshape, e.call(node.target, product, factor), x.args[1])


def _einsum_to_linear(
    e: Editor, left: fx.Node, a: str, weight: fx.Node, b: str, summed: list[str], result: str
) -> fx.Node:
    """einsum("btc,hcd->bthd", x, w) -> F.linear with a weight of [h * d, c], and the layout around it."""
    own, features = ([c for c in term if c not in summed] for term in (a, b))
    x = _joined(e, permuted(e, left, [a.index(c) for c in (*own, *summed)]), -len(summed), len(summed))
    w = _joined(e, permuted(e, weight, [b.index(c) for c in (*features, *summed)]), -len(summed), len(summed))
    y = e.call(F.linear, x, _joined(e, w, 0, len(features)))
    if len(features) > 1:
        sizes = (*(e.size(left, a.index(c)) for c in own), *(e.size(weight, b.index(c)) for c in features))
        y = e.call(torch.reshape, y, sizes)
    order = [*own, *features]
    return permuted(e, y, [order.index(c) for c in result])


def _joined(e: Editor, x: fx.Node, start: int, count: int) -> fx.Node:
    """`x` with `count` dims from `start` on as one."""
    if count == 1:
        return x
    start %= rank(x)
    together = shape(x)[start : start + count]
    size = math.prod(together) if all(isinstance(s, int) for s in together) else -1
    before, after = (range(start), range(start + count, rank(x)))
    return e.call(torch.reshape, x, (*(e.size(x, i) for i in before), size, *(e.size(x, i) for i in after)))


def _parse_einsum(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """(indices of each operand, indices of the result), with "..." spelled out; None for what is not plain."""
    text = equation.replace(" ", "")
    left, arrow, result = text.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(ranks):
        return None
    spare = [c for c in string.ascii_uppercase if c not in text]
    dots = {r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True) if "..." in t}
    if len(dots) > 1 or any(d < 0 for d in dots):
        return None
    filler = "".join(spare[: dots.pop()]) if dots else ""
    terms, result = [t.replace("...", filler) for t in terms], result.replace("...", filler)
    if any(len(t) != r or len(set(t)) != r for t, r in zip(terms, ranks, strict=True)) or len(set(result)) != len(
        result
    ):
        return None
    return terms, result


def permuted(e: Editor, x: fx.Node, order: Sequence[int]) -> fx.Node:
    if list(order) == list(range(len(order))):
        return x
    return e.call(torch.t, x) if list(order) == [1, 0] else e.call(torch.permute, x, tuple(order))


def swapped(dims: int) -> tuple[int, ...]:
    """The order that transposes the last two dims."""
    return (*range(dims - 2), dims - 1, dims - 2)


def widened(e: Editor, x: fx.Node, dims: int) -> fx.Node:
    """`x` with dims of size one in front, as broadcasting adds them."""
    while rank(x) < dims:
        x = e.call(torch.unsqueeze, x, 0)
    return x


def _aligned(e: Editor, x: fx.Node, indices: str, wanted: list[str]) -> fx.Node:
    """`x` permuted to the wanted indices, with a dim of size one for each that it lacks between them (broadcasting adds
    those in front)."""
    x = permuted(e, x, [indices.index(c) for c in wanted if c in indices])
    while wanted[0] not in indices:
        wanted = wanted[1:]
    for position, c in enumerate(wanted):
        if c not in indices:
            x = e.call(torch.unsqueeze, x, position)
    return x


@rule(F.linear)
def spell_linear(e: Editor, node: fx.Node) -> fx.Node | None:
    """F.linear(input=x, weight=w) -> F.linear(x, w); the bias only where there is one."""
    found = Arguments(node, "input", "weight", "bias")
    x, w, b = found.take("input", "weight", "bias")
    return e.retarget(node, F.linear, (x, w) if b is None else (x, w, b)) if found.valid else None


@rule(F.linear)
def linear_of_reshape(e: Editor, node: fx.Node) -> fx.Node | None:
    """linear(x.view(-1, d)).view(...) -> linear(x).view(...): a linear layer does not care about leading dims."""
    x = node.args[0]
    if x.target is not torch.reshape or not rank(x.args[0]) or not e.same_region(node, x):
        return None
    if not node.users or any(u.target not in (torch.reshape, "view", "reshape") for u in node.users):
        return None
    source, target = x.args[0], x.args[1]
    if not same_size(shape(source)[-1], shape(x)[-1]) or rank(source) < 2:
        return None
    width = shape(node)[-1]
    if not isinstance(width, int):
        return None
    return e.call(torch.reshape, e.call(F.linear, source, *node.args[1:]), (*target[:-1], width))


@rule(operator.add)
def bias_into_linear(e: Editor, node: fx.Node) -> fx.Node | None:
    """linear(x, w) + b with a 1-d parameter b -> linear(x, w, b)."""
    for product, bias in (node.args, node.args[::-1]):
        if not isinstance(product, fx.Node) or product.target is not F.linear or len(product.args) != 2:
            continue
        if len(product.users) != 1 or rank(bias) != 1 or not is_weight(bias) or not e.same_region(node, product):
            continue
        if dtype(bias) is dtype(product) and same_size(shape(bias)[0], shape(product)[-1]):
            return e.call(F.linear, *product.args, bias)
    return None


@rule(operator.mul)
def factor_of_branch_to_weight(e: Editor, node: fx.Node) -> fx.Node | None:
    """s * linear(linear(x, a), b) -> linear(linear(x, a), s * b) for one number s that the model holds or learns, where a narrows
    and b widens again: the low-rank branch of a layer."""
    for product, factor in (node.args, node.args[::-1]):
        if not is_tensor(product) or product.target is not F.linear or len(product.args) != 2 or len(product.users) != 1:
            continue
        if not is_one_element(factor) or not is_float(factor) or not (is_weight(factor) or is_buffer(factor)):
            continue
        inner, b = product.args
        while is_tensor(inner) and inner.target in (F.dropout, "to"):
            inner = inner.args[0]
        if inner.target is not F.linear or not e.same_region(node, product, inner) or dtype(b) is not dtype(node):
            continue
        wide, thin, narrow = shape(product)[-1], shape(b)[-1], shape(inner.args[0])[-1]
        if all(isinstance(s, int) for s in (wide, thin, narrow)) and thin < min(wide, narrow):
            return e.call(F.linear, product.args[0], e.call(operator.mul, b, factor))
    return None
