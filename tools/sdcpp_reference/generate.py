"""Write tests/data/sdcpp.json: what stable-diffusion.cpp computes, from its own sources.

    pip download --no-deps --no-binary :all: stable-diffusion-cpp-python==0.4.7 && tar xf stable_diffusion_cpp_python-*
    python tools/sdcpp_reference/generate.py stable_diffusion_cpp_python-0.4.7/vendor/stable-diffusion.cpp

needs g++ and glibc on x86-64, whose bits the noise has. Six samplers and five schedules are younger than that package:
``--newer FILE`` takes them from a later ``src/runtime/denoiser.cpp`` (commit 571cdf9e has them all). Without it their
numbers stay as they are in the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGET = HERE.parent.parent / "tests" / "data" / "sdcpp.json"

NEWER = (
    "BetaScheduler", "LTX2Scheduler", "FluxScheduler", "Flux2Scheduler", "LogitNormalScheduler", "sample_dpmpp_2m_sde",
    "BrownianTreeNoiseSampler", "sample_dpmpp_2m_sde_bt", "sample_lms", "sample_euler_cfg_pp",
    "sample_euler_ancestral_cfg_pp", "sample_gradient_estimation",
)  # fmt: skip
"""Definitions that ``--newer``'s file has, in an order in which they can stand."""

SEEDS = (0, 42, 1 << 31, (1 << 32) + 5, (1 << 63) - 1)
SIZES = ("1,7,15,3,16,17,31,100,1", "1024,1024,1024", "70001")


def definition(source: str, name: str) -> str:
    """The text of the struct, class or static function ``name``, which ends with a brace at the start of a line."""
    kind = rf"(?:struct|class) {name}\b|static sd::Tensor<float> {name}\("
    match = re.search(rf"^(?:{kind}).*?^\}};?$", source, re.MULTILINE | re.DOTALL)
    if match is None:
        raise SystemExit(f"no definition of {name} in the newer file")
    return match[0]


def build(root: Path, newer: Path | None, folder: Path) -> Path:
    """The program reference.cpp, compiled against the sources in ``root``."""
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-w", "-DGGML_MAX_NAME=160"]
    flags += [f"-I{root / path}" for path in ("src", "src/tokenizers", "include", "ggml/include", "thirdparty")]
    if newer is not None:
        text = newer.read_text(encoding="utf-8")
        (folder / "newer.hpp").write_text("\n\n".join(definition(text, name) for name in NEWER), encoding="utf-8")
        flags += ["-DNEWER", f"-I{folder}"]
    program = folder / "reference"
    # util.cpp has the prompts' parser, and calls into ggml that nothing here reaches
    link = ["-no-pie", "-Wl,--unresolved-symbols=ignore-all", "-o", str(program)]
    subprocess.run(["g++", *flags, str(HERE / "reference.cpp"), str(root / "src" / "util.cpp"), *link], check=True)
    return program


def output(program: Path, *arguments: str) -> bytes:
    return subprocess.run([str(program), *arguments], check=True, stdout=subprocess.PIPE).stdout


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new``, and of ``old`` what is missing in it."""
    return {**{key: value for key, value in old.items() if key not in new}, **new}


def rounded(values: list[float]) -> list[float]:
    """Whole numbers as such: shorter in the file."""
    return [int(value) if value == int(value) else value for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="stable-diffusion.cpp's folder, with src/ and ggml/")
    parser.add_argument("--newer", type=Path, help="a later src/runtime/denoiser.cpp")
    options = parser.parse_args()
    old = json.loads(TARGET.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        program = build(options.root, options.newer, Path(folder))
        numbers = json.loads(output(program, "numbers"))
        tables = {
            name: {key: rounded(row) for key, row in merged(old.get(name, {}), table).items()}
            for name, table in numbers.items()
        }
        compiler = subprocess.run(["g++", "-dumpversion"], check=True, capture_output=True, text=True).stdout.strip()
        noise = {
            f"{rng} {seed} {sizes}": sha256(output(program, "noise", rng, str(seed), sizes)).hexdigest()
            for rng in ("cuda", "cpu", "std_default") for seed in SEEDS for sizes in SIZES
        }  # fmt: skip
        whole = {
            "about": "Computed by tools/sdcpp_reference from stable-diffusion.cpp's own sources "
            f"(g++ {compiler}, {' '.join(platform.libc_ver())}, {platform.machine()}). "
            "noise and libm: SHA-256 of little-endian float32.",
            "noise": noise,
            "libm": {name: sha256(output(program, "libm", name)).hexdigest() for name in ("log", "sin", "cos")},
            "prompts": [[text, json.loads(output(program, "prompt", text))] for text, _ in old["prompts"]],
            **tables,
        }
    lines = ",\n".join(f" {json.dumps(name)}: {_table(value)}" for name, value in whole.items())
    TARGET.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _table(value: Any) -> str:
    """JSON with one row of a table a line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()) + "\n }"


if __name__ == "__main__":
    main()
