"""Merging and pruning without data say what was not corrected and what to pass; with data, or on request, nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from conftest import edges, images

import vfx
from vfx.errors import UncorrectedNote
from vfx.models import vgg11

X = images(24, 32, 1)
PAIR = edges(lambda: vgg11(width=1 / 16, in_channels=1), X)
CALLS: dict[str, Callable[..., Any]] = {
    "merged": lambda **options: vfx.merge(PAIR, X[:2], progress=False, **options),
    "pruned": lambda **options: vfx.prune(PAIR[0], X[:2], sparsity=0.5, progress=False, **options),
    "pruned whole": lambda **options: vfx.prune_structured(PAIR[0], X[:2], sparsity=0.5, progress=False, **options),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_data_there_is_a_warning_and_a_note(name: str) -> None:
    with pytest.warns(UncorrectedNote, match=rf"{name.split()[0]} without data: .*Pass data= \(--data\)") as caught:
        result = CALLS[name]()
    assert [one.filename for one in caught] == [__file__]
    assert sum("without data" in note for note in result.report.notes) == 1
    assert "without data" in " ".join(str(result.report).split())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("options", [{"data": X, "normalize": "rescale"}, {"normalize": None}], ids=["data", "asked"])
def test_with_data_or_on_request_there_is_none(name: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CALLS[name](**options)
    assert not any("without data" in note for note in result.report.notes)


def test_proofs_say_what_they_prove() -> None:
    assert "of the alignment: each edge computes what it did" in str(CALLS["merged"](normalize=None).report)
    assert "of the removal: equals the network with masked channels" in str(
        CALLS["pruned whole"](normalize=None).report
    )
