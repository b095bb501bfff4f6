"""Seeing what was done: stage timings, dumps, the match report, `explain`. Reads stage values, changes nothing."""

from __future__ import annotations

import dataclasses
import html
import json
import logging
import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .plan import SiteReport

if TYPE_CHECKING:
    from .backend import Prepared
    from .config import SPTConfig

log = logging.getLogger(__name__)

_seconds: defaultdict[str, float] = defaultdict(float)
_reports: list[list[SiteReport]] = []


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Adds the time spent inside to the stage's total."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _seconds[name] += time.perf_counter() - start


def timings(*, reset: bool = False) -> dict[str, float]:
    """Seconds spent in each stage since the process started (or the last reset): copy, canonicalize, match, plan, rewrite
    (our own passes) and inner (the inner compiler)."""
    result = dict(_seconds)
    if reset:
        _seconds.clear()
    return result


def reports() -> list[list[SiteReport]]:
    """Rows of every graph compiled since the last `torch._dynamo.reset()`."""
    return [list(r) for r in _reports]


def clear() -> None:
    _reports.clear()


def failed(report: SiteReport, reason: str) -> SiteReport:
    """The row of a site that stays dense after all."""
    if report.status == "skipped":
        return report
    return dataclasses.replace(
        report, status="skipped", reason=reason, density=None, executed=None, lowering="", expected_gain=None
    )


# ---- dumps --------------------------------------------------------------------------------------------------------


def dump_folder(config: SPTConfig) -> str | None:
    """Folder of option `dump` (`SPT_DUMP` in the environment), or torch's own with TORCH_COMPILE_DEBUG=1."""
    if config.dump:
        return config.dump
    if os.environ.get("TORCH_COMPILE_DEBUG") == "1":
        from torch._dynamo.utils import get_debug_dir

        return os.path.join(get_debug_dir(), "spt_compiler")
    return None


def wants_snapshots(config: SPTConfig) -> bool:
    return dump_folder(config) is not None


def readable(module: fx.GraphModule) -> str:
    """Python text of a graph and of the bodies it calls."""
    return module.print_readable(print_output=False, include_stride=False)


def publish(prepared: Prepared, gm: fx.GraphModule, config: SPTConfig) -> None:
    """Hands out the report of one graph: log, tlparse artifact, dump folder."""
    rows = prepared.reports
    _reports.append(rows)
    for row in rows:
        log.debug(
            "%s %s (%s) %s%s", row.status, row.name, row.where, row.pattern, f": {row.reason}" if row.reason else ""
        )
    document = {"sites": [dataclasses.asdict(r) for r in rows], "options": config.to_options()}
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "spt_match_report", "encoding": "json"},
        payload_fn=lambda: json.dumps(document, default=str),
    )
    folder = dump_folder(config)
    if folder is not None:
        try:
            _dump(Path(folder), prepared, document)
        except OSError as error:
            warnings.warn(
                f"spt_compiler: cannot write the dump to {folder}: {error}; compilation goes on", stacklevel=2
            )


def _dump(folder: Path, prepared: Prepared, document: Mapping[str, Any]) -> None:
    context = torch._guards.CompileContext.current_compile_id()
    name = str(context).replace("/", "_") if context is not None else "0"
    rank = f".rank{torch.distributed.get_rank()}" if _distributed() else ""
    target = folder / f"{name}{rank}"
    target.mkdir(parents=True, exist_ok=True)
    matches = "\n".join(
        f"{r.status:8} {r.name:40} {r.where:40} {r.pattern}{'  -- ' + r.reason if r.reason else ''}"
        for r in prepared.reports
    )
    files = {
        **prepared.snapshots,
        "20_matches.txt": matches + "\n",
        "30_plan.json": json.dumps(document, indent=1, default=str),
    }
    files.update(_kernel_sources())
    for file, text in files.items():
        (target / file).write_text(text)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _kernel_sources() -> dict[str, str]:
    from .lowering import render

    return {f"50_{name}": Path(path).read_text() for name, path in render.loaded_sources().items()}


