"""Experts whose hidden channels have an order of their own in each: found, proved, matched, merged, pruned."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from micro_models import net
from torch import Tensor, nn
from transformers.integrations import moe  # noqa: F401  (registers its product)

from vfx.analyse.symmetry import Symmetry
from vfx.analyse.verify import verify
from vfx.api import merge, prune_structured, symmetry, trace

EXPERTS, STREAM, HIDDEN = 4, 10, 8
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def _letters(self: Any, h: Tensor, share: Tensor) -> Tensor:
    hidden = F.gelu(torch.einsum("td,edh->eth", h, self.up) + self.bias[:, None])
    return torch.einsum("etd,te->td", torch.einsum("eth,ehd->etd", hidden, self.down), share)


def _matrices(self: Any, h: Tensor, share: Tensor) -> Tensor:
    hidden = F.gelu(torch.bmm(h[None].expand(EXPERTS, -1, -1), self.up))
    return (torch.bmm(hidden, self.down) * share.T[..., None]).sum(0)


def _looked_up(self: Any, h: Tensor, share: Tensor, act: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    """Two experts for each row, by their numbers (rows, 2)."""
    values, numbers = share.topk(2, -1)
    hidden = act(torch.einsum("td,tkdh->tkh", h, self.up[numbers]) + self.bias[numbers])
    return (torch.einsum("tkh,tkhd->tkd", hidden, self.down[numbers]) * values[..., None]).sum(1)


def _repeated(self: Any, h: Tensor, share: Tensor) -> Tensor:
    """Each row once for each of its experts, one below the other."""
    values, numbers = share.topk(2, -1)
    flat = numbers.reshape(-1)
    hidden = torch.bmm(h.repeat_interleave(2, 0)[:, None], self.up[flat]).squeeze(1).add_(self.bias[flat])
    rows = torch.bmm(F.gelu(hidden)[:, None], self.down[flat]).squeeze(1) * values.reshape(-1, 1)
    return rows.view(-1, 2, STREAM).sum(1)


def _best(self: Any, h: Tensor, share: Tensor) -> Tensor:
    """One expert for each row."""
    value, number = share.max(-1)
    hidden = F.gelu(torch.einsum("td,tdh->th", h, self.up[number]) + self.bias[number])
    return torch.einsum("th,thd->td", hidden, self.down[number]) * value[:, None]


def _sorted(self: Any, h: Tensor, share: Tensor) -> Tensor:
    """Rows in the order of their experts, multiplied expert by expert."""
    values, numbers = share.topk(2, -1)
    flat = numbers.reshape(-1)
    order = flat.argsort()
    ends = flat.float().histc(EXPERTS, 0, EXPERTS - 1).cumsum(0).int()
    hidden = F.gelu(grouped(h[order // 2], self.up, ends) + self.bias[flat[order]])
    rows = grouped(hidden, self.down, ends) * values.reshape(-1)[order, None]
    return rows[order.argsort()].view(-1, 2, STREAM).sum(1)


def grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The product of transformers, which takes single precision."""
    return torch.ops.transformers.grouped_mm_fallback(rows, matrices, offs=ends)


DENSE = {"einsum": _letters, "bmm": _matrices}
ROUTED = {"looked up": _looked_up, "repeated": _repeated, "the best": _best, "sorted": _sorted}


