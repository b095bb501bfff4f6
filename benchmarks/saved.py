"""What autograd keeps between a forward and its backward, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """Bytes of all storages that one call of `forward` saves for backward, each counted once, those of `own` left out."""
    kept: dict[int, torch.UntypedStorage] = {}
    left_out = {t.untyped_storage().data_ptr() for t in own}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage  # held, so that the address stays taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
