"""The registry of operators is the only place that names them, and its entries say all that can be said."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

from vfx.analyse.action import HANDLERS
from vfx.analyse.cost import COUNTS, VIEW
from vfx.analyse.rules import RULES
from vfx.analyse.rules.spaces import SPACES
from vfx.operators import OPERANDS, PERMUTATION, REGISTRY, UNKNOWN, Operator
from vfx.operators.registry import FAMILIES
from vfx.resize.operators import REWRITES

ROOT = Path(__file__).parents[1]
FACTS = ("ties", "classes", "space", "resize", "cost")
NAMES = {name for entry in REGISTRY.values() for name in entry.names}
BARE = {name.removeprefix("aten.") for name in NAMES if name.count(".") < 2}
KINDS = {getattr(entry, fact) for entry in REGISTRY.values() for fact in FACTS}

# sets of names that are no knowledge of operators: file, first names, reason
EXCEPTIONS = {
    ("vfx/emit/pt2/rules.py", "eq ne le"): "functions of Python that a file may call on sizes: a list of what is safe",
    ("vfx/emit/pt2/rules.py", "sym_not sym_int sym_float"): "the same, of torch",
    ("vfx/emit/pt2/rules.py", "trunc ceil floor"): "the same, of math",
    ("vfx/emit/pt2/expressions.py", "integer positive nonnegative"): "what sympy may assume of a symbol",
    ("vfx/options.py", "list cat mean"): "how a user asks for the heads' outputs",
}


# names outside -------------------------------------------------------------------------------------------------------


def _said(node: ast.AST) -> str:
    """The operator's name, or the text, that an expression stands for."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
    return "aten." + text.split("aten.")[1].partition(".")[0] if text.startswith(("torch.ops.aten.", "_aten.")) else ""


def _is_operator(text: str) -> bool:
    known = text in NAMES or text in BARE or text.removesuffix("_") in NAMES | BARE
    return known or (text.startswith("aten.") and text != "aten.")


