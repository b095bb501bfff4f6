"""What the FFN operators mean: slow, readable, differentiable by hand, in fp64 where the input is.

Every function here is the body of one operator of `ops/ffn.py`; the lowerings must agree with it on the same selection.
Blocks are computed densely and masked, so nothing here depends on how a lowering batches tokens. Letters: N tokens, E
model width, F hidden width, G blocks, W = ceil(F / G) block width (the last block may be short), R blocks kept per
token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.ops.observe import asked
from spt_compiler.ops.reference import dropout_keep

# A density that reached us through fp32 may be off by half an ulp; without the slack .3 * 5 blocks could round either
# way.
_ROUNDING_SLACK = 1e-4


def kept_blocks(density: float, n_blocks):
    """R = max(1, round_half_up(density * G)), at most G (CONTRACTS.md, "Selection and density").

    Args:
        density: in [0, 1].  n_blocks: G, an int or a SymInt (the result is of the same kind, and nothing is guarded on
            it).
    """
    wanted = torch.sym_int(density * n_blocks + 0.5 + _ROUNDING_SLACK)
    return torch.sym_min(torch.sym_max(wanted, 1), n_blocks)


def row_capacity(n_tokens, n_kept, n_blocks, tile: int):
    """Slots of the row list: N * R for the tokens and up to tile - 1 of padding for each block; ints or SymInts."""
    return n_tokens * n_kept + n_blocks * (tile - 1)


def route(scores: Tensor, always_on: Tensor, budget: Tensor, max_density: float, tile: int, min_tokens: int):
    """Choose the blocks of each token and list the tokens of each block. See `spt::route_v1`.

    Written without reading a value on the host, so that it may run anywhere.
    """
    n_tokens, n_blocks = scores.shape
    n_slots = kept_blocks(max_density, n_blocks)
    device = scores.device

    density = torch.nan_to_num(budget[0].double(), nan=max_density).clamp(max=max_density)
    n_kept = torch.floor(density * n_blocks + 0.5 + _ROUNDING_SLACK).long().clamp(1, n_slots)
    n_kept = torch.maximum(n_kept, always_on.sum().clamp(max=n_slots))
    dense = (budget[0] < 0) | (n_tokens < min_tokens)

    # Two stable sorts: by score (ties to the lower block), then always-on blocks first.
    scores = torch.where(torch.isnan(scores), float("-inf"), scores)
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, always_on[order].byte().argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n_blocks, device=device).expand_as(order))
    kept = rank < n_kept
    kept &= ~dense

    slot = kept.cumsum(1) - 1
    slot = torch.where(kept, slot, n_slots)  # what is not kept goes to a slot that is cut off
    blocks = torch.full((n_tokens, n_slots + 1), -1, dtype=torch.int32, device=device)
    ids = torch.arange(n_blocks, dtype=torch.int32, device=device).expand(n_tokens, -1)
    blocks = blocks.scatter_(1, slot, ids)[:, :n_slots].clone(memory_format=torch.contiguous_format)

    capacity = row_capacity(n_tokens, n_slots, n_blocks, tile)
    padded = (kept.sum(0) + tile - 1) // tile * tile
    offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    position = torch.where(kept, offsets[:-1] + kept.cumsum(0) - 1, capacity)
    rows = torch.full((capacity + 1,), -1, dtype=torch.int32, device=device)
    tokens = torch.arange(n_tokens, dtype=torch.int32, device=device).unsqueeze(1).expand(-1, n_blocks)
    rows = rows.scatter_(0, position.reshape(-1), tokens.reshape(-1))[:capacity].clone()
    offsets = torch.where(dense, -1, offsets).int()
    return blocks, rows, offsets


def kept_mask(blocks: Tensor, n_blocks: int) -> Tensor:
    """[N, r_max] block lists (-1: unused) -> [N, G] bool."""
    slot = torch.where(blocks < 0, n_blocks, blocks).long()
    mask = torch.zeros(blocks.shape[0], n_blocks + 1, dtype=torch.bool, device=blocks.device)
    return mask.scatter_(1, slot, True)[:, :n_blocks]


def block_of_unit(permutation: Tensor, n_blocks: int) -> Tensor:
    """[F] int64: the block that owns each hidden unit."""
    n_units = permutation.shape[0]
    width = -(-n_units // n_blocks)
    block = torch.empty(n_units, dtype=torch.long, device=permutation.device)
    block[permutation.long()] = torch.arange(n_units, device=permutation.device) // width
    return block


def activation_env(act_expr: str, pre: list[Tensor], act_in: list[Tensor]) -> tuple[expression.Expression, dict]:
    """The parsed activation and the tensors it reads, by name (x0, x1: pre-activations; a0, a1, ...: `act_in`)."""
    parsed = expression.parse(act_expr)
    env = {f"x{i}": p for i, p in enumerate(pre)} | {f"a{i}": a for i, a in enumerate(act_in)}
    return parsed, env


def sum_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum `grad` over the dimensions that broadcasting `like` to it had added."""
    extra = grad.dim() - like.dim()
    if extra:
        grad = grad.sum(tuple(range(extra)))
    wide = tuple(i for i, n in enumerate(like.shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(wide, keepdim=True) if wide else grad


class _Forward(NamedTuple):
    """Everything of the forward that the backward reads, in the dtype of accumulation."""

    dense: bool
    kept: Tensor  # [N, G] bool
    unit: Tensor  # [F] block of each unit
    x: Tensor
    w_in: list[Tensor]
    w_out: Tensor
    lora_a_out: list[Tensor]
    lora_b: list[Tensor]
    lora_down: Tensor | None
    gates: Tensor | None
    pre: list[Tensor]
    env: dict
    act: expression.Expression
    keep: Tensor | None  # [N, F] dropout mask times 1 / (1 - p)
    hidden: Tensor  # after activation and dropout, before gates
    low_keep: Tensor | None  # [N, F] dropout mask of what lora_down reads, times 1 / (1 - lora_p)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def hidden_dropout(seed: Tensor, tokens: Tensor, units: Tensor, n_units: int, p: float, dtype: torch.dtype) -> Tensor:
    """[len(tokens), len(units)] of 0 and 1 / (1 - p): the kept hidden units, by a hash of token * F + unit.

    Args:
        seed: [1] int64.  tokens, units: int64 vectors; `units` are the model's own units, so that the mask does not
            depend on how they are cut into blocks.
    """
    index = tokens.unsqueeze(1) * n_units + units
    keep = dropout_keep(seed, index, p)
    return keep.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)


def _dropped(value: Tensor, keep: Tensor | None) -> Tensor:
    return value if keep is None else torch.where(keep > 0, value * keep, 0)


def _forward(
    x,
    w_in,
    b_in,
    w_out,
    lora_a_out,
    lora_b,
    lora_down,
    gates,
    blocks,
    offsets,
    permutation,
    act_expr,
    act_in,
    seed,
    p,
    lora_seed,
    lora_p,
) -> _Forward:
    n_blocks = offsets.shape[0] - 1
    n_units = permutation.shape[0]
    dense = bool(offsets[0] < 0)
    kept = kept_mask(blocks, n_blocks)
    if dense:
        kept = torch.ones_like(kept)
    x, w_out = _wide(x), _wide(w_out)
    w_in, lora_a_out, lora_b = ([_wide(t) for t in ts] for ts in (w_in, lora_a_out, lora_b))
    pre = [x @ w.t() for w in w_in]
    pre = [z + _wide(b) for z, b in zip(pre, b_in, strict=True)] if b_in else pre
    pre = [z + a @ b.t() for z, a, b in zip(pre, lora_a_out, lora_b, strict=True)] if lora_a_out else pre
    act, env = activation_env(act_expr, pre, [_wide(a) for a in act_in])
    hidden = expression.evaluate(act, env).expand_as(pre[0])

    def mask(seed: Tensor | None, p: float) -> Tensor | None:
        if p == 0 or seed is None:
            return None
        tokens, units = (torch.arange(n, device=x.device) for n in (x.shape[0], n_units))
        return hidden_dropout(seed, tokens, units, n_units, p, x.dtype)

    keep, low_keep = mask(seed, p), None if lora_down is None else mask(lora_seed, lora_p)
    hidden = _dropped(hidden, keep)
    gates, lora_down = (None if t is None else _wide(t) for t in (gates, lora_down))
    unit = block_of_unit(permutation, n_blocks)
    weights = (w_in, w_out, lora_a_out, lora_b, lora_down)
    return _Forward(dense, kept, unit, x, *weights, gates, pre, env, act, keep, hidden, low_keep)


def routed_ffn(
    x: Tensor,
    w_in: list[Tensor],
    b_in: list[Tensor],
    w_out: Tensor,
    b_out: Tensor | None,
    lora_a_out: list[Tensor],
    lora_b: list[Tensor],
    lora_down: Tensor | None,
    gates: Tensor | None,
    blocks: Tensor,
    rows: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    compensation: Tensor | None,
    act_expr: str,
    act_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    lora_seed: Tensor | None,
    lora_p: float,
    save: bool,
):
    """The FFN over the kept blocks of each token. See `spt::routed_ffn_v1`."""
    weights, random = (w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down), (seed, p, lora_seed, lora_p)
    check_arguments(x, *weights, gates, blocks, rows, offsets, permutation, compensation, act_in, *random)
    f = _forward(x, w_in, b_in, w_out, *weights[4:], gates, blocks, offsets, permutation, act_expr, act_in, *random)
    coefficient = f.kept if f.gates is None else f.kept * f.gates
    # `where`, not a product: a block that is not kept may hold inf or NaN.
    hidden = torch.where(f.kept[:, f.unit], f.hidden * coefficient[:, f.unit], 0)
    y = hidden @ f.w_out.t()
    if b_out is not None:
        y = y + _wide(b_out)
    if compensation is not None and not f.dense:
        y = y + (~f.kept).to(y.dtype) @ compensation.to(y.dtype)
    low = hidden.new_empty((x.shape[0], 0))
    if f.lora_down is not None:
        low = _dropped(hidden, f.low_keep) @ f.lora_down.t()
    return y.to(x.dtype), _saved(f, x.dtype, rows, offsets, permutation, save), low.to(x.dtype)


def _saved(f: _Forward, dtype: torch.dtype, rows: Tensor, offsets: Tensor, permutation: Tensor, save: bool) -> Tensor:
    """Pre-activations in the order of `rows`: [n_in, cap, W]; zero where no token or no unit is."""
    n_units, n_blocks = permutation.shape[0], offsets.shape[0] - 1
    width = -(-n_units // n_blocks)
    saved = f.x.new_zeros((len(f.pre), rows.shape[0] if save else 0, width), dtype=dtype)
    if not save or f.dense:
        return saved
    starts = offsets.tolist()
    for g in range(n_blocks):
        units = permutation[g * width : (g + 1) * width].long()
        listed = rows[starts[g] : starts[g + 1]].long()
        listed = listed[listed >= 0]
        for i, pre in enumerate(f.pre):
            saved[i, starts[g] : starts[g] + len(listed), : len(units)] = pre[listed][:, units].to(dtype)
    return saved


def routed_ffn_backward(
    grad_y: Tensor,
    grad_low: Tensor | None,
    x: Tensor,
    w_in: list[Tensor],
    b_in: list[Tensor],
    w_out: Tensor,
    b_out: Tensor | None,
    lora_a_out: list[Tensor],
    lora_b: list[Tensor],
    lora_down: Tensor | None,
    gates: Tensor | None,
    blocks: Tensor,
    rows: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    act_expr: str,
    act_in: list[Tensor],
    seed: Tensor | None,
    p: float,
    lora_seed: Tensor | None,
    lora_p: float,
    saved: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of `routed_ffn`, recomputed from its inputs. See `spt::routed_ffn_backward_v1`."""
    weights, random = (w_in, b_in, w_out, lora_a_out, lora_b, lora_down), (seed, p, lora_seed, lora_p)
    f = _forward(x, *weights, gates, blocks, offsets, permutation, act_expr, act_in, *random)
    grad_y = _wide(grad_y)
    kept = f.kept[:, f.unit]
    per_unit = torch.ones_like(f.hidden) if f.gates is None else f.gates[:, f.unit]

    grad_scaled = grad_y @ f.w_out  # of hidden * gate
    scaled = torch.where(kept, f.hidden * per_unit, 0)
    grad_low = None if grad_low is None or f.lora_down is None else _wide(grad_low)
    if grad_low is not None:
        grad_scaled = grad_scaled + _dropped(grad_low @ f.lora_down, f.low_keep)
    grad_scaled = torch.where(kept, grad_scaled, 0)
    grad_hidden = _dropped(grad_scaled * per_unit, f.keep)

    def through_activation(name: str) -> Tensor:
        slope = expression.evaluate(expression.derivative(f.act, name), f.env)
        return torch.where(kept & (grad_hidden != 0), grad_hidden * slope, 0)

    grad_pre = [through_activation(f"x{i}") for i in range(len(f.pre))]

    flat = FlatGrads(x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, act_in, needs)
    flat.put("x", lambda: sum(g @ w for g, w in zip(grad_pre, f.w_in, strict=True)))
    for i, g in enumerate(grad_pre):
        flat.put(f"w_in{i}", lambda g=g: g.t() @ f.x)
        flat.put(f"b_in{i}", lambda g=g: g.sum(0))
        flat.put(f"lora_a_out{i}", lambda i=i, g=g: g @ f.lora_b[i])
        flat.put(f"lora_b{i}", lambda i=i, g=g: g.t() @ f.lora_a_out[i])
    flat.put("w_out", lambda: grad_y.t() @ scaled)
    flat.put("b_out", lambda: grad_y.sum(0))

    def down_grad() -> Tensor:
        if grad_low is None:
            return torch.zeros_like(f.lora_down)
        return grad_low.t() @ _dropped(scaled, f.low_keep)

    flat.put("lora_down", down_grad)

    def gate_grad() -> Tensor:
        per_unit_grad = torch.where(kept, grad_scaled * f.hidden, 0)
        return torch.zeros_like(f.gates).index_add_(1, f.unit, per_unit_grad)

    flat.put("gates", gate_grad)
    for i, a in enumerate(act_in):
        flat.put(f"act_in{i}", lambda i=i, a=a: sum_to(through_activation(f"a{i}"), a))
    return flat.tensors()


def gradient_names(n_in: int, n_bias: int, n_lora: int, n_act: int) -> list[str]:
    """Names of the gradients of the backward op, in the order in which it returns them and `needs` asks for them."""
    return [
        "x",
        *(f"w_in{i}" for i in range(n_in)),
        *(f"b_in{i}" for i in range(n_bias)),
        "w_out",
        "b_out",
        *(f"lora_a_out{i}" for i in range(n_lora)),
        *(f"lora_b{i}" for i in range(n_lora)),
        "lora_down",
        "gates",
        *(f"act_in{i}" for i in range(n_act)),
    ]


class FlatGrads:
    """The flat gradient list of the backward op: needed ones computed, the others empty [0] tensors.

    Args: the differentiable inputs of the op (absent ones None or []), and `needs`, one bool for each name of
        `gradient_names`.
    """

    def __init__(
        self, x, w_in, b_in, w_out, b_out, lora_a_out, lora_b, lora_down, gates, act_in, needs: list[bool]
    ):
        names = gradient_names(len(w_in), len(b_in), len(lora_a_out), len(act_in))
        like = [x, *w_in, *b_in, w_out, b_out, *lora_a_out, *lora_b, lora_down, gates, *act_in]
        self.like = dict(zip(names, like, strict=True))
        self.needed = {name for name, need in zip(names, needs, strict=True) if need and self.like[name] is not None}
        self._values: dict[str, Tensor] = {}

    def put(self, name: str, compute) -> None:
        """Store `compute()` as the gradient of the input `name`, if it is needed."""
        if name in self.needed:
            self._values[name] = compute()

    def empty(self, name: str) -> Tensor:
        """Uninitialised gradient with the shape, dtype and (for dense inputs) the strides of the input `name`."""
        return torch.empty_like(self.like[name])

    def tensors(self) -> list[Tensor]:
        """All gradients in order, each in its input's shape, dtype and strides."""
        x = self.like["x"]
        out = []
        for name in self.like:
            if name not in self.needed:
                out.append(x.new_empty([0]))
            else:
                value = self._values[name]
                layout = self.empty(name)
                matches = value.dtype == layout.dtype and value.stride() == layout.stride()
                out.append(value if matches else layout.copy_(value.expand_as(layout)))
        return out


def stats_ffn(x: Tensor, rows: int, probe: Tensor) -> Tensor:
    """Evenly spaced rows of x. See `spt::stats_ffn_v1`."""
    n_tokens, width = x.shape
    out = torch.zeros(rows, width, dtype=torch.float32, device=x.device)
    if n_tokens == 0:
        return out
    known = asked(probe)
    if known is not None:
        return out.copy_(x[_evenly(n_tokens, rows, x.device)]) if known[0] != 0 else out
    # Whatever is asked, the device decides.
    return torch.where(probe[0] != 0, x[_evenly(n_tokens, rows, x.device)].float(), out)


def _evenly(n_tokens: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device) * n_tokens // max(rows, 1)


def check_arguments(
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
    act_in,
    seed,
    p,
    lora_seed,
    lora_p,
) -> None:
    """Raise ValueError, with expected, got and remedy, unless the arguments of `spt::routed_ffn_v1` fit together."""

    def refuse(what: str, got: object) -> None:
        raise ValueError(f"spt::routed_ffn_v1: expected {what}, got {got}; pass logical [F, E] weights and [N, E] tokens")

    n_units, n_blocks = permutation.shape[0], offsets.shape[0] - 1
    if not (x.dim() == 2 and x.is_floating_point()):
        refuse("x [N, E] of a floating dtype", (tuple(x.shape), x.dtype))
    n_tokens, width = x.shape
    if len(w_in) not in (1, 2):
        refuse("one or two in-projections", len(w_in))
    if not 0 < n_blocks <= n_units:
        refuse("at least one block and at most one per hidden unit", f"{n_blocks} for F={n_units}")
    for w in w_in:
        if w.shape != (n_units, width):
            refuse(f"w_in [{n_units}, {width}]", tuple(w.shape))
    if w_out.dim() != 2 or w_out.shape[1] != n_units:
        refuse(f"w_out [E_out, {n_units}]", tuple(w_out.shape))
    if any(t.dtype != x.dtype for t in (*w_in, w_out)):
        refuse("x and weights of one dtype", [t.dtype for t in (x, *w_in, w_out)])
    n_out = w_out.shape[0]
    if len(b_in) not in (0, len(w_in)):
        refuse("no in-bias or one per in-projection", len(b_in))
    for b in b_in:
        if b.shape != (n_units,):
            refuse(f"b_in [{n_units}]", tuple(b.shape))
    if b_out is not None and b_out.shape != (n_out,):
        refuse(f"b_out [{n_out}]", tuple(b_out.shape))
    if len(lora_a_out) != len(lora_b) or len(lora_b) not in (0, len(w_in)):
        refuse("LoRA lists of one length, that of w_in or zero", (len(lora_a_out), len(lora_b)))
    for a, b in zip(lora_a_out, lora_b, strict=True):
        if a.dim() != 2 or b.dim() != 2 or a.shape != (n_tokens, b.shape[1]) or b.shape[0] != n_units:
            refuse(f"LoRA [{n_tokens}, r] and [{n_units}, r]", (tuple(a.shape), tuple(b.shape)))
    if lora_down is not None and (lora_down.dim() != 2 or lora_down.shape[1] != n_units):
        refuse(f"lora_down [r, {n_units}]", tuple(lora_down.shape))
    if gates is not None and gates.shape != (n_tokens, n_blocks):
        refuse(f"gates [{n_tokens}, {n_blocks}]", tuple(gates.shape))
    if blocks.dim() != 2 or blocks.shape[0] != n_tokens:
        refuse(f"blocks [{n_tokens}, r_max]", tuple(blocks.shape))
    if compensation is not None and compensation.shape != (n_blocks, n_out):
        refuse(f"compensation [{n_blocks}, {n_out}]", tuple(compensation.shape))
    for a in act_in:
        if a.dim() > 1 or a.numel() not in (1, n_units):
            refuse(f"activation inputs of one number or [{n_units}]", tuple(a.shape))
    for rate, drawn in ((p, seed), (lora_p, lora_seed)):
        if not 0 <= rate <= 1:
            refuse("a dropout probability in [0, 1]", rate)
        if rate > 0 and drawn is None:
            refuse("a seed for dropout", f"p={rate} without one")
