"""Records on disk: real files, kills and full disks, and several processes."""

import copy
import doctest
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from conftest import SPECIAL_TOKENS, WORDS, randomize, tiny_model
from datasets import Dataset
from forking import finish, fork
from texts import random_documents
from transformers import BertTokenizer

from supershaper_hf import SearchSpace, SuperShaperForMaskedLM, __version__
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.files import checksum, lock
from supershaper_hf.search import evaluation
from supershaper_hf.search import records as records_module
from supershaper_hf.search.evaluation import evaluate_shapes, make_header, measure_batch
from supershaper_hf.search.fingerprints import fingerprint_data, fingerprint_model
from supershaper_hf.search.measures import MEASURES
from supershaper_hf.search.records import (
    FORMAT,
    append_record,
    open_records,
    parse_line,
    perplexity,
    read_records,
    to_dataset,
)


MODEL = tiny_model()
SPACE = SearchSpace(MODEL.config)
SHAPES = [[20, 36, 8], [48, 36, 0], [0, 8, 8], [0, 36, 48], [36, 36, 36], [8, 20, 36], SPACE.largest]
STOPPED_AT = SHAPES[3]  # where runs wait to be killed
KEYS = MEASURES["loss"].keys
ODD = {"nan": math.nan, "inf": math.inf}


def masked_batches(count=3, seed=0):
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    sequences = tokenize(random_documents(8, words=27, seed=1), tokenizer, 12)
    return fixed_masks(sequences, tokenizer, 8, mlm_probability=0.4, seed=seed)[:count]


@pytest.fixture(scope="module")
def batches():
    return masked_batches()


@pytest.fixture(scope="module")
def whole(batches):
    """The records of a run that nothing disturbed."""
    return evaluate_shapes(MODEL, batches, SHAPES)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "search" / "records.jsonl"


@pytest.fixture
def written(file, batches):
    """A file with the records of all shapes."""
    evaluate_shapes(MODEL, batches, SHAPES, records_file=file)
    return file


@pytest.fixture
def measured(monkeypatch):
    """The shapes that are measured, in order."""
    shapes, measure = [], evaluation.Evaluation.measure

    def watched(self, shape):
        shapes.append(shape)
        return measure(self, shape)

    monkeypatch.setattr(evaluation.Evaluation, "measure", watched)
    return shapes


def unsigned(line):
    content = json.loads(line)
    assert content.pop("checksum") == checksum(content)
    return content


def rows(file):
    """The records in a file as they are written, without their checksums, which are right."""
    return [unsigned(line) for line in file.read_bytes().splitlines()[1:]]


def edit(file, number, change):
    """Change one line, counted from 1."""
    lines = file.read_bytes().split(b"\n")
    lines[number - 1] = change(lines[number - 1])
    file.write_bytes(b"\n".join(lines))


def edited(**values):
    """A change that somebody makes by hand."""
    return lambda line: json.dumps(json.loads(line) | values).encode()


def signed(line, **values):
    content = unsigned(line) | values
    return json.dumps(content | {"checksum": checksum(content)}).encode()


def changed(**values):
    """A change by something that also writes the checksum, so that the types have to be checked."""
    return lambda line: signed(line, **values)


def without(key):
    def remove(line):
        content = {name: value for name, value in unsigned(line).items() if name != key}
        return json.dumps(content | {"checksum": checksum(content)}).encode()

    return remove


