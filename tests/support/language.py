"""Language models with random weights as GGUF files, and llama.cpp's own client for them (llama-cpp-python), which runs
in a process of its own: it ends with the process when a server misbehaves.

This version's ``Llama(rpc_servers=…)`` takes that argument and forgets it, so servers are registered as llama.cpp's own
``--rpc`` does it: every layer that is offloaded then goes to them.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

_BUILT = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "native_ggml.py"))
FOLDER = Path(_BUILT["PYTHON_FOLDER"])
PROTOCOL: str = _BUILT["LANGUAGE_PROTOCOL"]
"""What llama.cpp's client in there speaks."""
SPAWN = multiprocessing.get_context("spawn")

CONTEXT = 256
"""Tokens that a model is given room for."""
BYTES = 256
SPECIAL = ("<unk>", "<s>", "</s>")
EPS = 1e-5
Q4_K = gguf.GGMLQuantizationType.Q4_K
BLOCK, BLOCK_BYTES = 256, 144
SPREAD = 8.7  # of scale · quant - minimum in a Q4_K block of random bytes whose two factors are 1 / 32 and 7.5 / 32


class Shape(NamedTuple):
    """A llama: ``groups`` of heads share keys and values. Widths are multiples of Q4_K's blocks of 256."""

    layers: int = 3
    width: int = 256
    heads: int = 8
    groups: int = 2
    hidden: int = 512
    vocabulary: int = 320


