"""vfx: a graph-rewriting compiler over torch.fx that merges trained networks without retraining.

trace → analyse → match → passes → emit; ``vfx.merge`` does it in one call. Everything is imported on first use.
"""

from __future__ import annotations

import ast
import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees; `_origins` reads the same lines
    from vfx.analyse.drawing import draw as draw
    from vfx.analyse.verify import verify as verify
    from vfx.api import Result as Result
    from vfx.api import WidthFamily as WidthFamily
    from vfx.api import collect as collect
    from vfx.api import compare as compare
    from vfx.api import compile as compile
    from vfx.api import layers as layers
    from vfx.api import merge as merge
    from vfx.api import profile as profile
    from vfx.api import prune as prune
    from vfx.api import prune_structured as prune_structured
    from vfx.api import record as record
    from vfx.api import recorded as recorded
    from vfx.api import repair as repair
    from vfx.api import symmetry as symmetry
    from vfx.api import trace as trace
    from vfx.api import transfer as transfer
    from vfx.combine.combiner import Combiner as Combiner
    from vfx.combine.dare import Dare as Dare
    from vfx.combine.iso import IsoC as IsoC
    from vfx.combine.own_outputs import OwnOutputs as OwnOutputs
    from vfx.combine.regmean import RegMean as RegMean
    from vfx.combine.regmean_plus import RegMeanPlus as RegMeanPlus
    from vfx.combine.task_arithmetic import TaskArithmetic as TaskArithmetic
    from vfx.combine.ties import Ties as Ties
    from vfx.diagnosis.barrier import barrier as barrier
    from vfx.diagnosis.diagnose import diagnose as diagnose
    from vfx.diagnosis.evaluation import evaluate as evaluate
    from vfx.diagnosis.select import SampleSelection as SampleSelection
    from vfx.diagnosis.select import select as select
    from vfx.emit.files import export as export
    from vfx.emit.files import load as load
    from vfx.emit.pretrained import from_pretrained as from_pretrained
    from vfx.emit.pretrained import save_pretrained as save_pretrained
    from vfx.match.activation import ActivationMatching as ActivationMatching
    from vfx.match.c2m3 import C2M3 as C2M3
    from vfx.match.cca import CCAMerging as CCAMerging
    from vfx.match.first_layers import FirstLayers as FirstLayers
    from vfx.match.iterated import IteratedMatching as IteratedMatching
    from vfx.match.learned import LearnedMatching as LearnedMatching
    from vfx.match.linear import LinearMatching as LinearMatching
    from vfx.match.matcher import Matcher as Matcher
    from vfx.match.matcher import Matching as Matching
    from vfx.match.matcher import Problem as Problem
    from vfx.match.partial import PartialMatching as PartialMatching
    from vfx.match.straight_through import StraightThrough as StraightThrough
    from vfx.match.transport import OptimalTransport as OptimalTransport
    from vfx.match.weight import WeightMatching as WeightMatching
    from vfx.match.zipit import ZipIt as ZipIt
    from vfx.normalize.catalogue import Normalization as Normalization
    from vfx.passes.align import Align as Align
    from vfx.passes.balance_attention import BalanceAttention as BalanceAttention
    from vfx.passes.balance_scales import BalanceScales as BalanceScales
    from vfx.passes.calibrate_bias import CalibrateBias as CalibrateBias
    from vfx.passes.calibrate_normalization import CalibrateNormalization as CalibrateNormalization
    from vfx.passes.center_stream import CenterStream as CenterStream
    from vfx.passes.combine import Combine as Combine
    from vfx.passes.duplicate_branches import DuplicateBranches as DuplicateBranches
    from vfx.passes.duplicate_heads import DuplicateHeads as DuplicateHeads
    from vfx.passes.fold_channels import FoldChannels as FoldChannels
    from vfx.passes.fold_gain import FoldGain as FoldGain
    from vfx.passes.fold_normalization import FoldNormalization as FoldNormalization
    from vfx.passes.insert_normalization import InsertNormalization as InsertNormalization
    from vfx.passes.interpolate import Interpolate as Interpolate
    from vfx.passes.mask_weights import MaskWeights as MaskWeights
    from vfx.passes.principal_basis import PrincipalBasis as PrincipalBasis
    from vfx.passes.reconstruct import Reconstruct as Reconstruct
    from vfx.passes.remove_bias import RemoveBias as RemoveBias
    from vfx.passes.remove_blocks import RemoveBlocks as RemoveBlocks
    from vfx.passes.remove_channels import RemoveChannels as RemoveChannels
    from vfx.passes.rescale_weights import RescaleWeights as RescaleWeights
    from vfx.passes.reset_batchnorm import ResetBatchNorm as ResetBatchNorm
    from vfx.passes.restore_structure import RestoreStructure as RestoreStructure
    from vfx.passes.to_first_width import ToFirstWidth as ToFirstWidth
    from vfx.passes.transform import Transform as Transform
    from vfx.passes.untie_weights import UntieWeights as UntieWeights
    from vfx.passes.use_batch_statistics import UseBatchStatistics as UseBatchStatistics
    from vfx.processes import across_processes as across_processes
    from vfx.program import Program as Program
    from vfx.pruning.allocation.allocation import Allocation as Allocation
    from vfx.pruning.allocation.depth import Progressive as Progressive
    from vfx.pruning.allocation.outliers import Outliers as Outliers
    from vfx.pruning.masks import make_permanent as make_permanent
    from vfx.pruning.scores.alps import ALPS as ALPS
    from vfx.pruning.scores.fisher import DiagonalFisher as DiagonalFisher
    from vfx.pruning.scores.gradient import GradientWeight as GradientWeight
    from vfx.pruning.scores.magnitude import Magnitude as Magnitude
    from vfx.pruning.scores.mixed import Mixed as Mixed
    from vfx.pruning.scores.once import ScoreOnce as ScoreOnce
    from vfx.pruning.scores.random import Random as Random
    from vfx.pruning.scores.score import Score as Score
    from vfx.pruning.scores.sparsegpt import SparseGPT as SparseGPT
    from vfx.pruning.scores.wanda import Wanda as Wanda
    from vfx.pruning.scores.woodfisher import WoodFisher as WoodFisher
    from vfx.reconstruct.references import Reference as Reference
    from vfx.rewrite import Pass as Pass

__version__ = "0.1.0"


def _origins() -> dict[str, str]:
    """The module of each public name, read from the imports above."""
    source = pkgutil.get_data(__name__, "__init__.py")  # from a wheel on the path as well
    tree = ast.parse(source or b"")
    (block,) = (statement for statement in tree.body if isinstance(statement, ast.If))
    imports = [statement for statement in block.body if isinstance(statement, ast.ImportFrom)]
    return {name.name: str(statement.module) for statement in imports for name in statement.names}


_LAZY = _origins()
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
