"""`spt doctor`: checks this installation: versions, devices, compiler, caches, and one tiny compiled run."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

from spt_compiler.cli.console import Console

# Package -> what is lost without it; "" for those that must be there.
_PACKAGES = {
    "spt_compiler": "", "torch": "", "jinja2": "", "networkx": "", "safetensors": "",
    "triton": ": no GPU kernels; the CPU needs none",
    "transformers": ": no spt demo, finetune, explain",
    "accelerate": ": no integration with it",
    "peft": ": no LoRA of its kind",
    "rich": ": plain tables",
    "matplotlib": ": no plots",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    rows = checks()
    if args.json:
        named = [dict(zip(("check", "state", "detail"), row, strict=True)) for row in rows]
        sys.stdout.write(json.dumps(named, indent=1) + "\n")
    else:
        Console().table("spt doctor", ("check", "state", "detail"), rows)
    return 1 if any(state == "FAILED" for _, state, _ in rows) else 0


def checks() -> list[tuple[str, str, str]]:
    """Rows (check, "ok" | "note" | "FAILED", detail). A note limits what works; only a failure makes the status 1."""
    rows = [("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    for package, optional in _PACKAGES.items():
        try:
            rows.append((package, "ok", importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "note" if optional else "FAILED", f"not installed{optional}"))
    for name, check in _CHECKS.items():
        try:
            rows.append((name, *check()))
        except Exception as error:  # a doctor reports what is broken and goes on
            rows.append((name, "FAILED", f"{type(error).__name__}: {error}".splitlines()[0]))
    return rows


def compiler_problem() -> str | None:
    """Why Inductor cannot compile C++ here; None if it can."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError, RuntimeError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def _torch_version() -> tuple[str, str]:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return ("ok", "2.11 or later") if version >= (2, 11) else ("FAILED", f"{torch.__version__}, expected 2.11 or later")


def _devices() -> tuple[str, str]:
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            found.append(f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return "ok", ", ".join(found)


def _compiler() -> tuple[str, str]:
    problem = compiler_problem()
    if problem:
        return "note", f"none ({problem}): use options={{'inner': 'aot_eager'}}"
    from torch._inductor.cpp_builder import get_cpp_compiler

    return "ok", get_cpp_compiler()


def _templates() -> tuple[str, str]:
    import importlib.resources

    names = [f.name for f in importlib.resources.files("spt_compiler.templates").iterdir() if f.name.endswith(".jinja")]
    return ("ok", f"{len(names)} files") if names else ("FAILED", "none found: the installation is incomplete")


def _cache() -> tuple[str, str]:
    from spt_compiler.lowering import render

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = Path(render.cache_folder())
    if caught:
        return "note", str(caught[0].message)
    return "ok", f"{folder} ({sum(1 for _ in folder.rglob('*.py'))} rendered kernels)"


def _environment() -> tuple[str, str]:
    from spt_compiler.config import SPTConfig, is_disabled

    config = SPTConfig.from_options()
    if is_disabled():
        return "note", "SPT_DISABLE is set: everything runs dense"
    changed = config.changed_options()
    return "ok", ", ".join(f"{key}={value}" for key, value in changed.items()) or "no SPT_* option set"


def _registered() -> tuple[str, str]:
    import torch

    if "spt" in torch._dynamo.list_backends():
        return "ok", "torch.compile(backend='spt') finds it"
    return (
        "FAILED",
        "the entry point is missing: install the package (pip install -e . or a wheel), a path is not enough",
    )


def _compile() -> tuple[str, str]:
    import torch

    import spt_compiler

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 32))
    x = torch.randn(64, 32)
    expected = layer(x)
    options: dict[str, Any] = {"exact": True, "inner": "eager", "strict": True}
    actual = torch.compile(layer, backend=spt_compiler.spt, options=options)(x)
    error = ((actual - expected).norm() / expected.norm()).item()
    return ("ok" if error < 1e-4 else "FAILED", f"exact run of a small FFN differs by {error:.1e}, relative")


_CHECKS = {
    "torch version": _torch_version,
    "devices": _devices,
    "C++ compiler": _compiler,
    "templates": _templates,
    "kernel cache": _cache,
    "environment": _environment,
    "backend": _registered,
    "compile": _compile,
}
