"""Learned state of the sites: who owns it, how it is found, saved, loaded and freed.

One compiled graph serves many layers and even several models, so state is never kept on a graph. It hangs, weakly, on the
site's *anchor*: a parameter of the user's model (CONTRACTS.md, "Identity"). `StateStore` is the only owner; a `SiteState`
is a fixed set of tensors that graphs receive as extra inputs, changed in place and only between steps.

State files hold statistics of the training data (sampled activations among them): treat them like the data.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import StateError
from .ops import observe

log = logging.getLogger(__name__)

FORMAT = "spt_state_v1"
# Prefixes that wrappers put in front of a parameter's name; a name must survive wrapping and unwrapping.
_WRAPPERS = re.compile(
    r"^(?:(?:_orig_mod|module)\.)+|(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PEFT = re.compile(r"^base_model\.model\.|(?:(?<=\.)|^)base_layer\.")


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and first value of one state tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    fill: float | str = 0.0  # "arange": 0, 1, 2, ...
    requires_grad: bool = False
    graph_input: bool = True  # False: read by the host only

    def create(self, device: torch.device | str) -> Tensor:
        """A new tensor (a `Parameter` if it may be trained) with the first value."""
        if self.fill == "arange":
            value = torch.arange(self.shape[0], device=device).to(self.dtype)
        else:
            value = torch.full(self.shape, self.fill, dtype=self.dtype, device=device)
        return nn.Parameter(value) if self.requires_grad else value


@dataclass(frozen=True)
class StateSpec:
    """What a site needs: its kind, its shape key and its tensors.

    Two executions with equal (anchor, kind, key) share one state.
    """

    kind: str  # "attention" | "ffn"
    key: tuple
    tensors: tuple[tuple[str, TensorSpec], ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that enter graphs, in order."""
        return tuple(name for name, spec in self.tensors if spec.graph_input)


# The guard looks at attention in the last so many steps of an interval: between two batches its error varies by a factor of two,
# and what the guard does is for good. FFNs are measured on a thousand tokens at once; those are cut into as many parts.
LOOKS = 8

# probe: what the graph is to observe in this step. [collect samples?, measure quality?] for graphs that train,
# followed by the same pair for graphs that do not (they only ever collect for the first initialisation).
PROBE = {"collect": 0, "measure": 1, "collect_no_grad": 2, "measure_no_grad": 3}
COUNTERS = {
    "steps": 0,
    "initialised": 1,
    "updates": 2,
    "skipped_rows": 3,
    "densified": 4,
    "measured_at": 5,
    "pending": 6,
    "rows_read": 7,
    "fitted_keep": 8,
    "corrects": 9,
    "clustered_rows": 10,
    "misses": 11,
}


