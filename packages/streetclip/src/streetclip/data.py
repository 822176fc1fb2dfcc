"""Photos with labels: generated street scenes, a .csv with image files, IM2GPS, or a hub data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from PIL import Image
from torch import Tensor

from streetclip import images, world
from streetclip.config import IM2GPS, LEVELS, Config, WorldOptions
from streetclip.coordinates import numbers_of, read_coordinates, read_table
from streetclip.gazetteer import Gazetteer, check_coordinates

if TYPE_CHECKING:
    import pandas as pd

    from streetclip.model import Clip


@dataclass(frozen=True)
class Photos:
    """Photos and what is known of them.

    Attributes:
        names: [N], of files.
        city, region, country: [N], "" where not known.
        latitude, longitude: [N] degrees, NaN where not known.
        arrays: [N, H, W, 3] bytes; or
        sources: [N] paths of files, or :class:`HubImage`.
    """

    names: tuple[str, ...]
    city: tuple[str, ...]
    region: tuple[str, ...]
    country: tuple[str, ...]
    latitude: np.ndarray
    longitude: np.ndarray
    arrays: np.ndarray | None = None
    sources: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, chosen: Sequence[int] | np.ndarray, clip: Clip) -> Tensor:
        """Pixel values [n, 3, H, W] of the photos with these numbers, as the CLIP takes them.

        Raises:
            UserError: a file cannot be read.
        """
        chosen = np.asarray(chosen, dtype=int)
        if self.arrays is not None:
            if self.arrays.shape[1:3] == (clip.model.config.vision_config.image_size,) * 2:
                return scaled(self.arrays[chosen], clip)
            return clip.pixels([Image.fromarray(one) for one in self.arrays[chosen]])
        assert self.sources is not None
        return clip.pixels(list(_readers().map(self._open, chosen.tolist())))

    def _open(self, i: int) -> Image.Image:
        assert self.sources is not None
        return _image(self.sources[i], self.names[i])

    def take(self, chosen: np.ndarray) -> Photos:
        """Those with these numbers."""
        chosen = np.asarray(chosen, dtype=int)
        several = [tuple(one[i] for i in chosen.tolist()) for one in (self.names, self.city, self.region, self.country)]
        return Photos(
            *several, self.latitude[chosen], self.longitude[chosen],
            None if self.arrays is None else self.arrays[chosen],
            None if self.sources is None else [self.sources[i] for i in chosen.tolist()],
        )  # fmt: skip


def scaled(arrays: np.ndarray, clip: Clip) -> Tensor:
    """Pixel values of photos [n, H, W, 3] that have the CLIP's size, as its processor would give them."""
    mean = torch.tensor(clip.processor.image_mean).view(3, 1, 1)
    deviation = torch.tensor(clip.processor.image_std).view(3, 1, 1)
    return (torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255 - mean) / deviation


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    """Threads that decode photos."""
    return ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="photos")


def _image(source: Any, name: str) -> Image.Image:
    if isinstance(source, Path):
        return images.read_photo(source)
    try:
        image = source.held[source.number]["image"]
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UserError(f"{name}: cannot be read ({' '.join(str(error).split())}): leave the row out") from error
    if not isinstance(image, Image.Image):
        raise UserError(f"{name}: the column image holds {type(image).__name__}, no image: cast it to datasets.Image")
    return images.to_rgb(image)


@dataclass(frozen=True)
class Data:
    """What a run learns from and is scored on.

    Attributes:
        train: photos with labels.
        tests: name -> photos with coordinates.
        gazetteer: where places are looked up.
        generic: photos [M, H, W, 3] and their attribute values [M, 8], for generic captions.
    """

    train: Photos | None
    tests: dict[str, Photos]
    gazetteer: Gazetteer
    generic: tuple[np.ndarray, np.ndarray] | None = None


def load(config: Config) -> Data:
    """The data of a config.

    Raises:
        UserError: the files or columns are not there, or their content is not what it should be.
    """
    if config.dataset == "world":
        return load_world(config)
    if config.dataset in IM2GPS:
        return Data(None, {"all": _im2gps(config)}, Gazetteer.load(config.gazetteer))
    if config.dataset.startswith("hub:"):
        train, test = _from_hub(config.dataset.removeprefix("hub:"), config)
    else:
        train, test = _from_csv(Path(config.dataset), config)
    gazetteer = Gazetteer.load(config.gazetteer)
    return Data(train, _by_place(train, test), gazetteer)


# ---- the generated world


