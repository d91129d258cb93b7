"""Arguments of public functions, held against their annotations before anything is done with them.

``@checked`` refuses a value whose type the annotation does not admit, NaN and infinities, and numbers below their least
value (``LEAST``, by the argument's name, which means one thing everywhere). What depends on other values (the number of
layers, weights that sum to 1) and names of catalogues that grow are checked where they are used.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from vfx.errors import ArgumentError
from vfx.names import check_known

P = ParamSpec("P")
R = TypeVar("R")

LEAST = {
    "apart": 0, "block": 1, "count": 0, "epochs": 0, "iterations": 1, "max_rows": 1, "max_samples": 1, "memory": 1,
    "memory_limit": 0, "minibatch": 1, "opset": 18, "points": 3, "repair_samples": 1, "restarts": 0, "ridge": 0,
    "round_to": 1, "rounds": 1, "seed": 0,
}  # fmt: skip
_NAMES: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None",
    nn.Module: "a network", Tensor: "a tensor", os.PathLike: "a path",
}  # fmt: skip
_SEVERAL: dict[Any, str] = {
    int: "whole numbers", float: "numbers", str: "texts", nn.Module: "networks", Tensor: "tensors", type(None): "None",
}  # fmt: skip
_LISTS = (Sequence, Collection, Iterable, list)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` (or a constructor) with its arguments checked. Raises ArgumentError."""
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # Python's own message names the function
            return function(*args, **kwargs)
        for name, hint in _hints(function).items():
            if name in given and signature.parameters[name].kind not in _VARIADIC:
                check_argument(owner, name, given[name], hint)
        return function(*args, **kwargs)

    wrapper.checked = True  # type: ignore[attr-defined]
    return wrapper


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_names(owner: str, function: Callable[..., Any], names: Iterable[str]) -> None:
    """Raise ArgumentError for a name that is no keyword argument of ``function``."""
    accepted = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    check_known(owner, function.__name__, names, accepted)


def check_fields(value: Any) -> None:
    """The same for the fields of a dataclass that users make."""
    for name, hint in _hints(type(value).__init__).items():
        check_argument(type(value).__name__, name, getattr(value, name), hint)


def check_argument(owner: str, name: str, value: Any, hint: Any) -> None:
    """Raise ArgumentError unless ``value`` is what ``hint`` says, and at least the least that ``name`` admits."""
    if not _fits(value, hint):
        way = "; vfx.load reads files" if name in ("model", "models") and _are_paths(value) else ""
        raise ArgumentError(f"{owner}: {name} must be {_words(hint)}, got {_shown(value)}{way}")
    if isinstance(value, Real) and not math.isfinite(value):
        raise ArgumentError(f"{owner}: {name} must be a finite number, got {value}")
    least = LEAST.get(name)
    if least is not None and isinstance(value, Real) and not float(value) >= least:
        raise ArgumentError(f"{owner}: {name} must be at least {least}, got {value}")
    if name == "device" and value is not None:
        _check_device(owner, value)


@functools.cache
def _hints(function: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    return hints


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; annotations that say nothing checkable admit all."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin in _LISTS:
        return _is_list(value, origin) and (Iterable is origin or all(_fits(item, inner[0]) for item in value))
    if origin is tuple:
        fixed = Ellipsis not in inner
        return _is_list(value, Sequence) and (not fixed or (len(value) == len(inner) and all(map(_fits, value, inner))))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if origin is not None and isinstance(origin, type):
        return callable(value) if issubclass(origin, Callable) else isinstance(value, origin)  # type: ignore[arg-type]
    return hint is Any or not isinstance(hint, type) or _is(value, hint)


def _is(value: Any, kind: type) -> bool:
    """isinstance, with numbers of any library and no truth value taken for one."""
    if kind is bool:
        return isinstance(value, (bool, np.bool_))
    if kind in (int, float):
        number = Integral if kind is int else Real
        scalar = isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0 and kind is float
        return (isinstance(value, number) and not isinstance(value, bool)) or scalar
    return isinstance(value, kind)


def _are_paths(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return bool(items) and all(isinstance(item, (str, os.PathLike)) for item in items)


def _is_list(value: Any, kind: Any) -> bool:
    """A text is no list of texts, a network no list of layers, and what is read once a list where that will do."""
    if isinstance(value, nn.Module):
        return isinstance(value, nn.ModuleList)
    single = isinstance(value, (str, bytes, Mapping)) or getattr(value, "ndim", 1) == 0
    return isinstance(value, Iterable) and not single and (kind is Iterable or not isinstance(value, Iterator))


def _words(hint: Any) -> str:
    """An annotation as a reader says it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        flat = (
            word
            for part in inner
            for word in (map(repr, get_args(part)) if get_origin(part) is Literal else [_words(part)])
        )
        return _either(list(dict.fromkeys(flat)))
    if origin is Literal:
        return _either([repr(choice) for choice in inner])
    if origin in _LISTS:
        return f"a list of {_several(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} {_several(inner[0])}" if Ellipsis not in inner else "a list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a dict of {_several(inner[1])}"
    if isinstance(origin, type):
        return _NAMES.get(origin, "a function")
    return _NAMES.get(hint) or f"a {getattr(hint, '__name__', str(hint))}"


def _either(said: list[str]) -> str:
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} or {said[-1]}"


def _several(hint: Any) -> str:
    """The plural of an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_several(choice) for choice in get_args(hint))
    return _SEVERAL.get(hint) or f"{hint.__name__} objects" if isinstance(hint, type) and hint is not Any else "values"


def _shown(value: Any) -> str:
    """A value in a message: short ones as they are written, and the type of others."""
    if isinstance(value, (nn.Module, Tensor, np.ndarray)) or len(repr(value)) > 60:
        return f"{type(value).__name__}"
    return repr(value)


def _check_device(owner: str, device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ArgumentError(
            f"{owner}: device must be a device that is here, such as 'cpu', got {device!r}: {cause}"
        ) from error
