"""A language model in llama.cpp's client: tokens per second with our server and with ggml's own, over the same RPC."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.language import Llama, Shape, Speed, write_model

from .native import native_server
from .rows import Row
from .setup import Setup, Variant

SHAPE = Shape(layers=4, width=1024, heads=16, groups=4, hidden=2816, vocabulary=4096)
PROMPT, GENERATED = 128, 64
"""Tokens."""
TYPES = ("F16", "Q4_K")


def run(setup: Setup) -> Iterator[Row]:
    for kind in TYPES:
        with native_server() as endpoint:
            theirs = _speed(setup, kind, endpoint)
        for precision in ("exact", "fast"):
            with setup.server(Variant(kind, precision)) as server:
                ours = _speed(setup, kind, f"127.0.0.1:{server.port}")
            for what, mine, native in zip(Speed._fields, ours, theirs, strict=True):
                yield Row(
                    f"language model, {kind}, {precision}: {what}", mine, "tokens/s", native, "ggml's server", None,
                    f"{SHAPE.layers} layers of {SHAPE.width}; {PROMPT} tokens in, {GENERATED} out",
                )  # fmt: skip


def _speed(setup: Setup, type: str, endpoint: str) -> Speed:
    model = setup.folder / f"{type}.gguf"
    if not model.exists():
        write_model(model, type, SHAPE)
    with Llama(setup.folder / "llama.log", endpoint) as llama:
        return llama.speed(model, PROMPT, GENERATED, threads=1)
