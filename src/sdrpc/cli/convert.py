"""``sd-cli --mode convert``: a model as a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidValue, UsageError
from . import report
from .output import DEFAULT_OUTPUT, check_writable

if TYPE_CHECKING:
    from ..families.model import ModelFiles


def convert(files: ModelFiles, type: str, output: str, verbose: bool = False) -> None:
    """Write the whole model of ``files`` to ``output``, its weights in ``type`` ("": as they are).

    Raises :class:`UsageError` and what :func:`sdrpc.diffusion.convert.write_gguf` raises.
    """
    from ..checkpoints.checkpoint import open_checkpoint
    from ..diffusion.convert import type_named, write_gguf

    if files.model is None or len(files.named) > 1:
        raise UsageError("--mode convert: takes one file with -m, and no others")
    path = Path("output.gguf" if output == DEFAULT_OUTPUT else output)
    if path.suffix.lower() != ".gguf" or os.path.isdir(path):
        raise InvalidValue("output", output, "a converted model is a .gguf file")
    wanted = type_named(type) if type else None
    check_writable([path])
    meter = report.meter()
    checkpoint = open_checkpoint(files.model)
    try:
        unused = write_gguf(
            checkpoint, Path(os.path.realpath(path)), wanted, lambda done, total: meter.bytes(path.name, done, total)
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # whatever name it had until it is whole
    report.result(path)
    if unused:
        report.unused_tensors({str(files.model): unused}, verbose)
