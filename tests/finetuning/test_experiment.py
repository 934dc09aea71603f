"""Fine-tuning with several seeds: what is trained, what is kept, and what is resumed."""

import dataclasses
import json
import os
import signal
import statistics
from pathlib import Path

import pytest
import torch
from conftest import assert_same
from forking import fork
from safetensors.torch import load_file
from tiny_tasks import arguments, examples, tune, write_bert, write_csv, write_supernet, write_task
from transformers import AutoModelForSequenceClassification, Trainer
from transformers.trainer_callback import TrainerState

from supershaper_hf import (
    SearchSpace,
    ShapePredictor,
    SuperShaperConfig,
    SuperShaperForSequenceClassification,
    evaluate_shapes,
)
from supershaper_hf.files import lock
from supershaper_hf.finetuning.experiment import (
    best_of,
    fine_tune,
    make_trainer,
    newest_checkpoint,
    save_model,
    score_rows,
)
from supershaper_hf.finetuning.glue import glue_task
from supershaper_hf.finetuning.models import load_model
from supershaper_hf.finetuning.questions import question_task
from supershaper_hf.search.records import append_record, read_records


SHAPE = [36, 20, 48]


@pytest.fixture
def files(tmp_path):
    return write_task(tmp_path)


@pytest.fixture
def supernet(tmp_path, tokenizer):
    return write_supernet(tmp_path / "supernet", tokenizer)


def weights(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


# Scores


def test_subnet_learns_the_task_and_its_model_has_the_scores(supernet, files, tokenizer, tmp_path):
    results = tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, num_train_epochs=16)
    assert results["mean"]["validation"]["accuracy"] > 0.8
    assert (results["shape"], results["score"], results["best_seed"]) == (SHAPE, "accuracy", 0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert isinstance(model, SuperShaperForSequenceClassification)
    assert model.config.hidden_sizes == SHAPE
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.num_parameters() == results["parameters"]
    rows = examples(24, 1)
    inputs = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    right = model(**inputs).logits.argmax(-1) == torch.tensor([row["label"] for row in rows])
    assert right.float().mean().item() == pytest.approx(
        results["seeds"][0]["scores"]["validation"]["accuracy"], abs=1e-6
    )
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert f"| validation | {results['seeds'][0]['scores']['validation']['accuracy']:.4f} |" in card
    assert "Fine-tuned on the task sst2 (48 examples) for 16 epochs" in card


def test_mean_and_spread_are_those_of_the_seeds(supernet, files, tokenizer, tmp_path):
    results = tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, seeds=[0, 1, 2], num_train_epochs=1)
    found = [run["scores"]["validation"]["accuracy"] for run in results["seeds"]]
    assert [run["seed"] for run in results["seeds"]] == [0, 1, 2]
    assert len(set(found)) > 1
    assert results["mean"]["validation"]["accuracy"] == pytest.approx(statistics.fmean(found), abs=1e-6)
    assert results["spread"]["validation"]["accuracy"] == pytest.approx(statistics.stdev(found), abs=1e-6)
    assert results["best_seed"] == max(zip(found, (0, -1, -2), strict=True))[1] * -1
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: written[name] for name in results} == results
    alone = tune(
        tmp_path / "alone", supernet, files, tokenizer, shape=SHAPE, seeds=[results["best_seed"]], num_train_epochs=1
    )
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "alone"), atol=0)
    assert alone["seeds"][0] == results["seeds"][results["best_seed"]]
    assert alone["spread"]["validation"]["accuracy"] is None
    shown = f"{alone['mean']['validation']['accuracy']:.4f}"
    assert score_rows(alone)[0]["accuracy"] == shown


def test_further_seeds_are_added_without_running_the_first_again(supernet, files, tokenizer, tmp_path, monkeypatch):
    first = tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, num_train_epochs=1)
    trained = []
    monkeypatch.setattr(
        Trainer, "train", lambda self, train=Trainer.train, **kw: trained.append(1) or train(self, **kw)
    )
    both = tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, num_train_epochs=1, seeds=[0, 1])
    assert both["seeds"][0] == first["seeds"][0]
    assert len(trained) == 1


