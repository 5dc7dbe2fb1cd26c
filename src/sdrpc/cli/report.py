"""What commands print: results, messages, tables of devices, errors in one line.

Text of other people (paths, names of tensors, what servers say) is never markup, and stays in its line.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import MissingComponent, SdrpcError, UsageError
from ..key import Key
from ..text import printable
from . import interrupts, streams
from .json_log import ACCESS, JsonFormatter
from .progress import Meter, StatusLine, mebibytes

if TYPE_CHECKING:
    from .devices import Listed

FAILURE, USAGE = 1, 2
"""Exit statuses: something failed; an option is wrong."""

PIPE_COLUMNS = 160
"""A table in a file or a pipe is as wide as it needs, up to this."""

LEAST_COLUMNS = 60
"""A table on a terminal is never narrower."""

log = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""Progress, warnings and errors go here."""

status = StatusLine(log)


def say(text: str) -> None:
    """A message on standard error, in one line."""
    _tell(logging.INFO, Text(), text)


def warn(text: str) -> None:
    _tell(logging.WARNING, Text("warning: ", "yellow"), text)


def complain(text: str) -> None:
    """What went wrong."""
    _tell(logging.ERROR, Text("error: ", "red"), text)


def _tell(level: int, begin: Text, text: str) -> None:
    """A message for people, or a record of the log where that is for programs."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        logging.getLogger(__name__).log(level, "%s", text)
    else:
        _message(Text.assemble(begin, printable(text)))


def _message(text: Text) -> None:
    status.clear()
    log.print(text, soft_wrap=True)


def _somebody_is_there() -> bool:
    """Whether questions reach a person, and answers us."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def ask_key(server: str) -> Key | None:
    """The key for a server, from somebody at a terminal, who has three tries; None where there is nobody, or no key."""
    if not _somebody_is_there():
        return None
    status.clear()
    say(f"{server} lets clients in by key; rpc-server printed it there (rpc-server keys shows it again)")
    for _ in range(3):
        code = click.prompt("key", default="", hide_input=True, show_default=False, err=True)
        if not code:
            break
        try:
            return Key.parse(code)
        except UsageError as error:
            say(str(error))
    return None


def meter(preparing: Callable[[], float] = lambda: 0.0) -> Meter:
    """What shows a session's events; ``preparing`` as it takes it."""
    return Meter(status, say, preparing)


def result(path: Path) -> None:
    """The name of a file that was made: a line on standard output, as it is, so that scripts can read it."""
    status.clear()
    name = str(path)
    sys.stdout.write((printable(name) if sys.stdout.isatty() else name) + "\n")
    sys.stdout.flush()


def table(rows: Table) -> None:
    """A table on standard output. A terminal wraps what is wider than it is: better than half a number."""
    status.clear()
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, LEAST_COLUMNS) if sys.stdout.isatty() else PIPE_COLUMNS
    console.print(rows)


def guarded(command: Callable[[], int | None], options: Mapping[str, str] | None = None) -> int:
    """Run ``command``; its exit status, 0 where it gives none. Errors that sdrpc raises on purpose, and what
    the system refuses, become one line on standard error, in which ``options`` (field → option) stand for fields."""
    try:
        ended = command() or 0
    except SdrpcError as error:
        complain(said(error, options or {}))
        ended = USAGE if isinstance(error, UsageError) else FAILURE
    except (KeyboardInterrupt, click.Abort):  # the latter at a question, also where its answer is Ctrl-D
        if interrupts.is_news():
            say(interrupts.said())
        ended = interrupts.status()
    except OSError as error:  # a disk that filled up meanwhile, say
        complain(reason(error))
        ended = FAILURE
    except MemoryError as error:
        complain(f"this machine has no memory left for that {f'({error})' if str(error) else ''}".rstrip())
        ended = FAILURE
    except ImportError as error:  # a library that is damaged, or that there is no memory for
        complain(f"{error.name or 'a library'} can't be loaded: {error}")
        ended = FAILURE
    finally:
        status.clear()
    sys.stdout.flush()
    lost = streams.failure(sys.stdout)
    if lost:
        warn(f"standard output: {reason(lost)}")
    return ended or (FAILURE if lost else 0)


def reason(error: OSError) -> str:
    """What the system says, with the file if one is to blame."""
    name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    return name + (error.strerror or str(error))


def said(error: SdrpcError, options: Mapping[str, str]) -> str:
    """An error in the words of the command line."""

    def option(field: str) -> str:
        return options.get(field, field)

    if isinstance(error, MissingComponent):
        others = f", or a whole model with {option(error.other)}" if error.other else ""
        return f"{error.reason}; give it with {option(error.field)}{others}"
    return error.told(option)


def logging_to_console(verbose: bool) -> None:
    """Send sdrpc's log to standard error: warnings, or with ``verbose`` everything."""
    logging.getLogger().addHandler(_HANDLER)
    logging.getLogger("sdrpc").setLevel(logging.DEBUG if verbose else logging.WARNING)


def logging_as_json(verbose: bool) -> None:
    """Send the log of sdrpc and of requests to standard error, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.getLogger().addHandler(handler)
    logging.getLogger("sdrpc").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger(ACCESS).setLevel(logging.INFO)


class Printable(logging.Formatter):
    """Messages stay in their line and change nothing else of the terminal, whoever wrote what they quote."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class _Handler(logging.Handler):
    """One line for each record, above the status line; more only where it has a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _message(Text(self.format(record)))
        except Exception:  # as every handler does: what can't be logged must not end the work
            self.handleError(record)


_HANDLER = _Handler()
_HANDLER.setFormatter(Printable("%(levelname)s %(name)s: %(message)s"))


def device_table(devices: Iterable[Listed]) -> Table:
    """Name, description and memory of each device."""
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("device")
    table.add_column("what it is", overflow="fold")
    table.add_column("free", justify="right")
    table.add_column("total", justify="right")
    for name, description, memory in devices:
        table.add_row(Text(name), Text(printable(description)), mebibytes(memory.free), mebibytes(memory.total))
    return table


def unused_tensors(unused: Mapping[str, Sequence[str]], verbose: bool) -> None:
    """Per file, tensors that belong to no part of the model: how many, and with ``verbose`` which."""
    for path, names in unused.items():
        say(f"{path}: {len(names)} tensors are not used by the model" + ("" if verbose else " (-v: which)"))
        for name in names if verbose else ():
            say(f"  {name}")
