"""Preserve-First Merging equals networks composed by hand: prefixes of each edge, weighted sums, the merged rest.

The references below are plain module code. They know nothing of vfx's graphs and cuts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, network
from test_matching import concatenated, depthwise, grouped, residual, squeeze_excite
from torch import Tensor, fx, nn
from vfx.passes.align import Align
from vfx.passes.duplicate_branches import DuplicateBranches
from vfx.passes.interpolate import Interpolate

from vfx.analyse.cost import cost
from vfx.api import layers, merge, profile, symmetry, trace
from vfx.api.budgets import cuts_within
from vfx.models import resnet20_bn, resnet20_fixup, resnet20_plain, vgg16, vgg16_bn, vgg16_ln
from vfx.program import Program

X = images(3, dtype=torch.float64)
TOLERANCE = 1e-10  # float64; the issue asks for 1e-6
State = dict[str, Tensor]
Step = Callable[[nn.Module, State], State]


def vgg(width: float = 0.125) -> nn.Module:
    return vgg16_bn(width=width)


def resnet(width: float = 0.25) -> nn.Module:
    return resnet20_bn(width=width)


# references by hand ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def averaged(models: Sequence[nn.Module], alphas: Sequence[float]) -> nn.Module:
    """θ = Σ αᵢ θᵢ, tensor by tensor."""
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    merged.load_state_dict(
        {k: sum(a * s[k] for a, s in zip(alphas, states)) if v.is_floating_point() else v for k, v in states[0].items()}
    )
    return merged


def vgg_steps(model: Any, join: str) -> list[list[Step]]:
    """Segment l: what runs between join l and join l + 1 (segment 0 ends at the first join)."""
    parts: list[tuple[bool, Step]] = [
        (isinstance(m, nn.Conv2d), lambda net, s, i=i: {"x": net.features[i](s["x"])})
        for i, m in enumerate(model.features)
    ]
    parts.append((False, lambda net, s: {"x": net.avgpool(s["x"]).flatten(1)}))
    parts.append((True, lambda net, s: {"x": net.classifier(s["x"])}))
    segments: list[list[Step]] = [[]]
    for counts, step in parts:
        if counts and join == "activation":  # the next conv opens a segment
            segments.append([])
        segments[-1].append(step)
        if counts and join == "preactivation":  # a conv closes its segment
            segments.append([])
    return segments


def resnet_steps(model: Any, join: str) -> list[list[Step]]:
    """As above, for a ResNet with BatchNorm: ``s`` is the stream, ``h`` the branch, ``p`` the shortcut's output."""
    blocks = [(stage, index) for stage in ("layer1", "layer2", "layer3") for index in range(3)]

    def first(stage: str, i: int) -> Step:
        return lambda net, v: {"s": v["s"], "h": getattr(net, stage)[i].conv1(v["s"])}

    def between(stage: str, i: int) -> Step:
        return lambda net, v: {"s": v["s"], "h": F.relu(getattr(net, stage)[i].bn1(v["h"]))}

    def second(stage: str, i: int) -> Step:
        def run(net: Any, v: State) -> State:
            block = getattr(net, stage)[i]
            skip = block.shortcut[0](v["s"]) if len(block.shortcut) else v["s"]
            return {"p": skip, "h": block.conv2(v["h"])}

        return run

    def close_(stage: str, i: int) -> Step:
        def run(net: Any, v: State) -> State:
            block = getattr(net, stage)[i]
            skip = block.shortcut[1](v["p"]) if len(block.shortcut) else v["p"]
            return {"s": F.relu(block.bn2(v["h"]) + skip)}

        return run

    chain: list[tuple[Step, Step]] = [
        (lambda net, v: {"h": net.conv1(v["x"])}, lambda net, v: {"s": F.relu(net.bn1(v["h"]))})
    ]
    for stage, index in blocks:
        chain += [(first(stage, index), between(stage, index)), (second(stage, index), close_(stage, index))]
    chain[-1] = (chain[-1][0], lambda net, v, last=chain[-1][1]: {"s": last(net, v)["s"].mean((2, 3))})
    chain.append((lambda net, v: {"y": net.fc(v["s"])}, lambda net, v: v))
    if join == "activation":
        return [[], *([layer, behind] for layer, behind in chain)]
    segments: list[list[Step]] = [[]]
    for layer, behind in chain:
        segments[-1].append(layer)
        segments.append([behind])
    return segments


