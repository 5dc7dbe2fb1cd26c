"""The nodes: a loader, and a node that places what another loader has loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import sdrpc

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
        return tuple(
            part if part is None or where.strip().lower() == HERE else put(part, devices[where.strip().upper()])
            for put, (part, where) in zip(PUT, wanted, strict=True)
        )


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


@cache
def connected(servers: str, key: str) -> sdrpc.Devices:
    """The servers' devices by name, for as long as ComfyUI runs: what was placed is on them."""
    endpoints = [server.strip() for server in servers.split(",") if server.strip()]
    return sdrpc.devices(rpc=endpoints, rpc_key=key.strip() or ())


NODE_CLASS_MAPPINGS = {"SdrpcCheckpoint": Checkpoint, "SdrpcPlace": Place}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SdrpcCheckpoint": "Load Checkpoint on the network (sdrpc)",
    "SdrpcPlace": "Compute on the network (sdrpc)",
}
