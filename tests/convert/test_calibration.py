"""A calibrated supernet: the full width stays, narrow widths come close to it, and each step is what it says."""

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

from supershaper_hf import SuperShaperForMaskedLM, SuperShaperModel, calibrate
from supershaper_hf.convert import calibration
from supershaper_hf.convert.calibration import RIDGE, Moments, ridge_regression


SHAPES = [[48, 48, 48], [8, 20, 36], [20, 0, 8], [36, 36, 36]]
WIDTHS = [8, 20, 36]


def texts(n=4, batch=6, length=20, first_seed=10):
    """Batches of random tokens with padding; their seeds are not those of the batches that results are compared on."""
    return [tiny_batch(batch=batch, length=length, seed=first_seed + seed) for seed in range(n)]


def clone(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def numbered(model):
    """Give the channels of every input bottleneck the biases 1, 2, ..., so that their new order can be read."""
    with torch.no_grad():
        for bottleneck in model.base_model.encoder.input_bottleneck:
            bottleneck.bias.copy_(torch.arange(1, 49) / 48)
    return model


class Watcher:
    """The states of every layer at full width, of the tokens that are not padding, as float64 arrays."""

    def __init__(self, model, batches):
        encoder = model.base_model.encoder
        parts = {"layer.{}.attention": "attended", "layer.{}": "outputs"}
        parts |= {f"layer.{{}}.attention.self.{name}": name for name in ("query", "key")}
        parts |= {"layer.{}.attention.self": "context"}
        self.states = {name: [[] for _ in encoder.layer] for name in ("inputs", *parts.values())}
        for batch in batches:
            real, handles = batch["attention_mask"].bool(), []
            for path, name in parts.items():
                for index in range(len(encoder.layer)):

                    def keep(module, inputs, output, kept=self.states[name][index], real=real):
                        kept.append((output[0] if isinstance(output, tuple) else output)[real].double().numpy())

                    def keep_inputs(module, inputs, kept=self.states["inputs"][index], real=real):
                        kept.append(inputs[0][real].double().numpy())

                    if name == "outputs":
                        handles.append(encoder.layer[index].register_forward_pre_hook(keep_inputs))
                    handles.append(encoder.get_submodule(path.format(index)).register_forward_hook(keep))
            run(model, batch)
            for handle in handles:
                handle.remove()

    def __call__(self, name, layer):
        return np.concatenate(self.states[name][layer])

    def heads(self, name, layer):
        """The states of each of the four heads, (heads, tokens, 12)."""
        return self(name, layer).reshape(-1, 4, 12).swapaxes(0, 1)


# What calibration leaves alone


def test_full_width_computes_what_it_did(model_class, elasticity):
    """The bottlenecks, norms and biases are random, as in a trained supernet."""
    model, batch = tiny_model(model_class, **elasticity), tiny_batch(model_class)
    before = run(model, batch)
    calibrate(model, texts())
    assert_same(run(model, batch), before)


@pytest.mark.parametrize("length", [1, 4])
def test_full_width_stays_where_there_is_too_little_text(length, elasticity):
    """A head of 12 channels has seen fewer directions than it has."""
    model, batch = tiny_model(SuperShaperModel, **elasticity), tiny_batch()
    before = run(model, batch)
    calibrate(model, [{"input_ids": torch.arange(1, length + 1)[None]}])
    assert_same(run(model, batch), before)


def test_supernet_of_a_bert_equals_it(elasticity):
    bert, batch = randomize(BertModel(tiny_bert_config())), tiny_batch()
    supernet = SuperShaperModel.from_bert(
        bert,
        width_choices=[*WIDTHS, 48],
        head_slicing=elasticity["head_slicing"],
        bottlenecks=elasticity.get("bottlenecks", "shared"),
        calibration=texts(),
    )
    assert_same(run(supernet, batch), run(bert, batch))
    assert supernet.config.full_head_scale == (elasticity["head_slicing"] == "per_head")


def test_supernet_that_is_calibrated_has_heads_that_keep_their_channels():
    bert = randomize(BertModel(tiny_bert_config()))
    assert SuperShaperModel.from_bert(bert, calibration=texts()).config.head_slicing == "per_head"
    assert SuperShaperModel.from_bert(bert).config.head_slicing == "prefix"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subnets_equal_the_narrowed_supernet(shape, elasticity):
    model, batch = tiny_model(**elasticity), tiny_batch()
    calibrate(model, texts())
    assert_same(run(model.extract_subnet(shape), batch), run(model, batch, shape=shape), atol=2e-5)


def test_saved_supernet_is_calibrated(tmp_path):
    model, batch = tiny_model(head_slicing="per_head", bottlenecks="by_width"), tiny_batch()
    calibrate(model, texts())
    model.save_pretrained(tmp_path)
    loaded = SuperShaperForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config.full_head_scale
    assert_same(run(loaded, batch, shape=[8, 20, 36]), run(model, batch, shape=[8, 20, 36]))


def test_parameters_stay_the_same_objects_and_tied():
    model = tiny_model(**PER_HEAD_BY_WIDTH)
    before = [(parameter, parameter.data_ptr()) for parameter in model.parameters()]
    calibrate(model, texts())
    for parameter, (old, memory) in zip(model.parameters(), before, strict=True):
        assert parameter is old
        assert parameter.data_ptr() == memory
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_modes_gradients_and_frozen_parameters_are_left_as_they_were():
    model = tiny_model(**PER_HEAD_BY_WIDTH, hidden_dropout_prob=0.5).train()
    model.bert.encoder.layer[1].eval()
    parameters = list(model.parameters())
    for index, parameter in enumerate(parameters):
        parameter.requires_grad_(index % 3 > 0)
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
    modes, gradients = [module.training for module in model.modules()], [parameter.grad for parameter in parameters]
    calibrate(model, texts())
    assert [module.training for module in model.modules()] == modes
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients)):
        assert parameter.requires_grad == (index % 3 > 0)
        assert parameter.grad is gradient
        assert gradient is None or (gradient == index).all()


