"""An exported graph rebuilt with tensors by their names, and the user's inputs and outputs."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from vfx.capture.contexts import body_of, is_context
from vfx.capture.outputs import plain, selected
from vfx.capture.signature import Signature
from vfx.capture.values import as_value
from vfx.complex_numbers import read_as_complex, real_parts
from vfx.errors import CaptureError, listed
from vfx.operators import operator_of
from vfx.program import frozen_mask


class Builder:
    """Rebuilds an exported graph with FQN-addressed tensors and the user's inputs and outputs."""

    def __init__(self, exported: ExportedProgram, signature: Signature, outputs: Sequence[int | str] | None):
        self.exported = exported
        self.names = signature.names
        self.outputs = outputs
        self.notes: list[str] = []
        self.weights: dict[str, Tensor] = {}
        masks = {fqn for fqn, tensor in exported.state_dict.items() if frozen_mask(tensor)}
        self.parameters = set(exported.graph_signature.parameters) - masks
        self.constants: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.graph = fx.Graph()
        self.mapping: dict[fx.Node, Any] = {}  # a list behind a context that was inlined
        self._owner: dict[Any, str] = {}
        self._collect_state()

    def _collect_state(self) -> None:
        """Every tensor of the state dict once, under its first name; the other names become aliases."""
        for fqn, tensor in self.exported.state_dict.items():
            self._register(fqn, tensor.detach())

    def _register(self, fqn: str, tensor: Tensor) -> str:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and not tensor.is_meta and key in self._owner:
            self.aliases[fqn] = self._owner[key]
            return self._owner[key]
        self._owner[key] = fqn
        self.weights[fqn] = real_parts(tensor) if fqn in self.parameters else tensor
        return fqn

    def build(self) -> fx.Graph:
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        inputs = iter(self.names)
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, specs[node.name], inputs)
            elif node.op == "output":
                self._output(node)
            else:
                self._inner(node, self.exported.graph_module)
        return self.graph

    def _inner(self, node: fx.Node, owner: nn.Module) -> None:
        """A node between inputs and outputs; ``owner`` holds what it reads."""
        if node.op == "call_function" and is_context(node):
            self._inline(node, owner)
        elif node.op == "call_function":
            self._call(node)
        elif node.op == "get_attr":
            self._attribute(node, owner)
        # call_module: guards that torch.export adds

    def _inline(self, node: fx.Node, owner: nn.Module) -> None:
        """The body of a context (no_grad, checkpoint) in place of the call of it."""
        body, operands = body_of(node, owner)
        values = iter(operands)
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                self.mapping[inner] = self._mapped(next(values))
            elif inner.op == "output":
                self.mapping[node] = self._mapped(inner.args[0])
            else:
                self._inner(inner, body)

    def _mapped(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, self.mapping.__getitem__)

    def _placeholder(self, node: fx.Node, spec: Any, inputs: Iterator[str]) -> None:
        if isinstance(spec.arg, ConstantArgument):  # baked in
            return
        if spec.kind == InputKind.USER_INPUT:
            new = self.graph.placeholder(next(inputs))
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            new = self._tensor(spec)
            self.mapping[node] = self._as_read(new, node.meta.get("val"))
            return
        else:
            raise CaptureError(f"input {node.name} of kind {spec.kind} is not a tensor; remove it from forward()")
        new.meta = {"val": as_value(node.meta.get("val"))}
        self.mapping[node] = new

    def _tensor(self, spec: Any) -> fx.Node:
        fqn = str(spec.target)
        if fqn not in self.weights and fqn not in self.aliases:
            self._register(fqn, self.exported.constants[fqn].detach())
            self.constants.add(fqn)
        return self.graph.create_node("get_attr", self.aliases.get(fqn, fqn), name=_identifier(fqn))

    def _as_read(self, new: fx.Node, value: Any) -> fx.Node:
        """A tensor as forward reads it; a complex parameter is held by its parts."""
        tensor = self.weights[str(new.target)]
        if isinstance(value, Tensor) and value.is_complex() and not tensor.is_complex():
            new.meta = {"val": as_value(tensor)}
            new = read_as_complex(self.graph, new)
        new.meta["val"] = as_value(value)
        return new

    def _attribute(self, node: fx.Node, owner: nn.Module) -> None:
        value = getattr(owner, str(node.target), None)
        if isinstance(value, fx.GraphModule) and all(is_context(user) for user in node.users):
            return
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"node {node.name} holds a nested graph ({node.target}) for {', '.join(map(str, node.users))}; such "
                "higher-order operators are not supported: remove torch.cond, while_loop or scan from forward()"
            )
        fqn = self._register(str(node.target), value.detach())
        self.constants.add(fqn)
        new = self.graph.create_node("get_attr", fqn, name=_identifier(fqn))
        new.meta = {"val": as_value(value)}
        self.mapping[node] = new

    def _call(self, node: fx.Node) -> None:
        entry = operator_of(node)
        if entry.asserts:
            return
        if entry.is_input:
            self.mapping[node] = self.mapping[node.args[0]]  # type: ignore[index]
            return
        if node.target is python_operator.getitem and isinstance(self._mapped(node.args[0]), (tuple, list)):
            self.mapping[node] = self._mapped(node.args[0])[node.args[1]]
            return
        new = self.graph.node_copy(node, self.mapping.__getitem__)
        if entry.name == "aten.lift_fresh_copy":  # a literal, which later in-place operators must not reach
            new.target = torch.ops.aten.clone.default
        module, kind = _owner_module(node)
        new.meta = {"val": as_value(node.meta.get("val")), "module": module, "module_type": kind}
        self.mapping[node] = new

    def _output(self, node: fx.Node) -> None:
        spec = self.exported.call_spec.out_spec
        flat = list(self._mapped(node.args[0]))
        count = len(self.exported.graph_signature.user_outputs)
        nested = pytree.tree_unflatten(flat[len(flat) - count :], spec)
        returned = plain(nested, self.notes)
        if self.outputs is not None:
            returned, dropped = selected(returned, self.outputs)
            if dropped:
                self.notes.append(f"outputs left out, of which nothing is proved: {listed(dropped)}")
        self.graph.output(returned)


def _identifier(fqn: str) -> str:
    return "p_" + "".join(c if c.isalnum() else "_" for c in fqn)


def _owner_module(node: fx.Node) -> tuple[str, str]:
    """FQN and class of the innermost module that ran this operator."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    path, kind = stack[-1][0], stack[-1][1]
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return path.split("@")[0], kind
