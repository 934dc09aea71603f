"""Super pre-training: one supernet trained so that every shape works, under Accelerate.

`super_pretrain` prepares a `Run`; `Run.train` is the loop: step, log, evaluate, save. What a step computes is in
`sandwich.py`.

A step is a function of (weights, optimiser, seed, number of the step): shapes, order of the text, masks and dropout are
all drawn from the last two. So a run that goes on from a checkpoint equals one that was never stopped, and one process
computes what several do at the same global batch.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, get_scheduler
from transformers.utils import logging

from ..data.batches import MicroBatches
from ..data.sequences import check_vocabulary
from ..devices import copy_mapped_weights, device_name
from ..files import to_json
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.costs import training_flops
from ..model.modeling_supershaper import SuperShaperForMaskedLM
from ..model.shapes import SearchSpace
from ..publish.hub import save_for_hub
from ..report.tables import markdown_table
from ..search.evaluation import evaluate_shapes
from .arguments import SuperPretrainingArguments
from .checkpoints import caught_signals, list_checkpoints, newest_good_checkpoint, save_checkpoint
from .compilation import compile_layers, release_layers
from .distillation import Objective, OutsideTeacher
from .progress import MEASURES, SUMMARY_FILE, Monitor, Progress, TrainingSummary
from .sandwich import Batch, Shape, count_positions, decay_groups, sandwich_step, step_shapes


logger = logging.get_logger(__name__)

PROGRESS_FILE = "progress.json"


def super_pretrain(
    model: SuperShaperForMaskedLM,
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

    With `args.output_dir`, that folder gets `checkpoint-*`, `metrics.jsonl`, `best` and `last` (complete models with
    tokenizer and card), `evaluation.png` and `training_summary.json`. Without it nothing is written or resumed.

    Args:
        model: A supernet; with `sampling="fixed"` also a subnet.
        tokenizer: Chooses and masks the tokens.
        dataset: Sequences from `data.tokenize`, or a streaming dataset with a column `text`.
        args: See `SuperPretrainingArguments`.
        eval_batches: Masked batches from `batches.fixed_masks` to evaluate named shapes on.
        teacher: An outside teacher, for `args.teacher_weight`.
        description: Label of the progress bar.
        card: Sections and metadata of the model cards, as in `hub.model_card`.

    Returns:
        What happened; on SIGTERM or SIGINT with `status="interrupted"`, after a checkpoint.

    Raises:
        ValueError: If tokenizer and vocabulary disagree, `model` is a subnet and the sampling is not fixed, or no
            checkpoint is good where there are some.
        FileExistsError: If `args.resume_from_checkpoint` is not set and `args.output_dir` has checkpoints.
        FloatingPointError: If gradients are not finite for `args.max_skipped_steps` steps in a row.
        OSError: If a checkpoint cannot be written.
    """
    check_vocabulary(tokenizer, model.config)
    copy_mapped_weights(model)
    if args.target_perplexity is not None and not eval_batches:
        raise ValueError(f"target_perplexity={args.target_perplexity} needs eval_batches to be measured on.")
    accelerator = make_accelerator(args)
    check_teacher(args, model.config, tokenizer, teacher)
    run = Run(accelerator, model, tokenizer, args, make_objective(args, teacher), list(eval_batches), dict(card or {}))
    stream = MicroBatches(
        dataset,
        tokenizer,
        args.per_device_train_batch_size,
        args.mlm_probability,
        args.seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
        max_length=args.max_length,
        cross_documents=args.cross_documents,
        pad_to_multiple_of=args.max_length if args.torch_compile else None,  # another length would be another graph
    )
    try:
        with caught_signals() as signals:
            return run.train(stream, signals, description)
    finally:
        run.release()


