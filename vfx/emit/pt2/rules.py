"""What the records of an exported program may hold, so that neither torch nor a graph's generated code runs a file's.

Names become code (torch.fx writes Python with them), operators are looked up by name, tree structures and guards name
modules to import or hold code themselves. Names are identifiers, operators are those of the dispatcher on tensors and
numbers, structures are rebuilt from plain containers, and what is not needed (guards, metadata) is left out.
"""

from __future__ import annotations

import json
import keyword
import re
from dataclasses import replace
from typing import Any

import torch
from torch._export.serde import schema

from vfx.capture.contexts import CONTEXTS
from vfx.emit.pt2.expressions import SYMBOL, checked_expression
from vfx.errors import CheckpointError

_PATH = re.compile(r"[\w \-/:+=@,]+(\.[\w \-/:+=@,]+)*")
_DEVICE = re.compile(r"[a-z]{1,20}", re.ASCII)
_TARGET = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", re.ASCII)
_PREFIX = "torch.ops.higher_order."
_PLAIN = re.compile(r"(Optional\[|List\[)*(Tensor|int|float|bool|number|complex|str|Device|Generator)\]*")
_SCALAR_OPERATORS = frozenset({
    *(f"_operator.{name}" for name in (
        "eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow",
        "and_", "or_", "not_", "abs", "lshift", "rshift",
    )),
    *(f"torch.{name}" for name in (
        "sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_sum", "_sym_sqrt",
    )),
    *(f"math.{name}" for name in ("trunc", "ceil", "floor", "sqrt")),
})  # fmt: skip
# torch's own namespaces beside the arithmetic: devices, processes, files and the memory behind tensors
_INTERNAL = frozenset({
    "c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "symm_mem", "streams", "inductor",
    "inductor_prims", "profiler", "fsdp", "_native", "_test", "_inductor_test", "_dtensor", "mempool", "debugprims",
    "export", "debug_mode_ops", "coor", "flex_lib", "static_runtime", "image", "prim", "cuda", "triton", "xnnpack",
})  # fmt: skip
_REFUSED = re.compile(r"aten\.(from_file|_print|set_|_sparse_\w*_unsafe)", re.ASCII)
_VERIFIERS = frozenset({"TRAINING", "ATEN"})
_SEQUENCES = {
    "builtins.tuple": "builtins.tuple", "torch.Size": "builtins.tuple", "collections.namedtuple": "builtins.tuple",
    "builtins.list": "builtins.list", "collections.deque": "builtins.list",
    "torch.fx.immutable_collections.immutable_list": "builtins.list",
}  # fmt: skip


def checked_name(name: str) -> str:
    """A Python identifier. Raises CheckpointError."""
    if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name):
        raise CheckpointError(f"{name[:80]!r} is no name of a value")
    return name


def checked_path(path: str) -> str:
    """A parameter's name, with the names of its modules in front. Raises CheckpointError."""
    if not _PATH.fullmatch(path) or "__" in path.rpartition(".")[2][:2]:
        raise CheckpointError(f"{path[:80]!r} is no name of a parameter")
    return path


def _named(record: Any) -> Any:
    checked_name(record.name)
    return record


def _named_or_constant(record: Any) -> Any:
    if record.type == "as_name":
        checked_name(record.as_name)
    return record


def _of_state(field: str) -> Any:
    def rule(record: Any) -> Any:
        checked_path(getattr(record, field))
        return record

    return rule


def _input(record: schema.NamedArgument) -> schema.NamedArgument:
    if record.name and not (record.name.isidentifier() and record.name.isascii()):
        raise CheckpointError(f"{record.name[:80]!r} is no name of an argument")
    return record


def _argument(record: schema.Argument) -> schema.Argument:
    if record.type in ("as_operator", "as_custom_obj", "as_string_to_argument"):
        raise CheckpointError(f"an argument of kind {str(record.type)!r} is no plain data")
    return record


def _custom_object(record: schema.CustomObjArgument) -> schema.CustomObjArgument:
    raise CheckpointError(f"{record.name[:80]!r} is an object of class {record.class_fqn[:80]!r}: objects carry code")


def _expression(record: schema.SymExpr) -> schema.SymExpr:
    return replace(record, expr_str=checked_expression(record.expr_str))


def _device(record: schema.Device) -> schema.Device:
    if not _DEVICE.fullmatch(record.type):
        raise CheckpointError(f"{record.type[:80]!r} is no device")
    return record


def _tensor(record: schema.TensorMeta) -> schema.TensorMeta:
    if record.layout != schema.Layout.Strided:
        raise CheckpointError(f"a tensor of layout {record.layout.name}; only strided tensors are read")
    return record


def _node(record: schema.Node) -> schema.Node:
    if record.name is not None:
        checked_name(record.name)
    operator = _operator(record.target)
    kinds = {str(argument.arg.type) for argument in record.inputs}
    if kinds & {"as_string", "as_strings"} and not operator.startswith(("aten.", "context.")):
        raise CheckpointError(
            f"operator {record.target} takes text, which only torch's own operators get from a file: it may name a file"
        )
    if "as_graph" in kinds and not operator.startswith("context."):
        raise CheckpointError(f"operator {record.target} takes a nested graph")
    kept = {key: text for key, text in record.metadata.items() if key == "nn_module_stack"}
    return replace(record, metadata=kept)


