"""Exported files compute what PyTorch computes, under the names that servers expect, or do not appear."""

import dataclasses
import importlib.util
import site
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import HEADS, WORDS, randomize, tiny_bert_config, tiny_model
from publishing import contents
from sentence_transformers import SentenceTransformer
from transformers import BertModel
from transformers.exporters.exporter_onnx import OnnxExporter

from supershaper_hf import (
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
    save_for_hub,
)
from supershaper_hf.publish import comparison, export
from supershaper_hf.publish.export import add_exports
from supershaper_hf.publish.quantization import CANDIDATES, Candidate, choose, write_quantized


# Every shape drops a layer. Tracing a layer takes seconds: only one of the models has two.
SHAPES = {head: [0, 20, 0] for head in HEADS} | {SuperShaperModel: [8, 0, 36]}
OUTPUTS = {SuperShaperModel: ["last_hidden_state", "pooler_output"]} | {
    SuperShaperForQuestionAnswering: ["start_logits", "end_logits"]
}
PER_TOKEN = (
    SuperShaperModel, SuperShaperForMaskedLM, SuperShaperForTokenClassification, SuperShaperForQuestionAnswering
)  # fmt: skip
LONGEST = 24


@dataclasses.dataclass
class Export:
    """A model, the folder in which it is saved, and what `add_exports` has returned for it."""

    model: torch.nn.Module
    folder: Path
    before: dict[str, bytes]
    files: list[export.ExportedFile]

    def session(self, index):
        file = self.folder / self.files[index].path
        return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def graph(self, index):
        return onnx.load(self.folder / self.files[index].path)


def subnet_of(head):
    return tiny_model(head).extract_subnet(SHAPES[head])


@pytest.fixture(scope="module", params=HEADS, ids=lambda head: head.__name__.removeprefix("SuperShaper"))
def exported(request, tmp_path_factory):
    model = subnet_of(request.param)
    folder = save_for_hub(model, tmp_path_factory.mktemp("export") / "model")
    before = contents(folder)
    return Export(model, folder, before, add_exports(folder))


