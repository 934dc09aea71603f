"""What a run evaluates and writes, and how it goes on from there."""

import json
import math
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SPECIAL_TOKENS, WORDS, assert_same, randomize, tiny_bert_config, tiny_config, tiny_model
from texts import random_documents
from training_runs import (
    NO_DROPOUT,
    SPACE,
    arguments,
    assert_trained_alike,
    copied_weights,
    poison,
    pretrain,
    stream_of,
)
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertModel, BertTokenizer

from supershaper_hf import SuperShaperForMaskedLM
from supershaper_hf.data.batches import MicroBatches, fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.report.tables import markdown_table
from supershaper_hf.search.evaluation import evaluate_shapes
from supershaper_hf.training import loop as training_module
from supershaper_hf.training import run_folder
from supershaper_hf.training.checkpoints import list_checkpoints, seal
from supershaper_hf.training.loop import evaluation_shapes, super_pretrain
from supershaper_hf.training.resuming import read_state, write_state
from supershaper_hf.training.sandwich import sandwich_step
from supershaper_hf.training.teacher import OutsideTeacher


pytestmark = pytest.mark.usefixtures("no_measured_peak")


# Evaluation


def test_shapes_to_evaluate_are_the_ends_and_named_ones_of_half_the_size():
    shapes = evaluation_shapes(SPACE, None)
    assert list(shapes) == ["largest", "smallest", "rectangle", "lower_triangle", "supershaper"]
    budget = (SPACE.num_parameters(SPACE.largest) + SPACE.num_parameters(SPACE.smallest)) // 2
    assert list(shapes.values())[:2] == [SPACE.largest, SPACE.smallest]
    for name in ("rectangle", "lower_triangle", "supershaper"):
        assert shapes[name] == SPACE.named_shape(name, budget)


@pytest.mark.parametrize("shape", [None, [8, 0, 36]], ids=str)
def test_fixed_sampling_evaluates_its_one_shape(tokenizer, dataset, eval_batches, shape):
    model, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, sampling="fixed", shape=shape)
    (record,) = evaluate_shapes(model, eval_batches, [shape])
    assert summary.evaluation == {"model": {key: record[key] for key in ("loss", "perplexity", "accuracy")}}


def test_evaluation_at_the_end_is_that_of_the_trained_model(tokenizer, dataset, eval_batches):
    model, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches)
    shapes = evaluation_shapes(SPACE, None)
    expected = dict(zip(shapes, evaluate_shapes(model, eval_batches, list(shapes.values())), strict=True))
    measures = ("loss", "perplexity", "accuracy")
    assert summary.evaluation == {name: {key: r[key] for key in measures} for name, r in expected.items()}
    assert [record["step"] for record in summary.log_history if "evaluation" in record] == [3]


def test_evaluations_come_every_so_many_steps_and_at_the_end(tokenizer, dataset, eval_batches):
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, max_steps=5, eval_steps=2)
    assert [record["step"] for record in summary.log_history if "evaluation" in record] == [2, 4, 5]


def test_last_step_is_evaluated_once(tokenizer, dataset, eval_batches):
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, max_steps=4, eval_steps=2)
    assert [record["step"] for record in summary.log_history if "evaluation" in record] == [2, 4]


def test_evaluations_change_nothing(tokenizer, dataset, eval_batches):
    plain, _ = pretrain(tokenizer, dataset)
    evaluated, _ = pretrain(tokenizer, dataset, eval_batches=eval_batches, eval_steps=1)
    assert_same(evaluated.state_dict(), plain.state_dict(), atol=0)


def test_target_perplexity_of_the_first_shape_stops_the_run(tokenizer, dataset, eval_batches, scripted, tmp_path):
    script, weights = scripted
    script += [[math.log(21), 1.0], [math.log(20), 5.0]]
    changes = {"max_steps": 9, "eval_steps": 2, "target_perplexity": 20.0001, "output_dir": str(tmp_path)}
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert (summary.status, summary.progress.step) == ("target reached", 4)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-00000004"]
    assert_same(AutoModelForMaskedLM.from_pretrained(tmp_path / "last").state_dict(), weights[1], atol=0)
    assert json.loads((tmp_path / "training_summary.json").read_text())["status"] == "target reached"
    _, again = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert (again.status, again.progress.step, len(weights)) == ("target reached", 4, 2)


