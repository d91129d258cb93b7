"""Random networks of every layout: a grammar of what real architectures are made of, one block an operator family.

A network is a line of blocks over the values computed so far: ``network(7)`` always gives the same one. Sizes are
small, so that a trace and all proofs take about a second; widths, heads, groups, kernels and where a block reads are
random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Block = Callable[..., Tensor]
LAYOUTS = ("vector", "tokens", "words", "line", "image")
TOKENS, PIXELS, WORDS, OUTPUTS = 6, 8, 11, 3


@dataclass(frozen=True)
class Value:
    """What a block gives: ``channels`` on its channel axis; ``size`` positions on each other axis."""

    channels: int
    size: int


class Step(nn.Module):
    """One block that reads the values numbered ``sources``."""

    def __init__(self, name: str, block: nn.Module, sources: Sequence[int]) -> None:
        super().__init__()
        self.name, self.block, self.sources = name, block, tuple(sources)

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.block(*(values[index] for index in self.sources))


class RandomNetwork(nn.Module):
    """Blocks in a line; the last values are pooled, joined and read by a linear head."""

    def __init__(self, layout: str, steps: Sequence[Step], head: nn.Module, ends: Sequence[int]) -> None:
        super().__init__()
        self.layout, self.ends = layout, tuple(ends)
        self.steps, self.head = nn.ModuleList(steps), head

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(values))
        ends = [values[index] for index in self.ends]
        axes = {"vector": (), "tokens": (1,), "words": (1,), "line": (2,), "image": (2, 3)}[self.layout]
        return self.head(torch.cat([end.mean(axes) if axes else end for end in ends], 1))

    def names(self) -> list[str]:
        """The blocks in order, as a report names them."""
        return [step.name for step in self.steps]


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Block) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


class Then(nn.Module):
    """A function behind modules, which it gets as arguments."""

    def __init__(self, function: Block, *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*self.parts, *values)


class Scale(nn.Module):
    """A gain and a shift of every channel."""

    def __init__(self, channels: int, axis: int, dims: int) -> None:
        super().__init__()
        shape = [channels if index == axis % dims else 1 for index in range(1, dims)]
        self.gain, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


class Product(nn.Module):
    """A weight without a module: matmul, einsum or tensordot over the last axis."""

    def __init__(self, channels: int, width: int, form: str) -> None:
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.randn(channels, width) / math.sqrt(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "einsum":
            return torch.einsum("...c,cd->...d", x, self.weight)
        if self.form == "tensordot":
            return torch.tensordot(x, self.weight, dims=([x.ndim - 1], [0]))
        return x @ self.weight


class Attention(nn.Module):
    """Heads with queries, keys and values; groups of heads may share their keys and values."""

    def __init__(self, channels: int, heads: int, groups: int, width: int, mask: str, fused: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.width, self.mask, self.fused = heads, groups, width, mask, fused
        self.query = nn.Linear(channels, heads * width)
        self.key = nn.Linear(channels, groups * width)
        self.value = nn.Linear(channels, groups * width)
        self.out = nn.Linear(heads * width, channels)
        future = torch.ones(TOKENS, TOKENS).triu(1).bool()
        self.register_buffer("future", torch.zeros(TOKENS, TOKENS).masked_fill(future, -math.inf))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query = self.query(x).view(batch, tokens, self.heads, self.width).transpose(1, 2)
        key = self.key(x).view(batch, tokens, self.groups, self.width).transpose(1, 2)
        value = self.value(x).view(batch, tokens, self.groups, self.width).transpose(1, 2)
        if self.groups < self.heads:
            key = key.repeat_interleave(self.heads // self.groups, 1)
            value = value.repeat_interleave(self.heads // self.groups, 1)
        mixed = self._fused(query, key, value) if self.fused else self._written_out(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.width))

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = None
        if self.mask == "buffer":
            mask = self.future
        elif self.mask == "bool":
            mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        elif self.mask == "full":
            mask = torch.full((query.shape[2], query.shape[2]), -math.inf).triu(1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.mask == "flag")

    def _written_out(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query @ key.transpose(2, 3) / math.sqrt(self.width)
        if self.mask in ("buffer", "flag"):
            logits = logits + self.future
        elif self.mask == "bool":
            allowed = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
            logits = logits.masked_fill(~allowed, -math.inf)
        elif self.mask == "full":
            logits = logits + torch.full((query.shape[2], query.shape[2]), -math.inf).triu(1)
        return logits.softmax(-1) @ value


class LibraryAttention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence with itself, masked or not."""

    def __init__(self, channels: int, heads: int, masked: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.masked else None
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class Experts(nn.Module):
    """A soft mixture: every expert's output, weighted by a router, in one product of three operands."""

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(channels, experts)
        self.weight = nn.Parameter(torch.randn(experts, channels, channels) / math.sqrt(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...e,...c,ecd->...d", self.router(x).softmax(-1), x, self.weight)


class Recurrent(nn.Module):
    """A library's recurrent layer over the tokens."""

    def __init__(self, channels: int, width: int, kind: type[nn.RNNBase], layers: int, both: bool) -> None:
        super().__init__()
        self.layer = kind(channels, width, num_layers=layers, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Loop(nn.Module):
    """A recurrence written out, from a state that ``forward`` makes."""

    def __init__(self, channels: int, width: int, cell: str) -> None:
        super().__init__()
        self.width, self.cell = width, cell
        if cell == "gru":
            self.step: nn.Module = nn.GRUCell(channels, width)
        else:
            self.step, self.back = nn.Linear(channels, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], self.width)
        states = []
        for index in range(TOKENS):
            now = x[:, index]
            state = self.step(now, state) if self.cell == "gru" else (self.step(now) + self.back(state)).tanh()
            states.append(state)
        return torch.stack(states, 1)


class Words(nn.Module):
    """Token ids to vectors, with learned positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(WORDS, width), nn.Embedding(TOKENS, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.word(x) + self.position(torch.arange(x.shape[1]))


class Gate(nn.Module):
    """Channels weighted by what their mean over the positions says (squeeze and excitation)."""

    def __init__(self, channels: int, width: int, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.up(self.down(x.mean(self.axes)).relu()).sigmoid()
        for axis in self.axes:
            weights = weights.unsqueeze(axis)
        return x * weights


ACTIVATIONS: dict[str, Block] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "tanh gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))),
    "erf gelu": lambda x: 0.5 * x * (1 + torch.special.erf(x / math.sqrt(2))),
    "silu": F.silu,
    "x sigmoid": lambda x: x * torch.sigmoid(x),
    "tanh": torch.tanh,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "elu": F.elu,
    "clamp": lambda x: x.clamp(-1, 1),
    "sine": torch.sin,
    "abs": torch.abs,
    "where": lambda x: torch.where(x > 0, x, 0.2 * x),
    "maximum": lambda x: torch.maximum(x, torch.negative(x) * 0.3),
}


class Grammar:
    """Draws blocks for one layout."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.layout = self.random.choice(LAYOUTS)
        self.last = self.layout in ("vector", "tokens", "words")  # whether the channels stand last
        self.dims = {"vector": 2, "image": 4}.get(self.layout, 3)
        self.axis = self.dims - 1 if self.last else 1
        self.others = tuple(axis for axis in range(1, self.dims) if axis != self.axis)

    def build(self) -> RandomNetwork:
        steps, values = [self._stem()], []
        values = [Value(0, 0), self._stem_value]
        for _ in range(self.random.randint(3, 8)):
            made = None
            while made is None:
                made = self._step(values)
            step, value = made
            steps.append(step)
            values.append(value)
        ends = {len(values) - 1, self.random.randrange(1, len(values))}
        head = nn.Linear(sum(values[index].channels for index in ends), OUTPUTS)
        return RandomNetwork(self.layout, steps, head, sorted(ends))

    def example(self) -> Tensor:
        """A batch of four inputs."""
        if self.layout == "words":
            return torch.randint(WORDS, (4, TOKENS))
        shape = {"vector": (5,), "tokens": (TOKENS, 5), "line": (3, TOKENS), "image": (3, PIXELS, PIXELS)}
        return torch.randn(4, *shape[self.layout])

    def _stem(self) -> Step:
        width = self._width()
        if self.layout == "words":
            block: nn.Module = Words(width)
        elif self.last:
            block = nn.Linear(5, width)
        else:
            block = self._convolution(3, width, 3)
        self._stem_value = Value(width, {"image": PIXELS, "vector": 1}.get(self.layout, TOKENS))
        return Step("stem", block, [0])

    def _width(self) -> int:
        return self.random.choice([4, 6, 8, 12])

    def _convolution(
        self, channels: int, width: int, kernel: int, groups: int = 1, transposed: bool = False
    ) -> nn.Module:
        kinds = [nn.Conv1d, nn.ConvTranspose1d] if self.dims == 3 else [nn.Conv2d, nn.ConvTranspose2d]
        bias = self.random.random() < 0.7
        return kinds[transposed](channels, width, kernel, padding=kernel // 2, groups=groups, bias=bias)

    def _step(self, values: list[Value]) -> tuple[Step, Value] | None:
        """A random block behind a random value, or None where it does not fit."""
        families = [
            self._mix,
            self._mix,
            self._activation,
            self._norm,
            self._join,
            self._join,
            self._reshape,
            self._gated,
        ]
        if self.layout in ("tokens", "words"):
            families += [self._attend, self._recur, self._over_tokens]
        if self.layout in ("image", "line"):
            families += [self._pool]
        # The newest value is read three times of four, so that networks grow deep.
        newest = self.random.random() < 0.75
        source = len(values) - 1 if newest else self.random.randrange(1, len(values))
        made = self.random.choice(families)(values, source)
        if made is None:
            return None
        name, block, sources, value = made
        return Step(name, block, sources), value

    def _mix(self, values: list[Value], source: int) -> tuple | None:
        channels, size, width = values[source].channels, values[source].size, self._width()
        value = Value(width, size)
        if not self.last:
            kernel = self.random.choice([1, 3])
            groups = self.random.choice([1, 1, 2, math.gcd(channels, width)])
            if channels % groups or width % groups:
                return None
            transposed = self.random.random() < 0.15
            layer = self._convolution(channels, width, kernel, groups, transposed)
            name = f"{'transposed ' * transposed}convolution of {groups} groups"
            return name, self._parametrized(layer), [source], value
        kind = self.random.choice(["linear", "linear", "matmul", "einsum", "tensordot", "bilinear", "experts", "twice"])
        if kind == "linear":
            return (
                kind,
                self._parametrized(nn.Linear(channels, width, bias=self.random.random() < 0.7)),
                [source],
                value,
            )
        if kind == "bilinear":
            return kind, Then(lambda layer, x: layer(x, x), nn.Bilinear(channels, channels, width)), [source], value
        if kind == "experts":
            return kind, Experts(channels, self.random.choice([2, 3])), [source], values[source]
        if kind == "twice":
            shared = nn.Linear(channels, channels)
            return kind, Then(lambda layer, x: layer(layer(x).relu()), shared), [source], values[source]
        return kind, Product(channels, width, kind), [source], value

    def _parametrized(self, layer: nn.Module) -> nn.Module:
        return nn.utils.parametrizations.weight_norm(layer) if self.random.random() < 0.1 else layer

    def _activation(self, values: list[Value], source: int) -> tuple | None:
        if self.random.random() < 0.1:
            count = values[source].channels if not self.last and self.random.random() < 0.5 else 1
            return "prelu", nn.PReLU(count), [source], values[source]
        name = self.random.choice(list(ACTIVATIONS))
        return name, Apply(ACTIVATIONS[name]), [source], values[source]

    def _norm(self, values: list[Value], source: int) -> tuple | None:
        channels, axis = values[source].channels, self.axis
        names = ["scale", "by hand", "rms", "unit length", "softmax", "centred", "logsumexp"]
        names += {"vector": ["batch", "layer"], "tokens": ["layer"], "words": ["layer"]}.get(self.layout, [])
        names += ["batch", "batch", "group", "instance", "layer of channels"] if not self.last else []
        name = self.random.choice(names)
        if name == "batch":
            kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[self.dims]
            block: nn.Module = kind(channels)
        elif name == "layer":
            block = nn.LayerNorm(channels)
        elif name == "group":
            groups = self.random.choice([1, 2])
            block = nn.GroupNorm(groups, channels)
        elif name == "instance":
            block = (nn.InstanceNorm1d if self.dims == 3 else nn.InstanceNorm2d)(channels, affine=True)
        elif name == "layer of channels":
            back = (0, 2, 3, 1) if self.dims == 4 else (0, 2, 1)
            forth = (0, 3, 1, 2) if self.dims == 4 else (0, 2, 1)
            block = Then(lambda norm, x: norm(x.permute(back)).permute(forth), nn.LayerNorm(channels))
        elif name == "scale":
            block = Scale(channels, axis, self.dims)
        elif name == "rms":
            norm = Scale(channels, axis, self.dims)
            block = Then(lambda scale, x: scale(x * torch.rsqrt(x.square().mean(axis, keepdim=True) + 1e-5)), norm)
        else:
            functions: dict[str, Block] = {
                "by hand": lambda x: (x - x.mean(axis, keepdim=True)) / (x.std(axis, keepdim=True) + 1e-3),
                "unit length": lambda x: F.normalize(x, dim=axis),
                "softmax": lambda x: x.softmax(axis),
                "centred": lambda x: x - x.amax(axis, keepdim=True),
                "logsumexp": lambda x: x - torch.logsumexp(x, axis, keepdim=True),
            }
            block = Apply(functions[name])
        return name, block, [source], values[source]

    def _join(self, values: list[Value], source: int) -> tuple | None:
        other = self.random.randrange(1, len(values))
        left, right = values[source], values[other]
        if left.size != right.size:
            return None
        if self.random.random() < 0.4:
            if left.channels + right.channels > 24:
                return None
            axis = self.axis
            block = Apply(lambda x, y: torch.cat([x, y], axis))
            return "concat", block, [source, other], Value(left.channels + right.channels, left.size)
        if left != right or source == other:
            return None
        functions: dict[str, Block] = {
            "add": lambda x, y: x + y,
            "subtract": torch.subtract,
            "multiply": lambda x, y: x * y.sigmoid(),
            "maximum of both": torch.maximum,
            "weighted": lambda x, y: torch.lerp(x, y, 0.3),
        }
        name = self.random.choice(["add", "add", *functions])
        return name, Apply(functions[name]), [source, other], left

    def _reshape(self, values: list[Value], source: int) -> tuple | None:
        channels, size, axis = values[source].channels, values[source].size, self.axis
        name = self.random.choice(
            ["swapped halves", "first half", "product of halves", "glu", "maxout", "shuffle", "flip"]
        )
        if channels % 2 or channels < 4:
            return None
        half = channels // 2

        def shuffled(x: Tensor) -> Tensor:
            return x.unflatten(axis, (2, half)).transpose(axis, axis + 1).flatten(axis, axis + 1)

        functions: dict[str, tuple[Block, int]] = {
            "swapped halves": (lambda x: torch.cat(x.chunk(2, axis)[::-1], axis), channels),
            "first half": (lambda x: x.narrow(axis, 0, half), half),
            "product of halves": (lambda x: x.narrow(axis, 0, half) * torch.tanh(x.narrow(axis, half, half)), half),
            "glu": (lambda x: F.glu(x, axis), half),
            "maxout": (lambda x: x.unflatten(axis, (half, 2)).amax(axis + 1), half),
            "shuffle": (shuffled, channels),
            "flip": (lambda x: x.flip(axis), channels),
        }
        function, width = functions[name]
        return name, Apply(function), [source], Value(width, size)

    def _gated(self, values: list[Value], source: int) -> tuple | None:
        channels, width = values[source].channels, self._width()
        if self.others and self.random.random() < 0.5:
            return "excitation", Gate(channels, width, self.others), [source], values[source]
        if not self.last:
            return None
        up, gate, down = nn.Linear(channels, width), nn.Linear(channels, width), nn.Linear(width, channels)
        block = Then(lambda up, gate, down, x: x + down(up(x) * F.silu(gate(x))), up, gate, down)
        return "gated mlp", block, [source], values[source]

    def _attend(self, values: list[Value], source: int) -> tuple | None:
        channels = values[source].channels
        heads = self.random.choice([2, 4])
        if self.random.random() < 0.25:
            if channels % heads:
                return None
            return (
                "library attention",
                LibraryAttention(channels, heads, self.random.random() < 0.5),
                [source],
                values[source],
            )
        mask = self.random.choice(["none", "flag", "buffer", "bool", "full"])
        groups, fused = self.random.choice([1, 2, heads]), self.random.random() < 0.5
        block = Attention(channels, heads, groups, self.random.choice([2, 4]), mask, fused)
        residual = Then(lambda attention, x: x + attention(x), block)
        return (
            f"{'fused ' * fused}attention, {heads} heads, {groups} groups, mask {mask}",
            residual,
            [source],
            values[source],
        )

    def _recur(self, values: list[Value], source: int) -> tuple | None:
        channels, size, width = values[source].channels, values[source].size, self.random.choice([3, 4, 6])
        if size != TOKENS:
            return None
        kind = self.random.choice(["lstm", "gru", "rnn", "gru loop", "linear loop"])
        if "loop" in kind:
            return kind, Loop(channels, width, kind.split()[0]), [source], Value(width, size)
        both, layers = self.random.random() < 0.3, self.random.choice([1, 1, 2])
        kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
        block = Recurrent(channels, width, kinds[kind], layers, both)
        return f"{kind} of {layers} layers", block, [source], Value(width * (1 + both), size)

    def _over_tokens(self, values: list[Value], source: int) -> tuple | None:
        name = self.random.choice(["token mixing", "ramp", "running sum", "roll", "first token", "counted mean"])
        if name == "token mixing":
            mixing = nn.Linear(TOKENS, TOKENS)
            block: nn.Module = Then(lambda mix, x: x + mix(x.transpose(1, 2)).transpose(1, 2), mixing)
        else:
            functions: dict[str, Block] = {
                "ramp": lambda x: x + torch.arange(x.shape[1])[:, None] / x.shape[1],
                "running sum": lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None],
                "roll": lambda x: x.roll(1, 1),
                "first token": lambda x: x + x[:, :1],
                "counted mean": lambda x: x - torch.nanmean(x, 1, keepdim=True),
            }
            block = Apply(functions[name])
        return name, block, [source], values[source]

    def _pool(self, values: list[Value], source: int) -> tuple | None:
        channels, size, spatial = values[source].channels, values[source].size, self.dims - 2
        name = self.random.choice(["maximum pool", "average pool", "blur", "upsample", "adaptive", "tokens of pixels"])
        if size < 4 and name != "upsample":
            return None
        if name == "tokens of pixels":
            if self.dims != 4:
                return None
            block: nn.Module = Then(
                lambda mix, x: mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape),
                nn.Linear(channels, channels),
            )
            return name, block, [source], values[source]
        if name == "upsample":
            return (name, nn.Upsample(scale_factor=2.0), [source], Value(channels, size * 2)) if size <= 4 else None
        if name == "blur":
            average = F.avg_pool1d if spatial == 1 else F.avg_pool2d
            block = Apply(lambda x: average(F.pad(x, [1, 1] * spatial, mode="reflect"), 3, 1))
            return name, block, [source], values[source]
        pools = [F.max_pool1d, F.avg_pool1d] if spatial == 1 else [F.max_pool2d, F.avg_pool2d]
        if name == "adaptive":
            pool = F.adaptive_avg_pool1d if spatial == 1 else F.adaptive_avg_pool2d
            return name, Apply(lambda x: pool(x, 2)), [source], Value(channels, 2)
        function = pools[name == "average pool"]
        return name, Apply(lambda x: function(x, 2)), [source], Value(channels, size // 2)


@torch.no_grad()
def _spread(model: nn.Module, generator: torch.Generator) -> None:
    """Biases, gains and running statistics away from their zeros and ones."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.ndim > 1 or "future" in name or not tensor.numel():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else tensor + 0.3 * noise)


def network(seed: int) -> tuple[RandomNetwork, Tensor]:
    """The random network of a seed, in evaluation mode, and a batch of four inputs.

    One of five keeps the values it is initialised with; the others get random biases, gains and running statistics.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grammar = Grammar(seed)
        model, x = grammar.build().eval(), grammar.example()
        if seed % 5:
            _spread(model, torch.Generator().manual_seed(seed))
    return model, x
