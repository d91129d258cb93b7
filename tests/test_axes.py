"""Axis terms: unification only ever shrinks the group, keeps labels unique and closed, and makes two axes act alike."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vfx.analyse.axes import Leaves, unique_labels
from vfx.analyse.axis import Axis
from vfx.analyse.places import places
from vfx.analyse.shapes import Algebra, Shape
from vfx.analyse.store import Rows, Store

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def _sizes(leaves: Leaves, rows: Rows) -> list[int]:
    return sorted(leaves.sizes[leaf] for leaf in leaves.free_leaves(leaves.resolve(rows)))


def _action(leaves: Leaves, rows: Rows, seed: int) -> NDArray[np.int64]:
    """Where a random group element sends each position; fails where a label has no image."""
    rows = leaves.resolve(rows)
    moved = rows.copy()
    for leaf in range(len(leaves.sizes)):
        # The same element for every axis: the generator depends on the leaf alone.
        permutation = np.random.default_rng((seed, leaf)).permutation(leaves.sizes[leaf])
        here = leaves.leaf_of(rows[:, 1:]) == leaf
        moved[:, 1:][here] = leaves.starts[leaf] + permutation[rows[:, 1:][here] - leaves.starts[leaf]]
    place = {tuple(row): index for index, row in enumerate(rows.tolist())}
    assert len(place) == len(rows), "labels are not unique"
    return np.array([place[tuple(row)] for row in moved.tolist()])


def _alike(leaves: Leaves, left: Rows, right: Rows) -> None:
    for seed in range(4):
        assert (_action(leaves, left, seed) == _action(leaves, right, seed)).all()


def _rows(algebra: Algebra, axis: Axis) -> Rows:
    rows = algebra.rows(axis)
    assert rows is not None
    return rows


# unification ----------------------------------------------------------------------------------------------------------


def test_two_leaves_become_one() -> None:
    leaves = Leaves()
    a, b = leaves.fresh(5), leaves.fresh(5)
    leaves.unify(a, b)
    assert (leaves.resolve(a) == leaves.resolve(b)).all()
    assert _sizes(leaves, a) == [5]


def test_an_axis_of_one_position_has_no_leaf() -> None:
    leaves = Leaves()
    assert _sizes(leaves, leaves.fresh(1)) == []


def test_a_leaf_takes_the_segments_of_a_concatenation() -> None:
    t = Algebra()
    a, b, whole = t.fresh(3), t.fresh(4), t.fresh(7)
    t.tie(whole, t.concatenate([a, b]))
    assert _sizes(t.leaves, _rows(t, whole)) == [3, 4]
    # Concatenation tags its parts, so equal labels of different parts stay apart.
    assert unique_labels(t.leaves.resolve(_rows(t, whole)))


def test_the_same_leaf_twice_in_a_concatenation() -> None:
    t = Algebra()
    a, whole = t.fresh(3), t.fresh(6)
    t.tie(whole, t.concatenate([a, a]))
    assert _sizes(t.leaves, _rows(t, whole)) == [3]


def test_overlapping_segments_are_cut_at_every_border() -> None:
    t = Algebra()
    left, right = t.concatenate([t.fresh(2), t.fresh(5)]), t.concatenate([t.fresh(4), t.fresh(3)])
    t.tie(left, right)
    assert _sizes(t.leaves, _rows(t, left)) == [2, 2, 3]
    _alike(t.leaves, _rows(t, left), _rows(t, right))


def test_a_leaf_takes_the_factors_of_a_product() -> None:
    t = Algebra()
    flat, c, s = t.fresh(12), t.fresh(3), t.fresh(4)
    t.tie(flat, Axis((*c.factors, *s.factors)))
    assert _sizes(t.leaves, _rows(t, flat)) == [3, 4]


def test_pixels_are_no_factor() -> None:
    t = Algebra()
    flat, c, pixels = t.fresh(12), t.fresh(3), t.opaque(4, "pixels")
    t.tie(flat, Axis((*c.factors, *pixels.factors)))
    assert _sizes(t.leaves, _rows(t, flat)) == [3]


def test_a_finer_product_refines_a_coarser_one() -> None:
    t = Algebra()
    a, b = t.fresh(2), t.fresh(6)
    c, d = t.fresh(4), t.fresh(3)
    left, right = Axis((*a.factors, *b.factors)), Axis((*c.factors, *d.factors))
    t.tie(left, right)  # 2·6 against 4·3: 2·2·3
    assert _sizes(t.leaves, _rows(t, left)) == [2, 2, 3]
    _alike(t.leaves, _rows(t, left), _rows(t, right))


def test_products_at_many_places_are_tied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors × classes of a detector at every pixel against one product: no pass over all positions for each pixel."""
    passes, unify_classes = [], Leaves._unify_classes
    monkeypatch.setattr(Leaves, "_unify_classes", lambda *pair: passes.append(len(pair[1])) or unify_classes(*pair))
    t = Algebra()
    pixels, anchors, outputs, classes = t.opaque(30, "pixels"), t.fresh(15), t.fresh(90), t.fresh(5)
    left = Axis((*outputs.factors, *classes.factors))
    t.tie(left, Axis((*pixels.factors, *anchors.factors)))
    assert _sizes(t.leaves, _rows(t, left)) == [3, 5]
    _alike(t.leaves, _rows(t, left), t.leaves.resolve(_rows(t, Axis((*pixels.factors, *anchors.factors)))))
    assert len(passes) < 10