def write_model(path: Path, type: str, shape: Shape = Shape(), seed: int = 0) -> Path:  # noqa: B008
    """A llama with random weights of ``type`` (Q4_K, F16, F32), and a vocabulary of bytes and made-up words.

    The weights are drawn as blocks of Q4_K, so that the same seed gives the same numbers in Q4_K and in F32.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, shape)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.groups)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    head = shape.width // shape.heads
    matrices = {"token_embd": (shape.vocabulary, shape.width), "output": (shape.vocabulary, shape.width)}
    norms = ["output_norm"]
    for block in (f"blk.{i}" for i in range(shape.layers)):
        norms += [f"{block}.attn_norm", f"{block}.ffn_norm"]
        for name, rows, columns in (
            ("attn_q", shape.width, shape.width), ("attn_k", shape.groups * head, shape.width),
            ("attn_v", shape.groups * head, shape.width), ("attn_output", shape.width, shape.width),
            ("ffn_gate", shape.hidden, shape.width), ("ffn_up", shape.hidden, shape.width),
            ("ffn_down", shape.width, shape.hidden),
        ):  # fmt: skip
            matrices[f"{block}.{name}"] = rows, columns
    for name in norms:
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, shape.width).astype(np.float32))
    for name, (rows, columns) in matrices.items():
        blocks = _blocks(rng, rows, columns)
        if type == "Q4_K":
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=Q4_K)
        else:
            values = gguf.quants.dequantize(blocks, Q4_K)
            writer.add_tensor(f"{name}.weight", values.astype({"F16": np.float16, "F32": np.float32}[type]))
    _close(writer)
    return path


def write_mamba(path: Path, generation: int, shape: Shape = Shape(layers=2), seed: int = 0) -> Path:  # noqa: B008
    """A Mamba of the first or second ``generation`` with random F32 weights: the layers, width and vocabulary of
    ``shape``; inside twice as wide, states of 16 and heads of 64 elements, taps of 4."""
    rng = np.random.default_rng(seed)
    inner, size, taps = 2 * shape.width, 16, 4
    writer = gguf.GGUFWriter(path, f"mamba{'' if generation == 1 else generation}")
    normal, uniform = _random(writer, rng)
    _describe(writer, shape)
    rank, groups = (16, 1) if generation == 1 else (inner // 64, 2)
    writer.add_ssm_conv_kernel(taps)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(size)
    writer.add_ssm_time_step_rank(rank)

    normal("token_embd.weight", shape.vocabulary, shape.width)
    uniform("output_norm.weight", 0.5, 1.5, shape.width)
    normal("output.weight", shape.vocabulary, shape.width)
    for block in (f"blk.{i}" for i in range(shape.layers)):
        uniform(f"{block}.attn_norm.weight", 0.5, 1.5, shape.width)
        normal(f"{block}.ssm_out.weight", shape.width, inner)
        if generation == 1:
            channels, numbers = inner, inner
            normal(f"{block}.ssm_in.weight", 2 * inner, shape.width)
            normal(f"{block}.ssm_x.weight", rank + 2 * size, inner)
            normal(f"{block}.ssm_dt.weight", inner, rank)
            uniform(f"{block}.ssm_a", -2.0, -0.1, inner, size)
            uniform(f"{block}.ssm_d", 0.5, 1.5, inner)
        else:
            channels, numbers = inner + 2 * groups * size, rank
            normal(f"{block}.ssm_in.weight", inner + channels + rank, shape.width)
            uniform(f"{block}.ssm_norm.weight", 0.5, 1.5, groups, inner // groups)
            uniform(f"{block}.ssm_a", -2.0, -0.1, rank, 1)
            uniform(f"{block}.ssm_d", 0.5, 1.5, rank, 1)
        uniform(f"{block}.ssm_dt.bias", -2.0, 1.0, numbers)
        normal(f"{block}.ssm_conv1d.weight", channels, taps)
        uniform(f"{block}.ssm_conv1d.bias", -0.5, 0.5, channels)
    if generation == 2:
        writer.add_ssm_group_count(groups)
    _close(writer)
    return path


def write_rwkv(path: Path, shape: Shape = Shape(layers=2), seed: int = 0) -> Path:  # noqa: B008
    """An RWKV of the seventh generation with random F32 weights, with heads of 64 elements."""
    writer = gguf.GGUFWriter(path, "rwkv7")
    normal, uniform = _random(writer, np.random.default_rng(seed))
    width, rank = shape.width, 16
    _describe(writer, shape)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(0)
    writer.add_layer_norm_eps(EPS)
    writer.add_wkv_head_size(64)
    writer.add_token_shift_count(2)
    for add in (writer.add_decay_lora_rank, writer.add_iclr_lora_rank, writer.add_value_residual_mix_lora_rank):
        add(rank)
    writer.add_gate_lora_rank(rank)
    normal("token_embd.weight", shape.vocabulary, width)
    normal("output.weight", shape.vocabulary, width)
    norms = ["token_embd_norm", "output_norm"]
    for block in (f"blk.{i}" for i in range(shape.layers)):
        norms += [f"{block}.attn_norm", f"{block}.attn_norm_2", f"{block}.time_mix_ln"]
        for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k"):
            uniform(f"{block}.time_mix_{name}.weight", -1.0, 1.0, width)
        for name in ("w", "a", "v", "g"):
            normal(f"{block}.time_mix_{name}1.weight", rank, width)
            normal(f"{block}.time_mix_{name}2.weight", width, rank)
        for name in ("key", "value", "receptance", "output"):
            normal(f"{block}.time_mix_{name}.weight", width, width)
        uniform(f"{block}.time_mix_lerp_fused.weight", 0.0, 1.0, 6, 1, 1, width)
        uniform(f"{block}.channel_mix_lerp_k.weight", 0.0, 1.0, 1, 1, width)
        normal(f"{block}.channel_mix_key.weight", shape.hidden, width)
        normal(f"{block}.channel_mix_value.weight", width, shape.hidden)
    for norm in norms:
        uniform(f"{norm}.weight", 0.5, 1.5, width)
        uniform(f"{norm}.bias", -0.2, 0.2, width)
    _close(writer)
    return path


Add = Callable[..., None]


def _random(writer: gguf.GGUFWriter, rng: np.random.Generator) -> tuple[Add, Add]:
    """Functions that add a tensor of normal numbers, whose products with rows keep their size, and of uniform ones."""

    def normal(name: str, *dims: int) -> None:
        writer.add_tensor(name, (rng.standard_normal(dims) * dims[-1] ** -0.5).astype(np.float32))

    def uniform(name: str, low: float, high: float, *dims: int) -> None:
        writer.add_tensor(name, rng.uniform(low, high, dims).astype(np.float32))

    return normal, uniform


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_vocab_size(shape.vocabulary)
    words = range(shape.vocabulary - BYTES - len(SPECIAL))
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(BYTES)), *(f"word{i}" for i in words)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * BYTES + [gguf.TokenType.NORMAL] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _blocks(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random Q4_K blocks whose numbers have mean zero and the variance 1 / columns."""
    blocks = rng.integers(0, BYTES, (rows * columns // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    factor = columns**-0.5 / 32 / SPREAD
    blocks[:, :4] = np.array([factor, 7.5 * factor], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def prompt(text: str) -> list[int]:
    """``text`` as tokens: <s> and its bytes."""
    return [1, *(len(SPECIAL) + byte for byte in text.encode())]


class Generated(NamedTuple):
    """``tokens``: the likeliest ones, one after the other; ``logits`` of the prompt and these: [tokens, vocabulary]."""

    tokens: list[int]
    logits: np.ndarray


class Speed(NamedTuple):
    """Tokens per second: of a prompt, and of what is generated after it."""

    prompt: float
    generation: float


class Llama:
    """llama.cpp on its CPU backend, or with everything but the embedding's rows on the server at ``endpoint``."""

    def __init__(self, log: Path, endpoint: str = "") -> None:
        log.write_text("")
        self._log, self._offloaded = log, bool(endpoint)
        self._pool = ProcessPoolExecutor(1, SPAWN, _start, (str(log), endpoint))

    def generate(self, model: Path, text: str, count: int, *, flash: bool) -> Generated:
        """``count`` tokens after ``text``."""
        return self._run(_generate, str(model), self._offloaded, prompt(text), count, flash)

    def speed(self, model: Path, tokens: int, count: int, threads: int) -> Speed:
        """How fast it reads a prompt of ``tokens`` and generates ``count`` more; the first round is not counted."""
        return self._run(_speed, str(model), self._offloaded, tokens, count, threads)

    def _run(self, work: Any, *arguments: Any) -> Any:
        try:
            return self._pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError(f"llama.cpp gave up:\n{self._log.read_text()}") from None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# In the process


def _start(log: str, endpoint: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.path.insert(0, str(FOLDER))
    import llama_cpp.llama_cpp as low

    defaults = low.llama_model_default_params

    def plain() -> Any:
        """Weights that the CPU backend repacks go through AMX where a processor says that it has it: arithmetic of
        another kind, and an illegal instruction in virtual machines that have it in name only."""
        params = defaults()
        params.use_extra_bufts = False
        return params

    low.llama_model_default_params = plain
    if endpoint:
        lib = low._lib
        lib.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
        lib.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
        lib.ggml_backend_register.argtypes = [ctypes.c_void_p]
        lib.ggml_backend_register(lib.ggml_backend_rpc_add_server(endpoint.encode()))


def _load(model: str, offloaded: bool, threads: int = 1, **options: Any) -> Any:
    from llama_cpp import Llama as Model

    return Model(
        model, n_gpu_layers=-1 if offloaded else 0, op_offload=offloaded, n_ctx=CONTEXT, n_threads=threads,
        n_threads_batch=threads, verbose=False, **options,
    )  # fmt: skip


def _generate(model: str, offloaded: bool, tokens: Sequence[int], count: int, flash: bool) -> Generated:
    llama = _load(model, offloaded, flash_attn=flash, logits_all=True)
    generated: list[int] = []
    llama.eval(tokens)
    for _ in range(count):
        generated.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(generated[-1:])
    logits = llama.scores[: llama.n_tokens].copy()
    llama.close()
    return Generated(generated, logits)


def _speed(model: str, offloaded: bool, tokens: int, count: int, threads: int) -> Speed:
    llama = _load(model, offloaded, threads, flash_attn=True)
    rng = np.random.default_rng(0)
    speeds = []
    for _ in range(2):
        text = [1, *rng.integers(len(SPECIAL), BYTES, tokens - 1).tolist()]
        start = time.perf_counter()
        following = llama.generate(text, temp=0.0, reset=True)
        next(following)
        prompted = time.perf_counter()
        for _ in islice(following, count):
            pass
        speeds.append(Speed(tokens / (prompted - start), count / (time.perf_counter() - prompted)))
    llama.close()
    return speeds[-1]
