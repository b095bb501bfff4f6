"""What is installed: a wheel with templates and entry points, that works outside the tree."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spt_compiler

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not run from a source tree")


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# Packages whose folders lie beside the package's own.
OUTSIDE = {"spt_compiler.templates", "spt_compiler.benchmarks", "spt_compiler.benchmarks.gpu", "spt_compiler.benchmarks.quality"}


def test_every_package_is_listed():
    """The list is written by hand, because some packages live outside the package's folder."""
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "spt_compiler").rglob("*.py")}
    found |= OUTSIDE
    assert found == set(pyproject()["tool"]["setuptools"]["packages"])
    for name in found - OUTSIDE:
        assert (ROOT / name.replace(".", "/") / "__init__.py").exists(), f"{name} lacks its __init__.py"


def test_versions_agree():
    assert pyproject()["project"]["version"] == spt_compiler.__version__


def test_constraints_pin_what_the_project_names():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+?)(?:;.*)?$", (ROOT / "constraints.txt").read_text().lower(), re.M))
    project = pyproject()["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        assert name in pins, f"{name} is not pinned in constraints.txt"
    assert pins["torch"] == "2.13.0" and "torch==2.13.0" in (ROOT / "Makefile").read_text()


def test_registered_by_entry_point_alone():
    points = [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "spt"]
    assert points and all(e.value == "spt_compiler.backend:spt" for e in points)
    sources = "".join(p.read_text() for p in (ROOT / "spt_compiler").rglob("*.py"))
    assert "register_backend" not in sources
    import torch

    assert "spt" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("spt").__module__ == "spt_compiler.backend"


def test_generated_things_are_ignored_by_git():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".venv/", "out/", "build/", "dist/", "*.egg-info/"} <= set(ignored)


def test_readme_says_what_matters():
    text = (ROOT / "README.md").read_text()
    assert "approximate" in text.split("\n\n")[1], "the purpose, in one sentence, admits the approximation"
    for word in ("make demo", "make test", 'backend="spt"', "SPT_DISABLE", "spt_compiler.dense"):
        assert word in text


def test_documents_that_are_named_exist():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = {}
    for path in tracked:
        if path.endswith((".py", ".md", ".jinja", ".toml")) or path == "Makefile":
            text = (ROOT / path).read_text()
            named |= {name: path for name in re.findall(r"\b(?:docs|benchmarks/results)/[\w/-]+\.(?:md|json|png|html)", text)}
    assert named, "the README names its documents"
    missing = {name: path for name, path in named.items() if not (ROOT / name).exists()}
    assert not missing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree: setuptools writes beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "spt_compiler", "templates", "benchmarks"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tree / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        folder,
        tree,
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_contents(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        points = configparser.ConfigParser()
        [entry_points] = [name for name in names if name.endswith("entry_points.txt")]
        points.read_string(archive.read(entry_points).decode())
    templates = {f"spt_compiler/templates/{path.name}" for path in (ROOT / "templates").glob("*.jinja")}
    assert templates and templates <= names
    assert {"spt_compiler/templates/__init__.py", "spt_compiler/py.typed", "spt_compiler/benchmarks/passes.py"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "spt_compiler").rglob("*.py")}
    assert modules <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "docs")) for name in names)
    assert points["torch_dynamo_backends"]["spt"] == "spt_compiler.backend:spt"
    assert points["console_scripts"]["spt"] == "spt_compiler.cli:main"


@pytest.mark.slow
def test_wheel_works_outside_the_tree(wheel, tmp_path):
    """Installed into a folder of its own, that comes before everything else on the path."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", target, wheel]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    code = """
import pathlib, sys, torch, spt_compiler
from spt_compiler.lowering import render
import spt_compiler.templates
target = pathlib.Path(sys.argv[1])
for module in (spt_compiler, spt_compiler.templates):
    assert target in pathlib.Path(module.__file__).parents, module.__file__
assert render.template_names(), "no template found"
layer = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 32))
layer.compile(backend="spt", options={"inner": "eager", "exact": True, "require_matches": 1})
layer(torch.randn(4, 32)).sum().backward()
"""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    script = subprocess.run(
        [sys.executable, "-m", "spt_compiler", "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert script.returncode == 0 and "doctor" in script.stdout
