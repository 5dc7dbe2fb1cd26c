"""What is in the packages that people install."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from trove_classifiers import classifiers

from sdrpc import models

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "sdrpc"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def packages(built: Path) -> Mapping[str, set[str]]:
    """The names of the files in the wheel and in the sdist (there below its one folder)."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist, zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        return {
            "sdist": {name.partition("/")[2] for name in sdist.getnames()},
            "wheel": {name for name in wheel.namelist() if ".dist-info/" not in name},
        }


def test_the_wheel_is_the_package_with_its_data(packages: Mapping[str, set[str]]) -> None:
    expected = {
        str(Path("sdrpc") / path.relative_to(SOURCE))
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packages["wheel"] == expected
    assert {f"sdrpc/models/{path.name}" for path in (*models.SHIPPED.values(), *models.LORAS.values())} <= expected


def test_the_sdist_builds_the_same_wheel_and_has_nothing_else(packages: Mapping[str, set[str]]) -> None:
    others = {name for name in packages["sdist"] if not name.startswith("src/")}
    assert {name.removeprefix("src/") for name in packages["sdist"] - others} == packages["wheel"]
    assert others == {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", ".gitignore"}


def test_its_page_in_an_index_links_to_what_is_there(built: Path) -> None:
    """The README, without pictures and links to files of the repository; every extra is in the metadata."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    page = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "rpc-server -H 0.0.0.0" in page
    assert [target for target in re.findall(r"\]\(([^)]+)\)", page) if not target.startswith("https://")] == []
    assert {"ray", "server", "docs"} <= {*metadata.get_all("Provides-Extra", [])}
    assert {*metadata.get_all("Classifier", [])} <= classifiers
