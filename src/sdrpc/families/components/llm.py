"""What language models that encode prompts share: names in files, attention heads, templates, hidden states.

Which classes they are is another file's matter (``qwen3.py``). Such a model reads a text from left to right, so what
stands behind a text changes nothing of what the diffusion model is told: texts are filled up to a few lengths, so that
few graphs are captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ...errors import InvalidValue
from ...prompts import Template, apply_weights, llm_tokens, number_of
from .. import configs
from ..base import F32, Component, Config, Encode, Found
from ..keys import Table, table

NAME = "llm"
"""Of the component, and of the option that takes its file."""

MOST_LAYERS = 512
"""That a language model may have."""
LENGTHS = 64
"""Texts are filled up to a multiple of so many tokens."""

# Configuration --------------------------------------------------------------------------------------------------------


def inferred(found: Found, head: int) -> dict[str, Any]:
    """Arguments that transformers' classes of language models have in common, from the shapes of the tensors; ``head``
    is the width of an attention head."""
    vocabulary, width = found.shape("embed_tokens.weight", 2)
    queries, _ = found.shape("layers.0.self_attn.q_proj.weight", 2)
    keys, _ = found.shape("layers.0.self_attn.k_proj.weight", 2)
    inner, _ = found.shape("layers.0.mlp.gate_proj.weight", 2)
    if queries % head or keys % head or queries % keys:
        raise found.error(f"has {queries} queries and {keys} keys, which are no heads of {head}")
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": found.count("layers."), "num_attention_heads": queries // head,
        "num_key_value_heads": keys // head, "head_dim": head,
    }  # fmt: skip


def merged(found: Found, config: dict[str, Any], told: Config, architectures: tuple[str, ...]) -> dict[str, Any]:
    """The configuration with what only the file can say: the base of rotary positions and the epsilon of norms.

    ``architectures``: llama.cpp's names of the model; a GGUF file of another one is refused.
    """
    _check_architecture(found, architectures)
    said = {**of_gguf(found), **told}
    positions = said.get("rope_parameters") or said.get("rope_scaling")
    if isinstance(positions, Mapping):
        if positions.get("rope_type", "default") != "default":
            raise found.error(f"positions of kind {positions['rope_type']!r} are not supported")
        said["rope_theta"] = positions.get("rope_theta", said.get("rope_theta"))
    if isinstance(said.get("rope_theta"), int):
        said["rope_theta"] = float(said["rope_theta"])
    return configs.merged(found, config, said, ("rope_theta", "rms_norm_eps"))


def _check_architecture(found: Found, architectures: tuple[str, ...]) -> None:
    name = _architecture(found)
    if name is not None and name not in architectures:
        raise found.error(f"is a model of architecture {name!r}, not a {found.component.title}")


def _architecture(found: Found) -> str | None:
    """That of a GGUF file of llama.cpp's converter; None for other files."""
    metadata = found.checkpoint.metadata
    name = metadata.get("general.architecture")
    return name if f"{name}.block_count" in metadata else None


