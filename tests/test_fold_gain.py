"""FoldGain: gains and shifts go into the layers next to them where that keeps the function, and stay where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import close, edges, images
from micro_models import net, parameter
from torch import Tensor, nn
from vfx.passes.center_stream import CenterStream
from vfx.passes.fold_gain import FoldGain
from vfx.passes.interpolate import Interpolate
from vfx.passes.restore_structure import RestoreStructure
from vfx.passes.untie_weights import UntieWeights

from vfx.analyse.folding import Folding
from vfx.analyse.gains import gains
from vfx.analyse.symmetry import symmetry
from vfx.api import compile, trace
from vfx.errors import PassError, VerificationError
from vfx.models.vit import vit_tiny
from vfx.operators import arguments, operator
from vfx.program import Program
from vfx.proof import same_function

PICTURES = images(3, 16, dtype=torch.float64)
TOKENS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _program(build: Callable[[], nn.Module], x: Tensor = TOKENS) -> Program:
    return trace(edges(build, x), x)


def _vit() -> nn.Module:
    return vit_tiny(width=0.06, size=16, patch=8, depth=2)


def _vit_program() -> Program:
    return _program(_vit, PICTURES)


def _norms(program: Program) -> list[Any]:
    return [node for node in program.graph.nodes if operator(node) in ("aten.layer_norm", "aten.rms_norm")]


def _between(middle: Callable[..., Tensor], width: int = 8, **parts: Any) -> Callable[[], nn.Module]:
    """linear -> ``middle`` -> GELU -> linear, on tokens of six features."""

    def build() -> nn.Module:
        made = {name: part() for name, part in parts.items()}
        first, last = nn.Linear(6, width), nn.Linear(12, 3)
        return net(lambda self, x: self.last(F.gelu(middle(self, self.first(x)))), first=first, last=last, **made)

    return build


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    """As Hugging Face writes it."""
    x = x * torch.rsqrt(x.to(torch.float32).to(x.dtype).pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * x.to(weight.dtype)


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of four channels."""
    q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


