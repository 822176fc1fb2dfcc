"""Scores of photos by places found, worked by hand; what is refused; ceilings as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metazoo.errors import UserError
from streetclip import coordinates, data, evaluate, plots, train
from streetclip.baselines import LabelHead
from streetclip.config import Config, EvaluateOptions, OracleOptions
from streetclip.data import Photos
from streetclip.gazetteer import Gazetteer
from streetclip.geolocator import HierarchicalZeroShotGeolocator
from torch import Tensor

torch.set_num_threads(1)
# two countries of two cities, 3 degrees of longitude apart on the equator; 90 degrees between countries
PLACES = Gazetteer(
    countries=("Ada", "Ebe"), cities=("Aro", "Awi", "Ero", "Ewi"), country=np.array([0, 0, 1, 1]),
    latitude=np.zeros(4), longitude=np.array([0.0, 3.0, 90.0, 93.0]), population=np.array([9.0, 5.0, 9.0, 5.0]),
)  # fmt: skip


class Fake:
    """A CLIP whose space has an axis for each name."""

    axes = ("Ada", "Ebe", "Aro", "Awi", "Ero", "Ewi")
    device = torch.device("cpu")
    log_scale = torch.tensor(3.0)

    def eval(self) -> Fake:
        return self

    def features_of_texts(self, captions: list[str], batch_size: int = 256) -> Tensor:
        return torch.tensor([[float(name in caption) for name in self.axes] for caption in captions])


def photos(*labels: tuple[str, str], longitude: tuple[float, ...]) -> Photos:
    """Of (country, city), on the equator."""
    countries, cities = zip(*labels, strict=True)
    names = tuple(f"{i}.png" for i in range(len(labels)))
    return Photos(names, cities, ("",) * len(labels), countries, np.zeros(len(labels)), np.array(longitude))


def shown(*names: tuple[str, ...]) -> Tensor:
    """Features of photos that show these names."""
    rows = torch.tensor([[float(axis in of) for axis in Fake.axes] for of in names])
    return torch.nn.functional.normalize(rows, dim=-1)


def locator(**options: Any) -> HierarchicalZeroShotGeolocator:
    return HierarchicalZeroShotGeolocator(Fake(), PLACES, **options)  # type: ignore[arg-type]


def test_score_by_hand() -> None:
    held = photos(
        ("Ada", "Aro"), ("Ada", "Awi"), ("Ebe", "Ero"), ("Ebe", "Ewi"), longitude=(0.0, 3.1, 90.0, 93.0)
    )  # fmt: skip
    # right; right; the right country's other city; the other country, but of its own country's cities the right one
    features = shown(("Ada", "Aro"), ("Ada", "Awi"), ("Ebe", "Ewi"), ("Ada", "Ewi"))
    scored = evaluate.score(locator(), features, held)
    assert scored.summary["country_top1"] == 75
    assert scored.summary["city_top1"] == 50
    assert scored.summary["city_given_country"] == 75
    kilometres = [0, 0.1 * 111.195, 3 * 111.195, 93 * 111.195]
    np.testing.assert_allclose(scored.errors, kilometres, rtol=1e-4, atol=1e-6)
    assert [scored.summary[f"within_{radius}"] for radius in (1, 25, 200, 750, 2500)] == [25, 50, 50, 75, 75]
    assert scored.summary["median_km"] == pytest.approx((kilometres[1] + kilometres[2]) / 2, rel=1e-4)
    assert "labelled" not in scored.summary
    assert scored.found_country.tolist() == [0, 0, 1, 0]


def test_labels_that_the_gazetteer_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    """They are named and not counted; their distance is."""
    held = photos(("Ada", "Aro"), ("Uru", "Una"), longitude=(0.0, 50.0))
    scored = evaluate.score(locator(), shown(("Ada", "Aro"), ("Ada", "Awi")), held)
    assert scored.summary["labelled"] == 50
    assert scored.summary["country_top1"] == scored.summary["city_top1"] == 100
    assert scored.summary["within_750"] == 50
    assert "Uru" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of the photos' countries, as 'Una'"):
        evaluate.score(locator(), shown(("Ada",)), photos(("Una", ""), longitude=(0.0,)))


def test_coordinates_alone() -> None:
    """The true country is that of the nearest city; there is no city to be right about."""
    held = photos(("", ""), ("", ""), longitude=(1.0, 91.0))
    scored = evaluate.score(locator(), shown(("Ada", "Aro"), ("Ada", "Aro")), held)
    assert scored.country.tolist() == [0, 1]
    assert scored.summary["country_top1"] == 50
    assert "city_top1" not in scored.summary


def test_head_by_hand() -> None:
    known = photos(("Ada", "Aro"), ("Ada", "Awi"), ("Ebe", "Ero"), longitude=(0.0, 3.0, 90.0))
    head = LabelHead("city", known, PLACES, width=6, cells=2, seed=0)
    with torch.no_grad():
        head.linear.bias.zero_()
        axis = {name: i for i, name in enumerate(Fake.axes)}
        head.linear.weight.copy_(torch.eye(6)[[axis[city] for _, city in head.classes]])
    held = photos(("Ada", "Aro"), ("Ebe", "Ewi"), ("Ebe", "Ero"), longitude=(0.0, 93.0, 90.0))
    scored = evaluate.score_head(head, shown(("Aro",), ("Ero",), ("Awi",)), held, PLACES)
    assert scored.summary["city_top1"] == pytest.approx(100 / 3)
    assert scored.summary["country_top1"] == pytest.approx(200 / 3)
    np.testing.assert_allclose(scored.errors, [0, 3 * 111.195, 87 * 111.195], rtol=1e-4, atol=1e-6)
    # the country's probability is the sum of its cities'
    weights = torch.tensor([[20.0, 0.0, 0.0]]).softmax(-1)[0]
    assert scored.probability[0] == pytest.approx(float(weights[0] + weights[1]))


TINY = Config(
    images=40, test_images=6, width=8, heads=2, vision_layers=1, text_layers=1, projection=4, patch=16, batch=8,
    generic_steps=0, steps=1, warmup=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, train.Run]:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "training", lambda rows, path: None)
        return {
            method: train.train(replace(TINY, method=method), train.RunOptions(output_dir=folder / method))  # type: ignore[arg-type]
            for method in ("streetclip", "label-head")
        }


def test_whole_run(runs: dict[str, train.Run]) -> None:
    """Of a run and of its folder the same; groups are the world's."""
    run = runs["streetclip"]
    options = EvaluateOptions(plots=False, knn=3)
    found = evaluate.evaluate(run, options)
    assert found == evaluate.evaluate(run.folder, options)
    assert (run.folder / "evaluation.json").exists()
    for group in ("seen", "unseen_cities", "unseen_countries"):
        for kind in ("", "constant_", "knn_", "oracle_"):
            values = [found[f"{group}_{kind}within_{radius}"] for radius in (1, 25, 200, 750, 2500)]
            assert values == sorted(values)
        assert found[f"{group}_oracle_within_25"] == 100


