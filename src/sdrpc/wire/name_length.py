"""Finding GGML_MAX_NAME, the length of names, which no handshake tells, from a client's messages.

Most messages with an rpc_tensor have a size that only one length explains. SET_TENSOR has not: there the content
decides (a name that is zero-terminated, zero-padded and printable, a type that exists, data that fits the tensor), and
where two lengths fit, data that is exactly the tensor's. What rests on a guess may be corrected by a later message;
what is certain can't: a client that changes its mind breaks the protocol.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from ..errors import RemoteProtocolError
from ..ggml.dialect import Dialect
from ..ggml.tensor import contiguous_strides, extent
from .limits import MAX_NAME_LENGTH
from .messages import COMMANDS, EXCHANGES, Command, SetTensor, SetTensor2d, decode, message_layout, name_length_of
from .records import FIXED_BYTES, NAME_STEP, record_bytes

COMMON = (64, 128, 160)
"""llama.cpp; stable-diffusion.cpp in early and in mid 2026."""
ALL = tuple(range(NAME_STEP, MAX_NAME_LENGTH + 1, NAME_STEP))

Fit = Literal["", "partly", "exactly"]

MIXED = "{command}: names of {new} bytes after names of {old}: GGML_MAX_NAME can't change within a connection"


class NameLength(NamedTuple):
    """What is known about a connection's name length: nothing (0), a guess, or ``certain``."""

    value: int = 0
    certain: bool = False


UNKNOWN = NameLength()


def learn(known: NameLength, command: Command, size: int, dialect: Dialect) -> NameLength:
    """What the size of a message's payload adds to what is known.

    Raises :class:`RemoteProtocolError` when no length explains the size, or another one is certain. Commands without
    records, and those with bulk data, add nothing.
    """
    request = EXCHANGES[command].request
    shape = message_layout(request, dialect)
    if not shape.records or shape.bulk:
        return known
    length = name_length_of(request, size, dialect)
    if length is None:
        raise RemoteProtocolError(f"{command.name}: {size} bytes are right for no length of names")
    return settle(known, command, length)


def settle(known: NameLength, command: Command, length: int) -> NameLength:
    """``length`` was proven by ``command``."""
    if known.certain and known.value != length:
        raise RemoteProtocolError(MIXED.format(command=command.name, new=length, old=known.value))
    return NameLength(length, certain=True)


def learn_feed(
    known: NameLength, request: type[SetTensor] | type[SetTensor2d], head: bytes, size: int, dialect: Dialect
) -> NameLength:
    """What a ``request`` of ``size`` bytes that begins with ``head`` adds (enough bytes for the longest name).

    Raises :class:`RemoteProtocolError` when no length explains it.
    """
    if known.certain:
        return known
    for candidates in (COMMON, ALL):
        found = {length: _fits(request, head, size, length, dialect) for length in candidates}
        fits = [length for length, fit in found.items() if fit]
        if not fits:
            continue
        exact = [length for length in fits if found[length] == "exactly"]
        if len(exact) == 1 or len(fits) == 1:
            return NameLength((exact or fits)[0], certain=True)
        # The rest of a long name looks like zeros at the start of the data, and seldom the other way round.
        return NameLength(max(exact or fits), certain=False)
    raise RemoteProtocolError(f"{COMMANDS[request].name}: {size} bytes that are right for no length of names")


def _fits(request: type[SetTensor] | type[SetTensor2d], head: bytes, size: int, length: int, dialect: Dialect) -> Fit:
    """Whether this can be a record with a name of ``length`` bytes, and the data all of the tensor's."""
    prefix = message_layout(request, dialect).size(length)
    if size < prefix or len(head) < prefix or not _is_name(head[FIXED_BYTES - 4 :][:length]):
        return ""
    message = decode(request, head[:prefix], dialect, length)
    tensor, data = message.tensor, size - prefix
    kind = dialect.types.get(tensor.type)
    if kind is None or not all(tensor.ne) or tensor.ne[0] % kind.block:
        return ""
    if not dialect.has_use_count and any(head[record_bytes(length) - 4 : record_bytes(length)]):
        return ""
    # Strides are cut to 32 bits: a dense tensor is at least as large as its shape says.
    nbytes = max(extent(kind, tensor.ne, tensor.nb), contiguous_strides(kind, tensor.ne)[3] * tensor.ne[3])
    if not data or message.offset + data > nbytes:
        return ""
    if isinstance(message, SetTensor2d):
        return "exactly" if message.size * message.n_copies == data else ""
    if message.cache_flag > 1:
        return ""
    return "exactly" if message.offset == 0 and data == nbytes else "partly"


def _is_name(field: bytes) -> bool:
    name, _, rest = field.partition(b"\0")
    return len(name) < len(field) and not any(rest) and _printable(name)


def _printable(name: Iterable[int]) -> bool:
    """No control characters; bytes over 127 may be UTF-8 that was cut in the middle."""
    return all(byte >= 32 and byte != 127 for byte in name)