def test_model_is_that_of_the_best_seed_however_the_seeds_are_divided_over_calls(supernet, files, tokenizer, tmp_path):
    options = {"shape": SHAPE, "num_train_epochs": 1}
    expected = tune(tmp_path / "whole", supernet, files, tokenizer, seeds=[0, 1, 2], **options)
    order = sorted(expected["seeds"], key=lambda run: -run["scores"]["validation"]["accuracy"])
    for run in order:  # the best one first
        results = tune(tmp_path / "out", supernet, files, tokenizer, seeds=[run["seed"]], **options)
    assert results == expected
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "whole"), atol=0)


def test_best_epoch_is_kept_and_patience_ends_a_run(supernet, files, tokenizer, tmp_path):
    """With a learning rate that ruins the model, no epoch is better than the first ones."""
    results = tune(
        tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, num_train_epochs=30, early_stopping_patience=2,
        learning_rate=3e-3,
    )  # fmt: skip
    run = results["seeds"][0]
    assert run["steps"] == run["best_step"] + 2 * 6  # two more epochs of 6 steps
    assert run["epochs"] < 30
    assert not list((tmp_path / "out" / "seed-0").glob("checkpoint-*"))


def test_every_split_of_a_task_is_scored(supernet, tokenizer, tmp_path):
    rows = [{"premise": row["sentence"], "hypothesis": "the cat", "label": row["label"]} for row in examples(24, 0)]
    file = write_csv(tmp_path / "mnli.csv", rows)
    matched, mismatched = write_csv(tmp_path / "a.csv", rows[:12]), write_csv(tmp_path / "b.csv", rows[12:])
    args = arguments(tmp_path / "out", supernet, shape=SHAPE, num_train_epochs=1)
    results = fine_tune(args, glue_task("mnli", tokenizer, file, [matched, mismatched], max_length=12), tokenizer)
    assert list(results["mean"]) == ["validation_matched", "validation_mismatched"]


# What is fine-tuned


@pytest.mark.parametrize("changes", [{}, {"bottlenecks": "by_width", "head_slicing": "per_head"}])
def test_supernet_without_a_shape_is_cut_at_its_largest(changes, files, tokenizer, tmp_path):
    supernet = write_supernet(tmp_path / "supernet", tokenizer, **changes)
    results = tune(tmp_path / "out", supernet, files, tokenizer, max_steps=2)
    assert results["shape"] == [48, 48, 48]
    config = SuperShaperConfig.from_pretrained(tmp_path / "out" / "model")
    assert config.merged_bottlenecks


def test_budget_takes_the_best_shape_of_the_records_beside_the_supernet(supernet, files, tokenizer, tmp_path):
    """By made-up distances: the last layer is all that matters."""
    space = SearchSpace.from_config(SuperShaperConfig.from_pretrained(supernet))
    records = [
        {"shape": shape, "distance": 3 - shape[2] / 60 - shape[0] / 900, "cosine": 0.5}
        for shape in space.sample(30, seed=0).tolist()
    ]
    budget = space.num_parameters([20, 8, 48])
    folder = Path(supernet) / "search"
    folder.mkdir()
    write_records(folder / "records.jsonl", records, supernet)
    results = tune(tmp_path / "out", supernet, files, tokenizer, max_cost=budget, max_steps=1)
    assert results["shape"] == [20, 8, 48]


def write_records(file, records, supernet):
    """A real header, and rows that are made up."""
    model = SuperShaperForSequenceClassification.from_pretrained(supernet)
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    evaluate_shapes(model, [batch], [[8, 8, 8]], measure="distance", records_file=file)
    header = file.read_text().splitlines()[0]
    file.write_text(f"{header}\n")
    for record in records:
        append_record(file, record)


