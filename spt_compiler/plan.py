"""One decision per site: replaced, with what settings, or skipped, with what reason. Pure: reads graphs, changes nothing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import masks
from .errors import Reject
from .graph import settled
from .patterns import AttentionCapture, FFNCapture, Lora, Weight
from .patterns.attention import ONE_QUERY
from .scope import Recipe, Scope
from .state import StateSpec, TensorSpec, common_tensors

if TYPE_CHECKING:
    from .config import AttentionConfig, FFNConfig, SPTConfig
    from .pattern import Match, Skipped

# Measured break-even points (docs/cpu.md has the runs for the CPU). Below them the dense operators win, so the site stays dense.
MIN_KEYS = {"cpu": 512, "cuda": 4096}
MIN_WIDTH = {"cpu": 1024, "cuda": 2048}
MIN_TOKENS = {"cpu": 512, "cuda": 2048}
MIN_TOKENS_16_BITS = {"cpu": 4096}  # where dense products are so fast that the rest of a routed FFN weighs more

# Rows of activations kept per site for learning, and taken per observation.
ATTENTION_SAMPLES = 512
FFN_SAMPLES = 1024
# Numbers an FFN's ring may hold: several observations of a narrow model, one of a wide one (16 MiB), and at most MOST of them.
_RING_NUMBERS, _MOST_OBSERVATIONS = 1 << 22, 4
# Rank of the FFN's correction: a twenty-fifth of the FFN's work at model width 384, less of wider ones.
CORRECTION_RANK = 64

# How much denser than configured the guard may make a site before it goes dense (only where a limit lets it act).
GUARD_HEADROOM = 2.0

_ATTEND = {"tile": "tile_attention", "token": "key_attention"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class SiteReport:
    """What happened to one candidate site; one row of `explain`.

    Attributes:
        kind: "attention" or "ffn". path: module path as the graph saw it. where: "file:line" of the model's code.
        pattern: name of the pattern (its equation). status: "replaced" or "skipped"; reason: why it was skipped.
        density: budget in [0, 1]. executed: share of the work that is done at that budget, None if unknown.
        lowering: which implementation runs it. expected_gain: predicted dense time / sparse time of the site's own work.
        mask: the mask expression that is code, "tensor" for a mask that is read, or "".
    """

    kind: str
    path: str
    where: str
    pattern: str
    status: str
    reason: str = ""
    density: float | None = None
    executed: float | None = None
    lowering: str = ""
    expected_gain: float | None = None
    mask: str = ""

    @property
    def name(self) -> str:
        return f"{self.path or '?'}/{self.kind}"


@dataclass(frozen=True, eq=False)
class Plan:
    """The decision to replace one matched site.

    Attributes:
        match: what was found. config: the site's own configuration. report: its row in the report.
        anchor: position of the anchor parameter among the graph's inputs; None: a stateless rule is used.
        spec: the state it needs (None without anchor). weights: how the host computes its weights (FFN), by name.
        density: configured; max_density: the static maximum for data-driven budgets.
        minimum: length (attention) or token count (FFN) below which the op itself takes the dense path (symbolic shapes).
        samples: rows of activations taken per observation. shape: the static sizes the rewrite needs.
        mask: what is left of an attention site's masks (None for an FFN).
    """

    match: Match
    config: SPTConfig
    report: SiteReport
    anchor: int | None
    spec: StateSpec | None
    weights: dict[str, Any]
    density: float
    max_density: float
    minimum: int
    samples: int
    shape: dict[str, int]
    mask: masks.LiftedMask | None = None


def plan_site(match: Match, scope: Scope, config: SPTConfig, *, training: bool) -> Plan | SiteReport:
    """A `Plan` for the match, or the `SiteReport` that says why it stays dense.

    Args:
        scope: the graph that holds the match. config: options of the whole call. training: whether grad mode is on.
    """
    from .lowering import registry

    kind = match.pattern.kind
    name = f"{match.path or '?'}/{kind}"
    own = config.for_site(name)
    decide = _plan_attention if kind == "attention" else _plan_ffn
    row = SiteReport(kind, match.path, match.where, match.pattern.name, "skipped")
    if own.inference == "dense" and not training:
        return replace(row, reason='inference="dense" and this graph runs without gradients')
    decided = decide(match, scope, own)
    if isinstance(decided, Reject):
        return replace(row, reason=str(decided))
    device = value_of(match.output).device.type
    op = "routed_ffn_v1" if kind == "ffn" else f"{_ATTEND[own.attention.granularity]}_v1"
    executed, gain = _work(decided, kind, device)
    row = replace(
        row,
        status="replaced",
        density=decided.density,
        executed=executed,
        expected_gain=gain,
        lowering=registry.chosen(op, device),
        mask=masks.text(decided.mask) if decided.mask is not None else "",
    )
    return replace(decided, report=row)


def skipped_report(skipped: Skipped) -> SiteReport:
    """The report row of a candidate that a guard refused."""
    return SiteReport(skipped.kind, skipped.path, skipped.where, skipped.pattern_name, "skipped", str(skipped.reason))


def value_of(node: Any) -> torch.Tensor:
    """The fake tensor that stands for a node's value."""
    return node.meta["example_value"]


