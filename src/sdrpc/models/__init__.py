"""Models and LoRAs that ship with sdrpc: checkpoints beside this file, each under a name that stands for it."""

from __future__ import annotations

from pathlib import Path

SHIPPED = {"demo": Path(__file__).with_name("demo.safetensors")}
"""Name → file. ``demo`` draws coloured shapes, 128×128, and says so in its model card."""

LORAS = {"outline": Path(__file__).with_name("outline.safetensors")}
"""The same of LoRAs. With ``outline``, ``demo`` draws its shapes as outlines."""

LORAS_OF = "demo"
"""The model that they are for."""

DEFAULT = "demo"
"""What is used where no model is named."""


def named(text: str) -> Path:
    """The shipped model called ``text``, else the path that ``text`` is: ``./demo`` is a file of the user's."""
    return SHIPPED.get(text) or Path(text)
