from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spt_compiler import cli
from spt_compiler.cli import compare, console, doctor, models, training, workers
from spt_compiler.cli.console import Console, format_table
from spt_compiler.cli.coverage import REMARKS
from spt_compiler.errors import SPTError, StateError

transformers = pytest.importorskip("transformers")

SPARSE = {"inner": "eager", "attention.min_keys": 0, "ffn.min_width": 0, "attention.tile": [16, 8]}


@pytest.fixture
def start(tmp_path):
    """A tiny start: model folder and data file."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )  # with GPT-2's dropout: a resumed run must continue the random numbers
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "start")
    tokens = training.byte_tokens(training.english_bytes()[:4000])
    training.write_data(tmp_path / "data.safetensors", tokens[:3000], tokens[3000:], 32)
    return training.Run(
        name="dense", model=str(tmp_path / "start"), data=str(tmp_path / "data.safetensors"), out=str(tmp_path / "out"),
        backend="none", steps=6, batch=2, length=32, warmup=2, eval_every=3, eval_batches=2, checkpoint_every=2,
    )  # fmt: skip


def quiet(message):
    assert message["event"] in ("step", "note")


# ---- the command --------------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_its_file_and_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0 and "usage" in capsys.readouterr().out


def test_wrong_usage(capsys):
    for arguments in ([], ["nonsense"], ["demo", "--nonsense"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    "arguments",
    ["explain --model gpt2 --seq 0", "explain --model gpt2 --batch -1", "demo --steps 0", "demo --seq 1", "bench --steps -3",
     "coverage --seq x", "kernels --jobs 0"],
)  # fmt: skip
def test_numbers_that_are_too_small_are_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == 2 and "expected a whole number of at least" in capsys.readouterr().err


def test_mistakes_become_one_line(capsys):
    assert cli.main(["explain", "--model", "gpt2", "--option", "attention.densty=1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("spt explain: unknown option") and "attention.density" in error and error.count("\n") == 1
    assert cli.main(["explain", "--model", "gtp2"]) == 1
    assert "gpt2" in capsys.readouterr().err
    assert cli.main(["finetune", "--model", "gpt2"]) == 1
    assert "--text" in capsys.readouterr().err
    assert cli.main(["explain", "--model", ""]) == 1
    assert "'' is neither a folder nor" in capsys.readouterr().err
    assert cli.main(["explain", "--model", "clip"]) == 1
    assert "no dummy input" in capsys.readouterr().err
    assert cli.main(["explain", "--model", "gpt2", "--seq", "2000", "--batch", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot run on input_ids [1, 2000]" in error and "--seq" in error


def test_finetune_begins_no_run_that_cannot_go_on(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    for wrong in (["--device", "tpu"], ["--lr", "-1"], ["--lr", "nan"]):
        arguments = ["--text", str(text), "--model", "gpt2", "--out", str(tmp_path / "out"), *wrong]
        assert cli.main(["finetune", *arguments]) == 1
        assert f"{' '.join(wrong)}" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- doctor and explain -------------------------------------------------------------------------------------------


def test_doctor(capsys):
    status = cli.main(["doctor", "--json"])
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"python", "torch", "devices", "C++ compiler", "templates", "kernel cache", "backend", "compile"} <= set(rows)
    assert status == (1 if any(row["state"] == "FAILED" for row in rows.values()) else 0)
    assert rows["compile"]["state"] == "ok", rows["compile"]["detail"]


def test_doctor_survives_a_broken_check(monkeypatch):
    def broken():
        raise RuntimeError("broken thing")

    monkeypatch.setitem(doctor._CHECKS, "devices", broken)
    rows = {name: (state, detail) for name, state, detail in doctor.checks()}
    assert rows["devices"] == ("FAILED", "RuntimeError: broken thing") and "backend" in rows


def test_no_compiler_is_noticed(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert doctor.compiler_problem()
    assert doctor._compiler()[0] == "note"


def test_explain(capsys, tmp_path):
    page = tmp_path / "sites.html"
    sizes = ["--seq", "128", "--batch", "1", "--option", "attention.min_keys=0", "--option", "ffn.min_width=0"]
    assert cli.main(["explain", "--model", "gpt2", "--json", "--html", str(page), *sizes]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {site["kind"] for site in report["sites"]} == {"attention", "ffn"}
    assert all(site["status"] == "replaced" for site in report["sites"]), report["sites"]
    assert "<table" in page.read_text()
    assert cli.main(["explain", "--model", "gpt2", *sizes]) == 0
    assert "attention 2/2" in capsys.readouterr().out


def test_coverage_counts_and_compares(capsys, tmp_path):
    table = tmp_path / "docs" / "coverage.md"
    table.parent.mkdir()
    table.write_text(f"| an old table |\n\n## Remarks\n\n{REMARKS[0]}\nbert rounds.\n\nSo it does.\n{REMARKS[1]}\n")
    arguments = ["coverage", "--types", "bert,gemma7", "--attention", "eager", "--seq", "24", "--out", str(table)]
    assert cli.main(arguments) == 1  # one of them is no architecture, which is a row and a failure
    out = capsys.readouterr().out
    assert "attention 2/2, ffn 2/2" in out and "SPTError: 'gemma7' is neither" in out
    text = table.read_text()
    assert "| bert | eager | 2 | 2 | 2 | 2 | " in text and torch.__version__ in text and transformers.__version__ in text
    assert "agrees with eager in 1 of 1" in text and "`spt coverage --types bert,gemma7 --out " in text
    assert "old table" not in text and text.endswith(f"{REMARKS[0]}\nbert rounds.\n\nSo it does.\n{REMARKS[1]}\n")


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "xlnet", "deepseek_v3"])
def test_sizes_that_follow_from_others(name):
    model, _ = models.small(name, {"vocab_size": 192})
    assert model(input_ids=torch.arange(8)[None]).logits.shape[-1] == 192


def test_coverage_says_why(capsys):
    assert cli.main(["coverage", "--types", "bitnet", "--attention", "eager", "--seq", "24", "--no-check", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["ffn_replaced"] == 0 and row["attention_replaced"] == 2 and row["masks"]
    assert any("norm or reduction" in reason for reason in row["skipped"])


def test_explain_of_a_folder(capsys, start):
    assert cli.main(["explain", "--model", start.model, "--seq", "32", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "bart", "opt", "mistral"])
def test_explain_of_many_architectures(name, capsys):
    options = ["--option", "attention.min_keys=0", "--option", "ffn.min_width=0"]
    assert cli.main(["explain", "--model", name, "--seq", "64", "--json", *options]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert any(s["status"] == "replaced" and s["kind"] == "attention" for s in sites)


# ---- console ------------------------------------------------------------------------------------------------------


def test_plain_table_and_progress():
    stream = io.StringIO()
    out = Console(stream)
    out.table("T", ("a", "bb"), [("1", 2), ("longer", None)])
    with out.progress() as progress:
        bar = progress.add("work", 40)
        for done in range(41):
            bar.update(done, "note")
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["T", "a       bb", "------  ----"]
    assert 8 <= sum(line.startswith("work") for line in lines) <= 12 and lines[-1] == "work 40/40 note"
    assert format_table("", ("x",), []) == "x"


def test_rich_table_escapes_markup():
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    out = Console(stream)
    out.table("T", ("a",), [("[64, 16] [bold]",)])
    assert "[64, 16] [bold]" in stream.getvalue()
    with out.progress() as progress:
        progress.add("[x]", 2).update(2, "[/x]")


def test_formats():
    assert console.format_seconds(0.0123) == "12.3 ms" and console.format_seconds(2.5) == "2.50 s"
    assert console.format_bytes(3 * 2**20) == "3.0 MiB" and console.format_bytes(None) == console.format_seconds(None) == "-"


# ---- data ---------------------------------------------------------------------------------------------------------


def test_texts_are_on_every_machine_and_do_not_overlap():
    assert len(training.english_bytes()) > 200_000
    code, heldout = training.code_bytes(training.CODE_MODULES), training.code_bytes(training.HELD_OUT_MODULES)
    assert len(code) > 1_000_000 and len(heldout) > 100_000
    assert not set(training.CODE_MODULES) & set(training.HELD_OUT_MODULES)
    assert training.byte_tokens(b"\x00\xff").tolist() == [0, 255]
    with pytest.raises(SPTError, match="standard library"):
        training.code_bytes(["no_such_module_anywhere"])


def test_batches_depend_on_seed_and_step_alone(start):
    tokens = torch.arange(500)
    assert torch.equal(training.sample(tokens, start, 3), training.sample(tokens, start, 3))
    assert not torch.equal(training.sample(tokens, start, 3), training.sample(tokens, start, 4))
    other = dataclasses.replace(start, seed=1)
    assert not torch.equal(training.sample(tokens, start, 3), training.sample(tokens, other, 3))
    batches = list(training.heldout_batches(tokens, start))
    assert [tuple(b.shape) for b in batches] == [(2, 32), (2, 32)] and batches[-1][-1, -1] == 499


def test_short_text_is_refused(tmp_path):
    with pytest.raises(SPTError, match="5 tokens.*33"):
        training.write_data(tmp_path / "d", torch.arange(100), torch.arange(5), 32)


# ---- training -----------------------------------------------------------------------------------------------------


def test_training_reports_and_saves(start):
    events = []
    result = training.train(start, events.append)
    assert result["finished"] and len(result["history"]["losses"]) == 6
    assert result["history"]["losses"][-1] < result["history"]["losses"][0]
    assert [done for done, _ in result["history"]["heldout"]] == [3, 6]
    assert result["saved_bytes"] > 10_000 and result["peak_bytes"] > 10_000_000 and result["step_seconds"] > 0
    assert [e["done"] for e in events if e["event"] == "step"] == list(range(7))
    out = Path(start.out)
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-00000006"]  # older ones are gone
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert not any(name.startswith("_orig_mod") for name in model.state_dict())


@pytest.mark.parametrize("backend", ["none", "eager", "spt"])
def test_interrupted_and_resumed_equals_uninterrupted(start, tmp_path, backend):
    options = {"backend": backend, "options": SPARSE if backend == "spt" else {}}
    whole = training.train(dataclasses.replace(start, out=str(tmp_path / "whole"), **options), quiet)
    torch._dynamo.reset()

    run = dataclasses.replace(start, out=str(tmp_path / "cut"), **options)
    steps = []

    def stop_after_third():
        steps.append(1)
        return len(steps) == 3

    first = training.train(run, quiet, stop_after_third)
    assert not first["finished"] and len(first["history"]["losses"]) == 3
    torch._dynamo.reset()
    second = training.train(run, quiet)
    assert second["history"]["losses"] == whole["history"]["losses"]
    assert second["history"]["heldout"] == json.loads(json.dumps(whole["history"]["heldout"]))
    assert second["heldout_loss"] == whole["heldout_loss"]
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n / "model") for n in ("whole", "cut"))
    for (name, expected), actual in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), name


def test_half_written_checkpoint_is_ignored(start, monkeypatch):
    training.train(start, quiet, lambda: True)
    before = training.newest_checkpoint(Path(start.out))

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        training.train(start, quiet)
    monkeypatch.undo()
    assert training.newest_checkpoint(Path(start.out)) == before
    result = training.train(start, quiet)
    assert result["finished"] and not list(Path(start.out).glob(".tmp-*"))


def test_checkpoint_of_another_run_is_refused(start):
    training.train(start, quiet, lambda: True)
    with pytest.raises(StateError, match="learning_rate.*0.001.*0.5"):
        training.train(dataclasses.replace(start, learning_rate=0.5), quiet)
    longer = training.train(dataclasses.replace(start, steps=8), quiet)  # more steps are fine
    assert len(longer["history"]["losses"]) == 8


def test_damaged_checkpoint_is_named(start):
    training.train(start, quiet, lambda: True)
    path = training.newest_checkpoint(Path(start.out)) / "training.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StateError, match="checkpoint-00000001 is damaged"):
        training.train(start, quiet)


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(start):
    run = dataclasses.replace(start, learning_rate=1e30, warmup=1)
    with pytest.raises(SPTError, match="--lr"):
        training.train(run, quiet)


def test_exact_check(start):
    training.train(dataclasses.replace(start, steps=2), quiet)
    outcome = training.exact_check(str(Path(start.out) / "model"), start.data, 32, SPARSE)
    assert outcome["passed"], outcome
    assert 0 <= outcome["logits"] < 1e-4 and 0 <= outcome["gradient"] < 1e-3


def test_saved_bytes_counts_activations_once():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    loss = layer(x).exp().sum()  # keeps x and the exponential; the weight is the model's own
    assert training.saved_bytes(loss, layer) == 2 * 4 * 8 * 4


def test_median_step_leaves_out_compilation():
    history = training.History(seconds=[30, 2, 2, 1, 1, 20, 2, 2, 1, 1], losses=[0] * 10, compile_steps=[0, 5])
    assert training.median_step(history) == 1 and training.compile_seconds(history) == 29
    assert training.median_step(training.History()) is None


# ---- comparison ---------------------------------------------------------------------------------------------------


def result_of(name, factor):
    history = {
        "losses": [3.0, 2.0, 1.0 * factor], "seconds": [9.0, factor, factor],
        "heldout": [[3, 2.0]], "compile_steps": [0],
    }  # fmt: skip
    return {
        "name": name, "history": history, "step_seconds": factor, "peak_bytes": 100 * factor, "saved_bytes": 0,
        "compile_seconds": 8.0, "train_loss": 2.0, "heldout_loss": None, "sites": [],
    }  # fmt: skip


def site(kind, path, **values):
    row = {"kind": kind, "path": path, "where": "m.py:1", "status": "replaced", "reason": None}
    return {**row, "density": 0.25, "executed": 0.4375, "lowering": "cpu", **values}


SITES = [
    site("attention", "h.0.attn"),
    site("attention", "h.1.attn"),
    site("ffn", "h.1.mlp", status="skipped", reason="width <script> 60", density=None, executed=None, lowering=""),
]


def test_report(tmp_path, start):
    results = {"dense": result_of("dense", 1.0), "spt": {**result_of("spt", 0.5), "sites": SITES}}
    check = {"logits": 1e-7, "gradient": 1e-5, "parameter": "wte.weight", "passed": True}
    stream = io.StringIO()
    paths = compare.finish(Console(stream), tmp_path, "title & more", ["intro"], results, check, start, 1.0)
    text = stream.getvalue()
    assert "attention 2/2, ffn 0/1" in text and "skipped 1 x ffn: width <script> 60 (e.g. h.1.mlp)" in text
    assert re.search(r"median step +1\.00 s +500\.0 ms +0\.500", text) and "exact check passed" in text
    assert "h.0.attn .. h.1.attn (2)" in text
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "title &amp; more" in page and "http" not in page
    assert json.loads((tmp_path / "report.json").read_text())["results"]["spt"]["step_seconds"] == 0.5
    if (tmp_path / "losses.png") in paths:
        assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG") and "data:image/png;base64" in page


def test_report_without_matplotlib(tmp_path, start, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    stream = io.StringIO()
    paths = compare.finish(Console(stream), tmp_path, "t", [], {"dense": result_of("dense", 1.0)}, None, start, 1.0)
    assert "matplotlib" in stream.getvalue() and [p.name for p in paths] == ["report.json", "report.html"]


# ---- processes ----------------------------------------------------------------------------------------------------


def fails_with(message, *, report, should_stop):
    raise SPTError(message)


def dies(*, report, should_stop):
    os._exit(9)


def doubles(value, *, report, should_stop):
    report({"event": "step", "done": 1, "loss": 0.5})
    return 2 * value


def test_workers_return_values_and_failures():
    context = __import__("multiprocessing").get_context("fork" if sys.platform == "linux" else "spawn")
    out = Console(io.StringIO())
    jobs = [workers.Job("a", 1, doubles, (3,)), workers.Job("b", 1, doubles, (4,))]
    assert workers.call(context, jobs, out) == [6, 8]
    with pytest.raises(SPTError, match="c: no such thing"):
        workers.call(context, [workers.Job("c", 1, fails_with, ("no such thing",))], out)
    with pytest.raises(SPTError, match="status 9"):
        workers.call(context, [workers.Job("d", 1, dies, ())], out)


def lacks(package, *, report, should_stop):
    raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def test_missing_packages_are_named_with_their_extra():
    context = __import__("multiprocessing").get_context("fork" if sys.platform == "linux" else "spawn")
    with pytest.raises(SPTError, match=r"needs transformers: pip install 'spt_compiler\[hf\]'"):
        workers.call(context, [workers.Job("e", 1, lacks, ("transformers",))], Console(io.StringIO()))
    assert cli.missing_extra(ModuleNotFoundError("x", name="torch.foo")) is None


def spt(*arguments, **kwargs):
    """The command line in a process that ctrl-c reaches: what a shell starts in the background inherits an ignored SIGINT."""
    return subprocess.Popen(
        [sys.executable, "-m", "spt_compiler", *map(str, arguments)], text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs,
    )  # fmt: skip


@pytest.mark.slow
def test_demo_quick(tmp_path):
    process = spt("demo", "--quick", "--out", tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "attention 2/2" in output and "ffn 2/2" in output and "exact check passed" in output
    for name in (
        "report.html",
        "report.json",
        "losses.png",
        "spt/model/model.safetensors",
        "spt/model/spt_state.safetensors",
    ):
        assert (tmp_path / name).exists(), output


@pytest.mark.slow
def test_demo_without_a_compiler(tmp_path):
    sizes = ["--steps", 2, "--pretrain-steps", 1, "--seq", 128]
    process = spt("demo", *sizes, "--out", tmp_path, env={**os.environ, "CXX": "/nonexistent/c++"})
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "no C++ compiler" in output and "inner=aot_eager" in output
    assert json.loads((tmp_path / "report.json").read_text())["run"]["backend"] == "aot_eager"


@pytest.mark.slow
def test_finetune_interrupted_by_ctrl_c_goes_on_where_it_was(tmp_path, start):
    text = tmp_path / "text.txt"
    text.write_bytes(training.english_bytes()[:6000])
    common = [
        "--text",
        text,
        "--model",
        start.model,
        "--steps",
        40,
        "--seq",
        32,
        "--checkpoint-every",
        5,
        "--inner",
        "eager",
    ]
    for key, value in SPARSE.items():
        if key != "inner":
            common += ["--option", f"{key}={json.dumps(value)}"]

    process = spt("finetune", *common, "--out", tmp_path / "cut")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(r"spt +(8|12)/40", line):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in rest, "".join(lines) + rest
    [checkpoint] = (tmp_path / "cut" / "spt").glob("checkpoint-*")
    assert 8 <= int(checkpoint.name[-8:]) < 40

    refused = spt("finetune", *common, "--out", tmp_path / "cut")
    assert "--resume" in refused.communicate(timeout=120)[0] and refused.returncode == 1
    resumed = spt("finetune", "--resume", "--out", tmp_path / "cut")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0 and "resumed after step" in output, output

    whole = spt("finetune", *common, "--out", tmp_path / "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    for name in ("dense", "spt"):
        a, b = (json.loads((tmp_path / n / name / "result.json").read_text()) for n in ("cut", "whole"))
        assert a["history"]["losses"] == b["history"]["losses"], name


@pytest.mark.slow
def test_finetune_with_a_tokenizer(tmp_path, start):
    tokenizers = pytest.importorskip("tokenizers")
    words = sorted(set("the quick brown fox jumps over a lazy dog".split()))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate([*words, "[UNK]"])}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(start.model)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog\n" * 60)
    arguments = ["--steps", 4, "--seq", 16, "--inner", "eager", "--only", "spt", "--out", tmp_path / "out"]
    process = spt("finetune", "--text", text, "--model", start.model, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "spt" / "model")
    assert again("the fox")["input_ids"] == fast("the fox")["input_ids"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "spt" / "model")


@pytest.mark.slow
def test_worker_does_not_outlive_its_parent(tmp_path, start):
    text = tmp_path / "text.txt"
    text.write_bytes(training.english_bytes()[:6000])
    arguments = ["--steps", 100000, "--seq", 32, "--inner", "eager", "--only", "dense", "--out", tmp_path / "out"]
    process = spt("finetune", "--text", text, "--model", start.model, *arguments)
    for line in process.stdout:
        if line.startswith("dense") and "0/" in line:
            break
    time.sleep(3)
    process.kill()
    process.wait()
    # An orphan notices at its next report, and still saves; one that lived on would checkpoint again and again.
    deadline, newest = time.monotonic() + 30, None
    while time.monotonic() < deadline:
        before, newest = newest, training.newest_checkpoint(tmp_path / "out" / "dense")
        if newest is not None and newest == before:
            break
        time.sleep(3)
    assert newest is not None and newest == before


# ---- bench --------------------------------------------------------------------------------------------------------


def test_bench_table():
    from spt_compiler.benchmarks import passes
    from spt_compiler.cli import bench

    row = {"family": "gpt2", "layers": 12, "stages": dict.fromkeys(passes.STAGES, 0.02), "ours": 0.1}
    memory = {"peak_bytes": 2**21, "saved_bytes": 2**20}
    turns = {name: {"step": 1.0, "forward": 0.5, "backward": 0.25} for name in ("dense", "spt")}
    results = {
        "passes": passes.summary([row, {**row, "layers": 48, "ours": 0.2, "inductor": 10.0, "share": 0.02}]),
        "wrapper": {
            "layers": 12,
            "goal_us": 50,
            "model": {"wrapper_us": 40.4, "maintenance_us": 3.0},
            "blocks": {"wrapper_us": 60.0, "maintenance_us": 3.0},
        },
        "finetune": {"turns": {**turns, "ratio": 0.5}, "memory": {"dense": memory, "spt": memory}, "conditions": "here"},
    }
    rows = {name: value for name, value, _ in bench.table_rows(results)}
    assert rows["our stages, gpt2, 12 layers"] == "100.0 ms"
    assert rows["our stages, gpt2, 48 layers"] == "200.0 ms, 2.0% of Inductor's 10.00 s"
    assert "gpt2: 4 times the layers take 2.0 times as long" in passes.table(results["passes"])
    assert rows["wrapper per step, 12 layers, one graph"] == "40 us (+ 3 us upkeep)"
    assert rows["step time, spt against dense"] == "1.00 s against 1.00 s: 0.50"
    assert rows["peak memory, spt against dense"] == "2.0 MiB against 2.0 MiB: 1.00"
    assert bench.table_rows({"passes": {"skipped": "no C++ compiler"}})[0][1] == "no C++ compiler"


def test_bench_hands_quality_over(monkeypatch, tmp_path):
    main = pytest.importorskip("spt_compiler.benchmarks.quality.__main__")
    calls = []
    monkeypatch.setattr(main, "main", calls.append)
    assert cli.main(["bench", "--only", "quality", "--quick", "--out", str(tmp_path)]) == 0
    assert calls == [["--quick", "--out", str(tmp_path / "quality_quick")]]


def test_wrapper_clock_splits_a_call():
    from spt_compiler.benchmarks.wrapper import _Clock

    class Graph:
        def __init__(self):
            self.inner = lambda value: time.sleep(0.02) or value + 1

        def __call__(self, value):
            time.sleep(0.005)
            self._maintain(value)
            return self.inner(value)

        def _maintain(self, value):
            time.sleep(0.01)

    clock, graph = _Clock(), Graph()
    with clock.installed(Graph):
        assert graph(1) == 2 and graph(2) == 3
    assert clock.calls == 2 and clock.inner >= 0.04 and clock.maintenance >= 0.02
    assert clock.total - clock.inner - clock.maintenance >= 0.01
    graph(1)
    assert clock.calls == 2  # taken out again
