"""The matcher: who is tried where, in what order, and the guards that every replacement needs."""

from __future__ import annotations

import blocks
import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_compiler.canonicalize import canonicalize
from spt_compiler.errors import Reject
from spt_compiler.graph import view
from spt_compiler.pattern import Candidate, Context, Pattern, describe_matches, find_matches
from spt_compiler.patterns import PATTERNS, find


def canonical(function, *inputs: Tensor, **named: Tensor):
    module = models.graph_of(function, *inputs, **named)
    canonicalize(module)
    return module


def whole(context: Context, node) -> Candidate:
    """relu(exp(x)): the simplest thing with an inside."""
    inner = node.args[0]
    if inner.target is not torch.exp:
        return Reject("{} under relu", inner.name)
    return Candidate(node, (inner, node), (inner.args[0],), "captured")


SIMPLE = Pattern("simple", "ffn", "relu(exp(x))", (F.relu,), whole)
X = torch.randn(3, 4)


def reasons(skipped) -> list[str]:
    return [str(s.reason) for s in skipped]


def test_a_match_says_what_and_where():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Identity())
            self.block.forward = lambda x: x.exp().relu()

        def forward(self, x):
            return self.block(x) * 2

    module = canonical(Model(), X)
    (match,), skipped = find_matches(Context(module), [SIMPLE])
    assert not skipped and match.pattern is SIMPLE and match.capture == "captured"
    assert match.output.target is F.relu and [n.target for n in match.nodes] == [torch.exp, F.relu]
    assert "test_pattern.py" in match.where


def test_a_refusal_is_reported_and_changes_nothing():
    module = canonical(lambda x: x.tanh().relu(), X)
    before = str(module.graph)
    matches, (skipped,) = find_matches(Context(module), [SIMPLE])
    assert not matches and str(skipped.reason) == "tanh under relu" and skipped.kind == "ffn"
    assert str(module.graph) == before


def test_the_first_pattern_wins_and_one_candidate_is_reported_once():
    module = canonical(lambda x: x.exp().relu() + x.tanh().relu(), X)
    other = Pattern("other", "ffn", "", (F.relu,), lambda c, n: Reject("never"))
    matches, skipped = find_matches(Context(module), [other, SIMPLE])
    assert [m.pattern.name for m in matches] == ["simple"] and reasons(skipped) == ["never"]
    later = Pattern("later", "ffn", "", (F.relu,), whole)
    matches, _ = find_matches(Context(module), [SIMPLE, later])
    assert [m.pattern.name for m in matches] == ["simple"]


def test_guards_run_in_order_and_only_on_candidates():
    seen = []

    def guard(name, result):
        def check(context, candidate):
            seen.append(name)
            return result

        return check

    pattern = Pattern(
        "guarded", "ffn", "", (F.relu,), whole, (guard("a", None), guard("b", Reject("b")), guard("c", None))
    )
    module = canonical(lambda x: x.exp().relu() + x.tanh().relu(), X)
    _, skipped = find_matches(Context(module), [pattern])
    assert seen == ["a", "b"] and reasons(skipped) == ["b", "tanh under relu"]


def test_anchors_by_name():
    pattern = Pattern("named", "ffn", "", ("*rel*",), whole)
    module = canonical(lambda x: x.exp().relu(), X)
    assert len(find_matches(Context(module), [pattern])[0]) == 1


def test_no_node_belongs_to_two_sites():
    """relu(exp(x)) shares its exp with another relu: the one that comes first has it, if anybody may."""

    def shared(context, node):
        return Candidate(node, (node.args[0], node), (), "")

    pattern = Pattern("greedy", "ffn", "", (F.relu,), shared)
    module = canonical(lambda x: (lambda y: y.relu() * F.relu(y))(x.exp()), X)
    context = Context(module)
    first = next(n for n in module.graph.nodes if n.target is F.relu)
    context.taken[first.args[0]] = SIMPLE
    matches, skipped = find_matches(context, [pattern])
    assert not matches and all("already belongs to another site" in r for r in reasons(skipped))


def test_facts_are_derived_once():
    context, calls = Context(canonical(lambda x: x + 1, X)), []

    def fact(c):
        calls.append(c)
        return len(calls)

    assert context.fact(fact) == context.fact(fact) == 1 and calls == [context]