def test_embeddings_and_head_are_not_changed():
    model = tiny_model(**PER_HEAD_BY_WIDTH)
    before = clone(model)
    calibrate(model, texts())
    outside = [name for name in before if ".encoder." not in name]
    assert_same({name: model.state_dict()[name] for name in outside}, {name: before[name] for name in outside}, atol=0)


# What it depends on


def test_result_is_the_same_every_time():
    """No dropout, and no random number."""
    first, second = (tiny_model(**PER_HEAD_BY_WIDTH, hidden_dropout_prob=0.5).train() for _ in range(2))
    torch.manual_seed(1)
    calibrate(first, texts())
    torch.manual_seed(2)
    calibrate(second, texts())
    assert_same(first.state_dict(), second.state_dict(), atol=0)


def narrow_outputs(batches, **changes):
    model = tiny_model(SuperShaperModel, **PER_HEAD_BY_WIDTH, **changes)
    calibrate(model, batches)
    return run(model, tiny_batch(), shape=[8, 20, 36])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_does_not_count(implementation):
    batches = texts()
    more = [
        {
            "input_ids": torch.nn.functional.pad(
                b["input_ids"].masked_fill(b["attention_mask"] == 0, 7), (0, 4), value=9
            ),
            "token_type_ids": torch.nn.functional.pad(b["token_type_ids"], (0, 4), value=1),
            "attention_mask": torch.nn.functional.pad(b["attention_mask"], (0, 4)),
        }
        for b in batches
    ]
    changes = {"attn_implementation": implementation}
    assert_same(narrow_outputs(more, **changes), narrow_outputs(batches, **changes), atol=1e-3)


def test_division_into_batches_does_not_count():
    batches = texts()
    together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert_same(narrow_outputs([together]), narrow_outputs(iter(batches)), atol=1e-3)


