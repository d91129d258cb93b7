"""The command line: the names and options of the Python API."""

from vfx.cli import comparing, diagnosing, inspecting, merging, pruning, running
from vfx.cli.app import app, main

__all__ = ["app", "comparing", "diagnosing", "inspecting", "main", "merging", "pruning", "running"]
