"""Models of several files at full size: a step beside diffusers in process, memory, bytes, capture, second start."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from sdrpc.client import connect
from sdrpc.diffusion.drawable import latents_shape, settings_of
from sdrpc.diffusion.guidance import Told
from sdrpc.diffusion.pictures import Pixels
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.engine.discovery import devices
from sdrpc.families import flux2, wan, zimage
from sdrpc.families.base import Config
from sdrpc.families.components.unet import pooled_width
from sdrpc.families.flux1 import T5_TOKENS
from sdrpc.families.model import Model, ModelFiles, open_model
from sdrpc.ggml.memory_planner import place
from sdrpc.runtime.cache import SUFFIX, Cache
from sdrpc.runtime.lowered import from_bytes
from tests.support.process import ServerProcess

from .capturing import Shapes, in_new_process
from .checkpoints import checkpoint, control_net, lora
from .command import SdCli
from .inprocess import Drawing, InProcess, drawing
from .kernels import Kernels, hearing, kernels_of
from .memory import ALIGNMENT, GB, Watched, WatchedDevice, watching
from .proxy import CountingProxy
from .rows import Mark, Row
from .sampling import DTYPES, Sampled, difference, draw, sample, step_seconds
from .setup import PROMPT, Setup, Variant, development_cache, read
from .step import until_compiled
from .upload import through_socket

log = Console(stderr=True, highlight=False)

ROUNDS = 2
"""Each side draws as often, in turn."""

SAME_WORK = 0.15
"""How far (relative, L2) the latents of both sides may be from each other: rounding in narrow types takes a few per
cent, other work takes far more. A row says it: times of different work mean nothing."""

WIRE_STEPS = 3
SOCKET_BYTES = 4 << 30
"""Of the model's file that are sent through a plain socket at most."""


class Drawn(NamedTuple):
    """Width and height in pixels and steps of a picture; of a film also its frames."""

    width: int
    height: int
    steps: int
    frames: int | None = None


class Kind(NamedTuple):
    """A family's usual type of weights and guidance; what its diffusion model is told of a prompt, as shapes without
    the batch, from the configurations of its components; what the full model draws; and what its first capture may
    take."""

    plain: str
    cfg_scale: float
    told: Callable[[Config], Shapes]
    drawn: Drawn = Drawn(1024, 1024, 20)
    capture_seconds: float | None = None
    capture_gb: float | None = None


def _told_sdxl(config: Config) -> Shapes:
    return {"context": (77, config["cross_attention_dim"]), "pooled": (pooled_width(config),), "sizes": (6,)}


def _told_flux1(config: Config) -> Shapes:
    width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    return {"context": (T5_TOKENS, width), "pooled": (pooled,), "guidance": ()}


def _told_z_image(config: Config) -> Shapes:
    return {"context": (zimage.TOKENS, config["cap_feat_dim"]), "padding": (zimage.TOKENS,)}


def _told_text(width: str, tokens: int) -> Callable[[Config], Shapes]:
    """A text alone, of the width that the configuration has by this name."""
    return lambda config: {"context": (tokens, config[width])}


SHORT_TEXT = 32
"""Tokens of a prompt for models that are told no more than it has."""

KINDS = {
    "sdxl": Kind("f16", 7.0, _told_sdxl),
    "flux1-dev": Kind("bf16", 1.0, _told_flux1, capture_seconds=8.0, capture_gb=1.0),
    "z-image": Kind("bf16", 1.0, _told_z_image, Drawn(1024, 1024, 8)),
    "qwen-image": Kind("bf16", 1.0, _told_text("joint_attention_dim", SHORT_TEXT), Drawn(1328, 1328, 20)),
    "flux2-klein-4b": Kind("bf16", 1.0, _told_text("joint_attention_dim", flux2.TOKENS)),
    "wan2.2-5b": Kind("bf16", 1.0, _told_text("text_dim", wan.TOKENS), Drawn(832, 480, 20, 33)),
}
"""Families by the names of tools/checkpoints."""

