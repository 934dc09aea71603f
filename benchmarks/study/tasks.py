"""Question 6: how much of the original's task scores do subnets keep, and which shape keeps the most?

    python -m benchmarks.study.tasks --data DATA --bert MINILM --supernet SUPERNET
    python -m benchmarks.study.tasks --data DATA --bert MINILM --only original --tasks rte stsb

Four tasks in GLUE's form are fine-tuned with every seed: the original, the whole supernet, and its subnets at 75, 60,
45 and 30 % of the encoder, each as the searched shape, the rectangle and the first layers. Of every fine-tuned model,
the file of 8-bit integers is scored too. The original of the best seed teaches the others. Beside it:

- other ways for the models of `OTHERWISE`, with the first seed, on the task on which small subnets lose the most:
  without the teacher, with three times the steps, and after super fine-tuning;
- super fine-tuning: the supernet is fine-tuned on the task with the first seed, all shapes at once, and shapes are
  scored without further training: those at 60 and 30 %, and 30 random ones.

Every score is a row of `tasks.json` as soon as it is there. The same command goes on where it was stopped.
"""

import argparse
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from supershaper_hf import SearchSpace
from supershaper_hf.files import write_folder
from supershaper_hf.finetuning.task import Task
from supershaper_hf.search.fingerprints import fingerprint_encoder

from . import compared, tuning
from .compared import (
    INT8,
    KINDS,
    ORIGINAL,
    SUPERNET,
    Compared,
    check_shapes,
    check_supernet,
    compared_models,
    export_files,
)
from .shapes import NUM_RANDOM, RECTANGLE, SEARCHED, random_shapes
from .study import Results, Row, make_parser
from .tasks_answer import (
    GUESSED,
    LONGER,
    QUESTION,
    RANDOM,
    SUPER,
    SUPER_FIRST,
    TASKS,
    TIMES_LONGER,
    TRIED_ON,
    TUNED,
    UNTAUGHT,
    answer,
    targets,
)
from .tuning import Recipe, RememberingTeacher, Tuned, fine_tune, load_task, onnx_run, pytorch_run, read_recipe, score


SEEDS = (0, 1, 2)
OTHERWISE = {  # way -> kinds and shares of the models that it is tried on
    UNTAUGHT: ((SEARCHED, 0.60), (SEARCHED, 0.30)),
    SUPER_FIRST: ((SEARCHED, 0.60), (SEARCHED, 0.30)),
    LONGER: ((ORIGINAL, None), (SEARCHED, 0.60), (SEARCHED, 0.30)),
}
AFTER_SUPER = (SEARCHED, RECTANGLE), (0.60, 0.30)  # kinds and shares that are scored after super fine-tuning
WEIGHTS = ("weight", "state_weight")  # of the teacher
OF_TAUGHT = (*WEIGHTS, "sandwich_steps")  # fields of the recipe that are nothing to the original
COPIED = ("score", INT8, "seconds", *WEIGHTS)  # to the row of another model with the same shape
WAYS = (ORIGINAL, *KINDS, SUPERNET, *OTHERWISE, SUPER)

__all__ = ["answer", "main", "targets"]


@dataclass(frozen=True, eq=False)
class Study:
    """What all runs share."""

    args: argparse.Namespace
    recipe: Recipe
    results: Results
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str | None  # of the supernet; None if there are rows of the original only

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.args.seeds or SEEDS)

    @lru_cache(maxsize=2)  # noqa: B019 (a process has one study)
    def task(self, name: str) -> Task:
        return load_task(name, self.args.data, self.tokenizer, self.recipe)

    @lru_cache(maxsize=2)  # noqa: B019
    def teacher(self, task: str) -> RememberingTeacher:
        """Return the fine-tuned original of the best seed."""
        folder = self.teacher_folder(task)
        model = self.task(task).auto_class.from_pretrained(folder)
        return RememberingTeacher(model, str(folder), self.recipe.state_weight > 0)

    def teacher_folder(self, task: str) -> Path:
        return self.args.output_dir / "teachers" / task

    def run_folder(self, task: str, way: str, model: str) -> Path:
        return self.args.output_dir / "tasks" / task / f"{way} {model}".replace(" ", "_").replace("%", "")

    def add(self, model: Row, **values: Any) -> Row:
        """Add a row; those of subnets name their supernet."""
        supernet = None if model["kind"] == ORIGINAL else self.fingerprint
        return self.results.add({**model, **values, "supernet": supernet})


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, GUESSED), default=list(TASKS), help="tasks to measure")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="models and ways to measure")
    compared.add_options(parser)
    tuning.add_options(parser)
    return parser.parse_args(arguments)


def start(args: argparse.Namespace) -> tuple[Study, list[Compared]]:
    """Return the study with the rows that are there, and the compared models in the order of measuring."""
    alone = set(args.only) == {ORIGINAL}
    models = compared_models(
        args.bert, None if alone else args.supernet, None if alone else compared.search_folder(args), args.shares
    )
    recipe = read_recipe(args)
    common = {name: value for name, value in asdict(recipe).items() if name not in OF_TAUGHT}
    original = fingerprint_encoder(compared.load_original(args.bert))[:12]
    results = Results(args.results, QUESTION, {"recipe": common, "original": original})
    check_taught(results.rows, recipe)
    check_shapes(results.rows, models)
    fingerprint = None if alone else check_supernet(results.rows, args.supernet)
    tokenizer = AutoTokenizer.from_pretrained(args.bert)
    return Study(args, recipe, results, tokenizer, fingerprint), models


