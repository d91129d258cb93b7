"""How a call is linear in its parameter: y = rows(x) · matrix(weight), for each of its groups apart.

=================================  ===================================================================================
form                               calls
=================================  ===================================================================================
``Contraction``                    linear, mm, addmm, matmul, bmm and einsum of two operands, one a parameter
``Convolution``                    convolutions of any rank and grouping, transposed ones too
=================================  ===================================================================================

A transposed convolution is a convolution of its input with zeros between the samples, by the flipped kernel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from vfx.operators import arguments, is_product, is_transposed, layer_arguments, operator_of
from vfx.program import Value
from vfx.reconstruct.sums import Sums, sums_of
from vfx.reconstruct.windows import Window, patches, shares_products, window_cross, window_gram, window_sums

WRITTEN = 1 << 24  # elements of rows that are written out at once


class Form(ABC):
    """A call's rows, goals and matrix: (groups, rows, K), (groups, rows, O) and (groups, K, O).

    ``taps``: how many of K follow each other for one input, the positions of a kernel; ``along``: the axis on which
    ``arranged`` batches are joined.
    """

    taps: int = 1
    along: int = 1

    @property
    @abstractmethod
    def entries(self) -> int:
        """Entries of all groups' Gram matrices."""

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def goals(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor: ...

    @abstractmethod
    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of ``matrix``."""

    def sums(self, x: Tensor, y: Tensor) -> Sums:
        """The sums of one batch of inputs and wanted outputs."""
        return self.products(*self.arranged(x, y))

    def arranged(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and wanted outputs as ``products`` takes them; batches of them may be joined."""
        return self.rows(x), self.goals(y)

    def products(self, inputs: Tensor, goals: Tensor) -> Sums:
        """The sums of arranged inputs and goals."""
        return sums_of(inputs, goals)

    def gram(self, x: Tensor) -> Tensor:
        """Σ rowsᵀ rows of one batch of inputs, (groups, K, K), in its own precision."""
        rows = self.rows(x)
        return rows.mT @ rows

    def thinned(self, x: Tensor, y: Tensor, rows: int, seed: int) -> Sums:
        """The sums of at most ``rows`` random rows."""
        written, goals = self.rows(x), self.goals(y)
        if written.shape[1] > rows:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(written.shape[1], generator=generator)[:rows].to(x.device)
            written, goals = written[:, chosen], goals[:, chosen]
        return sums_of(written, goals)


class Contraction(Form):
    """A product y = x · W in Einstein's notation, one letter an axis.

    Letters of x, W and y are groups, of x and W the inputs K, of W and y the outputs O, of x and y the rows.
    """

    def __init__(self, x: str, weight: str, y: str, sizes: dict[str, int]):
        self.x, self.w, self.y, self.sizes = x, weight, y, sizes
        self.shared = [c for c in weight if c in x and c in y]
        self.read = [c for c in weight if c in x and c not in y]
        self.made = [c for c in weight if c in y and c not in x]
        self.free = [c for c in x if c in y and c not in weight]

    @property
    def regular(self) -> bool:
        """Whether each axis has one of the four parts, and the bias of one axis fits."""
        return (
            len(set(self.x)) == len(self.x)
            and len(set(self.w)) == len(self.w)
            and len(self.shared + self.read + self.made) == len(self.w)
            and len(self.shared + self.read + self.free) == len(self.x)
            and len(self.shared + self.made + self.free) == len(self.y)
        )

    @property
    def entries(self) -> int:
        groups, inputs = (math.prod(self.sizes[c] for c in letters) for letters in (self.shared, self.read))
        return groups * inputs**2

    def rows(self, x: Tensor) -> Tensor:
        return self._arranged(x, self.x, self.shared, self.free, self.read)

    def goals(self, y: Tensor) -> Tensor:
        return self._arranged(y, self.y, self.shared, self.free, self.made)

    def matrix(self, weight: Tensor) -> Tensor:
        return self._arranged(weight, self.w, self.shared, self.read, self.made)

    def weight(self, matrix: Tensor) -> Tensor:
        order = self.shared + self.read + self.made
        whole = matrix.reshape([self.sizes[c] for c in order])
        return whole.permute([order.index(c) for c in self.w]).contiguous()

    def _arranged(self, tensor: Tensor, letters: str, *parts: list[str]) -> Tensor:
        order = [letters.index(c) for part in parts for c in part]
        moved, counts = tensor.permute(order), [len(part) for part in parts]
        sizes, start = [], 0
        for count in counts:
            sizes.append(math.prod(moved.shape[start : start + count]))
            start += count
        return moved.reshape(sizes)


class Convolution(Form):
    """A convolution or transposed convolution of any rank."""

    along = 0

    def __init__(self, node: fx.Node, shape: tuple[int, ...]):
        options, rank = arguments(node), len(shape) - 2
        self.shape, self.rank, self.groups = shape, rank, int(options.get("groups", 1))
        self.transposed = is_transposed(node)
        stride, dilation = (_per_axis(options[name], rank) for name in ("stride", "dilation"))
        kernel = tuple(shape[2:])
        pairs = _padding(options["padding"], kernel, dilation)
        self.stuffing = stride if self.transposed else (1,) * rank
        if self.transposed:
            extra = _per_axis(options["output_padding"], rank)
            pairs = tuple(
                (d * (k - 1) - p, d * (k - 1) - q + e) for (p, q), k, d, e in zip(pairs, kernel, dilation, extra)
            )
            stride = (1,) * rank
        self.window = Window(kernel, stride, dilation, pairs)
        self.taps = self.window.size

    @property
    def entries(self) -> int:
        inputs = self.shape[0] // self.groups if self.transposed else self.shape[1]
        return self.groups * (inputs * self.taps) ** 2

    def rows(self, x: Tensor) -> Tensor:
        return self._written(self._stuffed(x))

    def goals(self, y: Tensor) -> Tensor:
        y = self._batched(y).movedim(1, -1)
        return y.reshape(-1, self.groups, y.shape[-1] // self.groups).transpose(0, 1)

    def matrix(self, weight: Tensor) -> Tensor:
        g, kernel = self.groups, self.shape[2:]
        if self.transposed:  # (G · C, O, window) -> (G · O, C, window), flipped
            weight = weight.reshape(g, -1, *weight.shape[1:]).transpose(1, 2).flip(list(range(3, 3 + self.rank)))
            return weight.reshape(g, weight.shape[1], -1).mT
        return weight.reshape(g, len(weight) // g, self.shape[1] * math.prod(kernel)).mT

    def weight(self, matrix: Tensor) -> Tensor:
        g, kernel = self.groups, self.shape[2:]
        if self.transposed:
            whole = matrix.mT.reshape(g, self.shape[1], self.shape[0] // g, *kernel)
            return whole.flip(list(range(3, 3 + self.rank))).transpose(1, 2).reshape(self.shape).contiguous()
        return matrix.mT.reshape(self.shape).contiguous()

    def gram(self, x: Tensor) -> Tensor:
        x = self._stuffed(x)
        if self._shares_products(x):
            return window_gram(self.window, x)[None]
        rows = (self._written(part) for part in x.split(self._samples_written(x)))
        return sum((part.mT @ part).double() for part in rows)  # type: ignore[return-value]

    def arranged(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._stuffed(x), self._batched(y)

    def products(self, inputs: Tensor, goals: Tensor) -> Sums:
        if self._shares_products(inputs):
            return self._shared_sums(inputs, goals)
        size = self._samples_written(inputs)
        plain = [sums_of(self._written(a), self.goals(b)) for a, b in zip(inputs.split(size), goals.split(size))]
        total = plain[0] if len(plain) == 1 else plain[0].double()
        for part in plain[1:]:
            total += part
        return total

    def _shares_products(self, x: Tensor) -> bool:
        return self.groups == 1 and shares_products(self.window, x.shape[1], x.shape[2:])

    def _samples_written(self, x: Tensor) -> int:
        """How many samples' rows may be written out at once."""
        return max(1, WRITTEN // max(1, x.shape[1] * self.window.size * math.prod(self.window.outputs(x.shape[2:]))))

    def _written(self, x: Tensor) -> Tensor:
        """The rows of inputs that have their zeros in between already."""
        written = patches(self.window, x)
        return written.reshape(-1, self.groups, written.shape[-1] // self.groups).transpose(0, 1)

    def _shared_sums(self, x: Tensor, y: Tensor) -> Sums:
        """The same sums without written rows."""
        others = [0, *range(2, y.ndim)]
        return Sums(
            window_gram(self.window, x)[None],
            window_cross(self.window, x, y)[None],
            window_sums(self.window, x)[None],
            y.sum(others, dtype=torch.float64)[None],
            torch.linalg.vector_norm(y, dim=others).double().square()[None],
            y.shape[0] * math.prod(y.shape[2:]),
        )

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.ndim == self.rank + 2 else x[None]

    def _stuffed(self, x: Tensor) -> Tensor:
        """The input with zeros between its samples, as a transposed convolution with a stride reads it."""
        x = self._batched(x)
        if all(s == 1 for s in self.stuffing):
            return x
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.stuffing)]
        result = x.new_zeros(*x.shape[:2], *sizes)
        result[(slice(None), slice(None), *(slice(None, None, s) for s in self.stuffing))] = x
        return result


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * rank if len(values) == 1 else values)


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in _per_axis(0 if padding == "valid" else padding, len(kernel)))


# which form a call has ------------------------------------------------------------------------------------------------


def form_of(node: fx.Node) -> tuple[Form, fx.Node, fx.Node, Any] | None:
    """A call's form, the value that it reads, its weight's node and its bias (a node or None); None for other calls."""
    if operator_of(node).is_convolving:
        a = arguments(node)
        shape = _shape(a["weight"])
        fits = shape is not None and _is_parameter(a["weight"])
        return (Convolution(node, shape), a["input"], a["weight"], a["bias"]) if fits else None  # type: ignore
    for x, weight, bias, letters in _contractions(node):
        if _is_parameter(weight) and not _is_parameter(x):
            form = Contraction(*letters, _sizes(weight, letters[1]))
            if form.regular and (
                bias is None or (len(form.made) == 1 and not form.shared and letters[2][-1] in form.made)
            ):
                return form, x, weight, bias
    return None


def _contractions(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, Any, tuple[str, str, str]]]:
    """The ways to see a call as a product of x with a weight, and their letters (x, W, y)."""
    entry, a = operator_of(node), layer_arguments(node)
    rows = "abcdefghij"
    if entry.is_linear or is_product(node):
        x, weight = a["input"], a["weight"]
        free = rows[: len(_shape(x) or ()) - 1]
        yield x, weight, a["bias"], (free + "k", "ko" if is_product(node) else "ok", free + "o")
    elif entry.multiplies and not entry.adds_summand:
        first_node, second_node = node.args[0], node.args[1]
        first, second = _shape(first_node), _shape(second_node)
        if first is not None and second is not None and min(len(first), len(second)) >= 2:
            batch = rows[: max(len(first), len(second)) - 2]
            left, right = (batch[len(batch) - len(s) + 2 :] for s in (first, second))
            if not _broadcasts(first, second):
                yield first_node, second_node, None, (left + "rk", right + "ko", batch + "ro")  # type: ignore[misc]
                yield second_node, first_node, None, (right + "kr", left + "ok", batch + "or")  # type: ignore[misc]
    elif entry.ties == "einsum":
        equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
        inputs, _, out = equation.partition("->")
        letters = inputs.split(",")
        if "." not in equation and "->" in equation and len(letters) == 2:
            first_node, second_node = operands
            yield first_node, second_node, None, (letters[0], letters[1], out)
            yield second_node, first_node, None, (letters[1], letters[0], out)


def _broadcasts(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether a batch axis of one stands against several of the other."""
    return any(a != b for a, b in zip(reversed(first[:-2]), reversed(second[:-2])))


def _is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _shape(node: Any) -> tuple[Any, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, Value) else None


def _sizes(weight: fx.Node, letters: str) -> dict[str, int]:
    return dict(zip(letters, _shape(weight) or ()))


__all__ = ["Contraction", "Convolution", "Form", "form_of"]
