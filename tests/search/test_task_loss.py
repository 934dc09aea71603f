"""The loss on a task: its values for every head, that it does not depend on batches and processes, and its records."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import randomize, tiny_batch, tiny_model
from launching import launch
from test_evaluation import SHAPES, Rank
from torch.nn import functional
from transformers import EvalPrediction

from supershaper_hf import (
    SearchSpace,
    ShapePredictor,
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
    evolutionary_search,
    pareto_front,
)
from supershaper_hf.report.findings import CONFIG_FILE, PREDICTOR_FILE, RECORDS_FILE
from supershaper_hf.report.page import write_report
from supershaper_hf.search.evaluation import evaluate_shapes
from supershaper_hf.search.records import read_records, to_dataset, to_line
from supershaper_hf.search.rounds import best_measured


EXAMPLES = 7
WORDS_LABELS = torch.full((EXAMPLES, 9), -100)  # 3, 0, 5, 1, 1, 1 and 1 labelled tokens
for row, labelled in enumerate([3, 0, 5, 1, 1, 1, 1]):
    WORDS_LABELS[row, :labelled] = torch.arange(labelled) % 3


def cross_entropy(logits, labels):
    return functional.cross_entropy(logits.double(), labels)


# For each kind of task: the head, what its configuration says, the labels, and the loss of all logits.
TASKS = {
    "one label": (
        SuperShaperForSequenceClassification,
        {"num_labels": 3},
        {"labels": torch.arange(EXAMPLES) % 3},
        lambda output, labels: cross_entropy(output.logits, labels["labels"]),
    ),
    "several labels": (
        SuperShaperForSequenceClassification,
        {"num_labels": 3},
        {"labels": torch.arange(3 * EXAMPLES).view(-1, 3).remainder(5).lt(2).float()},
        lambda output, labels: functional.binary_cross_entropy_with_logits(
            output.logits.double(), labels["labels"].double()
        ),
    ),
    "regression": (
        SuperShaperForSequenceClassification,
        {"num_labels": 1},
        {"labels": torch.linspace(-2, 3, EXAMPLES)},
        lambda output, labels: (output.logits[:, 0].double() - labels["labels"].double()).square().mean(),
    ),
    "tokens": (
        SuperShaperForTokenClassification,
        {"num_labels": 3},
        {"labels": WORDS_LABELS},
        lambda output, labels: cross_entropy(output.logits.flatten(0, 1), labels["labels"].flatten()),
    ),
    "answers": (  # the last example has lost the end of its answer
        SuperShaperForQuestionAnswering,
        {},
        {"start_positions": torch.arange(EXAMPLES) % 4, "end_positions": torch.tensor([4, 5, 6, 7, 8, 4, 9])},
        lambda output, labels: (
            (
                7 * cross_entropy(output.start_logits, labels["start_positions"])
                + 6 * cross_entropy(output.end_logits[:6], labels["end_positions"][:6])
            )
            / 13
        ),
    ),
    "multiple choice": (
        SuperShaperForMultipleChoice,
        {},
        {"labels": torch.arange(EXAMPLES) % 3},
        lambda output, labels: cross_entropy(output.logits, labels["labels"]),
    ),
}


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


def make(name, **changes):
    """A model and all its examples as one batch."""
    head, config, labels, _ = TASKS[name]
    return tiny_model(head, **config, **changes), {**tiny_batch(head, batch=EXAMPLES), **labels}


def split(batch, *sizes):
    """Divide the examples into batches, each as long as its longest sequence."""
    parts = zip(*(torch.split(tensor, list(sizes)) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def measure(model, batches, shapes=SHAPES, **options):
    return evaluate_shapes(model, batches, shapes, measure="task_loss", **options)


def accuracy(logits, labels):
    return (logits.argmax(-1) == labels).mean()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_is_the_mean_over_all_labels(task, shape):
    model, batch = make(task)
    labels = {name: tensor for name, tensor in batch.items() if name in TASKS[task][2]}
    inputs = {name: tensor for name, tensor in batch.items() if name not in labels}
    with torch.no_grad():
        expected = TASKS[task][3](model(**inputs, shape=shape), labels).item()
    assert expected > 0.01
    for sizes in ([7], [3, 3, 1], [1, 1, 1, 1, 1, 1, 1], [2, 5]):
        record = measure(model, split(batch, *sizes), shape)
        assert record == {"shape": shape, "task_loss": pytest.approx(expected, rel=1e-5), "score": None}


def test_two_measurements_are_the_same(task):
    model, batch = make(task, hidden_dropout_prob=0.5, classifier_dropout=0.5)
    first = measure(model.train(), split(batch, 3, 4))
    assert measure(model.eval(), split(batch, 3, 4)) == first
    assert len({record["task_loss"] for record in first}) == 3


def test_supernet_at_a_shape_equals_the_subnet(task):
    model, batch = make(task)
    (own,) = measure(model.extract_subnet(SHAPES[1]), [batch], [None])
    assert own["task_loss"] == pytest.approx(measure(model, [batch], SHAPES[1])["task_loss"], rel=1e-4)


# The score


def test_score_is_computed_on_all_examples_in_order(task):
    """As `Trainer` gives them to `compute_metrics`: starts and ends of answers as tuples."""
    model, batch = make(task)
    with torch.no_grad():
        output = model(**batch, shape=SHAPES[1])
    span = task == "answers"
    logits = [output.start_logits, output.end_logits] if span else [output.logits]
    labels = [batch["start_positions"], batch["end_positions"]] if span else [batch["labels"]]
    seen = []

    def number_of_examples(*given):
        given = EvalPrediction(*given)
        for found, expected in ((given.predictions, logits), (given.label_ids, labels)):
            assert isinstance(found, tuple) == span
            for each, tensor in zip(found if span else [found], expected, strict=True):
                np.testing.assert_allclose(each, tensor.numpy(), atol=1e-5)
        seen.append(given)
        return len(labels[0])

    record = measure(model, split(batch, 3, 3, 1), SHAPES[1], score=number_of_examples)
    assert record["score"] == EXAMPLES
    assert len(seen) == 1


def test_sequences_of_unequal_length_are_filled_up():
    model, batch = make("tokens")
    long, short = split(batch, 4, 3)
    short = {name: tensor[:, :6].contiguous() for name, tensor in short.items()}

    def shapes_and_padding(logits, labels):
        assert (logits.shape, labels.shape) == ((7, 9, 3), (7, 9))
        assert (logits[4:, 6:] == -100).all()
        assert (labels[4:, 6:] == -100).all()
        return (logits[4:, :6] == -100).sum()

    assert measure(model, [long, short], SHAPES[1], score=shapes_and_padding)["score"] == 0


def test_accuracy_of_a_shape():
    model, batch = make("one label")
    with torch.no_grad():
        expected = (model(**batch, shape=SHAPES[2]).logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert measure(model, split(batch, 5, 2), SHAPES[2], score=accuracy)["score"] == pytest.approx(expected)


def test_score_that_is_undefined_is_none():
    model, batch = make("regression")
    assert measure(model, [batch], SHAPES[1], score=lambda logits, labels: math.nan)["score"] is None
    with pytest.raises(TypeError, match=r"score must return one number, not \{'accuracy': 1\.0\}"):
        measure(model, [batch], SHAPES[1], score=lambda logits, labels: {"accuracy": 1.0})


# Several processes


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_the_batches(task, processes):
    """Bit for bit, whoever has which batch."""
    model, batch = make(task)
    batches, ranks = split(batch, 2, 1, 3, 1), [Rank(rank, processes) for rank in range(processes)]
    for rank in ranks:
        measure(model, batches, accelerator=rank)
    together = [measure(model, batches, accelerator=Rank(rank, processes, ranks)) for rank in range(processes)]
    assert together == [measure(model, batches)] * processes


def test_two_processes_compute_the_score_of_one(tmp_path):
    process = launch(2, work, tmp_path, log=tmp_path / "log.txt")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
    model, batch = make("tokens")
    expected = measure(model, split(batch, 2, 1, 3, 1)[:3], score=weighted_sum)
    assert [record["score"] for record in expected] != [None] * 3
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
    assert read_records(tmp_path / "records.jsonl") == expected


def weighted_sum(logits, labels):
    """A number that depends on the order of the examples."""
    return float((np.arange(len(logits)) * logits.mean((1, 2))).sum() + (np.arange(len(labels)) * labels.sum(1)).sum())


def work(folder):
    """Three batches on two processes: the second repeats the last one, which does not count."""
    accelerator = Accelerator(cpu=True)
    model, batch = make("tokens")
    options = {"accelerator": accelerator, "score": weighted_sum, "records_file": folder / "records.jsonl"}
    found = measure(model, split(batch, 2, 1, 3, 1)[:3], **options)
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


# Records


def test_file_is_continued_and_tells_what_was_measured(task, tmp_path):
    model, batch = make(task)
    file = tmp_path / "records.jsonl"
    first = measure(model, [batch], SHAPES[:1], records_file=file)
    passes = []
    with model.register_forward_hook(lambda *_: passes.append(1)):
        records = measure(model, [batch], records_file=file)
    assert len(passes) == 1 + 2  # one looks at the precision; the shape that is known is not measured again
    assert records[:1] == first
    assert read_records(file) == records == measure(model, [batch])
    header = json.loads(file.read_text().splitlines()[0])
    assert (header["measure"], header["original"], header["score"]) == ("task_loss", None, None)
    assert header["labels"] == {"several labels": 21, "tokens": 12, "answers": 6.5}.get(task, 7)


def test_scores_are_kept_and_another_score_is_refused(tmp_path):
    model, batch = make("one label")
    file = tmp_path / "records.jsonl"
    records = measure(model, [batch], records_file=file, score=accuracy)
    assert read_records(file) == records
    assert json.loads(file.read_text().splitlines()[0])["score"] == "accuracy"
    with pytest.raises(ValueError, match="holds records of another score: score is accuracy there, None here"):
        measure(model, [batch], records_file=file)
    assert to_dataset(records).to_list() == records
    without = measure(model, [batch])
    assert to_dataset(without).to_list() == without  # a column of scores that are not known


def test_file_of_other_labels_another_head_or_another_measure_is_refused(tmp_path):
    model, batch = make("one label")
    file = tmp_path / "records.jsonl"
    measure(model, [batch], records_file=file)
    with pytest.raises(ValueError, match="holds records of other data"):
        measure(model, [{**batch, "labels": batch["labels"].flip(0)}], records_file=file)
    with pytest.raises(ValueError, match="measure is task_loss there, distance here"):
        evaluate_shapes(model, [batch], SHAPES, measure="distance", records_file=file)
    with torch.no_grad():
        model.classifier.bias[0] += 1
    with pytest.raises(ValueError, match="holds records of another model"):
        measure(model, [batch], records_file=file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task_loss": -0.5}, r"task_loss -0\.5 is below 0"),
        ({"task_loss": None}, "task_loss None is not a number"),
        ({"score": "high"}, "score 'high' is neither a number nor null"),
        ({"score": True}, "score True is neither a number nor null"),
        ({"cosine": 0.5}, "not an object with shape, task_loss, score"),
    ],
)
def test_line_that_is_no_loss_on_a_task_is_named_and_left_out(tmp_path, change, reason):
    model, batch = make("one label")
    file = tmp_path / "records.jsonl"
    records = measure(model, [batch], records_file=file)
    header, first, *lines = file.read_text().splitlines()
    content = json.loads(first) | change
    del content["checksum"]
    file.write_text("\n".join([header, to_line(content).strip(), *lines, ""]))
    with pytest.warns(UserWarning, match=rf"line 2 \({reason}"):
        assert read_records(file) == records[1:]


@pytest.mark.parametrize("change", [{"score": 1.0}, {"measure": "loss", "score": "accuracy"}, {"original": "abc"}])
def test_header_that_cannot_be_is_refused(tmp_path, change):
    model, batch = make("one label")
    file = tmp_path / "records.jsonl"
    measure(model, [batch], records_file=file)
    header, *lines = file.read_text().splitlines()
    content = json.loads(header) | change
    del content["checksum"]
    file.write_text("\n".join([to_line(content).strip(), *lines, ""]))
    with pytest.raises(ValueError, match="does not begin with a valid header"):
        read_records(file)


def test_loss_that_is_not_finite_has_a_record(tmp_path):
    model, batch = make("regression")
    file = tmp_path / "records.jsonl"
    with torch.no_grad():
        model.classifier.bias[0] = math.inf
    records = measure(model, [batch], records_file=file, score=accuracy)
    assert {record["task_loss"] for record in records} == {math.inf}
    assert repr(read_records(file)) == repr(records)


# The search for the task


@pytest.mark.filterwarnings("ignore:Shapes left out of the fit are predicted poorly")  # seven examples
def test_predictor_front_search_and_report_are_about_the_task(tmp_path):
    model, batch = make("one label")
    space = SearchSpace.from_config(model.config)
    shapes = space.sample(60, seed=1).tolist()
    records = measure(model, [batch], shapes, records_file=tmp_path / RECORDS_FILE, score=accuracy)
    predictor = ShapePredictor.fit_records(records)
    predictor.save(tmp_path / PREDICTOR_FILE)
    assert ShapePredictor.load(tmp_path / PREDICTOR_FILE).measure == "task_loss"
    front = pareto_front(space, predictor)
    budget = front.costs["parameters"].mean()
    assert set(front.table()[0]) == {"shape", "parameters", "task_loss"}
    within = [record for record in records if space.num_parameters(record["shape"]) <= budget]
    lowest = min(within, key=lambda record: record["task_loss"])
    assert best_measured(space, records, "parameters", budget) == lowest["shape"]
    found = evolutionary_search(space, predictor, {"parameters": budget}, iterations=30)
    assert found.task_loss == pytest.approx(predictor.predict(front.best(budget)))
    assert (found.loss, found.distance) == (None, None)
    small = evolutionary_search(
        space, predictor, {"task_loss": found.task_loss + 0.01}, minimize="parameters", iterations=30
    )
    assert predictor.predict(small.shape) <= found.task_loss + 0.01
    model.config.to_json_file(tmp_path / CONFIG_FILE)
    page = write_report(tmp_path, max_cost=[budget]).read_text()
    assert "all on the same examples of the task" in page
    assert f"| {lowest['task_loss']:.3f} | {lowest['shape']!s} |" in page
    assert "distance" not in page
    assert "perplexity" not in page


# Errors


@pytest.mark.parametrize("head", [SuperShaperModel, SuperShaperForMaskedLM])
def test_model_without_a_head_of_a_task_is_refused(head):
    batch = {**tiny_batch(), "labels": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match=rf"{head.__name__} has no head of a task.*SequenceClassification"):
        measure(tiny_model(head), [batch])


def test_wrong_arguments_are_refused():
    model, batch = make("one label")
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match=r"A batch has \['attention_mask', .*\], but no labels"):
        measure(model, [unlabelled])
    with pytest.raises(ValueError, match="The batches have no label but -100"):
        measure(model, [{**batch, "labels": torch.full((EXAMPLES,), -100)}])
    with pytest.raises(ValueError, match='for measure="distance" only'):
        measure(model, [batch], original=randomize(tiny_model(), seed=1))
    with pytest.raises(ValueError, match='score is computed for measure="task_loss" only'):
        evaluate_shapes(model, [batch], SHAPES, measure="distance", score=accuracy)
