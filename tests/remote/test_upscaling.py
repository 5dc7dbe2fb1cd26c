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
from sdrpc.diffusion import upscaling
from sdrpc.diffusion.pictures import Pixels
from sdrpc.diffusion.upscaling import Upscaler
from sdrpc.errors import CheckpointError, InvalidValue, UsageError
from tests.support.references.draw import psnr

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries that spandrel has copies of


def esrgan(scale: int = 2) -> Any:
    """A small network of ESRGAN's kind, which enlarges what it sees and adds something."""
    upscaling._spandrel()
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(1)
    return ESRGAN(num_filters=8, num_blocks=1, scale=scale).eval()


@pytest.fixture(scope="module")
def network() -> Any:
    return esrgan()


@pytest.fixture(scope="module", params=["safetensors", "pth"])
def file(request: pytest.FixtureRequest, network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("upscaler") / f"esrgan.{request.param}"
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if request.param == "pth":
        torch.save({"params_ema": state}, path)
    else:
        save_file(state, path)
    return path


def scene(height: int, width: int) -> Pixels:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 3 % 256, columns * 2 % 256, (rows + columns) % 256], -1).astype(np.uint8)


def in_process(network: Any, image: Pixels) -> Pixels:
    with torch.no_grad():
        larger = network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255)[0]
    return (larger.clamp(0, 1) * 255 + 0.5).byte().permute(1, 2, 0).numpy()


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
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "a.safetensors")
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