LAYER_NORM = _between(lambda m, h: m.up(m.norm(h)), norm=lambda: nn.LayerNorm(8), up=lambda: nn.Linear(8, 12))
FOLDS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "layer norm": (LAYER_NORM, TOKENS, 1),
    "layer norm, no bias behind": (
        _between(lambda m, h: m.up(m.norm(h)), norm=lambda: nn.LayerNorm(8), up=lambda: nn.Linear(8, 12, bias=False)),
        TOKENS,
        1,
    ),
    "two readers": (
        _between(
            lambda m, h: m.up(m.norm(h)) * m.gate(m.norm(h)),
            norm=lambda: nn.LayerNorm(8),
            up=lambda: nn.Linear(8, 12),
            gate=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        0,  # the norm is called twice
    ),
    "one value, two readers": (
        _between(
            lambda m, h: (lambda z: m.up(z) * torch.sigmoid(m.gate(z)))(m.norm(h)),
            norm=lambda: nn.LayerNorm(8),
            up=lambda: nn.Linear(8, 12),
            gate=lambda: nn.Linear(8, 12, bias=False),
        ),
        TOKENS,
        1,
    ),
    "rms norm": (
        _between(lambda m, h: m.up(m.norm(h)), norm=lambda: nn.RMSNorm(8), up=lambda: nn.Linear(8, 12)),
        TOKENS,
        1,
    ),
    "rms norm, written out": (
        _between(lambda m, h: m.up(_rms(h, m.gain)), gain=lambda: parameter(8), up=lambda: nn.Linear(8, 12)),
        TOKENS,
        1,
    ),
    "rms norm, one more than its weight": (
        _between(lambda m, h: m.up(_rms(h, 1.0 + m.gain)), gain=lambda: parameter(8), up=lambda: nn.Linear(8, 12)),
        TOKENS,
        1,
    ),
    "mean of the tokens": (
        _between(lambda m, h: m.up(m.norm(h).mean(1)), norm=lambda: nn.LayerNorm(8), up=lambda: nn.Linear(8, 12)),
        TOKENS,
        1,
    ),
    "patch merging": (
        _between(
            lambda m, h: m.up(m.norm(torch.cat([h[:, ::2], h[:, 1::2]], -1))),
            norm=lambda: nn.LayerNorm(16),
            up=lambda: nn.Linear(16, 12, bias=False),
        ),
        TOKENS,
        1,
    ),
    "layer scale": (
        _between(
            lambda m, h: m.up(m.norm(h + m.gamma * m.down(F.gelu(m.deep(h))))),
            norm=lambda: nn.LayerNorm(8),
            gamma=lambda: parameter(8),
            deep=lambda: nn.Linear(8, 5),
            down=lambda: nn.Linear(5, 8),
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        2,
    ),
    "layer scale on a stream that nobody normalises": (
        _between(
            lambda m, h: m.up(F.relu(h + m.gamma * m.down(F.gelu(m.deep(h))))),
            gamma=lambda: parameter(8),
            deep=lambda: nn.Linear(8, 5),
            down=lambda: nn.Linear(5, 8),
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        1,
    ),
    "a layer that a shift gives a bias, and a gain behind it": (
        _between(
            lambda m, h: m.up(F.layer_norm(h + m.gamma * m.side(m.norm(h)), [8])),
            norm=lambda: nn.LayerNorm(8),
            gamma=lambda: parameter(8),
            side=lambda: nn.Linear(8, 8, bias=False),
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        2,
    ),
    "one gain behind another": (
        _between(
            lambda m, h: m.up(m.gain * m.norm(h)) + m.side(m.norm.weight.new_ones(8) * h),
            norm=lambda: nn.RMSNorm(8),
            gain=lambda: parameter(8),
            up=lambda: nn.Linear(8, 12),
            side=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        2,
    ),
    "one more than a weight, twice": (
        _between(
            lambda m, h: m.up((1 + m.second) * _rms(h, 1 + m.gain)),
            gain=lambda: parameter(8),
            second=lambda: parameter(8),
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        2,
    ),
    "two features on one axis": (
        _between(
            lambda m, h: m.up(m.norm(torch.cat([m.left(h), m.right(h)], -1))),
            norm=lambda: nn.LayerNorm(12),
            left=lambda: nn.Linear(8, 5),
            right=lambda: nn.Linear(8, 7),
            up=lambda: nn.Linear(12, 12),
        ),
        TOKENS,
        1,
    ),
    "inside heads": (
        _between(
            lambda m, h: m.up(_heads(m.q(h), m.k(h), m.gain * m.v(h))),
            gain=lambda: parameter(8),
            **{name: (lambda: nn.Linear(8, 8)) for name in "qkv"},
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        1,
    ),
    "queries and keys": (
        _between(
            lambda m, h: m.up(
                _heads(F.layer_norm(m.q(h).unflatten(-1, (2, 4)), [4]).flatten(-2) * m.gain, m.k(h), m.v(h))
            ),
            gain=lambda: parameter(8),
            **{name: (lambda: nn.Linear(8, 8)) for name in "qkv"},
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        1,
    ),
    "vit": (_vit, PICTURES, 5),
}


def _conv_next() -> nn.Module:
    """Channel-last LayerNorm between a depthwise and a 1×1 layer, layer scale, patches merged by a convolution."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.stem(x)
        z = self.norm(self.depthwise(h).permute(0, 2, 3, 1))
        h = h + (self.gamma * self.down(F.gelu(self.up(z)))).permute(0, 3, 1, 2)
        h = self.merge(self.norm2(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.head(self.norm3(h.mean((2, 3))))

    return net(
        forward, stem=nn.Conv2d(3, 8, 4, 4), depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8), norm=nn.LayerNorm(8),
        up=nn.Linear(8, 16), down=nn.Linear(16, 8), gamma=parameter(8), norm2=nn.LayerNorm(8),
        merge=nn.Conv2d(8, 10, 2, 2), norm3=nn.LayerNorm(10), head=nn.Linear(10, 3),
    )  # fmt: skip


FOLDS["conv next"] = (_conv_next, PICTURES, 4)


@pytest.mark.parametrize("name", FOLDS)
def test_the_function_stays_and_the_gains_go(name: str) -> None:
    build, x, count = FOLDS[name]
    program = _program(build, x)
    before = len(list(gains(program)))
    folded = FoldGain()(program)
    assert folded.history[-1] == f"FoldGain({count} gains)"
    assert len(list(gains(folded))) == before - count == len(folded.notes)
    for edge in range(program.edges):
        assert same_function(program.select(edge), folded.select(edge)) <= 1e-10


def test_the_weights_are_those_of_the_formula() -> None:
    """W' = W diag(γ), b' = W β + b."""
    program = _program(LAYER_NORM)
    folded = FoldGain()(program)
    for old, new in zip(program.weights, folded.weights):
        close(new["up.weight"], old["up.weight"] * old["norm.weight"][None], 1e-14)
        close(new["up.bias"], old["up.bias"] + old["up.weight"] @ old["norm.bias"], 1e-14)
        assert not {"norm.weight", "norm.bias"} & set(new)
    (norm,) = _norms(folded)
    assert arguments(norm)["weight"] is None
    assert arguments(norm)["bias"] is None


def test_zero_and_negative_gains_fold() -> None:
    program = _program(LAYER_NORM)
    signs = torch.tensor([0, -1, 1, 1, -1, 0, 1, 1], dtype=torch.float64)
    sets = [weights | {"norm.weight": weights["norm.weight"] * signs} for weights in map(dict, program.weights)]
    assert FoldGain()(program.with_weights(sets)).history[-1] == "FoldGain(1 gains)"


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "read by an activation": (
        _between(
            lambda m, h: m.up(F.gelu(m.norm(h))) + m.side(m.norm.weight * 0 + h),
            norm=lambda: nn.LayerNorm(8),
            up=lambda: nn.Linear(8, 12),
            side=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        "norm.weight is used by",
    ),
    "an activation": (
        _between(lambda m, h: m.up(F.gelu(m.norm(h))), norm=lambda: nn.LayerNorm(8), up=lambda: nn.Linear(8, 12)),
        TOKENS,
        r"layer_norm not folded: aten.gelu \(gelu\)",
    ),
    "the stream itself": (
        _between(
            lambda m, h: (lambda z: m.out(m.norm2(z + m.down(F.gelu(m.up(z))))))(m.norm(h)),
            norm=lambda: nn.LayerNorm(8),
            norm2=lambda: nn.LayerNorm(8, elementwise_affine=False),
            up=lambda: nn.Linear(8, 5),
            down=lambda: nn.Linear(5, 8),
            out=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        r"layer_norm not folded: aten.layer_norm \(layer_norm_1\)",
    ),
    "zero padding": (
        _between(
            lambda m, h: m.up(m.norm(h).transpose(1, 2)).transpose(1, 2),
            norm=lambda: nn.LayerNorm(8),
            up=lambda: nn.Conv1d(8, 12, 3, padding=1),
        ),
        TOKENS,
        "conv1d .* does not pass a shift on",
    ),
    "the absolute value": (
        _between(
            lambda m, h: m.up((m.gain * F.layer_norm(h, [8])).abs()),
            gain=lambda: parameter(8),
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        "a sign of it is seen alone",
    ),
    "the square": (
        _between(
            lambda m, h: m.up((m.gain * F.layer_norm(h, [8])) ** 2),
            gain=lambda: parameter(8),
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        r"up.weight scales the same feature",
    ),
    "a weight that reads without it too": (
        _between(
            lambda m, h: (lambda z: m.up(m.gain * z) + F.gelu(m.up(z)))(F.layer_norm(h, [8])),
            gain=lambda: parameter(8),
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        "gain of mul not folded",
    ),
    "one more than a weight, beside a stream": (
        _between(
            lambda m, h: m.up(F.layer_norm(h + (1 + m.gain) * F.gelu(m.side(h)), [8])),
            gain=lambda: parameter(8),
            side=lambda: nn.Linear(8, 8),
            up=lambda: nn.Linear(8, 12),
        ),
        TOKENS,
        r"gain of mul not folded: aten.layer_norm \(layer_norm\)",
    ),
    "a tied weight": (
        _between(
            lambda m, h: m.up(m.norm(h)) + F.gelu(m.up(h)), norm=lambda: nn.LayerNorm(8), up=lambda: nn.Linear(8, 12)
        ),
        TOKENS,
        "layer_norm not folded",
    ),
    "an output": (
        lambda: net(lambda self, x: self.norm(self.fc(x)), norm=nn.LayerNorm(8), fc=nn.Linear(6, 8)),
        TOKENS,
        "pinned: model output",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_fold_stays_with_its_reason(name: str) -> None:
    build, x, reason = REFUSED[name]
    program = _program(build, x)
    folded = FoldGain()(program)
    assert folded.history[-1] == "FoldGain(0 gains)"
    assert str(folded.graph) == str(program.graph)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("\n".join(folded.notes))


def test_zero_padding_takes_a_gain_without_shift() -> None:
    program = _program(REFUSED["zero padding"][0])
    sets = [{name: t * 0 if name == "norm.bias" else t for name, t in weights.items()} for weights in program.weights]
    assert FoldGain()(program.with_weights(sets)).history[-1] == "FoldGain(1 gains)"


def test_an_unsound_fold_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shift of a zero-padded norm, pushed into the bias as if there were no border."""
    monkeypatch.setattr("vfx.analyse.shift._reads", lambda node, touched: True)
    with pytest.raises(VerificationError, match="FoldGain changed the function"):
        FoldGain()(_program(REFUSED["zero padding"][0]))


@pytest.mark.parametrize(
    "name",
    ["one value, two readers", "patch merging", "layer scale", "two features on one axis", "inside heads", "vit"],
)
def test_no_share_can_be_left_out(name: str) -> None:
    """Each parameter that takes a gain up is needed; all together keep the function."""
    program = _program(*FOLDS[name][:2]).select(0)
    known = list(gains(program))
    folding = Folding(symmetry(program), known)
    for gain in known:
        shares = folding.shares(gain)
        assert gain.weight is not None
        neutral = {gain.weight: torch.ones_like(program.weights[0][gain.weight])}
        factor = program.weights[0][gain.weight].reshape(-1)
        for left in (None, *shares):
            weights = dict(program.weights[0]) | neutral
            if gain.bias is not None:
                weights[gain.bias] = torch.zeros_like(weights[gain.bias])
            before = dict(weights) | {gain.weight: program.weights[0][gain.weight]}
            for share in shares:
                if share is not left:
                    rows = weights[share.fqn].movedim(share.dim, 0).clone()
                    rows[share.where] = rows[share.where] * factor[share.source].reshape(-1, *[1] * (rows.ndim - 1))
                    weights[share.fqn] = rows.movedim(0, share.dim)
            error = same_function(program.with_weights([before]), program.with_weights([weights]))
            assert error <= 1e-12 if left is None else error >= 1e-6


def test_without_new_biases_a_norm_stays() -> None:
    program = _program(FOLDS["layer norm, no bias behind"][0])
    folded = FoldGain(biases=False)(program)
    assert folded.history[-1] == "FoldGain(0 gains)"
    assert "has no bias for the norm's shift" in folded.notes[0]


def test_the_users_class_comes_back() -> None:
    models = edges(_vit, PICTURES)
    program = trace(models, PICTURES)
    result = compile(program, passes=[FoldGain(), Interpolate(0.0), RestoreStructure(program)])
    assert type(result.module) is type(models[0])
    close(result.module(PICTURES), models[0](PICTURES), 1e-10)
    assert (result.module.norm.weight == 1).all()
    assert not result.module.norm.bias.any()


def test_added_parameters_do_not_go_back() -> None:
    program = _program(FOLDS["layer norm, no bias behind"][0])
    with pytest.raises(PassError, match=r"has no up\.bias"):
        RestoreStructure(program)(FoldGain()(program))


def _tied() -> nn.Module:
    """Token embeddings that are the classifier, too."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
            self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids)
            return self.head(self.norm(x + self.mix(F.gelu(self.mix(x)))))

    return Tied()


def test_tied_embeddings_are_untied_on_request() -> None:
    torch.manual_seed(0)
    model = _tied().double()
    ids = torch.randint(0, 11, (2, 5))
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2.0)
        model.norm.bias.normal_()
    program = trace(model.eval(), ids)
    kept = FoldGain()(program)
    assert "tokens.weight" in kept.notes[0]
    untied = UntieWeights()(program)
    assert {"head.weight", "tokens.weight"} <= set(untied.names())
    folded = FoldGain()(untied)
    assert folded.history[-1] == "FoldGain(1 gains)"
    assert same_function(program, folded) <= 1e-10
    with pytest.raises(PassError, match="head"):
        RestoreStructure(program)(folded)


def _hugging_face(name: str) -> nn.Module:
    small = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, **small)
        return transformers.GPT2LMHeadModel(config)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **sizes, **small))


@pytest.mark.parametrize(("name", "centred"), [("gpt2", 5), ("llama", 0)])
def test_language_models(name: str, centred: int) -> None:
    """Once the embeddings are untied no gain is left, and GPT-2's stream is centred; Llama's norms see the mean."""
    torch.manual_seed(0)
    ids = torch.randint(0, 31, (2, 6))
    model = _hugging_face(name).double().eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "norm" in key or "ln_" in key:
                tensor.add_(0.3 * torch.randn_like(tensor))
    program = trace(model, {"input_ids": ids})
    assert "wte.weight" in CenterStream()(program).notes[-1] or name == "llama"
    folded = FoldGain()(UntieWeights()(program))
    assert folded.history[-1] == "FoldGain(5 gains)"
    assert not any("not folded" in note for note in folded.notes)
    assert same_function(program, folded) <= 1e-10
    result = CenterStream()(folded)
    assert result.history[-1] == f"CenterStream({centred} norms)"
    assert same_function(program, result) <= 1e-10
