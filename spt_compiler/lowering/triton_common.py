"""What the Triton lowerings share: launching, recording launches for ahead-of-time compilation, and compiling them.

A lowering builds its kernels' arguments once, for tensors of any device. `launch` runs a kernel; inside `recording()`
it notes down what would have been launched instead, so that a lowering called with meta tensors lists its kernels with
their exact types and constants, and `compile_kernel` builds them for a GPU that need not be there. Triton is imported
in functions only.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import logging
import os
import re
import subprocess
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.errors import ExpressionError, KernelError, Reject, SPTError
from spt_compiler.lowering import render, tape, triton_tuning
from spt_compiler.lowering.triton_tuning import Setting

log = logging.getLogger(__name__)

Alternatives = Sequence[Setting] | Callable[[], Sequence[Setting]]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@functools.lru_cache(maxsize=1)
def available() -> bool:
    """Whether triton is installed (it is not imported for this)."""
    return importlib.util.find_spec("triton") is not None


def accepts(guard: Callable[..., Reject | None]) -> Callable[..., Reject | bool]:
    """A guard (None or a `Reject`) as the registry wants it: true where the arguments are supported, else the
    `Reject`."""

    @functools.wraps(guard)
    def supports(*args: Any) -> Reject | bool:
        reason = guard(*args)
        return True if reason is None else reason

    return supports


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


# ---------------------------------------------------------------------------------------------------------------------
# Launching
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelSpec:
    """A launch as recorded: all that decides the compiled code.

    Args:
        kernel: name of the function.  template: where it came from.  module: of the generated file.
        signature: (parameter, type) in order; type "constexpr" for constants.
        constants: (parameter, value) of those.  divisible: parameters known to be multiples of 16.
    """

    kernel: str
    template: str
    module: types.ModuleType = field(compare=False, repr=False)
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    source: str = ""


_recorded: contextvars.ContextVar[list[KernelSpec] | None] = contextvars.ContextVar("spt_recorded", default=None)
_recorded_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("spt_recorded_for", default=None)


@contextlib.contextmanager
def recording(target: str = "sm_90") -> Iterator[list[KernelSpec]]:
    """Inside, `launch` appends a `KernelSpec` to the list that this yields, and runs nothing.

    Args: target: of `TARGETS`; the chip that the launches are made for.
    """
    specs: list[KernelSpec] = []
    tokens = _recorded.set(specs), _recorded_for.set(target)
    try:
        yield specs
    finally:
        _recorded.reset(tokens[0])
        _recorded_for.reset(tokens[1])


def on_hip() -> bool:
    """Whether launches are for an AMD chip: the one recorded for, else what this torch was built for."""
    target = _recorded_for.get()
    return target.startswith("gfx") if target is not None else torch.version.hip is not None


def before_hopper() -> bool:
    """Whether launches are for an NVIDIA chip without warp-group products, whose operands take registers."""
    target = _recorded_for.get()
    if target is not None:
        return target == "sm_80"
    return torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9


def on_hopper() -> bool:
    """Whether launches are for an NVIDIA chip of that generation, with its warp-group products and large shared memory."""
    target = _recorded_for.get()
    if target is not None:
        return target == "sm_90"
    return torch.version.hip is None and (not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9)


def product_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: full float32, as torch's matmul has by default (the 16-bit types ignore it).

    On NVIDIA chips three TF32 products on tensor cores make one that is as good; AMD's multiply float32 directly.
    """
    return "tf32x3" if dtype == torch.float32 and not on_hip() else "ieee"


def _argument_type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPE_NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise SPTError(f"a kernel argument has type {type(value).__name__}", stage="lower")


