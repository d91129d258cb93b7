"""One HTML page for a diagnosis: verdict, figures (SVG inside the page) and table; no script, no other file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from vfx.pages.templates import filled

COLUMNS = {
    "feature": "E‖g‖",
    "offset": "‖h‖",
    "feature_ratio": "feature ratio",
    "bound": "bound ε",
    "smoothed_bound": "smoothed ε",
    "variance_ratio": "variance ratio",
    "zero_share": "zeros",
    "silenced": "silenced",
    "magnitude_ratio": "|θ| ratio",
}


def page(title: str, diagnosis: Any, figures: Mapping[str, str]) -> str:
    """The page of a ``Diagnosis`` as text; ``figures`` are ``<svg>`` elements by name."""
    drawn = {name: Markup(_own_ids(figure, name)) for name, figure in figures.items()}
    return filled("diagnosis.html.jinja", vars(diagnosis) | {"title": title, "figures": drawn, "columns": COLUMNS})


def _own_ids(text: str, name: str) -> str:
    """An SVG whose ids do not meet those of the page's other figures."""
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{name}-")
    return text
