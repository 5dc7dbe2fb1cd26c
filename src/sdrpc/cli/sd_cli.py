"""sd-cli: a picture from a checkpoint, each part of the model on the device that the user named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__, models
from ..errors import UsageError
from . import placement, report
from .convert import convert
from .devices import every_device, placed_devices
from .options import canonical
from .output import DEFAULT_OUTPUT, check_writable, output_paths, write_file

if TYPE_CHECKING:
    from ..diffusion.clock import Clock
    from ..diffusion.metadata import Parameters
    from ..diffusion.model import ModelFiles
    from ..diffusion.pipeline import Parts, Picture, Request

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
        Path | None, typer.Option(rich_help_panel=MODEL, help="Diffusion model (UNet) from a file of its own.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(rich_help_panel=MODEL, help="VAE from a file of its own.")] = None,
    clip_l: Annotated[
        Path | None, typer.Option("--clip_l", rich_help_panel=MODEL, help="Text encoder from a file of its own.")
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
    steps: Annotated[int, typer.Option(rich_help_panel=SAMPLING, help="Sampling steps.")] = 20,
    cfg_scale: Annotated[
        float, typer.Option(rich_help_panel=SAMPLING, help="How strongly to follow the prompt; 1: no guidance.")
    ] = 7.0,
    sampling_method: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=SAMPLING, help="euler, euler_a, heun, dpm2, dpm++2m, lcm, …")
    ] = "euler_a",
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=SAMPLING,
            help="discrete, karras, exponential, sgm_uniform, simple, …",
            show_default="the sampler's own",
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=SAMPLING, help="How much new noise a sampler adds.", show_default="the sampler's own"
        ),
    ] = None,
    clip_skip: Annotated[
        int, typer.Option(rich_help_panel=SAMPLING, help="2 leaves out the text encoder's last layer; -1 and 1: none.")
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
            help="Where parts run: RPC0, or te=RPC1,diffusion=RPC0,vae=CPU.",
            show_default="RPC0 with --rpc, else this machine's first",
        ),
    ] = "",
    main_backend_device: Annotated[
        str,
        typer.Option(metavar="DEVICE", rich_help_panel=DEVICES, help="Device of parts that have none of their own."),
    ] = "",
    diffusion_backend_device: Annotated[
        str, typer.Option(metavar="DEVICE", rich_help_panel=DEVICES, help="Device of the diffusion model.")
    ] = "",
    clip_backend_device: Annotated[
        str, typer.Option(metavar="DEVICE", rich_help_panel=DEVICES, help="Device of the text encoder.")
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
    files = _files(model, diffusion_model, vae, clip_l)
    if mode == "convert":
        convert(files, type, output, verbose)
        return
    by_part = {
        "te": clip_backend_device or ("CPU" if clip_on_cpu else ""),
        "diffusion": diffusion_backend_device,
        "vae": vae_backend_device or ("CPU" if vae_on_cpu else ""),
    }
    wanted = placement.wanted(backend, main_backend_device, by_part)
    paths = output_paths(output, batch_count, output_begin_idx)

    from ..diffusion.clock import STAGES, Clock
    from ..diffusion.metadata import encode_png
    from ..diffusion.model import open_model
    from ..diffusion.pipeline import Request
    from ..diffusion.placed import PlacedModel, Placement

    clock = Clock()
    with clock("load"):
        opened = open_model(files)
    own_width, own_height = opened.size
    request = Request(
        prompt, negative_prompt, own_width if width is None else width, own_height if height is None else height,
        steps, cfg_scale, seed, batch_count, sampling_method, scheduler, clip_skip, rng, eta,
    ).resolved()  # fmt: skip
    check_writable(paths)
    with placed_devices(wanted, servers, precision, _threads(threads)) as devices, report.metered() as meter:
        where = Placement(devices["te"], devices["diffusion"], devices["vae"])
        report.log.print(", ".join(f"{placement.TITLES[part]} on {device.name}" for part, device in devices.items()))
        with closing(PlacedModel(opened, where, clock, uploading=meter.bytes, capturing=meter.capturing)) as placed:
            pictures = _pictures(request, placed, clock, meter)
            for path, picture in zip(paths, pictures, strict=True):
                parameters = None if disable_image_metadata else _parameters(request, picture, files)
                write_file(path, encode_png(picture.image, parameters))
                report.results.print(path)
            unused = placed.unused()
    report.unused_tensors(unused, verbose)
    report.log.print(", ".join(f"{stage} {clock.seconds.get(stage, 0):.2f}s" for stage in STAGES))


def _files(model: Path | None, diffusion_model: Path | None, vae: Path | None, clip_l: Path | None) -> ModelFiles:
    """The files that the user named, or the model that ships with sdrpc when there are none."""
    from ..diffusion.model import ModelFiles

    if not any((model, diffusion_model, vae, clip_l)):
        report.log.print(f"no model is named with -m: using {models.DEFAULT}, which ships with sdrpc")
        model = models.named(models.DEFAULT)
    return ModelFiles(model, diffusion_model, vae, clip_l)


def _pictures(request: Request, parts: Parts, clock: Clock, meter: report.Meter) -> Iterator[Picture]:
    """The pictures of ``request``, each with a line of progress of its own."""
    from ..diffusion.pipeline import generate

    number = 1

    def on_step(done: int, total: int) -> None:
        meter.steps(f"picture {number}/{request.batch_count}", done, total)

    for picture in generate(request, parts, clock, on_step):
        yield picture
        number += 1


def _parameters(request: Request, picture: Picture, files: ModelFiles) -> Parameters:
    """What the PNG says about how it came about."""
    from ..diffusion.metadata import Parameters

    height, width, _ = picture.image.shape
    paths = {name: path for name, path in vars(files).items() if path is not None}
    return Parameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        steps=request.steps,
        cfg_scale=request.cfg_scale,
        seed=picture.seed,
        sampler=request.sampler,
        scheduler=request.scheduler or "",
        rng=request.rng,
        version=__version__,
        clip_skip=request.clip_skip,
        eta=request.eta,
        models={name: path.name for name, path in paths.items()},
    )


def _check_mode(mode: str, type: str) -> None:
    if mode not in HERE:
        reason = "sdrpc does not have it yet" if mode in MODES else "does not exist"
        raise UsageError(f"--mode {mode}: {reason}; there are {' and '.join(HERE)}")
    if type and mode != "convert":
        raise UsageError(
            f"--type {type}: sdrpc draws with the types that a file has; write another with --mode convert"
        )


def _threads(option: int) -> int | None:
    return option if option > 0 else None
