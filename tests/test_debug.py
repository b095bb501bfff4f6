"""Seeing what was done: explain, dumps, logs, the tlparse artifact."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

import spt_compiler
from spt_compiler import debug
from tests.blocks import EXACT, SPARSE, Block, Stack


def batch(length: int = 100) -> torch.Tensor:
    return torch.randn(2, length, 48)


def cache_entries(model: nn.Module) -> int:
    from torch._dynamo.convert_frame import input_codes

    codes = [r() for r in input_codes.seen]
    return sum(len(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(c)) for c in codes if c is not None)


def test_explain_rows():
    found = spt_compiler.explain(Stack(2), batch(), options=SPARSE)
    assert [s.kind for s in found.sites] == ["attention", "ffn"] * 2
    row = found.sites[0]
    assert row.status == "replaced" and row.path.endswith("blocks.0") and "blocks.py:" in row.where
    assert row.density == 0.25 and row.executed == pytest.approx(2 * 0.25 - 0.25**2) and row.mask == "k <= q"
    assert row.lowering not in ("", "reference") and row.expected_gain > 1
    assert "attention 2/2, ffn 2/2" in found.summary()


def test_explain_counts_executions():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            x = self.block(x)
            torch._dynamo.graph_break()
            return self.block(x)

    assert spt_compiler.explain(Twice(), batch(), options=SPARSE).replaced() == 4


def test_explain_gives_reasons():
    found = spt_compiler.explain(Stack(1), batch(), options={**SPARSE, "ffn.min_width": 500})
    (skipped,) = [s for s in found.sites if s.status == "skipped"]
    assert skipped.kind == "ffn" and skipped.reason.startswith("hidden width 112 is below ffn.min_width = 500")


def test_explain_disturbs_nothing():
    class Noisy(Stack):
        def __init__(self):
            super().__init__(1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) + torch.rand(())

    model, x = Noisy(), batch()
    state = torch.get_rng_state()
    entries = cache_entries(model)
    found = spt_compiler.explain(model, x, options=SPARSE)
    assert found.replaced() == 2
    assert model.calls.item() == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert spt_compiler.state_dict(model) == {}
    assert cache_entries(model) == entries
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize("how", ["wrapper", "in place", "per block"])
def test_explain_works_on_compiled_models_and_leaves_them_compiled(how):
    from torch._dynamo.utils import counters

    model, x = Stack(2), batch()
    if how == "wrapper":
        model = torch.compile(model, backend="spt", options=SPARSE)
    elif how == "in place":
        model.compile(backend="spt", options=SPARSE)
    else:
        spt_compiler.compile(model, **{k.replace(".", "__"): v for k, v in SPARSE.items()})
    model(x)
    assert spt_compiler.explain(model, x, options=SPARSE).replaced() == 4
    assert spt_compiler.explain(model, x).replaced() == 4  # with the options that it was compiled with
    assert spt_compiler.explain(model, x, options={}).replaced() == 0  # the defaults' thresholds
    counters.clear()
    model(x)
    assert counters["stats"]["unique_graphs"] == 0


def test_explain_keeps_the_callers_modes():
    class Modes(Stack):
        def forward(self, x):
            if self.training or torch.is_grad_enabled():
                return x * 2
            return super().forward(x)

    model = Modes(1).eval()
    with torch.no_grad():
        assert spt_compiler.explain(model, batch(), options=SPARSE).replaced() == 2
    assert spt_compiler.explain(model, batch(), options=SPARSE).replaced() == 0


def test_to_dict_and_html(tmp_path):
    found = spt_compiler.explain(Stack(1), batch(), options={**SPARSE, "ffn.min_width": 500})
    document = json.loads(json.dumps(found.to_dict()))
    assert document["replaced"] == {"attention": 1, "ffn": 0} and document["skipped"] == {"attention": 0, "ffn": 1}
    found.to_html(tmp_path / "sites.html")
    page = (tmp_path / "sites.html").read_text()
    assert "hidden width 112" in page and "<script" not in page


def test_html_escapes_what_a_model_may_contain(tmp_path):
    row = debug.SiteReport("ffn", "<script>alert(1)</script>", "a.py:1", "p", "replaced")
    debug.Explanation((row,)).to_html(tmp_path / "x.html")
    assert "<script>" not in (tmp_path / "x.html").read_text()


def test_dump_writes_the_numbered_files(tmp_path):
    model = Stack(1, checkpointed=True)
    torch.compile(model, backend="spt", options={**SPARSE, "dump": str(tmp_path)})(batch())
    (folder,) = tmp_path.iterdir()
    names = sorted(f.name for f in folder.iterdir() if not f.name.startswith("50_"))
    assert names == ["00_dynamo.py", "10_canonical.py", "20_matches.txt", "30_plan.json", "40_rewritten.py"]
    dense = "torch._C._nn.scaled_dot_product_attention("
    assert dense in (folder / "00_dynamo.py").read_text()
    rewritten = (folder / "40_rewritten.py").read_text()
    assert "spt.tile_attention_v1" in rewritten and dense not in rewritten
    for name in names:
        if name.endswith(".py"):
            compile((folder / name).read_text(), name, "exec")
    assert {s["kind"] for s in json.loads((folder / "30_plan.json").read_text())["sites"]} == {"attention", "ffn"}


def test_dump_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SPT_DUMP", str(tmp_path))
    torch.compile(Stack(1), backend="spt", options=SPARSE)(batch())
    assert len(list(tmp_path.glob("*/40_rewritten.py"))) == 1


def test_an_unwritable_dump_folder_warns_and_training_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot write the dump"):
        out = torch.compile(Stack(1), backend="spt", options={**SPARSE, "dump": str(tmp_path / "file" / "x")})(batch())
    assert out.isfinite().all()


def test_every_site_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="spt_compiler"):
        torch.compile(Stack(1), backend="spt", options=EXACT)(batch())
    assert sum("replaced" in r.message for r in caplog.records if r.name == "spt_compiler.debug") == 2


def test_the_report_is_a_trace_artifact(monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch._logging,
        "trace_structured",
        lambda kind, metadata_fn=dict, *, payload_fn=lambda: None, **_: seen.append(
            (kind, metadata_fn(), payload_fn())
        ),
    )
    torch.compile(Stack(1), backend="spt", options=SPARSE)(batch())
    ((_, _, payload),) = [s for s in seen if isinstance(s[1], dict) and s[1].get("name") == "spt_match_report"]
    assert len(json.loads(payload)["sites"]) == 2


def test_timings_cover_the_stages():
    debug.timings(reset=True)
    torch.compile(Stack(1), backend="spt", options=SPARSE)(batch())
    assert {"copy", "canonicalize", "match", "plan", "rewrite", "inner"} <= debug.timings().keys()
    assert all(seconds > 0 for seconds in debug.timings().values())
