"""Places of photos from captions: three modes, by hand and beside a loop without a cache; and CLIPs on disk."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo import runfolder
from metazoo.errors import UserError
from PIL import Image
from streetclip.config import CITY_CAPTION, COUNTRY_CAPTION, Config
from streetclip.gazetteer import Gazetteer
from streetclip.geolocator import GeoPrediction, HierarchicalZeroShotGeolocator, Mode
from streetclip.model import Clip, load_model
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    pipeline,
)

torch.set_num_threads(1)
MODES: tuple[Mode, ...] = ("hierarchical", "flat", "soft")
# (country, city, latitude, longitude, population): Rasa is in two countries, two cities of Tevo have as many people
ROWS = [
    ("Bado", "Rasa", 1.0, 2.0, 50),
    ("Bado", "Lofi", 3.0, 4.0, 90),
    ("Mipu", "Rasa", -30.0, 100.0, 10),
    ("Tevo", "Pama", 60.0, -20.0, 7),
    ("Tevo", "Kudo", 61.0, -21.0, 7),
    ("Tevo", "Zeki", 62.0, -22.0, 9),
    ("Bado", "Gunu", 5.0, 6.0, 70),
]


def gazetteer(rows: Sequence[tuple[str, str, float, float, int]] = ROWS, region: bool = False) -> Gazetteer:
    countries = tuple(dict.fromkeys(row[0] for row in rows))
    return Gazetteer(
        countries=countries, cities=tuple(row[1] for row in rows),
        country=np.array([countries.index(row[0]) for row in rows]), latitude=np.array([row[2] for row in rows]),
        longitude=np.array([row[3] for row in rows]), population=np.array([float(row[4]) for row in rows]),
        regions=tuple(f"region {i}" for i in range(len(rows))) if region else (),
    )  # fmt: skip


def tiny(seed: int = 0) -> Clip:
    """With weights so large that captions and photos are told apart."""
    torch.manual_seed(seed)
    clip = load_model(Config(width=16, heads=2, vision_layers=1, text_layers=1, projection=8))
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
        clip.log_scale.fill_(1.0)  # no probability near 0 or 1: the modes disagree
    return clip


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny()


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(24)]


def chosen(found: Sequence[GeoPrediction]) -> list[tuple[str, str]]:
    return [(one.country, one.city) for one in found]


def all_probabilities(found: Sequence[GeoPrediction]) -> list[dict[tuple[str, str], float]]:
    return [{(place.country, place.city): place.probability for place in one.places} for one in found]


# ---- by hand


class Written(nn.Module):
    """A text tower by hand: caption i is the unit vector e_i, so that a photo's features are its captions' logits."""

    def __init__(self, captions: Sequence[str]) -> None:
        super().__init__()
        self.captions = list(captions)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def features_of_texts(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        return torch.eye(len(self.captions))[[self.captions.index(one) for one in captions]]


NAMES = ["Bado", "Mipu", "Tevo"]
CITIES = ["Rasa", "Lofi", "Gunu", "Pama", "Kudo", "Zeki"]


def by_hand(mode: Mode, cities: int = 30, places: Gazetteer | None = None) -> HierarchicalZeroShotGeolocator:
    captions = [COUNTRY_CAPTION.format(country=name) for name in NAMES]
    captions += [CITY_CAPTION.format(city=name) for name in CITIES]
    clip: Any = Written(captions)
    return HierarchicalZeroShotGeolocator(clip, places or gazetteer(), mode=mode, cities=cities)


def features(**logits: float) -> Tensor:
    """Of one photo; a name without a logit has 0."""
    return torch.tensor([[float(logits.get(name, 0.0)) for name in (*NAMES, *CITIES)]])


def test_three_modes_by_hand() -> None:
    """Log probabilities as logits, so that the modes disagree: each by its definition."""
    log = np.log
    # p(Bado, Mipu, Tevo) = .5, .1, .4; in Bado p(Rasa, Lofi, Gunu) = .4, .3, .3;
    # in Tevo p(Pama, Kudo, Zeki) = .1, 0, .9
    photo = features(
        Bado=log(0.5), Mipu=log(0.1), Tevo=log(0.4), Rasa=log(4.0), Lofi=log(3.0), Gunu=log(3.0), Pama=log(0.4),
        Kudo=-200.0, Zeki=log(3.6),
    )  # fmt: skip
    hard = by_hand("hierarchical").locate(photo, top_k=4)
    assert hard.cities.tolist() == [[0, 1, 6, -1]]  # of the two with .3 the more populous first
    np.testing.assert_allclose(hard.probabilities, [[0.2, 0.15, 0.15, 0]], rtol=1e-5)
    np.testing.assert_allclose(hard.countries, [[0.5, 0.1, 0.4]], rtol=1e-5)
    soft = by_hand("soft").locate(photo, top_k=7)
    assert soft.cities.tolist() == [[5, 0, 1, 6, 2, 3, 4]]
    np.testing.assert_allclose(soft.probabilities, [[0.36, 0.2, 0.15, 0.15, 0.1, 0.04, 0]], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(soft.countries, [[0.5, 0.1, 0.4]], rtol=1e-5)
    flat = by_hand("flat").locate(photo, top_k=7)  # Rasa's caption is there for both countries
    assert flat.cities.tolist() == [[0, 2, 5, 1, 6, 3, 4]]
    np.testing.assert_allclose(flat.probabilities, [np.array([4, 4, 3.6, 3, 3, 0.4, 0]) / 18], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(flat.countries, [np.array([10, 4, 4]) / 18], rtol=1e-5)


@pytest.mark.parametrize("cities", [1, 2, 30, 0])
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_one_hot_country(cities: int, seed: int) -> None:
    """Where the country is certain, soft equals hierarchical, in all places that have a probability."""
    rng = np.random.default_rng(seed)
    country = int(rng.integers(3))
    values = rng.normal(0, 3, (1, 9))
    values[0, :3] = 0
    values[0, country] = 500  # its probability is 1, that of others 0
    photo = torch.from_numpy(values).float()
    hard, soft = (by_hand(mode, cities).locate(photo, top_k=3) for mode in ("hierarchical", "soft"))
    held = hard.cities[0] >= 0
    assert hard.countries.tolist() == soft.countries.tolist() == np.eye(3)[[country]].tolist()
    np.testing.assert_array_equal(soft.cities[0, held], hard.cities[0, held])
    np.testing.assert_allclose(soft.probabilities[0, held], hard.probabilities[0, held], rtol=1e-6)
    np.testing.assert_array_equal(soft.probabilities[0, ~held], 0)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_one_city(seed: int) -> None:
    """cities = 1: the most populous city of the country found, whatever the cities' captions say."""
    photo = torch.from_numpy(np.random.default_rng(seed).normal(0, 5, (6, 9))).float()
    found = by_hand("hierarchical", cities=1).locate(photo)
    most = np.array([1, 2, 5])  # Lofi, Rasa, Zeki
    country = photo[:, :3].argmax(1).numpy()
    np.testing.assert_array_equal(found.cities[:, 0], most[country])
    np.testing.assert_allclose(found.probabilities[:, 0], photo[:, :3].softmax(1).max(1).values, rtol=1e-5)


