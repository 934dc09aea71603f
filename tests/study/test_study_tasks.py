"""Question 6: what is fine-tuned, what is measured again, what the scores are, and what is made of the rows."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_bert_config
from studies import write_study
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from supershaper_hf import SearchSpace, SuperShaperForSequenceClassification, SuperShaperModel
from supershaper_hf.files import write_json


ROOT = Path(__file__).parents[2]
RECIPE = ["--steps", "3", "--sandwich_steps", "2", "--batch_size", "8", "--max_length", "16"]


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield {
            name: importlib.import_module(f"benchmarks.study.{name}")
            for name in ("compared", "study", "tasks", "tasks_answer", "tuning")
        }


@pytest.fixture
def tasks(modules):
    modules["compared"].load_original.cache_clear()
    modules["compared"].load_supernet.cache_clear()
    return modules["tasks"]


def rows_of(modules, tmp_path):
    return modules["study"].read_rows(tmp_path / "results", "tasks")


def test_everything_is_measured_once(modules, tasks, tokenizer, tmp_path, monkeypatch, capsys):
    options = [*write_study(tmp_path, tokenizer, ("sst2",)), *RECIPE, "--tasks", "sst2", "--seeds", "0"]
    first = [*options, "--shares", "0.6", "--only", "original", "searched", "super"]
    monkeypatch.setattr(tasks, "NUM_RANDOM", 3)
    tasks.main(first)
    rows = rows_of(modules, tmp_path)
    names = [(row["model"], row["way"]) for row in rows]
    assert names[:2] == [("original", "fine-tuned"), ("searched 60%", "fine-tuned")]
    assert {name for name, way in names[2:] if way == "super"} == {
        *("supernet", "searched 60%", "rectangle 60%"),
        *(f"random {number}" for number in range(3)),
    }
    assert len({(row["model"], row["way"]) for row in rows}) == len(rows) == 8
    assert [row["model"] for row in rows if "int8" in row] == ["original", "searched 60%"]
    assert all(row["seconds"] > 0 for row in rows)
    assert [row["model"] for row in rows if row["supernet"] is None] == ["original"]
    assert [row["weight"] for row in rows[:2]] == [None, 0.5]  # whom a teacher has taught
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "teachers" / "sst2")
    assert isinstance(teacher, BertForSequenceClassification)
    left = list((tmp_path / "out").rglob("*.safetensors"))
    assert sorted(path.parent.parent.name for path in left) == ["super", "teachers"]  # nothing else takes room

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "fine_tune", refuse)
        tasks.main(first)
        assert rows_of(modules, tmp_path) == rows
        with pytest.raises(AssertionError, match="measured again"):  # a seed that is missing
            tasks.main([*options[:-1], "1", "--shares", "0.6", "--only", "original"])
    assert "| searched 60% |" in capsys.readouterr().out


def test_other_ways_are_tried_on_one_task(modules, tasks, tokenizer, tmp_path, monkeypatch, capsys):
    options = [*write_study(tmp_path, tokenizer, ("sst2", "stsb")), *RECIPE, "--seeds", "0", "--shares", "0.6"]
    tasks.main([*options, "--tasks", "sst2", "stsb", "--only", "original"])
    teacher = (tmp_path / "out" / "teachers" / "stsb" / "model.safetensors").read_bytes()
    fine_tune, runs = tasks.fine_tune, []

    def recorded(source, task, tokenizer, recipe, seed, folder, shape=None, teacher=None, sandwich=False):
        runs.append((Path(source).name, recipe.steps, shape, teacher is not None, sandwich))
        return fine_tune(source, task, tokenizer, recipe, seed, folder, shape, teacher, sandwich)

    monkeypatch.setattr(tasks, "fine_tune", recorded)
    ways = [*options, "--tasks", "sst2", "stsb", "--only", "untaught", "super_first", "longer"]
    tasks.main(ways)
    rows = rows_of(modules, tmp_path)[2:]
    assert [(row["model"], row["way"], row["task"]) for row in rows] == [
        ("searched 60%", "untaught", "stsb"),
        ("searched 60%", "super_first", "stsb"),
        ("original", "longer", "stsb"),
        ("searched 60%", "longer", "stsb"),
    ]
    shape = rows[0]["shape"]
    assert runs == [
        ("supernet", 3, shape, False, False),
        ("supernet", 3, None, True, True),  # all shapes at once
        ("stsb-0", 3, shape, True, False),
        ("bert", 9, None, False, False),
        ("supernet", 9, shape, True, False),
    ]
    assert (tmp_path / "out" / "teachers" / "stsb" / "model.safetensors").read_bytes() == teacher
    tasks.main(ways)
    assert len(runs) == 5
    assert "Other ways, tried on stsb" in capsys.readouterr().out


def test_a_shape_that_was_measured_under_another_name_is_not_measured_again(modules, tasks, tokenizer, tmp_path):
    options = [*write_study(tmp_path, tokenizer, ("sst2",)), *RECIPE, "--tasks", "sst2", "--seeds", "0"]
    args = tasks.parse_arguments([*options, "--shares", "0.6"])
    study, models = tasks.start(args)
    searched, rectangle = models[1], models[2]
    values = {
        "task": "sst2",
        "seed": 0,
        "way": "fine-tuned",
        "score": 12.5,
        "int8": 11.0,
        "seconds": 3.0,
        "weight": 0.5,
    }
    study.add({**searched.row(), "shape": rectangle.shape}, **values)
    tasks.measure(study, "sst2", rectangle, 0)
    assert rows_of(modules, tmp_path)[1] == {**rectangle.row(), **values, "supernet": study.fingerprint}


def test_other_supernets_and_recipes_are_refused(modules, tasks, tokenizer, tmp_path):
    options = [*write_study(tmp_path, tokenizer, ("sst2",)), *RECIPE, "--tasks", "sst2"]
    study, models = tasks.start(tasks.parse_arguments(options))
    study.add(models[1].row(), task="sst2", seed=0, way="fine-tuned", score=1.0, int8=1.0, seconds=1.0)
    with pytest.raises(ValueError, match="other settings: recipe"):
        tasks.start(tasks.parse_arguments([*options, "--learning_rate", "1e-5"]))
    study.add(models[1].row(), task="sst2", seed=1, way="fine-tuned", score=1.0, weight=0.25)
    with pytest.raises(ValueError, match=r"rows with weight=\[0.25\], not 0.5"):
        tasks.start(tasks.parse_arguments(options))
    tasks.start(tasks.parse_arguments([*options, "--weight", "0.25"]))
    study.results.rows[-1]["shape"] = [8, 8, 8]  # as another search may have it
    with pytest.raises(ValueError, match=r"rows of searched 60% with the shape \[8, 8, 8\], but it is"):
        modules["compared"].check_shapes(study.results.rows, models)
    supernet = SuperShaperModel.from_pretrained(tmp_path / "supernet")
    randomize(supernet, 5).save_pretrained(tmp_path / "supernet")
    modules["compared"].load_supernet.cache_clear()
    with pytest.raises(ValueError, match="rows of another supernet"):
        tasks.start(tasks.parse_arguments([*options, "--weight", "0.25"]))


def test_the_best_original_becomes_the_teacher(tasks, tokenizer, tmp_path):
    options = [*write_study(tmp_path, tokenizer, ("sst2",)), *RECIPE, "--tasks", "sst2", "--only", "original"]
    study, (original,) = tasks.start(tasks.parse_arguments(options))
    file = study.teacher_folder("sst2") / "config.json"
    for seed, (score, layers) in enumerate(((50.0, 2), (49.0, 1), (50.0, 1), (51.0, 3))):
        model = BertForSequenceClassification(tiny_bert_config(num_hidden_layers=layers))
        tasks.keep_teacher(study, "sst2", model, score)
        study.add(original.row(), task="sst2", seed=seed, way="fine-tuned", score=score)
        assert json.loads(file.read_text())["num_hidden_layers"] == (2 if score <= 50 else 3)


def test_budgets_count_the_encoder_without_a_head(modules, tasks, tokenizer, tmp_path):
    args = tasks.parse_arguments(write_study(tmp_path, tokenizer))
    models = modules["compared"].compared_models(args.bert, args.supernet, tmp_path / "supernet" / "search")
    kinds = [(model.kind, model.share) for model in models]
    assert kinds[0] == ("original", None)
    assert kinds[7] == ("supernet", None)
    assert [share for _, share in kinds] == [None, *[0.6] * 3, *[0.3] * 3, None, *[0.75] * 3, *[0.45] * 3]
    bert, supernet = (modules["compared"].load_original(args.bert), modules["compared"].load_supernet(args.supernet))
    layers = sum(parameter.numel() for parameter in bert.encoder.parameters())
    assert (models[0].parameters, models[0].encoder) == (bert.num_parameters(), 1)
    for model in models[1:]:
        subnet = modules["compared"].load_encoder(model, args.bert, args.supernet)
        assert subnet.num_parameters() == model.parameters
        assert model.encoder == pytest.approx(1 + (model.parameters - bert.num_parameters()) / layers)
        if model.share is not None:
            assert model.encoder <= model.share
    assert models[7].shape == SearchSpace.from_model(supernet).largest


# Fine-tuning and scores


def test_a_score_is_that_of_the_examples_in_any_order(modules, tokenizer, tmp_path):
    write_study(tmp_path, tokenizer, ("sst2",))
    tuning = modules["tuning"]
    task = tuning.load_task("sst2", tmp_path / "data", tokenizer, tuning.Recipe(max_length=16))
    lengths = [len(ids) for ids in task.evaluation["validation"]["input_ids"]]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
    model = randomize(BertForSequenceClassification(tiny_bert_config(vocab_size=len(tokenizer))))
    right = []
    for example in task.evaluation["validation"]:
        inputs = {name: torch.tensor([example[name]]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            right.append(model(**inputs).logits.argmax().item() == example["labels"])
    assert 0 < np.mean(right) < 1
    assert tuning.score(tuning.pytorch_run(model), task) == pytest.approx(100 * np.mean(right), abs=1e-3)


def test_a_teacher_remembers_its_logits(modules, tokenizer):
    teacher = randomize(BertForSequenceClassification(tiny_bert_config(vocab_size=len(tokenizer))))
    remembering, seen = modules["tuning"].RememberingTeacher(teacher, "source"), []
    remembering.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    calls = []
    read = lambda module, args, kwargs: calls.append(len(kwargs["input_ids"]))  # noqa: E731
    teacher.register_forward_pre_hook(read, with_kwargs=True)
    sentences = [["the cat sat", "the dog"], ["a moon", "the cat sat"]]
    for texts in (sentences[0], sentences[1], sentences[0]):
        batch = tokenizer(texts, padding="max_length", max_length=6 + len(calls), return_tensors="pt")
        found = remembering(**batch).logits
        states = seen.pop()
        assert states.shape[:2] == batch["input_ids"].shape
        for row, text in enumerate(texts):
            with torch.no_grad():
                expected = teacher.base_model(**tokenizer([text], return_tensors="pt"))
                logits, length = teacher.classifier(expected.pooler_output)[0], expected.last_hidden_state.shape[1]
            torch.testing.assert_close(found[row], logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(states[row, :length], expected.last_hidden_state[0], atol=1e-2, rtol=1e-2)
            assert (states[row, length:] == 1).all()
    assert calls == [2, 1]  # only what is new


def test_fine_tuning_goes_on_where_it_was_stopped(modules, tokenizer, tmp_path):
    options = write_study(tmp_path, tokenizer, ("sst2",))
    tuning, supernet = modules["tuning"], options[options.index("--supernet") + 1]
    recipe = tuning.Recipe(steps=7, batch_size=8, max_length=16, learning_rate=1e-3)
    tokens = AutoTokenizer.from_pretrained(supernet)
    task = tuning.load_task("sst2", tmp_path / "data", tokens, recipe)
    bert = randomize(BertForSequenceClassification(tiny_bert_config(vocab_size=len(tokens))), 9)
    taught = tuning.RememberingTeacher(bert, "source")
    model, seconds = tuning.fine_tune(supernet, task, tokens, recipe, 0, tmp_path / "run", [20, 0, 36], taught)
    assert len(taught.known) > 0
    taught.known.clear()
    assert isinstance(model, SuperShaperForSequenceClassification)
    assert model.config.hidden_sizes == [20, 36]  # a dropped layer is gone
    assert seconds > 0
    inputs, fresh = tokens(["the cat"], return_tensors="pt"), type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():  # without autocast, in which it was trained
        torch.testing.assert_close(model(**inputs).logits, fresh(**inputs).logits, atol=1e-6, rtol=0)
    (checkpoint,) = (tmp_path / "run" / "seed-0").glob("checkpoint-*")
    again = tuning.fine_tune(supernet, task, tokens, recipe, 0, tmp_path / "run", [20, 0, 36], taught)
    assert not taught.known  # no step was trained again
    assert checkpoint.exists()
    assert again.seconds is None
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor)


@pytest.mark.parametrize("state_weight", [0.0, 2.0])
def test_a_model_learns_what_its_teacher_knows(modules, tokenizer, tmp_path, state_weight):
    """Without a learning rate, it has the head that it started with."""
    options = write_study(tmp_path, tokenizer, ("sst2",))
    tuning, supernet = modules["tuning"], options[options.index("--supernet") + 1]
    recipe = tuning.Recipe(steps=3, batch_size=8, max_length=16, learning_rate=1e-9, state_weight=state_weight)
    tokens = AutoTokenizer.from_pretrained(supernet)
    task = tuning.load_task("sst2", tmp_path / "data", tokens, recipe)
    bert = randomize(BertForSequenceClassification(tiny_bert_config(vocab_size=len(tokens))), 9)
    teacher = tuning.RememberingTeacher(bert, "source", state_weight > 0)
    shape = [20, 48, 36]
    model, _ = tuning.fine_tune(supernet, task, tokens, recipe, 0, tmp_path / "run", shape, teacher)
    assert torch.allclose(model.classifier.weight, bert.classifier.weight, atol=1e-6) == (state_weight > 0)
    steep = dataclasses.replace(recipe, learning_rate=1e-2)
    learnt = tuning.fine_tune(supernet, task, tokens, steep, 0, tmp_path / "learnt", shape, teacher).model
    alone = tuning.fine_tune(supernet, task, tokens, steep, 0, tmp_path / "alone", shape).model
    assert not torch.allclose(learnt.base_model.pooler.dense.weight, alone.base_model.pooler.dense.weight, atol=1e-3)


# The section


STEPS = (-15, -5, 5, 15)  # of the tasks around their mean


def made_up_rows(modules, scores, **changes):
    """Rows of every task and two seeds, whose mean scores are `scores` by model."""
    answer, rows = modules["tasks_answer"], []
    for (kind, share), mean in scores.items():
        name = kind if share is None else f"{kind} {share:.0%}"
        for offset, task in enumerate(answer.TASKS):
            for seed, spread in ((0, -0.5), (1, 0.5)):
                value = mean + spread + STEPS[offset]
                row = {"model": name, "kind": kind, "share": share, "encoder": share or 1.0, "seconds": 10.0}
                row |= {"shape": None if kind == "original" else [8], "task": task, "seed": seed, "score": value}
                rows.append({**row, "way": "fine-tuned", "int8": value - 1, **changes})
    return rows


def write_rows(modules, folder, rows):
    settings = {"recipe": {"steps": 400, "learning_rate": 1e-4, "batch_size": 16, "max_length": 128}}
    results = modules["study"].Results(folder, "tasks", settings)
    for row in rows:
        results.add(row)


def cells(text, first):
    """The cells of the first line of a table that begins with a cell."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def verdicts(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.endswith(("| yes |", "| no |"))]
    return {row[0].split(" (")[0]: (row[1], row[3]) for row in rows}


