import json
import random
import re
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from conftest import WORDS
from datasets import Dataset
from texts import MAX_LENGTH, assert_equal, examples, random_documents, rows

from supershaper_hf.data import batches as batches_module
from supershaper_hf.data.batches import MaskingCollator, MicroBatches
from supershaper_hf.data.documents import load_text
from supershaper_hf.data.sequences import tokenize


@pytest.fixture
def sequences(tokenizer):
    return tokenize(random_documents(60, words=37), tokenizer, MAX_LENGTH)


@pytest.fixture
def files(tmp_path):
    """Text of 23 documents in 3 files, of lengths between 3 and 40 words."""
    generator = random.Random(0)
    for name, documents in (("a", 9), ("b", 1), ("c", 13)):
        lines = [" ".join(generator.choices(WORDS, k=generator.randint(3, 40))) for _ in range(documents)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    return tmp_path


# Endless micro-batches of a dataset


def take(batches, n, state=None):
    iterator = batches.iterate(state)
    found = list(islice(iterator, n))
    iterator.close()
    return found


def test_every_epoch_holds_every_sequence_once_in_another_order(tokenizer, sequences):
    small = sequences.select(range(14))
    found = [row for batch, _ in take(MicroBatches(small, tokenizer, 4, 0.5, seed=1), 14) for row in rows(batch)]
    epochs = [found[start : start + 14] for start in range(0, 56, 14)]
    orders = [[row[0] for row in epoch] for epoch in epochs]
    assert all(sorted(order) == sorted(map(tuple, small["input_ids"])) for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert orders[0] != list(map(tuple, small["input_ids"]))
    assert not set(epochs[0]) & set(epochs[1])  # masked anew


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_follow_from_seed_and_position(tokenizer, sequences, num_workers):
    """As documented: epoch p // N, its permutation, masks by (seed, p)."""
    length, found = len(sequences), take(MicroBatches(sequences, tokenizer, 50, 0.3, 7, num_workers=num_workers), 11)
    orders = [np.random.default_rng((7, epoch)).permutation(length) for epoch in range(3)]
    collate = MaskingCollator(tokenizer, 0.3, seed=7)
    for k, (batch, state) in enumerate(found):
        positions = range(k * 50, k * 50 + 50)
        chosen = sequences.select([int(orders[p // length][p % length]) for p in positions])
        assert_equal(batch, collate(examples(chosen, start=k * 50)))
        assert state == {"micro_batch": k + 1}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_what_one_sees(tokenizer, sequences, processes):
    sequences = sequences.select(range(21))
    one = take(MicroBatches(sequences, tokenizer, 8, 0.3, 5), 7)
    parts = [
        take(MicroBatches(sequences, tokenizer, 8 // processes, 0.3, 5, rank, processes), 7)
        for rank in range(processes)
    ]
    for (batch, state), *shares in zip(one, *parts, strict=True):
        assert rows(batch) == [row for share, _ in shares for row in rows(share)]
        assert all(share_state == state for _, share_state in shares)


def test_dataset_smaller_than_a_batch_wraps_around(tokenizer, sequences):
    small = sequences.select(range(3))
    (batch, _), *_ = take(MicroBatches(small, tokenizer, 8, 0.5, 0), 2)
    held = [row[0] for row in rows(batch)]
    assert len(held) == 8
    assert {held.count(tuple(ids)) for ids in small["input_ids"]} <= {2, 3}


# Endless micro-batches of a stream


def stream(files, tokenizer, batch_size=3, rank=0, num_processes=1, **options):
    text = load_text(files, streaming=True)
    options = {"max_length": 14, "documents_per_chunk": 4, "seed": 5, "mlm_probability": 0.4, **options}
    return MicroBatches(text, tokenizer, batch_size, rank=rank, num_processes=num_processes, **options)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_documents_of_a_stream(files, tokenizer, processes):
    """Together they hold every sequence once before any of them begins the text again."""
    expected = sorted(map(tuple, tokenize(load_text(files), tokenizer, 14)["input_ids"]))
    held = []
    for rank in range(processes):
        batches = take(stream(files, tokenizer, 1, rank, processes), len(expected) + 1)
        assert batches[-1][1]["epoch"] >= 1
        held += [rows(batch)[0][0] for batch, state in batches if state["epoch"] == 0]
    assert sorted(held) == expected


def test_document_goes_to_the_process_of_its_number(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(" ".join([word] * 10) for word in WORDS))
    for rank in range(2):
        batches = take(stream(tmp_path, tokenizer, 1, rank, 2), 20)
        held = {rows(batch)[0][0][1] for batch, state in batches if state["epoch"] == 0}
        assert held == set(tokenizer.convert_tokens_to_ids(WORDS[rank::2]))


def test_sequences_of_a_stream_are_shuffled_and_masked_anew(files, tokenizer):
    found = take(stream(files, tokenizer, 1), 150)
    epochs = [[rows(batch)[0] for batch, state in found if state["epoch"] == epoch] for epoch in range(3)]
    orders = [[row[0] for row in epoch] for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1]
    assert orders[0] != list(map(tuple, tokenize(load_text(files), tokenizer, 14)["input_ids"]))
    assert len(set(epochs[0]) & set(epochs[1])) < 5


def test_masks_of_a_stream_differ_between_processes(tmp_path, tokenizer):
    """Masks go by a position that no two processes share: the same text in each is masked in other places."""
    (tmp_path / "a.txt").write_text((" ".join(["cat"] * 12) + "\n") * 40)
    parts = [take(stream(tmp_path, tokenizer, 20, rank, 2), 1)[0][0] for rank in range(2)]
    collate = MaskingCollator(tokenizer, 0.4, seed=5)
    ids = [tokenizer.cls_token_id, *tokenizer.convert_tokens_to_ids(["cat"] * 12), tokenizer.sep_token_id]
    same = {"input_ids": ids, "special_tokens_mask": [1, *[0] * 12, 1]}
    for rank, batch in enumerate(parts):
        assert_equal(batch, collate([{**same, "position": 2 * i + rank} for i in range(20)]))


def test_micro_batches_of_a_stream_are_always_full(files, tokenizer):
    assert {len(batch["labels"]) for batch, _ in take(stream(files, tokenizer, 7), 40)} == {7}


def test_a_stream_can_be_packed(files, tokenizer):
    found = [row for batch, _ in take(stream(files, tokenizer, cross_documents=True), 8) for row in rows(batch)]
    full = [row for row in found if len(row[0]) == 14]
    assert len(full) > 0.7 * len(found)
    assert any(tokenizer.sep_token_id in row[0][1:-1] for row in full)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_without_a_sequence_is_refused(tmp_path, tokenizer, num_workers):
    (tmp_path / "a.txt").write_text("the cat\n" * 5)
    with pytest.raises(ValueError, match=r"^The text has no document with enough tokens for process 1 of 2\."):
        take(stream(tmp_path, tokenizer, rank=1, num_processes=2, num_workers=num_workers), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_file_removed_while_training_is_named(files, tokenizer, num_workers):
    batches = stream(files, tokenizer, num_workers=num_workers)
    (files / "c.txt").unlink()
    message = re.escape(f"Text file {files / 'c.txt'} does not exist any more.")
    with pytest.raises(FileNotFoundError, match=f"^{message}"):
        take(batches, 100)


def test_more_than_one_worker_for_a_stream_is_refused(files, tokenizer):
    with pytest.raises(ValueError, match="num_workers=2, but a stream is read in order by one process: use 0 or 1"):
        stream(files, tokenizer, num_workers=2)


def test_length_of_a_stream_is_checked(files, tokenizer):
    with pytest.raises(ValueError, match="max_length=7 must be between 8 and"):
        stream(files, tokenizer, max_length=7)
    tokenizer.model_max_length = 10
    found = [row for batch, _ in take(stream(files, tokenizer, max_length=None), 20) for row in rows(batch)]
    assert max(len(row[0]) for row in found) == 10


# Going on


def assert_resumes(make, seed, workers, n):
    """A run that is cut and resumed again and again yields what a run yields that was not stopped."""
    whole = take(make(num_workers=0), n)
    generator = random.Random(seed)
    for num_workers in workers:
        state = None
        cuts = [0, *sorted(generator.sample(range(1, n), 6)), n]
        for first, last in pairwise(cuts):
            found = take(make(num_workers=num_workers), last - first, state)
            for (batch, found_state), (expected, expected_state) in zip(found, whole[first:last], strict=True):
                assert_equal(batch, expected)
                # Where `datasets` reads ahead, it has several words for one place in the text.
                assert found_state | {"source": None} == expected_state | {"source": None}
            state = stored(found[-1][1])


def stored(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 2)])
def test_dataset_resumes_exactly(tokenizer, sequences, rank, processes):
    small = sequences.select(range(45))

    def make(num_workers):
        return MicroBatches(small, tokenizer, 4, 0.3, 5, rank, processes, num_workers)

    assert_resumes(make, seed=rank, workers=(0, 0, 2), n=40)


@pytest.mark.parametrize("cross_documents", [False, True])
@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 2)])
def test_stream_resumes_exactly(files, tokenizer, rank, processes, cross_documents):
    def make(num_workers):
        options = {"num_workers": num_workers, "cross_documents": cross_documents}
        return stream(files, tokenizer, 3, rank, processes, **options)

    assert_resumes(make, seed=rank, workers=(0, 0, 1), n=40)


@pytest.mark.parametrize("kind", ["map", "parquet"])
def test_streams_that_are_read_ahead_resume_exactly(files, tokenizer, kind):
    load_text(files).to_parquet(files / "all.parquet")

    def make(num_workers):
        if kind == "parquet":
            text = load_text(files / "all.parquet", streaming=True)
        else:
            text = load_text(str(files / "*.txt")).to_iterable_dataset(num_shards=3)
            text = text.map(lambda rows: rows, batched=True, batch_size=5)
        return MicroBatches(text, tokenizer, 3, 0.4, 5, max_length=14, documents_per_chunk=4, num_workers=num_workers)

    assert_resumes(make, seed=1, workers=(0, 0, 1), n=40)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_leaves_the_random_state_alone(files, tokenizer, sequences, streaming, num_workers):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    if streaming:
        take(stream(files, tokenizer, num_workers=num_workers), 5)
    else:
        take(MicroBatches(sequences, tokenizer, 4, 0.3, 5, num_workers=num_workers), 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_two_iterators_do_not_disturb_each_other(files, tokenizer):
    batches = stream(files, tokenizer)
    expected = take(batches, 20)
    first, second = batches.iterate(), batches.iterate(expected[9][1])
    for index in range(10):
        for iterator, (batch, state) in ((first, expected[index]), (second, expected[10 + index])):
            found, found_state = next(iterator)
            assert_equal(found, batch)
            assert found_state == state


def states(text, tokenizer):
    """Micro-batches of each kind with a state that they go on from."""
    kinds = {
        "stored": MicroBatches(tokenize(load_text(text), tokenizer, 14), tokenizer, 3),
        "stream": stream(text, tokenizer),
    }
    return {kind: (batches, take(batches, 4)[-1][1]) for kind, batches in kinds.items()}


def test_state_of_the_other_kind_of_text_is_refused(files, tokenizer):
    (stored_text, stored_state), (streamed, stream_state) = states(files, tokenizer).values()
    with pytest.raises(ValueError, match=r"state \{'micro_batch': 4\} does not belong to a stream, whose states have"):
        take(streamed, 1, stored_state)
    with pytest.raises(ValueError, match="does not belong to stored text, whose states have the keys micro_batch"):
        take(stored_text, 1, stream_state)


@pytest.mark.parametrize("kind", ["stored", "stream"])
def test_damaged_state_is_refused(files, tokenizer, kind):
    batches, state = states(files, tokenizer)[kind]
    damaged = [[], "state", {}, state | {"more": 1}]
    for name in set(state) - {"source"}:
        damaged += [{key: value for key, value in state.items() if key != name}]
        damaged += [state | {name: value} for value in (None, -1, 0.5, "4", True, [1])]
    for found in damaged:
        with pytest.raises(ValueError, match=r"does not belong to|of the state=.* must be an integer of at least 0"):
            take(batches, 1, found)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_state_of_a_stream_that_does_not_fit_the_text_is_refused(files, tokenizer, num_workers):
    batches = stream(files, tokenizer, num_workers=num_workers)
    state = next(state for _, state in batches.iterate() if state["source"] is not None)
    for source in ({}, {"examples_iterable": None}, {"other": 1}, [1], "text"):
        with pytest.raises(ValueError, match=r"^The text cannot go on from the state "):
            take(batches, 1, state | {"source": source})
    with pytest.raises(ValueError, match=r"^The state has used up 999 sequences of a part of the text that has "):
        take(batches, 1, state | {"offset": 999})
    end = json.loads(json.dumps(state["source"]).replace('"shard_idx": 0', '"shard_idx": 99'))
    with pytest.raises(ValueError, match=r"^The (state has used up|text cannot go on)"):
        take(batches, 1, state | {"source": end})


# Which text it is


def test_fingerprint_is_that_of_the_text_not_of_its_place(files, tokenizer, sequences, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for file in files.glob("*.txt"):
        (elsewhere / file.name).write_text(file.read_text())
    for first, second in (
        (stream(files, tokenizer), stream(elsewhere, tokenizer, 7, 1, 2, num_workers=1, seed=9)),
        (
            MicroBatches(sequences, tokenizer, 4),
            MicroBatches(Dataset.from_dict(sequences[:]), tokenizer, 7, 0.3, 9, 1, 2),
        ),
    ):
        assert first.fingerprint == second.fingerprint
        before = take(first, 3)
        assert first.fingerprint == second.fingerprint
        assert_equal(take(first, 3)[2][0], before[2][0])  # looking at the text has not moved it


def test_fingerprints_tell_texts_apart(files, tokenizer):
    def fingerprints():
        stored = [MicroBatches(tokenize(load_text(files), tokenizer, n), tokenizer, 4) for n in (12, 13)]
        return [batches.fingerprint for batches in (*stored, stream(files, tokenizer))]

    before = fingerprints()
    assert (files / "b.txt").write_text("the cat sat on the big mat and ran .")
    after = fingerprints()
    (files / "c.txt").unlink()
    assert len({*before, *after, *fingerprints()}) == 9


def test_fingerprint_looks_at_a_few_sequences(tokenizer):
    """A text of any length: the first, the last and some between; not all."""
    rows = [[2, 5 + i % 10, 6, 7, 8, 9, 10, 3] for i in range(1001)]

    def fingerprint(changed):
        ids = [[0, *row[1:]] if i in changed else row for i, row in enumerate(rows)]
        columns = {"input_ids": ids, "special_tokens_mask": [[1, *[0] * 6, 1]] * len(ids)}
        return MicroBatches(Dataset.from_dict(columns), tokenizer, 4).fingerprint

    assert len({fingerprint(changed) for changed in ([], [0], [1000], range(500, 512))}) == 4
    assert fingerprint([1]) == fingerprint([])


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be an integer of at least 0"),
        ({"documents_per_chunk": 0}, "documents_per_chunk=0 must be an integer of at least 1"),
        ({"rank": 2, "num_processes": 2}, "rank=2 must be at least 0 and below num_processes=2"),
        ({"rank": -1}, "rank=-1 must be at least 0 and below num_processes=1"),
    ],
)
def test_numbers_out_of_range_are_refused(tokenizer, sequences, options, message):
    with pytest.raises(ValueError, match=message):
        MicroBatches(sequences, tokenizer, **{"batch_size": 4, **options})


def test_text_that_is_not_tokenised_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"columns \['text'\], not \['input_ids', 'special_tokens_mask'\]: call token"):
        MicroBatches(random_documents(3), tokenizer, 4)


def test_empty_dataset_is_refused(tokenizer, sequences):
    with pytest.raises(ValueError, match="The dataset is empty"):
        MicroBatches(sequences.select([]), tokenizer, 4)


# Sequences of similar length together


@pytest.fixture
def of_all_lengths(tokenizer):
    lines = [" ".join(random.Random(n).choices(WORDS, k=3 + n % 20)) for n in range(300)]
    return tokenize(Dataset.from_dict({"text": lines}), tokenizer, 24)


def read(dataset, tokenizer, count, state=None, **options):
    found = islice(MicroBatches(dataset, tokenizer, mlm_probability=0, seed=3, **options).iterate(state), count)
    return [(batch["input_ids"].shape, batch) for batch, _ in found]


def test_grouping_by_length_reads_every_sequence_once_an_epoch(of_all_lengths, tokenizer, monkeypatch):
    monkeypatch.setattr(batches_module, "WINDOW", 256)
    monkeypatch.setattr(batches_module, "BLOCK", 16)
    epoch = len(of_all_lengths) // 8
    dataset = of_all_lengths.select(range(epoch * 8))
    shapes = {}
    for grouped in (False, True):
        found = read(dataset, tokenizer, epoch, batch_size=8, group_by_length=grouped)
        shapes[grouped] = sum(size[0] * size[1] for size, _ in found)
        rows = [tuple(row[row != tokenizer.pad_token_id].tolist()) for _, batch in found for row in batch["input_ids"]]
        assert Counter(rows) == Counter(map(tuple, dataset["input_ids"]))
    tokens = sum(map(len, dataset["input_ids"]))
    assert shapes[True] - tokens < 0.3 * (shapes[False] - tokens)


def test_grouped_text_resumes_and_is_shared_like_any_other(of_all_lengths, tokenizer, monkeypatch):
    monkeypatch.setattr(batches_module, "WINDOW", 64)
    monkeypatch.setattr(batches_module, "BLOCK", 8)
    options = {"group_by_length": True, "batch_size": 4}
    alone = [batch["input_ids"] for _, batch in read(of_all_lengths, tokenizer, 6, batch_size=8, group_by_length=True)]
    shares = [
        [batch for _, batch in read(of_all_lengths, tokenizer, 6, rank=rank, num_processes=2, **options)]
        for rank in (0, 1)
    ]
    for whole, *parts in zip(alone, *shares):
        rows = [row[row != tokenizer.pad_token_id].tolist() for part in parts for row in part["input_ids"]]
        assert rows == [row[row != tokenizer.pad_token_id].tolist() for row in whole]
    [(_, third)] = read(of_all_lengths, tokenizer, 1, {"micro_batch": 2}, batch_size=8, group_by_length=True)
    assert torch.equal(third["input_ids"], alone[2])


def test_lengths_neither_rise_nor_fall_over_a_window():
    lengths = np.arange(4096)
    order = batches_module.group(np.random.default_rng(0).permutation(4096), lengths, np.random.default_rng(1))
    assert sorted(order) == list(range(4096))
    means = lengths[order].reshape(-1, batches_module.BLOCK).mean(axis=1)
    assert (np.diff(means) > 0).any()
    assert (np.diff(means) < 0).any()


def test_stream_is_not_grouped(tokenizer):
    with pytest.raises(ValueError, match="group_by_length=True needs stored text"):
        MicroBatches(random_documents(3).to_iterable_dataset(), tokenizer, 2, group_by_length=True)
