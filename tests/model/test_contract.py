"""The tools of transformers work on supernets and subnets untouched."""

import pytest
import torch
import transformers
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
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

import supershaper_hf
from supershaper_hf import (
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
)


AUTO_CLASSES = {
    SuperShaperModel: AutoModel,
    SuperShaperForMaskedLM: AutoModelForMaskedLM,
    SuperShaperForSequenceClassification: AutoModelForSequenceClassification,
    SuperShaperForTokenClassification: AutoModelForTokenClassification,
    SuperShaperForQuestionAnswering: AutoModelForQuestionAnswering,
    SuperShaperForMultipleChoice: AutoModelForMultipleChoice,
}


@pytest.fixture(params=["supernet", "supernet by width", "subnet"])
def model(request, model_class):
    if request.param == "supernet by width":
        return tiny_model(model_class, **PER_HEAD_BY_WIDTH)
    supernet = tiny_model(model_class)
    return supernet if request.param == "supernet" else supernet.extract_subnet([8, 0, 36])


def test_attributes_of_a_head_of_bert_are_there(model, model_class):
    """Code that works on BERT reads them, such as `model.num_labels`."""
    bert = getattr(transformers, model_class.__name__.replace("SuperShaper", "Bert"))(tiny_bert_config())
    missing = {name for name in vars(bert) if not name.startswith("_")} - set(vars(model))
    assert not missing
    assert getattr(model, "num_labels", 2) == model.config.num_labels


# Saving and loading


# The last digit of an output depends on where the weights lie in memory: those of a file are not aligned as new ones.


def test_saved_model_loads_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(loaded.state_dict(), model.state_dict(), atol=0)
    assert_same(run(loaded, tiny_batch(type(model))), run(model, tiny_batch(type(model))))


def test_auto_class_loads_the_saved_head(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AUTO_CLASSES[type(model)].from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert_same(loaded.state_dict(), model.state_dict(), atol=0)
    assert_same(run(loaded, tiny_batch(type(model))), run(model, tiny_batch(type(model))))


@pytest.mark.parametrize("auto_class", AUTO_CLASSES.values(), ids=lambda auto_class: auto_class.__name__)
def test_every_auto_class_loads_a_masked_lm_folder(auto_class, tmp_path):
    pretrained = tiny_model().extract_subnet([8, 0, 36])
    pretrained.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert AUTO_CLASSES[type(loaded)] is auto_class
    assert_same(loaded.base_model.encoder.state_dict(), pretrained.bert.encoder.state_dict(), atol=0)


def test_tied_weights_are_stored_once(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = SuperShaperForMaskedLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    stored = load_file(tmp_path / "model.safetensors").values()
    assert sum(tensor.numel() for tensor in stored) == sum(parameter.numel() for parameter in model.parameters())


def test_untied_weights_survive_saving(tmp_path):
    model = tiny_model(tie_word_embeddings=False).extract_subnet([8, 0, 36])
    model.save_pretrained(tmp_path)
    assert_same(run(SuperShaperForMaskedLM.from_pretrained(tmp_path), tiny_batch()), run(model, tiny_batch()), atol=0)


def test_dtype_survives_saving(tmp_path):
    tiny_model().to(torch.bfloat16).extract_subnet([8, 0, 36]).save_pretrained(tmp_path)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_truncated_weights_are_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"are damaged or cut short .* Copy the file again"):
        SuperShaperForMaskedLM.from_pretrained(tmp_path)


def test_truncated_index_of_the_weights_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-100])
    with pytest.raises(OSError, match=r"are damaged or cut short .* Copy the file again"):
        SuperShaperForMaskedLM.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_config(intermediate_size=96).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        SuperShaperForMaskedLM.from_pretrained(tmp_path)


# Outputs


def test_tuple_and_dictionary_outputs_agree(model):
    batch = tiny_batch(type(model))
    options = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert_same(model(**batch, **options, return_dict=False), model(**batch, **options).to_tuple(), atol=0)


def test_configuration_can_ask_for_tuples(model_class):
    model, batch = tiny_model(model_class), tiny_batch(model_class)
    expected = model(**batch).to_tuple()
    model.config.return_dict = False
    assert_same(model(**batch), expected, atol=0)


def test_hidden_states_are_the_embeddings_and_each_kept_layer(model_class):
    batch = tiny_batch(model_class)
    hidden_states = tiny_model(model_class)(**batch, shape=[20, 0, 8], output_hidden_states=True).hidden_states
    sequences = batch["input_ids"].numel() // 9
    assert [tuple(state.shape) for state in hidden_states] == [
        (sequences, 9, 48),
        (sequences, 9, 20),
        (sequences, 9, 48),
    ]


