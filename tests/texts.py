"""Random text for the tests of every wing, views of masked batches, and a disk that is full."""

import random
import resource
from contextlib import contextmanager

import torch
from conftest import WORDS
from datasets import Dataset

from supershaper_hf.model.modeling_supershaper import IGNORE_INDEX


MAX_LENGTH = 12


def random_documents(n, words=40, seed=0):
    generator = random.Random(seed)
    return Dataset.from_dict({"text": [" ".join(generator.choices(WORDS, k=words)) for _ in range(n)]})


def original_tokens(batch):
    return torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"])


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def examples(sequences, start=0):
    return [{**sequence, "position": start + index} for index, sequence in enumerate(sequences)]


def rows(batch):
    """Each sequence of a batch without padding, as what it was, what it became, and its labels."""
    columns = zip(original_tokens(batch), batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    return [tuple(tuple(row[mask.bool()].tolist()) for row in found) for *found, mask in columns]


@contextmanager
def small_files_only(most=4096):
    """Let the system refuse files of more than `most` bytes, as a full disk does, also in processes that start here.

    What a test prints goes to a file too, and has to be shorter.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
