"""The real ggml, through ctypes: its tensors, contexts, graphs, CPU backend, RPC client and RPC server.

Only what the interop tests need. ggml aborts its process on errors: use :class:`Ggml` in a process of its own
(:mod:`tests.interop.worker`). Nothing here is imported from sdrpc: it is the other side.
"""

from __future__ import annotations

import ctypes as c
import os
import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDERS: dict[str, Path] = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "native_ggml.py"))["FOLDERS"]
"""Where the libraries are, by the protocol version that they speak, newest first."""
NEWEST = next(iter(FOLDERS))
CHOOSE = "SDRPC_TEST_GGML"
PROTOCOL = os.environ.get(CHOOSE, NEWEST)
"""Which of them a process uses: :func:`chosen` starts processes with another one."""
FOLDER = FOLDERS[PROTOCOL]
MAX_NAME = {"3.6.1": 128}.get(PROTOCOL, 64)
"""GGML_MAX_NAME of the build."""

# The numbers of ggml.h (GGML_TYPE_*), as the library that is loaded has them.
TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q8_1": 9, "Q2_K": 10, "Q3_K": 11,
    "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "Q8_K": 15, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19,
    "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28,
    "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip
for _newer in {"3.6.1": ("Q1_0", "Q2_0")}.get(PROTOCOL, ()):
    del TYPES[_newer]
NAMES = {number: name for name, number in TYPES.items()}
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}

UNARY = (
    "ABS", "SGN", "NEG", "STEP", "TANH", "ELU", "RELU", "SIGMOID", "GELU", "GELU_QUICK", "SILU", "HARDSWISH",
    "HARDSIGMOID", "EXP", "EXPM1", "SOFTPLUS", "GELU_ERF", "XIELU", "FLOOR", "CEIL", "ROUND", "TRUNC",
)  # fmt: skip
GLU = ("REGLU", "GEGLU", "SWIGLU", "SWIGLU_OAI", "GEGLU_ERF", "GEGLU_QUICK", "SWIGLU_CLAMP")

PREC_F32 = 10


class Tensor(c.Structure):
    """struct ggml_tensor (ggml.h)."""


Tensor._fields_ = [
    ("type", c.c_int), ("buffer", c.c_void_p), ("ne", c.c_int64 * 4), ("nb", c.c_size_t * 4), ("op", c.c_int),
    ("op_params", c.c_int32 * 16), ("flags", c.c_int32), ("src", c.POINTER(Tensor) * 10),
    ("view_src", c.POINTER(Tensor)), ("view_offs", c.c_size_t), ("data", c.c_void_p), ("name", c.c_char * MAX_NAME),
    ("extra", c.c_void_p), ("padding", c.c_char * 8),
]  # fmt: skip
P = c.POINTER(Tensor)


class _InitParams(c.Structure):
    _fields_ = (("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool))


class _CpuTypeTraits(c.Structure):
    _fields_ = (
        ("from_float", c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, c.c_int64)), ("vec_dot", c.c_void_p),
        ("vec_dot_type", c.c_int), ("nrows", c.c_int64),
    )  # fmt: skip


class _TypeTraits(c.Structure):
    _fields_ = (
        ("name", c.c_char_p), ("block", c.c_int64), ("interleave", c.c_int64), ("size", c.c_size_t),
        ("is_quantized", c.c_bool), ("to_float", c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, c.c_int64)),
        ("from_float", c.c_void_p),
    )  # fmt: skip


_CODES: dict[str, Any] = {
    "t": P, "i": c.c_int, "l": c.c_int64, "z": c.c_size_t, "f": c.c_float, "b": c.c_bool, "p": c.c_void_p,
    "s": c.c_char_p, "u": c.c_uint32, "B": c.c_uint8, "v": None, "T": c.POINTER(_TypeTraits),
    "C": c.POINTER(_CpuTypeTraits), "Z": c.POINTER(c.c_size_t), "A": c.POINTER(c.c_void_p),
}  # fmt: skip
"""One letter per C type of a signature."""

