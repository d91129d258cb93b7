"""Whole residual blocks: found from the graph, removed in the order of a literal search, proved."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import close
from micro_models import net
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from vfx.passes.remove_blocks import RemoveBlocks

from vfx.analyse.cost import cost
from vfx.api import prune_structured, trace
from vfx.errors import ArgumentError, PassError, VerificationError
from vfx.models.gpt import gpt_tiny
from vfx.passes import remove_blocks
from vfx.proof import outputs_error
from vfx.pruning.residual import residual_blocks, without

EXACT = 1e-10
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _made(forward: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for part in parts.values():
        part.apply(lambda one: one.reset_parameters() if hasattr(one, "reset_parameters") else None)  # type: ignore[operator]
    return net(forward, **parts).double().eval()


def _tokens(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 3))


def _mlp(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))


def _stack(count: int = 5) -> nn.Module:
    """Blocks of different weight in front of a head."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Linear(6, 6)
            self.blocks = nn.ModuleList(_mlp() for _ in range(count))
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
            self.without: tuple[int, ...] = ()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for index, block in enumerate(self.blocks):
                if index not in self.without:
                    x = x + block(self.norm(x))
            return self.head(x)  # type: ignore[no-any-return]

    found = Stack().double().eval()
    with torch.no_grad():
        for index, block in enumerate(found.blocks):
            block[2].weight.mul_((3.0, 0.2, 1.0, 0.05, 2.0)[index % 5])  # type: ignore[index, union-attr, operator]
    return found


def _literally(model: nn.Module, gone: tuple[int, ...]) -> Tensor:
    model.without = gone  # type: ignore[assignment]
    try:
        with torch.no_grad():
            return model(X)  # type: ignore[no-any-return]
    finally:
        model.without = ()  # type: ignore[assignment]


# what counts as a block -----------------------------------------------------------------------------------------------


FOUND: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "behind one another": (_stack, [f"blocks.{k}" for k in range(5)]),
    "side by side": (
        lambda: _made(lambda s, x: (h := s.stem(x)) + s.a(h) + s.b(h), stem=nn.Linear(6, 6), a=_mlp(), b=_mlp()),
        ["a", "b"],
    ),
    "side by side, summed first": (
        lambda: _made(lambda s, x: (h := s.stem(x)) + (s.a(h) + s.b(h)), stem=nn.Linear(6, 6), a=_mlp(), b=_mlp()),
        [""],
    ),
    "norm behind the sum": (
        lambda: _made(lambda s, x: s.norm(x + s.a(x)), norm=nn.LayerNorm(6), a=_mlp()),
        ["a"],
    ),
    "attention, whose dropout could draw numbers": (
        lambda: _made(
            lambda s, x: s.head((h := _tokens(x)) + F.scaled_dot_product_attention(s.q(h), s.k(h), h)),
            q=nn.Linear(3, 3), k=nn.Linear(3, 3), head=nn.Linear(3, 2),
        ),
        [""],
    ),
    "in place": (
        lambda: _made(lambda s, x: F.relu_(s.a(h := s.stem(x)).add_(h)), stem=nn.Linear(6, 6), a=_mlp()),
        ["a"],
    ),
    "nested: the inner one": (
        lambda: _made(
            lambda s, x: x + s.out((h := s.into(x)) + s.a(h)), into=nn.Linear(6, 6), out=nn.Linear(6, 6), a=_mlp()
        ),
        ["a"],
    ),
    "a projected shortcut is none": (lambda: _made(lambda s, x: s.up(x) + s.a(x), up=nn.Linear(6, 6), a=_mlp()), []),
    "no parameters": (lambda: _made(lambda s, x: s.head(x + F.relu(x)), head=nn.Linear(6, 6)), []),
    "tensors that others read": (lambda: _made(lambda s, x: s.a(x + s.a(x)), a=nn.Linear(6, 6)), []),
    "broadcast": (lambda: _made(lambda s, x: x + s.a(x), a=nn.Linear(6, 1)), []),
    "scaled sum": (lambda: _made(lambda s, x: torch.add(x, s.a(x), alpha=2), a=_mlp()), []),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_blocks_are_found_from_the_graph(name: str) -> None:
    build, wanted = FOUND[name]
    blocks = residual_blocks(trace(build(), X))
    assert len(blocks) == len(wanted)
    assert all(block.name == (path or block.total) for block, path in zip(blocks, wanted))


