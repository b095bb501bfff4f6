"""T1 and T2: tile-sparse attention, selection included, against the best dense attention and FlexAttention.

(At 2048 tokens and below T1 asks for the dense speed, which dispatch gives by leaving the site dense.)

FlexAttention gets the very block mask that our selection chose, which it did not have to compute.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .common import Bench, Case, backward_of, profile

PART = "attention"
# Llama-3-8B: 32 query heads, 8 key heads, 128 values each. Tokens -> sequences in a batch.
LENGTHS = {2048: 8, 4096: 4, 8192: 2, 16384: 1, 65536: 1}
DENSITIES = (1 / 8, 1 / 16)
# (target, density, tokens) -> speed-up over the best dense attention, forward and backward.
GOALS = {("T1", 1 / 8, 8192): 1.5, ("T1", 1 / 8, 16384): 2.3, ("T1", 1 / 8, 65536): 2.3, ("T1", 1 / 16, 65536): 4.0}
TILE = (64, 16)


def cases(dry: bool) -> list[Case]:
    """One per length; those with a goal of T1 first, the largest gain predicted last."""
    lengths = {96: 1} if dry else LENGTHS
    goals = {tokens for _, _, tokens in GOALS}
    return [
        Case(f"{batch} x {n}", functools.partial(run, length=n, batch=batch), 60 if n < 65536 else 110, dry or n in goals)
        for n, batch in lengths.items()
    ]


def run(bench: Bench, length: int, batch: int) -> None:
    """Dense attention of a length, and sparse of every density."""
    heads, groups, dim = (2, 1, 16) if bench.dry else (32, 8, 128)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, h, length, dim, dtype=bench.dtype, device=bench.device, requires_grad=True)
        for h in (heads, groups, groups)
    )
    grad = torch.randn_like(q)
    dense = _dense(bench, f"{batch} x {length}", q, k, v, grad)
    for density in DENSITIES[:1] if bench.dry else DENSITIES:
        _sparse(bench, f"{batch} x {length} density 1/{round(1 / density)}", density, length, dense, q, k, v, grad)


def _both(bench: Bench, case: str, what: str, make: Any, leaves: list[Tensor], grad: Tensor, pairs: float) -> float | None:
    """Times forward, and forward with backward. Returns: milliseconds of both, None if one cannot run."""
    dim = leaves[0].shape[-1]
    forward = bench.attempt(PART, case, f"{what} forward", lambda: make, flops=4 * pairs * dim)

    def step() -> None:
        backward_of(make(), grad, leaves)

    both = bench.attempt(PART, case, f"{what} forward and backward", lambda: step, flops=14 * pairs * dim)
    return None if forward is None else both


def _dense(bench: Bench, case: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[float | None, float]:
    """Milliseconds of the fastest dense attention, and its pairs of query and key."""
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * (q.shape[2] + 1) / 2
    times = []
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if q.shape[2] <= 4096:
        backends["materialised"] = SDPBackend.MATH
    for name, backend in backends.items():

        def dense(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        both = _both(bench, case, f"dense {name}", dense, [q, k, v], grad, pairs)
        if both is not None and name != "materialised":
            times.append(both)
    return (min(times) if times else None), pairs


def _sparse(
    bench: Bench,
    case: str,
    density: float,
    length: int,
    dense: tuple[float | None, float],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
) -> None:
    ops = torch.ops.spt
    scale, budget = q.shape[-1] ** -0.5, torch.tensor([density], device=q.device)
    codebook = torch.randn(k.shape[1], k.shape[3] // 8, 16, 8, device=q.device)
    mean = k.detach().float().mean((0, 2))

    def select(rule: str) -> tuple[Tensor, Tensor]:
        state = (codebook, mean) if rule == "pq" else (None, None)
        return ops.select_tiles_v1(q.detach(), k.detach(), None, "k <= q", [], *state, budget, density, *TILE, scale, None, rule, 0)

    masked = ("k <= q", [], None, 0.0, scale, None, "zero", *TILE, False)
    for rule in ("pq", "mean"):
        bench.attempt(PART, case, f"spt selection {rule}", lambda r=rule: lambda: select(r))
    tiles, counts = select("pq")
    pairs = kept_pairs(tiles, counts, q.shape[2]) * (q.shape[1] // k.shape[1])

    def attend() -> Tensor:
        return ops.tile_attention_v1(q, k, v, None, tiles, counts, *masked)[0]

    def everything() -> Tensor:
        return ops.tile_attention_v1(q, k, v, None, *select("pq"), *masked)[0]

    _both(bench, case, "spt attention", attend, [q, k, v], grad, pairs)
    ours = _both(bench, case, "spt selection and attention", everything, [q, k, v], grad, pairs)
    _flex(bench, case, (tiles, counts), [q, k, v], grad, pairs)
    for (name, at, tokens), goal in GOALS.items():
        if (at, tokens) == (density, length):
            best = dense[0]
            bench.target(f"{name} {case}", case, best / ours if best and ours else None, goal)
    if ours and dense[0]:
        # T2: products per second on the pairs that are computed, relative to dense flash.
        efficiency = (pairs / ours) / (dense[1] / dense[0])
        bench.target(f"T2 efficiency {case}", case, efficiency, 0.6)
    dim, size = q.shape[-1], q.element_size()
    rows, keys = size * q.numel(), size * k.numel()  # bytes of one tensor; each read or written once at least
    work = {
        "tile_attention_fwd_kernel": (4 * pairs * dim, 2.0 * rows + 2 * keys),
        "tile_attention_bwd_kernel_dq": (6 * pairs * dim, 4.0 * rows + 2 * keys),
        "tile_attention_bwd_kernel_dkdv": (8 * pairs * dim, 2.0 * rows + 4 * keys),
    }
    profile(bench, "profile", f"attention {case}", lambda: backward_of(everything(), grad, [q, k, v]), work)


def kept_pairs(tiles: Tensor, counts: Tensor, length: int) -> float:
    """Visible pairs of query and key in the listed tiles of a causal self-attention, per query head of a group."""
    n_tiles = -(-length // TILE[1])
    listed = torch.arange(tiles.shape[3], device=tiles.device) < counts.unsqueeze(-1)
    first_query = torch.arange(tiles.shape[2], device=tiles.device).view(1, 1, -1, 1) * TILE[0]
    queries = (length - first_query).clamp(max=TILE[0])
    first_key = tiles.clamp(0, n_tiles - 1) * TILE[1]
    # For query r of the tile: keys of the tile up to r. Summed over r in closed form: tile edges are multiples.
    total = torch.zeros((), dtype=torch.float64, device=tiles.device)
    for r in range(TILE[0]):
        visible = (first_query + r - first_key + 1).clamp(0, TILE[1])
        visible = torch.minimum(visible, (length - first_key).clamp(min=0))
        total += torch.where(listed & (queries > r), visible, 0).sum()
    return float(total)


def _flex(bench: Bench, case: str, lists: tuple[Tensor, Tensor], leaves: list[Tensor], grad: Tensor, pairs: float) -> None:
    """FlexAttention over 128 x 128 blocks that hold a kept tile, with our tiles as its mask."""
    (tiles, counts), (q, k, v) = lists, leaves

    def make() -> Any:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        n_q, n_k = -(-q.shape[2] // TILE[0]), -(-k.shape[2] // TILE[1])
        kept = torch.zeros(*tiles.shape[:3], n_k + 1, dtype=torch.bool, device=q.device)
        listed = torch.arange(tiles.shape[3], device=q.device) < counts.unsqueeze(-1)
        kept.scatter_(3, torch.where(listed, tiles, n_k).long(), True)
        group = q.shape[1] // k.shape[1]

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & kept[b, h // group, i // TILE[0], j // TILE[1]]

        # create_block_mask would hold a byte per pair of query and key.
        side = 128
        tall, wide = side // TILE[0], side // TILE[1]
        blocks = F.pad(kept[:, :, :n_q, :n_k], (0, -n_k % wide, 0, -n_q % tall))
        blocks = blocks.unflatten(3, (-1, wide)).unflatten(2, (-1, tall)).any(5).any(3).repeat_interleave(group, 1)
        index = blocks.int().argsort(dim=3, descending=True, stable=True).int()
        block = BlockMask.from_kv_blocks(blocks.sum(3, dtype=torch.int32), index, BLOCK_SIZE=side, mask_mod=mask)
        attend = flex_attention if bench.dry else torch.compile(flex_attention, dynamic=False)

        def call() -> Tensor:
            return attend(q, k, v, block_mask=block, enable_gqa=True)

        return call

    try:
        call = make()
    except Exception as error:  # see Bench.attempt
        bench.add(PART, case, "flex", skipped=f"{type(error).__name__}: {error}".splitlines()[0][:160])
        return
    _both(bench, case, "flex given the mask", call, [q, k, v], grad, pairs)
