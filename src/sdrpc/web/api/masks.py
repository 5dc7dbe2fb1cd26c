"""Masks as clients send them, as ours: light where a picture is drawn anew."""

from __future__ import annotations

from io import BytesIO

from PIL import Image, ImageChops, ImageFilter

from ...diffusion.image_files import read_mask, read_picture


def from_alpha(data: bytes) -> bytes:
    """OpenAI's: transparent where it is drawn anew. One without transparency is taken as ours is.

    Raises :class:`InvalidValue`.
    """
    read_mask("mask", data)  # refuses what is no picture, or too large, before it is decoded
    with Image.open(BytesIO(data)) as image:
        if not image.has_transparency_data:
            return data
        return _png(ImageChops.invert(image.convert("RGBA").getchannel("A")))


def prepared(data: bytes, invert: bool, blur: int) -> bytes:
    """A1111's: ``invert`` swaps what stays and what is drawn; ``blur``: radius in pixels that softens its border.

    Raises :class:`InvalidValue`.
    """
    mask = Image.fromarray(read_mask("mask", data))
    mask = ImageChops.invert(mask) if invert else mask
    return _png(mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask)


def stretched(data: bytes, width: int, height: int) -> bytes:
    """A picture as wide and high as that, whatever its shape was (A1111's "just resize"). Raises
    :class:`InvalidValue`."""
    return _png(Image.fromarray(read_picture("init_images", data)).resize((width, height), Image.Resampling.LANCZOS))


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
