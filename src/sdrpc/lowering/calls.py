"""Calls of an offloaded module: what goes to its device, and what comes back as the module itself would give it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor

from ..errors import UsageError
from . import autocast
from .structure import Description, Parts


@dataclass(frozen=True)
class Call:
    """One call: what decides its graph. ``float32``: whether products of float32 are. ``state`` numbers the module's
    states, ``given`` is that of functions and modules among the arguments."""

    method: str
    arguments: Parts
    float32: bool
    state: int
    given: Description

    @property
    def device(self) -> torch.device:
        """Where the module would compute in this process."""
        return self.arguments.tensors[0].device if self.arguments.tensors else torch.device("cpu")

    @functools.cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {f"input{i}": tensor for i, tensor in enumerate(self.arguments.tensors)}

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """Without the state."""
        facts = tuple((str(t.dtype), tuple(t.shape)) for t in self.arguments.tensors)
        narrow = autocast.dtype(self.device.type)
        dtypes = str(torch.get_default_dtype()), None if narrow is None else (self.device.type, str(narrow))
        return self.method, self.arguments.description, facts, self.float32, *dtypes, self.given

    def numbers(self, known: Sequence[str]) -> tuple[str, ...]:
        """Digests of the inputs named in ``known``."""
        return tuple(blake2b(array_of(self.inputs[name]).tobytes(), digest_size=16).hexdigest() for name in known)


def check_traced(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises :class:`UsageError` where torch.fx follows the call."""
    if any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())):
        raise UsageError(f"an offloaded {name} can't be traced or exported: take the original")


def check_tensors(name: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raises :class:`UsageError` where a module called ``name`` is given tensors that no device computes with."""
    offloaded = f"an offloaded {name}"
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # torch's
    if traced or any(isinstance(tensor, FakeTensor) for tensor in tensors):
        raise UsageError(f"{offloaded} can't be traced or exported: take the original")
    if any(map(is_functorch_wrapped_tensor, tensors)):
        what = "has no part in torch.func (vmap, jvp, grad …): call it with the whole batch, or take the original"
        raise UsageError(f"{offloaded} {what}")
    if any(tensor.is_meta for tensor in tensors):
        raise UsageError(f"{offloaded} needs numbers: an input is on the meta device")
    if not all(map(_is_dense, tensors)):
        raise UsageError(f"{offloaded} takes dense tensors: call to_dense() or dequantize()")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UsageError(f"{offloaded} has no gradients: call it under torch.no_grad()")


def check_surroundings(name: str, kind: str) -> None:
    """Raises :class:`UsageError` under an autocast of a kind of device whose lists are not known here."""
    if autocast.dtype(kind) is not None and kind not in autocast.LISTS:
        raise UsageError(
            f"an offloaded {name} does not follow torch.autocast of {kind}: convert the module, such as by "
            f'.to(torch.bfloat16), and call it under torch.autocast("{kind}", enabled=False)'
        )


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


_WORD_INT = re.compile(r"\bint\b")
"""In an annotation."""


def with_numbers_as_tensors(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Numbers where tensors are welcome (UNet's ``timestep``) become tensors: a graph is not made for each number.

    Not where it is an integer or a tensor, which then mean two things (``logits_to_keep``). What is given by name stays
    so: decorators look for names.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return args, kwargs
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_place = zip_longest(args, positional[: len(args)])
    return (
        [_as_welcome(value, parameter) for value, parameter in by_place],
        {name: _as_welcome(value, parameters.get(name)) for name, value in kwargs.items()},
    )


def _as_welcome(value: Any, parameter: inspect.Parameter | None) -> Any:
    """A number as a tensor, where the parameter takes tensors."""
    if parameter is None or not isinstance(value, int | float) or isinstance(value, bool):
        return value
    annotation = parameter.annotation
    takes_tensor = torch.Tensor in (annotation, *get_args(annotation)) or "Tensor" in str(annotation)
    integer = _WORD_INT.search(str(annotation)) and "float" not in str(annotation)
    return torch.tensor(value) if takes_tensor and not integer else value


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers: floats as float32, all others as they are."""
    tensor = tensor.detach().cpu().resolve_neg().resolve_conj()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


class _NoGradients(torch.autograd.Function):
    """Results that seem to depend on a parameter, as those of a module do; who asks for gradients is told.

    They come in a list: what is passed as a tensor comes out as a view, which nobody may write to."""

    @staticmethod
    def forward(ctx: Any, name: str, _: torch.Tensor, results: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        ctx.name = name
        ctx.mark_non_differentiable(*(r for r in results if not (r.is_floating_point() or r.is_complex())))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UsageError(f"an offloaded {ctx.name} has no gradients: train the original")


def without_gradients(name: str, module: nn.Module, results: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The results as a module with parameters to train gives them: who trains it must not find that it does not
    learn."""
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    parameter = next(trained, None) if torch.is_grad_enabled() and results else None
    if parameter is None:
        return results
    given: tuple[torch.Tensor, ...] = _NoGradients.apply(name, parameter, results)  # type: ignore[no-untyped-call]
    return given
