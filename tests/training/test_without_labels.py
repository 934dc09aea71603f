"""Super pre-training without labels: the original, which does not change, is the only teacher."""

import re

import pytest
import torch
from conftest import assert_same, randomize, tiny_bert_config, tiny_model
from safetensors.torch import load_file
from texts import original_tokens, random_documents
from training_runs import NO_DROPOUT, arguments, copied_weights, losses, pretrain, step_records
from transformers import AutoModel, BertModel

from supershaper_hf import SuperShaperForMultipleChoice, SuperShaperModel
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.training import loop as training_module
from supershaper_hf.training.losses import state_loss
from supershaper_hf.training.preparing import make_optimizer
from supershaper_hf.training.sandwich import sandwich_step
from supershaper_hf.training.teacher import OutsideTeacher


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


def test_only_the_encoder_learns_or_decays_without_labels(tokenizer, dataset):
    model = tiny_model()
    before = copied_weights(model)
    pretrain(tokenizer, dataset, model, teacher=original(), weight_decay=0.1, **WITHOUT_LABELS)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".encoder." in name}
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


# Weights that all widths share, and weights by width


def by_width_model(**changes):
    return tiny_model(SuperShaperModel, bottlenecks="by_width", **NO_DROPOUT, **changes)


@pytest.mark.parametrize("sampling", ["sandwich", "smallest"])
def test_frozen_shared_weights_keep_the_largest_shape_as_it_is(tokenizer, dataset, sampling):
    """In a sandwich the largest shape then has nothing that learns."""
    model = by_width_model()
    before = copied_weights(model)
    changes = WITHOUT_LABELS | {"shared_learning_rate_scale": 0.0, "weight_decay": 0.1, "sampling": sampling}
    _, summary = pretrain(tokenizer, dataset, model, teacher=original(), max_steps=20, **changes)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".by_width." in name}
    assert all(parameter.requires_grad for parameter in model.parameters())
    smallest = [values[-2] for values in losses(summary)]
    assert smallest[-1] < smallest[0]


def test_only_weights_by_width_can_learn_alone(tokenizer, dataset):
    message = (
        "No parameter is left to learn: mlm_probability=0.0, shared_learning_rate_scale=0.0, bottlenecks='shared'. "
        "With shared_learning_rate_scale=0 only weights by width learn: use a supernet with bottlenecks='by_width'."
    )
    model = bare_model()
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(tokenizer, dataset, model, teacher=original(), shared_learning_rate_scale=0.0, **WITHOUT_LABELS)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_scale_is_that_of_the_learning_rate_of_shared_weights(tokenizer, dataset, monkeypatch):
    """The first update of AdamW has the size of the learning rate, and so has its weight decay."""
    runs = []
    for scale in (1.0, 0.25):
        model = by_width_model()
        before = copied_weights(model)
        changes = {"shared_learning_rate_scale": scale, "warmup_steps": 0.0, "weight_decay": 0.1, "max_steps": 1}
        _, summary = pretrain(tokenizer, dataset, model, teacher=original(), **changes, **WITHOUT_LABELS)
        assert [record["learning_rate"] for record in step_records(summary)] == [1e-3]
        runs.append({name: tensor - before[name] for name, tensor in model.state_dict().items()})
    plain, scaled = runs
    assert any(plain[name].any() for name in plain if ".by_width." in name)
    expected = {name: change if ".by_width." in name else 0.25 * change for name, change in plain.items()}
    assert_same(scaled, expected, atol=1e-6)


def test_every_parameter_is_in_one_group_with_its_scale():
    model = by_width_model()
    optimizer = make_optimizer(model, arguments(shared_learning_rate_scale=0.5, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        name: (1.0 if ".by_width." in name else 0.5, 0.1 if parameter.ndim >= 2 else 0.0)
        for name, parameter in model.named_parameters()
    }


# Going on


def test_run_without_labels_goes_on_exactly(tokenizer, dataset, plain_batches, tmp_path, monkeypatch):
    """With weights by width that not every step uses, and an evaluation before and after the stop."""
    changes = WITHOUT_LABELS | {"shared_learning_rate_scale": 0.1, "pooled_weight": 0.5, "drop_rate": 0.5, "seed": 1}
    changes |= {"max_steps": 6, "eval_steps": 2, "save_steps": 3, "sampling": "random", "no_dropout": True}

    def train(name):
        run = {**changes, "output_dir": str(tmp_path / name)}
        return pretrain(tokenizer, dataset, by_width_model(), plain_batches, original(), **run)

    whole, expected = train("whole")
    with monkeypatch.context() as broken:
        broken.setattr(training_module, "sandwich_step", power_cut_at(4))
        with pytest.raises(RuntimeError, match="power cut"):
            train("stopped")
    resumed, summary = train("stopped")
    assert_same(resumed.state_dict(), whole.state_dict(), atol=0)
    assert losses(summary) == losses(expected)
    assert summary.evaluation == expected.evaluation
    progress = summary.progress
    assert (progress.best_loss, progress.best_step) == (expected.progress.best_loss, expected.progress.best_step)
    file = "checkpoint-00000006/optimizer.safetensors"
    moments = [load_file(tmp_path / name / file) for name in ("whole", "stopped")]
    assert_same(*moments, atol=0)
    assert len({int(value) for name, value in moments[0].items() if name.endswith("/step")}) > 1
    best = AutoModel.from_pretrained(tmp_path / "whole" / "best")
    assert type(best) is SuperShaperModel
    assert "Distillation from a frozen model without labels" in (tmp_path / "whole" / "best" / "README.md").read_text()


def power_cut_at(number):
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == number + 1:
            raise RuntimeError("power cut")
        return sandwich_step(*args)

    return fail


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state_weight", 2.0),
        ("pooled_weight", 0.5),
        ("pooling", "cls"),
        ("no_dropout", True),
        ("shared_learning_rate_scale", 0.5),
    ],
)
def test_new_value_is_applied_from_the_next_step_on_and_named(tokenizer, dataset, tmp_path, warnings, name, value):
    changes = WITHOUT_LABELS | {"output_dir": str(tmp_path)}
    _, first = pretrain(tokenizer, dataset, bare_model(), teacher=original(), max_steps=1, **changes)
    changes[name] = value
    pretrain(tokenizer, dataset, bare_model(), teacher=original(), max_steps=2, **changes)
    assert f"{name} was {first.arguments[name]!r}, is {value!r}" in warnings[0]


@pytest.mark.parametrize("values", [(0, 0.15), (0.15, 0)])
def test_labels_neither_come_nor_go_within_a_run(tokenizer, dataset, tmp_path, values):
    """Losses, and the distance that decides which model is the best, would be of two kinds."""
    before, now = values
    changes = {"state_weight": 1.0, "distillation_weight": 0.0, "output_dir": str(tmp_path)}
    pretrain(tokenizer, dataset, teacher=original(), max_steps=1, mlm_probability=before, **changes)
    message = f"cannot change within a run: mlm_probability was {float(before)}, is {float(now)}. Start again with"
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(tokenizer, dataset, teacher=original(), max_steps=2, mlm_probability=now, **changes)
