"""Inputs and an independent oracle for the tests of sparse attention: odd sizes, D != Dv, strided, masks of every kind."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spt_compiler.ops import reference

MASKS = (
    "none",
    "causal",
    "padding",
    "causal padding",
    "bool",
    "float",
    "finfo",
    "window",
    "head bias",
    "empty rows",
)


@dataclass
class Case:
    """Arguments of the ops, but for the lists."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    expr: str = ""
    expr_in: list[Tensor] = field(default_factory=list)
    codebook: Tensor | None = None
    key_mean: Tensor | None = None
    scale: float = 0.3
    softcap: float | None = None
    seed: Tensor | None = None
    p: float = 0.0
    empty: str = "zero"
    tile_q: int = 32
    tile_k: int = 8
    compensate: bool = False

    def select_tiles_args(self, density: float = 0.3, rule: str = "pq", max_density: float | None = None, min_keys: int = 0):
        most = density if max_density is None else max_density
        budget = torch.tensor([density])
        head = (self.q, self.k, self.bias, self.expr, self.expr_in, self.codebook, self.key_mean, budget, most)
        return (*head, self.tile_q, self.tile_k, self.scale, self.softcap, rule, min_keys)

    def select_keys_args(self, density: float = 0.3, rule: str = "pq", max_density: float | None = None, min_keys: int = 0):
        most = density if max_density is None else max_density
        budget = torch.tensor([density])
        head = (self.q, self.k, self.bias, self.expr, self.expr_in, self.codebook, self.key_mean, budget, most)
        return (*head, self.scale, self.softcap, rule, min_keys)

    def attend_args(self, index: Tensor, counts: Tensor, tiles: bool = True):
        tail = (self.tile_q, self.tile_k, *([True] if self.compensate else [])) if tiles else ()
        head = (self.q, self.k, self.v, self.bias, index, counts, self.expr, self.expr_in)
        return (*head, self.seed, self.p, self.scale, self.softcap, self.empty, *tail)

    def allowed(self) -> Tensor:
        """[B, H, Tq, Tk] bool, computed here and not by the package."""
        batch, heads, n_q, _ = self.q.shape
        n_k = self.k.shape[2]
        allowed = torch.ones(batch, heads, n_q, n_k, dtype=torch.bool)
        row, column = torch.arange(n_q).unsqueeze(1), torch.arange(n_k)
        if "k <= q" in self.expr and "+" not in self.expr:
            allowed &= column <= row
        if "t0[b, k]" in self.expr:
            allowed &= self.expr_in[0][:, None, None]
        if "q - k" in self.expr:
            allowed &= (column <= row + 10) & (row - column < 30)
        if self.bias is not None:
            allowed &= self.bias if self.bias.dtype == torch.bool else self.bias > -torch.inf
        return allowed


