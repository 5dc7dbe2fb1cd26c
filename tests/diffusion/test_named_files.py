"""A name means one file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdrpc.diffusion.loras import names
from sdrpc.diffusion.named_files import by_name, files_in
from sdrpc.diffusion.upscaling import Upscalers
from sdrpc.errors import InvalidValue


def test_no_file_stands_for_another_of_the_same_stem() -> None:
    paths = [Path("a/x.pth"), Path("a/x.safetensors"), Path("a/y.pth")]
    assert by_name(paths) == {"x.pth": paths[0], "x.safetensors": paths[1], "y": paths[2]}


def test_a_stem_of_two_networks_is_refused_with_both_names(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors", "y.pth"):
        (tmp_path / name).touch()
    known = Upscalers(tmp_path)
    assert known.find("y", (), "upscaler") == known.find("y.pth", (), "upscaler") == tmp_path / "y.pth"
    assert known.find("x.pth", (), "upscaler") == tmp_path / "x.pth"
    with pytest.raises(InvalidValue, match=r"there are x\.pth, x\.safetensors, y"):
        known.find("x", (), "upscaler")


def test_a_folder_is_no_file_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("b.SAFETENSORS", "a.pth", "notes.txt"):
        (tmp_path / name).touch()
    assert files_in(tmp_path, (".safetensors", ".pth")) == [tmp_path / "a.pth", tmp_path / "b.SAFETENSORS"]
    assert names(tmp_path).keys() == Upscalers(tmp_path).names().keys() == {"a", "b"}
