"""Passes: each keeps its contract, leaves its input alone, and computes what its formula says, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, network, node_values
from micro_models import conv, net
from test_matching import concatenated, residual
from torch import Tensor, fx, nn
from vfx.passes.align import Align
from vfx.passes.balance_attention import BalanceAttention
from vfx.passes.balance_scales import BalanceScales
from vfx.passes.calibrate_bias import CalibrateBias
from vfx.passes.calibrate_normalization import CalibrateNormalization
from vfx.passes.center_stream import CenterStream
from vfx.passes.combine import Combine
from vfx.passes.duplicate_branches import DuplicateBranches
from vfx.passes.duplicate_heads import DuplicateHeads
from vfx.passes.fold_channels import FoldChannels
from vfx.passes.fold_gain import FoldGain
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.insert_normalization import InsertNormalization
from vfx.passes.interpolate import Interpolate
from vfx.passes.mask_weights import MaskWeights
from vfx.passes.principal_basis import PrincipalBasis
from vfx.passes.reconstruct import Reconstruct
from vfx.passes.remove_bias import RemoveBias
from vfx.passes.remove_blocks import RemoveBlocks
from vfx.passes.remove_channels import RemoveChannels
from vfx.passes.rescale_weights import RescaleWeights
from vfx.passes.reset_batchnorm import ResetBatchNorm
from vfx.passes.restore_structure import RestoreStructure
from vfx.passes.to_first_width import ToFirstWidth
from vfx.passes.transform import Transform
from vfx.passes.untie_weights import UntieWeights
from vfx.passes.use_batch_statistics import UseBatchStatistics

from vfx.analyse.affines import affines
from vfx.analyse.layers import _numbered, number_layers
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.symmetry import symmetry as infer_symmetry
from vfx.api import collect, compile, layers, merge, repair, symmetry, trace
from vfx.combine.regmean_plus import RegMeanPlus
from vfx.elements import Acting
from vfx.errors import ArgumentError, DataError, PassError, VerificationError
from vfx.match.weight import WeightMatching
from vfx.models import resnet20_bn, resnet20_ln, resnet20_plain, vgg16, vgg16_bn, vgg16_ln
from vfx.program import Facts, Program
from vfx.rewrite import Pass, PassResult

DATA = images(24, 8, dtype=torch.float64)
PICTURES = images(16, 32, dtype=torch.float64)
TOKENS = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ALPHAS = (0.3, 0.7)


def _plain() -> nn.Module:
    return nn.Sequential(conv(3, 5), nn.ReLU(), conv(5, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4))


def _narrow() -> nn.Module:
    """``_plain`` with fewer channels."""
    return nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 64, 4))


def _attention() -> nn.Module:
    """A residual attention block on tokens (N, 4, 6), between LayerNorms."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.embed(x)
        z = self.norm(h)
        q, k, v = (layer(z) for layer in (self.q, self.k, self.v))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v))
        return self.head(self.last(h).mean(1))

    layers = {name: nn.Linear(6, 6) for name in ("embed", "q", "k", "v", "out")}
    norms = {name: nn.LayerNorm(6) for name in ("norm", "last")}
    return net(forward, head=nn.Linear(6, 3), **layers, **norms)


def _two_blocks() -> nn.Module:
    """Two residual blocks on tokens (N, 4, 6)."""
    layers = {name: nn.Linear(6, 6) for name in ("first", "second")}
    return net(
        lambda self, x: self.head((h := x + self.first(x).relu()) + self.second(h).relu()),
        head=nn.Linear(6, 3),
        **layers,
    )


def _bases() -> nn.Module:
    """What the edges of ``_normed`` may come from, as far as a pass can tell."""
    return network(_normed, DATA, 5)


def _tied() -> nn.Module:
    """Two layers of one weight."""
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(24, 3))


def _normed() -> nn.Module:
    return nn.Sequential(
        conv(3, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 6, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 64, 4),
    )  # fmt: skip


def _program(build: Callable[[], nn.Module] = _plain, x: Tensor = DATA, count: int = 2) -> Program:
    return trace(edges(build, x, count), x[:2])


def _merged(program: Program, data: Any = DATA, preserve: int = 0) -> Program:
    """The edges' average with goal statistics, not aligned."""
    for one in (Align(None, data, progress=False), DuplicateBranches(preserve, ALPHAS), Interpolate(ALPHAS)):
        program = one(program)
    return program


def _inserted(program: Program, data: Any = DATA) -> Program:
    return InsertNormalization()(_merged(program, data))