class Run:
    """A training run on one process: what `super_pretrain` prepared, and the steps it is made of."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: SuperShaperForMaskedLM,
        tokenizer: PreTrainedTokenizerBase,
        args: SuperPretrainingArguments,
        objective: Objective,
        eval_batches: list[Batch],
        card: dict[str, Any],
    ) -> None:
        self.accelerator, self.tokenizer, self.args = accelerator, tokenizer, args
        self.objective, self.eval_batches, self.card = objective, eval_batches, card
        self.folder = None if args.output_dir is None else Path(args.output_dir)
        self.config: SuperShaperConfig = model.config
        self.space = None if args.sampling == "fixed" else SearchSpace.from_config(model.config)
        self.progress = Progress()
        self.stream_state: dict[str, Any] | None = None
        self.saved_step = 0
        self.signalled = False
        optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.learning_rate, fused=True)
        self.scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(), args.max_steps)
        if args.gradient_checkpointing:
            checkpoint_layers(model, True)
        if args.torch_compile:
            compile_layers(model, len(self.config.width_choices or [1]), args.max_steps, accelerator.device)
        model.train()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.scheduler)

    def train(self, stream: MicroBatches, signals: list[str], description: str) -> TrainingSummary:
        """Step, log, evaluate, save, until the last step, the target perplexity, or a signal."""
        args = self.args
        self.resume()
        batches = stream.iterate(self.stream_state)
        with closing(Monitor(self.accelerator, args, self.progress, description)) as monitor:
            status = "finished"
            while self.progress.step < args.max_steps and not self.target_reached():
                monitor.step(**self.step(self.read(batches), stop=bool(signals)))
                last = self.progress.step == args.max_steps
                with monitor.paused():
                    if self.eval_batches and (last or self.progress.step % (args.eval_steps or args.max_steps) == 0):
                        self.evaluate(monitor)
                    if self.signalled and not last:
                        status = "interrupted"
                        break
                    if self.progress.step % args.save_steps == 0:
                        self.save_checkpoint()
            if self.target_reached():
                status = "target reached"
            self.save_checkpoint()
            return self.finish(status, monitor)

    def read(self, batches: Iterator[tuple[Batch, dict[str, Any]]]) -> list[Batch]:
        """Return the micro-batches of the next step. If the text fails, keep the steps done so far."""
        micro_batches, state = [], self.stream_state
        try:
            for _ in range(self.args.gradient_accumulation_steps):
                batch, state = next(batches)
                micro_batches.append(batch)
        except Exception:
            if self.accelerator.num_processes == 1:  # several would wait here for one that did not fail
                self.save_checkpoint()
            raise
        self.stream_state = state
        return micro_batches

    def step(self, micro_batches: list[Batch], stop: bool) -> dict[str, Any]:
        """Train the shapes of one step; return what all processes together make of it."""
        args, progress, accelerator = self.args, self.progress, self.accelerator
        torch.manual_seed(derive_seed(args.seed, progress.step, accelerator.process_index))  # of dropout
        shapes = step_shapes(self.space, args, progress.step)
        learning_rate = self.scheduler.get_last_lr()[0]
        losses = sandwich_step(accelerator, self.model, micro_batches, shapes, self.objective)
        norm = self.update()
        counts = np.sum([count_work(self.config, shapes, batch) for batch in micro_batches], axis=0)
        # One exchange for all that is shown or decided upon.
        sums = torch.cat([losses.double(), torch.tensor([*counts, stop], dtype=torch.float64, device=losses.device)])
        *means, sequences, tokens, padded, labelled, flops, stops = accelerator.reduce(sums).tolist()
        progress.step += 1
        progress.sequences += int(sequences)
        progress.tokens += int(tokens)
        progress.padded_tokens += int(padded)
        progress.labelled += int(labelled)
        progress.flops += flops
        self.signalled = stops > 0
        return {"losses": means, "learning_rate": learning_rate, "gradient_norm": norm}

    def update(self) -> float:
        """Clip and apply the gradients, unless they are not finite; return their norm, equal on every process.

        Raises:
            FloatingPointError: If `max_skipped_steps` steps in a row had to be skipped.
        """
        accelerator, args, progress = self.accelerator, self.args, self.progress
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm))
        finite = math.isfinite(norm)
        if finite or accelerator.scaler is not None:  # the scaler of fp16 skips by itself, and learns from it
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite:
            self.scheduler.step()
            progress.skipped_in_a_row = 0
            return norm
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row == args.max_skipped_steps:
            newest = None if self.folder is None else next(iter(list_checkpoints(self.folder)), None)
            raise FloatingPointError(
                f"The gradients were not finite in {args.max_skipped_steps} steps in a row (the last: step "
                f"{progress.step + 1}). Lower learning_rate={args.learning_rate}, raise warmup_steps="
                f"{args.warmup_steps}, or train with bf16 instead of fp16. Newest checkpoint: {newest}."
            )
        return norm

    def evaluate(self, monitor: Monitor) -> None:
        """Evaluate the named shapes, and keep the model if it is the best so far.

        The best is the one with the lowest mean loss over the shapes.
        """
        model = self.accelerator.unwrap_model(self.model)
        shapes = evaluation_shapes(self.space, self.args.shape)
        with torch.compiler.set_stance("force_eager"):  # batches of many lengths, each of which would be compiled
            records = evaluate_shapes(
                model, self.eval_batches, list(shapes.values()), "Evaluating", accelerator=self.accelerator
            )
        results = {name: {key: r[key] for key in MEASURES} for name, r in zip(shapes, records, strict=True)}
        monitor.evaluated(results)
        self.progress.perplexity = records[0]["perplexity"]
        mean = statistics.fmean(record["loss"] for record in records)
        best = math.inf if self.progress.best_loss is None else self.progress.best_loss
        if mean < best:  # never if it is NaN
            self.progress.best_loss, self.progress.best_step = mean, self.progress.step
            self.save_model("best", self.summarize("running", monitor))

    def target_reached(self) -> bool:
        """Return whether the first shape was good enough when it was last evaluated."""
        target, perplexity = self.args.target_perplexity, self.progress.perplexity
        return target is not None and perplexity is not None and perplexity <= target

    def resume(self) -> None:
        """Go on from the newest good checkpoint, if there is one."""
        if self.folder is None:
            return
        if not self.args.resume_from_checkpoint and list_checkpoints(self.folder):
            raise FileExistsError(
                f"{self.folder} holds checkpoints, and resume_from_checkpoint=False. Choose another output_dir, or set "
                "resume_from_checkpoint=True."
            )
        checkpoint = newest_good_checkpoint(self.accelerator, self.folder)
        if checkpoint is None:
            return
        saved = json.loads((checkpoint / PROGRESS_FILE).read_text())
        if saved["hidden_sizes"] != self.config.hidden_sizes or saved["vocab_size"] != self.config.vocab_size:
            raise ValueError(
                f"{checkpoint} is of a model with hidden_sizes={saved['hidden_sizes']} and vocab_size="
                f"{saved['vocab_size']}, this one has {self.config.hidden_sizes} and {self.config.vocab_size}. Choose "
                "another output_dir."
            )
        now = self.conditions()
        changed = [
            f"{name} was {old!r}, is {now.get(name)!r}"
            for name, old in saved["conditions"].items()
            if old != now.get(name)
        ]
        if changed:
            logger.warning(
                f"Going on from {checkpoint} under other conditions, so not bit for bit: {'; '.join(changed)}."
            )
        self.accelerator.load_state(str(checkpoint))
        self.progress = Progress(**saved["progress"])
        self.saved_step = self.progress.step
        self.stream_state = self.position_in_text(checkpoint, saved["conditions"]["processes"])

    def position_in_text(self, checkpoint: Path, processes: int) -> dict[str, Any]:
        """Return where this process has to go on reading. A stored dataset can be shared out anew, a stream cannot."""
        state = json.loads((checkpoint / "stream_0.json").read_text())
        if "micro_batch" in state:
            return {"micro_batch": self.progress.step * self.args.gradient_accumulation_steps}
        if processes != self.accelerator.num_processes:
            raise ValueError(
                f"{checkpoint} was written by {processes} process(es) that each read a part of the stream, this run "
                f"has {self.accelerator.num_processes}. Start as many as before."
            )
        return json.loads((checkpoint / f"stream_{self.accelerator.process_index}.json").read_text())

    def conditions(self) -> dict[str, Any]:
        """Return what decides the result of a run, and so has to be equal when it goes on."""
        free = {
            "output_dir",
            "resume_from_checkpoint",
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "report_to",
            "dataloader_num_workers",
        }
        conditions = {name: value for name, value in vars(self.args).items() if name not in free}
        return conditions | {"processes": self.accelerator.num_processes}

    def save_checkpoint(self) -> None:
        """Write a checkpoint after the last whole step, if there is a folder and it has none yet."""
        if self.folder is None or self.saved_step == self.progress.step:
            return

        def write(folder: Path) -> None:
            rank = self.accelerator.process_index
            (folder / f"stream_{rank}.json").write_text(json.dumps(self.stream_state))
            if self.accelerator.is_main_process:
                saved = {
                    "progress": asdict(self.progress),
                    "conditions": self.conditions(),
                    "hidden_sizes": self.config.hidden_sizes,
                    "vocab_size": self.config.vocab_size,
                }
                (folder / PROGRESS_FILE).write_text(json.dumps(saved, indent=2))
                self.config.save_pretrained(folder)  # so that from_pretrained can look into a checkpoint
                self.tokenizer.save_pretrained(folder)

        save_checkpoint(self.accelerator, self.folder, self.progress.step, write, self.args.save_total_limit)
        self.saved_step = self.progress.step

    def save_model(self, name: str, summary: TrainingSummary) -> None:
        """Write the complete model, with tokenizer and card, to `output_dir/<name>`."""
        if self.folder is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        weights = self.accelerator.get_state_dict(self.model)  # collected from all processes under FSDP
        if self.accelerator.is_main_process:
            for tied in model.all_tied_weights_keys:
                weights.pop(tied, None)
            rows = [{"shape": shape, **measures} for shape, measures in summary.evaluation.items()]
            evaluation = markdown_table(rows) if rows else None
            sections = {"repo_id": self.folder.name, "training": summary.describe(), "evaluation": evaluation}
            logging.disable_progress_bar()  # one for each saved file would break up the bar of the run
            save_for_hub(
                model,
                self.folder / name,
                tokenizer=self.tokenizer,
                state_dict=weights,
                replace=True,
                **sections | self.card,
            )
            logging.enable_progress_bar()
        self.accelerator.wait_for_everyone()

    def summarize(self, status: str, monitor: Monitor) -> TrainingSummary:
        model = self.accelerator.unwrap_model(self.model)
        return TrainingSummary(
            status=status,
            progress=self.progress,
            arguments=vars(self.args) | {"mixed_precision": self.accelerator.mixed_precision},
            processes=self.accelerator.num_processes,
            device=device_name(self.accelerator.device),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            records=monitor.records,
        )

    def finish(self, status: str, monitor: Monitor) -> TrainingSummary:
        """Write the last model, unless the run is to go on later, and the summary."""
        summary = self.summarize(status, monitor)
        if status != "interrupted":
            self.save_model("last", summary)
        if self.folder is not None and self.accelerator.is_main_process:
            (self.folder / SUMMARY_FILE).write_text(to_json(summary.to_dict(), indent=2))
        return summary

    def release(self) -> None:
        """Leave the model as a caller expects it: evaluation mode, full precision, no compiled layers."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.args.gradient_checkpointing:
            checkpoint_layers(model, False)
        release_layers(model)
        model.eval()


