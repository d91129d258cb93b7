"""Cost of a network, counted from its graph: parameters, MACs, FLOPs, MAdd and memory traffic of one sample.

Conventions are torchstat's, which the papers' tables use (Vanishing Feature, Table 12). With k the kernel's elements:

=====================  ==============================  ==================================
operator               FLOPs                           MAdd
=====================  ==============================  ==================================
convolution            MACs + outputs (if biased)      2·MACs − outputs + outputs (if biased)
linear                 MACs                            2·MACs − outputs
matrix product         MACs                            2·MACs − outputs of each product
recurrent, bilinear    those of its matrix products, as torch runs them one after the other
einsum, tensordot      the same (three operands of einsum are two products)
BatchNorm, LayerNorm   2·elements                      4·elements
activation             elements                        elements
max pool               input elements                  (k − 1)·outputs
average pool           input elements                  k·outputs
anything else          0                               0
=====================  ==============================  ==================================

torchstat sees modules only, so an activation or a pool counts where a module of ``torch.nn`` ran it; called as a
function (``F.relu``) it costs nothing. Norms count wherever they stand. torchstat knows neither LayerNorm nor its
relatives (group, instance, RMS norm), nor attention: the former count as BatchNorm here, the latter by its two matrix
products (the softmax between them is free), nor recurrent layers, whose gates are free, nor deformable convolutions,
which count as convolutions (their sampling is free). What the table does not know is named wherever a total is shown
(``Profile.caveat``). Memory is (inputs + parameters) read and outputs written, in bytes of their
own dtypes, for every row; buffers (running statistics, masks) are neither parameters nor reads. One difference remains:
torchstat keeps only the last call of a module that runs several times, while every call is counted here.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import fx

from vfx.analyse import contractions
from vfx.analyse.contractions import ContractionCost
from vfx.complex_numbers import parts_of
from vfx.errors import ArgumentError
from vfx.files import csv_text, written
from vfx.operators import arguments, operator, operator_of
from vfx.program import Program, Value

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class CostRow:
    """Cost of one operator on one sample; memory in bytes. A shared parameter counts in its first reader's row."""

    name: str
    operator: str
    module: str
    input_shape: Sizes
    output_shape: Sizes
    params: int
    macs: int
    flops: int
    madd: int
    memory_read: int
    memory_write: int


_TOTALS = ("params", "macs", "flops", "madd", "memory_read", "memory_write")


