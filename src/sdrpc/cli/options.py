"""sd-cli's options as a table, and those of stable-diffusion.cpp's sd-cli that it does not have.

Options that set a field of :class:`sdrpc.diffusion.request.Request` or :class:`sdrpc.families.model.ModelFiles` have
its name. An option of stable-diffusion.cpp's sd-cli that sdrpc does not have is refused by name, never ignored.
"""

from __future__ import annotations

import click

from ..client import DEFAULT_TIMEOUTS
from ..device import PRECISIONS
from ..diffusion.caching import MODES as MODES_OF_CACHE
from ..diffusion.caching import POLICIES
from ..diffusion.hires import UPSCALERS as HIRES
from ..diffusion.predictions import PREDICTIONS
from ..diffusion.previews import MODES as PREVIEWS
from ..diffusion.request import APPLY_MODES
from ..diffusion.rng import RNGS
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedules import ALIASES, SCHEDULES
from ..runtime.lost import RETRY_SECONDS
from .command import GIVEN, SHELLS, Option
from .metadata import FORMATS as METADATA_FORMATS
from .output import DEFAULT_OUTPUT
from .values import File, Numbers, OneOf, OnOff, Seconds, Sides

MODES = ("img_gen", "vid_gen", "upscale", "convert", "metadata")
"""What a command does, by stable-diffusion.cpp's names."""

MODEL, PICTURE, INPUT, SAMPLING = "Model", "Picture", "Pictures as input", "Sampling"
DEVICES, OUTPUT, ABOUT = "Devices", "Output", "About"

FILE = File()

