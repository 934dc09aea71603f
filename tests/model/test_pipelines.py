"""Pipelines of transformers on a supernet and on a subnet, as `save_for_hub` writes them."""

import pytest
import torch
from conftest import run, tiny_model
from transformers import pipeline

from supershaper_hf import (
    SuperShaperForMaskedLM,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
    save_for_hub,
)


TEXTS = ["the cat sat on the mat .", "a big dog ran under the moon ."]


@pytest.fixture(params=["supernet", "subnet"])
def save(request, tokenizer, tmp_path):
    """Make a model and save it: return it and the path of its folder."""

    def save(model_class, **changes):
        model = tiny_model(model_class, vocab_size=len(tokenizer), **changes)
        model = model if request.param == "supernet" else model.extract_subnet([8, 0, 36])
        return model, str(save_for_hub(model, tmp_path / "model", tokenizer=tokenizer))

    return save


def test_fill_mask(save, tokenizer):
    model, folder = save(SuperShaperForMaskedLM)
    guesses = pipeline("fill-mask", model=folder, top_k=3)("the cat [MASK] on the mat .")
    logits = run(model, tokenizer("the cat [MASK] on the mat .", return_tensors="pt"))[0][0, 3]
    assert [guess["token"] for guess in guesses] == logits.topk(3).indices.tolist()
    assert [guess["score"] for guess in guesses] == pytest.approx(logits.softmax(-1).topk(3).values.tolist())


def test_text_classification(save, tokenizer):
    labels = {0: "indoors", 1: "outdoors", 2: "elsewhere"}
    model, folder = save(SuperShaperForSequenceClassification, id2label=labels)
    guesses = pipeline("text-classification", model=folder)(TEXTS, batch_size=2)
    for text, guess in zip(TEXTS, guesses, strict=True):
        logits = run(model, tokenizer(text, return_tensors="pt"))[0][0]
        assert guess["label"] == labels[logits.argmax().item()]
        assert guess["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)


def test_zero_shot_classification(save, tokenizer):
    """The score of a label is how far the text entails the hypothesis that names it, among all labels."""
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    label2id = {name: index for index, name in names.items()}
    model, folder = save(SuperShaperForSequenceClassification, id2label=names, label2id=label2id)
    classify = pipeline("zero-shot-classification", model=folder)
    found = classify(TEXTS[0], candidate_labels=["cat", "dog", "moon"], hypothesis_template="the {} .")
    hypotheses = [f"the {label} ." for label in found["labels"]]
    pairs = [tokenizer(TEXTS[0], hypothesis, return_tensors="pt") for hypothesis in hypotheses]
    entailment = torch.stack([run(model, pair)[0][0, 2] for pair in pairs])
    assert found["scores"] == pytest.approx(entailment.softmax(0).tolist(), abs=1e-5)
    assert found["scores"] == sorted(found["scores"], reverse=True)


def test_token_classification(save, tokenizer):
    labels = {0: "O", 1: "B-ANIMAL", 2: "I-ANIMAL"}
    model, folder = save(SuperShaperForTokenClassification, id2label=labels)
    found = pipeline("token-classification", model=folder, ignore_labels=[])(TEXTS[0])
    logits = run(model, tokenizer(TEXTS[0], return_tensors="pt"))[0][0, 1:-1]  # without [CLS] and [SEP]
    assert [word["entity"] for word in found] == [labels[index] for index in logits.argmax(-1).tolist()]
    assert [word["word"] for word in found] == TEXTS[0].split()
    assert [word["score"] for word in found] == pytest.approx(logits.softmax(-1).amax(-1).tolist(), abs=1e-5)


def test_feature_extraction(save, tokenizer):
    model, folder = save(SuperShaperModel)
    found = torch.tensor(pipeline("feature-extraction", model=folder)(TEXTS[0]))
    expected = run(model, tokenizer(TEXTS[0], return_tensors="pt"))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_transformers_has_no_pipeline_for_question_answering(save):
    """When it has one again, the card and docs/clients.md can name it."""
    _, folder = save(SuperShaperForQuestionAnswering)
    with pytest.raises(KeyError, match="question-answering has been removed from transformers"):
        pipeline("question-answering", model=folder)
