"""The catalogue: one line for each ATen operator, with its rule and the maps it commutes with.

Three lists, never mixed: TABLE (handled), HARMLESS (no tensor axes involved), and everything else, which is unknown:
its axes are pinned and reported. In-place variants (``relu_``) use the line of their functional form.
"""

from __future__ import annotations

from vfx.analyse.classes import Maps
from vfx.analyse.rules import (
    contraction,
    einsum,
    elementwise,
    indexing,
    movement,
    normalization,
    positions,
    recurrent,
    routing,
    windows,
    writes,
)
from vfx.analyse.rules.rule import Rule

_PERMUTATION, _SIGNED, _LINEAR = Maps.PERMUTATION, Maps.SIGNED, Maps.LINEAR
_POSITIVE, _MONOMIAL = Maps.POSITIVE_MONOMIAL, Maps.MONOMIAL

_CONTRACTIONS = {
    "conv1d": contraction.convolution,
    "conv2d": contraction.convolution,
    "conv3d": contraction.convolution,
    "convolution": contraction.convolution,
    "conv_transpose1d": contraction.transposed_convolution,
    "conv_transpose2d": contraction.transposed_convolution,
    "conv_transpose3d": contraction.transposed_convolution,
    "linear": contraction.linear,
    "matmul": contraction.matmul,
    "mm": contraction.matmul,
    "bmm": contraction.matmul,
    "mv": contraction.matmul,
    "addmm": contraction.addmm,
    "baddbmm": contraction.addmm,
    "embedding": contraction.embedding,
    "scaled_dot_product_attention": contraction.attention,
    "_scaled_dot_product_attention_math": contraction.fused_attention,
    "_scaled_dot_product_flash_attention_for_cpu": contraction.fused_attention,
    "_scaled_dot_product_flash_attention": contraction.fused_attention,
    "_scaled_dot_product_efficient_attention": contraction.fused_attention,
    "_scaled_dot_product_cudnn_attention": contraction.fused_attention,
    "einsum": einsum.einsum,
    "bilinear": einsum.bilinear,
    "tensordot": einsum.tensordot,
    "dot": einsum.dot,
    "vdot": einsum.dot,
    "outer": einsum.outer,
    "cdist": einsum.distances,
    "_cdist_forward": einsum.distances,
    "_grouped_mm": routing.grouped_product,
    "addmv": einsum.products_sum,
    "addr": einsum.products_sum,
    "addbmm": einsum.products_sum,
}

_RECURRENT = {
    "lstm": recurrent.layers,
    "gru": recurrent.layers,
    "rnn_tanh": recurrent.layers,
    "rnn_relu": recurrent.layers,
    "lstm_cell": recurrent.cell,
    "gru_cell": recurrent.cell,
    "rnn_tanh_cell": recurrent.cell,
    "rnn_relu_cell": recurrent.cell,
}

_NORMALIZATIONS = {
    "batch_norm": (normalization.per_channel, _MONOMIAL),
    "_native_batch_norm_legit_no_training": (normalization.per_channel, _MONOMIAL),
    "native_batch_norm": (normalization.per_channel, _MONOMIAL),
    "cudnn_batch_norm": (normalization.per_channel, _MONOMIAL),
    "_native_batch_norm_legit": (normalization.per_channel, _MONOMIAL),
    "instance_norm": (normalization.per_channel, _MONOMIAL),
    "layer_norm": (normalization.layer_norm, _PERMUTATION),
    "native_layer_norm": (normalization.layer_norm, _PERMUTATION),
    "rms_norm": (normalization.layer_norm, _SIGNED),
    "_fused_rms_norm": (normalization.layer_norm, _SIGNED),
    "group_norm": (normalization.group_norm, _PERMUTATION),
    "native_group_norm": (normalization.group_norm, _PERMUTATION),
    "_weight_norm": (normalization.weight_norm, _SIGNED),
    "_weight_norm_interface": (normalization.weight_norm, _SIGNED),
    "prelu": (normalization.prelu, _POSITIVE),
    "softmax": (normalization.softmax, _PERMUTATION),
    "_softmax": (normalization.softmax, _PERMUTATION),
    "log_softmax": (normalization.softmax, _PERMUTATION),
    "_log_softmax": (normalization.softmax, _PERMUTATION),
    "_safe_softmax": (normalization.softmax, _PERMUTATION),
}

