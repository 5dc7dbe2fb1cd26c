"""Buffer-independent digest of a graph; the program cache's key."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Mapping

from sdrpc.ggml.tensor import Graph, Tensor, sources


def content(graph: Graph, sizes: Mapping[int, int]) -> tuple[bytes, dict[int, int]]:
    """A digest of ``graph`` and of the sizes of its buffers, and the keys of its buffers.

    Buffers are counted in the order in which :func:`content` meets them; the result maps these numbers, which are what
    equal graphs have in common, to this graph's keys.
    """
    numbers: dict[Tensor, int] = {}
    buffers: dict[int, int] = {}
    rows: list[object] = []

    def add(tensor: Tensor) -> None:
        if tensor in numbers:
            return
        numbers[tensor] = len(numbers)
        buffer = 0
        if tensor.buffer:
            buffer = 1 + buffers.setdefault(tensor.buffer, len(buffers))
        rows.append((
            tensor.type.name, tensor.ne, tensor.nb, tensor.op, tuple(tensor.params),
            tuple(-1 if s is None else numbers.get(s, -2) for s in tensor.src),
            -1 if tensor.view_src is None else numbers.get(tensor.view_src, -2), tensor.view_offset,
            buffer, tensor.offset, tensor.flags,
        ))  # fmt: skip

    for tensor in graph.nodes:
        waiting = [tensor]
        while waiting:  # sources first; a leaf may itself be a part of another tensor
            below = [source for source in sources(waiting[-1]) if source not in numbers and source not in waiting]
            if below:
                waiting.append(below[0])
            else:
                add(waiting.pop())
    rows.append([sizes.get(key, -1) for key in buffers])
    data = marshal.dumps(rows, 2)
    return hashlib.blake2b(data, digest_size=32).digest(), dict(enumerate(buffers))
