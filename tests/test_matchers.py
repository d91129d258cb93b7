"""Contracts of all matchers, by registry: what every matcher promises, whatever it finds and on whatever network."""

from __future__ import annotations

import copy
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from inspect import isabstract
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, transported
from micro_models import conv, net
from torch import Tensor, nn
from vfx.passes.align import Align
from vfx.passes.interpolate import Interpolate
from vfx.passes.transform import Transform

import vfx
import vfx.match
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import preserved
from vfx.api import merge, trace
from vfx.elements import check_elements, exact_part, identity
from vfx.errors import ArchitectureError, ArgumentError
from vfx.match.carry import AcrossWidths
from vfx.match.catalogue import CLASSED, MATCHERS, RESTARTED, matcher, name_of
from vfx.match.cca import CCAMerging
from vfx.match.first_layers import FirstLayers
from vfx.match.matcher import Known, Matcher, Matching, Problem
from vfx.match.partial import PartialMatching
from vfx.match.transport import OptimalTransport
from vfx.match.zipit import ZipIt
from vfx.program import Program
from vfx.proof import PRESERVED
from vfx.statistics.collect import Statistics, collect

PICTURES = images(48, 6, dtype=torch.float64)
TOKENS = torch.randn(48, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _residual(width: int = 6) -> nn.Module:
    """A residual stream with BatchNorm and GELU, whose channels permutations alone move."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        s = F.gelu(self.norm(self.stem(x)))
        s = F.gelu(s + self.down(F.gelu(self.up(s))))
        return self.head(s.mean((2, 3)))

    layers = {"stem": conv(3, width), "up": conv(width, 7), "down": conv(7, width), "head": nn.Linear(width, 4)}
    return net(forward, norm=nn.BatchNorm2d(width), **layers)


def _attention(width: int = 6) -> nn.Module:
    """Two heads between linear layers: blocks, and queries that move with keys."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (getattr(self, n)(h).unflatten(-1, (2, -1)).transpose(1, 2) for n in "qkv")
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(F.silu(h).mean(1))

    layers = {name: nn.Linear(width, width) for name in ("q", "k", "v", "out")}
    return net(forward, embed=nn.Linear(6, width), head=nn.Linear(width, 3), **layers)


NETWORKS: Mapping[str, tuple[Callable[..., nn.Module], Tensor]] = {
    "residual": (_residual, PICTURES),
    "attention": (_attention, TOKENS),
}

# every matcher under its name in the catalogue, and what it takes besides
TABLE: Mapping[str, Callable[[], Matcher]] = {
    **{name: (lambda name=name: MATCHERS[name]()) for name in MATCHERS},
    "weight, permutation": lambda: matcher("weight", classes="permutation"),  # type: ignore[dict-item, return-value]
    "activation, permutation": lambda: matcher("activation", classes="permutation"),  # type: ignore[dict-item, return-value]
    "ot, weight": lambda: OptimalTransport(cost="weight"),
    "ot, sinkhorn": lambda: OptimalTransport("sinkhorn"),
    "pleas, apart": lambda: PartialMatching(apart=0.5),
    "first layers": lambda: FirstLayers("activation", 2),
}
SOFT = {"ot, sinkhorn", "cca"}  # entropy and a ridge keep their maps away from one-to-one, even between equals
ALIKE = [(name, kind) for name in TABLE for kind in NETWORKS]
each_matcher = pytest.mark.parametrize("name", TABLE)
on_each_network = pytest.mark.parametrize(("name", "kind"), ALIKE)


class Setting(NamedTuple):
    """A Program of edges with all that a matcher may read of them."""

    program: Program
    facts: Symmetry
    statistics: Statistics
    data: Tensor

    def problem(self, needs: frozenset[str] = frozenset({"features", "within", "data"}), seed: int = 0) -> Problem:
        """What there is to match, with no more than what a matcher says it needs."""
        known = "features" in needs or "within" in needs
        data = self.data if "data" in needs else None
        return Problem(self.program, self.facts, self.statistics if known else None, data=data, seed=seed)


def _setting(models: list[nn.Module], x: Tensor, within: bool = True) -> Setting:
    program = trace(models, x[:2])
    facts = symmetry(program)
    return Setting(program, facts, collect(program, facts, x, within=within, progress=False), x)


@cache
def _apart(kind: str) -> Setting:
    """Two networks that were drawn apart."""
    build, x = NETWORKS[kind]
    return _setting(edges(build, x), x)


@cache
def _equal(kind: str) -> Setting:
    build, x = NETWORKS[kind]
    (model,) = edges(build, x, 1)
    return _setting([model, copy.deepcopy(model)], x)


@cache
def _moved(kind: str) -> Setting:
    """A network and the same with permuted channels."""
    build, x = NETWORKS[kind]
    (model,) = edges(build, x, 1)
    return _setting([model, transported(model, x, seed=4)[0]], x)


def _values(found: Matching) -> list[Any]:
    """All that a matching says of the edges, as plain arrays."""
    elements = [
        (edge, group, [one.index, one.matrix, one.dual, *(one.scales[side] for side in sorted(one.scales))])
        for edge, own in enumerate(found.elements)
        for group, one in sorted(own.items())
    ]
    return [elements, found.objective, sorted(found.apart.items()), found.notes]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)


