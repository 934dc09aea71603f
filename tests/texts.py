"""Random text for the tests of every wing, and the tokens that masking hid."""

import random

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
