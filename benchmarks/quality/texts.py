"""English and code that every Python carries. Models trained here read bytes, one token each, so no tokenizer has to be trained."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from spt_compiler.cli import training

# Held-out text comes from modules that are never trained on; big tables of data and generated code teach nothing.
_HELD_OUT = tuple(name.replace(".", "/") for name in training.HELD_OUT_MODULES)
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}


def _is_held_out(path: Path) -> bool:
    return path.with_suffix("").as_posix() in _HELD_OUT or path.parts[0] in _HELD_OUT


@functools.cache
def tokens(domain: str) -> tuple[Tensor, Tensor]:
    """(training, held-out) text of "english" (pydoc's topics) or "code" (the standard library), 1-d int64 each."""
    if domain == "english":
        text = training.byte_tokens(training.english_bytes())
        cut = len(text) * 9 // 10
        return text[:cut], text[cut:]
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    paths = [path for path in paths if not _SKIPPED_FOLDERS & set(path.parts) and not _is_held_out(path)]
    text = b"\n\n".join((root / path).read_bytes() for path in paths)
    return training.byte_tokens(text), training.byte_tokens(training.code_bytes(training.HELD_OUT_MODULES))


@functools.cache
def read_by(folder: Path, domain: str) -> tuple[Tensor, Tensor]:
    """(training, held-out) text of a domain in the tokens of the model in `folder`: its tokenizer's, or bytes if it has none."""
    if not (folder / "tokenizer.json").exists():
        return tokens(domain)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    train, heldout = (bytes(text.tolist()).decode(errors="ignore") for text in tokens(domain))
    return tuple(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (train, heldout))


def batch(text: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    """Sequences at random places: [sequences, length], a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - shape[1], (shape[0],), generator=generator)
    return torch.stack([text[start : start + shape[1]] for start in starts.tolist()])


def spread(text: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sequences evenly spread over the text: [sequences, length]; the same for every run."""
    n, length = shape
    starts = torch.linspace(0, len(text) - length, n).long()
    return torch.stack([text[start : start + length] for start in starts.tolist()])
