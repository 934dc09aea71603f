import random
import re

import pytest
import torch
from conftest import SPECIAL_TOKENS, WORDS, tiny_config
from datasets import Dataset
from transformers import AutoTokenizer

from supershaper_hf.data import (
    SHORTEST_SEQUENCE,
    check_vocabulary,
    fixed_masks,
    load_text,
    masking_collator,
    split_text,
    tokenize,
    train_tokenizer,
)
from supershaper_hf.modeling_supershaper import IGNORE_INDEX


MAX_LENGTH = 12


def random_documents(n, words=40, seed=0):
    generator = random.Random(seed)
    return Dataset.from_dict({"text": [" ".join(generator.choices(WORDS, k=words)) for _ in range(n)]})


# Reading


def test_every_line_with_text_is_a_document(tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("One document.\n\n   \n  And another.  \n", encoding="utf-8")
    second.write_text("Ein drittes, größeres", encoding="utf-8")
    documents = ["One document.", "And another.", "Ein drittes, größeres"]
    assert load_text([first, str(second)])["text"] == documents


def test_only_line_breaks_end_a_document(tmp_path):
    document = "One\u2028document\x0cof\x85four\x1dlines."
    (tmp_path / "text.txt").write_bytes(f"{document}\r\nAnother.".encode())
    assert load_text(tmp_path / "text.txt")["text"] == [document, "Another."]


@pytest.mark.parametrize("as_given", [str, lambda path: path, lambda path: [path]], ids=["str", "Path", "list"])
def test_one_file_may_be_given_bare(as_given, tmp_path):
    (tmp_path / "text.txt").write_text("One document.\n", encoding="utf-8")
    assert load_text(as_given(tmp_path / "text.txt"))["text"] == ["One document."]


def test_no_files_are_refused():
    with pytest.raises(ValueError, match=r"No text files given\. Name at least one"):
        load_text([])


@pytest.mark.parametrize("name", ["missing.txt", ""], ids=["missing", "folder"])
def test_missing_file_is_refused_by_name(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"Text file {tmp_path / name} does not exist")):
        load_text(tmp_path / name)


@pytest.mark.parametrize("content", ["", "\n \n\t\n"], ids=["empty", "blank"])
def test_file_without_text_is_refused_by_name(content, tmp_path):
    full, empty = tmp_path / "full.txt", tmp_path / "empty.txt"
    full.write_text("One document.\n")
    empty.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{empty} is empty")):
        load_text([full, empty])


def test_wrong_encoding_names_the_byte_and_its_position(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"x" * 20_000 + "\nTschüss".encode("latin1"))
    with pytest.raises(ValueError, match=re.escape(f"{file} is not UTF-8: byte 0xfc at position 20005. Convert it")):
        load_text(file)


# Splitting


def test_split_is_a_partition():
    documents = Dataset.from_dict({"text": [str(i) for i in range(50)]})
    train, held_out = split_text(documents, held_out=0.2, seed=0)
    assert len(held_out) == 10
    assert sorted([*train["text"], *held_out["text"]]) == sorted(documents["text"])


def test_split_depends_on_the_seed_alone():
    documents = Dataset.from_dict({"text": [str(i) for i in range(50)]})
    splits = [split_text(documents, held_out=0.2, seed=seed)[1]["text"] for seed in (3, 3, 4)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_at_least_one_document_is_held_out():
    train, held_out = split_text(random_documents(3), held_out=0.01, seed=0)
    assert (len(train), len(held_out)) == (2, 1)


def test_at_least_one_document_is_left_to_train_on():
    train, held_out = split_text(random_documents(3), held_out=0.99, seed=0)
    assert (len(train), len(held_out)) == (1, 2)


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match=r"The text has 1 document\(s\), but at least 2 are needed"):
        split_text(random_documents(1), held_out=0.5, seed=0)


# Tokenizers


def test_trained_tokenizer_knows_the_words_it_saw():
    tokenizer = train_tokenizer(random_documents(20)["text"], vocab_size=200, max_length=16)
    assert tokenizer.tokenize("The big CAT ran .") == ["the", "big", "cat", "ran", "."]
    assert tokenizer.unk_token_id not in tokenizer("the moon")["input_ids"]
    assert tokenizer.model_max_length == 16


def test_trained_tokenizer_respects_the_vocabulary_size():
    text = random_documents(20)["text"]
    assert len(train_tokenizer(text, vocab_size=40, max_length=16)) <= 40
    assert len(train_tokenizer(text, vocab_size=40, max_length=16)) < len(train_tokenizer(text, 200, max_length=16))


def test_trained_tokenizer_survives_saving(tmp_path):
    tokenizer = train_tokenizer(random_documents(20)["text"], vocab_size=200, max_length=16)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    sentence = "The dog [MASK] on a catmat ."
    assert loaded(sentence)["input_ids"] == tokenizer(sentence)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.mask_token_id == tokenizer.mask_token_id
    assert loaded.model_max_length == 16


def test_same_text_trains_the_same_tokenizer():
    """Random words: many pairs of characters are equally frequent, and which are merged must not depend on chance."""
    generator = random.Random(0)
    text = [" ".join("".join(generator.choices("abcdefgh", k=5)) for _ in range(40)) for _ in range(20)]
    vocabularies = [train_tokenizer(text, vocab_size=150, max_length=16).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_tokenizer_larger_than_the_embeddings_is_refused(tokenizer):
    check_vocabulary(tokenizer, tiny_config(vocab_size=len(tokenizer)))
    with pytest.raises(
        ValueError, match=r"The tokenizer has 20 tokens, but the model has vocab_size=19: tokens from 19"
    ):
        check_vocabulary(tokenizer, tiny_config(vocab_size=len(tokenizer) - 1))


def test_tokenizer_without_mask_token_is_refused(tokenizer):
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="The tokenizer has no mask token"):
        masking_collator(tokenizer)


