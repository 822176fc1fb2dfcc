"""Hierarchical zero-shot geolocalisation (Section 3; the paper's "hierarchical linear probing"): no head is trained.

The text tower turns captions of place names into the weights of a linear classifier h(v; X) = softmax(exp(τ) X v):
first of countries, then of the most populous cities of the country that was found; a gazetteer has the city's
coordinates, looked up by country and city.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from metazoo.errors import UserError
from torch import Tensor
from torch.nn import functional as F

from streetclip import images
from streetclip.captions import SyntheticCaptioner
from streetclip.config import CITY_CAPTION, COUNTRY_CAPTION
from streetclip.gazetteer import Gazetteer

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetclip.model import Clip

Mode = Literal["hierarchical", "flat", "soft"]


class Place(NamedTuple):
    """A city that a photo may be of, with the probability that the two steps give it."""

    city: str
    region: str
    country: str
    latitude: float
    longitude: float
    probability: float


@dataclass(frozen=True)
class GeoPrediction:
    """Where a photo was taken.

    Attributes:
        latitude, longitude: degrees, of the best place's city.
        country, city: its names.
        probability: p(country) · p(city | country).
        country_probability: p(country).
        places: the best places, best first.
        countries: (name, probability) of the best countries, best first.
    """

    latitude: float
    longitude: float
    country: str
    city: str
    probability: float
    country_probability: float
    places: tuple[Place, ...]
    countries: tuple[tuple[str, float], ...]


class Located(NamedTuple):
    """Of N photos: the best cities [N, k] by number (-1 where there are fewer), their probabilities [N, k], and
    probabilities of countries [N, C]."""

    cities: np.ndarray
    probabilities: np.ndarray
    countries: np.ndarray


class HierarchicalZeroShotGeolocator:
    """A CLIP that names the places of photos, among those of a gazetteer.

    Captions are encoded when they are first asked for, and kept.

    Args:
        clip: the model.
        gazetteer: candidates [default: GeoNames].
        mode: "hierarchical": the country with the greatest probability, then its cities. "flat": all cities at once,
            without the country step; a country's probability is its cities' sum. "soft": the greatest
            log p(country) + log p(city | country), without committing to a country.
        country_template, city_template: captions; {region} may be in the latter.
        ensemble: further captions of countries: its weights are the mean of all features, of norm 1 again.
        cities: most populous cities of a country that are asked for; 0: all.
        cache_dir: folder in which features of captions are kept, by model and caption.

    Raises:
        UserError: a template without its place.
    """

    def __init__(
        self,
        clip: Clip,
        gazetteer: Gazetteer | None = None,
        *,
        mode: Mode = "hierarchical",
        country_template: str = COUNTRY_CAPTION,
        city_template: str = CITY_CAPTION,
        ensemble: Sequence[str] = (),
        cities: int = 30,
        cache_dir: Path | str | None = None,
    ) -> None:
        if mode not in ("hierarchical", "flat", "soft"):
            raise UserError(f"mode {mode!r}: one of hierarchical, flat, soft")
        if cities < 0:
            raise UserError(f"cities is {cities}: give 1 or more, or 0 for all")
        self.clip = clip.eval()
        self.gazetteer = Gazetteer.geonames() if gazetteer is None else gazetteer
        self.mode, self.cities = mode, cities
        self.country_captions = [SyntheticCaptioner(one) for one in (country_template, *ensemble)]
        self.city_caption = SyntheticCaptioner(city_template)
        for template, level in ((country_template, "country"), *((one, "country") for one in ensemble)):
            if f"{{{level}}}" not in template:
                raise UserError(f"template {template!r}: {{{level}}} is missing: put it in")
        if "{city}" not in city_template:
            raise UserError(f"template {city_template!r}: {{city}} is missing: put it in")
        self.texts_encoded = 0
        self._kept: dict[str, Tensor] = {}
        self._weights: dict[object, Tensor] = {}
        self._candidates: dict[int, np.ndarray] = {}
        self._cache = None if cache_dir is None else _Cache(Path(cache_dir), clip)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, gazetteer: Gazetteer | None = None, *, device: str | torch.device | None = None,
        **options: object,
    ) -> HierarchicalZeroShotGeolocator:  # fmt: skip
        """Of a CLIP by hub id ("geolocal/StreetCLIP"), its folder, or the folder of a run; as the class.

        A run's templates and number of cities hold where no others are given.

        Args:
            device: where to compute [default: the accelerator, if there is one].
        """
        from streetclip.model import Clip

        folder = Path(source)
        if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").is_dir():
            from metazoo import runfolder

            from streetclip.config import Config

            config = runfolder.open_run(folder, Config)
            if config.method == "label-head":
                raise UserError(
                    f"{source} is a label head, which names no place that it was not trained on: give a CLIP"
                )
            if not (folder / "model" / "config.json").is_file():
                raise UserError(f"{source} has no model yet: finish it with --resume first")
            for name in ("country_template", "city_template", "cities"):
                if options.get(name) is None:
                    options[name] = getattr(config, name)
            source = folder / "model"
        clip = Clip.from_pretrained(source)
        clip.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        return cls(clip, gazetteer, **{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]

    # ---- classifiers from names

    @torch.no_grad()
    def zero_shot_classifier(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """X [N, d]: features of captions, of norm 1; what was encoded before is not again.

        Raises:
            UserError: no caption, one twice, or one with too many tokens.
        """
        if not captions:
            raise UserError("no candidates: give names of places")
        if len(set(captions)) < len(captions):
            twice = next(one for one in captions if captions.count(one) > 1)
            raise UserError(f"caption {twice!r} is there twice: name each candidate once")
        return self._features(captions, batch_size)

    def _features(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        new = [one for one in dict.fromkeys(captions) if one not in self._kept]
        if new and self._cache is not None:
            self._kept |= self._cache.read(new, self.clip.device)
            new = [one for one in new if one not in self._kept]
        if new:
            features = self.clip.features_of_texts(new, batch_size)
            self.texts_encoded += len(new)
            self._kept |= dict(zip(new, features, strict=True))
            if self._cache is not None:
                self._cache.write(dict(zip(new, features, strict=True)))
        return torch.stack([self._kept[one] for one in captions])

    def country_weights(self) -> Tensor:
        """[A, d] of all names that are asked for in the first step, ``gazetteer.asked``; an ensemble's mean."""
        if "countries" not in self._weights:
            names = [name for name, _ in self.gazetteer.asked]
            several = [self.zero_shot_classifier([one({"country": n}) for n in names]) for one in self.country_captions]
            self._weights["countries"] = F.normalize(torch.stack(several).mean(0), dim=-1)
        return self._weights["countries"]

    def city_weights(self, country: int) -> Tensor:
        """[K, d] of the cities of a country that are asked for."""
        if country not in self._weights:
            self._weights[country] = self._features([self._caption(i) for i in self.candidates(country)])
        return self._weights[country]

    def all_city_weights(self) -> Tensor:
        """[N, d] of the cities of all countries that are asked for, in the order of :meth:`all_candidates`."""
        if "cities" not in self._weights:
            self._weights["cities"] = self._features([self._caption(i) for i in self.all_candidates()])
        return self._weights["cities"]

    def candidates(self, country: int) -> np.ndarray:
        """Numbers of a country's cities that are asked for, most populous first; of equal captions the first alone."""
        if country not in self._candidates:
            held: dict[str, int] = {}
            for i in self.gazetteer.top(country, self.cities).tolist():
                held.setdefault(self._caption(i), i)
            self._candidates[country] = np.array(list(held.values()))
        return self._candidates[country]

    def all_candidates(self) -> np.ndarray:
        """Those of all countries, one after another."""
        return np.concatenate([self.candidates(country) for country in range(len(self.gazetteer.countries))])

    def _caption(self, city: int) -> str:
        places = self.gazetteer
        country = places.countries[places.country[city]]
        labels = {"city": places.cities[city], "region": places.regions[city], "country": country}
        return self.city_caption(labels, f"{places.name}: {places.cities[city]}")

    # ---- places of features

    @torch.no_grad()
    def locate(self, features: Tensor, top_k: int = 1) -> Located:
        """The best cities of photos by their features [N, d]."""
        parts = [self._locate(part, top_k) for part in features.split(4096)]
        return Located(*(np.concatenate(one) for one in zip(*parts, strict=True)))

    def _locate(self, features: Tensor, top_k: int) -> Located:
        if self.mode == "flat":
            return self._flat(features, top_k)
        asked = (self.clip.log_scale.exp() * features @ self.country_weights().T).softmax(-1)
        of = torch.tensor([country for _, country in self.gazetteer.asked], device=asked.device)
        countries = torch.zeros(len(features), len(self.gazetteer.countries), device=asked.device)
        countries.index_add_(1, of, asked)
        if self.mode == "soft":
            return self._soft(features, countries, top_k)
        # the single name with the greatest probability decides, as a state of the United States does for them
        best = of[asked.argmax(1)]
        cities = np.full((len(features), top_k), -1)
        probabilities = np.zeros((len(features), top_k))
        for country in best.unique().tolist():
            rows = (best == country).nonzero().squeeze(1)
            inside = self.within(features[rows], country)
            k = min(top_k, inside.shape[1])
            values, found = inside.sort(dim=1, descending=True, stable=True)
            here = rows.cpu().numpy()
            numbers = self.candidates(country)
            cities[here, :k] = numbers[found[:, :k].cpu().numpy()]
            probabilities[here, :k] = (values[:, :k] * countries[rows, country, None]).cpu().numpy()
        return Located(cities, probabilities, countries.cpu().numpy())

    @torch.no_grad()
    def within(self, features: Tensor, country: int) -> Tensor:
        """p(city | country) [N, K] of the cities of a country that are asked for."""
        return (self.clip.log_scale.exp() * features @ self.city_weights(country).T).softmax(-1)

    def _flat(self, features: Tensor, top_k: int) -> Located:
        candidates = self.all_candidates()
        probabilities = (self.clip.log_scale.exp() * features @ self.all_city_weights().T).softmax(-1)
        of = torch.tensor(self.gazetteer.country[candidates], device=features.device)
        countries = torch.zeros(len(features), len(self.gazetteer.countries), device=features.device)
        countries.index_add_(1, of, probabilities)
        # of cities with one caption, as London and London, the most populous
        order = np.argsort(-self.gazetteer.population[candidates], kind="stable")
        return _best(candidates[order], probabilities[:, torch.from_numpy(order)], countries, top_k)

    def _soft(self, features: Tensor, countries: Tensor, top_k: int) -> Located:
        candidates = self.all_candidates()
        logits = self.clip.log_scale.exp() * features @ self.all_city_weights().T
        of = self.gazetteer.country[candidates]
        sizes = np.bincount(of).tolist()
        inside = torch.cat([part.softmax(-1) for part in logits.split(sizes, dim=1)], dim=1)
        joint = inside * countries[:, torch.tensor(of, device=features.device)]
        return _best(candidates, joint, countries, top_k)

    # ---- places of photos

    @torch.no_grad()
    def features(self, photos: Sequence[Image | Path | str], batch_size: int = 32) -> Tensor:
        """Features [N, d] of photos, or of their files."""
        found = []
        for start in range(0, len(photos), batch_size):
            opened = [
                images.read_photo(Path(one)) if isinstance(one, (str, Path)) else images.to_rgb(one)
                for one in photos[start : start + batch_size]
            ]
            found.append(self.clip.encode_images(self.clip.pixels(opened).to(self.clip.device)))
        if not found:
            raise UserError("no photos: give one or more")
        return torch.cat(found)

    def predict(
        self, photos: Sequence[Image | Path | str], top_k: int = 5, batch_size: int = 32
    ) -> list[GeoPrediction]:
        """Where photos were taken.

        Args:
            photos: images of any mode, or paths of files; or a single one.
            top_k: places and countries that each gets.
            batch_size: photos that are encoded at a time.

        Raises:
            UserError: no photo, or one that cannot be read.
        """
        if top_k < 1:
            raise UserError(f"top_k is {top_k}: give 1 or more")
        if isinstance(photos, str) or not isinstance(photos, Sequence):
            photos = [photos]
        return self.predictions(self.locate(self.features(photos, batch_size), top_k), top_k)

    def predictions(self, located: Located, top_k: int = 5) -> list[GeoPrediction]:
        """What :meth:`locate` found, by names."""
        places, found = self.gazetteer, []
        for cities, probabilities, countries in zip(*located, strict=True):
            named = tuple(
                Place(
                    places.cities[i], places.regions[i], places.countries[places.country[i]],
                    float(places.latitude[i]), float(places.longitude[i]), float(p),
                )
                for i, p in zip(cities.tolist(), probabilities, strict=True)
                if i >= 0
            )  # fmt: skip
            first = int(places.country[cities[0]])
            order = np.argsort(-countries, kind="stable")[:top_k]
            best = named[0]
            found.append(
                GeoPrediction(
                    best.latitude, best.longitude, best.country, best.city, best.probability, float(countries[first]),
                    named, tuple((places.countries[i], float(countries[i])) for i in order),
                )
            )  # fmt: skip
        return found


