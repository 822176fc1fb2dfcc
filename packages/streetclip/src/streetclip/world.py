"""A generated world of street scenes: places of attributes, names of their syllables, coordinates on a sphere.

A country fixes four attributes of its scenes, a region one more, a city one more; what no place fixes varies from photo
to photo. Names are made of one syllable for each attribute value, so that the name of a country that was never seen
tells what it looks like: that stands for what a pre-trained text tower knows of the world. Photos are never mirrored,
as the side that cars drive on is a cue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "line": ("white lines", "yellow lines", "dashed lines", "plain road"),
    "side": ("left traffic", "right traffic"),
    "sign": ("round signs", "triangle signs", "diamond signs"),
    "vegetation": ("pines", "palms", "reeds", "heather", "maples", "straw"),
    "soil": ("clay", "sand", "chalk", "peat"),
    "sky": ("blue sky", "grey sky", "pink sky", "amber sky"),
    "roof": ("flat roofs", "gable roofs", "dome roofs"),
    "script": ("bars", "stripes", "checks", "dots", "slants"),
}
"""Attribute -> words for its values. The first four make a country, then one a region, one a city; the rest vary."""
NAMES = tuple(ATTRIBUTES)
SIZES = tuple(len(words) for words in ATTRIBUTES.values())
COLUMNS, ROWS = 6, 4
COUNTRIES, REGIONS, CITIES = COLUMNS * ROWS, 4, 4
"""Countries of the world, regions of a country, cities of a region."""
RANDOM_SYLLABLES = 24
CARRIERS = (
    "a photo of ", "a road with ", "a street view photo in ", "a street view photo from ", "close to the town of ",
    "in the region of ",
)  # fmt: skip
"""What a generic caption may begin with, up to two of them: the web is wordy."""
UNSEEN_COUNTRIES = 4
NOISE = 0.08

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
# without what are words of their own
_ALL_SYLLABLES = [c + v for v in _VOWELS for c in _CONSONANTS if c + v not in ("no", "so", "to")]
SYLLABLES: tuple[tuple[str, ...], ...] = tuple(
    tuple(_ALL_SYLLABLES[start : start + size])
    for start, size in zip(np.cumsum((0, *SIZES[:-1])).tolist(), SIZES, strict=True)
)
"""Attribute number -> the syllable of each value; all are different, in every world the same."""
PLAIN_SYLLABLES = tuple(_ALL_SYLLABLES[sum(SIZES) : sum(SIZES) + RANDOM_SYLLABLES])
"""Syllables without a meaning, for the ends of names of regions and cities."""


@dataclass(frozen=True)
class World:
    """Places of a seed. Cities are numbered through: city = (country · 4 + region) · 4 + number.

    Attributes:
        attributes: [cities, 6] values of line, side, sign, vegetation, soil, sky.
        country_names: [24]. region_names: [cities], of each city's region. city_names: [cities].
        latitude, longitude: [cities] degrees.
        unseen_country: [24] whether it is held out. unseen_city: [cities] held out within a seen country.
    """

    attributes: np.ndarray
    country_names: tuple[str, ...]
    region_names: tuple[str, ...]
    city_names: tuple[str, ...]
    latitude: np.ndarray
    longitude: np.ndarray
    unseen_country: np.ndarray
    unseen_city: np.ndarray

    @property
    def country(self) -> np.ndarray:
        """[cities] number of the country."""
        return np.arange(len(self.city_names)) // (REGIONS * CITIES)

    @property
    def seen(self) -> np.ndarray:
        """[cities] whether a city's photos are in the training part."""
        return ~self.unseen_city & ~self.unseen_country[self.country]


def _walk(rng: np.random.Generator, sizes: tuple[int, int], steps: int, closed: bool) -> np.ndarray:
    """[steps, 2] pairs of values, all different, each differing in one of the two from the one before (and, closed, the
    last from the first), with two values or more of each."""
    pairs = [(a, b) for a in range(sizes[0]) for b in range(sizes[1])]
    while True:
        path = [pairs[rng.integers(len(pairs))]]
        while len(path) < steps:
            near = [p for p in pairs if p not in path and (p[0] == path[-1][0]) != (p[1] == path[-1][1])]
            if not near:
                break
            path.append(near[rng.integers(len(near))])
        found = np.array(path)
        if len(path) < steps or (closed and (found[0] == found[-1]).sum() != 1):
            continue
        if all(len(set(found[:, i])) > 1 for i in range(2)):
            return found


