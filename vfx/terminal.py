"""Reports for a terminal: 80 columns and short; what they leave out stands in ``to_dict()`` and its JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 80
BEST = 5  # candidates that are shown
LARGEST = 12  # layers or groups that are shown
CHOSEN = " (chosen)"  # behind the name of a candidate
_FIGURES = {"accuracy": "accuracy", "agreement": "agree", "loss": "loss", "divergence": "diverg."}  # and their titles


def rendered(*parts: Any, width: int = WIDTH) -> str:
    """Tables and lines as plain text, one below the other."""
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        for part in parts:
            if part is not None:
                console.print(part, markup=False, highlight=False)
    return capture.get()


def facts_table(rows: Iterable[tuple[str, str]], title: str | None = None) -> Table:
    """What is known and its name, a line each."""
    table = Table(title=title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    return table


def held_out_table(scores: Mapping[str, Mapping[str, float | None]], chosen: str = "") -> Table | None:
    """The best candidates of a choice, the chosen one and the best network given; None where none was tried."""
    if not scores:
        return None
    names = list(scores)
    shown = names[:BEST]
    given = next((name for name in names if name.startswith("edge ")), "")
    shown += [name for name in dict.fromkeys((chosen, given)) if name in scores and name not in shown]
    figures = [key for key in _FIGURES if any(scores[name].get(key) is not None for name in shown)]
    table = Table(title=titled("candidates on held-out samples, best first", len(shown), len(names)))
    table.add_column("candidate", overflow="fold")
    for key in figures:
        table.add_column(_FIGURES[key], justify="right", no_wrap=True)
    for name in shown:
        table.add_row(name + CHOSEN * (name == chosen), *(_figure(scores[name].get(key)) for key in figures))
    return table


def largest(rows: Sequence[Any], size: Any) -> list[Any]:
    """The rows that are shown of many: those of the largest ``size(row)``, in their order."""
    chosen = sorted(range(len(rows)), key=lambda index: -size(rows[index]))[:LARGEST]
    return [rows[index] for index in sorted(chosen)]


def seconds_text(seconds: Mapping[str, float]) -> str:
    """The sum, and the stages that took the most of it."""
    top = sorted(seconds.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{stage} {value:.1f}" for stage, value in top if value >= 0.05)
    return f"{sum(seconds.values()):.1f}" + (f" ({parts})" if parts else "")


def titled(text: str, shown: int, total: int) -> str:
    """A table's title, which says how much of it is shown."""
    return text if shown == total else f"{text}: {shown} of {total}, all in JSON"


def percent(share: float | None) -> str:
    """A share in percent with two digits, nothing where it is not known."""
    return "" if share is None else f"{100 * share:.2f}"


def shown(value: float | None) -> str:
    """Three significant digits, or a dash where a measure is not known or not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
