"""Named entities: the words of a file and the labels of tokens correspond, and scores are those of seqeval."""

import random
import warnings

import numpy as np
import pytest
import seqeval.metrics
from conftest import SPECIAL_TOKENS, WORDS, tiny_config
from datasets import Dataset
from transformers import BertTokenizer, EvalPrediction, Trainer, TrainingArguments

from supershaper_hf import SuperShaperForTokenClassification
from supershaper_hf.finetuning.entities import SeqevalMetric, entity_task, tokenize_sentences
from supershaper_hf.finetuning.labelled_words import SENTENCES


NUMBERS = {"B-A": 0, "I-A": 1, "O": 2}
TAGS = ["O", "O", "B-A", "I-A", "B-B", "I-B", "E-A", "E-B", "S-A", "B", "I", "B-C-D", "I-C-D"]


@pytest.fixture
def tokenizer():
    """Makes pieces: `cats` is `cat ##s`."""
    vocabulary = [*SPECIAL_TOKENS, *WORDS, "##s", "##ss", "-"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, model_max_length=24)


def random_sentences(count, seed=0):
    generator = random.Random(seed)
    words = [*WORDS, "cats", "dogss", "mat-cat", "unknown", "\u200b", "Ä", "---------------"]
    rows = []
    for _ in range(count):
        tokens = generator.choices(words, k=generator.randint(1, 30))
        rows.append({"tokens": tokens, "labels": generator.choices(list(NUMBERS), k=len(tokens))})
    return rows


@pytest.mark.parametrize("truncation_side", ["left", "right"])
@pytest.mark.parametrize("max_length", [8, 24])
def test_every_word_has_its_label_once_at_its_first_token(tokenizer, max_length, truncation_side):
    tokenizer.truncation_side = truncation_side
    for sentence in random_sentences(40):
        data = Dataset.from_list([sentence], features=SENTENCES)
        sequences = list(tokenize_sentences(data, tokenizer, NUMBERS, max_length))
        assert max(len(row["input_ids"]) for row in sequences) <= max_length
        if truncation_side == "left":
            sequences.reverse()
        tokens, expected = [], []
        for word, label in zip(sentence["tokens"], sentence["labels"], strict=True):
            pieces = tokenizer.tokenize(word) or ["[UNK]"]
            tokens += pieces
            expected += [NUMBERS[label]] + [-100] * (len(pieces) - 1)
        special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
        pairs = [pair for row in sequences for pair in zip(row["input_ids"], row["labels"], strict=True)]
        assert {label for token, label in pairs if token in special} == {-100}
        assert [pair for pair in pairs if pair[0] not in special] == list(
            zip(tokenizer.convert_tokens_to_ids(tokens), expected, strict=True)
        )


def test_labels_are_sorted_whatever_the_order_of_the_files(tokenizer, tmp_path):
    (tmp_path / "a.conll").write_text("the O\ncat I-PER\n\ndog B-PER\n")
    (tmp_path / "b.conll").write_text("mat B-LOC\n")
    (tmp_path / "c.conll").write_text("mat O\n\n\n")
    files = [tmp_path / name for name in ("a.conll", "b.conll", "c.conll")]
    expected = {0: "B-LOC", 1: "B-PER", 2: "I-PER", 3: "O"}
    for order in (files, files[::-1]):
        task = entity_task(tokenizer, *order, max_length=8)
        assert task.config["id2label"] == expected
        assert task.config["label2id"] == {label: number for number, label in expected.items()}
        assert task.config["num_labels"] == 4
        assert list(task.evaluation) == ["validation", "test"]
    assert [len(data) for data in (task.train, *task.evaluation.values())] == [1, 1, 2]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_labels_are_padded_with_the_tokens(tokenizer, tmp_path, padding_side):
    tokenizer.padding_side = padding_side
    (tmp_path / "a.conll").write_text("the O\ncats B-PER\n\ndog B-PER\n")
    task = entity_task(tokenizer, tmp_path / "a.conll", tmp_path / "a.conll", max_length=8)
    batch = task.collator([task.train[0], task.train[1]])
    dog = batch["input_ids"][1].tolist().index(tokenizer.convert_tokens_to_ids("dog"))
    assert dog == (1 if padding_side == "right" else 3)
    assert batch["labels"][1, dog] == 0
    assert (batch["labels"] != -100).sum() == 3


