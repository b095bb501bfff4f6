"""The routed FFN in generated C++ (`templates/routed_ffn.cpp.jinja`): its kernels, and how they are called.

Their products are oneDNN's micro-kernels, which torch exports to code that is linked with it, as far as it has them for the
processor; `cpu_ffn.py` decides what the kernels do.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.errors import ExpressionError, SPTError
from spt_compiler.lowering import cpp, cpu_threads

log = logging.getLogger(__name__)

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
_FIELDS = (
    *("threads", "brgemm", "release", "n_blocks", "first_block", "last_block", "width", "n_units", "index", "lists", "units"),
    *("in", "n_in", "out", "n_out", "bias", "gates", "saved", "saved_rows", "saved_width"),
    *("strips", "bias_grad", "gates_grad", "add"),
    *("drop_threshold", "drop_key0", "drop_key1", "low_threshold", "low_key0", "low_key1"),
    *("from", "from_stride", "from_unit", "from_k", "to", "to_stride", "k", "into"),
    *("n", "columns", "blocks", "slots", "first", "shift"),
)
_REALS = ("drop_factor", "low_factor")
_OPERAND = ("tokens", "tokens_stride", "k", "into", "out", "products", "grad", "grad_unit", "grad_k", "hidden")
# As in the template.
STEP, _STRIP, _APART = 16, 256, 272
# Of `at::native::cpublas`, by the dtype of the factors: brgemm, and what a thread calls when it needs it no more.
_BRGEMM = {
    torch.float32: "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    torch.bfloat16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
    torch.float16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c104HalfES5_Pfb",
}
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"


@functools.lru_cache(maxsize=256)
def _constants(act_expr: str, n_in: int, n_act: int, dtype: torch.dtype) -> dict[str, Any] | None:
    act = expression.parse(act_expr)
    pre, captured = [f"x{i}" for i in range(n_in)], [f"a{i}" for i in range(n_act)]
    try:
        slopes = [[x, expression.derivative(act, x)] for x in pre]
    except ExpressionError:
        return None
    fields = {"integers": [*_FIELDS, *captured, *(f"{a}_step" for a in captured)], "reals": list(_REALS), "operand": list(_OPERAND)}
    return {"in_type": _TYPES[dtype], "act": act, "pre": pre, "captured": captured, "slopes": slopes, **fields}


@functools.lru_cache(maxsize=len(_BRGEMM))
def _micro_kernels(dtype: torch.dtype) -> dict[str, int]:
    """Addresses of torch's micro-kernels for a dtype; {} where this torch has none, or the processor would emulate them."""
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        return {}
    try:
        library = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
        names = {"brgemm": _BRGEMM[dtype], "release": _RELEASE}
        return {field: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for field, name in names.items()}
    except (StopIteration, OSError, AttributeError) as error:
        log.debug("no micro-kernels for products of %s: %s", dtype, error)
        return {}


def kernels(act_expr: str, n_in: int, n_act: int, dtype: torch.dtype) -> Kernels | None:
    """The kernels of an activation for rows of a dtype; None where there are none (fp64, no compiler)."""
    if dtype not in _TYPES or not cpp.usable():
        return None
    constants = _constants(act_expr, n_in, n_act, dtype)
    if constants is None:
        return None
    try:
        return Kernels(cpp.library("routed_ffn", constants), constants["integers"], constants["captured"], dtype)
    except SPTError as error:
        cpp.give_up(str(error))
        return None


def foresee(act_expr: str, n_in: int, n_act: int, dtype: torch.dtype) -> None:
    """Compiles them in the background."""
    constants = _constants(act_expr, n_in, n_act, dtype) if dtype in _TYPES and cpp.usable() else None
    if constants is not None:
        cpp.foresee("routed_ffn", constants)


def operands(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """int64, descriptions of operands one a row; a tensor stands for its address and must outlive the call."""
    lines = [[_number(row.get(field)) for field in _OPERAND] for row in rows]
    return torch.tensor(lines, dtype=torch.int64)


def _number(value: Any) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else value or 0


def strip_values(n_rows: int, width: int) -> int:
    """Values of one kind that the transposed rows of a block take."""
    return -(-n_rows // _STRIP) * _APART * (-(-width // STEP) * STEP)


class Kernels:
    """Calls of one library; see the template for the fields."""

    def __init__(self, library: Any, fields: Sequence[str], captured: Sequence[str], dtype: torch.dtype):
        self.library, self.fields, self.captured, self.dtype = library, fields, captured, dtype
        self.micro_kernels = _micro_kernels(dtype) if torch.backends.mkldnn.enabled else {}
        if self.micro_kernels and not self._probed():
            self.micro_kernels = {}

    def _probed(self) -> bool:
        """Whether the micro-kernels multiply here, asked once a library: oneDNN may be held to older processors."""
        found = getattr(self.library, "spt_probed", None)
        if found is None:
            try:
                self.call("probe")
                found = True
            except SPTError:
                found = False
            self.library.spt_probed = found
        return found

    def call(self, name: str, **values: Any) -> None:
        """One kernel on all threads."""
        given = values | self.micro_kernels | {"threads": cpu_threads.width()}
        cpp.call(getattr(self.library, name), self.fields, _REALS, given)

    def inputs(self, act_in: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields of what the activation reads beside the pre-activations: one value each, or one per unit in block order."""
        values: dict[str, Any] = {}
        for name in self.captured:
            values[name] = act_in[name].float().contiguous()
            values[f"{name}_step"] = int(act_in[name].dim() == 1 and act_in[name].shape[0] != 1)
        return values

    def sum_rows(self, rows: Tensor) -> Tensor:
        """[k] fp32: the sum of rows [n, k]."""
        if rows.stride(1) != 1:
            return rows.sum(0, dtype=torch.float32)
        out = torch.empty(rows.shape[1])
        shape = {"from_stride": rows.stride(0), "n": rows.shape[0], "columns": rows.shape[1]}
        self.call("sum_rows", **{"from": rows, "to": out}, **shape)
        return out
