"""The command line, as a user calls it: each sub-command once, wrong input in one line."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from metazoo.cli import run
from metazoo.options import RunOptions
from metazoo.testing import assert_one_line
from open_mede.cli import COMMANDS
from open_mede.config import PRESETS, Config, EvaluateOptions
from open_mede.ensemble import gaussian_weights
from open_mede.model import tiny_clip
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)

SMALL = ["--clips", "120", "--test-clips", "40", "--epochs", "2", "--batch", "30"]
VIDEOS = [
    "--frames", "3", "--stride", "2", "--views", "2", "--epochs", "2", "--batch", "10", "--adapter", "2", "--workers",
    "1", "--lr", "0.01",
]  # fmt: skip


class Said(NamedTuple):
    """What a call left: exit status, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def open_mede(*arguments: object, cwd: Path) -> Said:
    """The console script, in this process: torch and transformers take longer to load than all of this."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):  # fmt: skip
        run("open-mede", COMMANDS, [str(one) for one in arguments])
    return Said(int(left.value.code or 0), out.getvalue(), err.getvalue())


def good(*arguments: object, cwd: Path) -> Said:
    found = open_mede(*arguments, cwd=cwd)
    assert found.returncode == 0, found.stderr
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on feature vectors, a world as files, its clips out of context, and a CLIP."""
    root = tmp_path_factory.mktemp("cli")
    good("train", "small", *SMALL, "--output-dir", "run", cwd=root)
    found = good(
        "make-data", "--output-dir", "world", "--clips", "60", "--test-clips", "30", "--seed", "2", cwd=root
    )  # fmt: skip
    assert "120" in found.stdout
    few = (root / "world" / "videos.csv").read_text().splitlines()
    (root / "world" / "few.csv").write_text("\n".join([few[0], *few[61:67], *few[91:97]]) + "\n")
    found = good("make-ooc", "--videos", "world/few.csv", "--masks", "world/masks", "--draws", "2", "--output-dir",
                 "ooc", cwd=root)  # fmt: skip
    assert "24" in found.stdout
    torch.manual_seed(0)
    tiny = Config(dataset="sprites", model="tiny", width=8, heads=2, vision_layers=1, text_layers=1, patch=16)
    for part in tiny_clip(tiny):
        part.save_pretrained(root / "clip")
    for name, scale, width in (("e1", 0.0, 3), ("e2", 1.0, 3), ("e3", 3.0, 3), ("wide", 1.0, 4)):
        (root / name).mkdir()
        weights = {"layer.weight": torch.full((2, width), scale), "count": torch.tensor(int(scale))}
        save_file(weights, root / name / "model.safetensors")
    save_file({"other.weight": torch.zeros(2, 3)}, root / "other.safetensors")
    (root / "text.safetensors").write_text("404")
    return root


@pytest.fixture(scope="module")
def own(folder: Path) -> Path:
    """A run on videos, by the table and lists of make-data."""
    good(
        "train", "small", "--dataset", "world/videos.csv", "--model", "clip", "--base-classes", "world/base.txt",
        "--novel-classes", "world/novel.txt", *VIDEOS, "--output-dir", "own", cwd=folder,
    )  # fmt: skip
    return folder / "own"


def test_run_folder(folder: Path) -> None:
    assert {path.name for path in (folder / "run").iterdir()} >= {
        "config.json", "environment.json", "metrics.jsonl", "checkpoints", "model", "training.png", "gwa.png"
    }  # fmt: skip


def test_evaluate(folder: Path) -> None:
    found = good("evaluate", "run", "--average", "swa", cwd=folder)
    held = json.loads((folder / "run" / "evaluation-swa.json").read_text())
    for name in ("base_in", "base_out", "novel_in", "novel_out", "hm_in", "hm_out", "novel_drop", "chance_base_in"):
        assert -100 <= held[name] <= 100
        assert name in found.stdout
    assert {path.name for path in (folder / "run").glob("evaluation*.png")} == {
        "evaluation-swa.png", "evaluation-swa-base.png", "evaluation-swa-novel.png"
    }  # fmt: skip


