"""The compiled form of one bound program, from the wish for one until it has proved itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from math import inf, isnan
from typing import NamedTuple

import torch
from torch import Tensor

from ..deadline import Deadline
from ..operations import EngineOp
from ..program import Bound
from ..values import ordered
from .compiler import Compiler, Function
from .job import Job, Origin
from .pure import is_pure, pure

log = logging.getLogger(__name__)

REPEATS = 4
"""Runs after which a program is one that repeats: text encoders run once or twice for a picture."""
SMALL = 64
"""A program with fewer steps than this gains nothing that is worth a minute of a processor."""
TIMES = 3
"""That code is asked for, where other weights of a program are kept than those that the last one was made for."""
ROUNDINGS = 16
"""How far (relative, L2) a compiled program's results may be from those that it replaces, in the narrow dtype's
roundings. It rounds less often, since it keeps in float32 what lies between operations that it fuses: 1 to 4 of them
in SD 1.5 and SDXL, as many as the program itself is from float32."""

EIGHT_BITS = 0.125
"""How much farther they may be apart where activations become 8-bit floats: what is rounded otherwise before goes to
another of these now and then, of which two neighbours are 2⁻³ apart at most."""


class Distance(NamedTuple):
    """How far a compiled program's result is from what the program has left of it: ``apart`` (relative, L2), over so
    many of its elements."""

    node: str
    apart: float
    elements: int


class CompiledProgram:
    """A bound program as compiled code. It runs as :class:`Bound` does."""

    def __init__(self, bound: Bound, function: Function) -> None:
        self._bound, self._function = bound, function
        program = pure(bound, {i: kept for i, weight in bound.weights.items() if (kept := weight.kept) is not None})
        self._inputs, self._stores, self._nodes = program.inputs, program.stores, program.nodes

    def results(self) -> list[Tensor]:
        """What belongs into the buffers; nothing is written."""
        return list(self._function(*self._inputs))

    def steps(self, _: Deadline | None = None) -> None:
        """Run it all. (No deadline can end it in the middle.)"""
        for weight in self._bound.weights.values():
            weight.touch()
        try:
            self.record()
        finally:
            self._bound.stored()

    def record(self) -> None:
        self._write(self.results())

    def _write(self, results: Sequence[Tensor]) -> None:
        for store, result in zip(self._stores, results, strict=True):
            store.copy_(result)

    def distances(self, results: Sequence[Tensor]) -> list[Distance]:
        """Of all ``results``, from what the program has just left in the buffers, which stays there. Of some that is
        only a part, since a native client places others over what it needs no more."""
        there = [store.clone() for store in self._stores]
        try:
            left = _left(self._stores)
        finally:
            self._write(there)
        return [
            Distance(node, _apart(result[own], was[own]), int(own.sum()))
            for node, result, was, own in zip(self._nodes, results, there, left, strict=True)
        ]


def _left(stores: Sequence[Tensor]) -> list[Tensor]:
    """Which elements of each of ``stores`` no later one shares a byte with: found by writing each one's number to all
    of its bytes, a digit at a time."""
    parts = [store.unsqueeze(-1).view(torch.uint8) for store in stores]
    left = [torch.ones_like(store, dtype=torch.bool) for store in stores]
    for shift in range(0, len(stores).bit_length(), 8):
        for number, part in enumerate(parts):
            part.fill_(number >> shift & 0xFF)
        for number, (part, own) in enumerate(zip(parts, left, strict=True)):
            own &= (part == number >> shift & 0xFF).all(-1)
    return left


def _apart(one: Tensor, other: Tensor) -> float:
    """Relative, in the L2 norm; for integers and blocks 0 or infinity, as for what is no number."""
    if not one.dtype.is_floating_point:
        return 0.0 if torch.equal(one, other) else inf
    one, other = one.float(), other.float()
    apart = float((one - other).norm()) / (float(other.norm()) or 1.0)
    return inf if isnan(apart) else apart


class Faster:
    """Watches a bound program that may be compiled, asks for its code when it repeats, and tries it. Never raises:
    what can't be compiled runs as it is."""

    def __init__(self, bound: Bound, origin: Origin, compiler: Compiler, threads: int) -> None:
        self._bound, self._origin, self._compiler, self._threads = bound, origin, compiler, threads
        self._limit = ROUNDINGS * torch.finfo(bound.compiled.narrow or torch.float32).eps
        if any(value.op is EngineOp.PRODUCT_8BIT for value in ordered(bound.compiled.roots)):
            self._limit += EIGHT_BITS
        self._runs = self._times = 0
        self._looked = False
        self._asked: Future[Function] | Future[Function | None] | None = None
        self._kept: tuple[bool, ...] = ()
        self._over = len(bound) < SMALL or not is_pure(bound.compiled.roots)

    def __del__(self) -> None:
        if self._asked is not None:
            self._asked.cancel()

    def unsettled(self) -> None:
        """Weights that the program keeps have changed: those that code was asked for have to settle anew."""
        if self._asked is not None:
            self._runs = 0

    def found(self) -> CompiledProgram | None:
        """To be called before each run that is not compiled: the compiled form when it is there, for :meth:`tried`. It
        looks for it from the second run on, in which weights are kept, and asks for it when the program repeats."""
        self._runs += 1
        if self._over or self._runs == 1 or (self._asked is not None and not self._asked.done()):
            return None
        kept = self._kept_now()
        try:
            if self._asked is not None and (function := self._asked.result()) is not None and kept == self._kept:
                return CompiledProgram(self._bound, function)
        except Exception as error:
            log.warning("a program of %d steps is not compiled: %s", len(self._bound), _line(error))
            self._over = True
            return None
        if self._runs > REPEATS and self._times == TIMES:
            log.info("weights that a program of %d steps keeps come and go: it is not compiled", len(self._bound))
            self._over = True
        elif self._runs > REPEATS or not self._looked:
            self._ask(kept)
        return None

    def _ask(self, kept: tuple[bool, ...]) -> None:
        job = Job(self._origin, self._bound.device, kept, self._threads)
        self._kept = kept
        if self._looked and self._runs > REPEATS:
            self._times += 1
            self._asked = self._compiler.ask(job)
        else:
            self._looked, self._asked = True, self._compiler.find(job)

    def tried(self, compiled: CompiledProgram, run: Callable[[], None]) -> bool:
        """``run`` the program as it is; whether ``compiled`` gives the same."""
        began = time.monotonic()
        try:
            results = compiled.results()
        except Exception as error:
            run()
            self._over = True
            log.warning("a compiled program of %d steps does not run: %s", len(self._bound), _line(error))
            return False
        took = time.monotonic() - began
        run()
        try:
            distances = compiled.distances(results)
        except Exception as error:  # there may be no memory to compare them
            self._over = True
            log.warning("a compiled program of %d steps is not compared: %s", len(self._bound), _line(error))
            return False
        farther = sum(each.apart > self._limit for each in distances)
        last = max(distances, key=lambda each: each.apart)
        where = f"{last.node} is {last.apart:.2e} from what it was, over {last.elements:,} elements"
        if not farther:
            log.info(
                "a program of %d steps runs compiled from now on; its first run took %.1f s, %s",
                len(self._bound), took, where,
            )  # fmt: skip
            return True
        self._over = True
        log.warning(
            "a compiled program of %d steps gives other numbers: it is not used; %d of %d results are farther than "
            "%.2e, %s", len(self._bound), farther, len(distances), self._limit, where,
        )  # fmt: skip
        return False

    def _kept_now(self) -> tuple[bool, ...]:
        return tuple(weight.kept is not None for weight in self._bound.weights.values())


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
