import json
import re

import numpy as np
import pytest
import torch
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig

from supershaper_hf import SuperShaperConfig
from supershaper_hf.model.configuration_supershaper import default_width_choices


# Round trips


def test_round_trips_through_a_dictionary():
    config = tiny_config(head_slicing="per_head", layer_norm_eps=1e-5)
    assert SuperShaperConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("shape", [None, [8, 0, 36]], ids=["supernet", "subnet"])
def test_round_trips_through_a_folder(shape, tmp_path):
    config = tiny_config().subnet_config(shape) if shape else tiny_config()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == config.to_json_string()


def test_saved_config_lists_every_auto_class(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
        "AutoModelForMultipleChoice",
    }


def test_configurations_share_no_lists():
    first, second = tiny_config(), tiny_config()
    first.hidden_sizes.append(8)
    first.auto_map.clear()
    assert second.to_dict() == tiny_config().to_dict()


# Default width choices


def test_default_width_choices_at_bert_base_are_the_papers():
    assert default_width_choices(768, 12) == [120, 240, 360, 480, 540, 600, 768]


@pytest.mark.parametrize(
    ("hidden_size", "heads"), [(768, 12), (768, 16), (1024, 16), (512, 8), (384, 12), (256, 4), (128, 2), (48, 4)]
)
def test_default_width_choices_are_seven_that_fit_the_heads(hidden_size, heads):
    choices = default_width_choices(hidden_size, heads)
    assert choices == sorted(set(choices))
    assert choices[-1] == hidden_size
    assert all(width > 0 and width % heads == 0 for width in choices)
    assert len(choices) == 7


@pytest.mark.parametrize(
    ("hidden_size", "heads", "multiple"), [(1024, 16, 8), (512, 8, 8), (384, 12, 4), (64, 4, 2), (48, 4, 1)]
)
def test_default_width_choices_are_coarse_multiples_of_the_heads_where_seven_fit(hidden_size, heads, multiple):
    """Matrix products are fastest on multiples of 8."""
    assert all(width % (multiple * heads) == 0 for width in default_width_choices(hidden_size, heads))


@pytest.mark.parametrize(("hidden_size", "heads"), [(12, 12), (24, 12), (20, 4)])
def test_default_width_choices_of_a_narrow_model_are_every_width(hidden_size, heads):
    assert default_width_choices(hidden_size, heads) == list(range(heads, hidden_size + 1, heads))


@pytest.mark.parametrize(("hidden_size", "heads"), [(512, 8), (384, 12), (1024, 16)])
def test_default_width_choices_span_from_about_a_sixth_in_even_steps(hidden_size, heads):
    choices = np.array(default_width_choices(hidden_size, heads)) / hidden_size
    assert np.abs(choices - np.linspace(0.15, 1, 7)).max() < 0.07


# Allowed shapes


@pytest.mark.parametrize(
    "shape",
    [[8, 0, 36], (8, 0, 36), np.array([8, 0, 36]), np.array([8, 0, 36], np.uint8), torch.tensor([8, 0, 36])],
    ids=["list", "tuple", "array", "uint8", "tensor"],
)
def test_any_sequence_of_integers_is_a_shape(shape):
    widths = tiny_config().normalize_shape(shape)
    assert widths == [8, 0, 36]
    assert {type(width) for width in widths} == {int}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([8, 20], "has 2 widths, but the supernet has 3 layers"),
        ([8, 20, 36, 48], "has 4 widths, but the supernet has 3 layers"),
        ([], "has 0 widths"),
        (np.array([8, 20]), "shape=[8, 20] has 2 widths"),
        ([8, 20, 40], "width 40 of layer 2 is not one of the width choices"),
        ([8, 52, 36], "width 52 of layer 1 is above hidden_size=48"),
        ([-8, 20, 36], "width -8 of layer 0 is negative"),
        ([8, 20, 35], "width 35 of layer 2 is not divisible by num_attention_heads=4"),
        ([0, 0, 0], "drops every layer: at least one layer must stay"),
    ],
)
def test_shape_with_a_wrong_value_is_refused(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tiny_config().normalize_shape(shape)
    assert "Allowed: [8, 20, 36, 48], or 0 to drop the layer." in str(error.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([True, 20, 36], "the width of layer 0 is True (bool), not an integer"),
        ([8, 20.0, 36], "the width of layer 1 is 20.0 (float), not an integer"),
        ([8, 20, "36"], "the width of layer 2 is '36' (str), not an integer"),
        ([8, None, 36], "the width of layer 1 is None (NoneType), not an integer"),
        (np.array([8.0, 20.0, 36.0]), "(float64), not an integer"),
        (np.array([True, True, True]), "not an integer"),
        (torch.tensor([8.0, 20.0, 36.0]), "(Tensor), not an integer"),
        ("8,20,36", "shape='8,20,36' must be a list of 3 integers"),
        (20, "shape=20 must be a list of 3 integers"),
        (iter([8, 20, 36]), "must be a list of 3 integers"),
    ],
)
def test_shape_of_a_wrong_type_is_refused(shape, message):
    with pytest.raises(TypeError, match=re.escape(message)) as error:
        tiny_config().normalize_shape(shape)
    assert "Allowed: [8, 20, 36, 48], or 0 to drop the layer." in str(error.value)


