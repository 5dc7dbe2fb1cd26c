"""Checkpoints of any size with random weights, written about as fast as the disk takes them.

Names, shapes and forms of file are those of :mod:`tools.checkpoints`, which makes every number of a tensor anew; here
all tensors are parts of one supply of normal numbers (:class:`Numbers`), times a factor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from sdrpc.families.model import ModelFiles
from tools.checkpoints import names
from tools.checkpoints.families import FAMILIES, Component
from tools.checkpoints.files import Planned, as_rows_of_256, write_gguf, write_safetensors
from tools.checkpoints.make import Filed
from tools.checkpoints.names import Shape
from tools.checkpoints.numbers import PLAIN, Stored, encoded

BLOCK, FACTOR_BYTES = 32, 2
"""Numbers in a block of Q8_0, and bytes of the F16 factor before them."""

SEED = 0
PICTURES = ("diffusion", "vae")
"""Components that are no text encoders."""

ATTENTION = re.compile(r"\.attn[12]\.(?:to_[qkv]|to_out\.0)\.weight$")
RANK, LORA_SHARE = 16, 0.25
"""Of the LoRA, and what of a weight's size it adds."""

MARGIN = 1 << 20
"""How many numbers more than the largest tensor has are in the supply: where tensors may begin in it."""


class Numbers:
    """``count`` standard normal numbers, in plain types and as blocks of Q8_0.

    A tensor is a run of them that begins somewhere. Within it no number comes twice; that two tensors share numbers
    in different places does not matter to how a model behaves, nor to how long it takes.
    """

    def __init__(self, count: int) -> None:
        count += -count % BLOCK
        self._plain = torch.randn(count, generator=torch.Generator().manual_seed(SEED))
        self._narrow: dict[torch.dtype, torch.Tensor] = {}
        self._blocks: NDArray[np.uint8] | None = None

    def plain(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._narrow:
            self._narrow[dtype] = self._plain.to(dtype)
        return self._narrow[dtype][start : start + count]

    def blocks(self, start: int, count: int) -> NDArray[np.uint8]:
        """Of ``count`` numbers from ``start``: shape (blocks, 34)."""
        if self._blocks is None:
            stored = encoded(self._plain.reshape(1, -1), "Q8_0", "")
            self._blocks = stored.data.reshape(-1, FACTOR_BYTES + BLOCK)
        return self._blocks[start // BLOCK : (start + count) // BLOCK]

    def start(self, name: str, count: int) -> int:
        """Where the numbers of the tensor ``name`` begin: at a block."""
        room = (len(self._plain) - count) // BLOCK + 1
        return int.from_bytes(sha256(name.encode()).digest()[:8], "little") % room * BLOCK


class Spread(NamedTuple):
    """What normal numbers are multiplied by, and what is added then, to become a tensor's."""

    factor: float
    offset: float = 0.0


def _spread(name: str, shape: Shape) -> Spread:
    """As in :func:`tools.checkpoints.numbers.random_weight`, so that what flows through a model stays near one:
    matrices and kernels have a variance of one over their inputs, T5's queries an eighth of that deviation, weights of
    norms lie around one, biases around zero."""
    if len(shape) > 1:
        return Spread(prod(shape[1:]) ** -0.5 / (8 if name.endswith("SelfAttention.q.weight") else 1))
    return Spread(0.2, 0.0 if name.endswith("bias") else 1.0)


def _stored(numbers: Numbers, seed: str, type: str, shape: Shape, spread: Spread) -> Stored:
    count = prod(shape)
    start = numbers.start(seed, count)
    if type == "Q8_0":  # of matrices only, whose offset is 0
        blocks = numbers.blocks(start, count).copy()
        factors = blocks[:, :FACTOR_BYTES].copy().view("<f2") * np.float32(spread.factor)
        blocks[:, :FACTOR_BYTES] = factors.astype("<f2").view(np.uint8)
        return Stored(type, shape, blocks.reshape(*shape[:-1], -1))
    narrow = PLAIN[type].itemsize == 1  # which torch doesn't calculate with
    values = numbers.plain(start, count, torch.bfloat16 if narrow else PLAIN[type]).mul(spread.factor)
    if spread.offset:
        values += spread.offset
    return Stored(type, shape, values.to(PLAIN[type]).view(torch.uint8).numpy())


def _filled(filed: Filed, numbers: Numbers) -> list[Planned]:
    """The tensors of a file with numbers of the supply."""
    original = filed.original_shapes()

    def maker(planned: Planned) -> Callable[[], Stored]:
        spread = _spread(planned.name, original.get(planned.name, planned.shape))
        return partial(_stored, numbers, f"{filed.component.name}.{planned.name}", planned.type, planned.shape, spread)

    return [planned._replace(make=maker(planned)) for planned in filed.planned()]


def _filed(component: Component, type: str) -> Filed:
    if type == "Q8_0" and component.folder == "unet":
        return Filed(component, component.alone, type, SEED, as_rows_of_256)
    return Filed(component, component.alone, type, SEED)


def _components(family: str, size: str, text_encoders: str) -> list[Component]:
    """In ``size``, but the text encoders in the size that is named for them, where the family has it."""
    chosen = FAMILIES[family].of_size(size)
    others = {c.name: c for c in FAMILIES[family].components.get(text_encoders, ()) if c.name not in PICTURES}
    return [others.get(component.name, component) for component in chosen]


def checkpoint(home: Path, family: str, size: str, text_encoders: str, type: str, plain: str) -> ModelFiles:
    """The model's files, one for each component, in ``home``; those that are missing are written.

    ``type`` of the diffusion model: F32, F16, BF16, F8_E4M3, or Q8_0 for a GGUF file; ``plain``: of the others.
    ``text_encoders`` is the size of these, whose widths have to be those of ``size``. Raises :class:`ValueError` for a
    size that the family does not have.
    """
    paths: dict[str, Path] = {}
    missing: list[tuple[Path, Filed]] = []
    for component in _components(family, size, text_encoders):
        name = component.name
        kind = type if name == "diffusion" else plain
        suffix = "gguf" if kind == "Q8_0" else "safetensors"
        paths[name] = path = home / f"{name}-{size if name in PICTURES else text_encoders}-{kind}.{suffix}"
        if not path.exists():
            missing.append((path, _filed(component, kind)))
    if missing:
        numbers = _supply([filed for _, filed in missing])
        for path, filed in missing:
            _put(path, partial(_write, filed=filed, numbers=numbers, architecture=FAMILIES[family].architecture))
    named: dict[str, Any] = {"diffusion_model": paths.pop("diffusion"), **paths}
    return ModelFiles(**named)


def control_net(home: Path, family: str, size: str, type: str) -> Path:
    """A ControlNet for the family's UNet, with diffusers' names, written where it is missing."""
    path = home / f"control-{size}-{type}.safetensors"
    if not path.exists():
        unet = _component(family, size, "diffusion")
        component = Component(
            "control",
            "controlnet",
            lambda: diffusers.ControlNetModel.from_unet(unet.build()),
            names.unchanged,
            names.unchanged,
        )
        filed = _filed(component, type)
        _put(path, lambda part: write_safetensors(part, _filled(filed, _supply([filed]))))
    return path


def lora(home: Path, family: str, size: str) -> Path:
    """A LoRA of rank 16 on the attention of the family's UNet, in F16, with diffusers' names, written where it is
    missing. It changes weights by about a quarter of what they are."""
    path = home / f"lora-{size}.safetensors"
    if not path.exists():
        shapes = _component(family, size, "diffusion").shapes()
        made: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(SEED)
        for name, shape in shapes.items():
            if ATTENTION.search(name):
                layer, (rows, columns) = f"unet.{name.removesuffix('.weight')}", shape
                down, up = (torch.randn(each, generator=generator) for each in ((RANK, columns), (rows, RANK)))
                made[f"{layer}.lora_A.weight"] = (down * columns**-0.5).half()
                made[f"{layer}.lora_B.weight"] = (up * LORA_SHARE * RANK**-0.5).half()
        _put(path, lambda part: save_file(made, part))
    return path


def _component(family: str, size: str, name: str) -> Component:
    return next(component for component in FAMILIES[family].of_size(size) if component.name == name)


def _supply(filed: Sequence[Filed]) -> Numbers:
    return Numbers(max(prod(planned.shape) for each in filed for planned in each.planned()) + MARGIN)


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``path`` written, so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    write(part)
    part.rename(path)


def _write(path: Path, filed: Filed, numbers: Numbers, architecture: str | None) -> None:
    if path.suffix == ".gguf":
        write_gguf(path, _filled(filed, numbers), architecture, filed.original_shapes())
    else:
        write_safetensors(path, _filled(filed, numbers))
