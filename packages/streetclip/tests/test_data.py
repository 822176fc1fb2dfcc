"""Data sets: pixels as CLIP's processor gives them, held-out places, files of one's own, and what they refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo.errors import UserError
from PIL import Image
from streetclip import coordinates, data, world
from streetclip.config import Config, WorldOptions
from streetclip.model import Clip, load_model

REAL = pytest.mark.skipif(not os.environ.get("METAZOO_DATA"), reason="METAZOO_DATA is not set")
WORLD = Config(images=300, test_images=60, generic_steps=0)
HEADER = "image,country,region,city,latitude,longitude,split"


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_model(Config())


@pytest.fixture(scope="module")
def small() -> data.Data:
    return data.load(WORLD)


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def own(folder: Path, *lines: str, photos: tuple[str, ...] = ("a.png", "b.png", "c.png")) -> Config:
    """A data set of files, each photo of one grey: 0, 10, 20, …; with a gazetteer of two cities."""
    for i, name in enumerate(photos):
        Image.new("RGB", (32, 32), (10 * i,) * 3).save(folder / name)
    places = written(
        folder / "places.csv", "city,country,latitude,longitude", "Rome,Italy,41.9,12.5", "Lyon,France,45.8,4.8"
    )
    table = written(folder / "photos.csv", *lines)
    return Config(dataset=str(table), gazetteer=str(places), generic_steps=0)


def levels(photos: data.Photos, clip: Clip) -> list[int]:
    """Grey values of photos of one grey."""
    pixels = photos.pixels(np.arange(len(photos)), clip)
    return [round(value) for value in ((pixels.mean(dim=(1, 2, 3)) * 0.25 + 0.5) * 255).tolist()]


# ---- pixels


def test_scaled_is_the_processor(small: data.Data, clip: Clip) -> None:
    """Photos of CLIP's size need no resizing: the short way gives what the processor gives."""
    assert small.train is not None
    assert small.train.arrays is not None
    arrays = small.train.arrays[:5]
    expected = clip.processor(images=[Image.fromarray(one) for one in arrays], return_tensors="pt")["pixel_values"]
    found = data.scaled(arrays, clip)
    assert found.shape == (5, 3, 32, 32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    chosen = small.train.pixels([4, 0], clip)
    torch.testing.assert_close(chosen, expected[[4, 0]], rtol=0, atol=1e-6)


def test_take(small: data.Data) -> None:
    """Every field goes with its photo."""
    train = small.train
    assert train is not None
    assert train.arrays is not None
    found = train.take(np.array([7, 2]))
    assert len(found) == 2
    assert found.arrays is not None
    for i, j in enumerate((7, 2)):
        for name in ("names", "city", "region", "country"):
            assert getattr(found, name)[i] == getattr(train, name)[j]
        assert (found.latitude[i], found.longitude[i]) == (train.latitude[j], train.longitude[j])
        assert np.array_equal(found.arrays[i], train.arrays[j])


def test_photos_of_another_size(clip: Clip) -> None:
    """Are resized by the processor."""
    arrays = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    none = ("", "")
    photos = data.Photos(("a", "b"), none, none, none, np.zeros(2), np.zeros(2), arrays)
    expected = clip.processor(images=[Image.fromarray(one) for one in arrays], return_tensors="pt")["pixel_values"]
    assert torch.equal(photos.pixels([0, 1], clip), expected)


# ---- the generated world


def test_world_splits_by_place(small: data.Data) -> None:
    """Training photos and `seen` are of seen cities; the two other groups of held-out ones, all different photos."""
    places = world.make(0)
    held = {
        "unseen_cities": places.unseen_city,
        "unseen_countries": places.unseen_country[places.country],
        "seen": places.seen,
    }
    cities = {
        name: {(places.country_names[places.country[i]], places.city_names[i]) for i in np.flatnonzero(mask)}
        for name, mask in held.items()
    }
    assert small.train is not None
    assert set(zip(small.train.country, small.train.city, strict=True)) <= cities["seen"]
    assert len(small.train) == 300
    assert set(small.tests) == set(held)
    for name, photos in small.tests.items():
        assert len(photos) == 60
        assert set(zip(photos.country, photos.city, strict=True)) <= cities[name]
    assert set(small.tests["unseen_cities"].country) <= set(small.train.country)
    assert not set(small.tests["unseen_countries"].country) & set(small.train.country)
    several = [small.train, *small.tests.values()]
    pixels = [array.tobytes() for one in several if one.arrays is not None for array in one.arrays]
    assert len(set(pixels)) == len(pixels) == 480


def test_world_photos_lie_near_their_cities(small: data.Data) -> None:
    """5 km, root mean square, in every direction alike; the gazetteer knows every place, held out or not."""
    north, east = [], []
    several = [small.train, *small.tests.values()]
    for photos in several:
        assert photos is not None
        for i in range(len(photos)):
            city = small.gazetteer.find(photos.country[i], photos.city[i])
            assert city is not None
            assert small.gazetteer.regions[city] == photos.region[i]
            latitude = small.gazetteer.latitude[city]
            north.append(111.195 * (photos.latitude[i] - latitude))
            east.append(
                111.195 * np.cos(np.radians(latitude)) * (photos.longitude[i] - small.gazetteer.longitude[city])
            )
    for offsets in (north, east):
        assert np.std(offsets) == pytest.approx(5 / np.sqrt(2), rel=0.12)
        assert abs(np.mean(offsets)) < 0.7
    assert len(small.gazetteer.cities) == 384
    assert len(small.gazetteer.candidates(30)) == 384


def test_world_photos_show_their_places(small: data.Data) -> None:
    """Sky of the photos is the city's sky: labels and pixels are of the same place."""
    places = world.make(0)
    photos = small.tests["unseen_cities"]
    assert photos.arrays is not None
    cities = [small.gazetteer.find(*pair) for pair in zip(photos.country, photos.city, strict=True)]
    top = photos.arrays[:, :2, 14:].reshape(60, -1, 3).mean(axis=1) / 255
    mean = np.array([top[places.attributes[cities, 5] == sky].mean(axis=0) for sky in range(4)])
    blue, grey, pink, amber = mean
    assert blue[2] - blue[0] > 0.3
    assert abs(grey[2] - grey[0]) < 0.1
    assert pink[0] - pink[1] > 0.15
    assert amber[0] - amber[2] > 0.3


def test_world_of_a_seed(small: data.Data) -> None:
    again, other = data.load(WORLD), data.load(replace(WORLD, seed=1, images=5))
    assert again.train is not None
    assert other.train is not None
    assert small.train is not None
    assert np.array_equal(again.train.arrays, small.train.arrays)
    assert again.train.names == small.train.names
    assert again.gazetteer.cities == small.gazetteer.cities
    assert other.gazetteer.countries != small.gazetteer.countries


def test_world_generic_photos(small: data.Data) -> None:
    """As many as training photos, of no held-out place, and only if there are steps that want them."""
    assert small.generic is None
    generic = data.load(replace(WORLD, images=400, test_images=1, generic_steps=1)).generic
    assert generic is not None
    pixels, attributes = generic
    assert pixels.shape == (400, 32, 32, 3)
    assert attributes.shape == (400, 8)
    places = world.make(0)
    unseen = places.attributes[places.unseen_country[places.country]][:, :4]
    assert not {tuple(one) for one in attributes[:, :4].tolist()} & {tuple(one) for one in unseen.tolist()}
    sky = pixels[:, :2, 14:].mean(axis=(1, 2)) / 255
    assert (sky[:, 2] - sky[:, 0])[attributes[:, 5] == 0].min() > 0.2  # blue
    assert (sky[:, 2] - sky[:, 0])[attributes[:, 5] == 3].max() < -0.2  # amber


def test_make_world_loads_back(tmp_path: Path, clip: Clip) -> None:
    """Files of the world, read as one's own data, are the same photos of the same places."""
    folder = tmp_path / "world"
    said = data.make_world(WorldOptions(output_dir=folder, images=12, test_images=3))
    assert said.startswith(f"21 photos of 24 countries in {folder}: streetclip train ")
    expected = data.load(replace(WORLD, images=12, test_images=3))
    found = data.load(
        Config(dataset=str(folder / "photos.csv"), gazetteer=str(folder / "gazetteer.csv"), generic_steps=0)
    )
    assert found.train is not None
    assert expected.train is not None

    def by_name(several: list[data.Photos]) -> dict[str, tuple[Any, ...]]:
        return {
            name.removeprefix("photos/"): (
                photos.city[i], photos.region[i], photos.country[i], photos.latitude[i], photos.longitude[i], pixels,
            )
            for photos in several
            for i, (name, pixels) in enumerate(
                zip(photos.names, photos.pixels(np.arange(len(photos)), clip), strict=True)
            )
        }  # fmt: skip

    read, made = by_name([found.train, *found.tests.values()]), by_name([expected.train, *expected.tests.values()])
    assert set(read) == set(made)
    assert len(found.train) == 12
    for name, (*labels, latitude, longitude, pixels) in made.items():
        assert list(read[name][:3]) == labels
        assert read[name][3:5] == pytest.approx((latitude, longitude), abs=1e-6)
        torch.testing.assert_close(read[name][5], pixels, rtol=0, atol=1e-6)
    assert set(found.tests["unseen_countries"].names) >= {
        f"photos/{name}" for name in expected.tests["unseen_countries"].names
    }
    assert found.gazetteer.cities == expected.gazetteer.cities
    assert found.gazetteer.regions == expected.gazetteer.regions
    assert [found.gazetteer.countries[i] for i in found.gazetteer.country] == [
        expected.gazetteer.countries[i] for i in expected.gazetteer.country
    ]
    assert np.allclose(found.gazetteer.latitude, expected.gazetteer.latitude, atol=1e-6)
    assert np.array_equal(found.gazetteer.population, expected.gazetteer.population)


def test_make_world_overwrites_nothing(tmp_path: Path) -> None:
    kept = written(tmp_path / "photos.csv", "mine")
    with pytest.raises(UserError, match="is not an empty folder: give another --output-dir"):
        data.make_world(WorldOptions(output_dir=tmp_path, images=1, test_images=1))
    with pytest.raises(UserError, match="is not an empty folder"):
        data.make_world(WorldOptions(output_dir=kept, images=1, test_images=1))
    assert kept.read_text() == "mine\n"
    assert list(tmp_path.iterdir()) == [kept]


# ---- a .csv with photos


def test_csv_without_split(tmp_path: Path, clip: Clip) -> None:
    """All are for training; only image and country are needed; labels are stripped; a byte order mark is none."""
    found = data.load(own(tmp_path, "\ufeffimage,country", "b.png,Italy", "c.png, France ", "b.png,NA"))
    assert found.tests == {}
    assert found.train is not None
    assert found.train.names == ("b.png", "c.png", "b.png")
    assert found.train.country == ("Italy", "France", "NA")
    assert found.train.city == found.train.region == ("", "", "")
    assert np.isnan(found.train.latitude).all()
    assert levels(found.train, clip) == [10, 20, 10]
    assert found.gazetteer.cities == ("Rome", "Lyon")


def test_csv_with_split(tmp_path: Path, clip: Clip) -> None:
    """Training photos need no coordinates; test photos keep their own."""
    found = data.load(
        own(tmp_path, HEADER, "c.png,Italy,Lazio,Rome,41.9,12.5,test", "a.png,Italy,Lazio,Rome,,,train",
            "b.png,France,,,45.0,5.0,train")
    )  # fmt: skip
    assert found.train is not None
    assert found.train.names == ("a.png", "b.png")
    assert found.train.region == ("Lazio", "")
    assert found.train.latitude[1] == 45.0
    assert levels(found.train, clip) == [0, 10]
    assert list(found.tests) == ["seen"]
    test = found.tests["seen"]
    assert (test.names, test.city, test.country) == (("c.png",), ("Rome",), ("Italy",))
    assert (test.latitude.tolist(), test.longitude.tolist()) == ([41.9], [12.5])
    assert levels(test, clip) == [20]


def test_csv_groups(tmp_path: Path, clip: Clip) -> None:
    """A city of a training country is unseen if none of its photos is trained on, though a namesake's be; a
    photo without a city counts by its country."""
    rows = [
        ("Italy", "Rome", "train"), ("France", "Lyon", "train"), ("Italy", "Rome", "test"), ("Italy", "Milan", "test"),
        ("Italy", "Lyon", "test"), ("Chad", "Rome", "test"), ("France", "Lyon", "test"),
        ("France", "", "test"),
    ]  # fmt: skip
    photos = tuple(f"{i}.png" for i in range(len(rows)))
    lines = [f"{name},{country},,{city},1,2,{split}" for name, (country, city, split) in zip(photos, rows, strict=True)]
    found = data.load(own(tmp_path, HEADER, *lines, photos=photos))
    assert {name: one.names for name, one in found.tests.items()} == {
        "seen": ("2.png", "6.png", "7.png"),
        "unseen_cities": ("3.png", "4.png"),
        "unseen_countries": ("5.png",),
    }
    assert levels(found.tests["unseen_cities"], clip) == [30, 40]


def test_csv_of_test_photos_only(tmp_path: Path) -> None:
    found = data.load(own(tmp_path, HEADER, "a.png,Italy,,,1,2,test", "b.png,Chad,,,1,2,test"))
    assert found.train is None
    assert {name: one.names for name, one in found.tests.items()} == {"all": ("a.png", "b.png")}


def test_csv_with_photos_elsewhere(tmp_path: Path, clip: Clip) -> None:
    """--data-dir is where the photos are; photos of any size and mode are brought to CLIP's."""
    (tmp_path / "table").mkdir()
    (tmp_path / "photos" / "x").mkdir(parents=True)
    Image.new("LA", (90, 50), (100, 255)).save(tmp_path / "photos" / "x" / "a.png")
    config = own(tmp_path / "table", "image,country", "x/a.png,Italy", photos=())
    with pytest.raises(UserError, match=r"line 2: no photo .*a\.png: mend the path, or give --data-dir"):
        data.load(config)
    found = data.load(replace(config, data_dir=str(tmp_path / "photos"))).train
    assert found is not None
    assert found.pixels([0], clip).shape == (1, 3, 32, 32)
    assert levels(found, clip) == [100]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("image", "a.png"), r"photos\.csv: no column 'country', only image"),
        (("country", "Italy"), r"photos\.csv: no column 'image', only country"),
        (("image,country",), r"photos\.csv: no row in it"),
        (("image,country,country", "a.png,Italy,Chad"), r"column 'country' is there twice"),
        (("image,country", "a.png,Italy", "x.png,Italy"), r"line 3: no photo .*x\.png"),
        (("image,country", "a.png,Italy", ",Italy"), r"line 3: no photo "),
        (("image,country", "a.png,Italy", "b.png, "), r"line 3: no country: fill it in"),
        (("image,country", "a.png,Italy", "b.png"), r"line 3: no country"),
        (("image,country", "a.png,Italy", "b.png,Korea, South"), r"cannot be read as a table"),
        (("image,country", "b.png,Korea, South", "a.png,Italy"), r"photos\.csv"),
        ((HEADER, "a.png,Italy,,,1,2,train", "b.png,Italy,,,1,2,val"), r"split is 'val': give train or test"),
        ((HEADER, "a.png,Italy,,,1,2,train", "b.png,Italy,,,1,2,"), r"split is '': give train or test"),
        ((HEADER, "a.png,Italy,,,1,2,train", "b.png,Italy,,,,,test"), r"line 3: a test photo without coordinates"),
        ((HEADER, "a.png,Italy,,,1,2,train", "b.png,Italy,,,,2,train"), r"line 3: latitude or longitude alone"),
        (("image,country,split", "a.png,Italy,test"), r"line 2: a test photo without coordinates"),
        ((HEADER, "a.png,Italy,,,,,train", "b.png,Italy,,,1,x,train"), r"line 3: longitude is 'x': give degrees"),
        ((HEADER, "a.png,Italy,,,nan,2,train"), r"line 2: latitude is 'nan': give degrees"),
        ((HEADER, "a.png,Italy,,,,,train", "b.png,Italy,,,inf,2,train"), r"line 3: coordinates inf, 2\.0 are not fin"),
        ((HEADER, "a.png,Italy,,,,,train", "b.png,Italy,,,95,120,train"), r"line 3: .*out of range: give -90 to 90"),
        ((HEADER, "a.png,Italy,,,,,train", "b.png,Italy,,,1,181,train"), r"line 3: .*out of range"),
        ((HEADER, "a.png,Italy,,,,,train", "b.png,Italy,,,151.2,-33.9,test"), r"line 3: .*swapped\?"),
    ],
)
def test_csv_refused(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    config = own(tmp_path, *lines)
    with pytest.raises(UserError, match=message):
        data.load(config)


def test_csv_missing_or_no_text(tmp_path: Path) -> None:
    config = own(tmp_path, "image,country", "a.png,Italy")
    with pytest.raises(UserError, match=r"none\.csv: cannot be read as a table \(No such file"):
        data.load(replace(config, dataset=str(tmp_path / "none.csv")))
    Path(config.dataset).write_bytes("image,country\na.png,Côte d'Ivoire\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"photos\.csv: cannot be read as a table .*UTF-8"):
        data.load(config)
    with pytest.raises(UserError, match=r"a\.png: cannot be read as a table"):
        data.load(replace(config, dataset=str(tmp_path / "a.png")))


def test_csv_photo_that_is_broken(tmp_path: Path, clip: Clip) -> None:
    """Named when it is read."""
    found = data.load(own(tmp_path, "image,country", "a.png,Italy", "b.png,Italy")).train
    assert found is not None
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    assert found.pixels([0], clip).shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match=r"b\.png: .*leave it out"):
        found.pixels([0, 1], clip)


# ---- a hub data set


def hub(**splits: dict[str, list[Any]]) -> Any:
    """A DatasetDict in memory; a column image holds Pillow's images."""
    import datasets

    return datasets.DatasetDict({
        name: datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        if "image" in columns else datasets.Dataset.from_dict(columns)
        for name, columns in splits.items()
    })  # fmt: skip


@pytest.fixture
def from_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], data.Data]:
    """Loads a DatasetDict, or what raises, as if it were on the hub."""
    import datasets

    config = replace(own(tmp_path, "image,country", photos=()), dataset="hub:who/what")

    def load(held: Any) -> data.Data:
        def load_dataset(name: str) -> Any:
            assert name == "who/what"
            if isinstance(held, Exception):
                raise held
            return held

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return data.load(config)

    return load