def test_incompatible_products_pin() -> None:
    t = Algebra()
    a, b = t.fresh(2), t.fresh(3)
    c, d = t.fresh(3), t.fresh(2)
    t.tie(Axis((*a.factors, *b.factors)), Axis((*c.factors, *d.factors)))  # 2·3 against 3·2
    for axis in (a, b, c, d):
        rows = t.leaves.resolve(_rows(t, axis))
        assert rows.shape[1] == 1
        pin = t.leaves.pin_of(int(rows[0, 0]))
        assert pin is not None
        assert pin.reason


def test_a_leaf_tied_to_its_mirror_image_keeps_the_pairs() -> None:
    t = Algebra()
    a = t.fresh(7)
    t.tie(a, t.take(a, slice(None, None, -1)))
    assert _sizes(t.leaves, _rows(t, a)) == [3]  # three pairs and the middle


def test_a_leaf_tied_to_its_rotation_is_stuck() -> None:
    t = Algebra()
    a = t.fresh(5)
    t.tie(a, t.take(a, np.roll(np.arange(5), 1)))
    assert _sizes(t.leaves, _rows(t, a)) == []


def test_crossed_copies_are_told_apart() -> None:
    t = Algebra()
    a = t.fresh(4)
    both = t.concatenate([a, a])
    crossed = t.take(both, np.array([0, 5, 2, 3, 4, 1, 6, 7]))
    # Digits agree position by position, yet the actions differ: element 1 swaps its copies.
    t.tie(both, crossed)
    assert _sizes(t.leaves, _rows(t, a)) == [3]
    _alike(t.leaves, _rows(t, both), _rows(t, crossed))


def test_a_pin_reaches_what_is_tied_before_and_after() -> None:
    leaves = Leaves()
    a, b, c = leaves.fresh(4), leaves.fresh(4), leaves.fresh(4)
    leaves.unify(a, b)
    leaves.context = "node_7"
    leaves.pin(a, "model output")
    leaves.unify(b, c)
    for rows in (a, b, c):
        assert _sizes(leaves, rows) == []
        pin = leaves.pin_of(int(leaves.resolve(rows)[0, 0]))
        assert pin is not None
        assert (pin.reason, pin.node) == ("model output", "node_7")


def test_a_pin_of_some_positions_leaves_the_rest_free() -> None:
    leaves = Leaves()
    a = leaves.fresh(6)
    leaves.pin(a[:2], "read by number")
    assert _sizes(leaves, a) == [4]


def test_one_position_used_apart_is_pinned_with_a_reason() -> None:
    t = Algebra()
    a = t.fresh(5)
    t.take(a, slice(2, 3))
    rows = t.leaves.resolve(_rows(t, a))
    assert _sizes(t.leaves, rows) == [4]
    pin = t.leaves.pin_of(int(rows[2, 0]))
    assert pin is not None
    assert pin.reason == "used apart from every other channel"


# sharing --------------------------------------------------------------------------------------------------------------


