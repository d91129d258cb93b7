"""Held-out calibration data decide between networks: how far is each from the ensemble of the edges?

What is compared depends on what the network gives. Labels are not needed; where class labels come with the data, the
value of a classifier is its cross-entropy.

=============  ======================================================  ================================================
kind           taken for it by "auto"                                  value, the smaller the better
=============  ======================================================  ================================================
logits         all else                                                KL(p‖q), p = softmax Σ αᵢ fᵢ, q = softmax(β f)
probabilities  rows that are positive and sum to one                   KL(p‖q), p ∝ Π fᵢ^αᵢ, q = f
embedding      rows of length one                                      1 − cosine to Σ αᵢ fᵢ
multilabel     columns in (0, 1] that do not sum to one, as of sigmoid  Σ KL(p‖q) of yes or no, logit p = Σ αᵢ logit fᵢ
regression     a single column, or values in [0, 1] with zeros         squared error to Σ αᵢ fᵢ, relative to its spread
=============  ======================================================  ================================================

The ensemble is that of the logits, which is the geometric mean of the probabilities: layers are solved for the mean of
the edges' outputs, and a network that reached it at the last one would have no divergence. Held against the arithmetic
mean of the probabilities, the worse edge was followed on three of the four pairs of ``benchmarks.solving``.

β is fitted to the same samples: where features shrink alike (without normalization, after bias calibration) logits lose
their size and keep their order, and a network is not to be chosen for its confidence. KL is convex in β, and far less
noisy than accuracy on a few hundred samples, which is reported beside it.

Test data never enter. Samples are held out by their position, so the same data give the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

from vfx.capture.outputs import named_tensors
from vfx.processes import agreed
from vfx.program import Program
from vfx.statistics.data import Prepared
from vfx.statistics.labels import PADDING, outside

EVERY, LIMIT = 3, 3000  # one sample in three is held out, of the first 3,000
SEARCH = {"xatol": 1e-3}  # of log β
ROUNDING = 1e-9  # differences of a score that say nothing
LEAST = torch.finfo(torch.float32).tiny  # of probabilities whose logarithm is taken
SURE = 2.0**-24  # how near to 0 or 1 a yes or no can come before its logarithm is taken: float32's rounding
UNIT = 1e-3  # how far a row's length or sum may be from one
Kind = Literal["auto", "logits", "probabilities", "embedding", "multilabel", "regression"]


@dataclass(frozen=True)
class HeldOutScore:
    """How a network does on held-out data: its distance from the ensemble, and with labels cross-entropy and accuracy.

    ``agreement`` is the share of samples in which it decides as the ensemble does, ``scale`` the β by which the (first)
    logits fit best: far above 1 they have lost their size. ``samples`` holds the value of each held-out sample.
    """

    divergence: float
    loss: float | None = None
    accuracy: float | None = None
    scale: float | None = None
    agreement: float | None = None
    samples: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def value(self) -> float:
        """What is minimised; infinite for a network that gives NaN."""
        value = self.divergence if self.loss is None else self.loss
        return value if math.isfinite(value) else math.inf

    def to_dict(self) -> dict[str, float | None]:
        names = ("divergence", "loss", "accuracy", "scale", "agreement")
        return {name: getattr(self, name) for name in names}

    def better_than(self, other: HeldOutScore) -> bool:
        """Whether this one's value is smaller by more than the standard error of the paired difference."""
        gain, error = other.value - self.value, 0.0
        if math.isfinite(gain) and self.samples is not None and other.samples is not None and len(self.samples) > 1:
            difference = other.samples - self.samples
            error = float(difference.std() / math.sqrt(len(difference)))
        return gain > max(error, ROUNDING)


