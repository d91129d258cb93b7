"""The page and the card of a run: well formed, complete, safe, the same each time, and legible without colour."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from vfx.pages import marks
from vfx.pages.curves import choice_curves, layer_curves
from vfx.pages.run import SHOWN, Run, card, page

NETWORK = {"accuracy": 0.98, "loss": 0.08, "agreement": 1.0, "params": 1000, "nonzeros": 1000, "flops": 5000}


def _way(loss: float | None, follow: int | None, edge: int | None = None, preserve: int = 0) -> dict[str, Any]:
    return {"accuracy": 0.9, "agreement": 1.0, "loss": loss, "divergence": None, "scale": 1.0,
            "preserve": preserve, "follow": follow, "follow_edge": edge}  # fmt: skip


def _facts(**more: Any) -> dict[str, Any]:
    networks = [{"name": "a.pt", **NETWORK}, {"name": "result", **NETWORK, "accuracy": 0.97, "params": 500}]
    return {
        "outcome": "solved & kept",
        "scores": {f"way {i}": _way(0.1 * 2**i, None) for i in range(SHOWN + 3)},
        "solve": "least_squares", "passes": ["Align(<b>)", "Interpolate(0.5)"], "notes": ["a note"],
        "params": 500, "flops": 5000, "params_ratio": 0.5, "flops_ratio": 1.0, "not_counted": [],
        "verify_error": 1e-15, "own_class": True, "class_reason": "",
        "evaluation": {"samples": 500, "labels": True, "against": "a.pt", "batch": 2, "networks": networks},
    } | more  # fmt: skip


def _run(action: str = "merge", **more: Any) -> Run:
    recipe = {"action": action, "model": "net.py:make", "weights": ["<a>.pt"], "data": "digits", "evaluate": "digits",
              "options": {"solve": "auto", "seed": 0}}  # fmt: skip
    return Run(_facts(**more), recipe, [{"file": "a.pt", "sha256": "12ab"}])


LAYERS = [{"name": f"{i}.weight", "sparsity": 0.1 * i, "variance_before": 0.5, "variance_after": 0.9} for i in range(9)]
RUNS = {
    "merge": _run(),
    "sparse": _run("prune", layers=LAYERS, nonzeros=100, flops_after=2500),
    "smaller": _run("prune_structured", groups=[{"name": "0.weight", "before": 8, "after": 4, "blocks": 2}]),
    "nothing measured": _run(evaluation={}, scores={}, verify_error=None, layers=8),
}


class Reader(HTMLParser):
    """Tags that close in their order, and the texts between them."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        assert not [value for name, value in attrs if name in ("src", "href")], "the page needs no other file"
        if tag != "meta":
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _read(text: str) -> str:
    reader = Reader()
    reader.feed(text)
    assert not reader.opened
    return " ".join(" ".join(reader.texts).split())


@pytest.mark.parametrize("name", RUNS)
def test_a_page_is_whole(name: str) -> None:
    text = _read(page(RUNS[name]))
    for title in ("What was done", "Accuracy", "Cost", "Checks", "Settings", "Versions"):
        assert title in text
    assert "Align(<b>)" in text  # escaped in the file, itself for the reader
    assert "solve auto least_squares" in text  # what was asked for, and what it came to
    assert "12ab" in text
    assert page(RUNS[name]) == page(RUNS[name])


def test_no_heading_stands_over_nothing_where_an_edge_is_taken() -> None:
    assert "What was done" in page(_run())
    assert "What was done" not in page(_run(passes=[]))


def test_all_candidates_stand_in_the_page() -> None:
    text = _read(page(RUNS["merge"]))
    assert all(f"way {i} " in text for i in range(SHOWN + 3))
    assert "3 more" in text
    assert "98.00" in text
    assert "97.00 % accuracy; best network given 98.00 %" in text


