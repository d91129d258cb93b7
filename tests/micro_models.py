"""Tiny networks with one hazard each, and the symmetry groups that follow from it by reason.

``sizes`` are the sizes of all groups, sorted: what a reader with pen and paper finds, under plain products (blocks
share their inner permutation). ``harmless`` names members whose omission cannot change the output, ``why`` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (4, 3, 6, 6)
VECTOR = (4, 5)


@dataclass(frozen=True)
class Micro:
    """One network: how to build it, what goes in, what must come out of the analysis."""

    name: str
    build: Callable[[], nn.Module]
    sizes: tuple[int, ...]
    why: str
    shapes: tuple[tuple[int, ...], ...] = (IMAGE,)
    harmless: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)


def net(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module whose forward is ``forward``; tensors become buffers, parameters and modules attributes."""
    module = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            module.register_buffer(name, part)
        else:
            setattr(module, name, part)
    return module


def conv(i: int, o: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, **options)


def parameter(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*sizes))


def between(middle: Callable[..., Tensor], width: int = 6, out: int = 4, after: int | None = None, **parts: Any) -> Any:
    """stem conv -> ``middle(self, h)`` -> conv -> pool -> linear: the hazard sits on ``width`` channels."""

    def build() -> nn.Module:
        made = {
            name: part() if callable(part) and not isinstance(part, nn.Module) else part for name, part in parts.items()
        }
        return net(
            lambda self, x: self.fc(F.relu(self.last(middle(self, self.stem(x)))).mean((2, 3))),
            stem=conv(3, width),
            last=conv(after or width, out),
            fc=nn.Linear(out, 2),
            **made,
        )

    return build


