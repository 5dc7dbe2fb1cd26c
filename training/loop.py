"""What both trainings share: optimizer, schedule, running mean of the weights, and going on where a run was stopped."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    batch: int
    rate: float  # of learning, at its highest
    warm_up: int = 300  # steps until then
    decay: float = 0.999  # of the running mean of weights
    weight_decay: float = 0.01
    report: int = 250  # steps between two lines

    def rate_at(self, step: int) -> float:
        """Up in a line, then down to nothing as a cosine."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Run:
    """Modules in training. ``mean`` are copies of them whose weights follow slowly: those are what is kept in the end.

    A run that was stopped goes on exactly: all randomness of a step comes from :meth:`generator`, whose seed is the
    number of the step.
    """

    modules: nn.ModuleDict
    plan: Plan
    device: torch.device
    seed: int
    step: int = 0
    mean: nn.ModuleDict = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.modules.to(self.device)
        self.mean = copy.deepcopy(self.modules).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(), lr=self.plan.rate, betas=(0.9, 0.99), weight_decay=self.plan.weight_decay,
            fused=self.device.type == "cuda",
        )  # fmt: skip

    def generator(self) -> torch.Generator:
        """Random numbers of the step that is next, on the device."""
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + self.step)

    def update(self) -> None:
        """One step of the optimizer along the gradients, and of the running mean."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        self.optimizer.step()
        self.step += 1
        follow = 1 - min(self.plan.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.mean.parameters()), list(self.modules.parameters()), follow)

    def save(self, path: Path) -> None:
        """Everything, in one file that is never half written."""
        state = {"step": self.step, "modules": self.modules.state_dict(), "mean": self.mean.state_dict(),
                 "optimizer": self.optimizer.state_dict()}  # fmt: skip
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Where :meth:`save` left off."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.modules.load_state_dict(state["modules"])
        self.mean.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])

    @property
    def done(self) -> bool:
        return self.step >= self.plan.steps


class Gradients:
    """Sets the gradients of ``run``'s weights, clipped, and gives what ``losses`` gives: the first number is minimized.

    On CUDA a step is thousands of small kernels, which take longer to start than to run: after a few steps they are
    recorded as one graph and started together.
    """

    WARM_UP = 3

    def __init__(self, run: Run, losses: Callable[..., tuple[Tensor, ...]]) -> None:
        self.run, self.losses = run, losses
        self.calls = 0
        self.inputs: tuple[Tensor, ...] = ()
        self.values: tuple[Tensor, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.run.device.type != "cuda" or self.calls <= self.WARM_UP:
            self.run.optimizer.zero_grad(set_to_none=True)
            return self._compute(*inputs)
        if self.graph is None:
            self._record(*inputs)
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        assert self.graph is not None
        self.graph.replay()
        return self.values

    def _compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(self.run.device.type, torch.bfloat16, cache_enabled=False):
            values = self.losses(*inputs)
        values[0].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.run.modules.parameters(), 1.0)
        return values

    def _record(self, *inputs: Tensor) -> None:
        self.inputs = tuple(each.clone() for each in inputs)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a library does when first called must not be recorded
            self.run.optimizer.zero_grad(set_to_none=True)
            self._compute(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.run.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.values = self._compute(*self.inputs)


def train(run: Run, path: Path, losses: Callable[..., tuple[Tensor, ...]], inputs: Callable[[Run], tuple[Tensor, ...]],
          until: float) -> bool:  # fmt: skip
    """Train until all steps are done or the time (of ``time.monotonic``) is up, saving to ``path``; whether all are.

    ``inputs`` makes the arguments of ``losses`` for the step that is next. The numbers of ``losses`` are reported.
    """
    if path.exists():
        run.load(path)
    run.modules.train()
    gradients = Gradients(run, losses)
    sums = torch.zeros(0)
    last = time.monotonic()
    while not run.done and time.monotonic() < until:
        values = torch.stack([value.detach() for value in gradients(*inputs(run))])
        run.update()
        sums = values if len(sums) == 0 else sums + values
        if run.step % run.plan.report == 0:
            shown = " ".join(f"{number:.5f}" for number in (sums / run.plan.report).tolist())
            now = time.monotonic()
            speed = run.plan.report / (now - last)
            print(f"{path.stem} {run.step}/{run.plan.steps}  {shown}  {speed:.1f} steps/s", flush=True)
            sums, last = torch.zeros(0), now
    run.save(path)
    return run.done
