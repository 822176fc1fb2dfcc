"""Tables and plots say what the results say, every time the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from metazoo import report
from metazoo.claims import judge
from metazoo.errors import UserError
from metazoo_toy import claim


def row(name: str, level: float, noise: float = 0.1, seeds: int = 5, **changes: Any) -> dict[str, Any]:
    """A judged row: the treatment gives ``level``, the baseline 1, both with noise."""
    made, draw = claim(name, **changes), random.Random(name)
    cells = [
        {
            "arm": arm,
            "seed": seed,
            "metrics": {made.metric: mean * (1 + noise * draw.gauss(0, 1)), "cost": 2.0},
            "seconds": 60.0,
            "git": {"revision": "a" * 40, "dirty": False},
        }
        for arm, mean in (("ours", level), ("theirs", 1.0))
        for seed in range(seeds)
    ]
    return judge(made, cells)


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    environment = {
        "versions": {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"},
        "platform": "Linux x86_64",
        "cpu": {"name": "a cpu", "count": 2},
        "device": "cpu",
        "git": {"revision": "a" * 40, "dirty": False},
    }
    return {"package": "toy", "scale": "small", "environment": environment, "claims": list(rows)}


TRUE = row("true", 3.0, flagship=True)
FALSE = row("false", 1.0, paper="a | b", statement="It holds\nhere.")
RATIO = row("ratio", 0.3, compare="ratio", better="less", margin=0.7)
VALUE = row("value", 0.9, compare="value", baseline=None, margin=1.0, tolerance=0.5, seeds=3)
ALL = results(TRUE, FALSE, RATIO, VALUE)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (-0.98765, "-0.988"),
        (99.96, "100"),
        (999.7, "1000"),
        (123.4, "123"),
        (6042.0, "6042"),
        (13398.4, "13400"),
        (0.00012345, "0.000123"),
        (1.5e-5, "1.50e-05"),
        (3.0e9, "3.00e+09"),
        (None, "–"),
        (float("inf"), "–"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    """Three significant digits; counts in full."""
    assert report.number(value) == text


def test_table_has_every_claim() -> None:
    """Name, source, the paper's figure, effect with interval, margin, seeds, verdict; failed claims too."""
    text = report.table(ALL)
    lines = [line for line in text.splitlines() if line.startswith("| **")]
    assert [line.split("**")[1] for line in lines] == ["true", "false", "ratio", "value"]
    assert "**true** (flagship)" in lines[0]
    assert "(flagship)" not in lines[1]
    assert lines[0].rstrip(" |").endswith("| ≥ 0.5 | 5 | reproduced")
    assert lines[1].rstrip(" |").endswith("| ≥ 0.5 | 5 | not reproduced")
    assert lines[2].rstrip(" |").endswith("| ≤ 0.7 | 5 | reproduced")
    assert lines[3].rstrip(" |").endswith("| 1 ± 0.5 | 3 of 5 planned | no verdict")
    assert "score: ours − theirs" in lines[0]
    assert "score: ours / theirs" in lines[2]
    assert report.interval(TRUE) in lines[0]
    assert "Section 1 | 1.00 against 0.00" in lines[0]


def test_tables_keep_their_columns() -> None:
    """A bar or a line break in a text ends no cell."""
    for block in report.table(ALL).split("\n\n")[:2]:
        widths = {line.replace("\\|", "").count("|") for line in block.splitlines()}
        assert len(widths) == 1
    assert "a \\| b" in report.table(ALL)
    assert "It holds here." in report.table(ALL)


def test_arms_stand_below_with_chance() -> None:
    """The mean of each arm, the chance level, the further metrics and the tuning spent."""
    arms = report.table(ALL).split("\n\n")[1].splitlines()[2:]
    mean, iqm = (report.number(TRUE["arms"]["ours"][key]) for key in ("mean", "iqm"))
    assert arms[0] == f"| true | ours | score | {mean} | {iqm} | 0 | cost 2.00 | 0 |"
    assert len(arms) == 8


def test_provenance() -> None:
    """How it was measured: scale, time, software, machine, revision; uncommitted changes are told."""
    last = report.table(ALL).splitlines()[-1]
    assert last == (
        "Scale small; 36.0 minutes in all; python 3.11.7, torch 2.13.0, numpy 2.4.6; cpu (a cpu, 2 cores); "
        f"revision {'a' * 12}."
    )
    assert "with uncommitted changes" in report.table(results(TRUE | {"dirty": True}))


def test_other_versions_and_seeds_are_marked() -> None:
    """A row of an older version, or of fewer seeds than planned, says so."""
    text = report.table(results(TRUE, row("few", 3.0, seeds=5) | {"seeds": 3}), {"true": 2, "few": 1})
    assert "**true** (flagship) (of version 1, now 2)" in text
    assert text.count("of version") == 1
    assert "| 3 of 5 planned |" in text


