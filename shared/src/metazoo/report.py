"""The evidence as tables for READMEs, lines for the terminal, and a plot. Same results, same output."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metazoo.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
Row = Mapping[str, Any]

COLOURS = {  # told apart by the colour-blind too; the verdict is written beside
    "reproduced": "#0b7a5e",
    "not reproduced": "#b3361e",
    "inconclusive": "#b07a00",
    "no verdict": "#6b7280",
}


def number(value: float | None) -> str:
    """Three significant digits; whole numbers from 1000 on in full, as they count something."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if 1000 <= size < 1e7:
        return f"{value:.0f}" if value == int(value) else f"{float(f'{value:.3g}'):.0f}"
    if 1e-4 <= size < 1000:
        text = f"{value:#.3g}"
        return f"{float(text):.0f}" if "e" in text else text.rstrip(".")  # 999.7 rounds to 1000
    return f"{value:.2e}"


def interval(row: Row) -> str:
    """The effect with its 95 % interval."""
    return f"{number(row['effect'])} [{number(row['low'])}, {number(row['high'])}]"


def compared(row: Row) -> str:
    """What the effect is: "ari: mixer − naive"."""
    sign = {"difference": " − ", "ratio": " / ", "value": ""}[row["compare"]]
    return f"{row['metric']}: {row['treatment']}{sign}{row['baseline'] or ''}"


def margin(row: Row) -> str:
    """What the whole interval must satisfy: "≥ 0.4", or "10 ± 0.5" for a stated value."""
    if row["tolerance"] is not None:
        return f"{row['margin']:.10g} ± {row['tolerance']:.10g}"
    return f"{'≥' if row['better'] == 'greater' else '≤'} {row['margin']:.10g}"


def summary(rows: Sequence[Row]) -> str:
    """The verdicts beside the paper's figures, for a terminal."""
    blocks = []
    for row in rows:
        found = f"{compared(row)} = {interval(row)}, {_seeds(row)} seeds, counts if {margin(row)}"
        lines = [
            f"{row['name']}: {row['verdict'].upper()}",
            *textwrap.wrap(f"{row['statement']} ({row['source']})", 98),
            *textwrap.wrap(f"paper     {row['paper']}", 98, subsequent_indent=" " * 10),
            *textwrap.wrap(f"measured  {found}", 98, subsequent_indent=" " * 10),
        ]
        means = ", ".join(f"{arm} {number(values['mean'])}" for arm, values in row["arms"].items())
        chance = "" if row["chance"] is None else f"; chance {row['chance']:g}"
        lines += textwrap.wrap(f"means     {means}{chance}", 98, subsequent_indent=" " * 10)
        blocks.append("\n  ".join(lines))
    return "\n\n".join(blocks)


def _seeds(row: Row) -> str:
    """Seeds measured, and planned if these were others."""
    planned = row["planned_seeds"]
    return str(row["seeds"]) if row["seeds"] == planned else f"{row['seeds']} of {planned} planned"


