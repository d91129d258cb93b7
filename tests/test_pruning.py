"""vfx.prune: exact counts, deterministic ties, masks that stay, statistics that come back, and errors that help."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import close, images, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from vfx.passes.mask_weights import MaskWeights

from vfx.api import compile, prune, trace
from vfx.emit.files import export, load
from vfx.errors import ArgumentError, PassError, VfxError, WeightError
from vfx.models import resnet20_bn, vgg11, vit_tiny
from vfx.program import Program
from vfx.pruning.masks import Mask, make_permanent, parametrize_masks
from vfx.pruning.selection import Schedule, Selection, lowest, pruned_count, selection
from vfx.pruning.targets import Target, find_targets, unprotected

X = images(24, 8)
Y = torch.randint(5, (24,), generator=torch.Generator().manual_seed(0))
DATA = [(X[:10], Y[:10]), (X[10:], Y[10:])]
QUIET: dict[str, Any] = {"progress": False}


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    )


def bias_free() -> nn.Module:
    """REPAIR has no bias to fold into: the result is a GraphModule."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5, bias=False))


WEIGHTS = {"0.weight": 216, "3.weight": 288, "5.weight": 64, "8.weight": 320}


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Program]:
    model = network(small, X)
    return model, trace(model, X[:2])


def zeros(module: nn.Module) -> dict[str, int]:
    return {name: int((tensor == 0).sum()) for name, tensor in module.named_parameters() if tensor.ndim > 1}


# selection ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    rows=st.integers(1, 3),
    share=st.floats(0, 1, exclude_max=True),
)
def test_lowest_is_a_stable_sort(values: list[int], rows: int, share: float) -> None:
    scores = torch.tensor([[float(v * (-1) ** r) for v in values] for r in range(rows)])
    count = pruned_count(len(values), share)
    assert 0 <= share * len(values) - count < 1 or math.isclose(share * len(values), count)
    expected = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(rows):
        order = sorted(range(len(values)), key=lambda i: (scores[row, i].item(), i))
        expected[row, order[:count]] = True
    assert torch.equal(lowest(scores, count), expected)


def test_counts_survive_rounding() -> None:
    assert pruned_count(100, 0.29) == 29  # 0.29 · 100 is 28.999999999999996
    assert pruned_count(9, 0.99) == 8
    assert pruned_count(10, 0.0) == 0


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.9, 0.99])
def test_counts_are_exact_in_every_scope(net: tuple[nn.Module, Program], sparsity: float) -> None:
    model, program = net
    total = sum(WEIGHTS.values())
    gone = zeros(prune(program, sparsity=sparsity, scope="global", **QUIET).module)
    assert sum(gone.values()) == math.floor(total * sparsity + 1e-9)
    gone = zeros(prune(program, sparsity=sparsity, scope="layer", **QUIET).module)
    assert gone == {name: math.floor(size * sparsity + 1e-9) for name, size in WEIGHTS.items()}
    result = prune(program, sparsity=sparsity, scope="row", **QUIET)
    for target in find_targets(program)[0]:
        matrix = target.matrix(result.program.weights[0][target.name]).flatten(1)
        assert set((matrix == 0).sum(1).tolist()) == {math.floor(matrix.shape[1] * sparsity + 1e-9)}
    assert not any((p == 0).any() for p in model.parameters())