def test_every_matcher_is_in_the_table() -> None:
    modules = [import_module(f"vfx.match.{found.name}") for found in pkgutil.iter_modules(vfx.match.__path__)]
    classes = {one for module in modules for one in vars(module).values() if isinstance(one, type)}
    matchers = {one for one in classes if _matches(one) and not isabstract(one)}
    assert matchers - {Matcher, Known} == {type(build()) for build in TABLE.values()}


def _matches(kind: type) -> bool:
    """Whether a class's call takes a Problem and gives a Matching."""
    call = next((vars(base)["__call__"] for base in kind.__mro__ if "__call__" in vars(base)), None)
    hints = getattr(call, "__annotations__", {})
    return hints.get("problem") == "Problem" and hints.get("return") == "Matching"


@pytest.mark.parametrize("name", MATCHERS)
def test_a_matcher_has_its_name(name: str) -> None:
    found = matcher(name)
    assert isinstance(found, Matcher)
    assert name_of(found) == name
    assert found.needs <= {"features", "within", "data"}


@on_each_network
def test_one_seed_one_answer(name: str, kind: str) -> None:
    setting = _apart(kind)
    state = torch.get_rng_state()
    first, second = (TABLE[name]()(setting.problem(seed=3)) for _ in range(2))
    assert _same(_values(first), _values(second))
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers are the user's"
    assert any(index.tolist() != sorted(index) for index in first.permutations[1].values()), "it moved something"


@on_each_network
def test_elements_lie_in_their_classes_and_keep_the_function(name: str, kind: str) -> None:
    setting = _apart(kind)
    finder = TABLE[name]()
    found = finder(setting.problem())
    assert len(found.elements) == setting.program.edges
    assert found.is_exact or not finder.exact
    for edge, own in enumerate(found.elements):
        assert set(own) <= {group.index for group in setting.facts.groups}
        for group, element in own.items():
            size = setting.facts.group(group).size
            index = np.broadcast_to(np.arange(size), element.index.shape if element.index is not None else (size,))
            assert element.index is None or np.array_equal(np.sort(element.index, -1), index)
        exact = check_elements(setting.facts, exact_part(own))
        assert preserved(setting.facts, setting.program.weights[edge], exact) <= PRESERVED
    if finder.exact:
        still = identity(setting.facts)
        assert all(np.array_equal(still[g].index, one.index) for g, one in found.elements[0].items())


def test_a_map_out_of_its_class_is_seen() -> None:
    """The negative control of the test above: BatchNorm lets permutations pass, not scales of one side alone."""
    setting = _apart("residual")
    group = next(group for group in setting.facts.groups if group.size == 6)
    side = setting.facts.classes[group.index].sides[0].index
    wrong = {group.index: vfx.elements.Element(np.arange(6), scales={side: np.full(6, 2.0)})}
    with pytest.raises(ArgumentError):
        check_elements(setting.facts, wrong)


@on_each_network
def test_a_network_with_itself_stays_itself(name: str, kind: str) -> None:
    setting, finder = _equal(kind), TABLE[name]()
    merged = _midpoint(setting, finder)
    wanted = setting.program(setting.data)
    if name in SOFT:
        assert float((merged(setting.data) - wanted).norm() / wanted.norm()) < 1
        return
    close(merged(setting.data), wanted, 1e-8)


@on_each_network
def test_a_moved_copy_is_brought_back(name: str, kind: str) -> None:
    setting, finder = _moved(kind), TABLE[name]()
    wanted = setting.program(setting.data)
    if name in SOFT or name == "first layers":  # it leaves later layers where they are
        return
    close(_midpoint(setting, finder)(setting.data), wanted, 1e-8)
    left = Interpolate()(setting.program)(setting.data)
    assert float((left - wanted).norm() / wanted.norm()) > 1e-2, "without a matching the copies do not fit"


