"""From sequences to masked batches: fixed ones to evaluate on, endless and resumable ones to train on.

Nothing here keeps a random generator. The masks of a sequence are drawn from (seed, its position), the order of text
from (seed, epoch): so they do not depend on batch size, workers or number of processes, and training goes on from a
few numbers.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import PreTrainedTokenizerBase

from ..files import checksum
from ..model.modeling_supershaper import IGNORE_INDEX
from .sequences import check_length, tokenize_documents


MLM_PROBABILITY = 0.15
FINGERPRINTED = 100  # sequences or documents that stand for a text; see `MicroBatches.fingerprint`
COLUMNS = ("input_ids", "special_tokens_mask")
STATE = ("epoch", "chunk", "source", "offset", "sequences")  # of a stream; see `Stream`
Batch = dict[str, torch.Tensor]
State = dict[str, Any]


class MaskingCollator:
    """BERT's masking: of the chosen tokens 80 % become [MASK], 10 % a token drawn from all, 10 % stay.

    Called with sequences, each `input_ids`, `special_tokens_mask` and `position`, it returns `input_ids`,
    `attention_mask` and `labels`, int64, (batch, length) each. Tokens that are not chosen, special or padding have the
    label `IGNORE_INDEX`. A sequence in which no token was chosen has no labels.

    Args:
        tokenizer: One with [MASK] and [PAD].
        mlm_probability: Chance of each token that is not special to be chosen, in (0, 1].
        seed: Non-negative. The masks of a sequence follow from its length, `seed` and its `position` alone.
        pad_to_multiple_of: Pad not just to the longest sequence, but to a multiple of this.

    Raises:
        ValueError: If the tokenizer has no mask or padding token, or an argument is out of its range.

    Example:
        >>> collate = MaskingCollator(tokenizer, mlm_probability=0.3)  # doctest: +SKIP
        >>> batch = collate([{**sequence, "position": i} for i, sequence in enumerate(sequences)])  # doctest: +SKIP
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = MLM_PROBABILITY,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token: masked language modelling needs one ([MASK] in BERT).")
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token: batches need one ([PAD] in BERT).")
        if not 0 < mlm_probability <= 1:
            raise ValueError(f"mlm_probability={mlm_probability} must be above 0 and at most 1.")
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more.")
        self.mask, self.padding, self.vocabulary = tokenizer.mask_token_id, tokenizer.pad_token_id, len(tokenizer)
        self.mlm_probability, self.seed, self.multiple = mlm_probability, seed, pad_to_multiple_of or 1

    def __call__(self, sequences: Sequence[Mapping[str, Any]]) -> Batch:
        lengths = [len(sequence["input_ids"]) for sequence in sequences]
        size = (len(sequences), -(-max(lengths) // self.multiple) * self.multiple)
        ids = np.full(size, self.padding, dtype=np.int64)
        special = np.ones(size, dtype=bool)
        draws = np.zeros((3, *size))  # chosen? replaced by what? by which token?
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
    """Mask `dataset` once, to measure every shape on the same tokens; return its batches, as `MaskingCollator` does.

    The masks of a sequence follow from `seed` and its index in the dataset. Sequences are ordered by length, so that
    little is padded.

    Example:
        >>> batches = fixed_masks(tokenize(held_out, tokenizer, 128), tokenizer, batch_size=64)  # doctest: +SKIP
    """
    collate = MaskingCollator(tokenizer, mlm_probability, seed)
    sequences = [{**sequence, "position": index} for index, sequence in enumerate(dataset.select_columns([*COLUMNS]))]
    sequences.sort(key=lambda sequence: len(sequence["input_ids"]))
    return [collate(sequences[start : start + batch_size]) for start in range(0, len(sequences), batch_size)]


class MicroBatches:
    """Endless masked micro-batches of one process, which go on exactly from a state of a few numbers.

    A tokenised `Dataset` is read in endless epochs, each in a new order. At equal `batch_size * num_processes`, any
    number of processes together see the same sequences with the same masks.

    A streaming `IterableDataset` of text is tokenised on the way. Process `rank` takes the documents whose number has
    the remainder `rank`, reads and shuffles `documents_per_chunk` of them at a time, and starts again at the end of the
    text. Micro-batches run on over chunks and epochs. What a stream yields depends on the number of processes. To go on
    from a state, the current chunk is read again. Do not `shuffle` a stream: `datasets` forgets what its buffer held.

    Args:
        dataset: The result of `data.tokenize`, or of `data.load_text(..., streaming=True)`.
        tokenizer: Chooses and masks the tokens; tokenises a stream.
        batch_size: Sequences per micro-batch; none is smaller.
        mlm_probability: See `MaskingCollator`.
        seed: Of order and masks.
        rank: Number of this process.
        num_processes: Number of processes.
        num_workers: Processes that prepare micro-batches; at most 1 for a stream, which is read in order.
        max_length: Of the sequences of a stream; by default the tokenizer's `model_max_length`.
        cross_documents: Pack each chunk of a stream into full sequences, over the ends of documents.
        documents_per_chunk: Documents of this process that are tokenised and shuffled together.
        pad_to_multiple_of: See `MaskingCollator`.

    Raises:
        ValueError: If a number is out of its range, or the dataset is neither of the two; while iterating, if a whole
            stream has no sequence for this process.

    Example:
        >>> text = MicroBatches(sequences, tokenizer, batch_size=32, mlm_probability=0.15, seed=0)  # doctest: +SKIP
        >>> for batch, state in text.iterate():  # later: text.iterate(state)  # doctest: +SKIP
        ...     loss = model(**batch).loss
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
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("documents_per_chunk", documents_per_chunk, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
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
        """A short description of the text, equal on all processes, which tells whether another run has the same.

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
        """Yield micro-batches on the CPU for ever, each with the state that `iterate` goes on from after it.

        A state can be stored as JSON. It holds for the same dataset and arguments; only `num_workers` may change.
        """
        source: Any = Stream(self, state) if isinstance(self.dataset, IterableDataset) else Masked(self)
        first = 0 if state is None else state.get("micro_batch", 0)
        loader = DataLoader(
            source,
            sampler=None if isinstance(source, Stream) else PositionSampler(self, first),
            batch_size=None,  # what the sampler yields is one micro-batch
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else it draws from torch's global one, which training draws dropout from
        )
        for number, item in enumerate(loader, start=first + 1):
            if isinstance(item, Exception):
                raise item
            yield item if isinstance(source, Stream) else (item, {"micro_batch": number})


class PositionSampler:
    """Yields, for each micro-batch, the positions in the endless text and the sequences that stand there."""

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
    """Looks up and masks the micro-batch of some positions and rows; runs in the workers."""

    def __init__(self, batches: MicroBatches) -> None:
        self.sequences, self.collate = batches.dataset.select_columns([*COLUMNS]), batches.collate

    def __getitem__(self, chosen: tuple[range, list[int]]) -> Batch:
        positions, rows = chosen
        found = self.sequences[rows]
        columns = zip(positions, found["input_ids"], found["special_tokens_mask"])
        return self.collate([{"position": p, "input_ids": ids, "special_tokens_mask": s} for p, ids, s in columns])


class Stream(TorchIterableDataset):
    """Tokenises, shuffles and masks a stream of text from a state on; runs in the worker if there is one.

    A state names the chunk that holds the next sequence, and where the text stood before that chunk: `epoch`, `chunk`
    (over all epochs), `source` (the state of the text; `None` at its start), `offset` (sequences of the chunk that are
    used up), `sequences` (of this process so far).
    """

    def __init__(self, batches: MicroBatches, state: State | None) -> None:
        self.batches = batches
        self.state = state or dict(zip(STATE, (0, 0, None, 0, 0)))

    def __iter__(self) -> Iterator[tuple[Batch, State] | Exception]:
        sequences = self.sequences()
        try:
            while True:
                group = list(islice(sequences, self.batches.batch_size))
                yield self.batches.collate([sequence for sequence, _ in group]), copy.deepcopy(group[-1][1])
        except (OSError, ValueError) as error:
            yield error  # as it is: raised in a worker, a traceback would be put in front of its message

    def sequences(self) -> Iterator[tuple[dict[str, Any], State]]:
        """Yield each sequence with the state after it."""
        batches, state = self.batches, self.state
        dataset = copy.deepcopy(batches.dataset)
        epoch, chunk, source, offset, number = (state[key] for key in STATE)
        while True:
            dataset.set_epoch(epoch)
            if source is not None:
                dataset.load_state_dict(source)
            documents = iter(dataset)
            while block := self.read_block(documents):
                after = dataset.state_dict()
                found = self.tokenize(block[batches.rank :: batches.num_processes])
                order = np.random.default_rng((batches.seed, chunk, batches.rank)).permutation(len(found))
                while offset < len(order):
                    sequence = {**found[order[offset]], "position": number * batches.num_processes + batches.rank}
                    offset, number = offset + 1, number + 1
                    values = (epoch, chunk, source, offset, number)
                    yield sequence, dict(zip(STATE, values))
                chunk, offset, source = chunk + 1, 0, after
            if number == 0:
                raise ValueError(
                    f"The text has no document with enough tokens for process {batches.rank} of "
                    f"{batches.num_processes}. Use longer documents, one a line, or fewer processes."
                )
            epoch, source = epoch + 1, None

    def read_block(self, documents: Iterator[dict[str, str]]) -> list[str]:
        """Read the next chunk of every process; keep no text of the others."""
        batches = self.batches
        block = islice(documents, batches.documents_per_chunk * batches.num_processes)
        return [row["text"] if i % batches.num_processes == batches.rank else "" for i, row in enumerate(block)]

    def tokenize(self, texts: list[str]) -> list[dict[str, list[int]]]:
        batches = self.batches
        found = tokenize_documents(texts, batches.tokenizer, batches.max_length, batches.cross_documents)
        return [dict(zip(found, values)) for values in zip(*found.values())]
