"""A network merged with itself is that network, in whatever order passes run; or the order is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import images, network
from micro_models import conv, net
from torch import Tensor, nn
from vfx.passes.align import Align
from vfx.passes.balance_attention import BalanceAttention
from vfx.passes.balance_scales import BalanceScales
from vfx.passes.calibrate_normalization import CalibrateNormalization
from vfx.passes.center_stream import CenterStream
from vfx.passes.duplicate_branches import DuplicateBranches
from vfx.passes.duplicate_heads import DuplicateHeads
from vfx.passes.fold_gain import FoldGain
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.insert_normalization import InsertNormalization
from vfx.passes.interpolate import Interpolate
from vfx.passes.rescale_weights import RescaleWeights
from vfx.passes.reset_batchnorm import ResetBatchNorm
from vfx.passes.transform import Transform
from vfx.passes.untie_weights import UntieWeights

from vfx.analyse.symmetry import symmetry
from vfx.api import trace
from vfx.elements import act, permuted, random_permutations
from vfx.errors import PassError
from vfx.program import Program
from vfx.proof import outputs_error
from vfx.rewrite import Pass

SAME = 1e-8
Make = Callable[[], Pass]


def _convolutional() -> nn.Module:
    layers = [conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5, bias=False), nn.BatchNorm2d(5), nn.ReLU()]
    return nn.Sequential(*layers, conv(5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def _attention(self: nn.Module, x: Tensor) -> Tensor:
    h = self.stem(x)
    q, k, v = self.qkv(self.first(h)).chunk(3, -1)
    h = h + self.proj(F.scaled_dot_product_attention(q, k, v))
    return self.head(h + self.down(torch.relu(self.up(self.second(h)))))


def _transformer() -> nn.Module:
    return net(
        _attention, stem=nn.Linear(5, 6), qkv=nn.Linear(6, 18), proj=nn.Linear(6, 6), first=nn.LayerNorm(6),
        second=nn.LayerNorm(6), up=nn.Linear(6, 7), down=nn.Linear(7, 6), head=nn.Linear(6, 3),
    )  # fmt: skip


CASES = {
    "convolutional": (_convolutional, images(48, 6, dtype=torch.float64)),
    "transformer": (_transformer, torch.randn(48, 4, 5, generator=torch.Generator().manual_seed(1)).double()),
}


def _edge_passes(data: Tensor) -> dict[str, Make]:
    """Passes that act on edges (or on any Program) and leave the function of twins as it is."""
    return {
        "align": lambda: Align("activation", data, progress=False),
        "align by weights": lambda: Align("weight", progress=False),
        "statistics": lambda: Align(None, data, progress=False),
        "zipit": lambda: Align("zipit", data, progress=False),
        "transform": Transform,
        "branches": lambda: DuplicateBranches(1),
        "heads": lambda: DuplicateHeads(1, output="mean"),
        "rescale": RescaleWeights,
    }


def _any_passes() -> dict[str, Make]:
    return {
        "fold BatchNorm": lambda: FoldNormalization(batch_norm=True),
        "balance": BalanceScales,
        "balance attention": BalanceAttention,
        "centre": CenterStream,
        "fold gains": FoldGain,
        "untie": UntieWeights,
    }


def _merged_passes(data: Tensor) -> dict[str, Make]:
    return {
        "insert": InsertNormalization,
        "insert behind": lambda: InsertNormalization(site="activation"),
        "repair": lambda: CalibrateNormalization("repair", data, progress=False),
        "rescale to goals": lambda: CalibrateNormalization("rescale", data, progress=False),
        "fold": FoldNormalization,
        "reset": lambda: ResetBatchNorm(data, progress=False),
    }


def _twins(name: str) -> tuple[Program, Tensor]:
    """Running statistics are those of the data, so that RESET finds what is there."""
    build, data = CASES[name]
    program = trace(network(build, data), data[:2])
    if name == "convolutional":
        program = ResetBatchNorm(data, progress=False)(program)
    weights = program.weights[0]
    return program.with_weights([weights, {key: tensor.clone() for key, tensor in weights.items()}]), data


def _changed(program: Program, passes: Sequence[Pass], data: Tensor) -> float | None:
    """By how much the passes change what the twins compute; None if their order is refused."""
    result = program
    try:
        for one in passes:
            result = one(result)
    except PassError:
        return None
    return outputs_error(program(data), result(data))


@pytest.mark.parametrize("name", CASES)
def test_no_order_of_passes_changes_a_network_merged_with_itself(name: str) -> None:
    program, data = _twins(name)
    choose = random.Random(0)
    before, after = _edge_passes(data) | _any_passes(), _merged_passes(data) | _any_passes()
    accepted = refused = 0
    for _ in range(60):
        first = [(key, before[key]) for key in choose.choices(list(before), k=choose.randint(1, 4))]
        second = [(key, after[key]) for key in choose.choices(list(after), k=choose.randint(1, 5))]
        order = [*first, ("interpolate", Interpolate), *second]
        error = _changed(program, [make() for _, make in order], data)
        accepted, refused = accepted + (error is not None), refused + (error is None)
        assert error is None or error <= SAME, f"{' → '.join(key for key, _ in order)}: {error:.1e}"
    assert min(accepted, refused) >= 15


class SilentFold(FoldNormalization):
    """A broken pass: it folds BatchNorms and does not say that layers give something else behind it."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.changes_values = False


