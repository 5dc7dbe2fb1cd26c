"""All benchmarks, in the order in which they run."""

from __future__ import annotations

from . import (
    busy,
    cache,
    cluster,
    encryption,
    families,
    formats,
    graph,
    language,
    link,
    memory,
    operations,
    queue,
    replay,
    scaling,
    split,
    start,
    step,
    upload,
    wire,
)
from .rows import Benchmark

BENCHMARKS = (
    Benchmark("step", "time of a sampling step through a server, over diffusers in process", step.run),
    Benchmark("link", "a step over a link with 20 ms of round trip, over one on loopback", link.run, False),
    Benchmark("wire", "bytes of a step on the wire, over what it needs", wire.run),
    Benchmark("upload", "speed of weights from the mapped file into the server's memory", upload.run),
    Benchmark("encryption", "an upload and a step through TLS, over the same without", encryption.run),
    Benchmark("cache", "an upload of weights that the server has kept, over a plain one; speed of hashes", cache.run),
    Benchmark("memory", "peak of memory that is the client's and the server's own", memory.run),
    Benchmark("graph", "sd-cli's recorded UNet graph: fast over exact, per operation", graph.run),
    Benchmark("replay", "an unmodified sd-cli's commands at full rate, over our own client's", replay.run),
    Benchmark("operations", "operations of SD 1.5 and a whole UNet graph, over ggml's own server", operations.run),
    Benchmark("language", "llama.cpp's client: tokens per second with our server, over ggml's own", language.run),
    Benchmark(
        "families", "models of several files at full size: step, memory, bytes, capture, start", families.run, False
    ),
    Benchmark("formats", "layers with weights of 8 bits a number, over 16 bits", formats.run, False),
    Benchmark("busy", "steps of the demo model on busy and on quiet cores: threads that sleep, over others", busy.run),
    Benchmark("cluster", "pictures a minute of sd-server in a Ray cluster, over one device's", cluster.run, False),
    Benchmark("scaling", "pictures, prompts and layers on several devices, over one device's", scaling.run, False),
    Benchmark("split", "a model on two devices: half of its layers on each, and a prompt on each", split.run, False),
    Benchmark("queue", "what sd-server's queue takes of a picture, beside drawing, for 50 users", queue.run, False),
    Benchmark("start", "second run of sd-cli, from process start to first step", start.run),
)
