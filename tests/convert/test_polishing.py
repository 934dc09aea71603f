"""A polished subnet: it is nearer to the original or unchanged, and each map is what a ridge regression gives."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import (
    PER_HEAD_BY_WIDTH,
    assert_same,
    randomize,
    run,
    tiny_batch,
    tiny_bert_config,
    tiny_config,
    tiny_model,
)
from transformers import BertModel

from supershaper_hf import SuperShaperForMaskedLM, SuperShaperModel, calibrate, evaluate_shapes, polish
from supershaper_hf.convert import polishing
from supershaper_hf.convert.calibration import RIDGE


SHAPES = [[20, 36, 8], [36, 0, 20], [8, 20, 0]]


def texts(n=5, batch=12, length=16, first_seed=10):
    """Batches of random tokens with padding."""
    return [tiny_batch(batch=batch, length=length, seed=first_seed + seed) for seed in range(n)]


def supernet_of(bert, **changes):
    """A supernet of a BERT, calibrated as one that a user has."""
    choices = {"width_choices": [8, 20, 36, 48], "head_slicing": "per_head", "bottlenecks": "by_width"} | changes
    return SuperShaperModel.from_bert(bert, calibration=texts(first_seed=50), **choices)


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return randomize(BertModel(tiny_bert_config()))


@pytest.fixture(scope="module")
def supernet(bert):
    return supernet_of(bert)


def held_out(batches):
    """The sequences that `polish` holds out of batches of 12: every sixth."""
    return [{name: values[5::6] for name, values in batch.items()} for batch in batches]


def distance(model, batches, original):
    record = evaluate_shapes(model, batches, [None], measure="distance", original=original)[0]
    return record["distance"]


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subnet_is_nearer_to_the_original(supernet, bert, shape):
    """On text that it has not seen, and on the held-out text by as much as it says."""
    subnet, plain = supernet.extract_subnet(shape), supernet.extract_subnet(shape)
    before, after = polish(subnet, supernet, shape, texts())
    assert after < before
    assert before == pytest.approx(distance(plain, held_out(texts()), bert), rel=1e-4)
    assert after == pytest.approx(distance(subnet, held_out(texts()), bert), rel=1e-4)
    unseen = texts(2, first_seed=90)
    assert distance(subnet, unseen, bert) < distance(plain, unseen, bert)