def test_left_out_inputs_have_berts_defaults():
    ids = tiny_batch(batch=20, length=20)["input_ids"]
    spelled_out = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids), "labels": None}
    assert_same(narrow_outputs([{"input_ids": ids}]), narrow_outputs([{"input_ids": ids, **spelled_out}]), atol=0)
    with_types = {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}
    assert (narrow_outputs([with_types])[0] - narrow_outputs([{"input_ids": ids}])[0]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_calibrated_in_float32(dtype):
    half = tiny_model(**PER_HEAD_BY_WIDTH).to(dtype)
    single = tiny_model(**PER_HEAD_BY_WIDTH)
    single.load_state_dict(half.state_dict())
    calibrate(half, texts())
    calibrate(single, texts())
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert_same(half.state_dict(), single.to(dtype).state_dict(), atol=0)


def test_double_precision_stays():
    model, batch = tiny_model(**PER_HEAD_BY_WIDTH).double(), tiny_batch()
    before = run(model, batch)
    calibrate(model, texts())
    assert_same(run(model, batch), before, atol=1e-12)


class Elsewhere:
    """Stands for a tensor on another device."""

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        return self.tensor.to(device)


def test_batches_are_moved_to_the_models_device():
    elsewhere = [{name: Elsewhere(tensor) for name, tensor in batch.items()} for batch in texts()]
    assert_same(narrow_outputs(elsewhere), narrow_outputs(texts()), atol=0)


@pytest.mark.parametrize(("bottlenecks", "steps"), [("shared", 3), ("by_width", 6)])
def test_progress_is_shown_if_asked_for(bottlenecks, steps, capsys):
    calibrate(tiny_model(bottlenecks=bottlenecks), texts(1))
    assert capsys.readouterr().err == ""
    calibrate(tiny_model(bottlenecks=bottlenecks), texts(1), progress=True)
    assert f"Calibrating: 100%|██████████| {steps}/{steps}" in capsys.readouterr().err


# The order of the hidden channels


def test_channels_with_the_most_energy_come_first_in_all_layers(elasticity):
    """Each of the three states of each layer counts alike, whatever its size."""
    model = numbered(tiny_model(SuperShaperModel, **elasticity))
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight *= 30
    seen = Watcher(model, texts())
    energy = np.zeros(48)
    for layer in range(3):
        for state in ("inputs", "attended", "outputs"):
            squares = (seen(state, layer) ** 2).mean(axis=0)
            energy += squares / squares.sum()
    calibrate(model, texts())
    for bottleneck in model.encoder.input_bottleneck:
        order = (bottleneck.bias * 48).round().int().numpy() - 1
        assert order.tolist() == np.argsort(-energy).tolist()


# The rotation of the heads


def assert_diagonal(matrices, descending=True):
    """Each matrix is diagonal, up to a thousandth of its largest number, and sorted."""
    for matrix in matrices:
        diagonal = np.diagonal(matrix)
        assert np.abs(matrix - np.diag(diagonal)).max() < 1e-3 * diagonal.max()
        assert not descending or (np.diff(diagonal) < 1e-3 * diagonal.max()).all()


def moments(vectors, centred):
    """Second moments or covariances of (heads, tokens, channels)."""
    vectors = vectors - vectors.mean(axis=1, keepdims=True) if centred else vectors
    return vectors.swapaxes(1, 2) @ vectors / vectors.shape[1]


def test_queries_and_keys_are_those_of_the_singular_value_decomposition():
    """Rotated, the moments of queries and keys are one and the same diagonal matrix: the singular values."""
    model = tiny_model(SuperShaperModel, head_slicing="per_head")
    before = Watcher(model, texts())
    calibrate(model, texts())
    after = Watcher(model, texts())
    for layer in range(3):
        queries, keys = moments(after.heads("query", layer), False), moments(after.heads("key", layer), True)
        assert_diagonal(queries)
        np.testing.assert_allclose(keys, queries, atol=1e-3 * queries.max())
        products = moments(before.heads("query", layer), False) @ moments(before.heads("key", layer), True)
        expected = np.sqrt(np.sort(np.linalg.eigvals(products).real, axis=1)[:, ::-1])
        np.testing.assert_allclose(np.diagonal(queries, axis1=1, axis2=2), expected, atol=1e-3 * expected.max())


def test_values_are_those_of_the_singular_value_decomposition():
    """The contexts have no mean, and their covariance is that of the columns of the output map."""
    model = tiny_model(SuperShaperModel, head_slicing="per_head")
    calibrate(model, texts())
    after = Watcher(model, texts())
    for layer in range(3):
        contexts = after.heads("context", layer)
        np.testing.assert_allclose(contexts.mean(axis=1), 0, atol=1e-4)
        covariance = moments(contexts, True)
        assert_diagonal(covariance)
        columns = model.encoder.layer[layer].attention.output.dense.weight.detach().double().numpy()
        columns = columns.reshape(48, 4, 12).transpose(1, 2, 0)
        gram = columns @ columns.swapaxes(1, 2)
        np.testing.assert_allclose(gram, covariance, atol=1e-3 * covariance.max())


def test_first_channels_of_a_head_carry_its_scores_and_outputs():
    """Before, they were the last ones."""
    model = tiny_model(SuperShaperModel, head_slicing="per_head")
    useful = (torch.arange(48) % 12 + 1) / 12
    with torch.no_grad():
        for layer in model.encoder.layer:
            for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                projection.weight *= useful[:, None] ** 3
                projection.bias *= useful**3

    def errors():
        """Of scores and outputs of the first 5 channels of each head of layer 1, without what they have in common."""
        seen, dense = Watcher(model, texts()), model.encoder.layer[1].attention.output.dense
        query, key = seen.heads("query", 1), seen.heads("key", 1)
        lost = query[..., 5:] @ key[..., 5:].swapaxes(1, 2)
        scores = (lost - lost.mean(axis=2, keepdims=True)).std()
        context = np.where(np.arange(48) % 12 < 5, 0, seen("context", 1))
        return scores, (context @ dense.weight.detach().double().numpy().T).std()

    before = errors()
    calibrate(model, texts())
    for lost_before, lost_after in zip(before, errors()):
        assert lost_after < 0.2 * lost_before


def test_heads_are_not_rotated_where_channels_change_their_heads():
    model = tiny_model(SuperShaperModel, head_slicing="prefix")
    before = clone(model)
    calibrate(model, texts())
    for name, tensor in model.state_dict().items():
        if ".self." in name and name.endswith(".bias"):
            assert torch.equal(tensor, before[name])
    assert not model.config.full_head_scale


# What is dead stays dead


def kill(model, what):
    encoder = model.base_model.encoder
    layer, first_head = encoder.layer[1], slice(0, 12)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            if what == f"{name} of a head":
                for parameter in getattr(layer.attention.self, name).parameters():
                    parameter[first_head] = 0
        if what == "constant values":
            layer.attention.self.value.weight[:] = 0
        elif what == "output of a head":
            layer.attention.output.dense.weight[:, first_head] = 0
        elif what == "channels":
            for module in (encoder.input_bottleneck[1], layer.attention.output.LayerNorm, layer.output.LayerNorm):
                module.weight[5:40] = 0
                module.bias[5:40] = 0
        elif what == "constant outputs":
            layer.output.LayerNorm.weight[:] = 0
        elif what == "everything":
            for parameter in layer.parameters():
                parameter[:] = 0


@pytest.mark.parametrize(
    "what",
    [
        "query of a head",
        "key of a head",
        "value of a head",
        "output of a head",
        "constant values",
        "channels",
        "constant outputs",
        "everything",
    ],
)
def test_dead_parts_of_a_layer_are_harmless(what, elasticity):
    model, batch = tiny_model(SuperShaperModel, **elasticity), tiny_batch()
    kill(model, what)
    before = run(model, batch)
    calibrate(model, texts())
    assert_same(run(model, batch), before)
    for shape in SHAPES:
        narrow = run(model, batch, shape=shape)
        assert all(output.isfinite().all() for output in narrow)
        assert_same(run(model.extract_subnet(shape), batch), narrow, atol=2e-5)
    assert all(parameter.abs().max() < 1e3 for parameter in model.parameters())


# The regressions


def ridge_by_numpy(x, y, start):
    """Least squares on centred data, with one more row for each input: the penalty on the distance to `start`."""
    centre_x, centre_y = x.mean(axis=0), y.mean(axis=0)
    strength = np.sqrt(RIDGE * x.var(axis=0).mean() * len(x))
    rows = np.concatenate([x - centre_x, strength * np.eye(x.shape[1])])
    targets = np.concatenate([y - centre_y, strength * start.T])
    weight = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    return weight, centre_y - weight @ centre_x


def test_ridge_regression_is_the_one_of_the_textbook():
    x, y, start = torch.randn(90, 5) * torch.arange(1, 6) + 3, torch.randn(90, 7), torch.randn(7, 5)
    y += x @ torch.randn(5, 7)
    pairs = zip(x.split([30, 1, 59]), y.split([30, 1, 59]))
    actual = ridge_regression(Moments.of(pairs), start)
    expected = ridge_by_numpy(x.double().numpy(), y.double().numpy(), start.double().numpy())
    for tensor, array in zip(actual, expected):
        np.testing.assert_allclose(tensor.numpy(), array, atol=1e-6)


def test_ridge_regression_stays_at_the_start_where_inputs_say_nothing():
    x, start = torch.zeros(30, 4), torch.randn(3, 4)
    weight, bias = ridge_regression(Moments.of([(x, torch.ones(30, 3))]), start)
    np.testing.assert_allclose(weight, start)
    np.testing.assert_allclose(bias, 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_readers_and_bottlenecks_of_a_width_are_ridge_regressions(width, head_slicing):
    """Between two states of the full supernet, which layer 1 and the bottlenecks around it make."""
    model = tiny_model(SuperShaperModel, head_slicing=head_slicing, bottlenecks="by_width")
    calibrate(model, texts())
    full, encoder = Watcher(model, texts()), model.encoder
    narrow, layer = encoder.narrow(1, width), encoder.layer[1]
    code, attended, outputs = narrow.attention_code, [], []
    with torch.no_grad():
        for batch in texts():
            states = model(**batch, shape=[48, 0, 0]).last_hidden_state
            states = encoder.input_bottleneck[1](states)
            states = states[..., :width] + code.writer(states[..., width:])
            real = batch["attention_mask"].bool()
            mask = torch.zeros(*real.shape[:1], 1, 1, real.shape[1]).masked_fill(~real[:, None, None], -1e9)
            mask = mask.expand(-1, 1, real.shape[1], -1)
            attended.append(layer.attention(states, mask, narrow)[real].double().numpy())
            outputs.append(layer(states, mask, narrow)[real].double().numpy())
    inputs, writer = full("inputs", 1), code.writer.weight.detach().double().numpy()
    shared, bias = (parameter.detach().double().numpy() for parameter in encoder.output_bottleneck[1].parameters())
    left = full("outputs", 1) @ shared.T + bias
    nothing = np.zeros((48 - width, width))
    for module, x, y, start in (
        (code.reader, inputs[:, :width] + inputs[:, width:] @ writer.T, inputs[:, width:], nothing),
        (narrow.intermediate_code.reader, np.concatenate(attended), full("attended", 1)[:, width:], nothing),
        (narrow.output_bottleneck, np.concatenate(outputs), left, shared[:, :width]),
    ):
        weight, bias = ridge_by_numpy(x, y, start)
        np.testing.assert_allclose(module.weight.detach(), weight, atol=2e-3)
        np.testing.assert_allclose(module.bias.detach(), bias, atol=5e-3)


@pytest.mark.parametrize("width", [8, 20, 36])
def test_without_a_penalty_a_code_keeps_the_principal_components(width, monkeypatch):
    monkeypatch.setattr(calibration, "WRITER_PENALTY", 1e-9)
    components = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64)).Q[:, :width]
    coding = torch.cat([torch.eye(width, dtype=torch.float64), calibration.choose_writer(components)], dim=1)
    projection = coding.T @ torch.linalg.solve(coding @ coding.T, coding)
    torch.testing.assert_close(projection @ components, components, atol=1e-5, rtol=0)


