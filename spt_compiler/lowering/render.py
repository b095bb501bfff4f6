"""From a template of `templates/` to an imported Python module with Triton kernels.

`render` fills in a template, `load` also writes the source to a content-hashed file in a folder of this user's and
imports it (`triton.jit` needs a file to read). What goes into a template is checked: numbers, words from the callers'
own code, and parsed expressions, which only their printer turns into text; no text of a model can reach generated
code.

The cache folder is `SPT_CACHE_DIR`, else `spt_compiler` in the user's cache folder. It is refused, with one warning
and a private temporary folder in its place, where someone else owns it or others can write to it, and where it cannot
be written. A cached file is used only if it holds exactly the source that was rendered; writing replaces atomically,
so concurrent processes may share it.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.resources
import linecache
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from spt_compiler import expression
from spt_compiler.errors import SPTError
from spt_compiler.expression import Expression

log = logging.getLogger(__name__)

_WORD = re.compile(r"[a-z][a-z0-9_]*\Z")
_HELPER = re.compile(r"\bspt_\w+")
_FLAG_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_lock = threading.RLock()


# ---------------------------------------------------------------------------------------------------------------------
# Templates
# ---------------------------------------------------------------------------------------------------------------------


def _template_folder() -> Any:
    """Where the templates are: package data, or the sibling folder of a source checkout."""
    try:
        folder = importlib.resources.files("spt_compiler.templates")
        if folder.joinpath("_macros.jinja").is_file():
            return folder
    except ModuleNotFoundError:
        pass
    sibling = Path(__file__).resolve().parents[2] / "templates"
    if (sibling / "_macros.jinja").is_file():
        return sibling
    raise SPTError("expected the kernel templates as package data spt_compiler.templates; reinstall the package", stage="lower")


def _load_template(name: str) -> str | None:
    file = _template_folder().joinpath(name)
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _emit(expr: Expression, names: Mapping[str, str], kinds: Mapping[str, str] | None = None) -> str:
    """In templates: `expr` as Triton, with its names replaced."""
    return expression.triton_source(expr, names, kinds)


def _cpp_mask(expr: Expression, reads: Sequence[Mapping[str, Any]]) -> str:
    """In templates: a mask over b, h, q, k as C++. Reads are from pointers of their name with the strides a.<name>_s<axis>."""
    names, kinds = {name: name for name in "bhqk"}, dict.fromkeys("bhqk", "int")
    for read in reads:
        name, terms = read["name"], [f"({{{d}}}) * a.{read['name']}_s{d}" for d in range(read["rank"])]
        names[name], kinds[name] = f"{name}[{' + '.join(terms) or 0}]", read["kind"]
    return expression.cpp_source(expr, names, kinds)


# Functions of the printed C++ that a template replaces by ones which compilers turn into vector code.
_FAST_CPP = re.compile(r"\b(?:std::(exp|erf|tanh)|spt_(sigmoid|silu|gelu_tanh|gelu))\(")


def _cpp_activation(expr: Expression, pre: Sequence[str], captured: Sequence[str]) -> str:
    """In templates: an activation, or a derivative of one, of float variables of the names given, as C++."""
    names = {name: name for name in (*pre, *captured)}
    source = expression.cpp_source(expr, names, dict.fromkeys(names, "float"))
    return _FAST_CPP.sub(lambda m: f"fast_{m[1] or m[2]}(", source)


# Stands for a line that a macro left empty; `render` removes it with its newline.
_NO_LINE = "\x00"


def _lines(text: str) -> str:
    """In templates: what a macro gave, as whole lines (none, if it gave nothing)."""
    kept = "\n".join(line for line in text.splitlines() if line.strip())
    return kept or _NO_LINE


@functools.lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The one Jinja environment: undefined names are errors, blocks leave no blank lines."""
    env = jinja2.Environment(
        loader=jinja2.FunctionLoader(_load_template),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Python source, not HTML
    )
    env.globals.update(
        emit=_emit,
        cpp_mask=_cpp_mask,
        cpp_activation=_cpp_activation,
        prelude=expression.CPP_PRELUDE,
        kind_of=expression.kind_of,
        lines=_lines,
    )
    return env


