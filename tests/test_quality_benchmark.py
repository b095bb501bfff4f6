"""The quality benchmark: its baselines are what they claim, it resumes, and its verdicts can fail."""

from __future__ import annotations

import copy
import importlib
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from spt_compiler import pq  # noqa: E402
from spt_compiler.benchmarks.quality import attention, goals, parts, report, texts, tuning  # noqa: E402
from spt_compiler.benchmarks.quality.subjects import Heads  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def codebook(k: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
    """As a site's state holds it, fitted to the keys themselves."""
    keys = k[0]
    return {"key_mean": keys.mean(1), "codebook": pq.fit(keys - keys.mean(1, keepdim=True), keys.shape[-1] // width, 16)}


def layer(*, causal: bool, n: int = 300) -> attention._Layer:
    tiles = 1.5 * torch.randn(1, 2, -(-n // 16), 16)  # keys of a tile have something in common
    k = tiles.repeat_interleave(16, dim=2)[:, :, :n] + torch.randn(1, 2, n, 16)
    q, v = torch.randn(1, 4, n, 16), torch.randn(1, 2, n, 16)
    codebooks = {"pq": codebook(k, 4), "pq-match": codebook(k, 8)}
    return attention._Layer(Heads(2 * q, k, v, 0.25), codebooks, causal=causal, seed=0)


@pytest.mark.parametrize("causal", [False, True])
def test_rules_keep_their_budget(causal):
    it = layer(causal=causal)
    seen = it.allowed.sum(-1)
    for density in attention.DENSITIES:
        wanted = attention._ceil(density * it.n)
        for rule in attention.KEY_RULES:
            kept = (it._kept(rule, density) & it.allowed).sum(-1)
            assert torch.equal(kept, seen.clamp(max=wanted)), (rule, density)
        pairs = {rule: int((it._kept(rule, density) & it.allowed).sum()) for rule in attention.TILE_RULES}
        # Tiles on the diagonal are partly visible, so equal numbers of tiles are nearly equal numbers of pairs.
        assert max(pairs.values()) <= 1.1 * min(pairs.values()), (density, pairs)


@pytest.mark.parametrize("causal", [False, True])
def test_the_oracle_keeps_most_and_everything_costs_nothing(causal):
    it = layer(causal=causal)
    for rules in (attention.TILE_RULES, attention.KEY_RULES):
        mass = {rule: it.quality(rule, 1 / 4)[0] for rule in rules}
        assert max(mass, key=lambda rule: mass[rule]) == rules[0]
        assert mass[rules[0]] > mass[rules[-1]] + 0.01, mass
        for rule in rules:
            whole, error = it.quality(rule, 1.0)
            assert whole == pytest.approx(1, abs=1e-5) and error < 1e-5, rule


def test_window_mask_is_causal_and_holds_the_sink():
    mask = tuning.window_mask(300, 1 / 4)[0, 0]
    assert not mask.triu(1).any() and mask.diagonal().all() and mask[:, 0].all()
    assert not mask[-1, 16:200].any(), "nothing between the sink and the window"


def test_texts_are_disjoint():
    for domain in ("english", "code"):
        train, heldout = texts.tokens(domain)
        probe = bytes(heldout[5000:5200].tolist())
        assert probe not in bytes(train.tolist())
    batch = texts.batch(heldout, (3, 50), seed=1)
    assert batch.shape == (3, 50) and torch.equal(batch, texts.batch(heldout, (3, 50), seed=1))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smallest plan: three models, selection, and fine-tuning of two variants."""
    out = tmp_path_factory.mktemp("quality")
    lines: list[str] = []
    bench = parts.Bench(parts.Plan.smoke(), out, minilm=None, model=None, log=lines.append)
    bench.run(("models",))
    bench.run(("selection",), "code")
    for variant in ("dense", "balanced"):
        bench.run(("parity",), f"full.{variant}")
    return bench


def test_runs_resumes_and_reports(smoke):
    before = {path.name: path.stat().st_mtime_ns for path in smoke.out.glob("*.json")}
    assert len(before) == 3 + 1 + 2
    smoke.run(("models", "selection"), "code")
    assert {path.name: path.stat().st_mtime_ns for path in smoke.out.glob("*.json")} == before

    results = json.loads(json.dumps(parts.collect(smoke)))
    rules = results["units"]["selection.llama-code-128"]["value"]["rules"]
    assert set(rules) == set(attention.RULES)
    assert all(0 < mass <= 1.0001 for by_density in rules.values() for mass, _ in by_density.values())
    pages = [path for path in report.write(results, smoke.out) if path.suffix == ".md"]
    text = pages[0].read_text()
    assert "llama LM, code, 128" in text and "Not measured in this run" in text
    pages[0].write_text(text.replace(report.REMARKS[0], f"{report.REMARKS[0]}\nWe tried this.", 1))
    report.write(results, smoke.out)
    assert "We tried this." in pages[0].read_text(), "remarks survive a rewrite"


def test_a_given_model_is_fine_tuned_on_text_in_its_own_tokens(smoke, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "given-lm"
    shutil.copytree(smoke.models / "llama-code", folder)
    words = Tokenizer(models.WordLevel({"the": 7, "other": 3}, unk_token="other"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "other"}')
    train, heldout = texts.read_by(folder, "english")
    assert set(train.tolist()) == set(heldout.tolist()) == {7, 3} and len(train) < len(texts.tokens("english")[0]) / 3
    assert torch.equal(texts.read_by(smoke.models / "llama-code", "english")[0], texts.tokens("english")[0])

    bench = parts.Bench(parts.Plan.smoke(), tmp_path / "out", minilm=None, model=folder, log=lambda line: None)
    bench.run(("parity",), "given.lora.dense")
    units = parts.collect(bench)["units"]
    assert list(goals.parity_runs(units)) == [("given-lm", "lora")]
    assert "given-lm, LoRA" in goals.judge(units)[-2][0]


def test_a_budget_becomes_a_plan_once_and_a_run_keeps_to_it(tmp_path, monkeypatch):
    asked = []

    def step_seconds(size):
        asked.append(size)
        return 1.0

    monkeypatch.setattr(parts.language_models, "step_seconds", step_seconds)
    share = parts.share_for(tmp_path, 180)
    assert share == int(100 * 180 * 60 / parts.FULL_STEPS) / 100 and 0 < share < 1
    assert parts.share_for(tmp_path, None) == parts.share_for(tmp_path, 180) == share and len(asked) == 1
    with pytest.raises(ValueError, match="holds a run for 180 minutes.*asks for 45.*--out"):
        parts.share_for(tmp_path, 45)
    short, full = parts.Plan.of_share(share), parts.Plan.of_share(1.0)
    assert full == parts.Plan(heldout=8, minilm=8) and short.code_steps == round(4000 * share) and short.size == full.size
    assert parts.share_for(tmp_path / "long", 10**6) == 1.0


def _figures() -> dict:
    """Figures that reach every goal."""
    rules = {rule: {f"{d:.4f}": [0.5, 0.1] for d in attention.DENSITIES} for rule in attention.RULES}
    run = {"heldout": [[1, 2.0], [2, 1.0]]}
    units = {
        "selection.a": {"name": "a", "rules": rules},
        "ffn.minilm.50": {"routers": {"learned": {"token_cosine": 0.91, "cosine": 0.95}}},
        "guard": {
            **{"interval": 4, "margin": 1.5, "false_alarms": 0, "checks": 8},
            "spoiled": {
                "x/ffn/0": {"before": 0.1, "error": 0.5, "steps": 3, "others": {}},
                "y/ffn/0": {"before": 0.1, "error": 0.14, "steps": None, "others": {}},  # not harmed
            },
        },
        **{f"parity.llama.full.{name}.0": dict(run) for name in ("dense", "balanced", "static")},
    }
    return {name: {"value": value} for name, value in units.items()}


def test_verdicts():
    rows = goals.judge(_figures())
    assert len(rows) == 7 and all(verdict == "reached" for _, _, verdict in rows), rows

    def broken(name: str, *path, value) -> list[str]:
        units = copy.deepcopy(_figures())
        target = units[name]["value"]
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        return [goal for goal, _, verdict in goals.judge(units) if "not reached" in verdict]

    assert len(broken("selection.a", "rules", "pq token", "0.1250", value=[0.459, 0.1])) == 1
    assert broken("selection.a", "rules", "pq token", "0.1250", value=[0.461, 0.1]) == []
    assert len(broken("selection.a", "rules", "pq tile", "0.0625", value=[0.489, 0.1])) == 1
    assert len(broken("ffn.minilm.50", "routers", "learned", "token_cosine", value=0.89)) == 1
    assert len(broken("guard", "spoiled", "x/ffn/0", "steps", value=None)) == 1
    assert len(broken("guard", "spoiled", "y/ffn/0", "error", value=0.16)) == 1
    assert len(broken("guard", "spoiled", "x/ffn/0", "others", value={"y/ffn/0": 0.5})) == 1
    assert len(broken("parity.llama.full.balanced.0", "heldout", value=[[2, 1.011]])) == 2
    assert len(broken("parity.llama.full.balanced.0", "heldout", value=[[2, 1.001]])) == 1
    assert all(verdict == "open" for _, _, verdict in goals.judge({}))


def test_command_line_explains_itself(capsys):
    main = importlib.import_module("spt_compiler.benchmarks.quality.__main__")
    with pytest.raises(SystemExit) as done:
        main.main(["--help"])
    assert done.value.code == 0 and "--budget" in capsys.readouterr().out
