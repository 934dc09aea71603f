"""Random text for the tests of every wing, the tokens that masking hid, and a disk that is full."""

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


@contextmanager
def small_files_only(most=100):
    """Let the system refuse files of more than `most` bytes, as a full disk does; processes that start inherit it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