OPERATIONS = {
    "new_tensor_4d": "illll", "dup": "t", "add": "tt", "add_inplace": "tt", "add_cast": "tti", "add_id": "ttt",
    "acc": "ttzzzz", "acc_inplace": "ttzzzz", "sub": "tt", "sub_inplace": "tt", "mul": "tt", "mul_inplace": "tt",
    "div": "tt", "div_inplace": "tt", "sqr": "t", "sqr_inplace": "t", "sqrt": "t", "sqrt_inplace": "t", "log": "t",
    "log_inplace": "t", "sin": "t", "sin_inplace": "t", "cos": "t", "cos_inplace": "t", "sum": "t", "sum_rows": "t",
    "cumsum": "t", "mean": "t", "argmax": "t", "repeat": "tt", "repeat_4d": "tllll", "concat": "tti",
    "leaky_relu": "tfb", "unary": "ti", "unary_inplace": "ti", "xielu": "tffff", "glu": "tib", "glu_split": "tti",
    "swiglu_oai": "ttff", "swiglu_clamp": "ttf", "norm": "tf", "norm_inplace": "tf", "rms_norm": "tf",
    "rms_norm_inplace": "tf", "group_norm": "tif", "group_norm_inplace": "tif", "l2_norm": "tf",
    "l2_norm_inplace": "tf", "mul_mat": "tt", "mul_mat_id": "ttt", "out_prod": "tt", "scale": "tf",
    "scale_inplace": "tf", "scale_bias": "tff", "scale_bias_inplace": "tff", "set": "ttzzzz", "set_inplace": "ttzzzz",
    "cpy": "tt", "cast": "ti", "cont": "t", "cont_4d": "tllll", "reshape_4d": "tllll", "view_4d": "tllllzzzz",
    "permute": "tiiii", "transpose": "t", "get_rows": "tt", "set_rows": "ttt", "diag_mask_inf": "ti",
    "diag_mask_inf_inplace": "ti", "diag_mask_zero": "ti", "diag_mask_zero_inplace": "ti", "clamp": "tff",
    "clamp_inplace": "tff", "soft_max": "t", "soft_max_inplace": "t", "soft_max_ext": "ttff",
    "soft_max_ext_inplace": "ttff", "rope_ext": "tttiiiffffff", "rope_ext_inplace": "tttiiiffffff",
    "rope_multi": "tttipiiffffff", "rope_multi_inplace": "tttipiiffffff",
    "im2col": "ttiiiiiibi", "conv_2d": "ttiiiiii", "conv_2d_direct": "ttiiiiii", "conv_2d_dw_direct": "ttiiiiii",
    "conv_transpose_2d_p0": "tti", "pool_2d": "tiiiiiff", "interpolate": "tllllu", "pad_ext": "tiiiiiiii",
    "pad_ext_circular": "tiiiiiiii", "roll": "tiiii", "tri": "ti", "fill": "tf", "fill_inplace": "tf",
    "timestep_embedding": "tii", "argsort": "ti", "arange": "fff", "flash_attn_ext": "ttttfff",
    "add1": "tt", "add1_inplace": "tt", "count_equal": "tt", "top_k": "ti", "diag": "t", "conv_1d": "ttiii",
    "conv_2d_dw": "ttiiiiii", "conv_3d": "ttliiiiiiiii", "im2col_3d": "ttliiiiiiiiii",
    "conv_3d_direct": "ttiiiiiiiiiiii", "conv_transpose_1d": "ttiii", "col2im_1d": "tiii", "pool_1d": "tiiii",
    "pad_reflect_1d": "tii", "win_part": "ti", "win_unpart": "tiii", "get_rel_pos": "tii", "add_rel_pos": "ttt",
    "add_rel_pos_inplace": "ttt",
    "ssm_conv": "tt", "ssm_scan": "tttttttl", "rwkv_wkv6": "tttttt", "rwkv_wkv7": "ttttttt",
    "gated_linear_attn": "tttttf", "gated_delta_net": "ttttttl", "solve_tri": "ttbbb", "lightning_indexer": "tttt",
    "dsv4_hc_comb": "tttfi", "dsv4_hc_pre": "tt", "dsv4_hc_pre_gated": "ttf", "dsv4_hc_post": "tttt",
    "silu_back": "tt", "rms_norm_back": "ttf", "soft_max_ext_back": "ttff", "rope_ext_back": "tttiiiffffff",
    "repeat_back": "tt", "get_rows_back": "ttt", "cross_entropy_loss": "tt", "cross_entropy_loss_back": "ttt",
    "opt_step_sgd": "ttt", "opt_step_adamw": "ttttt", "im2col_back": "ttpiiiiiib", "pool_2d_back": "ttiiiiiff",
}  # fmt: skip
"""ggml_<name>(context, …) → tensor: the arguments after the context."""