def test_target_needs_something_to_be_measured_on(tokenizer, dataset):
    with pytest.raises(ValueError, match=r"target_perplexity=20\.0 needs eval_batches to be measured on"):
        pretrain(tokenizer, dataset, eval_steps=1, target_perplexity=20.0)


def test_evaluation_without_a_label_is_refused_before_the_first_step(tokenizer, dataset, eval_batches, steps):
    unlabelled = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in eval_batches]
    with pytest.raises(ValueError, match="No token of eval_batches is labelled"):
        pretrain(tokenizer, dataset, eval_batches=unlabelled)
    assert steps == []


def test_target_that_is_not_reached_stops_nothing(tokenizer, dataset, eval_batches):
    changes = {"max_steps": 4, "eval_steps": 2, "target_perplexity": 1.001}
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert (summary.status, summary.progress.step) == ("finished", 4)


def test_best_is_the_lowest_mean_loss_and_last_is_the_last(tokenizer, dataset, eval_batches, scripted, tmp_path):
    """The second evaluation is the best on average, but neither in the first shape nor in any other."""
    script, weights = scripted
    script += [[4.0, 3.0], [3.0, 2.0], [1.0, 5.0]]
    changes = {"max_steps": 6, "eval_steps": 2, "output_dir": str(tmp_path)}
    model, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    best, last = (AutoModelForMaskedLM.from_pretrained(tmp_path / name) for name in ("best", "last"))
    assert type(best) is type(last) is SuperShaperForMaskedLM
    assert_same(best.state_dict(), weights[1], atol=0)
    assert_same(last.state_dict(), weights[2], atol=0)
    assert_same(last.state_dict(), model.state_dict(), atol=0)
    assert not torch.equal(weights[1]["cls.predictions.decoder.bias"], weights[2]["cls.predictions.decoder.bias"])
    assert (summary.progress.best_loss, summary.progress.best_step) == (pytest.approx((3 + 4 * 2.0) / 5), 4)


def test_loss_that_is_not_a_number_is_never_the_best(tokenizer, dataset, eval_batches, scripted, tmp_path):
    script, weights = scripted
    script += [[math.nan], [3.0], [math.nan]]
    changes = {"max_steps": 3, "eval_steps": 1, "output_dir": str(tmp_path)}
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert (summary.progress.best_loss, summary.progress.best_step) == (3.0, 2)
    assert_same(AutoModelForMaskedLM.from_pretrained(tmp_path / "best").state_dict(), weights[1], atol=0)


def test_without_evaluation_there_is_a_last_model_and_no_best_one(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert (tmp_path / "last" / "model.safetensors").exists()
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "evaluation.png").exists()


# The folder


