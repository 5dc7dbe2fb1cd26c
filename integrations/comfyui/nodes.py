"""The nodes: loaders, and a node that places what any other loader has loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

import sdrpc
from sdrpc import Device

from .placing import clip_on, model_on, vae_on

HERE = "here"
"""Stands for ComfyUI's own devices, where a device of the network is asked for."""

CATEGORY = "sdrpc"
TYPES = ("MODEL", "CLIP", "VAE")

SERVERS: Mapping[str, Any] = {
    "servers": ("STRING", {
        "default": "localhost:50052",
        "tooltip": "rpc-servers, host:port, with commas in between: their devices are RPC0, RPC1 ...",
    }),
    "key": ("STRING", {
        "default": "",
        "tooltip": "the key that rpc-server printed, the first time; better given once to sd-cli --rpc-key, since "
        "workflows are kept and shared",
    }),
}  # fmt: skip


def _device(what: str) -> tuple[str, dict[str, str]]:
    return ("STRING", {"default": "RPC0", "tooltip": f"where {what}: RPC0, RPC1 ..., or {HERE}"})


DEVICES: Mapping[str, Any] = {
    "model_on": _device("the diffusion model computes"),
    "clip_on": _device("the text encoders compute"),
    "vae_on": _device("the VAE computes"),
}


class Place:
    """A model, text encoders and a VAE, as any loader gives them, on devices of the network."""

    CATEGORY = CATEGORY
    FUNCTION = "place"
    RETURN_TYPES: ClassVar = TYPES

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # ComfyUI's name
        optional = {name.lower(): (name,) for name in TYPES}
        return {"required": {**SERVERS, **DEVICES}, "optional": optional}

    def place(
        self,
        servers: str,
        key: str,
        model_on: str,
        clip_on: str,
        vae_on: str,
        model: Any = None,
        clip: Any = None,
        vae: Any = None,
    ) -> tuple[Any, Any, Any]:
        devices = connected(servers, key)
        wanted = ((model, model_on), (clip, clip_on), (vae, vae_on))
        return tuple(_put(put, *each, devices) for put, each in zip(PUT, wanted, strict=True))


class Checkpoint(Place):
    """A whole checkpoint from ComfyUI's folder of checkpoints, with its parts on devices of the network."""

    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # ComfyUI's name
        import folder_paths

        return {"required": {"ckpt_name": (folder_paths.get_filename_list("checkpoints"),), **SERVERS, **DEVICES}}

    def load(self, ckpt_name: str, **where: str) -> tuple[Any, Any, Any]:
        from nodes import CheckpointLoaderSimple

        model, clip, vae = CheckpointLoaderSimple().load_checkpoint(ckpt_name)[:3]
        return self.place(**where, model=model, clip=clip, vae=vae)


PUT = (model_on, clip_on, vae_on)


def loader(theirs: str, part: str, put: Callable[[Any, Device], Any], what: str) -> type:
    """A node that is ComfyUI's loader called ``theirs``, whose result, a ``part``, computes on a device."""

    class Loader:
        CATEGORY = CATEGORY
        FUNCTION = "load"
        RETURN_TYPES = (part,)

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # ComfyUI's name
            import nodes

            inputs = getattr(nodes, theirs).INPUT_TYPES()
            return {**inputs, "required": {**inputs["required"], **SERVERS, "on": _device(what)}}

        def load(self, servers: str, key: str, on: str, **inputs: Any) -> tuple[Any]:
            import nodes

            its = getattr(nodes, theirs)()
            loaded = getattr(its, its.FUNCTION)(**inputs)[0]
            return (_put(put, loaded, on, connected(servers, key)),)

    Loader.__name__ = Loader.__qualname__ = theirs
    return Loader


def _put(put: Callable[[Any, Device], Any], part: Any, on: str, devices: sdrpc.Devices) -> Any:
    """``part`` where ``on`` says."""
    return part if part is None or on.strip().lower() == HERE else put(part, devices[on.strip().upper()])


@cache
def connected(servers: str, key: str) -> sdrpc.Devices:
    """The servers' devices by name, for as long as ComfyUI runs: what was placed is on them."""
    endpoints = [server.strip() for server in servers.split(",") if server.strip()]
    return sdrpc.devices(rpc=endpoints, rpc_key=key.strip() or ())


_TEXT = "the text encoders compute"

NODE_CLASS_MAPPINGS = {
    "SdrpcCheckpoint": Checkpoint,
    "SdrpcUNET": loader("UNETLoader", "MODEL", model_on, "the diffusion model computes"),
    "SdrpcCLIP": loader("CLIPLoader", "CLIP", clip_on, _TEXT),
    "SdrpcDualCLIP": loader("DualCLIPLoader", "CLIP", clip_on, _TEXT),
    "SdrpcVAE": loader("VAELoader", "VAE", vae_on, "the VAE computes"),
    "SdrpcPlace": Place,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SdrpcCheckpoint": "Load Checkpoint on the network (sdrpc)",
    "SdrpcUNET": "Load Diffusion Model on the network (sdrpc)",
    "SdrpcCLIP": "Load CLIP on the network (sdrpc)",
    "SdrpcDualCLIP": "Load two CLIPs on the network (sdrpc)",
    "SdrpcVAE": "Load VAE on the network (sdrpc)",
    "SdrpcPlace": "Compute on the network (sdrpc)",
}
