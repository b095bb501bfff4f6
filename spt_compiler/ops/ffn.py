"""Operators of the routed FFN: schema, fake, autograd, autocast. Their meaning is `ops/reference_ffn.py`.

`spt::route_v1` chooses blocks, `spt::routed_ffn_v1` computes them, `spt::stats_ffn_v1` samples tokens for learning.
Lowerings register faster kernels per device over the reference bodies (`lowering/registry.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spt_compiler.ops import reference_ffn, tracing
from spt_compiler.ops.reference_ffn import gradient_names, kept_blocks, row_capacity

_TENSORS = (
    "Tensor x, Tensor[] w_in, Tensor[] b_in, Tensor w_out, Tensor? b_out, Tensor[] lora_a_out, Tensor[] lora_b, "
    "Tensor? lora_down, Tensor? gates, Tensor blocks, Tensor rows, Tensor offsets, Tensor permutation"
)


@torch.library.custom_op(
    "spt::route_v1",
    mutates_args=(),
    schema="(Tensor scores, Tensor always_on, Tensor budget, float max_density, int tile, int min_tokens)"
    " -> (Tensor, Tensor, Tensor)",
)
def route(scores: Tensor, always_on: Tensor, budget: Tensor, max_density: float, tile: int, min_tokens: int):
    """Choose R blocks for each token and group the tokens by block, with static storage and without dropping any.

    Args:
        scores: [N, G] float, larger is more wanted; NaN counts as -inf.  always_on: [G] bool, blocks taken first.
        budget: [1] fp32, the density read as data: R = max(1, round_half_up(min(budget, max_density) * G)), at least
            the number of always-on blocks, at most r_max (the same formula of max_density alone).
        tile: every group of rows starts at a multiple of it.  min_tokens: with fewer tokens everything is
            dense by data.
    Returns:
        blocks: [N, r_max] int32, ascending, -1 where unused.
        rows: [N * r_max + G * (tile - 1)] int32, token ids grouped by block, ascending inside a group, -1 as padding.
        offsets: [G + 1] int32, start of each group and the end of the last.
        Dense by data (budget < 0 or N < min_tokens): blocks and offsets are all -1, and every block is meant.
    Top-R by score, ties to the lower block. No gradient. Deterministic; a token's own scores decide its blocks.
    Source: SPT (arXiv 2312.10365), routed FFN; differs from it by dropless lists of static size in place of a mask.
    """
    return reference_ffn.route(scores, always_on, budget, max_density, tile, min_tokens)


@route.register_fake
def _(scores, always_on, budget, max_density, tile, min_tokens):
    n_tokens, n_blocks = scores.shape
    n_slots = kept_blocks(max_density, n_blocks)
    capacity = row_capacity(n_tokens, n_slots, n_blocks, tile)
    return (
        scores.new_empty((n_tokens, n_slots), dtype=torch.int32),
        scores.new_empty((capacity,), dtype=torch.int32),
        scores.new_empty((n_blocks + 1,), dtype=torch.int32),
    )


@torch.library.custom_op(
    "spt::routed_ffn_v1",
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor? compensation, str act_expr, Tensor[] act_in, Tensor? seed, float p,"
    " Tensor? lora_seed, float lora_p, bool save) -> (Tensor, Tensor, Tensor)",
)
def routed_ffn(
    x,
    w_in,
    b_in,
    w_out,
    b_out,
    lora_a_out,
    lora_b,
    lora_down,
    gates,
    blocks,
    rows,
    offsets,
    permutation,
    compensation,
    act_expr,
    act_in,
    seed,
    p,
    lora_seed,
    lora_p,
    save,
):
    """Feed-forward layer that computes, for each token, the blocks of hidden units listed for it.

    pre_i = x w_in[i]^T + b_in[i] + lora_a_out[i] lora_b[i]^T;  h = dropout(act(pre_0, pre_1));
    y = sum over kept blocks g of gates_g * (h_g w_out_g^T) + b_out + sum over dropped blocks of compensation_g;
    low = sum over kept blocks g of gates_g * (lora_dropout(h_g) lora_down_g^T).

    Args:
        x: [N, E] float.  w_in: one or two (gated FFN) logical [F, E] weights.  b_in: none, or one [F] for each.
        w_out: [E_out, F].  b_out: [E_out] or None.  All of x's dtype, any strides.
        lora_a_out, lora_b: empty, or [N, r] and [F, r] for each in-projection (r = 0 where there is none); the scaling
            is already in lora_a_out.
        lora_down: [r, F] or None: A of a low-rank branch on the out-projection. It reads the hidden activation, so the
            op computes it, for the same blocks; its B is an ordinary product of `low` outside.
        gates: [N, G] or None (ones).  blocks, rows, offsets: from `route`.
        permutation: [F] int32; block g owns the units permutation[g * W : (g + 1) * W], W = ceil(F / G).
        compensation: [G, E_out] or None; state, gets no gradient; not used when dense by data.
        act_expr: activation in the language of `expression.py` over x0, x1 and a0, a1, ... (`act_in`: scalars or [F]).
        seed: [1] int64, with p > 0: a hash of (seed, token * F + unit) drops hidden units with probability p.
        lora_seed, lora_p: the same for the hidden units that lora_down reads (y is not affected).
        save: keep pre-activations for backward; without it (and when dense by data) backward recomputes them.
    Returns: y [N, E_out], dtype of x; saved [n_in, cap, W] (cap 0 without `save`), opaque; low [N, r], dtype of x (r = 0
        without lora_down).
    Raises: ValueError on shapes or dtypes that do not fit.
    Dense by data: all blocks, in token chunks that never hold more hidden values than the sparse capacity.
    Source: SPT (arXiv 2312.10365), routed FFN; differs from it by gathered per-block GEMMs, and compensation of dropped
        blocks.
    """
    return reference_ffn.routed_ffn(
        x,
        w_in,
        b_in,
        w_out,
        b_out,
        lora_a_out,
        lora_b,
        lora_down,
        gates,
        blocks,
        rows,
        offsets,
        permutation,
        compensation,
        act_expr,
        act_in,
        seed,
        p,
        lora_seed,
        lora_p,
        save,
    )


@routed_ffn.register_fake
def _(
    x,
    w_in,
    b_in,
    w_out,
    b_out,
    lora_a_out,
    lora_b,
    lora_down,
    gates,
    blocks,
    rows,
    offsets,
    permutation,
    compensation,
    act_expr,
    act_in,
    seed,
    p,
    lora_seed,
    lora_p,
    save,
):
    tracing.announce(
        *("routed_ffn_v1", x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, blocks, rows, offsets),
        *(permutation, compensation, act_expr, act_in, seed, p, lora_seed, lora_p, save),
    )
    n_blocks = offsets.shape[0] - 1
    width = (permutation.shape[0] + n_blocks - 1) // n_blocks
    y = x.new_empty((x.shape[0], w_out.shape[0]))
    saved = x.new_empty((len(w_in), rows.shape[0] if save else 0, width))
    return y, saved, x.new_empty((x.shape[0], 0 if lora_down is None else lora_down.shape[0]))


@torch.library.custom_op(
    "spt::routed_ffn_backward_v1",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor? grad_low, {_TENSORS}, str act_expr, Tensor[] act_in, Tensor? seed, float p,"
    " Tensor? lora_seed, float lora_p, Tensor saved, bool[] needs) -> Tensor[]",
)
def routed_ffn_backward(
    grad_y,
    grad_low,
    x,
    w_in,
    b_in,
    w_out,
    b_out,
    lora_a_out,
    lora_b,
    lora_down,
    gates,
    blocks,
    rows,
    offsets,
    permutation,
    act_expr,
    act_in,
    seed,
    p,
    lora_seed,
    lora_p,
    saved,
    needs,
):
    """Gradients of `routed_ffn`.

    Args:
        grad_y: [N, E_out], any strides.  grad_low: [N, r] or None (zero).
        saved: the forward's (its cap is 0 where there is nothing saved).
        needs: one bool per gradient, in the order of `reference_ffn.gradient_names`.
        The rest: as in the forward (`b_out` for its shape alone).
    Returns: the gradients in that order, each like its input; an empty [0] tensor where none is needed (and no work is
        done for it) or the input is absent.
    """
    return reference_ffn.routed_ffn_backward(
        grad_y,
        grad_low,
        x,
        w_in,
        b_in,
        w_out,
        b_out,
        lora_a_out,
        lora_b,
        lora_down,
        gates,
        blocks,
        rows,
        offsets,
        permutation,
        act_expr,
        act_in,
        seed,
        p,
        lora_seed,
        lora_p,
        saved,
        needs,
    )


@routed_ffn_backward.register_fake
def _(
    grad_y,
    grad_low,
    x,
    w_in,
    b_in,
    w_out,
    b_out,
    lora_a_out,
    lora_b,
    lora_down,
    gates,
    blocks,
    rows,
    offsets,
    permutation,
    act_expr,
    act_in,
    seed,
    p,
    lora_seed,
    lora_p,
    saved,
    needs,
):
    inputs = [x, *w_in, *b_in, w_out, b_out, *lora_a_out, *lora_b, lora_down, gates, *act_in]
    return [torch.empty_like(t) if need and t is not None else x.new_empty([0]) for t, need in zip(inputs, needs, strict=True)]


def _setup_context(ctx, inputs, output) -> None:
    (x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, blocks, rows, offsets, permutation) = inputs[:13]
    compensation, act_expr, act_in, seed, p, lora_seed, lora_p, save = inputs[13:]
    saved = output[1]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.lengths = (len(w_in), len(b_in), len(lora_b), len(act_in))
    ctx.act_expr, ctx.p, ctx.lora_p = act_expr, p, lora_p
    single = (x, w_out, b_out, lora_down, gates, blocks, rows, offsets, permutation, seed, lora_seed, saved)
    ctx.save_for_backward(*single, *w_in, *b_in, *lora_a_out, *lora_b, *act_in)


# Differentiable arguments of the forward by position, and how many tensors each holds (an index into `ctx.lengths`).
_DIFFERENTIABLE = {0: None, 1: 0, 2: 1, 3: None, 4: None, 5: 2, 6: 2, 7: None, 8: None, 15: 3}


def _backward(ctx, grad_y, _grad_saved, grad_low):
    tensors = ctx.saved_tensors  # read once: checkpointing allows no more
    x, w_out, b_out, lora_down, gates, blocks, rows, offsets, permutation, seed, lora_seed, saved, *rest = tensors
    n_in, n_bias, n_lora, n_act = ctx.lengths
    lists = []
    for n in (n_in, n_bias, n_lora, n_lora, n_act):
        lists.append(rest[:n])
        rest = rest[n:]
    w_in, b_in, lora_a_out, lora_b, act_in = lists
    asked = list(ctx.needs_input_grad)
    flat_needs: list[bool] = []
    for position, length in _DIFFERENTIABLE.items():
        need, n = asked[position], 1 if length is None else ctx.lengths[length]
        # An empty list leaves one flag or none, depending on how torch flattened it.
        flags = list(need) if isinstance(need, (list, tuple)) else [bool(need)]
        flat_needs += [bool(f) for f in flags[:n]] + [False] * (n - len(flags))
    names = gradient_names(*ctx.lengths)
    if (grad_y is None and grad_low is None) or not any(flat_needs):
        grads: list[Tensor | None] = [None] * len(names)
    else:
        flat = torch.ops.spt.routed_ffn_backward_v1.default(
            x.new_zeros((x.shape[0], w_out.shape[0])) if grad_y is None else grad_y,
            grad_low,
            *(x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, blocks, rows, offsets, permutation),
            *(ctx.act_expr, act_in, seed, ctx.p, lora_seed, ctx.lora_p, saved, flat_needs),
        )
        grads = [g if need else None for g, need in zip(flat, flat_needs, strict=True)]
    by_name = dict(zip(names, grads, strict=True))

    def listed(prefix: str, n: int):
        # A Tensor[] input wants a list of gradients, an empty list stands for itself.
        return [by_name[f"{prefix}{i}"] for i in range(n)]

    return (
        by_name["x"],
        listed("w_in", n_in),
        listed("b_in", n_bias),
        by_name["w_out"],
        by_name["b_out"],
        listed("lora_a_out", n_lora),
        listed("lora_b", n_lora),
        by_name["lora_down"],
        by_name["gates"],
        *[None] * 6,
        listed("act_in", n_act),
        *[None] * 5,
    )


routed_ffn.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "spt::routed_ffn has no second derivative: expected a single backward, got a backward through it; "
        "run the step inside spt_compiler.dense() (gradient penalties, Hessian-vector products)"
    )


routed_ffn_backward.register_autograd(_no_double_backward)


# Positions of the arguments that autocast casts: all but gates and compensation, which act in their own dtype.
_CAST = (0, 1, 2, 3, 4, 5, 6, 7, 15)


def _autocast(op: torch.library.CustomOpDef, overload: torch._ops.OpOverload, device_type: str, cast: tuple[int, ...]):
    """Under autocast the op computes in the region's dtype, as the linear layers it replaces do.

    torch.library.register_autocast takes one fixed dtype; here the region's own is read. An op without arguments to
    cast still needs this: inside it autocast has to be off.
    """
    device_key = torch._C._dispatch_key_for_device(device_type)
    key = torch._C._dispatch_key_parse(f"Autocast{device_key}")

    def to(value, dtype: torch.dtype):
        if isinstance(value, Tensor):
            eligible = value.is_floating_point() and value.device.type == device_type and value.dtype != torch.float64
            return value.to(dtype) if eligible else value
        return [to(v, dtype) for v in value] if isinstance(value, (list, tuple)) else value

    def kernel(_keyset, *args):
        dtype = torch.get_autocast_dtype(device_type)
        cast_args = [to(a, dtype) if i in cast else a for i, a in enumerate(args)]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return overload(*cast_args)

    op._lib.impl(op._name, kernel, f"Autocast{device_key}", with_keyset=True)


for _device_type in ("cpu", "cuda"):
    _autocast(routed_ffn, torch.ops.spt.routed_ffn_v1.default, _device_type, _CAST)
    _autocast(routed_ffn_backward, torch.ops.spt.routed_ffn_backward_v1.default, _device_type, ())


@torch.library.custom_op("spt::stats_ffn_v1", mutates_args=(), schema="(Tensor x, int rows, Tensor probe) -> Tensor")
def stats_ffn(x: Tensor, rows: int, probe: Tensor) -> Tensor:
    """Sample tokens for learning: `rows` evenly spaced rows of x (repeated where there are fewer tokens).

    Args: x: [N, E] float.  probe: int32, [0] != 0 asks for the sample; otherwise the result is zeros and costs nothing
        more.
    Returns: [rows, E] fp32. No gradient.
    """
    return reference_ffn.stats_ffn(x, rows, probe)


@stats_ffn.register_fake
def _(x, rows, probe):
    return x.new_empty((rows, x.shape[1]), dtype=torch.float32)
