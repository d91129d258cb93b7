"""One HTML page for a diagnosis: verdict, figures (SVG inside the page) and table; no script, no other file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from vfx.diagnosis.rows import LayerRow, shown
from vfx.diagnosis.verdict import Verdict

_CAPTIONS = {
    "features": "What each layer hands on: the part that depends on the input, g(x) = f(x) − f(0), and the part that "
    "does not, h = f(0). Features vanish where E‖g‖ of the merged network falls behind the edges'.",
    "bound": "Feature of the merged network over the edges' average, and the vanishing bound: the largest ratio from a "
    "layer to the output.",
    "variance": "Sum of the channels' variances over the edges' average.",
    "activation": "Activation collapse: zeros behind the activation function, and units that an edge activates and the "
    "merged network does not.",
    "statistics": "Outputs (in front of the activation) and activations over all positions and channels.",
    "magnitude": "Mean absolute weight over the edges' average.",
    "logits": "Outputs over the data.",
}
_COLUMNS = {
    "number": "layer",
    "layer": "module",
    "state": "state",
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
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin-top: 2em }
.verdict { border-left: 4px solid #c1272d; padding: .4em 1em; background: #f6f6f6 }
.verdict.healthy { border-color: #2a7f62 }
figure { margin: 1.5em 0 } figure svg { max-width: 100%; height: auto } figcaption { color: #444; max-width: 75ch }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto } th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left } tr.preserved td { color: #777 }
"""


def page(
    title: str,
    verdict: Verdict,
    summary: str,
    notes: Sequence[str],
    figures: Mapping[str, str],
    rows: Sequence[LayerRow],
) -> str:
    """The page as text; ``figures`` are ``<svg>`` elements by name."""
    parts = (*_head(title, verdict), *_text(summary, notes), *_figures(figures), *_table(rows), "</body>\n</html>\n")
    return "\n".join(parts)


def _head(title: str, verdict: Verdict) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>"
    kind = "verdict healthy" if verdict.healthy else "verdict"
    yield f'<div class="{kind}"><p><strong>{escape(verdict.kind)}</strong>. {escape(verdict.explanation)}</p>'
    if verdict.remedies:
        yield "<p>Try:</p><ul>" + "".join(f"<li>{escape(text)}</li>" for text in verdict.remedies) + "</ul>"
    yield "</div>"


def _text(summary: str, notes: Sequence[str]) -> Iterator[str]:
    yield f"<p>{summary}</p>"
    for note in notes:
        yield f"<p>Note: {escape(note)}</p>"


def _figures(figures: Mapping[str, str]) -> Iterator[str]:
    for name, drawn in figures.items():
        caption = f"<figcaption>{escape(_CAPTIONS[name])}</figcaption>"
        yield f"<figure>{_own_ids(drawn, name)}{caption}</figure>"


def _own_ids(text: str, name: str) -> str:
    """An SVG whose ids do not meet those of the page's other figures."""
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{name}-")
    return text


def _table(rows: Sequence[LayerRow]) -> Iterator[str]:
    yield "<h2>Layers</h2>"
    head = "".join(f"<th>{escape(title)}</th>" for title in _COLUMNS.values())
    yield f'<div class="wide"><table>\n<tr>{head}</tr>'
    for row in rows:
        cells = "".join(f"<td>{escape(_cell(row, name))}</td>" for name in _COLUMNS)
        yield f'<tr class="{row.state}">{cells}</tr>'
    yield "</table></div>"


def _cell(row: LayerRow, name: str) -> str:
    value = getattr(row, name)
    if name == "number":
        return f"({value})" if row.shortcut else str(value)
    if isinstance(value, str):
        return value
    return shown(value) if row.measured or value is not None else ""
