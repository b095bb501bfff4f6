"""Models of the measurements: random weights, built from configurations."""

from __future__ import annotations

from typing import Any

import torch


def gpt2(*, layers: int, width: int, heads: int, length: int) -> Any:
    """An unmodified GPT-2 over bytes, in training mode, dropout zero (else the dense side loses its fused kernel)."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=length, n_embd=width, n_layer=layers, n_head=heads, use_cache=False,
        bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).train()


def llama(*, layers: int, width: int, heads: int, length: int) -> Any:
    """An unmodified Llama over bytes, in training mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, max_position_embeddings=length, hidden_size=width, intermediate_size=3 * width, use_cache=False,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def tokens(length: int, step: int = 0) -> torch.Tensor:
    """Random bytes, [1, length]."""
    return torch.randint(256, (1, length), generator=torch.Generator().manual_seed(step))