# ---- explain ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the backend does to one forward of a model: one row per executed candidate site.

    Attributes: sites: `SiteReport` rows in execution order (a module that runs twice has two).
    """

    sites: tuple[SiteReport, ...]

    def replaced(self, kind: str | None = None) -> int:
        return sum(s.status == "replaced" and kind in (None, s.kind) for s in self.sites)

    def summary(self) -> str:
        """A table for a terminal: totals, then a row per site (equal rows of different layers folded)."""
        lines = []
        for kind in ("attention", "ffn"):
            rows = [s for s in self.sites if s.kind == kind]
            if rows:
                lines.append(f"{kind} {self.replaced(kind)}/{len(rows)}")
        lines = [", ".join(lines) or "no candidate site"]
        for row, count, example in _folded(self.sites):
            share = f"{row.density:.3g}" if row.density is not None else "-"
            executed = f"{row.executed:.3g}" if row.executed is not None else "-"
            gain = f"{row.expected_gain:.2f}x" if row.expected_gain is not None else "-"
            detail = row.reason or f"density {share}, executed {executed}, gain {gain}, {row.lowering}"
            mask = f", mask {row.mask}" if row.mask else ""
            lines.append(f"  {count:3d} x {row.status:8} {row.kind:9} {example} ({row.where}): {detail}{mask}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: {"sites": [row, ...], "replaced": {kind: n}, "skipped": {kind: n}}."""
        skipped = Counter(s.kind for s in self.sites if s.status == "skipped")
        return {
            "sites": [dataclasses.asdict(s) for s in self.sites],
            "replaced": {k: self.replaced(k) for k in ("attention", "ffn")},
            "skipped": {k: skipped[k] for k in ("attention", "ffn")},
        }

    def to_html(self, path: str | os.PathLike) -> None:
        """Writes a self-contained page with the table."""
        names = [f.name for f in dataclasses.fields(SiteReport)]
        head = "".join(f"<th>{n}</th>" for n in names)
        body = "\n".join(
            f'<tr class="{html.escape(s.status)}">'
            + "".join(f"<td>{html.escape('' if getattr(s, n) is None else str(getattr(s, n)))}</td>" for n in names)
            + "</tr>"
            for s in self.sites
        )
        Path(path).write_text(
            "<!doctype html><meta charset=utf-8><title>spt_compiler: sites</title><style>body{font:14px sans-serif}"
            "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:3px 6px;text-align:left}"
            "tr.skipped{color:#777}</style>"
            f"<h1>Sites</h1><pre>{html.escape(self.summary().splitlines()[0])}</pre>"
            f"<table><tr>{head}</tr>\n{body}</table>\n"
        )

    def __str__(self) -> str:
        return self.summary()


def _folded(sites: Sequence[SiteReport]) -> list[tuple[SiteReport, int, str]]:
    groups: dict[SiteReport, list[SiteReport]] = {}
    for site in sites:
        groups.setdefault(dataclasses.replace(site, path=""), []).append(site)
    return [
        (row, len(same), same[0].path + (f" .. {same[-1].path}" if len(same) > 1 else ""))
        for row, same in groups.items()
    ]


