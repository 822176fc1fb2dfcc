"""`streetclip predict`: photos of a folder to a table, JSON and a map; `streetclip score` on what it wrote."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from metazoo.errors import UserError
from PIL import Image
from streetclip import predict as module
from streetclip.config import Config, PredictOptions, ScoreOptions
from streetclip.coordinates import score_predictions
from streetclip.geolocator import HierarchicalZeroShotGeolocator
from streetclip.metrics import haversine_km
from streetclip.model import load_model
from streetclip.predict import predict

torch.set_num_threads(1)
HARMFUL = "<b>x&'.png"
# (country, city, latitude, longitude, population); the apostrophe is GeoNames' own
PLACES = [
    ("Bado", "N'Lofi", 10.5, 20.25, 90),
    ("Bado", "Rasa", 11.0, 21.0, 50),
    ("Mipu", "Rasa", -30.0, 100.0, 10),
    ("Mipu", "Tevo & <Kudo>", -31.0, -100.0, 9),
    ("Mipu", "Zeki", -32.0, 120.0, 8),
]
EXIF = {"rgb.jpg": (52.5, -13.25), HARMFUL: (0.0, 0.0)}


def photo(mode: str, seed: int) -> Image.Image:
    """Noise of some size in a mode."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (40, 300 if seed % 2 else 30, 4), dtype=np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16))
    return colours if mode == "RGBA" else colours.convert("RGB").convert(mode)


def exif(latitude: float, longitude: float) -> Image.Exif:
    """As a camera writes it: degrees, minutes and seconds."""

    def parts(value: float) -> tuple[float, float, float]:
        return float(int(value)), float(int(value % 1 * 60)), value * 60 % 1 * 60

    held = Image.Exif()
    held[0x8825] = {
        1: "S" if latitude < 0 else "N", 2: parts(abs(latitude)), 3: "W" if longitude < 0 else "E",
        4: parts(abs(longitude)),
    }  # fmt: skip
    return held


def write_photos(folder: Path) -> list[str]:
    """Photos of several modes and suffixes, two with coordinates, one in a folder below; their names, sorted."""
    (folder / "below").mkdir(parents=True)
    modes = {
        "grey.png": "L", "palette.gif": "P", "clear.png": "RGBA", "print.JPEG": "CMYK", "deep.png": "I;16",
        "bits.bmp": "1", "rgb.jpg": "RGB", HARMFUL: "RGB", "below/last.webp": "RGB",
    }  # fmt: skip
    for seed, (name, mode) in enumerate(modes.items()):
        place: dict[str, Any] = {"exif": exif(*EXIF[name])} if name in EXIF else {}
        photo(mode, seed).save(folder / name, **place)
    (folder / "notes.txt").write_text("no photo")
    return [path.name for path in sorted(folder / name for name in modes)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, gazetteer.csv, photos/, and predictions of these in found/."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    clip = load_model(Config(width=16, heads=2, vision_layers=1, text_layers=1, projection=8))
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    clip.save_pretrained(folder / "model")
    table = pd.DataFrame(PLACES, columns=["country", "city", "latitude", "longitude", "population"])
    table.to_csv(folder / "gazetteer.csv", index=False)
    write_photos(folder / "photos")
    predict(options(folder))
    return folder


def options(made: Path, **changes: Any) -> PredictOptions:
    fields: dict[str, Any] = {
        "photos": (made / "photos",), "model": str(made / "model"), "gazetteer": str(made / "gazetteer.csv"),
        "output_dir": made / "found", "mode": "soft", "batch_size": 4,
    }  # fmt: skip
    return PredictOptions(**fields | changes)


def names_of(made: Path) -> list[str]:
    return [path.name for path in sorted((made / "photos").rglob("*")) if path.is_file() and path.suffix != ".txt"]


def table_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "predictions.csv", keep_default_na=False)


def columns_of(page: str) -> dict[str, list[Any]]:
    """What the map's hover tool shows, by column, of the JSON that the page gives to Bokeh."""
    (text,) = re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', page, flags=re.DOTALL)
    found: list[dict[str, list[Any]]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("type") == "map" and any(entry[0] == "thumbnail" for entry in value["entries"]):
                found.append(dict(value["entries"]))
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)

    walk(json.loads(html.unescape(text)))
    (columns,) = found
    return columns


