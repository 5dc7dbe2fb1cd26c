"""Checkpoints of ``torch.save`` (.ckpt, .pt, .pth, .bin), read without running anything that they contain.

Such a file is a zip archive of one pickle, which says how objects are put together, and one entry per storage, which
are not compressed and so can be mapped. Python's unpickler calls whatever a pickle names; :func:`_interpret` calls
nothing: it knows plain values, containers, and the few names by which torch describes tensors. Everything else that is
named or called becomes :data:`FOREIGN`, a value that does nothing.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..ggml.types import TYPES
from .expressions import permute
from .mapped import Mapped
from .quantized import AS_BYTES, Stored

ZIP = b"PK\x03\x04"
LEGACY = (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", b"\x80\x02", b"\x80\x04")
"""How files of torch before 1.6 begin (its magic number as a pickle), and other pickles."""

PICKLE = "data.pkl"
"""What the pickle is called, in the archive's only folder."""
MODELS = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")
"""How files of models are called that people pack."""

MAX_PICKLE = 8 << 20
"""Bytes: ten times what the largest models need."""
MAX_DEPTH = 8
"""Dictionaries within dictionaries that are looked through."""

UNKNOWN = "an unknown type"

FOREIGN = object()
"""Stands for everything that is no tensor, no plain value and no container."""

_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""torch's names of storages and dtypes → safetensors' names of types."""


class _Named(NamedTuple):
    """Something that the pickle names: a class or function of a module."""

    module: str
    name: str


class _Storage(NamedTuple):
    dtype: str
    key: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A part of a storage; offset and strides count elements."""

    dtype: str
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_pickle(data: memoryview) -> bool:
    head = bytes(data[: len(LEGACY[0])])
    return head.startswith((ZIP, *LEGACY))


class Opened(NamedTuple):
    """What a file holds. ``skipped``: tensors of types or strides that are not read, with what they are."""

    stored: Mapping[str, Stored]
    skipped: Mapping[str, str]


def read(file: Mapped) -> Opened:
    """The tensors of all dictionaries within dictionaries, with dots between the names; those of ``state_dict``
    without it. Raises :class:`CheckpointError` for what is damaged, compressed, or of an old form."""
    if not bytes(file.data[:4]).startswith(ZIP):
        raise CheckpointError(
            file.path, f"a pickle of the old form, which is not read; convert it with: {_command(file)}"
        )
    entries = _entries(file)
    folder = next(name.removesuffix(PICKLE) for name in entries if name.endswith(f"/{PICKLE}"))
    begin, end = entries[f"{folder}{PICKLE}"]
    if end - begin > MAX_PICKLE:
        raise CheckpointError(file.path, f"damaged: a pickle of {end - begin:,} bytes")
    order = entries.get(f"{folder}byteorder")
    if order and bytes(file.data[slice(*order)]) != b"little":
        raise CheckpointError(file.path, f"its numbers are big-endian; convert it with: {_command(file)}")
    try:
        content = _interpret(bytes(file.data[begin:end]))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise CheckpointError(file.path, f"damaged: its pickle is not understood ({error})") from error
    found = dict(_flattened(content))
    if not found:
        raise CheckpointError(file.path, "holds no tensors by name")
    return _stored(file, found, {name.removeprefix(f"{folder}data/"): place for name, place in entries.items()})


def _entries(file: Mapped) -> dict[str, tuple[int, int]]:
    """Name → begin and end of the archive's entries, none of which may be compressed."""
    places: dict[str, tuple[int, int]] = {}
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
        if not any(info.filename.endswith(f"/{PICKLE}") for info in infos):
            raise CheckpointError(file.path, _no_checkpoint([info.filename for info in infos]))
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    file.path, f"is compressed, so can't be mapped; convert it with: {_command(file)}"
                )
            # the local header may have other extra data than the directory: torch aligns storages with it
            if info.header_offset < 0:
                raise ValueError(f"{info.filename!r} begins before the file")
            name, extra = struct.unpack_from("<HH", file.data, info.header_offset + 26)
            begin = info.header_offset + 30 + name + extra
            if begin + info.file_size > len(file.data):
                raise ValueError(f"{info.filename!r} ends after the file")
            places[info.filename] = begin, begin + info.file_size
    except zipfile.BadZipFile as error:
        raise CheckpointError(file.path, f"damaged or incomplete: {error}; download it again") from error
    except (ValueError, struct.error, NotImplementedError, EOFError, LookupError, OverflowError) as error:
        raise CheckpointError(file.path, f"damaged: {error}") from error
    return places


