import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from supershaper_hf import SearchSpace, SuperShaperForMaskedLM


SPACE = SearchSpace(tiny_config())
SHAPES = [[8, 20, 36], [48, 48, 48], [0, 36, 8], [20, 0, 48], [36, 8, 0], [0, 20, 0]]


@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_are_what_torch_counts_in_the_subnet(shape, length):
    supernet = SuperShaperForMaskedLM(tiny_config(attn_implementation="eager"))
    subnet = supernet.extract_subnet(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subnet(torch.ones(1, length, dtype=torch.long))
    assert SPACE.flops(shape, length) == counter.get_total_flops()


def test_flops_of_many_shapes_are_those_of_each():
    shapes = [list(shape) for shape in itertools.product([0, *SPACE.width_choices], repeat=3) if any(shape)]
    assert SPACE.flops(np.array(shapes), 24).tolist() == [SPACE.flops(shape, 24) for shape in shapes]


def test_one_shape_gives_an_int():
    assert type(SPACE.flops(np.array([8, 0, 36]), 24)) is int


def test_head_slicing_changes_no_cost():
    per_head = SearchSpace(tiny_config(head_slicing="per_head"))
    assert per_head.num_parameters(SHAPES[0]) == SPACE.num_parameters(SHAPES[0])
    assert per_head.flops(SHAPES[0], 24) == SPACE.flops(SHAPES[0], 24)
