"""Qwen3-VL, a language model that encodes prompts: of its parts the one that reads text, which is Qwen3 with another
base of positions. (It counts in time, rows and columns, which are the same for text.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..base import Config, Found
from . import llm
from .qwen3 import QWEN3


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of transformers' Qwen3Config."""
    inner = told.get("text_config")
    said = dict(inner) if isinstance(inner, Mapping) else dict(told)
    (head,) = found.shape("layers.0.self_attn.q_norm.weight", 1)
    config = llm.inferred(found, head) | {"rope_theta": 5e6, "rms_norm_eps": 1e-6}
    return llm.merged(found, config, said, ("qwen3vl",))


_NESTED = (
    "text_encoders.qwen3vl_4b.transformer.model.language_model.", "text_encoder.model.language_model.",
    "text_encoder.language_model.", "model.language_model.", "language_model.",
)  # fmt: skip

QWEN3_VL = replace(
    QWEN3,
    title="Qwen3-VL text encoder",
    prefixes=(*_NESTED, *llm.prefixes("qwen3vl_4b", "llm")),
    configure=_configure,
)
