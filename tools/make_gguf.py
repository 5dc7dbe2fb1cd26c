"""Write a checkpoint as a GGUF file: ``sd-cli --mode convert`` under a name of its own.

python tools/make_gguf.py IN OUT [--type q8_0]
"""

from __future__ import annotations

import argparse
import sys

from sdrpc.cli import report, sd_cli


def main() -> int:
    """Exit status of sd-cli."""
    parser = argparse.ArgumentParser(description="Write a checkpoint as a GGUF file.")
    parser.add_argument("model", help="a .safetensors or .gguf file, a diffusers directory, or a name: demo")
    parser.add_argument("path", help="the .gguf file")
    parser.add_argument("--type", default="q8_0", help="of matrices: f32, f16, bf16, q8_0, q5_1 … q4_0")
    options = parser.parse_args()
    arguments = ["--mode", "convert", "--model", options.model, "--output", options.path, "--type", options.type]
    return report.guarded(lambda: sd_cli.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
