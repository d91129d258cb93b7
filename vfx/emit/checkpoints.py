"""State dicts as training code writes them: wrapped in other entries, named by wrappers, in another precision.

Which entry is taken: the file itself where it holds tensors only; else of the state dicts in it the first that fits the
model, in the order trained weights (``WEIGHTS``), their averages (``AVERAGES``), other entries, of which only one may
fit. Names lose what wrappers put in front (``module.``, ``_orig_mod.``, ``model.``) where what is left are the names of
the model. What was chosen, stripped, left out or cast goes into ``notes``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vfx.checks import check_same_tensors
from vfx.errors import ArchitectureError, CheckpointError

WEIGHTS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights", "generator",
           "student")  # fmt: skip
AVERAGES = ("state_dict_ema", "model_ema", "model_ema_state_dict", "ema_state_dict", "ema", "ema_model", "params_ema",
            "teacher")  # fmt: skip
_WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PREFIXES = ("", "module.", "_orig_mod.", "model.", "net.", "network.", "student.", "online_model.")  # by preference
_COUNTER = "num_batches_tracked"  # of BatchNorm, which no result depends on
_DEPTH = 4  # of entries inside entries
_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class StateDictEntry:
    """A state dict in a file: the path of keys to it, and its tensors."""

    name: str
    tensors: dict[str, Tensor]
    known: bool


def entries(value: Any) -> list[StateDictEntry]:
    """Every state dict in what a file holds, in the order in which they are taken."""
    return list(_entries(value, "", True, _DEPTH))


def _entries(value: Any, name: str, wanted: bool, depth: int) -> Iterator[StateDictEntry]:
    if not isinstance(value, Mapping) or "param_groups" in value or not depth:  # an optimizer's state
        return
    tensors = {key: x for key, x in value.items() if isinstance(key, str) and isinstance(x, Tensor)}
    if tensors and len(tensors) == len(value):
        yield StateDictEntry(name, tensors, wanted)
        return
    named = [key for key in (*WEIGHTS, *AVERAGES) if key in value]
    for key in [*named, *(key for key in value if key not in named)]:
        yield from _entries(value[key], f"{name}.{key}" if name else str(key), wanted and key in named, depth - 1)
    if any(x.ndim for x in tensors.values()):  # weights beside counters and settings
        yield StateDictEntry(name, tensors, wanted)


def choose(
    value: Any, file: str, notes: list[str], entry: str | None = None, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """The tensors of the entry to be taken, called as in the file.

    ``entry`` names an entry (``"ema"``), or how the names of tensors begin (``"teacher."``). Raises CheckpointError if
    there is none, or nothing tells which one it is.
    """
    every = entries(value)
    if entry is not None:
        return _named(every, entry, file, value)
    if not every:
        raise CheckpointError(f"{file} holds no state dict of tensors; {_held(value)}")
    fitting = [candidate for candidate in every if model is not None and _fits(model, candidate.tensors)]
    possible = fitting or every
    chosen = possible[0]
    others = [candidate.name or "its own tensors" for candidate in every if candidate is not chosen]
    if not chosen.known and len(possible) > 1:  # nothing tells weights from momenta, a teacher or another network
        fit = f" that fit {type(model).__name__}" if fitting else ""
        names = _listed([candidate.name or "its own tensors" for candidate in possible])
        raise CheckpointError(f"{file} holds several state dicts{fit}: {names}; choose by entry=")
    if others or (chosen.name and not chosen.known):
        rest = f" and left {_listed(others)}; entry= takes another" if others else ""
        notes.append(f"{file}: took {chosen.name or 'its own tensors'!r}{rest}")
    return chosen.tensors


def _named(every: list[StateDictEntry], entry: str, file: str, value: Any) -> dict[str, Tensor]:
    for candidate in every:
        if candidate.name == entry or candidate.name.startswith(f"{entry}."):
            return candidate.tensors
    for candidate in every:
        inside = {key.removeprefix(entry): x for key, x in candidate.tensors.items() if key.startswith(entry)}
        if inside:
            return inside
    raise CheckpointError(f"{file} holds no state dict {entry!r}; {_held(value)}")


def filled(
    model: nn.Module, tensors: Mapping[str, Tensor], file: str, notes: list[str], dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of ``model`` in eval mode that holds the tensors, in the model's precision or in ``dtype``.

    Raises ArchitectureError where names, shapes or precisions do not fit.
    """
    network = copy.deepcopy(model)
    if dtype is not None:
        network = network.to(dtype)
    wanted, name = network.state_dict(), type(model).__name__
    state = renamed(wanted, tensors, file, notes)
    state = _in_precision(state, wanted, name, file, notes, dtype)
    try:
        check_same_tensors(wanted, state, name, file)
    except ArchitectureError as error:
        raise ArchitectureError(f"{error}. {file} holds {len(tensors)} tensors: {_listed(tensors)}") from error
    network.load_state_dict(state, strict=True)
    return network.eval()


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The floating tensors in ``dtype``, all others as they are."""
    return {key: x.to(dtype) if dtype is not None and x.is_floating_point() else x for key, x in tensors.items()}


# names ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """How the names in a file become those of a model: what stands in front of either is taken off."""

    prefix: str  # of the file's names
    extra: str  # of the model's names

    def wanted(self, key: str) -> str:
        """The file's name, wrappers taken off, for a model's."""
        return self.prefix + _bare(key).removeprefix(self.extra)


def _bare(key: str) -> str:
    """A name without the parts that wrapping modules put into it, wherever they stand."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def renamed(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: str, notes: list[str]
) -> dict[str, Tensor]:
    """The tensors under the model's names where taking off what wrappers added gives those; unchanged where not."""
    complete = {**tensors, **_implied(wanted, tensors)}
    names = None if set(wanted) <= set(complete) else _names(wanted, tensors)
    if names is None:
        return complete if set(wanted) <= set(complete) else dict(tensors)
    bare = {_bare(key): key for key in tensors}
    read = {key: bare[names.wanted(key)] for key in wanted if names.wanted(key) in bare}
    front = _front(read.values())
    outside = [key for key in tensors if not (_bare(key).startswith(names.prefix) and key.startswith(front))]
    unread = [key for key in tensors if key not in read.values() and key not in outside]
    notes.append(f"{file}: {_stripped(read, outside)}")
    state = {key: tensors[source] for key, source in read.items()} | {key: tensors[key] for key in unread}
    return {**state, **_implied(wanted, state)}