def greys(*values: int, mode: str = "RGB") -> list[Image.Image]:
    return [Image.new("RGB", (40, 40), (value,) * 3).convert(mode) for value in values]


def test_hub(from_hub: Callable[[Any], data.Data], clip: Clip) -> None:
    """Splits train and test, others are left; images of any mode; None is not known."""
    held = hub(
        train={
            "image": greys(10, 20), "country": ["Italy", "Chad"], "city": ["Rome", None],
            "latitude": [41.9, None], "longitude": [12.5, None],
        },
        test={
            "image": greys(30, 40, 50, mode="RGBA"), "country": ["Italy", "Italy", "Peru"],
            "city": ["Rome", "Milan", "Lima"], "latitude": [41.9, 45.5, -12.0], "longitude": [12.5, 9.2, -77.0],
        },
        validation={"image": greys(60), "country": ["Italy"]},
    )  # fmt: skip
    found = from_hub(held)
    assert found.train is not None
    assert found.train.country == ("Italy", "Chad")
    assert found.train.city == ("Rome", "")
    assert found.train.names == ("train-0", "train-1")
    assert found.train.latitude == pytest.approx([41.9, np.nan], nan_ok=True)
    assert levels(found.train, clip) == [10, 20]
    assert {name: levels(one, clip) for name, one in found.tests.items()} == {
        "seen": [30], "unseen_cities": [40], "unseen_countries": [50],
    }  # fmt: skip
    assert found.tests["unseen_countries"].latitude.tolist() == [-12.0]
    assert found.tests["unseen_countries"].longitude.tolist() == [-77.0]


def test_hub_splits_of_different_columns(from_hub: Callable[[Any], data.Data]) -> None:
    """Training photos need neither cities nor coordinates, though test photos have them."""
    train: dict[str, list[Any]] = {"image": greys(10), "country": ["Italy"]}
    more: dict[str, list[Any]] = {"city": ["Rome"], "latitude": [41.9], "longitude": [12.5]}
    found = from_hub(hub(train=train, test=train | more))
    assert found.train is not None
    assert found.train.city == ("",)
    assert np.isnan(found.train.latitude).all()
    assert found.tests["unseen_cities"].latitude.tolist() == [41.9]


def test_hub_of_training_photos(from_hub: Callable[[Any], data.Data]) -> None:
    found = from_hub(hub(train={"image": greys(10), "country": ["Italy"]}))
    assert found.tests == {}
    assert found.train is not None
    assert len(found.train) == 1


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"image": greys(1), "label": [0]}}, "hub data set who/what: no column 'country'"),
        ({"train": {"photo": ["a.png"], "country": ["Italy"]}}, "hub data set who/what: no column 'image'"),
        ({"validation": {"image": greys(1), "country": ["Italy"]}}, "no split train or test, only validation"),
        ({"train": {"image": greys(1, 2), "country": ["Italy", None]}}, "no country: fill it in"),
        ({"test": {"image": greys(1), "country": ["Italy"]}}, "a test photo without coordinates"),
        (
            {"train": {"image": greys(1), "country": ["Italy"], "latitude": [100.0], "longitude": [170.0]}},
            "out of range: give",
        ),
    ],
)
def test_hub_refused(
    from_hub: Callable[[Any], data.Data], splits: dict[str, dict[str, list[Any]]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        from_hub(hub(**splits))


@pytest.mark.parametrize("error", [FileNotFoundError("no network"), ValueError("no network"), OSError("no network")])
def test_hub_that_does_not_answer(from_hub: Callable[[Any], data.Data], error: Exception) -> None:
    with pytest.raises(UserError, match=r"cannot load 'who/what' from the hub \(no network\): give another id"):
        from_hub(error)


def test_hub_that_is_damaged(from_hub: Callable[[Any], data.Data]) -> None:
    import datasets

    with pytest.raises(UserError, match="cannot load 'who/what' from the hub"):
        from_hub(datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"))


def test_hub_class_labels(from_hub: Callable[[Any], data.Data]) -> None:
    """A label is its name, not its number; -1 is not known."""
    import datasets

    held = hub(train={"image": greys(10, 20), "country": [1, 0], "city": [-1, 0]})["train"]
    held = held.cast_column("country", datasets.ClassLabel(names=["Italy", "Chad"]))
    held = held.cast_column("city", datasets.ClassLabel(names=["Rome"]))
    found = from_hub(datasets.DatasetDict({"train": held})).train
    assert found is not None
    assert found.country == ("Chad", "Italy")
    assert found.city == ("", "Rome")


def test_hub_row_without_image(from_hub: Callable[[Any], data.Data], clip: Clip) -> None:
    found = from_hub(hub(train={"image": [*greys(10), None], "country": ["Italy", "Chad"]})).train
    assert found is not None
    assert found.pixels([0], clip).shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match=r"train-1: .*no image"):
        found.pixels([0, 1], clip)


def test_hub_column_without_images(from_hub: Callable[[Any], data.Data], clip: Clip) -> None:
    """A column image of file names, or bytes that are no image: one line, when it is read at the latest."""
    import datasets

    texts = datasets.Dataset.from_dict({"image": ["a.png"], "country": ["Italy"]})
    broken = datasets.Dataset.from_dict({"image": [{"bytes": b"none", "path": None}], "country": ["Italy"]})
    for held in (texts, broken.cast_column("image", datasets.Image())):
        with pytest.raises(UserError, match="image"):  # noqa: PT012
            photos = from_hub(datasets.DatasetDict({"train": held})).train
            assert photos is not None
            photos.pixels([0], clip)


# ---- coordinates, IM2GPS


def test_read_coordinates(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "longitude,filename,latitude", "-180,a.jpg,90", "12.5,b.jpg,-41.9")
    names, latitude, longitude = coordinates.read_coordinates(str(path))
    assert names == ("a.jpg", "b.jpg")
    assert (latitude.tolist(), longitude.tolist()) == ([90, -41.9], [-180, 12.5])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("filename,latitude", "a.jpg,1"), "no column 'longitude', only filename, latitude"),
        (("filename,latitude,longitude",), "no row in it"),
        (("filename,latitude,longitude", "a.jpg,1,2", "b.jpg,1,2", "a.jpg,1,2"), r"a\.jpg is there twice"),
        (("filename,latitude,longitude", "a.jpg,1,2", "b.jpg,,2"), "line 3: latitude is '': give degrees"),
        (("filename,latitude,longitude", "a.jpg,1,2", "b.jpg,1,NaN"), "line 3: longitude is 'NaN'"),
        (("filename,latitude,longitude", "a.jpg,1,2", "b.jpg,1,east"), "line 3: longitude is 'east'"),
        (("filename,latitude,longitude", "a.jpg,1,2", "b.jpg,inf,2"), "line 3: coordinates inf, 2.0 are not finite"),
        (("filename,latitude,longitude", "a.jpg,1,2", "b.jpg,-90.1,120"), "line 3: .*give -90 to 90"),
        (("filename,latitude,longitude", "a.jpg,1,2", "b.jpg,139.7,35.7"), r"line 3: .*swapped\?"),
    ],
)
def test_read_coordinates_refuses(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    path = written(tmp_path / "a.csv", *lines)
    with pytest.raises(UserError, match=rf"a\.csv.*{message}"):
        coordinates.read_coordinates(str(path))


def test_im2gps_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says which file was wanted and how to give it."""
    monkeypatch.delenv("METAZOO_DATA", raising=False)
    with pytest.raises(UserError, match=r"img2gps_dataset_237\.csv not found: set METAZOO_DATA"):
        coordinates.read_coordinates("im2gps", str(tmp_path))


@REAL
@pytest.mark.parametrize(("name", "count"), [("im2gps", 237), ("im2gps3k", 2997)])
def test_im2gps_counts(name: str, count: int) -> None:
    names, latitude, longitude = coordinates.read_coordinates(name)
    assert len(names) == len(set(names)) == len(latitude) == len(longitude) == count
    # in both hemispheres: neither sign nor order of the two is lost
    assert np.abs(latitude).max() <= 90 < np.abs(longitude).max()
    assert latitude.min() < -20
    assert longitude.min() < -100 < 100 < longitude.max()


@REAL
def test_im2gps_photos(tmp_path: Path) -> None:
    """Each name's file is looked for below --data-dir; what is missing is counted."""
    names, latitude, _ = coordinates.read_coordinates("im2gps")
    places = written(tmp_path / "places.csv", "city,country,latitude,longitude", "Rome,Italy,41.9,12.5")
    config = Config(dataset="im2gps", method="clip", gazetteer=str(places), generic_steps=0)
    with pytest.raises(UserError, match="--dataset im2gps: give the folder of its photos with --data-dir"):
        data.load(config)
    config = replace(config, data_dir=str(tmp_path))
    (tmp_path / "deep").mkdir()
    for name in names[1:]:
        (tmp_path / "deep" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"is missing \(1 of 237 photos\): fetch them"):
        data.load(config)
    (tmp_path / names[0]).write_bytes(b"x")
    found = data.load(config)
    assert found.train is None
    photos = found.tests["all"]
    assert photos.names == names
    assert photos.sources is not None
    assert [path.name for path in photos.sources] == list(names)
    assert np.array_equal(photos.latitude, latitude)


# ---- order


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 45), st.integers(0, 3))
def test_batches_cover_each_epoch_once(count: int, size: int, seed: int) -> None:
    """One after another, batches are permutations of all photos, however sizes fall."""
    steps = -(-3 * count // size)
    order = np.concatenate([data.batch_of(count, size, step, seed, 0) for step in range(steps)])
    assert len(order) == steps * size
    for start in range(0, 3 * count, count):
        assert sorted(order[start : start + count].tolist()) == list(range(count))


def test_batch_is_a_function_of_its_step() -> None:
    """Going on at any step gives the order of never having stopped; epochs, seeds and phases differ."""
    forth = [data.batch_of(50, 16, step, 0, 0).tolist() for step in range(10)]
    back = [data.batch_of(50, 16, step, 0, 0).tolist() for step in reversed(range(10))]
    assert forth == back[::-1]
    first = data.batch_of(50, 50, 0, 0, 0).tolist()
    assert first != list(range(50))
    for other in (
        data.batch_of(50, 50, 1, 0, 0), data.batch_of(50, 50, 0, 1, 0), data.batch_of(50, 50, 0, 0, 1),
    ):  # fmt: skip
        assert other.tolist() != first
