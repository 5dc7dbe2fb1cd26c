"""What differs between protocol versions, as data: ``dialects.json`` read into frozen values.

No version number is compared anywhere else: code asks a dialect for its tables and switches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files

from .types import OWN_TYPES, TYPES, Type

Version = tuple[int, int, int]


@dataclass(frozen=True)
class Dialect:
    """One protocol version: numbers for operations and types, and how the messages are laid out."""

    version: str
    seen_in: tuple[str, ...]
    """Programs that are known to speak it."""
    brief: bool
    """Whether releases spoke it for a few weeks only, so that its clients are rarely met."""
    hello_request_bytes: int
    hello_response_bytes: int
    has_memset_tensor: bool
    acks_buffer_commands: bool
    set_tensor_has_cache_flag: bool
    has_use_count: bool
    has_graph_uids: bool
    """Clients number their graphs, and run any of them again (:class:`sdrpc.wire.kept_graphs.KeptGraphs`)."""
    has_tensor_2d: bool
    has_comm: bool
    ops: tuple[str, ...]
    fork_ops: tuple[str, ...]
    """What a number behind the last of ``ops`` may stand for (:mod:`sdrpc.ggml.fork`)."""
    unary_ops: tuple[str, ...]
    glu_ops: tuple[str, ...]
    type_numbers: dict[str, int]
    tensor_flags: dict[str, int]

    @cached_property
    def triple(self) -> Version:
        major, minor, patch = (int(part) for part in self.version.split("."))
        return major, minor, patch

    @cached_property
    def switches(self) -> frozenset[str]:
        """The names of what it has, of all that only some dialects have."""
        return frozenset(name for name in self.__dataclass_fields__ if getattr(self, name) is True)

    @cached_property
    def marks_computed(self) -> bool:
        """Whether every client of this version marks the nodes that are to be computed. Clients don't tell their
        patch, so a flag that one patch lacks can't be counted on in the others."""
        return all("COMPUTE" in d.tensor_flags for d in dialects().values() if d.triple[:2] == self.triple[:2])

    @cached_property
    def op_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.ops)}

    @cached_property
    def types(self) -> dict[int, Type]:
        """Type number → type, those of our own too."""
        return {number: TYPES[name] for name, number in self.type_numbers.items()} | OWN_TYPES

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The other way round, by name."""
        return {kind.name: number for number, kind in self.types.items()}


@cache
def dialects() -> dict[str, Dialect]:
    """All known dialects by version, oldest first."""
    table = json.loads((files(__package__) / "dialects.json").read_text())
    return {version: _dialect(version, facts) for version, facts in table.items()}


def newest() -> Dialect:
    return list(dialects().values())[-1]


def for_server(version: Version) -> Dialect | None:
    """The dialect of a server that says it speaks ``version``: that one, or the nearest patch below it of the same
    major and minor (an unknown patch adds operations at most); None when we know no such family."""
    family = [d for d in dialects().values() if d.triple[:2] == version[:2]]
    not_above = [d for d in family if d.triple <= version]
    return not_above[-1] if not_above else None


def _dialect(version: str, facts: dict) -> Dialect:  # type: ignore[type-arg]
    switches = {name: facts[name] for name in Dialect.__dataclass_fields__ if name in facts and name != "version"}
    lists = {name: tuple(facts[name]) for name in ("seen_in", "ops", "fork_ops", "unary_ops", "glu_ops")}
    return Dialect(**{**switches, **lists, "version": version, "type_numbers": facts["types"]})
