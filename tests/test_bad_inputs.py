"""Bad input ends in an error of vfx that names it: every call of the table, and every argument of every function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vfx
from benchmarks.bad_inputs import CASES, RESULTS, X, _net, refusal, table
from vfx.arguments import LEAST, check_argument
from vfx.errors import ArgumentError, VfxError
from vfx.match.catalogue import MATCHERS

MADE_BY_VFX = {
    "Result",
    "SampleSelection",
    "Program",
    "Matching",
    "Problem",
    "WidthFamily",
}  # dataclasses that users are handed
WITHOUT_ARGUMENTS = {
    "Pass", "Matcher", "Score", "Allocation", "Combiner", "Magnitude", "Random", "Transform", "LinearMatching",
}  # fmt: skip
CHECKED_FIELDS = {"Normalization", "PartialMatching", "Reference"}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_refused_in_words(name: str) -> None:
    error = refusal(CASES[name])
    text = str(error)
    assert 10 < len(text) < 1200
    assert "Traceback" not in text
    assert type(error) is not VfxError


def test_the_committed_table_is_current() -> None:
    assert len(CASES) >= 60
    assert (RESULTS / "bad_inputs.md").read_text() == table()


def test_a_call_that_is_accepted_or_breaks_is_noticed() -> None:
    """The control."""
    with pytest.raises(AssertionError, match="accepted"):
        refusal(lambda: vfx.trace(_net(), X[:2]))
    with pytest.raises(ZeroDivisionError):
        refusal(lambda: 1 // 0)


# every argument -------------------------------------------------------------------------------------------------------


class Nothing:
    """A value that no argument is."""

    def __repr__(self) -> str:
        return "<nothing>"


def _called(name: str) -> Callable[..., Any]:
    value = getattr(vfx, name)
    return value.__init__ if inspect.isclass(value) else value


FUNCTIONS = [
    name
    for name in vfx.__all__
    if not name.startswith("_") and name not in MADE_BY_VFX | WITHOUT_ARGUMENTS | CHECKED_FIELDS
]
ARGUMENTS = [
    (name, argument)
    for name in FUNCTIONS
    for argument, one in inspect.signature(_called(name)).parameters.items()
    if (argument != "self" and one.annotation not in ("Any", "object")) or argument == "device"
]


def test_all_that_users_call_is_checked() -> None:
    unchecked = [name for name in FUNCTIONS if not getattr(_called(name), "checked", False)]
    assert unchecked == []


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=lambda text: text)
def test_an_argument_of_a_wrong_type_is_named(name: str, argument: str) -> None:
    parameters = inspect.signature(_called(name)).parameters
    needed = [key for key, one in parameters.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    values = {key: _fitting(name, key) for key in needed if key != "self"} | {argument: Nothing()}
    with pytest.raises(ArgumentError, match=rf"{name}: {argument} must be .*, got <nothing>"):
        getattr(vfx, name)(**values)


def _fitting(name: str, argument: str) -> Any:
    """A value of the right type for an argument that has no default."""
    known: dict[str, Any] = {
        "models": [_net(), _net(seed=1)], "model": _net(), "module": _net(), "merged": _net(), "path": "net.pt",
        "references": [_net()], "passes": [], "recorders": [], "matcher": "weight", "score": "magnitude", "n": 4,
        "kind": "repair", "count": 1, "sparsity": 0.5, "preserve": 1, "heads": 1,
        "from_": _net(), "to": _net(), "combine": "ties",
    }  # fmt: skip
    if name == "ToFirstWidth" and argument in ("others", "matcher"):
        return [vfx.trace(_net(), X[:2])] if argument == "others" else MATCHERS["weight"]()
    if name == "Reconstruct" and argument == "references":
        return []
    if argument == "symmetry":
        return vfx.symmetry(_net(), X[:2])
    if argument == "like":
        return vfx.trace(_net(), X[:2])
    return known.get(argument, X[:2])


@pytest.mark.parametrize("name", LEAST)
def test_numbers_have_a_least_value(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"f: {name} must be at least {LEAST[name]}, got {LEAST[name] - 1}"):
        check_argument("f", name, LEAST[name] - 1, int)
    check_argument("f", name, LEAST[name], int)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ArgumentError, match=f"TaskArithmetic: scale must be a finite number, got {value}"):
        vfx.TaskArithmetic(scale=value)
    assert vfx.TaskArithmetic(scale=-1e300).scale == -1e300


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (np.int64(3), int), (np.float32(0.5), float), (3, float), (torch.tensor(0.5), float), (np.bool_(True), bool),
        ((0.5, 0.5), list[float]), (np.array([0.5, 0.5]), list[float]), (torch.tensor([0.5]), list[float]),
        (nn.ModuleList([nn.ReLU()]), list[nn.Module]), ({"a": 1}, dict[str, float]), (print, Callable[..., Any]),
        (None, int | None), (0.5, float | None),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_of_other_libraries_are_what_they_are(value: Any, hint: Any) -> None:
    check_argument("f", "x", value, hint)
    with pytest.raises(ArgumentError, match="f: x must be "):
        check_argument("f", "x", object(), hint)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (True, int, "a whole number"), (1, bool, "True or False"), (1.0, int, "a whole number"),
        ("ab", list[str], "a list of texts"), (nn.Sequential(nn.ReLU()), list[nn.Module], "a list of networks"),
        ({"a": "b"}, dict[str, float], "a dict of numbers"), (iter([0.5]), list[float], "a list of numbers"),
        ([0.5, "a"], list[float], "a list of numbers"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_only_looks_like_it_is_refused(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=f"f: x must be {words}, got"):
        check_argument("f", "x", value, hint)
