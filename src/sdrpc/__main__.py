"""``python -m sdrpc``."""

import os
import sys

if sys.path[0] in ("", os.getcwd()):  # a user's random.py is not the library's
    del sys.path[0]

from .cli.entry import sdrpc

if __name__ == "__main__":
    sdrpc()
