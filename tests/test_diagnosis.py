"""Every measure of a diagnosis against a literal numpy implementation, and verdicts on constructed cases."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vfx
from tests.conftest import edges, images, network
from vfx.diagnosis.measures import ratio, vanishing_bound
from vfx.diagnosis.skew import class_note, variance_note
from vfx.diagnosis.taps import layer_taps
from vfx.diagnosis.verdict import VANISHED
from vfx.errors import ArchitectureError, ArgumentError
from vfx.models import resnet20_bn, vgg11_ln
from vfx.models.linear import linear_net

LAYERS = ("conv1", "conv2", "conv3", "shortcut", "fc1", "fc2")


class Net(nn.Module):
    """A convolution with BatchNorm, a residual block with a projection, an activation behind a pool, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.conv3 = nn.Conv2d(6, 7, 3, padding=1), nn.Conv2d(7, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 8, 1)
        self.fc1, self.fc2 = nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)["fc2"][0]

    def read(self, x: Tensor) -> dict[str, list[Tensor]]:
        """Output and activation of each layer."""
        first = self.bn(self.conv1(x))
        one = first.relu()
        second = self.conv2(one)
        two = second.relu()
        third, projected = self.conv3(two), self.shortcut(one)
        three = (third + projected).relu()
        fourth = self.fc1(three.mean((2, 3)))
        four = nn.functional.silu(fourth)
        return {
            "conv1": [first, one],
            "conv2": [second, two],
            "conv3": [third, three],
            "shortcut": [projected],
            "fc1": [fourth, four],
            "fc2": [self.fc2(four)],
        }


X = images(23, 6, dtype=torch.float64)
BATCHES = list(X.split(8))


@pytest.fixture(scope="module")
def pair() -> list[nn.Module]:
    return edges(Net, X, seed=3)


@pytest.fixture(scope="module")
def program(pair: list[nn.Module]) -> vfx.Program:
    return vfx.trace(pair, X[:2])


@pytest.fixture(scope="module")
def merged(program: vfx.Program) -> vfx.Result:
    return vfx.merge(program, data=BATCHES, match="activation", normalize=None, progress=False)


@pytest.fixture(scope="module")
def diagnosis(merged: vfx.Result, program: vfx.Program) -> Any:
    return vfx.diagnose(merged, program, data=BATCHES, progress=False)


def rows(diagnosis: Any) -> dict[str, Any]:
    return {row.layer: row for row in diagnosis.rows}


@torch.no_grad()
def values(model: Any, x: Tensor) -> dict[str, list[np.ndarray]]:
    return {name: [v.numpy() for v in found] for name, found in model.read(x).items()}


def aligned(merged: vfx.Result, pair: list[nn.Module], program: vfx.Program) -> list[nn.Module]:
    """The edges in the merged network's order, in their own class."""
    facts = vfx.symmetry(program)
    found = []
    matching = merged.report.matching
    assert matching is not None
    for edge, weights in enumerate(program.weights):
        twin = copy.deepcopy(pair[edge])
        twin.load_state_dict(matching.aligned(facts, weights, edge), strict=False)
        found.append(twin.eval())
    return found


def literal_norms(model: Any) -> dict[str, tuple[float, float]]:
    """Mean ‖g‖ and ‖h‖ of what each layer hands on."""
    seen, zero = values(model, X), values(model, torch.zeros_like(X[:1]))
    found = {}
    for name in LAYERS:
        f, h = seen[name][-1], zero[name][-1][0]
        norms = [np.sqrt(((f[i] - h) ** 2).sum()) for i in range(len(f))]
        found[name] = float(np.mean(norms)), float(np.sqrt((h**2).sum()))
    return found


def literal_variance(model: Any, name: str) -> float:
    output = values(model, X)[name][0]
    return float(sum(np.var(np.take(output, c, 1)) for c in range(output.shape[1])))


def test_features_and_offsets(diagnosis: Any, merged: vfx.Result, pair: list[nn.Module], program: vfx.Program) -> None:
    pair = aligned(merged, pair, program)
    own, others = literal_norms(merged.module), [literal_norms(edge) for edge in pair]
    for name, row in rows(diagnosis).items():
        np.testing.assert_allclose((row.feature, row.offset), own[name], rtol=1e-10)
        np.testing.assert_allclose(row.edge_features, [one[name][0] for one in others], rtol=1e-10)
        np.testing.assert_allclose(row.edge_offsets, [one[name][1] for one in others], rtol=1e-10)
        np.testing.assert_allclose(
            row.feature_ratio, 2 * own[name][0] / (others[0][name][0] + others[1][name][0]), rtol=1e-10
        )
    assert rows(diagnosis)["conv2"].feature != pytest.approx(literal_norms(pair[0])["conv2"][0], rel=1e-3)