ADAPTED = ("sdxl",)
"""The family that is measured with a LoRA and a ControlNet."""

CONTROL_STRENGTH = 0.7

USUAL = ("sdxl", "flux1-dev")
"""Those that are measured where none is named."""

TINY = Drawn(128, 128, 4, 5)
"""What tiny models draw; frames are of those that draw films."""

CLIENT_GB, START_SECONDS, STEP_RATIO, WIRE_RATIO = 2.0, 3.0, 1.05, 1.2


@dataclass(frozen=True)
class Case:
    """One family with its files, ready to be measured. ``folder``: scratch space of the case alone."""

    setup: Setup
    kind: Kind
    variant: Variant
    files: ModelFiles
    request: Request
    folder: Path
    full: bool

    @property
    def title(self) -> str:
        added = "".join(f" + {name}" for name, on in self.added.items() if on)
        return f"{self.folder.name}{added}, {self.variant}"

    @property
    def added(self) -> dict[str, bool]:
        """What the picture is drawn with beside the model."""
        lora = f"LoRA ({self.setup.families.lora_apply_mode})"
        return {lora: bool(self.request.loras), "ControlNet": self.request.control_image is not None}

    @property
    def film(self) -> bool:
        return self.request.video_frames is not None

    @property
    def cache(self) -> Cache:
        return Cache(self.folder / "graphs")

    def mark(self, mark: Mark | None) -> Mark | None:
        """Marks are for models of full size."""
        return mark if self.full else None

    def short(self, steps: int) -> Request:
        """The same picture in fewer steps."""
        return replace(self.request, steps=steps)

    def connected(self, stack: ExitStack, port: int) -> Session:
        """A session with everything on the first device of the server at ``port``."""
        device, *others = connect([f"127.0.0.1:{port}"])
        for opened in (device, *others):
            stack.callback(opened.close)
        mode = self.setup.families.lora_apply_mode
        return stack.enter_context(Session.open(self.files, device, self.cache, lora_apply_mode=mode))


def run(setup: Setup) -> Iterator[Row]:
    for family in setup.families.names:
        case = case_of(setup, family)
        for part in setup.families.parts:
            if part in PARTS:
                yield from PARTS[part](case)


def case_of(setup: Setup, family: str) -> Case:
    """The family, with its files made and read."""
    options = setup.families
    kind = KINDS[family]
    weights = options.type or kind.plain
    size = setup.checkpoint_size
    home = development_cache() / f"{family}-{size}"
    text = size if size == "tiny" else options.text_encoders
    plain = (weights if weights in DTYPES else kind.plain).upper()
    start = time.perf_counter()
    files = checkpoint(home, family, size, text, weights.upper(), plain)
    for path in files.named.values():
        read(path)
    loras: tuple[tuple[Path, float], ...] = ()
    if options.lora:
        loras = ((lora(home, family, size), 1.0),)
    if options.control:
        files = replace(files, control_net=control_net(home, family, size, plain))
    log.print(f"{family}: files ready after {time.perf_counter() - start:.0f} s")
    drawn = TINY if size == "tiny" else kind.drawn
    width, height = options.size or drawn.width, options.size or drawn.height
    cfg_scale = kind.cfg_scale if options.cfg_scale is None else options.cfg_scale
    request = Request(
        PROMPT, width=width, height=height,
        steps=options.steps or drawn.steps, cfg_scale=cfg_scale, sampling_method="euler", scheduler="discrete",
        video_frames=kind.drawn.frames and drawn.frames, loras=loras,
        control_image=_hint(width, height) if options.control else None, control_strength=CONTROL_STRENGTH,
    )  # fmt: skip
    folder = setup.folder / f"{family} {size}"
    folder.mkdir()
    return Case(setup, kind, Variant(weights, setup.variant.precision), files, request, folder, size == "full")


