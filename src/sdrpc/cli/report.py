"""What commands print: tables of devices, progress, where the time went, errors in one line."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rich.box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import SdrpcError, UsageError

if TYPE_CHECKING:
    from ..device import Device

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
"""Exit statuses: something failed; an option is wrong; Ctrl-C."""

log = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress, warnings and errors go here; standard output carries results only."""


def guarded(command: Callable[[], None]) -> int:
    """Run ``command``; its exit status. Errors that sdrpc raises on purpose become one line on standard error."""
    try:
        command()
    except UsageError as error:
        log.print(f"[red]error:[/] {_escape(error)}")
        return USAGE
    except SdrpcError as error:
        log.print(f"[red]error:[/] {_escape(error)}")
        return FAILURE
    except KeyboardInterrupt:
        log.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads our output any more
        return FAILURE
    return 0


def logging_to_console(verbose: bool) -> None:
    """Send sdrpc's log to standard error: warnings, or with ``verbose`` everything."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("sdrpc").setLevel(logging.DEBUG if verbose else logging.WARNING)


def device_table(devices: Iterable[Device]) -> Table:
    """Name, description and memory of each device."""
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("device")
    table.add_column("what it is", overflow="fold")
    table.add_column("free", justify="right")
    table.add_column("total", justify="right")
    for device in devices:
        memory = device.memory()
        table.add_row(device.name, device.description, mebibytes(memory.free), mebibytes(memory.total))
    return table


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


class StepsPerSecond(ProgressColumn):
    """Iterations per second, or seconds per iteration when it is slow: as sd-cli writes it."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("", style="progress.data.speed")
        return Text(f"{speed:.2f} it/s" if speed >= 1 else f"{1 / speed:.2f} s/it", style="progress.data.speed")


@contextmanager
def steps(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for counted steps; the yielded function takes (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    with _bar(description, *columns, StepsPerSecond(), TimeElapsedColumn()) as update:
        yield update


@contextmanager
def transfer(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for bytes; the yielded function takes (done, total)."""
    with _bar(description, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()) as update:
        yield update


@contextmanager
def _bar(description: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    texts = columns if isinstance(columns[0], TextColumn) else (TextColumn("{task.description}"), *columns)
    with Progress(*texts, console=log) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class Stopwatch:
    """Seconds per named stage, in order of first use."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{stage} {seconds:.2f}s" for stage, seconds in self.seconds.items())


def _escape(error: Exception) -> Text:
    return Text(str(error))