@dataclass
class SiteState:
    """The tensors of one site, and its place in time.

    Attributes:
        spec: what the tensors are. tensors: name -> Tensor, fixed storage.
        path: module path as the graph that created it saw it (for reports; the saved name is made from the model).
        settings: the per-site configuration that maintenance obeys (an `SPTConfig`; None until a graph that learns binds it).
    """

    spec: StateSpec
    tensors: dict[str, Tensor]
    path: str = ""
    settings: Any = None
    order: int = 0
    parameters_taken: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    auxiliary_loss: Tensor | None = None
    ledger: Any = None  # the run-time wrapper's account of open forwards
    fault: str = ""
    settled: bool = False  # it learns and is measured at the regular steps alone
    idle: int = 0  # turns of upkeep from the next one on that only count, until learning or measuring is due again

    @property
    def kind(self) -> str:
        return self.spec.kind

    def graph_inputs(self) -> list[Tensor]:
        """The tensors in the order in which the rewritten graph takes them."""
        return [self.tensors[name] for name in self.spec.inputs]

    def counter(self, name: str) -> int:
        """A host-side counter: steps (backwards seen), initialised, updates (times it learned), skipped_rows (not finite, left
        out), densified (level of the guard), measured_at (step), pending, rows_read (of the ring, by the last turn of upkeep),
        fitted_keep (blocks a token kept when the compensation was fitted), misses (judgements above the limit in a row)."""
        return int(self.tensors["counters"][COUNTERS[name]])

    def set_counter(self, name: str, value: int) -> None:
        self.idle = 0  # what is due when may have changed
        self.tensors["counters"][COUNTERS[name]] = int(value)

    def count_step(self) -> None:
        """A turn of upkeep in which nothing else is due: one of `idle`."""
        self.idle -= 1
        self.tensors["counters"].select(0, COUNTERS["steps"]).add_(1)

    @property
    def initialised(self) -> bool:
        return bool(self.counter("initialised"))

    def set_probe(self, **flags: bool) -> None:
        """Says what the next forward is to observe; writes only what changes (a write may be a copy to a device)."""
        probe, host = self.tensors["probe"], self.tensors["probe_host"]
        observe.mirror(probe, host)
        for name, value in flags.items():
            place = PROBE[name]
            if int(host[place]) != int(value):
                host[place] = int(value)
                probe[place].fill_(int(value))  # a kernel: a copy from the host would wait for the device

    def asked(self, *flags: str) -> bool:
        """Whether any of these observations was asked of the last forward; known on the host, without a look at the device."""
        return any(bool(self.tensors["probe_host"][PROBE[flag]]) for flag in flags)

    def set_budget(self, density: float) -> None:
        """Sets the factor on the configured density that graphs read as data; negative: everything is selected."""
        if float(self.tensors["budget_host"]) != density:
            self.tensors["budget_host"].fill_(density)
            self.tensors["budget"].fill_(density)

    def set_correction(self, on: bool) -> None:
        """Whether an FFN adds its correction, which holds for the number of blocks that it was fitted for."""
        gate = self.tensors["correction_gate"]
        if self.counter("corrects") != int(on):
            self.set_counter("corrects", int(on))
            gate.fill_(float(on))

    @property
    def budget(self) -> float:
        return float(self.tensors["budget_host"])

    @torch.no_grad()
    def assign(self, **values: Tensor) -> None:
        """Overwrites tensors in place: graphs and CUDA graphs keep their addresses."""
        for name, value in values.items():
            self.tensors[name].copy_(value)

    def to(self, device: torch.device) -> None:
        """Follows the anchor to another device; host-side tensors stay."""
        with torch.inference_mode(False):
            for name, spec in self.spec.tensors:
                if spec.requires_grad:  # an optimizer may hold it: the object has to stay
                    self.tensors[name].data = self.tensors[name].data.to(device)
                elif spec.graph_input:
                    self.tensors[name] = self.tensors[name].to(device)


def common_tensors(budget: float, quality: int = 4) -> dict[str, TensorSpec]:
    """Tensors that every site has: budget and probe (with host mirrors), quality sums, the guard's looks, counters, cursor."""
    return {
        "budget": TensorSpec((1,), fill=budget),
        "probe": TensorSpec((4,), torch.int32),
        "quality": TensorSpec((quality,)),
        "looks": TensorSpec((LOOKS, 2), graph_input=False),
        "cursor": TensorSpec((1,), torch.int32),
        "budget_host": TensorSpec((1,), fill=budget, graph_input=False),
        "probe_host": TensorSpec((4,), torch.int32, graph_input=False),
        "counters": TensorSpec((len(COUNTERS),), torch.int64, graph_input=False),
    }


