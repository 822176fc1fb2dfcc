"""Pictures of environments without a graphics library: outlines by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

BLUE, RED, GREY = "#0072B2", "#D55E00", "#999999"


def draw_point(trail: Sequence[np.ndarray], goal: np.ndarray, size: int) -> np.ndarray:
    """The point robot: the half-circle of goals, the goal, the way so far. Returns (size, size, 3)."""
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    scale = size / 2.6

    def at(place: np.ndarray) -> tuple[float, float]:
        return size / 2 + scale * float(place[0]), size / 2 - scale * float(place[1])

    pen.arc([*at(np.array([-1, 1])), *at(np.array([1, -1]))], 180, 360, fill=GREY, width=2)
    x, y = at(goal)
    pen.ellipse([x - 6, y - 6, x + 6, y + 6], outline=RED, width=3)
    if len(trail) > 1:
        pen.line([at(place) for place in trail], fill=BLUE, width=2)
    x, y = at(trail[-1])
    pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=BLUE)
    return np.asarray(image)


def draw_bodies(model: Any, data: Any, view: tuple[int, int], size: int) -> np.ndarray:
    """Capsules and spheres of a MuJoCo state, seen along the third axis; the first body stays in the middle.

    Args:
        model, data: MuJoCo's.
        view: axes across and up.
        size: of the picture, in pixels.

    Returns:
        (size, size, 3), with a mark each metre.
    """
    import mujoco

    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    scale = size / 3.0  # three metres are seen
    middle = data.xpos[1][list(view)].copy()
    if view[1] == 2:
        middle[1] = 0.9  # the ground stays where it is

    def at(place: np.ndarray) -> tuple[float, float]:
        across, up = scale * (place - middle)
        return size / 2 + float(across), size / 2 - float(up)

    for metre in range(int(middle[0]) - 3, int(middle[0]) + 4):
        x, y = at(np.array([metre, 0.0]))
        if view[1] == 2:
            pen.line([x, y, x, y + 8], fill=GREY, width=2)
        else:
            pen.line([x, 0, x, size], fill="#DDDDDD")
    for metre in range(int(middle[1]) - 3, int(middle[1]) + 4):
        if view[1] != 2:
            _, y = at(np.array([0.0, metre]))
            pen.line([0, y, size, y], fill="#DDDDDD")
    if view[1] == 2:
        _, y = at(np.zeros(2))
        pen.line([0, y, size, y], fill=GREY, width=2)
    for i in range(model.ngeom):
        kind = model.geom_type[i]
        if kind not in (mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_SPHERE):
            continue
        radius = float(model.geom_size[i][0])
        half = float(model.geom_size[i][1]) if kind == mujoco.mjtGeom.mjGEOM_CAPSULE else 0.0
        along = data.geom_xmat[i].reshape(3, 3)[:, 2] * half
        ends = [at((data.geom_xpos[i] + sign * along)[list(view)]) for sign in (-1, 1)]
        thick = scale * radius
        pen.line([*ends[0], *ends[1]], fill=BLUE, width=max(int(2 * thick), 1))
        for x, y in ends:
            pen.ellipse([x - thick, y - thick, x + thick, y + thick], fill=BLUE)
    return np.asarray(image)
