"""Which channels may go and how many: products of groups meet the share, positions stay, what is held is said."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from micro_models import net
from torch import Tensor, nn
from torch.nn import functional as F

from vfx.api import merge, prune_structured, symmetry, trace
from vfx.pruning.groups import channel_scores
from vfx.pruning.widths import Widths, by_mean
from vfx.resize import RemovalUnits

EXACT = 1e-9


def _x(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


def _pruned(model: nn.Module, x: Tensor, sparsity: float = 0.5, **options: Any) -> Any:
    return prune_structured(model.eval(), x, sparsity=sparsity, normalize=None, progress=False, **options)


class _Nested(nn.Module):
    """Each grouped convolution multiplies the channels: those of the last are products of all groups before."""

    def __init__(self, first: int = 8, factors: tuple[int, ...] = (2, 2, 2)):
        super().__init__()
        widths = [first * int(np.prod(factors[:k], dtype=int)) for k in range(len(factors) + 1)]
        self.i = nn.Conv2d(3, first, 1)
        self.g = nn.ModuleList(nn.Conv2d(a, b, 1, groups=a) for a, b in pairwise(widths))
        self.o, self.h = nn.Conv2d(widths[-1], widths[-1], 1), nn.Linear(widths[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.i(x))
        for layer in self.g:
            x = torch.relu(layer(x))
        return self.h((x + self.o(x)).mean((2, 3)))


@pytest.mark.parametrize("allocation", ["uniform", "global", "isomorphic"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_products_of_groups_meet_the_share(sparsity: float, allocation: str) -> None:
    torch.manual_seed(0)
    result = _pruned(_Nested(), _x(2, 3, 4, 4), sparsity, allocation=allocation)
    left = result.module.get_parameter("h.weight").shape[1] / 64
    if allocation == "uniform":
        assert left == 1 - sparsity
        assert result.report.notes == ()
    else:  # one unit more takes half of all there is behind it
        assert abs(left - (1 - sparsity)) <= 0.13 or any("of the channels stay" in note for note in result.report.notes)
    assert result.report.error <= EXACT


@pytest.mark.parametrize(("units", "left"), [("auto", 48), ("channels", 64), ("blocks", 48), ("both", 48)])
def test_blocks_go_where_the_channels_inside_do_not_allow_the_share(units: str, left: int) -> None:
    torch.manual_seed(0)
    result = _pruned(_Nested(), _x(2, 3, 4, 4), 0.25, units=units)
    assert result.module.get_parameter("h.weight").shape[1] == left
    if units in ("auto", "channels"):
        assert any("instead of 75%" in note for note in result.report.notes) is (units == "channels")


def _heads(self: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (3, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return self.h(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_heads_stay_where_their_channels_meet_the_share(sparsity: float) -> None:
    torch.manual_seed(0)
    result = _pruned(net(_heads, h=nn.Linear(48, 3), **{n: nn.Linear(8, 48) for n in "qkv"}), _x(2, 6, 8), sparsity)
    inner = max(2, int(16 * (1 - sparsity)))
    assert sorted(width.after for width in result.report.widths) == sorted([3, inner, inner])


def test_a_share_that_the_numbers_do_not_allow_is_said() -> None:
    torch.manual_seed(0)
    result = _pruned(_Nested(3, (3,)), _x(2, 3, 4, 4), 0.85, units="channels")
    assert result.module.get_parameter("h.weight").shape[1] == 3
    assert any("stay, 33% instead of 15%" in note for note in result.report.notes)
    assert _pruned(_Nested(4, (2,)), _x(2, 3, 4, 4), 0.5).report.notes == ()


# positions ------------------------------------------------------------------------------------------------------------


def _mixer(fused: bool) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.t(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = s.qkv(x).chunk(3, -1)
        by_hand = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v if not fused else None
        return s.h((F.scaled_dot_product_attention(q, k, v) if fused else by_hand).mean(1))

    return net(forward, t=nn.Linear(6, 6), qkv=nn.Linear(8, 24), h=nn.Linear(8, 3))


def _perceiver(self: Any, x: Tensor) -> Tensor:
    """Latents of their own attend to the tokens."""
    latents = self.latents.expand(x.shape[0], -1, -1)
    y = F.scaled_dot_product_attention(self.q(latents), self.k(x), self.v(x))
    return self.h(torch.relu(self.o(y)).mean(1))


def _token_mixer(self: Any, x: Tensor) -> Tensor:
    """MLP-Mixer: what layers carry along in one block is summed over in the next, and goes."""
    x = self.stem(x)
    x = x + self.b(F.gelu(self.a(x.transpose(1, 2)))).transpose(1, 2)
    return self.h((x + self.d(F.gelu(self.c(x)))).mean(1))


def _widths(result: Any) -> dict[str, tuple[int, int]]:
    return {width.name: (width.before, width.after) for width in result.report.widths}


@pytest.mark.parametrize("fused", [True, False])
def test_tokens_stay_however_attention_is_written(fused: bool) -> None:
    torch.manual_seed(0)
    result = _pruned(_mixer(fused), _x(2, 6, 8))
    assert _widths(result)["t.weight"] == (6, 6)
    assert all(after == before // 2 for name, (before, after) in _widths(result).items() if name != "t.weight")
    assert any("t.weight (6)" in note and "positions" in note for note in result.report.notes)


def test_latents_stay() -> None:
    torch.manual_seed(0)
    linear = {name: nn.Linear(8, 8) for name in "qkvo"}
    model = net(_perceiver, latents=nn.Parameter(torch.randn(1, 5, 8)), h=nn.Linear(8, 3), **linear)
    result = _pruned(model, _x(2, 6, 8))
    assert _widths(result)["latents"] in {(5, 5), (8, 4)}
    assert any("latents (5)" in note for note in result.report.notes)
    assert result.module.get_parameter("latents").shape == (1, 5, 4)


def test_channels_that_other_layers_carry_along_go() -> None:
    torch.manual_seed(0)
    layers = {"stem": (7, 8), "a": (6, 10), "b": (10, 6), "c": (8, 12), "d": (12, 8), "h": (8, 3)}
    model = net(_token_mixer, **{name: nn.Linear(*sizes) for name, sizes in layers.items()})
    result = _pruned(model, _x(2, 6, 7))
    assert sorted(_widths(result).values()) == [(8, 4), (10, 5), (12, 6)]
    assert [note for note in result.report.notes if "positions" in note] == []


# what is held ---------------------------------------------------------------------------------------------------------


def _deformed(self: Any, x: Tensor) -> Tensor:
    h = torch.relu(self.a(x))
    return self.o(torch.relu(torchvision.ops.deform_conv2d(h, self.p(h), self.w, padding=1)).mean((2, 3)))


def test_deformable_convolutions_lose_channels_and_their_offsets_do_not() -> None:
    torch.manual_seed(0)
    a, p, w = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 18, 3, padding=1), nn.Parameter(torch.randn(8, 8, 3, 3))
    model = net(_deformed, a=a, p=p, w=w, o=nn.Linear(8, 3)).eval()
    result = _pruned(model, _x(2, 3, 6, 6))
    assert _widths(result) == {"a.weight": (8, 4), "w": (8, 4)}
    assert result.report.error < 1e-12
    (note,) = [note for note in result.report.notes if "p.weight" in note]
    assert "slides over these positions" in note


@torch.library.custom_op("vfx_tests::reversed_channels", mutates_args=())
def _reversed_channels(x: Tensor) -> Tensor:
    return x.flip(1).clone()


@_reversed_channels.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_operators_of_the_users_own_are_named_in_merges_too() -> None:
    torch.manual_seed(0)
    models = [
        net(lambda s, x: s.c(torch.relu(s.b(_reversed_channels(s.a(x))))), a=nn.Linear(5, 8), b=nn.Linear(8, 6),
            c=nn.Linear(6, 3)).eval()
        for _ in range(2)
    ]  # fmt: skip
    for report in (_pruned(models[0], _x(4, 5)).report, merge(models, _x(4, 5), progress=False).report):
        (note,) = [note for note in report.notes if "no rule" in note]
        assert "reversed_channels" in note
        assert "a.weight" in note


def _states(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.relu(self.a(x))
    return self.c(torch.relu(self.b(h))), h


def test_states_that_are_outputs_are_said_to_stay() -> None:
    torch.manual_seed(0)
    result = _pruned(net(_states, a=nn.Linear(5, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 3)), _x(4, 5))
    assert _widths(result) == {"b.weight": (6, 3)}
    assert [note for note in result.report.notes if "what the network returns" in note and "a.weight" in note]


def test_a_sorted_axis_is_said_to_stay() -> None:
    torch.manual_seed(0)
    model = net(lambda s, x: s.c(s.a(x).sort(1)[0]), a=nn.Linear(5, 8), c=nn.Linear(8, 3))
    result = _pruned(model, _x(4, 5))
    assert _widths(result) == {"a.weight": (8, 8)}
    assert any("a.weight" in note and "cannot go" in note for note in result.report.notes)


def test_a_budget_out_of_reach_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 4), nn.ReLU(), nn.Linear(4, 50))
    result = prune_structured(model.eval(), _x(2, 50), budget={"params": 0.1}, normalize=None, progress=False)
    assert any("budget" in note and "instead of 0.10" in note for note in result.report.notes)


def test_global_shares_count_what_a_factor_takes_with_it() -> None:
    torch.manual_seed(0)
    program = trace(_Nested().eval(), _x(2, 3, 4, 4))
    facts = symmetry(program)
    slots, widths = RemovalUnits(facts), Widths("global")
    streams = widths.streams(slots)
    units = widths.at(streams, by_mean(channel_scores(program, facts)), 0.5)
    left = sum(count * streams.left(made_of, units) for made_of, count in streams.counts.items())
    assert sum(streams.counts.values()) == 16 + 32 + 64
    assert 0.5 * 112 <= left < 112
