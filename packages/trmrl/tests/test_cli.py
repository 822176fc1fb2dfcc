"""The command line, as a user calls it: each sub-command once, wrong input in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from metazoo.cli import run
from metazoo.options import RunOptions
from metazoo.testing import assert_one_line
from PIL import Image
from trmrl import plots
from trmrl.cli import COMMANDS
from trmrl.config import PRESETS, Config, EvaluateOptions

torch.set_num_threads(1)
DRAW = plots.training
TINY = [
    "--horizon", "4", "--tasks", "4", "--window", "3", "--d-model", "8", "--heads", "2", "--layers", "2", "--d-ff",
    "16", "--head-hidden", "8", "--updates", "2", "--passes", "2", "--minibatch", "16", "--decay-from", "0",
    "--decay-to", "0",
]  # fmt: skip
CHEETAH = ["--env", "trmrl/HalfCheetahVel-v5", "--horizon", "3", "--tasks", "2", "--updates", "1"]


class Said(NamedTuple):
    """What a call left: exit status, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def trmrl(*arguments: object, cwd: Path) -> Said:
    """The console script, in this process: torch takes longer to load than all of this."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):  # fmt: skip
        run("trmrl", COMMANDS, [str(one) for one in arguments])
    return Said(int(left.value.code or 0), out.getvalue(), err.getvalue())


def good(*arguments: object, cwd: Path) -> Said:
    found = trmrl(*arguments, cwd=cwd)
    assert found.returncode == 0, found.stderr
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """All files but what opening a run renews."""
    kept = {".lock", "environment.json"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in kept
    }


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    """The picture of a training takes longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "training", lambda rows, path: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of TrMRL on the point robot, of RL² and of a transformer with a window of one."""
    root = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "training", DRAW)
        found = good("train", "small", *TINY, "--log-every", "1", "--output-dir", "run", cwd=root)
    assert found.stdout == "run folder: run\n"
    good("train", "small", *TINY, "--algo", "rl2", "--output-dir", "rl2", cwd=root)
    good("train", *TINY, "--window", "1", "--output-dir", "one", cwd=root)
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def cheetah(folder: Path) -> Path:
    good("train", "small", *TINY, *CHEETAH, "--output-dir", "cheetah", cwd=folder)
    return folder / "cheetah"


def test_train(folder: Path) -> None:
    """Fields go into config.json, those not given are the preset's; the folder has what the README lists."""
    assert {path.name for path in (folder / "run").iterdir()} >= {
        "config.json", "environment.json", "metrics.jsonl", "checkpoints", "model", "training.png"
    }  # fmt: skip
    held = json.loads((folder / "run" / "config.json").read_text())
    assert {name: held[name] for name in ("horizon", "d_model", "head_hidden", "updates", "decay_to")} == {
        "horizon": 4, "d_model": 8, "head_hidden": [8], "updates": 2, "decay_to": 0
    }  # fmt: skip
    assert held["max_grad_norm"] == PRESETS["small"].max_grad_norm
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_resumed(folder: Path) -> None:
    """A finished run that is resumed is left as it is."""
    before = contents(folder / "run" / "checkpoints")
    good("train", "small", *TINY, "--log-every", "1", "--output-dir", "run", "--resume", cwd=folder)
    assert contents(folder / "run" / "checkpoints") == before


def test_evaluate(folder: Path) -> None:
    found = good("evaluate", "run", "--tasks", "3", "--episodes", "2", cwd=folder)
    held = json.loads((folder / "run" / "evaluation.json").read_text())
    said = {line.split()[0]: float(line.split()[1]) for line in found.stdout.splitlines()}
    assert set(said) == {f"return_{e}{suffix}" for e in (1, 2) for suffix in ("", "_low", "_high")}
    assert all(held[name] == pytest.approx(value, rel=1e-4) for name, value in said.items())
    assert held["split"] == "test"
    assert held["stochastic"] is False
    assert np.shape(held["by_step"]["reward"]) == (2, 4)
    assert (folder / "run" / "adaptation.png").stat().st_size > 1000
    good(
        "evaluate", "run", "--tasks", "3", "--episodes", "3", "--split", "ood", "--stochastic", "--seed", "5",
        "--no-plots", cwd=folder,
    )  # fmt: skip
    other = json.loads((folder / "run" / "evaluation.json").read_text())
    assert other["split"] == "ood"
    assert other["stochastic"] is True
    assert other["return_1"] != held["return_1"]
    assert "return_3" in other


def frames_of(path: Path) -> tuple[int, tuple[int, int], int]:
    """How many frames a .gif shows (one that is shown twice as long counts twice), their size, and colours."""
    with Image.open(path) as film:
        shown = []
        for i in range(film.n_frames):  # type: ignore[attr-defined]
            film.seek(i)
            shown.append(film.info["duration"])
        size, colours = film.size, len(np.unique(np.asarray(film.convert("RGB")).reshape(-1, 3), axis=0))
    return round(sum(shown) / min(shown)), size, colours


