"""The GPU benchmarks run from end to end, dry: kernels interpreted, toy sizes, and no figure that looks like one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from spt_compiler.benchmarks.gpu import __main__ as entry  # noqa: E402
from spt_compiler.benchmarks.gpu import attention, blocks, common, correctness, ffn  # noqa: E402

ROOT = Path(__file__).parent.parent
# What each part must have run, and the rivals that a CPU does not offer.
RAN = {
    "correctness": ("dq", "dk", "dv", "rows", "w_in1", "w_out", "lora_down", "gates"),
    "attention": ("spt selection pq", "spt selection and attention forward and backward"),
    "ffn": ("dense forward", "spt routed forward and backward", "cuBLAS per block forward and backward"),
    "blocks": ("dense materialised", "dense flash", "spt"),
}


def dry_run(out: Path, *options: str) -> str:
    """What the benchmark printed."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# What the interpreter takes longest for is in the suite already (interpreted_attention.py, interpreted_ffn.py).
@pytest.mark.parametrize("part", [pytest.param("correctness", marks=pytest.mark.slow), "attention", "ffn", "blocks"])
def test_dry_run(part, tmp_path):
    dry_run(tmp_path, "--part", part)
    entry.merge(tmp_path, part)
    result = json.loads((tmp_path / f"{part}.json").read_text())
    assert not result["errors"] and not result["left_out"]
    assert result["dry_run"] and result["device"] == "none: not measured" and not result["fallbacks"]
    ran = {row["what"] for row in result["rows"] if "skipped" not in row}
    assert set(RAN[part]) <= ran
    for row in result["rows"]:
        assert row.get("passed", True) and row.get("repeatable", True)
        assert not {"ms", "tflops", "gbytes_per_s", "speedup", "holds"} & row.keys()


def test_without_a_gpu_nothing_is_measured(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", "ffn", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "no GPU" in done.stderr and not list(tmp_path.iterdir())


def test_a_run_goes_on_where_it_stopped_and_keeps_to_its_budget(tmp_path):
    left_out = dry_run(tmp_path, "--only", "ffn", "--case", "full", "--budget", "0")
    assert "toy gated full: left out" in left_out and "spt routed" not in left_out
    assert not (tmp_path / "ffn.json").exists()
    first = dry_run(tmp_path, "--only", "ffn", "--case", "full", "--budget", "500")
    assert "spt routed" in first and "frozen" not in first
    again = dry_run(tmp_path, "--only", "ffn", "--case", "full", "--budget", "0")
    assert "toy gated full: measured before" in again and "spt routed" not in again
    file = tmp_path / "ffn" / "toy_gated_full.json"
    case = json.loads(file.read_text())
    file.write_text(json.dumps({**case, "facts": {**case["facts"], "sources": "older"}}))
    assert "left out" in dry_run(tmp_path, "--only", "ffn", "--case", "full", "--budget", "0")
    assert entry.read(file)["rows"] == case["rows"]  # an old result is not lost


def test_every_case_has_a_name_and_a_file_of_its_own_and_targets_come_first():
    for part in (correctness, attention, ffn, blocks):
        for dry in (False, True):
            cases = part.cases(dry)
            assert len({case.slug for case in cases}) == len(cases)
            assert any(case.goal for case in cases)
    assert {case.name for case in attention.cases(False) if case.goal} == {"2 x 8192", "1 x 16384", "1 x 65536"}
    assert [case.name for case in blocks.cases(False) if case.goal] == [
        "opt-2048 16x512 LoRA", "Llama-3-8B 4x4096 LoRA", "Llama-3-8B 1x16384 LoRA", "Llama-3-8B 1x65536 LoRA"
    ]  # fmt: skip


def case_file(folder: Path, name: str, facts: dict, **changes) -> None:
    row = {"part": "ffn", "case": name, "what": "spt", "ms": 2.0, "ms_low": 1.5, "ms_high": 3.0}
    kernel = {"part": "profile", "case": name, "what": "kernel rows_kernel", "ms": 1.0, "tflops": 300.0, "gbytes_per_s": 1000.0}
    content = {"case": name, "created": "2030", "seconds": 1.0, "facts": facts, "error": None, "fallbacks": {}}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**content, "rows": [row, kernel], **changes}))


def test_cases_of_one_device_and_version_become_one_report_with_plots(tmp_path):
    facts = {"device": "H100", "peak_tflops": 1000.0, "peak_tbytes_per_s": 4.0, "sources": "new"}
    case_file(tmp_path / "ffn", "a", facts)
    case_file(tmp_path / "ffn", "b", facts, error="RuntimeError: no")
    case_file(tmp_path / "ffn", "old", {**facts, "sources": "old"}, created="2029")
    case_file(tmp_path / "ffn", "c", facts, left_out=True)
    entry.merge(tmp_path, "ffn")
    result = json.loads((tmp_path / "ffn.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["a", "a", "b", "b"]
    assert result["left_out"] == ["c", "old"] and result["errors"] == {"b": "RuntimeError: no"}
    assert (tmp_path / "ffn.png").stat().st_size > 0 and (tmp_path / "ffn_roofline.png").stat().st_size > 0


def test_kernels_are_judged_by_the_roofline():
    rows = [
        {"case": "x", "what": "kernel slow_kernel", "tflops": 200.0, "gbytes_per_s": 4000.0},  # 50 operations per byte
        {"case": "x", "what": "kernel fast_kernel", "tflops": 500.0, "gbytes_per_s": 500.0},
        {"case": "x", "what": "spt", "tflops": 500.0},
    ]
    assert common.roofline(rows, 1000.0, 4.0) == [("slow, x", 50.0, 200.0, 1.0), ("fast, x", 1000.0, 500.0, 0.5)]
    assert common.roofline(rows, None, None) == []


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, 0),
        ({"error": "x"}, 1),
        ({"fallbacks": {"op": "x"}}, 1),
        ({"rows": [{"passed": False}, {"repeatable": False}, {"passed": True, "repeatable": True}]}, 2),
    ],
)
def test_what_counts_as_a_failure(change, wrong):
    assert len(entry.failed({"error": None, "fallbacks": {}, "rows": [], **change})) == wrong


def test_a_target_is_judged_by_what_was_measured():
    bench = common.Bench(dry=False, log=lambda text: None)
    for value in (1.6, 1.4, None):
        bench.target("T1", "case", value, 1.5)
    assert [row["holds"] for row in bench.rows] == [True, False, None]


def test_pairs_are_counted_as_a_mask_would():
    torch.manual_seed(0)
    length, n_q, n_k = 150, 3, 10
    tiles = torch.full((1, 2, n_q, 4), -1, dtype=torch.int32)
    counts = torch.tensor([[[1, 3, 4], [1, 2, 3]]], dtype=torch.int32)
    kept = torch.zeros(2, length, length, dtype=torch.bool)
    for h in range(2):
        for i in range(n_q):
            chosen = torch.randperm(n_k)[: counts[0, h, i]].sort().values
            tiles[0, h, i, : len(chosen)] = chosen.int()
            for tile in chosen.tolist():
                kept[h, i * 64 : (i + 1) * 64, tile * 16 : (tile + 1) * 16] = True
    assert attention.kept_pairs(tiles, counts, length) == float(kept.tril().sum())
