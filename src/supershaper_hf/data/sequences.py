"""Turn documents into sequences of tokens: train or check a tokenizer, then cut the documents or pack them.

A sequence holds text of one document, unless it is asked to cross documents. The module `batches` masks sequences.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.config import HF_DATASETS_CACHE
from tokenizers import BertWordPieceTokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizer, PreTrainedTokenizerBase

from ..files import checksum
from ..model.configuration_supershaper import SuperShaperConfig
from .documents import explained_disk_errors


SEQUENCES = Features({"input_ids": List(Value("int32")), "special_tokens_mask": List(Value("int8"))})
SHORTEST_SEQUENCE = 8  # tokens, [CLS] and [SEP] included
ROWS = 1000  # number of documents that are tokenised at a time
VERSION = 1  # a part of the cache key: raise it when this module makes other sequences from the same text


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Train an uncased WordPiece tokenizer like BERT's.

    Equal texts train equal tokenizers.

    Args:
        texts: The text to train on.
        vocab_size: Number of tokens, special tokens included. There may be fewer if there is little text.
        max_length: The tokenizer's `model_max_length`.

    Example:
        >>> tokenizer = train_tokenizer(["the cat sat", "the dogs sat"] * 2, vocab_size=100, max_length=128)
        >>> tokenizer.tokenize("The cats")
        ['the', 'cat', '##s']
    """
    texts = list(texts)
    trained = BertWordPieceTokenizer(lowercase=True)
    # The trainer numbers the continuation characters at random, and these numbers decide which of two equally frequent
    # pairs is merged. Given as special tokens, the characters have fixed numbers.
    words = BertPreTokenizer().pre_tokenize_str(trained.normalize("\n".join(texts)))
    characters = sorted({character for word, _ in words for character in word[1:]})
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{character}" for character in characters)]
    trained.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=first, show_progress=False)
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=True, model_max_length=max_length)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: SuperShaperConfig) -> None:
    """Raise a ValueError unless `tokenizer` knows words, and every one of its tokens has an embedding."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            "The tokenizer has special tokens only, so all text would be unknown to it. transformers makes such a "
            "tokenizer for a BERT folder without tokenizer files: add them, or name another tokenizer."
        )
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
        >>> tokenizer, other = (train_tokenizer(text, vocab_size=100, max_length=128) for text in (texts, ["a mat"]))
        >>> before = fingerprint_tokenizer(tokenizer)
        >>> _ = tokenizer(texts, padding=True, truncation=True)
        >>> fingerprint_tokenizer(tokenizer) == before, fingerprint_tokenizer(other) == before
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
    """Turn documents into sequences of at most `max_length` tokens, [CLS] and [SEP] included.

    `tokenize_documents` says how documents are cut. The result does not depend on `num_proc`. If the documents come
    from disk, the result is stored beside them: a second call with equal arguments, in any process, reads it.

    Args:
        dataset: Documents in a column `text`.
        tokenizer: A tokenizer with [CLS] and [SEP].
        max_length: Number of tokens of the longest sequence.
        cross_documents: Pack 1,000 documents at a time into full sequences, with [SEP] between them.
        num_proc: Number of processes that tokenise.

    Returns:
        A dataset with the columns `input_ids` and `special_tokens_mask`.

    Raises:
        OSError: If the disk is full.
        ValueError: If `max_length` does not fit the tokenizer, or no document has `SHORTEST_SEQUENCE` tokens.

    Example:
        >>> documents = Dataset.from_dict({"text": ["the cat sat on the mat and the dog ran"]})
        >>> tokenizer = train_tokenizer(documents["text"][:] * 2, vocab_size=100, max_length=128)
        >>> sequences = tokenize(documents, tokenizer, max_length=12)
        >>> tokenizer.decode(sequences[0]["input_ids"])
        '[CLS] the cat sat on the mat and the dog ran [SEP]'
    """
    check_length(tokenizer, max_length)
    if "text" not in dataset.column_names:
        raise ValueError(f"The dataset has no column 'text', only {dataset.column_names}. Make it with load_text.")
    common: dict[str, Any] = {"batched": True, "batch_size": ROWS}
    key: dict[str, Any] = {"tokenizer": tokenizer, "version": VERSION}
    arguments = key | {"max_length": max_length, "cross_documents": cross_documents}
    folders = [Path(file["filename"]).parent for file in dataset.cache_files]
    with explained_disk_errors(folders[0] if folders else HF_DATASETS_CACHE):
        if cross_documents:
            # Each process of `map` makes its own batches of documents. Packed sequences would depend on where these
            # batches begin, so a single process packs.
            documents = dataset.map(
                encode_batch,
                fn_kwargs=key,
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

    Each document is cut by itself. The rest of a document is left out if it makes a sequence shorter than
    `SHORTEST_SEQUENCE`. With `cross_documents` the documents are first joined with [SEP] between them, so that all
    sequences but the last are full.

    Returns:
        `input_ids` and `special_tokens_mask`, with one list for each sequence. The mask is 1 at [CLS], [SEP], [PAD] and
        [MASK], which are never predicted.

    Raises:
        ValueError: If `max_length` does not fit the tokenizer.

    Example:
        >>> tokenizer = train_tokenizer(["the cat sat on the mat"] * 2, vocab_size=100, max_length=128)
        >>> found = tokenize_documents(["The cat sat on the mat."], tokenizer, max_length=8)
        >>> [tokenizer.decode(ids) for ids in found["input_ids"]], found["special_tokens_mask"]
        (['[CLS] the cat sat on the mat [SEP]'], [[1, 0, 0, 0, 0, 0, 0, 1]])
    """
    check_length(tokenizer, max_length)
    return pack(encode(texts, tokenizer), tokenizer, max_length, cross_documents)


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each document, without special tokens."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    # With `verbose` the tokenizer would warn about every document that is longer than its model_max_length.
    return tokenizer(list(texts), verbose=False, **options)["input_ids"]


def pack(
    documents: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, max_length: int, cross_documents: bool
) -> dict[str, list[list[int]]]:
    """Cut the tokens of documents into sequences, as `tokenize_documents` says."""
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if cross_documents:
        documents = [[token for tokens in documents if tokens for token in (*tokens, last)][:-1]]
    inner = max_length - 2
    pieces = [tokens[start : start + inner] for tokens in documents for start in range(0, len(tokens), inner)]
    sequences = [[first, *piece, last] for piece in pieces if len(piece) + 2 >= SHORTEST_SEQUENCE]
    special = {first, last, tokenizer.pad_token_id, tokenizer.mask_token_id}
    masks = [[int(token in special) for token in sequence] for sequence in sequences]
    return {"input_ids": sequences, "special_tokens_mask": masks}


# What `Dataset.map` runs in its processes. Each is a function of the module and gets all that it needs as arguments,
# because they and the function's name are the cache key. `version` is there for this purpose only.


def tokenize_batch(batch: dict[str, list], version: int, **arguments: Any) -> dict[str, list]:
    return tokenize_documents(batch["text"], **arguments)


def encode_batch(batch: dict[str, list], version: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    return {"tokens": encode(batch["text"], tokenizer)}


def pack_batch(batch: dict[str, list], version: int, **arguments: Any) -> dict[str, list]:
    return pack(batch["tokens"], **arguments)
