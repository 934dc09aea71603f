"""Mask sequences of tokens in batches: fixed batches to evaluate on, endless and resumable ones to train on.

Nothing here keeps a random generator. The masks of a sequence are drawn from the seed and its position in the endless
text, the order of the text from the seed and the epoch. So neither depends on the batch size, the workers or the number
of processes, and a few numbers are enough to resume.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import PreTrainedTokenizerBase

from ..checks import check_count, check_number
from ..files import checksum
from ..model.modeling_supershaper import IGNORE_INDEX
from .sequences import check_length, tokenize_documents


MLM_PROBABILITY = 0.15
FINGERPRINTED = 100  # sequences or documents that stand for a text; see `MicroBatches.fingerprint`
COLUMNS = ("input_ids", "special_tokens_mask")
STATE = ("micro_batch",)  # what the state of stored text holds: the number of micro-batches that were read
STREAM_STATE = ("epoch", "chunk", "source", "offset", "sequences")  # what the state of a stream holds; see `Stream`
Batch = dict[str, torch.Tensor]
State = dict[str, Any]


class MaskingCollator:
    """Masks tokens as BERT does: of the chosen ones 80 % become [MASK], 10 % a random token, and 10 % stay.

    It is called with a list of sequences, each with `input_ids`, `special_tokens_mask` and `position`. It returns
    `input_ids`, `attention_mask` and `labels`, each int64 of `(batch, length)`. The label of a chosen token is the
    token that it was. All other tokens and padding have the label `IGNORE_INDEX`, so a sequence may have no label.
    Source: Devlin et al. 2019, arXiv 1810.04805, section 3.1.

    Args:
        tokenizer: A tokenizer with [MASK] and [PAD]. Without masks, it needs no [MASK].
        mlm_probability: Probability that a token is chosen if it is not special, from 0 to 1. With 0 nothing is
            masked and no token has a label, as encoders without a masked-LM head need it.
        seed: Random seed of the masks, at least 0. The masks of a sequence depend on its length, its `position` and
            this seed, and on nothing else.
        pad_to_multiple_of: If given, the batch is padded to a multiple of this length.

    Raises:
        ValueError: If the tokenizer has no mask or padding token, or an argument is out of its range.

    Example:
        >>> from supershaper_hf import train_tokenizer
        >>> tokenizer = train_tokenizer(["the cat sat on the mat"] * 2, vocab_size=100, max_length=128)
        >>> found = tokenize_documents(["the cat sat on the mat"], tokenizer, max_length=8)
        >>> sequence = {name: values[0] for name, values in found.items()}
        >>> batch = MaskingCollator(tokenizer, mlm_probability=0.3, seed=7)([{**sequence, "position": 0}])
        >>> tokenizer.decode(batch["input_ids"][0])
        '[CLS] the cat [MASK] on the [MASK] [SEP]'
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = MLM_PROBABILITY,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        check_number("mlm_probability", mlm_probability, least=0, most=1)
        if tokenizer.mask_token_id is None and mlm_probability > 0:
            raise ValueError(
                "The tokenizer has no mask token: masked language modelling needs one ([MASK] in BERT). Without "
                "masks, use mlm_probability=0."
            )
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token: batches need one ([PAD] in BERT).")
        check_count("seed", seed, least=0)
        if pad_to_multiple_of is not None:
            check_count("pad_to_multiple_of", pad_to_multiple_of)
        self.padding, self.vocabulary = tokenizer.pad_token_id, len(tokenizer)
        self.mask = self.padding if tokenizer.mask_token_id is None else tokenizer.mask_token_id  # then it is not used
        self.mlm_probability, self.seed, self.multiple = mlm_probability, seed, pad_to_multiple_of or 1

    def __call__(self, sequences: Sequence[Mapping[str, Any]]) -> Batch:
        lengths = [len(sequence["input_ids"]) for sequence in sequences]
        size = (len(sequences), -(-max(lengths) // self.multiple) * self.multiple)
        ids = np.full(size, self.padding, dtype=np.int64)
        special = np.ones(size, dtype=bool)
        draws = np.zeros((3, *size))  # for each token: whether it is chosen, what replaces it, which random token
        for row, (sequence, length) in enumerate(zip(sequences, lengths)):
            ids[row, :length] = sequence["input_ids"]
            special[row, :length] = sequence["special_tokens_mask"]
            draws[:, row, :length] = np.random.default_rng((self.seed, sequence["position"])).random((3, length))
        chosen = ~special & (draws[0] < self.mlm_probability)
        replaced = np.where(draws[1] < 0.8, self.mask, (draws[2] * self.vocabulary).astype(np.int64))
        batch = {
            "input_ids": np.where(chosen & (draws[1] < 0.9), replaced, ids),
            "attention_mask": (np.arange(size[1]) < np.array(lengths)[:, None]).astype(np.int64),
            "labels": np.where(chosen, ids, IGNORE_INDEX),
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def fixed_masks(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    mlm_probability: float = MLM_PROBABILITY,
    seed: int = 0,
) -> list[Batch]:
    """Mask a dataset once, so that every shape can be measured on the same tokens.

    The masks of a sequence depend on `seed` and its index in the dataset. The batches hold the sequences in the order
    of their lengths, so that there is little padding.

    Args:
        dataset: The result of `tokenize`.
        tokenizer: A tokenizer with [MASK] and [PAD]. Without masks, it needs no [MASK].
        batch_size: Number of sequences of a batch; the last batch may have fewer.
        mlm_probability: Probability that a token is masked, or 0 for text without masks; see `MaskingCollator`.
        seed: Random seed of the masks.

    Returns:
        The batches, each as `MaskingCollator` returns it.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from supershaper_hf import tokenize, train_tokenizer
        >>> documents = Dataset.from_dict({"text": ["the cat sat on the mat"] * 5})
        >>> tokenizer = train_tokenizer(documents["text"], vocab_size=100, max_length=128)
        >>> batches = fixed_masks(tokenize(documents, tokenizer, max_length=8), tokenizer, batch_size=2)
        >>> [tuple(batch["labels"].shape) for batch in batches]
        [(2, 8), (2, 8), (1, 8)]
    """
    check_count("batch_size", batch_size)
    collate = MaskingCollator(tokenizer, mlm_probability, seed)
    sequences = [{**sequence, "position": index} for index, sequence in enumerate(dataset.select_columns([*COLUMNS]))]
    sequences.sort(key=lambda sequence: len(sequence["input_ids"]))
    return [collate(sequences[start : start + batch_size]) for start in range(0, len(sequences), batch_size)]


def calibration_batches(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, num_tokens: int, batch_size: int, seed: int = 0
) -> list[Batch]:
    """Return unmasked sequences from anywhere in a dataset, for `calibrate`.

    Args:
        dataset: The result of `tokenize`.
        tokenizer: A tokenizer with [PAD].
        num_tokens: Number of tokens in all, or a few more. A shorter dataset is taken whole.
        batch_size: Number of sequences of a batch; the last batch may have fewer. They are in the order of their
            lengths, so that there is little padding.
        seed: Random seed of the choice.

    Returns:
        The batches, `input_ids` and `attention_mask` of (batch, length) each.

    Raises:
        ValueError: If `num_tokens` or `batch_size` is not an integer of at least 1.

    Example:
        >>> from supershaper_hf import tokenize, train_tokenizer
        >>> documents = Dataset.from_dict({"text": ["the cat sat on the mat"] * 5})
        >>> tokenizer = train_tokenizer(documents["text"], vocab_size=100, max_length=128)
        >>> batches = calibration_batches(tokenize(documents, tokenizer, max_length=8), tokenizer, 20, batch_size=2)
        >>> [tuple(batch["input_ids"].shape) for batch in batches]
        [(2, 8), (1, 8)]
    """
    check_count("num_tokens", num_tokens)
    chosen: list[int] = []
    tokens = 0
    for index in np.random.default_rng(seed).permutation(len(dataset)).tolist():
        if tokens >= num_tokens:
            break
        chosen.append(index)
        tokens += len(dataset[index]["input_ids"])
    batches = fixed_masks(dataset.select(chosen), tokenizer, batch_size, mlm_probability=0, seed=seed)
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


class MicroBatches:
    """Endless masked micro-batches of one process. They resume exactly from a state of a few numbers.

    Stored text, a tokenised `Dataset`, is read in endless epochs, each in another order. With an equal product of
    `batch_size` and `num_processes`, any number of processes together see the same sequences with the same masks.

    A stream, an `IterableDataset` of text, is tokenised while it is read. Every process reads the whole text, keeps
    the documents whose number leaves the remainder `rank` when divided by `num_processes`, and skips the others. It
    shuffles `documents_per_chunk` of its documents at a time, and starts again at the end of the text. A micro-batch
    may hold the end of one chunk and the start of the next. The number of processes changes what each of them yields.
    To resume from a state, the current chunk is read again. Do not call `shuffle` on a stream, because `datasets` does
    not store what its buffer held.

    Args:
        dataset: The result of `tokenize`, or of `load_text(..., streaming=True)`.
        tokenizer: The tokenizer of the dataset. It also tokenises a stream.
        batch_size: Number of sequences of every micro-batch.
        mlm_probability: Probability that a token is masked, or 0 for text without masks; see `MaskingCollator`.
        seed: Random seed of the order and of the masks.
        rank: Number of this process.
        num_processes: Number of processes.
        num_workers: Number of processes that prepare micro-batches. A stream is read in order, so it has at most 1.
        max_length: Number of tokens of the longest sequence of a stream; by default the tokenizer's `model_max_length`.
        cross_documents: Pack each chunk of a stream into full sequences, which cross the ends of documents.
        documents_per_chunk: Number of documents of this process that are tokenised and shuffled together.
        pad_to_multiple_of: If given, micro-batches are padded to a multiple of this length.

    Raises:
        ValueError: If a number is out of its range, or the dataset is neither of the two kinds.

    Example:
        >>> from supershaper_hf import tokenize, train_tokenizer
        >>> documents = Dataset.from_dict({"text": ["the cat sat on the mat", "the mat sat on the cat"]})
        >>> tokenizer = train_tokenizer(documents["text"][:], vocab_size=100, max_length=128)
        >>> text = MicroBatches(tokenize(documents, tokenizer, max_length=8), tokenizer, batch_size=4)
        >>> batch, state = next(text.iterate())
        >>> tuple(batch["input_ids"].shape), state
        ((4, 8), {'micro_batch': 1})
        >>> batch, state = next(text.iterate(state))
        >>> state
        {'micro_batch': 2}
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        mlm_probability: float = MLM_PROBABILITY,
        seed: int = 0,
        rank: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        *,
        max_length: int | None = None,
        cross_documents: bool = False,
        documents_per_chunk: int = 10_000,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.collate = MaskingCollator(tokenizer, mlm_probability, seed, pad_to_multiple_of)
        check_count("batch_size", batch_size)
        check_count("num_workers", num_workers, least=0)
        check_count("documents_per_chunk", documents_per_chunk)
        if not 0 <= rank < num_processes:
            raise ValueError(f"rank={rank} must be at least 0 and below num_processes={num_processes}.")
        self.dataset, self.tokenizer, self.batch_size, self.seed = dataset, tokenizer, batch_size, seed
        self.rank, self.num_processes, self.num_workers = rank, num_processes, num_workers
        self.cross_documents, self.documents_per_chunk = cross_documents, documents_per_chunk
        self.max_length = tokenizer.model_max_length if max_length is None else max_length
        if isinstance(dataset, IterableDataset):
            check_length(tokenizer, self.max_length)
            if num_workers > 1:
                raise ValueError(
                    f"num_workers={num_workers}, but a stream is read in order by one process: use 0 or 1."
                )
        elif not set(COLUMNS) <= set(dataset.column_names):
            raise ValueError(f"The dataset has the columns {dataset.column_names}, not {list(COLUMNS)}: call tokenize.")
        elif len(dataset) == 0:
            raise ValueError("The dataset is empty: it has no sequence to train on.")

    @cached_property
    def fingerprint(self) -> str:
        """A short description of the text, equal on all processes, to compare with the text of another run.

        For stored text it holds the number of sequences and a checksum of 100 of them, evenly spaced from the first to
        the last. For a stream it holds a checksum of the first 100 documents, because more would have to be read. Paths
        and caches do not count. So it is computed in a moment for any amount of text, but it does not notice a change
        in sequences between those 100, or in a stream after its first 100 documents.

        Raises:
            OSError: If the start of a stream cannot be read.
            ValueError: If the start of a stream is damaged.
        """
        if isinstance(self.dataset, IterableDataset):
            documents = [row["text"] for row in islice(copy.deepcopy(self.dataset), FINGERPRINTED)]
            return f"stream that begins with {checksum(documents)}"
        rows = np.unique(np.linspace(0, len(self.dataset) - 1, FINGERPRINTED).round().astype(int))
        sequences = list(self.dataset.select_columns(["input_ids"])[rows]["input_ids"])
        return f"{len(self.dataset)} stored sequences with {checksum(sequences)}"

    def iterate(self, state: State | None = None) -> Iterator[tuple[Batch, State]]:
        """Yield micro-batches on the CPU for ever, each with the state to resume from after it.

        A state can be stored as JSON. It belongs to one dataset and the same arguments. Only `num_workers` may change.

        Args:
            state: The state to resume from, or `None` to start at the beginning.

        Raises:
            OSError: If a stream cannot be read, for example because a file has vanished.
            ValueError: If the state belongs to the other kind of dataset or is damaged, if a stream is damaged, or if a
                whole stream has no sequence for this process.
        """
        self.check_state(state)
        source: Any = Stream(self, state) if isinstance(self.dataset, IterableDataset) else Masked(self)
        first = 0 if state is None else state.get("micro_batch", 0)
        loader = DataLoader(
            source,
            sampler=None if isinstance(source, Stream) else PositionSampler(self, first),
            batch_size=None,  # each item of the sampler or the stream already is a micro-batch
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # torch's global generator must stay untouched: dropout uses it
        )
        for number, item in enumerate(loader, start=first + 1):
            if isinstance(item, Exception):
                raise item
            yield item if isinstance(source, Stream) else (item, {"micro_batch": number})

    def check_state(self, state: State | None) -> None:
        """Raise a ValueError unless `state` is one of this kind of dataset."""
        kind, names = (
            ("a stream", STREAM_STATE) if isinstance(self.dataset, IterableDataset) else ("stored text", STATE)
        )
        if state is None:
            return
        if not isinstance(state, Mapping) or set(state) != set(names):
            raise ValueError(
                f"The state {state!r} does not belong to {kind}, whose states have the keys {', '.join(names)}. Go on "
                "with the text that the run began with, stored or streaming as it was then."
            )
        for name in names:
            if name != "source":
                check_count(f"{name} of the state", state[name], least=0)


class PositionSampler:
    """Yields for each micro-batch its positions in the endless text, and the index of the sequence at each of them."""

    def __init__(self, batches: MicroBatches, first: int) -> None:
        self.batches, self.first = batches, first

    def __iter__(self) -> Iterator[tuple[range, list[int]]]:
        batches, epoch, order = self.batches, -1, np.empty(0, dtype=np.int64)
        length = len(batches.dataset)
        for number in count(self.first):
            start = (number * batches.num_processes + batches.rank) * batches.batch_size
            rows = []
            for position in range(start, start + batches.batch_size):
                if position // length != epoch:
                    epoch = position // length
                    order = np.random.default_rng((batches.seed, epoch)).permutation(length)
                rows.append(int(order[position % length]))
            yield range(start, start + batches.batch_size), rows


class Masked(torch.utils.data.Dataset):
    """Looks up and masks the sequences of a micro-batch. It runs in the workers if there are any."""

    def __init__(self, batches: MicroBatches) -> None:
        self.sequences, self.collate = batches.dataset.select_columns([*COLUMNS]), batches.collate

    def __getitem__(self, chosen: tuple[range, list[int]]) -> Batch:
        positions, rows = chosen
        found = self.sequences[rows]
        columns = zip(positions, found["input_ids"], found["special_tokens_mask"])
        return self.collate([{"position": p, "input_ids": ids, "special_tokens_mask": s} for p, ids, s in columns])


class Stream(TorchIterableDataset):
    """Tokenises, shuffles and masks a stream of text from a state on. It runs in the worker if there is one.

    A state names the chunk that holds the next sequence, and the place where that chunk begins in the text:

    - `epoch`: How often the whole text has been read.
    - `chunk`: Number of the chunk, counted over all epochs.
    - `source`: The state of the text before the chunk, as `datasets` describes it; `None` at the start of the text.
    - `offset`: Number of sequences of the chunk that are used up.
    - `sequences`: Number of sequences that this process has used up so far.
    """

    def __init__(self, batches: MicroBatches, state: State | None) -> None:
        self.batches = batches
        self.state = state or dict(zip(STREAM_STATE, (0, 0, None, 0, 0)))

    def __iter__(self) -> Iterator[tuple[Batch, State] | Exception]:
        sequences = self.sequences()
        try:
            while True:
                group = list(islice(sequences, self.batches.batch_size))
                yield self.batches.collate([sequence for sequence, _ in group]), copy.deepcopy(group[-1][1])
        except (OSError, ValueError) as error:
            yield error  # raised in a worker, it would have a traceback in front of its message

    def sequences(self) -> Iterator[tuple[dict[str, Any], State]]:
        """Yield each sequence with the state after it."""
        batches = self.batches
        dataset = copy.deepcopy(batches.dataset)
        epoch, chunk, source, offset, number = (self.state[name] for name in STREAM_STATE)
        while True:
            dataset.set_epoch(epoch)
            documents = self.open(dataset, source)
            while block := self.read_block(documents):
                after = dataset.state_dict()
                found = self.tokenize(block[batches.rank :: batches.num_processes])
                order = np.random.default_rng((batches.seed, chunk, batches.rank)).permutation(len(found))
                self.check_offset(offset, len(order))
                while offset < len(order):
                    sequence = {**found[order[offset]], "position": number * batches.num_processes + batches.rank}
                    offset, number = offset + 1, number + 1
                    yield sequence, dict(zip(STREAM_STATE, (epoch, chunk, source, offset, number)))
                chunk, offset, source = chunk + 1, 0, after
            self.check_offset(offset, 0)
            if number == 0:
                raise ValueError(
                    f"The text has no document with enough tokens for process {batches.rank} of "
                    f"{batches.num_processes}. Use longer documents, one a line, or fewer processes."
                )
            epoch, source = epoch + 1, None

    def open(self, dataset: IterableDataset, source: dict[str, Any] | None) -> Iterator[dict[str, str]]:
        """Return the documents from the place on that `source` describes."""
        if source is None:
            return iter(dataset)
        try:
            dataset.load_state_dict(source)
            documents = iter(dataset)
            first = list(islice(documents, 1))  # `datasets` looks at the state when it yields a document
            given, expected = (
                {name: type(value) for name, value in state.items()} for state in (source, dataset.state_dict())
            )
            if given != expected:  # `datasets` has then started at the beginning, without an error
                raise KeyError("it has other keys or types of values")
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"The text cannot go on from the state {source!r} ({type(error).__name__}: {error}). The state belongs "
                "to another text, or is damaged. Go on with the text that the run began with."
            ) from error
        return chain(first, documents)

    def check_offset(self, offset: int, length: int) -> None:
        """Raise a ValueError if a state has used up more sequences of its chunk than there are."""
        if offset > length:
            raise ValueError(
                f"The state has used up {offset} sequences of a part of the text that has {length}. It belongs to "
                "another text or other arguments, or is damaged. Go on with those that the run began with."
            )

    def read_block(self, documents: Iterator[dict[str, str]]) -> list[str]:
        """Read the next chunk of every process, and keep the text of this process only."""
        batches = self.batches
        block = islice(documents, batches.documents_per_chunk * batches.num_processes)
        return [row["text"] if i % batches.num_processes == batches.rank else "" for i, row in enumerate(block)]

    def tokenize(self, texts: list[str]) -> list[dict[str, list[int]]]:
        batches = self.batches
        found = tokenize_documents(texts, batches.tokenizer, batches.max_length, batches.cross_documents)
        return [dict(zip(found, values)) for values in zip(*found.values())]
