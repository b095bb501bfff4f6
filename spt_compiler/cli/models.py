"""Models and dummy inputs for the command line: from an architecture name, or from a local folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch

from spt_compiler.errors import SPTError

# Sizes by the names that configurations use for them; a configuration takes those it knows.
_TINY: dict[str, Any] = {
    "hidden_size": 128, "d_model": 128, "n_embd": 128, "dim": 128, "word_embed_proj_dim": 128,
    "intermediate_size": 256, "d_ff": 256, "ffn_dim": 256, "n_inner": 256, "hidden_dim": 256,
    "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
    "num_hidden_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "n_layer": 2, "n_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "head_dim": 32, "d_kv": 32, "max_position_embeddings": 1024, "n_positions": 1024,
    "rotary_dim": 16, "embedding_size": 128, "d_inner": 256, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24,
    "kv_lora_rank": 32, "q_lora_rank": 48,
}  # fmt: skip


def load(model: str, *, full: bool = False) -> tuple[Any, Any]:
    """Builds a model for `spt explain`.

    Args:
        model: an architecture name of transformers ("gpt2", "bert", "llama", ...) or a folder with a `config.json`.
        full: for a name, the size its configuration defaults to instead of a tiny one.
    Returns: (model, config). Weights are random unless the folder holds some.
    Raises: SPTError if it is neither; ModuleNotFoundError without transformers.
    """
    import transformers

    folder = Path(model)
    if model and folder.is_dir():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        auto = _auto_class(config)
        has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        return (auto.from_pretrained(folder, local_files_only=True) if has_weights else auto.from_config(config)), config
    config = config_for(model, {} if full else _TINY)
    return _auto_class(config).from_config(config), config


def small(model_type: str, sizes: dict[str, Any]) -> tuple[Any, Any]:
    """A tiny random model of an architecture without dropout, and its configuration; `sizes` adds to the usual ones.

    Raises: as `load`.
    """
    config = config_for(model_type, {**_TINY, **sizes})
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return _auto_class(config).from_config(config), config


def config_for(model_type: str, sizes: dict[str, Any]) -> Any:
    """A configuration of architecture `model_type` with those of `sizes` that it has.

    Raises: SPTError for an unknown name, with the nearest.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = list(CONFIG_MAPPING.keys())
    if model_type not in names:
        near = difflib.get_close_matches(model_type, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "examples: gpt2, llama, bert, t5, vit"
        raise SPTError(f"{model_type!r} is neither a folder nor an architecture of transformers; {hint}")
    default = transformers.AutoConfig.for_model(model_type)
    attributes = getattr(default, "attribute_map", {})
    chosen: dict[str, Any] = {}
    for name, value in sizes.items():
        known = getattr(type(default), name, None)
        if isinstance(getattr(default, name, None), (list, tuple)) or (isinstance(known, property) and not _takes(default, name)):
            continue  # a number a stage, or one that follows from others
        # `hidden_size` may be another spelling of `n_embd`: give each attribute once.
        if hasattr(default, name) and attributes.get(name, name) not in chosen:
            chosen[attributes.get(name, name)] = value
    if "qk_rope_head_dim" in chosen:
        chosen.pop("head_dim", None)  # the rotated part of a head, which another name gives
    if hasattr(default, "attention_types"):  # [[kinds of one period], repetitions], as many as layers
        period = default.attention_types[0][0]
        chosen["attention_types"] = [[list(period), chosen.get("num_layers", default.num_layers) // len(period)]]
    # Ids of special tokens beyond a small vocabulary would only cause warnings.
    vocabulary = chosen.get("vocab_size")
    if vocabulary is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            token = getattr(default, name, None)
            if isinstance(token, int) and token >= vocabulary:
                chosen[name] = None if name == "pad_token_id" else 0
    return transformers.AutoConfig.for_model(model_type, **chosen)


def _takes(config: Any, name: str) -> bool:
    """Whether a property of a configuration may be set."""
    try:
        setattr(config, name, getattr(config, name))
    except (AttributeError, NotImplementedError):
        return False
    return True


def _auto_class(config: Any) -> Any:
    """The head that people fine-tune this architecture with, most specific first."""
    import transformers
    from transformers.models.auto import modeling_auto

    for auto, mapping in (
        (transformers.AutoModelForSeq2SeqLM, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
        (transformers.AutoModelForMaskedLM, "MODEL_FOR_MASKED_LM_MAPPING"),
        (transformers.AutoModelForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING"),
        (transformers.AutoModelForImageClassification, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
        (transformers.AutoModelForAudioClassification, "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING"),
    ):
        if type(config) in getattr(modeling_auto, mapping):
            return auto
    return transformers.AutoModel


def dummy_inputs(model: Any, config: Any, *, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random inputs such as a trainer would pass.

    Args:
        model: a transformers model.  config: its configuration.  batch, length: sizes of text inputs.
    Returns: keyword arguments of the model; text gets an `attention_mask` of ones, as tokenizers give it.
    Raises: SPTError for a kind of input that is neither text nor images.
    """
    name = model.main_input_name
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if name == "input_ids":
        ids = torch.randint(2, max(int(text.vocab_size), 3), (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
        return inputs
    if name == "pixel_values" and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", 64)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {name: torch.randn(batch, config.num_channels, height, width)}
    raise SPTError(
        f"{type(model).__name__} takes {name!r}, for which this command has no dummy input; "
        "call spt_compiler.explain(model, ...) with an input of your own"
    )
