import json
import logging
import re

import pytest
import torch
import transformers
from conftest import BERT_SIZES, assert_same, randomize, run, tiny_batch, tiny_bert_config, tiny_config
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertForMaskedLM, BertForPreTraining, BertModel, RobertaConfig, RobertaModel

from supershaper_hf import (
    SuperShaperConfig,
    SuperShaperForMaskedLM,
    SuperShaperForSequenceClassification,
    SuperShaperModel,
    extract_from_folder,
)


def bert_of(model_class, **changes):
    """A random BERT with the head of the same name."""
    bert_class = getattr(transformers, model_class.__name__.replace("SuperShaper", "Bert"))
    return randomize(bert_class(tiny_bert_config(**changes)))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "supershaper_hf.convert.bert"]


# The same outputs


@pytest.mark.parametrize("kind", ["model", "folder"])
def test_supernet_equals_its_bert(model_class, kind, tmp_path):
    bert, batch = bert_of(model_class), tiny_batch(model_class)
    bert.save_pretrained(tmp_path)
    supernet = model_class.from_bert(bert if kind == "model" else tmp_path)
    assert not supernet.training
    assert_same(run(supernet, batch), run(bert, batch))


def test_layers_of_the_supernet_equal_those_of_its_bert():
    bert, batch = bert_of(SuperShaperModel), tiny_batch()
    supernet = SuperShaperModel.from_bert(bert)
    assert_same(run(supernet, batch, output_hidden_states=True), run(bert, batch, output_hidden_states=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 0.1},
        {"type_vocab_size": 3, "pad_token_id": 5, "max_position_embeddings": 11, "intermediate_size": 52},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_berts_configuration_is_taken_over(changes):
    bert, batch = bert_of(SuperShaperForMaskedLM, **changes), tiny_batch()
    assert_same(run(SuperShaperForMaskedLM.from_bert(bert), batch), run(bert, batch))


def test_widths_and_slicing_are_passed_on():
    supernet = SuperShaperForMaskedLM.from_bert(
        bert_of(SuperShaperForMaskedLM), width_choices=[16, 48], head_slicing="per_head"
    )
    assert supernet.config.width_choices == [16, 48]
    assert supernet.config.head_slicing == "per_head"


def test_bottlenecks_by_width_start_as_shared_ones():
    bert, batch = bert_of(SuperShaperForMaskedLM), tiny_batch()
    supernet, info = SuperShaperForMaskedLM.from_bert(bert, bottlenecks="by_width", output_loading_info=True)
    assert supernet.config.bottlenecks == "by_width"
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert_same(run(supernet, batch), run(bert, batch))
    shape = supernet.config.width_choices[:3]
    assert_same(run(supernet, batch, shape=shape), run(SuperShaperForMaskedLM.from_bert(bert), batch, shape=shape))


def test_default_widths_follow_the_hidden_size():
    supernet = SuperShaperForMaskedLM.from_bert(bert_of(SuperShaperForMaskedLM))
    assert supernet.config.width_choices == SuperShaperConfig(**BERT_SIZES).width_choices
    assert supernet.config.head_slicing == "prefix"


def test_labels_are_taken_over():
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    supernet = SuperShaperForSequenceClassification.from_bert(
        bert_of(SuperShaperForSequenceClassification, id2label=labels)
    )
    assert supernet.config.id2label == labels


def test_dropout_falls_where_berts_does(model_class):
    changes = {"classifier_dropout": 0.5, "attn_implementation": "eager"}
    bert, batch = bert_of(model_class, **changes), tiny_batch(model_class)
    supernet = model_class.from_bert(bert)
    supernet.set_attn_implementation("eager")
    torch.manual_seed(0)
    expected = run(bert.train(), batch)
    torch.manual_seed(0)
    assert_same(run(supernet.train(), batch), expected)


def test_supernet_shares_no_memory_with_its_bert():
    bert, batch = bert_of(SuperShaperForMaskedLM), tiny_batch()
    before = run(bert, batch)
    randomize(SuperShaperForMaskedLM.from_bert(bert), seed=1)
    assert_same(run(bert, batch), before, atol=0)


def test_supernet_of_a_bert_is_saved_as_supershaper(tmp_path):
    SuperShaperForMaskedLM.from_bert(bert_of(SuperShaperForMaskedLM)).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.architectures) == ("supershaper", ["SuperShaperForMaskedLM"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtype_of_the_checkpoint_is_kept(dtype, tmp_path):
    bert = bert_of(SuperShaperForMaskedLM).to(dtype)
    bert.save_pretrained(tmp_path)
    for supernet in (SuperShaperForMaskedLM.from_bert(bert), SuperShaperForMaskedLM.from_bert(tmp_path)):
        assert {tensor.dtype for tensor in supernet.state_dict().values()} == {dtype}
        assert_same(run(supernet, tiny_batch()), run(bert, tiny_batch()), atol=0.05)


def test_requested_dtype_is_used(tmp_path):
    bert_of(SuperShaperForMaskedLM).save_pretrained(tmp_path)
    assert SuperShaperForMaskedLM.from_bert(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_old_layer_norm_names_are_read(tmp_path):
    bert = bert_of(SuperShaperForMaskedLM)
    bert.save_pretrained(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {
        re.sub(r"LayerNorm\.(weight|bias)", lambda match: old[match[0]], name): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in tensors
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(run(SuperShaperForMaskedLM.from_bert(tmp_path), tiny_batch()), run(bert, tiny_batch()))


# What a checkpoint lacks or has too much of


@pytest.mark.parametrize("kind", ["model", "folder"])
def test_matching_checkpoint_leaves_nothing_to_report(model_class, kind, tmp_path, caplog):
    bert = bert_of(model_class)
    bert.save_pretrained(tmp_path)
    _, info = model_class.from_bert(bert if kind == "model" else tmp_path, output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("kind", ["model", "folder"])
def test_missing_head_is_reported(kind, tmp_path, caplog):
    bert = randomize(BertModel(tiny_bert_config(), add_pooling_layer=False))
    bert.save_pretrained(tmp_path)
    source = bert if kind == "model" else tmp_path
    supernet, info = SuperShaperForMaskedLM.from_bert(source, output_loading_info=True)
    assert info["missing_keys"] == [
        "cls.predictions.decoder.bias",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.dense.weight",
    ]
    assert info["unexpected_keys"] == []
    assert "are missing in the source and newly initialised" in warnings_of(caplog)[0]
    assert_same(run(supernet.bert, tiny_batch()), run(bert, tiny_batch()))


@pytest.mark.parametrize("kind", ["model", "folder"])
def test_pretraining_checkpoint_becomes_a_masked_lm(kind, tmp_path, caplog):
    bert = randomize(BertForPreTraining(tiny_bert_config()))
    bert.save_pretrained(tmp_path)
    source = bert if kind == "model" else tmp_path
    supernet, info = SuperShaperForMaskedLM.from_bert(source, output_loading_info=True)
    assert info == {
        "missing_keys": [],
        "unexpected_keys": [
            "bert.pooler.dense.bias",
            "bert.pooler.dense.weight",
            "cls.seq_relationship.bias",
            "cls.seq_relationship.weight",
        ],
    }
    assert "These tensors of the source are not used" in warnings_of(caplog)[0]
    assert_same(run(supernet, tiny_batch())[0], run(bert, tiny_batch())[0])


@pytest.mark.parametrize("kind", ["model", "folder"])
def test_masked_lm_checkpoint_becomes_a_classifier(kind, tmp_path):
    bert = bert_of(SuperShaperForMaskedLM)
    bert.save_pretrained(tmp_path)
    source = bert if kind == "model" else tmp_path
    supernet, info = SuperShaperForSequenceClassification.from_bert(source, output_loading_info=True)
    assert info["missing_keys"] == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    assert all(name.startswith("cls.predictions.") for name in info["unexpected_keys"])
    assert_same(run(supernet.bert, tiny_batch())[0], run(bert.bert, tiny_batch())[0])


@pytest.mark.parametrize("kind", ["model", "folder"])
def test_task_checkpoint_becomes_a_base_model(kind, tmp_path):
    bert = bert_of(SuperShaperForSequenceClassification)
    bert.save_pretrained(tmp_path)
    supernet, info = SuperShaperModel.from_bert(bert if kind == "model" else tmp_path, output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": ["classifier.bias", "classifier.weight"]}
    assert_same(run(supernet, tiny_batch()), run(bert.bert, tiny_batch()))


def test_only_our_own_message_tells_what_is_missing(tmp_path, caplog):
    """Transformers calls a checkpoint without a head corrupted."""
    BertModel(tiny_bert_config(), add_pooling_layer=False).save_pretrained(tmp_path)
    transformers_logger = logging.getLogger("transformers.modeling_utils")
    transformers_logger.addHandler(caplog.handler)
    try:
        SuperShaperForMaskedLM.from_bert(tmp_path)
        assert [record.name for record in caplog.records] == ["supershaper_hf.convert.bert"]
        transformers_logger.warning("spoken again")
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert "spoken again" in caplog.text


def test_configuration_names_the_class_before_anything_is_saved(model_class, tmp_path):
    """A checkpoint of a run holds the configuration that the model has in memory."""
    bert_of(model_class).save_pretrained(tmp_path / "bert")
    for source in (tmp_path / "bert", bert_of(model_class)):
        supernet = model_class.from_bert(source)
        supernet.config.save_pretrained(tmp_path / "checkpoint")
        save_file(
            {name: tensor.clone() for name, tensor in supernet.state_dict().items()},
            tmp_path / "checkpoint" / "model.safetensors",
        )
        target = extract_from_folder(tmp_path / "checkpoint", [48, 20, 36], tmp_path / type(source).__name__)
        assert AutoConfig.from_pretrained(target).architectures == [model_class.__name__]


# Sources that are no BERT encoder, or none that anybody can mean


def test_fields_of_ours_in_the_configuration_of_a_bert_mean_nothing(tmp_path):
    bert, batch = bert_of(SuperShaperForMaskedLM), tiny_batch()
    bert.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    ours = {
        "hidden_sizes": [8, 20, 36],
        "width_choices": [8, 48],
        "head_slicing": "per_head",
        "merged_bottlenecks": True,
        "auto_map": {"AutoModelForMaskedLM": "modeling_evil.Model"},
        "transformers_weights": "model.safetensors",
    }
    (tmp_path / "config.json").write_text(json.dumps({**content, **ours}))
    for source in (tmp_path, BertForMaskedLM.from_pretrained(tmp_path)):
        supernet = SuperShaperForMaskedLM.from_bert(source)
        expected = SuperShaperForMaskedLM.from_bert(bert).config.to_dict()
        assert supernet.config.to_dict() == expected
        assert_same(run(supernet, batch), run(bert, batch))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_dropout_prob", 1.5),
        ("layer_norm_eps", -1.0),
        ("num_attention_heads", 0),
        ("num_attention_heads", 5),
        ("num_hidden_layers", 10**5),
        ("hidden_act", "gelux"),
        ("pad_token_id", 61),
    ],
)
def test_configuration_of_a_bert_that_nobody_can_mean_is_named(field, value, tmp_path):
    bert_of(SuperShaperForMaskedLM).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=rf"(?s)config\.json of '{tmp_path}' does not describe a model.*{field}"):
        SuperShaperForMaskedLM.from_bert(tmp_path)


def test_width_choices_that_do_not_fit_are_not_blamed_on_the_bert(tmp_path):
    bert_of(SuperShaperForMaskedLM).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"width_choices=\[8, 20\] must end with hidden_size=48") as error:
        SuperShaperForMaskedLM.from_bert(tmp_path, width_choices=[8, 20])
    assert "config.json" not in str(error.value)


def test_roberta_folder_is_refused(tmp_path):
    RobertaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='roberta', which is not BERT"):
        SuperShaperForMaskedLM.from_bert(tmp_path)


def test_roberta_model_is_refused():
    sizes = {**BERT_SIZES, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="a BERT model of transformers, not RobertaModel"):
        SuperShaperForMaskedLM.from_bert(RobertaModel(RobertaConfig(**sizes)))


def test_supershaper_folder_is_sent_to_from_pretrained(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a SuperShaper model already: load it with from_pretrained"):
        SuperShaperForMaskedLM.from_bert(tmp_path)


@pytest.mark.parametrize("changes", [{"is_decoder": True}, {"add_cross_attention": True}], ids=str)
def test_decoder_is_refused(changes, tmp_path):
    tiny_bert_config(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is configured as a decoder; only BERT encoders"):
        SuperShaperForMaskedLM.from_bert(tmp_path)


def test_decoder_model_is_refused():
    with pytest.raises(ValueError, match="BertModel is configured as a decoder"):
        SuperShaperModel.from_bert(BertModel(tiny_bert_config(is_decoder=True)))


def test_relative_positions_are_refused(tmp_path):
    tiny_bert_config(position_embedding_type="relative_key").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="position_embedding_type='relative_key'; allowed: 'absolute'"):
        SuperShaperForMaskedLM.from_bert(tmp_path)
