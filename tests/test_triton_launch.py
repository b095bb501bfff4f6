"""Launching generated kernels, without a GPU: settings and their cache, what a device cannot run, damaged caches."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import types
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spt_compiler.errors import KernelError
from spt_compiler.lowering import registry, render, triton_common, triton_selection, triton_tuning
from spt_compiler.lowering.triton_tuning import Setting
from spt_compiler.ops.commitment import commitment_loss, commitment_loss_backward
from spt_compiler.ops.observe import observe
from spt_compiler.rewrite import ROUTE_TILE
from tests.blocks import SPARSE, Block

pytest.importorskip("triton")

CPU = torch.device("cpu")
SETTINGS = (Setting(4, 2), Setting(8, 2), Setting(4, 1, (("BLOCK_N", 32),)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path / "cache"))
    render._usable_folder.cache_clear()
    triton_tuning.forget()
    yield
    render._usable_folder.cache_clear()
    triton_tuning.forget()


# ---- settings -----------------------------------------------------------------------------------------------------


def choose(key="some kernel", times=(3.0, 1.0, 2.0)):
    """(the setting chosen, how many were measured)."""
    measured = []

    def measure(setting):
        measured.append(setting)
        time = times[SETTINGS.index(setting)]
        if time is None:
            raise RuntimeError("out of resource: shared memory")
        return time

    return triton_tuning.choose(CPU, key, SETTINGS, measure), len(measured)


def tuning_file() -> Path:
    (found,) = render.cache_folder().glob("tuning_*.json")
    return found


def test_without_the_variable_the_safe_setting_serves_and_nothing_is_measured():
    assert triton_tuning.idle(CPU) and choose() == (SETTINGS[0], 0)
    assert not list(render.cache_folder().glob("tuning_*"))


def test_the_fastest_setting_is_measured_once_and_kept_for_other_processes(monkeypatch):
    monkeypatch.setenv("SPT_AUTOTUNE", "1")
    assert choose() == (SETTINGS[1], 3)
    assert choose() == (SETTINGS[1], 0)
    triton_tuning.forget()  # what another process starts with
    monkeypatch.delenv("SPT_AUTOTUNE")
    assert not triton_tuning.idle(CPU) and choose() == (SETTINGS[1], 0)
    assert choose("another kernel") == (SETTINGS[0], 0)


def test_settings_that_cannot_run_are_passed_over(monkeypatch):
    monkeypatch.setenv("SPT_AUTOTUNE", "1")
    assert choose("one", (None, None, 5.0)) == (SETTINGS[2], 3)
    assert choose("all", (None, None, None)) == (SETTINGS[0], 3)
    assert "all" not in tuning_file().read_text() and '"one": 2' in tuning_file().read_text()


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setenv("SPT_AUTOTUNE", "1")
    monkeypatch.setattr(triton_tuning, "_capturing", lambda: True)
    assert choose() == (SETTINGS[0], 0)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 99, "fastest": {"some kernel": 2}}', '{"format": 1, "fastest": [1]}', "\udcff"],
)
def test_a_corrupt_file_is_measured_and_written_anew(monkeypatch, content):
    monkeypatch.setenv("SPT_AUTOTUNE", "1")
    choose()
    tuning_file().write_bytes(content.encode("utf-8", "surrogateescape"))
    triton_tuning.forget()
    assert choose() == (SETTINGS[1], 3)
    assert json.loads(tuning_file().read_text())["fastest"] == {"some kernel": 1}


@pytest.mark.parametrize("value", [7, -1, "1; import os", 1.0, True, None, {"num_warps": 1 << 20}])
def test_a_result_that_names_no_alternative_is_ignored(monkeypatch, value):
    monkeypatch.setenv("SPT_AUTOTUNE", "1")
    choose()
    tuning_file().write_text(json.dumps({"format": 1, "fastest": {"some kernel": value}}))
    triton_tuning.forget()
    assert choose() == (SETTINGS[1], 3)


def test_a_file_that_others_can_write_is_not_read(monkeypatch):
    monkeypatch.setenv("SPT_AUTOTUNE", "1")
    choose()
    tuning_file().write_text(json.dumps({"format": 1, "fastest": {"some kernel": 2}}))
    tuning_file().chmod(0o666)
    triton_tuning.forget()
    assert choose() == (SETTINGS[1], 3)
    assert not tuning_file().stat().st_mode & 0o022


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    code = (
        "import sys, torch; from spt_compiler.lowering import triton_tuning as t\n"
        "s = (t.Setting(4), t.Setting(8)); device = torch.device('cpu')\n"
        "for i in range(8): t.choose(device, f'{sys.argv[1]} {i}', s, lambda x: x.num_warps * (-1) ** i)\n"
    )
    env = {"SPT_CACHE_DIR": str(tmp_path / "cache"), "SPT_AUTOTUNE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", code, str(n)], env=env) for n in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert json.loads(tuning_file().read_text())["fastest"] == {f"{n} {i}": i % 2 for n in range(2) for i in range(8)}


def test_results_hold_for_a_kernel_its_types_and_its_sizes():
    def key(source="file", kernel="kernel", n_k=1000, dtype=torch.float16, dim=64, settings=SETTINGS):
        args = {"q_ptr": torch.empty(1, dtype=dtype), "n_k": n_k, "q_stride_b": 7, "scale": 0.1}
        return triton_tuning.key_of(source, kernel, args, {"HEAD_DIM": dim}, settings)

    others = [key(source="other"), key(kernel="other"), key(n_k=2000), key(dtype=torch.float32), key(dim=32)]
    assert len({key(), *others, key(settings=SETTINGS[:2])}) == 7
    assert key(n_k=900) == key()  # sizes count to a power of two


# ---- what a device cannot run -------------------------------------------------------------------------------------


class Kernel:
    """Stands for a compiled kernel: runs with some numbers of warps, and counts its launches."""

    arg_names = ("x_ptr", "HEAD_DIM", "BLOCK_N")

    def __init__(self, able=(), error=None):
        self.error = error or RuntimeError("out of resource: shared memory, Required: 300000")
        self.able, self.launches = able, []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, num_warps, num_stages, enable_fp_fusion, x_ptr, HEAD_DIM, BLOCK_N):
        self.launches.append((num_warps, num_stages, BLOCK_N))
        if num_warps not in self.able:
            raise self.error


class OfAnotherDevice(torch.Tensor):
    """A tensor without storage that says it lies elsewhere."""

    device = torch.device("xpu", 1)


@pytest.fixture
def device(monkeypatch):
    """Launches kernels of the test on tensors without storage."""
    for known in ("_compiled", "_ready", "_runtime", "_failed", "_preferred"):  # by names that are ids, which come again
        monkeypatch.setattr(triton_common, known, {})

    def put(kernel):
        module = types.SimpleNamespace(__name__=f"module_{id(kernel)}", some_kernel=kernel)
        monkeypatch.setattr(render, "load", lambda *_: module)

        def launch(dim=64, grid=(1,), alternatives=SETTINGS[1:], memory=3, index=0):
            # What a kernel does not have (it shares the arguments of its op) is left out: Triton would not take it.
            x = torch.empty(memory, device="meta", dtype=torch.float16)[:3]
            x = x if index == 0 else x.as_subclass(OfAnotherDevice)
            args = {"x_ptr": x, "of_another_kernel": 1}
            constants = {"HEAD_DIM": dim, "BLOCK_N": 64}
            triton_common.launch("template", {}, "some_kernel", grid, args, constants, alternatives=alternatives)

        return launch

    return put


def test_a_device_with_too_little_for_the_first_setting_runs_another(device):
    kernel = Kernel(able=(8,))
    launch = device(kernel)
    launch()
    assert kernel.launches == [(4, 2, 64), (4, 2, 64), (8, 2, 64)]  # the first is tried again without the compiler's cache
    launch()
    assert kernel.launches[3:] == [(8, 2, 64)]
    launch(grid=(0,))
    assert len(kernel.launches) == 4
    kernel.able = (4,)
    launch(index=1)  # another device, which has enough for the first
    assert kernel.launches[4:] == [(4, 2, 64)]


def test_a_result_of_another_process_decides_the_launch(device, monkeypatch):
    kernel = Kernel(able=(4, 8))
    launch = device(kernel)
    launch()
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **_: run() or 8.0 / kernel.launches[-1][0])
    monkeypatch.setenv("SPT_AUTOTUNE", "1")
    launch()
    # Measured: those with a pipeline; taken: the one with more warps, which this device runs faster.
    assert kernel.launches[1:] == [(4, 2, 64), (8, 2, 64), (8, 2, 64)]
    triton_tuning.forget()
    monkeypatch.delenv("SPT_AUTOTUNE")
    launch(dim=32)
    assert kernel.launches[-1] == (4, 2, 64)
    launch()
    assert kernel.launches[-1] == (8, 2, 64)


def test_a_launch_that_no_setting_serves_is_named_and_not_tried_again(device):
    kernel = Kernel()
    launch = device(kernel)
    with pytest.raises(KernelError, match=r"some_kernel \(fp16.*HEAD_DIM 64\).*shared memory") as first:
        launch()
    assert {constants for *_, constants in kernel.launches} == {32, 64}
    tried = len(kernel.launches)
    with pytest.raises(KernelError) as second:
        launch()
    assert str(second.value) == str(first.value) and len(kernel.launches) == tried
    kernel.able = (4,)
    launch(dim=32)  # another configuration
    launch(index=1)  # another device


def test_a_launch_that_ran_goes_straight_to_the_compiled_kernel(device):
    """With its constants, the setting that was chosen, and the arguments of the call; anything else is compiled anew."""

    class Compiled:
        def __init__(self):
            self.launches = []

        def __getitem__(self, grid):
            return lambda *parameters: self.launches.append((grid, parameters))

    class Compiling(Kernel):
        def launch(self, **parameters):
            super().launch(**parameters)
            self.compiled = Compiled()
            return self.compiled

    kernel = Compiling(able=(8,))
    launch = device(kernel)
    launch()
    compiled, tried = kernel.compiled, len(kernel.launches)
    launch(grid=(3,))
    launch(grid=(2, 5))
    assert len(kernel.launches) == tried and [grid for grid, _ in compiled.launches] == [(3, 1, 1), (2, 5, 1)]
    # What is remembered keeps no tensor alive.
    assert not any(isinstance(x, torch.Tensor) for _, kept in triton_common._ready.values() for x in kept)
    x, dim, block_n = compiled.launches[0][1]
    assert x.device.type == "meta" and (dim, block_n) == (64, 64)
    launch(dim=32)
    assert len(kernel.launches) > tried and kernel.compiled is not compiled and len(compiled.launches) == 2


@pytest.mark.parametrize("hip", ["6.4", None])
def test_a_kernel_for_little_memory_does_not_serve_much(device, monkeypatch, hip):
    """On AMD chips Triton compiles for offsets of 32 bits where the memory behind a pointer has less than 2 GiB."""
    monkeypatch.setattr(torch.version, "hip", hip)

    class Compiling(Kernel):
        def launch(self, **parameters):
            super().launch(**parameters)
            return {(1, 1, 1): lambda *_: None}  # what was compiled, for the one grid

    kernel, counts = Compiling(able=(4,)), []
    launch = device(kernel)
    for memory in (3, 1 << 29, 1 << 30, 3):
        launch(memory=memory, alternatives=())
        counts.append(len(kernel.launches))
    assert counts == ([1, 1, 2, 2] if hip else [1, 1, 1, 1])


def test_a_missing_argument_is_named(device):
    kernel = Kernel(able=(4,))
    kernel.arg_names = (*kernel.arg_names, "n_rows")
    with pytest.raises(KeyError, match="n_rows"):
        device(kernel)()


def test_a_full_memory_is_not_held_against_a_kernel(device):
    kernel = Kernel(error=torch.OutOfMemoryError("CUDA out of memory"))
    launch = device(kernel)
    with pytest.raises(torch.OutOfMemoryError):
        launch()
    kernel.able = (4,)
    launch()


def test_the_next_lowering_takes_over_for_that_configuration_alone(monkeypatch):
    """One warning with kernel, configuration and cause; other calls of the op still use the kernel."""
    op, calls = "route_v1", []

    def kernels(x):
        if x > 64:
            raise KernelError("route_top_kernel", f"fp16, N_BLOCKS {x}", "OutOfResources: shared memory")
        calls.append(x)
        return "kernels"

    monkeypatch.setattr(registry, "reference_of", lambda name: lambda x: "reference")
    monkeypatch.setitem(registry._table.candidates, (op, "fake"), [registry.Candidate("triton", kernels)])
    with pytest.warns(UserWarning, match="route_top_kernel.*N_BLOCKS 128.*shared memory") as caught:
        found = [registry.dispatch(op, "fake", x) for x in (64, 128, 128, 32)]
    assert found == ["kernels", "reference", "reference", "kernels"] and calls == [64, 32]
    assert len(caught) == 1 and registry.chosen(op, "fake") == "triton"
    assert {cause: where for cause, where in registry.refusals().items() if where[0] == op} == {
        str(KernelError("route_top_kernel", "fp16, N_BLOCKS 128", "OutOfResources: shared memory")): (op, "fake", "triton")
    }


def test_what_a_refused_launch_was_given_is_freed(device, monkeypatch):
    """At once, and every time: such launches come again in every step."""

    class Refused(Kernel):
        def launch(self, **parameters):
            raise RuntimeError("out of resource: shared memory")

    launch, given = device(Refused()), []

    def kernels(x):
        scratch = torch.empty(3)
        given.extend([weakref.ref(x), weakref.ref(scratch)])
        launch()

    monkeypatch.setattr(registry, "reference_of", lambda name: lambda x: "reference")
    monkeypatch.setitem(registry._table.candidates, ("route_v1", "fake"), [registry.Candidate("triton", kernels)])
    monkeypatch.setattr(registry._table, "reported", {})
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="cannot run here.*some_kernel"):
            for _ in range(3):
                assert registry.dispatch("route_v1", "fake", torch.empty(3)) == "reference"
        assert [x() for x in given] == [None] * 6
    finally:
        gc.enable()


# ---- the compiler's own cache -------------------------------------------------------------------------------------


@pytest.fixture
def compiler_cache(tmp_path):
    from triton import knobs

    triton_common._guard_compiler_cache.cache_clear()
    folder = tmp_path / "triton"
    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        yield folder
    triton_common._guard_compiler_cache.cache_clear()


def pooling_kernel():
    with triton_common.recording("sm_90") as specs:
        triton_selection.pool_tiles(torch.empty(1, 2, 64, 16, dtype=torch.float16, device="meta"), 16, torch.float16)
    return specs[0]


@pytest.mark.filterwarnings("ignore:tl.dot:UserWarning")
def test_a_damaged_entry_of_the_compilers_cache_is_written_anew(compiler_cache):
    first = triton_common.compile_kernel(pooling_kernel(), "sm_90")
    damaged = list(compiler_cache.rglob("*.json"))
    assert first.error is None and damaged
    for path in damaged:
        path.write_text("{ not JSON")
    assert triton_common.compile_kernel(pooling_kernel(), "sm_90") == first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in damaged:
            json.loads(path.read_text())


def test_a_compiler_cache_that_others_can_write_is_left_alone(compiler_cache):
    compiler_cache.mkdir()
    compiler_cache.chmod(0o777)
    with pytest.warns(UserWarning, match="triton's cache folder.*can be written by others"):
        assert triton_common.compile_kernel(pooling_kernel(), "sm_90").error is None
    assert not list(compiler_cache.iterdir())
    assert list((render.cache_folder() / "triton").iterdir())


# ---- CUDA graphs --------------------------------------------------------------------------------------------------


SAME_EVERYWHERE = {
    "observe_v1": observe,
    "commitment_loss_v1": commitment_loss,
    "commitment_loss_backward_v1": commitment_loss_backward,
}


class OnTheDevice(TorchDispatchMode):
    """Runs our operators as a GPU would, on tensors without data: reading one, or a shape that depends on data, raises.

    Nor may a tensor of the host take part: its copy could not be captured.
    """

    def __init__(self):
        super().__init__()
        self.ran = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "spt":
            out = func(*args, **(kwargs or {}))
        else:
            name = func._schema.name.removeprefix("spt::")
            self.ran.add(name)
            rest = [argument.default_value for argument in func._schema.arguments[len(args) :]]
            if name in registry.OPS:
                out = registry.dispatch(name, "meta", *args, *rest)
            else:
                out = SAME_EVERYWHERE[name]._init_fn(*args, *rest)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "meta" for t in tensors), f"{func} reads or writes a tensor of the host"
        return out


def whole_step(monkeypatch, dtype=torch.bfloat16, **options):
    """Forward and backward of a rewritten block on tensors without data: (our operators, kernels, whether all gradients)."""
    graphs = []

    def capture(gm, inputs):
        graphs.append(gm)
        raise RuntimeError("captured")

    registry.borrow("triton", "cuda", "meta")
    monkeypatch.setattr("spt_compiler.backend.inner_compiler", lambda config, mode=None: capture)
    monkeypatch.setitem(ROUTE_TILE, "meta", ROUTE_TILE["cuda"])
    with torch.device("meta"):
        model, x = Block(width=64, heads=4, hidden=256, dropout=0.1).to(dtype), torch.randn(2, 300, 64, dtype=dtype)
    with pytest.raises(Exception, match="captured"):
        torch.compile(model, backend="spt", options={**SPARSE, **options})(x)
    inputs = []
    for node in graphs[0].graph.nodes:
        if node.op == "placeholder":
            like = node.meta["example_value"]
            inputs.append(torch.empty(like.shape, dtype=like.dtype, device="meta", requires_grad=like.requires_grad))
    step = OnTheDevice()
    with triton_common.recording() as specs, step:
        torch.stack([out.float().sum() for out in graphs[0](*inputs)]).sum().backward()  # with auxiliary losses
    missing = [t.shape for t in inputs if t.requires_grad and t.grad is None]
    return step.ran, {spec.kernel for spec in specs}, missing


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "tile_attention_bwd_kernel_dkdv"),
        ({"attention.compensation": True, "ffn.gate": "straight-through"}, "tile_attention_bwd_kernel_pooled"),
        ({"preset": "paper", "attention.subspaces": 4}, "select_keys_top_kernel"),
        ({"exact": True}, "routed_ffn_bwd_kernel_hidden"),
    ],
)
def test_a_whole_step_never_waits_for_the_device(monkeypatch, options, kernel):
    ran, kernels, missing = whole_step(monkeypatch, **options)
    assert {"route_v1", "routed_ffn_v1", "routed_ffn_backward_v1"} <= ran
    assert kernel in kernels and "routed_ffn_sums_weights_kernel" in kernels and not missing


def test_a_step_that_waits_is_found(monkeypatch):
    """No kernels take float64, and the definition of the routed FFN reads its lists on the host."""
    with pytest.raises(RuntimeError, match="meta"):
        whole_step(monkeypatch, dtype=torch.float64)
