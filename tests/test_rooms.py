"""A package has its rooms, its names, and stands on what it declares."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

from house import PACKAGES, ROOT, Distribution, every_distribution, every_package
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOMS = ["__init__", "config", "train", "evaluate", "claims", "cli"]
LOWER = {">=", "==", "~=", ">"}


def test_packages_are_found() -> None:
    """Without a package the tests of all packages would pass by having no case."""
    assert PACKAGES
    strays = {path.name for path in (ROOT / "packages").iterdir() if path.is_dir()} - {p.name for p in PACKAGES}
    assert not strays, "folders under packages/ without a pyproject.toml"


@every_package
def test_rooms(package: Distribution) -> None:
    """The rooms that every method needs are there; what a method does not need may be absent."""
    wanted = [f"src/{package.module}/{room}.py" for room in ROOMS] + ["README.md", "pyproject.toml", "results"]
    missing = [name for name in wanted if not (package.folder / name).exists()]
    assert not missing
    assert list((package.folder / "tests").glob("test_*.py")), "no tests"


@every_package
def test_names(package: Distribution) -> None:
    """Distribution metazoo-NAME, console script NAME, import name NAME; licence, README and Python are stated."""
    project = package.pyproject["project"]
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", package.name)
    assert project["name"] == f"metazoo-{package.name}"
    assert project["scripts"] == {package.name: f"{package.module}.cli:main"}
    assert project["license"] == "Apache-2.0"
    assert project["readme"] == "README.md"
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi", project["description"]), "the description names the paper"


@every_distribution
def test_lower_bounds(package: Distribution) -> None:
    """Every requirement has a lower bound and comes from the registry; Python has no upper bound."""
    project = package.pyproject["project"]
    lists = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
    lists.append(package.pyproject["build-system"]["requires"])
    for text in (text for requirements in lists for text in requirements):
        requirement = Requirement(text)
        assert requirement.url is None, text
        assert any(limit.operator in LOWER for limit in requirement.specifier), f"{text} has no lower bound"
    python = SpecifierSet(project["requires-python"])
    assert python.contains("3.11")
    assert not python.contains("3.10")
    assert python.contains("3.99"), "an upper bound on Python keeps users from installing at all"


@every_distribution
def test_imports_what_it_declares(package: Distribution) -> None:
    """Each import, lazy ones too, is of the standard library, of itself, or of a declared dependency.

    So no package imports another: none may be declared.
    """
    project = package.pyproject["project"]
    lists = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
    declared = {canonicalize_name(Requirement(text).name) for requirements in lists for text in requirements}
    others = {f"metazoo-{other.name}" for other in PACKAGES}
    assert not declared & others, "packages never depend on each other"
    homes = importlib.metadata.packages_distributions()
    wrong = []
    for path, tree in package.trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: name the package in imports"
                imported = [node.module or ""]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                continue
            for name in (name.split(".")[0] for name in imported):
                if name in sys.stdlib_module_names or name == package.module:
                    continue
                if not declared & {canonicalize_name(home) for home in homes.get(name, [name])}:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong, "imported but not declared in pyproject.toml"


@every_package
def test_presets_and_their_words(package: Distribution) -> None:
    """small and paper exist, are frozen dataclasses, and each field says what it is, once, by the string below it."""
    config = importlib.import_module(f"{package.module}.config")
    assert list(config.PRESETS)[:2] == ["small", "paper"], "small is the default, paper the paper's own setting"
    undocumented = []
    for cls in {type(value) for value in config.PRESETS.values()} | {config.EvaluateOptions}:
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen, f"{cls.__name__} can be changed"
        (found,) = (
            node
            for node in ast.parse((package.source / "config.py").read_text(encoding="utf-8")).body
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__
        )
        for node, after in zip(found.body, [*found.body[1:], None], strict=True):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(node, ast.AnnAssign) and not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                undocumented.append(f"{cls.__name__}.{ast.unparse(node.target)}")
    assert not undocumented


@every_package
def test_installed_is_the_wheel(package: Distribution) -> None:
    """What is tested is what a user installs, not the tree."""
    installed = Path(importlib.import_module(package.module).__file__ or "").resolve()
    assert not installed.is_relative_to(package.folder), "an editable checkout hides what the wheel lacks"