def _hint(width: int, height: int) -> Pixels:
    """What a ControlNet is shown."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


# A step ---------------------------------------------------------------------------------------------------------------


def _step(case: Case) -> Iterator[Row]:
    """Both sides draw in turn; the weights of both are on the device at the same time."""
    with ExitStack() as stack:
        server = stack.enter_context(case.setup.server(case.variant))
        session = case.connected(stack, server.port)
        settings = session.settings(case.request, case.film)
        conditions = session.conditioning.conditions(settings)
        drawn = drawing(session.model, settings, list(conditions.by_name.values()))
        before = session.timer.seconds.get("upload", 0.0)
        draw(session, settings)  # uploads, and finds memory
        yield _upload(case, session.model["diffusion"].found.nbytes(), session.timer.seconds["upload"] - before)
        theirs = InProcess(session.model, case.setup.torch_device, _dtype(case))
        stack.callback(theirs.close)
        for applied in settings.loras:
            theirs.fuse(Path(applied.name))
        layout = f", {theirs.choose_layout(drawn)}" if theirs.convolves else ""
        mine, eager, graph = [], [], []
        theirs.sample(drawn)
        for _ in range(ROUNDS):
            mine.append(draw(session, settings))
            eager.append(theirs.sample(drawn))
            if not case.setup.on_cpu:
                graph += theirs.recorded(drawn)
        apart = difference(mine[-1].latents, eager[-1].latents)
        yield Row(
            f"same work, {case.title}", 100 * apart, "%", None, "", Mark(100 * SAME_WORK, "ours"),
            "distance (relative, L2) of the latents of both sides",
        )  # fmt: skip
        plain = {f"diffusers{layout}": eager, f"diffusers, CUDA graph{layout}": graph}
        yield from _steps(case, drawn, mine, plain)
        yield from _compiled(case, drawn, server, lambda: draw(session, settings), theirs, layout, plain)


def _compiled(
    case: Case, drawn: Drawing, server: ServerProcess, mine: Callable[[], Sampled], theirs: InProcess, layout: str,
    plain: Mapping[str, list[Sampled]],
) -> Iterator[Row]:  # fmt: skip
    """The same where the server compiles, beside diffusers' ``plain`` runs and its model compiled and recorded."""
    if not case.setup.compiles(case.variant):
        return
    took = until_compiled(server, mine)
    yield Row(f"compiling, {case.title}", took, "s", None, "", None, "from the first picture on, beside drawing")
    runs = [mine() for _ in range(ROUNDS)]
    yield from _steps(case, drawn, runs, plain, "compiled step")
    with theirs.compiled():
        graph = [run for _ in range(ROUNDS) for run in theirs.recorded(drawn)]
        eager = [] if graph else [theirs.sample(drawn) for _ in range(ROUNDS + 1)][1:]  # the first one compiles
    ways = {f"diffusers compiled, CUDA graph{layout}": graph, f"diffusers compiled{layout}": eager}
    yield from _steps(case, drawn, runs, ways, "compiled step")


def _steps(
    case: Case, drawn: Drawing, mine: list[Sampled], theirs: Mapping[str, list[Sampled]], what: str = "step"
) -> Iterator[Row]:
    """A row for each way to run diffusers; the mark is beside the better one."""
    ours = step_seconds(*mine)
    seconds = {name: step_seconds(*runs) for name, runs in theirs.items() if runs}
    best = min(seconds.values())
    narrow = str(_dtype(case)).removeprefix("torch.")
    dequantized = "" if case.variant.type in DTYPES else f"; diffusers' weights in {narrow}"
    batch = len(drawn.conditions)
    for name, their in seconds.items():
        frames = f"×{drawn.settings.video_frames} frames" if case.film else ""
        yield Row(
            f"{what}, {case.title}", ours * 1e3, "ms", their * 1e3, name,
            case.mark(Mark(STEP_RATIO)) if their == best else None,
            f"{drawn.settings.width}×{drawn.settings.height}{frames}, {drawn.settings.steps} steps, batch of {batch}; "
            f"{1 / ours:.2f} against {1 / their:.2f} steps/s{dequantized}",
        )  # fmt: skip


