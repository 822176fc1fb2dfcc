"""metazoo.data: where sets are looked for, and files from outside that are damaged or hostile."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metazoo.data import check_finite, extract, find, load_npz
from metazoo.errors import UserError


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAZOO_DATA", raising=False)


def make(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).write_bytes(b"x")
    return folder


# find


def test_import_is_light():
    """Importing the module loads neither numpy nor the hub."""
    code = "import sys, metazoo.data; print({'numpy', 'huggingface_hub', 'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.usefixtures("no_environment")
@pytest.mark.parametrize("below", ["", "dynamics/lotka"])
def test_find_in_data_dir(tmp_path: Path, below: str):
    """data_dir may hold the files itself, or the set's folder, nested names included."""
    folder = make(tmp_path / below, "train.npz", "test.npz")
    assert find("dynamics/lotka", ["train.npz", "test.npz"], data_dir=tmp_path) == folder


def test_find_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """data_dir comes before $METAZOO_DATA; a folder that lacks one file is passed over."""
    monkeypatch.setenv("METAZOO_DATA", str(tmp_path / "root"))
    in_root = make(tmp_path / "root" / "set", "a", "b")
    given = make(tmp_path / "given", "a")
    assert find("set", ["a"], data_dir=given) == given
    assert find("set", ["a", "b"], data_dir=given) == in_root
    assert find("set", ["a"]) == in_root


@pytest.mark.usefixtures("no_environment")
def test_find_nowhere(tmp_path: Path):
    """The one line names the files, the places and the three ways."""
    with pytest.raises(UserError) as caught:
        find("dynamics/lotka", ["train.npz", "test.npz"], data_dir=tmp_path)
    message = one_line(caught)
    for word in (
        "train.npz, test.npz",
        str(tmp_path),
        "--data-dir",
        "METAZOO_DATA",
        "dynamics/lotka/",
        "hub",
    ):
        assert word in message


def test_find_mistyped_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A data_dir that does not exist is an error even where $METAZOO_DATA has the set."""
    monkeypatch.setenv("METAZOO_DATA", str(tmp_path))
    make(tmp_path / "set", "a")
    with pytest.raises(UserError, match="not a folder"):
        find("set", ["a"], data_dir=tmp_path / "typo")


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: object) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@pytest.mark.usefixtures("no_environment")
def test_find_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub comes last, as a data set, and only the wanted files are asked for."""
    asked = []

    def download(repo_id: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, repo_type, allow_patterns))
        return str(make(tmp_path / "cache", *allow_patterns))

    fake_hub(monkeypatch, download)
    here = make(tmp_path / "here", "a")
    assert find("set", ["a"], data_dir=here, hub_id="me/set") == here
    assert not asked
    assert find("set", ["a", "b"], hub_id="me/set") == tmp_path / "cache"
    assert asked == [("me/set", "dataset", ["a", "b"])]


@pytest.mark.usefixtures("no_environment")
@pytest.mark.parametrize("error", [OSError("offline\nmore"), ValueError("bad id"), None])
def test_hub_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None):
    """No network, a bad id and a set without the files each end in one line with the id."""

    def download(*args: object, **kwargs: object) -> str:
        if error:
            raise error
        return str(tmp_path)

    fake_hub(monkeypatch, download)
    with pytest.raises(UserError) as caught:
        find("set", ["a"], hub_id="me/set")
    assert "me/set" in one_line(caught)


# extract


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, link, 0o4777
    return member


def test_extract_zip_and_tar(tmp_path: Path):
    """Files and folders arrive with their bytes; set-user-id bits of the archive do not."""
    write_zip(tmp_path / "a.zip", {"sub/": b"", "sub/one": b"1", "two": b"22"})
    write_tar(tmp_path / "a.tar.gz", [(tar_member("sub/one"), b"1"), (tar_member("two"), b"22")])
    for name in ("a.zip", "a.tar.gz"):
        folder = extract(tmp_path / name, tmp_path / f"out-{name}")
        assert (folder / "sub" / "one").read_bytes() == b"1"
        assert (folder / "two").read_bytes() == b"22"
        assert (folder / "two").stat().st_mode & 0o7111 == 0


@pytest.mark.parametrize("name", ["../evil", "sub/../../evil", "/tmp/evil-absolute", "..\\evil"])
def test_extract_refuses_paths_outside(tmp_path: Path, name: str):
    """A member outside the folder is refused before anything is written, the good member included."""
    write_zip(tmp_path / "a.zip", {"good": b"1", name: b"2"})
    write_tar(tmp_path / "a.tar", [(tar_member("good"), b"1"), (tar_member(name), b"2")])
    for archive in ("a.zip", "a.tar"):
        with pytest.raises(UserError, match="outside") as caught:
            extract(tmp_path / archive, tmp_path / "out")
        one_line(caught)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "a.zip"]
    assert not Path("/tmp/evil-absolute").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_extract_refuses_tar_links(tmp_path: Path, kind: bytes):
    """Links, pipes and devices in a tar are refused, wherever they point."""
    write_tar(tmp_path / "a.tar", [(tar_member("good"), b"1"), (tar_member("link", kind, "good"), b"")])
    with pytest.raises(UserError, match="link or device"):
        extract(tmp_path / "a.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extract_refuses_zip_links(tmp_path: Path):
    """A symbolic link in a zip (a Unix mode in external_attr) is refused."""
    member = zipfile.ZipInfo("link")
    member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member, "/etc")
    with pytest.raises(UserError, match="link or device"):
        extract(tmp_path / "a.zip", tmp_path / "out")


