"""Scores of a run on photos with coordinates, group by group."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from torch import Tensor

from streetclip import baselines, metrics
from streetclip.baselines import LabelHead
from streetclip.config import Config, EvaluateOptions
from streetclip.coordinates import oracle_errors
from streetclip.data import Data, Photos
from streetclip.gazetteer import Gazetteer
from streetclip.geolocator import HierarchicalZeroShotGeolocator
from streetclip.model import Clip
from streetclip.train import Run, load


@dataclass(frozen=True)
class Scored:
    """What was found of a group of photos.

    Attributes:
        summary: metric -> value.
        errors: [N] kilometres.
        country, found_country: [N] numbers in the gazetteer, -1 where there is none.
        latitude, longitude: [N] of the places found.
        probability: [N] of the country found.
    """

    summary: dict[str, float]
    errors: np.ndarray
    country: np.ndarray
    found_country: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    probability: np.ndarray


def evaluate(run: Run | Path | str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Scores of a run on its test photos.

    Args:
        run: a run, or its folder.
        options: how places are asked for.

    Returns:
        For each group (of generated photos and a .csv: seen, unseen_cities, unseen_countries; else all), as
        GROUP_NAME: within_1, _25, _200, _750, _2500 [%], median_km; country_top1, city_top1, city_given_country [%]
        where labels are known; calibration_error of the country's probability. With ``knn_``, ``constant_``,
        ``oracle_`` after the group: neighbours, the mean place of training, the true country's best city. All also
        goes to evaluation.json.

    Raises:
        UserError: not a run folder, an unfinished run, no good checkpoint, or no test photos.
    """
    options = options or EvaluateOptions()
    if not isinstance(run, Run):
        run = load(run)
    source = _with_options(run, options)
    if not source.tests:
        raise UserError(f"{run.config.dataset}: no test photos: give a column split with train and test")
    if options.knn and source.train is not None and np.isnan(source.train.latitude).any():
        raise UserError("--knn needs coordinates of all training photos: give them, or --knn 0")
    if options.knn and source.train is None:
        raise UserError(f"--knn needs training photos, and {run.config.dataset} has none: leave it out")
    if run.head is not None and (options.mode != "hierarchical" or options.ensemble or options.city_template):
        raise UserError("a label head is asked by no caption: leave --mode, --ensemble and --city-template out")
    found: dict[str, Any] = {}
    scored: dict[str, Scored] = {}
    features = {name: encode(run.clip, photos, options.batch_size) for name, photos in source.tests.items()}
    learned = encode(run.clip, source.train, options.batch_size) if options.knn and source.train is not None else None
    locator = geolocator_of(run, source.gazetteer, options) if run.head is None else None
    for name, photos in source.tests.items():
        if locator is not None:
            scored[name] = score(locator, features[name], photos)
        else:
            assert run.head is not None
            scored[name] = score_head(run.head, features[name], photos, source.gazetteer)
        found |= {f"{name}_{metric}": value for metric, value in scored[name].summary.items()}
        found |= _beside(name, photos, source, run.config, features[name], learned, options.knn)
    runfolder.write_text(run.folder / "evaluation.json", json.dumps(found, indent=2) + "\n")
    if options.plots:
        _plot(run.folder, source, scored)
    return found


def _with_options(run: Run, options: EvaluateOptions) -> Data:
    if options.countries == "all" and not options.us_states:
        return run.data
    if run.config.dataset == "world":
        raise UserError("--countries and --us-states are for places of GeoNames, not for the generated world")
    places = Gazetteer.load(run.config.gazetteer, countries=options.countries, us_states=options.us_states)
    return Data(run.data.train, run.data.tests, places)


def geolocator_of(run: Run, gazetteer: Gazetteer, options: EvaluateOptions) -> HierarchicalZeroShotGeolocator:
    """As the run and the options ask for places."""
    config = run.config
    return HierarchicalZeroShotGeolocator(
        run.clip, gazetteer, mode=options.mode, country_template=config.country_template,
        city_template=options.city_template or config.city_template, ensemble=options.ensemble, cities=config.cities,
    )  # fmt: skip


@torch.no_grad()
def encode(clip: Clip, photos: Photos, batch_size: int = 256) -> Tensor:
    """Features [N, d] of norm 1."""
    parts = [
        clip.encode_images(photos.pixels(range(i, min(i + batch_size, len(photos))), clip).to(clip.device))
        for i in range(0, len(photos), batch_size)
    ]
    return torch.cat(parts)