@torch.no_grad()
def by_hand(
    steps: Callable[[Any, str], list[list[Step]]],
    models: Sequence[nn.Module],
    alphas: Sequence[float],
    preserve: int,
    join: str,
    x: Tensor,
) -> Tensor:
    """Each edge's first layers, a weighted sum of all that goes on, the average network's rest."""
    segments = steps(models[0], join)
    cut = preserve + 1 if join == "activation" else preserve
    states = [_through(segments[:cut], model, {"x": x}) for model in models]
    joined = {key: sum(a * state[key] for a, state in zip(alphas, states)) for key in states[0]}
    if not preserve:
        joined = {"x": x}
    (output,) = _through(segments[cut:], averaged(models, alphas), joined).values()
    return output


def _through(segments: list[list[Step]], model: nn.Module, state: State) -> State:
    for segment in segments:
        for step in segment:
            state = step(model, state)
    return state


BUILDS = {"vgg16_bn": (vgg, vgg_steps, 14), "resnet20_bn": (resnet, resnet_steps, 20)}
_traced: dict[tuple[str, int], tuple[list[nn.Module], Program]] = {}


def _edges(name: str, count: int = 2) -> tuple[list[nn.Module], Program]:
    if (name, count) not in _traced:
        models = edges(BUILDS[name][0], X, count)
        _traced[name, count] = models, trace(models, X[:2])
    return _traced[name, count]


def _pfm(program: Program, preserve: int | str, **options: Any) -> nn.Module:
    options = {"match": None, "normalize": None, **options}
    return merge(program, preserve=preserve, **options).module


CASES = [
    (name, preserve, join, alphas)
    for name, (_, _, total) in BUILDS.items()
    for join in ("preactivation", "activation")
    for preserve in range(total + 1)
    for alphas in ([(0.5, 0.5), (0.3, 0.7)] if preserve % 7 == 1 else [(0.3, 0.7)])
]


@pytest.mark.parametrize(("name", "preserve", "join", "alphas"), CASES)
def test_pfm_is_the_network_composed_by_hand(name: str, preserve: int, join: str, alphas: tuple[float, float]) -> None:
    models, program = _edges(name)
    module = _pfm(program, preserve, join=join, weights=alphas)
    expected = by_hand(BUILDS[name][1], models, alphas, preserve, join, X)
    with torch.no_grad():
        close(module(X), expected, TOLERANCE)
    assert isinstance(module, fx.GraphModule) == (preserve > 0)


