"""From the names of a file to the names of a module, as tables of regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..checkpoints.expressions import chunk
from ..ggml.weight import Weight
from .base import Weights

Change = Callable[[Weight], "tuple[Weight, ...]"]
"""What becomes of one tensor of a file: one tensor of the module, or several."""

Rule = tuple[str, str | Sequence[str]] | tuple[str, str | Sequence[str], Change]
"""(pattern of a whole name, what replaces it, how the tensor changes). Several replacements are the names of the parts
that the change gives, in order; a replacement of "" leaves its part out."""


def thirds(weight: Weight) -> tuple[Weight, ...]:
    """Queries, keys and values in one."""
    return chunk(weight, 3)


def halves(weight: Weight) -> tuple[Weight, ...]:
    """Keys and values in one."""
    return chunk(weight, 2)


def same(weights: Weights) -> dict[str, Weight]:
    """The file has the module's names."""
    return dict(weights)


def prefixed(prefix: str) -> Prefixed:
    """The file's names lack ``prefix``."""
    return Prefixed(prefix)


def table(rules: Sequence[Rule]) -> Table:
    """A conversion by the first rule whose pattern matches a whole name; what no rule matches is left out."""
    return Table(rules)


class Prefixed:
    """Names that lack a prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __call__(self, weights: Weights) -> dict[str, Weight]:
        return {self._prefix + name: weight for name, weight in weights.items()}

    def originals(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The way back, as :meth:`Table.originals`."""
        return {name.removeprefix(self._prefix): (name,) for name in names if name.startswith(self._prefix)}


def substituted(rules: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """A function that applies all ``rules`` (pattern, replacement) to a name, in order, wherever they match."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        return name

    return rename


class Table:
    """Names as a table of rules."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [
            (
                re.compile(rule[0]),
                (rule[1],) if isinstance(rule[1], str) else rule[1],
                rule[2] if len(rule) == 3 else None,
            )
            for rule in rules
        ]

    def __call__(self, weights: Weights) -> dict[str, Weight]:
        converted: dict[str, Weight] = {}
        for name, weight in weights.items():
            for pattern, names, change in self._rules:
                match = pattern.fullmatch(name)
                if match is None:
                    continue
                parts = (weight,) if change is None else change(weight)
                converted |= {match.expand(n): part for n, part in zip(names, parts, strict=True) if n}
                break
        return converted

    def originals(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The other way round, as far as the patterns are plain (literals, groups in brackets): the file's names for a
        module whose tensors have ``names``, each with the module's names for its parts in order."""
        found: dict[str, tuple[str, ...]] = {}
        names = list(names)
        for pattern, replacements, _ in self._rules:
            template = _Template(next(new for new in replacements if new))
            for name in names:
                groups = template.groups(name)
                original = None if groups is None else _filled(pattern.pattern, groups)
                match = pattern.fullmatch(original) if original else None
                if original and match and original not in found:
                    found[original] = tuple(match.expand(new) for new in replacements if new)
        return found


class _Template:
    r"""What replaces a pattern, read backwards: ``blocks.\1.to_q`` matches ``blocks.7.to_q``."""

    def __init__(self, text: str) -> None:
        pieces = re.split(r"\\(\d)", text)
        seen: set[str] = set()
        pattern = re.escape(pieces[0])
        for number, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            pattern += rf"(?P=g{number})" if number in seen else rf"(?P<g{number}>.+?)"
            pattern += re.escape(literal)
            seen.add(number)
        self._pattern = re.compile(pattern)

    def groups(self, name: str) -> dict[int, str] | None:
        """What the groups hold in ``name``, by number; None where it does not match."""
        match = self._pattern.fullmatch(name)
        return match and {int(group[1:]): value for group, value in match.groupdict().items()}


_GROUP = re.compile(r"\((?!\?)[^()]*\)")


def _filled(pattern: str, groups: Mapping[int, str]) -> str | None:
    """``pattern`` with its groups filled in; None where it is not plain, or a group is not known."""
    literals = _GROUP.split(pattern)
    if len(literals) - 1 > len(groups) or any(re.search(r"(?<!\\)[.*+?|()\[\]]", literal) for literal in literals):
        return None
    plain = [re.sub(r"\\(.)", r"\1", literal) for literal in literals]
    return "".join([plain[0], *(groups[i] + literal for i, literal in enumerate(plain[1:], 1))])
