"""Reconstruction as ``merge`` asks for it: the references, the candidates, and what the report says of the outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vfx.analyse.layers import number_layers
from vfx.choice import Candidate, Judging, Split, scored
from vfx.elements import Pending
from vfx.errors import ArgumentError
from vfx.judge import HeldOutScore
from vfx.match.growth import Growth
from vfx.normalize.catalogue import Normalization
from vfx.options import MergeOptions
from vfx.passes.reconstruct import Reconstruct
from vfx.program import Program
from vfx.reconstruct.references import Reference

SOLVES = ("auto", "least_squares", None)
SHARES = (0.5, 0.75)  # of the layers, that candidates follow one edge for; beside all but one, all but two, and none


@dataclass(frozen=True)
class Solving:
    """How the layers of a network are to be solved: ``solve``, ``follow``, ``follow_edge`` and ``judge`` of ``merge``.

    ``ridge`` as a matching asks for it (PLeaS), None to choose it. Raises ArgumentError.
    """

    solve: str | None = "auto"
    follow: int | str = "auto"
    follow_edge: int | str = "auto"
    judge: Judging = "auto"
    ridge: float | None = None

    def __post_init__(self) -> None:
        if self.solve not in SOLVES:
            raise ArgumentError(f"solve={self.solve!r} is unknown; it is 'auto', 'least_squares' or None")
        if self.solve is None and (self.follow != "auto" or self.follow_edge != "auto"):
            raise ArgumentError("follow= and follow_edge= say what layers are solved for; they need solve=")

    @classmethod
    def of(cls, options: MergeOptions) -> Solving:
        """What ``vfx.merge`` was asked for."""
        return cls(options.solve, options.follow, options.follow_edge, options.judge)

    def resolved(self, normalize: str | Normalization | None, data: bool) -> str | None:
        """What is solved: with "auto" whatever wins, where there are data and no normalization was named."""
        if self.solve == "least_squares" and not data:
            raise ArgumentError("solve='least_squares' runs the networks on data; give data=")
        if self.solve != "auto":
            return self.solve
        asked = self.follow != "auto" or self.follow_edge != "auto" or self.ridge is not None
        if asked:
            if not data:
                raise ArgumentError("least squares runs the networks on data; give data=")
            return "least_squares"
        return "auto" if data and not is_named(normalize) else None


def is_named(normalize: str | Normalization | None) -> bool:
    """Whether a normalization, or none, was named rather than left to choose."""
    return not (normalize == "auto" or (isinstance(normalize, Normalization) and normalize.method == "auto"))


@dataclass(frozen=True)
class Student:
    """A network to be solved: what the edges were made into, and the ``references`` that it is solved for.

    ``averaged``: it is their average, not combined in another way.
    ``alike`` says that edges stand in its channels as they are, so that its layers can be those of one of them.
    """

    program: Program
    references: Sequence[Reference]
    alike: bool
    ridge: float | None
    options: Mapping[str, Any]
    averaged: bool = True

    def solved(self, data: Any, follow: int | str, edge: int, **options: Any) -> Program:
        """The network with its layers solved on ``data``."""
        centre = "references" if self.alike and self.averaged else "own"
        settings = {"follow": follow, "follow_edge": edge, "centre": centre, "ridge": self.ridge}
        return Reconstruct(self.references, data, **settings | dict(self.options) | options)(self.program)  # type: ignore


def carried(
    references: Program, shares: Sequence[float], carry: Callable[[str, int, int], Tensor | None]
) -> list[Reference]:
    """References whose channels come to the student's by ``carry(node, dim, edge)``."""
    references_along = []
    for edge, share in enumerate(shares):

        def along(node: str, dim: int, edge: int = edge) -> Tensor | None:
            return carry(node, dim, edge)

        references_along.append(Reference(references.select(edge), share, along))
    return references_along


def references_of(
    aligned: Program, shares: Sequence[float], transport: Pending | None, growth: Growth | None
) -> list[Reference]:
    """The aligned edges as references of their merge."""
    if growth is not None:
        return carried(aligned, shares, growth.output)
    if transport is not None:
        nodes = transport.symmetry.program.nodes
        return carried(aligned, shares, lambda node, dim, edge: transport.on(edge, nodes[node], dim))
    return [Reference(aligned.select(edge), share) for edge, share in enumerate(shares)]


