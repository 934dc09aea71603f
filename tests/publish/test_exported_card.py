"""The card of a repository with exports lists the files, and its code runs in ONNX Runtime."""

import json
import re

import numpy as np
import pytest
from conftest import run, tiny_model
from publishing import IGNORE_UPLOADS, SHAPE, contents, files
from test_card import HOSTILE

from supershaper_hf import SuperShaperForMultipleChoice, SuperShaperModel, push_folder, save_for_hub
from supershaper_hf.publish import export
from supershaper_hf.publish.card import megabytes, model_card
from supershaper_hf.publish.export import ExportedFile


pytestmark = IGNORE_UPLOADS


def python_blocks(readme):
    return re.findall(r"```python\n(.+?)```", readme, re.DOTALL)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_code_for_onnxruntime_computes_the_embedding_of_sentence_transformers(pooling, server, tokenizer, tmp_path):
    model = tiny_model(SuperShaperModel).extract_subnet([0, 20, 0])
    options = {"pooling": pooling, "normalize": pooling == "cls", "exports": ("onnx", "int8")}
    save_for_hub(model, tmp_path / "name", tokenizer=tokenizer, repo_id="user/name", **options)
    push_folder(tmp_path / "name", "user/name")
    published = files(server)
    assert published == contents(tmp_path / "name")
    readme = published["README.md"].decode()
    rows = {cells[1]: cells for row in readme.splitlines() if (cells := row.split(" | "))[0].startswith("| `onnx")}
    assert list(rows) == ["onnx", "int8"]
    for cells, path in zip(rows.values(), ("onnx/model.onnx", "onnx/model_quantized.onnx")):
        assert cells[0] == f"| `{path}`"
        assert cells[2] == megabytes(len(published[path]))
        assert float(cells[3]) < {"onnx": 1e-4, "int8": 1}[cells[1]]
    variables = {}
    exec(python_blocks(readme)[-1], variables)
    (states,) = run(model, tokenizer("The cat sat on the mat.", return_tensors="pt"))[0].numpy()
    expected = states.mean(0) if pooling == "mean" else states[0] / np.linalg.norm(states[0])
    np.testing.assert_allclose(variables["embedding"][0], expected, atol=1e-4)


def test_only_files_that_are_there_are_shown(monkeypatch):
    written = ExportedFile("onnx/model_quantized.onnx", "int8", 1234, 0.25, 0.99)
    readme = str(model_card(tiny_model().extract_subnet(SHAPE), "user/name", exports=[written]))
    assert readme.count("onnx/model_quantized.onnx") == 2
    assert 'dtype: "q8"' in readme
    assert "onnx/model.onnx" not in readme
    compile(python_blocks(readme)[-1], "card", "exec")
    for without in ({"exports": []}, {"exports": [ExportedFile("openvino/m.xml", "openvino", 9, 0.0)]}):
        assert "onnxruntime" not in str(model_card(tiny_model(), "user/name", **without))
    model = tiny_model(SuperShaperForMultipleChoice)  # its inputs have an axis of choices, which the example lacks
    assert "onnxruntime" not in str(model_card(model, "user/name", exports=[written]))


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_breaks_the_code_for_javascript(name):
    written, blocks = ExportedFile("onnx/model.onnx", "onnx", 1234, 0.25), []
    for text in ("name", name):
        readme = str(model_card(tiny_model(), text, mask_token=text, exports=[written]))
        assert "\n\n\n" not in readme.split("\n---\n")[-1]
        blocks.append(readme.split("```js\n")[1].split("\n```\n")[0])
    assert blocks[1].count("\n") == blocks[0].count("\n") == 5
    assert blocks[1].isascii()
    literals = [json.loads(text) for text in re.findall(r'"(?:[^"\\]|\\.)*"', blocks[1])]
    assert [text for text in literals if name in text] == [name, name, f"The cat sat on the {name}."]


def test_export_that_fails_leaves_no_folder(subnet, tokenizer, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("differs from PyTorch")

    monkeypatch.setattr(export, "check_export", refuse)
    with pytest.raises(ValueError, match="differs from PyTorch"):
        save_for_hub(subnet, tmp_path / "name", tokenizer=tokenizer, exports=("onnx",))
    assert list(tmp_path.iterdir()) == []
