"""Runs each variant of a training run in a process of its own: peak memory belongs to one variant, a crash too."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from spt_compiler.cli import missing_extra
from spt_compiler.cli.console import Console, Progress
from spt_compiler.errors import SPTError

# What the processes have in common is imported once, by the server they are forked from. Nothing there starts threads.
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "safetensors.torch",
    "transformers.models.auto",
    "spt_compiler.cli.training",
]


class Interrupted(KeyboardInterrupt):
    """The user asked to stop, and the workers have."""


def start(preload: list[str] | tuple[str, ...] = ()) -> Any:
    """A multiprocessing context whose processes start quickly; begins the shared imports at once.

    Args:
        preload: further modules to import before the first process starts.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOAD, *preload])
    from multiprocessing import forkserver

    forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Job:
    """One call in a process of its own: `function(*arguments, report=..., should_stop=...)`.

    Attributes:
        label: of its progress bar.  total: steps of it; `report({"event": "step", "done": n, "loss": x})` moves it.
        function: importable by name.  arguments: picklable.
    """

    label: str
    total: int
    function: Callable[..., Any]
    arguments: tuple


def call(context: Any, jobs: Sequence[Job], console: Console) -> list[Any]:
    """Runs jobs side by side, each in a new process, and shows their progress.

    Args:
        context: from `start`.
    Returns: what the functions returned, in the order of `jobs`.
    Raises: Interrupted after Ctrl-C, once all have stopped; SPTError if one failed, with its message (the others are
        stopped).
    """
    running: dict[Any, _Running] = {}
    with console.progress() as progress:
        for job in jobs:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, job.function, job.arguments), name=job.label.strip())
            process.start()
            sender.close()
            running[receiver] = _Running(job, process, progress.add(job.label, job.total))
        waiting = dict(running)
        interrupts = 0
        while waiting:
            try:
                ready: list[Any] = list(wait(list(waiting)))
                for receiver in ready:
                    try:
                        waiting[receiver].take(receiver.recv(), quiet=interrupts > 0)
                    except EOFError:
                        del waiting[receiver]
                if any(one.failure for one in running.values()) and not interrupts:
                    interrupts = 3  # nothing that the others still do would be used
                    for other in waiting.values():
                        other.process.terminate()
            except KeyboardInterrupt:
                interrupts += 1
                for one in waiting.values():
                    if interrupts > 2:
                        one.process.kill()
                    elif one.process.is_alive():
                        os.kill(one.process.pid, signal.SIGINT)
                        one.bar.update(one.done, "finishing this step, then saving; again to stop at once")
        for one in running.values():
            one.process.join()
    for one in running.values():
        if one.failure is not None:
            raise SPTError(f"{one.job.label.strip()}: {one.failure}")
    if interrupts:
        raise Interrupted
    for one in running.values():
        if one.result is None:
            raise SPTError(
                f"{one.job.label.strip()}: the process ended with status {one.process.exitcode} and no word; "
                "on Linux -9 usually means that memory ran out: use a smaller --seq, --batch or model"
            )
    return [one.result["value"] for one in running.values() if one.result]


@dataclass
class _Running:
    job: Job
    process: Any
    bar: Progress
    done: int = 0
    result: dict[str, Any] | None = None
    failure: str | None = None

    def take(self, message: dict[str, Any], *, quiet: bool) -> None:
        event = message["event"]
        if event == "step":
            self.done = message["done"]
            note = f"loss {message['loss']:.4f}" if message.get("loss") is not None else message.get("text", "")
            if not quiet:
                self.bar.update(self.done, note)
        elif event == "note":
            self.bar.update(self.done, message["text"])
        elif event == "done":
            self.result = {"value": message["value"]}
        elif event == "failed":
            self.failure = message["text"]


def _work(sender: Any, function: Callable[..., Any], arguments: tuple) -> None:
    """Body of the worker process."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C of the terminal reaches the parent alone, which passes it on once
    stops = 0

    def interrupt(signum: int, frame: Any) -> None:
        nonlocal stops
        stops += 1
        if stops > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)

    def report(message: dict[str, Any]) -> None:
        try:
            sender.send(message)
        except (BrokenPipeError, OSError):
            nonlocal stops
            stops += 1  # the parent is gone: stop after this step, checkpoint included

    def should_stop() -> bool:
        return stops > 0

    try:
        value = function(*arguments, report=report, should_stop=should_stop)
        report({"event": "done", "value": value})
    except KeyboardInterrupt:
        report({"event": "failed", "text": "stopped at once"})
    except (SPTError, ValueError) as error:
        report({"event": "failed", "text": str(error)})
    except Exception as error:
        remedy = missing_extra(error) if isinstance(error, ModuleNotFoundError) else None
        if remedy:
            report({"event": "failed", "text": remedy})
            return
        traceback.print_exc(file=sys.stderr)
        report({"event": "failed", "text": f"{type(error).__name__}: {error}"})
    finally:
        sender.close()
