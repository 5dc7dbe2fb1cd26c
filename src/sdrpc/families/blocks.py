"""A transformer some of its blocks at a time: what comes out of the first ones, and what goes on from there.

That is how a block cache (:mod:`sdrpc.diffusion.dbcache`) has a model compute less than all of it. Each
:class:`Span` is a graph of its own over the same weights. What is between two blocks is one tensor, the *state* (batch,
tokens, width): the tokens of the text, where blocks have them apart, and then those of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

BLOCKS = "blocks"
"""Option of a diffusion model's configuration: a :class:`Span`."""

STATE = "state"
"""Input of what begins behind a block."""


class Span(NamedTuple):
    """What is computed of a transformer.

    ``first`` 0: its blocks up to the first ``mark``. Outputs: the state behind them, and how much they changed the
    picture's tokens. Otherwise everything behind the first ``first`` blocks, from the input :data:`STATE` on. Outputs:
    the model's own, and where ``mark`` is another block, how much the state behind that one differs from the input.
    """

    first: int
    mark: int


class _Reached(Exception):
    """All blocks that are wanted were computed."""


def spanning(lists: Sequence[str], call: Call, span: Span) -> Call:
    """``call``, a function of a module and its inputs, with ``span`` of the module's blocks alone; these are in the
    module's ``lists``, one after the other."""

    def beginning(module: nn.Module, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        blocks = _blocks(module, lists)
        given: list[torch.Tensor] = []
        reached: list[torch.Tensor] = []

        def begins(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given.append(named["hidden_states"] if "hidden_states" in named else arguments[0])

        def ends(_: nn.Module, __: object, output: Any) -> None:
            reached.append(_joined(output))
            raise _Reached

        with ExitStack() as hooks:
            hooks.callback(blocks[0].register_forward_pre_hook(begins, with_kwargs=True).remove)
            hooks.callback(blocks[span.mark - 1].register_forward_hook(ends).remove)
            with suppress(_Reached):
                call(module, **inputs)
        (picture,), (state,) = given, reached
        return state, _last(state, picture) - picture

    def rest(module: nn.Module, state: torch.Tensor, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        blocks = _blocks(module, lists)
        reached: list[torch.Tensor] = []

        def begins(_: nn.Module, __: object, output: Any) -> Any:
            return _split(state, output)

        def passes(_: nn.Module, __: object, output: Any) -> None:
            reached.append(_joined(output))

        with ExitStack() as hooks:
            hooks.callback(blocks[span.first - 1].register_forward_hook(begins).remove)
            if span.mark != span.first:
                hooks.callback(blocks[span.mark - 1].register_forward_hook(passes).remove)
            predicted = call(module, **inputs)
        changes = [after - _last(state, after) for after in reached]
        missing = [change.new_zeros(len(state), state.shape[1] - change.shape[1], state.shape[2]) for change in changes]
        return (*predicted, *(torch.cat(pair, 1) for pair in zip(missing, changes, strict=True)))

    return rest if span.first else beginning


def _blocks(module: nn.Module, lists: Sequence[str]) -> list[nn.Module]:
    return [block for name in lists for block in getattr(module, name)]


def _joined(output: Any) -> torch.Tensor:
    """What a block gives, the picture or the text and the picture, as one tensor; last blocks give no text."""
    import torch

    return output if isinstance(output, torch.Tensor) else torch.cat([part for part in output if part is not None], 1)


def _split(state: torch.Tensor, output: Any) -> Any:
    """``state`` as a block gives it whose output is like this one."""
    import torch

    if isinstance(output, torch.Tensor):
        return _last(state, output)
    lengths = [0 if part is None else part.shape[1] for part in output]
    pieces = torch.split(state[:, state.shape[1] - sum(lengths) :], lengths, 1)
    return tuple(None if part is None else piece for part, piece in zip(output, pieces, strict=True))


def _last(state: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """As many of the state's last tokens as ``like`` has."""
    return state[:, state.shape[1] - like.shape[1] :]
