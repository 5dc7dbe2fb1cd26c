"""Weights in the format that a program computes with, made once and kept while memory allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from sdrpc.device import Mark
from sdrpc.ggml.tensor import Dims
from sdrpc.ggml.types import Type

from . import forms
from .blocks import dequantize
from .blocks.eight_bits import pack, packed_bytes
from .marks import Marks
from .memory import LocalBuffer, Storage

LAID = 1 << 12
"""Bytes that a weight is counted that takes no memory of its own, so that nobody has millions of them."""
CPU_CACHE = 448 * 2**20
"""Bytes of converted weights that the CPU keeps unless told otherwise: memory is other programs' as well there, and
converting float16 again takes a twentieth of a step. It is enough for SD 1.5 in float16 to be computed with in bfloat16
where it lies (:mod:`sdrpc.engine.forms`)."""
PIECE = 1 << 16
"""Elements that a core converts at a time."""


class WeightFormat(NamedTuple):
    """How a weight is wanted: its dtype, and whether its channels lie together (kernels of convolutions). ``packed``:
    as rows of 8 bits a number (:mod:`sdrpc.engine.blocks.eight_bits`), in bytes."""

    dtype: torch.dtype
    channels_last: bool = False
    packed: bool = False


def convert(raw: Tensor, type: Type, ne: tuple[int, int, int, int], format: WeightFormat) -> Tensor:
    """``raw``, a typed view of memory, in ``format``; always a copy unless it has that format already."""
    if format.packed:
        return pack(raw, type, ne)
    x = raw if type.plain else dequantize(raw, type, ne, format.dtype)
    if (x.dtype, format.dtype, x.device.type) == (torch.float16, torch.bfloat16, "cpu"):
        x = _bfloat16(x)
    if format.channels_last:
        return x.to(format.dtype, memory_format=torch.channels_last)
    return x.to(format.dtype)


def _bfloat16(x: Tensor) -> Tensor:
    """``x``, float16 on a CPU, as bfloat16. Torch has no vector code for this pair: it goes through float32, in pieces
    that stay in the cores' caches, which takes a quarter of the time."""
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    size = PIECE * torch.get_num_threads()
    between = torch.empty(min(size, x.numel()), dtype=torch.float32)
    for part, result in zip(torch.split(x.reshape(-1), size), torch.split(y.view(-1), size), strict=True):
        result.copy_(between[: len(part)].copy_(part))
    return y


class Source(NamedTuple):
    """What a weight is made of: bytes ``[start, end)`` of a storage (by its key), read as a tensor of that type and
    shape, in a format."""

    storage: int
    start: int
    end: int
    type: Type
    ne: Dims
    nb: Dims
    format: WeightFormat

    @property
    def nbytes(self) -> int:
        """What the weight takes in its format."""
        return packed_bytes(self.ne) if self.format.packed else prod(self.ne) * self.format.dtype.itemsize


@dataclass(eq=False, slots=True)
class CachedWeight:
    """A converted weight. ``tensor`` is gone when its bytes were ``written``, or when it had to make room. ``content``
    says of what it was made, where that is known: several places with the same content have one tensor. One that
    ``lies_there``, in the place of what it was made of (:mod:`sdrpc.engine.forms`), is gone, too, when somebody wanted
    that as it came."""

    tensor: Tensor | None
    size: int
    used: int
    """The run that it was last used in."""
    content: Hashable | None = None
    written: bool = False
    lies_there: bool = False


