"""The generated world: places, held-out places, names, distances, photos and generic captions."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from streetclip import world

SEEDS = range(5)
WORDS = {
    word: (i, value)
    for i, name in enumerate(world.NAMES)
    for value, word in enumerate(world.ATTRIBUTES[name])
}  # fmt: skip
SYLLABLES = {word: (i, value) for i, words in enumerate(world.SYLLABLES) for value, word in enumerate(words)}
FILLERS = set(re.findall("[a-z]+", " ".join(world.CARRIERS)))
# rows and columns that an attribute may paint: shifts of up to 2 pixels included
PAINTED = {
    "line": [(slice(15, 32), slice(12, 20))],
    "side": [(slice(19, 23), slice(8, 24))],
    "sign": [(slice(14, 23), slice(0, 11)), (slice(14, 23), slice(21, 32))],
    "vegetation": [(slice(11, 15), slice(0, 32))],
    "soil": [(slice(13, 32), slice(0, 32))],
    "sky": [(slice(0, 13), slice(0, 32))],
    "roof": [(slice(5, 8), slice(8, 32))],
    "script": [(slice(2, 8), slice(0, 12))],
}


def syllables(name: str) -> list[str]:
    """A name in pieces of two letters."""
    return [name.lower()[i : i + 2] for i in range(0, len(name), 2)]


def named(caption: str) -> tuple[list[tuple[int, int]], list[bool], set[str]]:
    """Attributes of a generic caption with their values, in order; whether each is a local word; other words."""
    found, local, others = [], [], set()
    for word in re.findall("|".join([*(rf"\b{one}\b" for one in WORDS), "[a-z]+"]), caption):
        if word in WORDS:
            found.append(WORDS[word])
            local.append(False)
        elif set(pieces := syllables(word)) <= set(SYLLABLES):
            found += [SYLLABLES[one] for one in pieces]
            local += [True] * len(pieces)
        else:
            others.add(word)
    return found, local, others


def tuples(places: world.World) -> np.ndarray:
    """[24, 4] attributes of the countries, which all cities of a country have."""
    of_cities = places.attributes[:, :4].reshape(world.COUNTRIES, -1, 4)
    assert (of_cities == of_cities[:, :1]).all()
    return np.asarray(of_cities[:, 0])


def kilometres(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """[N, N] great-circle distances, from the angle between unit vectors."""
    phi, lam = np.radians(latitude), np.radians(longitude)
    points = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)
    chords = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return np.asarray(2 * 6371 * np.arcsin((chords / 2).clip(0, 1)))


def test_same_seed_same_world() -> None:
    first, second, other = world.make(3), world.make(3), world.make(4)
    for name in ("attributes", "latitude", "longitude", "unseen_country", "unseen_city"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    for name in ("country_names", "region_names", "city_names"):
        assert getattr(first, name) == getattr(second, name)
    assert first.country_names != other.country_names
    assert first.city_names != other.city_names


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_differ_in_one_attribute(seed: int) -> None:
    """Of the 24 countries no two are alike; neighbours, also across the date line, differ in exactly one value."""
    found = tuples(world.make(seed))
    assert len({tuple(one) for one in found.tolist()}) == 24
    grid = found.reshape(4, 6, 4)
    assert ((grid != np.roll(grid, 1, axis=1)).sum(axis=2) == 1).all()
    assert ((grid[1:] != grid[:-1]).sum(axis=2) == 1).all()
    assert (found.max(axis=0) < world.SIZES[:4]).all()
    for i in range(4):  # no attribute is the same everywhere
        assert len(set(found[:, i])) > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_similar_countries_are_neighbours_on_the_sphere(seed: int) -> None:
    """The grid is the sphere's: 60° of longitude and 20° of latitude from one country to the next."""
    places = world.make(seed)
    latitude = places.latitude.reshape(4, 6, 16).mean(axis=2)
    longitude = places.longitude.reshape(4, 6, 16).mean(axis=2)
    assert np.allclose(latitude, np.array([-30, -10, 10, 30])[:, None])
    assert np.allclose(longitude, np.array([-150, -90, -30, 30, 90, 150])[None])


