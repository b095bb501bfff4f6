"""What is measured, in which order and size; every unit's figures are kept, so that an interrupted run goes on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spt_compiler.cli.training import write_json

from . import attention, drift, ffn, guard, language_models, subjects, tuning
from .language_models import Size
from .tuning import Recipe

PARTS = ("models", "selection", "ffn", "drift", "guard", "parity", "speed")
FULL_MINUTES = 180
# What the full plan takes, in training steps of the LLaMA-like model: 11000 train, some 8000 fine-tune, 1000 are for the rest.
FULL_STEPS = 20_000
_TUNING_KINDS = {"full": 0, "lora": 8}  # -> LoRA rank


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. The full plan is the default; a budget of time shortens training, not the models (`share_for`)."""

    size: Size = Size()
    code_steps: int = 4000
    english_steps: int = 1000
    learning: int = 8  # sequences that sites learn from
    heldout: int = 4  # tokens measured, in sequences of 512 (LMs)
    minilm: int = 4  # sequences measured
    lengths: tuple[int, ...] = language_models.LENGTHS
    ffn_densities: tuple[float, ...] = ffn.DENSITIES
    architectures: tuple[str, ...] = language_models.ARCHITECTURES
    tune: Recipe = Recipe(steps=200)
    drift_steps: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    parity_architectures: tuple[str, ...] = language_models.ARCHITECTURES
    speed_rounds: int = 10
    inner: str = "inductor"  # of the step times

    @staticmethod
    def of_share(share: float) -> Plan:
        """The full plan with this share of its training steps, and fewer sequences measured where it is a small one."""
        few = share < 0.5
        return Plan(
            code_steps=max(200, round(4000 * share)),
            english_steps=max(60, round(1000 * share)),
            heldout=4 if few else 8,
            minilm=2 if few else 8,
            tune=Recipe(steps=max(40, round(200 * share))),
            drift_steps=max(40, round(200 * share)),
        )

    @staticmethod
    def quick() -> Plan:
        """Ten minutes at most: the same questions of small models; its figures show that it works, no more."""
        return Plan(
            size=Size(layers=2, width=128, heads=2, length=512), code_steps=150, english_steps=40, learning=4, heldout=1,
            minilm=1, lengths=(512,), ffn_densities=(1 / 2,), seeds=(0,), parity_architectures=("llama",), drift_steps=24,
            tune=Recipe(steps=16, shape=(1, 512), heldout=4, evaluations=2), speed_rounds=3, inner="eager",
        )  # fmt: skip

    @staticmethod
    def smoke() -> Plan:
        """Seconds: for the tests."""
        return Plan(
            size=Size(layers=1, width=32, heads=2, length=128), code_steps=2, english_steps=1, learning=4, heldout=1,
            minilm=1, lengths=(128,), ffn_densities=(1 / 2,), architectures=("llama",), seeds=(0,),
            parity_architectures=("llama",), tune=Recipe(steps=2, shape=(1, 128), heldout=1, evaluations=1), drift_steps=8,
            speed_rounds=1, inner="eager",
        )  # fmt: skip


def share_for(out: Path, minutes: float | None) -> float:
    """The share of the full plan that fits a budget on this machine, decided when a run begins and kept for when it goes on.

    Args:
        out: folder of the run; its `plan.json` holds the decision.  minutes: the budget; None: that of the run, or FULL_MINUTES.
    Raises: ValueError if the run in `out` was begun with another budget: its figures and new ones would not compare.
    """
    path = out / "plan.json"
    if path.exists():
        begun = json.loads(path.read_text())
        if minutes not in (None, begun["minutes"]):
            raise ValueError(
                f"{out} holds a run for {begun['minutes']:g} minutes, and --budget asks for {minutes:g}: "
                "go on without --budget, or begin another run with --out"
            )
        return begun["share"]
    seconds = language_models.step_seconds(Plan().size)
    minutes = FULL_MINUTES if minutes is None else minutes
    share = min(1.0, max(1, int(100 * minutes * 60 / (FULL_STEPS * seconds))) / 100)
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"minutes": minutes, "step_seconds": seconds, "share": share})
    return share