def test_extract_does_not_follow_links_in_the_folder(tmp_path: Path):
    """A link that already stands in the target folder is no way out of it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    write_zip(tmp_path / "a.zip", {"sub/file": b"1"})
    with pytest.raises(UserError, match="outside"):
        extract(tmp_path / "a.zip", tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_extract_damaged(tmp_path: Path):
    """Truncated archives, flipped bytes, other files and missing ones: one line each."""
    noise = np.random.default_rng(0).bytes(5000)
    whole = {
        "a.zip": write_zip(tmp_path / "a.zip", {"x": noise}).read_bytes(),
        "a.tar.gz": write_tar(tmp_path / "a.tar.gz", [(tar_member("x"), noise)]).read_bytes(),
    }
    for name, content in whole.items():
        flipped = bytearray(content)
        flipped[2000] ^= 0xFF
        for damaged in (content[: len(content) // 2], bytes(flipped), b"", b"plain text"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                extract(tmp_path / name, tmp_path / "out")
            assert name in one_line(caught)
    with pytest.raises(UserError):
        extract(tmp_path / "absent.zip", tmp_path / "out")


# check_finite


def test_check_finite_names_the_first_index():
    """The first bad index in reading order, its value and the count."""
    values = np.zeros((3, 4))
    check_finite(values, "x")
    check_finite(np.arange(3), "integers")
    values[2, 0], values[1, 3] = np.inf, np.nan
    with pytest.raises(UserError, match=r"x of train: nan at index \(1, 3\) \(2 of 12") as caught:
        check_finite(values, "x of train")
    one_line(caught)


# load_npz


def test_load_npz(tmp_path: Path):
    """The wanted arrays come back bit for bit, plain and compressed."""
    stored = {"X": np.random.default_rng(0).normal(size=(2, 3)), "t": np.arange(3), "other": np.zeros(1)}
    np.savez(tmp_path / "a.npz", **stored)
    np.savez_compressed(tmp_path / "b.npz", **stored)
    for name in ("a.npz", "b.npz"):
        loaded = load_npz(tmp_path / name, ["X", "t"])
        assert sorted(loaded) == ["X", "t"]
        np.testing.assert_array_equal(loaded["X"], stored["X"])


def test_load_npz_missing_key(tmp_path: Path):
    """Names the missing array, those found and how to write it."""
    np.savez(tmp_path / "a.npz", Y=np.zeros(2), t=np.zeros(2))
    with pytest.raises(UserError) as caught:
        load_npz(tmp_path / "a.npz", ["X", "t"])
    message = one_line(caught)
    assert "no array X" in message
    assert "has Y, t" in message


class Payload:
    """Unpickling this writes the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_load_npz_never_unpickles(tmp_path: Path):
    """A bare pickle named .npz, one as a member and an object array are refused; the payload never runs."""
    marker = tmp_path / "ran"
    payload = pickle.dumps(Payload(marker))
    (tmp_path / "bare.npz").write_bytes(payload)
    write_zip(tmp_path / "member.npz", {"X": payload, "t.npy": b""})
    write_zip(tmp_path / "member-npy.npz", {"X.npy": payload, "t.npy": b""})
    objects = np.empty(1, dtype=object)
    objects[0] = Payload(marker)
    np.savez(tmp_path / "objects.npz", X=objects, t=np.zeros(1))
    for name in ("bare.npz", "member.npz", "member-npy.npz", "objects.npz"):
        with pytest.raises(UserError) as caught:
            load_npz(tmp_path / name, ["X", "t"])
        assert name in one_line(caught)
    assert not marker.exists()
    pickle.loads(payload)  # the payload is a live one
    assert marker.exists()


def test_load_npz_damaged(tmp_path: Path):
    """Every truncation, an .npy, an empty file, a folder and no file: one line each."""
    np.savez(tmp_path / "a.npz", X=np.arange(1000.0))
    whole = (tmp_path / "a.npz").read_bytes()
    np.save(tmp_path / "single.npy", np.zeros(3))
    contents = [whole[: len(whole) * k // 16] for k in range(16)] + [(tmp_path / "single.npy").read_bytes()]
    for content in contents:
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_npz(tmp_path / "a.npz", ["X"])
        one_line(caught)
    for missing in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load_npz(missing, ["X"])


def test_load_npz_claims_too_much(tmp_path: Path):
    """A header that claims an array beyond memory is an error line, not a crash."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2000000000000000, 7), }"
    header += b" " * (117 - len(header)) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    write_zip(tmp_path / "a.npz", {"X.npy": content})
    with pytest.raises(UserError, match="unreadable"):
        load_npz(tmp_path / "a.npz", ["X"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10**6), value=st.integers(0, 255))
def test_load_npz_flipped_byte(tmp_path: Path, where: int, value: int):
    """Any one byte changed: the same array, or a UserError (the zip's checksum covers the content)."""
    X = np.arange(20.0)
    buffer = io.BytesIO()
    np.savez(buffer, X=X)
    content = bytearray(buffer.getvalue())
    content[where % len(content)] = value
    (tmp_path / "a.npz").write_bytes(content)
    try:
        loaded = load_npz(tmp_path / "a.npz", ["X"])
    except UserError:
        return
    np.testing.assert_array_equal(loaded["X"], X)