def random_batch(model, batch, length):
    """Random tokens of both types. Every sequence but the first ends in padding, if it is long enough."""
    size = (batch, 3, length) if isinstance(model, SuperShaperForMultipleChoice) else (batch, length)
    generator = np.random.default_rng(batch * length)
    mask = np.ones(size, dtype=np.int64)
    mask[1:, ..., length // 2 + 1 :] = 0
    return {
        "input_ids": generator.integers(0, 61, size),
        "attention_mask": mask,
        "token_type_ids": generator.integers(0, 2, size),
    }


@torch.no_grad()
def pytorch(model, inputs):
    return [output.numpy() for output in model(**{name: torch.tensor(inputs[name]) for name in inputs}).values()]


# ONNX


@pytest.mark.parametrize("length", [1, 7, LONGEST])
def test_onnx_equals_pytorch_at_every_size(exported, length):
    session = exported.session(0)
    for batch in (1, 3, 8):
        inputs = random_batch(exported.model, batch, length)
        for found, expected in zip(session.run(None, inputs), pytorch(exported.model, inputs), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_names_are_those_that_servers_expect(exported):
    choices = ["num_choices"] * isinstance(exported.model, SuperShaperForMultipleChoice)
    for index in range(2):
        session = exported.session(index)
        assert [(each.name, each.shape) for each in session.get_inputs()] == [
            (name, ["batch_size", *choices, "sequence_length"])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        ]
        assert [each.name for each in session.get_outputs()] == OUTPUTS.get(type(exported.model), ["logits"])
        assert session.get_outputs()[0].shape[0] == "batch_size"


def test_folder_gets_two_files_and_keeps_the_others(exported):
    after = contents(exported.folder)
    added = {file.path: file.size for file in exported.files}
    assert list(added) == ["onnx/model.onnx", "onnx/model_quantized.onnx"]
    assert {name: len(data) for name, data in after.items() if name not in exported.before} == added
    assert {name: after[name] for name in exported.before} == exported.before


def test_files_name_no_place_of_this_machine(exported):
    places = [str(Path(__file__).parents[2]), site.getsitepackages()[0], str(exported.folder), ".py"]
    for file in exported.files:
        data = (exported.folder / file.path).read_bytes()
        assert [place for place in places if place.encode() in data] == []


def test_what_is_reported_of_onnx_is_true(exported):
    file = exported.files[0]
    (opset,) = [each.version for each in exported.graph(0).opset_import if not each.domain]
    assert (file.format, file.settings) == ("onnx", {"opset": opset})
    assert 0 <= file.difference < 1e-5


# int8


def test_quantised_weights_overflow_on_no_processor(exported):
    """Two products of an activation (0 to 255) and a weight fit 16 bits, or the weights are unsigned."""
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in exported.graph(1).graph.initializer}
    maps = [weights[node.input[1]] for node in exported.graph(1).graph.node if node.op_type == "MatMulInteger"]
    linear = [module for module in exported.model.modules() if isinstance(module, torch.nn.Linear)]
    bottlenecks = [name for name, _ in exported.model.named_modules() if "_bottleneck." in name]
    in_fp32 = len(bottlenecks) * exported.files[1].settings["fp32_bottlenecks"]
    assert len(maps) == len(linear) - in_fp32
    assert all(each.dtype == np.uint8 or 2 * 255 * np.abs(each.astype(int)).max() < 2**15 for each in maps)


def test_what_is_reported_of_int8_is_true(exported):
    """Padding does not count. The vectors of tokens are compared one by one, everything else at once."""
    file = exported.files[1]
    choices = (2,) * isinstance(exported.model, SuperShaperForMultipleChoice)
    inputs = comparison.random_inputs(exported.model.config, (12, *choices, LONGEST), seed=0)
    per_token = isinstance(exported.model, PER_TOKEN)
    differences, cosines = [], []
    for found, expected in zip(exported.session(1).run(None, inputs), pytorch(exported.model, inputs), strict=True):
        rows = np.stack([found, expected])
        if per_token and expected.shape[:2] == inputs["attention_mask"].shape:
            rows = rows[:, inputs["attention_mask"] > 0]
        rows = rows if expected.ndim == 3 else rows.reshape(2, 1, -1)
        differences.append(np.abs(rows[0] - rows[1]).max())
        cosines.append((rows.prod(0).sum(-1) / np.linalg.norm(rows, axis=-1).prod(0)).mean())
    assert file.format == "int8"
    assert file.difference == pytest.approx(max(differences), rel=1e-3)
    assert file.cosine == pytest.approx(min(cosines), abs=1e-5)
    assert 0.99 < file.cosine < 1
    assert file.size < exported.files[0].size


def fake(cosine, size, folder):
    """A candidate with this cosine and size, which stands at the next place in the order."""
    file = folder / f"{len(list(folder.iterdir()))}.onnx"
    file.write_bytes(bytes(size))
    return Candidate(file, {}, 0.0, cosine)


@pytest.mark.parametrize(
    ("cosines", "sizes", "chosen"),
    [
        ([0.99, 0.991, 0.989, 0.991], [100] * 4, 0),  # all are as good: the fastest
        ([0.98, 0.995, 0.99, 0.996], [100, 114, 100, 114], 1),  # the fastest that is as good as the best
        ([0.98, 0.99, 0.985, 0.996], [100, 114, 100, 114], 3),
        ([0.98, 0.999, 0.981, 0.999], [100, 116, 100, 116], 0),  # too large
        ([0.98, 0.999, 0.983, 0.999], [100, 116, 100, 116], 2),
    ],
)
def test_fastest_of_the_best_that_are_small_is_chosen(cosines, sizes, chosen, tmp_path):
    candidates = [fake(cosine, size, tmp_path) for cosine, size in zip(cosines, sizes)]
    assert choose(candidates) is candidates[chosen]


@pytest.mark.parametrize("exported", [SuperShaperModel], indirect=True, ids=["Model"])
@pytest.mark.parametrize("settings", CANDIDATES, ids=str)
def test_every_setting_does_what_it_says(settings, exported, tmp_path):
    write_quantized(exported.folder / exported.files[0].path, tmp_path / "quantised.onnx", settings)
    graph = onnx.load(tmp_path / "quantised.onnx").graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    maps = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMulInteger"}
    assert any("_bottleneck" in name for name in maps) is not settings["fp32_bottlenecks"]
    for name in maps.values():
        assert weights[name].dtype.name == settings["weights"].removeprefix("Q").lower()
        assert weights[name.replace("_quantized", "_scale")].shape == weights[name].shape[1:]  # a scale per channel


# Sentence encoders


def test_sentence_encoder_exports_token_states(tokenizer, tmp_path):
    """Whatever head and pooler the model has. The exported file is pooled as sentence-transformers pools."""
    model = tiny_model(SuperShaperForSequenceClassification, vocab_size=len(tokenizer)).extract_subnet([0, 20, 0])
    folder = save_for_hub(model, tmp_path / "encoder", tokenizer=tokenizer, pooling="mean")
    texts = ["the big cat sat on the mat .", "a dog", " ".join(WORDS)]
    before = SentenceTransformer(str(folder), device="cpu").encode(texts)
    files = add_exports(folder)
    np.testing.assert_array_equal(SentenceTransformer(str(folder), device="cpu").encode(texts), before)
    session = onnxruntime.InferenceSession(folder / files[0].path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["last_hidden_state"]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="np"))
    (states,) = session.run(None, inputs)
    mask = inputs["attention_mask"][..., None]
    np.testing.assert_allclose((states * mask).sum(1) / mask.sum(1), before, atol=1e-5)


