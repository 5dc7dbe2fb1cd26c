"""sd-cli: a picture from a checkpoint, each part of the model on the device that the user named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__, models
from ..diffusion import placement
from ..diffusion.predictions import PREDICTIONS
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedules import SCHEDULES
from ..errors import InvalidValue
from . import report
from .convert import convert
from .devices import every_device, placed_devices
from .options import canonical
from .output import DEFAULT_OUTPUT, check_writable, output_paths, write_file

if TYPE_CHECKING:
    from ..diffusion.metadata import Parameters
    from ..diffusion.pictures import Picture
    from ..diffusion.request import Request, Settings
    from ..families.model import ModelFiles

MODES = ("img_gen", "vid_gen", "upscale", "convert", "metadata")
"""The modes of stable-diffusion.cpp's sd-cli."""

HERE = ("img_gen", "convert")
"""Those that sdrpc has."""

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def main() -> None:
    """The console script; exit status 0 for pictures, 2 for an option that can't be honoured, else 1."""
    sys.exit(report.guarded(lambda: run(sys.argv[1:])))


def run(arguments: list[str]) -> None:
    """The command with ``arguments``, in whatever spelling its options are."""
    command = typer.main.get_command(app)
    known = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    command.main(canonical(arguments, known), prog_name="sd-cli")


MODEL, PICTURE, SAMPLING, DEVICES, OUTPUT = "Model", "Picture", "Sampling", "Devices", "Output"