def test_tied_axes_are_one_array() -> None:
    t = Algebra()
    axes = [t.fresh(6) for _ in range(4)]
    for left, right in pairwise(axes):
        t.tie(left, right)
    shared = {id(t.leaves.resolve(_rows(t, axis))) for axis in axes}
    assert len(shared) == 1
    t.tie(axes[2], t.concatenate([t.fresh(2), t.fresh(4)]))
    assert len({id(t.leaves.resolve(_rows(t, axis))) for axis in axes}) == 1
    assert id(t.leaves.resolve(_rows(t, axes[0]))) not in shared
    assert t.leaves.resolve(_rows(t, t.fresh(6))) is not t.leaves.resolve(_rows(t, axes[0]))


def test_axes_found_alike_become_one_array() -> None:
    t = Algebra()
    a = t.fresh(6)
    left, right = (_rows(t, t.take(a, np.arange(6)[::-1].copy())) for _ in range(2))
    assert t.leaves.resolve(left) is not t.leaves.resolve(right)
    t.leaves.unify(left, right)
    assert t.leaves.resolve(left) is t.leaves.resolve(right)
    assert not t.leaves.same(t.leaves.resolve(left), t.leaves.resolve(_rows(t, a)))


def test_what_is_read_of_labels_is_read_once_while_they_live() -> None:
    leaves, reads = Leaves(), []

    def size(store: Store, rows: Rows) -> int:
        reads.append(rows.shape)
        return len(rows)

    rows = leaves.fresh(3)
    assert [leaves.once(size, rows) for _ in range(3)] == [3, 3, 3]
    assert reads == [(3, 2)]
    before = len(leaves._entries)
    del rows
    assert len(leaves._entries) == before - 1
    assert leaves.once(size, leaves.fresh(5)) == 5


def test_places_are_copies_by_channel() -> None:
    t = Algebra()
    a, b = t.fresh(3), t.fresh(2)
    rows = t.leaves.resolve(_rows(t, t.concatenate([a, b, t.take(a, np.array([2, 0, 1]))])))
    first, second = (places(t.leaves, rows)[t.leaves.free_leaves(_rows(t, axis))[0]] for axis in (a, b))
    assert first is not None
    assert second is not None
    assert first.tolist() == [[0, 6], [1, 7], [2, 5]]
    assert second.tolist() == [[3], [4]]
    assert next(iter(places(t.leaves, rows[:-1]).values())) is None  # not closed: a copy of one channel is missing
    product = _rows(t, Axis((*a.factors, *b.factors)))
    assert [table.tolist() for table in places(t.leaves, product).values() if table is not None] == [
        [[0, 1], [2, 3], [4, 5]],
        [[0, 2, 4], [1, 3, 5]],
    ]


# views ----------------------------------------------------------------------------------------------------------------


def test_undoing_a_view_gives_the_axis_back() -> None:
    t = Algebra()
    a = t.fresh(12)
    seen = t.view(Shape((a,)), (3, 4))
    turned = t.permute(t.permute(seen, (1, 0)), (1, 0))
    back = t.axis(t.view(turned, (12,)), 0)
    assert (_rows(t, back) == _rows(t, a)).all()
    assert _sizes(t.leaves, _rows(t, a)) == [12]


def test_a_transposed_view_is_a_shuffle_that_loses_nothing() -> None:
    t = Algebra()
    a = t.fresh(6)
    shuffled = t.axis(t.view(t.permute(t.view(Shape((a,)), (2, 3)), (1, 0)), (6,)), 0)
    assert _sizes(t.leaves, _rows(t, shuffled)) == [6]
    assert (_rows(t, shuffled)[:, 1] == _rows(t, a)[[0, 3, 1, 4, 2, 5], 1]).all()


def test_packed_view_and_unbind_do_not_factor() -> None:
    t = Algebra()
    a = t.fresh(12)
    seen = t.view(Shape((a,)), (3, 4))
    parts = [t.select(seen, 0, index) for index in range(3)]
    assert [part.sizes for part in parts] == [(4,)] * 3
    assert _sizes(t.leaves, _rows(t, a)) == [4, 4, 4]  # three thirds, each free