# ---- what is written


def test_table(made: Path) -> None:
    """A row a photo, in order, with what the library finds for the same files."""
    table = table_of(made / "found")
    assert table["filename"].tolist() == names_of(made)
    assert len(table) == 9
    asked = options(made)
    locator = HierarchicalZeroShotGeolocator.from_pretrained(
        asked.model, module.Gazetteer.load(asked.gazetteer), mode="soft", device="cpu"
    )
    paths = [path for path in sorted((made / "photos").rglob("*")) if path.is_file() and path.suffix != ".txt"]
    for row, one in zip(table.to_dict("records"), locator.predict(paths), strict=True):
        assert (row["country"], row["city"]) == (one.country, one.city)
        assert (row["latitude"], row["longitude"]) == (one.latitude, one.longitude)
        assert row["probability"] == pytest.approx(one.probability, rel=1e-4)
        assert row["country_probability"] == pytest.approx(one.country_probability, rel=1e-4)
        for i, place in enumerate(one.places, 1):
            assert row[f"place_{i}"] == f"{place.city}, {place.country}"
            assert (row[f"latitude_{i}"], row[f"longitude_{i}"]) == (place.latitude, place.longitude)
            assert row[f"probability_{i}"] == pytest.approx(place.probability, rel=1e-4)
    assert table["city"].nunique() > 1
    assert sorted(path.name for path in (made / "found").iterdir()) == sorted(module.OUTPUTS)


def test_exif_errors(made: Path) -> None:
    """Coordinates of the camera, west and south too, and kilometres to what was found; empty for the others."""
    table = table_of(made / "found").set_index("filename")
    for name, row in table.iterrows():
        if name not in EXIF:
            assert (row["exif_latitude"], row["exif_longitude"], row["exif_error_km"]) == ("", "", "")
            continue
        latitude, longitude = float(row["exif_latitude"]), float(row["exif_longitude"])
        assert (latitude, longitude) == pytest.approx(EXIF[str(name)], abs=1e-6)
        wanted = haversine_km(latitude, longitude, float(row["latitude"]), float(row["longitude"]))
        assert float(row["exif_error_km"]) == pytest.approx(float(wanted))


def test_summary(made: Path, tmp_path: Path) -> None:
    """Numbers of photos, and the median error of those with coordinates."""
    found = predict(options(made, output_dir=tmp_path / "new" / "out"))
    errors = [float(value) for value in table_of(tmp_path / "new" / "out")["exif_error_km"] if value != ""]
    assert len(errors) == 2
    assert found == {
        "photos": 9, "skipped": 0, "output_dir": str(tmp_path / "new" / "out"), "photos_with_exif": 2,
        "median_error_km_of_exif": pytest.approx(sum(errors) / 2),
    }  # fmt: skip
    without = predict(options(made, photos=(made / "photos" / "grey.png",), output_dir=tmp_path / "one", map=False))
    assert without == {"photos": 1, "skipped": 0, "output_dir": str(tmp_path / "one")}
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["predictions.csv", "predictions.json"]


