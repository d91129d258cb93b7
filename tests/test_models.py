"""The papers' networks: sizes, names, initialisation, and a training loop that repeats itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfx.analyse.verify import verify
from vfx.api import symmetry, trace
from vfx.data import digits, text
from vfx.data.text import CHARACTERS
from vfx.models import (
    MODELS,
    LayerNorm2d,
    Training,
    accuracy,
    fit,
    gpt_tiny,
    linear_net,
    predict,
    resnet20_fixup,
    vgg16,
)
from vfx.models.resnet20 import FixupBlock, PlainResNet
from vfx.models.training import SCHEDULES, _rate, augment

IMAGE_MODELS = sorted(set(MODELS) - {"gpt_tiny", "linear_net"})

# 3×32×32 images, 10 classes. VGG16, VGG16-BN and ResNet20: Vanishing Feature tables; the others by hand.
PARAMETERS = {
    "vgg11": 9_225_610,
    "vgg16": 14_719_818,
    "vgg16_bn": 14_728_266,
    "vgg16_ln": 14_728_266,
    "vgg19": 20_029_514,
    "resnet20": 272_474,
    "resnet20_bn": 272_474,
    "resnet20_ln": 272_474,
    "resnet20_plain": 272_474 - 2 * 784 + 784,  # every norm's scale and shift gives way to one bias
    "resnet20_fixup": 272_474 - 2 * 784 + 9 * 5 + 2,
    "resnet32": 466_906,
    # patches, positions, 6 blocks of (norm, qkv, projection, norm, up, down), norm, head
    "vit_tiny": 49 * 192 + 64 * 192 + 6 * (4 * 192 + 193 * (3 + 1 + 4) * 192 + 769 * 192) + 2 * 192 + 1930,
    # characters, positions, 4 blocks as in the ViT, norm, head without bias
    "gpt_tiny": (96 + 64) * 128 + 4 * (4 * 128 + 129 * (3 + 1 + 4) * 128 + 513 * 128) + 2 * 128 + 96 * 128,
    "linear_net": 785 * 32 + 6 * 33 * 32 + 330,
}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name: str, count: int) -> None:
    assert _count(MODELS[name]()) == count


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_output_shape_at_odd_widths_and_classes(name: str) -> None:
    model = MODELS[name](width=0.07, in_channels=2, num_classes=7).eval()
    assert model(torch.randn(3, 2, 32, 32)).shape == (3, 7)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_width_never_rounds_to_nothing(name: str) -> None:
    model = MODELS[name](width=1e-6, in_channels=1)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {m.out_channels for m in convs} == {3 if name == "vit_tiny" else 1}  # a channel for each head
    assert model.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_vgg16_has_the_rows_of_table_12() -> None:
    model = vgg16(width=0.1)
    kinds = [type(m).__name__ for m in model.features]
    assert len(kinds) == 30
    assert [i for i, kind in enumerate(kinds) if kind == "MaxPool2d"] == [4, 9, 16, 23]
    assert kinds[0] == "Conv2d"
    assert kinds[28:] == ["Conv2d", "ReLU"]
    assert [name for name, _ in model.named_children()] == ["features", "avgpool", "classifier"]
    assert model.avgpool(model.features(torch.randn(1, 3, 32, 32))).shape[2:] == (1, 1)


@pytest.mark.parametrize("suffix", ["bn", "ln"])
def test_vgg_norm_stands_between_convolution_and_relu(suffix: str) -> None:
    features = list(MODELS[f"vgg11_{suffix}"](width=0.1).features)
    norm = {"bn": nn.BatchNorm2d, "ln": LayerNorm2d}[suffix]
    for position, module in enumerate(features):
        if isinstance(module, nn.Conv2d):
            assert isinstance(features[position + 1], norm)
            assert isinstance(features[position + 2], nn.ReLU)


def test_resnet20_state_names() -> None:
    names = {name.rsplit(".", 1)[0] for name in MODELS["resnet20"](width=0.25).state_dict()}
    blocks = {f"layer{s}.{b}.{m}" for s in (1, 2, 3) for b in range(3) for m in ("conv1", "bn1", "conv2", "bn2")}
    shortcuts = {f"layer{s}.0.shortcut.{i}" for s in (2, 3) for i in (0, 1)}
    assert names == {"conv1", "bn1", "fc"} | blocks | shortcuts


def test_resnet_rejects_a_depth_without_equal_stages() -> None:
    with pytest.raises(ValueError, match="depth=21"):
        PlainResNet(21, 1.0, 3, 10)


def test_vgg_initialisation_statistics() -> None:
    torch.manual_seed(0)
    model = vgg16()
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            # A sample deviation scatters by 1/sqrt(2n); five of those.
            tolerance = 5 / (2 * module.weight.numel()) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=tolerance)
            assert not module.bias.any()
    head = model.classifier[0]
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.bias.any()


def test_layernorm_networks_keep_the_default_initialisation() -> None:
    torch.manual_seed(0)
    conv = MODELS["vgg16_ln"](width=0.25).features[3]
    bound = (conv.in_channels * 9) ** -0.5
    assert bound * 0.98 < conv.weight.abs().max().item() <= bound
    assert conv.bias.any()


def test_layernorm_equals_the_formula_at_each_pixel() -> None:
    norm = LayerNorm2d(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 + 2 * torch.randn(2, 6, 4, 5, dtype=torch.float64)
    deviation = (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = (x - x.mean(1, keepdim=True)) / deviation * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_layernorm_equals_pytorch_on_permuted_channels() -> None:
    norm, reference = LayerNorm2d(6), nn.LayerNorm(6)
    x = torch.randn(2, 6, 4, 5)
    assert torch.equal(norm(x), reference(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_fixup_branches_start_at_zero_and_logits_too() -> None:
    torch.manual_seed(0)
    model = resnet20_fixup(width=0.5)
    blocks = [m for m in model.modules() if isinstance(m, FixupBlock)]
    assert len(blocks) == 9
    for block in blocks:
        assert not block.branch(torch.randn(2, block.conv1.in_channels, 8, 8)).any()
    assert not model(torch.randn(2, 3, 32, 32)).any()


def test_fixup_scales_the_first_convolution_by_the_number_of_blocks() -> None:
    torch.manual_seed(0)
    for name, blocks in (("resnet20_fixup", 9), ("resnet32_fixup", 15)):
        weight = MODELS[name]().layer3[1].conv1.weight
        assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5 * blocks**-0.5, rel=0.02)


def test_linear_net_is_affine_and_its_residuals_are_inner() -> None:
    torch.manual_seed(0)
    net = linear_net(depth=5, width=6, in_features=12, num_classes=3, residual=True).double()
    x, y = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(net(x + y) + net(0 * x), net(x) + net(y), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for layer in net.layers[1:-1]:
            layer.weight.zero_()
            layer.bias.zero_()
    skipped = net.layers[-1](net.layers[0](x.flatten(1)))
    assert torch.equal(net(x), skipped)


def _gpt(tied: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = gpt_tiny(width=0.125, vocabulary=11, context=8, depth=2, tied=tied).double().eval()
    return model, torch.randint(0, 11, (3, 8))


@pytest.mark.parametrize("length", [8, 5])
def test_gpt_looks_at_no_later_token(length: int) -> None:
    model, tokens = _gpt()
    tokens = tokens[:, :length]
    logits = model(tokens)
    assert logits.shape == (3, length, 11)
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] + 1) % 11
    assert torch.equal(model(changed)[:, :3], logits[:, :3])
    assert ((model(changed) - logits).abs().amax((0, 2))[3:] > 0).all()


@pytest.mark.parametrize("tied", [False, True])
def test_gpt_is_captured_and_its_symmetry_proved(tied: bool) -> None:
    model, tokens = _gpt(tied)
    program = trace(model, tokens)
    torch.testing.assert_close(program(tokens), model(tokens), rtol=1e-12, atol=1e-12)
    facts = symmetry(program)
    # the stream, and in each of two blocks the heads, their queries, their values, and the hidden channels
    assert len(facts.groups) == 1 + 2 * 4
    assert verify(facts) <= 1e-10
    assert (model.head.weight is model.token.weight) is tied


def test_gpt_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    model = gpt_tiny()
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.ndim > 1}
    for name, std in stds.items():
        added = name.endswith(("proj.weight", "down.weight"))
        assert std == pytest.approx(0.02 / 8**0.5 if added else 0.02, rel=0.05), name
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_text_is_its_own_continuation_and_the_held_out_part_is_unseen() -> None:
    train_x, train_y, test_x, test_y = text(context=32, stride=8)
    for x, y in ((train_x, train_y), (test_x, test_y)):
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (len(x), 32)
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert 0 <= int(x.min()) <= int(x.max()) < len(CHARACTERS) == 96
    assert torch.equal(train_x[1:, :24], train_x[:-1, 8:])  # windows overlap in training,
    assert torch.equal(test_x[1:, 0], test_y[:-1, -1])  # and follow each other behind it
    covered = 8 * (len(train_x) - 1) + 33, 32 * len(test_x) + 1
    assert covered[1] / sum(covered) == pytest.approx(0.1, abs=1e-3)
    assert 'full details of "yield"' in "".join(CHARACTERS[code] for code in test_x.flatten())


def test_fit_learns_sequences() -> None:
    """Each token is followed by its successor: a network that looks at one token alone can learn it."""
    tokens = (torch.arange(8) + torch.arange(64)[:, None]) % 5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 16), nn.Linear(16, 5))
    data = tokens[:, :-1], tokens[:, 1:]
    before = accuracy(model, *data)
    fit(model, *data, Training(epochs=40, lr=0.05, adam=True, augment=False), progress=False)
    assert before < 0.9
    assert accuracy(model, *data) == 1


def _tiny() -> tuple[nn.Module, Tensor, Tensor]:
    """Three classes told apart by the brightest third of a noisy 1×9×9 image."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(120) % 3
    images = torch.randn(120, 1, 9, 9, generator=generator)
    for image, label in zip(images, labels):
        image[0, 3 * label : 3 * label + 3] += 2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 3))
    return model, images, labels


