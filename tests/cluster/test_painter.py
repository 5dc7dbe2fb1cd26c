"""An actor's half of a seat, in this process."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdrpc
from sdrpc import models
from sdrpc.cluster.painter import Failure, Film, Frame, Painter, Told, Work, failure, raised
from sdrpc.device import Device
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.pictures import Picture
from sdrpc.diffusion.session import Session
from sdrpc.errors import (
    Cancelled,
    ConnectionFailed,
    ConnectionLost,
    DeviceLost,
    DoesNotFit,
    InvalidValue,
    Room,
    SdrpcError,
    UsageError,
)
from sdrpc.families.model import ModelFiles
from tools.checkpoints import make

REQUEST = sdrpc.Request("a red circle", width=64, height=64, steps=2, seed=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return ModelFiles(make("sd1", tmp_path_factory.mktemp("models")).files["model"])


@pytest.fixture(scope="module")
def cpu() -> Iterator[Device]:
    device = sdrpc.devices(precision="exact", threads=1)["CPU"]
    yield device
    device.close()


def painter(device: Device, trouble: list[SdrpcError] | None = None) -> Painter:
    @contextmanager
    def connect() -> Iterator[Sequence[Device]]:
        if trouble:
            raise trouble.pop()
        yield [device]

    return Painter(connect, lambda model, devices: dict.fromkeys(model.components, devices))


def told_of(painter: Painter, number: int, work: Work, settings: Any, films: bool = False) -> list[Told]:
    """All that it tells, as it arrives in another process."""
    batches = [pickle.loads(pickle.dumps(batch)) for batch in painter.draw(number, work, settings, films)]
    return [told for batch in batches for told in batch]


def test_a_model_that_ships_is_meant_by_name() -> None:
    """Wherever the package is on the other machine."""
    shipped = ModelFiles(models.named("demo"))
    assert Work.of(shipped, {}).paths == {"model": "demo"}
    assert Work.of(shipped, {}).files() == shipped


def test_it_draws_what_a_session_draws_and_tells_how_far_it_is(cpu: Device, files: ModelFiles) -> None:
    work = Work.of(files, {})
    with Session.open(files, cpu) as session:
        settings = session.settings(REQUEST)
        (wanted,) = session.draw(settings)
    far = painter(cpu)
    assert [device.name for device in far.about().devices] == ["CPU"]
    told = told_of(far, 0, work, settings)
    (picture,) = (value for value in told if isinstance(value, Picture))
    np.testing.assert_array_equal(picture.image, wanted.image)
    assert [event.done for event in told if isinstance(event, Event) and event.stage == "sample"][-1] == 2
    far.stop(1)
    assert told_of(far, 1, work, settings)[-1] == Failure("cancelled", "cancelled")
    assert isinstance(told_of(far, 2, work, settings)[-1], Picture)
    far.put_aside()


def test_a_film_comes_frame_by_frame(cpu: Device, tmp_path: Path) -> None:
    parts = make("wan", tmp_path, form="parts").files
    files = ModelFiles(diffusion_model=parts["diffusion"], vae=parts["vae"], t5xxl=parts["t5xxl"])
    request = sdrpc.Request("a cat", width=32, height=32, steps=1, seed=1, video_frames=5)
    with Session.open(files, cpu) as session:
        settings = session.settings(request, video=True)
        (film,) = session.draw_video(settings)
        wanted = list(film.frames)
    far = painter(cpu)
    told = told_of(far, 0, Work.of(files, {}), settings, films=True)
    far.put_aside()
    begun = [value for value in told if isinstance(value, Film | Frame)]
    assert begun[0] == Film(5, film.fps, 32, 32, 1, None)
    np.testing.assert_array_equal([frame.image for frame in begun[1:] if isinstance(frame, Frame)], wanted)


def test_a_server_that_is_not_there_is_asked_again(cpu: Device) -> None:
    lost = ConnectionFailed("desktop:50052", "connection refused")
    far = painter(cpu, [lost])
    assert far.about().failure == Failure("lost", "desktop:50052: connection refused")
    assert far.about().failure is None


def test_a_model_that_is_not_on_the_node_is_a_failure_that_says_so(
    cpu: Device, files: ModelFiles, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(files.named["model"].read_bytes())
    work = Work.of(ModelFiles(path), {})
    with Session.open(files, cpu) as session:
        settings = session.settings(REQUEST)
    path.write_bytes(b"something else")
    far = painter(cpu)
    (other,) = told_of(far, 0, work, settings)
    path.unlink()
    (nothing,) = told_of(far, 1, work, settings)
    assert other == Failure("usage", f"{path} is another file on this node than on sd-server's machine")
    assert isinstance(nothing, Failure)
    assert nothing.words.startswith(f"{path} is not on this node")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Cancelled(), Cancelled),
        (ConnectionLost("desktop:50052", "drawing"), DeviceLost),
        (ConnectionFailed("desktop:50052", "refused"), DeviceLost),
        (InvalidValue("steps", 0, "at least 1"), UsageError),
        (DoesNotFit({"vae": 1 << 30}, {"RPC0": [Room(1 << 20)]}), SdrpcError),
    ],
)
def test_errors_arrive_as_what_a_seat_tells_apart(error: SdrpcError, kind: type[SdrpcError]) -> None:
    """Not as themselves: some can't be made from their message."""
    arrived = raised(pickle.loads(pickle.dumps(failure(error))))
    assert type(arrived) is kind
    assert str(arrived) == str(error)
    assert arrived.told(str.upper) == error.told(str.upper)  # the fields that it names are known
