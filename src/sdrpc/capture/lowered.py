"""A captured module as a value: the graph, and what its leaves and outputs mean.

Tensors live nowhere yet; :mod:`sdrpc.capture.run` places them on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

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
