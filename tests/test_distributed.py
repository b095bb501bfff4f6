"""Several processes: replicas stay equal, in weights and learned state; shards find theirs; what DDP cuts is reported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import spt_compiler
from spt_compiler.state import COUNTERS
from tests.blocks import SPARSE, Stack

# What every rank runs before and after its own part, which leaves what is to be looked at in `found`.
BEFORE = textwrap.dedent(
    """
    import sys, torch, torch.distributed as dist
    import spt_compiler
    from tests.blocks import SPARSE, Stack

    rank, folder, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Stack(2)
    """
)
AFTER = textwrap.dedent(
    """
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    """
)


def run_ranks(folder: Path, part: str, how: str) -> list[dict]:
    """What each of two processes found."""
    script = folder / "worker.py"
    script.write_text(BEFORE + textwrap.dedent(part) + AFTER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), folder, how], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=240)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# ---- replicas -----------------------------------------------------------------------------------------------------

REPLICAS = """
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
    found = {"model": model.state_dict(), "state": spt_compiler.state_dict(model)}
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["per block", "whole model", "uneven", "adapters"])
def test_ranks_stay_equal(tmp_path, how):
    if how == "adapters":
        pytest.importorskip("peft")
    first, second = run_ranks(tmp_path, REPLICAS, how)
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


def test_an_ffn_that_ddp_splits_is_reported(tmp_path, monkeypatch):
    """With small buckets the splitter of torch cuts between the activation and the second projection."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 10_000)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = Stack(1)
        run = nn.parallel.DistributedDataParallel(model)
        run.bucket_bytes_cap = 20_000
        run.compile(backend="spt", options={**SPARSE, "strict": False})
        with pytest.warns(UserWarning, match="ffn stays dense: DDP's graph splitter"):
            run(torch.randn(2, 100, 48)).sum().backward()
        assert [n.split("/")[1] for n in spt_compiler.metrics(model)] == ["attention"]
    finally:
        dist.destroy_process_group()


# ---- shards -------------------------------------------------------------------------------------------------------

SHARDED = """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh

    if how == "adapters":
        import peft
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv", "fc1", "fc2"], lora_dropout=0.1), model)
        model.train()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    spt_compiler.compile(model, **{**SPARSE, "inner": "eager"})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(torch.randn(2, 100, 48, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {"losses": losses, "metrics": spt_compiler.metrics(model)}
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "adapters"])
def test_sharded_parameters_find_their_state(tmp_path, how):
    if how == "adapters":
        pytest.importorskip("peft")
    first, second = run_ranks(tmp_path, SHARDED, how)
    for found in (first, second):
        assert len(found["metrics"]) == 4
        assert all(f["initialised"] and f["steps"] == 4 for f in found["metrics"].values()), found["metrics"]
        assert found["losses"][-1] < found["losses"][0]


def test_state_loaded_before_fsdp_first_gathers_is_applied(tmp_path):
    """Shards are all there is then; the full parameters, on which state hangs, appear with the first forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh, x, models = init_device_mesh("cpu", (1,)), torch.randn(2, 100, 48), []
        for _ in range(2):
            torch.manual_seed(0)
            model = Stack(2)
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            models.append(spt_compiler.compile(model, **SPARSE))
        trained, resumed = models
        for _ in range(3):
            trained(x).square().mean().backward()
        saved = spt_compiler.state_dict(trained)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert spt_compiler.load_state_dict(resumed, saved) == []
        with torch.no_grad():
            assert torch.equal(resumed(x), trained(x))
        ours, theirs = spt_compiler.state_dict(resumed), spt_compiler.state_dict(trained)
        assert ours.keys() == theirs.keys() and len({n.rpartition(".")[0] for n in ours}) == 4
        assert all(torch.equal(ours[n], theirs[n]) for n in ours), [n for n in ours if not torch.equal(ours[n], theirs[n])]
    finally:
        dist.destroy_process_group()
