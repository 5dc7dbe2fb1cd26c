"""Files in types that ggml does not have: as small on the way as they are, and unpacked for a server without them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import sdrpc
from sdrpc.cli.progress import Meter, StatusLine
from sdrpc.device import Device
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.session import Session
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.families.weight_types import weight_types
from sdrpc.runtime.cache import Cache
from sdrpc.server import Server, handler
from sdrpc.wire.hello import Capability
from tests.support.pictures import Case, Checkpoints, request
from tests.support.references.draw import psnr

CASE = Case("flux1-dev", "parts", "bnb-nf4")


@pytest.fixture(params=[True, False], ids=["ours", "another"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Behind a server that has our types, or one of before."""
    if not request.param:
        monkeypatch.setattr(handler, "CAPABILITIES", handler.CAPABILITIES & ~Capability.FORMATS)
    local = LocalDevice("CPU", torch.device("cpu"), EXACT)
    with Server([local]) as server:
        found = sdrpc.devices(rpc=[f"127.0.0.1:{server.port}"])
        yield found["RPC0"]
        for each in found.values():
            each.close()
    local.close()


def test_blocks_cross_the_wire_where_they_are_known(device: Device, checkpoints: Checkpoints, tmp_path: Path) -> None:
    ours = "NF4" in device.target.types
    events: list[Event] = []
    asked = replace(request(CASE), steps=1)
    with Session.open(checkpoints.files(CASE), device, Cache(tmp_path)) as session:
        (picture,) = session.generate(asked, events.append)
        stored = {name: component.found.nbytes() for name, component in session.model.components.items()}
    sent = {event.component: event.total for event in events if event.stage == "upload"}
    told = {event.component: event for event in events if event.stage == "unpacked"}
    assert "NF4" in {weight.type.name for weight in session.model["diffusion"].found.tensors.values()}
    if ours:
        assert not told
        assert sent["diffusion"] < 1.1 * stored["diffusion"]  # vectors become F32
    else:
        assert (told["diffusion"].reason, told["diffusion"].device) == ("NF4", device.name)
        assert told["diffusion"].done == stored["diffusion"]
        assert told["diffusion"].total <= sent["diffusion"] < 1.1 * told["diffusion"].total
        assert sent["diffusion"] > 2 * stored["diffusion"]
    wanted = np.load(_once(checkpoints, asked.steps, picture.image))
    assert psnr(picture.image / 255, wanted / 255) >= 45


def test_what_no_device_holds_is_said_with_what_it_costs(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """ConvRot in groups of 64, which the rows of a tiny model allow, is F16 for every device."""
    case = replace(CASE, type="comfy-convrot")
    events: list[Event] = []
    local = LocalDevice("CPU", torch.device("cpu"), EXACT)
    with Session.open(checkpoints.files(case), local, Cache(tmp_path)) as session:
        _ = list(session.generate(replace(request(case), steps=1), events.append))
        plain = session.model["diffusion"].found.made_plain()
    local.close()
    (told,) = [event for event in events if (event.stage, event.component) == ("unpacked", "diffusion")]
    assert (told.device, told.total) == ("", sum(weight.nbytes for weight, _ in plain))
    assert 1.7 < told.total / told.done < 2, "half the bits, and scales of rows"
    said: list[str] = []
    Meter(StatusLine(Console(file=io.StringIO())), said.append).tell(told)
    wanted = r"diffusion: no device holds I8 with ConvRot in groups of 64: .* of weights are sent and held as .*"
    assert re.fullmatch(wanted, said[0])


def _once(checkpoints: Checkpoints, steps: int, image: np.ndarray) -> Path:
    """The first picture: both devices have to draw the same one."""
    path = checkpoints.folder / f"{steps}.npy"
    if not path.exists():
        np.save(path, image)
    return path


def test_weights_are_quantized_while_they_are_sent(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """--type q8_0: half the bytes of F16 for matrices, and the picture of such weights."""
    case = replace(CASE, type="F16")
    files = checkpoints.files(case)
    sent, images = [], []
    local = LocalDevice("CPU", torch.device("cpu"), EXACT)
    for types in (weight_types(), weight_types("q8_0")):
        events: list[Event] = []
        with Session.open(replace(files, types=types), local, Cache(tmp_path)) as session:
            (picture,) = session.generate(replace(request(case), steps=1), events.append)
        sent.append(sum(event.total for event in events if event.stage == "upload" and event.over))
        images.append(picture.image / 255)
    local.close()
    assert sent[1] < 0.75 * sent[0]
    assert 25 <= psnr(*images) < 60
