"""A polished subnet: it is nearer to the original or unchanged, and each map is what a ridge regression gives."""

import re

import numpy as np
import pytest
import torch
from conftest import assert_same, randomize, run, tiny_batch, tiny_bert_config, tiny_model
from torch import nn
from transformers import BertModel

from supershaper_hf import SuperShaperModel, evaluate_shapes, polish
from supershaper_hf.convert import polishing
from supershaper_hf.convert.polishing import STRENGTHS, Tokens, refit


SHAPES = [[20, 36, 8], [36, 0, 20], [8, 20, 0], [36, 36, 36]]


def texts(n=5, batch=12, length=16, first_seed=10):
    """Batches of random tokens with padding."""
    return [tiny_batch(batch=batch, length=length, seed=first_seed + seed) for seed in range(n)]


@pytest.fixture(scope="module")
def bert():
    return randomize(BertModel(tiny_bert_config()))


@pytest.fixture(scope="module")
def supernet(bert):
    """A supernet that is calibrated, as one that a user has."""
    return SuperShaperModel.from_bert(
        bert, width_choices=[8, 20, 36, 48], bottlenecks="by_width", calibration=texts(first_seed=50)
    )


def held_out(batches):
    """The sequences that `polish` holds out of batches of 12: every sixth."""
    return [{name: values[5::6] for name, values in batch.items()} for batch in batches]


def distance(model, batches, original):
    (record,) = evaluate_shapes(model, batches, [None], measure="distance", original=original)
    return record["distance"]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# What it gives


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subnet_is_nearer_to_the_original(supernet, bert, shape):
    """On text that it has not seen, and on the text held out by as much as it says."""
    subnet, plain = supernet.extract_subnet(shape), supernet.extract_subnet(shape)
    before, after = polish(subnet, supernet, shape, texts())
    assert before == pytest.approx(distance(plain, held_out(texts()), bert), rel=1e-4)
    assert after == pytest.approx(distance(subnet, held_out(texts()), bert), rel=1e-4)
    assert after < before
    unseen = texts(2, first_seed=90)
    assert distance(subnet, unseen, bert) < distance(plain, unseen, bert)