def _repair(data: Tensor) -> list[Pass]:
    return [Interpolate(), *(make() for key, make in _merged_passes(data).items() if key in ("insert", "repair"))]


def test_a_pass_that_does_not_say_that_values_change_leaves_stale_statistics() -> None:
    """The control: what the declaration is there for."""
    program, data = _twins("convolutional")
    fold, align = FoldNormalization(batch_norm=True), Align("activation", data, progress=False)
    with pytest.raises(PassError, match=r"FoldNormalization changes values .* run it before Align"):
        fold(align(program))
    assert _changed(program, [align, SilentFold(), *_repair(data)], data) > 1e-2
    assert _changed(program, [fold, align, *_repair(data)], data) <= SAME


def test_a_merged_network_gives_stale_statistics_up_with_a_note() -> None:
    program, data = _twins("convolutional")
    merged = Interpolate()(Align(None, data, progress=False)(program))
    folded = FoldNormalization(batch_norm=True)(merged)
    assert merged.goals
    assert not folded.goals
    assert "FoldNormalization: the statistics known of the layers are those of before" in folded.notes[-1]
    assert FoldNormalization()(merged).goals == merged.goals


def test_statistics_of_an_earlier_alignment_follow_a_later_one() -> None:
    program, data = _twins("convolutional")
    facts = symmetry(program)
    element = random_permutations(facts.groups, np.random.default_rng(0))
    moved = program.with_weights([program.weights[0], act(facts, permuted(element), program.weights[0])])
    aligned = Align("weight", progress=False)(Align(None, data, progress=False)(moved))
    expected = Align("weight", data, progress=False)(moved)
    for name, goal in expected.goals.items():
        torch.testing.assert_close(aligned.goals[name].mean, goal.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(aligned.goals[name].std, goal.std, rtol=0, atol=1e-12)
    assert _changed(moved, [Align(None, data, progress=False), Align("weight"), *_repair(data)], data) <= SAME


@pytest.mark.parametrize("make", [UntieWeights, BalanceScales, lambda: FoldNormalization(True), Interpolate])
def test_maps_that_wait_are_put_into_the_weights_first(make: Make) -> None:
    program, data = _twins("convolutional")
    plain = FoldNormalization(batch_norm=True)(program)
    waiting = Align("zipit", data, progress=False)(plain)
    assert waiting.transport is not None
    with pytest.raises(PassError, match="run Transform before"):
        make()(waiting)


def test_what_was_kept_for_each_edge_is_not_kept_again() -> None:
    program, _ = _twins("convolutional")
    with pytest.raises(PassError, match="before DuplicateHeads"):
        DuplicateBranches(1)(DuplicateHeads(1)(program))
    with pytest.raises(PassError, match="DuplicateHeads acts once"):
        DuplicateHeads(1)(DuplicateHeads(1)(program))