def _trained(**options: int) -> tuple[nn.Module, Tensor, Tensor]:
    model, images, labels = _tiny()
    fit(model, images, labels, Training(epochs=4, lr=0.05, batch_size=32, shift=1, **options), progress=False)
    return model, images, labels


def test_fit_lowers_the_loss_and_learns() -> None:
    model, images, labels = _tiny()
    before = F.cross_entropy(predict(model, images), labels)
    model, images, labels = _trained()
    assert not model.training
    assert F.cross_entropy(predict(model, images), labels) < 0.5 * before
    assert accuracy(model, images, labels) > 0.9


def test_fit_repeats_itself_bit_for_bit_and_the_seed_matters() -> None:
    first, _, _ = _trained(seed=3)
    torch.rand(5)  # the global generator must not matter
    again, other = _trained(seed=3)[0], _trained(seed=4)[0]
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first[0].weight, other[0].weight)


def test_fit_refuses_what_it_cannot_train() -> None:
    model, images, labels = _tiny()
    with pytest.raises(ValueError, match="119 labels"):
        fit(model, images, labels[1:], Training(epochs=1, lr=0.1))
    with pytest.raises(ValueError, match="augment=False"):
        fit(model, images.flatten(1), labels, Training(epochs=1, lr=0.1))
    with pytest.raises(FloatingPointError, match="epoch 1"):
        fit(model, images * float("inf"), labels, Training(epochs=1, lr=0.1), progress=False)


