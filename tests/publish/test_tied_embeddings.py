"""Of a masked LM, an 8-bit file holds one table of words, which is looked up and multiplied with as integers."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from supershaper_hf.publish.quantization import CANDIDATES, onnx_session, write_quantized


WORDS, WIDTH = 70, 16
IDS = np.array([[3, 69, 0], [1, 1, 42]])


def masked_lm(file, tied):
    """Write an ONNX file that looks words up and predicts them with the same table, or with another one."""
    generator = np.random.default_rng(0)
    # Words of different sizes: one scale for all of them would round the small ones to nothing.
    tables = [
        generator.normal(size=(WORDS, WIDTH)) * np.geomspace(0.01, 1, WORDS)[:, None] for _ in range(1 if tied else 2)
    ]
    tables = [table.astype(np.float32) for table in tables]
    names = ["table", "decoder"][: len(tables)]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["states"], name="embeddings.Gather"),
        helper.make_node("Transpose", [names[-1]], ["transposed"], name="decoder.Transpose", perm=[1, 0]),
        helper.make_node("Tanh", ["states"], ["encoded"], name="encoder.Tanh"),
        helper.make_node("MatMul", ["encoded", "transposed"], ["logits"], name="decoder.MatMul"),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", size])
        for name, size in (("states", WIDTH), ("logits", WORDS))
    ]
    weights = [numpy_helper.from_array(table, name) for table, name in zip(tables, names)]
    graph = helper.make_graph(nodes, "masked_lm", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    return tables[0], tables[-1]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "not tied"])
@pytest.mark.parametrize("settings", CANDIDATES[::2], ids=lambda settings: settings["weights"])
def test_every_table_is_stored_once_and_multiplied_as_integers(settings, tied, tmp_path):
    words, decoder = masked_lm(tmp_path / "model.onnx", tied)
    write_quantized(tmp_path / "model.onnx", tmp_path / "quantised.onnx", settings)
    model = onnx.load(tmp_path / "quantised.onnx")
    onnx.checker.check_model(model)
    tables = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) == WORDS * WIDTH]
    assert len(tables) == (1 if tied else 2)
    assert {tensor.data_type for tensor in tables} <= {TensorProto.INT8, TensorProto.UINT8}
    assert [node.op_type for node in model.graph.node].count("MatMulInteger") == 1

    outputs = onnx_session(tmp_path / "quantised.onnx")({"ids": IDS})
    expected = np.tanh(words[IDS]) @ decoder.T
    assert np.abs(outputs["logits"] - expected).max() < 0.02 * np.abs(expected).max()
    error = np.abs(outputs["states"] - words[IDS]).max(-1)
    largest = np.abs(words[IDS]).max(-1)
    if tied:  # every word has a scale of its own: half a step of 127, or of 63 where the weights have 7 bits
        assert np.all(error <= largest / (2 * 63))
    assert np.all(error > 0)
