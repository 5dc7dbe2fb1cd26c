"""Which part of the model runs on which device: the grammar of ``--backend`` and its older companions.

    --backend cuda0                             everything there
    --backend te=RPC1,diffusion=RPC0,vae=CPU    part by part; all= (default=, *=) for the rest

Names are case-insensitive, ``-`` and ``_`` don't matter. A device is named exactly or by a unique prefix; ``auto`` is
the default device, ``gpu`` the first that is no CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import UsageError

TITLES = {"te": "text encoder", "diffusion": "diffusion model", "vae": "VAE"}
PARTS = tuple(TITLES)
"""The parts of a pipeline that are placed."""

ALIASES: dict[str, tuple[str, ...]] = {
    "te": ("te", "clip", "text", "textencoder", "textencoders", "conditioner", "cond", "llm", "t5", "t5xxl"),
    "diffusion": ("diffusion", "model", "unet", "dit"),
    "vae": ("vae", "firststage", "autoencoder", "tae"),
    "": ("all", "default", "*"),
}
"""Module names of stable-diffusion.cpp's ``--backend`` by part ("" is every part that has no device of its own)."""

NOT_HERE_YET = (
    "clipvision", "vision", "controlnet", "control", "photomaker", "pmid", "photo", "upscaler", "esrgan", "hires",
    "detector", "adetailer", "yolo",
)  # fmt: skip

_PART_OF = {alias: part for part, aliases in ALIASES.items() for alias in aliases}


def parse(text: str) -> dict[str, str]:
    """``--backend``'s value as part → device name; the key "" stands for every other part."""
    placed: dict[str, str] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        module, equals, device = item.partition("=")
        if not equals:
            module, device = "all", module
        part = _part(module)
        if "&" in device:
            raise UsageError(f"--backend {item}: one part over several devices is not in sdrpc yet; name one device")
        if not device.strip():
            raise UsageError(f"--backend {item}: no device is named after '='")
        if part in placed:
            raise UsageError(f"--backend: {module} is placed twice")
        placed[part] = device.strip()
    return placed


def wanted(backend: str, main: str, by_part: Mapping[str, str]) -> dict[str, str]:
    """Part → the name that the user gave its device, ``auto`` where none was given.

    ``by_part`` (``--vae-backend-device`` …) beats ``backend``'s modules, which beat ``backend``'s default and ``main``
    (``--main-backend-device``).
    """
    placed = parse(backend)
    everywhere = placed.get("") or main or "auto"
    return {part: by_part.get(part) or placed.get(part) or everywhere for part in PARTS}


def only_remote(name: str) -> bool:
    """Whether ``name`` can only mean a device of a server, so that this machine's need not be looked for."""
    return _fold(name).startswith("rpc")


def resolve(name: str, devices: Sequence[str], default: str) -> str:
    """The device among ``devices`` that ``name`` means: exactly, by unique prefix, ``auto`` (``default``) or ``gpu``.

    Raises :class:`UsageError` when it means none or several.
    """
    folded = _fold(name)
    if folded == "auto":
        return default
    if folded == "gpu":
        accelerators = [device for device in devices if device != "CPU"]
        if not accelerators:
            raise UsageError(f"no device but the CPU is here for {name!r}; add one with --rpc host:port")
        return accelerators[0]
    exact = [device for device in devices if _fold(device) == folded]
    matching = exact or [device for device in devices if folded and _fold(device).startswith(folded)]
    if len(matching) == 1:
        return matching[0]
    what = f"could be {' or '.join(matching)}" if matching else f"does not exist; there are {', '.join(devices)}"
    raise UsageError(f"device {name!r} {what} (see --list-devices)")


def _part(module: str) -> str:
    folded = _fold(module)
    if folded in NOT_HERE_YET:
        raise UsageError(f"--backend {module}: sdrpc has no {module} yet")
    if folded not in _PART_OF:
        raise UsageError(f"--backend {module}: no such module; there are {', '.join(PARTS)} and all")
    return _PART_OF[folded]


def _fold(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "")