def test_nothing_measured_yet() -> None:
    """A package without results has a line instead of tables."""
    assert report.table(results()) == "Nothing measured yet."


README = "# Toy\n\n<!-- evidence:start -->\nold\n<!-- evidence:end -->\n\nrest\n"


def test_render_replaces_what_lies_between() -> None:
    """Nothing else changes, and rendering twice changes nothing."""
    once = report.render(README, ALL)
    assert once == README.replace("old", report.table(ALL))
    assert report.render(once, ALL) == once


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- evidence:end --> <!-- evidence:start -->",
        "<!-- evidence:start -->",
        README + README,
        README.replace("evidence", "packages"),
    ],
)
def test_bad_markers_are_refused(text: str) -> None:
    """Missing, doubled or swapped markers are a user's error that names them."""
    with pytest.raises(UserError, match="evidence:start"):
        report.render(text, ALL)


def test_packages_table() -> None:
    """Sorted by name; what was not measured is listed too."""
    packages = [
        ({"project": {"name": "metazoo-toy", "description": "Toys | games."}}, ALL),
        ({"project": {"name": "metazoo-absent", "description": "Nothing yet."}}, None),
    ]
    lines = report.packages_table(packages).splitlines()
    assert lines[2] == "| [absent](packages/absent) | Nothing yet. | not measured yet | – | – |"
    assert lines[3].startswith("| [toy](packages/toy) | Toys \\| games. | One is more than zero. |")
    assert f"{report.interval(TRUE)}, reproduced" in lines[3]
    assert lines[3].endswith("| 2 reproduced, 1 not reproduced, 1 no verdict |")
    text = README.replace("evidence", "packages")
    assert report.render_packages(text, packages) == text.replace("old", report.packages_table(packages))


def test_summary_sets_verdict_beside_the_paper() -> None:
    """Per claim the verdict, the paper's figure and ours."""
    blocks = report.summary([TRUE, FALSE]).split("\n\n")
    assert blocks[0].startswith("true: REPRODUCED\n")
    assert "paper     1.00 against 0.00" in blocks[0]
    assert report.interval(TRUE) in blocks[0]
    assert blocks[1].startswith("false: NOT REPRODUCED\n")
    assert max(map(len, report.summary(ALL["claims"]).splitlines())) <= 100


def test_plot_is_a_picture_and_the_same_again(tmp_path: Path) -> None:
    """A PNG that grows by a strip per claim; the same results give the same bytes."""
    single = row("one-seed", 2.0, seeds=1)
    wide = row("wide", 1e-4, compare="ratio", better="less", margin=0.01)
    point = row("point", 2.0, noise=0.0)
    exact = row("exact", 6042.0, noise=0.0, compare="value", baseline=None, margin=6042.0, tolerance=0.0)
    many = results(*ALL["claims"], single, wide, point, exact)
    report.plot(many, tmp_path / "a.png")
    report.plot(many, tmp_path / "b.png")
    report.plot(ALL, tmp_path / "new" / "c.png")
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    heights = [
        int.from_bytes(path.read_bytes()[20:24], "big") for path in (tmp_path / "a.png", tmp_path / "new" / "c.png")
    ]
    assert heights[0] - heights[1] == pytest.approx(4 * 1.45 * 150, abs=2)
    assert not list(tmp_path.glob(".*.tmp"))


def test_plot_texts_do_not_overlap() -> None:
    """Long names, statements and figures stay in their columns: no two texts of a strip touch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    long = row(
        "a-name-that-is-much-longer-than-the-column-has-room-for",
        3.0,
        flagship=True,
        statement="A statement that goes on and on, " * 12,
        paper="not stated, but described at some length, " * 6,
        source="Section 4.1, Figure 3, Table 2, and Appendix B",
    )
    figure = report.draw(results(long, RATIO, long | {"name": "b", "verdict": "not reproduced"}))
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw(renderer)
    texts = [text for text in figure.texts if text.get_text()]
    texts += [axes.xaxis.get_label() for axes in figure.axes]
    for axes in figure.axes:
        left, right = axes.get_xlim()
        texts += [t.label1 for t in axes.xaxis.get_major_ticks() if left <= t.get_loc() <= right]
    boxes = [text.get_window_extent(renderer) for text in texts]
    width, height = figure.bbox.width, figure.bbox.height
    for i, box in enumerate(boxes):
        assert box.x0 >= 0, texts[i]
        assert box.x1 <= width, texts[i]
        assert box.y0 >= 0, texts[i]
        assert box.y1 <= height, texts[i]
        for j in range(i):
            assert not box.overlaps(boxes[j]), f"{texts[i]} overlaps {texts[j]}"


def test_plot_needs_claims(tmp_path: Path) -> None:
    """Nothing to show is a user's error, and no file is left."""
    with pytest.raises(UserError, match="no claims to plot"):
        report.plot(results(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
