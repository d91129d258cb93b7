"""Windows over positions: pools, interpolation, sampling, patches written out."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, Operator, each

_window = partial(each, ties="windows", space="windows", resize=OPERANDS, cost="free")
_average = partial(_window, classes="average windows")
_extreme = partial(_window, classes="extreme windows")


def _pools(rank: int) -> tuple[Operator, ...]:
    return (
        *_extreme(f"max_pool{rank}d", spatial=rank, cost="max pool", is_pool=True, hands_on=True),
        *_extreme(f"max_pool{rank}d_with_indices", spatial=rank, cost="max pool"),
        *_average(f"avg_pool{rank}d", spatial=rank, cost="average pool", is_pool=True, hands_on=True),
        *_average(f"adaptive_avg_pool{rank}d", spatial=rank, is_pool=True, hands_on=True, averages=True),
        *_extreme(f"adaptive_max_pool{rank}d", spatial=rank, is_pool=True),
    )


def _interpolations(rank: int, smooth: str, aliased: str = "") -> tuple[Operator, ...]:
    return (
        *_average(f"upsample_nearest{rank}d {smooth}", spatial=rank, interpolates=True),
        *_average(f"_upsample_nearest_exact{rank}d {aliased}", spatial=rank),
    )


OPERATORS = (
    *_pools(1),
    *_pools(2),
    *_pools(3),
    *_average("_adaptive_avg_pool2d", spatial=2),
    *_average("_adaptive_avg_pool3d", spatial=3),
    *_interpolations(1, "upsample_linear1d"),
    *_interpolations(2, "upsample_bilinear2d upsample_bicubic2d", "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    *_interpolations(3, "upsample_trilinear3d"),
    *each(
        "grid_sampler grid_sampler_2d grid_sampler_3d",
        ties="sampled",
        classes="sampled",
        space=UNKNOWN,
        resize=OPERANDS,
        cost="free",
    ),
    *each("im2col", ties="columns", classes="one kind", space=UNKNOWN, resize=OPERANDS, cost="free"),
    *each("max_unpool2d", ties="unpooled", classes=PERMUTATION, space=UNKNOWN, resize=OPERANDS, cost="free", spatial=2),
    *each("max_unpool3d", ties="unpooled", classes=PERMUTATION, space=UNKNOWN, resize=OPERANDS, cost="free", spatial=3),
    *each(
        "fractional_max_pool2d fractional_max_pool3d",
        ties="pinned",
        classes=PERMUTATION,
        space="nothing",
        resize=OPERANDS,
        cost="free",
    ),
    *each("col2im", ties="image", classes=PERMUTATION, space=UNKNOWN, resize=OPERANDS, cost="free"),
    *each("unfold", ties="unfolded", classes=PERMUTATION, space=UNKNOWN, resize=OPERANDS, cost="view"),
)