def test_modes_differ_where_they_may(runs: dict[str, train.Run]) -> None:
    """Soft and flat look at all cities; the ceilings are those of any mode."""
    run = runs["streetclip"]
    found = {mode: evaluate.evaluate(run, EvaluateOptions(plots=False, mode=mode)) for mode in ("soft", "flat")}  # type: ignore[arg-type]
    assert found["soft"]["seen_oracle_median_km"] == found["flat"]["seen_oracle_median_km"]
    again = evaluate.evaluate(run, EvaluateOptions(plots=False, ensemble=("{country}.",)))
    assert again["seen_city_given_country"] == found["soft"]["seen_city_given_country"]


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("streetclip", {"us_states": True}, "not for the generated world"),
        ("streetclip", {"countries": "paper"}, "not for the generated world"),
        ("label-head", {"mode": "flat"}, "a label head is asked by no caption"),
        ("label-head", {"ensemble": ("{country}",)}, "a label head is asked by no caption"),
    ],
)
def test_refused(runs: dict[str, train.Run], method: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        evaluate.evaluate(runs[method], EvaluateOptions(plots=False, **options))


def test_no_test_photos(runs: dict[str, train.Run]) -> None:
    run = runs["streetclip"]
    with pytest.raises(UserError, match="no test photos"):
        evaluate.evaluate(replace(run, data=data.Data(run.data.train, {}, run.data.gazetteer)))


def test_oracle_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """London, Paris, and a place 30 km from the nearest large city, worked from GeoNames' own coordinates."""
    places = Gazetteer.geonames()
    london, paris = (places.find(*pair) for pair in (("United Kingdom", "London"), ("France", "Paris")))
    rows = [f"{i}.jpg,{places.latitude[i]},{places.longitude[i]}" for i in (london, paris) if i is not None]
    (tmp_path / "truth.csv").write_text("\n".join(["filename,latitude,longitude", *rows]) + "\n")
    said = coordinates.oracle(OracleOptions(coords=str(tmp_path / "truth.csv"), cities=(1, 0)))
    lines = {line[:34].strip(): line[34:].split() for line in said.splitlines()[2:]}
    assert lines["true country, best of 1 cities"][-5:] == ["100.0"] * 5
    assert lines["always London"][-5:] == ["50.0", "50.0", "50.0", "100.0", "100.0"]
    assert "published" not in said
