"""What a lowering did for one kind of call, kept to be done again without deciding it anew.

A lowering that only launches kernels decides by the kinds of its arguments (types, shapes, strides, alignment, plain values), never
by what tensors hold. Deciding takes the host longer than many kernels take the device: structures, constants, strides, grids, for
dozens of launches. So the second call of a kind is recorded: the memory it takes, the torch operators it calls, the kernels it
launches, and where in the arguments or in that memory their pointers lie. From the third on `Tape.play` does just that.

Like a captured CUDA graph, but with memory of its own at every call; it can be captured into one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

aten = torch.ops.aten

# Kinds of call that one lowering remembers: lengths that change all the time should not fill the memory.
_MOST_KINDS = 256
_ALLOCATIONS = frozenset(
    (
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    )
)


class _Unrecordable(Exception):
    """Something that a tape cannot do again; the calls of this kind go on without one."""


class _Local(threading.local):
    recorder: _Recorder | None = None


_local = _Local()


def recorder() -> _Recorder | None:
    """What the calls of this thread are recorded with; None most of the time."""
    return _local.recorder


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


class _Memory:
    """The tensors of a call by slot, and their addresses."""

    __slots__ = ("tensors", "addresses", "stream")

    def __init__(self, arguments: Sequence[Tensor], n_slots: int, stream: int | None):
        more: list[Any] = [None] * (n_slots - len(arguments))
        self.tensors: list[Any] = [*arguments, *more]
        self.addresses = [t.data_ptr() for t in arguments] + more
        self.stream = stream

    def put(self, slot: int, tensor: Tensor) -> None:
        self.tensors[slot], self.addresses[slot] = tensor, tensor.data_ptr()


@dataclass
class _Step:
    """Args: reads, writes: slots.  last: slots that nothing reads after this step."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    last: tuple[int, ...] = field(default=(), init=False)

    def play(self, memory: _Memory) -> None:
        raise NotImplementedError

    @property
    def matters(self) -> bool:
        """Whether it does more than make what it returns."""
        return False


@dataclass
class _Allocation(_Step):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def play(self, memory: _Memory) -> None:
        memory.put(self.writes[0], torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device))


@dataclass
class _Call(_Step):
    """A torch operator. Args: positions: (index of an argument, its slot)."""

    function: Callable[..., Any]
    arguments: list[Any]
    options: dict[str, Any]
    positions: tuple[tuple[int, int], ...]
    mutates: bool

    def play(self, memory: _Memory) -> None:
        arguments = self.arguments.copy()
        for i, slot in self.positions:
            arguments[i] = memory.tensors[slot]
        found = self.function(*arguments, **self.options)
        for slot, tensor in zip(self.writes, (found,) if isinstance(found, Tensor) else found, strict=True):
            memory.put(slot, tensor)

    @property
    def matters(self) -> bool:
        return self.mutates


@dataclass
class _Launch(_Step):
    """A kernel. Args: run: a compiled kernel and its grid.  pointers: (index of a parameter, slot, bytes behind its start)."""

    run: Callable[..., Any]
    parameters: list[Any]
    pointers: tuple[tuple[int, int, int], ...]

    def play(self, memory: _Memory) -> None:
        parameters, addresses = self.parameters.copy(), memory.addresses
        for i, slot, offset in self.pointers:
            parameters[i] = addresses[slot] + offset
        self.run(*parameters, stream=memory.stream)

    @property
    def matters(self) -> bool:
        return True


