"""What the read-only view says about a graph: origins, memory, modes, argument positions, convexity."""

from __future__ import annotations

import operator

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_compiler import graph
from spt_compiler.canonicalize import canonicalize
from spt_compiler.graph import Analysis, Arguments


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))
        self.names = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.names[0](self.linear(x) + self.shift)


def named(module, target) -> list:
    return [n for n in module.graph.nodes if n.target is target]


def test_origin_of_a_node():
    module = models.graph_of(Small(), torch.randn(2, 4))
    first, second = named(module, F.linear)
    assert graph.module_path(first) == "linear" and graph.module_path(second) == "names.0"
    assert graph.common_path([first, second]) == ""
    file, _, line = graph.where(first).rpartition(":")
    assert file.endswith(".py") and int(line) > 0


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("L['self'].encoder.layer[0].attention", "encoder.layer.0.attention"),
        ("L['self']._modules['h']._modules['3']._modules['mlp']", "h.3.mlp"),
        ("L['fn']._orig_mod.layers.1", "layers.1"),
        ("L['self'].__dict__['base_model'].layers[2]", "base_model.layers.2"),
        ("L['self']", ""),
    ],
)
def test_paths_are_those_of_the_model(raw, path):
    assert graph._clean_path(raw) == path


def test_parameters_and_what_depends_on_them():
    class Model(Small):
        def forward(self, x):
            scale = F.softplus(self.linear.weight).mean() + torch.ones(())
            return x @ self.linear.weight.T.to(torch.float32) * scale + self.shift

    module = models.graph_of(Model(), torch.randn(2, 4))
    analysis = Analysis(module)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    assert [graph.is_parameter(n) for n in placeholders].count(True) == 1
    derived = {n.name for n in analysis.from_parameters}
    assert {"softplus", "mean", "scale"} <= derived
    assert not any(n in analysis.from_parameters for n in named(module, torch.matmul) + named(module, operator.matmul))


def test_arguments_by_name():
    module = models.graph_of(lambda x: F.dropout(x, training=False, p=0.25), torch.randn(3))
    (node,) = named(module, F.dropout)
    found = Arguments(node, "input", ("p", 0.5), ("training", True), ("inplace", False))
    assert found.valid and found.take("p", "training") == (0.25, False) and found["input"].op == "placeholder"
    assert not Arguments(node, "input").valid


def test_sizes_are_compared_without_guards():
    seen = {}

    def backend(module, _):
        (x,) = (n for n in module.graph.nodes if n.op == "placeholder" and graph.is_tensor(n))
        a, b = graph.shape(x)
        environment = a.node.shape_env
        before = len(environment.guards)
        seen["same"] = [graph.same_size(a, a), graph.same_size(a, b), graph.same_size(a, 4), graph.same_size(4, 4)]
        seen["shape"] = (
            graph.same_shape((a, b), (a, b)),
            graph.same_shape((a, b), (b, a)),
            graph.same_shape((a,), (a, b)),
        )
        seen["guards"] = len(environment.guards) - before
        return module.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.randn(3, 4))
    assert seen == {"same": [True, False, False, True], "shape": (True, False, False), "guards": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def writes(x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    y.mul_(2)
    y[0] = 3.0
    F.relu(y, inplace=True)
    torch.add(x, 1, out=y)
    y.view(-1).zero_()
    return y


def test_every_kind_of_write_is_seen():
    module = models.graph_of(writes, torch.randn(2, 2))
    written = [n for n in module.graph.nodes if graph.mutated_arguments(n)]
    assert len(written) == 6
    assert {graph.storage(a) for n in written for a in graph.mutated_arguments(n)} == {graph.storage(written[0])}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.add(1),
        lambda x: F.relu(x),
        lambda x: F.dropout(x, 0.5, True),
        lambda x: torch.ops.aten.mul.Tensor(x, 2.0),
        lambda x: x.__add__(1),
    ],
)
def test_pure_calls_write_nothing(function):
    module = models.graph_of(function, torch.randn(2, 2))
    assert not any(graph.mutated_arguments(n) for n in module.graph.nodes)