def test_the_bound_is_the_recursion_of_the_paper(diagnosis: Any) -> None:
    chain = [row for row in diagnosis.rows if not row.shortcut]
    assert [row.layer for row in chain] == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    last, gamma = len(chain), 1.4
    bound: dict[int, float] = {last: chain[-1].feature_ratio}
    smoothed = dict(bound)
    for layer in range(last - 1, 0, -1):
        r = chain[layer - 1].feature_ratio
        bound[layer] = max(bound[layer + 1], r)
        after = smoothed[layer + 1]
        smoothed[layer] = max(gamma * after + (1 - gamma) * (1 - 1 / (last + 1 - layer)) * after, r)
    np.testing.assert_allclose([row.bound for row in chain], [bound[n] for n in range(1, last + 1)], rtol=1e-12)
    np.testing.assert_allclose([r.smoothed_bound for r in chain], [smoothed[n] for n in range(1, last + 1)], rtol=1e-12)
    assert vanishing_bound([3.0, None, 2.0, 1.0]) == [3.0, 2.0, 2.0, 1.0]
    assert vanishing_bound([None, None]) == [None, None]


def test_variance_magnitude_and_statistics(
    diagnosis: Any, merged: vfx.Result, pair: list[nn.Module], program: vfx.Program
) -> None:
    pair = aligned(merged, pair, program)
    for name, row in rows(diagnosis).items():
        v = [literal_variance(model, name) for model in (merged.module, *pair)]
        np.testing.assert_allclose(row.variance_ratio, 2 * v[0] / (v[1] + v[2]), rtol=1e-10)
        m = [float(getattr(model, name).weight.detach().abs().numpy().mean()) for model in (merged.module, *pair)]
        np.testing.assert_allclose(row.magnitude_ratio, 2 * m[0] / (m[1] + m[2]), rtol=1e-10)
        seen = [values(model, X)[name] for model in (merged.module, *pair)]
        np.testing.assert_allclose((row.output_mean, row.output_std), (seen[0][0].mean(), seen[0][0].std()), rtol=1e-10)
        np.testing.assert_allclose(row.edge_output_stds, [s[0].std() for s in seen[1:]], rtol=1e-10)
        if len(seen[0]) == 1:
            assert row.activation_mean is None
            assert row.zero_share is None
            continue
        activation = [s[1] for s in seen]
        np.testing.assert_allclose(
            (row.activation_mean, row.activation_std), (activation[0].mean(), activation[0].std()), rtol=1e-10
        )
        assert row.zero_share == np.mean(activation[0] == 0)
        assert row.edge_zero_shares == tuple(np.mean(a == 0) for a in activation[1:])


def test_silenced_units_are_counted_in_the_aligned_order(
    diagnosis: Any, merged: vfx.Result, pair: list[nn.Module], program: vfx.Program
) -> None:
    def literal(models: list[nn.Module], name: str) -> float:
        own = values(merged.module, X)[name][1] == 0
        shares = []
        for model in models:
            active = values(model, X)[name][1] != 0
            shares.append((active & own).sum() / active.sum())
        return float(np.mean(shares))

    for name in ("conv1", "conv2", "conv3", "fc1"):
        assert rows(diagnosis)[name].silenced == pytest.approx(literal(aligned(merged, pair, program), name), rel=1e-12)
    assert rows(diagnosis)["conv2"].silenced != pytest.approx(literal(pair, "conv2"), rel=1e-3)
    twice = vfx.diagnose(merged, aligned(merged, pair, program), data=BATCHES, match=None, progress=False)
    assert rows(twice)["conv2"].silenced == pytest.approx(rows(diagnosis)["conv2"].silenced, rel=1e-12)


def test_logits(diagnosis: Any, merged: vfx.Result, pair: list[nn.Module]) -> None:
    for logits, model in zip((diagnosis.logits, *diagnosis.edge_logits), (merged.module, *pair)):
        outputs = values(model, X)["fc2"][0]
        np.testing.assert_allclose(logits.means, outputs.mean(0), rtol=1e-10)
        np.testing.assert_allclose(logits.stds, outputs.std(0), rtol=1e-10)
        np.testing.assert_allclose((logits.mean, logits.std), (outputs.mean(), outputs.std()), rtol=1e-10)


