"""Two processes on one machine: replicas stay equal, in weights and in learned state, though they see different data."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

WORKER = textwrap.dedent(
    """
    import sys, torch, torch.distributed as dist
    import spt_compiler
    from tests.blocks import SPARSE, Stack

    rank, folder, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Stack(2)
    options = {**SPARSE, "inner": "eager"}
    if how == "per block":
        spt_compiler.compile(model, **{k.replace(".", "__"): v for k, v in options.items()})
        run = torch.nn.parallel.DistributedDataParallel(model)
    else:
        run = torch.nn.parallel.DistributedDataParallel(model)
        run.compile(backend="spt", options=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        run(torch.randn(2, 100, 48, generator=generator)).square().mean().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "state": spt_compiler.state_dict(model)}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["per block", "whole model"])
def test_ranks_stay_equal(tmp_path, how):
    root = os.path.dirname(os.path.dirname(__file__))
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path, how], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=180)
        assert worker.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(v, second["model"][k]) for k, v in first["model"].items())
    shared = [
        k
        for k in first["state"]
        if k.endswith((".codebook", ".router_weight", ".permutation", ".compensation", ".always_on"))
    ]
    assert len(shared) == 10 and first["state"].keys() == second["state"].keys()
    for name in shared:
        assert torch.equal(first["state"][name], second["state"][name]), name
    codes = "blocks.0.qkv/attention/0.sample"
    assert not torch.equal(first["state"][codes], second["state"][codes])  # the ranks did see different data
