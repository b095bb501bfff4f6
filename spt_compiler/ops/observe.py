"""`spt::observe_v1`: keeps the latest sampled rows of a site in a ring, outside the differentiated ops.

The rows come from a pure `spt::stats_*` op; this op alone changes state, so it may stand outside a body that activation
checkpointing runs twice.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

# The cursor counts rows and would overflow int32 after 2^31 of them; it is folded back long before, to a count that
# still says that the ring is full and names the same position.
_CURSOR_LIMIT = 1 << 30

# Address of a probe on a device -> the probe, and what the host wrote to it last.
_mirrors: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}


def mirror(probe: Tensor, host: Tensor) -> None:
    """Lets ops know on the host what a probe on a device asks for: reading it there would stop the host in every step.

    Args: host: int32 on the CPU, of the same size, which always holds what the host writes to the probe.
    """
    if probe.device.type != "cpu":
        _mirrors[probe.data_ptr()] = weakref.ref(probe), host


def asked(probe: Tensor) -> list[int] | None:
    """What a probe (or a slice of one) asks for; None where that is not known without a look at the device.

    While a CUDA graph is captured it is not known: what counts is the value when the graph runs.
    """
    if probe.device.type == "cpu":
        return probe.tolist()
    if probe.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    owner, host = _mirrors.get(probe.untyped_storage().data_ptr(), (None, None))
    if owner is None or host is None or owner() is None:
        return None
    first = probe.storage_offset()
    return host[first : first + probe.numel()].tolist()


@torch.library.custom_op(
    "spt::observe_v1",
    mutates_args=("sample", "cursor"),
    schema="(Tensor(a!) sample, Tensor(b!) cursor, Tensor rows, Tensor probe) -> ()",
)
def observe(sample: Tensor, cursor: Tensor, rows: Tensor, probe: Tensor) -> None:
    """Write rows into a ring buffer, if asked to.

    Args:
        sample: [..., S, D] float, changed in place; the next row goes to index cursor % S of dimension -2.
        cursor: [1] int32, changed in place: rows written so far (min(cursor, S) rows of the sample are valid). Beyond
            2^30 it is folded to a smaller count of the same position.
        rows: [..., R, D] float, same leading dimensions and D. Of more than S rows the last S are kept. Values are
            copied as they are, also non-finite ones: whoever reads the sample filters it.
        probe: int32, [0] != 0 asks for it; otherwise nothing changes.
    No gradient, and no host synchronisation on an accelerator.
    Raises: ValueError on shapes that do not fit.
    """
    if rows.dim() != sample.dim() or rows.shape[:-2] != sample.shape[:-2] or rows.shape[-1] != sample.shape[-1]:
        raise ValueError(
            f"spt::observe_v1: expected rows like sample {tuple(sample.shape)} except for dimension -2, "
            f"got {tuple(rows.shape)}; sample the site's own activations"
        )
    known = asked(probe)
    if known is not None and known[0] == 0:
        return
    size, n_rows = sample.shape[-2], rows.shape[-2]
    if size == 0 or n_rows == 0:
        return
    kept = min(size, n_rows)
    start = cursor.long() + (n_rows - kept)
    index = (start + torch.arange(kept, device=sample.device)) % size
    fresh = rows[..., n_rows - kept :, :].to(sample.dtype)
    count = cursor + n_rows
    count = torch.where(count > _CURSOR_LIMIT, size + count % size, count)
    if known is None:
        wanted = probe[0] != 0
        fresh = torch.where(wanted, fresh, sample.index_select(-2, index))
        count = torch.where(wanted, count, cursor)
    sample.index_copy_(sample.dim() - 2, index, fresh)
    cursor.copy_(count)


@observe.register_fake
def _(sample, cursor, rows, probe):
    return None