def shuffled(h: Tensor, groups: int) -> Tensor:
    n, c, height, width = h.shape
    return h.view(n, groups, c // groups, height, width).transpose(1, 2).reshape(n, c, height, width)


def eca(self: Any, h: Tensor) -> Tensor:
    gate = self.eca(h.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
    return h * gate.sigmoid()


def slice_writes(self: Any, h: Tensor) -> Tensor:
    out = h.new_zeros(h.shape[0], 10, h.shape[2], h.shape[3])
    out[:, :6] = h
    out[:, 6:] = self.other(h)
    return out


def relu_on_view(self: Any, h: Tensor) -> Tensor:
    h[:, :2].relu_()
    return h


def zeroed_then_added(self: Any, h: Tensor) -> Tensor:
    view = h[:, :3]
    view.zero_()
    view.add_(self.p.view(1, 3, 1, 1))
    return h


def unused_head(self: Any, h: Tensor) -> Tensor:
    self.aux(h)
    return h


@torch.library.custom_op("vfx_micro::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return torch.fft.fft(x).real.clone()


@turned.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def mixed_by_own_operator(self: Any, x: Tensor) -> Tensor:
    return self.c(turned(self.b(F.relu(self.a(x)))))


def dynamic_convolution(self: Any, h: Tensor) -> Tensor:
    n, c, height, width = h.shape
    kernels = self.kernel.repeat(n, 1, 1, 1)
    return F.conv2d(h.reshape(1, n * c, height, width), kernels, groups=n, padding=1).view(n, 5, height, width)


def glu_by_chunk(self: Any, x: Tensor) -> Tensor:
    value, gate = self.a(x).chunk(2, dim=1)
    return self.b(value * gate.sigmoid())


def packed(self: Any, x: Tensor) -> Tensor:
    q, k, v = self.a(x).view(-1, 3, 4).unbind(1)
    return self.b(q * k.tanh() + v)


def half_blocks(self: Any, x: Tensor) -> Tensor:
    left = self.p(self.a(x).view(-1, 2, 3).transpose(1, 2))
    right = self.q(self.b(x).view(-1, 2, 3).transpose(1, 2))
    return self.c((left + right).relu().flatten(1))


def crossed_copies(self: Any, h: Tensor) -> Tensor:
    both = torch.cat([h, h.relu()], 1)
    return both + both[:, torch.tensor([0, 5, 2, 3, 4, 1, 6, 7])]


def option_a(self: Any, h: Tensor) -> Tensor:
    return F.pad(h, (0, 0, 0, 0, 1, 2)) + self.c(h)


def gated(self: Any, h: Tensor) -> Tensor:
    return h * self.up(F.relu(self.down(h.mean((2, 3))))).sigmoid()[:, :, None, None]


def batch_in_channels(self: Any, h: Tensor) -> Tensor:
    n, c, height, width = h.shape
    return self.one(h.reshape(n * c, 1, height, width)).reshape(n, c * 4, height, width)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2))


def vectors(forward: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: net(forward, **{name: part() for name, part in parts.items()})


def linear(i: int, o: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o, **options)


def copied_slice(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h[:, 1:3] = h[:, 3:5]
    return self.c(h)


def deviation(self: Any, x: Tensor) -> Tensor:
    h = self.a(x).view(-1, 2, 3)
    return self.c((h / h.std(2, keepdim=True)).flatten(1))


def outer(self: Any, x: Tensor) -> Tensor:
    product = self.a(x).unsqueeze(2) * self.b(x).unsqueeze(1)
    return self.c((product + product.transpose(1, 2)).flatten(1))


def reordered(self: Any, x: Tensor) -> Tensor:
    first, second, third = self.a(x).split([1, 2, 3], 1)
    return self.c(torch.cat([third, first, second], 1))


def batch_cut(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    return self.c(torch.cat([h[:1] + h[-1:], h.roll(1, 0).flip(0)], 0))


def norm_first(self: Any, h: Tensor) -> Tensor:
    return self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def heads_einsum(self: Any, x: Tensor) -> Tensor:
    q, k = self.a(x).view(-1, 2, 3), self.b(x).view(-1, 2, 3)
    return self.c(torch.einsum("bhd, bhe -> bde", q, k).flatten(1))


def batched_sum(self: Any, x: Tensor) -> Tensor:
    n = x.shape[0]
    h = self.a(x).unsqueeze(1)
    return self.c(torch.baddbmm(self.p.expand(n, 1, 3), h, self.w.expand(n, 6, 3)).flatten(1))


def unfolded(self: Any, h: Tensor) -> Tensor:
    columns = F.unfold(h, 3, padding=1).transpose(1, 2)
    return self.p(columns).transpose(1, 2).reshape(-1, 5, 6, 6)


def written_by_number(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h[:, torch.tensor([1, 2])] = h[:, torch.tensor([3, 4])]
    return self.c(h)


def masked_write(self: Any, h: Tensor) -> Tensor:
    h[h < 0] = 0.25
    return h


def scattered(self: Any, h: Tensor) -> Tensor:
    return torch.zeros_like(h).scatter_add(3, h.argmax(3, keepdim=True), h.sum(3, keepdim=True))


def rotary(self: Any, x: Tensor) -> Tensor:
    q = self.a(x).view(-1, 3, 4)
    turned = torch.cat([-q[..., 2:], q[..., :2]], -1)
    return self.c((q * self.cos + turned * self.sin).flatten(1))


def rotary_complex(self: Any, x: Tensor) -> Tensor:
    q = torch.view_as_complex(self.a(x).view(-1, 3, 2, 2))
    return self.c(torch.view_as_real(q * torch.view_as_complex(self.turn)).flatten(1))


def grouped_queries(self: Any, x: Tensor) -> Tensor:
    n, tokens, _ = x.shape
    q = self.q(x).view(n, tokens, 4, 3).transpose(1, 2)
    k, v = (f(x).view(n, tokens, 2, 3).transpose(1, 2) for f in (self.k, self.v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return self.c(y.transpose(1, 2).flatten(2))


def biased_attention(self: Any, x: Tensor) -> Tensor:
    n, tokens, _ = x.shape
    q, k, v = self.qkv(x).view(n, tokens, 3, 2, 3).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, self.places])
    return self.c(y.transpose(1, 2).flatten(2))


def final_states(self: Any, x: Tensor) -> Tensor:
    return self.c(self.rnn(x)[1].transpose(0, 1).flatten(1))


def learned_start(self: Any, x: Tensor) -> Tensor:
    return self.c(self.rnn(x, self.start.expand(1, x.shape[0], 6).contiguous())[0].mean(1))


def stepped(self: Any, x: Tensor) -> Tensor:
    h, c = self.cell(x)
    return self.c(self.cell(x, (h, c))[0])


def bags(self: Any, x: Tensor) -> Tensor:
    return self.c(self.table((3 * x.abs()).long().clamp(max=6)))


def table_rows(self: Any, x: Tensor) -> Tensor:
    return self.c(F.relu(self.a(x) + self.table[self.places[:2].reshape(-1)].sum(0)))


def distances(self: Any, x: Tensor) -> Tensor:
    return self.c(torch.cdist(self.a(x).unsqueeze(1), self.p.unsqueeze(0)).flatten(1))


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(conv(6, 5))


def spectral_normed() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(conv(6, 5))


V = (VECTOR,)
SEQUENCE = ((4, 7, 5),)
UNEVEN = torch.tensor([1, 2, 1, 1, 2, 1])

MICRO = [
    Micro("mlp", mlp, (6, 7), "each hidden layer is free", V),
    Micro(
        "flatten",
        lambda: nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        (4,),
        "C·H·W factors: channels move in blocks of 36 columns",
    ),
    Micro(
        "residual",
        between(lambda s, h: h + s.b(F.relu(s.a(h))), a=lambda: conv(6, 5), b=lambda: conv(5, 6)),
        (4, 5, 6),
        "stream, inner, last",
    ),
    Micro(
        "concat",
        between(lambda s, h: torch.cat([h, s.a(h)], 1), after=11, a=lambda: conv(6, 5)),
        (4, 5, 6),
        "segments stay free of each other",
    ),
    Micro(
        "concat_add",
        between(
            lambda s, h: (y := torch.cat([h, s.a(h)], 1)) + s.b(y),
            after=11,
            a=lambda: conv(6, 5),
            b=lambda: conv(11, 11),
        ),
        (4, 5, 6),
        "b's 11 outputs split into the two segments they are added to",
    ),
    Micro(
        "depthwise",
        between(lambda s, h: s.dw(h), dw=lambda: conv(6, 6, groups=6)),
        (4, 6),
        "one kernel a channel moves with it",
    ),
    Micro(
        "grouped",
        between(lambda s, h: s.g(h), after=8, g=lambda: conv(6, 8, groups=2)),
        (2, 3, 4, 4),
        "in 2·3, out 2·4: shared groups, own insides, last 4",
    ),
    Micro(
        "multiplier",
        between(lambda s, h: s.dw(h), after=12, dw=lambda: conv(6, 12, groups=6)),
        (2, 4, 6),
        "out 6·2: channels and the two copies of each",
    ),
    Micro(
        "squeeze_excite",
        between(gated, down=lambda: nn.Linear(6, 3), up=lambda: nn.Linear(3, 6)),
        (3, 4, 6),
        "the gate is tied to what it scales",
    ),
    Micro("eca", between(eca, eca=lambda: nn.Conv1d(1, 1, 3, padding=1)), (4,), "a kernel slides over the channels"),
    Micro("lrn", between(lambda s, h: F.local_response_norm(h, 3)), (4,), "a window slides over the channels"),
    Micro("layer_norm", between(norm_first, norm=lambda: nn.LayerNorm(6)), (4, 6), "mean and variance see no order"),
    Micro(
        "layer_scale",
        between(lambda s, h: h + s.gamma * s.a(h), gamma=lambda: parameter(6, 1, 1), a=lambda: conv(6, 6)),
        (4, 6),
        "one stream",
    ),
    Micro("shuffle", between(lambda s, h: shuffled(h, 2)), (4, 6), "a reordering loses nothing"),
    Micro(
        "shuffle_add",
        between(lambda s, h: h + shuffled(h, 2)),
        (2, 4),
        "cycles (0)(5)(1 3 4 2): two fixed points may swap, one 4-cycle cannot",
    ),
    Micro(
        "native_shuffle",
        between(lambda s, h: s.mix(h), mix=lambda: nn.ChannelShuffle(3)),
        (4, 6),
        "a reordering loses nothing",
    ),
    Micro(
        "pixel_shuffle",
        between(lambda s, h: F.pixel_shuffle(h, 2), width=8, after=2),
        (2, 4),
        "8 = 2·2·2, sub-pixels pinned",
    ),
    Micro(
        "pixel_unshuffle",
        between(lambda s, h: F.pixel_unshuffle(h, 2), width=5, after=20),
        (4, 5),
        "20 = 5·2·2, sub-pixels pinned",
    ),
    Micro(
        "group_norm",
        between(lambda s, h: s.gn(h), gn=lambda: nn.GroupNorm(2, 6)),
        (2, 3, 4),
        "groups move whole, insides together",
    ),
    Micro(
        "group_norm_one",
        between(lambda s, h: s.gn(h), gn=lambda: nn.GroupNorm(1, 6)),
        (4, 6),
        "one group of all channels",
    ),
    Micro(
        "instance_norm",
        between(lambda s, h: s.n(h), n=lambda: nn.InstanceNorm2d(6, affine=True)),
        (4, 6),
        "each channel by itself; the mean takes the stem's bias away, so it may stay",
        harmless=("stem.bias[0]:6",),
    ),
    Micro("batch_norm", between(lambda s, h: s.n(h), n=lambda: nn.BatchNorm2d(6)), (4, 6), "each channel by itself"),
    Micro(
        "called_twice",
        between(lambda s, h: s.a(F.relu(s.a(h))), a=lambda: conv(6, 6)),
        (4, 6),
        "in and out of one weight are one group",
    ),
    Micro(
        "tied_autoencoder",
        vectors(
            lambda s, x: F.linear(F.relu(F.linear(x, s.w, s.b)), s.w.t()),
            w=lambda: parameter(4, 5),
            b=lambda: parameter(4),
        ),
        (4,),
        "one weight, read twice; data axes pinned",
        V,
    ),
    Micro(
        "maxout_view",
        vectors(lambda s, x: s.b(s.a(x).view(-1, 4, 2).amax(2)), a=linear(5, 8), b=linear(4, 3)),
        (2, 4),
        "8 = 4·2 pieces",
        V,
    ),
    Micro(
        "maxout_pair",
        vectors(lambda s, x: s.c(torch.max(s.a(x), s.b(x))), a=linear(5, 4), b=linear(5, 4), c=linear(4, 3)),
        (4,),
        "tied pieces",
        V,
    ),
    Micro(
        "glu_chunk",
        vectors(glu_by_chunk, a=linear(5, 8), b=linear(4, 3)),
        (4,),
        "value and gate halves move together",
        V,
    ),
    Micro(
        "glu",
        vectors(lambda s, x: s.b(F.glu(s.a(x), 1)), a=linear(5, 8), b=linear(4, 3)),
        (4,),
        "value and gate halves move together",
        V,
    ),
    Micro(
        "slice_writes",
        between(slice_writes, after=10, other=lambda: conv(6, 4)),
        (4, 4, 6),
        "writing segments is concatenation",
    ),
    Micro("relu_on_view", between(relu_on_view), (2, 4, 4), "two rectified channels are told apart from four"),
    Micro(
        "zeroed_then_added",
        between(zeroed_then_added, p=lambda: parameter(3)),
        (3, 3, 4),
        "p lands on the first three channels; the stem's own are overwritten there, so may be left out",
        harmless=("stem.weight[0]:3", "stem.bias[0]:3"),
    ),
    Micro(
        "uniform_buffer",
        between(lambda s, h: h * s.m, m=lambda: torch.full((6, 1, 1), 2.0)),
        (4, 6),
        "a uniform buffer ties nothing",
    ),
    Micro(
        "varying_buffer",
        between(lambda s, h: h * s.m, m=lambda: torch.arange(6.0).view(6, 1, 1)),
        (4,),
        "a varying buffer pins",
    ),
    Micro(
        "constant_mask",
        between(lambda s, h: h * torch.tensor([1.0, 0, 1, 0, 1, 1]).view(6, 1, 1)),
        (4,),
        "a varying constant pins",
    ),
    Micro("unused_head", between(unused_head, aux=lambda: conv(6, 9)), (4, 6), "what no output reads has no symmetry"),
    Micro(
        "two_inputs",
        vectors(lambda s, x, y: s.c(s.a(x) + s.b(y)), a=linear(5, 4), b=linear(3, 4), c=linear(4, 2)),
        (4,),
        "sum ties both",
        (VECTOR, (4, 3)),
    ),
    Micro(
        "two_outputs",
        vectors(
            lambda s, x: {"logits": s.b(h := F.relu(s.a(x))), "feature": (s.c(h),)},
            a=linear(5, 6),
            b=linear(6, 2),
            c=linear(6, 4),
        ),
        (6,),
        "both heads' outputs are pinned, the trunk is free",
        V,
    ),
    Micro(
        "unknown",
        vectors(mixed_by_own_operator, a=linear(5, 4), b=linear(4, 6), c=linear(6, 2)),
        (4,),
        "no rule for a user's own operator: its six features are pinned",
        V,
        unknown=("vfx_micro.turned.default",),
    ),
    Micro("flip_add", between(lambda s, h: h + h.flip(1)), (3, 4), "three mirror pairs"),
    Micro("flip_add_odd", between(lambda s, h: h + h.flip(1), width=5), (2, 4), "two mirror pairs and the middle"),
    Micro("roll_add", between(lambda s, h: h + h.roll(2, 1)), (2, 4), "two cycles of three"),
    Micro(
        "cross_concat",
        between(lambda s, h: torch.cat([h, s.a(h)], 1) + torch.cat([s.a(h), h], 1), after=12, a=lambda: conv(6, 6)),
        (4, 6),
        "each segment meets the other",
    ),
    Micro(
        "crossed_copies",
        between(crossed_copies, width=4, after=8),
        (3, 4),
        "element 1 meets its rectified copy, the others themselves",
    ),
    Micro("argmax", between(lambda s, h: h * h.argmax(1, keepdim=True)), (4,), "the number of a channel is read"),
    Micro("max_indices", between(lambda s, h: h * h.max(1, keepdim=True)[1]), (4,), "the number of a channel is read"),
    Micro("max_values", between(lambda s, h: h - h.max(1, keepdim=True)[0]), (4, 6), "the maximum sees no order"),
    Micro(
        "transposed",
        between(lambda s, h: s.t(h), after=5, t=lambda: nn.ConvTranspose2d(6, 5, 2, 2)),
        (4, 5, 6),
        "weight is (in, out)",
    ),
    Micro(
        "transposed_groups",
        between(lambda s, h: s.t(h), after=8, t=lambda: nn.ConvTranspose2d(6, 8, 2, 2, groups=2)),
        (2, 3, 4, 4),
        "as grouped",
    ),
    Micro("prelu", between(lambda s, h: s.act(h), act=lambda: nn.PReLU(6)), (4, 6), "a slope moves with its channel"),
    Micro("prelu_shared", between(lambda s, h: s.act(h), act=lambda: nn.PReLU()), (4, 6), "one slope for all"),
    Micro(
        "parallel",
        between(lambda s, h: s.a(h) + s.b(h), after=5, a=lambda: conv(6, 5), b=lambda: conv(6, 5, 1)),
        (4, 5, 6),
        "summed branches are one group",
    ),
    Micro(
        "batch_in_channels",
        between(batch_in_channels, width=5, after=20, one=lambda: conv(1, 4)),
        (4, 4, 5),
        "20 = 5·4 after undoing the view",
    ),
    Micro("mean", between(lambda s, h: h - h.mean(1, keepdim=True)), (4, 6), "a mean sees no order"),
    Micro("cumsum", between(lambda s, h: h.cumsum(1)), (4,), "a running sum reads the order"),
    Micro(
        "strided_pointwise",
        vectors(
            lambda s, x: s.b(s.k(s.a(x).unsqueeze(1)).flatten(1)),
            a=linear(5, 3),
            k=lambda: nn.Conv1d(1, 2, 1, stride=2, padding=1),
            b=linear(6, 3),
        ),
        (2,),
        "kernel 1, stride 2, padding 1 keeps the length 3 but moves positions",
        V,
    ),
    Micro(
        "packed",
        vectors(packed, a=linear(5, 12), b=linear(4, 2)),
        (4,),
        "thirds of one weight, tied by the sum; no factor 3",
        V,
    ),
    Micro(
        "half_blocks",
        vectors(half_blocks, a=linear(5, 6), b=linear(5, 6), p=linear(2, 4), q=linear(2, 4), c=linear(12, 2)),
        (2, 2, 3, 4),
        "6 = 2·3 twice, the threes tied by the sum, the twos read by their own linear, out 4",
        V,
    ),
    Micro(
        "bilinear",
        vectors(
            lambda s, x: s.b(((h := s.a(x)).unsqueeze(2) * h.unsqueeze(1)).flatten(1)), a=linear(5, 4), b=linear(16, 2)
        ),
        (4,),
        "columns carry the digit twice",
        V,
    ),
    Micro(
        "gathered",
        between(lambda s, h: h[:, torch.tensor([0, 0, 1, 1, 3])], width=6, after=5),
        (2, 4),
        "{0,1} twice each, 3 alone; {2,4,5} are read by nobody",
    ),
    Micro(
        "option_a",
        between(option_a, width=4, after=7, c=lambda: conv(4, 7)),
        (2, 4, 4),
        "padded channels: 1 alone, the stream's 4, 2 alike",
    ),
    Micro(
        "copied_slice", vectors(copied_slice, a=linear(5, 6), c=linear(6, 2)), (2, 2), "{3,4} land on {1,2}; {0,5}", V
    ),
    Micro("deviation", vectors(deviation, a=linear(5, 6), c=linear(6, 2)), (2, 3), "2 blocks of 3, each normalised", V),
    Micro(
        "outer",
        vectors(outer, a=linear(5, 3), b=linear(5, 3), c=linear(9, 2)),
        (3,),
        "a product plus its transpose: both sides are one group",
        V,
    ),
    Micro(
        "reordered",
        vectors(reordered, a=linear(5, 6), c=linear(6, 2)),
        (6,),
        "segments 1, 2, 3 in another order: one group",
        V,
    ),
    Micro(
        "batch_cut", vectors(batch_cut, a=linear(5, 6), c=linear(6, 2)), (6,), "slices of the batch tie no channel", V
    ),
    Micro(
        "tiled",
        vectors(lambda s, x: s.c(s.b(x) + s.a(x).repeat(1, 2)), a=linear(5, 6), b=linear(5, 12), c=linear(12, 2)),
        (2, 6),
        "b's twelve are two copies of a's six; the copies may change places",
        V,
    ),
    Micro(
        "channel_attention",
        between(lambda s, h: h * h.mean((2, 3)).relu().softmax(1)[:, :, None, None]),
        (4, 6),
        "softmax sees no order",
    ),
    Micro(
        "einsum",
        vectors(lambda s, x: s.c(F.relu(torch.einsum("bi,oi->bo", x, s.w))), w=lambda: parameter(6, 5), c=linear(6, 2)),
        (6,),
        "a linear map in letters",
        V,
    ),
    Micro(
        "einsum_implicit",
        vectors(
            lambda s, x: s.c(F.relu(torch.einsum("...i,ij", s.a(x).unsqueeze(1), s.w)).squeeze(1)),
            a=linear(5, 4),
            w=lambda: parameter(4, 6),
            c=linear(6, 2),
        ),
        (4, 6),
        "an ellipsis, and a result that is not written",
        V,
    ),
    Micro(
        "einsum_diagonal",
        vectors(
            lambda s, x: s.c(torch.einsum("bi,ii->bi", s.a(x), s.w)),
            a=linear(5, 4),
            w=lambda: parameter(4, 4),
            c=linear(4, 2),
        ),
        (4,),
        "a letter twice: both axes move as one",
        V,
    ),
    Micro(
        "einsum_heads",
        vectors(heads_einsum, a=linear(5, 6), b=linear(5, 6), c=linear(9, 2)),
        (2, 3, 3),
        "2 heads, summed over, with an inside for each side",
        V,
    ),
    Micro(
        "addmm",
        vectors(
            lambda s, x: s.c(torch.addmm(s.p, s.a(x), s.w)),
            a=linear(5, 6),
            p=lambda: parameter(3),
            w=lambda: parameter(6, 3),
            c=linear(3, 2),
        ),
        (3, 6),
        "a linear map with a transposed weight",
        V,
    ),
    Micro(
        "baddbmm",
        vectors(
            batched_sum, a=linear(5, 6), p=lambda: parameter(1, 1, 3), w=lambda: parameter(1, 6, 3), c=linear(3, 2)
        ),
        (3, 6),
        "the same in batches",
        V,
    ),
    Micro(
        "bilinear_layer",
        vectors(
            lambda s, x: s.c(s.m(s.a(x), s.b(x))),
            a=linear(5, 6),
            b=linear(5, 4),
            m=lambda: nn.Bilinear(6, 4, 3),
            c=linear(3, 2),
        ),
        (3, 4, 6),
        "weight is (out, in, in)",
        V,
    ),
    Micro(
        "tensordot",
        vectors(
            lambda s, x: s.c(torch.tensordot(s.a(x), s.w, dims=([1], [1]))),
            a=linear(5, 6),
            w=lambda: parameter(3, 6),
            c=linear(3, 2),
        ),
        (3, 6),
        "axes paired by number",
        V,
    ),
    Micro(
        "distances",
        vectors(distances, a=linear(5, 6), p=lambda: parameter(3, 6), c=linear(3, 2)),
        (3, 6),
        "distances to 3 prototypes sum over 6 features",
        V,
    ),
    Micro(
        "similarity",
        vectors(
            lambda s, x: s.c(s.a(x) * F.cosine_similarity(s.a(x), s.b(x), dim=1)[:, None]),
            a=linear(5, 6),
            b=linear(5, 6),
            c=linear(6, 2),
        ),
        (6,),
        "an angle sees no order",
        V,
    ),
    Micro(
        "unfold",
        between(unfolded, after=5, p=lambda: nn.Linear(54, 5)),
        (4, 5, 6),
        "54 = 6·9, the window's positions pinned",
    ),
    Micro(
        "fold",
        between(lambda s, h: F.fold(F.unfold(h, 2, stride=2), (6, 6), 2, stride=2)),
        (4, 6),
        "written out and put together again",
    ),
    Micro("windows", between(lambda s, h: h.unfold(2, 2, 2).amax(-1)), (4, 6), "windows along the height"),
    Micro(
        "grid_sample",
        between(
            lambda s, h: F.grid_sample(h, s.g.expand(h.shape[0], 3, 3, 2), align_corners=False),
            g=lambda: torch.rand(1, 3, 3, 2),
        ),
        (4, 6),
        "each channel is read at the same points",
    ),
    Micro(
        "interleaved",
        vectors(
            lambda s, x: s.c(s.b(x) + s.a(x).repeat_interleave(2, 1)), a=linear(5, 6), b=linear(5, 12), c=linear(12, 2)
        ),
        (2, 6),
        "12 = 6·2: the copies of all six may change places together",
        V,
    ),
    Micro(
        "sorted",
        vectors(lambda s, x: s.c(s.a(x).sort(1)[0]), a=linear(5, 6), c=linear(6, 2)),
        (6,),
        "values in order of size do not tell where they stood; what reads them is pinned",
        V,
    ),
    Micro("topk", between(lambda s, h: h - h.topk(2, 1)[0][:, 1:]), (4, 6), "the second largest sees no order"),
    Micro("topk_indices", between(lambda s, h: h * h.topk(2, 1)[1][:, 1:]), (4,), "the number of a channel is read"),
    Micro("argsort", between(lambda s, h: h * h.argsort(1)), (4,), "ranks by number"),
    Micro(
        "gather",
        between(lambda s, h: h.gather(3, h.argmax(3, keepdim=True))),
        (4, 6),
        "columns are numbered, channels tie",
    ),
    Micro(
        "gather_channels",
        between(lambda s, h: h.gather(1, h.argmax(1, keepdim=True)), after=1),
        (4, 6),
        "the largest, looked up where it stands, sees no order",
    ),
    Micro("scatter", between(scattered), (4, 6), "columns are numbered, channels tie"),
    Micro(
        "written_by_number",
        vectors(written_by_number, a=linear(5, 6), c=linear(6, 2)),
        (2, 2),
        "{3,4} land on {1,2}; {0,5}",
        V,
    ),
    Micro("masked_write", between(masked_write), (4, 6), "a mask that moves with what it marks"),
    Micro(
        "two_indices",
        between(lambda s, h: h[:, :, torch.tensor([[0], [2]]), torch.tensor([1, 3])]),
        (4, 6),
        "pixels are numbered",
    ),
    Micro(
        "table_rows",
        vectors(
            table_rows,
            a=linear(5, 6),
            table=lambda: parameter(4, 6),
            places=lambda: torch.tensor([[0], [3], [1]]),
            c=linear(6, 2),
        ),
        (6,),
        "rows are numbered by a part of a buffer",
        V,
    ),
    Micro(
        "bags",
        vectors(bags, table=lambda: nn.EmbeddingBag(7, 6), c=linear(6, 2)),
        (6,),
        "features of summed embeddings",
        V,
    ),
    Micro("triangle", between(lambda s, h: h.tril()), (4, 6), "pixels are compared by position"),
    Micro(
        "triangular_weight",
        vectors(
            lambda s, x: s.d(s.c(F.linear(s.a(x), s.m.tril()))),
            a=linear(5, 6),
            m=lambda: parameter(6, 6),
            c=linear(6, 4),
            d=linear(4, 2),
        ),
        (4,),
        "features are compared by position",
        V,
    ),
    Micro(
        "diagonal",
        vectors(
            lambda s, x: s.c((s.a(x).unsqueeze(2) * s.b(x).unsqueeze(1)).diagonal(dim1=1, dim2=2)),
            a=linear(5, 4),
            b=linear(5, 4),
            c=linear(4, 2),
        ),
        (4,),
        "what meets on the diagonal is tied",
        V,
    ),
    Micro(
        "on_diagonal",
        vectors(
            lambda s, x: s.c((s.b(x).view(-1, 4, 4) + torch.diag_embed(s.a(x))).flatten(1)),
            a=linear(5, 4),
            b=linear(5, 16),
            c=linear(16, 2),
        ),
        (4,),
        "rows and columns move as one",
        V,
    ),
    Micro(
        "slice_scatter",
        between(lambda s, h: torch.slice_scatter(h, s.other(h), 1, 2, 6), other=lambda: conv(6, 4)),
        (2, 4, 4, 4),
        "the first two stay, four are replaced by others",
    ),
    Micro(
        "select_scatter",
        vectors(lambda s, x: s.c(torch.select_scatter(s.a(x), x[:, 0], 1, 3)), a=linear(5, 6), c=linear(6, 2)),
        (5,),
        "one of six is replaced by an input",
        V,
    ),
    Micro("roll_computed", between(lambda s, h: h.roll(h.shape[0], 1)), (4,), "rolled by the batch size"),
    Micro("weight_norm", between(lambda s, h: s.a(h), after=5, a=weight_normed), (4, 5, 6), "a length for each output"),
    Micro(
        "spectral_norm",
        between(lambda s, h: s.a(h), after=5, a=spectral_normed),
        (4, 5, 6),
        "singular vectors move with the weight",
    ),
    Micro("rms_norm", between(norm_first, norm=lambda: nn.RMSNorm(6)), (4, 6), "a mean square sees no order"),
    Micro(
        "rotary",
        vectors(rotary, a=linear(5, 12), cos=lambda: torch.rand(4), sin=lambda: torch.rand(4), c=linear(12, 2)),
        (3,),
        "12 = 3·4: heads are free, frequencies are constants",
        V,
    ),
    Micro(
        "rotary_complex",
        vectors(rotary_complex, a=linear(5, 12), turn=lambda: torch.rand(2, 2), c=linear(12, 2)),
        (3,),
        "the same with complex numbers",
        V,
    ),
    Micro(
        "grouped_queries",
        vectors(grouped_queries, q=linear(5, 12), k=linear(5, 6), v=linear(5, 6), c=linear(12, 2)),
        (2, 2, 3, 3),
        "2 heads of keys and values serve 2 queries each; insides of q and k, of v and output; k's bias is harmless: "
        "it shifts all scores of a query alike",
        SEQUENCE,
        harmless=("k.bias[0]:2", "k.bias[0]:3"),
    ),
    Micro(
        "biased_attention",
        vectors(
            biased_attention,
            qkv=linear(5, 18),
            bias=lambda: parameter(2, 9),
            places=lambda: torch.arange(49).view(7, 7) % 9,
            c=linear(6, 2),
        ),
        (2, 3, 3),
        "a bias for each head and pair of tokens; insides of q and k, of v and output",
        SEQUENCE,
    ),
    Micro(
        "lstm",
        vectors(lambda s, x: s.c(s.rnn(x)[0].mean(1)), rnn=lambda: nn.LSTM(5, 6, batch_first=True), c=linear(6, 2)),
        (6,),
        "four gates, one action",
        SEQUENCE,
    ),
    Micro(
        "lstm_stack",
        vectors(
            lambda s, x: s.c(s.rnn(x)[0].mean(1)),
            rnn=lambda: nn.LSTM(5, 3, num_layers=2, bidirectional=True, batch_first=True),
            c=linear(6, 2),
        ),
        (3, 3, 3, 3),
        "two directions in each of two layers",
        SEQUENCE,
    ),
    Micro(
        "lstm_projected",
        vectors(
            lambda s, x: s.c(s.rnn(x)[0].mean(1)),
            rnn=lambda: nn.LSTM(5, 6, proj_size=3, batch_first=True),
            c=linear(3, 2),
        ),
        (3, 6),
        "memory, and what is read of it",
        SEQUENCE,
    ),
    Micro(
        "gru_states",
        vectors(final_states, rnn=lambda: nn.GRU(5, 4, num_layers=2, batch_first=True), c=linear(8, 2)),
        (4, 4),
        "the states of both layers, each with its own action",
        SEQUENCE,
    ),
    Micro(
        "rnn_started",
        vectors(
            learned_start,
            rnn=lambda: nn.RNN(5, 6, batch_first=True),
            start=lambda: parameter(1, 1, 6),
            c=linear(6, 2),
        ),
        (6,),
        "a learned start moves with the features",
        SEQUENCE,
    ),
    Micro(
        "dynamic_convolution",
        between(dynamic_convolution, after=5, kernel=lambda: parameter(5, 6, 3, 3)),
        (4, 5, 6),
        "groups = batch: a kernel for each sample, all alike here",
    ),
    Micro("lstm_cell", vectors(stepped, cell=lambda: nn.LSTMCell(5, 6), c=linear(6, 2)), (6,), "two steps by hand", V),
]

REFUSED = [
    Micro(
        "uneven_copies",
        between(lambda s, h: h.repeat_interleave(s.counts, 1, output_size=8), after=8, counts=lambda: UNEVEN),
        (4,),
        "as many copies as a tensor says: pinned, not crashed",
        unknown=("aten.repeat_interleave.self_Tensor",),
    ),
]
