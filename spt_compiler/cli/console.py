"""Tables and progress bars of the command line: with `rich` where it is installed, plain text elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO


def _rich() -> Any:
    try:
        import rich.console
        import rich.progress
        import rich.table
    except ImportError:
        return None
    return rich


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not below `low`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
        return value

    return convert


class Console:
    """Where a subcommand writes.

    Args:
        stream: text stream; None means `sys.stdout`.
        plain: True never uses rich, False does where it is installed and the stream is a terminal.
    """

    def __init__(self, stream: TextIO | None = None, *, plain: bool = False):
        self.stream = stream or sys.stdout
        self.interactive = self.stream.isatty()
        self._rich = None if plain or not self.interactive else _rich()
        self._console = self._rich.console.Console(file=self.stream, highlight=False) if self._rich else None

    def line(self, text: str = "") -> None:
        """Writes one line of plain text."""
        self.stream.write(text + "\n")
        self.stream.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table; cells are shown with `str`."""
        if self._console:
            from rich.markup import escape

            table = self._rich.table.Table(title=title, title_justify="left", title_style="bold")
            for column in columns:
                table.add_column(escape(column), overflow="fold")
            for row in rows:
                table.add_row(*(escape(str(cell)) for cell in row))
            self._console.print(table)
        else:
            self.line(format_table(title, columns, rows))

    @contextlib.contextmanager
    def progress(self) -> Iterator[ProgressGroup]:
        """Progress bars: the value yielded has `add(label, total)`, whose value has `update(done, note)`."""
        if self._console:
            parts = self._rich.progress
            bars = parts.Progress(
                parts.TextColumn("{task.description}"),
                parts.BarColumn(),
                parts.MofNCompleteColumn(),
                parts.TimeElapsedColumn(),
                parts.TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            with bars:
                yield ProgressGroup(self, bars)
        else:
            yield ProgressGroup(self)


class ProgressGroup:
    """The progress bars shown at one time."""

    def __init__(self, console: Console, bars: Any = None):
        self._parent, self._bars = console, bars

    def add(self, label: str, total: int) -> Progress:
        """A new bar for `total` steps."""
        if self._bars is not None:
            return _RichProgress(self._bars, self._bars.add_task(label, total=total, note="starting"))
        return Progress(self._parent, label, total)


class Progress:
    """Plain progress: a redrawn line on a terminal, about ten lines elsewhere (a log file, a pipe)."""

    def __init__(self, console: Console, label: str, total: int):
        self.console, self.label, self.total = console, label, total
        self._shown = -1

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of the steps are finished; `note` says more (a loss, what is going on)."""
        tenth = done * 10 // max(self.total, 1)
        if self.console.interactive:
            width = 24
            filled = width * done // max(self.total, 1)
            text = f"{self.label} [{'#' * filled}{'.' * (width - filled)}] {done}/{self.total} {note}"
            columns = shutil.get_terminal_size().columns - 1
            end = "\n" if self._shown < 10 <= tenth else ""
            self.console.stream.write("\r" + text[:columns].ljust(columns) + end)
            self.console.stream.flush()
        elif tenth != self._shown:
            self.console.line(f"{self.label} {done}/{self.total} {note}".rstrip())
        self._shown = tenth


class _RichProgress(Progress):
    def __init__(self, bars: Any, task: Any):
        self._bars, self._task = bars, task

    def update(self, done: int, note: str = "") -> None:
        from rich.markup import escape

        self._bars.update(self._task, completed=done, note=escape(note))


def format_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as aligned plain text."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]

    def show(line: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, show(columns), rule, *map(show, cells)]) if title else "\n".join(map(show, [columns, *cells]))


def format_bytes(count: float | None) -> str:
    """A number of bytes in MiB ("-" for None)."""
    return "-" if count is None else f"{count / 2**20:,.1f} MiB"


def format_seconds(seconds: float | None) -> str:
    """A duration in ms below a second, in s above ("-" for None)."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
