"""What a text must be to be a prompt, checked before anything is loaded."""

from __future__ import annotations

import re
from math import isnan

from ..errors import InvalidValue
from .attention import parse

_TAG = re.compile(r"<(?:\w+:[^<>]*>|(?:lora|lyco|hypernet)\s*:|sd_cpp_extra_args>)", re.IGNORECASE)
"""Tags of stable-diffusion.cpp and of the web UIs, which are instructions and no words: <lora:name:0.8>,
<hypernet:name:1>, <sd_cpp_extra_args>."""

MAX_WEIGHT = 1000
"""Numbers of half the bits overflow at hundreds of times what a text encoder gives, and the picture is lost."""


def check(field: str, text: str) -> None:
    """Raises :class:`InvalidValue` for ``field`` when ``text`` is no Unicode text, has a tag that sdrpc can't follow,
    or a weight that is no number or larger than ``MAX_WEIGHT``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = ord(text[error.start])
        what = f"the byte 0x{wrong - 0xDC00:02x}" if 0xDC80 <= wrong <= 0xDCFF else f"the code U+{wrong:04X}"
        reason = f"is no UTF-8 text: {what} after {error.start} characters; save the script or file as UTF-8"
        raise InvalidValue(field, text, reason) from error
    tag = _TAG.search(text)
    if tag:
        raise InvalidValue(field, tag[0], "sdrpc can't apply this tag here, and would read it as words; leave it out")
    try:
        pieces = parse(text)
    except InvalidValue as error:
        raise InvalidValue(field, text, error.reason) from error
    for piece in pieces:
        if isnan(piece.weight) or abs(piece.weight) > MAX_WEIGHT:
            raise InvalidValue(
                field, text, f"the weight {piece.weight:g} of {piece.text!r} is beyond {MAX_WEIGHT}: brackets multiply"
            )