OPTIONS = (
    Option(MODEL, "-m", "--model", type=FILE, metavar="PATH", shown="demo, which ships with sdrpc",
           help="Whole model: .safetensors, .gguf, a diffusers directory, or a name: demo."),
    Option(MODEL, "--diffusion-model", type=FILE, metavar="PATH",
           help="Diffusion model (UNet, DiT) from a file of its own."),
    Option(MODEL, "--high-noise-diffusion-model", type=FILE, metavar="PATH",
           help="Diffusion model for much noise, beside --diffusion-model (Wan 2.2 A14B)."),
    Option(MODEL, "--vae", type=FILE, metavar="PATH", help="VAE from a file of its own."),
    Option(MODEL, "--clip_l", type=FILE, metavar="PATH", help="CLIP-L (SD 2: OpenCLIP-H) from a file of its own."),
    Option(MODEL, "--clip_g", type=FILE, metavar="PATH", help="OpenCLIP-G from a file of its own."),
    Option(MODEL, "--t5xxl", type=FILE, metavar="PATH", help="T5-XXL from a file of its own."),
    Option(MODEL, "--llm", "--qwen2vl", type=FILE, metavar="PATH",
           help="Language model that reads the prompt (Qwen3, Mistral) from a file of its own."),
    Option(MODEL, "--llm_vision", "--qwen2vl_vision", type=FILE, metavar="PATH",
           help="What it sees pictures with (mmproj of Qwen2.5-VL), where its own file lacks that."),
    Option(MODEL, "--clip_vision", type=FILE, metavar="PATH",
           help="What Wan 2.1 sees the picture with that a film begins with (OpenCLIP-H)."),
    Option(MODEL, "--embeddings-connectors", "connectors", type=FILE, metavar="PATH",
           help="What is between LTX-2's language model and its diffusion model, where the latter's file lacks that."),
    Option(MODEL, "--audio-vae", type=FILE, metavar="PATH",
           help="What decodes the sound of LTX-2's films, audio VAE and vocoder, where the model's file lacks them."),
    Option(MODEL, "--vocoder", type=FILE, metavar="PATH", help="The vocoder alone, where --audio-vae lacks it."),
    Option(MODEL, "--qwen-image-zero-cond-t", is_flag=True,
           help="The diffusion model is Qwen-Image-Edit 2511, whose file does not say so (some GGUF files)."),
    Option(MODEL, "--control-net", type=FILE, metavar="PATH",
           help="ControlNet for Stable Diffusion 1.x, 2.x and XL, or FLUX.1; with --control-image."),
    Option(MODEL, "--embd-dir", type=FILE, metavar="PATH",
           help="Folder with learnt words (textual inversion), which prompts use by name."),
    Option(MODEL, "--lora-model-dir", type=FILE, metavar="PATH", default=".",
           help="Folder with LoRAs, which a prompt applies by name: <lora:name:0.8>."),
    Option(MODEL, "--lora-apply-mode", type=OneOf(*APPLY_MODES), metavar="|".join(APPLY_MODES), default="auto",
           help="LoRAs merged into weights before they are sent, or beside them while drawing; auto: at_runtime."),
    Option(MODEL, "--type", default="", metavar="NAME", shown="as they are",
           help="Type of matrices, such as q8_0, into which they are made while they are sent (or converted)."),
    Option(MODEL, "--tensor-type-rules", default="", metavar="PATTERN=TYPE,...", shown="none",
           help=r"Other types for tensors with such names, such as ^vae\.=f16,ffn=q4_0."),
    Option(MODEL, "--taesd", "--tae", type=FILE, metavar="PATH",
           help="Tiny autoencoder (TAESD, TAESDXL, TAESD3, TAEF1), which decodes instead of the VAE."),
    Option(MODEL, "--taesd-preview-only", is_flag=True, help="Let it make previews alone."),
    Option(MODEL, "--vae-tiling", is_flag=True,
           help="Let the VAE work in tiles; where memory would not do for the whole picture it does so anyway."),
    Option(MODEL, "--vae-tile-size", type=Sides(), metavar="WIDTHxHEIGHT", default="32x32",
           help="Of a tile, in latents."),
    Option(MODEL, "--vae-tile-overlap", type=float, metavar="0..0.9", default=0.5,
           help="Share of a tile's side that is the next one's as well."),
    Option(MODEL, "--hires-upscalers-dir", type=FILE, metavar="PATH",
           help="Folder of networks that enlarge pictures: ESRGAN and others that spandrel reads."),

    Option(PICTURE, "-p", "--prompt", metavar="TEXT", help="What to draw."),
    Option(PICTURE, "--prompt-file", type=FILE, metavar="PATH", help="File with the prompt; -: standard input."),
    Option(PICTURE, "-n", "--negative-prompt", metavar="TEXT", help="What not to draw."),
    Option(PICTURE, "--negative-prompt-file", type=FILE, metavar="PATH", help="File with that; -: standard input."),
    Option(PICTURE, "-W", "--width", type=int, metavar="PIXELS", shown="what the model is made for",
           help="Width; with -i that of its picture."),
    Option(PICTURE, "-H", "--height", type=int, metavar="PIXELS", shown="what the model is made for",
           help="Height; with -i that of its picture."),
    Option(PICTURE, "-s", "--seed", type=int, metavar="NUMBER", default=42,
           help="Seed of the noise; below 0: a random one."),
    Option(PICTURE, "-b", "--batch-count", type=int, metavar="NUMBER", default=1,
           help="Pictures, with seeds counting up."),

    Option(INPUT, "-i", "--init-img", "init_image", type=FILE, metavar="PATH", help="Picture to begin with."),
    Option(INPUT, "--end-img", "end_image", type=FILE, metavar="PATH", help="Picture that a film ends with."),
    Option(INPUT, "--strength", type=float, metavar="0..1", default=0.75,
           help="How much noise it gets: 0 leaves it nearly as it is, 1 leaves nothing of it."),
    Option(INPUT, "--mask", type=FILE, metavar="PATH", shown="all of it",
           help="Where it is drawn anew: white; black stays, grey is in between."),
    Option(PICTURE, "--hires", is_flag=True, help="Draw small, enlarge that, and draw on from there in a second pass."),
    Option(PICTURE, "--hires-scale", type=float, metavar="FACTOR", default=2.0, help="How much larger that pass is."),
    Option(PICTURE, "--hires-width", type=int, metavar="PIXELS", help="Its width, instead of a factor."),
    Option(PICTURE, "--hires-height", type=int, metavar="PIXELS", help="Its height, instead of a factor."),
    Option(PICTURE, "--hires-steps", type=int, metavar="NUMBER", default=0,
           help="Steps of the second pass; 0: as many as the first has."),
    Option(PICTURE, "--hires-denoising-strength", type=float, metavar="0..1", default=0.7,
           help="How much noise the enlarged picture gets."),
    Option(PICTURE, "--hires-upscaler", metavar="NAME", default=HIRES[0],
           help=f"How it is enlarged: {', '.join(HIRES)}, or by a network in --hires-upscalers-dir."),
    Option(PICTURE, "--hires-upscale-tile-size", type=int, metavar="PIXELS", default=128,
           help="Side of what goes through that network at once."),
    Option(PICTURE, "--hires-sigmas", type=Numbers(float), metavar="LEVEL,...", default=(),
           help="Levels of noise of the second pass instead of its steps and strength, falling to 0: 5.2,2.1,0."),
    Option(INPUT, "--upscale-model", type=FILE, metavar="PATH",
           help="Network that enlarges pictures, with -M upscale that of -i: ESRGAN and others that spandrel reads."),
    Option(INPUT, "--upscale-repeats", type=int, metavar="NUMBER", default=1,
           help="How often the picture goes through it."),
    Option(INPUT, "--upscale-tile-size", type=int, metavar="PIXELS", default=128,
           help="Side of what goes through it at once."),
    Option(INPUT, "-r", "--ref-image", "ref_images", type=FILE, multiple=True, metavar="PATH",
           help="Picture that the model is shown (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit); repeat it for several."),

    Option(PICTURE, "--video-frames", type=int, metavar="NUMBER", shown="what the model is made for",
           help="Frames of a film; one more than a multiple of 4 (LTX: 8)."),
    Option(PICTURE, "--fps", type=int, metavar="NUMBER", shown="what the model is made for",
           help="Frames of a film that make a second."),
    Option(PICTURE, "--moe-boundary", type=float, metavar="0..1", shown="0.875; image to video: 0.9",
           help="Level of noise from which on --high-noise-diffusion-model predicts."),

    Option(PICTURE, "--high-noise-steps", type=int, metavar="NUMBER", shown="those from --moe-boundary on",
           help="Steps of its own, before the --steps of --diffusion-model."),
    Option(PICTURE, "--high-noise-cfg-scale", type=float, metavar="FACTOR", shown="as --cfg-scale",
           help="How strongly it follows the prompt."),
    Option(PICTURE, "--high-noise-sampling-method", type=OneOf(*SAMPLERS), metavar="NAME",
           shown="as --sampling-method", help="Sampler of its steps."),
    Option(PICTURE, "--high-noise-eta", type=float, metavar="FACTOR", shown="as --eta",
           help="How much new noise that sampler adds."),

    Option(INPUT, "--control-image", type=FILE, metavar="PATH", help="Picture that the ControlNet is shown."),
    Option(INPUT, "--control-strength", type=float, metavar="FACTOR", default=0.9, shown="0.9",
           help="How much that counts."),
    Option(INPUT, "--control-mode", type=int, metavar="NUMBER",
           help="Which kind of picture that is, for a ControlNet for several (Union)."),
    Option(INPUT, "--canny", is_flag=True, help="Show the ControlNet the edges of the picture."),

    Option(SAMPLING, "--steps", type=int, metavar="NUMBER",
           shown="20; FLUX.1 schnell, FLUX.2 klein: 4; FLUX.2 dev: 28; Z-Image, Krea 2: 8; Lumina 2: 30; LTX-2: 40",
           help="Sampling steps."),
    Option(SAMPLING, "--cfg-scale", type=float, metavar="FACTOR",
           shown="7; FLUX.1, FLUX.2, Z-Image, Krea 2: 1; LTX-Video: 3; Chroma, Qwen-Image, Lumina 2, LTX-2: 4; "
           "PixArt, Sana: 4.5; Wan: 5",
           help="How strongly to follow the prompt; 1: no negative prompt."),
    Option(SAMPLING, "--guidance", type=float, metavar="FACTOR", shown="3.5; FLUX.2 dev: 4",
           help="Guidance of models distilled with it: FLUX.1 dev, FLUX.2 dev."),
    Option(SAMPLING, "--sampling-method", type=OneOf(*SAMPLERS), metavar="NAME",
           shown="euler_a for Stable Diffusion 1.x, 2.x and XL, dpm++2m for PixArt, else euler",
           help=f"One of {', '.join(SAMPLERS)}."),
    Option(SAMPLING, "--scheduler", type=OneOf(*SCHEDULES, *ALIASES), metavar="NAME",
           shown="the sampler's own; LTX-Video, LTX-2: ltx2",
           help=f"Levels of noise: one of {', '.join(SCHEDULES)}."),
    Option(SAMPLING, "--prediction", type=OneOf(*PREDICTIONS), metavar="NAME",
           shown="what its tensors or its file tell", help=f"What the model predicts: {', '.join(PREDICTIONS)}."),
    Option(SAMPLING, "--flow-shift", type=float, metavar="FACTOR", shown="the model's own; FLUX.1 dev: by size",
           help="Shift of a flow model's noise levels."),
    Option(SAMPLING, "--eta", type=float, metavar="FACTOR", shown="the sampler's own",
           help="How much new noise a sampler adds."),
    Option(SAMPLING, "--sigmas", type=Numbers(float), metavar="LEVEL,...", default=(),
           help="Levels of noise instead of --scheduler and --steps, falling to 0: 14.6,7.8,3.5,0."),
    Option(SAMPLING, "--timestep-shift", type=int, metavar="NUMBER", default=0,
           help="Of NitroFusion's models: 250 for Realism, 500 for Vibrant; 0: none."),
    Option(SAMPLING, "--img-cfg-scale", type=float, metavar="FACTOR", shown="as --cfg-scale",
           help="How strongly an inpainting model follows what is around the mask."),
    Option(SAMPLING, "--slg-scale", type=float, metavar="FACTOR", default=0.0,
           help="Skip layer guidance of SD 3.5 medium: 2.5, say; 0: none."),
    Option(SAMPLING, "--skip-layers", type=Numbers(int), metavar="NUMBER,...", default="7,8,9",
           help="Layers that it leaves out."),
    Option(SAMPLING, "--skip-layer-start", type=float, metavar="0..1", default=0.01, help="From where on it is used."),
    Option(SAMPLING, "--skip-layer-end", type=float, metavar="0..1", default=0.2, help="Up to where it is used."),
    Option(SAMPLING, "--cache-mode", type=OneOf(*MODES_OF_CACHE), metavar="|".join(MODES_OF_CACHE),
           default="disabled", help="easycache leaves out steps in which little would change, dbcache blocks of DiTs."),
    Option(SAMPLING, "--cache-option", metavar="NAME=NUMBER,...", default="",
           shown="easycache: threshold=0.2,start=0.15,end=0.95; dbcache: Fn=8,Bn=0,threshold=0.08,warmup=8",
           help="How much may change, and between which steps; or how many blocks in front and at the end and how many "
           "steps at first are always computed. dbcache also: max_cached_steps, max_continuous_cached_steps."),
    Option(SAMPLING, "--scm-mask", metavar="0|1,...", default="",
           help="For dbcache: steps that are computed (1) or may leave out blocks (0)."),
    Option(SAMPLING, "--scm-policy", type=OneOf(*POLICIES), metavar="|".join(POLICIES), default=POLICIES[0],
           help="They do so where little changes, or always."),
    Option(SAMPLING, "--clip-skip", type=int, metavar="NUMBER", default=-1,
           help="2 leaves out CLIP's last layer; below 1: as the model wants it."),
    Option(SAMPLING, "--rng", type=OneOf(*RNGS), metavar="|".join(RNGS), default="cuda",
           help="Where noise comes from."),
    Option(SAMPLING, "--sampler-rng", type=OneOf(*RNGS), metavar="|".join(RNGS), shown="as --rng",
           help="Where the noise comes from that samplers add."),

    Option(DEVICES, "--rpc", "--rpc-servers", multiple=True, metavar="HOST:PORT,...",
           help="Servers whose devices are RPC0, RPC1 ... in the order given; auto: those in this network that "
           "announce themselves and let us in before."),
    Option(DEVICES, "--discover", is_flag=True, help="Print servers of this network that announce themselves."),
    Option(DEVICES, "--rpc-key", multiple=True, metavar="KEY|HOST:PORT=KEY", shown="the one that let us in before",
           help="Key for the servers, or for one of them, as rpc-server printed it there. It is kept: give it once."),
    Option(DEVICES, "--rpc-key-file", multiple=True, type=FILE, metavar="PATH",
           help="The same from a file, one a line, so that no list of processes shows it; also $SDRPC_RPC_KEY."),
    Option(DEVICES, "--rpc-retry", type=Seconds(), metavar="SECONDS", default=RETRY_SECONDS,
           help="How long to wait for a server that is lost; then drawing goes on. 0: that is an error at once."),
    Option(DEVICES, "--rpc-timeout", type=Seconds(1), metavar="SECONDS", default=DEFAULT_TIMEOUTS.answer,
           help="How long a server of ggml's own, which says nothing while it computes, may be silent."),
    Option(DEVICES, "--list-devices", is_flag=True, help="Print all devices and exit."),
    Option(DEVICES, "--backend", default="", metavar="COMPONENT=DEVICE,...",
           shown="RPC0 with --rpc, else this machine's first",
           help="Where components run: RPC0, or te=RPC1,diffusion=RPC0,vae=CPU; also clip_l, clip_g, t5xxl, llm. "
                "RPC0,RPC1: the first with room, the next when it is lost; RPC0&RPC1: layers over both; "
                "RPC0|RPC1: on both, side by side."),
    Option(DEVICES, "--auto-fit", type=OnOff(), metavar="[on|off]", default=False, shown="off",
           help="Put components where they fit and are fast, by measuring, and print that; also --backend auto."),
    Option(DEVICES, "--max-vram", default="", metavar="GIB|DEVICE=SIZE,...", shown="what is free",
           help="Weights that a device may have at one time: 8, or RPC0=6,RPC1=512M; below 0: all but so much of what "
                "is free."),
    Option(DEVICES, "--params-backend", default="", metavar="COMPONENT=auto|cpu|disk,...", shown="auto",
           help="Where weights are that nobody uses: on their device while there is room (auto), in this machine's "
                "memory (cpu), in their file (disk). With the latter two they leave it after each use, and where it "
                "has too little room for a component, its layers are there one part after the other."),
    Option(DEVICES, "--offload-to-cpu", is_flag=True, help="Same as --params-backend cpu."),
    Option(DEVICES, "--main-backend-device", default="", metavar="DEVICE",
           help="Device of components that have none of their own."),
    Option(DEVICES, "--diffusion-backend-device", default="", metavar="DEVICE", help="Device of the diffusion model."),
    Option(DEVICES, "--clip-backend-device", default="", metavar="DEVICE", help="Device of the text encoders."),
    Option(DEVICES, "--vision-backend-device", default="", metavar="DEVICE", help="Device of --clip_vision."),
    Option(DEVICES, "--vae-backend-device", default="", metavar="DEVICE", help="Device of the VAE."),
    Option(DEVICES, "--tae-backend-device", default="", metavar="DEVICE", shown="the VAE's",
           help="Device of the tiny autoencoder."),
    Option(DEVICES, "--control-net-backend-device", default="", metavar="DEVICE", help="Device of the ControlNet."),
    Option(DEVICES, "--control-net-cpu", is_flag=True, help="Same as --control-net-backend-device CPU."),
    Option(DEVICES, "--upscaler-backend-device", default="", metavar="DEVICE", help="Device of the upscaler."),
    Option(DEVICES, "--clip-on-cpu", is_flag=True, help="Same as --clip-backend-device CPU."),
    Option(DEVICES, "--vae-on-cpu", is_flag=True, help="Same as --vae-backend-device CPU."),
    Option(DEVICES, "-t", "--threads", type=int, metavar="NUMBER", default=-1,
           help="Threads of this machine's CPU; below 1: all."),
    Option(DEVICES, "--precision", type=OneOf(*PRECISIONS), metavar="|".join(PRECISIONS), default="auto",
           help="How this machine's devices compute; auto: fast where the hardware is made for it."),

    Option(OUTPUT, "-o", "--output", type=FILE, metavar="PATH", default=DEFAULT_OUTPUT,
           help="Picture: .png, .jpg or .webp; %d or %03d numbers several; -: PNG to standard output. "
           "Film: .mp4, .webm, .avi, .webp, .gif, or frames: frame_%03d.png. "
           "With convert: a .gguf or .safetensors file."),
    Option(OUTPUT, "--preview", type=OneOf(*PREVIEWS), metavar="|".join(PREVIEWS), default="none",
           help="Show a picture while it is drawn: proj costs nothing, tae uses --taesd."),
    Option(OUTPUT, "--preview-path", type=FILE, metavar="PATH", default="./preview.png", help="Where previews go."),
    Option(OUTPUT, "--preview-interval", type=int, metavar="STEPS", default=1, help="After how many steps."),
    Option(OUTPUT, "--preview-noisy", is_flag=True, help="With the noise that is left."),
    Option(OUTPUT, "--output-begin-idx", type=click.IntRange(min=0), metavar="NUMBER", default=0,
           help="Number of the first picture."),
    Option(OUTPUT, "--disable-image-metadata", is_flag=True, help="Don't write the parameters into the picture."),
    Option(OUTPUT, "-M", "--mode", type=OneOf(*MODES), metavar="|".join(MODES), default="img_gen",
           help="Draw pictures or films, enlarge a picture, write the model as .gguf, or tell what a picture says."),
    Option(OUTPUT, "--image", type=FILE, metavar="PATH", help="With metadata: picture to read."),
    Option(OUTPUT, "--metadata-format", type=OneOf(*METADATA_FORMATS), metavar="|".join(METADATA_FORMATS),
           default="text", help="With metadata: how to write it."),
    Option(OUTPUT, "--metadata-all", is_flag=True,
           help="With metadata: also entries that say nothing of how it was made."),
    Option(OUTPUT, "--metadata-raw", is_flag=True,
           help="With metadata: also entries that are no text, as hexadecimal."),
    Option(OUTPUT, "--metadata-brief", is_flag=True, help="With metadata: shorten long lines."),

    Option(ABOUT, "-v", "--verbose", is_flag=True,
           help="Say more: what is drawn and how, versions, unused tensors, the log."),
    Option(ABOUT, "--completion", type=OneOf(*SHELLS), metavar="|".join(SHELLS),
           help='Print a script that completes options in a shell: eval "$(sd-cli --completion bash)".'),
    Option(ABOUT, "--version", is_flag=True, help="Print the version and exit."),
)  # fmt: skip

