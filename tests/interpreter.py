"""Running kernels on the CPU: tests of generated kernels live in `interpreted_*.py`, and run in a process of their own.

Triton decides when it is imported whether it interprets, so `TRITON_INTERPRET` must not reach the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from spt_compiler.lowering.tape import Tapes

HERE = Path(__file__).parent


def run_interpreted(name: str, cache: Path, *options: str) -> None:
    """Runs `tests/<name>.py` by pytest, in a subprocess that interprets kernels; fails with its output."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "SPT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"{name}.py"), *options]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def prepare() -> None:
    """Repairs three things of Triton's interpreter; called at import by the interpreted tests.

    It multiplies the bit patterns of bfloat16 in `tl.dot`, cuts float32 off to bfloat16 where chips round, and patches
    the whole language again at every call of a helper function, which takes most of the time.
    """
    assert os.environ.get("TRITON_INTERPRET") == "1", "run through run_interpreted"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(self, a, b, d, *_):
        product = np.matmul(widened(a), widened(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    patched: set[int] = set()

    def call(self, *args, **kwargs):
        # A helper of the kernel's own file sees the language that the launch has patched; functions of triton.language
        # see another module, whose patches stay.
        names = self.fn.__globals__
        if names.get("tl") is not tl and id(names) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(names))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = rounding_cast
    interpreter.InterpretedFunction.__call__ = call


def check_close(got: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, what: str = "") -> None:
    """A kernel may err at most twice as much as the plain program in the same dtype; infinities and NaN must agree.

    The definition rounds to 16 bits at its end alone; kernels, like the dense layers they replace, also round
    probabilities and hidden values, for which half a unit in the last place is granted on top.
    """
    assert got.shape == exact.shape, f"{what}: shape {got.shape}, expected {exact.shape}"
    assert got.dtype == eager.dtype, f"{what}: dtype {got.dtype}, expected {eager.dtype}"
    finite = exact.isfinite()
    assert torch.equal(got.isnan(), exact.isnan()), f"{what}: NaN in other places"
    assert torch.equal(got.isfinite(), finite), f"{what}: infinities in other places"
    slack = torch.finfo(got.dtype).eps / 2 if got.dtype in (torch.float16, torch.bfloat16) else 1e-6
    got, exact, eager = (x.double()[finite] for x in (got, exact, eager))
    if exact.numel() == 0:
        return
    rms = [float(x.square().mean().sqrt()) for x in (got - exact, eager - exact, exact)]
    assert rms[0] <= 2 * rms[1] + slack * rms[2] + 1e-6, f"{what}: error {rms[0]:.2e}, eager program {rms[1]:.2e}"


def check_taped(function, args) -> None:
    """Once two calls with other numbers, at other places in memory, are recorded, the tape does what the function does."""
    tapes = Tapes()
    for _ in range(2):
        tapes.call(function, None, _halved(args))
    assert len(tapes) == 1, "not recorded"
    (_, played), direct = tapes.call(_unexpected, None, args), function(*args)
    assert type(played) is type(direct)
    for got, expected in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (played, direct)), strict=True):
        assert got.shape == expected.shape and got.stride() == expected.stride() and got.dtype == expected.dtype
        assert torch.equal(got.nan_to_num(), expected.nan_to_num()) and torch.equal(got.isnan(), expected.isnan())


def _unexpected(*_):
    raise AssertionError("a call that is on tape was made anew")


def _halved(values):
    """Copies laid out as the tensors are, in memory of their own, floats halved; in lists too."""
    if isinstance(values, (list, tuple)):
        return [_halved(v) for v in values]
    if not isinstance(values, torch.Tensor):
        return values
    storage = values.untyped_storage().clone()
    whole = torch.tensor([], dtype=values.dtype).set_(storage)
    if whole.is_floating_point():
        whole.mul_(0.5)
    return whole.set_(storage, values.storage_offset(), values.shape, values.stride())


def double(values):
    """fp64 copies of all floating tensors, in lists too."""
    if isinstance(values, (list, tuple)):
        return [double(v) for v in values]
    return values.double() if isinstance(values, torch.Tensor) and values.is_floating_point() else values
