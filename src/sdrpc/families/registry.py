"""Every family that sdrpc draws with, and names by which others are told."""

from __future__ import annotations

from .chroma import CHROMA
from .flux1 import FLUX1
from .flux2 import FLUX2_DEV, FLUX2_KLEIN
from .krea2 import KREA2
from .ltx import LTX_VIDEO
from .ltx2 import LTX2
from .lumina2 import LUMINA2
from .pixart import PIXART_ALPHA, PIXART_SIGMA
from .qwen_image import QWEN_IMAGE
from .sana import SANA
from .sd1 import SD1
from .sd2 import SD2
from .sd3 import SD3
from .sdxl import SDXL
from .wan import WAN
from .zimage import Z_IMAGE

FAMILIES = (
    SD1, SD2, SDXL, SD3, FLUX1, CHROMA, FLUX2_KLEIN, FLUX2_DEV, Z_IMAGE, WAN, QWEN_IMAGE, KREA2, PIXART_SIGMA,
    PIXART_ALPHA, LUMINA2, LTX_VIDEO, LTX2, SANA,
)  # fmt: skip

STRANGERS = (
    (r"\bnerf_blocks\.", "Chroma Radiance"),
    (r"\btime_mixer\.mix_factor|\btime_mix_blocks", "Stable Video Diffusion"),
    (r"\bvace_blocks\.|\bvace_patch_embedding\.", "Wan VACE"),
    (r"\bface_adapter\.|\bmotion_encoder\.", "Wan Animate"),
    (r"\bcasual_audio_encoder\.", "Wan S2V"),
    (r"\bcaption_projection\.0\.linear\.", "HiDream"),
    (r"\bcontrol_model\.|\bcontrolnet_cond_embedding|\bcontrolnet_x_embedder\.|\bpos_embed_input\.", "a ControlNet"),
    (r"\blora_(up|down|A|B)\b|\blora_unet_", "a LoRA"),
    (r"(?m)^(emb_params|string_to_param.*|clip_[lg])$", "a learnt word (textual inversion)"),
    (r"\bRDB1\.conv1\.|\brdb1\.conv1\.|\bparams_ema\.", "a network that enlarges pictures"),
    (r"\bto_k_ip\.|\bip_adapter\.", "an IP-Adapter"),
    (r"\bmotion_modules\.", "a motion module (AnimateDiff)"),
)
"""Models that sdrpc does not draw with, by a name that only they have, in the order in which they are told apart."""

GO_WITH = {
    "a ControlNet": "control_net",
    "a LoRA": "<lora:NAME:1> in a prompt",
    "a learnt word (textual inversion)": "its name in a prompt (embd_dir)",
    "a network that enlarges pictures": "upscale_model",
}
"""Those that go with a model, and how they are named there."""