def _no_checkpoint(names: Sequence[str]) -> str:
    """What a zip archive of others is, as the reason of an error."""
    models = [ascii(name) for name in names if name.lower().endswith(MODELS)][:4]
    if models:
        return f"is a zip archive with {', '.join(models)} in it: unpack it first"
    return f"is a zip archive without {PICKLE}, so no checkpoint of torch.save"


def _flattened(content: Any) -> Iterator[tuple[str, _Tensor]]:
    """All tensors in dictionaries, depth first. One that holds itself, or others many times, ends by its depth and by
    being looked through once."""
    seen: set[int] = set()
    stack: list[tuple[str, Any, int]] = [("", content, 0)]
    while stack:
        prefix, value, depth = stack.pop()
        if isinstance(value, _Tensor):
            yield prefix.removesuffix("."), value
        elif isinstance(value, dict) and depth < MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            for key, inner in reversed(value.items()):
                if isinstance(key, str):
                    stack.append((prefix if key == "state_dict" else f"{prefix}{key}.", inner, depth + 1))


def _stored(file: Mapped, found: Mapping[str, _Tensor], storages: Mapping[str, tuple[int, int]]) -> Opened:
    stored: dict[str, Stored] = {}
    skipped: dict[str, str] = {}
    for name, tensor in found.items():
        kind = AS_BYTES.get(tensor.dtype, tensor.dtype)
        order = _order(tensor)
        if kind not in TYPES or order is None:
            skipped[name] = tensor.dtype if order is not None else f"{tensor.dtype} with strides {list(tensor.strides)}"
            continue
        if tensor.key not in storages:
            raise CheckpointError(file.path, f"damaged: no storage {tensor.key[:40]!r}", name)
        begin, end = storages[tensor.key]
        begin += tensor.offset * TYPES[kind].size
        size = TYPES[kind].row_bytes(prod(tensor.shape))
        if begin + size > end:
            raise CheckpointError(file.path, "damaged: lies outside of its storage", name)
        lying = file.weight(name, kind, tuple(tensor.shape[dim] for dim in order), begin, begin + size)
        stored[name] = Stored(tensor.dtype, permute(lying, sorted(range(len(order)), key=order.__getitem__)))
    return Opened(stored, skipped)


