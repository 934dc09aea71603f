"""The runs of the study: what is trained, measured and counted, and the answers of four questions. Models are tiny."""

import importlib
import itertools
import lzma
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import WORDS, randomize, tiny_bert_config, tiny_config
from texts import random_documents
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM, BertModel

from supershaper_hf import SearchSpace, SuperPretrainingArguments, SuperShaperModel
from supershaper_hf.files import write_json
from supershaper_hf.training import loop
from supershaper_hf.training.progress import Progress
from supershaper_hf.training.sandwich import sandwich_step, step_shapes


ROOT = Path(__file__).parents[2]
NAMES = ("runs", "found_runs", "material", "start_and_recipe", "bottlenecks", "losses", "sharing", "study", "head")
pytestmark = pytest.mark.usefixtures("no_measured_peak", "fresh_accelerator")


@pytest.fixture
def study(monkeypatch):
    """The modules of the study by name."""
    monkeypatch.syspath_prepend(ROOT)
    return Namespace(**{name: importlib.import_module(f"benchmarks.study.{name}") for name in NAMES})


# Running


@pytest.fixture
def args(study, tmp_path, tokenizer, monkeypatch):
    """The options of a script, on a tiny BERT with a masked-LM head and on a little text."""
    head = tmp_path / "output" / study.head.FOLDER
    bert = BertForMaskedLM(tiny_bert_config(hidden_size=24, vocab_size=len(tokenizer)))
    for folder in (head, tmp_path / "bert"):
        randomize(bert).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    corpus, pairs = tmp_path / "data" / "corpus", tmp_path / "data" / "tasks" / "stsb"
    corpus.mkdir(parents=True)
    pairs.mkdir(parents=True)
    for seed, name in enumerate([*study.study.CORPORA, "validation"]):
        documents = random_documents(8, words=20, seed=seed)["text"]
        (corpus / f"{name}.txt.xz").write_bytes(lzma.compress("\n".join(documents).encode()))
    lines = [f"{' '.join(WORDS[i : i + 4])},{' '.join(WORDS[2 * i : 2 * i + 3])},{i}\n" for i in range(6)]
    (pairs / "validation.csv").write_text("sentence1,sentence2,label\n" + "".join(lines), encoding="utf-8")
    paths = {"data": tmp_path / "data", "bert": tmp_path / "bert", "output_dir": head.parent, "results": tmp_path}
    sizes = {"tokens": 300, "calibration_tokens": 100, "max_length": 12, "batch_size": 4, "mixed_precision": "no"}
    sizes |= {"width_choices": [8, 16, 24], "clean_tokens": 40, "masked_tokens": 80, "num_random": 5, "num_sts": 2}
    options = {**paths, **sizes, "num_pairs": 5, "chosen": ["16", "16,8,24", "8"]}
    monkeypatch.setattr(sys, "argv", ["script", *itertools.chain.from_iterable(map(words, options.items()))])
    return study.runs.parse_arguments("Words.")


