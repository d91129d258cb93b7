"""The command line: the names and options of the Python API."""

from vfx.cli import comparing, diagnosing, inspecting, merging, pruning
from vfx.cli.app import app, main

__all__ = ["app", "comparing", "diagnosing", "inspecting", "main", "merging", "pruning"]
