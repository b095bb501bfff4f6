from __future__ import annotations

import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import spt_compiler  # noqa: E402
from spt_compiler.errors import OptionError  # noqa: E402
from spt_compiler.integrations import accelerate as integration  # noqa: E402
from spt_compiler.integrations.transformers import STATE_FILE, SptCallback, summarise  # noqa: E402

EAGER = {"inner": "eager", "attention.min_keys": 0, "ffn.min_width": 0, "attention.tile": [16, 8]}


@pytest.fixture
def enabled():
    integration.enable()
    yield
    integration.disable()


def tiny_gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = torch.randint(64, (48,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(folder, model, callbacks=(), **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_steps": 3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    settings.update(arguments)
    arguments = transformers.TrainingArguments(**settings)
    return transformers.Trainer(model, arguments, train_dataset=Words(), eval_dataset=Words(), callbacks=list(callbacks))


# ---- accelerate ---------------------------------------------------------------------------------------------------


def test_accelerate_knows_the_backend_only_after_enable():
    from accelerate.utils import DynamoBackend

    with pytest.raises(ValueError, match="SPT"):
        DynamoBackend("SPT")
    integration.enable()
    integration.enable()
    try:
        member = DynamoBackend("SPT")
        assert member is DynamoBackend("SPT") and member.value.lower() == "spt" and member != DynamoBackend.NO
        assert [b for b in DynamoBackend if b == member] == []  # the closed list itself is as it was
    finally:
        integration.disable()
    with pytest.raises(ValueError, match="SPT"):
        DynamoBackend("SPT")
    with pytest.raises(ValueError, match="nonsense"):
        DynamoBackend("nonsense")


def test_plugin_passes_options(enabled):
    from accelerate.utils import TorchDynamoPlugin

    plugin = TorchDynamoPlugin(backend="spt", options={"attention.density": 0.5})
    assert plugin.to_kwargs() == {"backend": "spt", "options": {"attention.density": 0.5}}


def test_training_arguments_reach_the_backend(enabled, tmp_path, monkeypatch):
    for name, value in {
        "INNER": "eager",
        "ATTENTION_MIN_KEYS": "0",
        "FFN_MIN_WIDTH": "0",
        "ATTENTION_TILE": "16x8",
    }.items():
        monkeypatch.setenv(f"SPT_{name}", value)
    model = tiny_gpt2()
    run = trainer(tmp_path, model, torch_compile_backend="spt", save_strategy="no", max_steps=2)
    run.train()
    assert len(spt_compiler.metrics(model)) >= 2


# ---- Trainer ------------------------------------------------------------------------------------------------------


def test_compiled_model_trains_and_saves_clean_keys(tmp_path):
    model = tiny_gpt2()
    names = set(model.state_dict())
    model.compile(backend="spt", options=EAGER)
    run = trainer(tmp_path, model, save_strategy="no")
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    run.train()
    assert not torch.equal(before, model.transformer.h[0].mlp.c_fc.weight)
    run.save_model(str(tmp_path / "saved"))
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert set(again.state_dict()) == names
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_callback_compiles_logs_and_keeps_state(tmp_path):
    model = tiny_gpt2()
    run = trainer(tmp_path, model, [SptCallback(EAGER)])
    run.train()
    assert len(spt_compiler.metrics(model)) == 4  # attention and FFN of two layers
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert logged[-1]["spt_attention_sites"] == 2 and logged[-1]["spt_ffn_sites"] == 2
    assert 0 < logged[-1]["spt_attention_density"] <= 1
    assert (tmp_path / "checkpoint-3" / STATE_FILE).exists() and (tmp_path / "checkpoint-6" / STATE_FILE).exists()


def test_callback_resumes_exactly(tmp_path):
    model = tiny_gpt2()
    trainer(tmp_path / "whole", model, [SptCallback(EAGER)]).train()
    torch._dynamo.reset()

    again = tiny_gpt2()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    trainer(tmp_path / "resumed", again, [SptCallback(EAGER)]).train(resume_from_checkpoint=True)
    for (name, expected), actual in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), name


@pytest.mark.parametrize("loaded", [False, True])
def test_resuming_from_elsewhere_is_exact_once_the_state_is_read(tmp_path, caplog, loaded):
    model = tiny_gpt2()
    trainer(tmp_path / "whole", model, [SptCallback(EAGER)], max_steps=6).train()
    torch._dynamo.reset()
    again, checkpoint = tiny_gpt2(), tmp_path / "whole" / "checkpoint-3"
    if loaded:
        spt_compiler.load_state(again, checkpoint / STATE_FILE)
    trainer(tmp_path / "resumed", again, [SptCallback(EAGER)]).train(resume_from_checkpoint=str(checkpoint))
    assert ("learn anew" in caplog.text) is not loaded
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values())) is loaded


def test_callback_leaves_a_compiled_model_alone_and_checks_options(tmp_path):
    with pytest.raises(OptionError, match="attention.density"):
        SptCallback({"attention.densty": 1})
    with pytest.raises(ValueError, match="compile=True"):
        SptCallback(compile=False, auxiliary_weight=0.1)
    model = tiny_gpt2()
    model.compile(backend="eager")
    call = model._compiled_call_impl
    trainer(tmp_path, model, [SptCallback(EAGER)], max_steps=1, save_strategy="no").train()
    assert model._compiled_call_impl is call and not spt_compiler.metrics(model)


def test_the_best_model_comes_with_its_state(tmp_path):
    """Evaluated again, it is as good as when it was found best."""
    model = tiny_gpt2()
    run = trainer(
        tmp_path, model, [SptCallback(EAGER)], max_steps=8, save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert not run.state.best_model_checkpoint.endswith("-8")
    expected = spt_compiler.state.load(f"{run.state.best_model_checkpoint}/{STATE_FILE}")
    assert all(torch.equal(expected[name], value) for name, value in spt_compiler.state_dict(model).items())
    assert run.evaluate()["eval_loss"] == run.state.best_metric


def test_options_that_the_callback_does_not_use_are_named(tmp_path, caplog):
    model = spt_compiler.compile(tiny_gpt2(), **EAGER)
    trainer(tmp_path, model, [SptCallback({"ffn.density": 0.25})], max_steps=1, save_strategy="no").train()
    assert "options of SptCallback are not used" in caplog.text
    caplog.clear()
    run = trainer(tmp_path, tiny_gpt2(), [SptCallback(EAGER)], max_steps=1, save_strategy="no")
    run.train()
    run.train()
    assert "not used" not in caplog.text


def test_callback_adds_the_auxiliary_loss(tmp_path):
    options = {**EAGER, "preset": "paper"}
    losses = []
    for weight in (0.0, 10.0):
        torch._dynamo.reset()
        callback = SptCallback(options, auxiliary_weight=weight)
        run = trainer(tmp_path / str(weight), tiny_gpt2(), [callback], max_steps=4, logging_steps=4, save_strategy="no")
        losses.append(run.train().training_loss)
    assert losses[1] > losses[0]


def test_summarise():
    rows = {
        "h.0.attn/attention/0": {"density": 0.25, "rel_error": 0.1},
        "h.1.attn/attention/0": {"density": 1.0},
        "h.0.mlp/ffn/0": {"density": 0.5},
    }
    assert summarise(rows) == {
        "spt_attention_sites": 2, "spt_attention_density": 0.625, "spt_attention_rel_error": 0.1,
        "spt_ffn_sites": 1, "spt_ffn_density": 0.5,
    }  # fmt: skip
    assert summarise({}) == {}
