"""Mixtures of experts: rows sorted by expert and multiplied group by group, as public networks write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import close
from micro_models import net
from torch import Tensor, nn

from vfx.analyse.verify import verify
from vfx.api import merge, profile, prune_structured, symmetry
from vfx.emit.files import export
from vfx.errors import VfxError
from vfx.operators.kernels import grouped_product

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
STREAM, HIDDEN, EXPERTS = 24, 20, 4


@torch.no_grad()
def language_model(name: str, experts: str | None = None, seed: int = 0) -> nn.Module:
    """One layer of a public mixture of experts with random weights; ``experts`` names its implementation."""
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    sizes = {"hidden_size": STREAM, "intermediate_size": HIDDEN, "moe_intermediate_size": HIDDEN, "head_dim": 6}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    routing = {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**tokens, **sizes, **heads, **routing)
    language = getattr(transformers, f"{name}ForCausalLM")(config)
    if experts is not None:
        language.config._experts_implementation = experts
    for key, parameter in language.named_parameters():
        parameter.normal_(1.0 if "norm" in key else 0.0, 0.2)
    return net(lambda self, ids: self.language(input_ids=ids).logits, language=language).eval()


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen3Moe", "Phimoe"])
def test_stream_hidden_channels_and_experts_are_free(name: str) -> None:
    """Experts may be permuted, with the router's outputs and biases of their own, but none is taken away."""
    model = language_model(name)
    facts = symmetry(model, IDS)
    assert {STREAM, HIDDEN, EXPERTS} <= {group.size for group in facts.groups}
    assert not facts.unknown_ops
    assert verify(facts) < 1e-10
    result = prune_structured(model, IDS, sparsity=0.5, progress=False)
    assert result.report.params_ratio < 0.4
    assert result.module(IDS).shape == model(IDS).shape
    left = [tensor for key, tensor in result.module.named_parameters() if "gate_up_proj" in key]
    assert all(len(tensor) == EXPERTS for tensor in left)


@pytest.mark.parametrize("experts", [None, "batched_mm"])
def test_every_tie_of_an_expert_counts(experts: str | None) -> None:
    """Control: a member left out of its group is noticed."""
    facts = symmetry(language_model("Mixtral", experts), IDS)
    members = [m for group in facts.groups for m in group.members if ".experts." in m.fqn]
    assert {(re.sub(r".*\.", "", m.fqn), m.dim) for m in members} == {
        (name, dim) for name in ("gate_up_proj", "down_proj") for dim in range(3)
    }
    assert all(verify(facts, without=(member,)) > 1e-4 for member in members)


def test_a_copy_is_merged_into_the_network() -> None:
    model = language_model("Mixtral")
    merged = merge([model, model], IDS, match="weight", normalize=None, progress=False)
    close(merged.module(IDS), model(IDS), 1e-6)


@pytest.mark.parametrize("experts", [None, "batched_mm"])
def test_experts_in_a_new_order_are_found_again(experts: str | None) -> None:
    model, twin = (language_model("Mixtral", experts) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])
    mlp = twin.language.model.layers[0].mlp
    with torch.no_grad():
        for parameter in (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj):
            parameter.copy_(parameter[order])
    close(twin(IDS), model(IDS), 1e-5)
    plain = (model.language.model.layers[0].mlp.experts.down_proj - mlp.experts.down_proj).abs().max()
    assert float(plain) > 0.1
    for match in ("weight", "activation"):
        merged = merge([model, twin], IDS, data=[IDS], match=match, normalize=None, solve=None, progress=False)
        close(merged.module(IDS), model(IDS), 1e-4)


def test_a_row_costs_the_matrices_of_its_experts() -> None:
    """Two of four experts read each token: both ways of writing it count the same."""
    sorted_rows, looked_up = (profile(language_model("Mixtral", kind), IDS) for kind in (None, "batched_mm"))
    assert not sorted_rows.unknown_ops
    rows = [row.macs for row in sorted_rows.rows if "grouped_mm" in row.operator]
    assert rows == [7 * 2 * STREAM * 2 * HIDDEN, 7 * 2 * HIDDEN * STREAM]
    assert sorted_rows.macs == looked_up.macs