# What is refused


def test_file_that_computes_something_else_is_refused(exported, monkeypatch):
    program = onnx_ir.load(exported.folder / exported.files[0].path)
    (bias,) = [each for name, each in program.graph.initializers.items() if name.endswith("embeddings.LayerNorm.bias")]
    bias.const_value = onnx_ir.tensor(bias.const_value.numpy() + 0.1 * np.arange(48, dtype=np.float32))
    monkeypatch.setattr(OnnxExporter, "export", lambda *arguments: SimpleNamespace(program=program))
    before = contents(exported.folder)
    with pytest.raises(ValueError, match=r"model\.onnx differs from PyTorch by [\d.]+ on inputs of size \(1, .*1\)"):
        add_exports(exported.folder)
    assert contents(exported.folder) == before
    assert [path.name for path in exported.folder.iterdir() if path.name.startswith(".")] == []


def test_missing_package_is_named_with_the_command(monkeypatch, tmp_path):
    folder = save_for_hub(subnet_of(SuperShaperModel), tmp_path / "model")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ImportError, match=r"onnx, int8 needs onnxscript: pip install 'supershaper-hf\[export\]'"):
        add_exports(folder)


def test_unknown_format_and_other_models_are_refused(tmp_path):
    folder = save_for_hub(subnet_of(SuperShaperModel), tmp_path / "model")
    with pytest.raises(ValueError, match=r"formats='tflite' is unknown\. Allowed: 'onnx', 'int8', 'openvino'"):
        add_exports(folder, ("onnx", "tflite"))
    randomize(BertModel(tiny_bert_config())).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"bert: architectures='BertModel' is unknown\. Allowed: 'SuperShaper"):
        add_exports(tmp_path / "bert")
    with pytest.raises(FileNotFoundError, match=r"nothing is not a folder\. Save the model there with save_for_hub"):
        add_exports(tmp_path / "nothing")