SCORES = {
    ("original", None): 80.0,
    ("searched", 0.6): 79.0,
    ("rectangle", 0.6): 78.8,
    ("first_layers", 0.6): 77.0,
    ("searched", 0.3): 74.0,
}


def test_shares_and_targets_are_computed(modules, tmp_path):
    write_rows(modules, tmp_path / "results", made_up_rows(modules, SCORES))
    text = modules["tasks"].answer(tmp_path / "results", tmp_path / "pictures")
    spread = "0.7"  # of -0.5 and 0.5
    assert cells(text, "searched 60%")[3:] == [
        *(f"{79 + step:.1f} ± {spread}" for step in STEPS),
        *(f"79.0 ± {spread}", f"{79 / 80:.1%}", f"78.0 ± {spread}", f"{78 / 80:.1%}", "40"),
    ]
    assert verdicts(text) == {
        "searched 60%: share of the original's mean score": (f"{79 / 80:.1%}", "yes"),
        "searched 30%: share of the original's mean score": (f"{74 / 80:.1%}", "no"),
        "searched 60%: points above first_layers": ("+2.0", "yes"),
        "searched 60%: points above rectangle": ("+0.2", "no"),  # within the spread
    }
    assert "seeds were preferred to sizes: 75% of the encoder, 45% of the encoder, the supernet." in text
    assert "![Mean task score" in text
    assert "(pictures/tasks.png)" in text
    assert (tmp_path / "pictures" / "tasks.png").stat().st_size > 5000


