"""Great-circle errors, and the share of photos within a distance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from metazoo.errors import UserError
from numpy.typing import ArrayLike

from streetclip.config import RADII

EARTH_KM = 6371.0


def haversine_km(
    latitude: ArrayLike, longitude: ArrayLike, latitude_2: ArrayLike, longitude_2: ArrayLike
) -> np.ndarray:
    """Kilometres over the great circle, of degrees of any shapes that go together; the Earth's radius is 6371 km."""
    phi, phi_2 = np.radians(latitude), np.radians(latitude_2)
    half_phi = (phi_2 - phi) / 2
    half_lam = (np.radians(longitude_2) - np.radians(longitude)) / 2
    part = np.sin(half_phi) ** 2 + np.cos(phi) * np.cos(phi_2) * np.sin(half_lam) ** 2
    # rounding may carry it above 1 at antipodes
    found: np.ndarray = 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(part, 0, 1)))
    return found


def geo_accuracy_at_km(errors: ArrayLike, radii: Sequence[float] = RADII) -> dict[str, float]:
    """within_R: percent of errors [N] of at most R km, for each radius; median_km.

    Raises:
        UserError: no error, or one that is not finite.
    """
    errors = np.asarray(errors, dtype=float)
    if not errors.size:
        raise UserError("no errors: give one photo or more")
    if not np.isfinite(errors).all():
        raise UserError(f"error {int((~np.isfinite(errors)).argmax())} is not finite: mend the coordinates")
    found = {f"within_{radius:g}": 100 * float((errors <= radius).mean()) for radius in radii}
    return {**found, "median_km": float(np.median(errors))}


def calibration(probabilities: ArrayLike, correct: ArrayLike, bins: int = 10) -> tuple[np.ndarray, float]:
    """Mean probability, share correct and count [bins, 3] by equal bins of probability; expected calibration error.

    Rows of empty bins are NaN, NaN, 0. The error is the mean of |probability − share correct|, weighed by count.
    """
    values, hits = np.asarray(probabilities, dtype=float), np.asarray(correct, dtype=float)
    number = np.clip((values * bins).astype(int), 0, bins - 1)
    rows = []
    for i in range(bins):
        mine = number == i
        count = int(mine.sum())
        rows.append((values[mine].mean(), hits[mine].mean(), count) if count else (np.nan, np.nan, 0))
    table = np.array(rows, dtype=float)
    held = table[:, 2] > 0
    error = float((np.abs(table[held, 0] - table[held, 1]) * table[held, 2]).sum() / max(table[:, 2].sum(), 1))
    return table, error
