"""CenterStream: LayerNorms whose input nobody else sees become RMSNorms; streams whose mean is read stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, node_values
from micro_models import net, parameter
from torch import Tensor, nn
from vfx.passes.center_stream import CenterStream
from vfx.passes.fold_gain import FoldGain
from vfx.passes.interpolate import Interpolate
from vfx.passes.restore_structure import RestoreStructure

from vfx.analyse.centring import StreamNorms
from vfx.analyse.symmetry import symmetry
from vfx.api import compile, trace
from vfx.errors import VerificationError
from vfx.models.vit import vit_tiny
from vfx.operators import operator
from vfx.program import Program
from vfx.proof import same_function

PICTURES = images(3, 16, dtype=torch.float64)
TOKENS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _program(build: Callable[[], nn.Module], x: Tensor = TOKENS) -> Program:
    return trace(edges(build, x), x)


def _vit() -> nn.Module:
    return vit_tiny(width=0.06, size=16, patch=8, depth=2)


def _norms(program: Program) -> list[str]:
    return [operator(n) for n in program.graph.nodes if operator(n) in ("aten.layer_norm", "aten.rms_norm")]


def _residual(middle: Callable[[Any, Tensor], Tensor] | None = None, affine: bool = False) -> Callable[[], nn.Module]:
    """A pre-norm residual MLP on a class token and tokens; ``middle`` reads the stream on the way."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.embed(x) + self.position
        h = torch.cat([self.token.expand(x.shape[0], 1, -1), h], 1)
        h = h + self.down(F.gelu(self.up(self.norm1(h))))
        h = 0.5 * h - self.side(F.relu(self.across(self.norm2(h))))
        return self.head(self.norm3(h).mean(1)) + (0 if middle is None else middle(self, h))

    def build() -> nn.Module:
        norms = {f"norm{i}": nn.LayerNorm(8, elementwise_affine=affine) for i in (1, 2, 3)}
        return net(
            forward, embed=nn.Linear(6, 8), position=parameter(1, 4, 8), token=parameter(1, 1, 8), up=nn.Linear(8, 12),
            down=nn.Linear(12, 8), across=nn.Linear(8, 5), side=nn.Linear(5, 8, bias=False), head=nn.Linear(8, 3),
            other=nn.Linear(8, 3), **norms,
        )  # fmt: skip

    return build


def _inside_heads() -> nn.Module:
    """Queries and keys that are normalised in each head."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(F.layer_norm(q, [4]), F.layer_norm(k, [4]), v)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))

    layers = {name: nn.Linear(6, 8) for name in "qkv"}
    return net(forward, **layers, head=nn.Linear(8, 3))


CENTRED: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "residual": (_residual(), TOKENS, 3),
    "residual, with gains": (_residual(affine=True), TOKENS, 3),
    "vit": (_vit, PICTURES, 5),
    "inside heads": (_inside_heads, TOKENS, 2),
}


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("fold", [False, True])
def test_the_function_stays_and_layer_norms_go(name: str, fold: bool) -> None:
    build, x, count = CENTRED[name]
    program = _program(build, x)
    source = FoldGain()(program) if fold else program
    centred = CenterStream()(source)
    assert _norms(centred) == ["aten.rms_norm"] * count
    assert not centred.notes
    for edge in range(program.edges):
        assert same_function(program.select(edge), centred.select(edge)) <= 1e-10


def test_every_writer_and_every_reader_is_centred() -> None:
    """W ← P W, b ← P b, tables and tokens ← P; readers' columns W ← W P: with P written out."""
    program = _program(_residual())
    centred = CenterStream()(program)
    p = torch.eye(8, dtype=torch.float64) - 1 / 8
    for old, new in zip(program.weights, centred.weights):
        for name in ("embed.weight", "embed.bias", "down.weight", "down.bias", "side.weight"):
            close(new[name], p @ old[name], 1e-14)
        for name in ("position", "token", "up.weight", "across.weight", "head.weight"):
            close(new[name], old[name] @ p, 1e-14)
        assert new["up.bias"] is old["up.bias"]


def test_the_stream_has_no_mean() -> None:
    program = _program(_residual())
    before, after = (node_values(p, TOKENS) for p in (program, CenterStream()(program)))
    assert before["sub"].mean(-1).abs().max() > 1e-2
    assert after["sub"].mean(-1).abs().max() < 1e-14
    close(after["sub"], before["sub"] - before["sub"].mean(-1, keepdim=True), 1e-13)