def test_first_layers_must_be_well_below(modules, tmp_path):
    write_rows(modules, tmp_path / "results", made_up_rows(modules, {**SCORES, ("first_layers", 0.6): 77.6}))
    text = modules["tasks"].answer(tmp_path / "results", tmp_path)
    assert verdicts(text)["searched 60%: points above first_layers"] == ("+1.4", "no")


def test_with_one_seed_no_difference_is_outside_the_spread(modules, tmp_path):
    rows = [row for row in made_up_rows(modules, SCORES) if row["seed"] == 0]
    write_rows(modules, tmp_path / "results", rows)
    text = modules["tasks"].answer(tmp_path / "results", tmp_path)
    assert "| searched 60%: points above rectangle (one seed) | +0.2 | at least 0.0, and the spread | open |" in text


def test_without_all_tasks_there_is_no_mean(modules, tmp_path):
    assert modules["tasks"].answer(tmp_path, tmp_path) == ""
    rows = [row for row in made_up_rows(modules, SCORES) if (row["model"], row["task"]) != ("searched 60%", "mrpc")]
    write_rows(modules, tmp_path / "results", rows)
    text = modules["tasks"].answer(tmp_path / "results", tmp_path)
    assert cells(text, "searched 60%")[5:] == ["-", "94.0 ± 0.7", "-", "-", "-", "-", "-"]
    assert list(verdicts(text)) == ["searched 30%: share of the original's mean score"]


