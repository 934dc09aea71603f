import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from supershaper_hf import SearchSpace, SuperShaperForMaskedLM
from supershaper_hf.model.costs import training_flops


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


# Training


def counted_forward(shape, sequences, length, labelled):
    """What torch counts in one forward pass of the subnet with the head on the labelled positions."""
    subnet = SuperShaperForMaskedLM(tiny_config(attn_implementation="eager")).extract_subnet(shape)
    labels = torch.full((sequences, length), -100)
    labels.view(-1)[:labelled] = 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subnet(torch.ones_like(labels), labels=labels, sparse_prediction=True)
    return counter.get_total_flops()


@pytest.mark.parametrize(("sequences", "length", "labelled"), [(1, 24, 3), (4, 7, 28), (2, 9, 0)])
def test_training_flops_are_three_times_those_that_torch_counts_forward(sequences, length, labelled):
    """The backward pass of a product is two products of its size."""
    for shape in SHAPES:
        expected = 3 * counted_forward(shape, sequences, length, labelled)
        assert training_flops(tiny_config(), [shape], sequences, length, labelled) == expected


def test_training_flops_of_several_shapes_are_their_sum():
    one_by_one = [training_flops(tiny_config(), [shape], 4, 9, 5) for shape in SHAPES]
    assert training_flops(tiny_config(), SHAPES, 4, 9, 5) == sum(one_by_one)


def test_training_flops_of_a_subnet_are_those_of_its_shape():
    subnet = tiny_config().subnet_config([8, 0, 36])
    assert training_flops(subnet, [[8, 36]], 4, 9, 5) == training_flops(tiny_config(), [[8, 0, 36]], 4, 9, 5)


def test_training_flops_of_a_large_run_are_an_exact_integer():
    assert type(training_flops(tiny_config(), SHAPES, 2**20, 24, 2**20)) is int
    assert training_flops(tiny_config(), SHAPES, 2**20, 24, 2**20) == 2**20 * training_flops(
        tiny_config(), SHAPES, 1, 24, 1
    )
