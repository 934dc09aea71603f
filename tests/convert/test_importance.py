import re

import pytest
import torch
from conftest import assert_same, run, tiny_batch, tiny_config, tiny_model

from supershaper_hf import (
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
)
from supershaper_hf.convert import importance
from supershaper_hf.convert.importance import channel_importances, gate_gradients, reorder_channels


SHAPES = [[48, 48, 48], [8, 20, 36], [20, 0, 8]]
LABELS = {
    SuperShaperForMaskedLM: {"labels": torch.tensor([[5, -100, 7] * 3, [-100] * 5 + [60] + [-100] * 3])},
    SuperShaperForSequenceClassification: {"labels": torch.tensor([1, 0])},
    SuperShaperForTokenClassification: {"labels": torch.tensor([[0, 1, 1] * 3, [1] * 6 + [-100] * 3])},
    SuperShaperForQuestionAnswering: {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 5])},
    SuperShaperForMultipleChoice: {"labels": torch.tensor([2, 0])},
}


@pytest.fixture(params=LABELS, ids=lambda head: head.__name__.removeprefix("SuperShaper"))
def head_class(request):
    return request.param


def labelled_batches(model_class=SuperShaperForMaskedLM, n=1):
    return [{**tiny_batch(model_class, seed=seed), **LABELS[model_class]} for seed in range(n)]


def clone(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def shuffle_channels(model, seed=0):
    """Put the channels of every layer in random order: sort them by random importances."""
    generator = torch.Generator().manual_seed(seed)

    def random_importances(model, batches):
        config = model.config
        full, heads, ffn = config.hidden_size, config.num_attention_heads, config.intermediate_size
        sizes = {"hidden": full, "query_key": full, "value": full, "heads": heads, "neurons": ffn}
        return [
            {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
            for _ in range(config.num_hidden_layers)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "channel_importances", random_importances)
        reorder_channels(model, [])


# What reordering leaves alone


def test_full_supernet_computes_the_same(head_class, head_slicing):
    model, batch = tiny_model(head_class, head_slicing=head_slicing), tiny_batch(head_class)
    before, old = run(model, batch), clone(model.state_dict())
    reorder_channels(model, labelled_batches(head_class))
    assert_same(run(model, batch), before)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, old[name])}
    at_full_width = {f"bert.encoder.output_bottleneck.{index}.bias" for index in range(3)}
    assert moved == {name for name in old if ".encoder." in name} - at_full_width


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subnets_still_equal_the_narrowed_supernet(shape, head_slicing):
    model, batch = tiny_model(head_slicing=head_slicing), tiny_batch()
    reorder_channels(model, labelled_batches())
    assert_same(run(model.extract_subnet(shape), batch), run(model, batch, shape=shape))


def test_parameters_stay_the_same_objects_and_tied():
    model = tiny_model()
    before = [(parameter, parameter.data_ptr()) for parameter in model.parameters()]
    reorder_channels(model, labelled_batches())
    for parameter, (old, memory) in zip(model.parameters(), before, strict=True):
        assert parameter is old
        assert parameter.data_ptr() == memory
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_mode_gradients_and_frozen_parameters_are_left_as_they_were():
    model = tiny_model(hidden_dropout_prob=0.5).train()
    model.bert.encoder.layer[1].eval()
    parameters = list(model.parameters())
    for index, parameter in enumerate(parameters):
        parameter.requires_grad_(index % 3 > 0)
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
    modes, gradients = [module.training for module in model.modules()], [parameter.grad for parameter in parameters]
    reorder_channels(model, labelled_batches())
    assert [module.training for module in model.modules()] == modes
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients)):
        assert parameter.requires_grad == (index % 3 > 0)
        assert parameter.grad is gradient
        assert gradient is None or (gradient == index).all()


# Importance


def gated(module, gate, inputs=False):
    """Multiply the outputs of a module, or its first input, by a gate."""
    if inputs:
        module.register_forward_pre_hook(lambda module, given: (given[0] * gate(), *given[1:]))
    else:
        module.register_forward_hook(lambda module, given, output: output * gate())