@dataclass(frozen=True)
class Profile:
    """Rows in execution order, and ``unknown_ops``: operators the table does not know, whose rows count nothing."""

    rows: tuple[CostRow, ...]
    unknown_ops: tuple[str, ...] = ()

    @property
    def caveat(self) -> str:
        """What the totals leave out, in words; nothing where they are whole."""
        return f"not counted: {', '.join(self.unknown_ops)}" if self.unknown_ops else ""

    @property
    def params(self) -> int:
        """Elements of all floating parameters that the graph reads, each tensor once."""
        return self._total("params")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions, linear layers and matrix products."""
        return self._total("macs")

    @property
    def flops(self) -> int:
        """FLOPs as torchstat counts them (see the module's table)."""
        return self._total("flops")

    @property
    def madd(self) -> int:
        """Multiplications and additions as torchstat counts them (see the module's table)."""
        return self._total("madd")

    @property
    def memory_read(self) -> int:
        """Bytes read: inputs and parameters of every row."""
        return self._total("memory_read")

    @property
    def memory_write(self) -> int:
        """Bytes written: outputs of every row."""
        return self._total("memory_write")

    def ratio(self, other: Profile) -> dict[str, float]:
        """Parameters and FLOPs of this network as multiples of another's."""
        return {name: _quotient(self._total(name), other._total(name)) for name in ("params", "flops")}

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line for each row, shapes as ``1x3x32x32``; also written to ``path`` if given. Raises OSError."""
        names = [field.name for field in fields(CostRow)]
        return written(
            csv_text([{name: _cell(getattr(row, name)) for name in names} for row in self.rows], names), path
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """An object of rows, totals and unknown_ops; also written to ``path`` if given. Raises OSError."""
        totals = {name: self._total(name) for name in _TOTALS}
        document = {"rows": [asdict(row) for row in self.rows], "totals": totals, "unknown_ops": self.unknown_ops}
        return written(json.dumps(document, indent=2) + "\n", path)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), markup=False, emoji=False, highlight=False, color_system=None)
        table = self._table()
        console.width = console.measure(table, options=console.options.update(width=10_000)).maximum
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip("\n")

    def _total(self, name: str) -> int:
        return sum(getattr(row, name) for row in self.rows)

    def _table(self) -> Table:
        table = Table(show_footer=True, caption=self.caveat or None)
        for title in ("layer", "operator", "input", "output"):
            table.add_column(title, footer="total" if title == "layer" else "", no_wrap=True)
        for name in _TOTALS:
            table.add_column(name.replace("_", " "), footer=f"{self._total(name):,}", justify="right", no_wrap=True)
        for row in self.rows:
            shapes = (_cell(row.input_shape), _cell(row.output_shape))
            counts = (f"{getattr(row, name):,}" for name in _TOTALS)
            table.add_row(row.module or row.name, row.operator, *shapes, *counts)
        return table


def cost(program: Program, edge: int = 0) -> Profile:
    """Count the network of one edge, for a batch of one sample.

    A batch size that the capture fixed, rather than left dynamic, is counted as it is. Raises ArgumentError for an edge
    that does not exist and for a node that carries no shape.
    """
    if not 0 <= edge < program.edges:
        raise ArgumentError(f"edge {edge} does not exist: the program has {program.edges} (0 … {program.edges - 1})")
    counted: set[str] = set()
    rows: list[CostRow] = []
    unknown: dict[str, None] = {}
    for node in program.graph.nodes:
        if node.op not in ("call_function", "output"):
            continue
        call = OperatorCall(node, program, edge)
        params = sum(math.prod(call.value(p).shape) for p in call.parameters if _held_as(p) not in counted)
        counted |= {str(_held_as(p)) for p in call.parameters}
        if call.is_unknown:
            unknown[call.operator] = None
        if params or not call.is_harmless:
            rows.append(_row(call, params))
    return Profile(tuple(rows), tuple(unknown))


def _row(call: OperatorCall, params: int) -> CostRow:
    count = call.count()
    read = 0 if call.is_harmless else sum(map(_bytes, call.reads()))
    written = 0 if call.is_harmless else sum(map(_bytes, call.outputs))
    shapes = (call.input_shape, call.outputs[0].sizes(1) if call.outputs else ())
    module = call.node.meta.get("module") or ""
    return CostRow(call.node.name, call.operator, module, *shapes, params, *count, read, written)


class Count(NamedTuple):
    """What one call computes."""

    macs: int = 0
    flops: int = 0
    madd: int = 0


class OperatorCall:
    """One node with the shapes of what it reads and writes, for a batch of one sample."""

    def __init__(self, node: fx.Node, program: Program, edge: int):
        self.node = node
        self.program = program
        self.weights = program.weights[edge]
        self.operator = operator(node) or node.op
        self.entry = operator_of(node)
        self.arguments = arguments(node)
        self.parameters = [] if parts_of(node) is not None else list(filter(self._is_parameter, node.all_input_nodes))
        self.outputs = [] if node.op == "output" else self.values(node)

    @property
    def is_harmless(self) -> bool:
        """Whether nothing is computed or moved: a view, a constant, arithmetic on sizes."""
        return not self.outputs or self.entry.cost == VIEW

    @property
    def is_unknown(self) -> bool:
        return not self.is_harmless and self.entry.cost not in COUNTS

    @property
    def size(self) -> int:
        """Elements of the (first) output."""
        return math.prod(self.outputs[0].sizes(1))

    @property
    def input_shape(self) -> Sizes:
        """Shape of the first tensor that is not a parameter or buffer, or of the first at all."""
        tensors = [n for n in self.node.all_input_nodes if self.values(n)]
        computed = [n for n in tensors if _held_as(n) is None]
        return next((self.values(n)[0].sizes(1) for n in computed or tensors), ())

    def count(self) -> Count:
        """MACs, FLOPs and MAdd; nothing for harmless and unknown operators."""
        return Count() if self.is_harmless or self.is_unknown else COUNTS[self.entry.cost](self)

    def sizes(self, argument: str) -> Sizes:
        """Shape of a tensor argument by its name in the operator's schema."""
        return self.value(self.arguments[argument]).sizes(1)

    def has(self, argument: str) -> bool:
        return self.arguments.get(argument) is not None

    def is_run_by(self, *kinds: str) -> bool:
        """Whether the innermost module is a class from one of these files of ``torch.nn.modules``."""
        path = str(self.node.meta.get("module_type") or "")
        # Attention lives in activation.py, and what it runs is its own.
        return path.startswith(tuple(f"torch.nn.modules.{k}." for k in kinds)) and "MultiheadAttention" not in path

    def reads(self) -> Iterator[Value]:
        """Inputs and parameters, buffers left out."""
        for node in self.node.all_input_nodes:
            if node.op != "get_attr" or str(node.target) not in self.program.buffers:
                yield from self.values(node)

    def value(self, node: fx.Node) -> Value:
        """Shape and dtype of the one tensor that a node holds."""
        return self.values(node)[0]

    def values(self, node: fx.Node) -> list[Value]:
        """Shapes and dtypes of the tensors that a node holds; none for numbers."""
        if node.op == "get_attr":
            tensor = self.weights[str(node.target)]
            return [Value(tuple(tensor.shape), tensor.dtype)]
        if "val" not in node.meta:
            raise ArgumentError(f'node {node.name} ({operator(node)}) carries no shape: set meta["val"] to its Value')
        value = node.meta["val"]
        return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Value)]

    def _is_parameter(self, node: fx.Node) -> bool:
        return _held_as(node) is not None and self.program.is_parameter(str(_held_as(node)))


