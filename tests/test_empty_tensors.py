"""Tensors without elements: a slice behind the last channel, a part of a split of no channels.

The reference is the same network without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import close
from micro_models import net
from torch import Tensor, nn

from vfx.analyse.verify import verify
from vfx.api import merge, prune_structured, symmetry, trace

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


def _heads(x: Tensor) -> Tensor:
    return x.view(-1, 2, 8)


def _written(q: Tensor) -> Tensor:
    q = q.clone()
    q[..., 8:] = 1.0
    q[:, 2:].mul_(3.0)
    return q.cos()


LEFT_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda q: torch.cat([q[..., :8].cos(), q[..., 8:]], -1),
    "computed": lambda q: torch.cat([q[..., :8].cos(), F.relu(q[..., 8:]) * 2], -1),
    "split": lambda q: torch.cat(q.cos().split([0, 8, 0], -1), -1),
    "narrow": lambda q: torch.cat([q.narrow(-1, 3, 0), q.cos()], -1),
    "index": lambda q: torch.cat([q.cos(), q[..., torch.zeros(0, dtype=torch.long)]], -1),
    "stacked": lambda q: torch.cat([q.cos(), torch.stack([q[..., 8:], q[..., :0]], -1).flatten(2)], -1),
    "heads": lambda q: torch.cat([q[:, 2:].tanh(), q.cos()], 1),
    "normed": lambda q: torch.cat([F.layer_norm(q[:, :0], (8,)), q.cos()], 1),
    "written": _written,
}
# a result that an empty tensor has a part in keeps its channels, and so does what the empty tensor is cut from
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda q: q.cos() + q[..., 8:].sum(-1, keepdim=True),
    "product": lambda q: q.cos() + q[..., 8:] @ q[..., 8:].transpose(1, 2) @ q,
    "linear": lambda q: q.cos() + F.linear(q[..., 8:], q.new_ones(8, 0)),
    "padded": lambda q: q.cos() + F.pad(q[..., 8:], (0, 8)),
    "rows": lambda q: q.cos() + q[:0].sum(0),
}


def _network(between: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(between(_heads(self.a(x))).flatten(1))

    torch.manual_seed(0)
    return net(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3)).eval()


def _works(model: nn.Module, x: Tensor) -> float:
    """The share of the parameters that pruning leaves, where all else holds."""
    assert verify(symmetry(model, x)) < 1e-10
    close(merge([model, model], x, match="weight", normalize=None, progress=False).module(x), model(x), 1e-6)
    return prune_structured(model, x, sparsity=0.5, progress=False).report.params_ratio


@pytest.mark.parametrize("name", LEFT_OUT)
def test_empty_parts_change_no_group(name: str) -> None:
    model, plain = _network(LEFT_OUT[name]), _network(torch.cos)
    close(trace(model, X)(X), plain(X), 1e-6)
    sizes = [[group.size for group in symmetry(own, X).groups] for own in (model, plain)]
    assert sizes[0] == sizes[1] == [16]
    assert _works(model, X) == pytest.approx(_works(plain, X))


@pytest.mark.parametrize("name", KEPT)
def test_what_reads_an_empty_tensor_is_pinned_with_a_reason(name: str) -> None:
    model = _network(KEPT[name])
    facts = symmetry(model, X)
    assert not facts.groups
    assert not facts.unknown_ops
    assert any("empty tensor" in pin.reason for pin in facts.pinned)
    assert _works(model, X) == 1


def test_parts_between_empty_ones_are_apart() -> None:
    """The halves of each head go through different functions: two groups inside the heads, as without the middle."""
    model = _network(lambda q: torch.cat([q[..., :4].cos(), q[..., 4:4].cos(), q[..., 4:].sin()], -1))
    assert sorted(group.size for group in symmetry(model, X).groups) == [2, 4, 4]
    assert _works(model, X) < 0.6


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(("name", "options"), [("Phi3", {}), ("GPTNeoX", {"rotary_pct": 1.0})])
def test_rotary_embeddings_of_whole_heads(name: str, options: dict[str, Any]) -> None:
    """The part of a head that is not rotated is empty: stream and hidden channels are free, pruning halves them."""
    small = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "use_cache": False}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(num_attention_heads=4, **small, **tokens, **options)
    torch.manual_seed(0)
    language = getattr(transformers, f"{name}ForCausalLM")(config)
    model = net(lambda self, ids: self.language(input_ids=ids).logits, language=language).eval()
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    assert {24, 32} <= {group.size for group in symmetry(model, ids).groups}
    assert _works(model, ids) < 0.6