class StateStore:
    """Anchor parameter -> its site states. Weak in the anchors: state dies with the model that it belongs to."""

    def __init__(self) -> None:
        self._sites: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._pending: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # What waits for parameters that FSDP has not gathered yet: their full form, which graphs see, does not exist.
        self._ungathered: list[tuple[weakref.ref, dict]] = []
        self._lock = threading.RLock()
        self._created = 0
        self.version = 0  # moves whenever a state appears or is replaced: cached look-ups compare it

    def find(self, anchor: Tensor, spec: StateSpec) -> SiteState | None:
        """The state of (anchor, kind, key), or None."""
        sites = self._sites.get(anchor)
        return None if sites is None else sites.get((spec.kind, spec.key))

    def get(self, anchor: Tensor, spec: StateSpec, *, path: str = "") -> SiteState:
        """The state of (anchor, kind, key), created on first use and filled from `load_state_dict` if that came before."""
        state = self.find(anchor, spec)
        if state is not None:
            return state
        with self._lock:
            sites = self._sites.setdefault(anchor, {})
            state = sites.get((spec.kind, spec.key))
            if state is None:
                state = self._create(anchor, spec, path)
                sites[(spec.kind, spec.key)] = state
                self.version += 1
            return state

    def _create(self, anchor: Tensor, spec: StateSpec, path: str) -> SiteState:
        # A tensor made under inference_mode could never be changed in place outside of it.
        with torch.inference_mode(False), torch.no_grad():
            tensors = {n: s.create(anchor.device if s.graph_input else "cpu") for n, s in spec.tensors}
        self._created += 1
        state = SiteState(spec, tensors, path=path, order=self._created)
        state.set_probe(collect=True, collect_no_grad=True)
        waiting = self._pending.get(anchor) or self._of_shard(anchor)
        if waiting:
            ordinal = sum(kind == spec.kind for kind, _ in self._sites.get(anchor, {}))
            saved = waiting.get((spec.kind, ordinal))
            if saved is not None:
                _fill(state, saved, path or spec.kind)
                del waiting[spec.kind, ordinal]  # what does not fit goes on waiting: for the options that it was learned with
        return state

    def _of_shard(self, anchor: Tensor) -> dict | None:
        """What was loaded for the shard of this parameter before FSDP first gathered it."""
        self._ungathered = [(shard, waiting) for shard, waiting in self._ungathered if shard() is not None and waiting]
        for shard, waiting in self._ungathered:
            if getattr(shard(), "_unsharded_param", None) is anchor:
                return waiting
        return None

    def named_states(self, model: nn.Module) -> Iterator[tuple[str, SiteState]]:
        """(name, state) of every site of `model`, in the order of its parameters; a shared anchor is listed once."""
        seen: set[int] = set()
        for name, parameter in _anchors(model):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            sites = self._sites.get(parameter)
            if not sites:
                continue
            ordinals: dict[str, int] = {}
            for (kind, _), state in sites.items():
                ordinal = ordinals.get(kind, 0)
                ordinals[kind] = ordinal + 1
                yield f"{_owner(name)}/{kind}/{ordinal}", state

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Flat `{<site>.<tensor>: Tensor}`; tensors are copies. Loads that still wait for their site are kept."""
        for _, site_state in self.named_states(model):
            # Upkeep that the last backward has made due happens at the next call: after a resume as well.
            if site_state.ledger is not None:
                site_state.set_counter("pending", site_state.ledger.backward_ran)
        result = {
            f"{site}.{name}": tensor.detach().clone()
            for site, state in self.named_states(model)
            for name, tensor in state.tensors.items()
        }
        for name, parameter in _anchors(model):
            for (kind, ordinal), tensors in (self._pending.get(parameter) or {}).items():
                for tensor_name, value in tensors.items():
                    result.setdefault(f"{_owner(name)}/{kind}/{ordinal}.{tensor_name}", value.clone())
        return result

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
        """Fills the sites of `model`; what has no site yet waits for it.

        Returns: names of sites in `state` that belong to no parameter of `model` (a warning names them).
        Raises: StateError if a key is malformed or a tensor has another shape than the site's; nothing is changed then.
        """
        grouped: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            site, dot, tensor = key.rpartition(".")
            _, kind, ordinal = ["", "", *site.split("/")][-3:]
            if not dot or kind not in ("attention", "ffn") or not ordinal.isdecimal() or not isinstance(value, Tensor):
                raise StateError(
                    f"key {key!r} is not '<module>/<kind>/<ordinal>.<tensor>'; is this an spt_compiler state?"
                )
            grouped.setdefault(site, {})[tensor] = value
        existing = dict(self.named_states(model))
        for site in grouped.keys() & existing.keys():
            _check(existing[site], grouped[site], site)
        anchors: dict[str, list[Tensor]] = {}
        for name, parameter in _anchors(model):
            anchors.setdefault(_owner(name), []).append(parameter)
        shards = {id(p.sharded_param): p for p in _fsdp_parameters(model) if not hasattr(p, "_unsharded_param")}
        left_over = []
        for site, tensors in grouped.items():
            if site in existing:
                _fill(existing[site], tensors, site)
                continue
            owner, kind, ordinal = site.rsplit("/", 2)
            if owner not in anchors:
                left_over.append(site)
                continue
            # Which parameter of the module is the anchor is known only when the graph is: every one may claim it.
            for parameter in anchors[owner]:
                waiting = self._pending.setdefault(parameter, {})
                waiting[(kind, int(ordinal))] = {n: t.clone() for n, t in tensors.items()}
                shard = shards.pop(id(parameter), None)
                if shard is not None:
                    self._ungathered.append((weakref.ref(shard), waiting))
        if left_over:
            warnings.warn(
                f"spt_compiler: state of {len(left_over)} site(s) fits no module of this model and was ignored: "
                f"{', '.join(sorted(left_over)[:5])}",
                stacklevel=3,
            )
        return left_over

    def forget(self, model: nn.Module) -> None:
        """Drops all learned state of `model`; the next call starts anew."""
        with self._lock:
            for _, parameter in _anchors(model):
                self._sites.pop(parameter, None)
                self._pending.pop(parameter, None)
            self.version += 1


def _anchors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter as graphs see it), shared ones under every name.

    A model under FSDP (`fully_shard`) shows its shards; what its graphs compute with, and what state hangs on, is the full
    parameter behind each, which exists from the first forward on.
    """
    full = {id(p.sharded_param): p._unsharded_param for p in _fsdp_parameters(model) if hasattr(p, "_unsharded_param")}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, full.get(id(parameter), parameter)


