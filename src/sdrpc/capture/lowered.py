"""A captured module as a value: the graph, and what its leaves and outputs mean.

Tensors live nowhere yet; :mod:`sdrpc.capture.run` places them on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..ggml.tensor import Graph, Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Input:
    """What a caller passes. ``dtype`` is torch's name for it (``float16``, ``int64`` …); ``leaves`` receive its
    numbers, each as its own type: integers may be wanted both as I32 and as F32, unread inputs by no leaf."""

    name: str
    dtype: str
    shape: Shape
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Parameter:
    """A weight that the graph reads, by the name of the module's parameter."""

    name: str
    shape: Shape
    leaf: Tensor


@dataclass(frozen=True, eq=False)
class Constant:
    """A leaf whose numbers belong to the graph."""

    leaf: Tensor
    array: np.ndarray


@dataclass(frozen=True, eq=False)
class Output:
    """A result: what ``tensor`` holds after the run, or the numbers themselves where they depend on no input."""

    dtype: str
    shape: Shape
    source: Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Lowered:
    """A module, or one of its methods, for inputs of certain shapes and weights of certain types."""

    graph: Graph
    inputs: tuple[Input, ...]
    weights: tuple[Parameter, ...]
    constants: tuple[Constant, ...]
    outputs: tuple[Output, ...]


def rebuilt(graph: Graph, change: Callable[[Tensor], Mapping[str, Any]]) -> tuple[Graph, dict[Tensor, Tensor]]:
    """``graph`` with the fields of each tensor that owns bytes replaced by ``change(tensor)``.

    Tensors that share bytes follow the owner's place. Also returns what became of each tensor.
    """
    new: dict[Tensor, Tensor] = {}
    for tensor in graph.tensors:
        src = tuple(None if source is None else new[source] for source in tensor.src)
        if tensor.view_src is None:
            new[tensor] = replace(tensor, src=src, **change(tensor))
        else:
            root = new[tensor.view_src]
            offset = root.offset + tensor.view_offset if root.buffer else 0
            new[tensor] = replace(tensor, src=src, view_src=root, buffer=root.buffer, offset=offset)
    return Graph(tuple(new[node] for node in graph.nodes)), new
