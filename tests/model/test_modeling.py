from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    PER_HEAD_BY_WIDTH,
    assert_same,
    randomize,
    run,
    tiny_batch,
    tiny_bert_config,
    tiny_config,
    tiny_model,
)
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer

from supershaper_hf import (
    SuperShaperForMaskedLM,
    SuperShaperForSequenceClassification,
    SuperShaperModel,
)
from supershaper_hf.model import elastic
from supershaper_hf.model.elastic import SuperShaperAttention


SHAPES = [[8, 20, 36], [48, 48, 48], [0, 36, 8], [20, 0, 48], [36, 8, 0], [0, 20, 0]]

# The query, key and value channels that a layer keeps at width 20, written out: 4 heads of 12 narrowed to 5.
HEAD_CHANNELS_AT_20 = {
    "prefix": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19],
    "per_head": [0, 1, 2, 3, 4, 12, 13, 14, 15, 16, 24, 25, 26, 27, 28, 36, 37, 38, 39, 40],
}


def kept_at_20(head_slicing):
    """Name of each part of a layer -> the rows and columns of its weight that are kept at width 20."""
    first, heads = list(range(20)), HEAD_CHANNELS_AT_20[head_slicing]
    return {
        "attention.self.query": (heads, first),
        "attention.self.key": (heads, first),
        "attention.self.value": (heads, first),
        "attention.output.dense": (first, heads),
        "attention.output.LayerNorm": (first,),
        "intermediate.dense": (list(range(80)), first),
        "output.dense": (first, list(range(80))),
        "output.LayerNorm": (first,),
    }


# A subnet equals its supernet


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subnet_equals_supernet_layer_by_layer(model_class, elasticity, shape):
    supernet, batch = tiny_model(model_class, **elasticity), tiny_batch(model_class)
    subnet = supernet.extract_subnet(shape)
    actual = run(subnet, batch, output_hidden_states=True)
    assert_same(actual, run(supernet, batch, shape=shape, output_hidden_states=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subnet_equals_supernet_with_eager_attention(elasticity, shape):
    supernet, batch = tiny_model(**elasticity, attn_implementation="eager"), tiny_batch()
    subnet = supernet.extract_subnet(shape)
    actual = run(subnet, batch, output_attentions=True)
    assert_same(actual, run(supernet, batch, shape=shape, output_attentions=True))


@pytest.mark.parametrize(("length", "merges"), [(6, 0), (17, 1), (18, 2)])
def test_supernet_merges_bottlenecks_where_that_is_cheaper(length, merges, elasticity):
    """At shape [8, 20, 36] merging pays from 7 tokens between the first layers, from 18 between the last."""
    supernet, batch = tiny_model(**elasticity), tiny_batch(batch=1, length=length)
    expected = run(supernet.extract_subnet([8, 20, 36]), batch)
    with mock.patch.object(elastic, "merge", wraps=elastic.merge) as merge:
        actual = run(supernet, batch, shape=[8, 20, 36])
    assert merge.call_count == merges
    assert_same(actual, expected)


def test_no_shape_is_the_full_shape(model_class):
    supernet, batch = tiny_model(model_class), tiny_batch(model_class)
    assert_same(run(supernet, batch), run(supernet, batch, shape=[48, 48, 48]), atol=0)


def test_supernet_remembers_no_shape():
    supernet, batch = tiny_model(), tiny_batch()
    before = run(supernet, batch)
    run(supernet, batch, shape=[8, 0, 36])
    assert_same(run(supernet, batch), before, atol=0)


def test_untied_subnet_equals_supernet():
    supernet, batch = tiny_model(tie_word_embeddings=False), tiny_batch()
    subnet = supernet.extract_subnet([8, 0, 36])
    assert not torch.equal(subnet.get_output_embeddings().weight, subnet.get_input_embeddings().weight)
    assert_same(run(subnet, batch), run(supernet, batch, shape=[8, 0, 36]))


def test_base_model_without_pooler():
    supernet, batch = randomize(SuperShaperModel(tiny_config(), add_pooling_layer=False)), tiny_batch()
    subnet = supernet.extract_subnet([8, 0, 36])
    assert subnet.pooler is None
    assert_same(run(subnet, batch), run(supernet, batch, shape=[8, 0, 36]))


def test_file_of_a_masked_lm_may_hold_a_pooler_for_other_heads(tmp_path):
    """As the files of Google's BERTs do. The masked LM loads without a word about it."""
    model, pooled = tiny_model(), randomize(SuperShaperModel(tiny_config()))
    pooler = {f"bert.{name}": tensor for name, tensor in pooled.state_dict().items() if name.startswith("pooler.")}
    assert len(pooler) == 2
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), **pooler})
    _, info = SuperShaperForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("unexpected_keys", "missing_keys"))
    loaded, info = SuperShaperForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    for name, tensor in pooler.items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    _, info = SuperShaperModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("unexpected_keys", "missing_keys"))


