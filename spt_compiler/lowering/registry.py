"""Which implementation an op runs on a device: candidates in order of preference, then the reference.

A lowering module says `@register("tile_attention_v1", "cpu", "cpu")` above a function with the arguments of the op. `install()`
puts one dispatcher per (op, device) in place; it imports the lowering modules of a device when that device is first used, so that
importing this file imports neither triton nor any kernel. A candidate that declines (its `supports` is false) is passed over; one
that fails is reported once and not tried again. Every op has its reference as the last candidate.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spt_compiler.errors import KernelError, SPTError
from spt_compiler.lowering.tape import Tapes

log = logging.getLogger(__name__)

REFERENCE = "reference"

# Modules that register lowerings, by device type, and the modules whose functions are the references (an op named
# "route_v1" is defined by the function "route").
_LOWERING_MODULES: dict[str, tuple[str, ...]] = {
    "cpu": (
        "spt_compiler.lowering.cpu_selection",
        "spt_compiler.lowering.cpu_attention",
        "spt_compiler.lowering.cpp_attention",
        "spt_compiler.lowering.cpu_key_attention",
        "spt_compiler.lowering.cpu_ffn",
        "spt_compiler.lowering.cpp_ffn",
    ),
    "cuda": (
        "spt_compiler.lowering.triton_selection",
        "spt_compiler.lowering.triton_attention",
        "spt_compiler.lowering.triton_ffn",
    ),
}
_REFERENCE_MODULES = ("spt_compiler.ops.reference", "spt_compiler.ops.reference_ffn")
_OP_MODULES = ("spt_compiler.ops.attention", "spt_compiler.ops.ffn")

OPS = (
    "select_tiles_v1",
    "select_keys_v1",
    "tile_attention_v1",
    "tile_attention_backward_v1",
    "key_attention_v1",
    "key_attention_backward_v1",
    "stats_attention_v1",
    "route_v1",
    "routed_ffn_v1",
    "routed_ffn_backward_v1",
    "stats_ffn_v1",
)


@dataclass
class Candidate:
    """One implementation of an op on a device.

    Args:
        name: for reports ("cpu", "triton").  run: takes the arguments of the op, returns its results.
        supports: takes the arguments, says whether `run` can take them; None: always. It must not read tensor data.
        ready: says whether it can be used in this process at all (a compiler that may be missing); None: always.
        foresee: takes arguments without data (fake tensors of static sizes) of a call that will come, and starts in the
            background what that call would wait for (a C++ compiler); None: nothing.
        tapes: of calls that ran, for a lowering that decides by the kinds of its arguments alone.
        failed: what it failed with; it is not tried again.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., Any] | None = None
    ready: Callable[[], bool] | None = None
    foresee: Callable[..., None] | None = None
    tapes: Tapes | None = None
    failed: str | None = None

    def attempt(self, args: Sequence[Any]) -> tuple[bool, Any]:
        """(whether the arguments are supported, the result)."""
        if self.tapes is not None:
            return self.tapes.call(self.run, self.supports, args)
        if self.supports is not None and not self.supports(*args):
            return False, None
        return True, self.run(*args)


@dataclass
class _Table:
    """Candidates of all ops, which devices' modules are imported, and which kernels are known not to run."""

    candidates: dict[tuple[str, str], list[Candidate]] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    installed: set[tuple[str, str]] = field(default_factory=set)
    reported: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)


_table = _Table()


