"""Questions: labels and answers are spans of the context, whatever the windows, the padding and the alphabet."""

import random

import numpy as np
import pytest
from conftest import SPECIAL_TOKENS, WORDS, tiny_config
from datasets import Dataset
from transformers import BertTokenizer, EvalPrediction, Trainer, TrainingArguments

from supershaper_hf import SuperShaperForQuestionAnswering
from supershaper_hf.finetuning.questions import (
    QuestionScorer,
    best_spans,
    check_lengths,
    cut_questions,
    make_windows,
    question_task,
)
from supershaper_hf.finetuning.squad import EXAMPLES


CONTEXT = "The cat sat on the mat and a dog ran under the big moon."


@pytest.fixture
def tokenizer():
    """Makes pieces: `cats` is `cat ##s`; drops accents and zero-width spaces."""
    vocabulary = [*SPECIAL_TOKENS, *WORDS, "##s", "zurich", "ᄒ", "##ᅡ", "##ᆫ", "##ᄀ", "##ᅳ", "##ᆯ", "-", "who", "?"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, model_max_length=64)


def example(context=CONTEXT, *texts, question="who sat?", starts=None, name="0"):
    starts = [context.index(text) for text in texts] if starts is None else starts
    return {"id": name, "question": question, "context": context, "answers": {"text": texts, "answer_start": starts}}


def windows_of(tokenizer, *examples, max_length=16, stride=3, question=6):
    return make_windows(Dataset.from_list(list(examples), features=EXAMPLES), tokenizer, max_length, stride, question)


def labelled_text(window, context):
    """The characters between the labels of a window; None for [CLS]."""
    first, last = window["start_positions"], window["end_positions"]
    if first == window["null_position"]:
        assert last == first
        return None
    return context[window["offsets"][first][0] : window["offsets"][last][1]]


# Windows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [8, 13, 64])
def test_every_window_with_the_whole_answer_has_its_labels_and_no_other_has(tokenizer, side, length):
    tokenizer.truncation_side = tokenizer.padding_side = side
    generator = random.Random(length)
    seen = set()
    for _ in range(25):
        words = generator.choices(WORDS[:-1], k=25)
        first = generator.randrange(25)
        last = min(24, first + generator.randrange(4))
        context, answer = " ".join(words), " ".join(words[first : last + 1])
        begin = len(" ".join(words[:first])) + bool(first)
        found = windows_of(tokenizer, example(context, answer, starts=[begin]), max_length=length, stride=1, question=3)
        for window in found:
            pairs = [pair for pair in window["offsets"] if pair[0] >= 0]
            inside = pairs[0][0] <= begin and begin + len(answer) <= pairs[-1][1]
            seen.add(inside)
            if not inside:
                assert labelled_text(window, context) is None
                continue
            assert labelled_text(window, context) == answer
            assert window["offsets"][window["start_positions"]][0] == begin  # this occurrence, not another one
        covered = {pair[0] for window in found for pair in window["offsets"]} - {-1}
        assert len(covered) == 25  # every word is in some window
    assert True in seen
    assert (False in seen) == (length < 64)


def test_answer_that_is_cut_off_by_a_window(tokenizer):
    """13 tokens; [CLS] who [SEP] and [SEP] leave 7 a window, of which 4 are new in the next one."""
    context = "the cat sat on the mat and a dog ran under the moon"
    found = list(windows_of(tokenizer, example(context, "mat and a dog", question="who"), max_length=11, question=1))
    texts = [[context[first:last] for first, last in window["offsets"] if first >= 0] for window in found]
    assert texts == [context.split()[start : start + 7] for start in (0, 4)] + [context.split()[8:]]
    assert [labelled_text(window, context) for window in found] == [None, "mat and a dog", None]


@pytest.mark.parametrize(
    ("context", "answer", "text"),
    [
        ("the cats sat", "ts s", "cats sat"),  # the answer begins and ends within a word: whole tokens
        ("the cats sat", "cat", "cat"),
        ("the cats sat", "the cats ", "the cats"),
        ("a big Zürich mat", "Zürich", "Zürich"),
        ("a big Zu\u0308rich mat", "Zu\u0308rich", "Zu\u0308rich"),
        ("a 한글 mat", "한글", "한글"),
        ("the \u200b cat", "\u200b cat", "cat"),
        ("the cat \u200b", "cat \u200b", "cat"),
        ("the \U0001f408 sat", "\U0001f408", "\U0001f408"),
        ("the cat", "\u200b", None),
        ("the cat", "", None),
    ],
)
def test_labels_are_the_tokens_of_the_characters_of_the_answer(tokenizer, context, answer, text):
    if answer not in context:
        context += answer
    (window,) = windows_of(tokenizer, example(context, answer))
    assert labelled_text(window, context) == text