def test_code_between_attention_and_ffn_differs_by_the_gains_of_the_layer_norm_alone():
    model = tiny_model(SuperShaperModel, bottlenecks="by_width")
    calibrate(model, texts())
    gains = model.encoder.layer[1].attention.output.LayerNorm.weight
    narrow, states = model.encoder.narrow(1, 20), torch.randn(5, 48)
    before = states[:, :20] + narrow.attention_code.writer(states[:, 20:])
    after = (gains * states)[:, :20] + narrow.intermediate_code.writer((gains * states)[:, 20:])
    torch.testing.assert_close(after, gains[:20] * before, atol=1e-5, rtol=1e-4)


def test_gains_near_zero_are_not_divided_by():
    norm = torch.nn.LayerNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.0, -1e-9]))
    gains = calibration.safe_gains(norm).tolist()
    assert gains == pytest.approx([1.0, -2.0, 0.075, -0.075])


# Narrow shapes come closer


def bert_with_structure():
    """A BERT whose last channels carry most of its states, of its scores and of its values."""
    bert = randomize(BertModel(tiny_bert_config()))
    useful, in_head = ((torch.arange(48) + 1) / 48) ** 2, ((torch.arange(48) % 12 + 1) / 12) ** 2
    with torch.no_grad():
        bert.embeddings.LayerNorm.weight *= useful
        bert.embeddings.LayerNorm.bias *= useful
        for layer in bert.encoder.layer:
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight *= useful
                norm.bias *= useful
            for name in ("query", "key", "value"):
                getattr(layer.attention.self, name).weight *= in_head[:, None]
    return bert


