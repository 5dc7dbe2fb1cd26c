"""An encoder that stands for Gemma 2 in tests of what a family asks of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdrpc.families.base import F32, Config
from sdrpc.prompts import sentencepiece_tokenizer
from tools.checkpoints.tokenizers import gemma_pieces


class Encoder:
    """Its hidden states are the tokens' numbers; ``state``: the only one that may be asked for."""

    pictures: tuple[F32, ...] = ()

    def __init__(self, state: int) -> None:
        self.state = state

    def __call__(self, component: str, inputs: Any, **options: Any) -> tuple[F32, ...]:
        assert options == {"states": [self.state]}
        return (np.repeat(inputs["ids"][..., None], 4, axis=2).astype(np.float32),)

    def config(self, component: str) -> Config:
        return {"vocab_size": 380, "num_hidden_layers": 26}

    def tokenizer(self, component: str) -> Any:
        return sentencepiece_tokenizer(Path("gemma"), gemma_pieces())

    def has(self, component: str) -> bool:
        raise AssertionError