def _upload(case: Case, size: int, seconds: float) -> Row:
    path = case.files.named["diffusion_model"]
    count = min(size, SOCKET_BYTES, path.stat().st_size)  # blocks that are unpacked are more bytes than the file has
    plain = count / through_socket(path, count) / GB
    note = f"the diffusion model, {size / GB:.2f} GB in {seconds:.1f} s"
    return Row(f"upload, {case.title}", size / seconds / GB, "GB/s", plain, "plain loopback socket", None, note)


def _dtype(case: Case) -> torch.dtype:
    """What diffusers computes in: exact is float32 whatever the file holds; the family's type in place of blocks and of
    8-bit floats."""
    if case.variant.precision == "exact":
        return torch.float32
    return DTYPES.get(case.variant.type, DTYPES[case.kind.plain])


# Kernels --------------------------------------------------------------------------------------------------------------


def _kernels(case: Case) -> Iterator[Row]:
    """Both sides in this process, compiled where servers do that, one after the other under torch's profiler."""
    device = next(each for each in devices(case.variant.precision) if each.name == case.setup.device)
    with ExitStack() as stack:
        stack.callback(device.close)
        heard = stack.enter_context(hearing())
        session = stack.enter_context(Session.open(case.files, device, case.cache))
        settings = session.settings(case.request, case.film)
        conditions = session.conditioning.conditions(settings)
        drawn = drawing(session.model, settings, list(conditions.by_name.values()))
        draw(session, settings)
        theirs = InProcess(session.model, case.setup.torch_device, _dtype(case))
        stack.callback(theirs.close)
        if case.setup.compiles(case.variant):
            until_compiled(heard, lambda: draw(session, settings))
            stack.enter_context(theirs.compiled())
        sides: dict[str, Callable[[], Sampled]] = {
            "ours": lambda: draw(session, settings),
            "diffusers": lambda: theirs.sample(drawn),
        }
        found: dict[str, Kernels] = {}
        for side, picture in sides.items():
            picture()
            found[side] = kernels_of(picture, settings.steps, case.setup.torch_device)
            found[side].show(f"{case.title}, {side}")
        ours, others = (each.by_kind() for each in found.values())
        for kind, spent in ours.items():
            yield Row(f"{kind}, {case.title}", spent, "ms", others[kind], "diffusers' of a step", None, "of the device")


# sd-cli ---------------------------------------------------------------------------------------------------------------


def _command(case: Case) -> Iterator[Row]:
    """A real sd-cli draws with a real server, captures everything, and then once more a single step."""
    graphs = case.folder / "command" / "graphs"
    graphs.mkdir(parents=True)
    on_device = None if case.setup.on_cpu else WatchedDevice()
    with case.setup.server(case.variant) as server:
        options = ("--rpc", f"127.0.0.1:{server.port}", "--scheduler", "discrete")
        start = time.perf_counter()
        client = SdCli(case.request, case.files.named, graphs, *options)
        watched_client, watched_server = Watched(client.process.pid), Watched(server.process.pid)
        with watching(watched_client, watched_server, *([on_device] if on_device else [])):
            stages = client.wait().stages
        first = time.perf_counter() - start - stages["upload"] - stages["decode"] - stages["sample"]
        lowered = [from_bytes(path.read_bytes()) for path in graphs.rglob(f"*{SUFFIX}")]
        start = time.perf_counter()
        short = SdCli(case.short(1), case.files.named, graphs, *options)
        stages = short.wait().stages
        again = time.perf_counter() - start - stages["upload"] - stages["decode"]
    shutil.rmtree(graphs.parent)
    weights = sum({(w.name, w.shape): w.leaf.nbytes for low in lowered for w in low.weights}.values())
    activations = max(place(low.graph, ALIGNMENT, 1).size for low in lowered)
    files = sum(path.stat().st_size for path in case.files.named.values())
    yield Row(
        f"memory, client, {case.title}", watched_client.anonymous / GB, "GB", None, "",
        case.mark(Mark(CLIENT_GB, "ours")),
        f"anonymous, peak of a whole sd-cli that captures; {files / GB:.1f} GB of files",
    )  # fmt: skip
    where, seen = ("server", watched_server) if on_device is None else ("server's device", on_device)
    holds = f"weights {weights / GB:.2f} + activations {activations / GB:.2f}"
    yield Row(
        f"memory, {where}, {case.title}", seen.peak / GB, "GB", (weights + activations) / GB, holds, None,
        "all components on one device",
    )  # fmt: skip
    if on_device is not None:
        yield Row(f"memory, server, {case.title}", watched_server.peak / GB, "GB", None, "", None, "host memory")
    told = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
    yield Row(
        f"start, {case.title}", again, "s", first, "first run, which captures, up to its first step",
        case.mark(Mark(START_SECONDS, "ours")),
        f"second run, process start to the end of the first step, without upload and VAE; its stages: {told}",
    )  # fmt: skip