def test_all_of_a_branch_goes() -> None:
    program = trace(FOUND["attention, whose dropout could draw numbers"][0](), X)
    (block,) = residual_blocks(program)
    assert block.tensors == {"q.weight", "q.bias", "k.weight", "k.bias"}
    assert set(without(program, [block]).weights[0]) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("gone", [(0,), (4,), (1, 2), (0, 3, 4)])
def test_a_network_without_blocks_is_the_one_that_skips_them(gone: tuple[int, ...]) -> None:
    model = _stack()
    program = trace(model, X)
    blocks = residual_blocks(program)
    small = without(program, [blocks[index] for index in gone])
    close(small(X), _literally(model, gone), EXACT)
    own = sum(p.numel() for p in model.blocks[0].parameters())  # type: ignore[union-attr, index]
    assert cost(program).params - cost(small).params == own * len(gone)
    assert not [name for name in small.weights[0] if name.startswith(tuple(f"blocks.{k}." for k in gone))]
    assert (small(X) - program(X)).abs().max() > 1e-4  # the control: these blocks do something


def test_the_search_is_the_literal_one() -> None:
    model = _stack()
    whole = _literally(model, ())

    def error(gone: tuple[int, ...]) -> float:
        return float((whole - _literally(model, gone)).square().sum() / whole.square().sum())

    gone: tuple[int, ...] = ()
    errors = []
    for _ in range(3):
        best = min((k for k in range(5) if k not in gone), key=lambda k: error((*gone, k)))
        gone = (*gone, best)
        errors.append(error(gone))
    record = RemoveBlocks(0.6, X).run(trace(model, X)).record
    assert [row.name for row in record.blocks] == [f"blocks.{k}" for k in gone]
    assert [row.error for row in record.blocks] == pytest.approx(errors, rel=1e-8)
    assert record.error is not None
    assert record.error <= EXACT
    worst = max(itertools.combinations(range(5), 3), key=error)
    assert error(worst) > 2 * errors[-1]  # the control: which ones go matters


# how many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 1), (0.25, 1), (0.5, 3), (0.8, 4), (0.95, 4)])
def test_shares_are_of_whole_blocks(share: float, count: int) -> None:
    result = RemoveBlocks(share, X).run(trace(_stack(), X))
    assert len(result.record.blocks) == count
    assert any("one block at least stays" in note for note in result.program.notes) == (share == 0.95)


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_budgets_are_met_by_the_fewest_blocks(kind: str) -> None:
    program = trace(_stack(), X)
    whole = getattr(cost(program), kind)
    result = RemoveBlocks(0.5, X, budget=kind).run(program)
    sizes = [getattr(cost(without(program, residual_blocks(program)[:k])), kind) for k in range(5)]
    assert len(result.record.blocks) == next(k for k, size in enumerate(sizes) if size <= whole / 2)


def test_protected_blocks_stay() -> None:
    record = RemoveBlocks(0.6, X, protect=["blocks.3", "blocks.1"]).run(trace(_stack(), X)).record
    assert not {"blocks.3", "blocks.1"} & {row.name for row in record.blocks}
    with pytest.raises(ArgumentError, match="names no parameter"):
        RemoveBlocks(0.5, X, protect=["blocks.9"])(trace(_stack(), X))


def test_nothing_to_remove_is_said() -> None:
    with pytest.raises(PassError, match="no residual block"):
        RemoveBlocks(0.5, X)(trace(_made(lambda s, x: s.a(x), a=_mlp()), X))


