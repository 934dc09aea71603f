"""The hand-crafted shapes of the study: they use up their budget and keep their form."""

import importlib
import itertools
from pathlib import Path

import pytest
from conftest import tiny_bert_config
from transformers import BertModel

from supershaper_hf import SearchSpace, SuperShaperConfig


ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 6, "intermediate_size": 1536}
WIDTHS = [96, 144, 240, 288, 336, 384]


@pytest.fixture(scope="module")
def shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield importlib.import_module("benchmarks.study.shapes")


@pytest.fixture(scope="module")
def space():
    """The space of the released supernet, with a smaller vocabulary."""
    config = SuperShaperConfig(**SIZES, vocab_size=50, width_choices=WIDTHS, bottlenecks="by_width")
    return SearchSpace.from_config(config, "SuperShaperModel")


def test_parameters_in_the_layers_are_counted():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        study = importlib.import_module("benchmarks.study.study")
    bert = BertModel(tiny_bert_config())
    layers = sum(parameter.numel() for parameter in bert.encoder.parameters())
    assert study.encoder_parameters(bert.config) == layers


def test_a_budget_is_that_of_a_model_without_a_head(shapes):
    bert = BertModel(tiny_bert_config())
    layers = sum(parameter.numel() for parameter in bert.encoder.parameters())
    outside = bert.num_parameters() - layers
    assert shapes.budget(bert.config, 1.0, bert.num_parameters()) == bert.num_parameters()
    assert shapes.budget(bert.config, 0.5, bert.num_parameters()) == outside + layers // 2


@pytest.mark.parametrize("share", [0.75, 0.6, 0.45, 0.3])
def test_hand_crafted_shapes_use_up_the_budget(shapes, space, share):
    layers = shapes.encoder_parameters(space.config)
    bare = space.num_parameters(space.largest) - 7 * 384 * 385  # without bottlenecks: what the BERT has
    most = shapes.budget(space.config, share, bare)
    for name in shapes.HAND_CRAFTED:
        shape = space.validate(shapes.hand_crafted(space, name, most))
        assert 0 <= most - space.num_parameters(shape) < 0.03 * layers, name


def test_hand_crafted_shapes_keep_their_form(shapes, space):
    smallest, largest = space.num_parameters(space.smallest), space.num_parameters(space.largest)
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        made = {
            name: shapes.hand_crafted(space, name, int(smallest + part * (largest - smallest)))
            for name in shapes.HAND_CRAFTED
        }
        assert made["rectangle"] == sorted(made["rectangle"])
        assert WIDTHS.index(made["rectangle"][-1]) - WIDTHS.index(made["rectangle"][0]) <= 2
        assert made["lower_triangle"] == sorted(made["lower_triangle"])
        assert made["upper_triangle"] == sorted(made["upper_triangle"], reverse=True)
        assert max(made["diamond"]) in made["diamond"][2:4]
        kept = [width for width in made["first_layers"] if width]
        assert made["first_layers"] == kept + [0] * (6 - len(kept))
        assert set(kept[:-1]) <= {384}


def test_an_exact_rectangle_stays_one(shapes, space):
    for width in WIDTHS:
        assert shapes.hand_crafted(space, "rectangle", space.num_parameters([width] * 6)) == [width] * 6


def test_no_layer_could_be_wider(shapes, space):
    most = space.num_parameters([240] * 6) - 1
    for name in shapes.HAND_CRAFTED[:-1]:
        shape = shapes.hand_crafted(space, name, most)
        for layer, width in itertools.product(range(6), WIDTHS):
            wider = [*shape[:layer], width, *shape[layer + 1 :]]
            assert width <= shape[layer] or space.num_parameters(wider) > most


def test_a_budget_below_one_narrow_layer_is_refused(shapes, space):
    with pytest.raises(ValueError, match="max_parameters=1,000 is too small for one narrow layer"):
        shapes.hand_crafted(space, "first_layers", 1000)
