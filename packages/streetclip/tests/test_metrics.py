"""Great-circle distances, the share of photos within a radius, and calibration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metazoo.errors import UserError
from streetclip.config import RADII
from streetclip.metrics import EARTH_KM, calibration, geo_accuracy_at_km, haversine_km

HALF = np.pi * EARTH_KM
LATITUDES = st.floats(-90, 90)
LONGITUDES = st.floats(-180, 180)


@pytest.mark.parametrize(
    ("one", "other", "kilometres"),
    [
        ((32.845269, -117.273988), (45.433703, 12.339298), 9940.608),
        ((0, 0), (0, 180), 20015.087),
        ((0, 0), (90, 0), 10007.543),
        ((0, 0), (0, 1), 111.195),
        ((0, 179.5), (0, -179.5), 111.195),  # over the date line
        ((60, 0), (60, 180), 6671.696),  # over the pole, a sixth of the circle
    ],
)
def test_figures(one: tuple[float, float], other: tuple[float, float], kilometres: float) -> None:
    """Of the Earth with a radius of 6371 km, both ways."""
    assert haversine_km(*one, *other) == pytest.approx(kilometres, abs=6e-4)
    assert haversine_km(*other, *one) == pytest.approx(kilometres, abs=6e-4)


@given(LATITUDES, LONGITUDES, LATITUDES, LONGITUDES)
def test_distance(latitude: float, longitude: float, latitude_2: float, longitude_2: float) -> None:
    """That of the chord between unit vectors; symmetric, zero to itself, the same a turn further, at most half way."""
    found = float(haversine_km(latitude, longitude, latitude_2, longitude_2))
    assert 0 <= found <= HALF
    assert found == haversine_km(latitude_2, longitude_2, latitude, longitude)
    assert haversine_km(latitude, longitude, latitude, longitude) == 0
    turned = haversine_km(latitude, longitude + 360, latitude_2, longitude_2 - 360)
    assert turned == pytest.approx(found, abs=1e-3)
    phi, lam = np.radians([latitude, latitude_2]), np.radians([longitude, longitude_2])
    points = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])
    chord = np.linalg.norm(points[:, 0] - points[:, 1])
    assert found == pytest.approx(2 * EARTH_KM * np.arcsin(min(chord / 2, 1.0)), abs=1e-3)


@given(LATITUDES, LONGITUDES)
def test_antipodes(latitude: float, longitude: float) -> None:
    """Half way round, never NaN."""
    assert haversine_km(latitude, longitude, -latitude, longitude + 180) == pytest.approx(HALF, abs=1e-3)


def test_shapes() -> None:
    """Rows against columns: every pair, as one by one."""
    rng = np.random.default_rng(0)
    latitude, latitude_2 = rng.uniform(-90, 90, 3), rng.uniform(-90, 90, 4)
    longitude, longitude_2 = rng.uniform(-180, 180, 3), rng.uniform(-180, 180, 4)
    found = haversine_km(latitude[:, None], longitude[:, None], latitude_2, longitude_2)
    single = [
        [float(haversine_km(a, b, c, d)) for c, d in zip(latitude_2, longitude_2, strict=True)]
        for a, b in zip(latitude, longitude, strict=True)
    ]
    np.testing.assert_allclose(found, single, rtol=1e-12)


def test_within() -> None:
    """Errors by hand; one exactly at a radius counts."""
    errors = [0.0, 1.0, np.nextafter(1.0, 2), 25.0, 25.1, 750.0, 2500.0, 2500.001]
    assert geo_accuracy_at_km(errors) == {
        "within_1": 25.0, "within_25": 50.0, "within_200": 62.5, "within_750": 75.0, "within_2500": 87.5,
        "median_km": pytest.approx((25.0 + 25.1) / 2),
    }  # fmt: skip
    assert geo_accuracy_at_km([3.0], radii=(2.5, 3)) == {"within_2.5": 0.0, "within_3": 100.0, "median_km": 3.0}


def test_perfect() -> None:
    assert geo_accuracy_at_km(np.zeros(7)) == {**{f"within_{radius}": 100.0 for radius in RADII}, "median_km": 0.0}


@given(st.lists(st.floats(0, HALF), min_size=1, max_size=20), st.lists(st.floats(0, HALF), min_size=2, max_size=6))
def test_monotone_radii(errors: list[float], radii: list[float]) -> None:
    """More within a greater radius; each a whole number of photos."""
    found = geo_accuracy_at_km(errors, radii)
    shares = [found[f"within_{radius:g}"] for radius in sorted(radii)]
    # two radii with the same six digits have one name
    if len({f"{radius:g}" for radius in radii}) == len(radii):
        assert shares == sorted(shares)
    assert all(share * len(errors) / 100 == pytest.approx(round(share * len(errors) / 100)) for share in shares)
    assert min(errors) <= found["median_km"] <= max(errors)


def test_no_errors() -> None:
    with pytest.raises(UserError, match="no errors"):
        geo_accuracy_at_km([])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_wrong_errors(value: float) -> None:
    """The one that is not finite is named."""
    with pytest.raises(UserError, match="error 2 is not finite"):
        geo_accuracy_at_km([1.0, 2.0, value, value])


def test_calibration() -> None:
    """By hand: bins of a fifth; 1 belongs to the last, an edge to the bin above it."""
    table, error = calibration([0.1, 0.15, 0.2, 0.5, 0.9, 1.0], [1, 0, 0, 1, 1, 1], bins=5)
    wanted = [
        [0.125, 0.5, 2],
        [0.2, 0.0, 1],
        [0.5, 1.0, 1],
        [np.nan, np.nan, 0],
        [0.95, 1.0, 2],
    ]
    np.testing.assert_allclose(table, wanted)
    assert error == pytest.approx((2 * 0.375 + 0.2 + 0.5 + 2 * 0.05) / 6)


def test_calibration_limits() -> None:
    """Right as often as said: 0; sure and always wrong: 1."""
    assert calibration(np.full(4, 0.75), [1, 1, 1, 0])[1] == 0
    assert calibration(np.ones(3), np.zeros(3))[1] == 1
    assert calibration([], [])[1] == 0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_calibration_of_one_bin(pairs: list[tuple[float, bool]]) -> None:
    """With one bin it is |mean probability − share correct|, of which it can only be more with several."""
    probabilities, correct = (np.array(one, dtype=float) for one in zip(*pairs, strict=True))
    table, error = calibration(probabilities, correct, bins=1)
    gap = abs(probabilities.mean() - correct.mean())
    assert error == pytest.approx(gap, abs=1e-12)
    several, more = calibration(probabilities, correct)
    assert several[:, 2].sum() == table[0, 2] == len(pairs)
    assert gap - 1e-12 <= more <= 1