# ---------------------------------------------------------------------------------------------------------------------
# Guards of every pattern: each has a graph that must not match
# ---------------------------------------------------------------------------------------------------------------------


def returned(x):
    y = x.exp()
    return y.relu(), y


def read_again(x):
    y = x.exp()
    return y.relu() * y.sum()


def other_grad_mode(x):
    with torch.no_grad():
        y = x.exp()
    return y.relu()


def step_under_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x.exp()
    return y.relu()


def product_under_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.T
    return y.relu()


def written_inside(x):
    y = x.exp()
    y[0] = 1.0
    return y.relu()


def written_input(x):
    z = x * 2
    y = z.exp()
    z[0] = 1.0
    return y.relu() + z


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (returned, "also returned"),
        (read_again, "is also used by"),
        (other_grad_mode, "another grad or autocast mode"),
        (written_inside, "also used by setitem"),
        (written_input, "written to in place"),
    ],
)
def test_near_misses(function, reason):
    module = canonical(function, X)
    before = str(module.graph)
    matches, skipped = find_matches(Context(module), [SIMPLE])
    assert not matches and len(skipped) == 1 and reason in str(skipped[0].reason)
    assert str(module.graph) == before


def test_autocast_matters_to_products_alone():
    """What it does to the type of any other step, the graph says."""

    def pair(context, node):
        return Candidate(node, (node.args[0], node), (node.args[0].args[0],), "captured")

    above = Pattern("above", "ffn", "relu(f(x))", (F.relu,), pair)
    matches, skipped = find_matches(Context(canonical(step_under_autocast, X)), [above])
    assert len(matches) == 1 and not skipped
    matches, skipped = find_matches(Context(canonical(product_under_autocast, X)), [above])
    assert not matches and ["another grad or autocast mode" in r for r in reasons(skipped)] == [True]


@pytest.mark.parametrize("function", [returned, read_again, other_grad_mode, written_input])
def test_the_same_without_the_flaw_matches(function):
    module = canonical(lambda x: function.__globals__["X"].shape[0] * x.exp().relu(), X)
    assert len(find_matches(Context(module), [SIMPLE])[0]) == 1


def test_writes_elsewhere_do_not_matter():
    def function(x):
        z = x * 2
        z[0] = 1.0
        y = z.exp().relu()
        other = x * 3
        other[0] = 2.0
        return y + other

    assert len(find_matches(Context(canonical(function, X)), [SIMPLE])[0]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The patterns as a whole
# ---------------------------------------------------------------------------------------------------------------------


def test_patterns_are_declared_completely():
    assert len({p.name for p in PATTERNS}) == len(PATTERNS)
    for pattern in PATTERNS:
        assert pattern.kind in ("attention", "ffn") and pattern.equation and pattern.anchors and pattern.capture


def test_a_dump_names_every_site():
    module = canonical(models.build("bert", "eager", layers=1), **models.inputs("bert"))
    matches, skipped = find(module)
    text = describe_matches(matches, skipped)
    assert text.count("replaces") == 2 and "encoder.layer.0.attention.self" in text and "act='gelu(x0)'" in text


def test_sites_are_convex():
    """What a match takes is closed: no path leaves it and returns. (It follows from the guards; here it is looked at.)"""
    from spt_compiler.graph import is_convex

    module = canonical(models.build("llama", "eager", layers=1), **models.inputs("llama"))
    graph = view(module)
    matches, _ = find(module)
    assert len(matches) == 2
    for match in matches:
        assert is_convex(graph, match.nodes)
        assert {u for n in match.nodes if n is not match.output for u in n.users} <= set(match.nodes)


def test_work_grows_with_the_graph_and_not_faster():
    """Twice the layers, about twice the steps of the matcher (counted, not timed)."""
    import sys

    steps = []
    for layers in (2, 4, 8):
        module = canonical(blocks.Stack(layers), torch.randn(2, 8, 48))
        count = 0

        def count_lines(frame, event, arg):
            nonlocal count
            count += 1
            return None  # calls only, no lines

        sys.setprofile(count_lines)
        try:
            find(module)
        finally:
            sys.setprofile(None)
        steps.append(count)
    first, second = steps[1] - steps[0], (steps[2] - steps[1]) / 2
    assert second < 1.3 * first, steps
