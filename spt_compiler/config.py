"""`SPTConfig`: every option of the backend, parsed and checked once, early, from `torch.compile(options=...)`.

Options are plain JSON values under dotted keys (`{"attention.density": 0.25}`), flat except `sites`, which maps a glob
over site names to overrides. Precedence: options > `SPT_*` environment > preset > default. A config is frozen and
hashable: two equal sets of options are equal configs.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import math
import numbers
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from spt_compiler.errors import OptionError

ENV_PREFIX = "SPT_"
# Variables with our prefix that are switches of other pieces, not options.
ENV_SWITCHES = ("SPT_DISABLE", "SPT_CACHE_DIR")


class FrozenOptions(Mapping[str, Any]):
    """A hashable, read-only JSON object; objects inside are frozen too, lists are tuples. `thaw()`: a plain dict."""

    __slots__ = ("_entries",)

    def __init__(self, values: Mapping[str, Any] | None = None):
        self._entries: dict[str, Any] = {key: _freeze(value) for key, value in (values or {}).items()}

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return f"FrozenOptions({self.thaw()!r})"

    def thaw(self) -> dict[str, Any]:
        """Returns: a new plain dict with plain lists and dicts inside."""
        return {key: _thaw(value) for key, value in self._entries.items()}


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenOptions(value)
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, FrozenOptions):
        return value.thaw()
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    return value


@dataclass(frozen=True)
class AttentionConfig:
    """Options `attention.*`; `list_options()` describes each."""

    density: float = 0.25
    granularity: str = "tile"
    select: str = "pq"
    compensation: bool = False
    min_keys: int | None = None
    subspaces: int | None = None
    codewords: int = 16
    tile: tuple[int, int] = (64, 16)
    max_rel_error: float | None = None
    schedule: tuple[float, int] | None = None


@dataclass(frozen=True)
class FFNConfig:
    """Options `ffn.*`; `list_options()` describes each."""

    density: float = 0.5
    blocks: int = 8
    router: str = "learned"
    gate: str = "hard"
    compensation: bool = True
    min_width: int | None = None
    max_rel_error: float | None = None
    schedule: tuple[float, int] | None = None


@dataclass(frozen=True)
class GuardConfig:
    """Options `guard.*`; `list_options()` describes each."""

    interval: int = 64


@dataclass(frozen=True)
class SPTConfig:
    """All options of one compilation. `from_options` builds and checks it; the defaults here are the preset `balanced`.

    Raises (from_options): OptionError naming the option, what was expected, what came, and the remedy.
    """

    preset: str = "balanced"
    exact: bool = False
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FFNConfig = field(default_factory=FFNConfig)
    dense_layers: tuple[int, int] = (0, 0)
    dense_steps: int = 0
    guard: GuardConfig = field(default_factory=GuardConfig)
    inference: str = "sparse"
    require_matches: int | None = None
    strict: bool = False
    inner: str = "inductor"
    inner_options: FrozenOptions = field(default_factory=FrozenOptions)
    dump: str | None = None
    fuel: int | None = None
    seed: int = 0
    sites: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any] | None = None, *, env: Mapping[str, str] | None = None
    ) -> SPTConfig:
        """Builds and checks a config.

        Args:
            options: what `torch.compile(options=...)` got: dotted keys, JSON values; None for none.
            env: environment to read `SPT_*` variables from; None means `os.environ`.
        Raises: OptionError.
        """
        given = _check_mapping(options)
        environment = _from_environment(os.environ if env is None else env)
        sites = _parse_sites(given.pop("sites", environment.pop("sites", None)))
        explicit = {**environment, **{key: _convert(key, value) for key, value in given.items()}}
        preset = explicit.get("preset", "balanced")
        return cls._build({**_DEFAULTS, **PRESETS[preset], **explicit}, sites)

    @classmethod
    def _build(cls, values: Mapping[str, Any], sites: tuple = ()) -> SPTConfig:
        """From a complete, converted, flat mapping: forces what `exact` forces, checks combinations."""
        values = {**values, **EXACT} if values["exact"] else dict(values)
        _check_combinations(values)
        groups: dict[str, dict[str, Any]] = {"attention": {}, "ffn": {}, "guard": {}}
        top: dict[str, Any] = {}
        for name, value in values.items():
            group, _, leaf = name.rpartition(".")
            (groups[group] if group else top)[leaf] = value
        config = cls(
            attention=AttentionConfig(**groups["attention"]),
            ffn=FFNConfig(**groups["ffn"]),
            guard=GuardConfig(**groups["guard"]),
            sites=sites,
            **top,
        )
        for glob, _ in sites:  # a bad combination inside an override is a mistake now, not at the first site it hits
            try:
                config._override((glob,))
            except OptionError as error:
                raise OptionError(f"sites[{glob!r}]: {error}") from None
        return config

    def for_site(self, name: str) -> SPTConfig:
        """The config of one site: every glob of `sites` that matches `name` applied in the order given (later win).

        A glob matches the site's whole name (`h.0.attn/attention/0`) or the module path in it (`h.0.attn`). The result
        has no `sites`, so sites with equal settings have equal configs.
        """
        if not self.sites:
            return self
        return self._override(tuple(glob for glob, _ in self.sites if glob_matches(glob, name)))

    def _override(self, globs: tuple[str, ...]) -> SPTConfig:
        overrides: dict[str, Any] = {}
        for glob, entries in self.sites:
            if glob in globs:
                overrides.update(entries)
        return SPTConfig._build({**self._flat(), **overrides})

    def unused_globs(self, names: Iterable[str]) -> list[str]:
        """The user's globs of `sites` that match none of the site names `names`."""
        names = list(names)
        users = [glob for glob, _ in self.sites if not isinstance(glob, DerivedGlob)]
        return [glob for glob in users if not any(glob_matches(glob, name) for name in names)]

    def to_options(self) -> dict[str, Any]:
        """Every option as plain JSON values; `SPTConfig.from_options(config.to_options(), env={}) == config`."""
        options = {name: _thaw(value) for name, value in self._flat().items()}
        options["sites"] = {glob: {key: _thaw(value) for key, value in entries} for glob, entries in self.sites}
        return options

    def fingerprint(self) -> str:
        """Canonical JSON text of the options: stable between processes, for cache keys and reports."""
        options = self.to_options()
        # The order of globs matters (later ones win), the order of keys elsewhere does not.
        options["sites"] = list(options["sites"].items())
        return json.dumps(options, sort_keys=True)

    def changed_options(self) -> dict[str, Any]:
        """The options that differ from the config's preset: short enough for a report."""
        base = {**_DEFAULTS, **PRESETS[self.preset]}
        changed = {name: _thaw(value) for name, value in self._flat().items() if value != base[name]}
        return {**changed, **({"sites": self.to_options()["sites"]} if self.sites else {})}

    def _flat(self) -> dict[str, Any]:
        return {name: operator.attrgetter(name)(self) for name in _SPECS}


