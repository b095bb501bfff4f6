"""Tile selection and tile attention on the CPU by generated C++ (`templates/tile_attention.cpp.jinja`).

Takes what the template can do, for fp32, bf16 and fp16: any mask, bias and soft cap, but no dropout and no gradient of a bias;
the ATen lowerings (`cpu_attention.py`, `cpu_selection.py`) take the rest. What masks do to each block of scores is found out
beforehand (`cpu_masks.classes`), so that only blocks in which a mask changes something are masked score by score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.errors import SPTError
from spt_compiler.lowering import cpp, cpu_attention, cpu_selection, cpu_threads
from spt_compiler.lowering.cpu_empty import add_empty_grad, fill_empty
from spt_compiler.lowering.cpu_masks import LOG2E, Masks, classes, is_per_key, parts, plain_reads, split
from spt_compiler.lowering.registry import register
from spt_compiler.ops.reference import (
    attention_output,
    check_attention,
    check_rule,
    check_selection,
    everything_by_data,
    wanted_count,
)
from spt_compiler.ops.selection.common import causal_split, in_use, max_tiles, near_tiles, stored

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
_READS = {"bool": "uint8_t", "int": "int64_t", "float": "float"}
_MAX_DIM = 512  # a wider head would not fit the cache that the blocking counts on

# Fields of Args in the template, besides those of the tensors that the mask reads.
_INTEGERS = (
    *("batch", "n_heads", "n_groups", "n_q", "n_k", "n_row_tiles", "n_key_tiles", "slots", "splits", "threads"),
    *("q", "q_b", "q_h", "q_t", "k", "k_b", "k_h", "k_t", "v", "v_b", "v_h", "v_t", "grad_out", "g_b", "g_h", "g_t"),
    *("out", "out_b", "out_h", "out_t", "lse", "tiles", "counts"),
    *("grad_q", "grad_k", "grad_v", "partial", "classes", "class_b", "class_h"),
    *("codebook", "key", "key_b", "key_h", "bias", "bias_b", "bias_h", "bias_q", "bias_k", "causal", "own", "near", "wanted"),
)
_REALS = ("scale", "softcap")


def _readable(expr: str, expr_in: list[Tensor]) -> bool:
    """Whether every read of the mask has plain variables as indices: only then are all indices known to be in range."""

    def plain(node: expression.Expression) -> bool:
        if node.op == "read" and any(a.op != "var" or a.value not in ("b", "h", "q", "k") for a in node.args):
            return False
        return all(plain(a) for a in node.args)

    expr, expr_in = plain_reads(expr, expr_in)
    return not expr or (plain(expression.parse(expr)) and all(t.dtype != torch.float64 for t in expr_in))


def _fits(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, expr: str, expr_in: list[Tensor], tile_q: int, tile_k: int) -> bool:
    same = q.dtype in _TYPES and k.dtype == q.dtype and v.dtype == q.dtype
    small = max(q.shape[3], v.shape[3]) <= _MAX_DIM and min(q.numel(), k.numel(), v.numel()) > 0 and max(tile_q, tile_k) <= 256
    known = bias is None or bias.dtype in (torch.bool, torch.float32, torch.bfloat16)
    return same and small and known and _readable(expr, expr_in) and cpp.usable()


def _reads(mask: expression.Expression | None, expr_in: list[Tensor]) -> list[dict[str, Any]]:
    """What the template has to know of the tensors that a mask reads: name, element type, kind of value, number of indices."""
    if mask is None:
        return []
    ranks, reads = expression.read_ranks(mask), []
    for name in sorted(mask.variables - set("bhqk")):
        dtype = expr_in[int(name[1:])].dtype
        kind = "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"
        reads.append({"name": name, "type": _READS[kind], "kind": kind, "rank": ranks.get(name, 0)})
    return reads


def _constants(
    q: Tensor,
    v: Tensor,
    mask: expression.Expression | None,
    reads: list[dict[str, Any]],
    bias: torch.dtype | None,
    tile_q: int,
    tile_k: int,
    softcap: float | None,
    codebook: Tensor | None,
) -> dict[str, Any]:
    """What the template is rendered for. `mask` is all that differs by query, "k <= q" included; `bias` the type of what does."""
    kinds = dict.fromkeys("bhqk", "int") | {read["name"]: read["kind"] for read in reads}
    strides = [[read["name"], *(f"{read['name']}_s{d}" for d in range(read["rank"]))] for read in reads]
    return {
        "dim": q.shape[3],
        "dim_v": v.shape[3],
        "tile_q": tile_q,
        "tile_k": tile_k,
        "in_type": _TYPES[q.dtype],
        "softcap": softcap is not None,
        "codewords": 0 if codebook is None else codebook.shape[2],
        "subspace": 0 if codebook is None else codebook.shape[3],
        "bias": None if bias is None else "uint8_t" if bias == torch.bool else _TYPES[bias],
        "mask": mask,
        "mask_kind": None if mask is None else expression.kind_of(mask, kinds),
        "reads": reads,
        "integers": [*_INTEGERS, *(name for names in strides for name in names)],
        "reals": list(_REALS),
    }


def _with_causal(causal: bool, mask: expression.Expression | None) -> expression.Expression | None:
    if not causal:
        return mask
    return expression.parse("k <= q") if mask is None else expression.parse("k <= q") & mask


def _foresee(
    q: Tensor,
    v: Tensor,
    bias: Tensor | None,
    expr: str,
    expr_in: list[Tensor],
    tile_q: int,
    tile_k: int,
    softcap: float | None,
    codebook: Tensor | None,
) -> None:
    """Compiles in the background what `_Call` will ask for."""
    expr, expr_in = plain_reads(expr, expr_in)
    causal, _, rest = parts(expr)
    mask = _with_causal(causal, rest)
    kind = None if bias is None or is_per_key(bias) else bias.dtype
    constants = _constants(q, v, mask, _reads(mask, expr_in), kind, tile_q, tile_k, softcap, codebook)
    cpp.foresee("tile_attention", constants)


class _Call:
    """Arguments of a kernel, and the library made for them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: Masks,
        tile_q: int,
        tile_k: int,
        scale: float,
        softcap: float | None,
        *,
        codebook: Tensor | None = None,
    ):
        mask, bias = _with_causal(masks.causal, masks.rest), masks.bias
        reads = _reads(mask, masks.expr_in)
        self.values: dict[str, Any] = {}
        for read in reads:
            name, kind = read["name"], read["kind"]
            tensor = masks.expr_in[int(name[1:])]
            stored = {"bool": torch.uint8, "int": torch.int64, "float": torch.float32}[kind]
            tensor = tensor.view(torch.uint8) if kind == "bool" and tensor.is_contiguous() else tensor.to(stored)
            self.values[name] = tensor
            self.values |= {f"{name}_s{d}": tensor.stride(d) for d in range(read["rank"])}
        kind = None if bias is None else bias.dtype
        constants = _constants(q, v, mask, reads, kind, tile_q, tile_k, softcap, codebook)
        self.integers = tuple(constants["integers"])
        self.library = cpp.library("tile_attention", constants)
        batch, n_heads, n_q, _ = q.shape
        n_groups, n_k = k.shape[1:3]
        self.threads = cpu_threads.width()
        self.n_key_tiles, self.n_row_tiles = -(-n_k // tile_k), -(-n_q // tile_q)
        self.units = batch * n_groups
        self.set(batch=batch, n_heads=n_heads, n_groups=n_groups, n_q=n_q, n_k=n_k, n_row_tiles=self.n_row_tiles)
        self.set(n_key_tiles=self.n_key_tiles, threads=self.threads, splits=self.splits(), scale=scale, softcap=softcap)
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.tensor(name, x)
        found = classes(masks, tile_q, tile_k)
        if found is not None:
            size = found[0, 0].numel()
            heads = found.shape[1]
            self.set(classes=found, class_b=size * heads if found.shape[0] > 1 else 0, class_h=size if heads > 1 else 0)
        if masks.key is not None:
            key = (masks.key.float() * LOG2E).clamp_(min=torch.finfo(torch.float32).min)
            key = key.masked_fill_(masks.key == -torch.inf, -torch.inf).contiguous()
            self.set(key=key, key_b=key.stride(0) if key.shape[0] > 1 else 0, key_h=key.stride(1) if key.shape[1] > 1 else 0)
        if bias is not None:
            wide = bias.expand(batch, n_heads, n_q, n_k)
            strides = dict(zip(("bias_b", "bias_h", "bias_q", "bias_k"), wide.stride(), strict=True))
            self.set(bias=wide.view(torch.uint8) if bias.dtype == torch.bool else wide, **strides)

    def set(self, **values: Any) -> None:
        self.values |= values

    def tensor(self, name: str, x: Tensor) -> None:
        """A tensor [B, heads, T, .] with its strides; copied where its rows are not contiguous."""
        x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
        short = "g" if name == "grad_out" else name
        self.set(**{name: x, f"{short}_b": x.stride(0), f"{short}_h": x.stride(1), f"{short}_t": x.stride(2)})

    def splits(self) -> int:
        """Shares of a head's query tiles, so that all threads have about equally much to do."""
        for splits in range(1, 2 * self.threads):
            jobs = self.units * splits
            if jobs >= 4 * self.threads or jobs % self.threads == 0:
                break
        return max(1, min(splits, self.n_row_tiles))

    def run(self, name: str) -> None:
        cpp.call(getattr(self.library, name), self.integers, _REALS, self.values)


def _selection_fits(
    q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, tile_q, tile_k, scale, softcap, rule, min_keys
) -> bool:
    return rule in ("pq", "mean") and tile_k > 1 and _fits(q, k, k, bias, expr, expr_in, tile_q, tile_k)


def _foresee_selection(
    q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, tile_q, tile_k, scale, softcap, rule, min_keys
) -> None:
    if k.shape[2] >= min_keys:
        _foresee(q, k, bias, expr, expr_in, tile_q, tile_k, softcap, codebook if rule == "pq" else None)


@register(
    "select_tiles_v1",
    *("cpu", "cpp"),
    supports=_selection_fits,
    ready=cpp.usable,
    foresee=_foresee_selection,
    preferred=True,
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
) -> tuple[Tensor, Tensor]:
    """`spt::select_tiles_v1`; see there."""
    check_selection(q, k, bias, codebook, key_mean, budget)
    check_rule(rule, "tile", codebook)
    batch, n_heads, n_q, _ = q.shape
    n_groups, n_k = k.shape[1:3]
    width = max_tiles(n_k, max_density, tile_q, tile_k)
    rows = (batch, n_groups, -(-n_q // tile_q))
    if bool(everything_by_data(budget, n_k, min_keys)):
        return stored(torch.full((*rows, width), -1, dtype=torch.int32), torch.full(rows, -1, dtype=torch.int32), tiles=True)
    masks = split(bias, expr, expr_in, (batch, n_heads, n_q, n_k), torch.float32)
    words = None
    if rule == "pq" and codebook is not None:  # codewords about the mean, as `pq.reconstruct` has them
        mean = 0 if key_mean is None else key_mean.float().view(n_groups, codebook.shape[1], 1, -1)
        words = (codebook.float() + mean).contiguous()
    try:
        call = _Call(q, k, k, masks, tile_q, tile_k, scale, softcap, codebook=words)
    except SPTError as error:
        cpp.give_up(str(error))
        return cpu_selection.select_tiles(
            q, k, bias, expr, expr_in, codebook, key_mean, budget, max_density, tile_q, tile_k, scale, softcap, rule, min_keys
        )
    tiles, counts = torch.empty(*rows, width, dtype=torch.int32), torch.empty(rows, dtype=torch.int32)
    call.set(codebook=words)
    own = causal_split(expr)[0] and n_q == n_k
    wanted = wanted_count(budget, max_density, n_k, tile_k)
    near = int(near_tiles(wanted, tile_q, tile_k))
    call.set(tiles=tiles, counts=counts, slots=width, causal=int(masks.causal), own=int(own), near=near, wanted=int(wanted))
    call.run("select_tiles")
    return stored(tiles, counts, tiles=True)


def _attention_fits(
    q, k, v, bias, tiles, counts, expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k, compensate=False
) -> bool:
    return p == 0 and not compensate and _fits(q, k, v, bias, expr, expr_in, tile_q, tile_k)


def _foresee_attention(
    q, k, v, bias, tiles, counts, expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k, compensate=False
) -> None:
    _foresee(q, v, bias, expr, expr_in, tile_q, tile_k, softcap, None)


@register(
    "tile_attention_v1",
    *("cpu", "cpp"),
    supports=_attention_fits,
    ready=cpp.usable,
    foresee=_foresee_attention,
    preferred=True,
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
) -> tuple[Tensor, Tensor]:
    """`spt::tile_attention_v1`; see there."""
    check_attention(q, k, v, bias, tiles, counts, seed, p, empty, tile_q, tile_k)
    tiles, counts = in_use(tiles, counts, q.shape[2], tile_q)
    rest = (expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k)
    if cpu_attention.fused(q, k, v, bias, counts, expr, p, softcap):
        return cpu_attention.tile_attention(q, k, v, bias, tiles, counts, *rest)
    masks = split(bias, expr, expr_in, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), torch.float32)
    try:
        call = _Call(q, k, v, masks, tile_q, tile_k, scale, softcap)
    except SPTError as error:
        cpp.give_up(str(error))
        return cpu_attention.tile_attention(q, k, v, bias, tiles, counts, *rest)
    out = attention_output(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call.set(tiles=tiles, counts=counts, slots=tiles.shape[3], lse=lse)
    call.tensor("out", out)
    call.run("attend")
    fill_empty(out, lse, v, masks, seed, p, empty)
    return out, lse


def _backward_fits(
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
) -> bool:
    wants_bias = needs[3] and bias is not None and bias.is_floating_point()
    return p == 0 and not compensate and not wants_bias and _fits(q, k, v, bias, expr, expr_in, tile_q, tile_k)


@register("tile_attention_backward_v1", "cpu", "cpp", supports=_backward_fits, ready=cpp.usable, preferred=True)
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
) -> list[Tensor]:
    """`spt::tile_attention_backward_v1`; see there."""
    tiles, counts = in_use(tiles, counts, q.shape[2], tile_q)
    arguments = (grad_out, q, k, v, bias, out, lse, tiles, counts, expr, expr_in, seed, p, scale, softcap, empty, tile_q, tile_k)
    coarse = bool(((lse.abs() > cpu_attention.LSE_LIMIT / LOG2E) & (lse != -torch.inf)).any())
    if coarse or cpu_attention.fused(q, k, v, bias, counts, expr, p, softcap):
        return cpu_attention.tile_attention_backward(*arguments, needs)
    masks = split(bias, expr, expr_in, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), torch.float32)
    try:
        call = _Call(q, k, v, masks, tile_q, tile_k, scale, softcap)
    except SPTError as error:
        cpp.give_up(str(error))
        return cpu_attention.tile_attention_backward(*arguments, needs)
    grads = [x.new_empty(x.shape) if need else x.new_empty(0) for x, need in zip((q, k, v), needs, strict=False)]
    shared = {name: g for name, g, need in zip(("grad_q", "grad_k", "grad_v"), grads, needs, strict=False) if need}
    call.set(tiles=tiles, counts=counts, slots=tiles.shape[3], lse=lse.contiguous())
    call.tensor("out", out)
    call.tensor("grad_out", grad_out)
    call.set(**shared)
    n_splits, lanes = call.values["splits"], call.library.lanes()
    partial = None
    if n_splits > 1 and (needs[1] or needs[2]):
        widths = [-(-n // lanes) * lanes for n in (q.shape[3], v.shape[3])]
        partial = torch.empty(call.units, n_splits, call.n_key_tiles * tile_k * sum(widths))
        call.set(partial=partial)
    call.run("attend_backward")
    if partial is not None:
        total = partial.sum(1)
        at = call.n_key_tiles * tile_k * widths[0]
        for grad, need, part, width in (
            (grads[1], needs[1], total[:, :at], widths[0]),
            (grads[2], needs[2], total[:, at:], widths[1]),
        ):
            if need:
                rows = part.view(*k.shape[:2], call.n_key_tiles * tile_k, width)
                grad.copy_(rows[:, :, : k.shape[2], : grad.shape[3]])
    if needs[2]:
        add_empty_grad(grads[2], grad_out, lse, masks, seed, p, empty)
    return [*grads, q.new_empty(0)]