@pytest.mark.parametrize("name", BUILDS)
def test_the_reference_tells_cuts_joins_and_weights_apart(name: str) -> None:
    """Negative control: neighbouring cuts, the other join and other weights give other outputs."""
    _, steps, total = BUILDS[name]
    models, _ = _edges(name)
    base = by_hand(steps, models, (0.3, 0.7), 5, "preactivation", X)
    others = [
        by_hand(steps, models, (0.3, 0.7), 4, "preactivation", X),
        by_hand(steps, models, (0.3, 0.7), 6, "preactivation", X),
        by_hand(steps, models, (0.3, 0.7), 5, "activation", X),
        by_hand(steps, models, (0.5, 0.5), 5, "preactivation", X),
    ]
    assert all((other - base).abs().max() > 1e-4 * base.abs().max() for other in others)
    for join in ("preactivation", "activation"):
        with torch.no_grad():  # with all weight on one edge every cut is that edge
            close(by_hand(steps, models, (0.0, 1.0), total // 2, join, X), models[1](X), 1e-12)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("preserve", [3, 8, 13])
def test_permutations_are_folded_into_the_branches(name: str, preserve: int) -> None:
    """With aligned edges the join is a plain weighted sum of the aligned prefixes."""
    models, program = _edges(name)
    aligned = Align("weight", preserve=preserve)(program)
    moved = [copy.deepcopy(model) for model in models]
    for model, weights in zip(moved, aligned.weights):
        model.load_state_dict(weights)
    assert any(not torch.equal(a, b) for a, b in zip(moved[1].parameters(), models[1].parameters()))
    module = _pfm(program, preserve, match="weight")
    with torch.no_grad():
        close(module(X), by_hand(BUILDS[name][1], moved, (0.5, 0.5), preserve, "preactivation", X), TOLERANCE)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("preserve", [1, 8])
def test_three_edges(name: str, preserve: int) -> None:
    models, program = _edges(name, 3)
    alphas = (0.2, 0.5, 0.3)
    module = _pfm(program, preserve, weights=alphas)
    expected = by_hand(BUILDS[name][1], models, alphas, preserve, "preactivation", X)
    with torch.no_grad():
        close(module(X), expected, TOLERANCE)


@pytest.mark.parametrize("name", BUILDS)
def test_nothing_preserved_is_plain_interpolation(name: str) -> None:
    models, program = _edges(name)
    result = merge(program, match=None, normalize=None, weights=0.7)
    assert type(result.module) is type(models[0])
    for key, tensor in averaged(models, (0.3, 0.7)).state_dict().items():
        close(result.module.state_dict()[key], tensor, 1e-14)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("match", [None, "weight"])
def test_everything_preserved_is_the_ensemble_of_logits(name: str, match: str | None) -> None:
    models, program = _edges(name)
    module = _pfm(program, BUILDS[name][2], match=match, weights=(0.3, 0.7))
    with torch.no_grad():
        close(module(X), 0.3 * models[0](X) + 0.7 * models[1](X), TOLERANCE)
    own = sum(p.numel() for p in models[0].parameters())
    assert sum(p.numel() for p in module.parameters()) == 2 * own


@pytest.mark.parametrize(
    ("name", "preserve", "number", "join"),
    [
        ("vgg16_bn", "features.0", 1, "preactivation"),
        ("vgg16_bn", "features.2", 1, "activation"),  # a module without layers: the ReLU behind the first norm
        ("vgg16_bn", "features.7", 3, "preactivation"),
        ("vgg16_bn", "features", 13, "activation"),
        ("vgg16_bn", "classifier", 14, "preactivation"),
        ("resnet20_bn", "conv1", 1, "preactivation"),
        ("resnet20_bn", "layer1", 7, "activation"),
        ("resnet20_bn", "layer2.1", 11, "activation"),
        ("resnet20_bn", "layer2", 13, "activation"),
        ("resnet20_bn", "layer2.0.conv1", 8, "preactivation"),
        ("resnet20_bn", "fc", 20, "preactivation"),
    ],
)
def test_everything_up_to_and_including_a_module_stays_separate(
    name: str, preserve: str, number: int, join: str
) -> None:
    models, program = _edges(name)
    assert layers(program).number(preserve) == number
    module = _pfm(program, preserve, weights=(0.3, 0.7))
    expected = by_hand(BUILDS[name][1], models, (0.3, 0.7), number, join, X)
    close(module(X), expected, TOLERANCE)
    inside = {key for key in models[0].state_dict() if key.startswith(preserve + ".")}
    assert {f"branches.{edge}.{key}" for edge in range(2) for key in inside} <= set(module.state_dict())


def test_join_activation_keeps_what_follows_a_module_up_to_the_next_layer() -> None:
    models, program = _edges("resnet20_bn")
    module = _pfm(program, "layer2.0.conv1", join="activation", weights=(0.3, 0.7))
    close(module(X), by_hand(resnet_steps, models, (0.3, 0.7), 8, "activation", X), TOLERANCE)


# any graph ------------------------------------------------------------------------------------------------------------

SMALL = X[:, :, :8, :8].contiguous()
ANY = {
    "residual": (residual, SMALL),
    "concatenated": (concatenated, SMALL),
    "depthwise": (depthwise, SMALL),
    "squeeze_excite": (squeeze_excite, SMALL),
    "grouped": (grouped, SMALL),
    "vgg16_ln": (lambda: vgg16_ln(width=0.0625), X),
    "resnet20_plain": (lambda: resnet20_plain(width=0.25), X),
    "resnet20_fixup": (lambda: resnet20_fixup(width=0.25), X),
}


@pytest.mark.parametrize("name", ANY)
def test_with_all_weight_on_one_edge_every_cut_is_that_edge(name: str) -> None:
    build, x = ANY[name]
    models = edges(build, x)
    program = trace(models, x[:2])
    total = len(layers(program))
    chosen = range(total + 1) if total < 10 else (1, total // 2, total - 1)
    with torch.no_grad():
        expected = [model(x) for model in models]
        for join in ("preactivation", "activation"):
            for preserve in chosen:
                for edge, weights in enumerate([(1.0, 0.0), (0.0, 1.0)]):
                    close(_pfm(program, preserve, join=join, weights=weights)(x), expected[edge], TOLERANCE)
                same = _pfm(trace_same(program), preserve, join=join, weights=(0.25, 0.75))
                close(same(x), expected[0], TOLERANCE)


def trace_same(program: Program) -> Program:
    """A and A."""
    return program.with_weights([program.weights[0], program.weights[0]])


@pytest.mark.parametrize("name", ["residual", "squeeze_excite"])
def test_a_merged_part_is_shared_and_a_branch_is_not(name: str) -> None:
    build, x = ANY[name]
    program = trace(edges(build, x), x[:2])
    module = _pfm(program, 2)
    names = set(module.state_dict())
    assert (
        {n for n in names if n.startswith("branches.0.")}
        == {n.replace("branches.1.", "branches.0.") for n in names if n.startswith("branches.1.")}
        != set()
    )
    preserved = {n.removeprefix("branches.0.") for n in names if n.startswith("branches.0.")}
    assert preserved | {n for n in names if not n.startswith("branches.")} == set(network(build, x).state_dict())


# the paper's figures --------------------------------------------------------------------------------------------------


def test_the_papers_pfm_8_of_14_has_its_parameters_and_flops() -> None:
    x = images(2)
    torch.manual_seed(0)
    program = trace([vgg16(), vgg16()], x)
    for join, ratio in (("preactivation", 1.66905), ("activation", 1.66908)):
        result = merge(program, preserve=8, match=None, join=join)  # type: ignore[arg-type]
        assert result.report.profile.params == 17_635_466
        assert sum(p.numel() for p in result.module.parameters()) == 17_635_466
        assert result.report.flops_ratio == pytest.approx(ratio, abs=1e-5)
        assert result.report.params_ratio == pytest.approx(1.198076, abs=1e-6)
        assert profile(result).params == 17_635_466
    assert symmetry(program).channels == 4224


def test_a_budget_of_two_figures_keeps_both() -> None:
    """Early convolutions cost many FLOPs and few parameters."""
    x = images(2, size=8)
    program = trace(
        edges(lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 50), nn.ReLU(),
            nn.Linear(50, 4),
        ), x),
        x,
    )  # fmt: skip
    whole = cost(program.select(0))
    ratios = [cost(Interpolate()(DuplicateBranches(cut)(program))).ratio(whole) for cut in range(5)]
    of = lambda name, cut: {name: ratios[cut][name]}  # noqa: E731
    assert cuts_within(of("params", 3), program, 4) == [0, 1, 3]
    assert cuts_within(of("flops", 1), program, 4) == [0, 1]
    assert cuts_within(of("params", 3) | of("flops", 1), program, 4) == [0, 1]
    assert cuts_within(of("params", 1) | of("flops", 3), program, 4) == [0, 1]