def make(
    mask: str = "none",
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    n_q: int = 100,
    n_k: int = 100,
    dim: int = 24,
    dim_v: int = 20,
    dtype: torch.dtype = torch.float64,
    strided: bool = True,
    **options,
) -> Case:
    """A random case; `strided` inputs are transposed views, as models produce them."""

    def draw(n_heads: int, length: int, width: int) -> Tensor:
        if strided:
            return torch.randn(batch, length, n_heads, width + 3, dtype=dtype)[..., :width].transpose(1, 2)
        return torch.randn(batch, n_heads, length, width, dtype=dtype)

    case = Case(draw(heads, n_q, dim), draw(groups, n_k, dim), draw(groups, n_k, dim_v), **options)
    case.codebook = torch.randn(groups, dim // 4, 16, 4, dtype=torch.float32)
    case.key_mean = 0.3 * torch.randn(groups, dim)
    keys = torch.ones(batch, n_k, dtype=torch.bool)
    keys[0, -n_k // 4 :] = False
    keys[-1, : n_k // 6] = False
    if mask == "causal":
        case.expr = "k <= q"
    elif mask == "padding":
        case.expr, case.expr_in = "t0[b, k]", [keys]
    elif mask == "causal padding":
        case.expr, case.expr_in = "k <= q & t0[b, k]", [keys]
    elif mask == "bool":
        case.bias = torch.rand(batch, 1, n_q, n_k) > 0.3
        case.bias[:, :, : n_q // 2, 3:25] = False
    elif mask == "float":
        case.bias = torch.randn(1, heads, n_q, n_k, dtype=dtype).masked_fill(torch.rand(1, heads, n_q, n_k) > 0.8, -torch.inf)
    elif mask == "finfo":
        # What models add to masked positions; row 5 of the first sequence has nothing else.
        case.bias = torch.zeros(batch, 1, n_q, n_k, dtype=dtype)
        case.bias[:, :, :, :10] = torch.finfo(dtype if dtype != torch.float64 else torch.float32).min
        case.bias[0, :, 5] = case.bias[0, 0, 0, 0]
    elif mask == "window":
        case.expr = "k <= q + 10 & q - k < 30"
    elif mask == "head bias":
        case.bias = torch.randn(1, heads, 1, n_k, dtype=dtype)
    elif mask == "empty rows":
        case.bias = torch.rand(batch, 1, n_q, n_k) > 0.3
        case.bias[:, :, 3] = False
        case.bias[0, :, 10 : 10 + n_q // 2] = False
    elif mask != "none":
        raise AssertionError(mask)
    return case


def oracle(case: Case, kept: Tensor) -> Tensor:
    """Attention over kept [B, H, Tq, Tk] bool by plain autograd-able torch, softmax and all, in fp64."""
    group = case.q.shape[1] // case.k.shape[1]
    q, k, v = case.q.double(), *(x.double().repeat_interleave(group, 1) for x in (case.k, case.v))
    logits = q @ k.transpose(-1, -2) * case.scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    if case.bias is not None and case.bias.dtype != torch.bool:
        logits = logits + case.bias.double()
    allowed = case.allowed()
    logits = logits.masked_fill(~(allowed & kept), -torch.inf)
    seen = (allowed & kept).any(-1, keepdim=True)
    prob = logits.masked_fill(~seen, 0).softmax(-1) * seen
    nothing = ~allowed.any(-1, keepdim=True)
    if case.empty == "uniform":
        prob = torch.where(nothing, 1 / k.shape[2], prob)
    if case.p > 0:
        batch, heads, n_q, n_k = prob.shape
        index = torch.arange(batch * heads * n_q * n_k).view(prob.shape)
        prob = prob * reference.dropout_keep(case.seed, index, case.p) / (1 - case.p)
    out = prob @ v
    return torch.where(nothing, torch.nan, out) if case.empty == "nan" else out


def compensated_oracle(case: Case, kept: Tensor) -> Tensor:
    """Attention over kept pairs and one pseudo-key per dropped tile that a query sees whole, by autograd-able loops, in fp64."""
    group = case.q.shape[1] // case.k.shape[1]
    q, k, v = case.q.double(), *(x.double().repeat_interleave(group, 1) for x in (case.k, case.v))
    allowed, n_k = case.allowed(), k.shape[2]
    bias = torch.zeros((), dtype=torch.float64)
    if case.bias is not None and case.bias.dtype != torch.bool:
        bias = case.bias.double()
    bias = bias.expand(allowed.shape)

    def cap(x: Tensor) -> Tensor:
        return x if case.softcap is None else case.softcap * torch.tanh(x / case.softcap)

    logits = [(cap(q @ k.transpose(-1, -2) * case.scale) + bias).masked_fill(~(allowed & kept), -torch.inf)]
    values, first = [v], list(range(n_k))
    for start in range(0, n_k, case.tile_k):
        tile = slice(start, min(start + case.tile_k, n_k))
        there = allowed[..., tile].all(-1) & ~kept[..., start]
        level = bias[..., tile].masked_fill(~there.unsqueeze(-1), 0).logsumexp(-1)
        logit = cap((q @ k[:, :, tile].mean(2, keepdim=True).transpose(-1, -2)).squeeze(-1) * case.scale) + level
        logits.append(logit.masked_fill(~there, -torch.inf).unsqueeze(-1))
        values.append(v[:, :, tile].mean(2, keepdim=True))
        first.append(start)
    logit = torch.cat(logits, -1)
    seen = (logit > -torch.inf).any(-1, keepdim=True)
    prob = logit.masked_fill(~seen, 0).softmax(-1) * seen
    if case.p > 0:
        rows = torch.arange(prob[..., 0].numel()).view(*prob.shape[:3], 1) * n_k
        prob = prob * reference.dropout_keep(case.seed, rows + torch.tensor(first), case.p) / (1 - case.p)
    return prob @ torch.cat(values, 2)


def everything(case: Case) -> Tensor:
    """The mask that keeps all pairs."""
    return torch.ones(*case.q.shape[:3], case.k.shape[2], dtype=torch.bool)


def kept_tiles(case: Case, tiles: Tensor, counts: Tensor) -> Tensor:
    """[B, H, Tq, Tk] bool: the pairs a tile list keeps, by loops."""
    batch, heads, n_q, _ = case.q.shape
    n_k = case.k.shape[2]
    group = heads // case.k.shape[1]
    kept = torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(tiles.shape[2]):
                rows = slice(i * case.tile_q, (i + 1) * case.tile_q)
                count = int(counts[b, h // group, i])
                if count < 0:
                    kept[b, h, rows] = True
                for j in tiles[b, h // group, i, : max(count, 0)].tolist():
                    kept[b, h, rows, j * case.tile_k : (j + 1) * case.tile_k] = True
    return kept


def kept_keys(case: Case, keys: Tensor, counts: Tensor) -> Tensor:
    """[B, H, Tq, Tk] bool: the pairs a key list keeps, by loops."""
    kept = torch.zeros(*case.q.shape[:3], case.k.shape[2], dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        b, h, i = place
        count = int(counts[b, h, i])
        if count < 0:
            kept[b, h, i] = True
        else:
            kept[b, h, i, keys[b, h, i, :count].long()] = True
    return kept


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected; NaN and infinities must agree in place.

    Gradients that are zero but for rounding count as of size 1e-3.
    """
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = (x.detach().double().masked_fill(~finite, 0) for x in (actual, expected))
    return rms(actual - expected) / max(rms(expected), 1e-3)
