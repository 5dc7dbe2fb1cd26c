"""The options of stable-diffusion.cpp's sd-cli, from its own help: the first part of tests/data/sd-cli-options.json.

pip download --no-binary :all: --no-deps stable-diffusion-cpp-python==0.4.7
python tools/native_options.py stable_diffusion_cpp_python-0.4.7.tar.gz
"""

from __future__ import annotations

import re
import sys
import tarfile
from pathlib import Path

HELP = "vendor/stable-diffusion.cpp/examples/cli/README.md"
"""Where the sources keep what ``sd-cli --help`` prints."""

_LINE = re.compile(r"^  (?:(-\w), )?(--[\w-]+)", re.MULTILINE)
"""A line of the help that begins with an option, and with its short name where it has one."""


def options(archive: Path) -> list[str]:
    """The options in the help of an sdist of stable-diffusion-cpp-python, in its order."""
    with tarfile.open(archive) as sdist:
        member = next(name for name in sdist.getnames() if name.endswith(HELP))
        file = sdist.extractfile(member)
        assert file is not None
        text = file.read().decode()
    return [name for names in _LINE.findall(text) for name in names if name]


if __name__ == "__main__":
    print(*options(Path(sys.argv[1])), sep="\n")
