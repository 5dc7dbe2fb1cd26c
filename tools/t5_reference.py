"""Write tests/data/t5_tokens.json: texts and their tokens by sentencepiece itself (pip install sentencepiece).

The model that sentencepiece needs is put together from the shipped vocabulary, with the settings of T5's spiece.model.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

from sdrpc.prompts.tokenizers import T5_END_ID, T5_PAD_ID, T5_SENTINELS, T5_UNKNOWN_ID, t5_vocabulary

TARGET = Path(__file__).parent.parent / "tests" / "data" / "t5_tokens.json"

NORMAL, UNKNOWN, CONTROL = 1, 2, 3
"""Types of pieces in sentencepiece_model.proto."""

WORDS = (
    "a lovely cat sitting on the mat, photograph 8k (highly detailed) Ünïcode naïve don't it's www.foo-bar.com 3.14159 "
    "straße Bäume élégant ﬁne ½ ℃ Ａ … “quoted” — 日本語 текст 🐱 \t \n ▁ x\u00a0y e\u0301 {json: [1]} #tag @user 50% "
    "C++"
)


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def number_field(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def bytes_field(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def model() -> bytes:
    """T5's spiece.model: ModelProto of pieces (1), trainer_spec (2) and normalizer_spec (3)."""
    vocabulary, charsmap = t5_vocabulary()
    types = {T5_PAD_ID: CONTROL, T5_END_ID: CONTROL, T5_UNKNOWN_ID: UNKNOWN}
    pieces = b"".join(
        bytes_field(
            1,
            bytes_field(1, piece.encode("utf-8"))
            + varint(2 << 3 | 5) + struct.pack("<f", score)
            + number_field(3, types.get(index, NORMAL)),
        )
        for index, (piece, score) in enumerate(vocabulary[:-T5_SENTINELS])
    )  # fmt: skip
    none = (1 << 64) - 1  # there is no start token
    trainer = number_field(3, 1) + b"".join(
        number_field(40 + index, value) for index, value in enumerate((T5_UNKNOWN_ID, none, T5_END_ID, T5_PAD_ID))
    )
    normalizer = bytes_field(1, b"nmt_nfkc") + bytes_field(2, charsmap)
    return pieces + bytes_field(2, trainer) + bytes_field(3, normalizer)


def texts() -> list[str]:
    generator, words = random.Random(0), WORDS.split(" ")
    return ["", " ", *(" ".join(generator.choices(words, k=generator.randrange(1, 25))) for _ in range(150))]


def main() -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model())
    rows = ",\n".join(json.dumps([text, processor.encode(text)], ensure_ascii=False) for text in texts())
    TARGET.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
