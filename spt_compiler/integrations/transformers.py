"""A callback for Hugging Face's `Trainer`: compiles the model, logs densities and errors, keeps state with checkpoints.

    from spt_compiler.integrations.transformers import SptCallback
    Trainer(model=model, ..., callbacks=[SptCallback(options={"attention.density": 0.25})])

Without it `model.compile(backend="spt")` before the `Trainer` is enough; the learned state is then saved by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import spt_compiler
from spt_compiler.config import SPTConfig
from spt_compiler.errors import SPTError

log = logging.getLogger(__name__)

STATE_FILE = "spt_state.safetensors"


class SptCallback(TrainerCallback):
    """Trains the model of a `Trainer` through the backend "spt".

    Args:
        options: of the backend, as `torch.compile(options=...)` takes them; None for the defaults.
        compile: compile the model when training begins, per repeated block and in place, unless it is compiled already.
            Choose False to leave that to `model.compile(backend="spt")` or `TrainingArguments`.
        auxiliary_weight: adds this much of `spt_compiler.auxiliary_loss` to the training loss (preset "paper", whose
            authors take 1e-2). It needs `compile=True`: a loss inside a graph compiled by others cannot be added to.
        save: write `spt_state.safetensors` into each checkpoint, and read it back when training resumes from one, or ends with
            the weights of the best one (`load_best_model_at_end`).

    Raises: OptionError for bad options, ValueError for an auxiliary weight without `compile`.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        compile: bool = True,
        auxiliary_weight: float = 0.0,
        save: bool = True,
    ):
        SPTConfig.from_options(options)
        if auxiliary_weight and not compile:
            raise ValueError("auxiliary_weight needs compile=True: the loss is added outside the compiled blocks")
        self.options = dict(options or {})
        self.compile = compile
        self.auxiliary_weight = auxiliary_weight
        self.save = save
        self._hook: Any = None
        self._reported = False
        self._has_compiled = False
        self._has_warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.compile and not _is_compiled(model):
            spt_compiler.compile(model, **self.options)
            self._has_compiled = True
        elif self.options and not self._has_compiled:
            log.warning("the options of SptCallback are not used: the model is compiled already, or compile=False")
        if self.auxiliary_weight:
            self._remove_hook()  # of a training that failed
            self._hook = model.register_forward_hook(self._add_auxiliary_loss)
        if self.save and state.global_step:
            # The trainer does not tell callbacks which folder it resumes from; nearly always it is this one.
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
            if path.exists():
                spt_compiler.load_state(model, path)
                log.info("learned state read from %s", path)
            elif not spt_compiler.state_dict(model):  # else it was read before, as said below
                log.warning(
                    "resumed, but there is no %s: the sparse sites learn anew; if the checkpoint lies elsewhere, call "
                    "spt_compiler.load_state(model, path) before train()",
                    path,
                )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._reported:
            self._reported = True
            log.info("sites after the first step: %s", ", ".join(spt_compiler.metrics(model)) or "none")

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if model is None or logs is None or "loss" not in logs:
            return
        figures = summarise(spt_compiler.metrics(model))
        logs.update(figures)
        if state.log_history:  # the history has its own copy, made before the callbacks are asked
            state.log_history[-1].update(figures)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.save and state.is_world_process_zero and folder.is_dir() and spt_compiler.metrics(model):
            spt_compiler.save_state(model, folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._remove_hook()
        if self.save and args.load_best_model_at_end and state.best_model_checkpoint:
            path = Path(state.best_model_checkpoint) / STATE_FILE  # the weights are those of this checkpoint again
            if path.exists():
                spt_compiler.load_state(model, path)
                log.info("learned state of the best model read from %s", path)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _add_auxiliary_loss(self, model: Any, inputs: Any, output: Any) -> Any:
        import torch

        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not (model.training and torch.is_grad_enabled()) or loss is None:
            return output
        try:
            auxiliary = spt_compiler.auxiliary_loss(model)
        except SPTError as error:
            if not self._has_warned:
                self._has_warned = True
                log.warning("no auxiliary loss is added: %s", error)
            return output
        output["loss"] = loss + self.auxiliary_weight * auxiliary.to(loss.device)
        return output


def summarise(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the sites of each kind, named for a logger: `spt_attention_density`, `spt_ffn_rel_error`, ..."""
    figures: dict[str, float] = {}
    for kind in ("attention", "ffn"):
        rows = [row for name, row in metrics.items() if f"/{kind}" in name]
        if rows:
            figures[f"spt_{kind}_sites"] = len(rows)
        for key in ("density", "rel_error"):
            values = [float(row[key]) for row in rows if key in row]
            if values:
                figures[f"spt_{kind}_{key}"] = sum(values) / len(values)
    return figures


def _is_compiled(model: Any) -> bool:
    return hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )
