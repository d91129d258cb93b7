"""Weights in several files: read by their index or directory, refused where a file lacks something, written whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vfx
from vfx.emit.provenance import digests
from vfx.emit.sharding import read_tensors, write_tensors
from vfx.errors import ArgumentError, CheckpointError

INDEX = "model.safetensors.index.json"


def _network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def _sharded(folder: Path, network: nn.Module, suffix: str = ".safetensors", split: int = 2) -> Path:
    """A network's state dict in two files, the first ``split`` tensors apart, with the index that names them."""
    folder.mkdir(exist_ok=True)
    state = list(network.state_dict().items())
    save: Callable[[dict[str, Tensor], Path], None] = save_file if suffix == ".safetensors" else torch.save
    files = {}
    for number, part in enumerate((dict(state[:split]), dict(state[split:])), 1):
        name = f"model-{number:05}-of-00002{suffix}"
        save(part, folder / name)
        files |= dict.fromkeys(part, name)
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_shards_are_the_network_that_was_cut(suffix: str, by_folder: bool, tmp_path: Path) -> None:
    network = _network()
    index = _sharded(tmp_path / "net", network, suffix)
    read = vfx.load(index.parent if by_folder else index, _network(1))
    assert all(torch.equal(x, read.state_dict()[name]) for name, x in network.state_dict().items())
    assert vfx.load(index).keys() == network.state_dict().keys()


def test_networks_in_shards_are_merged(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        _sharded(folder, _network(seed))
    x = torch.randn(4, 6)
    merged = vfx.merge(vfx.load(folders, _network()), x, progress=False)
    expected = vfx.merge([_network(0), _network(1)], x, progress=False)
    assert torch.equal(merged(x), expected(x))
    assert [entry["file"] for entry in digests(folders[:1])] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def _without_file(index: Path) -> None:
    index.with_name("model-00002-of-00002.safetensors").unlink()


def _without_tensor(index: Path) -> None:
    save_file({"other": torch.zeros(1)}, index.with_name("model-00002-of-00002.safetensors"))


def _twice(index: Path) -> None:
    save_file(_network().state_dict(), index.with_name("model-00002-of-00002.safetensors"))


def _outside(index: Path) -> None:
    index.write_text(json.dumps({"weight_map": {"0.weight": "../../secret.safetensors"}}))


def _foreign(index: Path) -> None:
    index.write_text(json.dumps({"weight_map": {"0.weight": "weights.h5"}}))
    index.with_name("weights.h5").write_bytes(b"\x01\x02\x03\xff")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_file, "there is no file .*model-00002"),
        (_without_tensor, r"lack 2.weight \(model-00002-of-00002.safetensors\)"),
        (_twice, "both hold 0.bias, 0.weight"),
        (_outside, "names ../../secret.safetensors, which is no file beside it"),
        (_foreign, "names weights.h5: cannot read that"),
        (lambda index: index.write_text('{"weight_map": {}}'), "it has no weight_map"),
        (lambda index: index.write_text("{"), "is no index of weights"),
    ],
    ids=["file", "tensor", "twice", "outside", "foreign", "empty", "damaged"],
)
def test_damage_is_named(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    index = _sharded(tmp_path / "net", _network())
    damage(index)
    with pytest.raises(CheckpointError, match=said):
        vfx.load(tmp_path / "net", _network())


def test_pickled_shards_hold_tensors_alone(tmp_path: Path) -> None:
    index = _sharded(tmp_path / "net", _network(), ".bin")
    torch.save({"epoch": 3, "state": {}}, index.with_name("model-00002-of-00002.bin"))
    with pytest.raises(CheckpointError, match="more than tensors"):
        vfx.load(index)


@pytest.mark.parametrize("most", [1, 130, 10_000])
def test_what_is_written_in_shards_is_read_again(most: int, tmp_path: Path) -> None:
    path, state = tmp_path / "model.safetensors", _network().state_dict()
    write_tensors(path, state, {"vfx": "{}"}, most)
    read = read_tensors(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(x, read[name]) for name, x in state.items())
    files = [file for file in tmp_path.iterdir() if file.suffix == ".safetensors"]
    assert len(files) == {1: 4, 130: 3, 10_000: 1}[most]  # tensors of 192, 32, 96 and 12 bytes
    held = [sum(x.nbytes for x in vfx.load(file).values()) for file in files]
    assert all(size <= most or len(vfx.load(file)) == 1 for file, size in zip(files, held))


def test_one_network_takes_the_place_of_another_whatever_they_are_written_as(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "model-0123.safetensors").write_bytes(b"the user's own")
    for seed, most in enumerate((1, 200, None, 1, 1)):
        state = _network(seed).state_dict()
        write_tensors(path, state, {}, most)
        assert torch.equal(read_tensors(path)["0.weight"], state["0.weight"])
        left = {file.name for file in tmp_path.iterdir()} - {"model-0123.safetensors"}
        named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values()) if most else set()
        assert left == ({INDEX, *named} if most else {"model.safetensors"})


def test_a_saved_network_comes_back_from_its_shards(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    result = vfx.prune_structured(_network(), x, sparsity=0.5, normalize=None, progress=False)
    vfx.save_pretrained(result, tmp_path, shard_size=64)
    assert (tmp_path / INDEX).is_file()
    again = vfx.from_pretrained(tmp_path, model=_network)
    with torch.no_grad():
        assert torch.equal(again(x), result(x))
    with pytest.raises(ArgumentError, match="shard_size must be at least one byte, got 0"):
        vfx.save_pretrained(result, tmp_path, shard_size=0)
