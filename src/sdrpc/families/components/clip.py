"""CLIP's text encoders: OpenAI's CLIP-L, and OpenCLIP's H and G.

The module is transformers' CLIPTextModelWithProjection for all of them; which hidden states are wanted, and whether the
pooled text is, is part of its configuration.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...checkpoints.expressions import transpose
from ...errors import InvalidValue
from ...ggml.weight import Weight
from ...prompts import Tokens
from .. import configs
from ..base import F32, Component, Config, Encode, Found, Naming
from ..keys import prefixed, same, table, thirds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

HEAD_SIZE = 64
END_OF_TEXT = 49407


def component(name: str, title: str, prefixes: tuple[str, ...], told_as: str, activation: str) -> Component:
    """A CLIP text encoder. ``activation``: quick_gelu for OpenAI's, gelu for OpenCLIP's."""

    def configure(found: Found, told: Config) -> dict[str, Any]:
        return _configure(found, told, activation)

    return Component(name, title, prefixes, _NAMINGS, configure, build, told_as, idle=_IDLE, sometimes=_SOMETIMES)


def _configure(found: Found, told: Config, activation: str) -> dict[str, Any]:
    """Arguments of transformers' CLIPTextConfig."""
    vocabulary, width = found.shape("text_model.embeddings.token_embedding.weight", 2)
    positions, _ = found.shape("text_model.embeddings.position_embedding.weight", 2)
    inner, _ = found.shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)
    projection = found.tensors.get("text_projection.weight")
    inferred = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": found.count("text_model.encoder.layers."), "max_position_embeddings": positions,
        "num_attention_heads": max(1, width // HEAD_SIZE), "hidden_act": activation, "layer_norm_eps": 1e-5,
        "projection_dim": projection.shape[0] if projection is not None and projection.shape else width,
        "eos_token_id": END_OF_TEXT,
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("num_attention_heads", "hidden_act", "layer_norm_eps"))
    configs.check_divides(found, config, "num_attention_heads", [width])
    return config


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: ids, int (1, length), and for learnt words kept and added, as
    :meth:`sdrpc.prompts.learned.Learned.embedded` has them. Outputs: those that ``outputs`` names, in its order.

    ``hidden`` (1, length, width): the result of the layer that ``skip`` counts from the end (1: the last), after the
    final norm if ``final_norm``. ``pooled`` (1, width): the last layer's at the first end token, after the final norm.
    ``projected`` (1, projection_dim): that through the text projection.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    arguments = dict(config)
    outputs, skip, final_norm = (arguments.pop(key) for key in ("outputs", "skip", "final_norm"))
    arguments.pop("missing_layers", None)  # what is not there does not decide the module

    def call(
        module: Any, ids: torch.Tensor, kept: torch.Tensor | None = None, added: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        hooks = []
        if kept is not None and added is not None:
            words = module.text_model.embeddings.token_embedding
            hooks.append(words.register_forward_hook(lambda _module, _ids, vectors: vectors * kept + added))
        text = module.text_model(input_ids=ids, output_hidden_states=True)
        for hook in hooks:
            hook.remove()

        def output(name: str) -> Any:
            if name == "hidden":
                hidden = text.hidden_states[-skip]
                return module.text_model.final_layer_norm(hidden) if final_norm else hidden
            return module.text_projection(text.pooler_output) if name == "projected" else text.pooler_output

        return tuple(map(output, outputs))

    return CLIPTextModelWithProjection(CLIPTextConfig(**arguments)), call


def hidden_states(encode: Encode, name: str, tokens: Tokens, *, skip: int, final_norm: bool) -> list[F32]:
    """Each chunk's hidden states (1, length, width); ``skip`` and ``final_norm`` as in :func:`build`.

    Raises :class:`InvalidValue` when ``skip`` leaves no layer.
    """
    _check_skip(encode, name, skip)
    options = {"outputs": ["hidden"], "skip": skip, "final_norm": final_norm}
    return [encode(name, tokens.learned.embedded(name, ids[None]), **options)[0] for ids in tokens.ids]


def hidden_and_pooled(
    encode: Encode, name: str, tokens: Tokens, *, skip: int, final_norm: bool, pooled: str
) -> tuple[list[F32], F32]:
    """:func:`hidden_states`, and the first chunk's text as the output ``pooled`` (1, width) or ``projected`` (1,
    projection_dim)."""
    _check_skip(encode, name, skip)
    options = {"outputs": ["hidden", pooled], "skip": skip, "final_norm": final_norm}
    first, text = encode(name, tokens.learned.embedded(name, tokens.ids[:1]), **options)
    rest = replace(tokens, ids=tokens.ids[1:], weights=tokens.weights[1:])
    return [first, *hidden_states(encode, name, rest, skip=skip, final_norm=final_norm)], text


def pooled(encode: Encode, name: str, tokens: Tokens) -> F32:
    """The first chunk's text at its end (1, width), without a projection."""
    return encode(name, {"ids": tokens.ids[:1]}, outputs=["pooled"], skip=1, final_norm=True)[0]


def _check_skip(encode: Encode, name: str, skip: int) -> None:
    layers = encode.config(name)["num_hidden_layers"]
    missing = encode.config(name).get("missing_layers", 0)
    if not 1 <= skip <= layers:
        reason = f"{name} has {layers + missing} layers" + (", without the last one in this file" if missing else "")
        raise InvalidValue("clip_skip", skip + missing, reason)


def _transposed(weight: Weight) -> tuple[Weight, ...]:
    return (transpose(weight),)


_LAYER = r"text_model.encoder.layers.\1."

_OPENCLIP = table(
    [
        (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
        (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
        (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
        (r"text_projection", "text_projection.weight", _transposed),
        (r"text_projection\.weight", "text_projection.weight"),
        (r"logit_scale", "logit_scale"),
        *(
            (
                rf"transformer\.resblocks\.(\d+)\.attn\.in_proj_{kind}",
                [rf"{_LAYER}self_attn.{p}_proj.{kind}" for p in "qkv"],
                thirds,
            )
            for kind in ("weight", "bias")
        ),
        *(
            (rf"transformer\.resblocks\.(\d+)\.{old}\.(weight|bias)", rf"{_LAYER}{new}.\2")
            for old, new in {
                r"attn\.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
                r"mlp\.c_fc": "mlp.fc1", r"mlp\.c_proj": "mlp.fc2",
            }.items()
        ),
    ]
)  # fmt: skip

_NAMINGS = (
    Naming("text_model.embeddings.token_embedding.weight", same),
    Naming("embeddings.token_embedding.weight", prefixed("text_model.")),
    Naming("transformer.resblocks.0.ln_1.weight", _OPENCLIP),
)

_IDLE = ("text_model.embeddings.position_ids", "logit_scale")
_SOMETIMES = ("text_projection.", "text_model.encoder.layers.")
"""clip_skip leaves layers out; only some families project the text."""


CLIP_L = component(
    "clip_l",
    "CLIP-L text encoder",
    (
        "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.",
        "text_encoder.", "cond_stage_model.", "clip_l.transformer.", "clip_l.", "te.", "",
    ),
    "text_encoder",
    "quick_gelu",
)  # fmt: skip

CLIP_G = component(
    "clip_g",
    "OpenCLIP-G text encoder",
    (
        "conditioner.embedders.1.model.", "conditioner.embedders.1.transformer.", "cond_stage_model.1.model.",
        "cond_stage_model.1.transformer.", "text_encoders.clip_g.transformer.", "text_encoder_2.",
        "clip_g.transformer.", "clip_g.", "",
    ),
    "text_encoder_2",
    "gelu",
)  # fmt: skip

OPENCLIP_H = component(
    "clip_l",
    "OpenCLIP-H text encoder",
    ("cond_stage_model.model.", "cond_stage_model.transformer.", "text_encoder.", "text_encoders.clip_h.", ""),
    "text_encoder",
    "gelu",
)
"""It stands where other families have CLIP-L, and is given with --clip_l, as in stable-diffusion.cpp."""