def test_gif(folder: Path) -> None:
    """A frame for each reset and each step; tasks beside each other."""
    found = good("video", "run", "--output", "films/a.gif", "--tasks", "2", "--episodes", "2", cwd=folder)
    assert found.stdout.startswith("films/a.gif: 10 frames; returns of the tasks: episode 1: -")
    assert "; episode 2: -" in found.stdout
    count, size, colours = frames_of(folder / "films" / "a.gif")
    assert count == 2 * (1 + 4)
    assert size == (480, 240)
    assert colours >= 4  # white, the half-circle, the goal, the point


def test_gif_by_renderer(folder: Path) -> None:
    """The environment's own rendering, out of distribution, other speed and tasks."""
    good(
        "video", "run", "--output", "b.gif", "--tasks", "1", "--episodes", "1", "--renderer", "gl", "--split", "ood",
        "--fps", "10", "--seed", "7", cwd=folder,
    )  # fmt: skip
    count, size, _ = frames_of(folder / "b.gif")
    assert (count, size) == (5, (240, 240))


def test_mp4(folder: Path) -> None:
    av = pytest.importorskip("av")
    found = good("video", "run", "--output", "a.mp4", "--tasks", "2", "--episodes", "2", "--fps", "10", cwd=folder)
    assert "a.mp4: 10 frames" in found.stdout
    with av.open(str(folder / "a.mp4")) as film:
        stream = film.streams.video[0]
        assert stream.average_rate == 10
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
    assert len(pictures) == 10
    assert pictures[0].shape == (240, 480, 3)
    assert pictures[-1].std() > 1


def test_mujoco_is_drawn(folder: Path, cheetah: Path) -> None:
    """Outlines, without a graphics library; evaluate says how far it is from the target velocity, if it can settle."""
    good("video", "cheetah", "--output", "c.gif", "--tasks", "1", "--episodes", "1", cwd=folder)
    count, size, colours = frames_of(folder / "c.gif")
    assert (count, size) == (4, (240, 240))
    assert colours >= 3
    found = good("evaluate", "cheetah", "--tasks", "2", "--episodes", "1", "--no-plots", cwd=folder)
    assert "error_settled" not in found.stdout  # three steps only
    held = json.loads((cheetah / "evaluation.json").read_text())
    assert np.shape(held["by_step"]["error"]) == (1, 3)


