"""Super pre-training without labels: the original, which does not change, is the only teacher."""

import re

import pytest
import torch
from conftest import assert_same, randomize, tiny_bert_config, tiny_model
from texts import original_tokens, random_documents
from training_runs import NO_DROPOUT, copied_weights, losses, pretrain, step_records
from transformers import BertModel

from supershaper_hf import SuperShaperForMultipleChoice, SuperShaperModel
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.training.distillation import OutsideTeacher
from supershaper_hf.training.losses import state_loss


pytestmark = pytest.mark.usefixtures("no_measured_peak")

WITHOUT_LABELS = {"mlm_probability": 0, "state_weight": 1.0}


def original():
    return OutsideTeacher(randomize(BertModel(tiny_bert_config()), seed=1))


def bare_model():
    return tiny_model(SuperShaperModel)


@pytest.fixture
def plain_batches(tokenizer):
    return fixed_masks(tokenize(random_documents(4, seed=1), tokenizer, 12), tokenizer, 8, mlm_probability=0)


@pytest.mark.parametrize("sampling", ["sandwich", "smallest", "random"])
def test_error_of_the_last_hidden_state_falls_without_labels(tokenizer, dataset, plain_batches, sampling):
    model = SuperShaperModel.from_bert(original().model, width_choices=[8, 20, 36, 48])
    changes = WITHOUT_LABELS | {"max_steps": 40, "learning_rate": 5e-3, "eval_steps": 20}
    changes |= {"sampling": sampling, "pooled_weight": 1.0, "no_dropout": True}
    _, summary = pretrain(tokenizer, dataset, model, plain_batches, original(), **changes)
    first, *_, last = losses(summary)
    assert last[-1] < 0.7 * first[-1]
    before, after = (record["evaluation"] for record in summary.log_history if "evaluation" in record)
    assert after["smallest"]["distance"] < before["smallest"]["distance"]
    assert after["smallest"].keys() == {"distance", "cosine"}
    assert summary.progress.labelled == 0


def test_recorded_losses_without_labels_are_those_of_the_states(tokenizer, dataset, steps):
    teacher = original()
    _, summary = pretrain(tokenizer, dataset, tiny_model(**NO_DROPOUT), teacher=teacher, max_steps=2, **WITHOUT_LABELS)
    for call, record in zip(steps, step_records(summary), strict=True):
        assert not call["objective"].labels
        model, batch = tiny_model(**NO_DROPOUT), call["batches"][0]
        model.load_state_dict(call["weights"])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = [
                state_loss(
                    model.bert(**inputs, shape=shape).last_hidden_state, teacher(batch).state, batch["attention_mask"]
                ).item()
                for shape in call["shapes"]
            ]
        assert record["loss"] == pytest.approx(expected, abs=1e-5)
        assert_same(original_tokens(batch), batch["input_ids"], atol=0)


def test_head_neither_learns_nor_decays_without_labels(tokenizer, dataset):
    model = tiny_model()
    before = copied_weights(model)
    pretrain(tokenizer, dataset, model, teacher=original(), weight_decay=0.1, **WITHOUT_LABELS)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    tied = "cls.predictions.decoder.weight"  # the word embeddings, which learn
    assert {name for name in moved if name.startswith("cls.")} == {tied}
    assert moved >= {name for name in before if name.startswith("bert.embeddings.")}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameters_that_were_frozen_stay_so(tokenizer, dataset):
    model = tiny_model()
    model.cls["predictions"].decoder.bias.requires_grad_(False)
    pretrain(tokenizer, dataset, model, teacher=original(), max_steps=1, **WITHOUT_LABELS)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["cls.predictions.decoder.bias"]


def test_bare_model_and_head_learn_alike(tokenizer, dataset):
    bare, _ = pretrain(tokenizer, dataset, bare_model(), teacher=original(), **WITHOUT_LABELS)
    model = tiny_model()
    model.bert.load_state_dict(bare_model().state_dict(), strict=False)
    pretrain(tokenizer, dataset, model, teacher=original(), **WITHOUT_LABELS)
    trained = bare.state_dict()
    assert_same(model.bert.state_dict(), {name: trained[name] for name in model.bert.state_dict()}, atol=0)


def test_model_without_a_vocabulary_cannot_predict_tokens(tokenizer, dataset):
    message = (
        "SuperShaperModel has no masked-LM head, which mlm_probability=0.15 needs. Use SuperShaperForMaskedLM, or "
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(tokenizer, dataset, bare_model())


def test_multiple_choice_is_refused(tokenizer, dataset):
    with pytest.raises(ValueError, match=r"SuperShaperForMultipleChoice reads several sequences at once.*model\.bert"):
        pretrain(tokenizer, dataset, tiny_model(SuperShaperForMultipleChoice), teacher=original(), **WITHOUT_LABELS)


def test_labels_and_the_original_teach_together(tokenizer, dataset, eval_batches):
    alone, _ = pretrain(tokenizer, dataset)
    model, summary = pretrain(tokenizer, dataset, None, eval_batches, original(), state_weight=1.0)
    assert summary.evaluation["largest"].keys() == {"loss", "perplexity", "accuracy"}
    for name in ("bert.encoder.layer.2.output.dense.weight", "cls.predictions.transform.dense.weight"):
        assert not torch.equal(model.state_dict()[name], alone.state_dict()[name])
