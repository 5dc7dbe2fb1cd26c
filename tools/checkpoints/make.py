"""A family's checkpoint in one of the forms that models are shared in, and a pipeline with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from . import formats, names
from .families import FAMILIES, Component, Family, not_initialized, saved_tensors
from .files import Planned, as_rows_of_256, write_gguf, write_json, write_safetensors, write_shards
from .names import Entry, Naming, Shape
from .numbers import PLAIN, Stored, as_stored, decoded, encoded, random_weight, stored_type
from .tokenizers import (
    QwenProcessor,
    clip_tokenizer,
    gemma_entries,
    gemma_pieces,
    gemma_tokenizer,
    mistral_tokenizer,
    qwen_tokenizer,
    t5_tokenizer,
    umt5_tokenizer,
    vocabulary_entries,
)

SEED = 0

_NEVER_IN_BLOCKS = ("attn_rel_b.weight", "pos_embed")
"""What converters leave in F16: T5's distances, SD 3's positions."""


def _as_it_is(_shape: Shape) -> Shape | None:
    return None


@dataclass(frozen=True)
class Filed:
    """A component as one form of file has it: which names, which format, which shapes differ, whether with the tensors
    that the class does not use."""

    component: Component
    naming: Naming
    type: str
    seed: int
    reshaped: Callable[[Shape], Shape | None] = field(default=_as_it_is)
    unused: bool = False

    def shapes(self) -> dict[str, Shape]:
        """Of the tensors by the class's names."""
        shapes = self.component.shapes()
        return shapes if self.unused else {name: s for name, s in shapes.items() if name not in self.component.unused}

    def planned(self) -> list[Planned]:
        """The file's tensors."""
        shapes = self.shapes()
        planned = []
        for entry, shape, kind in self._entries(shapes):
            if kind not in formats.FORMATS:
                planned.append(Planned(entry.name, kind, shape, partial(self._stored, entry, shape, kind, shapes)))
                continue
            for ending, tensor in self._quantized(entry, shape, kind, shapes).tensors.items():
                part = as_stored(tensor)
                name = entry.name.removesuffix(".weight") + ending
                planned.append(Planned(name, part.type, part.shape, partial(_same, part)))
        return planned

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The class's tensors with the numbers that the file holds, float32."""
        shapes = self.shapes()
        for entry, shape, kind in self._entries(shapes):
            if kind in formats.FORMATS:
                numbers = self._quantized(entry, shape, kind, shapes).numbers
            else:
                numbers = decoded(self._stored(entry, shape, kind, shapes))
            numbers = numbers.reshape(entry.shape(shapes))
            parts = entry.layout.split(numbers, [shapes[source] for source in entry.sources])
            yield from zip(entry.sources, parts, strict=True)

    def original_shapes(self) -> dict[str, Shape]:
        """Of the tensors that the file has with another shape."""
        shapes = self.shapes()
        found = {entry.name: (entry.shape(shapes), shape) for entry, shape, _ in self._entries(shapes)}
        return {name: original for name, (original, shape) in found.items() if original != shape}

    def _entries(self, shapes: Mapping[str, Shape]) -> Iterator[tuple[Entry, Shape, str]]:
        """Each tensor with the shape and the format that the file has it in."""
        for entry in self.naming(shapes):
            shape = entry.shape(shapes)
            shape = self.reshaped(shape) or shape
            in_blocks = not entry.name.endswith(_NEVER_IN_BLOCKS)
            if in_blocks and self.type in formats.FORMATS and formats.fits(self.type, entry.name, shape):
                yield entry, shape, self.type
            else:
                yield (
                    entry,
                    shape,
                    stored_type(self.type if in_blocks or self.type in PLAIN else "F16", shape, entry.name),
                )

    def _stored(self, entry: Entry, shape: Shape, kind: str, shapes: Mapping[str, Shape]) -> Stored:
        return encoded(self._random(entry, shape, shapes), kind, f"{self.seed} {self.component.name}.{entry.name}")

    def _quantized(self, entry: Entry, shape: Shape, kind: str, shapes: Mapping[str, Shape]) -> formats.Quantized:
        return formats.FORMATS[kind][0](self._random(entry, shape, shapes))

    def _random(self, entry: Entry, shape: Shape, shapes: Mapping[str, Shape]) -> Tensor:
        name = self.component.name
        sources = [random_weight(f"{name}.{source}", shapes[source], self.seed) for source in entry.sources]
        return entry.layout.join(sources).reshape(shape)


