"""What users call beside `torch.compile`: compile per block, state, metrics, tune, finalize."""

from __future__ import annotations

import copy
import functools
import json
import numbers
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import calibrate, debug, runtime, state
from .config import DerivedGlob, SPTConfig, glob_matches, is_disabled
from .errors import OptionError, SPTError
from .state import STORE, SiteState

# The grid of densities that `tune` tries, per kind.
_GRID = {"attention": (1 / 16, 1 / 8, 1 / 4, 1 / 2), "ffn": (1 / 4, 3 / 8, 1 / 2, 3 / 4)}
# In a trial of three steps the density itself is in force at once and stays so, whatever training is to do with it.
_TRIAL: dict[str, Any] = {
    **{"inner": "eager", "inner_options": {}, "guard.interval": 1, "dense_steps": 0, "dense_layers": [0, 0]},
    **{f"{kind}.{name}": None for kind in _GRID for name in ("schedule", "max_rel_error")},
}


def compile(model: nn.Module, **options: Any) -> nn.Module:
    """Compiles `model` in place with the backend "spt", per repeated block, and returns it.

    Blocks of one class share one compiled graph, so a deep model compiles as fast as one of its layers. A model without
    repeated blocks is compiled whole. Modules of torch.nn itself are compiled too, of which `module.compile()` compiles nothing.

    Args:
        options: as `torch.compile(options=...)` takes them, dots written as double underscores or through `**{"a.b": v}`.
    Raises: OptionError; SPTError if `model` is no plain module. Warns about a `sites` glob that matches no module of the model.
    """
    if not isinstance(model, nn.Module) or _plain(model) is not model:
        got = "what torch.compile returned" if isinstance(model, nn.Module) else f"a {type(model).__name__}"
        raise SPTError(f"expected a plain module, got {got}; compile the module itself, or use torch.compile(..., backend='spt')")
    if isinstance(options.get("options"), Mapping):
        raise OptionError(f"options are keywords here: write spt_compiler.compile(model, **{options['options']!r})")
    given = {key.replace("__", "."): value for key, value in options.items()}
    SPTConfig.from_options(given)
    sites = given.pop("sites", None) or {}
    blocks = repeated_blocks(model)
    if not blocks:
        _compile_in_place(model, {**given, **({"sites": sites} if sites else {})})
        return model
    for name, outer in model.named_modules():  # compiled before, with other options: it would take its blocks along
        if any(not name or block.startswith(f"{name}.") for block, _ in blocks):
            outer._compiled_call_impl = None
    used = set()
    for name, block in blocks:
        relative = {}
        for glob, overrides in sites.items():
            for rest in _below(glob, name, block):
                relative[rest] = overrides
                used.add(glob)
        _compile_in_place(block, {**given, **({"sites": relative} if relative else {})})
    for glob in sites.keys() - used:
        warnings.warn(f"spt_compiler: sites[{glob!r}] matches no module inside the compiled blocks", stacklevel=2)
    return model


def _compile_in_place(module: nn.Module, options: dict[str, Any]) -> None:
    if type(module).forward.__module__.startswith("torch.nn."):
        # Dynamo skips calls that begin in torch's own files: `nn.TransformerEncoderLayer(...).compile()` compiles nothing.
        compiled = torch.compile(_call_from_here, backend="spt", options=options or None)
        module._compiled_call_impl = functools.partial(compiled, module)
    else:
        module.compile(backend="spt", options=options or None)