def _record(
    template: str,
    module: types.ModuleType,
    kernel: str,
    args: Mapping[str, Any],
    constants: Mapping[str, Any],
    **tuning: int,
) -> KernelSpec:
    """The specialisation that Triton's JIT would choose: aligned pointers, multiples of 16, and ones as constants."""
    names = getattr(module, kernel).arg_names
    signature, fixed, divisible = [], [], []
    for name in names:
        if name in constants:
            signature.append((name, "constexpr"))
            fixed.append((name, constants[name]))
            continue
        value = args[name]
        if isinstance(value, int) and not isinstance(value, bool) and value == 1:
            signature.append((name, "constexpr"))
            fixed.append((name, 1))
            continue
        signature.append((name, _argument_type(value)))
        if isinstance(value, Tensor) or (isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0):
            divisible.append(name)
    return KernelSpec(
        kernel,
        template,
        module,
        tuple(signature),
        tuple(fixed),
        tuple(divisible),
        source=Path(str(module.__file__)).name,
        **tuning,
    )


# Compiled kernels by all that Triton compiles a kernel anew for. Triton finds them, too, but takes longer than many a kernel.
_compiled: dict[Any, Any] = {}
# Of launches that have run: the compiled kernel with the setting that was chosen, and its parameters: constants alone, None for the
# others, as a tensor that stood here would never be freed.
_ready: dict[Any, tuple[Any, list[Any]]] = {}
# Parameters of a kernel that are no constants, and where they stand.
_runtime: dict[Any, tuple[tuple[int, str], ...]] = {}
# Launches on a device that no setting could serve, with the arguments of their `KernelError` (an error that was raised holds the
# frames that it passed, and their tensors), and those that needed another than the first.
_failed: dict[Any, tuple[str, str, str]] = {}
_preferred: dict[Any, Setting] = {}


_NUMBERS = frozenset((int, float, bool))
# Launches that are remembered: lengths that change all the time should not fill the memory.
_MOST_READY = 8192


def _specialisation(value: Any) -> Any:
    """What of an argument decides the compiled code: types, and whether it is one or a multiple of 16."""
    if isinstance(value, Tensor):
        return value.dtype, value.get_device(), value.data_ptr() % 16 == 0, tape.is_small(value)
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return type(value)


@functools.lru_cache(maxsize=1)
def _guard_compiler_cache() -> None:
    """Triton runs what it finds in its cache: where others can write to it, a folder of this package takes its place."""
    from triton import knobs

    folder = Path(knobs.cache.dir)
    reason = render.fault(folder) if folder.exists() or folder.is_symlink() else None
    if reason is not None:
        own = render.cache_folder() / "triton"
        own.mkdir(mode=0o700, exist_ok=True)
        knobs.cache.dir = str(own)
        warnings.warn(f"spt_compiler: triton's cache folder {folder} {reason}; kernels are compiled in {own}", stacklevel=3)


def _compiling(call: Callable[[], Any]) -> Any:
    """What `call`, which may compile, returns; should it fail, once more without reading triton's cache.

    A corrupt entry of that cache then is written anew.
    """
    from triton import knobs

    _guard_compiler_cache()
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a damaged file makes the compiler or the driver raise anything
        from triton.runtime.cache import FileCacheManager

        class WriteOnly(FileCacheManager):
            def get_file(self, filename: str) -> None:
                return None

            def get_group(self, filename: str) -> None:
                return None

        with knobs.cache.scope():
            knobs.cache.manager_class = WriteOnly
            return call()


def _run(key: Any, settings: Sequence[Setting], run: Callable[[Setting], None]) -> Setting:
    """Runs with the first setting that the device can run, and returns it; remembers it, or that there is none.

    Raises: KernelError if there is none, naming the kernel, the configuration and the cause.
    """
    known = _preferred.get(key)
    causes: list[str] = []
    for setting in (known,) if known is not None else settings:
        try:
            _compiling(functools.partial(run, setting))
        except torch.OutOfMemoryError:
            raise
        except Exception as cause:  # compilers and drivers raise whatever they like
            causes.append(f"{type(cause).__name__}: {cause}".strip()[:500])
            log.debug("a kernel cannot run with %s", setting, exc_info=cause)
            continue
        if known is None and setting != settings[0]:
            _preferred[key] = setting
        return setting
    _, kernel, constants, types, _ = key
    configuration = ", ".join([*types, *(f"{name} {value}" for name, value in sorted(constants))])
    _failed[key] = kernel, configuration, causes[0]
    raise KernelError(*_failed[key])


