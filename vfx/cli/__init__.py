"""The command line: the names and options of the Python API."""

from vfx.cli import diagnosing, inspecting, merging, pruning
from vfx.cli.app import app, main

__all__ = ["app", "diagnosing", "inspecting", "main", "merging", "pruning"]
