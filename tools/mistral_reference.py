"""Write tests/data/mistral_tokens.json: texts and their tokens by Mistral's own library.

pip install mistral-common
python -m tools.mistral_reference
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from tools.t5_reference import texts

TARGET = Path(__file__).parent.parent / "tests" / "data" / "mistral_tokens.json"
ROWS = 60


def main() -> None:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path: Any = files("mistral_common") / "data" / "tekken_240911.json"
    tekken = Tekkenizer.from_file(path)
    rows = ",\n".join(
        json.dumps([text, tekken.encode(text, bos=False, eos=False)], ensure_ascii=False) for text in texts()[:ROWS]
    )
    TARGET.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