def _statistics(x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    flat = x.movedim(dim, 0).flatten(1)
    return flat.mean(1), flat.std(1, correction=0)


# contracts ------------------------------------------------------------------------------------------------------------

# name: (pass, the Program it runs on)
TABLE: dict[str, tuple[Callable[[], Pass], Callable[[], Program]]] = {
    "Align weight": (lambda: Align("weight"), lambda: _program(residual)),
    "Align activation": (lambda: Align("activation", DATA, progress=False), lambda: _program(residual)),
    "Align None": (lambda: Align(None, DATA, progress=False), lambda: _program(residual)),
    "CalibrateBias": (lambda: CalibrateBias(ALPHAS), lambda: _program()),
    "DuplicateBranches": (lambda: DuplicateBranches(3, ALPHAS), lambda: _program(residual)),
    "DuplicateBranches activation": (
        lambda: DuplicateBranches(2, ALPHAS, "activation"),
        lambda: _program(concatenated),
    ),
    "Combine": (lambda: Combine("ties", base=_bases()), lambda: _program(_normed)),
    "Combine regmean++": (lambda: Combine(RegMeanPlus([DATA, DATA[:4]])), lambda: _program(_normed)),
    "Interpolate": (lambda: Interpolate(ALPHAS), lambda: _program(_normed)),
    "InsertNormalization": (lambda: InsertNormalization(), lambda: _merged(_program())),
    "CalibrateNormalization repair": (
        lambda: CalibrateNormalization("repair", DATA, progress=False),
        lambda: _inserted(_program()),
    ),
    "CalibrateNormalization rescale": (
        lambda: CalibrateNormalization("rescale", DATA, progress=False),
        lambda: _inserted(_program(residual)),
    ),
    "FoldNormalization": (lambda: FoldNormalization(), lambda: _inserted(_program())),
    "FoldNormalization batch_norm": (
        lambda: FoldNormalization(batch_norm=True),
        lambda: Interpolate()(_program(_normed)),
    ),
    "RescaleWeights": (lambda: RescaleWeights(ALPHAS), lambda: _program()),
    "FoldGain": (lambda: FoldGain(), lambda: _program(_attention, TOKENS)),
    "CenterStream": (lambda: CenterStream(), lambda: _program(_attention, TOKENS)),
    "BalanceScales": (lambda: BalanceScales(), lambda: _program()),
    "BalanceAttention": (lambda: BalanceAttention(), lambda: _program(_attention, TOKENS)),
    "PrincipalBasis": (
        lambda: PrincipalBasis(TOKENS, progress=False),
        lambda: Interpolate()(_program(_attention, TOKENS)),
    ),
    "RestoreStructure": (
        lambda: RestoreStructure(_program(_attention, TOKENS)),
        lambda: CenterStream()(_program(_attention, TOKENS)),
    ),
    "UseBatchStatistics repair": (lambda: UseBatchStatistics("repair"), lambda: _merged(_program())),
    "UseBatchStatistics reset": (lambda: UseBatchStatistics("reset"), lambda: Interpolate()(_program(_normed))),
    "RemoveBias": (lambda: RemoveBias(2), lambda: Interpolate()(_program())),
    "ResetBatchNorm": (lambda: ResetBatchNorm(DATA, progress=False), lambda: Interpolate()(_program(_normed))),
    "DuplicateHeads": (lambda: DuplicateHeads(1, ALPHAS), lambda: _program(residual)),
    "ToFirstWidth": (
        lambda: ToFirstWidth([_program(_narrow).select(1)], WeightMatching(), DATA, layers=True, progress=False),
        lambda: _program().select(0),
    ),
    "Transform": (lambda: Transform(), lambda: Align("zipit", DATA, progress=False)(_program())),
    "UntieWeights": (lambda: UntieWeights(), lambda: _program(_tied, TOKENS)),
    "MaskWeights": (lambda: MaskWeights("magnitude", 0.5, progress=False), lambda: Interpolate()(_program())),
    "RemoveChannels": (lambda: RemoveChannels(0.5, progress=False), lambda: Interpolate()(_program(_normed))),
    "RemoveBlocks": (lambda: RemoveBlocks(0.5, TOKENS), lambda: Interpolate()(_program(_two_blocks, TOKENS))),
    "FoldChannels": (lambda: FoldChannels(0.5), lambda: Interpolate()(_program(_normed))),
    "Reconstruct": (lambda: Reconstruct(_program(), DATA, progress=False), lambda: Interpolate()(_program())),
}
ANALYSES = {"symmetry": infer_symmetry, "layers": number_layers}  # by what ``Facts`` calls them


def _classes() -> set[type[Pass[Any]]]:
    """Every pass there is."""
    files = Path(__file__).parents[1].joinpath("passes").glob("*.py")
    modules = [import_module(f"vfx.passes.{file.stem}") for file in files]
    found = {one for module in modules for one in vars(module).values() if isinstance(one, type)}
    return {one for one in found if issubclass(one, Pass) and one is not Pass}


def test_every_pass_is_in_the_table() -> None:
    assert {type(build()) for build, _ in TABLE.values()} == _classes()
    assert all(type(build()).__name__ == name.split()[0] for name, (build, _) in TABLE.items())


@pytest.mark.parametrize("name", TABLE)
def test_a_pass_leaves_its_input_as_it_was(name: str) -> None:
    build, source = TABLE[name]
    program = source()
    graph, notes, goals = str(program.graph), program.notes, dict(program.goals)
    identities = [{key: id(tensor) for key, tensor in weights.items()} for weights in program.weights]
    copies = [{key: tensor.clone() for key, tensor in weights.items()} for weights in program.weights]
    metadata = [dict(node.meta) for node in program.graph.nodes]
    result = build()(program)
    assert result is not program
    assert str(program.graph) == graph
    assert program.notes == notes
    assert dict(program.goals) == goals
    assert [dict(node.meta) for node in program.graph.nodes] == metadata
    for weights, before, ids in zip(program.weights, copies, identities):
        assert {key: id(tensor) for key, tensor in weights.items()} == ids
        assert all(torch.equal(weights[key], tensor) for key, tensor in before.items())
    changed = (
        str(result.graph) != graph
        or result.edges > program.edges
        or any(
            set(new) != set(old) or any(not torch.equal(new[key], old[key]) for key in old)
            for new, old in zip(result.weights, copies)
        )
    )
    assert changed or name == "Align None"
    result.graph.lint()


@pytest.mark.parametrize("name", TABLE)
def test_a_pass_is_the_same_after_it_ran(name: str) -> None:
    build, source = TABLE[name]
    one = build()
    before = dict(vars(one))
    one(source())
    assert vars(one).keys() == before.keys()
    assert all(vars(one)[key] is value for key, value in before.items())


@pytest.mark.parametrize("name", TABLE)
def test_a_pass_reads_the_analyses_that_it_declares(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, source = TABLE[name]
    one, program = build(), source()
    read, once = set(), Facts.once

    def recorded(self: Facts, name: str, make: Callable[[], Any], *key: Any) -> Any:
        if self is program.facts and name in ANALYSES:
            read.add(ANALYSES[name])
        return once(self, name, make, *key)

    monkeypatch.setattr(Facts, "once", recorded)
    one.apply(program)
    assert read == set(one.needs)


def test_a_graph_is_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program, runs = _program(residual), []
    numbered = _numbered

    def counted(asked: Program) -> Any:
        runs.append(asked.graph)
        return numbered(asked)

    monkeypatch.setattr("vfx.analyse.layers._numbered", counted)
    halves = Interpolate(ALPHAS)(Align("weight", verify=False)(program))
    assert [layer.node for layer in number_layers(halves)] == [layer.node for layer in number_layers(program)]
    assert runs == [program.graph]
    DuplicateBranches(1)(program)
    assert len(runs) == 1
    number_layers(copy.deepcopy(program))
    assert len(runs) == 2, "a copy has a graph of its own"


@pytest.mark.parametrize("name", TABLE)
def test_a_pass_says_what_it_did(name: str) -> None:
    build, source = TABLE[name]
    program = source()
    result = build()(program)
    if name != "Align None":
        assert len(result.history) == len(program.history) + 1
        assert result.history[-1].startswith(name.split()[0])


@pytest.mark.parametrize("name", TABLE)
def test_a_pass_refuses_the_wrong_number_of_weight_sets(name: str) -> None:
    build, source = TABLE[name]
    if build().weight_sets == "any":  # of edges before they are matched, or of the merged network
        build()(source().select(0))
        return
    program, one = _program(_normed), build().weight_sets == "one"
    wrong = program if one else program.select(0)
    message = "holds 2; run Interpolate first" if one else "holds one; run it before Interpolate"
    with pytest.raises(PassError, match=message):
        build()(wrong)


@pytest.mark.parametrize("one", [FoldGain, CenterStream, BalanceScales, BalanceAttention])
def test_values_with_known_statistics_are_not_rewritten(one: type[Pass]) -> None:
    aligned = Align(None, DATA, progress=False)(_program())
    with pytest.raises(PassError, match="run it before Align"):
        one()(aligned)
    assert not one()(Interpolate()(aligned)).goals


def test_align_refuses_duplicated_branches() -> None:
    program = DuplicateBranches(1)(_program())
    with pytest.raises(PassError, match="run it before DuplicateBranches"):
        Align("weight")(program)


def test_calibration_needs_goals_and_reset_needs_batchnorm() -> None:
    program = _inserted(_program())
    with pytest.raises(PassError, match="no goal statistics"):
        CalibrateNormalization("repair", DATA, progress=False)(replace(program, goals={}))
    with pytest.raises(PassError, match=r"needs BatchNorm layers .* use 'rescale' or 'repair'"):
        ResetBatchNorm(DATA, progress=False)(Interpolate()(_program()))
    for build in (
        lambda data: CalibrateNormalization("repair", data, progress=False)(program),
        lambda data: ResetBatchNorm(data, progress=False)(Interpolate()(_program(_normed))),
    ):
        with pytest.raises(DataError, match="no samples"):
            build([])
    with pytest.raises(ArgumentError, match="kind must be 'repair', 'rescale'"):
        CalibrateNormalization("reshuffle", DATA)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="direction"):
        RemoveBias(direction="sideways")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="count must be at least 0"):
        RemoveBias(-1)


