"""Program: one graph, N weight sets.

The graph is a ``torch.fx.Graph`` of ATen operators. Its ``get_attr`` nodes are addressed by the fully qualified
names (FQN) of the user's model, its ``placeholder`` nodes carry the names of ``forward``'s parameters, and its
``output`` node holds the user's output structure. Edges share one architecture, so there is one graph and a weight
set for each edge. Programs are values: passes return new ones and share the tensors they did not touch.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

import sympy
import torch
from torch import Tensor, fx, nn

from vfx.capture.outputs import plain, selected
from vfx.capture.signature import Call, Signature, has_batch
from vfx.errors import ArgumentError
from vfx.operators import arguments, entry_of, in_place, is_in_place, operator_of

Weights = Mapping[str, Tensor]
T = TypeVar("T")
RESIZED = "resized"  # the origin of a graph whose layers have other sizes
BATCH = 1_000_000_007  # a prime: no view can confuse the batch with a product of other sizes


@dataclass(frozen=True)
class Value:
    """Shape and dtype of a tensor in the graph; the batch size may be a symbol."""

    shape: tuple[Any, ...]
    dtype: torch.dtype

    def sizes(self, batch: int) -> tuple[int, ...]:
        """The shape with the batch symbol replaced by ``batch``."""
        return tuple([size if isinstance(size, int) else int(_substitute(size, batch)) for size in self.shape])


def frozen_mask(parameter: Tensor) -> bool:
    """Whether a parameter is not trained and holds −∞, which is what it adds to scores that must not count."""
    if parameter.requires_grad or parameter.is_meta or not parameter.is_floating_point():
        return False
    return bool((parameter == float("-inf")).any()) and not bool((parameter == float("inf")).any())


def is_empty(node: fx.Node) -> bool:
    """Whether a node's value is a tensor without elements at any batch size, or several of them."""
    value = node.meta.get("val")
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(x, Value) and 0 in x.shape for x in values)


@lru_cache(maxsize=4096)
def _substitute(size: Any, batch: int) -> Any:
    return size.subs(dict.fromkeys(size.free_symbols, batch)) if isinstance(size, sympy.Expr) else size


def _fixed(size: Any) -> bool:
    return isinstance(size, int)


@dataclass(frozen=True)
class Goal:
    """Mean and standard deviation of a layer's output channels over the data: float64 tensors (edges, channels)."""

    mean: Tensor
    std: Tensor