class Weights:
    """Converted weights by place and format. One lives until its bytes are written or their storage is freed. Where
    bytes are known to be the same, in whatever buffers (:meth:`mark`), one conversion does for all.

    Once ``budget`` bytes are full, further weights are converted at each use: none is thrown out for others of the same
    program, which uses all of them in turn and would find none of them again. But one that no program used for
    ``patience`` runs makes room (None: never).
    """

    def __init__(self, budget: int, patience: int | None = None) -> None:
        self.budget, self.patience = budget, patience
        self.used = 0
        self.runs = 0
        self.dropped = 0
        """Counts weights whose bytes were written: as long as it stays, every tensor handed out is still right."""
        self._kept: dict[int, dict[Source, CachedWeight]] = {}
        self._contents: dict[Hashable, list[CachedWeight]] = {}
        self._lock = Lock()

    def begin(self) -> None:
        """Another run of some program."""
        self.runs += 1

    def find(self, source: Source, marks: Marks) -> CachedWeight | None:
        """The weight that was made of ``source``, if it is kept; ``marks`` are those of the buffer that it is in."""
        with self._lock:
            return self._kept.get(source.storage, {}).get(source) or self._found_elsewhere(source, marks)

    def mark(self, buffer: LocalBuffer, start: int, end: int) -> Mark:
        """Note it when bytes ``[start, end)``, which were just written, are written again."""
        with self._lock:
            return buffer.marks.add(start, end)

    def identify(self, buffer: LocalBuffer, mark: Mark, name: Hashable) -> None:
        """The bytes at ``mark`` are those of that ``name``, unless they were written meanwhile. What is kept of them
        will do for others, too."""
        with self._lock:
            if mark.written or mark.moved:
                return
            mark.name = name
            for source, kept in self._kept.get(buffer.storage.key, {}).items():
                if kept.content is None and source.start < mark.end and mark.start < source.end:
                    content = _content(source, buffer.marks)
                    if content is not None and content not in self._contents:
                        kept.content = content
                        self._contents[content] = [kept]

    def unmark(self, buffer: LocalBuffer, start: int = 0, end: int | None = None) -> None:
        """Bytes ``[start, end)`` of ``buffer`` are about to be written, by default all of it."""
        with self._lock:
            buffer.marks.write(start, end)

    def has_room(self, size: int, claimed: bool = True) -> bool:
        """Whether ``size`` more bytes may be kept; if they are ``claimed``, weights that were not used for long
        leave."""
        with self._lock:
            if claimed and self.used + size > self.budget and self.patience is not None:
                self._make_room(size, self.runs - self.patience)
            return self.used + size <= self.budget

    def lay(self, source: Source, storage: Storage) -> CachedWeight | None:
        """Have the weight of ``source`` in the place of what it is made of, if that can be, and if there is room for
        what it takes to change it back."""
        size = forms.rest_bytes(source) + LAID
        if not self.has_room(size):
            return None
        with self._lock:
            self.used += size

        def give_back() -> None:
            with self._lock:
                self.used -= size

        def keep(tensor: Tensor) -> CachedWeight:
            self.move(storage, source.start, source.end, moved=True)
            return CachedWeight(tensor, size, self.runs, lies_there=True)

        made = None
        try:
            made = storage.forms.lay(storage, source, keep, give_back)
        finally:
            if made is None:
                give_back()
        return made

    def move(self, storage: Storage, start: int, end: int, moved: bool) -> None:
        """Bytes ``[start, end)`` of ``storage`` are ``moved`` around: who reads them in this moment must not give them
        a name. Or they are as they came, and stay so while they are read."""
        with self._lock:
            for buffer in tuple(storage.users):
                buffer.marks.move(start, end, moved)

    def keep(self, source: Source, tensor: Tensor, storage: Storage, marks: Marks) -> CachedWeight | None:
        """``tensor`` was made of ``source``, which is in ``storage``, and there is room for it. None where nobody would
        ever give it back, since that was freed."""
        with self._lock:
            if storage.freed:
                return None
            if elsewhere := self._found_elsewhere(source, marks):  # known to be the same only since it was made
                return elsewhere
            kept = CachedWeight(tensor, tensor.nbytes, self.runs, _content(source, marks))
            self._add(source, kept)
            self.used += kept.size
        return kept

    def drop(self, storage: int, start: int = 0, end: int | None = None) -> None:
        """Bytes ``[start, end)`` of ``storage`` are written: forget what was made of them."""
        with self._lock:
            self._drop(storage, start, end)

    def free(self, storage: Storage) -> None:
        """No buffer has ``storage`` any more: what was made of it is forgotten, and nothing more is kept of it."""
        with self._lock:
            storage.freed = True
            self._drop(storage.key, 0, None)

    def _drop(self, storage: int, start: int, end: int | None) -> None:
        mine = self._kept.get(storage, {})
        stale = [source for source in mine if source.end > start and (end is None or source.start < end)]
        for source in stale:
            self._forget(source).written = True
        self.dropped += len(stale)
        if not mine:
            self._kept.pop(storage, None)

    def _found_elsewhere(self, source: Source, marks: Marks) -> CachedWeight | None:
        """A weight of the same content, now also kept for ``source``."""
        content = _content(source, marks)
        others = self._contents.get(content, ()) if content is not None else ()
        if not others:
            return None
        kept = CachedWeight(others[0].tensor, others[0].size, self.runs, content)
        self._add(source, kept)
        return kept

    def _add(self, source: Source, kept: CachedWeight) -> None:
        self._kept.setdefault(source.storage, {})[source] = kept
        if kept.content is not None:
            self._contents.setdefault(kept.content, []).append(kept)

    def _make_room(self, size: int, before: int) -> None:
        """Forget weights that were last used before that run, the oldest first, until there is room for ``size``; none
        if all of them would not be enough."""
        idle = [(kept, source) for mine in self._kept.values() for source, kept in mine.items() if kept.used < before]
        if self.used - self._freed_with([kept for kept, _ in idle]) + size > self.budget:
            return
        for _, source in sorted(idle, key=lambda each: each[0].used):
            self._forget(source)
            if self.used + size <= self.budget:
                return

    def _freed_with(self, idle: list[CachedWeight]) -> int:
        """Bytes that are free when ``idle`` are forgotten: those of tensors that nobody else has."""
        together = Counter(kept.content for kept in idle if kept.content is not None)
        whole = {content for content, count in together.items() if count == len(self._contents[content])}
        return sum(kept.size for kept in idle if kept.content is None) + sum(
            self._contents[content][0].size for content in whole
        )

    def _forget(self, source: Source) -> CachedWeight:
        kept = self._kept[source.storage].pop(source)
        kept.tensor = None
        if kept.content is not None:
            others = self._contents[kept.content]
            others.remove(kept)
            if others:
                return kept
            del self._contents[kept.content]
        self.used -= kept.size
        return kept


