"""Which of a few launch settings is fastest: measured once per device and kernel, and kept for all processes.

Every kernel has a setting that is safe without measuring. Where a caller of `launch` names alternatives, a setting that
another process found is used; with `SPT_AUTOTUNE=1` one that is missing is measured at its first launch, unless a CUDA
graph is being captured. Results are a file per device in the cache folder (see `render.py`, whose rules for trusting
files hold here too). A file says only which of the alternatives to take: whatever else stands in it is ignored, and
the file is written anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from spt_compiler.lowering import render

log = logging.getLogger(__name__)

_FORMAT = 1
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Setting:
    """How a kernel is launched.

    Args: num_warps, num_stages: as Triton has them.  constants: `tl.constexpr` parameters that change speed alone, in
        place of those of the same name that the launch has.
    """

    num_warps: int = 4
    num_stages: int = 2
    constants: tuple[tuple[str, int], ...] = ()


_lock = threading.Lock()
_paths: dict[torch.device, Path] = {}
_files: dict[Path, dict[str, int]] = {}


def enabled() -> bool:
    """Whether settings that nobody measured yet are measured."""
    return os.environ.get("SPT_AUTOTUNE") == "1"


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def device_name(device: torch.device) -> str:
    """What results hold for: the chip and the versions of the compiler."""
    import triton

    chip = torch.cuda.get_device_properties(device).name if device.type == "cuda" else device.type
    return re.sub(r"[^A-Za-z0-9]+", "_", f"{chip} triton {triton.__version__}")


@functools.lru_cache(maxsize=4096)
def _digest(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def key_of(source: str, kernel: str, args: Mapping[str, Any], constants: Mapping[str, Any], settings: Sequence[Setting]) -> str:
    """What a result holds for: the kernel, its constants and types, its sizes to a power of two, and the alternatives."""
    sizes = tuple((name, v.bit_length()) for name, v in sorted(args.items()) if name.startswith("n_") and isinstance(v, int))
    types = tuple((name, v.dtype) for name, v in sorted(args.items()) if isinstance(v, Tensor))
    return _digest((source, kernel, tuple(sorted(constants.items())), sizes, types, tuple(settings)))


def _path(device: torch.device) -> Path:
    with _lock:
        if device not in _paths:
            _paths[device] = render.cache_folder() / f"tuning_{device_name(device)}.json"
        return _paths[device]


def _read(path: Path) -> dict[str, int]:
    """The results in a file; none where it is missing, corrupt, or not to be trusted."""
    text = render.read_trusted(path)
    if text is None:
        return {}
    try:
        content = json.loads(text)
        if content["format"] != _FORMAT:
            return {}
        return {key: index for key, index in content["fastest"].items() if isinstance(key, str) and type(index) is int}
    except (ValueError, KeyError, TypeError, AttributeError):
        log.info("%s is corrupt and is written anew", path)
        return {}


def _known(path: Path) -> dict[str, int]:
    with _lock:
        if path not in _files:
            _files[path] = _read(path)
        return _files[path]


def _keep(path: Path, key: str, index: int) -> None:
    """Adds a result to the file, beside those that other processes added meanwhile."""
    _known(path)[key] = index
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=_LOCK_SECONDS):
            merged = {**_read(path), key: index}
            render.write_atomically(path, json.dumps({"format": _FORMAT, "fastest": merged}, indent=1, sort_keys=True))
    except (OSError, filelock.Timeout) as error:
        log.info("%s cannot be written (%s); the result serves this process alone", path, error)


def idle(device: torch.device) -> bool:
    """Whether there is nothing to choose by: no results for the device, and none to be measured."""
    return not enabled() and not _known(_path(device))


def choose(
    device: torch.device, key: str, settings: Sequence[Setting], measure: Callable[[Setting], float]
) -> Setting:
    """The setting to launch with: what is known to be fastest, else what is measured now or, without `enabled`, the first.

    Args:
        device: of the tensors.  key: of `key_of`.  settings: the alternatives, the safe one first.
        measure: the time of a launch in milliseconds; may raise for a setting that the device cannot run.
    """
    path = _path(device)
    index = _known(path).get(key)
    if index is not None and 0 <= index < len(settings):
        return settings[index]
    if not enabled() or _capturing():
        return settings[0]
    times: list[float] = []
    for setting in settings:
        try:
            times.append(measure(setting))
        except Exception as error:  # whatever the compiler or driver says: the others remain
            log.debug("setting %s cannot be measured: %s", setting, error)
            times.append(float("inf"))
    best = min(range(len(settings)), key=times.__getitem__)
    if times[best] == float("inf"):
        return settings[0]
    log.info("fastest of %d settings for %s: %s, %.3f ms", len(settings), key, settings[best], times[best])
    _keep(path, key, best)
    return settings[best]


def forget() -> None:
    """Drops what this process knows, so that files are read again; for tests."""
    with _lock:
        _paths.clear()
        _files.clear()
