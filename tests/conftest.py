"""Tiny random models and inputs for every test. Importing this first keeps the tests offline."""

import atexit
import gc
import os
import shutil
import tempfile


# Before transformers is imported: no network, and an empty cache of our own.
os.environ.update(
    HF_HOME=tempfile.mkdtemp(prefix="supershaper-tests-"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import BertConfig, BertTokenizer

from supershaper_hf import (
    SuperShaperConfig,
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
)


def pytest_collection_finish():
    """Let the garbage collector leave alone what all tests share: looking through it took a quarter of their time."""
    gc.collect()
    gc.freeze()


pytest_plugins = ["publishing", "training_runs"]
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
torch.set_num_threads(1)  # faster than 2 on tensors this small, above all where other jobs run

HEADS = [
    SuperShaperModel,
    SuperShaperForMaskedLM,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperForQuestionAnswering,
    SuperShaperForMultipleChoice,
]

BERT_SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 24,
}

# The ways in which a layer can be narrowed: changes of the configuration.
PER_HEAD_BY_WIDTH = {"head_slicing": "per_head", "bottlenecks": "by_width", "full_head_scale": True}
ELASTICITIES = {
    "prefix": {"head_slicing": "prefix"},
    "per_head": {"head_slicing": "per_head"},
    "prefix by_width": {"head_slicing": "prefix", "bottlenecks": "by_width"},
    "per_head by_width": PER_HEAD_BY_WIDTH,
}

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "cat", "dog", "mat", "moon", "sat", "ran", "was", "on", "under", "big", "small", "and", "."]


def tiny_config(**changes) -> SuperShaperConfig:
    return SuperShaperConfig(**{**BERT_SIZES, "width_choices": [8, 20, 36, 48], **changes})


def tiny_bert_config(**changes) -> BertConfig:
    return BertConfig(**{**BERT_SIZES, **changes})


def randomize(model, seed=0):
    """Fill every parameter with random numbers: identity bottlenecks, unit norms and zero biases hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, deviation = (1.0, 0.3) if name.endswith("LayerNorm.weight") else (0.0, 0.15)
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_model(model_class=SuperShaperForMaskedLM, **changes):
    """A supernet of random numbers, in evaluation mode."""
    return randomize(model_class(tiny_config(**changes)))


def tiny_batch(model_class=SuperShaperForMaskedLM, batch=2, length=9, seed=0):
    """Random tokens of two types; the last sequence ends in three tokens of padding."""
    size = (batch, 3, length) if model_class is SuperShaperForMultipleChoice else (batch, length)
    generator = torch.Generator().manual_seed(seed)
    attention_mask = torch.ones(size, dtype=torch.long)
    attention_mask[-1, ..., -3:] = 0
    return {
        "input_ids": torch.randint(1, BERT_SIZES["vocab_size"], size, generator=generator),
        "token_type_ids": torch.randint(0, 2, size, generator=generator),
        "attention_mask": attention_mask,
    }


@torch.no_grad()
def run(model, batch, **kwargs):
    """All outputs of a forward pass without gradients, as one flat list of tensors."""
    tensors = []
    for output in model(**batch, **kwargs).to_tuple():
        tensors += output if isinstance(output, tuple) else [output]
    return tensors


def assert_same(actual, expected, atol=1e-5):
    """Tensors or lists of tensors agree within `atol`."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=HEADS, ids=lambda head: head.__name__.removeprefix("SuperShaper"))
def model_class(request):
    return request.param


@pytest.fixture(params=["prefix", "per_head"])
def head_slicing(request):
    return request.param


@pytest.fixture(params=ELASTICITIES)
def elasticity(request):
    """What a supernet is configured with so that its layers are narrowed in one of four ways."""
    return ELASTICITIES[request.param]


@pytest.fixture
def fresh_accelerator():
    """Let a test choose its precision, which a process can do once, whatever was tested before it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