@functools.lru_cache(maxsize=1)
def _helpers() -> dict[str, str]:
    """Source of every helper function of `_macros.jinja`, by name, in the order in which they stand."""
    module = environment().get_template("_macros.jinja").module
    names = re.findall(r"macro (spt_\w+)\(", _load_template("_macros.jinja") or "")
    return {name: str(getattr(module, name)()).strip() + "\n" for name in names}


def _helpers_used(body: str) -> str:
    """The helpers that `body` calls, and those that they call, in order of definition."""
    helpers = _helpers()
    wanted: set[str] = set()
    frontier = set(_HELPER.findall(body)) & helpers.keys()
    while frontier:
        wanted |= frontier
        frontier = {name for w in frontier for name in _HELPER.findall(helpers[w]) if name in helpers} - wanted
    return "\n\n".join(text for name, text in helpers.items() if name in wanted)


def template_names(language: str = "py") -> list[str]:
    """Names of all kernel templates of a language ("py" for Triton, "cpp"), without their ending."""
    ending = f".{language}.jinja"
    return sorted(f.name.removesuffix(ending) for f in _template_folder().iterdir() if f.name.endswith(ending))


def _check_constant(name: str, value: Any) -> None:
    """Raises SPTError unless the value can only become code that this package wrote."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_constant(name, item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_constant(name, key)
            _check_constant(name, item)
    elif isinstance(value, str):
        if not _WORD.match(value):
            raise SPTError(f"template constant {name} holds text that is not a plain word: {value!r:.60}", stage="lower")
    elif value is not None and not isinstance(value, (bool, int, float, Expression)):
        raise SPTError(f"template constant {name} has type {type(value).__name__}", stage="lower")


def render(template: str, constants: Mapping[str, Any], language: str = "py") -> str:
    """The source of a kernel file.

    Args:
        template: name of a file of `templates/`, without its ending.  language: "py" (Triton) or "cpp".
        constants: by name; None, numbers, plain lower-case words, `Expression`s, and lists and dicts of these.
    Raises: SPTError for another constant, an unknown template, or a template that needs a constant not given.
    """
    for name, value in constants.items():
        _check_constant(name, value)
    try:
        loaded = environment().get_template(f"{template}.{language}.jinja")
        if language == "cpp":
            return loaded.render(**constants)
        # Twice: which helpers are needed is known once the body is there.
        body = loaded.render(**constants, helpers="")
        source = loaded.render(**constants, helpers=_helpers_used(body))
        return re.sub(rf"[ ]*{_NO_LINE}\n", "", source)
    except jinja2.TemplateNotFound as error:
        raise SPTError(f"no template {template!r}; there are {', '.join(template_names(language))}", stage="lower") from error
    except jinja2.UndefinedError as error:
        raise SPTError(f"template {template!r}: {error.message}", stage="lower") from error


# ---------------------------------------------------------------------------------------------------------------------
# The cache folder
# ---------------------------------------------------------------------------------------------------------------------


def _default_folder() -> Path:
    chosen = os.environ.get("SPT_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "spt_compiler"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spt_compiler"


def fault(path: Path) -> str | None:
    """Why a folder or file must not be trusted, or None. Symbolic links are not followed."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if not hasattr(os, "getuid"):
        return None  # Windows: folders under the user's profile are private
    if status.st_uid != os.getuid():
        return f"belongs to user {status.st_uid}"
    if status.st_mode & _FLAG_WRITABLE_BY_OTHERS:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _prepare(folder: Path) -> str | None:
    """Makes the folder ready; why it cannot be used, or None."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = fault(folder)
        if reason is None and not os.access(folder, os.W_OK | os.X_OK):
            reason = "cannot be written"
    except OSError as error:
        return f"cannot be made or read ({error})"
    return reason


@functools.lru_cache(maxsize=8)
def _usable_folder(wanted: Path) -> Path:
    reason = _prepare(wanted)
    if reason is None:
        return wanted
    private = Path(tempfile.mkdtemp(prefix="spt_compiler_"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    warnings.warn(
        f"spt_compiler: cache folder {wanted} {reason}; generated kernels go to {private} for this process. "
        "Set SPT_CACHE_DIR to a folder that only you can write to",
        stacklevel=4,
    )
    return private


def cache_folder() -> Path:
    """The folder of generated kernels; made, private and writable."""
    return _usable_folder(_default_folder() / "kernels")


def read_trusted(path: Path) -> str | None:
    """What a file of the cache folder holds; None where there is none that this user alone could have written."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() and fault(path) is None else None
    except OSError:
        return None


