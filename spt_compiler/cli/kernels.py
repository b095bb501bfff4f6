"""Compiles the generated kernels for a GPU that need not be there, and reports what they need.

The grid is `lowering/triton_catalog.py`: every template, each with the structure and sizes of typical sites. `--json`
prints {target, kernels: [{kernel, config, dtype, registers, spills, shared_bytes, tensor_core, error}]}; the exit
status is 1 if a kernel failed to compile or exceeds what the target has.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from spt_compiler.cli.console import Console, at_least
from spt_compiler.errors import SPTError

COLUMNS = ("kernel", "config", "dtype", "registers", "spills", "shared_bytes", "tensor_core", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `spt kernels`."""
    from spt_compiler.lowering.triton_catalog import DTYPES
    from spt_compiler.lowering.triton_common import TARGETS

    parser.add_argument("--target", choices=sorted(TARGETS), default="sm_90", help="chip to compile for (default: sm_90)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append", help="only this type; may be repeated")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only kernels whose name or configuration has TEXT in it")
    parser.add_argument("--jobs", type=at_least(1), default=1, metavar="N", help="processes that compile (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


@functools.lru_cache(maxsize=4)
def _entries(target: str, dtypes: tuple[str, ...]) -> list[Any]:
    from spt_compiler.lowering import triton_catalog

    return list(triton_catalog.entries(target, dtypes or tuple(triton_catalog.DTYPES)))


def _row(target: str, dtypes: tuple[str, ...], index: int) -> dict[str, Any]:
    """Compiles one kernel of the grid; recorded anew in the process that this runs in, as kernels cannot be sent to it."""
    from spt_compiler.lowering import triton_common

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # triton announces changes of its own defaults; `launch` sets what matters
        entry = _entries(target, dtypes)[index]
        compiled = triton_common.compile_kernel(entry.spec, target)
    about = {"kernel": entry.spec.kernel, "config": entry.config, "dtype": entry.dtype}
    return {**about, **dataclasses.asdict(compiled)}


def report(target: str, dtypes: Sequence[str] = (), wanted: str = "", jobs: int = 1) -> Iterator[dict[str, Any]]:
    """Compiles the grid, and yields one dict per kernel with the keys `COLUMNS`.

    Args:
        target: of `triton_common.TARGETS`.  dtypes: of `triton_catalog.DTYPES`; none means all.
        wanted: only kernels whose name or configuration contains it.  jobs: processes that compile.
    Raises: SPTError without triton, where triton interprets, for an unknown target, or where no kernel is wanted.
    """
    from spt_compiler.lowering import triton_common

    if not triton_common.available():
        raise SPTError("expected triton to be installed (pip install triton; Linux only)")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SPTError("triton interprets kernels where TRITON_INTERPRET=1; unset it to compile them")
    named = tuple(dtypes)
    chosen = [i for i, e in enumerate(_entries(target, named)) if wanted in e.spec.kernel or wanted in e.config]
    if not chosen:
        raise SPTError(f"no kernel has {wanted!r} in its name or configuration; without --filter all are listed")
    compile_one = functools.partial(_row, target, named)
    if jobs <= 1:
        yield from map(compile_one, chosen)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_one, chosen)


def run(args: argparse.Namespace) -> int:
    """Prints the report. Returns: 0, or 1 if a kernel cannot be used on the target."""
    rows = []
    for row in report(args.target, args.dtype or (), args.filter, args.jobs):
        rows.append(row)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{len(rows)} kernels: {row['kernel']}, {row['config']}, {row['dtype']}\x1b[K")
            sys.stderr.flush()
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    console = Console(plain=args.json)
    failed = [row for row in rows if row["error"]]
    if args.json:
        console.line(json.dumps({"target": args.target, "kernels": rows}, indent=2))
        return 1 if failed else 0
    cells = [
        ["yes" if v is True else "no" if v is False else "" if v is None else v for v in (r[c] for c in COLUMNS)] for r in rows
    ]
    console.table(f"Kernels compiled for {args.target}", COLUMNS, cells)
    spilling = sum(1 for row in rows if row["spills"])
    console.line(f"{len(rows)} kernels, {len(failed)} failed, {spilling} with register spills")
    return 1 if failed else 0