def test_own_videos_from_training_to_scores(folder: Path, own: Path) -> None:
    """Base and novel classes by their lists; then the same clips out of context, as another data set."""
    found = good("evaluate", "own", cwd=folder)
    assert {"base", "novel", "hm"} <= {line.split()[0] for line in found.stdout.splitlines()}
    held = json.loads((own / "evaluation.json").read_text())
    assert held["chance_base"] == held["chance_novel"] == pytest.approx(100 / 30)
    assert (own / "evaluation-strips.png").exists()
    good("evaluate", "own", "--dataset", "ooc/videos.csv", "--views", "1", "--without-trained", cwd=folder)
    held = json.loads((own / "evaluation-ooc.json").read_text())
    novel = set((folder / "world" / "novel.txt").read_text().splitlines())
    assert set(held["by_class"]["ooc"]) <= novel


def test_own_videos_resumed(folder: Path, own: Path) -> None:
    """A finished run that is resumed is left as it is, and one that is not resumed is not overwritten."""
    before = contents(own / "checkpoints")
    arguments = [
        "train", "small", "--dataset", "world/videos.csv", "--model", "clip", "--base-classes", "world/base.txt",
        "--novel-classes", "world/novel.txt", *VIDEOS, "--output-dir", "own",
    ]  # fmt: skip
    found = open_mede(*arguments, cwd=folder)
    assert found.returncode == 2
    assert_one_line(found.stderr, "own already holds a run: add --resume")
    good(*arguments, "--resume", cwd=folder)
    assert contents(own / "checkpoints") == before


def test_data_dir(folder: Path) -> None:
    """Videos elsewhere than their table; the run is scored from its folder."""
    (folder / "apart.csv").write_text((folder / "world" / "videos.csv").read_text())
    good(
        "train", "small", "--dataset", "apart.csv", "--data-dir", "world", "--split", "frequent", "--model", "clip",
        *VIDEOS, "--batch", "4", "--epochs", "1", "--shots", "1", "--output-dir", "apart", cwd=folder,
    )  # fmt: skip
    good("evaluate", "apart", "--views", "1", "--no-plots", cwd=folder)
    assert json.loads((folder / "apart" / "evaluation.json").read_text())["skipped"] == 0


def test_predict(folder: Path, own: Path) -> None:
    """By a run, and by a plain CLIP."""
    for model in ("own", "clip"):
        good(
            "predict", "world/videos/00000.npy", "world/videos/00070.npy", "--model", model, "--classes",
            "world/novel.txt", "--top-k", "2", "--output-dir", f"said-{model}", cwd=folder,
        )  # fmt: skip
        with (folder / f"said-{model}" / "predictions.csv").open(newline="") as file:
            assert [(row["video"], row["rank"]) for row in csv.DictReader(file)] == [
                (f"world/videos/{name}.npy", rank) for name in ("00000", "00070") for rank in ("1", "2")
            ]
        assert (folder / f"said-{model}" / "strips.png").exists()


def test_average(folder: Path) -> None:
    """By hand: shares of a bell at 2 of width 1; integers are the last's; folders and files alike."""
    found = good(
        "average", "e1", "e2/model.safetensors", "e3", "--mu", "2", "--sigma", "1", "--output",
        "new/averaged.safetensors", cwd=folder,
    )  # fmt: skip
    shares = gaussian_weights(3, 2.0, 1.0)
    assert "weight_2" in found.stdout
    held = load_file(folder / "new" / "averaged.safetensors")
    torch.testing.assert_close(held["layer.weight"], torch.full((2, 3), float(shares @ [0.0, 1.0, 3.0])))
    assert held["count"] == 3
    assert [path.name for path in (folder / "new").iterdir()] == ["averaged.safetensors"]
    before = (folder / "new" / "averaged.safetensors").read_bytes()
    again = ["average", "e1", "e3", "--sigma", "inf", "--output", "new/averaged.safetensors"]
    refused = open_mede(*again, cwd=folder)
    assert refused.returncode == 2
    assert_one_line(refused.stderr, "new/averaged.safetensors is there: give --overwrite")
    assert (folder / "new" / "averaged.safetensors").read_bytes() == before
    good(*again, "--overwrite", cwd=folder)
    assert (load_file(folder / "new" / "averaged.safetensors")["layer.weight"] == 1.5).all()