class Bench:
    """Runs units of a plan and keeps their figures in `out`.

    Args:
        out: folder of results and trained models.  minilm: folder of the pretrained encoder, or None.
        model: folder of one more causal language model, or None.  log: takes lines of text.
    """

    def __init__(self, plan: Plan, out: Path, *, minilm: Path | None, model: Path | None, log: Callable[[str], None]):
        self.plan, self.out, self.minilm, self.model, self.log = plan, out, minilm, model, log
        self.models = out / "models"
        self.commit = _commit()  # now: while a long run goes on, its checkout may move
        out.mkdir(parents=True, exist_ok=True)

    def run(self, only: tuple[str, ...] = PARTS, match: str = "") -> None:
        """Runs every unit of the parts `only` whose name contains `match` and that has no figures yet."""
        for name, unit in self.units():
            path = self.out / f"{name}.json"
            if name.split(".")[0] not in only or match not in name or path.exists():
                continue
            self.log(name)
            began, cpu = time.perf_counter(), time.process_time()
            torch.manual_seed(0)
            value = unit()
            record = {
                "value": value,
                "conditions": {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": self.commit},
                "seconds": time.perf_counter() - began,
            }
            write_json(path, {**record, "cpu_seconds": time.process_time() - cpu})

    def units(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """(name, function) of everything there is to measure, in order; the part is the name's first word."""
        plan = self.plan
        for architecture, domain in itertools.product(plan.architectures, language_models.DOMAINS):
            yield f"models.{architecture}.{domain}", lambda a=architecture, d=domain: self._train(a, d)
        if "llama" in plan.architectures:
            geglu, code = language_models.GEGLU, language_models.DOMAINS[0]
            yield f"models.{geglu}.{code}", lambda: self._train(geglu, code)
            sizes = (plan.learning, max(1, plan.heldout * 512 // plan.lengths[0]))
            for density in plan.ffn_densities:
                name = f"ffn.{geglu}-{code}-{plan.lengths[0]}.{100 * density:.0f}"
                subject = functools.partial(subjects.own, geglu, code, plan.lengths[0], self.models, *sizes)
                yield name, lambda s=subject, d=density: self._ffn(s(), d)
        for name, subject, length in self._subjects():
            yield f"selection.{name}", lambda s=subject: self._selection(s())
            if length in (None, plan.lengths[0]):  # tokens are routed one by one: one length says it all
                for density in plan.ffn_densities:
                    unit = f"ffn.{name}.{100 * density:.0f}"
                    yield unit, lambda s=subject, d=density: self._ffn(s(), d)
        start = self.models / f"{plan.parity_architectures[0]}-{language_models.DOMAINS[0]}"
        recipe = dataclasses.replace(plan.tune, steps=plan.drift_steps)
        for name in ("on", "off"):
            yield f"drift.{name}", lambda n=name: drift.measure(start, recipe, max(2, recipe.steps // 20), learns=n == "on")
        yield "guard", lambda: guard.measure(start, plan.tune, self.log)
        yield "speed", lambda: self._speed(start)
        # Seeds outermost: whenever it stops, the variants have been treated alike.
        given = ("given",) if self.model is not None else ()
        runs = itertools.product((*plan.parity_architectures, *given), plan.seeds, _TUNING_KINDS, tuning.VARIANTS)
        for model, seed, kind, variant in runs:
            name = f"parity.{model}.{kind}.{variant.name}.{seed}"
            yield name, lambda m=model, r=_TUNING_KINDS[kind], v=variant, s=seed: self._tune(m, r, v, s)

    def _subjects(self) -> Iterator[tuple[str, Callable[[], subjects.Subject], int | None]]:
        """(name, function that loads it, context or None where there is but one)."""
        plan = self.plan
        if self.minilm is not None:
            yield "minilm", lambda: subjects.pretrained(self.minilm, False, 512, plan.learning, plan.minilm), None
        for architecture, domain, length in itertools.product(plan.architectures, language_models.DOMAINS, plan.lengths):
            sizes = (plan.learning, max(1, plan.heldout * 512 // length))
            own = functools.partial(subjects.own, architecture, domain, length, self.models, *sizes)
            yield f"{architecture}-{domain}-{length}", own, length
        for length in plan.lengths if self.model is not None else ():
            sizes = (plan.learning, max(1, plan.heldout * 512 // length))
            yield f"given-{length}", functools.partial(subjects.pretrained, self.model, True, length, *sizes), length

    def _train(self, architecture: str, domain: str) -> dict[str, Any]:
        first = domain == language_models.DOMAINS[0] and architecture != language_models.GEGLU
        steps = self.plan.code_steps if first else self.plan.english_steps
        return language_models.train(architecture, domain, self.plan.size, steps, self.models, self.log)

    def _selection(self, subject: subjects.Subject) -> dict[str, Any]:
        return {"name": subject.name, "rules": attention.measure(subject)}

    def _ffn(self, subject: subjects.Subject, density: float) -> dict[str, Any]:
        return {"name": subject.name, "density": density, "routers": ffn.measure(subject, density)}

    def _tune(self, model: str, rank: int, variant: tuning.Variant, seed: int) -> dict[str, Any]:
        given = self.model is not None and model == "given"
        start = self.model if given else self.models / f"{model}-{language_models.DOMAINS[0]}"
        recipe = dataclasses.replace(self.plan.tune, lora_rank=rank)
        name = start.name if given else f"{model} LM"
        return {"name": name, **tuning.run(start, variant, recipe, seed, self.log)}

    def _speed(self, start: Path) -> dict[str, Any]:
        plan, times = self.plan, {}
        for kind, rank in _TUNING_KINDS.items():
            recipe = dataclasses.replace(plan.tune, lora_rank=rank)
            times[kind] = tuning.step_times(start, recipe, plan.speed_rounds, plan.inner)
        return {"name": f"{plan.parity_architectures[0]} LM", "inner": plan.inner, **times}


def collect(bench: Bench) -> dict[str, Any]:
    """All figures there are: {"machine", "plan", "units": {name: {"value", "conditions", ...}}}."""
    units = {}
    for name, _ in bench.units():
        path = bench.out / f"{name}.json"
        if path.exists():
            units[name] = json.loads(path.read_text())
    return {"machine": machine(), "plan": dataclasses.asdict(bench.plan), "units": units}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import transformers

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = models[0] if models else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _commit() -> str:
    """The last commit of what is measured, with a "+" where the tree differs from it; "" outside a checkout."""
    root = Path(__file__).parent.parent.parent
    measured = ["--", "spt_compiler", "templates", ":!spt_compiler/cli"]
    try:
        commit = subprocess.run(["git", "log", "-1", "--format=%h", *measured], cwd=root, capture_output=True, text=True)
        status = subprocess.run(["git", "diff", "--quiet", "HEAD", *measured], cwd=root, capture_output=True)
    except OSError:
        return ""
    return commit.stdout.strip() + ("+" if status.returncode else "") if commit.returncode == 0 else ""