def test_shape_on_a_subnet_is_refused():
    config = tiny_config().subnet_config([8, 0, 36])
    with pytest.raises(ValueError, match=re.escape("subnet with fixed hidden_sizes=[8, 36]: it is not elastic")):
        config.normalize_shape([8, 36])


# Subnet configurations


def test_subnet_config_lists_the_kept_layers():
    config = tiny_config(id2label={0: "no", 1: "yes", 2: "maybe"}).subnet_config([8, 0, 36])
    assert (config.num_hidden_layers, config.hidden_sizes) == (2, [8, 36])
    assert (config.merged_bottlenecks, config.width_choices) == (True, None)
    assert config.id2label == {0: "no", 1: "yes", 2: "maybe"}


def test_subnet_config_leaves_the_supernets_alone():
    config = tiny_config()
    config.subnet_config([8, 0, 36]).id2label[0] = "changed"
    assert config.to_dict() == tiny_config().to_dict()


# Inconsistent configurations. huggingface_hub wraps the ValueError of a validator.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width_choices": [20, 8, 48]}, "must be strictly increasing. Use [8, 20, 48] instead"),
        ({"width_choices": [8, 8, 48]}, "must be strictly increasing. Use [8, 48] instead"),
        ({"width_choices": []}, "width_choices=[] is empty"),
        ({"width_choices": [8, 20]}, "must end with hidden_size=48"),
        ({"width_choices": [8, 52]}, "must end with hidden_size=48"),
        ({"width_choices": [8, 22, 48]}, "[22] must be positive multiples of num_attention_heads=4"),
        ({"width_choices": [-8, 0, 48]}, "[-8, 0] must be positive multiples of num_attention_heads=4"),
        ({"num_attention_heads": 5}, "hidden_size=48 is not divisible by num_attention_heads=5"),
        ({"hidden_sizes": [48, 48]}, "must list one width for each of the num_hidden_layers=3 layers"),
        ({"num_hidden_layers": 0}, "and at least one"),
        ({"hidden_sizes": [48, 20, 48]}, "a supernet (merged_bottlenecks=False) has every layer at hidden_size=48"),
    ],
)
def test_inconsistent_supernet_is_refused(changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=re.escape(message)):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_sizes": [8, 0, 36]}, "0 must be a positive multiple of num_attention_heads=4"),
        ({"hidden_sizes": [8, 22, 36]}, "22 must be a positive multiple of num_attention_heads=4"),
        ({"hidden_sizes": [8, 52, 36]}, "52 must be a positive multiple of num_attention_heads=4 and at most"),
        ({"width_choices": [8, 48]}, "a subnet (merged_bottlenecks=True) has no width choices"),
    ],
)
def test_inconsistent_subnet_is_refused(changes, message):
    subnet = {"width_choices": None, "hidden_sizes": [8, 20, 36], "merged_bottlenecks": True}
    with pytest.raises(StrictDataclassClassValidationError, match=re.escape(message)):
        tiny_config(**{**subnet, **changes})
