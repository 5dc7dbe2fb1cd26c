"""What came of a soak: kept as JSON while it runs, printed as tables at its end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sdrpc.server.live import KEPT_THREADS
from tests.soak.watch import Usage

GROWTH_MIB = 64
"""Memory that allocators may hold more than they did."""


@dataclass
class Wrong:
    """A client that was wrongly served: what it was told or got, and what the server said last."""

    kind: str
    second: float
    error: str
    server: list[str]

    def __str__(self) -> str:
        said = "".join(f"    server: {line.rstrip()}\n" for line in self.server)
        return f"{self.second:,.1f} s, {self.kind}:\n{self.error.rstrip()}\n{said}"


@dataclass
class Record:
    """``most``: of each minute, what the server took at most. ``before``: with nobody there, after its first clients;
    ``after``: at the end."""

    before: Usage
    came: Counter[str] = field(default_factory=Counter)
    wrong: list[Wrong] = field(default_factory=list)
    most: list[Usage] = field(default_factory=list)
    after: Usage | None = None
    seconds: float = 0.0
    crowd: str = ""

    def note(self, now: Usage, seconds: float) -> None:
        """What the server takes so many ``seconds`` after the beginning."""
        self.seconds = seconds
        if seconds >= 60 * len(self.most):
            self.most.append(now)
        self.most[-1] = self.most[-1].max(now)

    def highest(self, begin: int = 0, end: int | None = None) -> Usage:
        """Of these minutes."""
        return Usage(*map(max, zip(*self.most[begin:end], strict=True)))

    @property
    def flat(self) -> bool:
        """Whether the last third took no more than the first, and nothing stayed: files and threads as before, memory
        but for what allocators keep."""
        third = max(1, len(self.most) // 3)
        early, late, after = self.highest(0, third), self.highest(-third), self.after or self.before
        return (
            late.memory <= early.memory + 4 * GROWTH_MIB
            and after.memory <= self.before.memory + 2 * GROWTH_MIB
            and after.files <= self.before.files
            and after.threads <= self.before.threads + KEPT_THREADS
        )

    def save(self, path: Path) -> None:
        """For whoever looks while it runs, and later."""
        usage = {"before": self.before, "after": self.after}
        told = {
            "seconds": round(self.seconds),
            "came": dict(self.came),
            "wrong": [asdict(each) for each in self.wrong],
            "most": [minute._asdict() for minute in self.most],
            **{name: each and each._asdict() for name, each in usage.items()},
            "crowd": self.crowd,
        }
        path.write_text(json.dumps(told, indent=1))

    def lines(self) -> Iterator[str]:
        """Tables, as docs/soak.md has them."""
        yield from ("| clients | came |", "|---|---|")
        yield from (f"| {kind.replace('_', ' ')} | {count:,} |" for kind, count in self.came.most_common())
        yield f"| **together** | {self.came.total():,}, {len(self.wrong)} of them wrongly served |"
        yield ""
        yield from ("| server | memory, MiB | file descriptors | threads |", "|---|---|---|---|")
        rows: list[tuple[str, Usage | None]] = [("with nobody there, before", self.before)]
        if third := len(self.most) // 3:
            parts = (("first", 0), ("second", third), ("last", len(self.most) - third))
            rows += [(f"most, in the {name} third", self.highest(begin, begin + third)) for name, begin in parts]
        else:
            rows.append(("most", self.highest()))
        rows.append(("with nobody there, at the end", self.after))
        for name, row in rows:
            if row is not None:
                yield f"| {name} | {row.memory:,} | {row.files} | {row.threads} |"
