"""A tiny network for each operator of the registry, made from its schema: parameters through it, each axis read.

Tensors that an operator takes are parameters (positions and masks are constants); every axis of what it gives meets a
vector of its own, so an axis that the rule leaves free is a group of two members.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from vfx.operators import Operator, entry_of

Shapes = tuple[tuple[int, ...], ...]

# shapes of the tensors in the order in which they are taken, by kinds of ties; the first that the operator takes counts
ALIKE: list[Shapes] = [(shape,) * 6 for shape in ((6, 4), (2, 4, 6, 6), (3, 4, 6), (4,), (2, 4, 6, 6, 6), (4, 4))]
PRODUCTS: list[Shapes] = [((4, 6), (6, 5)), ((3, 4, 6), (3, 6, 5)), ((4, 6), (6,)), ((6,), (6,)), ((4,), (5,))]
SUMMED: list[Shapes] = [(result, *pair) for pair, result in zip(PRODUCTS, ((5,), (5,), (4,), (1,), (4, 5)))]
SHAPES: dict[str, list[Shapes]] = {
    "linear": [((3, 6), (4, 6), (4,))],
    "convolution": [((2, 4, *[5] * n), (6, 4, *[3] * n), (6,)) for n in (1, 2, 3)],
    "transposed convolution": [((2, 4, *[5] * n), (4, 6, *[3] * n), (6,)) for n in (1, 2, 3)],
    "product": PRODUCTS,
    "dot": [((6,), (6,))],
    "tensordot": [((4, 6), (6, 5))],
    "outer": PRODUCTS,
    "inner": [((3, 6), (4, 6))],
    "product and sum": SUMMED,
    "products and sum": [*SUMMED, ((4, 5), (3, 4, 6), (3, 6, 5))],
    "embedding": [((9, 6), (4,))],
    "bilinear": [((3, 4), (3, 5), (6, 4, 5), (6,))],
    "attention": [((2, 3, 5, 6),) * 3],
    "fused attention": [((2, 3, 5, 6),) * 3],
    "per channel": [((3, 4, 6), (4,), (4,), (4,), (4,))],
    "layer norm": [((3, 6), (6,), (6,))],
    "group norm": [((3, 8, 5), (8,), (8,))],
    "weight norm": [((6, 4), (1, 4))],
    "prelu": [((3, 6), (6,))],
    "complex pairs": [((4, 2),)],
    "cross product": [((4, 3), (4, 3))],
    "sampled": [((2, 4, 5, 5), (2, 3, 3, 2)), ((2, 4, 5, 5, 5), (2, 3, 3, 3, 3))],
    "image": [((2, 16, 9),)],
    "channel shuffle": [((2, 8, 6),), ((2, 8, 6, 6),)],
    "pixel shuffle": [((2, 8, 4, 4),)],
    "index": [((6, 4), (3,))],
    "gather": [((6, 4), (6, 4))],
    "take": [((6, 4), (3,))],
    "scatter": [((6, 4), (6, 4), (6, 4))],
    "write at": [((6, 4), (3,), (6, 3))],
    "of matrix": [((2, 4, 4),), ((4, 4),)],
    "chain": PRODUCTS,
    "block diagonal": [((2, 3), (4, 5))],
    "unpooled": [((2, 3, 2, 2),) * 2, ((2, 3, 2, 2, 2),) * 2],
    "split depth": [((2, 3, 4),)],
    "turn quarters": [((4, 6),)],
    "slice scatter": [((6, 4), (6, 2))],
    "select scatter": [((6, 4), (6,))],
}
NOT_MADE = ("grouped product", "recurrent layers", "recurrent cell", "embedding bag", "data dependent")  # kinds of ties

VALUES: dict[str, Any] = {
    "dim": 1, "dim0": 0, "dim1": 1, "groups": 2, "num_groups": 2, "upscale_factor": 2, "downscale_factor": 2, "k": 2,
    "chunks": 2, "split_size": 2, "sections": 2, "start": 0, "length": 2, "index": 1, "n": 1, "N": 3, "C": 8, "HxW": 5,
    "group": 2, "repeats": 2, "shifts": 1, "source": 0, "destination": 1, "cudnn_enabled": False, "training": False,
    "momentum": 0.1, "eps": 1e-5, "use_input_stats": False, "decimals": 1, "num_classes": 9, "step": 1,
    "equation": "ij,jk->ik", "dims_self": [1], "dims_other": [0], "negative_slope": 0.1, "exponent": 3, "ord": 2,
    "dimension": 1, "size": 2, "min": -0.3, "max": 0.6, "min_val": -0.3, "max_val": 0.6, "train": False,
    "interpolation_mode": 0,
    "padding_mode": 0, "align_corners": False, "bins": 5, "reduce": "amax", "value": 0.5, "end": 2, "indexing": "ij",
}  # fmt: skip
_PLAIN = {"bool": False, "float": 0.5, "number": 0.5, "Optional[number]": 0.5, "Optional[float]": 0.5}
INTEGERS, BOOLEANS = ("index", "indices", "offsets"), ("mask", "condition")


def _listed(name: str, shape: tuple[int, ...], spatial: int, amounts: int) -> Any:
    """A list of sizes, positions or amounts by its name."""
    known = {
        "size": (*shape[:1], -1) if len(shape) < 2 else shape,
        "shape": shape,
        "sizes": (2, shape[-1] // 2),
        "split_sizes": (shape[1] // 2, shape[1] - shape[1] // 2) if len(shape) > 1 else (2, shape[0] - 2),
        "split_size": (shape[1] // 2, shape[1] - shape[1] // 2) if len(shape) > 1 else (2, shape[0] - 2),
        "dims": tuple(reversed(range(len(shape)))),
        "dim": (1,) if amounts == 2 else (0, 1),
        "repeats": (1,) * (len(shape) - 1) + (2,),
        "shifts": (1,),
        "normalized_shape": shape[-1:],
        "kernel_size": (2,) * (spatial or 2),
        "output_size": (4,) * (spatial or 2),
        "dilation": (1,) * (spatial or 2),
        "padding": (1,) * amounts,
        "pad": (1,) * amounts,
        "stride": (1,) * (spatial or 2),
        "output_padding": (0,) * (spatial or 2),
        "source": (0,),
        "destination": (1,),
    }
    return list(known[name]) if name in known else None


class Called(nn.Module):
    """y (N, 1) = x times what an operator gives, each of whose axes is read by a vector."""

    def __init__(self, target: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.target, self.arguments, self.held = target, {}, {}
        for name, value in arguments.items():
            self.arguments[name] = self._hold(name, value)
        self.readers = nn.ParameterList()
        results = self._results()
        self.reads = len(results) > 0
        for result in results:
            self.readers.extend(nn.Parameter(torch.randn(size)) for size in result.shape)

    def _hold(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
            return [self._hold(f"{name}{k}", one) for k, one in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point() and not name.startswith("running_"):
            setattr(self, f"{name}_", nn.Parameter(value))
        else:
            self.register_buffer(f"{name}_", value)
        return _Held(f"{name}_")

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(one) for one in value]
        return getattr(self, value.name) if isinstance(value, _Held) else value

    def _results(self) -> list[Tensor]:
        schema = self.target._schema.arguments
        given = {name: self._value(value) for name, value in self.arguments.items()}
        named = takewhile(lambda a: a.name in given and not a.kwarg_only, schema)
        positional = [given.pop(argument.name) for argument in list(named)]
        results = self.target(*positional, **given)
        tensors = filter(_is_read, results if isinstance(results, (list, tuple)) else [results])
        return [torch.view_as_real(one) if one.is_complex() else one for one in tensors]

    def forward(self, x: Tensor) -> Tensor:
        readers, total = iter(self.readers), x
        for result in self._results():
            value = result if result.is_floating_point() else result.to(x.dtype)
            vectors = [next(readers) for _ in range(value.ndim)]
            for vector in reversed(vectors):
                value = value @ vector
            total = total + x * value
        return total


class _Held:
    def __init__(self, name: str) -> None:
        self.name = name


def _is_read(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


def network_of(entry: Operator) -> Called | None:
    """The network of an operator, or None where no call of it could be made up."""
    called = entry.name.startswith("aten.") and entry.ties not in NOT_MADE
    packet = getattr(torch.ops.aten, entry.name.removeprefix("aten."), None) if called else None
    for target in [getattr(packet, name) for name in packet.overloads()] if packet is not None else []:
        schema = target._schema
        if any(a.is_out for a in schema.arguments) or schema.is_mutable or entry_of(target) is not entry:
            continue
        if target._overloadname == "no_stats":  # crashes where it is told to use them
            continue
        for shapes, amounts in product(SHAPES.get(entry.ties, ALIKE), (2, 4, 6)):
            arguments = _arguments(target, shapes, entry.spatial, amounts)
            if arguments is None:
                continue
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    torch.manual_seed(0)
                    model = Called(target, arguments).eval()
                    y = model(torch.randn(2, 1))
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
                continue
            if list(model.parameters()) and model.reads and y.shape == (2, 1) and y.isfinite().all():
                return model
    return None


def _arguments(target: Any, shapes: Shapes, spatial: int, amounts: int) -> dict[str, Any] | None:
    """Arguments for a call on tensors of these shapes; None where there are too few shapes, or no value is known."""
    left = iter(shapes)
    found: dict[str, Any] = {}
    for argument in target._schema.arguments:
        kind, name = str(argument.type), argument.name
        if kind in ("Tensor", "Optional[Tensor]") and (not argument.has_default_value() or name in ("weight", "bias")):
            shape = next(left, None)
            if shape is None:
                return None
            found[name] = _tensor(name, shape)
        elif kind in ("List[Tensor]", "List[Optional[Tensor]]"):
            own = list(_several(name, left, kind))
            found[name] = own
        elif not argument.has_default_value() or name in ("dim", "min", "max"):
            listed = kind.startswith(("List", "Optional[List"))
            value = _listed(name, shapes[0], spatial, amounts) if listed else VALUES.get(name, _PLAIN.get(kind))
            if value is None and not kind.startswith("Optional"):
                return None
            found[name] = value
    return found


def _several(name: str, left: Iterator[tuple[int, ...]], kind: str) -> Iterator[Tensor]:
    yield _tensor(name, next(left))
    second = next(left, None)
    if kind == "List[Tensor]" and second is not None:
        yield _tensor(name, second)


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if name in INTEGERS:
        return torch.randint(0, 3, shape)
    if name in BOOLEANS:
        return torch.rand(shape) > 0.5
    return torch.rand(shape) * 0.6 + 0.2  # inside every domain