def make(seed: int) -> World:
    """The world of a seed: the same places, names and held-out places at every call.

    Countries stand on 6 × 4 cells of a sphere, 60° of longitude and 20° of latitude apart; neighbours, also across the
    date line, differ in exactly one attribute. A region lies 1.9° off its country's centre, a city 0.45° off its
    region's, in latitude and longitude both. Four countries are held out, such that each of their syllables is one of a
    seen country's too; of each region of the others, one city. No seen place has the name of a held-out one.
    """
    rng = np.random.default_rng([seed, 1])
    # columns walk over (side, vegetation), rows over (line, sign): all 4-tuples differ, neighbours in one value
    across = _walk(rng, (SIZES[1], SIZES[3]), COLUMNS, closed=True)
    down = _walk(rng, (SIZES[0], SIZES[2]), ROWS, closed=False)
    tuples = np.array([
        [line, side, sign, vegetation] for line, sign in down.tolist() for side, vegetation in across.tolist()
    ])  # fmt: skip
    unseen_country = np.zeros(COUNTRIES, dtype=bool)
    while True:
        chosen = rng.permutation(COUNTRIES)[:UNSEEN_COUNTRIES]
        unseen_country[:] = False
        unseen_country[chosen] = True
        kept = tuples[~unseen_country]
        if all(set(tuples[:, i]) == set(kept[:, i]) for i in range(4)):
            break
    attributes, regions, cities, latitude, longitude = [], [], [], [], []
    unseen_city = np.zeros(COUNTRIES * REGIONS * CITIES, dtype=bool)
    offsets = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)], dtype=float)
    for country in range(COUNTRIES):
        row, column = divmod(country, COLUMNS)
        soils, unseen = rng.permutation(SIZES[4]), bool(unseen_country[country])
        # a country's cities of one sky have different ends, so that (country, city) names one place
        region_ends, ends, held_ends = (_ends(rng, of) for of in ((4, unseen), (5, unseen), (5, True)))
        for region in range(REGIONS):
            skies, places = rng.permutation(SIZES[5]), rng.permutation(4)
            held = rng.integers(CITIES)
            for city in range(CITIES):
                soil, sky = soils[region], skies[city]
                attributes.append([*tuples[country], soil, sky])
                end = (held_ends if city == held and not unseen else ends)[sky][region]
                regions.append((SYLLABLES[4][soil] + PLAIN_SYLLABLES[region_ends[soil][region]]).capitalize())
                cities.append((SYLLABLES[5][sky] + PLAIN_SYLLABLES[end]).capitalize())
                offset = 1.9 * offsets[region] + 0.45 * offsets[places[city]]
                latitude.append(-30.0 + 20 * row + offset[0])
                longitude.append(-150.0 + 60 * column + offset[1])
                unseen_city[len(cities) - 1] = city == held and not unseen
    names = ["".join(SYLLABLES[i][value] for i, value in enumerate(one)).capitalize() for one in tuples]
    return World(
        np.array(attributes), tuple(names), tuple(regions), tuple(cities), np.array(latitude), np.array(longitude),
        unseen_country, unseen_city,
    )  # fmt: skip


def _ends(rng: np.random.Generator, of: tuple[int, bool]) -> np.ndarray:
    """[values, 4] different ends of names for each value of an attribute: for held-out places six that no other place's
    names have with that value."""
    attribute, held = of
    rows = []
    for value in range(SIZES[attribute]):
        kept = np.arange(6 * value, 6 * value + 6)
        rows.append(rng.permutation(kept if held else np.setdiff1d(np.arange(RANDOM_SYLLABLES), kept))[:REGIONS])
    return np.array(rows)


