"""The repository: nothing in it that belongs to one machine, no list of packages kept by hand, commands that work."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import nox.registry
import pytest
from house import PACKAGES, ROOT, every_distribution
from packaging.requirements import Requirement

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# written so that they do not find themselves
REGISTRIES = re.compile(r"\b(?:py(?:pi|thon[h]osted)|download[.]pytor[c]h|npm[j]s)[.](?:org|com)\b|index-[u]rl")
MACHINES = re.compile(r"(?<![\w.~])/(?:home|Users|root|work|mnt|opt)/\w|\b[A-Z]:\\\\?Users")


def git(*arguments: str, cwd: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def tracked() -> list[Path]:
    """Files in git or about to be; skips the test where there is no repository."""
    try:
        listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_no_lock_file() -> None:
    """constraints.txt says what works together; a lock file would hold addresses and bind users."""
    names = {"uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock", "pylock.toml", "conda-lock.yml"}
    assert not [path.relative_to(ROOT) for path in tracked() if path.name in names or path.suffix == ".lock"]


def test_nothing_of_one_machine() -> None:
    """No registry's host, and no absolute path of a machine, in any text of the repository."""
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), 1):
            if REGISTRIES.search(line) or MACHINES.search(line) or (len(ROOT.parts) > 2 and str(ROOT) in line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_no_large_file() -> None:
    """A data set or a checkpoint that slipped in."""
    assert not [path.relative_to(ROOT) for path in tracked() if path.stat().st_size > 5_000_000]


def test_constraints_are_pins() -> None:
    """Names and exact versions only, each name once."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert len({pin.name for pin in pins}) == len(pins)


@every_distribution
def test_constraints_fit(package: object) -> None:
    """The pinned versions are ones that the package allows, and all that it needs directly is pinned."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = package.pyproject["project"]  # type: ignore[attr-defined]
    for text in [*project["dependencies"], *project["optional-dependencies"].get("test", [])]:
        requirement = Requirement(text)
        if requirement.name != "metazoo":
            pin = pins[requirement.name.replace("_", "-")]
            assert requirement.specifier.contains(pin), f"{text} against {pin}"


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / "noxfile.py", ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_no_list_of_packages(path: Path) -> None:
    """Packages are found by their folders; a list kept by hand forgets the next one."""
    text = path.read_text(encoding="utf-8")
    assert not [package.name for package in PACKAGES if re.search(rf"\b{re.escape(package.name)}\b", text)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows(path: Path) -> None:
    """Actions by full commit with the version beside it, rights stated, one run at a time, a button to start it."""
    text = path.read_text(encoding="utf-8")
    uses = re.findall(r"uses: *(.*)", text)
    assert uses
    assert not [line for line in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)+", line)]
    for key in ("permissions:", "concurrency:"):
        assert re.search(rf"^{key}", text, re.MULTILINE), key
    assert "workflow_dispatch:" in text
    assert "write-all" not in text


def test_same_action_same_commit() -> None:
    """An action is raised everywhere or nowhere."""
    pinned: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for name, commit in re.findall(r"uses: *([\w./-]+)@(\S+)", path.read_text(encoding="utf-8")):
            pinned.setdefault(name, set()).add(commit)
    assert not {name: commits for name, commits in pinned.items() if len(commits) > 1}


def test_readme_commands() -> None:
    """The README's commands name sessions that exist, and .ci/run runs the one for the tests word for word."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if "nox -s" in line]
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE))
    for line in commands:
        named = line.split("nox -s", 1)[1].split(" -- ")[0].split("#")[0].replace('"', "").split()
        assert named
        assert {name.split("(")[0] for name in named} <= sessions, line
    (tests,) = (line for line in commands if " tests " in line and "pip install" in line)
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# --- which packages a change concerns: `nox -s changed` ---


@pytest.fixture
def noxfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """noxfile.py over a small repository of its own, with packages alpha and beta and a branch main."""
    (tmp_path / "shared").mkdir()
    for name in ("alpha", "beta"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "pyproject.toml").touch()
    for name in ("README.md", "constraints.txt", "pyproject.toml", "shared/x.py", "packages/alpha/x.py"):
        (tmp_path / name).write_text(f"{name}\n")
    shutil.copy(ROOT / "noxfile.py", tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    git("init", "--quiet", "--initial-branch=main", cwd=tmp_path)
    git("config", "user.name", "test", cwd=tmp_path)
    git("config", "user.email", "test@example.com", cwd=tmp_path)
    commit(tmp_path)
    git("checkout", "--quiet", "-b", "work", cwd=tmp_path)
    nox.registry.reset()  # sessions of the same names, from the test before
    spec = importlib.util.spec_from_file_location("noxfile_under_test", tmp_path / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    spec.loader.exec_module(module)
    return module


def commit(root: Path) -> None:
    git("add", "--all", cwd=root)
    git("commit", "--quiet", "--message", "change", cwd=root)


ALL = ["shared", "alpha", "beta"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["packages/alpha/x.py"], ["alpha"]),
        (["packages/beta/README.md"], ["beta"]),
        (["packages/beta/new.py", "packages/alpha/new.py"], ["alpha", "beta"]),
        (["README.md"], []),
        (["tests/test_rooms.py", "packages/beta/new.py"], ["beta"]),
        (["shared/x.py"], ALL),
        (["noxfile.py"], ALL),
        (["constraints.txt"], ALL),
        (["pyproject.toml"], ALL),
        ([".github/workflows/ci.yml"], ALL),
        (["something/else.txt"], ALL),
        (["packages/gamma/x.py"], ALL),
        (["packages/x.py"], ALL),
        ([], ALL),
    ],
)
@pytest.mark.parametrize("committed", [True, False])
def test_changed(noxfile: ModuleType, files: list[str], expected: list[str], committed: bool) -> None:
    """A package by its folder, nothing by the root's texts, all by what all share or by doubt."""
    for name in files:
        path = noxfile.ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("\n")
    if files and committed:
        commit(noxfile.ROOT)
    assert noxfile.changes("main") == expected


def test_changed_follows_a_move(noxfile: ModuleType) -> None:
    """A file that moves concerns the package that it left, too."""
    git("mv", "packages/alpha/x.py", "packages/beta/x.py", cwd=noxfile.ROOT)
    commit(noxfile.ROOT)
    assert noxfile.changes("main") == ["alpha", "beta"]


def test_changed_in_doubt(noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown revision, one that looks like an option, and a folder outside git all mean all packages."""
    (noxfile.ROOT / "packages" / "alpha" / "x.py").write_text("changed\n")
    assert noxfile.changes("main") == ["alpha"]
    assert noxfile.changes("no/such-branch") == ALL
    assert noxfile.changes("--output=x") == ALL
    assert not (noxfile.ROOT / "x").exists()
    shutil.rmtree(noxfile.ROOT / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(noxfile.ROOT.parent))
    assert noxfile.changes("main") == ALL
