"""A whole language model: llama.cpp's client with all layers on our server gives what its own CPU backend gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from sdrpc.ggml.dialect import dialects
from sdrpc.server import Server
from tests.interop.tap import Tap
from tests.interop.worker import nmse
from tests.support.language import PROTOCOL, Generated, Llama, Shape, write_mamba, write_model, write_rwkv

pytestmark = pytest.mark.interop

SEED = 14
"""Of the weights: here the likeliest token is likelier than the next by seven times what rounding activations to eight
bits does to a logit, twelve times over."""
TEXT, TOKENS = "Once upon a time", 12
TYPES = ("F16", "F32", "Q4_K")
DEVICES = 2
"""Of our server in these tests."""

SAME = 1e-5
"""Largest NMSE of logits between two that compute in float: ggml's CPU backend rounds activations to F16 where weights
or the cache are F16 (measured: 1e-6)."""
ROUNDED = 1e-3
"""The same where ggml's CPU backend has quantized weights: it rounds activations to Q8_K, eight bits to a block of 256
(measured: 2e-4)."""
LAYERS, CHARACTERS, FOLLOWING = 2, 3, 3
"""What is compared while our server rounds as well: a smaller model, short texts. A number in the middle between two of
eight bits goes the way that the last bit of a sum tells it; the next layer's numbers then differ by a thousandth and go
other ways by the dozen, until nothing is left but two roundings of the same. So ggml's CPU backend is 3e-5 from itself
when it reads TEXT in batches of another size. It comes to one in ten tokens of such a model (of eight seeds)."""

Ours = tuple[Mapping[str, Generated], Mapping[str, "Counter[str]"]]


@pytest.fixture(scope="module")
def our_server(our_server: Server) -> Iterator[Server]:
    """It, as the client wants it."""
    with Server(our_server.devices, dialects()[PROTOCOL]) as server:
        yield server


@pytest.fixture(scope="module")
def rounding_server(rounding_server: Server) -> Iterator[Server]:
    """The same."""
    with Server(rounding_server.devices, dialects()[PROTOCOL]) as server:
        yield server


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / f"{kind}.gguf", kind, seed=SEED) for kind in TYPES}


@pytest.fixture(scope="module", params=[False, True], ids=["no-flash", "flash"])
def flash(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def on_cpu(
    models: Mapping[str, Path], flash: bool, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Generated]:
    """What llama.cpp's own CPU backend generates."""
    with Llama(tmp_path_factory.mktemp("llama") / "cpu.log") as llama:
        return {kind: llama.generate(path, TEXT, TOKENS, flash=flash) for kind, path in models.items()}


@pytest.fixture(scope="module")
def ours(
    models: Mapping[str, Path], flash: bool, our_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ours]:
    """What it generates with our server, and the commands that it sent for each model."""
    log = tmp_path_factory.mktemp("llama") / "rpc.log"
    with Tap(our_server.endpoint) as tap, Llama(log, tap.endpoint) as llama:
        generated, commands = {}, {}
        for kind, path in models.items():
            tap.commands.clear()
            generated[kind] = llama.generate(path, TEXT, TOKENS, flash=flash)
            commands[kind] = Counter(tap.commands)
        yield generated, commands


@pytest.mark.parametrize("type", ["F16", "F32"])
def test_logits_are_those_of_the_cpu_backend(type: str, ours: Ours, on_cpu: Mapping[str, Generated]) -> None:
    assert ours[0][type].tokens == on_cpu[type].tokens
    assert nmse(on_cpu[type].logits, ours[0][type].logits) <= SAME


def test_quantized_weights_are_the_numbers_that_they_stand_for(ours: Ours, on_cpu: Mapping[str, Generated]) -> None:
    """The same weights as Q4_K and as F32: we can't tell them apart, and agree with the CPU backend on the F32 ones. It
    does tell them apart, by what its rounding costs; that is all that lies between us."""
    quantized, plain = ours[0]["Q4_K"], ours[0]["F32"]
    np.testing.assert_allclose(quantized.logits, plain.logits, rtol=1e-5, atol=1e-5)
    assert nmse(on_cpu["F32"].logits, quantized.logits) <= SAME
    assert quantized.tokens == on_cpu["Q4_K"].tokens == on_cpu["F32"].tokens
    theirs = nmse(on_cpu["F32"].logits, on_cpu["Q4_K"].logits)
    assert SAME < theirs <= ROUNDED  # the day that it is no more, the line above can be said of Q4_K as well
    assert nmse(on_cpu["Q4_K"].logits, quantized.logits) <= 1.1 * theirs + SAME


@pytest.mark.parametrize("type", ["F16", "Q4_K"])
def test_rounding_as_the_cpu_backend_does_it(
    type: str, flash: bool, rounding_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of half of the texts, at least, nothing hangs on a last bit (measured: 3e-14 in Q4_K, 3e-8 in F16)."""
    folder = tmp_path_factory.mktemp("rounding")
    model = write_model(folder / "model.gguf", type, Shape(layers=LAYERS), SEED)
    texts = [TEXT[i : i + CHARACTERS] for i in range(0, len(TEXT), CHARACTERS)]
    with Llama(folder / "cpu.log") as cpu, Llama(folder / "rpc.log", rounding_server.endpoint) as rpc:
        theirs, mine = (
            [llama.generate(model, text, FOLLOWING, flash=flash) for text in (*texts, TEXT)] for llama in (cpu, rpc)
        )
    assert [generated.tokens for generated in mine] == [generated.tokens for generated in theirs]
    errors = [nmse(a.logits, b.logits) for a, b in zip(theirs, mine, strict=True)]
    assert np.median(errors) <= SAME, errors
    assert max(errors) <= (ROUNDED if type == "Q4_K" else SAME), errors


@pytest.mark.parametrize("type", TYPES)
def test_a_graph_crosses_once(type: str, ours: Ours) -> None:
    """One for the prompt and one for a token, on each of the server's two devices, over which llama.cpp deals the
    layers; the one for a token runs again for each further token."""
    commands = ours[1][type]
    assert (commands["GRAPH_COMPUTE"], commands["GRAPH_RECOMPUTE"]) == (2 * DEVICES, (TOKENS - 1) * DEVICES)


RECURRENT: dict[str, Callable[[Path], Path]] = {
    "mamba": lambda path: write_mamba(path, 1, seed=3),
    "mamba2": lambda path: write_mamba(path, 2, seed=3),
    "rwkv7": lambda path: write_rwkv(path, seed=0),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_model(kind: str, our_server: Server, tmp_path: Path) -> None:
    """States that graphs read and write, views of other devices' memory, tensors without elements."""
    model = RECURRENT[kind](tmp_path / "model.gguf")
    with Llama(tmp_path / "cpu.log") as llama:
        theirs = llama.generate(model, TEXT, TOKENS, flash=False)
    with Tap(our_server.endpoint) as tap, Llama(tmp_path / "rpc.log", tap.endpoint) as llama:
        mine = llama.generate(model, TEXT, TOKENS, flash=False)
    assert mine.tokens == theirs.tokens
    assert nmse(theirs.logits, mine.logits) <= SAME
    assert tap.commands["GRAPH_RECOMPUTE"] == (TOKENS - 1) * DEVICES
