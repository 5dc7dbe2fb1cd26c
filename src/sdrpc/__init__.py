"""Stable Diffusion on whatever devices are free on the network, over ggml's RPC protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .device import Device as Device
    from .diffusion.events import Event as Event
    from .diffusion.pictures import Picture as Picture
    from .diffusion.pictures import Video as Video
    from .diffusion.request import Request as Request
    from .diffusion.session import Session as Session
    from .families.model import ModelFiles as ModelFiles
    from .runtime.chain import Chain as Chain
    from .runtime.chain import Lanes as Lanes

__all__ = [
    "Chain", "Device", "Devices", "Event", "Lanes", "ModelFiles", "Picture", "Request", "Session", "Video",
    "__version__", "devices", "offload",
]  # fmt: skip

_LAZY = {
    "Chain": "runtime.chain", "Device": "device", "Event": "diffusion.events", "Lanes": "runtime.chain",
    "ModelFiles": "families.model", "Picture": "diffusion.pictures",
    "Request": "diffusion.request", "Session": "diffusion.session", "Video": "diffusion.pictures",
}  # fmt: skip
"""What is imported when it is first asked for: commands that draw nothing shall start at once."""

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def offload(
    module: nn.Module,
    device: Device,
    retry: float | None = None,
    float32_matmul_precision: str | None = None,
) -> nn.Module:
    """``module`` with its computing done by ``device``: same class, signatures, results and errors.

    ``pipe.unet = sdrpc.offload(pipe.unet, sdrpc.devices(rpc=["host:50052"])["RPC0"])``. A server that is lost is waited
    for, 60 seconds unless ``retry`` says otherwise. Float32 is multiplied in float32, unless
    ``float32_matmul_precision`` or torch's setting of that name is "medium". See
    :func:`sdrpc.lowering.offload.offload`.
    """
    from .lowering.offload import offload
    from .runtime.lost import RETRY_SECONDS

    return offload(module, device, RETRY_SECONDS if retry is None else retry, float32_matmul_precision)


class Devices(dict[str, "Device"]):
    """Devices by name. A name that is not there is an error that says which are."""

    def __missing__(self, name: str) -> Device:
        raise KeyError(f"no device {name}: there are {', '.join(sorted(self))}")


def devices(
    rpc: str | Sequence[str] = (),
    *,
    rpc_key: str | Sequence[str] = (),
    precision: str = "auto",
    threads: int | None = None,
) -> Devices:
    """The devices of this process and of the servers at ``rpc``, by name: CUDA0, CPU, RPC0, RPC1 …

    ``rpc``: one or several endpoints, ``host:port``. ``rpc_key``: a key for them, or ``host:port=key`` for each of
    them; what let us in before need not be given again (see ``sd-cli --help``). ``precision``: exact, fast, ggml or
    auto, of the local ones (a server chooses its own); ``threads``: of the CPU. Close those that you have used. Raises
    :class:`sdrpc.errors.UsageError`, and for a server that can't be used :class:`~sdrpc.errors.ConnectionFailed`,
    :class:`~sdrpc.errors.ConnectionLost`, :class:`~sdrpc.errors.VersionMismatch` or
    :class:`~sdrpc.errors.RemoteProtocolError`.
    """
    from .client import Keychain, connect, given_keys
    from .engine import devices as local_devices
    from .errors import UsageError

    endpoints = [rpc] if isinstance(rpc, str) else list(rpc or ()) if isinstance(rpc, Iterable) else [rpc]
    if not all(isinstance(each, str) for each in endpoints):
        raise UsageError(f"rpc takes 'host:port', or several such texts, not {rpc!r}")
    keychain = Keychain(given_keys([rpc_key] if isinstance(rpc_key, str) else rpc_key))
    remote = connect(endpoints, keychain=keychain) if rpc else []
    return Devices({device.name: device for device in [*local_devices(precision, threads), *remote]})
