"""Recording what a module does, operation by operation, while it runs on tensors without numbers.

Two of torch's modes see every call: :class:`FunctionMode` the functions of torch's Python API, of which some are
recorded as a whole (``linear``, attention, norms) that torch would take apart; :class:`OperationMode` the ATen
operations that the others consist of. A tensor is unknown when it is on the meta device or depends on something that
is; operations on unknown tensors are recorded, all others are computed at once, on the CPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from ..errors import CaptureError
from . import autocast
from .memory import Memory, Step, View, read, write

Node = fx.Node
Tensor = torch.Tensor
aten = torch.ops.aten
CPU = torch.device("cpu")
META = torch.device("meta")


class DataDependent(CaptureError):
    """The numbers of inputs decide what is computed: capture again with the numbers of ``inputs`` known."""

    def __init__(self, reason: str, inputs: tuple[str, ...]) -> None:
        self.inputs = inputs
        super().__init__(reason)


def _whole(operation: Any) -> Callable[..., tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    return lambda *args, **kwargs: (operation, args, kwargs)


def _matmul(*args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    a, b = (*args, *kwargs.values())
    return aten.matmul.default, (a, b), {}


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """``torch.nn.functional.batch_norm``, whose arguments have another order than ATen's."""
    return aten.batch_norm.default, (input, weight, bias, running_mean, running_var, training, momentum, eps, False), {}


WHOLE: dict[Any, Callable[..., tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    F.linear: _whole(aten.linear.default),
    F.layer_norm: _whole(aten.layer_norm.default), torch.layer_norm: _whole(aten.layer_norm.default),
    F.group_norm: _whole(aten.group_norm.default), torch.group_norm: _whole(aten.group_norm.default),
    F.rms_norm: _whole(aten.rms_norm.default), torch.rms_norm: _whole(aten.rms_norm.default),
    F.batch_norm: _batch_norm, torch.batch_norm: _whole(aten.batch_norm.default),
    F.scaled_dot_product_attention: _whole(aten.scaled_dot_product_attention.default),
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul,
}  # fmt: skip
"""Functions that are recorded as one operation → the ATen operation and its arguments."""

NUMBERS = frozenset({
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__array__,
})  # fmt: skip
"""Methods that take numbers out of a tensor."""

MADE = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "new_empty_strided",
})  # fmt: skip
"""Operations that want of a tensor only its shape or dtype: what they make is known."""

UNDEFINED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
"""Operations whose results are undefined: here they are zeros, so that a graph is the same each time."""

LARGE = 1 << 20
"""Elements from which on an undefined tensor has no memory here: it is made to be filled with results."""


RETRIED = 1 << 26
"""Elements of the operands of an operation that fails on the meta device and is tried on the CPU for its message."""


