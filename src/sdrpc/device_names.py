"""How users name a device: exactly or by a unique prefix, in any case, ``-`` and ``_`` or not; ``auto`` is the default
device, ``gpu`` the first that is no CPU.
"""

from __future__ import annotations

from collections.abc import Collection

from .errors import InvalidValue

AUTO = "auto"


def only_remote(name: str) -> bool:
    """Whether ``name`` can only mean a device of a server, so that this machine's need not be looked for."""
    return folded(name).startswith("rpc")


def resolve(name: str, devices: Collection[str], default: str, field: str = "backend") -> str:
    """The device among ``devices`` that ``name`` means: exactly, by unique prefix, ``auto`` (``default``) or ``gpu``.

    Raises :class:`InvalidValue` for ``field`` when it means none or several.
    """
    wanted = folded(name)
    if wanted == AUTO:
        return default
    if wanted == "gpu":
        accelerators = [device for device in devices if device != "CPU"]
        if not accelerators:
            raise InvalidValue(field, name, "there is no device but the CPU; add one of a server")
        return accelerators[0]
    exact = [device for device in devices if folded(device) == wanted]
    matching = exact or [device for device in devices if wanted and folded(device).startswith(wanted)]
    if len(matching) == 1:
        return matching[0]
    there = ", ".join(devices)
    what = f"it could be {' or '.join(matching)}" if matching else f"there is no such device; there are {there}"
    raise InvalidValue(field, name, what)


def folded(name: str) -> str:
    """``name`` without what does not matter in it."""
    return name.strip().lower().replace("-", "").replace("_", "")