@pytest.mark.filterwarnings("ignore:Shapes left out of the fit")  # of an untrained supernet
def test_budget_without_records_measures_shapes_on_the_task(supernet, files, tokenizer, tmp_path):
    space = SearchSpace.from_config(SuperShaperConfig.from_pretrained(supernet))
    budget = (space.num_parameters(space.smallest) + space.num_parameters(space.largest)) // 2
    results = tune(tmp_path / "out", supernet, files, tokenizer, max_cost=budget, max_steps=1, num_shapes=12)
    records = read_records(tmp_path / "out" / "records.jsonl")
    affordable = [record for record in records if space.num_parameters(record["shape"]) <= budget]
    assert results["shape"] == min(affordable, key=lambda record: record["distance"])["shape"]


@pytest.mark.filterwarnings("ignore:Shapes left out of the fit")
def test_budget_in_flops_is_of_sequences_of_max_length(supernet, files, tokenizer, tmp_path):
    """A budget that no shape could meet at another length, of `pareto_front`."""
    space = SearchSpace.from_config(SuperShaperConfig.from_pretrained(supernet))
    budget = 3 * space.flops(space.smallest, 12)
    assert budget < space.flops(space.smallest, 128)
    results = tune(
        tmp_path / "out", supernet, files, tokenizer, max_cost=budget, cost="flops", max_steps=1, num_shapes=12
    )  # fmt: skip
    assert space.flops(results["shape"], 12) <= budget


def test_subnet_and_bert_are_fine_tuned_as_they_are(supernet, files, tokenizer, tmp_path):
    tune(tmp_path / "first", supernet, files, tokenizer, shape=SHAPE, max_steps=1)
    subnet = str(tmp_path / "first" / "model")
    assert tune(tmp_path / "second", subnet, files, tokenizer, max_steps=1)["shape"] == SHAPE
    bert = tune(tmp_path / "third", write_bert(tmp_path / "bert", tokenizer), files, tokenizer, num_train_epochs=2)
    assert bert["shape"] is None
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "third" / "model")
    assert type(loaded).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [36, 20]}, r"shape=\[36, 20\] has 2 widths, but the supernet has 3 layers.*Allowed: \[8, 20, "),
        ({"shape": [36, 20, 47]}, r"width 47 of layer 3 is not divisible.*Allowed: \[8, 20, 36, 48\]"),
        ({"max_cost": 10}, "max_cost=10 parameters cannot be met: the smallest shape has 10,786"),
        ({"max_cost": 10, "sandwich": True}, "max_cost=10 parameters cannot be met: the smallest shape has 10,786"),
        (
            {"max_cost": 10, "sandwich": True, "cost": "flops", "max_length": 9},
            "max_cost=10 FLOPs cannot be met: the smallest shape has 111,648 FLOPs",
        ),
    ],
)  # fmt: skip
def test_wrong_shape_or_budget_is_refused_before_anything_is_written(
    changes, message, supernet, files, tokenizer, tmp_path, monkeypatch
):
    """So the same command works in the same folder once it is right."""
    monkeypatch.setattr(Trainer, "train", None)
    with pytest.raises(ValueError, match=message):
        tune(tmp_path / "out", supernet, files, tokenizer, **changes)
    assert [file.name for file in (tmp_path / "out").glob("[!.]*")] == []


@pytest.mark.parametrize("changes", [{"shape": SHAPE}, {"max_cost": 1000}, {"sandwich": True}])
def test_shapes_need_a_supernet(changes, files, tokenizer, tmp_path):
    bert = write_bert(tmp_path / "bert", tokenizer)
    with pytest.raises(ValueError, match=r"(shape=\[36, 20, 48\]|max_cost=1000|sandwich=True) needs a supernet, and"):
        tune(tmp_path / "out", bert, files, tokenizer, **changes)
    assert not (tmp_path / "out" / "run.json").exists()


def load(task_name, model, files, tokenizer, tmp_path, seed=0):
    args = arguments(tmp_path / "out", model)
    return load_model(args, glue_task(task_name, tokenizer, files[0], [files[1]], max_length=12), None, seed)


