# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2026.10", "uv>=0.9"]
# ///
"""Sessions of the monorepo. The packages are the folders under packages/; nothing lists them by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nox

nox.needs_version = ">=2026.10"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "tests", "repo", "together"]

ROOT = Path(__file__).resolve().parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
FOLDERS = {"shared": ROOT / "shared", **{name: ROOT / "packages" / name for name in PACKAGES}}
CONSTRAINTS = ROOT / "constraints.txt"
# Extras that a folder's tests need. shared's sweep is shown on a local Dask cluster.
EXTRAS = {"shared": "test,dask"}

# Imports every module of those named, in a Python that sees neither the tree nor the user's packages (-I).
IMPORT_ALL = """\
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    inner = [m.name for m in pkgutil.walk_packages(package.__path__, name + ".")]
    for module in inner:
        importlib.import_module(module)
    print(f"{name}: {1 + len(inner)} modules imported from {package.__path__[0]}")
"""

each_folder = nox.parametrize("package", list(FOLDERS), ids=list(FOLDERS))


@nox.session
@each_folder
def tests(session: nox.Session, package: str) -> None:
    """Tests of shared or of one package: its wheel alone in an environment of its own."""
    install(session, [package], extras=EXTRAS.get(package, "test"))
    session.run("python", "-I", "-c", IMPORT_ALL, "metazoo", *modules([package]))
    pytest(session, package, "not faults and not gpu and not browser")


@nox.session
def repo(session: nox.Session) -> None:
    """The contract (tests/) for every package found, their wheels together in one environment."""
    install(session, PACKAGES, "pytest", "nox", extras="")
    quiet(session)
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", "tests", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, and the workflows against their JSON schema; no network but for the installation."""
    prepare(session)
    session.install("-c", str(CONSTRAINTS), "ruff", "check-jsonschema")
    session.run("ruff", "check", "--no-cache", ".")
    session.run("ruff", "format", "--no-cache", "--check", ".")
    workflows = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(".github/workflows/*.yml"))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, on what all packages share."""
    install(session, ["shared"], "mypy", extras="dask")
    session.run("mypy", *(session.posargs or ["shared/src/metazoo"]))


@nox.session(reuse_venv=True)
def reproduce(session: nox.Session) -> None:
    """Measure a package's claims: -- NAME [options of `NAME reproduce`]; results in runs/NAME."""
    name, *options = session.posargs or [""]
    if name not in PACKAGES:
        session.error(f"name a package: nox -s reproduce -- {{{'|'.join(PACKAGES)}}} [--claim all …]")
    install(session, [name], extras="")
    if not any(option.startswith(("--output-dir", "--output_dir")) for option in options):
        options += ["--output-dir", str(Path("runs") / name)]
    session.run(name, "reproduce", *options)


