"""Super fine-tuning: train a whole supernet on a task, so that every shape is ready for it, and find the best shapes.

Each step trains the largest shape, the smallest one and random ones on the same examples (the sandwich rule, Yu and
Huang, "Universally Slimmable Networks", 2019). The narrow shapes learn from the labels and from the logits of the
largest shape, or all of them from those of an outside teacher.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from ..model.shapes import SHAPE_NAMES, SearchSpace
from ..publish.card import plain
from ..publish.hub import save_for_hub
from ..report.findings import PREDICTOR_FILE, RECORDS_FILE, write_config
from ..report.page import write_report
from ..report.plots import plot_measured
from ..report.tables import markdown_table
from ..search.evaluation import evaluate_shapes
from ..search.pareto import pareto_front, shapes_at
from ..search.predictor import MINIMUM_SHAPES, ShapePredictor
from ..search.records import Record
from ..search.rounds import best_measured, measure_in_rounds
from ..search.task_loss import Score
from ..training.sandwich import exchange_gradients
from .arguments import FineTuningArguments
from .models import is_supernet
from .task import Task
from .trainer import LOGITS, DistillingTrainer


SEARCH, SUBNET = "search", "subnet"  # folders: what was measured, and the best subnet for the budget
BUDGETS = 6  # shapes of the front that are measured, evenly spaced


class SandwichTrainer(DistillingTrainer):
    """A `DistillingTrainer` that trains the whole supernet: its loss is the sum of the losses of a step's shapes.

    The largest shape learns from the labels, and from the outside teacher if there is one. The others learn from the
    labels and the outside teacher, or else from the logits of the largest shape on the same examples.

    The shapes follow from the seed and the number of the step, so they are the same on every process and after a
    resume. Processes exchange gradients once, after the last pass of a step, so a parameter that no shape has used
    needs none. Logged is the mean loss of the shapes.

    Args:
        *args: The arguments of `DistillingTrainer`. Its model is a supernet with the head of a task.
        random_shapes: Number of random shapes in each step.
        **kwargs: The arguments of `DistillingTrainer`.

    Raises:
        ValueError: If the model is not a supernet, or its weights or batches are divided over devices in another way
            than one process per device.
    """

    def __init__(self, *args: Any, random_shapes: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        if not is_supernet(model.config):
            raise ValueError(f"{type(model).__name__} is not a supernet, so it has one shape only. Leave sandwich out.")
        if self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("A sandwich needs one process per device that holds all weights: no FSDP, no DeepSpeed.")
        self.space, self.random_shapes = SearchSpace.from_model(model), random_shapes
        self.taught: Any = None  # the logits that the next shape learns from

    def step_shapes(self) -> list[list[int]]:
        """Return the shapes of the current step, the largest first, because it teaches the others."""
        drawn = self.space.sample(self.random_shapes, (self.args.seed, self.state.global_step)).tolist()
        return [self.space.largest, self.space.smallest, *drawn]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Add up the gradients of every shape on a micro-batch, as `Trainer` calls it; return their mean loss.

        Each shape is backpropagated before the next one runs, so that the memory holds the activations of one only.
        """
        inputs = self._prepare_inputs(inputs)
        self.taught = super().teach(inputs)
        step = super().training_step
        with self.accelerator.no_sync(model):
            losses = [step(model, {**inputs, "shape": shape}, num_items_in_batch) for shape in self.step_shapes()]
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            exchange_gradients(model)
        return torch.stack(losses).mean()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a shape. The first shape of a step teaches the others, unless a teacher does."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.taught is None:
            self.taught = ModelOutput({name: outputs[name].detach() for name in LOGITS if name in outputs})
        return (loss, outputs) if return_outputs else loss

    def teach(self, inputs: dict[str, Any]) -> Any:
        """Return the logits that the current shape learns from; `None` for the largest without an outside teacher."""
        return self.taught


# After the training


def task_score(task: Task) -> Score:
    """Return the score of a task as a function of logits and labels, whose name is that of the score."""

    def score(predictions: Any, labels: Any) -> float:
        return task.compute_metrics(EvalPrediction(predictions, labels))[task.score]

    score.__name__ = task.score
    return score