def test_any_partition_into_batches_gives_the_same(merged: vfx.Result, program: vfx.Program, diagnosis: Any) -> None:
    whole = vfx.diagnose(merged, program, data=[X], progress=False)
    for one, other in zip(whole.records(), diagnosis.records()):
        for name, value in one.items():
            assert value == (pytest.approx(other[name], rel=1e-10) if isinstance(value, float) else other[name])
    few = vfx.diagnose(merged, program, data=BATCHES, max_samples=9, progress=False)
    assert few.samples == 9


def test_folding_changes_no_measure(program: vfx.Program) -> None:
    unfolded = vfx.compile(
        program,
        passes=[
            vfx.Align("activation", BATCHES, progress=False),
            vfx.Interpolate(0.5),
            vfx.InsertNormalization(),
            vfx.CalibrateNormalization("repair", BATCHES, progress=False),
        ],
    ).program
    folded = vfx.FoldNormalization(batch_norm=True)(unfolded)
    one, other = (vfx.diagnose(p, program, data=BATCHES, match=None, progress=False) for p in (unfolded, folded))
    assert rows(one)["conv1"].variance_ratio is not None
    for name in ("feature", "offset", "variance_ratio", "zero_share", "silenced", "smoothed_bound"):
        np.testing.assert_allclose(*(np.array(d[name], dtype=float) for d in (one, other)), rtol=1e-9, equal_nan=True)


@pytest.mark.parametrize("preserve", [1, 2, 4])
def test_preserved_layers_are_marked_and_the_rest_compared(
    pair: list[nn.Module], program: vfx.Program, preserve: int
) -> None:
    options = {"classes": "permutation", "normalize": None, "preserve": preserve, "progress": False}
    result = vfx.merge(program, data=BATCHES, **options)
    found = rows(vfx.diagnose(result, program, data=BATCHES, progress=False))
    chain = [row for row in found.values() if not row.shortcut]
    states = [row.state for row in chain]
    assert states == ["preserved"] * (preserve - 1) + ["joined"] + ["merged"] * (5 - preserve)
    assert all(row.feature is None and row.bound is not None for row in chain if row.state == "preserved")
    captured = rows(vfx.diagnose(result.module, program, data=BATCHES, progress=False))
    for name, row in captured.items():
        if row.state == "merged":
            assert row.feature_ratio == pytest.approx(found[name].feature_ratio, rel=1e-10)
        else:
            assert row.state == "preserved"
    with torch.no_grad():
        joined = [values(edge, X)[chain[preserve - 1].layer][0] for edge in aligned(result, pair, program)]
    middle = (joined[0] + joined[1]) / 2
    variance = float(middle.var(tuple(d for d in range(middle.ndim) if d != 1)).sum())
    if preserve != 1:  # the BatchNorm behind the first layer is merged
        assert chain[preserve - 1].variance == pytest.approx(variance, rel=1e-9)


def test_three_edges_and_one_reference(pair: list[nn.Module]) -> None:
    third = network(Net, X, seed=9)
    result = vfx.merge([*pair, third], X[:2], data=BATCHES, normalize="reset", progress=False)
    found = vfx.diagnose(result, [*pair, third], data=BATCHES, progress=False)
    v = [literal_variance(model, "fc1") for model in (result.module, *pair, third)]
    assert rows(found)["fc1"].variance_ratio == pytest.approx(3 * v[0] / sum(v[1:]), rel=1e-9)
    alone = vfx.diagnose(pair[0], pair[0], X[:2], data=BATCHES, progress=False)
    assert alone["feature_ratio"] == [pytest.approx(1.0)] * 6
    assert alone["silenced"] == [0.0, 0.0, 0.0, None, 0.0, None]
    assert alone.verdict.healthy