@contextmanager
def limited_files(size):
    """No file can grow beyond `size` bytes."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def message_of(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error was raised")


# What is written


def test_records_are_those_measured_without_a_file(written, whole, batches):
    assert evaluate_shapes(MODEL, batches, SHAPES, records_file=written) == whole
    assert read_records(written) == whole
    assert rows(written) == whole


def test_header_tells_what_was_measured(written, batches):
    header = unsigned(written.read_bytes().splitlines()[0])
    labelled = sum((batch["labels"] >= 0).sum().item() for batch in batches)
    assert header == {
        "format": "supershaper-hf records 2",
        "version": __version__,
        "measure": "loss",
        "model": fingerprint_model(MODEL),
        "original": None,
        "score": None,
        "layers": None,
        "data": fingerprint_data(batches),
        "precision": "no",
        "num_layers": 3,
        "width_choices": [8, 20, 36, 48],
        "hidden_size": 48,
        "hidden_sizes": [48, 48, 48],
        "parameters": MODEL.num_parameters(),
        "sequences": sum(len(batch["labels"]) for batch in batches),
        "labelled_tokens": labelled,
    }


def test_header_of_a_file_is_what_make_header_says(file, batches):
    header = make_header(MODEL, batches)
    assert open_records(file, header) == open_records(file, header) == []
    assert unsigned(file.read_bytes()) == {"format": FORMAT, **header}


def test_each_record_is_on_disk_before_the_next_shape_is_measured(file, batches, whole, monkeypatch):
    seen, measure = [], evaluation.Evaluation.measure

    def watched(self, shape):
        seen.append(read_records(file))
        return measure(self, shape)

    monkeypatch.setattr(evaluation.Evaluation, "measure", watched)
    evaluate_shapes(MODEL, batches, SHAPES, records_file=file)
    assert seen == [whole[:number] for number in range(len(SHAPES))]


def test_only_shapes_that_are_not_there_are_measured(file, batches, whole, measured):
    evaluate_shapes(MODEL, batches, SHAPES[:2], records_file=file)
    before = file.read_bytes()
    measured.clear()
    asked = [SHAPES[4], SHAPES[1], SHAPES[4], SHAPES[0]]
    assert evaluate_shapes(MODEL, batches, asked, records_file=file) == [whole[4], whole[1], whole[4], whole[0]]
    assert measured == [SHAPES[4]]
    assert file.read_bytes().startswith(before)
    assert read_records(file) == [whole[0], whole[1], whole[4]]


def test_full_shape_may_be_left_out(file, batches, whole, measured):
    evaluate_shapes(MODEL, batches, [None], records_file=file)
    assert evaluate_shapes(MODEL, batches, [SPACE.largest], records_file=file) == whole[-1:]
    assert measured == [None]


def test_subnet_has_one_record(file, batches):
    subnet = MODEL.extract_subnet([8, 0, 36])
    (record,) = evaluate_shapes(subnet, batches, [None], records_file=file)
    assert evaluate_shapes(subnet, batches, [None], records_file=file) == read_records(file) == [record]
    edit(file, 2, changed(shape=[8, 36, 36]))
    with pytest.warns(UserWarning, match=r"line 2 \(\[8, 36, 36\] is not a shape"):
        assert read_records(file) == []


def test_records_can_be_measured_by_a_model_that_was_loaded_again(written, batches, tmp_path, whole, measured):
    MODEL.save_pretrained(tmp_path / "model")
    loaded = SuperShaperForMaskedLM.from_pretrained(tmp_path / "model")
    assert evaluate_shapes(loaded, batches, SHAPES, records_file=written) == whole
    assert measured == []


# Losses that are no numbers


@pytest.mark.parametrize(("name", "loss"), ODD.items())
def test_loss_that_is_no_number_comes_back_and_is_not_measured_again(name, loss, file, batches, monkeypatch, measured):
    figures = torch.tensor([loss, 1.0])
    monkeypatch.setattr(evaluation, "measure_batch", lambda *_: figures)
    first = evaluate_shapes(MODEL, batches, SHAPES[:2], records_file=file)
    again = evaluate_shapes(MODEL, batches, SHAPES[:2], records_file=file)
    assert measured == SHAPES[:2]
    assert repr(first) == repr(again) == repr(read_records(file))
    assert [repr(record[key]) for record in again for key in ("loss", "perplexity")] == [name] * 4
    append_record(file, first[0])
    assert repr(read_records(file)) == repr(first)  # the same twice is no damage
    for row in rows(file):  # no NaN or Infinity, which are no JSON
        assert (row["loss"], row["perplexity"], row["loss_is"]) == (None, None, name)


def test_perplexity_that_overflows_comes_back(file, batches, monkeypatch):
    monkeypatch.setattr(evaluation, "measure_batch", lambda *_: torch.tensor([800.0, 1.0]))
    (record,) = evaluate_shapes(MODEL, batches, [None], records_file=file)
    assert (record["loss"], record["perplexity"]) == (800.0, math.inf)
    assert read_records(file) == [record]
    assert rows(file)[0]["perplexity"] is None


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (1.5, math.exp(1.5)), (709.0, math.inf)])
def test_perplexity(loss, expected):
    assert perplexity(loss) == expected
    assert math.isnan(perplexity(math.nan))


# Another model, other data


def nudge(model):
    """Change one weight by as little as there is."""
    with torch.no_grad():
        weight = model.bert.encoder.layer[2].output.dense.weight
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(math.inf))
    return model


OTHER_MODELS = {
    "weight": lambda: nudge(tiny_model()),
    "dtype": lambda: tiny_model().to(torch.float64),
    "width choices": lambda: tiny_model(width_choices=[8, 20, 48]),
    "slicing": lambda: tiny_model(head_slicing="per_head"),
    "heads": lambda: tiny_model(num_attention_heads=2),
    "activation": lambda: tiny_model(hidden_act="relu"),
    "epsilon": lambda: tiny_model(layer_norm_eps=1e-3),
    "subnet": lambda: tiny_model().extract_subnet(SPACE.largest),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_file_of_another_model_is_refused(other, written, batches, measured):
    model, before = OTHER_MODELS[other](), written.read_bytes()
    measured.clear()
    message = f"records of another model: model is {fingerprint_model(MODEL)} there, {fingerprint_model(model)} here"
    with pytest.raises(ValueError, match=rf"records\.jsonl holds {message}\. Give another records_file, or delete"):
        evaluate_shapes(model, batches, [None], records_file=written)
    assert written.read_bytes() == before
    assert measured == []


def flip(batches, name):
    batches = copy.deepcopy(batches)
    position = (batches[-1]["labels"] >= 0).nonzero()[-1]
    batches[-1][name][tuple(position)] ^= 1
    return batches


OTHER_DATA = {
    "masks": lambda batches: masked_batches(seed=1),
    "one batch less": lambda batches: batches[:-1],
    "order": lambda batches: batches[::-1],
    "token": lambda batches: flip(batches, "input_ids"),
    "label": lambda batches: flip(batches, "labels"),
    "padding": lambda batches: flip(batches, "attention_mask"),
    "types": lambda batches: [batch | {"token_type_ids": batch["attention_mask"]} for batch in batches],
}


@pytest.mark.parametrize("other", OTHER_DATA)
def test_file_of_other_data_is_refused(other, written, batches):
    data = OTHER_DATA[other](batches)
    message = f"records of other data: data is {fingerprint_data(batches)} there, {fingerprint_data(data)} here"
    with pytest.raises(ValueError, match=rf"records\.jsonl holds {message}\. Give another records_file, or delete"):
        evaluate_shapes(MODEL, data, SHAPES, records_file=written)


def test_file_of_another_precision_is_refused(written, batches):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="another precision: precision is no there, bfloat16 here"),
    ):
        evaluate_shapes(MODEL, batches, SHAPES, records_file=written)


def test_fingerprints_are_those_of_the_same_numbers(batches):
    """Also where memory is laid out otherwise, and for a model that is being trained."""
    model = randomize(SuperShaperForMaskedLM(MODEL.config))
    with torch.no_grad():
        dense = model.bert.encoder.layer[0].output.dense
        dense.weight = torch.nn.Parameter(dense.weight.T.contiguous().T)
    assert fingerprint_model(model.train()) == fingerprint_model(MODEL)
    strided = [{name: tensor.T.contiguous().T for name, tensor in reversed(batch.items())} for batch in batches]
    assert fingerprint_data(strided) == fingerprint_data(batches)


def test_scale_of_the_attention_scores_has_a_fingerprint():
    """It changes every narrow shape, and no weight."""
    model = tiny_model()
    model.config.full_head_scale = True
    assert fingerprint_model(model) != fingerprint_model(MODEL)


def test_bfloat16_has_a_fingerprint():
    model = tiny_model().to(torch.bfloat16)
    assert fingerprint_model(model) == fingerprint_model(tiny_model().to(torch.bfloat16)) != fingerprint_model(MODEL)


# Damage

DAMAGE = {
    "not JSON": (lambda line: line[:-5], "not JSON"),
    "zeros": (lambda line: bytes(len(line)), "not JSON"),
    "not text": (lambda line: b"\xff\xfe" + line, "not JSON"),
    "too deep": (lambda line: b"[" * 100_000, "not JSON"),
    "no number": (lambda line: line.replace(b'"loss": ', b'"loss": NaN, "old": '), "not JSON"),
    "endless number": (lambda line: line.replace(b'"loss": ', b'"loss": %s, "old": ' % (b"9" * 5000)), "not JSON"),
    "a list": (lambda line: b"[" + line + b"]", "not a JSON object"),
    "digit of a width": (
        lambda line: line.replace(b"[0, 8, 8]", b"[8, 8, 8]"),
        "its checksum is wrong: it was changed",
    ),
    "digit of the accuracy": (edited(accuracy=0.125), "its checksum is wrong: it was changed"),
    "no checksum": (lambda line: json.dumps(unsigned(line)).encode(), "its checksum is wrong: it was changed"),
    "checksum": (edited(checksum=7), "its checksum is wrong: it was changed"),
    "key missing": (lambda line: line.replace(b"accuracy", b"akkuracy"), "its checksum is wrong: it was changed"),
    "another key": (without("accuracy"), "not an object with shape, loss, perplexity, accuracy"),
    "key added": (changed(seconds=1.0), "not an object with .*"),
    "width": (changed(shape=[8, 9, 36]), r"\[8, 9, 36\] is not a shape of this supernet"),
    "width as truth": (changed(shape=[8, False, 36]), r"\[8, False, 36\] is not a shape of this supernet"),
    "length": (changed(shape=[8, 20]), r"\[8, 20\] is not a shape of this supernet"),
    "empty": (changed(shape=[0, 0, 0]), r"\[0, 0, 0\] is not a shape of this supernet"),
    "no list": (changed(shape=8), "8 is not a shape of this supernet"),
    "loss": (changed(loss=1.25), r"perplexity [\d.]+ is not the exponential of loss 1\.25"),
    "loss as text": (changed(loss="1.25"), r"loss '1\.25' is not a number"),
    "loss unknown": (changed(loss=None), "loss None is not a number"),
    "loss of nothing": (changed(loss=None, perplexity=None, loss_is="-inf"), "loss None is not a number"),
    "endless loss": (changed(loss=10**400), "loss 10+ is not a number"),
    "infinite loss": (
        lambda line: signed(line, loss=math.inf).replace(b"Infinity", b"1e999"),
        "not JSON",
    ),
    "perplexity": (changed(perplexity=None), r"perplexity None is not the exponential of loss .*"),
    "perplexity as text": (changed(perplexity="2"), r"perplexity '2' is not the exponential of loss .*"),
    "accuracy": (changed(accuracy=1.25), r"accuracy 1\.25 is not a number from 0 to 1"),
    "accuracy unknown": (changed(accuracy=None), "accuracy None is not a number from 0 to 1"),
    "accuracy as truth": (changed(accuracy=True), "accuracy True is not a number from 0 to 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_line_is_named_left_out_and_measured_again(damage, written, batches, whole, measured):
    change, reason = DAMAGE[damage]
    edit(written, 4, change)
    message = rf"records\.jsonl: 1 damaged line\(s\) do not count.*: line 4 \({reason}\)\.$"
    with pytest.warns(UserWarning, match=message):
        assert read_records(written) == whole[:2] + whole[3:]
    damaged = written.read_bytes()
    measured.clear()
    with pytest.warns(UserWarning, match=message):
        assert evaluate_shapes(MODEL, batches, SHAPES, records_file=written) == whole
    assert measured == [SHAPES[2]]
    assert written.read_bytes().startswith(damaged)
    with pytest.warns(UserWarning, match=message):
        assert sorted(map(repr, read_records(written))) == sorted(map(repr, whole))


def test_every_damaged_line_is_named_up_to_ten(written):
    with written.open("a") as stream:
        stream.write("nonsense\n" * 12)
    with pytest.warns(UserWarning, match=r"12 damaged .*line 9 \(not JSON\); .*line 18 \(not JSON\); and 2 more\.$"):
        read_records(written)


def test_empty_lines_are_no_damage(written, whole):
    edit(written, 3, lambda line: b"\n" + line + b"\r\n")
    assert read_records(written) == whole


def test_of_two_records_of_a_shape_the_first_counts(written, whole, batches):
    last = written.read_bytes().split(b"\n")[-2]
    with written.open("ab") as stream:
        stream.write(last + b"\n")
    assert read_records(written) == whole  # the same twice is no damage
    other = {"shape": SHAPES[-1], "loss": 1.0, "perplexity": math.exp(1.0), "accuracy": 0.5}
    append_record(written, other)
    with pytest.warns(UserWarning, match=r"line 10 \(\[48, 48, 48\] was measured before, with another result\)"):
        assert evaluate_shapes(MODEL, batches, SHAPES, records_file=written) == whole


@pytest.mark.parametrize("left", [1, 20, -3, -2, -1], ids=lambda left: f"{left} bytes")
def test_half_a_last_line_is_cut_off_and_the_next_is_not_glued_to_it(left, written, batches, whole, measured):
    """A line that lacks no more than its end counts."""
    content = written.read_bytes()
    last = content[:-1].rindex(b"\n") + 1
    written.write_bytes(content[: last + left if left > 0 else left])
    halved, complete = written.read_bytes(), left == -1
    measured.clear()
    if complete:
        assert read_records(written) == whole
        assert evaluate_shapes(MODEL, batches, SHAPES, records_file=written) == whole
        append_record(written, whole[0])
    else:
        with pytest.warns(UserWarning, match=r"line 8 \(an incomplete line, as a killed run leaves it\)"):
            assert read_records(written) == whole[:-1]
        assert written.read_bytes() == halved  # reading changes nothing
        with pytest.warns(UserWarning, match=r"line 8 \(an incomplete line"):
            assert evaluate_shapes(MODEL, batches, SHAPES, records_file=written) == whole
        assert written.read_bytes() == content
    assert measured == ([] if complete else [SHAPES[-1]])
    assert read_records(written) == whole  # without a warning


def test_header_may_lack_its_end(file, batches, whole):
    evaluate_shapes(MODEL, batches, [], records_file=file)
    file.write_bytes(file.read_bytes().rstrip())
    assert read_records(file) == []
    assert evaluate_shapes(MODEL, batches, SHAPES, records_file=file) == whole
    assert read_records(file) == whole


HEADERS = {
    "cut off": lambda line: line[:-7],
    "missing": lambda line: b"",
    "a record": lambda line: b'{"shape": [8, 8, 8], "loss": 0.0, "perplexity": 1.0, "accuracy": 0.5}',
    "other format": changed(format="supershaper-hf predictor 2"),
    "no format": without("format"),
    "no model": without("model"),
    "no data": changed(data=None),
    "no precision": without("precision"),
    "no layers": changed(num_layers=4),
    "no choices": changed(width_choices="8"),
    "no key of choices": without("width_choices"),
    "edited": edited(precision="bfloat16"),
    "too deep": lambda line: b"[" * 100_000,
    "no sizes": changed(hidden_sizes=None),
    "a number": lambda line: b"3",
    "not text": lambda line: b"\xff" + line,
}


@pytest.mark.parametrize("damage", HEADERS)
def test_damaged_header_is_refused(damage, written, batches):
    edit(written, 1, HEADERS[damage])
    before = written.read_bytes()
    for use in (read_records, lambda file: evaluate_shapes(MODEL, batches, SHAPES, records_file=file)):
        with pytest.raises(
            ValueError, match=r"(?s)records\.jsonl does not begin with a valid header .*Give another records_f"
        ):
            use(written)
    assert written.read_bytes() == before


@pytest.mark.parametrize("number", [1, 3])
def test_file_of_another_version_is_refused_and_named(number, written, batches):
    """Version 1 had no checksums."""
    edit(written, 1, edited(format=f"supershaper-hf records {number}"))
    before = written.read_bytes()
    message = rf"records\.jsonl has the format 'supershaper-hf records {number}', but this version .* needs '{FORMAT}'"
    for use in (read_records, lambda file: evaluate_shapes(MODEL, batches, SHAPES, records_file=file)):
        with pytest.raises(ValueError, match=message):
            use(written)
    assert written.read_bytes() == before


@pytest.mark.parametrize("depth", range(800, 1200, 3))
def test_lines_that_are_nested_deeply_raise_no_recursion_error(depth):
    """Neither where they are parsed, nor where their checksum is computed."""
    with pytest.raises(ValueError, match=r"^not JSON$|checksum is wrong"):
        parse_line(b'{"a": ' * depth + b"1" + b"}" * depth)


def test_example():
    results = doctest.testmod(records_module)
    assert (results.failed, results.attempted) == (0, 9)


def outcome_of(file):
    try:
        return read_records(file)
    except ValueError as error:
        return error


def test_no_changed_byte_gives_other_numbers(file, batches):
    """Whatever one byte becomes: the same records, fewer with a warning that names the line, or a refusal."""
    whole = evaluate_shapes(MODEL, batches, SHAPES[:2], records_file=file)
    good, outcomes = file.read_bytes(), set()
    for position in range(len(good)):
        for flip in (0x01, good[position] ^ ord("\n")):
            file.write_bytes(good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :])
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                outcome = outcome_of(file)
            if isinstance(outcome, ValueError):
                assert str(file) in str(outcome)
                outcomes.add("refused")
            elif outcome == whole:
                outcomes.add("the same")
            else:
                assert all(record in whole for record in outcome)
                assert re.search(
                    r"records\.jsonl: \d damaged line\(s\) do not count.*: line [234] \(", str(warned[0].message)
                )
                outcomes.add("fewer")
    assert outcomes == {"the same", "fewer", "refused"}


def test_empty_file_is_begun(file, batches, whole):
    file.parent.mkdir()
    file.touch()
    assert evaluate_shapes(MODEL, batches, SHAPES, records_file=str(file)) == whole
    assert read_records(str(file)) == whole


def test_leftover_of_a_header_is_no_obstacle(file, batches, whole):
    file.parent.mkdir()
    (file.parent / f".{file.name}.partial").write_text('{"format": "supersh')
    evaluate_shapes(MODEL, batches, SHAPES, records_file=file)
    assert {path.name for path in file.parent.iterdir()} == {file.name, f".{file.name}.lock"}
    assert read_records(file) == whole


# Disks


def test_file_that_cannot_be_made_is_named(tmp_path, batches):
    (tmp_path / "search").write_text("a file")
    with pytest.raises(OSError, match=r"search/records\.jsonl could not be read or written: .*Solve the problem"):
        evaluate_shapes(MODEL, batches, SHAPES, records_file=tmp_path / "search" / "records.jsonl")
    with pytest.raises(OSError, match=f"{tmp_path} could not be read or written: .*Is a directory"):
        evaluate_shapes(MODEL, batches, SHAPES, records_file=tmp_path)


def test_full_disk_keeps_what_is_there_and_is_repaired(file, batches, whole, capsys):
    """The last write ends within a line. With `capsys` what is printed goes to memory, not to a file."""
    evaluate_shapes(MODEL, batches, [], records_file=file)
    begun = file.stat().st_size
    evaluate_shapes(MODEL, batches, SHAPES[:2], records_file=file)
    limit = file.stat().st_size + (file.stat().st_size - begun) // 4
    with limited_files(limit), pytest.raises(OSError, match=r"could not be read or written: .*File too large") as error:
        evaluate_shapes(MODEL, batches, SHAPES, records_file=file)
    assert str(file) in str(error.value)
    assert file.stat().st_size == limit
    with pytest.warns(UserWarning, match=r"1 damaged line\(s\) do not count.*an incomplete line"):
        assert read_records(file) == whole[:2]
    with pytest.warns(UserWarning, match="an incomplete line"):
        assert evaluate_shapes(MODEL, batches, SHAPES, records_file=file) == whole
    assert read_records(file) == whole


# Datasets


def test_dataset_and_parquet_give_the_records_back(written, whole, tmp_path):
    odd = [
        {"shape": [8, 8, 8], "loss": math.nan, "perplexity": math.nan, "accuracy": 0.0},
        {"shape": [8, 0, 8], "loss": 800.0, "perplexity": math.inf, "accuracy": 0.25},
    ]
    records = read_records(written) + odd
    dataset = to_dataset(records)
    assert dataset.column_names == list(KEYS)
    dataset.to_parquet(tmp_path / "records.parquet")
    loaded = Dataset.from_parquet(str(tmp_path / "records.parquet"))
    assert loaded.features == dataset.features
    assert repr(loaded.to_list()) == repr(dataset.to_list()) == repr(records)


def test_dataset_counts_parameters(whole):
    dataset = to_dataset(whole, SPACE)
    assert dataset.column_names == [*KEYS, "parameters"]
    assert dataset["parameters"][:] == [MODEL.extract_subnet(shape).num_parameters() for shape in SHAPES]


def test_dataset_of_no_records_has_its_columns():
    dataset = to_dataset([], SPACE)
    assert len(dataset) == 0
    assert dataset.features == to_dataset([{"shape": [8, 8, 8]} | dict.fromkeys(KEYS[1:], 1.0)], SPACE).features


def test_dataset_refuses_shapes_of_another_space(whole):
    with pytest.raises(ValueError, match="width 40"):
        to_dataset([whole[0] | {"shape": [40, 8, 8]}], SPACE)


# Kills and several processes


def wait_for(started, folder):
    """Wait until every process of a run is stopped; see `stop`."""
    deadline = time.monotonic() + 90
    while len(list(folder.glob("stopped-*"))) < len(started):
        assert all(process.is_alive() for process in started)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(started):
    for process in started:
        process.kill()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [-signal.SIGKILL] * len(started)


def rows_written(file):
    return file.read_bytes().count(b"\n") - 1


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two runs at once, of one process and of two, killed amid a shape: the folder of each by its processes.

    Also what another run was told that tried to use the same file before.
    """
    folders = {processes: tmp_path_factory.mktemp("killed") for processes in (0, 2)}
    started = {processes: fork(processes, stop, folder) for processes, folder in folders.items()}
    told = {}
    for processes, folder in folders.items():
        wait_for(started[processes], folder)
        file = folder / "records.jsonl"
        before = file.read_bytes()
        told[processes] = message_of(partial(evaluate_shapes, MODEL, masked_batches(), SHAPES, records_file=file))
        assert file.read_bytes() == before
        kill(started[processes])
    return folders, told


