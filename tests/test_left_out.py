"""Positions that every cut leaves out stay where they are: other inputs may read them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vfx
from vfx.analyse.left_out import LEFT_OUT
from vfx.elements import act, random_element
from vfx.models.gpt import gpt_tiny


def _left_out(model: nn.Module, x: Tensor) -> dict[tuple[str, int], int]:
    found = vfx.symmetry(model.eval(), x)
    vfx.verify(found)
    return {(pin.fqn, pin.dim): pin.count for pin in found.pinned if pin.reason == LEFT_OUT}


def _tokens(length: int) -> Tensor:
    return torch.arange(2 * length).reshape(2, length) % 96


@pytest.mark.parametrize(("length", "left_out"), [(16, {("position", 0): 16}), (32, {})])
def test_a_longer_table_of_positions_is_pinned_where_it_is_cut(length: int, left_out: dict[tuple[str, int], int]):
    assert _left_out(gpt_tiny(0.25, context=32, depth=1), _tokens(length)) == left_out


def test_a_map_of_the_full_class_keeps_the_function_at_every_length():
    torch.manual_seed(0)
    model = gpt_tiny(0.25, context=32, depth=1).double().eval()
    found = vfx.symmetry(model, _tokens(16))
    moved = gpt_tiny(0.25, context=32, depth=1).double().eval()
    moved.load_state_dict(act(found, random_element(found, np.random.default_rng(0)), found.program.weights[0]))
    assert not torch.equal(moved.position, model.position)
    for length in (16, 32):
        assert (moved(_tokens(length)) - model(_tokens(length))).abs().max() < 1e-12
    with torch.no_grad():  # what a map of the rows that were left out would have done
        moved.position[16:] = moved.position[16:].flip(0)
    assert (moved(_tokens(16)) - model(_tokens(16))).abs().max() < 1e-12
    assert (moved(_tokens(32)) - model(_tokens(32))).abs().max() > 1e-3


class _Computed(nn.Module):
    """Rows of a table that go through a layer, and an activation, before they are cut."""

    def __init__(self, read_whole: bool):
        super().__init__()
        self.position, self.up, self.down = nn.Parameter(torch.randn(8, 5)), nn.Linear(5, 7), nn.Linear(7, 3)
        self.read_whole = read_whole

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.up(self.position))
        moved = self.down(x + rows[: x.shape[1]])
        return moved + rows.mean() if self.read_whole else moved


@pytest.mark.parametrize("read_whole", [False, True])
def test_rows_are_followed_through_layers_and_stay_free_where_another_operator_reads_them(read_whole: bool):
    assert _left_out(_Computed(read_whole), torch.randn(2, 4, 7)) == ({} if read_whole else {("position", 0): 4})


class _Chunks(nn.Module):
    def __init__(self, read: int):
        super().__init__()
        self.up, self.down, self.read = nn.Linear(5, 12), nn.Linear(4, 3), read

    def forward(self, x: Tensor) -> Tensor:
        chunks = torch.relu(self.up(x)).chunk(3, -1)
        return sum((self.down(chunk) for chunk in chunks[: self.read]), start=torch.zeros(()))


@pytest.mark.parametrize(("read", "left_out"), [(1, 8), (2, 4), (3, 0)])
def test_parts_of_a_layer_that_nothing_reads_are_pinned(read: int, left_out: int):
    expected = {("up.weight", 0): left_out, ("up.bias", 0): left_out} if left_out else {}
    assert _left_out(_Chunks(read), torch.randn(2, 5)) == expected