def test_global_magnitude_is_one_sort_over_all_weights(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    module = prune(program, sparsity=0.6, **QUIET).module
    joined = torch.cat([model.state_dict()[name].abs().flatten() for name in WEIGHTS])
    threshold = joined.sort().values[math.floor(0.6 * len(joined))]
    for name in WEIGHTS:
        before = model.state_dict()[name]
        assert torch.equal(module.state_dict()[name], torch.where(before.abs() < threshold, 0.0, before))
    different = prune(program, sparsity=0.6, scope="layer", **QUIET).module
    assert any(not torch.equal(different.state_dict()[name], module.state_dict()[name]) for name in WEIGHTS)


def test_ties_go_by_name_and_index() -> None:
    """Layers of equal weights, called in the reverse order of their names."""

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.Linear(4, 4), nn.Linear(4, 4)
            for parameter in self.parameters():
                nn.init.constant_(parameter, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(x))

    module = prune(Even(), torch.randn(2, 4), sparsity=0.625, **QUIET).module
    assert not module.a.weight.any()
    assert module.b.weight.flatten().tolist() == [0.0] * 4 + [0.5] * 12


def test_patterns_n_of_m_run_along_the_inputs(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    for scope, keep, of in (("2:4", 2, 4), ("1:2", 1, 2), ("3:4", 3, 4)):
        protect = ("0", "5") if of == 4 else "first"
        result = prune(program, scope=scope, protect=protect, **QUIET)
        for index in (3, 8):
            before, after = model[index].weight, result.module[index].weight
            rows = (before if before.ndim == 2 else before.movedim(1, -1)).reshape(-1, of)
            kept = (after if after.ndim == 2 else after.movedim(1, -1)).reshape(-1, of)
            best = rows.abs().argsort(dim=1, descending=True, stable=True)[:, :keep].sort(1).values
            assert torch.equal(kept.nonzero()[:, 1].reshape(-1, keep), best)
        assert result.report.sparsity == 1 - keep / of
        assert not (result.module[0].weight == 0).any()


def test_a_sparsity_for_each_pattern(net: tuple[nn.Module, Program]) -> None:
    _, program = net
    shares = {"8": 0.25, "3.weight": 0.5, "[0-5]": 0.75}
    gone = zeros(prune(program, sparsity=shares, scope="layer", **QUIET).module)
    assert gone == {"0.weight": 162, "3.weight": 144, "5.weight": 48, "8.weight": 80}
    gone = zeros(prune(program, sparsity={"8": 0.25, "[03]": 0.5}, scope="global", **QUIET).module)
    assert gone["8.weight"] == 80
    assert gone["0.weight"] + gone["3.weight"] == 252
    assert gone["0.weight"] not in (0, 108)  # compared with each other
    assert gone["5.weight"] == 0


def test_protected_layers() -> None:
    model = network(lambda: resnet20_bn(width=0.125), images(8))
    program = trace(model, images(2))
    targets, _ = find_targets(program)
    every = {target.name for target in targets}
    left = lambda *patterns: every - {target.name for target in unprotected(targets, patterns)}  # noqa: E731
    assert left("first") == {"conv1.weight"}
    assert left("head") == {"fc.weight"}
    assert left("layer2.*shortcut*") == {"layer2.0.shortcut.0.weight"}
    assert left("layer3.0.conv1", "first") == {"layer3.0.conv1.weight", "conv1.weight"}
    report = prune(program, sparsity=0.5, protect=("first", "head"), **QUIET).report
    assert [row.name for row in report.layers if row.protected] == ["conv1.weight", "fc.weight"]
    assert [row.name for row in report.layers if not row.nonzeros < row.params] == ["conv1.weight", "fc.weight"]
    data = images(16)
    report = prune(program, sparsity=0.5, score="wanda", data=data, normalize=None, **QUIET).report
    assert [row.name for row in report.layers if row.protected] == ["fc.weight"]


@pytest.mark.parametrize("kind", ["cubic", "linear"])
def test_steps_follow_the_schedule_and_score_anew(net: tuple[nn.Module, Program], kind: Any) -> None:
    _, program = net
    shares = Schedule(4, kind).shares()
    rest = [1 - k / 4 for k in (1, 2, 3, 4)]
    assert shares == pytest.approx([1 - x**3 if kind == "cubic" else 1 - x for x in rest], abs=1e-15)
    assert shares[-1] == 1
    found: list[dict[str, Tensor]] = []

    class Recorded(MaskWeights):
        def _step(self, *args: Any) -> Any:
            pruned = super()._step(*args)
            found.append(pruned.masks)
            return pruned

    once = MaskWeights("fisher", 0.8, data=DATA, **QUIET)
    one = Recorded("fisher", 0.8, data=DATA, steps=4, schedule=kind, **QUIET)
    several = one.run(program).record.masks
    total = sum(WEIGHTS.values())
    assert [sum(int((~m).sum()) for m in masks.values()) for masks in found] == [
        pruned_count(total, 0.8 * share) for share in shares
    ]
    for earlier, later in pairwise(found):
        assert all(not (later[name] & ~earlier[name]).any() for name in WEIGHTS)
    at_once = once.run(program).record.masks
    assert any(not torch.equal(several[name], at_once[name]) for name in WEIGHTS)
    assert "4 steps" in one(program).history[-1]


# the result -----------------------------------------------------------------------------------------------------------

BUILDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "small": (small, X),
    "vgg11": (lambda: vgg11(width=0.05), images(6)),
    "vit": (lambda: vit_tiny(width=1 / 32, depth=2, size=16), images(6, 16)),
}


@pytest.mark.parametrize("score", ["magnitude", "random", "fisher", "woodfisher", "wanda", "gradient"])
@pytest.mark.parametrize("name", BUILDS)
def test_every_score_prunes_every_network(name: str, score: str) -> None:
    build, x = BUILDS[name]
    model = network(build, x)
    before = copy.deepcopy(model.state_dict())
    if name not in _traced:
        _traced[name] = trace(model, x[:2])
    result = prune(_traced[name], sparsity=0.5, score=score, data=x, normalize=None, **QUIET)
    assert type(result.module) is type(model)
    assert result.report.own_class
    assert 0.4 < result.report.sparsity <= 0.5
    again = prune(_traced[name], sparsity=0.5, score=score, data=x, normalize=None, **QUIET)
    for key, tensor in result.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[key])  # bit for bit
        assert torch.equal(model.state_dict()[key], before[key])  # the user's model is left alone
    with torch.no_grad():
        for batch in (1, 7):
            y = images(batch, x.shape[-1], seed=batch)
            close(result.module(y), result.program(y), 1e-5)


