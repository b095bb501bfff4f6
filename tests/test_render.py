"""Rendering: every template under every structure, the cache folder and its faults, and text that must not pass."""

from __future__ import annotations

import ast
import itertools
import os
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from interpreter import run_interpreted

from spt_compiler import expression
from spt_compiler.errors import ExpressionError, SPTError
from spt_compiler.lowering import render

MASKS = {
    "none": (None, []),
    "causal": ("k <= q", []),
    "reads": (
        "(k <= q) & t0[b, k] & (t1[b, q] == t1[b, 0])",
        [{"kind": "bool", "rank": 2}, {"kind": "int", "rank": 2}],
    ),
    "additive": ("t0[h] * (k - q) + where(k <= q, 0.0, -inf)", [{"kind": "float", "rank": 1}]),
}


def masked(**options):
    for bias, (text, reads) in itertools.product((None, "bool", "float"), MASKS.values()):
        mask = None if text is None else expression.parse(text)
        for values in itertools.product(*options.values()):
            yield {"bias": bias, "mask": mask, "reads": reads, **dict(zip(options, values, strict=True))}


def activations(backward):
    """Structures of the routed FFN's activation kernels; flags that touch nothing in common change together."""
    for text, projections in (("gelu(x0)", 1), ("silu(x0) * x1", 2), ("x0 * sigmoid(a0 * x0) + a1", 1)):
        act = expression.parse(text)
        reads = [i for i in range(2) if f"a{i}" in act.variables]
        names = {f"x{i}": f"pre{i}" for i in range(projections)} | {f"a{i}": f"act{i}" for i in reads}
        for bias, lora, gates, other, dropout in itertools.product((False, True), repeat=5):
            common = {
                "n_projections": projections,
                "bias": bias,
                "lora": [lora, False][:projections],
                "indirect": [bias, True][:projections],
                "gates": gates,
                "dropout": dropout,
                "low_dropout": lora and dropout,
                "act": act,
                "act_reads": reads,
                "act_names": names,
            }
            if not backward:
                yield {**common, "save": other}
                continue
            for mode, through in (("both", True), ("listed", True)) if other else (("dense", True), ("both", False)):
                wanted = range(projections if bias else 1) if through else ()
                yield {
                    **common,
                    "mode": mode,
                    "recompute": mode != "listed",
                    "through": through,
                    "indirect_out": other,
                    "low": lora,
                    "indirect_low": other,
                    "grad_pre": [{"index": i, "slope": expression.derivative(act, f"x{i}")} for i in wanted],
                    "grad_act": [{"index": i, "slope": expression.derivative(act, f"a{i}")} for i in reads if through],
                    "bias_sums": [0] if bias and through else [],
                    "need_hidden": other or not through,
                    "need_low_hidden": lora and dropout,
                    "grad_gates": gates and through,
                }


def rows():
    for indirect in ([True], [False], [True, False]):
        for bias, compensation in itertools.product((False, True), repeat=2):
            yield {"indirect": indirect, "bias_out": bias, "compensation": compensation}


EMPTY = ("uniform", "nan", "zero", "uniform", "nan")
# All options together under every mask, and each alone under two.
BACKWARD = ("dropout", "softcap", "special", "blank_dropout", "split")
LISTS = ({"single": True, "pseudo": None}, *({"single": False, "pseudo": p} for p in (None, "plain", "causal", "masked")))


def listed(options):
    for kind in LISTS:
        everything = list(masked())
        for chosen, structures in ((options, everything), *(((one,), everything[::11]) for one in options)):
            flags = {name: name in chosen and not (kind["single"] and name == "split") for name in options}
            yield from ({**structure, **kind, **flags} for structure in structures)


def backward():
    """With and without the kernels for all gradients of a query tile, for one or two products."""
    for i, structure in enumerate(listed(BACKWARD)):
        fused = 0 if structure["single"] or structure["pseudo"] or structure["split"] else i % 3
        yield {**structure, "fused": fused, "ranged": i % 2 == 0}