@dataclass(frozen=True)
class Made:
    """A checkpoint that was written.

    ``files``: its file or directory as ``model``, or a file for each component by the component's name.
    """

    family: Family
    size: str
    form: str
    type: str
    files: dict[str, Path]
    filed: tuple[Filed, ...]

    def component(self, name: str) -> Any:
        """A component's module with the numbers that the files hold, float32, ready to be called."""
        filed = next(filed for filed in self.filed if filed.component.name == name)
        return _module(filed)

    def pipeline(self) -> Any:
        """Diffusers' pipeline with the numbers that the files hold, float32."""
        modules = {filed.component.folder: _module(filed) for filed in self.filed}
        return self.family.pipeline(**modules, **_tokenizers(self.family), **_rest(self.family))


def _module(filed: Filed) -> Any:
    with not_initialized():
        module = filed.component.build().float()
    parameters = saved_tensors(module)
    with torch.no_grad():
        for name, numbers in filed.weights():
            if name in parameters:
                parameters.pop(name).copy_(numbers)
    if parameters:
        raise AssertionError(f"{filed.component.name}: nothing made {', '.join(parameters)}")
    return module.eval().requires_grad_(False)


def _tokenizers(family: Family) -> dict[str, Any]:
    if family.name.startswith("flux1"):
        return {"tokenizer": clip_tokenizer(), "tokenizer_2": t5_tokenizer()}
    if family.name == "chroma" or family.name.startswith(("pixart", "ltx-video")):
        return {"tokenizer": t5_tokenizer()}
    if family.name in ("z-image", "qwen-image", "qwen-image-edit", "krea2") or family.name.startswith("flux2-klein"):
        return {"tokenizer": qwen_tokenizer()}
    if family.name.startswith("wan"):
        return {"tokenizer": umt5_tokenizer()}
    if family.name == "flux2-dev":
        return {"tokenizer": mistral_tokenizer()}
    if family.name == "lumina2" or family.name.startswith(("sana", "ltx2")):
        return {"tokenizer": gemma_tokenizer()}
    if family.name == "sdxl":
        return {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer("!")}
    if family.name.startswith("sd3"):
        both = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer("!")}
        return both | ({"tokenizer_3": t5_tokenizer()} if _has_t5(family) else {})
    return {"tokenizer": clip_tokenizer("!" if family.name.startswith("sd2") else "<|endoftext|>")}


def _has_t5(family: Family) -> bool:
    return any(component.name == "t5xxl" for component in family.components["tiny"])


def _rest(family: Family) -> dict[str, Any]:
    """A pipeline's arguments beside modules and tokenizers."""
    scheduler = family.scheduler()
    if family.pipeline.__name__ == "StableDiffusionPipeline":
        nothing = {"safety_checker": None, "feature_extractor": None}
        return {"scheduler": scheduler, **nothing, "requires_safety_checker": False}
    if family.name == "wan2.2-a14b":
        return {"scheduler": scheduler, "boundary_ratio": 0.875}
    if family.name == "wan2.2-i2v":
        unseen = {"image_encoder": None, "image_processor": None}
        return {"scheduler": scheduler, "boundary_ratio": 0.9, **unseen}
    if family.name in ("wan2.1-i2v", "wan2.1-flf2v"):
        return {"scheduler": scheduler, "image_processor": CLIPImageProcessorPil()}
    if family.name == "wan2.2-5b":
        return {"scheduler": scheduler, "expand_timesteps": True}
    if family.name == "sdxl":
        return {"scheduler": scheduler, "add_watermarker": False}
    if family.name == "qwen-image-edit":
        return {"scheduler": scheduler, "processor": QwenProcessor()}
    if family.name.startswith("flux2-klein"):
        return {"scheduler": scheduler, "is_distilled": False}
    if family.name.startswith("sd3") and not _has_t5(family):
        return {"scheduler": scheduler, "text_encoder_3": None, "tokenizer_3": None}
    return {"scheduler": scheduler}


