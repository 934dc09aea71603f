import json
import re

import numpy as np
import pytest
import torch
from conftest import PER_HEAD_BY_WIDTH, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from transformers import AutoConfig

from supershaper_hf import (
    SuperShaperConfig,
    SuperShaperForMaskedLM,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
)
from supershaper_hf.model.configuration_supershaper import default_width_choices


# Round trips


def test_round_trips_through_a_dictionary():
    config = tiny_config(**PER_HEAD_BY_WIDTH, layer_norm_eps=1e-5)
    assert SuperShaperConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("shape", [None, [8, 0, 36]], ids=["supernet", "subnet"])
def test_round_trips_through_a_folder(shape, elasticity, tmp_path):
    config = tiny_config(**elasticity)
    config = config.subnet_config(shape) if shape else config
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == config.to_json_string()


def auto_map_in(folder):
    return json.loads((folder / "config.json").read_text())["auto_map"]


def test_saved_model_lists_every_auto_class(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert set(auto_map_in(tmp_path)) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
        "AutoModelForMultipleChoice",
    }


@pytest.mark.parametrize("source", ["new", "saved", "loaded"])
def test_configuration_announces_only_code_that_lies_beside_it(source, tmp_path):
    """A configuration that came with a model, and is saved alone elsewhere, leaves the model's code behind."""
    config = tiny_config()
    if source != "new":
        model = tiny_model()
        model.save_pretrained(tmp_path / "model")
        config = AutoConfig.from_pretrained(tmp_path / "model") if source == "loaded" else model.config
    config.save_pretrained(tmp_path / "alone")
    (tmp_path / "search").mkdir()
    config.to_json_file(tmp_path / "search" / "config.json")
    for folder in tmp_path.iterdir():
        for name in auto_map_in(folder).values():
            assert (folder / f"{name.split('.')[0]}.py").exists()
    assert auto_map_in(tmp_path / "alone") == {"AutoConfig": "configuration_supershaper.SuperShaperConfig"}


def test_configurations_share_no_lists(tmp_path):
    first, second = tiny_config(), tiny_config()
    first.hidden_sizes.append(8)
    tiny_model().save_pretrained(tmp_path)
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
        ([8, 20, 40], "width 40 of layer 3 is not one of the width choices"),
        ([8, 52, 36], "width 52 of layer 2 is above hidden_size=48"),
        ([-8, 20, 36], "width -8 of layer 1 is negative"),
        ([8, 20, 35], "width 35 of layer 3 is not divisible by num_attention_heads=4"),
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
        ([True, 20, 36], "the width of layer 1 is True (bool), not an integer"),
        ([8, 20.0, 36], "the width of layer 2 is 20.0 (float), not an integer"),
        ([8, 20, "36"], "the width of layer 3 is '36' (str), not an integer"),
        ([8, None, 36], "the width of layer 2 is None (NoneType), not an integer"),
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


def test_subnet_config_has_nothing_that_only_a_supernet_has():
    config = tiny_config(**PER_HEAD_BY_WIDTH).subnet_config([8, 0, 36])
    assert (config.bottlenecks, config.full_head_scale) == ("shared", False)
    assert config.head_slicing == "per_head"


@pytest.mark.parametrize("head", [SuperShaperForSequenceClassification, SuperShaperForTokenClassification])
@pytest.mark.parametrize(
    "labels", [{}, {"num_labels": 1}, {"id2label": {0: "no", 1: "yes"}}, {"num_labels": 3}], ids=str
)
def test_classifiers_write_out_all_labels(head, labels, tmp_path):
    """Without this, two labels without names are left out, and label2id is not completed."""
    model = head(tiny_config(**labels))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["id2label"] == {str(index): name for index, name in model.config.id2label.items()}
    assert written["label2id"] == {name: index for index, name in model.config.id2label.items()}
    assert SuperShaperConfig.from_pretrained(tmp_path).id2label == model.config.id2label
    other = head.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other.classifier.out_features == len(other.config.label2id) == 5


def test_models_without_labels_write_none(tmp_path):
    SuperShaperForMaskedLM(tiny_config()).save_pretrained(tmp_path)
    assert "label" not in (tmp_path / "config.json").read_text()