def table(results: Results, versions: Mapping[str, int] | None = None) -> str:
    """The evidence as Markdown: a row per claim, below it the arms' means, below that how it was measured.

    Args:
        results: what `reproduce` left in <scale>.json.
        versions: the current version of each claim; results of another version are marked as such.
    """
    rows = results["claims"]
    if not rows:
        return "Nothing measured yet."
    lines = [
        "| claim | source | paper | measured effect [95 % interval] | counts if | seeds | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"**{row['name']}**" + (" (flagship)" if row["flagship"] else "")
        current = (versions or {}).get(row["name"], row["version"])
        if current != row["version"]:
            name += f" (of version {row['version']}, now {current})"
        effect = f"{interval(row)}<br>{_cell(compared(row))}"
        if row["task_low"] is not None:
            effect += f"<br>tasks resampled: [{number(row['task_low'])}, {number(row['task_high'])}]"
        if row["probability_of_improvement"] is not None:
            effect += f"<br>P(improvement) {number(row['probability_of_improvement'])}"
        cells = (f"{name}<br>{_cell(row['statement'])}", _cell(row["source"]), _cell(row["paper"]))
        lines.append(f"| {' | '.join(cells)} | {effect} | {margin(row)} | {_seeds(row)} | {row['verdict']} |")
    lines += ["", "| claim | arm | metric | mean | IQM | chance | further means | tuning trials |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        for arm, values in row["arms"].items():
            also = ", ".join(f"{_cell(metric)} {number(mean)}" for metric, mean in values["also"].items())
            chance = "–" if row["chance"] is None else f"{row['chance']:g}"
            means = f"{number(values['mean'])} | {number(values['iqm'])} | {chance} | {also or '–'}"
            of_arm = f"{row['name']} | {_cell(arm)} | {_cell(row['metric'])}"
            lines.append(f"| {of_arm} | {means} | {row['tuning'][arm]} |")
    return "\n".join([*lines, "", _provenance(results)])


def _cell(text: str) -> str:
    """Text that stays in one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _provenance(results: Results) -> str:
    around, rows = results["environment"], results["claims"]
    versions = around["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "numpy") if name in versions)
    revisions = sorted({revision[:12] for row in rows for revision in row["revisions"]})
    tree = f"revision {', '.join(revisions)}" if revisions else "no git revision"
    changed = ", with uncommitted changes" if any(row["dirty"] for row in rows) else ""
    minutes = sum(row["seconds"] for row in rows) / 60
    return (
        f"Scale {results['scale']}; {number(minutes)} minutes in all; {software}; {around['device']} "
        f"({around['cpu']['name']}, {around['cpu']['count']} cores); {tree}{changed}."
    )


def render(readme_text: str, results: Results, versions: Mapping[str, int] | None = None) -> str:
    """``readme_text`` with :func:`table` between its `evidence` markers.

    Raises:
        UserError: the markers are missing, twice there, or in the wrong order.
    """
    return _replace(readme_text, "evidence", table(results, versions))


def render_packages(readme_text: str, packages: Sequence[tuple[Mapping[str, Any], Results | None]]) -> str:
    """``readme_text`` with :func:`packages_table` between its `packages` markers; raises as `render`."""
    return _replace(readme_text, "packages", packages_table(packages))


def _replace(text: str, what: str, body: str) -> str:
    start, end = f"<!-- {what}:start -->", f"<!-- {what}:end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise UserError(f"the README needs {start} and, after it, {end}, once each: add them")
    return f"{text[: text.index(start)]}{start}\n{body}\n{text[text.index(end) :]}"


def packages_table(packages: Sequence[tuple[Mapping[str, Any], Results | None]]) -> str:
    """All packages as Markdown, by name.

    Args:
        packages: of each the parsed pyproject.toml and its results, None if nothing was measured yet.
    """
    lines = [
        "| package | paper | flagship claim | effect [95 % interval] | verdicts |",
        "|---|---|---|---|---|",
    ]
    for project, results in sorted(packages, key=lambda package: str(package[0]["project"]["name"])):
        name = project["project"]["name"].removeprefix("metazoo-")
        rows = results["claims"] if results else []
        flagship = [row for row in rows if row["flagship"]]
        statement = "<br>".join(_cell(row["statement"]) for row in flagship) or "not measured yet"
        effect = "<br>".join(f"{interval(row)}, {row['verdict']}" for row in flagship) or "–"
        counts = [(verdict, sum(row["verdict"] == verdict for row in rows)) for verdict in COLOURS]
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts if count) or "–"
        about = _cell(project["project"]["description"])
        lines.append(f"| [{name}](packages/{name}) | {about} | {statement} | {effect} | {verdicts} |")
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """:func:`draw` as a PNG at ``path``.

    Raises:
        UserError: there is nothing to plot, or the file cannot be written.
    """
    figure = draw(results)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(beside, format="png", dpi=150, metadata={"Software": None})
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from error


def draw(results: Results) -> Figure:
    """A forest plot: a strip per claim in its own unit (log axis for ratios).

    The bar is the effect's 95 % interval, dots are the seeds, the tinted side of the dashed margin is
    where the interval must lie, the grey line is "no effect".

    Raises:
        UserError: there is nothing to plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["claims"]
    if not rows:
        raise UserError("no claims to plot: run reproduce first")
    width, strip, top = 12.0, 1.45, 1.0  # inches
    height = top + strip * len(rows)
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    title = f"{results['package']}: claims measured again ({results['scale']} scale)"
    figure.text(0.02, 1 - 0.38 / height, title, size=15, weight="bold", color="#111827", va="center")
    legend = (
        "diamond and bar: effect, 95 % interval   ·   dots: seeds   ·   "
        "dashed: margin, fixed before measuring   ·   tinted: where the interval must lie   ·   grey line: no effect"
    )
    figure.text(0.02, 1 - 0.68 / height, legend, size=9, color="#6b7280", va="center")
    for index, row in enumerate(rows):
        bottom = height - top - strip * (index + 1)
        _words(figure, row, bottom / height, strip / height)
        axes = figure.add_axes((4.1 / width, (bottom + 0.57) / height, 4.75 / width, 0.7 / height))
        _strip(axes, row)
    return figure


def _words(figure: Figure, row: Row, bottom: float, height: float) -> None:
    """The claim on the left of its strip, what was found on the right."""
    colour = COLOURS[row["verdict"]]
    name = textwrap.shorten(row["name"], 36, placeholder=" …") + (" ★" if row["flagship"] else "")
    statement = textwrap.wrap(row["statement"], 52, max_lines=4, placeholder=" …")
    upper = bottom + height * 0.9
    figure.text(0.02, upper, name, size=11.5, weight="bold", color="#111827", va="top")
    figure.text(0.02, upper - height * 0.19, "\n".join(statement), size=9, color="#4b5563", va="top", linespacing=1.3)
    paper = textwrap.wrap(f"paper: {row['paper']}", 40, max_lines=2, placeholder=" …")
    figure.text(0.765, upper, row["verdict"], size=11.5, weight="bold", color=colour, va="top")
    figure.text(0.765, upper - height * 0.19, interval(row), size=10.5, color="#111827", va="top")
    asked = f"counts if {margin(row)}; {_seeds(row)} seeds"
    figure.text(
        0.765,
        upper - height * 0.36,
        "\n".join([asked, *paper]),
        size=9,
        color="#4b5563",
        va="top",
        linespacing=1.3,
    )


def _strip(axes: Axes, row: Row) -> None:
    """One claim's axis."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    colour, ratio = COLOURS[row["verdict"]], row["compare"] == "ratio"
    nothing = {"difference": [0.0], "ratio": [1.0], "value": []}[row["compare"]]
    edges = [row["margin"]]
    if row["tolerance"] is not None:
        edges = [row["margin"] - row["tolerance"], row["margin"] + row["tolerance"]]
    low, high = row["low"], row["high"]
    dots = _dots(row)
    marks = [x for x in (row["effect"], low, high, *edges, *nothing, *dots) if x is not None]
    if ratio:
        marks = [x for x in marks if x > 0]
        axes.set_xscale("log")
        least, most = math.log(min(marks)), math.log(max(marks))
        pad = 0.06 * (most - least) or 0.5
        left, right = math.exp(least - pad), math.exp(most + pad)
    else:
        pad = 0.06 * (max(marks) - min(marks)) or 0.5 * (abs(marks[0]) or 1.0)
        left, right = min(marks) - pad, max(marks) + pad
    axes.set_xlim(left, right)
    axes.set_ylim(-1, 1)
    good = {"greater": (edges[0], right), "less": (left, edges[0])}[row["better"]]
    if row["tolerance"] is not None:
        good = (edges[0], edges[1])
    axes.axvspan(*good, color=COLOURS["reproduced"], alpha=0.09, linewidth=0)
    for x in nothing:
        axes.axvline(x, color="#9ca3af", linewidth=1)
    for x in edges:
        axes.axvline(x, color="#374151", linewidth=1.2, linestyle=(0, (4, 3)))
    for order, x in enumerate(dots):
        shift = (0.0, 0.14, -0.14)[order % 3]
        axes.plot([x], [-0.52 + shift], "o", markersize=4, color=colour, alpha=0.45, markeredgewidth=0)
    if low is not None and high is not None:
        axes.plot([low, high], [0.3, 0.3], color=colour, linewidth=4, solid_capstyle="butt")
        for x in (low, high):
            axes.plot([x, x], [0.1, 0.5], color=colour, linewidth=1.8)
    axes.plot(
        [row["effect"]],
        [0.3],
        "D",
        markersize=8,
        color=colour,
        markeredgecolor="white",
        markeredgewidth=1.2,
        zorder=5,
    )
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.tick_params(axis="x", labelsize=8.5, colors="#4b5563", length=3)
    axes.set_xlabel(compared(row), size=9, color="#4b5563", labelpad=2)
    if ratio:
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_log_ticks(left, right), labels=[f"{x:g}" for x in _log_ticks(left, right)])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        plain = ScalarFormatter(useOffset=False)
        axes.xaxis.set_major_formatter(plain)


def _dots(row: Row) -> list[float]:
    """The effect of each seed (of the means over its tasks)."""
    ours = row["arms"][row["treatment"]]["values"]
    if row["compare"] == "value":
        return list(ours)
    theirs = row["arms"][row["baseline"]]["values"]
    if row["compare"] == "ratio":
        return [x / y for x, y in zip(ours, theirs, strict=True)]
    return [x - y for x, y in zip(ours, theirs, strict=True)]


def _log_ticks(left: float, right: float) -> list[float]:
    """Powers of ten on a wide axis; round numbers at equal steps on one of less than a decade."""
    from matplotlib.ticker import MaxNLocator

    if right / left < 10:
        return [float(f"{x:.6g}") for x in MaxNLocator(5).tick_values(left, right) if left <= x <= right]
    powers = range(math.ceil(math.log10(left)), math.floor(math.log10(right)) + 1)
    factors = (1, 3) if len(powers) < 4 else (1,)
    ticks = [factor * 10.0**power for power in (powers.start - 1, *powers) for factor in factors]
    return [x for x in ticks if left <= x <= right][:: math.ceil(len(ticks) / 8)]