def test_mu_outside(folder: Path) -> None:
    """Said once, on stderr, and done all the same."""
    found = good("average", "e1", "e2", "--mu", "7", "--output", "late.safetensors", cwd=folder)
    assert_one_line(found.stderr, "mu is 7, outside of epochs 1 to 2")
    shares = gaussian_weights(2, 7.0, 1 / 3)
    torch.testing.assert_close(
        load_file(folder / "late.safetensors")["layer.weight"], torch.full((2, 3), float(shares[1]))
    )
    found = good("train", "small", *SMALL, "--mu", "9", "--output-dir", "late", cwd=folder)
    assert found.stderr.count("mu is 9, outside of epochs 1 to 2") == 1


def test_defaults_say_nothing(folder: Path) -> None:
    """Half of the epochs is no odd place for a bell: no warning about what nobody chose."""
    found = good("train", "small", *SMALL, "--epochs", "1", "--output-dir", "one-epoch", cwd=folder)
    assert "outside of epochs" not in found.stderr


OPTIONS = {
    "train": (Config, RunOptions), "evaluate": (EvaluateOptions,),
    **{name: (command.options,) for name, command in COMMANDS.items()},
}  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_help(command: str, tmp_path: Path) -> None:
    """Every field by its name."""
    found = good(command, "--help", cwd=tmp_path)
    for options in OPTIONS[command]:
        for field in dataclasses.fields(options):
            if field.name not in ("videos", "checkpoints") or command == "make-ooc":  # positional
                assert f"--{field.name.replace('_', '-')}" in found.stdout, field.name


def test_overview(tmp_path: Path) -> None:
    found = good("--help", cwd=tmp_path)
    for command in ("train", "evaluate", "reproduce", "info", *COMMANDS):
        assert f"open-mede {command}" in found.stdout


def test_info(tmp_path: Path) -> None:
    found = good("info", cwd=tmp_path)
    for preset in PRESETS:
        assert f"  {preset} " in found.stdout
    assert "(flagship)" in found.stdout


