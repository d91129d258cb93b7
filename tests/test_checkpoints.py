"""Checkpoints as training code writes them are read, and what was chosen, stripped or cast is said."""

from __future__ import annotations

import argparse
import datetime
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vfx.emit.files import load
from vfx.errors import ArchitectureError, ArgumentError, CheckpointError, CheckpointNote, WeightError

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu() + x


class Network(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    model = Network().eval()
    for block in model.blocks:
        block.norm.running_mean.normal_()
        block.norm.num_batches_tracked.fill_(seed + 3)
    return model


MODEL, AVERAGE = network(0), network(1)
STATE, EMA = MODEL.state_dict(), AVERAGE.state_dict()


def named(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{key}": x for key, x in state.items()}


def saved(value: Any, folder: Path, name: str = "last.pt", **options: Any) -> Path:
    torch.save(value, folder / name, **options)
    return folder / name


def same(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(state) == set(other) and all(torch.equal(x, other[key]) for key, x in state.items())


def read(path: Path, **options: Any) -> tuple[nn.Module, str]:
    """What is loaded into another network of the class, and the notes."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = load(path, network(7), **options)
    assert all(issubclass(one.category, CheckpointNote) for one in found)
    assert all(one.filename == __file__ for one in found)  # it is the caller that is told
    assert not result.training
    return result, "\n".join(str(one.message) for one in found)


def optimizer() -> dict[str, Any]:
    model = network()
    adam = torch.optim.Adam(model.parameters())
    model(torch.randn(4, WIDTH)).sum().backward()
    adam.step()
    return adam.state_dict()


# entries --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["last.pt", "last.pth", "last.ckpt", "pytorch_model.bin", "model_best.pth.tar", "L.PT"]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_suffix_of_torch_save(tmp_path: Path, name: str, legacy: bool) -> None:
    path = saved({"state_dict": STATE, "epoch": 3}, tmp_path, name, _use_new_zipfile_serialization=not legacy)
    result, notes = read(path)
    assert same(result.state_dict(), STATE)
    assert notes == ""  # nothing was chosen


@pytest.mark.parametrize(
    "entry",
    ["state_dict", "model_state_dict", "model", "net", "network", "module", "params", "state_dict_ema", "model_ema",
     "ema", "ema_state_dict", "params_ema"],
)  # fmt: skip
@pytest.mark.parametrize("given", [True, False])
def test_the_only_state_dict_is_taken_from_a_known_entry(tmp_path: Path, entry: str, given: bool) -> None:
    path = saved({"epoch": 3, "optimizer": optimizer(), entry: OrderedDict(STATE), "best": torch.tensor(0.9)}, tmp_path)
    if given:
        result, notes = read(path)
        assert same(result.state_dict(), STATE)
        assert notes == ""
    else:
        assert same(load(path), STATE)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("plain", "average"), [("model", "ema"), ("state_dict", "state_dict_ema"), ("net", "params_ema")]
)
def test_trained_weights_go_before_their_averages_and_entry_chooses(
    tmp_path: Path, plain: str, average: str, order: int
) -> None:
    path = saved(dict([(plain, STATE), (average, EMA)][::order]), tmp_path)
    result, notes = read(path)
    assert same(result.state_dict(), STATE)
    assert notes == f"last.pt: took '{plain}' and left {average}; entry= takes another"
    result, notes = read(path, entry=average)
    assert same(result.state_dict(), EMA)
    assert notes == ""
    assert same(load(path, entry=average), EMA)
    with pytest.warns(CheckpointNote, match=f"took '{plain}'"):
        assert same(load(path), STATE)
    with pytest.raises(CheckpointError, match=rf"no state dict 'emma'; it holds .*{average} \(OrderedDict of"):
        load(path, entry="emma")


def test_entries_inside_entries(tmp_path: Path) -> None:
    path = saved({"model": {"state_dict": STATE, "name": "net"}, "ema": {"module": EMA, "updates": 3}}, tmp_path)
    assert same(read(path)[0].state_dict(), STATE)
    assert same(read(path, entry="ema")[0].state_dict(), EMA)
    assert same(read(path, entry="ema.module")[0].state_dict(), EMA)


def test_of_other_entries_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    other = nn.Linear(3, 2).state_dict()
    path = saved({"discriminator": other, "encoder": STATE, "step": 3}, tmp_path)
    result, notes = read(path)
    assert same(result.state_dict(), STATE)
    assert notes == "last.pt: took 'encoder' and left discriminator; entry= takes another"
    with pytest.raises(CheckpointError, match="several state dicts: discriminator, encoder; choose by entry="):
        load(path)
    assert same(load(path, entry="discriminator"), other)
    result, notes = read(saved({"backbone": STATE, "step": 3}, tmp_path))
    assert same(result.state_dict(), STATE)
    assert notes == "last.pt: took 'backbone'"


def test_of_several_that_fit_and_whose_names_say_nothing_entry_chooses(tmp_path: Path) -> None:
    momenta = {key: torch.zeros_like(x) for key, x in STATE.items()}
    path = saved({"momentum_buffers": momenta, "backbone": STATE}, tmp_path)
    message = "several state dicts that fit Network: momentum_buffers, backbone; choose by entry="
    with pytest.raises(CheckpointError, match=message):
        load(path, network())
    assert same(read(path, entry="backbone")[0].state_dict(), STATE)
    pair = saved({"teacher": named("module.", EMA), "student": named("module.")}, tmp_path)
    assert same(read(pair)[0].state_dict(), STATE)
    assert same(read(pair, entry="teacher")[0].state_dict(), EMA)


def test_an_averaged_model(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(MODEL)
    result, notes = read(saved(averaged.state_dict(), tmp_path))
    assert same(result.state_dict(), STATE)
    assert "left out 1 tensors under other names: n_averaged" in notes
    nested = saved({"ema": {f"module.{key}": x for key, x in averaged.state_dict().items()}}, tmp_path)
    assert same(read(nested)[0].state_dict(), STATE)
    with pytest.raises(ArchitectureError, match="has 'n_averaged', which Network lacks"):
        load(saved({**STATE, "n_averaged": torch.tensor(1)}, tmp_path), network())


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_counters_that_were_averaged_with_the_weights(tmp_path: Path, shift: float) -> None:
    state = {key: x if x.is_floating_point() else x + shift for key, x in STATE.items()}
    floats = {key: x.float() for key, x in state.items()}
    result, notes = read(saved(floats, tmp_path))
    assert same(result.state_dict(), STATE)
    assert notes == "last.pt: cast from torch.float32 to torch.int64"


def test_numbers_that_are_no_counters_are_not_rounded(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("order", torch.tensor([1, 0]))
    state = model.state_dict()
    whole = saved({**state, "order": torch.tensor([1.0, 0.0])}, tmp_path)
    with pytest.warns(CheckpointNote, match=r"cast from torch.float32 to torch.int64"):
        assert same(load(whole, model).state_dict(), state)
    with pytest.raises(ArchitectureError, match=r"'order' is torch.int64 in Linear and torch.float32"):
        load(saved({**state, "order": torch.tensor([0.9, 0.0])}, tmp_path), model)


def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    callbacks = {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.9), "best": "a.ckpt"}}
    value = {
        "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.4.0", "callbacks": callbacks,
        "state_dict": named("model.") | {"criterion.weight": torch.ones(3)}, "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [optimizer()], "lr_schedulers": [], "hyper_parameters": {"width": WIDTH, "root": Path("x")},
    }  # fmt: skip
    result, notes = read(saved(value, tmp_path, "last.ckpt"))
    assert same(result.state_dict(), STATE)
    assert "model.blocks.0.conv.weight to blocks.0.conv.weight" in notes
    assert "left out 1 tensors under other names: criterion.weight" in notes


def test_settings_beside_the_weights_are_no_hindrance(tmp_path: Path) -> None:
    settings = {
        "args": argparse.Namespace(lr=0.1, out=Path("x")), "best": np.float64(0.9), "curve": np.ones(3),
        "when": datetime.datetime(2024, 1, 1), "meters": defaultdict(list, loss=[1.0]), "flag": np.bool_(True),
    }  # fmt: skip
    for legacy in (False, True):
        path = saved({"model": STATE, **settings}, tmp_path, _use_new_zipfile_serialization=not legacy)
        assert same(read(path)[0].state_dict(), STATE)


def test_weights_beside_counters(tmp_path: Path) -> None:
    assert same(read(saved({**STATE, "epoch": 3, "args": "none"}, tmp_path))[0].state_dict(), STATE)


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (optimizer(), "state of an optimizer"),
        ({"optimizer": optimizer(), "epoch": 3}, r"it holds optimizer \(optimizer\), epoch \(int\)"),
        ({"model": "resnet", "acc": torch.tensor(0.9)}, r"it holds model \(str\), acc \(tensor \(\)\)"),
        ([STATE], "it holds list of 1"),
        ({}, "it holds nothing"),
        ({"shadow": [torch.ones(2)]}, r"it holds shadow \(list of 1\)"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, value: Any, held: str) -> None:
    path = saved(value, tmp_path)
    for model in (None, network()):
        with pytest.raises(CheckpointError, match=f"last.pt holds no state dict of tensors; .*{held}"):
            load(path, model)


# names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "module.model.", "_orig_mod.module.", "model._orig_mod.module.",
     "module.module.", "backbone.body.", "_forward_module.model."],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefixes_are_stripped(tmp_path: Path, prefix: str, suffix: str) -> None:
    path = tmp_path / f"last{suffix}"
    torch.save(named(prefix), path) if suffix == ".pt" else save_file(named(prefix), path)
    result, notes = read(path)
    assert same(result.state_dict(), STATE)
    assert notes == f"last{suffix}: names are stripped to the model's, as {prefix}blocks.0.conv.weight to " + (
        "blocks.0.conv.weight" if suffix == ".pt" else notes.rpartition(" ")[2]
    )
    assert same(load(path), named(prefix))  # without a model names stay


def test_wrappers_inside_are_stripped(tmp_path: Path) -> None:
    """As of a network of which parts were compiled, or distributed, on their own."""
    state = {
        key.replace("blocks.1.", "blocks.1._orig_mod.").replace("head.", "head.module."): x for key, x in STATE.items()
    }
    result, notes = read(saved(state, tmp_path))
    assert same(result.state_dict(), STATE)
    assert "blocks.1._orig_mod.conv.weight to blocks.1.conv.weight" in notes


def test_what_the_model_wraps_is_found_as_well(tmp_path: Path) -> None:
    path = saved(STATE, tmp_path)
    wrapped = nn.ModuleDict({"model": nn.ModuleDict({"net": network(7)})})
    with pytest.warns(CheckpointNote, match=r"blocks.0.conv.weight to model.net.blocks.0.conv.weight"):
        assert same(load(path, wrapped).state_dict(), named("model.net."))
    with pytest.warns(CheckpointNote, match=r"blocks.0.conv.weight to module.blocks.0.conv.weight"):
        assert same(load(path, nn.DataParallel(network(7))).state_dict(), named("module."))
    path = saved(named("encoder."), tmp_path)
    with pytest.warns(CheckpointNote, match=r"encoder.blocks.0.conv.weight to module.blocks.0.conv.weight"):
        assert same(load(path, nn.DataParallel(network(7))).state_dict(), named("module."))


def test_of_two_prefixes_the_usual_is_taken_and_entry_chooses(tmp_path: Path) -> None:
    path = saved({"state_dict": named("teacher.", EMA) | named("student.")}, tmp_path)
    result, notes = read(path)
    assert same(result.state_dict(), STATE)
    assert "left out 16 tensors under other names: teacher." in notes
    assert same(read(path, entry="teacher.")[0].state_dict(), EMA)
    path = saved({"state_dict": named("left.", EMA) | named("right.")}, tmp_path)
    with pytest.raises(ArchitectureError, match=r"lacks 'blocks.0.conv.weight', .* holds 32 tensors: left.blocks.0"):
        read(path)
    assert same(read(path, entry="right.")[0].state_dict(), STATE)


def test_a_network_whose_own_names_are_those_of_wrappers(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.weight, self.bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))

    state = Odd().state_dict()
    assert same(load(saved(state, tmp_path), Odd()).state_dict(), state)
    with pytest.raises(ArchitectureError, match=r"lacks 'weight'"):  # nothing tells the two weights apart
        load(saved(named("module.", state), tmp_path), Odd())


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_what_does_not_fit_is_refused_and_the_names_listed(tmp_path: Path, change: str, prefix: str) -> None:
    state = named(prefix)
    if change == "missing":
        del state[f"{prefix}head.bias"]
    elif change == "extra":
        state[f"{prefix}head.scale"] = torch.ones(2)
    else:
        state[f"{prefix}head.bias"] = torch.ones(9)
    message = rf"last.pt holds {len(state)} tensors: {prefix}blocks.0.conv.weight, .*…"
    with pytest.raises(ArchitectureError, match=message):
        read(saved({"state_dict": state}, tmp_path))


def test_counters_and_tied_names_may_be_missing(tmp_path: Path) -> None:
    """Old files have no num_batches_tracked; safetensors hold a tied tensor once."""
    state = {key: x for key, x in STATE.items() if not key.endswith("num_batches_tracked")}
    for prefix in ("", "module."):
        result, _ = read(saved(named(prefix, state), tmp_path))
        assert same({key: x for key, x in result.state_dict().items() if key in state}, state)

    def tied() -> nn.Module:
        model = nn.ModuleDict(
            {"embed": nn.Embedding(5, 3), "mid": nn.Linear(3, 3), "head": nn.Linear(3, 5, bias=False)}
        )
        model["head"].weight = model["embed"].weight
        return model

    model = tied()
    full = model.state_dict()
    for absent in ("head.weight", "embed.weight"):
        for prefix in ("", "model."):
            path = saved(named(prefix, {key: x for key, x in full.items() if key != absent}), tmp_path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointNote)
                result = load(path, tied())
            assert same(result.state_dict(), full)
            assert result["head"].weight is result["embed"].weight


# precisions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_into_a_wider_network(tmp_path: Path, dtype: torch.dtype) -> None:
    half = {key: x.to(dtype) if x.is_floating_point() else x for key, x in STATE.items()}
    path = saved({"state_dict": half}, tmp_path)
    result, notes = read(path)
    assert notes == f"last.pt: cast from {dtype} to torch.float32"
    assert same(result.state_dict(), {key: x.float() if x.is_floating_point() else x for key, x in half.items()})
    assert same(load(path), half)
    assert same(load(path, dtype=torch.float32), result.state_dict())
    result, notes = read(path, dtype=dtype)
    assert same(result.state_dict(), half)
    assert notes == ""
    narrow = network(7).to(torch.float16 if dtype == torch.bfloat16 else torch.bfloat16)
    with pytest.raises(ArchitectureError, match=r"pass dtype=torch.\w+16 to load the network in the file's precision"):
        load(path, narrow)


def test_a_cast_that_loses_values_needs_dtype(tmp_path: Path) -> None:
    path, half = saved(STATE, tmp_path), network(7).half()
    with pytest.raises(
        ArchitectureError, match=r"'blocks.0.conv.weight' is torch.float32 .* or dtype=torch.float16 to"
    ):
        load(path, half)
    assert same(load(path, half, dtype=torch.float32).state_dict(), STATE)
    with pytest.warns(CheckpointNote, match=r"cast from torch.float32 to torch.float16"):
        rounded = load(path, half, dtype=torch.float16)
    assert torch.equal(rounded.head.weight, MODEL.head.weight.half())
    assert half.head.weight.dtype == torch.float16
    for wrong in (torch.int32, "float16", float):
        with pytest.raises(ArgumentError, match="dtype must be a"):
            load(path, half, dtype=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "sparse", "nested", "quantized"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own: quantized tensors are on their way out
def test_tensors_without_arithmetic_are_refused(tmp_path: Path, kind: str, given: bool) -> None:
    weight = torch.rand(3, 4)
    if kind == "sparse":
        weight = weight.to_sparse()
    elif kind == "nested":
        weight = torch.nested.nested_tensor(list(weight))
    elif kind == "quantized":
        weight = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    else:
        weight = weight.to(getattr(torch, kind))
    path = saved({"weight": weight, "bias": torch.zeros(3)}, tmp_path)
    with pytest.raises(WeightError, match=r"'weight' in last.pt is (nested|torch.(float8|sparse|qint8))"):
        load(path, nn.Linear(4, 3) if given else None)


@pytest.mark.parametrize("given", [True, False])
def test_tensors_that_were_never_filled_are_refused(tmp_path: Path, given: bool) -> None:
    path = saved(nn.Linear(4, 3, device="meta").state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"last.pt: 'weight' has a shape and no values"):
        load(path, nn.Linear(4, 3) if given else None)


def test_masks_may_be_infinite_where_weights_may_not(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    path = saved(model.state_dict(), tmp_path)
    assert same(load(path, model).state_dict(), model.state_dict())
    model.weight.data[0, 0] = torch.inf
    with pytest.raises(WeightError, match=r"1 of 4 values of 'weight' in last.pt"):
        load(saved(model.state_dict(), tmp_path), model)
