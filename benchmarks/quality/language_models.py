"""Byte-level language models that the benchmark trains itself: a GPT-2 (GELU, learned positions) and a LLaMA (SwiGLU, RoPE,
grouped keys). Each is trained on code first and then goes on with English, so that both domains have a model. A third one, GeGLU,
is the LLaMA of code with GELU in its gates, trained on: for its FFNs alone."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import texts

ARCHITECTURES = ("gelu", "llama")
GEGLU = "geglu"
DOMAINS = ("code", "english")
LENGTHS = (512, 2048)
TOKENS_PER_STEP = 2048
_CHECKPOINT_EVERY = 50


@dataclass(frozen=True)
class Size:
    """Of a model: layers, width, heads (of `width / heads`); the hidden widths are those of GPT-2 and LLaMA."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    length: int = 2048  # longest context


def build(architecture: str, size: Size) -> Any:
    """An untrained model with seeded weights; dropout off, as it would take the fused kernel from the dense side."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 256, "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    if architecture == "gelu":
        config = transformers.GPT2Config(
            n_positions=size.length, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **common,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=size.width, intermediate_size=3 * size.width, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads // 2, max_position_embeddings=size.length, **common,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def load(folder: Path) -> Any:
    """A trained model, in evaluation mode."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def _mixed_precision() -> bool:
    """bfloat16 halves the time where the processor multiplies it in hardware, and costs time elsewhere."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=_mixed_precision()):
        return model(input_ids=batch, labels=batch).loss


def _rate(step: int, steps: int, peak: float) -> float:
    warm = max(1, min(50, steps // 5))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(architecture: str, domain: str, size: Size, steps: int, folder: Path, log: Any) -> dict[str, Any]:
    """Trains the model of (architecture, domain), resuming where it stopped; English starts from the code model, and GeGLU from
    the LLaMA of code.

    Args: folder: gets `<architecture>-<domain>/` with the model.  log: called with lines of text.
    Returns: {"steps", "parameters", "heldout": {length: nats per byte}}.
    """
    out = folder / f"{architecture}-{domain}"
    start = None if domain == DOMAINS[0] else folder / f"{architecture}-{DOMAINS[0]}"
    if architecture == GEGLU:
        start = folder / f"llama-{DOMAINS[0]}"
    model = build(architecture, size) if start is None else load(start)
    if architecture == GEGLU:
        model.config.hidden_act = "gelu_pytorch_tanh"  # saved with the model
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU(approximate="tanh")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    peak = 2e-3 if start is None else 5e-4
    done = 0
    checkpoint = out / "training.pt"
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    text, heldout = texts.tokens(domain)
    lengths = [min(length, size.length) for length in LENGTHS]
    model.train()
    for step in range(done, steps):
        length = lengths[step % len(lengths)]
        batch = texts.batch(text, (TOKENS_PER_STEP // length, length), seed=step)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, peak)
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % _CHECKPOINT_EVERY == 0:
            log(f"{out.name}: step {step + 1} of {steps}, loss {loss.item():.3f}")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    model.save_pretrained(out)
    losses = {length: heldout_loss(model, texts.spread(heldout, (2 * TOKENS_PER_STEP // length, length))) for length in lengths}
    log(f"{out.name}: held-out loss {losses}")
    return {
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout": losses,
        "mixed_precision": _mixed_precision(),
    }


def step_seconds(size: Size, rounds: int = 5) -> float:
    """Seconds that a training step of the LLaMA-like model takes on this machine when idle: processor time of the median step by
    the number of threads, so that other load does not shorten a plan."""
    model = build("llama", size)
    times = []
    for round_ in range(rounds + 1):
        began = time.process_time()
        for length in LENGTHS:
            shape = (TOKENS_PER_STEP // length, length)
            batch = torch.randint(256, shape, generator=torch.Generator().manual_seed(round_))
            _loss(model, batch).backward()
        times.append((time.process_time() - began) / len(LENGTHS) / torch.get_num_threads())
    return statistics.median(times[1:])


@torch.no_grad()
def heldout_loss(model: Any, sequences: torch.Tensor, **inputs: Any) -> float:
    """Mean loss per byte over sequences [n, length], one at a time, in evaluation mode; `inputs` go to the model."""
    was_training = model.training
    model.eval()
    losses = [model(input_ids=row[None], labels=row[None], **inputs).loss.item() for row in sequences]
    model.train(was_training)
    return statistics.fmean(losses)
