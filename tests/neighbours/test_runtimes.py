"""OpenVINO and fastembed run the exported files of a folder as PyTorch runs its weights."""

import numpy as np
import pytest
from conftest import HEADS, WORDS, run, tiny_batch, tiny_model
from sentence_transformers import SentenceTransformer

from supershaper_hf import SuperShaperModel, save_for_hub
from supershaper_hf.publish.export import add_exports


TEXTS = ["the big cat sat on the mat .", "a dog", " ".join(WORDS * 3)]  # the last one has to be cut
SHAPE = [8, 0, 36]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__.removeprefix("SuperShaper"))
def test_openvino_equals_pytorch_in_32_bits(head, tmp_path):
    """In its default precision, bfloat16 where the processor has it, the difference is the one that is reported."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed; `make test-neighbours` installs it")
    model = tiny_model(head).extract_subnet(SHAPE)
    folder = save_for_hub(model, tmp_path / "model")
    (file,) = add_exports(folder, ["openvino"])
    assert sorted(path.name for path in (folder / "openvino").iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    assert not (folder / "onnx").exists()
    assert file.size == sum(path.stat().st_size for path in (folder / "openvino").iterdir())

    core = openvino.Core()
    exact = core.compile_model(folder / file.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    by_default = core.compile_model(folder / file.path, "CPU")
    for batch, length in [(1, 4), (3, 7), (8, 24)]:
        inputs = tiny_batch(head, batch, length)
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        expected = [tensor.numpy() for tensor in run(model, inputs)]
        for found, right in zip(exact(arrays).values(), expected, strict=True):
            np.testing.assert_allclose(found, right, atol=1e-5)
        if file.settings["default_precision"] == "f32":
            assert file.settings["default_difference"] < 1e-5
        else:
            differences = [np.abs(a - b).max() for a, b in zip(by_default(arrays).values(), expected, strict=True)]
            assert 1e-5 < max(differences) < 20 * file.settings["default_difference"]


@pytest.fixture
def encoder(tokenizer, tmp_path):
    subnet = tiny_model(SuperShaperModel, vocab_size=len(tokenizer)).extract_subnet([0, 20, 0])
    folder = save_for_hub(subnet, tmp_path / "encoder", tokenizer=tokenizer, pooling="mean", normalize=True)
    add_exports(folder)
    return folder


@pytest.mark.parametrize(("file", "tolerance"), [("onnx/model.onnx", 1e-5), ("onnx/model_quantized.onnx", 0.05)])
def test_fastembed_gives_the_embeddings_of_sentence_transformers(file, tolerance, encoder):
    reason = "fastembed is not installed; `make test-neighbours` installs it, without its pins"
    fastembed = pytest.importorskip("fastembed", reason=reason)
    from fastembed.common.model_description import ModelSource, PoolingType

    name = f"user/{file}"
    fastembed.TextEmbedding.add_custom_model(
        model=name,
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="user/encoder"),
        dim=48,
        model_file=file,
    )
    model = fastembed.TextEmbedding(name, specific_model_path=str(encoder))
    expected = SentenceTransformer(str(encoder), device="cpu").encode(TEXTS)
    found = np.stack(list(model.embed(TEXTS)))
    np.testing.assert_allclose(found, expected, atol=tolerance)