@dataclass(frozen=True)
class OptionInfo:
    """Description of one option.

    Attributes:
        name: dotted key.  type: what it takes, in words.  default: plain JSON value under the preset `balanced`.
        choices: the allowed words, or None.  help: one line.
    """

    name: str
    type: str
    default: Any
    choices: tuple[str, ...] | None
    help: str

    @property
    def env(self) -> str:
        """Name of the environment variable that sets it (`attention.density` -> `SPT_ATTENTION_DENSITY`)."""
        return ENV_PREFIX + self.name.replace(".", "_").upper()


def list_options() -> list[OptionInfo]:
    """Every option of the backend, in the order of the documentation."""
    specs = _SPECS.values()
    infos = [OptionInfo(spec.name, spec.type, _thaw(_DEFAULTS[spec.name]), spec.choices, spec.help) for spec in specs]
    overrides = "{glob: {key: value}} over site names; keys attention.*, ffn.*, exact; later globs win"
    return [*infos, OptionInfo("sites", "object of objects", {}, None, overrides)]


def parse_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Options from the command line.

    Args:
        texts: "key=value" each; the value as in an environment variable ("attention.tile=64x16", "exact=yes").
    Returns: an `options` dict for `SPTConfig.from_options`, which does the checking of values.
    Raises: OptionError for a text without "=" or an unknown key.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals:
            raise OptionError(f"option {text!r}: expected key=value, e.g. attention.density=0.5")
        if name not in _SPECS and name != "sites":
            raise OptionError(_unknown(name, value))
        options[name] = _read_text(f"option {name}", name, value.strip())
    return options


