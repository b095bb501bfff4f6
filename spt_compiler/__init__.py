"""Makes fine-tuning of unmodified Transformers cheaper by sparsity: the `torch.compile` backend "spt".

    model.compile(backend="spt")                 # or torch.compile(model, backend="spt", options={...})

Nothing needs to be imported for that; this module offers what a user may want beside it. Importing it queries no device and
imports neither transformers nor triton.
"""

from __future__ import annotations

from .api import (
    auxiliary_loss,
    compile,
    finalize,
    load_state,
    load_state_dict,
    metrics,
    parameters,
    prepare,
    save_state,
    state_dict,
    tune,
)
from .config import SPTConfig, list_options
from .debug import Explanation, explain
from .errors import ExpressionError, OptionError, SPTError, StateError
from .runtime import dense

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "ExpressionError",
    "OptionError",
    "SPTConfig",
    "SPTError",
    "StateError",
    "auxiliary_loss",
    "compile",
    "dense",
    "explain",
    "finalize",
    "list_options",
    "load_state",
    "load_state_dict",
    "metrics",
    "parameters",
    "prepare",
    "save_state",
    "spt",
    "state_dict",
    "tune",
]


def __getattr__(name: str):
    # The backend imports Dynamo (a second or more): only whoever asks for it pays.
    if name == "spt":
        from .backend import spt

        return spt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
