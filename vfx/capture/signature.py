"""How the arguments of ``forward`` become a graph's placeholders, and back.

A graph takes one tensor for each placeholder. ``forward`` takes positional and keyword arguments that may nest tensors
in tuples, lists and dicts, beside constants (None, bool, int, float, str) that a capture bakes in.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfx.errors import ArgumentError, VfxError

_CONSTANTS = (type(None), bool, int, float, str)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of ``forward``."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[Any], Any]) -> Call:
        """The same call with every leaf (tensor or constant) changed."""
        return Call(*pytree.tree_map(change, (self.args, dict(self.kwargs))))

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the placeholders."""
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    def __str__(self) -> str:
        """Shapes as they stand in error messages."""
        named = [f"{name}={_shape(value)}" for name, value in self.kwargs.items()]
        return ", ".join([*map(_shape, self.args), *named])


@dataclass(frozen=True)
class Leaf:
    """A tensor (with its placeholder's name) or a constant inside one argument."""

    path: tuple[Any, ...]
    name: str | None
    value: Any = None


@dataclass(frozen=True)
class Argument:
    """One argument of ``forward`` as it was given to the capture."""

    name: str
    keyword: bool
    spec: Any
    leaves: tuple[Leaf, ...]

    @property
    def tensors(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.name is not None)

    def read(self, value: Any, error: type[VfxError] = ArgumentError) -> list[Tensor]:
        """The tensors of a value that is nested like this argument; its constants must be the captured ones."""
        leaves, spec = pytree.tree_flatten(_containers(value))
        if spec != self.spec:
            expected = pytree.tree_unflatten([leaf.name or leaf.value for leaf in self.leaves], self.spec)
            raise error(
                f"argument {self.name!r} is nested as {_outline(value)}; the network was captured with {expected}"
            )
        for leaf, given in zip(self.leaves, leaves):
            if leaf.name is None:
                require_constant(f"{self.name}{pytree.keystr(leaf.path)}", leaf.value, given, error)
            elif not isinstance(given, Tensor):
                raise error(f"input {leaf.name!r} is {type(given).__name__}, not a tensor")
        return [given for leaf, given in zip(self.leaves, leaves) if leaf.name is not None]


@dataclass(frozen=True)
class Signature:
    """The captured arguments of ``forward``, positional ones first; their tensors in order are the placeholders."""

    arguments: tuple[Argument, ...]

    @property
    def names(self) -> list[str]:
        """Names of the placeholders."""
        return [str(leaf.name) for argument in self.arguments for leaf in argument.tensors]

    @property
    def inputs(self) -> tuple[Argument, ...]:
        """The arguments that hold tensors."""
        return tuple(argument for argument in self.arguments if argument.tensors)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """One tensor for each placeholder from a call like the captured one. Raises ArgumentError."""
        given = self._named(args, kwargs)
        missing = [argument.name for argument in self.inputs if argument.name not in given]
        if missing:
            raise ArgumentError(
                f"the network takes {len(self.inputs)} inputs ({', '.join(a.name for a in self.inputs)}), got "
                f"{len(given)}: {', '.join(missing)} missing"
            )
        tensor_lists = (a.read(given[a.name]) for a in self.arguments if a.name in given)
        return [tensor for tensors in tensor_lists for tensor in tensors]

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = [argument.name for argument in self.arguments]
        if len(args) > len(names):
            raise ArgumentError(f"the network takes {len(names)} inputs ({', '.join(names)}), got {len(args)}")
        unknown = [name for name in kwargs if name not in names[len(args) :]]
        if unknown:
            raise ArgumentError(
                f"the network was not captured with {', '.join(unknown)}; it takes {', '.join(names)}, each once"
            )
        return dict(zip(names, args)) | dict(kwargs)

    def call(self, tensors: Sequence[Any]) -> Call:
        """The call of ``forward`` that holds these tensors and the captured constants."""
        flat = iter(tensors)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for argument in self.arguments:
            leaves = [next(flat) if leaf.name is not None else leaf.value for leaf in argument.leaves]
            value = pytree.tree_unflatten(leaves, argument.spec)
            if argument.keyword:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return Call(tuple(args), kwargs)