class Facts:
    """What analyses found in one graph, for all Programs that hold it; copies and pickles start anew."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self._found: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def once(self, name: str, make: Callable[[], T], *read: Any) -> T:
        """``make()``, or what it gave last for the same name and the same objects ``read`` beside the graph."""
        cached = self._found.get(name)
        if cached is None or len(cached[0]) != len(read) or any(a is not b for a, b in zip(cached[0], read)):
            cached = self._found[name] = (read, make())
        return cached[1]

    def __reduce__(self) -> tuple[type[Facts], tuple[fx.Graph]]:
        return Facts, (self.graph,)


@dataclass(frozen=True)
class Program:
    """A captured network: graph, weight sets by FQN, example inputs and the passes it went through.

    ``example_inputs`` holds one tensor for each placeholder, ``signature`` how forward's arguments become those.
    ``weights[i]`` holds every tensor that edge i's graph reads, complex parameters by their parts
    (``vfx.complex_numbers``). ``aliases`` maps the other names of a shared tensor to the one the graph uses.
    ``module`` is the user's model (edge 0), kept to write results back into its class.
    ``private`` names tensors that belong to one edge's branch and are never interpolated. ``goals`` holds the edges'
    statistics of each layer's output, in the channel order of their weights. ``notes`` is what passes refused, and why.
    ``layers`` keeps the numbering of a network whose branches were duplicated. ``transport`` holds linear maps that are
    still to be put into the edges' weights (``vfx.elements.action.Pending``). ``outputs`` names those of the model's
    outputs that the graph returns, () all. ``facts`` holds what analyses found in the graph.
    """

    graph: fx.Graph
    weights: tuple[Weights, ...]
    example_inputs: tuple[Any, ...]
    signature: Signature
    module: nn.Module | None = None
    buffers: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    private: frozenset[str] = frozenset()
    goals: Mapping[str, Goal] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layers: tuple[Any, ...] = ()
    transport: Any = None
    history: tuple[str, ...] = ()
    origin: str = ""
    outputs: tuple[int | str, ...] = ()
    facts: Facts = field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.facts is None or self.facts.graph is not self.graph:
            object.__setattr__(self, "facts", Facts(self.graph))

    @property
    def structural(self) -> bool:
        """Whether the graph differs from the one that was captured from the user's class."""
        return self.facts.once("digest", lambda: digest(self.graph)) != self.origin

    @property
    def plan(self) -> list[Step]:
        """The nodes that compute something, in order; see ``schedule``."""
        return self.facts.once("schedule", lambda: schedule(self.graph))

    @property
    def resized(self) -> bool:
        """Whether layers of the captured graph have other sizes since."""
        return self.origin == RESIZED

    def __call__(self, *inputs: Any, edge: int = 0, **named: Any) -> Any:
        """Run the network of one edge; inputs as for the user's ``forward``, or one tensor for each placeholder."""
        return Execution(self.graph, self.weights[edge], self.flatten(inputs, named), self.plan).finish()

    def flatten(self, inputs: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> list[Any]:
        """One tensor for each placeholder. Raises ArgumentError if the inputs are not those of the capture."""
        if not named and len(inputs) == len(self.placeholders) and all(isinstance(x, Tensor) for x in inputs):
            return list(inputs)
        return self.signature.flatten(inputs, named or {})

    def returned(self, output: Any) -> Any:
        """What the user's class returns, reduced to the outputs that the graph returns."""
        return selected(plain(output), self.outputs)[0] if self.outputs else output

    @property
    def example_call(self) -> Call:
        """The example inputs as the user's ``forward`` takes them."""
        return self.signature.call(self.example_inputs)

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @cached_property
    def batch_axes(self) -> tuple[int | None, ...]:
        """The axis of each placeholder on which samples stand: the first that is dynamic, and those of its size.

        Where none is, the first axes of one size.
        """
        shapes = [node.meta["val"].shape for node in self.placeholders]
        dynamic = [(i, d) for i, shape in enumerate(shapes) for d, size in enumerate(shape) if not _fixed(size)]
        if not dynamic:
            return tuple(0 if batched else None for batched in has_batch(self.example_inputs))
        samples = self.example_inputs[dynamic[0][0]].shape[dynamic[0][1]]
        return tuple(
            next((d for d, size in enumerate(shape) if not _fixed(size) and x.shape[d] == samples), None)
            for shape, x in zip(shapes, self.example_inputs)
        )

    def batch_of(self, inputs: Sequence[Any]) -> int:
        """How many samples some inputs hold, one tensor for each placeholder; 1 where none holds any."""
        return next((int(x.shape[d]) for d, x in zip(self.batch_axes, inputs) if d is not None), 1)

    def with_samples(self, most: int) -> Program:
        """The same Program with example inputs of at most ``most`` samples, where the batch is all that may vary."""
        shapes = [node.meta["val"].shape for node in self.placeholders]
        symbols = {size for shape in shapes for size in shape if not isinstance(size, int)}
        count = self.batch_of(self.example_inputs)
        if len(symbols) != 1 or not isinstance(symbols.pop(), sympy.Symbol) or count <= most:
            return self
        inputs = list(self.example_inputs)
        for k, shape in enumerate(shapes):
            for dim, size in enumerate(shape):
                inputs[k] = inputs[k] if isinstance(size, int) else inputs[k].narrow(dim, 0, most)
        return replace(self, example_inputs=tuple(inputs))

    @property
    def edges(self) -> int:
        """Number of weight sets."""
        return len(self.weights)

    def read_before(self, rest: Sequence[Step], names: Iterable[str]) -> bool:
        """Whether a call that is not in the ``rest`` of the plan reads one of these tensors."""
        behind, readers = {step.node for step in rest}, readers_of(self.graph)
        return any(node not in behind for name in names for node in readers.get(name, ()))

    def names(self) -> list[str]:
        """FQNs read by the graph, in order of first use."""
        return list(dict.fromkeys(node.target for node in self.graph.nodes if node.op == "get_attr"))

    def is_parameter(self, name: str) -> bool:
        """Whether a tensor is trained: floating and no buffer or constant (a complex one is held by its real parts)."""
        return name not in self.buffers and self.weights[0][name].is_floating_point()

    @cached_property
    def masks(self) -> frozenset[str]:
        """Buffers, constants and frozen masks that no norm reads as its statistics; they may hold infinities."""
        norms = [arguments(node) for node in self.graph.nodes if operator_of(node).is_norm]
        read = (a.get(name) for a in norms for name in ("running_mean", "running_var"))
        statistics = {str(value.target) for value in read if isinstance(value, fx.Node)}
        return (self.buffers & self.weights[0].keys()) - statistics

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The graph's nodes by name."""
        return {node.name: node for node in self.graph.nodes}

    def node(self, name: str) -> fx.Node:
        """The graph node called ``name``."""
        if name not in self.nodes:
            raise ArgumentError(f"the graph has no node {name!r}")
        return self.nodes[name]

    def with_weights(self, weights: Iterable[Weights], note: str | None = None) -> Program:
        """The same graph with other weight sets."""
        history = (*self.history, note) if note else self.history
        return replace(self, weights=tuple(weights), history=history)

    def with_notes(self, notes: Iterable[str]) -> Program:
        """The same Program with more notes on what was refused or left alone."""
        return replace(self, notes=(*self.notes, *notes))

    def with_graph(self, graph: fx.Graph, weights: Iterable[Weights], note: str, **changes: Any) -> Program:
        """A rewritten graph and its weight sets."""
        return replace(self, graph=graph, weights=tuple(weights), history=(*self.history, note), **changes)

    def rewritten(self, graph: fx.Graph, weights: Iterable[Weights], note: str, **changes: Any) -> Program:
        """As ``with_graph``, without the calls whose results, and the tensors that, nothing reads any more."""
        graph.eliminate_dead_code()
        graph.lint()
        gone = set(self.names()) - {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        kept = ({name: tensor for name, tensor in tensors.items() if name not in gone} for tensors in weights)
        return self.with_graph(graph, kept, note, **changes)

    def select(self, edge: int) -> Program:
        """The Program of one edge alone."""
        return replace(self, weights=(self.weights[edge],))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Program:
        """Every weight set and the example inputs on another device, or in another floating dtype.

        Casts that the graph holds (a norm computed in float32) go to that dtype as well.
        """
        move: Callable[[Any], Any] = lambda value: moved(value, device, dtype)  # noqa: E731
        weights = tuple({name: move(tensor) for name, tensor in tensors.items()} for tensors in self.weights)
        graph = self.graph if dtype is None else in_precision(self.graph, dtype)
        origin = self.origin if self.structural else digest(graph)
        inputs = tuple(move(x) for x in self.example_inputs)
        return replace(self, graph=graph, origin=origin, weights=weights, example_inputs=inputs)


def readers_of(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The calls that read each tensor, by its FQN."""
    readers: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    return readers


def digest(graph: fx.Graph) -> str:
    """A fingerprint of a graph: operators, arguments and node names."""
    return hashlib.blake2b(str(graph).encode(), digest_size=16).hexdigest()


def in_precision(graph: fx.Graph, dtype: torch.dtype) -> fx.Graph:
    """The graph with its floating and complex casts to ``dtype``; the same object where there are none."""

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.dtype):
            return value
        return dtype if value.is_floating_point else complex_of(dtype) if value.is_complex else value

    if all(cast(value) is value for value in _literals(graph)):
        return graph
    changed, _ = copy_graph(graph)
    for node in changed.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), cast)
    return changed


def casts(graph: fx.Graph) -> bool:
    """Whether the graph names a floating or complex dtype of its own."""
    inexact = lambda value: value.is_floating_point or value.is_complex  # noqa: E731
    return any(isinstance(value, torch.dtype) and inexact(value) for value in _literals(graph))


def _literals(graph: fx.Graph) -> list[Any]:
    return [value for node in graph.nodes for value in (*node.args, *node.kwargs.values())]


def moved(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """A tensor on ``device``, cast to ``dtype`` if floating, to the complex one if complex; anything else unchanged."""
    if not isinstance(value, Tensor):
        return value
    if value.is_complex():
        return value.to(device=device, dtype=complex_of(dtype))
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def complex_of(dtype: torch.dtype | None) -> torch.dtype | None:
    """The complex dtype whose parts have a floating one; single precision for half."""
    return None if dtype is None else torch.complex128 if dtype == torch.float64 else torch.complex64


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy with its own nodes (names and metadata kept), and the map from old nodes to new ones."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copy_node(new, node, mapping)
    return new, mapping


def copy_node(graph: fx.Graph, node: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """``node`` appended to ``graph`` under its own name, its arguments looked up in ``mapping``."""
    new = graph.node_copy(node, lambda argument: mapping[argument])
    new.name = node.name
    new.meta = dict(node.meta)
    return new


def run(graph: fx.Graph, weights: Weights, inputs: list[Any]) -> Any:
    """Evaluate ``graph``; each value is freed after its last use."""
    return Execution(graph, weights, inputs).finish()


class Execution:
    """A forward pass that can stop behind any node and go on later, with other weights if need be."""

    def __init__(self, graph: fx.Graph, weights: Weights, inputs: list[Any], plan: list[Step] | None = None):
        self.plan = plan if plan is not None else schedule(graph)
        self.weights = weights
        self.values: dict[fx.Node, Any] = {}
        self.position = 0
        self.result: Any = None
        self._inputs = list(inputs)  # each is let go when it has been read

    def step(self) -> tuple[fx.Node, Any]:
        """Run the next node and free what nobody reads any more."""
        node, dying, in_place = self.plan[self.position]
        value = self._evaluate(node, None if torch.is_grad_enabled() else in_place)
        self.values[node] = value
        for dead in dying:
            del self.values[dead]
        self.position += 1
        return node, value

    def fork(self, plan: list[Step]) -> Execution:
        """A copy that goes on by itself, along a plan that writes into none of the values it shares with this one."""
        twin = copy.copy(self)
        twin.plan, twin.values, twin._inputs = plan, dict(self.values), list(self._inputs)
        return twin

    def finish(self) -> Any:
        """Run to the end and return the network's output."""
        while self.position < len(self.plan):
            self.step()
        return self.result

    def value(self, node: fx.Node) -> Any:
        """A live value; weights are looked up when they are read, so a change between two steps takes effect."""
        return self.weights[str(node.target)] if node.op == "get_attr" else self.values[node]

    def _evaluate(self, node: fx.Node, in_place: Any) -> Any:
        if node.op == "placeholder":
            return self._inputs.pop(0)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        if node.op == "output":
            self.result = args[0]
            return None
        return runnable(in_place or node.target, args)(*args, **kwargs)


def runnable(target: Any, args: Sequence[Any]) -> Callable[..., Any]:
    """An operator, or what stands for it in float64 where its kernel takes none."""
    in_double = entry_of(target).in_double
    exact = in_double is not None and any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
    return in_double if exact else target  # type: ignore[return-value]


class Step(NamedTuple):
    """A node to run, the values that die behind it, and its in-place form where the first of them may be written to."""

    node: fx.Node
    dying: tuple[fx.Node, ...]
    in_place: Any


def schedule(graph: fx.Graph) -> list[Step]:
    """The nodes that compute something in order, each with the values that die behind it."""
    last: dict[fx.Node, fx.Node] = {}
    computed = [node for node in graph.nodes if node.op != "get_attr"]
    for node in computed:
        last[node] = node
        for argument in node.all_input_nodes:
            if argument.op != "get_attr":
                last[argument] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        dying.setdefault(reader, []).append(value)
    return [Step(node, tuple(dying.get(node, ())), _in_place(node)) for node in computed]


def _in_place(node: fx.Node) -> Any:
    """The in-place form of an elementwise node whose operand is a fresh tensor that nothing else reads.

    Large fresh tensors cost page faults: ResNets spend a tenth of their time on them.
    """
    operand = node.args[0] if node.args else None
    if not operator_of(node).runs_in_place or not isinstance(operand, fx.Node) or not _is_fresh(operand):
        return None
    same = operand.meta.get("val") == node.meta.get("val") is not None
    return in_place(node.target) if same and list(operand.users) == [node] else None


def _is_fresh(node: fx.Node) -> bool:
    """Whether a call never returns a view of what it reads."""
    entry = operator_of(node)
    return (entry.is_layer or entry.is_norm or entry.runs_in_place) and not is_in_place(node)