def make_accelerator(args: SuperPretrainingArguments) -> Accelerator:
    drops_layers = args.drop_rate > 0 or (args.shape is not None and 0 in args.shape)
    # DDP must be told that a layer may have no part in the pass that exchanges the gradients.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=drops_layers, gradient_as_bucket_view=True)
    return Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=list(args.report_to) or None,
        project_dir=args.output_dir,
        kwargs_handlers=[ddp],
    )


def make_objective(args: SuperPretrainingArguments, teacher: OutsideTeacher | None) -> Objective:
    return Objective(
        distillation_weight=args.distillation_weight or 0.0,
        temperature=args.temperature,
        divergence=args.divergence,
        hidden_weight=args.hidden_weight,
        attention_weight=args.attention_weight,
        teacher=teacher,
        teacher_weight=args.teacher_weight,
        relation_heads=args.relation_heads,
    )


def check_teacher(
    args: SuperPretrainingArguments,
    config: SuperShaperConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher: OutsideTeacher | None,
) -> None:
    """Raise a ValueError unless an outside teacher can read the text and be compared at every width."""
    if teacher is None:
        return
    theirs: Any = teacher.model.config
    check_vocabulary(tokenizer, theirs)
    longest = getattr(theirs, "max_position_embeddings", args.max_length)
    if longest < args.max_length:
        raise ValueError(f"max_length={args.max_length} is more than the teacher's {longest} positions. Lower it.")
    heads = args.relation_heads or config.num_attention_heads
    widths = [*(config.width_choices or config.hidden_sizes or []), theirs.hidden_size]
    misfits = sorted({width for width in widths if width % heads})
    if misfits:
        raise ValueError(
            f"relation_heads={heads} does not divide {misfits}, widths of the student or the teacher. Use a number "
            f"that divides all of {sorted(set(widths))}: at most {math.gcd(*widths)}."
        )


