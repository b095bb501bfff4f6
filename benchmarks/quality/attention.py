"""Attention mass kept and relative output error against density, for the product's selection rules and for baselines.

The codebooks are those that the backend has learned from other text of the same domain (`subjects.learn`); queries, keys and
values are those of the dense model. The product's rules run through its own operators. Baselines keep as many tiles (or keys)
as they do, under the same forced tiles:

- oracle: the largest true attention mass of a tile, or the largest true scores of single keys;
- window + sink: the nearest, and the first tile (or four keys);
- random: seeded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import spt_compiler.backend  # noqa: F401  (registers the operators and their CPU path)
from spt_compiler.ops import reference

from . import subjects
from .subjects import Heads, Subject, attention_inputs

DENSITIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
TILE_RULES = ("oracle tile", "pq tile", "mean tile", "window tile", "random tile")
KEY_RULES = ("oracle token", "pq token", "pq-match token", "window token", "random token")
RULES = TILE_RULES + KEY_RULES
TILE = (64, 16)
SINKS = 4
_ONLY_ATTENTION = {"attention.min_keys": 0, "ffn.min_width": 10**9}


def measure(subject: Subject) -> dict[str, Any]:
    """{rule: {density: [mass, error]}}: means over the layers and the held-out sequences of the subject.

    Mass: share of the softmax mass on the kept keys, mean over queries and heads. Error: norm of the difference of a layer's
    outputs (all heads, before the output projection) relative to the norm of the dense one.
    """
    learned = subjects.learn(subject, _ONLY_ATTENTION)
    states = [state.tensors for state in learned.of("attention")]
    head_dim = states[0]["key_mean"].shape[1]
    # Codes are compared in subspaces 8 wide, as the paper does, and single keys scored in such of 4: the backend's own choices.
    by_key = subjects.learn(subject, {**_ONLY_ATTENTION, "attention.subspaces": max(1, head_dim // 4)})
    single = [state.tensors for state in by_key.of("attention")]
    wide = subjects.learn(subject, {**_ONLY_ATTENTION, "attention.subspaces": max(1, head_dim // 8)})
    matching = [state.tensors for state in wide.of("attention")]
    sums: dict[str, dict[str, list[float]]] = {rule: {f"{d:.4f}": [0.0, 0.0] for d in DENSITIES} for rule in RULES}
    n = 0
    for ids in subject.heldout:
        layers = attention_inputs(subject, ids)
        assert len(layers) == len(states), f"{len(layers)} attention layers, {len(states)} sites"
        for heads, state, key_state, match_state in zip(layers, states, single, matching, strict=True):
            books = {"pq": state, "pq of keys": key_state, "pq-match": match_state}
            layer = _Layer(heads, books, causal=subject.causal, seed=n)
            n += 1
            for rule in RULES:
                for density in DENSITIES:
                    mass, error = layer.quality(rule, density)
                    total = sums[rule][f"{density:.4f}"]
                    total[0] += mass
                    total[1] += error
    return {rule: {d: [a / n, b / n] for d, (a, b) in by_density.items()} for rule, by_density in sums.items()}


class _Layer:
    """One attention layer on one sequence: what is kept under each rule, and what that costs."""

    def __init__(self, heads: Heads, codebooks: dict[str, dict[str, Tensor]], *, causal: bool, seed: int):
        """codebooks: {rule: {"codebook", "key_mean"}} of the rules "pq" (on single keys: "pq of keys") and "pq-match"."""
        self.heads, self.causal = heads, causal
        self.codebooks = {rule: (t["codebook"].detach(), t["key_mean"].detach()) for rule, t in codebooks.items()}
        self.expr = "k <= q" if causal else ""
        self.generator = torch.Generator().manual_seed(seed)
        _, self.n_heads, self.n, _ = heads.q.shape
        self.n_groups = heads.k.shape[1]
        group = self.n_heads // self.n_groups
        position = torch.arange(self.n)
        allowed = position <= position[:, None] if causal else torch.ones(self.n, self.n, dtype=torch.bool)
        self.allowed = allowed.expand(1, self.n_heads, -1, -1)
        k = heads.k.repeat_interleave(group, dim=1)
        self.v = heads.v.repeat_interleave(group, dim=1)
        self.logits = torch.where(allowed, heads.q @ k.mT * heads.scale, -torch.inf)
        self.prob = self.logits.softmax(-1)
        self.dense = self.prob @ self.v
        self.offset = position - position[:, None]
        self.window_rank = self._window_rank()
        self._sorted: dict[str, tuple[Tensor, Tensor]] = {}  # scores of the allowed keys, and the same in falling order

    def quality(self, rule: str, density: float) -> tuple[float, float]:
        """(mass kept, relative output error)."""
        kept = self._kept(rule, density)
        prob = torch.where(kept & self.allowed, self.prob, 0)
        mass = prob.sum(-1, keepdim=True)
        # A row without any kept key gives zero, as the operators do.
        out = (prob @ self.v) / mass.clamp_min(1e-30)
        return mass.mean().item(), ((out - self.dense).norm() / self.dense.norm()).item()

    def _kept(self, rule: str, density: float) -> Tensor:
        name, granularity = rule.split()
        if granularity == "tile":
            return self._tiles(name, density)
        if name in ("pq", "pq-match"):
            book = "pq of keys" if name == "pq" and "pq of keys" in self.codebooks else name
            keys, counts = torch.ops.spt.select_keys_v1(*self._selection(book, density), self.heads.scale, None, name, 0)
            return reference.listed(keys, counts, self.n)
        count = _ceil(density * self.n)
        if name == "window":
            return self.window_rank < count
        if name not in self._sorted:
            scores = self.logits if name == "oracle" else torch.rand(self.logits.shape, generator=self.generator)
            scores = torch.where(self.allowed, scores, -torch.inf)
            self._sorted[name] = scores, scores.sort(-1, descending=True).values
        scores, in_order = self._sorted[name]
        return scores >= in_order[..., count - 1 : count]  # all allowed keys where fewer are allowed

    def _selection(self, rule: str, density: float) -> tuple:
        """The leading arguments of both selection operators, up to the maximal density."""
        q, k, budget = self.heads.q, self.heads.k, torch.tensor([density])
        return q, k, None, self.expr, [], *self.codebooks.get(rule, (None, None)), budget, density

    def _window_rank(self) -> Tensor:
        """[T, T]: place of each key in the order first keys, nearest, farther; keys not allowed come last."""
        distance = self.offset.abs().float().masked_fill(torch.arange(self.n) < SINKS, -1.0)
        return distance.masked_fill(~self.allowed[0, 0], torch.inf).argsort(dim=-1, stable=True).argsort(-1)

    def _tiles(self, name: str, density: float) -> Tensor:
        if name in ("pq", "mean"):
            tiles, counts = torch.ops.spt.select_tiles_v1(*self._selection(name, density), *TILE, self.heads.scale, None, name, 0)
        else:
            tiles, counts = choose_tiles(self._tile_mass(name), self.n, density, causal=self.causal)
        return reference.kept_by_tiles(tiles, counts, self.n_heads, self.n, self.n, *TILE)

    def _tile_mass(self, name: str) -> Tensor:
        """[1, Hkv, nQ, nK], what the rule goes by."""
        n_rows, n_tiles = -(-self.n // TILE[0]), -(-self.n // TILE[1])
        shape = (1, self.n_groups, n_rows, n_tiles)
        if name == "random":
            return torch.rand(shape, generator=self.generator)
        if name == "window":
            return window_mass(self.n).expand(shape)
        pad = (0, n_tiles * TILE[1] - self.n, 0, n_rows * TILE[0] - self.n)
        prob = torch.nn.functional.pad(self.prob, pad).unflatten(1, (self.n_groups, -1)).sum(2)
        return prob.unflatten(-1, (n_tiles, TILE[1])).sum(-1).unflatten(-2, (n_rows, TILE[0])).sum(-2)


def window_mass(n: int) -> Tensor:
    """[nQ, nK], larger for the tiles nearer to the query tile; the first tile is forced anyway."""
    rows, tiles = torch.arange(-(-n // TILE[0])), torch.arange(-(-n // TILE[1]))
    centre = rows[:, None] * TILE[0] + (TILE[0] - 1) / 2
    return 1 / (1 + (tiles * TILE[1] + (TILE[1] - 1) / 2 - centre).abs())


def choose_tiles(mass: Tensor, n: int, density: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Tiles of largest mass under the budget and the forced tiles of the product: mass [..., nQ, nK] -> (tiles, counts)."""
    rows, tiles = torch.arange(-(-n // TILE[0])), torch.arange(-(-n // TILE[1]))
    last = ((rows + 1) * TILE[0]).clamp(max=n) - 1
    visible = tiles * TILE[1] <= last[:, None] if causal else torch.ones(len(rows), len(tiles), dtype=torch.bool)
    visible = visible.expand(mass.shape)
    forced = reference.preferred_mask(visible, "k <= q" if causal else "", n, n, *TILE, torch.zeros(1, dtype=torch.int64))
    wanted = torch.tensor([_ceil(density * n / TILE[1])])
    return reference.choose_tiles(mass, visible, forced, wanted, len(tiles), torch.zeros(1, dtype=torch.bool))


def _ceil(value: float) -> int:
    return max(1, -int(-value // 1))
