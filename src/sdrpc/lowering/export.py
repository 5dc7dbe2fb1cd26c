"""torch.export, and what has to be known about its graph before it is lowered.

The module is exported with parameters and inputs that have shapes but no numbers (torch's fake tensors, on the CPU
whatever the module's device): nothing is computed, so that a module of any size is captured in no memory, before its
weights exist. What depends neither on inputs nor on weights (masks, positions, frequencies) is computed by torch while
the graph is read.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind

from ..errors import CaptureError

Node = fx.Node
Call = Callable[..., tuple[torch.Tensor, ...]]
"""A function of a module and of tensors: ``lambda module, x, t: (module(x, t).sample,)``."""


@dataclass(frozen=True)
class Exported:
    """A module as a graph of ATen operations. Placeholders are the inputs, in order, and the weights by their names;
    ``known`` maps nodes to tensors that depend on neither."""

    nodes: tuple[Node, ...]
    inputs: Mapping[Node, str]
    weights: Mapping[Node, str]
    known: Mapping[Node, torch.Tensor]
    outputs: tuple[Any, ...]


class _Flat(nn.Module):
    """A module seen as a function of a flat list of tensors."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.call(self.module, *tensors)


def export(module: nn.Module, inputs: Mapping[str, torch.Tensor], call: Call) -> Exported:
    """Export ``call(module, *inputs.values())``, a function from tensors to tensors.

    Only shapes and dtypes of the inputs matter. Raises :class:`CaptureError` for what torch.export can't follow.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        flat = _Flat(_with_state(module, _empty), call)
        examples = tuple(map(_empty, inputs.values()))
    try:
        with torch.no_grad():
            program = torch.export.export(flat, examples, strict=False)
    except Exception as error:  # whatever the module's own code or the exporter raises
        raise CaptureError(f"torch.export can't follow {type(module).__name__}: {_first_line(error)}") from error
    return _read(program, module, tuple(inputs))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def rehearse(module: nn.Module, inputs: Mapping[str, torch.Tensor], call: Call) -> None:
    """``call(module, *inputs.values())`` on the meta device, for the errors that the module's own code raises."""

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="meta")

    with torch.no_grad():
        call(_with_state(module, meta), *map(meta, inputs.values()))


def _with_state(module: nn.Module, state: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy of ``module`` that has ``state(tensor)`` in the place of each parameter and buffer."""
    parameters: dict[int, Any] = {id(p): nn.Parameter(state(p), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, parameters | {id(b): state(b) for b in module.buffers()})


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)


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


def _read(program: torch.export.ExportedProgram, module: nn.Module, names: Sequence[str]) -> Exported:
    graph = _functional(program.graph)
    nodes = {node.name: node for node in graph.nodes}
    state = dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))
    inputs: dict[Node, str] = {}
    weights: dict[Node, str] = {}
    known: dict[Node, torch.Tensor] = {}
    left = iter(names)
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        target = (spec.target or "").removeprefix("module.")
        if spec.kind is InputKind.USER_INPUT:
            inputs[node] = next(left)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            known[node] = program.constants[spec.target or ""]
        elif spec.kind is InputKind.PARAMETER or (spec.persistent and state[target].is_floating_point()):
            weights[node] = target
        else:
            known[node] = state[target]
    live = _live(graph)
    _fold(live, known, {*inputs, *weights})
    output = graph.output_node().args[0]
    return Exported(tuple(live), inputs, weights, known, tuple(output))  # type: ignore[arg-type]


def _functional(graph: fx.Graph) -> fx.Graph:
    """In-place operations as their results: later readers of the operand read the result.

    Raises :class:`CaptureError` where a part or another view of a tensor is written.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_function" and _packet(node).endswith("_") and not _packet(node).endswith("__"):
            target = node.args[0]
            if _aliased(target, order[node], order):
                raise CaptureError(f"{place(node)}: {_packet(node)} writes a tensor that has another name")
            target.replace_all_uses_with(node, lambda user, at=order[node]: order[user] > at)
    return graph


def _aliased(target: Node, at: int, order: Mapping[Node, int]) -> bool:
    """Whether anything after position ``at`` reads ``target`` under another name (or may: inputs have owners)."""
    return (
        target.op != "call_function"
        or _is_view(target)
        or any(order[user] > at for view in _views(target) for user in view.users)
    )


def _views(node: Node) -> Iterator[Node]:
    for user in node.users:
        if _is_view(user):
            yield user
            yield from _views(user)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    written = [r.alias_info for r in schema.returns if r.alias_info is not None] if schema is not None else []
    return node.target is operator.getitem or any(not info.is_write for info in written)


def _live(graph: fx.Graph) -> list[Node]:
    """The nodes that the outputs depend on, in order."""
    needed = set(graph.output_node().all_input_nodes)
    live = []
    for node in reversed(list(graph.nodes)):
        if node in needed:
            live.append(node)
            needed.update(node.all_input_nodes)
    return live[::-1]


def _fold(nodes: Sequence[Node], known: dict[Node, torch.Tensor], unknown: set[Node]) -> None:
    """Compute what is already known, on the CPU."""
    for node in nodes:
        if node.op == "placeholder" and known.get(node, torch.empty(0)).is_meta:
            raise CaptureError(f"{node.name} has no numbers: build the module under sdrpc.lowering.without_weights()")
        if node.op != "call_function" or any(source in unknown for source in node.all_input_nodes):
            unknown.update([] if node in known else [node])
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]


def _packet(node: Node) -> str:
    """An operation's name without namespace and overload; empty for what is no operation."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).rpartition("::")[2]


def operation(node: Node) -> str:
    """The full name of what a node calls: ``aten.conv2d.default``."""
    return str(node.target)


def place(node: Node) -> str:
    """Where in the module a node comes from: ``down_blocks.0.resnets.1 (ResnetBlock2D)``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())[1:]  # the first is the module as a function
    if not stack:
        return "the module"
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"{path.removeprefix('module').lstrip('.') or 'the module'} ({kind.rpartition('.')[2]})"
