"""sd-cli: a picture from a checkpoint, each part of the model on the device that the user named."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..diffusion import placement
from ..diffusion.placement import UPSCALER
from ..errors import InvalidValue, SdrpcError, UsageError
from ..runtime.chain import devices_of
from . import discovery, fitting, metadata, report, streams
from .chosen import by_option, files_of, folder_of, keychain, servers, threads, timeouts, waiting
from .command import Chosen, Command
from .convert import convert
from .devices import limits_of, listed, placed_devices
from .entry import ready
from .options import ACTS_ON, ALWAYS_SO, OPTIONS, REFUSED, UNREAD, WITHIN
from .output import (
    DEFAULT_ANIMATION,
    DEFAULT_FILM,
    DEFAULT_OUTPUT,
    DEFAULT_SUFFIX,
    FILM_SIDES,
    MAX_SIDES,
    STANDARD,
    check_sides,
    check_writable,
    frames_singly,
    is_terminal,
    keep_elsewhere,
    output_paths,
    replace_file,
    save,
    save_as_made,
)
from .progress import mebibytes
from .prompt_file import read_prompt
from .upscale import enlarging, on_one_device, upscaled

if TYPE_CHECKING:
    from ..diffusion.events import Event, OnEvent
    from ..diffusion.metadata import Parameters
    from ..diffusion.pictures import Picture, Sound, Video
    from ..diffusion.request import Request, Settings
    from ..families.model import Model
    from ..runtime.chain import Lanes
    from .upscale import Enlarge

log = logging.getLogger(__name__)


def main() -> None:
    """The console script; exit status 0 for pictures, 2 for an option that can't be honoured, else 1."""
    ready()
    sys.exit(report.guarded(lambda: run(sys.argv[1:]), COMMAND.fields))


def run(arguments: list[str]) -> int:
    """The command with ``arguments``, in whatever spelling its options are; its exit status."""
    return COMMAND.run(arguments)


def sd_cli(**chosen: Any) -> int:
    """Draw a picture with Stable Diffusion on the devices of this machine and of rpc-servers."""
    report.logging_to_console(chosen["verbose"])
    if chosen["version"]:
        print(f"sd-cli {__version__}")
        return 0
    if chosen["completion"]:
        print(COMMAND.completion(chosen["completion"]))
        return 0
    log.debug("sdrpc %s, Python %s, %s", __version__, platform.python_version(), platform.platform())
    if chosen["discover"]:
        return discovery.show()
    if chosen["list_devices"]:
        return _list_devices(chosen)
    if chosen["mode"] == "metadata":
        return metadata.show(chosen)
    if chosen["mode"] == "upscale":
        return _upscale(chosen)
    if chosen["mode"] == "convert":
        convert(files_of(chosen), chosen["output"], chosen["verbose"])
        return 0
    return _draw(chosen)


COMMAND = Command("sd-cli", OPTIONS, sd_cli, REFUSED, ALWAYS_SO, WITHIN, ACTS_ON, UNREAD, help=sd_cli.__doc__)


def _list_devices(chosen: Chosen) -> int:
    """Devices that answer on standard output, servers that don't on standard error; then the exit status is 1."""
    devices, failures = listed(servers(chosen), keychain(chosen))
    report.table(report.device_table(devices))
    for failure in failures:
        report.complain(failure)
    return report.FAILURE if failures else 0


def _upscale(chosen: Chosen) -> int:
    """Enlarge a picture; the exit status."""
    from ..diffusion.pictures import Picture

    (path,) = output_paths(chosen["output"], 1, chosen["output_begin_idx"])
    check_writable([path])
    image = upscaled(chosen, path)
    return report.FAILURE if _keep(path, Picture(image, 0), None) else 0