def mixture(experts: Any, seed: int = 0) -> nn.Module:
    """A stream, a mixture of experts with one tensor for all, and a last layer."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(experts(self, h, self.router(h).softmax(-1)))

    torch.manual_seed(seed)
    layers = {"first": nn.Linear(6, STREAM), "router": nn.Linear(STREAM, EXPERTS), "last": nn.Linear(STREAM, 3)}
    sizes = {"up": (EXPERTS, STREAM, HIDDEN), "bias": (EXPERTS, HIDDEN), "down": (EXPERTS, HIDDEN, STREAM)}
    return net(forward, **layers, **{name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()}).eval()


@torch.no_grad()
def reordered(model: nn.Module, experts: bool = True) -> nn.Module:
    """The same function: the channels of each expert in an order of their own, and the experts in another, too."""
    twin = deepcopy(model)
    for e in range(EXPERTS):
        order = torch.randperm(HIDDEN)
        twin.up[e], twin.bias[e], twin.down[e] = twin.up[e][:, order], twin.bias[e][order], twin.down[e][order]
    for tensor in (twin.up, twin.bias, twin.down, twin.router.weight, twin.router.bias) if experts else ():
        tensor.copy_(tensor[torch.tensor([2, 0, 3, 1])])
    return twin


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("name", DENSE | ROUTED)
def test_orders_inside_each_expert_are_found_again(name: str, experts: bool) -> None:
    """Also where the first weights that are read say nothing of them: a router's biases are those of experts alone."""
    model = mixture((DENSE | ROUTED)[name])
    twin = reordered(model, experts)
    close(twin(X), model(X), 1e-5)
    merged = merge([model, twin], X[:2], match="weight", normalize=None, progress=False)
    close(merged.module(X), model(X), 1e-5)


def _hidden(model: nn.Module) -> tuple[Symmetry, Any]:
    facts = symmetry(model, X[:5])
    assert not facts.unknown_ops
    (group,) = (g for g in facts.groups if any((m.fqn, m.dim) == ("up", 2) for m in g.members))
    return facts, group


def _inside(facts: Symmetry, inner: Any) -> Symmetry:
    """The same groups, one of them put inside the experts by hand."""
    (outer,) = (g for g in facts.groups if any((m.fqn, m.dim) == ("up", 0) for m in g.members))
    groups = [replace(g, parent=outer.index, outer=outer.size) if g is inner else g for g in facts.groups]
    return replace(facts, groups=tuple(groups))


@pytest.mark.parametrize("name", DENSE | ROUTED)
def test_each_expert_has_orders_of_its_own(name: str) -> None:
    facts, group = _hidden(mixture((DENSE | ROUTED)[name]))
    assert group.blocks == (EXPERTS, HIDDEN)
    assert verify(facts) < 1e-10
    assert verify(facts, seed=1) < 1e-10
    assert all(verify(facts, without=(member,)) > 1e-4 for member in group.members)
    assert {(m.fqn, m.dim) for m in group.members} >= {("up", 2), ("down", 1)}


@pytest.mark.parametrize("act", [torch.relu, torch.tanh, lambda x: x], ids=["scales", "signs", "matrices"])
def test_maps_of_larger_classes_are_each_expert_s_own_too(act: Callable[[Tensor], Tensor]) -> None:
    facts, group = _hidden(mixture(lambda self, h, share: _looked_up(self, h, share, act)))
    assert group.blocks == (EXPERTS, HIDDEN)
    assert group.kind != 0
    assert verify(facts) < 1e-10


# one order for all experts --------------------------------------------------------------------------------------------


def _in_between(between: Callable[[Tensor, Tensor, Any], Tensor]) -> Callable[..., Tensor]:
    """Something done to hidden values (rows, 2, hidden) by numbers (rows, 2) before they are read."""

    def experts(self: Any, h: Tensor, share: Tensor) -> Tensor:
        values, numbers = share.topk(2, -1)
        hidden = F.gelu(torch.einsum("td,tkdh->tkh", h, self.up[numbers]))
        hidden = between(hidden, share, self)
        return (torch.einsum("tkh,tkhd->tkd", hidden, self.down[numbers]) * values[..., None]).sum(1)

    return experts


def _others(hidden: Tensor, share: Tensor, self: Any) -> Tensor:
    """The vectors of the other two experts."""
    return hidden * self.bias[(-share).topk(2, -1)[1]]


def _square(self: Any, h: Tensor, share: Tensor) -> Tensor:
    """As many rows as experts in each: they could change places."""
    numbers = share.view(-1, 2, EXPERTS).topk(2, -1)[1]
    rows = h.view(-1, 2, STREAM)
    hidden = F.gelu(torch.einsum("btd,btkdh->btkh", rows, self.up[numbers]))
    hidden = hidden.flatten(1, 2) + hidden.transpose(1, 2).flatten(1, 2)
    return torch.einsum("btkh,btkhd->btkd", hidden.unflatten(1, (2, 2)), self.down[numbers]).sum(2).view(-1, STREAM)


