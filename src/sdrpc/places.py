"""Where a user's files are kept between runs.

``$SDRPC_CACHE`` and ``$SDRPC_STATE`` choose the folders; else they are the system's own. A user without a home, such as
an unknown user id in a container, gets a folder that is deleted when the process ends.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)


def cache_folder(kind: str) -> Path:
    """Below it are files that can be made again: ``kind`` is graphs, digests or weights."""
    chosen = os.environ.get("SDRPC_CACHE")
    if chosen:
        return Path(chosen) / kind
    import platformdirs

    try:
        return platformdirs.user_cache_path("sdrpc") / kind
    except RuntimeError:
        return _for_this_run() / kind


def state_folder() -> Path:
    """Below it is what was learnt in earlier runs."""
    chosen = os.environ.get("SDRPC_STATE")
    if chosen:
        return Path(chosen)
    import platformdirs

    try:
        return platformdirs.user_state_path("sdrpc")
    except RuntimeError:
        return _for_this_run()


@cache
def _for_this_run() -> Path:
    log.warning(
        "nothing is kept for the next run, because this user has no home directory: "
        "set HOME, or SDRPC_CACHE and SDRPC_STATE"
    )
    folder = Path(tempfile.mkdtemp(prefix="sdrpc-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