def test_first_answer_counts_and_no_answer_is_the_first_token(tokenizer):
    examples = example(CONTEXT, "cat", "dog"), example(CONTEXT)
    found = windows_of(tokenizer, *examples, max_length=64)
    assert [labelled_text(window, CONTEXT) for window in found] == ["cat", None]
    assert found["example"][:] == [0, 1]
    assert set(found.column_names) >= {"input_ids", "attention_mask", "token_type_ids"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_questions_are_cut_and_empty_texts_have_a_window(tokenizer, side):
    tokenizer.truncation_side = side
    long = "who cats " * 30
    found = windows_of(
        tokenizer, example(CONTEXT, "cat", question=long), example("", question="  who? "), example(" ", question="")
    )
    questions = [tokenizer.decode(window["input_ids"]).split("[SEP]")[0].removeprefix("[CLS]") for window in found]
    assert {question.strip() for question in questions[:-2]} == {"who cats who cats"}
    assert [question.strip() for question in questions[-2:]] == ["who?", ""]
    assert [window["start_positions"] for window in found][-2:] == [0, 0]


def test_white_space_around_a_question_is_left_out(tokenizer):
    """Tokenizers of other encoders make a token of it."""
    assert cut_questions(["  who sat?\n", "who cats\n", "\n"], tokenizer, 4) == ["who sat?", "who cats", ""]


def test_windows_name_their_question_however_many_there_are(tokenizer):
    """`datasets` tokenises a thousand at a time."""
    found = windows_of(tokenizer, *(example("cat", name=str(number)) for number in range(1002)))
    assert found["example"][:] == list(range(1002))


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_the_right(tokenizer, side, tmp_path):
    tokenizer.padding_side = side
    file = write(tmp_path, example("the cat", "cat"), example(CONTEXT, "dog", name="1"))
    task = question_task(tokenizer, file, file, max_length=32)
    batch = task.collator([task.train[0], task.train[1]])
    assert batch["input_ids"][:, 0].tolist() == [tokenizer.cls_token_id] * 2
    ids = batch["input_ids"].gather(1, batch["start_positions"].unsqueeze(1)).flatten()
    assert tokenizer.convert_ids_to_tokens(ids) == ["cat", "dog"]
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(task.train[row]["input_ids"]) for row in (0, 1)]


def write(folder, *examples):
    file = folder / "questions.parquet"
    Dataset.from_list(list(examples), features=EXAMPLES).to_parquet(file)
    return file


def test_options_of_scoring_are_kept_with_the_task(tokenizer, tmp_path):
    file = write(tmp_path, example(CONTEXT, "dog"))
    task = question_task(tokenizer, file, file, max_length=32, max_answer_length=5, null_score_diff_threshold=0.5)
    assert task.options == {"max_answer_length": 5, "null_score_diff_threshold": 0.5}
    assert (task.compute_metrics.max_answer_length, task.compute_metrics.threshold) == (5, 0.5)