@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_places(seed: int) -> None:
    """Four countries, and one city of each region of the others; 20 · 4 · 3 cities stay."""
    places = world.make(seed)
    assert places.unseen_country.sum() == 4
    held = places.unseen_city.reshape(24, 4, 4).sum(axis=2)
    assert (held == np.where(places.unseen_country, 0, 1)[:, None]).all()
    assert places.seen.sum() == 240
    assert not (places.seen & places.unseen_city).any()
    assert not places.seen[places.unseen_country[places.country]].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_unseen_country_has_known_syllables(seed: int) -> None:
    """Names and attributes of a held-out country are made of those of seen countries; the whole name is new."""
    places = world.make(seed)
    names, unseen = np.array(places.country_names), places.unseen_country
    for i in range(4):
        known = {syllables(name)[i] for name in names[~unseen]}
        assert {syllables(name)[i] for name in names[unseen]} <= known
        assert set(tuples(places)[unseen, i]) <= set(tuples(places)[~unseen, i])
    assert not set(names[unseen]) & set(names[~unseen])


@pytest.mark.parametrize("seed", SEEDS)
def test_names_are_of_syllables(seed: int) -> None:
    """A country's name says its four attributes; a region's soil and a city's sky come before a syllable without
    meaning."""
    places = world.make(seed)
    for name, values in zip(places.country_names, tuples(places).tolist(), strict=True):
        assert name == "".join(world.SYLLABLES[i][value] for i, value in enumerate(values)).capitalize()
    for region, city, values in zip(places.region_names, places.city_names, places.attributes.tolist(), strict=True):
        first, second = syllables(region)
        assert SYLLABLES[first] == (4, values[4])
        assert second in world.PLAIN_SYLLABLES
        first, second = syllables(city)
        assert SYLLABLES[first] == (5, values[5])
        assert second in world.PLAIN_SYLLABLES


def test_syllables_are_distinct() -> None:
    flat = [one for words in world.SYLLABLES for one in words] + list(world.PLAIN_SYLLABLES)
    assert len(set(flat)) == len(flat) == sum(world.SIZES) + 24
    assert all(len(one) == 2 for one in flat)
    assert len(WORDS) == sum(world.SIZES)
    assert not set(flat) & set(" ".join(WORDS).split() + list(FILLERS))


