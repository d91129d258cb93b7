"""Scores in files: what is read back prunes to the same bits, and what is not this network's is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import images, network
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vfx.api import prune, trace
from vfx.errors import ArgumentError, CheckpointError, OutputError
from vfx.pruning.scores.catalogue import SCORES
from vfx.pruning.scores.once import ScoreOnce
from vfx.pruning.scores.score import Score
from vfx.pruning.scores.wanda import Wanda
from vfx.pruning.scores.woodfisher import WoodFisher

X = images(9, 8, dtype=torch.float64)
Y = torch.randint(4, (9,), generator=torch.Generator().manual_seed(1))
DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]
QUIET: dict[str, Any] = {"solve": None, "normalize": None, "progress": False}


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network(small, X)


def same(one: nn.Module, two: nn.Module) -> bool:
    other = two.state_dict()
    return all(torch.equal(x, other[name]) for name, x in one.state_dict().items())


@pytest.mark.parametrize(
    "score",
    [
        "magnitude",
        "random",
        "gradient",
        "fisher",
        "mixed",
        "wanda",
        WoodFisher(block=20, update=None),
        ScoreOnce("wanda"),
    ],
)
def test_what_is_read_back_prunes_to_the_same_bits(model: nn.Module, score: str | Score, tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    for sparsity in (0.5, 0.8):
        direct = prune(model, X[:2], sparsity=sparsity, score=score, data=DATA, **QUIET)
        first = prune(model, X[:2], sparsity=sparsity, score=score, scores=file, data=DATA, **QUIET)
        again = prune(model, X[:2], sparsity=sparsity, scores=str(file), **QUIET)  # the file names score and scope
        assert same(first.module, direct.module)
        assert same(again.module, direct.module)
        assert {**again.report.choices, "scores": ""} == {**direct.report.choices, "scores": ""}
        assert again.report.choices["scores"] == "read from scores.safetensors"
    assert not same(direct.module, model)


def test_the_file_says_what_it_holds(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    result = prune(model, X[:2], sparsity=0.5, score="wanda", scores=file, data=DATA, **QUIET)
    assert result.report.choices["scores"] == "written to scores.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert '"score": "wanda"' in opened.metadata()["vfx.scores"]
        names = set(opened.keys())
        held = {name: opened.get_tensor(name) for name in names}
    program = trace(model, X[:2])
    assert names == {"0.weight", "2.weight"}  # the head is protected
    literal = X.square().sum(0)  # the first layer's inputs at its middle tap
    norm = literal[:, 0::2, 0::2].sum((1, 2)).sqrt()
    torch.testing.assert_close(
        held["0.weight"][:, :, 1, 1], program.weights[0]["0.weight"][:, :, 1, 1].abs() * norm, rtol=1e-12, atol=0
    )


def test_another_networks_scores_are_refused(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    prune(model, X[:2], sparsity=0.5, score="wanda", scores=file, data=DATA, **QUIET)
    with pytest.raises(CheckpointError, match="scores of another network"):
        prune(network(small, X, seed=5), X[:2], sparsity=0.5, scores=file, **QUIET)
    with pytest.raises(CheckpointError, match=r"no scores of '5.weight', which was protected"):
        prune(model, X[:2], sparsity=0.5, scores=file, protect=(), **QUIET)
    with pytest.raises(ArgumentError, match=r"holds the scores of wanda\(propagation=dense\), and magnitude"):
        prune(model, X[:2], sparsity=0.5, score="magnitude", scores=file, **QUIET)


@pytest.mark.parametrize("score", ["sparsegpt", "alps", "woodfisher", Wanda("pruned")])
def test_scores_that_do_not_stand_alone_are_refused(model: nn.Module, score: str | Score, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"earlier layers are pruned|moves the weights that stay"):
        prune(model, X[:2], sparsity=0.5, score=score, scores=tmp_path / "a.safetensors", data=DATA, **QUIET)
    assert not os.listdir(tmp_path)


def test_no_score_is_forgotten() -> None:
    """Each score of the catalogue is in one of the two lists above."""
    in_files = {"magnitude", "random", "gradient", "fisher", "mixed", "wanda", "woodfisher"}
    assert set(SCORES) == in_files | {"sparsegpt", "alps"}


def test_other_files_are_refused(model: nn.Module, tmp_path: Path) -> None:
    ask: dict[str, Any] = {"sparsity": 0.5, **QUIET}
    with pytest.raises(ArgumentError, match="not there yet; name the score"):
        prune(model, X[:2], scores=tmp_path / "none.safetensors", **ask)
    save_file({"0.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no file of scores"):
        prune(model, X[:2], scores=tmp_path / "other.safetensors", **ask)
    (tmp_path / "broken.safetensors").write_bytes(b"\x08" + bytes(30))
    with pytest.raises(CheckpointError, match="damaged"):
        prune(model, X[:2], scores=tmp_path / "broken.safetensors", **ask)
    with pytest.raises(OutputError):
        prune(model, X[:2], score="magnitude", scores=tmp_path / "no" / "folder.safetensors", **ask)
    with pytest.raises(ArgumentError, match="takes them anew"):
        prune(model, X[:2], score="magnitude", scores=tmp_path / "a.safetensors", steps=3, **ask)
    with pytest.raises(ArgumentError, match=r"scores.*of single weights"):
        prune(model, X[:2], scope="group", scores=tmp_path / "a.safetensors", **ask)