DOT = {"softcap": (False, True), "dot_type": ("float16", "bfloat16", "float32")}
FLAGS = ("mean", "codes", "decoded", "pooled")
STRUCTURES = {
    "tile_attention_fwd": lambda: (
        {**x, "empty": empty} for x, empty in zip(listed(("dropout", "softcap")), itertools.cycle(EMPTY), strict=False)
    ),
    "tile_attention_bwd": backward,
    "transpose_lists": lambda: [{"split": s, "places": p} for s, p in itertools.product((False, True), repeat=2)],
    "pool_tiles": lambda: [{}],
    "select_tiles": lambda: itertools.chain(
        masked(**DOT, pooled=(False,), causal=(False,), whole_head=(False, True)),
        (
            {"bias": None, "mask": expression.parse("k <= q") if c else None, "reads": [], "pooled": True, "causal": c}
            | {"softcap": s, "dot_type": "bfloat16", "whole_head": w}
            for c, s, w in itertools.product((False, True), repeat=3)
        ),
    ),
    "select_keys": lambda: masked(**DOT, match=(False, True)),
    "pq_assign": lambda: (dict(zip(FLAGS, v, strict=True)) for v in itertools.product((False, True), repeat=4)),
    "route": lambda: [{}],
    "routed_ffn_fwd": lambda: activations(False),
    "routed_ffn_bwd": lambda: activations(True),
    "routed_ffn_rows": rows,
    "routed_ffn_sums": lambda: [{}],
    "order_units": lambda: [{}],
}


def test_every_template_has_structures_here():
    assert sorted(STRUCTURES) == render.template_names()


@pytest.mark.parametrize("template", sorted(STRUCTURES))
def test_every_structure_renders_to_python_that_reads_as_such(template):
    for structure in STRUCTURES[template]():
        source = render.render(template, structure)
        tree = ast.parse(source)
        legend = ast.get_docstring(tree) or ""
        for word in ("Tensors", "Grid", "Meaning", "Asserted"):
            assert word in legend, f"the legend of {template} does not speak of {word}"
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert called <= defined | {"range", "float"}, called - defined
        assert "{{" not in source and "{%" not in source and "\x00" not in source
        assert all(name.startswith((template, "spt_")) for name in defined)


def test_importing_the_lowerings_does_not_import_triton():
    code = (
        "import sys; import spt_compiler.lowering.triton_attention, spt_compiler.lowering.triton_ffn, "
        "spt_compiler.lowering.triton_catalog, spt_compiler.cli.kernels; sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    "value",
    [
        "x; import os",
        "__import__",
        "a b",
        "a\nb",
        "{{ 7 }}",
        "Import",
        object(),
        ["fine", "not fine"],
        {"key": "os.system('true')"},
        {"not a word": 1},
        b"bytes",
    ],
)
def test_text_of_a_model_cannot_become_code(value):
    structure = next(iter(STRUCTURES["pq_assign"]()))
    with pytest.raises(SPTError):
        render.render("pq_assign", {**structure, "mean": value})


@pytest.mark.parametrize("name", ["q); import os; (q", "__import__('os').system('true')", "t0[b, k]; x", "x0\n"])
def test_hostile_names_do_not_pass_the_expression_language(name):
    with pytest.raises(ExpressionError):
        expression.var(name)
    with pytest.raises(ExpressionError):
        expression.read(name, 0)


def test_a_missing_constant_or_template_is_named():
    with pytest.raises(SPTError, match="codes"):
        render.render("pq_assign", {"mean": True, "decoded": True})
    with pytest.raises(SPTError, match="no template 'nonsense'.*route"):
        render.render("nonsense", {})


# -- the cache folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path / "cache"))
    render._usable_folder.cache_clear()
    yield tmp_path / "cache" / "kernels"
    render._usable_folder.cache_clear()


SOURCE = "VALUE = 41\n"


