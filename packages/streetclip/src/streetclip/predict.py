"""`streetclip predict`: photos to a table, JSON and a map that opens in any browser."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from torch import Tensor
from tqdm import tqdm

from streetclip import images, metrics
from streetclip import map as maps
from streetclip.config import PredictOptions
from streetclip.gazetteer import Gazetteer
from streetclip.geolocator import GeoPrediction, HierarchicalZeroShotGeolocator

OUTPUTS = ("predictions.csv", "predictions.json", "map.html")


def predict(options: PredictOptions) -> dict[str, Any]:
    """Where photos were taken; written to predictions.csv, predictions.json and map.html.

    Returns:
        photos, skipped, output_dir; of photos with EXIF coordinates, their number and median error.

    Raises:
        UserError: no photo, one that cannot be read, predictions are there already, or no such model.
    """
    folder = options.output_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder} is a file: give a folder")
    if (there := [name for name in OUTPUTS if (folder / name).exists()]) and not options.overwrite:
        raise UserError(f"{folder / there[0]} is there already: add --overwrite, or give another --output-dir")
    paths = images.find_photos(options.photos)
    try:  # now, not after an hour
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror}: give another folder") from error
    gazetteer = Gazetteer.load(options.gazetteer, countries=options.countries, us_states=options.us_states)
    locator = HierarchicalZeroShotGeolocator.from_pretrained(
        options.model, gazetteer, mode=options.mode, country_template=options.country_template,
        city_template=options.city_template, ensemble=options.ensemble, cities=options.cities,
        cache_dir=options.cache_dir,
    )  # fmt: skip
    kept: list[Path] = []
    features: list[Tensor] = []
    thumbnails: list[str] = []
    bad: list[str] = []
    for start in tqdm(range(0, len(paths), options.batch_size), desc="streetclip", unit="batch", disable=None):
        pixels = []
        for path in paths[start : start + options.batch_size]:
            try:
                image = images.read_photo(path)
            except UserError as error:
                print(f"left out {_shown(error)}", file=sys.stderr)
                bad.append(_shown(path))
                continue
            kept.append(path)
            pixels.append(locator.clip.pixels([image]))
            if options.map:
                thumbnails.append(maps.data_uri(image))
        if pixels:
            with torch.no_grad():
                features.append(locator.clip.encode_images(torch.cat(pixels).to(locator.clip.device)))
    if not kept:
        raise UserError(f"none of {len(paths)} photos could be read: give others")
    if not all(one.isfinite().all() for one in features):
        raise UserError(f"{options.model}: features of photos are not finite: its weights are damaged, give another")
    found = locator.predictions(locator.locate(torch.cat(features), options.top_k), options.top_k)
    for name in there:
        (folder / name).unlink()
    names = _names(kept)
    taken = [images.exif_coordinates(path) for path in kept]
    rows = [_row(name, one, place) for name, one, place in zip(names, found, taken, strict=True)]
    _write(folder, rows, names, found, taken)
    if options.map:
        runfolder.write_text(folder / "map.html", maps.page(names, found, thumbnails, taken, locator.gazetteer))
    errors = [row["exif_error_km"] for row in rows if row["exif_error_km"] != ""]
    if bad and not options.skip_bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} photos could not be read, the first {bad[0]}: mend them, or add --skip-bad; "
            f"what was found of the others is in {folder}"
        )
    summary: dict[str, Any] = {"photos": len(kept), "skipped": len(bad), "output_dir": str(folder)}
    if errors:
        summary |= {"photos_with_exif": len(errors), "median_error_km_of_exif": float(np.median(errors))}
    return summary


def _shown(text: object) -> str:
    """As text that can be written: file names need not be UTF-8."""
    return os.fsencode(str(text)).decode("utf-8", "replace")


def _names(paths: Sequence[Path]) -> list[str]:
    """File names; with their folders if two are the same."""
    names = [_shown(path.name) for path in paths]
    return names if len(set(names)) == len(names) else [_shown(path) for path in paths]


def _row(name: str, found: GeoPrediction, taken: tuple[float, float] | None) -> dict[str, Any]:
    exif = taken or ("", "")
    error = "" if taken is None else float(metrics.haversine_km(*taken, found.latitude, found.longitude))
    row: dict[str, Any] = {
        "filename": name, "latitude": found.latitude, "longitude": found.longitude, "country": found.country,
        "city": found.city, "probability": found.probability, "country_probability": found.country_probability,
        "exif_latitude": exif[0], "exif_longitude": exif[1], "exif_error_km": error,
    }  # fmt: skip
    for i, place in enumerate(found.places, 1):
        row |= {
            f"place_{i}": f"{place.city}, {place.country}", f"latitude_{i}": place.latitude,
            f"longitude_{i}": place.longitude, f"probability_{i}": place.probability,
        }  # fmt: skip
    return row


def _write(
    folder: Path, rows: Sequence[dict[str, Any]], names: Sequence[str], found: Sequence[GeoPrediction],
    taken: Sequence[tuple[float, float] | None],
) -> None:  # fmt: skip
    import pandas as pd

    runfolder.write_text(folder / "predictions.csv", pd.DataFrame(rows).to_csv(index=False))
    listed = [
        {
            "filename": name, "latitude": one.latitude, "longitude": one.longitude, "country": one.country,
            "city": one.city, "probability": one.probability, "country_probability": one.country_probability,
            "places": [place._asdict() for place in one.places],
            "countries": [{"country": country, "probability": p} for country, p in one.countries],
            "exif": None if place is None else {"latitude": place[0], "longitude": place[1]},
        }
        for name, one, place in zip(names, found, taken, strict=True)
    ]  # fmt: skip
    runfolder.write_text(
        folder / "predictions.json", json.dumps(listed, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
