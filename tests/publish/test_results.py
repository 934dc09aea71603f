"""What is read from the files of a fine-tuning or a search: of this very model, with its main score first."""

import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import tiny_model
from search_folders import distance_record, write_search

from supershaper_hf import SuperShaperForSequenceClassification, SuperShaperModel
from supershaper_hf.files import write_json
from supershaper_hf.publish.results import (
    FINE_TUNING,
    SIMILARITY,
    Results,
    front_results,
    result_files,
    search_results,
    tuning_results,
)
from supershaper_hf.report.findings import Findings


pytestmark = pytest.mark.filterwarnings("ignore:Shapes left out")
SCORES = {0: {"f1": 0.8, "accuracy": 0.7}, 3: {"f1": 0.6, "accuracy": 0.9}}


@pytest.fixture
def model():
    return tiny_model(SuperShaperForSequenceClassification).extract_subnet([8, 0, 36])


@pytest.fixture
def write(model, tmp_path):
    """Return a function that writes the results of `model` with two seeds, of which the second was the best."""

    def write(**changes):
        content = {
            "task": "mrpc",
            "score": "accuracy",
            "model": "net",
            "parameters": model.num_parameters(),
            "shape": [8, 36],
            "seeds": [{"seed": seed, "scores": {"validation": scores}} for seed, scores in SCORES.items()],
            "mean": {"validation": {"f1": 0.7, "accuracy": 0.8}},
            "spread": {"validation": {"f1": 0.1, "accuracy": 0.2}},
            "best_seed": 3,
            "library_version": {"supershaper-hf": "0.0.7"},
        }
        return write_json(tmp_path / "results.json", FINE_TUNING, content | changes)

    return write


def test_scores_are_those_of_the_seed_whose_model_it_is(write, model):
    found = tuning_results(write(), model, "text-classification", "nyu-mll/glue")
    assert [(score.metric_type, score.metric_value) for score in found.scores] == [("accuracy", 0.9), ("f1", 0.6)]
    assert "with the seed 3" in found.text
    assert "| mrpc | validation | f1 | 0.6000 | 0.7000 ± 0.1000 |" in found.text
    assert found.text.endswith("Computed with supershaper-hf 0.0.7.")
    (file,) = result_files(found.scores).values()  # one score of each task: the main one
    assert yaml.safe_load(file)[0]["value"] == 0.9


def test_one_seed_has_no_spread(write, model):
    seeds = [{"seed": 3, "scores": {"validation": SCORES[3]}}]
    text = tuning_results(write(seeds=seeds, library_version=None), model, "t").text
    assert "| task | split | score | this model |\n" in text
    assert "Computed with" not in text


@pytest.mark.parametrize("changes", [{"shape": [36, 8]}, {"parameters": 7}])
def test_results_of_another_shape_or_size_are_refused(changes, write, model):
    with pytest.raises(ValueError, match="has the results of another model"):
        tuning_results(write(**changes), model, "t")


def test_other_files_are_refused(model, tmp_path):
    file = write_json(tmp_path / "results.json", "something else", {})
    with pytest.raises(ValueError, match=f"is not a '{FINE_TUNING}' file"):
        tuning_results(file, model, "t")
    file.write_text("[]")
    with pytest.raises(ValueError, match="is not a"):
        tuning_results(file, model, "t")


@pytest.mark.parametrize("scores", [{"before": 0.25}, {"before": 0.25, "after": 0.75}])
def test_similarity_is_that_after_the_training(scores, tmp_path):
    encoder = tiny_model(SuperShaperModel)
    content = {"model": "net", "shape": None, "parameters": encoder.num_parameters(), "pairs": 1500, **scores}
    found = tuning_results(write_json(tmp_path / "r.json", SIMILARITY, content), encoder, "sentence-similarity")
    value = scores.get("after", 0.25)
    assert found.text == f"Spearman's correlation of cosines with the ratings of 1,500 pairs: {value:.4f}."
    assert [score.metric_value for score in found.scores] == [value]


@pytest.fixture(scope="module", params=["loss", "distance"])
def findings(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "search"
    kind = {"distance": (tiny_model(SuperShaperModel), distance_record), "loss": (tiny_model(),)}[request.param]
    return Findings.read(write_search(folder, *kind))


def test_only_what_was_measured_is_a_score(findings):
    space, shown = findings.space, findings.measure.shown
    measured = {tuple(record["shape"]): record[shown] for record in findings.records}
    unknown = next(shape for shape in space.sample(200, seed=5).tolist() if tuple(shape) not in measured)
    assert search_results(findings, unknown, "t").scores == []
    shape, value = next(iter(measured.items()))
    (score,) = search_results(findings, list(shape), "t").scores
    assert (score.metric_type, score.metric_value) == (shown, pytest.approx(value, abs=1e-6))
    text = search_results(findings, space.largest, "t").text
    assert text.count("\n| this subnet |") == 1
    assert "largest shape" not in text
    with pytest.raises(ValueError, match="width 9"):
        search_results(findings, [9, 8, 8], "t")


def test_rows_of_the_front_are_its_shapes(findings):
    table = front_results(findings, rows=4).text.split("\n\n")[1].splitlines()[2:]
    front = findings.front("parameters")
    predicted = dict(zip(map(tuple, front.shapes.tolist()), findings.measure.show(np.asarray(front.losses))))
    sizes = []
    for row in table:
        size, _, value, shape = [cell.strip() for cell in row.strip("|").split("|")]
        shape = tuple(int(width) for width in re.findall(r"\d+", shape))
        assert value == f"{predicted[shape]:.{findings.measure.digits}f}"
        assert findings.space.num_parameters(shape) == int(size.replace(",", ""))
        sizes.append(int(size.replace(",", "")))
    assert sizes == sorted(sizes)
    assert sizes[0] == findings.space.num_parameters(findings.space.smallest)
    assert len(sizes) == 4


@pytest.mark.parametrize(("layers", "words"), [("last", "of the last layer"), ("all", "the mean of all layers")])
def test_a_distance_is_explained(findings, layers, words):
    """As cut, beside the best shapes, and on the page of the search."""
    distances = findings.measure.name == "distance"
    assert findings.layers == ("last" if distances else None)
    findings = replace(findings, layers=layers if distances else None)
    texts = [front_results(findings).text, search_results(findings, findings.space.largest, "t").text]
    for text in texts:
        assert (f"hidden states, {words}, relative to their variance: 0 for" in text) == distances
        assert " \n" not in text


def test_results_are_joined():
    assert Results() + Results("a") + Results("b") == Results("a\n\nb")
