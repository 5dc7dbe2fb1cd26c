"""sd-server: a queue, a page and the APIs of others before models on the devices of this machine and of rpc-servers."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from ..diffusion import placement
from ..diffusion.placement import UPSCALER
from ..errors import InvalidValue, UsageError
from ..sockets import listen
from ..storage import state_folder, write_whole
from . import discovery, fitting, interrupts, report
from .chosen import by_option, files_of, folder_of, keychain, servers, threads, timeouts, waiting
from .cluster import cluster_seats
from .command import Chosen, Command
from .devices import REMOTE, Found, every_device, limits_of, resolved
from .entry import ready
from .options import ALWAYS_SO
from .upscale import on_one_device
from .web_options import DAY, OPTIONS, REFUSED

if TYPE_CHECKING:
    from ..device import Device
    from ..families.model import Model
    from ..runtime.chain import Lanes
    from ..web.devices import Shown
    from ..web.seats import Fit, Seat

log = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "::1", "localhost")
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 # compared with
KEY_BYTES = 18
MAX_KEYS_FILE = 1 << 20
CONNECTIONS = 512
"""At one time; further ones are told that the server is busy."""


def main() -> None:
    """The console script; exit status 0 after Ctrl-C or SIGTERM, 2 for an option that can't be honoured, else 1."""
    ready()
    sys.exit(report.guarded(lambda: run(sys.argv[1:]), COMMAND.fields))


def run(arguments: Sequence[str]) -> int:
    """The command with ``arguments``; its exit status."""
    return COMMAND.run(arguments)


def sd_server(**chosen: Any) -> int:
    """Draw for everybody on the network: a page, a queue, the APIs of OpenAI, AUTOMATIC1111 and stable-diffusion.cpp.

    Without options: the model that ships with sdrpc, this machine's devices, http://127.0.0.1:1234."""
    structured = chosen["log_format"] == "json"
    (report.logging_as_json if structured else report.logging_to_console)(chosen["verbose"])
    if chosen["version"]:
        print(f"sd-server {__version__}")
        return 0
    if chosen["completion"]:
        print(COMMAND.completion(chosen["completion"]))
        return 0
    if chosen["discover"]:
        return discovery.show()
    _serve(chosen, keys_of(chosen))
    return 0


COMMAND = Command("sd-server", OPTIONS, sd_server, REFUSED, ALWAYS_SO, bare=True, help=sd_server.__doc__)


def keys_of(chosen: Chosen) -> dict[str, str]:
    """Name → key; none where nobody needs one. Raises :class:`UsageError` where everybody on the network would be let
    in by mistake, and for a file that holds no keys."""
    path = chosen["api_key_file"]
    if path is None:
        if chosen["listen_ip"] not in LOCAL and not chosen["no_auth"]:
            raise InvalidValue(
                "listen_ip", chosen["listen_ip"],
                "others on the network could draw, and see what is drawn: name a file of keys with --api-key-file (it "
                "is made where there is none), or let everybody in with --no-auth",
            )  # fmt: skip
        return {}
    if chosen["no_auth"]:
        raise UsageError("--no-auth and --api-key-file exclude each other")
    return read_keys(Path(path))


