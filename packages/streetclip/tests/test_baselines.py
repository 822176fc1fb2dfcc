"""Label heads, neighbours, the constant and the ceiling."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metazoo.errors import UserError
from streetclip.baselines import LabelHead, constant, mean_place, nearest_neighbours
from streetclip.coordinates import oracle_errors
from streetclip.data import Photos
from streetclip.evaluate import score_head
from streetclip.gazetteer import Gazetteer
from streetclip.metrics import haversine_km

Kind = Literal["country", "city", "cell"]


def gazetteer() -> Gazetteer:
    """Bado (0) with three cities on the equator, Mipu (1) with two, Tevo (2) with one; Rasa is in two of them."""
    return Gazetteer(
        countries=("Bado", "Mipu", "Tevo"),
        cities=("Rasa", "Lofi", "Gunu", "Rasa", "Zeki", "Pama"),
        country=np.array([0, 0, 0, 1, 1, 2]),
        latitude=np.array([0.0, 0.0, 0.0, 50.0, 52.0, -40.0]),
        longitude=np.array([0.0, 1.0, 2.0, 10.0, 10.0, 170.0]),
        population=np.array([10.0, 30.0, 20.0, 5.0, 6.0, 1.0]),
    )


def photos(rows: list[tuple[str, str, float, float]]) -> Photos:
    """(country, city, latitude, longitude) of each."""
    country, city, latitude, longitude = zip(*rows, strict=True)
    names = tuple(f"{i}.png" for i in range(len(rows)))
    degrees = np.array(latitude, dtype=float), np.array(longitude, dtype=float)
    return Photos(names, tuple(city), ("",) * len(rows), tuple(country), *degrees)


TRAIN = photos([
    ("Bado", "Rasa", 0.1, 0.1),
    ("Bado", "Lofi", 0.0, 1.0),
    ("Mipu", "Rasa", 50.0, 10.0),
    ("Mipu", "Rasa", 50.0, 10.2),
    ("Bado", "Rasa", -0.1, 0.1),
])  # fmt: skip


def head(kind: Kind, train: Photos = TRAIN, cells: int = 3, seed: int = 0) -> LabelHead:
    torch.manual_seed(0)
    return LabelHead(kind, train, gazetteer(), width=4, cells=cells, seed=seed)


# ---- label heads


def test_country_head() -> None:
    """Classes are the training countries; each has its photos' mean place."""
    found = head("country")
    assert found.classes == ["Bado", "Mipu"]
    assert found.targets.tolist() == [0, 0, 1, 1, 0]
    assert found.place[0].tolist() == pytest.approx([0, 0.4], abs=1e-3)
    assert haversine_km(*found.place[1].numpy(), 50, 10.1) < 0.02
    assert found.country(np.array([1, 0, 1]), gazetteer()).tolist() == [1, 0, 1]


def test_city_head() -> None:
    """Classes are pairs: cities of one name in two countries are two."""
    found = head("city")
    assert found.classes == [("Bado", "Lofi"), ("Bado", "Rasa"), ("Mipu", "Rasa")]
    assert found.targets.tolist() == [1, 0, 2, 2, 1]
    np.testing.assert_allclose(found.place, [[0, 1], [0, 0.1], [50, 10.1]], atol=1e-3)
    assert found.country(np.arange(3), gazetteer()).tolist() == [0, 0, 1]


def test_cell_head() -> None:
    """Cells hold near places together; a cell's country is that of the nearest city."""
    found = head("cell", cells=2)
    assert found.classes == [0, 1]
    bado, mipu = found.targets[0].item(), found.targets[2].item()
    assert found.targets.tolist() == [bado, bado, mipu, mipu, bado]
    assert bado != mipu
    assert found.country(np.array([bado, mipu]), gazetteer()).tolist() == [0, 1]
    assert torch.equal(found.targets, head("cell", cells=2).targets)  # the seed's


def test_more_cells_than_places() -> None:
    """As many cells as there are different places, each of which is its cell's."""
    same = photos([("Bado", "Rasa", 0, 0), ("Bado", "Rasa", 0, 0), ("Mipu", "Rasa", 50, 10)])
    found = head("cell", same, cells=100)
    assert len(found.classes) == 2
    latitude, longitude = found.place.numpy()[found.targets].T
    np.testing.assert_allclose(haversine_km(latitude, longitude, same.latitude, same.longitude), 0, atol=1e-6)