@pytest.mark.parametrize("match", ["auto", None, "weight"])
def test_a_pruned_result_is_held_against_its_dense_network(pair: list[nn.Module], match: str | None) -> None:
    """Whatever made the Result, it is what its module gives; there is nothing to align."""
    options: dict[str, Any] = {"data": X, "normalize": None, "solve": None, "progress": False}
    pruned = vfx.prune(pair[0], X[:2], sparsity=0.98, **options)
    smaller = vfx.prune_structured(pair[0], X[:2], sparsity=0.5, **options)
    for result in (pruned, smaller, vfx.compile(pair[0], X[:2], passes=[])):
        found = vfx.diagnose(result, pair[0], data=BATCHES, match=match, progress=False)
        module = vfx.diagnose(result.module, pair[0], X[:2], data=BATCHES, match=match, progress=False)
        assert [row.feature for row in found.rows] == [row.feature for row in module.rows]
        assert "align" not in str(found.verdict)
        assert found.notes == ()
    assert found.rows[-1].feature == found.rows[-1].edge_features[0]


def test_dead_layers_give_no_nan(pair: list[nn.Module], program: vfx.Program) -> None:
    dead = [copy.deepcopy(edge) for edge in pair]
    for edge in dead:
        nn.init.zeros_(edge.conv3.weight)
        nn.init.constant_(edge.conv3.bias, -5.0)
        nn.init.zeros_(edge.shortcut.weight)
        nn.init.zeros_(edge.shortcut.bias)
    found = vfx.diagnose(dead[0], dead, X[:2], data=BATCHES, progress=False)
    row = rows(found)["conv3"]
    assert (row.feature, row.feature_ratio, row.zero_share, row.silenced) == (0.0, None, 1.0, None)
    assert "NaN" not in found.to_json()
    assert "nan" not in found.to_csv()
    assert found.figures()
    alive = vfx.diagnose(dead[0], program, data=BATCHES, progress=False)
    assert rows(alive)["conv3"].feature_ratio == 0.0
    assert alive.verdict.kind == "features vanish"
    assert ratio(0.0, [0.0, 0.0]) is None
    assert ratio(1.0, [0.0]) is None
    assert ratio(float("inf"), [1.0]) is None


def test_layers_of_other_networks_are_refused(pair: list[nn.Module], program: vfx.Program) -> None:
    other = linear_net(3, 4, 108, 5).double()
    with pytest.raises(ArchitectureError, match="conv1"):
        vfx.diagnose(other, program, data=BATCHES, progress=False)
    with pytest.raises(ArgumentError, match="Interpolate"):
        vfx.diagnose(program, program, data=BATCHES, progress=False)
    with pytest.raises(ArgumentError, match="references are empty"):
        vfx.diagnose(pair[0], [], X[:2], data=BATCHES, progress=False)


def test_activations_are_found_by_rule() -> None:
    program = vfx.trace(resnet20_bn(width=0.25), images(2))
    taps = [tap for tap in layer_taps(program).values() if not tap.layer.shortcut]
    assert all(tap.output.name.startswith("batch_norm") for tap in taps[:-1])
    assert [tap.activation.name if tap.activation else None for tap in taps[:4]] == [
        "relu",
        "relu_1",
        "relu_2",
        "relu_3",
    ]
    assert taps[-1].activation is None
    shortcuts = [tap for tap in layer_taps(program).values() if tap.layer.shortcut]
    assert shortcuts
    assert all(tap.activation is None for tap in shortcuts)
    normed = layer_taps(vfx.trace(vgg11_ln(width=0.125), images(2)))
    assert all(tap.output.name.startswith("conv2d") and tap.activation for tap in list(normed.values())[:-1])