def _front(keys: Collection[str]) -> str:
    """The wrappers that all names begin with: what else a wrapper holds, such as a counter, is no part of the model."""
    parts = list(itertools.takewhile(lambda part: part in _WRAPPERS, next(iter(keys)).split(".")))
    while not all(key.startswith("".join(f"{part}." for part in parts)) for key in keys):
        parts.pop()
    return "".join(f"{part}." for part in parts)


def _stripped(read: Mapping[str, str], outside: Collection[str]) -> str:
    key, source = next((pair for pair in read.items() if pair[0] != pair[1]), ("", ""))
    left = f"; left out {len(outside)} tensors under other names: {_listed(outside)}" if outside else ""
    return f"names are stripped to the model's, as {source} to {key}{left}"


def _names(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> _Names | None:
    """The one way to take off prefixes that gives the model's names, by preference the usual ones."""
    bare = {_bare(key): x for key, x in tensors.items()}
    if len(bare) < len(tensors) or len({_bare(key) for key in wanted}) < len(wanted):
        return None  # wrappers are all that tells some names apart
    ways = [names for names in _ways(wanted, bare) if _all_there(wanted, bare, names)]
    same = [
        names for names in ways if all(bare[names.wanted(k)].shape == x.shape for k, x in _needed(wanted, bare, names))
    ]
    ways = same or ways
    usual = [names for prefix in _PREFIXES for names in ways if names.prefix == prefix]
    return usual[0] if usual else ways[0] if len(ways) == 1 else None


def _ways(wanted: Mapping[str, Tensor], bare: Mapping[str, Tensor]) -> Iterator[_Names]:
    """Prefixes of the file's names behind which the longest of the model's stands, of as many parts as all share."""
    keys = sorted(map(_bare, wanted), key=len, reverse=True)
    extra = ""
    while keys:
        yield from (_Names(prefix, extra) for prefix in _in_front(keys, bare))
        first = keys[0].partition(".")[0] + "."
        if not all(key.startswith(first) for key in keys):
            return
        keys, extra = [key.removeprefix(first) for key in keys], extra + first


def _in_front(keys: Collection[str], bare: Collection[str]) -> list[str]:
    """What stands before the first of ``keys`` that ends a name in the file (which may leave some out)."""
    for key in keys:
        if prefixes := [name.removesuffix(key) for name in bare if f".{name}".endswith(f".{key}")]:
            return prefixes
    return []


def _needed(wanted: Mapping[str, Tensor], bare: Mapping[str, Tensor], names: _Names) -> list[tuple[str, Tensor]]:
    return [(key, x) for key, x in wanted.items() if names.wanted(key) in bare]


def _all_there(wanted: Mapping[str, Tensor], bare: Mapping[str, Tensor], names: _Names) -> bool:
    given = dict(_needed(wanted, bare, names))
    return set(wanted) <= {*given, *_implied(wanted, given)}


def _fits(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    wanted = model.state_dict()
    given = {**tensors, **_implied(wanted, tensors)}
    return set(wanted) == set(given) or _names(wanted, tensors) is not None


def _implied(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that a file may leave out: other names of a tied one, and counters that old files do not have."""
    places = {_place(wanted[key]): x for key, x in given.items() if key in wanted}
    absent = {key: x for key, x in wanted.items() if key not in given}
    tied = {key: places[_place(x)] for key, x in absent.items() if x.numel() and _place(x) in places}
    return tied | {key: x for key, x in absent.items() if key.endswith(_COUNTER) and key not in tied}


def _place(x: Tensor) -> tuple[Any, ...]:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) if not x.is_meta else (id(x),)


# precisions -----------------------------------------------------------------------------------------------------------


def _in_precision(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    name: str,
    file: str,
    notes: list[str],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The tensors in the model's precisions, where those hold every value of the file's or ``dtype`` asks for it."""
    result = dict(state)
    for key, x in state.items():
        goal = wanted[key].dtype if key in wanted else x.dtype
        if x.dtype == goal or not x.is_floating_point():
            continue
        if not goal.is_floating_point:  # a counter that was averaged or cast with the weights
            if goal != torch.bool and not goal.is_complex and (key.endswith(_COUNTER) or torch.equal(x, x.round())):
                result[key] = x.round().to(goal)
            continue
        if dtype is None and torch.promote_types(x.dtype, goal) != goal:
            raise ArchitectureError(
                f"{key!r} is {x.dtype} in {file} and {goal} in {name}, which does not hold all its values; "
                f"pass dtype={x.dtype} to load the network in the file's precision, or dtype={goal} to round"
            )
        result[key] = x.to(goal)
    cast = sorted({f"{state[key].dtype} to {x.dtype}" for key, x in result.items() if x is not state[key]})
    if cast:
        notes.append(f"{file}: cast from {', '.join(cast)}")
    return result


# messages -------------------------------------------------------------------------------------------------------------


def _listed(names: Collection[Any]) -> str:
    shown = ", ".join(str(name) for name in list(names)[:_SHOWN])
    return f"{shown}, … ({len(names)})" if len(names) > _SHOWN else shown


def _held(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"it holds {_kind(value)}"
    if "param_groups" in value:
        return f"it holds the state of an optimizer ({_listed(value)}); give the file with the network's weights"
    return f"it holds {_listed([f'{key} ({_kind(x)})' for key, x in value.items()])}" if value else "it holds nothing"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, Mapping) and "param_groups" in value:
        return "optimizer"
    return (
        f"{type(value).__name__} of {len(value)}" if isinstance(value, (Mapping, list, tuple)) else type(value).__name__
    )