def of_gguf(found: Found) -> dict[str, Any]:
    """What a GGUF file of llama.cpp's converter says of the model beside its tensors."""
    metadata, name = found.checkpoint.metadata, _architecture(found)
    keys = {"rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
    return {
        ours: _number(found, metadata[f"{name}.{theirs}"])
        for ours, theirs in keys.items()
        if f"{name}.{theirs}" in metadata
    }


def _number(found: Found, text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise found.error(f"{text!r} in the metadata is no number") from error
    if not math.isfinite(number):
        raise found.error(f"{text!r} in the metadata is no number")
    # GGUF has float32, whose 1e-6 is not Python's: the shortest number that is the same in float32 is what was meant
    return float(str(np.float32(number)))


def check_layers(found: Found, config: Config, layers: int) -> None:
    """Raises :class:`CheckpointError` for a model of less than ``layers`` layers."""
    if config["num_hidden_layers"] < layers:
        reason = (
            f"has {config['num_hidden_layers']} layers; what the diffusion model reads is the result of layer {layers}"
        )
        raise found.error(f"the {found.component.title} {reason}")


def reading(component: Component, *states: int) -> Component:
    """``component``, a language model, of whose layers these results are needed, 1 for the first one's, and none behind
    them."""

    def configure(found: Found, told: Config) -> dict[str, Any]:
        config = component.configure(found, told)
        check_layers(found, config, max(states))
        return config

    return replace(component, configure=configure, idle=(*component.idle, *layers_from(max(states))))


def layers_from(first: int) -> tuple[str, ...]:
    """How the names of the tensors of all layers behind ``first`` begin."""
    return tuple(f"layers.{number}." for number in range(first, MOST_LAYERS))


# Texts ----------------------------------------------------------------------------------------------------------------


Beside = Callable[[NDArray[np.int32], Tokenizer], Mapping[str, NDArray[Any]]]
"""What a language model is given beside tokens (1, length): its further inputs."""


def hidden_states(
    encode: Encode,
    prompt: str,
    template: Template,
    tokenizer: Callable[[], Tokenizer],
    states: Sequence[int],
    beside: Beside = lambda *_: {},
) -> F32:
    """A prompt's hidden states (1, tokens, len(states) · hidden_size) in its template, side by side.

    ``states``: the results of layers, the first of which is 1; whether a final norm is behind the last layer's is a
    matter of the model. ``tokenizer``: the family's own, where the file of the model brings none. Raises
    :class:`InvalidValue` for a prompt that can't be read.
    """
    used = encode.tokenizer(NAME) or tokenizer()
    tokens = llm_tokens(prompt, template, used)
    length = tokens.ids.shape[1]
    ids = np.pad(tokens.ids, ((0, 0), (0, -length % LENGTHS)))
    inputs = {"ids": _known(encode, prompt, ids), **beside(ids, used)}
    (hidden,) = encode(NAME, inputs, states=list(states))
    return apply_weights(hidden[0, :length], tokens.weights[0])[None]


def filled(hidden: F32) -> tuple[F32, F32]:
    """Hidden states (1, tokens, width) filled up with zeros to a multiple of :data:`LENGTHS` tokens, and which of them
    are the text's (1, tokens): 1, the others 0."""
    more = -hidden.shape[1] % LENGTHS
    seen = np.pad(np.ones(hidden.shape[:2], np.float32), ((0, 0), (0, more)))
    return np.pad(hidden, ((0, 0), (0, more), (0, 0))), seen


class Padding(NamedTuple):
    """How texts are filled up that a diffusion model sees with their padding: to ``length`` tokens (texts beyond them
    to a multiple of :data:`LENGTHS`) with ``token``, behind the text or, if ``left``, before it."""

    token: str
    length: int
    left: bool = False


def padded_hidden_states(
    encode: Encode,
    prompt: str,
    template: Template,
    tokenizer: Callable[[], Tokenizer],
    states: Sequence[int],
    padding: Padding,
) -> F32:
    """As :func:`hidden_states`, with those of the padding, which no token of the text sees."""
    used = encode.tokenizer(NAME) or tokenizer()
    tokens = llm_tokens(prompt, template, used)
    length = tokens.ids.shape[1]
    more = max(padding.length, length + -length % LENGTHS) - length
    widths = ((0, 0), (more, 0) if padding.left else (0, more))
    ids = np.pad(tokens.ids, widths, constant_values=number_of(used, padding.token))
    weights = np.pad(tokens.weights, widths, constant_values=1)
    seen = np.pad(np.ones(length, bool), widths[1])
    inputs = {"ids": _known(encode, prompt, ids), "mask": causal_mask(seen)}
    if padding.left:
        inputs["seen"] = seen[None].astype(np.float32)
    (hidden,) = encode(NAME, inputs, states=list(states))
    return apply_weights(hidden[0], weights[0])[None]


def causal_mask(seen: NDArray[np.bool_]) -> F32:
    """What is added to scores (1, 1, tokens, tokens) where each token sees those before it and itself, if they are
    ``seen`` (tokens,): 0, else -inf. A token that would see nothing at all sees itself."""
    sees = np.tri(len(seen), dtype=bool) & seen
    sees |= np.eye(len(seen), dtype=bool) & ~sees.any(1, keepdims=True)
    mask: F32 = np.where(sees, np.float32(0), np.float32(-np.inf))[None, None]
    return mask


def _known(encode: Encode, prompt: str, ids: NDArray[np.int32]) -> NDArray[Any]:
    """``ids``. Raises :class:`InvalidValue` where the model has no such token."""
    words, largest = encode.config(NAME)["vocab_size"], int(ids.max())
    if largest >= words:
        reason = f"has the token {largest}, but the language model knows {words}: its tokenizer is another model's"
        raise InvalidValue("prompt", prompt, reason)
    return ids


# Names ----------------------------------------------------------------------------------------------------------------


def prefixes(*names: str) -> tuple[str, ...]:
    """What may stand before the names of layers. ``names``: of the model in files with all components."""
    whole = [f"text_encoders.{name}.{inner}" for name in names for inner in ("transformer.model.", "model.", "")]
    return (*whole, "text_encoder.model.", "text_encoder.", "model.", "")


def gguf_names(norms: Mapping[str, str]) -> Table:
    """llama.cpp's names of a language model's tensors, as those of transformers' classes without a head. ``norms``: of
    its layers, by llama.cpp's names."""
    return table(
        [
            (r"token_embd\.weight", "embed_tokens.weight"),
            (r"output_norm\.weight", "norm.weight"),
            (r"output\.weight", "lm_head.weight"),
            *(
                (rf"blk\.(\d+)\.{old}\.(weight|bias)", rf"layers.\1.{new}.\2")
                for old, new in {
                    **norms,
                    "attn_q": "self_attn.q_proj",
                    "attn_k": "self_attn.k_proj",
                    "attn_v": "self_attn.v_proj",
                    "attn_q_norm": "self_attn.q_norm",
                    "attn_k_norm": "self_attn.k_norm",
                    "attn_output": "self_attn.o_proj",
                    "ffn_gate": "mlp.gate_proj",
                    "ffn_up": "mlp.up_proj",
                    "ffn_down": "mlp.down_proj",
                }.items()
            ),
        ]
    )


from_gguf = gguf_names({"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"})
"""Those of most models."""
