"""Which of torch's layer classes a call of an operator is: one line of ``KINDS`` for each ``module`` of the registry.

A call is a layer's where all of its tensors are one module's own, under the names that the class gives them, and where
every other argument is a constant that the class' constructor takes. What is said here of sizes is checked against the
tensors when the module is built (``vfx.emit.calls``).
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx, nn
from torch.utils import _pytree as pytree

from vfx.operators import Operator, arguments, is_transposed, operator, operator_of

Shapes = Mapping[str, tuple[int, ...]]
Constructed = tuple[type[nn.Module], dict[str, Any]]  # a class and its constructor's arguments
Build = Callable[[fx.Node, dict[str, Any], Shapes], Constructed | None]

_CONVOLUTION_OF_RANK = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED_OF_RANK = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORM_OF_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORM_OF_RANK = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


class ModuleCall(NamedTuple):
    """A call as a module's: the class, its constructor's arguments, its tensors by name, and what it is called with."""

    kind: type[nn.Module]
    options: dict[str, Any]
    tensors: dict[str, fx.Node]
    inputs: tuple[Any, ...]

    @property
    def path(self) -> str:
        """The module that holds the tensors, "" where they are not one module's own."""
        names = {leaf: str(node.target) for leaf, node in self.tensors.items()}
        paths = {name.removesuffix(f".{leaf}") if name.endswith(f".{leaf}") else "" for leaf, name in names.items()}
        return paths.pop() if len(paths) == 1 else ""

    @property
    def construction(self) -> tuple[Any, ...]:
        """What two calls of one module have in common."""
        return self.kind, self.options, {leaf: node.target for leaf, node in self.tensors.items()}


@dataclass(frozen=True)
class _Kind:
    """``tensors`` are arguments by the class' name of them, ``inputs`` the arguments that the module is called with."""

    build: Build
    tensors: Mapping[str, str]
    inputs: tuple[str, ...] = ("input",)


def layer_of(node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> ModuleCall | None:
    """The layer that a node calls, None where it is none; ``shapes`` are those of the tensors that the graph reads."""
    kind = KINDS.get(operator_of(node).module)
    if kind is None:
        return None
    a = arguments(node)
    if "batch_sizes" in a or not _taken_apart(node):  # packed sequences have a form of their own
        return None
    named = _stacked(a["params"]) if "params" in a else {leaf: a[name] for leaf, name in kind.tensors.items()}
    tensors = {leaf: value for leaf, value in named.items() if value is not None}
    inputs = tuple(tuple(a[name]) if isinstance(a[name], (list, tuple)) else a[name] for name in kind.inputs)
    if not tensors or not all(isinstance(t, fx.Node) and t.op == "get_attr" for t in tensors.values()):
        return None
    if not {*tensors.values(), *_nodes(inputs)}.issuperset(node.all_input_nodes):  # a stride that is computed
        return None
    built = kind.build(node, a, {leaf: shapes[str(t.target)] for leaf, t in tensors.items()})
    if "hx" in kind.inputs and all(operator(state) == "aten.zeros" for state in _nodes(inputs[1:])):
        inputs = inputs[:1]  # where recurrent layers start by themselves
    return ModuleCall(*built, tensors, inputs) if built is not None else None


def _nodes(arguments: Any) -> list[fx.Node]:
    """The nodes in nested arguments."""
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, fx.Node)]


def _taken_apart(node: fx.Node) -> bool:
    """Whether readers of several results take single ones of them."""
    several = isinstance(node.meta.get("val"), (list, tuple))
    return not several or all(user.target is python_operator.getitem for user in node.users)


def _stacked(params: Sequence[Any]) -> dict[str, Any]:
    """The tensors of a recurrent layer by the last part of their names."""
    named = {str(p.target).rpartition(".")[2]: p for p in params if isinstance(p, fx.Node)}
    return named if len(named) == len(params) else {}