def test_extra_name_leads_to_its_country() -> None:
    """The single best name decides, though its country's other names have less; a country's probability is its sum."""
    names, places = ["Bado", "Mipu", "Tevo"], replace(gazetteer(), extra=(("Nord, Mipu", 1), ("Sud, Mipu", 1)))
    captions = [COUNTRY_CAPTION.format(country=name) for name in (*names, "Nord, Mipu", "Sud, Mipu")]
    captions += [CITY_CAPTION.format(city=name) for name in CITIES]
    written: Any = Written(captions)
    shares = np.array([[0.3, 0.1, 0.1, 0.1, 0.4], [0.4, 0.0, 0.0, 0.3, 0.3], [0.1, 0.5, 0.2, 0.1, 0.1]])
    photo = torch.zeros(3, len(captions))
    photo[:, :5] = torch.from_numpy(np.log(shares + 1e-30)).float()
    found = HierarchicalZeroShotGeolocator(written, places).locate(photo)
    assert places.country[found.cities[:, 0]].tolist() == [1, 0, 1]
    np.testing.assert_allclose(found.countries, [[0.3, 0.6, 0.1], [0.4, 0.6, 0], [0.1, 0.7, 0.2]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.probabilities[:, 0], [0.6, 0.4 / 3, 0.7], rtol=1e-5)


# ---- invariances (h(v; X) of the paper)


def rotated(clip: Clip, seed: int = 0) -> Clip:
    """The same with both towers' features turned by one orthogonal matrix, and scaled before they get norm 1."""
    turned = copy.deepcopy(clip)
    size = clip.model.config.projection_dim
    rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]
    with torch.no_grad():
        turned.model.visual_projection.weight.copy_(3 * rotation @ clip.model.visual_projection.weight)
        turned.model.text_projection.weight.copy_(0.5 * rotation @ clip.model.text_projection.weight)
    return turned


