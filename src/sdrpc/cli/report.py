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

from ..errors import InvalidValue, MissingComponent, SdrpcError, UsageError

if TYPE_CHECKING:
    from ..device import Device
    from ..diffusion.events import Event

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
"""Exit statuses: something failed; an option is wrong; Ctrl-C."""

log = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress, warnings and errors go here."""

results = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
"""Standard output; a table in a file or a pipe is as wide as it needs."""


def guarded(command: Callable[[], None]) -> int:
    """Run ``command``; its exit status. Errors that sdrpc raises on purpose become one line on standard error."""
    try:
        command()
    except SdrpcError as error:
        log.print(Text.assemble(("error: ", "red"), said(error)))
        return USAGE if isinstance(error, UsageError) else FAILURE
    except KeyboardInterrupt:
        log.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads our output any more
        return FAILURE
    except OSError as error:  # a disk that filled up meanwhile, say
        log.print(Text.assemble(("error: ", "red"), f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")))
        return FAILURE
    return 0


def said(error: SdrpcError) -> str:
    """An error in the words of the command line: fields are its options."""
    if isinstance(error, InvalidValue):
        return str(error).replace(error.field, option(error.field), 1)
    if isinstance(error, MissingComponent):
        others = f", or a whole model with {option(error.other)}" if error.other else ""
        return f"{error.reason}; give it with {option(error.field)}{others}"
    return str(error)


def option(field: str) -> str:
    """The option that sets a field of :class:`Request` or :class:`ModelFiles`."""
    return "--" + (field if field in ("clip_l", "clip_g") else field.replace("_", "-"))


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


def unused_tensors(unused: Mapping[str, Sequence[str]], verbose: bool) -> None:
    """Per file, tensors that belong to no part of the model: how many, and with ``verbose`` which."""
    for path, names in unused.items():
        log.print(f"{path}: {len(names)} tensors are not used by the model" + ("" if verbose else " (-v: which)"))
        if verbose:
            log.print(*(f"  {name}" for name in names), sep="\n")


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
    """A line of progress for each thing that takes time: :meth:`bytes` and :meth:`steps` say how far
    one is, :meth:`tell` takes a
    session's events."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def bytes(self, what: str, done: int, total: int) -> None:
        self._update(what, "bytes", done, total)

    def steps(self, what: str, done: int, total: int) -> None:
        self._update(what, "steps", done, total)

    def tell(self, event: Event) -> None:
        """Show what a session does."""
        if event.stage == "capture":
            self._update(f"{event.component}: capturing its graph, once", "", event.done or None, event.total)
        elif event.stage == "upload":
            self._update(event.component, "bytes", event.done, event.total)
        elif event.stage == "sample":
            self._update(f"picture {event.picture}/{event.pictures}", "steps", event.done, event.total)
        elif event.stage == "release":
            log.print(f"{event.component}'s weights left their device: another component needs the room")

    def _update(self, what: str, unit: str, done: int | None, total: int) -> None:
        """``done`` None: nobody knows how far it is."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=None if done is None else total, unit=unit)
        if done is not None:
            self._progress.update(self._tasks[what], completed=done, total=total)


@contextmanager
def metered() -> Iterator[Meter]:
    """Progress on standard error for as long as the context lasts."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), Amount(), TimeElapsedColumn(), console=log
    ) as progress:
        yield Meter(progress)
