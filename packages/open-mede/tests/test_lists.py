"""Lists of videos as data sets publish them: paths, labels, splits; what is wrong is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from metazoo.errors import UserError
from open_mede import lists
from open_mede.lists import Listed


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def empty(*paths: Path) -> None:
    for path in paths:
        written(path, "")


def shown(listed: Listed, root: Path) -> list[tuple[str, str, str]]:
    """Path below the root, label, split."""
    rows = zip(listed.paths, listed.labels, listed.splits, strict=True)
    return [(path.relative_to(root).as_posix(), label, split) for path, label, split in rows]


# ---- Kinetics

KINETICS = """label,youtube_id,time_start,time_end,split
abseiling,0347ZoDXyP0,95,105,train
"tango, dancing",-3B32lodo2M,9,19,train
air drumming,abc_def-gh1,1.0,11.0,train
"""


def test_kinetics(tmp_path: Path) -> None:
    """Times have six digits in file names, as the official crops have; val.csv is the test."""
    written(tmp_path / "train.csv", KINETICS)
    written(tmp_path / "val.csv", "youtube_id,time_start,time_end,label,is_cc\nxyz,1003,1013,abseiling,0\n")
    written(tmp_path / "test.csv", "label,youtube_id,time_start,time_end\nabseiling,other,0,10\n")
    found = lists.read("kinetics", tmp_path)
    assert shown(found, tmp_path) == [
        ("train/abseiling/0347ZoDXyP0_000095_000105.mp4", "abseiling", "train"),
        ("train/tango, dancing/-3B32lodo2M_000009_000019.mp4", "tango, dancing", "train"),
        ("train/air drumming/abc_def-gh1_000001_000011.mp4", "air drumming", "train"),
        ("val/abseiling/xyz_001003_001013.mp4", "abseiling", "test"),
    ]  # fmt: skip
    assert found.classes == ("abseiling", "air drumming", "tango, dancing")


@pytest.mark.parametrize("place", ["train/air drumming", "train/air_drumming", "air drumming", "train", "."])
def test_kinetics_places(tmp_path: Path, place: str) -> None:
    """Wherever the usual download scripts put a video."""
    written(tmp_path / "train.csv", KINETICS)
    video = tmp_path / place / "abc_def-gh1_000001_000011.mp4"
    empty(video)
    assert lists.kinetics(tmp_path).paths[2].resolve() == video.resolve()


def test_kinetics_test_list(tmp_path: Path) -> None:
    """Without val.csv it is test.csv."""
    written(tmp_path / "test.csv", "label,youtube_id,time_start,time_end\nabseiling,other,0,10\n")
    assert shown(lists.kinetics(tmp_path), tmp_path) == [
        ("test/abseiling/other_000000_000010.mp4", "abseiling", "test")
    ]


# ---- UCF-101


@pytest.mark.parametrize("below", [".", "ucfTrainTestlist", "splits"])
def test_ucf101(tmp_path: Path, below: str) -> None:
    """Training lists have numbers of classes, test lists have none; lists may end lines as Windows does."""
    held = tmp_path / below
    written(held / "classInd.txt", "1 ApplyEyeMakeup\n2 YoYo\n")
    written(
        held / "trainlist01.txt",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nYoYo/v_YoYo_g08_c01.avi 2\r\n",
    )
    written(held / "testlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n\nYoYo/v_YoYo_g01_c01.avi\n")
    written(held / "trainlist02.txt", "YoYo/v_YoYo_g03_c01.avi 2\n")
    written(held / "testlist02.txt", "YoYo/v_YoYo_g04_c01.avi\n")
    assert shown(lists.read("ucf101", tmp_path), tmp_path) == [
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "apply eye makeup", "train"),
        ("YoYo/v_YoYo_g08_c01.avi", "yo yo", "train"),
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "apply eye makeup", "test"),
        ("YoYo/v_YoYo_g01_c01.avi", "yo yo", "test"),
    ]
    assert [path.name for path in lists.read("ucf101", tmp_path, 2).paths] == [
        "v_YoYo_g03_c01.avi", "v_YoYo_g04_c01.avi"
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["YoYo", "UCF-101/YoYo", "videos/YoYo"])
def test_ucf101_places(tmp_path: Path, place: str) -> None:
    written(tmp_path / "trainlist01.txt", "YoYo/v_YoYo_g08_c01.avi 101\n")
    written(tmp_path / "testlist01.txt", "YoYo/v_YoYo_g09_c01.avi\n")
    empty(tmp_path / place / "v_YoYo_g08_c01.avi")
    assert lists.ucf101(tmp_path).paths[0] == tmp_path / place / "v_YoYo_g08_c01.avi"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"), ("YoYo", "yo yo"), ("TaiChi", "tai chi"), ("Biking", "biking"),
        ("HandstandPushups", "handstand pushups"), ("TVWatching", "tv watching"), ("Top10Moves", "top 10 moves"),
        ("brush_hair", "brush hair"), ("BMX", "bmx"),
    ],
)  # fmt: skip
def test_words(name: str, said: str) -> None:
    assert lists.words(name) == said


# ---- HMDB-51


@pytest.mark.parametrize("below", [".", "testTrainMulti_7030_splits", "splits"])
def test_hmdb51(tmp_path: Path, below: str) -> None:
    """1 trains, 2 tests, 0 does neither; the official lines end with a blank."""
    written(
        tmp_path / below / "brush_hair_test_split1.txt",
        "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 \nbrush&hair_#2_med_1.avi 2 \nleft_out.avi 0 \n",
    )
    written(tmp_path / below / "wave_test_split1.txt", "a_wave.avi 1 \n")
    written(tmp_path / below / "wave_test_split2.txt", "b_wave.avi 2 \n")
    empty(tmp_path / "videos" / "wave" / "a_wave.avi")
    assert shown(lists.read("hmdb51", tmp_path), tmp_path) == [
        ("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "brush hair", "train"),
        ("brush_hair/brush&hair_#2_med_1.avi", "brush hair", "test"),
        ("videos/wave/a_wave.avi", "wave", "train"),
    ]
    assert shown(lists.read("hmdb51", tmp_path, 2), tmp_path) == [("wave/b_wave.avi", "wave", "test")]


# ---- Something-Something v2


@pytest.mark.parametrize("below", [".", "labels", "annotations"])
def test_ssv2(tmp_path: Path, below: str) -> None:
    """Templates lose their brackets, which are places of objects' names."""
    rows = [
        {"id": "78687", "label": "holding potato", "template": "Holding [something] next to [something]",
         "placeholders": ["potato"]},
        {"id": 42326, "label": "putting cup", "template": "Pretending to put [something] onto [something]"},
    ]  # fmt: skip
    written(tmp_path / below / "something-something-v2-train.json", json.dumps(rows))
    written(tmp_path / below / "something-something-v2-validation.json", json.dumps(rows[:1]))
    empty(tmp_path / "20bn-something-something-v2" / "42326.webm")
    assert shown(lists.read("ssv2", tmp_path), tmp_path) == [
        ("78687.webm", "Holding something next to something", "train"),
        ("20bn-something-something-v2/42326.webm", "Pretending to put something onto something", "train"),
        ("78687.webm", "Holding something next to something", "test"),
    ]