class Scales(Pass[None]):
    """A broken pass: it says that it preserves the function and scales one weight."""

    preserves_function = True

    def __init__(self, factor: float, verify: bool = True):
        self.factor, self.verify = factor, verify

    def apply(self, program: Program) -> PassResult[None]:
        sets = [dict(weights) for weights in program.weights]
        sets[-1]["2.weight"] = sets[-1]["2.weight"] * self.factor
        return PassResult(program.with_weights(sets, "Scales"))


class DropsAnOutput(Pass[None]):
    """A broken pass that returns a network without output."""

    preserves_function = True

    def apply(self, program: Program) -> PassResult[None]:
        graph = fx.Graph()
        for node in program.graph.nodes:
            if node.op == "placeholder":
                graph.placeholder(node.name)
        graph.output(())
        return PassResult(program.with_graph(graph, program.weights, "DropsAnOutput"))


class Once(Pass[None]):
    """A broken pass whose second run, the one on float64, is right."""

    preserves_function = True

    def __init__(self) -> None:
        self.runs = 0

    def apply(self, program: Program) -> PassResult[None]:
        self.runs += 1
        return Scales(1.5 if self.runs == 1 else 1.0, verify=False).run(program)


def test_a_pass_that_breaks_its_promise_is_caught() -> None:
    program = _program()
    for factor in (1.5, 1 + 1e-6, float("nan")):
        with pytest.raises(VerificationError, match="Scales changed the function of edge 1"):
            Scales(factor)(program)
    with pytest.raises(VerificationError, match="DropsAnOutput changed the function of edge 0"):
        DropsAnOutput()(program)
    with pytest.raises(VerificationError, match="Once changed the function"):
        Once()(program)
    assert Scales(1.0)(program).history == ("Scales",)
    assert Scales(1.5, verify=False)(program).history == ("Scales",)