def read_keys(path: Path) -> dict[str, str]:
    """The keys in a file, or a new one in a new file. Raises :class:`InvalidValue`."""
    try:
        if not path.exists():
            write_whole(path, f"home: {secrets.token_urlsafe(KEY_BYTES)}\n".encode())
            report.say(f"a key was made; it is in {path}")
        if refusal := distrusted(path.stat()):
            raise InvalidValue("api_key_file", path, refusal)
        text = path.read_text("utf-8")
    except OSError as error:
        raise InvalidValue("api_key_file", path, f"can't be used: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidValue("api_key_file", path, "is no text") from error
    keys: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, key = (part.strip() for part in line.rpartition(":"))
        if key and not line.startswith("#"):
            keys[name if colon else f"key {len(keys) + 1}"] = key
    if not keys:
        raise InvalidValue("api_key_file", path, "holds no key")
    return keys


def distrusted(facts: os.stat_result) -> str:
    """Why no keys are read from such a file; "" if they are. It may be the administrator's, as a container's secrets
    are, which are links, too."""
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_KEYS_FILE:
        return "is no file with keys"
    if not hasattr(os, "getuid"):
        return ""
    if facts.st_uid not in (0, os.getuid()):
        return "is somebody else's file"
    return "everybody can write to it, and let themselves in: chmod o-w" if facts.st_mode & stat.S_IWOTH else ""


def _serve(chosen: Chosen, keys: dict[str, str]) -> None:
    try:
        from ..web.app import create_app
        from ..web.serving import serve
    except ImportError as error:
        raise UsageError(f"sd-server needs more packages ({error.name}): pip install 'sdrpc[server]'") from error
    from ..diffusion.upscaling import Upscalers
    from ..web.board import Board
    from ..web.context import Context
    from ..web.devices import Devices
    from ..web.gate import Rules
    from ..web.metrics import Metrics
    from ..web.placements import Placements
    from ..web.shelf import Shelf
    from ..web.store import JobStore
    from ..web.studio import Studio
    from ..web.warm import Adapters

    named = files_of(chosen)
    first = named.model or named.diffusion_model or next(iter(named.named.values()))
    shelf = Shelf((first.stem, named), folder_of(chosen, "models_dir"))
    _, model = shelf.open(None)
    listening = listen(chosen["listen_ip"], chosen["listen_port"], CONNECTIONS, COMMAND.fields["listen_port"])
    with listening, _seats(chosen, model) as (seats, devices):
        data = Path(chosen["data"]).resolve() if chosen["data"] else state_folder() / "sd-server"
        store = JobStore(data, chosen["max_pending"], chosen["keep"] * DAY, chosen["keep_size"])
        words = chosen["embd_dir"] and Path(chosen["embd_dir"])
        adapters = Adapters(Path(chosen["lora_model_dir"]), chosen["lora_apply_mode"], words)
        upscalers = Upscalers(folder_of(chosen, "hires_upscalers_dir"))
        memory = {"max_vram": placement.limits(chosen["max_vram"]), "params_backend": waiting(chosen)}

        def elsewhere() -> Sequence[Shown]:
            return [] if devices else list(dict.fromkeys(device for seat in seats for device in seat.devices(model)))

        there, placements = Devices(devices, elsewhere), Placements(devices, data / "placement.json")
        board, metrics = Board(), Metrics(store, there)
        idle, retry = chosen["idle_unload"], chosen["rpc_retry"]
        studio = Studio(
            store, shelf, seats, there, placements, board, metrics, idle, retry, adapters, upscalers, memory
        )
        context = Context(store, studio, board, shelf, metrics, there, placements)
        app = create_app(context, Rules(keys, frozenset(chosen["allow_host"])))
        studio.start()
        try:
            _announce(chosen, listening, model, seats, data, bool(keys))
            logged = chosen["verbose"] or chosen["log_format"] == "json"
            serve(app, listening, CONNECTIONS, logged, board.close, interrupts.next_ends, interrupts.hang_up())
        finally:
            studio.stop()
            store.close()


@contextmanager
def _seats(chosen: Chosen, model: Model) -> Iterator[tuple[Sequence[Seat], Sequence[Device]]]:
    """Who draws, and this process's devices. Raises :class:`UsageError`, and what is wrong with a server that is not
    there where a component has no other device."""
    where = Where(placement.parse(chosen["backend"]), chosen["main_backend_device"], by_option(chosen))
    fits = chosen["auto_fit"] or fitting.is_asked_for([*where.backend.values(), [where.main]])
    if fits and chosen["ray"]:
        raise UsageError("--auto-fit and --ray: a cluster's devices are offered one by one; place components by name")
    if chosen["ray"]:
        with cluster_seats(chosen, partial(placed_far, where), where.said) as theirs:
            yield theirs, ()
        return
    rpc, apart = servers(chosen), not fits and not where.said  # a seat for each
    with every_device(rpc, chosen["precision"], threads(chosen), keychain(chosen), timeouts(chosen), apart) as found:
        for what, why in found.told().items():
            report.warn(f"{what}: {why}")
        fit = partial(planned, found, limits_of(chosen["max_vram"], found.devices), waiting(chosen))
        yield [fitted_seat(where, model, found, fit)] if fits else own_seats(where, model, found, fit), found.devices


class Where(NamedTuple):
    """What the user said of where components run."""

    backend: Mapping[str, placement.Names]
    main: str
    by_option: Mapping[str, str]

    @property
    def said(self) -> bool:
        return bool(self.backend or self.main or any(self.by_option.values()))


def placed(where: Where, found: Found, default: Sequence[Device], model: Model) -> dict[str, list[Lanes]]:
    """Component → its devices, the ``default`` ones where the user said nothing. Raises :class:`InvalidValue`, and what
    is wrong with a device that is not there."""
    return resolved(_wanted(where, model), found, default)


def _wanted(where: Where, model: Model) -> dict[str, placement.Names]:
    backend = {name: names for name, names in where.backend.items() if name != UPSCALER}  # no component of a model
    by_option = {name: names for name, names in where.by_option.items() if name != UPSCALER}
    return placement.wanted(list(model.components), backend, where.main, by_option)


def upscaler_on(where: Where, found: Found, default: Sequence[Device]) -> Device:
    """Where networks run that enlarge pictures. Raises as :func:`placed`."""
    from ..runtime.chain import devices_of

    backend = {name: names for name, names in where.backend.items() if name in (UPSCALER, placement.REST)}
    by_option = {UPSCALER: where.by_option.get(UPSCALER, "")}
    wanted = placement.wanted([UPSCALER], backend, where.main, by_option)
    wanted[UPSCALER] = on_one_device(wanted[UPSCALER], backend, by_option)
    return devices_of(resolved(wanted, found, default)[UPSCALER])[0]


def placed_far(where: Where, model: Model, devices: Sequence[Device]) -> dict[str, list[Lanes]]:
    """The same of an actor's devices, of which those of servers are the default."""
    return placed(where, Found(list(devices), {}), _remote(devices), model)


def _remote(devices: Sequence[Device]) -> list[Device]:
    return [device for device in devices if device.name.startswith(REMOTE)]


def own_seats(where: Where, model: Model, found: Found, fit: Fit) -> list[Seat]:
    """Seats at devices that this process has. Where the user placed components: one seat, there. Else each remote
    device is a seat with the whole model on it, and without servers this machine's first device."""
    from ..web.seats import OwnSeat

    theirs = _remote(found.devices)
    if found.absent and not theirs:
        raise UsageError("none of the servers that --rpc names can be used")
    alone = where.said or len(theirs) < 2
    defaults = [theirs or found.devices[:1]] if alone else [[device] for device in theirs]
    name = _devices_named(placed(where, found, defaults[0], model)) if where.said else ""
    seats = [
        OwnSeat(
            name or default[0].name,
            partial(placed, where, found, default),
            partial(upscaler_on, where, found, default),
            fit,
        )
        for default in defaults
    ]
    seats[0].place(model)  # what the options name is there
    seats[0].upscaler()
    return [*seats]


def _devices_named(places: Mapping[str, list[Lanes]]) -> str:
    """The devices that components prefer."""
    from ..runtime.chain import devices_of

    return " + ".join(device.name for device in devices_of(choices[0] for choices in places.values()))


def planned(
    found: Found,
    limits: Mapping[str, int],
    waits: Mapping[str, str],
    model: Model,
    before: fitting.Placed,
    fixed: Collection[str],
) -> dict[str, list[Lanes]]:
    """A plan for those components of a model that are not ``fixed`` to where they are ``before``. ``limits`` and
    ``waits``: as :func:`fitting.fitted` takes them. Raises :class:`DoesNotFit`."""
    from ..diffusion.drawable import settings_of
    from ..diffusion.request import Request

    return fitting.fitted(model, settings_of(model, Request("")), before, fixed, found.devices, limits, waits)


def fitted_seat(where: Where, model: Model, found: Found, fit: Fit) -> Seat:
    """One seat at all devices that this process has. A plan says what of a model is on which; it is made when the model
    is first asked for, while its weights are nowhere."""
    from ..web.seats import OwnSeat

    default = _remote(found.devices) or found.devices[:1]
    plans: dict[int, tuple[Model, fitting.Placed]] = {}

    def place(model: Model) -> fitting.Placed:
        if id(model) not in plans:
            wanted = _wanted(where, model)
            fixed = [name for name, names in wanted.items() if not fitting.is_asked_for([names])]
            plans[id(model)] = model, fit(model, resolved(wanted, found, default), fixed)
        return plans[id(model)][1]

    place(model)
    return OwnSeat("all devices", place, partial(upscaler_on, where, found, default), fit)


def _announce(
    chosen: Chosen, listening: socket.socket, model: Model, seats: Sequence[Seat], data: Path, keys: bool
) -> None:
    port = listening.getsockname()[1]
    print(f"{model.family.title} on {', '.join(seat.name for seat in seats)}; queue and pictures in {data}")
    address = chosen["listen_ip"]
    shown = socket.gethostname() if address in EVERYWHERE else f"[{address}]" if ":" in address else address
    print(f"http://{shown}:{port}" + ("  (with a key)" if keys else ""), flush=True)
    if chosen["no_auth"] and address not in LOCAL:
        report.warn("whoever reaches this address can draw, and see and delete what was drawn")
