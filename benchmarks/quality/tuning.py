"""Fine-tuning one model in one variant: the loop that drift and parity share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import spt_compiler
from spt_compiler import calibrate

from . import attention, language_models, texts

_WARM_ROUNDS = 5  # compile, and the updates after the first, second and fourth step
AUXILIARY_WEIGHT = 1e-2  # the paper's weight of its PQ loss


@dataclass(frozen=True)
class Variant:
    """One way to fine-tune.

    Attributes:
        options: of the backend; None: dense.  baseline: what the default is to be no worse than.  window: attention is dense over
            a window + sink mask, tile for tile as many pairs as the product reads.  paper: routers and codebooks are trained by
            gradients, with the auxiliary loss.
    """

    name: str
    options: dict[str, Any] | None
    baseline: bool = False
    window: bool = False
    paper: bool = False


DENSITY = {"attention.density": 1 / 4, "ffn.density": 1 / 2}
_EVERY_SIZE = {"attention.min_keys": 0, "ffn.min_width": 0}
VARIANTS = (
    Variant("dense", None),
    Variant("balanced", {**DENSITY, **_EVERY_SIZE}),
    Variant("finer", {**DENSITY, **_EVERY_SIZE, "ffn.blocks": 16}),
    Variant("paper", {**DENSITY, "preset": "paper"}, baseline=True, paper=True),
    Variant("static", {**DENSITY, **_EVERY_SIZE, "ffn.router": "static"}, baseline=True),
    Variant("window", {**DENSITY, **_EVERY_SIZE, "attention.min_keys": 10**9}, baseline=True, window=True),
)


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune: AdamW, linear warm-up, one domain; `run` lets the rate fall to zero over its steps."""

    steps: int
    shape: tuple[int, int] = (1, 1024)  # sequences, tokens
    learning_rate: float = 5e-4
    lora_rank: int = 0  # 0: full fine-tuning
    evaluations: int = 5
    heldout: int = 8  # sequences
    domain: str = "english"


def window_mask(n: int, density: float) -> Tensor:
    """[1, 1, n, n] bool: causal attention to the forced tiles and the nearest ones, as many tiles as the density allows."""
    tiles, counts = attention.choose_tiles(attention.window_mass(n)[None, None], n, density, causal=True)
    kept = attention.reference.kept_by_tiles(tiles, counts, 1, n, n, *attention.TILE)
    return kept & torch.ones(n, n, dtype=torch.bool).tril()


class Tuning:
    """A model being fine-tuned; `step` and `evaluate` as often as wanted."""

    def __init__(self, start: Path, variant: Variant, recipe: Recipe, seed: int, *, inner: str = "eager", **options: Any):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        self.variant, self.recipe, self.seed = variant, recipe, seed
        self.text, heldout = texts.read_by(start, recipe.domain)
        self.heldout = texts.spread(heldout, (recipe.heldout, recipe.shape[1]))
        model = language_models.load(start)
        rate = recipe.learning_rate
        if recipe.lora_rank:
            import peft

            rank = recipe.lora_rank
            model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
            rate *= 4
        model.train()
        self.model, self.inputs = model, {}
        if variant.options is not None:
            model.compile(backend="spt", options={"inner": inner, **variant.options, **options})
        elif inner != "eager":
            model.compile(backend=inner)
        if variant.window:
            mask = window_mask(recipe.shape[1], DENSITY["attention.density"])
            self.inputs = {"attention_mask": mask}
        parameters = [p for p in model.parameters() if p.requires_grad]
        if variant.paper:
            batch = self._batch(0)
            spt_compiler.prepare(model, input_ids=batch, labels=batch)
            parameters += spt_compiler.parameters(model)
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
        self.rate, self.done = rate, 0
        self.decays_over: int | None = None  # steps until the rate is zero; None: it stays

    def _batch(self, step: int) -> Tensor:
        return texts.batch(self.text, self.recipe.shape, seed=self.seed * 1_000_003 + step)

    def step(self) -> float:
        """One optimizer step; returns the training loss."""
        batch = self._batch(self.done)
        left = 1.0 if self.decays_over is None else 1 - self.done / self.decays_over
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.done + 1) / 10) * left
        loss = self.model(input_ids=batch, labels=batch, **self.inputs).loss
        total = loss + AUXILIARY_WEIGHT * spt_compiler.auxiliary_loss(self.model) if self.variant.paper else loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.item()

    def evaluate(self) -> float:
        """Held-out loss, as sparse as in training."""
        return language_models.heldout_loss(self.model, self.heldout, **self.inputs)

    def evaluate_dense(self) -> float:
        """Held-out loss of the same weights, run dense."""
        with spt_compiler.dense():
            return language_models.heldout_loss(self.model, self.heldout)


def run(start: Path, variant: Variant, recipe: Recipe, seed: int, log: Callable[[str], None]) -> dict[str, Any]:
    """A whole fine-tuning.

    Returns: {"heldout": [(steps, loss), ...], "dense": loss of the final weights without sparsity, "train": mean loss of the
        last tenth, "cpu_seconds": of the steps alone, "upkeep_seconds": the part of it between the steps, in which sites learn
        and are judged}.
    """
    tuning = Tuning(start, variant, recipe, seed)
    # At a constant rate the last step's loss differs by two per cent between runs of one variant: more than variants do.
    tuning.decays_over = recipe.steps
    heldout = []
    losses, seconds, upkeep = [], 0.0, _Upkeep()
    every = max(1, recipe.steps // recipe.evaluations)
    for step in range(recipe.steps):
        began = time.process_time()
        with mock.patch.object(calibrate, "maintain", upkeep):
            losses.append(tuning.step())
        seconds += time.process_time() - began
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            heldout.append((step + 1, tuning.evaluate()))
    log(f"{variant.name}, seed {seed}, LoRA rank {recipe.lora_rank}: held-out {heldout[-1][1]:.4f} in {seconds:.0f} s of CPU")
    tail = losses[-max(1, recipe.steps // 10) :]
    return {
        "heldout": heldout,
        "dense": tuning.evaluate_dense(),
        "train": statistics.fmean(tail),
        "cpu_seconds": seconds,
        "upkeep_seconds": upkeep.seconds,
    }


class _Upkeep:
    """`calibrate.maintain`, with an account of the CPU time that it takes."""

    def __init__(self) -> None:
        self.seconds, self._maintain = 0.0, calibrate.maintain

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        began = time.process_time()
        self._maintain(*args, **kwargs)
        self.seconds += time.process_time() - began


def step_times(start: Path, recipe: Recipe, rounds: int, inner: str) -> dict[str, Any]:
    """Seconds of a step by variant: all variants in one process, in turns, so that other load meets all alike.

    Returns: {variant: {"seconds": median, "ratio": median of its step's time to the dense one's of the same round}}. "window"
        is left out: as a mask it costs what dense attention costs.
    """
    variants = [v for v in VARIANTS if not v.window]
    sides = []
    for variant in variants:
        side = Tuning(start, variant, recipe, seed=0, inner=inner)
        sides.append((variant.name, side, []))
    for round_ in range(_WARM_ROUNDS + rounds):
        for _, side, seconds in sides:
            began = time.perf_counter()
            side.step()
            if round_ >= _WARM_ROUNDS:
                seconds.append(time.perf_counter() - began)
    dense = sides[0][2]
    return {
        name: {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(s / d for s, d in zip(seconds, dense, strict=True)),
        }
        for name, _, seconds in sides
    }