@nox.session(reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Benchmarks: -- NAME|shared [SCRIPT [arguments]]; all but official_* (a peer's own setting) and tuning (hours)."""
    name, *arguments = session.posargs or [""]
    if name not in FOLDERS:
        session.error(f"name a folder: nox -s bench -- {{{'|'.join(FOLDERS)}}} [SCRIPT [arguments]]")
    scripts = {path.stem: path for path in sorted((FOLDERS[name] / "benchmarks").glob("*.py"))}
    chosen = [stem for stem in scripts if not stem.startswith(("official", "tuning"))]
    if arguments:
        chosen, arguments = [arguments[0].removesuffix(".py")], arguments[1:]
    if not chosen or chosen[0] not in scripts:
        session.error(f"no such benchmark: {name} has {', '.join(scripts) or 'none'}")
    install(session, [name], extras="test")
    for stem in chosen:
        session.run("python", str(scripts[stem]), *arguments)


@nox.session
def report(session: nox.Session) -> None:
    """Write the evidence into all READMEs from results/small.json; `-- --check` only compares."""
    install(session, PACKAGES, extras="")
    session.run("python", "tests/readmes.py", *session.posargs)


@nox.session
@each_folder
def faults(session: nox.Session, package: str) -> None:
    """The long fault tests: killed at twenty moments, resumed each time, compared bit for bit."""
    install(session, [package], extras="test")
    pytest(session, package, "faults", none_is_fine=True)


@nox.session
@each_folder
def gpu(session: nox.Session, package: str) -> None:
    """Tests marked gpu, on a machine that has one."""
    install(session, [package], extras="test")
    pytest(session, package, "gpu", none_is_fine=True)


@nox.session
@each_folder
def browser(session: nox.Session, package: str) -> None:
    """Tests marked browser, where a Chromium is installed."""
    install(session, [package], extras="test,browser")
    pytest(session, package, "browser", none_is_fine=True)


@nox.session
@each_folder
def lowest(session: nox.Session, package: str) -> None:
    """The lowest direct versions that a package claims, proved by its tests; torch stays at the pinned version."""
    if session.venv_backend != "uv":
        session.error("lowest needs uv, as pip cannot resolve to the lowest versions: pip install uv")
    project = tomllib.loads((FOLDERS[package] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # named here, as uv takes what a wheel asks for as indirect
    direct = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    direct = [requirement for requirement in direct if not requirement.startswith("metazoo")]
    prepare(session)
    session.install("-c", str(CONSTRAINTS), "torch")
    version = session.run("python", "-c", "import importlib.metadata as m; print(m.version('torch'))", silent=True)
    with temporary_folder() as folder:
        held = folder / "torch.txt"
        held.write_text(f"torch=={version}")  # with its local part: the lowest build of a version may be CUDA's
        install(session, [package], *direct, "--resolution", "lowest-direct", extras="test", constraints=held)
    session.run("uv", "pip", "list")
    pytest(session, package, "not faults and not gpu and not browser")


@nox.session
def together(session: nox.Session) -> None:
    """All wheels in one environment: dependencies agree, every module imports."""
    install(session, PACKAGES, extras="")
    session.run("python", "-I", "-c", IMPORT_ALL, "metazoo", *modules(PACKAGES))
    check = ["uv", "pip", "check"] if session.venv_backend == "uv" else ["python", "-m", "pip", "check"]
    session.run(*check)


@nox.session
def build(session: nox.Session) -> None:
    """Source distribution and wheel of all, or of those named by positional arguments, into dist/."""
    wrong = [name for name in session.posargs if name not in FOLDERS]
    if wrong:
        session.error(f"unknown: {', '.join(wrong)}; one of {', '.join(FOLDERS)}")
    prepare(session)
    session.install("-c", str(CONSTRAINTS), "build", "hatchling")
    for name in session.posargs or FOLDERS:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(ROOT / "dist"), str(FOLDERS[name]))


@nox.session(venv_backend="none")
def changed(session: nox.Session) -> None:
    """JSON for a matrix: what differs from a git revision (`-- REVISION`, default origin/main); all on any doubt."""
    print(json.dumps(changes(session.posargs[0] if session.posargs else "origin/main")))


def prepare(session: nox.Session) -> None:
    """The same for pip and uv, and nothing of the user's own Python."""
    if links := os.environ.get("PIP_FIND_LINKS"):
        session.env.setdefault("UV_FIND_LINKS", ",".join(links.split()))
    session.env["PYTHONNOUSERSITE"] = "1"
    session.env["PYTHONPATH"] = None
    session.env["PYTHONDONTWRITEBYTECODE"] = None  # each command would compile torch anew
    if data := os.environ.get("METAZOO_DATA"):
        session.env["METAZOO_DATA"] = str((Path(session.invoked_from) / data).resolve())


def install(session: nox.Session, names: list[str], *more: str, extras: str, constraints: Path = CONSTRAINTS) -> None:
    """Build the wheels of shared and of ``names`` and install these alone, with what they require.

    Args:
        session: whose environment takes them.
        names: folders among FOLDERS.
        more: further requirements or options of the installer.
        extras: of the folders named, comma-separated; of shared where none is.
        constraints: versions to keep to.
    """
    prepare(session)
    with temporary_folder() as folder:
        wheels = {name: wheel(session, name, folder) for name in dict.fromkeys(["shared", *names])}
        # a kept environment holds the wheel of another day under the same version
        session.install("--no-deps", "--force-reinstall", *map(str, wheels.values()))
        bracket = f"[{extras}]" if extras else ""
        wanted = [
            f"{path.name.split('-')[0].replace('_', '-')}{bracket if name in names else ''} @ {path.as_uri()}"
            for name, path in wheels.items()
        ]
        session.install("-c", str(constraints), *wanted, *more)


def wheel(session: nox.Session, name: str, folder: Path) -> Path:
    """Build one wheel as others will get it: without the workspace's sources, in an environment of its own."""
    out = folder / name
    source = str(FOLDERS[name])
    if session.venv_backend == "uv":
        limits = ["--build-constraints", str(CONSTRAINTS)]
        session.run("uv", "build", "--quiet", "--wheel", "--no-sources", *limits, "--out-dir", str(out), source)
    else:
        session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), source)
    (built,) = out.glob("*.whl")
    return built


def modules(names: list[str]) -> list[str]:
    """Import names of the packages among ``names``."""
    return [name.replace("-", "_") for name in names if name in PACKAGES]


def pytest(session: nox.Session, package: str, marks: str, *, none_is_fine: bool = False) -> None:
    """Run a copy of the folder's tests outside the tree, so that the installed wheel is what is tested.

    Files of tests run side by side, on up to four cores (`-- -n 0`: one after the other); a GPU or a browser has one
    user at a time.
    """
    quiet(session)
    session.install("-c", str(CONSTRAINTS), "pytest-xdist")
    workers = 0 if marks in ("gpu", "browser") else min(os.cpu_count() or 1, 4)
    with temporary_folder() as folder:
        shutil.copytree(FOLDERS[package] / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        with session.chdir(folder):
            session.run(
                *("python", "-m", "pytest", "-c", "pyproject.toml", "-p", "no:cacheprovider", "-m", marks, "tests"),
                *("-n", str(workers), "--dist", "loadfile"),
                *session.posargs,
                success_codes=[0, 5] if none_is_fine else [0],  # 5: nothing has the mark
            )


def quiet(session: nox.Session) -> None:
    """One thread a process unless told otherwise: the tests are small and many processes share the cores."""
    session.env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder outside the tree."""
    with tempfile.TemporaryDirectory(prefix="metazoo-") as folder:
        yield Path(folder).resolve()


def changes(base: str) -> list[str]:
    """Names in FOLDERS whose files differ from the merge base with ``base``, in commits or in the work tree.

    A package differs by its own folder. The contract's tests and the root's texts concern no package alone.
    Everything else does concern all: shared/, the settings, the workflows. So does doubt: no git, an unknown
    revision, a shallow clone without the merge base, no difference at all (as on main itself).
    """
    files: list[str] = []
    for command in (
        ["diff", "--name-only", "-z", "--no-renames", "--merge-base", "--end-of-options", base],
        ["ls-files", "--others", "--exclude-standard", "-z"],
    ):
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return list(FOLDERS)
        files += filter(None, done.stdout.split("\0"))
    found = set()
    for path in map(Path, files):
        top, *rest = path.parts
        if top == "packages" and len(rest) > 1 and rest[0] in PACKAGES:
            found.add(rest[0])
        elif not (top in ("tests", "LICENSE", ".gitignore") or (not rest and path.suffix == ".md")):
            return list(FOLDERS)
    return sorted(found) if files else list(FOLDERS)


if __name__ == "__main__":
    nox.main()