def is_disabled(env: Mapping[str, str] | None = None) -> bool:
    """Whether `SPT_DISABLE` asks for dense runs. `env` None means `os.environ`.

    Raises: OptionError if the variable is neither a yes nor a no.
    """
    text = (os.environ if env is None else env).get("SPT_DISABLE", "")
    if not text.strip():
        return False
    try:
        return _read_bool(text)
    except ValueError as error:
        raise OptionError(f"environment variable SPT_DISABLE: {error}") from None


class DerivedGlob(str):
    """A path below one block that `spt_compiler.compile` made from a user's glob: whether that one hits is judged there."""


def glob_matches(glob: str, name: str) -> bool:
    """Whether `glob` matches a site's name or the module path in it (the part before the first `/`); case matters."""
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.split("/", 1)[0], glob)


# --- converters: any -> the value stored, or _Expected saying what would have been right -----------------------------


class _Expected(ValueError):
    """What an option takes; `remedy` says what to write instead where that is not obvious."""

    def __init__(self, expected: str, remedy: str = ""):
        super().__init__(expected)
        self.remedy = remedy


def _quoted_number(value: Any) -> str:
    """Remedy for a number or boolean that came as text."""
    if isinstance(value, str):
        try:
            return f"write {json.dumps(json.loads(value.strip().lower()))} without quotes"
        except ValueError:
            pass
    return ""


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool_", "bool"):  # numpy's
        return bool(value)
    raise _Expected("true or false", _quoted_number(value) or (f"write {bool(value)}" if value in (0, 1) else ""))


def _integer(low: int, high: int | None = None) -> Callable[[Any], int]:
    span = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"

    def convert(value: Any) -> int:
        if isinstance(value, bool):
            raise _Expected(span, f"write {int(value)} if you mean the number")
        if not isinstance(value, numbers.Integral):
            whole = isinstance(value, float) and value.is_integer()
            raise _Expected(span, f"write {int(value)}" if whole else _quoted_number(value))
        result = operator.index(value)
        if result < low or (high is not None and result > high):
            raise _Expected(span)
        return result

    convert.__doc__ = span
    return convert


def _number(
    accept: Callable[[float], bool], expected: str, hint: Callable[[float], str] | None = None
) -> Callable[[Any], float]:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _Expected(expected, _quoted_number(value))
        result = float(value)
        if not math.isfinite(result) or not accept(result):
            raise _Expected(expected, hint(result) if hint and math.isfinite(result) else "")
        return result

    convert.__doc__ = expected
    return convert


def _density_hint(value: float) -> str:
    if 1 < value <= 100:
        return f"density is a fraction: {value:g} percent is {value / 100:g}"
    if value == 0:
        return "something must be kept; to leave sites dense use 1, `exact`, or `dense_layers`"
    return ""