def test_head_of_the_same_labels_is_kept_and_any_other_is_new(files, tokenizer, tmp_path):
    """The encoder is kept in every case, the pooler too."""
    bert = write_bert(tmp_path / "bert", tokenizer)
    before = load_file(Path(bert) / "model.safetensors")
    same = load("sst2", bert, files, tokenizer, tmp_path)
    assert_same(dict(same.state_dict()), before, atol=0)
    other, again, seeded = (load("cola", bert, files, tokenizer, tmp_path, seed) for seed in (0, 0, 1))
    assert other.config.id2label == {0: "unacceptable", 1: "acceptable"}
    for name, tensor in other.state_dict().items():
        if name.startswith("bert."):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(other.classifier.weight, before["classifier.weight"])
    assert torch.equal(other.classifier.weight, again.classifier.weight)
    assert not torch.equal(other.classifier.weight, seeded.classifier.weight)


def test_model_of_three_labels_starts_a_task_of_numbers(tokenizer, tmp_path):
    bert = write_bert(
        tmp_path / "bert", tokenizer, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}
    )
    rows = [{"sentence1": row["sentence"], "sentence2": "a", "label": float(row["label"])} for row in examples(8, 0)]
    file = write_csv(tmp_path / "stsb.csv", rows)
    model = load("stsb", bert, (file, file), tokenizer, tmp_path)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert model.classifier.weight.shape == (1, 48)


def test_new_head_for_numbers_starts_at_their_mean(supernet, files, tokenizer, tmp_path):
    rows = [{"sentence1": row["sentence"], "sentence2": "a", "label": 1.5 + 2 * row["label"]} for row in examples(8, 0)]
    file = write_csv(tmp_path / "stsb.csv", rows)
    models = {kind: load("stsb", model, (file, file), tokenizer, tmp_path) for kind, model in (
        ("BERT", write_bert(tmp_path / "bert", tokenizer)), ("subnet", supernet))}  # fmt: skip
    for model in models.values():
        assert model.classifier.bias.tolist() == [2.5]
    with torch.no_grad():
        models["BERT"].classifier.bias.fill_(7)
    models["BERT"].save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    assert load("stsb", str(tmp_path / "trained"), (file, file), tokenizer, tmp_path).classifier.bias.tolist() == [7]
    assert load("sst2", supernet, files, tokenizer, tmp_path).classifier.bias.tolist() == [0, 0]


