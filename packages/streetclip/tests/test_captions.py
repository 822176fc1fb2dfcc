"""Synthetic captions: clauses of missing levels, templates that are refused, and the command."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from metazoo.errors import UserError
from streetclip.captions import SyntheticCaptioner, caption
from streetclip.config import CITY_CAPTION, COUNTRY_CAPTION, CaptionOptions, Config, EvaluateOptions, PredictOptions

ROME = {"city": "Rome", "region": "Lazio", "country": "Italy"}


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ((), "A Street View photo close to the town of Rome in the region of Lazio in Italy."),
        (("city",), "A Street View photo in the region of Lazio in Italy."),
        (("region",), "A Street View photo close to the town of Rome in Italy."),
        (("city", "region"), "A Street View photo in Italy."),
    ],
)
@pytest.mark.parametrize("empty", [None, "", "  "])
def test_clauses_of_missing_levels(missing: tuple[str, ...], expected: str, empty: str | None) -> None:
    """A clause goes where its level is absent, None or blank; the others stay as they are."""
    captioner = SyntheticCaptioner()
    assert captioner({level: name for level, name in ROME.items() if level not in missing}) == expected
    assert captioner({level: empty if level in missing else name for level, name in ROME.items()}) == expected


@pytest.mark.parametrize(
    ("template", "labels", "expected"),
    [
        (COUNTRY_CAPTION, ROME, "A Street View photo in Italy."),
        (CITY_CAPTION, ROME, "A Street View photo from Rome."),
        ("[{city}, {region}, ]{country}", ROME, "Rome, Lazio, Italy"),
        ("[{city}, {region}, ]{country}", {"city": "Rome", "country": "Italy"}, "Italy"),  # all levels of it or none
        ("[{city}][/{region}]", {}, ""),
        ("[a street ]of {country}, {country}", {"country": "Italy"}, "a street of Italy, Italy"),
        ("{{x}} {country}", ROME, "{x} Italy"),
        ("{country}", {"country": " Côte d'Ivoire "}, "Côte d'Ivoire"),
        ("{country}", {"country": "{city} [x]"}, "{city} [x]"),  # a name is no template
    ],
)
def test_templates(template: str, labels: dict[str, str], expected: str) -> None:
    assert SyntheticCaptioner(template)(labels) == expected


def test_captions_of_columns() -> None:
    captioner = SyntheticCaptioner("[{city}, ]{country}")
    assert captioner.all(["Rome", ""], ["Lazio", ""], ["Italy", "Chad"]) == ["Rome, Italy", "Chad"]
    with pytest.raises(UserError, match=r"^photo 1: no country, which the template .* needs: give it, or put \["):
        captioner.all(["Rome", "Lyon"], ["", ""], ["Italy", ""])
    with pytest.raises(ValueError, match="zip"):
        captioner.all(["Rome"], ["Lazio"], ["Italy", "Chad"])


def test_required_level_is_named() -> None:
    with pytest.raises(UserError, match=r"^photos\.csv, line 7: no region, which"):
        SyntheticCaptioner("{region} in {country}")({"country": "Italy"}, "photos.csv, line 7")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a photo", "names no place"),
        ("", "names no place"),
        ("a {{country}}", "names no place"),
        ("a {town}", r"\{town\} is none of"),
        ("a {}", r"\{\} is none of"),
        ("a {0}", r"\{0\} is none of"),
        ("a {country.__class__}", r"\{country.__class__\} is none of"),
        ("a {country[0]}", "square brackets|is none of"),
        ("a {country", "expected '}'"),
        ("a country}", "Single '}'"),
        ("a {country!r}", "country"),
        ("a {country:>9}", "country"),
        ("a {country:d}", "country"),
        ("a [{city}", "square brackets must close"),
        ("a {city}]", "square brackets must close"),
        ("a [[{city}]]", "square brackets must close"),
        ("a ]{city}[", "square brackets must close"),
    ],
)
def test_bad_templates(template: str, message: str) -> None:
    """Refused by the captioner and, before any work, by the options."""
    with pytest.raises(UserError, match=message):
        SyntheticCaptioner(template)
    with pytest.raises(UserError, match=f"--template.*({message})"):
        Config(template=template)
    with pytest.raises(UserError, match=f"--template.*({message})"):
        CaptionOptions(labels=Path("labels.csv"), template=template)


def test_templates_for_questions_name_their_level() -> None:
    """A country's caption without {country} would be the same for all countries."""
    with pytest.raises(UserError, match=r"--country-template .*\{country\} is missing"):
        Config(country_template="a photo in {city}")
    with pytest.raises(UserError, match=r"--city-template .*\{city\} is missing"):
        PredictOptions(photos=(Path("a.jpg"),), city_template="a photo in {country}")
    with pytest.raises(UserError, match=r"--ensemble .*\{country\} is missing"):
        EvaluateOptions(ensemble=("a photo in {region}",))


def test_command_prints(tmp_path: Path) -> None:
    """A line a row, quoted names and a byte order mark read as they are meant."""
    labels = written(tmp_path / "a.csv", "\ufeffcountry,city,ignored", "Italy,Rome,1", '"Korea, South",,2')
    assert caption(CaptionOptions(labels=labels)) == (
        "A Street View photo close to the town of Rome in Italy.\nA Street View photo in Korea, South."
    )


def test_command_writes(tmp_path: Path) -> None:
    """The table stays, with a column more."""
    labels = written(tmp_path / "a.csv", "id,country,city", "007,Namibia,NA", "008,Chad,")
    output = tmp_path / "new" / "captions.csv"
    said = caption(CaptionOptions(labels=labels, template="[{city}, ]{country}", output=output))
    assert said == f"2 captions written to {output}"
    table = pd.read_csv(output, dtype=str, keep_default_na=False)
    assert list(table.columns) == ["id", "country", "city", "caption"]
    assert list(table["id"]) == ["007", "008"]
    assert list(table["caption"]) == ["NA, Namibia", "Chad"]  # NA is a name here


def test_command_without_countries(tmp_path: Path) -> None:
    labels = written(tmp_path / "a.csv", "city", "Rome")
    assert caption(CaptionOptions(labels=labels, template=CITY_CAPTION)) == "A Street View photo from Rome."


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("country,city", "Italy,Rome", ",Lyon"), r"a\.csv, line 3: no country, which the template"),
        (("city", "Rome"), r"a\.csv: no column 'country', only city"),
        (("country",), r"a\.csv: no row in it"),
        (("country,country", "Italy,Chad"), r"a\.csv: column 'country' is there twice"),
    ],
)
def test_command_refuses(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    """One line, and no output."""
    output = tmp_path / "captions.csv"
    with pytest.raises(UserError, match=message):
        caption(CaptionOptions(labels=written(tmp_path / "a.csv", *lines), output=output))
    assert not output.exists()


def test_command_needs_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no --labels: give"):
        CaptionOptions()
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        caption(CaptionOptions(labels=tmp_path / "none.csv"))