def make(
    family: str,
    folder: Path,
    *,
    form: str = "safetensors",
    type: str = "F16",
    size: str = "tiny",
    seed: int = SEED,
    types: Mapping[str, str] | None = None,
    sizes: Mapping[str, str] | None = None,
) -> Made:
    """Write a checkpoint of ``family`` into ``folder`` (made if missing).

    ``type`` is the number format of its matrices; ``types`` overrides it for components by name, as ``sizes`` does with
    ``size`` (widths that components share have to be the same in both). In safetensors files the format is one of F32,
    F16, BF16, F8_E4M3, F8_E5M2, or of those of several tensors (:data:`.formats.FORMATS`); in GGUF files neither F8 nor
    these, but any that the gguf library can write, Q2_K … Q6_K, IQ4_NL and IQ4_XS, and ``mixed``: another one for each
    tensor. Raises :class:`ValueError` for what does not exist.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family}: there are {', '.join(FAMILIES)}")
    if form not in FORMS:
        raise ValueError(f"form {form}: there are {', '.join(FORMS)}")
    chosen = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    components = {c: (types or {}).get(c.name, type) for c in components_of(chosen, size, sizes or {})}
    files, filed = FORMS[form](chosen, folder, components, seed)
    return Made(chosen, size, form, type, files, filed)


def write_zeros(family: str, path: Path, *, type: str = "F16", size: str = "full") -> None:
    """A whole model of plain numbers in one safetensors file, all of them zero: however large it is, it takes no room
    on a disk that has sparse files."""
    components = dict.fromkeys(components_of(FAMILIES[family], size, {}), type)
    write_safetensors(path, _planned(_whole(components, SEED)), zeros=True)


def components_of(family: Family, size: str, sizes: Mapping[str, str]) -> list[Component]:
    """Its components in ``size``, those named in ``sizes`` in another one."""
    return [
        next(other for other in family.of_size(sizes.get(usual.name, size)) if other.name == usual.name)
        for usual in family.of_size(size)
    ]


Written = tuple[dict[str, Path], tuple[Filed, ...]]
Components = Mapping[Component, str]
"""Components with their number format."""


def _extras(family: Family) -> list[Planned]:
    """The tensors of whole files that belong to no class."""
    planned = []
    for name, value in family.extras.items():
        tensor = value()
        stored = encoded(tensor, "I64" if tensor.dtype == torch.int64 else "F32", name)
        planned.append(Planned(name, stored.type, stored.shape, partial(_same, stored)))
    return planned


def _vocabulary(prefix: str) -> Planned:
    """The tensor that ComfyUI's files of Gemma have for their vocabulary."""
    stored = as_stored(torch.frombuffer(bytearray(gemma_pieces()), dtype=torch.uint8))
    return Planned(f"{prefix}spiece_model", stored.type, stored.shape, partial(_same, stored))


def _same(stored: Stored) -> Stored:
    return stored


def _whole(components: Components, seed: int) -> tuple[Filed, ...]:
    return tuple(Filed(c, c.whole, kind, seed, unused=True) for c, kind in components.items())


def _alone(components: Components, seed: int) -> tuple[Filed, ...]:
    return tuple(Filed(c, c.alone, kind, seed, unused=c.name == "diffusion") for c, kind in components.items())


def _write_single(family: Family, folder: Path, components: Components, seed: int) -> Written:
    filed = _whole(components, seed)
    path = folder / f"{family.name}.safetensors"
    vocabularies = [_vocabulary(component.pieces) for component in components if component.pieces]
    write_safetensors(path, [*_planned(filed), *_extras(family), *vocabularies])
    return {"model": path}, filed


def _write_gguf(family: Family, folder: Path, components: Components, seed: int) -> Written:
    filed = _whole(components, seed)
    path = folder / f"{family.name}.gguf"
    write_gguf(path, _planned(filed), architecture=None)
    return {"model": path}, filed


def _write_parts(_family: Family, folder: Path, components: Components, seed: int) -> Written:
    filed = _alone(components, seed)
    files = {one.component.name: folder / f"{one.component.name}.safetensors" for one in filed}
    for one in filed:
        vocabulary = [_vocabulary("")] if one.component.pieces else []
        write_safetensors(files[one.component.name], [*one.planned(), *vocabulary])
    return files, filed


_WITH_VISION = (("qwen-image", "llm"), ("qwen-image-edit", "llm"))
"""Whose language models llama.cpp writes as two files; here they stay one."""


def _write_gguf_parts(family: Family, folder: Path, components: Components, seed: int) -> Written:
    """Kernels of UNets are stored in rows of 256. CLIP and the VAE are F16: nobody shares them in blocks. Language
    models bring their vocabulary along."""
    if family.architecture is None:
        raise ValueError(f"form gguf-parts: ComfyUI's converter does not know {family.name}")
    files, filed = {}, []
    for component, kind in components.items():
        name = component.name
        blocks = name in ("diffusion", "t5xxl", "llm") and (family.name, name) not in _WITH_VISION
        files[name] = path = folder / f"{name}.{'gguf' if blocks else 'safetensors'}"
        if name == "diffusion":
            reshaped = as_rows_of_256 if component.folder == "unet" else _as_it_is
            one = Filed(component, component.alone, kind, seed, reshaped, unused=True)
            write_gguf(path, one.planned(), family.architecture, one.original_shapes())
        elif name == "t5xxl":
            one = Filed(component, names.llama_cpp_t5, kind, seed)
            write_gguf(path, one.planned(), "t5encoder", numbers=_t5_numbers(component))
        elif name == "llm" and blocks:
            architecture = {"flux2-dev": "llama", "lumina2": "gemma2", "ltx2": "gemma3"}.get(family.name, "qwen3")
            one = Filed(component, _LLAMA_CPP[architecture], kind, seed)
            write_gguf(
                path, one.planned(), architecture, numbers=_llm_numbers(component, architecture),
                entries=_VOCABULARIES[architecture](),
            )  # fmt: skip
        else:
            one = Filed(component, component.alone, kind if kind in ("F32", "F16", "BF16") else "F16", seed)
            write_safetensors(path, one.planned())
        filed.append(one)
    return files, tuple(filed)


