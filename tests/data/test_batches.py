import json
import random
import re
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import SPECIAL_TOKENS, WORDS
from datasets import Dataset
from texts import MAX_LENGTH, original_tokens, random_documents

from supershaper_hf.data.batches import MaskingCollator, MicroBatches, fixed_masks
from supershaper_hf.data.documents import load_text
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.model.modeling_supershaper import IGNORE_INDEX


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


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def examples(sequences, start=0):
    return [{**sequence, "position": start + index} for index, sequence in enumerate(sequences)]


def rows(batch):
    """Each sequence of a batch without padding, as what it was, what it became, and its labels."""
    columns = zip(original_tokens(batch), batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    return [tuple(tuple(row[mask.bool()].tolist()) for row in found) for *found, mask in columns]


# Masking


def test_masks_of_a_sequence_depend_on_seed_and_position_alone(tokenizer, sequences):
    collate = MaskingCollator(tokenizer, 0.5, seed=3)
    together = rows(collate(examples(sequences)))
    alone = [rows(collate([example]))[0] for example in examples(sequences)]
    assert together == alone
    torch.manual_seed(99)
    np.random.seed(99)
    assert rows(MaskingCollator(tokenizer, 0.5, seed=3)(examples(sequences)[::-1])) == together[::-1]
    assert rows(MaskingCollator(tokenizer, 0.5, seed=4)(examples(sequences))) != together
    other = rows(collate(examples(sequences, start=1)))
    assert sum(first == second for first, second in zip(together, other, strict=True)) < 10


def test_batch_is_padded_with_padding(tokenizer, sequences):
    batch = MaskingCollator(tokenizer, 0.5)(examples(sequences))
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert {tensor.shape for tensor in batch.values()} == {(len(sequences), MAX_LENGTH)}
    lengths = torch.tensor([len(ids) for ids in sequences["input_ids"]])
    assert torch.equal(batch["attention_mask"].sum(1), lengths)
    assert not batch["attention_mask"].bool().all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert [list(original) for original, *_ in rows(batch)] == sequences["input_ids"][:]


def test_padding_to_a_multiple_changes_only_the_padding(tokenizer, sequences):
    plain, padded = (MaskingCollator(tokenizer, pad_to_multiple_of=n)(examples(sequences)) for n in (None, 8))
    assert padded["labels"].shape == (len(sequences), 16)
    assert rows(plain) == rows(padded)
    assert MaskingCollator(tokenizer, pad_to_multiple_of=4)(examples(sequences))["labels"].shape[1] == MAX_LENGTH


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_masking_rate_is_the_share_of_ordinary_tokens(tokenizer, sequences, rate):
    batches = fixed_masks(sequences, tokenizer, batch_size=8, mlm_probability=rate)
    labelled = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    ordinary = sum(len(ids) - 2 for ids in sequences["input_ids"])
    assert labelled / ordinary == pytest.approx(rate, abs=0.03)


def test_masking_rate_is_15_percent_unless_given(tokenizer, sequences):
    given, default = (fixed_masks(sequences, tokenizer, 60, *rate) for rate in ([0.15], []))
    assert_equal(given[0], default[0])
    assert_equal(MaskingCollator(tokenizer)(examples(sequences)), MaskingCollator(tokenizer, 0.15)(examples(sequences)))


def test_special_tokens_and_padding_are_never_labelled(tokenizer, sequences):
    special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id])
    for batch in fixed_masks(sequences, tokenizer, batch_size=8, mlm_probability=1.0):
        is_special = torch.isin(original_tokens(batch), special)
        assert torch.equal(batch["labels"] == IGNORE_INDEX, is_special)
        assert torch.equal(batch["input_ids"][is_special], original_tokens(batch)[is_special])


def test_of_the_labelled_tokens_four_in_five_become_the_mask(tokenizer):
    sequences = tokenize(random_documents(400), tokenizer, MAX_LENGTH)
    batch = MaskingCollator(tokenizer, mlm_probability=1.0)(examples(sequences))
    labelled = batch["labels"] != IGNORE_INDEX
    inputs, labels = batch["input_ids"][labelled], batch["labels"][labelled]
    assert (inputs == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8 + 0.1 / 20, abs=0.012)
    # One in ten stays, one in ten is drawn from the whole vocabulary and may be drawn equal.
    stays = 0.1 + 0.1 / len(SPECIAL_TOKENS + WORDS)
    assert (inputs == labels).float().mean() == pytest.approx(stays, abs=0.012)
    drawn = inputs[(inputs != labels) & (inputs != tokenizer.mask_token_id)]
    assert set(drawn.tolist()) == set(range(len(tokenizer))) - {tokenizer.mask_token_id}


def test_tokens_that_are_not_chosen_stay(tokenizer, sequences):
    batch = MaskingCollator(tokenizer, 0.3)(examples(sequences))
    expected = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences["input_ids"]], batch_first=True)
    assert torch.equal(original_tokens(batch), expected)


