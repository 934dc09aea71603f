import numpy as np
import pytest
import torch
from conftest import SPECIAL_TOKENS, WORDS
from datasets import Dataset
from texts import MAX_LENGTH, assert_equal, examples, original_tokens, random_documents, rows

from supershaper_hf.data.batches import MaskingCollator, fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.model.modeling_supershaper import IGNORE_INDEX


@pytest.fixture
def sequences(tokenizer):
    return tokenize(random_documents(60, words=37), tokenizer, MAX_LENGTH)


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


def test_nothing_is_masked_with_a_probability_of_0(tokenizer, sequences):
    """Then no mask token is needed, and everything else is as in masked batches."""
    masked = fixed_masks(sequences, tokenizer, batch_size=8, mlm_probability=0.4)
    tokenizer.mask_token = None
    for batch, expected in zip(fixed_masks(sequences, tokenizer, 8, mlm_probability=0), masked, strict=True):
        assert (batch["labels"] == IGNORE_INDEX).all()
        assert torch.equal(batch["input_ids"], original_tokens(expected))
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("rate", [-0.1, 1.01])
def test_rate_out_of_range_is_refused(tokenizer, rate):
    with pytest.raises(
        ValueError,
        match=f"mlm_probability={rate} must be a finite number at least 0 and at most 1",
    ):
        MaskingCollator(tokenizer, rate)


def test_negative_seed_is_refused(tokenizer):
    with pytest.raises(ValueError, match="seed=-1 must be an integer of at least 0"):
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
