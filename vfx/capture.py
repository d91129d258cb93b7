"""nn.Module -> Program, through one ``torch.export`` capture.

The undecomposed graph is kept (conv, linear, batch_norm, layer_norm and attention stay whole). Parameters, buffers and
lifted constants become ``get_attr`` nodes addressed by FQN; shared storage is read under one name; in-place operators
become functional ones where no alias is read later; parameter-free subgraphs become constants; the batch size is a
symbol. The user's model is never touched: the capture works on a structural copy that shares its tensors.
"""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from vfx.complex_numbers import read_as_complex, real_parts
from vfx.contexts import body_of, is_context
from vfx.errors import CaptureError, listed
from vfx.exporting import DYNAMIC_BATCH, exported
from vfx.operators import arguments, canonical, is_in_place, operator_of
from vfx.outputs import plain, selected
from vfx.precision import name_dtypes
from vfx.program import Program, Value, Weights, digest, frozen_mask, is_empty
from vfx.signature import Call, Signature, as_call, batched_call, in_order, positional_names, signature_of

_MAX_FOLDED = 1 << 24  # elements: a constant larger than this is cheaper to compute than to keep
_MAX_ALL_FOLDED = 1 << 27  # elements of all constants: a graph from a file could ask for any number of them
_MAX_WORK = 1 << 34  # multiplications for all constants, about a second
_PER_PART = 1 << 14  # multiplications that take as long as a tensor of its own


def capture(
    model: nn.Module | ExportedProgram, example_inputs: Any, *, dynamic_shapes: Any = DYNAMIC_BATCH,
    outputs: Sequence[int | str] | None = None,
) -> Program:  # fmt: skip
    """Capture ``model`` as a Program with one weight set.

    ``example_inputs`` is a tensor, a tuple of forward's positional arguments or a dict of its keyword arguments. They
    may nest tensors in tuples, lists and dicts; None, bool, int, float and str are constants that the capture bakes in.
    The first axis of the first tensor is the batch, and so is that of every tensor that has the same size there (a
    batch of one is doubled so that it is not taken for a constant). ``dynamic_shapes`` goes to ``torch.export``; by
    default the batch axis alone is dynamic, with a minimum of 1, and with None every size is the examples'. Outputs
    that are no tensors (caches) are dropped, with a note, and so are those that ``outputs`` does not name
    (``vfx.outputs.selected``), with all that only they need. Raises CaptureError if the model cannot be captured,
    ArgumentError if the inputs do not fit its ``forward`` or an output has no such name.
    """
    if isinstance(model, ExportedProgram):
        call = as_call(example_inputs)
        return _program(model, call, signature_of(call, _exported_names(model, call)), None, [], outputs)
    call = in_order(model.forward, as_call(example_inputs), type(model).__name__)
    call = batched_call(call) if dynamic_shapes == DYNAMIC_BATCH else call
    signature = signature_of(call, positional_names(model.forward, call))
    program, notes = exported(model, call, dynamic_shapes)
    return _program(program, call, signature, model, notes, outputs)


def _exported_names(exported: ExportedProgram, call: Call) -> list[str] | None:
    """Names of the positional arguments, where the exported program knows them."""
    signature = exported.module_call_graph[0].signature if exported.module_call_graph else None
    names = getattr(signature, "forward_arg_names", None) or []
    return list(names[: len(call.args)]) if len(names) >= len(call.args) else None


def _program(
    exported: ExportedProgram, call: Call, signature: Signature, model: nn.Module | None, notes: list[str],
    outputs: Sequence[int | str] | None,
) -> Program:  # fmt: skip
    builder = _Builder(exported, signature, outputs)
    graph = builder.build()
    graph = _without_unread_writes(_functionalise(_own_written(_without_idle_writes(graph))))
    graph, weights = _fold_constants(graph, builder.weights, builder.constants)
    graph = name_dtypes(_without_empty_parts(graph))
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    weights = {name: tensor for name, tensor in weights.items() if name in read or name in exported.state_dict}
    graph.lint()
    return Program(
        graph=graph,
        weights=(weights,),
        example_inputs=tuple(call.tensors()),
        signature=signature,
        module=model,
        buffers=frozenset(set(weights) - builder.parameters),
        aliases=builder.aliases,
        notes=(*notes, *builder.notes),
        origin=digest(graph),
        outputs=tuple(outputs or ()),
    )


class _Builder:
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