_LLAMA_CPP: dict[str, Naming] = {
    "llama": names.llama_cpp_mistral, "qwen3": names.llama_cpp_qwen3, "gemma2": names.llama_cpp_gemma2,
    "gemma3": names.llama_cpp_gemma3,
}  # fmt: skip
"""Names of language models by llama.cpp's architecture."""
_VOCABULARIES: dict[str, Callable[[], dict[str, Any]]] = {
    "llama": lambda: vocabulary_entries(mistral_tokenizer(), "tekken"),
    "qwen3": lambda: vocabulary_entries(qwen_tokenizer(), "qwen2"),
    "gemma2": gemma_entries,
    "gemma3": gemma_entries,
}


def _t5_numbers(component: Component) -> dict[str, int]:
    """What llama.cpp's converter says of the model besides its tensors."""
    with torch.device("meta"):
        config = component.build().config
    return {
        "t5encoder.block_count": config.num_layers,
        "t5encoder.embedding_length": config.d_model,
        "t5encoder.feed_forward_length": config.d_ff,
        "t5encoder.attention.head_count": config.num_heads,
        "t5encoder.attention.key_length": config.d_kv,
        "t5encoder.attention.value_length": config.d_kv,
        "t5encoder.attention.relative_buckets_count": config.relative_attention_num_buckets,
    }


def _llm_numbers(component: Component, architecture: str) -> dict[str, float]:
    """What llama.cpp's converter says of a language model besides its tensors and its vocabulary."""
    with torch.device("meta"):
        config = component.build().config
    positions = config.rope_parameters
    numbers = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": positions.get("full_attention", positions)["rope_theta"],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    return {f"{architecture}.{key}": number for key, number in numbers.items()}


def _write_directory(family: Family, folder: Path, components: Components, seed: int, shards: int = 1) -> Written:
    filed = tuple(Filed(c, directory_names(c), kind, seed) for c, kind in components.items())
    index: dict[str, Any] = {"_class_name": family.pipeline.__name__, "_diffusers_version": "0.35.0"}
    for one in filed:
        target = folder / one.component.folder
        library, name, stem = write_configuration(one.component, target)
        index[one.component.folder] = [library, name]
        write_shards(target, stem, one.planned(), shards)
    scheduler = family.scheduler()
    scheduler.save_config(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    for name, tokenizer in _tokenizers(family).items():
        tokenizer.save_pretrained(folder / name)
        index[name] = ["transformers", type(tokenizer).__name__]
    rest = _rest(family)
    index |= {name: [None, None] for name, value in rest.items() if value is None}
    index |= {name: value for name, value in rest.items() if isinstance(value, bool)}
    write_json(folder / "model_index.json", index)
    return {"model": folder}, filed


def write_configuration(component: Component, folder: Path) -> tuple[str, str, str]:
    """A component's config.json into its ``folder``; gives its library, its class and the stem of its files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        module = component.build()
    name = type(module).__name__
    if type(module).__module__.startswith("diffusers."):
        module.save_config(folder)
        return "diffusers", name, "diffusion_pytorch_model"
    module.config.architectures = [name]
    module.config.save_pretrained(folder)
    return "transformers", name, "model"


def directory_names(component: Component) -> Naming:
    """The class's own names; published directories have CLIP's and language models' as those of a file that stands
    alone."""
    as_alone = component.alone in (names.clip, names.clip_vision) or component.name == "llm"
    return component.alone if as_alone else names.unchanged


def _planned(filed: Sequence[Filed]) -> list[Planned]:
    return [tensor for one in filed for tensor in one.planned()]


FORMS: dict[str, Callable[[Family, Path, Components, int], Written]] = {
    "safetensors": _write_single,
    "gguf": _write_gguf,
    "parts": _write_parts,
    "gguf-parts": _write_gguf_parts,
    "diffusers": _write_directory,
    "sharded": partial(_write_directory, shards=2),
}