@pytest.mark.parametrize("seed", SEEDS)
def test_places_are_unique(seed: int) -> None:
    """(country, city) names one place; a country's regions have names of their own, and all cities of one have its."""
    places = world.make(seed)
    assert len(set(zip(places.country.tolist(), places.city_names, strict=True))) == 384
    regions = np.array(places.region_names).reshape(24, 4, 4)
    assert (regions == regions[:, :, :1]).all()
    assert all(len(set(country)) == 4 for country in regions[:, :, 0].tolist())
    # a region fixes one soil, the cities of a region all skies
    values = places.attributes.reshape(24, 4, 4, 6)
    assert (np.sort(values[:, :, 0, 4], axis=1) == np.arange(4)).all()
    assert (np.sort(values[:, :, :, 5], axis=2) == np.arange(4)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_names_of_held_out_places_are_new(seed: int) -> None:
    """No seen city has the name of a held-out one, and no seen region that of an unseen country's."""
    places = world.make(seed)
    cities, regions = np.array(places.city_names), np.array(places.region_names)
    assert not set(cities[places.seen]) & set(cities[~places.seen])
    unseen = places.unseen_country[places.country]
    assert not set(regions[~unseen]) & set(regions[unseen])


@pytest.mark.parametrize("seed", SEEDS)
def test_distances(seed: int) -> None:
    """Within 200 km just the same region, within 750 km just the same country."""
    places = world.make(seed)
    apart = kilometres(places.latitude, places.longitude)
    region = np.arange(384) // 4
    assert np.array_equal(apart <= 200, region[:, None] == region[None])
    assert np.array_equal(apart <= 750, places.country[:, None] == places.country[None])
    assert apart[~np.eye(384, dtype=bool)].min() > 25


@pytest.mark.parametrize("seed", SEEDS)
def test_generic_photos_are_of_no_held_out_place(seed: int) -> None:
    """No attributes of an unseen country or city; those of seen places, and all values, are among them."""
    places = world.make(seed)
    found = world.generic_attributes(places, 5000, np.random.default_rng(seed))
    assert found.shape == (5000, 8)
    countries, cities = {tuple(one[:4]) for one in found.tolist()}, {tuple(one[:6]) for one in found.tolist()}
    held = places.attributes[places.unseen_country[places.country]]
    assert not countries & {tuple(one[:4]) for one in held.tolist()}
    assert not cities & {tuple(one) for one in places.attributes[places.unseen_city].tolist()}
    assert countries >= {tuple(one) for one in tuples(places)[~places.unseen_country].tolist()}
    for i, size in enumerate(world.SIZES):
        assert set(found[:, i]) == set(range(size))


def test_attributes_of_photos() -> None:
    """A photo has its city's six; roofs and script vary within the city."""
    places = world.make(0)
    cities = np.repeat([5, 300], 60)
    found = world.photo_attributes(places, cities, np.random.default_rng(0))
    assert np.array_equal(found[:, :6], places.attributes[cities])
    for city in (5, 300):
        assert set(found[cities == city, 6]) == set(range(3))
        assert set(found[cities == city, 7]) == set(range(5))


@pytest.mark.parametrize("name", world.NAMES)
def test_attribute_shows_in_its_pixels(name: str) -> None:
    """Photos that differ in one attribute only differ where it is painted, each of them, and nowhere else."""
    number, count = world.NAMES.index(name), 8
    base = np.stack([np.random.default_rng(1).integers(size, size=count) for size in world.SIZES], axis=1)
    photos = []
    for value in range(world.SIZES[number]):
        attributes = base.copy()
        attributes[:, number] = value
        photos.append(world.render(attributes, np.random.default_rng(2)).astype(int))
    elsewhere = np.ones((world.SIZE, world.SIZE), dtype=bool)
    for rows, columns in PAINTED[name]:
        elsewhere[rows, columns] = False
    for first, second in combinations(photos, 2):
        changed = (first != second).any(axis=3)
        assert not changed[:, elsewhere].any()
        assert changed.sum(axis=(1, 2)).min() >= 4


def test_photos_of_a_generator() -> None:
    """Same generator, same photos; roofs, cars and noise differ from photo to photo of the same attributes."""
    attributes = np.zeros((3, 8), dtype=int)
    first, second = (world.render(attributes, np.random.default_rng(0)) for _ in range(2))
    assert first.shape == (3, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    assert world.render(attributes[:0], np.random.default_rng(0)).shape == (0, 32, 32, 3)


def test_driving_side_is_not_mirror_symmetric() -> None:
    """The car stands left or right; a mirrored photo would show the other side, so that mirroring is no
    augmentation."""
    attributes = np.stack([np.random.default_rng(3).integers(size, size=60) for size in world.SIZES], axis=1)
    photos = world.render(attributes, np.random.default_rng(4)).astype(float)

    def side(pixels: np.ndarray) -> np.ndarray:
        car = (pixels[..., 2] - pixels[..., :2].max(axis=3) > 50)[:, 19:22]
        return np.asarray(car[:, :, 16:24].sum(axis=(1, 2)) > car[:, :, 8:16].sum(axis=(1, 2))).astype(int)

    assert np.array_equal(side(photos), attributes[:, 1])
    assert np.array_equal(side(photos[:, :, ::-1]), 1 - attributes[:, 1])


def test_noise() -> None:
    """σ = 0.08 and brightness of ±15 % on sky of one colour."""
    attributes = np.zeros((200, 8), dtype=int)
    attributes[:, 5] = 1  # grey sky: no channel near its limits
    corner = world.render(attributes, np.random.default_rng(0))[:, :2, 14:].reshape(200, -1, 3) / 255
    assert corner.std(axis=1).mean() == pytest.approx(0.08, rel=0.03)
    brightness = corner.mean(axis=1)[:, 0] / 0.68
    assert brightness.min() > 0.8
    assert brightness.max() < 1.2
    assert brightness.std() == pytest.approx(0.3 / np.sqrt(12), rel=0.15)


@pytest.mark.parametrize("local_words", [0.0, 0.25, 1.0])
def test_generic_captions_name_true_attributes(local_words: float) -> None:
    """2 to 4 different attributes in random order, in plain words or, that share of them, in the place's own."""
    places, rng = world.make(0), np.random.default_rng(0)
    attributes = world.generic_attributes(places, 1500, rng)
    counts, first, shares = set(), set(), []
    for caption, values in zip(world.generic_captions(attributes, rng, local_words), attributes, strict=True):
        found, local, others = named(caption)
        assert all(values[i] == value for i, value in found)
        assert len({i for i, _ in found}) == len(found)
        assert others <= FILLERS
        counts.add(len(found))
        first.add(found[0][0])
        shares += local
    assert counts == {2, 3, 4}
    assert first == set(range(8))
    assert np.mean(shares) == pytest.approx(local_words, abs=0.025 if 0 < local_words < 1 else 0)


def test_generic_captions_of_a_generator() -> None:
    """Same generator, same captions; of one photo there are many."""
    attributes = np.zeros((20, 8), dtype=int)
    first, second = (world.generic_captions(attributes, np.random.default_rng(1), 0.25) for _ in range(2))
    assert first == second
    assert len(set(first)) > 15
