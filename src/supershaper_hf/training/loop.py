"""Super pre-training: one supernet is trained so that every shape works, on any number of processes.

`super_pretrain` prepares a `Run`, and `Run.train` is the loop: read, step, log, evaluate, save. What one step computes
is in `sandwich.py`, what is written in `run_folder.py`, and what stops a run early in `stopping.py`.

A step is a function of the weights, the optimizer's moments, the seed, and the number of the step. Shapes, order of
the text, masks and dropout are all drawn from the seed and this number. So a run that resumes from a checkpoint equals
a run that was never stopped, and one process computes what several compute at the same global batch.
"""

import copy
import math
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..data.batches import MicroBatches
from ..data.sequences import check_vocabulary
from ..devices import copy_mapped_weights, device_name
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.costs import training_flops
from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperPreTrainedModel
from ..model.shapes import SearchSpace
from ..search.evaluation import evaluate_shapes
from ..search.measures import find_measure
from .arguments import SuperPretrainingArguments
from .compilation import compile_layers, release_layers
from .preparing import (
    check_model,
    check_teacher,
    checkpoint_layers,
    freeze,
    learning_rate_schedule,
    make_accelerator,
    make_objective,
    make_optimizer,
    make_stream,
    start_training_mode,
    unfreeze,
)
from .progress import Monitor, Progress, TrainingSummary
from .resuming import fingerprint_evaluation, position_in_text, run_conditions
from .run_folder import RunFolder, advice_when_diverged
from .sandwich import Batch, Shape, count_positions, sandwich_step, step_shapes
from .state import check_finite, collect_weights
from .stopping import Launcher, caught_signals
from .teacher import OutsideTeacher


def super_pretrain(
    model: SuperShaperPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset,
    args: SuperPretrainingArguments,
    *,
    eval_batches: Sequence[Batch] = (),
    teacher: OutsideTeacher | None = None,
    description: str = "Super pre-training",
    card: Mapping[str, Any] | None = None,
) -> TrainingSummary:
    """Train `model` in place on `dataset`.

    Shapes learn to predict masked tokens, to imitate an outside teacher, or both. With `args.mlm_probability=0` nothing
    is masked, and the encoder learns from the teacher alone.

    With `args.output_dir`, the run writes checkpoints, models, metrics and a summary to that folder (see
    `run_folder.py`), and resumes from the newest checkpoint in it. Without it, nothing is written or resumed.

    Args:
        model: A supernet; with `sampling="fixed"` also a subnet. To predict masked tokens it needs a masked-LM head.
            Otherwise it may be the bare model or have any head but that for multiple choice; the head does not learn.
        tokenizer: The tokenizer of the text, with [PAD], and with [MASK] unless `args.mlm_probability` is 0.
        dataset: Sequences from `data.tokenize`, or a streaming dataset with a column `text`.
        args: See `SuperPretrainingArguments`.
        eval_batches: Batches from `batches.fixed_masks`, masked if the text is, on which named shapes are evaluated: by
            their masked-LM loss, or without labels by their distance to the teacher.
        teacher: An outside teacher, for `args.teacher_weight`, `args.state_weight` and `args.pooled_weight`.
        description: Label of the progress bar.
        card: Further arguments of `save_for_hub`, such as sections and metadata of the model cards, or `pooling`.

    Returns:
        The summary. Its `status` is "finished" or "target reached" if the run is complete. It is "interrupted" after
        SIGTERM, Ctrl-C, or the end of the launcher: then there is a new checkpoint but no new model in `last`, and
        the caller should not go on as if the model were trained.

    Raises:
        ValueError: If tokenizer and vocabulary disagree, if `model` lacks a head that it needs, if it is a subnet and
            the sampling is not fixed, if the teacher is missing or does not fit, if there are checkpoints but none can
            be used, or if they were made under conditions that cannot change.
        FileExistsError: If `args.output_dir` holds files that no run of this package has made; also if
            `args.resume_from_checkpoint` is off and there are checkpoints.
        FloatingPointError: If the gradients are not finite in `args.max_skipped_steps` steps in a row, or if the
            weights are not finite when they would be saved.
        RuntimeError: If another run is using `args.output_dir`, or if Accelerate and the launcher disagree on the
            number of processes.
        OSError: If a file cannot be written.

    Example:
        >>> args = SuperPretrainingArguments(max_steps=1000, output_dir="outputs/supernet")  # doctest: +SKIP
        >>> summary = super_pretrain(supernet, tokenizer, tokenize(text, tokenizer, 128), args)  # doctest: +SKIP
        >>> summary.status  # doctest: +SKIP
        'finished'
    """
    check_vocabulary(tokenizer, model.config)
    check_model(args, model)
    copy_mapped_weights(model)
    if args.target_perplexity is not None and not eval_batches:
        raise ValueError(f"target_perplexity={args.target_perplexity} needs eval_batches to be measured on.")
    labelled = any((batch["labels"] != IGNORE_INDEX).any() for batch in eval_batches)
    if eval_batches and args.mlm_probability > 0 and not labelled:
        raise ValueError("No token of eval_batches is labelled. Use more text, or a higher mlm_probability.")
    card = dict(card or {}) | ({} if args.pooling is None else {"pooling": args.pooling})
    args = copy.copy(args)
    args.pooling = card.get("pooling") or "mean"
    accelerator = make_accelerator(args)
    check_teacher(args, model.config, tokenizer, teacher)
    stream = make_stream(dataset, tokenizer, args, accelerator)
    run = Run(accelerator, model, tokenizer, args, teacher, stream, list(eval_batches), card)
    try:
        with caught_signals() as signals, nullcontext() if run.folder is None else run.folder.held():
            summary = run.train(signals, description)
    finally:
        run.release()
    if signals and summary.status != "interrupted":  # The signal came after the last step: it acts as usual.
        signal.raise_signal(signals[0])
    return summary