def test_an_axis_of_a_view_used_alone_forces_the_product() -> None:
    t = Algebra()
    a = t.fresh(12)
    seen = t.view(Shape((a,)), (3, 4))
    assert _sizes(t.leaves, _rows(t, t.axis(seen, 1))) == [4]
    assert _sizes(t.leaves, _rows(t, a)) == [3, 4]


def test_whole_blocks_are_tied_without_factoring() -> None:
    t = Algebra()
    a, b = t.fresh(12), t.fresh(12)
    left, right = t.view(Shape((a,)), (3, 4)), t.view(Shape((b,)), (3, 4))
    t.broadcast([left, right], (3, 4))
    assert _sizes(t.leaves, _rows(t, a)) == [12]
    _alike(t.leaves, _rows(t, a), _rows(t, b))


def test_blocks_tied_crosswise() -> None:
    t = Algebra()
    a, b = t.fresh(12), t.fresh(12)
    left, right = t.view(Shape((a,)), (3, 4)), t.permute(t.view(Shape((b,)), (4, 3)), (1, 0))
    t.broadcast([left, right], (3, 4))
    assert _sizes(t.leaves, _rows(t, a)) == [12]
    order = np.arange(12).reshape(4, 3).T.reshape(-1)
    _alike(t.leaves, _rows(t, a), t.leaves.resolve(_rows(t, b))[order])


@pytest.mark.parametrize("kept", [0, 1])
def test_what_is_left_of_a_block_is_tied(kept: int) -> None:
    t = Algebra()
    a, b = t.fresh(6), t.fresh(6)
    rest = [Shape((t.view(Shape((x,)), (2, 3)).axes[kept],)) for x in (a, b)]
    size = (2, 3)[kept]
    t.broadcast(rest, (size,))
    shared = set(t.leaves.free_leaves(t.leaves.resolve(_rows(t, a)))) & set(
        t.leaves.free_leaves(t.leaves.resolve(_rows(t, b)))
    )
    assert [t.leaves.sizes[leaf] for leaf in shared] == [size]


def test_broadcast_axes_tie_nothing() -> None:
    t = Algebra()
    a, b = t.fresh(4), t.fresh(5)
    t.broadcast([Shape((a, t.fresh(1))), Shape((b,))], (4, 5))
    assert _sizes(t.leaves, _rows(t, a)) == [4]
    assert _sizes(t.leaves, _rows(t, b)) == [5]


def test_merged_batch_and_channels_come_apart_again() -> None:
    t = Algebra()
    batch, a = t.opaque(1_000_000_007, "batch"), t.fresh(6)
    merged = t.view(Shape((batch, a)), (6 * 1_000_000_007,))
    back = t.view(merged, (1_000_000_007, 6))
    assert (_rows(t, t.axis(back, 1)) == _rows(t, a)).all()
    assert _sizes(t.leaves, _rows(t, a)) == [6]


# laws -----------------------------------------------------------------------------------------------------------------

SIZE = 12
TERMS = st.recursive(
    st.just("leaf"),
    lambda inner: st.one_of(
        st.tuples(st.just("flip"), inner),
        st.tuples(st.just("roll"), inner, st.integers(1, SIZE - 1)),
        st.tuples(st.just("shuffle"), inner, st.sampled_from([2, 3, 4, 6])),
        st.tuples(st.just("cat"), inner, inner, st.integers(1, SIZE - 1)),
        st.tuples(st.just("product"), inner, st.sampled_from([2, 3, 4, 6])),
        st.tuples(st.just("repeat"), inner, st.sampled_from([2, 3, 4, 6])),
    ),
    max_leaves=4,
)