FUNCTIONS = {
    "ggml_init": ("p", None), "ggml_free": ("v", "p"), "ggml_tensor_overhead": ("z", ""), "ggml_nbytes": ("z", "t"),
    "ggml_graph_overhead_custom": ("z", "zb"), "ggml_new_graph_custom": ("p", "pzb"),
    "ggml_build_forward_expand": ("v", "pt"), "ggml_build_forward_select": ("t", "pAii"),
    "ggml_graph_n_nodes": ("i", "p"), "ggml_graph_node": ("t", "pi"), "ggml_set_output": ("v", "t"),
    "ggml_set_param": ("v", "t"), "ggml_set_name": ("t", "ts"), "ggml_op_desc": ("s", "t"), "ggml_op_name": ("s", "i"),
    "ggml_get_type_traits": ("T", "i"), "ggml_get_type_traits_cpu": ("C", "i"),
    "ggml_quantize_requires_imatrix": ("b", "i"), "ggml_quantize_chunk": ("z", "ipplllp"),
    "ggml_prec_set_acc": ("b", "ti"),
    "ggml_flash_attn_ext_add_sinks": ("v", "tt"), "ggml_soft_max_add_sinks": ("v", "tt"),
    "ggml_rope_set_offset": ("t", "ti"), "ggml_backend_cpu_init": ("p", ""),
    "ggml_backend_cpu_set_n_threads": ("v", "pi"), "ggml_backend_free": ("v", "p"),
    "ggml_backend_supports_op": ("b", "pt"), "ggml_backend_alloc_ctx_tensors": ("p", "pp"),
    "ggml_backend_get_default_buffer_type": ("p", "p"), "ggml_backend_graph_compute": ("i", "pp"),
    "ggml_backend_tensor_set": ("v", "tpzz"), "ggml_backend_tensor_get": ("v", "tpzz"),
    "ggml_backend_tensor_set_2d": ("v", "tpzzzzz"), "ggml_backend_tensor_get_2d": ("v", "tpzzzzz"),
    "ggml_backend_tensor_memset": ("v", "tBzz"), "ggml_backend_tensor_copy": ("v", "tt"),
    "ggml_backend_buffer_clear": ("v", "pB"), "ggml_backend_buffer_free": ("v", "p"),
    "ggml_backend_buffer_set_usage": ("v", "pi"), "ggml_backend_buft_alloc_buffer": ("p", "pz"),
    "ggml_backend_buft_get_alignment": ("z", "p"), "ggml_backend_buft_get_max_size": ("z", "p"),
    "ggml_backend_buft_get_alloc_size": ("z", "pt"), "ggml_backend_dev_by_type": ("p", "i"),
    "ggml_backend_get_device": ("p", "p"), "ggml_backend_dev_memory": ("v", "pZZ"),
    "ggml_backend_reg_dev_count": ("z", "p"), "ggml_gallocr_new": ("p", "p"), "ggml_gallocr_alloc_graph": ("b", "pp"),
    "ggml_gallocr_free": ("v", "p"), "ggml_backend_sched_new": ("p", "AAizbb"), "ggml_backend_sched_free": ("v", "p"),
    "ggml_backend_sched_alloc_graph": ("b", "pp"), "ggml_backend_sched_graph_compute": ("i", "pp"),
    "ggml_backend_rpc_init": ("p", "su"), "ggml_backend_rpc_add_server": ("p", "s"),
    "ggml_backend_rpc_start_server": ("v", "sszzA"),
}  # fmt: skip
"""Name → (result, arguments), a letter for each."""