def load_world(config: Config) -> Data:
    """Photos of the world of the seed: training photos of seen cities, test photos of seen and of held-out places."""
    places = world.make(config.seed)
    seen = np.flatnonzero(places.seen)
    groups = {
        "seen": seen,
        "unseen_cities": np.flatnonzero(places.unseen_city),
        "unseen_countries": np.flatnonzero(places.unseen_country[places.country]),
    }
    train = _photos(places, seen, config.images, np.random.default_rng([config.seed, 2]), "train")
    tests = {
        name: _photos(places, held, config.test_images, np.random.default_rng([config.seed, 3, i]), name)
        for i, (name, held) in enumerate(groups.items())
    }
    generic = None
    if config.generic_steps:
        rng = np.random.default_rng([config.seed, 4])
        attributes = world.generic_attributes(places, config.images, rng)
        generic = (world.render(attributes, rng), attributes)
    return Data(train, tests, gazetteer_of(places, config.seed), generic)


def gazetteer_of(places: world.World, seed: int) -> Gazetteer:
    """All places of a world, held out or not, with made-up populations."""
    count = len(places.city_names)
    return Gazetteer(
        countries=places.country_names, cities=places.city_names, country=places.country, latitude=places.latitude,
        longitude=places.longitude, regions=places.region_names, name="world",
        population=np.random.default_rng([seed, 5]).lognormal(11, 1, count).round(),
    )  # fmt: skip


def _photos(places: world.World, cities: np.ndarray, count: int, rng: np.random.Generator, name: str) -> Photos:
    """Photos of cities that are drawn with equal chances, taken within some 5 km of their centres."""
    taken = cities[rng.integers(len(cities), size=count)]
    arrays = world.render(world.photo_attributes(places, taken, rng), rng)
    north, east = rng.normal(0, 5 / 111.195 / np.sqrt(2), size=(2, count))
    latitude = places.latitude[taken] + north
    longitude = places.longitude[taken] + east / np.cos(np.radians(places.latitude[taken]))
    return Photos(
        tuple(f"{name}-{i:05d}.png" for i in range(count)), tuple(places.city_names[i] for i in taken),
        tuple(places.region_names[i] for i in taken), tuple(places.country_names[places.country[i]] for i in taken),
        latitude, longitude, arrays,
    )  # fmt: skip


def make_world(options: WorldOptions) -> str:
    """`streetclip make-world`: a world as files.

    Raises:
        UserError: the folder is not empty.
    """
    import pandas as pd

    folder = options.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: give another --output-dir")
    config = Config(images=options.images, test_images=options.test_images, seed=options.seed, generic_steps=0)
    held = load_world(config)
    assert held.train is not None
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    tables = []
    for name, photos in {"train": held.train, **held.tests}.items():
        assert photos.arrays is not None
        for file, array in zip(photos.names, photos.arrays, strict=True):
            Image.fromarray(array).save(folder / "photos" / file)
        tables.append(
            pd.DataFrame({
                "image": [f"photos/{file}" for file in photos.names], "city": photos.city, "region": photos.region,
                "country": photos.country, "latitude": photos.latitude.round(6), "longitude": photos.longitude.round(6),
                "split": "train" if name == "train" else "test",
            })
        )  # fmt: skip
    runfolder.write_text(folder / "photos.csv", pd.concat(tables).to_csv(index=False))
    places = held.gazetteer
    table = pd.DataFrame({
        "city": places.cities, "region": places.regions, "country": [places.countries[i] for i in places.country],
        "latitude": places.latitude.round(6), "longitude": places.longitude.round(6),
        "population": places.population.astype(int),
    })  # fmt: skip
    runfolder.write_text(folder / "gazetteer.csv", table.to_csv(index=False))
    count = sum(len(one) for one in tables)
    return (
        f"{count} photos of {len(places.countries)} countries in {folder}: "
        f"streetclip train --dataset {folder}/photos.csv --gazetteer {folder}/gazetteer.csv --generic-steps 0"
    )


# ---- files and the hub


def _im2gps(config: Config) -> Photos:
    names, latitude, longitude = read_coordinates(config.dataset, config.data_dir)
    if config.data_dir is None:
        raise UserError(f"--dataset {config.dataset}: give the folder of its photos with --data-dir")
    root = Path(config.data_dir)
    paths = {path.name: path for path in images.find_photos([root])}
    if absent := [name for name in names if name not in paths]:
        raise UserError(f"{root}: {absent[0]} is missing ({len(absent)} of {len(names)} photos): fetch them")
    none = ("",) * len(names)
    return Photos(names, none, none, none, latitude, longitude, None, [paths[name] for name in names])


def _from_csv(path: Path, config: Config) -> tuple[Photos | None, Photos | None]:
    table = read_table(path, ("image", "country"))
    root = Path(config.data_dir) if config.data_dir else path.parent
    sources = [root / name for name in table["image"]]
    for i, source in enumerate(sources):
        if not source.is_file():
            raise UserError(f"{path}, line {i + 2}: no photo {source}: mend the path, or give --data-dir")
    return _split(table, sources, path)