def as_value(value: Any) -> Any:
    """Metadata of a captured value: Value for tensors, a list for several, the object itself otherwise."""
    if isinstance(value, Tensor):
        sizes = (size if isinstance(size, int) else size.node.expr for size in value.shape)
        return Value(tuple(int(s) if getattr(s, "is_Integer", False) else s for s in sizes), value.dtype)
    if isinstance(value, (list, tuple)):
        return [as_value(item) for item in value]
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return value


def _own_written(graph: fx.Graph) -> fx.Graph:
    """Inputs and weights that an in-place operator writes to are copied first: running a Program changes neither."""
    base: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, None] = {}
    for node in graph.nodes:
        source = _aliased(node)
        base[node] = base[source] if source is not None else node
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False) and isinstance(node.args[0], fx.Node):
            written[base[node.args[0]]] = None
    for node in written:
        if node.op in ("get_attr", "placeholder"):
            with graph.inserting_after(node):
                copied = graph.call_function(torch.ops.aten.clone.default, (node,))
            copied.meta = dict(node.meta)
            node.replace_all_uses_with(copied, lambda user, own=copied: user is not own)  # type: ignore[misc]
    return graph


def _functionalise(graph: fx.Graph) -> fx.Graph:
    """In-place operators become functional ones wherever no other view of their target is read later."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    base: dict[fx.Node, fx.Node] = {}
    family: dict[fx.Node, list[fx.Node]] = {}
    for node in list(graph.nodes):
        source = _aliased(node)
        base[node] = base[source] if source is not None else node
        family.setdefault(base[node], []).append(node)
        functional = _functional(node)
        if functional is None:
            continue
        target = node.args[0]
        assert isinstance(target, fx.Node)
        owned = base[target].op == "call_function"
        rivals = [x for x in family[base[target]] if x is not node and x is not target]
        if not owned or any(order[user] > order[node] for rival in rivals for user in rival.users):
            continue
        target.replace_all_uses_with(node, lambda user, at=order[node]: order[user] > at)  # type: ignore[misc]
        node.target = functional
        base[node] = node
        family[node] = [node]
    graph.eliminate_dead_code()
    return graph


def _aliased(node: fx.Node) -> fx.Node | None:
    """The argument whose storage this node's result shares, if any."""
    if node.target is python_operator.getitem:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
    if not shares and not operator_of(node).may_return_input:
        return None
    return next((a for a in node.args if isinstance(a, fx.Node)), None)


def _functional(node: fx.Node) -> Callable[..., Any] | None:
    """The out-of-place overload of an in-place ATen call, or None."""
    if not is_in_place(node) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    packet = getattr(torch.ops.aten, canonical(node).removeprefix("aten."), None)
    return getattr(packet, str(node.target._overloadname), None) if packet is not None else None  # type: ignore[union-attr]