@torch.no_grad()
def distances(supernet):
    """Relative squared error of the last hidden state at each width, on other text than that of the calibration."""
    batch = tiny_batch(batch=20, length=20, seed=1)
    real = batch["attention_mask"].bool()
    full = supernet(**batch).last_hidden_state[real]
    narrow = [supernet(**batch, shape=[width] * 3).last_hidden_state[real] for width in WIDTHS]
    return [((states - full).square().sum() / (full - full.mean(0)).square().sum()).item() for states in narrow]


def test_narrow_shapes_come_closer_at_every_width():
    def start(**choices):
        return distances(SuperShaperModel.from_bert(bert_with_structure(), width_choices=[*WIDTHS, 48], **choices))

    text = texts(20)
    plain, prefix = start(), start(calibration=text, head_slicing="prefix")
    rotated, by_width = start(calibration=text), start(calibration=text, bottlenecks="by_width")
    for worse, better in ((plain, prefix), (plain, rotated), (rotated, by_width)):
        assert all(closer < far for closer, far in zip(better, worse))


# Errors


def test_subnet_is_refused():
    subnet = tiny_model().extract_subnet([8, 0, 36])
    with pytest.raises(ValueError, match=r"This is a subnet with fixed hidden_sizes=\[8, 36\].*before extract_subnet"):
        calibrate(subnet, texts())