def _fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    """FSDP's own account (`FSDPParam`) of every parameter that `fully_shard` has sharded."""
    for module in model.modules():
        get_state = getattr(module, "_get_fsdp_state", None)
        if get_state is None:
            continue
        state = get_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from getattr(group, "fsdp_params", ())


def _owner(parameter_name: str) -> str:
    """FQN of the module that owns a parameter, without the prefixes of wrappers."""
    name = _PEFT.sub("", _WRAPPERS.sub("", parameter_name))
    return name.rpartition(".")[0]


def _check(state: SiteState, saved: Mapping[str, Tensor], site: str) -> None:
    for name, value in saved.items():
        own = state.tensors.get(name)
        if own is None:
            raise StateError(
                f"state holds an unknown tensor {name!r}; expected one of {sorted(state.tensors)}", site=site
            )
        if own.shape != value.shape:
            raise StateError(
                f"tensor {name!r} has shape {tuple(value.shape)}, expected {tuple(own.shape)}: the state was learned with "
                f"other options (blocks, codewords, subspaces) or for another model",
                site=site,
            )
    missing = state.tensors.keys() - saved.keys()
    if missing:
        raise StateError(f"state lacks the tensor(s) {sorted(missing)}", site=site)


def _fill(state: SiteState, saved: Mapping[str, Tensor], site: str) -> None:
    _check(state, saved, site)
    state.assign(**saved)
    state.settled, state.idle = False, 0
    if state.ledger is not None:
        state.ledger.backward_ran = bool(state.counter("pending"))


def save(state: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Writes a state dict to `path` as safetensors, atomically: an interrupted save leaves the old file.

    Raises: StateError if the folder cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.is_dir():
        raise StateError(f"cannot write {path}: it is a folder; name a file in it, such as {path / 'spt_state.safetensors'}")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise StateError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and can be written"
        ) from error
    try:
        save_file({k: v.contiguous().cpu() for k, v in state.items()}, temporary, metadata={"format": FORMAT})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads a state dict written by `save`. Never unpickles.

    Raises: StateError if the file is missing, corrupt, or not an spt_compiler state.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise StateError(f"{path} is a safetensors file but not an spt_compiler state (format {FORMAT})")
            return {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError as error:
        raise StateError(f"no state file at {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} is not a readable safetensors file ({error}); was the save interrupted?") from error


STORE = StateStore()
