"""The backend: `torch.compile(model, backend="spt")`. Reads as the pipeline it is.

Dynamo graph -> copy -> canonicalise -> match -> plan -> rewrite -> inner compiler -> run-time wrapper
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame

from . import debug
from .config import SPTConfig, is_disabled
from .errors import SPTError
from .lowering import registry
from .ops import attention, commitment, ffn, observe, tracing  # noqa: F401  (importing them registers the operators)
from .patterns.ffn import SPLIT_BY_DDP
from .plan import Plan, SiteReport, resolve
from .rewrite import Binding, Rewriter, body_calls, copy_graph, open_body
from .runtime import CompiledGraph
from .scope import Scope

log = logging.getLogger(__name__)

registry.install()


def spt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable:
    """Compiles one Dynamo graph with its attention and FFN sites replaced by sparse operators.

    Registered as "spt" in the entry-point group `torch_dynamo_backends`; users reach it through `torch.compile`.

    Args:
        gm: Dynamo's graph; it is not changed. example_inputs: real inputs; neither kept nor changed.
        options: see `spt_compiler.list_options()`. mode: a mode of the inner compiler (torch refuses mode and options together).
    Raises: OptionError for bad options; SPTError under `strict` when a stage fails.
    """
    config = SPTConfig.from_options(options)
    inner = inner_compiler(config, mode)
    if is_disabled() or _in_compiled_autograd():
        return inner(gm, example_inputs)
    prepared = prepare_graph(gm, example_inputs, config)
    module, inputs = prepared.module, [*example_inputs, *_example_states(prepared)]
    if not prepared.plans:  # nothing became sparse: Dynamo's own graph is what runs, so that it costs what it costs without us
        module, inputs, prepared.bindings, prepared.extra_outputs = gm, list(example_inputs), [], 0
    try:
        with debug.stage("inner"), _foreseeing(prepared):
            compiled = inner(module, inputs)
    except (RestartAnalysis, SkipFrame):
        raise  # Dynamo's own control flow: it comes again with another graph
    except Exception as error:
        if config.strict or not prepared.plans:
            raise
        _warn("inner compiler", "the whole graph", error)
        prepared = prepared.as_dense(error)
        compiled = inner(gm, example_inputs)
    debug.publish(prepared, gm, config)
    for reason in (SPLIT_BY_DDP, LEFT_TO_PYTHON):  # all may be dense then, and no later graph ends the call and says so
        split = [r.name for r in prepared.reports if r.reason == reason]
        if split:
            warnings.warn(f"spt_compiler: {', '.join(split)} stays dense: {reason}", stacklevel=2)
    return CompiledGraph(
        compiled,
        _original(gm),
        prepared.bindings,
        prepared.reports,
        extra_outputs=prepared.extra_outputs,
        training=torch.is_grad_enabled(),
        ends_call=not getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", True),
        config=config,
    )


def _foreseeing(prepared: Prepared) -> AbstractContextManager:
    """While the inner compiler works, what its graph will call is compiled beside it; exact sites call no kernel that selects."""
    if all(plan.config.exact for plan in prepared.plans):
        return nullcontext()
    return tracing.listening(registry.foresee)


def reset() -> None:
    """Called by `torch._dynamo.reset()`. Compiled callables go with Dynamo's caches; learned state stays."""
    debug.clear()


spt.reset = reset  # type: ignore[attr-defined]  # torch looks for the attribute


@dataclass
class Prepared:
    """A graph behind our stages.

    Attributes:
        module: the rewritten copy (or a plain copy if nothing was replaced). plans, reports: what was decided.
        bindings: which states it takes. snapshots: name -> readable text of each stage, for dumps.
    """

    module: fx.GraphModule
    plans: list[Plan] = field(default_factory=list)
    reports: list[SiteReport] = field(default_factory=list)
    bindings: list[Binding] = field(default_factory=list)
    extra_outputs: int = 0
    snapshots: dict[str, str] = field(default_factory=dict)

    def as_dense(self, error: Exception) -> Prepared:
        """The same report with every site skipped because a later stage failed."""
        reason = f"the inner compiler refused the rewritten graph ({type(error).__name__}: {error})"
        return Prepared(self.module, reports=[debug.failed(r, reason) for r in self.reports], snapshots=self.snapshots)


