"""FFN error per layer and end-to-end similarity against density, for every router.

The product's routers (option `ffn.router`) learn through the backend from other text of the same domain, and make up for what they
drop. The others are put into the state of the learned one: it without the low-rank correction ("means only") and without any
compensation ("blocks only"); "contiguous + LS", the plain way: blocks as the units lie, a least-squares router, no compensation;
"oracle": the blocks of largest output norm (layer error only).
"""

from __future__ import annotations

from typing import Any

import torch

from spt_compiler import learning, routing

from . import subjects
from .subjects import Hidden, Learned, Subject

DENSITIES = (1 / 2, 1 / 4, 3 / 4)  # in the order of interest
PRODUCT = {
    "learned": {},
    "static": {"ffn.router": "static"},
    "random": {"ffn.router": "random"},
}
ROUTERS = ("oracle", "learned", "learned, means only", "learned, blocks only", "contiguous + LS", "static", "random")
_ONLY_FFN = {"attention.min_keys": 10**9, "ffn.min_width": 0}
_ROWS = 1024  # tokens that a least-squares router is fitted to, as many as the backend samples


def measure(subject: Subject, density: float) -> dict[str, dict[str, float]]:
    """{router: {"error", "cosine", "token_cosine", "loss"}} at one density.

    error: relative output error of a layer on dense inputs, mean over layers. token_cosine: mean over tokens of the cosine
    between the last hidden states of the dense and the sparse model; cosine: the same of their means over a sequence (an
    encoder's sentence embedding). loss: increase of the held-out loss (language models). Attention is dense throughout.
    """
    held = subjects.ffn_activations(subject, subject.heldout)
    fit = subjects.ffn_activations(subject, subject.learning)
    reference = subjects.last_hidden(subject.model, subject, subject.heldout)
    results: dict[str, dict[str, float]] = {}
    for router, options in PRODUCT.items():
        learned = subjects.learn(subject, {**_ONLY_FFN, "ffn.density": density, **options})
        results[router] = _evaluate(subject, learned, held, density, reference)
        if router == "learned":
            results["oracle"] = {"error": _mean_error(learned, held, density, oracle=True)}
            for name, tensor in (("means only", "correction_out"), ("blocks only", "compensation")):
                for state in learned.of("ffn"):
                    state.tensors[tensor].zero_()
                results[f"learned, {name}"] = _evaluate(subject, learned, held, density, reference)
            for state, activations in zip(learned.of("ffn"), fit, strict=True):
                _make_contiguous(state, activations)
            results["contiguous + LS"] = _evaluate(subject, learned, held, density, reference)
    return results


def _make_contiguous(state: Any, fit: Hidden) -> None:
    rows = torch.linspace(0, len(fit.x) - 1, _ROWS).long()
    x, h = fit.x[rows], fit.h[rows]
    permutation = torch.arange(h.shape[1], dtype=torch.int32)
    n_blocks = state.tensors["router_weight"].shape[0]
    weight, bias = routing.fit_router(x, routing.block_norms(h, fit.w_out, permutation, n_blocks))
    state.assign(
        permutation=permutation,
        router_weight=weight,
        router_bias=bias,
        always_on=torch.zeros_like(state.tensors["always_on"]),
    )


def _evaluate(
    subject: Subject, learned: Learned, held: list[Hidden], density: float, reference: tuple[torch.Tensor, float]
) -> dict[str, float]:
    hidden, loss = subjects.last_hidden(learned.model, subject, subject.heldout)
    dense, dense_loss = reference
    cosine = torch.nn.functional.cosine_similarity
    result = {
        "error": _mean_error(learned, held, density),
        "token_cosine": cosine(hidden, dense, dim=-1).mean().item(),
        "cosine": cosine(hidden.mean(1), dense.mean(1), dim=-1).mean().item(),
    }
    return {**result, "loss": loss - dense_loss} if subject.causal else result


@torch.no_grad()
def _mean_error(learned: Learned, held: list[Hidden], density: float, *, oracle: bool = False) -> float:
    states = learned.of("ffn")
    assert len(states) == len(held), f"{len(held)} FFNs, {len(states)} sites"
    return sum(_error(s.tensors, a, density, oracle) for s, a in zip(states, held, strict=True)) / len(states)


def _error(t: dict[str, torch.Tensor], held: Hidden, density: float, oracle: bool) -> float:
    """Relative output error of a layer that routes as its state says, on the inputs of the dense model."""
    n_blocks = t["router_weight"].shape[0]
    n_keep = learning.blocks_kept(density, n_blocks)
    numerator = denominator = 0.0
    for start in range(0, len(held.x), _ROWS):
        x, h = held.x[start : start + _ROWS], held.h[start : start + _ROWS]
        y = routing.block_outputs(h, held.w_out, t["permutation"], n_blocks)  # [S, G, E]
        if oracle:
            kept = routing.choose(y.norm(dim=-1), torch.zeros_like(t["always_on"]), n_keep)
        else:
            scores = torch.nn.functional.linear(x, t["router_weight"].detach(), t["router_bias"].detach())
            kept = routing.choose(scores, t["always_on"], n_keep)
        error = torch.where(kept[..., None], 0.0, y).sum(1) - (~kept).to(y.dtype) @ t["compensation"]
        if not oracle:  # the correction is fitted to what the learned router drops
            features = torch.nn.functional.linear(x, t["correction_in"], t["correction_shift"])
            error -= t["correction_gate"] * (features @ t["correction_out"].t())
        numerator += error.square().sum().item()
        denominator += y.sum(1).square().sum().item()
    return (numerator / max(denominator, 1e-30)) ** 0.5