def test_a_task_that_the_original_guesses_is_left_out_of_the_means(modules, tmp_path):
    rows = made_up_rows(modules, SCORES)
    assert modules["tasks_answer"].guessed_text(rows, {"rte": 52.7}) == ""
    guessed = [{**row, "task": "rte", "score": 54.0 + row["seed"]} for row in rows if row["task"] == "cola"]
    write_rows(modules, tmp_path / "results", [*rows, *guessed])
    assert "it guesses" not in modules["tasks"].answer(tmp_path / "results", tmp_path)  # guessing was not scored
    scores = {"cola": 0.0, "sst2": 50.0, "mrpc": 76.0, "stsb": 0.0, "rte": 52.7}
    splits = [(task, split) for task in scores for split in ("train", "validation")]
    files = [
        {"file": f"tasks/{task}/{split}.csv", "guess": scores[task], "examples": 1000 + 10 * number}
        for number, (task, split) in enumerate(splits)
    ]
    write_json(tmp_path / "results" / "data.json", modules["study"].FORMAT, {"rows": files})
    text = modules["tasks"].answer(tmp_path / "results", tmp_path)
    assert "the original itself has 54.5 ± 0.7, where the more frequent answer has 52.7: it guesses." in text
    assert "score: cola 1,000 and 1,010, sst2 (sentences) 1,020 and 1,030, mrpc" in text
    assert cells(text, "original")[7] == "80.0 ± 0.7"
    assert cells(text, "always the same answer")[3:8] == ["0.0", "50.0", "76.0", "0.0", "31.5"]