def _split(table: pd.DataFrame, sources: Sequence[Any], where: object) -> tuple[Photos | None, Photos | None]:
    """Training and test photos; all are for training where no column says more."""
    columns = [
        tuple(table[level].str.strip()) if level in table.columns else ("",) * len(table) for level in LEVELS
    ]  # fmt: skip
    if "" in columns[2]:
        raise UserError(f"{where}, line {columns[2].index('') + 2}: no country: fill it in, or leave the row out")
    degrees = [
        numbers_of(table, column, where, may_lack=True) if column in table.columns else np.full(len(table), np.nan)
        for column in ("latitude", "longitude")
    ]
    if (half := np.isnan(degrees[0]) != np.isnan(degrees[1])).any():
        raise UserError(f"{where}, line {int(half.argmax()) + 2}: latitude or longitude alone: give both, or none")
    known = ~np.isnan(degrees[0])
    lines = np.flatnonzero(known)
    check_coordinates(degrees[0][known], degrees[1][known], lambda i: f"{where}, line {lines[i] + 2}")
    photos = Photos(tuple(table["image"]), *columns, *degrees, None, sources)
    split = table["split"] if "split" in table.columns else None
    if split is None:
        return photos, None
    if wrong := sorted(set(split) - {"train", "test"}):
        raise UserError(f"{where}: split is {wrong[0]!r}: give train or test")
    parts = [np.flatnonzero(split == name) for name in ("train", "test")]
    if len(parts[1]) and not known[parts[1]].all():
        row = int(parts[1][~known[parts[1]]][0])
        raise UserError(f"{where}, line {row + 2}: a test photo without coordinates: give latitude and longitude")
    train, test = (photos.take(part) if len(part) else None for part in parts)
    return train, test


def _from_hub(name: str, config: Config) -> tuple[Photos | None, Photos | None]:
    """Splits train and, if there is one, test of a hub data set with a column image."""
    import importlib.util

    if importlib.util.find_spec("datasets") is None:
        raise UserError("--dataset hub:… needs the package datasets: run `pip install metazoo-streetclip[hub]`")
    import datasets
    import pandas as pd

    try:
        held = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load {name!r} from the hub ({reason}): give another id, or a .csv") from error
    tables, sources = [], []
    for split in ("train", "test"):
        if split not in held:
            continue
        if missing := [column for column in ("image", "country") if column not in held[split].column_names]:
            raise UserError(f"hub data set {name}: no column {missing[0]!r}: give another")
        kept = [c for c in (*LEVELS, "latitude", "longitude") if c in held[split].column_names]
        table = pd.DataFrame({column: _texts(held[split], column) for column in kept})
        table["image"], table["split"] = [f"{split}-{i}" for i in range(len(table))], split
        tables.append(table)
        sources += [HubImage(held[split], i) for i in range(len(table))]
    if not tables:
        raise UserError(f"hub data set {name}: no split train or test, only {', '.join(held)}")
    return _split(pd.concat(tables, ignore_index=True).fillna(""), sources, f"hub data set {name}")


@dataclass(frozen=True)
class HubImage:
    """An image of a hub data set, decoded when it is asked for."""

    held: Any
    number: int


def _texts(held: Any, column: str) -> list[str]:
    """A column as texts: names of class labels, "" where there is nothing."""
    labels, values = held.features[column], held.with_format(None)[column]
    if hasattr(labels, "int2str"):
        values = [None if value is None or value < 0 else labels.int2str(value) for value in values]
    return ["" if value is None or value != value else str(value) for value in values]


def _by_place(train: Photos | None, test: Photos | None) -> dict[str, Photos]:
    """Test photos of places that were trained on, of unseen cities, and of unseen countries."""
    if test is None:
        return {}
    if train is None:
        return {"all": test}
    places, countries = set(zip(train.country, train.city, strict=True)), set(train.country)
    kinds = np.array([
        "unseen_countries" if country not in countries
        else "unseen_cities" if city and (country, city) not in places else "seen"
        for country, city in zip(test.country, test.city, strict=True)
    ])  # fmt: skip
    groups = ("seen", "unseen_cities", "unseen_countries")
    return {name: test.take(np.flatnonzero(kinds == name)) for name in groups if (kinds == name).any()}


def batch_of(count: int, size: int, step: int, seed: int, phase: int) -> np.ndarray:
    """Photos [size] of a step: epoch after epoch, each in an order of its own."""
    first, found = step * size, np.empty(0, dtype=int)
    while len(found) < size:
        epoch, start = divmod(first + len(found), count)
        found = np.concatenate([found, _epoch(count, seed, phase, epoch)[start : start + size - len(found)]])
    return found


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, phase: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, phase, epoch]).permutation(count)
