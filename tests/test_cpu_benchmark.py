"""The CPU benchmark: what it takes for plain steps, for a round of learning and for looks of the guard, and what it reports."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from spt_compiler import calibrate, learning
from spt_compiler.benchmarks import cpu
from spt_compiler.state import LOOKS

BLOCK = cpu.Case("block", "block", "gpt2", 1, 1024, 1.4, heads=4, kv_heads=4, width=48, hidden=112, lift=True)
ALONE = dataclasses.replace(BLOCK, group="attention", name="alone")


class Dense:
    """A rival that takes two seconds a step."""

    steps = 0

    def step(self):
        self.steps += 1
        return 1.0, 1.0


@pytest.mark.parametrize("seconds, turns", [(0.0, 5), (60.0, 10)])
def test_turns_are_plain_steps_and_upkeep_is_where_it_is_timed(monkeypatch, seconds, turns):
    """What a real model learns and looks at, by the number of the call in which it happens."""
    options = cpu.options
    monkeypatch.setattr(cpu, "options", lambda case: {**options(case), "inner": "eager"})
    happened: dict[str, list[int]] = {"learn": [], "guard": []}
    calls = 0

    def spy(owner, name, what):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            happened[what].append(calls)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    spy(learning, "learn", "learn")
    spy(learning, "router_quality", "guard")
    spy(calibrate, "_attention_quality", "guard")
    dense, sparse = Dense(), cpu.Side(BLOCK, "spt")
    step = sparse.step

    def counted_step():
        nonlocal calls
        calls += 1
        return step()

    sparse.step = counted_step
    rows, learned, looked = cpu.steady_steps(dense, sparse, seconds)
    assert len(rows) == turns and dense.steps == turns + 3 and all(a == (1.0, 1.0) for a, _ in rows)
    first = calls - turns - len(learned) - len(looked)  # the last call of the warm-up
    upkeep = {name: [n - first for n in at if n > first] for name, at in happened.items()}
    # Attention and FFN learn in the second of the two calls, and again in the last of the interval, where rows are judged before
    # anything learns from them. Attention alone is judged in the other calls of the interval but the first, which only observes.
    one_round, last = turns + len(learned), turns + len(learned) + len(looked)
    assert upkeep["learn"] == [one_round] * 2 + [last] * 2
    assert upkeep["guard"] == [*range(one_round + 2, last)] + [last] * 2
    assert [n for n in happened["learn"] if n <= first] == [2, 2, 3, 3, 5, 5, 7, 7, 9, 9]  # after 1, 2, 4, 8 and 16 backwards


def test_upkeep_of_one_step():
    """A look costs 0.5, 0.2 of it before it is judged; a round of learning 8, 1 of it in the call before; the FFN's look 3."""
    plain = 2.0
    learned = [plain + 1, plain + 7]
    interval = [plain + 0.2, *[plain + 0.5] * (LOOKS - 1), plain + 0.3 + 3 + 8]
    looked = [plain + 0.2, plain + 0.5, plain + 0.5, interval[-1]]
    assert len(looked) == cpu.LOOKED
    learn, guard = cpu.upkeep(plain, learned, looked, 32, 64)
    assert learn == pytest.approx(8 / 32)
    assert guard == pytest.approx((sum(interval) - len(interval) * plain - 8) / 64)


def block(plain: float = 1.0) -> dict:
    """Results of a block whose dense step takes 2 s, learning 3.2 s a round, and looking nothing."""
    rows = [((1.0, 1.0), (plain / 2, plain / 2))] * 5
    found = cpu._steady(rows, [plain, plain + 3.2], [plain, plain, plain, plain + 3.2])
    return {"case": dataclasses.asdict(BLOCK), **found, "quality": {}}


def test_the_goal_is_held_against_steps_with_their_share_of_upkeep():
    found = block()
    assert found["steady_ratio"] == pytest.approx(2.0) and found["learning_share"] == pytest.approx(0.1)
    assert found["guard_share"] == pytest.approx(0.0) and found["ratio"] == pytest.approx(2 / 1.1)
    (goal,) = cpu.goals({"cases": {"block": found}})
    assert goal["measured"] == found["ratio"] and goal["met"] and "learning" in goal["goal"]
    assert not cpu.goals({"cases": {"block": block(1.4)}})[0]["met"]  # 1.43 without learning, 1.33 with it


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A file with a block measured in the older way and another case, and a run whose measurements are listed."""
    old = {"ratio": 9.0, "ratio_quartiles": [9.0, 9.0], "whole_ratio": 9.0, "slowest": 1.0, "quality": {}}
    old |= {v: {"step": 1.0} for v in ("dense", "spt")}
    path = tmp_path / "cpu.json"
    entries = {c.name: {"case": dataclasses.asdict(c), **old} for c in (BLOCK, ALONE)}
    path.write_text(json.dumps({"cases": entries, "conditions": cpu.conditions()}))
    measured = []

    def spawn(what, case, **_):
        measured.append(case.name)
        return block()

    monkeypatch.setattr(cpu, "spawn", spawn)
    monkeypatch.setattr(cpu, "cases", lambda quick: [BLOCK, ALONE])
    monkeypatch.setattr(cpu, "_memory_cases", lambda quick: [])
    return path, measured


def arguments(path, **more):
    unset = dict.fromkeys(("only", "match", "dtype", "threads", "seconds", "report", "plot"))
    return argparse.Namespace(**(unset | {"quick": True, "no_run": False, "resume": False, "out": str(path)} | more))


def test_results_of_another_way_are_measured_anew_and_not_shown(results):
    path, measured = results
    report = json.loads(path.read_text())
    assert list(cpu.shown(report)) == ["alone"] and not [g for g in cpu.goals(report) if g["goal"].startswith("block")]
    assert "| block |" not in cpu.tables(report)["times"] and "| alone |" in cpu.tables(report)["times"]
    cpu.run(arguments(path, resume=True))
    assert measured == ["block"]
    report = json.loads(path.read_text())
    assert list(cpu.shown(report)) == ["block", "alone"] and report["cases"]["alone"]["ratio"] == 9.0
    row = next(line for line in cpu.tables(report)["times"].splitlines() if line.startswith("| block |"))
    assert "**2.00x**" in row and "1.82x (learning 10.0%, guard 0.0%)" in row
    cpu.run(arguments(path, resume=True))
    assert measured == ["block"]


def test_blocks_alone(results):
    path, measured = results
    cpu.run(arguments(path, only=["block"]))
    assert measured == ["block"]
    assert cpu.shown(json.loads(path.read_text())).keys() == {"block", "alone"}


@pytest.mark.parametrize("dtype, names", [("float32", ["block", "alone"]), ("bfloat16", ["half"])])
def test_one_type_alone(results, monkeypatch, dtype, names):
    path, measured = results
    half = dataclasses.replace(BLOCK, name="half", dtype="bfloat16")
    monkeypatch.setattr(cpu, "cases", lambda quick: [BLOCK, half, ALONE])
    cpu.run(arguments(path, only=["block", "attention"], dtype=dtype))
    assert measured == names


def test_blocks_and_ffns_with_a_goal_are_steady_and_nothing_else_is():
    steady = {(c.group in ("block", "ffn"), c.method) for c in cpu.cases(False)}
    assert steady == {(True, cpu.STEADY), (False, None)}