def test_a_broken_fold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Interpolate()(_program(_normed))
    monkeypatch.setattr("vfx.passes.fold_normalization._scaled", lambda layer, weight, scale: weight)
    with pytest.raises(VerificationError, match="FoldNormalization changed the function of edge 0"):
        FoldNormalization(batch_norm=True)(program)
    FoldNormalization(batch_norm=True, verify=False)(program)


def test_a_permutation_that_changes_the_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program(residual)
    facts = symmetry(program)
    member = facts.groups[0].members[0]

    def broken(facts: Symmetry, elements: Any) -> Acting:
        return Acting(facts, elements, (member,))

    Align("weight")(program)
    monkeypatch.setattr("vfx.analyse.verify.Acting", broken)
    with pytest.raises(VerificationError, match="what was found for edge 1 changes its function"):
        Align("weight")(program)


# interpolation --------------------------------------------------------------------------------------------------------


def test_interpolation_is_the_weighted_sum() -> None:
    program = _program(_normed, count=3)
    weights = (0.2, 0.5, 0.3)
    merged = Interpolate(weights)(program)
    assert merged.edges == 1
    for name, tensor in merged.weights[0].items():
        if tensor.is_floating_point():
            expected = sum(w * one[name] for w, one in zip(weights, program.weights))
            close(tensor, expected, 1e-14)
        else:
            assert torch.equal(tensor, program.weights[0][name])


def test_goals_average_deviations_and_not_variances() -> None:
    program = _program(count=3)
    aligned = Align(None, DATA, progress=False)(program)
    weights = (0.2, 0.5, 0.3)
    merged = Interpolate(weights)(aligned)
    for node in ("conv2d", "conv2d_1", "linear"):
        naive = [_statistics(node_values(program, DATA, edge)[node]) for edge in range(3)]
        close(merged.goals[node].mean[0], sum(w * mean for w, (mean, _) in zip(weights, naive)), 1e-12)
        close(merged.goals[node].std[0], sum(w * std for w, (_, std) in zip(weights, naive)), 1e-12)


# insert and fold ------------------------------------------------------------------------------------------------------


def _image_net(*parts: nn.Module, channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        *copy.deepcopy(parts), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)
    )


def _fresh(*makers: Callable[[], nn.Module], channels: int) -> Callable[[], nn.Module]:
    return lambda: _image_net(*(make() for make in makers), channels=channels)()


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.Flatten(), nn.Linear(5 * 24, 3))


FOLDABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (_fresh(lambda: conv(3, 4), nn.ReLU, lambda: conv(4, 6), channels=6), (3, 8, 8)),
    "no bias": (_fresh(lambda: conv(3, 6, bias=False), channels=6), (3, 8, 8)),
    "grouped": (_fresh(lambda: conv(3, 6), nn.ReLU, lambda: conv(6, 9, groups=3, bias=False), channels=9), (3, 8, 8)),
    "depthwise": (_fresh(lambda: conv(3, 6), lambda: conv(6, 6, groups=6), channels=6), (3, 8, 8)),
    "transposed": (_fresh(lambda: nn.ConvTranspose2d(3, 6, 3, 2), channels=6), (3, 5, 5)),
    "transposed grouped": (
        _fresh(
            lambda: conv(3, 6), lambda: nn.ConvTranspose2d(6, 8, 3, 2, groups=2), nn.ReLU,
            lambda: nn.ConvTranspose2d(8, 12, 2, groups=4, bias=False), channels=12,
        ),
        (3, 5, 5),
    ),
    "tokens": (_tokens, (24, 8)),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 4, 3, groups=2), nn.Flatten(),
                              nn.Linear(32, 2)),
        (3, 8),
    ),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3, groups=2), nn.ReLU(), nn.ConvTranspose3d(4, 4, 2), nn.Flatten(),
                              nn.Linear(4 * 27, 2)),
        (2, 4, 4, 4),
    ),
    "residual": (residual, (3, 8, 8)),
    "concatenated": (concatenated, (3, 8, 8)),
}  # fmt: skip


def _foldable(name: str) -> tuple[Program, Tensor]:
    build, shape = FOLDABLE[name]
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return _program(build, x), x


def _with_random_affines(program: Program, seed: int = 0) -> Program:
    generator = torch.Generator().manual_seed(seed)
    weights = dict(program.weights[0])
    for name in [n for affine in affines(program) for n in (affine.scale, affine.shift)]:
        weights[name] = weights[name] + 0.5 * torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
    return program.with_weights([weights])


