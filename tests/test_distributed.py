"""Two processes on one machine: replicas stay equal, in weights and in learned state, though they see different data."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from spt_compiler.state import COUNTERS

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
    options = {**SPARSE, "inner": "eager", "guard.interval": 3, "attention.max_rel_error": 1e-6}
    if how == "adapters":
        import peft
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv", "fc1", "fc2"], lora_dropout=0.1))
    if how not in ("whole model", "adapters"):
        spt_compiler.compile(model, **{k.replace(".", "__"): v for k, v in options.items()})
        run = torch.nn.parallel.DistributedDataParallel(model)
    else:
        run = torch.nn.parallel.DistributedDataParallel(model)
        run.compile(backend="spt", options=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(2, 100, 48, generator=generator)
        if how == "uneven" and rank == 0 and step == 0:
            x *= float("nan")  # only the other rank has anything to learn from
        loss = run(x).nan_to_num(0.0, 0.0, 0.0).square().mean()
        loss.backward()
        if how == "uneven" and step == 0:
            optimizer.zero_grad()
        optimizer.step()
        if how == "uneven" and rank == 1 and step == 1:
            with torch.no_grad():  # one rank alone evaluates
                run(x)
    torch.save({"model": model.state_dict(), "state": spt_compiler.state_dict(model)}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["per block", "whole model", "uneven", "adapters"])
def test_ranks_stay_equal(tmp_path, how):
    if how == "adapters":
        pytest.importorskip("peft")
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
    assert first["state"].keys() == second["state"].keys()
    local = (".sample", ".cursor", ".quality")
    compared = 0
    for name, value in first["state"].items():
        if name.endswith(".counters"):
            ours, theirs = value.clone(), second["state"][name].clone()
            for own in ("skipped_rows", "rows_read"):
                ours[COUNTERS[own]] = theirs[COUNTERS[own]] = 0
            assert torch.equal(ours, theirs), name
            assert ours[COUNTERS["initialised"]] == 1 and ours[COUNTERS["updates"]] >= 2
            # The guard saw the same sums on both, and acted alike.
            assert ours[COUNTERS["densified"]] == (1 if "/attention/" in name else 0)
        elif not name.endswith(local):
            assert torch.equal(value, second["state"][name]), name
            compared += 1
    assert compared == 44
    codes = "blocks.0.qkv/attention/0.sample"
    assert not torch.equal(first["state"][codes], second["state"][codes])  # the ranks did see different data
    skipped = [r["state"]["blocks.0.fc1/ffn/0.counters"][COUNTERS["skipped_rows"]] > 0 for r in (first, second)]
    assert skipped == [how == "uneven", False]
