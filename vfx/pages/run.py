"""One run as a page (HTML) and as a card (Markdown), made of the facts that ``report.json`` holds.

In: the facts, the recipe as it was resolved, digests of the checkpoints, versions. Out: text. It holds no time and no
name of a machine, so that the same run gives the same bytes.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from vfx import __version__
from vfx.address import address
from vfx.emit.pretrained import BUILT_IN
from vfx.pages import marks
from vfx.pages.curves import choice_curves, judged_by, layer_curves
from vfx.pages.templates import filled, setting
from vfx.terminal import percent

PACKAGES = ("torch", "numpy", "scipy", "safetensors", "scikit-learn", "onnxruntime")
SHOWN = 12  # candidates above the fold
_TITLES = {"merge": "Merged network", "prune": "Sparse network", "prune_structured": "Smaller network"}
_RESULT = "result"
_REPAIR = {"repaired": "after", "pruned": "before"}


class Run(NamedTuple):
    """What is known of a run; ``facts`` as in report.json, ``edges`` with the name and SHA-256 of each checkpoint."""

    facts: Mapping[str, Any]
    recipe: Mapping[str, Any]
    edges: Sequence[Mapping[str, str]]


def page(run: Run) -> str:
    """The page."""
    return filled("run.html.jinja", _view(run))


def card(run: Run) -> str:
    """The card that stands beside the network: what it is, its figures, how to load it."""
    return filled("card.md.jinja", _view(run))


def _view(run: Run) -> dict[str, Any]:
    facts, recipe = run.facts, run.recipe
    networks = facts.get("evaluation", {}).get("networks", [])
    merged = recipe["action"] == "merge"
    return {
        "title": _TITLES[recipe["action"]],
        "recipe": {name: value for name, value in recipe.items() if name != "options"},
        "options": recipe["options"],
        "models": ", ".join(_models(recipe)),
        "loads_with": _loads_with(_models(recipe)[0], facts),
        "chosen": _chosen(facts, recipe["options"]),
        "facts": facts,
        "edges": run.edges,
        "headlines": _headlines(facts, networks),
        "evaluation": facts.get("evaluation"),
        "accuracy": _accuracy(networks),
        "costs": _costs(facts, networks),
        "candidates": _candidates(facts.get("scores", {}), facts.get("chosen")),
        "shown": SHOWN,
        "choice_curves": choice_curves(facts.get("scores", {}), facts.get("chosen")) if merged else {},
        "layers": _layers(facts),
        "diagnosis": facts.get("diagnosis"),
        "checks": _checks(facts),
        "versions": _versions(),
        "vfx_version": __version__,
    }


def _chosen(facts: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that came out otherwise than they were asked for."""
    return {name: facts[name] for name in asked if name in facts and setting(facts[name]) != setting(asked[name])}


def _models(recipe: Mapping[str, Any]) -> list[str]:
    """What builds the networks; of several the first builds the merged one."""
    return [recipe["model"]] if isinstance(recipe["model"], str) else recipe["model"]


def _loads_with(model: str, facts: Mapping[str, Any]) -> str | None:
    """What ``from_pretrained`` has to be told; None where the directory says it."""
    return repr(model) if facts["own_class"] and address(model).name not in BUILT_IN else None


