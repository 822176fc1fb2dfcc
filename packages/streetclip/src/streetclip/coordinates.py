"""Coordinates from tables: what predictions are worth, and what the method could reach at best. No torch here."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from metazoo import data as files
from metazoo.errors import UserError

from streetclip import metrics
from streetclip.config import IM2GPS, RADII, OracleOptions, ScoreOptions
from streetclip.gazetteer import Gazetteer, check_coordinates

if TYPE_CHECKING:
    import pandas as pd


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A .csv whose columns are named in its first line; all cells are text, empty ones "".

    Raises:
        UserError: no such file, not a table in UTF-8, a column is missing or there twice, or no row.
    """
    import pandas as pd

    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            header = next(csv.reader(opened), [])
            opened.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row that is too long
                table = pd.read_csv(opened, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, pd.errors.ParserWarning) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as a table ({reason}): give a .csv in UTF-8") from error
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise UserError(f"{path}: column {twice!r} is there twice: once, please")
    if missing := [column for column in columns if column not in table.columns]:
        raise UserError(f"{path}: no column {missing[0]!r}, only {', '.join(map(str, table.columns))}: give it")
    if table.empty:
        raise UserError(f"{path}: no row in it")
    return table


def numbers_of(table: pd.DataFrame, column: str, where: object, *, may_lack: bool = False) -> np.ndarray:
    """A column as numbers [N]; NaN for "" where that may be.

    Raises:
        UserError: a cell is no number, or empty.
    """
    import pandas as pd

    values = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
    bad = np.isnan(values) & ~((table[column] == "").to_numpy() & may_lack)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"{where}, line {row + 2}: {column} is {table[column].iloc[row]!r}: give degrees")
    return values


def read_coordinates(source: str, data_dir: str | None = None) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """File names, latitudes and longitudes [N] of a .csv with columns filename, latitude, longitude; or of IM2GPS.

    Raises:
        UserError: no such file or column, a name twice, or a coordinate out of range.
    """
    path = Path(source)
    if source in IM2GPS:
        try:
            path = files.find("im2gps", [IM2GPS[source]], data_dir=data_dir) / IM2GPS[source]
        except UserError as error:
            raise UserError(
                f"{source}: {IM2GPS[source]} not found: set METAZOO_DATA to a folder with im2gps/ in it, or give a .csv"
            ) from error
    table = read_table(path, ("filename", "latitude", "longitude"))
    names = tuple(table["filename"])
    if len(set(names)) < len(names):
        twice = next(name for name, count in table["filename"].value_counts().items() if count > 1)
        raise UserError(f"{path}: {twice} is there twice: once, please")
    latitude, longitude = (numbers_of(table, column, path) for column in ("latitude", "longitude"))
    check_coordinates(latitude, longitude, lambda i: f"{path}, line {i + 2}")
    return names, latitude, longitude


def score_predictions(options: ScoreOptions) -> dict[str, float]:
    """`streetclip score`: predictions against coordinates.

    Returns:
        within_1, _25, _200, _750, _2500 [%], median_km, photos.

    Raises:
        UserError: no such file or column, or the two do not name the same photos.
    """
    names, latitude, longitude = read_coordinates(options.coords)
    predicted, found_latitude, found_longitude = read_coordinates(str(options.predictions))
    place = {name: i for i, name in enumerate(predicted)}
    if absent := [name for name in names if name not in place]:
        raise UserError(
            f"{options.predictions}: {absent[0]} of {options.coords} is missing ({len(absent)} of {len(names)}): "
            "predict it, or take it out"
        )
    if more := sorted(set(predicted) - set(names)):
        raise UserError(
            f"{options.coords}: no coordinates of {more[0]} ({len(more)} predictions without): take them out, or give "
            "theirs"
        )
    order = [place[name] for name in names]
    errors = metrics.haversine_km(latitude, longitude, found_latitude[order], found_longitude[order])
    if options.output_dir is not None:
        from streetclip import plots

        plots.errors({"predictions": errors}, options.output_dir / "errors.png")
    return {**metrics.geo_accuracy_at_km(errors), "photos": float(len(errors))}


# % within 25, 200, 750, 2500 km: the paper's Table for StreetCLIP, as the model card has it
PUBLISHED = {"im2gps": (28.3, 45.1, 74.7, 88.2), "im2gps3k": (22.4, 37.4, 61.3, 80.4)}


def ceilings(
    latitude: np.ndarray, longitude: np.ndarray, gazetteer: Gazetteer, cities: Sequence[int]
) -> dict[int, dict[str, float]]:
    """K -> within_R [%] and median_km, with the true country known and the best of its K most populous cities."""
    return {
        k: metrics.geo_accuracy_at_km(oracle_errors(latitude, longitude, gazetteer, k)) for k in cities
    }  # fmt: skip


def oracle(options: OracleOptions) -> str:
    """`streetclip oracle`: ceilings of the method, beside two constants and, of IM2GPS, what is published.

    Raises:
        UserError: no such file or column.
    """
    _, latitude, longitude = read_coordinates(options.coords)
    gazetteer = Gazetteer.load(options.gazetteer)
    rows: dict[str, Sequence[float]] = {}
    for k, found in ceilings(latitude, longitude, gazetteer, options.cities).items():
        name = f"true country, best of {k} cities" if k else f"true country, best of all {len(gazetteer.cities)}"
        rows[name] = [found[f"within_{radius}"] for radius in RADII]
    for country, city in (("United Kingdom", "London"), ("France", "Paris")):
        if (number := gazetteer.find(country, city)) is not None:
            place = gazetteer.latitude[number], gazetteer.longitude[number]
            found = metrics.geo_accuracy_at_km(metrics.haversine_km(latitude, longitude, *place))
            rows[f"always {city}"] = [found[f"within_{radius}"] for radius in RADII]
    if options.coords in PUBLISHED:
        rows["StreetCLIP, as published"] = [float("nan"), *PUBLISHED[options.coords]]
    width = max(map(len, rows))
    head = f"{'% within':{width}}" + "".join(f"{radius:>7} km" for radius in RADII)
    lines = [
        f"{name:{width}}" + "".join("         –" if np.isnan(value) else f"{value:10.1f}" for value in values)
        for name, values in rows.items()
    ]
    lines = [f"{options.coords}: {len(latitude)} places", head, *lines]
    if options.coords in PUBLISHED and 1 in options.cities:
        biggest = list(rows.values())[options.cities.index(1)][1:]
        below = all(a < b for a, b in zip(PUBLISHED[options.coords], biggest, strict=True))
        lines.append(
            f"StreetCLIP's published figures are {'' if below else 'not '}below those of the right country's most "
            "populous city at every radius."
        )
    return "\n".join(lines)


def oracle_errors(latitude: np.ndarray, longitude: np.ndarray, gazetteer: Gazetteer, cities: int) -> np.ndarray:
    """Kilometres [N] to the nearest of the K most populous cities of the true country, that of the nearest city.

    Args:
        latitude, longitude: [N] true places.
        cities: K; 0: all of the country.
    """
    country = gazetteer.country[gazetteer.nearest(latitude, longitude)]
    errors = np.empty(len(latitude))
    for one in np.unique(country):
        mine, held = country == one, gazetteer.top(int(one), cities)
        places = gazetteer.latitude[held], gazetteer.longitude[held]
        errors[mine] = metrics.haversine_km(latitude[mine, None], longitude[mine, None], *places).min(1)
    return errors