def as_call(example_inputs: Any) -> Call:
    """Example inputs as a call: a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    if isinstance(example_inputs, Call):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Call((example_inputs,))
    if isinstance(example_inputs, Mapping) and example_inputs:
        return Call((), _containers(example_inputs))
    if isinstance(example_inputs, (tuple, list)) and example_inputs:
        return Call(tuple(_containers(value) for value in example_inputs))
    raise ArgumentError(
        "example_inputs must be a tensor or a non-empty tuple of forward's arguments, or a dict of its keyword "
        f"arguments, got {type(example_inputs)}"
    )


def batched_call(call: Call) -> Call:
    """A call whose batch holds at least two samples: a single sample is doubled."""
    batch = batch_size(call.tensors())
    if batch is None:
        raise ArgumentError("example_inputs need at least one tensor with a batch axis")
    if batch == 0:
        raise ArgumentError("example_inputs hold an empty batch; give at least one sample")
    single = lambda x: isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == 1  # noqa: E731
    return call if batch > 1 else call.map(lambda x: torch.cat([x, x]) if single(x) else x)


def batch_size(tensors: Sequence[Any]) -> int | None:
    """The first axis of the first tensor that has one."""
    return next((int(x.shape[0]) for x in tensors if isinstance(x, Tensor) and x.ndim > 0), None)


def has_batch(tensors: Sequence[Any]) -> list[bool]:
    """Which values carry the batch on their first axis."""
    size = batch_size(tensors)
    return [isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == size for x in tensors]


def in_order(forward: Callable[..., Any], call: Call, owner: str) -> Call:
    """The call with its keyword arguments in the order of ``forward``. Raises ArgumentError if it does not fit."""
    parameters = inspect.signature(forward).parameters
    named = [name for name, parameter in parameters.items() if parameter.kind not in _VARIADIC]
    open_ended = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in call.kwargs if name not in named and not open_ended]
    if unknown:
        raise ArgumentError(
            f"the dict of example_inputs names {', '.join(map(repr, unknown))}, which {owner}.forward() does not take; "
            f"it takes {', '.join(named)}"
        )
    try:
        inspect.signature(forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"example_inputs do not fit {owner}.forward(): {error}; it takes {', '.join(parameters)}"
        ) from error
    rank = {name: index for index, name in enumerate(named)}
    return Call(call.args, dict(sorted(call.kwargs.items(), key=lambda item: rank.get(item[0], len(rank)))))


def signature_of(call: Call, names: Sequence[str] | None) -> Signature:
    """The signature of a call whose positional arguments have these names (None: unknown)."""
    if names is None:
        names = [f"input_{index}" if len(call.args) > 1 else "x" for index in range(len(call.args))]
    taken: set[str] = set()
    positional = [_argument(name, False, value, taken) for name, value in zip(names, call.args, strict=True)]
    return Signature((*positional, *(_argument(name, True, value, taken) for name, value in call.kwargs.items())))


def positional_names(forward: Callable[..., Any], call: Call) -> list[str]:
    """Names of a call's positional arguments: forward's parameters, ``xs_0``, ``xs_1`` … for ``*xs``."""
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in _VARIADIC and p.kind != inspect.Parameter.KEYWORD_ONLY]
    rest = next((p.name for p in parameters if p.kind == inspect.Parameter.VAR_POSITIONAL), "x")
    extra = [f"{rest}_{index}" for index in range(len(call.args) - len(names))]
    return [*names, *extra][: len(call.args)]


def require_constant(name: str, expected: Any, found: Any, error: type[VfxError] = ArgumentError) -> None:
    """Raise unless a constant has the value that the capture baked in."""
    if type(found) is not type(expected) or found != expected:
        shown = _shape(found) if isinstance(found, Tensor) else repr(found)
        raise error(f"{name} was captured as the constant {expected!r} and is {shown} now; trace with that value")


def _argument(name: str, keyword: bool, value: Any, taken: set[str]) -> Argument:
    paths, spec = pytree.tree_flatten_with_path(value)
    return Argument(name, keyword, spec, tuple(_leaf(name, path, leaf, taken) for path, leaf in paths))


def _leaf(argument: str, path: tuple[Any, ...], value: Any, taken: set[str]) -> Leaf:
    if isinstance(value, Tensor):
        name = re.sub(r"\W", "_", "_".join([argument, *(str(key_of(step)) for step in path)]))
        while name in taken:
            name += "_"
        taken.add(name)
        return Leaf(path, name)
    if isinstance(value, _CONSTANTS):
        return Leaf(path, None, value)
    raise ArgumentError(
        f"argument {argument + pytree.keystr(path)!r} is {type(value).__name__}, neither a tensor nor a constant; pass "
        "tensors (in tuples, lists or dicts), None, bool, int, float or str, or leave it out"
    )


def key_of(step: Any) -> Any:
    """The index, key or field that one step of a path takes."""
    return getattr(step, "idx", getattr(step, "key", getattr(step, "name", step)))


def _containers(value: Any) -> Any:
    """Mappings of any class (a tokenizer's BatchEncoding) as dicts, which pytree knows."""
    if isinstance(value, Mapping):
        return {key: _containers(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return (list if isinstance(value, list) else tuple)(_containers(item) for item in value)
    return value


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _outline(value: Any) -> Any:
    return pytree.tree_map(lambda x: "tensor" if isinstance(x, Tensor) else x, _containers(value))