@pytest.mark.parametrize("name", FOLDABLE)
def test_insert_and_fold_preserve_the_outputs(name: str) -> None:
    program, x = _foldable(name)
    merged = _merged(program, x)
    inserted = InsertNormalization()(merged)
    assert len(list(affines(inserted))) >= 1
    with torch.no_grad():
        expected = merged(x)
        close(inserted(x), expected, 1e-12)
        folded = FoldNormalization()(inserted)
        assert not list(affines(folded))
        assert folded.notes == ()
        close(folded(x), expected, 1e-12)
        shaken = _with_random_affines(inserted)
        assert (shaken(x) - expected).abs().max() > 1e-3 * expected.abs().max()  # negative control
        close(FoldNormalization()(shaken)(x), shaken(x), 1e-12)


def test_inserting_and_folding_leave_the_graph_as_it_was() -> None:
    """Every layer has a bias: the user's class comes back."""
    merged = _merged(_program())
    folded = FoldNormalization()(_with_random_affines(InsertNormalization()(merged)))
    assert str(folded.graph) == str(merged.graph)
    assert not folded.structural
    assert set(folded.weights[0]) == set(merged.weights[0])


def test_normalization_stands_behind_numbered_layers_alone() -> None:
    program = _inserted(_network("resnet20_plain"), PICTURES)
    found = [affine.layer.name for affine in affines(program)]
    expected = [layer.node for layer in layers(program) if not layer.shortcut and layer.number < 20]
    assert found == expected
    chosen = InsertNormalization(layers=["layer2.0.shortcut.0", "fc"])(_merged(_network("resnet20_plain"), PICTURES))
    assert [affine.layer.name for affine in affines(chosen)] == [
        layer.node for layer in layers(chosen) if layer.fqn in ("layer2.0.shortcut.0", "fc")
    ]


def test_a_shared_weight_is_not_folded_and_both_readers_are_named() -> None:
    def build() -> nn.Module:
        return net(lambda self, x: self.fc(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3))),
                   a=conv(3, 4), b=conv(4, 4), fc=nn.Linear(4, 2))  # fmt: skip

    inserted = _with_random_affines(_inserted(_program(build)))
    folded = FoldNormalization()(inserted)
    assert [affine.layer.name for affine in affines(folded)] == ["conv2d_1", "conv2d_2"]
    refused = [note for note in folded.notes if note.startswith("not folded")]
    assert len(refused) == 2
    assert all("b.weight" in note and "conv2d_1" in note and "conv2d_2" in note for note in refused)
    with torch.no_grad():
        close(folded(DATA), inserted(DATA), 1e-12)


def test_an_output_with_other_readers_is_not_folded() -> None:
    def build() -> nn.Module:
        def forward(self: Any, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.fc((F.relu(self.norm(h)) + h).mean((2, 3)))

        return net(forward, a=conv(3, 4), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2))

    program = Interpolate()(_program(build))
    folded = FoldNormalization(batch_norm=True)(program)
    assert folded.notes == ("not folded: the output of conv2d has other readers than batch_norm",)
    assert str(folded.graph) == str(program.graph)


BATCH_NORMED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (_fresh(lambda: conv(3, 6), lambda: nn.BatchNorm2d(6), channels=6), (3, 8, 8)),
    "conv without bias": (_fresh(lambda: conv(3, 6, bias=False), lambda: nn.BatchNorm2d(6), channels=6), (3, 8, 8)),
    "no affine": (_fresh(lambda: conv(3, 6), lambda: nn.BatchNorm2d(6, affine=False), channels=6), (3, 8, 8)),
    "eps": (_fresh(lambda: conv(3, 6), lambda: nn.BatchNorm2d(6, eps=0.3), channels=6), (3, 8, 8)),
    "grouped": (_fresh(lambda: conv(3, 6, groups=3), lambda: nn.BatchNorm2d(6), channels=6), (3, 8, 8)),
    "transposed grouped": (
        _fresh(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), channels=6),
        (4, 5, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), (5,)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)),
        (3, 8),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(32, 2)),
        (2, 4, 4, 4),
    ),
    "residual": (residual, (3, 8, 8)),
}


@pytest.mark.parametrize("name", BATCH_NORMED)
def test_batchnorm_folds_into_its_layer(name: str) -> None:
    build, shape = BATCH_NORMED[name]
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    program = Interpolate()(_program(build, x))
    folded = FoldNormalization(batch_norm=True)(program)
    assert folded.notes == ()
    assert "batch_norm" not in str(folded.graph)
    assert not any("running" in name for name in folded.names())
    with torch.no_grad():
        close(folded(x), program(x), 1e-12)


UNFOLDABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "behind a ReLU": (
        _fresh(lambda: conv(3, 6), nn.ReLU, lambda: nn.BatchNorm2d(6), channels=6),
        (3, 8, 8),
        "follows relu, which is not a conv or linear layer",
    ),
    "over tokens": (  # a linear layer's channels are the last axis, BatchNorm1d's the second
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(36, 2)),
        (6, 5),
        "another axis",
    ),
    "batch statistics": (
        _fresh(lambda: conv(3, 6), lambda: nn.BatchNorm2d(6, track_running_stats=False), channels=6),
        (3, 8, 8),
        "no running statistics",
    ),
}


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_a_batchnorm_that_cannot_be_folded_stays_with_a_reason(name: str) -> None:
    build, shape, reason = UNFOLDABLE[name]
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    program = Interpolate()(_program(build, x))
    folded = FoldNormalization(batch_norm=True)(program)
    assert len(folded.notes) == 1
    assert reason in folded.notes[0]
    assert str(folded.graph) == str(program.graph)
    result = compile(program, passes=[FoldNormalization(batch_norm=True)])
    with torch.no_grad():
        close(result.module(x), program(x), 1e-12)


