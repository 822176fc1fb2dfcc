"""Gaussian weight averaging (Section 3.3), and the averages that it is compared with.

    w_t = exp(−(t − μ)² / 2σ²) / (√(2π) σ)                             weight of epoch t = 1 … E
    θ_GWA ← (Σ_{i<t} w_i / Σ_{i≤t} w_i) θ_GWA + (w_t / Σ_{i≤t} w_i) θ_t

The weights before the first epoch, CLIP's own, are never in it. Only ratios of weights count, which are taken by their
logarithms: a narrow bell far from the first epochs does not come to 0 / 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo.errors import UserError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mede import videos
from open_mede.config import AverageOptions, Config


def log_weights(epochs: int, mu: float, sigma: float) -> np.ndarray:
    """ln w_t of epochs 1 … E, [E], without the constant factor."""
    found: np.ndarray = -(((np.arange(1, epochs + 1) - mu) / sigma) ** 2) / 2
    return found


def gaussian_weights(epochs: int, mu: float, sigma: float) -> np.ndarray:
    """Shares of epochs 1 … E in the average, [E]; their sum is 1."""
    logs = log_weights(epochs, mu, sigma)
    shares: np.ndarray = np.exp(logs - np.logaddexp.reduce(logs))
    return shares


class WeightAverage:
    """Running average of the weights after each epoch, in 32 bits: θ̄ ← (1 − s_t) θ̄ + s_t θ_t. Here the last: s_t = 1.

    Attributes:
        epoch: epochs that were seen.
        average: name -> tensor; integers are those of the last epoch.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.average: dict[str, Tensor] = {}

    def share(self, epoch: int) -> float:
        """s_t of epoch t, from 1 on."""
        return 1.0

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights after one more epoch in.

        Raises:
            UserError: other names or shapes than before.
        """
        if self.average:
            check_alike(self.average, weights, f"the weights of epoch {self.epoch + 1}")
        self.epoch += 1
        share = self.share(self.epoch)
        for name, value in weights.items():
            held = value.detach()
            if not held.is_floating_point():
                self.average[name] = held.clone()
            elif name not in self.average or share == 1:
                self.average[name] = held.to(torch.float32, copy=True)
            else:
                old = self.average[name].to(held.device)  # a checkpoint's is on the CPU
                self.average[name] = old.mul_(1 - share).add_(held.float(), alpha=share)

    def state_dict(self) -> dict[str, Any]:
        """All that goes on from here."""
        return {"epoch": self.epoch, "average": dict(self.average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of :meth:`state_dict`."""
        self.epoch = int(state["epoch"])
        self.average = {name: value.detach().clone() for name, value in state["average"].items()}


class GaussianWeightAverage(WeightAverage):
    """GWA: s_t = w_t / Σ_{i≤t} w_i.

    Args:
        mu: epoch of the largest weight.
        sigma: width, in epochs; inf: all epochs alike (SWA).

    Raises:
        UserError: mu is no number, or sigma not above 0.
    """

    def __init__(self, mu: float, sigma: float) -> None:
        super().__init__()
        if not sigma > 0 or not math.isfinite(mu):
            raise UserError(f"mu is {mu}, sigma {sigma}: give a number, and one above 0")
        self.mu, self.sigma = mu, sigma

    def share(self, epoch: int) -> float:
        return float(gaussian_weights(epoch, self.mu, self.sigma)[-1])


class UniformWeightAverage(WeightAverage):
    """SWA: all epochs from ``start`` on alike, as in Open-VCLIP's last step."""

    def __init__(self, start: int = 1) -> None:
        super().__init__()
        self.start = start

    def share(self, epoch: int) -> float:
        return 1 / max(1, epoch - self.start + 1)


class ExponentialWeightAverage(WeightAverage):
    """EMA: s_t = 1 − d, from the first epoch's weights on."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def share(self, epoch: int) -> float:
        return 1.0 if epoch == 1 else 1 - self.decay


def averages_of(config: Config) -> dict[str, WeightAverage]:
    """All of a run: each is cheap, and which is the final one is chosen by --average."""
    mu, sigma = bell(config.epochs, config.mu, config.sigma)
    return {
        "gwa": GaussianWeightAverage(mu, sigma),
        "swa": UniformWeightAverage(config.swa_start),
        "ema": ExponentialWeightAverage(config.ema_decay),
        "last": WeightAverage(),
    }


def bell(epochs: int, mu: float | None, sigma: float | None) -> tuple[float, float]:
    """μ and σ, E / 2 and E / 6 where they are not given (the paper's are not published)."""
    return max(1.0, epochs / 2) if mu is None else mu, epochs / 6 if sigma is None else sigma


def warn_outside(epochs: int, mu: float | None) -> None:
    """Say so where μ was given outside of the epochs: it may be meant."""
    if mu is not None and not 1 <= mu <= epochs:
        print(f"mu is {mu:g}, outside of epochs 1 to {epochs}: the average leans to one end", file=sys.stderr)


def check_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError unless both have the same names and shapes."""
    if different := sorted(one.keys() ^ other.keys()):
        raise UserError(f"{where}: {different[0]} is in one and not in the other: average checkpoints of one model")
    for name, value in one.items():
        if value.shape != other[name].shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(other[name].shape)}, before {tuple(value.shape)}: average "
                "checkpoints of one model"
            )


def average(options: AverageOptions) -> dict[str, Any]:
    """The average of checkpoints, as a .safetensors file.

    Returns:
        weight_T: share of each epoch; output: the file.

    Raises:
        UserError: a file cannot be read, names or shapes differ, or the output is there.
    """
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output} is there: give --overwrite, or another --output")
    epochs = len(options.checkpoints)
    mu, sigma = bell(epochs, options.mu, options.sigma)
    running = GaussianWeightAverage(mu, sigma)
    warn_outside(epochs, options.mu)
    names = [str(path) for path in options.checkpoints]
    if names != sorted(names, key=videos.natural):
        print(f"epochs as they were given, {names[0]} first, not by their numbers", file=sys.stderr)
    kinds: dict[str, torch.dtype] = {}
    for path in options.checkpoints:
        weights = _read(path)
        if running.average:
            check_alike(running.average, weights, str(path))
        kinds = kinds or {name: value.dtype for name, value in weights.items()}
        running.update(weights)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_name(options.output.name + ".partial")
    averaged = {name: value.to(kinds[name]).contiguous() for name, value in running.average.items()}
    save_file(averaged, partial, metadata={"format": "pt"})
    partial.replace(options.output)
    shares = {f"weight_{i}": float(x) for i, x in enumerate(gaussian_weights(epochs, mu, sigma), 1)}
    return {**shares, "output": str(options.output)}


def _read(path: Path) -> dict[str, Tensor]:
    file = path
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        if len(inside) != 1:
            raise UserError(f"{path} has {len(inside)} .safetensors files: give the file")
        file = inside[0]
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file}: not a .safetensors file ({' '.join(str(error).split())[:100]})") from error