def test_attention(folder: Path) -> None:
    found = good("attention", "run", "--tasks", "3", cwd=folder)
    assert found.stdout.startswith("run/attention.png: ")
    good("attention", "run", "--tasks", "2", "--output", "drawn/here.png", "--seed", "3", cwd=folder)
    for path in (folder / "run" / "attention.png", folder / "drawn" / "here.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10


OPTIONS: dict[str, tuple[type, ...]] = {
    "train": (Config, RunOptions), "evaluate": (EvaluateOptions,),
    **{name: (command.options,) for name, command in COMMANDS.items()},
}  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_help(command: str, tmp_path: Path) -> None:
    """Every field by its name."""
    found = good(command, "--help", cwd=tmp_path)
    for options in OPTIONS[command]:
        for field in dataclasses.fields(options):
            if field.name != "run":  # positional
                assert f"--{field.name.replace('_', '-')}" in found.stdout, field.name


def test_reproduce_help(tmp_path: Path) -> None:
    found = good("reproduce", "--help", cwd=tmp_path)
    assert "--scale" in found.stdout


def test_help_of_a_preset(tmp_path: Path) -> None:
    """Its own values are the defaults."""
    assert "trmrl/ML10-v3" in good("train", "paper-ml10", "--help", cwd=tmp_path).stdout


def test_overview(tmp_path: Path) -> None:
    found = good("--help", cwd=tmp_path)
    for command in ("train", "evaluate", "reproduce", "info", *COMMANDS):
        assert f"trmrl {command}" in found.stdout
    assert good(cwd=tmp_path).stdout == found.stdout


def test_info(tmp_path: Path) -> None:
    found = good("info", cwd=tmp_path)
    for preset in PRESETS:
        assert f"  {preset} " in found.stdout
    assert "(flagship)" in found.stdout


WRONG: list[tuple[list[str], str]] = [
    (["train", "huge"], "unknown preset 'huge': one of small, paper, medium"),
    (["train", "small", "--depth", "3"], "--depth"),
    (["train", "small", "--algo", "dqn"], "dqn"),
    (["train", "small", "--updates", "many"], "many"),
    (["train", "small", "--env", "trmrl/None-v0"], "--env trmrl/None-v0: "),
    (["train", "small", "--env", "none:None-v0"], "--env none:None-v0: "),
    (["train", "small", "--env", "none:None-v0"], "your own: module:id, where importing module registers id"),
    (["train", "small", "--env", "Pendulum-v1"],
     "--env Pendulum-v1 has no sample_tasks and no set_task: give an environment with sample_tasks"),
    (["train", "small", "--d-model", "30", "--heads", "4"],
     "--d-model 30 is no multiple of --heads 4: change one"),
    (["train", "small", "--d-model", "31", "--heads", "1"], "--d-model is 31: give an even number"),
    (["train", "small", "--window", "0"], "--window is 0: give 1 or more"),
    (["train", "small", "--lr", "nan"], "--lr is nan: give a number above 0"),
    (["train", "small", "--updates", "50"], "--decay-to is 99: give more than --decay-from (40) and less than"),
    (["train", "small", "--updates", "5", "--decay-from", "1", "--decay-to", "7"],
     "--decay-to is 7: give more than --decay-from (1) and less than --updates (5), or 0 for a constant rate"),
    (["train", "small", "--algo", "rl2", "--carry-memory"], "--carry-memory is for trmrl, not for rl2"),
    (["train", "small", "--log-every", "0"], "--log-every is 0: give 1 or more"),
    (["train", "small", *TINY, "--output-dir", "run"], "run already holds a run: add --resume"),
    (["train", "small", *TINY, "--output-dir", "run", "--resume", "--lr", "0.3"], "lr"),
    (["evaluate"], "give a run folder: trmrl evaluate RUN"),
    (["evaluate", "none"], "none is not a run folder (no config.json): give the --output-dir of `trmrl train`"),
    (["evaluate", "empty"], "empty is not a run folder"),
    (["evaluate", "run", "--tasks", "0"], "--tasks is 0: give 1 or more"),
    (["evaluate", "run", "--episodes", "0"], "--episodes is 0: give 1 or more"),
    (["evaluate", "run", "--seed", "-1"], "--seed is -1: give 0 or more"),
    (["evaluate", "run", "--split", "new"], "new"),
    (["video"], "Missing from trmrl video: PATH"),
    (["video", "empty"], "empty is not a run folder"),
    (["video", "run", "--output", "x.avi"], "--output x.avi: give a name that ends in .gif or .mp4"),
    (["video", "run", "--fps", "0"], "--fps is 0: give 1 or more"),
    (["video", "run", "--tasks", "0"], "--tasks is 0: give 1 or more"),
    (["attention", "none"], "none is not a run folder"),
    (["attention", "rl2"], "rl2 was trained by --algo rl2: attention is drawn for trmrl only"),
    (["attention", "run", "--output", "x.gif"], "--output x.gif: give a name that ends in .png"),
    (["attention", "run", "--tasks", "1"], "--tasks is 1: give 2 or more"),
    (["attention", "one"], "--window"),
    (["info", "all"], "info takes no arguments"),
    (["fly"], "unknown command 'fly'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_input(folder: Path, arguments: list[str], says: str) -> None:
    """One line, exit status 2, and what was there is as it was."""
    before = contents(folder)
    found = trmrl(*arguments, cwd=folder)
    assert found.returncode == 2, found.stderr
    assert_one_line(found.stderr, says)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("package", "env", "extra"),
    [("metaworld", "trmrl/ML10-v3", "metaworld"), ("mujoco", "trmrl/AntDir-v5", "mujoco")],
)
def test_what_an_environment_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, env: str, extra: str
) -> None:
    """Where it is not installed the extra is named, and nothing is made."""
    real = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        return None if name == package else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    said = trmrl("train", "small", "--env", env, cwd=tmp_path)
    assert said.returncode == 2
    assert_one_line(said.stderr, f"--env {env} needs {package}, which is not installed: pip install")
    assert f"metazoo-trmrl[{extra}]" in said.stderr
    assert not list(tmp_path.iterdir())


def test_mp4_needs_av(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is filmed; .gif does without."""
    monkeypatch.setitem(sys.modules, "av", None)
    found = trmrl("video", "run", "--output", "no.mp4", "--tasks", "1", cwd=folder)
    assert found.returncode == 2
    assert_one_line(found.stderr, "an .mp4 needs PyAV: pip install 'metazoo-trmrl[video]'")
    assert not (folder / "no.mp4").exists()
    good("video", "run", "--output", "yes.gif", "--tasks", "1", "--episodes", "1", cwd=folder)
    assert (folder / "yes.gif").exists()


def test_light_imports() -> None:
    """What help and info import loads neither torch nor gymnasium."""
    code = (
        "import sys, trmrl.config, trmrl.cli, trmrl.claims; "
        "sys.exit(', '.join(sorted({'torch', 'gymnasium', 'mujoco', 'matplotlib'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
