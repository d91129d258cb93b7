"""``vfx.evaluate`` and the commands that measure: figures against a plain loop, tables of 80 columns, JSON and CSV."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import vfx
from vfx import cli
from vfx.emit.onnx_network import OnnxNetwork
from vfx.errors import ArgumentError, DataError
from vfx.models.named import build

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 4


def _net(seed: int, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes)).double()


def test_figures_are_those_of_a_plain_loop() -> None:
    a, b, c = (_net(seed).train() for seed in range(3))
    found = vfx.evaluate([a, b, c], X[:2], data=[(X[:25], Y[:25]), (X[25:], Y[25:])], names=["a", "b", "c"], ensemble=2)
    assert [row.name for row in found.rows] == ["a", "b", "ensemble", "c"]
    with torch.no_grad():
        logits = [one(X) for one in (a, b, c)]
        mean = (logits[0].log_softmax(1) + logits[1].log_softmax(1)) / 2
    for row, scores in zip(found.rows, [logits[0], logits[1], mean, logits[2]]):
        assert row.accuracy == float((scores.argmax(1) == Y).double().mean())
        assert row.loss == pytest.approx(float(F.cross_entropy(scores, Y)), rel=1e-12)
        assert row.agreement == float((scores.argmax(1) == mean.argmax(1)).double().mean())
    assert found.rows[0].params == 6 * 8 + 8 + 8 * 4 + 4
    assert found.rows[0].flops > 0
    assert found.rows[2].params is None
    assert a.training  # the user's network keeps its mode
    assert found.samples == 40


def test_without_labels_there_is_agreement_with_the_first() -> None:
    found = vfx.evaluate([_net(0), _net(0), _net(1)], X[:2], data=X, latency=False)
    assert [row.accuracy for row in found.rows] == [None] * 3
    assert [row.latency for row in found.rows] == [None] * 3
    assert found.rows[1].agreement == 1
    assert found.rows[2].agreement < 1
    assert found.against == "network 0"


def test_probabilities_have_the_same_loss_as_their_logits() -> None:
    net = _net(0)
    found = vfx.evaluate([net, nn.Sequential(net, nn.Softmax(1))], X[:2], data=[(X, Y)])
    assert found.rows[1].loss == pytest.approx(found.rows[0].loss, rel=1e-12)


def test_sequences_and_padding() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids)

    ids = torch.randint(9, (6, 7), generator=torch.Generator().manual_seed(0))
    labels = torch.where(ids > 6, -100, ids % 5)
    net = Words()
    (row,) = vfx.evaluate(net, ids[:2], data=[(ids, labels)]).rows
    expected = F.cross_entropy(net(ids).double().movedim(-1, 1), labels)
    assert row.loss == pytest.approx(expected.item(), rel=1e-9)
    kept = labels != -100
    assert row.accuracy == float((net(ids).argmax(-1) == labels)[kept].double().mean())


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 4 classes"):
        vfx.evaluate(_net(0), X[:2], data=[(X, Y + 2)])
    with pytest.raises(DataError, match="labels of shape"):
        vfx.evaluate(_net(0), X[:2], data=[(X, Y[:, None].expand(40, 2))])
    with pytest.raises(ArgumentError, match="decisions"):
        vfx.evaluate(_net(0, classes=1), X[:2], data=X)
    with pytest.raises(ArgumentError, match="one name for each"):
        vfx.evaluate([_net(0)], X[:2], data=X, names=["a", "b"])
    with pytest.raises(ArgumentError, match="same classes"):
        vfx.evaluate([_net(0), _net(1, 5)], X[:2], data=X, ensemble=2)
    with pytest.raises(ArgumentError, match="networks and Results"):
        vfx.evaluate(["a.pt"], X[:2], data=X)


NETWORK = """from torch import nn


def make():
    first = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""
