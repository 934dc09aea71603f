import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode

import supershaper_hf
from supershaper_hf import SearchSpace, SuperShaperForMaskedLM, SuperShaperModel
from supershaper_hf.model.costs import flops_cost, training_flops


SPACE = SearchSpace.from_config(tiny_config())
SHAPES = [[8, 20, 36], [48, 48, 48], [0, 36, 8], [20, 0, 48], [36, 8, 0], [0, 20, 0]]


@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_are_what_torch_counts_in_the_subnet(shape, length):
    supernet = SuperShaperForMaskedLM(tiny_config(attn_implementation="eager"))
    subnet = supernet.extract_subnet(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subnet(torch.ones(1, length, dtype=torch.long))
    assert SPACE.flops(shape, length) == counter.get_total_flops()


HEADS = {
    "SuperShaperModel": {},
    "SuperShaperForMaskedLM": {},
    "SuperShaperForSequenceClassification": {"num_labels": 5},
    "SuperShaperForTokenClassification": {"num_labels": 5},
    "SuperShaperForQuestionAnswering": {},
    "SuperShaperForMultipleChoice": {},
}


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_costs_are_those_of_the_subnet_with_its_head(architecture, shape):
    supernet = getattr(supershaper_hf, architecture)(tiny_config(attn_implementation="eager", **HEADS[architecture]))
    subnet, choices = supernet.extract_subnet(shape), architecture.endswith("MultipleChoice")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subnet(torch.ones((1, 1, 7) if choices else (1, 7), dtype=torch.long))
    named = SearchSpace.from_config(supernet.config, architecture)
    for space in (SearchSpace.from_model(supernet), named):
        assert space.model_class is type(supernet)
        assert space.num_parameters(shape) == subnet.num_parameters()
        assert space.flops(shape, 7) == counter.get_total_flops()
    budget = subnet.num_parameters()
    assert named.num_parameters(named.named_shape("rectangle", budget)) <= budget


def test_encoder_without_a_pooler_is_counted_without_it():
    supernet = SuperShaperModel(tiny_config(), add_pooling_layer=False)
    expected = supernet.extract_subnet(SHAPES[0]).num_parameters()
    assert SearchSpace.from_model(supernet).num_parameters(SHAPES[0]) == expected


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match=r"architecture='BertModel' is unknown\. Allowed: 'SuperShaperForMaskedLM', "):
        SearchSpace.from_config(tiny_config(), "BertModel")


def test_flops_of_many_shapes_are_those_of_each():
    shapes = [list(shape) for shape in itertools.product([0, *SPACE.width_choices], repeat=3) if any(shape)]
    assert SPACE.flops(np.array(shapes), 24).tolist() == [SPACE.flops(shape, 24) for shape in shapes]


def test_one_shape_gives_an_int():
    assert type(SPACE.flops(np.array([8, 0, 36]), 24)) is int


def test_elasticity_changes_no_cost(elasticity):
    config = tiny_config(**elasticity)
    space, supernet = SearchSpace.from_config(config), SuperShaperForMaskedLM(config)
    for shape in SHAPES:
        subnet = supernet.extract_subnet(shape)
        assert space.num_parameters(shape) == sum(parameter.numel() for parameter in subnet.parameters())
        assert space.num_parameters(shape) == SPACE.num_parameters(shape)
        assert space.flops(shape, 24) == SPACE.flops(shape, 24)


@pytest.mark.parametrize("length", [0, -1, 2.5, 24.0, True, "24", None, float("nan")], ids=str)
def test_length_that_is_no_number_of_tokens_is_refused(length):
    with pytest.raises(ValueError, match=r"sequence_length=.* must be an integer of at least 1"):
        SPACE.flops([8, 0, 36], length)


def test_integers_of_numpy_are_lengths():
    assert SPACE.flops([8, 0, 36], np.uint8(200)) == SPACE.flops([8, 0, 36], 200)


def exact_flops(shape, length):
    """Operations of a shape without dropped layers, in Python's integers."""
    cost, sources = flops_cost(SPACE.config, length), [48, *shape[:-1]]
    layers = sum(cost.enter(source, width) + cost.layer(width) for source, width in zip(sources, shape))
    return cost.fixed + layers + cost.leave(shape[-1])


@pytest.mark.parametrize("exponent", [3, 6, 8, 9, 12, 18, 19, 400])
def test_flops_of_long_inputs_are_exact_or_refused(exponent):
    """4 * length ** 2 * 3 * 48 passes 2 ** 63 between 10 ** 8 and 10 ** 9 tokens."""
    length, shapes = 10**exponent, [[8, 20, 36], [48, 48, 48]]
    if exponent < 9:
        assert SPACE.flops(shapes, length).tolist() == [exact_flops(shape, length) for shape in shapes]
    else:
        with pytest.raises(ValueError, match="has more flops than 64 bits can count"):
            SPACE.flops(shapes, length)


def test_more_parameters_than_can_be_counted_are_refused():
    config = tiny_config(vocab_size=10**18)
    with pytest.raises(ValueError, match="The largest shape has more parameters than 64 bits can count"):
        SearchSpace.from_config(config).num_parameters([8, 20, 36])
    many = SearchSpace.from_config(tiny_config(vocab_size=10**17))
    assert many.num_parameters([8, 20, 36]) == SPACE.num_parameters([8, 20, 36]) + (10**17 - 61) * 49


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


def test_training_flops_never_overflow():
    one, many = (training_flops(tiny_config(), SHAPES, count, 10**7, count) for count in (1, 10**12))
    assert many == 10**12 * one > 2**63


def test_training_flops_of_a_large_run_are_an_exact_integer():
    assert type(training_flops(tiny_config(), SHAPES, 2**20, 24, 2**20)) is int
    assert training_flops(tiny_config(), SHAPES, 2**20, 24, 2**20) == 2**20 * training_flops(
        tiny_config(), SHAPES, 1, 24, 1
    )