def _held_as(node: fx.Node) -> str | None:
    """The FQN of the tensor that a node stands for, real or complex."""
    node = parts_of(node) or node
    return str(node.target) if node.op == "get_attr" else None


# counting functions ---------------------------------------------------------------------------------------------------


def _convolution(call: OperatorCall) -> Count:
    """Each output element sums over a window of its group's channels: weight (out, in / groups, *kernel)."""
    if call.arguments.get("transposed"):
        return _transposed(call)
    return _biased(call, call.size * math.prod(call.sizes("weight")[1:]))


def _transposed(call: OperatorCall) -> Count:
    """Each input element is spread over a window of its group's channels: weight (in, out / groups, *kernel)."""
    return _biased(call, math.prod(call.sizes("input")) * math.prod(call.sizes("weight")[1:]))


def _biased(call: OperatorCall, macs: int) -> Count:
    bias = call.size if call.has("bias") else 0
    return Count(macs, macs + bias, 2 * macs - call.size + bias)


def _product(call: OperatorCall) -> Count:
    """A matrix product sums over the last axis of its left operand; a bias is not counted."""
    macs = call.size * call.sizes(call.entry.roles["input"])[-1]
    return Count(macs, macs, 2 * macs - call.size)


def _attention(call: OperatorCall) -> Count:
    """Scores (queries × keys, over the head) and their sum of values; query (…, L, E), value (…, S, F)."""
    head, (keys, width) = call.sizes("query")[-1], call.sizes("value")[-2:]
    scores = call.size // width * keys if width else 0
    macs = scores * (head + width)
    return Count(macs, macs, 2 * macs - scores - call.size)


