"""Bad input: each kind has an error of its own that names the cause, and leaves no partial file."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import close, edges, images
from micro_models import conv, net
from torch import Tensor, nn

from vfx import errors
from vfx.api import collect, compile, layers, merge, profile, repair, symmetry, trace
from vfx.emit.files import export, load
from vfx.errors import (
    ArchitectureError,
    ArgumentError,
    CaptureError,
    CheckpointError,
    DataError,
    OutputError,
    PassError,
    VerificationError,
    VfxError,
    WeightError,
)
from vfx.program import Program

X = images(6, 8)


def small(width: int = 5, last: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        conv(3, width), nn.BatchNorm2d(width), nn.ReLU(), conv(width, 4), last(), nn.Flatten(), nn.Linear(256, 3)
    )


@pytest.fixture
def models() -> list[nn.Module]:
    return edges(small, X)


@pytest.fixture(scope="module")
def program() -> Program:
    """Two edges, traced once."""
    return trace(edges(small, X), X[:2])


def _merge(models: Any, x: Any = X[:2], **options: Any) -> Any:
    return merge(models, None if isinstance(models, Program) else x, progress=False, **options)


def test_every_error_is_a_vfx_error_of_its_own() -> None:
    kinds = [ArchitectureError, ArgumentError, CaptureError, CheckpointError, DataError, OutputError, PassError,
             VerificationError, WeightError]  # fmt: skip
    assert all(issubclass(kind, VfxError) for kind in kinds)
    assert issubclass(ArgumentError, ValueError)
    for kind in kinds:
        assert not any(issubclass(kind, other) for other in kinds if other is not kind)
        assert getattr(errors, kind.__name__).__doc__


# architectures --------------------------------------------------------------------------------------------------------


def test_the_first_key_of_another_shape_is_named(models: list[nn.Module]) -> None:
    other = edges(lambda: small(7), X)[0]
    with pytest.raises(ArchitectureError, match=r"'0.weight' has shape \(5, 3, 3, 3\) in edge 0 and \(7, 3, 3, 3\)"):
        _merge([models[0], other])
    with pytest.raises(ArchitectureError, match="edge 2"):
        _merge([*models, other])


def test_a_key_that_is_missing_or_too_many_is_named(models: list[nn.Module]) -> None:
    plain = nn.Sequential(conv(3, 5), nn.Identity(), nn.ReLU(), conv(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    with pytest.raises(ArchitectureError, match=r"edge 1 lacks '1.weight', which edge 0 has"):
        _merge([models[0], plain])
    with pytest.raises(ArchitectureError, match=r"edge 1 has '1.weight', which edge 0 lacks"):
        _merge([plain, models[0]])


def test_another_dtype_is_named(models: list[nn.Module]) -> None:
    with pytest.raises(ArchitectureError, match=r"'0.weight' is torch.float32 in edge 0 and torch.float64 in edge 1"):
        _merge([models[0], models[1].double()])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "4", nn.Tanh()),
        lambda model: setattr(model[1], "eps", 0.5),
        lambda model: setattr(model[3], "padding", (0, 0)),
    ],
    ids=["activation", "eps", "padding"],
)
def test_edges_that_compute_something_else_are_refused(models: list[nn.Module], change: Callable[[Any], None]) -> None:
    """The state dicts agree, the networks do not: edge 1 in edge 0's graph would be another function."""
    change(models[1])
    with pytest.raises(ArchitectureError, match="edge 1"):
        _merge(models)


# weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("edge", [0, 1])
@pytest.mark.parametrize("key", ["3.weight", "1.running_var"])
def test_nan_and_infinite_weights_are_named(models: list[nn.Module], value: float, edge: int, key: str) -> None:
    models[edge].state_dict()[key].view(-1)[1] = value
    with pytest.raises(WeightError, match=rf"1 of \d+ values of '{key}' in edge {edge} are NaN or infinite"):
        _merge(models)


def test_every_door_checks_the_weights(models: list[nn.Module], tmp_path: Path) -> None:
    clean = trace(copy.deepcopy(models), X[:2])
    models[0].state_dict()["0.bias"][0] = torch.nan
    for call in (
        lambda: trace(models[0], X[:2]),
        lambda: symmetry(models[0], X[:2]),
        lambda: layers(models[0], X[:2]),
        lambda: profile(models[0], X[:2]),
        lambda: collect(models, X[:2], data=X),
        lambda: compile(models[0], X[:2], passes=[]),
        lambda: repair(models[0], models[1:], X[:2], data=X),
    ):
        with pytest.raises(WeightError, match=r"'0.bias'"):
            call()
    broken = clean.with_weights([{**clean.weights[0], "0.bias": torch.full((5,), torch.inf)}, clean.weights[1]])
    with pytest.raises(WeightError, match=r"5 of 5 values of '0.bias' in edge 0"):
        merge(broken)
    torch.save(models[0].state_dict(), tmp_path / "a.pt")
    with pytest.raises(WeightError, match=r"'0.bias' in a.pt"):
        load(tmp_path / "a.pt")


