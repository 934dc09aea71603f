import json
import re
from unittest import mock

import pytest
import torch
import transformers
from conftest import BERT_SIZES, assert_same, randomize, run, tiny_batch, tiny_bert_config, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForPreTraining,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from supershaper_hf import (
    SuperShaperConfig,
    SuperShaperForMaskedLM,
    SuperShaperForSequenceClassification,
    SuperShaperModel,
)
from supershaper_hf.convert.bert import extract_from_folder


def bert_of(model_class, **changes):
    """A random BERT with the head of the same name."""
    bert_class = getattr(transformers, model_class.__name__.replace("SuperShaper", "Bert"))
    return randomize(bert_class(tiny_bert_config(**changes)))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "supershaper_hf.convert.bert"]


# From BERT


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
    assert "Missing in the source, newly initialised" in warnings_of(caplog)[0]
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
    assert "Unused tensors of the source" in warnings_of(caplog)[0]
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


# Sources that are no BERT encoder


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


# From the 2021 repository


def in_2021(supernet):
    """The state dict of a supernet under the names of the 2021 repository."""
    names = {
        name: re.sub(r"encoder\.(input|output)_bottleneck\.(\d+)", r"encoder.layer.\2.\1_bottleneck", name)
        for name in supernet.state_dict()
    }
    tensors = {names[name]: tensor.clone() for name, tensor in supernet.state_dict().items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
    tensors["cls.predictions.bias"] = tensors["cls.predictions.decoder.bias"]
    return tensors


def test_2021_names():
    names = in_2021(tiny_model())
    assert "bert.encoder.layer.2.input_bottleneck.weight" in names
    assert "bert.encoder.layer.0.output_bottleneck.bias" in names
    assert "bert.encoder.layer.1.attention.output.LayerNorm.weight" in names


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["state dict", "file"])
def test_2021_checkpoint_gives_the_supernet(prefix, kind, tmp_path):
    original = tiny_model()
    source = {prefix + name: tensor for name, tensor in in_2021(original).items()}
    if kind == "file":
        torch.save(source, tmp_path / "pytorch_model.bin")
        source = tmp_path / "pytorch_model.bin"
    supernet, info = SuperShaperForMaskedLM.from_original(source, tiny_config(), output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert not supernet.training
    assert_same(run(supernet, tiny_batch(), shape=[8, 0, 36]), run(original, tiny_batch(), shape=[8, 0, 36]), atol=0)


@pytest.mark.parametrize("left_out", ["cls.predictions.bias", "cls.predictions.decoder.bias"])
def test_2021_decoder_bias_has_two_names(left_out):
    original = tiny_model()
    source = in_2021(original)
    del source[left_out]
    supernet = SuperShaperForMaskedLM.from_original(source, tiny_config())
    assert_same(run(supernet, tiny_batch()), run(original, tiny_batch()), atol=0)


def test_2021_checkpoint_without_bottlenecks_is_reported(caplog):
    source = {name: tensor for name, tensor in in_2021(tiny_model()).items() if "layer.1.input_bottleneck" not in name}
    _, info = SuperShaperForMaskedLM.from_original(source, tiny_config(), output_loading_info=True)
    expected = ["bert.encoder.input_bottleneck.1.bias", "bert.encoder.input_bottleneck.1.weight"]
    assert info["missing_keys"] == expected
    assert str(expected) in warnings_of(caplog)[0]


def test_2021_checkpoint_gives_other_heads(caplog):
    original = tiny_model()
    supernet, info = SuperShaperModel.from_original(in_2021(original), tiny_config(), output_loading_info=True)
    assert info["missing_keys"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert_same(run(supernet, tiny_batch())[0], run(original.bert, tiny_batch())[0], atol=0)


def test_2021_checkpoint_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"do not fit the configuration: .*word_embeddings.weight \[61, 48\] instead"):
        SuperShaperForMaskedLM.from_original(in_2021(tiny_model()), tiny_config(vocab_size=67))


@pytest.mark.parametrize("kept", [slice(0), slice(5000), slice(-1000), slice(4, None)], ids=str)
def test_damaged_2021_checkpoint_is_named(kept, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(in_2021(tiny_model()), file)
    file.write_bytes(file.read_bytes()[kept])
    with pytest.raises(OSError, match=r"pytorch_model\.bin is truncated or is not a state dict"):
        SuperShaperForMaskedLM.from_original(file, tiny_config())


def test_missing_2021_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file .*pytorch_model\.bin"):
        SuperShaperForMaskedLM.from_original(tmp_path / "pytorch_model.bin", tiny_config())


# From folder to folder


@pytest.fixture
def source(tmp_path):
    """A saved supernet."""
    tiny_model(head_slicing="per_head").save_pretrained(tmp_path / "supernet")
    return tmp_path / "supernet"


@pytest.mark.parametrize("shape", [[8, 20, 36], [48, 48, 48], [0, 36, 0]], ids=str)
def test_extraction_between_folders_equals_extraction_in_memory(model_class, head_slicing, shape, tmp_path):
    supernet = tiny_model(model_class, head_slicing=head_slicing)
    supernet.save_pretrained(tmp_path / "supernet")
    target = extract_from_folder(tmp_path / "supernet", shape, tmp_path / "subnet")
    subnet, expected = model_class.from_pretrained(target), supernet.extract_subnet(shape)
    assert subnet.config.to_json_string() == expected.config.to_json_string()
    assert_same(subnet.state_dict(), expected.state_dict(), atol=1e-6)


def test_sharded_supernet_is_cut(tmp_path):
    supernet = tiny_model()
    supernet.save_pretrained(tmp_path / "supernet", max_shard_size="50KB")
    assert len(list((tmp_path / "supernet").glob("model-*-of-*.safetensors"))) > 2
    extract_from_folder(tmp_path / "supernet", [8, 0, 36], tmp_path / "subnet")
    subnet = SuperShaperForMaskedLM.from_pretrained(tmp_path / "subnet")
    assert_same(subnet.state_dict(), supernet.extract_subnet([8, 0, 36]).state_dict(), atol=1e-6)


def test_untied_supernet_is_cut(tmp_path):
    supernet = tiny_model(tie_word_embeddings=False)
    supernet.save_pretrained(tmp_path / "supernet")
    extract_from_folder(tmp_path / "supernet", [8, 0, 36], tmp_path / "subnet")
    subnet = SuperShaperForMaskedLM.from_pretrained(tmp_path / "subnet")
    assert_same(run(subnet, tiny_batch()), run(supernet, tiny_batch(), shape=[8, 0, 36]))


def test_bfloat16_supernet_gives_a_bfloat16_subnet(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "supernet")
    extract_from_folder(tmp_path / "supernet", [8, 0, 36], tmp_path / "subnet")
    assert {tensor.dtype for tensor in load_file(tmp_path / "subnet" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert SuperShaperForMaskedLM.from_pretrained(tmp_path / "subnet").dtype == torch.bfloat16


def test_subnet_folder_holds_no_more_than_the_subnet(source, tmp_path):
    extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    stored = load_file(tmp_path / "subnet" / "model.safetensors").values()
    subnet = SuperShaperForMaskedLM.from_pretrained(tmp_path / "subnet")
    assert sum(tensor.numel() for tensor in stored) == sum(parameter.numel() for parameter in subnet.parameters())


def test_extraction_between_folders_holds_no_more_than_the_subnet_in_memory(source, tmp_path):
    with mock.patch.object(SuperShaperForMaskedLM, "save_pretrained", autospec=True) as save:
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    for tensor in save.call_args.kwargs["state_dict"].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_tokenizer_comes_along(source, tokenizer, tmp_path):
    tokenizer.save_pretrained(source)
    extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    copied = AutoTokenizer.from_pretrained(tmp_path / "subnet")
    assert copied("the cat [MASK] .").input_ids == tokenizer("the cat [MASK] .").input_ids


def test_crash_while_saving_leaves_no_folder(source, tmp_path, monkeypatch):
    def crash(self, folder, **kwargs):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("disk full")

    monkeypatch.setattr(SuperShaperForMaskedLM, "save_pretrained", crash)
    with pytest.raises(RuntimeError, match="disk full"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    assert list(tmp_path.iterdir()) == [source]


def test_occupied_target_is_refused_before_anything_is_read(source):
    before = sorted(source.iterdir())
    with pytest.raises(FileExistsError, match="supernet exists and is not an empty folder"):
        extract_from_folder("missing", [8, 0, 36], source)
    assert sorted(source.iterdir()) == before


def test_wrong_shape_is_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(ValueError, match="width 40 of layer 2 is not one of the width choices"):
        extract_from_folder(source, [8, 20, 40], tmp_path / "subnet")
    assert list(tmp_path.iterdir()) == [source]


def test_subnet_folder_is_refused(source, tmp_path):
    extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    with pytest.raises(ValueError, match="it is not elastic"):
        extract_from_folder(tmp_path / "subnet", [8, 36], tmp_path / "again")


def test_folder_without_weights_is_refused(source, tmp_path):
    (source / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"needs model\.safetensors, or model\.safetensors\.index\.json and its shards"
    ):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


def test_truncated_weights_are_named(source, tmp_path):
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"model\.safetensors is damaged or cut short .* Copy the file again"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    assert list(tmp_path.iterdir()) == [source]


def test_weights_of_another_size_are_named(source, tmp_path):
    tiny_config(intermediate_size=96).save_pretrained(source)
    message = r"layer\.0\.intermediate\.dense\.weight is \[80, 48\], but config\.json says \[96, 48\]"
    with pytest.raises(ValueError, match=message):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


def test_weights_of_another_head_are_named(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["SuperShaperForQuestionAnswering"]}))
    with pytest.raises(ValueError, match="has no tensor 'qa_outputs"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


def test_unknown_head_is_named(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ValueError, match="holds a BertForMaskedLM; allowed: SuperShaperForMaskedLM"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