LONG = "a_network_with_quite_a_long_name_of_its_file"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "net.py").write_text(NETWORK)
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(build(f"{folder}/net.py:make").state_dict(), folder / f"{LONG}{seed}.pt")
    inputs = np.random.default_rng(0).standard_normal((24, 1, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", inputs=inputs, labels=np.arange(24) % 10)
    return [str(folder / name) for name in (f"{LONG}0.pt", f"{LONG}1.pt", "data.npz")]


@pytest.fixture(scope="module")
def model(files: list[str]) -> list[str]:
    return ["-m", f"{Path(files[0]).parent}/net.py:make", "-i", "1x8x8"]


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_80_columns_and_pure_json(files: list[str], model: list[str], tmp_path: Path) -> None:
    a, b, data = files
    shown = invoke("evaluate", a, b, *model, "--data", data, "--ensemble")
    assert max(map(len, shown.splitlines())) <= 80
    assert "ensemble" in shown
    facts = json.loads(invoke("evaluate", model[1], a, b, "-i", "1x8x8", "--data", data, "--json", "-"))
    assert [one["name"] for one in facts["networks"]] == [f"{LONG}0.pt", f"{LONG}1.pt"]
    assert facts["samples"] == 24
    grid = ["-g", "solve=none", "-s", "match=weight", "--no-latency", "--draw", str(tmp_path / "c.png")]
    assert json.loads(invoke("compare", a, b, *model, "--data", data, *grid, "--json", "-"))["samples"] == 24
    lines = invoke("evaluate", a, *model, "--data", data, "--csv", "-").splitlines()
    assert lines[0].startswith("name,accuracy,loss,agreement,params")
    assert len(lines) == 2
    with pytest.raises(ArgumentError, match="--data is missing"):
        invoke("evaluate", a, *model)
    with pytest.raises(ArgumentError, match="--model says which network"):
        invoke("evaluate", a, "--data", data)


def test_an_onnx_file_is_measured_as_the_network_that_it_holds(
    files: list[str], model: list[str], tmp_path: Path
) -> None:
    a, b, data = files
    onnx = str(tmp_path / "a.onnx")
    assert re.search(r"wrote \S+a.onnx \([\d.]+ kB\)", invoke("export", a, *model, "-o", onnx))
    beside = json.loads(invoke("evaluate", b, onnx, a, *model, "--data", data, "--json", "-"))["networks"]
    alone = json.loads(invoke("evaluate", onnx, "--data", data, "--json", "-"))["networks"][0]
    for found in (beside[1], alone):
        assert found["accuracy"] == beside[2]["accuracy"]
        assert found["loss"] == pytest.approx(beside[2]["loss"], rel=1e-5)
        assert found["latency"] > 0
        assert 0 < found["params"] <= beside[2]["params"]  # BatchNorm may be folded
    assert beside[1]["loss"] != beside[0]["loss"]
    with pytest.raises(ArgumentError, match=r"takes \S+, got y"):
        OnnxNetwork(onnx)(y=torch.zeros(2, 1, 8, 8))


def test_merge_and_prune_measure_what_went_in_and_what_came_out(
    files: list[str], model: list[str], tmp_path: Path
) -> None:
    a, b, data = files
    merged = tmp_path / "m.pt2"
    facts = json.loads(
        invoke("merge", a, b, *model, "--match", "weight", "--evaluate", data, "-o", str(merged), "--json", "-")
    )
    rows = {row["name"]: row for row in facts["evaluation"]["networks"]}
    assert list(rows) == [f"{LONG}0.pt", f"{LONG}1.pt", "ensemble", "result"]
    again = json.loads(invoke("evaluate", str(merged), *model, "--data", data, "--json", "-"))["networks"][0]
    assert again["accuracy"] == rows["result"]["accuracy"]
    assert again["loss"] == pytest.approx(rows["result"]["loss"], rel=1e-5)
    shown = invoke("prune", a, *model, "-s", "0.8", "--evaluate", data)
    assert "not 0" in shown
    with pytest.raises(DataError, match="no data 'nothing'"):
        invoke("merge", a, b, *model, "--evaluate", "nothing", "-o", str(merged))


def test_selected_samples_are_data_again(files: list[str], model: list[str], tmp_path: Path) -> None:
    a, _, data = files
    few = tmp_path / "few.npz"
    assert "10 samples (balanced)" in invoke("select", data, "10", "--strategy", "balanced", "-o", str(few))
    with np.load(few) as held, np.load(data) as whole:
        assert sorted(held["labels"].tolist()) == list(range(10))
        assert np.array_equal(held["inputs"], whole["inputs"][held["indices"]])
    hard = tmp_path / "hard.npz"
    invoke("select", data, "0.25", "--strategy", "hard", "-n", a, *model, "-o", str(hard))
    assert json.loads(invoke("evaluate", a, *model, "-d", str(hard), "--json", "-"))["samples"] == 6
    with pytest.raises(ArgumentError, match=r"written as \.npz"):
        invoke("select", data, "5", "-o", str(tmp_path / "few.csv"))