def test_half_precision_weights_are_trained_in_float32(supernet, files, tokenizer, tmp_path):
    model = SuperShaperForSequenceClassification.from_pretrained(supernet, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    assert load("sst2", str(tmp_path / "half"), files, tokenizer, tmp_path).dtype == torch.float32


# The teacher


def test_model_learns_from_a_teacher(supernet, files, tokenizer, tmp_path):
    """From a teacher that is always wrong, it learns what is wrong."""
    flipped = [{**row, "label": 1 - row["label"]} for row in examples(48, 0)]
    wrong = write_csv(tmp_path / "wrong.csv", flipped), write_csv(tmp_path / "w.csv", flipped)
    tune(tmp_path / "teacher", write_bert(tmp_path / "bert", tokenizer), wrong, tokenizer, num_train_epochs=8)
    results = tune(
        tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, num_train_epochs=8, distillation_weight=1.0,
        teacher=str(tmp_path / "teacher" / "model"), load_best_model_at_end=False,
    )  # fmt: skip
    assert results["mean"]["validation"]["accuracy"] < 0.3


def test_subnet_that_learns_states_starts_with_the_head_of_the_teacher(supernet, files, tokenizer, tmp_path):
    teacher = write_bert(tmp_path / "bert", tokenizer, hidden_size=48)
    taught = {"shape": SHAPE, "teacher": teacher, "learning_rate": 1e-9, "num_train_epochs": 1}
    expected = AutoModelForSequenceClassification.from_pretrained(teacher).classifier.weight
    for weight, same in ((1.0, True), (0.0, False)):
        tune(tmp_path / f"out-{weight}", supernet, files, tokenizer, state_weight=weight, **taught)
        model = SuperShaperForSequenceClassification.from_pretrained(tmp_path / f"out-{weight}" / "model")
        assert torch.allclose(model.classifier.weight, expected, atol=1e-6) == same


def test_states_of_another_width_are_refused(supernet, files, tokenizer, tmp_path):
    teacher = write_bert(tmp_path / "bert", tokenizer, hidden_size=24)
    with pytest.raises(ValueError, match=r"state_weight=1.0 compares hidden states, but .* have 24 numbers, .* 48"):
        tune(tmp_path / "out", supernet, files, tokenizer, teacher=teacher, state_weight=1.0)


def test_teacher_of_another_task_or_vocabulary_is_refused(supernet, files, tokenizer, tmp_path):
    other = write_bert(tmp_path / "bert", tokenizer, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    with pytest.raises(ValueError, match=r"has the labels \['no', 'yes'\], the task has \['negative', 'positive'\]"):
        tune(tmp_path / "out", supernet, files, tokenizer, teacher=other)
    words = type(tokenizer)(vocab=dict(reversed([(word, i) for i, word in enumerate(reversed(tokenizer.get_vocab()))])))
    with pytest.raises(ValueError, match="has another vocabulary than"):
        tune(tmp_path / "out", supernet, files, tokenizer, teacher=write_bert(tmp_path / "words", words))


def test_teacher_without_a_head_for_the_task_is_refused(supernet, tokenizer, tmp_path):
    """The labels of a head for questions have no names, so they do not tell."""
    rows = [{"id": "0", "question": "the cat", "context": "the dog ran", "answers": {"text": [], "answer_start": []}}]
    (tmp_path / "data.jsonl").write_text(json.dumps(rows[0]))
    task = question_task(tokenizer, tmp_path / "data.jsonl", tmp_path / "data.jsonl", max_length=16)
    other = write_bert(tmp_path / "bert", tokenizer, id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id=None)
    message = r"lacks weights of a BertForQuestionAnswering: \['qa_outputs.bias', 'qa_outputs.weight'\]. Use a teacher"
    with pytest.raises(ValueError, match=message):
        fine_tune(arguments(tmp_path / "out", supernet, teacher=other, max_steps=1), task, tokenizer)


def test_trainer_has_the_options_of_the_teacher_and_the_first_split(supernet, tokenizer, tmp_path):
    rows = [{"premise": row["sentence"], "hypothesis": "the cat", "label": row["label"]} for row in examples(24, 0)]
    first, second = write_csv(tmp_path / "a.csv", rows[:12]), write_csv(tmp_path / "b.csv", rows[12:])
    task = glue_task("mnli", tokenizer, first, [first, second], max_length=12)
    weights = {"distillation_weight": 0.25, "state_weight": 2.0}
    args = arguments(tmp_path / "out", supernet, teacher="name", temperature=3.0, **weights)
    model = load_model(args, task, SHAPE, 5)
    trainer = make_trainer(args, task, tokenizer, model, None, 5)
    assert (trainer.weight, trainer.state_weight, trainer.temperature, trainer.args.seed) == (0.25, 2.0, 3.0, 5)
    assert trainer.eval_dataset is task.evaluation["validation_matched"]
    assert args.seed == 42  # that of other seeds is not changed


def test_card_names_the_model_of_the_hub_that_was_fine_tuned(supernet, files, tokenizer, tmp_path):
    """But no folder of this machine."""
    args = arguments(tmp_path / "out", supernet)
    task = glue_task("sst2", tokenizer, files[0], [files[1]], max_length=12)
    found = {"seed": 0, "epochs": 1.0, "scores": {"validation": {"accuracy": 0.5}}}
    model = load_model(args, task, SHAPE, 0)
    (tmp_path / "out").mkdir()
    for name in (supernet, "user/name"):
        save_model(dataclasses.replace(args, model=name), task, tokenizer, model, found)
        card = (tmp_path / "out" / "model" / "README.md").read_text()
        assert ("base_model: user/name" in card) == (name == "user/name")
        assert str(tmp_path) not in card


# Interruptions


def test_killed_run_goes_on_as_if_nothing_had_happened(supernet, files, tokenizer, tmp_path):
    """Killed in the middle of writing the checkpoint of its third epoch, which is then incomplete."""
    options = {"shape": SHAPE, "num_train_epochs": 4, "seeds": [0, 1], "early_stopping_patience": 3}
    expected = tune(tmp_path / "whole", supernet, files, tokenizer, **options)
    (child,) = fork(0, tune_until_killed, tmp_path / "killed", supernet, files, tokenizer, options)
    child.join(180)
    assert child.exitcode == -signal.SIGKILL
    folder = tmp_path / "killed" / "seed-0"
    assert (folder / "checkpoint-18" / "model.safetensors").exists()
    assert not (folder / "checkpoint-18" / "trainer_state.json").exists()
    assert newest_checkpoint(folder) == str(folder / "checkpoint-12")
    assert tune(tmp_path / "killed", supernet, files, tokenizer, **options) == expected
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"), atol=0)


def test_newest_checkpoint_is_that_of_the_most_steps(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        TrainerState(global_step=step).save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_folder_that_another_run_is_using_is_refused(supernet, files, tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out"), pytest.raises(RuntimeError, match=r"out"):
        tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, max_steps=1)


def test_patience_is_resumed(supernet, files, tokenizer, tmp_path, monkeypatch):
    """Stopped in the epoch that would have ended the run, which has had one epoch without a better score before."""
    options = {"shape": SHAPE, "num_train_epochs": 30, "early_stopping_patience": 2, "learning_rate": 3e-3}
    expected = tune(tmp_path / "whole", supernet, files, tokenizer, **options)
    last = f"checkpoint-{expected['seeds'][0]['steps']}"

    def stop(self, output_dir, save=Trainer._save_rng_state):
        if output_dir.endswith(last):
            raise KeyboardInterrupt
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "stopped", supernet, files, tokenizer, **options)
    assert tune(tmp_path / "stopped", supernet, files, tokenizer, **options) == expected


def test_smallest_of_equally_good_seeds_is_the_best(files, tokenizer):
    task = glue_task("sst2", tokenizer, files[0], [files[1]], max_length=12)
    results = [{"seed": seed, "scores": {"validation": {"accuracy": 0.5}}} for seed in (3, 1, 2)]
    assert best_of(results, task)["seed"] == 1


def tune_until_killed(folder, supernet, files, tokenizer, options):
    save = Trainer._save_rng_state

    def die(self, output_dir):
        if output_dir.endswith("checkpoint-18"):
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    Trainer._save_rng_state = die
    tune(folder, supernet, files, tokenizer, **options)


def test_folder_of_other_options_is_not_mixed_up(supernet, files, tokenizer, tmp_path):
    tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, max_steps=1)
    with pytest.raises(
        ValueError, match=r"with other options: shape was \[36, 20, 48\], is \[36, 20, 20\]; learning_rate"
    ):
        tune(tmp_path / "out", supernet, files, tokenizer, shape=[36, 20, 20], max_steps=1, learning_rate=1e-4)


@pytest.mark.parametrize(("name", "changes"), [("model", {"shape": SHAPE}), ("search", {"sandwich": True})])
def test_folders_that_no_fine_tuning_has_written_are_not_replaced(name, changes, supernet, files, tokenizer, tmp_path):
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(FileExistsError, match=rf"out holds {name}, which a fine-tuning would replace, but no run.json"):
        tune(tmp_path / "out", supernet, files, tokenizer, max_steps=1, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler_type": "constant"}, {"optim": "sgd"}, {"max_grad_norm": 0.5}, {"bf16": True},
        {"load_best_model_at_end": False}, {"adam_beta2": 0.9}, {"label_smoothing_factor": 0.1},
    ],
)  # fmt: skip
def test_every_option_that_decides_the_results_is_compared(changes, supernet, files, tokenizer, tmp_path):
    tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, max_steps=1)
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"with other options: {name} was .*, is .*{value}"):
        tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, max_steps=1, **changes)
    tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, max_steps=1, logging_steps=7, seeds=[0])


