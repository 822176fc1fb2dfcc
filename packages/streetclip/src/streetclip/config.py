"""Settings of a streetclip run: photos and captions, CLIP, pre-training, and where photos are looked for."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metazoo.errors import UserError
from tyro.conf import Positional

FULL_CAPTION = "A Street View photo[ close to the town of {city}][ in the region of {region}] in {country}."
"""Square brackets hold what is left out where its level is missing."""
COUNTRY_CAPTION = "A Street View photo in {country}."
CITY_CAPTION = "A Street View photo from {city}."
LEVELS = ("city", "region", "country")
RADII = (1, 25, 200, 750, 2500)
"""Kilometres within which a prediction counts: street, city, region, country, continent."""


IM2GPS = {"im2gps": "img2gps_dataset_237.csv", "im2gps3k": "img2gps3k_dataset_2997.csv"}
"""Data set -> file of its coordinates, in the folder im2gps."""


def check_template(option: str, template: str, needs: tuple[str, ...] = ()) -> None:
    """Raise UserError unless a template has places to fill, all of them known ones."""
    if not re.fullmatch(r"[^][]*(\[[^][]*\][^][]*)*", template):
        raise UserError(f"{option} {template!r}: square brackets must close and hold no others")
    try:
        parsed = [piece for piece in string.Formatter().parse(template) if piece[1] is not None]
    except ValueError as error:
        raise UserError(f"{option} {template!r}: {error}: write as {FULL_CAPTION!r}") from error
    if any(form or conversion for _, _, form, conversion in parsed):
        raise UserError(f"{option} {template!r}: a place stands in braces alone: {{city}}")
    fields = [str(name) for _, name, _, _ in parsed]
    if unknown := [name for name in fields if name not in LEVELS]:
        raise UserError(f"{option} {template!r}: {{{unknown[0]}}} is none of {{city}}, {{region}}, {{country}}")
    if missing := [name for name in needs if name not in fields]:
        raise UserError(f"{option} {template!r}: {{{missing[0]}}} is missing: put it in")
    if not fields:
        raise UserError(f"{option} {template!r} names no place: put {{country}}, {{region}} or {{city}} in")


def _found(option: str, path: Path | str | None, *names: str) -> None:
    """Raise UserError unless there is such a file, or it is one of the names: said before anything heavy is loaded."""
    if path is not None and str(path) not in names and not Path(path).is_file():
        others = f"; or {', '.join(names)}" if names else ""
        raise UserError(f"{option} {path}: no such file: give a .csv{others}")


def _at_least(options: object, **least: int) -> None:
    for name, value in least.items():
        found = getattr(options, name)
        if found is not None and found < value:
            raise UserError(f"--{name.replace('_', '-')} is {found}: give {value} or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Photos and captions, CLIP, pre-training, and how places are asked for."""

    dataset: str = "world"
    """world (generated street scenes), im2gps or im2gps3k (photos and coordinates, to be evaluated on; files), hub:ID,
    or the path of a .csv with columns image, country and, if any, region, city, latitude, longitude, split (train or
    test)."""
    data_dir: str | None = None
    """Folder of file-based data sets, and of the images that a .csv names [default: beside it]."""
    gazetteer: str = "geonames"
    """Where places are looked up: geonames (cities of 15,000 inhabitants or more), or a .csv with columns city,
    country, latitude, longitude and, if any, region, population. The generated world has its own."""
    images: int = 12_800
    """Training photos (world)."""
    test_images: int = 1_000
    """Test photos of each of: seen cities, unseen cities, unseen countries (world)."""
    seed: int = 0
    """Seed of world, initialisation and order."""

    model: str = "tiny"
    """tiny (a CLIP, trained here), or the hub id or folder of any CLIP of transformers."""
    width: int = 64
    """Width of both towers (tiny)."""
    vision_layers: int = 4
    """Layers of the image tower (tiny)."""
    text_layers: int = 3
    """Layers of the text tower (tiny)."""
    heads: int = 4
    """Attention heads (tiny)."""
    patch: int = 8
    """Pixels of a patch's side, of 32 (tiny)."""
    projection: int = 64
    """Dimensions of the joint space (tiny)."""
    generic_steps: int = 800
    """First steps on generic captions, without places (world, tiny): they stand for CLIP's own pre-training."""
    generic_batch: int = 32
    """Photos in each of these, over all processes."""
    generic_lr: float = 1e-3
    """Learning rate of these."""
    local_words: float = 0.5
    """Share of attributes that a generic caption calls by the syllable that place names have for them (world)."""

    method: Literal["streetclip", "clip", "label-head"] = "streetclip"
    """Synthetic-caption pre-training; CLIP as it is; or a linear softmax head on the image tower, trained with it."""
    template: str = FULL_CAPTION
    """Caption of a training photo; what stands in square brackets is left out where a photo lacks its level."""
    drop_levels: float = 0.0
    """Share of training captions that lose each part in square brackets, at random (ours)."""
    targets: Literal["hard", "soft"] = "hard"
    """Contrastive targets: each photo's own caption, or all equal captions of the batch alike."""
    towers: Literal["both", "image", "text"] = "both"
    """Towers that synthetic captions train."""
    head: Literal["country", "city", "cell"] = "country"
    """Classes of the label head: countries, (country, city) pairs, or k-means cells of coordinates."""
    cells: int = 100
    """k-means cells, where the head has them."""

    steps: int = 200
    """Steps on synthetic captions, or of the label head."""
    batch: int = 64
    """Photos in a step, over all processes; each is told from all captions of the batch."""
    micro_batch: int | None = None
    """Photos that are encoded at a time: the batch's gradient at less memory (GradCache), for a second forward pass
    [default: all]."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    weight_decay: float = 0.01
    """Of AdamW, not on biases, norms and the temperature."""
    warmup: int = 50
    """Steps of linear warm-up, of each phase."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after it."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: no limit."""
    max_scale: float = 100.0
    """Largest temperature exp(τ), as in CLIP."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision; weights stay in 32 bits."""
    checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""

    country_template: str = COUNTRY_CAPTION
    """Caption of a country when places are asked for."""
    city_template: str = CITY_CAPTION
    """Caption of a city when places are asked for."""
    cities: int = 30
    """Most populous cities of a country that are asked for."""

    def __post_init__(self) -> None:
        _at_least(
            self, images=1, test_images=1, seed=0, width=4, vision_layers=1, text_layers=1, heads=1, patch=1,
            projection=1, generic_steps=0, generic_batch=2, cells=2, steps=0, batch=2, micro_batch=1, warmup=0,
            cities=1,
        )  # fmt: skip
        for name in ("generic_lr", "lr", "max_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number above 0")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 or more")
        for name in ("local_words", "drop_levels"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 to 1")
        if self.drop_levels and "[" not in self.template:
            raise UserError(f"--drop-levels: --template {self.template!r} has nothing in square brackets")
        if self.model == "tiny" and self.width % self.heads:
            raise UserError(f"--width is {self.width}, --heads {self.heads}: give a multiple of it")
        if self.model == "tiny" and 32 % self.patch:
            raise UserError(f"--patch is {self.patch}: give a divisor of 32")
        check_template("--template", self.template)
        check_template("--country-template", self.country_template, ("country",))
        check_template("--city-template", self.city_template, ("city",))
        generated = self.dataset == "world" and self.model == "tiny"
        if self.generic_steps and not generated:
            raise UserError("--generic-steps are for --dataset world --model tiny: give 0")
        if self.generic_steps and self.generic_batch > self.images:
            raise UserError(
                f"--generic-batch is {self.generic_batch}, --images {self.images}: give fewer, or more images"
            )
        if self.dataset in ("im2gps", "im2gps3k") and self.method != "clip":
            raise UserError(f"--dataset {self.dataset} is for evaluation: give --method clip")
        if self.method == "label-head" and not self.steps:
            raise UserError("--method label-head learns its head: give --steps 1 or more")
        if self.method == "label-head" and self.towers == "text":
            raise UserError("--method label-head has no text tower: give --towers both or image")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Score a run on its test photos: countries, cities, and the share within 1, 25, 200, 750 and 2500 km."""

    mode: Literal["hierarchical", "flat", "soft"] = "hierarchical"
    """Country, then city; all cities at once; or the greatest sum of both log probabilities."""
    ensemble: tuple[str, ...] = ()
    """Further templates of a country; its embedding is the mean of all."""
    city_template: str | None = None
    """Caption of a city [default: the run's]."""
    us_states: bool = False
    """Also ask for the states of the United States (geonames)."""
    countries: Literal["all", "paper"] = "all"
    """Countries that are asked for (geonames): all, or those of the paper's appendix."""
    knn: int = 0
    """Also the mean place of this many nearest training photos; 0: not."""
    batch_size: int = 256
    """Photos and captions that are encoded at a time."""
    plots: bool = True
    """Draw errors, countries, calibration and a map."""

    def __post_init__(self) -> None:
        _at_least(self, knn=0, batch_size=1)
        for template in self.ensemble:
            check_template("--ensemble", template, ("country",))
        if self.city_template is not None:
            check_template("--city-template", self.city_template, ("city",))


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Say where photos were taken: a table, JSON, and a map that opens in any browser, without a network."""

    photos: Positional[tuple[Path, ...]] = ()
    """Photos, and folders of photos (with all below them)."""
    model: str = "geolocal/StreetCLIP"
    """Run folder of `streetclip train`, or the hub id or folder of any CLIP. StreetCLIP's weights are CC BY-NC 4.0."""
    output_dir: Path = Path("runs/streetclip-predict")
    """Folder of predictions.csv, predictions.json and map.html."""
    top_k: int = 5
    """Places that each photo gets."""
    gazetteer: str = "geonames"
    """geonames, or a .csv with columns city, country, latitude, longitude and, if any, region, population."""
    mode: Literal["hierarchical", "flat", "soft"] = "hierarchical"
    """Country, then city; all cities at once; or the greatest sum of both log probabilities."""
    cities: int | None = None
    """Most populous cities of a country that are asked for [default: the run's, or 30]."""
    country_template: str | None = None
    """Caption of a country [default: the run's, or "A Street View photo in {country}."]."""
    city_template: str | None = None
    """Caption of a city [default: the run's, or "A Street View photo from {city}."]."""
    ensemble: tuple[str, ...] = ()
    """Further templates of a country; its embedding is the mean of all."""
    us_states: bool = False
    """Also ask for the states of the United States (geonames)."""
    countries: Literal["all", "paper"] = "all"
    """Countries that are asked for (geonames): all, or those of the paper's appendix."""
    batch_size: int = 32
    """Photos that are encoded at a time."""
    skip_bad: bool = False
    """Photos that cannot be read are named and left out; without this it ends as an error, with the others' results."""
    map: bool = True
    """Write the map, with a thumbnail of each photo."""
    cache_dir: Path | None = None
    """Folder in which embeddings of captions are kept, for the next call with the same model [default: nowhere]."""
    overwrite: bool = False
    """Replace predictions that are there."""

    def __post_init__(self) -> None:
        _at_least(self, top_k=1, cities=1, batch_size=1)
        if not self.photos:
            raise UserError("no photos: give photos, or folders of photos")
        if self.country_template is not None:
            check_template("--country-template", self.country_template, ("country",))
        if self.city_template is not None:
            check_template("--city-template", self.city_template, ("city",))
        for template in self.ensemble:
            check_template("--ensemble", template, ("country",))
        for photo in self.photos:
            if not photo.exists():
                raise UserError(f"{photo}: no such photo or folder")
        _found("--gazetteer", self.gazetteer, "geonames")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Hold predictions against true coordinates: percent within each radius, median error."""

    predictions: Path = Path("runs/streetclip-predict/predictions.csv")
    """A .csv with columns filename, latitude, longitude, as `streetclip predict` writes it."""
    coords: str = ""
    """A .csv with columns filename, latitude, longitude; or im2gps, im2gps3k (files in METAZOO_DATA)."""
    output_dir: Path | None = None
    """Folder for a plot of errors [default: no plot]."""

    def __post_init__(self) -> None:
        if not self.coords:
            raise UserError("no --coords: give a .csv with columns filename, latitude, longitude")
        _found("--predictions", self.predictions)
        _found("--coords", self.coords, *IM2GPS)


@dataclass(frozen=True, kw_only=True)
class OracleOptions:
    """Ceilings of the method: the true country's K most populous cities, the nearest of which is taken."""

    coords: str = "im2gps3k"
    """A .csv with columns filename, latitude, longitude; or im2gps, im2gps3k (files in METAZOO_DATA)."""
    gazetteer: str = "geonames"
    """geonames, or a .csv with columns city, country, latitude, longitude and, if any, region, population."""
    cities: tuple[int, ...] = (1, 10, 30, 100, 0)
    """Values of K; 0: all cities."""

    def __post_init__(self) -> None:
        if not self.cities or min(self.cities) < 0:
            raise UserError("--cities: give numbers of cities, 0 for all")
        _found("--coords", self.coords, *IM2GPS)
        _found("--gazetteer", self.gazetteer, "geonames")


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Write the synthetic captions of a table of labels."""

    labels: Path | None = None
    """A .csv with columns country and, if any, region, city."""
    template: str = FULL_CAPTION
    """Caption; what stands in square brackets is left out where a row lacks its level."""
    output: Path | None = None
    """Where the table with a column caption goes [default: captions are printed]."""

    def __post_init__(self) -> None:
        if self.labels is None:
            raise UserError("no --labels: give a .csv with columns country and, if any, region, city")
        check_template("--template", self.template)
        _found("--labels", self.labels)


@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """Write generated street scenes as files, in the form of one's own data: photos.csv, gazetteer.csv, photos/."""

    output_dir: Path = Path("runs/streetclip-world")
    """An empty folder, or a new one."""
    images: int = 2_000
    """Training photos."""
    test_images: int = 200
    """Test photos of each of: seen cities, unseen cities, unseen countries."""
    seed: int = 0
    """Seed of the world."""

    def __post_init__(self) -> None:
        _at_least(self, images=1, test_images=1, seed=0)


# Model card of geolocal/StreetCLIP: 1.1 million photos, 3 epochs, AdamW at 1e-6, 32 photos × 3 GPUs × 12 accumulated.
_PAPER = Config(
    dataset="photos.csv", model="openai/clip-vit-large-patch14-336", generic_steps=0, steps=2_865, batch=1_152,
    micro_batch=32, lr=1e-6, warmup=0, precision="bf16", checkpointing=True,
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "small": Config(),
    "paper": _PAPER,
    "im2gps3k": replace(
        _PAPER,
        dataset="im2gps3k",
        model="geolocal/StreetCLIP",
        method="clip",
        steps=0,
        batch=32,
        micro_batch=None,
        checkpointing=False,
        precision="no",
    ),
}
