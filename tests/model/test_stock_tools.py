"""What transformers, Accelerate and PyTorch do with a saved model by themselves: load, place, cast, compile."""

import pytest
import torch
import transformers
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from conftest import assert_same, run, tiny_batch, tiny_model
from transformers import AutoConfig

from supershaper_hf import SuperShaperForMaskedLM, SuperShaperForMultipleChoice


@pytest.fixture(scope="module", params=["supernet", "subnet"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[SuperShaperForMaskedLM, SuperShaperForMultipleChoice])
def saved(request, kind, tmp_path_factory):
    """A model and its folder, in which the weights are spread over several files.

    One head has tied weights, the other inputs with an axis more; the rest of the heads are loaded like these two.
    """
    model = tiny_model(request.param)
    model = model if kind == "supernet" else model.extract_subnet([8, 0, 36])
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder, max_shard_size="50KB")
    return model, folder


@pytest.fixture
def batch(saved):
    return tiny_batch(type(saved[0]), batch=6)  # more than 48 tokens: then a supernet merges two bottlenecks


def auto_class(model):
    return getattr(transformers, f"AutoModel{type(model).__name__.removeprefix('SuperShaper').removeprefix('Model')}")


@pytest.mark.parametrize(
    "options",
    [{}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "disk"}}],
    ids=str,
)
def test_sharded_weights_load(saved, batch, options, tmp_path):
    """On the disk, each weight is read when it is needed: `torch.device("meta")` holds its place."""
    model, folder = saved
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    if "disk" in str(options):
        options = options | {"offload_folder": str(tmp_path)}
    loaded = auto_class(model).from_pretrained(folder, **options)
    assert type(loaded) is type(model)
    assert_same(run(loaded, batch), run(model, batch))


def test_empty_model_is_filled_by_accelerate(saved, batch):
    model, folder = saved
    with init_empty_weights():
        empty = auto_class(model).from_config(AutoConfig.from_pretrained(folder))
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.tie_weights()
    filled = load_checkpoint_and_dispatch(empty, str(folder), device_map={"": "cpu"}).eval()
    assert_same(run(filled, batch), run(model, batch))


def test_model_on_the_meta_device_says_which_sizes_come_out(saved, batch):
    model, folder = saved
    with torch.device("meta"):
        empty = auto_class(model).from_config(AutoConfig.from_pretrained(folder))
    found = run(empty, {"input_ids": batch["input_ids"].to("meta")})
    expected = run(model, {"input_ids": batch["input_ids"]})
    assert [output.shape for output in found] == [output.shape for output in expected]
    assert all(output.is_meta for output in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(saved, batch, dtype):
    model, folder = saved
    loaded = auto_class(model).from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for found, expected in zip(run(loaded, batch), run(model, batch), strict=True):
        assert found.dtype == dtype
        assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")  # of the compiler, on things that are not ours
def test_compiled_model_computes_the_same(saved, batch):
    model, _ = saved
    torch.compiler.reset()  # the compiler counts how often it has compiled a line, whichever model it belonged to
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, batch), run(model, batch))