def test_lengths(tokenizer):
    assert check_lengths(tokenizer, 384, None, None) == (384, 128, 64)
    assert check_lengths(tokenizer, 32, None, None) == (32, 10, 8)
    assert check_lengths(tokenizer, 16, 6, 6) == (16, 6, 6)
    with pytest.raises(ValueError, match="stride=7 must be less than 7: of max_length=16, 6 are for"):
        check_lengths(tokenizer, 16, 7, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_answer_length": 0}, "max_answer_length=0 must be an integer of at least 1"),
        ({"null_score_diff_threshold": float("nan")}, "null_score_diff_threshold=nan must be a finite number"),
        ({"stride": -1}, "stride=-1 must be an integer of at least 0"),
        ({"max_question_length": 0}, "max_question_length=0 must be an integer of at least 1"),
    ],
)
def test_wrong_options_are_refused(tokenizer, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        question_task(tokenizer, tmp_path / "a.json", tmp_path / "a.json", max_length=32, **changes)


# Answers


def scorer(tokenizer, *examples, version_2=False, max_answer_length=30, threshold=0.0, **lengths):
    data = Dataset.from_list(list(examples), features=EXAMPLES)
    return QuestionScorer(data, windows_of(tokenizer, *examples, **lengths), version_2, max_answer_length, threshold)


def prediction_of(scoring, logits):
    """What `Trainer` has: logits and labels of all windows, padded on the right with -100."""
    labels = tuple(np.array(scoring.windows[name][:]) for name in ("start_positions", "end_positions"))
    return EvalPrediction(predictions=logits, label_ids=labels)


def random_logits(scoring, seed=0):
    generator = np.random.default_rng(seed)
    lengths = [len(ids) for ids in scoring.windows["input_ids"]]
    logits = np.full((2, len(lengths), max(lengths)), -100.0, dtype=np.float32)
    for window, length in enumerate(lengths):
        logits[:, window, :length] = generator.normal(size=(2, length)).round(3)
    return logits


def brute_force(scoring, logits, longest):
    """All texts of each question with their best scores, and the lowest score of [CLS], by plain loops."""
    texts, nulls = [{} for _ in scoring.examples], [[] for _ in scoring.examples]
    for window, start, end in zip(scoring.windows, *logits, strict=True):
        question, pairs = window["example"], window["offsets"]
        nulls[question].append(start[0] + end[0])
        for first in range(len(pairs)):
            for last in range(first, min(first + longest, len(pairs))):
                if pairs[first][0] >= 0 and pairs[last][0] >= 0:
                    text = scoring.examples[question]["context"][pairs[first][0] : pairs[last][1]]
                    score = float(start[first]) + float(end[last])
                    texts[question][text] = max(score, texts[question].get(text, score))
    return texts, [min(scores) for scores in nulls]


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_answers_are_the_best_spans_of_all_windows(tokenizer, longest):
    examples = example(CONTEXT, "cat"), example(CONTEXT * 2, "dog", question="the?"), example("cats")
    scoring = scorer(tokenizer, *examples, max_answer_length=longest)
    logits = random_logits(scoring)
    assert len(scoring.windows) > 5
    texts, nulls = brute_force(scoring, logits, longest)
    for answers, expected, null in zip(scoring.answers(*logits, count=4), texts, nulls, strict=True):
        best = sorted(expected.values(), reverse=True)[: len(answers.texts)]
        assert len(answers.texts) == min(4, len(expected))
        assert answers.scores == pytest.approx(best)
        assert [expected[text] for text in answers.texts] == pytest.approx(best)
        assert answers.null_score == pytest.approx(null)


def test_exact_match_and_f1_by_hand(tokenizer):
    """Right (an article does not count), F1 2/3 (1 of 2 words found, 1 of 1 said), and wrong."""
    examples = [example(CONTEXT, text, name=text) for text in ("The cat", "big moon", "mat")]
    scoring = scorer(tokenizer, *examples, max_length=64)
    spans = ["cat", "moon", "dog"]
    assert scoring(prediction_of(scoring, pointing(scoring, spans))) == pytest.approx(
        {"exact_match": 100 / 3, "f1": 100 * (1 + 2 / 3) / 3}
    )


def pointing(scoring, words, nulls=None):
    """Logits of one window a question: 5 at a word of the context, and at [CLS] half of what `nulls` says."""
    logits = np.zeros((2, len(scoring.windows), max(len(ids) for ids in scoring.windows["input_ids"])))
    for row, window in enumerate(scoring.windows):
        begin = scoring.examples[row]["context"].index(words[row])
        token = next(token for token, pair in enumerate(window["offsets"]) if pair[0] == begin)
        logits[:, row, token] = 5
        logits[:, row, window["null_position"]] = 0 if nulls is None else nulls[row] / 2
    return logits


def test_version_2_by_hand(tokenizer):
    """A span scores 10, and [CLS] 8, 12, 9 or 14: at the threshold 0 two questions are left without an answer."""
    examples = [example(CONTEXT, *texts, name=str(row)) for row, texts in enumerate((["cat"], ["dog"], [], []))]
    scoring = scorer(tokenizer, *examples, version_2=True, max_length=64)
    logits = pointing(scoring, ["cat", "dog", "mat", "mat"], nulls=[8, 12, 9, 14])
    expected = {"exact": 50.0, "HasAns_exact": 50.0, "NoAns_exact": 50.0}
    # Without any answer 2 are right; up to the doubt -2, question 0 is right too; then 2 is wrong, then 1 right.
    expected |= {"best_exact": 75.0, "best_exact_thresh": -2.0}
    expected |= {name.replace("exact", "f1"): value for name, value in expected.items()}
    found = scoring(prediction_of(scoring, logits))
    assert found == expected | {"total": 4, "HasAns_total": 2, "NoAns_total": 2}
    more = scorer(tokenizer, *examples, version_2=True, max_length=64, threshold=3.0)
    found = more(prediction_of(more, logits))
    assert (found["exact"], found["HasAns_exact"], found["NoAns_exact"]) == (75.0, 100.0, 50.0)


def test_lowest_score_of_no_answer_counts(tokenizer):
    scoring = scorer(tokenizer, example(CONTEXT * 2, "cat"), version_2=True)
    logits = random_logits(scoring)
    assert len(scoring.windows) > 2
    logits[:, :, 0] = 50
    logits[:, 1, 0] = -50
    assert scoring.answers(*logits)[0].doubt() < 0


def test_tokens_of_no_character_are_no_answer():
    """As byte-level tokenizers have them, for a part of a character."""
    logits = np.array([0.0, 5, 0, 0]), np.array([0.0, 5, 0, 1])
    offsets = [[-1, -1], [2, 2], [2, 5], [6, 9]]
    assert best_spans(*logits, offsets, longest=1, count=5) == [(1.0, 6, 9), (0.0, 2, 5)]


@pytest.mark.parametrize("version_2", [False, True])
def test_empty_context_has_no_answer(tokenizer, version_2):
    scoring = scorer(tokenizer, example(""), example(CONTEXT, "cat", name="1"), version_2=version_2, max_length=64)
    logits = random_logits(scoring)
    answers = scoring.answers(*logits)[0]
    assert (answers.texts, answers.doubt()) == ([], float("inf"))
    found = scoring.score([answers, scoring.answers(*pointing_at_cat(scoring))[1]])
    assert found["exact" if version_2 else "exact_match"] == (100.0 if version_2 else 50.0)


def pointing_at_cat(scoring):
    logits = np.zeros((2, len(scoring.windows), max(len(ids) for ids in scoring.windows["input_ids"])))
    logits[:, 1, 1 + scoring.windows["input_ids"][1][1:].index(7)] = 9  # the token `cat`
    return logits


def test_predictions_of_other_windows_are_refused(tokenizer):
    scoring = scorer(tokenizer, example(CONTEXT, "cat"), example(CONTEXT, "dog", name="1"), max_length=64)
    prediction = prediction_of(scoring, random_logits(scoring))
    prediction.label_ids = tuple(labels[::-1] for labels in prediction.label_ids)
    with pytest.raises(ValueError, match="not those of the validation split, in its order"):
        scoring(prediction)


@pytest.mark.parametrize("side", ["left", "right"])
def test_trainer_learns_the_answers_by_heart(tokenizer, tmp_path, side):
    """Windows of several questions, some without an answer, reach the scores of `Trainer` with their labels."""
    tokenizer.padding_side = side
    examples = [
        example("The cat sat on the mat and a dog ran under the mat.", "cat", name="0"),
        example("A dog ran on the mat and the dog sat under the big moon.", "big moon", name="1"),
        example("the dogs", name="2", question="the dog?"),
    ]
    file = write(tmp_path, *examples)
    task = question_task(tokenizer, file, file, max_length=12, stride=2, max_question_length=3)
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
        model=SuperShaperForQuestionAnswering(tiny_config(num_hidden_layers=1, hidden_dropout_prob=0.0, **task.config)),
        args=arguments,
        train_dataset=task.train,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
    )
    trainer.train()
    figures = trainer.evaluate(task.evaluation["validation"])
    assert figures["eval_f1"] == figures["eval_HasAns_exact"] == figures["eval_NoAns_f1"] == 100.0
    assert figures["eval_loss"] < 0.5
