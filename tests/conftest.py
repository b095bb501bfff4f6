"""What every test starts from: fixed seeds, one thread, no network, no `SPT_*` variables, and an empty Dynamo cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before torch and transformers are imported: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import random

import hypothesis
import pytest
import torch

from spt_compiler import matmul
from spt_compiler.lowering import cpp_ffn, cpu_ffn

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

# A run of the suite must not depend on what the caller's shell sets; the kernel cache is no option and may stay.
_KEPT_VARIABLES = ("SPT_CACHE_DIR",)


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("SPT_") and name not in _KEPT_VARIABLES]:
        monkeypatch.delenv(name)
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    # Importing Dynamo takes seconds: a test that never compiled has nothing to reset.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `torch.empty` and its relatives return with NaN (integers: a huge negative number, booleans: True).

    A kernel or reference that reads memory it never wrote then fails at once, and not only on an unlucky day.
    """

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            info = torch.iinfo(tensor.dtype)
            return tensor.fill_(info.min // 2 if info.min else info.max)

    def filled(function):
        return lambda *args, **kwargs: fill(function(*args, **kwargs))

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture(params=["mkl", "onednn"])
def vendor(request, monkeypatch):
    """Each library in turn for fp32 products of any size, whatever processor this is."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: request.param == "onednn")
    monkeypatch.setattr(matmul, "_MIN_SIDE", 1)
    monkeypatch.setattr(matmul, "_MIN_VOLUME", 1)
    monkeypatch.setattr(matmul, "_PIECE", 16)
    monkeypatch.setattr(matmul, "_STEP", 4)


@pytest.fixture
def small_pieces(monkeypatch):
    """Spans, chunks and groups of the CPU's FFNs of a few rows, so that small inputs meet every way of cutting."""
    monkeypatch.setattr(cpu_ffn, "_SPAN_VALUES", 1)
    monkeypatch.setattr(cpu_ffn, "_MIN_SPAN", 20)
    monkeypatch.setattr(cpp_ffn, "_MIN_ROWS", 20)
    monkeypatch.setattr(cpp_ffn, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(cpp_ffn, "_STRIP_BYTES", 1)
