"""What a client's messages mean by their numbers: devices, and bytes of its buffers as tensors, rows or ranges. Nothing
is taken on trust: what makes no sense raises :class:`RemoteProtocolError`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from ..device import Rows, ServedDevice
from ..errors import RemoteProtocolError
from ..ggml.dialect import Dialect
from ..ggml.tensor import contiguous_strides, extent
from ..ggml.types import Type
from ..wire import messages
from ..wire.ranges import unpack, unpack_named
from ..wire.records import Record
from .addresses import AddressSpace, Region

_LARGEST = 1 << 62  # of tensors, in bytes; beyond, sums of sizes may not fit the protocol's own u64
_STRIDE_BITS = 32


class Place(NamedTuple):
    """``size`` bytes of a client's buffer."""

    region: Region
    offset: int
    size: int


def device_at(devices: Sequence[ServedDevice], number: int) -> ServedDevice:
    """The device that a client knows by this number."""
    if number >= len(devices):
        raise RemoteProtocolError(f"device {number} does not exist; there are {len(devices)}")
    return devices[number]


def tensor_place(space: AddressSpace, framing: Dialect, tensor: Record, offset: int, size: int) -> Place:
    """``size`` bytes from ``offset`` in ``tensor``, which must be inside it, and it inside its buffer."""
    nbytes = nbytes_of(framing, tensor)
    if offset + size > nbytes:
        raise RemoteProtocolError(f"{size} bytes at {offset} are not inside {named(tensor)} of {nbytes} bytes")
    if not tensor.buffer:
        raise RemoteProtocolError(f"{named(tensor)} is in no buffer")
    region = space[tensor.buffer]
    return Place(region, region.offset(tensor.data, nbytes) + offset, size)


def rows_place(
    space: AddressSpace, framing: Dialect, asked: messages.SetTensor2d | messages.GetTensor2d
) -> tuple[Region, Rows]:
    """Where the rows of a 2D message are in a buffer. They must not overlap: no client has a use for such, and a few
    bytes of memory would be as many as it likes on the wire."""
    tensor, offset, size, count, stride = asked[:5]
    if not size or not count:
        raise RemoteProtocolError(f"{count} rows of {size} bytes of {named(tensor)}")
    if count > 1 and stride < size:
        raise RemoteProtocolError(f"rows of {size} bytes, {stride} apart, of {named(tensor)} overlap")
    rows = Rows(offset, size, count, stride)
    region, start, extent = tensor_place(space, framing, tensor, offset, rows.extent)
    one = stride == size or count == 1
    return region, Rows(start, extent, 1, extent) if one else rows._replace(offset=start)


def range_places(space: AddressSpace, asked: messages.SetRanges) -> list[Place]:
    """Where the data of a SET_RANGES belongs."""
    return _apart("SET_RANGES", space[asked.remote_ptr], unpack(asked.ranges))


def named_places(space: AddressSpace, asked: messages.SetRangesDigest) -> list[tuple[Place, bytes]]:
    """Where the bytes of a SET_RANGES_DIGEST belong, and their digests."""
    ranges = unpack_named(asked.ranges)
    places = _apart("SET_RANGES_DIGEST", space[asked.remote_ptr], [(each.offset, each.size) for each in ranges])
    return [(place, each.digest) for place, each in zip(places, ranges, strict=True)]


def _apart(command: str, region: Region, ranges: Sequence[tuple[int, int]]) -> list[Place]:
    """``ranges`` (offset, size) of a buffer, which must not overlap: a few bytes would be as many pieces as a client
    likes, and two threads would write to one place."""
    for offset, size in ranges:
        if offset + size > region.size:
            raise RemoteProtocolError(
                f"{command}: {size} bytes at {offset} are not inside buffer {region.handle} of {region.size}"
            )
    for (offset, size), (behind, _) in pairwise(sorted(ranges)):
        if offset + size > behind:
            raise RemoteProtocolError(f"{command}: ranges of buffer {region.handle} overlap")
    return [Place(region, *each) for each in ranges]


def touch(some: Sequence[Place], others: Sequence[Place]) -> bool:
    """Whether there may be bytes in both, whose places are of one buffer each: the first and the last byte decide."""
    if some[0].region is not others[0].region:
        return False
    return min(_ends(some)) < max(_ends(others)) and min(_ends(others)) < max(_ends(some))


def _ends(places: Sequence[Place]) -> list[int]:
    return [end for place in places for end in (place.offset, place.offset + place.size)]


def nbytes_of(framing: Dialect, tensor: Record) -> int:
    """Bytes from the first to behind the last element of a tensor whose numbers make sense."""
    kind = _type(framing, tensor)
    if tensor.ne[0] % kind.block:
        raise RemoteProtocolError(f"{named(tensor)}: {list(tensor.ne)} is no shape for {kind}")
    if prod(tensor.ne) * kind.size > _LARGEST:
        raise RemoteProtocolError(f"{named(tensor)}: {list(tensor.ne)} elements are too many")
    dense = contiguous_strides(kind, tensor.ne)
    cut = all(d % (1 << _STRIDE_BITS) == n for d, n in zip(dense, tensor.nb, strict=True))
    return extent(kind, tensor.ne, dense if cut else tensor.nb)


def named(tensor: Record) -> str:
    return f"tensor {tensor.name.decode('utf-8', 'replace')!r}"


def _type(framing: Dialect, tensor: Record) -> Type:
    try:
        return framing.types[tensor.type]
    except KeyError:
        raise RemoteProtocolError(
            f"{named(tensor)}: type {tensor.type} does not exist in protocol {framing.version}"
        ) from None
