"""What the contract's tests know of the house: the packages found, and how to call one's command line."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Distribution:
    """A folder with a pyproject.toml: shared/ or one under packages/."""

    folder: Path

    @property
    def name(self) -> str:
        """Name of the folder, and of a package's console script."""
        return self.folder.name

    @property
    def module(self) -> str:
        """Import name."""
        return "metazoo" if self.name == "shared" else self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.module

    @cached_property
    def pyproject(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))

    @cached_property
    def readme(self) -> str:
        return (self.folder / "README.md").read_text(encoding="utf-8")

    @property
    def results(self) -> dict[str, Any]:
        """What `reproduce` measured at the small scale; fails the test if nothing was."""
        path = self.folder / "results" / "small.json"
        assert path.is_file(), f"{path.relative_to(ROOT)} is missing: measure from a clean tree, see the README"
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return results

    def trees(self) -> dict[Path, ast.Module]:
        """Syntax tree of each source file."""
        return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(self.source.rglob("*.py"))}


SHARED = Distribution(ROOT / "shared")
PACKAGES = [Distribution(path.parent) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]

every_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
every_distribution = pytest.mark.parametrize("package", [SHARED, *PACKAGES], ids=lambda package: package.name)


def command(package: Distribution, *arguments: str) -> list[str]:
    """The installed console script of ``package`` with ``arguments``."""
    return [str(Path(sys.executable).parent / package.name), *arguments]


def call(package: Distribution, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line of ``package`` in the folder ``cwd``, as a user would."""
    return subprocess.run(
        command(package, *arguments),
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