def explain(model: Callable, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Runs one forward and reports every candidate site: replaced or skipped, and why.

    The forward runs dense, in the caller's train and grad mode. Random state and buffers are restored; no learned state is
    created and nothing stays compiled. Works on models that are compiled already.

    Args:
        model: a module or a function. *args, **kwargs: what it is called with.
        options: as for `torch.compile`. None: those that the model, or else the first of its modules that is, was compiled with
            by this backend; without any, the defaults.
    Returns: an `Explanation`.
    Raises: OptionError for bad options; whatever the model itself raises.
    """
    from .backend import prepare_graph
    from .config import SPTConfig

    options = _compiled_with(model) if options is None else options
    config = dataclasses.replace(SPTConfig.from_options(options), dump=None, require_matches=None)
    rows: list[SiteReport] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        found = prepare_graph(gm, example_inputs, config).reports

        def run(*values: Any) -> Any:
            rows.extend(found)
            return gm.forward(*values)

        return run

    with _undisturbed(model) as plain:
        _compiled_once(plain, look)(*args, **kwargs)
    return Explanation(tuple(rows))


def _compiled_with(model: Any) -> Mapping[str, Any] | None:
    """The options of `torch.compile(model, backend="spt")`, of `model.compile`, or of the first compiled module inside; or None."""
    plain = getattr(model, "_orig_mod", model)
    modules = plain.modules() if isinstance(plain, torch.nn.Module) else ()
    calls = [getattr(model, "dynamo_ctx", model), *(getattr(m, "_compiled_call_impl", None) for m in modules)]
    for call in calls:
        # Dynamo's layers around a backend: no public call leads through them.
        found = getattr(call, "callback", None)
        if found is None and getattr(call, "__closure__", None):
            cells = dict(zip(call.__code__.co_freevars, call.__closure__, strict=True))
            found = cells["callback"].cell_contents if "callback" in cells else None
        while found is not None and not hasattr(found, "compiler_name"):
            inside = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")
            found = next((getattr(found, name) for name in inside if hasattr(found, name)), None)
        if found is not None and found.compiler_name == "spt":
            return (getattr(found, "kwargs", None) or {}).get("options")
    return None


@contextmanager
def _undisturbed(model: Callable) -> Iterator[Callable]:
    """The uncompiled model, with random state and buffers put back afterwards."""
    plain = getattr(model, "_orig_mod", model)
    modules = list(plain.modules()) if isinstance(plain, torch.nn.Module) else []
    compiled = [(m, m._compiled_call_impl) for m in modules if getattr(m, "_compiled_call_impl", None) is not None]
    buffers = [(b, b.clone()) for m in modules for b in m.buffers(recurse=False)]
    devices = sorted({b.device.index for m in modules for b in m.parameters(recurse=False) if b.device.type == "cuda"})
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        with torch.random.fork_rng(devices=devices):
            yield plain
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _compiled_once(function: Callable, backend: Callable) -> Callable:
    """`function` under Dynamo with a backend of its own; nothing that it compiles outlives the call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with apart(backend):
            return torch.compile(function, backend=backend)(*args, **kwargs)

    return run


@contextmanager
def apart(backend: Callable) -> Iterator[None]:
    """Inside, `backend` compiles beside the user's backends: held back by none of their limits, and gone afterwards."""
    # The user's own compilations may have used up the limits; automatic dynamic shapes would remember our calls.
    with torch._dynamo.config.patch(
        recompile_limit=1 << 10, accumulated_recompile_limit=1 << 12, automatic_dynamic_shapes=False
    ):
        try:
            yield
        finally:
            _drop_entries(backend)


def _drop_entries(backend: Callable) -> None:
    """Invalidates Dynamo's cache entries that belong to `backend`; those of other backends stay.

    Dynamo offers no public call for one backend: `torch._dynamo.reset()` would drop the user's compilations as well.
    """
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    def ours(entry: Any) -> bool:
        return entry.backend is backend or getattr(entry.backend, "compiler_fn", None) is backend

    for reference in list(input_codes.seen):
        code = reference()
        entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code) if code is not None else []
        if entries and all(map(ours, entries)):
            torch._C._dynamo.eval_frame.reset_code(code)
            continue
        for entry in filter(ours, entries):  # stays in the list, behind the valid ones, and never matches again
            extra = entry.guard_manager.extra_state
            if extra is not None:
                extra.invalidate(entry, DeletedGuardManagerWrapper("spt_compiler.explain has ended"))