# ---- tables and folders


def test_table(tmp_path: Path) -> None:
    """Columns in any order, others left alone; a BOM as Excel writes it; quotes and commas in labels; blank lines."""
    table = written(
        tmp_path / "videos.csv",
        'label,video,split,note\n"pushing, slowly",a.mp4,train,x\n"say ""hi""",  b c.mp4 ,TEST,\n\n'
        "wave ,sub/c.npy,val,y\nwave,d.mp4,validation,\nwave,e.mp4,,\n",
        encoding="utf-8-sig",
    )
    assert shown(lists.read(str(table), None), tmp_path) == [
        ("a.mp4", "pushing, slowly", "train"),
        ("b c.mp4", 'say "hi"', "test"),
        ("sub/c.npy", "wave", "test"),
        ("d.mp4", "wave", "test"),
        ("e.mp4", "wave", "train"),
    ]


def test_table_without_split(tmp_path: Path) -> None:
    """All train; videos are in --data-dir where it is given, or where an absolute path says."""
    table = written(tmp_path / "t.csv", f"video,label\na.mp4,wave\n{tmp_path / 'b.mp4'},wave\n")
    found = lists.read(str(table), tmp_path / "elsewhere")
    assert found.splits == ("train", "train")
    assert found.paths == (tmp_path / "elsewhere" / "a.mp4", tmp_path / "b.mp4")