def register(
    op_name: str,
    device_type: str,
    name: str,
    *,
    supports: Callable[..., Any] | None = None,
    ready: Callable[[], bool] | None = None,
    foresee: Callable[..., None] | None = None,
    preferred: bool = False,
    taped: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function implements `spt::<op_name>` on a device, after the candidates registered before it.

    Args:
        op_name: with version, e.g. "tile_attention_v1".  device_type: "cpu", "cuda".  name: for reports.
        supports: (*args of the op) -> falsy where the function cannot take them (a `Reject` gives the reason).
        ready: () -> whether the function can be used in this process.  foresee: see `Candidate`.
        preferred: before those registered so far.  taped: whether it launches kernels as the kinds of its arguments alone tell;
            see `tape.py`.
    Raises: SPTError for an op that does not exist. Registering a name again replaces it (a module that is reloaded).
    """
    if op_name not in OPS:
        raise SPTError(f"expected an op of {', '.join(OPS)}, got {op_name!r}", stage="lower")

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        with _table.lock:
            present = _table.candidates.setdefault((op_name, device_type), [])
            fresh = Candidate(name, run, supports, ready, foresee, Tapes() if taped else None)
            for i, candidate in enumerate(present):
                if candidate.name == name:
                    present[i] = fresh
                    return run
            present.insert(0 if preferred else len(present), fresh)
        return run

    return decorate


def borrow(name: str, source: str, target: str) -> None:
    """Lets the lowerings `name` of one device type run first on another: interpreted kernels on CPU tensors.

    Raises: SPTError if the source has none of that name.
    """
    _load(source)
    _load(target)
    found = False
    with _table.lock:
        for op_name in OPS:
            for candidate in _table.candidates.get((op_name, source), ()):
                if candidate.name == name:
                    _table.candidates.setdefault((op_name, target), []).insert(0, candidate)
                    found = True
    if not found:
        raise SPTError(f"no lowering {name!r} on {source}", stage="lower")


def reference_of(op_name: str) -> Callable[..., Any]:
    """The function that defines an op. Raises: SPTError if there is none."""
    function = op_name.rpartition("_v")[0]
    for module in _REFERENCE_MODULES:
        found = getattr(importlib.import_module(module), function, None)
        if found is not None:
            return found
    raise SPTError(f"op {op_name!r} has no reference {function!r} in {', '.join(_REFERENCE_MODULES)}", stage="lower")


def _load(device_type: str) -> None:
    """Imports the lowering modules of a device, once; one that cannot be imported is reported and left out."""
    if device_type in _table.loaded:
        return
    with _table.lock:
        if device_type in _table.loaded:
            return
        for module in _LOWERING_MODULES.get(device_type, ()):
            if importlib.util.find_spec(module) is None:
                continue
            try:
                importlib.import_module(module)
            except Exception as cause:  # a broken or missing triton may raise anything; the reference still works
                warnings.warn(
                    f"spt_compiler: lowering {module} cannot be used ({type(cause).__name__}: {cause}); "
                    f"its ops run their slower fallback on {device_type}",
                    stacklevel=3,
                )
        _table.loaded.add(device_type)


def _usable(op_name: str, device_type: str) -> Sequence[Candidate]:
    _load(device_type)
    present = _table.candidates.get((op_name, device_type), ())
    return [c for c in present if c.failed is None and (c.ready is None or c.ready())]


def _blame(op_name: str, device_type: str, candidate: Candidate, cause: Exception) -> None:
    if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
        log.info("lowering %s of spt::%s on %s found too little memory this time: %s", candidate.name, op_name, device_type, cause)
        return
    if isinstance(cause, KernelError):
        with _table.lock:
            if str(cause) in _table.reported:
                return
            _table.reported[str(cause)] = (op_name, device_type, candidate.name)
        warnings.warn(
            f"spt_compiler: lowering {candidate.name!r} of spt::{op_name} on {device_type} cannot run here, and the next one "
            f"takes its place: {cause}",
            stacklevel=4,
        )
        return
    with _table.lock:
        if candidate.failed is not None:
            return
        candidate.failed = f"{type(cause).__name__}: {cause}"
    warnings.warn(
        f"spt_compiler: lowering {candidate.name!r} of spt::{op_name} on {device_type} failed ({candidate.failed}); "
        f"the op falls back to {chosen(op_name, device_type)!r} from here on",
        stacklevel=4,
    )
    log.debug("failure of lowering %s", candidate.name, exc_info=cause)


def dispatch(op_name: str, device_type: str, *args: Any) -> Any:
    """Runs an op by its first candidate that supports the arguments and does not fail, in the end by its reference.

    Raises: what the reference raises. A candidate is only blamed when a later one succeeds on the same arguments, so that a
    caller's mistake (which every one refuses) or a full memory does not disable it.
    """
    failures: list[tuple[Candidate, Exception]] = []
    for candidate in _usable(op_name, device_type):
        try:
            supported, result = candidate.attempt(args)
        except Exception as cause:  # whatever a kernel fails with, the next one may work
            failures.append((candidate, cause))
            continue
        if supported:
            break
    else:
        result = reference_of(op_name)(*args)
    for candidate, cause in failures:
        _blame(op_name, device_type, candidate, cause)
        cause.__traceback__ = None  # its frames, this one among them, would hold the arguments until garbage is collected
    return result


def foresee(op_name: str, args: Sequence[Any]) -> None:
    """Starts in the background what the first call with such arguments would wait for; `args` are as tracing sees them."""
    tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, torch.Tensor)]
    if any(isinstance(size, torch.SymInt) for t in tensors for size in (*t.shape, *t.stride())):
        return  # looking at them would make guards
    try:
        candidates = _usable(op_name, tensors[0].device.type)
        for candidate in candidates if any(c.foresee is not None for c in candidates) else ():
            if candidate.supports is None or candidate.supports(*args):
                if candidate.foresee is not None:
                    candidate.foresee(*args)
                return
    except Exception:  # the call itself will say what is wrong
        log.debug("could not foresee spt::%s", op_name, exc_info=True)


def chosen(op_name: str, device_type: str) -> str:
    """Name of the lowering that an op runs on a device by preference ("cpu", "triton", ...), or "reference"."""
    usable = _usable(op_name, device_type)
    return usable[0].name if usable else REFERENCE


def failures() -> dict[tuple[str, str, str], str]:
    """What failed so far: (op, device type, lowering) -> cause."""
    return {
        (op, device, c.name): c.failed for (op, device), cs in _table.candidates.items() for c in cs if c.failed is not None
    }


def refusals() -> dict[str, tuple[str, str, str]]:
    """Kernels that the device cannot run, in a configuration that the message names -> (op, device type, lowering)."""
    return dict(_table.reported)


def install(device_types: Sequence[str] = ("cpu", "cuda")) -> None:
    """Routes every op to `dispatch` on the devices given. Idempotent, and imports no kernel."""
    for module in _OP_MODULES:
        importlib.import_module(module)
    with _table.lock:
        for op_name in OPS:
            for device_type in device_types:
                if (op_name, device_type) in _table.installed:
                    continue
                torch.library.register_kernel(f"spt::{op_name}", device_type, _dispatcher(op_name, device_type))
                _table.installed.add((op_name, device_type))


def _dispatcher(op_name: str, device_type: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        return dispatch(op_name, device_type, *args)

    kernel.__name__ = f"{op_name}_{device_type}"
    return kernel