# Cutting into sequences


def test_sequences_fill_the_length_and_carry_special_tokens(tokenizer):
    sequences = tokenize(random_documents(5), tokenizer, MAX_LENGTH)["input_ids"]
    assert max(map(len, sequences)) == MAX_LENGTH
    assert {sequence[0] for sequence in sequences} == {tokenizer.cls_token_id}
    assert {sequence[-1] for sequence in sequences} == {tokenizer.sep_token_id}


def test_special_tokens_mask_marks_both_ends(tokenizer):
    for sequence in tokenize(random_documents(5), tokenizer, MAX_LENGTH):
        assert sequence["special_tokens_mask"] == [1, *[0] * (len(sequence["input_ids"]) - 2), 1]


def test_sequences_of_a_document_are_its_tokens_in_order(tokenizer):
    documents = random_documents(1, words=37)
    sequences = tokenize(documents, tokenizer, MAX_LENGTH)["input_ids"]
    inner = [token for sequence in sequences for token in sequence[1:-1]]
    assert inner == tokenizer(documents["text"][0], add_special_tokens=False)["input_ids"]


def test_sequences_never_cross_documents(tokenizer):
    documents = Dataset.from_dict({"text": [" ".join([word] * 25) for word in WORDS]})
    sequences = tokenize(documents, tokenizer, MAX_LENGTH)["input_ids"]
    assert len(sequences) > len(documents)
    assert all(len(set(sequence[1:-1])) == 1 for sequence in sequences)


@pytest.mark.parametrize(("words", "kept"), [(SHORTEST_SEQUENCE - 3, 0), (SHORTEST_SEQUENCE - 2, 1)])
def test_short_documents_are_left_out(tokenizer, words, kept):
    short = " ".join(["cat"] * words)
    long = " ".join(["dog"] * (MAX_LENGTH - 2))
    assert len(tokenize(Dataset.from_dict({"text": [short, long]}), tokenizer, MAX_LENGTH)) == kept + 1


def test_text_of_short_documents_only_is_refused(tokenizer):
    documents = Dataset.from_dict({"text": ["the cat sat .", "a dog ran ."]})
    with pytest.raises(ValueError, match="None of the 2 documents has 8 tokens"):
        tokenize(documents, tokenizer, MAX_LENGTH)


# Masking


@pytest.fixture
def sequences(tokenizer):
    return tokenize(random_documents(60), tokenizer, MAX_LENGTH)


def original_tokens(batch):
    return torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"])


def test_fixed_masks_depend_on_their_seed_alone(tokenizer, sequences):
    first = fixed_masks(sequences, tokenizer, batch_size=8, seed=3)
    torch.manual_seed(99)
    again = fixed_masks(sequences, tokenizer, batch_size=8, seed=3)
    other = fixed_masks(sequences, tokenizer, batch_size=8, seed=4)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)
    assert not any(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, other, strict=True))


def test_fixed_masks_hold_every_sequence_once(tokenizer, sequences):
    batches = fixed_masks(sequences, tokenizer, batch_size=7)
    held = [
        row[mask.bool()].tolist()
        for batch in batches
        for row, mask in zip(original_tokens(batch), batch["attention_mask"], strict=True)
    ]
    assert sorted(held) == sorted(sequences["input_ids"])
    assert {len(batch["labels"]) for batch in batches[:-1]} == {7}


def test_fixed_masks_put_equal_lengths_together(tokenizer):
    documents = Dataset.from_dict({"text": [" ".join(["cat"] * (6 + i % 2 * 4)) for i in range(8)]})
    batches = fixed_masks(tokenize(documents, tokenizer, MAX_LENGTH), tokenizer, batch_size=4)
    assert [batch["input_ids"].shape for batch in batches] == [(4, 8), (4, 12)]
    assert all(batch["attention_mask"].all() for batch in batches)


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_masking_rate_is_the_share_of_ordinary_tokens(tokenizer, sequences, rate):
    batches = fixed_masks(sequences, tokenizer, batch_size=8, masking_rate=rate)
    labelled = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    ordinary = sum(len(ids) - 2 for ids in sequences["input_ids"])
    assert labelled / ordinary == pytest.approx(rate, abs=0.03)


def test_special_tokens_and_padding_are_never_labelled(tokenizer, sequences):
    special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id])
    batches = fixed_masks(sequences, tokenizer, batch_size=8, masking_rate=1.0)
    for batch in batches:
        is_special = torch.isin(original_tokens(batch), special)
        assert torch.equal(batch["labels"] == IGNORE_INDEX, is_special)


def test_of_the_labelled_tokens_four_in_five_become_the_mask(tokenizer, sequences):
    batch = masking_collator(tokenizer, masking_rate=1.0, seed=0)(list(sequences))
    labelled = batch["labels"] != IGNORE_INDEX
    inputs, labels = batch["input_ids"][labelled], batch["labels"][labelled]
    assert (inputs == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.03)
    # One in ten stays, one in ten is drawn from the whole vocabulary and may be drawn equal.
    stays = 0.1 + 0.1 / len(SPECIAL_TOKENS + WORDS)
    assert (inputs == labels).float().mean() == pytest.approx(stays, abs=0.03)


def test_training_masks_are_drawn_anew_for_every_batch(tokenizer, sequences):
    collate = masking_collator(tokenizer)
    assert not torch.equal(collate(list(sequences))["labels"], collate(list(sequences))["labels"])