def score(locator: HierarchicalZeroShotGeolocator, features: Tensor, photos: Photos) -> Scored:
    """Of photos with coordinates, by what a geolocator finds."""
    places = locator.gazetteer
    located = locator.locate(features)
    cities = located.cities[:, 0]
    found_country = places.country[cities]
    probability = located.countries[np.arange(len(cities)), found_country]
    held = _scored(photos, places, places.latitude[cities], places.longitude[cities], found_country, probability)
    city = np.array([
        -1 if (number := places.find(*pair)) is None else number
        for pair in zip(photos.country, photos.city, strict=True)
    ])  # fmt: skip
    if (city >= 0).any():
        known = city >= 0
        held.summary["city_top1"] = 100 * float((cities == city)[known].mean())
        # of the true country's cities
        right = np.zeros(len(city), dtype=bool)
        for country in np.unique(held.country[known]):
            rows = np.flatnonzero(known & (held.country == country))
            numbers = locator.candidates(int(country))
            best = locator.within(features[torch.from_numpy(rows).to(features.device)], int(country)).argmax(1)
            right[rows] = numbers[best.cpu().numpy()] == city[rows]
        held.summary["city_given_country"] = 100 * float(right[known].mean())
    return held


def score_head(head: LabelHead, features: Tensor, photos: Photos, gazetteer: Gazetteer) -> Scored:
    """Of photos with coordinates, by a head of fixed classes."""
    with torch.no_grad():
        logits = head(features)
    probabilities = logits.softmax(-1).cpu().double().numpy()
    found = probabilities.argmax(1)
    of = head.country(np.arange(len(head.classes)), gazetteer)
    country = of[found]
    sure = np.array([row[of == one].sum() for row, one in zip(probabilities, country, strict=True)])
    places = head.place.cpu().numpy()[found]
    held = _scored(photos, gazetteer, places[:, 0], places[:, 1], country, sure)
    if head.kind == "city":
        right = [
            head.classes[i] == pair
            for i, pair in zip(found.tolist(), zip(photos.country, photos.city, strict=True), strict=True)
        ]
        held.summary["city_top1"] = 100 * float(np.mean(right))
    return held


def _scored(
    photos: Photos, places: Gazetteer, latitude: np.ndarray, longitude: np.ndarray, found_country: np.ndarray,
    probability: np.ndarray,
) -> Scored:  # fmt: skip
    errors = metrics.haversine_km(photos.latitude, photos.longitude, latitude, longitude)
    summary = metrics.geo_accuracy_at_km(errors)
    country = np.array([places.country_number(name) for name in photos.country])
    if any(photos.country) and (country < 0).any():
        lost = sorted({name for name, i in zip(photos.country, country, strict=True) if i < 0})
        if (country < 0).all():
            raise UserError(f"{places.name}: none of the photos' countries, as {lost[0]!r}, is in it: give a gazetteer")
        summary["labelled"] = 100 * float((country >= 0).mean())
        print(f"not in {places.name}, not counted as countries: {', '.join(lost)}", file=sys.stderr)
    if not any(photos.country):  # coordinates alone: the country of the nearest city
        country = places.country[places.nearest(photos.latitude, photos.longitude)]
    known = country >= 0
    if known.any():
        right = (found_country == country)[known]
        summary["country_top1"] = 100 * float(right.mean())
        summary["calibration_error"] = 100 * metrics.calibration(probability[known], right)[1]
    return Scored(summary, errors, country, found_country, latitude, longitude, probability)


def _beside(
    name: str, photos: Photos, source: Data, config: Config, features: Tensor, learned: Tensor | None, knn: int
) -> dict[str, float]:
    """The constant, the ceiling, and neighbours."""
    guesses = {}
    if source.train is not None:
        guesses["constant"] = baselines.constant(source.train, len(photos))
        if learned is not None:
            guesses["knn"] = baselines.nearest_neighbours(
                learned.cpu().numpy(), source.train, features.cpu().numpy(), knn
            )
    found = {
        f"{name}_{kind}_{metric}": value
        for kind, place in guesses.items()
        for metric, value in metrics.geo_accuracy_at_km(
            metrics.haversine_km(photos.latitude, photos.longitude, *place)
        ).items()
    }
    ceiling = oracle_errors(photos.latitude, photos.longitude, source.gazetteer, config.cities)
    return found | {f"{name}_oracle_{metric}": value for metric, value in metrics.geo_accuracy_at_km(ceiling).items()}


def _plot(folder: Path, source: Data, scored: Mapping[str, Scored]) -> None:
    from streetclip import plots

    plots.errors({name.replace("_", " "): one.errors for name, one in scored.items()}, folder / "errors.png")
    places = source.gazetteer
    country = np.concatenate([one.country for one in scored.values()])
    found = np.concatenate([one.found_country for one in scored.values()])
    known = country >= 0
    if known.any():
        plots.confusion(country[known], found[known], places.countries, folder / "countries.png")
        probability = np.concatenate([one.probability for one in scored.values()])
        plots.calibration(probability[known], (country == found)[known], folder / "calibration.png")
    photos = list(source.tests.values())
    plots.places(
        np.concatenate([one.latitude for one in photos]), np.concatenate([one.longitude for one in photos]),
        np.concatenate([one.latitude for one in scored.values()]),
        np.concatenate([one.longitude for one in scored.values()]), places, folder / "map.png",
    )  # fmt: skip