def test_what_is_not_proved_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(program: Any, blocks: Any) -> Any:
        return without(program, [b for b in residual_blocks(program) if b not in blocks][: len(blocks)])

    monkeypatch.setattr(remove_blocks, "without", others)
    with pytest.raises(VerificationError, match="silent branches"):
        RemoveBlocks(0.4, X)(trace(_stack(), X))


# the public call ------------------------------------------------------------------------------------------------------


def _drawn(count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_what_is_left_is_solved_for_the_whole_network() -> None:
    model = _stack()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"units": "layers", "sparsity": 0.4, "data": _drawn(256), "progress": False}
    plain = prune_structured(model, X, solve=None, normalize=None, **options)
    solved = prune_structured(model, X, solve="least_squares", **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    names = [row.name for row in plain.report.blocks]
    assert names == [row.name for row in solved.report.blocks]
    close(plain(X), _literally(model, tuple(int(name[-1]) for name in names)), EXACT)
    wanted = model(X)
    assert (solved(X) - wanted).square().sum() < 0.5 * (plain(X) - wanted).square().sum()
    found = solved.report.to_dict()
    assert found["units"] == "layers"
    assert found["score"] == "outputs"
    assert [row["name"] for row in found["blocks"]] == names
    assert "silent branches" in str(solved.report)


def test_options_of_channels_are_refused() -> None:
    for wrong in ({"score": "l1"}, {"method": "fold"}, {"allocation": "global"}, {"round_to": 8}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            prune_structured(_stack(), X, units="layers", sparsity=0.5, data=X, progress=False, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="give data"):
        prune_structured(_stack(), X, units="layers", sparsity=0.5, progress=False)


# other lengths --------------------------------------------------------------------------------------------------------


class FixedLength(nn.Module):
    """A stack whose code takes sequences of six alone."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6, 8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def _hugging_face() -> nn.Module:
    sizes = {"vocab_size": 96, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(use_cache=False, bos_token_id=0, eos_token_id=0, **sizes))


AS_IT_IS: dict[str, Any] = {"solve": None, "normalize": None, "progress": False}
DECODERS = {"vfx": lambda: gpt_tiny(0.25, context=32, depth=3), "transformers": _hugging_face}


@pytest.mark.parametrize(("name", "batch"), [("vfx", 2), ("vfx", 6), ("transformers", 2)])  # as many as tokens, too
@torch.no_grad()
def test_a_decoder_without_blocks_takes_other_lengths(name: str, batch: int) -> None:
    torch.manual_seed(0)
    model, ids = DECODERS[name]().eval(), torch.randint(96, (batch, 6))
    result = prune_structured(model, ids, units="layers", sparsity=0.5, data=ids, **AS_IT_IS)
    gone = {block.name for block in result.report.blocks}
    assert gone
    for samples, length in ((1, 1), (3, 32)):
        other = torch.randint(96, (samples, length))
        whole = trace(model, other, dynamic_shapes=None)  # a capture of its own at this length
        expected = without(whole, [block for block in residual_blocks(whole) if block.name in gone])
        assert outputs_error(expected.returned(expected(other)), result.module(other)) <= 1e-5
        assert outputs_error(whole.returned(whole(other)), result.module(other)) > 1e-3  # negative control
    assert all(
        tensor.data_ptr() == dict(result.module.named_parameters())[name].data_ptr()
        for name, tensor in result.program.weights[0].items()
        if name not in result.program.buffers
    )


@torch.no_grad()
def test_lengths_that_the_code_fixes_or_the_user_asked_for_stay() -> None:
    torch.manual_seed(0)
    x, ids = torch.randn(3, 6, 8), torch.randint(96, (2, 6))
    options: dict[str, Any] = {"units": "layers", "sparsity": 0.5} | AS_IT_IS
    fixed = prune_structured(FixedLength().eval(), x, data=x, **options)
    assert outputs_error(fixed.program(x), fixed.module(x)) <= 1e-5
    asked = prune_structured(gpt_tiny(0.25, depth=2).eval(), ids, data=ids, dynamic_shapes=None, **options)
    with pytest.raises(RuntimeError):
        asked.module(torch.randint(96, (2, 7)))