_POINTWISE = {
    _LINEAR: "add sub rsub neg lerp complex deg2rad rad2deg conj_physical",
    _POSITIVE: "relu leaky_relu _prelu_kernel abs maximum minimum fmax fmin hypot",
    _SIGNED: """
        tanh sin asin sinh asinh atan atanh erf erfinv tan sign sgn softsign hardtanh hardshrink softshrink round trunc
        frac
    """,
    _MONOMIAL: "mul div addcmul addcdiv reciprocal",
    _PERMUTATION: """
        gelu silu mish sigmoid hardsigmoid hardswish relu6 elu selu celu softplus threshold
        log_sigmoid rrelu glu_jvp logit exp expm1 exp2 log log1p log2 log10 sqrt rsqrt square pow float_power remainder
        fmod floor ceil floor_divide cos acos cosh acosh erfc lgamma digamma atan2
        clamp clamp_min clamp_max where eq ne lt le gt ge logical_and logical_or logical_not logical_xor
        bitwise_and bitwise_or bitwise_not bitwise_xor isnan isinf isfinite nan_to_num masked_fill
        xlogy heaviside signbit __and__ __or__ __xor__ special_entr special_xlog1py copysign logaddexp logaddexp2 ldexp
        nextafter isposinf isneginf isclose bitwise_left_shift bitwise_right_shift __lshift__ __rshift__
        polar angle sinc i0 polygamma mvlgamma igamma igammac
    """,
}

_SAME = """
    clone contiguous to _to_copy type_as dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout
    detach alias lift_fresh lift_fresh_copy positive float double half bool int long resolve_conj resolve_neg conj
    _conj real imag
"""

_FILLS = """
    zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty
    fill zero scalar_tensor empty_permuted new_empty_strided empty_strided
"""

_ORDERED = """
    arange linspace logspace eye tril_indices triu_indices hann_window rand randn randint randperm rand_like randn_like
    randint_like bernoulli multinomial normal uniform exponential cauchy log_normal geometric random poisson
"""

_REDUCTIONS = """
    mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod any all nansum nanmean
    median nanmedian mode kthvalue aminmax count_nonzero argmax argmin frobenius_norm
"""

_SCANS = ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")

_WINDOWS = """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool1d_with_indices max_pool3d_with_indices
    avg_pool1d avg_pool2d avg_pool3d lp_pool2d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
"""

_MOVEMENTS = {
    "view": movement.view,
    "reshape": movement.view,
    "_unsafe_view": movement.view,
    "view_as": movement.view,
    "reshape_as": movement.view,
    "flatten": movement.view,
    "unflatten": movement.view,
    "permute": movement.permute,
    "transpose": movement.transpose,
    "t": movement.reverse_axes,
    "numpy_T": movement.reverse_axes,
    "mT": movement.reverse_axes,
    "mH": movement.reverse_axes,
    "movedim": movement.move_axis,
    "unsqueeze": movement.unsqueeze,
    "squeeze": movement.squeeze,
    "expand": movement.expand,
    "expand_as": movement.expand,
    "broadcast_to": movement.expand,
    "broadcast_tensors": movement.broadcast_tensors,
    "meshgrid": movement.meshgrid,
    "ravel": movement.view,
    "repeat": movement.repeat,
    "tile": movement.repeat,
    "repeat_interleave": movement.repeat_interleave,
    "slice": movement.slice_,
    "narrow": movement.narrow,
    "select": movement.select,
    "split": movement.split,
    "split_with_sizes": movement.split,
    "chunk": movement.split,
    "tensor_split": movement.split,
    "unsafe_split": movement.split,
    "unsafe_split_with_sizes": movement.split,
    "unsafe_chunk": movement.split,
    "unbind": movement.unbind,
    "cat": movement.concatenate,
    "hstack": movement.stack_rows,
    "vstack": movement.stack_rows,
    "stack": movement.stack,
    "pad": movement.pad,
    "constant_pad_nd": movement.pad,
    "reflection_pad1d": movement.pad,
    "reflection_pad2d": movement.pad,
    "reflection_pad3d": movement.pad,
    "replication_pad1d": movement.pad,
    "replication_pad2d": movement.pad,
    "replication_pad3d": movement.pad,
    "_pad_circular": movement.pad,
    "roll": movement.roll,
    "flip": movement.flip,
    "index": movement.gather_constant,
    "_unsafe_index": movement.gather_constant,
    "index_select": movement.gather_constant,
    "channel_shuffle": movement.channel_shuffle,
    "native_channel_shuffle": movement.channel_shuffle,
    "pixel_shuffle": movement.pixel_shuffle,
    "pixel_unshuffle": movement.pixel_unshuffle,
    "unfold": windows.windows,
    "im2col": windows.columns,
    "col2im": windows.image,
    "grid_sampler": windows.sampled,
    "grid_sampler_2d": windows.sampled,
    "grid_sampler_3d": windows.sampled,
}

