"""From text files to masked batches: read, train or check a tokenizer, cut into sequences, mask.

Text is one document a line. A sequence never crosses a document. Training masks are drawn anew for every batch;
evaluation masks are drawn once from a seed and stored, so that every shape is measured on the same masked tokens.
"""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import BertWordPieceTokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from .configuration_supershaper import SuperShaperConfig


MASKING_RATE = 0.15
SHORTEST_SEQUENCE = 8  # tokens; shorter tails of a document are left out


def load_text(files: str | Path | Sequence[str | Path]) -> Dataset:
    """Read text files, one document a line, into a dataset with one column, `text`.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is not UTF-8 or holds no text.
    """
    paths = [Path(files)] if isinstance(files, (str, Path)) else [Path(file) for file in files]
    if not paths:
        raise ValueError("No text files given. Name at least one UTF-8 file with one document a line.")
    documents: list[str] = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"Text file {path} does not exist or is not a file.")
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}. Convert it, "
                f"for example with: iconv -f latin1 -t utf-8 {path} > utf8.txt"
            ) from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{path} is empty: it holds no line with text.")
        documents += found
    return Dataset.from_dict({"text": documents})


def split_text(dataset: Dataset, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split documents at random into training text and a held-out share, which gets at least one document.

    Raises:
        ValueError: If there are fewer than two documents.
    """
    if len(dataset) < 2:
        raise ValueError(f"The text has {len(dataset)} document(s), but at least 2 are needed: one to hold out.")
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    cut = min(max(1, round(held_out * len(dataset))), len(dataset) - 1)
    return dataset.select(sorted(order[cut:])), dataset.select(sorted(order[:cut]))


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


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Cut each document into sequences of at most `max_length` tokens, [CLS] and [SEP] included.

    Returns:
        A dataset with the columns `input_ids` and `special_tokens_mask`.

    Raises:
        ValueError: If no document is at least `SHORTEST_SEQUENCE` tokens long.
    """

    def cut(batch: dict) -> dict:
        encoded = tokenizer(
            batch["text"],
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        long_enough = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) >= SHORTEST_SEQUENCE]
        return {key: [encoded[key][i] for i in long_enough] for key in ("input_ids", "special_tokens_mask")}

    sequences = dataset.map(cut, batched=True, remove_columns=dataset.column_names, desc="Tokenising")
    if len(sequences) == 0:
        raise ValueError(
            f"None of the {len(dataset)} documents has {SHORTEST_SEQUENCE} tokens. Use longer text, a document a line."
        )
    return sequences


def masking_collator(
    tokenizer: PreTrainedTokenizerBase, masking_rate: float = MASKING_RATE, seed: int | None = None
) -> DataCollatorForLanguageModeling:
    """Return BERT's dynamic masking: of the chosen tokens 80 % become [MASK], 10 % another token, 10 % stay.

    Raises:
        ValueError: If the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("The tokenizer has no mask token: masked language modelling needs one ([MASK] in BERT).")
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=masking_rate, seed=seed)


def fixed_masks(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    masking_rate: float = MASKING_RATE,
    seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """Mask `dataset` once and return its batches: `input_ids`, `attention_mask` and `labels`, (batch, length) each.

    The same seed gives the same masks, whatever model or shape they are then used for. Sequences are ordered by length,
    so that little is padded.
    """
    collate = masking_collator(tokenizer, masking_rate, seed)
    sequences = sorted(dataset, key=lambda sequence: len(sequence["input_ids"]))
    return [collate(sequences[start : start + batch_size]) for start in range(0, len(sequences), batch_size)]
