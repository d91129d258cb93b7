"""Every score equals a literal implementation of its formula, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, images, network
from torch import Tensor, nn

from vfx.api import prune, trace
from vfx.errors import ArgumentError, DataError, PassError
from vfx.models import vit_tiny
from vfx.program import Program
from vfx.pruning.scores.catalogue import SCORES, score_named
from vfx.pruning.scores.fisher import DiagonalFisher
from vfx.pruning.scores.gradient import GradientWeight
from vfx.pruning.scores.magnitude import Magnitude
from vfx.pruning.scores.mixed import Mixed
from vfx.pruning.scores.once import ScoreOnce
from vfx.pruning.scores.random import Random
from vfx.pruning.scores.score import Score, Subject
from vfx.pruning.scores.wanda import Wanda, input_squares
from vfx.pruning.scores.woodfisher import WoodFisher, _Run
from vfx.pruning.selection import selection
from vfx.pruning.targets import find_targets

COUNT, CLASSES = 9, 4
X = images(COUNT, 8, dtype=torch.float64)
Y = torch.randint(CLASSES, (COUNT,), generator=torch.Generator().manual_seed(1))
DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]
EXACT = 1e-6


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def attentive() -> nn.Module:
    return vit_tiny(width=1 / 32, num_classes=CLASSES, size=8, patch=4, depth=1)


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Program]:
    model = network(small, X)
    return model, trace(model, X[:2])


def subject(program: Program, **options: Any) -> Subject:
    return Subject(program, find_targets(program)[0], **{"data": DATA, "progress": False} | options)


def literal_gradients(
    model: nn.Module, names: list[str], groups: list[list[int]] | None = None, labels: Tensor = Y
) -> dict[str, Tensor]:
    """Gradients (n, *shape) of the mean loss of each group of samples, one backward pass after another."""
    parameters = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for group in groups or [[index] for index in range(COUNT)]:
        model.zero_grad()
        F.cross_entropy(model(X[group]), labels[group]).backward()
        for name in names:
            rows[name].append(parameters[name].grad.clone())  # type: ignore[union-attr]
    return {name: torch.stack(found) for name, found in rows.items()}


def all_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        close(found[name], value, tolerance)


# magnitude, random ----------------------------------------------------------------------------------------------------


def test_magnitude_and_random(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    state = model.state_dict()
    all_close(Magnitude().scores(subject(program)), {n: state[n].abs() for n in ("0.weight", "3.weight", "6.weight")})
    first, again, other = (Random().scores(subject(program, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert first["0.weight"].unique().numel() == first["0.weight"].numel()


# gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [small, attentive])
def test_diagonal_fisher_is_the_mean_of_squared_sample_gradients(build: Callable[[], nn.Module]) -> None:
    model = network(build, X)
    found = DiagonalFisher().scores(subject(trace(model, X[:2])))
    gradients = literal_gradients(model, list(found))
    weights = dict(model.named_parameters())
    expected = {n: weights[n].detach() ** 2 * (g.square().mean(0) + 1e-4) / 2 for n, g in gradients.items()}
    all_close(found, expected)
    wrong = {n: weights[n].detach() ** 2 * (g.mean(0).square() + 1e-4) / 2 for n, g in gradients.items()}
    with pytest.raises(AssertionError):
        all_close(found, wrong)


def test_minibatches_average_before_the_square(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    found = DiagonalFisher(damping=0.0, minibatch=2).scores(subject(program))
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]  # of nine samples the last is left out
    gradients = literal_gradients(model, list(found), groups)
    weights = dict(model.named_parameters())
    all_close(found, {n: weights[n].detach() ** 2 * g.square().mean(0) / 2 for n, g in gradients.items()})
    with pytest.raises(DataError, match="9 samples hold no minibatch of 10 alike"):
        DiagonalFisher(minibatch=10).scores(subject(program))


def test_minibatches_reach_over_batches_and_over_the_limit(net: tuple[nn.Module, Program]) -> None:
    """Batches of 4 and 5 samples, the second cut at 8: what is over goes into the next minibatch."""
    model, program = net
    weights = dict(model.named_parameters())
    for options, groups in (({}, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]), ({"max_samples": 8}, [[0, 1, 2], [3, 4, 5]])):
        found = DiagonalFisher(damping=0.0, minibatch=3).scores(subject(program, **options))
        gradients = literal_gradients(model, list(found), groups)
        all_close(found, {n: weights[n].detach() ** 2 * g.square().mean(0) / 2 for n, g in gradients.items()})


def test_woodfisher_reads_as_many_gradients_whatever_the_minibatch(net: tuple[nn.Module, Program]) -> None:
    """Its bound is 400 gradients, not 400 samples: two batches of 256 hold two minibatches of 256."""
    _, program = net
    data = [(images(256, 8, seed=seed, dtype=torch.float64), torch.arange(256) % CLASSES) for seed in range(2)]
    run = _Run(WoodFisher(minibatch=256), subject(program, data=data))
    assert [len(run._gradients(part)) for part in run.parts] == [2]


def test_labels_that_are_no_classes_are_named(net: tuple[nn.Module, Program]) -> None:
    _, program = net
    for label in (CLASSES, -1):
        data = [(X, Y.clone().index_fill(0, torch.tensor([2]), label))]
        for score in (DiagonalFisher(), WoodFisher(), GradientWeight()):
            with pytest.raises(DataError, match=rf"1 of 9 labels are none of the 4 classes 0 to 3, such as {label}"):
                score.scores(subject(program, data=data))
    padded = Y.clone()
    padded[1:] = -100
    found = DiagonalFisher(damping=0.0).scores(subject(program, data=[(X, padded)]))
    alone = DiagonalFisher(damping=0.0).scores(subject(program, data=[(X[:1], Y[:1])]))
    all_close(found, {name: value / COUNT for name, value in alone.items()})


def test_gradient_times_weight(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    found = GradientWeight().scores(subject(program))
    gradients = literal_gradients(model, list(found))
    weights = dict(model.named_parameters())
    all_close(found, {name: (weights[name] * g.mean(0)).detach().abs() for name, g in gradients.items()})


def test_labels_come_from_the_network_where_the_data_have_none(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    with torch.no_grad():
        best = model(X).argmax(1)
    argmax = DiagonalFisher(labels="argmax").scores(subject(program, data=[X[:4], X[4:]]))
    gradients = literal_gradients(model, list(argmax), labels=best)
    weights = dict(model.named_parameters())
    all_close(argmax, {n: weights[n].detach() ** 2 * (g.square().mean(0) + 1e-4) / 2 for n, g in gradients.items()})
    sampled = [DiagonalFisher().scores(subject(program, data=[X], seed=seed))["6.weight"] for seed in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


def test_a_loss_of_ones_own(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    found = GradientWeight(loss=lambda output, labels: output.square().mean()).scores(subject(program, data=X))
    model.zero_grad()
    model(X).square().mean().backward()
    all_close(found, {n: (p * p.grad).detach().abs() for n, p in model.named_parameters() if n in found})
    with pytest.raises(ArgumentError, match="must return one number"):
        GradientWeight(loss=lambda output, labels: output).scores(subject(program))
    with pytest.raises(ArgumentError, match="needs integer labels"):
        GradientWeight().scores(subject(program, data=[(X, X)]))


def test_token_and_pixel_scores_keep_their_class_axis() -> None:
    tokens = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()
    x, y = torch.randn(3, 7, 5, dtype=torch.float64), torch.randint(CLASSES, (3, 7))
    found = GradientWeight().scores(subject(trace(tokens, x), data=[(x, y)]))
    F.cross_entropy(tokens(x).flatten(0, 1), y.flatten()).backward()
    all_close(found, {n: (p * p.grad).detach().abs() for n, p in tokens.named_parameters() if n in found})
    pixels = nn.Sequential(nn.Conv2d(3, CLASSES, 3)).double()
    y = torch.randint(CLASSES, (COUNT, 6, 6))
    found = GradientWeight().scores(subject(trace(pixels, X), data=[(X, y)]))
    F.cross_entropy(pixels(X), y).backward()
    all_close(found, {"0.weight": (pixels[0].weight * pixels[0].weight.grad).detach().abs()})


# WoodFisher -----------------------------------------------------------------------------------------------------------


def fisher_block(gradients: Tensor, damping: float) -> Tensor:
    """The damped empirical Fisher matrix, sample by sample."""
    matrix = damping * torch.eye(gradients.shape[1], dtype=torch.float64)
    for g in gradients:
        matrix = matrix + torch.outer(g, g) / len(gradients)
    return matrix


def cut(size: int, block: int) -> list[slice]:
    count = -(-size // block)
    return [slice(i * size // count, (i + 1) * size // count) for i in range(count)]


BLOCKS = {"N < B": 40, "N >= B": 7}


@pytest.mark.parametrize("memory", [1 << 30, 20000])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_woodfisher_against_the_explicit_inverse(net: tuple[nn.Module, Program], block: int, memory: int) -> None:
    model, program = net
    damping = 1e-5
    score = WoodFisher(block=block, damping=damping, memory=memory)
    found = score.scores(subject(program))
    gradients = literal_gradients(model, list(found))
    for name, weight in model.state_dict().items():
        if name not in found:
            continue
        flat, rows, values = weight.flatten(), gradients[name].flatten(1), found[name].flatten()
        for part in cut(flat.numel(), block):
            inverse = torch.linalg.inv(fisher_block(rows[:, part], damping))
            close(values[part], flat[part] ** 2 / (2 * inverse.diagonal()), EXACT)
            with pytest.raises(AssertionError):  # the diagonal alone is another score
                close(values[part], flat[part] ** 2 * fisher_block(rows[:, part], damping).diagonal() / 2, EXACT)


@pytest.mark.parametrize("update", ["sum", "joint", None])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("memory", [1 << 30, 20000])
def test_woodfisher_update(net: tuple[nn.Module, Program], block: int, update: Any, memory: int) -> None:
    model, program = net
    damping = 1e-3
    own = subject(program)
    budgets = selection("global", 0.6).budgets(own.targets)
    pruned = WoodFisher(block=block, damping=damping, update=update, memory=memory).prune(
        own, lambda scores: selection("global", 0.6).masks(budgets, scores)
    )
    gradients = literal_gradients(model, list(pruned.masks))
    for name, mask in pruned.masks.items():
        flat, kept, expected = program.weights[0][name].flatten(), mask.flatten(), []
        for part in cut(flat.numel(), block):
            inverse = torch.linalg.inv(fisher_block(gradients[name].flatten(1)[:, part], damping))
            w, gone = flat[part], ~kept[part]
            change = torch.zeros_like(w)
            if update == "sum":
                for q in gone.nonzero()[:, 0]:
                    change -= inverse[:, q] * w[q] / inverse[q, q]
            elif update == "joint":
                change = -inverse[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ w[gone]
            expected.append((w + change) * ~gone)
        close(pruned.weights[name].flatten(), torch.cat(expected), EXACT)
        assert not pruned.weights[name][~mask].any()


def test_woodfisher_leaves_what_is_gone_alone(net: tuple[nn.Module, Program]) -> None:
    """In later steps the Fisher matrix is that of the weights that are left."""
    model, program = net
    kept = {"0.weight": torch.rand(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.4}
    found = WoodFisher(block=1000).scores(subject(program, kept=kept))["0.weight"].flatten()
    left = kept["0.weight"].flatten()
    rows = literal_gradients(model, ["0.weight"])["0.weight"].flatten(1)[:, left]
    inverse = torch.linalg.inv(fisher_block(rows, 1e-5))
    close(found[left], model.state_dict()["0.weight"].flatten()[left] ** 2 / (2 * inverse.diagonal()), EXACT)


def test_woodfisher_reads_as_many_samples_as_it_is_told(net: tuple[nn.Module, Program]) -> None:
    model, program = net
    found = WoodFisher(block=1000).scores(subject(program, max_samples=6))["6.weight"]
    rows = literal_gradients(model, ["6.weight"], [[i] for i in range(6)])["6.weight"].flatten(1)
    inverse = torch.linalg.inv(fisher_block(rows, 1e-5))
    close(found.flatten(), model.state_dict()["6.weight"].flatten() ** 2 / (2 * inverse.diagonal()), EXACT)


class TwoHeads(nn.Module):
    """The loss reads the first output alone: the second head's gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.read, self.unread = nn.Linear(5, 6), nn.Linear(6, CLASSES), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        return self.read(x), self.unread(x)