_LACKING: dict[str, tuple[str, ...]] = {
    "other model families and their parts": (
        "--tokenizer",
        "--uncond-diffusion-model",
        "--audio-encoder", "--motion-module", "--chroma-disable-dit-mask", "--chroma-enable-t5-mask",
        "--chroma-t5-mask-pad",
        "--qwen-image-layers", "--force-sdxl-vae-conv-scale", "--vae-format",
        "--model-args", "--linear-scale", "--attn-scale",
    ),
    "images as input": (
        "--increase-ref-index", "--ref-image-args",
        "--disable-auto-resize-ref-image", "--image-preprocess", "--photo-maker", "--pm-id-images-dir",
        "--pm-id-embed-path", "--pm-style-strength", "--photomaker-backend-device",
        "--ip-adapter", "--ip-adapter-strength", "--ip-adapter-image", "--pulid-weights", "--pulid-id-weight",
        "--pulid-id-embedding",
    ),
    "upscaling and tiling": (
        "--vae-relative-tile-size", "--temporal-tiling", "--extra-tiling-args",
        "--circular", "--circularx", "--circulary",
    ),
    "details drawn again": ("--ad-model", "--ad-prompt", "--ad-negative-prompt", "--extra-ad-args"),
    "video": (
        "--control-video", "--vace-strength", "--ref-video", "--ref-video-audio", "--ref-audio", "--audio",
    ),
    "of Wan 2.2, whose models have no such guidance": (
        "--high-noise-img-cfg-scale", "--high-noise-guidance", "--high-noise-slg-scale", "--high-noise-skip-layers",
        "--high-noise-skip-layer-start", "--high-noise-skip-layer-end",
    ),
    "weights in another type or another place": (
        "--split-mode", "--split-ratio",
        "--stream-layers", "--eager-load", "--disable-prefetch", "--disable-segmented-compute", "--convert-name",
        "--imat-in", "--imat-out",
    ),
    "kernels chosen by hand; sdrpc's devices choose their own": (
        "--fa", "--diffusion-fa", "--sage-attn", "--diffusion-conv-direct", "--vae-conv-direct",
    ),
    "skipping and custom steps": (
        "--cache-preset", "--extra-sample-args",
    ),
    "levels of the log; there is --verbose": ("--log-level",),
    "how many texts are kept encoded; a session keeps its last ones": ("--conditioning-cache-size",),
}  # fmt: skip
"""Options of stable-diffusion.cpp's sd-cli that sdrpc refuses, grouped by what they belong to."""