def test_other_examples_and_another_way_to_score_are_noticed(supernet, files, tokenizer, tmp_path):
    tune(tmp_path / "out", supernet, files, tokenizer, shape=SHAPE, max_steps=1)
    other = files[0], write_csv(tmp_path / "other.csv", examples(24, 7))
    with pytest.raises(ValueError, match=r"with other options: fingerprint of validation was '\w+', is '\w+'\. Use"):
        tune(tmp_path / "out", supernet, other, tokenizer, shape=SHAPE, max_steps=1)
    args = arguments(tmp_path / "out", supernet, shape=SHAPE, max_steps=1)
    task = glue_task("sst2", tokenizer, files[0], [files[1]], max_length=12)
    with pytest.raises(ValueError, match=r"with other options: max_answer_length was None, is 7\. Use"):
        fine_tune(args, dataclasses.replace(task, options={"max_answer_length": 7}), tokenizer)


def test_shape_of_other_records_is_noticed(supernet, files, tokenizer, tmp_path):
    """The shapes that a first seed and a second one would have."""
    space = SearchSpace.from_config(SuperShaperConfig.from_pretrained(supernet))
    budget = space.num_parameters([20, 8, 48])
    options = {"max_cost": budget, "max_steps": 1, "records_file": str(tmp_path / "records.jsonl")}
    for layer, seed in ((2, 0), (0, 1)):  # the one that matters
        records = [
            {"shape": shape, "distance": 3 - shape[layer] / 60, "cosine": 0.5}
            for shape in space.sample(30, seed=0).tolist()
        ]
        Path(options["records_file"]).unlink(missing_ok=True)
        write_records(Path(options["records_file"]), records, supernet)
        if seed == 0:
            tune(tmp_path / "out", supernet, files, tokenizer, **options)
            continue
        with pytest.raises(
            ValueError, match=r"with other options: chosen_shape was \[.*\], is \[.*\]\. Use another folder"
        ):
            tune(tmp_path / "out", supernet, files, tokenizer, seeds=[0, 1], **options)


