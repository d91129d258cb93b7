"""What vfx knows of an operator: one entry each, made of words that the analyses give a meaning.

An entry holds no code of an analysis. Its first five facts are *kinds*: ``ties`` names a rule of ``vfx.analyse.rules``,
``classes`` a handler of ``vfx.analyse.action``, ``space`` an index space of ``vfx.analyse.rules.spaces``, ``resize`` a
rewrite of ``vfx.resize.operators`` and ``cost`` a count of ``vfx.analyse.cost``. So a second operator of a known kind
is one more name in a family's file, and nothing else. UNKNOWN says that a fact is not known: the analysis then does the
careful thing (pins, lets permutations pass and no more, looks for no blocks, names the operator beside a total).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

UNKNOWN = ""
OPERANDS = "operands"  # resize: no argument names a size, a position or a number of groups
PERMUTATION = "permutation"  # classes: the operator lets permutations pass and no more


@dataclass(frozen=True, eq=False, kw_only=True)
class Operator:
    """One operator under all its names: the first is what it is called, the others are aliases.

    ``ties``: how axes of operands and result hang together. ``classes``: which maps of channels it lets pass.
    ``space``: its dimensions and which of them it couples. ``resize``: which of its arguments follow the sizes.
    ``cost``: how its operations are counted. The details are read by some of these kinds, the questions by
    everybody else.

    Example: ``Operator(names=("aten.tanh",), ties="elementwise", classes="odd", space="elementwise",
    resize=OPERANDS, cost="activation")``.
    """

    names: tuple[str, ...]
    ties: str
    classes: str
    space: str
    resize: str
    cost: str

    # details of a kind
    roles: Mapping[str, str] = field(default_factory=dict)  # a product's arguments: "input", "weight" and "bias"
    spatial: int = 0  # axes that a window moves along
    rank: int = 0  # axes that its result has at least
    gates: int = 0  # rows of a recurrent weight for each feature
    exponent: Fraction | None = None  # of a power; of the second factor of a product
    fills: float | None = None  # the value of a tensor made in the likeness of another
    least: str = ""  # how many positions it needs: "two" of a deviation, "k" of its argument
    norm: str = ""  # "batch", "layer", "rms", "group" or "instance": a norm that returns its result alone
    layer: str = ""  # "convolution", "transposed" or "linear": a layer whose weight is an argument of its own
    module: str = ""  # the class of torch.nn whose call it is; without the rank, where classes have one ("Conv")
    in_double: Callable[..., Any] | None = None  # what proofs run where the kernel takes no double precision

    # questions
    moves: bool = False  # values stay as they are and go elsewhere
    keeps_parts: bool = False  # it does the same at every position of an axis that it does not cut
    reads_all: bool = False  # it sees several positions at once and does not pass over zeros
    contracts: bool = False  # it sums products of its operands
    multiplies: bool = False  # a product of two matrices, or of batches of them, plus a summand or none
    batched: bool = False  # such a product over a batch
    is_add: bool = False  # a + b
    is_affine: bool = False  # sums, products and quotients, entry by entry
    is_additive: bool = False  # a parameter that it reads has the channels of its result and no more
    is_cast: bool = False  # the same values in another floating type
    is_copy: bool = False  # the same values
    is_pool: bool = False  # one value for each window of each channel
    is_magnitude: bool = False  # grows with |x| whatever its sign
    averages: bool = False  # a mean of positions, or of all of them in a window
    divides_by_count: bool = False  # what it gives depends on how many positions it is taken over
    gives_positions: bool = False  # its only result says where values stand
    hands_on: bool = False  # it makes no features: those of its operand are seen through it
    interpolates: bool = False  # values between positions; ``output_size`` names how many
    runs_in_place: bool = False  # its result may be written over its first operand
    may_return_input: bool = False  # its result may be its operand itself, though the schema does not say so
    is_input: bool = False  # its result is its operand itself
    asserts: bool = False  # it checks its operand and computes nothing
    linear_time: bool = False  # work in proportion to what it reads and writes

    @property
    def name(self) -> str:
        """What the operator is called."""
        return self.names[0]

    @property
    def is_known(self) -> bool:
        """Whether there is a rule for the axes of its operands."""
        return self.ties != UNKNOWN

    @property
    def is_convolution(self) -> bool:
        """A convolution that is not written as a transposed one (``aten.convolution`` may be one by its argument)."""
        return self.layer == "convolution"

    @property
    def is_transposed(self) -> bool:
        return self.layer == "transposed"

    @property
    def is_convolving(self) -> bool:
        return self.is_convolution or self.is_transposed

    @property
    def is_linear(self) -> bool:
        return self.layer == "linear"

    @property
    def is_layer(self) -> bool:
        """A convolution or linear call; whether a product is a layer depends on its operands."""
        return self.layer != ""

    @property
    def is_norm(self) -> bool:
        return self.norm != ""

    @property
    def is_batch_norm(self) -> bool:
        return self.norm == "batch"

    @property
    def is_vector_norm(self) -> bool:
        """A norm over the last axes, with a gain for each position there."""
        return self.norm in ("layer", "rms")

    @property
    def is_dropout(self) -> bool:
        return "Dropout" in self.module

    @property
    def is_identity(self) -> bool:
        """Whether it gives what it reads, in evaluation."""
        return self.is_copy or self.is_dropout

    @property
    def is_attention(self) -> bool:
        return self.ties in ("attention", "fused attention")

    @property
    def is_elementwise(self) -> bool:
        return self.ties == "elementwise"

    @property
    def is_harmless(self) -> bool:
        """Arithmetic on sizes, and values read out of a tensor: no axis is part of the result."""
        return self.ties in ("sizes", "number")

    @property
    def is_reshape(self) -> bool:
        """A view whose sizes are written as numbers."""
        return self.resize == "view"

    @property
    def adds_summand(self) -> bool:
        """A product of matrices to which a third operand is added."""
        return self.multiplies and "bias" in self.roles


def each(names: str, prefix: str = "aten.", **facts: Any) -> tuple[Operator, ...]:
    """Operators that differ in their names alone; an operator's aliases stand behind it: ``"neg/negative abs"``."""
    entries = (tuple(prefix + name for name in entry.split("/")) for entry in names.split())
    return tuple(Operator(names=entry, **facts) for entry in entries)


def unknown(name: str) -> Operator:
    """An operator that the registry does not have."""
    return Operator(names=(name,), ties=UNKNOWN, classes=UNKNOWN, space=UNKNOWN, resize=UNKNOWN, cost=UNKNOWN)
