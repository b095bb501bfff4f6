"""The thin callable around a compiled graph: finds the states of this call's weights, runs due maintenance, appends the
states to the arguments, and strips extra outputs. It is what Dynamo calls at every step, so it counts microseconds.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import calibrate, learning
from .errors import SPTError
from .plan import SiteReport
from .rewrite import Binding
from .state import STORE, SiteState

log = logging.getLogger(__name__)


class _Local(threading.local):
    """Per-thread: whether `dense()` is on, and the graphs of the call in progress."""

    def __init__(self) -> None:
        self.dense = 0
        # Graphs run since the last judged call. Bounded: loops without gradients never clear it.
        self.recent: deque[CompiledGraph] = deque(maxlen=256)
        self.unjudged = False


_local = _Local()


@contextmanager
def dense() -> Iterator[None]:
    """Within it, compiled graphs run their original, dense operators (eagerly), and nothing learns.

    It holds for the calls of this thread. Where checkpointing stands outside of a compiled graph, the backward calls the graph
    again: run it within as well.
    """
    _local.dense += 1
    try:
        yield
    finally:
        _local.dense -= 1


class _Run:
    """One forward with gradients whose backward has not run; dies with the autograd graph if that is dropped."""

    __slots__ = ("__weakref__",)


class _Ledger:
    """Time as the states of one set of layers see it: forwards still open, and whether a backward has run since upkeep."""

    __slots__ = ("open", "backward_ran")

    def __init__(self) -> None:
        self.open: weakref.WeakSet[_Run] = weakref.WeakSet()
        self.backward_ran = False

    def close(self, run: _Run, _grads: Any = None) -> None:
        self.open.discard(run)
        self.backward_ran = True
        if _local.unjudged:
            judge()


class _Bound:
    """The states behind one set of anchors (one layer, or one model) for one graph."""

    __slots__ = ("anchors", "ids", "states", "inputs", "ledger", "version", "first_use", "device", "pinned", "__weakref__")

    def __init__(self, graph: CompiledGraph, arguments: Sequence[Any]):
        real = graph.anchors_of(arguments)
        # Ids tell the anchors of a call in one comparison; they are good for as long as every anchor lives.
        self.ids: tuple[int, ...] | None = tuple(map(id, real))
        expire = functools.partial(_expire, weakref.ref(self))
        self.anchors = tuple(weakref.ref(t, expire) for t in real)
        self.version = STORE.version
        self.states = [STORE.get(t, b.spec, path=b.path) for t, b in zip(real, graph.bindings, strict=True)]
        for state, binding in zip(self.states, graph.bindings, strict=True):
            if not binding.settings.exact:  # with two sets of options on one model, the last that learns is in force
                state.settings, state.settled, state.idle = binding.settings, False, 0
        for state, anchor in zip(self.states, real, strict=True):
            if state.tensors["budget"].device != anchor.device:
                state.to(anchor.device)
        self.device = real[0].device
        self.inputs: list[Tensor] = [t for s in self.states for t in s.graph_inputs()]
        ledgers = [s.ledger for s in self.states if s.ledger is not None]
        self.ledger: _Ledger = ledgers[0] if ledgers else _Ledger()
        for state in self.states:
            state.ledger = self.ledger
            if state.counter("pending"):  # restored from a checkpoint that was taken right after a backward
                state.set_counter("pending", 0)
                self.ledger.backward_ran = True
        self.first_use = any(not s.initialised for s in self.states)
        self.pinned: list[bool] | None = None


def _expire(bound: weakref.ref[_Bound], _anchor: Any) -> None:
    """An anchor has died: its id may come again with another tensor. Its states go with it, while the graph may stay."""
    alive = bound()
    if alive is not None:
        alive.ids, alive.states, alive.inputs = None, [], []


class CompiledGraph:
    """A compiled, rewritten graph. Called with the arguments of Dynamo's graph.

    Args:
        inner: the compiled rewritten graph; takes the arguments and then every state tensor, in the order of `bindings`.
        original: the untouched graph, for `dense()`. extra_outputs: outputs behind Dynamo's own, stripped here.
        reports: rows of its candidate sites. training: compiled with grad mode on. ends_call: the frame ends behind it.
        require_matches: N of the option, judged over the outermost call.
    """

    def __init__(
        self,
        inner: Callable,
        original: Callable,
        bindings: Sequence[Binding],
        reports: Sequence[SiteReport],
        *,
        extra_outputs: int,
        training: bool,
        ends_call: bool,
        config: Any,
    ):
        self.inner, self.original = inner, original
        self.bindings, self.reports = tuple(bindings), tuple(reports)
        self.extra_outputs, self.training, self.ends_call, self.config = extra_outputs, training, ends_call, config
        self.learns = not config.exact
        self._anchors = tuple(b.anchor for b in self.bindings)
        self._bound: dict[int, _Bound] = {}
        _local.unjudged = True

    def __call__(self, *arguments: Any) -> Any:
        if _local.dense:
            return self.original(*arguments)
        if self.bindings:
            bound = self._find(arguments)
            ledger = bound.ledger
            if (
                (ledger.backward_ran or bound.first_use)
                and self.learns
                and not ledger.open
                and torch._C._current_graph_task_id() == -1
            ):
                self._maintain(bound, arguments)
            outputs = self.inner(*arguments, *bound.inputs)
            if self.extra_outputs:
                outputs = self._strip(bound, outputs)
            if self.training:
                self._watch(ledger, outputs)
        else:
            outputs = self.inner(*arguments)
        _local.recent.append(self)
        if _local.unjudged and self.ends_call and _outermost():
            judge()
        return outputs

    def anchors_of(self, arguments: Sequence[Any]) -> list[Any]:
        return [arguments[i] for i in self._anchors]

    def _find(self, arguments: Sequence[Any]) -> _Bound:
        ids = tuple([id(arguments[i]) for i in self._anchors])
        bound = self._bound.get(ids[0])
        if (
            bound is not None
            and bound.ids == ids
            and bound.version == STORE.version
            and arguments[self._anchors[0]].device == bound.device
        ):
            return bound
        for stale in [k for k, b in self._bound.items() if b.ids is None]:
            del self._bound[stale]
        bound = self._bound[ids[0]] = _Bound(self, arguments)
        return bound

    def _maintain(self, bound: _Bound, arguments: Sequence[Any]) -> None:
        after_backward, bound.ledger.backward_ran = bound.ledger.backward_ran, False
        if bound.pinned is None:
            bound.pinned = self._pinned(bound)
        for state, binding, pinned in zip(bound.states, self.bindings, bound.pinned, strict=True):
            if state.settings is None:  # a site that `sites` makes exact: nothing learns there
                continue
            weights = functools.partial(learning.evaluate_weights, binding.weights, arguments)
            try:
                calibrate.maintain(state, weights, after_backward=after_backward, pinned=pinned)
            except Exception as error:
                if self.config.strict:
                    raise
                if not state.fault:
                    state.fault = f"{type(error).__name__}: {error}"
                    warnings.warn(
                        f"spt_compiler: maintenance of {binding.path or '?'}/{state.kind} failed ({state.fault}); "
                        f"the site keeps what it has learned",
                        stacklevel=2,
                    )
        bound.first_use = any(not s.initialised for s in bound.states if s.settings is not None)

    def _pinned(self, bound: _Bound) -> list[bool]:
        first, last = self.config.dense_layers
        if not first and not last:
            return [False] * len(bound.states)
        # One graph for the whole model holds its layers in order; one graph per layer sees them in the order of creation.
        pinned = []
        for state in bound.states:
            alike = [s for b in self._bound.values() for s in b.states if s.kind == state.kind]
            alike.sort(key=lambda s: s.order)
            flags = calibrate.pinned_sites([1] * len(alike), (first, last))
            pinned.append(flags[next(i for i, s in enumerate(alike) if s is state)])
        return pinned

    def _strip(self, bound: _Bound, outputs: Any) -> Any:
        own, extra = outputs[: -self.extra_outputs], outputs[-self.extra_outputs :]
        for state, binding in zip(bound.states, self.bindings, strict=True):
            if binding.losses:
                state.auxiliary_loss = sum(extra[i] for i in binding.losses)  # type: ignore[assignment]
        return own

    def _watch(self, ledger: _Ledger, outputs: Any) -> None:
        """Notices the backward of this call, whichever outputs it starts from."""
        run, seen = None, []
        for output in outputs:
            node = output.grad_fn if isinstance(output, Tensor) else None
            if node is not None and node not in seen:
                if run is None:
                    run = _Run()
                    ledger.open.add(run)
                seen.append(node)
                node.register_prehook(functools.partial(ledger.close, run))

    def replaced(self) -> int:
        return sum(r.status == "replaced" for r in self.reports)


def _outermost() -> bool:
    """Whether the compiled frame that called us is the outermost one (seen through resume functions)."""
    frame, users, result = sys._getframe(2), 0, False
    while frame is not None:
        code = frame.f_code
        if (
            code.co_filename.endswith("eval_frame.py")
            and code.co_name in ("compile_wrapper", "_fn")
            and "prior_skip_guard_eval_unsafe" in code.co_varnames
        ):
            result = users <= 1
        elif f"torch{'/'}" not in code.co_filename and not code.co_name.startswith("torch_dynamo_resume_in"):
            users += 1
        frame = frame.f_back  # type: ignore[assignment]
    return result


def judge() -> None:
    """Ends the outermost call in progress: warns if nothing or a glob of `sites` matched nothing, enforces `require_matches`."""
    last = _local.recent[-1].config if _local.recent else None
    # A call that raised, or another model's, may have left graphs behind.
    graphs = [g for g in _local.recent if g.config == last]
    _local.recent.clear()
    _local.unjudged = False
    unused = graphs[0].config.unused_globs([r.name for g in graphs for r in g.reports]) if graphs else []
    if unused:
        warnings.warn(f"spt_compiler: sites {unused} match no site of this model; explain() shows their names", stacklevel=4)
    replaced = sum(g.replaced() for g in graphs)
    required = max((g.config.require_matches or 0 for g in graphs), default=0)
    if replaced >= max(required, 1) or not graphs:
        return
    misses = sorted({f"{r.name} ({r.where}): {r.reason}" for g in graphs for r in g.reports if r.status == "skipped"})
    nearest = "; ".join(misses[:5]) if misses else "no candidate was seen"
    if replaced < required:
        _local.unjudged = True  # the next call fails as well
        raise SPTError(f"{replaced} site(s) replaced, require_matches = {required}; skipped: {nearest}", stage="match")
    warnings.warn(
        f"spt_compiler replaced nothing: the model runs dense. Nearest misses: {nearest}. "
        f"spt_compiler.explain(model, *inputs) shows every candidate",
        stacklevel=4,
    )


def take_parameters(states: Sequence[SiteState]) -> list[torch.nn.Parameter]:
    """Hands the trainable tensors of `states` to the user's optimizer; the backend stops stepping them."""
    parameters = [t for s in states for t in s.tensors.values() if isinstance(t, torch.nn.Parameter)]
    for state in states:
        state.parameters_taken = True
    return parameters