def task_batches(task: Task, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Return the examples of the first split that is scored as batches, in order."""
    data = next(iter(task.evaluation.values()))
    rows = [data[row] for row in range(len(data))]
    return [dict(task.collator(rows[start : start + batch_size])) for start in range(0, len(rows), batch_size)]


def search_task(
    args: FineTuningArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    supernet: PreTrainedModel,
    folder: Path,
) -> list[dict[str, Any]]:
    """Measure shapes of a fine-tuned supernet on the task, write what was found, and cut out the best subnet.

    Measured are the rectangles, the hand-crafted shapes of medium size, others until there are `args.num_shapes`, and
    some of the predicted front. `folder` gets `records.jsonl`, `predictor.json`, `report.md` with its plots, and
    `scores.png`. With `args.max_cost`, the best measured shape within it is saved beside `folder` as the standalone
    model `subnet`.

    Args:
        args: The options `num_shapes`, `cost`, `max_cost`, `max_length` and `per_device_eval_batch_size` are used.
        task: The task. Shapes are measured on the first split that is scored.
        tokenizer: Saved with the subnet.
        supernet: The supernet, with the head of the task.
        folder: The folder of the results. The same call continues with the records in it.

    Returns:
        The rows of a table: `shape` (by name, where it has one, and whether it was saved), `parameters`, `task_loss`,
        the score by its name, and `widths`.

    Raises:
        ValueError: If no measured shape is as cheap as `args.max_cost`, or `folder` holds records of another model.
    """
    model: Any = supernet
    model.to(args.device)
    space, batches = SearchSpace.from_model(model), task_batches(task, args.per_device_eval_batch_size)

    def measure(shapes: Sequence[Sequence[int]]) -> list[Record]:
        file = folder / RECORDS_FILE
        found: Any = evaluate_shapes(
            model, batches, list(shapes), records_file=file, measure="task_loss", score=task_score(task)
        )
        return found

    folder.mkdir(parents=True, exist_ok=True)
    named = named_shapes(space)
    records = measure(list(named.values()))
    budgets = None if args.max_cost is None else [args.max_cost]
    cost: Any = args.cost
    random = measure_in_rounds(
        space, measure, max(args.num_shapes, MINIMUM_SHAPES), cost=cost, max_cost=budgets,
        sequence_length=args.max_length,
    )  # fmt: skip
    predictor = ShapePredictor.fit_records(random)
    front = pareto_front(space, predictor, cost, sequence_length=args.max_length)
    best = measure(np.unique(shapes_at(front, BUDGETS), axis=0).tolist())
    write_config(folder, space)
    predictor.save(folder / PREDICTOR_FILE)
    source = model.name_or_path or None  # the folder that it was loaded from
    write_report(folder, args.cost, budgets or [], BUDGETS, args.max_length, source)
    everything = {tuple(record["shape"]): record for record in [*records, *random, *best]}
    names = {tuple(shape): name for name, shape in named.items()}
    rows: list[dict[str, Any]] = [
        {
            "shape": names.get(shape, "front" if record in best else "random"),
            "parameters": space.num_parameters(list(shape)),
            "task_loss": f"{record['task_loss']:.4f}",
            task.score: "" if record["score"] is None else f"{record['score']:.4f}",
            "widths": list(shape),
        }
        for shape, record in everything.items()
    ]
    plot_scores(folder / "scores.png", rows, task.score)
    if args.max_cost is not None:
        chosen = best_measured(space, list(everything.values()), cost, args.max_cost, args.max_length)
        save_subnet(args, task, tokenizer, model, everything[tuple(chosen)], len(everything), folder.parent / SUBNET)
        next(row for row in rows if row["widths"] == chosen)["shape"] += f" ({SUBNET})"
    return rows


def named_shapes(space: SearchSpace) -> dict[str, list[int]]:
    """Return the rectangles by their width, and the hand-crafted shapes of medium size by their names."""
    found = {f"rectangle {width}": [width] * space.num_layers for width in reversed(space.width_choices)}
    medium = (space.num_parameters(space.smallest) + space.num_parameters(space.largest)) // 2
    known = {tuple(shape) for shape in found.values()}
    for name in SHAPE_NAMES:
        shape = space.named_shape(name, medium)
        if tuple(shape) not in known and 0 not in shape:
            found[name.replace("_", " ")] = shape
            known.add(tuple(shape))
    return found


def plot_scores(file: Path, rows: Sequence[dict[str, Any]], score: str) -> None:
    """Write a PNG of the score of shapes over their parameters."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row[score] != "":
            kind = row["shape"] if row["shape"] in ("front", "random") else row["shape"].partition(" ")[0]
            name = {"rectangle": "rectangles", "front": "front", "random": "random"}.get(kind, "hand-crafted")
            groups.setdefault(name, []).append((row["parameters"], float(row[score])))
    if groups:
        plot_measured(file, f"{score} on the task".replace("_", " "), **groups)


def save_subnet(
    args: FineTuningArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    supernet: Any,
    record: Record,
    candidates: int,
    folder: Path,
) -> None:
    """Cut out the subnet of a record, the best of some candidates, and save it as a complete model with its card."""
    subnet = supernet.extract_subnet(record["shape"])
    split, score = next(iter(task.evaluation)), f"{record['score']:.4f}"
    save_for_hub(
        subnet,
        folder,
        tokenizer=tokenizer,
        replace=True,
        training=(
            f"Cut out of a supernet whose shapes were all fine-tuned on the task {plain(task.name)} at once. "
            f"Of {candidates} measured shapes, it is the one with the lowest loss on {split} among those that have at "
            f"most {args.max_cost:,.0f} {args.cost}."
        ),
        evaluation=markdown_table([{"split": split, "task_loss": f"{record['task_loss']:.4f}", task.score: score}]),
    )