@pytest.mark.parametrize("mode", MODES)
def test_joint_rotation(mode: Mode, clip: Clip, photos: list[Image.Image]) -> None:
    """Classifiers do not depend on the basis of the joint space, nor on the length of features."""
    one = HierarchicalZeroShotGeolocator(clip, gazetteer(), mode=mode)
    other = HierarchicalZeroShotGeolocator(rotated(clip), gazetteer(), mode=mode)
    assert not torch.allclose(one.country_weights(), other.country_weights(), atol=0.1)
    wanted, found = all_probabilities(one.predict(photos)), all_probabilities(other.predict(photos))
    for a, b in zip(wanted, found, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_permuted_candidates(mode: Mode, clip: Clip, photos: list[Image.Image]) -> None:
    """In another order the same places have the same probabilities."""
    order = np.random.default_rng(1).permutation(len(ROWS))
    one = HierarchicalZeroShotGeolocator(clip, gazetteer(), mode=mode)
    other = HierarchicalZeroShotGeolocator(clip, gazetteer([ROWS[i] for i in order]), mode=mode)
    assert one.gazetteer.countries != other.gazetteer.countries
    for a, b in zip(one.predict(photos, 7), other.predict(photos, 7), strict=True):
        assert dict(a.countries) == pytest.approx(dict(b.countries), rel=1e-5)
        (first,), (second,) = all_probabilities([a]), all_probabilities([b])
        assert first == pytest.approx(second, rel=1e-5)
    assert len(set(chosen(one.predict(photos)))) > 2


@pytest.mark.parametrize("mode", MODES)
def test_probabilities(mode: Mode, clip: Clip, photos: list[Image.Image]) -> None:
    """Countries' sum to 1, cities' too (to the country's where one was chosen); more places than there are: all."""
    for one in HierarchicalZeroShotGeolocator(clip, gazetteer(), mode=mode).predict(photos, top_k=50):
        assert sum(probability for _, probability in one.countries) == pytest.approx(1, rel=1e-5)
        total = sum(place.probability for place in one.places)
        assert total == pytest.approx(one.country_probability if mode == "hierarchical" else 1, rel=1e-5)
        named = {(place.country, place.city) for place in one.places}
        inside = {(row[0], row[1]) for row in ROWS if mode != "hierarchical" or row[0] == one.country}
        assert len(one.places) == len(named)
        assert named == inside
        ordered = [place.probability for place in one.places]
        assert ordered == sorted(ordered, reverse=True)
        assert one.country_probability == dict(one.countries)[one.country]
        best = one.places[0]
        assert (one.city, one.country, one.latitude, one.longitude, one.probability) == (
            best.city, best.country, best.latitude, best.longitude, best.probability,
        )  # fmt: skip


def test_one_country(clip: Clip, photos: list[Image.Image]) -> None:
    """Where there is no country to choose, the three modes are one."""
    places = gazetteer([row for row in ROWS if row[0] == "Bado"])
    found = [HierarchicalZeroShotGeolocator(clip, places, mode=mode).predict(photos) for mode in MODES]
    for hard, flat, soft in zip(*found, strict=True):
        for other in (flat, soft):
            (a,), (b,) = all_probabilities([hard]), all_probabilities([other])
            assert a == pytest.approx(b, rel=1e-5)
            assert (hard.city, hard.country_probability) == (other.city, pytest.approx(other.country_probability))


# ---- beside a loop that encodes everything for each photo


def naive(clip: Clip, photo: Image.Image, places: Gazetteer, mode: Mode, cities: int) -> tuple[int, float]:
    """The best city and its probability, by transformers' own forward pass of all captions and one photo."""

    def probabilities(captions: list[str]) -> np.ndarray:
        ids = clip.tokenizer(captions, padding=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = clip.model(input_ids=ids, pixel_values=clip.pixels([photo])).logits_per_image
        found: np.ndarray = logits[0].double().softmax(-1).numpy()
        return found

    def city_captions(numbers: Sequence[int]) -> list[str]:
        return [CITY_CAPTION.format(city=places.cities[i]) for i in numbers]

    def most_populous(country: int) -> list[int]:
        inside = [i for i in range(len(places.cities)) if places.country[i] == country]
        return sorted(inside, key=lambda i: (-places.population[i], i))[:cities]

    held = [most_populous(country) for country in range(len(places.countries))]
    every = [i for one in held for i in one]
    if mode == "flat":
        found = probabilities(city_captions(every))
        return every[int(found.argmax())], float(found.max())
    country = probabilities([COUNTRY_CAPTION.format(country=name) for name in places.countries])
    joint: dict[int, float] = {}
    for number in [int(country.argmax())] if mode == "hierarchical" else range(len(country)):
        inside = probabilities(city_captions(held[number]))
        joint |= {i: float(p * country[number]) for i, p in zip(held[number], inside, strict=True)}
    best = max(joint, key=lambda i: joint[i])
    return best, joint[best]


@pytest.mark.parametrize("cities", [2, 30])
@pytest.mark.parametrize("mode", MODES)
def test_like_a_naive_loop(mode: Mode, cities: int, clip: Clip, photos: list[Image.Image]) -> None:
    places = gazetteer()
    located = HierarchicalZeroShotGeolocator(clip, places, mode=mode, cities=cities)
    found = located.predict(photos, batch_size=7)
    wanted = [naive(clip, photo, places, mode, cities) for photo in photos]
    assert chosen(found) == [(places.countries[places.country[i]], places.cities[i]) for i, _ in wanted]
    np.testing.assert_allclose([one.probability for one in found], [p for _, p in wanted], rtol=1e-3)
    assert len(set(chosen(found))) > 2


def test_modes_differ(clip: Clip, photos: list[Image.Image]) -> None:
    """Or the tests above could not tell them apart."""
    hard, flat, soft = (
        chosen(HierarchicalZeroShotGeolocator(clip, gazetteer(), mode=mode).predict(photos)) for mode in MODES
    )
    assert hard != flat
    assert hard != soft
    assert flat != soft


# ---- captions are encoded once


def test_each_caption_once(clip: Clip, photos: list[Image.Image]) -> None:
    """In several calls together; cities of countries that are never found are not encoded; Rasa's caption is one."""
    flat = HierarchicalZeroShotGeolocator(clip, gazetteer(), mode="flat")
    assert flat.texts_encoded == 0
    for part in (photos[:3], photos[3:], photos):
        flat.predict(part)
        assert flat.texts_encoded == 6
    soft = HierarchicalZeroShotGeolocator(clip, gazetteer(), mode="soft", cities=2)
    for _ in range(2):
        soft.predict(photos)
        assert soft.texts_encoded == 3 + 5  # Lofi, Gunu; Rasa of Mipu; Zeki and, of two with as many people, the first
    hard = HierarchicalZeroShotGeolocator(clip, gazetteer())
    seen: set[str] = set()
    for photo in photos:
        (found,) = hard.predict([photo])
        seen |= {place.city for place in found.places}
        assert hard.texts_encoded == 3 + len(seen)
    assert len(seen) > 1


def test_kept_classifier(clip: Clip) -> None:
    """A user's own candidates: in their order, of norm 1, none encoded again."""
    located = HierarchicalZeroShotGeolocator(clip, gazetteer())
    captions = ["a road with palms", "a road with pines", "clay"]
    found = located.zero_shot_classifier(captions)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(located.zero_shot_classifier([*captions[::-1], "sand"], batch_size=1)[:3], found.flip(0))
    assert located.texts_encoded == 4


# ---- features on disk


def test_cache(clip: Clip, photos: list[Image.Image], tmp_path: Path) -> None:
    """A second geolocator encodes nothing and finds the same; one of further captions encodes those only."""
    first = HierarchicalZeroShotGeolocator(clip, gazetteer(), mode="soft", cache_dir=tmp_path / "new" / "cache")
    wanted = first.predict(photos)
    assert first.texts_encoded == 9
    second = HierarchicalZeroShotGeolocator(
        copy.deepcopy(clip), gazetteer(), mode="soft", cache_dir=tmp_path / "new" / "cache"
    )
    assert second.predict(photos) == wanted
    assert second.texts_encoded == 0
    more = gazetteer([*ROWS, ("Mipu", "Nore", 0.0, 0.0, 1)])
    third = HierarchicalZeroShotGeolocator(clip, more, mode="soft", cache_dir=tmp_path / "new" / "cache")
    third.predict(photos)
    assert third.texts_encoded == 1
    assert [path.suffix for path in (tmp_path / "new" / "cache").iterdir()] == [".safetensors"]


def test_cache_of_other_weights(clip: Clip, tmp_path: Path) -> None:
    """Of another text tower nothing is taken; the image tower does not count."""
    wanted = HierarchicalZeroShotGeolocator(clip, gazetteer(), cache_dir=tmp_path).country_weights()
    for name, encoded in (("text_projection", 3), ("text_model", 3), ("vision_model", 0), ("visual_projection", 0)):
        other = copy.deepcopy(clip)
        with torch.no_grad():
            next(getattr(other.model, name).parameters()).mul_(1.5)
            next(getattr(other.model, name).parameters())[0] += 1
        located = HierarchicalZeroShotGeolocator(other, gazetteer(), cache_dir=tmp_path)
        found = located.country_weights()
        assert located.texts_encoded == encoded, name
        assert torch.equal(found, wanted) == (not encoded), name


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_damaged_cache(damage: bytes | None, clip: Clip, tmp_path: Path) -> None:
    """Counts as none, and is replaced by a good one."""
    wanted = HierarchicalZeroShotGeolocator(clip, gazetteer(), cache_dir=tmp_path).country_weights()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    for encoded in (3, 0):
        located = HierarchicalZeroShotGeolocator(clip, gazetteer(), cache_dir=tmp_path)
        assert torch.equal(located.country_weights(), wanted)
        assert located.texts_encoded == encoded


def test_cache_that_cannot_be_written(clip: Clip, tmp_path: Path) -> None:
    """A folder below a file, a file, a folder in which no file can be made: one line each."""
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "x", tmp_path / "file", Path("/proc")):
        located = HierarchicalZeroShotGeolocator(clip, gazetteer(), cache_dir=folder)
        with pytest.raises(UserError, match=f"--cache-dir {folder}: cannot be written into"):
            located.country_weights()
    assert (tmp_path / "file").read_text() == "mine"


# ---- places and names


@pytest.mark.parametrize("mode", ["hierarchical", "soft"])
def test_same_named_cities(mode: Mode, clip: Clip) -> None:
    """A city is looked up with its country, though its caption is the same in both."""
    located = HierarchicalZeroShotGeolocator(
        clip, gazetteer([row for row in ROWS if row[1] == "Rasa"]), mode=mode, cities=1
    )
    found = located.predictions(located.locate(located.country_weights()))
    assert [(one.country, one.city, one.latitude, one.longitude) for one in found] == [
        ("Bado", "Rasa", 1.0, 2.0), ("Mipu", "Rasa", -30.0, 100.0),
    ]  # fmt: skip
    assert located.texts_encoded == 3


def test_one_caption_of_two_places(clip: Clip) -> None:
    """Captions do not tell them apart: of a country only the most populous is asked for, of several the same leads."""
    rows = [
        ("Mipu", "Rasa", -30.0, 100.0, 10), ("Bado", "Rasa", 1.0, 2.0, 90), ("Bado", "Lofi", 3.0, 4.0, 70),
        ("Bado", "Rasa", 8.0, 9.0, 50), ("Bado", "Gunu", 5.0, 6.0, 20),
    ]  # fmt: skip
    for mode in MODES:
        located = HierarchicalZeroShotGeolocator(clip, gazetteer(rows), mode=mode)
        assert located.candidates(1).tolist() == [1, 2, 4]  # most populous first
        (found,) = located.predictions(located.locate(clip.features_of_texts([CITY_CAPTION.format(city="Rasa")])))
        if mode == "flat":
            assert (found.country, found.latitude) == ("Bado", 1.0)
        (found,) = located.predictions(located.locate(located.country_weights()[1:], top_k=9), top_k=9)
        assert sum(place.probability for place in found.places) == pytest.approx(
            found.country_probability if mode == "hierarchical" else 1, rel=1e-5
        )
        assert 8.0 not in [place.latitude for place in found.places]


def test_states_lead_to_the_united_states(clip: Clip) -> None:
    """Georgia is a country and a state: the state's caption leads to cities of the United States."""
    places = Gazetteer.geonames(us_states=True)
    assert len(places.extra) == 50
    located = HierarchicalZeroShotGeolocator(clip, places, cities=3)
    names = [name for name, _ in places.asked]
    asked = ["Georgia", "Georgia, United States", "Texas, United States"]
    photos = located.country_weights()[[names.index(name) for name in asked]]
    found = located.predictions(located.locate(photos))
    assert [one.country for one in found] == ["Georgia", "United States", "United States"]
    assert found[0].longitude > 40
    assert found[1].longitude < -60


def test_regions_in_captions(clip: Clip) -> None:
    """A template with {region} and {country} is filled in from the gazetteer, one city at a time."""
    template = "A photo from {city}[, {region}], {country}."
    captions: list[str] = []
    for held in (True, False):
        located = HierarchicalZeroShotGeolocator(clip, gazetteer(region=held), city_template=template)
        located.all_city_weights()
        assert located.texts_encoded == 7  # with the country, both Rasas
        captions += sorted(caption for caption in located._kept if "Rasa" in caption)
    assert captions == [
        "A photo from Rasa, region 0, Bado.", "A photo from Rasa, region 2, Mipu.", "A photo from Rasa, Bado.",
        "A photo from Rasa, Mipu.",
    ]  # fmt: skip
    bare = HierarchicalZeroShotGeolocator(clip, gazetteer(), city_template="In {city}, {region}.", mode="flat")
    with pytest.raises(UserError, match="no region, which the template"):
        bare.all_city_weights()


def test_ensemble(clip: Clip, photos: list[Image.Image]) -> None:
    """Equal templates are as one; different ones' weights are the mean, of norm 1 again."""
    one = HierarchicalZeroShotGeolocator(clip, gazetteer())
    same = HierarchicalZeroShotGeolocator(clip, gazetteer(), ensemble=(COUNTRY_CAPTION, COUNTRY_CAPTION))
    torch.testing.assert_close(same.country_weights(), one.country_weights())
    assert same.texts_encoded == 3
    assert chosen(same.predict(photos)) == chosen(one.predict(photos))
    second = "{country}: a photo of a road"
    both = HierarchicalZeroShotGeolocator(clip, gazetteer(), ensemble=(second,))
    parts = [clip.features_of_texts([text.format(country=n) for n in NAMES]) for text in (COUNTRY_CAPTION, second)]
    mean = torch.stack(parts).mean(0)
    torch.testing.assert_close(both.country_weights(), mean / mean.norm(dim=1, keepdim=True))
    assert not torch.allclose(both.country_weights(), one.country_weights(), atol=1e-2)


def test_photos_and_files(clip: Clip, photos: list[Image.Image], tmp_path: Path) -> None:
    """Paths, images and batches of any size have the same places; so has one photo alone."""
    for i, photo in enumerate(photos[:3]):
        photo.save(tmp_path / f"{i}.png")
    located = HierarchicalZeroShotGeolocator(clip, gazetteer())
    wanted = located.predict(photos[:3])
    mixed = located.predict([tmp_path / "0.png", str(tmp_path / "1.png"), photos[2]], batch_size=2)
    assert chosen(mixed) == chosen(wanted)
    assert [one.probability for one in mixed] == pytest.approx([one.probability for one in wanted], rel=1e-5)
    assert [len(one.places) for one in located.predict(photos[:3], top_k=1)] == [1, 1, 1]
    for alone in (photos[0], tmp_path / "0.png", str(tmp_path / "0.png")):
        assert chosen(located.predict(alone)) == chosen(wanted[:1])


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "mode 'best': one of hierarchical, flat, soft"),
        ({"country_template": "A photo."}, "A photo."),
        ({"country_template": "A photo from {city}."}, "{country} is missing"),
        ({"city_template": "A photo in {country}."}, "{city} is missing"),
        ({"city_template": "{city} {street}"}, "{street}"),
        ({"city_template": "{city}[, {region}"}, "square brackets"),
        ({"ensemble": ("{country}", "{city}")}, "{country} is missing"),
        ({"city_template": "{city:>9}"}, "{city:>9}"),
        ({"country_template": "{country!r}"}, "{country!r}"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, clip: Clip) -> None:
    with pytest.raises(UserError) as caught:
        HierarchicalZeroShotGeolocator(clip, gazetteer(), **options)
    assert message in str(caught.value)