WRONG: list[tuple[list[str], str]] = [
    (["train", "huge"], "unknown preset 'huge'"),
    (["train", "small", "--sigma", "0"], "--sigma is 0.0: give a number above 0"),
    (["train", "small", "--sigma", "-1"], "--sigma is -1.0"),
    (["train", "small", "--alpha", "-0.1"], "--alpha is -0.1: give 0 or more"),
    (["train", "small", "--delta", "nan"], "--delta is nan"),
    (["train", "small", "--lr", "0"], "--lr is 0.0"),
    (["train", "small", "--mu", "inf"], "--mu is inf"),
    (["train", "small", "--batch", "1500"], "2000 training clips are 1 batches of 1500, --method meta needs 2 or more"),
    (["train", "small", "--templates", "a video"], "give one {} for the class name"),
    (["train", "small", "--jitter", "256", "224"], "give the smaller first"),
    (["train", "small", "--order", "second", "--method", "finetune"], "--order second is for --method meta"),
    (["train", "small", "--query", "shuffle", "--method", "l2-sp"], "--query is for --method meta"),
    (["train", "small", "--model", "tiny"], "--dataset features and --model tiny: give --model linear or mlp"),
    (["train", "small", "--shots", "2"], "--shots is for videos"),
    (["train", "small", "--swa-start", "31"], "--swa-start is 31, --epochs 30"),
    (["train", "small", "--warmup-epochs", "31"], "--warmup-epochs is 31"),
    (["train", "small", "--debiased"], "--debiased is for --dataset sprites"),
    (["train", "small", "--dataset", "none.csv", "--model", "clip"], "none.csv: no such .csv or folder"),
    (["train", "small", "--dataset", "ucf101", "--model", "clip"], "--dataset ucf101 needs --data-dir"),
    (["train", "small", "--dataset", "ucf101", "--model", "clip", "--data-dir", "none"], "none: no such folder"),
    (["train", "small", "--dataset", "world/videos.csv", "--model", "clip", "--novel-classes", "world/novel.txt"],
     "--novel-classes without --base-classes"),
    (["train", "small", "--dataset", "world/videos.csv", "--model", "clip", "--trained", "adapter"],
     "--trained adapter: there is none"),
    (["train", "small", "--dataset", "world/videos.csv", "--model", "clip", "--base-classes", "world/base.txt",
      "--novel-classes", "world/base.txt", "--frames", "8"], "is among base and novel classes (30 are)"),
    (["train", "small", "--dataset", "world/videos.csv", "--model", "clip", "--frames", "9", "--batch", "4",
      "--output-dir", "nine"], "has 8 frames, a clip 9"),
    (["train", "small", "--dataset", "world/videos.csv", "--model", "world"], "world: no config.json in it"),
    (["train", "small", "--output-dir", "run"], "run already holds a run: add --resume"),
    (["train", "small", "--output-dir", "run", "--resume", "--lr", "0.3"], "run was made with"),
    (["evaluate"], "give a run folder"),
    (["evaluate", "none"], "none is not a run folder"),
    (["evaluate", "world"], "world is not a run folder"),
    (["evaluate", "run", "--views", "0"], "--views is 0"),
    (["evaluate", "run", "--without-trained"], "is for another --dataset"),
    (["evaluate", "run", "--dataset", "ooc/videos.csv"], "learned of feature vectors, not of videos"),
    (["predict"], "no videos: give"),
    (["predict", "none.mp4", "--classes", "wave"], "none.mp4: no such video"),
    (["predict", "world/videos/00000.npy"], "no --classes"),
    (["predict", "world/videos/00000.npy", "--classes", "wave", "nod", "wave", "--model", "clip"], "comes twice"),
    (["predict", "world/videos/00000.npy", "--classes", "wave", "", "--model", "clip"], "class 2 has no name"),
    (["predict", "world/videos/00000.npy", "--classes", "wave", "--model", "clip", "--frames", "9"], "has 8 frames"),
    (["predict", "world/videos/00000.npy", "--classes", "wave", "--model", "run"], "run"),
    (["average", "e1"], "1 checkpoints: give 2 or more, in order of epochs"),
    (["average"], "0 checkpoints"),
    (["average", "e1", "none"], "none: no such checkpoint"),
    (["average", "e1", "e2", "--sigma", "0"], "--sigma is 0.0: give a number above 0"),
    (["average", "e1", "e2", "--sigma", "-2"], "--sigma is -2.0"),
    (["average", "e1", "e2", "--sigma", "nan"], "--sigma is nan"),
    (["average", "e1", "e2", "--mu", "nan"], "nan"),
    (["average", "e1", "other.safetensors"], "other.safetensors: count is in one and not in the other"),
    (["average", "e1", "wide"], "layer.weight has shape (2, 4), before (2, 3)"),
    (["average", "e1", "text.safetensors"], "text.safetensors: not a .safetensors file"),
    (["average", "e1", "world"], "world has 0 .safetensors files: give the file"),
    (["make-data", "--output-dir", "world"], "world is not an empty folder"),
    (["make-data", "--output-dir", "x", "--clips", "0"], "--clips is 0"),
    (["make-ooc"], "no --videos"),
    (["make-ooc", "--videos", "none.csv", "--masks", "world/masks"], "--videos none.csv: no such file"),
    (["make-ooc", "--videos", "world/few.csv"], "give one of --masks and --boxes"),
    (["make-ooc", "--videos", "world/few.csv", "--masks", "world/masks", "--output-dir", "ooc"],
     "ooc is not an empty folder"),
    (["make-ooc", "--videos", "world/few.csv", "--masks", "world/videos", "--output-dir", "x"], "its masks have shape"),
    (["fly"], "unknown command 'fly'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_input(folder: Path, arguments: list[str], says: str) -> None:
    """One line, exit status 2, and what was there is as it was."""
    watched = [folder / name for name in ("run", "ooc", "e1")]
    kept = {".lock", "environment.json"}  # of a run that was opened
    before = [{k: v for k, v in contents(one).items() if k not in kept} for one in watched]
    found = open_mede(*arguments, cwd=folder)
    assert found.returncode == 2, found.stderr
    assert_one_line(found.stderr, says)
    assert [{k: v for k, v in contents(one).items() if k not in kept} for one in watched] == before


def test_checkpoints_of_a_run(folder: Path) -> None:
    """The learner that a run saves can be averaged with another's, and keeps its type."""
    good("train", "small", *SMALL, "--seed", "0", "--lr", "0.2", "--output-dir", "run2", cwd=folder)
    good("average", "run/model", "run2/model", "--sigma", "inf", "--output", "both.safetensors", cwd=folder)
    one, two, both = (load_file(folder / name) for name in (
        "run/model/model.safetensors", "run2/model/model.safetensors", "both.safetensors"))  # fmt: skip
    assert both.keys() == one.keys()
    np.testing.assert_allclose(both["map.weight"], (one["map.weight"] + two["map.weight"]) / 2, atol=1e-6)