def test_files_are_private_and_written_once(cache):
    path = render.store("kernel.py", SOURCE)
    assert path == cache / "kernel.py" and path.read_text() == SOURCE
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and not stat.S_IMODE(path.stat().st_mode) & 0o022
    before = path.stat().st_mtime_ns
    assert render.store("kernel.py", SOURCE).stat().st_mtime_ns == before
    assert os.listdir(cache) == ["kernel.py"]


@pytest.mark.parametrize("damage", ["", "VALUE = 42\n", SOURCE + "import os\n", "\udcff"])
def test_a_corrupt_entry_is_rebuilt_and_never_run(cache, damage):
    path = render.store("corrupt.py", SOURCE)
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    module = render._import("corrupt", SOURCE)
    assert module.VALUE == 41 and path.read_text() == SOURCE


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_a_folder_that_others_can_write_is_refused_with_one_warning(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    (cache / "kernel.py").write_text("raise SystemExit('planted')\n")
    with pytest.warns(UserWarning, match="can be written by others") as caught:
        path = render.store("kernel.py", SOURCE)
        render.store("other.py", SOURCE)
    assert len(caught) == 1
    assert path.parent != cache and path.read_text() == SOURCE
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "planted" in (cache / "kernel.py").read_text()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_links_and_writable_files_are_not_trusted(cache, tmp_path):
    path = render.store("kernel.py", SOURCE)
    path.chmod(0o666)
    assert not stat.S_IMODE(render.store("kernel.py", SOURCE).stat().st_mode) & 0o022
    target = tmp_path / "elsewhere.py"
    target.write_text(SOURCE)
    path.unlink()
    path.symlink_to(target)
    assert not render.store("kernel.py", SOURCE).is_symlink() and target.read_text() == SOURCE
    render._usable_folder.cache_clear()
    moved = cache.with_name("moved")
    cache.rename(moved)
    cache.symlink_to(moved)
    with pytest.warns(UserWarning, match="symbolic link"):
        assert render.cache_folder() != cache


def test_a_folder_that_cannot_be_made_costs_a_warning_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path / "file" / "below"))
    render._usable_folder.cache_clear()
    with pytest.warns(UserWarning, match="SPT_CACHE_DIR") as caught:
        assert render.store("kernel.py", SOURCE).read_text() == SOURCE
        assert render.store("other.py", SOURCE).read_text() == SOURCE
    assert len(caught) == 1
    render._usable_folder.cache_clear()


def test_a_disk_that_fills_up_later_costs_a_warning_only(cache, monkeypatch):
    render.cache_folder()
    real = render.tempfile.mkstemp

    def full(*args, dir=None, **kwargs):
        if dir == cache:
            raise OSError(28, "No space left on device")
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(render.tempfile, "mkstemp", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert render.store("kernel.py", SOURCE).read_text() == SOURCE


def test_concurrent_writers_leave_one_whole_file(cache):
    source = "VALUE = 41\n" * 20000
    found = []

    def write():
        for _ in range(5):
            found.append(render.store("big.py", source).read_text() == source)

    threads = [threading.Thread(target=write) for _ in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 30 and all(found) and os.listdir(cache) == ["big.py"]


def test_equal_constants_give_one_module_and_readable_sources(cache):
    pytest.importorskip("triton")
    structure = {"mean": False, "codes": True, "decoded": False, "pooled": False}
    module = render.load("pq_assign", structure)
    assert render.load("pq_assign", dict(reversed(structure.items()))) is module
    assert render.load("pq_assign", {**structure, "mean": True}) is not module
    name = Path(module.__file__).name
    assert name.startswith("pq_assign_") and render.loaded_sources()[name] == module.__file__


def test_templates_are_found_as_package_data_or_beside_the_package(monkeypatch):
    monkeypatch.setattr(render.importlib.resources, "files", lambda _: (_ for _ in ()).throw(ModuleNotFoundError()))
    assert "route" in render.template_names()


def test_printed_expressions_compute_the_same(tmp_path):
    pytest.importorskip("triton")
    run_interpreted("interpreted_expression", tmp_path)