def _operator(target: str) -> str:
    """An operator's name; raises CheckpointError for what is no arithmetic on tensors and numbers."""
    if target in _SCALAR_OPERATORS:
        return target
    if target.startswith(_PREFIX):
        if target.removeprefix(_PREFIX) in CONTEXTS:
            return f"context.{target.removeprefix(_PREFIX)}"
        raise CheckpointError(
            f"operator {target[:80]} runs nested graphs; such higher-order operators are not supported: remove "
            "torch.cond, while_loop or scan from forward()"
        )
    parts = _TARGET.fullmatch(target)
    if parts is None:
        raise CheckpointError(f"{target[:80]!r} is no operator of torch")
    namespace, name, overload = parts.groups()
    qualified = f"{namespace}::{name}" + ("" if overload == "default" else f".{overload}")
    if namespace in _INTERNAL or _REFUSED.match(f"{namespace}.{name}"):
        raise CheckpointError(f"operator {target} reaches beyond tensors and is refused")
    if not torch._C._dispatch_has_kernel(qualified):
        raise CheckpointError(f"operator {target} is not known here; import the package that defines it first")
    packet = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    odd = [argument.name for argument in packet._schema.arguments if not _PLAIN.fullmatch(str(argument.type))]
    if odd:
        raise CheckpointError(f"operator {target} takes {', '.join(odd)}, which is no tensor and no number")
    return f"{namespace}.{name}"


def _graph(record: schema.Graph) -> schema.Graph:
    for values in (record.tensor_values, record.sym_int_values, record.sym_bool_values, record.sym_float_values):
        for name in values:
            checked_name(name)
    return record


def _graph_module(record: schema.GraphModule) -> schema.GraphModule:
    root = [entry for entry in record.module_call_graph if entry.fqn == ""]
    if len(root) != 1 or root[0].signature is None:
        raise CheckpointError("the exported program does not say how it is called")
    return replace(record, module_call_graph=root, metadata={}, treespec_namedtuple_fields={})


def _call(record: schema.ModuleCallEntry) -> schema.ModuleCallEntry:
    """The program's own call alone is needed; those of its modules are left out."""
    return record if record.fqn == "" else schema.ModuleCallEntry(fqn="-")


def _call_signature(record: schema.ModuleCallSignature) -> schema.ModuleCallSignature:
    for name in record.forward_arg_names or ():
        checked_name(name)
    return replace(record, in_spec=_structure(record.in_spec), out_spec=_structure(record.out_spec))


def _structure(text: str) -> str:
    """A nested structure of plain containers; those of a class become dicts of their fields."""
    try:
        version, tree = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"a nested structure cannot be read: {error}") from error
    if version != schema.TREESPEC_VERSION:
        raise CheckpointError(f"a nested structure of version {str(version)[:80]} instead of {schema.TREESPEC_VERSION}")
    return json.dumps([version, _containers(tree)])


def _containers(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict) or not isinstance(children := tree.get("children_spec"), list):
        raise CheckpointError(f"{str(tree)[:80]!r} is no nested structure")
    kind, context = tree.get("type"), tree.get("context")
    if kind is None:
        if children or context is not None:
            raise CheckpointError("a leaf of a nested structure has parts")
        return {"type": None, "context": None, "children_spec": []}
    parts = [_containers(child) for child in children]
    if kind in _SEQUENCES:
        return {"type": _SEQUENCES[kind], "context": "null", "children_spec": parts}
    return {"type": "builtins.dict", "context": json.dumps(_keys(kind, context, len(parts))), "children_spec": parts}


def _keys(kind: Any, context: Any, count: int) -> list[Any]:
    keys = context.get("dict_context") if isinstance(context, dict) else context
    try:
        keys = json.loads(keys) if isinstance(keys, str) else keys
    except ValueError:
        keys = None
    if not isinstance(keys, list) or len(keys) != count or not all(type(key) in (str, int) for key in keys):
        raise CheckpointError(f"a nested structure of class {str(kind)[:80]!r} does not name its {count} parts")
    return keys


def _program(record: schema.ExportedProgram) -> schema.ExportedProgram:
    for name in record.range_constraints:
        if not SYMBOL.fullmatch(name):
            raise CheckpointError(f"{name[:80]!r} is no symbol of a size")
    if not _VERIFIERS.issuperset(record.verifiers):
        raise CheckpointError(
            f"it was checked by {', '.join(record.verifiers)[:80]!r}, not by {' or '.join(sorted(_VERIFIERS))}"
        )
    return replace(record, guards_code=[])


RULES: dict[type, Any] = {
    **dict.fromkeys((schema.TensorArgument, schema.TokenArgument, schema.GraphArgument), _named),
    **dict.fromkeys((schema.SymIntArgument, schema.SymFloatArgument, schema.SymBoolArgument), _named_or_constant),
    schema.InputToConstantInputSpec: _named,
    schema.CustomObjArgument: _custom_object,
    schema.NamedArgument: _input,
    schema.Argument: _argument,
    schema.SymExpr: _expression,
    schema.Device: _device,
    schema.TensorMeta: _tensor,
    schema.Node: _node,
    schema.Graph: _graph,
    schema.GraphModule: _graph_module,
    schema.ModuleCallEntry: _call,
    schema.ModuleCallSignature: _call_signature,
    schema.ExportedProgram: _program,
    **{kind: _of_state(field) for kind, field in (
        (schema.InputToParameterSpec, "parameter_name"), (schema.InputToBufferSpec, "buffer_name"),
        (schema.InputToTensorConstantSpec, "tensor_constant_name"), (schema.BufferMutationSpec, "buffer_name"),
        (schema.ParameterMutationSpec, "parameter_name"), (schema.GradientToParameterSpec, "parameter_name"),
        (schema.GradientToUserInputSpec, "user_input_name"), (schema.UserInputMutationSpec, "user_input_name"),
    )},
}  # fmt: skip
