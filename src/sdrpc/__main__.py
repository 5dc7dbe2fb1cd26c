"""``python -m sdrpc``."""

import os
import sys

try:
    here = os.getcwd()
except FileNotFoundError:  # it was deleted
    here = ""
if sys.path[0] in ("", here):  # a user's random.py is not the library's
    del sys.path[0]

from .cli.entry import sdrpc

if __name__ == "__main__":
    sdrpc()
