"""The command line of each package: quick where nothing is computed, and one line for bad input."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from house import Distribution, call, command, every_package

HEAVY = {
    "torch", "accelerate", "transformers", "peft", "datasets", "huggingface_hub", "safetensors", "numpy", "scipy",
    "pandas", "sklearn", "matplotlib", "joblib", "gymnasium", "torchdiffeq", "dask", "distributed", "ray",
}  # fmt: skip
LIMIT = float(os.environ.get("METAZOO_HELP_SECONDS", "1"))
"""Seconds that an answer without computing may take; raise it on a slow machine."""

QUICK = [("--help",), ("info",), ("train", "--help"), ("reproduce", "--help"), ("evaluate", "--help")]


@every_package
def test_light_modules(package: Distribution) -> None:
    """cli, config and claims import nothing heavy: it loads when work starts."""
    names = ", ".join(f"{package.module}.{room}" for room in ("cli", "config", "claims"))
    code = f"import sys, {names}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


@every_package
@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_light_answers(package: Distribution, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Nor does an answer that needs no computing; it is on stdout, and nothing is written."""
    done = call(package, *arguments, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert package.module in imported, "the profile of imports is not what this test takes it for"
    assert not HEAVY & imported
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir())


@every_package
@pytest.mark.parametrize("arguments", QUICK[:3], ids=" ".join)
def test_answers_within_a_second(package: Distribution, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Median of three; up to three times, as another process may have had the cores."""
    medians = []
    for _ in range(3):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run(command(package, *arguments), cwd=tmp_path, capture_output=True, check=True)
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds))
        if medians[-1] < LIMIT:
            return
    pytest.fail(f"{medians} s; the limit is {LIMIT} s (METAZOO_HELP_SECONDS)")


@every_package
def test_sub_commands(package: Distribution, tmp_path: Path) -> None:
    """train, evaluate, reproduce and info are there; help names them and every field with its default."""
    overview = call(package, "--help", cwd=tmp_path).stdout
    for name in ("train", "evaluate", "reproduce", "info"):
        assert f"{package.name} {name}" in overview
    shown = call(package, "train", "--help", cwd=tmp_path).stdout
    fields = set(re.findall(r"--([a-z0-9][a-z0-9-]*)", shown))
    assert {"seed", "output-dir", "resume", "checkpoint-every"} <= fields
    assert "default:" in shown
    wanted = {"claim", "scale", "seeds", "jobs", "backend", "output-dir"}
    assert wanted <= set(re.findall(r"--([a-z-]+)", call(package, "reproduce", "--help", cwd=tmp_path).stdout))


BAD = {
    "unknown command": ["no-such-command"],
    "unknown preset": ["train", "no-such-preset"],
    "unknown field": ["train", "--no-such-field", "1"],
    "value of the wrong type": ["train", "--seed", "many"],
    "refused option": ["train", "--keep", "1"],
    "no run named": ["evaluate"],
    "run that does not exist": ["evaluate", "nowhere"],
    "folder that is no run": ["evaluate", "."],
    "unknown claim": ["reproduce", "--claim", "no-such-claim"],
    "unknown scale": ["reproduce", "--scale", "huge"],
    "no seeds": ["reproduce", "--seeds", "0"],
    "argument too many": ["info", "more"],
}


@every_package
@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_gets_one_line(package: Distribution, arguments: list[str], tmp_path: Path) -> None:
    """One line on stderr that begins with the command's name, exit status 2, no traceback, nothing written."""
    done = call(package, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.fullmatch(rf"{re.escape(package.name)}: error: .{{10,}}\n", done.stderr), done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.rglob("*"))
