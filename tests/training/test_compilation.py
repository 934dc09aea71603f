import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import assert_same, randomize, run, tiny_batch, tiny_bert_config, tiny_model
from torch._dynamo.testing import CompileCounter
from transformers import BertModel

from supershaper_hf import SuperPretrainingArguments, SuperShaperModel
from supershaper_hf.training import compilation
from supershaper_hf.training.compilation import STEPS_THAT_PAY, compile_layers, release_layers
from supershaper_hf.training.distillation import Objective
from supershaper_hf.training.preparing import start_training_mode
from supershaper_hf.training.sandwich import sandwich_step
from supershaper_hf.training.teacher import OutsideTeacher


# Dynamo looks whether activations have a gradient. It keeps torch from showing this warning, but not from raising it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

WIDTHS = [24, 48]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture
def graphs(monkeypatch):
    """Count the graphs instead of turning them into machine code. They run in Python."""
    counter = CompileCounter()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, *args, **kwargs: compile_module(module, *args, **kwargs, backend=counter),
    )
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return counter


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(compilation.logger, "warning", messages.append)
    return messages


def model_of(widths=WIDTHS, layers=3):
    return tiny_model(width_choices=widths, num_hidden_layers=layers, **NO_DROPOUT).train()


def compiled_model(widths=WIDTHS, layers=3):
    model = model_of(widths, layers)
    compile_layers(model, len(widths), 1000, torch.device("cpu"))
    return model


def batch_of():
    batch = tiny_batch()
    del batch["token_type_ids"]
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def train(model, shapes, steps=3):
    """Return the losses of some steps of plain gradient descent."""
    accelerator, optimizer, losses = Accelerator(), torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(steps):
        losses.append(sandwich_step(accelerator, model, [batch_of()], shapes, Objective(0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


SHAPES = [[48, 48, 48], [24, 24, 24], [24, 48, 24], [48, 0, 24]]


def test_compiled_layers_train_the_same(graphs):
    plain, compiled = model_of(), compiled_model()
    assert_same(train(compiled, SHAPES), train(plain, SHAPES))
    assert_same(compiled.state_dict(), plain.state_dict())
    assert graphs.frame_count > 0


@pytest.mark.parametrize("bottlenecks", ["shared", "by_width"])
def test_compiled_layers_learn_the_same_from_the_original(graphs, bottlenecks):
    """Without dropout, and with one graph for each width, also where layers have weights by width."""
    teacher = OutsideTeacher(randomize(BertModel(tiny_bert_config()), seed=1))
    objective = Objective(teacher=teacher, state_weight=1.0, pooled_weight=1.0, labels=False)
    batch = batch_of()
    batch["labels"].fill_(-100)
    found = []
    for compiled in (False, True):
        model = tiny_model(SuperShaperModel, bottlenecks=bottlenecks, width_choices=WIDTHS)
        start_training_mode(model, SuperPretrainingArguments(no_dropout=True))
        if compiled:
            compile_layers(model, len(WIDTHS), 1000, torch.device("cpu"))
        losses = sandwich_step(Accelerator(), model, [batch], SHAPES, objective)
        found.append([losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}])
    assert_same(*found)
    assert graphs.frame_count == len(WIDTHS)


def test_every_width_has_a_graph_and_no_shape_or_layer_has_one_of_its_own(graphs):
    model = compiled_model()
    train(model, SHAPES[:1], steps=2)
    assert graphs.frame_count == 1
    train(model, SHAPES[:2], steps=2)
    assert graphs.frame_count == 2
    train(model, [[a, b, c] for a in WIDTHS for b in (0, *WIDTHS) for c in WIDTHS], steps=1)
    assert graphs.frame_count == 2


def test_graphs_are_as_many_as_widths_where_torch_would_give_up(graphs):
    """By default it stops compiling after 8 of them."""
    widths = [4 * n for n in range(3, 13)]
    model = compiled_model(widths, layers=1)
    train(model, [[width] for width in reversed(widths)], steps=1)
    assert graphs.frame_count == 10


def test_evaluation_has_at_most_one_more_graph_for_each_width(graphs):
    model, plain = compiled_model(), model_of().eval()
    for shape in SHAPES:
        model.train()(**batch_of(), shape=shape).loss.backward()
        assert_same(run(model.eval(), batch_of(), shape=shape), run(plain, batch_of(), shape=shape))
    assert graphs.frame_count <= 2 * len(WIDTHS)


def test_only_the_layers_are_compiled(graphs):
    model = compiled_model()
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == [f"bert.encoder.layer.{index}" for index in range(3)]


def test_released_layers_are_not_compiled(graphs):
    model = compiled_model()
    release_layers(model)
    assert_same(train(model, SHAPES), train(model_of(), SHAPES), atol=0)
    assert graphs.frame_count == 0
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_releasing_layers_that_are_not_compiled_does_nothing():
    model = tiny_model()
    before = run(model, tiny_batch())
    release_layers(model)
    assert_same(run(model, tiny_batch()), before, atol=0)


def test_subnet_can_be_compiled(graphs):
    supernet = tiny_model(**NO_DROPOUT)
    plain, compiled = (supernet.extract_subnet([8, 0, 36]).train() for _ in range(2))
    compile_layers(compiled, 1, 1000, torch.device("cpu"))
    assert_same(train(compiled, [None]), train(plain, [None]))
    assert graphs.frame_count == 2


def test_few_steps_are_warned_of(graphs, warnings):
    compile_layers(model_of(), 2, STEPS_THAT_PAY - 1, torch.device("cpu"))
    few = STEPS_THAT_PAY - 1
    assert warnings == [
        f"torch_compile=True will take longer than it saves: {few} steps are too few to compile 2 widths."
    ]


def test_enough_steps_are_not_warned_of(graphs, warnings):
    compile_layers(model_of(), 2, STEPS_THAT_PAY, torch.device("cpu"))
    assert warnings == []


def test_missing_compiler_is_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = tiny_model()
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler on the CPU, and there is none. Install g\+\+, or"):
        compile_layers(model, 4, 1000, torch.device("cpu"))
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_gpu_needs_no_compiler_for_the_cpu(graphs, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    compile_layers(model_of(), 2, 1000, torch.device("cuda"))


@pytest.mark.parametrize("found", ["g++", "clang++"])
def test_either_compiler_will_do(graphs, monkeypatch, found):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == found else None)
    compile_layers(model_of(), 2, 1000, torch.device("cpu"))


def test_limit_of_graphs_is_raised_and_never_lowered(graphs):
    torch._dynamo.config.recompile_limit = 30
    compile_layers(model_of(), 4, 1000, torch.device("cpu"))
    assert torch._dynamo.config.recompile_limit == 30
    compile_layers(model_of(), 10, 1000, torch.device("cpu"))
    assert torch._dynamo.config.recompile_limit == 40
