import re

import pytest
import torch
from conftest import assert_same, run, tiny_batch, tiny_config, tiny_model

from supershaper_hf import SuperShaperForMaskedLM, SuperShaperModel


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "supershaper_hf.convert.bert"]


def in_2021(supernet):
    """The state dict of a supernet under the names of the 2021 repository."""
    names = {
        name: re.sub(r"encoder\.(input|output)_bottleneck\.(\d+)", r"encoder.layer.\2.\1_bottleneck", name)
        for name in supernet.state_dict()
    }
    tensors = {names[name]: tensor.clone() for name, tensor in supernet.state_dict().items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
    tensors["cls.predictions.bias"] = tensors["cls.predictions.decoder.bias"]
    return tensors


def test_2021_names():
    names = in_2021(tiny_model())
    assert "bert.encoder.layer.2.input_bottleneck.weight" in names
    assert "bert.encoder.layer.0.output_bottleneck.bias" in names
    assert "bert.encoder.layer.1.attention.output.LayerNorm.weight" in names


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["state dict", "file"])
def test_2021_checkpoint_gives_the_supernet(prefix, kind, tmp_path):
    original = tiny_model()
    source = {prefix + name: tensor for name, tensor in in_2021(original).items()}
    if kind == "file":
        torch.save(source, tmp_path / "pytorch_model.bin")
        source = tmp_path / "pytorch_model.bin"
    supernet, info = SuperShaperForMaskedLM.from_original(source, tiny_config(), output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert not supernet.training
    assert_same(run(supernet, tiny_batch(), shape=[8, 0, 36]), run(original, tiny_batch(), shape=[8, 0, 36]), atol=0)


@pytest.mark.parametrize("shape", [[48, 48, 48], [8, 0, 36]], ids=str)
def test_2021_checkpoint_with_bottlenecks_by_width_computes_as_with_shared_ones(shape):
    original = tiny_model()
    config = tiny_config(bottlenecks="by_width")
    supernet, info = SuperShaperForMaskedLM.from_original(in_2021(original), config, output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert_same(run(supernet, tiny_batch(), shape=shape), run(original, tiny_batch(), shape=shape))


@pytest.mark.parametrize("left_out", ["cls.predictions.bias", "cls.predictions.decoder.bias"])
def test_2021_decoder_bias_has_two_names(left_out):
    original = tiny_model()
    source = in_2021(original)
    del source[left_out]
    supernet = SuperShaperForMaskedLM.from_original(source, tiny_config())
    assert_same(run(supernet, tiny_batch()), run(original, tiny_batch()), atol=0)


def test_2021_checkpoint_without_bottlenecks_is_reported(caplog):
    source = {name: tensor for name, tensor in in_2021(tiny_model()).items() if "layer.1.input_bottleneck" not in name}
    _, info = SuperShaperForMaskedLM.from_original(source, tiny_config(), output_loading_info=True)
    expected = ["bert.encoder.input_bottleneck.1.bias", "bert.encoder.input_bottleneck.1.weight"]
    assert info["missing_keys"] == expected
    assert str(expected) in warnings_of(caplog)[0]


def test_2021_checkpoint_gives_other_heads(caplog):
    original = tiny_model()
    supernet, info = SuperShaperModel.from_original(in_2021(original), tiny_config(), output_loading_info=True)
    assert info["missing_keys"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert_same(run(supernet, tiny_batch())[0], run(original.bert, tiny_batch())[0], atol=0)


def test_2021_checkpoint_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"do not fit the configuration: .*word_embeddings.weight \[61, 48\] instead"):
        SuperShaperForMaskedLM.from_original(in_2021(tiny_model()), tiny_config(vocab_size=67))


@pytest.mark.parametrize("kept", [slice(0), slice(5000), slice(-1000), slice(4, None)], ids=str)
def test_damaged_2021_checkpoint_is_named(kept, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(in_2021(tiny_model()), file)
    file.write_bytes(file.read_bytes()[kept])
    with pytest.raises(OSError, match=r"pytorch_model\.bin is truncated or is not a state dict"):
        SuperShaperForMaskedLM.from_original(file, tiny_config())


def test_missing_2021_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file .*pytorch_model\.bin"):
        SuperShaperForMaskedLM.from_original(tmp_path / "pytorch_model.bin", tiny_config())