def _headlines(facts: Mapping[str, Any], networks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Two or three figures that say most."""
    lines = []
    accuracies = {row["name"]: row["accuracy"] for row in networks if row["accuracy"] is not None}
    if _RESULT in accuracies:
        given = [value for name, value in accuracies.items() if name not in (_RESULT, "ensemble")]
        lines.append((f"{percent(accuracies[_RESULT])} %", f"accuracy; best network given {percent(max(given))} %"))
    sizes = _ratios(facts)
    lines += [(f"{ratio:.3g}×", text) for text, ratio in sizes.items()]
    return lines


def _ratios(facts: Mapping[str, Any]) -> dict[str, float]:
    """Cost against one of the networks that were given."""
    if "nonzeros" in facts:
        return {
            "weights that are not zero": facts["nonzeros"] / max(facts["params"], 1),
            "FLOPs without products with zero": facts["flops_after"] / max(facts["flops"], 1),
        }
    return {"parameters of one network given": facts["params_ratio"], "of its FLOPs": facts["flops_ratio"]}


def _accuracy(networks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows with a dot on a scale, and the ends of the scale; agreement where there are no labels."""
    key = "accuracy" if any(row["accuracy"] is not None for row in networks) else "agreement"
    values = [100 * row[key] for row in networks if row[key] is not None]
    if not values:
        return {"rows": [], "key": key, "low": 0, "high": 100}
    low, high = marks.scale_of(values)
    span = max(high - low, 1)
    rows = [{**row, "mark": marks.dot((100 * row[key] - low) / span, row["name"] == _RESULT)} for row in networks]
    return {"rows": rows, "key": key, "low": low, "high": high}


def _costs(facts: Mapping[str, Any], networks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each network and kind of cost, its bar relative to the largest of the kind."""
    rows = [row for row in networks if row["params"] is not None] or [
        {"name": _RESULT, "params": facts["params"], "nonzeros": facts.get("nonzeros"), "flops": facts["flops"]}
    ]
    bars = []
    for key, title in (("params", "parameters"), ("nonzeros", "not zero"), ("flops", "FLOPs")):
        most = max((row[key] or 0 for row in rows), default=0)
        if most and not (key == "nonzeros" and "nonzeros" not in facts):
            bars += [
                {"kind": title, "name": row["name"], "value": row[key],
                 "mark": marks.bar((row[key] or 0) / most, row["name"] == _RESULT)}
                for row in rows
            ]  # fmt: skip
    return bars


def _candidates(scores: Mapping[str, Mapping[str, float | None]], chosen: str | None) -> list[dict[str, Any]]:
    """Rows as they were judged, best first, with a dot on a logarithmic scale of the judge; the chosen marked."""
    key = judged_by(scores)
    positive = [score[key] for score in scores.values() if key and (score.get(key) or 0) > 0]
    low, high = (math.log(min(positive)), math.log(max(positive))) if positive else (0.0, 1.0)  # type: ignore[type-var, arg-type]
    rows = []
    for name, score in scores.items():
        value = score.get(key) if key else None
        share = 0.0 if not value or value <= 0 else (math.log(value) - low) / max(high - low, 1e-9)
        rows.append({"name": name, **{k: score.get(k) for k in ("accuracy", "agreement", "loss", "divergence")},
                     "mark": marks.dot(share, name == chosen), "judge": key, "chosen": name == chosen})  # fmt: skip
    return rows


def _layers(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Curves over layers: of a merged network what they hand on, of a pruned one zeros, of a smaller one widths."""
    if "diagnosis" in facts:
        return layer_curves(facts["diagnosis"].get("rows", []))
    rows = facts["layers"] if "nonzeros" in facts else []
    groups = facts.get("groups") or []
    names = [row["name"].removesuffix(".weight") for row in rows or groups]
    if groups:
        widths = {when: [group[when] * group["blocks"] for group in groups] for when in ("after", "before")}
        return {"Channels of each group": marks.lines(widths, names, "")}
    if not rows:
        return {}
    zeros = [100 * row["sparsity"] for row in rows]
    curves = {"Share of zeros in each layer": marks.lines({"zeros": zeros}, names, "%")}
    if any(row["variance_after"] is not None for row in rows):
        variances = {name: [row[f"variance_{when}"] for row in rows] for name, when in _REPAIR.items()}
        curves["Variance of each layer's outputs, against the network before"] = marks.lines(variances, names, "×")
    return curves


def _checks(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was checked, its error, and what that says."""
    checks = []
    if facts.get("verify_error") is not None and "groups" in facts:
        checks.append(
            ("removal", f"{facts['verify_error']:.1e}", "equals the network with masked channels, in float64")
        )
    elif facts.get("verify_error") is not None:
        checks.append(("alignment", f"{facts['verify_error']:.1e}", "each network computes what it did, in float64"))
    own_class = facts["own_class"]
    checks.append(
        ("class", "own" if own_class else "new", "the user's own class" if own_class else facts["class_reason"])
    )
    checks.append(("file", "outputs", "check.safetensors holds outputs that the loaded network must give"))
    if facts.get("not_counted"):
        checks.append(("FLOPs", "partial", f"without {', '.join(facts['not_counted'])}"))
    return checks


def _versions() -> dict[str, str]:
    versions = {"vfx": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
