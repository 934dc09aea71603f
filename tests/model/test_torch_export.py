"""`torch.export` takes every head: the program runs on inputs of any size and equals the model."""

import torch
from conftest import assert_same, run, tiny_batch, tiny_model
from torch.export import Dim

from supershaper_hf import SuperShaperForMultipleChoice, SuperShaperModel


def assert_exports(model):
    """The exported program of `model` takes batches and lengths that differ from those of the example."""
    model_class = type(model)
    choices = [Dim("choices")] * (model_class is SuperShaperForMultipleChoice)
    sizes = dict(enumerate([Dim("batch"), *choices, Dim("length", max=24)]))
    example = tiny_batch(model_class)
    program = torch.export.export(model, (), example, dynamic_shapes=dict.fromkeys(example, sizes))
    for batch, length in [(1, 4), (3, 7), (8, 24)]:
        inputs = tiny_batch(model_class, batch, length)
        assert_same(list(program.module()(**inputs).values()), run(model, inputs))


def test_exported_subnet_equals_it_at_every_size(model_class):
    assert_exports(tiny_model(model_class).extract_subnet([8, 0, 36]))


def test_exported_supernet_equals_it_at_every_size():
    """It merges bottlenecks if there are more than 48 tokens, which a program for all sizes cannot."""
    assert_exports(tiny_model(SuperShaperModel, num_hidden_layers=2))