class Run:
    """A training run on one process: what `super_pretrain` prepared, and the steps it consists of."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: SuperShaperPreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SuperPretrainingArguments,
        teacher: OutsideTeacher | None,
        stream: MicroBatches,
        eval_batches: list[Batch],
        card: dict[str, Any],
    ) -> None:
        self.accelerator, self.args, self.stream, self.eval_batches = accelerator, args, stream, eval_batches
        self.config: SuperShaperConfig = model.config
        self.space = None if args.sampling == "fixed" else SearchSpace.from_config(model.config)
        self.objective = make_objective(args, teacher)
        self.measure = find_measure("loss" if self.objective.labels else "distance")
        self.learning_rate = learning_rate_schedule(args)
        self.launcher = Launcher()
        self.progress = Progress()
        self.position: dict[str, Any] | None = None  # where to continue in the text; None is its start
        self.must_stop = False
        if args.gradient_checkpointing:
            checkpoint_layers(model, True)
        if args.torch_compile:
            compile_layers(model, len(self.config.width_choices or [1]), args.max_steps, accelerator.device)
        start_training_mode(model, args)
        self.frozen = freeze(model, args)
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(model, args))
        self.folder: RunFolder | None = None
        if args.output_dir is not None:
            conditions = run_conditions(
                args,
                self.config,
                tokenizer,
                text=stream.fingerprint,
                evaluation_text=fingerprint_evaluation(eval_batches),
                teacher=None if teacher is None else teacher.fingerprint,
                trained_parameters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
                processes=accelerator.num_processes,
                mixed_precision=accelerator.mixed_precision,
            )
            self.folder = RunFolder(accelerator, self.model, self.optimizer, tokenizer, args, conditions, card)

    def train(self, signals: list[signal.Signals], description: str) -> TrainingSummary:
        """Read, step, log, evaluate, save, until the last step, the target perplexity, or a reason to stop early."""
        args, progress = self.args, self.resume()
        batches = self.stream.iterate(self.position)
        with closing(Monitor(self.accelerator, args, progress, description)) as monitor:
            while progress.step < args.max_steps and not self.target_reached() and not self.must_stop:
                micro_batches = self.read(batches)
                losses, learning_rate, gradient_norm = self.step(micro_batches, signals)
                monitor.step(losses, learning_rate, gradient_norm)
                with monitor.paused():
                    if self.eval_batches and self.is_due(args.eval_steps or args.max_steps, also_last=True):
                        self.evaluate(monitor)
                    if self.is_due(args.save_steps) and progress.skipped_in_a_row == 0:
                        self.save_checkpoint()
            return self.finish(monitor, signals)

    def resume(self) -> Progress:
        """Resume from the newest good checkpoint, if there is one; return the counters."""
        state = None if self.folder is None else self.folder.resume()
        if state is not None:
            self.progress = state.progress
            together = self.args.per_device_train_batch_size * self.accelerator.num_processes
            self.position = position_in_text(state, self.accelerator.process_index, together)
        return self.progress

    def is_due(self, steps: int, also_last: bool = False) -> bool:
        """Return whether something that happens every so many steps happens after this one."""
        return self.progress.step % steps == 0 or (also_last and self.progress.step == self.args.max_steps)

    def target_reached(self) -> bool:
        """Return whether the first shape was good enough when it was last evaluated."""
        target, perplexity = self.args.target_perplexity, self.progress.perplexity
        return target is not None and perplexity is not None and perplexity <= target

    def read(self, batches: Iterator[tuple[Batch, dict[str, Any]]]) -> list[Batch]:
        """Return the micro-batches of the next step. If the text fails, save the steps done so far."""
        micro_batches, position = [], self.position
        try:
            for _ in range(self.args.gradient_accumulation_steps):
                batch, position = next(batches)
                micro_batches.append(batch)
        except Exception:
            # With several processes, the text of the others may be fine: they would not save, and this one would wait.
            if self.accelerator.num_processes == 1:
                self.save_checkpoint()
            raise
        self.position = position
        return micro_batches

    def step(self, micro_batches: list[Batch], signals: list[signal.Signals]) -> tuple[list[float], float, float]:
        """Train the shapes of one step.

        Returns:
            The loss of each shape over all processes (see `sandwich_step`), the learning rate, and the norm of the
            gradients.
        """
        args, progress, accelerator = self.args, self.progress, self.accelerator
        torch.manual_seed(derive_seed(args.seed, progress.step, accelerator.process_index))  # for dropout
        shapes = step_shapes(self.space, args, progress.step)
        learning_rate = self.learning_rate(progress.step - progress.skipped_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["scale"]
        losses = sandwich_step(accelerator, self.model, micro_batches, shapes, self.objective)
        norm = self.update()
        counts = np.sum([count_work(self.config, shapes, batch) for batch in micro_batches], axis=0).tolist()
        sequences, tokens, padded, labelled, flops, stops = self.sum_over_processes([*counts, self.stop_asked(signals)])
        progress.step += 1
        progress.sequences += sequences
        progress.tokens += tokens
        progress.padded_tokens += padded
        progress.labelled += labelled
        progress.flops += flops
        self.must_stop = stops > 0
        return accelerator.reduce(losses).tolist(), learning_rate, norm

    def stop_asked(self, signals: list[signal.Signals]) -> bool:
        return bool(signals) or self.launcher.is_gone()

    def sum_over_processes(self, counts: list[int]) -> list[int]:
        """Add up counts. They are exchanged as int64, because Apple GPUs have no float64."""
        return self.accelerator.reduce(torch.tensor(counts, dtype=torch.int64, device=self.accelerator.device)).tolist()

    def update(self) -> float:
        """Clip and apply the gradients, unless they are not finite; return their norm, equal on every process.

        Raises:
            FloatingPointError: If `max_skipped_steps` steps in a row had to be skipped.
        """
        accelerator, args, progress = self.accelerator, self.args, self.progress
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm))
        finite = math.isfinite(norm)
        if finite or accelerator.scaler is not None:  # The scaler of fp16 skips by itself, and learns from it.
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite:
            progress.skipped_in_a_row = 0
            return norm
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row == args.max_skipped_steps:
            raise FloatingPointError(
                f"The gradients were not finite in {args.max_skipped_steps} steps in a row (the last: step "
                f"{progress.step + 1}). {advice_when_diverged(args)}"
            )
        return norm

    def evaluate(self, monitor: Monitor) -> None:
        """Evaluate the named shapes, and save the model as `best` if their mean loss or distance is the lowest yet."""
        model = self.accelerator.unwrap_model(self.model)
        shapes = evaluation_shapes(self.space, self.args.shape)
        teacher, measure = self.objective.teacher, self.measure
        with torch.compiler.set_stance("force_eager"):  # Else each of the many lengths is compiled.
            records = evaluate_shapes(
                model,
                self.eval_batches,
                list(shapes.values()),
                "Evaluating",
                accelerator=self.accelerator,
                measure=measure.name,
                original=teacher.model if teacher is not None and measure.name == "distance" else None,
            )
        shown = [key for key in measure.keys if key != "shape"]
        monitor.evaluated({name: {key: r[key] for key in shown} for name, r in zip(shapes, records, strict=True)})
        perplexity = records[0].get("perplexity", math.inf)
        self.progress.perplexity = perplexity if math.isfinite(perplexity) else None
        mean = statistics.fmean(record[measure.name] for record in records)
        best = math.inf if self.progress.best_loss is None else self.progress.best_loss
        if mean < best:  # This is never true for NaN.
            self.progress.best_loss, self.progress.best_step = mean, self.progress.step
            if self.folder is not None:
                self.folder.save_model("best", self.summarize("running", monitor))

    def save_checkpoint(self) -> None:
        if self.folder is not None:
            self.folder.save_checkpoint(self.progress, self.position)

    def summarize(self, status: str, monitor: Monitor) -> TrainingSummary:
        model = self.accelerator.unwrap_model(self.model)
        return TrainingSummary(
            status=status,
            progress=self.progress,
            arguments=vars(self.args)
            | {
                "mixed_precision": self.accelerator.mixed_precision,
                "report_to": [getattr(tracker, "name", str(tracker)) for tracker in self.args.report_to],
            },
            processes=self.accelerator.num_processes,
            device=device_name(self.accelerator.device),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            log_history=monitor.log_history,
        )

    def finish(self, monitor: Monitor, signals: list[signal.Signals]) -> TrainingSummary:
        """Write the last checkpoint and the summary, and, unless the run was interrupted, the last model."""
        (stops,) = self.sum_over_processes([self.must_stop or self.stop_asked(signals)])
        status = "interrupted" if stops else "target reached" if self.target_reached() else "finished"
        summary = self.summarize(status, monitor)
        if self.folder is None:
            weights = collect_weights(self.accelerator, self.model)
            check_finite(self.accelerator, weights, self.progress.step, advice_when_diverged(self.args))
        else:
            self.save_checkpoint()
            if status != "interrupted":
                self.folder.save_model("last", summary)
            self.folder.save_summary(summary)
        return summary

    def release(self) -> None:
        """Leave the model as a caller expects it: evaluation mode, full precision, no compiled layers."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.args.gradient_checkpointing:
            checkpoint_layers(model, False)
        release_layers(model)
        unfreeze(model, self.frozen)
        model.eval()


def evaluation_shapes(space: SearchSpace | None, shape: Shape) -> dict[str, Shape]:
    """Return shapes to evaluate, by name: the largest, the smallest, and hand-crafted ones of a size in the middle."""
    if space is None:
        return {"model": shape}
    budget = (space.num_parameters(space.largest) + space.num_parameters(space.smallest)) // 2
    named = {name: space.named_shape(name, budget) for name in ("rectangle", "lower_triangle", "supershaper")}
    return {"largest": space.largest, "smallest": space.smallest, **named}


def count_work(config: SuperShaperConfig, shapes: Sequence[Shape], batch: Batch) -> list[int]:
    """Return the sequences, tokens, tokens with padding, labelled tokens and FLOPs of training `shapes` on `batch`."""
    sequences, length = batch["input_ids"].shape
    labelled, tokens = count_positions(batch)
    widths = [config.hidden_sizes or [] if shape is None else shape for shape in shapes]
    flops = int(training_flops(config, widths, sequences, length, labelled))
    return [sequences, tokens, sequences * length, labelled, flops]


def derive_seed(*numbers: int) -> int:
    """Mix several numbers into one seed, so that neighbouring numbers give unrelated random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
