"""The examples draw what diffusers draws by itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.process import ServerProcess
from tools.checkpoints import make

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, SIZE, SEED = 2, 64, 5
LEVELS = 1
"""Of 255: both compute in float32, so that a number may be rounded to the next level."""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("diffusers_pipeline", EXAMPLES / "diffusers_pipeline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ServerProcess("--precision", "exact", "--device", "CPU") as process:
        yield f"127.0.0.1:{process.port}"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, np.ndarray]]:
    """Family → the folder of a tiny random pipeline, and what it draws in this process."""

    def made(family: str) -> tuple[Path, np.ndarray]:
        folder = tmp_path_factory.mktemp(family)
        pipe = make(family, folder / "files").pipeline()
        pipe.save_pretrained(folder / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(SEED)
        options = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "generator": generator}
        return folder / "pipeline", np.asarray(pipe("a lovely cat", **options).images[0])

    return made


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler, of torch
@pytest.mark.parametrize(
    ("family", "where"), [("sdxl", "RPC0"), ("flux1-dev", "transformer=RPC0,vae=RPC0")], ids=lambda value: value
)
def test_a_pipeline_draws_the_same_with_its_parts_elsewhere(
    example: ModuleType,
    server: str,
    pipeline: Callable[[str], tuple[Path, np.ndarray]],
    tmp_path: Path,
    family: str,
    where: str,
) -> None:
    folder, wanted = pipeline(family)
    options = f"--steps {STEPS} --seed {SEED} --height {SIZE} --width {SIZE} --dtype float32".split()
    out = tmp_path / "cat.png"
    example.main([str(folder), "a lovely cat", "--rpc", server, "--on", where, *options, "-o", str(out)])
    found = np.asarray(Image.open(out))
    assert found.shape == wanted.shape == (SIZE, SIZE, 3)
    assert wanted.std() > 5
    assert np.abs(found.astype(int) - wanted).max() <= LEVELS


def test_what_is_not_there_is_named(example: ModuleType, server: str, tmp_path: Path) -> None:
    for words, said in (("RPC7", "no device RPC7"), ("unet=RPC0", "no file named model_index.json")):
        with pytest.raises(SystemExit, match=said):
            example.main([str(tmp_path), "a cat", "--rpc", server, "--on", words])
    pipe = SimpleNamespace(components={"unet": torch.nn.Identity(), "scheduler": None})
    with pytest.raises(ValueError, match="has no vae, vae2; it has unet"):
        example.move(pipe, dict.fromkeys(("unet", "vae", "vae2")))