def name_sets(tree: ast.AST) -> Iterator[list[str]]:
    """The sets, tuples, lists, keys of dicts and split strings that list operators.

    They name at least two, most of their texts do, and they are no kinds; one name with its namespace is enough.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.split()
            if len(words) > 2 and all(map(_is_operator, words)) and node.value not in KINDS:
                yield words
            continue
        items = node.elts if isinstance(node, (ast.Set, ast.Tuple, ast.List)) else []
        items = list(filter(None, node.keys)) if isinstance(node, ast.Dict) else items
        items = [node.elt] if isinstance(node, ast.SetComp) else items
        texts = [text for text in map(_said, items) if text]
        named = [text for text in texts if _is_operator(text)]
        full = any(isinstance(x, (ast.Constant, ast.JoinedStr)) and _said(x).startswith("aten.") for x in items)
        if (full and named) or (len(named) > 1 and 2 * len(named) > len(texts) and not set(texts) <= KINDS):
            yield texts


def test_no_set_of_operators_stands_outside_the_registry() -> None:
    found = set()
    for path in [*ROOT.glob("vfx/**/*.py"), *ROOT.glob("passes/**/*.py")]:
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith("vfx/operators/"):
            found |= {(place, " ".join(names[:3])) for names in name_sets(ast.parse(path.read_text()))}
    assert found == set(EXCEPTIONS)


@pytest.mark.parametrize(
    "text",
    [
        'A = {"aten.relu"}',
        'A = {"relu": 1, "tanh": 2, "other": 3}',
        'x in ("aten.mean", "aten.sum_")',
        'A = frozenset(["mul", "add"])',
        'A = {f"aten.conv{rank}d" for rank in (1, 2)}',
        'A = "relu tanh gelu".split()',
        "A = {torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor}",
    ],
)
def test_a_set_of_operators_is_seen(text: str) -> None:
    assert list(name_sets(ast.parse(text)))


@pytest.mark.parametrize("text", ['A = {"view", "permute"}', 'A = ("weight", "bias")', 'x = "elementwise"'])
def test_kinds_and_arguments_are_no_operators(text: str) -> None:
    assert not list(name_sets(ast.parse(text)))


# entries -------------------------------------------------------------------------------------------------------------

# What is not known of operators that are entered: pinned (ties), permuted and no more (classes), no blocks looked for
# (space), named beside totals (cost).
NOT_KNOWN: dict[str, str] = {
    "ties": """
        _assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range
        sym_constrain_range_for_size
    """,
    "classes": """
        _assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range
        sym_constrain_range_for_size
    """,
    "space": """
        _assert_async _assert_scalar _assert_tensor_metadata _cdist_forward _embedding_bag
        _embedding_bag_forward_only _unique2 _unsafe_index_put _weight_norm _weight_norm_interface addbmm
        addmv addr argsort bilinear binary_cross_entropy binary_cross_entropy_with_logits bucketize cdist
        chain_matmul col2im cosine_similarity cross diag diag_embed diagonal diff dist dot embedding_bag
        gather grid_sampler grid_sampler_2d grid_sampler_3d gru gru_cell hinge_embedding_loss histc
        huber_loss im2col index_add index_copy index_fill index_put index_reduce inner kl_div l1_loss
        linalg_cholesky linalg_cholesky_ex linalg_cond linalg_cross linalg_det linalg_eig linalg_eigh
        linalg_eigvals linalg_eigvalsh linalg_inv linalg_inv_ex linalg_lu linalg_matrix_exp
        linalg_matrix_norm linalg_matrix_power linalg_matrix_rank linalg_multi_dot linalg_norm linalg_pinv
        linalg_qr linalg_slogdet linalg_svd linalg_svdvals linalg_vecdot logdet lstm lstm_cell
        margin_ranking_loss masked_scatter masked_select max_unpool2d max_unpool3d mse_loss msort nonzero
        nonzero_static one_hot outer pairwise_distance poisson_nll_loss rnn_relu rnn_relu_cell rnn_tanh
        rnn_tanh_cell scatter scatter_add scatter_reduce searchsorted smooth_l1_loss soft_margin_loss sort
        svd sym_constrain_range sym_constrain_range_for_size take take_along_dim tensordot topk
        torchvision.deform_conv2d tril triu unfold vdot view_as_complex view_as_real
    """,
    "resize": """
        _assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range
        sym_constrain_range_for_size
    """,
    "cost": """
        _assert_async _assert_scalar _assert_tensor_metadata _cdist_forward _fused_rms_norm
        _native_batch_norm_legit _safe_softmax _weight_norm _weight_norm_interface addr cdist chain_matmul
        cholesky_solve cudnn_batch_norm fft_fft fft_fft2 fft_fftn fft_hfft fft_hfft2 fft_hfftn fft_ifft
        fft_ifft2 fft_ifftn fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft
        fft_rfft2 fft_rfftn istft kron linalg_cholesky linalg_cholesky_ex linalg_cond linalg_det linalg_eig
        linalg_eigh linalg_eigvals linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex
        linalg_lu linalg_lu_solve linalg_matrix_exp linalg_matrix_norm linalg_matrix_power
        linalg_matrix_rank linalg_multi_dot linalg_norm linalg_pinv linalg_qr linalg_slogdet linalg_solve
        linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorsolve linalg_vecdot
        logdet native_batch_norm outer pdist renorm stft svd sym_constrain_range
        sym_constrain_range_for_size trace triangular_solve
    """,
}


def _without(fact: str) -> set[str]:
    return {name.removeprefix("aten.") for name, entry in REGISTRY.items() if getattr(entry, fact) == UNKNOWN}


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_is_given_or_known_to_be_missing(fact: str) -> None:
    assert _without(fact) == set(NOT_KNOWN[fact].split())


@pytest.mark.parametrize(
    ("fact", "kinds"),
    [
        ("ties", {*RULES, "sizes", "number", "item"}),
        ("classes", {*HANDLERS, PERMUTATION}),
        ("space", set(SPACES)),
        ("resize", {*REWRITES, OPERANDS}),
        ("cost", {*COUNTS, VIEW}),
    ],
)
def test_each_kind_has_a_function_and_each_function_an_operator(fact: str, kinds: set[str]) -> None:
    assert {getattr(entry, fact) for entry in REGISTRY.values()} - {UNKNOWN} == kinds


def test_an_operator_is_entered_once() -> None:
    entries = [entry for family in FAMILIES for entry in family.OPERATORS]
    counts = Counter(name for entry in entries for name in entry.names)
    assert [name for name, count in counts.items() if count > 1] == []
    assert {entry.name for entry in entries} <= set(REGISTRY)


def _packet(name: str) -> object | None:
    packet = torch.ops.aten
    for part in name.removeprefix("aten.").split("."):
        packet = getattr(packet, part, None)
    return packet


@pytest.mark.parametrize("entry", REGISTRY.values(), ids=list(REGISTRY))
def test_names_are_those_of_operators(entry: Operator) -> None:
    assert torchvision.__version__
    assert all(_packet(name) is not None for name in entry.names if name.startswith("aten."))


# Operators whose arguments are sizes and do not follow: their axes are pinned, or opaque.
PINNED_SIZES = """
    max_unpool2d max_unpool3d fractional_max_pool2d fractional_max_pool3d affine_grid_generator as_strided
    empty_permuted new_empty_strided empty_strided rand randn randint normal nonzero_static unfold col2im
    adaptive_avg_pool1d adaptive_max_pool1d adaptive_avg_pool2d adaptive_max_pool2d adaptive_avg_pool3d
    adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_linear1d
    _upsample_nearest_exact1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d
"""


def test_an_operator_that_is_given_sizes_says_how_they_follow() -> None:
    left = {entry.name.removeprefix("aten.") for entry in REGISTRY.values() if entry.resize == OPERANDS}
    assert {name for name in left if _takes_sizes(REGISTRY.get(f"aten.{name}"))} == set(PINNED_SIZES.split())


def _takes_sizes(entry: Operator | None) -> bool:
    """Whether a call names sizes that cannot be left out."""
    packet = _packet(entry.name) if entry is not None else None
    overloads = [getattr(packet, name) for name in packet.overloads()] if packet is not None else []  # type: ignore
    given = [a for own in overloads for a in own._schema.arguments if not a.has_default_value()]
    return any(a.name in ("size", "shape", "sizes", "output_size", "normalized_shape") for a in given)
