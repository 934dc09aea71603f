"""From documents to sequences of tokens: train or check a tokenizer, cut or pack. `batches` masks them.

A sequence crosses documents only if asked to.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from tokenizers import BertWordPieceTokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizer, PreTrainedTokenizerBase

from ..files import checksum
from ..model.configuration_supershaper import SuperShaperConfig


SEQUENCES = Features({"input_ids": List(Value("int32")), "special_tokens_mask": List(Value("int8"))})
SHORTEST_SEQUENCE = 8  # tokens; shorter tails of a document are left out
ROWS = 1000  # tokenised at a time


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Train an uncased WordPiece tokenizer like BERT's on `texts`."""
    texts = list(texts)
    trained = BertWordPieceTokenizer(lowercase=True)
    # The trainer numbers continuation characters in random order and breaks ties by number: number them here instead.
    words = BertPreTokenizer().pre_tokenize_str(trained.normalize("\n".join(texts)))
    characters = sorted({character for word, _ in words for character in word[1:]})
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{character}" for character in characters)]
    trained.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=first, show_progress=False)
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=True, model_max_length=max_length)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: SuperShaperConfig) -> None:
    """Raise a ValueError unless every token of `tokenizer` has an embedding."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model has vocab_size={config.vocab_size}: tokens from "
            f"{config.vocab_size} on have no embedding. Use the tokenizer the model was trained with, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) and train."
        )


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hexadecimal digits that are equal for two tokenizers if they make the same tokens of every text.

    They follow from the vocabulary, the rules that split text, and the special tokens. Truncation and padding, which
    a call of the tokenizer leaves behind in it, do not count.

    Example:
        >>> texts = ["the cat sat on the mat", "a dog ran"]
        >>> small, large = (train_tokenizer(texts, vocab_size=size, max_length=128) for size in (30, 40))
        >>> before = fingerprint_tokenizer(small)
        >>> _ = small(texts, padding=True, truncation=True)
        >>> fingerprint_tokenizer(small) == before, fingerprint_tokenizer(large) == before
        (True, False)
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its class stands for its rules
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return checksum([rules, tokenizer.special_tokens_map])


def check_length(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise a ValueError unless `tokenizer` can make sequences of `max_length` tokens."""
    if not SHORTEST_SEQUENCE <= max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length={max_length} must be between {SHORTEST_SEQUENCE} and {tokenizer.model_max_length}, the "
            "tokenizer's model_max_length."
        )
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError("The tokenizer has no [CLS] or no [SEP] token: a BERT sequence begins and ends with them.")


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cross_documents: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Turn documents into sequences of at most `max_length` tokens, [CLS] and [SEP] included; see `tokenize_documents`.

    The result does not depend on `num_proc`. It is cached beside a dataset that comes from disk: a second call with
    equal arguments, in any process, reads it.

    Args:
        dataset: Documents in a column `text`.
        tokenizer: One with [CLS] and [SEP].
        max_length: Tokens of the longest sequence.
        cross_documents: Pack 1,000 documents at a time into full sequences, with [SEP] between them.
        num_proc: Number of processes that tokenise.

    Returns:
        A dataset with the columns `input_ids` and `special_tokens_mask`.

    Raises:
        ValueError: If `max_length` does not fit the tokenizer, or no document has `SHORTEST_SEQUENCE` tokens.

    Example:
        >>> sequences = tokenize(load_text("mine.txt"), tokenizer, max_length=128, num_proc=8)  # doctest: +SKIP
    """
    check_length(tokenizer, max_length)
    if "text" not in dataset.column_names:
        raise ValueError(f"The dataset has no column 'text', only {dataset.column_names}. Make it with load_text.")
    common: dict[str, Any] = {"batched": True, "batch_size": ROWS}
    arguments = {"tokenizer": tokenizer, "max_length": max_length, "cross_documents": cross_documents}
    if cross_documents:
        # Processes cut the text in other places than batches do, which packing would show: so it is done by one.
        documents = dataset.map(
            encode_batch,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=dataset.column_names,
            features=Features({"tokens": List(Value("int32"))}),
            num_proc=num_proc,
            desc="Tokenising",
            **common,
        )
        sequences = documents.map(
            pack_batch, fn_kwargs=arguments, remove_columns=["tokens"], features=SEQUENCES, desc="Packing", **common
        )
    else:
        sequences = dataset.map(
            tokenize_batch,
            fn_kwargs=arguments,
            remove_columns=dataset.column_names,
            features=SEQUENCES,
            num_proc=num_proc,
            desc="Tokenising",
            **common,
        )
    if len(sequences) == 0:
        raise ValueError(
            f"None of the {len(dataset)} documents has {SHORTEST_SEQUENCE} tokens. Use longer text, a document a line."
        )
    return sequences


def tokenize_documents(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, cross_documents: bool = False
) -> dict[str, list[list[int]]]:
    """Cut documents into sequences of at most `max_length` tokens, [CLS] and [SEP] included.

    Each document is cut by itself; tails shorter than `SHORTEST_SEQUENCE` are left out. With `cross_documents` the
    documents are first joined with [SEP] between them, so that all sequences but the last are full.

    Returns:
        `input_ids` and `special_tokens_mask`, one list per sequence; the latter marks [CLS], [SEP], [PAD] and [MASK].

    Raises:
        ValueError: If `max_length` does not fit the tokenizer.

    Example:
        >>> tokenize_documents(["the cat sat on the mat"], tokenizer, max_length=8)["input_ids"]  # doctest: +SKIP
        [[2, 5, 7, 11, 14, 5, 9, 3]]
    """
    check_length(tokenizer, max_length)
    return pack(encode(texts, tokenizer), tokenizer, max_length, cross_documents)


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each document, without special tokens."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(list(texts), verbose=False, **options)["input_ids"]  # not verbose: documents may be long


def pack(
    documents: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, max_length: int, cross_documents: bool
) -> dict[str, list[list[int]]]:
    """Cut tokens of documents into sequences; see `tokenize_documents`."""
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if cross_documents:
        documents = [[token for tokens in documents if tokens for token in (*tokens, last)][:-1]]
    inner = max_length - 2
    pieces = [tokens[start : start + inner] for tokens in documents for start in range(0, len(tokens), inner)]
    sequences = [[first, *piece, last] for piece in pieces if len(piece) + 2 >= SHORTEST_SEQUENCE]
    special = {first, last, tokenizer.pad_token_id, tokenizer.mask_token_id}
    masks = [[int(token in special) for token in sequence] for sequence in sequences]
    return {"input_ids": sequences, "special_tokens_mask": masks}


# What `Dataset.map` runs in its processes. Module-level, with all they need as arguments: the cache goes by these.


def tokenize_batch(batch: dict[str, list], **arguments: Any) -> dict[str, list]:
    return tokenize_documents(batch["text"], **arguments)


def encode_batch(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    return {"tokens": encode(batch["text"], tokenizer)}


def pack_batch(batch: dict[str, list], **arguments: Any) -> dict[str, list]:
    return pack(batch["tokens"], **arguments)