def strict_json(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def read_metrics(folder):
    return [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_folder_holds_what_is_promised(tokenizer, dataset, eval_batches, tmp_path):
    folder = tmp_path / "new" / "run"
    pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "best",
        "checkpoint-00000003",
        "evaluation.png",
        "last",
        "metrics.jsonl",
        "run.json",
        "training_summary.json",
    ]


def test_nothing_is_written_without_a_folder(tokenizer, dataset, eval_batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain(tokenizer, dataset, eval_batches=eval_batches, eval_steps=1, save_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_metrics_have_one_record_per_logged_step_and_evaluation(tokenizer, dataset, eval_batches, tmp_path):
    changes = {"max_steps": 5, "logging_steps": 2, "eval_steps": 2, "output_dir": str(tmp_path)}
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    records = read_metrics(tmp_path)
    assert records == summary.log_history
    assert [(r["step"], "evaluation" in r) for r in records] == [
        (2, False), (2, True), (4, False), (4, True), (5, False), (5, True)
    ]  # fmt: skip
    assert records[0].keys() == {
        "step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "share_of_peak"
    }  # fmt: skip


def test_summary_file_is_valid_and_complete(tokenizer, dataset, eval_batches, tmp_path):
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(tmp_path))
    assert strict_json((tmp_path / "training_summary.json").read_text()) == summary.to_dict()


def test_files_stay_valid_json_when_a_number_is_not_finite(tokenizer, dataset, eval_batches, monkeypatch, tmp_path):
    """NaN and Infinity are no JSON: a reader that is not Python's stops at them."""
    poison(monkeypatch, {1})
    model = tiny_model()
    with torch.no_grad():
        model.cls["predictions"].decoder.bias[0] = 1000.0  # a perplexity that overflows
    pretrain(tokenizer, dataset, model, eval_batches=eval_batches, output_dir=str(tmp_path))
    read_metrics(tmp_path)
    strict_json((tmp_path / "training_summary.json").read_text())


def test_cards_tell_training_and_evaluation(tokenizer, dataset, eval_batches, tmp_path):
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(tmp_path))
    rows = [{"shape": name, **measures} for name, measures in summary.evaluation.items()]
    card = (tmp_path / "last" / "README.md").read_text()
    assert f"## Training\n\n{summary.describe()}" in card
    assert f"## Evaluation\n\n{markdown_table(rows)}" in card
    best = (tmp_path / "best" / "README.md").read_text()
    assert "Masked language modelling, the largest shape, the smallest and 1 random" in best
    assert markdown_table(rows) in best


def test_card_without_evaluation_says_so(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert "No measurements were supplied." in (tmp_path / "last" / "README.md").read_text()


def test_given_sections_reach_both_cards(tokenizer, dataset, eval_batches, tmp_path):
    card = {"license": "mit", "limits": "Toy words only.", "training": "By hand."}
    pretrain(tokenizer, dataset, eval_batches=eval_batches, card=card, output_dir=str(tmp_path))
    for name in ("best", "last"):
        text = (tmp_path / name / "README.md").read_text()
        assert "license: mit" in text
        assert "## Limits\n\nToy words only." in text
        assert "## Training\n\nBy hand." in text


def test_saved_models_have_their_tokenizer(tokenizer, dataset, eval_batches, tmp_path):
    pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(tmp_path))
    for name in ("best", "last", "checkpoint-00000003"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert loaded.get_vocab() == tokenizer.get_vocab()


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, max_steps=5, save_steps=2, save_total_limit=9, output_dir=str(tmp_path))
    assert [int(folder.name[-8:]) for folder in list_checkpoints(tmp_path)] == [5, 4, 2]


def test_older_checkpoints_are_removed(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, max_steps=5, save_steps=1, save_total_limit=2, output_dir=str(tmp_path))
    assert [int(folder.name[-8:]) for folder in list_checkpoints(tmp_path)] == [5, 4]


def test_every_checkpoint_is_written_once(tokenizer, dataset, tmp_path, monkeypatch):
    written, save = [], run_folder.save_checkpoint

    def record(accelerator, folder, step, *args):
        written.append(step)
        return save(accelerator, folder, step, *args)

    monkeypatch.setattr(run_folder, "save_checkpoint", record)
    pretrain(tokenizer, dataset, max_steps=4, save_steps=2, output_dir=str(tmp_path))
    pretrain(tokenizer, dataset, max_steps=4, save_steps=2, output_dir=str(tmp_path))
    assert written == [2, 4]


# Going on


def crash_before(monkeypatch, number):
    """Let the step of this number, from 0, fail in the way of a power cut; later runs go by it."""
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == number + 1:
            raise RuntimeError("power cut")
        return sandwich_step(*args)

    monkeypatch.setattr(training_module, "sandwich_step", fail)


def crash(monkeypatch, number, *args, **changes):
    crash_before(monkeypatch, number)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(*args, **changes)


TIMES = {"tokens_per_second", "share_of_peak"}


def without_times(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.mark.parametrize("kind", ["stored", "stream"])
def test_run_that_goes_on_equals_one_that_was_never_stopped(
    tokenizer, dataset, eval_batches, kind, tmp_path, monkeypatch, warnings
):
    """With dropout, accumulation, evaluations, and records of steps after the checkpoint."""
    text = dataset if kind == "stored" else stream_of(n=12)  # several times through the text
    changes = {
        "max_steps": 7,
        "save_steps": 2,
        "eval_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    whole, expected = pretrain(tokenizer, text, eval_batches=eval_batches, output_dir=str(tmp_path / "a"), **changes)
    changes["output_dir"] = str(tmp_path / "b")
    crash(monkeypatch, 5, tokenizer, text, eval_batches=eval_batches, **changes)
    assert [record["step"] for record in read_metrics(tmp_path / "b")] == [1, 2, 3, 3, 4, 5]
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    other = randomize(tiny_model(), seed=9)  # its weights come from the checkpoint
    resumed, summary = pretrain(tokenizer, text, other, eval_batches=eval_batches, **changes)
    assert_same(resumed.state_dict(), whole.state_dict(), atol=0)
    assert without_times(summary.log_history) == without_times(expected.log_history)
    assert without_times(read_metrics(tmp_path / "b")) == without_times(expected.log_history)
    told, wanted = summary.to_dict(), expected.to_dict()
    for each in (told, wanted):
        assert each.pop("seconds") > 0
        each["arguments"].pop("output_dir")
    assert told == wanted
    assert warnings == []


def test_best_of_the_first_part_stays_the_best(tokenizer, dataset, eval_batches, scripted, tmp_path, monkeypatch):
    script, weights = scripted
    script += [[2.0], [3.0], [2.5]]
    changes = {"max_steps": 6, "eval_steps": 2, "save_steps": 2, "output_dir": str(tmp_path)}
    crash(monkeypatch, 2, tokenizer, dataset, eval_batches=eval_batches, **changes)
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert len(weights) == 3
    assert (summary.progress.best_loss, summary.progress.best_step) == (2.0, 2)
    assert_same(AutoModelForMaskedLM.from_pretrained(tmp_path / "best").state_dict(), weights[0], atol=0)


def test_losses_on_another_text_are_not_compared(tokenizer, dataset, eval_batches, scripted, tmp_path, warnings):
    """The best loss on the old text would keep every model of the new evaluations from being the best."""
    script, weights = scripted
    script += [[2.0], [3.0], [2.5]]
    changes = {"eval_steps": 1, "output_dir": str(tmp_path)}
    pretrain(tokenizer, dataset, eval_batches=eval_batches, max_steps=1, **changes)
    smaller = fixed_masks(tokenize(random_documents(4, seed=1), tokenizer, 12), tokenizer, 1, mlm_probability=0.4)
    pretrain(tokenizer, dataset, eval_batches=smaller, max_steps=2, **changes)
    assert "evaluation_text" not in warnings.pop()  # the same sequences in other batches
    other = fixed_masks(tokenize(random_documents(4, seed=2), tokenizer, 12), tokenizer, 8, mlm_probability=0.4)
    _, summary = pretrain(tokenizer, dataset, eval_batches=other, max_steps=3, **changes)
    assert "evaluation_text was " in warnings.pop()
    assert (summary.progress.best_loss, summary.progress.best_step) == (2.5, 3)
    assert_same(AutoModelForMaskedLM.from_pretrained(tmp_path / "best").state_dict(), weights[2], atol=0)


def test_finished_run_is_not_trained_again(tokenizer, dataset, tmp_path, steps):
    model, first = pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    again, second = pretrain(tokenizer, dataset, randomize(tiny_model(), seed=9), output_dir=str(tmp_path))
    assert len(steps) == 3
    assert_same(again.state_dict(), model.state_dict(), atol=0)
    assert second.log_history == first.log_history
    assert (second.status, second.progress.step) == ("finished", 3)


def test_text_that_fails_loses_no_step(tokenizer, dataset, tmp_path, monkeypatch):
    changes = {"max_steps": 6, "save_steps": 100}
    whole, _ = pretrain(tokenizer, dataset, **changes)
    iterate = MicroBatches.iterate

    def fail(batches, state):
        for number, item in enumerate(iterate(batches, state)):
            if number == 4:
                raise OSError("The disk with the text is gone.")
            yield item

    with monkeypatch.context() as broken:
        broken.setattr(MicroBatches, "iterate", fail)
        with pytest.raises(OSError, match="The disk with the text is gone"):
            pretrain(tokenizer, dataset, output_dir=str(tmp_path), **changes)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-00000004"]
    resumed, _ = pretrain(tokenizer, dataset, output_dir=str(tmp_path), **changes)
    assert_same(resumed.state_dict(), whole.state_dict(), atol=0)


def test_text_that_fails_within_a_step_goes_on_at_the_start_of_the_step(tokenizer, tmp_path, monkeypatch):
    changes = {"max_steps": 4, "save_steps": 100, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    whole, _ = pretrain(tokenizer, stream_of(), **changes)
    iterate = MicroBatches.iterate

    def fail(batches, state):
        for number, item in enumerate(iterate(batches, state)):
            if number == 2 * 3 + 1:
                raise OSError("The disk with the text is gone.")
            yield item

    with monkeypatch.context() as broken:
        broken.setattr(MicroBatches, "iterate", fail)
        with pytest.raises(OSError, match="The disk with the text is gone"):
            pretrain(tokenizer, stream_of(), output_dir=str(tmp_path), **changes)
    resumed, _ = pretrain(tokenizer, stream_of(), output_dir=str(tmp_path), **changes)
    assert_same(resumed.state_dict(), whole.state_dict(), atol=0)


def test_text_that_fails_at_once_leaves_no_checkpoint(tokenizer, dataset, tmp_path, monkeypatch):
    def fail(batches, state):
        raise OSError("The disk with the text is gone.")
        yield

    monkeypatch.setattr(MicroBatches, "iterate", fail)
    with pytest.raises(OSError, match="The disk with the text is gone"):
        pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert list_checkpoints(tmp_path) == []


def test_used_folder_is_refused_if_resuming_is_not_wanted(tokenizer, dataset, tmp_path, steps):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    message = f"{tmp_path} holds checkpoints, and resume_from_checkpoint=False. Choose another output_dir, or set "
    with pytest.raises(FileExistsError, match=re.escape(message)):
        pretrain(tokenizer, dataset, output_dir=str(tmp_path), resume_from_checkpoint=False)
    assert len(steps) == 3


def test_new_folder_is_fine_if_resuming_is_not_wanted(tokenizer, dataset, tmp_path):
    _, summary = pretrain(tokenizer, dataset, output_dir=str(tmp_path / "new"), resume_from_checkpoint=False)
    assert summary.status == "finished"


def test_changes_that_take_effect_from_the_next_step_on_are_named_and_recorded(tokenizer, dataset, tmp_path, warnings):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    changes = {"max_steps": 4, "learning_rate": 0.002}
    _, summary = pretrain(tokenizer, dataset, output_dir=str(tmp_path), **changes)
    assert warnings == [
        f"Going on from {tmp_path / 'checkpoint-00000003'} under changed conditions from step 4 on: max_steps was 3, "
        "is 4; learning_rate was 0.001, is 0.002."
    ]
    assert summary.progress.step == 4
    assert summary.progress.changes == [
        {"step": 3, "name": "max_steps", "before": 3, "after": 4},
        {"step": 3, "name": "learning_rate", "before": 0.001, "after": 0.002},
    ]
    words = "after step 3, learning_rate was changed from 0.001 to 0.002."
    assert summary.describe().endswith(words)
    assert words in (tmp_path / "last" / "README.md").read_text()


def test_changed_optimiser_is_really_applied(tokenizer, dataset, tmp_path, monkeypatch, warnings):
    """Learning rate, schedule and weight decay after a resume are the new ones, the moments the old ones."""
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    seen, step = [], torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    changes = {"max_steps": 4, "learning_rate": 0.004, "lr_scheduler_type": "constant", "weight_decay": 0.3}
    _, summary = pretrain(tokenizer, dataset, output_dir=str(tmp_path), **changes)
    assert seen == [[(0.004, 0.3), (0.004, 0.0)]]
    assert [record["learning_rate"] for record in summary.log_history if "loss" in record][-1] == 0.004


def test_precision_that_the_launcher_changes_is_named(
    tokenizer, dataset, tmp_path, monkeypatch, warnings, fresh_accelerator_state
):
    """`args.mixed_precision` is None in both runs."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    pretrain(tokenizer, dataset, max_steps=1, output_dir=str(tmp_path))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(tokenizer, dataset, max_steps=2, output_dir=str(tmp_path))
    assert "mixed_precision was 'bf16', is 'no'" in warnings[-1]


def test_another_teacher_is_named(tokenizer, dataset, tmp_path, warnings):
    changes = {"teacher_weight": 1.0, "output_dir": str(tmp_path)}
    for steps, seed, layer in ((1, 1, -1), (2, 1, 2), (3, 2, -1), (4, 2, 1)):
        teacher = OutsideTeacher(randomize(BertModel(tiny_bert_config()), seed=seed), layer)
        pretrain(tokenizer, dataset, teacher=teacher, max_steps=steps, **changes)
    assert ["teacher was " in warning for warning in warnings] == [False, True, True]


def test_parameters_that_are_frozen_later_are_named(tokenizer, dataset, tmp_path, warnings):
    pretrain(tokenizer, dataset, max_steps=1, output_dir=str(tmp_path))
    model = tiny_model()
    model.bert.requires_grad_(False)
    pretrain(tokenizer, dataset, model, max_steps=2, output_dir=str(tmp_path))
    assert "trained_parameters was " in warnings[-1]


REFUSED = {
    "sampling": ({"sampling": "fixed", "distillation_weight": 0.5}, "sampling was 'sandwich', is 'fixed'"),
    "seed": ({"seed": 1}, "seed was 0, is 1"),
    "max_length": ({"max_length": 11}, "max_length was 12, is 11"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_cannot_change_within_a_run_are_refused(
    tokenizer, dataset, eval_batches, tmp_path, monkeypatch, changes, message
):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    args = arguments(output_dir=str(tmp_path), max_steps=5)
    for name, value in changes.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        super_pretrain(tiny_model(), tokenizer, dataset, args, eval_batches=eval_batches)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"num_attention_heads": 2},
        {"head_slicing": "per_head"},
        {"width_choices": [8, 48]},
        {"hidden_dropout_prob": 0.2},
        {"attention_probs_dropout_prob": 0.0},
        {"layer_norm_eps": 1e-5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_configuration_of_the_model_is_refused(tokenizer, dataset, tmp_path, change):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path), max_steps=1)
    (name, value) = next(iter(change.items()))
    message = f"cannot change within a run: {name} was {getattr(tiny_config(), name)!r}, is {value!r}. Start again with"
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(tokenizer, dataset, tiny_model(**change), output_dir=str(tmp_path), max_steps=2)


def test_another_text_is_refused(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path), max_steps=1)
    for text in (tokenize(random_documents(8, words=20, seed=5), tokenizer, 12), stream_of()):
        with pytest.raises(ValueError, match=r"text was '.* stored sequences .*', is '.*'. Start again with the old"):
            pretrain(tokenizer, text, output_dir=str(tmp_path), max_steps=2)


def test_stored_text_after_a_stream_is_refused(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, stream_of(), output_dir=str(tmp_path), max_steps=1)
    with pytest.raises(ValueError, match=r"text was 'stream .*', is '.* stored sequences"):
        pretrain(tokenizer, dataset, output_dir=str(tmp_path), max_steps=2)


def test_another_tokenizer_is_refused(tokenizer, tmp_path):
    pretrain(tokenizer, stream_of(), output_dir=str(tmp_path), max_steps=1)
    other = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS[::-1])})
    with pytest.raises(ValueError, match=r"cannot change within a run: tokenizer was '.*', is '.*'"):
        pretrain(other, stream_of(), output_dir=str(tmp_path), max_steps=2)


def test_conditions_that_decide_nothing_may_change(tokenizer, dataset, tmp_path, warnings):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    changes = {"logging_steps": 2, "save_steps": 7, "save_total_limit": 1, "dataloader_num_workers": 1}
    pretrain(tokenizer, dataset, output_dir=str(tmp_path / "b"), **changes)
    assert warnings == []


def test_run_can_go_on_in_smaller_micro_batches(tokenizer, dataset, tmp_path, monkeypatch, warnings):
    """At an equal batch per step it reads on where it was."""
    changes = {"max_steps": 6, "save_steps": 2}
    whole, _ = pretrain(tokenizer, dataset, tiny_model(**NO_DROPOUT), **changes)
    changes["output_dir"] = str(tmp_path)
    crash(monkeypatch, 2, tokenizer, dataset, tiny_model(**NO_DROPOUT), **changes)
    changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    resumed, _ = pretrain(tokenizer, dataset, tiny_model(**NO_DROPOUT), **changes)
    assert_trained_alike(resumed, whole)
    assert "per_device_train_batch_size was 8, is 2; gradient_accumulation_steps was 1, is 4." in warnings[0]


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 2}, {"vocab_size": 60}, {"hidden_size": 44, "width_choices": [8, 44]}], ids=str
)
def test_checkpoint_of_another_model_is_refused(tokenizer, dataset, tmp_path, changes):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    other = tiny_model(**changes)
    old, new = tiny_config().hidden_sizes, other.config.hidden_sizes
    message = f"{tmp_path / 'checkpoint-00000003'} was written by a run under other conditions, which cannot change"
    message += ".*vocab_size was 61, is 60" if old == new else f".*{re.escape(f'hidden_sizes was {old}, is {new}')}"
    before = copied_weights(other)
    with pytest.raises(ValueError, match=message):
        pretrain(tokenizer, dataset, other, output_dir=str(tmp_path))
    assert_same(other.state_dict(), before, atol=0)


def pretend_two_processes(checkpoint):
    """Change a checkpoint into one that two processes wrote, and seal it again."""
    state = read_state(checkpoint)
    state.conditions["processes"] = 2
    state.progress.sequences *= 2
    state.positions *= 2
    write_state(checkpoint, state)
    seal(checkpoint)


def test_stream_of_other_processes_cannot_be_gone_on_with(tokenizer, tmp_path, warnings):
    pretrain(tokenizer, stream_of(), output_dir=str(tmp_path))
    checkpoint = tmp_path / "checkpoint-00000003"
    pretend_two_processes(checkpoint)
    message = f"{checkpoint} was written by a run under other conditions, which cannot change within a run: processes "
    with pytest.raises(ValueError, match=re.escape(message + "was 2, is 1. Start again with the old values")):
        pretrain(tokenizer, stream_of(), output_dir=str(tmp_path))


def test_stored_text_of_other_processes_is_shared_out_anew(tokenizer, dataset, tmp_path, warnings, steps):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    pretend_two_processes(tmp_path / "checkpoint-00000003")
    changes = {"max_steps": 4, "gradient_accumulation_steps": 2}
    pretrain(tokenizer, dataset, output_dir=str(tmp_path), **changes)
    text = MicroBatches(dataset, tokenizer, 8).iterate({"micro_batch": 6})
    for batch in steps[3]["batches"]:
        assert_same(batch, next(text)[0], atol=0)
    assert "processes was 2, is 1" in warnings[0]
