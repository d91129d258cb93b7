"""Names of ATen operators and uniform access to their arguments."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

CONVOLUTIONS = {"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"}
TRANSPOSED = {"aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"}
LINEARS = {"aten.linear"}
LAYERS = CONVOLUTIONS | TRANSPOSED | LINEARS
PRODUCTS = {  # arguments that are the input, the weight (in, out) and the bias where one factor is a parameter
    "aten.addmm": {"input": "mat1", "weight": "mat2", "bias": "self"},
    "aten.mm": {"input": "self", "weight": "mat2"},
    "aten.matmul": {"input": "self", "weight": "other"},
}
BATCH_NORMS = {"aten.batch_norm", "aten._native_batch_norm_legit_no_training"}
NORMS = BATCH_NORMS | {"aten.layer_norm", "aten.group_norm", "aten.instance_norm", "aten.rms_norm"}
_ELEMENTWISE = """
    add sub mul div relu relu6 hardtanh clamp leaky_relu elu celu silu gelu mish hardswish hardsigmoid sigmoid tanh
"""
ELEMENTWISE = {f"aten.{name}" for name in _ELEMENTWISE.split()}
DROPOUTS = {"aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout"}

_ALIASES = """
    abs: absolute; acos: arccos; acosh: arccosh; asin: arcsin; asinh: arcsinh; atan: arctan; atanh: arctanh
    atan2: arctan2; sub: subtract; mul: multiply; div: divide true_divide; neg: negative
    clamp: clip; trunc: fix; outer: ger; matmul: linalg_matmul; diagonal: linalg_diagonal; cat: concat concatenate
    vstack: row_stack; transpose: swapaxes swapdims; movedim: moveaxis; mH: adjoint
    ne: not_equal; lt: less; le: less_equal; gt: greater; ge: greater_equal
    sigmoid: special_expit; erf: special_erf; erfc: special_erfc; erfinv: special_erfinv; exp2: special_exp2
    expm1: special_expm1; log1p: special_log1p; logit: special_logit; round: special_round; sinc: special_sinc
    xlogy: special_xlogy; i0: special_i0; digamma: special_digamma special_psi; lgamma: special_gammaln
    polygamma: special_polygamma; mvlgamma: special_multigammaln; igamma: special_gammainc; igammac: special_gammaincc
    logsumexp: special_logsumexp; softmax: special_softmax; log_softmax: special_log_softmax
"""
_ALIAS_OF = {
    f"aten.{other}": f"aten.{name}"
    for entry in _ALIASES.replace("\n", ";").split(";")
    if entry.strip()
    for name, others in [entry.strip().split(": ")]
    for other in others.split()
}
_ELEMENTWISE_OVERLOADS = {"aten.max.other": "aten.maximum", "aten.min.other": "aten.minimum"}  # the others reduce


def operator(node: fx.Node) -> str:
    """``aten.conv2d`` for any overload of it, the function's name for the rest, "" where nothing is called.

    Aliases have one name: ``aten.neg`` for ``aten.negative``, ``aten.maximum`` for ``aten.max`` of two tensors.
    """
    return _name(node.target) if node.op == "call_function" else ""


@cache
def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return getattr(target, "__name__", str(target))
    name = str(packet)
    functional = name.removesuffix("_")
    return _ELEMENTWISE_OVERLOADS.get(str(target)) or _ALIAS_OF.get(functional, functional) + name[len(functional) :]


def grouped_product(x: Tensor, w: Tensor, ends: Tensor, *_: Any) -> Tensor:
    """Rows (n, k), which stand expert by expert up to ``ends`` (experts,), by the experts' matrices (experts, k, m)."""
    kind = torch.promote_types(x.dtype, w.dtype)
    expert = (torch.arange(len(x), device=x.device)[:, None] >= ends).sum(1)
    result = torch.zeros(len(x), w.shape[2], dtype=kind, device=x.device)
    for index in range(len(w)):
        rows = expert == index
        result[rows] = x[rows].to(kind) @ w[index].to(kind)
    return result


# operators whose kernels take no double precision, which proofs run in
IN_DOUBLE = {torch.ops.aten._grouped_mm.default: grouped_product}


def in_place(target: Any) -> Any:
    """The form of an elementwise ATen overload that writes into its first argument, or None."""
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::") + "_", None)
    return getattr(packet, target._overloadname, None)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by name, defaults filled in."""
    values = defaults(node.target)
    if values is None:
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    return {**values, **dict(zip(values, node.args)), **node.kwargs}


@cache
def defaults(target: Any) -> dict[str, Any] | None:
    """The default of each argument by name, None where there is none; None for what is no ATen overload.

    An alias' arguments have the names of the operator that it stands for.
    """
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    names, kinds = [a.name for a in schema.arguments], [str(a.type) for a in schema.arguments]
    packet = getattr(torch.ops.aten, _name(target).removeprefix("aten."), None)
    for overload in packet.overloads() if packet is not None and str(packet) != str(target.overloadpacket) else ():
        arguments = getattr(packet, overload)._schema.arguments
        if [str(a.type) for a in arguments] == kinds:
            names = [a.name for a in arguments]
            break
    return {n: a.default_value if a.has_default_value() else None for n, a in zip(names, schema.arguments)}


def is_layer(node: fx.Node) -> bool:
    """A convolution or linear call, or a product with a parameter (x W or x W + b, as GPT-2 writes its layers)."""
    return operator(node) in LAYERS or is_product(node)


def is_product(node: fx.Node) -> bool:
    """Whether a product is a linear layer: a computed value times a matrix that the graph reads, plus a bias or none.

    Its weight is (in, out), the other way round than a linear call's.
    """
    if operator(node) not in PRODUCTS:
        return False
    a = arguments(node)
    own = {role: a[name] for role, name in PRODUCTS[operator(node)].items()}
    parameters = [own["weight"], own["bias"]] if "bias" in own else [own["weight"]]
    ranks = [len(p.meta["val"].shape) if isinstance(p, fx.Node) and p.op == "get_attr" else 0 for p in parameters]
    computed = isinstance(own["input"], fx.Node) and own["input"].op != "get_attr"
    return computed and ranks == [2, 1][: len(ranks)] and a.get("alpha", 1) == a.get("beta", 1) == 1


def layer_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name; those of a product that is a layer as ``input``, ``weight`` and ``bias``."""
    a = arguments(node)
    if not is_product(node):
        return a
    return {"bias": None} | {role: a[name] for role, name in PRODUCTS[operator(node)].items()}


def output_axis(node: fx.Node) -> int:
    """The axis of a layer's weight on which its outputs stand (transposed convolutions: within each group)."""
    return 1 if is_product(node) or operator(node) in TRANSPOSED or arguments(node).get("transposed") else 0


def weight_name(node: fx.Node, argument: str = "weight") -> str | None:
    """FQN of a call's parameter, or None where it is absent or computed."""
    value = layer_arguments(node).get(argument)
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None
