import doctest
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import tiny_model
from forking import finish, fork
from texts import random_documents

from supershaper_hf import SuperShaperForMaskedLM
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.model.modeling_supershaper import IGNORE_INDEX
from supershaper_hf.search import evaluation
from supershaper_hf.search.evaluation import evaluate_shapes, measure_batch


SHAPES = [[48, 48, 48], [8, 20, 36], [36, 0, 8]]


@pytest.fixture
def batches(tokenizer):
    """Masked batches of unequal size: 5 sequences each, the last of 1."""
    sequences = tokenize(random_documents(4), tokenizer, max_length=12)
    return fixed_masks(sequences.select(range(16)), tokenizer, batch_size=5, mlm_probability=0.4)


@torch.no_grad()
def by_hand(model, batches, shape):
    """Loss and accuracy over all labelled tokens, from dense predictions of one sequence at a time."""
    log_probabilities, hits = [], []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            logits = model(ids[None], mask[None], shape=shape).logits[0]
            for position in range(len(labels)):
                if labels[position] != IGNORE_INDEX:
                    log_probabilities.append(logits[position].log_softmax(-1)[labels[position]].item())
                    hits.append(logits[position].argmax() == labels[position])
    return -sum(log_probabilities) / len(log_probabilities), sum(hits).item() / len(hits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_accuracy_are_means_over_all_labelled_tokens(batches, shape):
    model = tiny_model()
    loss, accuracy = by_hand(model, batches, shape)
    (record,) = evaluate_shapes(model, batches, [shape])
    assert record["loss"] == pytest.approx(loss, abs=1e-5)
    assert record["accuracy"] == pytest.approx(accuracy)


def test_accuracy_of_a_model_that_knows_one_word(batches):
    model, word = tiny_model(), int(batches[0]["labels"].max())
    with torch.no_grad():
        model.cls["predictions"].decoder.bias[word] = 100.0
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    (record,) = evaluate_shapes(model, batches, [None])
    assert 0 < record["accuracy"] < 1
    assert record["accuracy"] == pytest.approx(((labels == word).sum() / (labels != IGNORE_INDEX).sum()).item())


def test_perplexity_is_the_exponential_of_the_loss(batches):
    for record in evaluate_shapes(tiny_model(), batches, SHAPES):
        assert record["perplexity"] == math.exp(record["loss"])


@pytest.mark.parametrize(("bias", "infinite"), [(709.0, False), (712.0, True)])
def test_perplexity_that_overflows_is_infinite(batches, bias, infinite):
    """A model that is sure of a wrong word."""
    model = tiny_model()
    with torch.no_grad():
        model.cls["predictions"].decoder.bias.zero_()[0] = bias  # padding is never a label
    (record,) = evaluate_shapes(model, batches, [None])
    assert record["loss"] == pytest.approx(bias, abs=8)
    assert math.isinf(record["perplexity"]) == infinite


def test_loss_that_is_no_number_has_no_perplexity(batches):
    model = tiny_model()
    with torch.no_grad():
        model.cls["predictions"].decoder.bias[0] = math.nan
    (record,) = evaluate_shapes(model, batches, [None])
    assert math.isnan(record["loss"])
    assert math.isnan(record["perplexity"])


def test_two_evaluations_are_identical(batches):
    model = tiny_model()
    assert evaluate_shapes(model, batches, SHAPES) == evaluate_shapes(model, batches, SHAPES)


def test_every_shape_sees_the_same_masks(batches):
    """A shape's record does not depend on its place in the list, nor on what was measured before it."""
    model = tiny_model()
    together = evaluate_shapes(model, batches, SHAPES)
    alone = [evaluate_shapes(model, batches, [shape])[0] for shape in reversed(SHAPES)]
    assert together == alone[::-1]


def test_records_keep_the_order_of_the_shapes(batches):
    records = evaluate_shapes(tiny_model(), batches, [*SHAPES, None])
    assert [record["shape"] for record in records] == [*SHAPES, [48, 48, 48]]
    assert records[0] == records[-1]


def test_shape_that_occurs_twice_is_measured_once(batches):
    model, forward_passes = tiny_model(), []
    model.register_forward_hook(lambda *_: forward_passes.append(1))
    records = evaluate_shapes(model, batches, [*SHAPES, None, *SHAPES])
    assert len(forward_passes) == len(batches) * len(SHAPES)
    records[0]["shape"].append(1)  # each is the caller's own
    assert [record["shape"] for record in records[1:]] == [*SHAPES[1:], [48, 48, 48], *SHAPES]


def test_no_shape_is_no_record(batches):
    assert evaluate_shapes(tiny_model(), batches, []) == []


def test_every_shape_is_checked_before_the_first_is_measured(batches):
    model, forward_passes = tiny_model(), []
    model.register_forward_hook(lambda *_: forward_passes.append(1))
    with pytest.raises(ValueError, match="width 40"):
        evaluate_shapes(model, batches, [*SHAPES, [8, 40, 36]])
    assert forward_passes == []


def test_bar_shows_all_shapes_and_starts_at_those_on_disk(batches, tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    evaluate_shapes(tiny_model(), batches, SHAPES[:1], records_file=file)
    capsys.readouterr()
    evaluate_shapes(tiny_model(), batches, SHAPES, description="Looking", records_file=file)
    bar = capsys.readouterr().err
    assert "Looking:  33%" in bar
    assert "1/3" in bar
    assert "3/3" in bar


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_supernet_at_a_shape_equals_the_subnet(batches, shape):
    model = tiny_model()
    (of_supernet,) = evaluate_shapes(model, batches, [shape])
    (of_subnet,) = evaluate_shapes(model.extract_subnet(shape), batches, [None])
    assert of_subnet["shape"] == [width for width in shape if width]
    assert of_subnet["loss"] == pytest.approx(of_supernet["loss"], abs=1e-5)
    assert of_subnet["accuracy"] == of_supernet["accuracy"]


def test_dropout_is_off_while_measuring(batches):
    model = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    measured = evaluate_shapes(model, batches, SHAPES)
    assert evaluate_shapes(model.train(), batches, SHAPES) == measured


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_training_mode_is_left_as_it_was(batches, training):
    model = tiny_model().train(training)
    evaluate_shapes(model, batches, SHAPES)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_training_mode_is_left_as_it_was_when_measuring_fails(batches, training):
    model = tiny_model().train(training)
    too_long = {name: tensor.repeat(1, 9) for name, tensor in batches[-1].items()}
    with pytest.raises(ValueError, match="Truncate it"):
        evaluate_shapes(model, [*batches, too_long], SHAPES)
    assert {module.training for module in model.modules()} == {training}


def test_weights_and_batches_are_left_as_they_were(batches):
    model = tiny_model()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]
    evaluate_shapes(model, batches, SHAPES)
    torch.testing.assert_close(model.state_dict(), weights, atol=0, rtol=0)
    torch.testing.assert_close(batches, inputs, atol=0, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_without_labels_do_not_count(batches):
    model = tiny_model()
    unlabelled = batches[0] | {"labels": torch.full_like(batches[0]["labels"], IGNORE_INDEX)}
    assert evaluate_shapes(model, [unlabelled, *batches], SHAPES) == evaluate_shapes(model, batches, SHAPES)


def test_text_without_labels_is_refused(batches):
    unlabelled = batches[0] | {"labels": torch.full_like(batches[0]["labels"], IGNORE_INDEX)}
    with pytest.raises(ValueError, match="No token of the batches is labelled"):
        evaluate_shapes(tiny_model(), [unlabelled], SHAPES)


@pytest.mark.parametrize("shapes", [[[8, 40, 36]], [8, 40, 36]], ids=["many", "one"])
def test_wrong_shape_is_refused(batches, shapes):
    with pytest.raises(ValueError, match="width 40 of layer 2 is not one of the width choices"):
        evaluate_shapes(tiny_model(), batches, shapes)


@pytest.mark.parametrize(
    "shapes",
    ["8, 8, 8", ["8", "20", "36"], [["8", "20", "36"]], 8, [8.0, 20.0, 36.0], [[8, 20, 36], 8], {8: 8}],
    ids=str,
)
def test_what_is_no_shape_is_refused(batches, shapes):
    with pytest.raises(TypeError, match="shape"):
        evaluate_shapes(tiny_model(), batches, shapes)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_one_shape_has_one_record(batches, kind):
    model = tiny_model()
    many = evaluate_shapes(model, batches, kind(SHAPES))
    assert [evaluate_shapes(model, batches, kind(shape)) for shape in SHAPES] == many


def test_example():
    results = doctest.testmod(evaluation)
    assert (results.failed, results.attempted) == (0, 9)


# Weights that are mapped to a file


@pytest.fixture
def loaded(tmp_path):
    """A model as `from_pretrained` gives it on a CPU: its weights stay in its file, and begin at any byte."""
    tiny_model(intermediate_size=81).save_pretrained(tmp_path / "model")
    return SuperShaperForMaskedLM.from_pretrained(tmp_path / "model")


def test_a_file_that_is_overwritten_while_shapes_are_measured_changes_nothing(batches, loaded, tmp_path, monkeypatch):
    file, expected = (
        tmp_path / "model" / "model.safetensors",
        evaluate_shapes(tiny_model(intermediate_size=81), batches, SHAPES),
    )
    header = evaluation.make_header(loaded, batches)

    def overwrite_and_measure(*arguments):
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 8)
            stream.write(bytes(file.stat().st_size // 2))
        return measure_batch(*arguments)

    monkeypatch.setattr(evaluation, "measure_batch", overwrite_and_measure)
    assert evaluate_shapes(loaded, batches, SHAPES, records_file=tmp_path / "records.jsonl") == expected
    assert evaluation.make_header(loaded, batches) == header
    assert all(weight.untyped_storage().resizable() for weight in loaded.parameters())  # it is torch's own memory
    assert loaded.cls["predictions"].decoder.weight is loaded.get_input_embeddings().weight


# Several processes


class Rank:
    """One of several processes, as far as evaluation sees an accelerator; keeps the figures it gives to the others."""

    device = torch.device("cpu")

    def __init__(self, process_index, num_processes, others=()):
        self.process_index, self.num_processes, self.others = process_index, num_processes, others
        self.is_main_process = process_index == 0
        self.given = []

    autocast = staticmethod(nullcontext)

    def gather(self, figures):
        number = len(self.given)
        self.given.append(figures)
        return torch.cat([self.others[rank].given[number] if self.others else figures for rank in self.ranks()])

    def ranks(self):
        return range(self.num_processes)


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 7])
def test_processes_share_the_batches(batches, processes):
    model, forward_passes = tiny_model(), []
    model.register_forward_hook(lambda *_: forward_passes.append(1))
    ranks, passes = [Rank(rank, processes) for rank in range(processes)], []
    for rank in ranks:
        forward_passes.clear()
        evaluate_shapes(model, batches, SHAPES, accelerator=rank)
        passes.append(len(forward_passes))
    assert set(passes) == {math.ceil(len(batches) / processes) * len(SHAPES)}  # FSDP needs all in every pass
    together = [
        evaluate_shapes(model, batches, SHAPES, accelerator=Rank(rank, processes, ranks)) for rank in range(processes)
    ]
    assert together == [evaluate_shapes(model, batches, SHAPES)] * processes  # bit for bit


def test_loss_is_rounded_once_after_adding(batches):
    """So the result cannot depend on the order in which batches are added."""
    model = tiny_model()
    assert evaluate_shapes(model, batches, SHAPES) == evaluate_shapes(model, batches[::-1], SHAPES)


def test_accelerator_of_one_process_changes_nothing(batches):
    model = tiny_model()
    assert evaluate_shapes(model, batches, SHAPES, accelerator=Accelerator()) == evaluate_shapes(model, batches, SHAPES)


def disagree(folder):
    """On each of two processes: what it is told where only one of them is wrong or fails."""
    accelerator = Accelerator()
    is_second = accelerator.process_index == 1
    ids = torch.arange(5, 25).view(2, 10)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 2
    unlabelled = [batch | {"labels": torch.full_like(ids, IGNORE_INDEX)} for batch in batches]

    def told(batches=batches, shape=(8, 8, 20)):
        try:
            evaluate_shapes(tiny_model(), batches, [[8, 8, 8], shape], accelerator=accelerator)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError("no error was raised")

    def out_of_memory(*_):
        if is_second:
            raise torch.OutOfMemoryError("out of memory")
        return torch.zeros(2)

    found = {
        "shapes": told(shape=(8, 8, 36 if is_second else 20)),
        "one shape is wrong": told(shape=7 if is_second else (8, 8, 20)),
        "batches": told(batches[: 1 if is_second else 2]),
        "no labels on one": told(unlabelled if is_second else batches),
    }
    evaluation.measure_batch = out_of_memory
    found["out of memory"] = told()
    torch.save(found, folder / f"rank{accelerator.process_index}.pt")
    torch.distributed.destroy_process_group()


def test_what_is_wrong_on_one_process_is_told_to_all(tmp_path):
    """Else the others would wait for ever, or add up losses of different shapes or text."""
    finish(fork(2, disagree, tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first == second
    assert first["shapes"].startswith("ValueError: Processes [1] ask for other shapes than process 0")
    assert first["one shape is wrong"].startswith("TypeError: shape=7 must be a list of 3 integers")
    assert first["batches"].startswith("ValueError: Processes [1] have other batches than process 0")
    assert first["no labels on one"].startswith("ValueError: No token of the batches is labelled")
    assert first["out of memory"] == "OutOfMemoryError: out of memory"


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def precision_of(file):
    return json.loads(file.read_text().splitlines()[0])["precision"]


def test_mixed_precision_of_the_accelerator_is_computed_in_and_recorded(batches, tmp_path, fresh_accelerate):
    model = tiny_model()
    (full,) = evaluate_shapes(model, batches, [None])
    mixed = Accelerator(cpu=True, mixed_precision="bf16")
    (found,) = evaluate_shapes(model, batches, [None], accelerator=mixed, records_file=tmp_path / "mixed.jsonl")
    assert precision_of(tmp_path / "mixed.jsonl") == "bfloat16"
    assert found["loss"] != full["loss"]
    assert found["loss"] == pytest.approx(full["loss"], rel=0.05)
    assert found == evaluate_shapes(mixed.prepare(tiny_model()), batches, [None], accelerator=mixed)[0]


def test_distances_are_measured_in_mixed_precision_too(batches, tmp_path, fresh_accelerate):
    file, mixed = tmp_path / "mixed.jsonl", Accelerator(cpu=True, mixed_precision="bf16")
    full = evaluate_shapes(tiny_model(), batches, SHAPES[1], measure="distance")
    found = evaluate_shapes(tiny_model(), batches, SHAPES[1], accelerator=mixed, records_file=file, measure="distance")
    assert precision_of(file) == "bfloat16"
    assert found["distance"] != full["distance"]
    assert found["distance"] == pytest.approx(full["distance"], rel=0.05)


def test_precision_of_a_prepared_model_is_seen_without_its_accelerator(batches, tmp_path, fresh_accelerate):
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny_model())
    evaluate_shapes(model.train(), batches, [None], records_file=tmp_path / "mixed.jsonl")
    assert precision_of(tmp_path / "mixed.jsonl") == "bfloat16"
    assert model.training
    assert not model.get_input_embeddings()._forward_pre_hooks
