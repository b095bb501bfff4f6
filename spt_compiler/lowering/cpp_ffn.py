"""The routed FFN's steps between GEMMs in generated C++ (`templates/routed_ffn.cpp.jinja`): rows by index, the activation.

ATen's index_add_ is serial and its activations are separate passes; here each step is one pass on all threads, into memory that
is used again. `cpu_ffn.py` decides where to use them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spt_compiler import expression
from spt_compiler.errors import ExpressionError, SPTError
from spt_compiler.lowering import cpp, cpu_threads

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
_FIELDS = (
    *("n", "width", "threads", "from", "from_stride", "to", "to_stride", "index", "add"),
    *("blocks", "slots", "lists", "n_blocks", "first", "bias", "shift"),
    *("x_stride", "hidden", "hidden_stride", "grad", "grad_stride"),
)


@functools.lru_cache(maxsize=256)
def _constants(act_expr: str, n_in: int, n_act: int, dtype: torch.dtype) -> dict[str, Any] | None:
    act = expression.parse(act_expr)
    pre, captured = [f"x{i}" for i in range(n_in)], [f"a{i}" for i in range(n_act)]
    try:
        slopes = [[x, expression.derivative(act, x)] for x in pre]
    except ExpressionError:
        return None
    fields = [*_FIELDS, *pre, *(f"d{x}" for x in pre), *captured, *(f"{a}_step" for a in captured)]
    return {"in_type": _TYPES[dtype], "act": act, "pre": pre, "captured": captured, "slopes": slopes, "integers": fields}


def kernels(act_expr: str, n_in: int, n_act: int, dtype: torch.dtype) -> Kernels | None:
    """The kernels of an activation for rows of a dtype; None where there are none (fp64, no compiler)."""
    if dtype not in _TYPES or not cpp.usable():
        return None
    constants = _constants(act_expr, n_in, n_act, dtype)
    if constants is None:
        return None
    try:
        return Kernels(cpp.library("routed_ffn", constants), constants["integers"], constants["captured"])
    except SPTError as error:
        cpp.give_up(str(error))
        return None


def foresee(act_expr: str, n_in: int, n_act: int, dtype: torch.dtype) -> None:
    """Compiles them in the background."""
    constants = _constants(act_expr, n_in, n_act, dtype) if dtype in _TYPES and cpp.usable() else None
    if constants is not None:
        cpp.foresee("routed_ffn", constants)


class Kernels:
    """Calls of one library. Tensors are 2-d with innermost stride 1, except where said."""

    def __init__(self, library: Any, fields: Sequence[str], captured: Sequence[str]):
        self.library, self.fields, self.captured = library, fields, captured

    def _call(self, name: str, **values: Any) -> None:
        cpp.call(getattr(self.library, name), self.fields, (), values | {"threads": cpu_threads.width()})

    def gather_rows(self, source: Tensor, index: Tensor, out: Tensor) -> Tensor:
        """out[i] = source[index[i]]."""
        size = source.element_size()
        self._call(
            "gather_rows",
            **{"from": source, "from_stride": source.stride(0) * size, "to": out, "to_stride": out.stride(0) * size},
            **{"n": index.shape[0], "width": source.shape[1] * size, "index": index},
        )
        return out

    def gather_columns(self, source: Tensor, index: Tensor, out: Tensor, *, panel: int) -> None:
        """out[:, j] = source[:, index[j]], every `panel` columns (the last may be fewer) a matrix of their own.

        Args: source [n, .] of the library's dtype.  out: n * len(index) values without gaps, the matrices one after the other.
        """
        self._call(
            "gather_columns",
            **{"from": source, "from_stride": source.stride(0), "to": out, "to_stride": panel},
            **{"n": source.shape[0], "width": index.shape[0], "index": index},
        )

    def sum_blocks(
        self,
        target: Tensor,
        products: Tensor,
        blocks: Tensor,
        rows: Tensor,
        lists: Tensor,
        *,
        first: int,
        bias: Tensor | None,
        shift: Tensor | None,
    ) -> None:
        """target[t] = bias + the products of token `first` + t with its blocks + the shifts of all other blocks, summed in fp32.

        Args:
            target: [n, K].  products: [., K].  blocks: int32 [n, R], ascending, -1 where unused.
            rows: int64 token ids, ascending in each block's list.  lists: int64 [G, 3]: where a block's list of these n tokens
            begins in `rows`, its length, and the place of its first row in `products`.  bias: [K].  shift: fp32 [G, K].
        """
        self._call(
            "sum_blocks",
            **{"from": products, "from_stride": products.stride(0), "to": target, "to_stride": target.stride(0)},
            **{"n": target.shape[0], "width": target.shape[1], "index": rows, "blocks": blocks, "slots": blocks.shape[1]},
            **{"lists": lists, "n_blocks": lists.shape[0], "first": first, "bias": bias, "shift": shift},
        )

    def sum_rows(self, target: Tensor, source: Tensor, *, add: bool) -> None:
        """target [W] fp32 (+)= the sum of the rows of source [n, W]."""
        self._call(
            "sum_rows",
            **{"from": source, "from_stride": source.stride(0), "to": target, "add": int(add)},
            **{"n": source.shape[0], "width": source.shape[1]},
        )

    def activate(self, pre: Sequence[Tensor], act_in: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """out = act(pre); act_in: float values by name, [] or [1], or [W] for one per unit."""
        self._call("activate", hidden=out, hidden_stride=out.stride(0), **self._inputs(pre, act_in))
        return out

    def activate_backward(
        self, pre: Sequence[Tensor], act_in: Mapping[str, Tensor], grad: Tensor, hidden: Tensor | None
    ) -> list[Tensor]:
        """Gradients of the pre-activations from that of the hidden units [n, W], the first in its memory.

        hidden: filled with the hidden units if given.
        """
        grads = [grad, *(torch.empty_like(grad) for _ in pre[1:])]
        given = {} if hidden is None else {"hidden": hidden, "hidden_stride": hidden.stride(0)}
        outputs = {f"dx{i}": g for i, g in enumerate(grads)}
        self._call("activate_backward", grad=grad, grad_stride=grad.stride(0), **outputs, **given, **self._inputs(pre, act_in))
        return grads

    def _inputs(self, pre: Sequence[Tensor], act_in: Mapping[str, Tensor]) -> dict[str, Any]:
        values: dict[str, Any] = {"n": pre[0].shape[0], "width": pre[0].shape[1], "x_stride": pre[0].stride(0)}
        values |= {f"x{i}": x for i, x in enumerate(pre)}
        for name in self.captured:
            values[name] = act_in[name].float().contiguous()
            values[f"{name}_step"] = int(act_in[name].dim() == 1 and act_in[name].shape[0] != 1)
        return values