class Judge:
    """Scores networks against the ensemble of ``edges``, with shares ``alphas``, on held-out samples."""

    @torch.no_grad()
    def __init__(self, edges: Program, alphas: Sequence[float], held: Prepared, kind: Kind = "auto"):
        self.held = held
        outputs = [[_tensors(edges(*batch, edge=i)) for batch in held.batches] for i in range(edges.edges)]
        self.kinds: dict[str, str] = {}
        self.expected: dict[str, Tensor] = {}
        for name in outputs[0][0]:
            whole = [torch.cat([batch[name] for batch in edge]) for edge in outputs]
            self.kinds[name] = _kind(whole) if kind == "auto" else kind
            arranged = [_arranged(x, self.kinds[name]) for x in whole]
            self.expected[name] = _ensemble(arranged, alphas, self.kinds[name])
        self.sizes = [len(next(iter(batch.values()))) for batch in outputs[0]]
        self.notes: tuple[str, ...] = ()
        self.labels = self._labels()

    def part(self, samples: int) -> Judge:
        """A judge that looks at the first batches alone, until they hold ``samples``."""
        count = next((i + 1 for i in range(len(self.sizes)) if sum(self.sizes[: i + 1]) >= samples), len(self.sizes))
        smaller = copy(self)
        smaller.held = replace(self.held, batches=self.held.batches[:count], labels=self.held.labels[:count])
        smaller.sizes = self.sizes[:count]
        smaller.expected = {name: x[: sum(smaller.sizes)] for name, x in self.expected.items()}
        smaller.labels = None if self.labels is None else self.labels[: sum(smaller.sizes)]
        return smaller

    @torch.no_grad()
    def __call__(self, program: Program) -> HeldOutScore:
        """The score of a network, run from its inputs on."""
        return self.score([program(*batch) for batch in self.held.batches])

    @torch.no_grad()
    def score(self, outputs: Sequence[Any]) -> HeldOutScore:
        """The score of a network's outputs on each held-out batch; of several processes the first one's counts."""
        return agreed(self._score(outputs))

    def _score(self, outputs: Sequence[Any]) -> HeldOutScore:
        batches = [_tensors(output) for output in outputs]
        samples: Tensor | float = 0.0
        scale: float | None = None
        for name, expected in self.expected.items():
            results = _arranged(torch.cat([batch[name] for batch in batches]), self.kinds[name]).to(expected)
            if not results.isfinite().all():
                return HeldOutScore(math.nan)
            losses, beta = _LOSSES[self.kinds[name]](results, expected)
            samples, scale = samples + losses, beta if scale is None else scale
        assert isinstance(samples, Tensor)
        first = next(iter(self.expected))
        if self.kinds[first] not in ("logits", "probabilities"):
            return HeldOutScore(float(samples.mean()), samples=samples)
        results = _arranged(torch.cat([batch[first] for batch in batches]), self.kinds[first])
        agreement = float((results.argmax(1) == self.expected[first].argmax(1)).double().mean())
        if self.labels is None:
            return HeldOutScore(float(samples.mean()), scale=scale, agreement=agreement, samples=samples)
        labels = self.labels.to(results.device)
        logits = results if self.kinds[first] == "logits" else results.clamp_min(1e-300).log()
        loss, beta = _fitted(lambda beta: float(cross_entropy(beta * logits, labels)))
        each = _by_sample(cross_entropy(beta * logits, labels, reduction="none"))
        accuracy = float((results.argmax(1) == labels).double().mean())
        return HeldOutScore(float(samples.mean()), loss, accuracy, scale, agreement, each)

    def _labels(self) -> Tensor | None:
        """The labels of all held-out samples, if all have one that fits the classes; ``notes`` say where they do not.

        Labels of sequences are left alone: whether they are shifted against the logits is not known.
        """
        given = [labels for labels in self.held.labels if labels is not None]
        if not self.classes or not (given or self.held.unread):
            return None
        wrong = self.held.unread or self.misfit(self.held.labels)
        self.notes = (f"labels of the data were not used to choose: {wrong}",) if wrong else ()
        return None if wrong else torch.cat(given)

    @property
    def classes(self) -> int:
        """How many classes labels of the first output can name; 0 where it has none."""
        first = next(iter(self.expected), "")
        judged = self.kinds.get(first) in ("logits", "probabilities") and self.expected[first].ndim != 3
        return self.expected[first].shape[1] if judged else 0

    def misfit(self, batches: Sequence[Tensor | None]) -> str:
        """Why the labels of some batches cannot judge the first output, or nothing."""
        expected = self.expected[next(iter(self.expected))]
        for labels in batches:
            if labels is None:
                return "some batches hold none"
            if labels.shape[1:] != expected.shape[2:]:
                wanted = (len(labels), *expected.shape[2:])
                return f"their shape is {tuple(labels.shape)}; the outputs take one class for each of {wanted}"
            if wrong := outside(labels, self.classes):
                return wrong
            if bool((labels == PADDING).any()):
                return f"some are {PADDING}, which stands for none"
        return ""