# candidates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Following:
    """A candidate that follows ``edge`` up to layer ``follow``."""

    follow: int | str
    edge: int

    def name(self, edges: int) -> str:
        if not self.follow:
            return "least squares"
        return f"least squares behind layer {self.follow} of edge {self.edge}"


def followings(student: Student, solving: Solving, preserved: int, edges: int) -> list[list[Following]]:
    """For each edge the candidates from the deepest to the shallowest that follow it; the last list follows none."""
    if not student.alike:
        if solving.follow not in ("auto", 0):
            raise ArgumentError("follow= needs edges that stand in the merged network's channels as they are")
        return [[Following(0, 0)]]
    if solving.follow_edge == "auto":
        chosen = [edge for edge in range(edges) if student.references[edge].share]
    elif isinstance(solving.follow_edge, int) and 0 <= solving.follow_edge < edges:
        chosen = [solving.follow_edge]
    else:
        raise ArgumentError(f"follow_edge={solving.follow_edge!r} is no edge; there are 0 … {edges - 1}, and 'auto'")
    layers = number_layers(student.program)
    if solving.follow != "auto":
        number = layers.number(solving.follow)
        return [[Following(solving.follow, edge)] for edge in (chosen if number else chosen[:1])]
    total = len(layers)
    depths = {total - 1, total - 2, *(round(total * share) for share in SHARES)}
    grid = [depth for depth in sorted(depths, reverse=True) if preserved < depth < total]
    return [*([Following(depth, edge) for depth in grid] for edge in chosen), [Following(0, 0)]]


def tried(
    student: Student, lines: Sequence[Sequence[Following]], trials: Sequence[Split]
) -> Iterator[tuple[Following, HeldOutScore]]:
    """The scores of the candidates; along one edge the search ends where shallower ones get worse twice in a row."""
    edges = len(student.references)
    for line in lines:
        best, worse = float("inf"), 0
        for following in line:

            def make(data: Any, following: Following = following) -> Program:
                return student.solved(data, following.follow, following.edge, max_samples=None, progress=False)

            score = scored(Candidate(following.name(edges), make), trials)
            yield following, score
            worse = worse + 1 if score.value >= best else 0
            best = min(best, score.value)
            if worse == 2:
                break


def outcome(
    student: Student, following: Following | None, name: str, scores: Mapping[str, HeldOutScore], edges: int, kept: int
) -> str:
    """One sentence on what came out, and how it does against the edges on the samples held out."""
    rival = min((n for n in scores if n.startswith("edge ")), key=lambda n: scores[n].value, default=None)
    if name.startswith("edge "):
        return (
            f"nothing was merged: {name} alone does best on held-out samples; more calibration data, layers kept "
            "for each edge (preserve=) or further edges would change it"
        )
    total = len(number_layers(student.program))
    if following is None:
        text = f"the average of {edges} networks, normalized: {name}"
    elif following.follow:
        last = number_layers(student.program).number(following.follow)
        text = f"layers {kept + 1}–{last} follow edge {following.edge}" + (", solved for it" if kept else "")
        if last < total:
            text += f", layers {last + 1}–{total} are solved for the mean of {edges} networks"
    else:
        text = f"layers {kept + 1}–{total} are solved for the mean of {edges} networks"
    if kept:
        text = f"layers 1–{kept} are kept for each edge, {text}"
    return text + _against(scores.get(name), scores.get(rival) if rival else None)


def _against(score: HeldOutScore | None, rival: HeldOutScore | None) -> str:
    if score is None:
        return ""
    parts = [
        (words, getattr(score, figure), getattr(rival, figure, None))
        for words, figure in (
            ("accuracy on held-out samples", "accuracy"),
            ("agreement with the ensemble", "agreement"),
            ("divergence from it" if score.agreement is not None else "distance from the ensemble", "divergence"),
        )
    ]
    said = [
        f"{words} {value:.3g}" + (f" against {best:.3g} of the best edge" if best is not None else "")
        for words, value, best in parts
        if value is not None
    ]
    return "; " + ", ".join(said)