def test_subnets_of_every_kind_of_supernet_get_nearer(model_class, elasticity):
    """Also with any head, which stays as it was."""
    supernet, shape = tiny_model(model_class, **elasticity), [20, 36, 0]
    subnet = supernet.extract_subnet(shape)
    plain = weights(subnet)
    before, after = polish(subnet, supernet, shape, texts())
    assert after < before
    changed = {name for name, tensor in subnet.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed
    assert all(".encoder." in f".{name}" for name in changed)


@pytest.mark.parametrize("shape", [[48, 48, 48]], ids=str)
def test_largest_shape_stays_to_the_last_bit(elasticity, shape):
    supernet = tiny_model(SuperShaperModel, **elasticity)
    subnet = supernet.extract_subnet(shape)
    plain = weights(subnet)
    before, after = polish(subnet, supernet, shape, texts())
    assert before == after < 1e-9
    assert_same(subnet.state_dict(), plain, atol=0)


def test_subnet_that_would_get_worse_stays_to_the_last_bit(supernet, monkeypatch):
    """Each map is nearer to its target, but not the whole."""

    def spoil(module, inputs, targets, tokens):
        module.weight.add_(1.0)
        return [module(state) for state in inputs]

    monkeypatch.setattr(polishing, "refit", spoil)
    subnet = supernet.extract_subnet([20, 36, 8])
    plain = weights(subnet)
    before, after = polish(subnet, supernet, [20, 36, 8], texts())
    assert after == before
    assert_same(subnet.state_dict(), plain, atol=0)


def test_another_original_can_be_the_target(supernet):
    """As after training, when the largest shape is not the original any more."""
    other = randomize(BertModel(tiny_bert_config()), seed=1)
    subnet, plain = supernet.extract_subnet([36, 36, 36]), supernet.extract_subnet([36, 36, 36])
    before, after = polish(subnet, supernet, [36, 36, 36], texts(), original=other)
    assert before == pytest.approx(distance(plain, held_out(texts()), other), rel=1e-4)
    assert after == pytest.approx(distance(subnet, held_out(texts()), other), rel=1e-4)
    assert after < 0.9 * before


def test_extract_subnet_polishes():
    supernet, shape = tiny_model(), [20, 0, 36]
    expected = supernet.extract_subnet(shape)
    polish(expected, supernet, shape, texts())
    subnet = supernet.extract_subnet(shape, calibration=texts())
    assert_same(subnet.state_dict(), expected.state_dict(), atol=0)
    assert not torch.equal(run(subnet, tiny_batch())[0], run(supernet.extract_subnet(shape), tiny_batch())[0])


@torch.no_grad()
def test_targets_are_codes_of_the_originals_states_and_its_last_state(supernet, bert, monkeypatch):
    """The code that layer 2 gets is that of the state after layer 1, which this shape drops."""
    seen = []

    def record(module, inputs, targets, tokens):
        seen.append(targets)
        return [module(state) for state in inputs]

    monkeypatch.setattr(polishing, "refit", record)
    polish(supernet.extract_subnet([20, 0, 36]), supernet, [20, 0, 36], texts())
    parts = [batch for part in polishing.divide(texts()) for batch in part]  # the text held out comes first
    states = list(zip(*(bert(**batch, output_hidden_states=True).hidden_states for batch in parts)))
    for found, layer, width in ((seen[0], 0, 20), (seen[1], 2, 36)):
        assert_same(found, [supernet.encoder._enter(state, None, layer, width) for state in states[layer]], atol=1e-4)
    assert_same(seen[2], list(states[3]), atol=1e-4)


# What it depends on, and what it leaves alone


def test_padding_does_not_count(supernet):
    """Tokens that are not there may be anything, and as many as they like."""
    padded = []
    for batch in texts():
        more = {name: torch.cat([values, values[:, :3]], dim=1) for name, values in batch.items()}
        more["attention_mask"][:, -3:] = 0
        more["input_ids"] = more["input_ids"].masked_fill(more["attention_mask"] == 0, 7)
        padded.append(more)
    first, second = (supernet.extract_subnet([20, 36, 8], calibration=text) for text in (texts(), padded))
    assert_same(first.state_dict(), second.state_dict(), atol=1e-3)  # biases add up many roundings


def test_supernet_original_and_modes_are_left_as_they_were():
    supernet, bert = tiny_model(hidden_dropout_prob=0.5).train(), randomize(BertModel(tiny_bert_config())).train()
    subnet = supernet.extract_subnet([20, 36, 8]).train()
    models = supernet, bert
    before, own = [weights(model) for model in models], list(subnet.parameters())
    polish(subnet, supernet, [20, 36, 8], texts(), original=bert)
    assert_same([model.state_dict() for model in models], before, atol=0)
    assert all(model.training and model.base_model.encoder.training for model in (*models, subnet))
    assert all(new is old and old.grad is None for new, old in zip(subnet.parameters(), own, strict=True))


def test_half_precision_is_polished_in_single_and_rounded():
    supernet = tiny_model(SuperShaperModel).bfloat16()
    subnet = supernet.extract_subnet([20, 36, 8])
    before, after = polish(subnet, supernet, [20, 36, 8], texts())
    assert {parameter.dtype for model in (supernet, subnet) for parameter in model.parameters()} == {torch.bfloat16}
    assert after < before
    supernet, subnet = supernet.float(), subnet.float()
    assert distance(subnet, held_out(texts()), supernet) == pytest.approx(after, rel=0.05)


# One map


def test_map_is_the_ridge_regression_that_is_best_on_the_text_held_out():
    """Computed again in NumPy, for every strength; the first of three batches is held out."""
    generator = torch.Generator().manual_seed(0)
    inputs = [1 + torch.randn(4, 6, 8, generator=generator) for _ in range(3)]
    truth = torch.randn(8, 5, generator=generator)
    targets = [state @ truth + 2 * torch.randn(4, 6, 5, generator=generator) - 3 for state in inputs]
    real = [torch.rand(4, 6, generator=generator) > 0.3 for _ in inputs]
    module = nn.Linear(8, 5)
    with torch.no_grad():
        module.weight.copy_(truth.T + torch.randn(5, 8, generator=generator))
        start, (x, y) = module.weight.double().numpy().copy(), ([], [])
        for states, kept in ((inputs, x), (targets, y)):
            kept += [state[mask].double().numpy() for state, mask in zip(states, real)]
        outputs = refit(module, inputs, targets, Tokens(real, held_out=1))
    fitted_x, fitted_y = np.concatenate(x[1:]), np.concatenate(y[1:])
    mean_x, mean_y = fitted_x.mean(0), fitted_y.mean(0)
    covariance = (fitted_x - mean_x).T @ (fitted_x - mean_x) / len(fitted_x)
    cross = (fitted_y - mean_y).T @ (fitted_x - mean_x) / len(fitted_x)
    found = []
    for strength in STRENGTHS:
        penalty = strength * np.trace(covariance) / 8 * np.eye(8)
        weight = (cross + start @ penalty) @ np.linalg.inv(covariance + penalty)
        bias = mean_y - weight @ mean_x
        found.append((np.square(x[0] @ weight.T + bias - y[0]).sum(), weight, bias))
    _, weight, bias = min(found, key=lambda each: each[0])
    assert STRENGTHS[0] < STRENGTHS[int(np.argmin([error for error, *_ in found]))] < STRENGTHS[-1]
    np.testing.assert_allclose(module.weight.detach().numpy(), weight, atol=1e-5)
    np.testing.assert_allclose(module.bias.detach().numpy(), bias, atol=1e-5)
    assert_same(outputs, [module(state) for state in inputs], atol=0)


def test_map_that_is_best_already_stays():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 8, generator=generator) for _ in range(2)]
    module = nn.Linear(8, 5)
    before = weights(module)
    with torch.no_grad():
        # The batch that is held out says what the map gives already; the other says something else.
        targets = [module(inputs[0]), module(inputs[1]) + torch.randn(2, 3, 5, generator=generator)]
        refit(module, inputs, targets, Tokens([torch.ones(2, 3, dtype=torch.bool)] * 2, held_out=1))
    assert_same(module.state_dict(), before, atol=0)