def test_a_budget_gets_the_shape_of_the_search(supernet, files, tokenizer, tmp_path):
    """Its predictor decides, as for the explorer and the card: it was fitted before the last shapes were measured."""
    space = SearchSpace.from_config(SuperShaperConfig.from_pretrained(supernet))
    shapes, file = space.sample(30, seed=0), tmp_path / "search" / "records.jsonl"
    file.parent.mkdir()
    records = [{"shape": shape, "distance": 3 - shape[2] / 60, "cosine": 0.5} for shape in shapes.tolist()]
    write_records(file, records, supernet)
    options = {"max_cost": space.num_parameters([20, 8, 48]), "max_steps": 1, "records_file": str(file)}
    of_records = tune(tmp_path / "records", supernet, files, tokenizer, **options)["shape"]
    predictor = ShapePredictor.fit(shapes, 3 - shapes[:, 0] / 60, measure="distance")
    predictor.save(file.with_name("predictor.json"))
    of_search = tune(tmp_path / "search-too", supernet, files, tokenizer, **options)["shape"]
    assert of_records[2] > of_search[2]
    assert of_records[0] < of_search[0]


# Options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": SHAPE, "max_cost": 1e6}, "Give shape or max_cost, not both"),
        ({"max_cost": 0}, "max_cost=0 must be"),
        ({"cost": "seconds"}, "cost='seconds' is unknown"),
        ({"seeds": []}, r"seeds=\[\] must be one or more different numbers"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be one or more different numbers"),
        ({"distillation_weight": 1.5}, "distillation_weight=1.5 must be"),
        ({"temperature": 0}, "temperature=0 must be"),
        ({"state_weight": -1, "teacher": "name"}, "state_weight=-1 must be"),
        ({"state_weight": 1}, "state_weight=1 needs a teacher"),
        ({"early_stopping_patience": 0}, "early_stopping_patience=0 must be"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, "model", **changes)
