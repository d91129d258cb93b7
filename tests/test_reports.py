"""What people read in a terminal: 80 columns, short, and nothing lost that ``to_dict`` does not hold."""

from __future__ import annotations

import pytest
import torch
from conftest import edges, images, network
from torch import nn

import vfx
from vfx.terminal import BEST, LARGEST, WIDTH, held_out_table, rendered, seconds_text

X = images(96, 8)


def _deep() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in zip([3, *[6] * 14], [6] * 15):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def _fits(text: str, lines: int) -> None:
    assert max(map(len, text.splitlines())) <= WIDTH, text
    assert len(text.splitlines()) <= lines, text


def test_a_merge_shows_the_best_candidates_of_many() -> None:
    result = vfx.merge(edges(_deep, X), X[:2], data=X, budget={"params": 1.5})
    text, scores = str(result.report), result.report.to_dict()["scores"]
    _fits(text, 45)
    assert len(scores) > BEST
    assert f"{BEST} of {len(scores)}" in text or f"{BEST + 1} of {len(scores)}" in text
    flat = " ".join(text.replace("│", " ").split())
    assert all(name in flat for name in list(scores)[:BEST])
    assert list(scores)[-1] not in flat


@pytest.mark.parametrize("structured", [False, True])
def test_a_pruning_shows_the_largest_layers_of_many(structured: bool) -> None:
    prune = vfx.prune_structured if structured else vfx.prune
    result = prune(network(_deep, X), X[:2], sparsity=0.5, data=X)  # type: ignore[operator]
    text, facts = str(result.report), result.report.to_dict()
    rows = facts["groups"] if structured else facts["layers"]
    _fits(text, 50)
    assert len(rows) > LARGEST
    assert f"{LARGEST} of {len(rows)}" in text
    assert facts["chosen"] in facts["scores"]
    assert "(chosen)" in text


def test_the_best_network_that_was_given_is_always_shown() -> None:
    scores = {f"way {i}": {"loss": float(i), "accuracy": None} for i in range(9)} | {
        "edge 1": {"loss": 10.0, "accuracy": None}, "edge 0": {"loss": 11.0, "accuracy": None}
    }  # fmt: skip
    text = rendered(held_out_table(scores))
    assert "edge 1" in text
    assert "edge 0" not in text
    assert "way 5" not in text
    assert "accuracy" not in text  # nobody measured it
    assert "chosen" not in text


def test_the_chosen_candidate_is_marked_and_always_shown() -> None:
    scores = {f"way {i}": {"loss": float(i)} for i in range(9)}
    text = rendered(held_out_table(scores, "way 7"))
    assert "way 7 (chosen)" in text
    assert text.count("(chosen)") == 1
    assert "way 6" not in text


def test_seconds_are_a_sum_and_the_slowest_stages() -> None:
    assert seconds_text({"trace": 1.0, "choice": 20.0, "emit": 0.01, "Align": 0.5, "solve": 3.0}) == (
        "24.5 (choice 20.0, solve 3.0, trace 1.0)"
    )


def test_pins_are_grouped_by_their_reason() -> None:
    found = vfx.symmetry(_deep(), torch.zeros(2, 3, 8, 8))
    text = str(found)
    _fits(text, 60)
    assert text.count("pinned, ") == len({pin.reason for pin in found.pinned})
    assert len(found.pinned) > 20
    assert "0.weight[2, 3], 3.weight[2, 3], 6.weight[2, 3] and 12 more" in " ".join(text.split())