# Errors


def test_other_models_and_too_little_text_are_refused(supernet):
    subnet = supernet.extract_subnet([20, 36, 8])
    message = "has hidden_sizes=[20, 36, 8], but a subnet of shape=[20, 0, 8] has [20, 8]"
    with pytest.raises(ValueError, match=re.escape(message)):
        polish(subnet, supernet, [20, 0, 8], texts())
    with pytest.raises(ValueError, match=re.escape("hidden_sizes=[48, 48, 48], but a subnet of shape=[48, 48, 48]")):
        polish(supernet, supernet, [48, 48, 48], texts())
    five = [{name: values[:5] for name, values in texts()[0].items()}]
    with pytest.raises(ValueError, match="There are 5 sequences to polish on, of which one in 6 is held out"):
        polish(subnet, supernet, [20, 36, 8], five)
    with pytest.raises(ValueError, match="There are 0 sequences"):
        polish(subnet, supernet, [20, 36, 8], [])


def test_subnet_stays_if_there_is_an_error(supernet):
    broken = tiny_model(SuperShaperModel)
    with torch.no_grad():
        broken.encoder.layer[2].output.LayerNorm.bias[0] = torch.nan
    subnet = supernet.extract_subnet([20, 36, 8])
    plain = weights(subnet)
    with pytest.raises(ValueError, match="The output of layer 3 is not finite"):
        polish(subnet, broken, [20, 36, 8], texts())
    assert_same(subnet.state_dict(), plain, atol=0)