def test_branches_fold_too() -> None:
    program = _program(lambda: vgg16_bn(width=0.0625), PICTURES)
    merged = Interpolate()(DuplicateBranches(5)(program))
    folded = FoldNormalization(batch_norm=True)(merged)
    left = [node for node in folded.graph.nodes if "batch_norm" in node.name]
    assert len(left) == 1  # the one behind the join
    assert len(folded.notes) == 1
    with torch.no_grad():
        close(folded(PICTURES), merged(PICTURES), 1e-12)


# statistics of the result ---------------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg16": lambda: vgg16(width=0.125),
    "vgg16_ln": lambda: vgg16_ln(width=0.0625),
    "resnet20_plain": lambda: resnet20_plain(width=0.25),
    "resnet20_ln": lambda: resnet20_ln(width=0.25),
}
_programs: dict[tuple[str, int], Program] = {}


def _network(name: str, count: int = 2) -> Program:
    if (name, count) not in _programs:
        _programs[name, count] = _program(NETWORKS[name], PICTURES, count)
    return _programs[name, count]


@pytest.mark.parametrize(("kind", "preserve"), [("repair", 0), ("rescale", 0), ("repair", 6)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_normalised_layer_reaches_its_goal(name: str, kind: str, preserve: int) -> None:
    """Measured again, naively, on the emitted graph: means (REPAIR) and deviations are the edges' averages."""
    program = _network(name)
    result = merge(
        program, data=PICTURES.split(5), match=None, weights=ALPHAS, normalize=kind, preserve=preserve, progress=False
    )
    own = [node_values(program, PICTURES, edge) for edge in range(2)]
    after = node_values(result.program, PICTURES)
    before = node_values(
        merge(program, match=None, weights=ALPHAS, normalize=None, preserve=preserve).program, PICTURES
    )
    checked, moved = 0, 0
    for layer in layers(program):
        if layer.shortcut or layer.number in (*range(preserve + 1), len(layers(program))):
            continue
        (mean0, std0), (mean1, std1) = (_statistics(edge[layer.node]) for edge in own)
        mean, std = 0.3 * mean0 + 0.7 * mean1, 0.3 * std0 + 0.7 * std1
        found = _statistics(after[layer.node])
        alive = _statistics(before[layer.node])[1] > 1e-6
        assert alive.any()
        close(found[1][alive], std[alive], 1e-4)
        if kind == "repair":
            torch.testing.assert_close(found[0][alive], mean[alive], rtol=0, atol=1e-4 * float(std.max()))
        moved += bool((_statistics(before[layer.node])[1] - std).abs().max() > 1e-2 * std.max())
        checked += 1
    assert checked == len(layers(program)) - 1 - preserve
    assert moved >= checked - 1  # negative control: the merged network was off


@torch.no_grad()
def _naive(models: list[nn.Module], kind: str, x: Tensor) -> nn.Module:
    """REPAIR or RESCALE by its definition: layer after layer, the whole network run anew for each."""
    goals = [_layer_outputs(model, x) for model in models]
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    merged.load_state_dict({k: 0.3 * states[0][k] + 0.7 * states[1][k] for k in states[0]})
    names = [n for n, m in merged.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
    for name in names:
        module = merged.get_submodule(name)
        (mean0, std0), (mean1, std1) = (_statistics(goal[name]) for goal in goals)
        mean, std = _statistics(_layer_outputs(merged, x)[name])
        constant = std <= 1e-9 * std.max()  # dead channels keep their scale
        scale = torch.where(constant, 1.0, (0.3 * std0 + 0.7 * std1) / std)
        shift = 0.3 * mean0 + 0.7 * mean1 - mean * scale if kind == "repair" else torch.zeros_like(mean)
        module.weight.mul_(scale.reshape(-1, 1, 1, 1))
        bias = module.bias if module.bias is not None else torch.zeros_like(mean)
        module.bias = nn.Parameter(bias * scale + shift)
    return merged


def _layer_outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out.clone()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["repair", "rescale"])
@pytest.mark.parametrize("name", NETWORKS)
def test_calibration_equals_the_naive_loop(name: str, kind: str) -> None:
    program = _network(name)
    models = []
    for weights in program.weights:
        assert program.module is not None
        models.append(copy.deepcopy(program.module))
        models[-1].load_state_dict(weights)
    result = merge(program, data=PICTURES.split(7), match=None, weights=ALPHAS, normalize=kind, progress=False)
    expected = _naive(models, kind, PICTURES)
    with torch.no_grad():
        close(result.module(PICTURES), expected(PICTURES), 1e-8)
    state = result.module.state_dict()
    for key, tensor in expected.state_dict().items():
        if key in state:
            close(state[key], tensor, 1e-7)
    has_bias = all(m.bias is not None for m in models[0].modules() if isinstance(m, nn.Conv2d))
    assert result.report.own_class == has_bias


def test_one_sweep_over_the_uncorrected_network_would_not_do() -> None:
    """Negative control of the two tests above: moments taken before earlier layers are corrected miss the goals."""
    program = _network("vgg16")
    inserted = _inserted(program, PICTURES)
    raw = node_values(inserted, PICTURES)
    weights = dict(inserted.weights[0])
    for affine in affines(inserted):
        mean, std = _statistics(raw[affine.layer.name])
        goal = inserted.goals[affine.layer.name]
        scale = goal.std[0] / std
        weights[affine.scale] = scale.reshape(-1, 1, 1)
        weights[affine.shift] = (goal.mean[0] - mean * scale).reshape(-1, 1, 1)
    wrong = node_values(inserted.with_weights([weights]), PICTURES)
    right = node_values(CalibrateNormalization("repair", PICTURES, progress=False)(inserted), PICTURES)
    last = list(affines(inserted))[-1]
    goal = inserted.goals[last.layer.name].std[0]
    close(_statistics(right[last.add.name])[1], goal, 1e-9)
    assert (_statistics(wrong[last.add.name])[1] / goal - 1).abs().max() > 0.1


@pytest.mark.parametrize("preserve", [0, 7])
@pytest.mark.parametrize("name", ["vgg16_bn", "resnet20_bn"])
def test_reset_equals_the_naive_loop(name: str, preserve: int) -> None:
    """Exact mean and unbiased variance of each BatchNorm's input, behind BatchNorms that are reset already."""
    build = (lambda: vgg16_bn(width=0.0625)) if name == "vgg16_bn" else (lambda: resnet20_bn(width=0.25))
    program = _program(build, PICTURES)
    options: dict[str, Any] = {"match": None, "weights": ALPHAS, "preserve": preserve, "progress": False}
    found = merge(program, data=PICTURES.split(5), normalize="reset", **options).module
    naive = merge(program, normalize=None, **options).module
    norms = [n for n, m in naive.named_modules() if isinstance(m, nn.BatchNorm2d) and not n.startswith("branches")]
    order = _call_order(naive, norms)
    with torch.no_grad():
        before = {name: tensor.clone() for name, tensor in naive.state_dict().items()}
        for name_ in order:
            module = naive.get_submodule(name_)
            seen: list[Tensor] = []
            handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
            naive(PICTURES)
            handle.remove()
            flat = seen[0].movedim(1, 0).flatten(1)
            module.running_mean.copy_(flat.mean(1))
            module.running_var.copy_(flat.var(1))
        close(found(PICTURES), naive(PICTURES), 1e-9)
    expected = naive.state_dict()
    for key, tensor in found.state_dict().items():
        close(tensor, expected[key], 1e-9)
        reset = "running" in key and not key.startswith("branches")
        assert reset or torch.equal(tensor, before[key])
        assert not reset or not torch.equal(tensor, before[key])


def _call_order(model: nn.Module, names: list[str]) -> list[str]:
    order: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name)) for name in names
    ]
    model(PICTURES[:2])
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize("kind", ["repair", "rescale"])
def test_a_network_with_batchnorm_is_reset_where_it_has_one(kind: str) -> None:
    """With BatchNorm behind every layer REPAIR is RESET."""
    program = _program(lambda: vgg16_bn(width=0.0625), PICTURES)
    options: dict[str, Any] = {"data": PICTURES, "match": None, "progress": False}
    a = merge(program, normalize=kind, **options).module.state_dict()
    b = merge(program, normalize="reset", **options).module.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_mixed_network_gets_both() -> None:
    program = _program(residual)
    result = merge(program, data=DATA, match=None, normalize="repair", weights=ALPHAS, progress=False)
    after = node_values(result.program, DATA)
    own = [node_values(program, DATA, edge) for edge in range(2)]
    normed = next(node for node in program.graph.nodes if "batch_norm" in node.name)
    for layer in layers(program):
        stats = [_statistics(edge[layer.node]) for edge in own]
        goal = 0.3 * stats[0][1] + 0.7 * stats[1][1]
        if layer.shortcut or layer.node in (normed.args[0].name, "linear"):
            continue
        close(_statistics(after[layer.node])[1], goal, 1e-9)
    mean, std = _statistics(after[normed.args[0].name])
    weights = result.program.weights[0]
    close(weights["n0.running_mean"], mean, 1e-9)
    close(weights["n0.running_var"].sqrt(), std, 1e-3)


