"""What options of models and devices mean, for every command that has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import models
from ..client import Keychain, Timeouts, given_keys
from ..diffusion import placement
from ..errors import InvalidValue
from . import report
from .command import Chosen

if TYPE_CHECKING:
    from ..families.model import ModelFiles


def files_of(chosen: Chosen) -> ModelFiles:
    """The files that the user named, or the model that ships with sdrpc when there are none."""
    from ..families.model import ModelFiles
    from ..families.weight_types import weight_types

    beside = {
        "types": weight_types(chosen["type"], chosen["tensor_type_rules"]),
        "qwen_image_zero_cond_t": chosen["qwen_image_zero_cond_t"],
    }
    named = {name: chosen[name] for name in ModelFiles.names() if chosen[name] is not None}
    if not named:
        report.say(f"no model is named with -m: using {models.DEFAULT}, which ships with sdrpc")
        return ModelFiles(models.named(models.DEFAULT), **beside)
    paths: dict[str, Any] = {field: Path(path) for field, path in named.items()}
    whole = {"model": models.named(named["model"])} if "model" in named else {}
    return ModelFiles(**paths | whole, **beside)


def folder_of(chosen: Chosen, field: str) -> Path | None:
    """The folder that an option names, if it does. Raises :class:`InvalidValue` for what is none."""
    path = chosen[field]
    if path is not None and not Path(path).is_dir():
        raise InvalidValue(field, path, "is no folder")
    return None if path is None else Path(path)


def servers(chosen: Chosen) -> list[str]:
    """The endpoints of ``--rpc``. Raises :class:`InvalidValue` where it is there and names none, as an empty variable
    of a shell does: nobody who writes it means this machine."""
    named = [endpoint.strip() for text in chosen["rpc"] for endpoint in text.split(",") if endpoint.strip()]
    if chosen["rpc"] and not named:
        raise InvalidValue("rpc", ",".join(chosen["rpc"]), "names no server: HOST:PORT; leave it out for this machine")
    return named


def keychain(chosen: Chosen) -> Keychain:
    """The keys that the user named for these servers, and those of before."""
    return Keychain(given_keys(chosen["rpc_key"], chosen["rpc_key_file"]))


def timeouts(chosen: Chosen) -> Timeouts:
    """How long servers may take. One that sleeps for less than we would wait for it goes on where it was."""
    return Timeouts(answer=chosen["rpc_timeout"], silent=max(chosen["rpc_retry"], Timeouts.connect))


def waiting(chosen: Chosen) -> dict[str, str]:
    """Where weights are that nobody uses, as :class:`sdrpc.diffusion.session.Session` takes it."""
    return ({"": "cpu"} if chosen["offload_to_cpu"] else {}) | placement.waiting(chosen["params_backend"])


def by_option(chosen: Chosen) -> dict[str, str]:
    """The devices that have an option of their own, by the names of :func:`sdrpc.diffusion.placement.wanted`."""
    return {
        "te": chosen["clip_backend_device"] or ("CPU" if chosen["clip_on_cpu"] else ""),
        "diffusion": chosen["diffusion_backend_device"],
        "control": chosen["control_net_backend_device"] or ("CPU" if chosen["control_net_cpu"] else ""),
        "vae": chosen["vae_backend_device"] or ("CPU" if chosen["vae_on_cpu"] else ""),
        "taesd": chosen["tae_backend_device"],
        "upscaler": chosen["upscaler_backend_device"],
    }


def threads(chosen: Chosen) -> int | None:
    """Threads of this machine's CPU; None: all."""
    return chosen["threads"] if chosen["threads"] > 0 else None
