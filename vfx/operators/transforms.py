"""Transforms along positions, and what sees them in other ways: Fourier, segments, grids, quantiles, trapezoids."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_fact = partial(each, classes=PERMUTATION, resize=OPERANDS)
_fourier = partial(_fact, ties="spectrum", space="along", cost=UNKNOWN)
_shift = partial(_fact, ties="spectrum", space="along", cost="free")
_frequencies = partial(_fact, ties="ordered", space="nothing", cost="view")
_pinned = partial(_fact, ties="pinned", space="nothing", cost="free")

OPERATORS = (
    *_fourier("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"),
    *_fourier("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2"),
    *_fourier("fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn"),
    *_shift("fft_fftshift fft_ifftshift"),
    *_frequencies("fft_fftfreq fft_rfftfreq"),
    *_fact("stft istft", ties="pinned", space="nothing", cost=UNKNOWN),
    *_pinned("segment_reduce affine_grid_generator quantile nanquantile trapezoid/trapz cumulative_trapezoid"),
    *_pinned("isin frexp bincount diagonal_scatter as_strided diagflat vander linalg_vander"),
    *_fact("unique_consecutive unique_dim", ties="data dependent", space="nothing", cost="free"),
)