def test_rate_rises_then_falls_to_zero() -> None:
    rates = [_rate(step, 100, 0.1) for step in range(101)]
    assert rates[9] == rates[10] == 1
    assert rates[0] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == 0
    assert _rate(0, 10, 0.0) == 1


def test_schedules_fall_as_they_say() -> None:
    at = {name: [_rate(step, 100, 0.0, name) for step in (0, 49, 50, 74, 75, 100)] for name in SCHEDULES}
    assert at["step"] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert at["constant"] == [1] * 6
    assert at["cosine"][0] == 1
    assert at["cosine"][2] == pytest.approx(0.5)
    assert at["cosine"][-1] == pytest.approx(0)


def test_fit_refuses_an_unknown_schedule_and_trains_in_another_precision() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 2
    images[labels == 1] += 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ValueError, match="linear, cosine, step, constant"):
        Training(epochs=1, lr=0.1, schedule="sudden")
    fit(model, images, labels, Training(epochs=20, lr=0.1, precision=torch.bfloat16, augment=False), progress=False)
    assert accuracy(model, images, labels) == 1
    assert next(model.parameters()).dtype == torch.float32


def test_augment_shifts_within_bounds_and_repeats_the_border() -> None:
    image = torch.arange(25.0).view(1, 1, 5, 5).repeat(200, 2, 1, 1)
    moved = augment(image, 1, False, torch.Generator().manual_seed(0))
    assert moved.shape == image.shape
    # The centre pixel of a shifted image tells the shift: all nine occur.
    assert set(moved[:, 0, 2, 2].tolist()) == {float(5 * r + c) for r in (1, 2, 3) for c in (1, 2, 3)}
    padded = F.pad(image[:1, :1], (1, 1, 1, 1), mode="replicate")
    crops = [padded[0, 0, r : r + 5, c : c + 5] for r in range(3) for c in range(3)]
    assert all(any(torch.equal(m[0], crop) for crop in crops) for m in moved)


def test_augment_mirrors_about_half_of_the_images() -> None:
    image = torch.arange(4.0).view(1, 1, 1, 4).repeat(400, 1, 1, 1)
    mirrored = (augment(image, 0, True, torch.Generator().manual_seed(0)) == image.flip(3)).all(dim=(1, 2, 3))
    assert 160 < int(mirrored.sum()) < 240
    assert torch.equal(augment(image, 0, False, torch.Generator()), image)


@pytest.mark.parametrize("training", [True, False])
def test_predict_restores_the_mode_and_agrees_across_batches(training: bool) -> None:
    model, images, labels = _tiny()
    model.train(training)
    logits = predict(model, images, batch_size=50)
    assert model.training is training
    assert not logits.requires_grad
    torch.testing.assert_close(logits, predict(model, images, batch_size=120), rtol=1e-5, atol=1e-6)
    assert accuracy(model, images, labels) == (logits.argmax(1) == labels).double().mean().item()


def test_digits_split() -> None:
    train_x, train_y, test_x, test_y = digits(size=16)
    assert train_x.shape == (1297, 1, 16, 16)
    assert test_x.shape == (500, 1, 16, 16)
    assert train_x.dtype == torch.float32
    assert train_y.dtype == torch.int64
    assert abs(train_x.mean().item()) < 1e-4
    assert train_x.std().item() == pytest.approx(1, abs=1e-4)
    share = train_y.bincount() / len(train_y) - test_y.bincount() / len(test_y)
    assert share.abs().max().item() < 0.002


def test_digits_split_is_fixed_by_the_seed() -> None:
    assert torch.equal(digits(8)[0], digits(8)[0])
    assert not torch.equal(digits(8)[1], digits(8, seed=1)[1])
