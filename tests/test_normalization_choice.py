"""Choice of a normalization on held-out calibration data: scores, splits, bias removal, "auto"."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images
from test_normalization import ALPHAS, Residual, normed, plain
from test_normalization import _edges as cached_edges
from torch import Tensor, nn
from vfx.passes.remove_bias import RemoveBias

from vfx.api import layers, merge, trace
from vfx.choice import FOLDS
from vfx.data import digits
from vfx.errors import ArgumentError
from vfx.judge import EVERY, HeldOutScore, Judge
from vfx.models import Training, fit
from vfx.normalize.catalogue import BEHIND, METHODS, Normalization
from vfx.normalize.choice import best_removal, removals
from vfx.statistics.data import Batches, Prepared

X = images(31, 8, dtype=torch.float64)
Y = torch.arange(31) % 3


def _merge(models: Any, normalize: Any = "auto", **options: Any) -> Any:
    settings: dict[str, Any] = {"data": X.split(8), "match": None, "weights": ALPHAS, "progress": False} | options
    settings = {"solve": None} | settings
    return merge(models, X[:2], normalize=normalize, **settings)


# data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "loader"])
def test_the_split_is_by_position_whole_and_keeps_labels(form: str) -> None:
    program = cached_edges(plain).program.select(0)
    data: Any = {
        "tensor": X,
        "tuple": list(zip(X.split(7), Y.split(7))),
        "dict": [{"input": x, "label": y, "id": "a"} for x, y in zip(X.split(4), Y.split(4))],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 5),
    }[form]
    fit_, held = Batches(program, data).split(EVERY, 28)
    rows = np.arange(28)
    for part, chosen in ((fit_, rows[(rows + 1) % EVERY != 0]), (held, rows[(rows + 1) % EVERY == 0])):
        assert torch.equal(torch.cat([batch[0] for batch in part.batches]), X[chosen])
        if form == "tensor":
            assert set(part.labels) == {None}
        else:
            assert torch.equal(torch.cat([y for y in part.labels if y is not None]), Y[chosen])
    again = Batches(program, fit_)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, fit_.batches))


def test_what_is_no_label_is_not_taken_for_one() -> None:
    program = cached_edges(plain).program.select(0)
    for wrong in (Y.double(), Y[:5], "text", Y > 1):
        assert [labels for _, labels in Batches(program, [(X, wrong)]).labelled()] == [None]
    assert len(Batches(program, Prepared((), ()))) == 0


# scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, Y])
def test_scores_are_divergence_cross_entropy_and_accuracy(labels: Tensor | None) -> None:
    models = cached_edges(plain)
    program = models.program
    cuts = [X.split(9), (None,) * 4 if labels is None else labels.split(9)]
    judge = Judge(program, ALPHAS, Prepared(tuple([x] for x in cuts[0]), tuple(cuts[1])))
    found = judge(program.select(0))
    with torch.no_grad():
        p = models[0](X).softmax(1) ** 0.3 * models[1](X).softmax(1) ** 0.7
        p = p / p.sum(1, keepdim=True)
        q = models[0](X).softmax(1)
        z, scales = models[0](X), torch.logspace(-2, 2, 4001, dtype=torch.float64)
        logs = torch.stack([(beta * z).log_softmax(1) for beta in scales])
        divergences = (p * p.log()).sum(1).mean() - (p * logs).sum(2).mean(1)
        close(found.divergence, float(divergences.min()), 1e-5)
        close(found.scale, float(scales[divergences.argmin()]), 5e-3)
        assert found.divergence < 0.99 * float((p * (p / q).log()).sum(1).mean())  # β does something
        if labels is None:
            assert found.loss is None
            assert found.accuracy is None
            assert found.value == found.divergence
        else:
            losses = [F.nll_loss(log, labels) for log in logs]
            close(found.loss, float(min(losses)), 1e-4)  # labels at random: β falls to the end of the grid
            close(found.accuracy, float((q.argmax(1) == labels).double().mean()), 1e-6)
            assert found.value == found.loss
    assert HeldOutScore(float("nan")).value == float("inf")


def test_one_column_and_tokens_are_scored_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 1), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x.mean(1)), self.two(x)

    x = torch.randn(12, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    models = edges(Both, x)
    program = trace(models, x[:2])
    found = Judge(program, (0.5, 0.5), Prepared(([x],), (None,)))(program.select(0))
    with torch.no_grad():
        (a, b), (c, d) = (model(x) for model in models)
        mean = (a + c) / 2
        p, scales = ((b + d) / 2).softmax(2), torch.logspace(-2, 2, 4001, dtype=torch.float64)
        rest = min((p * (p.log() - (beta * b).log_softmax(2))).sum(2).mean() for beta in scales)
        close(found.divergence, float((a - mean).square().mean() / mean.var() + rest), 1e-5)


# bias removal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preserve", [0, 2])
@pytest.mark.parametrize("build", [plain, Residual])
def test_every_removal_is_scored_as_the_network_itself(build: Any, preserve: int) -> None:
    program = cached_edges(build).program
    merged = _merge(program, None, preserve=preserve).program
    judge = Judge(program, ALPHAS, Prepared(tuple([x] for x in X.split(8)), tuple(Y.split(8))))
    counts = range(len(layers(program)) + 1)
    found = removals(merged, judge, ("backward", "forward"), counts)
    assert len({one.score.divergence for one in found}) > 3
    for one in found:
        expected = judge(RemoveBias(one.count, one.direction)(merged))
        close(one.score.divergence, expected.divergence, 1e-12)
    best = best_removal(found)
    assert best.score.value == min(one.score.value for one in found)
    result = _merge(program, "bias_removal", preserve=preserve)
    assert f"RemoveBias({result.report.choices['direction']}, {result.report.choices['count']})" in result.report.passes


def test_what_is_named_is_not_chosen() -> None:
    program = cached_edges(plain).program
    given = _merge(program, Normalization("bias_removal", count=2, direction="forward"))
    assert "RemoveBias(forward, 2)" in given.report.passes
    assert not given.report.scores
    ends = {_merge(program, Normalization("bias_removal", count=n)).report.choices["count"] for n in (1, 3)}
    assert ends == {1, 3}
    without = _merge(program, "bias_removal", data=None)
    assert "RemoveBias(backward, 5)" in without.report.passes
    with pytest.raises(ArgumentError, match="at least 3"):
        _merge(program, "bias_removal", data=X[:2])


# auto -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [plain, normed])
def test_auto_is_bit_for_bit_the_best_candidate(build: Any) -> None:
    """Every candidate is scored as if it had been merged on the fitting part alone, and the best is run on all data."""
    program = cached_edges(build).program
    result = _merge(program)
    folds = [Batches(program, X.split(8)).split(EVERY, len(X), fold) for fold in range(FOLDS)]
    scores = result.report.scores
    norm = build is normed
    usual = {"none", *(n for n, m in METHODS.items() if m.tried and m.norm in (None, norm))}
    assert set(scores) == (usual if norm else usual | {BEHIND})
    whole = _merge(program, "repair" if not norm else "reset").program.goals
    assert whole is not None
    for name in ("none", "bias_calibration", *(["reset"] if norm else [])):
        found = []
        for fit_, held in folds:
            parts = [batch[0] for batch in fit_.batches]
            alone = _merge(program, None if name == "none" else name, data=parts)
            found.append(Judge(program, ALPHAS, held)(alone.program).divergence)
        close(scores[name]["divergence"], sum(found) / FOLDS, 1e-9)
    best = min(scores, key=lambda name: scores[name]["divergence"])
    named = _merge(program, {"none": None, BEHIND: Normalization("repair", site="activation")}.get(best, best))
    first, second = result.module.state_dict(), named.module.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert list(_merge(program).report.scores) == list(scores)
    assert _merge(program).report.scores == scores
    assert next(iter(scores)) in str(result.report)


def test_auto_with_options_hands_them_on() -> None:
    program = cached_edges(plain).program
    behind = _merge(program, Normalization(site="activation", layers=[1, 2]))
    assert set(behind.report.scores) == {"none", "repair", "rescale", "rescale_average"}


def test_auto_is_close_to_the_best_on_trained_networks() -> None:
    """Two networks trained on digits: accuracy on held-out images is within half a point of the best named method's."""
    images_, labels, tests, truth = digits()
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip
        models.append(fit(net, images_, labels, Training(epochs=6, lr=0.05, seed=seed), progress=False))
    program = trace(models, images_[:2])

    def accuracy(normalize: Any, data: Any = images_[:600]) -> float:
        merged = merge(program, data=data, match="activation", normalize=normalize, progress=False)
        with torch.no_grad():
            return 100 * float((merged.module(tests).argmax(1) == truth).double().mean())

    single = {name: accuracy(name) for name in ("repair", "rescale", "rescale_average", "bias_calibration")}
    single["none"] = accuracy(None)
    assert max(single.values()) - min(single.values()) > 1  # a wrong choice would show
    assert accuracy("auto") >= max(single.values()) - 0.5
    assert accuracy("auto", list(zip(images_[:600].split(100), labels[:600].split(100)))) >= max(single.values()) - 0.5
