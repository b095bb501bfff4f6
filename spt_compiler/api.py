"""What users call beside `torch.compile`: compile per block, state, metrics, tune, finalize."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import calibrate, runtime, state
from .config import DerivedGlob, SPTConfig, glob_matches
from .errors import OptionError, SPTError
from .state import STORE, SiteState

# The grid of densities that `tune` tries, per kind.
_GRID = {"attention": (1 / 16, 1 / 8, 1 / 4, 1 / 2), "ffn": (1 / 4, 3 / 8, 1 / 2, 3 / 4)}


def compile(model: nn.Module, **options: Any) -> nn.Module:
    """Compiles `model` in place with the backend "spt", per repeated block, and returns it.

    Blocks of one class share one compiled graph, so a deep model compiles as fast as one of its layers. A model without
    repeated blocks is compiled whole.

    Args:
        options: as `torch.compile(options=...)` takes them, dots written as double underscores or through `**{"a.b": v}`.
    Raises: OptionError. Warns about a `sites` glob that matches no module of the model.
    """
    given = {key.replace("__", "."): value for key, value in options.items()}
    SPTConfig.from_options(given)
    sites = given.pop("sites", None) or {}
    blocks = repeated_blocks(model)
    if not blocks:
        model.compile(backend="spt", options={**given, **({"sites": sites} if sites else {})} or None)
        return model
    used = set()
    for name, block in blocks:
        relative = {}
        for glob, overrides in sites.items():
            for rest in _below(glob, name, block):
                relative[rest] = overrides
                used.add(glob)
        block.compile(backend="spt", options={**given, **({"sites": relative} if relative else {})} or None)
    for glob in sites.keys() - used:
        warnings.warn(f"spt_compiler: sites[{glob!r}] matches no module inside the compiled blocks", stacklevel=2)
    return model


def _below(glob: str, name: str, block: nn.Module) -> Iterator[DerivedGlob]:
    """Paths relative to `block` whose full path under `name` matches the glob: a graph of a block knows no more."""
    for inner, _ in block.named_modules():
        for kind in ("attention", "ffn"):
            full = f"{name}.{inner}" if inner else name
            if glob_matches(glob, f"{full}/{kind}"):
                yield DerivedGlob(f"{inner}/{kind}" if inner else f"*/{kind}")


def repeated_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of the outermost lists of at least two modules of one class that hold parameters."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        if any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        classes = {type(m) for m in module}
        if len(classes) == 1 and all(next(m.parameters(), None) is not None and list(m.children()) for m in module):
            found.extend((f"{name}.{i}" if name else str(i), m) for i, m in enumerate(module))
    return found


def _plain(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _states(model: nn.Module) -> list[tuple[str, SiteState]]:
    return list(STORE.named_states(_plain(model)))


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Learned state of the model's sites, flat: `{<site>.<tensor>: Tensor}` (copies).

    It holds statistics of the training data, sampled activations among them.
    """
    return STORE.state_dict(_plain(model))


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Restores what `state_dict` gave; before the first call it is kept and applied when the sites appear.

    Returns: names of sites that fit no module of the model (also warned about).
    Raises: StateError on malformed keys or other shapes; nothing is changed then.
    """
    return STORE.load_state_dict(_plain(model), state_dict)


def save_state(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the learned state as safetensors (`spt_state.safetensors` beside the checkpoint), atomically.

    Raises: StateError if the folder cannot be written; an older file stays as it was.
    """
    state.save(state_dict(model), path)


