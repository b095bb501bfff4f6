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

from spt_compiler.benchmarks.gpu import attention, common  # noqa: E402

ROOT = Path(__file__).parent.parent
# What each part must have run, and the rivals that a CPU does not offer.
RAN = {
    "correctness": ("dq", "dk", "dv", "rows", "w_in1", "w_out", "lora_down", "gates"),
    "attention": ("spt selection pq", "spt selection and attention forward and backward"),
    "ffn": ("dense forward", "spt routed forward and backward", "cuBLAS per block forward and backward"),
    "blocks": ("dense materialised", "dense flash", "spt"),
}


# What the interpreter takes longest for is in the suite already (interpreted_attention.py, interpreted_ffn.py).
@pytest.mark.parametrize("part", [pytest.param("correctness", marks=pytest.mark.slow), "attention", "ffn", "blocks"])
def test_dry_run(part, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--dry-run", "--out", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / f"{part}.json").read_text())
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