@app.command(no_args_is_help=True)
def sd_cli(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            parser=models.named,
            metavar="PATH",
            rich_help_panel=MODEL,
            help="Whole model: .safetensors, .gguf, a diffusers directory, or a name: demo.",
            show_default="demo, which ships with sdrpc",
        ),
    ] = None,
    diffusion_model: Annotated[
        Path | None,
        typer.Option(metavar="PATH", rich_help_panel=MODEL, help="Diffusion model (UNet, DiT) from a file of its own."),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(metavar="PATH", rich_help_panel=MODEL, help="VAE from a file of its own.")
    ] = None,
    clip_l: Annotated[
        Path | None,
        typer.Option(
            "--clip_l", metavar="PATH", rich_help_panel=MODEL, help="CLIP-L (SD 2: OpenCLIP-H) from a file of its own."
        ),
    ] = None,
    clip_g: Annotated[
        Path | None,
        typer.Option("--clip_g", metavar="PATH", rich_help_panel=MODEL, help="OpenCLIP-G from a file of its own."),
    ] = None,
    t5xxl: Annotated[
        Path | None,
        typer.Option("--t5xxl", metavar="PATH", rich_help_panel=MODEL, help="T5-XXL from a file of its own."),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", rich_help_panel=PICTURE, help="What to draw.")] = "",
    negative_prompt: Annotated[
        str, typer.Option("--negative-prompt", "-n", rich_help_panel=PICTURE, help="What not to draw.")
    ] = "",
    width: Annotated[
        int | None,
        typer.Option(
            "--width", "-W", rich_help_panel=PICTURE, help="Width in pixels.", show_default="what the model is made for"
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(
            "--height",
            "-H",
            rich_help_panel=PICTURE,
            help="Height in pixels.",
            show_default="what the model is made for",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", "-s", rich_help_panel=PICTURE, help="Seed of the noise; below 0: a random one.")
    ] = 42,
    batch_count: Annotated[
        int, typer.Option("--batch-count", "-b", rich_help_panel=PICTURE, help="Pictures, with seeds counting up.")
    ] = 1,
    steps: Annotated[
        int | None,
        typer.Option(rich_help_panel=SAMPLING, help="Sampling steps.", show_default="20; FLUX.1 schnell: 4"),
    ] = None,
    cfg_scale: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=SAMPLING,
            help="How strongly to follow the prompt; 1: no negative prompt.",
            show_default="7; FLUX.1: 1",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=SAMPLING, help="Guidance of models distilled with it: FLUX.1 dev.", show_default="3.5"
        ),
    ] = None,
    sampling_method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=SAMPLING,
            help=f"One of {', '.join(SAMPLERS)}.",
            show_default="euler_a; FLUX.1: euler",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=SAMPLING,
            help=f"One of {', '.join(SCHEDULES)}.",
            show_default="the sampler's own",
        ),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(PREDICTIONS),
            rich_help_panel=SAMPLING,
            help="What the model predicts.",
            show_default="what its tensors or its file tell",
        ),
    ] = None,
    flow_shift: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=SAMPLING,
            help="Shift of a flow model's noise levels.",
            show_default="the model's own; FLUX.1 dev: by size",
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=SAMPLING, help="How much new noise a sampler adds.", show_default="the sampler's own"
        ),
    ] = None,
    clip_skip: Annotated[
        int,
        typer.Option(rich_help_panel=SAMPLING, help="2 leaves out CLIP's last layer; below 1: as the model wants it."),
    ] = -1,
    rng: Annotated[
        str, typer.Option(metavar="cuda|cpu|std_default", rich_help_panel=SAMPLING, help="Where noise comes from.")
    ] = "cuda",
    rpc: Annotated[
        list[str] | None,
        typer.Option(
            "--rpc",
            "--rpc-servers",
            metavar="HOST:PORT,…",
            rich_help_panel=DEVICES,
            help="Servers whose devices are RPC0, RPC1 … in the order given.",
        ),
    ] = None,
    list_devices: Annotated[
        bool, typer.Option("--list-devices", rich_help_panel=DEVICES, help="Print all devices and exit.")
    ] = False,
    backend: Annotated[
        str,
        typer.Option(
            metavar="MODULE=DEVICE,…",
            rich_help_panel=DEVICES,
            help="Where components run: RPC0, or te=RPC1,diffusion=RPC0,vae=CPU; also clip_l, clip_g, t5xxl.",
            show_default="RPC0 with --rpc, else this machine's first",
        ),
    ] = "",
    main_backend_device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", rich_help_panel=DEVICES, help="Device of components that have none of their own."
        ),
    ] = "",
    diffusion_backend_device: Annotated[
        str, typer.Option(metavar="DEVICE", rich_help_panel=DEVICES, help="Device of the diffusion model.")
    ] = "",
    clip_backend_device: Annotated[
        str, typer.Option(metavar="DEVICE", rich_help_panel=DEVICES, help="Device of the text encoders.")
    ] = "",
    vae_backend_device: Annotated[
        str, typer.Option(metavar="DEVICE", rich_help_panel=DEVICES, help="Device of the VAE.")
    ] = "",
    clip_on_cpu: Annotated[
        bool, typer.Option("--clip-on-cpu", rich_help_panel=DEVICES, help="Same as --clip-backend-device CPU.")
    ] = False,
    vae_on_cpu: Annotated[
        bool, typer.Option("--vae-on-cpu", rich_help_panel=DEVICES, help="Same as --vae-backend-device CPU.")
    ] = False,
    threads: Annotated[
        int, typer.Option("--threads", "-t", rich_help_panel=DEVICES, help="Threads of this machine's CPU; -1: all.")
    ] = -1,
    precision: Annotated[
        str,
        typer.Option(
            metavar="exact|fast|ggml|auto",
            rich_help_panel=DEVICES,
            help="How this machine's devices compute; auto: fast where the hardware is made for it.",
        ),
    ] = "auto",
    output: Annotated[
        str, typer.Option("--output", "-o", rich_help_panel=OUTPUT, help="The PNG; %d or %03d numbers several.")
    ] = DEFAULT_OUTPUT,
    output_begin_idx: Annotated[
        int, typer.Option(min=0, rich_help_panel=OUTPUT, help="Number of the first picture.")
    ] = 0,
    disable_image_metadata: Annotated[
        bool, typer.Option("--disable-image-metadata", rich_help_panel=OUTPUT, help="Don't write the parameters.")
    ] = False,
    mode: Annotated[
        str,
        typer.Option(
            "--mode", "-M", metavar="img_gen|convert", rich_help_panel=OUTPUT, help="Draw, or write the model as .gguf."
        ),
    ] = "img_gen",
    type: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=OUTPUT,
            help="With convert: type of the weights, such as q8_0.",
            show_default="as they are",
        ),
    ] = "",
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", rich_help_panel=OUTPUT, help="Log more, and name unused tensors.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Draw a picture with Stable Diffusion on the devices of this machine and of rpc-servers."""
    report.logging_to_console(verbose)
    if version:
        print(f"sd-cli {__version__}")
        return
    servers = [endpoint for text in rpc or () for endpoint in text.split(",") if endpoint]
    if list_devices:
        with every_device(servers, precision, _threads(threads)) as devices:
            report.results.print(report.device_table(devices))
        return
    _check_mode(mode, type)
    files = _files(model, diffusion_model, vae, clip_l, clip_g, t5xxl)
    if mode == "convert":
        convert(files, type, output, verbose)
        return
    options = {
        "te": clip_backend_device or ("CPU" if clip_on_cpu else ""),
        "diffusion": diffusion_backend_device,
        "vae": vae_backend_device or ("CPU" if vae_on_cpu else ""),
    }
    placed = placement.parse(backend)
    paths = output_paths(output, batch_count, output_begin_idx)

    from ..diffusion.metadata import encode_png
    from ..diffusion.request import Request
    from ..diffusion.session import Session
    from ..diffusion.stage_timer import STAGES, StageTimer
    from ..families.model import open_model

    timer = StageTimer()
    with timer("load"):
        opened = open_model(files)
    request = Request(
        prompt, negative_prompt, width, height, steps, cfg_scale, guidance, seed, batch_count, sampling_method,
        scheduler, clip_skip, rng, eta, prediction, flow_shift,
    )  # fmt: skip
    wanted = placement.wanted(list(opened.components), placed, main_backend_device, options)
    settings = request.resolved(opened.defaults, opened.size, opened.family.latents.multiple)
    _note_size(request, settings)
    check_writable(paths)
    with placed_devices(wanted, servers, precision, _threads(threads)) as devices, report.metered() as meter:
        where = ", ".join(f"{component} on {device.name}" for component, device in devices.items())
        report.log.print(f"{opened.family.title}: {where}")
        with Session(opened, devices, timer=timer) as session:
            # resolved once, so that a random seed and what is written about the picture are one
            pictures = session.draw(settings, meter.tell)
            for path, picture in zip(paths, pictures, strict=True):
                parameters = None if disable_image_metadata else _parameters(settings, eta, picture, files)
                write_file(path, encode_png(picture.image, parameters))
                report.results.print(path)
            unused = session.unused()
    report.unused_tensors(unused, verbose)
    report.log.print(", ".join(f"{stage} {timer.seconds.get(stage, 0):.2f}s" for stage in STAGES))


def _files(
    model: Path | None,
    diffusion_model: Path | None,
    vae: Path | None,
    clip_l: Path | None,
    clip_g: Path | None,
    t5xxl: Path | None,
) -> ModelFiles:
    """The files that the user named, or the model that ships with sdrpc when there are none."""
    from ..families.model import ModelFiles

    files = ModelFiles(model, diffusion_model, vae, clip_l, clip_g, t5xxl)
    if not files.named:
        report.log.print(f"no model is named with -m: using {models.DEFAULT}, which ships with sdrpc")
        return ModelFiles(models.named(models.DEFAULT))
    return files


def _note_size(request: Request, settings: Settings) -> None:
    """Say when the picture gets another size than the one that was asked for."""
    asked = (request.width or settings.width, request.height or settings.height)
    if asked != (settings.width, settings.height):
        given = f"{settings.width}×{settings.height}"
        report.log.print(f"{asked[0]}×{asked[1]} is rounded up to {given}, the next size that the model can draw")


def _parameters(settings: Settings, eta: float | None, picture: Picture, files: ModelFiles) -> Parameters:
    """What the PNG says about how it came about."""
    from ..diffusion.metadata import Parameters

    height, width, _ = picture.image.shape
    return Parameters(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        width=width,
        height=height,
        steps=settings.steps,
        cfg_scale=settings.cfg_scale,
        guidance=settings.guidance,
        seed=picture.seed,
        sampler=settings.sampling_method,
        scheduler=settings.scheduler,
        rng=settings.rng,
        version=__version__,
        clip_skip=settings.clip_skip,
        eta=eta,
        flow_shift=settings.flow_shift,
        models={name: path.name for name, path in files.named.items()},
    )


def _check_mode(mode: str, type: str) -> None:
    if mode not in HERE:
        reason = "sdrpc does not have it yet" if mode in MODES else "does not exist"
        raise InvalidValue("mode", mode, f"{reason}; there are {' and '.join(HERE)}")
    if type and mode != "convert":
        reason = "sdrpc draws with the types that a file has; write another with --mode convert"
        raise InvalidValue("type", type, reason)


def _threads(option: int) -> int | None:
    return option if option > 0 else None
