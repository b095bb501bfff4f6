"""Tiny random models of real architectures, their inputs, and the Dynamo graphs they give.

Nothing is downloaded: models are built from configurations. transformers is imported when a model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from spt_compiler.rewrite import copy_graph

VOCABULARY = 96
PADDING = 0


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        config, model: class names. sizes: configuration for (layers, width, heads, hidden). dropouts: names of the
        dropout probabilities. attention, ffn: sites of one layer in one forward. inputs: "text", "pairs" (encoder and
        decoder) or "image". left: padding goes to the left, as decoders want it.
    """

    config: str
    model: str
    sizes: Callable[[int, int, int, int], dict[str, Any]]
    dropouts: tuple[str, ...] = ()
    attention: int = 1
    ffn: int = 1
    inputs: str = "text"
    left: bool = False


def _encoder(layers: int, width: int, heads: int, hidden: int) -> dict[str, Any]:
    return dict(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=hidden)


def _decoder(layers: int, width: int, heads: int, hidden: int) -> dict[str, Any]:
    return {**_encoder(layers, width, heads, hidden), "num_key_value_heads": max(1, heads // 2), "use_cache": False}


def _pair(layers: int, width: int, heads: int, hidden: int) -> dict[str, Any]:
    ends = {"layers": layers, "attention_heads": heads, "ffn_dim": hidden}
    return {
        "d_model": width,
        "use_cache": False,
        **{f"{e}_{k}": v for e in ("encoder", "decoder") for k, v in ends.items()},
    }


FAMILIES: dict[str, Family] = {
    "bert": Family("BertConfig", "BertModel", _encoder, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    "gpt2": Family(
        "GPT2Config",
        "GPT2Model",
        lambda layers, width, heads, hidden: dict(
            n_layer=layers, n_embd=width, n_head=heads, n_inner=hidden, use_cache=False
        ),
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        left=True,
    ),
    "opt": Family(
        "OPTConfig",
        "OPTModel",
        lambda layers, width, heads, hidden: dict(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            ffn_dim=hidden,
            use_cache=False,
            word_embed_proj_dim=width,
        ),
        ("dropout", "attention_dropout"),
        left=True,
    ),
    "llama": Family("LlamaConfig", "LlamaModel", _decoder, ("attention_dropout",), left=True),
    "mistral": Family("MistralConfig", "MistralModel", _decoder, ("attention_dropout",), left=True),
    "t5": Family(
        "T5Config",
        "T5Model",
        lambda layers, width, heads, hidden: dict(
            num_layers=layers, d_model=width, num_heads=heads, d_kv=width // heads, d_ff=hidden, use_cache=False
        ),
        ("dropout_rate",),
        attention=3,
        ffn=2,
        inputs="pairs",
    ),
    "bart": Family(
        "BartConfig", "BartModel", _pair, ("dropout", "attention_dropout", "activation_dropout"), 3, 2, inputs="pairs"
    ),
    "vit": Family(
        "ViTConfig",
        "ViTModel",
        lambda layers, width, heads, hidden: {
            **_encoder(layers, width, heads, hidden),
            "image_size": 32,
            "patch_size": 8,
        },
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        inputs="image",
    ),
}
IMPLEMENTATIONS = ("sdpa", "eager")


def build(
    name: str,
    attn: str = "sdpa",
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    hidden: int = 72,
    zero_dropout: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> nn.Module:
    """A random model of a family in `FAMILIES`, in train mode.

    Args:
        attn: "sdpa" or "eager". hidden: FFN width. zero_dropout: no dropout anywhere. overrides: for its configuration.
    """
    transformers = pytest.importorskip("transformers")
    family = FAMILIES[name]
    settings = family.sizes(layers, width, heads, hidden)
    if family.inputs != "image":
        settings.update(vocab_size=VOCABULARY, pad_token_id=PADDING)
        settings.update(bos_token_id=1, eos_token_id=2)
    if zero_dropout:
        settings.update(dict.fromkeys(family.dropouts, 0.0))
    config = getattr(transformers, family.config)(**{**settings, **overrides})
    config._attn_implementation = attn
    torch.manual_seed(seed)
    model = getattr(transformers, family.model)(config)
    if zero_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model.train()


def inputs(name: str, *, batch: int = 2, length: int = 16, padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for a model of the family; `padded` adds a mask with padding in all rows but the first."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    if family.inputs == "image":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    found = {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}
    if family.inputs == "pairs":
        found["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, max(2, length // 2)), generator=generator)
    if padded:
        mask = torch.ones(batch, length, dtype=torch.long)
        for row in range(1, batch):
            hidden = min(length - 1, 2 + row)
            if family.left:
                mask[row, :hidden] = 0
            else:
                mask[row, -hidden:] = 0
        found["attention_mask"] = mask
        found["input_ids"] = found["input_ids"].masked_fill(mask == 0, PADDING)
    return found


def sites(name: str, layers: int = 2) -> tuple[int, int]:
    """(attention sites, FFN sites) of one forward."""
    return FAMILIES[name].attention * layers, FAMILIES[name].ffn * layers


def last_hidden(output: Any) -> Tensor:
    """The tensor to look at, whatever a model returns."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["last_hidden_state"] if "last_hidden_state" in output else next(iter(output.values()))
    return getattr(output, "last_hidden_state", None) if hasattr(output, "last_hidden_state") else output[0]


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Captured:
    """One graph as the backend got it, with the real inputs of the call that compiled it."""

    module: fx.GraphModule
    inputs: list[Any]


def capture(model: Callable, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> list[Captured]:
    """The Dynamo graphs of one call (several if the graph breaks), in the order they were compiled."""
    torch._dynamo.reset()
    found: list[Captured] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable:
        captured = Captured(module, [])
        found.append(captured)

        def run(*arguments: Any) -> Any:  # sizes are numbers here, and symbols while compiling
            captured.inputs = captured.inputs or list(arguments)
            return module.forward(*arguments)

        return run

    torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


def graph_of(model: Callable, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> fx.GraphModule:
    """A copy of the only graph of a call."""
    (only,) = capture(model, *args, dynamic=dynamic, **kwargs)
    return copy_graph(only.module)


def values(captured: Captured, module: fx.GraphModule | None = None) -> dict[fx.Node, Any]:
    """What every node of a graph (default: the captured one) computes on the inputs of the call that compiled it."""
    module = module or captured.module
    found: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            found[node] = super().run_node(node)
            # Later in-place writes must not reach what is remembered; views keep their layout under clone.
            if isinstance(found[node], Tensor) and node.op != "placeholder":
                kept = found[node].detach().clone()
                result, found[node] = found[node], kept
                return result
            return found[node]

    with torch.no_grad():
        Recorder(module).run(*captured.inputs)
    return found
