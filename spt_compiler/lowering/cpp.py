"""Compiles rendered C++ templates to shared libraries with the machine's own compiler, and calls them.

A library is cached on disk by the hash of its source, the compiler, its flags and the processor, beside the generated
Triton kernels (see `render.py`); a second process loads it without compiling. Code is built for the processor it runs on
(`-march=native`), so nothing here depends on an instruction set. Threads are those of the OpenMP runtime that torch has
loaded: its pool is shared, and every call says how many threads it wants.

Where there is no compiler, or it fails, one warning says so and the ATen lowerings run instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spt_compiler.errors import SPTError
from spt_compiler.lowering import render
from spt_compiler.matmul import cpu_info

log = logging.getLogger(__name__)

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
_SECONDS = 300

_lock = threading.RLock()
_libraries: dict[tuple[str, Any], ctypes.CDLL] = {}
_on_the_way: set[tuple[str, Any]] = set()
_problem: str | None = None


@functools.lru_cache(maxsize=1)
def compiler() -> str | None:
    """Path of the C++ compiler: $CXX as Inductor takes it, else the first of g++, clang++, c++ that is installed."""
    wanted = os.environ.get("CXX")
    return next((found for name in ([wanted] if wanted else ["g++", "clang++", "c++"]) if (found := shutil.which(name))), None)


@functools.lru_cache(maxsize=1)
def _toolchain() -> str:
    """Compiler and processor, as far as they decide the code."""
    path = compiler()
    if path is None:
        raise SPTError("no C++ compiler (g++, clang++ or c++, or $CXX) is installed", stage="lower")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    info = cpu_info()
    deciding = ("flags", "features", "model name", "cpu part")
    processor = sorted({line for line in info.splitlines() if line.lower().startswith(deciding)}) or [info]
    return "\n".join([path, version, platform.machine(), *processor])


def usable() -> bool:
    """Whether C++ kernels may be asked for: there is a compiler, and none has failed so far."""
    if _problem is None and compiler() is None:
        give_up("no C++ compiler is installed")
    return _problem is None


def give_up(reason: str) -> None:
    """No more C++ kernels in this process, and one warning that says so."""
    global _problem
    with _lock:
        if _problem is not None:
            return
        _problem = reason
    warnings.warn(
        f"spt_compiler: CPU kernels in C++ cannot be used ({reason}); sparse operators run a slower lowering made of "
        "ATen operators. Install g++ or set CXX",
        stacklevel=5,
    )


def library(template: str, constants: Mapping[str, Any]) -> ctypes.CDLL:
    """The library of a rendered template: loaded once per process, compiled once per machine.

    Raises: SPTError if it cannot be compiled, with the compiler's first complaint.
    """
    key = (template, render.frozen(constants))
    found = _libraries.get(key)
    if found is not None:
        return found
    with _lock:
        found = _libraries.get(key)
        if found is None:
            path = _build(template, render.render(template, constants, language="cpp"))
            found = _libraries[key] = ctypes.CDLL(str(path))
    return found


def foresee(template: str, constants: Mapping[str, Any]) -> threading.Thread | None:
    """Compiles the library of a rendered template on a thread of its own, so that it is there when it is called for.

    Returns: the thread; None if the library is there or on its way (every layer of a model asks). What fails, fails again where it
        is called for.
    """
    key = (template, render.frozen(constants))
    if key in _libraries or key in _on_the_way:
        return None
    _on_the_way.add(key)

    def run() -> None:
        try:
            library(template, constants)
        except SPTError as error:
            log.debug("%s ahead of its first call: %s", template, error)
        finally:
            _on_the_way.discard(key)

    thread = threading.Thread(target=run, name=f"spt-{template}")
    thread.start()
    return thread


def _build(template: str, source: str) -> Path:
    flags = [f for f in _FLAGS if platform.machine() in ("x86_64", "AMD64") or not f.startswith("-mprefer")]
    digest = hashlib.sha256("\n".join([_toolchain(), *flags, source]).encode()).hexdigest()[:24]
    name = f"{template}_{digest}"
    path = render.cache_folder() / f"{name}.so"
    if path.is_file() and render.fault(path) is None:
        return path
    written = render.store(f"{name}.cpp", source)
    handle, temporary = tempfile.mkstemp(dir=written.parent, prefix=f".{name}_", suffix=".so")
    os.close(handle)
    try:
        command = [compiler() or "c++", *flags, str(written), "-o", temporary]
        log.debug("compiling %s: %s", template, " ".join(command))
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise SPTError(f"{compiler()} refused {written}: {complaint.strip()}", stage="lower")
        os.chmod(temporary, 0o700)
        path = written.parent / f"{name}.so"
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


@functools.lru_cache(maxsize=64)
def _structure(integers: tuple[str, ...], reals: tuple[str, ...]) -> type[ctypes.Structure]:
    fields = [(name, ctypes.c_int64) for name in integers] + [(name, ctypes.c_double) for name in reals]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})


def call(function: Any, integers: Sequence[str], reals: Sequence[str], values: Mapping[str, Any]) -> None:
    """Calls a kernel `int f(const Args*)`; the lock of the interpreter is free meanwhile.

    Args:
        integers, reals: names of the fields of its Args, in order.  values: by name; a tensor gives its address, None and
            what is missing 0. The tensors must outlive the call (the caller's mapping holds them).
    Raises: SPTError if the kernel ran out of memory.
    """
    arguments = _structure(tuple(integers), tuple(reals))()
    for name, value in values.items():
        setattr(arguments, name, value.data_ptr() if isinstance(value, torch.Tensor) else 0 if value is None else value)
    if function(ctypes.byref(arguments)):
        raise SPTError(f"{function.__name__} ran out of memory", stage="run")
