"""The command line, as a user calls it: each sub-command once, wrong input in one line."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from metazoo.cli import run
from streetclip.cli import COMMANDS

torch.set_num_threads(1)

SMALL = [
    "--images", "40", "--test-images", "8", "--width", "8", "--heads", "2", "--vision-layers", "1",
    "--text-layers", "1", "--projection", "4", "--patch", "16", "--batch", "8", "--generic-steps", "1",
    "--generic-batch", "8",    "--steps", "1", "--warmup", "0",
]  # fmt: skip


class Said(NamedTuple):
    """What a call left: exit status, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def streetclip(*arguments: object, cwd: Path) -> Said:
    """The console script, in this process: torch and transformers take longer to load than all of this."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):  # fmt: skip
        run("streetclip", COMMANDS, [str(one) for one in arguments])
    return Said(int(left.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world as files, and a run of the small preset made smaller."""
    root = tmp_path_factory.mktemp("cli")
    found = streetclip(
        "make-world", "--output-dir", "world", "--images", "30", "--test-images", "4", "--seed", "2", cwd=root
    )
    assert found.returncode == 0, found.stderr
    assert "42 photos of 24 countries" in found.stdout
    found = streetclip("train", "small", *SMALL, "--output-dir", "run", cwd=root)
    assert found.returncode == 0, found.stderr
    return root


def test_run_folder(folder: Path) -> None:
    assert {path.name for path in (folder / "run").iterdir()} >= {
        "config.json", "environment.json", "metrics.jsonl", "checkpoints", "model", "training.png"
    }  # fmt: skip


def test_evaluate(folder: Path) -> None:
    found = streetclip("evaluate", "run", "--knn", "2", cwd=folder)
    assert found.returncode == 0, found.stderr
    held = json.loads((folder / "run" / "evaluation.json").read_text())
    for group in ("seen", "unseen_cities", "unseen_countries"):
        assert held[f"{group}_oracle_within_25"] > 95
        assert 0 <= held[f"{group}_country_top1"] <= 100
        assert f"{group}_knn_within_750" in held
    assert {path.name for path in (folder / "run").glob("*.png")} == {
        "training.png", "errors.png", "countries.png", "calibration.png", "map.png"
    }  # fmt: skip


def test_own_photos_from_training_to_score(folder: Path) -> None:
    """A table of photos and a gazetteer: train on them, predict a folder, hold it against coordinates."""
    own = ["--dataset", "world/photos.csv", "--gazetteer", "world/gazetteer.csv"]
    changed = [*SMALL]
    changed[changed.index("--generic-steps") + 1] = "0"
    found = streetclip("train", "small", *changed, *own, "--output-dir", "own", cwd=folder)
    assert found.returncode == 0, found.stderr
    found = streetclip("evaluate", "own", "--no-plots", cwd=folder)
    assert found.returncode == 0, found.stderr
    found = streetclip(
        "predict", "world/photos", "--model", "own", "--gazetteer", "world/gazetteer.csv", "--output-dir",
        "predicted", cwd=folder,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "</html>" in (folder / "predicted" / "map.html").read_text()
    lines = (folder / "world" / "photos.csv").read_text().splitlines()
    columns = lines[0].split(",")
    places = [columns.index(name) for name in ("image", "latitude", "longitude")]
    rows = [[line.split(",")[i] for i in places] for line in lines[1:]]
    truth = ["filename,latitude,longitude", *(f"{Path(a).name},{b},{c}" for a, b, c in rows)]
    (folder / "truth.csv").write_text("\n".join(truth) + "\n")
    scored = streetclip(
        "score", "--predictions", "predicted/predictions.csv", "--coords", "truth.csv", "--output-dir", "scored",
        cwd=folder,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert "within_750" in scored.stdout
    assert (folder / "scored" / "errors.png").exists()
    oracle = streetclip(
        "oracle", "--coords", "truth.csv", "--gazetteer", "world/gazetteer.csv", "--cities", "1", "0", cwd=folder
    )
    assert oracle.returncode == 0, oracle.stderr
    assert "true country, best of all 384" in oracle.stdout


def test_caption(folder: Path) -> None:
    found = streetclip("caption", "--labels", "world/photos.csv", "--template", "In {country}.", cwd=folder)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 42


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["make-world", "--output-dir", "world"], "not an empty folder"),
        (["train", "small", "--template", "A photo."], "names no place"),
        (["train", "small", "--template", "A photo in {land}."], "{land} is none of"),
        (["train", "small", "--template", "A photo[ in {country}."], "square brackets"),
        (["train", "small", "--dataset", "photos.csv"], "--generic-steps are for"),
        (["train", "small", "--dataset", "photos.csv", "--generic-steps", "0"], "photos.csv"),
        (["train", "small", "--batch", "1"], "--batch is 1: give 2 or more"),
        (["train", "small", "--lr", "nan"], "--lr is nan"),
        (["train", "small", "--output-dir", "run"], "run"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "run", "--us-states"], "not for the generated world"),
        (["predict"], "no photos: give"),
        (["predict", "nowhere", "--model", "run"], "nowhere: no such photo or folder"),
        (["predict", "run", "--model", "run", "--top-k", "0"], "--top-k is 0"),
        (["score", "--predictions", "world/photos.csv", "--coords", "nowhere.csv"], "nowhere.csv"),
        (["score"], "no --coords"),
        (["oracle", "--coords", "nowhere.csv"], "nowhere.csv"),
        (["caption"], "no --labels"),
        (["caption", "--labels", "nowhere.csv"], "nowhere.csv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(folder: Path, arguments: list[str], says: str) -> None:
    found = streetclip(*arguments, cwd=folder)
    assert found.returncode == 2, found.stderr
    assert says in found.stderr
    assert "Traceback" not in found.stderr
