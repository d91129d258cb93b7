"""Groups of one small member of each family of networks, proved in float64 with randomised weights.

The convolutional families of torchvision's classification networks are in ``test_symmetry.py``. Attention is counted as
heads + the inside of q and k + the inside of v and output, for each layer; streams and hidden layers come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.maxvit import MaxVit
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.resnet import (
    BasicBlock,
    BasicStem,
    Conv2Plus1D,
    Conv3DNoTemporal,
    Conv3DSimple,
    R2Plus1dStem,
    VideoResNet,
)
from torchvision.models.video.swin_transformer import SwinTransformer3d

from benchmarks.zoo import markdown, measure, networks, passes
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import verify
from vfx.api import trace
from vfx.capture.capture import capture

EXACT = 1e-10


@dataclass(frozen=True)
class Case:
    """A network, the shape of its input, and the groups and channels it must have."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: int
    channels: int


def image(side: int) -> tuple[int, ...]:
    return (2, 3, side, side)


def clip(frames: int, side: int) -> tuple[int, ...]:
    return (2, 3, frames, side, side)


def segmentation(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(zoo.segmentation, name)(weights=None, weights_backbone=None)


def alexnet() -> nn.Module:
    """Of the real one's 61 million parameters 59 are in its classifier."""
    model = zoo.AlexNet(num_classes=9)
    model.classifier[1], model.classifier[4], model.classifier[6] = (
        nn.Linear(256 * 6 * 6, 64), nn.Linear(64, 64), nn.Linear(64, 9)
    )  # fmt: skip
    return model


def fcn() -> nn.Module:
    backbone = zoo.ResNet(Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])
    return FCN(IntermediateLayerGetter(backbone, {"layer4": "out"}), FCNHead(2048, 9))


def video(maker: type | None, stem: type) -> nn.Module:
    """The first layer of each stage of the 18-layer networks; without ``maker`` as in mc3_18."""
    return VideoResNet(BasicBlock, [maker] * 4 if maker else [Conv3DSimple, *[Conv3DNoTemporal] * 3], [1] * 4, stem)


def swin(**options: Any) -> nn.Module:
    return SwinTransformer([4, 4], 24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=9, **options)


def swin_3d() -> nn.Module:
    return SwinTransformer3d([2, 4, 4], 24, depths=[2, 2], num_heads=[2, 4], window_size=[2, 4, 4], num_classes=9)


def vit() -> nn.Module:
    return zoo.VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=9)


def maxvit() -> nn.Module:
    return MaxVit((32, 32), 8, 2, block_channels=[16, 32], block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0)


def mvit(second: bool) -> nn.Module:
    blocks = [
        MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    if second:
        blocks[0].input_channels = 32
    return MViT(
        (32, 32),
        4,
        blocks,
        residual_pool=second,
        residual_with_cls_embed=not second,
        rel_pos_embed=second,
        proj_after_attn=second,
        num_classes=9,
    )


def s3d() -> nn.Module:
    model = zoo.video.S3D(num_classes=9)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # its own window is as large as the last map of a 224-pixel clip
    return model


FAMILIES = [
    Case("alexnet", alexnet, image(64), 7, 1_280),  # 1,152 of convolutions and two hidden layers
    Case("vit", vit, image(32), 9, 310),  # stream 48, twice heads 3, insides 16 and 16, hidden 96
    Case(
        "swin", swin, image(32), 18, 756
    ),  # streams 24 and 48, four blocks of heads, insides 12 and 12, hidden 4·stream
    Case(
        "swin_v2",
        lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        image(32),
        22,
        2_804,  # as swin, and 512 hidden features of each block's position bias
    ),
    # stem 8 and 8; streams 16 and 32, hidden and squeezed 4·stream and stream/4, two attentions each; the head's 32
    Case("maxvit", maxvit, image(32), 25, 760),
    Case("deeplabv3_mobilenet_v3_large", segmentation("deeplabv3_mobilenet_v3_large"), image(64), 36, 9_208),
    Case("fcn", fcn, image(64), 14, 6_336),  # stem, 4 streams, 4 times 2 insides; the head's 512
    Case("lraspp_mobilenet_v3_large", segmentation("lraspp_mobilenet_v3_large"), image(64), 30, 7_544),
    # 4 streams and the inside of 4 blocks; where a convolution is two, what is between them, in the stem too
    Case("mc3", lambda: video(None, BasicStem), clip(4, 32), 8, 1_920),
    Case("r2plus1d", lambda: video(Conv2Plus1D, R2Plus1dStem), clip(4, 32), 17, 5_475),
    Case("r3d", lambda: video(Conv3DSimple, BasicStem), clip(4, 32), 8, 1_920),
    Case("s3d", s3d, clip(8, 48), 77, 10_608),
    Case("mvit_v1", lambda: mvit(False), clip(4, 32), 9, 306),  # streams 16 and 32; insides 16, hidden 64; 2 heads, 128
    Case("mvit_v2", lambda: mvit(True), clip(4, 32), 6, 338),  # q is added to v: one inside a block, 32 and 16
    Case("swin3d", swin_3d, clip(4, 32), 18, 756),  # as swin: the windows' third axis is pinned
]


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_families_of_torchvision(case: Case) -> None:
    torch.manual_seed(0)
    facts = symmetry(trace(case.build(), _random(case.shape)))
    assert (len(facts.groups), facts.channels) == (case.groups, case.channels)
    assert not facts.unknown_ops
    assert all(pin.reason for pin in facts.pinned)
    assert verify(facts) <= EXACT


# other libraries -----------------------------------------------------------------------------------------------------

TIMM = {
    "deit_tiny_patch16_224": ({"img_size": 32, "depth": 2}, 32, 9, 1_990),  # 192, twice 768, 3, 64 and 64
    "xcit_nano_12_p16_224": ({"img_size": 32, "depth": 2}, 32, 20, 2_560),  # 16, 32, 64, 128; 4 times 4, 32, 32, 512
    "mixer_s32_224": ({}, 224, 17, 18_944),  # 512; eight times 256 and 2,048
    "nf_resnet26": ({}, 32, 21, 7_744),  # 64; four streams; twice 64, 128, 256, 512, two each
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    options, side, groups, channels = TIMM[name]
    torch.manual_seed(0)
    facts = symmetry(trace(timm.create_model(name, pretrained=False, **options), _random(image(side))))
    assert (len(facts.groups), facts.channels) == (groups, channels)
    assert not facts.unknown_ops
    assert verify(facts) <= EXACT


# hidden 48, 4 heads of 12, two layers; hidden_states at the output pin the stream
HUGGING_FACE = {
    "bert": (8, 248),
    "gpt2": (9, 488),  # stream; twice heads 4, insides 12 and 12, hidden 192
    "llama": (9, 240),  # rotary embeddings pin the insides of q and k: 2 kv heads of 2 queries, v's inside, hidden 80
    "t5": (19, 540),  # one position bias ties the heads of a stack, one stream for both stacks is an output
    "distilbert": (8, 248),
    "vit": (9, 296),
    "bart": (22, 552),
    "mistral": (9, 240),
    "qwen2": (9, 240),
}


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name: str) -> None:
    torch.manual_seed(0)
    (network,) = (n for n in networks() if (n.source, n.name) == ("huggingface", name))
    facts = symmetry(trace(network.build(), network.inputs()))
    assert (len(facts.groups), facts.channels) == HUGGING_FACE[name]
    assert not facts.unknown_ops
    assert verify(facts) <= EXACT


# functional forms ---------------------------------------------------------------------------------------------------


def _decomposed(model: nn.Module, x: Tensor) -> Symmetry:
    exported = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: Dim("batch", min=1)},))
    return symmetry(capture(exported.run_decompositions({}), x))