def evaluation_shapes(space: SearchSpace | None, shape: Shape) -> dict[str, Shape]:
    """Return the shapes to evaluate by name: both ends, and hand-crafted ones of half the size between them."""
    if space is None:
        return {"model": shape}
    budget = (space.num_parameters(space.largest) + space.num_parameters(space.smallest)) // 2
    named = {name: space.named_shape(name, budget) for name in ("rectangle", "lower_triangle", "supershaper")}
    return {"largest": space.largest, "smallest": space.smallest, **named}


def count_work(config: SuperShaperConfig, shapes: Sequence[Shape], batch: Batch) -> np.ndarray:
    """Return the sequences, tokens, tokens with padding, labelled tokens and FLOPs of training `shapes` on `batch`."""
    sequences, length = batch["input_ids"].shape
    labelled, tokens = count_positions(batch)
    widths = [config.hidden_sizes or [] if shape is None else shape for shape in shapes]
    flops = training_flops(config, widths, sequences, length, labelled)
    return np.array([sequences, tokens, sequences * length, labelled, flops], dtype=np.float64)


def derive_seed(*numbers: int) -> int:
    """Mix several numbers into one seed, so that neighbouring numbers give unrelated random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def checkpoint_layers(model: SuperShaperForMaskedLM, on: bool) -> None:
    """Switch gradient checkpointing, which transformers 5.23 calls activation checkpointing."""
    verb = "enable" if on else "disable"
    newest = getattr(model, f"activation_checkpointing_{verb}", None)
    (newest or getattr(model, f"gradient_checkpointing_{verb}"))()