@pytest.mark.parametrize("score", ["fisher", "gradient", "woodfisher"])
def test_a_head_that_the_loss_does_not_read_goes_first(score: str) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    pruned = prune(TwoHeads(), x, sparsity=0.3, score=score, data=x, normalize=None, solve=None, progress=False)
    zeros = {name: float((weight == 0).double().mean()) for name, weight in pruned.module.named_parameters()}
    assert zeros["unread.weight"] > 0.2
    assert zeros["read.weight"] <= zeros["unread.weight"]


# mixed ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_objectives_are_added_in_units_of_their_means(net: tuple[nn.Module, Program], share: float) -> None:
    model, program = net
    found = Mixed(share, damping=0.0).scores(subject(program))
    by_sample = literal_gradients(model, list(found))
    linear = dict(model.named_parameters())["6.weight"].detach()
    inputs = model[:6](X).detach()
    for name, weight in ((name, dict(model.named_parameters())[name].detach()) for name in found):
        loss = weight**2 * (by_sample[name] ** 2).sum(0) / COUNT / 2
        layer = Wanda().scores(subject(program))[name] ** 2
        if name == "6.weight":  # the norms of a linear layer's inputs, written out
            close(layer, linear**2 * (inputs**2).sum(0), EXACT * float(layer.max()))
        close(found[name], (1 - share) * layer / layer.mean() + share * loss / loss.mean(), EXACT)


