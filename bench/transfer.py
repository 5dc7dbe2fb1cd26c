"""How fast tensor data goes to and from a server, without the server: a loopback sink that keeps nothing.

Method: 512 MiB up in one write, closed by a round trip; 512 MiB down in one read; 64 KiB up and down as one latent is.
Best of ``ROUNDS``. Run as ``python -m bench.transfer`` in the repository's root.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support.sink import sink

from sdrpc.client import connect

SIZE = 512 << 20
SMALL = 64 << 10
ROUNDS = 5
ROUND_TRIPS = 500


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest round."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    data = memoryview(bytearray(SIZE))
    with sink() as endpoint:
        (device,) = connect([endpoint])
        buffer = device.allocate(SIZE)

        def up() -> None:
            device.write(buffer, 0, data)
            device.memory()

        def there_and_back() -> None:
            for _ in range(ROUND_TRIPS):
                device.write(buffer, 0, data[:SMALL])
                device.read(buffer, 0, SMALL)

        print(f"up    {SIZE / best(up) / 1e9:6.2f} GB/s")
        print(f"down  {SIZE / best(lambda: device.read(buffer, 0, SIZE)) / 1e9:6.2f} GB/s")
        print(f"64 KiB there and back {best(there_and_back) / ROUND_TRIPS * 1e6:6.0f} µs")
        device.close()


if __name__ == "__main__":
    main()