def test_export_is_refused_with_the_operator_s_name(tmp_path: Path) -> None:
    path = tmp_path / "experts.onnx"
    with pytest.raises(VfxError, match="grouped_mm"):
        export(language_model("Mixtral"), path, IDS)
    assert not list(tmp_path.iterdir())


# numbers of positions -------------------------------------------------------------------------------------------------


def _routed(read: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> nn.Module:
    """A router with two of four experts for each row; ``read`` gets hidden values, values and numbers of topk."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x)
        values, numbers = self.router(h).softmax(-1).topk(2, -1)
        return self.last(read(self, h, values, numbers))

    torch.manual_seed(0)
    sizes = {"first": nn.Linear(6, 10), "router": nn.Linear(10, 4), "last": nn.Linear(10, 3)}
    return net(forward, **sizes, table=nn.Parameter(torch.randn(4, 10)), bias=nn.Parameter(torch.randn(4))).eval()


def _sorted_rows(self: Any, h: Tensor, values: Tensor, numbers: Tensor) -> Tensor:
    """Rows by number, each multiplied by its own vector, and put back."""
    flat = numbers.flatten()
    order = flat.argsort()
    rows = torch.tanh(h[order // 2] * self.table[flat[order]]) * values.flatten()[order, None]
    return rows[order.argsort()].view(-1, 2, 10).sum(1)


def _one_after_the_other(self: Any, h: Tensor, values: Tensor, numbers: Tensor) -> Tensor:
    """The best, and the best of all others, as sparse mixers choose."""
    scores = self.router(h)
    best = scores.max(-1, keepdim=True)[1]
    second = scores.scatter(-1, best, float("-inf")).max(-1, keepdim=True)[1]
    return h * self.table[torch.cat([best, second], -1)].sum(1)


FREE: dict[str, Callable[..., Tensor]] = {
    "looked up": lambda self, h, values, numbers: (h[:, None] * self.table[numbers] * values[..., None]).sum(1),
    "the first": lambda self, h, values, numbers: h * self.table[numbers[:, 0]] * values[:, :1],
    "gathered": lambda self, h, values, numbers: h * (self.router(h) + self.bias).gather(1, numbers).sum(1, True),
    "one hot": lambda self, h, values, numbers: h * (F.one_hot(numbers, 4).to(h.dtype).sum(1) @ self.table),
    "sorted": _sorted_rows,
    "the largest": lambda self, h, values, numbers: h * self.table[self.router(h).argmax(-1)],
    "written": lambda self, h, values, numbers: (
        h * (torch.zeros_like(self.router(h)).scatter(1, numbers, values) @ self.table)
    ),
    "one after the other": _one_after_the_other,
}
PINNED: dict[str, Callable[..., Tensor]] = {
    "a value": lambda self, h, values, numbers: h * self.table[numbers].sum(1) * (1 + numbers.sum(1, True)),
    "another table": lambda self, h, values, numbers: (
        h * self.table[numbers].sum(1) * self.bias[(numbers[:, :1] + 1) % 4]
    ),
    "a number": lambda self, h, values, numbers: h * self.table[numbers].sum(1) * (1 + numbers[0, 0].item()),
    "compared": lambda self, h, values, numbers: h * self.table[numbers].sum(1) * (numbers[:, :1] < 2),
    "running": lambda self, h, values, numbers: h * F.one_hot(numbers, 4).sum(1).cumsum(-1)[:, :1],
    "order of rows": lambda self, h, values, numbers: (
        h + self.table[numbers.flatten()][numbers.flatten().argsort()].cumsum(0)[:1]
    ),
    "first rows": lambda self, h, values, numbers: h + self.table[numbers.flatten().sort()[0]][:2].sum(0),
    "not put back": lambda self, h, values, numbers: h[numbers.flatten().argsort() // 2].view(-1, 2, 10).sum(1),
    "the largest of whole numbers": lambda self, h, values, numbers: (
        h * self.table[(3 * self.router(h)).round().long().argmax(-1)]
    ),
    "written beside": lambda self, h, values, numbers: (
        h * (torch.zeros_like(self.router(h)).scatter(1, 3 - numbers, values) @ self.table)
    ),
    "numbers written": lambda self, h, values, numbers: (
        h * (torch.zeros_like(self.router(h)).scatter(1, numbers, numbers.to(h.dtype)) @ self.table)
    ),
    "beside the first": lambda self, h, values, numbers: (
        h * self.table[torch.cat([numbers, torch.zeros_like(numbers)], -1)].sum(1)
    ),
    "put back twice": lambda self, h, values, numbers: h[numbers[:, 0].argsort().argsort()],
}


def _experts(model: nn.Module) -> list[Any]:
    facts = symmetry(model, torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
    assert not facts.unknown_ops
    assert verify(facts) < 1e-10
    return [group for group in facts.groups if any(m.fqn == "router.weight" and m.dim == 0 for m in group.members)]


@pytest.mark.parametrize("name", FREE)
def test_what_is_looked_up_by_number_may_be_numbered_anew(name: str) -> None:
    (group,) = _experts(_routed(FREE[name]))
    assert group.size == 4
    assert {m.fqn for m in group.members} >= {"router.weight", "router.bias"}


@pytest.mark.parametrize("name", PINNED)
def test_numbers_and_orders_that_are_read_pin_the_experts(name: str) -> None:
    assert not _experts(_routed(PINNED[name]))


# the product by itself ------------------------------------------------------------------------------------------------


def _grouped(self: Any, x: Tensor) -> Tensor:
    """Half of the rows for each of two experts."""
    rows = self.first(x)
    ends = torch.tensor([2, 4], dtype=torch.int32)
    hidden = nn.functional.grouped_mm(rows, self.up, offs=ends).relu()
    return self.last(nn.functional.grouped_mm(hidden, self.down, offs=ends))


def test_torch_s_own_grouped_product() -> None:
    """It has no kernel in double precision, which proofs run in."""
    weights = {"up": nn.Parameter(torch.randn(2, 16, 24)), "down": nn.Parameter(torch.randn(2, 24, 16))}
    model = net(_grouped, first=nn.Linear(8, 16), last=nn.Linear(16, 8), **weights).bfloat16().eval()
    x = torch.randn(4, 8).bfloat16()
    facts = symmetry(model, x)
    assert sorted(group.size for group in facts.groups) == [16, 16, 24]
    assert verify(facts) < 1e-10
    assert all(verify(facts, without=(member,)) > 1e-4 for group in facts.groups for member in group.members)


def test_the_product_in_double_precision_is_that_of_each_row() -> None:
    x, w = torch.randn(7, 5, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    ends, expert = torch.tensor([2, 2, 7]), torch.tensor([0, 0, 2, 2, 2, 2, 2])  # no row for the second
    close(grouped_product(x, w, ends), torch.einsum("tk,tkn->tn", x, w[expert]), 1e-14)


def test_other_forms_of_grouped_products_are_refused() -> None:
    """Columns and rows cut into groups at once: no channel of theirs is free, and the operator is named."""

    def forward(self: Any, x: Tensor) -> Tensor:
        ends = torch.tensor([8, 16], dtype=torch.int32)
        return nn.functional.grouped_mm(self.first(x), self.w, offs=ends).sum(0)

    model = net(forward, first=nn.Linear(6, 16), w=nn.Parameter(torch.randn(16, 16))).bfloat16().eval()
    facts = symmetry(model, torch.randn(4, 6).bfloat16())
    assert not facts.groups
    assert any("grouped_mm" in name for name in facts.unknown_ops)
