"""``python -m vfx.emit.aoti_run PACKAGE INPUTS OUTPUTS``: run a compiled network, in a process that may die of it."""

from __future__ import annotations

import sys

import torch

from vfx.capture.outputs import named_tensors


def main(package: str, inputs: str, outputs: str) -> None:
    """Write what the package gives for each call in the file ``inputs`` to the file ``outputs``."""
    network = torch._inductor.aoti_load_package(package)
    calls = torch.load(inputs, weights_only=True)
    results = [list(named_tensors(network(*args, **kwargs)).values()) for args, kwargs in calls]
    torch.save(results, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