def test_head_is_linear() -> None:
    """Logits are W · 20 v + b: at zero the bias alone."""
    found = head("city")
    features = torch.nn.functional.normalize(torch.randn(5, 4), dim=-1)
    wanted = 20 * features @ found.linear.weight.T + found.linear.bias
    torch.testing.assert_close(found(features), wanted)
    assert found(features).shape == (5, 3)


@pytest.mark.parametrize("kind", ["country", "city", "cell"])
def test_unseen_classes(kind: Kind) -> None:
    """Whatever its weights, a head never names a country or city that it was not trained on."""
    test = photos([("Tevo", "Pama", -40, 170)] * 200)
    found = head(kind)
    rng = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(found.linear.weight, std=5, generator=rng)
    features = torch.nn.functional.normalize(torch.randn(200, 4, generator=rng), dim=-1)
    scored = score_head(found, features, test, gazetteer())
    assert set(scored.found_country.tolist()) == {0, 1}  # both that it knows are named
    assert scored.summary["country_top1"] == 0
    assert scored.summary["within_2500"] == 0
    assert scored.summary.get("city_top1", 0) == 0
    assert ("city_top1" in scored.summary) == (kind == "city")


def test_head_scores_seen_classes() -> None:
    """One whose weights tell countries apart names them, with the probability that its softmax says."""
    found = head("country")
    with torch.no_grad():
        found.linear.weight.zero_()
        found.linear.bias.zero_()
        found.linear.weight[1, 0] = 0.1
    features = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    scored = score_head(found, features, TRAIN.take(np.array([2, 0, 1])), gazetteer())
    assert scored.found_country.tolist() == [1, 0, 1]
    assert scored.summary["country_top1"] == pytest.approx(200 / 3)
    np.testing.assert_allclose(scored.probability, 1 / (1 + np.exp(-2)), rtol=1e-6)


def test_probability_of_a_country() -> None:
    """Of a head of cities: the sum over the country's, for the country of the best city."""
    found = head("city")
    with torch.no_grad():
        found.linear.weight.zero_()
        found.linear.bias.copy_(torch.tensor([0.25, 0.35, 0.4]).log())
    scored = score_head(found, torch.zeros(1, 4), TRAIN.take(np.array([2])), gazetteer())
    assert scored.found_country.tolist() == [1]
    assert scored.probability.tolist() == pytest.approx([0.4], rel=1e-6)
    with torch.no_grad():
        found.linear.bias.copy_(torch.tensor([0.25, 0.4, 0.35]).log())
    scored = score_head(found, torch.zeros(1, 4), TRAIN.take(np.array([2])), gazetteer())
    assert scored.found_country.tolist() == [0]
    assert scored.probability.tolist() == pytest.approx([0.65], rel=1e-6)
    assert scored.summary["calibration_error"] == pytest.approx(65, rel=1e-6)


def test_places_stay_with_the_weights() -> None:
    """A head's places are in its state, so that they are saved and restored."""
    assert torch.equal(head("city").state_dict()["place"], head("city").place)


