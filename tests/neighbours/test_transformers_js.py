"""transformers.js in Node runs the exported files of a folder as transformers runs its weights.

It does not know the model_type "supershaper". Feature extraction does not need it; for the other tasks two lines tell
it that the files are those of a BERT: see `javascript/run.mjs`.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from sentence_transformers import SentenceTransformer
from transformers import pipeline

from supershaper_hf import (
    SuperShaperForMaskedLM,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
    save_for_hub,
)
from supershaper_hf.publish.export import add_exports


JAVASCRIPT = Path(__file__).parent / "javascript"
pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed"),
    pytest.mark.skipif(
        not (JAVASCRIPT / "node_modules").is_dir(),
        reason="transformers.js is not installed; `make test-neighbours` installs it where there is npm",
    ),
]
TEXT = "the big cat sat on the mat ."
MASKED = TEXT.replace("cat", "[MASK]")
QUESTION, CONTEXT = "the cat was on", "a small dog ran under the moon and the big cat sat on the mat ."
ENTAILMENT = {"num_labels": 3, "id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}
MODELS = {  # folder -> head, changes of the configuration
    "encoder": (SuperShaperModel, {}),
    "masked": (SuperShaperForMaskedLM, {}),
    "two_labels": (SuperShaperForSequenceClassification, {}),
    "entailment": (SuperShaperForSequenceClassification, ENTAILMENT),
    "tokens": (SuperShaperForTokenClassification, {"num_labels": 4}),
    "questions": (SuperShaperForQuestionAnswering, {}),
}
JOBS = {  # name -> task, folder, inputs, options
    "features": ("feature-extraction", "encoder", [[TEXT, "a dog"]], {"pooling": "mean"}),
    "fill-mask": ("fill-mask", "masked", [MASKED], {"top_k": 3}),
    "classes": ("text-classification", "two_labels", [TEXT], {"top_k": 2}),
    "zero-shot": ("zero-shot-classification", "entailment", [TEXT, ["cat", "moon"]], {"hypothesis_template": "a {} ."}),
    "tokens": ("token-classification", "tokens", [TEXT], {"ignore_labels": []}),
    "answers": ("question-answering", "questions", [QUESTION, CONTEXT], {}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with an exported subnet for every task."""
    from conftest import SPECIAL_TOKENS, WORDS
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    root = tmp_path_factory.mktemp("models")
    for name, (head, changes) in MODELS.items():
        subnet = tiny_model(head, vocab_size=len(tokenizer), **changes).extract_subnet([0, 20, 0])
        pooling = "mean" if head is SuperShaperModel else None
        add_exports(save_for_hub(subnet, root / name, tokenizer=tokenizer, pooling=pooling))
    return root


def in_node(root, jobs):
    """What transformers.js returns for some jobs: an output or the text of an error for each."""
    done = subprocess.run(
        ["node", "run.mjs"],
        cwd=JAVASCRIPT,
        input=json.dumps({"root": f"{root}/", "jobs": jobs}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def job(name, dtype="fp32", as_bert=True):
    task, model, inputs, options = JOBS[name]
    given = {"task": task, "model": model, "inputs": inputs, "options": options, "dtype": dtype}
    return given | {"as_bert": as_bert and name != "features"}


@pytest.fixture(scope="module")
def found(root):
    return dict(zip(JOBS, in_node(root, [job(name) for name in JOBS]), strict=True))


def in_python(root, name):
    task, model, inputs, _ = JOBS[name]
    return pipeline(task, model=str(root / model), device="cpu"), inputs


def test_features(root, found):
    expected = SentenceTransformer(str(root / "encoder"), device="cpu").encode([TEXT, "a dog"])
    np.testing.assert_allclose(found["features"], expected, atol=1e-5)


def test_masks(root, found):
    run, inputs = in_python(root, "fill-mask")
    expected = run(*inputs, top_k=3)
    assert [each["token_str"] for each in found["fill-mask"]] == [each["token_str"] for each in expected]
    np.testing.assert_allclose(*[[each["score"] for each in row] for row in (found["fill-mask"], expected)], atol=1e-6)


def test_classes(root, found):
    run, inputs = in_python(root, "classes")
    expected = {each["label"]: each["score"] for each in run(*inputs, top_k=2)}
    assert {each["label"]: each["score"] for each in found["classes"]} == pytest.approx(expected, abs=1e-6)


def test_zero_shot(root, found):
    run, inputs = in_python(root, "zero-shot")
    expected = run(*inputs, hypothesis_template="a {} .")
    assert found["zero-shot"]["labels"] == expected["labels"]
    np.testing.assert_allclose(found["zero-shot"]["scores"], expected["scores"], atol=1e-6)


def test_tokens(root, found):
    run, inputs = in_python(root, "tokens")
    expected = run(*inputs, ignore_labels=[])
    assert [(each["word"], each["entity"]) for each in found["tokens"]] == [
        (each["word"], each["entity"]) for each in expected
    ]
    np.testing.assert_allclose(*[[each["score"] for each in row] for row in (found["tokens"], expected)], atol=1e-6)


def test_answers(root, found, tokenizer):
    """Its version 5.23 has no pipeline for questions: the best span of the context, or the first token for none."""
    model = SuperShaperForQuestionAnswering.from_pretrained(root / "questions")
    inputs = tokenizer(QUESTION, CONTEXT, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    allowed = (inputs["token_type_ids"][0] == 1) & (inputs["input_ids"][0] != tokenizer.sep_token_id)
    allowed[0] = True
    start, end = (
        logits[0].masked_fill(~allowed, -torch.inf).softmax(-1) for logits in (outputs.start_logits, outputs.end_logits)
    )
    spans = torch.outer(start, end).triu()
    spans[0] = 0
    first, last = divmod(int(spans.argmax()), len(start))
    expected = {"answer": tokenizer.decode(inputs["input_ids"][0][first : last + 1]), "score": float(spans.max())}
    assert found["answers"]["score"] == pytest.approx(expected["score"], abs=1e-6)
    assert found["answers"]["answer"].split() == expected["answer"].split()


def test_quantised_file_is_the_one_called_q8(root):
    whole, quantised = in_node(root, [job("features"), job("features", dtype="q8")])
    assert 1e-4 < np.abs(np.subtract(whole, quantised)).max() < 0.2


def test_without_the_two_lines_the_error_is_as_documented(root):
    assert in_node(root, [job("classes", as_bert=False)]) == ["Error: Unsupported model type: supershaper"]
