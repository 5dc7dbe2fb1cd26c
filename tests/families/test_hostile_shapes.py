"""Tensors of other shapes than a model's: a component is refused with a reason, or it has a configuration."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from sdrpc.checkpoints.checkpoint import Checkpoint, Tokenizer
from sdrpc.errors import CheckpointError
from sdrpc.families.base import Component, find
from sdrpc.families.registry import FAMILIES
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight, Whole
from tools.checkpoints import FAMILIES as CHECKPOINTS
from tools.checkpoints.tokenizers import gemma_entries

Shape = tuple[int, ...]


def weight(name: str, shape: Shape) -> Weight:
    made = Weight(name, F16, shape, Whole(lambda: bytes(made.nbytes)), None, "m")
    return made


def configured(component: Component, weights: dict[str, Weight]) -> bool:
    """Whether the file has the component. Raises :class:`CheckpointError` as opening a model does."""
    found = find(component, Checkpoint(Path("m"), weights, tokenizers={"": Tokenizer(entries=gemma_entries)}))
    if found is not None:
        component.configure(found, {})
    return found is not None


def strange(shape: Shape) -> tuple[Shape, ...]:
    """A scalar, a vector, and a matrix of one column more (a vector of one row more, too)."""
    first, *others = shape or (0,)
    return ((), (7,), (first, others[0] + 1, *others[1:]) if others else (first + 1,))


def without_numbers(name: str) -> str:
    return re.sub(r"\d+", "0", name)


@cache
def files() -> list[tuple[str, str, dict[str, Weight]]]:
    """Each component of every family in a file of its own, those whose names are alike once: what it is, the
    component's name, and its tensors."""
    made: dict[tuple[str, frozenset[str]], tuple[str, str, dict[str, Weight]]] = {}
    for family in CHECKPOINTS.values():
        for part in family.of_size("tiny"):
            shapes = part.shapes()
            weights = {entry.name: weight(entry.name, entry.shape(shapes)) for entry in part.alone(shapes)}
            made.setdefault(
                (part.name, frozenset(map(without_numbers, weights))),
                (f"{family.name} {part.name}", part.name, weights),
            )
    return list(made.values())


def reader(name: str, weights: dict[str, Weight]) -> Component | None:
    """The first component of any family that has the name and can be made of the tensors."""
    for component in {
        each.configure: each for one in FAMILIES for each in one.components if each.name == name
    }.values():
        with suppress(CheckpointError):
            if configured(component, weights):
                return component
    return None


@pytest.mark.parametrize("name", ["diffusion", "vae", "llm", "t5xxl", "clip_l", "clip_g", "clip_vision", "connectors"])
def test_a_tensor_of_another_shape(name: str) -> None:
    """Of tensors whose names differ in numbers only, the first one."""
    refused = 0
    for title, _, weights in (file for file in files() if file[1] == name):
        component = reader(name, weights)
        assert component is not None, title
        for each in {without_numbers(one.name): one for one in reversed(weights.values())}.values():
            for shape in strange(each.shape):
                try:
                    configured(component, weights | {each.name: weight(each.name, shape)})
                except CheckpointError:
                    refused += 1
                except Exception as error:
                    pytest.fail(f"{title}: {each.name} {list(each.shape)} as {list(shape)}: {error!r}")
    assert refused