@pytest.fixture(scope="module")
def resumed(killed, tmp_path_factory):
    """What each of 2 or 3 processes found: continued the run of one process, that of two, did the whole; refusals."""
    folders, _ = killed
    killed_at = {processes: rows_written(folder / "records.jsonl") for processes, folder in folders.items()}
    given = tmp_path_factory.mktemp("given")
    evaluate_shapes(nudge(tiny_model()), masked_batches(), SHAPES[:1], records_file=given / "records.jsonl")
    MODEL.save_pretrained(given / "model")
    other = shutil.copytree(given, tmp_path_factory.mktemp("copies") / "given")  # both runs lock the records in it
    started = {
        2: fork(2, work_together, folders[0], given, tmp_path_factory.mktemp("disk")),
        3: fork(3, work_together, folders[2], other, tmp_path_factory.mktemp("disk")),
    }
    found = {}
    for processes, folder in ((2, folders[0]), (3, folders[2])):
        finish(started[processes])
        found[processes] = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
    return killed_at, found


@pytest.mark.parametrize("processes", [0, 2])
def test_a_second_run_on_the_same_file_is_told_so_and_stops(processes, killed):
    """What a kill leaves of the lock stops nobody: the tests below go on with the same file."""
    folders, told = killed
    assert told[processes].startswith(f"RuntimeError: {folders[processes] / 'records.jsonl'} is in use by another run.")