def test_folders(tmp_path: Path) -> None:
    """Files of known types and folders of frames, sorted; names of folders are classes."""
    empty(*(tmp_path / name for name in ("open_door/b.mp4", "open_door/a.AVI", "open_door/notes.txt", "wave/c.npy")))
    (tmp_path / "wave" / "frames").mkdir()
    empty(tmp_path / "readme.md")
    assert shown(lists.read(str(tmp_path), None), tmp_path) == [
        ("open_door/a.AVI", "open door", "train"), ("open_door/b.mp4", "open door", "train"),
        ("wave/c.npy", "wave", "train"), ("wave/frames", "wave", "train"),
    ]  # fmt: skip


def test_folders_with_splits(tmp_path: Path) -> None:
    empty(*(tmp_path / name for name in ("train/wave/a.mp4", "test/wave/b.webm", "test/nod/c.mkv")))
    assert shown(lists.read(str(tmp_path), None), tmp_path) == [
        ("train/wave/a.mp4", "wave", "train"), ("test/nod/c.mkv", "nod", "test"), ("test/wave/b.webm", "wave", "test"),
    ]  # fmt: skip


# ---- what is asked of a list


def listed(*rows: tuple[str, str]) -> Listed:
    return Listed(
        tuple(Path(f"{i}.mp4") for i in range(len(rows))),
        tuple(label for label, _ in rows), tuple(split for _, split in rows),
    )  # fmt: skip


def test_of() -> None:
    found = listed(("a", "train"), ("b", "train"), ("a", "test"), ("c", "train"), ("a", "train"))
    assert found.of("train", ["c", "a"]) == ([Path("0.mp4"), Path("3.mp4"), Path("4.mp4")], ["a", "c", "a"])
    assert found.of("test", ["b"]) == ([], [])


def test_frequent() -> None:
    """Training videos count and test videos do not; equals by name; the odd class is with the first half."""
    rows = [("a", "test")] * 9 + [("b", "train")] * 3 + [("d", "train")] * 2 + [("c", "train")] * 2 + [("a", "train")]
    assert listed(*rows).frequent() == (("b", "c"), ("a", "d"))
    assert listed(*rows, ("e", "test")).frequent() == (("b", "c", "d"), ("a", "e"))
    with pytest.raises(UserError, match="--split frequent: there is one class"):
        listed(("a", "train")).frequent()


def test_names_in(tmp_path: Path) -> None:
    path = written(tmp_path / "names.txt", "open door\n\n  wave \nsay, hi\n", encoding="utf-8-sig")
    assert lists.names_in(path) == ("open door", "wave", "say, hi")


@pytest.mark.parametrize(
    ("text", "says"), [("a\nb\n a\n", r"names\.txt: 'a' comes twice"), ("\n \n", r"names\.txt is empty")]
)
def test_wrong_names(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        lists.names_in(written(tmp_path / "names.txt", text))


def test_no_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        lists.names_in(tmp_path / "none.txt")


def test_check_split() -> None:
    lists.check_split(["a"], ["b"], ["a", "b", "c"])
    with pytest.raises(UserError, match=r"'a' is among base and novel classes \(2 are\)"):
        lists.check_split(["b", "a"], ["a", "b"], ["a", "b"])
    with pytest.raises(UserError, match=r"class 'x' has no videos \(1 of them\)"):
        lists.check_split(["a"], ["x"], ["a"])


# ---- errors


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("video,split\na.mp4,train\n", r"t\.csv: no column 'label': give video, label"),
        ("", r"t\.csv: no column 'video'"),
        ("video,label\n", r"t\.csv: no rows below the header"),
        ("video,label\na.mp4,wave\n,wave\n", r"t\.csv, line 3: video is empty"),
        ("video,label\na.mp4\n", r"t\.csv, line 2: label is empty"),
        ("video,label,split\na.mp4,wave,train\nb.mp4,wave,dev\n", r"t\.csv, line 3: split is 'dev'"),
        ("video,label\na.mp4,wave\n\n\nb.mp4, \n", r"t\.csv, line 5: label is empty"),
        ('video,label\na.mp4,"two\nlines"\nb.mp4,\n', r"t\.csv, line 4: label is empty"),
        ("video,label,split\na.mp4,wave,train\n\nb.mp4,wave,dev\n", r"t\.csv, line 4: split is 'dev'"),
    ],
)
def test_wrong_table(tmp_path: Path, text: str, says: str) -> None:
    """The line is that of the file, as an editor counts it."""
    with pytest.raises(UserError, match=says):
        lists.read(str(written(tmp_path / "t.csv", text)), None)


