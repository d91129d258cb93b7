"""Scores in a file: computed once, read by any number of prunings, of whatever sparsity, scope or protected layers.

A .safetensors file holds a tensor of scores for each weight, and in its metadata the score's name and options, the
scope and protected layers that it brings along, and a digest of the weights that were scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vfx.emit.files import safetensors_of
from vfx.emit.tensors import read_metadata, read_safetensors
from vfx.errors import ArgumentError, CheckpointError
from vfx.files import check_writable, write_atomic
from vfx.processes import agreed, first
from vfx.program import Program
from vfx.pruning.scores.once import ScoreOnce
from vfx.pruning.scores.score import Score, Subject
from vfx.statistics.collect import fingerprint

KEY = "vfx.scores"  # of the metadata
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Held:
    """What a file of scores says of itself; ``network`` is the digest of the scored weights."""

    score: str
    options: dict[str, Any]
    scope: str
    protect: tuple[str, ...]
    network: str

    @property
    def title(self) -> str:
        return f"{self.score}({', '.join(f'{name}={value}' for name, value in self.options.items())})"


class ScoreFile(Score):
    """The scores of one network in a file: read where it is there, else those of ``inner``, which are written to it.

    Raises ArgumentError where there is neither, or where ``inner`` gives no scores that stand by themselves;
    CheckpointError for a file of something else; OutputError where none can be written.
    """

    def __init__(self, path: Path, inner: Score | None = None):
        self.path, self.inner = path, inner
        if inner is not None:
            _check_alone(inner)
        self.held = _read_head(path) if agreed(path.is_file()) else None
        if self.held is None and inner is None:
            raise ArgumentError(f"{path} is not there yet; name the score that is to be written to it (score='wanda')")
        if self.held is None:
            check_writable(path, (".safetensors",))
        told = self.held or head(inner, "")  # type: ignore[arg-type]
        self.name, self.scope, self.protect = told.score, told.scope, told.protect  # type: ignore[misc]
        self.needs_data = self.held is None and inner is not None and inner.needs_data  # type: ignore[misc]
        if self.held and inner and (asked := head(inner, "")).title != self.held.title:
            raise ArgumentError(
                f"{path} holds the scores of {self.held.title}, and {asked.title} is asked for; leave score= out, or "
                "name another file"
            )

    @property
    def done(self) -> str:
        """What becomes of the file."""
        return f"{'written to' if self.held is None else 'read from'} {self.path.name}"

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        if self.held is None:
            return self._written(subject)
        if self.held.network != digest(subject.program):
            raise CheckpointError(
                f"{self.path} holds the scores of another network: its weights are not these. Score this one into "
                "another file, or prune the one that was scored"
            )
        found = read_safetensors(self.path)
        for target in subject.targets:
            if target.name not in found:
                raise CheckpointError(
                    f"{self.path} has no scores of {target.name!r}, which was protected when it was written; protect "
                    "it again, or write another file"
                )
            if found[target.name].shape != target.shape:
                shape = tuple(found[target.name].shape)
                raise CheckpointError(f"{self.path} has scores {shape} of {target.name!r}, a weight {target.shape}")
        return {t.name: found[t.name].to(subject.weight(t).device) for t in subject.targets}

    def _written(self, subject: Subject) -> dict[str, Tensor]:
        assert self.inner is not None
        values: Mapping[str, Tensor] = self.inner.scores(subject)
        found = {target.name: values[target.name] for target in subject.targets}
        told = head(self.inner, digest(subject.program))
        text = json.dumps(told.__dict__, sort_keys=True)
        if first():
            write_atomic(self.path, safetensors_of({name: x.cpu() for name, x in found.items()}, {KEY: text}))
        return found


def head(score: Score, network: str) -> Held:
    """What the file of a score says of itself."""
    score = score.inner if isinstance(score, ScoreOnce) else score
    own = {name: value for name, value in sorted(vars(score).items()) if not hasattr(Score, name)}
    options = {name: value for name, value in own.items() if isinstance(value, _PLAIN)}
    return Held(score.name, options, score.scope, tuple(score.protect), network)


def digest(program: Program) -> str:
    """Digest of a network's weights, by their names."""
    return fingerprint(program)[1]


def _check_alone(score: Score) -> None:
    """Raise ArgumentError for a score that a file cannot stand for."""
    way = "Way out: a score without updates ('magnitude', 'wanda', vfx.WoodFisher(update=None)), or leave scores= out"
    if score.layer_by_layer:
        raise ArgumentError(
            f"the {score.name} scores of a layer depend on how earlier layers are pruned, so no file holds them. {way}"
        )
    if score.moves_weights:
        raise ArgumentError(
            f"score={score.name!r} also moves the weights that stay, which no file of scores says. {way}"
        )


def _read_head(path: Path) -> Held:
    try:
        told = json.loads(read_metadata(path)[KEY])
        held = Held(**told | {"protect": tuple(told["protect"])})
        plain = all(isinstance(text, str) for text in (held.score, held.scope, held.network, *held.protect))
        if plain and isinstance(held.options, dict):
            return held
    except (KeyError, ValueError, TypeError):
        pass
    raise CheckpointError(f"{path} is no file of scores that vfx.prune(scores=) wrote")