def test_constant_channels_are_moved_and_not_blown_up() -> None:
    models = edges(_plain, DATA)
    with torch.no_grad():
        for model in models:
            model[0].weight[1] = 0  # its output is its bias
    program = trace(models, DATA[:2])
    result = merge(program, data=DATA, match=None, normalize="repair", progress=False)
    first = result.module.state_dict()
    assert (first["0.weight"][1] == 0).all()
    close(first["0.bias"][1], (models[0][0].bias[1] + models[1][0].bias[1]) / 2, 1e-12)
    assert any("1 constant channels in conv2d" in note for note in result.report.notes)
    assert torch.isfinite(result.module(DATA)).all()


def test_rounding_noise_on_a_constant_channel_is_not_amplified() -> None:
    """float32: a constant channel of value 0.1 has a deviation of rounding size."""
    x = DATA.float()
    models = edges(_plain, x)
    with torch.no_grad():
        for model in models:
            model[2].weight[3] = 0
            model[2].bias[3] = 0.1
        models[0][2].weight[3, 0, 1, 1] = 1.0  # constant in the merged network only
        models[1][2].weight[3, 0, 1, 1] = -1.0
    result = merge(models, x[:2], data=x, match=None, normalize="repair", progress=False)
    assert result.module.state_dict()["2.weight"][3].abs().max() < 10


