"""Layers that adapters, quantisers and pruning replace: right at the full shape, and a clear error at narrow ones."""

import re

import pytest
import torch
from conftest import PER_HEAD_BY_WIDTH, assert_same, run, tiny_batch, tiny_model
from torch import nn
from torch.nn.utils import parametrize, prune

from supershaper_hf import SuperShaperForSequenceClassification


NARROW = [8, 20, 36]
REST = [48, 48, 48]
LAYER = "bert.encoder.layer.1."
# Every kind of module that a narrow shape narrows, in a supernet with bottlenecks by width.
NARROWED = [
    *(LAYER + name for name in ("attention.self.query", "attention.self.key", "attention.self.value")),
    *(LAYER + name for name in ("attention.output.dense", "attention.output.LayerNorm")),
    *(LAYER + name for name in ("intermediate.dense", "output.dense", "output.LayerNorm")),
    "bert.encoder.input_bottleneck.1",
]
CODES = [
    f"bert.encoder.by_width.1.20.{code}.{part}"
    for code in ("attention_code", "intermediate_code")
    for part in ("writer", "reader")
]


class Adapter(nn.Module):
    """Adds to what a layer computes, as a low-rank adapter does. Its `weight` is that of the layer alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.tensor(0.5))

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def __getattr__(self, name):  # in_features, normalized_shape, eps, ...
        return super().__getattr__(name) if name in ("layer", "scale") else getattr(self.layer, name)

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return outputs + self.scale * outputs.square()


class Int8(torch.Tensor):
    """A tensor that stores 8-bit integers and a scale, as the weights of quantised layers do."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.scale = values.abs().max() / 127
        self.integers = (values / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    def dequantize(self):
        return self.integers * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        return function(*(arg.dequantize() if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


def adapt(parent, name):
    setattr(parent, name, Adapter(getattr(parent, name)))


def patch_forward(parent, name):
    layer = getattr(parent, name)
    whole = layer.forward
    layer.forward = lambda inputs: whole(inputs) + inputs.mean(-1, keepdim=True)


def zero_some(parent, name):
    prune.random_unstructured(getattr(parent, name), "weight", amount=0.5)


def quantise(parent, name):
    layer = getattr(parent, name)
    layer.weight = nn.Parameter(Int8(layer.weight.detach()), requires_grad=False)


REPLACEMENTS = {
    adapt: "test_replaced_layers.Adapter",
    patch_forward: "with another forward method",
    zero_some: "with the parameter weight_orig",
    quantise: "with a weight of test_replaced_layers.Int8",
}


def replace(model, path, how):
    parent, _, name = path.rpartition(".")
    how(model.get_submodule(parent), name)


@pytest.fixture(params=REPLACEMENTS, ids=lambda how: how.__name__)
def how(request):
    return request.param


def refused(how, name):
    message = f"Only ordinary layers are narrowed or cut, but {name} is .*{re.escape(REPLACEMENTS[how])}"
    return pytest.raises(TypeError, match=f"{message}.*merge_and_unload.*extract_subnet")


@pytest.mark.parametrize("path", NARROWED)
def test_narrow_shapes_refuse_a_replaced_layer(how, path):
    supernet = tiny_model(**PER_HEAD_BY_WIDTH)
    replace(supernet, path, how)
    with refused(how, "a layer"):
        supernet(**tiny_batch(), shape=NARROW)
    with refused(how, re.escape(path)):
        supernet.extract_subnet(NARROW)


@pytest.mark.parametrize("path", CODES)
def test_narrow_shapes_refuse_a_replaced_code(path):
    supernet = tiny_model(**PER_HEAD_BY_WIDTH)
    replace(supernet, path, adapt)
    with refused(adapt, "a layer"):
        supernet(**tiny_batch(), shape=NARROW)
    with refused(adapt, re.escape(path)):
        supernet.extract_subnet(NARROW)


@pytest.mark.parametrize("path", ["bert.encoder.output_bottleneck.1", "bert.encoder.input_bottleneck.1"])
@pytest.mark.parametrize("length", [9, 18], ids=["bottlenecks one by one", "bottlenecks merged"])
def test_narrow_shapes_refuse_replaced_bottlenecks(how, path, length):
    supernet = tiny_model()
    replace(supernet, path, how)
    with refused(how, "a layer"):
        supernet(**tiny_batch(length=length), shape=NARROW)


@pytest.mark.parametrize("path", ["bert.embeddings.word_embeddings", "bert.embeddings.LayerNorm", "classifier"])
def test_extraction_refuses_replaced_layers_outside_the_encoder(how, path):
    supernet = tiny_model(SuperShaperForSequenceClassification)
    replace(supernet, path, how)
    with refused(how, re.escape(path)):
        supernet.extract_subnet(NARROW)


@pytest.mark.parametrize("path", [*NARROWED, "bert.encoder.output_bottleneck.0"])
@pytest.mark.parametrize("shape", [None, REST, [48, 0, 48]], ids=str)
def test_wide_layers_use_what_replaces_them(path, shape):
    """Also the bottlenecks, which are merged where that is cheaper: with more than 48 tokens."""
    supernet, batch = tiny_model(), tiny_batch(batch=8)
    before = run(supernet, batch, shape=shape)[0]
    replace(supernet, path, adapt)
    layer = supernet.get_submodule(path)
    logits = supernet(**batch, shape=shape).logits
    logits.square().mean().backward()
    if shape == [48, 0, 48] and ".1" in path:  # of the layer that is dropped
        assert layer.scale.grad is None
        assert_same(logits, before, atol=0)
    else:
        assert layer.scale.grad.abs() > 0
        assert (logits - before).abs().max() > 1e-3


def test_subnets_use_what_replaces_their_layers():
    subnet, batch = tiny_model().extract_subnet(NARROW), tiny_batch(batch=8)
    linear_maps = [name for name, module in subnet.named_modules() if isinstance(module, nn.Linear)]
    for path in linear_maps:
        replace(subnet, path, adapt)
    subnet(**batch).logits.square().mean().backward()
    assert all(subnet.get_submodule(path).scale.grad.abs() > 0 for path in linear_maps)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("elastic", [True, False], ids=["supernet", "subnet"])
def test_dynamic_quantisation_replaces_every_map(elastic):
    """PyTorch's own replaces layers of exact classes only: a class of ours would stay in 32 bits."""
    model = tiny_model(SuperShaperForSequenceClassification)
    model = model if elastic else model.extract_subnet(NARROW)
    expected = run(model, tiny_batch(batch=8))[0]
    maps = 3 * 6 + (3 + 3 if elastic else 3 + 1) + 1 + 1  # layers, bottlenecks, pooler, classifier
    assert [isinstance(module, nn.Linear) for module in model.modules()].count(True) == maps
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    kinds = [type(module) for module in quantised.modules()]
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == maps
    found = run(quantised, tiny_batch(batch=8))[0]
    assert 1e-4 < (found - expected).abs().max() < 0.2 * expected.abs().max()
    if elastic:
        refused = r"is torch\.ao\.nn\.quantized\.dynamic\.\S+\.Linear.*extract_subnet\(shape\) on the supernet before"
        with pytest.raises(TypeError, match=f"a layer {refused}"):
            quantised(**tiny_batch(), shape=NARROW)
        with pytest.raises(TypeError, match=rf"bert\.pooler\.dense {refused}"):
            quantised.extract_subnet(NARROW)


class Scaled(nn.Module):
    """A parametrisation: the weight that is used is 1.2 times the one that is trained."""

    def forward(self, weight):
        return 1.2 * weight

    def right_inverse(self, weight):
        return weight.clone()


@pytest.mark.parametrize("shape", [None, NARROW, [8, 0, 48]], ids=str)
def test_parametrised_layers_are_narrowed_and_cut(elasticity, shape):
    supernet, batch = tiny_model(**elasticity), tiny_batch(batch=8)
    before = run(supernet, batch, shape=shape)[0]
    for module in list(supernet.modules()):
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
            parametrize.register_parametrization(module, "weight", Scaled())
    logits = supernet(**batch, shape=shape).logits
    assert (logits - before).abs().max() > 1e-2
    assert_same(run(supernet.extract_subnet(shape or REST), batch)[0], logits.detach(), atol=5e-5)
    logits.square().mean().backward()
    query = supernet.bert.encoder.layer[0].attention.self.query.parametrizations.weight.original
    assert query.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore")  # of the compiler, on things that are not ours
def test_the_check_is_compiled_with_the_layer(elasticity):
    supernet, batch = tiny_model(**elasticity), tiny_batch(batch=8)
    compiled = torch.compile(supernet, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, batch, shape=NARROW), run(supernet, batch, shape=NARROW))


def test_the_check_allows_what_only_moves_tensors():
    from accelerate import dispatch_model

    supernet, batch = tiny_model(), tiny_batch()
    expected = run(supernet, batch, shape=NARROW)
    supernet = dispatch_model(supernet, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(supernet.bert.encoder.layer[0].attention.self.query, "_hf_hook")
    assert_same(run(supernet, batch, shape=NARROW), expected, atol=0)