def test_gradients_are_those_of_real_gates(head_class, head_slicing):
    model, [batch] = tiny_model(head_class, head_slicing=head_slicing), labelled_batches(head_class)
    actual = gate_gradients(model, batch)
    sizes = {"hidden": 48, "query_key": 48, "key": 48, "value": 48, "heads": 4, "neurons": 80}
    gates = [{name: torch.ones(size, requires_grad=True) for name, size in sizes.items()} for _ in range(3)]
    for layer, gate in zip(model.base_model.encoder.layer, gates):
        gated(layer, lambda gate=gate: gate["hidden"], inputs=True)  # a merged input bottleneck is not called itself
        for module in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
            gated(module, lambda gate=gate: gate["hidden"])
        gated(layer.attention.self.query, lambda gate=gate: gate["query_key"])
        gated(layer.attention.self.key, lambda gate=gate: gate["key"])
        heads_and_values = lambda gate=gate: gate["heads"].repeat_interleave(12) * gate["value"]  # noqa: E731
        gated(layer.attention.output.dense, heads_and_values, inputs=True)
        gated(layer.output.dense, lambda gate=gate: gate["neurons"], inputs=True)
    model(**batch).loss.backward()
    expected = [{name: tensor.grad for name, tensor in gate.items()} for gate in gates]
    for layer in expected:
        assert_same(layer.pop("key"), layer["query_key"])  # one importance serves both
    for layer, real in zip(actual, expected):
        assert {name: tensor.shape for name, tensor in layer.items()} == {n: t.shape for n, t in real.items()}
        for name, tensor in layer.items():
            assert tensor.abs().max() > 1e-4
            assert_same(tensor, real[name], atol=1e-5)


def test_importance_is_the_mean_square_over_labelled_batches():
    model, batches = tiny_model(), labelled_batches(n=2)
    unlabelled = {**tiny_batch(seed=5), "labels": torch.full((2, 9), -100)}
    first, second = (gate_gradients(model, batch) for batch in batches)
    for measured, a, b in zip(channel_importances(model, iter([unlabelled, *batches, unlabelled])), first, second):
        for name, values in measured.items():
            assert_same(values, (a[name] ** 2 + b[name] ** 2) / 2, atol=1e-7)


def test_importance_is_measured_without_dropout_and_under_no_grad():
    model, batches = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5), labelled_batches()
    expected = channel_importances(model, batches)
    with torch.no_grad():
        assert_same(channel_importances(model.train(), batches), expected, atol=0)


def test_importance_does_not_change_the_model():
    model = tiny_model()
    before = clone(model.state_dict())
    channel_importances(model, labelled_batches())
    assert_same(model.state_dict(), before, atol=0)


def test_half_precision_is_measured_in_float32():
    model = tiny_model()
    expected = channel_importances(model, labelled_batches())
    for half, full in zip(channel_importances(model.to(torch.bfloat16), labelled_batches()), expected):
        assert {values.dtype for values in half.values()} == {torch.float32}
        assert torch.corrcoef(torch.stack([half["neurons"], full["neurons"]]))[0, 1] > 0.98


class Elsewhere:
    """Stands for a tensor on another device."""

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        return self.tensor.to(device)


def test_batches_are_moved_to_the_models_device():
    model, [batch] = tiny_model(), labelled_batches()
    elsewhere = {name: Elsewhere(tensor) for name, tensor in batch.items()}
    assert_same(gate_gradients(model, elsewhere), gate_gradients(model, batch), atol=0)


# Order


def test_channels_are_sorted_by_what_was_returned(head_slicing):
    """Measured again, the importances are those of the first time in the new order, so a second time moves nothing."""
    model, batches = tiny_model(head_slicing=head_slicing), labelled_batches(n=4)
    before = reorder_channels(model, batches)
    for old, new in zip(before, channel_importances(model, batches)):
        heads = old["heads"].argsort(descending=True) if head_slicing == "prefix" else torch.arange(4)
        expected = {
            "hidden": old["hidden"].sort(descending=True).values,
            "query_key": old["query_key"].view(4, 12)[heads].sort(descending=True).values.flatten(),
            "value": old["value"].view(4, 12)[heads].sort(descending=True).values.flatten(),
            "heads": old["heads"][heads],
            "neurons": old["neurons"].sort(descending=True).values,
        }
        for name, values in expected.items():
            assert not torch.equal(values, old[name]) or (name, head_slicing) == ("heads", "per_head")
            torch.testing.assert_close(new[name], values, rtol=1e-2, atol=1e-3 * values.max().item())


def test_equal_channels_keep_their_order():
    assert importance.descending(torch.tensor([0.0, 1.0, 0.0, 1.0] * 20)).tolist() == [
        *range(1, 80, 2),
        *range(0, 80, 2),
    ]


