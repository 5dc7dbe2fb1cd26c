"""What commands print: tables of devices, progress, where the time went, errors in one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rich.box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..errors import SdrpcError, UsageError
from ..text import printable

if TYPE_CHECKING:
    from ..device import Device

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
"""Exit statuses: something failed; an option is wrong; Ctrl-C."""

log = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress, warnings and errors go here."""

results = Console(
    highlight=False, soft_wrap=True, width=None if sys.stdout is not None and sys.stdout.isatty() else 160
)
"""Standard output; a table in a file or a pipe is as wide as it needs."""


def guarded(command: Callable[[], None]) -> int:
    """Run ``command``; its exit status. Errors that sdrpc raises on purpose become one line on standard error."""
    try:
        command()
    except SdrpcError as error:
        log.print(Text.assemble(("error: ", "red"), printable(str(error))))
        return USAGE if isinstance(error, UsageError) else FAILURE
    except KeyboardInterrupt:
        log.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads our output any more
        return FAILURE
    except OSError as error:  # a disk that filled up meanwhile, say
        reason = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
        log.print(Text.assemble(("error: ", "red"), printable(reason)))
        return FAILURE
    return 0


def logging_to_console(verbose: bool) -> None:
    """Send sdrpc's log to standard error: warnings, or with ``verbose`` everything."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("sdrpc").setLevel(logging.DEBUG if verbose else logging.WARNING)


class Printable(logging.Formatter):
    """Messages stay in their line and change nothing else of the terminal, whoever wrote what they quote."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


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


def unused_tensors(unused: Mapping[str, Sequence[str]], verbose: bool) -> None:
    """Per file, tensors that belong to no part of the model: how many, and with ``verbose`` which."""
    for path, names in unused.items():
        more = "" if verbose else " (-v: which)"
        log.print(Text(f"{printable(path)}: {len(names)} tensors are not used by the model{more}"))
        if verbose:
            log.print(*(Text(f"  {printable(name)}") for name in names), sep="\n")


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


class Amount(ProgressColumn):
    """How much of a task is done, and how fast: steps as sd-cli writes them, or bytes."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        total = task.total or 0
        if not task.fields["unit"]:
            text = ""
        elif task.fields["unit"] == "bytes":
            text = f"{task.completed / 2**20:,.0f}/{total / 2**20:,.0f} MiB  {speed / 2**20:,.0f} MiB/s"
        else:
            pace = f"{speed:.2f} it/s" if speed >= 1 or not speed else f"{1 / speed:.2f} s/it"
            text = f"{task.completed:.0f}/{total:.0f}  {pace}"
        return Text(text, style="progress.data.speed")


class Meter:
    """A line of progress for each thing that takes time. :meth:`bytes` and :meth:`steps` say how far it is,
    :meth:`capturing` that something is under way."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def bytes(self, what: str, done: int, total: int) -> None:
        self._update(what, "bytes", done, total)

    def steps(self, what: str, done: int, total: int) -> None:
        self._update(what, "steps", done, total)

    @contextmanager
    def capturing(self, what: str) -> Iterator[None]:
        """A graph of ``what`` is captured: nobody knows how far that is."""
        task = self._progress.add_task(f"{what}: capturing its graph, once", total=None, unit="")
        try:
            yield
        finally:
            self._progress.update(task, total=1, completed=1)

    def _update(self, what: str, unit: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, unit=unit)
        self._progress.update(self._tasks[what], completed=done, total=total)


@contextmanager
def metered() -> Iterator[Meter]:
    """Progress on standard error for as long as the context lasts."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), Amount(), TimeElapsedColumn(), console=log
    ) as progress:
        yield Meter(progress)
