"""Contexts that torch.export keeps as nested graphs (no_grad, autocast, checkpoint) and that change no value."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch._ops import HigherOrderOperator

from vfx.errors import CaptureError

_AUTOCAST = "wrap_with_autocast"
CONTEXTS = {_AUTOCAST, "wrap_with_set_grad_enabled", "wrap", "tag_activation_checkpoint", "wrap_activation_checkpoint"}


def is_context(node: fx.Node) -> bool:
    """Whether a call runs a nested graph as it stands."""
    return isinstance(node.target, HigherOrderOperator) and node.target.name() in CONTEXTS


def body_of(node: fx.Node, owner: nn.Module) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The nested graph of a context, and the values its placeholders get.

    Raises CaptureError for autocast that is switched on: it changes the precision behind the graph's back.
    """
    if node.target.name() == _AUTOCAST and node.args[2]:  # type: ignore[union-attr]
        raise CaptureError(
            f"node {node.name} runs under torch.autocast({node.args[0]!r}, {node.args[1]}); remove the context from "
            "forward(), or cast the model with .to(dtype) before capture"
        )
    at = next(index for index, value in enumerate(node.args) if isinstance(value, fx.Node) and value.op == "get_attr")
    return owner.get_submodule(str(node.args[at].target)), node.args[at + 1 :]  # type: ignore[union-attr,return-value]
