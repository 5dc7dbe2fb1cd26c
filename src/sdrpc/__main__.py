"""``python -m sdrpc``."""

from .cli.entry import sdrpc

if __name__ == "__main__":
    sdrpc()
