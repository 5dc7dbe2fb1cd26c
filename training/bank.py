"""What the diffusion model learns from: latents of many scenes, and captions of each as tokens."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdrpc.prompts import END_ID, START_ID, clip_tokenizer

from . import autoencoder, captions, model, scenes

CAPTIONS = 3
"""Captions of each scene."""

NOISE = 0.06
"""The share of captions with some random words before or after: the model learns to ignore what it doesn't know."""

FIRST_WORD = 512
"""Tokens below are single bytes."""

CHUNK = 4096


@dataclass(frozen=True)
class Bank:
    """``latents`` f16 [n, 4, 16, 16]; ``tokens`` int32 [n, CAPTIONS, 77]."""

    latents: Tensor
    tokens: Tensor


def build(vae: nn.Module, sampled: scenes.Scenes, device: torch.device, seed: int, processes: int | None = None,
          line: float = 0) -> Bank:  # fmt: skip
    """A bank of the scenes; equal for equal arguments. ``line``: as of :func:`scenes.draw`."""
    began = time.monotonic()
    count = len(sampled)
    starts = range(0, count, CHUNK)
    work = [(sampled.part(i, i + CHUNK), seed + i) for i in starts]
    side = model.SIDE // model.FACTOR
    latents = torch.empty((count, model.LATENTS, side, side), dtype=torch.float16, device=device)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        tokens = pool.map_async(_tokens, work, chunksize=1)
        for i in starts:
            for j in range(i, min(i + CHUNK, count), 512):
                pictures = autoencoder.draw(sampled.part(j, min(j + 512, count)), device, seed + j, line)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    latents[j : j + len(pictures)] = autoencoder.encode(vae, pictures)
        all_tokens = torch.from_numpy(np.concatenate(tokens.get())).to(device)
    print(f"bank: {count} scenes in {time.monotonic() - began:.0f} s, deviation {float(latents.float().std()):.3f}")
    return Bank(latents, all_tokens)


def _tokens(work: tuple[scenes.Scenes, int]) -> NDArray[np.int32]:
    sampled, seed = work
    random = Random(seed)
    written = [captions.describe(sampled[i], random) for i in range(len(sampled)) for _ in range(CAPTIONS)]
    encoded = clip_tokenizer().encode_batch(written, add_special_tokens=False)
    rows = padded(_noisy(each.ids, random) for each in encoded)
    return rows.reshape(len(sampled), CAPTIONS, model.POSITIONS)


def _noisy(ids: list[int], random: Random) -> list[int]:
    if random.random() > NOISE:
        return ids
    words = [random.randrange(FIRST_WORD, START_ID) for _ in range(random.randint(1, 5))]
    return words + ids if random.random() < 0.5 else ids + words


def padded(rows: Iterator[list[int]]) -> NDArray[np.int32]:
    """Token numbers between a start and ends, [n, 77]."""
    listed = list(rows)
    ids = np.full((len(listed), model.POSITIONS), END_ID, np.int32)
    ids[:, 0] = START_ID
    for row, words in zip(ids, listed, strict=True):
        words = words[: model.POSITIONS - 2]
        row[1 : 1 + len(words)] = words
    return ids