def words(option):
    name, value = option
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def test_runs_are_trained_measured_and_found_again(study, args, monkeypatch):
    ours, paper = study.runs.OURS_BY_WIDTH, study.start_and_recipe.RECIPES["paper: identity"]
    alone, train, trained = study.sharing.alone(1, 3e-4), study.runs.train, []
    steps = []

    def train_and_record(*arguments):
        trained.append(arguments[-1])
        train(*arguments)

    def step_and_stop(*arguments):
        steps.append(arguments)
        if len(steps) == 3:  # after a quarter: this checkpoint comes to those of the quarters
            signal.raise_signal(signal.SIGTERM)
        return sandwich_step(*arguments)

    monkeypatch.setattr(study.runs, "train", train_and_record)
    monkeypatch.setattr(loop, "sandwich_step", step_and_stop)
    with pytest.raises(SystemExit, match="Interrupted"):
        study.runs.Runs(args).run(ours, 0)
    for _ in range(2):  # the second time all is there
        runs = study.runs.Runs(args)
        for recipe in (ours, paper, alone):
            runs.run(recipe, 0)
    assert trained == ["ours, seed 0", "ours, seed 0", "paper, seed 0", "alone-1-0.0003, seed 0"]
    found = study.found_runs.read_runs(args.results)
    assert len(found.rows) == 2 + 3 + 3 + 1
    for recipe, taught in ((ours, True), (paper, False)):
        rows = [row for quarters in (0, 1, 2, 4) for row in found.of(recipe, quarters)]
        assert [row["steps"] for row in rows] == [quarters * rows[1]["steps"] for quarters in (0, 1, 2, 4)]
        for row in rows:
            assert row["flops"] == sum(row["flops_of"].values())
            assert (row["flops_of"].get("teacher", 0) > 0) == (taught and row["steps"] > 0)
            shapes = {"rectangles": 3, "random": 5, "chosen": 3}
            assert {group: len(row[group]["loss"]) for group in shapes} == shapes
            scored = (
                {"rectangles": 3, "random": 2, "chosen": 3} if row["quarters"] in (0, 4) else dict.fromkeys(shapes, 0)
            )
            assert {group: len(row[group]["sts"]) for group in shapes} == scored
        assert rows[0]["rectangles"]["distance"][0] < 1e-5  # the largest, before training
        assert rows[0]["rectangles"]["cosine"][0] == pytest.approx(1)
        assert rows[0]["rectangles"]["distance"][2] > 0.1
        assert rows[-1]["rectangles"]["distance"][0] > 1e-4  # from the original, not from what it has become
        assert len({row["random"]["distance"][0] for row in rows}) == 4
    [start], [ends], [single], [paper] = found.of(ours, 0), found.of(ours), found.of(alone), found.of(paper)
    assert start["flops"] == start["flops_of"]["start"] > 0  # the calibration
    assert found.of(study.start_and_recipe.RECIPES["paper: identity"], 0)[0]["flops"] == 0
    assert ends["tokens"] == paper["tokens"] == single["tokens"] == pytest.approx(args.tokens, rel=0.3)
    assert ends["rectangles"]["loss"][0] == pytest.approx(start["rectangles"]["loss"][0], abs=0.5)
    assert single["chosen"]["distance"][0] < start["chosen"]["distance"][1]  # it starts there, and learns
    assert single["flops_of"]["passes"] < ends["flops_of"]["passes"]  # one shape, not three
    assert single["flops_of"]["weights"] == 0 < ends["flops_of"]["weights"]
    assert 0 < single["share_of_encoder"] < 1
    assert not list(args.output_dir.glob("runs/*/checkpoint-*"))
    args.num_pairs = 4
    with pytest.raises(ValueError, match="rows with other settings: num_pairs"):
        study.runs.Runs(args)


def test_every_recipe_can_be_trained(study, args):
    """`SuperPretrainingArguments` checks the options. No two runs use one folder."""
    material = study.material.load_material(args, args.output_dir / study.head.FOLDER)
    keys = {}
    for recipe in all_recipes(study):
        options = study.runs.training_arguments(args, recipe, 3, material, args.output_dir)
        assert (options.seed, options.max_steps) == (3, 4 * options.save_steps)
        assert recipe.start in study.runs.STARTS
        assert keys.setdefault(recipe.name, recipe.key()) == recipe.key()


