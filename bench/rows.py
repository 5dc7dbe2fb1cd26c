"""What a benchmark finds: rows of numbers, each beside what it is measured against and the mark that it should meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .setup import Setup


@dataclass(frozen=True)
class Mark:
    """A limit of a row's ``ratio`` or of its own number ``ours``: met from ``limit`` down, or up when ``at_least``."""

    limit: float
    of: str = "ratio"
    at_least: bool = False

    def met(self, row: Row) -> bool:
        number = row.ratio if self.of == "ratio" else row.ours
        return number is not None and bool(number >= self.limit if self.at_least else number <= self.limit)

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:.4g}"


@dataclass(frozen=True)
class Row:
    """``ours`` and ``theirs`` in ``unit``, measured in the same run; ``against`` says what the second one is."""

    what: str
    ours: float
    unit: str
    theirs: float | None = None
    against: str = ""
    mark: Mark | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.theirs else None

    @property
    def met(self) -> bool | None:
        """Whether the mark is met; None where there is none."""
        return None if self.mark is None else self.mark.met(self)

    def facts(self) -> dict[str, Any]:
        """The row as JSON's types."""
        return asdict(self) | {"ratio": self.ratio, "mark": str(self.mark) if self.mark else None, "met": self.met}


class Benchmark(NamedTuple):
    """``run`` measures and yields what it finds, row by row. ``usual``: whether it runs when none is named."""

    name: str
    about: str
    run: Callable[[Setup], Iterator[Row]]
    usual: bool = True