def _call_from_here(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


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
    Raises: SPTError if the model has no replaced site (is it compiled with backend "spt"?), unless `SPT_DISABLE` is set.
    """
    for _ in range(2):  # the first call observes, the second initialises from what it saw
        model(*batch, **kwargs)
    if not _states(model) and not is_disabled():
        raise SPTError(
            'prepare found no replaced site: compile the model with backend="spt" first, see explain(model, *batch)'
        )
    return model


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of the model's state, for the user's optimizer: routers, unless ffn.gate is "hard", and codebooks
    under preset "paper". From then on the backend's maintenance does not step them.

    Returns: none under `SPT_DISABLE`.
    Raises: SPTError before state exists (call `prepare`), or if nothing is trainable by gradients.
    """
    states = [s for _, s in _states(model)]
    if not states and is_disabled():
        return []
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

    Add `1e-2 * auxiliary_loss(model)` to the loss, as the paper does; the backend never adds it by itself. 0 under `SPT_DISABLE`.
    Raises: SPTError if the graphs do not compute it (preset "paper" only) or no step with gradients has run.
    """
    losses = [s.auxiliary_loss for _, s in _states(model) if s.auxiliary_loss is not None]
    if not losses and is_disabled():
        return torch.zeros((), device=next((p.device for p in model.parameters()), None))
    if not losses:
        raise SPTError(
            'no auxiliary loss: compile with options={"preset": "paper"} and run a step with gradients first'
        )
    device = losses[0].device
    return torch.stack([loss.to(device) for loss in losses]).sum()


def metrics(model: nn.Module) -> dict[str, dict[str, float]]:
    """Figures of every site by name: steps, updates, budget (density in force; 1 when dense), initialised, skipped_rows,
    and, as last measured, rel_error and mass (attention) or rel_error, scaled_error, load_max, dropped_share (FFN)."""
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
    its own; the model, its compilation and its learned state stay as they are. Where `options` has `sites` with densities, these
    are what is tried there.

    Args:
        batch: one input: a tensor, a tuple of positional or a dict of keyword arguments. Sites learn from the first half of its
            rows and are measured on the other; where tensors do not share a first dimension of at least two, both are the whole,
            and FFNs look better than they are.
        target: "speed" leaves a site dense unless its density is at most 1/2 (above it sparse kernels gain little); "memory"
            takes any saving.
        path: where to write the result as JSON. options: further options to tune under.
    Returns: a dict that `options` accepts: {**options, "sites": {site name: {key: density}}}.
    Raises: OptionError on a bad target, limit or option, and under `exact`.
    """
    if target not in ("speed", "memory"):
        raise OptionError(f"target: expected 'speed' or 'memory', got {target!r}")
    if isinstance(max_rel_error, bool) or not isinstance(max_rel_error, numbers.Real) or not 0 < max_rel_error:
        raise OptionError(f"max_rel_error: expected a positive number, got {max_rel_error!r}")
    if SPTConfig.from_options(options).exact:
        raise OptionError("tune searches densities, of which `exact` leaves none to choose; leave it out of options")
    base = dict(options or {})
    errors: dict[str, dict[float, float]] = {}
    for attention, ffn in zip(_GRID["attention"], _GRID["ffn"], strict=True):
        trial = {**base, "attention.density": attention, "ffn.density": ffn, **_TRIAL}
        for site in _trial(model, batch, trial):
            if "rel_error" in site.metrics:
                part = site.settings.attention if site.kind == "attention" else site.settings.ffn
                errors.setdefault(f"{site.path}/{site.kind}", {})[part.density] = site.metrics["rel_error"]
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
    """States of a copy of the model after steps without optimizer: learn from one half of the batch, measure on the other."""
    from .backend import spt

    twin, backend = copy.deepcopy(_plain(model)), functools.partial(spt, options=dict(options))
    compiled = torch.compile(twin, backend=backend)
    with debug.apart(backend), torch.random.fork_rng(devices=[]), torch.enable_grad():
        learned, unseen = _halves(batch)
        for part in (learned, learned, unseen):
            outputs = [t for t in calibrate.leaves(call(compiled, part)) if t.requires_grad]
            if not outputs:
                raise SPTError("tune needs an output with gradients: does the model have a trainable parameter?")
            torch.stack([o.float().mean() for o in outputs]).sum().backward()
        call(compiled, unseen)  # its maintenance reads what the third step measured
    return [s for _, s in _states(twin)]


def _halves(batch: Any) -> tuple[Any, Any]:
    """The rows of a batch in two halves of one size; twice the batch where its tensors do not share a first dimension."""
    from torch.utils._pytree import tree_leaves, tree_map

    plain = dict(batch) if isinstance(batch, Mapping) else batch
    tensors = [t for t in tree_leaves(plain) if isinstance(t, Tensor) and t.dim() > 0]
    rows = {len(t) for t in tensors}
    half = min(rows, default=0) // 2
    if len(rows) != 1 or half == 0:
        return batch, batch

    def cut(part: slice) -> Any:
        return tree_map(lambda x: x[part] if isinstance(x, Tensor) and x.dim() > 0 else x, plain)

    return cut(slice(0, half)), cut(slice(half, 2 * half))


def finalize(
    model: nn.Module,
    batch: Any = None,
    *,
    inference: str = "dense",
    recover: str | None = None,
    batches: Sequence[Any] | None = None,
    steps: int = 100,
    lr: float = 1e-5,
    loss: Callable[[Any], Tensor] | None = None,
) -> dict[str, float]:
    """Ends the sparse life of a compiled model: it is dense again, or stays sparse for inference.

    Weights that were trained sparse are a little off where they run dense (and the other way round). The gap is measured, and a
    short recovery can close it: "dense" trains on with the model's own loss in the mode that stays; "distill" needs no labels and
    teaches the mode that stays to say what the other one says now. Recovery moves the parameters that require gradients, with
    AdamW; it is over before this returns.

    Args:
        batch: one input (tensor, tuple or dict) to measure the gap on. inference: the mode that stays, "dense" or "sparse".
        recover: None, "dense" or "distill". batches: inputs to recover on, taken in turns (all of their target outputs are kept
            for "distill"). steps, lr: length and rate of the recovery.
        loss: output -> scalar, for recover="dense"; None means the output's own `loss`.
    Returns: {"sites": number of sites} and, with a batch, "gap": largest difference of dense and sparse outputs relative to the
        largest output; "loss_sparse", "loss_dense" where outputs carry a loss (or `loss` is given); with a recovery
        "gap_recovered": the same difference between the recovered mode and what the other one said before, and "loss_recovered".
    Raises: OptionError on a bad word or number, or a recovery without batches; SPTError if there is no loss to train with.
    """
    _check_finalize(inference, recover, batches, steps, lr)
    plain = _plain(model)
    report: dict[str, float] = {"sites": len(_states(model))}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        kept, left = ("dense", "sparse") if inference == "dense" else ("sparse", "dense")
        before: Any = None
        if batch is not None:
            outputs = {mode: _outputs(model, mode, batch) for mode in ("dense", "sparse")}
            report["gap"] = calibrate.relative_error(outputs["sparse"], outputs["dense"])
            before = outputs[left]
            for mode, output in outputs.items():
                value = _loss(output, loss)
                if value is not None:
                    report[f"loss_{mode}"] = float(value)
        if recover is not None and batches is not None:
            _recover(model, kept, left, recover, batches, steps, lr, loss)
            if batch is not None:
                after = _outputs(model, kept, batch)
                report["gap_recovered"] = calibrate.relative_error(after, before)
                value = _loss(after, loss)
                if value is not None:
                    report["loss_recovered"] = float(value)
    finally:
        for module, training in modes:  # parts of a model may have been in another mode than the whole
            module.training = training
    if inference == "dense":
        for module in plain.modules():
            if getattr(module, "_compiled_call_impl", None) is not None:
                module._compiled_call_impl = None
        if plain is not model:  # what `torch.compile(model)` gave
            model.forward = plain.__call__
        STORE.forget(plain)
    return report


def _check_finalize(inference: str, recover: str | None, batches: Any, steps: int, lr: float) -> None:
    if inference not in ("dense", "sparse"):
        raise OptionError(f"inference: expected 'dense' or 'sparse', got {inference!r}")
    if recover not in (None, "dense", "distill"):
        raise OptionError(f"recover: expected 'dense', 'distill' or None, got {recover!r}")
    if recover is not None:
        if batches is not None and (not hasattr(batches, "__getitem__") or isinstance(batches, Mapping)):
            remedy = "write list(loader), or [batch] for a single one"
            raise OptionError(f"batches: expected a list of inputs, got a {type(batches).__name__}; {remedy}")
        if not batches:
            raise OptionError(f"recover={recover!r} needs batches: a list of inputs to train on")
        if steps < 1 or not lr > 0:
            raise OptionError(f"expected steps >= 1 and lr > 0, got {steps!r} and {lr!r}")


def _run(model: nn.Module, mode: str, batch: Any) -> Any:
    if mode == "sparse":
        return call(model, batch)
    with _uncompiled(model) as plain:
        return call(plain, batch)


@torch.no_grad()
def _outputs(model: nn.Module, mode: str, batch: Any) -> Any:
    return _run(model, mode, batch)


def _loss(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor | None:
    """The scalar loss of a model output: by the user's function, or as the output carries it."""
    if loss is not None:
        return loss(output)
    found = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def _recover(
    model: nn.Module,
    kept: str,
    left: str,
    how: str,
    batches: Sequence[Any],
    steps: int,
    lr: float,
    loss: Callable[[Any], Tensor] | None,
) -> None:
    """Trains the mode that is kept, with the loss, or toward what the mode that is left says now."""
    parameters = [p for p in _plain(model).parameters() if p.requires_grad]
    if not parameters:
        raise SPTError("nothing to recover with: no parameter of the model requires gradients")
    targets = []
    if how == "distill":
        targets = [[t.detach() for t in calibrate.leaves(_outputs(model, left, b))] for b in batches[:steps]]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    model.train(how == "dense")  # a target without dropout is met without it
    for step in range(steps):
        index = step % len(batches)
        output = _run(model, kept, batches[index])
        if how == "distill":
            objective = _distance(calibrate.leaves(output), targets[index])
        else:
            own = _loss(output, loss)
            if own is None:
                raise SPTError("recover='dense' needs a loss: give batches with labels, or loss=lambda output: ...")
            objective = own
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def _distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over the outputs of their squared error relative to the target's energy; a lone number (a loss) does not count."""
    terms = [
        (a.float() - b.float()).square().sum() / b.float().square().sum().clamp_min(1e-20)
        for a, b in zip(outputs, targets, strict=True)
        if b.numel() > 1 and a.requires_grad
    ]
    if not terms:
        raise SPTError("recover='distill' needs an output with gradients")
    return torch.stack(terms).mean()


def call(model: Any, batch: Any) -> Any:
    """model(batch) for a tensor, model(*batch) for a sequence, model(**batch) for a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence):
        return model(*batch)
    return model(batch)