def planted_model(head_slicing):
    """A supernet in which every third channel and neuron, and head 2 of 4, matter; the rest is nearly silent."""
    model = tiny_model(head_slicing=head_slicing)
    encoder = model.bert.encoder
    quiet_hidden, quiet_neurons = (torch.arange(size) % 3 > 0 for size in (48, 80))
    with torch.no_grad():
        for entry, layer, exit in zip(encoder.input_bottleneck, encoder.layer, encoder.output_bottleneck):
            attention, attended = layer.attention.self, layer.attention.output
            for module in (entry, attended.dense, attended.LayerNorm, layer.output.dense, layer.output.LayerNorm):
                module.weight[quiet_hidden] *= 0.02
                module.bias[quiet_hidden] *= 0.02
            for module in (attention.query, attention.value):
                module.weight[quiet_hidden] *= 0.02
                module.bias[quiet_hidden] *= 0.02
            attended.dense.weight[:, torch.arange(48) // 12 != 2] *= 0.3
            layer.output.dense.weight[:, quiet_neurons] *= 0.02
            exit.weight *= 2
    return model


def test_planted_channels_come_first_and_quiet_ones_last(head_slicing):
    model = planted_model(head_slicing)
    before = clone(model.state_dict())
    reorder_channels(model, labelled_batches(n=16))
    for index, layer in enumerate(model.bert.encoder.layer):
        names = f"bert.encoder.layer.{index}."
        entry = model.bert.encoder.input_bottleneck[index]

        def origins(new, old_name):
            """Where each entry of a bias stood before; entries of random biases are unlike each other."""
            old = before[old_name]
            positions = (new[:, None] == old).float().argmax(dim=1)
            assert torch.equal(old[positions], new)
            return positions

        hidden = origins(entry.bias, f"bert.encoder.input_bottleneck.{index}.bias")
        neurons = origins(layer.intermediate.dense.bias, f"{names}intermediate.dense.bias")
        assert (hidden[:16] % 3 == 0).all()
        assert (neurons[:26] % 3 == 0).float().mean() > 0.9
        for module in ("query", "value"):
            channels = origins(getattr(layer.attention.self, module).bias, f"{names}attention.self.{module}.bias")
            assert (channels.view(4, 12)[:, :4] % 3 == 0).all()
            heads = channels.view(4, 12) // 12
            assert (heads == heads[:, :1]).all()
            if head_slicing == "per_head":
                assert heads[:, 0].tolist() == [0, 1, 2, 3]
            else:
                assert heads[0, 0] == 2


def test_reordering_undoes_much_of_a_shuffle(head_slicing):
    """A supernet trained at two widths keeps what matters in the first channels; shuffled, the narrow one is lost."""
    model = SuperShaperForMaskedLM(tiny_config(head_slicing=head_slicing)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = tiny_batch()
    batch["labels"] = batch["input_ids"]
    for _ in range(60):
        for shape in (None, [8, 8, 8]):
            model(**batch, shape=shape).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    def loss(shape=None):
        with torch.no_grad():
            return model(**batch, shape=shape).loss.item()

    full, trained = loss(), loss([8, 8, 8])
    shuffle_channels(model)
    shuffled = loss([8, 8, 8])
    reorder_channels(model, [batch])
    reordered = loss([8, 8, 8])
    assert loss() == pytest.approx(full, abs=1e-4)
    assert reordered < shuffled - 0.5 * (shuffled - trained)


# Errors


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "There is no batch with a label, and importance is measured on the loss. Give at least one."),
        ([{**tiny_batch(), "labels": torch.full((2, 9), -100)}], "There is no batch with a label"),
        (
            [tiny_batch()],
            "SuperShaperForMaskedLM gives no loss on a batch of input_ids, token_type_ids, attention_mask",
        ),
    ],
    ids=["no batch", "no labelled token", "no labels"],
)
def test_batches_without_labels_are_refused(batches, message):
    model = tiny_model().train()
    before = clone(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        reorder_channels(model, batches)
    assert_same(model.state_dict(), before, atol=0)
    assert model.training
    assert model.bert.encoder.layer[0].training


def test_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"SuperShaperModel gives no loss .* use a model with a head"):
        reorder_channels(tiny_model(SuperShaperModel), [tiny_batch()])


def test_subnet_is_refused():
    subnet = tiny_model().extract_subnet([8, 0, 36])
    with pytest.raises(ValueError, match=r"a subnet with fixed hidden_sizes=\[8, 36\].* Reorder the supernet before"):
        reorder_channels(subnet, labelled_batches())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_importance_that_is_not_finite_is_refused(value):
    model = tiny_model().train()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = value
    before = clone(model.state_dict())
    with pytest.raises(
        ValueError, match=r"The importance of \w+ in layer 0 is not finite: .* Check weights and labels"
    ):
        reorder_channels(model, labelled_batches())
    assert model.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_importance_beyond_float32_is_refused(monkeypatch):
    monkeypatch.setattr(importance, "gate_gradients", lambda model, batch: [{"hidden": torch.tensor([1.0, 1e30])}])
    with pytest.raises(ValueError, match="The importance of hidden in layer 0 is not finite"):
        reorder_channels(tiny_model(), labelled_batches())