def check_taught(rows: Sequence[Row], recipe: Recipe) -> None:
    """Raise a ValueError if supernet and subnets were fine-tuned with another weight of the teacher, or other steps.

    These do not stand in the settings of the file, because the rows of the original do not depend on them.
    """
    for name in OF_TAUGHT:
        value = getattr(recipe, name)
        others = {row[name] for row in rows if row.get(name) is not None} - {value}
        if others:
            raise ValueError(
                f"There are rows with {name}={sorted(others)}, not {value}. Give --{name} the same value, remove them "
                "from the file of results, or choose another folder with --results."
            )


def plan(study: Study, models: list[Compared]) -> Iterator[Callable[[], object]]:
    """Yield what has to be done, in order: the original first, because it teaches the others."""
    args = study.args
    for model in models:
        if model.kind in args.only:
            for task in args.tasks:
                for seed in study.seeds:
                    yield partial(measure, study, task, model, seed)
    for way, tried in OTHERWISE.items():
        for model in models:
            if way in args.only and TRIED_ON in args.tasks and (model.kind, model.share) in tried:
                yield partial(measure, study, TRIED_ON, model, study.seeds[0], way)
    for task in args.tasks:
        if SUPER in args.only:
            yield partial(measure_super, study, task, models, study.seeds[0])


def measure(study: Study, task: str, model: Compared, seed: int, way: str = TUNED) -> None:
    """Fine-tune a model with one seed and add the row with its scores, unless it is there.

    Models of one shape are the same model: at a small budget the searched shape may be the rectangle.
    """
    key = {"task": task, "seed": seed, "way": way}
    if study.results.find(**key, model=model.name):
        return
    same = study.results.find(**key, shape=model.shape)
    if same:
        study.add(model.row(), **key, **{name: same[0][name] for name in COPIED if name in same[0]})
        return
    found, args = study.task(task), study.args
    folder = study.run_folder(task, way, model.name)
    teacher = None if model.kind == ORIGINAL or way == UNTAUGHT else study.teacher(task)
    source = args.bert if model.kind == ORIGINAL else args.supernet
    if way == SUPER_FIRST:
        super_tuned(study, task, seed)
        source = str(super_folder(study, task, seed))
    recipe = replace(study.recipe, steps=study.recipe.steps * TIMES_LONGER) if way == LONGER else study.recipe
    tuned = fine_tune(source, found, study.tokenizer, recipe, seed, folder, model.shape, teacher)
    scored = score(pytorch_run(tuned.model), found)
    if model.kind == ORIGINAL and way == TUNED:
        keep_teacher(study, task, tuned.model, scored)
    scores = {"score": scored}
    if way == TUNED:
        tuned.model.set_attn_implementation("sdpa")  # as everybody exports it
        scores[INT8] = score(onnx_run(export_files(tuned.model, folder / "export", args.bert)[INT8]), found)
    weights = {name: None if teacher is None else getattr(study.recipe, name) for name in WEIGHTS}
    study.add(model.row(), **key, **scores, seconds=tuned.seconds, **weights)
    shutil.rmtree(folder)


def keep_teacher(study: Study, task: str, model: PreTrainedModel, scored: float) -> None:
    """Keep a fine-tuned original as the teacher of its task, if its score is above those of earlier seeds."""
    earlier = study.results.find(task=task, model=ORIGINAL, way=TUNED)
    if any(row["score"] >= scored for row in earlier):
        return

    keep(study, model, study.teacher_folder(task))


def keep(study: Study, model: PreTrainedModel, folder: Path) -> None:
    """Write a fine-tuned model with its tokenizer into a folder, in place of what is there."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        study.tokenizer.save_pretrained(folder)

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, write, replace=True)


def super_folder(study: Study, task: str, seed: int) -> Path:
    return study.args.output_dir / SUPER / f"{task}-{seed}"


def super_tuned(study: Study, task: str, seed: int) -> Tuned:
    """Return the supernet after super fine-tuning on a task: all its shapes at once. Its folder is kept."""
    found, kept, folder = study.task(task), super_folder(study, task, seed), study.run_folder(task, SUPER, SUPERNET)
    if kept.exists():
        return Tuned(found.auto_class.from_pretrained(kept).eval(), None)
    tuned = fine_tune(
        study.args.supernet, found, study.tokenizer, study.recipe, seed, folder, None, study.teacher(task), True
    )
    keep(study, tuned.model, kept)
    shutil.rmtree(folder)
    return tuned


def measure_super(study: Study, task: str, models: list[Compared], seed: int) -> None:
    """Fine-tune the supernet on a task, all shapes at once, and add a row for every shape that is scored on it."""
    key = {"task": task, "seed": seed, "way": SUPER}
    wanted = [
        (model.row(), model.shape)
        for model in models
        if model.kind == SUPERNET or (model.kind in AFTER_SUPER[0] and model.share in AFTER_SUPER[1])
    ]
    space = SearchSpace.from_model(compared.load_supernet(study.args.supernet))
    for number, shape in enumerate(random_shapes(space, NUM_RANDOM)):
        row = {"model": f"{RANDOM} {number}", "kind": RANDOM, "share": None, "shape": shape}
        wanted.append(({**row, "parameters": space.num_parameters(shape)}, shape))
    missing = [each for each in wanted if not study.results.find(**key, model=each[0]["model"])]
    if not missing:
        return
    tuned = super_tuned(study, task, seed)
    for row, shape in missing:
        scored = score(pytorch_run(tuned.model, shape), study.task(task))
        recipe = {name: getattr(study.recipe, name) for name in OF_TAUGHT}
        study.add(row, **key, score=scored, seconds=tuned.seconds, **recipe)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    study, models = start(args)
    for step in plan(study, models):
        step()
    print(answer(args.results, args.output_dir))


if __name__ == "__main__":
    main()
