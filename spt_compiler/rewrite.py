"""Puts SPT nodes in a graph: applies plans to a copy of Dynamo's graph and wires learned state in as extra inputs.

The only file that edits graphs after canonicalisation. It works on a copy (DESIGN.md: Dynamo's own graph must stay as it
is), recurses into the bodies of higher-order ops, and threads state and observations through their calls.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
import torch._functorch.config
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from .graph import same_size, settled, shape
from .masks import LiftedMask
from .patterns import AttentionCapture, FFNCapture, Weight
from .plan import Plan, value_of
from .scope import Scope, is_pure
from .state import StateSpec

log = logging.getLogger(__name__)

# Token rows per tile of a routed FFN's block list. A CPU reads offsets on the host and needs no padding.
ROUTE_TILE = {"cpu": 1, "cuda": 128}

# Higher-order ops whose first argument is a body that is called once with the remaining arguments.
_CALLS_BODY = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")


@dataclass(frozen=True, eq=False)
class Binding:
    """Ties one state (anchor, kind, key) to the extra inputs of a graph.

    Attributes:
        anchor: position of the anchor among the graph's real inputs. spec, path, settings: for `StateStore.get`.
        weights: recipes of the site's weights (FFN). losses: positions of the site's auxiliary losses among extra outputs.
    """

    anchor: int
    spec: StateSpec
    path: str
    settings: Any
    weights: dict[str, Any]
    losses: list[int] = field(default_factory=list)


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that carries what later stages read: meta, sources, parameter names."""
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, twins)
    graph.output(result)
    graph.output_node().meta = copy.copy(module.graph.output_node().meta)
    for old, new in twins.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    twin = fx.GraphModule(module, graph)
    twin.meta = copy.copy(module.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason"):
        if hasattr(module, name):
            setattr(twin, name, getattr(module, name))
    return twin


def body_calls(module: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """(call node, attribute name of its body) of every higher-order op that can be rewritten inside."""
    for node in module.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", str(node.target)) not in _CALLS_BODY:
            continue
        body = node.args[0] if node.args else None
        if (
            isinstance(body, fx.Node)
            and body.op == "get_attr"
            and isinstance(getattr(module, str(body.target)), fx.GraphModule)
        ):
            yield node, str(body.target)


def open_body(module: fx.GraphModule, call: fx.Node, name: str, scope: Scope) -> tuple[fx.GraphModule, Scope]:
    """Replaces the body of `call` by a copy that may be edited; returns it with its scope."""
    body = copy_graph(getattr(module, name))
    setattr(module, name, body)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    outer = {p: a for p, a in zip(placeholders, call.args[1:], strict=True) if isinstance(a, fx.Node)}
    return body, Scope(body, parent=scope, outer=outer)


def _recomputes() -> bool:
    """Whether torch is told to compute activations again in backward rather than keep all that it can."""
    return torch._functorch.config.activation_memory_budget < 1


def _joins_heads(output: fx.Node) -> bool:
    """Whether everybody who reads an attention's result [B, H, T, Dv] turns it to [B, T, H, Dv], as the op lays it out.

    Others may view it as if it were contiguous, which most of what is replaced returns.
    """
    turns = (0, 2, 1, 3)
    return all(user.target is torch.permute and tuple(user.args[1]) == turns for user in output.users)  # type: ignore[arg-type]


class Rewriter:
    """Edits one graph (and, through `inside`, the bodies it calls).

    Args:
        module: the canonicalised copy. training: whether the graph is compiled with grad mode on.
    """

    def __init__(
        self, module: fx.GraphModule, *, training: bool, parent: Rewriter | None = None, call: fx.Node | None = None
    ):
        self.module, self.graph, self.training = module, module.graph, training
        self.parent, self.call = parent, call
        self.bindings: list[Binding] = []
        self.extra_outputs = 0
        self._inputs: dict[tuple[int, str], fx.Node] = {}
        self._brought: dict[fx.Node, fx.Node] = {}
        self._results: dict[fx.Node, fx.Node] = {}  # of the sites replaced so far, by the nodes that are gone

    def inside(self, body: fx.GraphModule, call: fx.Node) -> Rewriter:
        """A rewriter for the body of a call in this graph."""
        return Rewriter(body, training=self.training, parent=self, call=call)

    @property
    def root(self) -> Rewriter:
        return self if self.parent is None else self.parent.root

    def apply(self, plan: Plan) -> None:
        """Replaces one matched site. If anything goes wrong the graphs are left as they were, and the error is raised."""
        output = plan.match.output
        levels = [self]
        while levels[-1].parent is not None:
            levels.append(levels[-1].parent)
        before = [(level, set(level.graph.nodes), level.graph.output_node().args) for level in levels]
        try:
            edit = self._attention if plan.match.pattern.kind == "attention" else self._ffn
            with self.graph.inserting_before(output):
                result = edit(plan)
        except BaseException:
            # State inputs stay: they are bound by now, and harmless. Outer graphs read inner results, so they go first.
            for level, nodes, returned in reversed(before):
                level.graph.output_node().args = returned
                for node in reversed([n for n in level.graph.nodes if n not in nodes and n.op != "placeholder"]):
                    level.graph.erase_node(node)
            raise
        result.meta = {**output.meta, "spt_site": plan.report.name}
        output.replace_all_uses_with(result)
        self._results[output] = result
        for node in sorted(plan.match.nodes, reverse=True):
            if not node.users:
                self.graph.erase_node(node)
        if plan.mask is not None:  # what made a mask that is code now is not built any more
            c = plan.match.capture
            self._prune([*c.allowed, *c.disallowed, *(node for node, _ in c.bias)])

    def _prune(self, nodes: Sequence[fx.Node]) -> None:
        """Erases pure nodes without users, and what only they used; in a body also the arguments that became idle."""
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node._erased or node.users:
                continue
            if node.op == "placeholder" and self.parent is not None and self.call is not None:
                placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
                position = 1 + placeholders.index(node)
                outer = self.call.args[position]
                self.call.args = (*self.call.args[:position], *self.call.args[position + 1 :])
                self.graph.erase_node(node)
                if isinstance(outer, fx.Node):
                    self.parent._prune([outer])
            elif is_pure(node):
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                stack.extend(inputs)

    def finish(self) -> fx.GraphModule:
        """Checks the edited graph and compiles its code."""
        self.graph.lint()
        self.module.recompile()
        return self.module

    def _current(self, captured: Any) -> Any:
        """What a site captured, with the results of the sites before it in place of the nodes that they replaced."""
        if isinstance(captured, fx.Node):
            return self._results.get(captured, captured)
        if isinstance(captured, tuple):
            return tuple(map(self._current, captured))
        if is_dataclass(captured) and not isinstance(captured, type):
            return replace(captured, **{f.name: self._current(getattr(captured, f.name)) for f in fields(captured)})
        return captured

    # ---- building blocks ----------------------------------------------------------------------------------------

    def emit(self, target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def state(self, plan: Plan, name: str) -> fx.Node:
        """The graph input that carries a state tensor of the plan's site."""
        assert plan.spec is not None and plan.anchor is not None
        return self._state_input(self.root._bind(plan), name)

    def _bind(self, plan: Plan) -> int:
        for i, b in enumerate(self.bindings):
            if (b.anchor, b.spec.kind, b.spec.key) == (plan.anchor, plan.spec.kind, plan.spec.key):  # type: ignore[union-attr]
                return i
        self.bindings.append(Binding(plan.anchor, plan.spec, plan.match.path, plan.config, plan.weights))  # type: ignore[arg-type]
        index = len(self.bindings) - 1
        for name in plan.spec.inputs:  # type: ignore[union-attr]  # all of them: the run-time wrapper passes every input
            self._state_input(index, name)
        return index

    def _state_input(self, binding: int, name: str) -> fx.Node:
        node = self._inputs.get((binding, name))
        if node is not None:
            return node
        last = [n for n in self.graph.nodes if n.op == "placeholder"]
        label = f"spt_{binding}_{name}"
        with self.graph.inserting_after(last[-1]) if last else self.graph.inserting_before():
            node = self.graph.placeholder(label)
        if self.parent is None:
            node._dynamo_source = None  # type: ignore[attr-defined]
            # Fixed addresses: without the mark CUDA graphs would copy, and refuse mutation.
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        else:
            outer = self.parent._state_input(binding, name)
            assert self.call is not None
            self.call.args = (*self.call.args, outer)
        self._inputs[(binding, name)] = node
        return node

    def _outside(self, values: Sequence[fx.Node]) -> list[fx.Node]:
        """The same values in the outermost graph: a body returns them as extra outputs."""
        if self.parent is None:
            return list(values)
        assert self.call is not None
        output = self.graph.output_node()
        returned = tuple(output.args[0])  # type: ignore[arg-type]
        output.args = ((*returned, *values),)
        with self.parent.graph.inserting_after(self.call):
            outer = [self.parent.emit(operator.getitem, self.call, len(returned) + i) for i in range(len(values))]
        return self.parent._outside(outer)

    def _observe(self, plan: Plan, rows: fx.Node, quality: fx.Node | None) -> None:
        """Adds the mutating part of learning, always in the outermost graph: a checkpointed body may run twice."""
        values = self._outside([rows] if quality is None else [rows, quality])
        root = self.root
        index = root._bind(plan)
        # In the graph of the site itself the insertion point is right; from a body, it is behind the call.
        after = max(values) if self.parent is not None else None
        with root.graph.inserting_after(after) if after is not None else nullcontext():
            probe = root._probe(index)
        with root.graph.inserting_after(probe) if after is not None else nullcontext():
            sample, cursor = root._state_input(index, "sample"), root._state_input(index, "cursor")
            seen = root.emit(torch.ops.spt.observe_v1.default, sample, cursor, values[0], probe)
        if quality is not None:
            with root.graph.inserting_after(seen) if after is not None else nullcontext():
                root.emit(torch.ops.aten.add_.Tensor, root._state_input(index, "quality"), values[1])

    def _probe(self, binding: int) -> fx.Node:
        return self.emit(
            operator.getitem, self._state_input(binding, "probe"), slice(0, 2) if self.training else slice(2, 4)
        )

    def _extra_output(self, plan: Plan, value: fx.Node) -> None:
        """Returns a value from the outermost graph, behind its own outputs; the run-time wrapper strips it."""
        root = self.root
        (value,) = self._outside([value])
        output = root.graph.output_node()
        output.args = ((*output.args[0], value),)  # type: ignore[misc]
        root.bindings[root._bind(plan)].losses.append(root.extra_outputs)
        root.extra_outputs += 1

    def _budget(self, plan: Plan, device: torch.device) -> fx.Node:
        if plan.spec is None or plan.config.exact:
            return self.emit(torch.full, (1,), plan.density, dtype=torch.float32, device=device)
        # Negative (everything) stays negative; a site that the guard made denser has a factor above one.
        return self.emit(torch.mul, self.state(plan, "budget"), plan.density)

    def _seed(self, device: torch.device) -> fx.Node:
        # Drawn by the graph like the dropout it replaces: checkpointing replays it, `manual_seed` governs it.
        return self.emit(torch.randint, 0, 2**31 - 1, (1,), dtype=torch.int64, device=device)

    # ---- attention ----------------------------------------------------------------------------------------------

    def _attention(self, plan: Plan) -> fx.Node:
        c: AttentionCapture = self._current(plan.match.capture)
        config, options = plan.config, plan.config.attention
        rank, device = value_of(c.q).dim(), value_of(c.q).device
        out_dtype = value_of(plan.match.output).dtype
        k_node = self.emit(torch.transpose, c.k, -1, -2) if c.k_transposed else c.k
        q_node = c.q
        for factor in c.scale_nodes:
            q_node = self.emit(torch.mul, q_node, self._cast(factor, value_of(c.q).dtype))
        dtypes = [value_of(n).dtype for n in (c.q, c.k, c.v)]
        read, outside = (q_node, k_node, c.v), None
        if c.types is not None:  # the model's products run in these types, and autocast has no say
            dtypes = [c.types[0], *c.types]
            read = tuple(self.emit(torch.ops.aten.to.dtype, n, d) for n, d in zip(read, dtypes, strict=True))  # type: ignore[assignment]
            outside = self.emit(_enter_autocast, device.type, None, False, None)
        common = torch.promote_types(torch.promote_types(dtypes[0], dtypes[1]), dtypes[2])
        q, k, v = (
            n if d == common else self.emit(torch.ops.aten.to.dtype, n, common) for n, d in zip(read, dtypes, strict=True)
        )
        k, v = self._match_batch(c, k, v)
        q, k, v = (self._four_dims(n, rank) for n in (q, k, v))
        mask = plan.mask
        assert mask is not None
        bias, expr = self._bias(c, mask, rank), mask.expr
        expr_in = [self._vector(*source) for source in mask.tensors]
        quantised = plan.spec is not None and options.select != "mean"
        codebook = self.state(plan, "codebook") if quantised else None
        key_mean = self.state(plan, "key_mean") if quantised else None
        rule = options.select if quantised else "mean" if options.granularity == "tile" else "pq"
        budget = self._budget(plan, device)
        seed = self._seed(device) if c.dropout_p > 0 else None
        fixed_q, fixed_k, fixed_v = (self.emit(torch.ops.aten.detach.default, n) for n in (q, k, v))
        fixed_bias = None if bias is None else self.emit(torch.ops.aten.detach.default, bias)
        fixed_codes = None if codebook is None else self.emit(torch.ops.aten.detach.default, codebook)
        tail: tuple[int | bool, ...] = ()
        if options.granularity == "tile":
            tail = tuple(options.tile)
            chosen = self.emit(
                torch.ops.spt.select_tiles_v1.default,
                *(fixed_q, fixed_k, fixed_bias, expr, expr_in, fixed_codes, key_mean, budget, plan.max_density),
                *(*tail, c.scale, c.softcap, rule, plan.minimum),
            )
            attend = torch.ops.spt.tile_attention_v1.default
            if options.compensation and not config.exact:
                tail = (*tail, True)
        else:
            chosen = self.emit(
                torch.ops.spt.select_keys_v1.default,
                *(fixed_q, fixed_k, fixed_bias, expr, expr_in, fixed_codes, key_mean, budget, plan.max_density),
                *(c.scale, c.softcap, rule, plan.minimum),
            )
            attend = torch.ops.spt.key_attention_v1.default
        kept, counts = self.emit(operator.getitem, chosen, 0), self.emit(operator.getitem, chosen, 1)
        both = self.emit(
            attend, q, k, v, bias, kept, counts, expr, expr_in, seed, float(c.dropout_p), c.scale, c.softcap, mask.empty, *tail
        )
        out, lse = self.emit(operator.getitem, both, 0), self.emit(operator.getitem, both, 1)
        if plan.spec is not None and not config.exact:
            probe = self._probe(self.root._bind(plan))
            stats = self.emit(
                torch.ops.spt.stats_attention_v1.default,
                *(fixed_q, fixed_k, fixed_v, fixed_bias, expr, expr_in),
                *(self.emit(torch.ops.aten.detach.default, out), self.emit(torch.ops.aten.detach.default, lse)),
                *(c.scale, c.softcap, plan.samples, probe),
            )
            rows = [self.emit(operator.getitem, stats, i) for i in range(2)]  # queries, keys
            self._observe(plan, self.emit(torch.stack, rows), self.emit(operator.getitem, stats, 2))
            if config.preset == "paper" and self.training:
                self._extra_output(
                    plan, self.emit(torch.ops.spt.commitment_loss_v1.default, self.state(plan, "codebook"), k)
                )
        if outside is not None:
            self.emit(_exit_autocast, outside)
        if rank > 3 and not _joins_heads(plan.match.output):
            out = self.emit(torch.ops.aten.contiguous.default, out)
        out = self._restore_rank(out, c.q, rank)
        return out if out_dtype == common else self.emit(torch.ops.aten.to.dtype, out, out_dtype)

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if value_of(node).dtype == dtype else self.emit(torch.ops.aten.to.dtype, node, dtype)

    def _four_dims(self, node: fx.Node, rank: int) -> fx.Node:
        """[..., H, T, D] -> [B, H, T, D]; without a head dim the heads are one."""
        if rank == 2:
            return self.emit(torch.unsqueeze, self.emit(torch.unsqueeze, node, 0), 0)
        if rank == 3:
            return self.emit(torch.unsqueeze, node, 1)
        return node if rank == 4 else self.emit(torch.flatten, node, 0, rank - 4)

    def _restore_rank(self, out: fx.Node, like: fx.Node, rank: int) -> fx.Node:
        if rank == 2:
            return self.emit(torch.squeeze, self.emit(torch.squeeze, out, 0), 0)
        if rank == 3:
            return self.emit(torch.squeeze, out, 1)
        if rank == 4:
            return out
        return self.emit(torch.unflatten, out, 0, tuple(self._size(like, d) for d in range(rank - 3)))

    def _size(self, node: fx.Node, dim: int) -> Any:
        size = settled(value_of(node).shape[dim])
        return size if isinstance(size, int) else self.emit(torch.ops.aten.sym_size.int, node, dim)

    def _match_batch(self, c: AttentionCapture, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Expands leading dims of size one of keys and values (all but the heads) to the queries', as broadcasting did."""
        rank = value_of(c.q).dim()
        lead = 1 if rank == 3 else max(0, rank - 3)

        def widen(node: fx.Node, source: fx.Node) -> fx.Node:
            ones = [d for d in range(lead) if same_size(shape(source)[d], 1) and not same_size(shape(c.q)[d], 1)]
            if not ones:
                return node
            sizes = [self._size(c.q, d) if d in ones else -1 for d in range(rank)]
            return self.emit(torch.ops.aten.expand.default, node, sizes)

        return widen(k, c.k), widen(v, c.v)

    def _bias(self, c: AttentionCapture, mask: LiftedMask, rank: int) -> fx.Node | None:
        """What is left of the site's masks as one: None, a bool tensor (True = allowed) or a float tensor that is added."""
        total: fx.Node | None = None
        for node, factor in mask.bias:
            term = node if factor == 1.0 else self.emit(torch.mul, node, factor)
            term = self._mask_dims(term, value_of(node), c.q, rank)
            total = term if total is None else self.emit(torch.add, total, term)
        if total is not None and mask.lowest is not None:
            total = self.emit(torch.clamp, total, min=mask.lowest)
        allowed: fx.Node | None = None
        for node in (*mask.allowed, *mask.disallowed):
            term = self.emit(torch.logical_not, node) if node in mask.disallowed else node
            term = self._mask_dims(term, value_of(node), c.q, rank)
            allowed = term if allowed is None else self.emit(torch.logical_and, allowed, term)
        if total is None or allowed is None:
            return total if allowed is None else allowed
        return self.emit(torch.where, allowed, total, float("-inf"))

    def _vector(self, scope: Scope, node: fx.Node) -> fx.Node:
        """A tensor that a mask expression reads, from the graph that computes it."""
        node = self._bring(scope, node)
        return node if value_of(node).dim() else self.emit(torch.reshape, node, (1,))

    def _bring(self, scope: Scope, node: fx.Node) -> fx.Node:
        """A value of this graph or of one around it, as an extra argument of the calls in between."""
        if scope.module is self.module:
            return node
        if node not in self._brought:
            assert self.parent is not None and self.call is not None
            outer = self.parent._bring(scope, node)
            last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self._brought[node] = self.graph.placeholder(f"spt_mask_{len(self._brought)}")
            self._brought[node].meta["example_value"] = node.meta["example_value"]
            self.call.args = (*self.call.args, outer)
        return self._brought[node]

    def _mask_dims(self, node: fx.Node, value: torch.Tensor, q: fx.Node, rank: int) -> fx.Node:
        """A mask that broadcasts to scores of `rank` dims -> one that broadcasts to [B, H, Tq, Tk]."""
        for _ in range(value.dim(), max(rank, 2)):
            node = self.emit(torch.unsqueeze, node, 0)
        if rank == 2:
            return self.emit(torch.unsqueeze, self.emit(torch.unsqueeze, node, 0), 0)
        if rank == 3:
            return self.emit(torch.unsqueeze, node, 1)
        if rank == 4:
            return node
        missing = rank - value.dim()
        lead = [1] * missing + list(map(settled, value.shape[: max(0, value.dim() - 3)]))
        if any(not isinstance(s, int) or s != 1 for s in lead):
            sizes = [self._size(q, d) for d in range(rank - 3)]
            node = self.emit(torch.ops.aten.expand.default, node, [*sizes, -1, -1, -1])
        return self.emit(torch.flatten, node, 0, rank - 4)

    # ---- feed-forward -------------------------------------------------------------------------------------------

    def _ffn(self, plan: Plan) -> fx.Node:
        c: FFNCapture = self._current(plan.match.capture)
        config, options = plan.config, plan.config.ffn
        value = value_of(c.x)
        device = value.device
        x = c.x if value.dim() == 2 else self.emit(torch.reshape, c.x, (-1, plan.shape["model_width"]))
        w_in = [self._rows(w) for w in c.w_in]
        b_in = [self._rows(b) for b in c.b_in if b is not None]
        if b_in and len(b_in) < len(w_in):
            b_in = [self._rows(b) if b is not None else self._zeros(c, i) for i, b in enumerate(c.b_in)]
        b_in = self._lora_biases(c, b_in)
        lora_a, lora_b = self._lora(c, x)
        lora_down, lora_p = self._lora_down(c)
        gated = options.gate != "hard" and not config.exact
        # A hard gate gives the router no gradient, so none may reach x through the scores either.
        seen = x if gated else self.emit(torch.ops.aten.detach.default, x)
        scores = self.emit(
            torch.nn.functional.linear,
            self._float(seen, value.dtype),
            self.state(plan, "router_weight"),
            self.state(plan, "router_bias"),
        )
        chosen = self.emit(
            torch.ops.spt.route_v1.default,
            self.emit(torch.ops.aten.detach.default, scores),
            self.state(plan, "always_on"),
            self._budget(plan, device),
            *(plan.max_density, ROUTE_TILE.get(device.type, 1), plan.minimum),
        )
        blocks, rows, offsets = (self.emit(operator.getitem, chosen, i) for i in range(3))
        gates = None
        if gated:
            probability = self.emit(torch.sigmoid, scores)
            if options.gate == "spt":
                gates = self.emit(torch.mul, probability, 2.0)
            else:
                gates = self.emit(
                    torch.add,
                    self.emit(torch.sub, probability, self.emit(torch.ops.aten.detach.default, probability)),
                    1.0,
                )
        compensation = self.state(plan, "compensation") if options.compensation and not config.exact else None
        seed = self._seed(device) if c.dropout_p > 0 else None
        result = self.emit(
            torch.ops.spt.routed_ffn_v1.default,
            *(x, w_in, b_in, c.w_out, c.b_out, lora_a, lora_b, lora_down, gates, blocks, rows, offsets),
            *(
                self.state(plan, "permutation"),
                compensation,
                c.act,
                list(c.act_in),
                seed,
                float(c.dropout_p),
                self._seed(device) if lora_p > 0 else None,
                lora_p,
                self.training and not _recomputes(),
            ),
        )
        y = self.emit(operator.getitem, result, 0)
        if compensation is not None:
            y = self.emit(torch.add, y, self._correction(plan, x, value.dtype, offsets))
        if c.lora_out:
            y = self._lora_up(c, y, self.emit(operator.getitem, result, 2))
        if not config.exact:
            probe = self._probe(self.root._bind(plan))
            fixed = self.emit(torch.ops.aten.detach.default, x)
            self._observe(plan, self.emit(torch.ops.spt.stats_ffn_v1.default, fixed, plan.samples, probe), None)
        return y if value.dim() == 2 else self.emit(torch.ops.aten.view_as.default, y, c.x)

    def _correction(self, plan: Plan, x: fx.Node, dtype: torch.dtype, offsets: fx.Node) -> fx.Node:
        """The low-rank linear estimate of what the dropped blocks would have added beyond their means: [N, E]."""
        down, shift, up = (
            self._cast_state(self.state(plan, f"correction_{part}"), dtype) for part in ("in", "shift", "out")
        )
        gate = self.state(plan, "correction_gate")
        if plan.minimum > 0:  # few tokens: the op keeps every block
            gate = self.emit(torch.mul, gate, self.emit(torch.ge, self.emit(torch.narrow, offsets, 0, 0, 1), 0))
        features = self.emit(torch.nn.functional.linear, x, down, shift)
        features = self.emit(torch.mul, features, self._cast_state(gate, dtype))
        return self.emit(torch.nn.functional.linear, features, up)

    def _cast_state(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if dtype == torch.float32 else self.emit(torch.ops.aten.to.dtype, node, dtype)

    def _rows(self, weight: Weight) -> fx.Node:
        if weight.rows == slice(None):
            return weight.node
        return self.emit(operator.getitem, weight.node, weight.rows)

    def _zeros(self, c: FFNCapture, index: int) -> fx.Node:
        return self.emit(torch.zeros, (c.width,), dtype=value_of(c.w_in[index].node).dtype, device=value_of(c.x).device)

    def _float(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if dtype == torch.float32 else self.emit(torch.ops.aten.to.dtype, node, torch.float32)

    def _lora(self, c: FFNCapture, x: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """Branches of the in-projections: (scaled outputs of A, rows of B), rank 0 where a projection has none.

        Several branches of one projection are one of the sum of their ranks. Adapters of another type than the model's
        (PEFT keeps them in fp32) act in the model's, as its projections do.
        """
        if not any(c.lora):
            return [], []
        outputs, weights = [], []
        dtype, device = value_of(c.x).dtype, value_of(c.x).device
        for w, branches in zip(c.w_in, c.lora, strict=True):
            if not branches:
                outputs.append(self.emit(torch.narrow, x, 1, 0, 0))
                weights.append(self.emit(torch.zeros, (c.width, 0), dtype=dtype, device=device))
                continue
            low = []
            for branch in branches:
                a_out = self.emit(torch.reshape, branch.a_out, (-1, value_of(branch.a_out).shape[-1]))
                low.append(a_out if branch.scaling == 1.0 else self.emit(torch.mul, a_out, branch.scaling))
            rows = [self._rows(branch.rows_of(branch.b, w)) for branch in branches]
            for found, parts in ((outputs, low), (weights, rows)):
                joined = parts[0] if len(parts) == 1 else self.emit(torch.cat, parts, 1)
                found.append(self.emit(torch.ops.aten.to.dtype, joined, dtype))
        return outputs, weights

    def _lora_biases(self, c: FFNCapture, b_in: list[fx.Node]) -> list[fx.Node]:
        """The biases of the in-projections with those of their branches added."""
        if not any(branch.bias is not None for branches in c.lora for branch in branches):
            return b_in
        biases = list(b_in) or [self._zeros(c, i) for i in range(len(c.w_in))]
        for i, (w, branches) in enumerate(zip(c.w_in, c.lora, strict=True)):
            for branch in branches:
                if branch.bias is not None:
                    term = self.emit(torch.mul, self._rows(branch.rows_of(branch.bias, w)), branch.scaling)
                    total = self.emit(torch.add, biases[i], term)
                    biases[i] = self.emit(torch.ops.aten.to.dtype, total, value_of(c.w_in[i].node).dtype)
        return biases

    def _lora_down(self, c: FFNCapture) -> tuple[fx.Node | None, float]:
        """(A of the out-projection's branches, one below the other, and the dropout before it)."""
        if not c.lora_out:
            return None, 0.0
        parts = [branch.a for branch in c.lora_out]
        joined = parts[0] if len(parts) == 1 else self.emit(torch.cat, parts, 0)
        return self.emit(torch.ops.aten.to.dtype, joined, value_of(c.x).dtype), c.lora_out[0].dropout_p

    def _lora_up(self, c: FFNCapture, y: fx.Node, low: fx.Node) -> fx.Node:
        """y + the out-projection's branches, given what their A computed, in the types in which the model adds them."""
        start = 0
        for branch in c.lora_out:
            rank = value_of(branch.a).shape[0]
            part = low if len(c.lora_out) == 1 else self.emit(torch.narrow, low, 1, start, rank)
            start += rank
            part = self.emit(torch.ops.aten.to.dtype, part, value_of(branch.a_out).dtype)
            up = self.emit(torch.nn.functional.linear, part, branch.b, branch.bias)
            y = self.emit(torch.add, y, up if branch.scaling == 1.0 else self.emit(torch.mul, up, branch.scaling))
        return y
