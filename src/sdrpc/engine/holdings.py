"""What the memory of a CUDA (or ROCm) device is taken by."""

from __future__ import annotations

from typing import NamedTuple

import torch

GB = 1e9


class Holdings(NamedTuple):
    """Bytes of a device. ``buffers``: of clients. ``kept``: weights in the form that they are computed with.
    ``recordings``: what recorded programs share. ``spare``: what torch has and nobody uses. ``context``: the driver's,
    its libraries', and other programs'. ``used_at_most``, ``reserved_at_most``: of what torch has, so far."""

    buffers: int
    kept: int
    recordings: int
    spare: int
    context: int
    used_at_most: int
    reserved_at_most: int

    def __str__(self) -> str:
        """In a line of a log; ``bench memory`` reads it."""
        return ", ".join(f"{name} {size / GB:.3f}" for name, size in self._asdict().items()) + " GB"


def holdings(device: torch.device, buffers: int, kept: int) -> Holdings:
    """What is taken of ``device``, of which the caller knows two parts."""
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    segments = [each for each in torch.cuda.memory_snapshot() if each["device"] == device.index]  # type: ignore[no-untyped-call]
    recordings = sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) != (0, 0))
    reserved = stats.get("reserved_bytes.all.current", 0)
    in_pools = sum(each["allocated_size"] for each in segments if tuple(each["segment_pool_id"]) != (0, 0))
    spare = (reserved - recordings) - (stats.get("allocated_bytes.all.current", 0) - in_pools)
    return Holdings(
        buffers, kept, recordings, spare, total - free - reserved,
        stats.get("allocated_bytes.all.peak", 0), stats.get("reserved_bytes.all.peak", 0),
    )  # fmt: skip
