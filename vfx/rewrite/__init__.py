"""What passes share: their contract, parts of a graph that are kept for each edge, layers that get a bias."""

from vfx.rewrite.contract import Pass, PassResult

__all__ = ["Pass", "PassResult"]