def test_curves_show_layers_and_name_their_lines() -> None:
    text = page(RUNS["sparse"])
    assert text.count('<svg class="lines"') == 2
    assert {"zeros", "repaired", "pruned"} <= set(re.findall(r">(\w+)</text>", text))
    assert "Channels of each group" in page(RUNS["smaller"])
    assert '<svg class="lines"' not in page(RUNS["merge"])


def test_what_came_out_is_told_apart_without_colour() -> None:
    assert 'fill="white"' in marks.dot(0.5, filled=False)
    assert 'fill="white"' not in marks.dot(0.5, filled=True)


def test_labels_of_lines_that_meet_do_not_cover_each_other() -> None:
    drawn = marks.lines({"one": [1.0, 2.0], "two": [1.0, 2.0]}, ["a", "b"], "")
    heights = [float(y) for y, name in re.findall(r'y="([\d.]+)" style="[^"]+">(\w+)<', drawn)]
    assert len(heights) == 2
    assert abs(heights[0] - heights[1]) >= 16


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [None, 2.0], [-1.0, 1.0]])
def test_lines_of_few_or_equal_values(values: list[float | None]) -> None:
    drawn = marks.lines({"one": values}, [str(i) for i in range(len(values))], "%")
    assert "nan" not in drawn
    assert drawn.count("<circle") == len([value for value in values if value is not None])


def test_a_run_without_data_has_a_page_and_a_card() -> None:
    run = RUNS["nothing measured"]
    bare = run._replace(recipe={key: run.recipe[key] for key in ("action", "model", "weights", "options")})
    assert "Nothing was measured" in _read(page(bare))
    assert "calibrated" not in card(bare)


def test_the_card_says_how_to_load_the_network() -> None:
    text = card(RUNS["merge"])
    assert text.startswith("---\nlibrary_name: vfx\n")
    assert "vfx.from_pretrained(\".\", model='net.py:make')" in text
    assert "| result | 97.00 |" in text
    named = RUNS["merge"]._replace(recipe={**RUNS["merge"].recipe, "model": "torchvision:resnet18"})
    assert 'vfx.from_pretrained(".")' in card(named)


@pytest.mark.parametrize("index", [0, 2, SHOWN + 1])
def test_the_chosen_candidate_is_marked_wherever_it_stands(index: int) -> None:
    html = page(_run(chosen=f"way {index}"))
    above, _ = html.split("<details>", 1)
    assert f'<tr class="result"><td>way {index} (chosen)</td>' in above
    assert html.count("(chosen)") == 1
    assert all(html.count(f"<td>way {i}<") == (i != index) for i in range(SHOWN + 3))


def test_no_candidate_is_marked_where_none_was_chosen() -> None:
    assert "(chosen)" not in page(_run())


def test_large_figures_of_an_axis_are_written_out() -> None:
    assert ">1,500<" in marks.lines({"channels": [0.0, 1500.0]}, ["a", "b"], "")


CHOICE = {
    "least squares": _way(0.4, 0, 0), "behind 2 of 0": _way(0.2, 2, 0), "behind 3 of 0": _way(0.3, 3, 0),
    "behind 3 of 1": _way(0.6, 3, 1), "repair": _way(0.7, None), "edge 0": _way(0.5, 4, 0), "edge 1": _way(0.8, 4, 1),
}  # fmt: skip


def _points(drawn: str) -> list[list[tuple[float, float]]]:
    """The points of each line."""
    lines = re.findall(r'points="([^"]*)"', drawn)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]  # type: ignore[misc]


def test_candidates_are_drawn_over_the_layers_that_follow_an_edge() -> None:
    (caption, drawn), *others = choice_curves(CHOICE, "behind 2 of 0").items()
    assert not others
    assert caption.startswith("Loss on held-out samples")
    first, second, normalized = _points(drawn)
    assert [len(first), len(second), len(normalized)] == [4, 3, 2]
    assert first[0] == second[0]  # solved for the mean of both
    lowest = max(first, key=lambda point: point[1])
    assert f'<circle cx="{lowest[0]}" cy="{lowest[1]}" r="7"' in drawn  # the chosen one
    assert {"edge 0", "edge 1", "normalized", "chosen"} <= set(re.findall(r">([^<>]+)</text>", drawn))
    heights = {y for _, y in [*first, *second]}
    assert max(heights) - min(heights) > marks.HIGH / 3, "no half of the picture is empty"
    bare = choice_curves(CHOICE, None)
    assert "chosen" not in str(bare)


