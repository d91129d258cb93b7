"""vfx: a graph-rewriting compiler over torch.fx that merges trained networks without retraining.

trace → analyse → match → passes → emit; ``vfx.merge`` does it in one call. Everything is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    **dict.fromkeys(
        [
            "Result",
            "collect",
            "compare",
            "compile",
            "layers",
            "merge",
            "profile",
            "prune",
            "prune_structured",
            "record",
            "recorded",
            "repair",
            "symmetry",
            "trace",
        ],
        "vfx.api",
    ),
    **dict.fromkeys(["export", "load"], "vfx.emit.files"),
    **dict.fromkeys(["from_pretrained", "save_pretrained"], "vfx.emit.pretrained"),
    "diagnose": "vfx.diagnosis.diagnose",
    "barrier": "vfx.diagnosis.barrier",
    "evaluate": "vfx.diagnosis.evaluation",
    **dict.fromkeys(["Selection", "select"], "vfx.diagnosis.select"),
    "Program": "vfx.program",
    "Pass": "vfx.rewrite",
    "Matcher": "vfx.match.matcher",
    "Matching": "vfx.match.matcher",
    "Problem": "vfx.match.matcher",
    "WeightMatching": "vfx.match.weight",
    "ActivationMatching": "vfx.match.activation",
    "C2M3": "vfx.match.c2m3",
    "IteratedMatching": "vfx.match.iterated",
    "StraightThrough": "vfx.match.straight_through",
    "LinearMatching": "vfx.match.linear",
    "ZipIt": "vfx.match.zipit",
    "CCAMerging": "vfx.match.cca",
    "Score": "vfx.pruning.scores.score",
    "ScoreOnce": "vfx.pruning.scores.once",
    "Magnitude": "vfx.pruning.scores.magnitude",
    "Random": "vfx.pruning.scores.random",
    "DiagonalFisher": "vfx.pruning.scores.fisher",
    "WoodFisher": "vfx.pruning.scores.woodfisher",
    "Wanda": "vfx.pruning.scores.wanda",
    "GradientWeight": "vfx.pruning.scores.gradient",
    "SparseGPT": "vfx.pruning.scores.sparsegpt",
    "ALPS": "vfx.pruning.scores.alps",
    "make_permanent": "vfx.pruning.masks",
    "PartialMatching": "vfx.match.partial",
    "OptimalTransport": "vfx.match.transport",
    "FirstLayers": "vfx.match.first_layers",
    "Normalization": "vfx.normalize.catalogue",
    "Align": "vfx.passes.align",
    "BalanceAttention": "vfx.passes.balance_attention",
    "BalanceScales": "vfx.passes.balance_scales",
    "CalibrateBias": "vfx.passes.calibrate_bias",
    "CalibrateNormalization": "vfx.passes.calibrate_normalization",
    "CenterStream": "vfx.passes.center_stream",
    "DuplicateBranches": "vfx.passes.duplicate_branches",
    "DuplicateHeads": "vfx.passes.duplicate_heads",
    "FoldChannels": "vfx.passes.fold_channels",
    "FoldGain": "vfx.passes.fold_gain",
    "FoldNormalization": "vfx.passes.fold_normalization",
    "InsertNormalization": "vfx.passes.insert_normalization",
    "Interpolate": "vfx.passes.interpolate",
    "MaskWeights": "vfx.passes.mask_weights",
    "Reconstruct": "vfx.passes.reconstruct",
    "Reference": "vfx.reconstruct.references",
    "RemoveBias": "vfx.passes.remove_bias",
    "RemoveChannels": "vfx.passes.remove_channels",
    "RescaleWeights": "vfx.passes.rescale_weights",
    "ResetBatchNorm": "vfx.passes.reset_batchnorm",
    "RestoreStructure": "vfx.passes.restore_structure",
    "Transform": "vfx.passes.transform",
    "UntieWeights": "vfx.passes.untie_weights",
    "UseBatchStatistics": "vfx.passes.use_batch_statistics",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vfx' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