def test_scores_by_hand(tokenizer, tmp_path):
    """All 3 entities are predicted, and one that is none: precision 3/4, recall 1."""
    (tmp_path / "a.conll").write_text("the B-PER\ncats I-PER\nsat O\nmoon B-LOC\n\na O\ndog B-LOC\nran O\n")
    task = entity_task(tokenizer, tmp_path / "a.conll", tmp_path / "a.conll", max_length=8)
    assert list(task.config["id2label"].values()) == ["B-LOC", "B-PER", "I-PER", "O"]
    # [CLS] the cat ##s sat moon [SEP]   the tokens without labels predict what would spoil the scores
    predicted = [[0, 1, 2, 0, 0, 0, 0], [0, 3, 0, 3, 0, 0, 0]]
    labels = [row["labels"] + [-100] * (7 - len(row["labels"])) for row in task.evaluation["validation"]]
    logits = np.eye(4)[predicted]
    scores = task.compute_metrics(EvalPrediction(predictions=logits, label_ids=np.array(labels)))
    # Predicted are PER(the cats), LOC(sat), LOC(moon) and LOC(dog).
    assert scores == pytest.approx(
        {"precision": 3 / 4, "recall": 1.0, "f1": 6 / 7, "accuracy": 6 / 7, "f1_LOC": 4 / 5, "f1_PER": 1.0}
    )
    assert task.score in scores
    more = (logits, np.zeros(3))  # of a model that also returns its hidden states
    assert task.compute_metrics(EvalPrediction(predictions=more, label_ids=np.array(labels))) == scores


def test_seqeval_has_the_same_scores():
    generator = random.Random(0)
    metric = SeqevalMetric(keep_in_memory=True)
    for _ in range(100):
        references = [generator.choices(TAGS, k=generator.randint(1, 9)) for _ in range(generator.randint(1, 4))]
        predictions = [
            [tag if generator.random() < 0.7 else generator.choice(TAGS) for tag in row] for row in references
        ]
        found = metric.compute(predictions=predictions, references=references)
        with warnings.catch_warnings():  # of ratios over nothing
            warnings.simplefilter("ignore")
            overall = {
                f"overall_{name}": getattr(seqeval.metrics, f"{name}_score")(references, predictions)
                for name in ("precision", "recall", "f1", "accuracy")
            }
            report = seqeval.metrics.classification_report(references, predictions, output_dict=True)
        by_kind = {kind: scores for kind, scores in report.items() if not kind.endswith(" avg")}
        assert found.keys() == overall.keys() | by_kind.keys()
        assert {name: found[name] for name in overall} == pytest.approx(overall)
        for kind, scores in by_kind.items():
            names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "number": "support"}
            assert found[kind] == pytest.approx({name: scores[other] for name, other in names.items()})


def test_sentences_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="same number of labels in every sentence"):
        SeqevalMetric(keep_in_memory=True).compute(predictions=[["O"], ["O", "O"]], references=[["O", "O"], ["O"]])


def test_tokenizer_that_knows_no_words_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="cannot say where in the text a token stands"):
        entity_task(tokenizer, tmp_path / "a.conll", tmp_path / "a.conll")


@pytest.mark.parametrize("length", [7, 25])
def test_length_that_the_tokenizer_cannot_make_is_refused(tokenizer, tmp_path, length):
    with pytest.raises(ValueError, match=f"max_length={length} must be between 8 and 24"):
        entity_task(tokenizer, tmp_path / "a.conll", tmp_path / "a.conll", max_length=length)


def test_trainer_learns_the_labels_by_heart(tokenizer, tmp_path):
    """Sentences that are divided and padded reach the scores of `Trainer` with their labels."""
    lines = ["cats B-PER", "dogs I-PER", "ran O", "the O", "moon B-LOC", "big O", "a O", "mat B-LOC", "sat O"]
    (tmp_path / "a.conll").write_text("\n".join(lines) + "\n\n" + "\n".join(lines[3:6]) + "\n")
    task = entity_task(tokenizer, tmp_path / "a.conll", tmp_path / "a.conll", max_length=8)
    config = tiny_config(num_hidden_layers=1, **task.config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=40,
        learning_rate=5e-3,
        per_device_eval_batch_size=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=SuperShaperForTokenClassification(config),
        args=arguments,
        train_dataset=task.train,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
    )
    trainer.train()
    figures = trainer.evaluate(task.evaluation["validation"])
    assert figures["eval_f1"] == figures["eval_f1_LOC"] == figures["eval_accuracy"] == 1.0