_traced: dict[str, Program] = {}


def test_tied_weights_are_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
            self.head.weight, self.again.weight = self.embed.weight, self.inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(torch.relu(self.inner(self.embed(x)))))

    torch.manual_seed(0)
    model, x = Tied(), torch.randint(11, (5, 3))
    result = prune(model, x, sparsity=0.5, scope="layer", **QUIET)
    assert type(result.module) is Tied
    assert result.module.head.weight is result.module.embed.weight
    assert [(row.params, row.nonzeros) for row in result.report.layers] == [(36, 18), (66, 33)]
    assert result.report.params == 36 + 66 + 12
    assert result.report.nonzeros == 18 + 33 + 12
    kept = prune(model, x, sparsity=0.5, scope="layer", masks="parametrize", **QUIET).module
    for one, other in ((kept.head, kept.embed), (kept.inner, kept.again)):
        assert one.parametrizations.weight.original is other.parametrizations.weight.original
        assert torch.equal(one.weight, other.weight)
    close(kept(x), result.module(x), 1e-6)
    for names in ("head", "embed", "again"):  # every name of a tied weight protects it
        report = prune(model, x, sparsity=0.5, protect=names, **QUIET).report
        assert [row.protected for row in report.layers].count(True) == 1
    with torch.no_grad():
        close(make_permanent(kept)(x), result.module(x), 1e-6)
    assert kept.head.weight is kept.embed.weight


@pytest.mark.parametrize("build", [small, bias_free])
def test_masks_hold_while_fine_tuning(build: Callable[[], nn.Module]) -> None:
    x, model = X, network(build, X)
    options: dict[str, Any] = {"sparsity": 0.7, "data": x, **QUIET}
    plain_result, result = prune(model, x[:2], **options), prune(model, x[:2], masks="parametrize", **options)
    module = copy.deepcopy(result.module)
    with torch.no_grad():
        close(module(x), plain_result.module(x), 1e-5)
    before = {name: (value == 0).clone() for name, value in plain_result.module.named_parameters() if value.ndim > 1}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    module.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(module(x), Y).backward()
        optimizer.step()
    assert parametrize.is_parametrized(result.module.get_submodule("0"))
    tuned = make_permanent(module)
    with torch.no_grad():
        close(result.module(x), plain_result.module(x), 1e-5)  # the other copy keeps its masks
    assert not any(parametrize.is_parametrized(one) for one in tuned.modules())
    assert list(tuned.state_dict()) == list(plain_result.module.state_dict())
    assert type(tuned) is type(plain_result.module) or not plain_result.report.own_class
    parameters = dict(tuned.named_parameters())
    for name, gone in before.items():
        assert not parameters[name][gone].any()
        if gone.any():
            assert not torch.equal(parameters[name], dict(plain_result.module.named_parameters())[name])


