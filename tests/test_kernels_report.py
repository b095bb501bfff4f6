"""`spt kernels`: the report of kernels compiled for a chip that need not be there."""

from __future__ import annotations

import json

import pytest

from spt_compiler.cli import main
from spt_compiler.cli.kernels import COLUMNS, report
from spt_compiler.errors import SPTError
from spt_compiler.lowering import triton_common

pytest.importorskip("triton")


def test_json_has_the_agreed_form(capsys):
    status = main(["kernels", "--target", "sm_90", "--dtype", "bf16", "--filter", "route_", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0 and found["target"] == "sm_90"
    assert {row["kernel"] for row in found["kernels"]} == {"route_top_kernel", "route_rows_kernel"}
    for row in found["kernels"]:
        assert tuple(row) == COLUMNS
        assert row["registers"] > 0 and row["spills"] >= 0 and row["shared_bytes"] >= 0
        assert row["dtype"] == "bf16" and row["tensor_core"] is False and row["error"] is None


@pytest.mark.slow
def test_several_processes_report_the_same():
    rows = [list(report("sm_90", ("bf16",), "route_", jobs)) for jobs in (1, 2)]
    assert rows[0] == rows[1] and len(rows[0]) >= 2


def test_table_names_every_kernel(capsys):
    assert main(["kernels", "--target", "gfx942", "--dtype", "fp16", "--filter", "pool"]) == 0
    out = capsys.readouterr().out
    assert "pool_tiles_kernel" in out and "gfx942" in out and "0 failed" in out


def test_a_kernel_that_does_not_compile_is_reported_and_fails_the_command(monkeypatch, capsys):
    import triton

    def broken(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(triton, "compile", broken)
    assert main(["kernels", "--dtype", "bf16", "--filter", "pool", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["kernels"]
    assert rows and all("out of resource" in row["error"] and row["registers"] is None for row in rows)


def test_more_shared_memory_than_the_chip_has_is_an_error(monkeypatch):
    monkeypatch.setitem(triton_common.SHARED_LIMIT, "sm_90", 8)
    errors = [row["error"] for row in report("sm_90", ("bf16",), "select_tiles_top")]
    assert errors and all("shared memory" in error for error in errors)


def test_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels"]) == 1 and "TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(triton_common, "available", lambda: False)
    with pytest.raises(SPTError, match="triton"):
        next(report("sm_90"))
    with pytest.raises(SystemExit):
        main(["kernels", "--target", "sm_12345"])


def test_a_filter_that_hits_nothing_is_said(capsys):
    assert main(["kernels", "--dtype", "bf16", "--filter", "nonsense", "--json"]) == 1
    out, error = capsys.readouterr()
    assert not out and "no kernel has 'nonsense'" in error
