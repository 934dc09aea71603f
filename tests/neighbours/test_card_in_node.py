"""The JavaScript in the card of a repository runs in Node, and computes what transformers computes."""

import json
import subprocess

import numpy as np
import pytest
from conftest import tiny_model
from sentence_transformers import SentenceTransformer
from test_transformers_js import JAVASCRIPT, MODELS, pytestmark  # noqa: F401, they are skipped for the same reasons
from transformers import pipeline

from supershaper_hf import SuperShaperModel, save_for_hub


LOCAL = """import { env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = ROOT;
"""


@pytest.mark.parametrize("name", ["encoder", "masked", "two_labels", "tokens", "questions"])
def test_code_in_the_card_runs(name, tokenizer, tmp_path):
    head, changes = MODELS[name]
    subnet = tiny_model(head, vocab_size=len(tokenizer), **changes).extract_subnet([0, 20, 0])
    encoder = {"pooling": "mean", "normalize": True} if head is SuperShaperModel else {}
    folder = save_for_hub(subnet, tmp_path / name, tokenizer=tokenizer, exports=("onnx",), **encoder)
    block = (folder / "README.md").read_text().split("```js\n")[1].split("```")[0]
    code = LOCAL.replace("ROOT", json.dumps(f"{tmp_path}/")) + block + "console.log(JSON.stringify(result));"
    command = ["node", "--input-type=module", "--eval", code]
    done = subprocess.run(command, cwd=JAVASCRIPT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    text = "The cat sat on the mat."
    if name == "encoder":
        found = list(result["ort_tensor"]["cpuData"].values()) if "ort_tensor" in result else result["data"]
        expected = SentenceTransformer(str(folder), device="cpu").encode([text])
        np.testing.assert_allclose(np.ravel(list(found)), expected[0], atol=1e-5)
    elif name == "questions":
        assert result["answer"] in text  # transformers has no such pipeline to compare with
    else:
        task = {"masked": "fill-mask", "two_labels": "text-classification", "tokens": "token-classification"}[name]
        expected = pipeline(task, model=str(folder), device="cpu")(
            text.replace("mat", "[MASK]") if name == "masked" else text
        )
        scores = [[each["score"] for each in row] for row in (result, expected)]
        assert len(scores[0]) == len(scores[1])
        np.testing.assert_allclose(*scores, atol=1e-5)