def _order(tensor: _Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which the elements lie one after the other; None if there is none."""
    if not prod(tensor.shape):
        return tuple(range(len(tensor.shape)))
    order = sorted(range(len(tensor.shape)), key=lambda dim: (-tensor.strides[dim], -tensor.shape[dim]))
    expected = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1 and tensor.strides[dim] != expected:
            return None
        expected *= tensor.shape[dim]
    return tuple(order)


def _command(file: Mapped) -> str:
    """What converts the file where torch is installed; its loader runs nothing either."""
    source, target = str(file.path), str(file.path.with_suffix(".safetensors"))
    code = (
        f"import torch, safetensors.torch as s; d = torch.load({source!r}, 'cpu', weights_only=True); "
        "d = d.get('state_dict', d); "
        f"s.save_file({{k: v.clone() for k, v in d.items() if torch.is_tensor(v)}}, {target!r})"
    )
    return f'python -c "{code}"'


# The pickle ----------------------------------------------------------------------------------------------------------


class _Mark:
    """Where a container's elements begin on the stack."""


def _interpret(data: bytes) -> Any:
    """What the pickle means. Raises :class:`ValueError`, :class:`LookupError`, :class:`TypeError`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(BytesIO(data)):
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in _FIXED:
            stack.append(_FIXED[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Named(*argument.split(" ", 1)))
        elif name in _STACK:
            _STACK[name](stack)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"opcode {name}")
    raise ValueError("it has no end")


_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "FLOAT",
    "BINFLOAT",
}  # fmt: skip

_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": _Mark, "EMPTY_DICT": dict,
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": lambda: FOREIGN,
}  # fmt: skip


def _until_mark(stack: list[Any]) -> list[Any]:
    """Takes what lies above the last mark, and the mark."""
    at = len(stack) - 1
    while not isinstance(stack[at], _Mark):
        at -= 1
        if at < 0:
            raise ValueError("no mark")
    taken = stack[at + 1 :]
    del stack[at:]
    return taken


def _fill(target: Any, pairs: list[Any]) -> None:
    """Keys that are no text are of no use here, and hashing those of a stranger may take for ever."""
    if isinstance(target, dict):
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(key, str):
                target[key] = value


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)


def _set_items(stack: list[Any]) -> None:
    pairs = _until_mark(stack)
    _fill(stack[-1], pairs)


def _set_item(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _fill(stack[-1], [key, value])


def _append(stack: list[Any]) -> None:
    value = stack.pop()
    _extend(stack[-1], [value])


def _appends(stack: list[Any]) -> None:
    values = _until_mark(stack)
    _extend(stack[-1], values)


def _dict(stack: list[Any]) -> None:
    stack.append(_filled(_until_mark(stack)))


def _filled(pairs: list[Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    _fill(made, pairs)
    return made


def _foreign(stack: list[Any]) -> None:
    """Something made of what lies above the mark."""
    _until_mark(stack)
    stack.append(FOREIGN)


def _tuple_of(count: int) -> Callable[[list[Any]], None]:
    def take(stack: list[Any]) -> None:
        values = tuple(stack[-count:])
        if len(values) < count:
            raise ValueError("the stack is empty")
        del stack[-count:]
        stack.append(values)

    return take


def _forget(count: int) -> Callable[[list[Any]], None]:
    """Takes ``count`` values and gives one of no meaning."""

    def take(stack: list[Any]) -> None:
        del stack[-count:]
        stack.append(FOREIGN)

    return take


def _call(stack: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    build = _KNOWN.get(function) if isinstance(function, _Named) else None
    stack.append(build(*arguments) if build and isinstance(arguments, tuple) else FOREIGN)


def _build(stack: list[Any]) -> None:
    """A state for an object: ordered dictionaries and parameters have none that matters."""
    stack.pop()


def _stack_global(stack: list[Any]) -> None:
    name, module = stack.pop(), stack.pop()
    stack.append(_Named(str(module), str(name)) if isinstance(name, str) and isinstance(module, str) else FOREIGN)


def _persistent(stack: list[Any]) -> None:
    identity = stack.pop()
    if not (isinstance(identity, tuple) and len(identity) >= 3 and identity[0] == "storage"):
        raise ValueError("a persistent object that is no storage")
    kind, key = identity[1], identity[2]
    if not isinstance(kind, _Named) or not isinstance(key, str):
        raise ValueError("a storage that is not described as torch does it")
    stack.append(_Storage(_STORAGES.get(kind.name, UNKNOWN), key))


_STACK: dict[str, Callable[[list[Any]], object]] = {
    "POP": list.pop, "POP_MARK": _until_mark, "DUP": lambda stack: stack.append(stack[-1]),
    "TUPLE": lambda stack: stack.append(tuple(_until_mark(stack))), "TUPLE1": _tuple_of(1), "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3), "LIST": lambda stack: stack.append(_until_mark(stack)), "DICT": _dict,
    "SETITEM": _set_item, "SETITEMS": _set_items, "APPEND": _append, "APPENDS": _appends, "ADDITEMS": _until_mark,
    "FROZENSET": _foreign, "OBJ": _foreign, "INST": _foreign, "STACK_GLOBAL": _stack_global, "REDUCE": _call,
    "BUILD": _build, "NEWOBJ": _forget(2), "NEWOBJ_EX": _forget(3), "BINPERSID": _persistent,
}  # fmt: skip


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: str = "") -> Any:
    if not isinstance(storage, _Storage):
        return FOREIGN
    shape, strides = tuple(shape), tuple(strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor whose shape, strides or offset are none")
    return _Tensor(dtype or storage.dtype, storage.key, offset, shape, strides)


def _rebuild_typed(*arguments: Any) -> Any:
    """As :func:`_rebuild`, with the dtype as the seventh argument."""
    dtype = arguments[6]
    name = dtype.name if isinstance(dtype, _Named) else ""
    return _rebuild(*arguments[:4], dtype=_DTYPES.get(name, UNKNOWN))


_KNOWN: dict[_Named, Callable[..., Any]] = {
    _Named("torch._utils", "_rebuild_tensor"): _rebuild,
    _Named("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    _Named("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    _Named("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    _Named("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    _Named("torch._tensor", "_rebuild_from_type_v2"): lambda _function, _type, arguments, *_: _rebuild(*arguments),
    _Named("torch", "Size"): lambda values=(): tuple(values),
    _Named("collections", "OrderedDict"): lambda pairs=(): _filled([part for pair in pairs for part in pair]),
}
"""What torch calls to put tensors together."""
