"""The sweep stores each cell at once, goes on where it stopped, and uses a cell only where it belongs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from metazoo import environment
from metazoo.errors import UserError
from metazoo.sweep import config_hash, reproduce
from metazoo_toy import Config, claim, faster

TIMED = {"seconds"}


def clean(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs from one measurement to the next."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def cell_files(folder: Path) -> list[Path]:
    return sorted((folder / "cells").glob("*.json"))


def processes(folder: Path) -> set[int]:
    """Where the cells were measured."""
    return {json.loads(path.read_text())["metrics"]["process"] for path in cell_files(folder)}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the toy notes each call of measure()."""
    path = tmp_path / "calls.txt"
    path.touch()
    monkeypatch.setenv("METAZOO_TOY_LOG", str(path))
    return path


@contextlib.contextmanager
def slow_sweep(folder: Path, cells: int, jobs: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A sweep in a process of its own that has finished ``cells`` cells and works on the next."""
    toy = Path(__file__).parent / "metazoo_toy.py"
    process = subprocess.Popen([sys.executable, str(toy), str(folder), str(jobs)], text=True)
    try:
        for _ in range(600):
            if len(cell_files(folder)) >= cells:
                break
            assert process.poll() is None
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_cells_and_results(tmp_path: Path) -> None:
    """One file per claim, arm and seed with all that was promised; the rows lie in small.json."""
    (row,) = reproduce("toy", [claim()], folder=tmp_path)
    assert row["verdict"] == "reproduced"
    files = cell_files(tmp_path)
    digest = config_hash(Config(1.0))[:8]
    assert len(files) == 10
    assert files[0].name == f"toy-v1-ours-seed0-{digest}.json"
    record = json.loads(files[1].read_text())
    promised = [
        "package",
        "claim",
        "version",
        "arm",
        "scale",
        "seed",
        "config",
        "command",
        "metrics",
        "seconds",
        "peak_memory_mb",
        "versions",
        "git",
        "device",
        "tuning",
        "chance",
    ]
    assert set(record) == set(promised)
    assert record["config"] == dataclasses.asdict(Config(1.0))
    assert record["command"] == "toy reproduce --claim toy --scale small --seeds 2"
    assert set(record["git"]) == {"revision", "dirty"}
    assert record["peak_memory_mb"] > 10
    results = json.loads((tmp_path / "small.json").read_text())
    assert list(results) == ["package", "scale", "environment", "claims"]
    assert results["claims"] == [row]


def test_a_cell_holds_no_name_of_this_machine(tmp_path: Path) -> None:
    """Results are published: no path, host or user in them."""
    reproduce("toy", [claim()], folder=tmp_path, seeds=1)
    text = (tmp_path / "small.json").read_text() + cell_files(tmp_path)[0].read_text()
    for name in (str(tmp_path), str(Path.home()), os.uname().nodename, str(Path(__file__).parent)):
        assert name not in text


def test_finished_cells_are_used_again(tmp_path: Path, calls: Path) -> None:
    """A second sweep measures nothing; one with more seeds measures those alone."""
    first = reproduce("toy", [claim()], folder=tmp_path)
    assert len(calls.read_text().splitlines()) == 10
    assert reproduce("toy", [claim()], folder=tmp_path) == first
    assert len(calls.read_text().splitlines()) == 10
    (row,) = reproduce("toy", [claim()], folder=tmp_path, seeds=6)
    assert calls.read_text().splitlines()[10:] == ["1.0 5", "0.0 5"]
    assert (row["seeds"], row["planned_seeds"]) == (6, 5)


def test_killed_sweep_goes_on(tmp_path: Path, calls: Path) -> None:
    """SIGKILL after three cells: the next sweep measures the others only and ends with the same numbers."""
    with slow_sweep(tmp_path / "killed", 3):
        pass
    finished = cell_files(tmp_path / "killed")
    kept = {path: path.read_bytes() for path in finished}
    assert 3 <= len(finished) < 10
    calls.write_text("")
    slow = claim(seconds=0.3)
    resumed = reproduce("toy", [slow], folder=tmp_path / "killed")
    assert len(calls.read_text().splitlines()) == 10 - len(finished)
    assert {path: path.read_bytes() for path in finished} == kept
    assert clean(resumed) == clean(reproduce("toy", [faster(slow)], folder=tmp_path / "whole"))
    assert not list((tmp_path / "killed" / "cells").glob(".*.tmp"))


def test_a_killed_sweep_leaves_no_worker(tmp_path: Path) -> None:
    """SIGKILL of a sweep with two workers: they end soon and take up no further cell."""
    with slow_sweep(tmp_path, 1, jobs=2):
        pass
    worker = next(iter(processes(tmp_path)))
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"worker {worker} outlived its sweep by 5 seconds")
    assert len(cell_files(tmp_path)) < 10


def test_two_sweeps_at_once(tmp_path: Path) -> None:
    """The second into one folder is refused in a line, and may start when the first has gone."""
    with slow_sweep(tmp_path, 1), pytest.raises(UserError, match="another sweep works in") as caught:
        reproduce("toy", [claim()], folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert reproduce("toy", [claim()], folder=tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"metrics"', '"numbers"'),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace('"version": 1', '"version": 0'),
        lambda text: text.replace('"level": 1.0', '"level": 2.0'),
    ],
)
def test_damaged_cells_are_measured_again(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    """A truncated or altered file is named in one line, and only that cell is measured."""
    before = reproduce("toy", [claim()], folder=tmp_path)
    victim = cell_files(tmp_path)[0]
    victim.write_text(damage(victim.read_text()))
    calls.write_text("")
    after = reproduce("toy", [claim()], folder=tmp_path)
    assert calls.read_text().splitlines() == ["1.0 0"]
    assert clean(after) == clean(before)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 1
    assert victim.name in said[0]


def test_a_new_version_is_measured_anew(tmp_path: Path, calls: Path) -> None:
    """Cells of another version or config stay on disk and are not used."""
    reproduce("toy", [claim()], folder=tmp_path)
    reproduce("toy", [claim(version=2)], folder=tmp_path)
    assert len(calls.read_text().splitlines()) == 20
    arms = {"small": {"ours": Config(2.0), "theirs": Config(0.0)}}
    reproduce("toy", [claim(version=2, arms=arms)], folder=tmp_path)
    assert len(calls.read_text().splitlines()) == 25
    assert len(cell_files(tmp_path)) == 25


def test_shared_arms_are_measured_once(tmp_path: Path, calls: Path) -> None:
    """Two claims with the same measure, config and seed share the run; both get their cells and rows."""
    rows = reproduce("toy", [claim("one"), claim("two", metric="cost", compare="ratio")], folder=tmp_path)
    assert len(calls.read_text().splitlines()) == 10
    assert len(cell_files(tmp_path)) == 20
    assert [row["name"] for row in rows] == ["one", "two"]
    assert rows[1]["effect"] == 1.0


def test_rows_of_other_claims_stay(tmp_path: Path) -> None:
    """Claims that were not asked for keep their rows and their places."""
    target = tmp_path / "small.json"
    reproduce("toy", [claim("one"), claim("two")], folder=tmp_path)
    before = json.loads(target.read_text())["claims"]
    (row,) = reproduce("toy", [claim("one", version=2)], folder=tmp_path)
    assert json.loads(target.read_text())["claims"] == [row, before[1]]
    target.write_text('{"package": "other", "claims": []}')
    with pytest.raises(UserError, match="holds no results of toy"):
        reproduce("toy", [claim("one")], folder=tmp_path)


def test_two_jobs_equal_one(tmp_path: Path) -> None:
    """Worker processes change no number; and they store what NaN and errors did not spoil."""
    one = reproduce("toy", [claim()], folder=tmp_path / "one", backend="sequential")
    assert clean(reproduce("toy", [claim()], folder=tmp_path / "two", jobs=2)) == clean(one)
    assert processes(tmp_path / "one") == {os.getpid()}
    assert os.getpid() not in processes(tmp_path / "two")
    with pytest.raises(UserError, match="claim 'toy', arm ours, seed 2: metric score is nan"):
        reproduce("toy", [claim(fail="nan")], folder=tmp_path / "nan", jobs=2)
    with pytest.raises(UserError, match="a worker process was killed"):
        reproduce("toy", [claim(fail="die")], folder=tmp_path / "die", jobs=2)
    assert cell_files(tmp_path / "die")


@pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="distributed is not installed: metazoo[dask]"
)
# tornado and distributed leave sockets and loops to the collector when a cluster closes
@pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning")
def test_dask_equals_one(tmp_path: Path) -> None:
    """On a local Dask cluster the same numbers come out."""
    one = reproduce("toy", [claim()], folder=tmp_path / "one", seeds=2)
    dask = reproduce("toy", [claim()], folder=tmp_path / "dask", seeds=2, jobs=2, backend="dask")
    assert clean(dask) == clean(one)
    assert os.getpid() not in processes(tmp_path / "dask")


def test_nan_stops_in_one_line(tmp_path: Path, calls: Path) -> None:
    """NaN is no result: the line names claim, arm, seed and metric, finished cells stay and serve again."""
    with pytest.raises(UserError) as caught:
        reproduce("toy", [claim(fail="nan")], folder=tmp_path)
    assert str(caught.value).startswith("claim 'toy', arm ours, seed 2: metric score is nan")
    assert "\n" not in str(caught.value)
    assert len(cell_files(tmp_path)) == 4
    calls.write_text("")
    with pytest.raises(UserError):
        reproduce("toy", [claim(fail="nan")], folder=tmp_path)
    assert calls.read_text().splitlines() == ["1.0 2"]


def test_a_failed_cell_names_itself(tmp_path: Path) -> None:
    """Any exception becomes one line; the traceback lies beside the cells."""
    with pytest.raises(UserError) as caught:
        reproduce("toy", [claim(fail="no convergence")], folder=tmp_path)
    message = str(caught.value)
    assert message.startswith("claim 'toy', arm ours, seed 2: RuntimeError: no convergence second line")
    assert "\n" not in message
    (trace,) = (tmp_path / "cells").glob("*.traceback.txt")
    assert trace.name in message
    assert "in measure" in trace.read_text()


@pytest.mark.parametrize(
    ("claims", "changes", "words"),
    [
        ([], {}, "no claims"),
        ([claim(), claim()], {}, "two claims are named 'toy'"),
        ([claim()], {"scale": "paper"}, "no scale 'paper': one of small"),
        ([claim()], {"seeds": 0}, "seeds is 0"),
        ([claim()], {"jobs": 0}, "jobs is 0"),
        ([claim()], {"backend": "threading"}, "unknown backend 'threading': one of loky"),
    ],
)
def test_bad_requests_touch_nothing(tmp_path: Path, claims: Any, changes: Any, words: str) -> None:
    """Refused before a folder is made."""
    with pytest.raises(UserError, match=words):
        reproduce("toy", claims, folder=tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_missing_backends_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Without the cluster's package one line says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'metazoo\[{backend}\]'"):
        reproduce("toy", [claim()], folder=tmp_path, backend=backend)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A file where the folder should be is a user's error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        reproduce("toy", [claim()], folder=tmp_path / "file")


def test_config_hash() -> None:
    """It depends on class and fields, and on nothing else: the digest is a constant."""
    assert config_hash(Config(1.0)) == config_hash(Config(1.0, 0.0, ""))
    assert config_hash(Config(1.0)) != config_hash(Config(1.5))
    assert config_hash(Config(1.0)).startswith("771ed87008ebdf20")

    @dataclasses.dataclass(frozen=True)
    class Other:
        level: float = 1.0
        seconds: float = 0.0
        fail: str = ""

    assert config_hash(Other()) != config_hash(Config(1.0))


def test_environment_in_and_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git: null for code outside, a revision for tracked code, dirty once code changes but not by results."""
    package = tmp_path / "repo" / "tracked_toy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    unknown = {"revision": None, "dirty": None}
    assert environment.git("no_such_module") == unknown
    assert environment.git("tracked_toy") == unknown
    git = ["git", "-C", str(package.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert environment.git("tracked_toy") == unknown
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "toy"], check=True)
    known = environment.git("tracked_toy")
    assert len(known["revision"]) == 40
    assert known["dirty"] is False
    (package.parent / "results").mkdir()
    (package.parent / "results" / "small.json").write_text("{}")
    assert environment.git("tracked_toy")["dirty"] is False
    (package / "__init__.py").write_text("changed = True")
    assert environment.git("tracked_toy")["dirty"] is True


def test_peak_memory_is_of_the_cell() -> None:
    """After a reset the peak forgets what came before."""
    environment.reset_peak_memory()
    before = environment.peak_memory_mb()
    block = bytearray(80_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert environment.peak_memory_mb() > before + 60
    del block
    if sys.platform == "linux":
        environment.reset_peak_memory()
        assert environment.peak_memory_mb() < before + 40
