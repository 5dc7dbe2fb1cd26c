"""From the names of a file to the names of a module, as tables of regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from ..ggml.weight import Weight
from .base import Weights

Change = Callable[[Weight], "tuple[Weight, ...]"]
"""What becomes of one tensor of a file: one tensor of the module, or several."""

Rule = tuple[str, str | Sequence[str]] | tuple[str, str | Sequence[str], Change]
"""(pattern of a whole name, what replaces it, how the tensor changes). Several replacements are the names of the parts
that the change gives, in order; a replacement of "" leaves its part out."""


def same(weights: Weights) -> dict[str, Weight]:
    """The file has the module's names."""
    return dict(weights)


def prefixed(prefix: str) -> Callable[[Weights], dict[str, Weight]]:
    """The file's names lack ``prefix``."""
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def substituted(rules: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """A function that applies all ``rules`` (pattern, replacement) to a name, in order, wherever they match."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        return name

    return rename


def table(rules: Sequence[Rule]) -> Callable[[Weights], dict[str, Weight]]:
    """A conversion by the first rule whose pattern matches a whole name; what no rule matches is left out."""
    compiled = [(re.compile(rule[0]), rule[1], rule[2] if len(rule) == 3 else None) for rule in rules]

    def convert(weights: Weights) -> dict[str, Weight]:
        converted: dict[str, Weight] = {}
        for name, weight in weights.items():
            for pattern, new, change in compiled:
                match = pattern.fullmatch(name)
                if match is None:
                    continue
                names = [new] if isinstance(new, str) else new
                parts = (weight,) if change is None else change(weight)
                converted |= {match.expand(n): part for n, part in zip(names, parts, strict=True) if n}
                break
        return converted

    return convert