def _word(*choices: str) -> Callable[[Any], str]:
    expected = "one of " + ", ".join(repr(choice) for choice in choices)

    def convert(value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return value
        near = _nearest(value.lower(), choices) if isinstance(value, str) else None
        raise _Expected(expected, f"did you mean {near!r}?" if near else "")

    convert.__doc__ = expected
    return convert


def _pair(item: Callable[[Any], int], what: str) -> Callable[[Any], tuple[int, int]]:
    expected = f"{what}, each {item.__doc__}"

    def convert(value: Any) -> tuple[int, int]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise _Expected(expected, f"write [{value}, {value}]" if type(value) is int else "")
        try:
            return item(value[0]), item(value[1])
        except _Expected as error:
            raise _Expected(expected, error.remedy) from None

    convert.__doc__ = expected
    return convert


def _path(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and text.strip():
            return text
    raise _Expected("a folder name (text, not empty)", "write true paths, e.g. 'out/dump'" if value is True else "")


def _json_object(value: Any) -> FrozenOptions:
    expected = "an object of plain JSON values with text keys"
    if not isinstance(value, Mapping):
        raise _Expected(expected, "it reaches compile_fx as its config patches, e.g. {'max_autotune': True}")
    bad = _not_json(value, "inner_options")
    if bad:
        raise _Expected(expected, bad)
    return FrozenOptions(value)


def _not_json(value: Any, where: str) -> str:
    """Names the first part of `value` that JSON cannot hold; '' if all is well."""
    if value is None or isinstance(value, bool | str | int):
        return ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{where} is {value}, which JSON cannot hold"
    if isinstance(value, list | tuple):
        return next(filter(None, (_not_json(item, f"{where}[{i}]") for i, item in enumerate(value))), "")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{where} has the key {key!r} of type {type(key).__name__}"
            bad = _not_json(item, f"{where}[{key!r}]")
            if bad:
                return bad
        return ""
    return f"{where} is of type {type(value).__name__}"


# --- the table of options --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spec:
    name: str
    convert: Callable[[Any], Any]
    help: str
    optional: bool = False  # null allowed
    choices: tuple[str, ...] | None = None
    per_site: bool = False
    kind: str = "json"  # how an environment variable is read: json, text or bool

    @property
    def type(self) -> str:
        words: dict[Any, str] = {
            _boolean: "true or false",
            _path: "a folder name",
            _json_object: "an object of plain JSON values",
        }
        return (words.get(self.convert) or self.convert.__doc__ or "") + (", or null" if self.optional else "")


def _spec(name: str, convert: Callable[[Any], Any], help: str, *, optional: bool = False) -> _Spec:
    per_site = name == "exact" or name.startswith(("attention.", "ffn."))
    kind = "bool" if convert is _boolean else "text" if convert is _path else "json"
    return _Spec(name, convert, help, optional, None, per_site, kind)


def _choice(name: str, choices: tuple[str, ...], help: str) -> _Spec:
    return _Spec(name, _word(*choices), help, False, choices, name.startswith(("attention.", "ffn.")), "text")


_density = _number(lambda value: 0 < value <= 1, "a number above 0 and at most 1", _density_hint)
_positive = _number(lambda value: value > 0, "a number above 0")
_count = _integer(0)



def _ramp(value: Any) -> tuple[float, int]:
    """[density, steps]"""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _Expected("a pair [start density, steps], such as [1.0, 200]")
    return _density(value[0]), _count(value[1])


_SPECS: dict[str, _Spec] = {
    spec.name: spec
    for spec in (
        _choice("preset", ("balanced", "paper", "exact"), "values for the options not given explicitly"),
        _spec("exact", _boolean, "the same sparse ops with everything selected: equals the dense model to rounding"),
        _spec("attention.density", _density, "share of the keys (token) or key tiles (tile) that each query may read"),
        _choice("attention.granularity", ("tile", "token"), "select key tiles per query tile, or keys per query"),
        _choice(
            "attention.select",
            ("pq", "mean", "pq-match"),
            "score by decoded PQ keys, tile means (tile only) or equal codes (token only)",
        ),
        _spec("attention.compensation", _boolean, "add one pseudo-key per dropped past tile"),
        _spec(
            "attention.min_keys",
            _count,
            "fewer keys than this: dense. null: measured break-even; 0: none",
            optional=True,
        ),
        _spec(
            "attention.subspaces",
            _integer(1, 1024),
            "PQ subspaces per head. null: head width / 2 for tiles, / 4 for tokens, / 8 for 'pq-match'",
            optional=True,
        ),
        _spec("attention.codewords", _integer(2, 256), "codewords per subspace"),
        _spec("attention.tile", _pair(_integer(1, 1024), "[queries, keys]"), "tile sizes of granularity 'tile'"),
        _spec(
            "attention.max_rel_error", _positive, "the guard densifies above this. null: it only reports", optional=True
        ),
        _spec(
            "attention.schedule",
            _ramp,
            "[start density, steps]: from there to attention.density, linearly, once sparsity starts. null: at once",
            optional=True,
        ),
        _spec("ffn.density", _density, "share of the blocks computed per token (rounded, at least one block)"),
        _spec("ffn.blocks", _integer(1, 4096), "blocks the hidden units are divided into"),
        _choice("ffn.router", ("learned", "static", "random"), "who picks the blocks of a token"),
        _choice(
            "ffn.gate",
            ("hard", "straight-through", "spt"),
            "factor on a block: 1; 1 with the router's gradient; 2 * probability",
        ),
        _spec("ffn.compensation", _boolean, "add the mean output of each dropped block"),
        _spec("ffn.min_width", _count, "narrower ones stay dense. null: measured break-even; 0: none", optional=True),
        _spec("ffn.max_rel_error", _positive, "the guard densifies above this. null: it only reports", optional=True),
        _spec(
            "ffn.schedule",
            _ramp,
            "[start density, steps]: from there to ffn.density, linearly, once sparsity starts. null: at once",
            optional=True,
        ),
        _spec("dense_layers", _pair(_count, "[first, last]"), "how many layers at each end of the model stay dense"),
        _spec("dense_steps", _count, "training steps before sparsity starts"),
        _spec("guard.interval", _count, "backward passes between two measurements of quality; 0: never"),
        _choice("inference", ("sparse", "dense"), "what graphs without gradients do"),
        _spec("require_matches", _count, "error if fewer sites are replaced. null: warn at none", optional=True),
        _spec("strict", _boolean, "raise on any failure of the pass instead of leaving the site dense with a warning"),
        _choice("inner", ("inductor", "aot_eager", "eager"), "who compiles the rewritten graph"),
        _spec(
            "inner_options", _json_object, "config patches for Inductor's compile_fx; other inner compilers take none"
        ),
        _spec("dump", _path, "folder for the numbered files of every stage. null: none", optional=True),
        _spec("fuel", _count, "rewrite only the first n sites, to bisect a miscompile. null: all", optional=True),
        _spec("seed", _integer(0, 2**63 - 1), "seed of codebooks, routers and random choices of the backend"),
    )
}

_DEFAULTS: dict[str, Any] = SPTConfig()._flat()

# What `exact` forces, over anything given: every key and every block selected, gates at one, no threshold, no schedule.
EXACT: dict[str, Any] = {
    "exact": True,
    "attention.density": 1.0,
    "attention.compensation": False,
    "attention.min_keys": 0,
    "attention.schedule": None,
    "ffn.density": 1.0,
    "ffn.gate": "hard",
    "ffn.compensation": False,
    "ffn.min_width": 0,
    "ffn.schedule": None,
    "dense_layers": (0, 0),
    "dense_steps": 0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "balanced": {},
    # SPT, arXiv 2312.10365: no compensation there, and every site is sparse whatever its size.
    "paper": {
        "attention.granularity": "token",
        "attention.select": "pq-match",
        "attention.density": 0.125,
        "attention.min_keys": 0,
        "ffn.blocks": 4,
        "ffn.density": 0.5,
        "ffn.gate": "spt",
        "ffn.compensation": False,
        "ffn.min_width": 0,
    },
    "exact": {"exact": True},
}


# --- parsing ---------------------------------------------------------------------------------------------------------


def _check_mapping(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of `options` whose keys are all known."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise OptionError(
            f"options: expected a mapping of dotted keys to JSON values, got {_show(options)}; "
            "write options={'attention.density': 0.25}"
        )
    for key, value in options.items():
        if key not in _SPECS and key != "sites":
            raise OptionError(_unknown(key, value))
    return dict(options)


def _unknown(key: Any, value: Any, known: Iterable[str] | None = None) -> str:
    known = [*_SPECS, "sites"] if known is None else list(known)
    if not isinstance(key, str):
        return f"unknown option {key!r}: expected a text key such as 'attention.density', got a {type(key).__name__}"
    if key in ("attention", "ffn", "guard"):
        leaf = next(iter(value), None) if isinstance(value, Mapping) else None
        first = next(name for name in _SPECS if name.startswith(key + "."))
        example = f"{key}.{leaf}" if f"{key}.{leaf}" in known else first
        return f"unknown option {key!r}: options are flat; write the dotted key {example!r}"
    same_leaf = [name for name in known if name.rpartition(".")[2] == key]  # "density" belongs to two groups
    near = " or ".join(map(repr, same_leaf)) or repr(_nearest(key, known) or "")
    if near == repr(""):
        return f"unknown option {key!r}; spt_compiler.list_options() lists them: {', '.join(known)}"
    return f"unknown option {key!r}; did you mean {near}? (spt_compiler.list_options() lists all)"


def _nearest(text: str, known: Iterable[str]) -> str | None:
    """The known name closest to `text` by spelling; its last part alone counts too (`dense` -> `attention.density`)."""
    known = list(known)
    spelled = {re.sub(r"[-_ ./]+", ".", name.lower()): name for name in known}
    wanted = re.sub(r"[-_ ./]+", ".", text.lower())
    close = difflib.get_close_matches(wanted, spelled, n=1, cutoff=0.6)
    if close:
        return spelled[close[0]]
    leaves: dict[str, str] = {}
    for name in known:
        leaves.setdefault(name.rpartition(".")[2], name)
    close = difflib.get_close_matches(text.lower().rpartition(".")[2], leaves, n=1, cutoff=0.75)
    return leaves[close[0]] if close else None


def _convert(name: str, value: Any, where: str | None = None) -> Any:
    spec = _SPECS[name]
    if value is None and spec.optional:
        return None
    try:
        return spec.convert(value)
    except _Expected as error:
        expected = f"{error}, or null" if spec.optional else str(error)
        if value is None and name != "inner_options":
            error.remedy = f"leave it out for the default, {_DEFAULTS[name]!r}"
        remedy = f"; {error.remedy}" if error.remedy else ""
        raise OptionError(f"{where or f'option {name!r}'}: expected {expected}, got {_show(value)}{remedy}") from None


def _show(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """The options set by `SPT_*` variables, converted (sites: parsed JSON). An empty variable counts as not set."""
    names = {ENV_PREFIX + name.replace(".", "_").upper(): name for name in [*_SPECS, "sites"]}
    values: dict[str, Any] = {}
    for variable, text in env.items():
        if not variable.startswith(ENV_PREFIX) or not text.strip():
            continue
        if variable in names:
            name = names[variable]
            raw = _read_text(f"environment variable {variable}", name, text.strip())
            values[name] = raw if name == "sites" else _convert(name, raw, f"environment variable {variable}")
        elif variable not in ENV_SWITCHES:
            # Other programs may use the prefix too: only what looks like a slip of the pen is worth a word.
            near = difflib.get_close_matches(variable, [*names, *ENV_SWITCHES], n=1, cutoff=0.8)
            if near:
                warnings.warn(f"environment variable {variable} is ignored; did you mean {near[0]}?", stacklevel=4)
    return values


def _read_text(where: str, name: str, text: str) -> Any:
    """The JSON value that `text` (a shell word) stands for; `where` names its place in errors."""
    if name == "sites":
        try:
            return json.loads(text)
        except ValueError as error:
            raise OptionError(f"{where}: expected JSON, got {_show(text)}: {error}") from None
    spec = _SPECS[name]
    if spec.optional and text.lower() in ("null", "none"):
        return None
    if spec.kind == "text":
        return text
    if spec.kind == "bool":
        try:
            return _read_bool(text)
        except ValueError as error:
            raise OptionError(f"{where}: {error}") from None
    pair = re.fullmatch(r"(\d+)\s*[x,]\s*(\d+)", text)  # 64x16 and 64,16 are easier in a shell than [64,16]
    if pair:
        return [int(pair[1]), int(pair[2])]
    try:
        return json.loads("0" + text if re.match(r"\.\d", text) else text)
    except ValueError:
        return text  # the converter will say what it expected


def _read_bool(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.strip().lower() not in words:
        raise ValueError(f"expected 1 or 0 (also true/false, yes/no, on/off), got {_show(text)}")
    return words[text.strip().lower()]


def _parse_sites(sites: Any) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    if sites is None:
        return ()
    example = "write {'*.h.0.*': {'attention.density': 0.5}}"
    if not isinstance(sites, Mapping):
        raise OptionError(f"option 'sites': expected an object of globs, got {_show(sites)}; {example}")
    allowed = [name for name, spec in _SPECS.items() if spec.per_site]
    parsed = []
    for glob, overrides in sites.items():
        where = f"option sites[{glob!r}]"
        if not isinstance(glob, str) or not glob:
            raise OptionError(f"option 'sites': expected a glob over site names, got {_show(glob)}; {example}")
        if not isinstance(overrides, Mapping):
            raise OptionError(f"{where}: expected an object of options, got {_show(overrides)}; {example}")
        for key, value in overrides.items():
            if key in _SPECS and key not in allowed:
                raise OptionError(f"{where}: {key!r} applies to the whole run; give it outside 'sites'")
            if key not in allowed:
                raise OptionError(f"{where}: {_unknown(key, value, allowed)}")
        parsed.append((glob, tuple(sorted((k, _convert(k, v, f"{where}[{k!r}]")) for k, v in overrides.items()))))
    return tuple(parsed)


def _check_combinations(values: Mapping[str, Any]) -> None:
    """Raises OptionError for options that are right alone and wrong together."""
    granularity, select = values["attention.granularity"], values["attention.select"]
    partner = {("token", "mean"): "tile", ("tile", "pq-match"): "token"}.get((granularity, select))
    if partner:
        reason = "a mean is taken over a tile of keys" if select == "mean" else "codes are compared key by key"
        note = " (from the preset 'paper')" if values["preset"] == "paper" else ""
        raise OptionError(
            f"attention.select {select!r} needs attention.granularity {partner!r} ({reason}), got {granularity!r}; "
            f"set attention.granularity to {partner!r} or attention.select to 'pq'{note}"
        )
    if values["attention.compensation"] and granularity == "token":
        raise OptionError(
            "attention.compensation needs attention.granularity 'tile' (a pseudo-key stands for a tile), got 'token'; "
            "set attention.granularity to 'tile' or attention.compensation to false"
        )
    if values["inner_options"] and values["inner"] != "inductor":
        raise OptionError(
            f"inner_options are for Inductor, and inner is {values['inner']!r}, which takes none; leave them out or set inner to "
            "'inductor'"
        )


def replace(config: SPTConfig, **dotted: Any) -> SPTConfig:
    """A copy of `config` with some options changed (`replace(config, **{"attention.density": 0.5})`), checked anew.

    Raises: OptionError.
    """
    changes = _check_mapping(dotted)
    sites = _parse_sites(changes.pop("sites")) if "sites" in changes else config.sites
    converted = {name: _convert(name, value) for name, value in changes.items()}
    return SPTConfig._build({**config._flat(), **converted}, sites)


assert {f.name for f in dataclasses.fields(SPTConfig)} == {name.partition(".")[0] for name in [*_SPECS, "sites"]}
