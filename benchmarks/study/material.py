"""What the runs of the study are made of and measured with: the original, the text, and what is measured of a shape.

Every shape is measured by up to four figures on text that nothing was trained on:

- distance: of its last hidden states from those of the original; 0 for the original, 1 for the same guess for every
  token. Lower is better.
- cosine: of its embeddings with those of the original. Higher is better.
- loss: of masked tokens, in nats. All supernets are made of the original with a masked-LM head. Where labels teach, the
  head learns with the supernet. Elsewhere it stays that of the original, and reads the states of the shape.
- STS: Spearman's correlation of the cosines of sentences with human judgement, see `sentence_similarity.py`.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoTokenizer, BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from supershaper_hf import SearchSpace, evaluate_shapes, fixed_masks, load_text, read_pooling, tokenize
from supershaper_hf.model.modeling_supershaper import SuperShaperPreTrainedModel
from supershaper_hf.processes import start_accelerator

from ..sentence_similarity import load_pairs, read_shape, similarity_score
from .study import held_out_text, task_file, training_text


DIGITS = 5  # of figures in the results
SHAPES_SEED = 2021

Shape = list[int]
Figures = dict[str, list[float]]  # figure -> its values, in the order of the shapes of a group


class Material(NamedTuple):
    """What all runs are made of and measured with."""

    folder: Path  # of the original with its masked-LM head
    accelerator: Accelerator  # its device and precision, for training and measuring
    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sequences: Dataset  # to train on
    clean: list[dict[str, torch.Tensor]]  # held-out text, for distance and cosine
    masked: list[dict[str, torch.Tensor]]  # held-out text, for the loss
    pairs: list[tuple[str, str]]
    labels: np.ndarray
    pooling: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the runs depend on, with the values of the study."""
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens that each run trains on")
    parser.add_argument("--calibration_tokens", type=int, default=20_000, help="tokens that a start is calibrated on")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sequence")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences in a step")
    parser.add_argument(
        "--mixed_precision", default="bf16", choices=("no", "bf16"), help="precision in training and measuring"
    )
    parser.add_argument(
        "--width_choices", type=int, nargs="+", default=[96, 144, 240, 288, 336, 384], help="widths of a layer"
    )
    parser.add_argument("--clean_tokens", type=int, default=1000, help="held-out tokens for distance and cosine")
    parser.add_argument("--masked_tokens", type=int, default=2000, help="held-out tokens for the masked-LM loss")
    parser.add_argument("--num_random", type=int, default=20, help="random shapes that are measured")
    parser.add_argument("--num_sts", type=int, default=6, help="random shapes that have STS")
    parser.add_argument("--num_pairs", type=int, default=250, help="pairs of sentences for STS")
    parser.add_argument(
        "--chosen",
        nargs="+",
        default=["240", "240,144,96,240,288,384", "144,144,96,144,144,144"],
        help="shapes that are trained alone, too: a width for all layers, or one for each with commas between them",
    )
    parser.add_argument("--head_steps", type=int, default=1000, help="training steps of the masked-LM head")


def take(sequences: Dataset, tokens: int) -> Dataset:
    """Return sequences from anywhere with `tokens` tokens in all, or a few more. It is always the same choice."""
    shuffled = sequences.shuffle(seed=0)
    counts = np.cumsum([len(ids) for ids in shuffled["input_ids"]])
    return shuffled.select(range(min(len(counts), int(np.searchsorted(counts, tokens)) + 1)))


def load_material(args: argparse.Namespace, folder: Path) -> Material:
    """Load the original with its masked-LM head from `folder`, the text and the pairs."""
    accelerator = start_accelerator(mixed_precision=args.mixed_precision)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = tokenize(load_text([held_out_text(args.data)]), tokenizer, args.max_length)
    pairs, labels = load_pairs(task_file(args.data, "stsb", "validation"))
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), args.num_pairs)).astype(int))  # of all genres
    return Material(
        folder,
        accelerator,
        BertForMaskedLM.from_pretrained(folder).eval().to(accelerator.device),
        tokenizer,
        tokenize(load_text(training_text(args.data)), tokenizer, args.max_length),
        fixed_masks(take(held_out, args.clean_tokens), tokenizer, args.batch_size, mlm_probability=0),
        fixed_masks(take(held_out, args.masked_tokens), tokenizer, args.batch_size),
        [pairs[index] for index in chosen],
        labels[chosen],
        read_pooling(args.bert) or "mean",
    )


def mean_length(sequences: Dataset) -> float:
    """Return the mean number of tokens of a sequence, estimated from 1,000 of them."""
    chosen = np.linspace(0, len(sequences) - 1, min(len(sequences), 1000)).astype(int)
    return statistics.fmean(map(len, sequences.select(chosen)["input_ids"]))


def measured_shapes(args: argparse.Namespace, config: Any) -> dict[str, list[Shape]]:
    """Return the shapes that are measured, by group: all rectangles, widest first, random ones, and the chosen ones."""
    space = SearchSpace.from_config(config)
    return {
        "rectangles": [[width] * space.num_layers for width in reversed(space.width_choices)],
        "random": space.sample(args.num_random, seed=SHAPES_SEED).tolist(),
        "chosen": [read_shape(text, config) for text in args.chosen],
    }


def measure(
    model: SuperShaperPreTrainedModel,
    material: Material,
    groups: Mapping[str, Sequence[Shape | None]],
    with_sts: Mapping[str, int],
) -> dict[str, Figures]:
    """Return the figures of the shapes of each group.

    Args:
        model: A supernet with a masked-LM head, or a subnet, whose only shape is `None`.
        material: What is measured on.
        groups: The shapes, by group.
        with_sts: How many shapes of a group have STS. Groups that are not named have none.
    """
    model.to(material.accelerator.device)
    shapes = [shape for group in groups.values() for shape in group]
    options: dict[str, Any] = {"accelerator": material.accelerator, "measure": "distance"}
    distances = iter(evaluate_shapes(model, material.clean, shapes, original=material.original, **options))
    losses = iter(evaluate_shapes(model, material.masked, shapes, **options | {"measure": "loss"}))
    encoder: Any = model.base_model
    given = (material.tokenizer, material.pairs, material.labels, material.pooling)

    def score(shape: Shape | None) -> float:
        with material.accelerator.autocast():
            return round(similarity_score(encoder, *given, shape=shape), DIGITS)

    found = {}
    for name, group in groups.items():
        records = [{**next(distances), **next(losses)} for _ in group]
        figures = {key: [round(record[key], DIGITS) for record in records] for key in ("distance", "cosine", "loss")}
        scored = group[: with_sts.get(name, 0)]
        figures["sts"] = [score(shape) for shape in scored]
        found[name] = figures
    return found