def test_a_seed_that_lacks_a_task_does_not_count_where_another_is_whole(modules, tmp_path):
    rows = made_up_rows(modules, SCORES)
    rows = [row for row in rows if (row["model"], row["task"], row["seed"]) != ("searched 60%", "mrpc", 1)]
    write_rows(modules, tmp_path / "results", rows)
    text = modules["tasks"].answer(tmp_path / "results", tmp_path)
    assert " ± " in "".join(cells(text, "original"))
    assert " ± " not in "".join(cells(text, "searched 60%"))


def test_ways_are_compared(modules, tmp_path):
    rows = made_up_rows(modules, SCORES)
    for way, mean in (("untaught", 78.0), ("longer", 79.7)):
        rows += [row for row in made_up_rows(modules, {("searched", 0.6): mean}, way=way) if row["seed"] == 0]
    at_once = made_up_rows(modules, {("searched", 0.6): 70.0, ("random", None): 60.0}, way="super")
    rows += [row for row in at_once if row["seed"] == 0]
    write_rows(modules, tmp_path / "results", rows)
    text = modules["tasks"].answer(tmp_path / "results", tmp_path)
    tried = text[text.index("Other ways, tried on stsb") :]
    assert cells(tried, "searched 60%")[1:] == ["93.5", "92.5", "84.5", "-", "94.2"]
    at_once = text[text.index("Super fine-tuning (") :]
    assert cells(at_once, "searched 60%")[1:] == [
        *(f"{69.5 + step:.1f} / {79 + step:.1f}" for step in STEPS),
        "69.5 / 79.0",
    ]
    assert "1 random shapes after super fine-tuning have mean scores from 59.5 to 59.5" in text