def test_mixed_objectives_are_not_compared_over_layers(net: tuple[nn.Module, Program]) -> None:
    with pytest.raises(ArgumentError, match="choose scope"):
        prune(net[1], sparsity=0.5, score="mixed", scope="global", data=DATA)
    with pytest.raises(ArgumentError, match=r"share=1\.5"):
        Mixed(1.5)


# Wanda ----------------------------------------------------------------------------------------------------------------


class Product(nn.Module):
    """x W with W (in, out), as GPT-2 stores it; with a bias it is addmm."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(4)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 4), (5,)),
    "linear_tokens": (nn.Linear(5, 4), (3, 5)),
    "matmul": (Product(False), (5,)),
    "matmul_tokens": (Product(False), (3, 5)),
    "addmm": (Product(True), (5,)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (4, 11)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "conv2d_strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2)), (3, 7, 8)),
    "conv2d_same": (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (3, 6, 7)),
    "conv2d_valid": (nn.Conv2d(3, 4, 3, padding="valid"), (3, 5, 5)),
    "conv2d_circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "conv2d_grouped": (nn.Conv2d(4, 6, 3, groups=2, stride=2), (4, 6, 6)),
    "conv2d_depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 4, 4)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 3, 4, 3)),
    "transposed1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1, dilation=2), (3, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=2, groups=2), (4, 4, 5)),
    "transposed3d": (nn.ConvTranspose3d(2, 2, 2, stride=2), (2, 2, 3, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_input_norms_are_those_of_the_derivative(name: str) -> None:
    """‖X_j‖ of a weight is the norm of ∂(its output channel)/∂weight: what multiplies it over the data."""
    layer, shape = copy.deepcopy(LAYERS[name][0]).double(), LAYERS[name][1]
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    program = trace(layer, x)
    (target,), _ = find_targets(program)
    weight = program.weights[0]["weight"].detach()

    def output(value: Tensor) -> Tensor:
        return program.with_weights([{**program.weights[0], "weight": value}])(x)

    jacobian = torch.autograd.functional.jacobian(output, weight)
    expected = jacobian.square().sum(tuple(range(jacobian.ndim - weight.ndim))).sqrt() * weight.abs()
    found = Wanda().scores(subject(program, data=[x[:1], x[1:]]))["weight"]
    close(found, expected, 1e-9)
    assert torch.equal(target.restored(target.matrix(weight)), weight)
    per_batch = target.matrix(torch.ones_like(weight)) * input_squares(target, target.nodes[0], x)[..., :, :]
    if name != "conv2d_circular":  # its layer reads the padded input
        close(target.restored(per_batch).sqrt() * weight.abs(), expected, 1e-9)


def test_wanda_sums_over_the_calls_of_a_shared_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    model, x = network(Twice, torch.randn(4, 5, dtype=torch.float64)), torch.randn(6, 5, dtype=torch.float64)
    with torch.no_grad():
        inner = torch.relu(model.layer(x))
        expected = model.layer.weight.abs() * (x.square().sum(0) + inner.square().sum(0)).sqrt()
    close(Wanda().scores(subject(trace(model, x), data=x))["layer.weight"], expected, 1e-9)


@pytest.mark.parametrize("propagation", ["dense", "pruned"])
@pytest.mark.parametrize("scope", ["row", "layer", "1:2"])
def test_wanda_propagation(propagation: Any, scope: str) -> None:
    """Dense norms come from the unpruned network, pruned ones from what the layers pruned before leave."""
    model = network(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 6).double())
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sparsity = None if ":" in scope else 0.5
    result = prune(
        model, x[:2], sparsity=sparsity, score=Wanda(propagation), scope=scope, data=x, protect=(), normalize=None,
        progress=False,
    )  # fmt: skip
    chosen = selection(scope, sparsity)
    own = find_targets(trace(model, x[:2]))[0]
    budgets, working = chosen.budgets(own), copy.deepcopy(model)
    with torch.no_grad():
        for target, index in zip(own, (0, 2)):
            seen = (working if propagation == "pruned" else model)[:index](x)
            values = model[index].weight.abs() * seen.square().sum(0).sqrt()
            mask = chosen.masks(budgets, {target.name: values})[target.name]
            working[index].weight.mul_(mask)
    for index in (0, 2):
        assert torch.equal(result.module[index].weight, working[index].weight)


def test_propagation_changes_the_second_layers_norms() -> None:
    """The control of the test above: the two propagations differ."""
    model = network(lambda: nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 9)), torch.randn(4, 30).double())
    x = torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"sparsity": 0.7, "data": x, "protect": (), "normalize": None, "progress": False}
    one, other = (prune(model, x[:2], score=Wanda(kind), **options).module for kind in ("dense", "pruned"))
    assert torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[2].weight, other[2].weight)


# the catalogue and scores of ones own ---------------------------------------------------------------------------------


def test_the_catalogue_and_its_errors(net: tuple[nn.Module, Program]) -> None:
    assert all(SCORES[name]().name == name for name in SCORES)
    with pytest.raises(ArgumentError, match="choose one of magnitude"):
        score_named("nothing")
    with pytest.raises(ArgumentError, match="takes no such options"):
        score_named("magnitude", block=3)
    for wrong in ({"update": "all"}, {"damping": 0}, {"block": 0}, {"minibatch": True}):
        with pytest.raises(ArgumentError):
            WoodFisher(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="layer by layer"):
        prune(net[1], sparsity=0.5, score=Wanda("pruned"), scope="global", data=X)
    with pytest.raises(ArgumentError, match="labels"):
        DiagonalFisher(labels="wrong").scores(subject(net[1]))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="propagation"):
        Wanda("wrong")  # type: ignore[arg-type]


def test_a_capture_with_a_fixed_batch_has_no_sample_gradients() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.reshape(3, 192))

    program = trace(Fixed(), X[:3], dynamic_shapes=None)
    with pytest.raises(PassError, match="gradients of single samples"):
        DiagonalFisher().scores(subject(program, data=[(X[:3], Y[:3])]))


def test_scores_are_computed_once_for_many_prunings(net: tuple[nn.Module, Program]) -> None:
    _, program = net
    calls = []

    class Counted(Magnitude):
        def scores(self, subject: Subject) -> dict[str, Tensor]:
            calls.append(1)
            return super().scores(subject)

    for make in (Counted, WoodFisher):
        kept = ScoreOnce(make())
        for sparsity in (0.3, 0.8):
            options: dict[str, Any] = {"sparsity": sparsity, "data": DATA, "normalize": None, "progress": False}
            one, other = prune(program, score=kept, **options), prune(program, score=make(), **options)
            for name, tensor in one.program.weights[0].items():
                assert torch.equal(tensor, other.program.weights[0][name])
    assert len(calls) == 3  # once for both, and once for each without
    with pytest.raises(ArgumentError, match="how earlier layers are pruned"):
        ScoreOnce(Wanda("pruned"))


def test_a_score_of_ones_own(net: tuple[nn.Module, Program]) -> None:
    class Positive(Score):
        name = "positive"

        def scores(self, subject: Subject) -> dict[str, Tensor]:
            return {target.name: subject.weight(target) for target in subject.targets}

    module = prune(net[1], sparsity=0.4, score=Positive(), scope="layer", normalize=None).module
    for index in (0, 3, 6):
        left = module[index].weight[module[index].weight != 0]
        gone = net[0][index].weight[module[index].weight == 0]
        assert left.min() > gone.max()

    class Broken(Positive):
        def scores(self, subject: Subject) -> dict[str, Tensor]:
            return {name: value * torch.nan for name, value in super().scores(subject).items()}

    with pytest.raises(PassError, match="hold NaN"):
        prune(net[1], sparsity=0.4, score=Broken(), normalize=None)