def _convolution(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed | None:
    first, second, *kernel = shapes["weight"]
    transposed = is_transposed(node)
    kind = (_TRANSPOSED_OF_RANK if transposed else _CONVOLUTION_OF_RANK).get(len(kernel))
    if kind is None:
        return None
    spread = lambda value: value if isinstance(value, str) else tuple(value) * (len(kernel) // len(value))  # noqa: E731
    options: dict[str, Any] = {key: spread(a[key]) for key in ("stride", "padding", "dilation")}
    inputs, outputs = (first, second * a["groups"]) if transposed else (second * a["groups"], first)
    options |= {"in_channels": inputs, "out_channels": outputs}
    options |= {"kernel_size": tuple(kernel), "groups": a["groups"], "bias": "bias" in shapes}
    return kind, options | ({"output_padding": spread(a["output_padding"])} if transposed else {})


def _linear(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed | None:
    if len(shapes["weight"]) != 2:
        return None
    features_out, features_in = shapes["weight"]
    return nn.Linear, {"in_features": features_in, "out_features": features_out, "bias": "bias" in shapes}


def _bilinear(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed:
    features_out, first, second = shapes["weight"]
    features = {"in1_features": first, "in2_features": second, "out_features": features_out}
    return nn.Bilinear, features | {"bias": "bias" in shapes}


def _running_norm(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed | None:
    """BatchNorm or InstanceNorm; a norm without running statistics always takes those of its input."""
    by_rank = _BATCH_NORM_OF_RANK if operator_of(node).is_batch_norm else _INSTANCE_NORM_OF_RANK
    value = a["input"].meta.get("val")
    kind, tracks = by_rank.get(len(getattr(value, "shape", ()))), "running_mean" in shapes
    if kind is None or a.get("use_input_stats") == tracks:
        return None
    options = {"num_features": next(iter(shapes.values()))[0], "eps": a["eps"], "momentum": a["momentum"]}
    return kind, options | {"affine": "weight" in shapes, "track_running_stats": tracks}


def _layer_norm(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed:
    options = {"normalized_shape": tuple(a["normalized_shape"]), "eps": a["eps"], "bias": "bias" in shapes}
    return nn.LayerNorm, options


def _rms_norm(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed:
    return nn.RMSNorm, {"normalized_shape": tuple(a["normalized_shape"]), "eps": a["eps"]}


def _group_norm(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed:
    (channels,) = shapes["weight"]
    return nn.GroupNorm, {"num_groups": a["num_groups"], "num_channels": channels, "eps": a["eps"]}


def _embedding(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed:
    count, width = shapes["weight"]
    padding = a["padding_idx"] if a["padding_idx"] >= 0 else None
    options = {"num_embeddings": count, "embedding_dim": width, "padding_idx": padding}
    return nn.Embedding, options | {key: a[key] for key in ("scale_grad_by_freq", "sparse")}


def _prelu(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed | None:
    return (nn.PReLU, {"num_parameters": shapes["weight"][0]}) if len(shapes["weight"]) == 1 else None


def _recurrent(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed | None:
    kind, gates, options = _recurrent_kind(operator_of(node))
    if list(shapes) != _recurrent_names(a):
        return None
    projection = {"proj_size": shapes["weight_hr_l0"][0]} if "weight_hr_l0" in shapes else {}
    width, hidden = shapes["weight_ih_l0"][1], shapes["weight_hh_l0"][0] // gates
    sizes = {"input_size": width, "hidden_size": hidden, "bias": a["has_biases"]}
    kept = {key: a[key] for key in ("num_layers", "dropout", "bidirectional", "batch_first")}
    return kind, options | sizes | projection | kept


def _recurrent_kind(entry: Operator) -> tuple[type[nn.Module], int, dict[str, Any]]:
    """The class, how many gates it has, and the function that plain networks have in their name (aten.rnn_tanh)."""
    options = {"nonlinearity": entry.name.split("_")[1]} if entry.gates == 1 else {}
    return getattr(nn, entry.module), entry.gates, options


def _recurrent_names(a: dict[str, Any]) -> list[str]:
    """The names of a recurrent layer's tensors in the order of the call."""
    suffixes = ("", "_reverse") if a["bidirectional"] else ("",)
    tensors = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if a["has_biases"] else ())]
    if len(a["params"]) > len(tensors) * len(suffixes) * a["num_layers"]:
        tensors.append("weight_hr")
    return [f"{tensor}_l{layer}{s}" for layer in range(a["num_layers"]) for s in suffixes for tensor in tensors]


def _cell(node: fx.Node, a: dict[str, Any], shapes: Shapes) -> Constructed:
    kind, gates, options = _recurrent_kind(operator_of(node))
    hidden, inputs = shapes["weight_ih"]
    return kind, options | {"input_size": inputs, "hidden_size": hidden // gates, "bias": "bias_ih" in shapes}


_AFFINE = {"weight": "weight", "bias": "bias"}
_STATISTICS = {"running_mean": "running_mean", "running_var": "running_var"}
_CELL_TENSORS = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
KINDS: dict[str, _Kind] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _Kind(_convolution, _AFFINE)),
    "Linear": _Kind(_linear, _AFFINE),
    "Bilinear": _Kind(_bilinear, _AFFINE, ("input1", "input2")),
    **dict.fromkeys(("BatchNorm", "InstanceNorm"), _Kind(_running_norm, _AFFINE | _STATISTICS)),
    "LayerNorm": _Kind(_layer_norm, _AFFINE),
    "RMSNorm": _Kind(_rms_norm, {"weight": "weight"}),
    "GroupNorm": _Kind(_group_norm, _AFFINE),
    "Embedding": _Kind(_embedding, {"weight": "weight"}, ("indices",)),
    "PReLU": _Kind(_prelu, {"weight": "weight"}, ("self",)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _Kind(_recurrent, {}, ("input", "hx"))),
    **dict.fromkeys(("LSTMCell", "GRUCell", "RNNCell"), _Kind(_cell, _CELL_TENSORS, ("input", "hx"))),
}