def photo_attributes(world: World, cities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[N, 8] values of all attributes of photos of the cities [N]: the city's own six, roofs and script at random."""
    varied = np.stack([rng.integers(size, size=len(cities)) for size in SIZES[6:]], axis=1)
    return np.concatenate([world.attributes[cities], varied], axis=1)


def generic_attributes(world: World, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, 8] values at random, of no held-out place: none has the four of an unseen country, or the six of an
    unseen city."""
    held_countries = _coded(world.attributes[world.unseen_country[world.country]][:, :4])
    held_cities = _coded(world.attributes[world.unseen_city])
    found = np.empty((0, len(SIZES)), dtype=int)
    while len(found) < count:
        drawn = np.stack([rng.integers(size, size=count) for size in SIZES], axis=1)
        refused = np.isin(_coded(drawn[:, :4]), held_countries) | np.isin(_coded(drawn[:, :6]), held_cities)
        found = np.concatenate([found, drawn[~refused]])
    return found[:count]


def _coded(values: np.ndarray) -> np.ndarray:
    """A number for each row of attribute values."""
    return np.ravel_multi_index(tuple(values.T), SIZES[: values.shape[1]])


def generic_captions(attributes: np.ndarray, rng: np.random.Generator, local_words: float) -> list[str]:
    """Captions of 2 to 4 of a photo's attributes, in random order: "a photo of a road with palms, ka, grey sky".

    With probability ``local_words`` an attribute is called by its syllable: what the web says of a place's things in
    the place's own words.
    """
    captions = []
    for row in attributes.tolist():
        named = rng.permutation(len(SIZES))[: rng.integers(2, 5)].tolist()
        local = (rng.random(len(named)) < local_words).tolist()
        wordy = "".join(CARRIERS[i] for i in rng.integers(len(CARRIERS), size=rng.integers(0, 3)))
        words = [
            SYLLABLES[i][row[i]] if own else ATTRIBUTES[NAMES[i]][row[i]] for i, own in zip(named, local, strict=True)
        ]
        captions.append(wordy + ", ".join(words))
    return captions


# ---- pixels

_SKY = np.array([(0.45, 0.65, 0.95), (0.68, 0.68, 0.70), (0.95, 0.68, 0.75), (0.95, 0.78, 0.45)])
_SOIL = np.array([(0.62, 0.32, 0.20), (0.85, 0.75, 0.50), (0.88, 0.88, 0.85), (0.25, 0.20, 0.18)])
_VEGETATION = np.array([
    (0.05, 0.30, 0.15), (0.25, 0.65, 0.20), (0.60, 0.70, 0.30), (0.50, 0.30, 0.55), (0.80, 0.35, 0.10),
    (0.85, 0.70, 0.20),
])  # fmt: skip
_WHITE, _YELLOW, _ROAD = np.array([0.95] * 3), np.array([0.95, 0.80, 0.05]), np.array([0.35, 0.35, 0.38])
_RED, _CAR, _WALL, _ROOF = (np.array(c) for c in [(0.85, 0.1, 0.1), (0.1, 0.1, 0.5), (0.8, 0.75, 0.7), (0.5, 0.2, 0.2)])
SIZE = 32
"""Pixels of a side of a photo."""


def render(attributes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photos [N, 32, 32, 3] as bytes of attribute values [N, 8].

    Sky, a strip of vegetation, soil, a road with its line, a car on the side that one drives on, one to three houses, a
    sign at the roadside, a billboard in the script, and parked cars that mean nothing; shifted sideways by up to 2
    pixels, brighter or darker by up to 15 %, with Gaussian noise of σ = 0.08.
    """
    pieces = [_render(attributes[i : i + 1000], rng) for i in range(0, len(attributes), 1000)]
    return np.concatenate(pieces) if pieces else np.empty((0, SIZE, SIZE, 3), dtype=np.uint8)


def _render(attributes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = len(attributes)
    line, side, sign, vegetation, soil, sky, roof, script = (attributes[:, i, None, None] for i in range(8))

    def whole(low: int, high: int) -> np.ndarray:
        return rng.integers(low, high, size=(count, 1, 1))

    y, x = np.mgrid[0:SIZE, 0:SIZE][:, None]
    x = x - whole(-2, 3)
    image = np.where((y < 13)[..., None], _SKY[sky], _SOIL[soil]).astype(np.float32)

    def paint(mask: np.ndarray, colour: np.ndarray) -> None:
        np.copyto(image, colour, where=mask[..., None])

    # houses behind the vegetation
    houses = whole(1, 4)
    for number in range(3):
        left, there = 12 + 7 * number + whole(-1, 2) - 1, houses > number
        wide = (x >= left) & (x < left + 6) & there
        paint(wide & (y >= 8) & (y < 13), _WALL)
        middle, up = np.abs(x - left - 2.5), 8 - y  # rows above the wall, from 1
        gable = (middle <= 3.5 - up) & (up >= 1)
        dome = (middle**2 + (up - 0.5) ** 2 <= 9.0) & (up >= 1)
        flat = (up == 1) & (middle <= 3.5)
        shape = np.where(roof == 0, flat, np.where(roof == 1, gable, dome))
        paint(shape & there & (np.abs(middle) <= 3.5), _ROOF)
    ragged = whole(0, 2)
    paint((y >= 11 + (x + ragged) % 2) & (y < 15), _VEGETATION[vegetation])
    # road: from 2 pixels wide at row 13 to 20 at the bottom
    off = np.abs(x - 15.5)
    paint((y >= 13) & (off <= 1 + 0.55 * (y - 12)), _ROAD)
    marked = (y >= 15) & (off <= 0.6 + (y > 23)) & (line != 3) & ((line != 2) | (y % 6 < 3))
    paint(marked, np.where((line == 1)[..., None], _YELLOW, _WHITE))
    # the car ahead, on its side of the road
    middle = np.where(side == 0, 12.0, 19.0)
    car = np.abs(x - middle) <= 2
    paint(car & (y >= 19) & (y < 23), _CAR)
    paint((np.abs(np.abs(x - middle) - 1.5) <= 0.6) & (y == 22), _RED)
    # parked cars anywhere at the roadside
    for _ in range(2):
        left, top = np.where(whole(0, 2) == 0, whole(-1, 3), whole(26, 31)), whole(19, 28)
        grey = rng.uniform(0.2, 0.9, size=(count, 1, 1, 3))
        paint((x >= left) & (x < left + 4) & (y >= top) & (y < top + 3) & (whole(0, 2) == 0), grey)
    # a sign at the roadside, white with a red rim
    across, below = x - np.where(whole(0, 2) == 0, 5, 26), y - 17
    extent = np.stack([
        np.broadcast_to(one, image.shape[:3])
        for one in (
            np.sqrt(across**2 + below**2 + 0.0), np.maximum(2 * np.abs(across) + below - 1, -1.6 * below + 0.8) * 0.85,
            np.abs(across) + np.abs(below) * 1.0,
        )
    ])  # fmt: skip
    shape = np.take_along_axis(extent, np.broadcast_to(sign, image.shape[:3])[None], axis=0)[0]
    paint((np.abs(across) < 0.6) & (below > 2) & (below < 7), _WALL * 0.5)
    paint(shape <= 3.4, _RED)
    paint(shape <= 1.9, _WHITE)
    # a billboard at the top left
    u, v = x - 2, y - 2
    pattern = np.select(
        [script == i for i in range(4)], [u % 2 == 0, v % 2 == 0, (u // 2 + v // 2) % 2 == 0, (u % 2) * (v % 2) == 1],
        (u + v) % 3 == 0,
    )  # fmt: skip
    board = (u >= 0) & (u < 8) & (v >= 0) & (v < 6)
    paint(board, _WHITE)
    paint(board & pattern, np.zeros(3))
    image *= rng.uniform(0.85, 1.15, size=(count, 1, 1, 1)).astype(np.float32)
    image += NOISE * rng.standard_normal(image.shape, dtype=np.float32)
    return (255 * image.clip(0, 1)).round().astype(np.uint8)