def _midpoint(setting: Setting, finder: Matcher) -> Program:
    aligned = Align(finder, setting.data, statistics=setting.statistics, progress=False)(setting.program)
    return Interpolate()(Transform()(aligned))


@each_matcher
def test_the_users_models_stay_as_they_were(name: str) -> None:
    build, x = NETWORKS["residual"]
    models = edges(build, x)
    before = [{key: (tensor, tensor.clone()) for key, tensor in model.state_dict().items()} for model in models]
    merge(models, x[:2], data=x, match=TABLE[name](), solve=None, normalize=None, progress=False)
    for model, known in zip(models, before):
        for key, tensor in model.state_dict().items():
            assert tensor.data_ptr() == known[key][0].data_ptr()
            assert torch.equal(tensor, known[key][1])
        assert not model.training


@each_matcher
def test_other_architectures_are_refused_by_name(name: str) -> None:
    build, x = NETWORKS["residual"]
    (first,), (other,) = edges(build, x, 1), edges(build, x, 1)
    other.extra = nn.Linear(2, 2)
    with pytest.raises(ArchitectureError, match=r"extra.weight"):
        merge([first, other], x[:2], data=x, match=TABLE[name](), progress=False)


@each_matcher
def test_other_widths_are_carried_or_refused(name: str) -> None:
    """``AcrossWidths`` is declared by having ``carry``: such matchers merge other widths, the others say who does."""
    build, x = NETWORKS["residual"]
    (first,), (other,) = edges(build, x, 1), edges(lambda: build(8), x, 1, seed=1)
    finder = TABLE[name]()

    def run() -> Any:
        return merge([first, other], x[:2], data=x, match=finder, solve=None, normalize=None, progress=False)

    if isinstance(finder, AcrossWidths):
        assert run().module.stem.out_channels == 6
    else:
        with pytest.raises((ArchitectureError, ArgumentError), match="widths"):
            run()


@each_matcher
def test_a_matcher_reads_what_it_says_it_needs(name: str) -> None:
    """Without what it needs it says so; with no more than that it finds what it finds with everything."""
    setting, finder = _apart("residual"), TABLE[name]()
    if "within" not in finder.needs and "features" in finder.needs:
        build, x = NETWORKS["residual"]
        setting = _setting(edges(build, x), x, within=False)
    least = _values(TABLE[name]()(setting.problem(finder.needs)))
    assert _same(least, _values(finder(_apart("residual").problem())))
    if finder.needs:
        with pytest.raises(ArgumentError, match="data"):
            finder(setting.problem(frozenset()))


@pytest.mark.parametrize("name", MATCHERS)
def test_restarts_and_classes_are_taken_by_those_that_declare_them(name: str) -> None:
    setting = _apart("residual")
    if name in RESTARTED:
        found = matcher(name, restarts=2)
        assert found is not None
        assert len(found(setting.problem()).attempts) == 3
    else:
        with pytest.raises(ArgumentError, match="takes none here"):
            matcher(name, restarts=2)
    assert (getattr(matcher(name, classes="permutation"), "classes", None) == "permutation") == (name in CLASSED)


@pytest.mark.parametrize("name", [name for name in TABLE if not TABLE[name]().exact])
def test_what_is_not_exact_finds_more_than_permutations(name: str) -> None:
    """A matcher that declares that it is not exact mixes channels somewhere, or keeps some apart."""
    kind = {ZipIt: "attention", CCAMerging: "attention"}.get(type(TABLE[name]()), "residual")
    found = TABLE[name]()(_apart(kind).problem())
    assert not found.is_exact or found.apart


_OBJECTIVES = """
import torch, vfx
from vfx.models import resnet20_ln
torch.manual_seed(0)
edges = [resnet20_ln(width=0.25).eval() for _ in range(2)]
program = vfx.trace(edges, torch.randn(2, 3, 16, 16))
finder = vfx.Align("weight", verify=False, classes="permutation")
print(repr(finder.run(program).record.matching.objective))
"""


def test_names_are_summed_in_one_order_in_every_process() -> None:
    """Sets of names stand in another order in every process; what is summed over them may not."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", _OBJECTIVES],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        for seed in ("1", "2")
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