def test_a_far_normalization_does_not_flatten_the_lines() -> None:
    (drawn,) = choice_curves(CHOICE | {"repair": _way(50.0, None)}, None).values()
    assert "normalized" not in drawn


def test_candidates_are_drawn_over_the_layers_that_are_kept() -> None:
    kept = {
        "preserve 2": _way(0.1, 0, 0, 2),
        "preserve 2, repair": _way(0.3, None, None, 2),
        "preserve 3": _way(0.15, 0, 0, 3),
    }
    (drawn,) = choice_curves(CHOICE | kept, "preserve 2").values()  # one way to follow an edge with 2 kept: no line
    merged, edge = _points(drawn)
    assert [len(merged), len(edge)] == [3, 2]
    assert merged[1][1] == max(y for _, y in merged)
    both = choice_curves(CHOICE | kept, "behind 2 of 0")
    assert len(both) == 2


@pytest.mark.parametrize("scores", [{}, {"repair": _way(0.7, None), "none": _way(0.9, None)}, {"a": _way(None, 0, 0)}])
def test_a_choice_without_a_curve_draws_none(scores: dict[str, Any]) -> None:
    assert not choice_curves(scores, None)


def test_values_that_are_not_finite_are_not_drawn() -> None:
    (drawn,) = choice_curves(CHOICE | {"behind 3 of 1": _way(float("inf"), 3, 1)}, None).values()
    assert "inf" not in drawn
    assert "nan" not in drawn


def test_layers_are_drawn_against_the_edges() -> None:
    rows = [
        {
            "layer": f"features.{i}",
            "shortcut": i == 2,
            "feature_ratio": 0.5**i,
            "variance_ratio": None if i == 0 else 1.0,
        }
        for i in range(5)
    ]
    (drawn,) = layer_curves(rows).values()
    feature, variance = _points(drawn)
    assert [len(feature), len(variance)] == [4, 3]
    steps = [b[1] - a[1] for a, b in pairwise(feature)]
    assert steps[2] == pytest.approx(steps[0], abs=0.2)  # halves are equally far apart
    assert steps[1] == pytest.approx(2 * steps[0], abs=0.2)
    assert ">1×<" in drawn
    text = page(_run(diagnosis={"rows": rows, "text": "verdict: healthy"}))
    assert drawn in text
    assert "verdict: healthy" in text
    assert "no layer" in page(_run(diagnosis={"text": "Layers were not held against the edges': no layer"}))


def test_more_lines_than_can_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be told apart"):
        marks.lines({str(i): [1.0, 2.0] for i in range(9)}, ["a", "b"])


@pytest.mark.parametrize("values", [[0.011, 0.9], [1.0, 1.0], [0.3, 0.31], [2e-4, 1.9], [1500.0, 4000.0]])
def test_a_logarithmic_axis_holds_its_values(values: list[float]) -> None:
    drawn = marks.lines({"one": values}, ["a", "b"], log=True)
    ((first, last),) = _points(drawn)
    assert all(0 <= y <= marks.HIGH - 48 for _, y in (first, last))
    assert 2 <= drawn.count("<line") <= 8


def test_many_edges_are_drawn_as_far_as_they_can_be_told_apart() -> None:
    many = {f"edge {i}": _way(1.0 - 0.05 * i, 4, i) for i in range(12)}
    (drawn,) = choice_curves({"least squares": _way(0.4, 0, 0)} | many, None).values()
    assert re.findall(r">(edge \d+)<", drawn) == [f"edge {i}" for i in range(7, 12)]