def test_ours_is_the_recipe_that_users_get(study, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    assert study.runs.OURS == importlib.import_module("make_supernet").RECIPE
    sys.modules.pop("make_supernet")


def test_text_is_taken_in_the_number_of_tokens_that_was_asked_for(study, args):
    material = study.material.load_material(args, args.output_dir / study.head.FOLDER)
    for batches, tokens in ((material.clean, 40), (material.masked, 80)):
        assert tokens <= sum(int(batch["attention_mask"].sum()) for batch in batches) < tokens + 12
    assert not any((batch["labels"] != -100).any() for batch in material.clean)
    assert any((batch["labels"] != -100).any() for batch in material.masked)


# Operations


@pytest.mark.parametrize("bottlenecks", ["shared", "by_width"])
def test_products_of_weights_are_counted(study, bottlenecks):
    """What does not grow with the number of sequences is a product of weights with weights."""
    model = SuperShaperModel(tiny_config(head_slicing="per_head", bottlenecks=bottlenecks))
    shape = [36, 8, 48]

    def counted(sequences):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(sequences, 20, dtype=torch.long), shape=shape)
        return counter.get_total_flops()

    assert study.runs.weight_flops(model.config, shape) == 2 * counted(4) - counted(8)


def test_operations_of_a_run_are_those_of_its_shapes(study):
    """Forward and backward passes: the products of weights are counted three times for every shape of every step."""
    config = tiny_config(head_slicing="per_head", bottlenecks="by_width")
    options = SuperPretrainingArguments(**study.runs.OURS, seed=4)
    space = SearchSpace.from_config(config)
    shapes = [shape for step in range(2) for shape in step_shapes(space, options, step)]
    assert len(shapes) == 6
    counted = study.runs.run_flops(config, options, Progress(step=2, sequences=4, padded_tokens=40, flops=123))
    assert counted["passes"] == 123
    assert counted["weights"] == 3 * sum(study.runs.weight_flops(config, shape) for shape in shapes)
    assert counted["teacher"] == study.runs.original_flops(config, Progress(sequences=4, padded_tokens=40)) > 0