def test_comma_without_quotes(tmp_path: Path) -> None:
    """A label that is cut off at its comma would be another class."""
    table = written(tmp_path / "t.csv", "video,label\na.mp4,wave\nb.mp4,pushing, slowly\n")
    with pytest.raises(UserError, match=r"t\.csv, line 3: "):
        lists.read(str(table), None)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"video,label\n\xff\xfe,x\n")
    with pytest.raises(UserError, match=r"t\.csv: not a \.csv in UTF-8"):
        lists.read(str(tmp_path / "t.csv"), None)
    (tmp_path / "names.txt").write_bytes(b"\xe9t\xe9\n")
    with pytest.raises(UserError, match=r"names\.txt: not text in UTF-8"):
        lists.names_in(tmp_path / "names.txt")


@pytest.mark.parametrize("name", ["none.csv", "notes.txt"])
def test_no_table(tmp_path: Path, name: str) -> None:
    empty(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"no such \.csv or folder; or one of features, sprites, kinetics"):
        lists.read(str(tmp_path / name), None)


def test_no_videos_in_folders(tmp_path: Path) -> None:
    empty(tmp_path / "wave" / "notes.txt")
    with pytest.raises(UserError, match=r"no videos: put them into a folder for each class"):
        lists.read(str(tmp_path), None)


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("kinetics", r"no train\.csv, val\.csv or test\.csv of Kinetics"),
        ("ucf101", r"trainlist01\.txt: no such list"),
        ("hmdb51", r"no \*_test_split1\.txt of HMDB-51"), ("ssv2", r"something-something-v2-train\.json: no such list"),
    ],
)  # fmt: skip
def test_missing_lists(tmp_path: Path, dataset: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        lists.read(dataset, tmp_path)
    with pytest.raises(UserError, match=rf"none: no such folder: give the one of {dataset}'s"):
        lists.read(dataset, tmp_path / "none")


@pytest.mark.parametrize("time", ["soon", "nan", "inf"])
def test_wrong_kinetics(tmp_path: Path, time: str) -> None:
    written(tmp_path / "train.csv", f"label,youtube_id,time_start,time_end\na,x,0,10\na,y,{time},10\n")
    with pytest.raises(UserError, match=r"train\.csv, line 3: time_start and time_end are no numbers"):
        lists.kinetics(tmp_path)


def test_wrong_ucf101(tmp_path: Path) -> None:
    written(tmp_path / "trainlist01.txt", "YoYo/a.avi 1\n\nv_YoYo_g01_c01.avi 1\n")
    written(tmp_path / "testlist01.txt", "YoYo/b.avi\n")
    with pytest.raises(UserError, match=r"trainlist01\.txt, line 3: 'v_YoYo_g01_c01\.avi 1': give Class/video"):
        lists.ucf101(tmp_path)
    empty(tmp_path / "trainlist01.txt", tmp_path / "testlist01.txt")
    with pytest.raises(UserError, match="its lists name no videos"):
        lists.ucf101(tmp_path)


@pytest.mark.parametrize("line", ["a.avi", "a.avi 3", "a b.avi 1"])
def test_wrong_hmdb51(tmp_path: Path, line: str) -> None:
    written(tmp_path / "wave_test_split1.txt", f"x.avi 1\n{line}\n")
    with pytest.raises(UserError, match=r"wave_test_split1\.txt, line 2: .*give a video and 0, 1 or 2"):
        lists.hmdb51(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '[{"id": 1}]', '[{"id": 1, "template": null}]', "7"])
def test_wrong_ssv2(tmp_path: Path, text: str) -> None:
    written(tmp_path / "something-something-v2-train.json", text)
    written(tmp_path / "something-something-v2-validation.json", "[]")
    with pytest.raises(UserError, match=r"v2-train\.json: not a list of entries with id and template"):
        lists.ssv2(tmp_path)
