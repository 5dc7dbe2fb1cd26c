"""LoRA files: what they add to which layers, in the layers' names as the file has them.

    kohya, ComfyUI      X.lora_down.weight  X.lora_up.weight  X.lora_mid.weight  X.alpha
    diffusers, PEFT     X.lora_A.weight  X.lora_B.weight; before: X.lora.down.weight, X.lora_linear_layer.down.weight,
                        Y.processor.to_q_lora.down.weight
    LyCORIS             LoCon as kohya; LoHa X.hada_w1_a …; LoKr X.lokr_w1 …; whole differences X.diff, X.diff_b
    DoRA                besides: X.dora_scale (LyCORIS, OneTrainer) or X.lora_magnitude_vector.weight (PEFT)

W' = W + strength · alpha / rank · up · down. LoHa's and LoKr's products are written as up · down where that is smaller
than the difference itself (LyCORIS, "Navigating Text-To-Image Customization", Yeh et al. 2023). What a DoRA's
magnitudes mean: :mod:`.dora`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np

from ..errors import CheckpointError
from ..ggml.types import TYPES
from ..ggml.weight import Weight
from .checkpoint import Checkpoint
from .deltas import Difference, LowRank, Product, computed, numbers
from .dora import Magnitude, sizes
from .expressions import cast, reshape

_ROLES = [
    (re.compile(pattern), layer, role)
    for pattern, layer, role in (
        (r"(.+)\.lora_down\.weight", r"\1", "down"),
        (r"(.+)\.lora_up\.weight", r"\1", "up"),
        (r"(.+)\.lora_mid\.weight", r"\1", "mid"),
        (r"(.+)\.lora_A(?:\.default)?\.weight", r"\1", "down"),
        (r"(.+)\.lora_B(?:\.default)?\.weight", r"\1", "up"),
        (r"(.+)\.processor\.(\w+)_lora\.down\.weight", r"\1.\2", "down"),
        (r"(.+)\.processor\.(\w+)_lora\.up\.weight", r"\1.\2", "up"),
        (r"(.+)\.(?:lora|lora_linear_layer)\.down\.weight", r"\1", "down"),
        (r"(.+)\.(?:lora|lora_linear_layer)\.up\.weight", r"\1", "up"),
        (r"(.+)\.(alpha|diff|diff_b|dora_scale)", r"\1", r"\2"),
        (r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", r"\1", "magnitude"),
        (r"(.+)\.((?:hada|lokr)_(?:w[12](?:_[ab])?|t[12]))", r"\1", r"\2"),
    )
]
"""(pattern of a whole name, the layer's name, what the tensor is to the layer), the first that matches."""

_FLOATS = frozenset({"F32", "F16", "BF16"})
"""Types in which an adapter's matrices are multiplied; others are cast."""

Parts = Mapping[str, Weight]


@dataclass(frozen=True)
class LoraFile:
    """``layers``: what is added to a layer's weight, ``biases``: to its bias, by the layer's name. ``unknown``: the
    file's tensors that say nothing that is understood. ``magnitudes``: of those layers that are DoRA's."""

    layers: Mapping[str, Product]
    biases: Mapping[str, Product]
    unknown: tuple[str, ...]
    magnitudes: Mapping[str, Magnitude]


def read(checkpoint: Checkpoint) -> LoraFile:
    """What a LoRA file adds. Raises :class:`CheckpointError` for a layer whose tensors do not fit each other."""
    found: dict[str, dict[str, Weight]] = {}
    unknown = list(checkpoint.skipped)
    for name, weight in checkpoint.tensors.items():
        for pattern, layer, role in _ROLES:
            if match := pattern.fullmatch(name):
                found.setdefault(match.expand(layer), {})[match.expand(role)] = weight
                break
        else:
            unknown.append(name)
    layers, biases, magnitudes = {}, {}, {}
    for name, parts in found.items():
        if "diff_b" in parts:
            biases[name] = Difference(_plain(parts["diff_b"]))
        kind = next((make for needed, make in _KINDS if any(needed <= parts.keys() for needed in needed)), None)
        if kind is not None:
            layers[name] = kind(parts)
            if magnitude := _magnitude(parts, layers[name]):
                magnitudes[name] = magnitude
        elif "diff_b" not in parts:
            unknown += [weight.name for weight in parts.values()]
    return LoraFile(layers, biases, tuple(unknown), magnitudes)


def _magnitude(parts: Parts, product: Product) -> Magnitude | None:
    """A layer's magnitudes, if it has any: PEFT's are of rows, LyCORIS's of rows (rows, 1 …) or columns
    (1, columns …)."""
    given = parts.get("magnitude", parts.get("dora_scale"))
    if given is None:
        return None
    rows, columns = sizes(product)
    of_columns = "magnitude" not in parts and len(given.shape) > 1 and given.shape[0] == 1 != rows
    count = columns if of_columns else rows
    _need(prod(given.shape) == count, given, f"{rows} rows and {columns} columns")
    return Magnitude(reshape(_plain(given), (count,)), of_columns)


def _low_rank(parts: Parts) -> Product:
    down, up = _plain(parts["down"]), _plain(parts["up"])
    rank = down.shape[0] if down.shape else 0
    _need(len(up.shape) >= 2 and len(down.shape) >= 2 and prod(up.shape[1:]) == rank > 0, up, f"a rank of {rank}")
    if "mid" in parts:
        mid = _plain(parts["mid"])
        _need(mid.shape[:2] == (rank, rank) and prod(down.shape[2:]) == 1, mid, f"a rank of {rank}")
        shape = (rank, down.shape[1], *mid.shape[2:])
        down = computed(
            f"{down.name} with its middle", shape, (mid, down), lambda m, d: np.einsum("ij...,jk->ik...", m, _matrix(d))
        )
    return LowRank(down, reshape(up, (up.shape[0], rank)), _factor(parts, rank))


def _whole(parts: Parts) -> Product:
    return Difference(_plain(parts["diff"]))


def _hadamard(parts: Parts) -> Product:
    """(w1_a · w1_b) ∘ (w2_a · w2_b): of rank r², its rows products of those of both."""
    one, two = ((_plain(parts[f"hada_w{n}_a"]), _plain(parts[f"hada_w{n}_b"])) for n in (1, 2))
    for a, b in (one, two):
        _need(len(a.shape) == 2 == len(b.shape), a, "two matrices")
    name = one[0].name
    if {"hada_t1", "hada_t2"} <= parts.keys():
        (a1, b1), (a2, b2) = one, two
        cores = [_plain(parts["hada_t1"]), _plain(parts["hada_t2"])]
        shape = (a1.shape[1], b1.shape[1], *cores[0].shape[2:])
        _need(all(core.shape[:2] == (a1.shape[0], b1.shape[0]) for core in cores), cores[0], "the rank of its matrices")
        tensor = computed(
            name, shape, (cores[0], a1, b1, cores[1], a2, b2), lambda *ts: _tucker(*ts[:3]) * _tucker(*ts[3:])
        )
        return Difference(tensor, _factor(parts, b1.shape[0]))
    (rows, rank), columns = one[0].shape, one[1].shape[1]
    for a, b in (one, two):
        _need(a.shape == (rows, rank) and b.shape == (rank, columns), a, f"{rows} rows and a rank of {rank}")
    factor = _factor(parts, rank)
    if rank * rank * (rows + columns) < rows * columns:
        return LowRank(
            computed(f"{name} down", (rank * rank, columns), (one[1], two[1]), lambda b, d: b[:, None] * d[None]),
            computed(f"{name} up", (rows, rank * rank), (one[0], two[0]), lambda a, c: a[:, :, None] * c[:, None]),
            factor,
        )
    product = computed(name, (rows, columns), (*one, *two), lambda a, b, c, d: (a @ b) * (c @ d))
    return Difference(product, factor)


def _kronecker(parts: Parts) -> Product:
    """w1 ⊗ w2, each of them a tensor or a product of two."""
    left, left_rank = _side(parts, 1)
    right, right_rank = _side(parts, 2)
    _need(len(left.shape) == 2 <= len(right.shape), left, "a matrix")
    (a, b), (c, d) = left.shape, right.shape[:2]
    rank = right_rank or left_rank
    factor = _factor(parts, rank) if rank else 1.0
    if right_rank and len(right.shape) == 2 and b * right_rank * (a * c + b * d) < a * c * b * d:
        up, down = _plain(parts["lokr_w2_a"]), _plain(parts["lokr_w2_b"])
        return LowRank(
            computed(
                f"{down.name} down", (b * right_rank, b * d), (down,), lambda w: np.kron(np.eye(b, dtype="<f4"), w)
            ),
            computed(f"{up.name} up", (a * c, b * right_rank), (left, up), np.kron),
            factor,
        )
    shape = (a * c, b * d, *right.shape[2:])
    taps = (1,) * (len(right.shape) - 2)
    product = computed(left.name, shape, (left, right), lambda u, v: np.kron(u.reshape(*u.shape, *taps), v))
    return Difference(product, factor)


def _side(parts: Parts, number: int) -> tuple[Weight, int]:
    """One side of a Kronecker product, and the rank where it is a product itself, else 0."""
    name = f"lokr_w{number}"
    if name in parts:
        return _plain(parts[name]), 0
    a, b = _plain(parts[f"{name}_a"]), _plain(parts[f"{name}_b"])
    if "lokr_t2" in parts and number == 2:
        core = _plain(parts["lokr_t2"])
        _need(
            len(a.shape) == 2 == len(b.shape) and core.shape[:2] == (a.shape[0], b.shape[0]), core, "its matrices' rank"
        )
        shape = (a.shape[1], b.shape[1], *core.shape[2:])
        return computed(f"{a.name} whole", shape, (core, a, b), _tucker), b.shape[0]
    _need(len(a.shape) == 2 <= len(b.shape) and a.shape[1] == b.shape[0], a, "a product's shapes")
    shape = (a.shape[0], *b.shape[1:])
    return computed(f"{a.name} whole", shape, (a, b), lambda u, v: u @ _matrix(v)), b.shape[0]


def _tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    made: np.ndarray = np.einsum("ij...,jr,ip->pr...", core, b, a)
    return made


_LOKR = [{f"lokr_{one}", f"lokr_{two}"} for one in ("w1", "w1_a") for two in ("w2", "w2_a")]
_KINDS: tuple[tuple[list[set[str]], Callable[[Parts], Product]], ...] = (
    ([{"down", "up"}], _low_rank),
    ([{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}], _hadamard),
    (_LOKR, _kronecker),
    ([{"diff"}], _whole),
)
"""What a layer's tensors have to be, and what is made of them."""


def _factor(parts: Parts, rank: int) -> float:
    """alpha / rank; alpha is the rank where the file says nothing."""
    if "alpha" not in parts:
        return 1.0
    alpha = parts["alpha"]
    _need(prod(alpha.shape) == 1, alpha, "one number")
    value = float(numbers(alpha).reshape(-1)[0])
    if not isfinite(value):
        raise CheckpointError(alpha.file, f"is {value}", alpha.name)
    return value / rank


def _plain(weight: Weight) -> Weight:
    return weight if weight.type.name in _FLOATS else cast(weight, TYPES["F32"])


def _matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def _need(truth: bool, weight: Weight, what: str) -> None:
    if not truth:
        raise CheckpointError(weight.file, f"is {list(weight.shape)}, which does not go with {what}", weight.name)