def test_overloads_are_read_from_their_schema():
    module = models.graph_of(lambda x: torch.ops.aten.mul_.Tensor(x * 1.0, 2.0), torch.randn(2, 2))
    (node,) = (n for n in module.graph.nodes if graph.mutated_arguments(n))
    assert graph.mutated_arguments(node) == (node.args[0],)


def test_a_write_between_two_positions():
    def function(x):
        y = x * 2
        a = y.view(-1) + 1
        y.add_(1)
        return a, y * 2

    module = models.graph_of(function, torch.randn(2, 2))
    analysis = Analysis(module)
    (view,) = (n for n in module.graph.nodes if n.target == "view")
    (write,) = (n for n in module.graph.nodes if graph.mutated_arguments(n))
    at = analysis.order[write]
    assert analysis.written_between([view], 0, len(analysis.nodes)) is view
    assert analysis.written_between([view], 0, at) is None and analysis.written_between([view], at, at + 9) is None
    (other,) = (n for n in module.graph.nodes if n.op == "placeholder")
    assert analysis.written_between([other], 0, len(analysis.nodes)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------------------------------


def test_regions_tell_modes_apart():
    def function(x):
        a = x + 1
        with torch.no_grad():
            b = x + 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            c = x + 3
        with torch.autocast("cpu", enabled=False):
            d = x + 4
        return a + b + c + d

    module = models.graph_of(function, torch.randn(2, 2))
    regions = Analysis(module).regions
    a, b, c, d = (next(n for n in named(module, operator.add) if n.args[1] == i) for i in (1, 2, 3, 4))
    assert regions[a] != regions[b] and regions[a] != regions[c]
    # Autocast switched off where it is off anyway changes nothing.
    assert regions[a] == regions[d]
    assert regions[b][0] is False and regions[a][0] is True


# ---------------------------------------------------------------------------------------------------------------------
# networkx
# ---------------------------------------------------------------------------------------------------------------------


def test_edges_carry_argument_positions():
    module = models.graph_of(lambda x, y: torch.cat([x, torch.sub(y, x, alpha=2)], dim=0), torch.ones(2), torch.ones(2))
    view = graph.view(module)
    (cat,), (sub,) = named(module, torch.cat), named(module, torch.sub)
    y, x = sub.args
    assert {d["position"] for *_, d in view.in_edges(sub, data=True)} == {0, 1}
    assert view.get_edge_data(x, sub)[0]["position"] == 1 and view.get_edge_data(y, sub)[0]["position"] == 0
    assert {d["position"] for *_, d in view.in_edges(cat, data=True)} == {(0, 0), (0, 1)}
    assert view.nodes[cat]["target"] == "cat" and view.nodes[cat]["shape"] == (4,)
    source = graph.to_dot(view, [[cat]])
    assert source.startswith("digraph") and "lightblue" in source and source.count("->") == view.number_of_edges()


def test_convexity():
    def function(x):
        a = x + 1
        b = a.exp()
        c = b.sin()
        return c + a

    module = models.graph_of(function, torch.ones(2))
    view = graph.view(module)
    a, b, c, d = (n for n in module.graph.nodes if n.op in ("call_function", "call_method"))
    assert graph.is_convex(view, [a, b, c, d]) and graph.is_convex(view, [b, c]) and graph.is_convex(view, [a])
    assert not graph.is_convex(view, [a, c]) and not graph.is_convex(view, [a, d])


@pytest.mark.parametrize(
    ("function", "bounded"),
    [
        (lambda p: F.pad(p, (0, 20000)), True),
        (lambda p: p.expand(20000, 4), True),
        (lambda p: F.pad(p, (0, 1), value=-1e9), False),
        (lambda p: F.pad(p, (0, 1), "constant", -1e9), False),
        (lambda p: p * 20000, False),
    ],
)
def test_sizes_say_nothing_about_the_size_of_values(function, bounded):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 4))

        def forward(self, x):
            return x + function(self.weight).sum()

    module = models.graph_of(Model(), torch.randn(2, 4))
    canonicalize(module)
    (reduced,) = (n for n in module.graph.nodes if n.target == "sum")
    assert graph.is_bounded(reduced.args[0]) is bounded