def _special_tensor(*nodes: Any) -> str | None:
    """Name of the type of the first value that is no plain tensor: its storage is not what kernels would read."""
    found = next((v for v in map(value_of, nodes) if is_traceable_wrapper_subclass(v)), None)
    return None if found is None else type(found).__name__


def _static(value: Any) -> bool:
    return isinstance(value, int)


def _plan_attention(match: Match, scope: Scope, config: SPTConfig) -> Plan | Reject:
    c: AttentionCapture = match.capture
    options = config.attention
    q, k, v = value_of(c.q), value_of(c.k), value_of(c.v)
    if c.k_transposed:
        k = k.transpose(-1, -2)
    special = _special_tensor(c.q, c.k, c.v)
    if special is not None:
        return Reject("its queries, keys or values are of type {} (sharded?)", special)
    if not q.is_floating_point() or q.dtype not in _FLOATS:
        return Reject("queries have dtype {}; expected one of fp16, bf16, fp32, fp64", q.dtype)
    if q.dim() < 2 or k.dim() != q.dim() or v.dim() != q.dim():
        return Reject("ranks of q, k, v are {}, {}, {}; expected equal ranks of at least 2", q.dim(), k.dim(), v.dim())
    sizes_q, sizes_k, sizes_v = (tuple(map(settled, t.shape)) for t in (q, k, v))
    heads, kv_heads = (1, 1) if q.dim() <= 3 else (sizes_q[-3], sizes_k[-3])
    head_dim, value_dim = sizes_q[-1], sizes_v[-1]
    for label, size in (
        ("head count", heads),
        ("key head count", kv_heads),
        ("head dim", head_dim),
        ("value dim", value_dim),
    ):
        if not _static(size):
            return Reject("{} is not static ({})", label, size)
    if v.dim() > 3 and sizes_v[-3] != kv_heads:
        return Reject("{} key heads but {} value heads", kv_heads, sizes_v[-3])
    if heads % kv_heads:
        return Reject("{} query heads are not a multiple of {} key heads", heads, kv_heads)
    lead = slice(0, -2 if q.dim() == 3 else -3)
    for label, sizes in (("keys", sizes_k), ("values", sizes_v)):
        if q.dim() >= 3 and any(
            not (statically_known_true(a == b) or statically_known_true(b == 1))
            for a, b in zip(sizes_q[lead], sizes[lead], strict=True)
        ):
            return Reject("batch sizes of queries {} and {} {} differ", sizes_q[lead], label, sizes[lead])
    n_q, n_k = sizes_q[-2], sizes_k[-2]
    if statically_known_true(n_q == 1):
        return Reject(ONE_QUERY)
    if statically_known_true(n_q == 0) or statically_known_true(n_k == 0) or statically_known_true(q.numel() == 0):
        return Reject("empty input")
    minimum = 0 if config.exact else MIN_KEYS.get(q.device.type, 0) if options.min_keys is None else options.min_keys
    if _static(n_k) and n_k < minimum:
        return Reject(
            "{} keys are fewer than attention.min_keys = {}, the break-even on {}", n_k, minimum, q.device.type
        )

    anchor = scope.anchor(c.k, c.v, c.q)
    if anchor is None:
        anchor = scope.downstream_anchor(match.output)
    subspace = options_subspace(head_dim, options)
    if isinstance(subspace, Reject):
        return subspace
    shape = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, subspaces=head_dim // subspace)
    spec = None
    if anchor is not None and not config.exact:  # with everything selected there is nothing to know about keys
        n_sub, n_code = shape["subspaces"], options.codewords
        learns = options.select != "mean"
        trainable = config.preset == "paper"
        tensors = {
            "codebook": TensorSpec((kv_heads, n_sub, n_code, subspace), requires_grad=trainable),
            "key_mean": TensorSpec((kv_heads, head_dim)),
            "sample": TensorSpec((2, kv_heads, ATTENTION_SAMPLES, head_dim)),
            **common_tensors(-1.0 if learns else 1.0),
            "query_moment": TensorSpec((kv_heads, n_sub, subspace, subspace), graph_input=False),
        }
        key = (kv_heads, head_dim, value_dim, n_sub, n_code)
        spec = StateSpec("attention", key, tuple(tensors.items()))
    density = 1.0 if config.exact else options.density
    return Plan(
        match,
        config,
        None,
        anchor,
        spec,
        {},
        density,
        _most(density, options),
        0 if _static(n_k) else minimum,
        _samples(ATTENTION_SAMPLES, q.numel() // head_dim // kv_heads),
        shape,
        masks.lift(c, scope, (*sizes_q[:-2], n_q, n_k)),
    )  # type: ignore[arg-type]  # the report is filled in by plan_site


def _samples(most: int, available: Any) -> int:
    """Rows to take per observation: no row of a small batch twice."""
    return min(most, available) if _static(available) else most


def _most(density: float, options: AttentionConfig | FFNConfig) -> float:
    """The largest density that data may ask for: static storage has to hold it."""
    headroom = GUARD_HEADROOM if options.max_rel_error is not None else 1.0
    start = options.schedule[0] if options.schedule is not None else 0.0
    return min(1.0, max(density * headroom, start))


def options_subspace(head_dim: int, options: AttentionConfig) -> int | Reject:
    """Width of a PQ subspace: at most 8 where codes are compared (the paper), 4 where single keys are scored, 2 for tiles, a
    divisor of the head dim.

    A codebook has the same size, and assignment the same products, at every width. With 16 codewords, width 4 keeps .94 and .97
    of the oracle's attention mass on single keys at densities 1/8 and 1/4 on MiniLM where width 8 keeps .89 and .94. Tiles keep 1.3
    points of mass less than by plain means at 1/8 with width 4, 0.8 with 32 codewords of it, and 0.4 with width 2.
    """
    if options.subspaces is not None:
        if head_dim % options.subspaces:
            return Reject("head dim {} is not divisible by attention.subspaces = {}", head_dim, options.subspaces)
        return head_dim // options.subspaces
    widest = 8 if options.select == "pq-match" else 4 if options.granularity == "token" else 2
    return max(d for d in range(1, widest + 1) if head_dim % d == 0)


def _plan_ffn(match: Match, scope: Scope, config: SPTConfig) -> Plan | Reject:
    c: FFNCapture = match.capture
    options = config.ffn
    x, width = value_of(c.x), c.width
    model_width = settled(x.shape[-1])
    special = _special_tensor(c.x, *(w.node for w in c.w_in), c.w_out)
    if special is not None:
        return Reject("its weights or inputs are of type {} (quantised or sharded?)", special)
    if x.dtype not in _FLOATS:
        return Reject("input has dtype {}; expected one of fp16, bf16, fp32, fp64", x.dtype)
    if not _static(width) or not _static(model_width):
        return Reject("widths are not static ({} -> {})", model_width, width)
    if statically_known_true(x.numel() == 0):
        return Reject("empty input")
    device = x.device.type
    lifted = config.exact or options.min_width == 0
    minimum = 0 if config.exact else MIN_WIDTH.get(device, 0) if options.min_width is None else options.min_width
    if width < minimum:
        return Reject("hidden width {} is below ffn.min_width = {}, the break-even on {}", width, minimum, device)
    tokens = x.numel() // model_width
    min_tokens = 0 if lifted or options.min_width is not None else _min_tokens(device, x.dtype)
    if _static(tokens) and tokens < min_tokens:
        return Reject("{} tokens a call are fewer than {}, the break-even on {}", tokens, min_tokens, device)
    n_blocks = min(options.blocks, width)
    block = -(-width // n_blocks)
    n_blocks = -(-width // block)  # a width such as 9 in 8 blocks leaves some empty: use the blocks that hold units

    anchor = scope.parameter(c.w_in[0].node)
    if anchor is None:
        anchor = scope.anchor(c.w_in[0].node)
    if anchor is None:
        return Reject("its first weight is not a parameter of the model")
    weights = {
        "w_in": [_weight_recipe(scope, w) for w in c.w_in],
        "b_in": [_weight_recipe(scope, b) if b is not None else None for b in c.b_in],
        "w_out": scope.recipe(c.w_out),
        "act": c.act,
        "act_in": [scope.recipe(a) for a in c.act_in],
        "lora": [[_lora_recipe(scope, branch, w) for branch in branches] for w, branches in zip(c.w_in, c.lora, strict=False)],
        "lora_out": [_lora_recipe(scope, branch) for branch in c.lora_out],
    }
    adapters = [b for branches in (*weights["lora"], weights["lora_out"]) for b in branches]
    if weights["w_out"] is None or any(w is None for w in (*weights["w_in"], *weights["act_in"], *adapters)):
        return Reject("its weights are computed from activations, by writes in place, or in more steps than are followed")
    learned = options.router == "learned" and not config.exact
    trainable = options.gate != "hard" and not config.exact
    learns = options.router in ("learned", "static") and not config.exact
    rows = min(max(_RING_NUMBERS // model_width, FFN_SAMPLES), _MOST_OBSERVATIONS * FFN_SAMPLES)
    # The rows of w_in that this site uses are part of its identity: two halves of one fused weight are two sites.
    # So is which matrix of a stack it reads: experts called one by one.
    key = (width, n_blocks, c.w_in[0].start or 0, options.router, *_picked(scope, c.w_in[0].node))
    tensors = {
        "permutation": TensorSpec((width,), torch.int32, fill="arange"),
        "router_weight": TensorSpec((n_blocks, model_width), requires_grad=trainable and learned),
        "router_bias": TensorSpec((n_blocks,), requires_grad=trainable and learned),
        "compensation": TensorSpec((n_blocks, model_width)),
        "correction_in": TensorSpec((CORRECTION_RANK, model_width)),
        "correction_shift": TensorSpec((CORRECTION_RANK,)),
        "correction_out": TensorSpec((model_width, CORRECTION_RANK)),
        "correction_gate": TensorSpec((1,)),
        "always_on": TensorSpec((n_blocks,), torch.bool),
        "sample": TensorSpec((rows, model_width)),
        **common_tensors(-1.0 if learns else 1.0),
    }
    density = 1.0 if config.exact else max(1, int(options.density * n_blocks + 0.5)) / n_blocks
    return Plan(
        match,
        config,
        None,  # type: ignore[arg-type]  # the report is filled in by plan_site
        anchor,
        StateSpec("ffn", key, tuple(tensors.items())),
        weights,
        density,
        _most(density, options),
        0 if _static(tokens) else min_tokens,
        _samples(FFN_SAMPLES, tokens),
        dict(width=width, blocks=n_blocks, block=block, model_width=model_width),
    )


def _min_tokens(device: str, dtype: torch.dtype) -> int:
    fewest = MIN_TOKENS.get(device, 0)
    return max(fewest, MIN_TOKENS_16_BITS.get(device, 0)) if dtype.itemsize == 2 else fewest


def _picked(scope: Scope, node: fx.Node) -> tuple[str, ...]:
    """What is taken of a parameter before it serves as a weight: the indices of a stack or a fused tensor, outermost last."""
    found = []
    scope, node = scope.source(node)
    while node.op in ("call_function", "call_method") and node.args and isinstance(node.args[0], fx.Node):
        if node.target is operator.getitem:
            found.append(str(node.args[1]))
        scope, node = scope.source(node.args[0])
    return tuple(found)


def _weight_recipe(scope: Scope, weight: Weight) -> tuple[Recipe, slice] | None:
    recipe = scope.recipe(weight.node)
    return None if recipe is None else (recipe, weight.rows)


def _lora_recipe(scope: Scope, branch: Lora, rows: Weight | None = None) -> tuple | None:
    """(A, rows of B, scaling) of a low-rank branch: what it adds to its weight is scaling * B @ A."""
    a = scope.recipe(branch.a)
    b = _weight_recipe(scope, Weight(branch.b) if rows is None else branch.rows_of(branch.b, rows))
    return None if a is None or b is None else (a, b, branch.scaling)


# Dense time / sparse time = 1 / (fixed share + executed share / relative kernel speed), fitted to the measured tables.
_COST = {("attention", "cpu"): (0.12, 1.3), ("ffn", "cpu"): (0.05, 0.93)}


def _work(plan: Plan, kind: str, device: str) -> tuple[float | None, float | None]:
    """(share of the dense work that is executed, predicted gain on the site's own work)."""
    density = plan.density
    executed = density
    if kind == "attention":
        c = plan.match.capture
        q, k = value_of(c.q), value_of(c.k)
        same = statically_known_true(q.shape[-2] == k.shape[-1 if c.k_transposed else -2])
        if plan.mask is not None and plan.mask.is_causal and same:
            executed = (2 * density - density**2) if density < 1 else 1.0
    cost = _COST.get((kind, device))
    if cost is None or density >= 1:
        return executed, None
    fixed, speed = cost
    return executed, 1.0 / (fixed + executed / speed)


def resolve(
    matches: Sequence[Match], skipped: Sequence[Skipped], scope: Scope, config: SPTConfig, *, training: bool
) -> tuple[list[Plan], list[SiteReport]]:
    """Decides about every candidate of one graph: the plans in graph order, and the report rows of what stays dense."""
    plans: list[Plan] = []
    rows = [skipped_report(s) for s in skipped]
    for match in matches:
        decided = plan_site(match, scope, config, training=training)
        if isinstance(decided, Plan):
            plans.append(decided)
        else:
            rows.append(decided)
    return plans, rows