class MissingLibrary(Exception):
    """The libraries have not been built."""


@cache
def library() -> Any:
    """The loaded library with typed functions. Raises :class:`MissingLibrary`."""
    found = sorted(FOLDER.glob("libggml.*"))
    if not found:
        raise MissingLibrary(f"no ggml libraries in {FOLDER}: `make interop` (or tools/native_ggml.py) builds them")
    # Each needs those before it, and not every build says where these are: what is loaded already is not looked for.
    parts = [*(next(FOLDER.glob(f"libggml-{part}.*")) for part in ("base", "cpu", "rpc")), found[0]]
    lib = [c.CDLL(str(part)) for part in parts][-1]
    for name, (result, arguments) in FUNCTIONS.items():
        if function := getattr(lib, name, None):  # what an older one lacks fails when it is used
            function.restype = _CODES[result]
            function.argtypes = [_InitParams] if arguments is None else [_CODES[code] for code in arguments]
    for name, arguments in OPERATIONS.items():
        if function := getattr(lib, f"ggml_{name}", None):
            function.restype = P
            function.argtypes = [c.c_void_p, *(_CODES[code] for code in arguments)]
    return lib


@contextmanager
def chosen(protocol: str) -> Iterator[None]:
    """Processes that are started in here use the ggml that speaks ``protocol``."""
    before = os.environ.get(CHOOSE, NEWEST)
    os.environ[CHOOSE] = protocol
    try:
        yield
    finally:
        os.environ[CHOOSE] = before


class Context:
    """A ggml_context that holds no data. Operations are methods: ``context.mul_mat(a, b)``."""

    def __init__(self, tensors: int = 4096) -> None:
        lib = library()
        size = tensors * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(tensors, False)
        self.pointer = lib.ggml_init(_InitParams(size, None, True))
        self._tensors = tensors

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        if operation not in OPERATIONS:
            raise AttributeError(operation)
        function = getattr(library(), f"ggml_{operation}")
        return lambda *arguments: function(self.pointer, *arguments)

    def tensor(self, type: str, *ne: int) -> Any:
        return self.new_tensor_4d(TYPES[type], *(*ne, 1, 1, 1)[:4])

    def graph(self, *results: Any) -> int:
        """A ggml_cgraph that computes ``results`` in this order."""
        lib = library()
        graph: int = lib.ggml_new_graph_custom(self.pointer, self._tensors, False)
        for result in results:
            lib.ggml_build_forward_expand(graph, result)
        return graph

    def free(self) -> None:
        library().ggml_free(self.pointer)


def nodes(graph: int) -> list[Any]:
    lib = library()
    return [lib.ggml_graph_node(graph, i) for i in range(lib.ggml_graph_n_nodes(graph))]


def describe(tensor: Any) -> str:
    """Operation, type and shape of a tensor and of its sources."""
    t = tensor.contents
    sources = ", ".join(_brief(source.contents) for source in t.src if source)
    return f"{library().ggml_op_desc(tensor).decode()}({sources}) → {_brief(t)}"


def _brief(t: Tensor) -> str:
    strides = list(t.nb)
    return f"{NAMES.get(t.type, t.type)}{list(t.ne)}" + (f" strides {strides}" if t.view_src else "")


