"""Mixtures of experts: rows sorted by expert and multiplied group by group, as public networks write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import close
from micro_models import net
from torch import Tensor, nn

from vfx.api import merge, profile, prune_structured, symmetry
from vfx.emit.files import export
from vfx.errors import VfxError
from vfx.operators import grouped_product

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


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen3Moe"])
def test_stream_and_hidden_channels_of_experts_are_free(name: str) -> None:
    model = language_model(name)
    facts = symmetry(model, IDS)
    assert {STREAM, HIDDEN} <= {group.size for group in facts.groups}
    assert not facts.unknown_ops
    assert facts.verify() < 1e-10
    result = prune_structured(model, IDS, sparsity=0.5, progress=False)
    assert result.report.params_ratio < 0.4
    assert result.module(IDS).shape == model(IDS).shape


@pytest.mark.parametrize("experts", [None, "batched_mm"])
def test_every_tie_of_an_expert_counts(experts: str | None) -> None:
    """Control: a member left out of its group is noticed."""
    facts = symmetry(language_model("Mixtral", experts), IDS)
    members = [m for group in facts.groups for m in group.members if ".experts." in m.fqn]
    assert {re.sub(r".*\.", "", m.fqn) for m in members} == {"gate_up_proj", "down_proj"}
    assert all(facts.verify(without=(member,)) > 1e-4 for member in members)


def test_a_copy_is_merged_into_the_network() -> None:
    model = language_model("Mixtral")
    merged = merge([model, model], IDS, match="weight", normalize=None, progress=False)
    close(merged.module(IDS), model(IDS), 1e-6)


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
    assert facts.verify() < 1e-10
    assert all(facts.verify(without=(member,)) > 1e-4 for group in facts.groups for member in group.members)


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