def test_forward_passes_of_the_original_are_counted(study):
    config = tiny_bert_config(attn_implementation="eager")
    bert = BertModel(config, add_pooling_layer=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bert(torch.zeros(6, 10, dtype=torch.long))
    assert study.runs.original_flops(config, Progress(sequences=6, padded_tokens=60)) == counter.get_total_flops()
    assert study.runs.original_flops(config, Progress()) == 0


# Answers


@pytest.fixture
def write_rows(study, tmp_path):
    """A function that writes rows and returns the folders of results and pictures."""

    def write(rows):
        names = ("batch_size", "max_length", "calibration_tokens", "clean_tokens", "masked_tokens", "num_pairs")
        settings = dict.fromkeys((*names, "tokens", "num_random", "num_sts"), 1234)
        settings |= {"mixed_precision": "no", "width_choices": [8, 24], "chosen": ["8", "8,24", "24"]}
        content = {"settings": settings, "machine": {"device": "an abacus", "threads": 1}, "rows": rows}
        write_json(tmp_path / "runs.json", study.study.FORMAT, content)
        return tmp_path, tmp_path

    return write


def row(recipe, quarters=4, seed=0, flops=1e12, random=(0.5, 0.5), largest=(0.1, 3.0), chosen=(0.3, 0.3, 0.3)):
    """A row of the file. `random` and `largest` are distance and masked-LM loss."""

    def figures(distances, losses):
        return {"distance": distances, "cosine": distances, "loss": losses, "sts": distances}

    return {
        **recipe.key(),
        "seed": seed,
        "quarters": quarters,
        "tokens": 100 * quarters,
        "steps": 10 * quarters,
        "flops": flops,
        "flops_of": {"start": 1e11},
        "share_of_encoder": 0.3,
        "rectangles": figures([largest[0], 0.9], [largest[1], 9.0]),
        "random": figures([random[0] - 0.1, random[0] + 0.1], [random[1], random[1]]),
        "chosen": figures([*chosen], [*chosen]),
    }


def start_row(study, start, **values):
    return row(study.runs.Recipe(start, start), quarters=0, **values)


def test_a_value_is_reached_between_two_points(study):
    curve = [(0, 1.5), (100, 0.9), (200, 0.5), (400, 0.6)]
    assert study.start_and_recipe.flops_to_reach(curve, 0.7) == pytest.approx(150)
    assert study.start_and_recipe.flops_to_reach(curve, 0.9) == 100
    assert study.start_and_recipe.flops_to_reach(curve, 2) == 0
    assert study.start_and_recipe.flops_to_reach(curve, 0.4) is None


def test_operations_to_equal_quality(study, write_rows, tmp_path):
    recipes, given = study.start_and_recipe.RECIPES, {}
    given = [start_row(study, "identity", flops=0, random=(1.6, 9.0))]
    given += [row(recipes["paper: identity"], n, flops=2e12 * n, random=(1.6 - n / 8, 9.0 - n)) for n in (1, 2, 4)]
    given += [start_row(study, "by_width_per_head", flops=1e12, random=(1.2, 8.0))]
    given += [row(study.runs.OURS_BY_WIDTH, n, flops=1e12 + 1e12 * n, random=(1.2 - n / 10, 8.0)) for n in (1, 2, 4)]
    text = study.start_and_recipe.answer(*write_rows(given))
    # The paper ends at a distance of 1.1 after 8e12 operations, where ours is after 2e12. Ours never has its loss, 5.0.
    ours = '"ours: calibrated, by width"'
    assert f"the best point of the paper's run is 1.100. {ours} reaches it after 25.0%" in text
    assert f"the best point of the paper's run is 5.000. {ours} never reaches it: the target, 20%, is missed." in text
    assert "ours and labels" not in text
    targets = [(target.measured, target.met) for target in study.start_and_recipe.targets(tmp_path)]
    assert targets == [("25.0%", False), ("never", False)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["ours: calibrated, by width", "400", "0.800", "0.800", "8.000", "80.0"] in lines
    assert ["ours: calibrated, by width", "5.0", "0.1", "25.0%", "not reached"] in lines
    assert ["paper: identity", "8.0", "0.1", "100.0%", "100.0%"] in lines
    assert ["paper: identity", "0.100 / 3.000 / 10.0", "0.900 / 9.000 / 90.0"] in lines
    assert "40 steps of 1234 sequences" in text
    assert "Seeds: 0." in text
    assert "Machine: an abacus." in text
    assert "| calibrated | then narrow shapes are fitted" in text
    given[-4] = start_row(study, "by_width_per_head", flops=4e12, random=(1.1, 4.9))
    text = study.start_and_recipe.answer(*write_rows(given))
    assert (
        f"{ours} has 1.100 before training, whose start took 50.0% of the operations: the target, 20%, is missed."
        in text
    )
    assert f"{ours} has 4.900 before training, whose start took 50.0% of the operations" in text
    assert "by the start alone" not in text
    given[-4] = start_row(study, "by_width_per_head", flops=1e12, random=(1.1, 4.9))
    text = study.start_and_recipe.answer(*write_rows(given))
    assert "the target, 20%, is met, by the start alone; the recipe is not tested by it." in text
    targets = [(target.measured, target.met) for target in study.start_and_recipe.targets(tmp_path)]
    assert targets == [("12.5%, by the start alone", True)] * 2
    write_rows([each for each in given if each["start"] == "identity"])
    assert study.start_and_recipe.targets(tmp_path) == []  # ours was not run: nothing is missed


@pytest.mark.parametrize(
    ("largest", "average", "words"),
    [
        (2.9, 5.1, "these runs confirm it."),
        (2.9, 4.9, "these runs confirm the first half only."),
        (3.1, 5.1, "these runs confirm the second half only."),
        (3.1, 4.9, "these runs do not confirm it."),
    ],
)
def test_in_place_distillation_is_judged_by_the_largest_and_the_average_shape(
    study, write_rows, largest, average, words
):
    recipes = study.losses.LOSSES
    given = [
        row(recipes["labels only"], random=(0.5, 5.0)),
        row(recipes["labels and in-place distillation"], random=(0.6, average), largest=(0.2, largest)),
    ]
    text = study.losses.answer(*write_rows(given))
    assert f"{words} One seed leaves that open." in text
    assert f"{largest - 3:.3f} for the largest shape, {average - 5:.3f} for the mean" in text


def test_bottlenecks_are_compared_seed_by_seed(study, write_rows):
    given = [row(study.runs.OURS_SHARED, seed=seed, random=(0.5 + seed / 10, 5.0)) for seed in (0, 1, 2)]
    given += [row(study.runs.OURS_BY_WIDTH, seed=seed, random=(0.4 + seed / 10, 5.1)) for seed in (0, 1)]
    text = study.bottlenecks.answer(*write_rows(given))
    assert "distance -0.100 ± 0.000 (better with 2 of 2 seeds)" in text
    assert "masked-LM loss 0.100 ± 0.000 (better with 0 of 2 seeds)" in text
    assert "| shared, per head | 3 | 0.600 ± 0.100 |" in text


def test_an_inherited_shape_is_compared_with_the_better_training_alone(study, write_rows):
    given = [start_row(study, "by_width_per_head"), row(study.runs.OURS_BY_WIDTH, chosen=(0.33, 0.2, 0.3))]
    given += [row(study.sharing.alone(0, 3e-4), chosen=(0.3,)), row(study.sharing.alone(0, 5e-4), chosen=(0.4,))]
    given += [row(study.sharing.alone(1, 3e-4), chosen=(0.3,)), row(study.sharing.alone(1, 5e-4), chosen=(0.2,))]
    given += [row(study.sharing.alone(2, 3e-4), chosen=(0.1,))]  # the other rate may be better
    given += [row(study.runs.OURS_BY_WIDTH, chosen=(0.9, 0.9, 0.9)) | {"seed": 7}]  # no shape was trained alone with it
    folders = write_rows(given)
    text = study.sharing.answer(*folders)
    [target] = study.sharing.targets(folders[0])
    assert (target.measured, target.met) == ("+10.0%", False)
    assert "| 8 | 30% | inherited | 0.330 | 0.330 | 0.330 | 33.0 | +10.0% |" in text
    assert "| 8 | 30% | alone, 0.0003 | 0.300 |" in text
    assert "| 8,24 | 30% | alone, 0.0005 | 0.200 |" in text
    assert "it is met by 1 of 2 shapes; the largest difference is +10.0%" in text


def all_recipes(study):
    return [
        *study.start_and_recipe.RECIPES.values(),
        *study.bottlenecks.RECIPES.values(),
        *study.losses.LOSSES.values(),
        *study.losses.SAMPLINGS.values(),
        *(study.sharing.alone(shape, rate) for shape in range(3) for rate in study.sharing.RATES),
    ]


@pytest.mark.parametrize("name", ["start_and_recipe", "bottlenecks", "losses", "sharing"])
def test_answers_say_what_is_there(study, write_rows, tmp_path, name):
    """Nothing at first, then one row, then all, with a picture."""
    script = getattr(study, name)
    assert script.answer(tmp_path, tmp_path) == ""
    both = [study.sharing.alone(0, rate) for rate in study.sharing.RATES]
    recipes = both if name == "sharing" else [study.runs.OURS_BY_WIDTH]
    few = script.answer(*write_rows([start_row(study, "by_width_per_head"), *map(row, recipes)]))
    picture = (tmp_path / script.PICTURE).stat().st_size
    given = [start_row(study, start) for start in study.runs.STARTS]
    given += [
        row(recipe, n, random=(0.5 + k / 99, 5)) for k, recipe in enumerate(all_recipes(study)) for n in (1, 2, 4)
    ]
    text = script.answer(*write_rows(given))
    assert f"benchmarks.study.{name} " in text
    assert f"]({tmp_path.name}/{script.PICTURE})" in text
    assert len(few) < len(text)
    assert 1000 < picture < (tmp_path / script.PICTURE).stat().st_size
