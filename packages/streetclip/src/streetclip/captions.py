"""Synthetic captions (Section 3): labels of a photo become a sentence, by a template of the domain."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from metazoo.errors import UserError

from streetclip.config import FULL_CAPTION, LEVELS, CaptionOptions, check_template


class SyntheticCaptioner:
    """Labels to captions; no text by people, no filter.

    Args:
        template: places {city}, {region}, {country}; what stands in square brackets is left out where a level in it is
            missing: "A photo[ near {city}] in {country}."

    Raises:
        UserError: an unknown place, or none, or brackets that do not close.
    """

    def __init__(self, template: str = FULL_CAPTION) -> None:
        check_template("template", template)
        self.template = template
        # [(text, whether it may be left out)]
        self._pieces = [
            (piece.strip("[]"), piece.startswith("[")) for piece in re.split(r"(\[[^]]*\])", template) if piece
        ]

    def __call__(
        self, labels: Mapping[str, str | None], where: str = "labels", drop: Callable[[], bool] | None = None
    ) -> str:
        """The caption of one photo.

        Args:
            labels: of city, region, country, those that there are; None, "" or absent where not known.
            where: named if something is missing.
            drop: whether a part in brackets is left out though its level is known [default: never].

        Raises:
            UserError: a level that stands outside brackets is missing.
        """
        held = {level: (labels.get(level) or "").strip() for level in LEVELS}
        found = []
        for text, optional in self._pieces:
            missing = [level for level in LEVELS if f"{{{level}}}" in text and not held[level]]
            if missing and not optional:
                raise UserError(
                    f"{where}: no {missing[0]}, which the template {self.template!r} needs: give it, or put "
                    f"[… {{{missing[0]}}}] in brackets"
                )
            if not missing and not (optional and drop is not None and drop()):
                found.append(text.format_map(held))
        return "".join(found)

    def all(self, city: Sequence[str], region: Sequence[str], country: Sequence[str]) -> list[str]:
        """Captions of photos by their labels [N], "" where not known."""
        rows = zip(city, region, country, strict=True)
        return [self(dict(zip(LEVELS, row, strict=True)), f"photo {i}") for i, row in enumerate(rows)]


def caption(options: CaptionOptions) -> str:
    """`streetclip caption`: the captions of a table of labels.

    Raises:
        UserError: no such file, no column country, or a level that the template needs is missing.
    """
    from metazoo import runfolder

    from streetclip import coordinates

    assert options.labels is not None
    if options.output is not None and options.output.exists():
        raise UserError(f"--output {options.output} is there already: give another, or take it away")
    table = coordinates.read_table(options.labels, ("country",) if "{country}" in options.template else ())
    captioner = SyntheticCaptioner(options.template)
    found = [
        captioner({level: row.get(level) for level in LEVELS}, f"{options.labels}, line {i + 2}")
        for i, row in enumerate(table.to_dict("records"))
    ]
    if options.output is None:
        return "\n".join(found)
    if "caption" in table.columns:
        raise UserError(f"{options.labels} has a column caption already: take it away")
    table["caption"] = found
    runfolder.write_text(options.output, table.to_csv(index=False))
    return f"{len(found)} captions written to {options.output}"
