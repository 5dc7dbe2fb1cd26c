"""DoRA: a change of a weight that sets the lengths of its rows, or of its columns, apart from their directions (Liu et
al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024).

    W' = W + strength · (g ∘ (W + D) - W),   g = m / ‖W + D‖

D is what a LoRA would add (at strength 1), m the file's magnitudes, ‖·‖ the length of each row or of each column, which
is what all rows multiply one channel of the input with. At strength 1 that is what PEFT and LyCORIS train; at others it
is what ComfyUI and A1111 make of it: g does not depend on the strength. So a DoRA is two deltas, (g - 1) ∘ W and g ∘ D:
the weight scaled by a vector, and what is as large as the LoRA.

Only g needs the weight's numbers. They are read when g is first asked for, some rows at a time, and g is kept.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..ggml.types import F32
from ..ggml.weight import Held, View, Weight, Whole, joined_origin
from .deltas import Array, ColumnScaling, Delta, Difference, LowRank, Product, RowScaling, computed, numbers, row_reader
from .expressions import NUMBERS

_THREADS = min(4, os.cpu_count() or 1)
"""That read a weight: unpacking blocks takes a core 20 ns a number."""


class Magnitude(NamedTuple):
    """``lengths`` of a weight's rows or, ``of_columns``, of its columns, (n,)."""

    lengths: Weight
    of_columns: bool


Part = tuple[Weight, Product]
"""A weight, and what a LoRA would add to it."""


def sizes(product: Product) -> tuple[int, int]:
    """The rows and columns of a weight to which ``product`` is added."""
    one, other = (product.up, product.down) if isinstance(product, LowRank) else (product.tensor, product.tensor)
    return (*one.shape, 1)[0], (*other.shape, 1, 1)[1]


def with_rows(part: Part, lengths: Weight) -> tuple[Delta, ...]:
    """The deltas of a weight whose rows get these ``lengths``."""
    gain, (_, product) = _gain([part], lengths, of_columns=False), part
    if isinstance(product, LowRank):
        changed: Product = replace(product, up=_scaled(product.up, gain, 0))
    else:
        changed = replace(product, tensor=_scaled(product.tensor, gain, 0))
    return RowScaling(_less_one(gain)), changed


def with_columns(parts: Sequence[Part], lengths: Weight) -> list[tuple[Delta, ...]]:
    """The deltas of weights that are rows of one, whose columns get these ``lengths``. They share what the products
    share."""
    gain = _gain(parts, lengths, of_columns=True)
    scaling = ColumnScaling(_less_one(gain))
    shared: dict[int, Weight] = {}

    def changed(product: Product) -> Product:
        if isinstance(product, Difference):
            return replace(product, tensor=_scaled(product.tensor, gain, 1))
        if id(product.down) not in shared:
            shared[id(product.down)] = _scaled(product.down, gain, 1)
        return replace(product, down=shared[id(product.down)])

    return [(scaling, changed(product)) for _, product in parts]


def _gain(parts: Sequence[Part], lengths: Weight, of_columns: bool) -> Weight:
    """g: by what rows or columns are multiplied, (n,). Zero where there is nothing to multiply."""
    for weight, _ in parts:
        if len(weight.shape) < 2 or weight.shape[of_columns] != lengths.shape[0]:
            reason = f"has {lengths.shape[0]} lengths for {'columns' if of_columns else 'rows'} of {list(weight.shape)}"
            raise CheckpointError(lengths.file, reason, lengths.name)
        try:
            row_reader(weight)
        except ValueError as error:
            raise CheckpointError(weight.file, f"no DoRA can be added to it: {error}", weight.name) from error

    def data() -> bytes:
        norms = np.sqrt(sum(_squares(weight, product, of_columns) for weight, product in parts))
        with np.errstate(all="ignore"):
            gain = np.divide(numbers(lengths), norms, out=np.zeros(lengths.shape), where=norms > 0)
            return gain.astype("<f4").tobytes()

    said = f"lengths of {'columns' if of_columns else 'rows'} {[product.factor for _, product in parts]}"
    origins = [lengths.origin, *(w.origin for weight, product in parts for w in (weight, *product.weights))]
    gain = Weight(lengths.name, F32, lengths.shape, Whole(data), joined_origin(said, origins), lengths.file)
    return replace(gain, pieces=Held(gain))


def _squares(weight: Weight, product: Product, of_columns: bool) -> np.ndarray:
    """The squared lengths of the rows or columns of the sum of both."""
    read, product = row_reader(weight), _in_memory(product)
    rows, channels = weight.shape[:2]
    step = max(1, NUMBERS // max(1, prod(weight.shape[1:])))

    def of_some(first: int) -> np.ndarray:
        last = min(first + step, rows)
        across = (0, 2) if of_columns else (1, 2)
        with np.errstate(all="ignore"):  # what is too large becomes infinite, which the picture's check finds
            squares = np.square(read(first, last) + product.rows(first, last))
            summed: np.ndarray = squares.reshape(last - first, channels, -1).sum(across, dtype=float)
        return summed

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="sdrpc-lengths") as pool:
        parts = list(pool.map(of_some, range(0, rows, step)))
    return np.sum(parts, axis=0) if of_columns else np.concatenate(parts)


def _in_memory(product: Product) -> Product:
    """``product`` with numbers that need not be made again for each of several rows."""

    def here(w: Weight) -> Weight:
        return replace(w, type=F32, pieces=View(numbers(w).data.cast("B")))

    if isinstance(product, LowRank):
        return replace(product, down=here(product.down), up=here(product.up))
    return replace(product, tensor=here(product.tensor))


def _scaled(matrix: Weight, gain: Weight, dim: int) -> Weight:
    """``matrix`` times ``gain`` along one of its dimensions."""
    along = tuple(-1 if i == dim else 1 for i in range(len(matrix.shape)))

    def make(array: Array, by: Array) -> Array:
        made: Array = array * by.reshape(along)
        return made

    return computed(f"{matrix.name} along {dim} by its lengths", matrix.shape, (matrix, gain), make)


def _less_one(gain: Weight) -> Weight:
    return computed(f"{gain.name} less one", gain.shape, (gain,), lambda g: g - np.float32(1))
