"""Fine-tune a model on a task with every seed, score it, and keep the best one.

    output_dir/seed-0/            one run: checkpoints while it runs, afterwards its results alone
               model/             the model of the best seed, complete: weights, code, tokenizer, card
               search/  subnet/   with a sandwich: shapes measured on the task; the best one for the budget
               run.json           the options that may not change in this folder
               results.json       the scores of every seed, their means and spreads, and what was fine-tuned

A run that was killed resumes from its newest complete checkpoint and, on a CPU, ends with the same weights. Seeds that
are done are not run again: a call with further seeds adds them to the results.
"""

import copy
import hashlib
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from ..files import lock, read_json, write_folder, write_json
from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from ..processes import on_every_process, on_main_process
from ..publish.card import plain
from ..publish.hub import save_for_hub
from ..publish.results import FINE_TUNING as RESULTS_FORMAT
from ..publish.results import library_versions
from ..report.tables import markdown_table, text_table
from .arguments import FineTuningArguments
from .models import choose_shape, load_model, load_teacher, take_head
from .super_tuning import SEARCH, SUBNET, SandwichTrainer, search_task
from .task import Task
from .trainer import DistillingTrainer


RUN_FILE, RESULTS_FILE = "run.json", "results.json"
MODEL = "model"
NO_SCORES = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def fine_tune(args: FineTuningArguments, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Fine-tune the model that `args` name on `task` with every seed, and write the results and the best model.

    A supernet without a shape or a budget is fine-tuned at its largest shape. Every process of `accelerate launch`
    calls this function; only the main one writes.

    Args:
        args: The options. `args.output_dir` is the folder of the results.
        task: The task, tokenised with `tokenizer`.
        tokenizer: Saved with the model.

    Returns:
        The content of `results.json`: `task`, `model`, `shape`, `parameters`, `seeds` (a list with the scores of each
        seed by split), `mean` and `spread` (standard deviation over the seeds; `None` of one seed) of every score, and
        `best_seed`.
        With `args.sandwich` the scores are those of the largest shape, and `shapes` has the rows of `search_task`.

    Raises:
        ValueError: If `args.output_dir` holds results of other options, the model is no supernet but a shape is asked
            for, or the teacher does not fit.
        FileExistsError: If `args.output_dir` holds a folder `model` that no fine-tuning has written.
        RuntimeError: If another run is using `args.output_dir`.

    Example:
        >>> args = FineTuningArguments(output_dir="outputs/sst2", model="subnet", seeds=[0, 1, 2])  # doctest: +SKIP
        >>> tokenizer = load_tokenizer(args)  # doctest: +SKIP
        >>> results = fine_tune(args, glue_task("sst2", tokenizer), tokenizer)  # doctest: +SKIP
        >>> results["mean"]["validation"]["accuracy"]  # doctest: +SKIP
        0.915
    """
    processes: Any = args.distributed_state
    folder = Path(str(args.output_dir))
    with ExitStack() as stack:

        def begin() -> tuple[list[int] | None, dict[str, Any]]:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder))
            current = settings(args, task)
            check_settings(folder, current)
            shape = choose_shape(args, task, folder)
            current["chosen_shape"] = shape  # other records may lead to another shape
            check_settings(folder, current)
            return shape, current

        shape, current = on_main_process(begin, processes)
        teacher = on_every_process(partial(load_teacher, args, task, tokenizer), processes)
        on_main_process(partial(write_json, folder / RUN_FILE, RESULTS_FORMAT, current), processes)
        for seed in args.seeds:
            if on_main_process(partial(seed_results, folder, seed), processes) is None:
                run_seed(args, task, tokenizer, shape, teacher, seed)
        summary = on_main_process(partial(summarize, args, task), processes)
        if args.sandwich:
            summary["shapes"] = on_main_process(partial(search_best, args, task, tokenizer), processes)
        return summary


def search_best(args: FineTuningArguments, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Measure the shapes of the best supernet on the task; return the rows of a table."""
    folder = Path(str(args.output_dir))
    return search_task(args, task, tokenizer, task.auto_class.from_pretrained(folder / MODEL), folder / SEARCH)


def run_seed(
    args: FineTuningArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    shape: list[int] | None,
    teacher: PreTrainedModel | None,
    seed: int,
) -> None:
    """Fine-tune with one seed, score the best epoch, and write it down. The model stays if it is the best so far."""
    processes: Any = args.distributed_state
    folder = seed_folder(args.output_dir, seed)
    model = on_every_process(partial(load_model, args, task, shape, seed), processes)
    if teacher is not None and args.state_weight > 0:
        take_head(model, teacher)
    trainer = make_trainer(args, task, tokenizer, model, teacher, seed)
    trainer.train(resume_from_checkpoint=on_main_process(partial(newest_checkpoint, folder), processes))
    scores = {
        split: {name: round(value, 6) for name, value in measured(trainer, data, split).items()}
        for split, data in task.evaluation.items()
    }
    state = trainer.state
    found = {
        "seed": seed,
        "scores": scores,
        "steps": state.global_step,
        "epochs": state.epoch,
        "best_step": state.best_global_step,
        "parameters": model.num_parameters(),
        "shape": model.config.hidden_sizes if isinstance(model, SuperShaperPreTrainedModel) else None,
    }

    def write() -> None:
        if best_of([found, *all_results(Path(str(args.output_dir)))], task) is found:
            if args.sandwich:
                shutil.rmtree(Path(str(args.output_dir)) / SEARCH, ignore_errors=True)  # of the model that is replaced
            save_model(args, task, tokenizer, model, found)
        write_json(folder / RESULTS_FILE, RESULTS_FORMAT, found)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    on_main_process(write, processes)


def make_trainer(
    args: FineTuningArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    seed: int,
) -> DistillingTrainer:
    """Return the `Trainer` of one seed."""
    own = copy.copy(args)
    own.output_dir, own.seed = str(seed_folder(args.output_dir, seed)), seed
    own.metric_for_best_model, own.greater_is_better = f"eval_{task.score}", True
    own.restore_callback_states_from_checkpoint = True  # for the patience of early stopping
    own.dataloader_pin_memory = own.dataloader_pin_memory and own.device.type == "cuda"  # elsewhere it only warns
    patience = args.early_stopping_patience
    trainer_class: Any = DistillingTrainer
    if args.sandwich:
        trainer_class = partial(SandwichTrainer, random_shapes=args.random_shapes)
    return trainer_class(
        model=model,
        args=own,
        train_dataset=task.train,
        eval_dataset=next(iter(task.evaluation.values())),
        processing_class=tokenizer,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
        teacher=teacher,
        weight=args.distillation_weight,
        state_weight=args.state_weight,
        temperature=args.temperature,
    )


def measured(trainer: DistillingTrainer, data: Any, split: str) -> dict[str, float]:
    """Return the scores of a split.

    The loss is left out: on several processes, `Trainer` counts some examples twice in it.
    """
    figures = trainer.evaluate(data, metric_key_prefix=split)
    names = {name.removeprefix(f"{split}_"): value for name, value in figures.items() if name.startswith(f"{split}_")}
    return {name: float(value) for name, value in names.items() if name not in NO_SCORES}


# The folder


def seed_folder(output_dir: Any, seed: int) -> Path:
    return Path(str(output_dir)) / f"seed-{seed}"


def seed_results(folder: Path, seed: int) -> dict[str, Any] | None:
    """Return the results of a seed that is done; `None` if it is not."""
    file = seed_folder(folder, seed) / RESULTS_FILE
    return read_json(file, RESULTS_FORMAT) if file.exists() else None


def all_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results of all seeds that are done, also of those that an earlier call ran, in the order of seeds."""
    seeds = [int(path.parent.name.removeprefix("seed-")) for path in folder.glob(f"seed-*/{RESULTS_FILE}")]
    return [found for seed in sorted(seeds) if (found := seed_results(folder, seed)) is not None]


OPTIONS = (  # that decide the results of a seed
    *("model", "shape", "max_cost", "cost", "max_length"),
    *("teacher", "distillation_weight", "state_weight", "temperature"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "num_train_epochs", "max_steps", "warmup_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "dataloader_drop_last"),
    *("weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "data_seed", "train_sampling_strategy"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end"),
    *("early_stopping_patience", "sandwich", "random_shapes"),
)


def settings(args: FineTuningArguments, task: Task) -> dict[str, Any]:
    """Return what decides the results of a seed: the task, its examples, and the options."""
    splits = {"train": task.train, **task.evaluation}
    return (
        {"task": task.name, "examples": {split: len(data) for split, data in splits.items()}}
        | {f"fingerprint of {split}": fingerprint(data) for split, data in splits.items()}
        | task.options
        | {name: getattr(args, name, None) for name in OPTIONS}
    )


def fingerprint(data: Dataset) -> str:
    """Return the first digits of the SHA-256 of all examples."""
    digest = hashlib.sha256()
    for batch in data.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def check_settings(folder: Path, current: dict[str, Any]) -> None:
    """Raise an error that names what differs if the runs in `folder` have other options, or are not ours."""
    file = folder / RUN_FILE
    names = (MODEL, *((SEARCH, SUBNET) if current["sandwich"] else ()))
    strange = [name for name in names if (folder / name).exists() and not file.exists()]
    if strange:
        raise FileExistsError(
            f"{folder} holds {' and '.join(strange)}, which a fine-tuning would replace, but no {RUN_FILE} of an "
            "earlier one. Choose another folder."
        )
    before = read_json(file, RESULTS_FORMAT) if file.exists() else current
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}" for name, value in current.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(f"{folder} holds a fine-tuning with other options: {'; '.join(changed)}. Use another folder.")


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of a seed; `None` if there is none.

    `Trainer` writes `trainer_state.json` last. A checkpoint without it was being written when the run was killed; it
    is removed.
    """
    complete = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            complete[TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step] = checkpoint
        except (OSError, ValueError, TypeError):
            shutil.rmtree(checkpoint)
    return str(complete[max(complete)]) if complete else None


# Results


def best_of(results: list[dict[str, Any]], task: Task) -> dict[str, Any]:
    """Return the results of the best seed, by the score of the first split; of equal ones, the smallest seed."""
    split = next(iter(task.evaluation))
    return max(results, key=lambda result: (result["scores"][split][task.score], -result["seed"]))


def summarize(args: FineTuningArguments, task: Task) -> dict[str, Any]:
    """Write `results.json` and return its content."""
    folder = Path(str(args.output_dir))
    results = all_results(folder)
    best = best_of(results, task)
    scores = {split: list(best["scores"][split]) for split in task.evaluation}

    def over_seeds(compute: Any) -> dict[str, dict[str, Any]]:
        return {
            split: {name: compute([found["scores"][split][name] for found in results]) for name in names}
            for split, names in scores.items()
        }

    summary = {
        "task": task.name,
        "score": task.score,
        "model": args.model,
        "parameters": best["parameters"],
        "shape": best["shape"],
        "seeds": results,
        "mean": over_seeds(lambda values: round(statistics.fmean(values), 6)),
        "spread": over_seeds(lambda values: round(statistics.stdev(values), 6) if len(values) > 1 else None),
        "best_seed": best["seed"],
        "library_version": library_versions(),
    }
    write_json(folder / RESULTS_FILE, RESULTS_FORMAT, summary)
    return summary


def results_text(summary: Mapping[str, Any], folder: Any, shown: Sequence[str] = ()) -> str:
    """Return what a script prints: one line, the scores, and the shapes that were measured after a sandwich.

    Args:
        summary: What `fine_tune` returned.
        folder: The folder of the results.
        shown: The scores to show, those that there are. By default all.
    """
    seeds = [found["seed"] for found in summary["seeds"]]
    line = f"shape {summary['shape']}, seeds {seeds}, model of seed {summary['best_seed']}: {Path(folder) / MODEL}"
    rows = score_rows(summary)
    if shown:
        names = ("task", "split", "parameters", *shown)
        rows = [{name: row[name] for name in names if name in row} for row in rows]
    shapes = sorted(summary.get("shapes", []), key=lambda row: -row["parameters"])
    return "\n".join([line, text_table(rows), *([text_table(shapes)] if shapes else [])])


def score_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results as the rows of a table: one for each split, the scores as mean ± spread over the seeds.

    One seed has no spread.
    """
    rows = []
    for split, means in summary["mean"].items():
        row: dict[str, Any] = {"task": summary["task"], "split": split, "parameters": summary["parameters"]}
        for name, mean in means.items():
            spread = summary["spread"][split][name]
            row[name] = f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"
        rows.append(row)
    return rows


def save_model(
    args: FineTuningArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    found: Mapping[str, Any],
) -> None:
    """Write the model of a seed to the folder `model`. One of ours gets its card and its code too."""
    folder = Path(str(args.output_dir)) / MODEL
    if not isinstance(model, SuperShaperPreTrainedModel):

        def write(partial: Path) -> None:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)

        write_folder(folder, write, replace=True)
        return
    rows = [
        {"split": split} | {name: f"{value:.4f}" for name, value in scores.items()}
        for split, scores in found["scores"].items()
    ]
    training = (
        f"Fine-tuned on the task {plain(task.name)} ({len(task.train):,} {task.rows}) for {found['epochs']:g} epochs "
        f"with AdamW, learning rate {args.learning_rate:g}, batches of {args.train_batch_size} {task.rows} on each "
        f"process, seed {found['seed']}. The checkpoint with the highest {task.score} on {rows[0]['split']} was kept."
    )
    if args.sandwich:
        training += (
            f" All shapes were trained at once: in each step the largest, the smallest and {args.random_shapes} random "
            "ones. The scores are those of the largest."
        )
    if args.teacher is not None:
        training += (
            f" {args.distillation_weight:.0%} of the loss was the distance to the logits of a fine-tuned teacher."
        )
        if args.state_weight > 0:
            training += f" The error of its last hidden states was added with the weight {args.state_weight:g}."
    save_for_hub(
        model,
        folder,
        tokenizer=tokenizer,
        replace=True,
        repo_id=MODEL,
        base_model=args.model if not Path(args.model).exists() else None,
        training=training,
        evaluation=markdown_table(rows),
    )