def _draw(chosen: Chosen) -> int:
    """Draw what was asked for; its exit status."""
    film = chosen["mode"] == "vid_gen"
    output = _film_output(chosen["output"]) if film else chosen["output"]
    singly = film and frames_singly(output)
    first, suffixes = chosen["output_begin_idx"], FILM_SIDES if film and not singly else MAX_SIDES
    paths = output_paths(output, chosen["batch_count"], first, suffixes)
    if is_terminal(output):
        raise InvalidValue("output", output, "a picture is not for a terminal: send it to a file or a program")
    named, waits = placement.parse(chosen["backend"]), waiting(chosen)

    from ..diffusion.drawable import settings_of
    from ..diffusion.idle import idle_fields
    from ..diffusion.metadata import parameters_of
    from ..diffusion.session import Session
    from ..diffusion.stage_timer import STAGES, StageTimer
    from ..families.model import open_model

    request = _request(chosen)
    files = files_of(chosen)
    timer = StageTimer()
    with timer("load"):
        opened = open_model(files)
    between = isinstance(request.hires_upscaler, Path)
    enlarged = [UPSCALER] if between or chosen["upscale_model"] is not None else []
    if film and chosen["upscale_model"] is not None:
        raise InvalidValue("upscale_model", chosen["upscale_model"], "pictures are enlarged, no films")
    wanted = placement.wanted([*opened.components, *enlarged], named, chosen["main_backend_device"], by_option(chosen))
    if enlarged:
        wanted[UPSCALER] = on_one_device(wanted[UPSCALER], named, by_option(chosen))
    fits = chosen["auto_fit"] or fitting.is_asked_for([*named.values(), [chosen["main_backend_device"]]])
    settings = settings_of(opened, request, film)
    if singly:
        paths = output_paths(output, settings.batch_count * settings.video_frames, first)
    _note_size(request, settings, film)
    for field, beside in idle_fields(opened, request, settings):
        report.warn(f"{COMMAND.fields[field]} has no effect with {beside}")
    check_sides(paths[0], *settings.final_size)
    preview_path = None if settings.previews is None else _preview_path(chosen["preview_path"])
    check_writable(paths)

    def told(drawn: Picture | Video) -> Parameters | None:
        if chosen["disable_image_metadata"]:
            return None
        return parameters_of(settings, drawn, files, chosen["eta"], chosen["sampler_rng"])

    with placed_devices(
        wanted, servers(chosen), chosen["precision"], threads(chosen), timeouts(chosen), keychain(chosen), fits,
        settings.batch_count > 1,
    ) as (places, devices):  # fmt: skip
        limits = limits_of(chosen["max_vram"], devices)
        if fits:
            fixed = [name for name, names in wanted.items() if not fitting.is_asked_for([names])]
            places = fitting.fitted(opened, settings, places, fixed, devices, limits, waits)
        enlarge, enlarges_on = None, places.pop(UPSCALER)[0] if enlarged else None
        if enlarges_on is not None and chosen["upscale_model"] is not None:
            enlarge = enlarging(chosen, enlarges_on, *settings.final_size, paths[0])
        _note_placement(opened, places, settings)
        if settings.hires is not None and between and enlarges_on is not None:
            report.say(f"{settings.hires.upscaler} on {enlarges_on.name} enlarges what the second pass begins with")
        with Session(
            opened,
            places,
            timer=timer,
            retry=chosen["rpc_retry"],
            lora_dir=chosen["lora_model_dir"],
            lora_apply_mode=chosen["lora_apply_mode"],
            embd_dir=chosen["embd_dir"],
            max_vram=limits,
            params_backend=waits,
            upscaler=None if enlarges_on is None else devices_of([enlarges_on])[0],
        ) as session:
            if idle := session.idle(settings):
                what = "pictures (-b) and, of one picture, the prompt and the negative one (--cfg-scale other than 1)"
                report.warn(f"{' and '.join(idle)}: nothing to do; side by side are {what}")
            # resolved once, so that a random seed and what is written about the picture are one
            drawn = (session.draw_video if film else session.draw)(
                settings, _teller(preview_path, partial(timer.spent, "capture", "upload"))
            )
            elsewhere = _keep_all(drawn if enlarge is None else all_enlarged(drawn, enlarge), paths, singly, told)
            unused = session.unused()
    report.unused_tensors(unused, chosen["verbose"])
    report.say(", ".join(f"{stage} {timer.seconds.get(stage, 0):.2f}s" for stage in STAGES))
    return report.FAILURE if elsewhere else 0


def _request(chosen: Chosen) -> Request:
    """What is to be drawn, with its pictures read."""
    from ..diffusion.request import Request

    given = {entry.name: chosen[entry.name] for entry in fields(Request) if entry.name in chosen}
    if chosen["hires"]:
        given["hires_upscaler"] = _second_upscaler(chosen)
    return Request(**given | _prompts(chosen) | _pictures(chosen))