@pytest.mark.parametrize("batches", [[], [{**tiny_batch(), "attention_mask": torch.zeros(2, 9).long()}]], ids=len)
def test_text_without_a_token_is_refused(batches):
    model = tiny_model(**PER_HEAD_BY_WIDTH).train()
    with pytest.raises(ValueError, match=r"There is no text to calibrate on\. Give at least one batch"):
        calibrate(model, batches)
    assert model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["layer.2.output.dense", "output_bottleneck.2", "layer.2.attention.self.key"])
def test_state_that_is_not_finite_is_refused_and_the_model_stays(part, value):
    model = tiny_model(head_slicing="per_head", bottlenecks="by_width").to(torch.bfloat16)
    with torch.no_grad():
        model.bert.encoder.get_submodule(part).bias[7] = value
    before = clone(model)
    with pytest.raises(ValueError, match=r"The output of layer 3 is not finite\. Check the weights"):
        calibrate(model, texts())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0, equal_nan=True)
    assert not model.config.full_head_scale


def test_text_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="25 tokens long, but the model has max_position_embeddings=24"):
        calibrate(tiny_model(), [tiny_batch(length=25)])


def test_configuration_is_that_of_all_parts_of_the_model(model_class):
    model = tiny_model(model_class, head_slicing="per_head")
    calibrate(model, texts(1))
    assert model.config.full_head_scale
    assert {module.config.full_head_scale for module in model.modules() if hasattr(module, "config")} == {True}
    assert tiny_config(head_slicing="per_head").full_head_scale is False