def test_make_permanent_leaves_other_parametrizations_alone() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert parametrize.is_parametrized(make_permanent(module))
    plain_layer = nn.Linear(3, 4)
    parametrize.register_parametrization(plain_layer, "weight", Mask(torch.zeros(4, 3, dtype=torch.bool)))
    assert not make_permanent(plain_layer).weight.any()
    assert type(plain_layer) is nn.Linear


def test_exports_hold_zeros_and_no_masks(net: tuple[nn.Module, Program], tmp_path: Path) -> None:
    model, program = net
    result = prune(program, sparsity=0.8, data=X, masks="parametrize", **QUIET)
    loaded = load(export(result, tmp_path / "pruned.safetensors"), model)
    assert zeros(loaded) == zeros(prune(program, sparsity=0.8, data=X, **QUIET).module)
    path = export(result, tmp_path / "pruned.onnx")
    session = onnxruntime.InferenceSession(str(path))
    for batch in (1, 5):
        (found,) = session.run(None, {session.get_inputs()[0].name: X[:batch].numpy()})
        with torch.no_grad():
            close(torch.from_numpy(found), result.module(X[:batch]), 1e-5)
    assert parametrize.is_parametrized(result.module[0])  # the export works on a copy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 tensors exist on CUDA alone")
def test_semi_structured_on_cuda() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).half().cuda()
    x = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    dense = prune(model, x, scope="2:4", device="cuda", **QUIET)
    result = prune(model, x, scope="2:4", device="cuda", masks="semi_structured", normalize=None, **QUIET)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert not result.report.notes
    close(result.module(x), dense.module(x), 1e-2)


def test_semi_structured_says_what_stays_dense(net: tuple[nn.Module, Program]) -> None:
    result = prune(net[1], scope="2:4", protect=("0", "5"), masks="semi_structured", normalize=None, **QUIET)
    assert [note for note in result.report.notes if "CUDA alone" in note] == list(result.report.notes)
    assert len(result.report.notes) == 2
    assert result.report.sparsity == 0.5


# repair ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["repair", "rescale"])
def test_repair_brings_back_the_unpruned_statistics(method: str) -> None:
    model = network(plain, X)
    program = trace(model, X[:2])
    result = prune(program, sparsity=0.6, data=DATA, normalize=method, repair_samples=24, **QUIET)
    outputs = lambda one, until: one[:until](X).movedim(1, 0).flatten(1)  # noqa: E731
    with torch.no_grad():
        for until in (1, 3):
            dense, pruned = outputs(model, until), outputs(result.module, until)
            close(pruned.std(1), dense.std(1), 1e-4)
            if method == "repair":
                close(pruned.mean(1), dense.mean(1), 1e-4)
    none = prune(program, sparsity=0.6, data=DATA, normalize=None, **QUIET)
    with torch.no_grad(), pytest.raises(AssertionError):
        close(outputs(none.module, 3).std(1), outputs(model, 3).std(1), 1e-2)
    assert zeros(result.module) == zeros(none.module)  # the repair moves no zero
    rows = result.report.layers[:2]
    assert all(row.variance_after == pytest.approx(1, abs=1e-4) for row in rows)
    assert all(abs(row.variance_before - 1) > 0.01 for row in rows)
    if method == "repair":
        assert all(row.shift_after < 1e-4 < row.shift_before for row in rows)
    assert none.report.layers[0].variance_after is None


def test_batch_norms_are_reset_on_the_samples_of_the_repair(net: tuple[nn.Module, Program]) -> None:
    result = prune(net[1], sparsity=0.6, data=DATA, repair_samples=12, **QUIET)
    assert result.report.choices["normalize"] == "reset"
    with torch.no_grad():
        seen = result.module[0](X[:12])
        close(result.module[1].running_mean, seen.mean((0, 2, 3)), 1e-5)
        close(result.module[1].running_var, seen.var((0, 2, 3)), 1e-5)
        with pytest.raises(AssertionError):
            close(result.module[1].running_var, result.module[0](X).var((0, 2, 3)), 1e-5)