def test_configurations_from_before_bottlenecks_by_width_mean_shared_ones(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content = {name: value for name, value in content.items() if name not in ("bottlenecks", "full_head_scale")}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.bottlenecks, config.full_head_scale) == ("shared", False)


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
        ({"bottlenecks": "by_width"}, "bottlenecks='by_width', full_head_scale=False: a subnet (merged_bottlenecks="),
        ({"full_head_scale": True}, "bottlenecks='shared', full_head_scale=True: a subnet (merged_bottlenecks=True)"),
    ],
)
def test_inconsistent_subnet_is_refused(changes, message):
    subnet = {"width_choices": None, "hidden_sizes": [8, 20, 36], "merged_bottlenecks": True}
    with pytest.raises(StrictDataclassClassValidationError, match=re.escape(message)):
        tiny_config(**{**subnet, **changes})


# Values that no model can have


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "0 must be at least 1"),
        ("hidden_size", -48, "-48 must be at least 1"),
        ("num_hidden_layers", 0, "0 must be an integer from 1 to 1000"),
        ("num_hidden_layers", 10**5, "100000 must be an integer from 1 to 1000"),
        ("num_attention_heads", 0, "0 must be at least 1"),
        ("intermediate_size", 0, "0 must be at least 1"),
        ("max_position_embeddings", -1, "-1 must be at least 1"),
        ("type_vocab_size", 0, "0 must be at least 1"),
        ("hidden_act", "gelux", "'gelux' is not an activation of transformers. Allowed: gelu, "),
        ("layer_norm_eps", -1e-12, "-1e-12 must be a finite number of at least 0"),
        ("layer_norm_eps", float("nan"), "nan must be a finite number of at least 0"),
        ("layer_norm_eps", float("inf"), "inf must be a finite number of at least 0"),
        ("initializer_range", -0.02, "-0.02 must be a finite number of at least 0"),
        ("initializer_range", float("nan"), "nan must be a finite number of at least 0"),
        ("hidden_dropout_prob", 1.5, "1.5 must be a finite number of at least 0 and below 1"),
        ("hidden_dropout_prob", -0.1, "-0.1 must be a finite number of at least 0 and below 1"),
        ("attention_probs_dropout_prob", float("nan"), "nan must be a finite number of at least 0 and below 1"),
        ("classifier_dropout", 1, "1 must be a finite number of at least 0 and below 1"),
        ("pad_token_id", 61, "pad_token_id=61 is not in the vocabulary of vocab_size=61 tokens. Use an integer from 0"),
        ("pad_token_id", -1, "pad_token_id=-1 is not in the vocabulary of vocab_size=61 tokens"),
        ("vocab_size", True, "expected int, got bool"),
        ("bottlenecks", "both", "both"),
        ("full_head_scale", "yes", "expected bool, got str"),
        ("hidden_dropout_prob", "0.1", "0.1"),
    ],
)
def test_value_that_no_model_can_have_is_refused(field, value, message, tmp_path):
    with pytest.raises(StrictDataclassError, match=re.escape(message)) as error:
        tiny_config(**{field: value})
    assert field in str(error.value)
    tiny_config().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "hidden_sizes": None, field: value}))
    for config_class in (SuperShaperConfig, AutoConfig):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            config_class.from_pretrained(tmp_path)
        assert f"The config.json of {str(tmp_path)!r} does not describe a model" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "float33"), ("dtype", []), ("id2label", {"a": "yes"}), ("id2label", 3)], ids=str
)
def test_value_that_transformers_stumbles_over_is_refused_with_the_file(field, value, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=f"The config.json of '{tmp_path}' does not describe a model"):
        SuperShaperConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [SuperShaperConfig, SuperShaperForMaskedLM], ids=lambda loader: loader.__name__)
def test_folder_without_a_configuration_is_refused(loader, tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json, so it is not a saved model"):
        loader.from_pretrained(tmp_path)


def test_configuration_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config\.json' is not a valid JSON file"):
        SuperShaperConfig.from_pretrained(tmp_path)
