"""Operators of sparse attention: schema, fake, autograd, autocast. Their meaning is `ops/reference.py`.

`spt::select_tiles_v1` and `spt::select_keys_v1` choose keys, `spt::tile_attention_v1` and `spt::key_attention_v1` attend to the
chosen ones, `spt::stats_attention_v1` samples what learning and calibration need. Lowerings register faster kernels per device
over the reference bodies (`lowering/registry.py`).

Common arguments
    q [B, H, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv], H a multiple of Hkv; fp16, bf16, fp32 or fp64; any strides.
    bias: None, bool (True = allowed) or float (added to the logits, -inf = not allowed); 4-d, broadcastable to [B, H, Tq, Tk].
    expr, expr_in: a mask in the language of `expression.py` over b, h, q, k and the tensors t0, t1, ... of expr_in, in force
        together with bias; "" for none. "k <= q" is the causal mask (top-left aligned).
    logits = softcap(scale * q . k) + bias + expr, where softcap(x) = c * tanh(x / c), or x for None.
    empty: what a row with nothing allowed (over all keys) returns: "zero", "nan" or "uniform" (the mean of all values). A row
        that may see keys, but none of the listed ones, returns zero.
Softmax and accumulation in fp32 (fp64 for fp64 input); outputs have the dtype of q. The result of attention is laid out as
[B, Tq, H, Dv] (`reference.attention_output`), everything else is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spt_compiler.ops import reference, tracing
from spt_compiler.ops.selection.common import stored_keys, stored_tiles

_SELECT = "Tensor q, Tensor k, Tensor? bias, str expr, Tensor[] expr_in, Tensor? codebook, Tensor? key_mean, Tensor budget"
_MASKED = "str expr, Tensor[] expr_in, Tensor? seed, float p, float scale, float? softcap, str empty"


def _lse_dtype(q: Tensor) -> torch.dtype:
    return reference.compute_dtype(q)


# ---------------------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "spt::select_tiles_v1",
    mutates_args=(),
    schema=f"({_SELECT}, float max_density, int tile_q, int tile_k, float scale, float? softcap, str rule, int min_keys)"
    " -> (Tensor, Tensor)",
)
def select_tiles(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    expr: str,
    expr_in: list[Tensor],
    codebook: Tensor | None,
    key_mean: Tensor | None,
    budget: Tensor,
    max_density: float,
    tile_q: int,
    tile_k: int,
    scale: float,
    softcap: float | None,
    rule: str,
    min_keys: int,
):
    """Choose the key tiles that each query tile attends to, by the mean field of their (quantised) keys.

    For query q and key tile j: w = softmax of bias + expr over the tile's allowed keys, z = softcap(scale * q . sum w khat) +
    logsumexp(bias + expr), a = softmax of z over the visible tiles; S[i, j] sums a over the queries of tile i and the heads of
    the group. Kept: forced tiles, then near ones, then the largest S, ties to the lower index. Forced: the row's first visible
    tile, and, where "k <= q" is a conjunct of expr and Tq == Tk, the visible tiles that hold a position of the query tile. Near,
    under the same condition: the `selection.common.near_tiles` before the latter, at most half of what is not forced.

    Args:
        q, k, bias, expr, expr_in, softcap: see the module. q and k may differ in dtype.
        codebook: [Hkv, P, C, D/P] of centred keys.  key_mean: [Hkv, D].  None for rule "mean", which reads none, and where there
            is none yet: rule "pq" then scores the keys as they are.
        budget: [1] fp32, a density read as data; K = max(1, ceil(min(budget, max_density) * Tk / tile_k)) tiles are kept, more
            only where more are forced. Negative: everything (count -1).
        max_density: bounds the storage, k_max = min(nK, max(ceil(max_density * Tk / tile_k), ceil(tile_q / tile_k) + 2)).
        tile_q, tile_k: sizes of query and key tiles; the last ones may be short.
        rule: "pq" or "mean".  min_keys: with Tk below it everything is kept (count -1).
    Returns: tiles [B, Hkv, nQ, k_max] int32, ascending, -1 where unused; counts [B, Hkv, nQ] int32, -1 for all tiles. nQ and
        k_max are at least 2 (`selection.common.stored`); a row without queries has -1 and count 0.
    Raises: ValueError on shapes that do not fit, an unknown rule, a missing codebook.
    No gradient. Deterministic. Source: KERNELS 2.1; SPT (arXiv 2312.10365) selects single keys by equal codes.
    """
    return reference.select_tiles(
        q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, tile_q, tile_k, scale, softcap, rule, min_keys
    )


@select_tiles.register_fake
def _(q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, tile_q, tile_k, scale, softcap, rule, min_keys):
    tracing.announce(
        *("select_tiles_v1", q, k, bias, expr, expr_in, codebook, key_mean),
        *(budget, max_density, tile_q, tile_k, scale, softcap, rule, min_keys),
    )
    n_rows, slots = stored_tiles(q.shape[2], k.shape[2], max_density, tile_q, tile_k)
    rows = (q.shape[0], k.shape[1], n_rows)
    return q.new_empty((*rows, slots), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)


@torch.library.custom_op(
    "spt::select_keys_v1",
    mutates_args=(),
    schema=f"({_SELECT}, float max_density, float scale, float? softcap, str rule, int min_keys) -> (Tensor, Tensor)",
)
def select_keys(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    expr: str,
    expr_in: list[Tensor],
    codebook: Tensor | None,
    key_mean: Tensor | None,
    budget: Tensor,
    max_density: float,
    scale: float,
    softcap: float | None,
    rule: str,
    min_keys: int,
):
    """Choose the keys that each query attends to.

    Args: as for `select_tiles`, with L = max(1, ceil(min(budget, max_density) * Tk)) keys per query, all allowed ones where
        fewer are allowed.  rule: "pq" (score scale * q . khat + bias, ties to the lower index) or "pq-match" (number of equal
        codes of q and k + bias; ties to the key nearest to position q + Tk - Tq, then to the lower index).
    Returns: keys [B, H, Tq, L_max] int32, ascending, -1 where unused, L_max = ceil(max_density * Tk) within [1, Tk],
        but stored as at least 2 (`selection.common.stored`); counts [B, H, Tq] int32, -1 for all keys.
    Raises: ValueError on shapes that do not fit, an unknown rule, a missing codebook.
    No gradient. Deterministic; the choice of a query depends on its own allowed keys alone.
    Source: SPT (arXiv 2312.10365), PQ lookup; differs from it by an exact top-L and the tie rule.
    """
    return reference.select_keys(
        q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, scale, softcap, rule, min_keys
    )


@select_keys.register_fake
def _(q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, scale, softcap, rule, min_keys):
    rows = q.shape[:3]
    return (
        q.new_empty((*rows, stored_keys(k.shape[2], max_density)), dtype=torch.int32),
        q.new_empty(rows, dtype=torch.int32),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "spt::tile_attention_v1",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor tiles, Tensor counts, {_MASKED}, int tile_q, int tile_k, "
    "bool compensate=False) -> (Tensor, Tensor)",
)
def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    tiles: Tensor,
    counts: Tensor,
    expr: str,
    expr_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
    empty: str,
    tile_q: int,
    tile_k: int,
    compensate: bool = False,
):
    """Attention over the key tiles listed for each query tile.

    Args:
        q, k, v, bias, expr, expr_in, scale, softcap, empty: see the module; q, k and v of one dtype.
        tiles, counts: from `select_tiles`; count -1 means all tiles.
        seed: [1] int64 and p: probabilities are dropped with probability p by `reference.attention_dropout`.
        compensate: for each query, one pseudo-key stands for every tile that its list leaves out and of which it may see all
            keys: the mean of the tile's keys with the mean of its values, its logit softcap(scale * q . mean) +
            logsumexp(bias + expr) over the tile (so log tile_k without those). Dropout drops it with the tile's first key.
    Returns: out [B, H, Tq, Dv]; lse [B, H, Tq] fp32 (fp64 for fp64 input), log-sum-exp of the kept allowed logits (and of
        the pseudo-keys) before dropout, -inf where there is none, not differentiable.
    Raises: ValueError on shapes, dtypes or options that do not fit. Differentiable once in q, k, v and a float bias.
    Source: SPT (arXiv 2312.10365), sparse MHA; differs from it by tiles of keys shared by tiles of queries, and no clamp.
    """
    return reference.tile_attention(
        q, k, v, bias, tiles, counts, expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k, compensate
    )


@tile_attention.register_fake
def _(
    q, k, v, bias, tiles, counts, expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k, compensate=False
):
    tracing.announce(
        *("tile_attention_v1", q, k, v, bias, tiles, counts, expr, expr_in),
        *(seed, p, scale, softcap, empty, tile_q, tile_k, compensate),
    )
    return _attention_outputs(q, v)


def _attention_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return reference.attention_output(q, v), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.custom_op(
    "spt::tile_attention_backward_v1",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, Tensor tiles, Tensor counts, "
    f"{_MASKED}, int tile_q, int tile_k, bool[] needs, bool compensate=False) -> Tensor[]",
)
def tile_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    counts: Tensor,
    expr: str,
    expr_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
    empty: str,
    tile_q: int,
    tile_k: int,
    needs: list[bool],
    compensate: bool = False,
):
    """Gradients of `tile_attention`.

    Args: grad_out: [B, H, Tq, Dv], any strides.  out, lse: the forward's.  needs: whether q, k, v and bias need a gradient.
        The rest: as in the forward.
    Returns: [dq, dk, dv, dbias], contiguous and like their inputs; an empty [0] tensor where not needed.
    """
    return reference.tile_attention_backward(
        *(grad_out, q, k, v, bias, out, lse, tiles, counts, expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k),
        *(needs, compensate),
    )


@tile_attention_backward.register_fake
def _(
    grad_out,
    q,
    k,
    v,
    bias,
    out,
    lse,
    tiles,
    counts,
    expr,
    expr_in,
    seed,
    p,
    scale,
    softcap,
    empty,
    tile_q,
    tile_k,
    needs,
    compensate=False,
):
    return _gradients(q, k, v, bias, needs)


def _gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, needs: list[bool]) -> list[Tensor]:
    inputs = (q, k, v, bias if bias is not None and bias.is_floating_point() else None)
    return [
        x.new_empty(x.shape) if need and x is not None else q.new_empty((0,)) for x, need in zip(inputs, needs, strict=True)
    ]


@torch.library.custom_op(
    "spt::key_attention_v1",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor keys, Tensor counts, {_MASKED}) -> (Tensor, Tensor)",
)
def key_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    counts: Tensor,
    expr: str,
    expr_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
    empty: str,
):
    """Attention over the keys listed for each query.

    Args: as for `tile_attention`; keys [B, H, Tq, L_max] and counts [B, H, Tq] int32 from `select_keys`, count -1: all keys.
    Returns: out [B, H, Tq, Dv]; lse [B, H, Tq], as for `tile_attention`.
    Raises: ValueError on shapes, dtypes or options that do not fit. Differentiable once in q, k, v and a float bias.
    Source: SPT (arXiv 2312.10365), sparse MHA; differs from it by no clamp, no padding with key 0, any mask.
    """
    return reference.key_attention(q, k, v, bias, keys, counts, expr, expr_in, seed, p, scale, softcap, empty)


@key_attention.register_fake
def _(q, k, v, bias, keys, counts, expr, expr_in, seed, p, scale, softcap, empty):
    return _attention_outputs(q, v)


@torch.library.custom_op(
    "spt::key_attention_backward_v1",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, Tensor keys, Tensor counts, "
    f"{_MASKED}, bool[] needs) -> Tensor[]",
)
def key_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    counts: Tensor,
    expr: str,
    expr_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float | None,
    empty: str,
    needs: list[bool],
):
    """Gradients of `key_attention`. Arguments and results as for `tile_attention_backward`."""
    return reference.key_attention_backward(
        grad_out, q, k, v, bias, out, lse, keys, counts, expr, expr_in, seed, p, scale, softcap, empty, needs
    )


@key_attention_backward.register_fake
def _(grad_out, q, k, v, bias, out, lse, keys, counts, expr, expr_in, seed, p, scale, softcap, empty, needs):
    return _gradients(q, k, v, bias, needs)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "spt::stats_attention_v1",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? bias, str expr, Tensor[] expr_in, Tensor out, Tensor lse, float scale, "
    "float? softcap, int rows, Tensor probe) -> (Tensor, Tensor, Tensor)",
)
def stats_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expr: str,
    expr_in: list[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    rows: int,
    probe: Tensor,
):
    """Small samples for learning and calibration; deterministic, evenly spaced, without gradient.

    Args:
        q, k, v, bias, expr, expr_in, scale, softcap: of the attention op.  out, lse: its results.
        rows: vectors to sample per key head.  probe: int32 [2], (collect?, measure?); what is not asked for is zero, and
            costs nothing on the CPU.
    Returns:
        query_rows, key_rows: [Hkv, rows, D] fp32, over batch, heads of the group and tokens, repeated where there are fewer.
        quality: [4] fp32, sums over at most 32 query positions with all their heads (rows that see nothing or are not finite
            are left out): kept attention mass exp(lse - exact lse), ||out - dense||^2, ||dense||^2, and the number of rows.
    Under dropout `out` carries the noise of its mask, so ||out - dense||^2 bounds the error from above only in expectation; the
    mass, which comes from lse, is unaffected: judge such a run by the mass. Where pseudo-keys stand for dropped tiles, lse counts
    them: judge such a run by the error.
    """
    return reference.stats_attention(q, k, v, bias, expr, expr_in, out, lse, scale, softcap, rows, probe)


@stats_attention.register_fake
def _(q, k, v, bias, expr, expr_in, out, lse, scale, softcap, rows, probe):
    sample = (k.shape[1], rows, q.shape[3])
    return (
        q.new_empty(sample, dtype=torch.float32),
        k.new_empty(sample, dtype=torch.float32),
        q.new_empty((4,), dtype=torch.float32),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------

_DIFFERENTIABLE = ("q", "k", "v", "bias")  # the first four arguments of the attention ops


def _setup_attention(ctx, inputs, output) -> None:
    q, k, v, bias, index, counts, expr, expr_in, seed, *numbers = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, out, lse, index, counts, seed, *expr_in)
    ctx.expr, ctx.numbers = expr, numbers


def _attention_backward(op):
    def backward(ctx, grad_out, grad_lse):
        # As many as the op was called with: the dispatcher leaves out trailing arguments that equal their default.
        grads: list = [None] * len(ctx.needs_input_grad)
        q, k, v, bias, out, lse, index, counts, seed, *expr_in = ctx.saved_tensors
        grads[7] = [None] * len(expr_in)
        needs = list(ctx.needs_input_grad[:4])
        if grad_out is not None and any(needs):
            # p, scale, softcap, empty, tile_q, tile_k; what follows has a default, and stands last in the backward too.
            numbers, options = ctx.numbers[:6], ctx.numbers[6:]
            found = op(
                *(grad_out, q, k, v, bias, out, lse, index, counts, ctx.expr, expr_in, seed), *numbers, needs, *options
            )
            grads[:4] = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return tuple(grads)

    return backward


def _no_gradient(ctx, *grads):
    raise AssertionError("a selection or statistics op was asked for a gradient; its outputs are not differentiable")


def _setup_no_gradient(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "sparse attention has no second derivative: expected a single backward, got a backward through it; "
        "run the step inside spt_compiler.dense() (gradient penalties, Hessian-vector products)"
    )


tile_attention.register_autograd(
    _attention_backward(torch.ops.spt.tile_attention_backward_v1.default), setup_context=_setup_attention
)
key_attention.register_autograd(
    _attention_backward(torch.ops.spt.key_attention_backward_v1.default), setup_context=_setup_attention
)
for _op in (select_tiles, select_keys, stats_attention):
    _op.register_autograd(_no_gradient, setup_context=_setup_no_gradient)
for _op in (tile_attention_backward, key_attention_backward):
    _op.register_autograd(_no_double_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast
# ---------------------------------------------------------------------------------------------------------------------

# torch.library.register_autocast wants one fixed dtype; the ops replaced follow the dtype of the region. So this registers the
# rule directly: q, k, v and a float bias are cast as torch casts the arguments of scaled_dot_product_attention. The other ops
# cast nothing, but must not let the region reach the arithmetic inside them, which is fp32.
_AUTOCAST = torch.library.Library("spt", "FRAGMENT")


def _register_autocast(name: str, device_type: str, n_cast: int) -> None:
    """Casts the first `n_cast` arguments of an op, and keeps autocast out of its body."""
    key = "Autocast" + torch._C._dispatch_key_for_device(device_type)
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    op = getattr(torch.ops.spt, name).default

    def kernel(_keyset, *args):
        dtype = torch.get_autocast_dtype(device_type)

        def cast(x: Tensor | None) -> Tensor | None:
            eligible = x is not None and x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device_type
            return x.to(dtype) if eligible else x

        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*(cast(x) for x in args[:n_cast]), *args[n_cast:])

    _AUTOCAST.impl(name, kernel, key, with_keyset=True)


_N_CAST = {
    "tile_attention_v1": 4,
    "key_attention_v1": 4,
    "tile_attention_backward_v1": 0,
    "key_attention_backward_v1": 0,
    "select_tiles_v1": 0,
    "select_keys_v1": 0,
    "stats_attention_v1": 0,
}
for _name, _n_cast in _N_CAST.items():
    for _device_type in ("cpu", "cuda"):
        _register_autocast(_name, _device_type, _n_cast)
