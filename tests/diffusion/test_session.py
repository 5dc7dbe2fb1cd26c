"""From a request to pixels: what is asked of the model, what a session tells, and that components on devices equal
torch in process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sdrpc.device import Memory
from sdrpc.diffusion.device_model import DeviceModel
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.pictures import finite, to_pixels
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import Cancelled, CheckpointError, ComputeError, DoesNotFit, InvalidValue, UsageError
from sdrpc.families.model import Model, ModelFiles, open_model
from sdrpc.runtime.cache import Cache
from sdrpc.runtime.chain import Chain, Lanes

F32 = NDArray[np.float32]

SAME_PICTURE = 50.0
"""dB PSNR between the same pictures in float32."""

SMALL = Request("a cat", width=64, height=128, steps=3, sampling_method="euler", scheduler="karras")


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return open_model(ModelFiles(tiny))


@pytest.fixture(scope="module")
def devices(model: Model) -> Iterator[dict[str, LocalDevice]]:
    """A device for each component."""
    made = {name: LocalDevice(name, torch.device("cpu"), EXACT) for name in model.components}
    yield made
    for device in made.values():
        device.close()


@pytest.fixture
def session(model: Model, devices: dict[str, LocalDevice], cache: Cache) -> Iterator[Session]:
    with Session(model, devices, cache) as made:
        yield made


def drawn(session: Session, request: Request) -> list[NDArray[np.uint8]]:
    return [picture.image for picture in session.generate(request)]


class Recorded:
    """Components that compute next to nothing and remember what they were asked."""

    def __init__(self, patch: pytest.MonkeyPatch, broken: str = "") -> None:
        self.broken = broken
        self.encoded = 0
        self.predictions: list[tuple[F32, F32, F32]] = []
        self.decoded: list[F32] = []
        patch.setattr(DeviceModel, "run", lambda _, name, options, inputs, lane=0: (self.run(name, **inputs),))

    def run(self, name: str, **inputs: F32) -> F32:
        value = getattr(self, name)(**inputs)
        return value * np.float32("nan") if name == self.broken else value

    def clip_l(self, ids: NDArray[np.int32]) -> F32:
        self.encoded += 1
        return np.repeat(ids[..., None], 8, -1).astype(np.float32)

    def diffusion(self, latents: F32, timestep: F32, context: F32) -> F32:
        self.predictions.append((latents, timestep, context))
        return latents * np.float32(0.1) + context.mean(axis=(1, 2))[:, None, None, None] / 5e4

    def vae(self, latents: F32) -> F32:
        self.decoded.append(latents)
        return np.repeat(np.repeat(latents[:, :3], 8, 2), 8, 3)


# What the model is asked ----------------------------------------------------------------------------------------------


def test_guidance_is_one_batch_of_two(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Recorded(monkeypatch)
    (image,) = drawn(session, SMALL)
    assert image.shape == (128, 64, 3)
    assert image.dtype == np.uint8
    assert len(asked.predictions) == 3
    latents, timestep, context = asked.predictions[0]
    assert latents.shape == (1, 4, 16, 8)
    assert timestep.shape == (1,)
    assert context.shape == (2, 77, 8)
    assert {array.dtype for array in (latents, timestep, context)} == {np.dtype(np.float32)}
    assert not np.array_equal(context[0], context[1]), "the negative prompt is first"


def test_no_guidance_asks_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Recorded(monkeypatch)
    drawn(session, replace(SMALL, cfg_scale=1.0))
    assert [context.shape[0] for _, _, context in asked.predictions] == [1, 1, 1]


def test_a_text_is_encoded_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next picture of it, with another seed, needs no text encoder."""
    asked = Recorded(monkeypatch)
    (first,) = drawn(session, SMALL)
    texts = asked.encoded
    assert texts == 2, "the prompt and the negative one"
    (second,) = drawn(session, replace(SMALL, seed=SMALL.seed + 1))
    assert asked.encoded == texts
    (third,) = drawn(session, replace(SMALL, prompt="another text"))
    assert asked.encoded == texts + 1
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_texts_of_different_lengths_are_asked_apart(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Recorded(monkeypatch)
    drawn(session, replace(SMALL, prompt="cat " * 100))
    assert [context.shape for _, _, context in asked.predictions] == [(1, 77, 8), (1, 154, 8)] * 3
    asked.predictions.clear()
    drawn(session, replace(SMALL, prompt="cat " * 100, negative_prompt=" , " * 100))
    assert [context.shape for _, _, context in asked.predictions] == [(2, 154, 8)] * 3


def test_guidance_moves_away_from_the_negative_prompt(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Recorded(monkeypatch)
    drawn(session, replace(SMALL, cfg_scale=3.0))
    latents, _, context = asked.predictions[0]
    negative, positive = (latents[0] * np.float32(0.1) + context[i].mean() / 5e4 for i in (0, 1))
    following = asked.predictions[1][0]
    plain = Recorded(monkeypatch)
    guided = (negative + 3 * (positive - negative))[None].astype(np.float32)
    monkeypatch.setattr(
        plain, "diffusion", lambda latents, timestep, context: (plain.predictions.append((latents,) * 3), guided)[1]
    )
    drawn(session, replace(SMALL, cfg_scale=1.0))
    np.testing.assert_allclose(plain.predictions[1][0][0], following[0], rtol=1e-5, atol=1e-6)


def test_latents_are_scaled_and_shifted_for_the_vae(
    model: Model, devices: dict[str, LocalDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Recorded(monkeypatch)
    for scale, shift in ((1.0, 0.0), (0.5, 0.25)):
        drawn(Session(replace(model, scale=scale, shift=shift), devices), SMALL)
    np.testing.assert_allclose(asked.decoded[1], asked.decoded[0] * 2 + 0.25, rtol=1e-6)


def test_a_batch_counts_seeds_up(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorded(monkeypatch)
    three = list(session.generate(replace(SMALL, batch_count=3)))
    assert [picture.seed for picture in three] == [42, 43, 44]
    np.testing.assert_array_equal(three[2].image, drawn(session, replace(SMALL, seed=44))[0])
    assert not np.array_equal(three[0].image, three[1].image)


@pytest.mark.parametrize(
    ("component", "words"), [("clip_l", "clip_l's output"), ("diffusion", "timestep"), ("vae", "VAE")]
)
def test_what_is_not_a_number_is_named(
    component: str, words: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorded(monkeypatch, broken=component)
    with pytest.raises(ComputeError, match=f"{words}.*NaN"):
        drawn(session, SMALL)


def test_infinity_is_no_number_either() -> None:
    with pytest.raises(ComputeError, match="1 of 2"):
        finite(np.array([1, np.inf], np.float32), "it")


def test_pixels_are_rounded_half_up_and_clamped() -> None:
    values = np.array([-2, -1, 0, 1, 3, 2 * (0.5 / 255) - 1, 2 * (0.49 / 255) - 1], np.float32)
    pixels = to_pixels(np.broadcast_to(values, (3, 1, 7)))
    assert pixels.shape == (1, 7, 3)
    assert pixels[0, :, 0].tolist() == [0, 0, 128, 255, 255, 1, 0]


# Requests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "given"), [(1, 64), (64, 64), (65, 128), (500, 512), (512, 512)])
def test_sizes_are_rounded_up(asked: int, given: int, session: Session) -> None:
    assert session.settings(Request("", width=asked, height=64)).width == given


def test_a_request_gets_what_belongs_to_its_model_and_sampler(session: Session) -> None:
    plain = session.settings(Request(""))
    assert (plain.width, plain.height, plain.steps, plain.cfg_scale) == (512, 512, 20, 7.0)
    assert (plain.sampling_method, plain.scheduler, plain.eta, plain.prediction) == ("euler_a", "discrete", 1.0, "eps")
    assert session.settings(Request("", sampling_method="lcm")).scheduler == "lcm"
    seeds = {session.settings(Request("", seed=-1)).seed for _ in range(4)}
    assert min(seeds) >= 0
    assert len(seeds) > 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 0), ("height", 1 << 20), ("steps", 0), ("batch_count", 0), ("sampling_method", "x"), ("scheduler", "x"),
     ("rng", "x"), ("cfg_scale", float("nan")), ("eta", float("inf")), ("prediction", "x"), ("guidance", float("nan")),
     ("flow_shift", 1.0), ("clip_skip", 99), ("slg_scale", 2.0), ("img_cfg_scale", 2.0)],
)  # fmt: skip
def test_requests_that_make_no_sense_name_the_field(field: str, value: Any, session: Session) -> None:
    with pytest.raises(InvalidValue) as caught:
        drawn(session, Request("", **{"width": 64, "height": 64, "steps": 1, field: value}))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} ")


def test_models_of_flows_have_no_timestep_shift(session: Session) -> None:
    with pytest.raises(InvalidValue, match="timestep_shift 250: models that predict sd3_flow have none"):
        drawn(session, replace(SMALL, timestep_shift=250, prediction="sd3_flow"))


# On devices -----------------------------------------------------------------------------------------------------------


def in_process(model: Model, name: str, options: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[F32, ...]:
    """A component as a torch module in float32."""
    module, call = model[name].module(**options).build()
    wanted = {key: tuple(p.shape) for key, p in module.named_parameters() if "text_projection" not in key}
    state = {
        key: torch.frombuffer(bytearray(weight.data()), dtype=torch.float16).float().reshape(weight.shape)
        for key, weight in model[name].found.take(wanted).items()
    }
    module.load_state_dict(state, strict=False)
    with torch.no_grad():
        outputs = call(module.eval(), **{key: torch.from_numpy(np.asarray(value)) for key, value in inputs.items()})
    return tuple(output.numpy() for output in outputs)


def test_a_picture_from_three_devices_is_torchs(
    model: Model, devices: dict[str, LocalDevice], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(SMALL, height=64, negative_prompt="a dog", clip_skip=2)
    events: list[Event] = []
    with Session(model, devices, cache) as session:
        (picture,) = session.generate(request, events.append)
        assert session.unused() == {}
        assert all(device._buffers for device in devices.values())
    assert not any(device._buffers for device in devices.values()), "all is given back"
    uploads = {event.component: event for event in events if event.stage == "upload"}
    assert list(uploads) == ["clip_l", "diffusion", "vae"]
    assert all(event.over and event.total > 0 for event in uploads.values())
    assert [(e.done, e.total, e.picture, e.pictures) for e in events if e.stage == "sample"] == [
        (done, 3, 1, 1) for done in range(4)
    ]
    assert [e.stage for e in events if e.over and e.stage in ("encode", "sample", "decode")] == [
        "encode", "sample", "decode",
    ]  # fmt: skip
    monkeypatch.setattr(DeviceModel, "run", lambda self, *call, lane=0: in_process(model, *call))
    with Session(model, devices, cache) as session:
        assert psnr(picture.image, drawn(session, request)[0]) >= SAME_PICTURE
    assert picture.image.std() > 10, "something is to be seen"


def test_the_second_run_captures_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(SMALL, height=64, steps=1, clip_skip=2)
    first = drawn(session, request)
    session.close()
    monkeypatch.setattr("sdrpc.diffusion.device_component.captured", lambda *_: pytest.fail("captured again"))
    np.testing.assert_array_equal(drawn(session, request)[0], first[0])


def test_a_second_picture_uploads_nothing(session: Session) -> None:
    request = replace(SMALL, height=64, steps=1)
    stages: list[list[str]] = []
    for _ in range(2):
        events: list[Event] = []
        list(session.generate(request, events.append))
        stages.append([event.stage for event in events])
    assert "upload" in stages[0]
    assert "upload" not in stages[1]


def test_cancelling_ends_within_a_step_and_leaves_the_weights(
    session: Session, devices: dict[str, LocalDevice]
) -> None:
    request = replace(SMALL, height=64, steps=50)
    events: list[Event] = []
    steps = [event for event in events if event.stage == "sample"]
    with pytest.raises(Cancelled):
        list(session.generate(request, events.append, lambda: bool(events) and events[-1].done == 2))
    steps = [event for event in events if event.stage == "sample"]
    assert steps[-1].done == 2
    held = {name: device._promised for name, device in devices.items()}
    assert held["clip_l"]
    assert held["diffusion"]
    again: list[Event] = []
    list(session.generate(replace(request, steps=1), again.append))
    assert not [event for event in again if event.stage == "upload" and event.component != "vae"]


def test_cancelling_an_upload_leaves_nothing_half_done(session: Session, devices: dict[str, LocalDevice]) -> None:
    request = replace(SMALL, height=64, steps=1)
    events: list[Event] = []

    def in_the_upload() -> bool:
        return bool(events) and events[-1].stage == "upload" and events[-1].component == "diffusion"

    with pytest.raises(Cancelled):
        list(session.generate(request, events.append, in_the_upload))
    assert not devices["diffusion"]._buffers
    assert len(drawn(session, request)) == 1


def test_what_does_not_fit_is_refused_before_anything_is_uploaded(
    session: Session, devices: dict[str, LocalDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = devices["diffusion"].memory()
    monkeypatch.setattr(devices["diffusion"], "memory", lambda: memory._replace(free=1 << 20))
    with pytest.raises(DoesNotFit, match=r"diffusion: diffusion takes \d+ MiB, and there is room for 1 MiB;"):
        drawn(session, SMALL)
    assert not any(device._buffers for device in devices.values())


def test_all_components_that_do_not_fit_are_named(model: Model, devices: dict[str, LocalDevice], cache: Cache) -> None:
    each = r"clip_l takes \d+ MiB, diffusion takes \d+ MiB, vae takes \d+ MiB"
    with (
        Session(model, {"all": devices["diffusion"]}, cache, max_vram={"": 1 << 20}) as session,
        pytest.raises(DoesNotFit, match=rf"^diffusion: {each}, and there is room for 1 MiB \(max_vram\); "),
    ):
        drawn(session, SMALL)
    assert not any(device._buffers for device in devices.values())


@pytest.mark.parametrize(
    ("where", "asked", "idle"),
    [
        ("all", {}, []),
        ("all", {"cfg_scale": 1.0}, ["vae"]),
        ("all", {"cfg_scale": 1.0, "batch_count": 2}, []),
        ("all", {"hires": True, "batch_count": 2, "cfg_scale": 1.0}, ["vae"]),
        ("diffusion", {"cfg_scale": 1.0}, ["vae"]),
        ("te", {}, ["vae"]),
        ("vae", {}, ["vae"]),
        ("vae", {"batch_count": 3}, ["vae"]),
    ],
)
def test_a_device_that_has_nothing_to_do_is_told(
    model: Model, devices: dict[str, LocalDevice], where: str, asked: dict[str, Any], idle: list[str]
) -> None:
    """Side by side are pictures, and a picture's prompts: the second of two devices may have neither."""
    first, second = devices["diffusion"], devices["vae"]
    with Session(model, {"all": first, where: Lanes((Chain((first,)), Chain((second,))))}) as session:
        assert session.idle(session.settings(replace(SMALL, **asked))) == idle


class SmallDevice(LocalDevice):
    """A device with room for the weights of one of the two large components and the small one, and for work."""

    room, work = 12 << 20, 256 << 20

    def memory(self) -> Memory:
        return Memory(max(0, self.room - self._promised) + self.work, self.room + self.work)


def test_weights_leave_when_another_component_needs_the_room(
    model: Model, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdrpc.diffusion.device_model.WORKING_ROOM", SmallDevice.work)
    monkeypatch.setattr("sdrpc.diffusion.rooms.WORKING_ROOM", SmallDevice.work)
    device = SmallDevice("small", torch.device("cpu"), EXACT)
    sizes = {name: component.found.nbytes() for name, component in model.components.items()}
    assert sizes["clip_l"] + sizes["diffusion"] > SmallDevice.room > sizes["diffusion"] + sizes["vae"] + (1 << 20)
    request = replace(SMALL, height=64, steps=1)
    with Session(model, {"all": device}, cache) as session:
        for text in ("a lovely cat", "a lovely dog"):
            events: list[Event] = []
            list(session.generate(replace(request, prompt=text), events.append))
            moved = [(e.stage, e.component) for e in events if e.stage in ("upload", "release") and e.over]
            begun = list(dict.fromkeys(moved))
            if ("release", "diffusion") in begun:  # the second picture: the text encoder comes back
                assert begun.index(("release", "diffusion")) < begun.index(("upload", "clip_l"))
            assert begun.index(("release", "clip_l")) < begun.index(("upload", "diffusion"))
    device.close()


def test_a_tensor_that_is_missing_is_named(
    tiny_weights: dict[str, Any], devices: dict[str, LocalDevice], cache: Cache, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    path = tmp_path / "a.safetensors"
    save_file({key: weight for key, weight in tiny_weights.items() if key != name}, path)
    with (
        Session.open(path, devices, cache) as session,
        pytest.raises(CheckpointError, match=r"final_layer_norm\.bias.*missing"),
    ):
        drawn(session, replace(SMALL, height=64, steps=1))


def test_every_component_needs_a_device(model: Model, devices: dict[str, LocalDevice]) -> None:
    with pytest.raises(UsageError, match="vae"):
        Session(model, {"te": devices["clip_l"], "diffusion": devices["diffusion"]})
    with pytest.raises(UsageError, match="t5xxl"):
        Session(model, {"t5xxl": devices["clip_l"], "all": devices["diffusion"]})