REFUSED = {
    option: f"an option of stable-diffusion.cpp's sd-cli that sdrpc lacks ({subject})"
    for subject, options in _LACKING.items()
    for option in options
}

ALWAYS_SO = frozenset({"--mmap", "--color"})
"""Switches of stable-diffusion.cpp's sd-cli for what sdrpc does anyway: files are mapped, terminals get colours."""

WITHIN = {"loras": "--prompt", "lora_dir": "--lora-model-dir"}
"""Fields of requests and sessions that no option has the name of, and the options that say them."""

METADATA = ("image", "metadata_format", "metadata_all", "metadata_raw", "metadata_brief")
"""Options of --mode metadata."""

ACTS_ON: dict[str, str | tuple[str, str]] = {
    **dict.fromkeys(("video_frames", "fps"), ("mode", "vid_gen")),
    **dict.fromkeys(METADATA, ("mode", "metadata")),
    "strength": "init_image",
    "taesd_preview_only": "taesd",
    "moe_boundary": "high_noise_diffusion_model",
    **dict.fromkeys(
        (
            "hires_scale",
            "hires_width",
            "hires_height",
            "hires_steps",
            "hires_denoising_strength",
            "hires_upscaler",
            "hires_upscalers_dir",
            "hires_upscale_tile_size",
            "hires_sigmas",
        ),
        "hires",
    ),
    **dict.fromkeys(("upscale_repeats", "upscale_tile_size"), "upscale_model"),
    "control_strength": "control_net",
    **dict.fromkeys(("canny", "control_mode"), "control_image"),
    **dict.fromkeys(("skip_layers", "skip_layer_start", "skip_layer_end"), "slg_scale"),
    **dict.fromkeys(("preview_path", "preview_interval", "preview_noisy"), "preview"),
}
"""Options that do nothing unless another one is given, or has that value."""

