"""The benchmark of compute against quality: what it counts, what it goes on from, what it prints. Runs are tiny."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import WORDS, randomize, tiny_bert_config, tiny_config
from texts import random_documents
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

from supershaper_hf import SuperShaperModel
from supershaper_hf.training.progress import Progress


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.usefixtures("no_measured_peak")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("compute_to_quality")
    monkeypatch.setattr(script, "in_own_process", lambda function, *arguments: function(*arguments))
    yield script
    for name in ("compute_to_quality", "sentence_similarity"):
        sys.modules.pop(name)


@pytest.fixture
def options(tmp_path, tokenizer):
    """The options of a run on a tiny BERT without a masked-LM head, and on a little text."""
    randomize(BertModel(tiny_bert_config(hidden_size=24, vocab_size=len(tokenizer)))).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    for name, seed in (("text", 0), ("validation", 1)):
        documents = random_documents(24, words=20, seed=seed)["text"]
        (tmp_path / f"{name}.txt").write_text("\n".join(documents), encoding="utf-8")
    lines = [f"{' '.join(WORDS[i : i + 4])},{' '.join(WORDS[2 * i : 2 * i + 3])},{i}\n" for i in range(6)]
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,label\n" + "".join(lines), encoding="utf-8")
    return Namespace(
        bert=str(tmp_path / "bert"),
        text=[str(tmp_path / "text.txt")],
        validation=str(tmp_path / "validation.txt"),
        pairs=str(tmp_path / "pairs.csv"),
        output_dir=str(tmp_path / "output"),
        tokens=700,
        seeds=[0],
        recipes=["paper", "ours"],
        max_length=12,
        per_device_train_batch_size=4,
        max_eval_samples=8,
        max_pairs=5,
    )


def run(script, options, monkeypatch, capsys):
    """Run the benchmark; return what it prints and its points."""
    monkeypatch.setattr(script, "parse_arguments", lambda: options)
    script.main()
    lines = (Path(options.output_dir) / "points.jsonl").read_text(encoding="utf-8").splitlines()
    return capsys.readouterr().out, [json.loads(line) for line in lines]


def test_the_paper_and_ours_are_compared(script, options, monkeypatch, capsys):
    train, trained = script.train, []

    def train_and_stop(*arguments):
        train(*arguments)
        trained.append(arguments[-1])
        if len(trained) == 1:
            raise SystemExit("Interrupted")

    monkeypatch.setattr(script, "train", train_and_stop)
    with pytest.raises(SystemExit, match="Interrupted"):
        run(script, options, monkeypatch, capsys)
    printed, points = run(script, options, monkeypatch, capsys)
    assert trained == ["the paper", "ours: calibrated, by width"]  # the checkpoints of the first were there
    assert [(point["recipe"], point["eighths"]) for point in points] == [
        (name, eighths) for name in ("paper", "ours") for eighths in (0, 1, 2, 4, 8)
    ]
    steps = [point["steps"] for point in points[:5]]
    assert steps == [eighths * steps[1] for eighths in (0, 1, 2, 4, 8)]
    for paper, ours in zip(points[:5], points[5:], strict=True):
        assert paper["tokens"] == ours["tokens"]  # of the same sequences
        assert paper["flops_teacher"] == 0
        assert (ours["flops_teacher"] > 0) == (ours["tokens"] > 0)
        for point in (paper, ours):
            parts = sum(point[f"flops_{part}"] for part in ("start", "passes", "weights", "teacher"))
            assert point["flops"] == parts > 0  # also the start: a head is trained, or the supernet is calibrated
            assert len(point["random"]) == 20
            assert ["sts" in record for record in point["random"]] == [
                point["eighths"] in (0, 8) and number < 6 for number in range(20)
            ]
    assert abs(points[-1]["tokens"] - options.tokens) < 200
    largest = points[0]["rectangles"][0]
    assert largest["shape"] == [24] * 3
    assert largest["distance"] < 1e-5  # before training, whatever the recipe
    assert largest["cosine"] == pytest.approx(1)
    assert points[0]["random"] != points[4]["random"]
    assert "distance / cosine / STS" in printed
    assert (Path(options.output_dir) / "compute_to_quality.png").stat().st_size > 1000
    assert not list(Path(options.output_dir).glob("*/checkpoint-*"))

    again, same = run(script, options, monkeypatch, capsys)
    assert same == points
    assert printed.endswith(again)  # it only reports
    assert "seed 0" not in again

    options.max_pairs = 4
    with pytest.raises(ValueError, match="recipe paper that were measured with other settings: max_pairs"):
        run(script, options, monkeypatch, capsys)


def test_half_a_line_is_left_out(script, tmp_path):
    file = tmp_path / "points.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n{"a"', encoding="utf-8")
    assert script.read_points(file) == [{"a": 1}, {"a": 2}]
    assert file.read_text(encoding="utf-8") == '{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize("bottlenecks", ["shared", "by_width"])
def test_products_of_weights_are_counted(script, bottlenecks):
    """What does not grow with the number of sequences is a product of weights with weights."""
    model = SuperShaperModel(tiny_config(head_slicing="per_head", bottlenecks=bottlenecks))
    shape = [36, 8, 48]

    def counted(sequences):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(sequences, 20, dtype=torch.long), shape=shape)
        return counter.get_total_flops()

    assert script.weight_flops(model.config, shape) == 2 * counted(4) - counted(8)


def test_forward_passes_of_the_original_are_counted(script):
    config = tiny_bert_config(attn_implementation="eager")
    bert = BertModel(config, add_pooling_layer=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bert(torch.zeros(6, 10, dtype=torch.long))
    assert script.original_flops(config, Progress(sequences=6, padded_tokens=60)) == counter.get_total_flops()
    assert script.original_flops(config, Progress()) == 0


def test_a_distance_is_reached_between_two_points(script):
    curve = [(0, 1.5), (100, 0.9), (200, 0.5), (400, 0.6)]
    assert script.flops_to_reach(curve, 0.7) == pytest.approx(150)
    assert script.flops_to_reach(curve, 0.9) == 100
    assert script.flops_to_reach(curve, 2) == 0
    assert script.flops_to_reach(curve, 0.4) is None


def test_tables_hold_means_over_the_seeds(script):
    def point(recipe, seed, eighths, flops, distance):
        record = {"shape": [24, 24], "distance": distance, "cosine": 0.5, "sts": 0.7}
        start = {"seconds": 3, "cpu_seconds": 2, "peak_megabytes": 500}
        others = {"start": start, "flops_start": 1e12, "seconds": 60, "tokens": eighths}
        ends = {"rectangles": [record], "random": [record, record]}
        return {"recipe": recipe, "seed": seed, "eighths": eighths, "flops": flops} | others | ends

    points = [point("paper", 0, eighths, 1e12 * eighths, 1.5 - eighths / 8) for eighths in (0, 1, 2, 4, 8)]
    points += [point("ours", 0, 0, 1e12, 0.7), point("ours", 0, 8, 3e12, 0.3), point("ours", 1, 8, 3e12, 0.5)]
    [paper, ours] = script.table(points, 8)
    assert paper["24"] == paper["random"] == "0.500 / 0.500 / 0.700"
    assert (paper["spread"], paper["seeds"]) == ("-", "1")
    assert ours["24"] == ours["random"] == "0.400 / 0.500 / 0.700"
    assert (ours["spread"], ours["seeds"]) == ("0.141", "2")
    [paper, ours] = script.effort(points)
    assert paper["share of the paper's"] == "100.0%"
    assert ours["share of the paper's"] == "29.2%"  # 0.5 lies at 2/3 of the way from 0.7 to 0.4: 2.33 of 8


def test_ours_is_the_recipe_that_users_get(script, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS.parent / "examples")
    recipe = dict(importlib.import_module("make_supernet").RECIPE)
    recipe.pop("group_by_length")  # all recipes of the benchmark read the same batches
    assert script.RECIPES["ours"].training == recipe
    sys.modules.pop("make_supernet")


def test_every_recipe_has_options_that_can_be_trained(script, options, tmp_path):
    """`SuperPretrainingArguments` checks them."""
    sequences = script.load_sequences(options, script.AutoTokenizer.from_pretrained(options.bert))
    for recipe in script.RECIPES.values():
        arguments = script.training_arguments(options, recipe, 3, sequences, tmp_path)
        assert (arguments.seed, arguments.max_steps) == (3, 8 * arguments.save_steps)
