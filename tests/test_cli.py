"""The command line end to end, on tiny networks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from vfx import api, cli, demo
from vfx.cli.inputs import match_of
from vfx.elements import act, random_element
from vfx.emit.files import load
from vfx.errors import ArchitectureError, ArgumentError, CheckpointError, DataError
from vfx.match.activation import ActivationMatching
from vfx.match.weight import WeightMatching
from vfx.models import vgg11_bn
from vfx.models.named import build

MODEL = ["-m", "vfx.models:vgg11_bn", "-a", "width=0.125", "-a", "in_channels=1", "-i", "1x32x32"]


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[str]:
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        path = tmp_path / f"edge{seed}.pt"
        torch.save(vgg11_bn(width=0.125, in_channels=1).state_dict(), path)
        paths.append(str(path))
    return paths


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_merge_writes_every_format_and_the_report(checkpoints: list[str], tmp_path: Path) -> None:
    data = tmp_path / "calibration.npz"
    inputs = torch.randn(32, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    np.savez(data, inputs=inputs.numpy(), labels=np.zeros(32))
    onnx, pt2, report = tmp_path / "m.onnx", tmp_path / "m.pt2", tmp_path / "m.json"
    output = invoke(
        "merge", *checkpoints, *MODEL, "--data", str(data), "--normalize", "reset", "--preserve", "3", "-o", str(onnx),
        "-o", str(pt2), "--json", str(report),
    )  # fmt: skip
    assert "DuplicateBranches(3/9" in output
    facts = json.loads(report.read_text())
    assert facts["normalize"] == "reset"
    assert facts["params_ratio"] > 1
    with torch.no_grad():
        expected = load(pt2)(inputs[:5])
    session = onnxruntime.InferenceSession(str(onnx))
    (got,) = session.run(None, {session.get_inputs()[0].name: inputs[:5].numpy()})
    assert np.abs(got - expected.numpy()).max() <= 1e-4


def test_diagnose_and_barrier(checkpoints: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    inputs = torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    np.savez(data, inputs=inputs.numpy(), labels=np.arange(40) % 10)
    merged = tmp_path / "merged.pt2"
    invoke("merge", *checkpoints, *MODEL, "--data", str(data), "--preserve", "3", "--solve", "none", "-o", str(merged))
    html, rows, facts = tmp_path / "d.html", tmp_path / "d.csv", tmp_path / "d.json"
    output = invoke(
        "diagnose", str(merged), *checkpoints, *MODEL, "--data", str(data), "--html", str(html), "--csv", str(rows),
        "--json", str(facts),
    )  # fmt: skip
    assert "verdict:" in output
    found = json.loads(facts.read_text())
    assert [row["state"] for row in found["rows"]] == ["preserved"] * 3 + ["merged"] * 6
    assert found["samples"] == 40
    assert html.read_text().count("<svg") == 7
    assert len(rows.read_text().splitlines()) == 10
    plot, facts = tmp_path / "b.png", tmp_path / "b.json"
    output = invoke(
        "barrier", *checkpoints, *MODEL, "--data", str(data), "--points", "3", "--normalize", "none", "--match",
        "weight", "--draw", str(plot), "--json", str(facts),
    )  # fmt: skip
    curves = json.loads(facts.read_text())
    assert curves["target"] == "labels"
    assert [curve["match"] for curve in curves["curves"]] == [None, "weight"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_options_of_combining(checkpoints: list[str], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    common = [*checkpoints, *MODEL, "--base", checkpoints[0], "--combine"]
    invoke("merge", *common, "task_arithmetic", "--combine-arg", "scale=0.25", "-o", str(out))
    first, second = (torch.load(path, weights_only=True)["features.0.weight"].double() for path in checkpoints)
    assert torch.equal(load(out)["features.0.weight"], (first + 0.25 * (second - first)).float())
    invoke("merge", *common, "dare", "--combine-arg", "drop=0", "--combine-arg", "by=ties", "-o", str(out))
    by_dare = load(out)["features.0.weight"]
    invoke("merge", *common, "ties", "-o", str(out))
    assert torch.allclose(by_dare, load(out)["features.0.weight"], atol=1e-7, rtol=0)
    for method, option, words in (
        ("ties", "kep=0.2", "'ties' takes no such options"),
        ("ties", "keep=2", "keep is a share"),
        ("average", "keep=2", "'average' takes no options"),
    ):
        with pytest.raises(ArgumentError, match=words):
            invoke("merge", *common, method, "--combine-arg", option)


def test_repair_and_export(checkpoints: list[str], tmp_path: Path) -> None:
    data = tmp_path / "calibration.npy"
    np.save(data, np.random.default_rng(0).standard_normal((16, 1, 32, 32)).astype(np.float32))
    fixed, onnx = tmp_path / "fixed.safetensors", tmp_path / "fixed.onnx"
    invoke("repair", *checkpoints, *MODEL, "--data", str(data), "--method", "reset", "-o", str(fixed))
    before = torch.load(checkpoints[0], weights_only=True)
    after = load(fixed)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("running_" in name for name in changed)
    invoke("export", str(fixed), *MODEL, "-o", str(onnx))
    assert onnx.is_file()


@pytest.fixture
def moved(checkpoints: list[str], tmp_path: Path) -> tuple[str, str, str]:
    """A network fine-tuned, the change that this made, and a copy of the first with its channels in another order."""
    state = torch.load(checkpoints[0])
    generator = torch.Generator().manual_seed(3)
    change = {
        name: 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
        if name.endswith(("weight", "bias"))
    }
    facts = api.symmetry(build(MODEL[1], {"width": 0.125, "in_channels": 1}).eval(), torch.randn(2, 1, 32, 32))
    copied = act(facts, random_element(facts, np.random.default_rng(0), "permutation"), state)
    paths = []
    for name, tensors in (
        ("tuned", {**state, **{name: state[name] + tensor for name, tensor in change.items()}}),
        ("change", change),
        ("copied", copied),
    ):
        paths.append(str(tmp_path / f"{name}.pt"))
        torch.save(tensors, paths[-1])
    return paths[0], paths[1], paths[2]


def test_transfer_moves_the_change(checkpoints: list[str], moved: tuple[str, str, str], tmp_path: Path) -> None:
    tuned, change, copied = moved
    x = torch.randn(9, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def outputs(path: str | Path) -> torch.Tensor:
        with torch.no_grad():
            return load(path, vgg11_bn(width=0.125, in_channels=1)).eval()(x)

    def given(name: str, *arguments: str) -> float:
        """How far what comes out is from the fine-tuned network."""
        out = tmp_path / f"{name}.safetensors"
        invoke("transfer", *arguments, *MODEL, "-o", str(out))
        return float((outputs(out) - outputs(tuned)).abs().max())

    spread = float((outputs(tuned) - outputs(tuned).mean(0)).abs().max())
    assert given("network", tuned, checkpoints[0], copied, "--match", "weight") <= 1e-4 * spread
    assert given("difference", change, checkpoints[0], copied, "--difference") <= 1e-4 * spread
    assert given("unmatched", tuned, checkpoints[0], copied, "--match", "none") > 1e-2 * spread
    assert given("half", tuned, checkpoints[0], copied, "--scale", "0.5") > 1e-2 * spread
    with pytest.raises(ArgumentError, match="maps that change functions"):
        invoke("transfer", tuned, checkpoints[0], copied, *MODEL, "--match", "zipit")


def test_transfer_measures_what_went_in_without_an_ensemble(
    checkpoints: list[str], moved: tuple[str, str, str], tmp_path: Path
) -> None:
    data, report = tmp_path / "data.npz", tmp_path / "t.json"
    inputs = torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    np.savez(data, inputs=inputs.numpy(), labels=np.arange(40) % 10)
    invoke(
        "transfer", moved[0], checkpoints[0], moved[2], *MODEL, "--evaluate", str(data), "--json", str(report),
    )  # fmt: skip
    rows = json.loads(report.read_text())["evaluation"]["networks"]
    assert [row["name"] for row in rows] == ["tuned.pt", "copied.pt", "result"]
    assert rows[2]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)
    assert rows[2]["loss"] != pytest.approx(rows[1]["loss"], rel=1e-5)


@pytest.mark.parametrize(("data", "kind"), [(None, WeightMatching), ("digits", ActivationMatching)])
def test_the_first_layers_are_matched_by_what_there_is(data: str | None, kind: type) -> None:
    assert isinstance(match_of("auto", 2, data, []).matcher, kind)
    assert isinstance(match_of("weight", 2, data, []).matcher, WeightMatching)


def test_options_of_normalization_and_preparation(checkpoints: list[str], tmp_path: Path) -> None:
    data, labelled, report = tmp_path / "calibration.npy", tmp_path / "labelled.npz", tmp_path / "m.json"
    inputs = np.random.default_rng(0).standard_normal((16, 1, 32, 32)).astype(np.float32)
    np.save(data, inputs)
    np.savez(labelled, inputs=inputs, labels=np.arange(16) % 10)
    common = [*checkpoints, *MODEL, "--json", str(report)]
    invoke("merge", *common, "--data", str(data), "--normalize", "reset", "--sweep", "train", "--layers", "1",
           "--layers", "features.4", "--memory-limit", "0", "--match-layers", "2",
           "--prepare", "remove_bias")  # fmt: skip
    facts = json.loads(report.read_text())
    assert "ResetBatchNorm(2 layers, train)" in facts["passes"]
    assert "RemoveBias(backward, all)" in facts["passes"]
    assert "Align(FirstLayers)" in facts["passes"]
    invoke("merge", *common, "--normalize", "bias_removal", "--bias-count", "3", "--bias-direction", "forward")
    assert "RemoveBias(forward, 3)" in json.loads(report.read_text())["passes"]
    invoke("merge", *common, "--match", "weight", "--match-arg", "classes=permutation", "--normalize", "none")
    with pytest.raises(ArgumentError, match="'weight' takes no such options"):
        invoke("merge", *common, "--match", "weight", "--match-arg", "speed=3")
    invoke("merge", *common, "--data", str(labelled))
    assert all(score["accuracy"] is not None for score in json.loads(report.read_text())["scores"].values())
    invoke("repair", *common, "--data", str(data), "--method", "repair", "--site", "activation")
    assert any("InsertNormalization(8 activations)" in one for one in json.loads(report.read_text())["passes"])


def test_analyses_print_what_they_found() -> None:
    assert "9 layers" in invoke("layers", *MODEL)
    found = invoke("symmetry", *MODEL)
    assert "verified: relative error" in found
    assert "positive monomial: aten.relu" in found
    assert "verified: relative error" in invoke("symmetry", *MODEL, "--classes", "permutation")
    assert "features.0" in invoke("profile", *MODEL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "vfx.models", "-i", "1x32x32"], "module:name"),
        (["-m", "vfx.models:nothing", "-i", "1x32x32"], "cannot be imported"),
        (["-m", "vfx.models:vgg11_bn", "-i", "1xbig"], "shape of one sample"),
        (["-m", "vfx.models:vgg11_bn", "-a", "width", "-i", "3x32x32"], "key=value"),
        (["-m", "vfx.data:digits", "-i", "3x32x32"], "not a torch.nn.Module"),
    ],
)
def test_errors_end_with_a_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vfx", "layers", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


def test_names_of_lines_are_kept_apart_in_their_order() -> None:
    assert demo.spread([10.0, 87.4, 86.6, 90.7, 74.6], 4.0) == [10.0, 90.6, 86.6, 94.6, 74.6]


def test_demo_prints_the_table_and_reuses_its_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [tensor[:192] for tensor in demo.digits()]
    monkeypatch.setattr(demo, "digits", lambda: few)
    monkeypatch.setattr(demo, "PRESERVED", (0, 8))
    monkeypatch.setattr(demo, "BUDGETS", (1.2,))
    demo.run(tmp_path, width=0.05, epochs=1)
    first = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in first] == [
        "Edge 0", "Edge 1", "Ensemble", "PFM 0/14", "PFM 8/14", "Default 1.2×",
    ]  # fmt: skip
    assert set(first[-2]["accuracy"]) == set(demo.COLUMNS)
    assert first[-1]["params_ratio"] <= 1.2
    assert (tmp_path / "merged.onnx").is_file()
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert "training VGG16" in capsys.readouterr().out
    monkeypatch.setattr(demo, "PRESERVED", (0,))
    demo.run(tmp_path, width=0.05, epochs=1)
    assert "training VGG16" not in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text()) == [*first[:4], first[-1]]


def test_compare_writes_table_and_plot(checkpoints: list[str], tmp_path: Path) -> None:
    data, plot, report = tmp_path / "data.npz", tmp_path / "c.png", tmp_path / "c.json"
    inputs = torch.randn(24, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    np.savez(data, inputs=inputs.numpy(), labels=np.arange(24) % 10)
    output = invoke(
        "compare", *checkpoints, *MODEL, "--data", str(data), "-g", "preserve=0,3", "-g", "normalize=none,reset",
        "--no-latency", "--draw", str(plot), "--json", str(report),
    )  # fmt: skip
    names = [point["name"] for point in json.loads(report.read_text())["points"]]
    assert names[3:] == [f"preserve={p}, normalize={n}" for p in (0, 3) for n in ("None", "reset")]
    assert "ensemble" in output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_compare_judges_each_head_on_its_own_data(checkpoints: list[str], tmp_path: Path) -> None:
    inputs = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    asked, report = (
        ["compare", *checkpoints, *MODEL, "--heads", "1", "-g", "solve=none", "--no-latency"],
        tmp_path / "c",
    )
    for task in (0, 1):
        np.savez(tmp_path / f"{task}.npz", inputs=inputs, labels=np.arange(16) % 10)
        asked += ["--evaluate", str(tmp_path / f"{task}.npz")]
    invoke(*asked, "--data", str(tmp_path / "0.npz"), "--json", str(report.with_suffix(".json")))
    facts = json.loads(report.with_suffix(".json").read_text())
    assert (facts["target"], facts["samples"]) == ("labels", 32)
    edge, other, _, merged = facts["points"]
    assert len(merged["each"]) == 2
    assert merged["accuracy"] == pytest.approx(sum(merged["each"]) / 2, rel=1e-12)
    assert merged["params"] > edge["params"] == other["params"] == 1
    with pytest.raises(ArgumentError, match="once for each of 2 checkpoints"):
        invoke(*asked, "--evaluate", "digits")


WIDER = "vfx:vgg11_bn?width=0.25&in_channels=1"
FOUR = "vfx:vgg11_bn?width=0.125&in_channels=1&num_classes=4"
TEN = "vfx:vgg11_bn?width=0.125&in_channels=1"


@pytest.fixture
def unlike(checkpoints: list[str], tmp_path: Path) -> list[str]:
    """A checkpoint of ten classes, one of four, and data of each."""
    inputs = torch.randn(24, 1, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    for classes in (10, 4):
        np.savez(tmp_path / f"{classes}.npz", inputs=inputs, labels=np.arange(24) % classes)
    torch.save(vgg11_bn(width=0.125, in_channels=1, num_classes=4).state_dict(), tmp_path / "four.pt")
    return [checkpoints[0], str(tmp_path / "four.pt")]


def test_heads_of_several_classes_are_merged(unlike: list[str], tmp_path: Path) -> None:
    asked = ["merge", *unlike, "-m", TEN, "-m", FOUR, "-i", "1x32x32", "--data", str(tmp_path / "10.npz")]
    onnx = tmp_path / "m.onnx"
    invoke(*asked, "--heads", "1", "-o", str(onnx))
    shapes = [output.shape[1] for output in onnxruntime.InferenceSession(str(onnx)).get_outputs()]
    assert shapes == [10, 4]
    with pytest.raises(ArchitectureError, match="keep the layers that differ as heads"):
        invoke(*asked)
    with pytest.raises(ArgumentError, match="vfx compare --heads with --evaluate once for each"):
        invoke(*asked, "--heads", "1", "--evaluate", str(tmp_path / "10.npz"))
    with pytest.raises(ArgumentError, match=r"--model stands once, or once for each of 2 checkpoints .*; got 3"):
        invoke(*asked, "-m", TEN)
    with pytest.raises(ArgumentError, match="--model 'foo' must be one of"):
        invoke("merge", *unlike, "-m", TEN, "-m", "foo", "-i", "1x32x32")


def test_heads_of_several_classes_are_compared(unlike: list[str], tmp_path: Path) -> None:
    report = tmp_path / "c.json"
    invoke(
        "compare", *unlike, "-m", TEN, "-m", FOUR, "-i", "1x32x32", "--data", str(tmp_path / "10.npz"), "--heads", "1",
        "-g", "solve=none,least_squares", "--no-latency", "--evaluate", str(tmp_path / "10.npz"),
        "--evaluate", str(tmp_path / "4.npz"), "--json", str(report),
    )  # fmt: skip
    ten, four, _, *merged = json.loads(report.read_text())["points"]
    labels = [np.arange(24) % classes for classes in (10, 4)]
    with np.load(tmp_path / "4.npz") as held:
        inputs = torch.from_numpy(held["inputs"])
    for point, file, model, own in zip((ten, four), unlike, (TEN, FOUR), labels):
        with torch.no_grad():
            decided = load(file, build(model))(inputs).argmax(1)
        assert point["accuracy"] == pytest.approx(float((decided.numpy() == own).mean()), rel=1e-12)
    assert [len(point["each"]) for point in merged] == [2, 2]


def test_networks_of_several_widths_are_merged(checkpoints: list[str], tmp_path: Path) -> None:
    wide, out = tmp_path / "wide.pt", tmp_path / "m.safetensors"
    torch.save(build(WIDER).state_dict(), wide)
    asked = ["merge", checkpoints[0], str(wide), "-i", "1x32x32", "--match", "weight", "-o", str(out)]
    invoke(*asked, "-m", TEN, "-m", WIDER)
    load(out, build(TEN))  # it has the first one's channels
    with pytest.raises(ArchitectureError):
        invoke(*asked, "-m", TEN)


def test_prune_reads_labels_and_writes_the_result(checkpoints: list[str], tmp_path: Path) -> None:
    data, report = tmp_path / "calibration.npz", tmp_path / "p.json"
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((24, 1, 32, 32)).astype(np.float32)
    np.savez(data, inputs=inputs, labels=generator.integers(0, 10, 24))
    safetensors = tmp_path / "p.safetensors"
    output = invoke(
        "prune", checkpoints[0], *MODEL, "-s", "features.*=0.75", "-s", "classifier.0=0.5", "--score", "woodfisher",
        "--score-arg", "block=500", "--scope", "layer", "--data", str(data), "--max-samples", "8", "--masks",
        "parametrize", "-o", str(safetensors), "--json", str(report),
    )  # fmt: skip
    assert "MaskWeights(woodfisher, layer" in output
    facts = json.loads(report.read_text())
    assert facts["normalize"] == "reset"
    shares = {layer["name"]: layer["sparsity"] for layer in facts["layers"]}
    assert shares.pop("classifier.0.weight") == 0.5
    assert set(shares.values()) == {0.75}
    pruned = load(safetensors)
    assert {name: float((pruned[name] == 0).double().mean()) for name in shares} == shares


def test_prune_keeps_scores_in_a_file(checkpoints: list[str], tmp_path: Path) -> None:
    data, scores, files = tmp_path / "x.npz", tmp_path / "w.safetensors", [tmp_path / f"{i}.safetensors" for i in "ab"]
    np.savez(data, inputs=np.random.default_rng(0).standard_normal((8, 1, 32, 32)).astype(np.float32))
    asked = ["prune", checkpoints[0], *MODEL, "-s", "0.5", "--scores", str(scores), "--solve", "none"]
    invoke(*asked, "--score", "wanda", "-d", str(data), "--normalize", "none", "-o", str(files[0]))
    invoke(*asked, "-o", str(files[1]))
    one, two = map(load, files)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    with pytest.raises(CheckpointError, match="another network"):
        invoke("prune", checkpoints[1], *MODEL, "-s", "0.5", "--scores", str(scores))


def test_prune_takes_one_share_and_says_what_is_wrong(checkpoints: list[str], tmp_path: Path) -> None:
    assert "sparsity" in invoke("prune", checkpoints[0], *MODEL, "-s", "0.5", "--protect", "first", "--protect", "head")
    data = tmp_path / "calibration.npz"
    np.savez(data, inputs=np.zeros((4, 1, 32, 32), np.float32), labels=np.zeros(3))
    with pytest.raises(DataError, match="4 inputs and 3 labels"):
        invoke("prune", checkpoints[0], *MODEL, "-s", "0.5", "--score", "wanda", "--data", str(data))
    with pytest.raises(ArgumentError, match=r"glob=0\.9"):
        invoke("prune", checkpoints[0], *MODEL, "-s", "a=b")
    with pytest.raises(ArgumentError, match="--score-arg 'block'"):
        invoke("prune", checkpoints[0], *MODEL, "-s", "0.5", "--score-arg", "block")


def test_prune_structured_writes_a_smaller_network(checkpoints: list[str], tmp_path: Path) -> None:
    data, report, onnx = tmp_path / "calibration.npz", tmp_path / "s.json", tmp_path / "s.onnx"
    inputs = np.random.default_rng(0).standard_normal((24, 1, 32, 32)).astype(np.float32)
    np.savez(data, inputs=inputs, labels=np.arange(24) % 10)
    invoke(
        "prune-structured", checkpoints[0], *MODEL, "-s", "0.5", "--score", "taylor", "--round-to", "4", "--protect",
        "classifier.0.weight", "--data", str(data), "--normalize", "none", "-o", str(onnx), "--json", str(report),
    )  # fmt: skip
    facts = json.loads(report.read_text())
    assert facts["params_ratio"] < 0.5
    session = onnxruntime.InferenceSession(str(onnx))
    (got,) = session.run(None, {session.get_inputs()[0].name: inputs[:3]})
    assert got.shape == (3, 10)
    invoke("prune-structured", checkpoints[0], *MODEL, "-s", "0.5", "--method", "fold", "--json", str(report))
    assert json.loads(report.read_text())["method"] == "fold"
    with pytest.raises(ArgumentError, match="budget"):
        invoke("prune-structured", checkpoints[0], *MODEL, "-s", "0.5", "--budget", "money")
