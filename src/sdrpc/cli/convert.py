"""``sd-cli --mode convert``: a model as another file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidValue, UsageError
from . import report
from .output import DEFAULT_OUTPUT, check_writable

if TYPE_CHECKING:
    from ..families.model import ModelFiles


def convert(files: ModelFiles, output: str, verbose: bool = False) -> None:
    """Write the whole of the one file that is named to ``output``, its weights in the types that are wanted.

    Raises :class:`UsageError` and what :func:`sdrpc.diffusion.convert.write_model` raises.
    """
    from ..checkpoints.checkpoint import open_checkpoint
    from ..diffusion.convert import HOLDS, write_model

    if len(files.named) != 1:
        raise UsageError("--mode convert: takes one file, with -m or the option of a component, such as --vae")
    (source,) = files.named.values()
    path = Path("output.gguf" if output == DEFAULT_OUTPUT else output)
    if path.suffix.lower() not in HOLDS or os.path.isdir(path):
        raise InvalidValue("output", output, f"a converted model is a {' or '.join(HOLDS)} file")
    check_writable([path])
    meter = report.meter()
    checkpoint = open_checkpoint(source)
    try:
        unused = write_model(
            checkpoint,
            Path(os.path.realpath(path)),
            files.types,
            lambda done, total: meter.bytes(path.name, done, total),
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # whatever name it had until it is whole
    report.result(path)
    if unused:
        report.unused_tensors({str(source): unused}, verbose)
