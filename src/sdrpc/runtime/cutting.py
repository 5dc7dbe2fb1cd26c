"""A lowered graph cut into parts, for devices that compute them one after the other.

Nodes stand in the order of execution, so a cut is a position in that list. What was computed before it and is still
read behind it has to cross: a part has it as outputs, later ones as inputs. Each weight goes with the nodes that read
it. Where to cut is chosen so that each part's weights fit its device, about in proportion to the room there is, and
among such positions few bytes cross.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import GraphError
from ..ggml.memory_planner import aligned
from ..ggml.ops import ALIASES
from ..ggml.params import NO_PARAMS
from ..ggml.tensor import OUTPUT, Graph, Tensor, root, sources
from .lowered import Input, Lowered, Output

TOLERANCE = 0.1
"""Share of a graph's weights by which a part may miss its share, where less crosses then."""

ALIGNMENT = 256
"""Bytes to which a weight is counted up: devices begin each at a multiple of something."""

FAR = 1024
"""How many bytes that cross a byte is worth which is on the wrong side of a cut."""

ELEMENTWISE = frozenset({"ADD", "SUB", "MUL", "DIV", "SCALE", "CLAMP", "UNARY", "GLU", "SQR", "SQRT"})
"""Operations that devices compute together with the one before, rounding once: a value that only one of these reads is
not cut off from it, so that a graph which was cut gives the same numbers."""

CROSSING = "crossing"
"""What the names of values begin with that cross; a module's own inputs are named otherwise."""

_TORCH = {"F32": "float32", "F16": "float16", "I32": "int32"}
"""Types that cross unchanged, and how torch calls them."""

Integers = NDArray[np.int64]


class Part(NamedTuple):
    """A graph of its own. Its outputs are ``gives``, the values that cross from here, by name, then ``results``: the
    whole graph's outputs that are computed here, by their number."""

    lowered: Lowered
    gives: tuple[str, ...]
    results: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its weights."""
        return sum(weight.leaf.nbytes for weight in self.lowered.weights)


class Profile(NamedTuple):
    """What a cut before each node would mean, also behind the last one: ``crossing`` bytes, -1 where there can't be
    one; and the weights with the position of the first node that reads each, and their bytes."""

    crossing: Integers
    names: tuple[str, ...]
    first: Integers
    sizes: Integers


def profile(lowered: Lowered) -> Profile:
    """What cuts through ``lowered`` would mean. Raises :class:`GraphError` for a graph that can't be cut."""
    nodes = lowered.graph.nodes
    position = {node: at for at, node in enumerate(nodes)}
    first: dict[Tensor, int] = {}
    last: dict[Tensor, int] = {}
    for at, node in enumerate(nodes):
        if _renames(node):  # every part has the names that it needs
            continue
        if node.view_src is not None:
            raise GraphError("a graph that writes over its own values can't be cut", repr(node))
        for source in node.src:
            if source is not None:
                owner = root(source)[0]
                first.setdefault(owner, at)
                last[owner] = at
    steps, closed = np.zeros((2, len(nodes) + 2), np.int64)
    for value, until in last.items():
        if value in position:
            lives = [position[value] + 1, until + 1]
            steps[lives] += value.nbytes, -value.nbytes
            merges = first[value] == until and nodes[until].op in ELEMENTWISE
            if merges or value.type.name not in _TORCH or not value.contiguous:
                closed[lives] += 1, -1
    crossing = np.where(np.cumsum(closed) > 0, -1, np.cumsum(steps))[:-1]
    read = [weight for weight in lowered.weights if weight.leaf in first]
    return Profile(
        crossing,
        tuple(weight.name for weight in read),
        np.array([first[weight.leaf] for weight in read], np.int64),
        np.array([aligned(weight.leaf.nbytes, ALIGNMENT) for weight in read], np.int64),
    )


def _renames(tensor: Tensor) -> bool:
    """Whether it is another name for the bytes of a tensor."""
    return tensor.op in ALIASES and tensor.view_src is not None


def positions(facts: Profile, rooms: Sequence[int], placed: Mapping[str, int] | None = None) -> tuple[int, ...] | None:
    """Where to cut a graph so that the weights of part i take at most ``rooms[i]`` bytes; None where that can't be.

    ``placed``: the part in which weights are already, because another graph of the same module was cut there: they take
    no room, and the same cuts are best. Else as few bytes cross as can be where weights are within :data:`TOLERANCE` of
    the shares that ``rooms`` have of all room.
    """
    end, cuts = len(facts.crossing) - 1, len(rooms) - 1
    there = np.array([(placed or {}).get(name, -1) for name in facts.names], np.int64)

    def before(counted: NDArray[np.bool_]) -> Integers:
        """Bytes of these weights that nodes before each position read first."""
        found = np.zeros(end + 1, np.int64)
        np.add.at(found, facts.first[counted] + 1, facts.sizes[counted])
        return np.cumsum(found)

    new = before(there < 0)
    total = int(new[-1])
    if not cuts:
        return () if total <= rooms[0] else None
    candidates = _cheapest(facts.crossing, before(there >= -1))
    if len(candidates) < cuts:
        return None
    weight, crossing = new[candidates], facts.crossing[candidates].astype(np.float64)
    shares = np.cumsum(np.array(rooms, np.float64)) / max(sum(rooms), 1)
    reached, came = np.where(weight <= rooms[0], 0.0, np.inf), []
    for cut in range(cuts):
        if cut:
            reached, at = _best_before(reached, weight, rooms[cut])
            came.append(at)
        early, late = before(there > cut), before((there >= 0) & (there <= cut))
        misplaced = (early + late[-1] - late)[candidates]
        off = np.abs(weight - total * shares[cut])
        outside = np.maximum(off - TOLERANCE * total, 0)
        reached = reached + crossing + FAR * (misplaced + outside) + off / max(total, 1)
    reached = np.where(total - weight <= rooms[-1], reached, np.inf)
    chosen = [int(np.argmin(reached))]
    if not np.isfinite(reached[chosen[0]]):
        return None
    for at in reversed(came):
        chosen.insert(0, int(at[chosen[0]]))
    return tuple(int(candidates[each]) for each in chosen)