@dataclass
class _Interpretation(_Launch):
    """A kernel run by Triton's interpreter, which takes tensors. Args: views: (dtype, size, stride) of each pointer."""

    views: tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]], ...]

    def play(self, memory: _Memory) -> None:
        parameters = self.parameters.copy()
        for (i, slot, offset), (dtype, size, stride) in zip(self.pointers, self.views, strict=True):
            storage = memory.tensors[slot].untyped_storage()
            start = (memory.addresses[slot] + offset - storage.data_ptr()) // dtype.itemsize
            parameters[i] = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, start, size, stride)
        self.run(*parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Recording
# ---------------------------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Notes torch operators as a mode, and launches as they are told to it."""

    def __init__(self, arguments: Sequence[Tensor]):
        super().__init__()
        self.steps: list[_Step] = []
        self.fault: str | None = None
        # Whether the fault is of this call alone: a kernel that was launched for the first time.
        self.once = False
        # What the launch of a kernel calls, in the interpreter most of all, belongs to the launch.
        self.paused = False
        # Held, so that no id comes again while this lasts.
        self._held: list[Any] = []
        self._slots: dict[int, int] = {}
        # (slot, where it begins) of the memory that each tensor lies in: of an argument, or of what an operator made.
        self._owners: list[tuple[int, int]] = []
        for tensor in arguments:
            self._add(tensor, None)
        if len(self._slots) < len(arguments):
            self.fault = "the same tensor as two arguments"

    @property
    def n_slots(self) -> int:
        return len(self._owners)

    def _add(self, tensor: Tensor, owner: int | None) -> int:
        slot = len(self._owners)
        self._held.append(tensor)
        self._slots.setdefault(id(tensor), slot)
        self._owners.append((slot, tensor.data_ptr()) if owner is None else self._owners[owner])
        return slot

    def slot(self, tensor: Tensor) -> int:
        found = self._slots.get(id(tensor))
        if found is None:
            raise _Unrecordable("a tensor from elsewhere")
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.fault is None and not self.paused:
            try:
                self._note(func, list(args), kwargs or {}, result)
            except _Unrecordable as reason:
                self.fault = str(reason)
        return result

    def _note(self, function: Any, args: list[Any], options: dict[str, Any], result: Any) -> None:
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if not all(isinstance(t, Tensor) for t in results):
            raise _Unrecordable(f"{function} returns more than tensors")
        if function in _ALLOCATIONS:
            slot = self._add(result, None)
            self.steps.append(_Allocation((), (slot,), tuple(result.shape), result.stride(), result.dtype, result.device))
            return
        positions = tuple((i, self.slot(a)) for i, a in enumerate(args) if isinstance(a, Tensor))
        nested = [a for a in (*args, *options.values()) if isinstance(a, (tuple, list))]
        if any(isinstance(t, Tensor) for a in (*nested, options.values()) for t in a):
            raise _Unrecordable(f"{function} takes tensors by list or by name")
        template = [None if isinstance(a, Tensor) else a for a in args]
        storages = {args[i].untyped_storage()._cdata: slot for i, slot in reversed(positions)}
        writes = []
        for tensor in results:
            known = self._slots.get(id(tensor))  # an operator in place returns its argument
            owner = storages.get(tensor.untyped_storage()._cdata)
            writes.append(self._add(tensor, owner) if known is None else known)
        reads = tuple(slot for _, slot in positions)
        mutates = function._schema.is_mutable
        self.steps.append(_Call(reads, tuple(writes), function, template, options, positions, mutates))

    def launched(self, run: Callable[..., Any], parameters: Sequence[Any]) -> None:
        """Notes a launch. Args: run: the kernel with its grid.  parameters: all of them, in order."""
        if self.fault is not None:
            return
        template, pointers, views = list(parameters), [], []
        try:
            for i, value in enumerate(parameters):
                if isinstance(value, Tensor):
                    slot, start = self._owners[self.slot(value)]
                    template[i] = None
                    pointers.append((i, slot, value.data_ptr() - start))
                    views.append((value.dtype, tuple(value.shape), value.stride()))
        except _Unrecordable as reason:
            self.fault = str(reason)
            return
        reads = tuple({slot: None for _, slot, _ in pointers})
        if self._held[reads[0]].device.type == "cpu":
            self.steps.append(_Interpretation(reads, (), run, template, tuple(pointers), tuple(views)))
        else:
            self.steps.append(_Launch(reads, (), run, template, tuple(pointers)))


# ---------------------------------------------------------------------------------------------------------------------
# Playing
# ---------------------------------------------------------------------------------------------------------------------


class Tape:
    """The steps of a call, and which slots it returns.

    Args: recorder: of the call.  n_arguments: tensors among its arguments.  result: what it returned.
    Raises: _Unrecordable where the result is not made of tensors that the call made.
    """

    def __init__(self, recorder: _Recorder, n_arguments: int, result: Any):
        self._n_slots = recorder.n_slots
        self._kind = type(result) if isinstance(result, (tuple, list)) else None
        self._results = tuple(recorder.slot(t) for t in (result if self._kind is not None else [result]))
        # Backwards: what nobody reads is not made (a view for a kernel is an address), what nobody reads any more is freed.
        wanted, steps = set(self._results), []
        for step in reversed(recorder.steps):
            if step.matters or not wanted.isdisjoint(step.writes):
                used = {*step.reads, *step.writes}
                step.last = tuple(slot for slot in used - wanted if slot >= n_arguments)
                wanted |= used
                steps.append(step)
        self._steps = tuple((step.play, step.last) for step in reversed(steps))

    def play(self, arguments: Sequence[Tensor]) -> Any:
        """Does the call again. Args: arguments: the tensors among its arguments, in order."""
        device = arguments[0].device
        if device.type == "cpu":
            return self._play(arguments, None)
        here = device.index == torch.cuda.current_device()
        with contextlib.nullcontext() if here else torch.cuda.device(device):
            return self._play(arguments, torch.cuda.current_stream(device).cuda_stream)

    def _play(self, arguments: Sequence[Tensor], stream: int | None) -> Any:
        memory = _Memory(arguments, self._n_slots, stream)
        tensors = memory.tensors
        for play, last in self._steps:
            play(memory)
            for slot in last:
                tensors[slot] = None
        results = [tensors[slot] for slot in self._results]
        return results[0] if self._kind is None else self._kind(results)


class Tapes:
    """The tapes of one lowering, by the kind of call."""

    def __init__(self) -> None:
        # None: was called once, or cannot be recorded.
        self._known: dict[Any, Tape | None] = {}
        self._refused: set[Any] = set()

    def call(self, run: Callable[..., Any], supports: Callable[..., Any] | None, args: Sequence[Any]) -> tuple[bool, Any]:
        """(whether `supports` says that it can take these arguments, what `run` returns for them)."""
        arguments: list[Tensor] = []
        kind = tuple([_kind(a, arguments) for a in args])
        tape = self._known.get(kind)
        if tape is not None:
            return True, tape.play(arguments)
        if supports is not None and not supports(*args):
            return False, None
        if not arguments or kind in self._refused:
            return True, run(*args)
        if kind not in self._known:
            result = run(*args)
            if len(self._known) >= _MOST_KINDS:
                self._known.clear()
                self._refused.clear()
            self._known[kind] = None
            return True, result
        return True, self._record(kind, run, args, arguments)

    def _record(self, kind: Any, run: Callable[..., Any], args: Sequence[Any], arguments: Sequence[Tensor]) -> Any:
        recording = _Recorder(arguments)
        _local.recorder, before = recording, _local.recorder
        try:
            with recording:
                result = run(*args)
        finally:
            _local.recorder = before
        try:
            if recording.fault is not None:
                raise _Unrecordable(recording.fault)
            self._known[kind] = Tape(recording, len(arguments), result)
        except _Unrecordable as reason:
            if not recording.once:
                log.debug("calls of %s of one kind are not recorded: %s", run.__name__, reason)
                self._refused.add(kind)
        return result

    def __len__(self) -> int:
        return sum(tape is not None for tape in self._known.values())


def _kind(value: Any, arguments: list[Tensor]) -> Any:
    """What of an argument decides how a lowering acts; tensors are appended to `arguments`."""
    if isinstance(value, Tensor):
        arguments.append(value)
        return value.dtype, value.device, value.shape, value.stride(), value.data_ptr() & 15, is_small(value)
    if isinstance(value, (list, tuple)):
        return tuple([_kind(v, arguments) for v in value])
    return value


def is_small(tensor: Tensor) -> bool:
    """Whether Triton takes offsets into this memory for 32 bits, as it does on AMD chips."""
    return torch.version.hip is not None and tensor.untyped_storage().size() < 2**31