def test_wrong_candidates(clip: Clip) -> None:
    """Two captions alike, none, and one longer than the text tower's positions; nothing is kept of them."""
    located = HierarchicalZeroShotGeolocator(clip, gazetteer())
    with pytest.raises(UserError, match="caption 'b' is there twice"):
        located.zero_shot_classifier(["a", "b", "c", "b"])
    with pytest.raises(UserError, match="no candidates"):
        located.zero_shot_classifier([])
    # 75 words and the two ends fill the 77 positions
    assert located.zero_shot_classifier(["a " * 75]).shape == (1, 8)
    with pytest.raises(UserError, match=r"caption 'a a .* has 78 tokens, the text tower 77"):
        located.zero_shot_classifier(["short", "a " * 76])
    assert located.texts_encoded == 1


def test_wrong_photos(clip: Clip, photos: list[Image.Image], tmp_path: Path) -> None:
    located = HierarchicalZeroShotGeolocator(clip, gazetteer())
    with pytest.raises(UserError, match="no photos"):
        located.predict([])
    with pytest.raises(UserError, match="top_k is 0"):
        located.predict(photos, top_k=0)
    with pytest.raises(UserError, match=r"none\.png"):
        located.predict([tmp_path / "none.png"])


# ---- CLIPs on disk


def test_saved_clip(clip: Clip, photos: list[Image.Image], tmp_path: Path) -> None:
    """transformers' own classes load it and compute identical logits, from the same texts and photos."""
    clip.save_pretrained(tmp_path)
    loaded: Any = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    processor = CLIPProcessor.from_pretrained(tmp_path)
    captions = ["A Street View photo in Bado.", "a road with palms, clay, pink sky and dome roofs"]
    inputs = processor(text=captions, images=photos[:4], return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model.eval()(**inputs).logits_per_image
        wanted = clip.model(input_ids=clip.tokenize(captions), pixel_values=clip.pixels(photos[:4])).logits_per_image
        ours = clip.log_scale.exp() * clip.encode_images(clip.pixels(photos[:4])) @ clip.features_of_texts(captions).T
    assert torch.equal(found, wanted)
    torch.testing.assert_close(ours, wanted)
    assert wanted.std() > 0.1
    again = Clip.from_pretrained(tmp_path)
    assert torch.equal(again.features_of_texts(captions), clip.features_of_texts(captions))
    assert torch.equal(again.pixels(photos), clip.pixels(photos))


def test_zero_shot_pipeline(clip: Clip, photos: list[Image.Image], tmp_path: Path) -> None:
    """transformers' pipeline gives a country the probability that the geolocator gives it."""
    clip.save_pretrained(tmp_path)
    classify = pipeline(
        "zero-shot-image-classification", model=str(tmp_path),
        image_processor=CLIPProcessor.from_pretrained(tmp_path).image_processor,
    )  # fmt: skip
    template = COUNTRY_CAPTION.format(country="{}")
    located = HierarchicalZeroShotGeolocator.from_pretrained(tmp_path, gazetteer(), device="cpu").predict(photos[:4])
    for photo, ours in zip(photos[:4], located, strict=True):
        found = classify(photo, candidate_labels=NAMES, hypothesis_template=template)
        assert {one["label"]: one["score"] for one in found} == pytest.approx(dict(ours.countries), rel=1e-3)


def test_from_a_run_folder(clip: Clip, photos: list[Image.Image], tmp_path: Path) -> None:
    """Its model, and its templates and number of cities where no others are given."""
    run = tmp_path / "run"
    config = Config(country_template="{country}, a photo", city_template="{city}, a photo", cities=2)
    (run / "checkpoints").mkdir(parents=True)
    runfolder.write_json(run / "config.json", runfolder.config_to_dict(config))
    load = HierarchicalZeroShotGeolocator.from_pretrained
    with pytest.raises(UserError, match="has no model yet: finish it with --resume"):
        load(run, gazetteer())
    clip.save_pretrained(run / "model")
    options: dict[str, Any] = {"country_template": config.country_template, "city_template": config.city_template}
    wanted = HierarchicalZeroShotGeolocator(clip, gazetteer(), mode="soft", cities=2, **options).predict(photos)
    assert load(run, gazetteer(), mode="soft", device="cpu").predict(photos) == wanted
    assert load(run, gazetteer(), mode="soft", cities=None, city_template=None, device="cpu").predict(photos) == wanted
    given = {"country_template": COUNTRY_CAPTION, "city_template": CITY_CAPTION, "cities": 30}
    other = HierarchicalZeroShotGeolocator(clip, gazetteer()).predict(photos)
    assert load(run, gazetteer(), device="cpu", **given).predict(photos) == other
    runfolder.write_json(run / "config.json", runfolder.config_to_dict(replace(config, method="label-head")))
    with pytest.raises(UserError, match="is a label head"):
        load(run, gazetteer())
    with pytest.raises(UserError, match=r"no config\.json in it"):
        load(tmp_path, gazetteer())


def write_openai_form(folder: Path, end: int | None = None) -> int:
    """A checkpoint as OpenAI's on the hub: vocab.json and merges.txt of byte-level BPE; the number of <|endoftext|>.

    Args:
        end: eos_token_id of config.json [default: the tokenizer's]; the first CLIPs on the hub say 2, which is wrong.
    """
    folder.mkdir(parents=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz.,:!'0123456789"]
    merges = ["s t", "st r", "str e", "e t</w>", "i n</w>", "i e", "p h", "o t", "ph ot", "phot o</w>"]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    specials = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**specials, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"})
    )
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    processor = {
        "crop_size": 24, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": 24, "resample": 3,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": mean, "image_std": deviation,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    last = vocabulary["<|endoftext|>"]
    both = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(3)
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **both, "vocab_size": len(vocabulary), "max_position_embeddings": 77, "bos_token_id": last - 1,
                "eos_token_id": last, "pad_token_id": last,
            },
            vision_config={**both, "image_size": 24, "patch_size": 8},
            projection_dim=8,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    if end is not None:
        held = json.loads((folder / "config.json").read_text())
        held["text_config"] |= {"bos_token_id": 0, "eos_token_id": end, "pad_token_id": 1}
        (folder / "config.json").write_text(json.dumps(held))
    return last


@pytest.mark.parametrize("end", [None, 2])
def test_openai_form(end: int | None, tmp_path: Path) -> None:
    """A text's feature is that of its <|endoftext|>, alone or filled up, whatever config.json says of it."""
    last = write_openai_form(tmp_path / "clip", end)
    clip = Clip.from_pretrained(tmp_path / "clip")
    captions = ["A Street photo in Bado.", "in", "street photo: it's in St. Mipu, in the street of the photo!"]
    ids = clip.tokenize(captions)
    # the tokenizer's own class, straight from the two files
    straight = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    assert ids.tolist() == straight(captions, padding=True)["input_ids"]
    vocabulary = json.loads((tmp_path / "clip" / "vocab.json").read_text())
    start = [vocabulary[one] for one in ("<|startoftext|>", "a</w>", "stre", "et</w>", "photo</w>", "in</w>")]
    assert ids[0, : len(start)].tolist() == start
    assert (ids[1, 2:] == last).all()
    found = clip.features_of_texts(captions)
    for row, caption in enumerate(captions):
        alone = clip.tokenizer(caption, return_tensors="pt")["input_ids"]
        assert alone[0, -1] == last
        with torch.no_grad():
            hidden = clip.model.text_model(input_ids=alone).last_hidden_state[0, -1]
            wanted = nn.functional.normalize(clip.model.text_projection(hidden), dim=-1)
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)
    assert (found @ found.T).fill_diagonal_(0).max() < 0.99


