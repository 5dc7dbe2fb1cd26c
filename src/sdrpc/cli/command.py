"""A command as a table of options, from which parsing, --help and completion follow.

Built on click; what differs: options are grouped in --help, names of other spelling mean the same (``--clip-l``,
``--vae_backend_device``), and what is wrong is one of sdrpc's own errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import get_completion_class, shell_complete

from ..errors import CheckpointError, InvalidValue, UsageError
from .report import USAGE, warn
from .values import OnOff

Chosen = Mapping[str, Any]
"""The options' values, by the options' names in Python."""

SHELLS = ("bash", "zsh", "fish")
HELP_COLUMNS = 100
"""Width of --help on a terminal that is as wide."""
HELP_COLUMN = 32
"""Where what options mean begins, at the latest."""


class Option(click.Option):
    """An option below the heading ``group``. ``shown``: what stands as its default, where that is no value."""

    def __init__(self, group: str, *names: str, shown: str = "", **facts: Any) -> None:
        super().__init__(names, **facts)
        self.group, self.shown = group, shown

    @property
    def takes_value(self) -> bool:
        return not self.is_flag and not isinstance(self.type, OnOff)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        names = ", ".join(sorted(self.opts, key=_is_short, reverse=True))
        metavar = "" if self.is_flag else f" {self.make_metavar(ctx)}"
        default = self.shown or (
            str(self.default) if isinstance(self.default, str | int | float) and not self.is_flag else ""
        )
        return names + metavar, f"{self.help}{f' [default: {default}]' if default else ''}"


GIVEN = object()
"""Stands for any value that an option is given."""


class Command(click.Command):
    """A command whose ``options`` are grouped in --help. ``refused``: options that another program has, each with the
    reason why this one does not take it; ``ignored``: those that ask for what is done anyway. ``within``: fields that
    are part of what an option says, each with the option. ``acts_on``: parameters that change what another one asks
    for, or that mean something with one value of it; where only the first is given, a warning says that it has no
    effect. ``unread``: a parameter and a value of it, or ``GIVEN`` → those that have no effect then. ``bare``: the
    command has something to do without arguments; else its --help is printed. ``first``: words that mean other commands
    where they come first."""

    def __init__(
        self,
        name: str,
        options: Sequence[Option],
        callback: Callable[..., int | None],
        refused: Mapping[str, str] | None = None,
        ignored: Iterable[str] = (),
        within: Mapping[str, str] | None = None,
        acts_on: Mapping[str, str | tuple[str, str]] | None = None,
        unread: Mapping[tuple[str, object], Collection[str]] | None = None,
        bare: bool = False,
        first: Sequence[str] = (),
        **facts: Any,
    ) -> None:
        context = {
            "help_option_names": ["-h", "--help"], "max_content_width": HELP_COLUMNS, "allow_extra_args": True
        }  # fmt: skip
        super().__init__(name, params=list(options), callback=callback, context_settings=context, **facts)
        self.options, self.refused, self.ignored, self.bare = options, refused or {}, frozenset(ignored), bare
        self._within, self._acts_on, self._unread = dict(within or {}), dict(acts_on or {}), dict(unread or {})
        self._first = frozenset(first)

    @property
    def fields(self) -> dict[str, str]:
        """The option that sets each parameter, in the first of its long forms."""
        return {str(option.name): sorted(option.opts, key=_is_short)[0] for option in self.options} | self._within

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.options:
            groups.setdefault(option.group, []).append(option.get_help_record(ctx))
        list(groups.values())[-1].append(("-h, --help", "Print this and exit."))
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records, col_max=HELP_COLUMN)

    def run(self, arguments: Sequence[str]) -> int:
        """Its exit status. Raises :class:`UsageError` for arguments that mean nothing, and what the callback raises."""
        if completed := self._completion():
            return completed - 1
        if not arguments and not self.bare:
            click.echo(self.get_help(self.make_context(self.name, [], resilient_parsing=True)))
            return USAGE
        try:
            with self.make_context(self.name, self.canonical(arguments)) as ctx:
                self._refuse_words(ctx.args)
                self._warn_of_what_is_idle(ctx)
                ended: int | None = self.invoke(ctx)
        except click.exceptions.Exit as error:
            return error.exit_code
        except click.BadParameter as error:
            raise UsageError(self._told(error)) from error
        except click.ClickException as error:
            raise UsageError(error.format_message()) from error
        except CheckpointError as error:
            if option := self._naming(error.path, ctx):
                raise CheckpointError(f"{option} {error.path}", error.reason, error.tensor) from error
            raise
        return ended or 0

    def _told(self, error: click.BadParameter) -> str:
        """What is wrong with a number, with the option, and how decimals are written."""
        option = self.fields.get(str(error.param and error.param.name), "")
        decimal = re.match(r"'(-?\d+),(\d+)'.* float", error.message)
        hint = f"; write it as {decimal[1]}.{decimal[2]}" if decimal else ""
        said = re.sub("valid (float|integer)( range)?", lambda match: _NUMBERS[match[1]], error.message.rstrip("."))
        return f"{option}: {said}{hint}" if option else error.format_message()

    def _naming(self, path: object, ctx: click.Context) -> str:
        """The option that named a file."""
        files = (str(option.name) for option in self.options if isinstance(option.type, click.Path))
        named = {Path(given): self.fields[name] for name in files if isinstance(given := ctx.params[name], str)}
        return named.get(Path(str(path)), "")

    def _refuse_words(self, words: Sequence[str]) -> None:
        """Raises :class:`UsageError` where there are ``words`` that belong to no option."""
        for word in words:
            if word in self._first:
                raise UsageError(f"{word} comes first, before any option: {self.name} {word} --help")
        if words:
            raise UsageError(f"{words[0]!r} belongs to no option; words of one value are written in quotes")

    def _warn_of_what_is_idle(self, ctx: click.Context) -> None:
        usual = {str(option.name): option.get_default(ctx) for option in self.options}
        given = {name for name in usual if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        for (name, value), unread in self._unread.items():
            idle = [self.fields[other] for other in usual if other in given & {*unread}]
            if idle and (name in given if value is GIVEN else ctx.params[name] == value):
                has = "has" if len(idle) == 1 else "have"
                what = self.fields[name] if value in (True, GIVEN) else f"{self.fields[name]} {value}"
                warn(f"{', '.join(idle)} {has} no effect with {what}")
                given -= {*unread}
        for name, other in self._acts_on.items():
            field, *value = [other] if isinstance(other, str) else other
            found = ctx.params[field]
            if name in given and (found != value[0] if value else found in (None, usual[field])):
                warn(f"{self.fields[name]} has no effect without {' '.join([self.fields[field], *value])}")

    def canonical(self, arguments: Sequence[str]) -> list[str]:
        """``arguments`` with every option in the spelling of the table. Values stay as they are.

        Raises :class:`UsageError` for a refused option.
        """
        ours = {name: option for option in self.options for name in option.opts}
        spellings = {_folded(name): name for name in (*self.refused, *self.ignored, "--help", *ours)}
        result: list[str] = []
        rest = list(arguments)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                return [*result, argument, *rest]
            name, equals, value = argument.partition("=")
            meant = spellings.get(_folded("--" + name.lstrip(_DASHES)))
            if meant is not None and _written_wrong(name):
                raise UsageError(f"{name}: long options begin with two hyphens: {meant}")
            name = spellings.get(_folded(name), name)
            if name in self.refused:
                raise UsageError(f"{name}: {self.refused[name]}")
            if name in self.ignored:
                continue
            option = ours.get(name)
            if option is not None and isinstance(option.type, OnOff) and not equals:
                equals, value = "=", rest.pop(0) if rest and rest[0] in ("on", "off") else "on"
            result.append(name + equals + value)
            if option is not None and option.takes_value and not equals and rest:
                result.append(rest.pop(0))
        return result

    def _completion(self) -> int:
        """Answer a shell that asks to complete a line: its exit status and 1; 0 where none asks."""
        variable = f"_{self.name}_COMPLETE".replace("-", "_").upper()
        asked = os.environ.get(variable, "")
        if not asked:
            return 0
        shell, _, what = asked.rpartition("_")
        if what in SHELLS:  # the order that typer has
            asked = f"{what}_{shell}"
        return 1 + shell_complete(self, {}, str(self.name), variable, asked)

    def completion(self, shell: str) -> str:
        """The script that teaches ``shell`` to complete the command's lines."""
        kind = get_completion_class(shell)
        if kind is None:
            raise InvalidValue("completion", shell, f"there are {', '.join(SHELLS)}")
        name = str(self.name)
        return kind(self, {}, name, f"_{name}_COMPLETE".replace("-", "_").upper()).source()


_NUMBERS = {"float": "number", "integer": "whole number"}
"""What click's names of types mean."""

_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
"""Hyphens, and what programs for texts make of them."""


def _written_wrong(option: str) -> bool:
    """Whether a long option begins with one hyphen or another dash: -steps, —steps."""
    return option[:1] in _DASHES and not option.startswith("--") and len(option.lstrip(_DASHES)) > 1


def _is_short(option: str) -> bool:
    return not option.startswith("--")


def _folded(option: str) -> str:
    return option.lower().replace("_", "-") if option.startswith("--") else option