def test_readers_are_left_alone_on_request() -> None:
    program = _program(_residual())
    kept = CenterStream(readers=False)(program)
    assert kept.weights[0]["up.weight"] is program.weights[0]["up.weight"]
    assert not torch.equal(kept.weights[0]["down.weight"], program.weights[0]["down.weight"])


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a layer": (_residual(lambda m, h: m.other(h).mean(1)), r"linear_\d+ \(other.weight\) reads the mean"),
    "an activation": (
        _residual(lambda m, h: m.other(torch.tanh(h)).mean(1)),
        r"aten.tanh \(tanh\) does not let it be centred",
    ),
    "an rms norm": (_residual(lambda m, h: m.other(F.rms_norm(h, [8])).mean(1)), r"aten.rms_norm \(rms_norm\)"),
    "the output": (_residual(lambda m, h: h.sum((1, 2))[:, None]), r"aten.sum \(sum_1\)"),
    "a constant": (_residual(lambda m, h: m.other(F.layer_norm(h + 0.5, [8])).mean(1)), r"aten.add \(add_\d\)"),
    "a larger norm": (
        _residual(lambda m, h: m.other(F.layer_norm(h, [5, 8])).mean(1)),
        r"aten.layer_norm \(layer_norm_3\)",
    ),
    "a channel's gain": (
        _residual(lambda m, h: m.other(h * m.position[0, 0]).mean(1)),
        r"aten.mul \(mul_\d\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_stream_whose_mean_is_read_stays(name: str) -> None:
    build, reason = REFUSED[name]
    program = _program(build)
    result = CenterStream(readers=False)(program)
    assert set(_norms(result)) <= {"aten.layer_norm", "aten.rms_norm"}
    assert _norms(result) == _norms(program)
    assert all(result.weights[0][name] is program.weights[0][name] for name in program.names())
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("\n".join(result.notes))


WRITERS = ("embed.weight", "embed.bias", "position", "token", "down.weight", "down.bias", "side.weight")


@pytest.mark.parametrize("missed", WRITERS)
def test_a_missed_writer_fails_the_check(missed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vfx.passes import center_stream

    program, centred = _program(_residual()), center_stream._centred
    streams = StreamNorms(symmetry(program))
    assert sorted(place.fqn for place in streams.writers) == sorted(WRITERS)
    assert sorted(place.fqn for place in streams.readers) == ["across.weight", "head.weight", "up.weight"]
    monkeypatch.setattr(center_stream, "_centred", lambda t, place: t if place.fqn == missed else centred(t, place))
    with pytest.raises(VerificationError, match="CenterStream changed the function"):
        CenterStream()(program)


def test_the_users_class_comes_back() -> None:
    """Merged in its rewritten form, a ViT goes back to LayerNorms with gains of one."""
    models = edges(_vit, PICTURES)
    program = trace(models, PICTURES)
    rewritten = CenterStream()(FoldGain()(program))
    merged = Interpolate(0.5)(rewritten)
    result = compile(merged, passes=[RestoreStructure(program)])
    assert type(result.module) is type(models[0])
    close(result.module(PICTURES), merged(PICTURES), 1e-10)


def test_an_uncentred_stream_does_not_go_back() -> None:
    program = _program(_residual())
    centred = CenterStream()(program)
    generator = torch.Generator().manual_seed(0)
    sets = [
        dict(weights) | {"embed.bias": torch.randn(8, generator=generator, dtype=torch.float64)}
        for weights in centred.weights
    ]
    with pytest.raises(VerificationError, match="computes something else"):
        RestoreStructure(program)(centred.with_weights(sets))


def test_streams_end_at_the_norms() -> None:
    """Swin's way: a LayerNorm behind the patches opens the stream, and its gain cannot be centred."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.opening(self.embed(x))
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(self.last(self.narrow(h)))

    def build() -> nn.Module:
        return net(
            forward, embed=nn.Linear(6, 8), opening=nn.LayerNorm(8), norm=nn.LayerNorm(8), up=nn.Linear(8, 12),
            down=nn.Linear(12, 8), narrow=nn.Linear(8, 7), last=nn.LayerNorm(7), head=nn.Linear(7, 3),
        )  # fmt: skip

    result = CenterStream()(_program(build))
    assert _norms(result) == ["aten.rms_norm", "aten.layer_norm", "aten.rms_norm"]
    assert "layer_norm_1: aten.layer_norm (layer_norm) does not let it be centred" in result.notes[0]


def test_mixing_tokens_behind_an_activation_keeps_the_mean() -> None:
    """MLP-Mixer: what a token layer adds to the stream has passed an activation on the channels."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.back(F.gelu(self.tokens(self.norm(h).transpose(1, 2)))).transpose(1, 2)
        return self.head(self.last(h).mean(1))

    def build() -> nn.Module:
        return net(
            forward, embed=nn.Linear(6, 8), norm=nn.LayerNorm(8), tokens=nn.Linear(4, 5), back=nn.Linear(5, 4),
            last=nn.LayerNorm(8), head=nn.Linear(8, 3),
        )  # fmt: skip

    program = _program(build)
    folded = FoldGain()(program)
    assert folded.history[-1] == "FoldGain(1 gains)"  # the last one; the first is read across tokens, with a bias
    assert _norms(CenterStream()(folded)) == ["aten.layer_norm"] * 2