def _content(source: Source, marks: Marks) -> Hashable | None:
    """What ``source`` is, wherever it is; None where nobody knows."""
    content = marks.content(source.start, source.end)
    return content and (content, source._replace(storage=0, start=0, end=0))


class Weight:
    """A weight as one program uses it: out of those that are kept, or converted.

    One that is ``opportunistic`` is converted only to be kept, if there is room for it when the program has run once
    (weights that must be converted come first); otherwise it is given as it is, and in the first run in any case: what
    others have kept must not decide how a program rounds. Bytes that are written between two runs are an input, not a
    weight, and what is made of them is not kept again. While ``may_keep`` is false nothing is kept: what is made while
    a CUDA graph is recorded exists in its replays only.
    """

    def __init__(
        self, weights: Weights, source: Source, opportunistic: bool, buffer: LocalBuffer, can_lie: bool = False
    ) -> None:
        self.may_keep = True
        self.source, self.can_lie = source, can_lie
        self._weights, self._opportunistic = weights, opportunistic
        self._storage, self._marks = buffer.storage, buffer.marks
        self._waits = opportunistic
        self._kept: CachedWeight | None = None
        self._is_input = False

    def __call__(self, raw: Tensor) -> Tensor:
        """The weight; ``raw`` is the typed view of its bytes."""
        kept = self._kept
        if (kept is None or kept.tensor is None) and not self._waits:
            kept = self._kept = self._found()
        if kept is None or kept.tensor is None:
            kept = self._kept = self._made(raw)
        tensor = None if kept is None else kept.tensor
        if kept is None or tensor is None:
            return self.alone(raw)
        kept.used = self._weights.runs
        return tensor

    @property
    def lies(self) -> bool:
        """Whether it uses what it is made of where that lies, in whatever form."""
        return self.can_lie and not (self._is_input or (self._kept is not None and self._kept.written))

    @property
    def kept(self) -> Tensor | None:
        """What is kept of it; None when each run converts it, or takes it as it is."""
        return None if self._kept is None else self._kept.tensor

    def touch(self) -> None:
        """Note that this run uses what is kept."""
        if self._kept is not None:
            self._kept.used = self._weights.runs

    def alone(self, raw: Tensor) -> Tensor:
        """What a run gets of ``raw`` while nothing is kept."""
        if self._opportunistic:
            return self._storage.forms.typed(self._storage.data, self.source, raw) if self.can_lie else raw
        return self._converted(raw, self.source.format._replace(channels_last=False))  # not worth it for a single use

    def whole(self, raw: Tensor) -> Tensor:
        """What would be kept of ``raw``."""
        return self._converted(raw, self.source.format)

    def has_changed(self) -> bool:
        """Whether what the last run used is gone, since its bytes were written or somebody wanted them as they came; or
        since another program has changed where they lie what that run took as it came."""
        kept = self._kept
        if kept is None:
            return self._lies_there() is not None
        if not (kept.written or (kept.lies_there and kept.tensor is None)):
            return False
        self._kept, self._is_input = None, self._is_input or kept.written
        return True

    def _found(self) -> CachedWeight | None:
        return self._lies_there() or self._weights.find(self.source, self._marks)

    def _lies_there(self) -> CachedWeight | None:
        return self._storage.forms.find(self.source) if self.lies else None

    def _made(self, raw: Tensor) -> CachedWeight | None:
        """What can be kept of it from now on."""
        if not self.may_keep or self._is_input:
            return None
        if self._waits:
            self._waits = False
            return None
        may_lie = self.can_lie and self._storage.forms.may_lie(self._storage, self.source)
        if may_lie and (laid := self._weights.lay(self.source, self._storage)) is not None:
            return laid
        if not self._weights.has_room(self.source.nbytes, claimed=not self._opportunistic):
            return None
        return self._weights.keep(self.source, self.whole(raw), self._storage, self._marks)

    def _converted(self, raw: Tensor, format: WeightFormat) -> Tensor:
        return convert(raw, self.source.type, self.source.ne, format)