def test_json(made: Path) -> None:
    """Strict JSON, the same as the table."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    listed = json.loads((made / "found" / "predictions.json").read_text(encoding="utf-8"), parse_constant=refuse)
    table = table_of(made / "found").to_dict("records")
    for one, row in zip(listed, table, strict=True):
        for name in ("filename", "country", "city", "latitude", "longitude", "probability", "country_probability"):
            assert one[name] == (pytest.approx(row[name], rel=1e-12) if isinstance(row[name], float) else row[name])
        assert [f"{place['city']}, {place['country']}" for place in one["places"]] == [
            row[f"place_{i}"] for i in range(1, 6)
        ]
        assert sum(country["probability"] for country in one["countries"]) == pytest.approx(1, rel=1e-5)
        if one["filename"] in EXIF:
            assert (one["exif"]["latitude"], one["exif"]["longitude"]) == pytest.approx(EXIF[one["filename"]], abs=1e-6)
        else:
            assert one["exif"] is None


def test_fewer_places_than_asked(made: Path, tmp_path: Path) -> None:
    """Of the country that was chosen there are two cities or three: further columns are empty."""
    predict(options(made, mode="hierarchical", top_k=4, output_dir=tmp_path, map=False))
    cities = {"Bado": 2, "Mipu": 3}
    table = table_of(tmp_path)
    for row in table.to_dict("records"):
        held = [row.get(f"place_{i}", "") for i in range(1, 5)]
        assert [bool(one) for one in held] == [i < cities[row["country"]] for i in range(4)]
    assert table["country"].nunique() == 2


# ---- the map


def test_map_needs_no_network(made: Path) -> None:
    """Nothing in the page is fetched from elsewhere: scripts are inline, images data URIs."""
    page = (made / "found" / "map.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script\b([^>]*)>", page)
    assert len(scripts) >= 3
    assert not [one for one in scripts if "src" in one]
    # what is in the scripts is text; outside them no element names a resource
    bare = re.sub(r"<script\b[^>]*>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"<(?:link|img|iframe|object|embed|base|source|video|audio)\b", bare)
    assert not re.findall(r"\b(?:src|href)\s*=", bare)
    assert not re.findall(r"https?://", bare)
    assert not re.findall(r"""url\(\s*\\?["']?\s*(?:https?:)?//""", page)
    assert "@import" not in bare


def test_map_escapes_names(made: Path) -> None:
    """Every file name is there, none as HTML of its own; nor are cities."""
    page = (made / "found" / "map.html").read_text(encoding="utf-8")
    columns = columns_of(page)
    assert [html.unescape(name) for name in columns["name"]] == names_of(made)
    assert "<b>x" not in page
    assert "<Kudo>" not in page
    cities = table_of(made / "found")["city"].tolist()
    assert [html.unescape(city) for city in columns["city"]] == cities
    assert "Tevo & <Kudo>" in html.unescape("".join(columns["others"]))


def test_map_points(made: Path) -> None:
    """Points are where photos were found, with probabilities and thumbnails of the photos."""
    columns = columns_of((made / "found" / "map.html").read_text(encoding="utf-8"))
    table = table_of(made / "found")
    for column, name in (("x", "longitude"), ("y", "latitude"), ("probability", "probability")):
        assert columns[column] == pytest.approx(table[name].tolist(), rel=1e-12)
    assert np.argsort(columns["size"]).tolist() == np.argsort(table["country_probability"]).tolist()
    for name, uri in zip(names_of(made), columns["thumbnail"], strict=True):
        head, _, data = uri.partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as small:
            assert max(small.size) <= 160
            path = next((made / "photos").rglob(name))
            with Image.open(path) as whole:
                ratio = whole.size[0] / whole.size[1]
            assert small.size[0] / small.size[1] == pytest.approx(ratio, rel=0.1)


@pytest.fixture
def browser_page() -> Iterator[Any]:
    """A page of headless Chromium without a network."""
    sync_api = pytest.importorskip("playwright.sync_api")
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as started:
        if installed is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("no Chromium: install it, or run `playwright install chromium`")
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = started.chromium.launch(executable_path=installed, args=flags)
        context = browser.new_context(viewport={"width": 1000, "height": 700}, accept_downloads=False)
        context.set_offline(True)
        yield context.new_page()
        browser.close()


def shot_of(page: Any) -> np.ndarray:
    """Pixels [H, W, 3] of what is shown."""
    with Image.open(io.BytesIO(page.screenshot())) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.browser
def test_map_in_a_browser(made: Path, browser_page: Any) -> None:
    """It draws without a network: orange points on a canvas, no error; at a point its photo's name as it is."""
    said: list[str] = []
    asked: list[str] = []
    browser_page.on("console", lambda one: said.append(one.text) if one.type in ("error", "warning") else None)
    browser_page.on("pageerror", lambda error: said.append(str(error)))
    browser_page.on("request", lambda request: asked.append(request.url))
    browser_page.goto((made / "found" / "map.html").as_uri())
    browser_page.wait_for_selector("canvas", state="attached")
    orange: Any = ()
    for _ in range(50):
        browser_page.wait_for_timeout(100)
        picture = shot_of(browser_page)
        orange = np.argwhere(np.abs(picture - np.array([222, 115, 41])).max(-1) < 40)
        if len(orange):
            break
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    canvases = browser_page.locator("canvas").evaluate_all(
        "all => all.filter(one => one.width * one.height > 0).length"
    )
    assert canvases > 0
    assert len(orange) > 20
    # over the points: the tooltip's text
    shown = ""
    for y, x in orange[:: max(1, len(orange) // 40)].tolist():
        browser_page.mouse.move(x, y)
        browser_page.wait_for_timeout(50)
        shown += browser_page.evaluate(
            """() => {
                const texts = [];
                const walk = node => {
                    if (node.shadowRoot) walk(node.shadowRoot);
                    if (node.classList?.contains("bk-Tooltip")) texts.push(node.shadowRoot.textContent);
                    for (const child of node.children || []) walk(child);
                };
                walk(document.documentElement);
                return texts.join(" ");
            }"""
        )
    assert any(name in shown for name in names_of(made))
    assert HARMFUL in shown  # neither as bold text nor with &lt;
    assert "&amp;" not in shown
    assert "&#x27;" not in shown
    assert said == []


# ---- refusals


def test_does_not_overwrite(made: Path, tmp_path: Path) -> None:
    """Any of the three files that is there; with overwrite they are new, and none of an earlier call is left."""
    one = options(made, output_dir=tmp_path, photos=(made / "photos" / "grey.png",))
    for name in module.OUTPUTS:
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{re.escape(name)} is there already: add --overwrite"):
            predict(one)
        assert (tmp_path / name).read_text() == "mine"
        assert len(list(tmp_path.iterdir())) == 1
        (tmp_path / name).unlink()
    for name in (*module.OUTPUTS, "other.txt"):
        (tmp_path / name).write_text("mine")
    predict(options(made, output_dir=tmp_path, photos=(made / "photos" / "grey.png",), overwrite=True, map=False))
    assert table_of(tmp_path)["filename"].tolist() == ["grey.png"]
    assert (tmp_path / "other.txt").read_text() == "mine"
    assert not (tmp_path / "map.html").exists()


@pytest.mark.parametrize("changes", [{"model": "/nowhere"}, {"gazetteer": "/nowhere.csv"}])
def test_wrong_input_overwrites_nothing(changes: dict[str, str], made: Path, tmp_path: Path) -> None:
    """What was found before stays until there is something new to write."""
    for name in module.OUTPUTS:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="nowhere"):
        predict(options(made, output_dir=tmp_path, overwrite=True, **changes))
    assert [(tmp_path / name).exists() for name in module.OUTPUTS] == [True] * 3


def test_bad_photo(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named and left out; it ends as an error, with the others' results, unless skip_bad says otherwise."""
    shutil.copytree(made / "photos", tmp_path / "photos")
    cut = tmp_path / "photos" / "cut.png"
    cut.write_bytes((made / "photos" / "grey.png").read_bytes()[:200])
    (tmp_path / "photos" / "text.jpg").write_text("no photo")
    out = tmp_path / "out"
    wanted = table_of(made / "found")
    before = columns_of((made / "found" / "map.html").read_text(encoding="utf-8"))
    for skip in (False, True):
        one = options(
            made, photos=(tmp_path / "photos",), output_dir=out, skip_bad=skip, batch_size=1 + skip, overwrite=True
        )
        if skip:
            found = predict(one)
            assert (found["photos"], found["skipped"]) == (9, 2)
        else:
            with pytest.raises(UserError) as caught:
                predict(one)
            said = str(caught.value)
            assert "2 of 11 photos" in said
            assert str(cut) in said
            assert "--skip-bad" in said
            assert "\n" not in said
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out ")]
        assert [name in line for name, line in zip(("cut.png", "text.jpg"), lines, strict=True)] == [True, True]
        table = table_of(out)  # the others are as they were
        assert table["filename"].tolist() == wanted["filename"].tolist()
        assert table["place_1"].tolist() == wanted["place_1"].tolist()
        assert columns_of((out / "map.html").read_text(encoding="utf-8"))["thumbnail"] == before["thumbnail"]


def test_only_bad_photos(made: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no photo")
    with pytest.raises(UserError, match="none of 1 photos could be read"):
        predict(options(made, photos=(tmp_path / "a.png",), output_dir=tmp_path / "out", skip_bad=True))
    assert not list((tmp_path / "out").rglob("*"))


def test_same_file_names(made: Path, tmp_path: Path) -> None:
    """With their folders, so that rows can be told apart; a photo that is named twice is one."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(made / "photos" / "grey.png", tmp_path / folder / "one.png")
    photos = (tmp_path / "b", tmp_path / "a", tmp_path / "b" / "one.png")
    assert predict(options(made, photos=photos, output_dir=tmp_path / "out"))["photos"] == 2
    assert table_of(tmp_path / "out")["filename"].tolist() == [str(tmp_path / f / "one.png") for f in ("b", "a")]


def test_file_name_that_is_not_unicode(made: Path, tmp_path: Path) -> None:
    """It is found a place; its name is written as far as it can be."""
    try:
        shutil.copy(made / "photos" / "grey.png", tmp_path / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("the file system takes Unicode only")
    (tmp_path / os.fsdecode(b"cut\xe9.png")).write_text("no photo")
    assert predict(options(made, photos=(tmp_path,), output_dir=tmp_path / "out", skip_bad=True))["photos"] == 1
    (name,) = table_of(tmp_path / "out")["filename"]
    assert name.startswith("caf")
    assert json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))[0]["filename"] == name
    assert columns_of((tmp_path / "out" / "map.html").read_text(encoding="utf-8"))["name"] == [html.escape(name)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"photos": ("nowhere.png",)}, "nowhere.png: no such photo or folder"),
        ({"photos": ("empty",)}, "empty: no photo in it"),
        ({"model": "empty"}, "no config.json in it"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"gazetteer": "nowhere.csv"}, "nowhere.csv"),
        ({"gazetteer": "file"}, "no column 'city'"),
        ({"us_states": True}, "are for --gazetteer geonames"),
        ({"output_dir": "file"}, "file is a file: give a folder"),
        ({"output_dir": "file/below"}, "--output-dir file/below"),
        ({"cache_dir": "file"}, "--cache-dir"),
    ],
)
def test_refuses(
    changes: dict[str, Any], message: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line; nothing is written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a,b\n1,2\n")
    for name in ("photos", "output_dir", "cache_dir"):
        if name in changes:
            value = changes[name]
            changes = changes | {name: tuple(map(Path, value)) if isinstance(value, tuple) else Path(value)}
    with pytest.raises(UserError) as caught:
        predict(options(made, **{"output_dir": tmp_path / "out", **changes}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.rglob("*")} - {"out"} == {"empty", "file"}
    assert (tmp_path / "file").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"photos": ()}, "no photos: give"),
        ({"top_k": 0}, "--top-k is 0: give 1 or more"),
        ({"cities": 0}, "--cities is 0: give 1 or more"),
        ({"batch_size": 0}, "--batch-size is 0: give 1 or more"),
        ({"country_template": "{city}"}, "--country-template '{city}': {country} is missing"),
        ({"city_template": "{town}"}, "{town} is none of"),
        ({"ensemble": ("{country}", "none")}, "--ensemble 'none'"),
    ],
)
def test_wrong_options(changes: dict[str, Any], message: str, made: Path) -> None:
    with pytest.raises(UserError) as caught:
        options(made, **changes)
    assert message in str(caught.value)


def test_cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call encodes no caption and writes the same."""
    predict(options(made, output_dir=tmp_path / "one", cache_dir=tmp_path / "cache", map=False))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a caption is encoded")

    monkeypatch.setattr("streetclip.model.Clip.features_of_texts", refuse)
    predict(options(made, output_dir=tmp_path / "two", cache_dir=tmp_path / "cache", map=False))
    for name in ("predictions.csv", "predictions.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ---- scores of what was written


def coordinates(folder: Path, rows: list[tuple[Any, ...]], columns: str = "filename,latitude,longitude") -> Path:
    pd.DataFrame(rows, columns=columns.split(",")).to_csv(folder / "coords.csv", index=False)
    return folder / "coords.csv"


def test_score(made: Path, tmp_path: Path) -> None:
    """True places some way north of what was found, in another order: kilometres by hand."""
    table = table_of(made / "found")
    north = np.array([0, 0, 0.1, 0.1, 1, 1, 5, 20, 40])  # degrees of 111.195 km
    rows = list(zip(table["filename"], table["latitude"] + north, table["longitude"], strict=True))
    coords = coordinates(tmp_path, rows[::-1])
    found = score_predictions(
        ScoreOptions(predictions=made / "found" / "predictions.csv", coords=str(coords), output_dir=tmp_path / "plot")
    )
    shares = {"within_1": 2, "within_25": 4, "within_200": 6, "within_750": 7, "within_2500": 8}
    assert found == {
        **{name: pytest.approx(100 * count / 9) for name, count in shares.items()},
        "median_km": pytest.approx(111.195, abs=1e-3), "photos": 9.0,
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "plot").iterdir()] == ["errors.png"]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a.png", 1, 2), ("b.png", 3, 4), ("c.png", 0, 0)], None, "c.png of .* is missing (1 of 3)"),
        ([("a.png", 1, 2)], None, "no coordinates of b.png (1 predictions without)"),
        ([("a.png", 1, 2), ("b.png", float("nan"), 4)], None, "line 3: latitude is ''"),
        ([("a.png", 1, 2), ("b.png", 3, "nan")], None, "line 3: longitude is 'nan'"),
        ([("a.png", 1, 2), ("b.png", 3, "inf")], None, "line 3: coordinates 3.0, inf are not finite"),
        ([("a.png", 1, 2), ("b.png", "north", 4)], None, "line 3: latitude is 'north'"),
        ([("a.png", 1, 2), ("b.png", 100, 4)], None, "line 3: .* swapped"),
        ([("a.png", 1, 2), ("b.png", 3, 181)], None, "line 3: .* out of range"),
        ([("a.png", 1, 2), ("a.png", 1, 2)], None, "a.png is there twice"),
        ([("a.png", 1, 2), ("b.png", 3, 4)], "filename,lat,longitude", "no column 'latitude'"),
        ([("a.png", 1, 2), ("b.png", 3, 4)], "photo,latitude,longitude", "no column 'filename'"),
        ([], None, "no row in it"),
    ],
)
@pytest.mark.parametrize("wrong", ["coords", "predictions"])
def test_score_refuses(
    rows: list[tuple[Any, ...]], columns: str | None, message: str, wrong: str, tmp_path: Path
) -> None:
    """The file is named, and the line; it does not matter which of the two is wrong."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
    sound = coordinates(good, [("a.png", 1, 2), ("b.png", 3, 4)])
    unsound = coordinates(bad, rows, columns or "filename,latitude,longitude")
    true, found = (unsound, sound) if wrong == "coords" else (sound, unsound)
    if wrong == "predictions":  # what one lacks, the other has too much of
        swapped = {"c.png of": "no coordinates of c.png (1 predictions without)", "no coord": "b.png of .* is missing"}
        message = next((new for old, new in swapped.items() if message.startswith(old)), message)
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")) as caught:
        score_predictions(ScoreOptions(predictions=found, coords=str(true), output_dir=tmp_path / "plot"))
    assert str(unsound) in str(caught.value) or str(sound) in str(caught.value)
    assert not (tmp_path / "plot").exists()


def test_score_needs_files(tmp_path: Path) -> None:
    sound = coordinates(tmp_path, [("a.png", 1, 2)])
    with pytest.raises(UserError, match=r"none\.csv"):
        score_predictions(ScoreOptions(predictions=tmp_path / "none.csv", coords=str(sound)))
    with pytest.raises(UserError, match=r"none\.csv"):
        score_predictions(ScoreOptions(predictions=sound, coords=str(tmp_path / "none.csv")))
    with pytest.raises(UserError, match="no --coords"):
        ScoreOptions(predictions=sound)