# data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "normalize"),
    [(m, n) for m in ("weight", "activation") for n in (None, "reset", "repair", "rescale") if m != "weight" or n],
)
def test_an_empty_loader_is_refused(program: Program, match: str, normalize: str | None) -> None:
    for empty in ([], X[:0], iter(()), [X[:0], X[:0]]):
        with pytest.raises(DataError, match="no samples; give at least one batch"):
            _merge(program, data=empty, match=match, normalize=normalize)


@pytest.mark.parametrize("normalize", ["reset", "repair"])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X[:, :2], r"input 'input' of a batch has shape \(6, 2, 8, 8\), the network was captured with \(batch, 3, 8"),
        (X[:, :, :4], r"shape \(6, 3, 4, 8\)"),
        (X[0], r"shape \(3, 8, 8\)"),
        (X.double(), r"is torch.float64, the network takes torch.float32"),
        (X * torch.nan, "NaN or infinite"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(program: Program, batch: Tensor, message: str, normalize: str) -> None:
    for match in ("weight", "activation"):
        with pytest.raises(DataError, match=message):
            _merge(program, data=[X, batch], match=match, normalize=normalize)


def test_a_missing_loader_is_refused(program: Program) -> None:
    for normalize in ("repair", "rescale", "reset"):
        with pytest.raises(ArgumentError, match=f"normalize='{normalize}' runs the merged network on data"):
            _merge(program, normalize=normalize)
    with pytest.raises(ArgumentError, match="match='activation' needs data="):
        _merge(program, match="activation")


# example inputs and capture -------------------------------------------------------------------------------------------


def test_an_example_batch_of_one_is_doubled(models: list[nn.Module]) -> None:
    """It would be taken for a constant; the result takes any batch."""
    single, double = (_merge(models, x) for x in (X[:1], X[:2]))
    with torch.no_grad():
        for batch in (1, 2, 6):
            assert single.module(X[:batch]).shape == (batch, 3)
            close(single.module(X[:batch]), double.module(X[:batch]), 1e-6)
    graph = _merge(models, X[:1], preserve=1).module
    assert graph(X).shape == (6, 3)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (X[:0], "empty batch"),
        (None, "example_inputs are needed"),
        ("images", "must be a tensor or a non-empty tuple"),
        ((), "must be a tensor or a non-empty tuple"),
        (torch.tensor(1.0), "at least one tensor with a batch axis"),
    ],
)
def test_bad_example_inputs_are_refused(models: list[nn.Module], example: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        merge(models, example)


def test_example_inputs_of_the_wrong_shape_name_the_model(models: list[nn.Module]) -> None:
    with pytest.raises(CaptureError, match=r"could not capture Sequential with inputs \(2, 2, 8, 8\)"):
        _merge(models, X[:2, :2])


def test_a_model_that_cannot_be_captured_names_its_cause() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.a(x)
        return -self.a(x)

    pair = [net(forward, a=nn.Linear(4, 2)) for _ in range(2)]
    with pytest.raises(CaptureError, match="could not capture Net") as caught:
        merge(pair, torch.randn(2, 4))
    assert "Way out" in str(caught.value)
    assert caught.value.__cause__ is not None


# arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (1.5, r"must lie in \[0, 1\]"),
        (-0.1, r"must lie in \[0, 1\]"),
        (float("nan"), "must be a finite number, got nan"),
        ([0.5, 0.6], "must sum to 1"),
        ([1.5, -0.5], r"must lie in \[0, 1\]"),
        ([1.0], "1 weights for 2 edges"),
        ([0.2, 0.3, 0.5], "3 weights for 2 edges"),
        ([], "0 weights for 2 edges"),
        ("half", "weights must be a number, a list of numbers or None"),
    ],
)
def test_alpha_outside_its_range_is_refused(program: Program, weights: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        _merge(program, weights=weights)


def test_alpha_may_be_any_number(program: Program) -> None:
    import numpy as np

    expected = _merge(program, weights=0.25).module
    for weights in (np.float32(0.25), torch.tensor(0.25), torch.tensor([0.75, 0.25]), np.array([0.75, 0.25])):
        found = _merge(program, weights=weights).module
        assert torch.equal(found[0].weight, expected[0].weight)
    _merge(program, weights=1)


def test_one_alpha_for_three_edges_is_refused() -> None:
    with pytest.raises(ArgumentError, match="one number as weights means alpha of two edges; there are 3"):
        _merge(edges(small, X, 3), weights=0.5)


@pytest.mark.parametrize("preserve", [-1, 4, 100, 1.5, True, None])
def test_preserve_outside_the_network_is_refused(program: Program, preserve: Any) -> None:
    whole = isinstance(preserve, int) and preserve is not True
    message = r"between 0 and 3 \(the number of layers\)" if whole else "preserve must be a whole number or a text, got"
    with pytest.raises(ArgumentError, match=message):
        _merge(program, preserve=preserve)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserve": "layer9"}, "names no module that runs; there are 0, 1"),
        ({"preserve": 1, "join": "late"}, "'preactivation' or 'activation'"),
        ({"match": "magic"}, "match='magic' is unknown"),
        ({"normalize": "magic"}, "normalize='magic' is unknown"),
        ({"data": X, "max_samples": 0}, "max_samples must be at least 1"),
    ],
)
def test_other_arguments_are_checked(program: Program, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        _merge(program, **options)


def test_one_model_is_not_enough(models: list[nn.Module]) -> None:
    for few in ([], models[:1]):
        with pytest.raises(ArgumentError, match=f"at least two models, got {len(few)}"):
            _merge(few)
    with pytest.raises(ArgumentError, match="at least two models, got 1"):
        _merge(trace(models[0], X[:2]))
    with pytest.raises(ArgumentError, match="models must be a list of networks or a Program, got Sequential"):
        _merge(models[0])
    with pytest.raises(ArgumentError, match=r"got \['a.pth', 'b.pth'\]; vfx.load reads files"):
        _merge(["a.pth", "b.pth"])


# checkpoints ----------------------------------------------------------------------------------------------------------


class Payload:
    """What a pickle can do to its reader."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path: Path, suffix: str, writer: str) -> None:
    path, victim = tmp_path / f"model{suffix}", tmp_path / "owned"
    value = {"weight": torch.ones(2), "payload": Payload(victim)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(CheckpointError, match=r"needs code to be unpickled and is refused\. Save a state dict instead"):
        load(path)
    assert not victim.exists()


def test_a_pickled_module_is_refused(models: list[nn.Module], tmp_path: Path) -> None:
    torch.save(models[0], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="Save a state dict instead"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".pt2", ".onnx"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 not a zip"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="model"):
        load(path)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, 3, torch.ones(2), {"state_dict": {"a": "b"}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds no state dict of tensors"):
        load(tmp_path / "model.pt")


def test_missing_files_and_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        load(tmp_path / "nothing.pt")
    (tmp_path / "model.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"cannot read .h5; known: .safetensors"):
        load(tmp_path / "model.h5")
    with pytest.raises(CheckpointError, match=r"it has no model\.safetensors"):
        load(tmp_path)


def test_a_checkpoint_of_another_architecture_names_the_key(models: list[nn.Module], tmp_path: Path) -> None:
    torch.save(small(7).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(
        ArchitectureError, match=r"'0.weight' has shape \(5, 3, 3, 3\) in Sequential and \(7, 3, 3, 3\)"
    ):
        load(tmp_path / "wide.pt", models[0])


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_state_dicts_load_plain_and_nested(
    models: list[nn.Module], tmp_path: Path, suffix: str, wrap: Callable[[Any], Any]
) -> None:
    torch.save(wrap(models[0].state_dict()), tmp_path / f"model{suffix}")
    found = load(tmp_path / f"model{suffix}", models[1])
    assert found is not models[1]
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in models[0].state_dict().items())


# files ----------------------------------------------------------------------------------------------------------------


def test_no_refusal_leaves_a_file(models: list[nn.Module], tmp_path: Path) -> None:
    merged, split = _merge(models), _merge(models, preserve=1)
    for model, name, kind, message in [
        (merged, "model.h5", ArgumentError, r"cannot export to .h5; use .onnx, .safetensors, .pt2"),
        (merged, "model", ArgumentError, "a file without suffix"),
        (merged, "missing/model.onnx", OutputError, "the folder .*missing does not exist"),
        (split, "model.safetensors", ArgumentError, r"GraphModule has no class .* export it to .pt2 or .onnx"),
        (merged.module, "model.onnx", ArgumentError, "needs example_inputs"),
        (split.module, "model.pt2", ArgumentError, "needs example_inputs"),
    ]:
        with pytest.raises(kind, match=message):
            export(model, tmp_path / name)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_not_exported(models: list[nn.Module], tmp_path: Path, suffix: str, value: float) -> None:
    broken = models[0]
    export(broken, tmp_path / f"good{suffix}", X[:2])
    broken.state_dict()["1.running_var"][2] = value
    with pytest.raises(WeightError, match=r"1 of 5 values of '1.running_var' in the network"):
        export(broken, tmp_path / f"model{suffix}", X[:2])
    assert [one.name for one in tmp_path.iterdir()] == [f"good{suffix}"]


def test_masks_with_infinities_are_exported(tmp_path: Path) -> None:
    masked = net(lambda self, x: self.a(x).masked_fill(self.mask < 0, 0.0), a=nn.Linear(4, 4))
    masked.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0]))
    for suffix in (".pt2", ".safetensors"):
        export(masked, tmp_path / f"model{suffix}", torch.randn(2, 4))
        emptied = net(lambda self, x: self.a(x), a=nn.Linear(4, 4))
        emptied.register_buffer("mask", torch.zeros(4))
        found = load(tmp_path / f"model{suffix}", emptied)
        assert torch.equal(found.state_dict()["mask"], masked.mask)