# biases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (0.2, 0.5, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("preserve", [0, 4])
def test_bias_calibration_is_the_formula(weights: tuple[float, ...], preserve: int) -> None:
    """b_l = Σ αᵢ^l b_i with the absolute depth l; weights, norms and branches as in plain interpolation."""
    program = _network("vgg16_ln", len(weights))
    options: dict[str, Any] = {"match": None, "weights": weights, "preserve": preserve}
    found = merge(program, normalize="bias_calibration", **options).module.state_dict()
    plain = merge(program, normalize=None, **options).module.state_dict()
    number = {layer.fqn: layer.number for layer in layers(program)}
    changed = 0
    for key, tensor in found.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "bias" and name in number:
            depth = number[name]
            assert depth > preserve
            expected = sum(w**depth * one[key] for w, one in zip(weights, program.weights))
            close(tensor, expected, 1e-13)
            changed += not torch.equal(tensor, plain[key])
        else:
            assert torch.equal(tensor, plain[key])
    assert changed == (14 - max(preserve, 1) if max(weights) < 1 else 0)


def test_a_shortcut_has_the_depth_of_the_layer_it_meets() -> None:
    program = _network("resnet20_plain")
    found = merge(program, match=None, weights=ALPHAS, normalize="bias_calibration").module.state_dict()
    for key, depth in (("layer2.0.shortcut.0.bias", 9), ("layer2.0.conv2.bias", 9), ("fc.bias", 20), ("conv1.bias", 1)):
        close(found[key], 0.3**depth * program.weights[0][key] + 0.7**depth * program.weights[1][key], 1e-13)


def test_a_bias_of_several_depths_is_averaged_and_named() -> None:
    def build() -> nn.Module:
        return net(lambda self, x: self.fc(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3))),
                   a=conv(3, 4), b=conv(4, 4), fc=nn.Linear(4, 2))  # fmt: skip

    program = _program(build)
    result = merge(program, match=None, weights=ALPHAS, normalize="bias_calibration")
    close(result.module.b.bias, 0.3 * program.weights[0]["b.bias"] + 0.7 * program.weights[1]["b.bias"], 1e-14)
    assert any("b.bias serves layers of several depths" in note for note in result.report.notes)


@pytest.mark.parametrize("direction", ["backward", "forward"])
@pytest.mark.parametrize("count", [0, 1, 5, 14, 100])
def test_bias_removal_counts_from_one_end(direction: Any, count: int) -> None:
    program = Interpolate(ALPHAS)(_network("vgg16"))
    removed = RemoveBias(count, direction)(program)
    number = {layer.fqn: layer.number for layer in layers(program)}
    for key, tensor in removed.weights[0].items():
        name, _, leaf = key.rpartition(".")
        depth = number[name]
        gone = leaf == "bias" and (depth > 14 - count if direction == "backward" else depth <= count)
        assert (not tensor.any()) if gone else torch.equal(tensor, program.weights[0][key])
    assert program.weights[0]["features.0.bias"].any()


def test_bias_removal_spares_branches_and_merge_takes_the_last_five() -> None:
    program = _network("vgg16")
    found = merge(program, match=None, normalize="bias_removal", preserve=11).module.state_dict()
    biases = {key: bool(tensor.any()) for key, tensor in found.items() if key.endswith("bias")}
    assert {key for key, alive in biases.items() if not alive} == {
        "features.26.bias", "features.28.bias", "classifier.0.bias"
    }  # fmt: skip
    assert sum(key.startswith("branches.") for key in biases) == 22


# repair on its own ----------------------------------------------------------------------------------------------------


def test_repair_brings_a_network_to_its_references() -> None:
    models = edges(_plain, DATA)
    merged = merge(models, DATA[:2], match=None, normalize=None, weights=ALPHAS).module
    at_once = merge(models, DATA[:2], data=DATA, match=None, normalize="repair", weights=ALPHAS, progress=False).module
    fixed = repair(merged, models, DATA[:2], data=DATA, method="repair", weights=ALPHAS, progress=False)
    with torch.no_grad():
        close(fixed.module(DATA), at_once(DATA), 1e-10)
    assert type(fixed.module) is type(models[0])


def test_repairing_a_network_by_itself_changes_nothing() -> None:
    model = edges(_plain, DATA)[0]
    fixed = repair(model, [model], DATA[:2], data=DATA, method="repair", progress=False)
    for key, tensor in model.state_dict().items():
        close(fixed.module.state_dict()[key], tensor, 1e-10)


def test_an_explicit_list_of_passes_is_what_merge_runs() -> None:
    models = edges(_plain, DATA)
    program = trace(models, DATA[:2])
    statistics = collect(program, data=DATA, progress=False)
    listed = compile(
        program,
        passes=[
            Align("activation", statistics=statistics, preserve=1), DuplicateBranches(1, ALPHAS), Interpolate(ALPHAS),
            InsertNormalization(), CalibrateNormalization("repair", DATA, progress=False), FoldNormalization(),
        ],
    )  # fmt: skip
    merged = merge(
        program, data=DATA, weights=ALPHAS, preserve=1, match="activation", normalize="repair", progress=False
    )
    assert listed.report.passes == merged.report.passes
    first, second = listed.module.state_dict(), merged.module.state_dict()
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(PassError, match="2 weight sets"):
        compile(program, passes=[Align("weight")])
