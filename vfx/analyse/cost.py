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

import csv
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
from vfx.analyse.contractions import Contraction
from vfx.analyse.rules import TABLE as RULES
from vfx.analyse.rules import elementwise, indexing, movement, positions, windows, writes
from vfx.complex_numbers import parts_of
from vfx.errors import ArgumentError
from vfx.files import write_atomic
from vfx.operators import arguments, operator
from vfx.program import Program, Value

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Row:
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

    rows: tuple[Row, ...]
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
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        names = [field.name for field in fields(Row)]
        writer.writerow(names)
        writer.writerows([_cell(getattr(row, name)) for name in names] for row in self.rows)
        return _written(buffer.getvalue(), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """An object of rows, totals and unknown_ops; also written to ``path`` if given. Raises OSError."""
        totals = {name: self._total(name) for name in _TOTALS}
        document = {"rows": [asdict(row) for row in self.rows], "totals": totals, "unknown_ops": self.unknown_ops}
        return _written(json.dumps(document, indent=2) + "\n", path)

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
    rows: list[Row] = []
    unknown: dict[str, None] = {}
    for node in program.graph.nodes:
        if node.op not in ("call_function", "output"):
            continue
        call = Call(node, program, edge)
        params = sum(math.prod(call.value(p).shape) for p in call.parameters if _held_as(p) not in counted)
        counted |= {str(_held_as(p)) for p in call.parameters}
        if call.is_unknown:
            unknown[call.operator] = None
        if params or not call.is_harmless:
            rows.append(_row(call, params))
    return Profile(tuple(rows), tuple(unknown))


def _row(call: Call, params: int) -> Row:
    count = call.count()
    read = 0 if call.is_harmless else sum(map(_bytes, call.reads()))
    written = 0 if call.is_harmless else sum(map(_bytes, call.outputs))
    shapes = (call.input_shape, call.outputs[0].sizes(1) if call.outputs else ())
    module = call.node.meta.get("module") or ""
    return Row(call.node.name, call.operator, module, *shapes, params, *count, read, written)


class Count(NamedTuple):
    """What one call computes."""

    macs: int = 0
    flops: int = 0
    madd: int = 0


class Call:
    """One node with the shapes of what it reads and writes, for a batch of one sample."""

    def __init__(self, node: fx.Node, program: Program, edge: int):
        self.node = node
        self.program = program
        self.weights = program.weights[edge]
        self.operator = operator(node) or node.op
        self.arguments = arguments(node)
        self.parameters = [] if parts_of(node) is not None else list(filter(self._is_parameter, node.all_input_nodes))
        self.outputs = [] if node.op == "output" else self.values(node)

    @property
    def known_as(self) -> str:
        """The operator's name in the table: an in-place variant uses the line of its functional form."""
        return self.operator if self.operator in TABLE else self.operator.removesuffix("_")

    @property
    def is_harmless(self) -> bool:
        """Whether nothing is computed or moved: a view, a constant, arithmetic on sizes."""
        return not self.outputs or self.known_as in HARMLESS

    @property
    def is_unknown(self) -> bool:
        return not self.is_harmless and self.known_as not in TABLE

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
        return Count() if self.is_harmless or self.is_unknown else TABLE[self.known_as](self)

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


def _convolution(call: Call) -> Count:
    """Each output element sums over a window of its group's channels: weight (out, in / groups, *kernel)."""
    if call.arguments.get("transposed"):
        return _transposed(call)
    return _biased(call, call.size * math.prod(call.sizes("weight")[1:]))


def _transposed(call: Call) -> Count:
    """Each input element is spread over a window of its group's channels: weight (in, out / groups, *kernel)."""
    return _biased(call, math.prod(call.sizes("input")) * math.prod(call.sizes("weight")[1:]))


def _biased(call: Call, macs: int) -> Count:
    bias = call.size if call.has("bias") else 0
    return Count(macs, macs + bias, 2 * macs - call.size + bias)


def _product(call: Call, left: str) -> Count:
    """A matrix product sums over the last axis of its left operand; a bias is not counted."""
    macs = call.size * call.sizes(left)[-1]
    return Count(macs, macs, 2 * macs - call.size)


def _attention(call: Call) -> Count:
    """Scores (queries × keys, over the head) and their sum of values; query (…, L, E), value (…, S, F)."""
    head, (keys, width) = call.sizes("query")[-1], call.sizes("value")[-2:]
    scores = call.size // width * keys if width else 0
    macs = scores * (head + width)
    return Count(macs, macs, 2 * macs - scores - call.size)


def _products(found: Iterable[Contraction]) -> Count:
    products = list(found)
    macs = sum(product.macs for product in products)
    return Count(macs, macs, 2 * macs - sum(product.outputs for product in products))


def _einsum(call: Call) -> Count:
    a = call.arguments
    return _products(contractions.einsum(a["equation"], [call.value(x).sizes(1) for x in a["tensors"]], a.get("path")))


def _tensordot(call: Call) -> Count:
    a = call.arguments
    return _products(contractions.tensordot(call.sizes("self"), call.sizes("other"), a["dims_self"], a["dims_other"]))


def _inner(call: Call) -> Count:
    """Over the last axis of both; a number only scales."""
    one, other = call.sizes("self"), call.sizes("other")
    return _products(contractions.tensordot(one, other, [-1], [-1])) if one and other else Count()


def _batches_summed(call: Call) -> Count:
    """addbmm: the products of all batches are summed up."""
    one, other = call.sizes("batch1"), call.sizes("batch2")
    return _products(contractions.tensordot(one, other, [0, 2], [0, 1]))


def _bilinear(call: Call) -> Count:
    return _products(contractions.bilinear(math.prod(call.sizes("input1")[:-1]), call.sizes("weight")))


def _recurrent(call: Call) -> Count:
    """Layers over all steps (their input may be packed), or one step of a cell."""
    a = call.arguments
    x = call.value(a["data"] if "data" in a else a["input"]).sizes(1)
    cell = [a[name] for name in ("w_ih", "w_hh") if name in a]
    return _products(contractions.recurrent(math.prod(x[:-1]), [call.value(w).sizes(1) for w in cell or a["params"]]))


def _deformable(call: Call) -> Count:
    """As the convolution; without a bias it is given zeros."""
    macs = call.size * math.prod(call.sizes("weight")[1:])
    bias = call.size if call.arguments["bias"] in call.parameters else 0
    return Count(macs, macs + bias, 2 * macs - call.size + bias)


def _norm(call: Call) -> Count:
    return Count(0, 2 * call.size, 4 * call.size)


def _activation(call: Call) -> Count:
    size = call.size if call.is_run_by("activation") else 0
    return Count(0, size, size)


def _pool(call: Call, dimensions: int, spared: int) -> Count:
    """``spared`` is 1 where a window of k elements takes k − 1 operations (a maximum), else 0."""
    if not call.is_run_by("pooling"):
        return Count()
    kernel = call.arguments["kernel_size"]
    sides = list(kernel) if isinstance(kernel, (list, tuple)) else [kernel]
    window = math.prod(sides * dimensions if len(sides) == 1 else sides)
    return Count(0, math.prod(call.sizes("self")), (window - spared) * call.size)


def _free(call: Call) -> Count:
    return Count()


# op knowledge: TABLE (a row each), HARMLESS (no row unless a parameter is first read there), the rest is unknown ------

_PRODUCTS = {
    "linear": "input",
    "matmul": "self",
    "mm": "self",
    "bmm": "self",
    "mv": "self",
    "dot": "self",
    "vdot": "self",
    "addmm": "mat1",
    "addmv": "mat",
    "baddbmm": "batch1",
    "_grouped_mm": "self",
}

_RECURRENT = "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"

_ATTENTIONS = """
    scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
"""

_NORMS = """
    batch_norm _native_batch_norm_legit_no_training instance_norm layer_norm native_layer_norm group_norm
    native_group_norm rms_norm
"""

_ACTIVATIONS = """
    relu relu6 leaky_relu prelu rrelu elu selu celu gelu glu silu mish sigmoid hardsigmoid hardswish hardtanh hardshrink
    softshrink softplus threshold tanh log_sigmoid abs softmax _softmax log_softmax _log_softmax
"""

_FREE = """
    add sub rsub neg mul div addcmul addcdiv lerp pow sqrt rsqrt square reciprocal exp expm1 log log1p erf sin cos sign
    floor ceil round remainder floor_divide maximum minimum clamp clamp_min clamp_max where masked_fill eq ne lt le gt
    ge logical_and logical_or logical_not logical_xor __and__ __or__ __xor__ bitwise_and bitwise_or bitwise_not
    cat stack pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
    mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod any all argmax cumsum
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d embedding index index_select gather
    index_add index_copy index_put scatter scatter_add roll flip repeat repeat_interleave tile
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle complex polar angle
"""

_VIEWS = """
    view reshape _unsafe_view view_as reshape_as flatten unflatten permute transpose t numpy_T mT movedim
    unsqueeze squeeze expand expand_as broadcast_to slice narrow select split split_with_sizes chunk
    tensor_split unbind unfold diagonal clone contiguous copy to _to_copy type_as detach alias lift_fresh_copy positive
    float double half bfloat16 bool int long dropout feature_dropout alpha_dropout feature_alpha_dropout
    native_dropout zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty
    fill zero scalar_tensor arange linspace eye tril triu view_as_complex view_as_real
    real imag histc
"""


def _table() -> dict[str, Callable[[Call], Count]]:
    table: dict[str, Callable[[Call], Count]] = dict.fromkeys(_FREE.split(), _free)
    table |= dict.fromkeys(_NORMS.split(), _norm) | dict.fromkeys(_ACTIVATIONS.split(), _activation)
    table |= {name: partial(_product, left=left) for name, left in _PRODUCTS.items()}
    table |= {"convolution": _convolution, "einsum": _einsum, "tensordot": _tensordot, "inner": _inner}
    table |= {"bilinear": _bilinear, "addbmm": _batches_summed} | dict.fromkeys(_RECURRENT.split(), _recurrent)
    table |= dict.fromkeys(_ATTENTIONS.split(), _attention)
    for n in (1, 2, 3):
        table |= {f"conv{n}d": _convolution, f"conv_transpose{n}d": _transposed}
        maximum, average = partial(_pool, dimensions=n, spared=1), partial(_pool, dimensions=n, spared=0)
        table |= {f"max_pool{n}d": maximum, f"max_pool{n}d_with_indices": maximum, f"avg_pool{n}d": average}
    others = {"torchvision.deform_conv2d": _deformable}
    others |= {"transformers.grouped_mm_fallback": partial(_product, left="input")}
    return _free_by_rule() | _aten(table.items()) | others


def _free_by_rule() -> dict[str, Callable[[Call], Count]]:
    """What acts entry by entry, or moves or sums entries, by the rules of how it treats axes."""
    free = [module.__name__ for module in (elementwise, indexing, movement, positions, windows, writes)]
    moves = {name: _free for name, rule in RULES.items() if rule.apply.__module__ in free}
    return {name: count for name, count in moves.items() if name not in HARMLESS}


def _aten(entries: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {f"aten.{name}": entry for name, entry in entries}


HARMLESS = {f"aten.{name}" for name in _VIEWS.split()} | {"getitem", "output"}
TABLE = _table()


# helpers --------------------------------------------------------------------------------------------------------------


def _bytes(value: Value) -> int:
    return math.prod(value.sizes(1)) * value.dtype.itemsize


def _quotient(ours: int, theirs: int) -> float:
    if theirs == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / theirs


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        write_atomic(path, text)
    return text
