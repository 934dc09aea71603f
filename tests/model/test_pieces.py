"""Inference on a CPU takes some tokens at a time. Nobody sees that, except by a clock."""

import pytest
import torch
from conftest import assert_same, run, tiny_batch, tiny_model
from torch import nn

from supershaper_hf.model import elastic


SHAPE = [8, 36, 20]
BATCH, LENGTH = 3, 9


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(elastic, "TOKENS_AT_A_TIME", 7)  # 27 tokens: 7, 7, 7 and 6
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


class Recorder(nn.Module):
    """An activation that notes the sizes of what it sees. It is no hook, which would keep the tokens together."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, states):
        self.sizes.append(tuple(states.shape))
        return nn.functional.gelu(states)


def record(model, layer=1):
    recorder = Recorder().train(model.training)
    model.bert.encoder.layer[layer].intermediate.activation = recorder
    return recorder.sizes


def batch():
    return tiny_batch(batch=BATCH, length=LENGTH)


PIECES, WHOLE = [(7, 80), (7, 80), (7, 80), (6, 80)], [(BATCH, LENGTH, 80)]


def test_inference_takes_some_tokens_at_a_time_and_gives_what_all_at_once_give(elasticity):
    supernet = tiny_model(**elasticity)
    subnet = supernet.extract_subnet(SHAPE)
    for model, shape in [(subnet, None), (supernet, SHAPE), (supernet, None)]:
        sizes = record(model)
        with torch.no_grad():
            in_pieces = model(**batch(), shape=shape, output_hidden_states=True)
        with torch.enable_grad():
            whole = model(**batch(), shape=shape, output_hidden_states=True)
        coded = shape is not None and "bottlenecks" in elasticity
        assert sizes == (WHOLE if coded else PIECES) + WHOLE
        assert_same(in_pieces, whole, atol=1e-6)


def test_few_tokens_are_taken_at_once():
    model = tiny_model()
    sizes = record(model)
    run(model, tiny_batch(batch=1, length=7))
    assert sizes == [(1, 7, 80)]


def test_more_threads_take_more_tokens(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = tiny_model()
    sizes = record(model)
    run(model, batch())
    assert sizes == [(14, 80), (13, 80)]


def test_training_takes_all_tokens_at_once_even_where_no_gradient_is_kept():
    model = tiny_model().train()  # as in the first pass of a gradient checkpoint, whose dropout is drawn again
    sizes = record(model)
    with torch.no_grad():
        model(**batch())
    assert sizes == WHOLE


@pytest.mark.parametrize("name", ["intermediate", "intermediate.dense", "output", "output.LayerNorm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_sees_all_tokens_in_one_call(name, kind):
    model, seen = tiny_model(), []
    getattr(model.bert.encoder.layer[1].get_submodule(name), kind)(lambda module, inputs, *_: seen.append(inputs[0]))
    run(model, batch())
    assert [tuple(states.shape[:2]) for states in seen] == [(BATCH, LENGTH)]


@pytest.mark.parametrize("name", ["layer.1.attention.self.key", "input_bottleneck.0", "layer.1.attention.output.dense"])
def test_a_hook_on_a_linear_map_sees_all_tokens_in_one_call(name):
    model, seen = tiny_model(), []
    map = model.bert.encoder.get_submodule(name)
    map.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    run(model, batch())
    assert [tuple(states.shape[:2]) for states in seen] == [(BATCH, LENGTH)]


def test_a_method_that_was_replaced_sees_all_tokens_in_one_call():
    model, seen = tiny_model(), []
    dense = model.bert.encoder.layer[1].intermediate.dense
    forward = dense.forward
    dense.forward = lambda states: seen.append(states.shape[:2]) or forward(states)
    run(model, batch())
    assert seen == [(BATCH, LENGTH)]


def test_an_exported_program_holds_no_pieces():
    subnet = tiny_model().extract_subnet(SHAPE)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2, max=24)}
    ids = batch()["input_ids"]
    with torch.no_grad():
        program = torch.export.export(subnet, (ids,), dynamic_shapes={"input_ids": sizes}, strict=False)
        longer = tiny_batch(batch=4, length=13)["input_ids"]
        assert_same(program.module()(longer)["logits"], subnet(longer).logits)
    assert not [node for node in program.graph.nodes if "chunk" in str(node.target) or "cat." in str(node.target)]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_traced_program_holds_no_pieces():
    layer = nn.Linear(48, 20).requires_grad_(False)
    with torch.no_grad():
        program = torch.jit.trace(lambda states: elastic.in_pieces(layer, states), torch.randn(BATCH, LENGTH, 48))
    assert "linear" in str(program.graph)
    assert "chunk" not in str(program.graph)