def _products(costs: Iterable[ContractionCost]) -> Count:
    products = list(costs)
    macs = sum(product.macs for product in products)
    return Count(macs, macs, 2 * macs - sum(product.outputs for product in products))


def _einsum(call: OperatorCall) -> Count:
    a = call.arguments
    return _products(contractions.einsum(a["equation"], [call.value(x).sizes(1) for x in a["tensors"]], a.get("path")))


def _tensordot(call: OperatorCall) -> Count:
    a = call.arguments
    return _products(contractions.tensordot(call.sizes("self"), call.sizes("other"), a["dims_self"], a["dims_other"]))


def _inner(call: OperatorCall) -> Count:
    """Over the last axis of both; a number only scales."""
    left, right = call.sizes("self"), call.sizes("other")
    return _products(contractions.tensordot(left, right, [-1], [-1])) if left and right else Count()


def _batches_summed(call: OperatorCall) -> Count:
    """addbmm: the products of all batches are summed up."""
    left, right = call.sizes("batch1"), call.sizes("batch2")
    return _products(contractions.tensordot(left, right, [0, 2], [0, 1]))


def _bilinear(call: OperatorCall) -> Count:
    return _products(contractions.bilinear(math.prod(call.sizes("input1")[:-1]), call.sizes("weight")))


def _recurrent(call: OperatorCall) -> Count:
    """Layers over all steps (their input may be packed), or one step of a cell."""
    a = call.arguments
    x = call.value(a["data"] if "data" in a else a["input"]).sizes(1)
    cell = [a[name] for name in ("w_ih", "w_hh") if name in a]
    return _products(contractions.recurrent(math.prod(x[:-1]), [call.value(w).sizes(1) for w in cell or a["params"]]))


def _deformable(call: OperatorCall) -> Count:
    """As the convolution; without a bias it is given zeros."""
    macs = call.size * math.prod(call.sizes("weight")[1:])
    bias = call.size if call.arguments["bias"] in call.parameters else 0
    return Count(macs, macs + bias, 2 * macs - call.size + bias)


def _norm(call: OperatorCall) -> Count:
    return Count(0, 2 * call.size, 4 * call.size)


def _activation(call: OperatorCall) -> Count:
    size = call.size if call.is_run_by("activation") else 0
    return Count(0, size, size)


def _pool(call: OperatorCall, spared: int) -> Count:
    """``spared`` is 1 where a window of k elements takes k − 1 operations (a maximum), else 0."""
    if not call.is_run_by("pooling"):
        return Count()
    kernel = call.arguments["kernel_size"]
    sides = list(kernel) if isinstance(kernel, (list, tuple)) else [kernel]
    window = math.prod(sides * call.entry.spatial if len(sides) == 1 else sides)
    return Count(0, math.prod(call.sizes("self")), (window - spared) * call.size)


def _free(call: OperatorCall) -> Count:
    return Count()


# the kinds of Operator.cost; one that is UNKNOWN is named beside the totals ------------------------------------------

VIEW = "view"  # nothing is computed or moved: no row unless a parameter is first read there

COUNTS: dict[str, Callable[[OperatorCall], Count]] = {
    "convolution": _convolution,
    "transposed convolution": _transposed,
    "deformable convolution": _deformable,
    "product": _product,
    "summed products": _batches_summed,
    "inner": _inner,
    "einsum": _einsum,
    "tensordot": _tensordot,
    "bilinear": _bilinear,
    "recurrent": _recurrent,
    "attention": _attention,
    "norm": _norm,
    "activation": _activation,
    "max pool": partial(_pool, spared=1),
    "average pool": partial(_pool, spared=0),
    "free": _free,
}


# helpers --------------------------------------------------------------------------------------------------------------


def _bytes(value: Value) -> int:
    return math.prod(value.sizes(1)) * value.dtype.itemsize


def _quotient(ours: int, theirs: int) -> float:
    if theirs == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / theirs


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value
