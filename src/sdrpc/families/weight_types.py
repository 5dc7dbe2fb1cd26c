"""Which type a model's weights get where a user wants another one than their file has (``--type``,
``--tensor-type-rules``), while they are sent or written.

What stays as it is, is what stable-diffusion.cpp leaves: embeddings, biases, norms, and whatever has rows that are no
whole number of blocks, such as convolutions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoints.expressions import cast
from ..errors import InvalidValue
from ..ggml.types import TYPES, Type
from ..ggml.weight import Weight

log = logging.getLogger(__name__)

WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that the gguf library can write and that are of use to a diffusion model."""

NOT_IN_BLOCKS = (
    "embedding", "time_embed.", "pos_embed", "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.",
    "pad_token",
)  # fmt: skip
"""In names of matrices that are not quantized: they are small, and everything depends on them."""

MAX_PATTERN = 256
"""Characters of a rule's pattern: its regular expression meets thousands of names."""


@dataclass(frozen=True)
class WeightTypes:
    """``wanted``: the type of matrices; None: as they are. ``rules``: patterns of names, each with a type that goes
    before it, the first that matches; for them matrices are quantized that ``wanted`` would leave."""

    wanted: Type | None = None
    rules: tuple[tuple[re.Pattern[str], Type], ...] = ()

    def of(self, weight: Weight, *names: str) -> Type:
        """The type that a tensor gets, or the one that it has. ``names``: what it is called beside its name in its
        file."""
        other = weight.type.plain and weight.type.name not in WRITABLE  # whole numbers, F64
        if other or len(weight.shape) < 2:
            return weight.type
        rule = next((kind for pattern, kind in self.rules if any(map(pattern.search, (weight.name, *names)))), None)
        wanted = rule or self.wanted
        if wanted is None or wanted.plain:
            return wanted or weight.type
        left = rule is None and any(part in weight.name for part in NOT_IN_BLOCKS)
        return weight.type if left or weight.shape[-1] % wanted.block else wanted

    def applied(self, weight: Weight, *names: str) -> Weight:
        """The tensor in the type that it gets, made while it is read."""
        return cast(weight, self.of(weight, *names))

    def warn_of_idle_rules(self, named: Iterable[tuple[str, ...]]) -> None:
        """Say which rules match no tensor. ``named``: what each is called, as :meth:`of` is told."""
        every = list(named) if self.rules else []
        for pattern, _ in self.rules:
            if not any(pattern.search(name) for names in every for name in names):
                log.warning("no tensor has a name that the rule %s matches", pattern.pattern)


AS_STORED = WeightTypes()


def weight_types(type: str = "", rules: str = "") -> WeightTypes:
    """What a user asks for: the name of a type in any case, and ``PATTERN=TYPE,…`` with regular expressions that are
    looked for in names of tensors. Raises :class:`InvalidValue`, which says what there is."""
    made = []
    for rule in filter(None, rules.split(",")):
        pattern, equals, kind = rule.rpartition("=")
        if not equals or not pattern or len(pattern) > MAX_PATTERN:
            raise InvalidValue("tensor_type_rules", rule, "a rule is PATTERN=TYPE, such as ^vae\\.=f16")
        try:
            made.append((re.compile(pattern), _named("tensor_type_rules", kind)))
        except re.error as error:
            raise InvalidValue("tensor_type_rules", rule, f"{pattern!r} is no regular expression: {error}") from error
    return WeightTypes(_named("type", type) if type else None, tuple(made))


def _named(option: str, text: str) -> Type:
    if text.strip().upper() not in WRITABLE:
        raise InvalidValue(option, text, f"there are {', '.join(WRITABLE).lower()}")
    return TYPES[text.strip().upper()]


def names_of(weight: Weight, component: str, prefixes: Iterable[str]) -> tuple[str, ...]:
    """What a component's tensor is called beside its name in a file of its own: with the component before it, and as in
    a file of all components."""
    whole = next(iter(prefixes), "")
    bare = weight.name.removeprefix(whole)
    return f"{component}.{bare}", whole + bare