# Bytes ----------------------------------------------------------------------------------------------------------------


def _wire(case: Case) -> Iterator[Row]:
    counts: list[tuple[int, int]] = []
    with ExitStack() as stack:
        server = stack.enter_context(case.setup.server(case.variant))
        proxy = stack.enter_context(CountingProxy(server.port))
        session = case.connected(stack, proxy.port)
        request = case.short(WIRE_STEPS)
        told = _told(case, session.model)
        conditions = {name: np.zeros((1, *shape[1:]), np.float32) for name, shape in told.items()}
        batch = _batch(case)
        noted = sample(
            session,
            request,
            Told(conditions, conditions if batch == 2 else None),
            lambda _: counts.append((proxy.sent, proxy.received)),
        )
    # the first step uploads and sends the graph; counts[0] is before it
    sent, received = (
        (after - before) / (WIRE_STEPS - 1) for before, after in zip(counts[1], counts[-1], strict=True)
    )  # fmt: skip
    one = noted.latents.nbytes
    needed = one + 4 + batch * one  # latents and the timestep out, the prediction of the batch back
    yield Row(
        f"bytes per step, {case.title}", sent + received, "B", needed, "latents + timestep, prediction",
        case.mark(Mark(WIRE_RATIO)), f"{sent:,.0f} out, {received:,.0f} back",
    )  # fmt: skip


# Capture --------------------------------------------------------------------------------------------------------------


def _capture(case: Case) -> Iterator[Row]:
    kind, model, request = case.kind, open_model(case.files), case.request
    latents = (_batch(case), *latents_shape(model, settings_of(model, request, case.film))[1:])
    took = in_new_process(case.files, {"latents": latents, "timestep": (_batch(case),), **_told(case, model)})
    yield Row(
        f"capture, {case.title}", took.cpu, "s", None, "",
        case.mark(Mark(kind.capture_seconds, "ours")) if kind.capture_seconds else None,
        f"CPU of the diffusion model's first capture without imports, {took.operations:,} tensors; "
        f"{took.wall:.1f} s of the clock; {took.process_cpu:.1f} s of CPU with imports",
    )  # fmt: skip
    yield Row(
        f"memory, capture, {case.title}", (took.peak - took.peak_before) / GB, "GB", None, "",
        case.mark(Mark(kind.capture_gb, "ours")) if kind.capture_gb else None,
        f"beyond the {took.peak_before / GB:.2f} GB that were resident after imports",
    )  # fmt: skip


def _batch(case: Case) -> int:
    """With guidance the model evaluates the negative prompt as well."""
    return 1 if case.request.cfg_scale == 1 else 2


def _told(case: Case, model: Model) -> Shapes:
    """Shapes of the diffusion model's inputs that follow from the prompt."""
    return {name: (_batch(case), *shape) for name, shape in case.kind.told(model["diffusion"].config).items()}


PARTS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "capture": _capture,
    "step": _step,
    "command": _command,
    "wire": _wire,
    "kernels": _kernels,
}
"""What can be measured alone (``--only``), in the order in which it is."""
USUAL_PARTS = ("capture", "step", "command", "wire")
"""What is measured where nothing is named."""
