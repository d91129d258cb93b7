"""Sizes that the user's own modules keep as numbers (``self.head_dim``), brought up to those of a resized Program.

A number is taken for a size where a tensor of its module, or an operator that the module calls, had that size and has
one other now; ``certain`` where none of them kept it. That is a guess until the network was run with it, so of those
guesses only the ones that the proof needs are kept: a number that merely equals a size (the longest sequence) stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from vfx.emit.own_class import own_tensors
from vfx.program import Program


class KeptSize(NamedTuple):
    """An attribute of one of the user's modules, by the module's path, and the value that it may need."""

    path: str
    name: str
    kind: type[nn.Module]
    value: Any
    certain: bool

    @property
    def role(self) -> tuple[type[nn.Module], str]:
        """What attributes that are needed or not needed together have in common."""
        return self.kind, self.name


def kept_sizes(program: Program, edge: int = 0) -> list[KeptSize]:
    """The attributes of the user's modules that may hold sizes which changed."""
    assert program.module is not None
    kept = []
    for path, sizes in _changes(program, edge).items():
        module = dict(program.module.named_modules()).get(path)
        if module is None or type(module).__module__.startswith("torch.nn."):
            continue
        changed = {old: new - {old} for old, new in sizes.items() if len(new - {old}) == 1}
        certain = {old: next(iter(new)) for old, new in changed.items() if new == sizes[old]}
        likely = {old: next(iter(new)) for old, new in changed.items()}
        for name, value in vars(module).items():
            fresh = _fresh(value, likely)
            if type(value) in (int, tuple, list) and fresh != value:
                kept.append(KeptSize(path, name, type(module), fresh, fresh == _fresh(value, certain)))
    return kept


def _fresh(value: Any, certain: Mapping[int, int]) -> Any:
    """A number, or a list of numbers, with its sizes changed; anything else as it is."""
    if type(value) in (tuple, list):
        return type(value)(certain.get(x, x) if type(x) is int else x for x in value)
    return certain.get(value, value) if type(value) is int else value


def put(module: nn.Module, sizes: Iterable[KeptSize]) -> nn.Module:
    """Set attributes of a copy of the user's model; returns the copy."""
    for size in sizes:
        setattr(module.get_submodule(size.path), size.name, size.value)
    return module


def needed(likely: list[KeptSize], proved: Callable[[list[KeptSize]], bool]) -> list[KeptSize]:
    """Those of ``likely`` sizes without which there is no proof; none where there is none with them either.

    The certain ones are tried first, then all, then all but those of one role.
    """
    roles = list(dict.fromkeys(size.role for size in likely))
    trials = [[size for size in likely if size.certain], likely, *(_without(likely, role) for role in roles)]
    sizes = next((some for some in trials if some and proved(some)), [])
    for role in roles if sizes else ():
        fewer = _without(sizes, role)
        sizes = fewer if len(fewer) < len(sizes) and proved(fewer) else sizes
    return sizes


def _without(sizes: list[KeptSize], role: Any) -> list[KeptSize]:
    return [size for size in sizes if size.role != role]


def _changes(program: Program, edge: int) -> dict[str, dict[int, set[int]]]:
    """What each size that a module has to do with became, by the module's path."""
    changes: dict[str, dict[int, set[int]]] = {}
    assert program.module is not None
    for name, tensor in own_tensors(program.module).items():
        new = program.weights[edge].get(program.aliases.get(name, name), tensor)
        for old, size in zip(tensor.shape, new.shape):
            changes.setdefault(name.rpartition(".")[0], {}).setdefault(old, set()).add(size)
    for node in program.graph.nodes:
        for old, size in node.meta.get("sizes", ()):
            changes.setdefault(str(node.meta.get("module") or ""), {}).setdefault(old, set()).add(size)
    return changes