def _turned(self: Any, h: Tensor, share: Tensor) -> Tensor:
    numbers = share.view(-1, 2, EXPERTS).topk(2, -1)[1]
    rows = h.view(-1, 2, STREAM)
    hidden = F.gelu(torch.einsum("btd,btkdh->btkh", rows, self.up[numbers]))
    down = self.down[numbers.transpose(1, 2)]
    return torch.einsum("btkh,btkhd->btkd", hidden, down).sum(2).view(-1, STREAM)


def _crossed(self: Any, h: Tensor, share: Tensor) -> Tensor:
    """The hidden values of each row's experts, read by all experts."""
    hidden = F.gelu(torch.einsum("td,tkdh->tkh", h, self.up[share.topk(2, -1)[1]]))
    return torch.einsum("tkeh,ehd->td", torch.einsum("tkh,te->tkeh", hidden, share), self.down)


def _sent_on(self: Any, h: Tensor, share: Tensor) -> Tensor:
    """The hidden values of each row's expert, read by two experts that are the same for all rows."""
    hidden = F.gelu(torch.einsum("td,tdh->th", h, self.up[share.topk(1, -1)[1][:, 0]]))
    two = share.mean(0).topk(2)[1]
    return torch.einsum("tjh,jhd->td", hidden[:, None] * self.router.bias[two, None], self.down[two])


SHARED: dict[str, Callable[..., Tensor]] = {
    "summed over experts": _in_between(lambda hidden, share, self: hidden + hidden.sum(1, True)),
    "turned round": _in_between(lambda hidden, share, self: hidden.flip(1)),
    "rolled": _in_between(lambda hidden, share, self: hidden.roll(1, 1)),
    "rolled over rows": _in_between(lambda hidden, share, self: hidden.roll(1, 0)),
    "softmax over experts": _in_between(lambda hidden, share, self: hidden.softmax(1)),
    "running": _in_between(lambda hidden, share, self: hidden.cumsum(1)),
    "one gain for all": _in_between(lambda hidden, share, self: hidden * self.gain),
    "by other numbers": _in_between(_others),
    "first expert of each": _in_between(lambda hidden, share, self: hidden[:, :1]),
    "first row": _in_between(lambda hidden, share, self: hidden + hidden[:1]),
    "beside all experts": _in_between(lambda hidden, share, self: hidden * self.bias.sum(0)),
    "rows and experts change places": _square,
    "read by others": _turned,
    "all experts read one": _crossed,
    "sent on to others": _sent_on,
}
FIXED = {"rows and experts change places", "read by others"}  # that many rows


@pytest.mark.parametrize("name", SHARED)
def test_experts_that_see_each_other_share_an_order(name: str) -> None:
    model = mixture(SHARED[name])
    model.gain = nn.Parameter(torch.randn(HIDDEN))
    facts = symmetry(trace(model, X[:6], dynamic_shapes=None) if name in FIXED else trace(model, X[:6]))
    assert verify(facts) < 1e-10
    (group,) = (g for g in facts.groups if any((m.fqn, m.dim) == ("up", 2) for m in g.members))
    assert group.parent is None
    if name in ("one gain for all", "beside all experts"):
        with pytest.raises(AssertionError, match="stands on no other axis"):
            verify(_inside(facts, group))
    else:
        assert verify(_inside(facts, group)) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE | ROUTED)
def test_each_expert_keeps_other_channels(name: str) -> None:
    """Half of the channels of each expert are nearly silent, others in each: as many are left everywhere."""
    model = mixture((DENSE | ROUTED)[name])
    for e in range(EXPERTS):
        silent = [(e + k) % HIDDEN for k in range(HIDDEN // 2)]
        model.up[e][:, silent] *= 1e-3
        model.bias[e][silent] *= 1e-3
        model.down[e][silent] *= 1e-3
    left = prune_structured(model, X[:2], sparsity=0.5, normalize=None, progress=False).module
    assert left.up.shape == (EXPERTS, STREAM // 2, HIDDEN // 2)
    assert left.down.shape == (EXPERTS, HIDDEN // 2, STREAM // 2)
    assert float(left.up.square().sum(1).min()) > 0.01
    assert float(left.down.square().sum(2).min()) > 0.01