def all_enlarged(drawn: Iterable[Picture | Video], enlarge: Enlarge) -> Iterator[Picture | Video]:
    """Pictures enlarged, films as they are. A picture that can't be enlarged is not lost: it comes as it was drawn, and
    what was raised for the first one is raised after the last one."""
    from ..diffusion.pictures import Picture

    refusal: SdrpcError | None = None
    for one in drawn:
        if isinstance(one, Picture):
            try:
                one = Picture(enlarge(one.image), one.seed)
            except SdrpcError as error:
                report.warn("this picture could not be enlarged; it is kept as it was drawn")
                refusal = refusal or error
        yield one
    if refusal is not None:
        raise refusal


def _film_output(output: str) -> str:
    """Where a film goes; raises :class:`InvalidValue` for what can't be written here."""
    from ..diffusion.films import check_format, has_videos

    if output == STANDARD:
        raise InvalidValue("output", output, "standard output takes pictures, no films")
    usual = DEFAULT_FILM if has_videos() else DEFAULT_ANIMATION
    if output == DEFAULT_OUTPUT:
        return usual
    if not Path(output).suffix:
        return output + Path(usual).suffix
    if not frames_singly(output):
        check_format(Path(output).suffix)
    return output


def _keep_all(
    drawn: Iterable[Picture | Video],
    paths: Sequence[Path],
    singly: bool,
    told: Callable[[Picture | Video], Parameters | None],
) -> int:
    """Save what is drawn, of films each frame if ``singly``; how many files had to go elsewhere than to ``paths``.
    ``told``: what is written about it."""
    from ..diffusion.pictures import Picture

    left, elsewhere = iter(paths), 0
    for one in drawn:
        parameters = told(one)
        if isinstance(one, Picture):
            elsewhere += _keep(next(left), one, parameters)
        elif singly:
            files = [next(left) for _ in range(one.count)]
            frames = zip(files, one.frames, strict=True)
            elsewhere += sum(_keep(path, Picture(frame, one.seed), parameters) for path, frame in frames)
            elsewhere += _keep_sound(files[0], one.sound)
        else:
            elsewhere += _keep_film(next(left), one, parameters)
    return elsewhere


def _preview_path(pattern: str) -> Path:
    """Where previews go. Raises :class:`InvalidValue` for where they can't."""
    if pattern == STANDARD:
        raise InvalidValue("preview_path", pattern, "standard output takes the picture, no previews")
    (path,) = output_paths(pattern, 1, field="preview_path")
    check_writable([path], "preview_path")
    return path


def _teller(preview_path: Path | None, preparing: Callable[[], float]) -> OnEvent:
    """What shows a session's events, and keeps the newest preview in a file, as long as it can be written."""
    from ..diffusion.metadata import encode

    meter = report.meter(preparing)
    refused: list[OSError] = []

    def tell(event: Event) -> None:
        meter.tell(event)
        if preview_path is not None and event.preview is not None and not refused:
            data = encode(event.preview, preview_path.suffix or DEFAULT_SUFFIX, None)
            try:
                replace_file(preview_path, data)
            except OSError as error:
                refused.append(error)
                report.warn(f"{preview_path}: {error.strerror or error}; there are no more previews")

    return tell


def _keep(path: Path, picture: Picture, parameters: Parameters | None) -> bool:
    """Save a picture and print its name; whether it had to go elsewhere than to ``path``."""
    from ..diffusion.metadata import encode

    data = encode(picture.image, path.suffix or DEFAULT_SUFFIX, parameters)
    if str(path) == STANDARD:
        report.status.clear()
        refusal = streams.give(data)
        if refusal is None:
            return False
        saved = keep_elsewhere(path, data, refusal)
        report.warn(f"standard output: {saved.why}; the picture is in {saved.path}")
        return True
    saved = save(path, data)
    if saved.why:
        report.warn(f"{path}: {saved.why}; the picture is in {saved.path}")
    report.result(saved.path)
    return bool(saved.why)


