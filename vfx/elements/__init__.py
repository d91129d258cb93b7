"""Elements: what the channels of groups go through, and the one action that does it to weights and activations."""

from vfx.elements.action import Acting, OnAxis, Pending, act, act_on, order_on
from vfx.elements.composition import compose, inverse
from vfx.elements.element import (
    Element,
    Elements,
    behind_exact,
    check_classes,
    check_elements,
    exact_part,
    identity,
    permutations_of,
    permuted,
    random_element,
    undone,
)
from vfx.elements.permutations import (
    Permutations,
    compose_permutations,
    inverse_permutations,
    random_permutations,
    still_permutations,
)

__all__ = [
    "Acting",
    "Element",
    "Elements",
    "OnAxis",
    "Pending",
    "Permutations",
    "act",
    "act_on",
    "behind_exact",
    "check_classes",
    "check_elements",
    "compose",
    "compose_permutations",
    "exact_part",
    "identity",
    "inverse",
    "inverse_permutations",
    "order_on",
    "permutations_of",
    "permuted",
    "random_element",
    "random_permutations",
    "still_permutations",
    "undone",
]
