"""How question 6 fine-tunes a model on a task and scores it: one recipe for all models and all tasks.

It is the recipe of `examples/run_glue.py` with four differences that save time on a CPU or make scores comparable: the
last epoch is kept, so that no score is chosen on the examples that are scored; attention is computed plainly ("eager"),
whose backward pass is faster in bfloat16; examples are scored in the order of their lengths, with little padding; and
the teacher reads every example once.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from supershaper_hf.finetuning.arguments import FineTuningArguments
from supershaper_hf.finetuning.experiment import make_trainer, newest_checkpoint, seed_folder
from supershaper_hf.finetuning.glue import glue_task
from supershaper_hf.finetuning.models import load_model, take_head
from supershaper_hf.finetuning.super_tuning import task_batches
from supershaper_hf.finetuning.task import Task
from supershaper_hf.publish.quantization import onnx_session

from .study import task_file


SCORING_BATCH = 32

Batch = Mapping[str, torch.Tensor]
Run = Callable[[Batch], np.ndarray]  # from a batch to its logits


@dataclass(frozen=True)
class Recipe:
    """What every fine-tuning of the study has in common.

    Attributes:
        learning_rate: The highest one of AdamW, which warms up over 6 % of the steps and falls linearly to 0.
        steps: A task is read as many times as come nearest to this number of steps, so a small one more often than a
            large one.
        batch_size: Examples in a step, of similar length.
        max_length: Tokens of the longest example; longer ones are cut.
        weight: Share of the loss that is the distance to the logits of the original, fine-tuned on the task. The
            original itself has no teacher.
        state_weight: Factor of the error of the last hidden states, which is added. Unless it is 0, a model starts with
            the head of its teacher.
        sandwich_steps: Those of a super fine-tuning, each of which trains four shapes.
    """

    learning_rate: float = 1e-4
    steps: int = 420
    batch_size: int = 32
    max_length: int = 128
    weight: float = 0.5
    state_weight: float = 1.0
    sandwich_steps: int = 420


class Tuned(NamedTuple):
    """A fine-tuned model, and the processor seconds that it took; `None` if the run was stopped in between."""

    model: PreTrainedModel
    seconds: float | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of the recipe."""
    for field in dataclasses.fields(Recipe):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)