def _keep_film(path: Path, film: Video, parameters: Parameters | None) -> bool:
    """As :func:`_keep`, of a film, whose frames are written as they come."""
    from ..diffusion.films import encode, has_sound

    saved = save_as_made(path, lambda file: encode(film, path.suffix, file, parameters))
    if saved.why:
        report.warn(f"{path}: {saved.why}; the film is in {saved.path}")
    report.result(saved.path)
    if has_sound(path.suffix):
        return bool(saved.why)
    return bool(saved.why) | _keep_sound(path, film.sound)


def _keep_sound(path: Path, sound: Sound | None) -> bool:
    """The same of a film's sound, beside the file ``path``, which holds none."""
    from ..diffusion.films import wav

    if sound is None:
        return False
    path = path.with_suffix(".wav")
    saved = save(path, wav(sound))
    if saved.why:
        report.warn(f"{path}: {saved.why}; the sound is in {saved.path}")
    report.result(saved.path)
    return bool(saved.why)


def _pictures(chosen: Chosen) -> dict[str, Any]:
    """The request's pictures, read from the files that were named."""
    from ..diffusion.image_files import READERS, read_pictures

    def files(field: str) -> list[Path]:
        named = chosen[field]
        return [] if named is None else list(map(Path, named if field == "ref_images" else [named]))

    return read_pictures({field: files(field) for field in READERS})


def _second_upscaler(chosen: Chosen) -> str | Path:
    """What enlarges pictures between two passes: a filter, or the file of a network."""
    from ..diffusion.hires import UPSCALERS
    from ..diffusion.upscaling import Upscalers

    networks = Upscalers(folder_of(chosen, "hires_upscalers_dir"))
    return networks.find(chosen["hires_upscaler"], UPSCALERS, "hires_upscaler")


def _prompts(chosen: Chosen) -> dict[str, str]:
    """The request's prompts, from the command line or from files. Raises :class:`UsageError` where there are two."""
    found: dict[str, str] = {}
    for field, file in (("prompt", "prompt_file"), ("negative_prompt", "negative_prompt_file")):
        if chosen[file] is None:
            found[field] = chosen[field] or ""
        elif chosen[field] is not None:
            ours, theirs = COMMAND.fields[field], COMMAND.fields[file]
            raise UsageError(f"{ours} and {theirs}: there is one such prompt; name one of them")
        else:
            found[field] = read_prompt(file, chosen[file])
    if chosen["prompt"] is None and chosen["prompt_file"] is None:
        report.say("no prompt is given with -p: drawing without one")
    return found


def _note_size(request: Request, settings: Settings, film: bool) -> None:
    """Say when the picture or film gets another size than the one that was asked for."""
    theirs = (None, None) if film or request.init_image is None else request.init_image.shape[1::-1]
    if theirs != (None, None) and request.width is None and request.height is None:
        report.say(f"drawing in {settings.width}×{settings.height}, the size of -i; -W and -H choose another")
    asked = (request.width or theirs[0] or settings.width, request.height or theirs[1] or settings.height)
    if asked != (settings.width, settings.height):
        given = f"{settings.width}×{settings.height}"
        report.say(f"{asked[0]}×{asked[1]} is rounded up to {given}, the next size that the model can draw")
    if film and request.video_frames not in (None, settings.video_frames):
        drawn = f"{settings.video_frames}, the number before it that the model can draw"
        report.say(f"{request.video_frames} frames are rounded down to {drawn}")


def _note_placement(model: Model, places: Mapping[str, Sequence[Lanes]], settings: Settings) -> None:
    """Say what draws where, and with -v also how."""
    where = ", ".join(f"{component} on {' or '.join(one.name for one in some)}" for component, some in places.items())
    report.say(f"{model.family.title}: {where}")
    for device in devices_of(chain(*places.values())):
        memory = device.memory()
        room = f"{mebibytes(memory.free)} of {mebibytes(memory.total)} free"
        log.debug("%s is %s, %s", device.name, device.description, room)
    for component in places:
        found = model[component].found
        log.debug("%s: %s in %s", component, mebibytes(found.nbytes()), found.checkpoint.path)
    told = [f"{entry.name} {getattr(settings, entry.name)!r}" for entry in fields(settings) if entry.repr]
    log.debug("settings: %s", ", ".join(told))