LEFT_TO_PYTHON = (
    "a graph break inside of torch's own transformer modules leaves all of them to Python, for Dynamo compiles no call that begins "
    "in torch's files; spt_compiler.compile(model) compiles their layers one by one (TORCH_LOGS=graph_breaks)"
)


def _left_to_python(gm: fx.GraphModule) -> list[SiteReport]:
    """One row for a graph that breaks inside of nn.Transformer, or of its encoder or decoder: nobody sees their sites."""
    cause = getattr(gm, "compile_subgraph_reason", None)
    frames = list(getattr(cause, "user_stack", ())) if getattr(cause, "graph_break", False) else []
    if not any(f.filename == torch.nn.modules.transformer.__file__ for f in frames):
        return []
    callers = [f for f in frames if f.filename != torch.nn.modules.transformer.__file__]
    where = f"{callers[0].filename}:{callers[0].lineno}" if callers else ""
    return [SiteReport("attention", "", where, "transformer", "skipped", LEFT_TO_PYTHON)]


def prepare_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], config: SPTConfig) -> Prepared:
    """Runs our stages on a copy of `gm`. A failure leaves the site, or the graph, dense with a warning (raises under `strict`)."""
    training = torch.is_grad_enabled()
    with debug.stage("copy"):
        copied = copy_graph(gm)
    prepared = Prepared(copied)
    wants_text = debug.wants_snapshots(config)
    if wants_text:
        prepared.snapshots["00_dynamo.py"] = debug.readable(copied)
    try:
        rewriter = Rewriter(copied, training=training)
        _rewrite(
            rewriter,
            Scope(copied, list(example_inputs)),
            config,
            prepared,
            fuel=_Fuel(config.fuel),
            snapshots=wants_text,
        )
        with debug.stage("rewrite"):
            rewriter.finish()
        prepared.reports.extend(_left_to_python(gm))
    except _StageFailed as failed:
        return _dense_after(failed, gm, prepared, config)
    except Exception as error:
        return _dense_after(_StageFailed("rewrite", error), gm, prepared, config)
    prepared.bindings, prepared.extra_outputs = rewriter.bindings, rewriter.extra_outputs
    if wants_text:
        prepared.snapshots["40_rewritten.py"] = debug.readable(copied)
    return prepared


def _rewrite(
    rewriter: Rewriter, scope: Scope, config: SPTConfig, prepared: Prepared, *, fuel: _Fuel, snapshots: bool
) -> None:
    """Canonicalise, match, plan and rewrite one graph, then the bodies that it calls."""
    from . import canonicalize, patterns

    module = rewriter.module
    with _stage("canonicalize"):
        canonicalize.canonicalize(module)
    if snapshots and rewriter.parent is None:
        prepared.snapshots["10_canonical.py"] = debug.readable(module)
    for call, name in list(body_calls(module)):
        body, inner_scope = open_body(module, call, name, scope)
        inner = rewriter.inside(body, call)
        _rewrite(inner, inner_scope, config, prepared, fuel=fuel, snapshots=snapshots)
        inner.finish()
    with _stage("match"):
        matches, skipped = patterns.find(module)
    with _stage("plan"):
        plans, reports = resolve(matches, skipped, scope, config, training=rewriter.training)
    prepared.reports.extend(reports)
    for plan in plans:
        if not fuel.burn():
            prepared.reports.append(debug.failed(plan.report, f"fuel = {config.fuel} is spent"))
            continue
        try:
            with debug.stage("rewrite"):
                rewriter.apply(plan)
        except Exception as error:
            if config.strict:
                raise SPTError(f"{type(error).__name__}: {error}", site=plan.report.name, stage="rewrite") from error
            _warn("rewrite", plan.report.name, error)
            prepared.reports.append(debug.failed(plan.report, f"rewrite failed: {type(error).__name__}: {error}"))
            continue
        prepared.plans.append(plan)
        prepared.reports.append(plan.report)


