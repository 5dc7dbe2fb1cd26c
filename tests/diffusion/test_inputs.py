"""Pictures as input: what is made of files, sizes and strengths before a model sees them, and what is refused."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sdrpc.diffusion.denoising import Guess, kept_outside
from sdrpc.diffusion.image_files import MAX_PIXELS, READERS, read_mask, read_picture, read_pictures
from sdrpc.diffusion.inputs import latent_mask, reference_size, steps_left_out
from sdrpc.diffusion.pictures import fitted, from_pixels, to_pixels
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.samplers import sample
from sdrpc.errors import InvalidValue
from sdrpc.families.base import Defaults

Pixels = NDArray[np.uint8]


def grain(height: int, width: int, channels: int = 3) -> Pixels:
    values = np.random.default_rng(1).integers(0, 256, (height, width, channels))
    return values.astype(np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# Strength, masks, sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "steps", "left_out"),
    [(0.75, 20, 4), (0.4, 20, 11), (1.0, 20, 0), (0.999, 20, 0), (0.0, 20, 19), (0.5, 1, 0), (0.6, 3, 1)],
)
def test_a_strength_leaves_out_what_stable_diffusion_cpp_leaves_out(strength: float, steps: int, left_out: int) -> None:
    """It takes int(steps · strength) + 1 of them, all with 1."""
    assert steps_left_out(strength, steps) == left_out


def test_a_latent_is_as_white_as_the_whitest_pixel_of_a_mask() -> None:
    mask = np.zeros((16, 24), np.uint8)
    mask[15, 23], mask[0, 8], mask[3, 9] = 255, 26, 51
    expected = np.array([[0, 0.2, 0], [0, 0, 1]], np.float32)[None, None]
    np.testing.assert_allclose(latent_mask(mask, 8), expected)
    assert latent_mask(None, 8) is None


def test_what_is_kept_is_kept_by_every_step_and_grey_is_in_between() -> None:
    shape = (1, 1, 1, 3)
    known, anew = np.full(shape, 2, np.float32), np.array([0, 0.5, 1], np.float32).reshape(shape)
    denoise = kept_outside(lambda x, sigma: Guess(np.full_like(x, 10), np.full_like(x, 4)), known, anew)
    guided, unconditional = denoise(known, np.float32(1))
    assert guided.ravel().tolist() == [2, 6, 10]
    assert unconditional is not None
    assert unconditional.ravel().tolist() == [2, 3, 4]
    sigmas = np.array([3, 2, 1, 0], np.float32)
    noise = make_rng("cuda", 1).normal(3).reshape(shape)
    for name in ("euler", "euler_a", "dpm++2m", "heun", "lcm", "euler_cfg_pp"):
        end = sample(name, denoise, known + sigmas[0] * noise, sigmas, make_rng("cuda", 2), flow=False)
        np.testing.assert_allclose(end[..., 0], 2, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "size", "given"),
    [((512, 512, 3), (512, 512), (512, 512)), ((1000, 500, 3), (1024, 1024), (720, 1456)),
     ((4000, 4000, 3), (2048, 2048), (1024, 1024)), ((1, 3000, 3), (512, 512), (28048, 16))],
)  # fmt: skip
def test_reference_pictures_keep_their_shape(shape: Any, size: tuple[int, int], given: tuple[int, int]) -> None:
    settings = Request("", width=size[0], height=size[1]).resolved(Defaults(512), (512, 512), 64)
    assert reference_size(np.zeros(shape, np.uint8), settings, 16) == given


def test_pictures_are_cut_around_their_middle_and_scaled_in_linear_light() -> None:
    image = grain(6, 12)
    np.testing.assert_array_equal(fitted(image, 6, 6), image[:, 3:9])
    np.testing.assert_array_equal(fitted(image, 12, 3)[:, 2], fitted(image[1:4], 12, 3)[:, 2])
    assert fitted(image, 12, 6) is image
    checks = np.indices((8, 8)).sum(0)[..., None].repeat(3, -1).astype(np.uint8) % 2 * 255
    assert set(np.unique(fitted(checks, 4, 4))) == {188}, "half the light, not half of 255"
    np.testing.assert_array_equal(fitted(image, 24, 12)[::2, ::2], image)
    assert fitted(grain(7, 5, 1)[..., 0], 3, 9).shape == (9, 3)


def test_pixels_become_numbers_and_come_back() -> None:
    image = grain(3, 5)
    numbers = from_pixels(image)
    assert (numbers.shape, numbers.dtype) == ((1, 3, 3, 5), np.dtype(np.float32))
    assert -1 <= numbers.min() <= numbers.max() <= 1
    np.testing.assert_array_equal(to_pixels(numbers[0]), image)


@pytest.mark.parametrize(
    ("field", "value"),
    [("strength", -0.1), ("strength", 1.1), ("strength", float("nan")), ("init_image", np.zeros((8, 8), np.uint8)),
     ("init_image", np.zeros((8, 8, 4), np.uint8)), ("init_image", np.zeros((8, 8, 3), np.float32)),
     ("init_image", np.zeros((0, 8, 3), np.uint8)), ("mask", np.zeros((8, 8, 3), np.uint8)),
     ("ref_images", (np.zeros((8, 8), np.uint8),)), ("ref_images", (np.zeros((8, 8, 3), np.uint8),) * 17)],
)  # fmt: skip
def test_what_is_no_picture_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        Request("", **{field: value}).resolved(Defaults(512), (512, 512), 64)
    assert caught.value.field == field


def test_a_mask_needs_a_picture() -> None:
    with pytest.raises(InvalidValue, match="mask 8×4: there is no init_image"):
        Request("", mask=np.zeros((4, 8), np.uint8)).resolved(Defaults(512), (512, 512), 64)


def test_a_picture_decides_the_size_where_nothing_else_does() -> None:
    asked = Request("", init_image=grain(100, 200), mask=grain(100, 200, 1)[..., 0])
    settings = asked.resolved(Defaults(512), (512, 512), 64)
    assert (settings.width, settings.height) == (256, 128)
    assert settings.init_image is not None
    assert settings.mask is not None
    assert (settings.init_image.shape, settings.mask.shape) == ((128, 256, 3), (128, 256))


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_a_file_gives_its_pixels(format: str, tmp_path: Path) -> None:
    image = grain(9, 7)
    path = tmp_path / "no suffix that tells"
    path.write_bytes(encoded(Image.fromarray(image), format, **({"lossless": True} if format == "WEBP" else {})))
    np.testing.assert_array_equal(read_picture("init_image", path), image)
    assert read_mask("mask", path).shape == (9, 7)


def test_each_field_of_a_request_that_is_a_picture_can_be_read_from_a_file() -> None:
    assert {field.name for field in fields(Request) if "Pixels" in str(field.type)} == set(READERS)


def test_of_files_a_request_takes_one_for_each_field_and_all_references() -> None:
    files = [encoded(Image.fromarray(grain(2, width))) for width in (3, 4)]
    read = read_pictures({"init_image": files, "mask": files[1:], "end_image": [], "ref_images": files})
    assert {field: np.shape(picture) for field, picture in read.items() if field != "ref_images"} == {
        "init_image": (2, 3, 3), "mask": (2, 4),
    }  # fmt: skip
    assert [picture.shape for picture in read["ref_images"]] == [(2, 3, 3), (2, 4, 3)]


def test_a_photograph_stands_upright() -> None:
    image = Image.fromarray(grain(4, 8))
    turned = image.getexif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    read = read_picture("init_image", encoded(image, "PNG", exif=turned))
    np.testing.assert_array_equal(read, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_paper_shows_through(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((0, 0), (9, 9, 9, 0))
    options = {}
    if mode == "P":
        image, options = image.convert("RGB").quantize(4), {"transparency": 1}
        image.putdata([1, 0])
    red = {"LA": [76, 76, 76]}.get(mode, [255, 0, 0])
    pixels = read_picture("init_image", encoded(image.convert(mode) if mode != "P" else image, **options))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    if mode != "P":
        assert pixels[0, 1].tolist() == red


def test_16_bits_become_8() -> None:
    deep = Image.fromarray((grain(2, 2, 1)[..., 0].astype(np.uint16) << 8) | 0xFF)
    np.testing.assert_array_equal(read_picture("init_image", encoded(deep))[..., 0], grain(2, 2, 1)[..., 0])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that claims to be large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def test_huge_pictures_are_refused_by_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    for width, height in ((8193, 8192), (30000, 30000), (1 << 30, 2)):
        with pytest.raises(InvalidValue, match=r"pixels|broken"):
            read_picture("init_image", bomb(width, height))
    assert MAX_PIXELS == 8192 * 8192


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), "floating-point numbers"),
        (np.full(64, np.nan, np.float32), "floating-point numbers"),
        (np.arange(64, dtype=np.int32) * 70000, "more than 16 bits"),
        (np.arange(64, dtype=np.int32) - 9, "more than 16 bits"),
    ],
    ids=["0 to 1", "NaN", "32 bits", "negative"],
)
def test_numbers_of_unknown_brightness_are_refused(numbers: NDArray[Any], says: str) -> None:
    """They became black or white pictures, without a word."""
    file = encoded(Image.fromarray(numbers.reshape(8, 8)), "TIFF")
    for read in (read_picture, read_mask):
        with pytest.raises(InvalidValue, match=f"its pixels .*{says}.*; save it with"):
            read("init_image", file)


FTYP = b"\0\0\0\x18ftyp%b\0\0\0\0" + bytes(99)
OTHER_FILES = {
    b"": "is empty",
    FTYP % b"heic": "is a HEIC picture",
    FTYP % b"avif": "is an AVIF picture",
    FTYP % b"isom": "is a film",
    b"\xff\x0a" + bytes(99): "is a JPEG XL picture",
    b"8BPS\0\1": "is a Photoshop picture",
    b'<svg xmlns="http://www.w3.org/2000/svg"/>': "is a drawing",
    b"%PDF-1.4": "is a document",
    b"<!DOCTYPE html><html>": "is a web page, not a picture",
    b"version https://git-lfs.github.com/spec/v1\n": "is a Git LFS pointer",
    b'{"error": "not found"}': "is JSON text, not a picture",
    b"PK\3\4 and so on": "is no picture that sdrpc reads",
}


@pytest.mark.parametrize("data", OTHER_FILES, ids=list(OTHER_FILES.values()))
def test_other_files_are_told_by_what_they_are(data: bytes) -> None:
    with pytest.raises(InvalidValue, match=OTHER_FILES[data]):
        read_picture("init_image", data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_no_file_breaks_more_than_itself(format: str) -> None:
    whole = encoded(Image.fromarray(grain(24, 24)), format)
    random = np.random.default_rng(5)
    for attempt in range(60):
        broken = bytearray(whole[: random.integers(0, len(whole))] if attempt % 2 else whole)
        for position in random.integers(0, max(1, len(broken)), 6 if broken else 0):
            broken[position] = random.integers(0, 256)
        with suppress(InvalidValue):
            assert read_picture("init_image", bytes(broken)).shape[2] == 3


def test_what_is_no_picture_or_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="is no picture that sdrpc reads"):
        read_picture("init_image", b"GGUF and so on")
    with pytest.raises(InvalidValue, match=r"No such file or directory$"):
        read_picture("init_image", tmp_path / "missing.png")
    (tmp_path / "cat.png").touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name, says in (("Cat.png", "did you mean .*cat.png"), ("gone.png", "is a link to .*nowhere.png, which is not")):
        with pytest.raises(InvalidValue, match=says):
            read_picture("init_image", tmp_path / name)
    with pytest.raises(InvalidValue, match="is an address, not a file: pictures are not fetched"):
        read_picture("init_image", Path("https://example.org/cat.png"))
    with pytest.raises(InvalidValue, match="directory"):
        read_mask("mask", tmp_path)
    with pytest.raises(InvalidValue, match="broken"):
        read_picture("init_image", encoded(Image.fromarray(grain(64, 64)))[:2000])