@pytest.mark.parametrize("processes", [0, 2])
def test_kill_costs_at_most_the_shape_being_measured(processes, resumed):
    assert resumed[0][processes] == SHAPES.index(STOPPED_AT)


@pytest.mark.parametrize("processes", [2, 3])
def test_another_number_of_processes_goes_on_bit_for_bit(processes, resumed, killed, whole):
    """Two processes with what one left, three with what two left."""
    killed_at, found = resumed
    before = 0 if processes == 2 else 2
    file = killed[0][before] / "records.jsonl"
    for rank in found[processes]:
        assert rank["processes"] == processes
        assert rank["records"] == whole
        assert rank["measured"] == SHAPES[killed_at[before] :]
    assert read_records(file) == whole  # each shape by one process only
    assert len(rows(file)) == len(SHAPES)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_without_a_file_return_the_records_of_one(processes, resumed, whole):
    for rank in resumed[1][processes]:
        assert rank["without file"] == whole


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_load_a_folder_return_the_records_of_the_model_that_was_saved(processes, resumed, whole):
    """To the last bit, although a mapped weight begins at any byte of its file."""
    for rank in resumed[1][processes]:
        assert rank["loaded"] == whole


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_fail_together(processes, resumed):
    """Where the file is of another model or in use, where they differ among themselves, and where the disk is full."""
    for rank in resumed[1][processes]:
        assert "holds records of another model" in rank["another model"]
        assert "is in use by another run" in rank["in use"]
        assert f"Processes {[*range(1, processes)]} have other weights than process 0" in rank["different"]
        assert "could not be read or written: [Errno 27] File too large" in rank["full"]