@pytest.mark.parametrize("shape", [[20, 36, 8], [48, 8, 20]], ids=str)
def test_states_are_brought_to_the_hidden_size_as_the_docstring_says(shape, elasticity):
    """The state after layer i becomes what the supernet would return if layer i were its last."""
    model, batch = tiny_model(SuperShaperModel, **elasticity), tiny_batch()
    config, states = model.config, model(**batch, shape=shape, output_hidden_states=True).hidden_states
    for i, state in enumerate(states[1:-1]):
        assert state.shape[-1] == shape[i]
        state = model.base_model.encoder.leave(i, state)
        assert_same(state, model(**batch, shape=shape[: i + 1] + [0] * (2 - i)).last_hidden_state)
    assert states[-1].shape[-1] == config.hidden_size


def test_trainer_predicts_with_a_subnet_and_collects_its_states(tmp_path):
    """States of different widths are collected one by one."""
    subnet = tiny_model(output_hidden_states=True).extract_subnet([20, 36, 8])
    rows = [{name: values[row] for name, values in tiny_batch(batch=5).items()} for row in range(5)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to="none", dataloader_pin_memory=False
    )
    logits, hidden_states = Trainer(subnet, arguments).predict(rows).predictions
    assert logits.shape == (5, 9, 61)
    assert [state.shape for state in hidden_states] == [(5, 9, 48), (5, 9, 20), (5, 9, 36), (5, 9, 48)]


def test_last_hidden_state_is_the_last_of_the_hidden_states():
    output = tiny_model(SuperShaperModel)(**tiny_batch(), shape=[20, 0, 8], output_hidden_states=True)
    assert output.last_hidden_state is output.hidden_states[-1]


def test_attentions_are_one_per_kept_layer_and_sum_to_one(model_class):
    batch = tiny_batch(model_class)
    supernet = tiny_model(model_class, attn_implementation="eager")
    attentions = supernet(**batch, shape=[20, 0, 8], output_attentions=True).attentions
    sequences = batch["input_ids"].numel() // 9
    assert [tuple(weights.shape) for weights in attentions] == [(sequences, 4, 9, 9)] * 2
    for weights in attentions:
        assert_same(weights.sum(-1), torch.ones(sequences, 4, 9))
        assert not weights[-1, :, :, -3:].any()  # padding


# flash_attention_2 is declared as supported, but needs a GPU.
@pytest.mark.parametrize("shape", [[48, 48, 48], [8, 0, 36]], ids=str)
@pytest.mark.parametrize(
    "implementation",
    [
        "sdpa",
        pytest.param(
            "flex_attention",
            marks=[
                # transformers and torch call deprecated parts of torch, and flex attention warns when not compiled.
                pytest.mark.filterwarnings("ignore::DeprecationWarning"),
                pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
            ],
        ),
    ],
)
def test_attention_implementations_agree(implementation, shape, elasticity):
    supernet, batch = tiny_model(**elasticity, attn_implementation="eager"), tiny_batch()
    expected = run(supernet, batch, shape=shape)
    supernet.set_attn_implementation(implementation)
    with torch.compiler.set_stance("force_eager"):  # compiling flex attention takes half a minute
        assert_same(run(supernet, batch, shape=shape), expected)


# Inputs


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_changes_nothing(implementation):
    supernet, batch = tiny_model(attn_implementation=implementation), tiny_batch(length=9)
    alone = {name: tensor[-1:, :6] for name, tensor in batch.items()}
    padded, unpadded = run(supernet, batch, shape=[8, 0, 36])[0], run(supernet, alone, shape=[8, 0, 36])[0]
    assert_same(padded[-1:, :6], unpadded)


def test_left_out_inputs_have_berts_defaults(model_class):
    model, ids = tiny_model(model_class), tiny_batch(model_class)["input_ids"]
    positions = torch.arange(9).expand(ids.shape)
    spelled_out = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    expected = run(model, {"input_ids": ids, "position_ids": positions, **spelled_out})
    assert_same(run(model, {"input_ids": ids}), expected)


def test_token_types_and_positions_matter():
    model, ids = tiny_model(), tiny_batch()["input_ids"]
    plain = run(model, {"input_ids": ids})[0]
    for inputs in ({"token_type_ids": torch.ones_like(ids)}, {"position_ids": torch.arange(9).flip(0)[None]}):
        assert (run(model, {"input_ids": ids, **inputs})[0] - plain).abs().max() > 0.1


def test_input_embeddings_stand_in_for_ids(model):
    batch = tiny_batch(type(model))
    expected = run(model, batch)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    assert_same(run(model, {"inputs_embeds": embeddings, **batch}), expected)


@pytest.mark.parametrize("inputs", [{}, {"input_ids": torch.ones(1, 3).long(), "inputs_embeds": torch.ones(1, 3, 48)}])
def test_ids_or_embeddings_are_needed_not_both(inputs):
    with pytest.raises(ValueError, match="Give exactly one of input_ids and inputs_embeds"):
        tiny_model()(**inputs)