class Tokens(nn.Module):
    """Windows on the batch axis, integer inputs, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids).unflatten(1, (2, 3)).flatten(0, 1)
        x = nn.functional.gelu(self.fc(x)).unflatten(0, (-1, 2)).flatten(1, 2)
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_integer_inputs_and_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(0, 11, (10, 6), generator=generator), torch.ones(10, 6, dtype=torch.double)
    torch.manual_seed(0)
    pair = [Tokens().double().eval() for _ in range(2)]
    options: dict[str, Any] = {"data": [(ids, mask)], "match": None, "progress": False}
    diagnosis = vfx.diagnose(pair[1], pair, (ids[:2], mask[:2]), **options)
    found = rows(diagnosis)

    def feature(model: Any, x: Tensor) -> Tensor:
        return nn.functional.gelu(model.fc(model.embed(x))).flatten(1)

    with torch.no_grad():
        g = [(feature(m, ids) - feature(m, ids[:1])).norm(dim=1).mean().item() for m in pair]
    np.testing.assert_allclose(found["fc"].edge_features, g, rtol=1e-10)
    # a mask of floats is 0 in the reference input: f(0) = 0 / 0
    assert (found["head"].feature, found["head"].offset) == (None, None)
    assert "reference=" in diagnosis.notes[-1]
    given = vfx.diagnose(pair[1], pair, (ids[:2], mask[:2]), reference=(ids[3:4], mask[:1]), **options)
    with torch.no_grad():
        zero = pair[1](ids[3:4], mask[:1])
        expected = (pair[1](ids, mask) - zero).norm(dim=1).mean().item(), zero.norm().item()
    np.testing.assert_allclose((rows(given)["head"].feature, rows(given)["head"].offset), expected, rtol=1e-10)
    assert given.notes == ()


# verdicts -------------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Six linear layers with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


V = torch.randn(60, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture
def deep() -> Any:
    torch.manual_seed(2)
    model = Deep().double().eval()
    with torch.no_grad():
        for layer in model.layers:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return model


def verdict(model: nn.Module, reference: nn.Module, data: Tensor = V) -> Any:
    return vfx.diagnose(model, reference, data[:2], data=[data], progress=False).verdict


@torch.no_grad()
def test_a_network_beside_itself_is_healthy(deep: Any) -> None:
    found = verdict(deep, deep)
    assert found.kind == "healthy"
    assert found.remedies == ()


@torch.no_grad()
def test_vanishing_features_name_their_first_layer_and_remedies(deep: Any) -> None:
    weak = copy.deepcopy(deep)
    for layer in weak.layers[2:]:
        layer.weight *= 0.6
    found = vfx.diagnose(weak, deep, V[:2], data=[V], progress=False)
    assert found.verdict.kind == "features vanish"
    assert (found.verdict.number, found.verdict.layer) == (4, "layers.3")
    assert found["bound"][3] < VANISHED <= found["bound"][2]
    text = str(found.verdict)
    assert "rescale" in text
    assert "bias_calibration" in text
    kept = next(remedy for remedy in found.verdict.remedies if "preserve=" in remedy)
    number = int(re.findall(r"preserve=(\d+)", kept)[0])
    ratios = [1.0, *found["feature_ratio"]]
    assert ratios[-1] >= VANISHED * ratios[number]
    assert ratios[-1] < VANISHED * ratios[number - 1]


@torch.no_grad()
def test_features_that_shrink_with_their_offset(deep: Any) -> None:
    weak, share = copy.deepcopy(deep), 1.0
    for layer in weak.layers:
        share *= 0.5
        layer.weight *= 0.5
        layer.bias *= share
    found = verdict(weak, deep)
    assert found.kind == "features shrink"
    assert found.number == 2
    torch.testing.assert_close(weak(V), deep(V) / 64, rtol=1e-12, atol=0)  # the same order of outputs


@torch.no_grad()
def test_an_offset_that_dominates(deep: Any) -> None:
    biased = copy.deepcopy(deep)
    biased.layers[-1].bias += 40.0
    found = verdict(biased, deep)
    assert found.kind == "offset dominates"
    assert found.number == 6


@torch.no_grad()
def test_variance_collapse_and_explosion(deep: Any) -> None:
    mean = torch.ones(12, dtype=torch.float64) * 3
    data = mean + 0.5 * V
    flat = copy.deepcopy(deep)
    project = torch.outer(mean, mean) / mean.dot(mean)
    flat.layers[0].weight.copy_(deep.layers[0].weight @ project)  # sees the mean of the inputs, not what varies
    found = verdict(flat, deep, data)
    assert found.kind == "variance collapse"
    assert found.number == 1
    wild = copy.deepcopy(deep)
    wild.layers[4].weight *= 3
    wild.layers[4].bias *= 3
    found = verdict(wild, deep)
    assert found.kind == "variance explosion"
    assert found.number == 5


@torch.no_grad()
def test_values_that_are_not_finite(deep: Any) -> None:
    broken = copy.deepcopy(deep)
    for layer in broken.layers:
        layer.weight *= 1e200
    found = vfx.diagnose(broken, deep, V[:2], data=[V], progress=False)
    assert found.verdict.kind == "not finite"
    assert found.verdict.number == 1
    json.loads(found.to_json())


def test_remedies_leave_out_what_was_done(program: vfx.Program) -> None:
    unaligned = vfx.merge(program, match=None, normalize=None)
    weak = vfx.merge(program, data=BATCHES, normalize="reset", progress=False)
    for result in (unaligned, weak):
        with torch.no_grad():
            result.program.weights[0]["fc2.weight"].mul_(1e-3)
    first = vfx.diagnose(unaligned, program, data=BATCHES, progress=False).verdict
    assert any("match=" in remedy for remedy in first.remedies)
    assert any("reset" in remedy for remedy in first.remedies)
    second = vfx.diagnose(weak, program, data=BATCHES, progress=False).verdict
    assert not any("match=" in remedy or "reset" in remedy for remedy in second.remedies)


# files ----------------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    VOID = frozenset({"meta", "br", "path", "use", "rect", "circle", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.links += [str(found[key]) for key in ("href", "xlink:href", "src") if key in found]
        self.ids += [str(found["id"])] if "id" in found else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_no_other_file(diagnosis: Any, tmp_path: Path) -> None:
    text = diagnosis.to_html(tmp_path / "report.html", title="A <b> & its edges")
    assert (tmp_path / "report.html").read_text() == text
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert "<script" not in text
    assert "A &lt;b&gt; &amp; its edges" in text
    assert text.count("<svg") == len(diagnosis.figures()) == 7
    assert not list(tmp_path.glob(".*"))


def test_rows_as_csv_json_and_records(diagnosis: Any, tmp_path: Path) -> None:
    records = diagnosis.records()
    lines = list(csv.DictReader(io.StringIO(diagnosis.to_csv(tmp_path / "rows.csv"))))
    assert [line["layer"] for line in lines] == list(LAYERS)
    assert float(lines[0]["edge1_feature"]) == records[0]["edge1_feature"] == diagnosis.rows[0].edge_features[1]
    assert lines[-1]["zero_share"] == ""
    parsed = json.loads(diagnosis.to_json(tmp_path / "rows.json"))
    assert parsed["rows"] == records
    assert parsed["verdict"]["kind"] == diagnosis.verdict.kind
    assert diagnosis["layer"] == list(LAYERS)
    assert "fc2" in str(diagnosis)
    with pytest.raises(OSError):
        diagnosis.to_json(tmp_path / "missing" / "rows.json")


# calibration data -----------------------------------------------------------------------------------------------------


def test_class_notes_follow_the_stated_rule() -> None:
    assert class_note(dict.fromkeys(range(10), 200)) is None
    noisy = np.random.default_rng(0).multinomial(2000, [0.1] * 10)
    assert class_note(dict(enumerate(noisy.tolist())), 10) is None
    assert class_note({0: 30, 1: 3}, 10) is None  # fewer than five a class say nothing
    sorted_set = class_note({0: 100, 1: 100, 2: 100}, 10)
    assert sorted_set is not None
    assert "7 of 10 classes are empty" in sorted_set
    long_tail = class_note({0: 800, 1: 150, 2: 50})
    assert long_tail is not None
    assert "class 0 has 800" in long_tail
    large = dict.fromkeys(range(10), 10_000) | {0: 11_500}
    assert class_note(large) is None  # significant, but slight


def test_merge_warns_of_skewed_calibration_data(program: vfx.Program) -> None:
    labels = torch.arange(23) % 5
    even = [(x, y) for x, y in zip(BATCHES, labels.split(8))]
    skewed = [(X, torch.zeros(23, dtype=torch.long)), (X, torch.ones(23, dtype=torch.long))]
    notes = vfx.merge(program, data=[*even, *even], progress=False).report.notes
    assert not any("skewed" in note for note in notes)
    notes = vfx.merge(program, data=skewed, progress=False).report.notes
    assert any("3 of 5 classes are empty" in note for note in notes)


def test_merge_checks_variances_on_held_out_batches(program: vfx.Program) -> None:
    options: dict[str, Any] = {"normalize": "reset", "classes": "permutation", "progress": False}
    fair = vfx.merge(program, data=[X[:16]], held_out=[X[16:]], **options)
    assert not any("held-out" in note for note in fair.report.notes)
    skewed = vfx.merge(program, data=[X[:16] / 10], held_out=[X[16:]], **options)
    assert any("held-out" in note for note in skewed.report.notes)
    assert variance_note(()) is None


@pytest.mark.parametrize("first", [300, 40])
def test_one_class_that_is_too_full_or_too_empty_is_enough(first: int) -> None:
    assert "look skewed" in (class_note({0: first} | dict.fromkeys(range(1, 10), 100)) or "")
    assert class_note(dict.fromkeys(range(10), 100)) is None