class Recorder:
    """A graph while it is recorded.

    ``kind`` is the kind of device that the module would run on. ``known`` are leaves with numbers, ``inputs`` the
    inputs' leaves by name, ``places`` the parts of the module that are running, the innermost last.
    """

    def __init__(self, kind: str = "cpu") -> None:
        self.kind = kind
        self.narrow: torch.dtype | None = None
        """What autocast makes of operands now."""
        self.graph = fx.Graph()
        self.known: dict[Node, Tensor] = {}
        self.inputs: dict[Node, str] = {}
        self.places: list[str] = []
        self.whole = False
        """True while one operation that is recorded as a whole is computing its result's shape."""
        self._views: dict[int, View] = {}
        self._paths: dict[int, tuple[Tensor, Step]] = {}
        """Known view → the tensor that it is a view of, and how."""
        self._constants: dict[int, Node] = {}
        """Known tensor → its leaf."""
        self._shapes: dict[int, Tensor] = {}
        self.results = Results()
        self._kept: list[Tensor] = []
        """Everything whose id is a key above: an id counts while its object lives."""

    # leaves and values

    def place(self) -> str:
        return self.places[-1] if self.places else "the module"

    def leaf(self, name: str, shape: Tensor, input: str = "") -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = shape
        if input:
            self.inputs[node] = input
        return node

    def tracks(self, tensor: Tensor) -> bool:
        return id(tensor) in self._views

    def track(self, tensor: Tensor, node: Node) -> None:
        """``tensor`` owns its memory, and its value is ``node``."""
        self._kept.append(tensor)
        self._views[id(tensor)] = View(Memory(node), (), node, 0)

    def unknown(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and (tensor.is_meta or id(tensor) in self._views)

    def shape_of(self, tensor: Tensor) -> Tensor:
        """A meta tensor like ``tensor``."""
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._shapes:
            self._kept.append(tensor)
            self._shapes[id(tensor)] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META
            )
        return self._shapes[id(tensor)]

    def node_of(self, tensor: Tensor) -> Node:
        """The node of a tensor's value now. Raises :class:`CaptureError` for a meta tensor that nothing recorded."""
        view = self._views.get(id(tensor))
        if view is not None:
            return read(view, self._apply)
        if tensor.is_meta and tensor.numel():
            raise CaptureError(
                f"{self.place()}: a tensor of the module has no numbers: "
                "build the module under sdrpc.lowering.without_weights()"
            )
        if id(tensor) not in self._constants:
            numbers = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach()
            self._kept.append(tensor)
            self._constants[id(tensor)] = self._constant(numbers)
        return self._constants[id(tensor)]

    def zeros(self, shape: Tensor) -> Tensor:
        """Zeros in the shape of a meta tensor, which stands for them, without memory."""
        numbers = torch.zeros((), dtype=shape.dtype).expand(shape.shape)
        self._kept.append(numbers)
        self.track(shape, self._constant(numbers))
        return shape

    def _constant(self, numbers: Tensor) -> Node:
        node = self.leaf(f"known{len(self.known)}", self.shape_of(numbers))
        self.known[node] = numbers
        return node

    # operations

    def record(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
        """Record an operation on unknown tensors, whose result has the shape of ``out``; returns ``out``."""
        written = _written(operation)
        if written:
            return self._record_write(operation, args, kwargs, written)
        node = self._emit(operation, *self._arguments(args, kwargs), out)
        step = (operation, args, kwargs) if _makes_views(operation) and isinstance(args[0], Tensor) else None
        if isinstance(out, Tensor):
            self._track_result(out, node, step, None, out)
        elif isinstance(out, list | tuple):
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._track_result(part, self._item(node, i, part), step, i, out)
        return out

    def _record_write(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], written: str) -> Tensor:
        """An in-place operation: a value like any other, then written to where the operand lies."""
        target = args[0] if args else None
        if written != "self" or not isinstance(target, Tensor):
            raise CaptureError(f"{self.place()}: {operation} writes into its argument {written!r}")
        if id(target) not in self._views:
            self._forget_numbers(target)
        owner = self._views[id(target)].memory.node
        if owner.op == "placeholder" and owner not in self.known:
            what = f"input {self.inputs[owner]}" if owner in self.inputs else "a weight"
            raise CaptureError(f"{self.place()}: {operation} writes into {what}: write into a clone() of it")
        node = self._emit(operation, *self._arguments(args, kwargs), self.shape_of(target))
        try:
            write(self._views[id(target)], node, self._apply, self._emit)
        except CaptureError as error:
            raise CaptureError(f"{self.place()}: {operation}: {error}") from error
        return target

    def _track_result(self, tensor: Tensor, node: Node, step: Any, index: int | None, out: Any) -> None:
        self._kept.append(tensor)
        if step is None:
            self._views[id(tensor)] = View(Memory(node), (), node, 0)
            return
        operation, args, kwargs = step
        source = self._views[id(args[0])]
        path = (*source.path, Step(operation, tuple(args[1:]), dict(kwargs), index, self.shape_of(args[0]), out))
        self._views[id(tensor)] = View(source.memory, path, node, source.memory.version)

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        def argument(value: Any) -> Any:
            return self.node_of(value) if isinstance(value, Tensor) else value

        plain = tree_map(lambda v: list(v) if isinstance(v, torch.Size) else v, (tuple(args), dict(kwargs)))
        nodes: Any = fx.node.map_aggregate(plain, argument)
        return nodes[0], nodes[1]

    def _emit(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Node:
        node = self.graph.call_function(operation, args, kwargs)
        node.meta["val"] = out
        node.meta["place"] = self.place()
        return node

    def _item(self, node: Node, index: int, out: Tensor) -> Node:
        return self._emit(operator.getitem, (node, index), {}, out)

    def _apply(self, step: Step, node: Node) -> Node:
        made = self._emit(step.operation, (node, *step.args), step.kwargs, step.result)
        return made if step.index is None else self._item(made, step.index, step.result[step.index])

    # tensors with numbers

    def computed(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note an operation that was computed: which of its results are views, and that constants were written."""
        if _makes_views(operation) and args and isinstance(args[0], Tensor):
            several = isinstance(out, list | tuple)
            shapes = self.shape_of(args[0]), tree_map(self.shape_of, out)
            for i, part in enumerate(out if several else [out]):
                if part is not args[0]:
                    step = Step(operation, tuple(args[1:]), dict(kwargs), i if several else None, *shapes)
                    self._paths[id(part)] = args[0], step

    def about_to_write(self, operation: Any, args: Sequence[Any]) -> None:
        """A known tensor is about to be written: constants made of its memory keep the numbers they have."""
        if _written(operation) and self._constants:
            memory = {t.untyped_storage().data_ptr() for t in tree_iter(args) if isinstance(t, Tensor)}
            for key, node in list(self._constants.items()):
                numbers = self.known[node]
                if numbers.untyped_storage().data_ptr() in memory:
                    self.known[node] = numbers.clone()
                    del self._constants[key]

    def _forget_numbers(self, tensor: Tensor) -> None:
        """Something unknown is written into a known tensor: it and all that shares its memory becomes unknown."""
        paths: dict[int, tuple[Tensor, tuple[Step, ...]]] = {}

        def origin(part: Tensor) -> tuple[Tensor, tuple[Step, ...]]:
            if id(part) not in paths:
                if id(part) in self._paths:
                    source, step = self._paths[id(part)]
                    owner, path = origin(source)
                    paths[id(part)] = owner, (*path, step)
                else:
                    paths[id(part)] = part, ()
            return paths[id(part)]

        owner, _ = origin(tensor)
        node = self._constant(owner.detach())  # nothing is written to it any more
        memory = Memory(node)
        self._kept.append(owner)
        self._views[id(owner)] = View(memory, (), node, 0)
        for key in list(self._paths):
            part = self._paths[key]
            root, path = origin(part[0])
            if root is owner:
                self._views[key] = View(memory, (*path, part[1]), node, -1)

    # what can't be recorded

    def inputs_of(self, tensors: Sequence[Tensor]) -> tuple[str, ...]:
        """The inputs that decide the numbers of ``tensors``."""
        seen: set[Node] = set()
        waiting = [self.node_of(tensor) for tensor in tensors if self.unknown(tensor)]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += node.all_input_nodes
        return tuple(name for node, name in self.inputs.items() if node in seen)

    def needs_numbers(self, what: str, tensors: Sequence[Tensor]) -> DataDependent:
        """The error for an operation whose result can't be known without the numbers of ``tensors``."""
        names = self.inputs_of(tensors)
        said = f"the numbers of {', '.join(names)}" if names else "numbers of weights"
        return DataDependent(f"{self.place()}: {what}: {said} decide what is computed", names)


class FunctionMode(TorchFunctionMode):
    """Sees the functions of torch's Python API."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": CPU}
        if func in _BY_INDEX and recorder.unknown(args[0]):
            args = (args[0], _with_numbers(args[1]), *args[2:])
        if func in NUMBERS and recorder.unknown(args[0]):
            raise recorder.needs_numbers(func.__name__, args[:1])
        if func is _DATA and recorder.unknown(args[0]):
            return args[0].detach()
        make, narrow = WHOLE.get(func), autocast.dtype(recorder.kind)
        recorder.narrow = narrow
        if (make is None and narrow is None) or not any(map(recorder.unknown, tree_iter((args, kwargs)))):
            return func(*args, **kwargs)
        args, kwargs = autocast.cast(recorder.kind, narrow, getattr(func, "__name__", ""), (args, kwargs), Tensor.to)
        if make is None:
            with torch.autocast(recorder.kind, enabled=False):  # which would cast known operands alone
                return func(*args, **kwargs)
        operation, args, kwargs = make(*args, **kwargs)
        recorder.whole = True
        try:
            out = _result_shape(recorder, operation, args, kwargs)
        finally:
            recorder.whole = False
        return recorder.record(operation, args, kwargs, out)


_BY_INDEX = (Tensor.__getitem__, Tensor.__setitem__)


def _with_numbers(index: Any) -> Any:
    """An index whose lists are tensors: torch would make these where the indexed tensor is, without numbers."""
    if isinstance(index, tuple):
        return tuple(map(_with_numbers, index))
    listed = isinstance(index, list | range) and all(map(_is_whole, index))
    return torch.tensor(list(index), dtype=None if index else torch.int64, device=CPU) if listed else index


def _is_whole(entry: Any) -> bool:
    return isinstance(entry, int)


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
"""``tensor.data``, which no mode for operations sees."""


class OperationMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Sees ATen operations."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if recorder.whole:
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError(
                f"{recorder.place()}: {func} draws random numbers: "
                "call eval() on a module with dropout, and pass other noise as an input"
            )
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if not any(map(recorder.unknown, tensors)):
            return self._compute(func, args, kwargs, tensors)
        name = func.overloadpacket.__name__
        if name in MADE:
            return self._make(func, args, kwargs)
        if func is aten.index.Tensor or func is aten.index_put_.default:
            args = (args[0], self._positions(func, args[1]), *args[2:])
        elif torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise recorder.needs_numbers(str(func), tensors)
        args, kwargs = autocast.cast(recorder.kind, recorder.narrow, name, (args, kwargs), self._to)
        options = {**kwargs, "device": META} if kwargs.get("device") is not None else kwargs
        out = _result_shape(recorder, func, args, options)
        return recorder.record(func, args, kwargs, out)

    def _to(self, tensor: Tensor, dtype: torch.dtype) -> Any:
        return self.__torch_dispatch__(aten._to_copy.default, (), (tensor,), {"dtype": dtype})

    def _compute(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        """Nothing is unknown: the result has numbers."""
        if any(tensor.device.type != "cpu" for tensor in tensors):
            args, kwargs = tree_map(lambda v: v.to(CPU) if isinstance(v, Tensor) else v, (args, kwargs))
        if func.overloadpacket.__name__ in UNDEFINED:
            return self._make(func, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": CPU}
        self.recorder.about_to_write(func, args)
        out = func(*args, **kwargs)
        self.recorder.computed(func, args, kwargs, out)
        return out

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor that only has the shape of another: zeros where it is undefined."""
        args = _shapes(self.recorder, args)
        if func.overloadpacket.__name__ not in UNDEFINED:
            return func(*args, **{**kwargs, "device": CPU})
        shape = func(*args, **{**kwargs, "device": META})
        if shape.numel() >= LARGE:
            return self.recorder.zeros(shape)
        return torch.zeros_like(shape, device=CPU)

    def _positions(self, func: Any, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Indices without truth values: a known mask is as good as the positions of what is true."""
        positions: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                positions.append(index)
            elif self.recorder.unknown(index):
                raise self.recorder.needs_numbers(str(func), [index])
            else:
                positions += index.nonzero(as_tuple=True)
        return positions


def _result_shape(recorder: Recorder, operation: Any, args: Any, kwargs: Any) -> Any:
    """An operation's result on the meta device. Raises what torch raises, in the words that it has on the CPU."""
    args, kwargs = _shapes(recorder, args), _shapes(recorder, kwargs)
    try:
        return recorder.results.of(operation, args, kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError):
        if sum(tensor.numel() for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)) > RETRIED:
            raise
        undefined = tree_map(lambda v: torch.empty_like(v, device=CPU) if isinstance(v, Tensor) else v, (args, kwargs))
        options = {**undefined[1], "device": CPU} if undefined[1].get("device") is not None else undefined[1]
        operation(*undefined[0], **options)
        raise


class Results:
    """What operations make of meta tensors. torch works much of it out in Python, and blocks of a model are alike: what
    makes a new tensor is worked out once for the same operands."""

    def __init__(self) -> None:
        self._known: dict[Any, _Made] = {}

    def of(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """The result of ``operation``: meta tensors that nobody else has, unless it is one of views or writes."""
        about = _about((args, kwargs)) if _facts(operation) == (False, "") else None
        if about is None:
            return operation(*args, **kwargs)
        made = self._known.get((operation, about))
        if made is not None:
            return made.again()
        result = operation(*args, **kwargs)
        parts = result if type(result) in (tuple, list) else (result,)
        if all(type(part) is Tensor for part in parts):
            kind = type(result) if parts is result else None
            self._known[operation, about] = _Made(kind, tuple((p.shape, p.stride(), p.dtype) for p in parts))
        return result


class _Made(NamedTuple):
    """Results as ``tensors``: shape, strides, dtype of each. ``kind``: of sequence, None of a single one."""

    kind: type[tuple[Tensor, ...]] | type[list[Tensor]] | None
    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]

    def again(self) -> Any:
        made = [torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in self.tensors]
        return made[0] if self.kind is None else self.kind(made)


def _about(value: Any) -> Any:
    """All of an argument that decides the shape of a result, to be compared; None of what is not known to be so."""
    kind = type(value)
    if kind in (Tensor, torch.nn.Parameter):
        return kind, value.shape, value.stride(), value.dtype
    if kind is dict:
        value = tuple(value.items())
    if kind in (tuple, list, dict, torch.Size):
        parts = tuple(map(_about, value))
        return None if None in parts else (kind, parts)
    return (kind, value) if value is None or kind in _PLAIN else None


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _shapes(recorder: Recorder, value: Any) -> Any:
    """``value`` with meta tensors in place of its tensors."""
    if isinstance(value, Tensor):
        return recorder.shape_of(value)
    if type(value) in (tuple, list):
        return type(value)(_shapes(recorder, part) for part in value)
    if type(value) is dict:
        return {name: _shapes(recorder, part) for name, part in value.items()}
    return value


_FACTS: dict[Any, tuple[bool, str]] = {}


def _facts(operation: Any) -> tuple[bool, str]:
    """Whether an operation's results are views of its first operand; the name of the argument that it writes."""
    if operation not in _FACTS:
        schema = operation._schema
        aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        _FACTS[operation] = bool(aliases) and not written, ", ".join(written)
    return _FACTS[operation]


def _makes_views(operation: Any) -> bool:
    return _facts(operation)[0]


def _written(operation: Any) -> str:
    return _facts(operation)[1]