def _tensors(output: Any) -> dict[str, Tensor]:
    """The floating outputs in float64."""
    return {n: x.double() for n, x in named_tensors(output).items() if x.is_floating_point() and x.ndim > 1}


def _arranged(x: Tensor, kind: str) -> Tensor:
    """An output with its classes or features on axis 1: those of sequences (N, T, C) stand on the last axis."""
    return x.movedim(-1, 1) if x.ndim == 3 and kind != "regression" else x


def _ensemble(outputs: Sequence[Tensor], alphas: Sequence[float], kind: str) -> Tensor:
    """What the edges give together."""
    if kind == "probabilities":
        outputs = [x.clamp_min(LEAST).log() for x in outputs]
    if kind == "multilabel":
        outputs = [x.logit(SURE) for x in outputs]
    mean: Tensor = sum(a * x for a, x in zip(alphas, outputs))  # type: ignore[assignment]
    if kind == "multilabel":
        return mean.sigmoid()
    return mean.softmax(1) if kind in ("logits", "probabilities") else mean


def _kind(outputs: list[Tensor]) -> str:
    """What an output is, seen from all edges' values."""
    rows = [x.movedim(-1, 1) if x.ndim == 3 else x for x in outputs]
    if rows[0].shape[1] == 1:
        return "regression"
    inside = all(bool(((x >= 0) & (x <= 1)).all()) for x in rows)
    if inside and all(bool(((x.sum(1) - 1).abs() < UNIT).all()) for x in rows):
        return "probabilities"
    if all(bool(((torch.linalg.vector_norm(x, dim=1) - 1).abs() < UNIT).all()) for x in rows):
        return "embedding"
    if inside:  # a sigmoid is never zero; pictures and rectified values are
        return "multilabel" if all(bool((x > 0).all()) for x in rows) else "regression"
    return "logits"


def _by_sample(values: Tensor) -> Tensor:
    """The mean over positions of each sample."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def _logits_loss(logits: Tensor, expected: Tensor) -> tuple[Tensor, float | None]:
    entropy = torch.special.xlogy(expected, expected).sum(1)
    loss = lambda beta: entropy - (expected * (beta * logits).log_softmax(1)).sum(1)  # noqa: E731
    _, beta = _fitted(lambda beta: float(loss(beta).mean()))
    return _by_sample(loss(beta)), beta


def _probabilities_loss(outputs: Tensor, expected: Tensor) -> tuple[Tensor, float | None]:
    ratio = torch.special.xlogy(expected, expected) - torch.special.xlogy(expected, outputs.clamp_min(1e-300))
    return _by_sample(ratio.sum(1)), None


def _multilabel_loss(outputs: Tensor, expected: Tensor) -> tuple[Tensor, float | None]:
    losses = []
    for p, q in ((expected, outputs), (1 - expected, 1 - outputs)):
        losses.append(torch.special.xlogy(p, p) - torch.special.xlogy(p, q.clamp(SURE, 1)))
    return _by_sample((losses[0] + losses[1]).sum(1)), None


def _embedding_loss(outputs: Tensor, expected: Tensor) -> tuple[Tensor, float | None]:
    return _by_sample(1 - torch.nn.functional.cosine_similarity(outputs, expected, dim=1)), None


def _regression_loss(outputs: Tensor, expected: Tensor) -> tuple[Tensor, float | None]:
    return (outputs - expected).square().flatten(1).mean(1) / expected.var().clamp_min(1e-12), None


_LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, float | None]]] = {
    "logits": _logits_loss,
    "probabilities": _probabilities_loss,
    "embedding": _embedding_loss,
    "multilabel": _multilabel_loss,
    "regression": _regression_loss,
}


def _fitted(loss: Callable[[float], float]) -> tuple[float, float]:
    """The smallest loss over the scale β of the logits, and that β; convex in β, so searched in log β."""
    minimum = minimize_scalar(lambda log: loss(math.exp(log)), bounds=(-12.0, 12.0), method="bounded", options=SEARCH)
    return float(minimum.fun), math.exp(float(minimum.x))
