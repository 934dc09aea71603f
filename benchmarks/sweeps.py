"""Time several models in several formats, interleaved: what `inference.py` and the study's latency share.

Each sweep runs every model once in every format, in random order, so that a slow moment of the machine does not always
meet the same one.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel


WARMUP = 1  # sweeps
PAUSE = 0.1  # seconds before a run: the threads of the library that ran last look for more work for up to so long

Batch = Mapping[str, np.ndarray]
Key = tuple[str, str]  # model and format


class Contender(NamedTuple):
    """A model in one format: the bytes of its weights or of its file, and a function that runs it on a batch."""

    size: int
    run: Callable[[Batch], Any]


@torch.inference_mode()
def run_pytorch(model: PreTrainedModel, batch: Batch) -> Any:
    return model(**{name: torch.from_numpy(array) for name, array in batch.items()})


def make_batch(batch_size: int, length: int, vocab_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return sequences of random tokens, none of them padding."""
    ids = np.random.default_rng(seed).integers(5, vocab_size, size=(batch_size, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def time_contenders(
    contenders: Mapping[Key, Contender], batch: Batch, repeats: int, seed: int
) -> dict[Key, list[float]]:
    """Return the seconds of every contender in each of `repeats` sweeps."""
    random, keys = np.random.default_rng(seed), list(contenders)
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    for sweep in range(WARMUP + repeats):
        for index in random.permutation(len(keys)):
            time.sleep(PAUSE)
            start = time.perf_counter()
            contenders[keys[index]].run(batch)
            if sweep >= WARMUP:
                seconds[keys[index]].append(round(time.perf_counter() - start, 6))
    return seconds
