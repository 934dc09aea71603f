"""How far an exported file is from the PyTorch model that it was made of: seeded inputs, differences and cosines."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..model.configuration_supershaper import SuperShaperConfig
from ..model.modeling_supershaper import SuperShaperForMultipleChoice, SuperShaperPreTrainedModel


INPUTS = ("input_ids", "attention_mask", "token_type_ids")
BATCHES = (1, 3, 8)
LENGTHS = (1, 7, 128)  # and the longest that the model can read
SCORES_OF_TOKENS = ("start_logits", "end_logits")
CHOICES = 2  # in the inputs for multiple choice
Arrays = dict[str, np.ndarray]  # inputs or outputs of a model, by name
Run = Callable[[Arrays], Arrays]


def input_axes(model: SuperShaperPreTrainedModel) -> list[str]:
    """Return the names of the axes of every input of `model`."""
    choices = ["num_choices"] if isinstance(model, SuperShaperForMultipleChoice) else []
    return ["batch_size", *choices, "sequence_length"]


def random_inputs(config: SuperShaperConfig, size: tuple[int, ...], seed: int) -> Arrays:
    """Return random tokens of all types, (batch, length) or (batch, choices, length), padded to different lengths.

    The first sequence has no padding, and every sequence has at least one token.
    """
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, size[-1], size=(*size[:-1], 1), endpoint=True)
    lengths[0] = size[-1]
    return {
        "input_ids": generator.integers(0, config.vocab_size, size=size),
        "attention_mask": (np.arange(size[-1]) < lengths).astype(np.int64),
        "token_type_ids": generator.integers(0, config.type_vocab_size, size=size),
    }


def many_inputs(model: SuperShaperPreTrainedModel) -> Iterator[Arrays]:
    """Yield random inputs of every batch size and length that an exported file has to be right for."""
    longest = model.config.max_position_embeddings
    lengths = sorted({min(length, longest) for length in (*LENGTHS, longest)})
    choices = [CHOICES] if "num_choices" in input_axes(model) else []
    for seed, (batch, length) in enumerate(itertools.product(BATCHES, lengths)):
        yield random_inputs(model.config, (batch, *choices, length), seed)


@torch.no_grad()
def run_model(model: SuperShaperPreTrainedModel, inputs: Arrays) -> Arrays:
    """Return the outputs of the PyTorch model by name."""
    outputs = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def largest_difference(expected: Arrays, found: Arrays) -> tuple[float, float]:
    """Return the largest absolute difference of any output, and the largest absolute value that was expected.

    Raises:
        ValueError: If the outputs have other names or shapes.
    """
    shapes = [{name: array.shape for name, array in arrays.items()} for arrays in (expected, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The exported file returns {shapes[1]}, but PyTorch returns {shapes[0]}.")
    difference = max(float(np.abs(array - found[name]).max()) for name, array in expected.items())
    return difference, max(float(np.abs(array).max()) for array in expected.values())


def real_tokens(outputs: Arrays, mask: np.ndarray) -> Arrays:
    """Return the outputs without padding, as rows: a row for each token, or one for all scores.

    Vectors of tokens, (batch, length, width), become (tokens, width). The scores of tokens in question answering, and
    outputs of whole sequences, become (1, scores).
    """
    kept = {
        name: array[mask > 0] if array.ndim > mask.ndim or name in SCORES_OF_TOKENS else array
        for name, array in outputs.items()
    }
    return {name: array if outputs[name].ndim > mask.ndim else array.reshape(1, -1) for name, array in kept.items()}


def cosine(expected: Arrays, found: Arrays) -> float:
    """Return the mean cosine between the rows of two results of `real_tokens`. Of several outputs, the worst counts."""

    def agreement(first: np.ndarray, second: np.ndarray) -> float:
        norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
        return float(((first * second).sum(-1) / np.maximum(norms, np.finfo(np.float32).tiny)).mean())

    return min(agreement(array, found[name]) for name, array in expected.items())
