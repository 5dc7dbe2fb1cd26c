"""``sd-cli --mode upscale``: a picture made larger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..diffusion import placement
from ..diffusion.placement import UPSCALER
from ..errors import InvalidValue, UsageError
from ..runtime.chain import devices_of
from . import report
from .chosen import by_option, keychain, servers, threads, timeouts
from .devices import placed_devices
from .output import check_sides

if TYPE_CHECKING:
    from ..diffusion.pictures import Pixels
    from ..runtime.chain import Lanes

    Enlarge = Callable[[Pixels], Pixels]


def on_one_device(
    names: placement.Names, placed: Mapping[str, placement.Names], by_option: Mapping[str, str]
) -> placement.Names:
    """The upscaler's ``names`` of :func:`sdrpc.diffusion.placement.wanted`, each a single device. Of several that are
    said to compute everything together, the first enlarges pictures. Raises :class:`InvalidValue` where they are named
    (``placed``, ``by_option``) for the upscaler itself."""
    together = {name: list(chain(*placement.side_by_side(name))) for name in names}
    if UPSCALER in placed or by_option.get(UPSCALER):
        for name, several in together.items():
            if len(several) > 1:
                raise InvalidValue("backend", f"{UPSCALER}={name}", "the upscaler is on one device")
    return tuple(dict.fromkeys(several[0] for several in together.values()))


def upscaled(chosen: Mapping[str, Any], path: Path) -> Pixels:
    """The picture ``--init-img`` as large as ``--upscale-model`` makes it, on the device that was chosen; for
    ``path``."""
    from ..diffusion.image_files import read_picture

    for field, option in (("init_image", "--init-img"), ("upscale_model", "--upscale-model")):
        if chosen[field] is None:
            raise UsageError(f"--mode upscale: name a file with {option}")
    image = read_picture("init_image", Path(chosen["init_image"]))
    named = placement.parse(chosen["backend"])
    wanted = placement.wanted([UPSCALER], named, chosen["main_backend_device"], by_option(chosen))
    wanted[UPSCALER] = on_one_device(wanted[UPSCALER], named, by_option(chosen))
    with placed_devices(
        wanted, servers(chosen), chosen["precision"], threads(chosen), timeouts(chosen), keychain(chosen)
    ) as placed:
        height, width = image.shape[:2]
        return enlarging(chosen, placed.places[UPSCALER][0], width, height, path)(image)


def enlarging(chosen: Mapping[str, Any], place: Lanes, width: int, height: int, path: Path) -> Enlarge:
    """What enlarges pictures of this size for ``path``, in ``place``. Raises :class:`InvalidValue` for what can't be
    done, before anything is drawn."""
    from ..diffusion.upscaling import Upscaler

    device = devices_of([place])[0]
    repeats, tile = chosen["upscale_repeats"], chosen["upscale_tile_size"]
    upscaler = Upscaler(Path(chosen["upscale_model"]), device, chosen["rpc_retry"])
    larger = upscaler.check(width, height, repeats, tile)
    check_sides(path, *larger)
    report.say(f"{upscaler.title} on {device.name}: {width}×{height} becomes {larger[0]}×{larger[1]}")
    meter = report.meter()

    def enlarge(image: Pixels) -> Pixels:
        return upscaler(image, repeats, tile, lambda done, total: meter.steps("upscaling: tile", done, total))

    return enlarge
