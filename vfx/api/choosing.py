"""The fifth stage: an edge as it is, the edges' average solved by least squares, or normalized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfx.analyse.layers import number_layers
from vfx.api.aligning import Aligned
from vfx.api.reconstructing import Following, Solving, Student, followings, outcome, tried
from vfx.choice import Candidate, Split, best, label_notes, scored, trials
from vfx.judge import HeldOutScore
from vfx.normalize.catalogue import BEHIND, Normalization
from vfx.operators import is_layer, layer_arguments
from vfx.options import MergeOptions
from vfx.passes.catalogue import choose as choose_method
from vfx.program import Program
from vfx.report import Stopwatch
from vfx.rewrite import Pass


@dataclass(frozen=True)
class Setting:
    """The edges ``aligned`` and cut behind ``preserved`` layers, what merges them, and the network to solve."""

    preserved: int
    aligned: Program
    merging: Sequence[Pass]
    student: Student | None

    def way(self, following: Following | None) -> dict[str, float | None]:
        """What a candidate does, for reports: the layers kept for each edge, and the last that follows an edge."""
        if following is None:
            return {"preserve": self.preserved, "follow": None, "follow_edge": None}
        assert self.student is not None
        last = number_layers(self.student.program).number(following.follow)
        return {"preserve": self.preserved, "follow": last, "follow_edge": following.edge}


@dataclass(frozen=True, eq=False)
class Plan:
    """The settings to choose from, and what is to be done in each: ``solved`` and ``asked`` (a normalization)."""

    settings: Sequence[Setting]
    solving: Solving
    solved: str | None
    asked: Normalization | None


@dataclass(frozen=True)
class Chosen:
    """What is to be done: an ``edge`` as it is, or in a setting layers solved (``following``), normalized, or both."""

    setting: Setting
    edge: int | None = None
    following: Following | None = None
    normalization: Normalization | None = None
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    outcome: str = ""
    notes: tuple[str, ...] = ()
    name: str = ""  # of the chosen one of ``scores``

    @property
    def report(self) -> dict[str, Any]:
        """What a report says of the choice."""
        return {"choices": self.to_dict(), "scores": self.scores, "outcome": self.outcome}

    def to_dict(self) -> dict[str, Any]:
        """The choices, for reports."""
        normalize = None if self.normalization is None else self.normalization.method
        choice: dict[str, Any] = {"normalize": normalize, "preserve": self.setting.preserved}
        choice["solve"] = "least_squares" if self.following is not None else None
        if self.following is not None:
            choice |= {"follow": self.following.follow, "follow_edge": self.following.edge}
        if self.edge is not None:
            choice |= {"edge": self.edge, "preserve": 0}
        if self.name:
            choice |= {"chosen": self.name}
        return choice | (self.normalization.to_dict() if self.normalization else {})


def choose(plan: Plan, aligned: Aligned, options: MergeOptions, watch: Stopwatch) -> Chosen:
    """Decide on held-out samples, where there is anything to decide."""
    captured = aligned.ready.captured
    choice = Choice(
        aligned.program, captured.alphas, plan.asked, captured.data, options.reading, bool(options.heads)
    )  # fmt: skip
    with watch("choice"):
        return choice(plan.settings, plan.solved, plan.solving)


@dataclass(frozen=True)
class _Option:
    """One candidate that was scored: where, what is solved for, or the normalization."""

    setting: Setting
    following: Following | None = None
    normalization: Normalization | None = None


@dataclass(frozen=True)
class Choice:
    """The edges ``program`` whose ensemble is the goal, their shares, and what the user asked for."""

    program: Program
    alphas: Sequence[float]
    asked: Normalization | None
    data: Any
    options: Mapping[str, Any]
    heads: bool

    def __call__(self, settings: Sequence[Setting], solved: str | None, solving: Solving) -> Chosen:
        """Decide on held-out samples, where there is anything to decide."""
        first = settings[0]
        if solved is None or first.student is None:
            return self._normalization(first, solving)
        lines = [followings(s.student, solving, s.preserved, self.program.edges) for s in settings if s.student]
        alone = solved == "least_squares" and sum(len(line) for each in lines for line in each) == 1
        if self.heads or alone:  # several outputs cannot be held against one ensemble's
            return self._described(first, lines[0][-1][0])
        folds = trials(self.program, self.alphas, self.data, solving.judge, self.options)
        options: dict[str, _Option] = {}
        scores: dict[str, HeldOutScore] = {}
        foreign: list[str] = []
        for setting, each in zip(settings, lines):
            normalize = solved == "auto" and setting is first
            self._score(setting, each, folds, normalize, len(settings) > 1, options, scores, foreign)
        edges = self._edges(folds) if solved == "auto" else {}
        name = best(scores | edges, list(edges), foreign)
        ways = {name: option.setting.way(option.following) for name, option in options.items()}
        figures = _dicts(scores | edges, ways | self._whole(edges))
        text = self._outcome(first if name in edges else options[name].setting, name, options, scores | edges)
        if name in edges:
            edge = list(edges).index(name)
            return Chosen(first, edge=edge, scores=figures, outcome=text, notes=label_notes(folds), name=name)
        chosen = options[name]
        named = None if self.asked is None or self.asked.method == "auto" else self.asked
        normalization = chosen.normalization if chosen.following is None else named
        return Chosen(chosen.setting, None, chosen.following, normalization, figures, text, label_notes(folds), name)

    def _score(
        self, setting: Setting, lines: Sequence[Sequence[Following]], folds: Sequence[Split], normalize: bool,
        several: bool, options: dict[str, _Option], scores: dict[str, HeldOutScore], foreign: list[str],
    ) -> None:  # fmt: skip
        """Score all candidates of one setting into ``options`` and ``scores``."""
        assert setting.student is not None
        prefix = f"preserve {setting.preserved}, " if several else ""
        for following, score in tried(setting.student, lines, folds):
            name = prefix + following.name(self.program.edges)
            options[name], scores[name] = _Option(setting, following), score
        if not normalize or self.asked is None:
            return
        normalized, normalized_scores = choose_method(
            self.asked, setting.aligned, setting.merging, self.alphas, folds, self.options
        )
        foreign += [prefix + name for name in _foreign(setting.student, normalized_scores)]
        for name, score in normalized_scores.items():
            options[prefix + name] = _Option(setting, normalization=normalized[name])
            scores[prefix + name] = score

    def _described(self, setting: Setting, following: Following) -> Chosen:
        """What was named by the user, or left without a choice."""
        assert setting.student is not None
        text = outcome(setting.student, following, "", {}, self.program.edges, setting.preserved)
        return Chosen(setting, None, following, self.asked, outcome=text)

    def _outcome(
        self, setting: Setting, name: str, options: Mapping[str, _Option], scores: Mapping[str, HeldOutScore]
    ) -> str:
        assert setting.student is not None
        following = options[name].following if name in options else None
        return outcome(setting.student, following, name, scores, self.program.edges, setting.preserved)

    def _normalization(self, setting: Setting, solving: Solving) -> Chosen:
        """A normalization alone, chosen where it has to be."""
        asked = self.asked
        if asked is None or self.data is None or self.heads or not (asked.method == "auto" or asked.chooses):
            return Chosen(setting, normalization=asked)
        folds = trials(self.program, self.alphas, self.data, solving.judge, self.options)
        normalized, scores = choose_method(asked, setting.aligned, setting.merging, self.alphas, folds, self.options)
        name = min(scores, key=lambda name: scores[name].value)
        figures = _dicts(scores, dict.fromkeys(scores, setting.way(None)))
        return Chosen(setting, normalization=normalized[name], scores=figures, notes=label_notes(folds), name=name)

    def _whole(self, edges: Mapping[str, HeldOutScore]) -> dict[str, dict[str, float | None]]:
        """Edges as they are: followed in all layers."""
        last = len(number_layers(self.program))
        return {name: {"preserve": 0, "follow": last, "follow_edge": edge} for edge, name in enumerate(edges)}

    def _edges(self, folds: Sequence[Split]) -> dict[str, HeldOutScore]:
        """The score of each edge as it is."""
        scores = {}
        for edge in range(self.program.edges):
            whole = self.program.select(edge)

            def make(data: Any, whole: Program = whole) -> Program:
                return whole

            scores[f"edge {edge}"] = scored(Candidate(f"edge {edge}", make), folds)
        return scores


def _foreign(student: Student, normalized: Mapping[str, HeldOutScore]) -> list[str]:
    """Normalizations whose affines do not fit the user's own class, where solved layers do."""
    if student.program.structural:
        return []
    layers = {layer.node for layer in number_layers(student.program)}
    nodes = (node for node in student.program.graph.nodes if node.name in layers and is_layer(node))
    bare = any(layer_arguments(node)["bias"] is None for node in nodes)
    affine = {"repair", "rescale", "rescale_average", "reshift"} if bare else set()
    return [name for name in normalized if name == BEHIND or name in affine]


def _dicts(
    scores: Mapping[str, HeldOutScore], ways: Mapping[str, Mapping[str, float | None]]
) -> dict[str, dict[str, float | None]]:
    order = sorted(scores, key=lambda name: scores[name].value)
    return {name: scores[name].to_dict() | dict(ways[name]) for name in order}
