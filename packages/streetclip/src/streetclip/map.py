"""A map of predictions in one HTML file: scripts, cities and thumbnails are in it, no network is needed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ImageOps

from streetclip.gazetteer import Gazetteer
from streetclip.geolocator import GeoPrediction

if TYPE_CHECKING:
    from PIL.Image import Image

_TOOLTIP = """
<div style="max-width: 340px; font: 13px sans-serif">
<img src="@thumbnail" style="max-width: 160px; max-height: 160px; float: left; margin: 0 8px 4px 0">
<b>@name{safe}</b><br>@city{safe}, @country{safe}<br>@latitude{0.00}°, @longitude{0.00}°<br>
country @country_probability{0.0%}, place @probability{0.0%}<br>
<span style="white-space: pre-line; color: #555">@others{safe}</span>
</div>
"""


def page(
    names: Sequence[str],
    found: Sequence[GeoPrediction],
    thumbnails: Sequence[str],
    taken: Sequence[tuple[float, float] | None],
    gazetteer: Gazetteer,
) -> str:
    """HTML with a map of what was found, to be dragged and zoomed: a point a photo, the surer the larger; at a point
    its photo, best places and probabilities; all further places, and where EXIF says that a photo was taken.

    The gazetteer's cities, as grey dots, show the land.

    Args:
        names, found: [N], of photos.
        thumbnails: [N] of :func:`data_uri`.
        taken: [N] (latitude, longitude), or None.
    """
    from bokeh.embed import file_html
    from bokeh.models import ColumnDataSource, HoverTool, Range1d
    from bokeh.plotting import figure
    from bokeh.resources import INLINE

    source = " (grey: cities of GeoNames, CC BY 4.0)" if gazetteer.name == "geonames" else ""
    plot = figure(
        title=f"Where photos may have been taken: {len(found)}{source}", sizing_mode="stretch_both",
        min_height=400,
        x_range=Range1d(-180, 180), y_range=Range1d(-90, 90), match_aspect=True,
        tools="pan,wheel_zoom,box_zoom,reset,save", active_scroll="wheel_zoom", x_axis_label="longitude [°]",
        y_axis_label="latitude [°]", output_backend="canvas",
    )  # fmt: skip
    plot.scatter(_rounded(gazetteer.longitude), _rounded(gazetteer.latitude), size=2, color="#c8c8c8", line_color=None)
    others = [
        (place, name)
        for one, name in zip(found, names, strict=True)
        for place in one.places[1:]
    ]  # fmt: skip
    if others:
        plot.scatter(
            x="x", y="y", size=5, fill_color=None, line_color="#56B4E9", legend_label="further places",
            source=ColumnDataSource({"x": [p.longitude for p, _ in others], "y": [p.latitude for p, _ in others]}),
        )  # fmt: skip
    known = [(one, place) for one, place in zip(found, taken, strict=True) if place is not None]
    if known:
        plot.multi_line(
            [[one.longitude, place[1]] for one, place in known], [[one.latitude, place[0]] for one, place in known],
            color="#009E73", line_width=1,
        )  # fmt: skip
        plot.scatter(
            [place[1] for _, place in known], [place[0] for _, place in known], marker="x", size=8, color="#009E73",
            legend_label="EXIF coordinates",
        )  # fmt: skip
    columns: dict[str, Any] = {
        "x": [one.longitude for one in found], "y": [one.latitude for one in found], "name": [escape(n) for n in names],
        "city": [escape(one.city) for one in found], "country": [escape(one.country) for one in found],
        "latitude": [one.latitude for one in found], "longitude": [one.longitude for one in found],
        "probability": [one.probability for one in found],
        "country_probability": [one.country_probability for one in found],
        "size": [7 + 9 * one.country_probability for one in found],
        "thumbnail": list(thumbnails), "others": [_listed(one) for one in found],
    }  # fmt: skip
    points = plot.scatter(
        x="x", y="y", size="size", color="#D55E00", alpha=0.75, line_color="white", source=ColumnDataSource(columns),
        legend_label="photo, larger where the country is surer",
    )  # fmt: skip
    plot.add_tools(HoverTool(renderers=[points], tooltips=_TOOLTIP, attachment="horizontal"))
    plot.legend.location = "bottom_left"
    plot.legend.click_policy = "hide"
    return file_html(plot, INLINE, title="streetclip")


def _listed(found: GeoPrediction) -> str:
    """The best places and countries, a line each."""
    lines = [f"{place.city}, {place.country}: {place.probability:.1%}" for place in found.places[1:]]
    lines += [f"{country}: {probability:.1%}" for country, probability in found.countries]
    return escape("\n".join(lines))


def data_uri(image: Image, side: int = 160) -> str:
    """A thumbnail of at most ``side`` pixels, as an address that holds it."""
    image = ImageOps.contain(image, (side, side)) if max(image.size) > side else image
    written = io.BytesIO()
    image.convert("RGB").save(written, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()


def _rounded(degrees: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in degrees]