def read_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe that the options describe."""
    return Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})


def load_task(name: str, data: Path, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Task:
    """Return a task of the study. Its validation examples are sorted by their length, which changes no score."""
    files = [task_file(data, name, split) for split in ("train", "validation")]
    task = glue_task(name, tokenizer, files[0], files[1:], max_length=recipe.max_length)
    scored = {}
    for split, examples in task.evaluation.items():
        lengths = [len(ids) for ids in examples["input_ids"]]
        scored[split] = examples.select(np.argsort(lengths, kind="stable"))
    return dataclasses.replace(task, evaluation=scored)


def fine_tune(
    model: str,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    seed: int,
    folder: Path,
    shape: Sequence[int] | None = None,
    teacher: "RememberingTeacher | None" = None,
    sandwich: bool = False,
) -> Tuned:
    """Fine-tune a model with one seed. A call that was stopped goes on at the end of its last epoch.

    Args:
        model: Folder of the original, or of the supernet.
        task: The task, tokenised with `tokenizer`.
        tokenizer: Of the model.
        recipe: How.
        seed: Random seed of the head, the order of the examples, dropout and the shapes of a sandwich.
        folder: Where the checkpoints lie while it runs.
        shape: The shape that is cut out of the supernet first.
        teacher: Whom the model learns from, besides the labels.
        sandwich: Whether all shapes of the supernet are trained at once.

    Returns:
        The model after the last step, in float32.
    """
    values = asdict(recipe)
    args = FineTuningArguments(
        output_dir=str(folder),
        model=model,
        learning_rate=values["learning_rate"],
        num_train_epochs=epochs_of(
            len(task.train), recipe.batch_size, recipe.sandwich_steps if sandwich else recipe.steps
        ),
        per_device_train_batch_size=values["batch_size"],
        teacher=None if teacher is None else teacher.source,
        distillation_weight=values["weight"],
        state_weight=0.0 if teacher is None else values["state_weight"],
        sandwich=sandwich,
        bf16=True,
        train_sampling_strategy="group_by_length",
        eval_strategy="no",
        load_best_model_at_end=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    start = time.process_time()
    loaded = load_model(args, task, None if shape is None else list(shape), seed)
    loaded.set_attn_implementation("eager")
    if teacher is not None and recipe.state_weight > 0:
        take_head(loaded, teacher.teacher)
    trainer = make_trainer(args, task, tokenizer, loaded, cast(Any, teacher), seed)
    checkpoint = newest_checkpoint(seed_folder(folder, seed))
    trainer.train(resume_from_checkpoint=checkpoint)
    trained: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast
    return Tuned(trained.eval(), round(time.process_time() - start, 1) if checkpoint is None else None)


def epochs_of(examples: int, batch_size: int, steps: int) -> int:
    """Return how often so many examples are read in about `steps` steps; at least once.

    Example:
        >>> [epochs_of(examples, 32, 420) for examples in (8551, 6920, 3576, 2933, 2489)]
        [2, 2, 4, 5, 5]
    """
    return max(1, round(steps / -(-examples // batch_size)))


class States(nn.Module):
    """What a remembering teacher has in place of its encoder: it returns last hidden states that were remembered."""

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor]:
        return (states,)


class RememberingTeacher(nn.Module):
    """A teacher that reads each example once: the same is needed in every epoch, for every model and seed.

    Args:
        teacher: A fine-tuned model, which reads without dropout.
        source: Its folder.
        states: Whether its last hidden states are remembered, too, in bfloat16: 770 bytes a token of MiniLM.
    """

    def __init__(self, teacher: PreTrainedModel, source: str, states: bool = True):
        super().__init__()
        self.teacher, self.source, self.states = teacher.eval(), source, states
        self.base_model = States()
        self.known: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """Return the logits (batch, labels) of a batch, whose examples are told apart by their tokens.

        The last hidden states go through `base_model`, as those of every model do.
        """
        real = attention_mask > 0
        keys = [tuple(ids[mask].tolist()) for ids, mask in zip(input_ids, real)]
        new = [row for row, key in enumerate(keys) if key not in self.known]
        if new:
            chosen = {name: tensor[new] for name, tensor in inputs.items()}
            chosen |= {"input_ids": input_ids[new], "attention_mask": attention_mask[new]}
            found = self.teacher(**chosen, output_hidden_states=True)
            for row, logits, states in zip(new, found.logits.float(), found.hidden_states[-1]):
                kept = states[real[row]] if self.states else states[:0]
                self.known[keys[row]] = logits, kept.to(torch.bfloat16)
        known = [self.known[key] for key in keys]
        if self.states:
            padded = torch.ones(*real.shape, known[0][1].shape[-1])  # not 0: errors are divided by the norm
            padded[real] = torch.cat([states for _, states in known]).float()
            self.base_model(padded)
        return SequenceClassifierOutput(logits=torch.stack([logits for logits, _ in known]))


# Scores


def pytorch_run(model: PreTrainedModel, shape: Sequence[int] | None = None) -> Run:
    """Return a function that runs a model, or a shape of a supernet, without gradients."""
    arguments: dict[str, Any] = {} if shape is None else {"shape": list(shape)}

    @torch.inference_mode()
    def run(batch: Batch) -> np.ndarray:
        logits: torch.Tensor = model(**batch, **arguments).logits
        return logits.numpy()

    return run


def onnx_run(file: Path) -> Run:
    """Return a function that runs an exported file."""
    session = onnx_session(file)
    return lambda batch: session({name: tensor.numpy() for name, tensor in batch.items()})["logits"]


def score(run: Run, task: Task) -> float:
    """Return the score of a model on the validation examples of a task, times 100."""
    logits, labels = zip(*((run(batch), expected) for batch, expected in scoring_batches(task)))
    found = task.compute_metrics(EvalPrediction(np.concatenate(logits), np.concatenate(labels)))
    return round(100 * found[task.score], 4)


def scoring_batches(task: Task) -> Iterator[tuple[dict[str, torch.Tensor], np.ndarray]]:
    """Yield the validation examples in batches, and their labels."""
    for batch in task_batches(task, SCORING_BATCH):
        yield {name: tensor for name, tensor in batch.items() if name != "labels"}, batch["labels"].numpy()
