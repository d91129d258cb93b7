"""``python -m vfx``: the command line."""

from vfx.cli import main

main()