def test_a_sequence_may_have_no_label(tokenizer, sequences):
    batch = MaskingCollator(tokenizer, 1e-9)(examples(sequences))
    assert (batch["labels"] == IGNORE_INDEX).all()


@pytest.mark.parametrize("rate", [0, -0.1, 1.01])
def test_rate_out_of_range_is_refused(tokenizer, rate):
    with pytest.raises(ValueError, match=f"mlm_probability={rate} must be above 0 and at most 1"):
        MaskingCollator(tokenizer, rate)


def test_negative_seed_is_refused(tokenizer):
    with pytest.raises(ValueError, match="seed=-1 must be 0 or more"):
        MaskingCollator(tokenizer, seed=-1)


@pytest.mark.parametrize(("token", "name"), [("mask_token", "mask"), ("pad_token", "padding")])
def test_tokenizer_without_special_token_is_refused(tokenizer, token, name):
    setattr(tokenizer, token, None)
    with pytest.raises(ValueError, match=f"The tokenizer has no {name} token"):
        MaskingCollator(tokenizer)


# Fixed masks


def test_fixed_masks_depend_on_their_seed_alone(tokenizer, sequences):
    first = fixed_masks(sequences, tokenizer, batch_size=8, seed=3)
    torch.manual_seed(99)
    again = fixed_masks(sequences, tokenizer, batch_size=8, seed=3)
    other = fixed_masks(sequences, tokenizer, batch_size=8, seed=4)
    for one, two in zip(first, again, strict=True):
        assert_equal(one, two)
    assert not any(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, other, strict=True))


def test_fixed_masks_do_not_depend_on_the_batch_size(tokenizer, sequences):
    by_size = [
        [row for batch in fixed_masks(sequences, tokenizer, batch_size) for row in rows(batch)]
        for batch_size in (1, 7, 1000)
    ]
    assert by_size[0] == by_size[1] == by_size[2]


def test_fixed_masks_go_by_the_index_in_the_dataset(tokenizer, sequences):
    (batch,) = fixed_masks(sequences, tokenizer, batch_size=1000, seed=5)
    expected = rows(MaskingCollator(tokenizer, seed=5)(examples(sequences)))
    assert rows(batch) == sorted(expected, key=lambda row: len(row[0]))


def test_fixed_masks_hold_every_sequence_once(tokenizer, sequences):
    batches = fixed_masks(sequences, tokenizer, batch_size=7)
    held = [list(row[0]) for batch in batches for row in rows(batch)]
    assert sorted(held) == sorted(sequences["input_ids"])
    assert {len(batch["labels"]) for batch in batches[:-1]} == {7}


def test_fixed_masks_put_equal_lengths_together(tokenizer):
    documents = Dataset.from_dict({"text": [" ".join(["cat"] * (6 + i % 2 * 4)) for i in range(8)]})
    batches = fixed_masks(tokenize(documents, tokenizer, MAX_LENGTH), tokenizer, batch_size=4)
    assert [batch["input_ids"].shape for batch in batches] == [(4, 8), (4, 12)]
    assert all(batch["attention_mask"].all() for batch in batches)


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


def assert_resumes(make, cuts, n):
    """After every cut, and again after a second one, the rest equals that of the run that was not stopped."""
    whole = take(make(num_workers=0), n)
    for workers, first, second in cuts:
        found = take(make(num_workers=workers), second - first, stored(whole[first][1]))
        found += take(make(num_workers=workers), n - second - 1, stored(found[-1][1]))
        for (batch, state), (expected, expected_state) in zip(found, whole[first + 1 :], strict=True):
            assert_equal(batch, expected)
            # Where `datasets` reads ahead, it has several words for one place in the text.
            assert state | {"source": None} == expected_state | {"source": None}


def stored(state):
    return json.loads(json.dumps(state))


def cuts(n, seed, workers):
    generator = random.Random(seed)
    return [(workers[i < 2], *sorted(generator.sample(range(n - 1), 2))) for i in range(10)]


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 2)])
def test_dataset_resumes_exactly(tokenizer, sequences, rank, processes):
    small = sequences.select(range(45))

    def make(num_workers):
        return MicroBatches(small, tokenizer, 4, 0.3, 5, rank, processes, num_workers)

    assert_resumes(make, cuts(40, seed=rank, workers=(0, 2)), n=40)


@pytest.mark.parametrize("cross_documents", [False, True])
@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 2)])
def test_stream_resumes_exactly(files, tokenizer, rank, processes, cross_documents):
    def make(num_workers):
        options = {"num_workers": num_workers, "cross_documents": cross_documents}
        return stream(files, tokenizer, 3, rank, processes, **options)

    assert_resumes(make, cuts(60, seed=rank, workers=(0, 1)), n=60)


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

    assert_resumes(make, cuts(60, seed=1, workers=(0, 1)), n=60)


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
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"documents_per_chunk": 0}, "documents_per_chunk=0 must be at least 1"),
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
