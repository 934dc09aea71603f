import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import WORDS, tiny_config
from datasets import Dataset
from texts import MAX_LENGTH, random_documents
from transformers import AutoTokenizer, BertTokenizer

from supershaper_hf.data.documents import load_text
from supershaper_hf.data.sequences import (
    SHORTEST_SEQUENCE,
    check_vocabulary,
    fingerprint_tokenizer,
    tokenize,
    tokenize_documents,
    train_tokenizer,
)


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


def test_fingerprint_of_a_tokenizer_survives_calls_and_saving(tokenizer, tmp_path):
    expected = fingerprint_tokenizer(tokenizer)
    tokenizer(["the cat", "a"], truncation=True, max_length=9, padding="max_length")
    assert fingerprint_tokenizer(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == expected


def test_fingerprint_tells_tokenizers_apart(tokenizer):
    vocabulary = tokenizer.get_vocab()
    swapped = vocabulary | {"cat": vocabulary["dog"], "dog": vocabulary["cat"]}
    without_rules = SimpleNamespace(get_vocab=dict, special_tokens_map={})  # one that is written in Python
    others = [
        BertTokenizer(vocab=swapped),
        BertTokenizer(vocab=vocabulary | {"extra": len(vocabulary)}),
        BertTokenizer(vocab=vocabulary, do_lower_case=False),
        BertTokenizer(vocab=vocabulary, cls_token="the"),
        without_rules,
        SimpleNamespace(get_vocab=lambda: {"a": 0}, special_tokens_map={}),
    ]
    assert len({fingerprint_tokenizer(found) for found in [tokenizer, *others]}) == 7


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


@pytest.mark.parametrize("cross_documents", [False, True])
def test_sequences_equal_those_of_a_tokenizer_that_truncates(tokenizer, cross_documents):
    """Cut by the tokenizer itself; packed, from one document joined by [SEP]."""
    texts = random_documents(5, words=37)["text"][:]
    whole = [" [SEP] ".join(texts)] if cross_documents else texts
    options = {"truncation": True, "max_length": MAX_LENGTH, "return_overflowing_tokens": True}
    expected = [ids for ids in tokenizer(whole, **options)["input_ids"] if len(ids) >= SHORTEST_SEQUENCE]
    assert tokenize_documents(texts, tokenizer, MAX_LENGTH, cross_documents)["input_ids"] == expected


def test_packed_sequences_are_full_and_mark_every_separator(tokenizer):
    documents = Dataset.from_dict({"text": ["the cat sat", "", "a dog"] * 30})
    packed = tokenize(documents, tokenizer, MAX_LENGTH, cross_documents=True)
    assert {len(ids) for ids in packed["input_ids"][:-1]} == {MAX_LENGTH}
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    for sequence in packed:
        assert sequence["special_tokens_mask"] == [int(token in special) for token in sequence["input_ids"]]
    inner = [token for ids in packed["input_ids"] for token in ids[1:-1]]
    assert inner.count(tokenizer.sep_token_id) == 59  # between 60 documents with text


def test_special_tokens_written_in_the_text_are_marked(tokenizer):
    found = tokenize_documents(["the [MASK] cat [PAD] sat on a [SEP] [UNK] mat"], tokenizer, 16)
    assert found["special_tokens_mask"] == [[1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize("cross_documents", [False, True])
def test_any_number_of_processes_makes_the_same_sequences(tokenizer, cross_documents):
    documents = random_documents(2500, words=9)
    one, three = (tokenize(documents, tokenizer, MAX_LENGTH, cross_documents, num_proc=n) for n in (None, 3))
    assert one.to_dict() == three.to_dict()


def test_a_process_without_any_sequence_is_no_fault(tokenizer):
    documents = Dataset.from_dict({"text": ["the cat", *random_documents(1)["text"]]})
    assert len(tokenize(documents, tokenizer, MAX_LENGTH, num_proc=2)) == 4


SECOND_RUN = """
import sys
import supershaper_hf.data.sequences
import supershaper_hf.data.documents
from transformers import AutoTokenizer

def fail(*args, **kwargs):
    raise AssertionError("done again")

supershaper_hf.data.sequences.encode = supershaper_hf.data.sequences.pack = fail
supershaper_hf.data.documents.read_batches = fail
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer("the cat", truncation=True, max_length=9, padding="max_length")  # leaves settings behind
text = supershaper_hf.data.documents.load_text(f"{sys.argv[1]}/text.txt")
for cross_documents in (False, True):
    print(supershaper_hf.data.sequences.tokenize(text, tokenizer, 12, cross_documents, num_proc=2).cache_files)
"""


def test_a_second_run_does_not_tokenise_again(tokenizer, tmp_path):
    """In this process, and in a fresh one in which reading and tokenising would fail."""
    (tmp_path / "text.txt").write_text("\n".join(random_documents(30)["text"]))
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def cache_files(cross_documents):
        text = load_text(tmp_path / "text.txt")
        return tokenize(text, tokenizer, 12, cross_documents, num_proc=2).cache_files

    first = [cache_files(False), cache_files(True)]
    assert all(first)
    assert [cache_files(False), cache_files(True)] == first
    command = [sys.executable, "-c", SECOND_RUN, str(tmp_path)]
    fresh = subprocess.run(command, capture_output=True, text=True, check=False)
    assert fresh.stdout == "".join(f"{files}\n" for files in first), fresh.stderr


def test_other_settings_are_tokenised_anew(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(random_documents(30)["text"]))
    text = load_text(tmp_path / "text.txt")
    other = BertTokenizer(vocab=tokenizer.get_vocab() | {"extra": len(tokenizer)})
    found = [
        tokenize(text, tokenizer, 12),
        tokenize(text, tokenizer, 13),
        tokenize(text, tokenizer, 12, cross_documents=True),
        tokenize(text, other, 12),
    ]
    assert len({str(sequences.cache_files) for sequences in found}) == 4


@pytest.mark.parametrize("max_length", [SHORTEST_SEQUENCE - 1, 17])
def test_length_that_does_not_fit_is_refused(tokenizer, max_length):
    tokenizer.model_max_length = 16
    assert max(map(len, tokenize(random_documents(3), tokenizer, 16)["input_ids"])) == 16
    with pytest.raises(ValueError, match=f"max_length={max_length} must be between 8 and 16, the tokenizer's"):
        tokenize(random_documents(3), tokenizer, max_length)


def test_tokenizer_without_ends_of_a_sequence_is_refused(tokenizer):
    tokenizer.sep_token = None
    with pytest.raises(ValueError, match=r"The tokenizer has no \[CLS\] or no \[SEP\] token"):
        tokenize(random_documents(3), tokenizer, MAX_LENGTH)


def test_dataset_without_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"no column 'text', only \['body'\]"):
        tokenize(Dataset.from_dict({"body": ["a"]}), tokenizer, MAX_LENGTH)
