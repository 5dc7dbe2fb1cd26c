"""What a client's carriers receive, while its next message is read and what was received before is noted."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import NamedTuple

from ..errors import RemoteProtocolError
from ..wire.carrying import Piece, dealt, together
from ..wire.framing import Received
from ..wire.messages import Command, SetRanges
from .carriers import Carriers
from .incoming import Incoming, Part, receiving, take
from .places import Place, touch
from .session import Session
from .stream import Stream

AHEAD = 1
"""Loads that may be under way when another one begins."""
LOOK = 0.001
"""Seconds between two looks at the client while something is under way."""


class Load(NamedTuple):
    """What comes to ``places``, and what ``carriers`` do for that. To leave ``targets`` says that it is there, or that
    it will not be."""

    places: list[Place]
    carriers: Carriers
    under_way: list[Future[None]]
    targets: ExitStack


class Loads:
    """The data of a client's SET_RANGES. To be entered, and left when all is finished, or with what went wrong: then
    nobody writes to the client's memory any more."""

    def __init__(self, stream: Stream, session: Session) -> None:
        self._stream, self._session = stream, session
        self._loads: deque[Load] = deque()

    def before(self, request: Received) -> None:
        """Wait for what ``request`` must not overtake. More data may come while other data does, and the server may
        look for what is called by its name, elsewhere in the client's memory."""
        if not self._loads or request.command == Command.SET_RANGES:
            return
        if request.command != Command.SET_RANGES_DIGEST or self._touches(self._session.asked_for(request.message)):
            self.finish()

    def begin(self, asked: SetRanges) -> None:
        """Have the carriers receive what comes for ``asked``."""
        session, places = self._session, self._session.ranges(asked)
        if self._touches(places):
            self.finish()
        sizes = [place.size for place in places]
        if session.carriers is None or not asked.carriers:
            raise RemoteProtocolError("SET_RANGES: there are no carriers")
        with ExitStack() as stack:
            targets = stack.enter_context(receiving(session, places))
            jobs = [partial(_receive, targets, sum(sizes), hand) for hand in dealt(sizes, asked.carriers)]
            under_way = session.carriers.begin(jobs)
            self._loads.append(Load(places, session.carriers, under_way, stack.pop_all()))
        self.finish(AHEAD)

    def catch_up(self) -> None:
        """Let the carriers work until the client says something more, or else until they are done."""
        while self._loads and not self._stream.has_more:
            state = wait(self._loads[0].under_way, LOOK, FIRST_EXCEPTION)
            if not state.not_done or any(each.exception() for each in state.done):
                self.finish(len(self._loads) - 1)

    def finish(self, left: int = 0) -> None:
        """Wait until at most ``left`` loads are under way. Raises what goes wrong with one."""
        while len(self._loads) > left:
            load, *others = self._loads
            with load.targets:
                load.carriers.finish(load.under_way, [job for each in others for job in each.under_way])
            self._loads.popleft()

    def _touches(self, places: Sequence[Place]) -> bool:
        """Whether any of ``places``, all of one buffer, may be in what is under way."""
        return any(touch(places, load.places) for load in self._loads)

    def __enter__(self) -> Loads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for load in self._loads:
            load.carriers.close()
        for load in self._loads:
            wait(load.under_way)
            load.targets.__exit__(kind, error, at)
        self._loads.clear()


def _receive(targets: Sequence[Incoming], size: int, hand: Sequence[Piece], carrier: Stream) -> None:
    """What one carrier receives of ``size`` bytes that come for ``targets``."""
    carrier.doing = Command.SET_RANGES.name
    carrier.expect(size)
    for pieces in together(hand):
        take([Part(targets[number], at, length) for number, at, length in pieces], carrier.read_into)
    carrier.done()
