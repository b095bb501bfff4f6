"""The order of the layers: data flows one way, and a light import stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spt_compiler

ROOT = Path(spt_compiler.__file__).parent

# A module imports from its own row or smaller ones only. A folder stands for all files in it.
ROWS = {
    0: ["errors", "config", "matmul"],
    1: ["pq", "routing", "expression", "graph", "scope"],
    2: ["pattern", "canonicalize", "ops", "state", "lifting"],
    3: ["patterns", "lowering", "learning", "masks"],
    4: ["plan"],
    5: ["rewrite", "runtime", "calibrate", "debug"],
    6: ["backend", "api"],
    7: ["", "__main__", "cli", "integrations", "benchmarks"],  # "" is the package itself
}
# Imports against the order, inside a function, and why.
DEFERRED = {
    ("debug", "backend"): "explain runs the backend's own stages, so that it cannot disagree with them",
    ("", "backend"): "the package offers the backend as an attribute without importing Dynamo",
}


def row_of(module: str) -> int:
    top = module.partition(".")[0]
    rows = [row for row, names in ROWS.items() if top in names]
    assert rows, f"{module}: give it a row in tests/test_layout.py"
    return rows[0]


def imports(path: Path) -> set[tuple[str, bool]]:
    """(module of ours that `path` imports, whether inside a function), without those for type checkers alone."""
    package = list(path.relative_to(ROOT.parent).with_suffix("").parts)
    package = package[:-1]
    found: set[tuple[str, bool]] = set()

    def add(name: str, deferred: bool) -> None:
        if name == "spt_compiler" or name.startswith("spt_compiler."):
            found.add((name.removeprefix("spt_compiler").removeprefix("."), deferred))

    def visit(node: ast.AST, deferred: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, deferred)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                place = ROOT.parent / module.replace(".", "/") / alias.name
                is_module = place.with_suffix(".py").exists() or (place / "__init__.py").exists()
                add(f"{module}.{alias.name}" if is_module else module, deferred)
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return found


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_to_smaller_rows(path):
    module = module_name(path)
    for target, deferred in imports(path):
        if target.startswith("templates") or (target == "" and row_of(module) == 7):
            continue
        if deferred and (module, target) in DEFERRED:
            continue
        assert row_of(target) <= row_of(module), (
            f"{module} (row {row_of(module)}) imports {target} (row {row_of(target)})"
        )


def test_no_cycles():
    """Not even between files of one row; imports inside functions count, but for those named in DEFERRED."""
    edges = {
        module_name(path): {t for t, deferred in imports(path) if not (deferred and (module_name(path), t) in DEFERRED)}
        for path in FILES
    }
    for module in edges:  # the package and its subcommands know each other only through the package's public face
        edges[module].discard("")
        edges[module].discard(module)
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "cycle: " + " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in edges.get(module, ()):
                walk(target, (*trail, module))
            done.add(module)

    for module in edges:
        walk(module, ())


def test_every_deferred_exception_is_needed():
    for module, target in DEFERRED:
        path = ROOT / (f"{module}.py" if module else "__init__.py")
        assert (target, True) in imports(path), f"remove {module} -> {target} from DEFERRED"


def test_import_is_light():
    """Neither transformers nor triton nor a device is touched by importing the package."""
    code = (
        "import sys, spt_compiler, spt_compiler.cli, spt_compiler.config\n"
        "heavy = [m for m in ('transformers', 'triton', 'matplotlib', 'rich', 'torch._inductor') if m in sys.modules]\n"
        "torch = sys.modules.get('torch')\n"
        "assert not heavy, heavy\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_print_no_bare_except_no_module_level_triton(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.name}:{node.lineno}: log it, or write through the console"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: name what is caught"
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(name.partition(".")[0] == "triton" for name in names), f"{path.name}: import triton lazily"
