"""Pictures made larger by a network on another machine: as spandrel does it in process, in tiles, through sd-cli."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdrpc.cli import report
from sdrpc.device import Device
from sdrpc.diffusion.pictures import Pixels
from sdrpc.diffusion.upscaling import Upscaler
from sdrpc.errors import CheckpointError, InvalidValue, UsageError
from tests.support.references.draw import psnr
from tests.support.second_pass import its_noise
from tests.support.upscaler import esrgan, in_process, save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries that spandrel has copies of


@pytest.fixture(scope="module")
def network() -> Any:
    return esrgan()


@pytest.fixture(scope="module", params=["safetensors", "pth"])
def file(request: pytest.FixtureRequest, network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("upscaler") / f"esrgan.{request.param}"
    save(network, path)
    return path


def scene(height: int, width: int) -> Pixels:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 3 % 256, columns * 2 % 256, (rows + columns) % 256], -1).astype(np.uint8)


def test_a_picture_is_as_spandrel_enlarges_it(file: Path, network: Any, device: Device) -> None:
    upscaler, image = Upscaler(file, device), scene(24, 40)
    assert (upscaler.scale, upscaler.title) == (2, "ESRGAN")
    once = upscaler(image, tile=64)
    assert once.shape == (48, 80, 3)
    assert psnr(once, in_process(network, image)) >= 45
    tiles: list[tuple[int, int]] = []
    in_tiles = upscaler(image, tile=16, on_tile=lambda done, total: tiles.append((done, total)))
    assert tiles[-1] == (6, 6)
    assert psnr(in_tiles, once) >= 25, "edges of tiles see less around them"
    assert upscaler(image, 2, 64).shape == (96, 160, 3)
    upscaler.close()


def test_what_is_no_upscaler_is_refused(device: Device, tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no upscaler that spandrel knows"):
        Upscaler(tmp_path / "a.safetensors", device)
    (tmp_path / "b.pth").write_bytes(b"no model")
    with pytest.raises(CheckpointError):
        Upscaler(tmp_path / "b.pth", device)


@pytest.mark.parametrize(
    ("repeats", "tile", "field"),
    [(0, 128, "upscale_repeats"), (9, 128, "upscale_repeats"), (8, 128, "upscale_repeats"),
     (1, 8, "upscale_tile_size"), (1, 5000, "upscale_tile_size")],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(
    network: Any, device: Device, tmp_path: Path, repeats: int, tile: int, field: str
) -> None:
    save(network, tmp_path / "a.safetensors")
    with pytest.raises(InvalidValue) as caught:
        Upscaler(tmp_path / "a.safetensors", device)(scene(100, 100), repeats, tile)
    assert caught.value.field == field


def test_without_spandrel_it_is_said_how_to_get_it(file: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spandrel", None)
    with pytest.raises(UsageError, match=r"pip install 'sdrpc\[upscale\]'"):
        Upscaler(file, device)


def test_sd_cli_enlarges_on_the_device_that_it_is_told(
    file: Path, network: Any, ports: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdrpc.cli.sd_cli import COMMAND, run

    image, path = tmp_path / "in.png", tmp_path / "new" / "out.png"
    Image.fromarray(scene(32, 32)).save(image)
    options = ["--rpc", f"127.0.0.1:{ports[0]}", "--backend", "upscaler=RPC0", "--upscale-model", str(file)]
    assert run(["-M", "upscale", "-i", str(image), *options, "-o", str(path)]) == 0
    assert psnr(np.asarray(Image.open(path)), in_process(network, scene(32, 32))) >= 45
    assert "ESRGAN on RPC0: 32×32 becomes 64×64" in capsys.readouterr().err
    assert report.guarded(lambda: run(["-M", "upscale", "-i", str(image)]), COMMAND.fields) == report.USAGE
    assert "--upscale-model" in capsys.readouterr().err
    drawn = tmp_path / "drawn.png"
    arguments = ["-p", "a red circle", "--steps", "1", "--cfg-scale", "1", "-t", "1", "-o", str(drawn)]
    assert run([*arguments, *options, "--backend", "upscaler=RPC0,all=CPU"]) == 0
    with Image.open(drawn) as larger:
        assert larger.size == (256, 256)
        assert "Size: 128x128" in larger.info["parameters"], "what was drawn"


def test_a_second_pass_begins_with_what_a_network_enlarged(
    network: Any, ports: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by hand: the small picture, enlarged by the network in process, and drawn on from there."""
    from sdrpc.cli.sd_cli import COMMAND, run

    save(network, tmp_path / "tiny-esrgan.safetensors")
    small, larger, begin, by_hand = (str(tmp_path / f"{name}.png") for name in ("small", "larger", "begin", "by-hand"))
    usual = ["-p", "a red circle", "--cfg-scale", "1", "--sampling-method", "euler", "--precision", "exact", "-t", "1"]
    drawn = [*usual, "-W", "64", "-H", "64", "--steps", "2"]
    hires = [*drawn, "--hires", "--hires-upscalers-dir", str(tmp_path), "--hires-width", "128"]
    hires += ["--rpc", f"127.0.0.1:{ports[0]}", "--backend", "upscaler=RPC0,all=CPU", "-o", larger, "--hires-upscaler"]
    assert run([*drawn, "--backend", "CPU", "-o", small]) == 0
    enlarged = Image.fromarray(in_process(network, np.asarray(Image.open(small))))
    enlarged.save(begin)
    for second, same in (
        (["--hires-denoising-strength", "0.6", "--hires-steps", "3"], ["--strength", "0.6", "--steps", "3"]),
        (["--hires-sigmas", "1.6,0.4,0"], ["--strength", "1", "--sigmas", "1.6,0.4,0"]),
    ):
        assert run([*hires, "tiny-esrgan", *second]) == 0
        with its_noise(4 * 16 * 16):
            assert run([*usual, "--backend", "CPU", "-i", begin, *same, "-o", by_hand]) == 0
        with Image.open(larger) as picture, Image.open(by_hand) as wanted:
            assert picture.size == (128, 128)
            assert "Hires upscaler: tiny-esrgan, Hires resize: 128x128" in picture.info["parameters"]
            assert str(tmp_path) not in picture.info["parameters"]
            assert psnr(np.asarray(picture), np.asarray(wanted)) >= 45, second
    assert "tiny-esrgan on RPC0 enlarges what the second pass begins with" in capsys.readouterr().err
    for name in ("../tiny-esrgan", "none"):
        arguments = [*hires, name]
        assert report.guarded(lambda given=arguments: run(given), COMMAND.fields) == report.USAGE
        said = capsys.readouterr().err
        assert f"--hires-upscaler {name}: there is no such upscaler; there are Latent" in said
        assert "Nearest, tiny-esrgan" in said