@pytest.mark.parametrize(
    ("build", "side", "groups", "channels"),
    [
        (zoo.resnet18, 32, 12, 2_880),
        (vit, 32, 9, 310),
        (swin, 32, 18, 756),
    ],
    ids=["resnet18", "vit", "swin"],
)
def test_decompositions_change_no_group(build: Any, side: int, groups: int, channels: int) -> None:
    torch.manual_seed(0)
    facts = _decomposed(build(), _random(image(side)))
    assert (len(facts.groups), facts.channels) == (groups, channels)
    assert not facts.unknown_ops
    assert verify(facts) <= EXACT


# the benchmark ------------------------------------------------------------------------------------------------------


def test_the_benchmark_names_every_network_once() -> None:
    keys = [(network.source, network.name) for network in networks()]
    assert len(set(keys)) == len(keys)
    counts = {source: sum(s == source for s, _ in keys) for source, _ in keys}
    modules = (zoo, zoo.segmentation, zoo.video)
    assert counts["torchvision"] == sum(len(zoo.list_models(module=module)) for module in modules)
    assert counts["timm"] >= 40
    assert counts["huggingface"] >= 8


def test_the_benchmark_measures_a_network() -> None:
    line = measure(next(network for network in networks() if network.name == "resnet20_bn"))
    assert (line["groups"], line["channels"], line["unknown"]) == (12, 448, {})
    assert passes(line)
    assert line["verify_error"] > 0  # a random map of the classes moves rounding


def test_the_benchmark_reports_what_fails() -> None:
    line = {"groups": 2, "channels": 9, "inside_blocks": 1, "pinned": 3, "reasons": {}, "unknown": {}}
    line |= {
        "capture_seconds": 1.0,
        "inference_seconds": 0.1,
        "verify_error": 1e-14,
        "verify_seconds": 0.1,
        "peak_mib": 300,
    }
    broken = line | {"verify_error": 0.1}
    unknown = line | {"unknown": {"aten.fft_fft.default": 2}}
    failed = {"failure": "CaptureError: a reason"}
    results = {"timm/a": line, "timm/b": broken, "timm/c": unknown, "torchvision/d": failed}
    assert [passes(result) for result in results.values()] == [True, False, False, False]
    text = markdown(results)
    assert "## Classes" not in text  # lines of earlier runs have none
    assert "1 of 4 networks measured pass" in text
    assert "- timm/b: error 1.0e-01" in text
    assert "- timm/c: no rule for aten.fft_fft.default" in text
    assert "- torchvision/d: CaptureError: a reason" in text
    classes = {"kinds": {"permutation": 3, "linear": 4}, "richer_sides": 1, "class_seconds": 0.25}
    table = markdown(results | {"timm/e": line | classes}).partition("## Classes")[2]
    assert "| e | 3 | 0 | 0 | 0 | 0 | 0 | 4 | 0 | 1 | 0.25 |" in table
    assert "| a |" not in table