def test_one_process_goes_on_where_another_was_killed(killed, resumed, batches, whole, measured):
    assert evaluate_shapes(MODEL, batches, SHAPES, records_file=killed[0][2] / "records.jsonl") == whole
    assert measured == []


def test_fingerprint_of_a_model_spread_by_fsdp_is_that_of_the_model(resumed, whole):
    """Gathered on each process; and its records go into the same file."""
    for rank in resumed[1][2]:
        assert rank["fsdp"]["parameter"] == "DTensor"
        assert rank["fsdp"]["fingerprint"] == fingerprint_model(MODEL)
        for record, expected in zip(rank["fsdp"]["records"], whole, strict=False):
            assert record == {key: pytest.approx(value, abs=1e-5) for key, value in expected.items()}


def test_distances_of_a_model_spread_by_fsdp_are_those_of_the_model(resumed, batches):
    expected = evaluate_shapes(MODEL, batches, SHAPES[:2], measure="distance")
    for rank in resumed[1][2]:
        for found, record in zip(rank["fsdp"]["distances"], expected, strict=True):
            assert found == {key: pytest.approx(value, abs=1e-5) for key, value in record.items()}


# What is started


def stop(folder):
    """Measure all shapes. At one of them wait to be killed instead, and say so by the name of an empty file."""

    def measure_or_wait(model, batch, shape):
        if shape == STOPPED_AT:
            (folder / f"stopped-{os.getpid()}").touch()
            signal.pause()
        return measure_batch(model, batch, shape)

    evaluation.measure_batch = measure_or_wait
    accelerator = Accelerator()
    evaluate_shapes(MODEL, masked_batches(), SHAPES, accelerator=accelerator, records_file=folder / "records.jsonl")


