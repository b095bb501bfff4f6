"""Lets lowerings know what a graph that is being traced will call, while it is still being compiled.

The fake implementations of operators announce themselves here; they alone see the final dtypes, behind autocast and casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_listener: ContextVar[Callable[[str, Sequence[Any]], None] | None] = ContextVar("spt_traced_calls", default=None)


@contextmanager
def listening(listener: Callable[[str, Sequence[Any]], None]) -> Iterator[None]:
    """Within it, `listener(op name, fake arguments)` hears of every call that this thread traces."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def announce(op_name: str, *arguments: Any) -> None:
    """Called by the fake implementation of an operator."""
    listener = _listener.get()
    if listener is not None:
        listener(op_name, arguments)
