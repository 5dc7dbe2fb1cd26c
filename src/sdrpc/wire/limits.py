"""Named limits of the wire: what a peer may announce before anything is read or reserved for it."""

from __future__ import annotations

from dataclasses import dataclass

MAX_NAME_LENGTH = 512
"""The longest GGML_MAX_NAME that is believed; real builds use 64, 128 and 160."""


@dataclass(frozen=True)
class Limits:
    """``graph_bytes``: a GRAPH_COMPUTE payload, which is buffered whole (100,000 tensors are 39 MB). ``tensor_bytes``:
    the data of one SET_TENSOR; it is never buffered here, so the limit only keeps sums of sizes far from 2**64.
    ``error_bytes``: the reason in an error reply."""

    graph_bytes: int = 64 << 20
    tensor_bytes: int = 1 << 44
    error_bytes: int = 16 << 10


DEFAULT_LIMITS = Limits()