def work_together(folder, given, disk):
    accelerator = Accelerator()
    batches, measure = masked_batches(), evaluation.Evaluation.measure
    found = {"processes": accelerator.num_processes, "measured": []}

    def evaluate(model, records_file=None, shapes=SHAPES, measure="loss"):
        return evaluate_shapes(model, batches, shapes, "", accelerator, records_file, measure)

    evaluation.Evaluation.measure = lambda self, shape: found["measured"].append(shape) or measure(self, shape)
    found["records"] = evaluate(MODEL, folder / "records.jsonl")
    evaluation.Evaluation.measure = measure
    found["without file"] = evaluate(MODEL)
    found["loaded"] = evaluate(SuperShaperForMaskedLM.from_pretrained(given / "model"))
    found["another model"] = message_of(lambda: evaluate(MODEL, given / "records.jsonl"))
    own = MODEL if accelerator.is_main_process else nudge(tiny_model())
    found["different"] = message_of(lambda: evaluate(own, disk / "none.jsonl"))
    if accelerator.num_processes == 2:
        found["fsdp"] = work_spread(accelerator, evaluate, disk / "fsdp.jsonl")
    with lock(disk / "used.jsonl") if accelerator.is_main_process else nullcontext():
        found["in use"] = message_of(lambda: evaluate(MODEL, disk / "used.jsonl"))
    evaluate(MODEL, disk / "records.jsonl", [])
    accelerator.wait_for_everyone()
    # A bar of progress would be written to a file, too.
    with redirect_stderr(io.StringIO()), limited_files((disk / "records.jsonl").stat().st_size + 50):
        found["full"] = message_of(lambda: evaluate(MODEL, disk / "records.jsonl"))
    torch.save(found, folder / f"rank{accelerator.process_index}.pt")
    torch.distributed.destroy_process_group()


def work_spread(accelerator, evaluate, file):
    """Spread the model over the processes, and measure it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_model()
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return {
        "parameter": type(next(model.parameters())).__name__,
        "fingerprint": fingerprint_model(model),
        "distances": evaluate(model, None, SHAPES[:2], measure="distance"),  # first: FSDP begins with the encoder
        "records": evaluate(model, file, SHAPES[:2]),
    }
