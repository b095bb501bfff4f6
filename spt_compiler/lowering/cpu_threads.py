"""Runs independent parts of an op side by side, each on one thread.

ATen runs every operator on all threads and waits for the slowest before the next one. The attention lowerings issue thousands of
operators of some tens of microseconds, so that on a busy machine most of the time would go into waiting. Here each part runs all of
its operators on one thread; the parts meet only at the end, and each keeps its scratch memory in the cache of its core.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence

import torch


class _Job:
    """Parts of one call, taken by the workers in order."""

    def __init__(self, parts: Sequence[Callable[[], None]]):
        self.parts = parts
        self.lock = threading.Lock()
        self.next = 0
        self.open = len(parts)
        self.error: BaseException | None = None
        self.finished = threading.Event()
        self.inference = torch.is_inference_mode_enabled()

    def work(self) -> None:
        """Runs parts until none is left."""
        while True:
            with self.lock:
                index, self.next = self.next, self.next + 1
            if index >= len(self.parts):
                return
            try:
                # The modes of torch belong to a thread: without these, views of parameters would be recorded, and buffers made
                # in inference mode could not be written.
                with torch.inference_mode() if self.inference else contextlib.nullcontext(), torch.no_grad():
                    if self.error is None:
                        self.parts[index]()
            except BaseException as error:  # handed to the caller, whatever it is
                self.error = error
            with self.lock:
                self.open -= 1
                if self.open == 0:
                    self.finished.set()


class _Pool:
    """Threads on which ATen runs serially."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.size = 0
        self.lock = threading.Lock()

    def grow(self, size: int) -> None:
        """Starts threads until there are `size`."""
        with self.lock:
            while self.size < size:
                ready = threading.Event()
                threading.Thread(target=self._serve, args=(ready,), name="spt-cpu", daemon=True).start()
                ready.wait()
                self.size += 1
                # Besides the worker's own setting, set_num_threads changes that of threads yet to come: put it back.
                torch.set_num_threads(torch.get_num_threads())

    def _serve(self, ready: threading.Event) -> None:
        torch.get_num_threads()  # a thread's setting is initialised by its first use, and would replace an earlier one
        torch.set_num_threads(1)
        ready.set()
        while True:
            self.jobs.get().work()


_pool: _Pool | None = None
_pool_lock = threading.Lock()


def width() -> int:
    """How many parts a call should have at least: the threads ATen would use here."""
    return torch.get_num_threads()


def run(parts: Sequence[Callable[[], None]]) -> None:
    """Runs all parts and returns when they are done; on the calling thread if there is one part or one thread.

    Parts may not touch the same memory unless they only read it. The first exception of a part is raised, after the others have
    stopped.
    """
    global _pool
    size = min(width(), len(parts))
    if size <= 1:
        for part in parts:
            part()
        return
    with _pool_lock:
        if _pool is None or _pool.process != os.getpid():  # threads do not survive a fork
            _pool = _Pool()
        pool = _pool
    pool.grow(size)
    job = _Job(parts)
    for _ in range(size):
        pool.jobs.put(job)
    job.finished.wait()
    if job.error is not None:
        raise job.error


def ranges(total: int, n_parts: int) -> list[tuple[int, int]]:
    """`total` things in at most `n_parts` contiguous ranges of nearly equal size."""
    n_parts = max(1, min(n_parts, total))
    return [(total * i // n_parts, total * (i + 1) // n_parts) for i in range(n_parts)] if total else []
