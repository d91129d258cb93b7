"""A fine-tuning's change in another network's frame: exact for copies of every kind, another function without maps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, network
from micro_models import conv, net
from safetensors.torch import save_file
from test_combine import fine_tuned
from torch import Tensor, nn

from vfx.api import symmetry, trace, transfer
from vfx.elements import act, random_element
from vfx.errors import ArchitectureError, ArgumentError

PICTURES = images(16, 8, dtype=torch.float64)
TOKENS = torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SAME = 1e-8


def _convolutional() -> nn.Module:
    layers = [conv(3, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 6, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 64, 4))


def _residual() -> nn.Module:
    return net(
        lambda self, x: self.head((h := self.stem(x).relu()) + self.down(self.up(h).relu())),
        stem=nn.Linear(6, 7), up=nn.Linear(7, 9), down=nn.Linear(9, 7), head=nn.Linear(7, 3),
    )  # fmt: skip


def _attention() -> nn.Module:
    """A stream with RMSNorms without gain, which turns as a whole; heads of attention; GELU."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (
            layer(F.rms_norm(h, (8,))).unflatten(2, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(F.rms_norm(h, (8,)))))
        return self.head(F.rms_norm(h, (8,)))

    sizes = {"embed": (6, 8), "q": (8, 6), "k": (8, 6), "v": (8, 6), "out": (6, 8), "up": (8, 10), "down": (10, 8)}
    return net(forward, head=nn.Linear(8, 3), **{name: nn.Linear(*size) for name, size in sizes.items()})


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolutional": (_convolutional, PICTURES),
    "residual": (_residual, TOKENS),
    "attention": (_attention, TOKENS),
}


def _copy(
    model: nn.Module, x: Tensor, classes: str, seed: int = 3
) -> tuple[nn.Module, Callable[..., dict[str, Tensor]]]:
    """The network behind a random element of its groups' classes, and what that does to weights."""
    facts = symmetry(trace(model, x[:2]))
    element = random_element(facts, np.random.default_rng(seed), classes)
    twin = copy.deepcopy(model)
    twin.load_state_dict(act(facts, element, model.state_dict()))
    return twin.eval(), lambda weights: act(facts, element, weights)


@pytest.mark.parametrize("classes", ["permutation", "full"])
@pytest.mark.parametrize("name", CASES)
def test_a_change_moved_to_a_copy_is_the_fine_tuned_function(name: str, classes: str) -> None:
    build, x = CASES[name]
    start = network(build, x)
    (tuned,) = fine_tuned(start, 1, by=0.3)
    twin, moved = _copy(start, x, classes)
    close(twin(x), start(x), SAME)
    result = transfer(tuned, start, twin, x[:2], classes=classes)
    assert type(result.module) is type(start)
    close(result(x), tuned(x), SAME)
    if classes == "permutation":
        for key, expected in moved(tuned.state_dict()).items():
            close(result.state_dict()[key], expected, 1e-12)
    without = transfer(tuned, start, twin, x[:2], match=None)
    assert (without(x) - tuned(x)).norm() > 0.03 * tuned(x).norm(), "the control: no maps, another function"


@pytest.mark.parametrize("name", CASES)
def test_by_activations_the_same(name: str) -> None:
    build, x = CASES[name]
    start = network(build, x)
    (tuned,) = fine_tuned(start, 1, by=0.3)
    twin, _ = _copy(start, x, "permutation")
    result = transfer(tuned, start, twin, x[:2], data=x, classes="permutation", max_samples=16)
    close(result(x), tuned(x), SAME)


def test_a_change_alone_a_state_dict_and_a_file_do_as_the_network(tmp_path: Path) -> None:
    start = network(_residual, TOKENS)
    (tuned,) = fine_tuned(start, 1)
    twin, _ = _copy(start, TOKENS, "permutation")
    before, after = start.state_dict(), tuned.state_dict()
    save_file(after, tmp_path / "tuned.safetensors")
    expected = transfer(tuned, start, twin, TOKENS[:2]).state_dict()
    for source in (after, tmp_path / "tuned.safetensors"):
        for key, found in transfer(source, start, twin, TOKENS[:2]).state_dict().items():
            assert torch.equal(found, expected[key])
    change = {key: after[key] - before[key] for key in after}
    for key, found in transfer(change, start, twin, TOKENS[:2], difference=True).state_dict().items():
        close(found, expected[key], 1e-12)
    part = {"up.weight": change["up.weight"]}
    partly = transfer(part, start, twin, TOKENS[:2], difference=True).state_dict()
    assert {key for key in partly if not torch.equal(partly[key], twin.state_dict()[key])} == {"up.weight"}


def test_the_change_is_scaled_and_added_to_a_network_of_its_own() -> None:
    start, other = edges(_residual, TOKENS, 2)
    (tuned,) = fine_tuned(start, 1)
    before = {key: own.clone() for key, own in other.state_dict().items()}
    one, half, none = (transfer(tuned, start, other, TOKENS[:2], scale=scale).state_dict() for scale in (1, 0.5, 0))
    for key, own in before.items():
        close(half[key] - own, (one[key] - own) / 2, 1e-10)
        assert torch.equal(none[key], own)
        assert torch.equal(other.state_dict()[key], own), "networks are left as they are"
    assert "was moved between networks that differ by" in transfer(tuned, start, other, TOKENS[:2]).report.outcome


def test_variances_stay_positive_and_counters_are_those_of_the_other_network() -> None:
    start, other = edges(_convolutional, PICTURES, 2)
    (tuned,) = fine_tuned(start, 1)
    with torch.no_grad():
        tuned[1].running_var.mul_(0.01)  # type: ignore[index, operator]
        other[1].running_var.mul_(0.1)  # type: ignore[index, operator]
    found = transfer(tuned, start, other, PICTURES[:2], match=None).state_dict()
    states = (tuned.state_dict(), start.state_dict(), other.state_dict(), found)
    new, old, first, last = (own["1.running_var"] for own in states)
    close(last, first * new / old, 1e-12)
    assert (found["1.running_var"] > 0).all()
    assert torch.equal(found["1.num_batches_tracked"], other.state_dict()["1.num_batches_tracked"])


def test_what_does_not_go_together_is_refused() -> None:
    start, other = edges(_residual, TOKENS, 2)
    state = start.state_dict()
    with pytest.raises(ArchitectureError, match=r"tuned= lacks 'up.weight'.*difference=True"):
        transfer({k: x for k, x in state.items() if k != "up.weight"}, start, other, TOKENS[:2])
    with pytest.raises(ArchitectureError, match="tuned= holds 'x', which is no tensor of the networks"):
        transfer({**start.state_dict(), "x": torch.zeros(1)}, start, other, TOKENS[:2], difference=True)
    with pytest.raises(ArgumentError, match="finds maps that change functions"):
        transfer(start, start, other, TOKENS[:2], match="zipit", data=TOKENS)
    with pytest.raises(ArgumentError, match="give data="):
        transfer(start, start, other, TOKENS[:2], match="activation")
    with pytest.raises(ArgumentError, match="tuned= is a network, a state dict or the path"):
        transfer(3, start, other, TOKENS[:2])