def encode(type: str, values: np.ndarray) -> bytes:
    """The bytes of a contiguous tensor of ``type`` that holds ``values`` (shape: ne reversed)."""
    if type in DTYPES:
        return values.astype(DTYPES[type]).tobytes()
    source = np.ascontiguousarray(values, dtype="<f4")
    rows, columns = source.size // source.shape[-1], source.shape[-1]
    traits = library().ggml_get_type_traits(TYPES[type]).contents
    out = c.create_string_buffer(rows * columns // traits.block * traits.size)
    alike = np.ones(columns, np.float32)  # types of some two bits want to know how important each column is
    importance = alike.ctypes.data if library().ggml_quantize_requires_imatrix(TYPES[type]) else None
    library().ggml_quantize_chunk(TYPES[type], source.ctypes.data, out, 0, rows, columns, importance)
    return out.raw


SLOW_TO_MAKE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"})
"""Types that ggml quantizes to by searching tables that it takes half a minute to set up."""
SCALE = np.float16(0.05)


def noise(type: str, elements: int, rng: np.random.Generator) -> bytes:
    """Random blocks of one of :data:`SLOW_TO_MAKE`: any bits will do, but for the scale, which must be a sane number.
    It comes first; in IQ1_M it lies in the top bits of the last four words."""
    traits = library().ggml_get_type_traits(TYPES[type]).contents
    blocks = rng.integers(0, 256, (elements // traits.block, traits.size), np.uint8)
    if type == "IQ1_M":
        words = blocks[:, -8:].view("<u2")
        nibbles = int(SCALE.view(np.uint16)) >> np.arange(0, 16, 4) & 15
        words[:] = words & 0x0FFF | nibbles << 12
    else:
        blocks[:, :2] = np.frombuffer(SCALE.tobytes(), np.uint8)
    return blocks.tobytes()


def decode(type: str, data: bytes) -> np.ndarray:
    """The numbers in contiguous bytes of ``type``, flat: integers as int64, everything else as float32."""
    if type in DTYPES:
        values = np.frombuffer(data, DTYPES[type])
        return values.astype(np.int64 if values.dtype.kind == "i" else np.float32)
    traits = library().ggml_get_type_traits(TYPES[type]).contents
    values = np.empty(len(data) // traits.size * traits.block, np.float32)
    traits.to_float(c.create_string_buffer(data, len(data)), values.ctypes.data, values.size)
    return values


def write(tensor: Any, data: bytes, offset: int = 0) -> None:
    library().ggml_backend_tensor_set(tensor, data, offset, len(data))


def read(tensor: Any, offset: int = 0, size: int | None = None) -> bytes:
    """Bytes of a tensor's memory, by default all from its first to its last element."""
    size = library().ggml_nbytes(tensor) - offset if size is None else size
    out = c.create_string_buffer(size)
    library().ggml_backend_tensor_get(tensor, out, offset, size)
    return out.raw


def values(tensor: Any) -> np.ndarray:
    """The numbers of a tensor with any strides, in the shape ``ne`` reversed."""
    t = tensor.contents
    kind, ne, nb = NAMES[t.type], tuple(t.ne)[::-1], tuple(t.nb)[::-1]
    traits = library().ggml_get_type_traits(t.type).contents
    data = read(tensor)
    if traits.block == 1:
        whole = np.frombuffer(data, np.dtype((np.void, traits.size)), len(data) // traits.size)
        data = np.lib.stride_tricks.as_strided(whole, ne, nb).tobytes()
    return decode(kind, data).reshape(ne)


def cpu(threads: int = 1) -> int:
    """A CPU backend."""
    backend: int = library().ggml_backend_cpu_init()
    library().ggml_backend_cpu_set_n_threads(backend, threads)
    return backend


def serve(endpoint: str, devices: int = 1, threads: int = 1, cache: str | None = None) -> None:
    """ggml's own RPC server, offering the CPU ``devices`` times, with a folder for its cache. Never returns; aborts the
    process on errors."""
    device = library().ggml_backend_dev_by_type(0)
    folder = None if cache is None else cache.encode()
    library().ggml_backend_rpc_start_server(endpoint.encode(), folder, threads, devices, pointers([device] * devices))


def pointers(items: Sequence[int]) -> Any:
    return (c.c_void_p * len(items))(*items)