def test_openai_form_locates(tmp_path: Path) -> None:
    """With photos of another size and shape, as transformers' processor and model score them; saved again, the same."""
    write_openai_form(tmp_path / "clip", 2)
    rng = np.random.default_rng(1)
    photos = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(4)]
    located = HierarchicalZeroShotGeolocator.from_pretrained(tmp_path / "clip", gazetteer(), device="cpu")
    found = located.predict(photos)
    model, tokenizer = (kind.from_pretrained(tmp_path / "clip") for kind in (CLIPModel, CLIPTokenizer))
    captions = [COUNTRY_CAPTION.format(country=name) for name in NAMES]
    with torch.no_grad():
        logits = model.eval()(
            input_ids=tokenizer(captions, padding=True, return_tensors="pt")["input_ids"],
            pixel_values=located.clip.pixels(photos),
        ).logits_per_image
    assert located.clip.pixels(photos).shape == (4, 3, 24, 24)
    for one, row in zip(found, logits.softmax(-1).tolist(), strict=True):
        assert dict(one.countries) == pytest.approx(dict(zip(NAMES, row, strict=True)), rel=1e-4)
    located.clip.save_pretrained(tmp_path / "again")
    again = HierarchicalZeroShotGeolocator.from_pretrained(tmp_path / "again", gazetteer(), device="cpu")
    assert again.predict(photos) == found


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "not JSON"),
        ("config.json", b'{"model_type": "bert"}', "a model of type 'bert': give a CLIP"),
        ("config.json", None, "no config.json"),
        ("model.safetensors", None, "cannot load"),
        ("model.safetensors", b"cut", "cannot load"),
        ("tokenizer.json", b"{", "cannot load"),
        ("tokenizer.json", None, "tokenizer"),
        ("config.json", b"[]", "give a CLIP"),
        ("preprocessor_config.json", None, "cannot load"),
    ],
)
def test_broken_clip(
    file: str, content: bytes | None, message: str, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / file).unlink()
    if content is not None:
        (tmp_path / "clip" / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        Clip.from_pretrained(tmp_path / "clip")
    assert message in str(caught.value)
    assert str(tmp_path / "clip") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_loaded(clip: Clip, tmp_path: Path) -> None:
    """Only safetensors: a pickle may hold any code."""
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(clip.model.state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        Clip.from_pretrained(tmp_path / "clip")
    shutil.rmtree(tmp_path / "clip")