def _term(t: Algebra, pool: list[Axis], term: object, draw: st.DataObject) -> Axis:
    """An axis of SIZE positions; leaves come from a small pool, so that terms meet themselves."""
    if term == "leaf":
        return draw.draw(st.sampled_from(pool))
    kind, inner, *rest = term  # type: ignore[misc]
    axis = _term(t, pool, inner, draw)
    if kind == "flip":
        return t.take(axis, slice(None, None, -1))
    if kind == "roll":
        return t.take(axis, np.roll(np.arange(SIZE), rest[0]))
    if kind == "shuffle":
        return t.take(axis, np.arange(SIZE).reshape(rest[0], -1).T.reshape(-1))
    if kind == "cat":
        other = _term(t, pool, rest[0], draw)
        return t.concatenate([t.take(axis, slice(0, rest[1])), t.take(other, slice(rest[1], None))])
    part = t.take(axis, slice(0, SIZE // rest[0]))
    if kind == "repeat":
        return t.concatenate([part] * rest[0])
    return Axis((*t.fresh(rest[0]).factors, *part.factors))


@QUICK
@given(st.data(), TERMS, TERMS)
def test_tied_axes_act_alike_and_every_axis_stays_closed(data: st.DataObject, first: object, second: object) -> None:
    t = Algebra()
    pool = [t.fresh(SIZE), t.fresh(SIZE)]
    left, right = _term(t, pool, first, data), _term(t, pool, second, data)
    t.tie(left, right)
    _alike(t.leaves, _rows(t, left), _rows(t, right))
    for axis in pool:
        _action(t.leaves, _rows(t, axis), 0)


def _repeats(leaves: Leaves, rows: Rows) -> bool:
    """Whether some label carries two digits of one leaf."""
    found = np.sort(leaves.leaf_of(leaves.resolve(rows)[:, 1:]), axis=1)
    return bool(((found[:, 1:] == found[:, :-1]) & (found[:, 1:] >= 0)).any())


@QUICK
@given(st.data(), TERMS, TERMS)
def test_tying_twice_changes_nothing(data: st.DataObject, first: object, second: object) -> None:
    t = Algebra()
    pool = [t.fresh(SIZE), t.fresh(SIZE)]
    left, right = _term(t, pool, first, data), _term(t, pool, second, data)
    t.tie(left, right)
    # A leaf met twice on one label has no order among its own digits; only there may a second tie pin more.
    assume(not any(_repeats(t.leaves, _rows(t, axis)) for axis in (left, right)))
    version = t.leaves.version
    t.tie(right, left)
    assert t.leaves.version == version


@QUICK
@given(st.data(), TERMS, st.integers(0, SIZE - 1))
def test_an_axis_keeps_its_action_under_a_view_and_its_undoing(data: st.DataObject, term: object, seed: int) -> None:
    t = Algebra()
    axis = _term(t, [t.fresh(SIZE)], term, data)
    before = _action(t.leaves, _rows(t, axis), seed)
    back = t.axis(t.view(t.view(Shape((axis,)), (2, 6)), (SIZE,)), 0)
    assert (_action(t.leaves, _rows(t, back), seed) == before).all()


@QUICK
@given(st.data(), TERMS, st.permutations(range(SIZE)))
def test_taking_positions_and_putting_them_back(data: st.DataObject, term: object, order: list[int]) -> None:
    t = Algebra()
    axis = _term(t, [t.fresh(SIZE)], term, data)
    there = t.take(axis, np.array(order))
    back = t.take(there, np.argsort(order))
    version = t.leaves.version
    t.tie(axis, back)
    assert t.leaves.version == version


# lookup ---------------------------------------------------------------------------------------------------------------


def test_leaf_of_each_element() -> None:
    leaves = Leaves()
    a, b = leaves.fresh(3), leaves.fresh(2)
    assert leaves.leaf_of(np.concatenate([a[:, 1], b[:, 1], [-1]])).tolist() == [0, 0, 0, 1, 1, -1]


def test_joined_tags_are_equal_for_equal_pairs_only() -> None:
    leaves = Leaves()
    left, right = leaves.tags(2), leaves.tags(2)
    grid = [int(leaves.join(left[[i]], right[[j]])[0]) for i in range(2) for j in range(2)]
    assert len(set(grid)) == 4
    assert grid == [int(leaves.join(left[[i]], right[[j]])[0]) for i in range(2) for j in range(2)]


def test_the_reason_of_a_pin_outlives_joining() -> None:
    leaves = Leaves()
    pinned = leaves.pinned(2, "pixels")
    joined = leaves.join(np.repeat(leaves.tags(1), 2), pinned[:, 0])
    assert [leaves.pin_of(int(tag)).reason for tag in joined] == ["pixels", "pixels"]  # type: ignore[union-attr]
    assert torch.tensor(joined.tolist()).unique().numel() == 2
