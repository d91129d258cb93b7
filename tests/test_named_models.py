"""Models as the command line names them, what they take, and one clear line where they cannot be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vfx.address import address
from vfx.errors import ArgumentError
from vfx.models.named import build, usual_inputs


def test_addresses_come_apart() -> None:
    found = address("vfx:vgg16_bn?width=0.25&norm=none&flag=true")
    assert (found.name, found.where) == ("vfx", "vgg16_bn")
    assert found.options == {"width": 0.25, "norm": "none", "flag": True}
    assert address("folder:/a:b").where == "/a:b"
    with pytest.raises(ArgumentError, match="must be key=value"):
        address("digits?size")


def test_every_family_builds_a_network_without_weights(tmp_path: Path) -> None:
    small = build("vfx:vgg11_bn?width=0.125", {"in_channels": 1})
    assert small(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert not small.training
    assert build("torchvision:resnet18?num_classes=7").fc.out_features == 7
    assert build("torchvision.models:resnet18", {"num_classes": 7}).fc.out_features == 7
    assert usual_inputs("torchvision:resnet18") == ["3x224x224"]
    file = tmp_path / "mine.py"
    file.write_text("from beside import Net\n\ndef make(width=3):\n    return Net(width)\n")
    file.with_name("beside.py").write_text(
        "from torch import nn\n\n"
        "class Net(nn.Linear):\n    def __init__(self, width):\n        super().__init__(width, 2)\n"
    )
    assert build(f"{file}:make?width=5").in_features == 5


def test_modules_of_the_working_folder_stand_behind_installed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_networks.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(3, 2)\n")
    (tmp_path / "timm.py").write_text("1 / 0\n")
    assert build("my_networks:make").in_features == 3
    pytest.importorskip("timm")
    assert build("timm:resnet18?num_classes=3").num_classes == 3
    assert usual_inputs("timm:resnet18") == ["3x224x224"]


def test_hugging_face_directories_are_local(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    network = build(f"hf:{tmp_path}/bert")
    assert type(network).__name__ == "BertForSequenceClassification"
    assert usual_inputs(f"hf:{tmp_path}/bert") == ["input_ids=16:50"]
    with pytest.raises(ArgumentError, match="only local directories"):
        build("hf:bert-base-uncased")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text('{"model_type": "bert", "architectures": ["MyOwn"]}')
    with pytest.raises(ArgumentError, match="names MyOwn, which transformers does not have"):
        build(f"hf:{tmp_path}/none")


def test_backbones_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", refused)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refused)
    assert build("torchvision:lraspp_mobilenet_v3_large?num_classes=3")
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    with pytest.raises(AssertionError, match="a download"):  # the control: what its constructor does by default
        lraspp_mobilenet_v3_large(weights=None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", "must be one of torchvision:…, timm:…, hf:…, vfx:…, module:name"),
        ("torchvision:", "names no network"),
        ("torchvision:resnet19", "cannot be built: ValueError"),
        ("torchvision:resnet18?weights=DEFAULT", "not downloaded here"),
        ("timm:resnet18?pretrained=true", "not downloaded here"),
        ("timm:resnet1888", "timm has no model 'resnet1888', but"),
        ("vfx:vgg99", "vfx has no model 'vgg99'; it has vgg11"),
        ("vfx:vgg11?height=3", "cannot be built: TypeError"),
        ("no_such_module:make", "cannot be imported: ModuleNotFoundError"),
        ("torch:tensor_of_nothing", "torch has no 'tensor_of_nothing'"),
        ("builtins:dict", "gave dict, not a torch.nn.Module"),
        ("./none.py:make", r"there is no file none\.py"),
    ],
)
def test_what_cannot_be_built_says_so_in_one_line(model: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as refusal:
        build(model)
    assert "\n" not in str(refusal.value)


def test_inputs_that_nobody_knows_are_asked_for() -> None:
    for model in ("vfx:vgg11", "torch.nn:Linear", "torchvision:raft_small"):
        with pytest.raises(ArgumentError, match="--input is missing"):
            usual_inputs(model)