def _fold_constants(
    graph: fx.Graph, weights: dict[str, Tensor], constants: set[str]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Evaluate what depends on neither inputs nor parameters (masks, position indices) once."""
    constant = _constant_nodes(graph, constants)
    values = _constant_values(graph, constant, weights)
    weights = dict(weights)
    frontier = [n for n in values if n.op == "call_function" and any(u not in constant for u in n.users)]
    for index, node in enumerate(n for n in frontier if isinstance(values[n], Tensor)):
        name = f"_folded_{index}"
        weights[name] = values[node].clone(memory_format=torch.contiguous_format)
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", name)
        new.meta = {"val": as_value(values[node])}
        node.replace_all_uses_with(new)
    for node in reversed(list(graph.nodes)):
        if node in constant and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph, weights


def _without_idle_writes(graph: fx.Graph) -> fx.Graph:
    """In-place operators write to no empty tensor (a slice behind the last channel)."""
    for node in list(graph.nodes):
        target = node.args[0] if node.args else None
        if _is_mutable(node) and isinstance(target, fx.Node) and is_empty(target) and is_empty(node):
            node.replace_all_uses_with(target)
            graph.erase_node(node)
    return graph


def _without_unread_writes(graph: fx.Graph) -> fx.Graph:
    """In-place operators go whose target no output reads, under whatever view of it."""
    family = {node: members for members in _families(graph) for node in members}
    needed: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.is_impure() and not _writes_first_alone(node)]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [*node.all_input_nodes, *filter(_is_mutable, family[node])]
    for node in reversed(list(graph.nodes)):
        if node not in needed:
            graph.erase_node(node)
    return graph


def _writes_first_alone(node: fx.Node) -> bool:
    """Whether an operator writes to its first argument, a tensor, and to nothing else."""
    if not _is_mutable(node) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return False
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    written = [parameter.alias_info is not None and parameter.alias_info.is_write for parameter in parameters]
    return written[0] and not any(written[1:])


def _without_empty_parts(graph: fx.Graph) -> fx.Graph:
    """Concatenations read no empty tensors (a new cache, no channels left to pass by); of one part they are that part.

    A concatenation that is empty itself stays.
    """
    if any(_is_mutable(node) for node in graph.nodes):  # a part must not be written to in place of its copy
        return graph
    for node in [n for n in graph.nodes if operator_of(n).ties == "concatenate"]:
        if any(part.meta["val"].dtype != node.meta["val"].dtype for part in node.args[0]):
            continue
        parts = [part for part in node.args[0] if not is_empty(part)]
        if len(parts) == 1:
            node.replace_all_uses_with(parts[0])
        elif parts:
            node.args = (parts, *node.args[1:])
    graph.eliminate_dead_code()
    return graph


def _constant_nodes(graph: fx.Graph, constants: set[str]) -> set[fx.Node]:
    """Nodes whose final value is known; views of one storage are constant together or not at all."""
    families = _families(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    constant: set[fx.Node] = set()
    kept = work = 0
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants:
            constant.add(node)
        elif (
            _is_foldable(node, constant)
            and kept + _elements(node) <= _MAX_ALL_FOLDED
            and work + _work(node) <= _MAX_WORK
        ):
            constant.add(node)
            kept += _elements(node)
            work += _work(node)
    while True:
        lost = {node for node in constant if node.op == "call_function" and not _is_foldable(node, constant)}
        for members in families:
            written = [order[node] for node in members if _is_mutable(node)]
            readers = [user for node in members for user in node.users if user not in constant]
            if written and (
                any(node not in constant for node in members if _is_mutable(node))
                or any(order[user] < max(written) for user in readers)
            ):
                lost.update(constant.intersection(members))
        if not lost:
            return constant
        constant -= lost


def _families(graph: fx.Graph) -> list[list[fx.Node]]:
    """Nodes that may share one storage."""
    base: dict[fx.Node, fx.Node] = {}
    families: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        source = _aliased(node)
        base[node] = base[source] if source is not None else node
        families.setdefault(base[node], []).append(node)
    return list(families.values())


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_foldable(node: fx.Node, constant: set[fx.Node]) -> bool:
    values = node.meta.get("val")
    if node.op != "call_function" or operator_of(node).name == "aten.empty" or not isinstance(values, (Value, list)):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    for value in values if isinstance(values, list) else [values]:
        if not isinstance(value, Value) or any(not isinstance(size, int) for size in value.shape):
            return False
    if _elements(node) > _MAX_FOLDED:
        return False
    return operator_of(node).fills is not None or all(argument in constant for argument in node.all_input_nodes)


def _work(node: fx.Node) -> int:
    """Multiplications, at most: each value of the output may depend on each of the inputs unless it is known better."""
    if node.op != "call_function" or operator_of(node).fills is not None:
        return 0
    read = sum(_elements(source) for source in node.all_input_nodes if isinstance(source.meta.get("val"), Value))
    if isinstance(node.meta["val"], list):
        return read * _PER_PART
    tags = getattr(node.target, "tags", ())
    linear = torch.Tag.pointwise in tags or torch.Tag.reduction in tags or getattr(node.target, "is_view", False)
    if linear or operator_of(node).linear_time:
        return read + _elements(node)
    return read * _elements(node)


def _elements(node: fx.Node) -> int:
    values = node.meta["val"]
    return sum(math.prod(value.shape) for value in (values if isinstance(values, list) else [values]))


def _constant_values(graph: fx.Graph, constant: set[fx.Node], weights: Weights) -> dict[fx.Node, Any]:
    """The values of constant nodes behind the last in-place operator."""
    device = next((tensor.device for tensor in weights.values()), None)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node not in constant:
                continue
            if node.op == "get_attr":
                values[node] = weights[str(node.target)].clone()
            elif (fills := operator_of(node).fills) is not None:
                fill = arguments(node).get("fill_value", fills)
                value = node.meta["val"]
                values[node] = torch.full(value.shape, fill, dtype=value.dtype, device=device)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                _check_size(node, args, kwargs)
                values[node] = node.target(*args, **kwargs)
    return values


def _check_size(node: fx.Node, args: Any, kwargs: Any) -> None:
    """Nothing is computed whose size is not as declared: a graph from a file could ask for any amount of memory."""
    with FakeTensorMode() as fake:
        args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, (args, kwargs))
        given = as_value(node.target(*args, **kwargs))  # type: ignore[operator]
    if given != node.meta["val"]:
        raise CaptureError(f"node {node.name} gives {given}, where the graph says {node.meta['val']}; export it anew")