def _best(candidates: np.ndarray, probabilities: Tensor, countries: Tensor, top_k: int) -> Located:
    """The best of candidates [M] by probabilities [N, M]."""
    k = min(top_k, len(candidates))
    values, found = probabilities.sort(dim=1, descending=True, stable=True)
    cities = np.full((len(probabilities), top_k), -1)
    kept = np.zeros((len(probabilities), top_k))
    cities[:, :k] = candidates[found[:, :k].cpu().numpy()]
    kept[:, :k] = values[:, :k].cpu().numpy()
    return Located(cities, kept, countries.cpu().numpy())


class _Cache:
    """Features of captions on disk, in a file for each text tower, found by what its weights are."""

    def __init__(self, folder: Path, clip: Clip) -> None:
        digest = hashlib.sha256()
        for name, value in sorted(clip.state_dict().items()):
            if "vision" not in name and "visual" not in name:
                digest.update(name.encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        self.path = folder / f"{digest.hexdigest()[:32]}.safetensors"

    def read(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Those that are there; a damaged file counts as none."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return {}
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as kept:
                held = set(kept.keys())
                return {one: kept.get_tensor(one) for one in captions if one in held}
        except (OSError, SafetensorError):
            return {}

    def write(self, features: dict[str, Tensor]) -> None:
        """Add features, in a file beside that is renamed.

        Raises:
            UserError: the folder cannot be written into.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        try:
            held = load_file(self.path) if self.path.is_file() else {}
        except (OSError, SafetensorError):
            held = {}
        held |= {name: value.detach().cpu().contiguous() for name, value in features.items()}
        beside = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(held, beside)
            beside.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--cache-dir {self.path.parent}: cannot be written into: give another") from error
