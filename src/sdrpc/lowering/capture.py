"""A call of a torch module as a graph of ATen operations.

The module is run once, on the meta device: its parameters and inputs have shapes and dtypes but no numbers, so that a
module of any size is captured in no memory and before its weights exist. Operations on such tensors are recorded. What
depends neither on inputs nor on weights (positions, frequencies, masks) keeps its numbers and is computed at once.
The recorded graph is functional: in-place operations appear as their results (:mod:`sdrpc.lowering.memory`).
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError
from . import autocast
from .tracer import FunctionMode, OperationMode, Recorder

Node = fx.Node
Call = Callable[..., tuple[torch.Tensor, ...]]
"""A function of a module and of tensors: ``lambda module, x, t: (module(x, t).sample,)``."""

_CAPTURING = threading.RLock()
"""One capture at a time: torch's flag for exporting (:func:`_exporting`) is global."""

_capturing = threading.local()


@dataclass(frozen=True)
class Captured:
    """A call as a graph of ATen operations.

    ``nodes``: what the outputs depend on, in order of execution. ``inputs``, ``weights``: placeholders by their names.
    ``known``: placeholders whose numbers are known. A node has in ``meta["val"]`` what torch says of its result (meta
    tensors) and in ``meta["place"]`` where in the module it comes from.
    """

    nodes: tuple[Node, ...]
    inputs: Mapping[Node, str]
    weights: Mapping[Node, str]
    known: Mapping[Node, torch.Tensor]
    outputs: tuple[Node, ...]


def capture(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    call: Call,
    known: Collection[str] = (),
    kind: str = "cpu",
    guests: Iterable[nn.Module] = (),
) -> Captured:
    """Capture ``call(module, *inputs.values())``, a function from tensors to tensors.

    Only shapes and dtypes of the inputs matter, except of those named in ``known``: their numbers become part of the
    graph. torch.autocast is followed where it is on for ``kind``, a kind of device. Nothing is computed with weights,
    and the module stays as it is; ``guests`` are modules that it leads to and that are no parts, such as of a hook.
    Raises the module's own errors for inputs that it refuses, :class:`sdrpc.lowering.tracer.DataDependent` (a
    :class:`CaptureError`) where numbers of other inputs decide what is computed, and :class:`CaptureError` for what
    can't be recorded.
    """
    recorder = Recorder(kind)
    with _CAPTURING, _capture_is_on(recorder), _one_thread(), torch.inference_mode(False), torch.no_grad():
        clone, real = _without_numbers(module, guests)
        _note_hooks(clone)
        weights = _weight_leaves(recorder, clone, real)
        leaves, examples = _input_leaves(recorder, inputs, known)
        try:
            with _located(recorder, clone), _as_written(kind), FunctionMode(recorder), OperationMode(recorder):
                results = call(clone, *examples)
        except RuntimeError as error:
            if "meta" not in str(error) and "fake impl" not in str(error):  # torch's words
                raise  # the module's own
            raise CaptureError(f"{recorder.place()}: can't run without numbers: {_first_line(error)}") from error
        return _result(recorder, leaves, weights, results)


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is known already is small: torch's threads would cost more CPU waiting for each other than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are built inside get parameters on the meta device: shapes without memory.

    Unlike under ``torch.device("meta")``, buffers (tables that the module computes for itself) keep their numbers.
    """

    def register(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)

    # typed to return nothing, but documented to return a replacement
    hook = nn.modules.module.register_module_parameter_registration_hook(register)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def operation(node: Node) -> str:
    """The full name of what a node calls: ``aten.relu.default``."""
    return str(node.target)


def place(node: Node) -> str:
    """Where in the module a node comes from: ``down_blocks.0.resnets.1 (ResnetBlock2D)``."""
    return str(node.meta.get("place", "the module"))


def is_weight(name: str, tensor: torch.Tensor, not_saved: Collection[str]) -> bool:
    """Whether a module's tensor counts as a weight, which is stored apart from the graph. The others, buffers that are
    integers or not saved with the module, are constants of the graph."""
    return isinstance(tensor, nn.Parameter) or (tensor.is_floating_point() and name not in not_saved)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers by name; what is shared has several names."""
    return dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))


def not_saved(module: nn.Module) -> set[str]:
    """The names of the buffers that the module does not save: tables that it can compute again."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)


def _without_numbers(module: nn.Module, guests: Iterable[nn.Module] = ()) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A copy of ``module`` whose weights are on the meta device, and the original weights by name.

    Other tensors are copied: what the module's code does to them while it is traced must not reach the original. Not
    the weights of ``guests``, which may be gigabytes: other models of a pipeline, that a hook leads to.
    """
    unsaved = not_saved(module)
    memo: dict[int, Any] = {}
    real: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(module).items():
        if is_weight(name, tensor, unsaved):
            real[name] = tensor
            empty = _on_meta(tensor.detach())
            memo.setdefault(
                id(tensor), nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
            )
        elif tensor.is_meta:
            raise CaptureError(f"{name} has no numbers: build the module under sdrpc.lowering.without_weights()")
        else:
            memo.setdefault(id(tensor), tensor.detach().clone())
    for weight in chain.from_iterable(guest.parameters() for guest in guests):
        memo.setdefault(id(weight), weight)
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # copy.deepcopy refuses these
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(module, memo), real