def test_a_shuffling_loader_repairs_on_one_and_the_same_samples(net: tuple[nn.Module, Program]) -> None:
    class Shuffled:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __iter__(self) -> Any:
            order = torch.randperm(24, generator=self.generator)
            return iter([(X[part], Y[part]) for part in order.split(8)])

    model = network(plain, X)
    result = prune(model, X[:2], sparsity=0.6, data=Shuffled(), repair_samples=8, solve=None, **QUIET)
    assert all(row.variance_after == pytest.approx(1, abs=1e-4) for row in result.report.layers[:2])


def test_auto_normalization(net: tuple[nn.Module, Program]) -> None:
    assert prune(net[1], sparsity=0.5, **QUIET).report.choices["normalize"] is None
    options: dict[str, Any] = {"sparsity": 0.5, "data": X, "solve": None} | QUIET
    assert prune(net[1], **options).report.choices["normalize"] == "reset"
    assert prune(network(plain, X), X[:2], **options).report.choices["normalize"] == "repair"


# the pass and its report ----------------------------------------------------------------------------------------------


def test_the_pass_composes_and_checks_itself(net: tuple[nn.Module, Program], monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = net
    result = compile(program, passes=[MaskWeights("magnitude", 0.5), MaskWeights("magnitude", {"8": 0.9})])
    assert zeros(result.module)["8.weight"] == 288
    one = MaskWeights("magnitude", 0.5)
    done = one.run(program)
    pruned = done.program
    for name, tensor in pruned.weights[0].items():
        assert (tensor is program.weights[0][name]) == (name not in WEIGHTS)
    assert not any((pruned.weights[0][name][~mask] != 0).any() for name, mask in done.record.masks.items())
    with pytest.raises(PassError, match="holds 2"):
        one(trace([model, copy.deepcopy(model)], X[:2]))
    original = Selection.masks
    monkeypatch.setattr(Selection, "masks", lambda *a: {k: v.roll(1) | True for k, v in original(*a).items()})
    with pytest.raises(PassError, match="removed 0 weights, 444 were asked for"):
        MaskWeights("magnitude", 0.5)(program)


def test_the_report_counts(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    report = prune(program, sparsity=0.75, scope="layer", data=X, **QUIET).report
    conv = report.layers[0]
    assert (conv.params, conv.nonzeros, conv.sparsity) == (216, 54, 0.75)
    macs, outputs = 216 * 16, 8 * 16
    assert (conv.flops_before, conv.flops_after) == (macs + outputs, macs // 4 + outputs)
    assert report.params == sum(p.numel() for p in model.parameters())
    assert report.nonzeros == report.params - sum(round(0.75 * size) for size in WEIGHTS.values())
    assert report.flops_after == report.flops - sum(row.flops_before - row.flops_after for row in report.layers)
    facts = report.to_dict()
    assert facts["sparsity_reached"] == 0.75
    assert [layer["name"] for layer in facts["layers"]] == list(WEIGHTS)
    assert "3.weight" in str(report)
    assert '"flops_after"' in report.to_json()


def test_weights_that_are_left_alone_are_noted() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)
            self.cell = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.cell(self.layer(x))[0], self.weight.tanh())

    report = prune(Computed(), torch.randn(2, 3, 4), sparsity=0.5, **QUIET).report
    assert [row.name for row in report.layers] == ["layer.weight"]
    assert any("is computed by tanh" in note for note in report.notes)
    (others,) = (note.partition(" them: ")[2] for note in report.notes if "no convolution or linear" in note)
    assert set(others.split(", ")) == {"cell.weight_ih_l0", "cell.weight_hh_l0", "weight"}


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a sparsity"),
        ({"sparsity": 1.0}, r"must be a number in \[0, 1\)"),
        ({"sparsity": -0.1}, r"must be a number in \[0, 1\)"),
        ({"sparsity": float("nan")}, "must be a finite number, got nan"),
        ({"sparsity": True}, "must be a number, a dict of numbers or None"),
        ({"sparsity": "half"}, "must be a number, a dict of numbers or None"),
        ({"sparsity": {}}, "empty dict"),
        ({"sparsity": {"3": 1.5}}, r"sparsity\['3'\] must be"),
        ({"sparsity": {"nothing*": 0.5}}, "'nothing\\*' matches no prunable weight; there are 0.weight"),
        ({"sparsity": 0.5, "protect": "nothing"}, "protect: the pattern 'nothing' matches no"),
        ({"sparsity": 0.5, "protect": "*"}, "nothing to prune"),
        ({"sparsity": 0.5, "score": "best"}, "score='best' is unknown"),
        ({"sparsity": 0.5, "score": "wanda"}, "give data="),
        ({"sparsity": 0.5, "score": "woodfisher"}, "give data="),
        ({"sparsity": 0.5, "scope": "column"}, "scope='column' is unknown"),
        ({"scope": "2:4"}, "4 does not divide the 3 inputs of '0.weight'"),
        ({"scope": "4:4"}, "keep some and prune some"),
        ({"scope": "0:4"}, "keep some and prune some"),
        ({"scope": "2:4", "sparsity": 0.7}, "means sparsity 0.5"),
        ({"scope": "1:2", "steps": 3, "protect": "0"}, "leave steps out"),
        ({"sparsity": 0.5, "steps": 0}, "steps must be"),
        ({"sparsity": 0.5, "schedule": "square"}, "choose 'cubic' or 'linear'"),
        ({"sparsity": 0.5, "masks": "soft"}, "masks='soft' is unknown"),
        ({"sparsity": 0.5, "normalize": "repair"}, "give data="),
        ({"sparsity": 0.5, "normalize": "bias_removal", "data": X}, "prune takes 'auto'"),
        ({"sparsity": 0.5, "normalize": "batch", "data": X}, "is unknown"),
        ({"sparsity": 0.5, "score": "magnitude", "data": X, "repair_samples": 0}, "at least 1"),
    ],
)
def test_errors_name_the_way_out(net: tuple[nn.Module, Program], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        prune(net[1], **options, **QUIET)


def test_broken_networks_are_refused(net: tuple[nn.Module, Program]) -> None:
    model = copy.deepcopy(net[0])
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"3\.weight"):
        prune(model, X[:2], sparsity=0.5)
    program = net[1]
    broken = program.with_weights([{**program.weights[0], "3.weight": model[3].weight.detach()}])
    with pytest.raises(WeightError, match=r"3\.weight"):
        prune(broken, sparsity=0.5)
    with pytest.raises(ArgumentError, match="nothing to prune"):
        prune(nn.Sequential(nn.BatchNorm1d(4)), torch.randn(2, 4), sparsity=0.5)
    with pytest.raises(VfxError, match="example_inputs"):
        prune(model, sparsity=0.5)


def test_matrices_of_every_layout(net: tuple[nn.Module, Program]) -> None:
    """(outputs, inputs, taps) and back, checked on the grouped transposed convolution by its own definition."""
    targets: dict[str, Target] = {target.name: target for target in find_targets(net[1])[0]}
    assert [tuple(t.matrix(torch.empty(t.shape)).shape) for t in targets.values()] == [
        (8, 3, 9), (8, 4, 9), (4, 4, 4), (5, 64, 1),
    ]  # fmt: skip
    target, weight = targets["5.weight"], net[0][5].weight.detach()
    matrix = target.matrix(weight)
    for output in range(4):
        group = output // 2
        for inner in range(4):
            assert torch.equal(matrix[output, inner], weight[4 * group + inner, output % 2].flatten())
    assert selection("2:4", None).pattern


@torch.no_grad()
def test_masks_become_zeros_whatever_stands_behind_them() -> None:
    layer, mask = nn.Linear(3, 2), torch.tensor([[True, False, True], [False, True, True]])
    parametrize_masks(layer, {"weight": mask})
    layer.parametrizations["weight"].original.fill_(2.0)  # type: ignore[index,union-attr,operator]
    assert torch.equal(make_permanent(layer).weight, 2.0 * mask)
