"""Write a checkpoint with random weights: python -m tools.checkpoints FAMILY FOLDER [--form …] [--type …] [--size …]"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import FAMILIES, FORMS, make


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", choices=FORMS, default="safetensors")
    parser.add_argument("--type", default="F16", help="number format: F32, F16, BF16, F8_E4M3, Q8_0, Q4_K …")
    parser.add_argument("--size", choices=("tiny", "reduced", "full"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = make(
        options.family, options.folder, form=options.form, type=options.type, size=options.size, seed=options.seed
    )
    for name, path in made.files.items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
