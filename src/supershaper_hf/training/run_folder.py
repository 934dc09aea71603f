"""The folder of a run: who may write to it, and what is written to it.

output_dir/run.json                the conditions of the run, and the models that it has begun to write
           checkpoint-00000500/    what a run resumes from; see `checkpoints.py`
           best/  last/            complete models with code, tokenizer and card
           metrics.jsonl  evaluation.png  training_summary.json
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import lock, read_json, recover_folder, to_json, write_file, write_json
from ..processes import on_every_process, on_main_process
from ..publish.hub import save_for_hub
from ..report.tables import markdown_table
from .arguments import SuperPretrainingArguments
from .checkpoints import FREE_SPACE, explained, list_checkpoints, newest_good_checkpoint, save_checkpoint
from .progress import METRICS_FILE, PLOT_FILE, SUMMARY_FILE, Progress, TrainingSummary, hidden_progress_bars
from .resuming import TrainingState, changed_conditions, describe_changes, read_state, write_state
from .state import check_finite, collect_moments, collect_weights, restore_moments, restore_weights, unwrap


logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
RUN_FORMAT = "supershaper-hf run 1"
MODELS = ("best", "last")
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"


class RunFolder:
    """Writes and reads the folder of one run. Every process calls every method; only the main one writes.

    Args:
        accelerator: Connects the processes.
        model: The model from `Accelerator.prepare`.
        optimizer: The optimizer from `Accelerator.prepare`.
        tokenizer: Saved with every checkpoint and model.
        args: `output_dir`, `resume_from_checkpoint` and `save_total_limit` are used.
        conditions: See `resuming.run_conditions`.
        card: Further arguments of `save_for_hub`, such as sections and metadata of the model cards, or `pooling`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: AcceleratedOptimizer,
        tokenizer: PreTrainedTokenizerBase,
        args: SuperPretrainingArguments,
        conditions: dict[str, Any],
        card: dict[str, Any],
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.tokenizer = accelerator, model, optimizer, tokenizer
        self.args, self.conditions, self.card = args, conditions, card
        self.path = Path(str(args.output_dir))
        self.saved_step = 0
        self.models: list[str] = []  # which of `MODELS` a run of ours has begun to write here; main process only

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this run alone.

        Raises:
            RuntimeError: If another run holds it.
            FileExistsError: See `claim`.
        """
        with ExitStack() as stack:

            def begin() -> None:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(self.path))
                self.models = claim(self.path, self.args.resume_from_checkpoint)

            on_main_process(begin, self.accelerator)
            yield

    def resume(self) -> TrainingState | None:
        """Load the newest good checkpoint into model and optimizer; return its numbers, or `None` if there is none.

        Raises:
            ValueError: If all checkpoints are damaged, or a condition differs that cannot change within a run.
        """
        checkpoint = newest_good_checkpoint(self.accelerator, self.path)
        state = None if checkpoint is None else on_every_process(lambda: self._load(checkpoint), self.accelerator)
        on_main_process(self._write_run_file, self.accelerator)
        return state

    def _write_run_file(self) -> None:
        content = {"conditions": self.conditions, "models": self.models}
        with explained(self.path / RUN_FILE, lambda: FREE_SPACE):
            write_json(self.path / RUN_FILE, RUN_FORMAT, content)

    def _load(self, checkpoint: Path) -> TrainingState:
        state = read_state(checkpoint)
        changes = changed_conditions(state.conditions, self.conditions, checkpoint)
        step = state.progress.step
        if changes:
            logger.warning(
                f"Going on from {checkpoint} under changed conditions from step {step + 1} on: "
                f"{describe_changes(changes)}."
            )
        if any(change["name"] == "evaluation_text" for change in changes):  # losses on two texts cannot be compared
            state.progress.best_loss = state.progress.best_step = state.progress.perplexity = None
        state.progress.changes += [{"step": step, **change} for change in changes]
        model = unwrap(self.accelerator, self.model)
        restore_weights(model, load_file(checkpoint / WEIGHTS))
        restore_moments(model, self.optimizer, load_file(checkpoint / MOMENTS))
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.saved_step = step
        return state

    def save_checkpoint(self, progress: Progress, position: dict[str, Any] | None) -> None:
        """Write a checkpoint after the last whole step, unless there is one already.

        While steps are being skipped, no older checkpoint is removed: the reason may lie in the weights, and then only
        an older checkpoint can help.

        Args:
            progress: The counters.
            position: Where this process continues in the text.

        Raises:
            FloatingPointError: If a weight is not finite.
            OSError: If the checkpoint cannot be written.
        """
        if self.saved_step == progress.step:
            return
        weights = collect_weights(self.accelerator, self.model)
        moments = collect_moments(unwrap(self.accelerator, self.model), self.optimizer)
        scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        state = TrainingState(self.conditions, progress, gather_object([position]), scaler)
        check_finite(self.accelerator, weights, progress.step, advice_when_diverged(self.args))

        def write(folder: Path) -> None:
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
            save_file(moments, folder / MOMENTS)
            write_state(folder, state)
            self._write_config(folder)
            self.tokenizer.save_pretrained(folder)

        keep = None if progress.skipped_in_a_row else self.args.save_total_limit
        save_checkpoint(self.accelerator, self.path, progress.step, write, keep)
        self.saved_step = progress.step

    def _write_config(self, folder: Path) -> None:
        """Write a configuration, so that `from_pretrained` can look into a checkpoint.

        It announces no code of its own, because a checkpoint holds none: it is loaded with this package.
        """
        model = unwrap(self.accelerator, self.model)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP puts this before a class's name
        content = {name: value for name, value in config.to_diff_dict().items() if name != "auto_map"}
        write_file(folder / "config.json", to_json(content, indent=2) + "\n")

    def save_model(self, name: str, summary: TrainingSummary) -> None:
        """Write the complete model with code, tokenizer and card to the folder `name`.

        Raises:
            FloatingPointError: If a weight is not finite.
            OSError: If it cannot be written. The model that was there before stays.
        """
        weights = collect_weights(self.accelerator, self.model)
        check_finite(self.accelerator, weights, summary.progress.step, advice_when_diverged(self.args))
        rows = [{"shape": shape, **measures} for shape, measures in summary.evaluation.items()]
        evaluation = markdown_table(rows) if rows else None
        sections = {"repo_id": self.path.name, "training": summary.describe(), "evaluation": evaluation}

        def save() -> None:
            if name not in self.models:
                self.models.append(name)
                self._write_run_file()
            with explained(self.path / name, lambda: FREE_SPACE), hidden_progress_bars():
                save_for_hub(
                    unwrap(self.accelerator, self.model),
                    self.path / name,
                    tokenizer=self.tokenizer,
                    state_dict=weights,
                    replace=True,
                    **sections | self.card,
                )

        on_main_process(save, self.accelerator)

    def save_summary(self, summary: TrainingSummary) -> None:
        """Write `training_summary.json`."""

        def save() -> None:
            with explained(self.path / SUMMARY_FILE, lambda: FREE_SPACE):
                write_file(self.path / SUMMARY_FILE, to_json(summary.to_dict(), indent=2))

        on_main_process(save, self.accelerator)


def advice_when_diverged(args: SuperPretrainingArguments) -> str:
    """Return what to do when weights or gradients are not finite, with the newest checkpoint."""
    newest = None if args.output_dir is None else next(iter(list_checkpoints(args.output_dir)), None)
    return (
        f"Lower learning_rate={args.learning_rate}, look at weight_decay={args.weight_decay}, raise warmup_steps="
        f"{args.warmup_steps}, or train with bf16 instead of fp16, and start again: the new values are applied from "
        "the newest checkpoint on. If the run fails again soon, remove that checkpoint to resume from the one before "
        f"it. Newest checkpoint: {newest}."
    )


def claim(folder: Path, may_resume: bool) -> list[str]:
    """Make sure that a run of ours may write to `folder`. The caller has to hold its lock.

    Returns:
        Which of `MODELS` earlier runs have begun to write there. Without a `run.json`, all that are beside checkpoints.

    Raises:
        FileExistsError: If the folder holds files with the names of ours which no run of ours has written. Also if
            there are checkpoints, and the run may not resume.
    """
    checkpoints = list_checkpoints(folder)
    if checkpoints and not may_resume:
        raise FileExistsError(
            f"{folder} holds checkpoints, and resume_from_checkpoint=False. Choose another output_dir, or set "
            "resume_from_checkpoint=True."
        )
    names = [RUN_FILE, *MODELS, METRICS_FILE, SUMMARY_FILE, PLOT_FILE]
    found = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    models = _models_of_earlier_runs(folder)
    if models is not None:
        strange = [name for name in found if name in MODELS and name not in models]
    else:  # There is no run.json of ours. Checkpoints alone show that the other files are ours, too.
        strange, models = ([], list(MODELS)) if checkpoints else (found, [])
    if strange:
        raise FileExistsError(
            f"{folder} holds {', '.join(strange)}, but no run of super pre-training there has written it, so "
            "a run would replace what somebody else has made. Choose another output_dir, or move that away."
        )
    for name in models:  # A kill may have left one of them under a hidden name.
        recover_folder((folder / name).resolve())
    return models


def _models_of_earlier_runs(folder: Path) -> list[str] | None:
    """Return which of `MODELS` the runs in `folder` have begun to write; `None` if no run of ours began there."""
    try:
        return list(read_json(folder / RUN_FILE, RUN_FORMAT)["models"])
    except (KeyError, OSError, ValueError):
        return None