def test_places_from_the_gazetteer() -> None:
    """Without coordinates a country is its most populous city, a city itself."""
    nowhere = photos([("Bado", "Gunu", np.nan, np.nan), ("Mipu", "Rasa", np.nan, np.nan)])
    countries, cities = head("country", nowhere), head("city", nowhere)
    assert countries.place.tolist() == [[0.0, 1.0], [52.0, 10.0]]
    assert cities.place.tolist() == [[0.0, 2.0], [50.0, 10.0]]


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("country", [("Bado", "Rasa", 0, 0)] * 3, "--head country: all training photos are of one class"),
        ("city", [("Bado", "Rasa", 0, 0), ("Bado", "", 0, 0)], "--head city: 1.png has no city"),
        ("cell", [("Bado", "Rasa", 0, 0), ("Bado", "", 0, np.nan)], "--head cell: 1.png has no coordinates"),
        ("cell", [("Bado", "Rasa", 0, 0)] * 3, "--head cell: all training photos are of one class"),
        ("country", [("Bado", "", 0, 0), ("Nome", "", np.nan, np.nan)], "Nome: no coordinates in the training photos"),
        ("city", [("Bado", "Rasa", 0, 0), ("Bado", "Nix", np.nan, np.nan)], "no coordinates in the training photos"),
    ],
)
def test_head_refuses(kind: Kind, rows: list[tuple[str, str, float, float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        head(kind, photos(rows))


def test_country_that_the_gazetteer_lacks() -> None:
    """Its class is there, but is no country of the gazetteer."""
    found = head("country", photos([("Nome", "", 1, 1), ("Mipu", "", 2, 2)]))
    assert found.country(np.array([0, 1]), gazetteer()).tolist() == [1, -1]


# ---- places


def test_mean_place() -> None:
    """Across the date line, at the pole, and nowhere."""
    latitude, longitude = mean_place(np.zeros(2), np.array([179.0, -179.0]))
    assert (latitude, abs(longitude)) == (pytest.approx(0), pytest.approx(180))
    assert mean_place(np.full(4, 80.0), np.array([0.0, 90.0, 180.0, -90.0]))[0] == pytest.approx(90)
    assert mean_place(np.array([0.0, 0.0]), np.array([0.0, 180.0])) == (0.0, 0.0)
    assert mean_place(np.array([0.0, 0.0, 90.0]), np.array([0.0, 180.0, 0.0]))[0] == pytest.approx(90)


@given(st.floats(-89, 89), st.floats(-179, 179), st.integers(1, 4))
def test_mean_of_one_place(latitude: float, longitude: float, count: int) -> None:
    found = mean_place(np.full(count, latitude), np.full(count, longitude))
    assert found == (pytest.approx(latitude, abs=1e-9), pytest.approx(longitude, abs=1e-9))


def test_nearest_neighbour() -> None:
    """k = 1: the place of the photo with the greatest cosine, whatever the lengths."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    asked = rng.normal(size=(12, 5))
    rows = [("Bado", "", *place) for place in zip(rng.uniform(-80, 80, 30), rng.uniform(-170, 170, 30), strict=True)]
    train = photos([(country, city, float(a), float(b)) for country, city, a, b in rows])
    latitude, longitude = nearest_neighbours(features, train, asked, 1)
    best = (asked @ features.T).argmax(1)
    np.testing.assert_allclose(latitude, train.latitude[best])
    np.testing.assert_allclose(longitude, train.longitude[best])
    for k in (3, 30, 99):  # the mean of the k nearest; of all where there are not so many
        order = np.argsort(-(asked @ features.T), axis=1)[:, :k]
        wanted = [mean_place(train.latitude[one], train.longitude[one]) for one in order]
        np.testing.assert_allclose(np.stack(nearest_neighbours(features, train, asked, k), axis=1), wanted, atol=1e-9)


def test_constant() -> None:
    """The mean of the places that are known; (0, 0) without any."""
    known = photos([("Bado", "", 10, 20), ("Bado", "", np.nan, 5), ("Bado", "", 10, np.nan), ("Bado", "", 10, 20)])
    latitude, longitude = constant(known, 3)
    np.testing.assert_allclose(latitude, [10, 10, 10])
    np.testing.assert_allclose(longitude, [20, 20, 20])
    none = constant(known.take(np.array([1, 2])), 2)
    assert [one.tolist() for one in none] == [[0.0, 0.0], [0.0, 0.0]]


# ---- the ceiling


def test_oracle_by_hand() -> None:
    """The country is the nearest city's, the best of its K most populous; one degree is 111.195 km."""
    latitude, longitude = np.array([0.0, 0.0, 50.0, -41.0]), np.array([0.0, 2.5, 10.0, 170.0])
    degrees = {1: [1, 1.5, 2, 1], 2: [1, 0.5, 0, 1], 3: [0, 0.5, 0, 1], 0: [0, 0.5, 0, 1], 99: [0, 0.5, 0, 1]}
    for cities, wanted in degrees.items():
        found = oracle_errors(latitude, longitude, gazetteer(), cities)
        np.testing.assert_allclose(found, 111.19493 * np.array(wanted), rtol=1e-6, atol=1e-6, err_msg=str(cities))


def test_oracle_without_limit() -> None:
    """K = 0: the distance to the nearest of all cities; a smaller K is never nearer."""
    rng = np.random.default_rng(0)
    latitude, longitude = rng.uniform(-90, 90, 50), rng.uniform(-180, 180, 50)
    places = gazetteer()
    every = haversine_km(latitude[:, None], longitude[:, None], places.latitude, places.longitude)
    np.testing.assert_allclose(oracle_errors(latitude, longitude, places, 0), every.min(1), rtol=1e-9)
    errors = [oracle_errors(latitude, longitude, places, cities) for cities in (1, 2, 3)]
    assert (errors[0] >= errors[1]).all()
    assert (errors[1] >= errors[2]).all()
    assert (errors[0] > errors[2]).any()