_KEYS = ("rpc", "rpc_key", "rpc_key_file")
_UPSCALES = (
    *_KEYS, "init_image", "upscale_model", "upscale_repeats", "upscale_tile_size", "output", "output_begin_idx",
    "disable_image_metadata", "rpc_retry", "rpc_timeout", "backend", "main_backend_device", "upscaler_backend_device",
    "threads", "precision",
)  # fmt: skip
_CONVERTS = (
    "model", "diffusion_model", "high_noise_diffusion_model", "vae", "clip_l", "clip_g", "t5xxl", "llm", "llm_vision",
    "clip_vision", "connectors", "audio_vae", "vocoder", "control_net", "taesd", "type", "tensor_type_rules", "output",
)  # fmt: skip

_READ: dict[tuple[str, object], tuple[str, ...]] = {
    ("list_devices", True): _KEYS,
    ("discover", True): (),
    ("mode", "upscale"): _UPSCALES,
    ("mode", "convert"): _CONVERTS,
    ("mode", "metadata"): METADATA,
}
"""What is read of the other options by what draws nothing."""

_INSTEAD = {
    "sigmas": ("steps", "scheduler"),
    "hires_sigmas": ("hires_steps", "hires_denoising_strength"),
    "hires_width": ("hires_scale",),
    "hires_height": ("hires_scale",),
    "clip_backend_device": ("clip_on_cpu",),
    "vae_backend_device": ("vae_on_cpu",),
    "control_net_backend_device": ("control_net_cpu",),
}
"""Options that say the same as others, and count instead of them."""

UNREAD: dict[tuple[str, object], frozenset[str]] = {
    what: frozenset(str(option.name) for option in OPTIONS if option.group != ABOUT) - {what[0], "mode", *read}
    for what, read in _READ.items()
} | {(name, GIVEN): frozenset(others) for name, others in _INSTEAD.items()}
"""Options that have no effect with another one, or with a value of it."""