def write_atomically(path: Path, source: str) -> None:
    """Replaces a file as a whole: a reader sees the old one or the new one. Raises: OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}_", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(source)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def store(name: str, source: str) -> Path:
    """A file `name` of the cache folder that holds `source`; one that holds anything else is replaced."""
    path = cache_folder() / name
    try:
        found = read_trusted(path)
        if found == source:
            return path
        if found is not None:
            log.info("cached kernel %s is corrupt and is written anew", path)
        write_atomically(path, source)
    except OSError as error:
        # The folder was usable a moment ago (a full or vanished disk): a private one serves for this process.
        fallback = Path(tempfile.mkdtemp(prefix="spt_compiler_"))
        atexit.register(shutil.rmtree, fallback, ignore_errors=True)
        warnings.warn(f"spt_compiler: cannot write {path} ({error}); generated kernels go to {fallback}", stacklevel=4)
        path = fallback / name
        write_atomically(path, source)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------------

_modules: dict[str, types.ModuleType] = {}
_by_constants: dict[tuple[str, Any, Any], types.ModuleType] = {}
# What is hashable as it is, and equal to nothing of another type.
_PLAIN = frozenset((str, type(None), Expression))


def frozen(value: Any) -> Any:
    """Constants as a hashable key; equal for constants that render alike."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        return tuple([frozen(v) for v in value])
    if isinstance(value, Mapping):
        return tuple(sorted((k, frozen(v)) for k, v in value.items()))
    # 1, 1.0 and True render differently.
    return kind, value


def load(template: str, constants: Mapping[str, Any]) -> types.ModuleType:
    """The module of a rendered template; rendered and imported once per process for equal constants.

    The module has `__file__`, the generated file, which a person can read and run. Imports triton.
    Raises: SPTError as `render`; whatever importing triton raises.
    """
    # In the order in which the caller has them: sorting takes longer than all the rest of a launch.
    key = (template, tuple(constants), tuple(map(frozen, constants.values())))
    found = _by_constants.get(key)
    if found is not None:
        return found
    source = render(template, constants)
    digest = hashlib.sha256(source.encode()).hexdigest()[:24]
    name = f"{template}_{digest}"
    with _lock:
        module = _modules.get(name)
        if module is None:
            module = _import(name, source)
            _modules[name] = module
        _by_constants[key] = module
    return module


def _import(name: str, source: str) -> types.ModuleType:
    path = store(f"{name}.py", source)
    module = types.ModuleType(f"spt_compiler_kernels.{name}", f"Generated from {path.name}")
    module.__file__ = str(path)
    # The very text that was rendered is run, not what the file holds by now; triton reads its source through linecache.
    code = compile(source, str(path), "exec")
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    sys.modules[module.__name__] = module
    try:
        exec(code, module.__dict__)
    except BaseException:
        sys.modules.pop(module.__name__, None)
        raise
    return module


def loaded_sources() -> dict[str, str]:
    """File name -> path of every kernel generated in this process; for dumps and reports."""
    return {f"{name}.py": str(module.__file__) for name, module in sorted(_modules.items())}