class _Fuel:
    """How many sites may still be rewritten (option `fuel`: bisects a miscompile)."""

    def __init__(self, amount: int | None):
        self.left = amount

    def burn(self) -> bool:
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


class _StageFailed(Exception):
    def __init__(self, stage: str, cause: Exception):
        super().__init__(stage)
        self.stage, self.cause = stage, cause


class _stage:
    """Times a stage and labels whatever it raises."""

    def __init__(self, name: str):
        self.name, self.timer = name, debug.stage(name)

    def __enter__(self) -> None:
        self.timer.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.timer.__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, _StageFailed):
            raise _StageFailed(self.name, error) from error


def _dense_after(failed: _StageFailed, gm: fx.GraphModule, prepared: Prepared, config: SPTConfig) -> Prepared:
    error = failed.cause
    if config.strict:
        raise SPTError(f"{type(error).__name__}: {error}", stage=failed.stage) from error
    _warn(failed.stage, "the whole graph", error)
    reason = f"stage {failed.stage} failed ({type(error).__name__}: {error})"
    return Prepared(
        copy_graph(gm), reports=[debug.failed(r, reason) for r in prepared.reports], snapshots=prepared.snapshots
    )


def _warn(stage: str, site: str, error: Exception) -> None:
    log.debug("stage %s failed at %s", stage, site, exc_info=error)
    warnings.warn(
        f"spt_compiler: stage {stage} failed at {site} ({type(error).__name__}: {error}); it stays dense. "
        f'strict=True raises, TORCH_LOGS="+spt_compiler" shows the trace',
        stacklevel=3,
    )


def _example_states(prepared: Prepared) -> list[torch.Tensor]:
    """Stand-ins for the state inputs at compile time: shapes alone matter, the states themselves come with the calls."""
    from torch._guards import detect_fake_mode

    inputs = [
        n.meta["example_value"]
        for n in prepared.module.graph.nodes
        if n.op == "placeholder" and "example_value" in n.meta
    ]
    fake_mode = detect_fake_mode([t for t in inputs if isinstance(t, torch.Tensor)])
    placeholders = [n for n in prepared.module.graph.nodes if n.op == "placeholder" and "example_value" not in n.meta]
    examples, index = [], 0
    for binding in prepared.bindings:
        for _, spec in binding.spec.tensors:
            if not spec.graph_input:
                continue
            value = spec.create(inputs[binding.anchor].device)  # the state will lie where its anchor does
            if fake_mode is not None:
                value = fake_mode.from_tensor(value, static_shapes=True)
            placeholders[index].meta["example_value"] = value
            index += 1
            examples.append(value)
    return examples


def _original(gm: fx.GraphModule) -> Callable:
    """Dynamo's graph as an eager callable."""
    return gm.forward


def _in_compiled_autograd() -> bool:
    module = importlib.import_module("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "in_compiled_autograd_region", False))


def inner_compiler(config: SPTConfig, mode: str | None = None) -> Callable[[fx.GraphModule, Sequence[Any]], Callable]:
    """The compiler that receives the rewritten graph: options `inner` and `inner_options`, or torch's `mode`."""
    patches = config.inner_options.thaw()
    if mode is not None and mode != "default":
        patches = {**torch._inductor.list_mode_options(mode), **patches}
    if config.inner == "eager":
        return lambda gm, inputs: gm.forward
    if config.inner == "aot_eager":
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend("aot_eager")
    from torch._inductor.compile_fx import compile_fx

    return functools.partial(compile_fx, config_patches=patches or None)
