"""A second process starts warm: nothing the backend puts into a graph bypasses torch's caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRAIN = """
import json, sys, torch
from torch._dynamo.utils import counters
from tests.blocks import Stack
import spt_compiler

torch.manual_seed(0)
model = Stack(1, dropout=0.1)
options = {"attention.min_keys": 0, "ffn.min_width": 0, "strict": True, **json.loads(sys.argv[1])}
run = torch.compile(model, backend="spt", options=options)
for _ in range(2):
    run(torch.randn(2, 100, 48)).square().mean().backward()
print(json.dumps({**counters["aot_autograd"], **counters["inductor"]}))
"""


def train(cache: Path, options: dict) -> dict[str, int]:
    """Counters of torch after training steps in a process of its own."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN, json.dumps(options)]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"attention.compensation": True}, {"preset": "paper"}], ids=["tile", "paper"])
def test_a_second_process_compiles_nothing(tmp_path, options):
    first, second = train(tmp_path, options), train(tmp_path, options)
    assert first["autograd_cache_miss"] >= 1 and first["autograd_cache_miss"] == first["autograd_cache_saved"]
    assert second["autograd_cache_hit"] == first["autograd_cache_miss"] and second["fxgraph_cache_hit"] >= 1
    for counts in (first, second):
        assert not any("bypass" in name for name, n in counts.items() if n), counts
    assert "autograd_cache_miss" not in second and "fxgraph_cache_miss" not in second, second
