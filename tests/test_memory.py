"""What is held at a time, counted in bytes that operators made and that are still alive, and who owns the Result."""

from __future__ import annotations

import copy
import ctypes
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import vfx
from vfx import garbage
from vfx.api import aligning
from vfx.emit import module as emission
from vfx.emit.module import difference, emit
from vfx.errors import UncorrectedNote
from vfx.models.gpt import gpt_tiny
from vfx.program import Program
from vfx.proof import PRESERVED
from vfx.pruning.groups import channel_scores
from vfx.pruning.order import kth_lowest
from vfx.pruning.selection import lowest
from vfx.resize.masked import MaskedRun

pytestmark = pytest.mark.filterwarnings("ignore::vfx.errors.UncorrectedNote")
WIDTH, DEPTH = 256, 8
assert issubclass(UncorrectedNote, Warning)


class Alive(TorchDispatchMode):
    """Follows the tensors that operators make while it is entered: ``peak`` is the most bytes alive at once."""

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype, self.peak = dtype, 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        given = {_place(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(result):
            place = _place(made) if isinstance(made, Tensor) and self.dtype in (None, made.dtype) else 0
            if place and place not in given:
                storage = made.untyped_storage()
                self._held[place] = StorageWeakRef(storage), storage.nbytes()
        self._held = {place: own for place, own in self._held.items() if not own[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result


def _place(tensor: Tensor) -> int:
    """Where a tensor's values are; 0 for one without values."""
    return 0 if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) else tensor.untyped_storage().data_ptr()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(16, WIDTH)]
    for _ in range(DEPTH):
        layers += [nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(WIDTH, 4)).eval()


LAYER = 4 * WIDTH * WIDTH  # bytes in float32
MODEL = sum(parameter.nbytes for parameter in network().parameters())
SMALL = LAYER // 2  # activations, biases
X = torch.randn(2, 16)


def peak(call: Callable[[], Any], dtype: torch.dtype | None = None) -> int:
    with Alive(dtype) as alive:
        call()
    return alive.peak


def _merged(**options: Any) -> Any:
    return vfx.merge([network(0), network(1)], X, match="weight", classes="permutation", progress=False, **options)


@torch.no_grad()
def test_a_comparison_in_float64_holds_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    program = vfx.trace(network(), X)
    module = emit(program)[0]
    monkeypatch.setattr(emission, "_as_they_are", lambda *_: math.inf)
    assert peak(lambda: difference(module, program), torch.float64) <= 2 * LAYER + SMALL
    # negative control: all at once
    assert peak(lambda: emission._difference_at_once(module, program), torch.float64) > 1.9 * MODEL


class Casting(nn.Module):
    """A norm in single precision, as language models have it, in a network of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        wide = x.float()
        return self.head((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype))


class Rotating(Casting):
    """Its table of constants is rounded to the precision of the network, as that of rotary positions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.arange(16.0).cos().to(x.dtype))


@pytest.mark.parametrize("kind", [Casting, Rotating])
@torch.no_grad()
def test_a_network_that_casts_is_compared_without_a_copy_in_float64(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    program = vfx.trace(kind().to(torch.bfloat16), X.to(torch.bfloat16))
    monkeypatch.setattr(emission, "_difference_at_once", lambda *_: pytest.fail("all tensors were cast at once"))
    module = emit(program)[0]
    assert type(module) is kind
    assert difference(module, program) <= PRESERVED
    with torch.no_grad():
        module.get_parameter("fc.weight")[0] *= 1.01  # negative control
    assert difference(module, program) > PRESERVED


@torch.no_grad()
def test_what_a_comparison_one_by_one_does_not_prove_is_compared_at_once() -> None:
    class Asking(nn.Module):
        """Its input follows the dtype of a parameter, as T5's does."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.to(self.fc.weight.dtype))

    program = vfx.trace(Asking(), X)
    module = emit(program)[0]
    assert type(module) is Asking
    with torch.no_grad():
        module.get_parameter("fc.bias")[0] += 0.1
    assert difference(module, program) > PRESERVED  # negative control


def test_the_same_bits_prove_nothing_of_half_precision() -> None:
    program = vfx.trace(network().to(torch.bfloat16), X.to(torch.bfloat16))
    assert emission._as_they_are(emit(program)[0], program) == math.inf


def test_a_merge_by_weights_holds_one_model_beside_its_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    edges, held = vfx.trace([network(0), network(1)], X), list[Program]()
    options: dict[str, Any] = {"match": "weight", "classes": "permutation", "progress": False}
    merged = vfx.merge(edges, **options).state_dict()
    few = MODEL + 7 * LAYER  # what moves or is merged, and a layer in float64 three times
    assert peak(lambda: vfx.merge(edges, **options)) <= few
    monkeypatch.setattr(aligning, "_read_once", lambda *_: False)  # negative control: the aligned edge is held, too
    assert peak(lambda: vfx.merge(edges, **options)) > few
    assert all(torch.equal(tensor, merged[name]) for name, tensor in vfx.merge(edges, **options).state_dict().items())
    assert peak(lambda: held.append(edges.to(dtype=torch.float64))) > 3.9 * MODEL


def test_pruning_holds_one_and_a_half_models() -> None:
    program = vfx.trace(network(), X)
    assert peak(lambda: vfx.prune(program, sparsity=0.5, progress=False)) <= 1.25 * MODEL + 2 * LAYER


def _pruned() -> Any:
    return vfx.prune(network(), X, sparsity=0.5, progress=False)


def _smaller() -> Any:
    return vfx.prune_structured(network(), X, sparsity=0.5, progress=False)


@pytest.mark.parametrize("make", [_merged, _pruned, _smaller])
def test_a_result_holds_its_network_once(make: Callable[[], Any]) -> None:
    result = make()
    state = result.module.state_dict()
    assert state.keys() == result.program.weights[0].keys()
    assert all(_place(tensor) == _place(state[name]) for name, tensor in result.program.weights[0].items())


def test_no_result_shares_a_tensor_with_what_it_was_made_of() -> None:
    edges = [network(0), network(1)]
    mine = {_place(tensor) for edge in edges for tensor in edge.parameters()}
    captured = vfx.trace(edges, X)
    found: list[Any] = [
        vfx.merge(edges, X, match="weight", progress=False),
        vfx.merge(captured, match=None, weights=[1.0, 0.0], progress=False),
        vfx.prune(edges[0], X, sparsity={"0": 0.5}, progress=False),
        vfx.prune(captured.select(1), sparsity={"0": 0.5}, progress=False),
        vfx.prune_structured(edges[0], X, sparsity=0.5, protect=["0.weight", "2.weight"], progress=False),
        vfx.compile(captured, passes=[vfx.Interpolate(0.0)]),
        vfx.compile(captured.select(0), passes=[]),
    ]
    for result in found:
        assert not {_place(tensor) for tensor in result.module.state_dict().values()} & mine
        assert not {_place(tensor) for tensor in result.program.weights[0].values()} & mine


def test_tensors_that_a_program_shares_are_apart_in_its_module() -> None:
    program = vfx.trace(network(), X)
    weights = dict(program.weights[0])
    weights["4.weight"] = weights["2.weight"] = weights["2.weight"].clone()
    both = torch.stack([weights["6.weight"], weights["8.weight"]])
    weights["6.weight"], weights["8.weight"] = both[0], both[1]
    shared = program.with_weights([weights])
    for module in (emission.graph_module, emission.own_class):
        state = module(shared, 0, emission.Taking([])).state_dict()
        places = [_place(tensor) for tensor in state.values()]
        assert len(set(places)) == len(places)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())


def test_without_verify_no_network_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Program] = []
    monkeypatch.setattr(emission, "difference", lambda module, program: compared.append(program) or 0.0)
    assert not isinstance(_merged(verify=False).module, fx.GraphModule)
    assert not compared
    _merged()
    assert compared


def test_a_copy_that_shares_parameters_leaves_buffers_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc(x)

    model = Counting()
    twin = emission.sharing(model)
    twin(X)
    assert [float(model.calls), float(twin.calls)] == [0, 1]
    assert twin.fc.weight is model.fc.weight
    assert copy.deepcopy(model).fc.weight is not model.fc.weight  # negative control


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf"), 3e-40, -7.25])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(VALUES, min_size=1, max_size=9), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.data(),
)
def test_the_kth_lowest_is_that_of_all_values(rows: list[list[float]], dtype: torch.dtype, data: st.DataObject) -> None:
    tensors = [torch.tensor(row).to(dtype) for row in rows]
    joined = torch.cat(tensors)
    count = data.draw(st.integers(1, len(joined)))
    threshold, below = kth_lowest(lambda: tensors, count)
    assert torch.equal(threshold, joined.kthvalue(count).values)
    assert below == int((joined < threshold).sum())


def test_global_masks_are_those_of_all_scores_at_once() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.mul(40).round() / 40)  # many of equal size
    result = vfx.prune(model, X, sparsity=0.7, progress=False)
    names = sorted(name for name, tensor in model.named_parameters() if tensor.ndim > 1)
    scores = torch.cat([model.get_parameter(name).abs().reshape(-1) for name in names]).detach()
    expected = ~lowest(scores[None], int(0.7 * len(scores) + 1e-6))[0]
    given = torch.cat([result.state_dict()[name].reshape(-1) for name in names])
    assert torch.equal(given != 0, expected & (scores != 0))


def test_scores_of_channels_hold_one_tensor_at_a_time() -> None:
    program = vfx.trace(network(), X)
    facts = vfx.symmetry(program)
    for method in ("l1", "l2"):
        assert peak(lambda m=method: channel_scores(program, facts, m), torch.float64) <= 2 * LAYER + SMALL
    exact = vfx.trace(network().double(), X.double())  # where a cast gives the user's own tensor
    before = {name: tensor.clone() for name, tensor in exact.weights[0].items()}
    for method in ("l1", "l2", "taylor"):
        channel_scores(exact, vfx.symmetry(exact), method, data=X.double())
    assert all(torch.equal(tensor, before[name]) for name, tensor in exact.weights[0].items())


def _apart() -> tuple[nn.Module, Program]:
    """A module and a Program of another network."""
    program = vfx.trace(network(), X)
    module = emit(program)[0]
    with torch.no_grad():
        module[2].weight.neg_()
    return module, program


@torch.no_grad()
def test_networks_that_are_far_apart_are_not_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, program = _apart()
    assert emission.APART < difference(module, program) < math.inf
    calls = []
    monkeypatch.setattr(emission, "_difference_at_once", lambda *given: calls.append(given) or 1.0)
    difference(module, program)
    assert not calls
    module[2].weight.neg_()
    module[2].weight.mul_(1 + 1e-4)  # what rounding might explain is looked at closely
    assert difference(module, program) > PRESERVED
    assert calls


@torch.no_grad()
def test_a_comparison_that_fails_leaves_nothing_behind() -> None:
    class Casting(nn.Module):
        """It runs in float32 whatever it holds: in float64 its own tensors do not fit."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, WIDTH)
            self.more = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.more(self.fc(x).float())

    program = vfx.trace(Casting(), X)
    module = emit(program)[0]
    gc.collect()
    gc.disable()
    try:
        with Alive(torch.float64) as alive:
            for _ in range(5):
                assert emission._difference_at_once(module, program) <= PRESERVED
    finally:
        gc.enable()
    assert alive.peak <= 4 * LAYER + SMALL


@torch.no_grad()
def test_a_tied_table_is_held_once_in_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, tokens = gpt_tiny(0.25, vocabulary=4096, context=8, depth=2, tied=True).eval(), torch.randint(4096, (2, 4))
    table = 2 * model.head.weight.nbytes  # in float64
    program = vfx.trace(model, tokens)
    remove = lambda: vfx.RemoveChannels(0.5)(program)  # noqa: E731
    logits = 2 * 4 * 4096 * 8
    assert peak(remove, torch.float64) <= table + 8 * logits
    monkeypatch.setattr(MaskedRun, "_looks_up", lambda *_: False)  # negative control
    assert peak(remove, torch.float64) > 1.9 * table


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone keeps what was freed")
def test_what_was_freed_goes_back_where_it_is_much() -> None:
    assert not garbage.give_back(garbage.LARGE - 1)
    assert garbage.give_back(garbage.LARGE)