def launch(
    template: str,
    structure: Mapping[str, Any],
    kernel: str,
    grid: Sequence[int],
    args: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    alternatives: Alternatives = (),
) -> None:
    """Renders (once), compiles (once) and launches a kernel on the current stream of its tensors' device.

    Args:
        template, structure: see `render.load`.  kernel: name of a function in it.
        grid: programs along each axis; nothing runs if one is 0.  args: run-time parameters by name, and perhaps some that
            this kernel does not have (the kernels of an op share most); its first tensor decides the device.
            constants: `tl.constexpr` parameters by name, likewise.  num_warps, num_stages: the safe setting.
        alternatives: other settings (or what lists them, asked when the launch is new), one of which may be faster (see
            `triton_tuning.py`), or run where the device has too little for the first. For kernels that may run twice: that
            write what they do not read.
    Raises: KernelError where the device can run it with no setting; for the same launch then again, without trying.
        KeyError for a parameter that is missing.
    """
    module = render.load(template, structure)
    recorder = tape.recorder()
    specs = _recorded.get()
    if specs is not None:
        specs.append(_record(template, module, kernel, args, constants, num_warps=num_warps, num_stages=num_stages))
        if recorder is not None:
            recorder.fault = "nothing was launched"
        return
    if 0 in grid:
        return
    kind = (module.__name__, kernel, tuple(constants))
    runtime = _runtime.get(kind)
    if runtime is None:
        names = getattr(module, kernel).arg_names
        runtime = _runtime[kind] = tuple((i, name) for i, name in enumerate(names) if name not in constants)
    values = [args[name] for _, name in runtime]
    seen = tuple([x if type(x) in _NUMBERS else (x.dtype, x.get_device(), x.data_ptr() & 15) for x in values])
    if torch.version.hip is not None:
        seen += tuple([tape.is_small(x) for x in values if isinstance(x, Tensor)])
    place = (*kind, tuple(constants.values()), seen)
    ready = _ready.get(place)
    if ready is None:
        what = (*kind, tuple(constants.values()), tuple(map(_specialisation, values)))
        settings = (Setting(num_warps, num_stages), *(alternatives() if callable(alternatives) else alternatives))
        if recorder is not None:
            recorder.fault, recorder.once = "a kernel was not ready", True
        ready = _prepare(what, module, kernel, grid, args, constants, settings)
        if ready is not None:
            if len(_ready) >= _MOST_READY:
                _ready.clear()
            _ready[place] = ready
        return
    compiled, parameters = ready
    parameters = parameters.copy()
    for (i, _), value in zip(runtime, values, strict=True):
        parameters[i] = value
    run = compiled[(*grid, 1, 1)[:3]]
    if recorder is not None:
        recorder.launched(run, parameters)
        recorder.paused = True
    device = next(x for x in values if isinstance(x, Tensor)).get_device()
    here = device < 0 or device == torch.cuda.current_device()
    with contextlib.nullcontext() if here else torch.cuda.device(device):
        run(*parameters)
    if recorder is not None:
        recorder.paused = False


