"""Lists of labelled videos, as data sets have them: Kinetics, UCF-101, HMDB-51, SSv2, a table, folders."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metazoo.errors import UserError

EXTENSIONS = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".mpg", ".mpeg", ".npy")


@dataclass(frozen=True)
class Listed:
    """Videos of a data set.

    Attributes:
        paths: [N] of files or folders of frames; they need not be there.
        labels: [N] class names.
        splits: [N] "train" or "test".
    """

    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    splits: tuple[str, ...]

    def of(self, split: str, classes: Iterable[str]) -> tuple[list[Path], list[str]]:
        """Paths and labels of a split's videos of some classes, in order."""
        wanted = set(classes)
        rows = [
            (path, label)
            for path, label, held in zip(self.paths, self.labels, self.splits, strict=True)
            if held == split and label in wanted
        ]
        return [path for path, _ in rows], [label for _, label in rows]

    @property
    def classes(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(set(self.labels)))

    def frequent(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The half of the classes with the most training videos, and the others; of equals the first by name.

        Raises:
            UserError: fewer than two classes.
        """
        counts = Counter(label for label, split in zip(self.labels, self.splits, strict=True) if split == "train")
        ordered = sorted(self.classes, key=lambda name: (-counts[name], name))
        if len(ordered) < 2:
            raise UserError("--split frequent: there is one class: give videos of more")
        half = (len(ordered) + 1) // 2
        return tuple(sorted(ordered[:half])), tuple(sorted(ordered[half:]))


def read(dataset: str, data_dir: Path | None, number: int = 1) -> Listed:
    """Of a data set by name, a .csv, or a folder of class folders.

    Raises:
        UserError: no such file or folder, or a row that is not understood; it names the line.
    """
    if dataset in ("kinetics", "ucf101", "hmdb51", "ssv2"):
        assert data_dir is not None
        if not data_dir.is_dir():
            raise UserError(f"--data-dir {data_dir}: no such folder: give the one of {dataset}'s videos and lists")
        reader = {"kinetics": kinetics, "ucf101": ucf101, "hmdb51": hmdb51, "ssv2": ssv2}[dataset]
        return reader(data_dir, number)
    path = Path(dataset)
    if path.is_dir():
        return folders(path)
    if path.suffix != ".csv" or not path.is_file():
        raise UserError(f"--dataset {dataset}: no such .csv or folder; or one of features, sprites, kinetics, ucf101, "
                        "hmdb51, ssv2")  # fmt: skip
    return table(path, data_dir or path.parent)


def table(path: Path, folder: Path) -> Listed:
    """A .csv with columns video, label and, if any, split (train or test; all train without it)."""
    held = rows(path, ("video", "label"))
    splits = [(row.get("split") or "train").strip().lower() for _, row in held]
    splits = ["test" if split in ("val", "validation", "test") else split for split in splits]
    for (line, _), split in zip(held, splits, strict=True):
        if split not in ("train", "test"):
            raise UserError(f"{path}, line {line}: split is {split!r}: give train or test")
    return _listed(path, [folder / row["video"].strip() for _, row in held], [row["label"] for _, row in held], splits)


def folders(path: Path) -> Listed:
    """A folder with train/ and test/ (or val/), or none of these, and in it a folder of videos for each class."""
    kinds = {"train": "train", "val": "test", "valid": "test", "validation": "test", "test": "test"}
    parts = {kind: path / kind for kind in kinds if (path / kind).is_dir()} or {"train": path}
    paths, labels, splits = [], [], []
    for kind, part in parts.items():
        split = kinds[kind]
        for folder in sorted(one for one in part.iterdir() if one.is_dir()):
            for video in sorted(folder.iterdir()):
                if video.suffix.lower() in EXTENSIONS or video.is_dir():
                    paths.append(video)
                    labels.append(folder.name.replace("_", " "))
                    splits.append(split)
    if not paths:
        raise UserError(f"{path}: no videos: put them into a folder for each class ({', '.join(EXTENSIONS)}, or "
                        "folders of frames)")  # fmt: skip
    return _listed(path, paths, labels, splits)


def kinetics(folder: Path, number: int = 1) -> Listed:
    """train.csv and val.csv or test.csv with columns label, youtube_id, time_start, time_end.

    A video is SPLIT/LABEL/ID_START_END.mp4, LABEL/…, SPLIT/ID_START_END.mp4, or ID_START_END.mp4 in the folder.
    """
    paths: list[Path] = []
    labels: list[str] = []
    splits: list[str] = []
    for name, split in (("train", "train"), ("val", "test"), ("test", "test")):
        file = folder / f"{name}.csv"
        if not file.is_file() or (name == "test" and "test" in splits):
            continue
        for line, row in rows(file, ("label", "youtube_id", "time_start", "time_end")):
            try:
                stem = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
            except (ValueError, OverflowError) as error:
                raise UserError(f"{file}, line {line}: time_start and time_end are no numbers of seconds") from error
            label = row["label"].strip()
            places = (
                folder / name / label, folder / name / label.replace(" ", "_"), folder / label, folder / name, folder
            )  # fmt: skip
            held = [place / f"{stem}.mp4" for place in places]
            paths.append(next((path for path in held if path.is_file()), held[0]))
            labels.append(label)
            splits.append(split)
    if not paths:
        raise UserError(f"{folder}: no train.csv, val.csv or test.csv of Kinetics in it: put the official lists there")
    return _listed(folder, paths, labels, splits)


def ucf101(folder: Path, number: int = 1) -> Listed:
    """classInd.txt, trainlist0N.txt, testlist0N.txt, there or in ucfTrainTestlist/ or splits/; names become words."""
    lists = _with(folder, f"trainlist{number:02d}.txt", "ucfTrainTestlist", "splits")
    paths: list[Path] = []
    labels: list[str] = []
    splits: list[str] = []
    for split in ("train", "test"):
        file = _needed(lists / f"{split}list{number:02d}.txt")
        for number_of_line, line in _lines(file):
            video = line.split()[0]
            if "/" not in video:
                raise UserError(f"{file}, line {number_of_line}: {line!r}: give Class/video.avi, and a number or none")
            paths.append(_first(folder / video, folder / "UCF-101" / video, folder / "videos" / video))
            labels.append(words(video.split("/")[0]))
            splits.append(split)
    return _listed(folder, paths, labels, splits)


def hmdb51(folder: Path, number: int = 1) -> Listed:
    """CLASS_test_splitN.txt with lines "video.avi 1" (1 train, 2 test, 0 neither).

    They are in the folder, in testTrainMulti_7030_splits/ or in splits/.
    """
    places = [place for place in (folder, folder / "testTrainMulti_7030_splits", folder / "splits") if place.is_dir()]
    files = [file for place in places for file in sorted(place.glob(f"*_test_split{number}.txt"))]
    if not files:
        raise UserError(f"{folder}: no *_test_split{number}.txt of HMDB-51 in it: put the official lists there")
    paths: list[Path] = []
    labels: list[str] = []
    splits: list[str] = []
    for file in files:
        name = re.sub(r"_test_split\d+\.txt$", "", file.name)
        for number_of_line, line in _lines(file):
            parts = line.split()
            if len(parts) != 2 or parts[1] not in ("0", "1", "2"):
                raise UserError(f"{file}, line {number_of_line}: {line!r}: give a video and 0, 1 or 2")
            if parts[1] != "0":
                paths.append(_first(folder / name / parts[0], folder / "videos" / name / parts[0], folder / parts[0]))
                labels.append(name.replace("_", " "))
                splits.append("train" if parts[1] == "1" else "test")
    return _listed(folder, paths, labels, splits)


def ssv2(folder: Path, number: int = 1) -> Listed:
    """something-something-v2-train.json and -validation.json, there or in labels/; videos are ID.webm."""
    lists = _with(folder, "something-something-v2-train.json", "labels", "annotations")
    paths: list[Path] = []
    labels: list[str] = []
    splits: list[str] = []
    for name, split in (("train", "train"), ("validation", "test")):
        file = _needed(lists / f"something-something-v2-{name}.json")
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
            held = [(str(row["id"]), row["template"].replace("[", "").replace("]", "")) for row in entries]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not a list of entries with id and template") from error
        for video, label in held:
            file_name = f"{video}.webm"
            paths.append(
                _first(folder / file_name, folder / "20bn-something-something-v2" / file_name,
                       folder / "videos" / file_name)
            )  # fmt: skip
            labels.append(label)
            splits.append(split)
    return _listed(folder, paths, labels, splits)


def words(name: str) -> str:
    """ApplyEyeMakeup -> apply eye makeup; YoYo -> yo yo; TaiChi -> tai chi."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


def names_in(path: Path) -> tuple[str, ...]:
    """Class names, one a line.

    Raises:
        UserError: no such file, no names, or one that comes twice.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: give one with a class name a line")
    found = [line.strip() for _, line in _lines(path)]
    if not found:
        raise UserError(f"{path} is empty: give a class name a line")
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise UserError(f"{path}: {twice[0]!r} comes twice: give each class once")
    return tuple(found)


def check_split(base: Sequence[str], novel: Sequence[str], known: Iterable[str]) -> None:
    """Raise UserError unless base and novel classes are apart, and all of them known."""
    if both := sorted(set(base) & set(novel)):
        raise UserError(f"{both[0]!r} is among base and novel classes ({len(both)} are): a class is one or the other")
    if unknown := sorted({*base, *novel} - set(known)):
        raise UserError(f"class {unknown[0]!r} has no videos ({len(unknown)} of them): write it as the data set does")


def rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """Of a .csv with a header, each with its line.

    Raises:
        UserError: not such a file, a column or a value of these is missing, or there are more values than columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = reader.fieldnames or []
            if missing := [column for column in columns if column not in header]:
                raise UserError(f"{path}: no column {missing[0]!r}: give {', '.join(columns)}")
            held = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a .csv in UTF-8") from error
    if not held:
        raise UserError(f"{path}: no rows below the header")
    for line, row in held:
        if empty := [column for column in columns if not (row[column] or "").strip()]:
            raise UserError(f"{path}, line {line}: {empty[0]} is empty")
        if None in row:
            raise UserError(f"{path}, line {line}: more values than columns: put quotes around one with a comma")
    return held


def _lines(path: Path) -> list[tuple[int, str]]:
    """What is not empty, with its number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8") from error


def _listed(where: Path, paths: Sequence[Path], labels: Sequence[str], splits: Sequence[str]) -> Listed:
    if not paths:
        raise UserError(f"{where}: its lists name no videos")
    return Listed(tuple(paths), tuple(label.strip() for label in labels), tuple(splits))


def _with(folder: Path, file: str, *inside: str) -> Path:
    return next((folder / name for name in inside if (folder / name / file).is_file()), folder)


def _needed(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such list: put the official lists into the folder")
    return path


def _first(*paths: Path) -> Path:
    return next((path for path in paths if path.exists()), paths[0])
