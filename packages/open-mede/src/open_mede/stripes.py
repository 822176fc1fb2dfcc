"""Other backgrounds under the same foreground: SCUBA's procedural stripes (Li et al. 2023, StillMix).

A stripe background has a random colour and its complement: lines y = A sin(wx + t) + B, repeated at a random distance,
rotated by a random angle, and cropped. Pasted below the foreground, they take a video out of its context, and nothing
else changes.
"""

from __future__ import annotations

import numpy as np
from metazoo.errors import UserError
from PIL import Image

CROP = 256
"""Pixels that SCUBA draws; other sizes are scaled down or up from it."""


def stripe_background(rng: np.random.Generator, size: int = CROP) -> np.ndarray:
    """One background [size, size, 3] of bytes."""
    side = int(CROP * 1.5)
    colour = rng.random(3)
    half = 5 + 15 * rng.random()
    distance = (3 + 2 * rng.random()) * half
    frequency = 2 * np.pi / (1000 * rng.random() + 4)
    phase = (200 * rng.random() - 100) * frequency
    amplitude = 10 + 100 * rng.random()
    middle = amplitude * np.sin(frequency * np.arange(side) + phase) + side / 3
    rows = np.arange(side)[:, None]
    on_line = (rows - middle[None] + half) % distance < 2 * half
    drawn = np.where(on_line[..., None], 1 - colour, colour)
    image = Image.fromarray((255 * drawn).astype(np.uint8)).rotate(360 * rng.random(), Image.Resampling.NEAREST)
    low = (side - CROP) // 2
    found = np.asarray(image.crop((low, low, low + CROP, low + CROP)))  # a rotation's corners are outside of it
    if size == CROP:
        return found
    return np.asarray(
        Image.fromarray(found).resize((size, size), Image.Resampling.BOX if size < CROP else Image.Resampling.BILINEAR)
    )


class ScubaBackground:
    """Puts what a mask does not cover onto a stripe background, the same in all frames of a clip.

    Args:
        seed: of the backgrounds.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng([seed, 7])

    def __call__(self, frames: np.ndarray, masks: np.ndarray, background: np.ndarray | None = None) -> np.ndarray:
        """Frames on another background.

        Args:
            frames: [T, H, W, 3] of bytes.
            masks: [T, H, W], 0 to 1 or bool: what belongs to the foreground.
            background: [H, W, 3] of bytes [default: a new one of stripes].

        Returns:
            [T, H, W, 3] of bytes; the foreground keeps its values.

        Raises:
            UserError: shapes do not fit.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(f"frames have shape {frames.shape}: give [T, H, W, 3], colour last")
        if masks.shape != frames.shape[:3]:
            raise UserError(f"masks have shape {masks.shape}, frames {frames.shape}: give one mask [H, W] a frame")
        height, width = frames.shape[1:3]
        if background is None:
            square = Image.fromarray(stripe_background(self.rng))
            background = np.asarray(square.resize((width, height)))
        elif background.shape != frames.shape[1:]:
            raise UserError(f"background has shape {background.shape}, frames {frames.shape[1:]}: give the same")
        weight = masks[..., None].astype(np.float32)
        found: np.ndarray = np.rint(weight * frames + (1 - weight) * background).astype(np.uint8)
        return found
