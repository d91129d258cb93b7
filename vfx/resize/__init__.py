"""Programs resized along their symmetry groups: ``slots`` (what must be kept together), ``layout`` (where each position
comes from), ``operators`` (sizes in arguments), ``weights`` (tensors), ``program`` (all of it)."""

from __future__ import annotations

from vfx.resize.program import Resized, resize
from vfx.resize.slots import Bundle, RemovalUnits

__all__ = ["Bundle", "RemovalUnits", "Resized", "resize"]