_INDEXING = {
    "gather": indexing.gather,
    "take_along_dim": indexing.gather,
    "take": indexing.take,
    "scatter": indexing.scatter,
    "scatter_add": indexing.scatter,
    "scatter_reduce": indexing.scatter,
    "index_put": indexing.index_put,
    "_unsafe_index_put": indexing.index_put,
    "index_add": indexing.write_at,
    "index_copy": indexing.write_at,
    "index_reduce": indexing.write_at,
    "index_fill": indexing.write_at,
    "embedding_bag": indexing.embedding_bag,
    "_embedding_bag": indexing.embedding_bag,
    "_embedding_bag_forward_only": indexing.embedding_bag,
    "masked_scatter": indexing.masked_scatter,
    "masked_select": indexing.data_dependent,
    "nonzero": indexing.data_dependent,
    "nonzero_static": indexing.data_dependent,
    "_unique2": indexing.data_dependent,
    "bucketize": indexing.buckets,
    "searchsorted": indexing.buckets,
    "one_hot": indexing.one_hot,
    "copy": writes.copy,
    "slice_scatter": writes.slice_scatter,
    "select_scatter": writes.select_scatter,
}

_POSITIONS = {
    "tril": positions.triangle,
    "triu": positions.triangle,
    "diagonal": positions.diagonal,
    "diag_embed": positions.on_diagonal,
    "sort": positions.sorted_values,
    "argsort": positions.sorted_values,
    "msort": positions.sorted_values,
    "topk": positions.sorted_values,
    "diff": positions.differences,
    "cross": positions.cross_product,
    "linalg_cross": positions.cross_product,
    "cosine_similarity": positions.similarity,
    "pairwise_distance": positions.similarity,
    "view_as_complex": positions.complex_pairs,
    "view_as_real": positions.real_pairs,
}


def _table() -> dict[str, Rule]:
    table = {name: Rule(rule, _LINEAR) for name, rule in _CONTRACTIONS.items()}
    table |= {name: Rule(rule, maps) for name, (rule, maps) in _NORMALIZATIONS.items()}
    table |= {name: Rule(elementwise.pointwise, maps) for maps, names in _POINTWISE.items() for name in names.split()}
    table |= {name: Rule(elementwise.same, _LINEAR) for name in _SAME.split()}
    table |= {name: Rule(elementwise.fill, _LINEAR) for name in _FILLS.split()}
    table |= {name: Rule(elementwise.ordered, _PERMUTATION) for name in _ORDERED.split()}
    table |= {name: Rule(elementwise.reduction, _PERMUTATION) for name in _REDUCTIONS.split()}
    table |= {name: Rule(elementwise.cross_channel_window, _POSITIVE) for name in _WINDOWS.split()}
    table |= {name: Rule(elementwise.scan, _PERMUTATION) for name in _SCANS}
    table |= {name: Rule(rule, _LINEAR) for name, rule in (_MOVEMENTS | _INDEXING).items()}
    table |= {name: Rule(rule, _PERMUTATION) for name, rule in (_POSITIONS | _RECURRENT).items()}
    table["histc"] = Rule(routing.histogram, _PERMUTATION)
    table["glu"] = Rule(elementwise.gated_linear, _PERMUTATION)
    others = {"transformers.grouped_mm_fallback": table["_grouped_mm"]}
    return {f"aten.{name}": rule for name, rule in table.items()} | others


TABLE = _table()

# rules of operators that do the same at every position of an axis that they do not cut (``vfx.analyse.parts``)
KEEPING = frozenset({
    movement.permute, movement.transpose, movement.unsqueeze, movement.slice_, movement.narrow, movement.split,
    elementwise.same, elementwise.pointwise,
})  # fmt: skip

SIZES = {"aten.sym_size", "aten.sym_numel", "aten.sym_stride", "aten.sym_storage_offset", "aten.numel"}
HARMLESS = SIZES | {
    "aten.item", "aten.is_nonzero",
    "add", "sub", "mul", "floordiv", "mod", "truediv", "eq", "ne", "lt", "le", "gt", "ge", "neg", "pow", "sym_sum",
    "sym_max", "sym_min", "sym_not", "sym_float", "sym_int", "sym_ite", "and_", "or_", "ceil", "floor",
    "trunc", "round", "aten._local_scalar_dense", "_sym_sqrt",
}  # fmt: skip