def test_longest_input_has_as_many_tokens_as_positions(model_class):
    tiny_model(model_class)(**tiny_batch(model_class, length=24))
    with pytest.raises(ValueError, match=r"25 tokens long, but the model has max_position_embeddings=24\. Truncate"):
        tiny_model(model_class)(**tiny_batch(model_class, length=25))


# Losses


LABELS = {
    "MaskedLM": ({}, {"labels": torch.tensor([[5, -100, 7] * 3, [-100] * 8 + [60]])}),
    "SequenceClassification one label": ({"num_labels": 3}, {"labels": torch.tensor([2, 0])}),
    "SequenceClassification several labels": ({"num_labels": 3}, {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]])}),
    "SequenceClassification regression": ({"num_labels": 1}, {"labels": torch.tensor([0.7, -2.0])}),
    "TokenClassification": ({"num_labels": 3}, {"labels": torch.tensor([[0, 1, 2] * 3, [2] * 6 + [-100] * 3])}),
    "QuestionAnswering": ({}, {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 5])}),
    "QuestionAnswering outside": (
        {},
        {"start_positions": torch.tensor([1, 9]), "end_positions": torch.tensor([3, 12])},
    ),
    "MultipleChoice": ({}, {"labels": torch.tensor([2, 0])}),
}


@pytest.mark.parametrize("task", LABELS)
def test_loss_and_its_gradients_are_berts(task):
    head = task.split()[0]
    changes, labels = LABELS[task]
    bert = randomize(getattr(transformers, f"BertFor{head}")(tiny_bert_config(**changes)))
    supernet_class = getattr(supershaper_hf, f"SuperShaperFor{head}")
    supernet = supernet_class.from_bert(bert)
    batch = tiny_batch(supernet_class)
    expected, actual = bert(**batch, **labels), supernet(**batch, **labels)
    assert_same(actual.to_tuple(), expected.to_tuple())
    expected.loss.backward()
    actual.loss.backward()
    assert_same(supernet.get_input_embeddings().weight.grad, bert.get_input_embeddings().weight.grad)


def test_sparse_prediction_gives_the_loss_and_logits_of_the_labelled_positions():
    labels = torch.tensor([[5, -100, 7] * 3, [-100] * 8 + [60]])
    model, inputs = tiny_model(), {**tiny_batch(), "labels": labels, "shape": [8, 0, 36]}
    expected, actual = model(**inputs), model(**inputs, sparse_prediction=True)
    assert_same(actual.loss, expected.loss)
    assert_same(actual.logits, expected.logits[labels != -100])
    assert actual.logits.shape == (7, 61)


def test_sparse_prediction_without_labels_predicts_everywhere():
    assert tiny_model()(**tiny_batch(), sparse_prediction=True).logits.shape == (2, 9, 61)


@pytest.mark.parametrize("shape", [[48, 48, 48], [20, 0, 36]], ids=str)
def test_supernet_overfits_one_batch(shape):
    supernet = SuperShaperForMaskedLM(tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=3e-3)
    batch = tiny_batch()
    for _ in range(60):
        loss = supernet(**batch, labels=batch["input_ids"], shape=shape).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def test_forward_and_backward_run_under_bfloat16_autocast(elasticity):
    supernet, batch = tiny_model(**elasticity), tiny_batch()
    expected = supernet(**batch, labels=batch["input_ids"], shape=[8, 0, 36]).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = supernet(**batch, labels=batch["input_ids"], shape=[8, 0, 36])
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert supernet.bert.encoder.layer[0].intermediate.dense.weight.grad.isfinite().all()


# Resizing the vocabulary


@pytest.mark.parametrize("size", [67, 55])
@pytest.mark.parametrize("subnet", [False, True], ids=["supernet", "subnet"])
def test_resized_vocabulary_survives_saving(subnet, size, tmp_path):
    model = tiny_model().extract_subnet([8, 0, 36]) if subnet else tiny_model()
    batch = {"input_ids": tiny_batch()["input_ids"].clamp(max=54)}
    before = run(model, batch)[0]
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    loaded = SuperShaperForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == size
    assert loaded.get_output_embeddings().bias.shape == (size,)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert_same(run(loaded, batch)[0][..., :55], before[..., :55])
    assert_same(run(loaded, batch), run(model, batch), atol=0)


def test_supernet_with_resized_vocabulary_is_cut():
    supernet, batch = tiny_model(), tiny_batch()
    supernet.resize_token_embeddings(67)
    subnet = supernet.extract_subnet([8, 0, 36])
    assert subnet.config.vocab_size == 67
    assert_same(run(subnet, batch), run(supernet, batch, shape=[8, 0, 36]))