def _cheapest(crossing: Integers, order: Integers) -> Integers:
    """Of the positions between the same two weights the one where least crosses, without the graph's two ends."""
    inner = np.arange(1, len(crossing) - 1)
    inner = inner[(crossing[inner] >= 0) & (order[inner] > 0) & (order[inner] < order[-1])]
    best: dict[int, int] = {}
    for at in inner.tolist():
        known = best.get(int(order[at]))
        if known is None or crossing[at] < crossing[known]:
            best[int(order[at])] = at
    return np.array(sorted(best.values()), np.int64)


def _best_before(reached: NDArray[np.float64], weight: Integers, room: int) -> tuple[NDArray[np.float64], Integers]:
    """For each position the cheapest earlier one from which the weights between them fit ``room``."""
    costs, before = np.full(len(weight), np.inf), np.zeros(len(weight), np.int64)
    lowest = np.searchsorted(weight, weight - room, side="left")
    for at in range(1, len(weight)):
        if lowest[at] < at:
            before[at] = lowest[at] + int(np.argmin(reached[lowest[at] : at]))
            costs[at] = reached[before[at]]
    return costs, before


def parts(lowered: Lowered, cuts: Sequence[int]) -> tuple[Part, ...]:
    """``lowered`` cut before the nodes at ``cuts``, rising positions. Run in order, each with what the ones before it
    give, the parts compute what the whole does."""
    nodes = lowered.graph.nodes
    ends = (0, *cuts, len(nodes))
    written = [_Segment(nodes, start, stop) for start, stop in pairwise(ends)]
    names: dict[Tensor, str] = {}
    for segment in written:
        for value in segment.crossed:
            names.setdefault(value, f"{CROSSING} {len(names)}")
    return tuple(segment.part(lowered, names, segment is written[-1]) for segment in written)


def whole(lowered: Lowered) -> Part:
    """A graph that was not cut."""
    return Part(lowered, (), tuple(range(len(lowered.outputs))))


class _Segment:
    """The nodes from ``start`` to ``stop`` as a graph of its own, but for what crosses out of it."""

    def __init__(self, nodes: Sequence[Tensor], start: int, stop: int) -> None:
        self._computed = {node for node in nodes[start:stop] if not _renames(node)}
        self._elsewhere = {node for node in nodes[:start] if not _renames(node)}
        self._order: dict[Tensor, None] = {}
        """Its nodes, each name for bytes before it is first used."""
        self._leaves: dict[Tensor, None] = {}
        for node in nodes[start:stop]:
            if node in self._computed:
                for source in sources(node):
                    self._need(source)
                self._order[node] = None

    def _need(self, tensor: Tensor) -> None:
        if tensor in self._order or tensor in self._leaves:
            return
        if _renames(tensor):
            for source in sources(tensor):
                self._need(source)
            self._order[tensor] = None
        else:
            self._leaves[tensor] = None

    @property
    def crossed(self) -> list[Tensor]:
        """What it reads of what was computed before."""
        return [leaf for leaf in self._leaves if leaf in self._elsewhere]

    def part(self, lowered: Lowered, names: Mapping[Tensor, str], last: bool) -> Part:
        """It as a graph; ``names``: of what crosses, here or elsewhere. The ``last`` one has results that nobody
        computes."""
        new = {leaf: leaf for leaf in self._leaves}
        arriving = []
        for value in self.crossed:
            new[value] = leaf = replace(value, op="NONE", params=NO_PARAMS, src=(), flags=0)
            arriving.append(Input(names[value], _TORCH[value.type.name], tuple(reversed(value.ne)), (leaf,)))
        for node in self._order:
            src = tuple(source and new[source] for source in node.src)
            flags = node.flags | OUTPUT if node in names else node.flags
            new[node] = replace(node, src=src, view_src=node.view_src and new[node.view_src], flags=flags)
        leaving = [node for node in self._order if node in self._computed and node in names]
        outputs = [Output(_TORCH[node.type.name], tuple(reversed(node.ne)), new[node]) for node in leaving]
        results = []
        for number, output in enumerate(lowered.outputs):
            if isinstance(output.source, Tensor) and output.source in self._computed:
                outputs.append(replace(output, source=new[output.source]))
                results.append(number)
            elif last and not isinstance(output.source, Tensor):
                outputs.append(output)
                results.append(number)
        part = Lowered(
            Graph(tuple(new[node] for node in self._order)),
            (*self._inputs(lowered), *arriving),
            tuple(weight for weight in lowered.weights if weight.leaf in self._leaves),
            tuple(constant for constant in lowered.constants if constant.leaf in self._leaves),
            tuple(outputs),
        )
        return Part(part, tuple(names[node] for node in leaving), tuple(results))

    def _inputs(self, lowered: Lowered) -> Iterator[Input]:
        for entry in lowered.inputs:
            leaves = tuple(leaf for leaf in entry.leaves if leaf in self._leaves)
            if leaves:
                yield replace(entry, leaves=leaves)
