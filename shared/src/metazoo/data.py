"""Finding data sets and reading files from outside without running anything in them.

Only the standard library is imported here; numpy and huggingface_hub load where they are needed.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from metazoo.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

ENVIRONMENT_VARIABLE = "METAZOO_DATA"

# What numpy and zipfile raise on a damaged or hostile file, beside OSError (also for a missing one).
_BROKEN_FILE = (
    OSError,
    ValueError,  # covers bad headers, refused pickles and wrong sizes
    EOFError,
    KeyError,
    TypeError,
    SyntaxError,
    RuntimeError,  # an encrypted member; covers NotImplementedError, an unknown compression
    MemoryError,  # a header that claims an array larger than memory
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


def find(
    dataset: str,
    files: Sequence[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    hub_id: str | None = None,
) -> Path:
    """Folder that holds all of `files`: in data_dir, else under $METAZOO_DATA, else from the hub.

    Args:
        dataset: the set's folder below $METAZOO_DATA; may be nested ("dynamics/lotka").
        files: the wanted files, relative to that folder.
        data_dir: a folder that holds the files itself, or holds <dataset>/.
        hub_id: id of a hub data set whose root holds the files; only the files named are fetched.

    Raises:
        UserError: data_dir is not a folder, the hub refused, or the files are nowhere.
    """
    candidates: list[Path] = []
    if data_dir is not None:
        given = Path(data_dir)
        # A mistyped --data-dir must not fall back in silence to some other copy.
        if not given.is_dir():
            raise UserError(f"data_dir {str(given)!r}: not a folder: give the folder that holds {_join(files)}")
        candidates += [given, given / dataset]
    root = os.environ.get(ENVIRONMENT_VARIABLE)
    if root:
        candidates.append(Path(root) / dataset)
    for folder in candidates:
        if _holds(folder, files):
            return folder
    if hub_id is not None:
        return _from_hub(hub_id, files)
    looked = f" (looked in {_join([str(folder) for folder in candidates])})" if candidates else ""
    raise UserError(
        f"data set {dataset!r}: {_join(files)} not found{looked}: give the folder with --data-dir, "
        f"or set {ENVIRONMENT_VARIABLE} to a folder with {dataset}/ in it, "
        "or name a hub data set that has these files"
    )


def extract(archive: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Unpack a zip or tar archive into `folder` and return the folder.

    All members are checked before anything is written: each must be a plain file or a folder whose resolved
    path lies inside `folder`. Permissions, owners and times in the archive are ignored.

    Raises:
        UserError: not an archive, a damaged one, or a member that is a link, a device or lies outside.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                _unpack_zip(zipped, archive, folder)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tarred:
                _unpack_tar(tarred, archive, folder)
        else:
            raise UserError(f"{archive}: neither a zip nor a tar archive: fetch it again")
    except UserError:
        raise
    except (*_BROKEN_FILE, tarfile.TarError) as error:
        raise UserError(f"{archive}: could not be unpacked ({_reason(error)}): fetch it again") from error
    return folder


def check_finite(array: ArrayLike, where: str) -> None:
    """Raise UserError naming the first NaN or infinity of `array` by its index; `where` names the array."""
    import numpy as np

    values = np.asarray(array)
    bad = ~np.isfinite(values)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise UserError(
            f"{where}: {values[index]} at index {index} ({int(bad.sum())} of {values.size} are not finite): "
            "remove or replace them"
        )


def load_npz(path: str | os.PathLike[str], keys: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Arrays `keys` of an .npz file; pickles in it are refused, never run.

    Raises:
        UserError: no such file, not an .npz, a damaged one, a key missing, or an array of Python objects.
    """
    import numpy as np

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the path")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise UserError(
                    f"{path}: not an .npz file (truncated, or of another format): write it with numpy.savez"
                )
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                missing = [key for key in keys if key not in stored.files]
                if missing:
                    raise UserError(
                        f"{path}: no array {_join(missing)}; it has {_join(stored.files) or 'none'}: "
                        f"write it with numpy.savez(path, {', '.join(f'{key}=…' for key in keys)})"
                    )
                return {key: _as_array(stored[key]) for key in keys}
    except UserError:
        raise
    except _BROKEN_FILE as error:
        raise UserError(f"{path}: unreadable ({_reason(error)}): write it again with numpy.savez") from error


def _holds(folder: Path, files: Sequence[str]) -> bool:
    return all((folder / file).is_file() for file in files)


def _from_hub(hub_id: str, files: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"hub data set {hub_id!r}: huggingface_hub is missing: pip install huggingface_hub") from error
    try:
        folder = Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # the hub's own errors are subclasses of these two
        raise UserError(
            f"hub data set {hub_id!r}: {_reason(error)}: check the id, the network and the login"
        ) from error
    if not _holds(folder, files):
        raise UserError(f"hub data set {hub_id!r}: lacks some of {_join(files)}: give a set that has them")
    return folder


def _inside(folder: Path, name: str, archive: Path) -> Path:
    """Where member `name` goes; resolve() follows links that stand in the folder already."""
    target = (folder / name).resolve()
    if PurePosixPath(name).is_absolute() or "\\" in name or not target.is_relative_to(folder.resolve()):
        raise UserError(f"{archive}: member {name!r} lies outside the target folder: do not use this archive")
    return target


def _unpack_zip(archive: zipfile.ZipFile, path: Path, folder: Path) -> None:
    def plan() -> Iterator[tuple[zipfile.ZipInfo, Path]]:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was written without Unix modes
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{path}: member {member.filename!r} is a link or device: do not use this archive")
            yield member, _inside(folder, member.filename, path)

    for member, target in list(plan()):
        if member.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            with archive.open(member) as source:
                _write(source, target)


def _unpack_tar(archive: tarfile.TarFile, path: Path, folder: Path) -> None:
    def plan() -> Iterator[tuple[tarfile.TarInfo, Path]]:
        for member in archive.getmembers():
            if not (member.isreg() or member.isdir()):
                raise UserError(f"{path}: member {member.name!r} is a link or device: do not use this archive")
            yield member, _inside(folder, member.name, path)

    members = list(plan())
    # tarfile stops at the last member; only reading on makes gzip compare its checksum.
    assert archive.fileobj is not None
    while archive.fileobj.read(1 << 20):
        pass
    for member, target in members:
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            source = archive.extractfile(member)
            assert source is not None  # a regular file has content
            with source:
                _write(source, target)


def _write(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _as_array(value: object) -> NDArray[Any]:
    import numpy as np

    # A member that is no .npy comes back as raw bytes.
    if not isinstance(value, np.ndarray):
        raise ValueError("a member is not a numpy array")
    return value


def _join(words: Sequence[str]) -> str:
    return ", ".join(words)


def _reason(error: BaseException) -> str:
    """First line of an error's message, for a one-line error of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