def load_state(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """Reads a file written by `save_state`. Raises: StateError if it is missing, corrupt or foreign."""
    return load_state_dict(model, state.load(path))


@torch.no_grad()
def prepare(model: nn.Module, *batch: Any, **kwargs: Any) -> nn.Module:
    """Creates and initialises the state of a compiled model from one batch, before training; returns the model.

    Args: batch, kwargs: what the model is called with. The forward runs without gradients.
    Raises: SPTError if the model has no replaced site (is it compiled with backend "spt"?).
    """
    for _ in range(2):  # the first call observes, the second initialises from what it saw
        model(*batch, **kwargs)
    if not _states(model):
        raise SPTError(
            'prepare found no replaced site: compile the model with backend="spt" first, see explain(model, *batch)'
        )
    return model


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of the model's state, for the user's optimizer: routers, unless ffn.gate is "hard", and codebooks
    under preset "paper". From then on the backend's maintenance does not step them.

    Raises: SPTError before state exists (call `prepare`), or if nothing is trainable by gradients.
    """
    states = [s for _, s in _states(model)]
    if not states:
        raise SPTError("parameters(model) needs state: call spt_compiler.prepare(model, *batch) first")
    found = runtime.take_parameters(states)
    if not found:
        raise SPTError(
            'no router takes gradients: ffn.gate is "hard"; use options={"ffn.gate": "straight-through"} or preset "paper"'
        )
    return found


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The paper's PQ loss of the model's last step, summed over sites; differentiable until that step's graph is freed.

    Add `1e-2 * auxiliary_loss(model)` to the loss, as the paper does; the backend never adds it by itself.
    Raises: SPTError if the graphs do not compute it (preset "paper" only) or no step with gradients has run.
    """
    losses = [s.auxiliary_loss for _, s in _states(model) if s.auxiliary_loss is not None]
    if not losses:
        raise SPTError(
            'no auxiliary loss: compile with options={"preset": "paper"} and run a step with gradients first'
        )
    device = losses[0].device
    return torch.stack([loss.to(device) for loss in losses]).sum()


def metrics(model: nn.Module) -> dict[str, dict[str, float]]:
    """Figures of every site by name: steps, updates, budget (density in force; 1 when dense), initialised, skipped_rows,
    and, once measured, rel_error and mass (attention) or rel_error, load_max, dropped_share (FFN)."""
    result = {}
    for name, site in _states(model):
        density = 1.0
        if site.settings is not None and site.budget >= 0:
            part = site.settings.attention if site.kind == "attention" else site.settings.ffn
            density = min(1.0, site.budget * part.density)
        result[name] = {
            "steps": site.counter("steps"),
            "updates": site.counter("updates"),
            "initialised": float(site.initialised),
            "skipped_rows": site.counter("skipped_rows"),
            "density": density,
            **site.metrics,
        }
    return result


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    plain = _plain(model)
    calls = [(m, m._compiled_call_impl) for m in plain.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    try:
        for module, _ in calls:
            module._compiled_call_impl = None
        yield plain
    finally:
        for module, call in calls:
            module._compiled_call_impl = call


def tune(
    model: nn.Module,
    batch: Any,
    max_rel_error: float,
    target: str = "speed",
    path: str | os.PathLike | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Searches, per site, the smallest density whose relative output error stays within `max_rel_error`.

    Each density of a small grid is run on the batch with an eager inner compiler, sparse against dense, on learned state of
    its own; the model, its compilation and its learned state stay as they are.

    Args:
        batch: one input: a tensor, a tuple of positional or a dict of keyword arguments.
        target: "speed" leaves a site dense unless at most half of its work remains; "memory" takes any saving.
        path: where to write the result as JSON. options: further options to tune under.
    Returns: a dict that `options` accepts: {**options, "sites": {site name: {key: density}}}.
    Raises: OptionError on a bad target or limit.
    """
    if target not in ("speed", "memory"):
        raise OptionError(f"target: expected 'speed' or 'memory', got {target!r}")
    if not 0 < max_rel_error:
        raise OptionError(f"max_rel_error: expected a positive number, got {max_rel_error!r}")
    base = dict(options or {})
    errors: dict[str, dict[float, float]] = {}
    for attention, ffn in zip(_GRID["attention"], _GRID["ffn"], strict=True):
        trial = {**base, "attention.density": attention, "ffn.density": ffn, "inner": "eager", "guard.interval": 1}
        for site in _trial(model, batch, trial):
            if "rel_error" in site.metrics:
                density = attention if site.kind == "attention" else ffn
                errors.setdefault(f"{site.path}/{site.kind}", {})[density] = site.metrics["rel_error"]
    sites: dict[str, dict[str, float]] = {}
    for name, by_density in errors.items():
        good = [
            d for d, error in sorted(by_density.items()) if error <= max_rel_error and (target == "memory" or d <= 0.5)
        ]
        sites[name] = {f"{name.rsplit('/', 1)[1]}.density": good[0] if good else 1.0}
    result = {**base, "sites": {**base.get("sites", {}), **sites}}
    if path is not None:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)
    return result


def _trial(model: nn.Module, batch: Any, options: Mapping[str, Any]) -> list[SiteState]:
    """States of a copy of the model after three steps without optimizer: observe, initialise, measure."""
    twin = copy.deepcopy(_plain(model))
    compiled = torch.compile(twin, backend="spt", options=dict(options))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for _ in range(3):
            outputs = [t for t in calibrate.leaves(call(compiled, batch)) if t.requires_grad]
            if not outputs:
                raise SPTError("tune needs an output with gradients: does the model have a trainable parameter?")
            torch.stack([o.float().mean() for o in outputs]).sum().backward()
        call(compiled, batch)  # its maintenance reads what the third step measured
    return [s for _, s in _states(twin)]


def finalize(model: nn.Module, batch: Any = None, *, inference: str = "dense") -> dict[str, float]:
    """Ends the sparse life of a model compiled in place: it is dense again, or stays sparse for inference.

    Args:
        batch: one input (tensor, tuple or dict) to measure the remaining gap on. inference: "dense" or "sparse".
    Returns: {"sites": number of sites, "gap": relative difference of dense and sparse outputs} (gap only with a batch).
    """
    if inference not in ("dense", "sparse"):
        raise OptionError(f"inference: expected 'dense' or 'sparse', got {inference!r}")
    report: dict[str, float] = {"sites": len(_states(model))}
    if batch is not None:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                sparse = call(model, batch)
                with _uncompiled(model) as plain:
                    report["gap"] = calibrate.relative_error(sparse, call(plain, batch))
        finally:
            model.train(training)
    if inference == "dense":
        for module in _plain(model).modules():
            if getattr(module, "_compiled_call_impl", None) is not None:
                module._compiled_call_impl = None
        STORE.forget(_plain(model))
    return report


def call(model: Any, batch: Any) -> Any:
    """model(batch) for a tensor, model(*batch) for a sequence, model(**batch) for a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence):
        return model(*batch)
    return model(batch)