def is_capturing() -> bool:
    """Whether this thread captures a module."""
    return _recorder() is not None


def of_inputs(tensor: torch.Tensor) -> bool:
    """Whether the inputs of this thread's capture decide a tensor's numbers."""
    recorder = _recorder()
    return recorder is not None and recorder.tracks(tensor) and bool(recorder.inputs_of([tensor]))


def _recorder() -> Recorder | None:
    return getattr(_capturing, "recorder", None)


@contextmanager
def _capture_is_on(recorder: Recorder) -> Iterator[None]:
    before, _capturing.recorder = _recorder(), recorder
    try:
        yield
    finally:
        _capturing.recorder = before


def _weight_leaves(recorder: Recorder, clone: nn.Module, real: Mapping[str, torch.Tensor]) -> dict[Node, str]:
    """A leaf for each weight. Functions that were put on the module's instance may have the original module in their
    closure, so that the original's tensors stand for the same leaves."""
    weights: dict[Node, str] = {}
    tensors = tensors_of(clone)
    for name, original in real.items():
        tensor = tensors[name]
        if recorder.tracks(tensor):
            continue
        node = recorder.leaf(f"weight{len(weights)}", tensor)
        recorder.track(tensor, node)
        recorder.track(original, node)
        weights[node] = name
    return weights


def _input_leaves(
    recorder: Recorder, inputs: Mapping[str, torch.Tensor], known: Collection[str]
) -> tuple[dict[Node, str], list[torch.Tensor]]:
    leaves: dict[Node, str] = {}
    examples = []
    for i, (name, tensor) in enumerate(inputs.items()):
        if name in known and tensor.is_meta:
            raise CaptureError(f"the numbers of input {name} must be known, but it is on the meta device")
        node = recorder.leaf(f"input{i}", _on_meta(tensor), name)
        leaves[node] = name
        if name in known:
            examples.append(tensor.detach().cpu().clone())
        else:
            recorder.track(node.meta["val"], node)
            examples.append(node.meta["val"])
    return leaves, examples


@contextmanager
def _located(recorder: Recorder, module: nn.Module) -> Iterator[None]:
    """The recorder knows which part of ``module`` is running."""
    with ExitStack() as stack:
        for path, part in module.named_modules():
            label = f"{path or 'the module'} ({type(part).__name__})"
            enter = part.register_forward_pre_hook(lambda *_, label=label: recorder.places.append(label), prepend=True)
            leave = part.register_forward_hook(lambda *_: _left(recorder), always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        yield


def _left(recorder: Recorder) -> None:
    recorder.places.pop()


@contextmanager
def _as_written(kind: str) -> Iterator[None]:
    """Modules find what they would find on a device of ``kind``, and ask for no numbers that they can do without."""
    with _exporting(), _eager(), _autocast(kind):
        yield


@contextmanager
def _exporting() -> Iterator[None]:
    """transformers builds masks without looking at numbers inside: it asks ``torch.compiler.is_exporting()``, before
    5.20 its own ``is_tracing``. Neither can be told so in public; where both are missing, such masks have to be
    known."""
    masks = sys.modules.get("transformers.masking_utils")
    with _replaced(torch.compiler, "_is_exporting_flag", True), _replaced(masks, "is_tracing", lambda *_: True):
        yield


@contextmanager
def _autocast(kind: str) -> Iterator[None]:
    """Modules switch autocast on and off for ``kind`` where they ask which kind of device a tensor is on."""
    followed, off = autocast.contexts(kind)
    generic = sys.modules.get("transformers.utils.generic")  # its maybe_autocast
    with (
        _replaced(torch, "autocast", followed),
        _replaced(torch.amp, "autocast", followed),
        _replaced(generic, "nullcontext", off),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The owner's attribute is ``value`` inside, if it has one of this name."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _note_hooks(module: nn.Module) -> None:
    """transformers puts hooks on a model's parts when hidden states are first asked for, and notes so on the model:
    not on another one of the same parts, whose hidden states would come twice."""
    hooks = (hook for part in module.modules() for hook in part._forward_hooks.values())
    if any(getattr(hook, "__name__", "") == "output_capturing_hook" for hook in hooks):
        module._output_capturing_hooks_installed = True  # type: ignore[assignment]


@contextmanager
def _eager() -> Iterator[None]:
    """What is compiled by torch.compile runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # nothing is; and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _result(
    recorder: Recorder, inputs: Mapping[Node, str], weights: Mapping[Node, str], results: Collection[torch.Tensor]
) -> Captured:
    outputs = tuple(recorder.node_of(result) for result in results)
    nodes = _live(recorder.graph, outputs)
    present = set(nodes)
    return Captured(
        tuple(nodes),
        dict(inputs),
        {node: name for node, name in weights.items() if node in present},
        {node: tensor for node, tensor in recorder.known.items() if node in present},
        outputs,
    )


def _live(graph: fx.Graph, outputs: Collection[Node]) -> list[Node]:
    """The nodes that the outputs depend on, in order."""
    needed = set(outputs)
    live = []
    for node in reversed(list(graph.nodes)):
        if node in needed:
            live.append(node)
            needed.update(node.all_input_nodes)
    return live[::-1]