def _prepare(
    what: Any,
    module: types.ModuleType,
    kernel: str,
    grid: Sequence[int],
    args: Mapping[str, Any],
    constants: Mapping[str, Any],
    settings: Sequence[Setting],
) -> tuple[Any, list[Any]] | None:
    """Launches a kernel by way of Triton, which compiles it, with the fastest setting known that the device can run.

    Args: what: all that decides the compiled code but for the setting.  settings: the safe one first.
    Returns: an entry of `_ready`; None where triton hands out no kernel. The interpreter runs the function itself.
    """
    function = getattr(module, kernel)
    tensors = [args[name] for name in function.arg_names if isinstance(args.get(name), Tensor)]
    device = tensors[0].device

    def fixed(setting: Setting) -> dict[str, Any]:
        return {**constants, **dict(setting.constants)}

    def parameters(setting: Setting) -> dict[str, Any]:
        final = fixed(setting)
        return {name: final[name] if name in final else args[name] for name in function.arg_names}

    def run(setting: Setting) -> None:
        known = _compiled.get((what, setting))
        if known is not None:
            known[(*grid, 1, 1)[:3]](*parameters(setting).values())
            return
        warps = {"num_warps": setting.num_warps, "num_stages": setting.num_stages}
        _compiled[what, setting] = function[tuple(grid)](**parameters(setting), **warps, enable_fp_fusion=True)

    if device.type == "cpu":  # the interpreter
        run(settings[0])
        return function, [fixed(settings[0]).get(name) for name in function.arg_names]
    key = (module.__name__, kernel, tuple(constants.items()), tuple([_TYPE_NAMES[x.dtype] for x in tensors]), device)
    if key in _failed:
        raise KernelError(*_failed[key])
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if len(settings) > 1 and not triton_tuning.idle(device):
            from triton.testing import do_bench

            def measure(setting: Setting) -> float:
                return do_bench(functools.partial(run, setting), warmup=5, rep=20, return_mode="median")

            # Loops without a pipeline are for devices with little memory. They never won, and a run that tried them crashed.
            tried = tuple(s for s in settings if s.num_stages > 1) if settings[0].num_stages > 1 else settings
            sizes = triton_tuning.key_of(module.__name__, kernel, args, constants, tried)
            best = triton_tuning.choose(device, sizes, tried, measure)
            settings = (best, *(s for s in settings if s != best))
        used = _run(key, settings, run)
    compiled = _compiled[what, used]
    return None if compiled is None else (compiled, [fixed(used).get(name) for name in function.arg_names])


def strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """{"<name>_stride_<axis>": stride} for one letter per dimension."""
    return {f"{name}_stride_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def byte_view(mask: Tensor) -> Tensor:
    """A bool tensor as uint8 of the same storage; another tensor as it is."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def bias_structure(bias: Tensor | None) -> str | None:
    """The constant `bias` of templates."""
    return None if bias is None else "bool" if bias.dtype == torch.bool else "float"


def bias_arguments(bias: Tensor | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """A mask tensor as arguments of kernels, expanded to shape [B, H, Tq, Tk]; none without one."""
    if bias is None:
        return {}
    view = byte_view(bias).expand(shape)
    return {"bias_ptr": view, **strides("bias", view, "bhqk")}


# ---------------------------------------------------------------------------------------------------------------------
# Expressions
# ---------------------------------------------------------------------------------------------------------------------


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    return "float" if tensor.is_floating_point() else "int"


@dataclass(frozen=True)
class Mask:
    """A mask expression ready for templates: the tree, the kinds and ranks of what it reads, and the run-time
    arguments."""

    expr: expression.Expression | None
    reads: tuple[dict[str, Any], ...]
    args: dict[str, Any]

    @property
    def structure(self) -> dict[str, Any]:
        """Constants of the template."""
        return {"mask": self.expr, "reads": list(self.reads)}


@functools.lru_cache(maxsize=1024)
def _renumbered(expr: str) -> tuple[expression.Expression, tuple[int, ...]]:
    """The tree with the tensors it reads renumbered t0, t1, ..., and their numbers before."""
    parsed = expression.parse(expr)
    used = tuple(sorted(int(name.removeprefix("t")) for name in expression.read_ranks(parsed)))
    return expression.substitute(parsed, {f"t{i}": f"t{new}" for new, i in enumerate(used)}), used


def mask_of(expr: str, expr_in: Sequence[Tensor]) -> Mask:
    """The `Mask` of a mask expression and its tensors t0, t1, ... (renumbered, without those that are not read)."""
    if not expr:
        return Mask(None, (), {})
    tree, used = _renumbered(expr)
    reads: list[dict[str, Any]] = []
    args: dict[str, Any] = {}
    for new, i in enumerate(used):
        tensor = expr_in[i]
        reads.append({"kind": _kind(tensor), "rank": tensor.dim()})
        args[f"t{new}_ptr"] = byte_view(tensor)
        for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            args[f"t{new}_size{d}"] = size
            args[f"t{new}_stride{d}"] = stride
    return Mask(tree, tuple(reads), args)


def supports_mask(expr: str, expr_in: Sequence[Tensor]) -> Reject | None:
    """None where the expression can be generated into a kernel, else the reason."""
    if not expr:
        return None
    try:
        parsed = expression.parse(expr)
        ranks = expression.read_ranks(parsed)
    except ExpressionError as error:
        return Reject("mask expression: {}", error)
    for name in sorted(parsed.variables - {"b", "h", "q", "k"}):
        position = name.removeprefix("t")
        if name not in ranks or not position.isdigit() or int(position) >= len(expr_in):
            return Reject("mask expression reads {}, of which there is no tensor", name)
        tensor = expr_in[int(position)]
        if tensor.dim() != ranks[name]:
            return Reject("{} has rank {}, the mask expression reads rank {}", name, tensor.dim(), ranks[name])
        if tensor.dtype not in _TYPE_NAMES or tensor.dtype == torch.float64:
            return Reject("{} has dtype {}", name, tensor.dtype)
    return None


def dropout_threshold(p: float) -> int:
    """floor(p * 2^32): a hash below it is dropped (`ops/reference.py`, `dropout_keep`); p = 1 drops every one."""
    return 1 << 32 if p >= 1 else int(p * 2**32)


# ---------------------------------------------------------------------------------------------------------------------
# Ahead-of-time compilation
# ---------------------------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Shared memory that one program may use on each target, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

_TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)|\bv_s?mfma")


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on a target; None where the toolchain does not say.

    Args: registers: per thread.  spills: bytes per thread (CUDA) or registers (HIP) spilled.  shared_bytes: per
    program.
    """

    registers: int | None
    spills: int | None
    shared_bytes: int | None
    tensor_core: bool
    error: str | None


def compile_kernel(spec: KernelSpec, target: str) -> Compiled:
    """Compiles a recorded kernel for a target, without a device.

    Args: spec: from `recording`.  target: of `TARGETS`.
    Returns: its resources; a failure of the compiler is reported in `error`.
    Raises: SPTError for an unknown target, or where triton interprets instead of compiling.
    """
    if target not in TARGETS:
        raise SPTError(f"expected a target of {', '.join(TARGETS)}, got {target!r}", stage="lower")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(spec.module, spec.kernel)
    if not isinstance(function, triton.JITFunction):
        raise SPTError("triton interprets kernels in this process; unset TRITON_INTERPRET to compile", stage="lower")
    position = {name: i for i, name in enumerate(function.arg_names)}
    attrs = {(position[name],): [["tt.divisibility", 16]] for name in spec.divisible}
    try:
        source = ASTSource(fn=function, signature=dict(spec.signature), constexprs=dict(spec.constants), attrs=attrs)
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
        chip = GPUTarget(*TARGETS[target])
        compiled = _compiling(lambda: triton.compile(source, target=chip, options=options))
    except Exception as error:  # the compiler raises whatever it likes; the report carries it
        return Compiled(None, None, None, False, f"{type(error).__name__}: {error}".strip()[:500])
    shared = getattr(compiled.metadata, "shared", None)
    assembly = compiled.asm.get("ptx") or compiled.asm.get("amdgcn") or ""
    tensor_core = bool(_TENSOR_CORE.search(assembly))
    registers, spills = _hip_usage(assembly) if target.startswith("gfx") else _cuda_usage(compiled.asm["cubin"])
    error = None
    if shared is not None and shared > SHARED_LIMIT[target]:
        error = f"needs {shared} bytes of shared memory, {target} has {SHARED_LIMIT[target]}"
    return Compiled(registers, spills, shared, tensor_core, error)


def _hip_usage(assembly: str) -> tuple[int | None, int | None]:
    def number(key: str) -> int | None:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else None

    return number("vgpr_count"), number("vgpr_spill_count")


def _cuda_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers, and bytes of stack: without arrays of its own a kernel uses the stack for spills alone."""
    from triton import knobs

    tool = getattr(knobs.nvidia, "cuobjdump", None)
    if tool is None:
        return None, None
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        command = [tool.path, "-res-usage", path]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, None
    finally:
        Path(path).unlink(missing_ok=True)
    registers, stack = re.search(r"\bREG:(\d+)", text), re.search(r"\bSTACK:(\d+)", text)
    return int(registers.group(1)) if registers else None, int(stack.group(1)) if stack else None