# What a subnet is made of


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layer_of_a_subnet_is_a_bert_layer_of_its_width(elasticity, attention):
    supernet = tiny_model(**elasticity, attn_implementation=attention)
    layer = supernet.extract_subnet([8, 20, 36]).bert.encoder.layer[1]
    bert_layer = BertLayer(tiny_bert_config(hidden_size=20, attn_implementation=attention)).eval()
    bert_layer.load_state_dict(layer.state_dict())
    hidden_states = torch.randn(2, 9, 20)
    mask = torch.zeros(2, 1, 9, 9)
    mask[1, ..., -3:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        assert_same(layer(hidden_states, mask), bert_layer(hidden_states, mask))


def test_layer_of_a_subnet_keeps_the_chosen_channels(head_slicing):
    supernet = tiny_model(head_slicing=head_slicing)
    whole, cut = supernet.bert.encoder.layer[1], supernet.extract_subnet([8, 20, 36]).bert.encoder.layer[1]
    for name, kept in kept_at_20(head_slicing).items():
        assert_same(cut.get_submodule(name).weight, whole.get_submodule(name).weight[np.ix_(*kept)], atol=0)
        assert_same(cut.get_submodule(name).bias, whole.get_submodule(name).bias[kept[0]], atol=0)


def test_bottlenecks_of_a_subnet_are_those_of_the_kept_layers_multiplied():
    supernet = tiny_model()
    whole, cut = supernet.bert.encoder, supernet.extract_subnet([8, 0, 36]).bert.encoder
    hidden = torch.randn(5, 48)
    narrow, wide = hidden[:, :8], hidden[:, :36]
    with torch.no_grad():
        into_first = whole.input_bottleneck[0](hidden)[:, :8]
        padded = nn.functional.pad(narrow, (0, 40))
        between = whole.input_bottleneck[2](whole.output_bottleneck[0](padded))[:, :36]
        out_of_last = whole.output_bottleneck[2](nn.functional.pad(wide, (0, 12)))
        assert_same(cut.input_bottleneck[0](hidden), into_first)
        assert_same(cut.input_bottleneck[1](narrow), between)
        assert_same(cut.output_bottleneck[0](wide), out_of_last)
    assert (len(cut.input_bottleneck), len(cut.layer), len(cut.output_bottleneck)) == (2, 2, 1)


def decoded(code, inputs):
    """The state that a code stands for: x_rest = R z + c, and x_kept = z - S x_rest."""
    rest = code.reader(inputs)
    return torch.cat([inputs - code.writer(rest), rest], dim=-1)


def coded(code, states):
    width = code.writer.out_features
    return states[..., :width] + code.writer(states[..., width:])


def test_subnet_holds_the_products_with_what_its_widths_alone_have():
    """A narrow layer reads the state that its code stands for, and writes the code of what it computes."""
    supernet = tiny_model(**PER_HEAD_BY_WIDTH)
    whole, cut = supernet.bert.encoder, supernet.extract_subnet([8, 0, 20]).bert.encoder
    inputs, heads, own = torch.randn(5, 20), HEAD_CHANNELS_AT_20["per_head"], whole.by_width[2]["20"]
    layer, narrow_layer = whole.layer[2], cut.layer[1]
    attention, intermediate = own.attention_code, own.intermediate_code
    with torch.no_grad():
        for part, code, rows, factor in (
            ("attention.self.query", attention, heads, (20 / 48) ** 0.5),
            ("attention.self.key", attention, heads, 1),
            ("attention.self.value", attention, heads, 1),
            ("intermediate.dense", intermediate, slice(None), 1),
        ):
            expected = layer.get_submodule(part)(decoded(code, inputs))[:, rows] * factor
            assert_same(narrow_layer.get_submodule(part)(inputs), expected)
        context, activations = torch.zeros(5, 48), torch.randn(5, 80)
        context[:, heads] = inputs
        expected = coded(attention, layer.attention.output.dense(context))
        assert_same(narrow_layer.attention.output.dense(inputs), expected)
        assert_same(narrow_layer.output.dense(activations), coded(intermediate, layer.output.dense(activations)))
        expected = coded(intermediate, layer.attention.output.LayerNorm.bias)
        assert_same(narrow_layer.attention.output.LayerNorm.bias, expected)
        between = whole.input_bottleneck[2](whole.by_width[0]["8"].output_bottleneck(inputs[:, :8]))
        assert_same(cut.input_bottleneck[1](inputs[:, :8]), coded(attention, between))
        assert_same(cut.output_bottleneck[0](inputs), own.output_bottleneck(inputs))
    names = [name for name, _ in supernet.extract_subnet([8, 0, 20]).named_parameters()]
    assert not any("by_width" in name or "_code." in name for name in names)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_new_supernet_by_width_computes_as_with_shared_bottlenecks(shape, head_slicing):
    batch = tiny_batch()
    shared, by_width = (
        SuperShaperForMaskedLM(tiny_config(head_slicing=head_slicing, bottlenecks=bottlenecks)).eval()
        for bottlenecks in ("shared", "by_width")
    )
    by_width.load_state_dict(shared.state_dict(), strict=False)
    assert_same(run(by_width, batch, shape=shape), run(shared, batch, shape=shape), atol=1e-6)


def test_scores_are_scaled_by_the_full_head_if_the_configuration_says_so():
    """At width 20 a head has 5 channels, and 12 at full width."""
    plain = tiny_model(attn_implementation="eager")
    scaled = tiny_model(attn_implementation="eager", full_head_scale=True)
    with torch.no_grad():
        plain.bert.encoder.layer[0].attention.self.query.weight *= (5 / 12) ** 0.5
        plain.bert.encoder.layer[0].attention.self.query.bias *= (5 / 12) ** 0.5
    states = torch.randn(2, 9, 20)
    expected, actual = (model.bert.encoder.layer[0].attention.self(states, None) for model in (plain, scaled))
    assert_same(actual, expected)


def test_new_supernet_starts_from_identity_bottlenecks():
    encoder = SuperShaperForMaskedLM(tiny_config(bottlenecks="by_width")).bert.encoder
    for bottleneck in [*encoder.input_bottleneck, *encoder.output_bottleneck]:
        assert torch.equal(bottleneck.weight, torch.eye(48))
        assert not bottleneck.bias.any()
    for layer in encoder.by_width:
        assert list(layer) == ["8", "20", "36"]
        for width, narrow in layer.items():
            assert torch.equal(narrow.output_bottleneck.weight, torch.eye(48)[:, : int(width)])
            assert not any(parameter.any() for parameter in narrow.attention_code.parameters())
            assert not any(parameter.any() for parameter in narrow.intermediate_code.parameters())


def test_new_layer_norms_and_embeddings_are_initialised_as_in_bert():
    model = SuperShaperModel(tiny_config(initializer_range=0.5))
    assert torch.equal(model.embeddings.LayerNorm.weight, torch.ones(48))
    assert model.encoder.layer[0].intermediate.dense.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert model.embeddings.position_embeddings.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert not model.embeddings.word_embeddings.weight[0].any()


# Extraction


def test_subnet_is_of_the_same_class_and_in_evaluation_mode(model_class):
    supernet = tiny_model(model_class).train()
    subnet = supernet.extract_subnet([8, 0, 36])
    assert type(subnet) is model_class
    assert not any(module.training for module in subnet.modules())
    assert supernet.training


def test_subnet_keeps_the_dtype(model_class):
    subnet = tiny_model(model_class).to(torch.bfloat16).extract_subnet([8, 0, 36])
    assert {tensor.dtype for tensor in subnet.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("shape", [[8, 0, 36], [48, 48, 48]], ids=str)
def test_subnet_owns_its_memory_and_no_more(model_class, shape):
    supernet = tiny_model(model_class)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in supernet.state_dict().values()}
    for tensor in supernet.extract_subnet(shape).state_dict().values():
        storage = tensor.untyped_storage()
        assert storage.data_ptr() not in theirs
        assert storage.nbytes() == tensor.numel() * tensor.itemsize
        assert tensor.is_contiguous()


def test_changing_a_subnet_leaves_the_supernet_alone(model_class):
    supernet, batch = tiny_model(model_class), tiny_batch(model_class)
    before = run(supernet, batch)
    randomize(supernet.extract_subnet([48, 48, 48]), seed=1)
    assert_same(run(supernet, batch), before, atol=0)


def test_subnet_ties_its_own_embeddings():
    subnet = tiny_model().extract_subnet([8, 0, 36])
    assert subnet.get_output_embeddings().weight is subnet.get_input_embeddings().weight


def test_subnet_keeps_labels_and_problem_type():
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    supernet = tiny_model(
        SuperShaperForSequenceClassification, id2label=labels, problem_type="multi_label_classification"
    )
    config = supernet.extract_subnet([8, 0, 36]).config
    assert config.id2label == labels
    assert config.problem_type == "multi_label_classification"


def test_subnet_can_be_trained(model_class):
    subnet = tiny_model(model_class).extract_subnet([8, 0, 36])
    subnet(**tiny_batch(model_class))[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in subnet.base_model.encoder.parameters())


@pytest.mark.parametrize("frozen", ["", "embeddings", "layer.0."], ids=["everything", "embeddings", "a layer"])
def test_parameters_of_a_subnet_are_trainable_where_those_of_the_supernet_are_frozen(frozen, model_class):
    supernet = tiny_model(model_class)
    for name, parameter in supernet.named_parameters():
        parameter.requires_grad_(frozen not in name)
    before = [parameter.requires_grad for parameter in supernet.parameters()]
    assert not all(before)
    assert all(parameter.requires_grad for parameter in supernet.extract_subnet([8, 0, 36]).parameters())
    assert [parameter.requires_grad for parameter in supernet.parameters()] == before


def test_subnet_takes_no_shape(model_class):
    subnet = tiny_model(model_class).extract_subnet([8, 0, 36])
    with pytest.raises(ValueError, match=r"it is not elastic\. Pass shape to the supernet it was cut from"):
        subnet(**tiny_batch(model_class), shape=[8, 36])
    with pytest.raises(ValueError, match="it is not elastic"):
        subnet.extract_subnet([8, 36])


def test_wrong_shape_is_refused_by_every_head(model_class):
    supernet = tiny_model(model_class)
    with pytest.raises(ValueError, match="width 40 of layer 3 is not one of the width choices"):
        supernet(**tiny_batch(model_class), shape=[8, 20, 40])
    with pytest.raises(ValueError, match="width 40 of layer 3 is not one of the width choices"):
        supernet.extract_subnet([8, 20, 40])


def test_publishing_options_need_a_repository():
    with pytest.raises(TypeError, match=r"\['private', 'token'\] only make sense with repo_id='user/name'"):
        tiny_model().extract_subnet([8, 0, 36], token="secret", private=True)


# Gradients


def gradients(supernet, *shapes):
    """Gradients of the summed losses at `shapes`, all forward passes before the one backward pass."""
    batch = tiny_batch()
    supernet.zero_grad()
    torch.manual_seed(0)
    sum(supernet(**batch, labels=batch["input_ids"], shape=shape).loss for shape in shapes).backward()
    return {name: parameter.grad for name, parameter in supernet.named_parameters() if parameter.grad is not None}


def test_two_shapes_before_one_backward_give_the_sum_of_their_gradients(elasticity):
    supernet = tiny_model(**elasticity, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    first, second = gradients(supernet, [8, 20, 36]), gradients(supernet, [36, 0, 8])
    total = {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}
    assert_same(gradients(supernet, [8, 20, 36], [36, 0, 8]), total)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(elasticity, use_reentrant):
    supernet = tiny_model(**elasticity).train()
    expected = gradients(supernet, [8, 20, 36], [36, 0, 8])
    # Renamed in transformers 5.2x; the old name is deprecated in the newest and the only one in the oldest supported.
    newest = hasattr(supernet, "activation_checkpointing_enable")
    enable = supernet.activation_checkpointing_enable if newest else supernet.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    with mock.patch.object(
        SuperShaperAttention, "forward", autospec=True, side_effect=SuperShaperAttention.forward
    ) as forward:
        actual = gradients(supernet, [8, 20, 36], [36, 0, 8])
    assert forward.call_count == 2 * 5  # each layer ran again in the backward pass
    for name, gradient in expected.items():
        # A writer is used outside the layer too, so the parts of its gradient are added up in another order.
        assert_same(actual[name], gradient, atol=1e-7 if name.endswith("writer.weight") else 0)


def test_gradients_are_zero_outside_the_slice(head_slicing):
    supernet = tiny_model(head_slicing=head_slicing)
    gradients(supernet, [48, 20, 48])
    layer, encoder = supernet.bert.encoder.layer[1], supernet.bert.encoder
    everything = list(range(48))
    kept = {layer.get_submodule(name).weight: channels for name, channels in kept_at_20(head_slicing).items()}
    kept[encoder.input_bottleneck[1].weight] = (list(range(20)), everything)
    kept[encoder.output_bottleneck[1].weight] = (everything, list(range(20)))
    for weight, channels in kept.items():
        assert weight.grad[np.ix_(*channels)].any()
        weight.grad[np.ix_(*channels)] = 0
        assert not weight.grad.any()


def test_dropped_layer_has_no_gradient(elasticity):
    used = gradients(tiny_model(**elasticity), [8, 0, 36])
    assert any("encoder.layer.0." in name for name in used)
    assert not any("encoder.layer.1." in name or "bottleneck.1." in name for name in used)


def test_what_a_width_alone_has_is_trained_by_shapes_of_this_width():
    used = gradients(tiny_model(bottlenecks="by_width"), [8, 48, 36])
    widths = {name.partition("by_width.")[2][:4].rstrip(".") for name in used if "by_width." in name}
    assert widths == {"0.8", "2.36"}
    assert all(used[name].any() for name in used if "by_width." in name)
